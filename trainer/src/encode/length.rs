//! How long clips of S2V are: in pieces, each of which continues the one before, and as long as their audio.
//!
//! Source: Wan-Video/Wan2.2 wan/speech2video.py: pieces of `infer_frames` frames; the first three frames of the first are dropped.

use data::{DataError, speech_seconds};
use models::dit::speech::{COLUMNS_PER_LATENT, SIDE};
use models::dit::{Control, DitConfig};

use super::prompt::ClipRequest;
use crate::error::{Error, Result};

/// Frames of a piece.
const PIECE: u32 = 80;
/// Frames at the start of the first piece that are dropped: they are heard, and not shown.
pub(crate) const DROPPED: u32 = 3;

/// Frames of a piece of `request` as a length of its own, without those that are dropped of the first; the whole clip where it is one.
pub(crate) fn of_piece(request: &ClipRequest, control: &Control) -> u32 {
    let most = request.conditions.piece_frames.unwrap_or(PIECE) - DROPPED;
    if control.speech.is_some() { request.frames.min(most) } else { request.frames }
}

/// Pieces of `request`.
pub(crate) fn pieces(request: &ClipRequest, control: &Control) -> usize {
    let piece = of_piece(request, control);
    if piece == request.frames { 1 } else { (request.frames + DROPPED).div_ceil(piece + DROPPED) as usize }
}

/// See [`ClipRequest::settled`].
pub(super) fn settled(mut request: ClipRequest, dit: &DitConfig) -> Result<ClipRequest> {
    let facts = dit.kind.facts();
    let (Some(path), true) = (&request.conditions.audio, facts.speech) else {
        if request.frames == 0 {
            let why = "0 stands for the length of the audio, which S2V alone hears: give a number".into();
            return Err(Error::Setting { key: "frames of a clip".into(), why });
        }
        return Ok(request);
    };
    let (seconds, fps) = (speech_seconds(path)?, facts.whole.fps);
    if request.frames == 0 {
        let frames = ((seconds * fps) as u32).saturating_sub(DROPPED);
        request.frames = frames.saturating_sub(1) / 4 * 4 + 1;
    }
    let needed = f64::from(request.frames + DROPPED) / fps;
    if seconds + 1.0 / fps < needed {
        let reason = format!(
            "its audio lasts {seconds:.2} seconds, and {} frames need {needed:.2} ({DROPPED} more are heard than shown): ask for \
             fewer, or for 0, which is as many as there are",
            request.frames
        );
        return Err(DataError::unreadable(path, reason).into());
    }
    let unit = (SIDE * facts.whole.stride) as u32;
    if pieces(&request, &dit.control) > 1
        && (!request.width.is_multiple_of(unit) || !request.height.is_multiple_of(unit))
    {
        let (w, h) = (request.width, request.height);
        let nearest = data::SizeMultiple::new(unit).nearest(w, h);
        let why = format!(
            "{w}x{h}: both sides of a clip in pieces must be multiples of {unit}; nearest valid: {nearest}"
        );
        return Err(Error::Setting { key: "size of a clip".into(), why });
    }
    Ok(request)
}

/// Frames that each piece of `request` hears and has a pose for.
pub(super) fn heard(request: &ClipRequest, dit: &DitConfig) -> usize {
    COLUMNS_PER_LATENT * request.latents(dit).0
}

//! How long clips of S2V and Animate are: in pieces, each of which continues the one before; of S2V as long as their audio.
//!
//! Sources: Wan-Video/Wan2.2 wan/speech2video.py: pieces of `infer_frames` frames, of which the first three of the first are dropped;
//! wan/animate.py: pieces of `clip_len` frames, each of which begins with the last `refert_num` of the one before.

use data::{DataError, speech_seconds};
use models::dit::speech::{COLUMNS_PER_LATENT, SIDE};
use models::dit::{Control, DitConfig};

use super::prompt::ClipRequest;
use crate::error::{Error, Result};

/// Frames of a piece of S2V, and of one of Animate.
const PIECE: u32 = 80;
const ANIMATE_PIECE: u32 = 77;
/// Frames that a piece of Animate shares with the one before.
pub(crate) const SHARED: u32 = 1;
/// Frames at the start of the first piece that are dropped: they are heard, and not shown.
pub(crate) const DROPPED: u32 = 3;

/// Frames of a piece of `request` as a length of its own, without those that are dropped of the first; the whole clip where it is one.
pub(crate) fn of_piece(request: &ClipRequest, control: &Control) -> u32 {
    let most = request.conditions.piece_frames;
    match (&control.speech, &control.animate) {
        (Some(_), _) => request.frames.min(most.unwrap_or(PIECE) - DROPPED),
        (None, Some(_)) => request.frames.min(most.unwrap_or(ANIMATE_PIECE)),
        (None, None) => request.frames,
    }
}

/// Pieces of `request`.
pub(crate) fn pieces(request: &ClipRequest, control: &Control) -> usize {
    let piece = of_piece(request, control);
    let count = match &control.speech {
        _ if piece == request.frames => 1,
        Some(_) => (request.frames + DROPPED).div_ceil(piece + DROPPED),
        None => 1 + (request.frames - piece).div_ceil(piece - SHARED),
    };
    count as usize
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

/// The frames of the driving clip that the piece `index` of a clip of Animate follows, which plays back and forth behind its end.
pub(super) fn driving(request: &ClipRequest, control: &Control, index: usize) -> Vec<usize> {
    let (piece, all) = (of_piece(request, control) as usize, request.frames as usize);
    let around = (2 * all).saturating_sub(2).max(1);
    let place = |frame: usize| {
        let at = frame % around;
        if at < all { at } else { around - at }
    };
    let start = index * (piece - SHARED as usize);
    (start..start + piece).map(place).collect()
}

/// Frames that each piece of `request` hears and has a pose for.
pub(super) fn heard(request: &ClipRequest, dit: &DitConfig) -> usize {
    COLUMNS_PER_LATENT * request.latents(dit).0
}

//! Where the sound of an MP4 or MOV file begins against its picture.
//!
//! Encoders of AAC put samples before the sound itself, and files may begin with an empty stretch in either track: edit lists say so
//! (ISO/IEC 14496-12 §8.6.6). What reads audio here does not look at them.

use std::path::Path;

use super::bytes::{Bytes, boxes, child, descend};
use super::mp4::index_of;
use crate::error::Result;

/// Seconds of the first audio track that come before the first frame of the video track of the file at `path`; less than 0 where the
/// sound begins later. 0 for other files.
///
/// # Errors
/// A file that cannot be read.
pub(crate) fn sound_offset(path: &Path) -> Result<f64> {
    let Some(moov) = index_of(path)? else { return Ok(0.0) };
    let moov = Bytes(&moov);
    let Some(movie) = child(moov, b"mvhd").and_then(clock) else { return Ok(0.0) };
    let of = |kind: &[u8; 4]| {
        let is_of_kind = |track: &Bytes| {
            let handler = descend(*track, &[b"mdia", b"hdlr"]);
            handler.and_then(|handler| handler.0.get(8..12).map(|own| own == kind)) == Some(true)
        };
        let mut tracks = boxes(moov.0).filter(|(name, _)| name == b"trak").map(|(_, track)| track);
        tracks.find(is_of_kind).map(|track| beginning(track, movie))
    };
    let Some(sound) = of(b"soun") else { return Ok(0.0) };
    let picture = of(b"vide").map_or(0.0, |picture| picture.empty);
    Ok(sound.cut - (sound.empty - picture))
}

/// How a track begins.
#[derive(Default)]
struct Beginning {
    /// Seconds in which nothing is shown or heard.
    empty: f64,
    /// Seconds of the track that are cut off before the first that is.
    cut: f64,
}

/// By the track's edit list, whose lengths are in units of `movie` a second.
fn beginning(track: Bytes, movie: f64) -> Beginning {
    let read = || -> Option<Beginning> {
        let media = descend(track, &[b"mdia", b"mdhd"]).and_then(clock)?;
        let mut edits = descend(track, &[b"edts", b"elst"])?;
        let is_long = edits.u8()? == 1;
        edits.skip(3)?;
        let mut empty = 0.0;
        for _ in 0..edits.u32()? {
            let (length, start) = match is_long {
                true => (edits.u64()?, edits.u64()?.cast_signed()),
                false => (u64::from(edits.u32()?), i64::from(edits.i32()?)),
            };
            edits.skip(4)?;
            // An edit that starts at -1 is an empty stretch.
            if start >= 0 {
                return Some(Beginning { empty, cut: start as f64 / media });
            }
            empty += length as f64 / movie;
        }
        Some(Beginning { empty, cut: 0.0 })
    };
    read().unwrap_or_default()
}

/// Units a second of the header of a movie or of a track (§8.2.2, §8.4.2).
fn clock(mut header: Bytes) -> Option<f64> {
    let before = if *header.0.first()? == 1 { 20 } else { 12 };
    header.skip(before)?;
    header.u32().filter(|units| *units > 0).map(f64::from)
}

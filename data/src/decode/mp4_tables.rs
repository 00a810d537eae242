//! The sample tables of an MP4 track, unrolled into frames: their locations and display times.

use super::bytes::{Bytes, child};

/// The location of one encoded frame in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub size: u32,
}

/// When frames are shown.
#[derive(Debug, Clone, Default)]
pub(super) struct Shown {
    /// For each frame in display order, its time in seconds from the first that is shown; `None` when the edit cuts it off.
    pub times: Vec<Option<f64>>,
    /// When the last shown frame ends, in seconds.
    pub end: f64,
}

/// Time units.
pub(super) struct Clock {
    /// Units a second inside the track.
    track: f64,
    /// Units a second of the whole movie, in which edits give their length.
    movie: f64,
}

impl Clock {
    pub(super) fn read(moov: Bytes, track: Bytes) -> Option<Self> {
        let scale = |header: Bytes| -> Option<f64> {
            let mut header = header;
            let before = if *header.0.first()? == 1 { 20 } else { 12 };
            header.skip(before)?;
            header.u32().filter(|&units| units > 0).map(f64::from)
        };
        let media = super::bytes::descend(track, &[b"mdia", b"mdhd"]).and_then(scale)?;
        Some(Self { track: media, movie: child(moov, b"mvhd").and_then(scale)? })
    }
}

/// The part of the track that is shown (ISO/IEC 14496-12 §8.6.6). Encoders with B-frames use it to start at time 0.
#[derive(Debug, Default)]
pub(super) struct Edit {
    /// First composition time that is shown, in track units.
    start: i64,
    /// Length in movie units; `None` means to the end.
    length: Option<u64>,
}

impl Edit {
    /// The track's edit; `None` when it has several, which would need a cutter, not a reader.
    pub(super) fn read(track: Bytes) -> Option<Self> {
        let Some(mut elst) = child(track, b"edts").and_then(|edts| child(edts, b"elst")) else {
            return Some(Self::default());
        };
        let long = elst.u8()? == 1;
        elst.skip(3)?;
        let count = elst.u32()?;
        let mut found = None;
        for _ in 0..count {
            let (length, start) = if long {
                (elst.u64()?, elst.u64()?.cast_signed())
            } else {
                (u64::from(elst.u32()?), i64::from(elst.i32()?))
            };
            elst.skip(4)?;
            // An edit that starts at -1 is an empty stretch before the film: times are counted from the first frame anyway.
            if start >= 0 && found.replace(Self { start, length: (length > 0).then_some(length) }).is_some() {
                return None;
            }
        }
        Some(found.unwrap_or_default())
    }
}

type Parsed<T> = Result<T, String>;

/// A frame needs at least a one-byte length and a one-byte NAL header; smaller ones only occur in forged tables, where they
/// would let a short file claim a vast number of frames.
const SMALLEST_SAMPLE: u32 = 2;

/// Unrolls the tables of `stbl`.
///
/// # Errors
/// Tables that are missing, contradictory or refer beyond the file's end.
pub(super) fn read(
    stbl: Bytes,
    clock: &Clock,
    edit: &Edit,
    file_length: u64,
) -> Parsed<(Vec<Sample>, Shown)> {
    let table = |name: &[u8; 4]| child(stbl, name);
    let sizes = sample_sizes(table(b"stsz").ok_or("it has no table of frame sizes")?, file_length)?;
    if sizes.is_empty() {
        return Err("its video track holds no frame".into());
    }
    let chunks = chunk_offsets(stbl).ok_or("it has no table of chunk offsets")?;
    let runs = table(b"stsc").and_then(chunk_runs).ok_or("its table of chunks is damaged")?;
    let samples = place(&sizes, &chunks, &runs, file_length)?;
    let durations = table(b"stts").and_then(|stts| run_lengths(stts, sizes.len()));
    let durations = durations.ok_or("its table of frame times is shorter than its table of frames")?;
    let offsets = match table(b"ctts") {
        Some(ctts) => run_lengths(ctts, sizes.len()).ok_or("its table of display times is damaged")?,
        None => Vec::new(),
    };
    Ok((samples, display(&durations, &offsets, clock, edit)))
}

fn sample_sizes(mut stsz: Bytes, file_length: u64) -> Parsed<Vec<u32>> {
    let damaged = "its table of frame sizes is damaged";
    stsz.skip(4).ok_or(damaged)?;
    let (common, count) = stsz.u32().zip(stsz.u32()).ok_or(damaged)?;
    if common == 0 {
        // The length of the bytes at hand bounds the count, whatever the header claims.
        let bytes =
            usize::try_from(count).ok().and_then(|count| stsz.take(count.checked_mul(4)?)).ok_or(damaged)?;
        return Ok(bytes
            .chunks_exact(4)
            .map(|size| u32::from_be_bytes([size[0], size[1], size[2], size[3]]))
            .collect());
    }
    if common < SMALLEST_SAMPLE || u64::from(common) * u64::from(count) > file_length {
        return Err(format!("it claims {count} frames of {common} bytes each, more than the file holds"));
    }
    Ok(vec![common; count as usize])
}

fn chunk_offsets(stbl: Bytes) -> Option<Vec<u64>> {
    let long = child(stbl, b"co64");
    let mut table = long.or_else(|| child(stbl, b"stco"))?;
    table.skip(4)?;
    let count = table.u32()? as usize;
    if long.is_some() {
        let bytes = table.take(count.checked_mul(8)?)?;
        bytes.chunks_exact(8).map(|entry| Bytes(entry).u64()).collect()
    } else {
        let bytes = table.take(count.checked_mul(4)?)?;
        bytes.chunks_exact(4).map(|entry| Bytes(entry).u32().map(u64::from)).collect()
    }
}

/// From chunk (counted from 0) on, this many frames in each chunk.
struct ChunkRun {
    from_chunk: usize,
    frames: u32,
}

fn chunk_runs(mut stsc: Bytes) -> Option<Vec<ChunkRun>> {
    stsc.skip(4)?;
    let count = stsc.u32()? as usize;
    let bytes = stsc.take(count.checked_mul(12)?)?;
    let entry = |entry: &[u8]| {
        let mut entry = Bytes(entry);
        Some(ChunkRun { from_chunk: (entry.u32()? as usize).checked_sub(1)?, frames: entry.u32()? })
    };
    bytes.chunks_exact(12).map(entry).collect()
}

fn place(sizes: &[u32], chunks: &[u64], runs: &[ChunkRun], file_length: u64) -> Parsed<Vec<Sample>> {
    let mut samples = Vec::with_capacity(sizes.len());
    let mut runs = runs.iter().peekable();
    let mut per_chunk = 0;
    for (chunk, &start) in chunks.iter().enumerate() {
        while let Some(run) = runs.next_if(|run| run.from_chunk <= chunk) {
            per_chunk = run.frames;
        }
        let mut offset = start;
        let left = sizes.len() - samples.len();
        for &size in sizes[samples.len()..].iter().take(left.min(per_chunk as usize)) {
            let end = offset.checked_add(u64::from(size)).filter(|&end| end <= file_length);
            let end = end.ok_or_else(|| {
                format!("it is truncated: frame {} is beyond the end of the file", samples.len() + 1)
            })?;
            samples.push(Sample { offset, size });
            offset = end;
        }
    }
    if samples.len() < sizes.len() {
        return Err(format!("its index lists {} frames but places only {}", sizes.len(), samples.len()));
    }
    Ok(samples)
}

/// Unrolls `stts` or `ctts`: (count, value) pairs into one value a frame. `None` when they cover fewer than `wanted` frames.
/// Values are read as signed, which version 0 of `ctts` is not, but real offsets never need the top bit.
fn run_lengths(mut table: Bytes, wanted: usize) -> Option<Vec<i32>> {
    table.skip(4)?;
    let count = table.u32()?;
    let mut values = Vec::with_capacity(wanted);
    for _ in 0..count {
        let (repeat, value) = (table.u32()? as usize, table.i32()?);
        values.resize(values.len() + repeat.min(wanted - values.len()), value);
    }
    (values.len() == wanted).then_some(values)
}

fn display(durations: &[i32], offsets: &[i32], clock: &Clock, edit: &Edit) -> Shown {
    let mut decode_time = 0_i64;
    let mut composed: Vec<(i64, i64)> = Vec::with_capacity(durations.len());
    for (index, &duration) in durations.iter().enumerate() {
        let duration = i64::from(duration.max(0));
        composed.push((decode_time + i64::from(offsets.get(index).copied().unwrap_or(0)), duration));
        decode_time += duration;
    }
    composed.sort_unstable();
    let cut = edit
        .length
        .map_or(f64::INFINITY, |length| edit.start as f64 + length as f64 / clock.movie * clock.track);
    // Half a unit of slack: the edit's length was rounded to movie units.
    let is_shown = |time: i64| time >= edit.start && (time as f64) < cut - 0.5;
    // An edit list without frames is broken; players then show everything.
    let honour = composed.iter().any(|&(time, _)| is_shown(time));
    let kept = |time: i64| !honour || is_shown(time);
    let first = composed.iter().find(|&&(time, _)| kept(time)).map_or(0, |&(time, _)| time);
    let end =
        composed.iter().rev().find(|&&(time, _)| kept(time)).map_or(0, |&(time, duration)| time + duration);
    let seconds = |time: i64| (time - first) as f64 / clock.track;
    let times = composed.iter().map(|&(time, _)| kept(time).then(|| seconds(time))).collect();
    Shown { times, end: seconds(end) }
}

#[cfg(test)]
mod tests {
    use super::super::bytes::boxes;
    use super::*;

    #[test]
    fn b_frames_show_in_composition_order_and_the_edit_cuts() {
        let clock = Clock { track: 10.0, movie: 1000.0 };
        // Decoding order I P B B with times 2, 5, 3, 4 after a start offset of 2: the usual picture of B-frames.
        let shown = display(&[1; 4], &[2, 4, 1, 1], &clock, &Edit { start: 2, length: Some(300) });
        assert_eq!(shown.times, [Some(0.0), Some(0.1), Some(0.2), None]);
        assert!((shown.end - 0.3).abs() < 1e-9);
    }

    #[test]
    fn forged_counts_are_refused_before_anything_is_allocated() {
        let mut stsz = vec![0; 4];
        stsz.extend(1_u32.to_be_bytes());
        stsz.extend(u32::MAX.to_be_bytes());
        assert!(sample_sizes(Bytes(&stsz), 1000).is_err());
        stsz[4..8].copy_from_slice(&0_u32.to_be_bytes());
        assert!(sample_sizes(Bytes(&stsz), 1000).is_err());
        assert!(
            boxes(&[0, 0, 0, 1, b'a', b'b', b'c', b'd', 255, 255, 255, 255, 255, 255, 255, 255])
                .next()
                .is_none()
        );
    }
}

//! An MP4 file with one H.264 track, its index in front so that it plays while it loads.
//!
//! Written from ISO/IEC 14496-12 (boxes) and 14496-15 §5.3 (H.264); section numbers below are of the former.

use super::h264::Stream;

/// Units a second of the movie's clock.
const MOVIE_CLOCK: u32 = 1000;

/// The bytes of the file; `None` past the 4 GiB or the duration that its 32-bit fields hold.
pub(super) fn file(stream: &Stream, fps: f64, comment: Option<&str>) -> Option<Vec<u8>> {
    let ftyp = boxed(b"ftyp", &[b"isom".as_slice(), &be(0x200), b"isomiso2avc1mp41"].concat());
    let payload: usize = stream.samples.iter().map(Vec::len).sum();
    // The index holds the offset of the media, and its length does not depend on that offset: build it twice.
    let index_length = moov(stream, fps, 0, comment)?.len();
    let media_start = u32::try_from(ftyp.len() + index_length + 8).ok()?;
    u32::try_from(payload).ok()?.checked_add(media_start)?;
    let mut bytes = [ftyp, moov(stream, fps, media_start, comment)?].concat();
    bytes.reserve(payload + 8);
    bytes.extend(be(payload as u32 + 8));
    bytes.extend(b"mdat");
    bytes.extend(stream.samples.iter().flatten());
    Some(bytes)
}

fn be(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

fn boxed(name: &[u8; 4], contents: &[u8]) -> Vec<u8> {
    [be(contents.len() as u32 + 8).as_slice(), name, contents].concat()
}

/// A box that begins with a version and flags.
fn full(name: &[u8; 4], flags: u32, contents: &[u8]) -> Vec<u8> {
    boxed(name, &[be(flags).as_slice(), contents].concat())
}

/// Four-byte fields in a row.
fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|&value| be(value)).collect()
}

/// The picture as it is: no rotation, no scaling (§6.2.2).
const UPRIGHT: [u32; 9] = [0x1_0000, 0, 0, 0, 0x1_0000, 0, 0, 0, 0x4000_0000];

fn moov(stream: &Stream, fps: f64, media_start: u32, comment: Option<&str>) -> Option<Vec<u8>> {
    // A thousandth of a frame is fine enough for rates such as 23.976.
    let (clock, step) = ((fps * 1000.0).round() as u32, 1000_u32);
    let frames = u32::try_from(stream.samples.len()).ok()?;
    let duration = frames.checked_mul(step)?;
    let movie_duration = (f64::from(duration) / f64::from(clock) * f64::from(MOVIE_CLOCK)).round() as u32;
    // mvhd (§8.2.2): times, clock, duration, rate 1, volume 1, reserved, matrix, reserved, next track.
    let mut mvhd = words(&[0, 0, MOVIE_CLOCK, movie_duration, 0x1_0000, 0x100_0000, 0, 0]);
    mvhd.extend(words(&UPRIGHT));
    mvhd.extend(words(&[0, 0, 0, 0, 0, 0, 2]));
    // tkhd (§8.3.2), enabled and in the movie: times, track 1, duration, reserved, layer, volume, matrix, size.
    let mut tkhd = words(&[0, 0, 1, 0, movie_duration, 0, 0, 0, 0]);
    tkhd.extend(words(&UPRIGHT));
    tkhd.extend(words(&[u32::from(stream.width) << 16, u32::from(stream.height) << 16]));
    const UNDETERMINED_LANGUAGE: u32 = 0x55c4_0000;
    let mdhd = full(b"mdhd", 0, &words(&[0, 0, clock, duration, UNDETERMINED_LANGUAGE]));
    let hdlr = full(b"hdlr", 0, &[be(0).as_slice(), b"vide", &[0; 12], b"video\0"].concat());
    let same_file = full(b"url ", 1, &[]);
    let dinf = boxed(b"dinf", &full(b"dref", 0, &[be(1).as_slice(), &same_file].concat()));
    let table = boxed(b"stbl", &sample_tables(stream, frames, step, media_start)?);
    let minf = boxed(b"minf", &[full(b"vmhd", 1, &[0; 8]), dinf, table].concat());
    let mdia = boxed(b"mdia", &[mdhd, hdlr, minf].concat());
    let trak = boxed(b"trak", &[full(b"tkhd", 3, &tkhd), mdia].concat());
    let remark = comment.map_or_else(Vec::new, user_data);
    Some(boxed(b"moov", &[full(b"mvhd", 0, &mvhd), trak, remark].concat()))
}

/// A comment as players show it: the item list of QuickTime's metadata (Apple, QuickTime File Format, "Metadata"), which
/// ffprobe reads as `comment`.
fn user_data(comment: &str) -> Vec<u8> {
    const UTF8: u32 = 1;
    let data = boxed(b"data", &[words(&[UTF8, 0]).as_slice(), comment.as_bytes()].concat());
    let list = boxed(b"ilst", &boxed(b"\xa9cmt", &data));
    let handler = full(b"hdlr", 0, &[be(0).as_slice(), b"mdir", b"appl", &[0; 8], b"\0"].concat());
    boxed(b"udta", &full(b"meta", 0, &[handler, list].concat()))
}

/// Description, times, keyframes, chunk, sizes and offset (§8.5 to §8.7). All frames are one chunk.
fn sample_tables(stream: &Stream, frames: u32, step: u32, media_start: u32) -> Option<Vec<u8>> {
    let counted = |values: Vec<u32>| -> Vec<u8> {
        let mut bytes = words(&[values.len() as u32]);
        bytes.extend(words(&values));
        bytes
    };
    let sizes: Option<Vec<u32>> =
        stream.samples.iter().map(|sample| u32::try_from(sample.len()).ok()).collect();
    let keyframes = stream.keyframes.iter().map(|&index| index as u32 + 1).collect();
    let stsd = full(b"stsd", 0, &[be(1).as_slice(), &boxed(b"avc1", &description(stream)?)].concat());
    Some(
        [
            stsd,
            full(b"stts", 0, &words(&[1, frames, step])),
            full(b"stss", 0, &counted(keyframes)),
            full(b"stsc", 0, &words(&[1, 1, frames, 1])),
            full(b"stsz", 0, &[be(0).as_slice(), &counted(sizes?)].concat()),
            full(b"stco", 0, &words(&[1, media_start])),
        ]
        .concat(),
    )
}

/// The visual sample entry (§12.1.3) with the decoder settings and the colour.
fn description(stream: &Stream) -> Option<Vec<u8>> {
    let mut entry = vec![0, 0, 0, 0, 0, 0, 0, 1];
    entry.extend([0; 16]);
    entry.extend(stream.width.to_be_bytes());
    entry.extend(stream.height.to_be_bytes());
    const DOTS_PER_INCH_72: u32 = 0x48_0000;
    entry.extend(words(&[DOTS_PER_INCH_72, DOTS_PER_INCH_72, 0]));
    entry.extend(1_u16.to_be_bytes());
    entry.extend([0; 32]);
    entry.extend([0, 24, 0xff, 0xff]);
    entry.extend(boxed(b"avcC", &decoder_settings(stream)?));
    // BT.709 primaries, transfer and matrix, limited range: crate::colour::Colour::WRITTEN.
    entry.extend(boxed(b"colr", b"nclx\0\x01\0\x01\0\x01\0"));
    Some(entry)
}

/// AVCDecoderConfigurationRecord (14496-15 §5.3.3.1) with four-byte lengths.
fn decoder_settings(stream: &Stream) -> Option<Vec<u8>> {
    let profile_and_level = stream.sps.get(1..4)?;
    let mut record = vec![1];
    record.extend(profile_and_level);
    record.extend([0xff, 0xe1]);
    record.extend(u16::try_from(stream.sps.len()).ok()?.to_be_bytes());
    record.extend(&stream.sps);
    record.push(1);
    record.extend(u16::try_from(stream.pps.len()).ok()?.to_be_bytes());
    record.extend(&stream.pps);
    const HIGH: u8 = 100;
    if profile_and_level[0] >= HIGH {
        // 4:2:0, eight bits, no extensions.
        record.extend([0xfd, 0xf8, 0xf8, 0]);
    }
    Some(record)
}

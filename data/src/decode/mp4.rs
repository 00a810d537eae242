//! The index of an MP4 or MOV file: which bytes are which frame, and when it is shown.
//!
//! Written from ISO/IEC 14496-12 (boxes) and 14496-15 (H.264 in MP4). Only the `moov` box is read into memory, and it is never
//! larger than the file; a table's count is checked against its bytes.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::bytes::{Bytes, boxes, child, descend};
use super::mp4_tables::{self, Sample, Shown};
use super::pixel_aspect::PixelAspect;
use crate::colour::{Colour, Matrix, Range};
use crate::error::{DataError, Result};

/// What a video file turned out to hold.
pub(super) enum Contents {
    /// H.264 in plain MP4: can be decoded in process.
    H264(Box<Track>),
    /// Anything else, in words for people.
    Other(String),
}

/// An H.264 video track.
pub(super) struct Track {
    /// Bytes of the length field before each NAL unit: 1 to 4.
    pub length_bytes: usize,
    /// Sequence parameter sets.
    pub sps: Vec<Vec<u8>>,
    /// Picture parameter sets.
    pub pps: Vec<Vec<u8>>,
    /// Clockwise quarter turns to show the picture upright.
    pub quarter_turns: u8,
    /// Pixel aspect in the container, which takes precedence over the stream's.
    pub pixel_aspect: Option<PixelAspect>,
    /// Colour in the container, for streams that do not specify it.
    pub colour: Option<Colour>,
    /// The location of each frame in the file, in decoding order.
    pub samples: Vec<Sample>,
    /// What to show, in display order.
    pub shown: Shown,
}

/// Top-level boxes that a file may begin with if it is MP4 or MOV at all.
const FIRST_BOXES: [&[u8; 4]; 8] = [b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp"];

/// Reads the index of a video file.
///
/// # Errors
/// [`DataError::Unreadable`] for a file that is empty, truncated or whose tables contradict it.
pub(super) fn read(path: &Path) -> Result<Contents> {
    let mut file = File::open(path).map_err(DataError::io("read", path))?;
    let length = file.metadata().map_err(DataError::io("read", path))?.len();
    if length == 0 {
        return Err(DataError::unreadable(path, "the file is empty"));
    }
    match find_moov(&mut file, length).map_err(DataError::io("read", path))? {
        TopLevel::NotMp4 => Ok(Contents::Other(format!("a {} video", extension(path)))),
        TopLevel::Fragmented => Ok(Contents::Other("a fragmented MP4".into())),
        TopLevel::Broken(reason) => Err(DataError::unreadable(path, reason)),
        TopLevel::Moov(moov) => {
            contents(Bytes(&moov), length).map_err(|reason| DataError::unreadable(path, reason))
        }
    }
}

/// The `moov` box of the file at `path`; nothing where it is no MP4 or has none that can be read.
///
/// # Errors
/// A file that cannot be read.
pub(super) fn index_of(path: &Path) -> Result<Option<Vec<u8>>> {
    let mut file = File::open(path).map_err(DataError::io("read", path))?;
    let length = file.metadata().map_err(DataError::io("read", path))?.len();
    match find_moov(&mut file, length).map_err(DataError::io("read", path))? {
        TopLevel::Moov(moov) => Ok(Some(moov)),
        TopLevel::NotMp4 | TopLevel::Fragmented | TopLevel::Broken(_) => Ok(None),
    }
}

fn extension(path: &Path) -> String {
    path.extension().map(|extension| extension.to_string_lossy().to_uppercase()).unwrap_or_default()
}

enum TopLevel {
    Moov(Vec<u8>),
    Fragmented,
    NotMp4,
    Broken(String),
}

fn find_moov(file: &mut File, length: u64) -> std::io::Result<TopLevel> {
    let mut at = 0;
    let mut moov = None;
    while at + 8 <= length {
        file.seek(SeekFrom::Start(at))?;
        let mut header = [0; 16];
        let wanted = if at + 16 <= length { 16 } else { 8 };
        file.read_exact(&mut header[..wanted])?;
        let mut fields = Bytes(&header[..wanted]);
        let (Some(short), Some(name)) = (fields.u32(), fields.four_letters()) else { break };
        if at == 0 && !FIRST_BOXES.contains(&&name) {
            return Ok(TopLevel::NotMp4);
        }
        let (size, header_bytes) = match short {
            0 => (length - at, 8),
            1 => (fields.u64().unwrap_or(0), 16),
            size => (u64::from(size), 8),
        };
        if size < header_bytes || size > length - at {
            // Some cameras append bytes that are not a box; the index shows whether a truncated file still has every frame.
            if moov.is_some() {
                break;
            }
            let (name, left) = (name.escape_ascii(), length - at);
            let reason =
                format!("it is truncated or damaged: box '{name}' claims {size} bytes where {left} are left");
            return Ok(TopLevel::Broken(reason));
        }
        match &name {
            b"moof" => return Ok(TopLevel::Fragmented),
            b"moov" => {
                file.seek(SeekFrom::Start(at + header_bytes))?;
                let mut contents = Vec::new();
                file.by_ref().take(size - header_bytes).read_to_end(&mut contents)?;
                moov = Some(contents);
            }
            _ => {}
        }
        at += size;
    }
    Ok(match moov {
        Some(moov) => TopLevel::Moov(moov),
        None => {
            TopLevel::Broken("it has no index (no 'moov' box): the recording was probably cut off".into())
        }
    })
}

type Parsed<T> = std::result::Result<T, String>;

fn contents(moov: Bytes, file_length: u64) -> Parsed<Contents> {
    let tracks = || boxes(moov.0).filter(|(name, _)| name == b"trak").map(|(_, track)| track);
    let is_video = |track: &Bytes| {
        descend(*track, &[b"mdia", b"hdlr"]).and_then(|hdlr| hdlr.0.get(8..12).map(|kind| kind == b"vide"))
    };
    let track = tracks().find(|track| is_video(track) == Some(true)).ok_or("it has no video track")?;
    let table =
        descend(track, &[b"mdia", b"minf", b"stbl"]).ok_or("the index of its video track is damaged")?;
    let (codec, entry) = sample_entry(table).ok_or("the description of its video track is damaged")?;
    if !matches!(&codec, b"avc1" | b"avc3") {
        return Ok(Contents::Other(codec_name(codec)));
    }
    if child(moov, b"mvex").is_some() {
        return Ok(Contents::Other("a fragmented MP4".into()));
    }
    let avcc = child(entry, b"avcC").ok_or("its H.264 track has no decoder settings (avcC)")?;
    let (length_bytes, sps, pps) =
        decoder_settings(avcc).ok_or("its H.264 decoder settings (avcC) are damaged")?;
    if sps.is_empty() || pps.is_empty() {
        return Ok(Contents::Other("H.264 with its settings inside the stream".into()));
    }
    let clock = mp4_tables::Clock::read(moov, track).ok_or("its time scale is missing or zero")?;
    let Some(edit) = mp4_tables::Edit::read(track) else {
        return Ok(Contents::Other("an MP4 with several edits".into()));
    };
    let (samples, shown) = mp4_tables::read(table, &clock, &edit, file_length)?;
    let quarter_turns = quarter_turns(track).unwrap_or(0);
    let colour = child(entry, b"colr").and_then(container_colour);
    // The `pasp` box (§12.1.4): horizontal and vertical spacing.
    let pixel_aspect = child(entry, b"pasp").and_then(|mut pasp| PixelAspect::new(pasp.u32()?, pasp.u32()?));
    Ok(Contents::H264(Box::new(Track {
        length_bytes,
        sps,
        pps,
        quarter_turns,
        pixel_aspect,
        colour,
        samples,
        shown,
    })))
}

/// Codec letters of the first sample description, and the boxes inside it.
fn sample_entry(table: Bytes) -> Option<([u8; 4], Bytes)> {
    let mut stsd = child(table, b"stsd")?;
    stsd.skip(8)?;
    let (codec, mut entry) = boxes(stsd.0).next()?;
    // The fixed fields of a visual sample entry take 78 bytes (§12.1.3).
    entry.skip(78)?;
    Some((codec, entry))
}

fn codec_name(letters: [u8; 4]) -> String {
    match &letters {
        b"hvc1" | b"hev1" | b"dvh1" | b"dvhe" => "HEVC (H.265)".into(),
        b"av01" => "AV1".into(),
        b"vp08" | b"vp09" => "VP8/VP9".into(),
        b"mp4v" => "MPEG-4 part 2".into(),
        b"jpeg" | b"mjpa" | b"mjpb" => "Motion JPEG".into(),
        [b'a', b'p', ..] => "ProRes".into(),
        other => format!("the codec '{}'", other.escape_ascii()),
    }
}

/// AVCDecoderConfigurationRecord (14496-15 §5.3.3.1).
#[allow(clippy::type_complexity)] // Three plain lists, named where they land.
fn decoder_settings(mut avcc: Bytes) -> Option<(usize, Vec<Vec<u8>>, Vec<Vec<u8>>)> {
    avcc.skip(4)?;
    let length_bytes = usize::from(avcc.u8()? & 3) + 1;
    let mut sets = |mask: u8| -> Option<Vec<Vec<u8>>> {
        let count = avcc.u8()? & mask;
        (0..count)
            .map(|_| {
                let length = usize::from(avcc.u16()?);
                avcc.take(length).map(<[u8]>::to_vec)
            })
            .collect()
    };
    let sps = sets(0x1f)?;
    let pps = sets(0xff)?;
    Some((length_bytes, sps, pps))
}

/// Rotation of the track header's matrix (§8.3.2). Phones film sideways and write the turn here.
fn quarter_turns(track: Bytes) -> Option<u8> {
    let mut tkhd = child(track, b"tkhd")?;
    let before_matrix = if *tkhd.0.first()? == 1 { 52 } else { 40 };
    tkhd.skip(before_matrix)?;
    let (a, b) = (tkhd.i32()?, tkhd.i32()?);
    tkhd.skip(4)?;
    let (c, d) = (tkhd.i32()?, tkhd.i32()?);
    Some(match (a.signum(), b.signum(), c.signum(), d.signum()) {
        (0, 1, -1, 0) => 1,
        (-1, 0, 0, -1) => 2,
        (0, -1, 1, 0) => 3,
        _ => 0,
    })
}

/// The `colr` box (§12.1.5): `nclx`, or QuickTime's `nclc` without the range flag.
fn container_colour(mut colr: Bytes) -> Option<Colour> {
    let kind = colr.four_letters()?;
    colr.skip(4)?;
    let matrix = Matrix::from_code(u32::from(colr.u16()?));
    let range = match &kind {
        b"nclx" if colr.u8()? & 0x80 != 0 => Range::Full,
        b"nclx" | b"nclc" => Range::Limited,
        _ => return None,
    };
    Some(Colour { matrix, range })
}

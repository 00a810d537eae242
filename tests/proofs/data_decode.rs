//! Decoding returns the encoded frames at the right times, and damage is reported.

use std::path::{Path, PathBuf};

use data::decode::{Engine, Frame, Probe, frames, probe};
use data::{
    DataError, Film, Media, write_commented_gif, write_commented_webp, write_gif, write_mp4, write_webp,
};
use proofs::film::{brightness, drifting, flat, psnr};
use proptest::prelude::*;

const RATE: f64 = 16.0;

fn fixture(name: &str) -> PathBuf {
    proofs::fixture("data").join(name)
}

fn decode(media: &Media) -> data::Result<(Probe, Vec<Frame>)> {
    let probe = probe(media, RATE)?;
    let frames: data::Result<Vec<Frame>> = frames(media, &probe)?.collect();
    Ok((probe, frames?))
}

fn assert_frames_match(decoded: &[Frame], film: &Film, least_db: f64) {
    assert_eq!(decoded.len(), film.len());
    for (index, (decoded, original)) in decoded.iter().zip(film.frames()).enumerate() {
        let db = psnr(&decoded.rgb, original);
        assert!(db > least_db, "frame {index}: {db:.1} dB");
    }
}

/// The encoder's coarsest quantiser gives about 37 dB on smooth pictures; a wrong colour matrix, range or frame order gives
/// less than 25.
const H264_DB: f64 = 34.0;

#[test]
fn mp4_comes_back_frame_by_frame() {
    let folder = tempfile::tempdir().unwrap();
    let film = drifting(96, 64, 37);
    let path = folder.path().join("a.mp4");
    write_mp4(&path, &film, RATE).unwrap();
    let (probe, decoded) = decode(&Media::Video(path)).unwrap();
    assert_eq!((probe.width, probe.height, probe.engine), (96, 64, Engine::OpenH264));
    assert!((probe.end - 37.0 / RATE).abs() < 1e-6);
    assert!(decoded.iter().enumerate().all(|(index, frame)| (frame.time - index as f64 / RATE).abs() < 1e-6));
    assert_frames_match(&decoded, &film, H264_DB);

    // Cameras append bytes of their own; they are not the film's business.
    let mut bytes = std::fs::read(folder.path().join("a.mp4")).unwrap();
    bytes.extend(b"camera notes, not a box");
    let path = folder.path().join("b.mp4");
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(decode(&Media::Video(path)).unwrap().1, decoded);
}

#[test]
fn odd_and_tiny_sizes_are_filled_up_for_h264_only() {
    let folder = tempfile::tempdir().unwrap();
    for (width, height, coded) in [(83, 47, (84, 48)), (8, 6, (16, 16)), (17, 16, (18, 16))] {
        let film = drifting(width, height, 5);
        let path = folder.path().join("odd.mp4");
        write_mp4(&path, &film, 23.976).unwrap();
        let (probe, decoded) = decode(&Media::Video(path)).unwrap();
        assert_eq!((probe.width, probe.height), coded);
        let inside: Vec<u8> = (0..height as usize)
            .flat_map(|row| {
                let start = row * coded.0 as usize * 3;
                decoded[4].rgb[start..start + width as usize * 3].to_vec()
            })
            .collect();
        let db = psnr(&inside, film.frames().nth(4).unwrap());
        assert!(db > H264_DB - 4.0, "{width}x{height}: {db:.1} dB");
    }
}

/// The fixture's brightness rises by 10 each frame; it was coded by x264 with three B-frames, so that decoding order is not
/// display order, and with an edit list.
#[test]
fn b_frames_come_in_display_order() {
    let (probe, decoded) = decode(&Media::Video(fixture("b_frames.mp4"))).unwrap();
    assert_eq!((probe.engine, decoded.len()), (Engine::OpenH264, 20));
    for (index, frame) in decoded.iter().enumerate() {
        assert!((frame.time - index as f64 / 25.0).abs() < 1e-6);
        // The moving square adds up to 2, and the last ramp values saturate.
        let expected = (30 + 10 * index).min(216) as u8;
        assert!(brightness(&frame.rgb).abs_diff(expected) <= 4, "frame {index}: {}", brightness(&frame.rgb));
    }
}

#[test]
fn sideways_film_is_turned_upright() {
    let (_, flat) = decode(&Media::Video(fixture("b_frames.mp4"))).unwrap();
    let (probe, turned) = decode(&Media::Video(fixture("turned.mov"))).unwrap();
    assert_eq!((probe.width, probe.height), (48, 80));
    let at = |frame: &Frame, column: u32, row: u32| frame.rgb[((row * frame.width + column) * 3) as usize];
    // Frame 3 has its bright square at columns 12 to 20, rows 16 to 32; the file asks for a quarter turn to the left.
    for (column, row) in [(0, 0), (14, 20), (18, 30), (14, 10), (79, 47)] {
        assert_eq!(at(&turned[3], row, 79 - column), at(&flat[3], column, row));
    }
}

#[test]
fn gif_webp_and_apng_come_back_with_their_times() {
    let folder = tempfile::tempdir().unwrap();
    let film = drifting(40, 30, 9);
    let webp = folder.path().join("a.webp");
    write_webp(&webp, &film, RATE).unwrap();
    let (probe, decoded) = decode(&Media::Animation(webp)).unwrap();
    // WebP is written lossless.
    assert_frames_match(&decoded, &film, f64::MAX);
    assert!((probe.end - 9.0 / RATE).abs() < 1e-3);

    let gif = folder.path().join("a.gif");
    write_gif(&gif, &film, RATE).unwrap();
    let (probe, decoded) = decode(&Media::Animation(gif)).unwrap();
    // 256 colours a frame, on a film with thousands, undithered.
    assert_frames_match(&decoded, &film, 24.0);
    assert!((probe.end - 9.0 / RATE).abs() < 5e-3 + 1e-9);

    let apng = folder.path().join("a.png");
    write_apng(&apng, &film, 3, 50);
    let (probe, decoded) = decode(&Media::Animation(apng)).unwrap();
    assert_frames_match(&decoded, &film, f64::MAX);
    assert!((probe.end - 9.0 * 3.0 / 50.0).abs() < 1e-6);
}

/// A comment of several blocks, with what its container gives a meaning, neither harms the clip nor is lost.
#[test]
fn comments_are_in_gif_and_webp_files_that_still_decode() {
    let folder = tempfile::tempdir().unwrap();
    let film = drifting(40, 30, 3);
    let comment = format!("{}: <4> steps & distilled", "long ".repeat(60));
    let (gif, webp) = (folder.path().join("a.gif"), folder.path().join("a.webp"));
    write_commented_gif(&gif, &film, RATE, Some(&comment)).unwrap();
    write_commented_webp(&webp, &film, RATE, Some(&comment)).unwrap();
    for (path, tolerance) in [(&gif, 24.0), (&webp, f64::MAX)] {
        let (probe, decoded) = decode(&Media::Animation(path.clone())).unwrap();
        assert_eq!(probe.times.len(), 3);
        assert_frames_match(&decoded, &film, tolerance);
    }
    let has = |bytes: &[u8], text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    let bytes = std::fs::read(&gif).unwrap();
    let start = bytes.windows(2).position(|pair| pair == [0x21, 0xFE]).unwrap() + 2;
    let (mut at, mut text) = (start, Vec::new());
    while bytes[at] != 0 {
        let end = at + 1 + usize::from(bytes[at]);
        text.extend(&bytes[at + 1..end]);
        at = end;
    }
    assert_eq!(String::from_utf8(text).unwrap(), comment);
    assert_eq!(bytes[at + 1..], [0x3B], "the file does not end behind the comment");
    let bytes = std::fs::read(&webp).unwrap();
    assert_eq!(u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize + 8, bytes.len());
    assert_eq!(bytes[20] & 0b100, 0b100, "the header does not tell of the metadata");
    assert!(has(&bytes, "XMP ") && has(&bytes, "&lt;4&gt; steps &amp; distilled"));
}

fn write_apng(path: &Path, film: &Film, numerator: u16, denominator: u16) {
    let file = std::fs::File::create(path).unwrap();
    let mut encoder = png::Encoder::new(file, film.width(), film.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_animated(film.len() as u32, 0).unwrap();
    encoder.set_frame_delay(numerator, denominator).unwrap();
    let mut writer = encoder.write_header().unwrap();
    for frame in film.frames() {
        writer.write_image_data(frame).unwrap();
    }
    writer.finish().unwrap();
}

#[test]
fn other_codecs_go_through_ffmpeg_or_say_what_to_do() {
    match decode(&Media::Video(fixture("vp9.webm"))) {
        Ok((probe, decoded)) => {
            assert_eq!((probe.engine, decoded.len()), (Engine::Ffmpeg, 20));
            assert!(decoded.windows(2).all(|pair| brightness(&pair[0].rgb) < brightness(&pair[1].rgb)));
        }
        Err(error) => {
            let text = error.to_string();
            assert!(matches!(error, DataError::NoDecoder { .. }), "{text}");
            assert!(
                text.contains("vp9.webm") && text.contains("install ffmpeg") && text.contains("H.264"),
                "{text}"
            );
        }
    }
}

#[test]
fn damaged_files_are_named_with_the_damage() {
    let folder = tempfile::tempdir().unwrap();
    let film = drifting(64, 48, 9);
    let whole = folder.path().join("whole.mp4");
    write_mp4(&whole, &film, RATE).unwrap();
    let bytes = std::fs::read(&whole).unwrap();
    let refused = |name: &str, bytes: &[u8], kind: fn(PathBuf) -> Media, wanted: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let text = decode(&kind(path)).unwrap_err().to_string();
        assert!(text.contains(name) && text.contains(wanted), "{text}");
    };
    refused("empty.mp4", &[], Media::Video, "empty");
    refused("cut.mp4", &bytes[..bytes.len() - 100], Media::Video, "truncated");
    let mut no_index = bytes.clone();
    let moov = no_index.windows(4).position(|name| name == b"moov").unwrap();
    no_index[moov..moov + 4].copy_from_slice(b"free");
    refused("no_index.mp4", &no_index, Media::Video, "no index");
    let mut no_frames = bytes.clone();
    let stsz = no_frames.windows(4).position(|name| name == b"stsz").unwrap();
    no_frames[stsz + 12..stsz + 16].fill(0);
    refused("no_frames.mp4", &no_frames, Media::Video, "no frame");
    let mut noise = bytes.clone();
    let middle = noise.len() - 400;
    noise[middle..].iter_mut().for_each(|byte| *byte ^= 0xa5);
    refused("noise.mp4", &noise, Media::Video, "damaged");
    refused("text.gif", b"hello", Media::Animation, "neither GIF");
    refused("cut.png", b"\x89PNG\r\n\x1a\n\0\0\0", Media::Still, "cannot be used");
}

/// A GIF whose header claims 65535x65535 pixels would take 17 GB.
#[test]
fn a_lying_picture_header_is_refused_before_memory_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let gif = folder.path().join("vast.gif");
    write_gif(&gif, &flat(4, 4, &[9, 8]), 10.0).unwrap();
    let mut bytes = std::fs::read(&gif).unwrap();
    bytes[6..10].fill(0xff);
    std::fs::write(&gif, bytes).unwrap();
    let text = decode(&Media::Animation(gif)).unwrap_err().to_string();
    assert!(text.contains("65535x65535"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Whatever is done to an MP4's bytes, the answer is frames or an error. Most of the file is index, so most flips hit it.
    #[test]
    fn corrupted_mp4_never_panics(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>(), truncate in prop::bool::weighted(0.2)) {
        let mut bytes = std::fs::read(fixture("b_frames.mp4")).unwrap();
        let index_bytes = bytes.len();
        for (place, value) in flips {
            bytes[place.index(index_bytes)] = value;
        }
        if truncate {
            bytes.truncate(cut.index(index_bytes));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.mp4");
        std::fs::write(&path, &bytes).unwrap();
        let _ = decode(&Media::Video(path));
    }

    #[test]
    fn corrupted_animations_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), webp in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gif");
        let film = drifting(12, 10, 3);
        if webp { write_webp(&path, &film, RATE).unwrap() } else { write_gif(&path, &film, RATE).unwrap() }
        let mut bytes = std::fs::read(&path).unwrap();
        for (place, value) in flips {
            let at = place.index(bytes.len());
            bytes[at] = value;
        }
        std::fs::write(&path, &bytes).unwrap();
        let _ = decode(&Media::Animation(path));
    }
}

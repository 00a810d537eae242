//! Files of clips that ask for more than they are worth, and what is read of their shapes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use data::decode::{PixelAspect, frames, probe};
use data::{DataConfig, Dataset, Media, SizeMultiple, write_mp4, write_webp};
use proofs::film::drifting;

fn refusal(media: &Media) -> String {
    let opened =
        probe(media, 16.0).and_then(|probe| frames(media, &probe)?.collect::<data::Result<Vec<_>>>());
    opened.map(|frames| frames.len()).unwrap_err().to_string()
}

/// A GIF of 32 x 24 pixels whose one frame says that it has `side` x `side`.
fn gif_with_frame(side: u16) -> Vec<u8> {
    let mut gif = b"GIF89a\x20\0\x18\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0".to_vec();
    gif.extend(side.to_le_bytes());
    gif.extend(side.to_le_bytes());
    gif.extend(b"\0\x02\x02\x44\x01\0;");
    gif
}

/// Frames of a GIF need not have the size of its canvas. Both files asked for gigabytes, one of 1.8 KB for 16 GiB.
#[test]
fn a_small_gif_gets_no_memory_for_huge_frames() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.gif");
    fs::write(&path, gif_with_frame(20_000)).unwrap();
    for path in [path, proofs::fixture("data/huge_frames.gif")] {
        let told = refusal(&Media::Animation(path)).to_lowercase();
        assert!(told.contains("limit") || told.contains("memory"), "{told}");
    }
}

/// A WebP of 3 KB that says it is a million pixels high took six seconds and a quarter of a gigabyte.
#[test]
fn a_canvas_beyond_the_limits_is_refused_before_it_is_decoded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.webp");
    write_webp(&path, &drifting(32, 32, 3), 16.0).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    assert_eq!(&bytes[12..16], b"VP8X");
    bytes[27..30].copy_from_slice(&1_048_599_u32.to_le_bytes()[..3]);
    fs::write(&path, bytes).unwrap();
    let begun = Instant::now();
    for media in [Media::Animation(path.clone()), Media::Still(path)] {
        let told = refusal(&media);
        assert!(told.contains("32x1048600 pixels") && told.contains("16384 a side"), "{told}");
    }
    assert!(begun.elapsed() < Duration::from_secs(2));
}

/// A part that claims gigabytes would be allocated before it is found to be missing.
#[test]
fn a_webp_part_larger_than_its_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.webp");
    write_webp(&path, &drifting(32, 32, 3), 16.0).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(4).rposition(|name| name == b"ANMF").unwrap() + 4;
    bytes[at..at + 4].copy_from_slice(&0xf000_0000_u32.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    assert!(refusal(&Media::Animation(path)).contains("truncated"));
}

/// An MP4 that says its pixels are `width`:`height`: the box takes the place of the colour's.
fn anamorphic(path: &Path, width: u32, height: u32) {
    write_mp4(path, &drifting(48, 32, 9), 16.0).unwrap();
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.windows(4).position(|name| name == b"colr").unwrap() - 4;
    let pasp = [&16_u32.to_be_bytes()[..], b"pasp", &width.to_be_bytes(), &height.to_be_bytes()].concat();
    bytes[at..at + 16].copy_from_slice(&pasp);
    fs::write(path, bytes).unwrap();
}

fn dataset(folder: &Path, sizes: &[[u32; 2]]) -> Dataset {
    let json = serde_json::json!({ "folder": folder, "sizes": sizes, "frames": [5] });
    let config: DataConfig = serde_json::from_value(json).unwrap();
    Dataset::build(&config, SizeMultiple::new(16), 16.0, &mut |_, _| {}).unwrap()
}

fn clips() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.mp4");
    fs::write(path.with_extension("txt"), "a wave").unwrap();
    (folder, path)
}

#[test]
fn pixels_that_are_not_square_are_stretched_to_what_players_show() {
    let (folder, path) = clips();
    let pixels = |sizes: &[[u32; 2]]| {
        let data = dataset(folder.path(), sizes);
        let clip = data.clips(0, &data.windows).unwrap().next().unwrap().unwrap();
        (clip.bucket.width, clip.bucket.height, clip.pixels)
    };
    anamorphic(&path, 1, 1);
    let data = dataset(folder.path(), &[[48, 32], [96, 32]]);
    let square_key = data.key(&data.windows[0], "content", "vae");
    let (width, height, stored) = pixels(&[[48, 32], [96, 32]]);
    assert_eq!((width, height), (48, 32));

    anamorphic(&path, 2, 1);
    let probe = probe(&Media::Video(path.clone()), 16.0).unwrap();
    assert_eq!(probe.pixel_aspect, PixelAspect::new(4, 2).unwrap());
    assert_eq!(((probe.width, probe.height), probe.displayed()), ((48, 32), (96, 32)));
    let (width, height, stretched) = pixels(&[[48, 32], [96, 32]]);
    assert_eq!((width, height), (96, 32));
    // Nothing is cut off: every second pixel of the stretched frame is near one of the stored frame.
    let row = |pixels: &[u8], width: usize| pixels[..width * 3].to_vec();
    let (from, to) = (row(&stored, 48), row(&stretched, 96));
    for column in 0..48 {
        let near = to[2 * column * 3]
            .abs_diff(from[column * 3])
            .min(to[(2 * column + 1) * 3].abs_diff(from[column * 3]));
        assert!(near <= 6, "column {column}: {near}");
    }
    // Into the stored size the middle half of the width goes.
    let (_, _, cut) = pixels(&[[48, 32]]);
    let middle: Vec<u8> = to[24 * 3..72 * 3].to_vec();
    let far = row(&cut, 48).iter().zip(&middle).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!(far <= 8, "{far}");
    let data = dataset(folder.path(), &[[48, 32]]);
    assert_ne!(
        data.key(&data.windows[0], "content", "vae"),
        square_key,
        "the entry of square pixels is found"
    );
}

#[test]
fn footage_tells_what_is_trained_of_what_was_found() {
    let (folder, path) = clips();
    write_mp4(&path, &drifting(48, 32, 80), 16.0).unwrap();
    let footage = dataset(folder.path(), &[[48, 32]]).footage();
    assert!((footage.found - 5.0).abs() < 1e-6 && (footage.trained - 5.0 / 16.0).abs() < 1e-6, "{footage:?}");
    assert_eq!(footage.cut.len(), 1);
    assert_eq!(footage.cut[0].0, "a.mp4");
}

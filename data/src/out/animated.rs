//! GIF and animated WebP.

use std::path::Path;

use image::codecs::gif::{GifEncoder, Repeat};
use image::codecs::webp::WebPEncoder;
use image::{Delay, ExtendedColorType, RgbImage};

use super::{Film, check_rate, save};
use crate::error::{DataError, Result};

/// Writes a GIF that loops for ever. GIF counts time in hundredths of a second: delays alternate so that the whole is in time.
///
/// # Errors
/// [`DataError::Encode`] for a rate above GIF's limit (50 a second), [`DataError::Io`] if it cannot be written.
pub fn write_gif(path: &Path, film: &Film, fps: f64) -> Result<()> {
    write_commented_gif(path, film, fps, None)
}

/// [`write_gif`] with a comment in the file.
///
/// # Errors
/// As there.
pub fn write_commented_gif(path: &Path, film: &Film, fps: f64, comment: Option<&str>) -> Result<()> {
    const FASTEST: f64 = 50.0;
    check_rate(path, fps)?;
    if fps > FASTEST {
        return Err(DataError::encode(
            path,
            format!("a GIF shows at most {FASTEST} frames a second, not {fps}"),
        ));
    }
    let broken = |error: image::ImageError| DataError::encode(path, error);
    let mut bytes = Vec::new();
    // Speed 10 of 30: visibly as good as 1, and many times faster.
    let mut encoder = GifEncoder::new_with_speed(&mut bytes, 10);
    encoder.set_repeat(Repeat::Infinite).map_err(broken)?;
    for (index, frame) in film.frames().enumerate() {
        let picture = picture(path, film, frame)?;
        let hundredths = boundary(index + 1, fps, 100.0) - boundary(index, fps, 100.0);
        let delay = Delay::from_numer_denom_ms((hundredths * 10) as u32, 1);
        let rgba = image::DynamicImage::ImageRgb8(picture).into_rgba8();
        encoder.encode_frame(image::Frame::from_parts(rgba, 0, 0, delay)).map_err(broken)?;
    }
    drop(encoder);
    if let Some(comment) = comment {
        // In front of the byte that ends the file.
        let end = bytes.len().saturating_sub(1);
        bytes.splice(end..end, gif_comment(comment));
    }
    save(path, &bytes)
}

/// A comment extension: its text in blocks of 255 bytes at most.
fn gif_comment(text: &str) -> Vec<u8> {
    const COMMENT: [u8; 2] = [0x21, 0xFE];
    let mut extension = COMMENT.to_vec();
    for block in text.as_bytes().chunks(255) {
        extension.push(block.len() as u8);
        extension.extend(block);
    }
    extension.push(0);
    extension
}

/// When frame `index` begins, in `units` a second, rounded.
fn boundary(index: usize, fps: f64, units: f64) -> u64 {
    (index as f64 / fps * units).round() as u64
}

fn picture(path: &Path, film: &Film, frame: &[u8]) -> Result<RgbImage> {
    let picture = RgbImage::from_raw(film.width(), film.height(), frame.to_vec());
    picture.ok_or_else(|| DataError::encode(path, "a frame is incomplete"))
}

/// Writes a lossless animated WebP that loops for ever.
///
/// The `image` crate encodes each frame; the container is written here, after
/// developers.google.com/speed/webp/docs/riff_container.
///
/// # Errors
/// [`DataError::Encode`] for sides above 16384 pixels, [`DataError::Io`] if it cannot be written.
pub fn write_webp(path: &Path, film: &Film, fps: f64) -> Result<()> {
    write_commented_webp(path, film, fps, None)
}

/// [`write_webp`] with a description in the file's XMP metadata.
///
/// # Errors
/// As there.
pub fn write_commented_webp(path: &Path, film: &Film, fps: f64, comment: Option<&str>) -> Result<()> {
    check_rate(path, fps)?;
    let (width, height) = (film.width(), film.height());
    const ANIMATED: u8 = 0b10;
    const HAS_XMP: u8 = 0b100;
    let flags = if comment.is_some() { ANIMATED | HAS_XMP } else { ANIMATED };
    let mut body = b"WEBP".to_vec();
    let header = [&[flags, 0, 0, 0], three_bytes(width - 1).as_slice(), &three_bytes(height - 1)].concat();
    append_chunk(&mut body, b"VP8X", &header);
    // Background colour (unused: every frame covers the whole), then the number of loops: 0 for ever.
    append_chunk(&mut body, b"ANIM", &[0; 6]);
    for (index, frame) in film.frames().enumerate() {
        let milliseconds = boundary(index + 1, fps, 1000.0) - boundary(index, fps, 1000.0);
        let mut coded = Vec::new();
        let encoder = WebPEncoder::new_lossless(&mut coded);
        encoder
            .encode(frame, width, height, ExtendedColorType::Rgb8)
            .map_err(|error| DataError::encode(path, error))?;
        let picture = lossless_chunk(&coded)
            .ok_or_else(|| DataError::encode(path, "the WebP encoder gave no picture"))?;
        const REPLACE_WHOLE: u8 = 0b10;
        let mut contents = vec![0; 6];
        contents.extend(three_bytes(width - 1));
        contents.extend(three_bytes(height - 1));
        contents.extend(three_bytes(milliseconds as u32));
        contents.push(REPLACE_WHOLE);
        append_chunk(&mut contents, b"VP8L", picture);
        append_chunk(&mut body, b"ANMF", &contents);
    }
    if let Some(comment) = comment {
        append_chunk(&mut body, b"XMP ", description(comment).as_bytes());
    }
    let length = u32::try_from(body.len()).map_err(|_| DataError::encode(path, "a WebP ends at 4 GiB"))?;
    save(path, &[b"RIFF".as_slice(), &length.to_le_bytes(), &body].concat())
}

/// XMP metadata with a description alone.
fn description(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!(
        r#"<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description><rdf:Alt><rdf:li xml:lang="x-default">{text}</rdf:li></rdf:Alt></dc:description></rdf:Description></rdf:RDF></x:xmpmeta>"#
    )
}

fn three_bytes(value: u32) -> [u8; 3] {
    let [low, middle, high, _] = value.to_le_bytes();
    [low, middle, high]
}

/// A RIFF chunk: name, length, contents, and a byte to make it even.
fn append_chunk(body: &mut Vec<u8>, name: &[u8; 4], contents: &[u8]) {
    body.extend(name);
    body.extend((contents.len() as u32).to_le_bytes());
    body.extend(contents);
    body.extend(std::iter::repeat_n(0, contents.len() % 2));
}

/// The picture inside a single-frame WebP file.
fn lossless_chunk(file: &[u8]) -> Option<&[u8]> {
    let mut rest = file.get(12..)?;
    loop {
        let (header, after) = rest.split_at_checked(8)?;
        let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        let contents = after.get(..length)?;
        if header.starts_with(b"VP8L") {
            return Some(contents);
        }
        rest = after.get(length + length % 2..)?;
    }
}

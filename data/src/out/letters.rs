//! Writing on pictures, in a bitmap font of 8 x 8 pixels a letter.

use font8x8::UnicodeFonts;
use image::{Rgb, RgbImage};

const INK: Rgb<u8> = Rgb([228, 228, 231]);
/// Side of a letter, in pixels of the font.
const SIDE: u32 = 8;
/// Width from which a picture has letters of twice the size.
const WIDE: u32 = 1200;

/// How many pixels a pixel of the font takes on a picture of `width`.
pub(super) fn scale(width: u32) -> u32 {
    if width >= WIDE { 2 } else { 1 }
}

/// Height of a line on a picture of `width`, with the space below it.
pub(super) fn height(width: u32) -> u32 {
    (SIDE + 2) * scale(width)
}

/// Writes `text` from `left` and `top` on, as far as it fits; three dots mark truncated text. Letters that the font lacks
/// become question marks.
pub(super) fn write(picture: &mut RgbImage, (left, top): (u32, u32), scale: u32, text: &str) {
    let room = (picture.width().saturating_sub(left) / (SIDE * scale)) as usize;
    let text: Vec<char> = text.chars().collect();
    let fitting: Vec<char> = match text.len() <= room {
        true => text,
        false => text.iter().take(room.saturating_sub(3)).copied().chain("...".chars()).take(room).collect(),
    };
    for (place, letter) in fitting.into_iter().enumerate() {
        let origin = (left + place as u32 * SIDE * scale, top);
        draw(picture, origin, scale, glyph(letter));
    }
}

/// The rows of a letter, the leftmost pixel in the lowest bit.
fn glyph(letter: char) -> [u8; SIDE as usize] {
    let fonts = [font8x8::BASIC_FONTS.get(letter), font8x8::LATIN_FONTS.get(letter)];
    let known = fonts.into_iter().flatten().next();
    known.or_else(|| font8x8::BASIC_FONTS.get('?')).unwrap_or_default()
}

fn draw(picture: &mut RgbImage, (left, top): (u32, u32), scale: u32, rows: [u8; SIDE as usize]) {
    for (y, row) in (0..SIDE * scale).map(|y| (y, rows[(y / scale) as usize])) {
        for x in (0..SIDE * scale).filter(|x| row >> (x / scale) & 1 == 1) {
            if let Some(pixel) = picture.get_pixel_mut_checked(left + x, top + y) {
                *pixel = INK;
            }
        }
    }
}

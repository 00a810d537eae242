//! The sequence parameter set of an H.264 stream (ITU-T H.264 §7.3.2.1): size, colour, and whether openh264 can decode it.

use super::pixel_aspect::PixelAspect;
use crate::colour::{Colour, Matrix, Range};

/// The stream's description of its pictures.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sps {
    /// Width in pixels after cropping.
    pub width: u32,
    /// Height in pixels after cropping.
    pub height: u32,
    /// Pixel aspect, if specified.
    pub pixel_aspect: Option<PixelAspect>,
    /// Colour, if specified.
    pub colour: Option<Colour>,
    /// Why openh264 cannot decode it, in words for people.
    pub unsupported: Option<String>,
}

/// The limit of level 5.2, the highest that openh264 supports (Table A-1); it also bounds the allocation for a forged header.
const MAX_MACROBLOCKS: u64 = 36_864;

/// Profiles that carry chroma format and bit depth (§7.3.2.1.1).
const HIGH_PROFILES: [u32; 13] = [100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135];

/// Reads a NAL unit that holds a sequence parameter set; `None` when it is damaged.
pub(super) fn parse(nal: &[u8]) -> Option<Sps> {
    let bytes = without_emulation(nal.get(1..)?);
    let mut bits = Bits { bytes: &bytes, at: 0 };
    let profile = bits.read(8)?;
    bits.read(16)?;
    bits.unsigned()?;
    let mut unsupported = None;
    if HIGH_PROFILES.contains(&profile) {
        unsupported = sample_format(&mut bits)?;
    }
    picture_order(&mut bits)?;
    bits.unsigned()?;
    bits.read(1)?;
    let columns = u64::from(bits.unsigned()?) + 1;
    let rows = u64::from(bits.unsigned()?) + 1;
    let frames_only = bits.read(1)? == 1;
    if !frames_only {
        bits.read(1)?;
        unsupported.get_or_insert("interlaced H.264".into());
    }
    bits.read(1)?;
    let rows = if frames_only { rows } else { rows * 2 };
    if columns.checked_mul(rows)? > MAX_MACROBLOCKS {
        unsupported.get_or_insert(format!("H.264 of {}x{} pixels", columns * 16, rows * 16));
    }
    let crop = if bits.read(1)? == 1 {
        [bits.unsigned()?, bits.unsigned()?, bits.unsigned()?, bits.unsigned()?].map(u64::from)
    } else {
        [0; 4]
    };
    let vertical_unit = if frames_only { 2 } else { 4 };
    let width = (columns * 16).checked_sub((crop[0] + crop[1]) * 2).filter(|&side| side > 0)?;
    let height = (rows * 16).checked_sub((crop[2] + crop[3]) * vertical_unit).filter(|&side| side > 0)?;
    let (mut pixel_aspect, mut colour) = (None, None);
    if bits.read(1)? == 1
        && let Some(aspect) = signalled_aspect(&mut bits)
    {
        pixel_aspect = aspect;
        colour = signalled_colour(&mut bits);
    }
    let (width, height) = (width.try_into().ok()?, height.try_into().ok()?);
    Some(Sps { width, height, pixel_aspect, colour, unsupported })
}

/// Reads chroma format, bit depth and scaling lists; inside is the reason when openh264 does not take them.
fn sample_format(bits: &mut Bits) -> Option<Option<String>> {
    let chroma = bits.unsigned()?;
    if chroma == 3 {
        bits.read(1)?;
    }
    let depth = bits.unsigned()?.max(bits.unsigned()?).checked_add(8)?;
    bits.read(1)?;
    if bits.read(1)? == 1 {
        for list in 0..if chroma == 3 { 12 } else { 8 } {
            if bits.read(1)? == 1 {
                skip_scaling_list(bits, if list < 6 { 16 } else { 64 })?;
            }
        }
    }
    Some(match (chroma, depth) {
        (1, 8) => None,
        (1, depth) => Some(format!("{depth}-bit H.264")),
        (0, _) => Some("grey H.264".into()),
        _ => Some("H.264 with full chroma (4:2:2 or 4:4:4)".into()),
    })
}

fn skip_scaling_list(bits: &mut Bits, size: u32) -> Option<()> {
    let (mut last, mut next) = (8_i64, 8_i64);
    for _ in 0..size {
        if next != 0 {
            next = (last + i64::from(bits.signed()?)).rem_euclid(256);
        }
        last = if next == 0 { last } else { next };
    }
    Some(())
}

fn picture_order(bits: &mut Bits) -> Option<()> {
    bits.unsigned()?;
    match bits.unsigned()? {
        0 => {
            bits.unsigned()?;
        }
        1 => {
            bits.read(1)?;
            bits.signed()?;
            bits.signed()?;
            for _ in 0..bits.unsigned()?.min(255) {
                bits.signed()?;
            }
        }
        _ => {}
    }
    Some(())
}

/// Shapes of pixels by `aspect_ratio_idc` from 1 on (Table E-1).
const ASPECTS: [(u32, u32); 16] = [
    (1, 1),
    (12, 11),
    (10, 11),
    (16, 11),
    (40, 33),
    (24, 11),
    (20, 11),
    (32, 11),
    (80, 33),
    (18, 11),
    (15, 11),
    (64, 33),
    (160, 99),
    (4, 3),
    (3, 2),
    (2, 1),
];

/// The start of the VUI parameters (§E.1.1): the pixel aspect, if specified. `None` if they are truncated.
fn signalled_aspect(bits: &mut Bits) -> Option<Option<PixelAspect>> {
    const EXTENDED: u32 = 255;
    if bits.read(1)? == 0 {
        return Some(None);
    }
    let (width, height) = match bits.read(8)? {
        EXTENDED => (bits.read(16)?, bits.read(16)?),
        index => ASPECTS.get((index as usize).wrapping_sub(1)).copied().unwrap_or((0, 0)),
    };
    Some(PixelAspect::new(width, height))
}

/// The VUI parameters after the pixel aspect, up to the colour description.
fn signalled_colour(bits: &mut Bits) -> Option<Colour> {
    if bits.read(1)? == 1 {
        bits.read(1)?;
    }
    if bits.read(1)? == 0 {
        return None;
    }
    bits.read(3)?;
    let range = if bits.read(1)? == 1 { Range::Full } else { Range::Limited };
    let matrix = if bits.read(1)? == 1 {
        bits.read(16)?;
        Matrix::from_code(bits.read(8)?)
    } else {
        Matrix::Bt601
    };
    Some(Colour { matrix, range })
}

/// Drops the 3 of each 0 0 3, which keeps start codes out of the payload (§7.4.1).
fn without_emulation(nal: &[u8]) -> Vec<u8> {
    let mut zeros = 0;
    let mut kept = Vec::with_capacity(nal.len());
    for &byte in nal {
        if zeros >= 2 && byte == 3 {
            zeros = 0;
            continue;
        }
        zeros = if byte == 0 { zeros + 1 } else { 0 };
        kept.push(byte);
    }
    kept
}

struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Bits<'_> {
    fn read(&mut self, count: u32) -> Option<u32> {
        let mut value = 0;
        for _ in 0..count {
            let byte = self.bytes.get(self.at / 8)?;
            value = value << 1 | u32::from(byte >> (7 - self.at % 8) & 1);
            self.at += 1;
        }
        Some(value)
    }

    /// ue(v) of §9.1.
    fn unsigned(&mut self) -> Option<u32> {
        let mut zeros = 0;
        while self.read(1)? == 0 {
            zeros += 1;
            if zeros > 31 {
                return None;
            }
        }
        let suffix = self.read(zeros)?;
        Some((1_u32 << zeros) - 1 + suffix)
    }

    /// se(v) of §9.1.1.
    fn signed(&mut self) -> Option<i32> {
        let code = i64::from(self.unsigned()?);
        i32::try_from(if code % 2 == 0 { -(code / 2) } else { (code + 1) / 2 }).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A baseline stream of 48 x 32 pixels whose shape is 12:11 by its number, and 20:13 in so many words.
    #[test]
    fn the_shape_of_a_pixel_is_read_from_the_stream() {
        // Level and flags, then: four numbers, no gaps, 3 columns, 2 rows, frames only, direct, no crop, VUI, shape.
        let head = format!("{:08b}{:08b}{:08b}{:08b}", 0x67, 66, 0, 30);
        let body = "11011010001101011011";
        assert_eq!(body.len(), 20);
        let read = |shape: &str| {
            let bits = format!("{head}{body}{shape}00100000000000000000");
            let bytes: Vec<u8> = (0..bits.len() / 8)
                .map(|i| u8::from_str_radix(&bits[8 * i..8 * i + 8], 2).unwrap())
                .collect();
            let sps = parse(&bytes).unwrap();
            (sps.width, sps.height, sps.pixel_aspect)
        };
        let shape = |w, h| PixelAspect::new(w, h);
        assert_eq!(read(&format!("{:08b}", 2)), (48, 32, shape(12, 11)));
        assert_eq!(read(&format!("{:08b}{:016b}{:016b}", 255, 20, 13)), (48, 32, shape(20, 13)));
        assert_eq!(read(&format!("{:08b}", 0)), (48, 32, None));
    }
}

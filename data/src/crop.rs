//! What is cut off the sides of frames before they are scaled.

use serde::{Deserialize, Serialize};

use crate::decode::Frame;

/// Pixels that are cut off each side of a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Crop {
    /// On the left.
    pub left: u32,
    /// On the right.
    pub right: u32,
    /// Above.
    pub top: u32,
    /// Below.
    pub bottom: u32,
}

impl Crop {
    /// Nothing is cut off.
    pub const NONE: Self = Self { left: 0, right: 0, top: 0, bottom: 0 };

    /// Whether nothing is cut off.
    pub fn is_none(self) -> bool {
        self == Self::NONE
    }

    /// What is left of a frame of this width and height; 0 for a side of which nothing is left.
    pub fn rest(self, (width, height): (u32, u32)) -> (u32, u32) {
        let less = |side: u32, a: u32, b: u32| side.saturating_sub(a).saturating_sub(b);
        (less(width, self.left, self.right), less(height, self.top, self.bottom))
    }

    /// The same shares of a frame of the size `to` as of one of the size `from`, to the nearest pixel.
    pub(crate) fn scaled(self, from: (u32, u32), to: (u32, u32)) -> Self {
        let of = |pixels: u32, from: u32, to: u32| {
            (f64::from(pixels) * f64::from(to) / f64::from(from.max(1))).round() as u32
        };
        let across = |pixels| of(pixels, from.0, to.0);
        let down = |pixels| of(pixels, from.1, to.1);
        Self {
            left: across(self.left),
            right: across(self.right),
            top: down(self.top),
            bottom: down(self.bottom),
        }
    }

    /// `frame` without what is cut off; unchanged if nothing would be left of it.
    pub(crate) fn of(self, frame: Frame) -> Frame {
        let (width, height) = self.rest((frame.width, frame.height));
        if self.is_none() || width == 0 || height == 0 {
            return frame;
        }
        let stride = 3 * frame.width as usize;
        let (from, bytes) = (3 * self.left as usize, 3 * width as usize);
        let rows = frame.rgb.chunks_exact(stride).skip(self.top as usize).take(height as usize);
        let rgb = rows.flat_map(|row| &row[from..from + bytes]).copied().collect();
        Frame { width, height, rgb, time: frame.time }
    }
}

impl std::fmt::Display for Crop {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        let sides = [(self.left, "left"), (self.right, "right"), (self.top, "above"), (self.bottom, "below")];
        let cut = sides.iter().filter(|(pixels, _)| *pixels > 0);
        let words: Vec<String> = cut.map(|(pixels, side)| format!("{pixels} {side}")).collect();
        formatter.write_str(&words.join(", "))
    }
}

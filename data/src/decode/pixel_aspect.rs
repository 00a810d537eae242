//! The shape of a pixel: old cameras and discs store pictures whose pixels are not square.

use std::fmt;

/// Width to height of a pixel, such as 16:11, in lowest terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PixelAspect {
    /// Parts of its width.
    pub width: u32,
    /// Parts of its height.
    pub height: u32,
}

/// Beyond this a file is not believed.
const MOST: u32 = 16;

impl PixelAspect {
    /// A square.
    pub const SQUARE: Self = Self { width: 1, height: 1 };

    /// `width`:`height`; `None` for zeros, which mean unknown, and for aspects that no video has.
    pub fn new(width: u32, height: u32) -> Option<Self> {
        let divisor = divisor(width, height);
        if width == 0 || height == 0 {
            return None;
        }
        let (width, height) = (width / divisor, height / divisor);
        let is_possible = width / height < MOST && height / width < MOST;
        is_possible.then_some(Self { width, height })
    }

    /// Whether it is a square.
    pub fn is_square(self) -> bool {
        self == Self::SQUARE
    }

    /// That of the picture turned by a quarter.
    pub(super) fn turned(self) -> Self {
        Self { width: self.height, height: self.width }
    }

    /// Width by height.
    pub(crate) fn ratio(self) -> f64 {
        f64::from(self.width) / f64::from(self.height)
    }

    /// Width and height in square pixels of a frame of this many pixels of this shape: they are stretched, none is lost.
    pub(crate) fn displayed(self, size: (u32, u32)) -> (u32, u32) {
        let stretched = |side: u32, by: u32, of: u32| {
            (f64::from(side) * f64::from(by) / f64::from(of)).round().clamp(1.0, f64::from(u32::MAX)) as u32
        };
        match self.width >= self.height {
            true => (stretched(size.0, self.width, self.height), size.1),
            false => (size.0, stretched(size.1, self.height, self.width)),
        }
    }
}

impl fmt::Display for PixelAspect {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.width, self.height)
    }
}

/// The greatest common divisor.
fn divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a.max(1) } else { divisor(b, a % b) }
}

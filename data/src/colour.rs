//! Between RGB and the luma and chroma planes of video.

/// The matrix of luma and chroma from red, green and blue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Matrix {
    /// ITU-R BT.601: standard definition, and what unlabelled files mean (ffmpeg assumes it too).
    Bt601,
    /// ITU-R BT.709: high definition.
    Bt709,
    /// ITU-R BT.2020, non-constant luminance.
    Bt2020,
}

impl Matrix {
    /// From the matrix coefficients code of ITU-T H.273, Table 4.
    pub(crate) fn from_code(code: u32) -> Self {
        match code {
            1 => Self::Bt709,
            9 | 10 => Self::Bt2020,
            _ => Self::Bt601,
        }
    }

    /// Shares of red and blue in luma.
    fn shares(self) -> (f32, f32) {
        match self {
            Self::Bt601 => (0.299, 0.114),
            Self::Bt709 => (0.2126, 0.0722),
            Self::Bt2020 => (0.2627, 0.0593),
        }
    }
}

/// Which codes are black and white.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Range {
    /// Luma 16 to 235, chroma 16 to 240.
    Limited,
    /// 0 to 255.
    Full,
}

/// How a stream codes colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Colour {
    /// The matrix.
    pub matrix: Matrix,
    /// The range.
    pub range: Range,
}

impl Colour {
    /// The assumption for a file that does not specify it.
    pub(crate) const UNLABELLED: Self = Self { matrix: Matrix::Bt601, range: Range::Limited };
    /// What this program writes, and labels so.
    pub(crate) const WRITTEN: Self = Self { matrix: Matrix::Bt709, range: Range::Limited };

    /// Offset of luma, and scales of luma and chroma.
    fn scales(self) -> (f32, f32, f32) {
        match self.range {
            Range::Limited => (16.0, 219.0 / 255.0, 224.0 / 255.0),
            Range::Full => (0.0, 1.0, 1.0),
        }
    }
}

/// Planes of one picture with chroma at half size both ways (4:2:0).
pub(crate) struct Planes<'a> {
    /// Luma, chroma blue, chroma red.
    pub y_cb_cr: [&'a [u8]; 3],
    /// Bytes from one row to the next, for luma and for chroma.
    pub strides: (usize, usize),
}

/// Planes to RGB, `width * height * 3` bytes. `None` when a plane is shorter than its picture.
pub(crate) fn to_rgb(planes: &Planes, width: usize, height: usize, colour: Colour) -> Option<Vec<u8>> {
    let weights = Weights::new(colour);
    let [y_plane, cb_plane, cr_plane] = planes.y_cb_cr;
    let (luma_stride, chroma_stride) = planes.strides;
    let chroma_width = width.div_ceil(2);
    let mut rgb = vec![0; width * height * 3];
    for (row, rgb_row) in rgb.chunks_exact_mut(width * 3).enumerate() {
        let y_row = y_plane.get(row * luma_stride..)?.get(..width)?;
        let cb_row = cb_plane.get(row / 2 * chroma_stride..)?.get(..chroma_width)?;
        let cr_row = cr_plane.get(row / 2 * chroma_stride..)?.get(..chroma_width)?;
        let chroma = cb_row.iter().zip(cr_row);
        for ((pixels, y_pair), (&cb, &cr)) in rgb_row.chunks_mut(6).zip(y_row.chunks(2)).zip(chroma) {
            weights.convert(pixels, y_pair, cb, cr);
        }
    }
    Some(rgb)
}

/// The conversion to RGB in whole numbers of 2^-16: a film has millions of pixels a second, and floating point took half of
/// the time of decoding it.
struct Weights {
    black: i32,
    luma: i32,
    red_of_cr: i32,
    green_of_cb: i32,
    green_of_cr: i32,
    blue_of_cb: i32,
}

impl Weights {
    const BITS: u32 = 16;

    fn new(colour: Colour) -> Self {
        let (red_share, blue_share) = colour.matrix.shares();
        let green_share = 1.0 - red_share - blue_share;
        let (black, luma_scale, chroma_scale) = colour.scales();
        let red_of_cr = 2.0 * (1.0 - red_share) / chroma_scale;
        let blue_of_cb = 2.0 * (1.0 - blue_share) / chroma_scale;
        let whole = |weight: f32| (weight * (1 << Self::BITS) as f32).round() as i32;
        Self {
            black: black as i32,
            luma: whole(1.0 / luma_scale),
            red_of_cr: whole(red_of_cr),
            green_of_cb: whole(-blue_of_cb * blue_share / green_share),
            green_of_cr: whole(-red_of_cr * red_share / green_share),
            blue_of_cb: whole(blue_of_cb),
        }
    }

    /// The one or two neighbours that share a chroma sample.
    fn convert(&self, pixels: &mut [u8], y_pair: &[u8], cb: u8, cr: u8) {
        let half = 1 << (Self::BITS - 1);
        let (cb, cr) = (i32::from(cb) - 128, i32::from(cr) - 128);
        let chroma = [
            self.red_of_cr * cr + half,
            self.green_of_cb * cb + self.green_of_cr * cr + half,
            self.blue_of_cb * cb + half,
        ];
        for (pixel, &y) in pixels.chunks_exact_mut(3).zip(y_pair) {
            let luma = (i32::from(y) - self.black) * self.luma;
            for (value, chroma) in pixel.iter_mut().zip(chroma) {
                *value = ((luma + chroma) >> Self::BITS).clamp(0, 255) as u8;
            }
        }
    }
}

/// RGB to 4:2:0 planes of `even_width` x `even_height`, which may exceed the picture: edge pixels are repeated.
/// Chroma is the mean of each block of four.
pub(crate) fn to_planes(
    rgb: &[u8],
    (width, height): (usize, usize),
    (even_width, even_height): (usize, usize),
    colour: Colour,
) -> [Vec<u8>; 3] {
    let (red_share, blue_share) = colour.matrix.shares();
    let (offset, luma_scale, chroma_scale) = colour.scales();
    let pixel = |column: usize, row: usize| {
        let at = (row.min(height - 1) * width + column.min(width - 1)) * 3;
        [0, 1, 2].map(|channel| f32::from(rgb[at + channel]))
    };
    let luma = |[red, green, blue]: [f32; 3]| {
        red_share * red + (1.0 - red_share - blue_share) * green + blue_share * blue
    };
    let mut y_plane = Vec::with_capacity(even_width * even_height);
    for row in 0..even_height {
        y_plane.extend(
            (0..even_width).map(|column| (luma(pixel(column, row)) * luma_scale + offset + 0.5) as u8),
        );
    }
    let mut cb_plane = Vec::with_capacity(even_width * even_height / 4);
    let mut cr_plane = Vec::with_capacity(even_width * even_height / 4);
    for row in (0..even_height).step_by(2) {
        for column in (0..even_width).step_by(2) {
            let block =
                [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(right, down)| pixel(column + right, row + down));
            let mean = [0, 1, 2].map(|channel| block.iter().map(|pixel| pixel[channel]).sum::<f32>() / 4.0);
            let y = luma(mean);
            let code = |difference: f32, share: f32| {
                (difference / (2.0 * (1.0 - share)) * chroma_scale + 128.0 + 0.5) as u8
            };
            cb_plane.push(code(mean[2] - y, blue_share));
            cr_plane.push(code(mean[0] - y, red_share));
        }
    }
    [y_plane, cb_plane, cr_plane]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_matrix_and_range_returns_a_flat_colour() {
        for matrix in [Matrix::Bt601, Matrix::Bt709, Matrix::Bt2020] {
            for range in [Range::Limited, Range::Full] {
                let colour = Colour { matrix, range };
                let rgb = [200, 30, 90].repeat(3 * 5);
                let [y, cb, cr] = to_planes(&rgb, (3, 5), (4, 6), colour);
                let planes = Planes { y_cb_cr: [&y, &cb, &cr], strides: (4, 2) };
                let back = to_rgb(&planes, 3, 5, colour).unwrap();
                // Codes are whole numbers and limited range has 219 of them, so a step or two is lost.
                assert!(rgb.iter().zip(&back).all(|(a, b)| a.abs_diff(*b) <= 3), "{colour:?} {back:?}");
            }
        }
    }
}

//! How alike two clips are: what skipped steps cost.

use serde::Serialize;

/// Width and height of the window that SSIM compares.
const WINDOW: usize = 7;
/// The largest value of a channel.
const PEAK: f64 = 255.0;
/// SSIM's constants (0.01 L)^2 and (0.03 L)^2. Source: Wang et al. 2004, as in scikit-image `structural_similarity`.
const C1: f64 = (0.01 * PEAK) * (0.01 * PEAK);
const C2: f64 = (0.03 * PEAK) * (0.03 * PEAK);

/// How alike two clips are.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Likeness {
    /// Peak signal-to-noise ratio of all frames together, in dB; nothing where they are equal.
    pub psnr: Option<f64>,
    /// Mean structural similarity over frames, channels and windows of 7x7 pixels; 1 where they are equal.
    pub ssim: f64,
}

impl Likeness {
    /// Of two clips of RGB frames of `width` x `height`; `None` where they do not have the same number of frames, or frames are
    /// smaller than a window.
    pub fn of(a: &[u8], b: &[u8], width: usize, height: usize) -> Option<Self> {
        let frame = width * height * 3;
        if a.len() != b.len() || a.is_empty() || !a.len().is_multiple_of(frame) || width.min(height) < WINDOW
        {
            return None;
        }
        let error = |(a, b): (&u8, &u8)| (f64::from(*a) - f64::from(*b)).powi(2);
        let mean = a.iter().zip(b).map(error).sum::<f64>() / a.len() as f64;
        let psnr = (mean > 0.0).then(|| 10.0 * (PEAK * PEAK / mean).log10());
        let frames = a.chunks_exact(frame).zip(b.chunks_exact(frame));
        let channels = frames.flat_map(|pair| (0..3).map(move |channel| (pair, channel)));
        let each = channels.map(|((a, b), channel)| ssim([a, b].map(|frame| plane(frame, channel)), width));
        let (sum, count) = each.fold((0.0, 0), |(sum, count), one| (sum + one, count + 1));
        Some(Self { psnr, ssim: sum / f64::from(count) })
    }
}

/// A channel of a frame.
fn plane(frame: &[u8], channel: usize) -> Vec<f64> {
    frame.iter().skip(channel).step_by(3).map(|value| f64::from(*value)).collect()
}

/// The mean SSIM of two planes, by sample variances in uniform windows.
fn ssim([a, b]: [Vec<f64>; 2], width: usize) -> f64 {
    let times = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).collect::<Vec<_>>();
    let moments = [&a, &b, &times(&a, &a), &times(&b, &b), &times(&a, &b)].map(|plane| means(plane, width));
    let count = (WINDOW * WINDOW) as f64;
    let unbiased = count / (count - 1.0);
    let windows = moments[0].len();
    let of = |window: usize| {
        let [ma, mb, aa, bb, ab] = moments.each_ref().map(|moment| moment[window]);
        let [va, vb, cov] = [aa - ma * ma, bb - mb * mb, ab - ma * mb].map(|value| unbiased * value);
        (2.0 * ma * mb + C1) * (2.0 * cov + C2) / ((ma * ma + mb * mb + C1) * (va + vb + C2))
    };
    (0..windows).map(of).sum::<f64>() / windows as f64
}

/// The means of all windows of a plane, row by row.
fn means(plane: &[f64], width: usize) -> Vec<f64> {
    // Sums of all above and to the left of each corner.
    let (stride, height) = (width + 1, plane.len() / width);
    let mut sums = vec![0.0; stride * (height + 1)];
    for (y, row) in plane.chunks_exact(width).enumerate() {
        let mut of_row = 0.0;
        for (x, value) in row.iter().enumerate() {
            of_row += value;
            sums[(y + 1) * stride + x + 1] = sums[y * stride + x + 1] + of_row;
        }
    }
    let corner = |y: usize, x: usize| sums[y * stride + x];
    let window = |y: usize, x: usize| {
        corner(y + WINDOW, x + WINDOW) - corner(y, x + WINDOW) - corner(y + WINDOW, x) + corner(y, x)
    };
    let places = (0..=height - WINDOW).flat_map(|y| (0..=width - WINDOW).map(move |x| (y, x)));
    places.map(|(y, x)| window(y, x) / (WINDOW * WINDOW) as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by scikit-image 0.26: `peak_signal_noise_ratio` and `structural_similarity(channel_axis=2)` of the same frames.
    #[test]
    fn likeness_is_that_of_scikit_image() {
        let (width, height) = (13, 11);
        let value = |i: usize| ((i * 2_654_435_761) >> 7 & 255) as u8;
        let a: Vec<u8> = (0..width * height * 3).map(value).collect();
        let b: Vec<u8> = a.iter().enumerate().map(|(i, a)| a.saturating_add((i % 23) as u8)).collect();
        let found = Likeness::of(&a, &b, width, height).unwrap();
        assert!((found.psnr.unwrap() - PSNR).abs() < 1e-6, "{found:?}");
        assert!((found.ssim - SSIM).abs() < 1e-6, "{found:?}");
        assert_eq!(Likeness::of(&a, &a, width, height), Some(Likeness { psnr: None, ssim: 1.0 }));
        assert_eq!(Likeness::of(&a, &b[3..], width, height), None);
    }

    const PSNR: f64 = 26.288_523_399_557_67;
    const SSIM: f64 = 0.992_786_295_976_917_4;
}

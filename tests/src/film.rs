//! Synthetic films, and how far one is from another.

use data::Film;
use kernels::random::Key;

/// Width and height of the films of [`scene`].
pub const SCENE_SIZE: [u32; 2] = [96, 64];

/// A film whose pixel (x, y) of frame t is `of(t, x, y)`, a grey.
pub fn grey([width, height]: [u32; 2], frames: usize, of: impl Fn(usize, u32, u32) -> u8) -> Film {
    let pixels = (0..frames).flat_map(|t| (0..height).flat_map(move |y| (0..width).map(move |x| (t, x, y))));
    let rgb = pixels.flat_map(|(t, x, y)| [of(t, x, y); 3]).collect();
    Film::new(width, height, rgb).expect("whole frames")
}

/// Waves of light of a scene of its own, which drift.
pub fn scene(seed: u64) -> impl Fn(usize, u32, u32) -> u8 {
    let numbers: Vec<f64> = (0..6).map(|i| Key::new(seed, "scene", &[]).uniform(i)).collect();
    move |t, x, y| {
        let (x, y, t) = (f64::from(x) / 96.0, f64::from(y) / 64.0, t as f64);
        let one = (6.0 * (x * numbers[0] * 2.0 + y * numbers[1] * 2.0) + t * 0.35 + 6.0 * numbers[2]).sin();
        let two = (9.0 * (y * numbers[3] * 2.0 - x * numbers[4]) - t * 0.2 + 6.0 * numbers[5]).sin();
        (128.0 + 55.0 * one + 50.0 * two) as u8
    }
}

/// The frames of a moving film of the given size: smooth colours that drift, so that codecs have real work and
/// every frame differs from its neighbours.
pub fn drifting(width: u32, height: u32, frames: usize) -> Film {
    let mut rgb = Vec::new();
    for frame in 0..frames {
        for row in 0..height as usize {
            for column in 0..width as usize {
                let wave = ((column + 2 * row + 5 * frame) as f32 / 11.0).sin();
                rgb.push((128.0 + 90.0 * wave) as u8);
                rgb.push((120.0 + 70.0 * ((column + 3 * frame) as f32 / 17.0).cos()) as u8);
                rgb.push((200.0 - 80.0 * (row as f32 / height as f32) + 20.0 * wave) as u8);
            }
        }
    }
    Film::new(width, height, rgb).expect("whole frames")
}

/// A film of flat grey frames, each with the given value: which frame one is looking at is written all over it.
pub fn flat(width: u32, height: u32, values: &[u8]) -> Film {
    let frame = width as usize * height as usize * 3;
    Film::new(width, height, values.iter().flat_map(|&value| vec![value; frame]).collect())
        .expect("whole frames")
}

/// Peak signal-to-noise ratio of two byte pictures, in dB; infinite when they are equal.
pub fn psnr(a: &[u8], b: &[u8]) -> f64 {
    assert_eq!(a.len(), b.len(), "pictures of different sizes");
    let squares: f64 = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
    10.0 * (255.0_f64.powi(2) / (squares / a.len() as f64)).log10()
}

/// Mean of a frame's bytes, rounded: the grey value of a flat frame.
pub fn brightness(rgb: &[u8]) -> u8 {
    let sum: u64 = rgb.iter().map(|&value| u64::from(value)).sum();
    ((sum + rgb.len() as u64 / 2) / rgb.len() as u64) as u8
}

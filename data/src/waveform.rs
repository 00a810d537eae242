//! Sound as a picture that moves: the waveform of a clip, with a line at the time of each frame.

use crate::bucket::Bucket;
use crate::clip::Clip;

/// Colours: behind the waveform, of it, and of the line at a frame's time.
const BEHIND: [u8; 3] = [255, 255, 255];
const WAVE: [u8; 3] = [40, 80, 160];
const NOW: [u8; 3] = [220, 40, 40];

/// The waveform of `samples`, the sound of `clip` at `rate` samples a second from its first frame on, as a clip of its size and length:
/// time runs to the right, silence is in the middle, full loudness at the edges. Sound behind the last frame is not shown, and where there
/// is none left nothing is drawn.
pub(crate) fn waveform(samples: &[f32], rate: f64, clip: &Clip, fps: f64) -> Clip {
    let Bucket { width, height, frames } = clip.bucket;
    let (width, height, frames) = (width as usize, height as usize, frames as usize);
    let length = frames as f64 / fps * rate;
    let row = |value: f32| ((1.0 - value.clamp(-1.0, 1.0)) / 2.0 * (height - 1) as f32).round() as usize;
    let mut still = BEHIND.repeat(width * height);
    for column in 0..width {
        let sample = |column: usize| (column as f64 / width as f64 * length) as usize;
        let range = sample(column)..sample(column + 1).max(sample(column) + 1);
        let Some(own) = samples.get(range.start..range.end.min(samples.len())).filter(|own| !own.is_empty())
        else {
            continue;
        };
        let (least, most) = own.iter().fold((f32::MAX, f32::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
        for row in row(most)..=row(least) {
            still[(row * width + column) * 3..][..3].copy_from_slice(&WAVE);
        }
    }
    let mut pixels = Vec::with_capacity(frames * still.len());
    for frame in 0..frames {
        let mut own = still.clone();
        let now = (frame as f64 / frames as f64 * width as f64) as usize;
        (0..height).for_each(|row| own[(row * width + now) * 3..][..3].copy_from_slice(&NOW));
        pixels.extend(own);
    }
    Clip { pixels, ..clip.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loud in the first half and silent in the second: tall, then a line in the middle; behind the end nothing. The line of a frame is at
    /// its time.
    #[test]
    fn a_waveform_is_as_tall_as_the_sound_is_loud() {
        let bucket = Bucket { width: 40, height: 21, frames: 5 };
        let clip = Clip { source: "a".into(), caption: String::new(), bucket, start: 0, pixels: Vec::new() };
        // 5 frames at 10 a second: 50 samples at 100 a second, of which the last 10 are missing.
        let samples: Vec<f32> =
            (0..40).map(|n| if n < 25 { 1.0 - 2.0 * (n % 2) as f32 } else { 0.0 }).collect();
        let shown = waveform(&samples, 100.0, &clip, 10.0);
        assert_eq!(shown.pixels.len(), 5 * 21 * 40 * 3);
        let frames: Vec<&[u8]> = shown.frames().collect();
        let column = |frame: usize, column: usize| -> Vec<usize> {
            (0..21).filter(|row| frames[frame][(row * 40 + column) * 3..][..3] == WAVE).collect()
        };
        let loud = column(4, 11);
        assert!(loud.contains(&0) || loud.contains(&20), "full loudness is not at an edge: {loud:?}");
        assert_eq!(column(4, 24), [10], "silence is a line in the middle");
        assert!(column(4, 36).is_empty(), "there is sound behind its end");
        for frame in 0..5 {
            assert!((0..21).all(|row| frames[frame][(row * 40 + 8 * frame) * 3..][..3] == NOW), "{frame}");
        }
    }
}

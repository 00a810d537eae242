//! The settings that models were published with.

use super::PATCH;

/// The solver that a model was published with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishedSolver {
    /// UniPC.
    UniPc,
    /// DPM-Solver++ of order 2.
    DpmPp2m,
}

/// The settings of a model that apply unless the user says otherwise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    /// Pixels per latent, along height and width.
    pub stride: usize,
    /// Frames a second.
    pub fps: f64,
    /// Frames of a clip.
    pub frames: u32,
    /// Width and height of a clip in pixels.
    pub size: [u32; 2],
    /// Solver steps.
    pub steps: usize,
    /// Solver.
    pub solver: PublishedSolver,
    /// Shift of the sigmas.
    pub shift: f64,
    /// Guidance scale; of two experts, that of the one for low noise.
    pub guidance: f64,
    /// Guidance scale of the expert for high noise.
    pub guidance_high: f64,
    /// Of two experts, the one for high noise takes the steps from this sigma up.
    pub boundary: f64,
}

impl Defaults {
    /// Both sides of a clip must be a multiple of this, in pixels.
    pub fn multiple(&self) -> u32 {
        (self.stride * PATCH) as u32
    }

    /// (frames, height, width) of the latents of a clip.
    pub fn latents(&self, frames: u32, height: u32, width: u32) -> (usize, usize, usize) {
        let side = |pixels: u32| pixels as usize / self.stride;
        (crate::vae::latent_frames(frames as usize), side(height), side(width))
    }

    /// `[width, height]` of a clip that starts with a picture of this size: its aspect, and about the area of `size`.
    ///
    /// Sources: Wan-Video/Wan2.1 wan/image2video.py, `WanI2V.generate`; for a stride of 16, Wan-Video/Wan2.2
    /// wan/utils/utils.py, `best_output_size`.
    pub fn size_for(&self, width: u32, height: u32) -> [u32; 2] {
        let area = self.size.map(f64::from).iter().product::<f64>();
        let (unit, aspect) = (f64::from(self.multiple()), f64::from(width) / f64::from(height));
        let down = |side: f64| ((side / unit).floor() * unit).max(unit);
        let [w, h] = match self.stride {
            8 => [down((area * aspect).sqrt()), down((area / aspect).sqrt())],
            _ => {
                let (w, h) = ((area * aspect).sqrt(), (area / aspect).sqrt());
                let (by_width, by_height) =
                    ([down(w), down(area / down(w))], [down(area / down(h)), down(h)]);
                let off = |[w, h]: [f64; 2]| (aspect / (w / h)).max((w / h) / aspect);
                if off(by_width) < off(by_height) { by_width } else { by_height }
            }
        };
        [w as u32, h as u32]
    }
}

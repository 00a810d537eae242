//! What a model is used to: pixels to a latent, frames a second, and the settings that it was published with.

use models::dit::{DitConfig, Pictures};
use models::expert::Expert;

/// The habits of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Habits {
    /// Pixels per latent, along height and width.
    pub stride: usize,
    /// Frames a second.
    pub fps: f64,
    /// Frames of a clip.
    pub frames: u32,
    /// Width and height of a clip.
    pub size: [u32; 2],
    /// Solver steps.
    pub steps: usize,
    /// Shift of the sigmas.
    pub shift: f64,
    /// Guidance scale; of two experts, that of the one for low noise.
    pub guidance: f64,
    /// Guidance scale of the expert for high noise.
    pub guidance_high: f64,
    /// Of two experts, the one for high noise makes the steps from this sigma on.
    pub boundary: f64,
}

/// Height and width of a patch of latents, in pixels of stride 1: both sides of a clip are multiples of this times the
/// stride.
const PATCH: usize = models::dit::config::PATCH;

/// The settings of Wan 2.1's text-to-video models.
const WAN: Habits = Habits {
    stride: 8,
    fps: 16.0,
    frames: 81,
    size: [832, 480],
    steps: 50,
    shift: 5.0,
    guidance: 5.0,
    guidance_high: 5.0,
    boundary: 0.875,
};

impl Habits {
    /// Of the model `dit`, or of two experts of these sizes. Sources: Wan-Video/Wan2.1 and Wan2.2, wan/configs/.
    pub fn of(dit: &DitConfig, has_experts: bool) -> Self {
        match (dit.pictures(), has_experts, dit.image) {
            (Pictures::None, false, _) => WAN,
            (Pictures::None, true, _) => {
                Self { steps: 40, shift: 12.0, guidance: 3.0, guidance_high: 4.0, ..WAN }
            }
            (Pictures::Beside, false, Some(_)) => Self { steps: 40, ..WAN },
            // Without CLIP's branch it is an expert of Wan 2.2, alone or not.
            (Pictures::Beside, _, _) => {
                Self { steps: 40, guidance: 3.5, guidance_high: 3.5, boundary: 0.9, ..WAN }
            }
            (Pictures::InPlace, _, _) => {
                Self { stride: 16, fps: 24.0, frames: 121, size: [1280, 704], ..WAN }
            }
        }
    }

    /// What both sides of a clip must be a multiple of, in pixels.
    pub fn multiple(&self) -> u32 {
        (self.stride * PATCH) as u32
    }

    /// Guidance scale of the steps of `expert`.
    pub fn guidance_of(&self, expert: Expert) -> f64 {
        match expert {
            Expert::High => self.guidance_high,
            Expert::Low => self.guidance,
        }
    }

    /// (frames, height, width) of the latents of a clip.
    pub fn latents(&self, frames: u32, height: u32, width: u32) -> (usize, usize, usize) {
        let side = |pixels: u32| pixels as usize / self.stride;
        (models::vae::latent_frames(frames as usize), side(height), side(width))
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

//! The sizes of clips by which their memory is forecast.

use std::num::NonZeroUsize;

use models::dit::speech::PAST_FRAMES;
use models::vae::TEMPORAL_RATIO;

use super::rest::{Latents, Rest};
use crate::encode::length;
use crate::encode::prompt::ClipRequest;
use crate::machine::forecast::ClipShape;

impl Rest {
    /// (frames, height, width) of the pixels behind latents.
    pub(super) fn pixels(&self, (frames, height, width): Latents) -> Latents {
        let ratio = self.encoders.vae.spatial_ratio();
        (TEMPORAL_RATIO * (frames - 1) + 1, height * ratio, width * ratio)
    }

    /// The latents of a clip, with those of its reference pictures where they are frames.
    pub(super) fn latents(&self, clip: &ClipRequest) -> Latents {
        let frames = length::of_piece(clip, &self.control);
        let (frames, height, width) = self.defaults.latents(frames, clip.height, clip.width);
        (frames + self.control.frames_of_references(clip.conditions.references.len()), height, width)
    }

    /// Whether one of `clips` is made in pieces that continue each other.
    pub(super) fn continues(&self, clips: &[ClipRequest]) -> bool {
        clips.iter().any(|clip| length::pieces(clip, &self.control) > 1)
    }

    /// The latents that the largest of `clips` is decoded from: S2V's behind the reference picture, or behind what a piece continues.
    pub(super) fn decoded(&self, clips: &[ClipRequest]) -> Latents {
        let (frames, height, width) = self.shapes(clips).first().map_or((1, 1, 1), |clip| clip.latents);
        let front = match (&self.control.speech, self.continues(clips)) {
            (None, _) => 0,
            (Some(_), false) => 1,
            (Some(_), true) => PAST_FRAMES,
        };
        (frames + front, height, width)
    }

    /// `clips` as they take memory, the largest first.
    pub(super) fn shapes(&self, clips: &[ClipRequest]) -> Vec<ClipShape> {
        let shape = |clip: &ClipRequest| ClipShape {
            latents: self.latents(clip),
            halves: if clip.guidance == 1.0 && clip.guidance_high == 1.0 { 1 } else { 2 },
            solver: clip.solver,
            has_picture: clip.image.is_some(),
            residuals: self.residuals,
        };
        let mut shapes: Vec<ClipShape> = clips.iter().map(shape).collect();
        shapes.sort_by_key(|ClipShape { latents: (t, h, w), halves, .. }| {
            std::cmp::Reverse((t * h * w, *halves))
        });
        shapes
    }
}

/// Those of `clips`, the largest first, that are in flight on one of `groups` groups of devices at most, as they take memory there:
/// the halves of the guidance are dealt to the groups in turn.
pub(crate) fn in_group(clips: Vec<ClipShape>, groups: NonZeroUsize) -> Vec<ClipShape> {
    if groups.get() == 1 {
        return clips;
    }
    let lanes = clips.iter().map(|clip| clip.halves).sum::<usize>().div_ceil(groups.get());
    clips.into_iter().take(lanes).map(|clip| ClipShape { halves: 1, ..clip }).collect()
}

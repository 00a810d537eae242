//! The parts of Wan 2.2 Animate besides the image-to-video network: the pose's patches, the encoder of motion from faces, the
//! encoder of face tokens, and a block of attention over them after every fifth main block.
//!
//! Source: Wan-Video/Wan2.2 wan/modules/animate/ (`model_animate.py`, `motion_encoder.py`, `face_blocks.py`).

mod face_block;
mod face_encoder;
mod motion;
mod orthonormal;

pub(super) use face_block::FaceBlock;
pub(super) use face_encoder::FaceEncoder;
pub(crate) use motion::{DIRECTIONS, is_blur, to_diffusers as motion_to_diffusers};
pub use motion::{MotionEncoder, MotionSizes};

use super::layer_id::LayerId;
use super::role::Role;
use crate::{Error, Result};

/// Latents of the pose clip [b, c, t - 1, h, w]; the first latent frame is the reference picture and has no pose.
pub const POSE: Role = Role::new("pose", "the latents of the pose clip (pose_latents)");
/// Raw: motion vectors of the face in each frame, [b, 4 (t - 2) + 1, width], by [`MotionEncoder`]. Embedded: face tokens
/// [b, t, 5, d], zeros in the reference's frame.
pub const FACES: Role =
    Role::new("faces", "the motion of faces (face_pixel_values through the motion encoder)");

/// Main blocks from one face block to the next; the first follows block 0.
pub const FACE_BLOCKS_EVERY: usize = 5;
/// Tokens of a frame that the face encoder makes, without the padding token.
pub(super) const FACE_HEADS: usize = 4;
/// Frames of faces for each latent frame after the clip's first.
const FRAMES_PER_LATENT: usize = 4;

/// The sizes of Animate's parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Animate {
    /// Of the motion encoder.
    pub motion: MotionSizes,
    /// Width of the face encoder's convolutions.
    pub face_width: usize,
    /// Face blocks.
    pub face_blocks: usize,
}

impl Animate {
    /// The parts of the weights whose shapes `shape_of` gives by official name, of a model of `layers` main blocks; `None` for
    /// other models.
    ///
    /// # Errors
    /// Main blocks that are no multiple of five, another number of face blocks, and half a motion encoder.
    pub fn read(shape_of: impl Fn(&str) -> Option<Vec<usize>>, layers: usize) -> Result<Option<Self>> {
        let is_there = |n: usize| shape_of(&format!("{}.linear1_q.weight", LayerId::face(n))).is_some();
        let face_blocks = (0..).take_while(|n| is_there(*n)).count();
        let face_width = shape_of("face_encoder.conv2.conv.weight").and_then(|shape| shape.first().copied());
        let (Some(face_width), false) = (face_width, face_blocks == 0) else { return Ok(None) };
        if face_blocks * FACE_BLOCKS_EVERY != layers {
            return Err(Error::Mismatch(format!(
                "its {face_blocks} face blocks do not fit {layers} blocks: one for every {FACE_BLOCKS_EVERY} is expected"
            )));
        }
        let Some(motion) = MotionSizes::read(shape_of) else {
            return Err(Error::Mismatch(
                "it has face blocks and no whole motion encoder; fetch it again".into(),
            ));
        };
        Ok(Some(Self { motion, face_width, face_blocks }))
    }

    /// The sizes of the published model.
    pub fn published() -> Self {
        Self { motion: MotionSizes::published(), face_width: 1024, face_blocks: 8 }
    }

    /// The face block that follows the main block `n`, if any.
    pub fn following(&self, n: usize) -> Option<LayerId> {
        let block = n / FACE_BLOCKS_EVERY;
        (n.is_multiple_of(FACE_BLOCKS_EVERY) && block < self.face_blocks).then(|| LayerId::face(block))
    }
}

/// Frames of faces of a clip of `latents` latent frames, of which the first is the reference picture.
pub fn face_frames(latents: usize) -> usize {
    FRAMES_PER_LATENT * latents.saturating_sub(2) + 1
}

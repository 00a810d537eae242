//! Which published model a DiT is: told by its tensors, and by names where sizes are the same.
//!
//! Source of the sizes: the configs of Wan-Video/Wan2.1 and Wan-Video/Wan2.2.

use std::path::Path;

use crate::expert::Expert;
use crate::weights::Checkpoint;

/// A published model that can be trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Variant {
    /// Wan 2.1 T2V-1.3B.
    T2v1B,
    /// Wan 2.1 T2V-14B.
    T2v14B,
    /// Wan 2.1 I2V-14B, for 480p and 720p: the sizes are the same.
    I2v14B,
    /// Wan 2.1 FLF2V-14B, from a first to a last frame.
    Flf2v14B,
    /// Wan 2.1 Fun-InP-1.3B: the image-to-video network at the small size.
    FunInp1B,
    /// An expert of Wan 2.2 T2V-A14B.
    T2vA14B,
    /// An expert of Wan 2.2 I2V-A14B.
    I2vA14B,
    /// Wan 2.2 TI2V-5B.
    Ti2v5B,
}

/// What tells published models apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Model width.
    pub width: usize,
    /// Channels of the network's input.
    pub channels_in: usize,
    /// Channels of its output.
    pub channels_out: usize,
    /// Whether it attends to CLIP's view of a picture.
    pub has_image_branch: bool,
    /// Whether it attends to two of them.
    pub has_two_pictures: bool,
}

/// Variant, name, width, channels in, channels out, image branch, two pictures.
const PUBLISHED: [(Variant, &str, Facts); 8] = [
    (Variant::T2v1B, "Wan 2.1 T2V-1.3B", facts(1536, 16, 16, false, false)),
    (Variant::T2v14B, "Wan 2.1 T2V-14B", facts(5120, 16, 16, false, false)),
    (Variant::T2vA14B, "an expert of Wan 2.2 T2V-A14B", facts(5120, 16, 16, false, false)),
    (Variant::I2v14B, "Wan 2.1 I2V-14B", facts(5120, 36, 16, true, false)),
    (Variant::Flf2v14B, "Wan 2.1 FLF2V-14B", facts(5120, 36, 16, true, true)),
    (Variant::FunInp1B, "Wan 2.1 Fun-InP-1.3B", facts(1536, 36, 16, true, false)),
    (Variant::I2vA14B, "an expert of Wan 2.2 I2V-A14B", facts(5120, 36, 16, false, false)),
    (Variant::Ti2v5B, "Wan 2.2 TI2V-5B", facts(3072, 48, 48, false, false)),
];

const fn facts(width: usize, channels_in: usize, channels_out: usize, image: bool, two: bool) -> Facts {
    Facts { width, channels_in, channels_out, has_image_branch: image, has_two_pictures: two }
}

/// Part of a tensor's name, and the kind of network that has it: Wan at the core, with parts that are not here.
const FOREIGN: [(&str, &str); 9] = [
    ("vace_blocks.", "a Wan VACE model"),
    ("vace_patch_embedding.", "a Wan VACE model"),
    ("casual_audio_encoder.", "Wan 2.2 S2V-14B (speech to video)"),
    ("audio_injector.", "Wan 2.2 S2V-14B (speech to video)"),
    ("face_adapter.", "Wan 2.2 Animate-14B"),
    ("motion_encoder.", "Wan 2.2 Animate-14B"),
    ("control_adapter.", "a Wan Fun model with camera control"),
    ("ref_conv.", "a Wan Fun-Control model"),
    ("audio_proj.", "a Wan model that listens to audio"),
];

impl Variant {
    /// What people call it.
    pub fn name(self) -> &'static str {
        PUBLISHED.iter().find(|row| row.0 == self).map_or("Wan", |row| row.1)
    }

    /// Whether it is one of two experts.
    pub fn is_expert(self) -> bool {
        matches!(self, Self::T2vA14B | Self::I2vA14B)
    }

    /// The models of these sizes: none, one, or two that only names tell apart.
    pub fn of(facts: Facts) -> Vec<Self> {
        PUBLISHED.iter().filter(|row| row.2 == facts).map(|row| row.0).collect()
    }

    /// Those of [`Variant::of`] that the names in `path` allow, which is all of them where names tell nothing.
    pub fn at(facts: Facts, path: &Path) -> Vec<Self> {
        let mut found = Self::of(facts);
        if let ([_, _, ..], Some(is_expert)) = (found.as_slice(), told_expert(path)) {
            found.retain(|variant| variant.is_expert() == is_expert);
        }
        found
    }
}

/// Whether the last parts of a path say that this is a model of two experts (Wan 2.2 A14B), or that it is none.
fn told_expert(path: &Path) -> Option<bool> {
    // A file, its folder, and the folder of the checkpoint; and not what lies above.
    let parts = path.iter().rev().take(3).map(|part| part.to_string_lossy().to_lowercase());
    parts.into_iter().find_map(|part| {
        let has = |marks: &[&str]| marks.iter().any(|mark| part.contains(mark));
        let is_2_2 =
            has(&["wan2.2", "wan2_2", "wan22", "wan-2.2", "a14b"]) || Expert::in_name(&part).is_some();
        let is_2_1 = has(&["wan2.1", "wan2_1", "wan21", "wan-2.1"]);
        (is_2_2 != is_2_1).then_some(is_2_2)
    })
}

/// The kind of network that `checkpoint` holds where it is Wan with parts that Tandem does not have; `None` where it is
/// plain.
pub fn foreign(checkpoint: &Checkpoint) -> Option<&'static str> {
    let named = |name: &str| FOREIGN.iter().find(|(mark, _)| name.contains(mark)).map(|row| row.1);
    checkpoint.names().find_map(named)
}

/// What a network is that takes and gives so many channels as no model does that can be trained, where it is known.
pub fn foreign_channels(channels_in: usize, channels_out: usize) -> Option<&'static str> {
    match (channels_in, channels_out) {
        (48, 16) | (52, 16) => Some("a Wan Fun-Control model"),
        (100, 48) | (148, 48) => Some("a Wan Fun model of 5B"),
        _ => None,
    }
}

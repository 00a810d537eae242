//! The rows: published models of each kind, and related networks that are refused by name.
//!
//! Sources: the configs of Wan-Video/Wan2.1 and Wan-Video/Wan2.2 (`wan/configs/`).

use super::{Kind, Published, Refused};
use crate::expert::Networks;

/// Width, feed-forward width, heads and blocks of the published sizes.
const SIZE_1_3B: [usize; 4] = [1536, 8960, 12, 30];
const SIZE_5B: [usize; 4] = [3072, 14336, 24, 30];
pub(super) const SIZE_14B: [usize; 4] = [5120, 13824, 40, 40];

/// The models that can be trained.
pub(super) const MODELS: [Published; 8] = [
    Published {
        key: "t2v-1.3b",
        title: "Wan 2.1 T2V-1.3B",
        kind: Kind::Text,
        networks: Networks::Whole,
        size: SIZE_1_3B,
        repositories: &["Wan-AI/Wan2.1-T2V-1.3B"],
        bytes_a_number: 4,
        reference: false,
    },
    Published {
        key: "t2v-14b",
        title: "Wan 2.1 T2V-14B",
        kind: Kind::Text,
        networks: Networks::Whole,
        size: SIZE_14B,
        repositories: &["Wan-AI/Wan2.1-T2V-14B"],
        bytes_a_number: 4,
        reference: false,
    },
    Published {
        key: "t2v-a14b",
        title: "Wan 2.2 T2V-A14B",
        kind: Kind::Text,
        networks: Networks::Pair,
        size: SIZE_14B,
        repositories: &["Wan-AI/Wan2.2-T2V-A14B"],
        bytes_a_number: 4,
        reference: false,
    },
    Published {
        key: "i2v-14b",
        title: "Wan 2.1 I2V-14B",
        kind: Kind::Picture,
        networks: Networks::Whole,
        size: SIZE_14B,
        repositories: &["Wan-AI/Wan2.1-I2V-14B-480P", "Wan-AI/Wan2.1-I2V-14B-720P"],
        bytes_a_number: 4,
        reference: false,
    },
    Published {
        key: "i2v-a14b",
        title: "Wan 2.2 I2V-A14B",
        kind: Kind::PictureWithoutClip,
        networks: Networks::Pair,
        size: SIZE_14B,
        repositories: &["Wan-AI/Wan2.2-I2V-A14B"],
        bytes_a_number: 4,
        reference: false,
    },
    Published {
        key: "flf2v-14b",
        title: "Wan 2.1 FLF2V-14B",
        kind: Kind::TwoPictures,
        networks: Networks::Whole,
        size: SIZE_14B,
        repositories: &["Wan-AI/Wan2.1-FLF2V-14B-720P"],
        bytes_a_number: 4,
        reference: false,
    },
    Published {
        key: "ti2v-5b",
        title: "Wan 2.2 TI2V-5B",
        kind: Kind::TextOrPicture,
        networks: Networks::Whole,
        size: SIZE_5B,
        repositories: &["Wan-AI/Wan2.2-TI2V-5B"],
        bytes_a_number: 4,
        reference: false,
    },
    Published {
        key: "fun-inp-1.3b",
        title: "Wan 2.1 Fun-InP-1.3B",
        kind: Kind::Picture,
        networks: Networks::Whole,
        size: SIZE_1_3B,
        repositories: &["alibaba-pai/Wan2.1-Fun-1.3B-InP", "alibaba-pai/Wan2.1-Fun-V1.1-1.3B-InP"],
        bytes_a_number: 2,
        reference: false,
    },
];

/// Unsupported Wan variants, recognised by part of a tensor's name or by channels in and out.
pub(super) const REFUSED: [Refused; 4] = [
    Refused {
        title: "Wan 2.2 S2V-14B (speech to video)",
        marks: &["casual_audio_encoder.", "audio_injector."],
        channels: &[],
    },
    Refused { title: "Wan 2.2 Animate-14B", marks: &["face_adapter.", "motion_encoder."], channels: &[] },
    Refused { title: "a Wan model that listens to audio", marks: &["audio_proj."], channels: &[] },
    Refused { title: "a Wan Fun model of 5B", marks: &[], channels: &[(100, 48), (148, 48)] },
];

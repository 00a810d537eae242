//! A row for each kind of network, with the settings that models of it were published with.
//!
//! Sources: the configs of Wan-Video/Wan2.1 and Wan-Video/Wan2.2 (`wan/configs/`); of Fun the examples of aigc-apps/VideoX-Fun.

use super::{Beside, Defaults, Kind, KindFacts, Pictures, PublishedSolver};
use crate::vae::Generation;

/// The settings of Wan 2.1's text-to-video models.
const WAN: Defaults = Defaults {
    stride: Generation::Wan21.spatial_ratio(),
    fps: 16.0,
    frames: 81,
    size: [832, 480],
    steps: 50,
    solver: PublishedSolver::UniPc,
    shift: 5.0,
    guidance: 5.0,
    guidance_high: 5.0,
    boundary: 0.875,
};

/// Those of Wan 2.2's experts for text-to-video.
const T2V_EXPERTS: Defaults = Defaults { steps: 40, shift: 12.0, guidance: 3.0, guidance_high: 4.0, ..WAN };

/// Those of Wan 2.1's image-to-video models.
const I2V: Defaults = Defaults { steps: 40, ..WAN };

/// Those of Wan 2.2's experts for image-to-video.
const I2V_EXPERTS: Defaults = Defaults { steps: 40, guidance: 3.5, guidance_high: 3.5, boundary: 0.9, ..WAN };

/// Those of Wan 2.2 TI2V-5B.
const TI2V: Defaults =
    Defaults { stride: Generation::Wan22.spatial_ratio(), fps: 24.0, frames: 121, size: [1280, 704], ..WAN };

/// Those of Wan 2.1 Fun.
const FUN: Defaults = Defaults { shift: 3.0, guidance: 6.0, guidance_high: 6.0, ..WAN };

/// Those of Wan 2.2 Fun's experts.
const FUN_EXPERTS: Defaults = Defaults { shift: 5.0, boundary: 0.9, ..FUN };

/// Those of Wan 2.2 Fun of 5B.
const FUN_5B: Defaults = Defaults { guidance: 6.0, guidance_high: 6.0, ..TI2V };

/// Those of VACE.
const VACE: Defaults = Defaults { shift: 16.0, ..WAN };

/// Those of Wan 2.2 Animate.
const ANIMATE: Defaults = Defaults {
    fps: 30.0,
    frames: 77,
    size: [1280, 720],
    steps: 20,
    solver: PublishedSolver::DpmPp2m,
    guidance: 1.0,
    guidance_high: 1.0,
    ..WAN
};

/// Those of Wan 2.2 S2V.
const SPEECH: Defaults = Defaults {
    frames: 77,
    size: [832, 448],
    steps: 40,
    shift: 3.0,
    guidance: 4.5,
    guidance_high: 4.5,
    ..WAN
};

/// The channels after the noisy ones of image-to-video models.
const IMAGE: &[Beside] = &[Beside::Mask, Beside::Given];

/// A row for each [`Kind`], in its order.
pub(super) const KINDS: [KindFacts; 15] = [
    KindFacts {
        kind: Kind::Text,
        channels_in: 16,
        channels_out: 16,
        clip_pictures: 0,
        pictures: Pictures::None,
        in_place: false,
        beside: &[],
        camera: false,
        side_chain: false,
        faces: false,
        speech: false,
        vae: Generation::Wan21,
        whole: WAN,
        pair: T2V_EXPERTS,
    },
    KindFacts {
        kind: Kind::Picture,
        channels_in: 36,
        channels_out: 16,
        clip_pictures: 1,
        pictures: Pictures::Beside,
        in_place: false,
        beside: IMAGE,
        camera: false,
        side_chain: false,
        faces: false,
        speech: false,
        vae: Generation::Wan21,
        whole: I2V,
        pair: I2V_EXPERTS,
    },
    KindFacts {
        kind: Kind::TwoPictures,
        channels_in: 36,
        channels_out: 16,
        clip_pictures: 2,
        pictures: Pictures::Beside,
        in_place: false,
        beside: IMAGE,
        camera: false,
        side_chain: false,
        faces: false,
        speech: false,
        vae: Generation::Wan21,
        whole: I2V,
        pair: I2V_EXPERTS,
    },
    KindFacts {
        kind: Kind::PictureWithoutClip,
        channels_in: 36,
        channels_out: 16,
        clip_pictures: 0,
        pictures: Pictures::Beside,
        in_place: false,
        beside: IMAGE,
        camera: false,
        side_chain: false,
        faces: false,
        speech: false,
        vae: Generation::Wan21,
        // An expert of Wan 2.2, with or without the other.
        whole: I2V_EXPERTS,
        pair: I2V_EXPERTS,
    },
    KindFacts {
        kind: Kind::TextOrPicture,
        channels_in: 48,
        channels_out: 48,
        clip_pictures: 0,
        pictures: Pictures::InPlace,
        in_place: true,
        beside: &[],
        camera: false,
        side_chain: false,
        faces: false,
        speech: false,
        vae: Generation::Wan22,
        whole: TI2V,
        pair: TI2V,
    },
    KindFacts {
        kind: Kind::FunControl,
        channels_in: 48,
        channels_out: 16,
        clip_pictures: 1,
        pictures: Pictures::Condition,
        in_place: false,
        beside: &[Beside::Control, Beside::Start],
        camera: false,
        side_chain: false,
        faces: false,
        speech: false,
        vae: Generation::Wan21,
        whole: FUN,
        pair: FUN_EXPERTS,
    },
    KindFacts {
        kind: Kind::FunControlExpert,
        channels_in: 52,
        channels_out: 16,
        clip_pictures: 0,
        pictures: Pictures::Condition,
        in_place: false,
        beside: &[Beside::Control, Beside::Mask, Beside::Given],
        camera: false,
        side_chain: false,
        faces: false,
        speech: false,
        vae: Generation::Wan21,
        whole: FUN_EXPERTS,
        pair: FUN_EXPERTS,
    },
    KindFacts {
        kind: Kind::FunCamera,
        channels_in: 32,
        channels_out: 16,
        clip_pictures: 1,
        pictures: Pictures::Condition,
        in_place: false,
        beside: &[Beside::Start],
        camera: true,
        side_chain: false,
        faces: false,
        speech: false,
        vae: Generation::Wan21,
        whole: FUN,
        pair: FUN_EXPERTS,
    },
    KindFacts {
        kind: Kind::FunCameraExpert,
        channels_in: 36,
        channels_out: 16,
        clip_pictures: 0,
        pictures: Pictures::Condition,
        in_place: false,
        beside: IMAGE,
        camera: true,
        side_chain: false,
        faces: false,
        speech: false,
        vae: Generation::Wan21,
        whole: FUN_EXPERTS,
        pair: FUN_EXPERTS,
    },
    KindFacts {
        kind: Kind::FunInPlace,
        channels_in: 100,
        channels_out: 48,
        clip_pictures: 0,
        pictures: Pictures::Beside,
        in_place: true,
        beside: IMAGE,
        camera: false,
        side_chain: false,
        faces: false,
        speech: false,
        vae: Generation::Wan22,
        whole: FUN_5B,
        pair: FUN_5B,
    },
    KindFacts {
        kind: Kind::FunControlInPlace,
        channels_in: 148,
        channels_out: 48,
        clip_pictures: 0,
        pictures: Pictures::Condition,
        in_place: true,
        beside: &[Beside::Control, Beside::Mask, Beside::Given],
        camera: false,
        side_chain: false,
        faces: false,
        speech: false,
        vae: Generation::Wan22,
        whole: FUN_5B,
        pair: FUN_5B,
    },
    KindFacts {
        kind: Kind::FunCameraInPlace,
        channels_in: 100,
        channels_out: 48,
        clip_pictures: 0,
        pictures: Pictures::Condition,
        in_place: true,
        beside: IMAGE,
        camera: true,
        side_chain: false,
        faces: false,
        speech: false,
        vae: Generation::Wan22,
        whole: FUN_5B,
        pair: FUN_5B,
    },
    KindFacts {
        kind: Kind::Vace,
        channels_in: 16,
        channels_out: 16,
        clip_pictures: 0,
        pictures: Pictures::Condition,
        in_place: false,
        beside: &[],
        camera: false,
        side_chain: true,
        faces: false,
        speech: false,
        vae: Generation::Wan21,
        whole: VACE,
        pair: VACE,
    },
    KindFacts {
        kind: Kind::Animate,
        channels_in: 36,
        channels_out: 16,
        clip_pictures: 1,
        pictures: Pictures::Condition,
        in_place: false,
        beside: IMAGE,
        camera: false,
        side_chain: false,
        faces: true,
        speech: false,
        vae: Generation::Wan21,
        whole: ANIMATE,
        pair: ANIMATE,
    },
    KindFacts {
        kind: Kind::Speech,
        channels_in: 16,
        channels_out: 16,
        clip_pictures: 0,
        pictures: Pictures::Condition,
        in_place: false,
        beside: &[],
        camera: false,
        side_chain: false,
        faces: false,
        speech: true,
        vae: Generation::Wan21,
        whole: SPEECH,
        pair: SPEECH,
    },
];

// `Kind::facts` indexes the rows by kind.
const _: () = {
    let mut row = 0;
    while row < KINDS.len() {
        assert!(KINDS[row].kind as usize == row, "KINDS is not in the order of Kind");
        row += 1;
    }
};

//! A row for each kind of network, with the settings that models of it were published with.
//!
//! Sources: the configs of Wan-Video/Wan2.1 and Wan-Video/Wan2.2 (`wan/configs/`).

use super::{Defaults, Kind, KindFacts, Pictures};
use crate::vae::Generation;

/// The settings of Wan 2.1's text-to-video models.
const WAN: Defaults = Defaults {
    stride: Generation::Wan21.spatial_ratio(),
    fps: 16.0,
    frames: 81,
    size: [832, 480],
    steps: 50,
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

/// A row for each [`Kind`], in its order.
pub(super) const KINDS: [KindFacts; 5] = [
    KindFacts {
        kind: Kind::Text,
        channels_in: 16,
        channels_out: 16,
        clip_pictures: 0,
        pictures: Pictures::None,
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
        vae: Generation::Wan22,
        whole: TI2V,
        pair: TI2V,
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

//! The published Wan models, in one table: names, sizes, repositories, and how each is recognised.
//!
//! Networks of one [`Kind`] take pictures in the same way; a [`Published`] model is a kind at a size.
//! A new model of a known kind is one row of `table.rs`.

mod magnitudes;
mod table;

use std::path::Path;

pub use crate::kind::{Beside, Defaults, Facts, Kind, KindFacts, PublishedSolver};
pub use magnitudes::Magnitudes;

use crate::dit::{Animate, CameraSizes, Control, DitConfig, ImageBranch, SideChain, Speech};
use crate::expert::{Expert, Networks};
use crate::weights::Checkpoint;

/// A published model that can be trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Its name in commands: `t2v-14b`.
    pub key: &'static str,
    /// Its usual name.
    pub title: &'static str,
    /// Its kind, or its experts'.
    pub kind: Kind,
    /// One network, or two experts.
    pub networks: Networks,
    /// Width, feed-forward width, heads, blocks.
    size: [usize; 4],
    /// Repositories of the Hugging Face hub with its files in the official layout, the one to fetch first.
    repositories: &'static [&'static str],
    /// Bytes per parameter of the DiT in its published files.
    bytes_a_number: u64,
    /// Whether it takes a reference picture as tokens in front.
    reference: bool,
}

/// An unsupported family of networks, refused by name.
struct Refused {
    title: &'static str,
    /// Parts of the names of tensors that only this family has.
    marks: &'static [&'static str],
}

/// Bytes of UMT5 in bf16, with its tokenizer: models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/tokenizer.json.
const TEXT_ENCODER_BYTES: u64 = 11_380_000_000;
/// Bytes of models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth.
const CLIP_BYTES: u64 = 4_770_000_000;
/// Bytes of wav2vec2-large-xlsr-53-english/model.safetensors.
const SPEECH_ENCODER_BYTES: u64 = 1_270_000_000;
/// Width of CLIP's states, and their rows for two pictures.
const CLIP_WIDTH: usize = 1280;
const ROWS_OF_TWO_PICTURES: usize = 514;
/// Channels that VACE's side chain reads: the latents of what is kept and of what is made, and the mask of 8 x 8 pixels.
const SIDE_CHAIN_CHANNELS: usize = 96;

impl Published {
    /// All of them.
    pub const ALL: &'static [Self] = &table::MODELS;

    /// The one called `key`.
    pub fn named(key: &str) -> Option<&'static Self> {
        Self::ALL.iter().find(|model| model.key == key)
    }

    /// The one whose files the repository `owner/name` holds, in either layout.
    pub fn in_repository(repository: &str) -> Option<&'static Self> {
        // One model's repository may begin with the name of another's.
        let matched = |own: &&str| {
            let rest = repository.strip_prefix(*own)?;
            (rest.is_empty() || rest.starts_with('-')).then_some(own.len())
        };
        let length = |model: &&Self| model.repositories.iter().filter_map(matched).max();
        Self::ALL.iter().filter(|model| length(model).is_some()).max_by_key(length)
    }

    /// The models that a network with these facts may belong to: none, one, or two that only names distinguish.
    pub fn of(facts: Facts) -> Vec<&'static Self> {
        let is_like = |model: &&Self| {
            let own = (Some(model.kind), model.size[0], model.reference);
            own == (Kind::of(facts), facts.width, facts.reference)
        };
        Self::ALL.iter().filter(is_like).collect()
    }

    /// Those of [`Self::of`] that match the names in `path`; all of them if the names are inconclusive.
    pub fn at(facts: Facts, path: &Path) -> Vec<&'static Self> {
        let mut found = Self::of(facts);
        if let ([_, _, ..], Some(networks)) = (found.as_slice(), networks_in_name(path)) {
            found.retain(|model| model.networks == networks);
        }
        found
    }

    /// The name of one of its networks.
    pub fn network(&self) -> String {
        match self.networks {
            Networks::Whole => self.title.to_owned(),
            Networks::Pair => format!("an expert of {}", self.title),
        }
    }

    /// The repository of its files in the official layout.
    pub fn repository(&self) -> &'static str {
        self.repositories[0]
    }

    /// Sizes of its DiT, or of either expert.
    pub fn dit(&self) -> DitConfig {
        let [dim, ffn_dim, heads, layers] = self.size;
        let KindFacts { channels_in, channels_out, clip_pictures, .. } = *self.kind.facts();
        let control = self.control(layers);
        let positions = (clip_pictures == 2).then_some(ROWS_OF_TWO_PICTURES);
        DitConfig {
            kind: self.kind,
            dim,
            ffn_dim,
            heads,
            layers,
            in_channels: channels_in,
            out_channels: channels_out,
            text_dim: 4096,
            text_len: 512,
            freq_dim: 256,
            eps: 1e-6,
            image: (clip_pictures > 0).then_some(ImageBranch { dim: CLIP_WIDTH, positions }),
            control,
        }
    }

    /// Its control parts.
    fn control(&self, layers: usize) -> Control {
        let KindFacts { channels_out, camera, side_chain, faces, speech, vae, .. } = *self.kind.facts();
        // A side block for every second main block of the small model, for every fifth of the large one.
        let step = if layers == table::SIZE_14B[3] { 5 } else { 2 };
        let chain = || SideChain {
            channels: SIDE_CHAIN_CHANNELS,
            after: (0..layers).step_by(step).collect(),
            scale: 1.0,
        };
        Control {
            reference: self.reference.then_some(channels_out),
            camera: camera.then(|| CameraSizes { stride: vae.spatial_ratio() }),
            side_chain: side_chain.then(chain),
            animate: faces.then(Animate::published),
            speech: speech.then(Speech::published),
        }
    }

    /// The settings that it was published with.
    pub fn defaults(&self) -> &'static Defaults {
        self.kind.defaults(self.networks)
    }

    /// How the magnitude of its residual changes over the steps of a clip of `pixels` pixels a frame, which begins with a
    /// picture or does not; `None` if no measurement is published.
    pub fn magnitudes(&self, starts_with_picture: bool, pixels: u32) -> Option<&'static Magnitudes> {
        // Both were published for one network; its files do not distinguish them.
        let is_720p = pixels > (832 * 480 + 1280 * 720) / 2;
        Some(match (self.key, starts_with_picture) {
            ("t2v-1.3b", _) => &magnitudes::T2V_1_3B,
            ("t2v-14b", _) => &magnitudes::T2V_14B,
            ("t2v-a14b", _) => &magnitudes::T2V_A14B,
            ("i2v-14b", _) if is_720p => &magnitudes::I2V_14B_720P,
            ("i2v-14b", _) => &magnitudes::I2V_14B_480P,
            ("i2v-a14b", _) => &magnitudes::I2V_A14B,
            ("ti2v-5b", false) => &magnitudes::TI2V_5B_TEXT,
            ("ti2v-5b", true) => &magnitudes::TI2V_5B_PICTURE,
            _ => return None,
        })
    }

    /// About how many bytes its official files take.
    pub fn download(&self) -> u64 {
        let numbers = |shape: &[usize]| shape.iter().product::<usize>() as u64;
        let parameters: u64 = self.dit().tensors().iter().map(|spec| numbers(&spec.shape)).sum();
        let networks = match self.networks {
            Networks::Whole => 1,
            Networks::Pair => 2,
        };
        let KindFacts { vae, clip_pictures, speech, .. } = self.kind.facts();
        let clip = if *clip_pictures > 0 { CLIP_BYTES } else { 0 };
        let speech = if *speech { SPEECH_ENCODER_BYTES } else { 0 };
        self.bytes_a_number * parameters * networks + TEXT_ENCODER_BYTES + vae.file_bytes() + clip + speech
    }
}

/// The name of the network in `checkpoint` if it is a Wan variant that Tandem does not support; `None` for a plain one.
pub fn refused(checkpoint: &Checkpoint) -> Option<&'static str> {
    let marked = |name: &str| {
        let has = |row: &&Refused| row.marks.iter().any(|mark| name.contains(mark));
        table::REFUSED.iter().find(has).map(|row| row.title)
    };
    checkpoint.names().find_map(marked)
}

/// Whether the last parts of a path name a model of two experts (Wan 2.2 A14B) or of one network.
fn networks_in_name(path: &Path) -> Option<Networks> {
    // A file, its folder, and the folder of the checkpoint, but nothing above.
    let parts = path.iter().rev().take(3).map(|part| part.to_string_lossy().to_lowercase());
    parts.into_iter().find_map(|part| {
        let has = |marks: &[&str]| marks.iter().any(|mark| part.contains(mark));
        let is_2_2 =
            has(&["wan2.2", "wan2_2", "wan22", "wan-2.2", "a14b"]) || Expert::in_name(&part).is_some();
        let is_2_1 = has(&["wan2.1", "wan2_1", "wan21", "wan-2.1"]);
        (is_2_2 != is_2_1).then_some(if is_2_2 { Networks::Pair } else { Networks::Whole })
    })
}

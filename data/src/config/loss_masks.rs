//! `[data.loss_masks]`: which pixels of clips the loss counts.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{LearnFrom, refuse};
use crate::error::Result;

/// Masks by which the loss of a clip is weighted: white counts, black counts as little as `outside` says, grey in between. A clip
/// without a mask counts whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossMasks {
    /// Where they are: `beside` (`NAME.mask.png`, `NAME.mask.mp4`, ... beside the clip `NAME`), `alpha` (how opaque the pixels of the
    /// clips themselves are), or a folder in which each has the path of its clip. A picture is for every frame; a clip must be as
    /// long as its clip. Default `beside`.
    pub from: MaskPlace,
    /// Weight of black pixels, 0 to 1: the weight of a latent is the larger of this and its mask. Default 0.1.
    pub outside: f64,
    /// What the network is to predict outside of the mask: of the `clip`, or what the `base` predicts without the adapter, which then
    /// changes nothing there; grey is in between. Default `clip`.
    #[serde(skip_serializing_if = "LearnFrom::is_clip")]
    pub outside_target: LearnFrom,
    /// What the weighted errors are divided by. Default `sample`.
    pub reduction: MaskReduction,
}

/// Where masks of the loss are.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "PathBuf", into = "PathBuf")]
pub enum MaskPlace {
    /// `beside`: beside the clip, with `.mask` behind its name.
    #[default]
    Beside,
    /// `alpha`: the alpha channel of the clip itself.
    Alpha,
    /// A folder with a mask of the clip's name for each clip that has one.
    Folder(PathBuf),
}

/// How [`MaskPlace::Beside`] is written.
const BESIDE: &str = "beside";
/// How [`MaskPlace::Alpha`] is written.
const ALPHA: &str = "alpha";

impl From<PathBuf> for MaskPlace {
    fn from(path: PathBuf) -> Self {
        match path.to_str() {
            Some(BESIDE) => Self::Beside,
            Some(ALPHA) => Self::Alpha,
            _ => Self::Folder(path),
        }
    }
}

impl From<MaskPlace> for PathBuf {
    fn from(place: MaskPlace) -> Self {
        match place {
            MaskPlace::Beside => Self::from(BESIDE),
            MaskPlace::Alpha => Self::from(ALPHA),
            MaskPlace::Folder(folder) => folder,
        }
    }
}

/// What the weighted errors of masked clips are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MaskReduction {
    /// The sum of the weights of each sample: a small mask counts as much as a large one.
    #[default]
    Sample,
    /// The sum of the weights of the micro-batch.
    Batch,
    /// The number of latents: a small mask counts little.
    None,
}

impl Default for LossMasks {
    fn default() -> Self {
        let outside_target = LearnFrom::Clip;
        Self { from: MaskPlace::Beside, outside: 0.1, outside_target, reduction: MaskReduction::Sample }
    }
}

impl LossMasks {
    pub(super) fn check(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.outside) {
            return refuse("loss_masks", format!("outside is {}; it must be between 0 and 1", self.outside));
        }
        if self.outside_target == LearnFrom::Base && self.outside == 0.0 {
            let why =
                "outside_target is \"base\", and nothing counts outside with outside = 0: set it above 0";
            return refuse("loss_masks", why.into());
        }
        match &self.from {
            MaskPlace::Folder(folder) if !folder.is_dir() => {
                refuse("loss_masks", format!("there is no folder {}", folder.display()))
            }
            _ => Ok(()),
        }
    }

    /// The folder that is named, to be resolved.
    pub fn folder_mut(&mut self) -> Option<&mut PathBuf> {
        match &mut self.from {
            MaskPlace::Folder(folder) => Some(folder),
            MaskPlace::Beside | MaskPlace::Alpha => None,
        }
    }
}

/// The name of the clip whose mask has the name `relative`; nothing where it is no mask's name.
pub(crate) fn masked_clip(relative: &str, is_folder: bool) -> Option<String> {
    let path = Path::new(relative);
    let stem = if is_folder { path.to_path_buf() } else { path.with_extension("") };
    stem.to_str()?.strip_suffix(".mask").map(str::to_owned)
}

//! The diffusion transformers of a base model: their files, one or two of them.

use std::fs;
use std::path::{Path, PathBuf};

use models::dit::DitConfig;
use models::expert::{Expert, Networks};
use models::weights::Weights;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The files of one DiT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DitFiles {
    /// A file, or a folder with shards.
    pub weights: PathBuf,
    /// Its `config.json`; none for single files, whose sizes are those of their tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<PathBuf>,
}

impl DitFiles {
    /// The DiT at `weights`, with the config `named`, else the one in its folder, if any.
    ///
    /// # Errors
    /// If the config `named` does not exist.
    pub fn at(weights: &Path, named: Option<PathBuf>) -> Result<Self> {
        let config = match named {
            Some(config) if config.is_file() => Some(config),
            Some(config) => {
                return Err(Error::NoModelPart { key: "dit_config", looked: config.display().to_string() });
            }
            None => Some(match weights.is_dir() {
                true => weights.join("config.json"),
                false => weights.with_file_name("config.json"),
            })
            .filter(|config| config.is_file()),
        };
        Ok(Self { weights: weights.to_owned(), config })
    }

    /// The expert in the name of the file or its folder.
    pub fn expert_by_name(&self) -> Option<Expert> {
        let name = |path: &Path| path.file_name().and_then(|name| Expert::in_name(&name.to_string_lossy()));
        name(&self.weights).or_else(|| name(self.weights.parent()?))
    }

    /// Checks the files against each other, from headers alone.
    ///
    /// # Errors
    /// A config that cannot be read, and weights that do not fit it.
    pub fn open(&self) -> Result<(DitConfig, Weights)> {
        let read = |path: &PathBuf| {
            fs::read_to_string(path).map_err(|source| Error::Io {
                action: "read",
                path: path.clone(),
                source,
            })
        };
        let config = self.config.as_ref().map(read).transpose()?;
        Ok(models::open_dit(&self.weights, config.as_deref())?)
    }
}

/// The diffusion transformers of a base model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dits {
    /// One; it may be a single expert.
    Single(DitFiles),
    /// Two, each for a part of the noise levels.
    Experts {
        /// For high noise.
        high: DitFiles,
        /// For low noise.
        low: DitFiles,
    },
}

impl Dits {
    /// The DiT for the noise levels of `expert`; a single one is for all.
    pub fn of(&self, expert: Expert) -> &DitFiles {
        match (self, expert) {
            (Self::Single(files), _) => files,
            (Self::Experts { high, .. }, Expert::High) => high,
            (Self::Experts { low, .. }, Expert::Low) => low,
        }
    }

    /// A pair of experts.
    ///
    /// # Errors
    /// If by their names they are exchanged, or the same expert.
    pub(super) fn pair(high: DitFiles, low: DitFiles) -> Result<Self> {
        for (key, files, expert) in [("dit_high", &high, Expert::High), ("dit_low", &low, Expert::Low)] {
            if let Some(named) = files.expert_by_name().filter(|named| *named != expert) {
                let path = files.weights.display();
                let way_out = match high.expert_by_name() == low.expert_by_name() {
                    true => format!("so both are; name the file of the one for {expert} noise here"),
                    false => "exchange the two files".to_owned(),
                };
                let why = format!("{path} is the expert for {named} noise by its name; {way_out}");
                return Err(Error::Setting { key: format!("model.{key}"), why });
            }
        }
        Ok(Self::Experts { high, low })
    }

    /// One network, or two.
    pub fn networks(&self) -> Networks {
        match self {
            Self::Single(_) => Networks::Whole,
            Self::Experts { .. } => Networks::Pair,
        }
    }

    /// High and low, if there are two.
    pub fn experts(&self) -> Option<(&DitFiles, &DitFiles)> {
        match self {
            Self::Single(_) => None,
            Self::Experts { high, low } => Some((high, low)),
        }
    }
}

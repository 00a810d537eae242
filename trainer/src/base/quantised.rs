//! Quantised matrices of DiTs that are kept on disk: where, of which models, and what the user is told.

use std::path::PathBuf;
use std::sync::Arc;

use data::atomic;
use models::dit::DitConfig;
use models::weights::{KeptOutcome, QuantisedFile, Storage, Weights};
use serde::{Deserialize, Serialize};

use super::BaseModel;
use super::hub::HubSettings;
use crate::bytes::Bytes;
use crate::error::Result;
use crate::watch::ui::Ui;

/// Fewer bytes are quantised faster than anyone would miss them on the disk.
const WORTH_KEEPING: u64 = 1 << 30;

/// A folder of quantised matrices, a file for each DiT and format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantisedFolder {
    /// The folder, which is made when it is first needed.
    pub path: PathBuf,
    /// Models with fewer bytes of quantised matrices are not kept.
    pub least: u64,
}

impl QuantisedFolder {
    /// The folder `named`, for models of any size.
    pub fn at(named: PathBuf) -> Self {
        Self { path: named, least: 0 }
    }

    /// The folder beside the hub's cache, for models of 1 GiB and more.
    pub fn usual() -> Self {
        Self { path: HubSettings::from_environment().beside().join("quantised"), least: WORTH_KEEPING }
    }
}

/// The file of a network that is being loaded, if it has one.
pub struct Kept(Option<Arc<QuantisedFile>>);

impl BaseModel {
    /// `weights` of a DiT of the sizes `config` that take their quantised matrices from a file, or write it, where the model is to keep
    /// one: [`Kept::finish`] ends that after the load.
    ///
    /// # Errors
    /// A checkpoint that cannot be read.
    pub fn keep_quantised(&self, config: &DitConfig, weights: Weights, ui: &Ui) -> Result<(Weights, Kept)> {
        let (Some(folder), Storage::Quantised(format)) =
            (&self.quantised, self.precision.dit().frozen.storage)
        else {
            return Ok((weights, Kept(None)));
        };
        let opened = QuantisedFile::open(&folder.path, &weights, &config.tensors(), format, folder.least)?;
        let Some(file) = opened.map(Arc::new) else { return Ok((weights, Kept(None))) };
        if !file.is_there() {
            clean(folder);
            ui.note(&format!(
                "the {} weights are kept in {} ({}), so that the next start reads half as much; model.cache_quantised = false, or \
                 --no-quantised-cache, keeps none",
                format.name(),
                file.path().display(),
                Bytes(file.bytes())
            ));
        }
        Ok((weights.kept_in(file.clone()), Kept(Some(file))))
    }
}

impl Kept {
    /// Ends a load, and says what went wrong.
    pub fn finish(self, ui: &Ui) {
        let Some(file) = self.0 else { return };
        let path = file.path().display();
        match file.finish() {
            KeptOutcome::Read | KeptOutcome::Written { damage: None } => {}
            KeptOutcome::Written { damage: Some(why) } => ui.note(&format!(
                "{path} was damaged ({why}): what was damaged was quantised again, and the file is written anew"
            )),
            KeptOutcome::NotWritten(why) => ui.note(&format!(
                "the quantised weights were not kept in {path} ({why}): the next start quantises them again"
            )),
        }
    }
}

/// Removes what killed processes left of files that they were writing.
fn clean(folder: &QuantisedFolder) {
    let left = atomic::leftovers(&folder.path).unwrap_or_default();
    for file in left.into_iter().filter(atomic::Leftover::is_abandoned) {
        // Another process may have removed it.
        let _ = std::fs::remove_file(file.path);
    }
}

//! The cache of quantised matrices on disk: where it is, of which models, and what the user is told.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use data::atomic;
use models::dit::DitConfig;
use models::weights::{CacheOutcome, QuantisedFile, Storage, Weights};
use serde::{Deserialize, Serialize};

use super::BaseModel;
use super::hub::HubSettings;
use crate::bytes::Bytes;
use crate::error::Result;
use crate::machine::memory::available_memory;
use crate::watch::ui::Ui;

/// Fewer bytes are quantised faster than anyone would miss them on the disk.
const WORTH_CACHING: u64 = 1 << 30;
/// Of the host's available memory, the part that may hold matrices which wait for the disk: plans pin up to half.
const WAITING_SHARE: u64 = 4;

/// The folder of the cache, which has a file for each DiT and format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantisedFolder {
    /// The folder, which is made when it is first needed.
    pub path: PathBuf,
    /// Models with fewer bytes of quantised matrices are not cached.
    pub least: u64,
}

impl QuantisedFolder {
    /// The folder `named`, for models of any size.
    pub fn at(named: PathBuf) -> Self {
        Self { path: named, least: 0 }
    }

    /// The folder beside the hub's cache, for models of 1 GiB and more.
    pub fn usual() -> Self {
        Self { path: HubSettings::from_environment().beside().join("quantised"), least: WORTH_CACHING }
    }
}

/// The file of a network that is being loaded, if it has one.
pub struct QuantisedCache(Option<Arc<QuantisedFile>>);

impl BaseModel {
    /// `weights` of a DiT of the sizes `config` that take their quantised matrices from the cache, or write them there, if the model
    /// has one: [`QuantisedCache::finish`] ends that after the load.
    ///
    /// # Errors
    /// A checkpoint that cannot be read.
    pub fn with_quantised_cache(
        &self,
        config: &DitConfig,
        weights: Weights,
        ui: &Ui,
    ) -> Result<(Weights, QuantisedCache)> {
        let (Some(folder), Storage::Quantised(format)) =
            (&self.quantised, self.precision.dit().frozen.storage)
        else {
            return Ok((weights, QuantisedCache(None)));
        };
        let opened = QuantisedFile::open(&folder.path, &weights, &config.tensors(), format, folder.least)?;
        let Some(file) = opened else { return Ok((weights, QuantisedCache(None))) };
        let file = Arc::new(match available_memory() {
            Some(bytes) => file.behind(bytes / WAITING_SHARE),
            None => file,
        });
        if !file.is_there() {
            clean(folder);
            ui.note(&format!(
                "the {} weights are cached in {} ({}), so that the next start reads half as much; model.cache_quantised = false, or \
                 --no-quantised-cache, writes none",
                format.name(),
                file.path().display(),
                Bytes(file.bytes())
            ));
        }
        Ok((weights.cached_in(file.clone()), QuantisedCache(Some(file))))
    }
}

impl QuantisedCache {
    /// Ends a load. What is still to be written is written behind it, and the user is told what went wrong.
    pub fn finish(self, ui: &Ui) -> WritingBehind {
        let Some(file) = self.0.filter(|file| file.is_being_written()) else { return WritingBehind(None) };
        let own = ui.clone();
        let thread = thread::spawn(move || tell(&file, &own));
        WritingBehind(Some((thread, ui.clone())))
    }
}

/// A file that is being written while what was loaded is used; dropping it waits for the disk.
#[derive(Debug)]
pub struct WritingBehind(Option<(JoinHandle<()>, Ui)>);

impl WritingBehind {
    /// Whether all is written.
    pub fn is_done(&self) -> bool {
        self.0.as_ref().is_none_or(|(thread, _)| thread.is_finished())
    }
}

impl Drop for WritingBehind {
    fn drop(&mut self) {
        let Some((thread, ui)) = self.0.take() else { return };
        if !thread.is_finished() {
            ui.note("waiting until the quantised weights are on the disk");
        }
        // A panic has been reported where it happened; the file is not there then, and is made again.
        let _ = thread.join();
    }
}

/// Waits until `file` is written, and says what went wrong.
fn tell(file: &QuantisedFile, ui: &Ui) {
    let path = file.path().display();
    match file.finish() {
        CacheOutcome::Read | CacheOutcome::Written { damage: None } => {}
        CacheOutcome::Written { damage: Some(why) } => ui.note(&format!(
            "{path} was damaged ({why}): what was damaged was quantised again, and the file is written anew"
        )),
        CacheOutcome::NotWritten(why) => ui.note(&format!(
            "the quantised weights were not cached in {path} ({why}): the next start quantises them again"
        )),
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

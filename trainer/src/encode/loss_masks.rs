//! The masks by which the loss of training clips is weighted, as weights of their latents.

use std::collections::BTreeMap;

use data::{Accompanying, ContentHashes, Dataset, Key, Storage};
use kernels::Tensor;
use models::expert::Networks;

use super::accompanied::companion;
use super::requested::mask_of;
use super::{Encoding, LatentStore, to_host};
use crate::error::Result;
use crate::learning::mask;

/// Name of the one tensor of an entry.
const MASK: &str = "loss mask";

impl LatentStore {
    /// Brings the masks of the windows of `dataset` to the size of their latents, where they are not cached.
    ///
    /// # Errors
    /// Masks that cannot be decoded, a cache that takes no files.
    pub(super) fn encode_loss_masks(&mut self, dataset: &Dataset, with: &Encoding) -> Result<()> {
        if dataset.sources.iter().all(|source| source.companions.loss_mask.is_none()) {
            return Ok(());
        }
        let (dit, mut hashes) = (with.residents.dit(), ContentHashes::open(&self.cache));
        let cell = dit.defaults(Networks::Whole).stride;
        self.loss_masks.clear();
        for window in &dataset.windows {
            let companions = &dataset.sources[window.source].companions;
            let key = match companions.get(Accompanying::LossMask) {
                Some(mask) => {
                    let content = hashes.of(&mask.media)?;
                    let pixels = dataset.companion_key(window, Accompanying::LossMask, &content, "pixels");
                    Some(Key::of(&["loss mask", &pixels.to_string(), &cell.to_string()]))
                }
                None => None,
            };
            self.loss_masks.push(key);
        }
        for (index, window) in dataset.windows.iter().enumerate() {
            let Some(key) = self.loss_masks[index] else { continue };
            if !self.share.has(index) || self.missing(&key)?.is_none() {
                continue;
            }
            self.cache.check_writable()?;
            let pixels_bfhw = mask_of(&companion(dataset, window, Accompanying::LossMask)?)?.squeeze(1)?;
            let mask_thw = mask::of_latents(&pixels_bfhw, cell)?.squeeze(0)?;
            let entry = [(MASK, &to_host(&mask_thw)?, Storage::F32)];
            self.cache.put(&key, &entry, &BTreeMap::new())?;
            with.interrupt.check()?;
        }
        Ok(())
    }

    /// The mask `[t, h, w]` in 0..1 of the latents of the window `index`; nothing where its clip has none.
    ///
    /// # Errors
    /// An entry that was removed or damaged.
    pub fn loss_mask(&self, index: usize) -> Result<Option<Tensor>> {
        let key = self.loss_masks.get(index).copied().flatten();
        key.map(|key| self.tensor(&key, MASK)).transpose()
    }
}

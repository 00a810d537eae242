//! The ends of training clips as CLIP sees them.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use data::{Bucket, Clip, Dataset, Key, Lookup, Storage, Window};
use models::clip::Clip as Tower;

use super::{Encoded, Encoding, Ends, STATES, to_host};
use crate::error::{Error, Result};

impl Encoded {
    /// Encodes the first frame of every window, and the last where the model sees two, that is not cached. Only these
    /// frames are kept of what is decoded.
    pub(super) fn encode_views(&mut self, dataset: &Dataset, with: &Encoding) -> Result<()> {
        let tower = with.clip()?;
        let identity = with.clip_identity(&tower);
        let mut missing = Vec::new();
        for (index, keys) in self.clips.iter_mut().enumerate() {
            let key = Key::of(&["view", &keys.latents.to_string(), self.ends.name(), &identity]);
            if !matches!(self.cache.get(&key)?, Lookup::Hit(_)) {
                missing.push((index, key));
            }
            keys.states = Some(key);
        }
        if missing.is_empty() {
            return Ok(());
        }
        self.cache.check_writable()?;
        let bar = with.ui.bar("looking at clips", missing.len());
        for (index, key) in missing {
            let states = self.view(dataset, &dataset.windows[index], &tower)?;
            let host = to_host(&states)?;
            let source = &dataset.sources[dataset.windows[index].source].item.id;
            if host.data().iter().any(|v| !v.is_finite()) {
                return Err(Error::NonFiniteLatents { clip: source.clone() });
            }
            let meta = BTreeMap::from([("source".to_owned(), source.clone())]);
            self.cache.put(&key, &[(STATES, &host, Storage::F32)], &meta)?;
            with.interrupt.check()?;
            bar.inc(1);
        }
        bar.finish();
        Ok(())
    }

    /// CLIP's states [rows, width] of the window's ends, one behind the other.
    fn view(&self, dataset: &Dataset, window: &Window, tower: &Tower) -> Result<Tensor> {
        let last = window.start + window.bucket.frames as usize - 1;
        let places = match self.ends {
            Ends::First => vec![window.start],
            Ends::Both => vec![window.start, last],
        };
        let still = Bucket { frames: 1, ..window.bucket };
        let mut states = Vec::new();
        for start in places {
            let one = Window { bucket: still, start, ..*window };
            for clip in dataset.clips(window.source, &[one])? {
                states.push(tower.encode(&tower.pixels(&picture(&clip?)?)?)?.squeeze(0)?);
            }
        }
        Ok(Tensor::cat(&states, 0)?)
    }
}

/// The first frame [1, 3, h, w] of a clip in -1..1.
fn picture(clip: &Clip) -> Result<Tensor> {
    let Bucket { width, height, frames } = clip.bucket;
    let shape = (1, 3, frames as usize, height as usize, width as usize);
    Ok(Tensor::from_vec(clip.planes(), shape, &Device::Cpu)?.get_on_dim(2, 0)?)
}

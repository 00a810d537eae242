//! Training clips: decoded once for all encoders that lack an entry of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::ScopedJoinHandle;

use data::{Clip, ContentHashes, Dataset, Key, MissReason, Window};
use kernels::{Device, Tensor};
use models::clip::Clip as Tower;
use models::published::Beside;
use models::vae::{Tiling, Vae};

use super::picture_inputs::{GivenFrames, condition};
use super::{ClipKeys, Encoding, LATENTS, LatentStore, storage, to_host};
use crate::error::{Error, Result};
use crate::watch::interrupt::Interrupt;

/// Clips that may wait for each VAE.
const WAITING: usize = 1;

/// Indices of the windows that have no whole entry.
struct Missing {
    /// Of the latents, or of the conditioning latents.
    latents: Vec<usize>,
    /// Of CLIP's states.
    states: BTreeSet<usize>,
}

impl LatentStore {
    /// Encodes every window of `dataset` that is not cached, and what accompanies it. Where both are to be made, the VAE and CLIP are loaded side by
    /// side and each clip is decoded once for both.
    ///
    /// # Errors
    /// Clips that cannot be decoded, latents that are not finite, a cache that takes no files.
    pub fn encode_clips(&mut self, dataset: &Dataset, with: &mut Encoding) -> Result<()> {
        self.encode_sources(dataset, with)?;
        self.encode_loss_masks(dataset, with)?;
        self.encode_accompanied(dataset, with)
    }

    /// Encodes the clips themselves.
    fn encode_sources(&mut self, dataset: &Dataset, with: &mut Encoding) -> Result<()> {
        let ui = with.residents.ui().clone();
        let mut hashes = ContentHashes::open(&self.cache);
        ui.phase("reading clips", || self.name_clips(dataset, &mut hashes, with))?;
        let missing = ui.phase("checking the cache", || self.missing_clips(dataset, with))?;
        if missing.latents.is_empty() && missing.states.is_empty() {
            // A complete cache may be read-only: then clips are hashed anew each time.
            if let Err(error) = hashes.save() {
                ui.note(&format!("{error}; every start reads all clips to know them again"));
            }
            return Ok(());
        }
        self.cache.check_writable()?;
        hashes.save()?;
        let mut rest = missing.states.clone();
        if !missing.latents.is_empty() {
            let is_for_both = missing.latents.iter().any(|index| missing.states.contains(index));
            let vaes = match is_for_both {
                true => vec![with.residents.vae()?],
                false => with.residents.encoding_vaes()?,
            };
            let tower = is_for_both.then(|| with.residents.clip()).transpose()?;
            self.encode_missing(dataset, &missing, (&vaes, tower.as_deref()), with)?;
            rest.retain(|index| !missing.latents.contains(index));
        }
        if rest.is_empty() { Ok(()) } else { self.encode_views(dataset, &rest, with) }
    }

    /// Finds the keys of all entries, from the contents of files and the identities of encoders.
    fn name_clips(&mut self, dataset: &Dataset, hashes: &mut ContentHashes, with: &Encoding) -> Result<()> {
        let vae = with.vae_identity()?;
        let clip = with.residents.dit().image.map(|_| with.clip_identity()).transpose()?;
        self.ends = if with.sees_two() { GivenFrames::Both } else { GivenFrames::First };
        let ends = self.ends.name();
        self.clips.clear();
        for window in &dataset.windows {
            let content = hashes.of(&dataset.sources[window.source].item.media)?;
            let latents = dataset.key(window, &content, &vae);
            let condition = || Key::of(&["condition", &latents.to_string(), ends]);
            let is_given = with.residents.dit().kind.facts().beside.contains(&Beside::Given);
            let condition = is_given.then(condition);
            let states = clip.as_ref().map(|clip| Key::of(&["view", &latents.to_string(), ends, clip]));
            self.clips.push(ClipKeys { latents, condition, states });
        }
        Ok(())
    }

    fn missing_clips(&self, dataset: &Dataset, with: &Encoding) -> Result<Missing> {
        let mut missing = Missing { latents: Vec::new(), states: BTreeSet::new() };
        for (index, keys) in self.clips.iter().enumerate().filter(|(index, _)| self.share.has(*index)) {
            let is_missing = |key: &Key| -> Result<bool> {
                let reason = self.missing(key)?;
                if let Some(reason @ MissReason::Damaged(_)) = &reason {
                    let id = &dataset.sources[dataset.windows[index].source].item.id;
                    with.residents.ui().note(&format!("{id}: {reason}; it is encoded again"));
                }
                Ok(reason.is_some())
            };
            let beside = keys.condition.as_ref().map(is_missing).transpose()?.unwrap_or(false);
            if is_missing(&keys.latents)? || beside {
                missing.latents.push(index);
            }
            if keys.states.as_ref().map(is_missing).transpose()?.unwrap_or(false) {
                missing.states.insert(index);
            }
        }
        Ok(missing)
    }

    /// Deals the missing clips out to `vaes`, each in a thread of its own: clip k goes to number k mod n, while the next ones are
    /// read. Where there is a tower, there is one VAE.
    fn encode_missing(
        &self,
        dataset: &Dataset,
        missing: &Missing,
        (vaes, tower): (&[Arc<Vae>], Option<&Tower>),
        with: &Encoding,
    ) -> Result<()> {
        let bar = &with.residents.ui().bar("encoding clips", missing.latents.len());
        let encode = |vae: &Vae, (index, clip): (usize, Clip)| -> Result<()> {
            let keys = &self.clips[index];
            self.put_clip(keys, vae, &clip)?;
            if let (Some(tower), Some(key), true) = (tower, &keys.states, missing.states.contains(&index)) {
                self.put_view(key, &clip, tower)?;
            }
            bar.inc(1);
            Ok(())
        };
        let done = std::thread::scope(|scope| {
            let (mut lanes, mut workers) = (Vec::new(), Vec::new());
            for vae in vaes {
                let (lane, clips) = sync_channel(WAITING);
                lanes.push(lane);
                workers.push(scope.spawn(move || clips.into_iter().try_for_each(|clip| encode(vae, clip))));
            }
            let read = read_missing(dataset, missing, with.interrupt, &lanes);
            drop(lanes);
            let join = |worker: ScopedJoinHandle<Result<()>>| {
                worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            let outcomes: Vec<Result<()>> = workers.into_iter().map(join).collect();
            // A worker that failed is why reading ended.
            outcomes.into_iter().collect::<Result<()>>().and(read)
        });
        if done.is_ok() {
            bar.finish();
        }
        done
    }

    fn put_clip(&self, keys: &ClipKeys, vae: &Vae, clip: &Clip) -> Result<()> {
        let bucket = clip.bucket;
        let shape = (1, 3, bucket.frames as usize, bucket.height as usize, bucket.width as usize);
        let video = Tensor::from_vec(clip.planes(), shape, &Device::Cpu)?.to_device(vae.device())?;
        self.put(&keys.latents, (LATENTS, &vae.encode(&video, Tiling::Off)?.squeeze(0)?), clip)?;
        if let Some(key) = &keys.condition {
            let frame = |n: usize| -> Result<Tensor> { Ok(video.get(0)?.narrow(1, n, 1)?.squeeze(1)?) };
            let last = match self.ends {
                GivenFrames::Both => Some(frame(bucket.frames as usize - 1)?),
                GivenFrames::First => None,
            };
            let latents = condition(vae, &frame(0)?, last.as_ref(), bucket.frames as usize)?;
            self.put(key, (LATENTS, &latents), clip)?;
        }
        Ok(())
    }

    /// Keeps one tensor of a clip.
    pub(super) fn put(&self, key: &Key, (name, tensor): (&str, &Tensor), clip: &Clip) -> Result<()> {
        let host = to_host(tensor)?;
        if host.data().iter().any(|v| !v.is_finite()) {
            return Err(Error::NonFiniteLatents { clip: clip.source.clone() });
        }
        let meta = BTreeMap::from([("source".to_owned(), clip.source.clone())]);
        Ok(self.cache.put(key, &[(name, &host, storage(tensor))], &meta)?)
    }
}

/// Reads the missing clips, each source once, and deals them out to `lanes` in turn; ends early where one is gone.
fn read_missing(
    dataset: &Dataset,
    missing: &Missing,
    interrupt: &Interrupt,
    lanes: &[SyncSender<(usize, Clip)>],
) -> Result<()> {
    let sources: BTreeSet<usize> = missing.latents.iter().map(|&i| dataset.windows[i].source).collect();
    let mut turns = lanes.iter().cycle();
    for source in sources {
        let own = |&i: &usize| dataset.windows[i].source == source;
        let mut indices: Vec<usize> = missing.latents.iter().copied().filter(own).collect();
        indices.sort_by_key(|&i| dataset.windows[i].start);
        let windows: Vec<Window> = indices.iter().map(|&i| dataset.windows[i]).collect();
        for (&index, clip) in indices.iter().zip(dataset.clips(source, &windows)?) {
            // Before a verdict: what stops this program may have stopped ffmpeg too.
            interrupt.check()?;
            let clip = clip?;
            if turns.next().is_none_or(|lane| lane.send((index, clip)).is_err()) {
                return Ok(());
            }
            interrupt.check()?;
        }
    }
    Ok(())
}

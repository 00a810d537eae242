//! The ends of training clips as CLIP sees them.

use std::collections::BTreeSet;

use data::{Bucket, Clip, Dataset, Key, Window};
use kernels::{Device, Tensor};
use models::clip::Clip as Tower;

use super::{Encoding, GivenFrames, LatentStore, STATES};
use crate::error::Result;

impl LatentStore {
    /// Encodes the ends of the windows `missing`, whose latents are there. Only these frames are kept of what is decoded.
    pub(super) fn encode_views(
        &self,
        dataset: &Dataset,
        missing: &BTreeSet<usize>,
        with: &mut Encoding,
    ) -> Result<()> {
        let tower = with.residents.clip()?;
        let bar = with.residents.ui().bar("looking at clips", missing.len());
        for &index in missing {
            if let Some(key) = &self.clips[index].states {
                let ends = self.decoded_ends(dataset, &dataset.windows[index])?;
                self.put_states(key, &ends.iter().collect::<Vec<_>>(), &tower)?;
            }
            with.interrupt.check()?;
            bar.inc(1);
        }
        bar.finish();
        Ok(())
    }

    /// The ends of the window as clips of one frame.
    fn decoded_ends(&self, dataset: &Dataset, window: &Window) -> Result<Vec<Clip>> {
        let still = Bucket { frames: 1, ..window.bucket };
        let mut ends = Vec::new();
        for frame in self.places(window.bucket) {
            let one = Window { bucket: still, start: window.start + frame, ..*window };
            ends.extend(dataset.clips(window.source, &[one])?.collect::<data::Result<Vec<_>>>()?);
        }
        Ok(ends)
    }

    /// Keeps CLIP's states of the ends of `clip`.
    pub(super) fn put_view(&self, key: &Key, clip: &Clip, tower: &Tower) -> Result<()> {
        let still = Bucket { frames: 1, ..clip.bucket };
        let frame = |index: usize| {
            let pixels = clip.frames().nth(index).map(<[u8]>::to_vec).unwrap_or_default();
            Clip { bucket: still, pixels, ..clip.clone() }
        };
        let ends: Vec<Clip> = self.places(clip.bucket).into_iter().map(frame).collect();
        self.put_states(key, &ends.iter().collect::<Vec<_>>(), tower)
    }

    /// The frames of a window that CLIP sees.
    fn places(&self, bucket: Bucket) -> Vec<usize> {
        match self.ends {
            GivenFrames::First => vec![0],
            GivenFrames::Both => vec![0, bucket.frames as usize - 1],
        }
    }

    /// Keeps CLIP's states [rows, width] of `ends`, clips of one frame, one behind the other.
    fn put_states(&self, key: &Key, ends: &[&Clip], tower: &Tower) -> Result<()> {
        let encode = |clip: &&Clip| -> Result<Tensor> {
            Ok(tower.encode(&tower.pixels(&picture(clip)?)?)?.squeeze(0)?)
        };
        let states = ends.iter().map(encode).collect::<Result<Vec<_>>>()?;
        match ends {
            [first, ..] => self.put(key, (STATES, &Tensor::cat(&states, 0)?), first),
            [] => Ok(()),
        }
    }
}

/// The first frame [1, 3, h, w] of a clip in -1..1.
fn picture(clip: &Clip) -> Result<Tensor> {
    let Bucket { width, height, frames } = clip.bucket;
    let shape = (1, 3, frames as usize, height as usize, width as usize);
    Ok(Tensor::from_vec(clip.planes(), shape, &Device::Cpu)?.get_on_dim(2, 0)?)
}

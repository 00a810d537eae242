//! Decoding to 8-bit frames that leave the device as they are made.

use std::ops::ControlFlow;

use kernels::resample::{Rgb, rgb_bytes, unfold_pixels};
use kernels::transfer::{HostStore, Parked};
use kernels::{DType, Device, Tensor};

use super::bands::Rows;
use super::parts::History;
use super::tiling::Tiling;
use super::{TEMPORAL_RATIO, Vae};
use crate::{Error, Result};

/// Takes frames of a clip, `[frames, height, width, 3]` bytes, a few at a time, and may break off.
pub type FrameSink<'a> = dyn FnMut(Vec<u8>) -> ControlFlow<()> + 'a;

impl Vae {
    /// Decodes scaled latents [1,C,T',H',W'] and gives `sink` the frames in 8 bits as they are made, 1, then 4 at a time:
    /// those of [`Vae::decode`], rounded. Frames are copied while the next ones are computed; where the latents are shadows,
    /// `sink` is not called.
    ///
    /// # Errors
    /// Those of [`Vae::decode`], and a batch. Frames that are not finite do not reach `sink`.
    pub fn decode_frames(&self, latents_bcthw: &Tensor, tiling: Tiling, sink: &mut FrameSink) -> Result<()> {
        let z = self.unscaled(latents_bcthw)?;
        if z.dim(0)? != 1 {
            return Err(Error::Mismatch(format!("{} clips are not decoded to frames at once", z.dim(0)?)));
        }
        let mut leaving = Leaving::new(HostStore::unreserved(&self.device)?, self.sizes.patch(), sink);
        match self.decoding_tiles(&z, tiling)? {
            Some(axes) => {
                // Each tile has gone through all frames before the next one begins.
                let pixels = self.tiled_pixels(&z, axes, &mut None)?;
                let frames = pixels.dim(2)?;
                for start in (0..frames).step_by(TEMPORAL_RATIO) {
                    let part = pixels.narrow(2, start, TEMPORAL_RATIO.min(frames - start))?;
                    if leaving.push(&part)?.is_break() {
                        return Ok(());
                    }
                }
            }
            None => {
                let z = self.from_latents.forward(z, &mut History::new(0))?;
                let chunks = (0..z.dim(2)?).map(|i| (i, 1));
                self.decoder
                    .run_each(&z, (chunks, Rows::All), &mut None, &mut |pixels| leaving.push(&pixels))?;
            }
        }
        leaving.finish()
    }
}

impl Vae {
    /// Decodes scaled latents `[1,C,T',H',W']` to pixels `[1,3,T,H,W]` f32 in -1..1 on `host`: those of [`Vae::decode`], of which the VAE's
    /// device has a few frames at a time unless they are decoded in tiles.
    ///
    /// # Errors
    /// Those of [`Vae::decode`].
    pub fn decode_to_host(&self, latents_bcthw: &Tensor, tiling: Tiling, host: &Device) -> Result<Tensor> {
        let z = self.unscaled(latents_bcthw)?;
        if self.decoding_tiles(&z, tiling)?.is_some() {
            drop(z);
            return Ok(self.decode(latents_bcthw, tiling)?.to_device(host)?);
        }
        let z = self.from_latents.forward(z, &mut History::new(0))?;
        let chunks = (0..z.dim(2)?).map(|i| (i, 1));
        let mut frames = Vec::new();
        self.decoder.run_each(&z, (chunks, Rows::All), &mut None, &mut |pixels| {
            let pixels = unfold_pixels(&pixels.to_dtype(DType::F32)?, self.sizes.patch())?;
            let sum = pixels.sum_all()?;
            if !sum.is_shadow() && !sum.to_scalar::<f32>()?.is_finite() {
                return Err(Error::NotFinite { what: "the decoded video" });
            }
            frames.push(pixels.clamp(-1f32, 1f32)?.to_device(host)?);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Tensor::cat(&frames, 2)?)
    }
}

/// Frames on their way to the host: one piece at a time is waited for, behind the work on the next.
pub(super) struct Leaving<'a, 'b> {
    store: HostStore,
    patch: usize,
    sink: &'a mut FrameSink<'b>,
    under_way: Option<[Parked; 2]>,
    is_broken_off: bool,
}

impl<'a, 'b> Leaving<'a, 'b> {
    /// Pixels are folded `patch` by `patch`.
    pub(super) fn new(store: HostStore, patch: usize, sink: &'a mut FrameSink<'b>) -> Self {
        Self { store, patch, sink, under_way: None, is_broken_off: false }
    }

    /// Sends the pixels [1,3pp,T,H,W] on their way, and gives the sink those before them.
    pub(super) fn push(&mut self, pixels: &Tensor) -> Result<ControlFlow<()>> {
        let Rgb { bytes, bad } = rgb_bytes(pixels, self.patch)?;
        self.store.next_group()?;
        let before = self.under_way.replace([self.store.park(bad)?, self.store.park(bytes)?]);
        self.deliver(before)
    }

    fn deliver(&mut self, piece: Option<[Parked; 2]>) -> Result<ControlFlow<()>> {
        let Some([bad, bytes]) = piece else { return Ok(ControlFlow::Continue(())) };
        let (Some(bad), Some(bytes)) = (bad.into_bytes()?, bytes.into_bytes()?) else {
            return Ok(ControlFlow::Continue(()));
        };
        if bad != [0] {
            return Err(Error::NotFinite { what: "the decoded video" });
        }
        let flow = (self.sink)(bytes);
        self.is_broken_off = flow.is_break();
        Ok(flow)
    }

    /// Gives the sink the last frames.
    pub(super) fn finish(mut self) -> Result<()> {
        let last = self.under_way.take().filter(|_| !self.is_broken_off);
        let _flow: ControlFlow<()> = self.deliver(last)?;
        self.store.next_group()?;
        Ok(())
    }
}

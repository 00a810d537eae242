//! Decoding on several devices, each of which has a band of the frames' rows: bit for bit what one device makes.
//!
//! A band exchanges its outer rows with its neighbours before every convolution that sees more than one row, which reads them where they
//! arrive, and keys and values of the middle's attention with all others. That each output's sum has one order, whatever else is computed with it, is what makes
//! the bits the same: see `kernels::conv3d` and `kernels::frame_attention`.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use kernels::conv3d::{Around, Conv3dGeometry, Padding};
use kernels::resample::unfold_pixels;
use kernels::transfer::{HostStore, Link, Route, Sent};
use kernels::video::{Edge, edge_row};
use kernels::{DType, Tensor};

use super::Vae;
use super::frames::{FrameSink, Leaving};
use super::parts::History;
use super::tiling::Tiling;
use crate::{Error, Result};

/// Which rows of the frames a network sees.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rows<'a> {
    All,
    Band(&'a Neighbours<'a>),
}

impl Rows<'_> {
    /// The rows around `x` [B,C,T,H,W] that a convolution of this geometry sees, and the geometry that is left.
    pub(super) fn edges(self, x: &Tensor, geometry: Conv3dGeometry) -> Result<(Edges, Conv3dGeometry)> {
        match self {
            Self::Band(neighbours) if geometry.padding.top > 0 || geometry.padding.bottom > 0 => {
                neighbours.edges(x, geometry)
            }
            _ => Ok((Edges::default(), geometry)),
        }
    }

    /// Keys and values of all rows, in order, of the own ones [positions,2C].
    pub(super) fn gathered(self, own: Tensor) -> Result<Tensor> {
        match self {
            Self::All => Ok(own),
            Self::Band(neighbours) => neighbours.gathered(own),
        }
    }
}

/// Rows of neighbours around the frames of a band, `[B,T,1,W,C]` each; none where the frames end.
#[derive(Debug, Clone, Default)]
pub(super) struct Edges {
    above: Option<Tensor>,
    below: Option<Tensor>,
}

impl Edges {
    /// For a convolution.
    pub(super) fn around(&self) -> Around<'_> {
        Around { above: self.above.as_ref(), below: self.below.as_ref() }
    }

    /// The rows around the last `frames`, in memory of their own.
    pub(super) fn last(&self, frames: usize) -> Result<Self> {
        let last = |row: &Tensor| {
            let count = frames.min(row.dim(1)?);
            row.narrow(1, row.dim(1)? - count, count)?.force_contiguous()
        };
        let [above, below] = [&self.above, &self.below].map(|row| row.as_ref().map(last).transpose());
        Ok(Self { above: above?, below: below? })
    }

    /// These, then those of `later` frames.
    pub(super) fn then(&self, later: &Self) -> Result<Self> {
        let join = |earlier: &Option<Tensor>, later: &Option<Tensor>| {
            earlier.as_ref().zip(later.as_ref()).map(|(a, b)| Tensor::cat(&[a, b], 1)).transpose()
        };
        Ok(Self { above: join(&self.above, &later.above)?, below: join(&self.below, &later.below)? })
    }
}

/// A band's connections to the others.
#[derive(Debug)]
pub(super) struct Neighbours<'a> {
    index: usize,
    /// By band; none to itself.
    to: Vec<Option<Connection<'a>>>,
}

#[derive(Debug)]
struct Connection<'a> {
    link: &'a Link,
    send: Sender<Sent>,
    take: Receiver<Sent>,
}

impl Connection<'_> {
    fn send(&self, x: Tensor) -> Result<()> {
        // What the other side received before it sent its last message may go.
        self.link.settle()?;
        self.send.send(self.link.send(x)?).map_err(|_| Error::BandStopped)
    }

    fn receive(&self) -> Result<Tensor> {
        Ok(self.take.recv().map_err(|_| Error::BandStopped)?.receive()?)
    }
}

impl Neighbours<'_> {
    fn edges(&self, x: &Tensor, geometry: Conv3dGeometry) -> Result<(Edges, Conv3dGeometry)> {
        let up = self.index.checked_sub(1).and_then(|above| self.to[above].as_ref());
        let down = self.to.get(self.index + 1).and_then(Option::as_ref);
        up.map_or(Ok(()), |above| above.send(edge_row(x, Edge::Top)?))?;
        down.map_or(Ok(()), |below| below.send(edge_row(x, Edge::Bottom)?))?;
        let [above, below] = [up, down].map(|side| side.map(Connection::receive).transpose());
        let (above, below) = (above?, below?);
        let left = |pad: usize, row: &Option<Tensor>| pad - usize::from(row.is_some());
        let padding = Padding {
            top: left(geometry.padding.top, &above),
            bottom: left(geometry.padding.bottom, &below),
            ..geometry.padding
        };
        Ok((Edges { above, below }, Conv3dGeometry { padding, ..geometry }))
    }

    fn gathered(&self, own: Tensor) -> Result<Tensor> {
        self.to.iter().flatten().try_for_each(|other| other.send(own.clone()))?;
        let of =
            |other: &Option<Connection>| other.as_ref().map_or_else(|| Ok(own.clone()), Connection::receive);
        Ok(Tensor::cat(&self.to.iter().map(of).collect::<Result<Vec<_>>>()?, 0)?)
    }
}

/// A VAE on several devices, or several times on one, that decodes clips in bands.
#[derive(Debug)]
pub struct Bands {
    vaes: Vec<Arc<Vae>>,
    /// From each to each other.
    links: Vec<Vec<Option<Link>>>,
}

/// Where the pixels of a band go, chunk by chunk.
type Pixels<'a> = dyn FnMut(Tensor) -> Result<ControlFlow<()>> + 'a;

impl Bands {
    /// One VAE alone, which decodes whole frames.
    ///
    /// # Errors
    /// When the device fails.
    pub fn one(vae: Arc<Vae>) -> Result<Self> {
        Self::new(vec![vae], Route::Auto)
    }

    /// Of one VAE, loaded once for each band from top to bottom, whose tensors go from device to device by `route`.
    ///
    /// # Errors
    /// Different VAEs or dtypes, none at all, and devices that cannot be linked.
    pub fn new(vaes: Vec<Arc<Vae>>, route: Route) -> Result<Self> {
        let is_same = |a: &Vae, b: &Vae| a.fingerprint == b.fingerprint && a.dtype == b.dtype;
        if vaes.is_empty() || !vaes.windows(2).all(|pair| is_same(&pair[0], &pair[1])) {
            return Err(Error::Mismatch("bands of a clip are decoded by one VAE in one dtype".to_owned()));
        }
        let link = |from: usize, to: usize| {
            let link = || Link::new(vaes[from].device(), vaes[to].device(), route);
            (from != to).then(link).transpose()
        };
        let count = vaes.len();
        let links =
            (0..count).map(|from| (0..count).map(|to| link(from, to)).collect::<kernels::Result<_>>());
        let links = links.collect::<kernels::Result<_>>()?;
        Ok(Self { vaes, links })
    }

    /// The VAE of the first band.
    pub fn first(&self) -> &Arc<Vae> {
        &self.vaes[0] // `new` refuses none
    }

    /// The VAEs, from the top band to the bottom one.
    pub fn vaes(&self) -> &[Arc<Vae>] {
        &self.vaes
    }

    /// [`Vae::decode_frames`]: the same bytes. In tiles the first VAE decodes alone.
    ///
    /// # Errors
    /// As there, of any band.
    pub fn decode_frames(&self, latents_bcthw: &Tensor, tiling: Tiling, sink: &mut FrameSink) -> Result<()> {
        let (one, _, _, height, width) = latents_bcthw.dims5()?;
        if one != 1 {
            return Err(Error::Mismatch(format!("{one} clips are not decoded to frames at once")));
        }
        let bands = self.bands(height);
        if bands.len() == 1 || tiling != Tiling::Off {
            return self.first().decode_frames(latents_bcthw, tiling, sink);
        }
        let ratio = self.first().sizes.spatial_ratio();
        let row = width * ratio * 3;
        let (senders, receivers): (Vec<_>, Vec<_>) = bands.iter().map(|_| channel::<Vec<u8>>()).unzip();
        let heights: Vec<usize> = bands.iter().map(|rows| rows.len() * ratio * row).collect();
        let work = |index: usize, sender: Sender<Vec<u8>>, z: &Tensor, neighbours: &Neighbours| {
            let vae = &self.vaes[index];
            let mut send = |bytes| match sender.send(bytes) {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            };
            let store = HostStore::unreserved(&vae.device)?;
            let mut leaving = Leaving::new(store, vae.sizes.patch(), &mut send);
            vae.decode_band(z, neighbours, &mut |pixels| leaving.push(&pixels))?;
            leaving.finish()
        };
        let mut is_broken_off = false;
        let outcomes = self.each(latents_bcthw, bands, senders, work, || {
            // A band that has no more is at its end, or says why it is not.
            while let Ok(pieces) = receivers.iter().map(Receiver::recv).collect::<Result<Vec<_>, _>>() {
                is_broken_off = sink(joined(&pieces, &heights)).is_break();
                if is_broken_off {
                    break;
                }
            }
            drop(receivers);
        })?;
        match all(outcomes) {
            // Where one stops because nobody takes its pixels, others may wait for it.
            Err(Error::BandStopped) if is_broken_off => Ok(()),
            done => done.map(drop),
        }
    }

    /// [`Vae::decode`] of whole frames, on the first device: the same bits.
    ///
    /// # Errors
    /// As there, of any band.
    pub fn decode(&self, latents_bcthw: &Tensor) -> Result<Tensor> {
        let bands = self.bands(latents_bcthw.dim(3)?);
        let units = bands.iter().map(|_| ()).collect();
        let work = |index: usize, (): (), z: &Tensor, neighbours: &Neighbours| {
            let mut chunks = Vec::new();
            self.vaes[index].decode_band(z, neighbours, &mut |pixels| {
                chunks.push(pixels.contiguous()?);
                Ok(ControlFlow::Continue(()))
            })?;
            Ok(Tensor::cat(&chunks, 2)?.to_dtype(DType::F32)?)
        };
        let parts = all(self.each(latents_bcthw, bands, units, work, || ())?)?;
        let parts = parts.iter().map(|part| part.to_device(self.first().device()));
        let pixels = Tensor::cat(&parts.collect::<kernels::Result<Vec<_>>>()?, 3)?;
        Ok(unfold_pixels(&pixels, self.first().sizes.patch())?.clamp(-1f32, 1f32)?)
    }

    /// The rows of latents of each band, as even as they can be; never none.
    fn bands(&self, height: usize) -> Vec<Range<usize>> {
        let count = self.vaes.len().min(height).max(1);
        (0..count).map(|i| height * i / count..height * (i + 1) / count).collect()
    }

    /// Does `work` on every band in a thread of its own, with what it is given, and `meanwhile` on this one.
    fn each<G: Send, T: Send>(
        &self,
        latents_bcthw: &Tensor,
        bands: Vec<Range<usize>>,
        given: Vec<G>,
        work: impl Fn(usize, G, &Tensor, &Neighbours) -> Result<T> + Sync,
        meanwhile: impl FnOnce(),
    ) -> Result<Vec<Result<T>>> {
        let neighbours = self.neighbours(bands.len());
        let parts = bands.iter().map(|rows| latents_bcthw.narrow(3, rows.start, rows.len())?.contiguous());
        let parts = parts.collect::<kernels::Result<Vec<_>>>()?;
        let outcomes: Vec<Result<T>> = std::thread::scope(|scope| {
            let work = &work;
            let bands = parts.into_iter().zip(neighbours).zip(given).enumerate();
            let threads: Vec<_> = bands
                .map(|(index, ((part, neighbours), given))| {
                    scope.spawn(move || {
                        let z = self.vaes[index].unscaled(&part)?;
                        work(index, given, &z, &neighbours)
                    })
                })
                .collect();
            meanwhile();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<T>>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect()
        });
        // Everything was received, or never will be.
        self.links.iter().flatten().flatten().try_for_each(Link::settle)?;
        Ok(outcomes)
    }

    /// The connections of each of so many bands.
    fn neighbours(&self, count: usize) -> Vec<Neighbours<'_>> {
        let mut all: Vec<Neighbours> =
            (0..count).map(|index| Neighbours { index, to: (0..count).map(|_| None).collect() }).collect();
        for a in 0..count {
            for b in 0..a {
                let ((to_b, from_a), (to_a, from_b)) = (channel(), channel());
                if let (Some(onward), Some(back)) = (&self.links[a][b], &self.links[b][a]) {
                    all[a].to[b] = Some(Connection { link: onward, send: to_b, take: from_b });
                    all[b].to[a] = Some(Connection { link: back, send: to_a, take: from_a });
                }
            }
        }
        all
    }
}

/// What all bands made, or the first error, of those that one band had itself before those of bands that waited for it.
fn all<T>(outcomes: Vec<Result<T>>) -> Result<Vec<T>> {
    let is_own = |outcome: &Result<T>| matches!(outcome, Err(error) if !matches!(error, Error::BandStopped));
    let (own, others): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(is_own);
    own.into_iter().chain(others).collect()
}

/// Frames of which each piece has a band of `bytes` a frame.
fn joined(pieces: &[Vec<u8>], bytes: &[usize]) -> Vec<u8> {
    let frames = pieces.first().map_or(0, |piece| piece.len() / bytes[0].max(1));
    let mut whole = Vec::with_capacity(pieces.iter().map(Vec::len).sum());
    for frame in 0..frames {
        for (piece, bytes) in pieces.iter().zip(bytes) {
            whole.extend_from_slice(&piece[frame * bytes..(frame + 1) * bytes]);
        }
    }
    whole
}

impl Vae {
    /// Decodes the band `z` of latents that [`Vae::unscaled`] returned; its pixels go to `each`.
    fn decode_band(&self, z: &Tensor, neighbours: &Neighbours, each: &mut Pixels) -> Result<()> {
        let z = self.from_latents.forward(z.clone(), &mut History::new(0))?;
        let chunks = (0..z.dim(2)?).map(|i| (i, 1));
        self.decoder.run_each(&z, (chunks, Rows::Band(neighbours)), &mut None, each)
    }
}

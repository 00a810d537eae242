//! Blocks whose matrices stay in pinned host memory and are copied to the device one such block ahead of their use.
//!
//! For cards that cannot hold all of a model's weights: the copies go one way, beside the work of the blocks before, and cost
//! no time where that work takes longer. No number changes.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::{Deref, Range};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use kernels::transfer::{Arriving, Fetcher, HostStore, Parked, slabs};
use kernels::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::architecture::Architecture;
use super::base::Base;
use super::layer::Layer;
use super::layer_id::LayerId;
use crate::weights::Weights;
use crate::weights::side_by_side::{AtOnce, beside, loaded};
use crate::{Error, Result};

/// How many of eight main blocks in a row have their matrices in host memory: 0 to 8.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Streamed(u8);

impl Streamed {
    /// No block.
    pub const NONE: Self = Self(0);
    /// Every block.
    pub const ALL: Self = Self(8);
    /// What a plan tries, from the least on.
    pub const STEPS: [Self; 5] = [Self(0), Self(2), Self(4), Self(6), Self(8)];

    /// Whether the matrices of the main block `n` are in host memory. Such blocks are spread evenly.
    pub fn has(self, n: usize) -> bool {
        (n * usize::from(self.0)) % 8 < usize::from(self.0)
    }

    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }

    /// How many of `blocks` have their matrices in host memory.
    pub fn of(self, blocks: Range<usize>) -> usize {
        blocks.filter(|n| self.has(*n)).count()
    }

    /// The fraction of blocks.
    pub fn fraction(self) -> f64 {
        f64::from(self.0) / 8.0
    }
}

impl TryFrom<u8> for Streamed {
    type Error = String;

    fn try_from(eighths: u8) -> std::result::Result<Self, String> {
        match eighths {
            0..=8 => Ok(Self(eighths)),
            _ => Err(format!("{eighths} of 8 blocks cannot be streamed")),
        }
    }
}

impl From<Streamed> for u8 {
    fn from(streamed: Streamed) -> Self {
        streamed.0
    }
}

/// Which layer is used after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Toward {
    /// Forward alone: after the last layer the first.
    Calls,
    /// Forward with a backward to come: after the last layer the last.
    End,
    /// Backward.
    Start,
}

/// The layers of a part of a model whose matrices are in host memory.
#[derive(Debug)]
pub(super) struct Streaming {
    fetcher: Fetcher,
    store: HostStore,
    /// The matrices of each layer that has them there, in the order of [`Layer::matrices_mut`].
    parked: BTreeMap<usize, Arc<Vec<Parked>>>,
    /// Those on their way.
    coming: Mutex<BTreeMap<usize, Vec<Arriving>>>,
}

/// A layer with its matrices on the device.
pub(super) enum There<'a> {
    /// Where it always is.
    Resident(&'a dyn Layer),
    /// For as long as it is used.
    Brought(Box<dyn Layer>),
}

impl<'a> Deref for There<'a> {
    type Target = dyn Layer + 'a;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Resident(layer) => *layer,
            Self::Brought(layer) => layer.as_ref(),
        }
    }
}

impl Streaming {
    /// Of a part that is on `device`.
    fn new(device: &Device) -> Result<Self> {
        let (fetcher, store) = (Fetcher::new(device)?, HostStore::streamed(device)?);
        Ok(Self { fetcher, store, parked: BTreeMap::new(), coming: Mutex::default() })
    }

    /// The same matrices for a part on `device`, whose layers are those of `parts`, in order: for each how many it has.
    pub fn joined(parts: &[(Option<&Self>, usize)], device: &Device) -> Result<Option<Self>> {
        let mut joined = Self::new(device)?;
        let mut first = 0;
        for (streaming, layers) in parts {
            let own = streaming.iter().flat_map(|own| &own.parked);
            joined.parked.extend(own.map(|(index, parked)| (first + index, parked.clone())));
            first += layers;
        }
        Ok((!joined.parked.is_empty()).then_some(joined))
    }

    /// Parks the matrices of `layer`, which is the layer `index`.
    pub fn park(&mut self, index: usize, layer: &mut dyn Layer) -> Result<()> {
        let park = |matrix: &mut Tensor| {
            let nothing = Tensor::zeros(1, matrix.dtype(), matrix.device())?;
            Ok(self.store.park(std::mem::replace(matrix, nothing))?)
        };
        let parked = layer.matrices_mut().into_iter().map(park).collect::<Result<_>>()?;
        self.store.next_group()?;
        self.parked.insert(index, Arc::new(parked));
        Ok(())
    }

    /// Whether the matrices of the layer `index` are here.
    pub fn has(&self, index: usize) -> bool {
        self.parked.contains_key(&index)
    }

    /// The layer `index` of `layers` with its matrices; those of the next one `toward` start on their way.
    pub fn bring<'a>(&self, layers: &'a [Box<dyn Layer>], index: usize, toward: Toward) -> Result<There<'a>> {
        let mut coming = self.coming.lock().unwrap_or_else(PoisonError::into_inner);
        let own = match (coming.remove(&index), self.parked.get(&index)) {
            (Some(own), _) => Some(own),
            (None, Some(parked)) => Some(self.start(parked)?),
            (None, None) => None,
        };
        let next = self.next(index, toward);
        // What was expected otherwise gives its memory back.
        coming.retain(|index, _| next.is_none_or(|next| next == *index));
        if let Some((next, parked)) = next.and_then(|next| Some((next, self.parked.get(&next)?)))
            && let Entry::Vacant(place) = coming.entry(next)
        {
            place.insert(self.start(parked)?);
        }
        let layer = &layers[index]; // of a part's own layers
        let Some(own) = own else { return Ok(There::Resident(layer.as_ref())) };
        let mut brought = layer.share();
        for (matrix, arriving) in brought.matrices_mut().into_iter().zip(own) {
            *matrix = arriving.take()?;
        }
        Ok(There::Brought(brought))
    }

    /// Gives up what is on its way: between calls a device has no memory for it.
    pub fn release(&self) {
        self.coming.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn start(&self, parked: &[Parked]) -> Result<Vec<Arriving>> {
        Ok(parked.iter().map(|matrix| self.fetcher.start(matrix)).collect::<kernels::Result<_>>()?)
    }

    /// The layer that is copied while the layer `index` is used; none where it is that one itself.
    fn next(&self, index: usize, toward: Toward) -> Option<usize> {
        let after = self.parked.range(index + 1..).next();
        let next = match toward {
            Toward::Calls => after.or_else(|| self.parked.first_key_value()),
            Toward::End => after.or_else(|| self.parked.last_key_value()),
            Toward::Start => self.parked.range(..index).next_back(),
        };
        next.map(|(next, _)| *next).filter(|next| *next != index)
    }
}

/// Layers, and the matrices that some of them have in host memory.
pub(super) type Loaded = (Vec<Box<dyn Layer>>, Option<Streaming>);

/// Loads the layers `ids` in the dtypes of `base`, the matrices of those that it streams into host memory, each by way of the
/// device alone.
///
/// # Errors
/// Weights that cannot be read, and memory that runs out.
pub(super) fn load_layers(
    architecture: &dyn Architecture,
    ids: &[LayerId],
    weights: &Weights,
    base: Base,
    device: &Device,
) -> Result<Loaded> {
    let is_streamed = |id: &LayerId| id.chain() == LayerId::BLOCKS && base.streamed.has(id.index());
    let specs = ids.iter().flat_map(|id| architecture.layer_tensors(*id));
    let load = |id: &LayerId| architecture.load_layer(*id, weights, base, device);
    if !ids.iter().any(is_streamed) {
        let _beside = beside(specs, base.frozen, device, AtOnce::RESIDENT)?;
        return Ok((loaded(ids, device, AtOnce::RESIDENT, |_, id| load(id))?, None));
    }
    let _beside = beside(specs, base.frozen, device, AtOnce::PASSING)?;
    let streaming = Streaming::new(device)?;
    let (store, sizes) =
        (streaming.store.clone(), sizes(architecture, ids.iter().filter(|id| is_streamed(id)), base));
    let streaming = Mutex::new(streaming);
    let load = |index: usize, id: &LayerId| {
        let mut layer = load(id)?;
        if is_streamed(id) {
            let mut streaming = streaming.lock().unwrap_or_else(PoisonError::into_inner);
            streaming.park(index, layer.as_mut())?;
        }
        Ok(layer)
    };
    // Pinning is slow, and done while files are read.
    let layers = thread::scope(|scope| {
        let pinning = scope.spawn(move || store.reserve(&slabs(&sizes), &|_| true));
        let layers = loaded(ids, device, AtOnce::PASSING, load)?;
        match pinning.join() {
            Ok(pinned) => pinned?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        Ok::<_, Error>(layers)
    })?;
    Ok((layers, Some(streaming.into_inner().unwrap_or_else(PoisonError::into_inner))))
}

/// Bytes of the matrices of layers, and how many there are of each.
fn sizes<'a>(
    architecture: &dyn Architecture,
    ids: impl Iterator<Item = &'a LayerId>,
    base: Base,
) -> Vec<(u64, usize)> {
    let mut sizes = BTreeMap::new();
    for spec in ids.flat_map(|id| architecture.layer_tensors(*id)) {
        if let Some((_, out, input)) = spec.adaptable() {
            *sizes.entry(base.frozen.stored_bytes(out, input)).or_default() += 1;
        }
    }
    sizes.into_iter().collect()
}

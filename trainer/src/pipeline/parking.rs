//! Two experts in the memory of one: the matrices of the one that has nothing to do wait in host memory, pinned.
//!
//! The numbers come back to the bit. On the CPU all of this moves nothing.

use std::thread::{self, ScopedJoinHandle};

use kernels::Tensor;
use kernels::transfer::{HostStore, Parked};

use super::{Pipeline, Stage};
use crate::error::Result;

/// The matrices of a parked pipeline, stage by stage.
#[derive(Debug)]
pub struct ParkedWeights {
    stages: Vec<ParkedStage>,
}

/// The matrices of each layer of a parked stage.
#[derive(Debug)]
pub struct ParkedStage(Vec<Vec<Parked>>);

impl ParkedStage {
    /// Takes the matrices of `stage` off its device, into `store`. Until [`Self::wake`] it cannot be used.
    ///
    /// # Errors
    /// When host memory runs out.
    pub fn rest(store: &HostStore, stage: &mut Stage) -> Result<Self> {
        let layers = stage.dit.layers.iter_mut();
        let parked = layers.map(|layer| leave(store, layer.matrices_mut())).collect::<Result<_>>()?;
        store.next_group()?;
        Ok(Self(parked))
    }

    /// Puts the matrices of `stage` back.
    ///
    /// # Errors
    /// When the device's memory runs out.
    pub fn wake(self, stage: &mut Stage) -> Result<()> {
        let mut layers = stage.dit.layers.iter_mut().zip(self.0);
        layers.try_for_each(|(layer, parked)| come_back(layer.matrices_mut(), parked))
    }

    /// [`Self::rest`] for `leaving` and [`Self::wake`] for `coming`, layer by layer: neither the device nor the host holds
    /// much more than one of them at any time.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn exchange(self, store: &HostStore, leaving: &mut Stage, coming: &mut Stage) -> Result<Self> {
        let layers = leaving.dit.layers.iter_mut().zip(coming.dit.layers.iter_mut()).zip(self.0);
        let exchanged = layers.map(|((out, back), parked)| {
            let left = leave(store, out.matrices_mut())?;
            come_back(back.matrices_mut(), parked)?;
            Ok(left)
        });
        let left = exchanged.collect::<Result<_>>()?;
        store.next_group()?;
        Ok(Self(left))
    }
}

/// The host memory in which networks are parked in turn, one store for each stage.
#[derive(Debug)]
pub struct WeightParking {
    stores: Vec<HostStore>,
}

impl WeightParking {
    /// For networks on the devices of `pipeline`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(pipeline: &Pipeline) -> Result<Self> {
        let stores = pipeline.stages().iter().map(|stage| Ok(HostStore::unreserved(&stage.device)?));
        Ok(Self { stores: stores.collect::<Result<_>>()? })
    }

    /// Bytes of host memory that are pinned for each stage, in use or not; none on the CPU.
    pub fn bytes(&self) -> Vec<u64> {
        self.stores.iter().map(HostStore::bytes).collect()
    }

    /// Takes the matrices of `pipeline` off its devices. Until [`WeightParking::wake`] it cannot be used.
    ///
    /// # Errors
    /// When host memory runs out.
    pub fn rest(&self, pipeline: &mut Pipeline) -> Result<ParkedWeights> {
        let stages = self.on_stages(pipeline, vec![(); self.stores.len()], |store, stage, ()| {
            ParkedStage::rest(store, stage)
        })?;
        Ok(ParkedWeights { stages })
    }

    /// Puts the matrices of `pipeline` back.
    ///
    /// # Errors
    /// When the device's memory runs out.
    pub fn wake(&self, pipeline: &mut Pipeline, resting: ParkedWeights) -> Result<()> {
        self.on_stages(pipeline, resting.stages, |_, stage, parked| parked.wake(stage))?;
        Ok(())
    }

    /// [`Self::rest`] for `leaving` and [`Self::wake`] for `coming`, layer by layer: neither the devices nor the host hold
    /// much more than one of them at any time.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn exchange(
        &self,
        leaving: &mut Pipeline,
        coming: &mut Pipeline,
        resting: ParkedWeights,
    ) -> Result<ParkedWeights> {
        let others = coming.stages_mut().iter_mut().zip(resting.stages).collect::<Vec<_>>();
        let stages = self.on_stages(leaving, others, |store, stage, (other, parked)| {
            parked.exchange(store, stage, other)
        })?;
        Ok(ParkedWeights { stages })
    }

    /// Does `work` on every stage of `pipeline` at once, each with what is its own of `own`.
    fn on_stages<T: Send, U: Send>(
        &self,
        pipeline: &mut Pipeline,
        own: Vec<T>,
        work: impl Fn(&HostStore, &mut Stage, T) -> Result<U> + Sync,
    ) -> Result<Vec<U>> {
        let (work, stages) = (&work, pipeline.stages_mut().iter_mut());
        thread::scope(|scope| {
            let spawn = |((stage, store), own)| scope.spawn(move || work(store, stage, own));
            let threads: Vec<_> = stages.zip(&self.stores).zip(own).map(spawn).collect();
            let join = |t: ScopedJoinHandle<_>| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p));
            threads.into_iter().map(join).collect()
        })
    }
}

/// Takes the tensors out; a single zero holds the place of each, which no product takes for a matrix.
fn leave(store: &HostStore, tensors: Vec<&mut Tensor>) -> Result<Vec<Parked>> {
    store.next_group()?;
    let park = |tensor: &mut Tensor| {
        let nothing = Tensor::zeros(1, tensor.dtype(), tensor.device())?;
        Ok(store.park(std::mem::replace(tensor, nothing))?)
    };
    tensors.into_iter().map(park).collect()
}

fn come_back(tensors: Vec<&mut Tensor>, parked: Vec<Parked>) -> Result<()> {
    for (tensor, parked) in tensors.into_iter().zip(parked) {
        *tensor = parked.take()?;
    }
    Ok(())
}

//! Networks on their way between files, devices and host memory.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use models::adapter::{Adapters, ApplyMode, Source};
use models::dit::DitConfig;
use models::weights::Weights;

use super::clip_adapter::ClipAdapter;
use super::{ClipAdapters, Residents, WhenIdle, warm_up};
use crate::adapters;
use crate::adapters::start_on::opened;
use crate::base::{DitFiles, WritingBehind};
use crate::error::Result;
use crate::learning::NoiseRange;
use crate::machine::forecast::Networks;
use crate::pipeline::{ParkedWeights, Pipeline, WeightParking};

/// A network, wherever it is.
#[derive(Debug)]
pub(super) struct Network {
    pub range: NoiseRange,
    pub files: DitFiles,
    pub state: NetworkState,
    /// Adapters that are applied when it is read.
    pub adapters: Vec<Source>,
    /// Adapters that are applied for clips alone.
    pub for_clips: Vec<(PathBuf, f64)>,
    pub when_idle: WhenIdle,
}

#[derive(Debug, Default)]
pub(super) enum NetworkState {
    #[default]
    Files,
    OnDevices(Pipeline),
    /// Without its matrices.
    Parked(Pipeline, ParkedWeights),
}

impl Network {
    fn is_on_devices(&self) -> bool {
        matches!(self.state, NetworkState::OnDevices(_))
    }

    fn is_parked(&self) -> bool {
        matches!(self.state, NetworkState::Parked(..))
    }
}

/// No network of the model is for these noise levels.
fn no_network(range: NoiseRange) -> kernels::Error {
    kernels::Error::msg(format!("no network was added for {range:?}"))
}

impl Residents {
    /// The network of `range` on the devices; what does not fit beside it leaves them.
    ///
    /// # Errors
    /// Files that cannot be read, and memory that runs out.
    pub fn network(&mut self, range: NoiseRange) -> Result<&mut Pipeline> {
        let index = self.index_of(range)?;
        if !self.networks[index].is_on_devices() {
            self.make_room_for_network(Some(index))?;
            self.bring(index)?;
        }
        self.rest_encoders()?;
        match &mut self.networks[index].state {
            NetworkState::OnDevices(pipeline) => Ok(pipeline),
            NetworkState::Files | NetworkState::Parked(..) => Err(no_network(range).into()),
        }
    }

    /// The network of `range` where it is loaded; without its matrices if it is parked.
    pub fn loaded(&self, range: NoiseRange) -> Option<&Pipeline> {
        match &self.networks[self.index_of(range).ok()?].state {
            NetworkState::OnDevices(pipeline) | NetworkState::Parked(pipeline, _) => Some(pipeline),
            NetworkState::Files => None,
        }
    }

    /// Whether the network of `range` is on the devices.
    pub fn is_on_devices(&self, range: NoiseRange) -> bool {
        self.index_of(range).is_ok_and(|index| self.networks[index].is_on_devices())
    }

    /// Does `work` with the network of `range` on each group of devices that clips go through, with the adapters that are for
    /// clips alone, or without them.
    ///
    /// # Errors
    /// Those of `work` and of [`Self::network`], and adapters that cannot be applied.
    pub fn for_clips<T>(
        &mut self,
        range: NoiseRange,
        adapters: ClipAdapters,
        work: impl FnOnce(&[Pipeline]) -> Result<T>,
    ) -> Result<T> {
        let (network, base) = (&self.networks[self.index_of(range)?], self.model.precision.dit());
        // Opened each time: between clips it takes no memory.
        let adapter = match adapters {
            ClipAdapters::Applied => {
                let fused = (self.setup.fused.as_slice(), network.range.expert());
                ClipAdapter::open(&network.for_clips, (&network.files, fused), base, &self.ui)?
            }
            ClipAdapters::LeftOut => None,
        };
        let sharing = self.setup.sharing.map_or(1, NonZeroUsize::get);
        let (parts, ui) = (self.residency.clip_groups.get() * sharing, self.ui.clone());
        let pipeline = self.network(range)?;
        adapter.as_ref().map(|adapter| adapter.apply(pipeline)).transpose()?;
        let done = match parts {
            1 => work(std::slice::from_ref(pipeline))?,
            _ => {
                let parts = ui.phase("copying the DiT to each card", || pipeline.grouped(parts))?;
                work(&Pipeline::in_rows(parts, sharing)?)?
            }
        };
        adapter.map(|adapter| adapter.remove(pipeline)).transpose()?;
        Ok(done)
    }

    /// Has `adapters`, each a file or PEFT folder with its strength, applied to the network of `range` for the next clips in
    /// place of those that it had for clips.
    ///
    /// # Errors
    /// If no such network was added.
    pub fn set_clip_adapters(&mut self, range: NoiseRange, adapters: Vec<(PathBuf, f64)>) -> Result<()> {
        let index = self.index_of(range)?;
        self.networks[index].for_clips = adapters;
        Ok(())
    }

    /// Takes all networks off the devices.
    ///
    /// # Errors
    /// When the host's memory runs out.
    pub(super) fn clear_networks(&mut self) -> Result<()> {
        (0..self.networks.len()).try_for_each(|index| self.leave(index))
    }

    /// Makes room for a network, which may be one of these: `coming` is brought as the other leaves if both are parked in
    /// turn, so that neither the devices nor the host hold much more than one.
    pub(super) fn make_room_for_network(&mut self, coming: Option<usize>) -> Result<()> {
        self.rest_encoders()?;
        if matches!(self.residency.networks, Networks::One | Networks::SideBySide) {
            return Ok(());
        }
        let others = (0..self.networks.len()).filter(|index| Some(*index) != coming);
        let leaving = others.filter(|index| self.networks[*index].is_on_devices()).collect::<Vec<_>>();
        for index in leaving {
            match coming {
                Some(coming)
                    if self.networks[coming].is_parked()
                        && self.networks[index].when_idle == WhenIdle::Park =>
                {
                    self.exchange(index, coming)?;
                }
                _ => self.leave(index)?,
            }
        }
        Ok(())
    }

    /// Brings a network onto the devices that is not on them.
    fn bring(&mut self, index: usize) -> Result<()> {
        let pipeline = match std::mem::take(&mut self.networks[index].state) {
            NetworkState::OnDevices(pipeline) => pipeline,
            NetworkState::Parked(mut pipeline, parked) => {
                if let Some(parking) = &self.parking {
                    parking.wake(&mut pipeline, parked)?;
                }
                pipeline
            }
            NetworkState::Files => {
                let Network { range, files, adapters, .. } = &self.networks[index];
                let (config, weights) = opened(files, (&self.setup.fused, range.expert()), &self.ui)?;
                let (adapters, weights) =
                    adapters::put(adapters, &config, weights, ApplyMode::Unmerged, &self.ui)?;
                self.read(&config, weights, &adapters)?
            }
        };
        self.networks[index].state = NetworkState::OnDevices(pipeline);
        if !self.networks.iter().any(Network::is_parked) {
            self.parking = None;
        }
        Ok(())
    }

    /// Takes a network off the devices, if it is on them.
    fn leave(&mut self, index: usize) -> Result<()> {
        let network = &mut self.networks[index];
        network.state = match (std::mem::take(&mut network.state), network.when_idle) {
            (NetworkState::OnDevices(mut pipeline), WhenIdle::Park) => {
                let parking = match self.parking.take() {
                    Some(parking) => parking,
                    None => WeightParking::new(&pipeline)?,
                };
                let parked = parking.rest(&mut pipeline)?;
                self.parking = Some(parking);
                NetworkState::Parked(pipeline, parked)
            }
            (NetworkState::OnDevices(_), WhenIdle::Drop) => NetworkState::Files,
            (state, _) => state,
        };
        Ok(())
    }

    /// Parks the network `leaving` while the network `coming` comes back, layer by layer.
    fn exchange(&mut self, leaving: usize, coming: usize) -> Result<()> {
        let out = std::mem::take(&mut self.networks[leaving].state);
        let back = std::mem::take(&mut self.networks[coming].state);
        (self.networks[leaving].state, self.networks[coming].state) = match (out, back, &self.parking) {
            (NetworkState::OnDevices(mut out), NetworkState::Parked(mut back, parked), Some(parking)) => {
                let parked = parking.exchange(&mut out, &mut back, parked)?;
                (NetworkState::Parked(out, parked), NetworkState::OnDevices(back))
            }
            (out, back, _) => (out, back),
        };
        Ok(())
    }

    /// Reads `weights` onto the devices.
    pub(super) fn read(
        &mut self,
        config: &DitConfig,
        weights: Weights,
        adapters: &Adapters,
    ) -> Result<Pipeline> {
        let base = self.model.precision.dit();
        let (weights, cache) = self.model.with_quantised_cache(config, weights, &self.ui)?;
        let load = || -> Result<(Pipeline, WritingBehind)> {
            let pipeline = Pipeline::load(&weights, config, &self.split, adapters, base)?;
            Ok((pipeline, cache.finish(&self.ui)))
        };
        let (split, attentions) = (&self.split, &self.setup.attentions);
        let load = || warm_up::beside(split, attentions, base.frozen.compute, load);
        let (mut pipeline, writing) = self.ui.phase("loading the DiT", load)?;
        self.writing.retain(|before| !before.is_done());
        self.writing.push(writing);
        pipeline.set_route(self.setup.route)?;
        pipeline.set_stores(&self.setup.stores);
        if let Some(tokens) = self.setup.ffn_tokens {
            pipeline.set_ffn_tokens(tokens);
        }
        Ok(pipeline)
    }

    fn index_of(&self, range: NoiseRange) -> Result<usize> {
        let is_it = |network: &Network| range == NoiseRange::All || network.range.expert() == range.expert();
        Ok(self.networks.iter().position(is_it).ok_or_else(|| no_network(range))?)
    }
}

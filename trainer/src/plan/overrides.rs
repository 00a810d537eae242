//! What a command line says in place of a recipe.

use std::collections::BTreeMap;
use std::path::PathBuf;

use data::DataConfig;
use models::published::Published;

use crate::base::hub::SCHEME;
use crate::bytes::Bytes;
use crate::error::Result;
use crate::machine::devices::{DevicesConfig, Limits};
use crate::machine::forecast::Task;
use crate::machine::memory::{Cards, Machine};
use crate::machine::replica_devices::ReplicasConfig;
use crate::recipe::{Assignment, Recipe};
use crate::watch::interrupt::Interrupt;

/// What a command line says in place of a recipe's settings; `None` leaves the recipe's.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// Any key, of `--set`; the others win over it.
    pub settings: Vec<Assignment>,
    /// `devices.memory_limit`.
    pub memory_limit: Option<Bytes>,
    /// `model.folder`, where the recipe names a model of the hub.
    pub model_folder: Option<PathBuf>,
    /// Where the datasets of the hub are that `data.folder` and sets name, by their names.
    pub data_folders: BTreeMap<String, PathBuf>,
    /// Asked while clips are read, which may take long.
    pub interrupt: Interrupt,
    /// `[devices]` of this replica, where it is one of several.
    pub devices: Option<DevicesConfig>,
    /// How many replicas there are on all hosts, where a launcher says so.
    pub world: Option<usize>,
    /// The link between replicas, in bytes a second each way, for which the time of a step is estimated.
    pub link: Option<f64>,
    /// Cards that are planned for in place of those that are here.
    pub cards: Option<Cards>,
    /// The published model that is planned for in place of files.
    pub assume: Option<&'static Published>,
}

impl Overrides {
    pub(super) fn apply(&self, recipe: &mut Recipe) {
        if let Some(devices) = &self.devices {
            recipe.devices = devices.clone();
        }
        self.place_datasets(&mut recipe.data);
        recipe.devices.memory_limit = self.memory_limit.or(recipe.devices.memory_limit);
        if let Some(folder) = &self.model_folder {
            recipe.model.folder = Some(folder.clone());
        }
        if let Some(cards) = &self.cards {
            recipe.devices = cards.devices(&recipe.devices);
        }
    }

    /// Puts the folders of datasets of the hub in the place of their names.
    fn place_datasets(&self, data: &mut DataConfig) {
        let DataConfig { folder, sets, folder_names, .. } = data;
        for set in sets.iter_mut() {
            let text = set.folder.first().and_then(|folder| folder.to_str());
            if let (None, Some(text)) = (&set.name, text.filter(|text| self.data_folders.contains_key(*text)))
            {
                set.name = text.rsplit('/').find(|part| !part.contains(['*', '?'])).map(str::to_owned);
            }
        }
        for folder in folder.iter_mut().chain(sets.iter_mut().flat_map(|set| &mut set.folder)) {
            let Some((text, place)) = folder.to_str().and_then(|text| self.data_folders.get_key_value(text))
            else {
                continue;
            };
            folder_names.insert(place.clone(), text.trim_start_matches(SCHEME).to_owned());
            folder.clone_from(place);
        }
    }

    /// `asked` with every default resolved for a model of `layers` blocks, and with the number of all replicas.
    ///
    /// # Errors
    /// As [`DevicesConfig::settle`].
    pub(super) fn devices(&self, asked: &DevicesConfig, layers: usize) -> Result<DevicesConfig> {
        let devices = asked.settle(layers)?;
        let replicas = ReplicasConfig::Count(self.world.unwrap_or(devices.replicas.named()));
        Ok(DevicesConfig { replicas, ..devices })
    }

    /// The machine that is planned for, where offload may pin `host` bytes, with what tensors get of each of its GPUs.
    pub(super) fn machine(
        &self,
        devices: &DevicesConfig,
        task: &Task,
        host: Option<Bytes>,
    ) -> (Limits, Machine) {
        let host = host.map(|host| host.0);
        match &self.cards {
            Some(cards) => (Limits::default(), cards.machine(devices, task.base, task.config(), host)),
            None => {
                let limits = Limits::measure(devices);
                let machine = Machine::here(devices, &limits, task.base, task.config(), host);
                (limits, machine)
            }
        }
    }
}

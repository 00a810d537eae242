//! Arguments for the devices of a command, shared by the commands.

use clap::Args;
use kernels::Device;

use crate::bytes::Bytes;
use crate::machine::devices::{self, DevicesConfig, Transfer};
use crate::plan::Overrides;
use crate::recipe::Assignment;

/// Overrides of a recipe.
#[derive(Debug, Args)]
pub struct RecipeDevices {
    /// The most memory that tensors may take on each GPU, such as 23GiB; overrides the recipe.
    #[arg(long, value_name = "SIZE")]
    memory_limit: Option<Bytes>,
    /// Override a setting of the recipe, such as train.steps=20 or model.base=fp8. May be given more than once; paths are
    /// relative to the recipe's folder.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<Assignment>,
}

impl RecipeDevices {
    /// The overridden settings of the recipe.
    pub fn overrides(&self) -> Overrides {
        let settings = self.settings.clone();
        Overrides { settings, memory_limit: self.memory_limit, ..Overrides::default() }
    }
}

/// The stages of a command without a recipe.
#[derive(Debug, Args)]
pub struct StageDevices {
    /// One device for each stage, such as cuda:0,cuda:1 or cpu. Default: the first GPU of a CUDA build, else the CPU.
    #[arg(long, visible_alias = "devices", value_delimiter = ',')]
    stages: Vec<String>,
    /// Blocks of each stage, such as 18,22. Default: for a training step the split that the plan finds best, otherwise an even one.
    #[arg(long, value_delimiter = ',')]
    split: Vec<usize>,
    /// How tensors are copied between GPUs.
    #[arg(long, value_enum, default_value_t = Transfer::Auto)]
    transfer: Transfer,
    #[command(flatten)]
    setup: Setup,
}

/// The one device of a command.
#[derive(Debug, Args)]
pub struct OneDevice {
    /// cpu, cuda:0, ... Default: the first GPU of a CUDA build, else the CPU.
    #[arg(long)]
    device: Option<String>,
    #[command(flatten)]
    setup: Setup,
}

#[derive(Debug, Args)]
struct Setup {
    /// The most memory that tensors may take on each GPU, such as 23GiB. Default: all free memory.
    #[arg(long, value_name = "SIZE")]
    memory_limit: Option<Bytes>,
    /// Deterministic kernels: the same bits in every run on the same GPUs; slower.
    #[arg(long)]
    deterministic: bool,
}

impl StageDevices {
    /// As the recipe's section.
    pub fn config(&self) -> DevicesConfig {
        DevicesConfig {
            stages: self.stages.clone(),
            split: self.split.clone(),
            memory_limit: self.setup.memory_limit,
            transfer: self.transfer,
            deterministic: self.setup.deterministic,
            ..DevicesConfig::default()
        }
    }
}

impl StageDevices {
    /// `config` of a run or a recipe, overridden by these arguments.
    pub fn over(&self, config: &DevicesConfig) -> DevicesConfig {
        let own = self.config();
        let split = match (own.stages.is_empty(), own.split.is_empty()) {
            (true, true) => config.split.clone(),
            _ => own.split,
        };
        DevicesConfig {
            stages: if own.stages.is_empty() { config.stages.clone() } else { own.stages },
            split,
            memory_limit: own.memory_limit.or(config.memory_limit),
            transfer: if own.transfer == Transfer::Auto { config.transfer } else { own.transfer },
            deterministic: own.deterministic || config.deterministic,
            ..DevicesConfig::default()
        }
    }
}

impl OneDevice {
    /// Opens it.
    ///
    /// # Errors
    /// If there is no such device, or it cannot be used.
    pub fn open(&self) -> crate::Result<Device> {
        self.open_another(self.device.as_deref().unwrap_or(devices::default_device()))
    }

    /// Opens the device `name` in the same way.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_another(&self, name: &str) -> crate::Result<Device> {
        let Setup { memory_limit, deterministic } = self.setup;
        let config = DevicesConfig { memory_limit, deterministic, ..DevicesConfig::default() };
        devices::open(name, &config.settings())
    }
}

//! The devices of the stages, the blocks of each, and how GPUs are set up.

use std::collections::BTreeMap;
use std::ops::Range;

use clap::ValueEnum;
use kernels::Device;
use kernels::device::{Repeatability, Settings};
use kernels::inventory::{self, Gpu, Library};
use kernels::transfer::Route;
use serde::{Deserialize, Deserializer, Serialize};

use crate::bytes::Bytes;
use crate::error::{Error, Result};
use crate::machine::precision::Processor;
use crate::machine::replica_devices::{ReplicasConfig, visible_gpus};
use crate::watch::ui::Ui;

/// The stages of the pipeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DevicesConfig {
    /// One device for each stage, first to last: `cpu` or `cuda:N`; a device may be named twice.
    /// Default: the first GPU of a CUDA build, else the CPU.
    pub stages: Vec<String>,
    /// Blocks of each stage; `auto`, or left out, for the split that the plan finds best by memory and speed.
    #[serde(deserialize_with = "split")]
    pub split: Vec<usize>,
    /// The most memory that the tensors of one GPU may take, such as `"23GiB"`; beyond it the run stops. Simulates a smaller card
    /// on a larger one. Default: what is free when the plan is made, less 400 MiB.
    pub memory_limit: Option<Bytes>,
    /// Replicas on this host, each in a process of its own: a number, `auto` for as many as there are GPUs for, or the stages of
    /// each. The first has the GPUs of `stages`, the next those behind them. Under a launcher that starts a process for each
    /// (torchrun, srun, mpirun), the launcher's number counts. Default 1, at most 1024.
    pub replicas: ReplicasConfig,
    /// What carries gradients from replica to replica. Default `auto`.
    pub exchange: ExchangeConfig,
    /// How long a replica waits for another one that works on the same step, in seconds, at least 1: then all stop. Default 600.
    pub exchange_timeout: u64,
    /// How tensors are copied from one GPU to the next. Default `auto`.
    pub transfer: Transfer,
    /// Whether two runs on the same GPUs give the same bits; slower. Default false. On the CPU they always do.
    pub deterministic: bool,
}

impl Default for DevicesConfig {
    fn default() -> Self {
        Self {
            stages: Vec::new(),
            split: Vec::new(),
            memory_limit: None,
            replicas: ReplicasConfig::default(),
            exchange: ExchangeConfig::default(),
            exchange_timeout: 600,
            transfer: Transfer::default(),
            deterministic: false,
        }
    }
}

/// What carries gradients from replica to replica.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ExchangeConfig {
    /// NCCL between GPUs, TCP between CPUs.
    #[default]
    Auto,
    /// NCCL.
    Nccl,
    /// TCP, through host memory and rank 0.
    Tcp,
}

/// Blocks of each stage, or the word `auto` for none given.
fn split<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<usize>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "blocks of each stage, such as [18, 22], or \"auto\"")]
    enum Split {
        Given(Vec<usize>),
        Word(String),
    }
    match Split::deserialize(deserializer)? {
        Split::Given(blocks) => Ok(blocks),
        Split::Word(word) if word == "auto" => Ok(Vec::new()),
        Split::Word(word) => Err(serde::de::Error::custom(format!(
            "\"{word}\" is not a split; write \"auto\" or blocks, such as [18, 22]"
        ))),
    }
}

/// How tensors are copied between two GPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Transfer {
    /// Directly if the hardware can (peer access), else through host memory.
    #[default]
    Auto,
    /// Always through host memory.
    Host,
}

impl From<Transfer> for Route {
    fn from(transfer: Transfer) -> Self {
        match transfer {
            Transfer::Auto => Self::Auto,
            Transfer::Host => Self::Host,
        }
    }
}

/// Bytes of a GPU's free memory that are reserved: for kernels that are loaded at first use, and for cuBLAS and cuDNN
/// themselves.
const RESERVE: u64 = 400 << 20;

/// The memory of one GPU that tensors may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// The most bytes that they may take.
    pub bytes: u64,
    /// Bytes in use by other programs when it was measured.
    pub taken: u64,
}

/// The memory of each GPU of a config that tensors may use: measured once, for the plan and the allocator.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits(BTreeMap<String, Limit>);

impl Limits {
    /// Of the GPUs of `devices` in this machine: the free memory less a reserve, or `devices.memory_limit` if that is less.
    pub fn measure(devices: &DevicesConfig) -> Self {
        let given = devices.memory_limit.map(|limit| limit.0);
        let of = |name: &String| Some((name.clone(), measured(name, given)?));
        Self(devices.stages.iter().filter_map(of).collect())
    }

    /// Of the device `name`; `None` for the CPU and for GPUs that are not in this machine.
    pub fn of(&self, name: &str) -> Option<Limit> {
        self.0.get(name).copied()
    }
}

/// The memory of the GPU `name` that tensors may use, `given` at most; `None` if the GPU does not answer.
fn measured(name: &str, given: Option<u64>) -> Option<Limit> {
    let DeviceName::Cuda(index) = DeviceName::parse(name).ok()? else { return None };
    let gpu = inventory::gpus().ok()?.into_iter().nth(index)?;
    let free = inventory::free_memory(index).ok()?;
    let bytes = free.saturating_sub(RESERVE);
    // The memory of this process's own context cannot be told from that of other programs; it is at most this.
    let taken = gpu.memory.saturating_sub(free + CONTEXT);
    Some(Limit { bytes: given.map_or(bytes, |given| given.min(bytes)), taken })
}

/// About the memory of a driver context on a GPU.
const CONTEXT: u64 = 600 << 20;

impl DevicesConfig {
    /// The config with every default resolved, for a model of `layers` blocks.
    ///
    /// # Errors
    /// If a stage is not a device, the split does not cover the blocks, or the memory limit is 0.
    pub fn settle(&self, layers: usize) -> Result<Self> {
        let stages =
            if self.stages.is_empty() { vec![default_device().to_owned()] } else { self.stages.clone() };
        stages.iter().try_for_each(|name| DeviceName::parse(name).map(drop))?;
        let count = stages.len();
        let split = match self.split.is_empty() {
            // The first stage has the embeddings and the last the head, so the middle ones get the remainder.
            true => (0..count).map(|i| (i + 1) * layers / count - i * layers / count).collect(),
            false => self.split.clone(),
        };
        if split.len() != count
            || split.iter().any(|blocks| !(1..=layers).contains(blocks))
            || split.iter().sum::<usize>() != layers
        {
            return Err(Error::Setting {
                key: "devices.split".into(),
                why: format!("{split:?} does not give {layers} blocks to {count} stages, at least one each"),
            });
        }
        if self.memory_limit == Some(Bytes(0)) {
            return Err(Error::Setting {
                key: "devices.memory_limit".into(),
                why: "must be more than 0; leave it out to use all free memory".into(),
            });
        }
        if self.exchange_timeout == 0 {
            let why = "must be at least 1 second".into();
            return Err(Error::Setting { key: "devices.exchange_timeout".into(), why });
        }
        let replicas = ReplicasConfig::Count(self.replicas.settled(|| self.replicas_here(visible_gpus()))?);
        Ok(Self { stages, split, replicas, ..self.clone() })
    }

    /// [`Self::open_within`] the current limits.
    ///
    /// # Errors
    /// A GPU that cannot be used.
    pub fn open(&self) -> Result<Vec<(Device, Range<usize>)>> {
        self.open_within(&Limits::measure(self))
    }

    /// The devices of a resolved config with their blocks, with tensors limited to `limits`. A device that is named twice is
    /// opened once.
    ///
    /// # Errors
    /// A GPU that cannot be used.
    pub fn open_within(&self, limits: &Limits) -> Result<Vec<(Device, Range<usize>)>> {
        let mut opened: Vec<(&str, Device)> = Vec::new();
        let mut stages = Vec::new();
        let mut next = 0;
        for (name, blocks) in self.stages.iter().zip(&self.split) {
            let device = match opened.iter().find(|(other, _)| other == name) {
                Some((_, device)) => device.clone(),
                None => {
                    let limit = limits.of(name).map(|limit| limit.bytes);
                    let settings = self.settings();
                    open(name, &Settings { memory_limit: limit.or(settings.memory_limit), ..settings })?
                }
            };
            opened.push((name, device.clone()));
            stages.push((device, next..next + blocks));
            next += blocks;
        }
        Ok(stages)
    }

    /// Checks that the stages of a config, resolved or not, can be used here, without opening them.
    ///
    /// # Errors
    /// Another name, a GPU in a build without CUDA, or a GPU that cannot be used.
    pub fn check(&self) -> Result<()> {
        self.stages.iter().try_for_each(|name| match DeviceName::parse(name)? {
            DeviceName::Cpu => Ok(()),
            DeviceName::Cuda(_) if !cfg!(feature = "cuda") => Err(Error::NoCuda { name: name.clone() }),
            DeviceName::Cuda(index) => check_gpu(index),
        })
    }

    /// Whether the stages of a config, resolved or not, are GPUs.
    pub fn processor(&self) -> Processor {
        let is_cpu = |name: &str| name == "cpu";
        let any = match self.stages.is_empty() {
            true => is_cpu(default_device()),
            false => self.stages.iter().any(|name| is_cpu(name)),
        };
        if any { Processor::Cpu } else { Processor::Gpu }
    }

    /// Whether replicas exchange gradients over NCCL.
    pub fn wants_nccl(&self) -> bool {
        match self.exchange {
            ExchangeConfig::Auto => self.processor() == Processor::Gpu,
            ExchangeConfig::Nccl => true,
            ExchangeConfig::Tcp => false,
        }
    }

    /// How the GPUs of this config are set up.
    pub fn settings(&self) -> Settings {
        Settings {
            memory_limit: self.memory_limit.map(|limit| limit.0),
            repeatability: match self.deterministic {
                true => Repeatability::BitForBit,
                false => Repeatability::Fast,
            },
        }
    }
}

/// The default device: the first GPU in a CUDA build, else the CPU.
pub fn default_device() -> &'static str {
    if cfg!(feature = "cuda") { "cuda:0" } else { "cpu" }
}

/// Opens `cpu` or `cuda:N`; without a memory limit in `settings` tensors may use the free memory less a reserve.
///
/// # Errors
/// Another name, a GPU in a build without CUDA, or a GPU that cannot be used.
pub fn open(name: &str, settings: &Settings) -> Result<Device> {
    match DeviceName::parse(name)? {
        DeviceName::Cpu => Ok(Device::Cpu),
        DeviceName::Cuda(_) if !cfg!(feature = "cuda") => Err(Error::NoCuda { name: name.to_owned() }),
        DeviceName::Cuda(index) => {
            check_gpu(index)?;
            let free = || measured(name, None).map(|limit| limit.bytes);
            let settings = Settings { memory_limit: settings.memory_limit.or_else(free), ..*settings };
            Ok(kernels::device::open_gpu(index, &settings)?)
        }
    }
}

/// Reports the attentions that ran in chunks on `devices` because cuDNN refused their shape, once for each shape.
pub fn tell_refusals<'a>(devices: impl Iterator<Item = &'a Device>, ui: &Ui) {
    devices.flat_map(kernels::attention::refusals).for_each(|line| ui.note(&line));
}

/// Checks the driver and the GPU before they are used: their own errors come late and say little.
fn check_gpu(index: usize) -> Result<()> {
    let driver = inventory::driver().map_err(|cause| Error::NoGpu { cause })?;
    if let Some((major, minor)) = inventory::built_for().filter(|built| *built > driver.cuda) {
        let (can_major, can_minor) = driver.cuda;
        let cause =
            format!("built with CUDA {major}.{minor}, the driver runs {can_major}.{can_minor} at most");
        return Err(Error::OldDriver { cause });
    }
    let missing = |library: Library| match library.version {
        Err(cause) if library.is_needed => Err(Error::NoLibrary { name: library.name, cause }),
        _ => Ok(()),
    };
    inventory::libraries().into_iter().try_for_each(missing)?;
    let gpus = inventory::gpus().map_err(|cause| Error::NoGpu { cause })?;
    match gpus.get(index) {
        Some(gpu) if gpu.is_new_enough() => Ok(()),
        Some(Gpu { name, capability: (major, minor), .. }) => Err(Error::NoGpu {
            cause: format!("cuda:{index}, {name}, has compute capability {major}.{minor}; 8.0 is needed"),
        }),
        None => Err(Error::NoGpu { cause: format!("cuda:{index} of {} GPUs", gpus.len()) }),
    }
}

enum DeviceName {
    Cpu,
    Cuda(usize),
}

impl DeviceName {
    fn parse(name: &str) -> Result<Self> {
        let index = name.strip_prefix("cuda:").and_then(|index| index.parse().ok());
        match (name, index) {
            ("cpu", _) => Ok(Self::Cpu),
            (_, Some(index)) => Ok(Self::Cuda(index)),
            _ => Err(Error::Setting {
                key: "devices.stages".into(),
                why: format!("\"{name}\" is not a device; write \"cpu\", \"cuda:0\", \"cuda:1\", ..."),
            }),
        }
    }
}

//! Which devices the stages run on, and which blocks each of them holds.

use std::ops::Range;

use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The stages of the pipeline.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DevicesConfig {
    /// One device for each stage, first to last: `cpu` or `cuda:N`; a device may be named twice.
    /// Default: the first GPU of a CUDA build, else the CPU.
    pub stages: Vec<String>,
    /// Blocks of each stage. Default: shares as even as can be.
    pub split: Vec<usize>,
}

impl DevicesConfig {
    /// The config with every default settled for a model of `layers` blocks.
    ///
    /// # Errors
    /// Stages that are no devices, and a split that does not cover the blocks.
    pub fn settle(&self, layers: usize) -> Result<Self> {
        let default = if cfg!(feature = "cuda") { "cuda:0" } else { "cpu" };
        let stages = if self.stages.is_empty() { vec![default.to_owned()] } else { self.stages.clone() };
        stages.iter().try_for_each(|name| DeviceName::parse(name).map(drop))?;
        let count = stages.len();
        let split = match self.split.is_empty() {
            // The first stage embeds and the last has the head, so the middle ones take what is left over.
            true => (0..count).map(|i| (i + 1) * layers / count - i * layers / count).collect(),
            false => self.split.clone(),
        };
        if split.len() != count || split.iter().sum::<usize>() != layers || split.contains(&0) {
            return Err(Error::Setting {
                key: "devices.split".into(),
                why: format!("{split:?} does not give {layers} blocks to {count} stages, at least one each"),
            });
        }
        Ok(Self { stages, split })
    }

    /// The devices of a settled config with their blocks. A device that is named twice is opened once.
    pub fn open(&self) -> Result<Vec<(Device, Range<usize>)>> {
        let mut opened: Vec<(&str, Device)> = Vec::new();
        let mut stages = Vec::new();
        let mut next = 0;
        for (name, blocks) in self.stages.iter().zip(&self.split) {
            let device = match opened.iter().find(|(other, _)| other == name) {
                Some((_, device)) => device.clone(),
                None => open(name)?,
            };
            opened.push((name, device.clone()));
            stages.push((device, next..next + blocks));
            next += blocks;
        }
        Ok(stages)
    }
}

/// Opens `cpu` or `cuda:N`.
///
/// # Errors
/// Another name, a GPU in a build without CUDA, or a GPU that does not answer.
pub fn open(name: &str) -> Result<Device> {
    match DeviceName::parse(name)? {
        DeviceName::Cpu => Ok(Device::Cpu),
        DeviceName::Cuda(_) if !cfg!(feature = "cuda") => Err(Error::NoCuda { name: name.to_owned() }),
        // A stream of its own: the default one belongs to a thread, and stages change theirs with every step.
        DeviceName::Cuda(index) => Ok(Device::new_cuda_with_stream(index)?),
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
                why: format!("\"{name}\" is no device; write \"cpu\", \"cuda:0\", \"cuda:1\", ..."),
            }),
        }
    }
}

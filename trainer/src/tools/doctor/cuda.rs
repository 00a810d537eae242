//! GPUs, their driver, CUDA's libraries, and the resulting attention engine.

use kernels::device::{Allocator, Settings};
use kernels::inventory::{self, Driver, Gpu, Library, built_for};
use kernels::{DType, Device};

use super::{Finding, Standing, good};
use crate::bytes::Bytes;
use crate::machine::devices;

/// Everything about CUDA: one line without it.
pub(super) fn examine() -> Vec<Finding> {
    let (built, driver) = (built_for(), inventory::driver());
    let mut findings = Vec::new();
    if built.is_none() {
        let way_out = match driver {
            Ok(_) => "an NVIDIA driver is here: build Tandem with `cargo build --release --features cuda`",
            Err(_) => "build it with `cargo build --release --features cuda` on a machine with CUDA",
        };
        findings.push(Finding {
            what: "CUDA",
            standing: Standing::Missing,
            found: "this build is without CUDA, so everything runs on the CPU".into(),
            way_out: Some(way_out.into()),
        });
    }
    if built.is_some() || driver.is_ok() {
        findings.push(told_driver(&driver, built));
        findings.extend(gpus());
        findings.extend(inventory::libraries().into_iter().map(library));
    }
    findings.extend(engines());
    findings
}

fn bad(what: &'static str, found: String, way_out: &str) -> Finding {
    Finding { what, standing: Standing::Bad, found, way_out: Some(way_out.to_owned()) }
}

fn told_driver(driver: &Result<Driver, String>, built: Option<(u32, u32)>) -> Finding {
    let driver = match driver {
        Ok(driver) => driver,
        Err(why) => {
            let way_out = "install NVIDIA's driver until `nvidia-smi` lists the GPU; in a container, start it with \
                           access to the GPUs (`--gpus all`)";
            return bad("driver", format!("none that answers: {why}"), way_out);
        }
    };
    let version = driver.version.as_deref().unwrap_or("of unknown version");
    let found = format!("{version}, runs CUDA up to {}.{}", driver.cuda.0, driver.cuda.1);
    match built {
        Some(built) if built > driver.cuda => bad(
            "driver",
            format!("{found}, but this program was built with CUDA {}.{}", built.0, built.1),
            "install driver 580 or newer, or build Tandem with a CUDA toolkit that the driver runs",
        ),
        _ => good("driver", found),
    }
}

fn gpus() -> Vec<Finding> {
    let gpus = match inventory::gpus() {
        Ok(gpus) => gpus,
        Err(why) => {
            let way_out = "look whether `nvidia-smi` lists it and CUDA_VISIBLE_DEVICES hides none; without it, set \
                           devices.stages = [\"cpu\"]";
            return vec![bad("GPU", format!("no GPU answers: {why}"), way_out)];
        }
    };
    gpus.iter().map(|gpu| told_gpu(gpu, gpus.len())).collect()
}

fn told_gpu(gpu: &Gpu, count: usize) -> Finding {
    let Gpu { index, name, capability: (major, minor), memory, peers, .. } = gpu;
    let reach = match (count, peers.as_slice()) {
        (1, _) => String::new(),
        (_, []) => "; reaches no other GPU directly, so tensors are copied through host memory".to_owned(),
        (_, peers) => {
            let named: Vec<String> = peers.iter().map(|peer| format!("cuda:{peer}")).collect();
            format!("; reaches {} directly", named.join(", "))
        }
    };
    let found = format!("cuda:{index} {name}, compute capability {major}.{minor}, {}{reach}", Bytes(*memory));
    match gpu.is_new_enough() {
        true => good("GPU", found),
        false => bad("GPU", found, "Tandem needs compute capability 8.0 or later: RTX 30, A100 and newer"),
    }
}

fn library(library: Library) -> Finding {
    let Library { name, is_needed, version, path } = library;
    match version {
        Ok(version) => {
            let place = path.map(|path| format!(", {}", path.display())).unwrap_or_default();
            good(name, format!("{version}{place}"))
        }
        Err(why) => Finding {
            what: name,
            standing: if is_needed && built_for().is_some() { Standing::Bad } else { Standing::Missing },
            found: format!("not found: {}", why.lines().next().unwrap_or_default()),
            way_out: Some(how_to_get(name).into()),
        },
    }
}

fn how_to_get(library: &str) -> &'static str {
    match library {
        "cuDNN" => {
            "attention is several times slower without it: pip install nvidia-cudnn-cu13 into the environment of this program or \
             the active one, or apt install libcudnn9-cuda-13"
        }
        "NVRTC" => {
            "cuDNN compiles its kernels with it: pip install nvidia-cuda-nvrtc into the environment of this program or the active one"
        }
        "NCCL" => {
            "only several replicas on GPUs need it: pip install nvidia-nccl-cu13 into the environment of this program or the \
             active one"
        }
        _ => {
            "pip install nvidia-cublas nvidia-curand nvidia-cuda-runtime into the environment of this program or the active one, \
             or apt install cuda-libraries-13-0"
        }
    }
}

/// The published models' heads: numbers of each.
const HEAD_SIZE: usize = 128;

/// The engines of the device that runs where none is named: attention in bf16, which GPUs compute in, and the allocator.
fn engines() -> Vec<Finding> {
    let name = devices::default_device();
    let device = devices::open(name, &Settings::default()).unwrap_or(Device::Cpu);
    let engine = kernels::attention::engine(&device, DType::BF16, HEAD_SIZE);
    let mut findings = vec![good("attention", format!("{}: {}", engine.name, engine.why))];
    if device.is_cuda() {
        let allocator = kernels::device::allocator(&device);
        findings.push(match &allocator {
            Allocator::Own => good("allocator", allocator.to_string()),
            Allocator::Driver { .. } => bad(
                "allocator",
                allocator.to_string(),
                "leave more of each card free, with devices.memory_limit 2 to 3 GiB below what it has",
            ),
        });
    }
    findings
}

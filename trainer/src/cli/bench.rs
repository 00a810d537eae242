//! `tandem bench`.

mod parts;
mod quality;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand, ValueEnum};
use models::adapter::AdapterKind;

use super::devices::StageDevices;
use super::fetch::on_this_machine;
use super::precision::DitPrecision;
use crate::base::hub::HubError;
use crate::bytes::Bytes;
use crate::error::Error;
use crate::machine::forecast::Networks;
use crate::machine::memory::{KeepConfig, MemoryConfig, Offload, WeightPlace};
use crate::machine::precision::{Arithmetic, WeightFormat};
use crate::sample::magcache::CacheConfig;
use crate::tools::bench::{
    self, ClipSize, DitBench, DitSource, LoadBench, LoadSource, Repeats, ReplicasBench, RunBench, StepBench,
};
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::{Ui, Voice};
use parts::{AttentionArguments, TextBench, VaeArguments};
use quality::QualityArguments;

/// Measure speed and memory of one part, as JSON lines.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Bench {
    #[command(subcommand)]
    part: BenchPart,
}

const EXAMPLES: &str = "\
Examples:
  tandem bench step --random-weights --width 96 --height 96 --frames 17 --profile
  tandem bench step --random-weights --model t2v-14b --stages cuda:0,cuda:1 --accumulate 4
  tandem bench load --model Wan2.1-T2V-14B --base fp8
  tandem bench load --model t2v-14b --random-weights --write bench-14b
  tandem bench quality my.toml --seeds 3 --output quality.json
  tandem bench replicas --model t2v-14b --stages cuda:0 --replicas 2 --gbits 10";

#[derive(Debug, Subcommand)]
enum BenchPart {
    /// A training step of the DiT.
    Step(StepArguments),
    /// A forward of the DiT.
    Forward(ForwardBench),
    /// Some solver steps of several clips in flight, and how busy they keep the stages.
    Clips(ClipsArguments),
    /// Self-attention alone, forward and backward.
    Attention(AttentionArguments),
    /// Decoding and encoding a clip.
    Vae(VaeArguments),
    /// Encoding a prompt.
    Text(TextBench),
    /// Loading a checkpoint: a DiT's folder as training loads it, other weights tensor by tensor; with --random-weights a
    /// checkpoint of those sizes is written first, in bf16.
    Load(LoadArguments),
    /// A whole short run from files of random weights, which are written first: loading, encoding, clips, steps, checkpoints,
    /// export. Each phase is reported with its time as it ends, then all together.
    Run(RunArguments),
    /// What int8 arithmetic changes on a recipe's own model and clips: each layer, the network, the gradients of a step, whole runs.
    Quality(QualityArguments),
    /// What several replicas gain: such a run by one, by several that `launch` starts, and by several that are started as torchrun does,
    /// with the same work a replica. On GPUs name --deterministic to compare bits.
    Replicas(ReplicasArguments),
}

/// Both sides of a clip must be a multiple of this for every model; some need more.
const LEAST_MULTIPLE: usize = 16;

#[derive(Debug, Args)]
struct Times {
    /// Counted runs; the median is reported.
    #[arg(short = 'n', long, default_value_t = 3)]
    iters: usize,
    /// Warm-up runs before them.
    #[arg(long, default_value_t = 1)]
    warmup: usize,
}

#[derive(Debug, Args)]
struct Size {
    /// Width in pixels.
    #[arg(long, default_value_t = 832)]
    width: usize,
    /// Height in pixels.
    #[arg(long, default_value_t = 480)]
    height: usize,
    /// Frames, 4n+1.
    #[arg(long, default_value_t = 49)]
    frames: usize,
}

/// The name of sizes, a path, or the path that a model of the hub has in the cache.
fn named(argument: &str) -> Result<String, HubError> {
    on_this_machine(argument).map(|path| path.display().to_string())
}

/// The path of a model on disk; a name of sizes that `preset` knows probably lacks --random-weights.
fn on_disk<T>(model: &str, preset: impl Fn(&str) -> crate::Result<T>) -> crate::Result<&Path> {
    let path = Path::new(model);
    if path.exists() || preset(model).is_err() {
        return Ok(path);
    }
    let why = format!(
        "nothing exists at `{model}`; for random weights of the sizes of that name add --random-weights"
    );
    Err(Error::Setting { key: "--model".into(), why })
}

/// A model by the name of its sizes, or on disk.
#[derive(Debug, Args)]
struct Model {
    /// A checkpoint; with --random-weights the name of sizes: tiny, or a published model as `tandem plan --assume` lists them.
    #[arg(long, default_value = "tiny", value_parser = named)]
    model: String,
    /// Generate weights from a seed: only speed and memory are meaningful then.
    #[arg(long)]
    random_weights: bool,
}

#[derive(Debug, Args)]
struct Profile {
    /// Also report time by class of operation, for a DiT stage by stage.
    #[arg(long)]
    profile: bool,
}

#[derive(Debug, Args)]
struct Network {
    #[command(flatten)]
    model: Model,
    #[command(flatten)]
    size: Size,
    #[command(flatten)]
    precision: DitPrecision,
    #[command(flatten)]
    devices: StageDevices,
    /// Where the matrices of the model are: host streams them from pinned host memory. auto does so where a training step does
    /// not fit otherwise.
    #[arg(long, value_enum, default_value_t)]
    weights: WeightPlace,
    #[command(flatten)]
    times: Times,
    #[command(flatten)]
    profile: Profile,
}

#[derive(Debug, Args)]
struct StepArguments {
    #[command(flatten)]
    network: Network,
    #[command(flatten)]
    memory: StepMemory,
    /// Rank of the adapter.
    #[arg(long, default_value_t = 32)]
    rank: usize,
    /// Kind of the adapter: lora, dora, loha or lokr.
    #[arg(long, default_value = "lora", value_parser = kind)]
    kind: AdapterKind,
    /// Clips of a micro-batch.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Micro-batches of a step.
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// Train two experts of the model, one in each step. Default: one network.
    #[arg(long, value_enum)]
    experts: Option<Experts>,
}

/// Where two experts are.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Experts {
    /// Both on the devices.
    SideBySide,
    /// The one that has nothing to do waits in host memory.
    InTurn,
}

fn kind(text: &str) -> Result<AdapterKind, String> {
    serde_json::from_value(text.into()).map_err(|_| "known are lora, dora, loha, lokr".to_owned())
}

#[derive(Debug, Args)]
struct ForwardBench {
    #[command(flatten)]
    network: Network,
}

#[derive(Debug, Args)]
struct ClipsArguments {
    #[command(flatten)]
    network: Network,
    /// Clips that are sampled together, each with guidance.
    #[arg(long, default_value_t = 2)]
    clips: usize,
    /// Measure whole clips with and without steps that MagCache skips, such as E012K2R20.
    #[arg(long, value_name = "PRESET")]
    cache_preset: Option<CacheConfig>,
    /// Solver steps of each clip.
    #[arg(long, default_value_t = 4)]
    steps: usize,
    /// Groups of the devices of --stages, each of which has the whole network; 1 is the split.
    #[arg(long, default_value = "1", value_name = "N")]
    groups: NonZeroUsize,
    /// Devices of each group that share the tokens of a call, each with the whole network; 1 for stages.
    #[arg(long, default_value = "1", value_name = "N")]
    sharing: NonZeroUsize,
}

#[derive(Debug, Args)]
struct LoadArguments {
    #[command(flatten)]
    model: Model,
    /// Temporary folder of such a checkpoint. Default: the system's for temporary files.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Write such a checkpoint into this folder, and keep it for measurements by `--model DIR`.
    #[arg(long, value_name = "DIR", requires = "random_weights", conflicts_with = "scratch")]
    write: Option<PathBuf>,
    /// Cache quantised weights in this folder, and measure loading from there.
    #[arg(long, value_name = "DIR")]
    quantised_folder: Option<PathBuf>,
    #[command(flatten)]
    precision: DitPrecision,
    #[command(flatten)]
    devices: StageDevices,
    #[command(flatten)]
    times: Times,
}

#[derive(Debug, Args)]
struct ReplicasArguments {
    #[command(flatten)]
    run: RunArguments,
    /// Replicas, each on as many GPUs as --stages names. Several numbers, such as 2,4, are measured one after the other.
    #[arg(long, value_delimiter = ',', default_value = "2", value_parser = clap::value_parser!(u16).range(2..=64))]
    replicas: Vec<u16>,
    /// Who starts them.
    #[arg(long, value_delimiter = ',', default_value = "launch,torchrun")]
    starts: Vec<bench::Start>,
    /// Measure one more run of each number, whose exchange is slowed down to so many Gb/s.
    #[arg(long)]
    gbits: Option<f64>,
}

#[derive(Debug, Args)]
struct RunArguments {
    /// The name of sizes.
    #[arg(long, default_value = "tiny", value_parser = PossibleValuesParser::new(bench::dit_presets()))]
    model: String,
    /// Temporary folder of files, run and cache: three times the model's size. Default: the system's for temporary files.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    #[command(flatten)]
    size: Size,
    /// Storage of the DiT's weights. Default: bf16.
    #[arg(long, value_enum)]
    base: Option<WeightFormat>,
    /// What products with the DiT's matrices are computed in. Default: bf16.
    #[arg(long, value_enum)]
    arithmetic: Option<Arithmetic>,
    #[command(flatten)]
    devices: StageDevices,
    /// Optimiser steps, with a checkpoint in the middle and one at the end.
    #[arg(long, default_value_t = 6)]
    steps: u64,
    /// Micro-batches of a step.
    #[arg(long, default_value_t = 4)]
    accumulate: usize,
    /// Rank of the adapter.
    #[arg(long, default_value_t = 32)]
    rank: usize,
    /// Solver steps of the clips before and after training.
    #[arg(long, default_value_t = 4)]
    solver_steps: usize,
    /// Let the clips after training skip steps by MagCache, such as E012K2R20; those before measure its table.
    #[arg(long, value_name = "PRESET")]
    cache_preset: Option<CacheConfig>,
}

/// What a training step keeps.
#[derive(Debug, Args)]
struct StepMemory {
    /// Activations that each block keeps between forward and backward.
    #[arg(long, value_enum, default_value_t = KeepConfig::Auto)]
    keep: KeepConfig,
    /// Whether kept activations are offloaded to host memory.
    #[arg(long, value_enum, default_value_t = Offload::Auto)]
    offload: Offload,
    /// The most tokens that go through a feed-forward layer at once. Default: what the plan finds best.
    #[arg(long)]
    ffn_tokens: Option<usize>,
    /// The most host memory that may be pinned, such as 48GiB. Default: half of what is available.
    #[arg(long, value_name = "SIZE")]
    host_memory: Option<Bytes>,
}

impl StepMemory {
    fn config(&self) -> MemoryConfig {
        let Self { keep, offload, host_memory, ffn_tokens } = *self;
        MemoryConfig { keep, offload, host_memory, ffn_tokens, ..MemoryConfig::default() }
    }
}

impl Bench {
    /// Measures and reports.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let row = match &self.part {
            BenchPart::Step(step) => step.measure()?,
            BenchPart::Forward(forward) => bench::forward(&forward.network.bench(MemoryConfig::default())?)?,
            BenchPart::Clips(clips) => {
                let ClipsArguments { clips: count, steps, groups, sharing, .. } = *clips;
                let network = clips.network.bench(MemoryConfig::default())?;
                let (count, steps) = (count.max(1), steps.max(1));
                let bench = bench::ClipsBench { network, clips: count, steps, groups, sharing };
                match &clips.cache_preset {
                    Some(cache) => bench.measure_skipping(cache)?,
                    None => bench.measure()?,
                }
            }
            BenchPart::Attention(a) => a.measure()?,
            BenchPart::Vae(vae) => vae.measure()?,
            BenchPart::Text(text) => text.measure()?,
            BenchPart::Load(load) => load.measure()?,
            BenchPart::Run(run) => run.measure()?,
            BenchPart::Quality(arguments) => {
                let interrupt = Interrupt::listen().context("cannot listen for Ctrl-C")?;
                let figures = arguments.measure(&interrupt, ui)?;
                ui.tell(&quality::table(&figures), &figures);
                return Ok(0);
            }
            BenchPart::Replicas(replicas) => replicas.measure()?,
        };
        ui.tell(&row.to_string(), &row);
        Ok(0)
    }
}

impl Network {
    fn bench(&self, memory: MemoryConfig) -> crate::Result<DitBench<'_>> {
        let size = self.size.checked(LEAST_MULTIPLE)?;
        let source = match self.model.random_weights {
            true => DitSource::Preset(&self.model.model),
            false => DitSource::Checkpoint(on_disk(&self.model.model, bench::dit_preset)?),
        };
        let devices = self.devices.config();
        let precision = self.precision.settle(devices.processor())?;
        let repeats = Repeats { profile: self.profile.profile, ..self.times.repeats() };
        let memory = MemoryConfig { weights: self.weights, ..memory };
        Ok(DitBench { source, devices, precision, memory, size, repeats })
    }
}

impl StepArguments {
    fn measure(&self) -> crate::Result<serde_json::Value> {
        let memory = self.memory.config();
        memory.check()?;
        let step = StepBench {
            kind: self.kind,
            rank: self.rank,
            batch: self.batch.max(1),
            accumulate: self.accumulate.max(1),
            networks: match self.experts {
                None => Networks::One,
                Some(Experts::SideBySide) => Networks::SideBySide,
                Some(Experts::InTurn) => Networks::InTurn,
            },
        };
        bench::step(&self.network.bench(memory)?, step)
    }
}

impl LoadArguments {
    fn measure(&self) -> crate::Result<serde_json::Value> {
        let devices = self.devices.config();
        let base = self.precision.settle(devices.processor())?.dit();
        let scratch = self.scratch.clone().unwrap_or_else(std::env::temp_dir);
        let source = match (self.model.random_weights, &self.write) {
            (true, Some(folder)) => LoadSource::Written(&self.model.model, folder),
            (true, None) => LoadSource::Preset(&self.model.model, &scratch),
            (false, _) => LoadSource::Checkpoint(on_disk(&self.model.model, bench::dit_preset)?),
        };
        let (devices, quantised) = (&devices, self.quantised_folder.as_deref());
        bench::load(source, LoadBench { base, devices, quantised, repeats: self.times.repeats() })
    }
}

impl ReplicasArguments {
    fn measure(&self) -> Result<serde_json::Value> {
        let scratch = self.run.scratch();
        let run = self.run.bench(&scratch)?;
        let worlds: Vec<usize> = self.replicas.iter().copied().map(usize::from).collect();
        let bench = ReplicasBench { run, worlds: &worlds, starts: &self.starts, gigabits: self.gbits };
        Ok(bench::replicas(&bench, &Ui::new(Voice::Json).with_phases())?)
    }
}

impl RunArguments {
    fn measure(&self) -> Result<serde_json::Value> {
        let interrupt = Interrupt::listen().context("cannot listen for Ctrl-C")?;
        let scratch = self.scratch();
        // JSON rows in every format: they are the figures.
        Ok(bench::whole(&self.bench(&scratch)?, &interrupt, &Ui::new(Voice::Json).with_phases())?)
    }

    fn scratch(&self) -> PathBuf {
        self.scratch.clone().unwrap_or_else(std::env::temp_dir)
    }

    fn bench<'a>(&'a self, scratch: &'a Path) -> Result<RunBench<'a>> {
        Ok(RunBench {
            model: &self.model,
            scratch,
            devices: self.devices.config(),
            base: self.base,
            arithmetic: self.arithmetic,
            size: self.size.checked(LEAST_MULTIPLE)?,
            steps: self.steps.max(1),
            accumulate: self.accumulate.max(1),
            rank: self.rank,
            solver_steps: self.solver_steps,
            cache: self.cache_preset.as_ref(),
        })
    }
}

impl Times {
    fn repeats(&self) -> Repeats {
        Repeats { warmup: self.warmup, iters: self.iters, profile: false }
    }
}

impl Size {
    fn checked(&self, multiple: usize) -> crate::Result<ClipSize> {
        let Self { width, height, frames } = *self;
        if width == 0 || height == 0 || width % multiple != 0 || height % multiple != 0 || frames % 4 != 1 {
            let why = format!(
                "{width}x{height}, {frames} frames: sides must be multiples of {multiple}, frames 4n+1"
            );
            return Err(Error::Setting { key: "size of the clip".into(), why });
        }
        Ok(ClipSize { width, height, frames })
    }
}

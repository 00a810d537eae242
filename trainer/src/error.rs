//! The errors of this crate.

use std::path::PathBuf;

use kernels::fault::Fault;

use crate::bytes::Bytes;
use crate::machine::memory::Phase;

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tensor library refused an operation.
    #[error(transparent)]
    Tensor(kernels::Error),
    /// A model, its weights or its adapters.
    #[error(transparent)]
    Model(models::Error),
    /// A GPU is out of memory.
    #[error(
        "the GPU's memory ran out: `tandem plan` shows what the recipe needs; model.base = \"fp8\", memory.offload = \
         \"always\", fewer or smaller frames (data.frames, data.sizes), train.batch = 1 or another stage in devices.stages \
         need less, and devices.memory_limit may have been set too low ({cause})"
    )]
    OutOfMemory {
        /// The driver's message.
        cause: String,
    },
    /// No plan fits the devices.
    #[error(
        "a step of {tokens} tokens does not fit, so nothing was loaded: {place} has room for {room}, and the leanest plan \
         needs {needed}. {}",
        way_out(ways)
    )]
    TooLarge {
        /// The device, or host memory.
        place: String,
        /// What the plan of least memory needs there.
        needed: Bytes,
        /// What is available.
        room: Bytes,
        /// Tokens of a sample of the largest bucket.
        tokens: usize,
        /// Changes of the recipe, each of which would suffice.
        ways: Vec<String>,
    },
    /// A phase other than training steps fits no device.
    #[error(
        "{phase} does not fit, so nothing was loaded: {place} has room for {room}, and it needs {needed}. {}",
        phase_way_out(ways)
    )]
    PhaseTooLarge {
        /// What.
        phase: Phase,
        /// The device.
        place: String,
        /// What it needs there.
        needed: Bytes,
        /// What is available.
        room: Bytes,
        /// Changes of the recipe or of the command line, each of which would do.
        ways: Vec<String>,
    },
    /// The GPU does not exist or cannot be used.
    #[error(
        "no such GPU can be used: check that `nvidia-smi` and `tandem doctor` list it, correct devices.stages (or \
         --stages, --device), or use \"cpu\" ({cause})"
    )]
    NoGpu {
        /// The driver's message.
        cause: String,
    },
    /// A library of CUDA is missing.
    #[error(
        "{name} cannot be loaded, which every use of a GPU needs: `tandem doctor` says how to get it ({cause})"
    )]
    NoLibrary {
        /// The library.
        name: &'static str,
        /// The loader's message.
        cause: String,
    },
    /// The driver cannot run this build.
    #[error(
        "the NVIDIA driver is older than the CUDA that this program was built with: install a newer driver, or build \
         Tandem with an older CUDA toolkit; `tandem doctor` tells both versions ({cause})"
    )]
    OldDriver {
        /// The driver's message.
        cause: String,
    },
    /// The GPU stopped working for this process.
    #[error(
        "the GPU stopped working ({cause}): continue with --resume; if it happens again, look for an Xid line in `dmesg` \
         and test the card's memory and power, or report it"
    )]
    GpuLost {
        /// The driver's message.
        cause: String,
    },
    /// Clips, captions, the cache, or a file of clips.
    #[error(transparent)]
    Data(#[from] data::DataError),
    /// Replicas that do not find each other, do not match, or of which one has failed.
    #[error(transparent)]
    Replica(#[from] crate::replicas::ReplicaError),
    /// A model could not be fetched from the hub.
    #[error(transparent)]
    Hub(#[from] crate::base::hub::HubError),
    /// An impossible sampling schedule, or its steps out of order.
    #[error(transparent)]
    Solver(#[from] crate::solver::SolverError),
    /// The TensorBoard events could not be written.
    #[error(transparent)]
    Tensorboard(#[from] crate::watch::tensorboard::TensorboardError),
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being attempted, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's own reason.
        source: std::io::Error,
    },
    /// A recipe that cannot be read.
    #[error("{}: {why}", path.display())]
    Recipe {
        /// The recipe.
        path: PathBuf,
        /// The parser's message, with the location.
        why: String,
    },
    /// A setting that cannot work.
    #[error("{key}: {why}")]
    Setting {
        /// Dotted key.
        key: String,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// A prompt line that cannot be read.
    #[error(
        "in the prompt line \"{line}\": \"{option}\" cannot be read; the options are --w width, --h height, --f frames, \
         --d seed, --s steps, --l guidance, --lh guidance of the expert for high noise, --fs shift (numbers), --i first and --ei \
         last picture (files) and --n negative prompt"
    )]
    PromptOption {
        /// The whole line.
        line: String,
        /// The option that is wrong.
        option: String,
    },
    /// A file of a recipe that does not exist.
    #[error(
        "{key}: nothing exists at {}; correct the path, which is relative to the recipe's folder",
        path.display()
    )]
    NotThere {
        /// Dotted key.
        key: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The base model does not exist.
    #[error("there is no model at {}: correct model.folder in the recipe, or --model", folder.display())]
    NoModelFolder {
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// One file in place of a whole model.
    #[error(
        "{} is a file, and model.folder (or --model) is the folder of a whole model: name the file of a DiT with model.dit \
         in a recipe, beside model.folder or the keys of the other parts",
        path.display()
    )]
    ModelFolderIsFile {
        /// The file.
        path: PathBuf,
    },
    /// A part of the base model is missing.
    #[error(
        "the base model has no {key}: looked for {looked}; put it there, or name it with model.{key} in the recipe"
    )]
    NoModelPart {
        /// Key of `[model]`.
        key: &'static str,
        /// Where it was looked for.
        looked: String,
    },
    /// A model of two experts, of which one has to be chosen.
    #[error(
        "this model has two experts, {} for high noise and {} for low noise, and an adapter is for one of them: set \
         model.expert to \"high\", \"low\", or \"both\" for one run of two adapters, or name the folder of the one",
        high.display(), low.display()
    )]
    TwoExperts {
        /// The expert for high noise.
        high: PathBuf,
        /// The expert for low noise.
        low: PathBuf,
    },
    /// One of two experts, and it is unknown which.
    #[error(
        "{} is {model}, and its name does not say which of the two: set model.expert to \"high\" or \"low\"",
        path.display()
    )]
    WhichExpert {
        /// Its weights.
        path: PathBuf,
        /// What it was recognised as.
        model: String,
    },
    /// A file of tensors or settings that a probe cannot use.
    #[error("{}: {why}", path.display())]
    ProbeInput {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        why: String,
    },
    /// A GPU was requested in a build without CUDA.
    #[error(
        "{name}: this build is without CUDA; build it with `--features cuda`, or use \"cpu\"; `tandem plan --on 24GiB` \
         (or 2x4090) plans for cards that are not here"
    )]
    NoCuda {
        /// The device.
        name: String,
    },
    /// Everything is held out.
    #[error("every clip is held out (data.held_out), so nothing is left to train on")]
    NothingToTrainOn,
    /// A cache entry disappeared or was damaged during the run.
    #[error(
        "a cached item cannot be used: {why}; it was deleted or damaged during the run, run again to encode it again"
    )]
    CacheEntryGone {
        /// What was found.
        why: String,
    },
    /// The VAE's latents are not finite.
    #[error("{clip}: the VAE gave latents that are not finite; the VAE's weights or the clip are damaged")]
    NonFiniteLatents {
        /// The clip.
        clip: String,
    },
    /// The user asked to stop; what was finished is kept.
    #[error("stopped; what was finished is kept")]
    Interrupted,
    /// A split that does not cover the blocks.
    #[error(
        "the split of the model must give every one of its {layers} blocks to one stage, in order, and none be empty"
    )]
    Split {
        /// Blocks of the model.
        layers: usize,
    },
    /// Another stage of the pipeline failed; that stage's error is reported.
    #[error("another stage stopped")]
    NeighbourStopped,
    /// The loss is not finite.
    #[error(
        "the loss of step {step} is not finite (clips: {}); the adapter was not updated. A lower optimizer.lr helps \
         where training ran away; the last checkpoint is whole",
        items.join(", ")
    )]
    NonFiniteLoss {
        /// The step, from 1.
        step: u64,
        /// Its clips.
        items: Vec<String>,
    },
    /// A clip that is being sampled is not finite.
    #[error(
        "clip {} (`{prompt}`) is not finite after solver step {step} of {steps} (sigma {sigma:.3}), so no clips were written. \
         Where an adapter is in use it has probably diverged: try an older one or a lower strength; else look at the guidance \
         scale, and at the model's files", .clip + 1
    )]
    NonFiniteClip {
        /// Index of the clip.
        clip: usize,
        /// Its prompt.
        prompt: String,
        /// The solver step, from 1.
        step: usize,
        /// Solver steps of the clip.
        steps: usize,
        /// Sigma that the step began at.
        sigma: f32,
    },
    /// The VAE's video is not finite although the latents are.
    #[error(
        "`{clip}`: the VAE gave a video that is not finite, so it was not written; the VAE's file is damaged, or \
         model.vae_base = \"float32\" is needed"
    )]
    NonFiniteVideo {
        /// The clip.
        clip: String,
    },
    /// A table of MagCache that cannot be used.
    #[error("MagCache, {what}: {why}. `tandem calibrate` measures a table")]
    MagCacheTable {
        /// Its file, or whose it is.
        what: String,
        /// Why.
        why: String,
    },
    /// The held-out loss is not finite.
    #[error(
        "the held-out loss after step {step} is not finite: {item} at sigma {sigma:.3}. The adapter has probably diverged: go \
         back to an older checkpoint, with a lower optimizer.lr"
    )]
    NonFiniteHeldOut {
        /// Optimiser steps made.
        step: u64,
        /// The clip.
        item: String,
        /// Sigma.
        sigma: f64,
    },
    /// A trainable tensor got no gradient.
    #[error("{name} got no gradient; the adapter was not updated. This is a bug in Tandem: please report it")]
    MissingGradient {
        /// The tensor.
        name: String,
    },
    /// A gradient is not finite.
    #[error(
        "the gradient of {name} is not finite; the adapter was not updated. A lower optimizer.lr helps where training \
         ran away; the last checkpoint is whole"
    )]
    NonFiniteGradient {
        /// The tensor.
        name: String,
    },
    /// The state of a run could not be written.
    #[error(
        "the state after step {step} could not be saved: {cause}. What was saved before is intact: make room or make the \
         folder writable, then go on with --resume"
    )]
    NotSaved {
        /// Steps made.
        step: u64,
        /// The cause.
        cause: Box<Error>,
    },
    /// An adapter file could not be written.
    #[error(
        "the adapter {} could not be written: {cause}. What was saved before is intact: make room or make the folder writable, \
         then continue with --resume",
        path.display()
    )]
    NotExported {
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: Box<Error>,
    },
    /// A checkpoint with other tensors than this run's.
    #[error("the checkpoint has other adapters than this run trains; it belongs to another recipe")]
    ForeignCheckpoint,
    /// A checkpoint whose contents changed since they were written.
    #[error(
        "the checkpoint {} is damaged: {why}. {}",
        path.display(),
        go_back(before.as_deref())
    )]
    DamagedCheckpoint {
        /// The file.
        path: PathBuf,
        /// What is damaged.
        why: String,
        /// The newest checkpoint before it.
        before: Option<PathBuf>,
    },
    /// A file that is not a checkpoint.
    #[error("{} is not a checkpoint of a run", path.display())]
    NotACheckpoint {
        /// The file.
        path: PathBuf,
    },
    /// The log is shorter than at the checkpoint.
    #[error("{} is shorter than at the last checkpoint: it was truncated or replaced, so the run cannot be resumed bit for bit", path.display())]
    LogCut {
        /// The log.
        path: PathBuf,
    },
    /// No run to resume.
    #[error("there is no run in {} to resume; start it without --resume", folder.display())]
    NothingToResume {
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// The report of a run cannot be drawn.
    #[error("the charts of the run's report cannot be drawn: {why}")]
    Report {
        /// What plotters says.
        why: String,
    },
    /// A run was told something, and nobody trains it.
    #[error("no process trains a run in {}: name the folder of a run that is going on", folder.display())]
    NotTraining {
        /// The folder of the run.
        folder: PathBuf,
    },
    /// Another process writes into the run folder.
    #[error(
        "the run in {} is in use by {holder}: wait until it ends or stop it, then resume, or start a new run without --resume",
        folder.display()
    )]
    RunInUse {
        /// The run folder.
        folder: PathBuf,
        /// The process and its host.
        holder: String,
    },
    /// The plan differs from the run's.
    #[error(
        "the recipe has changed since the run began:\n  {}\nrestore these to resume, or start a new run without --resume",
        changes.join("\n  ")
    )]
    PlanChanged {
        /// `key: before -> after` of each.
        changes: Vec<String>,
    },
    /// The plan cannot be written as text, or read from it.
    #[error("the stored plan cannot be used: {why}")]
    PlanText {
        /// Why.
        why: String,
    },
}

impl From<kernels::Error> for Error {
    fn from(error: kernels::Error) -> Self {
        of_gpu(&error).unwrap_or(Self::Tensor(error))
    }
}

impl From<models::Error> for Error {
    fn from(error: models::Error) -> Self {
        match &error {
            models::Error::Tensor(inner) => of_gpu(inner).unwrap_or(Self::Model(error)),
            _ => Self::Model(error),
        }
    }
}

fn go_back(before: Option<&std::path::Path>) -> String {
    match before {
        Some(before) => format!(
            "Move it out of its folder, and --resume continues from the one before it, {}",
            before.file_name().unwrap_or_default().display()
        ),
        None => "There is no checkpoint before it: move it out of its folder, and --resume starts at step 0"
            .to_owned(),
    }
}

fn way_out(ways: &[String]) -> String {
    match ways {
        [] => "No single change makes it fit: it needs smaller clips, model.base = \"fp8\" and more cards"
            .to_owned(),
        ways => format!("What would fit: {}", ways.join("; or ")),
    }
}

fn phase_way_out(ways: &[String]) -> String {
    match ways {
        [] => "No single change makes it fit: it needs a card with more memory".to_owned(),
        ways => format!("What would fit: {}", ways.join("; or ")),
    }
}

/// The error for the user of a GPU's fault, if `error` is one.
fn of_gpu(error: &kernels::Error) -> Option<Error> {
    let fault = Fault::of(error)?;
    let text = error.to_string();
    // A backtrace may follow the error's own line.
    let cause = text.lines().next().unwrap_or_default().to_owned();
    Some(match fault {
        Fault::OutOfMemory => Error::OutOfMemory { cause },
        Fault::NoGpu => Error::NoGpu { cause },
        Fault::OldDriver => Error::OldDriver { cause },
        Fault::Lost => Error::GpuLost { cause },
    })
}

//! What can go wrong in the trainer.

use std::path::PathBuf;

use kernels::fault::Fault;

use crate::bytes::Bytes;
use crate::machine::memory::Phase;

/// The result of anything in this crate.
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
    /// A GPU has no room for a tensor.
    #[error(
        "the GPU's memory ran out: `tandem plan` tells what the recipe needs; model.base = \"fp8\", memory.offload = \
         \"always\", fewer or smaller frames (data.frames, data.sizes), train.batch = 1 or another stage in devices.stages \
         need less, and devices.memory_limit may have been set too low ({cause})"
    )]
    OutOfMemory {
        /// The driver's own words.
        cause: String,
    },
    /// A plan that no device can hold.
    #[error(
        "a step of {tokens} tokens does not fit, so nothing was loaded: {place} has room for {room}, and the leanest plan \
         needs {needed}. {}",
        way_out(ways)
    )]
    TooLarge {
        /// The device, or host memory.
        place: String,
        /// What the leanest plan needs there.
        needed: Bytes,
        /// What there is.
        room: Bytes,
        /// Tokens of a sample of the largest bucket.
        tokens: usize,
        /// Changes of the recipe, each of which would do.
        ways: Vec<String>,
    },
    /// Something besides steps that no device can hold.
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
        /// What there is.
        room: Bytes,
        /// Changes of the recipe or of the command line, each of which would do.
        ways: Vec<String>,
    },
    /// The GPU is not there.
    #[error(
        "no such GPU can be used: look that `nvidia-smi` and `tandem doctor` list it, correct devices.stages (or \
         --stages, --device), or use \"cpu\" ({cause})"
    )]
    NoGpu {
        /// The driver's own words.
        cause: String,
    },
    /// A library of CUDA is missing.
    #[error(
        "{name} cannot be loaded, and nothing runs on a GPU without it: `tandem doctor` tells how to get it ({cause})"
    )]
    NoLibrary {
        /// The library.
        name: &'static str,
        /// The loader's own words.
        cause: String,
    },
    /// The driver cannot run this build.
    #[error(
        "the NVIDIA driver is older than the CUDA that this program was built with: install a newer driver, or build \
         Tandem with an older CUDA toolkit; `tandem doctor` tells both versions ({cause})"
    )]
    OldDriver {
        /// The driver's own words.
        cause: String,
    },
    /// The GPU stopped working for this process.
    #[error(
        "the GPU stopped working ({cause}): go on with --resume; if it happens again, look for an Xid line in `dmesg` \
         and test the card's memory and power, or report it"
    )]
    GpuLost {
        /// The driver's own words.
        cause: String,
    },
    /// Clips, captions, the cache, or a file of clips.
    #[error(transparent)]
    Data(#[from] data::DataError),
    /// A model could not be had from the hub.
    #[error(transparent)]
    Hub(#[from] crate::base::hub::HubError),
    /// A sampling schedule that cannot be, or its steps out of order.
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
        /// The parser's words, with the place.
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
    /// A file that a recipe names and that is not there.
    #[error(
        "{key}: there is nothing at {}; correct the path, which is taken from the folder of the recipe",
        path.display()
    )]
    NotThere {
        /// Dotted key.
        key: String,
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The base model is not there.
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
    /// A part of the base model is not there.
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
        "this model holds two experts, {} for high noise and {} for low noise, and an adapter is made for one of them: set \
         model.expert to \"high\", \"low\", or \"both\" for one run of two adapters, or name the folder of the one",
        high.display(), low.display()
    )]
    TwoExperts {
        /// The expert for high noise.
        high: PathBuf,
        /// The expert for low noise.
        low: PathBuf,
    },
    /// One of two experts, and nothing says which.
    #[error(
        "{} is {model}, and nothing in its name says which of the two: set model.expert to \"high\" or \"low\"",
        path.display()
    )]
    WhichExpert {
        /// Its weights.
        path: PathBuf,
        /// What is known of it.
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
    /// A GPU was asked for in a build that has none.
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
    /// A cache entry that was there has gone.
    #[error(
        "a cached item cannot be used: {why}; it went away or was damaged during the run, run again to make it anew"
    )]
    CacheEntryGone {
        /// What was found.
        why: String,
    },
    /// The VAE made something that is no number.
    #[error("{clip}: the VAE gave latents that are not finite; the VAE's weights or the clip are damaged")]
    NonFiniteLatents {
        /// The clip.
        clip: String,
    },
    /// The user asked to stop while something was made that is not lost.
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
    /// Another stage of the pipeline failed; its own error is the one that is told.
    #[error("another stage stopped")]
    NeighbourStopped,
    /// The loss is no number.
    #[error(
        "the loss of step {step} is not finite (clips: {}); the adapter was not updated. A lower optimizer.lr helps \
         where training ran away; the last checkpoint is whole",
        items.join(", ")
    )]
    NonFiniteLoss {
        /// The step, from 1.
        step: u64,
        /// What it saw.
        items: Vec<String>,
    },
    /// A clip that is being sampled holds something that is no number.
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
    /// The VAE made something that is no number out of finite latents.
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
    /// The held-out loss is no number.
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
    #[error(
        "{name} got no gradient; the adapter was not updated. This is a defect of Tandem: please report it"
    )]
    MissingGradient {
        /// The tensor.
        name: String,
    },
    /// A gradient is no number.
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
        "the state after step {step} could not be saved: {cause}. What was saved before is whole: make room or make the \
         folder writable, then go on with --resume"
    )]
    NotSaved {
        /// Steps made.
        step: u64,
        /// What stood in the way.
        cause: Box<Error>,
    },
    /// An adapter file could not be written.
    #[error(
        "the adapter {} could not be written: {cause}. What was saved before is whole: make room or make the folder writable, \
         then continue with --resume",
        path.display()
    )]
    NotExported {
        /// The file.
        path: PathBuf,
        /// What stood in the way.
        cause: Box<Error>,
    },
    /// A checkpoint with other tensors than this run has.
    #[error("the checkpoint holds other adapters than this run trains; it belongs to another recipe")]
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
    /// A file that is no checkpoint.
    #[error("{} is no checkpoint of a run", path.display())]
    NotACheckpoint {
        /// The file.
        path: PathBuf,
    },
    /// The log is shorter than at the checkpoint.
    #[error("{} is shorter than at the last checkpoint: it was cut or replaced, so the run cannot go on bit for bit", path.display())]
    LogCut {
        /// The log.
        path: PathBuf,
    },
    /// Nothing to go on with.
    #[error("there is no run in {} to go on with; start it without --resume", folder.display())]
    NothingToResume {
        /// Where it was looked for.
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
        "the recipe has changed since the run began:\n  {}\nput these back to go on, or start anew without --resume",
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

/// What a GPU's fault means to its user, where `error` tells one.
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

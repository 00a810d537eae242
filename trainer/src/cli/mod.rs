//! The command line: one file a command.

mod adapter_output;
mod average;
mod base_dit;
mod bench;
mod best;
mod cache;
mod calibrate;
mod captions;
mod compare;
mod completions;
mod devices;
mod doctor;
mod export;
mod fetch;
mod force;
mod inspect;
mod launch;
mod merge;
mod named;
mod new;
mod noise_levels;
mod plan;
mod precision;
mod probe;
mod reduce;
mod replica;
mod sample;
mod serve;
mod tell;
mod train;

use std::io::ErrorKind;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::error::Error;
use crate::replicas::{ReplicaError, STOPPED};
use crate::solver::SolverError;
use crate::watch::interrupt::INTERRUPTED;
use crate::watch::ui::{Ui, Voice, fail};

/// Trains LoRA adapters for the Wan video models on few cards, and makes clips with them.
#[derive(Debug, Parser)]
#[command(version = env!("TANDEM_VERSION"), after_help = EXIT_CODES, max_term_width = 120)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// One JSON object a line on standard output, for machines; notes go to standard error. A command that fails ends with
    /// {"error": "...", "exit_code": N}.
    #[arg(long, global = true, display_order = LAST)]
    json: bool,
}

/// After the options of every command.
const LAST: usize = 900;

const EXIT_CODES: &str = "\
Examples:
  tandem new --data clips             # write a recipe for your clips and cards
  tandem plan clips.toml              # what it means, and whether it fits
  tandem train clips.toml             # Ctrl-C saves and stops, --resume continues
  tandem sample clips.toml --out new  # clips with the adapter that was trained

Every key of a recipe is explained in recipes/README.md.

Exit codes: 0 done; 1 an internal error or a hardware failure; 2 something that you can correct (the message says how); \
75 stopped because of another replica; 130 stopped by Ctrl-C, with the state saved; 131 stopped at once by a second Ctrl-C, \
without.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Write a commented recipe for a model, a folder of clips and the GPUs of this machine.
    New(new::New),
    /// Resolve a recipe: print every resolved value, the buckets and a memory forecast.
    Plan(plan::Plan),
    /// Encode clips and captions, so that training can start at once.
    Cache(cache::Cache),
    /// List the texts that each clip is trained with, and what is odd about them.
    Captions(captions::Captions),
    /// Train an adapter; clips that are not cached are encoded first.
    Train(train::Train),
    /// Train on several replicas: groups of cards, each with the whole model, on this host or others.
    Launch(launch::Launch),
    /// Make clips from prompts, many from one load of the model.
    Sample(Box<sample::Sample>),
    /// Make the same clips without an adapter and with each of several, side by side.
    Compare(Box<compare::Compare>),
    /// Tell a run that is training to make clips, save, stop, pause or take another learning rate.
    Tell(tell::Tell),
    /// Rank the checkpoints of a run by their held-out loss.
    Best(best::Best),
    /// Start, watch and try runs in a browser; an API for clips.
    Serve(serve::Serve),
    /// Measure a MagCache table for a model with its adapters.
    Calibrate(Box<calibrate::Calibrate>),
    /// Write an adapter file, or the adapter of a checkpoint, in any format.
    #[command(visible_alias = "convert")]
    Export(export::Export),
    /// Average adapters of several steps of a run.
    Average(average::Average),
    /// Merge adapters into a model's weights, and write the result.
    Merge(merge::Merge),
    /// Extract a LoRA from the difference of two models.
    Extract(reduce::Extract),
    /// Change the rank of an adapter.
    Resize(reduce::Resize),
    /// Run one part on given tensors, to compare it with another implementation.
    Probe(probe::Probe),
    /// Fetch a model from the Hugging Face hub into its cache.
    Fetch(fetch::Fetch),
    /// Show what an adapter, a checkpoint or a folder is.
    Inspect(inspect::Inspect),
    /// Check this machine: GPUs, libraries, engines, what is missing and how to get it.
    Doctor(doctor::Doctor),
    /// Measure speed and memory of one part, as JSON lines.
    Bench(bench::Bench),
    /// Print a script that completes commands and options in a shell.
    Completions(completions::Completions),
}

impl Arguments {
    /// Runs the command. The exit code.
    ///
    /// # Errors
    /// The error that ended it; see [`exit_code`].
    pub fn run(self) -> Result<u8> {
        let ui = Ui::new(self.voice());
        match self.command {
            Command::New(command) => command.run(&ui),
            Command::Plan(command) => command.run(&ui),
            Command::Cache(command) => command.run(&ui),
            Command::Captions(command) => command.run(&ui),
            Command::Train(command) => command.run(&ui),
            Command::Launch(command) => command.run(&ui),
            Command::Sample(command) => command.run(&ui),
            Command::Compare(command) => command.run(&ui),
            Command::Tell(command) => command.run(&ui),
            Command::Best(command) => command.run(&ui),
            Command::Serve(command) => command.run(&ui),
            Command::Calibrate(command) => command.run(&ui),
            Command::Export(command) => command.run(&ui),
            Command::Average(command) => command.run(&ui),
            Command::Merge(command) => command.run(&ui),
            Command::Extract(command) => command.run(&ui),
            Command::Resize(command) => command.run(&ui),
            Command::Probe(command) => command.run(&ui),
            Command::Fetch(command) => command.run(&ui),
            Command::Inspect(command) => command.run(&ui),
            Command::Doctor(command) => command.run(&ui),
            Command::Bench(command) => command.run(&ui),
            Command::Completions(command) => command.run(&ui),
        }
    }

    /// Whether people or machines read the output.
    pub fn voice(&self) -> Voice {
        if self.json { Voice::Json } else { Voice::Human }
    }
}

/// Reports a command line that could not be parsed, or prints the help or version that it asked for. The exit code.
pub fn reject(error: &clap::Error) -> u8 {
    let is_json = std::env::args_os().any(|argument| argument == "--json");
    if error.exit_code() != 0 && is_json {
        let message = error.render().to_string();
        fail(Voice::Json, message.trim_start_matches("error: ").trim_end(), USAGE);
        return USAGE;
    }
    // A closed terminal is not an error.
    let _ = error.print();
    if error.exit_code() != 0 { USAGE } else { 0 }
}

/// The exit code of errors that the user can correct.
const USAGE: u8 = 2;

/// An error with its causes, without repetition: many of our errors include their cause.
pub fn explain(error: &anyhow::Error) -> String {
    error.chain().skip(1).map(ToString::to_string).fold(error.to_string(), |text, cause| {
        if text.contains(&cause) { text } else { format!("{text}: {cause}") }
    })
}

/// 130 if the user asked to stop, 2 if the user can correct it, else 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if matches!(error.downcast_ref(), Some(Error::Interrupted)) {
        return INTERRUPTED;
    }
    if let Some(code) = error.chain().find_map(|cause| of_replicas(cause.downcast_ref()?)) {
        return code;
    }
    let is_users = error.chain().any(|cause| match cause.downcast_ref::<Error>() {
        Some(error) => is_users(error),
        None => false,
    });
    if is_users { USAGE } else { 1 }
}

/// The exit code where another replica decides it: a launcher may start all again.
fn of_replicas(error: &Error) -> Option<u8> {
    match error {
        Error::Replica(ReplicaError::Stopped { code, .. }) => Some(*code),
        Error::Replica(ReplicaError::NoRankZero { .. } | ReplicaError::Missing { .. }) => Some(STOPPED),
        _ => None,
    }
}

/// Whether the user can correct an error. What is not listed here is an internal error or a hardware failure.
fn is_users(error: &Error) -> bool {
    match error {
        Error::NotSaved { cause, .. } | Error::NotExported { cause, .. } => is_users(cause),
        Error::Io { source, .. } => !matches!(source.kind(), ErrorKind::OutOfMemory),
        // Settings, and files that are named in them.
        Error::Recipe { .. }
        | Error::Setting { .. }
        | Error::PromptOption { .. }
        | Error::MagCacheTable { .. }
        | Error::NotThere { .. } => true,
        Error::NoModelFolder { .. } | Error::ModelFolderIsFile { .. } | Error::NoModelPart { .. } => true,
        Error::TwoExperts { .. } | Error::WhichExpert { .. } | Error::ProbeInput { .. } => true,
        Error::Model(
            models::Error::Weights(_)
            | models::Error::AdapterFile(_)
            | models::Error::Mismatch(_)
            | models::Error::NotFinite { .. }
            | models::Error::RoleMissing { .. }
            | models::Error::RoleUnread { .. },
        ) => true,
        Error::Replica(
            ReplicaError::Launch { .. }
            | ReplicaError::NodeList { .. }
            | ReplicaError::NoPort { .. }
            | ReplicaError::Mismatch { .. },
        ) => true,
        Error::Data(_) | Error::Hub(_) | Error::NothingToTrainOn | Error::Split { .. } => true,
        Error::Solver(error) => !matches!(error, SolverError::Tensor(_)),
        // Memory and devices.
        Error::OutOfMemory { .. } | Error::TooLarge { .. } | Error::PhaseTooLarge { .. } => true,
        Error::NoGpu { .. } | Error::NoLibrary { .. } | Error::OldDriver { .. } | Error::NoCuda { .. } => {
            true
        }
        // The run.
        Error::NothingToResume { .. } | Error::PlanChanged { .. } | Error::PlanText { .. } => true,
        Error::RunInUse { .. } | Error::NotTraining { .. } | Error::LogCut { .. } | Error::Tensorboard(_) => {
            true
        }
        Error::DamagedCheckpoint { .. } | Error::NotACheckpoint { .. } | Error::ForeignCheckpoint => true,
        Error::CacheEntryGone { .. } | Error::NonFiniteLatents { .. } => true,
        Error::NonFiniteLoss { .. } | Error::NonFiniteGradient { .. } | Error::NonFiniteHeldOut { .. } => {
            true
        }
        Error::NonFiniteClip { .. } | Error::NonFiniteVideo { .. } => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An error that is not listed is not attributed to the user.
    #[test]
    fn what_is_not_known_to_be_the_users_exits_1() {
        let users = [
            Error::Setting { key: "train.steps".into(), why: "must be at least 1".into() },
            Error::NothingToTrainOn,
            Error::ForeignCheckpoint,
            Error::Model(models::Error::NotFinite { what: "the decoded video" }),
            Error::Model(models::Error::RoleMissing { role: models::dit::Role::PICTURE }),
            Error::Model(models::Error::RoleUnread { role: models::dit::Role::PICTURE }),
        ];
        let ours = [
            Error::NeighbourStopped,
            Error::GpuLost { cause: "CUDA_ERROR_ILLEGAL_ADDRESS".into() },
            Error::Tensor(kernels::Error::msg("shapes differ")),
        ];
        let code = |error: Error| exit_code(&error.into());
        assert_eq!(users.map(code), [2; 6]);
        assert_eq!(ours.map(code), [1; 3]);
    }
}

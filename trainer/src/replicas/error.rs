//! What goes wrong between replicas.

use std::time::Duration;

/// The result type of this module.
pub type Result<T, E = ReplicaError> = std::result::Result<T, E>;

/// An error between replicas.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReplicaError {
    /// The launcher's variables, or the options in their place, do not describe a group of processes.
    #[error("{launcher}: {why}")]
    Launch {
        /// Who started this process.
        launcher: &'static str,
        /// What is missing or contradictory, and the way out.
        why: String,
    },
    /// A list of hosts that cannot be expanded.
    #[error("the node list \"{list}\" cannot be read: {why}")]
    NodeList {
        /// The list.
        list: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Rank 0 has no port to listen on.
    #[error(
        "rank 0 cannot listen at {place}: {why}. Choose another MASTER_PORT (or --master), or meet through a file with \
         --rendezvous"
    )]
    NoPort {
        /// The ports that were tried.
        place: String,
        /// The system's reason for the last one.
        why: String,
    },
    /// Rank 0 was not found.
    #[error(
        "rank 0 did not answer at {place} within {} s: check that it runs, that MASTER_ADDR and MASTER_PORT are the same \
         everywhere, and that its port is open between the hosts ({why})",
        waited.as_secs()
    )]
    NoRankZero {
        /// Where it was looked for.
        place: String,
        /// How long.
        waited: Duration,
        /// What the last attempt came to.
        why: String,
    },
    /// Not all replicas came.
    #[error(
        "{missing} of {world} replicas did not come within {} s: {ranks}. Look at their output, and at the port of rank 0",
        waited.as_secs()
    )]
    Missing {
        /// How many.
        missing: usize,
        /// How many there should be.
        world: usize,
        /// Which.
        ranks: String,
        /// How long rank 0 waited.
        waited: Duration,
    },
    /// Replicas that cannot train together. Every rank reports the same sentence.
    #[error("{sentence}")]
    Mismatch {
        /// What does not match, and on which ranks.
        sentence: String,
    },
    /// Another replica failed, was stopped, or is no longer there; or this one kept the others waiting.
    #[error(
        "{reason}; every replica stops. What was saved is intact: start all again to continue from the last checkpoint"
    )]
    Stopped {
        /// Which rank, and what of it.
        reason: String,
        /// What this process exits with.
        code: u8,
    },
    /// Replicas exchange different things: a fault of this program.
    #[error(
        "the replicas no longer do the same at the same time ({why}). This is a bug in Tandem: please report it"
    )]
    OutOfStep {
        /// What was expected, and what came.
        why: String,
    },
    /// The replicas' adapters differ.
    #[error(
        "the adapters of ranks {ranks} differ from those of rank 0 after step {step}: a GPU or its memory has failed, or the \
         hosts run different builds. The checkpoint before is intact"
    )]
    Diverged {
        /// Which.
        ranks: String,
        /// Steps made.
        step: u64,
    },
    /// The system refused a connection or a file.
    #[error("cannot {action}: {why}")]
    Io {
        /// What was being attempted.
        action: String,
        /// The system's own reason.
        why: String,
    },
    /// NCCL cannot be used, or failed.
    #[error("NCCL: {why}")]
    Nccl {
        /// What it said, and the way out.
        why: String,
    },
}

impl ReplicaError {
    /// An [`Self::Io`] of `error`.
    pub(super) fn io(action: impl Into<String>, error: &std::io::Error) -> Self {
        Self::Io { action: action.into(), why: error.to_string() }
    }
}

//! The errors of this crate.

use crate::adapter::files::AdapterFileError;
use crate::dit::role::Role;
use crate::weights::WeightsError;

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a model: its weights, its inputs, or the tensor library below.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tensor library refused an operation.
    #[error(transparent)]
    Tensor(#[from] kernels::Error),
    /// A checkpoint could not be read or does not fit the model.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// An adapter file was refused, or could not be written.
    #[error(transparent)]
    AdapterFile(#[from] AdapterFileError),
    /// A config file, an input shape or an adapter does not fit the model; the message says which, and what to do.
    #[error("{0}")]
    Mismatch(String),
    /// A result is not finite: weights or inputs are damaged.
    #[error("{what} is not finite: the weights or the input are damaged")]
    NotFinite {
        /// What was computed.
        what: &'static str,
    },
    /// A band of a frame that others wait for failed; its own error says why.
    #[error("another band of the frame stopped")]
    BandStopped,
    /// A device that others share the tokens of a call with failed; its own error says why.
    #[error("another device of the call stopped")]
    PeerStopped,
    /// The model reads conditioning that it was not given.
    #[error("this model reads {what} and was given none (role `{role}`)", what = role.what())]
    RoleMissing {
        /// Which.
        role: Role,
    },
    /// The model was given conditioning that it does not read.
    #[error("the model was given {what}, which it does not read (role `{role}`); leave it out", what = role.what())]
    RoleUnread {
        /// Which.
        role: Role,
    },
}

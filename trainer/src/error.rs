//! What can go wrong in the trainer.

/// The result of anything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a run. [`Error::is_users`] tells which ones the user can fix.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tensor library refused an operation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// A model, its weights or its adapters.
    #[error(transparent)]
    Model(#[from] models::Error),
    /// A sampling schedule that cannot be, or its steps out of order.
    #[error(transparent)]
    Solver(#[from] crate::solver::SolverError),
    /// The TensorBoard events could not be written.
    #[error(transparent)]
    Tensorboard(#[from] crate::tensorboard::TensorboardError),
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
}

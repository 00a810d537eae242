//! Proofs.

mod weights;
mod weights_corrupted;

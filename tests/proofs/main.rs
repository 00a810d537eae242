//! Proofs.

mod vae;
mod vae_ops;
mod weights;
mod weights_corrupted;

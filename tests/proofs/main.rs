//! Proofs.

mod tokenizer;
mod umt5;
mod vae;
mod vae_ops;
mod weights;
mod weights_corrupted;

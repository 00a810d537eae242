//! The proofs: each claim of Tandem with the test that would catch the plausible bug.

mod adapter_files;
mod data_cache;
mod data_decode;
mod data_pipeline;
mod dit;
mod gradients;
mod probe;
mod solver;
mod tensorboard;
mod tokenizer;
mod umt5;
mod vae;
mod vae_ops;
mod weights;
mod weights_corrupted;

//! The proofs: each claim of Tandem with the test that would catch the plausible bug.

mod accumulate;
mod adapter_files;
mod data_cache;
mod data_decode;
mod data_pipeline;
mod dit;
mod export;
mod gradients;
mod noise;
mod overfit;
mod pipeline;
mod plan;
mod probe;
mod real_sizes;
mod recipes;
mod sampling;
mod solver;
mod tensorboard;
mod tidy;
mod tokenizer;
mod umt5;
mod vae;
mod vae_ops;
mod weight;
mod weights;
mod weights_corrupted;

//! Proofs.
mod data_cache;
mod data_decode;
mod data_pipeline;

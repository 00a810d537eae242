//! Helpers of the proofs.
pub mod film;

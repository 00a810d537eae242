//! Helpers of the proofs.

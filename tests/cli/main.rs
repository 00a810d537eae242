//! The program as its users meet it: bad inputs, interruptions, full disks, output for machines.

// This package denies unwrap, and clippy takes helpers of tests for shipped code.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod clips;
mod desk;
mod machines;
mod models;
mod runs;

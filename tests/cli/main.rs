//! The program as its users meet it: bad inputs, interruptions, full disks, output for machines.

// Helpers of tests are outside of `#[test]` functions, where the lint does not know them for what they are.
#![allow(clippy::unwrap_used)]

mod adapters;
mod assumed;
mod best;
mod captioning;
mod captions;
mod clips;
mod comfy;
mod compare;
mod concurrent;
mod datasets;
mod desk;
mod endpoint;
mod experts;
mod few_steps;
mod ffmpeg;
mod hostile;
mod learning;
mod machines;
mod magcache;
mod models;
mod outputs;
mod phases;
mod pictures;
mod quality;
mod recipes;
mod replicas;
mod runs;
mod sampling;
mod serve;
mod server;
mod stops;
mod webhook;

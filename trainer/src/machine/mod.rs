//! What a run has to work on: devices, precision, memory, and the forecast of what a step takes.

pub mod devices;
pub mod forecast;
pub mod memory;
pub mod precision;
pub mod products;
pub mod replica_devices;

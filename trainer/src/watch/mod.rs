//! What a run says while it works: the terminal, logs, TensorBoard, and the wish to stop.

pub mod interrupt;
pub mod metrics;
pub mod tensorboard;
pub mod ui;

//! Output and interruption of a run: the terminal, logs, TensorBoard, webhooks, and Ctrl-C.

pub mod interrupt;
pub mod metrics;
pub mod tensorboard;
pub mod ui;
pub mod webhook;

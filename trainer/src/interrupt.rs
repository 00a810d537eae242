//! Ctrl-C: the first asks the run to stop after its step, the second ends the process at once.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// The exit code of a run that was interrupted, as shells have it (128 + SIGINT).
pub const INTERRUPTED: u8 = 130;

/// Whether the user asked to stop.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    asked: Arc<AtomicBool>,
}

impl Interrupt {
    /// Listens for Ctrl-C and for the system's request to end.
    ///
    /// # Errors
    /// When the system refuses; the run then simply ends at Ctrl-C.
    pub fn listen() -> std::result::Result<Self, ctrlc::Error> {
        let interrupt = Self::default();
        let asked = Arc::clone(&interrupt.asked);
        ctrlc::set_handler(move || {
            if asked.swap(true, Ordering::SeqCst) {
                std::process::exit(i32::from(INTERRUPTED));
            }
            crate::ui::complain("\nstopping after this step and saving; press Ctrl-C again to stop at once");
        })?;
        Ok(interrupt)
    }

    /// What a loop that can be broken off does next.
    pub fn flow(&self) -> ControlFlow<()> {
        if self.is_asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Stops work that keeps what it finished.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when the user asked to stop.
    pub fn check(&self) -> Result<()> {
        if self.is_asked() { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// Whether the user asked to stop.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }
}

//! Ctrl-C and the system's request to end: the first asks the command to stop, the second ends the process at once. A command
//! that saves its state also stops at SIGUSR1, by which job schedulers announce the end of a job.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{Error, Result};

/// The exit code of a run that was interrupted, as shells have it (128 + SIGINT).
pub const INTERRUPTED: u8 = 130;
/// The exit code of a run that a second Ctrl-C ended before its state was saved.
pub const NOT_SAVED: u8 = 131;

/// How a command reacts when the user asks it to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnStop {
    /// It finishes the current step and saves its state.
    Save,
    /// It ends after the current item; finished items are kept.
    Finish,
    /// The same, but it ends within 3 seconds even in the middle of an item, which could not be kept anyway.
    Leave,
}

/// How long a command without state may continue after it was asked to stop.
const GRACE: Duration = Duration::from_secs(3);

impl OnStop {
    /// The message at the first request to stop.
    fn promise(self) -> &'static str {
        match self {
            Self::Save => {
                "\nstopping after this step and saving; press Ctrl-C again to stop at once without saving"
            }
            Self::Finish => "\nstopping; what is finished is kept. Press Ctrl-C again to stop at once",
            Self::Leave => "\nstopping",
        }
    }

    /// The message at the second request, and the exit code.
    fn at_once(self) -> (&'static str, u8) {
        match self {
            Self::Save => ("stopped at once: the steps since the last checkpoint are not saved", NOT_SAVED),
            Self::Finish | Self::Leave => ("stopped at once", INTERRUPTED),
        }
    }
}

/// Whether the user asked to stop.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    asked: Arc<AtomicBool>,
}

impl Interrupt {
    /// Listens for Ctrl-C and for the system's request to end (SIGTERM), in a command that has no state to save.
    ///
    /// # Errors
    /// If the system refuses; Ctrl-C then ends the process at once.
    pub fn listen() -> std::result::Result<Self, ctrlc::Error> {
        Self::listen_to(OnStop::Finish)
    }

    /// The same, in a command that reacts as `on_stop` says.
    ///
    /// # Errors
    /// As [`Self::listen`].
    pub fn listen_to(on_stop: OnStop) -> std::result::Result<Self, ctrlc::Error> {
        let interrupt = Self::default();
        // Job schedulers announce the end of a job with it.
        #[cfg(unix)]
        if on_stop == OnStop::Save {
            signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&interrupt.asked))
                .map_err(ctrlc::Error::System)?;
        }
        let asked = Arc::clone(&interrupt.asked);
        ctrlc::set_handler(move || {
            if asked.swap(true, Ordering::SeqCst) {
                let (words, code) = on_stop.at_once();
                crate::watch::ui::complain(words);
                std::process::exit(i32::from(code));
            }
            crate::watch::ui::complain(on_stop.promise());
            if on_stop == OnStop::Leave {
                std::thread::spawn(|| {
                    std::thread::sleep(GRACE);
                    std::process::exit(i32::from(INTERRUPTED));
                });
            }
        })?;
        Ok(interrupt)
    }

    /// Asks the command to stop, as a signal would.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
    }

    /// Whether a loop that can be interrupted continues.
    pub fn flow(&self) -> ControlFlow<()> {
        if self.is_asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Stops work whose finished items are kept.
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

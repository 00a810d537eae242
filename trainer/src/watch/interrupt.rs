//! Ctrl-C and the system's request to end: the first asks the command to stop, the second ends the process at once.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{Error, Result};

/// The exit code of a run that was interrupted, as shells have it (128 + SIGINT).
pub const INTERRUPTED: u8 = 130;
/// The exit code of a run that a second Ctrl-C ended before its state was saved.
pub const NOT_SAVED: u8 = 131;

/// What a command does when the user asks it to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnStop {
    /// It finishes its step and saves its state.
    Save,
    /// It ends after the item in hand; what is finished stays.
    Finish,
    /// The same, but it ends within 3 seconds even in the middle of an item: nothing is lost that could be kept.
    Leave,
}

/// How long a command that has nothing to save may go on after it was asked to stop.
const GRACE: Duration = Duration::from_secs(3);

impl OnStop {
    /// What is said when the user asks to stop.
    fn promise(self) -> &'static str {
        match self {
            Self::Save => {
                "\nstopping after this step and saving; press Ctrl-C again to stop at once without saving"
            }
            Self::Finish => "\nstopping; what is finished is kept. Press Ctrl-C again to stop at once",
            Self::Leave => "\nstopping",
        }
    }

    /// What is said when the user asks again, and the exit code.
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
    /// Listens for Ctrl-C and for the system's request to end, in a command that has no state to save.
    ///
    /// # Errors
    /// When the system refuses; the run then simply ends at Ctrl-C.
    pub fn listen() -> std::result::Result<Self, ctrlc::Error> {
        Self::listen_to(OnStop::Finish)
    }

    /// The same in a command that does `on_stop`.
    ///
    /// # Errors
    /// As there.
    pub fn listen_to(on_stop: OnStop) -> std::result::Result<Self, ctrlc::Error> {
        let interrupt = Self::default();
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

//! Work that runs in another thread, one piece at a time.

use std::thread::{self, JoinHandle};

use crate::error::Result;

/// A thread that does one piece of work at a time. Dropping it waits for the piece under way.
#[derive(Debug)]
pub struct Background<T> {
    running: Option<JoinHandle<Result<T>>>,
}

impl<T> Default for Background<T> {
    fn default() -> Self {
        Self { running: None }
    }
}

impl<T: Send + 'static> Background<T> {
    /// Starts `work` and returns at once, unless another piece is under way: then it waits for that one first.
    ///
    /// # Errors
    /// Those of the piece before; `work` is not started then.
    pub fn start(&mut self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<()> {
        self.wait()?;
        self.running = Some(thread::spawn(work));
        Ok(())
    }

    /// Looks, without waiting, whether the piece under way has failed.
    ///
    /// # Errors
    /// Those of a piece that has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.running.take_if(|running| running.is_finished()) {
            Some(running) => joined(running).map(drop),
            None => Ok(()),
        }
    }

    /// Waits for the piece under way and gives what it came to; `None` where there is none.
    ///
    /// # Errors
    /// Those of the piece.
    pub fn wait(&mut self) -> Result<Option<T>> {
        self.running.take().map(joined).transpose()
    }
}

fn joined<T>(running: JoinHandle<Result<T>>) -> Result<T> {
    running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

impl<T> Drop for Background<T> {
    fn drop(&mut self) {
        // Whoever drops it unasked has an error of their own to tell.
        if let Some(running) = self.running.take() {
            let _ = running.join();
        }
    }
}

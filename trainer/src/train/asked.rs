//! What is asked of a run while it trains: an adapter file or a set of clips at the next step. Whoever asks makes an empty file
//! in the folder `requests` of the run, which is removed when the request is met. Neither changes what is trained.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::saving::Keep;
use super::{Run, RunFolder};
use crate::error::{Error, Result};
use crate::sample::CONTACT_SHEET;
use crate::watch::interrupt::Interrupt;

/// Something that a run does when it is asked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Make the clips of the recipe.
    Sample,
    /// Save a checkpoint, with the adapter files of the step.
    Save,
}

impl Asked {
    fn file(self, run: &Path) -> PathBuf {
        run.join("requests").join(match self {
            Self::Sample => "sample",
            Self::Save => "save",
        })
    }

    /// Asks the run in the folder `run` for it, which does it after its current step.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn of(self, run: &Path) -> Result<()> {
        let path = self.file(run);
        let made = path.parent().map_or(Ok(()), fs::create_dir_all);
        made.and_then(|()| fs::write(&path, b"")).map_err(|source| Error::Io {
            action: "write",
            path,
            source,
        })
    }

    /// Whether the run was asked for it since this was looked at last.
    fn take(self, folder: &RunFolder) -> Result<bool> {
        let path = self.file(folder.root());
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
            Err(source) => Err(Error::Io { action: "remove", path, source }),
        }
    }
}

impl Run<'_> {
    /// Meets what was asked for since the step before.
    pub(super) fn meet_requests(&mut self, interrupt: &Interrupt) -> Result<()> {
        if !self.replicas.is_first() {
            return Ok(());
        }
        let step = self.progress.step;
        if Asked::Sample.take(self.folder)? {
            let is_there = self.folder.samples(step).join(CONTACT_SHEET).is_file();
            match self.plan.sample.clips.is_empty() {
                true => self.ui.note("clips were asked for, and the recipe has no sample.prompts"),
                false if !is_there => self.sample(interrupt)?,
                false => {}
            }
        }
        if Asked::Save.take(self.folder)? && self.saved_step != Some(step) {
            // Adapter files of several replicas are compared first, which all of them take part in.
            self.save(if self.replicas.world() == 1 { Keep::Step } else { Keep::State })?;
        }
        Ok(())
    }
}

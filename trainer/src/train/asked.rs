//! What is asked of a run while it trains, at the next step. Whoever asks makes a file in the folder `requests` of the run, which is
//! removed when the request is met. Only a learning rate changes what is trained, and the run remembers it (`told.rs`).

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use super::saving::Keep;
use super::told::ToldRate;
use super::{Run, RunFolder, lock};
use crate::bounds;
use crate::error::{Error, Result};
use crate::sample::CONTACT_SHEET;
use crate::watch::interrupt::Interrupt;
use crate::watch::metrics::ToldRow;

/// Forgets what was asked of an earlier process alone: it would stop this one.
pub(super) fn forget(folder: &RunFolder) -> Result<()> {
    for asked in [Asked::Stop, Asked::Pause, Asked::Continue] {
        asked.take(folder)?;
    }
    Ok(())
}

/// How often a run that is paused looks for what it is asked.
const GLANCE: Duration = Duration::from_millis(200);

/// Something that a run does when it is asked to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Asked {
    /// Make the clips of the recipe.
    Sample,
    /// Save a checkpoint, with the adapter files of the step.
    Save,
    /// Save a checkpoint and end, as at Ctrl-C.
    Stop,
    /// Make no further step; models stay on their devices.
    Pause,
    /// Go on after a pause.
    Continue,
    /// Take this learning rate in place of `optimizer.lr` from the next step on.
    Rate(f64),
}

impl FromStr for Asked {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        Ok(match text {
            "sample" => Self::Sample,
            "save" => Self::Save,
            "stop" => Self::Stop,
            "pause" => Self::Pause,
            "continue" => Self::Continue,
            _ => match text.strip_prefix("lr=") {
                Some(rate) => Self::Rate(rate_of(rate)?),
                None => {
                    return Err(format!(
                        "a run can be told sample, save, stop, pause, continue or lr=5e-5, not \"{text}\""
                    ));
                }
            },
        })
    }
}

/// A learning rate in words.
fn rate_of(text: &str) -> std::result::Result<f64, String> {
    let rate: Option<f64> = text.trim().parse().ok();
    rate.filter(|rate| (0.0..=bounds::REAL).contains(rate))
        .ok_or_else(|| format!("\"{text}\" is no learning rate; write a number such as 5e-5"))
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Rate(rate) => write!(f, "lr={rate}"),
            other => f.write_str(other.name()),
        }
    }
}

impl Asked {
    /// The name of the request's file.
    fn name(self) -> &'static str {
        match self {
            Self::Sample => "sample",
            Self::Save => "save",
            Self::Stop => "stop",
            Self::Pause => "pause",
            Self::Continue => "continue",
            Self::Rate(_) => "lr",
        }
    }

    fn file(self, run: &Path) -> PathBuf {
        run.join("requests").join(self.name())
    }

    /// Asks the run in the folder `run` for it, which does it after its current step.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn of(self, run: &Path) -> Result<()> {
        let path = self.file(run);
        let contents = if let Self::Rate(rate) = self { rate.to_string() } else { String::new() };
        let made = path.parent().map_or(Ok(()), fs::create_dir_all);
        made.and_then(|()| {
            data::atomic::write(&path, |file| std::io::Write::write_all(file, contents.as_bytes()))
        })
        .map_err(|source| Error::Io { action: "write", path, source })
    }

    /// The same, of a run that a process is training now.
    ///
    /// # Errors
    /// As [`Self::of`], and a folder in which nobody trains.
    pub fn of_running(self, run: &Path) -> Result<()> {
        match lock::is_held(run)? {
            true => self.of(run),
            false => Err(Error::NotTraining { folder: run.to_owned() }),
        }
    }

    /// What the request's file says, if the run was asked since this was looked at last.
    fn take(self, folder: &RunFolder) -> Result<Option<String>> {
        let path = self.file(folder.root());
        let taken = fs::read_to_string(&path).and_then(|text| fs::remove_file(&path).map(|()| text));
        match taken {
            Ok(text) => Ok(Some(text)),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
            Err(source) => Err(Error::Io { action: "take", path, source }),
        }
    }

    fn is_taken(self, folder: &RunFolder) -> Result<bool> {
        Ok(self.take(folder)?.is_some())
    }
}

impl Run<'_> {
    /// Meets what was asked for since the step before. Rank 0 alone is asked.
    pub(super) fn meet_requests(&mut self, interrupt: &Interrupt) -> Result<()> {
        let step = self.progress.step;
        let mut rate = None;
        if self.replicas.is_first() {
            self.meet_samples_and_saves(interrupt)?;
            self.pause(interrupt)?;
            if Asked::Stop.is_taken(self.folder)? {
                interrupt.ask();
            }
            rate = match Asked::Rate(0.0).take(self.folder)?.map(|text| rate_of(&text)) {
                Some(Err(reason)) => {
                    self.ui.note(&format!("requests/lr: {reason}"));
                    None
                }
                Some(Ok(rate)) => Some(rate),
                None => None,
            };
        }
        if self.replicas.world() > 1 {
            // No rate is a number that is none.
            let bytes = self.replicas.broadcast(rate.unwrap_or(f64::NAN).to_le_bytes().to_vec())?;
            let told = bytes.try_into().map_or(f64::NAN, f64::from_le_bytes);
            rate = Some(told).filter(|told| !told.is_nan());
        }
        if let Some(lr) = rate {
            self.told.note(ToldRate { step, lr });
            if self.replicas.is_first() {
                self.told.save()?;
            }
        }
        self.log_told()
    }

    /// Logs the rate that was told after the newest step, now or before a resume.
    fn log_told(&mut self) -> Result<()> {
        let step = self.progress.step;
        let Some(lr) = self.told.at(step) else { return Ok(()) };
        self.log.told(&ToldRow { step, told: Asked::Rate(lr).to_string() })?;
        self.ui.note(&format!("told lr={lr}: in place of optimizer.lr from step {} on", step + 1));
        Ok(())
    }

    fn meet_samples_and_saves(&mut self, interrupt: &Interrupt) -> Result<()> {
        let step = self.progress.step;
        if Asked::Sample.is_taken(self.folder)? {
            let is_there = self.folder.samples(step).join(CONTACT_SHEET).is_file();
            match self.plan.sample.clips.is_empty() {
                true => self.ui.note("clips were asked for, and the recipe has no sample.prompts"),
                false if !is_there => self.sample(interrupt)?,
                false => {}
            }
        }
        if Asked::Save.is_taken(self.folder)? && self.saved_step != Some(step) {
            // Adapter files of several replicas are compared first, which all of them take part in.
            self.save(if self.replicas.world() == 1 { Keep::Step } else { Keep::State })?;
        }
        Ok(())
    }

    /// Waits where a pause was asked for, until the run is to go on or to stop.
    fn pause(&mut self, interrupt: &Interrupt) -> Result<()> {
        if !Asked::Pause.is_taken(self.folder)? {
            return Ok(());
        }
        let step = self.progress.step;
        self.ui.note(&format!(
            "paused after step {step}: `tandem tell {} continue` goes on, stop saves and ends",
            self.folder.root().display()
        ));
        // What is asked for meanwhile is done meanwhile.
        while !interrupt.is_asked() && !Asked::Stop.file(self.folder.root()).exists() {
            if Asked::Continue.is_taken(self.folder)? {
                self.ui.note("going on");
                return Ok(());
            }
            self.meet_samples_and_saves(interrupt)?;
            thread::sleep(GLANCE);
        }
        Ok(())
    }
}

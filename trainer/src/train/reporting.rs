//! The report of the run, written anew as it goes.

use std::time::{Duration, Instant, SystemTime};

use super::Run;
use crate::plan::Planned;
use crate::report::{self, Facts};

/// How old a report gets at most while steps are made.
const AGE: Duration = Duration::from_secs(60);

/// When the report was written, and what it shows besides the log.
pub(super) struct Reporting {
    facts: Facts,
    written: Option<Instant>,
    /// Whether a failure was told.
    has_failed: bool,
}

impl Reporting {
    pub fn new(planned: &Planned) -> Self {
        let notes = planned.notes.iter().chain(&planned.dataset.notes).chain(&planned.dataset.skipped);
        let facts = Facts {
            forecast: planned.forecast.to_string(),
            notes: notes.cloned().collect(),
            state: String::new(),
        };
        Self { facts, written: None, has_failed: false }
    }
}

impl Run<'_> {
    /// Writes the report if it is older than a minute.
    pub(super) fn report_if_old(&mut self) {
        if self.reporting.written.is_none_or(|written| written.elapsed() > AGE) {
            self.report("trains");
        }
    }

    /// Writes the report of a run that is at `state`. A report that cannot be written stops no run: the reason is told once.
    pub(super) fn report(&mut self, state: &str) {
        if !self.replicas.is_first() {
            return;
        }
        let (step, steps) = (self.progress.step, self.plan.train.steps);
        let now = humantime::format_rfc3339_seconds(SystemTime::now());
        self.reporting.facts.state = format!("{state}: step {step} of {steps}, written at {now}");
        let written = report::write(self.folder.root(), self.plan, &self.reporting.facts);
        self.reporting.written = Some(Instant::now());
        if let Err(error) = written
            && !self.reporting.has_failed
        {
            self.reporting.has_failed = true;
            self.ui.note(&format!("there is no report: {error}"));
        }
    }
}

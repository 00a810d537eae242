//! What is kept of a run: checkpoints and adapter files, written by another thread from a snapshot, so that the devices
//! wait only while the snapshot is taken.

use std::path::PathBuf;
use std::sync::Arc;

use models::adapter::files::AdapterFile;
use models::expert::Expert;

use super::start::{Digested, digest};
use super::{Run, RunFolder};
use crate::error::{Error, Result};
use crate::learning::optim::{Saved, adapter_file, on_host};
use crate::machine::products::Products;
use crate::plan::Plan;
use crate::replicas::ReplicaError;
use crate::train::checkpoint::{self, Progress};
use crate::train::export::{self, Part};

/// What is written after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// A checkpoint alone.
    State,
    /// The adapter files of the step, then a checkpoint: a run that is killed in between resumes from the checkpoint before
    /// and writes the files again.
    Step,
    /// The last checkpoint, then the adapter files of the run.
    Last,
    /// The adapter files of a run whose last checkpoint is there.
    Files,
}

/// A run after a step, in host memory of its own: the states on the devices change in place while this is written.
struct Snapshot {
    keep: Keep,
    progress: Progress,
    saved: Saved,
    adapters: Vec<(Option<Expert>, AdapterFile)>,
}

impl Run<'_> {
    /// Takes a snapshot and has it written, after the one before is.
    ///
    /// # Errors
    /// What stood in the way of the one before, or of making the logs safe.
    pub(super) fn save(&mut self, keep: Keep) -> Result<()> {
        // Before the snapshot is taken: host memory holds one at a time.
        self.finish_saving()?;
        let step = self.progress.step;
        if self.replicas.world() > 1 && matches!(keep, Keep::Step | Keep::Last) {
            self.compare()?;
        }
        if !self.replicas.is_first() {
            self.log.sync()?;
            self.saved_step = Some(step);
            return Ok(());
        }
        if keep != Keep::Files {
            let lengths = self.log.sync().map_err(|cause| not_saved(step, cause))?;
            (self.progress.metrics_bytes, self.progress.events_bytes) = lengths;
            self.saved_step = Some(step);
        }
        if let Some(products) = Products::of(self.networks.residents().devices()) {
            products.store(&self.folder.products())?;
        }
        let ui = self.ui.clone();
        let snapshot = ui.phase("copying the state", || self.snapshot(keep))?;
        let (plan, folder) = (Arc::clone(&self.settings), self.folder.clone());
        self.writer.start(move || ui.phase("writing the state", || snapshot.write(&plan, &folder)))
    }

    /// Waits until everything that was handed to the writer is on the disk. The adapter files written last.
    ///
    /// # Errors
    /// What stood in the way, and that the state before is whole.
    pub(super) fn finish_saving(&mut self) -> Result<Vec<PathBuf>> {
        Ok(self.writer.wait()?.unwrap_or_default())
    }

    /// Compares the adapters of all replicas, which have made the same updates of the same bits.
    fn compare(&mut self) -> Result<()> {
        let own = digest(&self.networks.saved(), Digested::Parameters)?;
        let digests = self.replicas.gather(&own)?;
        let differ = (1..digests.len()).filter(|rank| digests[*rank] != digests[0]);
        let ranks: Vec<String> = differ.map(|rank| rank.to_string()).collect();
        match ranks.is_empty() {
            true => Ok(()),
            false => Err(ReplicaError::Diverged { ranks: ranks.join(", "), step: self.progress.step }.into()),
        }
    }

    fn snapshot(&mut self, keep: Keep) -> Result<Snapshot> {
        let saved = on_host(&self.networks.saved())?;
        let mut adapters = Vec::new();
        if keep != Keep::State {
            for index in self.networks.order() {
                let is_pair = self.networks.len() > 1;
                let expert = self.networks.range(index).expert();
                let (pipeline, optimizer) = self.networks.for_files(index)?;
                let own = checkpoint::part_of(&saved, expert.filter(|_| is_pair));
                adapters.push((expert, adapter_file(pipeline, optimizer.in_files(), &own.tensors)?));
            }
        }
        Ok(Snapshot { keep, progress: self.progress, saved, adapters })
    }
}

impl Snapshot {
    /// Writes what is to be kept. The adapter files.
    fn write(mut self, plan: &Plan, folder: &RunFolder) -> Result<Vec<PathBuf>> {
        let step = self.progress.step;
        let state = |snapshot: &Self| {
            let Self { progress, saved, .. } = snapshot;
            checkpoint::save(&folder.checkpoints(), *progress, saved, plan.checkpoint.keep_last)
                .map_err(|cause| not_saved(step, cause))
        };
        let label = format!("step-{step:06}");
        match self.keep {
            Keep::State => state(&self).map(|_| Vec::new()),
            Keep::Step => {
                let written = self.write_files(plan, folder, Some(&label))?;
                state(&self).map(|_| written)
            }
            Keep::Last => {
                state(&self)?;
                self.write_files(plan, folder, None)
            }
            Keep::Files => self.write_files(plan, folder, None),
        }
    }

    fn write_files(&mut self, plan: &Plan, folder: &RunFolder, label: Option<&str>) -> Result<Vec<PathBuf>> {
        let made = (self.progress.step, self.progress.cursor.epoch);
        let mut written = Vec::new();
        for (expert, file) in std::mem::take(&mut self.adapters) {
            let part = Part { label, expert };
            written.extend(export::write(plan, file, made, &folder.adapters(), part)?);
        }
        written.sort();
        Ok(written)
    }
}

fn not_saved(step: u64, cause: Error) -> Error {
    Error::NotSaved { step, cause: Box::new(cause) }
}

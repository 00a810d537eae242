//! An adapter that a network has for clips alone: a distilled one lets a run make them in a few steps.
//!
//! Low-rank changes are attached beside the weights. Changes of whole tensors are read from the disk with the weights, and
//! the weights are read again without them when the clips are made, so that training sees the same bits.

use std::path::PathBuf;

use models::adapter::{Adapters, ApplyMode};
use models::dit::Base;
use models::expert::Expert;
use models::weights::Weights;

use crate::adapters::start_on::{Fused, opened};
use crate::adapters::{put, source};
use crate::base::DitFiles;
use crate::error::Result;
use crate::pipeline::Pipeline;
use crate::watch::ui::Ui;

/// An adapter for clips, ready to be applied.
pub(super) struct ClipAdapter {
    adapters: Adapters,
    with: Weights,
    without: Weights,
    base: Base,
}

impl ClipAdapter {
    /// Reads the `adapters`, each with its strength, for the network of `files`, which is held as `base` says and has those that are
    /// `fused` for its expert in its weights; `None` where there are none.
    ///
    /// # Errors
    /// What is no adapter, or one for another model.
    pub fn open(
        adapters: &[(PathBuf, f64)],
        (files, fused): (&DitFiles, (&[Fused], Option<Expert>)),
        base: Base,
        ui: &Ui,
    ) -> Result<Option<Self>> {
        let read = adapters.iter().map(|(path, strength)| source(path, *strength, ui));
        let sources = read.collect::<Result<Vec<_>>>()?;
        if sources.is_empty() {
            return Ok(None);
        }
        let ((config, weights), (_, without)) = (opened(files, fused, ui)?, opened(files, fused, ui)?);
        let (adapters, with) = put(&sources, &config, weights, ApplyMode::Unmerged, ui)?;
        Ok(Some(Self { adapters, with, without, base }))
    }

    /// Applies it.
    pub fn apply(&self, pipeline: &mut Pipeline) -> Result<()> {
        for stage in pipeline.stages_mut() {
            stage.dit.reload(&self.with, &self.with, self.base, &stage.device)?;
            stage.attach(&self.adapters)?;
        }
        Ok(())
    }

    /// Removes it again.
    pub fn remove(&self, pipeline: &mut Pipeline) -> Result<()> {
        for stage in pipeline.stages_mut() {
            stage.adapters.drop_frozen();
            stage.dit.reload(&self.without, &self.with, self.base, &stage.device)?;
        }
        Ok(())
    }
}

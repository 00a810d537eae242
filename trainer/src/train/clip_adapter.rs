//! The second adapter of a run, which is used for clips alone: a distilled one lets them be made in a few steps.
//!
//! It is put to the model for the moment. What goes beside the weights is attached; what goes into them is read from the
//! disk with the change in it, and read again without it when the clips are made, so that training sees the same bits.

use models::adapter::{Adapters, ApplyMode};
use models::dit::Base;
use models::expert::Expert;
use models::weights::Weights;

use crate::adapters::{put, source};
use crate::error::Result;
use crate::pipeline::Pipeline;
use crate::plan::Plan;
use crate::watch::ui::Ui;

/// An adapter for clips, ready to be put on.
pub(super) struct ClipAdapter {
    adapters: Adapters,
    with: Weights,
    without: Weights,
    base: Base,
}

impl ClipAdapter {
    /// Reads the adapters of the plan for the network of `expert`; `None` where it names none.
    ///
    /// # Errors
    /// What is no adapter, or one for another model.
    pub fn open(plan: &Plan, expert: Option<Expert>, ui: &Ui) -> Result<Option<Self>> {
        let read = plan.sample.adapters_of(expert).map(|one| source(&one.path, one.strength, ui));
        let sources = read.collect::<Result<Vec<_>>>()?;
        if sources.is_empty() {
            return Ok(None);
        }
        let open = || match expert {
            Some(expert) => plan.model.dits.of(expert).open(),
            None => plan.model.open_dit(),
        };
        let ((config, weights), (_, without)) = (open()?, open()?);
        let (adapters, with) = put(&sources, &config, weights, ApplyMode::Unmerged, ui)?;
        Ok(Some(Self { adapters, with, without, base: plan.model.precision.dit() }))
    }

    /// Puts it to the model.
    pub fn put_on(&self, pipeline: &mut Pipeline) -> Result<()> {
        for stage in pipeline.stages_mut() {
            stage.dit.reload(&self.with, &self.with, self.base, &stage.device)?;
            stage.attach(&self.adapters)?;
        }
        Ok(())
    }

    /// Takes it off again.
    pub fn take_off(&self, pipeline: &mut Pipeline) -> Result<()> {
        for stage in pipeline.stages_mut() {
            stage.adapters.drop_frozen();
            stage.dit.reload(&self.without, &self.with, self.base, &stage.device)?;
        }
        Ok(())
    }
}

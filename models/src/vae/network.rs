//! An encoder or a decoder: stages run chunk by chunk.

use std::ops::ControlFlow;

use kernels::resample::{average_down, duplicate_up};
use kernels::{Tensor, video};

use crate::Result;

use super::bands::Rows;
use super::parts::{Builder, History, Part};
use super::plan::{Shortcut, StagePlan};

/// Sees the output of every stage: the stage's diffusers name and the chunk's tensor `[B,C,T,H,W]`.
pub type Probe<'a> = dyn FnMut(&str, &Tensor) + 'a;

#[derive(Debug, Clone)]
struct Stage {
    label: String,
    parts: Vec<Part>,
    shortcut: Shortcut,
}

/// Stages that run in sequence.
#[derive(Debug, Clone)]
pub(super) struct Network {
    stages: Vec<Stage>,
    slots: usize,
}

impl Network {
    /// Reads the stages of `plan`.
    pub(super) fn build(plan: &[StagePlan], builder: &mut Builder) -> Result<Self> {
        builder.slots = 0;
        let mut stages = Vec::with_capacity(plan.len());
        for stage in plan {
            let parts = stage.parts.iter().map(|part| builder.part(part)).collect::<Result<_>>()?;
            stages.push(Stage { label: stage.label.clone(), parts, shortcut: stage.shortcut });
        }
        Ok(Self { stages, slots: builder.slots })
    }

    pub(super) fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.stages.iter_mut().flat_map(|stage| &mut stage.parts).flat_map(Part::tensors_mut)
    }

    /// Runs a clip in the given chunks of frames; the outputs are joined in time.
    ///
    /// The chunks define the result: resampling in time treats the first chunk differently.
    pub(super) fn run(
        &self,
        x: &Tensor,
        chunks: impl Iterator<Item = (usize, usize)>,
        probe: &mut Option<&mut Probe>,
    ) -> Result<Tensor> {
        let mut outputs = Vec::new();
        self.run_each(x, (chunks, Rows::All), probe, &mut |h| {
            outputs.push(h.contiguous()?);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Tensor::cat(&outputs, 2)?)
    }

    /// [`Self::run`] on some or all rows, giving each chunk's output to `each` instead of joining them; `each` may break off.
    pub(super) fn run_each(
        &self,
        x: &Tensor,
        (chunks, rows): (impl Iterator<Item = (usize, usize)>, Rows),
        probe: &mut Option<&mut Probe>,
        each: &mut dyn FnMut(Tensor) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let mut history = History::of(self.slots, rows);
        for (start, frames) in chunks {
            let mut h = x.narrow(2, start, frames)?.contiguous()?;
            for stage in &self.stages {
                h = stage.forward(h, start == 0, &mut history)?;
                if let Some(probe) = probe {
                    probe(&stage.label, &h);
                }
            }
            if each(h)?.is_break() {
                break;
            }
        }
        Ok(())
    }
}

impl Stage {
    fn forward(&self, x: Tensor, is_first_chunk: bool, history: &mut History) -> Result<Tensor> {
        // Without a shortcut nothing needs the input once the first part has run.
        let input = (self.shortcut != Shortcut::None).then(|| x.clone());
        let h = self.parts.iter().try_fold(x, |h, part| part.forward(h, history))?;
        let Some(x) = &input else { return Ok(h) };
        match self.shortcut {
            Shortcut::None => Ok(h),
            Shortcut::AverageDown { to, time, space } => {
                Ok(video::add(&h, &average_down(x, to, time, space)?)?)
            }
            Shortcut::DuplicateUp { to, time, space } => {
                let copies = duplicate_up(x, to, time, space)?;
                // The first chunk is one frame, which the network does not double either.
                let skipped = if is_first_chunk { time - 1 } else { 0 };
                Ok(video::add(&h, &copies.narrow(2, skipped, copies.dim(2)? - skipped)?)?)
            }
        }
    }
}

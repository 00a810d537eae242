//! Calls that reuse what a stage's blocks added to the stream in an earlier call, or measure it.

use std::collections::HashMap;

use kernels::{DType, Tensor, residual};
use models::dit::{Context, Streams};

use super::Stage;
use crate::error::Result;

/// What becomes of the blocks in a call. Calls whose residuals belong together are a lane.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Blocks {
    /// They run.
    #[default]
    Run,
    /// They run, and each stage keeps what they added to the stream for a later call of the lane.
    Keep {
        /// Which lane.
        lane: usize,
    },
    /// They do not run: each stage adds what it keeps of the lane.
    Skip {
        /// Which lane.
        lane: usize,
        /// Whether no later call needs it.
        is_last: bool,
    },
    /// They run, and what all stages together added is held against the call of the lane before.
    Measure {
        /// Which lane.
        lane: usize,
    },
}

/// How what the blocks added in a call differs from the call of its lane before, over the tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// The call.
    pub call: usize,
    /// Mean of the ratios of the norms.
    pub ratio: f64,
    /// Their standard deviation, unbiased.
    pub deviation: f64,
    /// Mean of 1 - the cosine of the angle between the two.
    pub turn: f64,
}

/// The side stream on which the stream before the first block travels to the last stage, where it is measured.
const ENTRY: &str = "entry of the blocks";

/// What a stage keeps from call to call.
#[derive(Debug, Default)]
pub(super) struct Residuals {
    by_lane: HashMap<usize, Tensor>,
    /// What was measured so far, on the last stage.
    pub changes: Vec<Change>,
}

/// The streams before the first block, with what is needed to measure what all blocks add.
pub(crate) fn with_entry(mut streams: Streams) -> Streams {
    streams.put(ENTRY, streams.main.clone());
    streams
}

impl Residuals {
    /// The streams behind the blocks of `stage`, forward only, in call `m`.
    pub fn through(
        &mut self,
        stage: &Stage,
        streams: Streams,
        context: &Context,
        (m, blocks): (usize, Blocks),
    ) -> Result<Streams> {
        match blocks {
            Blocks::Run => stage.through(streams, context),
            Blocks::Keep { lane } => {
                // The residual of the calls before is not needed any more.
                self.by_lane.remove(&lane);
                let before = streams.main.clone();
                let behind = stage.through(streams, context)?;
                let added = (&behind.main - &before)?.to_dtype(stage.compute())?;
                added.relabel("residual");
                self.by_lane.insert(lane, added);
                Ok(behind)
            }
            Blocks::Skip { lane, is_last } => {
                let kept =
                    if is_last { self.by_lane.remove(&lane) } else { self.by_lane.get(&lane).cloned() };
                let missing =
                    || kernels::Error::msg(format!("call {m} skips blocks that lane {lane} never ran"));
                let mut streams = streams;
                streams.main = residual::add(&streams.main, &kept.ok_or_else(missing)?)?;
                Ok(streams)
            }
            Blocks::Measure { lane } => {
                let streams = if stage.dit.embedder.is_some() { with_entry(streams) } else { streams };
                let mut behind = stage.through(streams, context)?;
                if stage.dit.head.is_some() {
                    let missing = || kernels::Error::msg("the first stage sent no entry of the blocks");
                    let entry = behind.take(ENTRY).ok_or_else(missing)?;
                    self.measure(m, lane, (&behind.main - &entry)?.to_dtype(DType::F32)?)?;
                }
                Ok(behind)
            }
        }
    }

    /// Holds `added` [b, l, d] f32 against the call of the lane before.
    fn measure(&mut self, call: usize, lane: usize, added: Tensor) -> Result<()> {
        if let Some(before) = self.by_lane.get(&lane) {
            let sums = |a: &Tensor, b: &Tensor| -> Result<Vec<f64>> {
                let sums = (a * b)?.sum(2)?.flatten_all()?;
                // Of shadows only the memory is of interest.
                let sums = if sums.is_shadow() { Vec::new() } else { sums.to_vec1::<f32>()? };
                Ok(sums.into_iter().map(f64::from).collect())
            };
            let (own, old, both) = (sums(&added, &added)?, sums(before, before)?, sums(&added, before)?);
            let count = own.len() as f64;
            let ratios: Vec<f64> = own.iter().zip(&old).map(|(own, old)| (own / old).sqrt()).collect();
            let ratio = ratios.iter().sum::<f64>() / count;
            let squares = ratios.iter().map(|one| (one - ratio).powi(2)).sum::<f64>();
            let cosines =
                both.iter().zip(own.iter().zip(&old)).map(|(both, (own, old))| both / (own * old).sqrt());
            let turn = 1.0 - cosines.sum::<f64>() / count;
            self.changes.push(Change {
                call,
                ratio,
                deviation: (squares / (count - 1.0).max(1.0)).sqrt(),
                turn,
            });
        }
        self.by_lane.insert(lane, added);
        Ok(())
    }
}

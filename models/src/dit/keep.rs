//! What a forward leaves for its backward: how much of each block, and where it waits.

use std::ops::Range;

use candle_core::Tensor;
use kernels::transfer::{HostStore, Parked};
use serde::{Deserialize, Serialize};

use super::block::Saved;
use crate::{Error, Result};

/// How much of a block's forward is kept. The gradients are the same to the bit; what is not kept is made again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// The block's input: the least memory, one more forward.
    #[default]
    Input,
    /// The input with the self-attention's output and log-sum-exp: the replay need not attend again.
    Attention,
    /// All that products and attentions made: only norms, positions and sums are made again.
    All,
}

/// Where it waits for the backward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// On the device.
    #[default]
    Device,
    /// In host memory beside the device, from which it comes back one block ahead of its use.
    Host,
    /// In host memory too, but it comes back when it is used: the device waits, and holds one block's less.
    HostUntilUsed,
}

/// What becomes of one block's forward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockPlan {
    /// How much is kept.
    pub keep: Keep,
    /// Where.
    pub place: Place,
}

/// The plans of a model's blocks, with the host memory beside the device of a part of it.
#[derive(Debug, Clone, Copy)]
pub struct Keeping<'a> {
    /// One plan for each block of the whole model, first to last.
    pub plans: &'a [BlockPlan],
    /// Where blocks park that wait in host memory.
    pub store: &'a HostStore,
}

/// What a part keeps of its forward for its backward, block by block.
#[derive(Debug, Default)]
pub struct Kept {
    blocks: Vec<KeptBlock>,
}

#[derive(Debug)]
enum KeptBlock {
    Here(Saved),
    Parked(Saved<Parked>),
    /// Parked, and not asked back ahead of its use.
    Asleep(Saved<Parked>),
}

impl Keeping<'_> {
    /// The plans of the blocks `range` of the model.
    pub(super) fn of(&self, range: &Range<usize>) -> Result<&[BlockPlan]> {
        let plans = self.plans.get(range.clone());
        plans.ok_or_else(|| {
            let count = self.plans.len();
            Error::Mismatch(format!("{count} plans of what to keep, and none for all of blocks {range:?}"))
        })
    }
}

impl Kept {
    /// Takes in what the next block leaves.
    pub(super) fn push(&mut self, saved: Saved, place: Place, store: &HostStore) -> Result<()> {
        self.blocks.push(match place {
            Place::Device => KeptBlock::Here(saved),
            Place::Host => KeptBlock::Parked(parked(saved, store)?),
            Place::HostUntilUsed => KeptBlock::Asleep(parked(saved, store)?),
        });
        Ok(())
    }

    /// What the last block left, on its device; the one before it is asked back, so that it comes while this one works.
    pub(super) fn pop(&mut self) -> Result<Option<Saved>> {
        let saved = match self.blocks.pop() {
            None => return Ok(None),
            Some(KeptBlock::Here(saved)) => saved,
            Some(KeptBlock::Parked(parked) | KeptBlock::Asleep(parked)) => {
                parked.map(&mut |x: Parked| Ok(x.take()?))?
            }
        };
        if let Some(KeptBlock::Parked(parked)) =
            self.blocks.pop_if(|next| matches!(next, KeptBlock::Parked(_)))
        {
            let coming = parked.map(&mut |mut x: Parked| {
                x.prefetch()?;
                Ok(x)
            })?;
            self.blocks.push(KeptBlock::Parked(coming));
        }
        Ok(Some(saved))
    }
}

/// Sends out all that a block leaves.
fn parked(saved: Saved, store: &HostStore) -> Result<Saved<Parked>> {
    store.next_group()?;
    saved.map(&mut |x: Tensor| Ok(store.park(x)?))
}

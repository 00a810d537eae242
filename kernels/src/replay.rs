//! Memoised work on shadows: what it returns, and which memory the results share.
//!
//! The same work on shadows of the same shapes has the same effect on a ledger. Its peak is a
//! [`Trace`](crate::ledger::Trace); what it leaves allocated is recorded here.

use std::sync::{Arc, Weak};

use crate::ledger::{Allocation, Label};
use crate::{Device, Tensor};

/// A result of some work.
#[derive(Debug, Clone)]
pub struct Mould {
    /// Without memory.
    shadow: Tensor,
    memory: Memory,
}

/// Whose memory a result is in.
#[derive(Debug, Clone, Copy)]
enum Memory {
    None,
    /// That of an input.
    Given(usize),
    /// An allocation of the work itself.
    Taken(usize),
}

/// Records results.
#[derive(Debug)]
pub struct Recorder {
    /// Weak, since the work may drop its inputs.
    given: Vec<Option<Weak<Allocation>>>,
    taken: Vec<Arc<Allocation>>,
}

/// The memory that some work left allocated: bytes with their labels.
#[derive(Debug, Clone)]
pub struct Taken(Vec<(u64, Label)>);

/// Recreates results.
#[derive(Debug)]
pub struct Player {
    device: Device,
    given: Vec<Option<Arc<Allocation>>>,
    taken: Vec<Option<Arc<Allocation>>>,
}

impl Recorder {
    /// Of work whose inputs are `given`.
    pub fn new<'a>(given: impl IntoIterator<Item = &'a Tensor>) -> Self {
        let allocation = |x: &Tensor| x.allocation().map(|allocation| Arc::downgrade(&allocation));
        Self { given: given.into_iter().map(allocation).collect(), taken: Vec::new() }
    }

    /// Records one of the results.
    pub fn record(&mut self, x: &Tensor) -> Mould {
        let memory = match x.allocation() {
            None => Memory::None,
            Some(own) => {
                let is_own = |other: &Arc<Allocation>| Arc::ptr_eq(other, &own);
                let weak = Arc::downgrade(&own);
                let is_given = |given: &Option<Weak<Allocation>>| {
                    given.as_ref().is_some_and(|given| given.ptr_eq(&weak))
                };
                let given = self.given.iter().position(is_given);
                match (given, self.taken.iter().position(is_own)) {
                    (Some(index), _) => Memory::Given(index),
                    (None, Some(index)) => Memory::Taken(index),
                    (None, None) => {
                        self.taken.push(own);
                        Memory::Taken(self.taken.len() - 1)
                    }
                }
            }
        };
        Mould { shadow: x.clone().without_allocation(), memory }
    }

    /// Whether `x` is in the memory of what went in as `index`.
    pub fn is_given(&self, index: usize, x: &Tensor) -> bool {
        let given = self.given.get(index).and_then(Option::as_ref);
        matches!((given, x.allocation()), (Some(given), Some(own)) if given.ptr_eq(&Arc::downgrade(&own)))
    }

    /// The memory of all results that were taken down.
    pub fn taken(&self) -> Taken {
        Taken(self.taken.iter().map(|own| (own.bytes(), own.label())).collect())
    }
}

impl Player {
    /// Of work on `device` whose inputs are `given`, and which allocates `taken` from the device's ledger.
    pub fn new<'a>(given: impl IntoIterator<Item = &'a Tensor>, taken: &Taken, device: &Device) -> Self {
        let take = |&(bytes, label): &(u64, Label)| {
            device.ledger().map(|ledger| Arc::new(ledger.take_as(label, bytes)))
        };
        Self {
            device: device.clone(),
            given: given.into_iter().map(Tensor::allocation).collect(),
            taken: taken.0.iter().map(take).collect(),
        }
    }

    /// One of the results.
    pub fn play(&self, mould: &Mould) -> Tensor {
        let allocation = match mould.memory {
            Memory::None => None,
            Memory::Given(index) => self.given[index].clone(),
            Memory::Taken(index) => self.taken[index].clone(),
        };
        mould.shadow.clone().moved(&self.device, allocation)
    }
}

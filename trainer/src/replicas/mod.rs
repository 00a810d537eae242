//! Replicas: a run on more than one pipeline, each in a process of its own.
//!
//! A replica has the whole model on its devices, makes its share of the micro-batches of each step, and exchanges adapter
//! gradients with the others, and nothing else. The launcher is the user's own ([`launcher`] reads what it says); ranks find each
//! other through rank 0 (`meet`), which also watches over them (`health`). What is exchanged goes through a
//! [`Communicator`]: NCCL between GPUs, TCP between CPUs.

mod communicator;
mod error;
mod health;
mod hello;
pub mod launcher;
mod meet;
pub mod nccl;
pub mod node_list;
mod share;
mod tcp;
mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kernels::{Device, Tensor};

pub use communicator::{Alone, Communicator, exchange_seconds};
pub use error::{ReplicaError, Result};
pub use health::{Doing, Last, Timing};
pub use hello::Introduction;
pub use launcher::{Job, Launched, Meeting, Member, Node};
pub use share::Share;

use health::{Control, Health};
use hello::Hello;
use meet::Door;
use tcp::Tcp;

/// The exit code of a process that stops because of another rank: the launcher may start all again
/// (`EX_TEMPFAIL` of sysexits.h).
pub const STOPPED: u8 = 75;

/// The replicas of a run, as one of them sees them.
pub struct Replicas {
    rank: usize,
    local: Share,
    names: Vec<String>,
    restarts: u32,
    communicator: Box<dyn Communicator>,
    /// What sums are slowed down to, in bytes a second each way.
    rate: Option<f64>,
    watch: Option<(Control, Arc<Health>)>,
    /// Rank 0 listens as long as the run lasts.
    _door: Option<Door>,
}

impl std::fmt::Debug for Replicas {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Replicas(rank {} of {}, over {})", self.rank, self.world(), self.communicator.name())
    }
}

impl Default for Replicas {
    fn default() -> Self {
        Self::alone()
    }
}

impl Replicas {
    /// The one replica of a run without others.
    pub fn alone() -> Self {
        let (communicator, names) = (Box::new(Alone), vec!["rank 0".to_owned()]);
        Self {
            rank: 0,
            local: Share::WHOLE,
            names,
            restarts: 0,
            communicator,
            rate: None,
            watch: None,
            _door: None,
        }
    }

    /// Meets the other ranks of `member`'s job, compares with them what `introduction` says, and connects to them over TCP.
    /// `last` ends the process where it does not react to a failure.
    ///
    /// # Errors
    /// Ranks that do not come within `timing.join` or do not match.
    pub fn join(member: &Member, introduction: Introduction, timing: Timing, last: Last) -> Result<Self> {
        let own = Hello::of(member, introduction);
        let met = meet::meet(&own, &member.job.meeting, timing.join)?;
        let health = Health::new(timing, last);
        let communicator = Box::new(Tcp::new(own.rank, met.data, Arc::clone(&health)));
        let control = Control::watch(Arc::clone(&health), met.control, own.rank, own.name())?;
        let (rank, restarts) = (own.rank, member.job.restarts);
        let watch = Some((control, health));
        let local = Share { rank: member.local_rank, world: member.local_world };
        Ok(Self { rank, local, names: met.names, restarts, communicator, rate: None, watch, _door: met.door })
    }

    /// The number of this replica, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many there are.
    pub fn world(&self) -> usize {
        self.names.len()
    }

    /// The share of this replica in what is dealt out to all.
    pub fn share(&self) -> Share {
        Share { rank: self.rank, world: self.world() }
    }

    /// The share of this replica in what is dealt out to those on its host.
    pub fn local_share(&self) -> Share {
        self.local
    }

    /// Whether this one writes the run folder.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// Rank, host and process of each.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// How often the launcher has started them again.
    pub fn restarts(&self) -> u32 {
        self.restarts
    }

    /// What carries the sums.
    pub fn carrier(&self) -> &'static str {
        self.communicator.name()
    }

    /// Lets NCCL carry sums from now on, between the n-th of `devices` of each rank. They are GPUs, and the same layers are on the
    /// n-th of each rank.
    ///
    /// # Errors
    /// NCCL that is missing or does not take a GPU, and ranks that fail.
    pub fn use_nccl(&mut self, devices: &[Device]) -> Result<()> {
        let Some((_, health)) = &self.watch else { return Ok(()) };
        let place = (self.rank, self.names.len());
        let small = std::mem::replace(&mut self.communicator, Box::new(Alone));
        self.communicator = Box::new(nccl::Nccl::join(small, devices, place, Arc::clone(health))?);
        Ok(())
    }

    /// Lets sums take at least as long as over links of `rate` bytes a second each way, to measure what a slower link would do.
    pub fn slow_down(&mut self, rate: f64) {
        self.rate = Some(rate);
    }

    /// Runs `work`, which is this rank's part of a step: the others wait for it for [`Timing::exchange`] at most.
    pub fn in_step<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let enter = |replicas: &Self, doing| {
            if let Some((_, health)) = &replicas.watch {
                health.enter(doing);
            }
        };
        enter(self, Doing::Step);
        let done = work(self);
        enter(self, Doing::Other);
        done
    }

    /// The sums of `tensors` over all ranks: see [`Communicator::sum`].
    ///
    /// # Errors
    /// As there.
    pub fn sum(&mut self, tensors: Vec<Tensor>) -> crate::Result<Vec<Tensor>> {
        let bytes = 4.0 * tensors.iter().map(Tensor::elem_count).sum::<usize>() as f64;
        let begun = Instant::now();
        let sums = self.communicator.sum(tensors)?;
        if let Some(rate) = self.rate {
            let least = Duration::from_secs_f64(exchange_seconds(bytes, self.world(), rate));
            std::thread::sleep(least.saturating_sub(begun.elapsed()));
        }
        Ok(sums)
    }

    /// The message of each rank: see [`Communicator::gather`].
    ///
    /// # Errors
    /// As there.
    pub fn gather(&mut self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.communicator.gather(message)
    }

    /// What rank 0 gives: see [`Communicator::broadcast`].
    ///
    /// # Errors
    /// As there.
    pub fn broadcast(&mut self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        self.communicator.broadcast(bytes)
    }

    /// Checks that all ranks have the same `settings`.
    ///
    /// # Errors
    /// [`ReplicaError::Mismatch`], the same on all ranks; and as [`Communicator::gather`].
    pub fn compare(&mut self, settings: &BTreeMap<String, String>) -> Result<()> {
        let failed = |error: serde_json::Error| ReplicaError::OutOfStep { why: error.to_string() };
        let told = self.gather(&serde_json::to_vec(settings).map_err(failed)?)?;
        let all = told.iter().map(|told| serde_json::from_slice(told).map_err(failed));
        hello::check_settings(&self.names, &all.collect::<Result<Vec<_>>>()?)
    }

    /// Whether any rank says yes.
    ///
    /// # Errors
    /// As [`Communicator::gather`].
    pub fn any(&mut self, own: bool) -> Result<bool> {
        Ok(self.gather(&[u8::from(own)])?.iter().any(|answer| answer.first() == Some(&1)))
    }

    /// Waits until all ranks are here.
    ///
    /// # Errors
    /// As [`Communicator::gather`].
    pub fn barrier(&mut self) -> Result<()> {
        self.communicator.barrier()
    }

    /// Fails where another rank has failed meanwhile.
    ///
    /// # Errors
    /// [`ReplicaError::Stopped`].
    pub fn check(&self) -> Result<()> {
        self.watch.as_ref().map_or(Ok(()), |(_, health)| health.check())
    }

    /// Tells the others that this rank has failed with `message`, and exits with `code`.
    pub fn abort(&self, message: &str, code: u8) {
        if let Some((control, _)) = &self.watch {
            control.abort(message, code);
        }
    }

    /// Leaves when all is done: from here on the others may end.
    ///
    /// # Errors
    /// Another rank that has failed.
    pub fn leave(mut self) -> Result<()> {
        self.barrier()?;
        if let Some((control, _)) = self.watch.take() {
            control.leave();
        }
        Ok(())
    }
}

impl Drop for Replicas {
    /// A rank that goes without [`Self::leave`] takes the others with it.
    fn drop(&mut self) {
        if let Some((control, health)) = self.watch.take() {
            if health.check().is_ok() {
                control.abort("it ended early", STOPPED);
            }
            control.leave();
        }
    }
}

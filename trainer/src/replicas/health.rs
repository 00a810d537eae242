//! Whether all ranks are alive and well: heartbeats, and what happens when one fails.
//!
//! Every rank has a connection to rank 0 with a thread of its own, beside the one that tensors and messages take. A rank that
//! ends, falls silent or fails is noticed by rank 0, which tells all others; where it is rank 0 that is gone, all notice it.
//! Whatever the main thread is doing then, the process ends within [`Timing::grace`].

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::{ReplicaError, Result};
use super::wire::{Kind, Wire, json};

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Until all ranks have met.
    pub join: Duration,
    /// Between two heartbeats.
    pub beat: Duration,
    /// Without a heartbeat, until a rank counts as gone.
    pub silence: Duration,
    /// From a failure until the process is ended, whatever it does.
    pub grace: Duration,
    /// How long a rank waits for another that works on the same step.
    pub exchange: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            join: Duration::from_secs(600),
            beat: Duration::from_secs(1),
            silence: Duration::from_secs(12),
            grace: Duration::from_secs(8),
            exchange: Duration::from_secs(600),
        }
    }
}

/// What a rank's main thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Doing {
    /// Something whose length nobody knows: loading, encoding, clips, saving.
    Other = 0,
    /// Its part of a step.
    Step = 1,
    /// It waits for the other ranks.
    Waiting = 2,
}

/// Ends the process, after a failure that the main thread did not react to. In tests it does nothing.
pub type Last = Arc<dyn Fn(&ReplicaError) + Send + Sync>;

/// What all threads of a rank know.
pub(super) struct Health {
    failure: Mutex<Option<ReplicaError>>,
    doing: AtomicU8,
    /// Milliseconds from `begun` at which it began to.
    since: AtomicU64,
    begun: Instant,
    /// Whether this rank has left, so that what happens to others no longer matters.
    has_left: AtomicBool,
    last: Last,
    pub timing: Timing,
}

/// A heartbeat.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Beat {
    doing: Doing,
    /// For how long, in milliseconds.
    millis: u64,
}

/// A failure as it is told to other ranks.
#[derive(Debug, Serialize, Deserialize)]
struct Abort {
    reason: String,
    code: u8,
}

impl Health {
    pub fn new(timing: Timing, last: Last) -> Arc<Self> {
        Arc::new(Self {
            failure: Mutex::default(),
            doing: AtomicU8::new(Doing::Other as u8),
            since: AtomicU64::new(0),
            begun: Instant::now(),
            has_left: AtomicBool::new(false),
            last,
            timing,
        })
    }

    /// Notes what the main thread does from now on.
    pub fn set(&self, doing: Doing) {
        self.since.store(self.begun.elapsed().as_millis() as u64, Ordering::SeqCst);
        self.doing.store(doing as u8, Ordering::SeqCst);
    }

    /// The same; what it did before.
    pub fn enter(&self, doing: Doing) -> Doing {
        let before = self.doing();
        self.set(doing);
        before
    }

    fn doing(&self) -> Doing {
        match self.doing.load(Ordering::SeqCst) {
            1 => Doing::Step,
            2 => Doing::Waiting,
            _ => Doing::Other,
        }
    }

    /// The failure that explains `error`, a connection that broke: it may take a moment until that is known. `error` itself
    /// where there is none.
    pub fn cause(&self, error: ReplicaError) -> ReplicaError {
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until {
            if let Err(failure) = self.check() {
                return failure;
            }
            thread::sleep(Duration::from_millis(20));
        }
        error
    }

    fn beat(&self) -> Beat {
        let doing = self.doing();
        let since = self.since.load(Ordering::SeqCst);
        Beat { doing, millis: (self.begun.elapsed().as_millis() as u64).saturating_sub(since) }
    }

    /// Fails unless all is well.
    ///
    /// # Errors
    /// The failure.
    pub fn check(&self) -> Result<()> {
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => Err(failure.clone()),
            None => Ok(()),
        }
    }

    /// Notes a failure, unless there is one; from then on the process has [`Timing::grace`] to end.
    pub fn fail(self: &Arc<Self>, reason: String, code: u8) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        if failure.is_some() || self.has_left.load(Ordering::SeqCst) {
            return;
        }
        let error = ReplicaError::Stopped { reason, code };
        *failure = Some(error.clone());
        let health = Arc::clone(self);
        thread::spawn(move || {
            thread::sleep(health.timing.grace);
            if !health.has_left.load(Ordering::SeqCst) {
                (health.last)(&error);
            }
        });
    }

    fn failure(&self) -> Option<Abort> {
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(ReplicaError::Stopped { reason, code }) => {
                Some(Abort { reason: reason.clone(), code: *code })
            }
            _ => None,
        }
    }
}

/// What a rank knows of another one to which it has a control connection.
struct Peer {
    name: String,
    /// Its last heartbeat, and when that came.
    seen: Mutex<(Beat, Instant)>,
    writer: Mutex<Wire>,
    /// Whether it has said that it leaves.
    has_left: AtomicBool,
    /// Whether it has been told of a failure.
    is_told: AtomicBool,
}

/// The control connections of a rank: of rank 0 to all others, of the others to rank 0.
pub(super) struct Control {
    health: Arc<Health>,
    peers: Arc<Vec<Peer>>,
    own_name: String,
}

impl Control {
    /// Watches over the ranks at the other ends of `wires`.
    ///
    /// # Errors
    /// When the system has no handles left.
    pub fn watch(health: Arc<Health>, wires: Vec<Wire>, rank: usize, own_name: String) -> Result<Self> {
        let now = Instant::now();
        let mut readers = Vec::new();
        let mut peers = Vec::new();
        for wire in wires {
            readers.push(wire.second()?);
            peers.push(Peer {
                name: wire.peer.clone(),
                seen: Mutex::new((Beat { doing: Doing::Other, millis: 0 }, now)),
                writer: Mutex::new(wire),
                has_left: AtomicBool::new(false),
                is_told: AtomicBool::new(false),
            });
        }
        let peers = Arc::new(peers);
        for (index, reader) in readers.into_iter().enumerate() {
            let (health, peers) = (Arc::clone(&health), Arc::clone(&peers));
            thread::spawn(move || listen(&health, &peers[index], reader));
        }
        let (own, all, name) = (Arc::clone(&health), Arc::clone(&peers), own_name.clone());
        thread::spawn(move || pulse(&own, &all, (rank, &name)));
        Ok(Self { health, peers, own_name })
    }

    /// Tells all that this rank has failed.
    pub fn abort(&self, message: &str, code: u8) {
        self.health.fail(format!("{} has stopped: {message}", self.own_name), code);
        self.peers.iter().for_each(|peer| peer.tell(&self.health));
    }

    /// Leaves: what happens to the others from now on is not this rank's concern. Where it has failed, or others have, those who
    /// do not know that yet are told first.
    pub fn leave(&self) {
        self.peers.iter().for_each(|peer| peer.tell(&self.health));
        self.health.has_left.store(true, Ordering::SeqCst);
        if self.health.check().is_ok() {
            self.peers.iter().for_each(|peer| peer.write(Kind::Bye, &[]));
        }
    }
}

impl Peer {
    fn write(&self, kind: Kind, bytes: &[u8]) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        let go_on = || match begun.elapsed() < Duration::from_secs(1) {
            true => Ok(()),
            false => Err(ReplicaError::OutOfStep { why: "the other end does not read".to_owned() }),
        };
        // A peer that cannot be written to is noticed by its silence.
        let _ = writer.send(kind, 0, bytes, &go_on);
    }

    /// Tells the peer of a failure, where there is one, once.
    fn tell(&self, health: &Health) {
        let Some(abort) = health.failure() else { return };
        if !self.is_told.swap(true, Ordering::SeqCst) {
            // Two fields of plain text.
            self.write(Kind::Abort, &serde_json::to_vec(&abort).unwrap_or_default());
        }
    }
}

/// Reads what `peer` sends until one of both leaves or fails.
fn listen(health: &Arc<Health>, peer: &Peer, mut wire: Wire) {
    let silence = health.timing.silence;
    loop {
        let is_over = || match health.has_left.load(Ordering::SeqCst) {
            true => Err(ReplicaError::OutOfStep { why: "this rank has left".to_owned() }),
            false if peer.seen.lock().unwrap_or_else(PoisonError::into_inner).1.elapsed() > silence => {
                Err(ReplicaError::OutOfStep { why: String::new() })
            }
            false => Ok(()),
        };
        match wire.receive(&is_over) {
            Ok((Kind::Beat, _, bytes)) => {
                if let Ok(beat) = json::<Beat>(&bytes) {
                    *peer.seen.lock().unwrap_or_else(PoisonError::into_inner) = (beat, Instant::now());
                }
            }
            Ok((Kind::Abort, _, bytes)) => {
                let Abort { reason, code } = json(&bytes)
                    .unwrap_or(Abort { reason: format!("{} has stopped", peer.name), code: super::STOPPED });
                peer.is_told.store(true, Ordering::SeqCst);
                return health.fail(reason, code);
            }
            Ok((Kind::Bye, ..)) => return peer.has_left.store(true, Ordering::SeqCst),
            Ok(_) => {}
            Err(ReplicaError::OutOfStep { .. }) if health.has_left.load(Ordering::SeqCst) => return,
            Err(ReplicaError::OutOfStep { .. }) => {
                let reason = format!("{} has not been heard of for {} s", peer.name, silence.as_secs());
                return health.fail(reason, super::STOPPED);
            }
            Err(_) => return health.fail(format!("{} is gone", peer.name), super::STOPPED),
        }
    }
}

/// Sends heartbeats, passes failures on, and looks for ranks that keep others waiting, until this rank leaves.
fn pulse(health: &Arc<Health>, peers: &[Peer], (rank, own_name): (usize, &str)) {
    let mut next = Instant::now();
    while !health.has_left.load(Ordering::SeqCst) {
        if health.check().is_err() {
            peers.iter().for_each(|peer| peer.tell(health));
        } else if Instant::now() >= next {
            next = Instant::now() + health.timing.beat;
            // A heartbeat is two plain fields.
            let beat = serde_json::to_vec(&health.beat()).unwrap_or_default();
            let there = peers.iter().filter(|peer| !peer.has_left.load(Ordering::SeqCst));
            there.for_each(|peer| peer.write(Kind::Beat, &beat));
            // Rank 0 alone knows what all do.
            if let Some(reason) = late(health, peers, own_name).filter(|_| rank == 0) {
                health.fail(reason, super::STOPPED);
            }
        }
        thread::sleep(health.timing.beat.min(Duration::from_millis(50)));
    }
}

/// Why the ranks cannot go on, where some have waited too long for others that are in the middle of a step.
fn late(health: &Health, peers: &[Peer], own_name: &str) -> Option<String> {
    let own = (own_name.to_owned(), health.beat());
    let of = |peer: &Peer| {
        let (beat, seen) = *peer.seen.lock().unwrap_or_else(PoisonError::into_inner);
        (peer.name.clone(), Beat { millis: beat.millis + seen.elapsed().as_millis() as u64, ..beat })
    };
    let all: Vec<(String, Beat)> = std::iter::once(own).chain(peers.iter().map(of)).collect();
    let limit = health.timing.exchange;
    let is_late = |beat: &Beat| Duration::from_millis(beat.millis) > limit;
    let is_waiting = |(_, beat): &&(String, Beat)| beat.doing == Doing::Waiting && is_late(beat);
    if all.iter().any(|(_, beat)| beat.doing == Doing::Other) || !all.iter().any(|one| is_waiting(&one)) {
        return None;
    }
    let working = all.iter().filter(|(_, beat)| beat.doing == Doing::Step && is_late(beat));
    let names: Vec<&str> = working.map(|(name, _)| name.as_str()).collect();
    match (names.is_empty(), all.iter().all(|one| is_waiting(&one))) {
        (false, _) => Some(format!("{} kept the others waiting for {} s", names.join(", "), limit.as_secs())),
        (true, true) if !peers.is_empty() => {
            Some(format!("the exchange of gradients has not ended within {} s", limit.as_secs()))
        }
        _ => None,
    }
}

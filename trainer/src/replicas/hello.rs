//! What ranks say of themselves when they meet, and whether they match.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::error::{ReplicaError, Result};
use super::launcher::Member;

/// What this process is and trains.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    /// Version of the program.
    pub version: String,
    /// Every setting that has to be the same on all ranks, by key.
    pub settings: BTreeMap<String, String>,
    /// Its GPUs, by something that no other GPU has.
    pub devices: Vec<String>,
}

impl Introduction {
    /// A hash of the settings.
    pub fn hash(&self) -> u64 {
        let lines = self.settings.iter().map(|(key, value)| format!("{key}\0{value}\0"));
        xxh3_64(lines.collect::<String>().as_bytes())
    }
}

/// What a rank says first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Hello {
    pub rank: usize,
    pub world: usize,
    pub job: String,
    pub restarts: u32,
    pub host: String,
    pub process: u32,
    /// [`Introduction::hash`].
    pub hash: u64,
    pub introduction: Introduction,
}

impl Hello {
    pub fn of(member: &Member, introduction: Introduction) -> Self {
        Self {
            rank: member.rank,
            world: member.world,
            job: member.job.id.clone(),
            restarts: member.job.restarts,
            host: gethostname::gethostname().to_string_lossy().into_owned(),
            process: std::process::id(),
            hash: introduction.hash(),
            introduction,
        }
    }

    /// Who it is, for messages.
    pub fn name(&self) -> String {
        format!("rank {} (host {}, process {})", self.rank, self.host, self.process)
    }

    /// Whether `other` is of the same job, and of the same start of it.
    pub fn is_of_job(&self, other: &Self) -> bool {
        (&self.job, self.restarts) == (&other.job, other.restarts)
    }
}

/// Settings that a sentence names of one rank.
const NAMED: usize = 4;

/// Checks that the ranks that have come match the first of them, which is rank 0.
///
/// # Errors
/// [`ReplicaError::Mismatch`] with everything that does not, in one sentence.
pub(super) fn check(first: &Hello, others: &[Hello]) -> Result<()> {
    let mut faults = Vec::new();
    let mut seen = vec![first];
    for hello in others {
        let name = hello.name();
        if hello.introduction.version != first.introduction.version {
            let (own, theirs) = (&first.introduction.version, &hello.introduction.version);
            faults.push(format!("{name} runs version {theirs} of the program, rank 0 runs {own}"));
        }
        if hello.world != first.world {
            faults.push(format!("{name} expects {} ranks, rank 0 expects {}", hello.world, first.world));
        } else if hello.rank >= first.world {
            faults.push(format!("{name} is none of {} ranks, which count from 0", first.world));
        }
        if let Some(twin) = seen.iter().find(|other| other.rank == hello.rank) {
            faults.push(format!("{name} and {} have the same rank", twin.name()));
        }
        let is_shared = |other: &&&Hello| {
            let devices = &other.introduction.devices;
            other.host == hello.host && devices.iter().any(|own| hello.introduction.devices.contains(own))
        };
        if let Some(other) = seen.iter().find(is_shared) {
            faults.push(format!("{name} and {} use the same GPU", other.name()));
        }
        if hello.hash != first.hash {
            let settings = (&first.introduction.settings, &hello.introduction.settings);
            faults.push(differences(&name, settings));
        }
        seen.push(hello);
    }
    refused(&faults)
}

/// Checks that all ranks, called `names`, have the settings of the first.
///
/// # Errors
/// [`ReplicaError::Mismatch`] with everything that differs, in one sentence.
pub(super) fn check_settings(names: &[String], settings: &[BTreeMap<String, String>]) -> Result<()> {
    let Some(first) = settings.first() else { return Ok(()) };
    let others = names.iter().zip(settings).filter(|(_, own)| *own != first);
    refused(&others.map(|(name, own)| differences(name, (first, own))).collect::<Vec<_>>())
}

fn refused(faults: &[String]) -> Result<()> {
    match faults.is_empty() {
        true => Ok(()),
        false => {
            let sentence =
                format!("the replicas do not match, so none of them trains: {}", faults.join("; "));
            Err(ReplicaError::Mismatch { sentence })
        }
    }
}

/// A rank's settings.
type Settings = BTreeMap<String, String>;

/// The settings in which the rank `name` differs from rank 0.
fn differences(name: &str, (own, theirs): (&Settings, &Settings)) -> String {
    let keys: std::collections::BTreeSet<&String> = own.keys().chain(theirs.keys()).collect();
    let differ: Vec<_> = keys.into_iter().filter(|key| own.get(*key) != theirs.get(*key)).collect();
    let mut text = format!("{name} has other settings than rank 0:");
    let value = |settings: &Settings, key: &String| {
        settings.get(key).cloned().unwrap_or_else(|| "nothing".to_owned())
    };
    for (at, key) in differ.iter().take(NAMED).enumerate() {
        let comma = if at == 0 { "" } else { "," };
        // Writing into a string does not fail.
        let _ = write!(text, "{comma} {key} = {} in place of {}", value(theirs, key), value(own, key));
    }
    if differ.len() > NAMED {
        let _ = write!(text, " and {} more", differ.len() - NAMED);
    }
    text
}

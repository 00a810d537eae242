//! The devices of each replica on a host.

use std::collections::BTreeSet;

use kernels::inventory;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::devices::{DevicesConfig, default_device};
use crate::error::{Error, Result};
use crate::replicas::Share;

/// Replicas on a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicasConfig {
    /// This many, each with as many GPUs as `devices.stages` names: the first has those, the next the ones behind them.
    Count(usize),
    /// As many as there are GPUs for.
    Auto,
    /// One for each list of stages.
    Listed(Vec<Vec<String>>),
}

impl Default for ReplicasConfig {
    fn default() -> Self {
        Self::Count(1)
    }
}

impl ReplicasConfig {
    /// How many replicas there are; `here` says how many this host has GPUs for. Other numbers are not compared with the host,
    /// which may be another one than the run's.
    ///
    /// # Errors
    /// None at all.
    pub(super) fn settled(&self, here: impl FnOnce() -> Result<usize>) -> Result<usize> {
        match self {
            Self::Auto => here(),
            _ if self.named() == 0 => refuse("replicas", "must be at least 1".into()),
            _ => Ok(self.named()),
        }
    }

    /// How many replicas it names, as far as it does: 1 for `auto`.
    pub fn named(&self) -> usize {
        match self {
            Self::Count(count) => *count,
            Self::Auto => 1,
            Self::Listed(lists) => lists.len(),
        }
    }
}

/// As a recipe has it.
#[derive(Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "a number of replicas, \"auto\", or a list of stages for each, such as [[\"cuda:0\"], [\"cuda:1\"]]"
)]
enum Written {
    Count(usize),
    Word(String),
    Listed(Vec<Vec<String>>),
}

impl<'de> Deserialize<'de> for ReplicasConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match Written::deserialize(deserializer)? {
            Written::Count(count) => Ok(Self::Count(count)),
            Written::Word(word) if word == "auto" => Ok(Self::Auto),
            Written::Word(word) => Err(serde::de::Error::custom(format!(
                "\"{word}\" is no number of replicas; write a number, or \"auto\" for as many as there are GPUs for"
            ))),
            Written::Listed(lists) => Ok(Self::Listed(lists)),
        }
    }
}

impl Serialize for ReplicasConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            Self::Count(count) => Written::Count(*count),
            Self::Auto => Written::Word("auto".to_owned()),
            Self::Listed(lists) => Written::Listed(lists.clone()),
        }
        .serialize(serializer)
    }
}

fn refuse<T>(key: &str, why: String) -> Result<T> {
    Err(Error::Setting { key: format!("devices.{key}"), why })
}

impl DevicesConfig {
    /// How many replicas this host has, `gpus` GPUs being visible.
    ///
    /// # Errors
    /// None at all, or more than there are GPUs for.
    pub fn replicas_here(&self, gpus: usize) -> Result<usize> {
        let stages = self.named_stages();
        let (first, count) = match &self.replicas {
            ReplicasConfig::Listed(lists) => return Ok(lists.len()),
            ReplicasConfig::Count(count) => (cards(&stages), *count),
            ReplicasConfig::Auto => match cards(&stages) {
                Some((first, span)) => (Some((first, span)), (gpus.saturating_sub(first) / span).max(1)),
                None => (None, 1),
            },
        };
        match (first, count) {
            (_, 0) => refuse("replicas", "must be at least 1".into()),
            (Some((first, span)), count) if count > 1 && first + count * span > gpus => {
                let why = format!(
                    "{count} replicas of {span} GPU(s) each, from cuda:{first} on, need {} GPUs, and {gpus} are visible here",
                    first + count * span
                );
                refuse("replicas", why)
            }
            (_, count) => Ok(count),
        }
    }

    /// The config of replica `share` of those on this host, `gpus` GPUs being visible.
    ///
    /// # Errors
    /// Stages that cannot be repeated, and fewer GPUs than the replicas need.
    pub fn of_replica(&self, share: Share, gpus: usize) -> Result<Self> {
        let stages = self.named_stages();
        let Share { rank, world } = share;
        if let ReplicasConfig::Listed(lists) = &self.replicas {
            return match lists.get(rank) {
                Some(stages) if !stages.is_empty() => Ok(Self { stages: stages.clone(), ..self.clone() }),
                _ => {
                    refuse("replicas", format!("lists no stages for replica {rank} of {world} on this host"))
                }
            };
        }
        let Some((first, span)) = cards(&stages).filter(|_| world > 1) else { return Ok(self.clone()) };
        let indices: BTreeSet<usize> = stages.iter().filter_map(|name| index(name)).collect();
        if !indices.iter().copied().eq(first..first + span) {
            let why = "the stages are not GPUs that follow each other, so it is open which ones the next replica has: \
                       list the stages of each, such as [[\"cuda:0\", \"cuda:2\"], [\"cuda:1\", \"cuda:3\"]]";
            return refuse("replicas", why.into());
        }
        if first + world * span <= gpus {
            let moved =
                |name: &String| index(name).map_or(name.clone(), |n| format!("cuda:{}", n + rank * span));
            return Ok(Self { stages: stages.iter().map(moved).collect(), ..self.clone() });
        }
        match first + span == gpus {
            // The launcher shows each process the GPUs of its own. Ranks that share one are found when they meet.
            true => Ok(self.clone()),
            false => {
                let why = format!(
                    "{world} replicas on this host, each on {}, need {} GPUs, and {gpus} are visible to rank {rank} here",
                    stages.join(" + "),
                    first + world * span
                );
                refuse("replicas", why)
            }
        }
    }

    fn named_stages(&self) -> Vec<String> {
        match self.stages.is_empty() {
            true => vec![default_device().to_owned()],
            false => self.stages.clone(),
        }
    }

    /// What tells the GPUs of the stages from all others of this host, as far as the driver says.
    pub fn identities(&self) -> Vec<String> {
        let gpus = inventory::gpus().unwrap_or_default();
        let of = |name: &String| gpus.get(index(name)?)?.identity.clone();
        let all: BTreeSet<String> = self.named_stages().iter().filter_map(of).collect();
        all.into_iter().collect()
    }
}

/// GPUs that are visible to this process.
pub fn visible_gpus() -> usize {
    inventory::gpus().map_or(0, |gpus| gpus.len())
}

/// The first GPU of `stages` and how many there are; nothing where there is none.
fn cards(stages: &[String]) -> Option<(usize, usize)> {
    let indices: BTreeSet<usize> = stages.iter().filter_map(|name| index(name)).collect();
    Some((*indices.first()?, indices.len()))
}

fn index(name: &str) -> Option<usize> {
    name.strip_prefix("cuda:")?.parse().ok()
}

//! The two logs of a run, written side by side: `metrics.jsonl` and TensorBoard events. Replicas other than rank 0 have a small
//! log in their place.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use models::expert::Expert;
use serde::Serialize;

use super::RunFolder;
use crate::error::{Error, Result};
use crate::train::checkpoint::Progress;
use crate::watch::metrics::{EvalRow, Metrics, ReplicasRow, StepRow, ToldRow};
use crate::watch::tensorboard::{EventWriter, Picture};

/// The log of a replica.
pub(super) enum RunLog {
    /// Of rank 0, which logs the run.
    Run(Log),
    /// Of another one: a row a step, of its times and of what has to be the same everywhere.
    Replica(Metrics),
}

/// A row of the small log.
#[derive(Debug, Serialize)]
struct ReplicaRow<'a> {
    step: u64,
    loss: f64,
    grad_norm: f64,
    seconds: f64,
    replicas: Option<&'a ReplicasRow>,
}

impl RunLog {
    /// The log of the replica `rank`, cut back to where `progress` stands; a small one begins anew at every start.
    pub fn open(folder: &RunFolder, progress: &Progress, rank: usize) -> Result<Self> {
        if rank == 0 {
            return Log::open(folder, progress).map(Self::Run);
        }
        let path = folder.replica_log(rank);
        if let Some(parent) = path.parent() {
            let io = |source| Error::Io { action: "create", path: parent.to_owned(), source };
            std::fs::create_dir_all(parent).map_err(io)?;
        }
        Metrics::open(path, 0).map(Self::Replica)
    }

    pub fn step(&mut self, row: &StepRow) -> Result<()> {
        match self {
            Self::Run(log) => log.step(row),
            Self::Replica(log) => {
                let StepRow { step, loss, grad_norm, seconds, .. } = *row;
                log.write(&ReplicaRow { step, loss, grad_norm, seconds, replicas: row.replicas.as_ref() })
            }
        }
    }

    pub fn eval(&mut self, row: &EvalRow) -> Result<()> {
        match self {
            Self::Run(log) => log.eval(row),
            Self::Replica(_) => Ok(()),
        }
    }

    pub fn told(&mut self, row: &ToldRow) -> Result<()> {
        match self {
            Self::Run(log) => log.metrics.write(row),
            Self::Replica(log) => log.write(row),
        }
    }

    /// Puts the contact sheet at `path` beside the curves.
    pub fn picture(&mut self, step: u64, path: &Path) -> Result<()> {
        match self {
            Self::Run(log) => log.picture(step, path),
            Self::Replica(_) => Ok(()),
        }
    }

    /// Makes sure that everything is on the disk; the lengths of a run's two files then.
    pub fn sync(&mut self) -> Result<(u64, u64)> {
        match self {
            Self::Run(log) => log.sync(),
            Self::Replica(log) => log.sync().map(|_| (0, 0)),
        }
    }
}

/// Both logs, open.
pub(super) struct Log {
    metrics: Metrics,
    events: EventWriter,
}

impl Log {
    /// Opens both and cuts them back to where `progress` stands.
    pub fn open(folder: &RunFolder, progress: &Progress) -> Result<Self> {
        Ok(Self {
            metrics: Metrics::open(folder.metrics(), progress.metrics_bytes)?,
            events: EventWriter::open(&folder.events(), progress.events_bytes, now())?,
        })
    }

    pub fn step(&mut self, row: &StepRow) -> Result<()> {
        self.metrics.write(row)?;
        let mut values = vec![
            ("loss/train", row.loss as f32),
            ("gradient/norm", row.grad_norm as f32),
            ("learning_rate", row.lr as f32),
            ("seconds/step", row.seconds as f32),
        ];
        values.extend(row.prior.map(|loss| ("loss/prior", loss as f32)));
        for (expert, own) in &row.experts {
            values.extend(match expert {
                Expert::High => {
                    [("loss/train_high", own.loss as f32), ("gradient/norm_high", own.grad_norm as f32)]
                }
                Expert::Low => {
                    [("loss/train_low", own.loss as f32), ("gradient/norm_low", own.grad_norm as f32)]
                }
            });
        }
        values.extend(loss_by_noise(&row.by_sigma));
        Ok(self.events.scalars(row.step, now(), &values)?)
    }

    pub fn eval(&mut self, row: &EvalRow) -> Result<()> {
        self.metrics.write(row)?;
        let tag = match row.expert {
            None => "loss/held_out",
            Some(Expert::High) => "loss/held_out_high",
            Some(Expert::Low) => "loss/held_out_low",
        };
        Ok(self.events.scalars(row.step, now(), &[(tag, row.eval_loss as f32)])?)
    }

    /// Puts the contact sheet at `path` beside the curves.
    pub fn picture(&mut self, step: u64, path: &Path) -> Result<()> {
        let encoded = std::fs::read(path).map_err(|source| Error::Io {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        let Some((width, height)) = png_size(&encoded) else { return Ok(()) };
        Ok(self.events.picture(step, now(), "samples", Picture { encoded: &encoded, width, height })?)
    }

    /// Makes sure that everything is on the disk; the lengths of the two files then.
    pub fn sync(&mut self) -> Result<(u64, u64)> {
        Ok((self.metrics.sync()?, self.events.sync()?))
    }
}

/// Ranges of sigma, each with the tag of its curve and its end.
const NOISE: [(&str, f64); 4] = [
    ("loss/sigma_0.00-0.25", 0.25),
    ("loss/sigma_0.25-0.50", 0.5),
    ("loss/sigma_0.50-0.75", 0.75),
    ("loss/sigma_0.75-1.00", f64::INFINITY),
];

/// The mean loss of the micro-batches in each range of noise levels that has any.
fn loss_by_noise(by_sigma: &[(f64, f64)]) -> Vec<(&'static str, f32)> {
    let mut begin = f64::NEG_INFINITY;
    let mut means = Vec::new();
    for (tag, end) in NOISE {
        let own: Vec<f64> = by_sigma
            .iter()
            .filter(|(sigma, _)| (begin..end).contains(sigma))
            .map(|(_, loss)| *loss)
            .collect();
        if !own.is_empty() {
            means.push((tag, (own.iter().sum::<f64>() / own.len() as f64) as f32));
        }
        begin = end;
    }
    means
}

/// Width and height in a PNG's header, which stand at fixed places.
fn png_size(png: &[u8]) -> Option<(usize, usize)> {
    let side = |at: usize| Some(u32::from_be_bytes(png.get(at..at + 4)?.try_into().ok()?) as usize);
    Some((side(16)?, side(20)?))
}

/// Seconds since 1970, which TensorBoard shows; nothing depends on them.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

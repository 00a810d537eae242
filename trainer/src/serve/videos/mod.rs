//! Clips that are asked for: a queue and a gallery on disk, and the thread that makes them.

mod ask;
mod basis;
mod engine;
mod fields;
mod job;
mod resident;
pub(super) mod routes;
mod upload;
mod webhook;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use tokio::sync::watch;

use super::reply::Refusal;
use super::runs::record::{read_json, write_json};
use crate::error::{Error, Result};
use crate::watch::interrupt::Interrupt;
pub(super) use engine::run as run_engine;
pub(super) use job::{Job, JobStatus};
use job::{JobError, now};

/// Clips that may wait.
const WAITING: usize = 1000;

/// The clips.
#[derive(Debug)]
pub(super) struct Videos {
    folder: PathBuf,
    jobs: Mutex<Jobs>,
    /// Told when a job is added, and when the engine is to look again.
    added: Condvar,
    /// Counts changes of jobs.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Jobs {
    /// By the order in which they were asked for.
    all: BTreeMap<u64, Job>,
    numbers: BTreeMap<String, u64>,
    current: Option<Current>,
    /// Totals since the server started, for its metrics.
    seconds: f64,
    made: u64,
}

/// The clip that is being made.
#[derive(Debug, Clone)]
struct Current {
    id: String,
    interrupt: Interrupt,
    made: Arc<AtomicUsize>,
    is_deleted: bool,
}

/// How a job is stored: with its place in the queue.
#[derive(serde::Serialize, serde::Deserialize)]
struct Stored {
    number: u64,
    job: Job,
}

impl Videos {
    /// Those in `folder`. Clips that were being made when the server ended are made anew.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn open(folder: PathBuf) -> Result<Self> {
        let io = |source| Error::Io { action: "list", path: folder.clone(), source };
        let mut jobs = Jobs::default();
        for entry in std::fs::read_dir(&folder).map_err(io)? {
            let path = entry.map_err(io)?.path().join("job.json");
            // What was not finished before the server was killed was not promised to anyone.
            let Ok(Stored { number, mut job }) = read_json(&path) else { continue };
            if job.status == JobStatus::InProgress {
                job.status = JobStatus::Queued;
                job.progress = 0;
            }
            jobs.numbers.insert(job.id.clone(), number);
            jobs.all.insert(number, job);
        }
        let (jobs, added, changes) = (Mutex::new(jobs), Condvar::new(), watch::Sender::new(0));
        Ok(Self { folder, jobs, added, changes })
    }

    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        // Each change is whole before anything can panic.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The folder of the job `id`, whose name was made here.
    pub fn folder_of(&self, id: &str) -> PathBuf {
        self.folder.join(id)
    }

    /// Counts changes of jobs, to be waited for.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn tell(&self) {
        self.changes.send_modify(|count| *count += 1);
        self.added.notify_all();
    }

    fn store(&self, number: u64, job: &Job) -> Result<()> {
        write_json(&self.folder_of(&job.id).join("job.json"), &Stored { number, job: job.clone() })
    }

    /// Adds jobs to the queue, whose folders are there.
    ///
    /// # Errors
    /// 429 when too many wait; a file that cannot be written.
    pub fn add(&self, job: Job) -> std::result::Result<(), Refusal> {
        let mut jobs = self.jobs();
        if jobs.all.values().filter(|job| !job.is_over()).count() >= WAITING {
            let why = format!("{WAITING} clips wait already; try again later");
            return Err(Refusal::new(StatusCode::TOO_MANY_REQUESTS, why));
        }
        let number = jobs.all.keys().last().map_or(1, |last| last + 1);
        self.store(number, &job)?;
        jobs.numbers.insert(job.id.clone(), number);
        jobs.all.insert(number, job);
        drop(jobs);
        self.tell();
        Ok(())
    }

    /// The job `id`, with its progress of now.
    pub fn get(&self, id: &str) -> Option<Job> {
        let jobs = self.jobs();
        let job = jobs.all.get(jobs.numbers.get(id)?)?.clone();
        Some(jobs.with_progress(job))
    }

    /// All jobs, the newest last.
    pub fn all(&self) -> Vec<Job> {
        let jobs = self.jobs();
        jobs.all.values().map(|job| jobs.with_progress(job.clone())).collect()
    }

    /// Clips made since the server started, and the seconds that they took.
    pub fn totals(&self) -> (u64, f64) {
        let jobs = self.jobs();
        (jobs.made, jobs.seconds)
    }

    /// Removes the job `id` with its files; one that is being made stops first.
    pub fn delete(&self, id: &str) -> std::result::Result<(), Refusal> {
        let mut jobs = self.jobs();
        let number = *jobs.numbers.get(id).ok_or_else(|| Refusal::missing(format!("video {id}")))?;
        jobs.numbers.remove(id);
        jobs.all.remove(&number);
        match &mut jobs.current {
            Some(current) if current.id == id => {
                current.is_deleted = true;
                current.interrupt.ask();
            }
            _ => remove(&self.folder_of(id))?,
        }
        drop(jobs);
        self.tell();
        Ok(())
    }

    /// Stops the job `id`, which stays in the list as a failed one.
    pub fn cancel(&self, id: &str) -> std::result::Result<(), Refusal> {
        let mut jobs = self.jobs();
        let missing = || Refusal::missing(format!("video {id}"));
        let number = *jobs.numbers.get(id).ok_or_else(missing)?;
        let mut job = jobs.all.get(&number).ok_or_else(missing)?.clone();
        match (job.status, &jobs.current) {
            (JobStatus::Queued, _) => {
                end(&mut job, Err(cancelled()));
                self.store(number, &job)?;
                jobs.all.insert(number, job);
            }
            (JobStatus::InProgress, Some(current)) if current.id == id => current.interrupt.ask(),
            _ => return Err(Refusal::conflict(format!("{id} is over"))),
        }
        drop(jobs);
        self.tell();
        Ok(())
    }

    /// The first job in the queue that `may` be made now; of the others, what they wait for is noted.
    fn next(&self, may: impl Fn(&Job) -> std::result::Result<(), String>) -> Result<Option<(Job, Current)>> {
        let mut jobs = self.jobs();
        let queued: Vec<u64> = jobs
            .all
            .iter()
            .filter(|(_, job)| job.status == JobStatus::Queued)
            .map(|(number, _)| *number)
            .collect();
        let mut is_changed = false;
        for number in queued {
            let Some(job) = jobs.all.get_mut(&number) else { continue };
            let waits_for = may(job).err();
            is_changed |= job.waits_for != waits_for;
            job.waits_for = waits_for;
            if job.waits_for.is_some() {
                continue;
            }
            job.status = JobStatus::InProgress;
            let job = job.clone();
            self.store(number, &job)?;
            let current = Current {
                id: job.id.clone(),
                interrupt: Interrupt::default(),
                made: Arc::default(),
                is_deleted: false,
            };
            jobs.current = Some(current.clone());
            drop(jobs);
            self.tell();
            return Ok(Some((job, current)));
        }
        if is_changed {
            self.changes.send_modify(|count| *count += 1);
        }
        Ok(None)
    }

    /// Waits until there is something to do, `most` at the longest.
    fn wait(&self, most: Duration) {
        let waited = self.added.wait_timeout(self.jobs(), most);
        drop(waited);
    }

    /// Notes how the job that was being made ended.
    fn ended(&self, id: &str, made: std::result::Result<Made, JobError>) -> Result<Option<Job>> {
        let mut jobs = self.jobs();
        let is_deleted = jobs.current.take().is_some_and(|current| current.is_deleted);
        if let Ok(made) = &made {
            jobs.made += 1;
            jobs.seconds += made.seconds;
        }
        let number = jobs.numbers.get(id).copied();
        let job = number.and_then(|number| Some((number, jobs.all.get(&number)?.clone())));
        let Some((number, mut job)) = job.filter(|_| !is_deleted) else {
            remove(&self.folder_of(id))?;
            return Ok(None);
        };
        end(&mut job, made);
        self.store(number, &job)?;
        jobs.all.insert(number, job.clone());
        drop(jobs);
        self.tell();
        Ok(Some(job))
    }
}

impl Jobs {
    fn with_progress(&self, mut job: Job) -> Job {
        if let Some(current) = self.current.as_ref().filter(|current| current.id == job.id) {
            let made = current.made.load(Ordering::Relaxed);
            // The last percent is for decoding.
            job.progress = (99 * made / job.settings.request.steps.max(1)).min(99) as u8;
        }
        job
    }
}

/// A clip that was made.
#[derive(Debug, Clone, PartialEq)]
struct Made {
    /// The name of its file in the folder of its job.
    file: String,
    seconds: f64,
}

fn cancelled() -> JobError {
    JobError { code: "cancelled".into(), message: "the clip was cancelled".into() }
}

fn end(job: &mut Job, made: std::result::Result<Made, JobError>) {
    job.completed_at = Some(now());
    job.waits_for = None;
    match made {
        Ok(made) => {
            job.status = JobStatus::Completed;
            job.progress = 100;
            job.media_type = Some("video/mp4".into());
            job.inference_time_s = Some(made.seconds);
            job.file_name = Some(made.file);
        }
        Err(error) => {
            job.status = JobStatus::Failed;
            job.error = Some(error);
        }
    }
}

/// Removes the folder of a job.
fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::Io { action: "remove", path: folder.to_owned(), source })
        }
        _ => Ok(()),
    }
}

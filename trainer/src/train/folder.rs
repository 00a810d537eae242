//! The folder of a run: the paths of everything in it, and whether a run may begin or continue there.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::plan::common::is_path_of_start;
use crate::plan::{Difference, Plan, Planned};
use crate::report;
use crate::train::checkpoint::{self, Progress};

use super::lock::{self, LOCK_FILE, RunLock};

/// The folder of a run, locked for this process until the last of its clones is dropped.
#[derive(Debug, Clone)]
pub struct RunFolder {
    root: PathBuf,
    /// Nothing for a replica that leaves writing to rank 0.
    lock: Option<Arc<RunLock>>,
}

/// Plan keys that may change when a run is resumed: none of them affects steps that are already made.
const MAY_CHANGE: [&str; 21] = [
    "tandem",
    // What is left out shows in the digest.
    "data.bad",
    "dataset.skipped",
    "run.",
    "checkpoint.",
    "sample.",
    "export.",
    "model.quantised",
    "devices.",
    "memory.keep",
    "memory.offload",
    "memory.host_memory",
    "memory.pinned",
    "memory.blocks",
    "memory.networks",
    "memory.decoding",
    "memory.bands",
    "memory.clip_groups",
    "memory.clip_sharing",
    "memory.weights",
    "model.precision.streamed",
];

impl RunFolder {
    /// A new folder for `plan` (its own, or that with a number behind it where a run lies there), with the plan in it. Of
    /// processes that begin at the same time each gets its own.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn begin(plan: &mut Plan) -> Result<Self> {
        let wanted = plan.run.folder.clone();
        let numbered = |n: usize| if n == 1 { wanted.clone() } else { with_number(&wanted, n) };
        let (root, lock) = lock::claim(numbered, is_run)?;
        plan.run.folder.clone_from(&root);
        let folder = Self { root, lock: Some(Arc::new(lock)) };
        for path in [folder.checkpoints(), folder.root.join("samples"), folder.adapters()] {
            fs::create_dir_all(&path).map_err(|source| Error::Io { action: "create", path, source })?;
        }
        folder.remove_leftovers()?;
        folder.store(plan)?;
        Ok(folder)
    }

    /// The run in the folder `named`, else the newest run of `plan`, to be resumed; changes of the plan are reported through
    /// `note`, and kept where they are allowed.
    ///
    /// # Errors
    /// When there is no run to go on with, another process works on it, or its plan differs where it must not: all
    /// differences are listed.
    pub fn resume(planned: &mut Planned, named: Option<&Path>, note: impl Fn(&str)) -> Result<Self> {
        let wanted = planned.plan.run.folder.clone();
        let root = match named {
            Some(folder) if !is_run(folder) => {
                return Err(Error::NothingToResume { folder: folder.to_owned() });
            }
            Some(folder) => folder.to_owned(),
            None => newest(&wanted).ok_or_else(|| Error::NothingToResume { folder: wanted.clone() })?,
        };
        planned.plan.run.folder.clone_from(&root);
        let lock = Some(Arc::new(RunLock::acquire(&root)?));
        let folder = Self { root, lock };
        let stored = Plan::read(&folder.plan())?;
        planned.keep_to(&stored);
        planned.keep_preset_of(&stored)?;
        let plan = &planned.plan;
        let differences = changed_settings(&stored, plan)?;
        let (refused, allowed): (Vec<_>, Vec<_>) =
            differences.into_iter().partition(|d| !may_change(&stored, plan, &d.key));
        if !refused.is_empty() {
            return Err(Error::PlanChanged { changes: refused.iter().map(in_words).collect() });
        }
        let leftovers = folder.remove_leftovers()?;
        if leftovers > 0 {
            note(&format!("removed {leftovers} half-written file(s) of a process that was killed"));
        }
        allowed.iter().for_each(|difference| note(&format!("changed since the run began: {difference}")));
        if checkpoint::newest(&folder.checkpoints())?.is_none() {
            note("the run has no checkpoint yet: it begins anew");
        }
        folder.store(plan)?;
        Ok(folder)
    }

    /// The folder at `root` as a replica other than rank 0 sees it: it writes a log of its own there and nothing else.
    pub fn of_replica(root: PathBuf) -> Self {
        Self { root, lock: None }
    }

    /// The small log of the replica `rank`.
    pub fn replica_log(&self, rank: usize) -> PathBuf {
        self.root.join("replicas").join(format!("rank-{rank:03}.jsonl"))
    }

    fn is_without_locks(&self) -> bool {
        self.lock.as_ref().is_some_and(|lock| lock.is_void)
    }

    /// What the user must know where the file system has no locks.
    pub fn warning(&self) -> Option<&'static str> {
        self.is_without_locks().then_some(
            "the file system of the run folder has no file locks: nothing stops a second process from resuming this run \
             while it is going on",
        )
    }

    /// Whether nothing was made in it that is worth keeping: no step, and no clip.
    ///
    /// # Errors
    /// A log that cannot be read.
    pub fn is_untouched(&self) -> Result<bool> {
        let path = self.metrics();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            Err(source) => return Err(Error::Io { action: "read", path, source }),
        };
        let mut rows = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let has_steps = rows.any(|row| row["step"].as_u64().is_some_and(|step| step > 0));
        Ok(!has_steps && !self.samples(0).join(crate::sample::CONTACT_SHEET).is_file())
    }

    /// Removes what a run that never began has made; folders and files of others stay.
    ///
    /// # Errors
    /// What cannot be removed.
    pub fn discard(self) -> Result<()> {
        let is_gone = |kind: ErrorKind| matches!(kind, ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty);
        let accept = |path: &Path, removed: std::io::Result<()>| match removed {
            Err(error) if !is_gone(error.kind()) => {
                Err(Error::Io { action: "remove", path: path.to_owned(), source: error })
            }
            _ => Ok(()),
        };
        // Of a set of clips that was not finished.
        accept(&self.samples(0), fs::remove_dir_all(self.samples(0)))?;
        for file in [self.plan(), self.metrics(), self.events(), self.root.join(LOCK_FILE), self.report()] {
            accept(&file, fs::remove_file(&file))?;
        }
        let samples = self.root.join("samples");
        for folder in [samples, self.checkpoints(), self.adapters(), self.root.clone()] {
            accept(&folder, fs::remove_dir(&folder))?;
        }
        Ok(())
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The settled plan.
    pub fn plan(&self) -> PathBuf {
        self.root.join("plan.toml")
    }

    /// Saved states.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// Adapter files.
    pub fn adapters(&self) -> PathBuf {
        self.root.join("adapters")
    }

    /// Clips made after `step` steps.
    pub fn samples(&self, step: u64) -> PathBuf {
        self.root.join("samples").join(format!("step-{step:06}"))
    }

    /// Removes the clips made after `progress`, as the logs are cut there: the steps that are made again make them
    /// again, with the settings of now and their picture in the log.
    ///
    /// # Errors
    /// A folder that cannot be removed.
    pub fn cut_samples(&self, progress: &Progress) -> Result<()> {
        let samples = self.root.join("samples");
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { action, path, source }
        };
        for entry in fs::read_dir(&samples).map_err(io("list", &samples))? {
            let path = entry.map_err(io("list", &samples))?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let step = name.strip_prefix("step-").and_then(|step| step.parse::<u64>().ok());
            if step.is_some_and(|step| step > progress.step || *progress == Progress::default()) {
                fs::remove_dir_all(&path).map_err(io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// One JSON object a step.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// The page that shows how it learns.
    pub fn report(&self) -> PathBuf {
        self.root.join(report::NAME)
    }

    /// The MagCache table that the run's first clip has measured.
    pub fn magcache(&self) -> PathBuf {
        self.root.join("magcache.json")
    }

    /// The algorithms that the GPUs' products take.
    pub fn products(&self) -> PathBuf {
        self.root.join("products.json")
    }

    /// TensorBoard's events.
    pub fn events(&self) -> PathBuf {
        self.root.join("events.out.tfevents.tandem")
    }

    /// Removes what processes that were killed left half-written; how many files. The lock says that none of them runs.
    fn remove_leftovers(&self) -> Result<usize> {
        let mut folders = vec![self.root.clone(), self.checkpoints()];
        // PEFT adapters and sets of clips are folders.
        for parent in [self.adapters(), self.root.join("samples")] {
            let Ok(entries) = fs::read_dir(&parent) else { continue };
            let below = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
            folders.extend(below.filter(|path| path.is_dir()));
            folders.push(parent);
        }
        let mut removed = 0;
        for folder in folders.iter().filter(|folder| folder.is_dir()) {
            let io = |source| Error::Io { action: "list", path: folder.clone(), source };
            for leftover in data::atomic::leftovers(folder).map_err(io)? {
                if self.is_without_locks() && !leftover.is_abandoned() {
                    continue;
                }
                let path = leftover.path;
                fs::remove_file(&path).map_err(|source| Error::Io { action: "remove", path, source })?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn store(&self, plan: &Plan) -> Result<()> {
        let (path, text) = (self.plan(), plan.to_toml()?);
        data::atomic::write(&path, |file| std::io::Write::write_all(file, text.as_bytes()))
            .map_err(|source| Error::Io { action: "write", path, source })
    }
}

/// What differs between a stored plan and the one of now, but for the folder's own name.
pub fn changed_settings(stored: &Plan, now: &Plan) -> Result<Vec<Difference>> {
    Ok(stored.differences(now)?.into_iter().filter(|d| d.key != "run.folder").collect())
}

/// A difference as people read it: a digest says that something changed, not what.
fn in_words(difference: &Difference) -> String {
    match difference.key.as_str() {
        "dataset.digest" => {
            "dataset.digest: other clips, captions or windows than the run began with".to_owned()
        }
        key if key.starts_with("adapter.start_on.") && key.ends_with(".sha256") => {
            format!("{key}: another file than the run began on")
        }
        _ => difference.to_string(),
    }
}

/// A constant learning rate knows nothing of the run's length, so a run may then be made longer or shorter.
/// Other devices make other sums anyway, so there the chunks of the feed-forward layer may change.
fn may_change(stored: &Plan, plan: &Plan, key: &str) -> bool {
    if key == "memory.ffn_tokens" {
        return stored.devices != plan.devices;
    }
    if is_path_of_start(key) {
        return true;
    }
    let is_length = key == "train.steps" && !plan.optimizer.schedule.depends_on_length();
    is_length || (key != "run.seed" && MAY_CHANGE.iter().any(|prefix| key.starts_with(prefix)))
}

/// The newest run of those that were begun in `wanted` or beside it with a number.
pub fn newest(wanted: &Path) -> Option<PathBuf> {
    let numbered = (2..).map(|n| with_number(wanted, n)).take_while(|folder| is_run(folder));
    std::iter::once(wanted.to_owned()).chain(numbered).filter(|folder| is_run(folder)).last()
}

fn is_run(folder: &Path) -> bool {
    folder.join("plan.toml").is_file()
}

fn with_number(folder: &Path, n: usize) -> PathBuf {
    let name = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    folder.with_file_name(format!("{name}-{n}"))
}

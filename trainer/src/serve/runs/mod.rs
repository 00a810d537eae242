//! Runs: those in the runs folder, and the queue of those that are to be trained.

pub(super) mod events;
pub(super) mod process;
pub(super) mod record;
pub(super) mod routes;
pub(super) mod view;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cards::Cards;
use super::places::Places;
use super::reply::{Refusal, in_full};
use crate::error::Result;
use crate::plan::Plan;
use crate::train::Asked;
use crate::watch::interrupt::INTERRUPTED;
use process::{ask_to_stop, error_in, start, tandem, worker};
use record::{Record, Wanted};
use view::{RunView, Status, devices_of, names_in};

/// The runs.
#[derive(Debug)]
pub(super) struct Runs {
    places: Places,
    cards: Arc<Cards>,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    records: BTreeMap<String, Record>,
    /// Processes that this server has started.
    children: BTreeMap<String, Child>,
    /// What each run in the queue waits for.
    waits: BTreeMap<String, String>,
    /// Devices of runs that train, by name: plans are not read at every look.
    devices: BTreeMap<String, Vec<String>>,
}

impl Runs {
    /// Those in the folders of `places`, with the queue as it was left.
    ///
    /// # Errors
    /// Records that cannot be read.
    pub fn open(places: &Places, cards: &Arc<Cards>) -> Result<Self> {
        let records = Record::all(&places.state.join("runs"))?;
        let records = records.into_iter().map(|record| (record.name.clone(), record)).collect();
        let queue = Mutex::new(Queue { records, ..Queue::default() });
        Ok(Self { places: places.clone(), cards: Arc::clone(cards), queue })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Records are written before they are changed here, so a panic leaves nothing half-done.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn records(&self) -> PathBuf {
        self.places.state.join("runs")
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.places.runs.join(name)
    }

    /// All runs, those that train first, then the queue, then by name.
    pub fn list(&self) -> Vec<RunView> {
        let mut names = names_in(&self.places.runs);
        names.retain(|name| self.folder(name).join("plan.toml").is_file());
        for name in self.queue().records.keys() {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        let mut views: Vec<RunView> = names.iter().filter_map(|name| self.view(name)).collect();
        views.sort_by_key(|view| match view.status {
            Status::Running | Status::Stopping => 0,
            Status::Queued => 1,
            Status::Paused | Status::Failed | Status::Finished => 2,
        });
        views
    }

    /// The run `name`.
    pub fn view(&self, name: &str) -> Option<RunView> {
        let folder = self.places.run(name)?;
        let (record, child, waits) = {
            let queue = self.queue();
            let child = queue.children.get(name).map(Child::id);
            (queue.records.get(name).cloned(), child, queue.waits.get(name).cloned())
        };
        if record.is_none() && !folder.join("plan.toml").is_file() {
            return None;
        }
        let worker = worker(&folder).or(child);
        let mut view = RunView::of(name, &folder, worker);
        view.has_recipe = record.is_some() || self.recipe_of(name).is_some();
        if let Some(record) = record {
            view.status = match (record.wanted, worker, &record.error) {
                (Wanted::Queued, ..) => Status::Queued,
                (Wanted::Paused, Some(_), _) => Status::Stopping,
                (_, None, Some(_)) => Status::Failed,
                // It was stopped behind its last step, before what comes then.
                (Wanted::Paused, None, None) => Status::Paused,
                _ => view.status,
            };
            view.waits_for = waits.filter(|_| view.status == Status::Queued);
            view.error = record.error;
            view.devices = record.devices;
        }
        Some(view)
    }

    /// The recipe of a run that was not started here: that of its name.
    fn recipe_of(&self, name: &str) -> Option<PathBuf> {
        Some(self.places.recipes.join(format!("{name}.toml"))).filter(|path| path.is_file())
    }

    /// What was planned for the memory of the run `name` when it was started here.
    pub fn memory(&self, name: &str) -> serde_json::Value {
        self.queue().records.get(name).map_or(serde_json::Value::Null, |record| record.memory.clone())
    }

    /// Whether there is a run, or a record of one, of this name.
    pub fn is_taken(&self, name: &str) -> bool {
        self.folder(name).exists() || self.queue().records.contains_key(name)
    }

    /// Puts a run at the end of the queue.
    ///
    /// # Errors
    /// A record that cannot be written.
    pub fn enqueue(&self, record: Record) -> Result<()> {
        let mut queue = self.queue();
        let place = queue.records.values().map(|record| record.place + 1).max().unwrap_or(1);
        let record = Record { wanted: Wanted::Queued, error: None, place, ..record };
        record.write(&self.records())?;
        queue.records.insert(record.name.clone(), record);
        Ok(())
    }

    /// Has the run `name` go on from its last checkpoint, when its devices are free.
    pub fn resume(&self, name: &str) -> std::result::Result<(), Refusal> {
        let view = self.view(name).ok_or_else(|| Refusal::missing(format!("run {name}")))?;
        match view.status {
            Status::Paused | Status::Failed => {}
            Status::Finished => return Err(Refusal::conflict(format!("{name} has made all of its steps"))),
            _ => return Err(Refusal::conflict(format!("{name} is not stopped"))),
        }
        let record = self.queue().records.get(name).cloned();
        let record = match (record, self.recipe_of(name)) {
            (Some(record), _) => record,
            (None, Some(recipe)) => Record {
                name: name.to_owned(),
                recipe,
                devices: view.devices,
                wanted: Wanted::Queued,
                place: 0,
                error: None,
                memory: serde_json::Value::Null,
            },
            (None, None) => {
                let why = format!(
                    "the recipe of {name} is not in {}; resume it with `tandem train RECIPE --resume`",
                    self.places.recipes.display()
                );
                return Err(Refusal::conflict(why));
            }
        };
        Ok(self.enqueue(record)?)
    }

    /// Has the run `name` save and stop, or leave the queue.
    pub fn pause(&self, name: &str) -> std::result::Result<(), Refusal> {
        let view = self.view(name).ok_or_else(|| Refusal::missing(format!("run {name}")))?;
        let mut queue = self.queue();
        let was_queued = view.status == Status::Queued;
        if !was_queued && view.status != Status::Running {
            return Err(Refusal::conflict(format!("{name} does not train")));
        }
        let process = worker(&self.folder(name)).or_else(|| queue.children.get(name).map(Child::id));
        if let Some(record) = queue.records.get(name) {
            let record = Record { wanted: Wanted::Paused, ..record.clone() };
            record.write(&self.records())?;
            queue.records.insert(name.to_owned(), record);
        }
        queue.waits.remove(name);
        self.cards.forget(name);
        if !was_queued {
            process.into_iter().for_each(ask_to_stop);
        }
        Ok(())
    }

    /// Takes a run that has trained nothing off the list.
    pub fn forget(&self, name: &str) -> std::result::Result<(), Refusal> {
        let view = self.view(name).ok_or_else(|| Refusal::missing(format!("run {name}")))?;
        if self.folder(name).exists() || matches!(view.status, Status::Running | Status::Stopping) {
            return Err(Refusal::conflict(format!("{name} has trained: its folder is for you to remove")));
        }
        Record::remove(&self.records(), name)?;
        self.queue().records.remove(name);
        self.cards.forget(name);
        Ok(())
    }

    /// Asks a run that trains for clips, or for a checkpoint with adapter files.
    pub fn ask(&self, name: &str, asked: Asked) -> std::result::Result<(), Refusal> {
        let view = self.view(name).ok_or_else(|| Refusal::missing(format!("run {name}")))?;
        if view.status != Status::Running || !self.folder(name).is_dir() {
            return Err(Refusal::conflict(format!("{name} does not train")));
        }
        Ok(asked.of(&self.folder(name))?)
    }

    /// Looks after the queue: what has ended is noted, and what has its devices free is started.
    ///
    /// # Errors
    /// Records that cannot be written.
    pub fn tick(&self) -> Result<()> {
        let mut queue = self.queue();
        self.note_ended(&mut queue)?;
        let training = self.training(&mut queue);
        self.cards.set_training(training.clone());
        let mut waiting: Vec<Record> =
            queue.records.values().filter(|record| record.wanted == Wanted::Queued).cloned().collect();
        waiting.sort_by_key(|record| record.place);
        queue.waits.clear();
        let mut reserved: Vec<(String, String)> = Vec::new();
        for record in waiting {
            let before = reserved.iter().find(|(device, _)| record.devices.contains(device));
            let given = match before {
                _ if training.contains_key(&record.name) => Err("its process ends".to_owned()),
                Some((device, other)) => Err(format!("{other} is before it on {device}")),
                None => self.cards.give(&record.name, &record.devices),
            };
            match given {
                Ok(()) => self.launch(&mut queue, record)?,
                Err(why) => {
                    reserved
                        .extend(record.devices.iter().map(|device| (device.clone(), record.name.clone())));
                    queue.waits.insert(record.name, why);
                }
            }
        }
        Ok(())
    }

    /// Starts the process of a run.
    fn launch(&self, queue: &mut Queue, record: Record) -> Result<()> {
        let name = &record.name;
        let log = Record::log(&self.records(), name);
        let started = self.command(&record).and_then(|command| start(command, &log));
        let record = match started {
            Ok(child) => {
                queue.children.insert(name.clone(), child);
                Record { wanted: Wanted::Started, error: None, ..record }
            }
            Err(error) => Record { wanted: Wanted::Started, error: Some(in_full(&error)), ..record },
        };
        record.write(&self.records())?;
        queue.records.insert(record.name.clone(), record);
        Ok(())
    }

    fn command(&self, record: &Record) -> Result<std::process::Command> {
        let folder = self.folder(&record.name).display().to_string();
        let recipe = record.recipe.display().to_string();
        let own = settings(&self.places, &record.name);
        let mut words = vec!["--json", "train", &recipe];
        own.iter().for_each(|setting| words.extend(["--set", setting]));
        let resume = format!("--resume={folder}");
        if self.folder(&record.name).join("plan.toml").is_file() {
            words.push(&resume);
        }
        tandem(&words)
    }

    /// Notes which processes have ended, and how.
    fn note_ended(&self, queue: &mut Queue) -> Result<()> {
        let mut ended = Vec::new();
        for (name, child) in &mut queue.children {
            if let Ok(Some(status)) = child.try_wait() {
                ended.push((name.clone(), status.code()));
            }
        }
        for (name, code) in ended {
            queue.children.remove(&name);
            let Some(record) = queue.records.get(&name) else { continue };
            let is_as_wanted = code == Some(0) || code == Some(i32::from(INTERRUPTED));
            if record.wanted == Wanted::Started && !is_as_wanted {
                let log = Record::log(&self.records(), &name);
                let how = || match code {
                    Some(code) => format!("it ended with exit code {code}"),
                    None => "its process was killed; what was saved is kept".to_owned(),
                };
                let error = Some(error_in(&log).filter(|_| code.is_some()).unwrap_or_else(how));
                let record = Record { error, ..record.clone() };
                record.write(&self.records())?;
                queue.records.insert(name, record);
            }
        }
        Ok(())
    }

    /// The runs that train, with their devices: those that were started here and all others in the folder.
    fn training(&self, queue: &mut Queue) -> BTreeMap<String, Vec<String>> {
        let mut training = BTreeMap::new();
        for name in names_in(&self.places.runs) {
            let folder = self.folder(&name);
            if worker(&folder).is_none() {
                queue.devices.remove(&name);
                continue;
            }
            let devices = queue.devices.get(&name).cloned();
            let devices = devices.unwrap_or_else(|| read_devices(&folder));
            queue.devices.insert(name.clone(), devices.clone());
            training.insert(name, devices);
        }
        for name in queue.children.keys() {
            if let Some(record) = queue.records.get(name) {
                training.insert(name.clone(), record.devices.clone());
            }
        }
        training
    }
}

/// What the server says of a run in place of its recipe: where it is.
fn settings(places: &Places, name: &str) -> [String; 3] {
    let quoted = |path: &Path| toml::Value::from(path.display().to_string()).to_string();
    [
        format!("run.name={}", toml::Value::from(name)),
        format!("run.folder={}", quoted(&places.runs.join(name))),
        format!("run.cache={}", quoted(&places.runs.join("cache"))),
    ]
}

fn read_devices(folder: &Path) -> Vec<String> {
    Plan::read(&folder.join("plan.toml")).map(|plan| devices_of(&plan)).unwrap_or_default()
}

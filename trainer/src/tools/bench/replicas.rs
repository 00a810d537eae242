//! What replicas gain: the same short run by one replica, by several that `tandem launch` starts, and by several that are started as
//! torchrun starts them, each with the same work a replica.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::rounded;
use super::run::{RunBench, step_seconds};
use super::run_files::prepared;
use crate::error::{Error, Result};
use crate::train::checkpoint;
use crate::watch::ui::Ui;

/// Replicas that are measured.
#[derive(Debug, Clone)]
pub struct ReplicasBench<'a> {
    /// The run of each: `accumulate` micro-batches of its own.
    pub run: RunBench<'a>,
    /// How many, at least two; each number is measured by itself.
    pub worlds: &'a [usize],
    /// How they are started.
    pub starts: &'a [Start],
    /// What the exchange is slowed down to in one more run of each, in Gb/s.
    pub gigabits: Option<f64>,
}

/// Who starts the replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Start {
    /// `tandem launch`.
    Launch,
    /// A process each, with the variables that torchrun gives it.
    Torchrun,
}

/// How replicas are started.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    One,
    By(Start),
    /// By `tandem launch`, with an exchange of so many Gb/s.
    Slowed(f64),
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::One => "one",
            Self::By(Start::Launch) => "launch",
            Self::By(Start::Torchrun) => "torchrun",
            Self::Slowed(_) => "slowed",
        }
    }
}

/// A run that was measured.
struct Measured {
    way: Way,
    folder: PathBuf,
    /// The middle one of all steps but the first.
    seconds: f64,
    /// From the start of the first process until the first step began.
    start: f64,
    row: Value,
}

/// Runs `bench`, each way after the other, and compares times and bits.
///
/// # Errors
/// Files that cannot be written, and runs that fail.
pub fn replicas(bench: &ReplicasBench, ui: &Ui) -> Result<Value> {
    let (_made, recipe) = prepared(&bench.run, ui)?;
    let measure = |way: Way, world: usize, steps: u64| -> Result<Measured> {
        let run = ui.phase(way.name(), || measured(bench, &recipe, way, world, steps))?;
        // A later run may fail, or not be waited for.
        let row = json!({ "start": way.name(), "replicas": world, "run": run.row });
        ui.tell(&format!("{} x {world}: {}", way.name(), run.row), &row);
        Ok(run)
    };
    // What is encoded or quantised once does not count for the start of the first.
    measure(Way::One, 1, 1)?;
    let steps = bench.run.steps;
    let one = measure(Way::One, 1, steps)?;
    let mut worlds = Vec::new();
    for &world in bench.worlds {
        let ways = bench.starts.iter().map(|start| Way::By(*start)).chain(bench.gigabits.map(Way::Slowed));
        let runs = ways.map(|way| measure(way, world, steps)).collect::<Result<Vec<_>>>()?;
        let mut row = json!({ "replicas": world });
        for run in &runs {
            row[run.way.name()] = run.beside(&one);
        }
        let bits = runs.iter().map(|run| last_bits(&run.folder)).collect::<Result<Vec<_>>>()?;
        // One run has nothing to be compared with.
        row["same_bits"] = (bits.len() > 1).then(|| bits.windows(2).all(|pair| pair[0] == pair[1])).into();
        worlds.push(row);
    }
    Ok(json!({
        "what": "replicas", "model": bench.run.model, "stages": bench.run.devices.stages, "size": bench.run.size.label(),
        "frames": bench.run.size.frames, "accumulate_each": bench.run.accumulate, "one": one.row, "worlds": worlds,
        "slowed_to_gbit_s": bench.gigabits,
    }))
}

impl Measured {
    /// Its figures, and what they are of those of `one` replica.
    fn beside(&self, one: &Self) -> Value {
        let mut row = self.row.clone();
        row["efficiency"] = rounded(one.seconds / self.seconds, 4).into();
        row["start_beyond_one_s"] = rounded(self.start - one.start, 2).into();
        row
    }
}

fn measured(bench: &ReplicasBench, recipe: &Path, way: Way, world: usize, steps: u64) -> Result<Measured> {
    let folder = recipe.with_file_name(format!("{}-{world}", way.name()));
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { action, path, source }
    };
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(io("remove", &folder))?;
    }
    let words = |words: &[&str]| -> Vec<String> {
        let settings = [
            format!("run.folder={}-{world}", way.name()),
            "sample.prompts=[]".to_owned(),
            format!("train.steps={steps}"),
            format!("train.accumulate={}", world * bench.run.accumulate),
        ];
        let mut all: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        all.push(recipe.display().to_string());
        all.extend(settings.iter().flat_map(|setting| ["--set".to_owned(), setting.clone()]));
        all
    };
    let count = world.to_string();
    let begun = Instant::now();
    let processes = match way {
        Way::One => vec![start(&words(&["train"]), &[])?],
        Way::By(Start::Launch) => vec![start(&words(&["launch", "--replicas", &count]), &[])?],
        Way::By(Start::Torchrun) => torchrun(&words(&["train"]), world)?,
        Way::Slowed(gigabits) => {
            let mut words = words(&["launch", "--replicas", &count]);
            words.extend(["--exchange-gbits".to_owned(), gigabits.to_string()]);
            vec![start(&words, &[])?]
        }
    };
    let metrics = folder.join("metrics.jsonl");
    let first = finished(processes, &metrics)?.saturating_duration_since(begun);
    let seconds = step_seconds(&metrics)?;
    let (first_step, mut later) =
        (seconds.first().copied().unwrap_or(0.0), seconds[1.min(seconds.len())..].to_vec());
    later.sort_by(f64::total_cmp);
    let middle = later.get(later.len() / 2).copied().unwrap_or(first_step);
    let start = first.as_secs_f64() - first_step;
    let row = json!({
        "s_per_step": rounded(middle, 3), "first_step_s": rounded(first_step, 3), "start_s": rounded(start, 2),
        "exchange_s": exchange(&metrics)?.map(|seconds| rounded(seconds, 4)),
    });
    Ok(Measured { way, folder, seconds: middle, start, row })
}

fn start(words: &[String], variables: &[(&str, String)]) -> Result<Child> {
    let io = |source| Error::Io { action: "start", path: PathBuf::from("tandem"), source };
    let mut command = Command::new(std::env::current_exe().map_err(io)?);
    command.args(words).envs(variables.iter().map(|(name, value)| (*name, value)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().map_err(io)
}

/// As many processes, with the variables that torchrun gives them.
fn torchrun(words: &[String], world: usize) -> Result<Vec<Child>> {
    let io =
        |source| Error::Io { action: "find a free port beside", path: PathBuf::from("localhost"), source };
    // Bound meanwhile, as torchrun's own store binds it.
    let store = TcpListener::bind(("localhost", 0)).map_err(io)?;
    let port = store.local_addr().map_err(io)?.port();
    let process = |rank: usize| {
        let numbers = [
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("WORLD_SIZE", world),
            ("LOCAL_WORLD_SIZE", world),
            ("GROUP_RANK", 0),
        ];
        let mut variables: Vec<(&str, String)> =
            numbers.iter().map(|(name, number)| (*name, number.to_string())).collect();
        variables.push(("MASTER_ADDR", "localhost".to_owned()));
        variables.push(("MASTER_PORT", port.to_string()));
        start(words, &variables)
    };
    (0..world).map(process).collect()
}

/// Waits for all `processes`; when the first step was in the log at `metrics`.
fn finished(mut processes: Vec<Child>, metrics: &Path) -> Result<Instant> {
    let mut first = None;
    loop {
        let is_there = || fs::read_to_string(metrics).is_ok_and(|text| text.contains("\"grad_norm\""));
        if first.is_none() && is_there() {
            first = Some(Instant::now());
        }
        let mut is_over = true;
        for process in &mut processes {
            let io = |source| Error::Io { action: "wait for", path: PathBuf::from("tandem"), source };
            match process.try_wait().map_err(io)? {
                Some(status) if !status.success() => {
                    let why =
                        format!("a run that was measured ended with {status}; its own message says why");
                    return Err(Error::Setting { key: "bench replicas".into(), why });
                }
                status => is_over &= status.is_some(),
            }
        }
        if is_over {
            return Ok(first.unwrap_or_else(Instant::now));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The middle one of the seconds of the exchanges in the log at `path`, the first step's left out; nothing of one replica.
fn exchange(path: &Path) -> Result<Option<f64>> {
    let io = |source| Error::Io { action: "read", path: path.to_owned(), source };
    let text = fs::read_to_string(path).map_err(io)?;
    let rows = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let seconds = rows.filter_map(|row| row["replicas"]["exchange_seconds"].as_f64());
    let mut seconds: Vec<f64> = seconds.skip(1).collect();
    seconds.sort_by(f64::total_cmp);
    Ok(seconds.get(seconds.len() / 2).copied())
}

/// A digest of the last checkpoint of the run in `folder`: equal for equal bits.
fn last_bits(folder: &Path) -> Result<Vec<u8>> {
    let path = checkpoint::newest(&folder.join("checkpoints"))?;
    let missing = || Error::NothingToResume { folder: folder.to_owned() };
    checkpoint::digest(&checkpoint::load(&path.ok_or_else(missing)?)?.1)
}

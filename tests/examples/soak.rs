//! Runs that are killed, damaged, short of disk and concurrent, for a given time: another result than that of an undisturbed
//! run, a panic, a hang or left-over files are failures. Prints a table.
//!
//! `cargo build --release && cargo run --release -p tandem-proofs --example soak -- --minutes 10`

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use kernels::{Device, Tensor};
use proofs::project::Project;
use serde_json::Value;

/// Runs that are killed, damaged, short of disk and crowded.
#[derive(Debug, Parser)]
struct Arguments {
    /// How long rounds are begun.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Seed of all that is random; each round has one of its own, which a failure names.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The program. Default: in the folder of this one.
    #[arg(long)]
    tandem: Option<PathBuf>,
}

const CAPTIONS: [&str; 3] = ["a red ball", "two birds fly over the sea", "a fox"];
const STEPS: usize = 12;
const SETTINGS: &str = r#"
[adapter]
rank = 4
dropout = 0.1

[train]
steps = 12
accumulate = 2
caption_dropout = 0.3

[checkpoint]
every_steps = 3
keep_last = 3

[sample]
prompts = ["a red ball --l 1"]
every = 6
steps = 2
"#;
/// No command of these sizes takes longer, even on a busy machine.
const LONGEST: Duration = Duration::from_secs(120);

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// The result of a run: everything but times.
#[derive(PartialEq)]
struct Came {
    rows: Vec<Value>,
    /// Bits of every tensor of the adapters and of the newest checkpoint.
    tensors: BTreeMap<String, Vec<u32>>,
    clips: BTreeMap<PathBuf, Vec<u8>>,
}

/// The program, and an undisturbed run.
struct Soak {
    tandem: PathBuf,
    straight: Came,
    took: Duration,
}

type Outcome = Result<(), String>;
type Round = fn(&Soak, &mut Random) -> Outcome;

const ROUNDS: [(&str, Round); 7] = [
    ("killed at a random time (SIGKILL), up to three times, and resumed", |soak, r| soak.stopped("-KILL", r)),
    ("interrupted at a random time (SIGINT), and resumed", |soak, r| soak.stopped("-INT", r)),
    ("asked to end at a random time (SIGTERM), and resumed", |soak, r| soak.stopped("-TERM", r)),
    ("disk full (limit on file sizes), then resumed with room", Soak::full),
    ("a bit of a checkpoint or plan flipped, then resumed", Soak::damaged_run),
    ("bytes of a clip, caption, recipe, model or cache file changed", Soak::damaged_input),
    ("four runs begun together, two resumed together", Soak::crowded),
];

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Examples are in a folder below the programs.
    let beside = || std::env::current_exe().unwrap().with_file_name("../tandem");
    let tandem = arguments.tandem.clone().unwrap_or_else(beside);
    if !tandem.is_file() {
        eprintln!(
            "{} is not there: run `cargo build --release` first, or name it with --tandem",
            tandem.display()
        );
        return ExitCode::from(2);
    }
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(60.0 * arguments.minutes);
    let soak = Soak::new(tandem);
    let mut tally = [(0, 0, Duration::ZERO); ROUNDS.len()];
    let mut number = 0;
    while Instant::now() < end {
        let index = number % ROUNDS.len();
        let seed = arguments.seed.wrapping_add(number as u64);
        let started = Instant::now();
        let outcome = ROUNDS[index].1(&soak, &mut Random(seed));
        let (rounds, failures, time) = &mut tally[index];
        *rounds += 1;
        *time += started.elapsed();
        if let Err(why) = outcome {
            *failures += 1;
            eprintln!("round {number}, seed {seed}: {}: {why}", ROUNDS[index].0);
        }
        number += 1;
    }
    println!("| round | count | failures | seconds each |\n|---|---|---|---|");
    for ((name, _), (rounds, failures, time)) in ROUNDS.iter().zip(tally) {
        println!("| {name} | {rounds} | {failures} | {:.1} |", time.as_secs_f64() / f64::from(rounds.max(1)));
    }
    let failures: u32 = tally.iter().map(|(_, failures, _)| failures).sum();
    println!("\n{number} rounds in {:.1} minutes, {failures} failures", begun.elapsed().as_secs_f64() / 60.0);
    ExitCode::from(u8::from(failures > 0))
}

fn project() -> Project {
    Project::new(&proofs::fixture(""), &CAPTIONS, SETTINGS)
}

impl Soak {
    fn new(tandem: PathBuf) -> Self {
        let project = project();
        let empty = Came { rows: Vec::new(), tensors: BTreeMap::new(), clips: BTreeMap::new() };
        let mut soak = Self { tandem, straight: empty, took: Duration::ZERO };
        let begun = Instant::now();
        let status = soak.run(&project, &["train"]).unwrap();
        assert!(status.success(), "an undisturbed run fails: {status}");
        soak.took = begun.elapsed();
        soak.straight = came(&project.run()).unwrap();
        soak
    }

    fn start(&self, project: &Project, words: &[&str]) -> Child {
        let mut command = Command::new(&self.tandem);
        command.args(words).arg(project.recipe()).current_dir(project.root());
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Runs a command to its end, which must be none of a defect.
    fn run(&self, project: &Project, words: &[&str]) -> Result<ExitStatus, String> {
        ended(self.start(project, words))
    }

    /// Resumes until the run is done, and compares.
    fn resumed(&self, project: &Project) -> Outcome {
        match self.run(project, &["train", "--resume"])?.code() {
            Some(0) => {}
            // Stopped before the run folder was created: there is nothing to resume.
            Some(2) if !project.run().join("plan.toml").exists() => {
                let status = self.run(project, &["train"])?;
                if !status.success() {
                    return Err(format!("a run that begins anew ends with {status}"));
                }
            }
            code => return Err(format!("the resumed run ends with {code:?}")),
        }
        self.same(project)
    }

    fn same(&self, project: &Project) -> Outcome {
        let came = came(&project.run())?;
        if came.rows != self.straight.rows {
            return Err("metrics.jsonl differs from an undisturbed run's".to_owned());
        }
        if came.tensors != self.straight.tensors || came.clips != self.straight.clips {
            return Err("adapters, checkpoint or clips differ from an undisturbed run's".to_owned());
        }
        let stray =
            files(&project.run()).into_iter().find(|path| path.extension().is_some_and(|e| e == "tmp"));
        stray.map_or(Ok(()), |path| Err(format!("{} was left behind", path.display())))
    }

    fn stopped(&self, signal: &str, random: &mut Random) -> Outcome {
        let project = project();
        for attempt in 0..1 + random.below(3) {
            let words: &[&str] = if attempt == 0 { &["train"] } else { &["train", "--resume"] };
            let mut child = self.start(&project, words);
            std::thread::sleep(self.took.mul_f64(random.below(1000) as f64 / 1000.0));
            if child.try_wait().unwrap().is_none() {
                Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
            }
            let status = ended_or_killed(child)?;
            let is_expected = match (status.code(), signal) {
                (None, "-KILL" | "-INT" | "-TERM") | (Some(0 | 130), _) => true,
                (Some(2), _) => !project.run().join("plan.toml").exists(),
                _ => false,
            };
            if !is_expected {
                return Err(format!("{words:?} ends with {status} after {signal}"));
            }
        }
        self.resumed(&project)
    }

    fn full(&self, random: &mut Random) -> Outcome {
        let project = project();
        let blocks = (1 + random.below(400)).to_string();
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).arg(&self.tandem).arg("train").arg(project.recipe());
        command.current_dir(project.root()).stdout(Stdio::null()).stderr(Stdio::null());
        let status = ended(command.spawn().unwrap())?;
        if !matches!(status.code(), Some(0 | 2)) {
            return Err(format!("with files of at most {blocks} blocks the run ends with {status}"));
        }
        let stray =
            files(project.root()).into_iter().find(|path| path.extension().is_some_and(|e| e == "tmp"));
        if let Some(path) = stray {
            return Err(format!("{} was left behind", path.display()));
        }
        self.resumed(&project)
    }

    /// A run that is resumed with a changed file either refuses it or ends as if it had not been changed.
    fn damaged_run(&self, random: &mut Random) -> Outcome {
        let project = project();
        let mut child = self.start(&project, &["train"]);
        let newest = || trainer::train::checkpoint::newest(&project.run().join("checkpoints")).ok().flatten();
        let begun = Instant::now();
        while newest().is_none() && child.try_wait().unwrap().is_none() && begun.elapsed() < LONGEST {
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().ok();
        child.wait().unwrap();
        let Some(checkpoint) = newest() else { return Err("no checkpoint came".to_owned()) };
        let victims = [checkpoint, project.run().join("plan.toml")];
        let victim = random.of(&victims);
        let whole = fs::read(victim).unwrap();
        let mut bytes = whole.clone();
        let bit = random.below(8 * bytes.len());
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(victim, bytes).unwrap();
        match self.run(&project, &["train", "--resume"])?.code() {
            Some(0) => self.same(&project),
            Some(2) => {
                fs::write(victim, whole).unwrap();
                self.resumed(&project)
            }
            code => Err(format!("bit {bit} of {}: the run ends with {code:?}", victim.display())),
        }
    }

    fn damaged_input(&self, random: &mut Random) -> Outcome {
        let project = project();
        if random.below(2) == 0 {
            self.run(&project, &["cache"])?;
        }
        let victims = files(project.root());
        let victim = random.of(&victims);
        let mut bytes = fs::read(victim).unwrap();
        for _ in 0..1 + random.below(4) {
            let at = random.below(bytes.len());
            match (random.below(3), bytes.get_mut(at)) {
                (0, _) => bytes.truncate(at),
                (1, Some(byte)) => *byte = random.next() as u8,
                (_, Some(byte)) => *byte ^= 1 << random.below(8),
                (_, None) => bytes.push(random.next() as u8),
            }
        }
        fs::write(victim, bytes).unwrap();
        for words in [&["plan"][..], &["cache"]] {
            let status = self.run(&project, words)?;
            if !matches!(status.code(), Some(0 | 2)) {
                return Err(format!("{words:?} with a changed {} ends with {status}", victim.display()));
            }
        }
        Ok(())
    }

    fn crowded(&self, random: &mut Random) -> Outcome {
        let project = project();
        let mut children = Vec::new();
        for _ in 0..4 {
            children.push(self.start(&project, &["train"]));
            std::thread::sleep(Duration::from_millis(random.below(50) as u64));
        }
        for child in children {
            let status = ended(child)?;
            if !status.success() {
                return Err(format!("one of four runs ends with {status}"));
            }
        }
        for run in ["run", "run-2", "run-3", "run-4"] {
            if came(&project.root().join(run))?.tensors != self.straight.tensors {
                return Err(format!("{run} differs from an undisturbed run"));
            }
        }
        let both = [0, 1].map(|_| self.start(&project, &["train", "--resume"]));
        for child in both {
            let status = ended(child)?;
            if !matches!(status.code(), Some(0 | 2)) {
                return Err(format!("one of two resumed runs ends with {status}"));
            }
        }
        self.same(&project)
    }
}

/// Waits for the end; a hang is killed and reported, as is death by a signal.
fn ended(child: Child) -> Result<ExitStatus, String> {
    let status = ended_or_killed(child)?;
    match status.code() {
        Some(1 | 101) | None => Err(format!("a command ends with {status}")),
        Some(_) => Ok(status),
    }
}

fn ended_or_killed(mut child: Child) -> Result<ExitStatus, String> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Ok(status);
        }
        if begun.elapsed() > LONGEST {
            child.kill().ok();
            child.wait().ok();
            return Err("a command hangs".to_owned());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn came(run: &Path) -> Result<Came, String> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).map_err(|e| format!("metrics.jsonl: {e}"))?;
    let mut rows = Vec::new();
    for line in text.lines() {
        let mut row: Value = serde_json::from_str(line).map_err(|e| format!("metrics.jsonl is torn: {e}"))?;
        row.as_object_mut().map(|fields| fields.remove("seconds"));
        rows.push(row);
    }
    if rows.len() != STEPS {
        return Err(format!("{} has {} rows, not {STEPS}", run.display(), rows.len()));
    }
    let mut tensors = BTreeMap::new();
    let newest = trainer::train::checkpoint::newest(&run.join("checkpoints")).map_err(|e| e.to_string())?;
    for path in files(&run.join("adapters")).into_iter().chain(newest) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let loaded = kernels::safetensors::load(&path, &Device::Cpu).map_err(|e| format!("{name}: {e}"))?;
        tensors.extend(loaded.iter().map(|(tensor, values)| (format!("{name} {tensor}"), bits(values))));
    }
    let samples = run.join("samples");
    let clips = files(&samples).into_iter().map(|path| {
        let name = path.strip_prefix(&samples).unwrap_or(&path).to_owned();
        (name, fs::read(&path).unwrap_or_default())
    });
    Ok(Came { rows, tensors, clips: clips.collect() })
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    let flat = tensor.to_dtype(kernels::DType::F32).and_then(|t| t.flatten_all()).unwrap();
    flat.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// All files below `folder`, sorted.
fn files(folder: &Path) -> Vec<PathBuf> {
    let (mut found, mut open) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            match entry.path() {
                path if path.is_dir() => open.push(path),
                path => found.push(path),
            }
        }
    }
    found.sort();
    found
}

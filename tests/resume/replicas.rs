//! Runs of several replicas on the program itself: each a process, some of them killed.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use proofs::project::Project;

use super::{SETTINGS, assert_same_tensors, contents, project, rows};

/// A replica notices one that is gone at once and a silent one after 12 s, and ends within 8 s of that.
const BOUND: Duration = Duration::from_secs(30);

/// The project of the resume proofs, which has everything that could tell two runs apart, with one stage.
fn single() -> Project {
    let project = project();
    let recipe = fs::read_to_string(project.recipe()).unwrap();
    fs::write(project.recipe(), recipe.replace("[\"cpu\", \"cpu\"]", "[\"cpu\"]")).unwrap();
    project
}

fn tandem(project: &Project, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.args(arguments).current_dir(project.root()).env("RAYON_NUM_THREADS", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs `tandem launch` to the end.
fn launch(project: &Project, options: &[&str], more: &[&str]) -> Output {
    let recipe = project.recipe();
    let arguments = [&["launch"], options, &[recipe.to_str().unwrap()], more].concat();
    tandem(project, &arguments).output().unwrap()
}

#[track_caller]
fn succeeds(output: &Output) {
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}: {told}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout)
    );
}

fn run_of(replicas: &str) -> Project {
    let project = single();
    succeeds(&launch(&project, &["--replicas", replicas], &[]));
    project
}

/// The rows of the log without times.
fn steps(project: &Project) -> Vec<serde_json::Value> {
    let mut rows = rows(project);
    rows.iter_mut().for_each(|row| drop(row.as_object_mut().unwrap().remove("replicas")));
    rows
}

fn checkpoint(project: &Project, step: u64) -> PathBuf {
    project.run().join(format!("checkpoints/step-{step:06}.safetensors"))
}

fn tensors(project: &Project, step: u64) -> std::collections::HashMap<String, kernels::Tensor> {
    kernels::safetensors::load(checkpoint(project, step), &kernels::Device::Cpu).unwrap()
}

/// The same batches, noise and order, the same losses to rounding, and from them the same adapter to what twenty steps make of
/// rounding.
fn assert_same_training(what: &str, got: &Project, expected: &Project) {
    let (got_rows, expected_rows) = (steps(got), steps(expected));
    assert_eq!(got_rows.len(), expected_rows.len(), "{what}");
    for (row, expected) in got_rows.iter().zip(&expected_rows) {
        for exact in ["step", "epoch", "items", "sigma", "lr"] {
            assert_eq!(row[exact], expected[exact], "{what}: {exact}");
        }
        for rounded in ["loss", "grad_norm", "eval_loss"] {
            let (Some(value), Some(expected)) = (row[rounded].as_f64(), expected[rounded].as_f64()) else {
                continue;
            };
            assert!((value / expected - 1.0).abs() < 1e-3, "{what}: {rounded} {value}, expected {expected}");
        }
    }
    // The first step's gradients differ by the order of their sums alone.
    let first = |rows: &[serde_json::Value]| rows.iter().find_map(|row| row["grad_norm"].as_f64()).unwrap();
    let (norm, expected_norm) = (first(&got_rows), first(&expected_rows));
    assert!((norm / expected_norm - 1.0).abs() < 1e-6, "{what}: {norm}, expected {expected_norm}");
    let (tensors, expected) = (tensors(got, 20), tensors(expected, 20));
    for (name, expected) in expected.iter().filter(|(name, _)| name.ends_with("parameter")) {
        let difference = (&tensors[name] - expected).unwrap().abs().unwrap().max_all().unwrap();
        // A learning rate of 1e-2 moves a parameter by up to 0.2 in twenty steps.
        let difference: f32 = difference.to_scalar().unwrap();
        assert!(difference < 1e-3, "{what}: {name} differs by {difference}");
    }
}

fn assert_same_bits(what: &str, got: &Project, expected: &Project) {
    assert_eq!(steps(got), steps(expected), "{what}");
    for folder in ["checkpoints", "adapters"] {
        assert_same_tensors(what, &got.run().join(folder), &expected.run().join(folder));
    }
    let clips = |project: &Project| contents(&project.run().join("samples"), |path| fs::read(path).unwrap());
    assert!(clips(got) == clips(expected), "{what}: clips differ");
}

/// Five micro-batches of a step on one, two, three replicas: N replicas are one replica with the same micro-batches, to the
/// rounding of sums in another order; two runs of one size have the same bits; and every replica saw the same sums.
#[test]
fn replicas_train_what_one_replica_trains() {
    let one = run_of("1");
    for replicas in ["2", "3"] {
        let (run, again) = (run_of(replicas), run_of(replicas));
        assert_same_training(&format!("{replicas} replicas"), &run, &one);
        assert_same_bits(&format!("{replicas} replicas twice"), &again, &run);
        let norms = |text: String| -> Vec<serde_json::Value> {
            let rows = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
            rows.filter(|row| row["grad_norm"].is_number()).map(|row| row["grad_norm"].clone()).collect()
        };
        let own = norms(fs::read_to_string(run.run().join("metrics.jsonl")).unwrap());
        assert_eq!(own.len(), 20);
        for rank in 1..replicas.parse().unwrap() {
            let log = run.run().join(format!("replicas/rank-{rank:03}.jsonl"));
            assert_eq!(norms(fs::read_to_string(log).unwrap()), own, "rank {rank} of {replicas}");
        }
    }
}

/// A group of replicas without a launcher, so that each process is at hand.
struct Group<'a> {
    project: &'a Project,
    ranks: Vec<Child>,
}

impl<'a> Group<'a> {
    fn start(project: &'a Project, world: usize, restarts: usize) -> Self {
        let port = TcpListener::bind(("localhost", 0)).unwrap().local_addr().unwrap().port();
        let recipe = project.recipe();
        let rank = |rank: usize| {
            let numbers = [rank, world, restarts].map(|number| number.to_string());
            let place = format!("localhost:{port}");
            let arguments = [
                "train",
                recipe.to_str().unwrap(),
                "--rank",
                &numbers[0],
                "--world",
                &numbers[1],
                "--restarts",
                &numbers[2],
                "--master",
                &place,
            ];
            tandem(project, &arguments).stdout(Stdio::null()).spawn().unwrap()
        };
        Self { project, ranks: (0..world).map(rank).collect() }
    }

    /// Waits until the log has `step` steps.
    fn run_into(&mut self, step: usize) {
        let begun = Instant::now();
        while steps_logged(self.project) < step {
            assert!(begun.elapsed() < Duration::from_secs(300), "step {step} never came");
            for (rank, child) in self.ranks.iter_mut().enumerate() {
                if child.try_wait().unwrap().is_some() {
                    let told = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
                    panic!("rank {rank} ended before step {step}: {told}");
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn signal(&self, rank: usize, signal: &str) {
        let id = self.ranks[rank].id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// The exit codes and what was said, all within [`BOUND`].
    fn end(self) -> Vec<(Option<i32>, String)> {
        let begun = Instant::now();
        let outputs: Vec<Output> =
            self.ranks.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
        assert!(begun.elapsed() < BOUND, "the last one ended after {:?}", begun.elapsed());
        let told =
            |output: Output| (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned());
        outputs.into_iter().map(told).collect()
    }
}

fn steps_logged(project: &Project) -> usize {
    let text = fs::read_to_string(project.run().join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter(|line| line.contains("\"grad_norm\"")).count()
}

/// A rank that is killed takes the others with it, whichever it is; the next start resumes from the last checkpoint, on as many
/// replicas with the same bits.
#[test]
fn replicas_of_which_one_is_killed_all_stop_and_resume_as_if_it_never_was() {
    let straight = run_of("3");
    let killed = single();
    for (restarts, rank, step) in [(0, 2, 3), (1, 0, 12)] {
        let mut group = Group::start(&killed, 3, restarts);
        group.run_into(step);
        group.signal(rank, "-KILL");
        for (other, (code, told)) in group.end().into_iter().enumerate() {
            let expected = if other == rank { None } else { Some(75) };
            assert_eq!(code, expected, "rank {other}: {told}");
            if other != rank {
                assert!(
                    told.contains(&format!("rank {rank} ")) && told.contains("is gone"),
                    "rank {other}: {told}"
                );
            }
        }
        assert!(steps_logged(&killed) < 20, "the kill came too late to prove anything");
    }
    let ended = Group::start(&killed, 3, 2).end();
    assert!(ended.iter().all(|(code, _)| *code == Some(0)), "{ended:?}");
    assert_same_bits("killed twice", &killed, &straight);
}

/// A process that hangs says nothing, and is found out by that.
#[test]
fn a_replica_that_hangs_stops_the_others() {
    let project = single();
    let mut group = Group::start(&project, 2, 0);
    group.run_into(2);
    group.signal(1, "-STOP");
    let (begun, mut hanging) = (Instant::now(), group.ranks.pop().unwrap());
    let ended = group.end();
    assert!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
    hanging.kill().unwrap();
    hanging.wait().unwrap();
    assert_eq!(ended[0].0, Some(75), "{ended:?}");
    assert!(ended[0].1.contains("has not been heard of"), "{ended:?}");
}

/// SIGTERM, and SIGUSR1 before a preemption: all finish the step, rank 0 saves it, and another number of replicas goes on with
/// the same batches in the same order.
#[test]
fn a_replica_that_is_asked_to_stop_stops_all_and_another_number_goes_on() {
    let one = run_of("1");
    let project = single();
    let mut made = 0;
    for (restarts, world, rank, signal) in [(0, 3, 1, "-TERM"), (1, 2, 0, "-USR1")] {
        let mut group = Group::start(&project, world, restarts);
        group.run_into(made + 3);
        group.signal(rank, signal);
        for (other, (code, told)) in group.end().into_iter().enumerate() {
            assert_eq!(code, Some(if other == rank { 130 } else { 75 }), "rank {other}: {told}");
        }
        made = steps_logged(&project);
        assert!(made < 20, "the signal came too late to prove anything");
        assert!(checkpoint(&project, made as u64).is_file(), "step {made} is not saved");
    }
    succeeds(&launch(&project, &["--replicas", "5"], &["--resume"]));
    assert_same_training("3, then 2, then 5 replicas", &project, &one);
}

/// The launcher ends all when one fails, says whose line is whose, and starts them again where it may.
#[test]
fn launch_joins_the_output_and_starts_again() {
    let project = single();
    let recipe = project.recipe();
    let arguments = ["launch", "--replicas", "2", "--max-restarts", "1", recipe.to_str().unwrap()];
    let launcher = tandem(&project, &arguments).spawn().unwrap();
    let begun = Instant::now();
    while steps_logged(&project) < 11 {
        assert!(begun.elapsed() < Duration::from_secs(300), "no step came");
        std::thread::sleep(Duration::from_millis(5));
    }
    // The process of rank 1, which the launcher alone knows.
    let list =
        Command::new("ps").args(["-o", "pid=,args=", "--ppid", &launcher.id().to_string()]).output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let line = list.lines().find(|line| line.contains("--rank 1")).unwrap_or_else(|| panic!("{list}"));
    let id = line.split_whitespace().next().unwrap();
    assert!(Command::new("kill").args(["-KILL", id]).status().unwrap().success());
    let output = launcher.wait_with_output().unwrap();
    succeeds(&output);
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        errors.contains("a replica failed") && out.contains("[rank 0] done: 20 steps"),
        "{out}\n{errors}"
    );
    assert!(out.contains("going on after step 10"), "{out}");
    assert!(out.lines().all(|line| line.starts_with("[rank 0]")), "{out}");
}

/// Two hosts, played by a shell in place of ssh: they find each other, and Ctrl-C reaches both.
#[test]
fn launch_over_ssh_starts_every_host_and_stops_all() {
    let project = single();
    let ssh = project.root().join("ssh.sh");
    // It drops the host and runs the line, as sshd does.
    fs::write(&ssh, "shift; exec sh -c \"$1\"\n").unwrap();
    let ssh = format!("sh {}", ssh.display());
    let port = TcpListener::bind(("localhost", 0)).unwrap().local_addr().unwrap().port().to_string();
    let recipe = project.recipe();
    let arguments = [
        "launch",
        "--hosts",
        "localhost,me@localhost",
        "--ssh",
        &ssh,
        "--port",
        &port,
        "--replicas",
        "1",
        recipe.to_str().unwrap(),
    ];
    let launcher = tandem(&project, &arguments).spawn().unwrap();
    let begun = Instant::now();
    while steps_logged(&project) < 3 {
        assert!(begun.elapsed() < Duration::from_secs(300), "no step came");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &launcher.id().to_string()]).status().unwrap().success());
    let output = launcher.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{told}");
    assert!(told.contains("2 replicas") || told.contains("rank 1 of 2"), "{told}");
    assert!(checkpoint(&project, steps_logged(&project) as u64).is_file(), "{told}");
}

/// Another recipe on one host: no rank trains, and all say which key differs.
#[test]
fn replicas_with_other_recipes_do_not_begin() {
    let project = single();
    let other = project.root().join("other.toml");
    let recipe = fs::read_to_string(project.recipe()).unwrap();
    fs::write(&other, recipe.replace("lr = 1e-2", "lr = 2e-2")).unwrap();
    assert!(SETTINGS.contains("lr = 1e-2"));
    let port = TcpListener::bind(("localhost", 0)).unwrap().local_addr().unwrap().port();
    let place = format!("localhost:{port}");
    let start = |rank: &str, recipe: PathBuf| {
        let arguments =
            ["train", recipe.to_str().unwrap(), "--rank", rank, "--world", "2", "--master", &place];
        tandem(&project, &arguments).spawn().unwrap()
    };
    let ranks = [start("0", project.recipe()), start("1", other)];
    let sentence = |rank: Child| {
        let output = rank.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{told}");
        told.lines().find(|line| line.starts_with("error:")).unwrap().to_owned()
    };
    let told = ranks.map(sentence);
    assert!(told[0].contains("optimizer.lr = 0.02 in place of 0.01"), "{}", told[0]);
    assert_eq!(told[0], told[1]);
    assert!(!project.run().exists(), "a run folder was begun");
}

//! Several processes that work on the same project at the same time.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::desk::{Desk, Outcome};

fn start(desk: &Desk, words: &[&str]) -> Child {
    desk.command(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn rows(desk: &Desk, run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(desk.path(run).join("metrics.jsonl")).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_second_process_cannot_resume_a_run_that_is_going_on() {
    let desk = Desk::new();
    desk.change("[train]\nsteps = 2", "[train]\nsteps = 100000");
    let mut first = start(&desk, &["train", "recipe.toml"]);
    let begun = Instant::now();
    let metrics = desk.path("run/metrics.jsonl");
    while !metrics.metadata().is_ok_and(|metadata| metadata.len() > 0) {
        assert!(first.try_wait().unwrap().is_none(), "the run ended by itself");
        assert!(begun.elapsed() < Duration::from_secs(120), "the first step never came");
        std::thread::sleep(Duration::from_millis(5));
    }
    let second = desk.run(&["train", "recipe.toml", "--resume"]);
    second.assert_refused(&[&format!("in use by process {} on host ", first.id()), "run"]);
    assert!(first.try_wait().unwrap().is_none(), "the first run ended: {second:?}");
    first.kill().unwrap();
    first.wait().unwrap();

    // The lock dies with its process.
    desk.change("steps = 100000", "steps = 2");
    desk.succeed(&["train", "recipe.toml", "--resume"]);
    assert_eq!(rows(&desk, "run").len(), 2);
}

#[test]
fn runs_that_begin_together_each_get_a_folder() {
    let desk = Desk::new();
    desk.succeed(&["cache", "recipe.toml"]);
    let children: Vec<Child> = (0..6).map(|_| start(&desk, &["train", "recipe.toml"])).collect();
    for child in children {
        let outcome: Outcome = child.wait_with_output().unwrap().into();
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    }
    for run in ["run", "run-2", "run-3", "run-4", "run-5", "run-6"] {
        assert_eq!(rows(&desk, run).len(), 2, "{run}");
    }
}

/// Each asks whether the cache takes files, under a name of its own.
#[test]
fn processes_that_fill_a_cache_together_do_not_disturb_each_other() {
    for _ in 0..3 {
        let desk = Desk::new();
        let children: Vec<Child> = (0..4).map(|_| start(&desk, &["cache", "recipe.toml"])).collect();
        for child in children {
            let outcome: Outcome = child.wait_with_output().unwrap().into();
            assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        }
        desk.assert_no_temporary_files();
    }
}

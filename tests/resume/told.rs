//! A run does what it is told at its next step, and a learning rate that it was told is part of the run.

use std::fs;
use std::time::Duration;

use super::{Project, assert_same_run, finish, logged_steps, project, rows, run_into, start, wait_until};

fn tell(project: &Project, what: &[&str]) {
    let run = project.run();
    let words = [&["tell", run.to_str().unwrap()], what].concat();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tandem"));
    let output = command.args(words).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Told in the middle and killed before a checkpoint, the run takes the rate at the same step again.
#[test]
fn a_learning_rate_that_was_told_is_told_again_after_a_kill() {
    let project = project();
    let mut child = start(&project, &["train"]);
    run_into(&project, &mut child, 2);
    tell(&project, &["lr=2.5e-3"]);
    let told = project.run().join("told.jsonl");
    wait_until(&mut child, "the rate", || told.is_file());
    let step = logged_steps(&project);
    wait_until(&mut child, "steps with it", || logged_steps(&project) > step);
    child.kill().unwrap();
    child.wait().unwrap();
    let text = fs::read_to_string(&told).unwrap();
    let entry: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(entry["lr"], 2.5e-3);
    assert!(finish(start(&project, &["train", "--resume"])).success());

    let straight = super::project();
    fs::create_dir_all(straight.run()).unwrap();
    fs::write(straight.run().join("told.jsonl"), &text).unwrap();
    assert!(finish(start(&straight, &["train"])).success());
    assert_same_run(&project, &straight);

    let told_at = entry["step"].as_u64().unwrap();
    let rate = |step: u64| {
        let all = rows(&project);
        let row = all.iter().find(|row| row["step"] == step && row["lr"].is_f64());
        row.unwrap()["lr"].as_f64().unwrap()
    };
    // The schedule goes on with a quarter of its height.
    let (before, after) = (rate(told_at), rate(told_at + 1));
    assert!(after < before / 2.0 && after > 0.0, "{before} -> {after}");
    assert!(rows(&project).iter().any(|row| row["told"] == "lr=0.0025" && row["step"] == told_at));
}

#[test]
fn a_run_that_is_paused_waits_and_one_that_is_to_stop_saves() {
    let project = project();
    let mut child = start(&project, &["train"]);
    run_into(&project, &mut child, 2);
    tell(&project, &["pause"]);
    let requests = project.run().join("requests");
    wait_until(&mut child, "the pause", || !requests.join("pause").exists());
    std::thread::sleep(Duration::from_millis(600));
    let step = logged_steps(&project);
    tell(&project, &["save"]);
    let saved = project.run().join(format!("checkpoints/step-{step:06}.safetensors"));
    wait_until(&mut child, "a checkpoint in the pause", || saved.is_file());
    assert_eq!(logged_steps(&project), step, "a run that is paused trains");
    tell(&project, &["continue"]);
    wait_until(&mut child, "a step after the pause", || logged_steps(&project) > step);
    tell(&project, &["stop"]);
    assert_eq!(finish(child).code(), Some(130));
    let step = logged_steps(&project);
    assert!(step < super::STEPS, "it was told too late to prove anything");
    assert!(project.run().join(format!("checkpoints/step-{step:06}.safetensors")).is_file());
    // What was asked of a process that has ended does not stop the next.
    fs::write(requests.join("stop"), "").unwrap();
    assert!(finish(start(&project, &["train", "--resume"])).success());
    assert_eq!(rows(&project), rows(&super::STRAIGHT), "a pause changes what is learnt");
}

//! Runs that are interrupted, resumed, and run out of disk.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::desk::{Desk, Outcome, film};

const TRAIN: [&str; 2] = ["train", "recipe.toml"];
const RESUME: [&str; 3] = ["train", "recipe.toml", "--resume"];

#[test]
fn a_run_leaves_what_it_says() {
    let desk = Desk::new();
    let told = desk.succeed(&TRAIN).stdout;
    assert!(told.contains("done: 2 steps") && told.contains("adapter"), "{told}");
    for file in
        ["plan.toml", "metrics.jsonl", "checkpoints/step-000002.safetensors", "adapters/recipe.safetensors"]
    {
        assert!(desk.path("run").join(file).is_file(), "{file} is missing");
    }
    desk.assert_no_temporary_files();
}

/// Single steps differ by their noise level far more than training changes them, so the line shows the mean of the last 50;
/// a resumed run shows the mean that it would have shown.
#[test]
fn the_progress_line_shows_a_smoothed_loss() {
    let desk = Desk::new();
    desk.change("[train]\nsteps = 2", "[train]\nsteps = 53");
    desk.change("every_steps = 2", "every_steps = 0");
    let mut told = desk.succeed(&TRAIN).stdout;
    desk.change("[train]\nsteps = 53", "[train]\nsteps = 55");
    told += &desk.succeed(&RESUME).stdout;
    let shown: Vec<(f64, f64)> = told
        .lines()
        .filter_map(|line| {
            let (smooth, rest) = line.split_once("loss ")?.1.split_once(" (now ")?;
            Some((smooth.parse().unwrap(), rest.split_once(')').unwrap().0.parse().unwrap()))
        })
        .collect();
    assert_eq!(shown.len(), 55, "{told}");
    for step in [1, 2, 50, 51, 53, 55_usize] {
        let recent = &shown[step.saturating_sub(50)..step];
        let mean = recent.iter().map(|(_, now)| now).sum::<f64>() / recent.len() as f64;
        // Both are printed with four decimals.
        assert!((shown[step - 1].0 - mean).abs() < 1.1e-4, "step {step}: {} for {mean}", shown[step - 1].0);
    }
}

/// Two stages take several held-out micro-batches at once; each loss stays with its clip and its noise level.
#[test]
fn the_held_out_loss_of_two_stages_is_that_of_one() {
    let measured = |stages: &str| -> Vec<Value> {
        let desk = Desk::new();
        data::write_gif(&desk.path("clips/c.gif"), &film(7), 16.0).unwrap();
        desk.write("clips/c.txt", "a third cloud");
        desk.change("frames = [5]", "frames = [5]\nheld_out = [\"b*\", \"c*\"]");
        desk.change("[train]", &format!("[devices]\nstages = {stages}\n\n[train]"));
        desk.succeed(&TRAIN);
        let rows = fs::read_to_string(desk.path("run/metrics.jsonl")).unwrap();
        let rows = rows.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        rows.filter(|row| !row["eval_loss"].is_null()).collect()
    };
    let one = measured("[\"cpu\"]");
    assert!(one.len() == 2 && one[0]["by_sigma"].as_array().unwrap().len() == 9, "{one:?}");
    assert_eq!(measured("[\"cpu\", \"cpu\"]"), one);
}

/// A preset reports its values with their sources, and is stored with the run.
#[test]
fn a_plan_tells_what_it_took_from_another_trainer() {
    let desk = Desk::new();
    desk.change("[train]", "[train]\nlike = \"musubi-tuner\"");
    let plan = desk.succeed(&["plan", "recipe.toml"]);
    assert!(
        plan.stdout.contains("like = \"musubi-tuner\"") && plan.stdout.contains("alpha = 1.0"),
        "{}",
        plan.stdout
    );
    for told in ["as in musubi-tuner", "adapter.alpha = 1.0", "docs/wan.md"] {
        assert!(plan.stderr.contains(told), "no {told} in {}", plan.stderr);
    }
}

#[test]
fn a_changed_plan_is_refused_with_every_change() {
    let desk = Desk::new();
    desk.succeed(&TRAIN);
    desk.change("rank = 2", "rank = 4");
    desk.write("clips/a.txt", "another caption");
    let told = [
        "adapter.rank: 2 -> 4",
        "adapter.alpha: 2.0 -> 4.0",
        "dataset.digest: other clips, captions",
        "without --resume",
    ];
    desk.refuse(&RESUME, &told);
}

#[test]
fn there_must_be_a_run_to_resume() {
    Desk::new().refuse(&RESUME, &["no run in", "without --resume"]);
}

#[test]
fn a_full_disk_leaves_the_checkpoint_before_whole() {
    let desk = Desk::new();
    desk.succeed(&TRAIN);
    let checkpoint = desk.path("run/checkpoints/step-000002.safetensors");
    let before = fs::read(&checkpoint).unwrap();
    desk.change("[train]\nsteps = 2", "[train]\nsteps = 4");
    // A limit on the size of files stands in for the full disk; unlike that, it needs no privileges. The checkpoint is
    // above it, all else below.
    let script = "trap '' XFSZ; ulimit -f 24; exec \"$0\" \"$@\"";
    assert!(before.len() > 24 * 1024, "the checkpoint has only {} bytes", before.len());
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_tandem")]).args(RESUME);
    let outcome: Outcome = command.current_dir(desk.path("")).output().unwrap().into();
    outcome.assert_refused(&["step-000004.safetensors", "File too large", "make room", "--resume"]);
    desk.assert_no_temporary_files();
    assert_eq!(fs::read(&checkpoint).unwrap(), before);
    assert!(!desk.path("run/checkpoints/step-000004.safetensors").exists());

    desk.succeed(&RESUME);
    assert!(desk.path("run/checkpoints/step-000004.safetensors").is_file());
}

/// A checkpoint in the middle of a run that cannot be written ends the run, which resumes from the one before.
#[test]
fn a_checkpoint_that_cannot_be_written_stops_the_run() {
    let desk = Desk::new();
    desk.change("[train]\nsteps = 2", "[train]\nsteps = 100000");
    desk.change("every_steps = 2", "every_steps = 20");
    let mut child = desk.command(&TRAIN).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.contains("step      1")), "no first step");
    fs::remove_dir(desk.path("run/checkpoints")).unwrap();
    fs::write(desk.path("run/checkpoints"), "no folder").unwrap();
    let outcome: Outcome = child.wait_with_output().unwrap().into();
    outcome.assert_refused(&["the state after step 20 could not be saved", "make room", "--resume"]);
    assert!(
        desk.path("run/adapters/recipe_step-000020.safetensors").is_file(),
        "its adapter file comes first"
    );
}

/// Neither an error nor Ctrl-C before the first step leaves a folder, after which the next attempt would be numbered.
#[test]
fn a_run_that_never_began_leaves_no_folder() {
    let desk = Desk::new();
    desk.change("cache = \"cache\"", "cache = \"clips/a.txt/cache\"");
    desk.refuse(&TRAIN, &["a.txt/cache"]);
    assert!(!desk.path("run").exists());
    desk.change("cache = \"clips/a.txt/cache\"", "cache = \"cache\"");
    // Clips before the first step that would take for ever.
    desk.change(
        "[checkpoint]",
        "[sample]\nprompts = [\"a cloud\"]\nsteps = 900\nguidance = 1\n\n[checkpoint]",
    );
    desk.change("frames = [5]", "frames = [5]\nfps = 16");
    desk.change("steps = 900", "steps = 900\nsize = [256, 256]\nframes = 81");
    let mut child = desk.command(&TRAIN).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    while !lines.next().unwrap().unwrap().contains("run folder: run") {}
    assert!(desk.path("run").is_dir());
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let outcome: Outcome = child.wait_with_output().unwrap().into();
    assert_eq!(outcome.code, Some(130), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("nothing was trained: run is removed"), "{}", outcome.stderr);
    assert!(!desk.path("run").exists());

    // Other files in the folder are kept.
    fs::create_dir_all(desk.path("run/adapters")).unwrap();
    desk.write("run/adapters/mine.safetensors", "mine");
    desk.write("run/notes.txt", "mine");
    desk.change("cache = \"cache\"", "cache = \"clips/a.txt/cache\"");
    desk.refuse(&TRAIN, &["a.txt/cache"]);
    let left: Vec<_> = desk.files().into_keys().filter(|path| path.starts_with(desk.path("run"))).collect();
    assert_eq!(left, [desk.path("run/adapters/mine.safetensors"), desk.path("run/notes.txt")]);
}

#[test]
fn a_run_is_resumed_by_its_folder() {
    let desk = Desk::new();
    desk.succeed(&TRAIN);
    desk.succeed(&TRAIN);
    desk.change("[train]\nsteps = 2", "[train]\nsteps = 3");
    let told = desk.succeed(&["train", "recipe.toml", "--resume=run"]).stdout;
    assert!(told.contains("run/checkpoints/step-000002") && told.contains("done: 3 steps"), "{told}");
    assert!(desk.path("run/checkpoints/step-000003.safetensors").is_file());
    assert!(!desk.path("run-2/checkpoints/step-000003.safetensors").exists());
    desk.refuse(&["train", "recipe.toml", "--resume=clips"], &["no run in clips"]);
}

#[test]
fn ctrl_c_finishes_the_step_saves_and_exits_130() {
    let desk = Desk::new();
    desk.change("[train]\nsteps = 2", "[train]\nsteps = 100000");
    desk.change("every_steps = 2", "every_steps = 0");
    let mut child = desk
        .command(&["--json", "train", "recipe.toml"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut row = || -> Option<Value> {
        let line = lines.next()?.unwrap();
        Some(serde_json::from_str(&line).unwrap_or_else(|e| panic!("not JSON ({e}): {line}")))
    };
    while row().unwrap()["step"].as_u64() != Some(3) {}
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let mut last = 3;
    while let Some(row) = row() {
        last = row["step"].as_u64().unwrap_or(last);
    }
    let outcome: Outcome = child.wait_with_output().unwrap().into();
    assert_eq!(outcome.code, Some(130), "{}", outcome.stderr);
    let saved = desk.path(&format!("run/checkpoints/step-{last:06}.safetensors"));
    assert!(saved.is_file(), "{} is missing", saved.display());
    // The printed command writes its adapter file.
    let line = outcome.stderr.lines().find_map(|line| line.trim().strip_prefix("tandem export "));
    let arguments =
        shlex::split(line.unwrap_or_else(|| panic!("no export line in {}", outcome.stderr))).unwrap();
    desk.succeed(&[&["export"], &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat());
    assert!(desk.path(&format!("run/adapters/recipe_step-{last:06}.safetensors")).is_file());
    let metrics = fs::read_to_string(desk.path("run/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count() as u64, last);
    desk.assert_no_temporary_files();
}

#[test]
fn a_damaged_checkpoint_is_named_with_the_one_to_go_back_to() {
    let desk = Desk::new();
    desk.change("[train]\nsteps = 2", "[train]\nsteps = 4");
    desk.succeed(&TRAIN);
    let newest = desk.path("run/checkpoints/step-000004.safetensors");
    let mut bytes = fs::read(&newest).unwrap();
    let whole = bytes.clone();
    let middle = bytes.len() - 1000;
    bytes[middle] ^= 4;
    fs::write(&newest, bytes).unwrap();
    desk.change("[train]\nsteps = 4", "[train]\nsteps = 6");
    let told =
        ["step-000004.safetensors is damaged", "does not match its checksum", "step-000002.safetensors"];
    desk.refuse(&RESUME, &told);
    fs::remove_file(&newest).unwrap();
    let resumed = desk.succeed(&RESUME);
    assert!(resumed.stdout.contains("after step 2"), "{}", resumed.stdout);
    let again = fs::read(&newest).unwrap();
    let data = |bytes: &[u8]| bytes[bytes.len() - 1000..].to_vec();
    assert_eq!(data(&again), data(&whole), "the repeated step differs from the first");
}

/// Partial files of a killed process are removed when its run is resumed, and nothing else is.
#[test]
fn temporary_files_of_killed_processes_are_removed() {
    let desk = Desk::new();
    desk.succeed(&TRAIN);
    let stray = [
        "run/.plan.toml.77-0.tmp",
        "run/checkpoints/.step-000030.safetensors.999999-0.tmp",
        "run/adapters/..r.safetensors.4242.unverified.tmp.4242-0.tmp",
        "run/adapters/.r.safetensors.4242.unverified.tmp",
    ];
    stray.iter().for_each(|path| desk.write(path, "half"));
    desk.write("run/.notes.tmp", "mine");
    // Other processes may be writing to the cache: only old files of ended processes are removed.
    let own = format!("cache/.a.safetensors.{}-0.tmp", std::process::id());
    let cached =
        ["cache/.content-hashes.json.999999-0.tmp", "cache/.b.safetensors.999999-1.tmp", own.as_str()];
    for path in cached {
        desk.write(path, "half");
        if !path.contains(".b.") {
            let old = std::time::SystemTime::now() - std::time::Duration::from_secs(120);
            fs::File::options().write(true).open(desk.path(path)).unwrap().set_modified(old).unwrap();
        }
    }
    desk.change("[train]\nsteps = 2", "[train]\nsteps = 4");
    let resumed = desk.succeed(&RESUME);
    assert!(resumed.stderr.contains("removed 4 half-written"), "{}", resumed.stderr);
    assert!(stray.iter().all(|path| !desk.path(path).exists()) && desk.path("run/.notes.tmp").exists());
    desk.write("clips/b.txt", "another caption");
    desk.succeed(&["cache", "recipe.toml"]);
    let left: Vec<bool> = cached.iter().map(|path| desk.path(path).exists()).collect();
    assert_eq!(left, [false, true, true]);
}

/// The adapter is written before its checkpoint: if the disk is full then, no message may name a file that does not exist.
#[test]
fn a_full_disk_at_an_adapter_says_what_to_do() {
    let desk = Desk::new();
    desk.change("rank = 2", "rank = 32");
    desk.change("every_steps = 2", "every_steps = 1\n\n[export]\nprecision = \"float32\"");
    desk.succeed(&["cache", "recipe.toml"]);
    let script = "trap '' XFSZ; ulimit -f 48; exec \"$0\" \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_tandem")]).args(TRAIN);
    let outcome: Outcome = command.current_dir(desk.path("")).output().unwrap().into();
    outcome.assert_refused(&[
        "recipe_step-000001.safetensors",
        "could not be written",
        "make room",
        "--resume",
    ]);
    assert!(!outcome.stderr.contains("unverified"), "{}", outcome.stderr);
    desk.assert_no_temporary_files();
}

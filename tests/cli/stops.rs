//! Ctrl-C and SIGTERM at moments when there is something to get wrong.

#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::desk::{Desk, Outcome};

/// A desk with a clip that needs ffmpeg, and programs of its name that take their time.
fn slow_ffmpeg() -> Desk {
    let desk = Desk::new();
    desk.write("clips/c.mkv", "what only ffmpeg could read");
    desk.write("clips/c.txt", "a third cloud");
    fs::create_dir(desk.path("bin")).unwrap();
    let times: Vec<String> =
        (0..5).map(|i| format!("{{\"best_effort_timestamp_time\":\"{}\"}}", f64::from(i) / 16.0)).collect();
    let probe = format!("#!/bin/sh\ntouch probing\nsleep 2\necho '{{\"frames\":[{}]}}'\n", times.join(","));
    let decode = "#!/bin/sh\nfor i in 1 2 3 4 5; do printf 'P6 16 16 255\\n'; head -c 768 /dev/zero; done\n";
    for (name, script) in [("ffprobe", probe.as_str()), ("ffmpeg", decode)] {
        let path = desk.path("bin").join(name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    desk
}

/// Starts `words` in a process group of its own, as a shell does in a terminal, with the desk's programs.
fn start(desk: &Desk, words: &[&str]) -> Child {
    let path = format!("{}:{}", desk.path("bin").display(), std::env::var("PATH").unwrap_or_default());
    let mut command = desk.command(words);
    command.env("PATH", path).process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn wait_for(desk: &Desk, child: &mut Child, file: &str) {
    let begun = Instant::now();
    while !desk.path(file).exists() {
        assert!(child.try_wait().unwrap().is_none(), "the program ended before {file} was there");
        assert!(begun.elapsed() < Duration::from_secs(60), "{file} never came");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn signal(name: &str, target: &str) {
    assert!(Command::new("kill").args([name, "--", target]).status().unwrap().success());
}

fn finish(child: Child) -> Outcome {
    child.wait_with_output().unwrap().into()
}

/// A terminal sends Ctrl-C to the whole process group: ffmpeg must not die of it and be taken for a broken clip.
#[test]
fn ctrl_c_while_clips_are_read_blames_no_clip() {
    let desk = slow_ffmpeg();
    desk.run(&["plan", "recipe.toml"]); // without the fake ffmpeg; its output does not matter
    let mut child = start(&desk, &["train", "recipe.toml"]);
    wait_for(&desk, &mut child, "probing");
    signal("-INT", &format!("-{}", child.id()));
    let outcome = finish(child);
    assert_eq!(outcome.code, Some(130), "{}", outcome.stderr);
    assert!(
        !outcome.stderr.contains("cannot be used") && !outcome.stderr.contains("c.mkv"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn a_second_ctrl_c_says_that_nothing_is_saved() {
    let desk = slow_ffmpeg();
    let mut child = start(&desk, &["train", "recipe.toml"]);
    wait_for(&desk, &mut child, "probing");
    let begun = Instant::now();
    signal("-INT", &child.id().to_string());
    std::thread::sleep(Duration::from_millis(200));
    signal("-INT", &child.id().to_string());
    let outcome = finish(child);
    assert!(begun.elapsed() < Duration::from_millis(1500), "{:?}", begun.elapsed());
    assert_eq!(outcome.code, Some(131), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("not saved"), "{}", outcome.stderr);
}

/// One network call of this clip takes longer than the test waits.
#[test]
fn sampling_stops_soon_and_speaks_of_no_saving() {
    let desk = Desk::new();
    let words = ["sample", "--model", "model", "--prompt", "a cloud", "--width", "512", "--height", "512"];
    let mut child = start(&desk, &[&words[..], &["--frames", "81", "--steps", "50"]].concat());
    wait_for(&desk, &mut child, "runs/cache");
    std::thread::sleep(Duration::from_secs(2));
    assert!(child.try_wait().unwrap().is_none(), "the clip was made too soon to prove anything");
    let begun = Instant::now();
    signal("-TERM", &child.id().to_string());
    let outcome = finish(child);
    assert!(begun.elapsed() < Duration::from_secs(10), "it took {:?} to stop", begun.elapsed());
    assert_eq!(outcome.code, Some(130), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("stopping") && !outcome.stderr.contains("saving"), "{}", outcome.stderr);
}

//! Clips that only ffmpeg reads, through fake `ffprobe` and `ffmpeg` programs whose output a proof chooses.

#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::desk::{Desk, Outcome};

/// A desk with the clip `c.mkv`, whose frames of 16x16 pixels ffprobe gives `times`, in seconds, and `stream`, as JSON.
fn desk(times: &[f64], stream: &str) -> Desk {
    let desk = Desk::new();
    desk.write("clips/c.mkv", "what only ffmpeg could read");
    desk.write("clips/c.txt", "a third cloud");
    fs::create_dir(desk.path("bin")).unwrap();
    let frames: Vec<String> =
        times.iter().map(|time| format!("{{\"best_effort_timestamp_time\":\"{time}\"}}")).collect();
    let report = format!("{{\"frames\":[{}],\"streams\":[{stream}]}}", frames.join(","));
    let probe = format!("#!/bin/sh\necho '{report}'\n");
    let frame = "printf 'P6 16 16 255\\n'; head -c 768 /dev/zero\n".repeat(times.len());
    for (name, script) in [("ffprobe", probe), ("ffmpeg", format!("#!/bin/sh\n{frame}"))] {
        let path = desk.path("bin").join(name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    desk
}

/// `tandem --json plan` with the fake programs.
fn plan(desk: &Desk) -> Outcome {
    run(desk, "plan")
}

/// `tandem --json` and a command with the fake programs.
fn run(desk: &Desk, command: &str) -> Outcome {
    let path = format!("{}:{}", desk.path("bin").display(), std::env::var("PATH").unwrap_or_default());
    desk.command(&[command, "recipe.toml"]).env("PATH", path).output().unwrap().into()
}

/// Alpha is asked of ffmpeg where ffprobe reports it, and refused where it is a stream that ffmpeg leaves out.
#[test]
fn the_alpha_of_a_video_is_extracted_by_ffmpeg() {
    let times = [0.0, 0.0625, 0.125, 0.1875, 0.25];
    let masks = "[data]\nloss_masks = { from = \"alpha\" }";
    let with = |stream: &str| {
        let desk = desk(&times, stream);
        let program = desk.path("bin/ffmpeg");
        let told = desk.path("told");
        let script = fs::read_to_string(&program).unwrap();
        let script =
            script.replace("#!/bin/sh\n", &format!("#!/bin/sh\necho \"$*\" >> {}\n", told.display()));
        fs::write(&program, script).unwrap();
        desk.change("[data]", masks);
        desk
    };
    let prores = with("{\"codec_name\":\"prores\",\"pix_fmt\":\"yuva444p12le\"}");
    let outcome = run(&prores, "cache");
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let told = fs::read_to_string(prores.path("told")).unwrap();
    assert_eq!(told.matches("-vf alphaextract").count(), 1, "once for the mask: {told}");
    assert!(told.lines().any(|line| !line.contains("alphaextract")), "the clip itself: {told}");
    let vp9 = with("{\"codec_name\":\"vp9\",\"pix_fmt\":\"yuv420p\",\"tags\":{\"alpha_mode\":\"1\"}}");
    plan(&vp9).assert_refused(&["c.mkv", "the alpha of vp9", "ProRes 4444"]);
    let none = with("{\"codec_name\":\"hevc\",\"pix_fmt\":\"yuv420p\"}");
    none.change("folder = \"clips\"", "folder = \"clips\"\nskip = [\"a.gif\"]");
    plan(&none).assert_refused(&["data.loss_masks", "no clip with an alpha channel"]);
}

/// Frames that ffprobe lists out of order would be shown in another order than they are decoded in.
#[test]
fn times_that_go_back_are_refused_unless_the_rate_is_given() {
    let desk = desk(&[0.0, 0.2, 0.1, 0.3, 0.4, 0.5], "{}");
    plan(&desk).assert_refused(&["c.mkv", "do not ascend", "data.source_fps"]);
    desk.change("[data]", "[data]\nsource_fps = 16");
    assert_eq!(plan(&desk).code, Some(0));
}

/// A clip of 16x16 stored pixels that are displayed twice as wide as high uses the bucket that is twice as wide as high.
#[test]
fn pixels_that_are_not_square_are_shown_as_ffprobe_says() {
    for (aspect, buckets) in [("1:1", ["16 16 5 3"].as_slice()), ("2:1", &["16 16 5 2", "32 16 5 1"])] {
        let stream = format!("{{\"width\":16,\"height\":16,\"sample_aspect_ratio\":\"{aspect}\"}}");
        let desk = desk(&[0.0, 0.0625, 0.125, 0.1875, 0.25], &stream);
        desk.change("sizes = [[16, 16]]", "sizes = [[16, 16], [32, 16]]");
        let outcome = plan(&desk);
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        let rows: Vec<String> = outcome
            .stdout
            .lines()
            .map(|line| line.split_whitespace().take(4).collect::<Vec<_>>().join(" "))
            .filter(|row| row.ends_with(|c: char| c.is_ascii_digit()) && row.contains(" 16 5 "))
            .collect();
        let mut rows: Vec<&str> = rows.iter().map(String::as_str).collect();
        rows.sort_unstable();
        assert_eq!(rows, buckets, "{aspect}: {}", outcome.stdout);
    }
}

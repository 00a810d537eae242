//! Folders with things that are not clips, and unusual file names.

use std::fs;
use std::process::Command;

use crate::desk::Desk;

const PLAN: [&str; 2] = ["plan", "recipe.toml"];

#[test]
fn all_unusable_clips_are_told_at_once_or_left_out() {
    let desk = Desk::new();
    let whole = fs::read(desk.path("clips/b.mp4")).unwrap();
    desk.write("clips/half.mp4", &whole[..whole.len() / 2]);
    desk.write("clips/half.txt", "half a clip");
    desk.write("clips/latin.mp4", &whole);
    desk.write("clips/latin.txt", b"caf\xe9");
    desk.write("clips/none.mp4", &whole);
    data::write_gif(&desk.path("clips/short.gif"), &crate::desk::film(2), 16.0).unwrap();
    desk.write("clips/short.txt", "two frames");
    let told = [
        "4 clips cannot be used",
        "half.mp4: it is truncated",
        "latin.mp4: a caption must be UTF-8",
        "none.mp4: it has no caption",
        "short.gif: it has 2 frames where the shortest bucket takes 5",
        "data.bad = \"skip\"",
    ];
    desk.refuse(&PLAN, &told);

    desk.change("[data]", "[data]\nbad = \"skip\"");
    let plan = desk.succeed(&PLAN);
    assert!(plan.stderr.contains("left out") && plan.stdout.contains("skipped = ["), "{}", plan.stdout);
    for name in ["half.mp4: ", "latin.mp4: ", "none.mp4: ", "short.gif: "] {
        assert!(plan.stderr.contains(name) && plan.stdout.contains(name), "{name}: {}", plan.stderr);
    }
    let run = desk.succeed(&["train", "recipe.toml"]);
    assert!(run.stderr.contains("half.mp4: ") && run.stdout.contains("on 2 clips"), "{}", run.stdout);
}

#[cfg(unix)]
#[test]
fn pipes_and_devices_in_the_place_of_files_are_refused() {
    for (name, beside) in [("f.mp4", "f.txt"), ("f.gif", "f.txt"), ("f.txt", "f.mp4")] {
        let desk = Desk::new();
        desk.write(&format!("clips/{beside}"), fs::read(desk.path("clips/b.mp4")).unwrap());
        let made = Command::new("mkfifo").arg(desk.path(&format!("clips/{name}"))).status().unwrap();
        assert!(made.success());
        if beside.ends_with("txt") {
            desk.write("clips/f.txt", "a pipe");
        }
        // Not by `refuse`, which reads every file.
        desk.run(&PLAN).assert_refused(&["f.", "a pipe, a device"]);
    }
    let desk = Desk::new();
    fs::remove_file(desk.path("clips/a.txt")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", desk.path("clips/a.txt")).unwrap();
    desk.run(&PLAN).assert_refused(&["a.txt", "a pipe, a device"]);
    fs::remove_file(desk.path("clips/a.txt")).unwrap();
    desk.write("clips/a.txt", "word ".repeat(300_000));
    desk.run(&PLAN).assert_refused(&["a.txt", "more than 1 MiB"]);
}

#[cfg(target_os = "linux")]
#[test]
fn names_that_differ_only_in_bytes_that_are_no_text_are_not_taken_for_one() {
    use std::os::unix::ffi::OsStrExt;
    let desk = Desk::new();
    let whole = fs::read(desk.path("clips/b.mp4")).unwrap();
    for byte in [b"x\xff".as_slice(), b"x\xfe"] {
        let stem = desk.path("clips").join(std::ffi::OsStr::from_bytes(byte));
        fs::write(stem.with_extension("mp4"), &whole).unwrap();
        fs::write(stem.with_extension("txt"), "a clip").unwrap();
    }
    desk.refuse(&PLAN, &["differs from its name only in bytes", "rename"]);
}

#[test]
fn the_longest_name_that_a_clip_can_have_is_previewed() {
    let desk = Desk::new();
    let stem = "x".repeat(251);
    fs::rename(desk.path("clips/b.mp4"), desk.path(&format!("clips/{stem}.mp4"))).unwrap();
    fs::rename(desk.path("clips/b.txt"), desk.path(&format!("clips/{stem}.txt"))).unwrap();
    desk.succeed(&["cache", "recipe.toml", "--preview", "preview"]);
    assert_eq!(fs::read_dir(desk.path("preview")).unwrap().count(), 4);
}

/// Text after the 512th token is never used, and only this warning says so.
#[test]
fn a_caption_that_is_too_long_is_told_with_its_length() {
    let desk = Desk::new();
    desk.write("clips/a.txt", "a b c d e f g h ".repeat(100));
    let told = desk.succeed(&PLAN).stderr;
    assert!(told.contains("longer than the 512 tokens") && told.contains("a.gif ("), "{told}");
    desk.write("clips/a.txt", "a short one");
    assert!(!desk.succeed(&PLAN).stderr.contains("tokens that the model sees"));
}

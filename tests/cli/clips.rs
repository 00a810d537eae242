//! Recipes and clips that cannot work.

use std::fs;

use crate::desk::{Desk, Outcome};

const PLAN: [&str; 2] = ["plan", "recipe.toml"];

#[test]
fn a_good_project_is_planned() {
    let desk = Desk::new();
    let told = desk.succeed(&PLAN).stdout;
    assert!(told.contains("memory of a step"), "{told}");
}

#[test]
fn a_plan_shows_the_captions_as_they_are_trained() {
    let desk = Desk::new();
    desk.change("folder = \"clips\"", "folder = \"clips\"\ntrigger = \"sks\"");
    let told = desk.succeed(&PLAN).stdout;
    assert!(told.contains("  a.gif: sks, a drifting cloud\n  b.mp4: sks, a second cloud\n"), "{told}");
}

#[test]
fn a_recipe_that_is_not_there_is_named() {
    Desk::new().refuse(&["plan", "other.toml"], &["other.toml", "cannot read the recipe"]);
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_one() {
    let desk = Desk::new();
    desk.change("[train]\nsteps", "[train]\nstep");
    desk.refuse(&PLAN, &["recipe.toml", "unknown field `step`", "did you mean `steps`?"]);
    desk.change("[train]\nstep ", "[train]\nsteps ");
    desk.change("[train]", "[trian]");
    desk.refuse(&PLAN, &["unknown field `trian`", "did you mean `train`?"]);
}

#[test]
fn clips_without_captions_are_all_named() {
    let desk = Desk::new();
    fs::remove_file(desk.path("clips/a.txt")).unwrap();
    fs::remove_file(desk.path("clips/b.txt")).unwrap();
    desk.refuse(&PLAN, &["2 clips without a caption", "a.gif", "b.mp4", ".txt file of the same name"]);
}

#[test]
fn an_empty_or_missing_folder_is_named() {
    let desk = Desk::new();
    fs::create_dir(desk.path("empty")).unwrap();
    desk.change("\"clips\"", "\"empty\"");
    desk.refuse(&PLAN, &["no clips in", "empty", "data.folder"]);
    desk.change("\"empty\"", "\"nowhere\"");
    desk.refuse(&PLAN, &["data.folder: there is no folder", "nowhere"]);
}

#[test]
fn a_video_that_cannot_be_read_is_named() {
    let whole = fs::read(Desk::new().path("clips/b.mp4")).unwrap();
    let mut no_frames = whole.clone();
    let count = no_frames.windows(4).position(|name| name == b"stsz").unwrap() + 12;
    no_frames[count..count + 4].fill(0);
    let damaged: [(&str, &[u8], &str); 6] = [
        ("half.mp4", &whole[..whole.len() / 2], "truncated"),
        ("none.mp4", b"", "empty"),
        ("zero.mp4", &no_frames, "no frame"),
        ("zero.gif", b"GIF89a\x10\0\x10\0\0\0\0\x3b", "Gif"),
        ("none.png", b"", "no known picture format"),
        ("text.webp", b"this is no picture at all, only a text that has its name", "no known picture format"),
    ];
    for (name, bytes, told) in damaged {
        let desk = Desk::new();
        desk.write(&format!("clips/{name}"), bytes);
        let stem = name.split('.').next().unwrap();
        desk.write(&format!("clips/{stem}.txt"), "a caption");
        desk.refuse(&["train", "recipe.toml"], &[name, told, "Replace it"]);
    }
}

#[test]
fn a_video_that_only_ffmpeg_could_read_is_named_with_two_ways_out() {
    let desk = Desk::new();
    desk.write("clips/text.mp4", "this is no video at all, only a text that has its name");
    desk.write("clips/text.txt", "a caption");
    let outcome: Outcome = desk.command(&PLAN).env("PATH", "").output().unwrap().into();
    outcome.assert_refused(&["text.mp4", "needs the ffmpeg program", "install ffmpeg", "convert the clip"]);
}

#[test]
fn a_clip_shorter_than_every_bucket_is_named_with_its_length() {
    let desk = Desk::new();
    desk.change("frames = [5]", "frames = [9]");
    let told = ["1 clip shorter than the shortest bucket of 9 frames", "a.gif (6 frames)", "data.frames"];
    desk.refuse(&PLAN, &told);
}

#[test]
fn a_size_that_does_not_fit_is_told_with_the_nearest() {
    let desk = Desk::new();
    desk.change("[[16, 16]]", "[[40, 16]]");
    desk.refuse(&PLAN, &["40x16", "multiples of 16", "32x16, 48x16"]);
    desk.change("[[40, 16]]", "[[16, 16]]");
    desk.change("frames = [5]", "frames = [6]");
    desk.refuse(&PLAN, &["data.frames: 6 is not of the form 4n+1", "5, 9"]);
    let sample = ["sample", "--model", "model", "--prompt", "a cloud", "--width", "40", "--height", "16"];
    desk.refuse(&sample, &["size of a clip", "40x16", "multiples of 16", "32x16, 48x16"]);
}

#[test]
fn an_adapter_target_that_matches_nothing_is_named_with_what_there_is() {
    let desk = Desk::new();
    desk.change("rank = 2", "rank = 2\ntargets = [\"self_attn.to_q\"]");
    desk.refuse(&PLAN, &["\"self_attn.to_q\" matches no module", "self_attn.q, self_attn.k"]);
}

#[test]
fn a_cache_that_takes_no_files_is_named() {
    // Permissions do not stop the superuser, whom tests often run as; a folder below a file stops everyone.
    let desk = Desk::new();
    desk.change("cache = \"cache\"", "cache = \"clips/a.txt/cache\"");
    desk.refuse(
        &["cache", "recipe.toml"],
        &["the cache folder", "a.txt/cache cannot be written", "choose another"],
    );
}

#[test]
fn previews_are_the_clips_that_are_trained() {
    let desk = Desk::new();
    desk.succeed(&["cache", "recipe.toml", "--preview", "preview"]);
    let names: Vec<String> = fs::read_dir(desk.path("preview"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.iter().filter(|name| name.ends_with(".mp4")).count(), 2, "{names:?}");
    assert_eq!(names.iter().filter(|name| name.ends_with(".txt")).count(), 2, "{names:?}");
    assert!(!desk.path("run").exists() && !desk.path("cache").exists());
}

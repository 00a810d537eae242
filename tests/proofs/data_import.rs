//! Dataset files of other trainers: read as those trainers read them, and differences are reported.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use data::{DataConfig, Dataset, Extract, SizeMultiple};
use proofs::film::drifting;
use serde_json::json;
use tempfile::TempDir;

/// A folder with `long.webp` (21 frames), `short.webp` (7 frames) and `still.png`, 64x32, each with a caption.
struct Desk(TempDir);

impl Desk {
    fn new() -> Self {
        let desk = Self(tempfile::tempdir().unwrap());
        fs::create_dir(desk.path("clips")).unwrap();
        for (name, frames) in [("long", 21), ("short", 7)] {
            data::write_webp(&desk.path(&format!("clips/{name}.webp")), &drifting(64, 32, frames), 32.0)
                .unwrap();
        }
        image::RgbImage::from_pixel(64, 32, image::Rgb([9, 8, 7]))
            .save(desk.path("clips/still.png"))
            .unwrap();
        for name in ["long", "short", "still"] {
            desk.write(&format!("clips/{name}.txt"), &format!("a {name} clip"));
        }
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn config(&self, name: &str, more: serde_json::Value) -> DataConfig {
        let mut config = json!({ "import": self.path(name), "sizes": [[32, 32]], "frames": [5, 9] });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(config).unwrap()
    }

    /// The dataset of a file, at 16 frames a second.
    fn read(&self, name: &str, text: &str) -> data::Result<Dataset> {
        self.write(name, text);
        self.build(&self.config(name, json!({})))
    }

    fn build(&self, config: &DataConfig) -> data::Result<Dataset> {
        Dataset::build(config, SizeMultiple::new(16), 16.0, &mut |_, _| {})
    }

    fn refusal(&self, name: &str, text: &str) -> String {
        self.read(name, text).unwrap_err().to_string()
    }
}

/// Clip, bucket and first frame of every item.
fn items(dataset: &Dataset) -> Vec<(String, String, usize)> {
    let item = |window: &data::Window| {
        (dataset.sources[window.source].item.id.clone(), window.bucket.to_string(), window.start)
    };
    dataset.windows.iter().map(item).collect()
}

fn owned(items: &[(&str, &str, usize)]) -> Vec<(String, String, usize)> {
    items.iter().map(|(id, bucket, start)| ((*id).to_owned(), (*bucket).to_owned(), *start)).collect()
}

#[track_caller]
fn assert_told(dataset: &Dataset, words: &[&str]) {
    let notes = dataset.notes.join("\n");
    assert!(words.iter().all(|word| notes.contains(word)), "{words:?} not all in:\n{notes}");
}

#[test]
fn a_musubi_config_gives_its_clips_at_each_of_its_lengths() {
    let desk = Desk::new();
    let text = r#"
[general]
resolution = [64, 32]
caption_extension = ".txt"
batch_size = 2
enable_bucket = true

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [1, 7, 18]
frame_extraction = "chunk"
num_repeats = 3
control_directory = "depth"

[[datasets]]
image_directory = "clips"
enable_bucket = false
"#;
    let dataset = desk.read("dataset.toml", text).unwrap();
    let chunks =
        |id: &'static str, length: usize, count: usize| (0..count).map(move |i| (id, length, i * length));
    let expected: Vec<(String, String, usize)> = chunks("0-1/long.webp", 1, 21)
        .chain(chunks("0-1/short.webp", 1, 7))
        .chain(chunks("0-5/long.webp", 5, 4))
        .chain(chunks("0-5/short.webp", 5, 1))
        .chain(chunks("0-17/long.webp", 17, 1))
        .chain(chunks("1/still.png", 1, 1))
        .map(|(id, length, start)| (id.to_owned(), format!("64x32x{length}"), start))
        .collect();
    assert_eq!(items(&dataset), expected);
    // Every frame counts as one of 16 a second, though the files say 32: 21 frames stay 21.
    assert_eq!(dataset.sources[0].frames, 21);
    assert!(dataset.sources[..5].iter().all(|source| source.item.repeats == 3));
    assert_eq!(dataset.sources[5].item.repeats, 1);
    assert_eq!(dataset.sources[0].item.caption, "a long clip");
    let told = ["datasets[0]", "batch_size", "train.batch", "control_directory; not used", "no source_fps"];
    assert_told(&dataset, &told);
    assert_told(&dataset, &["left out, shorter than 17 frames (1): 0-17/short.webp (7 frames)"]);

    // Buckets of about the area, both ways round, in steps of 16: those of its selector.
    let area = |resolution: &str| {
        let text = format!(
            "[[datasets]]\nvideo_directory = \"clips\"\ntarget_frames = [5]\nresolution = {resolution}\n"
        );
        desk.read("area.toml", &text).unwrap().sizes
    };
    let mut sizes = area("[64, 32]");
    assert_eq!(sizes.remove(0), [64, 32], "its own first");
    sizes.sort_unstable();
    assert_eq!(sizes, [[16, 128], [32, 48], [32, 64], [48, 32], [128, 16]]);
    let uniform = text.replace("\"chunk\"", "\"uniform\"\nframe_sample = 2\nsource_fps = 32.0");
    let halved = desk.read("uniform.toml", &uniform).unwrap();
    // At 32 frames a second there are half as many at 16, and none of 17.
    let of_length = |dataset: &Dataset, n| dataset.windows.iter().filter(|w| w.bucket.frames == n).count();
    assert_eq!([1, 5, 17].map(|n| of_length(&halved, n)), [2 + 2 + 1, 2, 0]);
}

#[test]
fn a_musubi_list_names_its_clips() {
    let desk = Desk::new();
    desk.write(
        "clips/list.jsonl",
        "{\"video_path\": \"long.webp\", \"caption\": \"from the list\"}\n{\"video_path\": \"clips/short.webp\", \"caption\": \"too\"}\n",
    );
    let text =
        "[[datasets]]\nvideo_jsonl_file = \"clips/list.jsonl\"\ntarget_frames = [5]\nresolution = [64, 32]\n";
    let dataset = desk.read("dataset.toml", text).unwrap();
    let captions: Vec<&str> = dataset.sources.iter().map(|source| source.item.caption.as_str()).collect();
    assert_eq!(captions, ["from the list", "too"]);
    // The same list by itself has the sizes and lengths of the recipe.
    let alone = desk.build(&desk.config("clips/list.jsonl", json!({ "frames": [5], "trigger": "sks" })));
    let error = alone.unwrap_err().to_string();
    assert!(error.contains("clips/short.webp, which is not a clip or does not exist"), "{error}");
    desk.write("clips/list.jsonl", "{\"video_path\": \"long.webp\", \"caption\": \"from the list\"}\n");
    let alone =
        desk.build(&desk.config("clips/list.jsonl", json!({ "frames": [5], "trigger": "sks" }))).unwrap();
    assert_eq!(items(&alone), owned(&[("long.webp", "32x32x5", 0)]));
    assert_eq!(alone.sources[0].item.caption, "sks, from the list");
}

#[test]
fn a_diffusion_pipe_config_gives_its_clips_at_each_resolution() {
    let desk = Desk::new();
    let text = r#"
resolutions = [64, [96, 96]]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 3
frame_buckets = [1, 9]
cache_shuffle_num = 4

[[directory]]
path = "clips"
num_repeats = 2
caption_prefix = "film of "
"#;
    let dataset = desk.read("dataset.toml", text).unwrap();
    let expected = [
        ("0-0/long.webp", "96x32x9", 0),
        ("0-0/short.webp", "96x32x1", 0),
        ("0-0/still.png", "96x32x1", 0),
        ("0-1/long.webp", "128x64x9", 0),
        ("0-1/short.webp", "128x64x1", 0),
        ("0-1/still.png", "128x64x1", 0),
    ];
    assert_eq!(items(&dataset), owned(&expected));
    // Resampled by the file's own times, 31 whole milliseconds each: 0.65 seconds are 10 frames at 16 a second.
    assert_eq!(dataset.sources[0].frames, 10);
    assert_eq!(dataset.sources[0].item.caption, "film of a long clip");
    assert_eq!(dataset.sources[0].item.repeats, 2);
    assert_told(&dataset, &["cache_shuffle_num; not used", "directory[0]: 3 clips at 3 sizes"]);

    // captions.json has several captions a clip; what has none is left out, as there.
    desk.write("clips/captions.json", r#"{"long.webp": ["one", "two"], "still.png": ["three"]}"#);
    let dataset = desk.read("dataset.toml", &text.replace("[64, [96, 96]]", "[64]")).unwrap();
    let told: BTreeMap<&str, &str> =
        dataset.sources.iter().map(|s| (s.item.id.as_str(), s.item.caption.as_str())).collect();
    let expected = [
        ("0-0/long.webp#0", "film of one"),
        ("0-0/long.webp#1", "film of two"),
        ("0-0/still.png", "film of three"),
    ];
    assert_eq!(told, BTreeMap::from(expected));
    assert_told(&dataset, &["1 clips have no caption and are left out, as there: short.webp"]);
}

#[test]
fn a_diffsynth_table_is_read_with_the_recipe_s_sizes() {
    let desk = Desk::new();
    let table = "video,prompt,control_video\nclips/long.webp,\"one, two\",x.mp4\nclips/short.webp,three,\n";
    let dataset = desk.read("metadata.csv", table).unwrap();
    assert_eq!(
        items(&dataset),
        owned(&[("clips/long.webp", "32x32x9", 0), ("clips/short.webp", "32x32x5", 0)])
    );
    assert_eq!(dataset.sources[0].item.caption, "one, two");
    assert_eq!(dataset.sources[0].frames, 21, "frames as they come");
    assert_told(
        &dataset,
        &["2 clips; sizes, lengths and extraction are the recipe's", "control_video; not used"],
    );
    let held = desk.config(
        "metadata.csv",
        json!({ "held_out": ["clips/short*"], "source_fps": 32.0, "frames": [1, 9], "extract": "middle" }),
    );
    assert_eq!(held.extract, Extract::Middle);
    let dataset = desk.build(&held).unwrap();
    assert_eq!(
        items(&dataset),
        owned(&[("clips/long.webp", "32x32x9", 1), ("clips/short.webp", "32x32x1", 1)])
    );
    assert!(!dataset.sources[0].item.held_out && dataset.sources[1].item.held_out);
    // Too short for the recipe's own lengths is an error, as for a folder.
    let error = desk.build(&desk.config("metadata.csv", json!({ "frames": [9] }))).unwrap_err().to_string();
    assert!(
        error.contains("shorter than the shortest bucket") && error.contains("clips/short.webp"),
        "{error}"
    );
}

#[test]
fn a_dataset_file_that_cannot_be_read_is_refused_by_name_and_key() {
    let desk = Desk::new();
    let musubi = |keys: &str| format!("[[datasets]]\nresolution = [64, 32]\n{keys}\n");
    let videos = "video_directory = \"clips\"\ntarget_frames = [5]\n";
    for (name, text, told) in [
        ("d.toml", "[model]\ntype = \"wan\"".to_owned(), "neither [[datasets]]"),
        ("d.toml", "[[datasets]\n".to_owned(), "TOML parse error"),
        ("d.yaml", "x: 1".to_owned(), "not a .toml, .csv or .jsonl"),
        ("d.toml", musubi(""), "datasets[0] must name one of image_directory"),
        ("d.toml", musubi("video_directory = \"nowhere\""), "nowhere, which cannot be read"),
        ("d.toml", musubi(&format!("{videos}frame_extraction = \"tail\"")), "frame_extraction = \"tail\""),
        ("d.toml", musubi(&format!("{videos}num_repeats = 0")), "num_repeats = 0"),
        ("d.toml", musubi(&format!("{videos}caption_extension = \".cap\"")), "no .cap file next to"),
        (
            "d.toml",
            musubi("video_directory = \"clips\"\ntarget_frames = [-3]"),
            "-3 is not a number of frames",
        ),
        ("d.toml", "[[directory]]\npath = \"clips\"".to_owned(), "directory[0]: no resolutions"),
        (
            "d.toml",
            "resolutions = [64]\nenable_ar_bucket = true\n[[directory]]\npath = \"clips\"".to_owned(),
            "enable_ar_bucket needs",
        ),
        ("d.csv", "video,prompt\n".to_owned(), "lists no clip"),
        (
            "d.csv",
            "video,prompt\nclips/gone.mp4,x\n".to_owned(),
            "gone.mp4, which is not a clip or does not exist",
        ),
    ] {
        let error = desk.refusal(name, &text);
        assert!(error.contains(told) && error.contains(name), "{told} not in {error}");
    }
    let both = desk.config("d.csv", json!({ "folder": "clips" }));
    assert!(both.check(SizeMultiple::new(16)).unwrap_err().to_string().contains("data.import"));
    assert!(desk.build(&both).unwrap_err().to_string().contains("data.import"));
}

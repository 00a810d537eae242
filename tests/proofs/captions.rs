//! What clips are trained with: several captions, shuffled and dropped tags, templates.

use std::collections::BTreeSet;
use std::path::Path;

use data::{DataConfig, Dataset, Item, SizeMultiple, scan, write_gif};
use proofs::film::drifting;

const RATE: f64 = 16.0;

fn config(folder: &Path, more: &str) -> DataConfig {
    let text = format!("{{\"folder\": {folder:?}, \"sizes\": [[48, 32]], \"frames\": [5] {more}}}");
    serde_json::from_str(&text).unwrap()
}

/// A folder with a clip for each of `captions`, which are written to files of these names.
fn folder(captions: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in captions {
        std::fs::write(folder.path().join(name), text).unwrap();
        if !name.starts_with("metadata") {
            let clip = Path::new(name).with_extension("gif");
            write_gif(&folder.path().join(clip), &drifting(48, 32, 5), RATE).unwrap();
        }
    }
    folder
}

fn items(folder: &Path, more: &str) -> Vec<Item> {
    scan(&config(folder, more)).unwrap()
}

fn refused(folder: &Path, more: &str) -> String {
    let config = config(folder, more);
    let checked = config.check(SizeMultiple::new(16));
    checked.and_then(|()| scan(&config).map(drop)).unwrap_err().to_string()
}

const TAGS: &str = "fox, red fur,running , snow,, night, close-up";

/// Texts are encoded before training, so a second reading has to give the same ones.
#[test]
fn tags_are_arranged_as_a_function_of_their_clip() {
    let folder = folder(&[("a.txt", TAGS), ("b.txt", TAGS)]);
    let rules = r#", "captions": { "shuffle_tags": true, "keep_tags": 2, "arrangements": 40 }"#;
    let read = items(folder.path(), rules);
    assert_eq!(read, items(folder.path(), rules));
    let tags = ["close-up", "fox", "night", "red fur", "running", "snow"];
    for item in &read {
        assert_eq!(item.caption, TAGS, "the caption of the held-out loss is as it was written");
        assert_eq!(item.variants.len(), 40);
        for text in &item.variants {
            assert!(text.starts_with("fox, red fur, "), "{text}");
            let mut own: Vec<&str> = text.split(", ").collect();
            own.sort_unstable();
            assert_eq!(own, tags);
        }
        // 40 draws of the 24 orders of four tags: fewer than 12 different ones are as good as impossible.
        assert!(item.variants.iter().collect::<BTreeSet<_>>().len() >= 12);
    }
    assert_ne!(read[0].variants, read[1].variants, "clips of one caption are not shuffled alike");
}

#[test]
fn tags_are_left_out_as_often_as_they_should_and_never_all() {
    let folder = folder(&[("a.txt", TAGS), ("b.txt", "fox")]);
    let rules = r#", "captions": { "drop_tags": 0.3, "keep_tags": 1, "arrangements": 256 }"#;
    let read = items(folder.path(), rules);
    let texts = &read[0].variants;
    for tag in ["red fur", "running", "snow", "night", "close-up"] {
        let dropped = texts.iter().filter(|text| !text.contains(tag)).count() as f64 / 256.0;
        // Four standard deviations of 256 draws at 0.3.
        assert!((dropped - 0.3).abs() < 4.0 * (0.3_f64 * 0.7 / 256.0).sqrt(), "{tag}: {dropped}");
    }
    let order = |text: &String| text.split(", ").map(|tag| TAGS.find(tag).unwrap()).collect::<Vec<_>>();
    assert!(texts.iter().all(|text| text.starts_with("fox") && order(text).is_sorted()), "{texts:?}");
    assert_eq!(read[1].variants, Vec::<String>::new(), "one tag has one arrangement");
    let rules = r#", "captions": { "drop_tags": 0.95, "arrangements": 256 }"#;
    assert!(items(folder.path(), rules)[0].variants.iter().all(|text| !text.is_empty()));
}

#[test]
fn each_of_several_captions_is_drawn_alike() {
    let metadata = r#"{"file_name": "d.gif", "text": ["four", "five"]}"#;
    let folder = folder(&[
        ("a.txt", "one\n\n two \nthree\n"),
        ("b.json", r#"["left", "right"]"#),
        ("c.txt", "alone"),
        ("d.txt", "not read"),
        ("metadata.jsonl", metadata),
    ]);
    let read = items(folder.path(), r#", "captions": { "per_file": "lines" }"#);
    let texts = |item: &Item| item.texts().map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!(texts(&read[0]), ["one", "two", "three"].map(str::to_owned).into());
    assert_eq!(texts(&read[1]), ["left", "right"].map(str::to_owned).into());
    assert_eq!((read[2].variants.len(), read[2].drawn(0.7)), (0, "alone"));
    assert_eq!(texts(&read[3]), ["five", "four"].map(str::to_owned).into());
    let drawn: Vec<&str> = [0.0, 0.33, 0.34, 0.66, 0.67, 0.999].map(|at| read[0].drawn(at)).into();
    assert_eq!(drawn, ["one", "one", "two", "two", "three", "three"]);
    let whole = items(folder.path(), "");
    assert_eq!((whole[0].caption.as_str(), whole[0].variants.len()), ("one\n\n two \nthree", 0));
}

#[test]
fn templates_words_and_the_trigger_make_one_text() {
    let folder = folder(&[("a.txt", "a man walks, {trigger} sings"), ("b.txt", "sks, the man")]);
    let rules = r#", "trigger": "sks", "caption_prefix": "old film: ", "captions": {
        "replace": { "man": "person", "a man": "sks" }, "suffix": ", 8 mm",
        "templates": ["{caption}", "a photo of {trigger}: {caption}"] }"#;
    let read = items(folder.path(), rules);
    assert_eq!(
        read[0].variants,
        ["old film: sks walks, sks sings, 8 mm", "old film: a photo of sks: sks walks, sks sings, 8 mm"]
    );
    assert_eq!(read[1].variants[0], "old film: sks, the person, 8 mm");
    assert_eq!(read[1].found, ["sks, the man"]);
    let rules = r#", "trigger": "sks", "captions": { "templates": ["seen: {caption}"] }"#;
    assert_eq!(items(folder.path(), rules)[0].caption, "seen: a man walks, sks sings");
}

#[test]
fn rules_that_cannot_be_followed_are_refused_by_name() {
    let folder = folder(&[("a.txt", "a {trigger} b"), ("b.json", "{}")]);
    for (rules, told) in [
        (r#"{ "keep_tags": 1 }"#, "keep_tags only has a meaning with"),
        (r#"{ "shuffle_tags": true, "arrangements": 0 }"#, "between 1 and 256"),
        (r#"{ "drop_tags": 1.0 }"#, "between 0 and 0.95"),
        (r#"{ "tag_separator": " " }"#, "tag_separator"),
        (r#"{ "templates": ["nothing"] }"#, "has neither {caption} nor {trigger}"),
        (r#"{ "templates": ["{trigger}"] }"#, "data.trigger is not set"),
        (r#"{ "replace": { " ": "x" } }"#, "which is no word"),
    ] {
        let text = refused(folder.path(), &format!(", \"captions\": {rules}"));
        assert!(text.contains(told) && text.contains("data.captions"), "{text}");
    }
    let text = refused(folder.path(), "");
    assert!(
        text.contains("a.gif: its caption has {trigger}") && text.contains("b.gif: a JSON file"),
        "{text}"
    );
    let unknown = serde_json::from_str::<DataConfig>(r#"{"folder": "x", "captions": {"shufle_tags": true}}"#);
    assert!(unknown.unwrap_err().to_string().contains("unknown field `shufle_tags`"));
    let unknown = serde_json::from_str::<DataConfig>(r#"{"folder": "x", "captions": "text"}"#);
    assert!(unknown.unwrap_err().to_string().contains("unknown variant `text`"));
}

/// Plans of runs that began before there were rules hold the name of a source.
#[test]
fn rules_without_a_setting_are_written_as_the_name_of_their_source() {
    let folder = folder(&[("a.txt", "x")]);
    let written = |more: &str| serde_json::to_value(config(folder.path(), more)).unwrap()["captions"].clone();
    assert_eq!(written(", \"captions\": \"txt\""), "txt");
    assert_eq!(written(""), "auto");
    let rules = written(r#", "captions": { "shuffle_tags": true }"#);
    let read = config(folder.path(), &format!(", \"captions\": {rules}"));
    assert!(read.captions.shuffle_tags);
    assert_eq!(serde_json::to_value(&read).unwrap()["captions"], rules);
    assert!(Dataset::build(&read, SizeMultiple::new(16), RATE, &mut |_, _| {}).is_ok());
}

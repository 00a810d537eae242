//! `data.skip`, `data.crop_bars` and `data.split_cuts`: clips that are left out, lose their bars, or become several.

use std::path::Path;

use data::{
    Accompanying, Cache, Clip, Crop, DataConfig, Dataset, Finding, SizeMultiple, Takes, Watch, write_webp,
};
use proofs::film::{SCENE_SIZE, brightness, grey, scene};
use proofs::fixture;
use proofs::project::Project;
use serde_json::{Value, json};
use trainer::plan::Plan;
use trainer::train;
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

const RATE: f64 = 16.0;
/// Rows of black above and below.
const BARS: u32 = 8;

fn build_with(cache: Option<&Path>, config: &Value) -> data::Result<Dataset> {
    let config: DataConfig = serde_json::from_value(config.clone()).unwrap();
    let mut watch = Watch { progress: &mut |_, _| {}, is_stopped: &|| false, cache };
    let model = Takes { multiple: SizeMultiple::new(16), fps: RATE, companions: &[] };
    Dataset::build_watched(&config, &model, &mut watch)
}

fn build(config: &Value) -> data::Result<Dataset> {
    build_with(None, config)
}

fn refused(config: &Value) -> String {
    build(config).unwrap_err().to_string()
}

fn ids(dataset: &Dataset) -> Vec<&str> {
    dataset.sources.iter().map(|source| source.item.id.as_str()).collect()
}

/// Writes the clip `name` of 24 frames.
fn clip(folder: &Path, name: &str, of: impl Fn(usize, u32, u32) -> u8) {
    std::fs::create_dir_all(folder).unwrap();
    write_webp(&folder.join(format!("{name}.webp")), &grey(SCENE_SIZE, 24, of), RATE).unwrap();
    std::fs::write(folder.join(format!("{name}.txt")), name).unwrap();
}

/// Clips `cut`, whose scene changes at frame 10, `flash`, of which the first scene has 3 frames, `bars` and `whole`.
fn folder() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let clips = root.path().join("clips");
    let changed = |at: usize| {
        move |t: usize, x: u32, y: u32| if t < at { scene(5)(t, x, y) } else { 255 - scene(5)(t, x, y) / 3 }
    };
    let is_inside = |y: u32| (BARS..SCENE_SIZE[1] - BARS).contains(&y);
    clip(&clips, "cut", changed(10));
    clip(&clips, "flash", changed(3));
    clip(&clips, "bars", move |t, x, y| if is_inside(y) { scene(7)(t, x, y) } else { 4 });
    clip(&clips, "whole", scene(1));
    root
}

/// The settings `more` over `sizes` for the folder.
fn config(root: &Path, more: Value) -> Value {
    let mut config = json!({ "folder": root.join("clips"), "sizes": [[96, 64], [96, 48]], "frames": [5] });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

fn clips_of(dataset: &Dataset, id: &str) -> Vec<Clip> {
    let source = ids(dataset).iter().position(|known| *known == id).unwrap();
    dataset.clips(source, &dataset.windows).unwrap().collect::<data::Result<_>>().unwrap()
}

#[test]
fn clips_are_left_out_by_name_and_patterns_that_match_none_are_refused() {
    let root = folder();
    std::fs::write(root.path().join("clips/damaged.mp4"), "no video, and no caption").unwrap();
    let built = build(&config(root.path(), json!({ "skip": ["damaged.mp4", "c*", "b?rs.webp"] }))).unwrap();
    assert_eq!(ids(&built), ["flash.webp", "whole.webp"]);
    assert_eq!(built.notes, ["left out by data.skip (3): bars.webp, cut.webp, damaged.mp4"]);
    let text = refused(&config(root.path(), json!({ "skip": ["damaged.mp4", "nobody*"] })));
    assert!(text.contains("data.skip: \"nobody*\" matches no clip") && text.contains("bars.webp"), "{text}");
    assert!(refused(&config(root.path(), json!({ "skip": ["*"] }))).contains("leaves out every clip"));
    let sets = |first: Value, second: Value| {
        let set = |name: &str, more: Value| {
            let mut set = json!({ "name": name, "folder": root.path().join("clips") });
            set.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            set
        };
        json!({ "sizes": [[96, 64]], "frames": [5], "skip": ["damaged*", "flash*"],
            "sets": [set("a", first), set("b", second)] })
    };
    let built = build(&sets(json!({}), json!({ "skip": ["damaged*", "b/[cf]*", "cut.webp"] })));
    assert!(built.unwrap_err().to_string().contains("\"b/[cf]*\" matches no clip"));
    let built = build(&sets(json!({}), json!({ "skip": ["damaged*", "b/w*", "cut.webp"] }))).unwrap();
    assert_eq!(ids(&built), ["a/bars.webp", "a/cut.webp", "a/whole.webp", "b/bars.webp", "b/flash.webp"]);
}

/// A mask whose clip is left out belongs to nobody's loss, and is no mistake.
#[test]
fn masks_of_clips_that_are_left_out_are_left_out_too() {
    let root = folder();
    let masks = root.path().join("masks");
    for name in ["cut", "whole"] {
        clip(&masks, name, |_, _, _| 255);
    }
    let of =
        |skip: &str| build(&config(root.path(), json!({ "skip": [skip], "loss_masks": { "from": masks } })));
    let built = of("cut*").unwrap();
    assert_eq!(built.sources.iter().filter(|source| source.companions.loss_mask.is_some()).count(), 1);
    let table = "video,prompt\nclips/cut.webp,one\nclips/whole.webp,two\n";
    std::fs::write(root.path().join("metadata.csv"), table).unwrap();
    let listed = json!({ "import": root.path().join("metadata.csv"), "sizes": [[96, 64]], "frames": [5],
        "skip": ["cut*"], "loss_masks": { "from": masks } });
    let built = build(&listed).unwrap();
    assert_eq!(ids(&built), ["clips/whole.webp"]);
    assert!(built.sources[0].companions.loss_mask.is_some());
    clip(&masks, "nobody", |_, _, _| 255);
    assert!(of("cut*").unwrap_err().to_string().contains("no clip of this name for nobody"));
}

/// Bars that stay would be learnt; a control clip that keeps them would be a few pixels off its clip everywhere.
#[test]
fn bars_are_cut_off_clips_and_off_what_accompanies_them() {
    let root = folder();
    // Twice as large as its clip, white where that has bars.
    for name in ["bars", "cut", "flash", "whole"] {
        let is_inside = |y: u32| (2 * BARS..2 * (SCENE_SIZE[1] - BARS)).contains(&y);
        let film = grey(SCENE_SIZE.map(|side| 2 * side), 24, |_, _, y| if is_inside(y) { 60 } else { 250 });
        std::fs::create_dir_all(root.path().join("control")).unwrap();
        write_webp(&root.path().join(format!("control/{name}.webp")), &film, RATE).unwrap();
    }
    let of = |more: Value| {
        let mut more = more;
        more["control"] = json!(root.path().join("control"));
        build(&config(root.path(), more)).unwrap()
    };
    let (plain, cropped) = (of(json!({})), of(json!({ "crop_bars": true })));
    assert_eq!(cropped.sources[0].crop, Crop { top: BARS, bottom: BARS, ..Crop::NONE });
    assert!(cropped.sources[1..].iter().all(|source| source.crop.is_none()), "only one has bars");
    assert!(plain.sources.iter().all(|source| source.crop.is_none()) && plain.notes.is_empty());
    assert_eq!(
        cropped.notes,
        ["bars cut off by data.crop_bars (1): bars.webp (8 above, 8 below: 96x48 are left)"]
    );
    let (whole, rest) = (clips_of(&plain, "bars.webp"), clips_of(&cropped, "bars.webp"));
    assert_eq!(
        (whole[0].bucket.to_string().as_str(), rest[0].bucket.to_string().as_str()),
        ("96x64x5", "96x48x5")
    );
    let row = 3 * SCENE_SIZE[0] as usize;
    for (whole, rest) in whole[0].frames().zip(rest[0].frames()) {
        assert!(whole[row * BARS as usize..][..rest.len()] == *rest, "what is left is changed");
    }
    let control = |dataset: &Dataset| {
        let clips = dataset.companion_clips(0, Accompanying::Control, &dataset.windows).unwrap().unwrap();
        clips.map(|clip| clip.unwrap().pixels).next().unwrap()
    };
    let top_row = |pixels: &[u8]| brightness(&pixels[..row]);
    assert!(top_row(&control(&plain)) > 240 && top_row(&control(&cropped)) < 75);

    // At one size, so that nothing but the bars tells the keys apart.
    let one = |crop: bool| of(json!({ "sizes": [[96, 64]], "crop_bars": crop }));
    let (plain, cropped) = (one(false), one(true));
    for (index, (before, after)) in plain.windows.iter().zip(&cropped.windows).enumerate() {
        let changes = index == 0;
        assert_eq!(plain.key(before, "content", "vae") != cropped.key(after, "content", "vae"), changes);
        let of = |dataset: &Dataset, window| dataset.companion_key(window, Accompanying::Control, "c", "vae");
        assert_eq!(of(&plain, before) != of(&cropped, after), changes);
    }
}

/// A window across a change of the scene teaches cuts; times of what accompanies a clip stay those of its file.
#[test]
fn scenes_become_clips_of_their_own() {
    let root = folder();
    let of = |more: Value| {
        let mut more = more;
        more["extract"] = json!("sliding");
        more["stride"] = json!(2);
        more["held_out"] = json!(["flash.webp"]);
        build(&config(root.path(), more))
    };
    let (plain, split) = (of(json!({})).unwrap(), of(json!({ "split_cuts": true })).unwrap());
    assert_eq!(ids(&plain), ["bars.webp", "cut.webp", "flash.webp", "whole.webp"]);
    assert_eq!(ids(&split), ["bars.webp", "cut.webp#1", "cut.webp#2", "flash.webp#2", "whole.webp"]);
    assert!(split.sources[3].item.held_out, "the scenes of a clip that is held out are");
    let crosses = |dataset: &Dataset, window: &data::Window| {
        let frames = dataset.source_frames(window);
        dataset.sources[window.source].item.id.starts_with("cut") && frames[0] < 10 && frames[4] >= 10
    };
    assert!(plain.windows.iter().any(|window| crosses(&plain, window)));
    assert!(!split.windows.iter().any(|window| crosses(&split, window)));
    let starts = |id: &str| {
        let own = |window: &&data::Window| split.sources[window.source].item.id == id;
        split.windows.iter().filter(own).map(|window| window.start).collect::<Vec<_>>()
    };
    assert_eq!((starts("cut.webp#1"), starts("cut.webp#2")), (vec![0, 2, 4], vec![10, 12, 14, 16, 18]));
    assert_eq!(
        split.notes,
        [
            "left out, shorter than 5 frames (1): flash.webp#1 (3 frames)",
            "split at scene changes by data.split_cuts (2): cut.webp (at 0.62 s), flash.webp (at 0.19 s)"
        ]
    );
    // Where the windows are the same, so are their entries.
    let key = |dataset: &Dataset, id: &str, start| {
        let own =
            |window: &&data::Window| dataset.sources[window.source].item.id == id && window.start == start;
        dataset.key(dataset.windows.iter().find(own).unwrap(), "content", "vae")
    };
    assert_eq!(key(&plain, "cut.webp", 2), key(&split, "cut.webp#1", 2));
    let skipped = of(json!({ "split_cuts": true, "skip": ["cut.webp#1"] })).unwrap();
    assert_eq!(ids(&skipped), ["bars.webp", "cut.webp#2", "flash.webp#2", "whole.webp"]);
    let text = of(json!({ "split_cuts": true, "skip": ["cut.webp#7"] })).unwrap_err().to_string();
    assert!(text.contains("\"cut.webp#7\" matches no clip"), "{text}");
    let text = of(json!({ "split_cuts": true, "frames": [17] })).unwrap_err().to_string();
    assert!(text.contains("cut.webp (14 frames)"), "the longest scene is still too short: {text}");
}

/// What is cut off or split is not found again, so that the report can be looked at after a fix.
#[test]
fn the_checks_look_at_what_is_trained() {
    let root = folder();
    let found = |more: Value| {
        let built = build(&config(root.path(), more)).unwrap();
        let checked = data::check(&built, &mut || Ok(())).unwrap();
        let findings = checked.into_iter().flat_map(|clip| clip.findings);
        let named = |finding| match finding {
            Finding::Bars { .. } => Some("bars"),
            Finding::Cuts { .. } => Some("cuts"),
            _ => None,
        };
        findings.filter_map(named).collect::<Vec<_>>()
    };
    assert_eq!(found(json!({})), ["bars", "cuts", "cuts"]);
    assert_eq!(found(json!({ "crop_bars": true })), ["cuts", "cuts"]);
    assert_eq!(found(json!({ "split_cuts": true })), ["bars"]);
}

/// Decoding every clip at each start would take minutes; what was seen is kept by content, so another clip is looked at.
#[test]
fn what_was_seen_is_kept_in_the_cache() {
    let root = folder();
    let cache = root.path().join("cache");
    let fixed = config(root.path(), json!({ "split_cuts": true }));
    let first = build_with(Some(&cache), &fixed).unwrap();
    let file = Cache::open(&cache).unwrap().folder().join("bars-and-scenes.json");
    let mut kept: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let clips = kept["clips"].as_object_mut().unwrap();
    assert_eq!(clips.len(), 4);
    clips.values_mut().for_each(|seen| seen["cuts"] = json!([12]));
    std::fs::write(&file, kept.to_string()).unwrap();
    let again = build_with(Some(&cache), &fixed).unwrap();
    assert_eq!((first.sources.len(), again.sources.len()), (5, 8), "it was looked at again");
    clip(&root.path().join("clips"), "whole", scene(2));
    assert_eq!(build_with(Some(&cache), &fixed).unwrap().sources.len(), 7, "another clip was not looked at");
    std::fs::write(&file, "{").unwrap();
    assert_eq!(build_with(Some(&cache), &fixed).unwrap().sources.len(), 5);
}

/// A whole recipe: entries of before are found again, and a run would not go on over other clips.
#[test]
fn the_cache_and_the_digest_change_with_what_is_cut_off() {
    let project = Project::new(&fixture(""), &["a ball"], "");
    let is_inside = |y: u32| (4..28).contains(&y);
    let film = grey([48, 32], 7, |t, x, y| if is_inside(y) { scene(3)(t, 2 * x, 2 * y) } else { 0 });
    write_webp(&project.clips().join("clip00.webp"), &film, RATE).unwrap();
    let recipe = std::fs::read_to_string(project.recipe()).unwrap();
    let cached = |more: &str| {
        let text = recipe.replace("[data]\n", &format!("[data]\n{more}"));
        std::fs::write(project.recipe(), text).unwrap();
        let planned = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
        let encoded = train::cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
        let latents: Vec<f32> = encoded.latents(0).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        (planned.plan.dataset.digest, latents)
    };
    let (plain, cropped, again) = (cached(""), cached("crop_bars = true\n"), cached("crop_bars = false\n"));
    assert!(plain.0 != cropped.0 && plain.1 != cropped.1);
    assert!(plain == again, "without it something changed");
}

//! MagCache on the command line: lists that are printed ahead, tables that are measured, and refusals.

use std::fs;

use serde_json::Value;

use crate::desk::Desk;

/// The last line of standard output.
fn last(stdout: &str) -> Value {
    serde_json::from_str(stdout.lines().last().unwrap()).unwrap()
}

/// Without a model: the list of a published one.
#[test]
fn a_published_list_is_told_without_a_model() {
    let desk = Desk::new();
    let plan = |more: &[&str]| {
        let words = [&["--json", "sample", "--plan", "--assume", "t2v-a14b"][..], more].concat();
        last(&desk.succeed(&words).stdout)["skipped"].clone()
    };
    let joint = [5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 28, 29, 31, 33];
    let told = plan(&["--cache-preset", "E004K2R20"]);
    assert_eq!(told, serde_json::json!({ "cond": joint, "uncond": joint }));
    assert_eq!(plan(&[]), serde_json::json!({ "cond": [], "uncond": [] }));
    let unguided = plan(&["--cache-preset", "E004K2R20", "--guidance", "1"]);
    assert!(unguided["uncond"].as_array().unwrap().is_empty(), "{unguided}");
    let people = desk.succeed(&["sample", "--plan", "--assume", "t2v-a14b", "--cache-preset", "E004K2R20"]);
    for words in ["22 of 40 steps", "5, 6, 8, 9", "published table of Wan 2.2 T2V-A14B"] {
        assert!(people.stdout.contains(words), "{}", people.stdout);
    }
    desk.refuse(
        &["sample", "--plan", "--assume", "t2v-a14b", "--cache-preset", "fast"],
        &["--cache-preset", "E012K2R20"],
    );
    desk.refuse(
        &["sample", "--plan", "--assume", "flf2v-14b", "--cache-preset", "E012K2R20"],
        &["calibrate"],
    );
    desk.refuse(&["sample", "--assume", "t2v-14b"], &["--plan"]);
}

const CLIPS: &str = "[sample]\nprompts = [\"a cloud\", \"a hill --d 9\"]\nevery = 1\nsteps = 12\nguidance = 3\nformats = [\"gif\"]";

/// A run measures its table on the first clip, which is exact, and its later clips skip steps by it; `sample` uses the same
/// table, and `calibrate` measures the same again.
#[test]
fn a_run_measures_its_own_table() {
    let desk = Desk::new();
    let train = |cache: &str, folder: &str| {
        let recipe = fs::read_to_string(desk.path("recipe.toml")).unwrap();
        let recipe = recipe.replace("folder = \"run\"", &format!("folder = \"{folder}\""));
        let name = format!("{folder}.toml");
        desk.write(&name, recipe.replace("[checkpoint]", &format!("{CLIPS}\n{cache}\n\n[checkpoint]")));
        desk.succeed(&["train", &name])
    };
    let exact = train("", "exact");
    assert!(!exact.stdout.contains("MagCache"));
    // Whatever the table says, two of three steps may be skipped behind the first.
    let told = train("cache = { threshold = 100, most = 2, retention = 0.0 }", "skipping").stdout;
    assert!(
        told.contains("measured on the first clip") && told.contains("the blocks run in 4 of 12 steps"),
        "{told}"
    );
    let clip = |folder: &str, step: u64| {
        fs::read(desk.path(&format!("{folder}/samples/step-{step:06}/00-a-cloud.gif"))).unwrap()
    };
    assert!(clip("skipping", 0) == clip("exact", 0), "the first set is measured, so it is exact");
    assert!(clip("skipping", 2) != clip("exact", 2), "steps were skipped, and the clip is the same");

    let table: Value =
        serde_json::from_slice(&fs::read(desk.path("skipping/magcache.json")).unwrap()).unwrap();
    let row = |table: &Value, half: &str| -> Vec<f64> {
        table[half].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
    };
    assert_eq!((row(&table, "cond").len(), row(&table, "cond")[0]), (12, 1.0));
    assert!(row(&table, "uncond")[1..].iter().any(|ratio| (ratio - 1.0).abs() > 1e-4), "{table}");
    assert_ne!(row(&table, "cond"), row(&table, "uncond"));

    let sampled = desk.succeed(&["sample", "skipping", "--out", "made"]);
    assert!(sampled.stderr.contains("skipping/magcache.json"), "{}", sampled.stderr);
    let made = fs::read(desk.path("made/00-a-cloud.gif")).unwrap();
    assert!(made == clip("skipping", 2), "the run's last clip differs from what `sample` makes of it");

    // What skipping costs is told, by the clips that the run without it makes.
    let compared = desk.succeed(&["--json", "sample", "skipping", "--out", "both", "--compare-exact"]);
    let likeness = last(&compared.stdout)["likeness"].clone();
    let figures = |index: usize| ["psnr", "ssim"].map(|key| likeness[index][key].as_f64().unwrap());
    assert!(figures(0)[0] > 10.0 && (0.0..1.0).contains(&figures(0)[1]), "{likeness}");
    assert_eq!(likeness.as_array().unwrap().len(), 2);
    assert!(fs::read(desk.path("both/00-a-cloud.gif")).unwrap() == made);
    let with_all = fs::read(desk.path("both/exact/00-a-cloud.gif")).unwrap();
    assert!(with_all == clip("exact", 2), "the exact clip is not that of the run that skips nothing");
    desk.refuse(
        &["sample", "exact", "--out", "none", "--compare-exact"],
        &["--compare-exact", "--cache-preset"],
    );

    // The adapter of the run's end moves the ratios, the same adapter does not.
    desk.succeed(&["calibrate", "exact", "--table", "one.json"]);
    desk.succeed(&["calibrate", "exact", "--table", "two.json"]);
    let read = |name: &str| -> Value { serde_json::from_slice(&fs::read(desk.path(name)).unwrap()).unwrap() };
    assert_eq!(read("one.json"), read("two.json"));
    let shifted =
        ["sample", "exact", "--cache-preset", "E012K2R20", "--cache-table", "one.json", "--shift", "7"];
    desk.refuse(
        &[&shifted[..], &["--out", "other"]].concat(),
        &["one.json", "shift 5", "shift 7", "calibrate"],
    );
    desk.write("short.json", "{\"cond\": [1.0, 0.9], \"uncond\": [1.0]}");
    let short =
        ["sample", "exact", "--cache-preset", "E012K2R20", "--cache-table", "short.json", "--out", "other"];
    desk.refuse(&short, &["short.json", "`uncond` 1"]);
}

#[test]
fn a_rule_that_cannot_be_is_refused_by_the_plan() {
    let desk = Desk::new();
    let refuse = |cache: &str, words: &[&str]| {
        let recipe = fs::read_to_string(desk.path("recipe.toml")).unwrap();
        desk.write(
            "other.toml",
            recipe.replace("[checkpoint]", &format!("{CLIPS}\n{cache}\n\n[checkpoint]")),
        );
        desk.refuse(&["plan", "other.toml"], words);
    };
    refuse("cache = \"E012\"", &["sample.cache", "E012K2R20"]);
    refuse("cache = { threshold = 0.1, most = 0, retention = 0.2 }", &["sample.cache", "at least 1"]);
    refuse("cache = { threshold = 0.1, most = 2, retentoin = 0.2 }", &["retentoin", "a preset such as"]);
    refuse("cache_table = \"one.json\"", &["sample.cache_table", "sample.cache"]);
    refuse("cache = \"E012K2R20\"\ncache_table = \"one.json\"", &["sample.cache_table", "one.json"]);
}

#[test]
fn the_bench_tells_what_skipping_saves() {
    let desk = Desk::new();
    let size =
        ["--random-weights", "--width", "64", "--height", "64", "--frames", "5", "--clips", "1", "-n", "1"];
    let words =
        [&["--json", "bench", "clips"][..], &size, &["--cache-preset", "E012K2R0", "--steps", "9"]].concat();
    let told = last(&desk.succeed(&words).stdout);
    assert_eq!((&told["steps"], &told["skipped"]), (&9.into(), &6.into()), "{told}");
    assert!(told["share_of_ideal"].is_number() && told["exact_s"].is_number(), "{told}");
}

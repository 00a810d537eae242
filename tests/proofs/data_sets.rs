//! `[[data.sets]]`: each set has its own settings, its weight, its share of the micro-batches and its expert.

use std::collections::BTreeMap;

use data::{Bucket, DataConfig, Dataset, ForExpert, Order, OrderItem, SizeMultiple, write_gif};
use models::expert::Expert;
use proofs::film::drifting;
use proofs::project::Project;
use proptest::prelude::*;
use trainer::encode::LatentStore;
use trainer::plan::{Plan, Planned};
use trainer::train::batch::{Batches, StepData};
use trainer::train::cache;
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

const RATE: f64 = 16.0;

fn config(text: &str) -> DataConfig {
    serde_json::from_str(text).unwrap()
}

fn build(config: &DataConfig) -> data::Result<Dataset> {
    Dataset::build(config, SizeMultiple::new(16), RATE, &mut |_, _| {})
}

/// Folders `hero` and `others`, each with clips `a` and `b`.
fn folders() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for set in ["hero", "others"] {
        std::fs::create_dir(root.path().join(set)).unwrap();
        for name in ["a", "b"] {
            let path = root.path().join(set).join(name);
            write_gif(&path.with_extension("gif"), &drifting(48, 32, 9), RATE).unwrap();
            std::fs::write(path.with_extension("txt"), format!("{set} {name}")).unwrap();
        }
    }
    root
}

#[test]
fn sets_have_settings_of_their_own_and_share_the_rest() {
    let root = folders();
    let folder = |name: &str| root.path().join(name).display().to_string();
    let text = serde_json::json!({
        "sizes": [[48, 32]], "frames": [5], "trigger": "sks", "held_out": ["hero/b*"],
        "sets": [
            { "folder": folder("hero"), "frames": [9], "weight": 2.0, "expert": "low" },
            { "folder": [folder("others")], "name": "rest", "trigger": "", "share": 0.25, "sizes": [[32, 32]],
              "captions": { "suffix": "!" }, "extract": "sliding", "stride": 4 },
        ]
    });
    let data = build(&config(&text.to_string())).unwrap();
    let clips: Vec<_> =
        data.sources.iter().map(|s| (s.item.id.as_str(), s.item.caption.as_str(), s.item.held_out)).collect();
    let expected = [
        ("hero/a.gif", "sks, hero a", false),
        ("hero/b.gif", "sks, hero b", true),
        ("rest/a.gif", "others a!", false),
        ("rest/b.gif", "others b!", false),
    ];
    assert_eq!(clips, expected);
    let shapes: Vec<_> = data.windows.iter().map(|w| (w.source, w.bucket.to_string(), w.start)).collect();
    let two = |source| [(source, "32x32x5".to_owned(), 0), (source, "32x32x5".to_owned(), 4)];
    let whole = |source| (source, "48x32x9".to_owned(), 0);
    assert_eq!(shapes, [&[whole(0), whole(1)][..], &two(2), &two(3)].concat());
    assert_eq!(
        (data.sizes.as_slice(), data.frames.as_slice()),
        ([[48, 32], [32, 32]].as_slice(), [9, 5].as_slice())
    );
    assert_eq!((data.sets[0].weight, data.sets[0].expert), (2.0, Some(ForExpert::Low)));
    let items = data.order_items(&data.split().0);
    assert_eq!(items.iter().map(|item| item.pool).collect::<Vec<_>>(), [1, 2, 2, 2, 2]);
}

#[test]
fn sets_that_contradict_are_refused_by_name() {
    let root = folders();
    let refused = |sets: &str, more: &str| {
        let text = format!("{{\"sizes\": [[48, 32]], \"frames\": [5], \"sets\": {sets}{more}}}");
        build(&config(&text.replace("ROOT", &root.path().display().to_string()))).unwrap_err().to_string()
    };
    for (sets, more, told) in [
        ("[{}]", "", "names a folder or an import"),
        (r#"[{"folder": "ROOT/hero"}]"#, r#", "folder": "x""#, "data.folder"),
        (r#"[{"folder": "ROOT/hero"}, {"folder": "ROOT/x/hero"}]"#, "", "another set has this name"),
        (r#"[{"folder": "ROOT/hero", "weight": 0}]"#, "", "weight is 0"),
        (r#"[{"folder": "ROOT/hero", "share": 0.2}]"#, "", "all have a share"),
        (
            r#"[{"folder": "ROOT/hero", "share": 0.2, "repeats": 2}, {"folder": "ROOT/others"}]"#,
            "",
            "both share and repeats",
        ),
        (r#"[{"folder": "ROOT/hero", "repeats": 0}]"#, "", "repeats is 0"),
        (r#"[{"folder": "ROOT/none"}]"#, "", "there is no folder"),
        (r#"[{"folder": "ROOT/hero", "frames": [4]}]"#, "", "not of the form 4n+1"),
    ] {
        let text = refused(sets, more);
        assert!(text.contains(told), "{sets}: {text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Regularisation that is drawn too rarely, or that makes a clip of the main sets miss its epoch, does harm that no loss
    /// shows.
    #[test]
    fn a_pool_gets_its_share_and_every_epoch_has_its_own_clips(
        own in prop::collection::vec((0_u32..3, 1_u32..3), 1..12),
        others in 1_usize..9, share in 0.05_f64..0.9, seed: u64, size in 1_usize..4,
    ) {
        let bucket = |kind: u32| Bucket { width: 32, height: 32, frames: 4 * kind + 1 };
        let mut items: Vec<OrderItem> = own.iter().map(|&(kind, repeats)| OrderItem { bucket: bucket(kind), repeats, pool: 0, share: None }).collect();
        items.extend((0..others).map(|i| OrderItem { bucket: bucket(i as u32 % 2), repeats: 1, pool: 3, share: Some(share) }));
        let order = Order::new(items.clone(), seed, size);
        const EPOCHS: u64 = 30;
        let mut of_pool = BTreeMap::new();
        let (mut claimed, mut all) = (0, 0);
        for epoch in 0..EPOCHS {
            let mut seen = vec![0; items.len()];
            let batches = order.batches(epoch);
            all += batches.len() as u64;
            for batch in batches {
                prop_assert!(batch.items.iter().all(|&item| items[item].pool == items[batch.items[0]].pool));
                prop_assert!(batch.items.iter().all(|&item| items[item].bucket == batch.bucket));
                claimed += u64::from(items[batch.items[0]].pool == 3);
                batch.items.iter().for_each(|&item| seen[item] += 1);
            }
            for (item, times) in items.iter().zip(&seen).filter(|(item, _)| item.pool == 0) {
                prop_assert_eq!(item.repeats, *times);
            }
            for (index, times) in seen.into_iter().enumerate().skip(own.len()) {
                *of_pool.entry(index).or_insert(0u32) += times;
            }
        }
        prop_assert_eq!(order.batches_of(EPOCHS), Some(all));
        // Of the rest, counted over all epochs, one batch is rounded.
        let expected = (all - claimed) as f64 * share / (1.0 - share);
        prop_assert!((claimed as f64 - expected).abs() <= 0.5 + 1e-6, "{claimed} of {all}, expected {expected}");
        let (least, most) = (of_pool.values().min().unwrap(), of_pool.values().max().unwrap());
        prop_assert!(most - least <= 1, "{of_pool:?}");
    }
}

/// The plan of `project` with both experts, and `sets` in place of its folder.
fn planned(project: &Project, sets: &str) -> Planned {
    let clips = project.clips();
    for folder in ["one", "two"].map(|name| clips.join(name)) {
        std::fs::create_dir(&folder).unwrap();
        for name in ["clip00", "clip01"] {
            for ending in ["webp", "txt"] {
                let file = format!("{name}.{ending}");
                std::fs::copy(clips.join(&file), folder.join(&file)).unwrap();
            }
        }
    }
    let text = std::fs::read_to_string(project.recipe()).unwrap();
    let text = text.replace("folder = \"clips\"", sets).replace("[model]", "[model]\nexpert = \"both\"");
    std::fs::write(project.recipe(), text).unwrap();
    Plan::make(&project.recipe(), &mut |_, _| {}).unwrap()
}

fn steps(planned: &Planned, encoded: &LatentStore) -> Vec<StepData> {
    let batches = Batches::new(&planned.plan, &planned.dataset, encoded).unwrap();
    let mut cursor = data::Cursor::default();
    let step = |step: u64| {
        let data = batches.step(step, cursor, 4).unwrap();
        cursor = data.cursor;
        data
    };
    (0..12).map(step).collect()
}

/// A weight is the size of a sample's gradient, and an expert's set goes to no other.
#[test]
fn weights_and_experts_of_sets_reach_their_samples() {
    let sets = "sets = [{ folder = \"clips/one\", weight = 3.0, expert = \"high\" }, { folder = \"clips/two\", weight = 0.5, expert = \"low\" }]";
    let project = Project::of_folder(
        &proofs::fixture("repo_official_a14b"),
        proofs::project::SIZE,
        &["a", "b"],
        "[train]\nsteps = 9\naccumulate = 4\n",
    );
    let planned = planned(&project, sets);
    let encoded = cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    let (mut of_one, mut of_two) = (0, 0);
    for step in steps(&planned, &encoded) {
        for ((batch, expert), item) in step.micro_batches.iter().zip(&step.experts).zip(&step.items) {
            let (weight, expected) = match item.starts_with("one/") {
                true => (3.0, Expert::High),
                false => (0.5, Expert::Low),
            };
            assert_eq!(*expert, Some(expected), "{item}");
            let count = step.experts.iter().filter(|other| *other == expert).count() as f32;
            assert!((batch.weights[0] * count - weight).abs() < 1e-6, "{item}: {:?}", batch.weights);
            *if expected == Expert::High { &mut of_one } else { &mut of_two } += 1;
        }
    }
    assert!(of_one == 24 && of_two == 24, "{of_one}, {of_two}");
}

//! Steps that end by their tokens: which micro-batches they have, what these count for, and on how many replicas.

use data::{Cursor, SheetStyle, contact_sheet};
use proofs::film::flat;
use proofs::project::{Project, SIZE};
use proofs::{assert_same_bits, fixture};
use trainer::encode::LatentStore;
use trainer::plan::{Plan, Planned};
use trainer::replicas::Share;
use trainer::train::batch::{Batches, StepData};
use trainer::train::{self, RunFolder};
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

/// Tokens of a clip of two latent frames, and of a still.
const CLIP: usize = 12;
const STILL: usize = 6;
const PER_STEP: usize = 20;

/// Three clips and two stills.
fn planned(settings: &str) -> (Project, Planned) {
    let project = Project::new(&fixture(""), &["a ball", "two birds", "a fox"], settings);
    for name in ["still0", "still1"] {
        let path = project.clips().join(format!("{name}.png"));
        let style = SheetStyle { columns: 1, cell_width: SIZE[0], gap: 0 };
        contact_sheet(&path, &[flat(SIZE[0], SIZE[1], &[90])], style).unwrap();
        std::fs::write(path.with_extension("txt"), name).unwrap();
    }
    let recipe = std::fs::read_to_string(project.recipe()).unwrap();
    std::fs::write(project.recipe(), recipe.replace("frames = [5]", "frames = [1, 5]")).unwrap();
    let planned = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    (project, planned)
}

fn cached(planned: &Planned) -> LatentStore {
    train::cache(planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap()
}

fn tokens_of(item: &str) -> usize {
    if item.starts_with("still") { STILL } else { CLIP }
}

/// The first steps, each from where the one before ended.
fn steps(batches: &Batches, count: u64, share: Share) -> Vec<StepData> {
    let mut cursor = Cursor::default();
    let next = |step| {
        let data = batches.share_of_step(step, cursor, 1, share).unwrap();
        cursor = data.cursor;
        data
    };
    (0..count).map(next).collect()
}

fn by_tokens(more: &str) -> String {
    format!("[train]\ncaption_dropout = 0.0\ntokens_per_step = {PER_STEP}\n{more}")
}

/// A step ends with the micro-batch that reaches the number, no clip is left out, and every token counts alike.
#[test]
fn a_step_ends_with_the_micro_batch_that_reaches_its_tokens() {
    for (more, by_samples) in [("", false), ("mean_over = \"samples\"\n", true), ("batch = 2\n", false)] {
        let (_project, planned) = planned(&by_tokens(more));
        let encoded = cached(&planned);
        let batches = Batches::new(&planned.plan, &planned.dataset, &encoded).unwrap();
        let (mut seen, mut counts) = (Vec::new(), std::collections::BTreeSet::new());
        for data in steps(&batches, 12, Share::WHOLE) {
            let sizes: Vec<usize> = data.micro_batches.iter().map(|batch| batch.weights.len()).collect();
            let all: usize = data.items.iter().map(|item| tokens_of(item)).sum();
            let last = sizes[sizes.len() - 1];
            let before: usize =
                data.items[..data.items.len() - last].iter().map(|item| tokens_of(item)).sum();
            assert!(before < PER_STEP && PER_STEP <= all, "{more}: {:?}", data.items);
            assert_eq!(data.tokens, Some(all));
            let mut items = data.items.iter();
            for batch in &data.micro_batches {
                let tokens: usize =
                    items.by_ref().take(batch.weights.len()).map(|item| tokens_of(item)).sum();
                let share = match by_samples {
                    true => batch.weights.len() as f64 / data.items.len() as f64,
                    false => tokens as f64 / all as f64,
                };
                assert!(
                    batch.weights.iter().all(|weight| *weight == share as f32),
                    "{more}: {:?}",
                    batch.weights
                );
            }
            counts.insert(data.micro_batches.len());
            seen.extend(data.items);
        }
        assert!(counts.len() > 1, "{more}: every step has as many micro-batches, {counts:?}");
        let mut epoch = seen[..5].to_vec();
        epoch.sort();
        epoch.dedup();
        assert_eq!(epoch.len(), 5, "{more}: an epoch shows every clip once");
    }
}

/// Replicas share the steps of one: the same micro-batches with the same weights, each made once.
#[test]
fn replicas_share_the_steps_of_one() {
    let (_project, planned) = planned(&by_tokens("prior.weight = 0.5\n"));
    let encoded = cached(&planned);
    let batches = Batches::new(&planned.plan, &planned.dataset, &encoded).unwrap();
    let whole = steps(&batches, 6, Share::WHOLE);
    let ranks: Vec<Vec<StepData>> = (0..2).map(|rank| steps(&batches, 6, Share { rank, world: 2 })).collect();
    for (step, whole) in whole.iter().enumerate() {
        assert!(
            ranks.iter().all(|rank| rank[step].cursor == whole.cursor && rank[step].items == whole.items)
        );
        let mut own = ranks.iter().map(|rank| rank[step].micro_batches.iter()).collect::<Vec<_>>();
        let parts = &ranks[0][step].parts;
        let dealt = parts.iter().flat_map(|part| [part.rank; 2]);
        for (batch, rank) in whole.micro_batches.iter().zip(dealt) {
            let other = own[rank].next().unwrap();
            assert_same_bits("input", &other.input.x_bcthw, &batch.input.x_bcthw);
            assert_eq!(other.weights, batch.weights);
        }
        assert!(own.iter_mut().all(|rest| rest.next().is_none()));
    }
}

/// The log of a run tells the tokens of each step, and the plan what they will be.
#[test]
fn a_run_tells_the_tokens_of_its_steps() {
    let (project, mut planned) = planned(&by_tokens("steps = 4\n"));
    let note = "a step ends with the micro-batch that brings it to 20 tokens: 2 to 4 micro-batches of 6 to 12 tokens each";
    assert!(planned.notes.iter().any(|line| line == note), "{:?}", planned.notes);
    let folder = RunFolder::begin(&mut planned.plan).unwrap();
    train::train(&planned, &folder, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    let log = std::fs::read_to_string(project.run().join("metrics.jsonl")).unwrap();
    let rows = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    for row in rows.filter(|row| row["lr"].is_f64()) {
        let items = row["items"].as_array().unwrap().iter().map(|item| tokens_of(item.as_str().unwrap()));
        assert_eq!(row["tokens"].as_u64(), Some(items.sum::<usize>() as u64));
    }
}

#[test]
fn steps_that_cannot_be_are_refused_by_name() {
    for (settings, words) in [
        ("tokens_per_step = 0", "train.tokens_per_step"),
        ("tokens_per_step = 20\naccumulate = 2", "leave out one of the two"),
        ("tokens_per_step = 20\nepochs = 2", "give train.steps"),
        ("tokens_per_step = 1000000", "micro-batches of the smallest clips"),
        ("mean_over = \"clips\"", "clips"),
    ] {
        let project = Project::new(&fixture(""), &["a ball"], &format!("[train]\n{settings}\n"));
        let error = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap_err().to_string();
        assert!(error.contains(words), "{settings}: {error}");
    }
}

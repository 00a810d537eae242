//! Masks of the loss: found, brought to the latents, and weights of what is learnt.

use data::{Accompanying, DataConfig, Dataset, Film, SheetStyle, SizeMultiple, contact_sheet, write_webp};
use kernels::loss::Reduction;
use proofs::film::{drifting, flat};
use proofs::project::{FRAMES, Project, SIZE};
use proofs::{assert_same_bits, fixture};
use trainer::plan::{Plan, Planned};
use trainer::train::batch::{Batches, StepData};
use trainer::train::{self, RunFolder, checkpoint};
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

fn ui() -> Ui {
    Ui::new(Voice::Json)
}

/// A picture of `size`, white in its left half and `right` in the other.
fn halves(path: &std::path::Path, [width, height]: [u32; 2], right: u8) {
    let row: Vec<u8> = (0..width).flat_map(|x| [if x < width / 2 { 255 } else { right }; 3]).collect();
    let film = Film::new(width, height, row.repeat(height as usize)).unwrap();
    contact_sheet(path, &[film], SheetStyle { columns: 1, cell_width: width, gap: 0 }).unwrap();
}

/// Three clips: one with a picture as its mask, one with a moving mask, one without.
fn project(masks: &str) -> Project {
    let project = Project::new(&fixture(""), &["a ball", "two birds", "a fox"], masks);
    let clips = project.clips();
    halves(&clips.join("clip00.mask.png"), SIZE, 0);
    let grown = |extra: u32| [SIZE[0] + extra, SIZE[1] + extra];
    let [width, height] = grown(8);
    // Black in the first frame, white behind it.
    let values: Vec<u8> = (0..FRAMES + 2).map(|frame| if frame == 0 { 0 } else { 255 }).collect();
    write_webp(&clips.join("clip01.mask.webp"), &flat(width, height, &values), 16.0).unwrap();
    project
}

fn planned(project: &Project) -> Planned {
    Plan::make(&project.recipe(), &mut |_, _| {}).unwrap()
}

fn step(planned: &Planned, step: u64) -> StepData {
    let encoded = train::cache(planned, &Interrupt::default(), &ui()).unwrap();
    let batches = Batches::new(&planned.plan, &planned.dataset, &encoded).unwrap();
    batches.step(step, data::Cursor::default(), planned.plan.train.accumulate).unwrap()
}

#[test]
fn masks_are_weights_of_the_latents_that_they_cover() {
    let project = project("loss_masks = { outside = 0.25 }\n[train]\naccumulate = 3\n");
    let planned = planned(&project);
    let names: Vec<&str> = planned.dataset.sources.iter().map(|source| source.item.id.as_str()).collect();
    assert_eq!(names, ["clip00.webp", "clip01.webp", "clip02.webp"], "masks are no clips");
    let data = step(&planned, 0);
    for (batch, item) in data.micro_batches.iter().zip(&data.items) {
        assert_eq!(batch.objective.reduction, Reduction::Samples);
        let Some(weights) = &batch.objective.weights else {
            assert_eq!(item, "clip02.webp");
            continue;
        };
        // Two latent frames of 4 x 6.
        assert_eq!(weights.dims(), [1, 1, 2, 4, 6]);
        let weights: Vec<f32> = weights.flatten_all().unwrap().to_vec1().unwrap();
        let expected: Vec<f32> = match item.as_str() {
            "clip00.webp" => (0..48).map(|at| if at % 6 < 3 { 1.0 } else { 0.25 }).collect(),
            _ => (0..48).map(|at| if at < 24 { 0.25 } else { 1.0 }).collect(),
        };
        // Pictures are scaled, and coded with a loss.
        let far = weights.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 0.03, "{item}: {weights:?}");
    }
}

/// A batch of a clip with a mask and one without: ones for the other.
#[test]
fn clips_without_a_mask_count_whole_beside_those_that_have_one() {
    let project = project("loss_masks = { outside = 0, reduction = \"batch\" }\n[train]\nbatch = 3\n");
    let data = step(&planned(&project), 0);
    let weights = data.micro_batches[0].objective.weights.as_ref().unwrap();
    assert_eq!(weights.dims(), [3, 1, 2, 4, 6]);
    let at = data.items.iter().position(|item| item == "clip02.webp").unwrap();
    let own: Vec<f32> = weights.get(at).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    assert!(own.iter().all(|weight| *weight == 1.0));
}

/// White everywhere is no mask at all, to the bit, in the whole of a run.
#[test]
fn masks_of_ones_train_what_no_masks_train() {
    let settings = "[train]\nsteps = 3\nbatch = 2\n[optimizer]\nlr = 0.01\nwarmup = 0\n";
    let run = |masks: &str| {
        let project = Project::new(&fixture(""), &["a ball", "two birds"], &format!("{masks}{settings}"));
        for (i, name) in ["clip00", "clip01"].into_iter().enumerate().filter(|_| !masks.is_empty()) {
            let grown = 8 * i as u32;
            halves(
                &project.clips().join(format!("{name}.mask.png")),
                [SIZE[0] + grown, SIZE[1] + grown],
                255,
            );
        }
        let mut planned = planned(&project);
        let folder = RunFolder::begin(&mut planned.plan).unwrap();
        train::train(&planned, &folder, &Interrupt::default(), &ui()).unwrap();
        let newest = checkpoint::newest(&folder.checkpoints()).unwrap().unwrap();
        checkpoint::load(&newest).unwrap().1
    };
    let (with, without) = (run("loss_masks = { reduction = \"none\" }\n"), run(""));
    assert!(!with.tensors.is_empty() && with.tensors.keys().eq(without.tensors.keys()));
    for (name, state) in &with.tensors {
        assert_same_bits(name, &state.parameter, &without.tensors[name].parameter);
    }
}

#[test]
fn masks_that_fit_no_clip_are_refused_by_name() {
    let built = |project: &Project, masks: &str| {
        let text = format!(
            "{{\"folder\": {:?}, \"sizes\": [[48, 32]], \"frames\": [5], \"loss_masks\": {masks}}}",
            project.clips()
        );
        let config: DataConfig = serde_json::from_str(&text).unwrap();
        Dataset::build(&config, SizeMultiple::new(16), 16.0, &mut |_, _| {}).map(drop)
    };
    let refused = |project: &Project, masks: &str| built(project, masks).unwrap_err().to_string();
    let project = project("");
    built(&project, "{}").unwrap();
    assert!(refused(&project, r#"{"outside": 1.5}"#).contains("between 0 and 1"));
    assert!(refused(&project, r#"{"from": "/nowhere"}"#).contains("there is no folder /nowhere"));
    let masks = project.root().join("masks");
    std::fs::create_dir(&masks).unwrap();
    let from = format!("{{\"from\": {:?}}}", masks);
    let stray = |name: &str| project.clips().join(name);
    std::fs::rename(stray("clip00.mask.png"), masks.join("clip00.png")).unwrap();
    std::fs::rename(stray("clip01.mask.webp"), masks.join("other.webp")).unwrap();
    assert!(refused(&project, &from).contains("no clip of this name for other"));
    std::fs::remove_file(masks.join("other.webp")).unwrap();
    built(&project, &from).unwrap();
    assert!(refused(&project, "{}").contains("finds no mask of any clip"));
    halves(&stray("nobody.mask.png"), SIZE, 0);
    assert!(refused(&project, "{}").contains("nobody.mask.png"));
    std::fs::remove_file(stray("nobody.mask.png")).unwrap();
    write_webp(&stray("clip02.mask.webp"), &drifting(SIZE[0] + 16, SIZE[1] + 16, 3), 16.0).unwrap();
    assert!(refused(&project, "{}").contains("must be as long as the clips"));
}

/// How opaque pixels of the column x are in frame t: the left half always, the right half from the second frame on.
fn opaque(t: u32, x: u32) -> u8 {
    if x < SIZE[0] / 2 || t > 0 { 255 } else { 0 }
}

/// A picture of grey pixels that are as opaque as `opaque` says.
fn translucent(path: &std::path::Path, t: u32) {
    image::RgbaImage::from_fn(SIZE[0], SIZE[1], |x, _| image::Rgba([90, 90, 90, opaque(t, x)]))
        .save(path)
        .unwrap();
}

/// An animated PNG of the same.
fn animated(path: &std::path::Path, frames: u32) {
    let file = std::fs::File::create(path).unwrap();
    let mut encoder = png::Encoder::new(file, SIZE[0], SIZE[1]);
    encoder.set_color(png::ColorType::Rgba);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_animated(frames, 0).unwrap();
    encoder.set_frame_delay(1, 16).unwrap();
    let mut writer = encoder.write_header().unwrap();
    for t in 0..frames {
        let pixels = (0..SIZE[0] * SIZE[1]).flat_map(|at| [90, 90, 90, opaque(t, at % SIZE[0])]);
        writer.write_image_data(&pixels.collect::<Vec<u8>>()).unwrap();
    }
    writer.finish().unwrap();
}

/// The alpha of a still, of an animation and of numbered pictures is a mask of their loss; a clip without alpha counts whole.
#[test]
fn alpha_is_a_mask_of_the_loss() {
    let project = Project::new(
        &fixture(""),
        &["a ball", "a fox"],
        "loss_masks = { from = \"alpha\", outside = 0.25 }\n[train]\naccumulate = 4\n",
    );
    let clips = project.clips();
    let caption = |name: &str| std::fs::write(clips.join(format!("{name}.txt")), "grey").unwrap();
    std::fs::remove_file(clips.join("clip00.webp")).unwrap();
    translucent(&clips.join("clip00.png"), 0);
    animated(&clips.join("moving.png"), FRAMES);
    std::fs::create_dir(clips.join("numbered")).unwrap();
    (0..FRAMES).for_each(|t| translucent(&clips.join(format!("numbered/{t:02}.png")), t));
    ["moving", "numbered"].into_iter().for_each(caption);
    let planned = planned(&project);
    let data = step(&planned, 0);
    let mut seen = Vec::new();
    for (batch, item) in data.micro_batches.iter().zip(&data.items) {
        seen.push(item.as_str());
        let Some(weights) = &batch.objective.weights else {
            assert_eq!(item, "clip01.webp");
            continue;
        };
        let weights: Vec<f32> = weights.flatten_all().unwrap().to_vec1().unwrap();
        let is_outside = |at: usize| at < 24 && at % 6 >= 3;
        let expected: Vec<f32> =
            (0..weights.len()).map(|at| if is_outside(at) { 0.25 } else { 1.0 }).collect();
        assert_eq!(weights, expected, "{item}");
        assert_eq!(weights.len(), if item == "clip00.png" { 24 } else { 48 }, "{item}");
    }
    seen.sort_unstable();
    assert_eq!(seen, ["clip00.png", "clip01.webp", "moving.png", "numbered"]);

    // The clip and its alpha are the same file, and not the same entry.
    let (dataset, window) = (&planned.dataset, &planned.dataset.windows[0]);
    let alpha = dataset.companion_key(window, Accompanying::LossMask, "content", "pixels");
    assert_ne!(dataset.key(window, "content", "pixels"), alpha);
    for name in ["clip00.png", "moving.png"] {
        std::fs::remove_file(clips.join(name)).unwrap();
    }
    std::fs::remove_dir_all(clips.join("numbered")).unwrap();
    let Err(error) = Plan::make(&project.recipe(), &mut |_, _| {}) else { panic!("nothing was refused") };
    assert!(error.to_string().contains("finds no clip with an alpha channel"), "{error}");
}

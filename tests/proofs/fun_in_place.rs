//! Fun models of 5B: a first frame that is given stands beside the noise and, clean and at timestep 0, in its own place; a reference
//! picture's tokens in front have the timestep of the noisy frames.

use std::path::PathBuf;

use data::{Cursor, write_webp};
use kernels::{Device, Tensor};
use models::dit::control::{CAMERA, REFERENCE};
use models::dit::{BlockPlan, DitConfig, Role};
use models::expert::Networks;
use models::published::Kind;
use models::weights::{Weights, write_safetensors};
use proofs::film::drifting;
use proofs::project::Project;
use proofs::small::{adapters_on, each_kind, pipeline, tensors, trained, velocities};
use proofs::{Tolerance, assert_close, assert_same_bits, difference, fixture, randn};
use trainer::encode::conditions::camera::{Move, Pose};
use trainer::encode::conditions::given::CameraPath;
use trainer::encode::{LatentStore, LeftOut};
use trainer::pipeline::{MicroBatch, NetworkInput, Objective};
use trainer::plan::{Plan, Planned};
use trainer::sample::SampleConfig;
use trainer::train;
use trainer::train::batch::Batches;
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

use crate::control_training::{sampled, save};

const SIZE: [u32; 2] = [64, 64];
const CHANNELS: usize = 48;
const KINDS: [Kind; 3] = [Kind::FunInPlace, Kind::FunControlInPlace, Kind::FunCameraInPlace];
/// The VAE encodes the first frame alone or with what follows: sums of other lengths.
const ALONE: Tolerance = Tolerance::absolute(2e-5);

fn network(kind: Kind, layers: usize) -> DitConfig {
    each_kind(layers).into_iter().find(|dit| dit.kind == kind).unwrap()
}

fn lines(poses: &[Pose]) -> String {
    poses.iter().map(|pose| pose.map(|n| n.to_string()).join(" ") + "\n").collect()
}

/// A project of clips and of what accompanies them, for a tiny model of `kind`.
struct Desk {
    project: Project,
}

impl Desk {
    fn new(kind: Kind, rest: &str) -> Self {
        let parts = fixture("repo_diffusers_ti2v");
        let part = |name: &str| parts.join(name).display().to_string();
        let model = format!(
            "dit = \"dit.safetensors\"\ndit_config = \"config.json\"\nvae = \"{}\"\ntext_encoder = \"{}\"\ntokenizer = \"{}\"",
            part("vae"),
            part("text_encoder"),
            part("tokenizer"),
        );
        let data = match kind {
            Kind::FunControlInPlace => "control = \"control\"\nreferences = \"references\"\n",
            Kind::FunCameraInPlace => "cameras = \"cameras\"\n",
            _ => "",
        };
        let text = format!("stills = \"skip\"\n{data}{rest}");
        let desk = Self { project: Project::of_model(&model, SIZE, &["a ball", "two birds fly"], &text) };
        let all = tensors(&network(kind, 2));
        let views = all.iter().map(|(name, tensor)| (name.as_str(), tensor));
        write_safetensors(&desk.path("dit.safetensors"), views, &Default::default()).unwrap();
        let config = "{\"model_type\": \"ti2v\", \"num_heads\": 2, \"text_len\": 512, \"eps\": 1e-6}";
        std::fs::write(desk.path("config.json"), config).unwrap();
        for folder in ["control", "references", "cameras"] {
            std::fs::create_dir(desk.path(folder)).unwrap();
        }
        for index in 0..2 {
            let film = drifting(96 + 16 * index, 64 + 16 * index, 7);
            write_webp(&desk.path(&format!("control/clip{index:02}.webp")), &film, 16.0).unwrap();
            save(&drifting(80 + index, 60, 1), &desk.path(&format!("references/clip{index:02}.png")));
            let poses = desk.path(&format!("cameras/clip{index:02}.txt"));
            std::fs::write(poses, lines(&Move::Out.poses(7))).unwrap();
        }
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.project.root().join(name)
    }

    fn cached(&self) -> (Planned, LatentStore) {
        let planned = Plan::make(&self.project.recipe(), &mut |_, _| {}).unwrap();
        let encoded = train::cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
        (planned, encoded)
    }
}

/// From the same files training and sampling show the same: channels beside the noise, reference and camera, and the clean first
/// frame, whose tokens have timestep 0.
#[test]
fn a_given_first_frame_is_clean_in_training_as_in_sampling() {
    for kind in KINDS {
        let desk = Desk::new(kind, "");
        let (planned, mut encoded) = desk.cached();
        let (dataset, dit) = (&planned.dataset, &planned.dit);
        assert_eq!(dit.kind, kind);
        let clip = dataset.clips(0, &dataset.windows[..1]).unwrap().next().unwrap().unwrap();
        let first = desk.path("first.png");
        let frame = clip.frames().next().unwrap().to_vec();
        image::RgbImage::from_raw(SIZE[0], SIZE[1], frame).unwrap().save(&first).unwrap();
        let mut request = SampleConfig::default().request(dit.defaults(Networks::Whole), SIZE, 5, 1);
        request.image = Some(first);
        match kind {
            Kind::FunControlInPlace => {
                request.conditions.control = Some(desk.path("control/clip00.webp"));
                request.conditions.references = vec![desk.path("references/clip00.png")];
            }
            Kind::FunCameraInPlace => {
                // The poses of the frames that the window has of its file.
                let poses = Move::Out.poses(7);
                let own = dataset.source_frames(&dataset.windows[0]).into_iter().map(|frame| poses[frame]);
                std::fs::write(desk.path("asked.txt"), lines(&own.collect::<Vec<_>>())).unwrap();
                request.conditions.camera = Some(CameraPath::File(desk.path("asked.txt")));
            }
            _ => {}
        }
        request.check_pictures(dit).unwrap();
        let shown = sampled(&planned, &mut encoded, &request);
        let trained = encoded.shown_of_window(0, LeftOut::default()).unwrap();
        let beside = trained.beside_bcthw.as_ref().unwrap();
        assert_eq!(beside.dim(0).unwrap() + CHANNELS, dit.in_channels, "{kind:?}");
        assert_close("beside", beside, &shown.beside_bcthw.as_ref().unwrap().get(0).unwrap(), ALONE);
        for role in [REFERENCE, CAMERA] {
            let (own, other) = (trained.cond.get(role), shown.cond.get(role));
            assert_eq!(own.is_some(), other.is_some(), "{kind:?}: {role}");
            if let (Some(own), Some(other)) = (own, other) {
                assert_same_bits(role.name(), own, &other.get(0).unwrap());
            }
        }

        let batches = Batches::new(&planned.plan, dataset, &encoded).unwrap();
        let data = batches.step(0, Cursor::default(), 8).unwrap();
        let own = data.items.iter().position(|item| *item == dataset.sources[0].item.id).unwrap();
        let batch = &data.micro_batches[own];
        let (_, _, frames, height, width) = batch.input.x_bcthw.dims5().unwrap();
        let clean = batch
            .input
            .x_bcthw
            .narrow(1, 0, CHANNELS)
            .unwrap()
            .narrow(2, 0, 1)
            .unwrap()
            .contiguous()
            .unwrap();
        let latents = encoded.latents(0).unwrap().narrow(1, 0, 1).unwrap().contiguous().unwrap();
        assert_same_bits("first frame", &clean.squeeze(0).unwrap(), &latents);
        assert_close("first frame", &clean, shown.first_bcthw.as_ref().unwrap(), ALONE);
        let counts: Vec<f32> = batch.mask.as_ref().unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(counts, (0..frames).map(|frame| f32::from(u8::from(frame > 0))).collect::<Vec<_>>());

        let of_frame = (height / 2) * (width / 2);
        let time = (data.sigmas[own] * 1000.0) as f32;
        let expected: Vec<f32> =
            (0..frames * of_frame).map(|token| if token < of_frame { 0.0 } else { time }).collect();
        let times = batch.input.cond.require(Role::TIMESTEP).unwrap();
        assert_eq!(times.to_vec2::<f32>().unwrap(), [expected]);
    }
}

/// Without the frames that are given nothing is clean, and everything counts.
#[test]
fn a_first_frame_that_is_left_out_is_noisy() {
    let desk = Desk::new(Kind::FunControlInPlace, "[train]\ndrop = { start = 1.0 }\n");
    let (planned, encoded) = desk.cached();
    let batches = Batches::new(&planned.plan, &planned.dataset, &encoded).unwrap();
    let data = batches.step(0, Cursor::default(), 1).unwrap();
    let batch = &data.micro_batches[0];
    let beside = batch.input.x_bcthw.narrow(1, 2 * CHANNELS, 4 + CHANNELS).unwrap();
    assert_eq!(difference(&beside, &beside.zeros_like().unwrap()).0, 0.0, "mask and given frames");
    assert!(batch.mask.is_none());
    assert_eq!(batch.input.cond.require(Role::TIMESTEP).unwrap().dims(), [1]);
}

/// A tiny model of each kind trains, and makes a clip before and after.
#[test]
fn a_model_of_each_kind_trains_and_makes_clips() {
    for (kind, options) in [
        (Kind::FunInPlace, "--i references/clip00.png --ei references/clip01.png"),
        (Kind::FunControlInPlace, "--cv control/clip00.webp --ref references/clip00.png"),
        (Kind::FunCameraInPlace, "--i references/clip00.png --cam left"),
    ] {
        let rest = format!("[train]\nsteps = 2\n[sample]\nprompts = [\"a ball {options}\"]\nsteps = 2\n");
        let desk = Desk::new(kind, &rest);
        let mut planned = Plan::make(&desk.project.recipe(), &mut |_, _| {}).unwrap();
        let run = train::RunFolder::begin(&mut planned.plan).unwrap();
        train::train(&planned, &run, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
        let clips = walk(&desk.project.run().join("samples"));
        assert_eq!(
            clips.iter().filter(|path| path.extension().is_some_and(|end| end == "mp4")).count(),
            2,
            "{clips:?}"
        );
    }
}

fn walk(folder: &std::path::Path) -> Vec<PathBuf> {
    let entries = folder.read_dir().unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

/// Frames with timesteps of their own, behind a reference picture's tokens: where no token attends to another, each frame comes
/// out as it does when all have its timestep, and so do its gradients.
#[test]
fn frames_keep_their_own_timesteps_behind_a_reference() {
    let dit = network(Kind::FunControlInPlace, 2);
    let mut all = tensors(&dit);
    for (name, tensor) in &mut all {
        if name.contains("attn.o.") {
            *tensor = tensor.zeros_like().unwrap();
        }
    }
    let weights = Weights::from_tensors(all);
    let fed: Vec<_> = dit.adaptable_modules().into_iter().filter(|(name, ..)| name.contains("ffn")).collect();
    let adapters = adapters_on(fed, 2, 0.5);
    let whole = pipeline(&dit, &weights, &adapters, &[2]);
    let (frames, height, width) = (3, 4, 6);
    let of_frame = (height / 2) * (width / 2);
    let input = |times: &Tensor| {
        let x = randn("x", (1, dit.in_channels, frames, height, width));
        let text = randn("text", (1, 5, dit.text_dim));
        let mut input = NetworkInput::new(x, times.clone(), text);
        input.cond.insert(REFERENCE, randn("reference", (1, CHANNELS, height, width)));
        input
    };
    let of_each = |first: f32, rest: f32| {
        let values: Vec<f32> =
            (0..frames * of_frame).map(|token| if token < of_frame { first } else { rest }).collect();
        Tensor::from_vec(values, (1, frames * of_frame), &Device::Cpu).unwrap()
    };
    let one = |time: f32| Tensor::new(&[time], &Device::Cpu).unwrap();
    let inputs = [of_each(0.0, 700.0), one(0.0), one(700.0)].map(|times| input(&times));
    let [mixed, still, noisy] = <[Tensor; 3]>::try_from(velocities(&whole, &inputs)).unwrap();
    let part = |x: &Tensor, range: std::ops::Range<usize>| {
        x.narrow(2, range.start, range.len()).unwrap().contiguous().unwrap()
    };
    assert!(difference(&part(&still, 0..1), &part(&noisy, 0..1)).0 > 1e-3, "timesteps change nothing");
    let rows = Tolerance::absolute(1e-5);
    assert_close("first frame", &part(&mixed, 0..1), &part(&still, 0..1), rows);
    assert_close("other frames", &part(&mixed, 1..frames), &part(&noisy, 1..frames), rows);

    let batch = |input: &NetworkInput, counted: std::ops::Range<usize>| {
        let counts: Vec<f32> =
            (0..frames).map(|frame| f32::from(u8::from(counted.contains(&frame)))).collect();
        MicroBatch {
            input: input.clone(),
            target: randn("target", (1, CHANNELS, frames, height, width)),
            weights: vec![1.0],
            mask: Some(Tensor::from_vec(counts, (1, 1, frames, 1, 1), &Device::Cpu).unwrap()),
            objective: Objective::default(),
            dropout: None,
        }
    };
    for (counted, other) in [(0..1, &inputs[1]), (1..frames, &inputs[2])] {
        let of =
            |input: &NetworkInput| trained(&whole, &[batch(input, counted.clone())], BlockPlan::default()).1;
        let (own, expected) = (of(&inputs[0]), of(other));
        for (name, gradient) in &expected {
            assert_close(name, &own[name], gradient, Tolerance::relative(1e-4));
        }
        assert!(
            expected.values().any(|gradient| difference(gradient, &gradient.zeros_like().unwrap()).0 > 1e-4)
        );
    }
}

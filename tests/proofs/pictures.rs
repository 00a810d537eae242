//! Pictures: what a network is shown of them equals golden values, in sampling and in training, and the published
//! pipelines' runs are reproduced.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;

use data::Cursor;
use kernels::{DType, Device, Tensor};
use models::dit::{Conditioning, Role};
use models::expert::Expert;
use models::expert::Networks;
use models::published::Published;
use models::vae::{Tiling, Vae};
use models::weights::{Checkpoint, write_safetensors};
use proofs::project::Project;
use proofs::{
    Tolerance, assert_close, assert_same_bits, device, difference, fixture, fixture_json, fixture_tensors,
    residents,
};
use trainer::base::{DitFiles, ModelConfig, locate_dits};
use trainer::encode::prompt::ClipRequest;
use trainer::encode::{Encoding, GivenFrames, LatentStore, PictureInputs, condition, mask, with_mask};
use trainer::learning::NoiseRange;
use trainer::machine::precision::{Float, Processor, WeightFormat};
use trainer::pipeline::Pipeline;
use trainer::plan::{Plan, Planned};
use trainer::sample::{Prompted, Prompts, SampleConfig, Session};
use trainer::solver::Convention;
use trainer::train;
use trainer::train::batch::{Batches, StepData};
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

/// The bounds of the fixtures: latents after the last step, in f32 through two networks and the guidance; and encoding.
const RUN: Tolerance = Tolerance::absolute(2e-3);
const LATENTS: Tolerance = Tolerance::absolute(2e-5);
/// Latents of a picture of noise, up to 3.5. In f64 half an ulp of the pixels alone moves them by 1.4e-5; the CPU is off by
/// 1.5e-5, and a GPU, which sums each tap of a convolution in one go, by 4.6e-5.
const NOISE: Tolerance = Tolerance::absolute(1e-4);
/// Pixels in 0..1.
const VIDEO: Tolerance = Tolerance::absolute(1e-3);

fn vae(folder: &str) -> Vae {
    Vae::load(&fixture(folder), None, DType::F32, &device()).unwrap()
}

#[test]
fn the_condition_of_a_picture_equals_golden_values() {
    let golden = fixture_tensors("i2v_cond/cond.safetensors");
    let golden: HashMap<String, Tensor> =
        golden.into_iter().map(|(name, t)| (name, t.to_device(&Device::Cpu).unwrap())).collect();
    let vae = {
        let config = fixture("vae21/config.json");
        Vae::load(&fixture("repo_official_a14b/Wan2.1_VAE.pth"), Some(&config), DType::F32, &device())
            .unwrap()
    };
    let picture = golden["image"].get(0).unwrap();
    let latents = condition(&vae, &picture, None, 9).unwrap();
    assert_close("latents", &latents, &golden["cond_latents"].get(0).unwrap(), LATENTS);
    assert_close(
        "y",
        &with_mask(&latents, GivenFrames::First).unwrap(),
        &golden["y"].get(0).unwrap(),
        LATENTS,
    );
    for (ends, name) in [(GivenFrames::First, "mask"), (GivenFrames::Both, "mask_first_last")] {
        assert_same_bits(name, &mask(ends, (3, 6, 4)).unwrap(), &golden[name].get(0).unwrap());
    }
    // A last picture changes the last latent frame, and a first one alone leaves it as it is.
    let last = (&picture * -0.5).unwrap();
    let both = condition(&vae, &picture, Some(&last), 9).unwrap();
    let frame = |x: &Tensor, n: usize| x.narrow(1, n, 1).unwrap();
    assert_close("first frame", &frame(&both, 0), &frame(&latents, 0), LATENTS);
    assert!(difference(&frame(&both, 2), &frame(&latents, 2)).0 > 1e-2);
}

/// The pipeline of one DiT on the proofs' device.
fn pipeline(files: &DitFiles) -> Pipeline {
    let (config, weights) = files.open().unwrap();
    let layers = config.layers;
    let split = [(device(), 0..layers)];
    Pipeline::load(&weights, &config, &split, &Default::default(), models::dit::Base::F32).unwrap()
}

/// The request of the golden run `e2e/<name>`, and its result.
fn asked(name: &str, config: &models::dit::DitConfig) -> (HashMap<String, Tensor>, ClipRequest) {
    let (golden, settings) =
        (fixture_tensors(&format!("e2e/{name}.safetensors")), fixture_json(&format!("e2e/{name}.json")));
    let number = |key: &str| settings[key].as_f64();
    let text = |key: &str| settings[key].as_str().unwrap().to_owned();
    let guidance = number("guidance_scale");
    let sample = SampleConfig {
        negative: text("negative_prompt"),
        steps: number("num_inference_steps").map(|steps| steps as usize),
        guidance: number("guidance_scale_2").or(guidance),
        guidance_high: guidance,
        shift: number("flow_shift"),
        convention: Convention::Diffusers,
        ..SampleConfig::default()
    };
    let size = ["width", "height"].map(|key| number(key).unwrap() as u32);
    let frames = number("num_frames").unwrap() as u32;
    let request = sample.request(config.defaults(Networks::Whole), size, frames, 1);
    (golden, ClipRequest { prompt: text("prompt"), ..request })
}

/// The same with the texts and the noise that it was made from.
fn golden_run(name: &str, config: &models::dit::DitConfig) -> (HashMap<String, Tensor>, Prompted) {
    let (golden, request) = asked(name, config);
    let prompted = Prompted {
        request,
        positive: Conditioning::new().with(Role::TEXT, golden["prompt_embeds"].clone()),
        negative: Conditioning::new().with(Role::TEXT, golden["negative_prompt_embeds"].clone()),
        noise_bcthw: golden["latents_init"].clone(),
        shown: PictureInputs::default(),
    };
    (golden, prompted)
}

/// Makes the steps of `clips` that are in each share, and holds them to the golden latents of every step; `frames` says
/// from which latent frame on.
fn follow(
    golden: &Tensor,
    clip: Prompted,
    networks: &[(NoiseRange, &DitFiles)],
    from_frame: usize,
) -> Tensor {
    let clips = [clip];
    let mut session = Session::new(&clips).unwrap();
    for (share, files) in networks {
        let pipeline = pipeline(files);
        for _ in 0..session.steps_of(*share) {
            // One step, then a look.
            let _stopped =
                session.run(std::slice::from_ref(&pipeline), *share, |_| ControlFlow::Break(())).unwrap();
            let step = golden.get(session.made()[0] - 1).unwrap();
            let rest = |x: &Tensor| x.narrow(2, from_frame, x.dim(2).unwrap() - from_frame).unwrap();
            assert_close("latents of a step", &rest(&session.latents()[0]), &rest(&step), RUN);
        }
    }
    assert_eq!(session.made()[0], golden.dim(0).unwrap(), "steps that no network made");
    session.latents()[0].clone()
}

fn assert_video(golden: &HashMap<String, Tensor>, vae: &Vae, latents: &Tensor) {
    let video = vae.decode(latents, Tiling::Off).unwrap().affine(0.5, 0.5).unwrap();
    let video = video.permute((0, 2, 1, 3, 4)).unwrap();
    assert_close("video", &video, &golden["video_0_1_TCHW"], VIDEO);
}

#[test]
fn image_to_video_reproduces_the_published_run() {
    let dits = locate_dits(&fixture("repo_diffusers_i2v21")).unwrap();
    let files = dits.of(Expert::High);
    let (golden, mut clip) = golden_run("i2v21", &files.open().unwrap().0);
    clip.shown.beside_bcthw = Some(golden["y"].clone());
    clip.shown.cond.insert(Role::PICTURE, golden["image_embeds"].clone());
    let latents = follow(&golden["latents_per_step"], clip, &[(NoiseRange::All, files)], 0);
    assert_close("final", &latents, &golden["latents_final"], RUN);
    assert_video(&golden, &vae("repo_diffusers_i2v21/vae"), &latents);
}

/// diffusers puts the picture back at the end alone, so the first frame of its latents in between is another.
#[test]
fn a_picture_in_place_reproduces_the_published_run() {
    let dits = locate_dits(&fixture("repo_diffusers_ti2v")).unwrap();
    let files = dits.of(Expert::High);
    let (golden, mut clip) = golden_run("ti2v_image", &files.open().unwrap().0);
    let vae = vae("repo_diffusers_ti2v/vae");
    let picture = golden["image_0_1"].affine(2.0, -1.0).unwrap().unsqueeze(1).unwrap().unsqueeze(0).unwrap();
    let first = vae.encode(&picture, Tiling::Off).unwrap();
    assert_close("picture", &first, &golden["first_frame_latent"], NOISE);
    clip.shown.first_bcthw = Some(first);
    let latents = follow(&golden["latents_per_step"], clip, &[(NoiseRange::All, files)], 1);
    assert_close("final", &latents, &golden["latents_final"], RUN);
    assert_video(&golden, &vae, &latents);
}

/// Two experts, each with a guidance of its own, and one history of the solver over both.
#[test]
fn two_experts_reproduce_the_published_run() {
    for folder in ["repo_diffusers_a14b", "repo_official_a14b"] {
        let dits = locate_dits(&fixture(folder)).unwrap();
        let (high, low) = dits.experts().unwrap();
        let (golden, clip) = golden_run("t2v_a14b", &high.open().unwrap().0);
        let share = |expert| NoiseRange::Of { expert, boundary: 0.875 };
        let networks = [(share(Expert::High), high), (share(Expert::Low), low)];
        let latents = follow(&golden["latents_per_step"], clip, &networks, 0);
        assert_close("final", &latents, &golden["latents_final"], RUN);
    }
}

/// Two experts that take a picture, with no golden value on the way in: texts, picture and boundary come through our own
/// code. The third step is at 0.882, which the boundary of the text-to-video models would give to the other expert.
#[test]
fn two_experts_reproduce_the_published_run_from_a_picture() {
    let parts = |name: &str| Some(fixture("repo_diffusers_i2v21").join(name));
    let named = ModelConfig {
        folder: Some(fixture("repo_diffusers_i2v_a14b")),
        vae: parts("vae"),
        text_encoder: parts("text_encoder"),
        tokenizer: parts("tokenizer"),
        text_base: Some(WeightFormat::F32),
        vae_base: Some(Float::Float32),
        ..ModelConfig::default()
    };
    let (desk, device) = (tempfile::tempdir().unwrap(), device());
    let model = named.settle("".as_ref(), Processor::of(&device)).unwrap();
    let dit = model.dits.of(Expert::High).open().unwrap().0;
    let (golden, mut request) = asked("i2v_a14b", &dit);
    let file = desk.path().join("first.png");
    save_picture(&golden["image_u8_chw"], &file);
    request.image = Some(file);

    let (ui, interrupt) = (Ui::new(Voice::Json), Interrupt::default());
    let mut residents = residents(&model, &dit, device, &ui);
    let mut with = Encoding { residents: &mut residents, interrupt: &interrupt };
    let mut encoded = LatentStore::open(&desk.path().join("cache"), &model).unwrap();
    encoded.encode_prompts([request.prompt.as_str(), request.negative.as_str()], &mut with).unwrap();
    encoded.encode_pictures(std::slice::from_ref(&request), &mut with).unwrap();
    let clip = Prompted::new(&request, golden["latents_init"].clone(), &encoded, &dit).unwrap();
    assert_close("y", clip.shown.beside_bcthw.as_ref().unwrap(), &golden["y"], LATENTS);
    assert!(clip.shown.cond.get(Role::PICTURE).is_none(), "CLIP's states for a model without CLIP");

    let networks =
        Expert::ALL.map(|expert| (model.noise_range_of(Some(expert), &dit), model.dits.of(expert)));
    let latents = follow(&golden["latents_per_step"], clip, &networks, 0);
    assert_close("final", &latents, &golden["latents_final"], RUN);
    assert_video(&golden, &residents.vae().unwrap(), &latents);
}

/// Writes a picture [3, h, w] of bytes.
fn save_picture(picture: &Tensor, file: &std::path::Path) {
    let (_, height, width) = picture.dims3().unwrap();
    let pixels = picture.to_device(&Device::Cpu).unwrap().permute((1, 2, 0)).unwrap();
    let pixels: Vec<u8> = pixels.flatten_all().unwrap().to_vec1().unwrap();
    image::RgbImage::from_raw(width as u32, height as u32, pixels).unwrap().save(file).unwrap();
}

/// A project that is cached.
struct Ready {
    project: Project,
    planned: Planned,
    encoded: LatentStore,
}

fn ready(model: &str, size: [u32; 2], settings: &str) -> Ready {
    let captions = ["a ball", "two birds fly", "a fox"];
    let project = Project::of_folder(&fixture(model), size, &captions, settings);
    let planned = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    let encoded = train::cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    Ready { project, planned, encoded }
}

impl Ready {
    fn step(&self, seed: u64, batch: usize, accumulate: usize) -> StepData {
        let mut plan = self.planned.plan.clone();
        (plan.run.seed, plan.train.batch) = (seed, batch);
        let batches = Batches::new(&plan, &self.planned.dataset, &self.encoded).unwrap();
        batches.step(0, Cursor::default(), accumulate).unwrap()
    }
}

/// An image-to-video model is trained on exactly what it is shown of a clip's first frame when it samples from that frame.
#[test]
fn training_shows_the_first_frame_as_sampling_does() {
    let mut ready = ready("repo_diffusers_i2v21", [64, 48], "");
    let dataset = &ready.planned.dataset;
    let clip = dataset.clips(0, &dataset.windows[..1]).unwrap().next().unwrap().unwrap();
    let file = ready.project.root().join("first.png");
    let frame = clip.frames().next().unwrap().to_vec();
    image::RgbImage::from_raw(64, 48, frame).unwrap().save(&file).unwrap();
    let dit = &ready.planned.dit;
    let mut request = SampleConfig::default().request(dit.defaults(Networks::Whole), [64, 48], 5, 1);
    request.image = Some(file);
    let (device, ui, interrupt) = (device(), Ui::new(Voice::Json), Interrupt::default());
    let model = &ready.planned.plan.model;
    let mut residents = residents(model, dit, device, &ui);
    let mut with = Encoding { residents: &mut residents, interrupt: &interrupt };
    ready.encoded.encode_pictures(std::slice::from_ref(&request), &mut with).unwrap();
    let sampled = ready.encoded.shown(&request, dit).unwrap();
    let trained = ready.encoded.ends(0).unwrap();
    let one = |x: &Option<Tensor>| x.as_ref().unwrap().clone();
    assert_same_bits(
        "mask and latents",
        &one(&trained.beside_bcthw),
        &one(&sampled.beside_bcthw).get(0).unwrap(),
    );
    let states = |shown: &PictureInputs| shown.cond.require(Role::PICTURE).unwrap().clone();
    assert_same_bits("CLIP's states", &states(&trained), &states(&sampled).get(0).unwrap());

    // They are the network's input after the noisy channels, each clip its own.
    let data = ready.step(0, 3, 1);
    let input = &data.micro_batches[0].input;
    let id = |name: &str| ready.planned.dataset.sources.iter().position(|s| s.item.id == name).unwrap();
    for (i, item) in data.items.iter().enumerate() {
        let ends = ready.encoded.ends(id(item)).unwrap();
        let shown = input.x_bcthw.get(i).unwrap().narrow(0, 16, 20).unwrap();
        assert_same_bits("shown", &shown, &one(&ends.beside_bcthw));
        let given = input.cond.require(Role::PICTURE).unwrap().get(i).unwrap();
        assert_same_bits("states", &given, &states(&ends));
    }
    assert_eq!(data.micro_batches[0].target.dims(), [3, 16, 2, 6, 8]);
}

/// A model that goes from a first frame to a last one is trained on both: CLIP sees them one behind the other, and the
/// mask names the last frame too.
#[test]
fn a_model_of_two_pictures_is_trained_on_both_ends() {
    let desk = tempfile::tempdir().unwrap();
    let (from, model) = (fixture("repo_diffusers_i2v21"), desk.path().join("flf2v"));
    for part in ["vae", "text_encoder", "tokenizer", "image_encoder"] {
        let there = model.join(part);
        std::fs::create_dir_all(&there).unwrap();
        for file in std::fs::read_dir(from.join(part)).unwrap().map(Result::unwrap) {
            std::fs::copy(file.path(), there.join(file.file_name())).unwrap();
        }
    }
    std::fs::create_dir(model.join("transformer")).unwrap();
    for file in ["model_index.json", "transformer/config.json"] {
        std::fs::copy(from.join(file), model.join(file)).unwrap();
    }
    let shards = Checkpoint::open(&from.join("transformer")).unwrap();
    let read = |name: &str| shards.tensor(name, DType::F32, &Device::Cpu).unwrap();
    let mut tensors: BTreeMap<String, Tensor> =
        shards.names().map(|name| (name.to_owned(), read(name))).collect();
    let positions = proofs::randn("positions", (1, 514, 20)).to_device(&Device::Cpu).unwrap();
    tensors.insert("condition_embedder.image_embedder.pos_embed".into(), positions);
    let views = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    write_safetensors(&model.join("transformer/model.safetensors"), views, &BTreeMap::new()).unwrap();

    let project = Project::of_folder(&model, [64, 48], &["a ball", "two birds fly"], "");
    let planned = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap();
    let encoded = train::cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    let PictureInputs { beside_bcthw, cond, .. } = encoded.ends(0).unwrap();
    let (beside, states) = (beside_bcthw.unwrap(), cond.require(Role::PICTURE).unwrap());
    assert_same_bits("mask", &beside.narrow(0, 0, 4).unwrap(), &mask(GivenFrames::Both, (2, 6, 8)).unwrap());
    assert_eq!(states.dims(), [514, 20]);
    let half = |n: usize| states.narrow(0, 257 * n, 257).unwrap();
    assert!(difference(&half(0), &half(1)).0 > 1e-3, "the last frame is the first one");
    let data = Batches::new(&planned.plan, &planned.dataset, &encoded)
        .unwrap()
        .step(0, Cursor::default(), 1)
        .unwrap();
    let files = locate_dits(&model).unwrap();
    let losses =
        proofs::small::trained(&pipeline(files.of(Expert::High)), &data.micro_batches, Default::default()).0;
    assert!(losses[0].is_finite());
    let told =
        SampleConfig { prompts: Prompts::Listed(vec!["a ball --i a.png".into()]), ..SampleConfig::default() };
    let defaults = planned.dit.defaults(Networks::Whole);
    let base = told.request(defaults, [64, 48], 5, 1);
    let error = told.requests(&base, "".as_ref(), &planned.dit, defaults).unwrap_err().to_string();
    assert!(error.contains("--ei behind a prompt"), "{error}");
}

/// TI2V-5B learns with and without a picture, drawn sample by sample: with one the first frame is clean, its tokens are at
/// timestep 0 and it is left out of the loss; without one nothing is. Every sample counts alike.
#[test]
fn a_share_of_the_samples_is_shown_its_first_frame() {
    let ready =
        ready("repo_diffusers_ti2v", [64, 32], "[train]\npicture_share = 0.5\ncaption_dropout = 0.0\n");
    assert_eq!(ready.planned.plan.data.fps, Some(24.0));
    let (mut given, mut free) = (0, 0);
    for seed in 0..12 {
        let data = ready.step(seed, 1, 3);
        for (i, micro_batch) in data.micro_batches.iter().enumerate() {
            let window =
                ready.planned.dataset.sources.iter().position(|s| s.item.id == data.items[i]).unwrap();
            let x0 = ready.encoded.latents(window).unwrap().unsqueeze(0).unwrap();
            let first = |x: &Tensor| x.narrow(2, 0, 1).unwrap();
            let (x, time) = (&micro_batch.input.x_bcthw, (data.sigmas[i] * 1000.0) as f32);
            let timestep = micro_batch.input.cond.require(Role::TIMESTEP).unwrap();
            let rest = |x: &Tensor| x.narrow(2, 1, 1).unwrap();
            assert!(difference(&rest(x), &rest(&x0)).0 > 1e-3, "the second frame is not noisy");
            match micro_batch.mask.as_ref().map(|mask| mask.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            {
                Some(mask) => {
                    given += 1;
                    assert_eq!(mask, [0.0, 1.0]);
                    assert_same_bits("first frame", &first(x), &first(&x0));
                    // Two tokens of each of two latent frames.
                    let times: Vec<Vec<f32>> = timestep.to_vec2().unwrap();
                    assert_eq!(times, [[0.0, 0.0, time, time]]);
                }
                None => {
                    free += 1;
                    assert!(difference(&first(x), &first(&x0)).0 > 1e-3);
                    assert_eq!(timestep.to_vec1::<f32>().unwrap(), [time]);
                }
            }
        }
    }
    // 36 draws of a half: less than 8 of either have a chance of 1 in 4000.
    assert!(given >= 8 && free >= 8, "{given} with a picture, {free} without");
    // Seeds whose order is the same in batches of three, which are shuffled once less.
    let mixed = (0..60).map(|seed| (ready.step(seed, 3, 1), ready.step(seed, 1, 3)));
    let mixed = mixed.filter(|(whole, singles)| {
        let masks = singles.micro_batches.iter().filter(|batch| batch.mask.is_some()).count();
        whole.items == singles.items && (1..3).contains(&masks)
    });
    let files = locate_dits(&fixture("repo_diffusers_ti2v")).unwrap();
    let pipeline = pipeline(files.of(Expert::High));
    let mut compared = 0;
    for (whole, singles) in mixed {
        let loss =
            |data: &StepData| proofs::small::trained(&pipeline, &data.micro_batches, Default::default()).0;
        let (whole, singles): (f32, f32) = (loss(&whole).iter().sum(), loss(&singles).iter().sum());
        // The same f32 sums in another order.
        assert!((whole / singles - 1.0).abs() < 1e-5, "{whole} in one batch, {singles} in three");
        compared += 1;
    }
    assert!(compared > 0, "no step mixed samples with and without a picture");
}

#[test]
fn pictures_that_do_not_fit_the_model_are_refused_by_name() {
    let refused = |model: &str, size, settings: &str| {
        let project = Project::of_folder(&fixture(model), size, &["a ball"], settings);
        Plan::make(&project.recipe(), &mut |_, _| {}).unwrap_err().to_string()
    };
    let sample = |prompt: &str| format!("[sample]\nprompts = [\"{prompt}\"]\n");
    let told = refused("repo_diffusers_i2v21", [64, 48], &sample("a ball"));
    assert!(told.contains("--i behind a prompt"), "{told}");
    let told = refused("repo_diffusers_ti2v", [64, 32], &sample("a ball --i a.png --ei b.png"));
    assert!(told.contains("leave the last one out"), "{told}");
    let told = refused("repo_diffusers_i2v21", [64, 48], "[train]\npicture_share = 0.3\n");
    assert!(told.contains("train.picture_share") && told.contains("TI2V-5B"), "{told}");
    let told = refused("repo_diffusers_ti2v", [48, 32], "");
    assert!(told.contains("multiples of 32"), "{told}");
    let vae = fixture("repo_official_a14b/Wan2.1_VAE.pth").display().to_string();
    let project = Project::of_folder(&fixture("repo_diffusers_ti2v"), [64, 32], &["a ball"], "");
    let text = std::fs::read_to_string(project.recipe()).unwrap();
    std::fs::write(project.recipe(), text.replace("[model]\n", &format!("[model]\nvae = \"{vae}\"\n")))
        .unwrap();
    let told = Plan::make(&project.recipe(), &mut |_, _| {}).unwrap_err().to_string();
    assert!(told.contains("model.vae") && told.contains("Wan2.2_VAE"), "{told}");
}

/// Sizes of clips from a picture's aspect, as the published code works them out: multiples of 16 (32), about the area.
#[test]
fn a_picture_sets_the_size_of_its_clip() {
    let preset = |name: &str| Published::named(name).unwrap().defaults();
    let (wan21, ti2v) = (preset("i2v-14b"), preset("ti2v-5b"));
    assert_eq!(wan21.size_for(832, 480), [832, 480]);
    assert_eq!(wan21.size_for(1920, 1080), [832, 464]);
    assert_eq!(wan21.size_for(1000, 1000), [624, 624]);
    assert_eq!(ti2v.size_for(1280, 704), [1280, 704]);
    assert_eq!(ti2v.size_for(704, 1280), [704, 1280]);
}

//! S2V from clips with their own sound to micro-batches, and from a request to a clip in pieces: each frame is heard at its own time, what is
//! left out is what stands beside the negative prompt, and a piece continues the one before as the official loop has it.

use std::path::{Path, PathBuf};

use data::{Cursor, write_wav, write_webp};
use kernels::ledger::Ledger;
use kernels::{DType, Device, Tensor};
use models::dit::animate::POSE;
use models::dit::control::REFERENCE;
use models::dit::speech::{AUDIO, PAST};
use models::dit::{Architecture, Role};
use models::expert::Networks;
use models::published::Kind;
use models::vae::Tiling;
use models::wav2vec::{SpeechEncoder, SpeechSizes};
use models::weights::{TensorSpec, write_safetensors};
use proofs::film::drifting;
use proofs::project::Project;
use proofs::small::{adapters, each_kind, pipeline, random, tensors, trained};
use proofs::sound::tone;
use proofs::{Tolerance, assert_close, assert_same_bits, device, difference, fixture, residents};
use trainer::encode::conditions::latents;
use trainer::encode::conditions::speech::{at_middle_rate, of_frames, pose_latents};
use trainer::encode::prompt::ClipRequest;
use trainer::encode::{Encoding, LatentStore, LeftOut};
use trainer::plan::{Plan, Planned, bytes_to_listen};
use trainer::sample::{self, Course, Prompted, SampleConfig, starting_noise};
use trainer::train;
use trainer::train::batch::Batches;
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

use crate::control_training::save;

const SIZE: [u32; 2] = [64, 64];
const BLOCKS: usize = 3;
const RATE: f64 = 16.0;

/// A project of clips with a sound beside each, and a tiny S2V with a tiny speech encoder.
struct Desk {
    project: Project,
}

/// The sizes of a speech encoder whose states the tiny network reads.
fn encoder_sizes() -> SpeechSizes {
    let convolutions = SpeechSizes::published().convolutions;
    SpeechSizes {
        convolutions: convolutions.into_iter().map(|(_, taps, stride)| (4, taps, stride)).collect(),
        width: 6,
        inner: 10,
        layers: 3,
        heads: 2,
        taps: 8,
        groups: 2,
    }
}

fn write(path: &Path, tensors: impl Iterator<Item = (String, Tensor)>) {
    let all: Vec<(String, Tensor)> = tensors.collect();
    let views = all.iter().map(|(name, tensor)| (name.as_str(), tensor));
    write_safetensors(path, views, &Default::default()).unwrap();
}

impl Desk {
    /// `data` are lines of `[data]`, `rest` what is behind it.
    fn new(data: &str, rest: &str) -> Self {
        let parts = fixture("repo_diffusers_i2v21");
        let part = |name: &str| parts.join(name).display().to_string();
        let model = format!(
            "dit = \"s2v.safetensors\"\ndit_config = \"config.json\"\nspeech_encoder = \"ears\"\nvae = \"{}\"\ntext_encoder = \"{}\"\n\
             tokenizer = \"{}\"",
            part("vae"),
            part("text_encoder"),
            part("tokenizer"),
        );
        let text = format!("stills = \"skip\"\n{data}\n{rest}");
        let project = Project::of_model(&model, SIZE, &["a woman sings", "a man speaks"], &text);
        let root = project.root().to_owned();
        let dit = each_kind(BLOCKS).into_iter().find(|dit| dit.kind == Kind::Speech).unwrap();
        write(&root.join("s2v.safetensors"), tensors(&dit).into_iter());
        let config = "{\"model_type\": \"s2v\", \"num_heads\": 2, \"text_len\": 512, \"eps\": 1e-6, \"audio_inject_layers\": [0]}";
        std::fs::write(root.join("config.json"), config).unwrap();
        std::fs::create_dir(root.join("ears")).unwrap();
        let named = |spec: TensorSpec| TensorSpec::new(format!("wav2vec2.{}", spec.name), spec.shape);
        let specs: Vec<TensorSpec> = encoder_sizes().tensors().into_iter().map(named).collect();
        write(&root.join("ears/model.safetensors"), random(&specs).into_iter());
        std::fs::write(root.join("ears/config.json"), "{\"num_attention_heads\": 2}").unwrap();
        let desk = Self { project };
        for index in 0..2 {
            desk.write_sound(&format!("clips/clip{index:02}.wav"), 0.5);
            let (width, height) = (48 + 8 * index, 32 + 8 * index);
            std::fs::create_dir_all(root.join("control")).unwrap();
            let poses = drifting(width * 2, height * 2, 7);
            write_webp(&root.join(format!("control/clip{index:02}.webp")), &poses, RATE).unwrap();
        }
        save(&drifting(80, 60, 1), &root.join("speaker.png"));
        desk.write_sound("song.wav", 1.0);
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.project.root().join(name)
    }

    /// A chord that changes from frame to frame.
    fn write_sound(&self, name: &str, seconds: f64) {
        let count = (seconds * 16_000.0) as usize;
        let low = tone(110.0, 16_000, count, 0.4);
        let samples: Vec<f32> = low
            .iter()
            .enumerate()
            .map(|(n, x)| x * (n as f32 / 900.0).sin() + 0.1 * (n as f32 / 7.0).cos())
            .collect();
        write_wav(&self.path(name), &[&samples], 16_000).unwrap();
    }

    fn plan(&self) -> trainer::Result<Planned> {
        Plan::make(&self.project.recipe(), &mut |_, _| {})
    }

    fn cached(&self) -> (Planned, LatentStore) {
        let planned = self.plan().unwrap();
        let encoded = train::cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
        (planned, encoded)
    }

    /// The states [l, c, count] of the frames from number `start` on of the sound in a file.
    fn states(&self, name: &str, frames: (usize, usize)) -> Tensor {
        let encoder = SpeechEncoder::load(&self.path("ears"), None, &Device::Cpu).unwrap();
        let states = encoder.encode(&data::read_speech(&self.path(name)).unwrap()).unwrap();
        of_frames(&at_middle_rate(&states).unwrap(), frames, RATE).unwrap()
    }

    fn request(&self, planned: &Planned, line: &str) -> trainer::Result<ClipRequest> {
        let base = SampleConfig::default().request(planned.dit.defaults(Networks::Whole), SIZE, 5, 1);
        let request = base.with_line(line, self.project.root())?;
        request.check_pictures(&planned.dit)?;
        request.settled(&planned.dit)
    }
}

/// Of a clip the first frame is the reference, and those behind it are learnt, each with the sound at its own time: also of a window that
/// begins later.
#[test]
fn each_frame_is_learnt_with_the_sound_at_its_time() {
    let desk = Desk::new("control = \"control\"\nextract = \"sliding\"\nstride = 1", "");
    let (planned, encoded) = desk.cached();
    let windows = &planned.dataset.windows;
    assert!(windows.iter().any(|window| window.start == 2), "{windows:?}");
    for (index, window) in windows.iter().enumerate().filter(|(_, window)| window.source == 0) {
        let shown = encoded.shown_of_window(index, LeftOut::default()).unwrap();
        let all = encoded.latents(index).unwrap();
        assert_eq!(all.dims(), [16, 2, 8, 8]);
        assert_same_bits(
            "learnt",
            &encoded.learnt(index).unwrap(),
            &all.narrow(1, 1, 1).unwrap().contiguous().unwrap(),
        );
        let reference = all.narrow(1, 0, 1).unwrap().squeeze(1).unwrap().contiguous().unwrap();
        assert_same_bits("reference", shown.cond.require(REFERENCE).unwrap(), &reference);
        let states = desk.states("clips/clip00.wav", (window.start + 1, 4));
        assert_same_bits("heard", shown.cond.require(AUDIO).unwrap(), &states);
        assert!(difference(&states, &states.zeros_like().unwrap()).0 > 0.1);
        // Shapes are those that the forecast counts.
        for (role, shape) in Architecture::conditioning(&planned.dit, (1, 8, 8)).iter() {
            if role != Role::TEXT {
                assert_eq!(shown.cond.require(role).unwrap().dims(), shape.as_slice(), "{role}");
            }
        }
        let left_out = LeftOut { audio: true, control: true, ..LeftOut::default() };
        let nothing = encoded.shown_of_window(index, left_out).unwrap();
        for role in [AUDIO, POSE] {
            let (there, gone) = (shown.cond.require(role).unwrap(), nothing.cond.require(role).unwrap());
            assert_same_bits("left out", gone, &there.zeros_like().unwrap());
        }
    }
    // The poses of the frames that are learnt.
    let (ui, dataset) = (Ui::new(Voice::Json), &planned.dataset);
    let vae = residents(&planned.plan.model, &planned.dit, device(), &ui).vae().unwrap();
    let which = data::Accompanying::Control;
    let clip = dataset.companion_clips(0, which, &windows[..1]).unwrap().unwrap().next().unwrap().unwrap();
    let pixels = Tensor::from_vec(clip.planes(), (1, 3, 5, 64, 64), &Device::Cpu).unwrap();
    let poses = pose_latents(&vae, &pixels.narrow(2, 1, 4).unwrap().contiguous().unwrap()).unwrap();
    let shown = encoded.shown_of_window(0, LeftOut::default()).unwrap();
    assert_same_bits("poses", shown.cond.require(POSE).unwrap(), &poses.squeeze(0).unwrap());
}

/// The plan tells what listening takes of host memory: to the byte what the encoder takes, weights and all.
#[test]
fn the_plan_tells_what_listening_takes() {
    let ledger = Ledger::new(1);
    let encoder = SpeechEncoder::seeded(encoder_sizes(), 0, &Device::counted_cpu(ledger.clone())).unwrap();
    drop(encoder.encode(&tone(110.0, 16_000, 8_000, 0.4)).unwrap());
    assert_eq!(bytes_to_listen(encoder_sizes(), 0.5).unwrap(), ledger.peak());
    let published = bytes_to_listen(SpeechSizes::published(), 5.0).unwrap() as f64 / f64::from(1 << 30);
    assert!((1.2..2.0).contains(&published), "{published} GiB for five seconds: the weights are 1.17");
    let planned = Plan::make(&Desk::new("", "").project.recipe(), &mut |_, _| {}).unwrap();
    let told =
        planned.notes.iter().filter(|note| note.contains("speech encoder runs on the processor")).count();
    assert_eq!(told, 1, "{:?}", planned.notes);
}

/// Micro-batches from clips have the same loss and the same gradients on one stage and on two, and the sound is left out of its share.
#[test]
fn micro_batches_from_clips_train_alike_on_one_stage_and_two() {
    let desk = Desk::new("", "[train]\ndrop = { audio = 0.5 }");
    let (planned, encoded) = desk.cached();
    let batches = Batches::new(&planned.plan, &planned.dataset, &encoded).unwrap();
    let all = batches.step(0, Cursor::default(), 100).unwrap().micro_batches;
    let is_silent = |x: &Tensor| difference(x, &x.zeros_like().unwrap()).0 == 0.0;
    let silent = all.iter().filter(|batch| is_silent(batch.input.cond.require(AUDIO).unwrap())).count();
    assert!((35..=65).contains(&silent), "{silent} of 100 are without sound, not a half");
    assert_eq!(all[0].target.dims(), [1, 16, 1, 8, 8]);
    let (_, weights) = planned.plan.model.open_dit().unwrap();
    let own = adapters(&planned.dit, 2, 1.0);
    let on = |split: &[usize]| {
        let stages = pipeline(&planned.dit, &weights, &own, split);
        trained(&stages, &all[..3], models::dit::BlockPlan::default())
    };
    let (one, two) = (on(&[BLOCKS]), on(&[1, 2]));
    assert_eq!(one.0, two.0);
    assert!(one.0.iter().all(|loss| loss.is_finite() && *loss > 0.0));
    for (name, gradient) in &one.1 {
        assert_same_bits(name, &two.1[name], gradient);
    }
    assert!(one.1.keys().any(|name| name.contains("audio_injector")), "{:?}", one.1.keys());
}

/// A request hears its file from the first frame on, and nothing beside the negative prompt; its picture is the reference.
#[test]
fn a_clip_hears_its_file_and_sees_its_speaker() {
    let desk = Desk::new("", "");
    let (planned, mut encoded) = desk.cached();
    let request = desk.request(&planned, "she sings --f 5 --au song.wav --ref speaker.png").unwrap();
    assert_eq!((request.latents(&planned.dit), request.pieces(&planned.dit)), ((2, 8, 8), 1));
    let (ui, interrupt) = (Ui::new(Voice::Json), Interrupt::default());
    let mut residents = residents(&planned.plan.model, &planned.dit, device(), &ui);
    let mut with = Encoding { residents: &mut residents, interrupt: &interrupt };
    encoded.encode_pictures(std::slice::from_ref(&request), &mut with).unwrap();
    let shown = encoded.shown_of(&request, &planned.dit).unwrap();
    let audio = shown.cond.require(AUDIO).unwrap();
    assert_same_bits("heard", &audio.squeeze(0).unwrap(), &desk.states("song.wav", (0, 8)));
    assert_same_bits("silence", shown.negative.require(AUDIO).unwrap(), &audio.zeros_like().unwrap());
    assert_eq!(shown.cond.require(POSE).unwrap().dims(), [1, 16, 2, 8, 8]);
    assert!(shown.later.is_empty() && shown.cond.get(PAST).is_none());
    let vae = residents.vae().unwrap();
    let picture = data::Picture::open(&desk.path("speaker.png")).unwrap().covering(64, 64).unwrap();
    let pixels = Tensor::from_vec(picture.planes(), (1, 3, 1, 64, 64), &Device::Cpu).unwrap();
    let reference = latents(&vae, &pixels).unwrap().squeeze(2).unwrap();
    assert_same_bits("reference", shown.cond.require(REFERENCE).unwrap(), &reference);
    // As long as the audio: 16 frames are heard, and 13 of them shown.
    let whole = desk.request(&planned, "she sings --f 0 --au song.wav --ref speaker.png").unwrap();
    assert_eq!(whole.frames, 13);
}

/// The second of two pieces, made here by hand: behind the reference the first piece is decoded, and without its first four frames it is
/// the end of 73 grey ones; their latents are the past of the second, which hears the next frames and is decoded behind that past.
#[test]
fn a_piece_continues_the_one_before_as_the_official_loop_does() {
    let desk = Desk::new("", "");
    let (planned, mut encoded) = desk.cached();
    let line = "she sings --f 13 --pf 8 --s 2 --l 2 --au song.wav --ref speaker.png";
    let request = desk.request(&planned, line).unwrap();
    assert_eq!((request.latents(&planned.dit), request.pieces(&planned.dit)), ((2, 8, 8), 2));
    let (ui, interrupt) = (Ui::new(Voice::Json), Interrupt::default());
    let (model, dit) = (&planned.plan.model, &planned.dit);
    let mut residents = residents(model, dit, device(), &ui);
    let range = model.clip_ranges(dit)[0];
    let files = model.trained_dit().unwrap().clone();
    let network =
        || trainer::residents::FromFiles { range, files: files.clone(), adapters: vec![], for_clips: vec![] };
    residents.add(network());
    let mut with = Encoding { residents: &mut residents, interrupt: &interrupt };
    encoded.encode_prompts([request.prompt.as_str(), request.negative.as_str()], &mut with).unwrap();
    encoded.encode_pictures(std::slice::from_ref(&request), &mut with).unwrap();
    let noise = starting_noise(&request, dit, &device()).unwrap();
    let clip = [Prompted::new(&request, noise, &encoded, dit).unwrap()];
    let made = sample::latents(&clip, &mut residents, Course::default(), &interrupt).unwrap().unwrap();
    let host = |x: &Tensor| x.to_device(&Device::Cpu).unwrap();
    let all = host(&made.latents[0]);
    let part = |x: &Tensor, start, count| x.narrow(2, start, count).unwrap().contiguous().unwrap();
    let (first, second) = (part(&all, 0, 2), part(&all, 2, 2));
    assert!(difference(&first, &second).0 > 1e-3);

    let vae = residents.vae().unwrap();
    let lead = host(clip[0].shown.lead_bcthw.as_ref().unwrap());
    let video = host(&vae.decode(&Tensor::cat(&[&lead, &first], 2).unwrap(), Tiling::Off).unwrap());
    let grey = Tensor::zeros((1, 3, 68, 64, 64), DType::F32, &Device::Cpu).unwrap();
    let tail = Tensor::cat(&[&grey, &part(&video, 4, 5)], 2).unwrap();
    let past = latents(&vae, &tail).unwrap();
    assert_eq!(past.dims(), [1, 16, 19, 8, 8]);
    drop(vae);

    let mut by_hand = clip[0].clone();
    by_hand.shown.later = Vec::new();
    let audio = desk.states("song.wav", (8, 8)).unsqueeze(0).unwrap();
    by_hand.shown.cond = by_hand.shown.cond.with(AUDIO, audio).with(PAST, past.clone());
    let key = kernels::random::Key::new(request.seed, "sample", &[1]);
    by_hand.noise_bcthw = Tensor::from_vec(key.normals(2 * 16 * 64), (1, 16, 2, 8, 8), &Device::Cpu).unwrap();
    let again = sample::latents(&[by_hand], &mut residents, Course::default(), &interrupt).unwrap().unwrap();
    assert_close("second piece", &second, &host(&again.latents[0]), Tolerance::relative(1e-4));

    // What is decoded: 5 frames of the first, 8 of the second behind the 73 that it continues.
    let pieces = &made.pieces[0];
    assert_eq!([pieces[0].before, pieces[0].frames, pieces[1].before, pieces[1].frames], [4, 5, 73, 8]);
    let decoded = host(&pieces[1].latents);
    assert_close("past", &part(&decoded, 0, 19), &past, Tolerance::relative(1e-4));
    assert_same_bits("own", &part(&decoded, 19, 2), &second);
}

/// A run that makes a clip in two pieces on its way, of just the frames that are asked for.
#[test]
fn a_tiny_s2v_trains_and_samples_in_pieces() {
    let rest = "[train]\nsteps = 2\n[sample]\nevery = 2\nsteps = 2\nguidance = 2.0\nprompts = [\"she sings --f 13 --pf 8 --au song.wav \
                --ref speaker.png\"]\n[export]\nformats = [\"comfy\", \"diffsynth\"]\n[adapter]\n\
                targets = [\"self_attn.[qkvo]\", \"audio_injector.injector.*.[qkvo]\"]";
    let desk = Desk::new("control = \"control\"", rest);
    let mut planned = desk.plan().unwrap();
    let run = train::RunFolder::begin(&mut planned.plan).unwrap();
    train::train(&planned, &run, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    let adapters = desk.project.run().join("adapters").read_dir().unwrap();
    let files = adapters.map(|entry| entry.unwrap().path());
    let files: Vec<PathBuf> = files.filter(|path| path.extension() == Some("safetensors".as_ref())).collect();
    assert!(!files.is_empty());
    for file in files {
        let names: Vec<String> =
            models::weights::Checkpoint::open(&file).unwrap().names().map(str::to_owned).collect();
        assert!(names.iter().any(|name| name.contains("audio_injector.injector.0.q.")), "{names:?}");
    }
    let samples = desk.project.run().join("samples/step-000002");
    let mut clips = samples.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let clip = clips.find(|path| path.extension().is_some_and(|end| end == "mp4")).unwrap();
    let probe = data::decode::probe(&data::Media::Video(clip), RATE).unwrap();
    assert_eq!((probe.times.len(), probe.width, probe.height), (13, 64, 64));
}

/// What S2V cannot hear is refused by name, before anything is encoded: in data, behind prompts, and in the model's files.
#[test]
fn what_cannot_be_heard_is_refused() {
    let desk = Desk::new("", "");
    let planned = desk.plan().unwrap();
    let sound = desk.path("clips/clip01.wav");
    let refused = || desk.plan().map(drop).unwrap_err().to_string();
    desk.write_sound("clips/clip01.wav", 0.25);
    let error = refused();
    assert!(error.contains("clip01.wav") && error.contains("0.25 seconds"), "{error}");
    std::fs::write(&sound, "no sound").unwrap();
    let error = refused();
    assert!(error.contains("clip01.wav") && error.contains("no audio can be read"), "{error}");
    std::fs::remove_file(&sound).unwrap();
    let error = refused();
    assert!(error.contains("clip01.webp") && error.contains("no audio track"), "{error}");

    let line = |line: &str| desk.request(&planned, line).map(drop).unwrap_err().to_string();
    for (text, told) in [
        ("she sings --ref speaker.png", "--au behind a prompt"),
        ("she sings --au song.wav", "--ref behind a prompt"),
        ("she sings --au song.wav --ref speaker.png --f 17", "song.wav"),
        ("she sings --au speaker.png --ref speaker.png", "speaker.png"),
        ("she sings --au gone.wav --ref speaker.png", "gone.wav"),
        ("she sings --au song.wav --ref speaker.png --pf 6", "a multiple of 4"),
        ("she sings --au song.wav --ref speaker.png --f 13 --pf 8 --h 48", "multiples of 64"),
        ("she sings --au song.wav --ref speaker.png --i speaker.png", "as its reference"),
    ] {
        let error = line(text);
        assert!(error.contains(told), "{text}: {error}");
    }
    for (data, rest, told) in [
        ("frames = [1, 5]", "", "data.frames"),
        ("", "[train]\ndrop = { reference = 0.1 }", "train.drop.reference"),
        ("", "[train]\ndrop = { start = 0.1 }", "train.drop.start"),
    ] {
        let desk = Desk::new(data, rest);
        let recipe = std::fs::read_to_string(desk.project.recipe()).unwrap();
        // The project's own lengths go.
        let recipe = if data.is_empty() { recipe } else { recipe.replacen("frames = [5]\n", "", 1) };
        std::fs::write(desk.project.recipe(), recipe).unwrap();
        let error = desk.plan().map(drop).unwrap_err().to_string();
        assert!(error.contains(told), "{told}: {error}");
    }

    let desk = Desk::new("", "");
    let narrow = SpeechSizes { width: 8, ..encoder_sizes() };
    let named = |spec: TensorSpec| TensorSpec::new(format!("wav2vec2.{}", spec.name), spec.shape);
    let specs: Vec<TensorSpec> = narrow.tensors().into_iter().map(named).collect();
    write(&desk.path("ears/model.safetensors"), random(&specs).into_iter());
    let error = desk.plan().map(drop).unwrap_err().to_string();
    assert!(error.contains("model.speech_encoder") && error.contains("4 states of width 8"), "{error}");
    let recipe = std::fs::read_to_string(desk.project.recipe()).unwrap();
    std::fs::write(desk.project.recipe(), recipe.replacen("speech_encoder = \"ears\"\n", "", 1)).unwrap();
    let error = desk.plan().map(drop).unwrap_err().to_string();
    assert!(error.contains("speech_encoder"), "{error}");

    let other = crate::control_training::Desk::new("vace", "mask_rules = [\"first\"]\naudio = \"own\"", "");
    let error = other.plan().map(drop).unwrap_err().to_string();
    assert!(error.contains("data.audio") && error.contains("S2V"), "{error}");
}

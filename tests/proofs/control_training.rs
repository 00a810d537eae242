//! Control models from a folder of clips to micro-batches and from a request to the network's input: both are shown the same,
//! what accompanies the clips is found and checked, and conditions are left out as often as they are to be.

use std::path::{Path, PathBuf};

use data::{Bucket, Cursor, Film, MaskRule, read_clip, write_webp};
use kernels::Tensor;
use models::dit::Role;
use models::dit::control::{CAMERA, CONTEXT, REFERENCE};
use models::expert::Networks;
use proofs::film::drifting;
use proofs::project::Project;
use proofs::{assert_same_bits, device, difference, fixture, residents};
use trainer::encode::conditions::camera::{Move, packed};
use trainer::encode::conditions::given::CameraPath;
use trainer::encode::prompt::ClipRequest;
use trainer::encode::{Encoding, LatentStore, LeftOut, PictureInputs};
use trainer::plan::{Plan, Planned};
use trainer::sample::SampleConfig;
use trainer::train;
use trainer::train::batch::{Batches, StepData};
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

pub(crate) const SIZE: [u32; 2] = [64, 48];
const CAPTIONS: [&str; 2] = ["a ball", "two birds fly"];

/// A project of clips and of what accompanies them, for a tiny control model with the other parts of the fixtures.
pub(crate) struct Desk {
    pub project: Project,
}

impl Desk {
    /// For the model in `folder` of the fixtures; `data` are lines of `[data]`, `rest` what is behind it.
    pub fn new(folder: &str, data: &str, rest: &str) -> Self {
        let parts = fixture("repo_diffusers_i2v21");
        let part = |name: &str| parts.join(name).display().to_string();
        let model = format!(
            "dit = \"{}\"\ndit_config = \"{}\"\nvae = \"{}\"\ntext_encoder = \"{}\"\ntokenizer = \"{}\"\nclip = \"{}\"",
            fixture(&format!("{folder}/weights_official.safetensors")).display(),
            fixture(&format!("{folder}/config_official.json")).display(),
            part("vae"),
            part("text_encoder"),
            part("tokenizer"),
            part("image_encoder"),
        );
        let project = Project::of_model(&model, SIZE, &CAPTIONS, &format!("{data}\n{rest}"));
        let desk = Self { project };
        for (index, _) in CAPTIONS.iter().enumerate() {
            desk.write("control", index, 7);
            let faces = desk.place("faces").join(format!("clip{index:02}.webp"));
            write_webp(&faces, &drifting(40, 40, 7), 16.0).unwrap();
            let still = drifting(80 + index as u32, 60, 1);
            let path = desk.place("references").join(format!("clip{index:02}.png"));
            save(&still, &path);
            let poses = Move::Out.poses(7);
            let lines: Vec<String> = poses.iter().map(|pose| pose.map(|n| n.to_string()).join(" ")).collect();
            let text = format!("https://example.org/clip\n{}\n", lines.join("\n"));
            std::fs::write(desk.place("cameras").join(format!("clip{index:02}.txt")), text).unwrap();
        }
        desk
    }

    pub fn place(&self, name: &str) -> PathBuf {
        let place = self.project.root().join(name);
        std::fs::create_dir_all(&place).unwrap();
        place
    }

    /// Writes the control clip of a clip: of its size in the project, `frames` frames.
    pub fn write(&self, folder: &str, index: usize, frames: usize) {
        let (width, height) = (48 + 8 * index as u32, 32 + 8 * index as u32);
        let film = drifting(width * 2, height * 2, frames);
        write_webp(&self.place(folder).join(format!("clip{index:02}.webp")), &film, 16.0).unwrap();
    }

    pub fn plan(&self) -> trainer::Result<Planned> {
        Plan::make(&self.project.recipe(), &mut |_, _| {})
    }

    pub fn cached(&self) -> (Planned, LatentStore) {
        let planned = self.plan().unwrap();
        let encoded = train::cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
        (planned, encoded)
    }
}

pub(crate) fn save(film: &Film, path: &Path) {
    let (width, height) = (film.width(), film.height());
    let whole = data::SheetStyle { columns: 1, cell_width: width, gap: 0 };
    data::contact_sheet(path, std::slice::from_ref(film), whole).unwrap();
    assert!(width > 0 && height > 0);
}

/// A request for the first clip's conditions.
fn request(planned: &Planned, desk: &Desk, first: &Path) -> ClipRequest {
    let dit = &planned.dit;
    let mut request = SampleConfig::default().request(dit.defaults(Networks::Whole), SIZE, 5, 1);
    request.image = Some(first.to_owned());
    let facts = dit.kind.facts();
    if facts.camera {
        request.conditions.camera = Some(CameraPath::File(desk.place("cameras").join("clip00.txt")));
    } else {
        request.conditions.control = Some(desk.place("control").join("clip00.webp"));
        request.conditions.references = vec![desk.place("references").join("clip00.png")];
    }
    request.check_pictures(dit).unwrap();
    request
}

/// What the network is shown of the conditions of `request`.
pub(crate) fn sampled(planned: &Planned, encoded: &mut LatentStore, request: &ClipRequest) -> PictureInputs {
    let (ui, interrupt) = (Ui::new(Voice::Json), Interrupt::default());
    let mut residents = residents(&planned.plan.model, &planned.dit, device(), &ui);
    let mut with = Encoding { residents: &mut residents, interrupt: &interrupt };
    encoded.encode_pictures(std::slice::from_ref(request), &mut with).unwrap();
    encoded.shown_of(request, &planned.dit).unwrap()
}

/// A control model is trained on exactly what it is shown when it samples from the same files: control clip, start picture,
/// reference, CLIP's view, camera.
#[test]
fn training_shows_the_conditions_as_sampling_does() {
    let control = "control = \"control\"\nreferences = \"references\"";
    for (folder, data) in [
        ("fun/control11", control),
        ("fun/control22", control),
        ("fun/camera11", "cameras = \"cameras\"\nstills = \"skip\""),
    ] {
        let desk = Desk::new(folder, data, "");
        let (planned, mut encoded) = desk.cached();
        let dataset = &planned.dataset;
        let clip = dataset.clips(0, &dataset.windows[..1]).unwrap().next().unwrap().unwrap();
        let first = desk.project.root().join("first.png");
        let frame = clip.frames().next().unwrap().to_vec();
        image::RgbImage::from_raw(SIZE[0], SIZE[1], frame).unwrap().save(&first).unwrap();
        let request = request(&planned, &desk, &first);
        let sampled = sampled(&planned, &mut encoded, &request);
        let trained = encoded.shown_of_window(0, LeftOut::default()).unwrap();
        let one = |x: &Option<Tensor>| x.clone().unwrap();
        let (of_training, of_sampling) =
            (one(&trained.beside_bcthw), one(&sampled.beside_bcthw).get(0).unwrap());
        assert_eq!(of_training.dim(0).unwrap() + 16, planned.dit.in_channels, "{folder}");
        assert!(difference(&of_training, &of_training.zeros_like().unwrap()).0 > 0.1);
        // The start picture is the clip's first latent frame, in a clip of its own when it is asked for.
        let tolerance = proofs::Tolerance::absolute(2e-5);
        proofs::assert_close(folder, &of_training, &of_sampling, tolerance);
        for (role, tensor) in trained.cond.iter() {
            let other = sampled.cond.require(role).unwrap().get(0).unwrap();
            let is_states_of_frame = role == Role::PICTURE && planned.dit.control.reference.is_none();
            match is_states_of_frame {
                true => proofs::assert_close(role.name(), tensor, &other, tolerance),
                false => assert_same_bits(role.name(), tensor, &other),
            }
        }
        assert_eq!(trained.cond.get(REFERENCE).is_some(), folder != "fun/camera11");
        let left_out =
            LeftOut { control: true, start: true, reference: true, clip: true, faces: true, audio: true };
        let nothing = encoded.shown_of_window(0, left_out).unwrap();
        let is_empty = |x: &Tensor| difference(x, &x.zeros_like().unwrap()).0 == 0.0;
        assert!(is_empty(&one(&nothing.beside_bcthw)), "{folder}: what is left out is still shown");
        for (role, tensor) in nothing.cond.iter().filter(|(role, _)| *role != CAMERA) {
            assert!(is_empty(tensor), "{folder}: {role} is still shown");
        }
    }
}

fn step(planned: &Planned, encoded: &LatentStore, seed: u64, accumulate: usize) -> StepData {
    let mut plan = planned.plan.clone();
    plan.run.seed = seed;
    let batches = Batches::new(&plan, &planned.dataset, encoded).unwrap();
    batches.step(0, Cursor::default(), accumulate).unwrap()
}

/// Each condition is left out of its own share of the samples, by the seed: the same after a resume.
#[test]
fn conditions_are_left_out_by_their_own_shares() {
    let rest = "[train]\ndrop = { control = 0.5, start = 0.25, reference = 0.0, clip = 1.0 }";
    let data = "control = \"control\"\nreferences = \"references\"";
    let desk = Desk::new("fun/control11", data, rest);
    let (planned, encoded) = desk.cached();
    let shown = step(&planned, &encoded, 1, 200);
    let share = |is_left_out: &dyn Fn(&trainer::pipeline::MicroBatch) -> bool| {
        shown.micro_batches.iter().filter(|batch| is_left_out(batch)).count() as f64 / 200.0
    };
    let is_zero = |x: &Tensor| difference(x, &x.zeros_like().unwrap()).0 == 0.0;
    let channels = |batch: &trainer::pipeline::MicroBatch, from| {
        batch.input.x_bcthw.narrow(1, from, 16).unwrap().contiguous().unwrap()
    };
    let of =
        |role| move |batch: &trainer::pipeline::MicroBatch| batch.input.cond.require(role).unwrap().clone();
    for (what, found, wanted) in [
        ("control", share(&|batch| is_zero(&channels(batch, 16))), 0.5),
        ("start", share(&|batch| is_zero(&channels(batch, 32))), 0.25),
        ("reference", share(&|batch| is_zero(&of(REFERENCE)(batch))), 0.0),
        ("clip", share(&|batch| is_zero(&of(Role::PICTURE)(batch))), 1.0),
    ] {
        assert!((found - wanted).abs() < 0.12, "{what}: {found} of the samples, not {wanted}");
    }
    let again = step(&planned, &encoded, 1, 3);
    for (a, b) in again.micro_batches.iter().zip(&shown.micro_batches) {
        assert_same_bits("input", &a.input.x_bcthw, &b.input.x_bcthw);
    }
}

/// A tiny model of each kind trains a step on its data, and its loss is finite.
#[test]
fn a_control_model_trains_on_its_data() {
    let rest = "[train]\nsteps = 2\n[sample]\nevery = 0";
    for (folder, data) in [
        ("fun/control22", "control = \"control\""),
        ("fun/camera11", "cameras = \"cameras\"\nstills = \"skip\""),
    ] {
        let desk = Desk::new(folder, data, rest);
        let mut planned = desk.plan().unwrap();
        // 24 numbers of f32 for each pixel of two latent frames; a step of one clip, and the next.
        let rays = planned.notes.iter().find(|note| note.contains("rays of a camera path"));
        assert_eq!(rays.is_some(), folder == "fun/camera11", "{:?}", planned.notes);
        assert!(rays.is_none_or(|note| note.contains("0.6 MiB") && note.contains("1.1 MiB")), "{rays:?}");
        let run = train::RunFolder::begin(&mut planned.plan).unwrap();
        train::train(&planned, &run, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
        assert!(desk.project.run().join("adapters").read_dir().unwrap().count() > 0, "{folder}");
    }
}

/// What VACE learns from is what it samples from: control clip, mask and references, which are frames before the clip's own.
#[test]
fn vace_is_trained_on_the_context_that_it_samples_from() {
    let data = "control = \"control\"\nreferences = \"references\"\nmasks = \"masks\"";
    let desk = Desk::new("vace", data, "");
    for index in 0..2 {
        // Everything is generated: what is kept of a clip is not in the control clip that is asked for.
        let (width, height) = (48 + 8 * index, 32 + 8 * index);
        let white = Film::new(width, height, vec![255; (width * height * 3) as usize]).unwrap();
        save(&white, &desk.place("masks").join(format!("clip{index:02}.png")));
    }
    // Two references of the first clip, one of the second.
    let references = desk.place("references");
    std::fs::rename(references.join("clip00.png"), references.join("clip00_1.png")).unwrap();
    save(&drifting(30, 70, 1), &references.join("clip00_2.png"));
    let (planned, mut encoded) = desk.cached();
    let trained = encoded.shown_of_window(0, LeftOut::default()).unwrap();
    let mut request = SampleConfig::default().request(planned.dit.defaults(Networks::Whole), SIZE, 5, 1);
    request.conditions.control = Some(desk.place("control").join("clip00.webp"));
    request.conditions.references =
        ["clip00_1.png", "clip00_2.png"].map(|name| references.join(name)).to_vec();
    request.check_pictures(&planned.dit).unwrap();
    assert_eq!(request.latents(&planned.dit), (4, 6, 8), "two frames in front of two");
    let scaled = request.with_line("a ball --hs 0.7", Path::new("")).unwrap();
    assert_eq!(scaled.conditions.hint_scale, Some(0.7));
    let error = request.with_line("a ball --hs -1", Path::new("")).unwrap().check_pictures(&planned.dit);
    assert!(error.unwrap_err().to_string().contains("between 0 and 10"));
    let sampled = sampled(&planned, &mut encoded, &request);
    for (name, trained, sampled) in [
        ("references", trained.in_front_bcthw.unwrap(), sampled.in_front_bcthw.unwrap()),
        (
            "context",
            trained.cond.require(CONTEXT).unwrap().clone(),
            sampled.cond.require(CONTEXT).unwrap().clone(),
        ),
    ] {
        assert_same_bits(name, &trained, &sampled.get(0).unwrap());
    }
    let data = step(&planned, &encoded, 1, 2);
    let frames: Vec<usize> = data.micro_batches.iter().map(|batch| batch.target.dim(2).unwrap()).collect();
    assert!(frames.contains(&4) && frames.contains(&3), "frames of references are learnt too: {frames:?}");
    // Clips with different numbers of references do not stack.
    let recipe = std::fs::read_to_string(desk.project.recipe()).unwrap();
    std::fs::write(desk.project.recipe(), format!("{recipe}\n[train]\nbatch = 2\n")).unwrap();
    let error = desk.plan().map(drop).unwrap_err().to_string();
    assert!(error.contains("1 to 2 reference pictures") && error.contains("train.batch = 1"), "{error}");
}

/// A mask by rule keeps what it says of the clip, and nothing of what is to be generated is shown.
#[test]
fn masks_by_rule_hide_what_is_generated() {
    let desk = Desk::new("vace", "mask_rules = [\"first\"]", "");
    let (planned, encoded) = desk.cached();
    let context = |encoded: &LatentStore| {
        encoded.shown_of_window(0, LeftOut::default()).unwrap().cond.require(CONTEXT).unwrap().clone()
    };
    let first = context(&encoded);
    // Two latent frames take the masks of the frames 1 and 3 of five.
    let mask = first.narrow(0, 32, 64).unwrap();
    assert_eq!(difference(&mask, &mask.ones_like().unwrap()).0, 0.0);
    let (vae, ui) = (&planned.plan.model, Ui::new(Voice::Json));
    let vae = residents(vae, &planned.dit, device(), &ui).vae().unwrap();
    let video =
        |tensor: Tensor| trainer::encode::conditions::latents(&vae, &tensor).unwrap().squeeze(0).unwrap();
    let dataset = &planned.dataset;
    let clip = dataset.clips(0, &dataset.windows[..1]).unwrap().next().unwrap().unwrap();
    let pixels = Tensor::from_vec(clip.planes(), (1, 3, 5, 48, 64), &kernels::Device::Cpu).unwrap();
    let kept = pixels.narrow(2, 0, 1).unwrap().pad_with_zeros(2, 0, 4).unwrap();
    assert_same_bits("kept", &first.narrow(0, 0, 16).unwrap(), &video(kept));
    assert_same_bits("made", &first.narrow(0, 16, 16).unwrap(), &video(pixels.zeros_like().unwrap()));
}

/// Rules are functions of their seed, cover a part of the picture, and have names.
#[test]
fn rules_for_masks_cover_a_part_of_the_picture() {
    let size = [9, 48, 64];
    for name in ["boxes", "brush", "outpaint", "first", "last", "first-last", "every-4"] {
        let rule = MaskRule::try_from(name.to_owned()).unwrap();
        assert_eq!(rule.to_string(), name);
        let mut shares = Vec::new();
        for seed in 0..50 {
            let mask = rule.mask(size, seed);
            assert_eq!(mask, rule.mask(size, seed));
            assert!(mask.len() == 64 * 48 * 9 && mask.iter().all(|value| *value == 0.0 || *value == 1.0));
            shares.push(mask.iter().sum::<f32>() / mask.len() as f32);
        }
        assert!(shares.iter().all(|share| *share > 0.01 && *share < 0.99), "{name}: {shares:?}");
        let is_random = shares.iter().any(|share| *share != shares[0]);
        assert_eq!(is_random, ["boxes", "brush", "outpaint"].contains(&name), "{name}");
    }
    let frame = |rule: MaskRule, frame: usize| rule.mask(size, 1)[frame * 64 * 48];
    assert_eq!([0, 1, 4, 8].map(|n| frame(MaskRule::Every(4), n)), [0.0, 1.0, 0.0, 0.0]);
    assert_eq!([0, 1, 8].map(|n| frame(MaskRule::FirstLast, n)), [0.0, 1.0, 0.0]);
    for wrong in ["box", "every-1", "every-x"] {
        assert!(
            MaskRule::try_from(wrong.to_owned()).unwrap_err().contains("is no rule for masks"),
            "{wrong}"
        );
    }
}

/// A run of VACE with clips on the way: the clips are without the frames of their references.
#[test]
fn vace_makes_clips_without_its_references() {
    let prompt = "a ball --cv control/clip00.webp --ref references/clip00.png --ref references/clip01.png";
    let rest = format!(
        "[train]\nsteps = 1\n[sample]\nprompts = [\"{prompt}\"]\nevery = 1\nsteps = 2\n\
         [export]\nformats = [\"comfy\", \"diffusers\", \"kohya\"]"
    );
    let desk = Desk::new("vace", "mask_rules = [\"boxes\"]\nreferences = \"references\"", &rest);
    let mut planned = desk.plan().unwrap();
    let run = train::RunFolder::begin(&mut planned.plan).unwrap();
    train::train(&planned, &run, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    // The adapter is on the side chain, under the names that each program loads, and is read back from each.
    let adapters = desk.project.run().join("adapters").read_dir().unwrap();
    let files: Vec<PathBuf> = adapters.map(|entry| entry.unwrap().path()).collect();
    let keys: Vec<String> = files
        .iter()
        .filter(|path| path.extension() == Some("safetensors".as_ref()))
        .flat_map(|path| {
            let file = models::weights::Checkpoint::open(path).unwrap();
            file.names().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    for key in [
        "diffusion_model.vace_blocks.0.self_attn.q.lora_A.weight",
        "transformer.vace_blocks.1.attn1.to_out.0.lora_B.weight",
        "lora_unet_vace_blocks_1_ffn_2.lora_down.weight",
    ] {
        assert!(keys.iter().any(|own| own == key), "{key}: {keys:?}");
    }
    assert!(keys.iter().all(|key| key.contains("vace_blocks")), "the main blocks are trained too");
    let samples = desk.project.run().join("samples");
    let folders: Vec<PathBuf> = samples.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    let mut clips = folders.iter().filter(|path| path.is_dir()).flat_map(|path| path.read_dir().unwrap());
    let clip = clips.find(|entry| entry.as_ref().unwrap().path().extension() == Some("mp4".as_ref()));
    let media = data::Media::Video(clip.unwrap().unwrap().path());
    assert_eq!(data::decode::probe(&media, 16.0).unwrap().times.len(), 5);
}

/// What does not fit is refused by its name, and what is wrong: companions that are missing, of another length or aspect, poses that
/// are too few, conditions that the model does not read, and conditions that it needs.
#[test]
fn companions_and_conditions_that_do_not_fit_are_refused() {
    let refused = |desk: &Desk| match desk.plan() {
        Ok(_) => panic!("nothing was refused"),
        Err(error) => error.to_string(),
    };
    let control = "control = \"control\"";
    let desk = Desk::new("fun/control22", control, "");
    desk.write("control", 1, 12);
    let error = refused(&desk);
    assert!(
        error.contains("clip01") && error.contains("has 12 frames") && error.contains("data.control"),
        "{error}"
    );
    write_webp(&desk.place("control").join("clip01.webp"), &drifting(96, 32, 7), 16.0).unwrap();
    let error = refused(&desk);
    assert!(error.contains("96x32") && error.contains("aspect"), "{error}");
    std::fs::remove_file(desk.place("control").join("clip01.webp")).unwrap();
    let error = refused(&desk);
    assert!(error.contains("clip01") && error.contains("there is none"), "{error}");

    let desk = Desk::new("fun/control22", "", "");
    assert!(refused(&desk).contains("data.control"), "a control model without control clips");
    let desk =
        Desk::new("fun/camera11", "control = \"control\"\ncameras = \"cameras\"\nstills = \"skip\"", "");
    assert!(refused(&desk).contains("reads no control clips"));

    let desk = Desk::new("fun/camera11", "cameras = \"cameras\"\nstills = \"skip\"", "");
    std::fs::write(desk.place("cameras").join("clip00.txt"), "0 1 1 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 0\n")
        .unwrap();
    let planned = desk.plan().unwrap();
    let error = train::cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap_err().to_string();
    assert!(error.contains("clip00.txt") && error.contains("1 poses"), "{error}");

    let lines = |planned: &Planned, line: &str| {
        let base = SampleConfig::default().request(planned.dit.defaults(Networks::Whole), SIZE, 5, 1);
        base.with_line(line, Path::new("from"))
            .unwrap()
            .check_pictures(&planned.dit)
            .map_err(|e| e.to_string())
    };
    for (line, told) in [
        ("a street", "along a camera path"),
        ("a street --cam left", "--i behind a prompt"),
        ("a street --cam left --i a.png --cv b.mp4", "reads no control clip"),
        ("a street --cam left --i a.png --ref b.png", "1 reference pictures are given and the model reads 0"),
        ("a street --cam left --i a.png --ei b.png", "leave the last one out"),
    ] {
        let error = lines(&planned, line).unwrap_err();
        assert!(error.contains(told), "{line}: {error}");
    }
    lines(&planned, "a street --cam left-up --i a.png").unwrap();
}

/// A named move and a file of poses, of which a line that is none is skipped, and one with too few numbers refused.
#[test]
fn camera_paths_are_read_from_names_and_files() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("path.txt");
    let poses = Move::RightDown.poses(5);
    let text: Vec<String> = poses.iter().map(|pose| pose.map(|n| n.to_string()).join(" ")).collect();
    std::fs::write(&file, format!("a link\n{}\n\n", text.join("\n"))).unwrap();
    let read = trainer::encode::conditions::camera::read(&file).unwrap();
    assert_eq!(read, poses);
    assert_same_bits("rays", &packed(&read, (32, 48)).unwrap(), &packed(&poses, (32, 48)).unwrap());
    assert_eq!(packed(&read, (32, 48)).unwrap().dims(), [1, 24, 2, 32, 48]);
    std::fs::write(&file, "link\n1 2 3\n").unwrap();
    let error = trainer::encode::conditions::camera::read(&file).unwrap_err().to_string();
    assert!(error.contains("line 2 has 3 numbers: 19 are expected"), "{error}");
    let named = |text: &str| CameraPath::parse(text, Path::new("here"));
    assert_eq!(named("left-up"), CameraPath::Named(Move::LeftUp));
    assert_eq!(named("walk.txt"), CameraPath::File("here/walk.txt".into()));
    let short = folder.path().join("short.webp");
    write_webp(&short, &drifting(48, 32, 3), 16.0).unwrap();
    let bucket = Bucket { width: 48, height: 32, frames: 5 };
    let error = read_clip(&short, 16.0, bucket).unwrap_err().to_string();
    assert!(error.contains("short.webp") && error.contains("5 are needed"), "{error}");
}

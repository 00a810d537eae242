//! Animate from a folder of clips to micro-batches and from a request to the network's input: both are shown the same, in both
//! modes, at the start of a clip and behind another; what is missing or wrong is refused by name.

use std::path::PathBuf;

use data::{Bucket, Film, write_webp};
use kernels::{DType, Device, Tensor};
use models::dit::Role;
use models::dit::animate::{FACES, POSE};
use models::expert::Networks;
use models::vae::Tiling;
use proofs::film::drifting;
use proofs::{Tolerance, assert_close, assert_same_bits, device, difference, residents};
use trainer::encode::conditions::given::GivenConditions;
use trainer::encode::conditions::{animate, latents};
use trainer::encode::prompt::ClipRequest;
use trainer::encode::{Encoding, LeftOut, PictureInputs};
use trainer::plan::Planned;
use trainer::residents::FromFiles;
use trainer::sample::{self, Course, Prompted, SampleConfig, starting_noise};
use trainer::solver::SolverKind;
use trainer::train;
use trainer::watch::interrupt::Interrupt;
use trainer::watch::ui::{Ui, Voice};

use crate::control_training::{Desk, SIZE, sampled, save};

const DATA: &str = "control = \"control\"\nfaces = \"faces\"\nreferences = \"references\"";
/// Pictures go through files of 8 bits, and clips through a lossless one.
const PICTURE: Tolerance = Tolerance::absolute(2e-5);

/// A request for the conditions of the first clip.
fn request(planned: &Planned, desk: &Desk) -> ClipRequest {
    let mut request = SampleConfig::default().request(planned.dit.defaults(Networks::Whole), SIZE, 5, 1);
    let conditions = &mut request.conditions;
    conditions.control = Some(desk.place("control").join("clip00.webp"));
    conditions.faces = Some(desk.place("faces").join("clip00.webp"));
    conditions.references = vec![desk.place("references").join("clip00.png")];
    request.check_pictures(&planned.dit).unwrap();
    request
}

fn one(x: &Option<Tensor>) -> Tensor {
    x.clone().unwrap()
}

/// The same latents of everything, mask and roles, up to `tolerance` of the latents.
fn assert_same(what: &str, trained: &PictureInputs, sampled: &PictureInputs, tolerance: Tolerance) {
    let (of_training, of_sampling) = (one(&trained.beside_bcthw), one(&sampled.beside_bcthw).get(0).unwrap());
    assert_close(what, &of_training, &of_sampling, tolerance);
    let mask = |x: &Tensor| x.narrow(0, 0, 4).unwrap().contiguous().unwrap();
    assert_same_bits(what, &mask(&of_training), &mask(&of_sampling));
    let reference = one(&sampled.in_front_bcthw).get(0).unwrap();
    assert_same_bits(what, &one(&trained.in_front_bcthw), &reference);
    for role in [POSE, FACES, Role::PICTURE] {
        let sampled = sampled.cond.require(role).unwrap().get(0).unwrap();
        assert_same_bits(&format!("{what}, {role}"), trained.cond.require(role).unwrap(), &sampled);
    }
}

fn first_frame(desk: &Desk, planned: &Planned) -> PathBuf {
    let clips = planned.dataset.clips(0, &planned.dataset.windows[..1]).unwrap();
    let frame = clips.map(Result::unwrap).next().unwrap().frames().next().unwrap().to_vec();
    let path = desk.project.root().join("first.png");
    image::RgbImage::from_raw(SIZE[0], SIZE[1], frame).unwrap().save(&path).unwrap();
    path
}

const BEGINS: LeftOut =
    LeftOut { control: false, start: true, reference: false, clip: false, faces: false, audio: false };

/// Nothing of the clip is given where it begins, its first frame where it continues another.
#[test]
fn the_move_mode_is_trained_as_it_is_sampled() {
    let desk = Desk::new("animate", DATA, "");
    let (planned, mut encoded) = desk.cached();
    let mut request = request(&planned, &desk);
    assert_eq!(request.latents(&planned.dit), (3, 6, 8), "a reference in front of two");
    assert_eq!(request.solver, SolverKind::DpmPp2m, "as it was published");
    let shown = sampled(&planned, &mut encoded, &request);
    let begins = encoded.shown_of_window(0, BEGINS).unwrap();
    assert_same("begins", &begins, &shown, Tolerance::absolute(0.0));
    // The reference alone is given: its mask is 1, and its latents are those in front.
    let beside = one(&begins.beside_bcthw);
    let frame = |n: usize| beside.narrow(1, n, 1).unwrap();
    assert_same_bits(
        "given",
        &frame(0).narrow(0, 4, 16).unwrap().contiguous().unwrap(),
        &one(&begins.in_front_bcthw),
    );
    let mask = |n: usize| frame(n).narrow(0, 0, 4).unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    assert_eq!([mask(0), mask(1), mask(2)], [1.0, 0.0, 0.0]);

    request.image = Some(first_frame(&desk, &planned));
    let shown = sampled(&planned, &mut encoded, &request);
    let continued = encoded.shown_of_window(0, LeftOut::default()).unwrap();
    assert_same("continues", &continued, &shown, PICTURE);
    let channel = one(&continued.beside_bcthw).narrow(0, 0, 1).unwrap();
    assert_eq!(channel.narrow(1, 1, 1).unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap(), 1.0);
    // A face that is left out is what stands beside the negative prompt.
    let faceless = encoded.shown_of_window(0, LeftOut { faces: true, ..BEGINS }).unwrap();
    let negative = shown.negative.require(FACES).unwrap().get(0).unwrap();
    assert_same_bits("no face", faceless.cond.require(FACES).unwrap(), &negative);
    assert!(difference(&negative, begins.cond.require(FACES).unwrap()).0 > 1e-3);
}

/// All around the character is given, and the character is black there.
#[test]
fn the_replace_mode_is_trained_as_it_is_sampled() {
    let desk = Desk::new("animate", &format!("{DATA}\nmasks = \"masks\""), "");
    for index in 0..2u32 {
        let (width, height) = (48 + 8 * index, 32 + 8 * index);
        let white = |x: u32| if x < width / 2 { 255 } else { 0 };
        let pixels = (0..height).flat_map(|_| (0..width).flat_map(|x| [white(x); 3])).collect();
        save(
            &Film::new(width, height, pixels).unwrap(),
            &desk.place("masks").join(format!("clip{index:02}.png")),
        );
    }
    let (planned, mut encoded) = desk.cached();
    let mut request = request(&planned, &desk);
    request.conditions.mask = Some(desk.place("masks").join("clip00.png"));
    let error = request.check_pictures(&planned.dit).unwrap_err().to_string();
    assert!(error.contains("--background and --mask"), "{error}");
    request.conditions.background = Some(planned.dataset.sources[0].item.media.path().to_owned());
    request.check_pictures(&planned.dit).unwrap();
    let shown = sampled(&planned, &mut encoded, &request);
    let begins = encoded.shown_of_window(0, BEGINS).unwrap();
    assert_same("begins", &begins, &shown, PICTURE);
    let mask = one(&begins.beside_bcthw).narrow(0, 0, 1).unwrap().narrow(1, 1, 1).unwrap();
    let side =
        |start: usize| mask.narrow(3, start, 4).unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    assert_eq!((side(0), side(4)), (0.0, 1.0), "the character is generated, the rest is given");
    request.image = Some(first_frame(&desk, &planned));
    let shown = sampled(&planned, &mut encoded, &request);
    assert_same("continues", &encoded.shown_of_window(0, LeftOut::default()).unwrap(), &shown, PICTURE);
}

/// The second of two pieces, made here by hand: it begins with the last frame of the first, follows the driving clip, which plays back at its
/// end, and is without the frame that both have.
#[test]
fn a_piece_continues_the_one_before_as_the_official_loop_does() {
    let desk = Desk::new("animate", DATA, "");
    let (planned, mut encoded) = desk.cached();
    let (model, dit) = (&planned.plan.model, &planned.dit);
    let mut whole = request(&planned, &desk);
    (whole.frames, whole.steps, whole.conditions.piece_frames) = (13, 2, Some(13));
    let mut request = whole.clone();
    request.conditions.piece_frames = Some(9);
    assert_eq!((request.latents(dit), request.pieces(dit), whole.pieces(dit)), ((4, 6, 8), 2, 1));
    let (ui, interrupt) = (Ui::new(Voice::Json), Interrupt::default());
    let mut residents = residents(model, dit, device(), &ui);
    let (range, files) = (model.clip_ranges(dit)[0], model.trained_dit().unwrap().clone());
    residents.add(FromFiles { range, files, adapters: vec![], for_clips: vec![] });
    let mut with = Encoding { residents: &mut residents, interrupt: &interrupt };
    encoded.encode_prompts([request.prompt.as_str(), request.negative.as_str()], &mut with).unwrap();
    encoded.encode_pictures(&[request.clone(), whole.clone()], &mut with).unwrap();
    let noise = starting_noise(&request, dit, &device()).unwrap();
    let clip = [Prompted::new(&request, noise, &encoded, dit).unwrap()];
    let made = sample::latents(&clip, &mut residents, Course::default(), &interrupt).unwrap().unwrap();
    let part = |x: &Tensor, start, count| x.narrow(2, start, count).unwrap().contiguous().unwrap();
    let host = |x: &Tensor| x.to_device(&Device::Cpu).unwrap();
    let all = host(&made.latents[0]);
    assert_eq!(all.dims(), [1, 16, 6, 6, 8]);
    let (first, second) = (part(&all, 0, 3), part(&all, 3, 3));

    // From frame 8 on: to the end of 13, and back.
    let frames = [8, 9, 10, 11, 12, 11, 10, 9, 8];
    let along = |x: &Tensor, axis| {
        let one = |frame: &usize| x.narrow(axis, *frame, 1).unwrap();
        Tensor::cat(&frames.iter().map(one).collect::<Vec<_>>(), axis).unwrap()
    };
    let vae = residents.vae().unwrap();
    let bucket = Bucket { width: SIZE[0], height: SIZE[1], frames: 13 };
    let driving = data::read_clip(&desk.place("control").join("clip00.webp"), 30.0, bucket).unwrap();
    let driving = Tensor::from_vec(driving.planes(), (1, 3, 13, 48, 64), &Device::Cpu).unwrap();
    let poses = latents(&vae, &along(&driving, 2)).unwrap();
    let faces = encoded.shown_of(&whole, dit).unwrap().cond.require(FACES).unwrap().clone();
    let video = host(&vae.decode(&first, Tiling::Off).unwrap());
    let nothing = Tensor::zeros((1, 3, 8, 48, 64), DType::F32, &Device::Cpu).unwrap();
    let given = latents(&vae, &Tensor::cat(&[&part(&video, 8, 1), &nothing], 2).unwrap()).unwrap();
    let mask = animate::mask(None, (9, 6, 8), 1).unwrap();
    let reference = host(clip[0].shown.in_front_bcthw.as_ref().unwrap());
    drop(vae);
    let mut by_hand = clip[0].clone();
    by_hand.shown.later = Vec::new();
    by_hand.shown.beside_bcthw = Some(animate::beside(&reference, &mask, &given).unwrap());
    by_hand.shown.cond = by_hand.shown.cond.with(POSE, poses).with(FACES, along(&faces, 1));
    let key = kernels::random::Key::new(request.seed, "sample", &[1]);
    by_hand.noise_bcthw = Tensor::from_vec(key.normals(16 * 4 * 48), (1, 16, 4, 6, 8), &Device::Cpu).unwrap();
    let again = sample::latents(&[by_hand], &mut residents, Course::default(), &interrupt).unwrap().unwrap();
    assert_close("second piece", &second, &host(&again.latents[0]), Tolerance::relative(1e-4));
    assert!(difference(&first, &second).0 > 1e-3);
    let pieces = &made.pieces[0];
    assert_eq!([pieces[0].before, pieces[0].frames, pieces[1].before, pieces[1].frames], [0, 9, 1, 4]);
    assert_same_bits("own", &host(&pieces[1].latents), &second);
    let odd = ClipRequest {
        conditions: GivenConditions { piece_frames: Some(8), ..request.conditions.clone() },
        ..request
    };
    assert!(odd.check_pictures(dit).unwrap_err().to_string().contains("4n+1"));
}

/// A step of a tiny model on its data, with clips made before and after it.
#[test]
fn a_tiny_animate_trains_and_samples() {
    let rest = "[train]\nsteps = 2\n[sample]\nevery = 2\nsteps = 2\nguidance = 2.0\nprompts = [\"a fox dances --f 13 --pf 9 --cv control/clip00.webp \
                --fc faces/clip00.webp --ref references/clip00.png\"]";
    let desk = Desk::new("animate", DATA, rest);
    let mut planned = desk.plan().unwrap();
    let run = train::RunFolder::begin(&mut planned.plan).unwrap();
    train::train(&planned, &run, &Interrupt::default(), &Ui::new(Voice::Json)).unwrap();
    assert!(desk.project.run().join("adapters").read_dir().unwrap().count() > 0);
    let samples = desk.project.run().join("samples/step-000002");
    let mut clips = samples.read_dir().unwrap().map(|entry| entry.unwrap().path());
    let clip = clips.find(|path| path.extension().is_some_and(|end| end == "mp4")).unwrap();
    let probe = data::decode::probe(&data::Media::Video(clip), 30.0).unwrap();
    assert_eq!(probe.times.len(), 13, "two pieces of nine that share a frame, cut");
}

/// What Animate cannot learn from is named: no faces, faces that are none, poses that are the clip itself.
#[test]
fn data_that_teaches_nothing_is_refused() {
    let refused = |desk: &Desk| desk.plan().map(drop).unwrap_err().to_string();
    let error = refused(&Desk::new("animate", "control = \"control\"\nreferences = \"references\"", ""));
    assert!(error.contains("data.faces") && error.contains("face clips"), "{error}");

    let desk = Desk::new("animate", DATA, "");
    write_webp(&desk.place("faces").join("clip00.webp"), &drifting(40, 60, 7), 16.0).unwrap();
    let error = refused(&desk);
    assert!(error.contains("40x60") && error.contains("square"), "{error}");

    let desk = Desk::new("animate", DATA, "");
    let planned = desk.plan().unwrap();
    let clip = planned.dataset.sources[0].item.media.path();
    let pose = desk.place("control").join("clip00.webp");
    std::fs::remove_file(&pose).unwrap();
    std::fs::copy(clip, pose.with_extension(clip.extension().unwrap())).unwrap();
    let error = refused(&desk);
    assert!(
        error.contains("data.control") && error.contains("clip00") && error.contains("equals its target"),
        "{error}"
    );

    let desk = Desk::new("animate", DATA, "");
    let grey = Film::new(40, 40, vec![90; 40 * 40 * 3 * 7]).unwrap();
    write_webp(&desk.place("faces").join("clip01.webp"), &grey, 16.0).unwrap();
    let planned = desk.plan().unwrap();
    let cached = train::cache(&planned, &Interrupt::default(), &Ui::new(Voice::Json));
    let error = cached.map(drop).unwrap_err().to_string();
    assert!(error.contains("clip01.webp") && error.contains("no face is in it: frame 1"), "{error}");

    let of_reference = Desk::new("animate", DATA, "[train]\ndrop = { reference = 0.1 }");
    let error = refused(&of_reference);
    assert!(error.contains("train.drop.reference") && error.contains("always"), "{error}");
}

//! Sampling: the solver loop is the same on one stage and on several, for one clip and for many, with guidance and without.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use kernels::ledger::Ledger;
use kernels::{DType, Device, Tensor};
use models::dit::{Base, Conditioning, DitConfig, Raw, Role};
use models::expert::Networks;
use models::vae::{Bands, Tiling, Vae};
use proofs::small::{adapters, config, pipeline, velocities, weights};
use proofs::{Tolerance, assert_close, assert_same_bits, device, difference, fixture_tensors, randn};
use trainer::encode::PictureInputs;
use trainer::encode::prompt::ClipRequest;
use trainer::error::Error;
use trainer::learning::NoiseRange;
use trainer::pipeline::{NetworkInput, Pipeline};
use trainer::sample::{
    ClipFiles, ClipFormat, Piece, Prompted, SampleConfig, Sampled, Session, starting_noise, write_clips,
};
use trainer::solver::{Convention, Schedule, SolverKind};
use trainer::watch::ui::{Ui, Voice};

/// Sums in f32 whose order may depend on how many tokens a product has at once, over the steps of a clip.
const ROUNDING: Tolerance = Tolerance::relative(2e-5);

fn stages(split: &[usize]) -> Pipeline {
    let config = config(3, 24);
    pipeline(&config, &weights(&config), &adapters(&config, 3, 0.5), split)
}

fn base(size: [u32; 2], frames: u32, seed: u64) -> ClipRequest {
    SampleConfig::default().request(config(3, 24).defaults(Networks::Whole), size, frames, seed)
}

/// A clip of a size, length, solver and guidance of its own.
fn clip(i: u64, guidance: f64) -> Prompted {
    let sizes = [([64, 32], 1), ([32, 48], 5), ([48, 48], 9)];
    let (size, frames) = sizes[i as usize % sizes.len()];
    let solvers = [SolverKind::UniPc, SolverKind::Euler, SolverKind::DpmPp2m];
    let steps = 4 + i as usize;
    let request = ClipRequest {
        steps,
        guidance,
        solver: solvers[i as usize % solvers.len()],
        convention: Convention::Official,
        ..base(size, frames, 100 + i)
    };
    Prompted {
        positive: Conditioning::new().with(Role::TEXT, randn(&format!("text{i}"), (1, 3 + i as usize, 24))),
        negative: Conditioning::new().with(Role::TEXT, randn("negative", (1, 7, 24))),
        noise_bcthw: starting_noise(&request, &config(3, 24), &device()).unwrap(),
        shown: PictureInputs::default(),
        request,
    }
}

fn clips() -> Vec<Prompted> {
    vec![clip(0, 5.0), clip(1, 1.0), clip(2, 3.0)]
}

/// The latents of `clips`; `None` where `progress` broke off.
fn generate(
    pipeline: &Pipeline,
    clips: &[Prompted],
    mut progress: impl FnMut() -> ControlFlow<()> + Send,
) -> Result<Option<Vec<Tensor>>, Error> {
    let mut session = Session::new(clips)?;
    let flow = session.run(std::slice::from_ref(pipeline), NoiseRange::All, |_| progress())?;
    Ok(flow.is_continue().then(|| session.latents()))
}

/// The same on the CPU.
fn latents(pipeline: &Pipeline, clips: &[Prompted]) -> Vec<Tensor> {
    let made = generate(pipeline, clips, || ControlFlow::Continue(())).unwrap().unwrap();
    made.iter().map(|latents| latents.to_device(&device()).unwrap()).collect()
}

#[test]
fn stages_sample_as_one_bit_for_bit() {
    let whole = latents(&stages(&[3]), &clips());
    for split in [&[1, 2][..], &[2, 1], &[1, 1, 1]] {
        for (i, (got, expected)) in latents(&stages(split), &clips()).iter().zip(&whole).enumerate() {
            assert_same_bits(&format!("clip {i} of {split:?}"), got, expected);
        }
    }
}

/// The whole network on each of several devices, or groups of two: halves of the guidance, and clips without guidance, are dealt
/// to them, with steps that are skipped and without.
#[test]
fn groups_of_devices_sample_as_one_pipeline_bit_for_bit() {
    let dit = config(4, 24);
    let (own, fresh) = (weights(&dit), adapters(&dit, 3, 0.5));
    let apart = |split: &[usize]| {
        let mut first = 0;
        let part = |count: &usize| {
            first += count;
            (Device::counted_cpu(Ledger::new(1)), first - count..first)
        };
        let split: Vec<_> = split.iter().map(part).collect();
        Pipeline::load(&own, &dit, &split, &fresh, Base::F32).unwrap()
    };
    let clips = [clip(0, 5.0), clip(1, 1.0), clip(2, 3.0)];
    for skips in [vec![], vec![vec![2], vec![1, 3], vec![2, 3]]] {
        let made = |groups: &[Pipeline]| {
            let mut session = Session::new(&clips).unwrap().skipping(&skips);
            let flow = session.run(groups, NoiseRange::All, |_| ControlFlow::Continue(())).unwrap();
            assert!(flow.is_continue());
            session
                .latents()
                .iter()
                .map(|latents| latents.to_device(&Device::Cpu).unwrap())
                .collect::<Vec<_>>()
        };
        for (split, groups) in [(&[1, 3][..], 2), (&[1, 1, 2], 3), (&[1, 1, 1, 1], 2), (&[2, 1, 1], 1)] {
            // Each stage adds a residual of its own where a step is skipped.
            let of_group: Vec<usize> = split.chunks(groups).map(|held| held.iter().sum()).collect();
            let whole = made(&[apart(&of_group)]);
            let groups = apart(split).grouped(groups).unwrap();
            for (i, (got, expected)) in made(&groups).iter().zip(&whole).enumerate() {
                let what = format!("clip {i} of {split:?} in {} groups, {} skips", groups.len(), skips.len());
                assert_same_bits(&what, got, expected);
            }
        }
    }
}

/// A model of three heads, and its networks on so many devices each.
fn apart(count: usize) -> Vec<Pipeline> {
    let dit = DitConfig { heads: 3, ..config(4, 36) };
    let split = [4 - (count - 1)].into_iter().chain(vec![1; count - 1]);
    let mut first = 0;
    let part = |blocks: usize| {
        first += blocks;
        (Device::counted_cpu(Ledger::new(1)), first - blocks..first)
    };
    let split: Vec<_> = split.map(part).collect();
    let whole = Pipeline::load(&weights(&dit), &dit, &split, &adapters(&dit, 3, 0.5), Base::F32).unwrap();
    whole.grouped(count).unwrap()
}

/// The tokens of a call are shared by two devices and by three, which do not divide them, nor two the heads; beside the halves of
/// the guidance on four; with steps that are skipped and without.
#[test]
fn devices_that_share_tokens_sample_as_one() {
    let clips = [clip(0, 5.0), clip(1, 1.0), clip(2, 3.0)];
    for skips in [vec![], vec![vec![2], vec![1, 3], vec![2, 3]]] {
        let made = |networks: &[Pipeline]| {
            let mut session = Session::new(&clips).unwrap().skipping(&skips);
            let flow = session.run(networks, NoiseRange::All, |_| ControlFlow::Continue(())).unwrap();
            assert!(flow.is_continue());
            let on_cpu = |latents: &Tensor| latents.to_device(&Device::Cpu).unwrap();
            session.latents().iter().map(on_cpu).collect::<Vec<_>>()
        };
        let whole = made(&apart(1));
        for (devices, ranks) in [(2, 2), (3, 3), (4, 2)] {
            let rows = Pipeline::in_rows(apart(devices), ranks).unwrap();
            assert_eq!(rows.len(), devices / ranks);
            for (i, (got, expected)) in made(&rows).iter().zip(&whole).enumerate() {
                let what =
                    format!("clip {i} over {devices} devices in rows of {ranks}, {} skips", skips.len());
                assert_close(&what, got, expected, ROUNDING);
            }
            assert_eq!(rows.iter().map(Pipeline::live_transfers).sum::<usize>(), 0);
        }
    }
}

/// A device of those that share tokens takes no more than one that has them all, as plans count it.
#[test]
fn a_device_that_shares_tokens_takes_no_more_than_one_that_has_all() {
    let x = randn("long", (1, 16, 6, 16, 16));
    let input =
        NetworkInput::new(x, Tensor::new(&[500f32][..], &Device::Cpu).unwrap(), randn("text", (1, 9, 24)));
    let peaks = |network: &Pipeline| -> Vec<u64> {
        let ledgers = network.stages().iter().map(|stage| stage.device.ledger().unwrap());
        let ledgers: Vec<&Ledger> = ledgers.collect();
        ledgers.iter().for_each(|ledger| ledger.reset_peak());
        network.predict(std::slice::from_ref(&input)).unwrap();
        ledgers.iter().map(|ledger| ledger.peak()).collect()
    };
    for devices in [2, 3] {
        let all = peaks(&apart(devices)[0])[0];
        let shared = peaks(&Pipeline::in_rows(apart(devices), devices).unwrap()[0]);
        assert!(shared.iter().all(|peak| *peak <= all), "{devices} devices: {shared:?} of {all}");
    }
}

/// Where each frame has a timestep of its own, whole frames are shared.
#[test]
fn frames_with_timesteps_of_their_own_are_shared_whole() {
    let (frames, of_frame) = (5, 6);
    let times = (0..frames * of_frame).map(|token| if token < of_frame { 0.0 } else { 700.0 });
    let timestep =
        Tensor::from_vec(times.collect::<Vec<f32>>(), (1, frames * of_frame), &Device::Cpu).unwrap();
    let x = randn("x", (1, 16, frames, 4, 6));
    let input = NetworkInput::new(x, timestep, randn("text", (1, 9, 24)));
    let velocity = |networks: Vec<Pipeline>| velocities(&networks[0], std::slice::from_ref(&input)).remove(0);
    let whole = velocity(apart(1));
    for devices in [2, 3] {
        let shared = velocity(Pipeline::in_rows(apart(devices), devices).unwrap());
        assert_close(&format!("over {devices} devices"), &shared, &whole, ROUNDING);
    }
    let few = NetworkInput { x_bcthw: randn("few", (1, 16, 2, 4, 6)), ..input.clone() };
    let row = &Pipeline::in_rows(apart(3), 3).unwrap()[0];
    let timestep = Tensor::from_vec([vec![0f32; 6], vec![700.0; 6]].concat(), (1, 12), &Device::Cpu).unwrap();
    let few = NetworkInput { cond: few.cond.with(Role::TIMESTEP, timestep), ..few };
    let refused = row.predict(&[few]).unwrap_err().to_string();
    assert!(refused.contains("2 frames cannot be dealt out to 3 devices"), "{refused}");
    // One that was refused stops no later call.
    assert_close("afterwards", &velocities(row, std::slice::from_ref(&input))[0], &whole, ROUNDING);
}

#[test]
fn clips_together_equal_each_alone() {
    let pipeline = stages(&[1, 2]);
    let mut steps = 0;
    let count = || {
        steps += 1;
        ControlFlow::Continue(())
    };
    let together = generate(&pipeline, &clips(), count).unwrap().unwrap();
    assert_eq!(steps, clips().iter().map(|clip| clip.request.steps).sum::<usize>());
    for (i, (clip, got)) in clips().iter().zip(&together).enumerate() {
        let alone = latents(&pipeline, std::slice::from_ref(clip)).remove(0);
        assert_same_bits(&format!("clip {i}"), got, &alone);
        assert!(difference(got, &clip.noise_bcthw).0 > 0.1, "clip {i} is still its noise");
    }
}

/// With guidance 1 the negative prompt has no effect, so it must not cost a call either: here one would fail.
#[test]
fn guidance_of_one_asks_the_network_once() {
    let pipeline = stages(&[3]);
    let mut clip = clip(0, 1.0);
    let expected = latents(&pipeline, std::slice::from_ref(&clip)).remove(0);
    clip.negative.insert(Role::TEXT, randn("too wide", (1, 7, 25)));
    assert_same_bits("guidance 1", &latents(&pipeline, std::slice::from_ref(&clip))[0], &expected);
    clip.request.guidance = 1.5;
    assert!(
        generate(&pipeline, &[clip], || ControlFlow::Continue(())).is_err(),
        "the negative prompt is not looked at"
    );
}

/// One Euler step is x + (s1 - s0) v, v = uncond + g (cond - uncond), worked out by hand from single predictions.
#[test]
fn guidance_goes_from_the_negative_prompt_through_the_prompt() {
    let pipeline = stages(&[3]);
    let mut clip = clip(1, 4.0);
    clip.request.steps = 1;
    let schedule = trainer::solver::Schedule::new(SolverKind::Euler, Convention::Official, 1, 5.0).unwrap();
    let ask = |half: &Conditioning<Raw>| {
        let timestep = Tensor::new(schedule.timesteps.as_slice(), &device()).unwrap();
        let cond = half.clone().with(Role::TIMESTEP, timestep);
        let input = NetworkInput { x_bcthw: clip.noise_bcthw.clone(), cond };
        pipeline.predict(&[input]).unwrap().remove(0)
    };
    let (cond, uncond) = (ask(&clip.positive), ask(&clip.negative));
    assert!(difference(&cond, &uncond).0 > 1e-3, "the text does nothing");
    let velocity = ((cond * 4.0).unwrap() - (uncond * 3.0).unwrap()).unwrap();
    let step = f64::from(schedule.sigmas[1] - schedule.sigmas[0]);
    let expected = (&clip.noise_bcthw + (velocity * step).unwrap()).unwrap();
    // The same sum in another order, of numbers up to 20.
    assert_close("one step", &latents(&pipeline, &[clip])[0], &expected, Tolerance::absolute(5e-5));
}

/// Clips start from the same noise independent of what else is sampled, and other seeds from other noise.
#[test]
fn starting_noise_is_a_function_of_the_seed() {
    let noise = |seed| starting_noise(&base([64, 48], 9, seed), &config(3, 24), &device()).unwrap();
    assert_eq!(noise(1).dims(), [1, 16, 3, 6, 8]);
    assert_same_bits("noise", &noise(1), &noise(1));
    assert!(difference(&noise(1), &noise(2)).0 > 1.0);
}

#[test]
fn sampling_that_is_broken_off_gives_no_clips() {
    let mut steps = 0;
    let second = || {
        steps += 1;
        if steps == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    assert!(generate(&stages(&[3]), &clips(), second).unwrap().is_none());
    assert_eq!(steps, 2, "it went on after it was broken off");
}

/// One clip of several that is not finite stops all, and is named with the step and its sigma.
#[test]
fn a_clip_that_is_not_finite_is_named_with_its_solver_step() {
    let mut clips = clips();
    clips[1].noise_bcthw = (&clips[1].noise_bcthw * f64::NAN).unwrap();
    let sigma =
        Schedule::new(SolverKind::Euler, Convention::Official, 5, clips[1].request.shift).unwrap().sigmas[0];
    let error = generate(&stages(&[1, 2]), &clips, || ControlFlow::Continue(())).unwrap_err();
    assert!(
        matches!(error, Error::NonFiniteClip { clip: 1, step: 1, steps: 5, sigma: told, .. } if told == sigma),
        "{error}"
    );
    assert!(error.to_string().contains("clip 2"), "{error}");
}

/// Finite latents that a damaged VAE makes infinite give an error with the clip's title, and no file.
#[test]
fn a_video_that_is_not_finite_is_not_written() {
    const LAST: &str = "decoder.head.2.weight";
    let mut weights = fixture_tensors("vae22/weights_official.safetensors");
    let latents = fixture_tensors("vae22/io.safetensors").remove("latents_5").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (file, clips) = (folder.path().join("vae.safetensors"), folder.path().join("clips"));
    let write = |weights: &HashMap<String, Tensor>| {
        kernels::safetensors::save(weights, &file).unwrap();
        let vae = Vae::load(&file, None, DType::F32, &device()).unwrap();
        let clip = Sampled {
            name: "00-a-cloud".into(),
            title: "a cloud".into(),
            label: None,
            pieces: vec![Piece::whole(latents.clone())],
        };
        let files = ClipFiles { tiling: Tiling::Off, bands: 1, fps: 16.0, formats: &[ClipFormat::Gif] };
        write_clips(&clips, &Bands::one(Arc::new(vae)).unwrap(), &[clip], files, &Ui::new(Voice::Json))
    };
    assert_eq!(write(&weights).unwrap().len(), 2, "a clip and the contact sheet");
    std::fs::remove_dir_all(&clips).unwrap();
    let damaged = (&weights[LAST] * 1e38).unwrap().clamp(-3e38, 3e38).unwrap();
    weights.insert(LAST.to_owned(), damaged);
    let refused = write(&weights).unwrap_err();
    assert!(matches!(&refused, Error::NonFiniteVideo { clip } if clip == "a cloud"), "{refused}");
    assert!(!clips.exists(), "something was written");
}

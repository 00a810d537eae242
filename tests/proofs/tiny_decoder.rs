//! Tiny decoders equal the original, whole and as a stream, and decode what the network of a clip sees.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::PathBuf;

use kernels::ledger::Ledger;
use kernels::{DType, Device, Tensor};
use models::vae::{Generation, TinyDecoder, TinyLatents, TinySizes};
use models::weights::write_safetensors;
use proofs::small::{adapters, config, pipeline, weights};
use proofs::{
    Tolerance, assert_close, assert_same_bits, device, fixture, fixture_json, fixture_tensors, randn,
};
use trainer::learning::NoiseRange;
use trainer::sample::{PreviewPlan, Prompted, SampleConfig, Session, preview_video, starting_noise};
use trainer::solver::SolverKind;

/// The bound of the fixtures, for pixels in 0..1.
const PIXELS: Tolerance = Tolerance::absolute(1e-5);
const CASES: [(&str, Generation); 2] = [("tiny21", Generation::Wan21), ("tiny22", Generation::Wan22)];

fn file(case: &str) -> PathBuf {
    fixture(&format!("taehv/{case}.safetensors"))
}

fn decoder(case: &str, latents: TinyLatents) -> TinyDecoder {
    TinyDecoder::load(&file(case), latents, DType::F32, &device()).unwrap()
}

fn golden(case: &str) -> HashMap<String, Tensor> {
    fixture_tensors(&format!("taehv/{case}_io.safetensors"))
}

/// Golden latents [T,C,H,W] as the DiT has them.
fn clip(z_tchw: &Tensor) -> Tensor {
    z_tchw.transpose(0, 1).unwrap().contiguous().unwrap().unsqueeze(0).unwrap()
}

/// A video [1,3,T,H,W] in -1..1 as the original has it: [T,3,H,W] in 0..1.
fn original(video: &Tensor) -> Tensor {
    let frames = video.squeeze(0).unwrap().transpose(0, 1).unwrap().contiguous().unwrap();
    frames.affine(0.5, 0.5).unwrap()
}

#[test]
fn frames_equal_the_golden_values() {
    for (case, _) in CASES {
        let (tiny, io) = (decoder(case, TinyLatents::Scaled), golden(case));
        for (input, output) in [("z", "decoded"), ("z_one_frame", "decoded_one_frame")] {
            let video = tiny.decode(&clip(&io[input])).unwrap();
            assert_close(&format!("{case} {output}"), &original(&video), &io[output], PIXELS);
        }
        let video = tiny.decode_at_latent_rate(&clip(&io["z"])).unwrap();
        assert_close(case, &original(&video), &io["decoded_no_time_upscale"], PIXELS);
    }
}

/// Memory blocks look one frame back, so it matters what a stream keeps between two pieces.
#[test]
fn a_stream_in_any_pieces_equals_the_whole_clip() {
    for (case, generation) in CASES {
        let tiny = decoder(case, TinyLatents::Scaled);
        let latents = randn("pieces", (1, TinySizes::published(generation).latent, 5, 3, 2));
        let whole = tiny.stream().push(&latents).unwrap();
        assert_eq!(whole.dim(2).unwrap(), 17);
        for pieces in [&[1, 1, 1, 1, 1][..], &[2, 3], &[4, 1]] {
            let (mut stream, mut at) = (tiny.stream(), 0);
            let frames = pieces.iter().map(|&n| {
                at += n;
                stream.push(&latents.narrow(2, at - n, n).unwrap()).unwrap()
            });
            let joined = Tensor::cat(&frames.collect::<Vec<_>>(), 2).unwrap();
            assert_same_bits(&format!("{case} {pieces:?}"), &joined, &whole);
        }
    }
}

/// Means and deviations of the Wan 2.1 VAE, as published with it.
const MEAN: [f32; 16] = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632,
    -0.1922, -0.9497, 0.2503, -0.2921,
];
const STD: [f32; 16] = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382,
    1.1253, 2.8251, 1.9160,
];

#[test]
fn light_variants_are_known_by_name_and_decode_latents_without_scaling() {
    for (name, latents) in [
        ("models/lighttaew2_1.pth", TinyLatents::Raw),
        ("LightTAEw2_2.safetensors", TinyLatents::Raw),
        ("lighttae/taew2_1.pth", TinyLatents::Scaled),
    ] {
        assert_eq!(TinyLatents::by_name(&PathBuf::from(name)), latents, "{name}");
    }
    let column =
        |values: [f32; 16]| Tensor::new(&values, &device()).unwrap().reshape((1, 16, 1, 1, 1)).unwrap();
    let scaled = clip(&golden("tiny21")["z"]);
    let raw = scaled.broadcast_mul(&column(STD)).unwrap().broadcast_add(&column(MEAN)).unwrap();
    let expected = decoder("tiny21", TinyLatents::Scaled).decode(&raw).unwrap();
    assert_close("raw", &decoder("tiny21", TinyLatents::Raw).decode(&scaled).unwrap(), &expected, PIXELS);
}

/// By the original's own list of names and shapes; only the decoder is read.
#[test]
fn published_sizes_are_those_of_the_original() {
    let all = fixture_json("taehv/real_shapes.json");
    for (name, generation) in [("taew2_1", Generation::Wan21), ("taew2_2", Generation::Wan22)] {
        let shapes = all[name].as_object().unwrap().iter();
        let shape = |shape: &serde_json::Value| serde_json::from_value::<Vec<usize>>(shape.clone()).unwrap();
        let expected: BTreeMap<_, _> = shapes
            .filter(|(name, _)| name.starts_with("decoder."))
            .map(|(name, dims)| (name.clone(), shape(dims)))
            .collect();
        let own = TinySizes::published(generation).tensors().into_iter().map(|spec| (spec.name, spec.shape));
        assert_eq!(own.collect::<BTreeMap<_, _>>(), expected, "{name}");
    }
}

#[test]
fn files_that_do_not_fit_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let super_path = folder.path().join("taew2_2_super.safetensors");
    let shapes = fixture_json("taehv/real_shapes.json");
    let names = shapes["taew2_2_super"].as_object().unwrap().keys();
    let one = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
    let tensors: Vec<(&str, &Tensor)> = names.map(|name| (name.as_str(), &one)).collect();
    write_safetensors(&super_path, tensors, &BTreeMap::new()).unwrap();
    let refused = |path: PathBuf| TinySizes::at(&path).unwrap_err().to_string();
    assert!(refused(super_path).contains("taew2_2_super"));
    let vae = refused(fixture("vae22/weights_official.safetensors"));
    assert!(vae.contains("not a tiny decoder") && vae.contains("a Wan VAE"), "{vae}");

    let settled = |every, decoder| {
        PreviewPlan::settle(["--preview", "--tiny-decoder"], every, decoder, &config(1, 24))
            .map_err(|error| error.to_string())
    };
    assert_eq!(settled(0, None), Ok(None));
    assert!(settled(2, Some(file("tiny21"))).unwrap().is_some());
    for (every, decoder, told) in [
        (2, None, "needs a tiny decoder"),
        (0, Some(file("tiny21")), "set --preview too"),
        (2, Some(file("tiny22")), "48 channels, and this model's have 16: give taew2_1"),
    ] {
        let error = settled(every, decoder).unwrap_err();
        assert!(error.contains(told), "{error}");
    }
}

/// Behind Euler's last step nothing but the clean latents is left; before it they are already near.
#[test]
fn a_preview_shows_the_clean_latents_of_its_step() {
    let dit = config(2, 24);
    let steps = 6;
    let request = trainer::encode::prompt::ClipRequest {
        steps,
        guidance: 1.0,
        solver: SolverKind::Euler,
        ..SampleConfig::default().request(dit.defaults(models::expert::Networks::Whole), [48, 32], 5, 9)
    };
    let text = || models::dit::Conditioning::new().with(models::dit::Role::TEXT, randn("text", (1, 3, 24)));
    let prompted = Prompted {
        positive: text(),
        negative: text(),
        noise_bcthw: starting_noise(&request, &dit, &device()).unwrap(),
        shown: Default::default(),
        request,
    };
    let clips = [prompted];
    let pipeline = pipeline(&dit, &weights(&dit), &adapters(&dit, 3, 0.5), &[2]);
    let mut session = Session::new(&clips).unwrap();
    let mut seen = Vec::new();
    let flow = session.run(std::slice::from_ref(&pipeline), NoiseRange::All, |done| {
        assert_eq!(done.steps, steps);
        seen.push((done.predicted().unwrap(), done.latents.clone()));
        ControlFlow::Continue(())
    });
    assert!(flow.unwrap().is_continue());
    let (predicted, latents) = seen.last().unwrap();
    assert_close("the last step", predicted, latents, Tolerance::absolute(1e-5));
    assert!(proofs::difference(&seen[0].0, &seen[0].1).0 > 0.1, "the first step has noise left");
}

/// What plans count on a device of shadows is what the decoder takes, and it is the frames of one latent frame at a time.
#[test]
fn a_shadow_of_a_preview_takes_what_the_preview_takes() {
    for (_, generation) in CASES {
        let sizes = TinySizes { widths: [8, 8, 4, 4], grown: [8, 16, 8], ..TinySizes::published(generation) };
        for dtype in [DType::F32, DType::BF16] {
            let taken = |device: fn(Ledger) -> Device, host: &Device, frames: usize| {
                let ledger = Ledger::new(1);
                let device = device(ledger.clone());
                let latents = Tensor::zeros((1, sizes.latent, frames, 6, 4), DType::F32, &device).unwrap();
                let decoder = TinyDecoder::seeded(sizes, 0, dtype, &device).unwrap();
                let before = ledger.live();
                assert_eq!(preview_video(&decoder, &latents, host).unwrap().dim(2).unwrap(), 4 * frames - 3);
                ledger.peak() - before
            };
            let shadow = |ledger| Device::shadow_cpu(Some(ledger));
            let own = taken(Device::counted_cpu, &Device::Cpu, 3);
            assert_eq!(own, taken(shadow, &Device::shadow_cpu(None), 3), "{generation:?}, {dtype:?}");
            assert!(taken(Device::counted_cpu, &Device::Cpu, 9) <= own, "it grows with the clip");
        }
    }
}

//! The VAEs equal the published ones: latents, pixels, every stage of every chunk, tiles.

use std::collections::HashMap;
use std::path::PathBuf;

use kernels::{DType, Tensor};
use models::vae::{Tiles, Tiling, Vae};
use proofs::{device, fixture};

/// Largest difference of latents and pixels, f32 against PyTorch f32: rounding of sums in another order.
const IO: f32 = 2e-5;
/// Stages in the middle reach larger values than the output.
const TRACE: f32 = 1e-4;
/// Tiles add blending.
const TILED: f32 = 3e-5;

/// Fixture folder and weights.
struct Case {
    folder: &'static str,
    weights: &'static str,
}

const CASES: [Case; 2] = [
    Case { folder: "vae21", weights: "repo_diffusers_a14b/vae" },
    Case { folder: "vae22", weights: "vae22/weights_official.safetensors" },
];

impl Case {
    fn vae(&self) -> Vae {
        Vae::load(&fixture(self.weights), None, DType::F32, &device()).unwrap()
    }

    fn path(&self, file: &str) -> PathBuf {
        fixture(&format!("{}/{file}.safetensors", self.folder))
    }

    fn tensors(&self, file: &str) -> HashMap<String, Tensor> {
        kernels::safetensors::load(self.path(file), &device()).unwrap()
    }
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn encoding_and_decoding_equal_the_golden_values() {
    for case in CASES {
        let (vae, io) = (case.vae(), case.tensors("io"));
        for frames in [1, 5, 9, 17] {
            let latents = vae.encode(&io[&format!("video_{frames}")], Tiling::Off).unwrap();
            let worst = difference(&latents, &io[&format!("latents_{frames}")]);
            assert!(worst <= IO, "{} latents_{frames}: {worst}", case.folder);
            for (input, output) in [("latents", "recon"), ("z", "decoded")] {
                let video = vae.decode(&io[&format!("{input}_{frames}")], Tiling::Off).unwrap();
                let worst = difference(&video, &io[&format!("{output}_{frames}")]);
                assert!(worst <= IO, "{} {output}_{frames}: {worst}", case.folder);
            }
        }
    }
}

#[test]
fn every_stage_of_every_chunk_equals_the_golden_trace() {
    for case in CASES {
        let (vae, io, trace) = (case.vae(), case.tensors("io"), case.tensors("trace_9"));
        let mut calls: HashMap<String, usize> = HashMap::new();
        let mut seen = 0;
        let mut probe = |stage: &str, x: &Tensor| {
            let chunk = calls.entry(stage.to_owned()).or_default();
            if let Some(expected) = trace.get(&format!("{stage}.chunk{chunk}")) {
                let worst = difference(x, expected);
                assert!(worst <= TRACE, "{} {stage} chunk {chunk}: {worst}", case.folder);
                seen += 1;
            }
            *chunk += 1;
        };
        vae.encode_probed(&io["video_9"], Tiling::Off, Some(&mut probe)).unwrap();
        vae.decode_probed(&io["z_9"], Tiling::Off, Some(&mut probe)).unwrap();
        assert_eq!(seen, trace.len(), "{}: stages of the trace that no probe saw", case.folder);
    }
}

#[test]
fn tiles_equal_the_golden_tiles() {
    let (vae, golden) = (CASES[0].vae(), CASES[0].tensors("tiled"));
    let tiling = Tiling::On(Tiles { size: (48, 48), stride: (32, 32) });
    for (tiling, decoded, mean) in
        [(tiling, "decoded_tiled", "mean_tiled"), (Tiling::Off, "decoded_untiled", "mean_untiled")]
    {
        let worst = difference(&vae.decode(&golden["z"], tiling).unwrap(), &golden[decoded]);
        assert!(worst <= TILED, "{decoded}: {worst}");
        let worst = difference(&vae.raw_means(&golden["video"], tiling, None).unwrap(), &golden[mean]);
        assert!(worst <= TILED, "{mean}: {worst}");
    }
}

#[test]
fn the_official_pth_equals_the_diffusers_folder() {
    let pth = Vae::load(&fixture("repo_official_a14b/Wan2.1_VAE.pth"), None, DType::F32, &device()).unwrap();
    let folder = CASES[0].vae();
    let video = &CASES[0].tensors("io")["video_5"];
    let (a, b) = (pth.encode(video, Tiling::Off).unwrap(), folder.encode(video, Tiling::Off).unwrap());
    assert_eq!(difference(&a, &b), 0.0);
    let (a, b) = (pth.decode(&a, Tiling::Off).unwrap(), folder.decode(&b, Tiling::Off).unwrap());
    assert_eq!(difference(&a, &b), 0.0);
}

/// A GPU cuts a larger product into other pieces and sums them in another order, layer after layer: the bound of the
/// golden values.
const REGROUPED: f32 = 2e-5;

#[test]
fn a_batch_equals_its_clips_one_by_one() {
    let (vae, io) = (CASES[0].vae(), CASES[0].tensors("io"));
    let a = &io["video_5"];
    let b = (a * -0.5).unwrap();
    let both = vae.encode(&Tensor::cat(&[a, &b], 0).unwrap(), Tiling::Off).unwrap();
    let alone = vae.encode(&b, Tiling::Off).unwrap();
    assert!(difference(&both.narrow(0, 1, 1).unwrap(), &alone) <= REGROUPED);
    let (decoded, alone) =
        (vae.decode(&both, Tiling::Off).unwrap(), vae.decode(&alone, Tiling::Off).unwrap());
    assert!(difference(&decoded.narrow(0, 1, 1).unwrap(), &alone) <= REGROUPED);
}

/// Root of the mean squared error over that of the expected values.
fn relative_rms(got: &Tensor, expected: &Tensor) -> f32 {
    let mean = |x: Tensor| x.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
    (mean((got - expected).unwrap()) / mean(expected.clone())).sqrt()
}

/// A part rounds to 9 bits, 0.001 to 0.002 rms, and some 50 parts stand in a row: 0.008 to 0.016 were seen, where a
/// defect of one part gives 0.1 and more.
const BF16: f32 = 0.025;

#[test]
fn bf16_stays_near_f32() {
    for case in CASES {
        let io = case.tensors("io");
        let vae = Vae::load(&fixture(case.weights), None, DType::BF16, &device()).unwrap();
        let latents = relative_rms(&vae.encode(&io["video_9"], Tiling::Off).unwrap(), &io["latents_9"]);
        let video = relative_rms(&vae.decode(&io["z_9"], Tiling::Off).unwrap(), &io["decoded_9"]);
        assert!(latents <= BF16 && video <= BF16, "{}: latents {latents}, video {video}", case.folder);
    }
}

#[test]
fn clips_that_do_not_fit_are_refused_not_cut() {
    let vae = CASES[0].vae();
    let encode = |shape: &[usize]| {
        let video = Tensor::zeros(shape, DType::F32, &device()).unwrap();
        vae.encode(&video, Tiling::Off).unwrap_err().to_string()
    };
    assert!(encode(&[1, 3, 7, 16, 16]).contains("7 frames are not 4n+1; cut the clip to 5 frames"));
    assert!(encode(&[1, 3, 5, 20, 16]).contains("multiples of 8"));
    assert!(encode(&[1, 4, 5, 16, 16]).contains("[batch, 3, frames, height, width]"));
    let latents = Tensor::zeros((1, 8, 1, 2, 2), DType::F32, &device()).unwrap();
    assert!(vae.decode(&latents, Tiling::Off).unwrap_err().to_string().contains("[B, 16, T, H, W]"));
    let other = fixture("repo_official_a14b/models_t5_umt5-xxl-enc-bf16.pth");
    let error = Vae::load(&other, None, DType::F32, &device()).unwrap_err().to_string();
    assert!(error.contains("this is not a Wan VAE"), "{error}");
}

//! The VAEs equal the published ones: latents, pixels, every stage of every chunk, tiles.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use kernels::ledger::Ledger;
use kernels::transfer::Route;
use kernels::{DType, Device, ShadowAttention, ShadowGpu, Tensor};
use models::vae::{Bands, Generation, Sizes, Tiles, Tiling, Vae, latent_frames};
use proofs::{device, fixture};
use trainer::machine::forecast::{Engine, decoding};

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

/// The frames of `latents` as they come, piece by piece.
fn pieces(vae: &Vae, latents: &Tensor, tiling: Tiling) -> (Vec<Vec<u8>>, models::Result<()>) {
    let mut pieces = Vec::new();
    let done = vae.decode_frames(latents, tiling, &mut |frames| {
        pieces.push(frames);
        ControlFlow::Continue(())
    });
    (pieces, done)
}

/// What leaves the device in 8 bits while the next frames are computed is what the whole video is when it is rounded at the end.
#[test]
fn frames_that_leave_one_by_one_equal_the_whole_video() {
    let tiles = Tiling::On(Tiles { size: (32, 32), stride: (16, 16) });
    for case in CASES {
        for dtype in [DType::F32, DType::BF16] {
            let vae = Vae::load(&fixture(case.weights), None, dtype, &device()).unwrap();
            let (z, ratio) = (vae.sizes().latent, vae.sizes().spatial_ratio());
            for (frames, tiling) in [(1, Tiling::Off), (5, Tiling::Off), (3, tiles)] {
                let latents = (proofs::randn("frames", (1, z, frames, 5, 3)) * 1.5).unwrap();
                let video = vae.decode(&latents, tiling).unwrap().to_device(&Device::Cpu).unwrap();
                let planes: Vec<f32> = video.flatten_all().unwrap().to_vec1().unwrap();
                let (width, height) = (3 * ratio, 5 * ratio);
                let film = data::Film::from_planes(width as u32, height as u32, &planes).unwrap();
                let (pieces, done) = pieces(&vae, &latents, tiling);
                done.unwrap();
                assert_eq!(pieces[0].len(), if tiling == Tiling::Off { 1 } else { 4 } * width * height * 3);
                let whole: Vec<u8> = film.frames().flatten().copied().collect();
                assert!(pieces.concat() == whole, "{} {dtype:?} {frames} {tiling:?}", case.folder);
                assert!(whole.iter().any(|byte| (1..255).contains(byte)), "every number was clipped");
            }
        }
    }
}

/// A damaged piece is refused before anyone sees it, though the next one is under way by then; those before it were given.
#[test]
fn frames_that_are_not_finite_do_not_leave_and_a_reader_may_stop() {
    let vae = CASES[0].vae();
    let good = proofs::randn("good", (1, 16, 3, 2, 2));
    let bad = Tensor::full(f32::NAN, (1, 16, 1, 2, 2), &device()).unwrap();
    let latents = Tensor::cat(&[&good, &bad, &good], 2).unwrap();
    let (pieces, done) = pieces(&vae, &latents, Tiling::Off);
    assert_eq!(pieces.len(), 3);
    assert!(matches!(done, Err(models::Error::NotFinite { .. })), "{done:?}");
    let mut seen = 0;
    let stop = vae.decode_frames(&good, Tiling::Off, &mut |_| {
        seen += 1;
        ControlFlow::Break(())
    });
    stop.unwrap();
    assert_eq!(seen, 1);
}

/// Bands of rows, of heights that do not divide and down to a single row, exchange all that one device sees, in the order in which
/// it sums: every bit of every pixel is the same. Every second band is on another GPU where there is one.
#[test]
fn bands_decode_as_one_device_bit_for_bit() {
    for case in CASES {
        for dtype in [DType::F32, DType::BF16] {
            let vae = Arc::new(Vae::load(&fixture(case.weights), None, dtype, &device()).unwrap());
            let other = Arc::new(vae.copied_to(&proofs::second_device()).unwrap());
            for (height, width) in [(5, 3), (7, 2), (11, 4)] {
                let latents = proofs::randn("bands", (1, vae.sizes().latent, 3, height, width));
                let whole = vae.decode(&latents, Tiling::Off).unwrap();
                let (frames, done) = pieces(&vae, &latents, Tiling::Off);
                done.unwrap();
                for count in [2, 3, 5] {
                    let vaes = (0..count).map(|i| if i % 2 == 0 { vae.clone() } else { other.clone() });
                    let bands = Bands::new(vaes.collect(), Route::Auto).unwrap();
                    let what = format!("{} {dtype:?} {height}x{width} in {count}", case.folder);
                    proofs::assert_same_bits(&what, &bands.decode(&latents).unwrap(), &whole);
                    let mut got = Vec::new();
                    let sink = &mut |piece| {
                        got.push(piece);
                        ControlFlow::Continue(())
                    };
                    bands.decode_frames(&latents, Tiling::Off, sink).unwrap();
                    assert!(got == frames, "{what}: frames differ");
                }
            }
        }
    }
}

/// A band whose numbers are damaged stops all of them with its own error, and a reader that has enough stops them without one.
#[test]
fn bands_stop_together() {
    let vae = Arc::new(CASES[0].vae());
    let bands = Bands::new(vec![vae; 3], Route::Auto).unwrap();
    let good = proofs::randn("good", (1, 16, 4, 6, 2));
    let rows = Tensor::full(f32::NAN, (1, 16, 4, 1, 2), &device()).unwrap();
    let bad = Tensor::cat(&[&good.narrow(3, 0, 5).unwrap(), &rows], 3).unwrap();
    let done = bands.decode_frames(&bad, Tiling::Off, &mut |_| ControlFlow::Continue(()));
    assert!(matches!(done, Err(models::Error::NotFinite { .. })), "{done:?}");
    let mut seen = 0;
    let stop = bands.decode_frames(&good, Tiling::Off, &mut |_| {
        seen += 1;
        ControlFlow::Break(())
    });
    stop.unwrap();
    assert_eq!(seen, 1);
    // What was under way is gone: the next clip begins anew.
    let (frames, _) = pieces(bands.first(), &good, Tiling::Off);
    let mut got = Vec::new();
    let sink = &mut |piece: Vec<u8>| {
        got.extend(piece);
        ControlFlow::Continue(())
    };
    bands.decode_frames(&good, Tiling::Off, sink).unwrap();
    assert!(got == frames.concat());
}

/// Two devices take little more than half each, and what plans count of them is what they take, up to the rows that are under way.
#[test]
fn bands_take_half_the_memory_each() {
    let (sizes, shape) = (Sizes::published(Generation::Wan21), (5, 60, 104));
    let peak = |count: usize| {
        let devices = vec![(Engine::Chunked, 0); count];
        decoding(&devices, (sizes, DType::BF16), shape, Tiling::Off).unwrap()
    };
    let (alone, two) = (peak(1)[0].peak as f64, peak(2));
    let weights = 0.27 * (1 << 30) as f64;
    for device in &two {
        let share = (device.peak as f64 - weights) / (alone - weights);
        assert!((0.45..0.62).contains(&share), "{share} of one device's: {two:?}");
    }
    let sizes = Sizes { encoder: 8, decoder: 8, ..sizes };
    let planned = decoding(&[(Engine::Cpu, 0); 3], (sizes, DType::F32), (3, 7, 4), Tiling::Off).unwrap();
    let ledgers = [(); 3].map(|()| Ledger::new(1));
    let vaes = ledgers.iter().map(|ledger| {
        Arc::new(Vae::seeded(sizes, 0, DType::F32, &Device::counted_cpu(ledger.clone())).unwrap())
    });
    let bands = Bands::new(vaes.collect(), Route::Auto).unwrap();
    let latents = Tensor::zeros((1, 16, 3, 7, 4), DType::F32, bands.first().device()).unwrap();
    bands.decode_frames(&latents, Tiling::Off, &mut |_| ControlFlow::Continue(())).unwrap();
    drop(latents);
    for (planned, ledger) in planned.iter().zip(&ledgers) {
        let (planned, taken) = (planned.peak as f64, ledger.peak() as f64);
        assert!((planned / taken - 1.0).abs() < 0.02, "{planned} of {taken}");
    }
}

/// At the sizes that people sample at, and no more for a longer clip.
#[test]
fn decoding_holds_what_two_pieces_take() {
    const GIB: u64 = 1 << 30;
    let peak = |generation, [frames, height, width]: [usize; 3]| {
        let ledger = Ledger::new(512);
        let gpu = ShadowGpu { index: 0, attention: ShadowAttention::Chunked };
        let device = Device::shadow_gpu(gpu, ledger.clone(), Ledger::new(1));
        let vae = Vae::seeded(Sizes::published(generation), 0, DType::BF16, &device).unwrap();
        let (z, ratio) = (vae.sizes().latent, vae.sizes().spatial_ratio());
        let shape = (1, z, latent_frames(frames), height / ratio, width / ratio);
        let latents = Tensor::zeros(shape, DType::F32, &device).unwrap();
        vae.decode_frames(&latents, Tiling::Off, &mut |_| ControlFlow::Continue(())).unwrap();
        ledger.peak()
    };
    let short = peak(Generation::Wan21, [81, 480, 832]);
    assert!(short <= 4 * GIB, "480p: {short} bytes");
    // The latents alone grow.
    assert!(peak(Generation::Wan21, [161, 480, 832]) <= short + GIB / 32);
    let large = peak(Generation::Wan21, [81, 720, 1280]);
    assert!(large <= 8 * GIB, "720p: {large} bytes");
    let other = peak(Generation::Wan22, [121, 704, 1280]);
    assert!(other <= 8 * GIB, "720p of Wan 2.2: {other} bytes");
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

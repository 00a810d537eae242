//! Helpers of the proofs: fixtures, tolerances, tiny models, random tensors.

pub mod autograd;
pub mod control;
pub mod events;
pub mod film;
pub mod hub;
pub mod project;
pub mod small;
pub mod sound;
pub mod source;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::OnceLock;

use kernels::random::Key;
use kernels::{DType, Device, Tensor};
use models::dit::animate::{FACES, MotionEncoder, POSE};
use models::dit::control::{CAMERA, CONTEXT, REFERENCE};
use models::dit::speech::{AUDIO, PAST};
use models::dit::{Base, Boundary, Context, Dit, DitConfig, NetworkInput, Role, Streams};
use models::weights::Weights;
use trainer::base::BaseModel;
use trainer::machine::forecast::{Decoding, Networks};
use trainer::residents::{Residency, Residents, Setup, WhenIdle};
use trainer::watch::ui::Ui;

/// The device that the proofs run on: the first GPU of a CUDA build, else the CPU. The bodies are the same.
///
/// It is opened once: a GPU that is opened twice counts as two devices, whose tensors do not mix.
pub fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let gpu = || kernels::device::open_gpu(0, &kernels::device::Settings::default()).unwrap();
    let open = || if cfg!(feature = "cuda") { gpu() } else { Device::Cpu };
    DEVICE.get_or_init(open).clone()
}

/// Another GPU than [`device`] where the machine has one, else [`device`] itself. Opened once, too.
pub fn second_device() -> Device {
    static SECOND: OnceLock<Device> = OnceLock::new();
    let open = || match device() {
        Device::Cpu => Device::Cpu,
        first => kernels::device::open_gpu(1, &kernels::device::Settings::default()).unwrap_or(first),
    };
    SECOND.get_or_init(open).clone()
}

/// The path of a fixture, beside the sources or, where the test binary travelled alone, below the working folder.
pub fn fixture(path: &str) -> PathBuf {
    let beside_sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let below_here = || std::env::current_dir().unwrap().join("tests/fixtures");
    let root = if beside_sources.is_dir() { beside_sources } else { below_here() };
    root.join(path)
}

/// All tensors of a fixture file.
pub fn fixture_tensors(path: &str) -> HashMap<String, Tensor> {
    let file = fixture(path);
    kernels::safetensors::load(&file, &device()).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

/// The JSON of a fixture file.
pub fn fixture_json(path: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(fixture(path)).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// How far a result may be from what is expected: absolute, or relative to the largest expected value.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    /// Largest absolute error.
    pub absolute: f64,
    /// Largest error relative to the largest expected value.
    pub relative: f64,
}

impl Tolerance {
    /// Only an absolute bound.
    pub const fn absolute(absolute: f64) -> Self {
        Self { absolute, relative: 0.0 }
    }

    /// Only a bound relative to the largest expected value.
    pub const fn relative(relative: f64) -> Self {
        Self { absolute: 0.0, relative }
    }
}

/// Largest absolute difference, and largest expected value.
pub fn difference(got: &Tensor, expected: &Tensor) -> (f64, f64) {
    assert_eq!(got.dims(), expected.dims(), "shapes differ");
    let values = |t: &Tensor| -> Vec<f64> {
        t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    };
    let (got, expected) = (values(got), values(expected));
    assert!(got.iter().all(|v| v.is_finite()), "the result has values that are not finite");
    let error = got.iter().zip(&expected).map(|(g, e)| (g - e).abs()).fold(0.0, f64::max);
    (error, expected.iter().map(|e| e.abs()).fold(0.0, f64::max))
}

/// Panics with the figures when `got` is further from `expected` than `tolerance`.
#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, expected: &Tensor, tolerance: Tolerance) {
    let (error, largest) = difference(got, expected);
    let bound = tolerance.absolute.max(tolerance.relative * largest);
    assert!(
        error <= bound,
        "{what}: error {error:.3e} exceeds {bound:.3e} (largest expected value {largest:.3e})"
    );
}

/// Panics unless the tensors have the same bits.
#[track_caller]
pub fn assert_same_bits(what: &str, got: &Tensor, expected: &Tensor) {
    let bits = |t: &Tensor| -> Vec<u32> {
        let values: Vec<f32> = t.flatten_all().unwrap().to_vec1().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    assert_eq!(got.dims(), expected.dims(), "{what}: shapes differ");
    assert!(bits(got) == bits(expected), "{what}: bits differ by {:?}", difference(got, expected));
}

/// Standard normal values of the stream `name`, f32 on the proofs' device.
pub fn randn(name: &str, shape: impl Into<kernels::Shape>) -> Tensor {
    let shape = shape.into();
    let values = Key::new(20, name, &[]).normals(shape.elem_count());
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_device(&device()).unwrap()
}

/// The kinds of DiT of the fixtures: text alone; a picture in channels behind the noise; the same with CLIP's view of it;
/// a picture in place of the first frame.
pub const DIT_KINDS: [&str; 4] = ["t2v", "i2v36", "i2v21", "ti2v"];

/// The tiny T2V model of the fixtures, read from the weights file of `layout` (`official` or `diffusers`).
pub fn tiny_weights(layout: &str) -> (DitConfig, Weights) {
    golden_weights("t2v", layout)
}

/// The tiny model of the fixtures of a kind of [`DIT_KINDS`], in a layout.
pub fn golden_weights(kind: &str, layout: &str) -> (DitConfig, Weights) {
    weights_in(&format!("dit/{kind}"), layout)
}

/// The tiny model in a folder of the fixtures, in a layout.
pub fn weights_in(folder: &str, layout: &str) -> (DitConfig, Weights) {
    let folder = fixture(folder);
    let config = std::fs::read_to_string(folder.join(format!("config_{layout}.json"))).unwrap();
    models::open_dit(&folder.join(format!("weights_{layout}.safetensors")), Some(&config)).unwrap()
}

/// The whole tiny T2V model on the proofs' device.
pub fn tiny_dit() -> Dit {
    golden_dit("t2v")
}

/// The whole tiny model of a kind on the proofs' device.
pub fn golden_dit(kind: &str) -> Dit {
    let (config, weights) = golden_weights(kind, "official");
    let layers = config.layers;
    Dit::load(&weights, &config, 0..layers, Base::F32, &device()).unwrap()
}

/// The network's input of a fixture's `io`: its latents, timestep and text, and what else the model reads.
pub fn golden_input(io: &HashMap<String, Tensor>) -> NetworkInput {
    let [x, timestep, text] = ["input", "timestep", "context"].map(|name| io[name].clone());
    let more = [
        ("clip_fea", Role::PICTURE),
        ("ref_latent", REFERENCE),
        ("camera", CAMERA),
        ("vace_context", CONTEXT),
        ("pose_latents", POSE),
        ("motion_vec", FACES),
        ("audio_embeds", AUDIO),
        ("motion_latents", PAST),
    ];
    let more = more.into_iter().filter_map(|(name, role)| Some((role, io.get(name)?.clone())));
    more.fold(NetworkInput::new(x, timestep, text), |input, (role, tensor)| input.with(role, tensor))
}

/// The tensors of a model's golden inputs and outputs; those of faces are also there as the motion that the network reads.
pub fn golden_io(folder: &str) -> HashMap<String, Tensor> {
    let mut io = fixture_tensors(&format!("{folder}/io.safetensors"));
    if let Some(latent) = io.get("ref_latent").filter(|latent| latent.rank() == 5) {
        io.insert("ref_latent".into(), latent.squeeze(2).unwrap());
    }
    if let Some(faces) = io.get("face_pixel_values") {
        let (config, weights) = weights_in(folder, "official");
        let sizes = &config.control.animate.unwrap().motion;
        let encoder = MotionEncoder::load(&weights, sizes, &device()).unwrap();
        io.insert("motion_vec".into(), encoder.forward(faces).unwrap());
    }
    io
}

/// The streams at the first layer of `dit`, and the context of its layers.
pub fn entered(dit: &Dit, input: &NetworkInput) -> (Streams, Context) {
    let Boundary { streams, cond } = dit.embedder.as_ref().unwrap().embed(input).unwrap();
    let context = dit.context(cond, input, streams.main.device()).unwrap();
    (streams, context)
}

/// The models of `model` on `device` alone, one at a time, and none loaded yet.
pub fn residents(model: &BaseModel, dit: &DitConfig, device: Device, ui: &Ui) -> Residents {
    let residency = Residency {
        networks: Networks::InTurn,
        decoding: Decoding::Alone,
        vae: WhenIdle::Park,
        clip_groups: std::num::NonZeroUsize::MIN,
    };
    Residents::new((model, dit), vec![(device, 0..dit.layers)], residency, Setup::default(), ui)
}

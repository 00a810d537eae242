//! S2V: the speech encoder's states, positions, and what audio becomes, against golden values.

use kernels::{DType, Device, Tensor};
use models::adapter::LoraConfig;
use models::dit::speech::{AUDIO, PAST};
use models::dit::{Architecture, Base, Dit, LayerId, Speech};
use proofs::{
    Tolerance, assert_close, device, entered, fixture, fixture_tensors, golden_input, golden_io, weights_in,
};

use crate::probe::Desk;

const FOLDER: &str = "s2v";
const OUTPUT: Tolerance = Tolerance::absolute(1.5e-4);
const ANGLES: Tolerance = Tolerance::absolute(1e-6);
const STATES: Tolerance = Tolerance::absolute(5e-5);

/// Normalised samples, and the states before and behind each layer, the last behind the encoder's own norm.
#[test]
fn states_of_speech_equal_golden_values() {
    let io = fixture_tensors("s2v/wav2vec/io.safetensors");
    let desk = Desk::with([("waveform_16k", &io["waveform_16k"])]);
    let model = fixture("s2v/wav2vec/weights_hf.safetensors").to_str().unwrap().to_owned();
    let got = desk.probe(&["audio", "--model", &model]);
    assert_close("samples", &got["input_values"], &io["input_values"], STATES);
    assert_close("states", &got["hidden_states"], &io["hidden_states"], STATES);
}

/// A weight norm of newer files is the same; audio that is shorter than a state is refused, and so is another kind of file.
#[test]
fn speech_encoders_of_other_files_are_the_same_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    let mut tensors = fixture_tensors("s2v/wav2vec/weights_hf.safetensors");
    let name = |end: &str| format!("wav2vec2.encoder.pos_conv_embed.conv.{end}");
    for (old, new) in [("weight_g", "original0"), ("weight_v", "original1")] {
        let tensor = tensors.remove(&name(old)).unwrap();
        tensors.insert(name(&format!("parametrizations.weight.{new}")), tensor);
    }
    tensors.insert("lm_head.bias".into(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    kernels::safetensors::save(&tensors, &file).unwrap();
    std::fs::copy(fixture("s2v/wav2vec/config.json"), folder.path().join("config.json")).unwrap();
    let encoder = models::wav2vec::SpeechEncoder::load(folder.path(), None, &device()).unwrap();
    let io = fixture_tensors("s2v/wav2vec/io.safetensors");
    let samples: Vec<f32> = io["waveform_16k"].to_vec1().unwrap();
    assert_close("states", &encoder.encode(&samples).unwrap(), &io["hidden_states"], STATES);
    let error = encoder.encode(&samples[..399]).unwrap_err().to_string();
    assert!(error.contains("399 samples is too short: 400"), "{error}");
    let other = fixture("s2v/weights_official.safetensors");
    let error = models::wav2vec::SpeechEncoder::load(&other, None, &device()).unwrap_err().to_string();
    assert!(error.contains("no wav2vec 2.0") && error.contains("weights_official"), "{error}");
}

/// As many tensors and numbers as the published checkpoint has.
#[test]
fn s2v_has_the_published_tensors() {
    let mut config = trainer::tools::bench::dit_preset("t2v-14b").unwrap();
    config.control.speech = Some(Speech::published());
    let tensors = config.tensors();
    let numbers: usize = tensors.iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
    assert_eq!((tensors.len(), numbers), (1260, 16_295_755_609));
    let after: Vec<usize> = (0..40).filter(|n| config.layers(*n).len() == 2).collect();
    assert_eq!(after, [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39]);
}

/// Rotary angles of the clip, the reference at time 30 and the past at negative times; audio in five tokens of each latent frame.
#[test]
fn positions_and_audio_equal_golden_values() {
    let (config, weights) = weights_in(FOLDER, "official");
    let dit = Dit::load(&weights, &config, 0..config.layers, Base::F32, &device()).unwrap();
    let io = golden_io(FOLDER);
    let (streams, context) = entered(&dit, &golden_input(&io));
    assert_close("cos", &context.positions.cos_lp, &io["rope_cos"], ANGLES);
    assert_close("sin", &context.positions.sin_lp, &io["rope_sin"], ANGLES);
    assert_close("tokens", &streams.main, &io["trace.tokens_in"], OUTPUT);
    let tokens = context.cond.require(AUDIO).unwrap();
    let expected = io["trace.audio_local"].narrow(1, 19, tokens.dim(1).unwrap()).unwrap();
    assert_close("audio", tokens, &expected, OUTPUT);
}

/// The first of several clips has no frames before it, and fewer tokens.
#[test]
fn the_past_can_be_left_out() {
    let io = fixture_tensors("s2v/io.safetensors");
    let desk = Desk::with(io.iter().map(|(name, tensor)| (name.as_str(), tensor)));
    let path = |name: &str| fixture(&format!("{FOLDER}/{name}")).to_str().unwrap().to_owned();
    let files = ["weights_official.safetensors", "config_official.json"].map(path);
    let words = ["dit", "--model", &files[0], "--config", &files[1], "--stages", "cpu,cpu", "--drop-motion"];
    assert_close("output", &desk.probe(&words)["output"], &io["output_drop_motion"], OUTPUT);
    let (config, weights) = weights_in(FOLDER, "official");
    let dit = Dit::load(&weights, &config, 0..config.layers, Base::F32, &device()).unwrap();
    let mut input = golden_input(&golden_io(FOLDER));
    let past = input.cond.take(PAST).unwrap();
    let (streams, _) = entered(&dit, &input);
    assert_eq!(streams.main.dim(1).unwrap(), config.tokens(3, 8, 8));
    input.cond.insert(PAST, past.narrow(2, 0, 5).unwrap());
    let error = dit.embedder.as_ref().unwrap().embed(&input).unwrap_err().to_string();
    assert!(error.contains("motion_latents") && error.contains("5 frames"), "{error}");
}

/// Default targets are those of the main blocks; injectors are trained by their own names alone.
#[test]
fn targets_mean_no_injector_unless_they_say_so() {
    let (config, _) = weights_in(FOLDER, "official");
    let of = |targets: &[&str]| {
        let targets = targets.iter().map(|target| (*target).to_owned()).collect();
        let lora = LoraConfig { targets, ..LoraConfig::default() };
        lora.select(&config.adaptable_modules()).unwrap().into_iter().map(|target| target.module)
    };
    let plain = LoraConfig::default().select(&config.adaptable_modules()).unwrap();
    assert_eq!(plain.len(), 10 * config.layers);
    assert!(plain.iter().all(|target| target.module.starts_with("blocks.")));
    assert!(of(&["*q"]).all(|module| module.starts_with("blocks.")));
    let injectors: Vec<String> = of(&["audio_injector.injector.*.[qkvo]"]).collect();
    assert_eq!(injectors.len(), 8);
    assert!(injectors.iter().all(|module| module.starts_with(LayerId::INJECTIONS)));
}

//! Animate: the motion of faces, its tokens, and the layout of diffusers, against golden values.

use std::collections::HashMap;

use kernels::{DType, Device, Tensor};
use models::dit::animate::{FACES, MotionEncoder, POSE};
use models::dit::{Base, Dit};
use proofs::small::velocities;
use proofs::{
    Tolerance, assert_close, assert_same_bits, device, entered, golden_input, golden_io, weights_in,
};

const FOLDER: &str = "animate";
const OUTPUT: Tolerance = Tolerance::absolute(1.5e-4);
/// The directions are computed in f64 here and in f32 there.
const DIRECTIONS: Tolerance = Tolerance::absolute(1e-5);

/// Directions with the signs of LAPACK's reflections, motion vectors of single frames, and five tokens of each latent frame, zeros
/// in the reference's.
#[test]
fn motion_and_face_tokens_equal_golden_values() {
    let (config, weights) = weights_in(FOLDER, "official");
    let io = golden_io(FOLDER);
    let sizes = &config.control.animate.as_ref().unwrap().motion;
    let encoder = MotionEncoder::load(&weights, sizes, &device()).unwrap();
    assert_close("Q", &encoder.directions().unwrap(), &io["motion_Q"], DIRECTIONS);
    let first = io["motion_vec"].narrow(1, 0, 8).unwrap().squeeze(0).unwrap();
    assert_close("motion", &first, &io["trace.motion_vec"], OUTPUT);

    let dit = Dit::load(&weights, &config, 0..config.layers, Base::F32, &device()).unwrap();
    let (_, context) = entered(&dit, &golden_input(&io));
    let tokens = context.cond.require(FACES).unwrap();
    let frames = tokens.dim(1).unwrap();
    assert_close("tokens", &tokens.narrow(1, 1, frames - 1).unwrap(), &io["trace.face_encoder"], OUTPUT);
    let reference = tokens.narrow(1, 0, 1).unwrap();
    assert_same_bits("reference", &reference, &reference.zeros_like().unwrap());
}

/// Keys and values are two layers there, biases have one axis, and the constants of the blur are left out.
#[test]
fn the_layout_of_diffusers_is_the_same_network() {
    let (config, weights) = weights_in(FOLDER, "official");
    let mut renamed: HashMap<String, Tensor> = HashMap::new();
    for spec in config.tensors() {
        let tensor = weights.tensor(&spec.name, DType::F32, &Device::Cpu).unwrap();
        let name = models::names::tensor_to_diffusers(&spec.name).unwrap();
        if let Some((layer, end)) = name.split_once("linear1_kv") {
            let rows = tensor.dim(0).unwrap() / 2;
            for (part, start) in [("to_k", 0), ("to_v", rows)] {
                let part = format!("{layer}{part}{end}");
                renamed.insert(part, tensor.narrow(0, start, rows).unwrap().contiguous().unwrap());
            }
        } else if name.ends_with("act_fn.bias") {
            renamed.insert(name, tensor.flatten_all().unwrap());
        } else {
            renamed.insert(name, tensor);
        }
    }
    for name in [
        "motion_encoder.conv_in.act_fn.bias",
        "motion_encoder.res_blocks.1.conv_skip.weight",
        "motion_encoder.motion_network.4.bias",
        "motion_encoder.motion_synthesis_weight",
        "face_encoder.conv1_local.weight",
        "face_adapter.1.to_out.bias",
        "face_adapter.0.norm_q.weight",
    ] {
        assert!(renamed.contains_key(name), "{name}");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    kernels::safetensors::save(&renamed, &file).unwrap();
    let (opened, other) = models::open_dit(&file, Some(r#"{"num_attention_heads":2}"#)).unwrap();
    assert_eq!(opened, config);
    let io = golden_io(FOLDER);
    let output = |weights| {
        let none = models::adapter::Adapters::default();
        let pipeline = proofs::small::pipeline(&config, weights, &none, &[config.layers]);
        velocities(&pipeline, &[golden_input(&io)]).remove(0)
    };
    assert_same_bits("output", &output(&other), &output(&weights));
    // Half of a pair is no layer.
    renamed.remove("face_adapter.1.to_v.weight");
    kernels::safetensors::save(&renamed, &file).unwrap();
    let error = models::open_dit(&file, Some(r#"{"num_attention_heads":2}"#)).unwrap_err().to_string();
    assert!(error.contains("face_adapter.1"), "{error}");
}

/// Poses have a frame less than the latents, whose first is the reference; faces have one for each frame of the clip.
#[test]
fn poses_and_faces_of_other_lengths_are_refused() {
    let (config, weights) = weights_in(FOLDER, "official");
    let dit = Dit::load(&weights, &config, 0..config.layers, Base::F32, &device()).unwrap();
    let refused = |role, frames: usize| {
        let mut input = golden_input(&golden_io(FOLDER));
        let axis = if role == POSE { 2 } else { 1 };
        let short = input.cond.take(role).unwrap().narrow(axis, 0, frames).unwrap();
        input.cond.insert(role, short);
        dit.embedder.as_ref().unwrap().embed(&input).unwrap_err().to_string()
    };
    let poses = refused(POSE, 2);
    assert!(poses.contains("pose_latents") && poses.contains("2 frames"), "{poses}");
    let faces = refused(FACES, 5);
    assert!(faces.contains("5 frames") && faces.contains("(9, 12)"), "{faces}");
}

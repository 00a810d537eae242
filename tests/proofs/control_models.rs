//! The published control models (Fun, VACE) against golden values: outputs, insides, gradients of inputs, training, and the
//! conditions from pixels.

use std::collections::HashMap;

use kernels::loss::{Terms, loss};
use kernels::transfer::HostStore;
use kernels::weight::Weight;
use kernels::{DType, Device, Tensor};
use models::adapter::{Adapters, LoraConfig, Target};
use models::dit::control::{CAMERA, HINT_SCALE, REFERENCE};
use models::dit::{
    Base, BlockPlan, Dit, Gradients, Keep, KeepPlace, Keeping, LayerId, Pass, SideChain, Streams,
};
use proofs::small::{adapters, pipeline, trained, uniform, velocities};
use proofs::{
    Tolerance, assert_close, assert_same_bits, device, entered, fixture, fixture_json, fixture_tensors,
    golden_input, golden_io, weights_in,
};
use trainer::encode::conditions::camera::Move;
use trainer::pipeline::{MicroBatch, Objective};

use crate::probe::Desk;

/// The bounds of the fixtures: sums in another order through embeddings, blocks and head.
const OUTPUT: Tolerance = Tolerance::absolute(1.5e-4);
const GRADIENT: Tolerance = Tolerance { absolute: 1e-12, relative: 1e-3 };

/// Adam turns the sign of a near-zero gradient into a whole step of 1e-2.
const TRAINED: Tolerance = Tolerance::absolute(2e-3);
const LATENTS: Tolerance = Tolerance::absolute(2e-5);

/// A model of each kind: Fun-Control with CLIP and a reference, of an expert without CLIP, Fun-Control-Camera, VACE, Animate,
/// S2V.
const MODELS: [&str; 6] = ["fun/control11", "fun/control22", "fun/camera11", "vace", "animate", "s2v"];

fn whole(folder: &str) -> (Dit, HashMap<String, Tensor>) {
    let (config, weights) = weights_in(folder, "official");
    let layers = config.layers;
    let dit = Dit::load(&weights, &config, 0..layers, Base::F32, &device()).unwrap();
    (dit, golden_io(folder))
}

/// The velocity, and the streams behind the embeddings and behind each layer.
fn forward(dit: &Dit, io: &HashMap<String, Tensor>) -> (Tensor, Vec<Streams>) {
    let (none, input) = (Adapters::default(), golden_input(io));
    let (mut streams, context) = entered(dit, &input);
    let mut traces = vec![streams.clone()];
    for layer in &dit.layers {
        streams = layer.forward(streams, &context, &Pass::new(&none, None), Keep::Input).unwrap().0;
        traces.push(streams.clone());
    }
    (dit.head.as_ref().unwrap().forward(&streams.main, &context).unwrap(), traces)
}

/// Output, the stream that enters the blocks with the tokens in front of it, and the stream behind each block with all that is added
/// to it there.
#[test]
fn outputs_and_insides_equal_golden_values() {
    for folder in MODELS {
        let (dit, io) = whole(folder);
        let (output, traces) = forward(&dit, &io);
        assert_close(folder, &output, &io["output"], OUTPUT);
        if let Some(expected) = io.get("trace.tokens_in") {
            assert_close(&format!("{folder}, tokens"), &traces[0].main, expected, OUTPUT);
        }
        for block in 0..dit.config.layers {
            // The last layer that follows the block.
            let layers = dit.architecture().all_layers();
            let ends = (0..layers.len()).rev().find(|&i| {
                layers[..=i].iter().filter(|id| id.chain() == LayerId::BLOCKS).count() == block + 1
            });
            let name = format!("trace.block{block}");
            let behind = &traces[ends.unwrap() + 1].main;
            match io.get(&name) {
                Some(expected) => assert_close(&format!("{folder}, {name}"), behind, expected, OUTPUT),
                None if folder == "s2v" => {
                    let expected = &io[&format!("{name}.video_tokens")];
                    let clip = behind.narrow(1, 0, expected.dim(1).unwrap()).unwrap();
                    assert_close(&format!("{folder}, {name}"), &clip, expected, OUTPUT);
                }
                // Of Animate only those around face blocks are stored.
                None => assert!(folder == "animate" && ![0, 4, 5, 8, 9].contains(&block), "{name}"),
            }
        }
        let of_side = dit
            .layers
            .iter()
            .zip(&traces[1..])
            .filter(|(layer, _)| layer.id().chain() == LayerId::SIDE_BLOCKS);
        for (layer, behind) in of_side {
            let name = format!("trace.vace_block{}", layer.id().index());
            if let Some((_, side)) = behind.sides().next() {
                assert_close(&name, side, &io[&name], OUTPUT);
            }
        }
    }
}

/// What the side chain adds is multiplied by a factor.
#[test]
fn hints_of_the_side_chain_are_scaled() {
    let (mut config, weights) = weights_in("vace", "official");
    let io = fixture_tensors("vace/io.safetensors");
    config.control.side_chain = config.control.side_chain.map(|chain| SideChain { scale: 0.7, ..chain });
    let dit = Dit::load(&weights, &config, 0..3, Base::F32, &device()).unwrap();
    assert_close("output", &forward(&dit, &io).0, &io["output_scale0.7"], OUTPUT);
    // By a factor of each sample's own, which crosses the boundary between stages.
    let (config, weights) = weights_in("vace", "official");
    let none = Adapters::default();
    let scale = Tensor::new(&[0.7f32], &device()).unwrap();
    let input = [golden_input(&io).with(HINT_SCALE, scale)];
    let split = pipeline(&config, &weights, &none, &[1, config.layers - 1]);
    assert_close("own", &velocities(&split, &input)[0], &io["output_scale0.7"], OUTPUT);
}

/// The gradient of patches [b, c, t, h, w] from that of their tokens [b, l, d].
fn patches_backward(
    d_tokens: &Tensor,
    weight: &Tensor,
    [channels, frames, height, width]: [usize; 4],
) -> Tensor {
    let weight = Weight::Dense(weight.flatten_from(1).unwrap());
    let d = kernels::linear::backward_input(&d_tokens.contiguous().unwrap(), &weight, None).unwrap();
    d.reshape(&[1, frames, height / 2, width / 2, channels, 2, 2][..])
        .unwrap()
        .permute([0, 4, 1, 2, 5, 3, 6])
        .unwrap()
        .contiguous()
        .unwrap()
        .reshape((1, channels, frames, height, width))
        .unwrap()
}

/// The gradients of the streams at the first layer, of the mean squared error.
fn backward(dit: &Dit, io: &HashMap<String, Tensor>) -> Streams {
    let (none, input) = (Adapters::default(), golden_input(io));
    let pass = Pass::new(&none, None);
    let (streams, context) = entered(dit, &input);
    let plans = dit.architecture().all_layers().into_iter().map(|id| (id, BlockPlan::default())).collect();
    let keeping = Keeping { plans: &plans, store: &HostStore::new(&device()).unwrap() };
    let (streams, kept) = dit.through_keeping(streams, &context, &pass, &keeping).unwrap();
    let head = dit.head.as_ref().unwrap();
    let prediction = head.forward(&streams.main, &context).unwrap();
    let loss = {
        let ones = Tensor::ones(1, DType::F32, &device()).unwrap();
        loss(&prediction, &io["target"], &Terms::squares(&ones, None)).unwrap()
    };
    let dy = head.backward(&streams.main, &loss.d_prediction, &context).unwrap();
    dit.backward(kept, Streams::new(dy), &context, &pass, &mut Gradients::default()).unwrap()
}

/// Gradients of the noisy latents and of every other channel, of a reference picture through its tokens in front, and of the side
/// chain's context through all hints.
#[test]
fn gradients_of_inputs_equal_golden_values() {
    for folder in MODELS {
        let (dit, io) = whole(folder);
        let weights = weights_in(folder, "official").1;
        let read = |name: &str| weights.tensor(name, DType::F32, &device()).unwrap();
        let mut d = backward(&dit, &io);
        let side = d.sides().map(|(_, side)| side.clone()).next();
        if let Some(d_side) = side {
            // The side stream begins as what the context becomes, and the main stream.
            d.main = (&d.main + &d_side).unwrap();
            let before = Weight::Dense(read("vace_blocks.0.before_proj.weight"));
            let d_context = kernels::linear::backward_input(&d_side, &before, None).unwrap();
            let patch = read("vace_patch_embedding.weight");
            let got = patches_backward(&d_context, &patch, [96, 3, 8, 6]);
            assert_close("context", &got, &io["grad.vace_context"], GRADIENT);
        }
        let (_, channels, frames, height, width) = io["input"].dims5().unwrap();
        let mut d_tokens = d.main;
        if folder == "s2v" {
            // The clip's tokens are in front, the reference's behind them.
            let (clip, of_frame) = (frames * height / 2 * (width / 2), height / 2 * (width / 2));
            let patch = |name: &str, start: usize, count: usize, frames: usize| {
                let d = d_tokens.narrow(1, start, count).unwrap();
                patches_backward(&d, &read(name), [16, frames, height, width])
            };
            let poses = patch("cond_encoder.weight", 0, clip, frames);
            assert_close(folder, &poses, &io["grad.pose_latents"], GRADIENT);
            let reference = patch("patch_embedding.weight", clip, of_frame, 1);
            assert_close(folder, &reference, &io["grad.ref_latent"], GRADIENT);
            d_tokens = d_tokens.narrow(1, 0, clip).unwrap();
        } else if let Some(expected) = io.get("grad.ref_latent") {
            let in_front = height / 2 * (width / 2);
            let d_reference = d_tokens.narrow(1, 0, in_front).unwrap();
            d_tokens = d_tokens.narrow(1, in_front, frames * in_front).unwrap();
            let got = patches_backward(&d_reference, &read("ref_conv.weight"), [16, 1, height, width]);
            assert_close(folder, &got.squeeze(2).unwrap(), expected, GRADIENT);
        }
        if let (Some(expected), true) = (io.get("grad.pose_latents"), folder == "animate") {
            let of_frame = height / 2 * (width / 2);
            let d_poses = d_tokens.narrow(1, of_frame, (frames - 1) * of_frame).unwrap();
            let shape = [16, frames - 1, height, width];
            let got = patches_backward(&d_poses, &read("pose_patch_embedding.weight"), shape);
            assert_close(folder, &got, expected, GRADIENT);
        }
        let patch = read("patch_embedding.weight");
        let got = patches_backward(&d_tokens, &patch, [channels, frames, height, width]);
        assert_close(folder, &got.narrow(1, 0, 16).unwrap(), &io["grad.latents"], GRADIENT);
        if channels > 16 {
            assert_close(folder, &got.narrow(1, 16, channels - 16).unwrap(), &io["grad.y"], GRADIENT);
        }
    }
}

fn batch(io: &HashMap<String, Tensor>) -> MicroBatch {
    MicroBatch {
        input: golden_input(io),
        target: io["target"].clone(),
        weights: vec![1.0],
        mask: None,
        objective: Objective::default(),
        dropout: None,
    }
}

/// Splits before, within and behind the side chain, and everything that is kept of it, in every place: the same bits.
#[test]
fn splits_and_kept_activations_change_no_bit() {
    for folder in MODELS {
        let (config, weights) = weights_in(folder, "official");
        let io = golden_io(folder);
        let (all, input) = (adapters(&config, 3, 0.6), [golden_input(&io)]);
        let one = pipeline(&config, &weights, &all, &[config.layers]);
        let expected = velocities(&one, &input).remove(0);
        let (losses, gradients) = trained(&one, &[batch(&io)], BlockPlan::default());
        assert_eq!(gradients.len(), 2 * config.adaptable_modules().len());
        let split = pipeline(&config, &weights, &all, &[1, config.layers - 1]);
        assert_same_bits(folder, &velocities(&split, &input)[0], &expected);
        for (keep, place) in [
            (Keep::Input, KeepPlace::Device),
            (Keep::Attention, KeepPlace::Host),
            (Keep::All, KeepPlace::HostUntilUsed),
        ] {
            let plan = BlockPlan { keep, place };
            assert!(uniform(&split, plan).of(LayerId::block(0)).is_ok());
            let (got, found) = trained(&split, &[batch(&io)], plan);
            assert_eq!(got, losses, "{folder}, {plan:?}");
            for (name, gradient) in &gradients {
                assert_same_bits(&format!("{folder}, {name}"), &found[name], gradient);
            }
        }
    }
}

/// The five steps of the fixtures, by the command that others compare with: on one stage and on two.
#[test]
fn training_gives_the_golden_losses_gradients_and_factors() {
    for folder in MODELS {
        let mut tensors = fixture_tensors(&format!("{folder}/io.safetensors"));
        let golden = fixture_tensors(&format!("{folder}/lora_train.safetensors"));
        let plan = fixture_json(&format!("{folder}/lora_train.json"));
        let numbers = |key: &str| -> Tensor {
            let all = plan[key].as_array().unwrap().iter();
            let all: Vec<f32> = all.map(|number| number.as_f64().unwrap() as f32).collect();
            Tensor::new(all.as_slice(), &Device::Cpu).unwrap()
        };
        tensors.insert("sigmas".into(), numbers("sigmas"));
        let is_start = |name: &str| name.starts_with("init.");
        tensors.extend(golden.iter().filter(|(name, _)| is_start(name)).map(|(n, t)| (n.clone(), t.clone())));
        let desk = Desk::with(tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)));
        let path = |name: &str| fixture(&format!("{folder}/{name}")).to_str().unwrap().to_owned();
        let files = ["weights_official.safetensors", "config_official.json", "lora_train.json"].map(path);
        for stages in ["cpu", "cpu,cpu"] {
            let got = desk.probe(&[
                "train",
                "--model",
                &files[0],
                "--config",
                &files[1],
                "--train-config",
                &files[2],
                "--stages",
                stages,
            ]);
            assert_close(folder, &got["losses"], &numbers("losses"), Tolerance::absolute(1e-4));
            assert_close(folder, &got["grad_norms"], &numbers("grad_norms"), Tolerance::relative(1e-3));
            for (name, expected) in golden.iter().filter(|(name, _)| !is_start(name)) {
                let tolerance = if name.starts_with("grad0.") { GRADIENT } else { TRAINED };
                assert_close(&format!("{folder}, {name}"), &got[name], expected, tolerance);
            }
        }
    }
}

/// The network by the command that others compare with, which reads the fixtures by their names.
#[test]
fn probes_give_the_golden_outputs_of_control_models() {
    for folder in MODELS {
        let io = fixture_tensors(&format!("{folder}/io.safetensors"));
        let desk = Desk::with(io.iter().map(|(name, tensor)| (name.as_str(), tensor)));
        let path = |name: &str| fixture(&format!("{folder}/{name}")).to_str().unwrap().to_owned();
        let files = ["weights_official.safetensors", "config_official.json"].map(path);
        let words = ["dit", "--model", &files[0], "--config", &files[1], "--stages", "cpu,cpu"];
        assert_close(folder, &desk.probe(&words)["output"], &io["output"], OUTPUT);
    }
}

/// Every condition from pixels, masks and poses, in the order of channels of each model.
#[test]
fn conditions_from_pixels_equal_golden_values() {
    let vae = fixture("repo_official_a14b/Wan2.1_VAE.pth").to_str().unwrap().to_owned();
    let config = fixture("vae21/config.json").to_str().unwrap().to_owned();
    let words = ["condition", "--model", &vae, "--config", &config];
    let golden = fixture_tensors("fun/cond.safetensors");
    let desk = Desk::with(golden.iter().map(|(name, tensor)| (name.as_str(), tensor)));
    let got = desk.probe(&words);
    let inputs = ["video", "mask", "mask_first_frame", "control_video", "start_image", "ref_image"];
    let is_input = |name: &str| inputs.contains(&name) || name.starts_with("poses");
    for (name, expected) in golden.iter().filter(|(name, _)| !is_input(name)) {
        let tolerance = match name.as_str() {
            name if name.starts_with("mask_") => Tolerance::absolute(1e-6),
            name if name.starts_with("camera") || name.starts_with("pluecker") => Tolerance::absolute(1e-5),
            _ => LATENTS,
        };
        assert_close(name, &got[name], expected, tolerance);
    }
    // A named move is a path of its own.
    let left: Vec<Vec<f64>> = golden["poses_left"].to_dtype(DType::F64).unwrap().to_vec2().unwrap();
    let own = Move::Left.poses(left.len());
    let gap =
        |(a, b): (&Vec<f64>, &[f64; 19])| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(left.iter().zip(&own).map(gap).all(|gap| gap < 1e-7));

    let golden = fixture_tensors("animate/cond.safetensors");
    let desk = Desk::with(golden.iter().map(|(name, tensor)| (name.as_str(), tensor)));
    let got = desk.probe(&words);
    for name in ["pose_latents", "y_move_first", "y_move_next", "y_replace_first", "y_replace_next"] {
        assert_close(name, &got[name], &golden[name], LATENTS);
        if name.starts_with("y_") {
            let mask = |x: &Tensor| x.narrow(1, 0, 4).unwrap().contiguous().unwrap();
            assert_same_bits(name, &mask(&got[name]), &mask(&golden[name]));
        }
    }

    let golden = fixture_tensors("s2v/cond.safetensors");
    let desk = Desk::with(golden.iter().map(|(name, tensor)| (name.as_str(), tensor)));
    let got = desk.probe(&[&words[..], &["--clip-frames", "12"]].concat());
    for name in ["ref_latent", "pose_latents", "motion_latents"] {
        assert_close(name, &got[name], &golden[name], LATENTS);
    }
    for name in ["audio_hidden_30hz", "audio_clips"] {
        assert_close(name, &got[name], &golden[name], Tolerance::absolute(1e-6));
    }

    let golden = fixture_tensors("vace/cond.safetensors");
    let desk = Desk::with(golden.iter().map(|(name, tensor)| (name.as_str(), tensor)));
    for (more, name) in [
        (&[][..], "vace_context"),
        (&["--reference", "ref_a", "--reference", "ref_b"], "vace_context_refs_a_b"),
        (&["--reference", "ref_small"], "vace_context_ref_small"),
        (&["--no-video", "--reference", "ref_a"], "vace_context_no_video_ref_a"),
    ] {
        let got = desk.probe(&[&words, more].concat());
        assert_close(name, &got["vace_context"], &golden[name], LATENTS);
        let mask = |x: &Tensor| x.narrow(1, 32, 64).unwrap().contiguous().unwrap();
        assert_same_bits(name, &mask(&got["vace_context"]), &mask(&golden[name]));
        if let Some(canvas) = got.get("ref_small_canvas") {
            assert_close("canvas", canvas, &golden["ref_small_canvas"], Tolerance::absolute(1e-5));
        }
    }
}

/// The tensors of a model by the names of diffusers are the same model, its side chain included.
#[test]
fn the_side_chain_is_read_from_both_layouts() {
    let (config, weights) = weights_in("vace", "official");
    let renamed = config.tensors().into_iter().map(|spec| {
        let name = models::names::tensor_to_diffusers(&spec.name).unwrap();
        (name, weights.tensor(&spec.name, DType::F32, &Device::Cpu).unwrap())
    });
    let renamed: HashMap<String, Tensor> = renamed.collect();
    let names = ["vace_blocks.0.proj_in.weight", "vace_blocks.1.proj_out.bias", "vace_blocks.1.norm2.bias"];
    assert!(names.iter().all(|name| renamed.contains_key(*name)));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    kernels::safetensors::save(&renamed, &file).unwrap();
    // As diffusers writes it.
    let told = r#"{"num_attention_heads":2,"vace_layers":[0,2],"vace_in_channels":96}"#;
    let (opened, weights) = models::open_dit(&file, Some(told)).unwrap();
    assert_eq!(opened, config);
    let io = fixture_tensors("vace/io.safetensors");
    let dit = Dit::load(&weights, &opened, 0..3, Base::F32, &device()).unwrap();
    assert_same_bits("output", &forward(&dit, &io).0, &forward(&whole("vace").0, &io).0);
    // Without a list in the config the side blocks are spread evenly; a list that does not fit them is refused.
    let (spread, _) = models::open_dit(&file, Some(r#"{"num_heads":2}"#)).unwrap();
    assert_eq!(spread, config);
    let error = models::open_dit(&file, Some(r#"{"num_heads":2,"vace_layers":[0]}"#)).unwrap_err();
    assert!(error.to_string().contains("2 vace_blocks do not fit"), "{error}");
}

/// Targets without a chain mean the side chain, which control is learnt in; with one, that chain.
#[test]
fn targets_name_the_side_chain_or_the_main_blocks() {
    let (config, _) = weights_in("vace", "official");
    let of = |targets: &[&str]| -> Vec<Target> {
        let targets = targets.iter().map(|target| (*target).to_owned()).collect();
        let lora = LoraConfig { targets, ..LoraConfig::default() };
        lora.select(&config.adaptable_modules()).unwrap()
    };
    let side = of(&["vace_blocks.*.self_attn.[qkvo]"]);
    assert_eq!(side.len(), 8);
    assert!(side.iter().all(|target| target.module.starts_with("vace_blocks.")));
    assert!(of(&["blocks.*.ffn.0"]).iter().all(|target| target.module.starts_with("blocks.")));
    assert!(of(&["ffn.0"]).iter().all(|target| target.module.starts_with("vace_blocks.")));
    assert_eq!(of(&["blocks.*.ffn.0", "ffn.0"]).len(), 5);
    assert_eq!(of(&["after_proj"]).len(), 2);
}

/// Conditions that a model reads and was not given, or of another size than the clip, are refused by their names.
#[test]
fn missing_and_misshapen_conditions_are_refused() {
    let refused = |folder: &str, change: &dyn Fn(&mut models::dit::NetworkInput)| {
        let (dit, io) = whole(folder);
        let mut input = golden_input(&io);
        change(&mut input);
        dit.embedder.as_ref().unwrap().embed(&input).unwrap_err().to_string()
    };
    let missing = refused("fun/control11", &|input| drop(input.cond.take(REFERENCE)));
    assert!(missing.contains("ref_latent") && missing.contains("was given none"), "{missing}");
    let short = refused("fun/camera11", &|input| {
        let camera = input.cond.take(CAMERA).unwrap().narrow(2, 0, 1).unwrap();
        input.cond.insert(CAMERA, camera);
    });
    assert!(short.contains("[1, 24, 2, 48, 32] is expected"), "{short}");
    let unread = refused("vace", &|input| {
        input.cond.insert(REFERENCE, Tensor::zeros((1, 16, 8, 6), DType::F32, &device()).unwrap());
    });
    assert!(unread.contains("does not read"), "{unread}");
}

//! The DiT against golden values: outputs, insides, gradients and five steps of LoRA training by PEFT.

use std::collections::{BTreeMap, HashMap};

use kernels::loss::Terms;
use kernels::optimiser::State;
use kernels::transfer::HostStore;
use kernels::{DType, Device, Tensor, adamw};
use models::adapter::{Adapter, Adapters};
use models::dit::ffn::{Chunk, chunks};
use models::dit::{
    Base, BlockPlan, Conditioning, Dit, DitConfig, Dropout, Gradients, ImageBranch, Keep, KeepPlace, Keeping,
    LayerId, NetworkInput, Pass, Raw, Role, Streams, embed, rope,
};
use models::names;
use models::weights::Weights;
use proofs::{
    DIT_KINDS, Tolerance, assert_close, assert_same_bits, device, difference, entered, fixture_json,
    fixture_tensors, golden_dit, golden_weights, randn, tiny_dit,
};

/// f32 sums in another order: the fixtures' own cross-check (official code against diffusers) shows 1.6e-5.
const OUTPUT: Tolerance = Tolerance::absolute(1.5e-4);

fn pass(adapters: &Adapters) -> Pass<'_> {
    Pass::new(adapters, None)
}

/// What a network is shown.
#[derive(Clone, Copy)]
struct Shown<'a> {
    x: &'a Tensor,
    timestep: &'a Tensor,
    context: &'a Tensor,
    picture: Option<&'a Tensor>,
}

impl<'a> Shown<'a> {
    fn new(x: &'a Tensor, timestep: &'a Tensor, context: &'a Tensor) -> Self {
        Self { x, timestep, context, picture: None }
    }

    /// The first step of the fixtures.
    fn golden(io: &'a HashMap<String, Tensor>) -> Self {
        let picture = io.get("clip_fea");
        Self { picture, ..Self::new(&io["input"], &io["timestep"], &io["context"]) }
    }

    fn input(&self) -> NetworkInput {
        let input = NetworkInput::new(self.x.clone(), self.timestep.clone(), self.context.clone());
        match self.picture {
            Some(states) => input.with(Role::PICTURE, states.clone()),
            None => input,
        }
    }
}

/// The velocity of a whole model on one device, with every block's output.
fn forward(dit: &Dit, shown: &Shown, pass: &Pass) -> (Tensor, Vec<Tensor>) {
    let (mut streams, context) = entered(dit, &shown.input());
    let mut traces = vec![streams.main.clone()];
    for layer in &dit.layers {
        streams = layer.forward(streams, &context, pass, Keep::Input).unwrap().0;
        traces.push(streams.main.clone());
    }
    (dit.head.as_ref().unwrap().forward(&streams.main, &context).unwrap(), traces)
}

#[test]
fn output_and_blocks_equal_golden_values() {
    for kind in DIT_KINDS {
        let (dit, io) = (golden_dit(kind), fixture_tensors(&format!("dit/{kind}/io.safetensors")));
        let none = Adapters::default();
        let (output, traces) = forward(&dit, &Shown::golden(&io), &pass(&none));
        assert_close(&format!("{kind}, output"), &output, &io["output"], OUTPUT);
        assert_close(&format!("{kind}, block 0"), &traces[1], &io["trace.block0"], OUTPUT);
        assert_close(&format!("{kind}, block 1"), &traces[2], &io["trace.block1"], OUTPUT);
    }
}

/// Modulation is stored for each frame that has a time of its own, never for each token: at 720p that would be gigabytes.
#[test]
fn tokens_of_a_frame_share_their_modulation() {
    let (dit, io) = (golden_dit("ti2v"), fixture_tensors("dit/ti2v/io.safetensors"));
    let (_, context) = entered(&dit, &Shown::golden(&io).input());
    assert_eq!(context.cond.require(Role::MODULATION).unwrap().dims(), [1, 3, 6, 32]);
}

/// A model that looks at two pictures adds positions to their states, and is otherwise the model of one: with positions
/// of zero it is that model on 514 rows, with others it is that model on the states moved by them.
#[test]
fn a_model_of_two_pictures_knows_which_is_which() {
    let (config, weights) = golden_weights("i2v21", "official");
    let io = fixture_tensors("dit/i2v21/io.safetensors");
    let read = |name: &str| weights.tensor(name, DType::F32, &device()).unwrap();
    let names: Vec<String> = weights.names().into_iter().map(str::to_owned).collect();
    let mut tensors: BTreeMap<String, Tensor> = names.iter().map(|name| (name.clone(), read(name))).collect();
    let positions = randn("positions", (1, 514, 20));
    tensors.insert("img_emb.emb_pos".into(), positions.clone());
    let image = config.image.map(|image| ImageBranch { positions: Some(514), ..image });
    let both = DitConfig { image, ..config };
    let specs: Vec<String> = both.tensors().into_iter().map(|spec| spec.name).collect();
    assert!(specs.iter().all(|name| tensors.contains_key(name)) && specs.len() == tensors.len());
    let two = Dit::load(&Weights::from_tensors(tensors), &both, 0..2, Base::F32, &device()).unwrap();
    let states = Tensor::cat(&[&io["clip_fea"], &randn("last", (1, 257, 20))], 1).unwrap();
    let moved = states.broadcast_add(&positions).unwrap();
    let (none, golden) = (Adapters::default(), Shown::golden(&io));
    let of =
        |dit: &Dit, states: &Tensor| forward(dit, &Shown { picture: Some(states), ..golden }, &pass(&none)).0;
    let got = of(&two, &states);
    assert_same_bits("output", &got, &of(&golden_dit("i2v21"), &moved));
    let swapped = Tensor::cat(&[states.narrow(1, 257, 257).unwrap(), io["clip_fea"].clone()], 1).unwrap();
    assert!(difference(&of(&two, &swapped), &got).0 > 1e-3, "the order of the pictures does nothing");
    let one = two.embedder.as_ref().unwrap().embed(&golden.input()).unwrap_err().to_string();
    assert!(one.contains("514 rows"), "{one}");
}

/// Conditioning that a model needs and did not get, and conditioning that it does not read, is refused by name: conditioning that
/// is left out silently would train on something else than was asked for.
#[test]
fn conditioning_that_is_missing_or_unread_is_refused_by_its_role() {
    const POSE: Role = Role::new("pose", "a pose");
    let refused = |kind: &str, input: NetworkInput| {
        golden_dit(kind).embedder.as_ref().unwrap().embed(&input).unwrap_err().to_string()
    };
    let io = |kind: &str| fixture_tensors(&format!("dit/{kind}/io.safetensors"));
    let (plain, pictures) = (io("t2v"), io("i2v21"));
    let blind = Shown { picture: None, ..Shown::golden(&pictures) }.input();
    assert!(
        refused("i2v21", blind).contains("reads CLIP's states of a picture (clip_fea) and was given none")
    );
    for (role, what) in [(Role::PICTURE, "CLIP's states of a picture"), (POSE, "a pose")] {
        let error = refused("t2v", Shown::golden(&plain).input().with(role, randn("extra", (1, 3, 20))));
        assert!(error.contains(&format!("was given {what}")) && error.contains("does not read"), "{error}");
    }
}

/// Samples of a batch: a padded role gets zero rows at the end, another must have equally many rows, and no sample may lack
/// what another has.
#[test]
fn samples_are_stacked_by_the_rules_of_their_roles() {
    let sample = |rows: usize, views: usize| {
        Conditioning::<Raw>::new()
            .with(Role::TEXT, randn(&format!("text {rows}"), (rows, 4)))
            .with(Role::PICTURE, randn(&format!("views {views}"), (views, 4)))
    };
    let stacked = Conditioning::stacked(&[&sample(3, 2), &sample(1, 2)]).unwrap();
    let text = stacked.require(Role::TEXT).unwrap();
    assert_same_bits("longest", &text.get(0).unwrap(), &randn("text 3", (3, 4)));
    assert_same_bits("shorter", &text.get(1).unwrap().narrow(0, 0, 1).unwrap(), &randn("text 1", (1, 4)));
    assert_eq!(text.get(1).unwrap().narrow(0, 1, 2).unwrap().to_vec2::<f32>().unwrap(), [[0.0; 4]; 2]);
    assert_eq!(stacked.require(Role::PICTURE).unwrap().dims(), [2, 2, 4]);
    assert!(Conditioning::stacked(&[&sample(3, 2), &sample(3, 1)]).is_err(), "pictures of other sizes");
    let text_alone = Conditioning::new().with(Role::TEXT, randn("text 3", (3, 4)));
    let error = Conditioning::stacked(&[&sample(3, 2), &text_alone]).unwrap_err().to_string();
    assert!(error.contains("picture, text and text"), "{error}");
}

#[test]
fn a_timestep_for_each_token_equals_one_for_all() {
    let (dit, io) = (tiny_dit(), fixture_tensors("dit/t2v/io.safetensors"));
    let none = Adapters::default();
    let tokens = dit.config.tokens(3, 8, 6);
    let per_token = io["timestep"].reshape((1, 1)).unwrap().broadcast_as((1, tokens)).unwrap();
    let shown = Shown { timestep: &per_token, ..Shown::golden(&io) };
    let (output, _) = forward(&dit, &shown, &pass(&none));
    assert_close("output", &output, &io["output"], OUTPUT);

    // Frames with times of their own, and tokens with times of their own, take the other two paths: they must agree
    // with each other where they say the same.
    let by_frame: Vec<f32> = (0..tokens).map(|token| [0.0, 400.0, 900.0][token / (tokens / 3)]).collect();
    let mut by_token = by_frame.clone();
    by_token[0] += 1e-5; // enough to leave the path by frames, and too little to see
    let run = |times: Vec<f32>| {
        let times = Tensor::from_vec(times, (1, tokens), &device()).unwrap();
        forward(&dit, &Shown { timestep: &times, ..Shown::golden(&io) }, &pass(&none)).0
    };
    assert_close("frames against tokens", &run(by_token), &run(by_frame), OUTPUT);
}

#[test]
fn diffusers_weights_are_the_official_ones() {
    for kind in DIT_KINDS {
        let io = fixture_tensors(&format!("dit/{kind}/io.safetensors"));
        let none = Adapters::default();
        let (config, weights) = golden_weights(kind, "diffusers");
        let dit = Dit::load(&weights, &config, 0..config.layers, Base::F32, &device()).unwrap();
        let run = |dit| forward(dit, &Shown::golden(&io), &pass(&none)).0;
        assert_same_bits(kind, &run(&dit), &run(&golden_dit(kind)));
    }
}

#[test]
fn a_batch_equals_its_samples() {
    let (dit, none) = (tiny_dit(), Adapters::default());
    let (x, text) = (randn("x", (2, 16, 3, 4, 6)), randn("text", (2, 9, 24)));
    let times = Tensor::new(&[900f32, 250.0], &device()).unwrap();
    let (both, _) = forward(&dit, &Shown::new(&x, &times, &text), &pass(&none));
    for i in 0..2 {
        let one = |t: &Tensor| t.narrow(0, i, 1).unwrap();
        let (x, times, text) = (one(&x), one(&times), one(&text));
        let (alone, _) = forward(&dit, &Shown::new(&x, &times, &text), &pass(&none));
        assert_close("sample", &one(&both), &alone, Tolerance::absolute(2e-5));
    }
}

#[test]
fn tables_equal_golden_values() {
    let tables = fixture_tensors("dit/tables.safetensors");
    let (cos, sin) = rope::table(128, (5, 6, 5), &device()).unwrap();
    let tolerance = Tolerance::absolute(1e-6); // the tables are rounded f64 values
    assert_close("cos", &cos, &tables["rope_cos_hd128_5x6x5"], tolerance);
    assert_close("sin", &sin, &tables["rope_sin_hd128_5x6x5"], tolerance);
    let times: Vec<f32> = tables["timesteps"].to_vec1().unwrap();
    let times: Vec<f64> = times.into_iter().map(f64::from).collect();
    let sinusoid = embed::sinusoid(&times, 256, &device()).unwrap();
    assert_close("sinusoid", &sinusoid, &tables["sinusoid_f64_as_f32"], tolerance);
}

/// The PEFT adapter of the fixture `prefix` by official names, with the given scale.
fn golden_adapters(tensors: &HashMap<String, Tensor>, prefix: &str, scale: f64) -> Adapters {
    let mut adapters = Adapters::default();
    for (name, a) in tensors {
        let Some(module) = name.strip_prefix(prefix).and_then(|n| n.strip_suffix(".lora_A.weight")) else {
            continue;
        };
        let b = tensors[&format!("{prefix}{module}.lora_B.weight")].clone();
        let official = names::module_from_diffusers(module).unwrap();
        adapters.attach(official, Adapter::trainable(kernels::low_rank::Factors { a: a.clone(), b, scale }));
    }
    adapters
}

/// The name in the fixture of an official adapter tensor.
fn golden_name(prefix: &str, official: &str) -> String {
    let (module, suffix) = official.split_at(official.find(".lora_").unwrap());
    format!("{prefix}{}{suffix}", names::module_to_diffusers(module).unwrap())
}

/// Every block's default plan.
const LEAN: [BlockPlan; 2] = [BlockPlan { keep: Keep::Input, place: KeepPlace::Device }; 2];

/// Loss and gradients of one velocity prediction; `mask` says what counts.
fn loss_and_gradients(
    dit: &Dit,
    shown: &Shown,
    (target, mask): (&Tensor, Option<&Tensor>),
    pass: &Pass,
    plans: &[BlockPlan],
) -> (f32, Gradients) {
    let x = shown.x;
    let (streams, context) = entered(dit, &shown.input());
    let plans = (0..).map(LayerId::block).zip(plans.iter().copied()).collect();
    let keeping = Keeping { plans: &plans, store: &HostStore::new(&device()).unwrap() };
    let (streams, kept) = dit.through_keeping(streams, &context, pass, &keeping).unwrap();
    let head = dit.head.as_ref().unwrap();
    let weights = Tensor::ones(x.dim(0).unwrap(), DType::F32, &device()).unwrap();
    let prediction = head.forward(&streams.main, &context).unwrap();
    let loss = kernels::loss::loss(&prediction, target, &Terms::squares(&weights, mask)).unwrap();
    let mut gradients = Gradients::default();
    let dy = head.backward(&streams.main, &loss.d_prediction, &context).unwrap();
    dit.backward(kept, Streams::new(dy), &context, pass, &mut gradients).unwrap();
    (loss.value.to_scalar().unwrap(), gradients)
}

/// The fixtures' noised step `i`: what the network sees, its timesteps, and the target. TI2V's first frame stays clean, at
/// timestep 0.
fn golden_step(kind: &str, io: &HashMap<String, Tensor>, i: usize, sigma: f64) -> [Tensor; 3] {
    let (x0, noise) = (&io["x0"], io["noise"].get(i).unwrap());
    let noisy = ((x0 * (1.0 - sigma)).unwrap() + (&noise * sigma).unwrap()).unwrap();
    let (_, _, frames, height, width) = x0.dims5().unwrap();
    let time = (sigma * 1000.0) as f32;
    let mut timestep = Tensor::new(&[time], &device()).unwrap();
    let mut x = noisy.clone();
    if let Some(cond) = io.get("cond") {
        x = Tensor::cat(&[&noisy, cond], 1).unwrap();
    }
    if kind == "ti2v" {
        let rest = noisy.narrow(2, 1, frames - 1).unwrap();
        x = Tensor::cat(&[&x0.narrow(2, 0, 1).unwrap(), &rest], 2).unwrap();
        let of_frame = height * width / 4;
        let times: Vec<f32> = (0..frames * of_frame).map(|l| if l < of_frame { 0.0 } else { time }).collect();
        timestep = Tensor::from_vec(times, (1, frames * of_frame), &device()).unwrap();
    }
    if i == 0 {
        assert_close("network input", &x, &io["input"], Tolerance::absolute(1e-6));
        assert_same_bits("timestep", &timestep, &io["timestep"]);
    }
    [x, timestep, (noise - x0).unwrap()]
}

/// What counts in the loss: TI2V leaves the first latent frame out.
fn golden_mask(kind: &str, frames: usize) -> Option<Tensor> {
    let counts: Vec<f32> = (0..frames).map(|frame| if frame == 0 { 0.0 } else { 1.0 }).collect();
    (kind == "ti2v").then(|| Tensor::from_vec(counts, (1, 1, frames, 1, 1), &device()).unwrap())
}

#[test]
fn five_steps_of_lora_training_equal_peft() {
    DIT_KINDS.into_iter().for_each(five_steps);
}

fn five_steps(kind: &str) {
    let (dit, io) = (golden_dit(kind), fixture_tensors(&format!("dit/{kind}/io.safetensors")));
    let golden = fixture_tensors(&format!("dit/{kind}/lora_train.safetensors"));
    let plan = fixture_json(&format!("dit/{kind}/lora_train.json"));
    let mut adapters = golden_adapters(&golden, "init.", plan["scale"].as_f64().unwrap());
    let mut states: BTreeMap<String, State> = BTreeMap::new();
    let mask = golden_mask(kind, io["x0"].dim(2).unwrap());
    for (i, sigma) in plan["sigmas"].as_array().unwrap().iter().enumerate() {
        let [x, timestep, target] = golden_step(kind, &io, i, sigma.as_f64().unwrap());
        let shown = Shown { x: &x, timestep: &timestep, ..Shown::golden(&io) };
        let (loss, gradients) =
            loss_and_gradients(&dit, &shown, (&target, mask.as_ref()), &pass(&adapters), &LEAN);

        let expected = plan["losses"][i].as_f64().unwrap();
        assert!((f64::from(loss) - expected).abs() < 1e-4, "{kind}, loss {i}: {loss}, expected {expected}");
        let square = |g: &Tensor| f64::from(g.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
        let norm = gradients.iter().map(|(_, g)| square(g)).sum::<f64>().sqrt();
        let expected = plan["grad_norms"][i].as_f64().unwrap();
        assert!((norm / expected - 1.0).abs() < 1e-3, "{kind}, norm {i}: {norm}, expected {expected}");
        if i == 0 {
            for (name, gradient) in gradients.iter() {
                let tolerance = Tolerance { absolute: 1e-12, relative: 1e-3 };
                assert_close(name, gradient, &golden[&golden_name("grad0.", name)], tolerance);
            }
        }
        updated(&mut adapters, &mut states, &gradients, i as u64 + 1);
    }
    // Adam turns the sign of a near-zero gradient into a whole step of 1e-2: the looser bound of the fixtures.
    for (name, state) in &states {
        let expected = &golden[&golden_name("final.", name)];
        assert_close(name, &state.parameter, expected, Tolerance::absolute(2e-3));
    }
}

/// One step of AdamW with the fixtures' settings.
fn updated(adapters: &mut Adapters, states: &mut BTreeMap<String, State>, gradients: &Gradients, step: u64) {
    let update = adamw::Update { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step };
    for (name, parameter) in adapters.parameters() {
        let zeros = parameter.zeros_like().unwrap();
        let fresh = State { parameter, slots: vec![zeros.clone(), zeros] };
        let state = states.remove(&name).unwrap_or(fresh);
        states.insert(name.clone(), adamw::step(&state, gradients.get(&name).unwrap(), &update).unwrap());
    }
    adapters.set_parameters(&states.iter().map(|(name, s)| (name.clone(), s.parameter.clone())).collect());
}

#[test]
fn what_is_kept_and_where_changes_no_bit() {
    for kind in ["t2v", "i2v21"] {
        what_is_kept_changes_no_bit_of(kind);
    }
}

fn what_is_kept_changes_no_bit_of(kind: &str) {
    let (dit, io) = (golden_dit(kind), fixture_tensors(&format!("dit/{kind}/io.safetensors")));
    let golden = fixture_tensors(&format!("dit/{kind}/lora_train.safetensors"));
    let adapters = golden_adapters(&golden, "after1.", 2.0);
    let dropout = Dropout { p: 0.25, keys: vec![kernels::random::Key::new(3, "dropout", &[1])] };
    let pass = Pass::new(&adapters, Some(&dropout));
    let (shown, target) = (Shown::golden(&io), (&io["target"], None));
    let (lean_loss, lean) = loss_and_gradients(&dit, &shown, target, &pass, &LEAN);
    let all = [Keep::Input, Keep::Attention, Keep::All].map(|keep| {
        [KeepPlace::Device, KeepPlace::Host, KeepPlace::HostUntilUsed].map(|place| BlockPlan { keep, place })
    });
    let all = all.as_flattened();
    for first in all {
        for second in all {
            let plans = [*first, *second];
            let (loss, gradients) = loss_and_gradients(&dit, &shown, target, &pass, &plans);
            assert_eq!(loss.to_bits(), lean_loss.to_bits(), "{plans:?}");
            for (name, gradient) in lean.iter() {
                assert_same_bits(&format!("{name}, {plans:?}"), gradients.get(name).unwrap(), gradient);
            }
        }
    }
}

/// The feed-forward layer in chunks of tokens, which cut through a frame or take several, is the layer on all at once:
/// outputs, and gradients summed over the chunks, with the dropout that each token has in the whole.
#[test]
fn feed_forward_in_chunks_equals_the_whole() {
    // The same products, and f32 sums over the tokens in another order.
    const ORDER: Tolerance = Tolerance { absolute: 1e-6, relative: 2e-5 };
    let dit = tiny_dit();
    let adapters = golden_adapters(&fixture_tensors("dit/t2v/lora_train.safetensors"), "after1.", 2.0);
    let keys = [1, 2].map(|sample| kernels::random::Key::new(3, "dropout", &[sample])).to_vec();
    let dropout = Dropout { p: 0.25, keys };
    let (x, target, text) =
        (randn("x", (2, 16, 3, 4, 6)), randn("y", (2, 16, 3, 4, 6)), randn("t", (2, 9, 24)));
    let tokens = dit.config.tokens(3, 4, 6);
    let by_frame: Vec<f32> = (0..2 * tokens).map(|token| (100 * (token / 6)) as f32).collect();
    let by_frame = Tensor::from_vec(by_frame, (2, tokens), &device()).unwrap();
    let shared = Tensor::new(&[700f32, 300.0], &device()).unwrap();
    for times in [&shared, &by_frame] {
        let shown = Shown::new(&x, times, &text);
        let whole = Pass::new(&adapters, Some(&dropout));
        let (loss, gradients) = loss_and_gradients(&dit, &shown, (&target, None), &whole, &LEAN);
        for most in [1, 4, 7, 12, tokens] {
            let (got, of_chunks) =
                loss_and_gradients(&dit, &shown, (&target, None), &whole.with_ffn_tokens(most), &LEAN);
            assert!((got / loss - 1.0).abs() < 1e-5, "{most} tokens: loss {got}, expected {loss}");
            for (name, gradient) in gradients.iter() {
                assert_close(
                    &format!("{name}, {most} tokens"),
                    of_chunks.get(name).unwrap(),
                    gradient,
                    ORDER,
                );
            }
        }
    }
}

/// Every token is in one chunk, no chunk is too large, and none mixes parts of groups.
#[test]
fn chunks_of_tokens_respect_their_groups() {
    for (tokens, groups, most) in
        [(18, 1, 5), (18, 3, 5), (18, 3, 6), (18, 3, 13), (18, 18, 4), (7, 1, 99), (9, 3, 1)]
    {
        let size = tokens / groups;
        let cut = chunks(tokens, groups, most);
        let mut next = 0;
        for Chunk { tokens, groups } in &cut {
            assert!(tokens.start == next && tokens.len() <= most && !tokens.is_empty());
            assert!(groups.start * size <= tokens.start && tokens.end <= groups.end * size);
            let is_whole = tokens.len() == groups.len() * size;
            assert!(groups.len() == 1 || is_whole, "{tokens:?} of {groups:?}");
            next = tokens.end;
        }
        assert_eq!(next, tokens);
        let (longest, shortest) =
            (cut.iter().map(|c| c.tokens.len()).max(), cut.iter().map(|c| c.tokens.len()).min());
        assert!(longest.unwrap() - shortest.unwrap() <= size, "uneven: {cut:?}");
    }
}

#[test]
fn every_trainable_tensor_gets_a_finite_nonzero_gradient() {
    DIT_KINDS.into_iter().for_each(every_tensor_of_a_kind_gets_a_gradient);
}

fn every_tensor_of_a_kind_gets_a_gradient(kind: &str) {
    let (dit, io) = (golden_dit(kind), fixture_tensors(&format!("dit/{kind}/io.safetensors")));
    let golden = fixture_tensors(&format!("dit/{kind}/lora_train.safetensors"));
    let adapters = golden_adapters(&golden, "after1.", 2.0); // after one step B is no longer zero, so A has a gradient
    let (shown, target) = (Shown::golden(&io), (&io["target"], golden_mask(kind, io["x0"].dim(2).unwrap())));
    let target = (target.0, target.1.as_ref());
    let (_, gradients) = loss_and_gradients(&dit, &shown, target, &pass(&adapters), &LEAN);
    let parameters = adapters.parameters();
    assert_eq!(parameters.len(), 2 * dit.config.adaptable_modules().len());
    for name in parameters.keys() {
        let gradient = gradients.get(name).unwrap_or_else(|| panic!("{name} has no gradient"));
        let values: Vec<f32> =
            gradient.flatten_all().unwrap().to_device(&Device::Cpu).unwrap().to_vec1().unwrap();
        assert!(values.iter().all(|v| v.is_finite()), "{name} has a gradient that is not finite");
        assert!(values.iter().any(|v| *v != 0.0), "{name} has a gradient of zero");
    }
    assert_eq!(gradients.iter().count(), parameters.len(), "a gradient of something that is not trainable");
}

/// Another shape would be planned while the weights are loaded for nothing, and the first step would wait all the same.
#[test]
fn attentions_that_are_planned_ahead_are_those_that_blocks_compute() {
    for kind in DIT_KINDS {
        let (io, dit) = (fixture_tensors(&format!("dit/{kind}/io.safetensors")), golden_dit(kind));
        let (streams, context) = entered(&dit, &Shown::golden(&io).input());
        let (batch, tokens, width) = streams.main.dims3().unwrap();
        let rows = |role| context.cond.get(role).map(|states| states.dim(1).unwrap());
        let keys = [Some(tokens), rows(Role::TEXT), rows(Role::PICTURE)];
        let planned = dit.config.attentions(batch, tokens);
        let of_plans: Vec<usize> = planned.iter().map(|heads| heads.keys).collect();
        assert_eq!(of_plans, keys.into_iter().flatten().collect::<Vec<_>>(), "{kind}");
        for heads in planned {
            assert_eq!(
                [heads.batch, heads.queries, heads.heads * heads.size],
                [batch, tokens, width],
                "{kind}"
            );
        }
    }
}

//! Every spelling of an adapter in common use reads as the same adapter, and every damaged one is refused by name.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use kernels::{Device, Tensor};
use models::adapter::files::{AdapterFile, KeyStyle, read};
use models::{Expert, names};
use proofs::{Tolerance, assert_close, fixture, randn};

/// diffusers' converters move powers of two between the factors; products of rank 4 then agree to rounding.
const DELTA: Tolerance = Tolerance::relative(1e-6);

/// Writes `tensors` at `path`.
fn store(path: &Path, tensors: &[(String, Tensor)]) {
    let tensors: HashMap<String, Tensor> =
        tensors.iter().map(|(key, tensor)| (key.clone(), tensor.to_device(&Device::Cpu).unwrap())).collect();
    kernels::safetensors::save(&tensors, path).unwrap();
}

/// What reading a file of `tensors` gives.
fn reading(name: &str, tensors: &[(String, Tensor)]) -> models::Result<AdapterFile> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    store(&path, tensors);
    read(&path)
}

fn assert_same_deltas(what: &str, got: &AdapterFile, expected: &AdapterFile) {
    assert!(got.modules.keys().eq(expected.modules.keys()), "{what}: other modules");
    for module in expected.modules.keys() {
        let delta = |file: &AdapterFile| file.modules[module].delta().unwrap().unwrap();
        assert_close(&format!("{what}: {module}"), &delta(got), &delta(expected), DELTA);
    }
}

/// The modules that the spellings are tried on: one of each kind of name.
const MODULES: [&str; 8] = [
    "blocks.0.self_attn.q",
    "blocks.11.cross_attn.k_img",
    "blocks.3.cross_attn.o",
    "blocks.7.ffn.2",
    "time_projection.1",
    "text_embedding.0",
    "head.head",
    "img_emb.proj.3",
];

/// The factors of [`MODULES`] under keys made by `stem`, the two words, and alpha where there is one.
fn spelt(stem: &dyn Fn(&str) -> String, [down, up]: [&str; 2], alpha: Option<f32>) -> Vec<(String, Tensor)> {
    let mut tensors = Vec::new();
    for module in MODULES {
        let stem = stem(module);
        tensors.push((format!("{stem}{down}"), randn(&format!("{module}.a"), (3, 6))));
        tensors.push((format!("{stem}{up}"), randn(&format!("{module}.b"), (5, 3))));
        tensors
            .extend(alpha.map(|alpha| (format!("{stem}.alpha"), Tensor::new(alpha, &Device::Cpu).unwrap())));
    }
    tensors
}

const AB: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];
const DOWN_UP: [&str; 2] = [".lora_down.weight", ".lora_up.weight"];

#[test]
fn every_spelling_reads_as_the_same_adapter() {
    let native = |prefix: &'static str| move |module: &str| format!("{prefix}{module}");
    let diffusers = |prefix: &'static str| {
        move |module: &str| format!("{prefix}{}", names::module_to_diffusers(module).unwrap())
    };
    let kohya =
        |prefix: &'static str| move |module: &str| format!("{prefix}{}", names::module_to_kohya(module));
    let plain = reading("plain", &spelt(&native("diffusion_model."), AB, None)).unwrap();
    let scaled = reading("scaled", &spelt(&native("diffusion_model."), AB, Some(7.5))).unwrap();
    type Stem<'a> = Box<dyn Fn(&str) -> String + 'a>;
    let stems: Vec<(KeyStyle, Stem)> = vec![
        (KeyStyle::Native, Box::new(native("diffusion_model."))),
        (KeyStyle::Native, Box::new(native("model.diffusion_model."))),
        (KeyStyle::Bare, Box::new(native(""))),
        (KeyStyle::Bare, Box::new(native("pipe.dit."))),
        (KeyStyle::Bare, Box::new(native("dit."))),
        (KeyStyle::Diffusers, Box::new(diffusers("transformer."))),
        (KeyStyle::Diffusers, Box::new(diffusers("transformer_2."))),
        (KeyStyle::Peft, Box::new(diffusers("base_model.model."))),
        (KeyStyle::Kohya, Box::new(kohya("lora_unet_"))),
        (KeyStyle::Kohya, Box::new(kohya("lora_unet__"))),
    ];
    let words = [
        AB,
        DOWN_UP,
        [".lora_A.default.weight", ".lora_B.default.weight"],
        [".lora_A.my_style.weight", ".lora_B.my_style.weight"],
        [".lora.down.weight", ".lora.up.weight"],
        ["_lora.down.weight", "_lora.up.weight"],
        [".lora_A", ".lora_B"],
    ];
    for (style, stem) in &stems {
        for words in words {
            for (alpha, expected) in [(None, &plain), (Some(7.5), &scaled)] {
                let tensors = spelt(stem, words, alpha);
                let what = format!("{} and its fellows", tensors[0].0);
                let file = reading("adapter", &tensors).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert_eq!(file.style, Some(*style), "{what}");
                assert_same_deltas(&what, &file, expected);
            }
        }
    }
}

/// The two extra projections of the image branch, in every golden style.
#[test]
fn an_image_adapter_reads_the_same_in_every_golden_style() {
    let golden = |name: &str| read(&fixture(&format!("lora/i2v21/{name}.safetensors"))).unwrap();
    let expected = golden("kohya");
    assert_eq!(expected.modules.len(), 24, "twelve layers in each of two blocks");
    for name in ["comfy_ab", "comfy_updown_alpha", "peft_diffusers", "peft_diffusers_folded"] {
        assert_same_deltas(name, &golden(name), &expected);
        if name.starts_with("comfy") {
            let converted = format!("{name}_as_converted_by_diffusers");
            assert_same_deltas(&converted, &golden(&converted), &expected);
        }
    }
}

#[test]
fn kohya_reads_no_alpha_and_alpha_zero_as_the_rank_and_says_so() {
    let stem = |module: &str| format!("lora_unet_{}", names::module_to_kohya(module));
    let plain = reading("plain", &spelt(&|m| m.to_owned(), AB, None)).unwrap();
    assert!(plain.notes.is_empty(), "{:?}", plain.notes);
    for (alpha, words) in [(None, "no alpha"), (Some(0.0), "an alpha of 0")] {
        let file = reading("kohya", &spelt(&stem, DOWN_UP, alpha)).unwrap();
        assert_same_deltas(words, &file, &plain);
        let [note] = &file.notes[..] else { panic!("{:?}", file.notes) };
        assert!(
            note.contains("8 modules") && note.contains(words) && note.contains("blocks.0.self_attn.q"),
            "{note}"
        );
    }
}

#[test]
fn the_expert_is_told_by_keys_header_and_name() {
    let two = |module: &str| format!("transformer_2.{}", names::module_to_diffusers(module).unwrap());
    let one = |module: &str| format!("transformer.{}", names::module_to_diffusers(module).unwrap());
    assert_eq!(reading("style", &spelt(&two, AB, None)).unwrap().expert, Some(Expert::Low));
    assert_eq!(reading("style", &spelt(&one, AB, None)).unwrap().expert, None);
    let named = reading("style_high_noise.safetensors", &spelt(&one, AB, None)).unwrap();
    assert_eq!(named.expert, Some(Expert::High));
    // Two experts in one file, on different modules.
    let (mut mixed, low) = (spelt(&one, AB, None), spelt(&two, AB, None));
    mixed.truncate(2);
    mixed.extend_from_slice(&low[2..]);
    let refused = reading("mixed", &mixed).unwrap_err().to_string();
    assert!(
        refused.contains("transformer.blocks.0") && refused.contains("transformer_2.blocks"),
        "{refused}"
    );
}

#[test]
fn broken_adapters_of_other_kinds_are_refused_by_name() {
    let stem = "diffusion_model.blocks.4.ffn.0";
    let tensor =
        |name: &str, rows: usize, columns: usize| (format!("{stem}.{name}"), randn(name, (rows, columns)));
    let loha = || {
        vec![
            tensor("hada_w1_a", 6, 2),
            tensor("hada_w1_b", 2, 4),
            tensor("hada_w2_a", 6, 2),
            tensor("hada_w2_b", 2, 4),
        ]
    };
    let with = |mut tensors: Vec<(String, Tensor)>, more: (String, Tensor)| {
        tensors.push(more);
        tensors
    };
    let nan = |tensors: Vec<(String, Tensor)>| -> Vec<(String, Tensor)> {
        tensors.into_iter().map(|(key, t)| (key, (t * f64::NAN).unwrap())).collect()
    };
    /// What is wrong, the file's tensors, and what the message must name.
    type Case<'a> = (&'a str, Vec<(String, Tensor)>, &'a str);
    let cases: Vec<Case> = vec![
        ("half a LoHa", loha()[..3].to_vec(), "hada_w2_b"),
        ("a LoHa that does not fit", with(loha()[..3].to_vec(), tensor("hada_w2_b", 3, 4)), "[3, 4]"),
        ("NaN in a LoHa", nan(loha()), "hada_w1_a"),
        ("half a LoKr", vec![tensor("lokr_w1", 2, 2)], "lokr_w2"),
        (
            "a LoKr told twice",
            vec![tensor("lokr_w1", 2, 2), tensor("lokr_w2", 3, 2), tensor("lokr_w2_a", 3, 1)],
            "lokr_w2",
        ),
        ("two kinds", with(loha(), tensor("lokr_w1", 2, 2)), "two kinds of adapter"),
        ("Tucker form", with(loha(), tensor("hada_t1", 2, 2)), "Tucker"),
        (
            "a text encoder",
            vec![("lora_te_blocks_0.lora_up.weight".to_owned(), randn("te", (2, 2)))],
            "text encoder",
        ),
        ("lengths without factors", vec![tensor("dora_scale", 6, 1)], "factors"),
    ];
    for (what, tensors, named) in cases {
        let text = reading("broken.safetensors", &tensors).unwrap_err().to_string();
        assert!(text.contains(named), "{what}: {text} does not name {named}");
        assert!(
            text.contains("broken.safetensors") && text.contains("4") | text.contains("text"),
            "{what}: {text}"
        );
    }
    let empty = tempfile::tempdir().unwrap();
    let text = read(empty.path()).unwrap_err().to_string();
    assert!(text.contains("adapter_model.safetensors"), "{text}");
}

/// Differences of whole tensors are applied to the right tensor under every name in files.
#[test]
fn differences_are_read_under_the_names_of_their_tensors() {
    let shape = 5;
    let names: BTreeMap<&str, &str> = BTreeMap::from([
        ("diffusion_model.blocks.0.norm3.diff", "blocks.0.norm3.weight"),
        ("diffusion_model.blocks.0.norm3.diff_b", "blocks.0.norm3.bias"),
        ("diffusion_model.blocks.0.self_attn.norm_q.diff", "blocks.0.self_attn.norm_q.weight"),
        ("diffusion_model.blocks.0.self_attn.q.diff_b", "blocks.0.self_attn.q.bias"),
        ("diffusion_model.blocks.1.modulation.diff", "blocks.1.modulation"),
        ("diffusion_model.blocks.2.diff_m", "blocks.2.modulation"),
        ("diffusion_model.head.diff_m", "head.modulation"),
        ("diffusion_model.patch_embedding.diff", "patch_embedding.weight"),
        ("diffusion_model.text_embedding.2.diff_b", "text_embedding.2.bias"),
        ("lora_unet_blocks_3_cross_attn_norm_k.diff", "blocks.3.cross_attn.norm_k.weight"),
        ("transformer.blocks.4.norm2.diff", "blocks.4.norm3.weight"),
    ]);
    let tensors: Vec<(String, Tensor)> =
        names.keys().map(|key| ((*key).to_owned(), randn(key, shape))).collect();
    let file = reading("differences", &tensors).unwrap();
    assert!(file.modules.is_empty());
    assert_eq!(file.differences.len(), names.len());
    for (key, tensor) in names {
        let expected = randn(key, shape).to_device(&Device::Cpu).unwrap();
        proofs::assert_same_bits(key, &file.differences[tensor], &expected);
    }
}

//! Adapters: every kind trained and exported, tools in sequence, clips with a second adapter.

use std::collections::BTreeMap;
use std::fs;

use kernels::{Device, Tensor};
use models::adapter::LoraPair;
use models::adapter::files::{AdapterFile, Precision, Style, read, write};
use models::weights::Checkpoint;
use proofs::{Tolerance, assert_close, assert_same_bits};

use crate::desk::{Desk, fixtures};

const TRAIN: [&str; 2] = ["train", "recipe.toml"];
const ADAPTER: &str = "run/adapters/recipe.safetensors";

fn normal(name: &str, shape: &[usize]) -> Tensor {
    let numbers = kernels::random::Key::new(3, name, &[]).normals(shape.iter().product());
    (Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap() * 0.3).unwrap()
}

/// The tensors of the last checkpoint that are trained.
fn trained(desk: &Desk, step: u64) -> BTreeMap<String, Tensor> {
    let file = Checkpoint::open(&desk.path(&format!("run/checkpoints/step-{step:06}.safetensors"))).unwrap();
    let names = file.names().filter(|name| name.ends_with(".parameter"));
    names
        .map(|name| (name.to_owned(), file.tensor(name, kernels::DType::F32, &Device::Cpu).unwrap()))
        .collect()
}

#[test]
fn every_kind_is_trained_resumed_and_exported() {
    for (kind, called) in [("dora", "DoRA"), ("loha", "LoHa"), ("lokr", "LoKr")] {
        let desk = Desk::new();
        desk.change("rank = 2", &format!("rank = 2\nkind = \"{kind}\""));
        desk.change("[checkpoint]", "[export]\nformats = [\"comfy\", \"kohya\"]\n\n[checkpoint]");
        let plan = desk.succeed(&["plan", "recipe.toml"]).stdout;
        assert!(plan.contains(&format!("kind = \"{kind}\"")) && plan.contains("memory of a step"), "{plan}");
        desk.succeed(&TRAIN);
        let told = desk.succeed(&["inspect", ADAPTER]).stdout;
        assert!(told.contains(called), "{told}");
        // The file of the run, and the one made of its checkpoint, where DoRA's lengths need the base from the disk.
        for (format, ending) in [("comfy", ""), ("kohya", "_kohya")] {
            desk.succeed(&[
                "export",
                "run/checkpoints/step-000002.safetensors",
                "again.safetensors",
                "--force",
                "--format",
                format,
            ]);
            let own = read(&desk.path(&format!("run/adapters/recipe{ending}.safetensors"))).unwrap();
            let again = read(&desk.path("again.safetensors")).unwrap();
            assert!(own.modules.keys().eq(again.modules.keys()) && !own.modules.is_empty());
            for (module, change) in &own.modules {
                for ((name, a), (_, b)) in change.tensors().into_iter().zip(again.modules[module].tensors()) {
                    // One step of bf16, where the lengths were rounded from sums in another order.
                    let near = Tolerance::relative(1.0 / 128.0);
                    assert_close(&format!("{kind}, {format}, {module}.{name}"), a, b, near);
                }
            }
        }
        desk.change("steps = 2\n", "steps = 3\n");
        desk.succeed(&["train", "recipe.toml", "--resume"]);
        let moved = trained(&desk, 3);
        assert!(moved.len() > 20 && trained(&desk, 2).keys().eq(moved.keys()));
    }
}

#[test]
fn training_begins_with_an_adapter_and_says_what_became_of_it() {
    let desk = Desk::new();
    desk.succeed(&TRAIN);
    fs::rename(desk.path("run"), desk.path("first")).unwrap();
    let begin = "init_from = \"first/adapters/recipe.safetensors\"";
    desk.change("rank = 2", begin);
    let told = desk.succeed(&TRAIN).stdout;
    assert!(
        told.contains("rank 2 on") && told.contains("20 modules begin with the file's factors"),
        "{told}"
    );
    fs::remove_dir_all(desk.path("run")).unwrap();
    desk.change(begin, &format!("rank = 4\n{begin}"));
    let told = desk.succeed(&TRAIN).stdout;
    assert!(told.contains("from rank 2 to rank 4 by fresh rows"), "{told}");
    fs::remove_dir_all(desk.path("run")).unwrap();
    desk.change("rank = 4", "rank = 1");
    let told = desk.succeed(&TRAIN).stdout;
    assert!(told.contains("from rank 2 to rank 1 by singular values") && told.contains("energy"), "{told}");
    desk.change("rank = 1", "kind = \"loha\"");
    fs::remove_dir_all(desk.path("run")).unwrap();
    desk.refuse(&TRAIN, &["cannot become a LoHa", "blocks.0.", "adapter.kind"]);
    desk.change("kind = \"loha\"", "targets = [\"ffn.0\"]");
    desk.refuse(&TRAIN, &["adapter.targets does not name", "blocks.0."]);
    desk.change("first/adapters/recipe.safetensors", "clips/a.gif");
    desk.refuse(&["plan", "recipe.toml"], &["a.gif"]);
}

/// A second adapter changes the clips but not the training: after each set of clips everything is as before, to the bit.
#[test]
fn an_adapter_for_clips_leaves_the_training_alone() {
    let desk = Desk::new();
    let pair = |name: &str, out: usize, input: usize| {
        let (a, b) = (normal(&format!("{name}.a"), &[2, input]), normal(&format!("{name}.b"), &[out, 2]));
        LoraPair { a, b, alpha: None }.into()
    };
    let model = Checkpoint::open(&desk.path("model")).unwrap();
    let shape = |name: &str| model.shape(name).unwrap().to_vec();
    let modules = ["blocks.0.self_attn.q", "text_embedding.0", "head.head", "time_projection.1"];
    let modules = modules.map(|module| {
        let shape = shape(&format!("{module}.weight"));
        (module.to_owned(), pair(module, shape[0], shape[1]))
    });
    let tensors =
        ["blocks.0.norm3.bias", "blocks.1.ffn.2.bias", "blocks.1.modulation", "blocks.0.cross_attn.o.weight"];
    let differences = tensors.map(|name| (name.to_owned(), normal(name, &shape(name))));
    let file = AdapterFile {
        modules: modules.into_iter().collect(),
        differences: differences.into_iter().collect(),
        ..Default::default()
    };
    write(&desk.path("distilled.safetensors"), &file, Style::Comfy, Precision::Float32).unwrap();

    let clips =
        "[sample]\nprompts = [\"a cloud\"]\nevery = 1\nsteps = 2\nguidance = 1\nformats = [\"gif\"]\n";
    desk.change("[checkpoint]", &format!("{clips}\n[checkpoint]"));
    desk.succeed(&TRAIN);
    let (alone, clip) = (trained(&desk, 2), read_clips(&desk));
    fs::remove_dir_all(desk.path("run")).unwrap();
    desk.change("guidance = 1\n", "guidance = 1\nadapter = \"distilled.safetensors\"\nstrength = 0.9\n");
    desk.succeed(&TRAIN);
    let (with, other) = (trained(&desk, 2), read_clips(&desk));
    assert!(with.keys().eq(alone.keys()) && !with.is_empty());
    for (name, tensor) in &with {
        assert_same_bits(name, tensor, &alone[name]);
    }
    assert_eq!(clip.len(), other.len());
    assert!(
        clip.len() >= 3 && clip.iter().zip(&other).all(|(a, b)| a != b),
        "the adapter changes every clip"
    );
    desk.change("distilled.safetensors", "missing.safetensors");
    desk.refuse(&["plan", "recipe.toml"], &["missing.safetensors"]);
}

/// The bytes of every GIF of the run, step by step.
fn read_clips(desk: &Desk) -> Vec<Vec<u8>> {
    let run = desk.path("run");
    let files = desk.files().into_iter();
    files
        .filter(|(path, _)| path.starts_with(&run) && path.extension().is_some_and(|e| e == "gif"))
        .map(|(_, bytes)| bytes)
        .collect()
}

#[test]
fn the_tools_work_one_behind_the_other() {
    let desk = Desk::new();
    desk.succeed(&TRAIN);
    let two = format!("{ADAPTER}:40");
    fs::create_dir(desk.path("merged")).unwrap();
    fs::copy(desk.path("model/config.json"), desk.path("merged/config.json")).unwrap();
    let merged = "merged/model.safetensors";
    desk.succeed(&["merge", "--model", "model", "--lora", &two, "--output", merged, "--dtype", "fp8_scaled"]);
    assert!(Checkpoint::open(&desk.path(merged)).unwrap().contains("scaled_fp8"));
    let both = ["merge", "--model", "model", "--lora", &two, "--lora", ADAPTER, "--output", merged];
    desk.refuse(&both, &["--output", merged, "--force"]);
    let told = desk.succeed(&[&both[..], &["--force"]].concat());
    assert!(told.stdout.contains("20 of them changed"), "{}", told.stdout);
    let extract =
        ["extract", "--base", "model", "--tuned", "merged", "--output", "x.safetensors", "--rank", "3"];
    let told = desk.succeed(&extract).stdout;
    assert!(told.contains("rank 3") && told.contains("energy kept"), "{told}");
    desk.succeed(&["resize", "x.safetensors", "y.safetensors", "--energy", "0.9", "--precision", "f32"]);
    desk.succeed(&["convert", "y.safetensors", "peft", "--format", "peft", "--strength", "0.5"]);
    assert!(
        desk.path("peft/adapter_config.json").is_file()
            && desk.path("peft/adapter_model.safetensors").is_file()
    );
    let told = desk.succeed(&["convert", "peft", "z_low_noise.safetensors", "--format", "videox-fun"]);
    assert!(told.stderr.is_empty(), "{}", told.stderr);
    let told = desk.succeed(&["convert", "peft", "z.safetensors", "--expert", "high"]);
    assert!(told.stderr.contains("z_high_noise"), "{}", told.stderr);
    let told = desk.succeed(&["inspect", "peft"]).stdout;
    assert!(told.contains("LoRA") && told.contains("PEFT"), "{told}");
    let (half, whole) =
        (read(&desk.path("z.safetensors")).unwrap(), read(&desk.path("y.safetensors")).unwrap());
    for module in whole.modules.keys() {
        let delta = |file: &AdapterFile| file.modules[module].delta().unwrap().unwrap();
        let expected = (delta(&whole) * 0.5).unwrap();
        assert_close(module, &delta(&half), &expected, Tolerance::relative(1.0 / 64.0));
    }
    desk.refuse(&["convert", "model/config.json", "w.safetensors"], &["config.json"]);
    desk.refuse(&["resize", "x.safetensors", "w.safetensors", "--energy", "1.5"], &["--energy"]);
    desk.refuse(&["merge", "--model", "model", "--lora", "x.safetensors:inf", "--output", "w"], &["finite"]);
    desk.refuse(
        &["extract", "--base", "model", "--tuned", "model", "--output", "w"],
        &["the two models are equal"],
    );
}

/// Inputs are never overwritten, and an output that cannot be written is reported before any work.
#[test]
fn nothing_is_written_over_what_is_read() {
    let desk = Desk::new();
    fs::copy(fixtures().join("lora/t2v/comfy_ab.safetensors"), desk.path("a.safetensors")).unwrap();
    let shard = "model/diffusion_pytorch_model-00001-of-00002.safetensors";
    let before = desk.files();
    let merge = |lora, output| ["merge", "--model", "model", "--lora", lora, "--output", output];
    desk.refuse(&merge("a.safetensors", shard), &["--output", shard, "belongs to the input model"]);
    desk.refuse(&merge("a.safetensors", "clips"), &["--output", "clips is a folder"]);
    desk.refuse(&merge("a.safetensors", "no/m.safetensors"), &["there is no folder no"]);
    desk.refuse(
        &merge("a.safetensors:x", "m"),
        &["--lora", "a.safetensors:x", "not a number", "a.safetensors:0.8"],
    );
    desk.refuse(&["convert", "a.safetensors", "a.safetensors"], &["a.safetensors is also an input"]);
    desk.refuse(
        &merge("a.safetensors:0.5", "a.safetensors"),
        &["--output", "a.safetensors is also an input"],
    );
    desk.refuse(&["resize", "a.safetensors", "no/b.safetensors", "--rank", "1"], &["there is no folder no"]);
    let extract = ["extract", "--base", "model", "--tuned", "model", "--output", shard];
    desk.refuse(&extract, &[shard, "belongs to the input model"]);
    assert_eq!(desk.files(), before);
}

#[test]
fn an_adapter_that_leaves_out_blocks_is_told() {
    let desk = Desk::new();
    let mut file = read(&fixtures().join("lora/t2v/comfy_ab.safetensors")).unwrap();
    let whole = file.clone();
    file.modules.retain(|module, _| !module.starts_with("blocks.1."));
    for (name, file, is_told) in [("whole.safetensors", &whole, false), ("half.safetensors", &file, true)] {
        write(&desk.path(name), file, Style::Comfy, Precision::Float32).unwrap();
        let told = desk.succeed(&[
            "merge",
            "--model",
            "model",
            "--lora",
            name,
            "--output",
            "m.safetensors",
            "--force",
        ]);
        let words = format!("{name}: 10 modules are unchanged that it changes in other blocks: blocks.1.");
        assert_eq!(told.stderr.contains(&words), is_told, "{}", told.stderr);
    }
}

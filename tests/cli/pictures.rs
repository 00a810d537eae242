//! Clips from pictures, and by two experts, as a user makes them: the published runs are reproduced from files alone.

use kernels::{Device, Tensor};
use serde_json::Value;

use crate::desk::{Desk, fixtures};

/// The bound of the fixtures for latents behind the last step, in f32 through the whole way.
const LATENTS: f64 = 2e-3;

fn golden(name: &str) -> (std::collections::HashMap<String, Tensor>, Value) {
    let folder = fixtures().join("e2e");
    let tensors = kernels::safetensors::load(folder.join(format!("{name}.safetensors")), &Device::Cpu);
    let settings = std::fs::read(folder.join(format!("{name}.json"))).unwrap();
    (tensors.unwrap(), serde_json::from_slice(&settings).unwrap())
}

/// Samples the golden run `name` with the model of a fixture on the CPU; how far the latents are from the golden ones.
fn distance(desk: &Desk, name: &str, model: &str, more: &[&str]) -> f64 {
    let (golden, settings) = golden(name);
    let noise = std::collections::HashMap::from([("latents", golden["latents_init"].clone())]);
    kernels::safetensors::save(&noise, desk.path("noise.safetensors")).unwrap();
    let model = fixtures().join(model);
    let text = |key: &str| settings[key].as_str().unwrap().to_owned();
    let mut words: Vec<String> =
        ["sample", "--stages", "cpu", "--convention", "diffusers", "--format", "gif"]
            .into_iter()
            .chain([
                "--latents",
                "noise.safetensors",
                "--save-latents",
                "out.safetensors",
                "--cache",
                "cache",
            ])
            .map(str::to_owned)
            .collect();
    words.extend(["--model".to_owned(), model.to_str().unwrap().to_owned()]);
    words.extend(["--prompt".to_owned(), text("prompt"), "--negative".to_owned(), text("negative_prompt")]);
    let numbers = [("width", "width"), ("height", "height"), ("frames", "num_frames")];
    for (option, key) in
        numbers.into_iter().chain([("steps", "num_inference_steps"), ("shift", "flow_shift")])
    {
        words.extend([format!("--{option}"), settings[key].to_string()]);
    }
    words.extend(more.iter().map(|word| (*word).to_owned()));
    desk.succeed(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let got = kernels::safetensors::load(desk.path("out.safetensors"), &Device::Cpu).unwrap();
    let difference = (&got["latents"] - &golden["latents_final"]).unwrap().abs().unwrap();
    f64::from(difference.max_all().unwrap().to_scalar::<f32>().unwrap())
}

/// The picture has the size of the clip; CLIP sees it as diffusers scales it.
#[test]
fn a_clip_from_a_picture_file_is_the_published_one() {
    let desk = Desk::new();
    let planes: Vec<Vec<Vec<u8>>> = golden("i2v21").0["image_u8_chw"].to_vec3().unwrap();
    let pixel = |x: u32, y: u32| [0, 1, 2].map(|c: usize| planes[c][y as usize][x as usize]);
    let picture = image::RgbImage::from_fn(64, 48, |x, y| image::Rgb(pixel(x, y)));
    picture.save(desk.path("first.png")).unwrap();
    let more = ["--guidance", "4", "--image", "first.png"];
    let error = distance(&desk, "i2v21", "repo_diffusers_i2v21", &more);
    assert!(error <= LATENTS, "{error:.2e}");
    let model = fixtures().join("repo_diffusers_i2v21").display().to_string();
    let words = ["sample", "--model", &model, "--prompt", "a dog", "--stages", "cpu"];
    desk.refuse(&words, &["picture of a clip", "--image"]);
    desk.refuse(&[&words[..], &["--image", "none.png"]].concat(), &["none.png"]);
}

#[test]
fn a_clip_by_two_experts_is_the_published_one_from_both_layouts() {
    for model in ["repo_diffusers_a14b", "repo_official_a14b"] {
        let error = distance(&Desk::new(), "t2v_a14b", model, &["--guidance", "3", "--guidance-high", "4"]);
        assert!(error <= LATENTS, "{model}: {error:.2e}");
    }
}

/// Training on pictures, with a clip from one before and after: the folder of the recipe is where pictures are looked for.
#[test]
fn models_that_take_pictures_are_trained() {
    for (model, size, targets) in [
        ("repo_diffusers_i2v21", "[32, 16]", "\"cross_attn.[kv]_img\""),
        ("repo_diffusers_ti2v", "[32, 32]", "\"ffn.[02]\""),
    ] {
        let desk = Desk::new();
        let folder = fixtures().join(model).display().to_string();
        desk.change("folder = \"model\"", &format!("folder = \"{folder}\""));
        desk.change("[[16, 16]]", &format!("[{size}]"));
        desk.change(
            "rank = 2",
            &format!("rank = 2\ntargets = [{targets}]\n[devices]\nstages = [\"cpu\", \"cpu\"]"),
        );
        let recipe = std::fs::read_to_string(desk.path("recipe.toml")).unwrap();
        desk.write(
            "recipe.toml",
            format!("{recipe}\n[sample]\nprompts = [\"a cloud --s 2 --i first.png\"]\n"),
        );
        image::RgbImage::from_pixel(20, 20, image::Rgb([200, 30, 90])).save(desk.path("first.png")).unwrap();
        desk.succeed(&["train", "recipe.toml"]);
        assert!(desk.path("run/samples/step-000002/contact-sheet.png").is_file(), "{model}: no clips");
    }
}

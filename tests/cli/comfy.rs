//! ComfyUI's folder of models in place of a whole model.

use std::fs;

use crate::desk::{Desk, fixtures};

const PLAN: [&str; 2] = ["plan", "recipe.toml"];

/// A project whose model is in ComfyUI's folders, together with files of other models.
fn desk() -> Desk {
    let desk = Desk::new();
    for folder in ["diffusion_models", "vae", "text_encoders/wan", "clip_vision", "loras"] {
        fs::create_dir_all(desk.path("ComfyUI/models").join(folder)).unwrap();
    }
    let lora = fixtures().join("lora/t2v/comfy_ab.safetensors");
    fs::copy(lora, desk.path("ComfyUI/models/loras/a.safetensors")).unwrap();
    merge(&desk, "wan_t2v", "0");
    fs::copy(desk.path("model/config.json"), desk.path("ComfyUI/models/diffusion_models/config.json"))
        .unwrap();
    let part =
        |from: &str, to: &str| fs::copy(desk.path(from), desk.path("ComfyUI/models").join(to)).unwrap();
    part("model/Wan2.1_VAE.pth", "vae/wan_2.1_vae.pth");
    part("model/models_t5_umt5-xxl-enc-bf16.pth", "text_encoders/wan/umt5.pth");
    // What other models need: the VAE of TI2V-5B, an adapter, half a download, notes.
    let vae = fixtures().join("vae22/weights_official.safetensors");
    fs::copy(vae, desk.path("ComfyUI/models/vae/wan2.2_vae.safetensors")).unwrap();
    let lora = desk.path("ComfyUI/models/loras/a.safetensors");
    fs::copy(lora, desk.path("ComfyUI/models/clip_vision/not_clip.safetensors")).unwrap();
    desk.write("ComfyUI/models/diffusion_models/half.safetensors", [7; 40]);
    desk.write("ComfyUI/models/vae/put_vae_here", b"");
    desk.change("folder = \"model\"", "folder = \"ComfyUI/models\"\ntokenizer = \"model/google/umt5-xxl\"");
    desk
}

/// A DiT in ComfyUI's folder: the model with the adapter at a strength, so that no two are the same.
fn merge(desk: &Desk, name: &str, strength: &str) {
    let lora = format!("ComfyUI/models/loras/a.safetensors:{strength}");
    let output = format!("ComfyUI/models/diffusion_models/{name}.safetensors");
    desk.succeed(&["merge", "--model", "model", "--lora", &lora, "--output", &output]);
}

#[test]
fn the_files_of_wan_are_found_in_comfyuis_folder() {
    let desk = desk();
    for folder in ["ComfyUI/models", "ComfyUI"] {
        let plan = desk.succeed(&["plan", "recipe.toml", "--set", &format!("model.folder={folder}")]).stdout;
        for told in
            ["name = \"wan_t2v\"", "diffusion_models/wan_t2v.safetensors", "wan_2.1_vae.pth", "umt5.pth"]
        {
            assert!(plan.contains(told), "{folder}: no {told} in {plan}");
        }
    }
    desk.succeed(&["train", "recipe.toml"]);
    for (place, prefix) in [("ComfyUI/models", ""), ("ComfyUI", "models/")] {
        let told = desk.succeed(&["inspect", place]).stdout;
        for line in
            ["diffusion_models/wan_t2v.safetensors: Wan DiT", "vae/wan2.2_vae.safetensors: Wan 2.2 VAE"]
        {
            assert!(told.contains(&format!("{prefix}{line}")), "no {line} in {told}");
        }
    }
    fs::remove_file(desk.path("ComfyUI/models/text_encoders/wan/umt5.pth")).unwrap();
    desk.refuse(&PLAN, &["no text_encoder", "ComfyUI/models/text_encoders"]);
}

/// Where several files fit, the message holds lines that can be pasted as they are; a key that is named settles its part.
#[test]
fn keys_are_listed_where_several_files_fit() {
    let desk = desk();
    merge(&desk, "wan_t2v_tuned", "1");
    let lines = [
        "  dit = \"ComfyUI/models/diffusion_models/wan_t2v.safetensors\"\n",
        "  dit = \"ComfyUI/models/diffusion_models/wan_t2v_tuned.safetensors\"\n",
        "  text_encoder = \"ComfyUI/models/text_encoders/wan/umt5.pth\"\n",
    ];
    desk.refuse(&PLAN, &[&lines[..], &["model.folder", "under [model]"]].concat());
    desk.change("tokenizer =", &format!("{}tokenizer =", lines[1]));
    let plan = desk.succeed(&PLAN).stdout;
    assert!(plan.contains("wan_t2v_tuned.safetensors") && plan.contains("wan_2.1_vae.pth"), "{plan}");
}

#[test]
fn two_experts_are_a_pair() {
    let desk = desk();
    fs::remove_file(desk.path("ComfyUI/models/diffusion_models/wan_t2v.safetensors")).unwrap();
    merge(&desk, "wan2.2_low_noise", "0");
    merge(&desk, "wan2.2_high_noise", "1");
    desk.refuse(&PLAN, &["two experts", "model.expert"]);
    let plan = desk.succeed(&["plan", "recipe.toml", "--set", "model.expert=both"]).stdout;
    assert!(plan.contains("wan2.2_high_noise.safetensors") && plan.contains("wan2.2_low_noise"), "{plan}");
}

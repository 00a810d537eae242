//! CLIP's picture tower against golden values: its pixels, its states, both namings.

use kernels::{DType, Tensor};
use models::clip::Clip;
use proofs::{Tolerance, assert_close, assert_same_bits, device, fixture, fixture_tensors};

/// f32 sums in another order; the fixtures' own cross-check shows 2e-6.
const HIDDEN: Tolerance = Tolerance::absolute(3e-5);
/// The bound of the fixtures for resizing and scaling in f32.
const PIXELS: Tolerance = Tolerance::absolute(1e-5);

fn tower(naming: &str) -> Clip {
    let path = fixture(&format!("clip/weights_{naming}.safetensors"));
    Clip::load(&path, Some(&fixture("clip/config.json")), DType::F32, &device()).unwrap()
}

/// The golden picture [1, 3, h, w] in -1..1.
fn picture() -> Tensor {
    let rows = fixture_tensors("clip/io.safetensors").remove("image_u8_hwc").unwrap();
    let planes = rows.to_dtype(DType::F32).unwrap().permute((2, 0, 1)).unwrap().unsqueeze(0).unwrap();
    planes.affine(1.0 / 127.5, -1.0).unwrap()
}

#[test]
fn pixels_and_states_equal_golden_values() {
    let (golden, tower) = (fixture_tensors("clip/io.safetensors"), tower("official"));
    let pixels = tower.pixels(&picture()).unwrap();
    assert_close("pixels", &pixels, &golden["pixels_official_style"], PIXELS);
    for style in ["official_style", "hf_processor"] {
        let states = tower.encode(&golden[&format!("pixels_{style}")]).unwrap();
        assert_close(style, &states, &golden[&format!("{style}.clip_fea")], HIDDEN);
    }
    assert_same_bits(
        "HF names",
        &self::tower("hf").encode(&pixels).unwrap(),
        &tower.encode(&pixels).unwrap(),
    );
}

/// Pictures of a batch do not affect each other, and bf16 is as near as its 8 bits allow through three layers of a stream
/// that stays in f32.
#[test]
fn pictures_of_a_batch_are_alone_and_bf16_is_near() {
    let golden = fixture_tensors("clip/io.safetensors");
    let both = ["pixels_official_style", "pixels_hf_processor"].map(|name| golden[name].clone());
    let states = tower("hf").encode(&Tensor::cat(&both, 0).unwrap()).unwrap();
    for (i, style) in ["official_style", "hf_processor"].iter().enumerate() {
        let own = states.narrow(0, i, 1).unwrap();
        assert_close(style, &own, &golden[&format!("{style}.clip_fea")], HIDDEN);
    }
    let (path, config) = (fixture("clip/weights_hf.safetensors"), fixture("clip/config.json"));
    let rounded = Clip::load(&path, Some(&config), DType::BF16, &device()).unwrap();
    let states = rounded.encode(&both[0]).unwrap();
    assert_close("bf16", &states, &golden["official_style.clip_fea"], Tolerance::relative(0.03));
}

#[test]
fn what_is_no_tower_is_told() {
    let (weights, vae) =
        (fixture("clip/weights_official.safetensors"), fixture("repo_official_a14b/Wan2.1_VAE.pth"));
    let refused = |path| Clip::load(path, None, DType::F32, &device()).unwrap_err().to_string();
    assert!(refused(&vae).contains("not a CLIP picture tower"), "{}", refused(&vae));
    // 32 is not a multiple of the published head size, and nothing else gives the tiny one.
    assert!(refused(&weights).contains("num_attention_heads"), "{}", refused(&weights));
}

/// What diffusers shows the tower: Pillow's bicubic filter, which rounds to bytes.
#[test]
fn a_thumbnail_is_the_processors() {
    let golden = fixture_tensors("clip/io.safetensors");
    let (height, width, _) = golden["image_u8_hwc"].dims3().unwrap();
    let bytes: Vec<u8> = golden["image_u8_hwc"].flatten_all().unwrap().to_vec1().unwrap();
    let picture = data::Picture::new(width as u32, height as u32, bytes).unwrap().thumbnail(56).unwrap();
    let planes = Tensor::from_vec(picture.planes(), (1, 3, 56, 56), &device()).unwrap();
    let pixels = models::clip::normalised(&planes.affine(0.5, 0.5).unwrap()).unwrap();
    // Sums in another fixed point: a few numbers fall to the next byte, which is 0.0146 of a deviation.
    let golden = &golden["pixels_hf_processor"];
    assert_close("pixels", &pixels, golden, Tolerance::absolute(0.015));
    let off = (pixels - golden).unwrap().abs().unwrap().gt(1e-3).unwrap();
    let count = off.to_dtype(DType::F32).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(count < 20.0, "{count} of 9408 numbers are a byte off");
}

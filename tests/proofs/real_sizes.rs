//! The real models, by names and shapes alone: as many tensors and numbers as the published checkpoints have.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use models::clip::{ClipSizes, Naming};
use models::names;
use models::umt5::Umt5Sizes;
use models::vae::{Generation, Sizes};
use models::weights::{Checkpoint, TensorSpec};
use serde_json::json;
use trainer::tools::bench::{self, dit_preset, dit_presets};

/// (tensors, numbers) of a list of tensors, whose names must differ.
fn counted(specs: Vec<TensorSpec>) -> (usize, usize) {
    let names: std::collections::BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    assert_eq!(names.len(), specs.len(), "a name stands twice");
    (specs.len(), specs.iter().map(|spec| spec.shape.iter().product::<usize>()).sum())
}

#[test]
fn the_dits_have_the_published_tensors_and_adapters() {
    let published = [
        ("t2v-1.3b", (825, 1_418_996_800)),
        ("t2v-14b", (1095, 14_288_491_584)),
        ("t2v-a14b", (1095, 14_288_491_584)),
        ("i2v-14b", (1303, 16_394_878_784)),
        ("i2v-a14b", (1095, 14_288_901_184)),
        // The model of one picture with 514 rows of positions.
        ("flf2v-14b", (1304, 16_394_878_784 + 514 * 1280)),
        ("ti2v-5b", (825, 4_999_787_712)),
        ("fun-inp-1.3b", (983, 1_564_428_608)),
        ("fun-control-1.3b", (983, 1_564_502_336)),
        ("fun-control-14b", (1303, 16_395_124_544)),
        ("fun-control-v1.1-1.3b", (985, 1_564_602_176)),
        ("fun-control-v1.1-14b", (1305, 16_395_457_344)),
        ("fun-camera-1.3b", (989, 1_616_313_152)),
        ("fun-camera-14b", (1309, 16_898_128_704)),
        ("fun-control-a14b", (1097, 14_289_561_664)),
        ("fun-camera-a14b", (1101, 14_792_233_024)),
        // TI2V-5B with more channels in, and a reference's convolution or a camera adapter over 16 x 16 pixels.
        ("fun-inp-5b", (825, 4_999_787_712 + 52 * 4 * 3072)),
        ("fun-control-5b", (827, 4_999_787_712 + 100 * 4 * 3072 + (48 * 4 + 1) * 3072)),
        (
            "fun-camera-5b",
            (831, 4_999_787_712 + 52 * 4 * 3072 + (24 * 256 * 4 + 1) * 3072 + 2 * (9 * 3072 + 1) * 3072),
        ),
        ("vace-1.3b", (1264, 2_153_972_032)),
        ("vace-14b", (1331, 17_337_592_896)),
        // The official file has 14 more tensors, constants of the network.
        ("animate-14b", (1441 - 14, 17_274_816_884)),
        ("s2v-14b", (1260, 16_295_755_609)),
    ];
    for (name, expected) in published {
        assert_eq!(counted(dit_preset(name).unwrap().tensors()), expected, "{name}");
    }
    // Rank 32 on all ten modules of a block, as other trainers' files of these models count; the image branch has two more.
    let factors = |name: &str| -> (usize, usize) {
        let modules = dit_preset(name).unwrap().adaptable_modules();
        (modules.len(), modules.iter().map(|(_, out, input)| 32 * (out + input)).sum())
    };
    assert_eq!(factors("t2v-1.3b"), (300, 43_745_280));
    assert_eq!(factors("t2v-14b"), (400, 153_354_240));
    assert_eq!(factors("i2v-14b"), (480, 153_354_240 + 80 * 32 * 10_240));
}

/// Files with the names and shapes of the published models, and no bytes behind them: as long as the real ones, holes all
/// through. What reads headers takes them for the models, in both namings, and makes the same list of them again.
#[test]
fn a_file_of_each_published_model_is_opened_as_that_model() {
    let folder = tempfile::tempdir().unwrap();
    for name in dit_presets() {
        let config = dit_preset(name).unwrap();
        // diffusers has no class for S2V.
        let namings = if name == "s2v-14b" { &["official"][..] } else { &["official", "diffusers"] };
        for naming in namings.iter().copied() {
            let file = folder.path().join(format!("{name}-{naming}.safetensors"));
            let spelt = |spec: TensorSpec| match naming {
                "diffusers" => {
                    let name = names::tensor_to_diffusers(&spec.name).unwrap();
                    match name.split_once("linear1_kv") {
                        // Two layers there.
                        Some((layer, end)) => {
                            let half = [&[spec.shape[0] / 2], &spec.shape[1..]].concat();
                            ["to_k", "to_v"]
                                .map(|part| (format!("{layer}{part}{end}"), half.clone()))
                                .to_vec()
                        }
                        None => vec![(name, spec.shape)],
                    }
                }
                _ => vec![(spec.name, spec.shape)],
            };
            hollow(&file, config.tensors().into_iter().flat_map(spelt));
            let told = format!(r#"{{"num_heads":{}}}"#, config.heads);
            let (opened, weights) = models::open_dit(&file, Some(&told)).unwrap();
            assert_eq!(opened, config, "{name}, {naming}");
            assert_eq!(weights.names().len(), config.tensors().len());
            std::fs::remove_file(&file).unwrap();
        }
    }
    for sizes in [bench::vae_preset("wan2.1").unwrap(), bench::vae_preset("wan2.2").unwrap()] {
        let file = folder.path().join("vae.safetensors");
        hollow(&file, sizes.tensors().into_iter().map(|spec| (spec.name, spec.shape)));
        assert_eq!(Sizes::detect(&Checkpoint::open(&file).unwrap()).unwrap().0, sizes);
    }
}

/// A safetensors file in bf16 of these tensors, all zeros that lie nowhere.
fn hollow(path: &Path, tensors: impl Iterator<Item = (String, Vec<usize>)>) {
    let mut at = 0;
    let mut header = serde_json::Map::new();
    for (name, shape) in tensors {
        let end = at + 2 * shape.iter().product::<usize>();
        header.insert(name, json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    file.set_len((8 + header.len() + at) as u64).unwrap();
}

#[test]
fn the_vaes_have_the_published_tensors() {
    assert_eq!(counted(Sizes::published(Generation::Wan21).tensors()), (194, 126_892_531));
    assert_eq!(counted(Sizes::published(Generation::Wan22).tensors()), (196, 704_688_668));
}

/// Without what is never read: the norm after the last layer (2 tensors of 1280) and the projection (1280 x 1024).
#[test]
fn the_picture_tower_has_the_published_tensors() {
    let sizes = ClipSizes::PUBLISHED;
    let (read, unread) = (632_076_800 - 2 * 1280 - 1280 * 1024, 3);
    assert_eq!(counted(sizes.tensors(Naming::Official)), (392 - unread, read));
    assert_eq!(counted(sizes.tensors(Naming::Hf)), (520 - unread, read));
}

#[test]
fn the_text_encoder_has_the_published_tensors() {
    assert_eq!(counted(Umt5Sizes::PUBLISHED.tensors()), (242, 5_680_910_336));
}

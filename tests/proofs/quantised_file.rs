//! Quantised weights that are cached on disk are those that quantising gives, or are made again.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::random::Key;
use kernels::weight::{Format, Quantised, Weight};
use kernels::{DType, Device, Tensor};
use models::weights::{
    CacheOutcome, Frozen, Patch, Patches, QuantisedFile, Storage, TensorClass, TensorSpec, Weights,
    write_safetensors,
};
use proofs::device;
use tempfile::TempDir;

/// Codes of more than one piece.
const SHAPE: [usize; 2] = [2100, 1056];
const NAMES: [&str; 3] = ["blocks.0.ffn.0.weight", "blocks.0.ffn.2.weight", "blocks.1.ffn.0.weight"];

/// A checkpoint of three matrices, each of another type, and what is not quantised; and a folder beside it.
struct Model(TempDir);

impl Model {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let matrix = |name: &str, dtype| {
            let numbers = Key::new(7, name, &[]).normals(SHAPE[0] * SHAPE[1]);
            Tensor::from_vec(numbers, &SHAPE[..], &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        };
        let mut tensors: Vec<(&str, Tensor)> = std::iter::zip(NAMES, [DType::BF16, DType::F16, DType::F32])
            .map(|(name, dtype)| (name, matrix(name, dtype)))
            .collect();
        tensors.push(("head.bias", Tensor::ones(5, DType::F32, &Device::Cpu).unwrap()));
        let named = tensors.iter().map(|(name, tensor)| (*name, tensor));
        write_safetensors(&folder.path().join("m.safetensors"), named, &Default::default()).unwrap();
        Self(folder)
    }

    fn checkpoint(&self) -> PathBuf {
        self.0.path().join("m.safetensors")
    }

    fn folder(&self) -> PathBuf {
        self.0.path().join("quantised")
    }

    fn specs() -> Vec<TensorSpec> {
        let matrices = NAMES.map(|name| TensorSpec::new(name, SHAPE).of(TensorClass::Matrix));
        matrices.into_iter().chain([TensorSpec::new("head.bias", [5])]).collect()
    }

    fn weights(&self) -> Weights {
        Weights::open(&self.checkpoint(), &Self::specs(), |_| None, |_| false).unwrap()
    }

    fn file(&self, format: Format) -> QuantisedFile {
        let file = QuantisedFile::open(&self.folder(), &self.weights(), &Self::specs(), format, 0);
        file.unwrap().unwrap()
    }

    /// All matrices, read by a thread each as stages do, and what became of the file.
    fn load(&self, format: Format) -> (Vec<[Vec<u32>; 2]>, CacheOutcome) {
        let file = Arc::new(self.file(format));
        let weights = self.weights().cached_in(file.clone());
        let matrices = read(&weights, format);
        (matrices, file.finish())
    }

    /// What quantising gives.
    fn expected(&self, format: Format) -> Vec<[Vec<u32>; 2]> {
        read(&self.weights(), format)
    }

    /// Files of the folder.
    fn files(&self) -> Vec<PathBuf> {
        match fs::read_dir(self.folder()) {
            Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
            Err(_) => Vec::new(),
        }
    }
}

fn read(weights: &Weights, format: Format) -> Vec<[Vec<u32>; 2]> {
    let (frozen, device) = (frozen(format), device());
    std::thread::scope(|scope| {
        let read = |name| bits(&weights.matrix(name, frozen, &device).unwrap());
        let threads = NAMES.map(|name| scope.spawn(move || read(name)));
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn frozen(format: Format) -> Frozen {
    Frozen { compute: DType::BF16, storage: Storage::Quantised(format) }
}

/// Codes, and bits of scales.
fn bits(weight: &Weight) -> [Vec<u32>; 2] {
    let Weight::Quantised(Quantised { codes, scale, .. }) = weight else { panic!("it is dense") };
    let codes: Vec<u8> = codes.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let scale: Vec<f32> = scale.to_device(&Device::Cpu).unwrap().to_vec1().unwrap();
    [codes.into_iter().map(u32::from).collect(), scale.into_iter().map(f32::to_bits).collect()]
}

#[track_caller]
fn assert_loads(model: &Model, format: Format, expected: &[[Vec<u32>; 2]], outcome: &CacheOutcome) {
    let (found, became) = model.load(format);
    assert!(found == expected, "other codes or scales");
    assert_eq!(&became, outcome);
}

/// Changes one byte of a file.
fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// A byte of the checkpoint that its fingerprint does not sample stands for the checkpoint not being read.
#[test]
fn the_second_load_has_the_same_bits_and_does_not_read_the_matrices() {
    for format in [Format::E4m3, Format::Int8] {
        let model = Model::new();
        let expected = model.expected(format);
        assert!(!model.file(format).is_there());
        assert!(model.files().is_empty(), "opening wrote something");
        assert_loads(&model, format, &expected, &CacheOutcome::Written { damage: None });
        assert_eq!(model.files(), [model.file(format).path()]);
        let (length, of_file) = (fs::metadata(&model.files()[0]).unwrap().len(), model.file(format).bytes());
        assert_eq!(length, of_file);
        let bytes = fs::read(&model.files()[0]).unwrap();
        assert_eq!(safetensors::SafeTensors::deserialize(&bytes).unwrap().len(), 2 * NAMES.len() + 1);

        for third in 1..3 {
            flip(&model.checkpoint(), fs::metadata(model.checkpoint()).unwrap().len() * third / 3 + 4001);
        }
        assert!(model.expected(format) != expected, "the change of the checkpoint does not show");
        assert_loads(&model, format, &expected, &CacheOutcome::Read);
    }
}

/// Wherever it is damaged, nothing of the damage is used, the file is whole after that load, and the user is told once.
#[test]
fn a_damaged_file_is_never_used_and_is_made_again() {
    let (model, format) = (Model::new(), Format::E4m3);
    let expected = model.expected(format);
    assert_loads(&model, format, &expected, &CacheOutcome::Written { damage: None });
    let path = model.files().remove(0);
    let whole = fs::read(&path).unwrap();
    let head = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap());
    let length = whole.len() as u64;
    let scales = head + 8 * 9 + 100; // three matrices have two pieces of codes and one of scales each
    for (what, damage) in [
        ("length of the header", 0),
        ("header", 30),
        ("hash", head + 11),
        ("scale", scales),
        ("first code", length - 3 * (SHAPE[0] * SHAPE[1]) as u64),
        ("code of a second piece", length - 1),
    ] {
        flip(&path, damage);
        let (found, outcome) = model.load(format);
        assert!(found == expected, "{what}: damage was used");
        assert!(matches!(outcome, CacheOutcome::Written { damage: Some(_) }), "{what}: {outcome:?}");
        assert!(fs::read(&path).unwrap() == whole, "{what}: not the same file again");
        assert_loads(&model, format, &expected, &CacheOutcome::Read);
    }
    for (what, bytes) in [("cut off", &whole[..whole.len() - 1]), ("empty", &[]), ("other bytes", b"{}")] {
        fs::write(&path, bytes).unwrap();
        let (found, outcome) = model.load(format);
        assert!(found == expected, "{what}");
        assert!(matches!(outcome, CacheOutcome::Written { damage: Some(_) }), "{what}: {outcome:?}");
        assert!(fs::read(&path).unwrap() == whole, "{what}: not the same file again");
    }
    assert_eq!(model.files().len(), 1, "something was left behind");
}

/// However few may wait, the file is the same, and until all of it is on the disk nobody finds it.
#[test]
fn matrices_wait_for_the_disk_behind_the_load() {
    let format = Format::E4m3;
    let written = [0, (SHAPE[0] * SHAPE[1]) as u64 + 10_000, u64::MAX].map(|most| {
        let model = Model::new();
        let file = Arc::new(model.file(format).behind(most));
        let weights = model.weights().cached_in(file.clone());
        assert!(read(&weights, format) == model.expected(format), "{most}");
        assert!(file.is_being_written() && !file.path().exists(), "{most}: it is there before it is whole");
        assert_eq!(file.finish(), CacheOutcome::Written { damage: None });
        assert_eq!(model.files(), [file.path()], "{most}: something was left behind");
        fs::read(file.path()).unwrap()
    });
    assert!(written[0] == written[2] && written[1] == written[2]);
}

#[test]
fn a_disk_that_takes_nothing_does_not_stop_a_load() {
    let (model, format) = (Model::new(), Format::Int8);
    fs::write(model.folder(), "in the way").unwrap();
    let (found, outcome) = model.load(format);
    assert!(found == model.expected(format));
    assert!(matches!(outcome, CacheOutcome::NotWritten(_)), "{outcome:?}");
}

#[test]
fn a_load_that_ends_early_leaves_no_file() {
    let (model, format) = (Model::new(), Format::E4m3);
    let file = Arc::new(model.file(format));
    let weights = model.weights().cached_in(file.clone());
    weights.matrix(NAMES[0], frozen(format), &device()).unwrap();
    assert_eq!(model.files().len(), 1, "nothing is being written");
    assert!(matches!(file.finish(), CacheOutcome::NotWritten(why) if why.contains(NAMES[1])));
    assert!(model.files().is_empty());
    // Nor does one that failed before anyone asked.
    let file = Arc::new(model.file(format));
    model.weights().cached_in(file.clone()).matrix(NAMES[0], frozen(format), &device()).unwrap();
    drop(file);
    assert!(model.files().is_empty());
}

/// Adds nothing, and is a patch all the same.
#[derive(Debug)]
struct Touch;

impl Patch for Touch {
    fn patched(&self, weight: Tensor) -> models::Result<Tensor> {
        Ok(weight)
    }
}

/// Another checkpoint, another format and merged adapters must not meet each other's codes.
#[test]
fn a_file_belongs_to_one_checkpoint_and_one_format_and_never_to_patched_weights() {
    let model = Model::new();
    let [fp8, int8] = [Format::E4m3, Format::Int8].map(|format| model.file(format).path().to_owned());
    assert_ne!(fp8, int8);
    let mut patches = Patches::default();
    patches.add(NAMES[0].to_owned(), Touch);
    let open = |weights: &Weights, least| {
        QuantisedFile::open(&model.folder(), weights, &Model::specs(), Format::E4m3, least).unwrap()
    };
    assert!(open(&model.weights().patched(patches), 0).is_none());
    let bytes = (3 * SHAPE[0] * SHAPE[1]) as u64;
    assert!(open(&model.weights(), bytes).is_some() && open(&model.weights(), bytes + 1).is_none());

    let other = Model::new();
    let start = fs::metadata(other.checkpoint()).unwrap().len() - 1; // sampled, as the end of a tensor
    flip(&other.checkpoint(), start);
    assert_ne!(other.file(Format::E4m3).path().file_name(), fp8.file_name());
}

//! Damaged and hostile checkpoints: refused by name, never a panic, never more memory than the file has bytes.

use std::io::Write;
use std::path::Path;

use kernels::{DType, Device};
use models::weights::Checkpoint;
use proofs::fixture;
use proptest::prelude::*;

/// A safetensors file of this header and so many zero bytes of data.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// A `.pth` of views (name, offset, shape, strides) of one f32 storage holding 0, 1, 2, ..., as PyTorch saves a module's
/// state: an ordered dictionary with a `_metadata` attribute.
pub fn pth(elements: usize, views: &[(&str, usize, &[usize], &[usize])]) -> Vec<u8> {
    let text = |p: &mut Vec<u8>, s: &str| {
        p.push(b'X');
        p.extend((s.len() as u32).to_le_bytes());
        p.extend(s.bytes());
    };
    let int = |p: &mut Vec<u8>, n: usize| {
        p.push(b'J');
        p.extend((n as u32).to_le_bytes());
    };
    let tuple = |p: &mut Vec<u8>, items: &[usize]| {
        p.push(b'(');
        items.iter().for_each(|n| int(p, *n));
        p.push(b't');
    };
    let mut p = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    for (name, offset, shape, strides) in views {
        text(&mut p, name);
        p.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut p, "storage");
        p.extend(b"ctorch\nFloatStorage\n");
        text(&mut p, "0");
        text(&mut p, "cpu");
        int(&mut p, elements);
        p.extend(b"tQ");
        int(&mut p, *offset);
        tuple(&mut p, shape);
        tuple(&mut p, strides);
        p.extend([0x89]);
        p.extend(b"ccollections\nOrderedDict\n)RtR");
    }
    p.extend(b"u}");
    text(&mut p, "_metadata");
    p.extend(b"ccollections\nOrderedDict\n)Rsb.");
    archive(&p, &(0..elements).flat_map(|v| (v as f32).to_le_bytes()).collect::<Vec<_>>())
}

fn archive(pickle: &[u8], storage: &[u8]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("m/data.pkl", pickle), ("m/byteorder", b"little"), ("m/data/0", storage)] {
        zip.start_file(name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn refusal(bytes: &[u8]) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    Checkpoint::open(file.path()).unwrap_err().to_string()
}

#[test]
fn each_damaged_header_is_refused_with_its_reason() {
    let tensor =
        |begin: usize, end: usize| format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":[{begin},{end}]}}"#);
    let two = |a: String, b: String| format!(r#"{{"a":{a},"b":{b}}}"#);
    let mut long = safetensors("{}", 0);
    long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let cases = [
        (long, "header claims 18446744073709551615 bytes"),
        (safetensors(&two(tensor(0, 8), tensor(4, 12)), 12), "overlaps"),
        (safetensors(&two(tensor(0, 8), tensor(12, 20)), 20), "hole of 4 bytes"),
        (safetensors(&two(tensor(0, 8), tensor(8, 16)), 12), "truncated"),
        (safetensors(&two(tensor(0, 8), tensor(8, 16)), 20), "the tensors take 16 bytes"),
        (safetensors(&two(tensor(0, 8), tensor(8, 12)), 12), "does not fill its 4 bytes"),
        (safetensors(&format!(r#"{{"a":{0},"a":{0}}}"#, tensor(0, 8)), 8), "in the header twice"),
        (safetensors(r#"{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}"#, 1), "dtype F4"),
        (
            safetensors(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,2],"data_offsets":[0,8]}}"#, 8),
            "does not fill",
        ),
        (vec![1, 2, 3], "too short"),
        (vec![], "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n".to_vec(), "Git LFS pointer"),
        (vec![0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9], "old, non-zip format"),
    ];
    for (bytes, reason) in cases {
        let error = refusal(&bytes);
        assert!(error.contains(reason), "{reason} not in: {error}");
    }
}

/// A header of 0x0280 bytes begins as a pickle of protocol 2 does.
#[test]
fn a_header_length_that_looks_like_a_pickle_is_a_safetensors_file() {
    let tensor = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    let header = format!("{:<1$}", format!(r#"{{"a":{tensor}}}"#), 0x280);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), safetensors(&header, 8)).unwrap();
    assert_eq!(Checkpoint::open(file.path()).unwrap().shape("a"), Some(&[2][..]));
}

#[test]
fn a_pickle_that_calls_anything_is_refused_and_not_run() {
    let file = tempfile::tempdir().unwrap();
    let witness = file.path().join("witness");
    let calls = [
        format!("cposix\nsystem\n(X\0\0\0\0touch {}tR.", witness.display()),
        "cbuiltins\neval\n(tR.".to_owned(),
        "ctorch\nload\n(tR.".to_owned(),
        "}(X\u{1}\0\0\0acollections.abc\nx\n.".to_owned(),
    ];
    for call in calls {
        let mut pickle = vec![0x80, 2];
        pickle.extend(call.bytes());
        let error = refusal(&archive(&pickle, &[]));
        assert!(error.contains("not a plain tensor dictionary") || error.contains("damaged"), "{error}");
    }
    let error = refusal(&archive(b"\x80\x02cposix\nsystem\n(tR.", &[]));
    assert!(error.contains("not a plain tensor dictionary: it refers to `posix.system`"), "{error}");
    assert!(refusal(&archive(b"\x80\x02}X\x01\0\0\0aK\x05s.", &[])).contains("`a` is not a tensor"));
    assert!(!witness.exists());
}

#[test]
fn tuples_within_tuples_without_end_are_refused() {
    let mut pickle = vec![0x80, 2, b')'];
    pickle.extend(std::iter::repeat_n(0x85, 1_000_000));
    pickle.push(b'.');
    assert!(refusal(&archive(&pickle, &[])).contains("nested"));
    // Doubling: a tuple of two copies of the last tuple, again and again.
    let doubling = b"h\x00h\x00\x86q\x00";
    let mut pickle = b"\x80\x02)q\x00".to_vec();
    pickle.extend(doubling.repeat(60));
    assert!(refusal(&archive(&pickle, &[])).contains("nested"));
    // A long tuple, copied again and again.
    let mut pickle = b"\x80\x02(".to_vec();
    pickle.extend(b"N".repeat(10_000));
    pickle.extend(b"tq\x00");
    pickle.extend(b"h\x00".repeat(10_000));
    assert!(refusal(&archive(&pickle, &[])).contains("repeats its values"));
}

/// A byte of a pickle makes a value of many: marks and dictionaries without end took gigabytes.
#[test]
fn values_without_end_are_refused() {
    for endless in [b"(", b"}", b"N", b")"] {
        let mut pickle = b"\x80\x02".to_vec();
        pickle.extend(endless.repeat(2_000_000));
        pickle.push(b'.');
        assert!(refusal(&archive(&pickle, &[])).contains("more values than any real checkpoint"));
    }
}

#[test]
fn a_folder_with_lost_or_foreign_shards_is_refused() {
    let source = fixture("repo_official_a14b/high_noise_model");
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(source).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let shard = |n: usize| dir.path().join(format!("diffusion_pytorch_model-0000{n}-of-00002.safetensors"));
    let error = || Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(Checkpoint::open(dir.path()).is_ok());
    let whole = std::fs::read(shard(2)).unwrap();
    std::fs::write(shard(2), &whole[..whole.len() - 100]).unwrap();
    assert!(error().contains("00002-of-00002.safetensors") && error().contains("truncated"), "{}", error());
    std::fs::write(shard(2), safetensors("{}", 0)).unwrap();
    assert!(error().contains("not in the shard that this index names"), "{}", error());
    std::fs::copy(shard(1), shard(2)).unwrap();
    assert!(error().contains("is also in"), "{}", error());
    std::fs::remove_file(shard(2)).unwrap();
    assert!(
        error().contains("1 of 2 shards are missing: diffusion_pytorch_model-00002-of-00002"),
        "{}",
        error()
    );
    std::fs::remove_file(dir.path().join("diffusion_pytorch_model.safetensors.index.json")).unwrap();
    assert!(error().contains("shards without their"), "{}", error());
}

/// Opens a damaged file and reads all it claims to have. Whatever opens must not claim more than the file holds.
fn survive(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
    let Ok(checkpoint) = Checkpoint::open(path) else { return };
    for (name, entry) in checkpoint.entries() {
        assert!(entry.bytes() <= bytes.len(), "{name} claims {} of {} bytes", entry.bytes(), bytes.len());
        let _ = checkpoint.tensor(name, DType::F32, &Device::Cpu);
    }
    let _ = checkpoint.fingerprint();
}

#[derive(Debug, Clone)]
enum Damage {
    Flip(f64, u8),
    Cut(f64),
    Insert(f64, Vec<u8>),
}

fn damage() -> impl Strategy<Value = Damage> {
    let place = 0.0..1.0f64;
    prop_oneof![
        6 => (place.clone(), any::<u8>()).prop_map(|(at, v)| Damage::Flip(at, v)),
        1 => place.clone().prop_map(Damage::Cut),
        1 => (place, proptest::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, v)| Damage::Insert(at, v)),
    ]
}

fn damaged(mut bytes: Vec<u8>, damages: &[Damage]) -> Vec<u8> {
    for damage in damages {
        let place = |at: &f64| ((bytes.len() as f64 * at) as usize).min(bytes.len().saturating_sub(1));
        match damage {
            Damage::Flip(at, v) if !bytes.is_empty() => {
                let i = place(at);
                bytes[i] = *v;
            }
            Damage::Cut(at) => bytes.truncate(place(at)),
            Damage::Insert(at, v) if !bytes.is_empty() => {
                let i = place(at);
                bytes.splice(i..i, v.iter().copied());
            }
            _ => {}
        }
    }
    bytes
}

fn small_safetensors() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}"#;
    safetensors(header, 32)
}

fn small_pth() -> Vec<u8> {
    pth(12, &[("plain", 0, &[3, 4], &[4, 1]), ("turned", 0, &[4, 3], &[1, 4])])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_checkpoints_never_panic(
        pickled in any::<bool>(),
        damages in proptest::collection::vec(damage(), 1..5),
    ) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes = if pickled { small_pth() } else { small_safetensors() };
        survive(file.path(), &damaged(bytes, &damages));
    }

    #[test]
    fn damaged_indices_never_panic(damages in proptest::collection::vec(damage(), 1..5)) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("m-00001-of-00001.safetensors"), small_safetensors()).unwrap();
        let index = br#"{"weight_map":{"a":"m-00001-of-00001.safetensors","b":"m-00001-of-00001.safetensors"}}"#;
        let path = dir.path().join("m.safetensors.index.json");
        std::fs::write(&path, index).unwrap();
        prop_assert!(Checkpoint::open(dir.path()).is_ok());
        std::fs::write(&path, damaged(index.to_vec(), &damages)).unwrap();
        let _ = Checkpoint::open(dir.path());
    }

    #[test]
    fn damaged_pickles_in_a_sound_archive_never_panic(
        damages in proptest::collection::vec(damage(), 1..5),
    ) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let sound = small_pth();
        let mut archived = zip::ZipArchive::new(std::io::Cursor::new(&sound)).unwrap();
        let mut pickle = Vec::new();
        std::io::Read::read_to_end(&mut archived.by_name("m/data.pkl").unwrap(), &mut pickle).unwrap();
        survive(file.path(), &archive(&damaged(pickle, &damages), &[0; 48]));
    }
}

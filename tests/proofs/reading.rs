//! Reading tensors onto a device in pieces: bit for bit what each number is by itself, and the first bad number is named.

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use kernels::fill::PIECE;
use kernels::random::Key;
use kernels::{DType, Device, Tensor};
use models::weights::side_by_side::on_threads;
use models::weights::{
    Checkpoint, Entered, Patch, Patches, StoredDType, TensorSpec, Weights, write_streamed,
};
use proofs::device;
use tempfile::TempDir;

const FLOATS: [StoredDType; 6] = [
    StoredDType::F64,
    StoredDType::F32,
    StoredDType::F16,
    StoredDType::BF16,
    StoredDType::F8E4M3,
    StoredDType::F8E5M2,
];

/// More numbers than one piece has of bf16, and no multiple of anything.
const ROWS: usize = 1031;
const COLUMNS: usize = 1027;
const COUNT: usize = ROWS * COLUMNS;

/// The value of one stored number.
fn value(dtype: StoredDType, bytes: &[u8]) -> f64 {
    match dtype {
        StoredDType::F64 => f64::from_le_bytes(bytes.try_into().unwrap()),
        StoredDType::F32 => f32::from_le_bytes(bytes.try_into().unwrap()).into(),
        StoredDType::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).into(),
        StoredDType::BF16 => bf16::from_le_bytes(bytes.try_into().unwrap()).into(),
        StoredDType::F8E4M3 => float8::F8E4M3::from_bits(bytes[0]).to_f64(),
        StoredDType::F8E5M2 => float8::F8E5M2::from_bits(bytes[0]).to_f64(),
        other => panic!("{other} is no float"),
    }
}

/// Random bits, without those that no dtype of the targets can represent.
fn random(dtype: StoredDType, seed: u64) -> Vec<u8> {
    let size = dtype.size();
    let words = Key::new(seed, dtype.name(), &[]).normals(COUNT);
    let mut bytes = Vec::with_capacity(COUNT * size);
    for (i, word) in words.iter().enumerate() {
        let bits = u64::from(word.to_bits()).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ i as u64;
        let bits = &bits.to_le_bytes()[..size];
        let number = value(dtype, bits);
        let is_used = number.is_finite() && number.abs() < 60_000.0;
        bytes.extend_from_slice(if is_used { bits } else { &[0; 8][..size] });
    }
    bytes
}

/// A file of matrices in these dtypes, named by them, and its folder.
fn file(tensors: &[(String, StoredDType, Vec<usize>, Vec<u8>)]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let enter = |(name, dtype, shape, _): &(String, StoredDType, Vec<usize>, Vec<u8>)| Entered {
        name: name.clone(),
        dtype: *dtype,
        shape: shape.clone(),
    };
    let bytes_of = |entered: &Entered| {
        let (.., bytes) = tensors.iter().find(|(name, ..)| *name == entered.name).unwrap();
        Ok(bytes.clone())
    };
    write_streamed(&path, tensors.iter().map(enter).collect(), &Default::default(), bytes_of).unwrap();
    (folder, path)
}

fn matrix(name: &str, dtype: StoredDType, bytes: &[u8]) -> (String, StoredDType, Vec<usize>, Vec<u8>) {
    (name.to_owned(), dtype, vec![ROWS, COLUMNS], bytes.to_vec())
}

/// The bits of each number of `x`.
fn bits(x: &Tensor) -> Vec<u32> {
    let x = x.to_device(&Device::Cpu).unwrap().flatten_all().unwrap();
    match x.dtype() {
        DType::F32 => x.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect(),
        DType::F16 => x.to_vec1::<f16>().unwrap().into_iter().map(|v| v.to_bits().into()).collect(),
        DType::BF16 => x.to_vec1::<bf16>().unwrap().into_iter().map(|v| v.to_bits().into()).collect(),
        _ => x.to_vec1::<u8>().unwrap().into_iter().map(u32::from).collect(),
    }
}

/// The bits of one number in `dtype`.
fn bits_of(number: f32, dtype: DType) -> u32 {
    match dtype {
        DType::F32 => number.to_bits(),
        DType::F16 => f16::from_f32(number).to_bits().into(),
        _ => bf16::from_f32(number).to_bits().into(),
    }
}

#[track_caller]
fn assert_bits(what: &str, found: &[u32], expected: impl Iterator<Item = u32>) {
    let expected: Vec<u32> = expected.collect();
    assert_eq!(found.len(), expected.len(), "{what}");
    let differs = found.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!(differs.map(|i| (i, found[i], expected[i])), None, "{what}: number, bits found and expected");
}

/// A piece in the wrong place, a step converted twice, a rounding of its own on the way to a device, or a buffer of the ring that is
/// filled again before its copy has ended, would all show.
#[test]
fn numbers_of_every_type_arrive_as_each_is_by_itself() {
    let stored: Vec<_> =
        FLOATS.iter().map(|dtype| matrix(dtype.name(), *dtype, &random(*dtype, 1))).collect();
    assert!(stored.iter().any(|(.., bytes)| bytes.len() > 2 * PIECE));
    let (_folder, path) = file(&stored);
    let checkpoint = Checkpoint::open(&path).unwrap();
    for (name, dtype, _, bytes) in &stored {
        for target in [DType::F32, DType::F16, DType::BF16] {
            let read = checkpoint.tensor(name, target, &device()).unwrap();
            assert_eq!((read.dtype(), read.dims()), (target, [ROWS, COLUMNS].as_slice()));
            let expected = bytes.chunks(dtype.size()).map(|b| bits_of(value(*dtype, b) as f32, target));
            assert_bits(&format!("{name} as {target:?}"), &bits(&read), expected);
        }
    }
}

/// Scales are found by a number's place in the whole tensor, whatever piece it is in; codes are not touched.
#[test]
fn eight_bit_floats_meet_their_scales_in_every_piece() {
    const BLOCK: usize = 13; // a divisor of the columns
    assert_eq!(COLUMNS % BLOCK, 0);
    let codes = random(StoredDType::F8E4M3, 2);
    for (count, each) in [(1, COUNT), (ROWS, COLUMNS), (COUNT / BLOCK, BLOCK)] {
        let scales: Vec<f32> =
            Key::new(3, "scales", &[]).normals(count).iter().map(|s| s.abs() + 0.1).collect();
        let scale_bytes = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let shape = if count == 1 { vec![1] } else { vec![ROWS, count / ROWS] };
        let scale = ("m.scale_weight".to_owned(), StoredDType::F32, shape, scale_bytes);
        let (_folder, path) = file(&[matrix("m.weight", StoredDType::F8E4M3, &codes), scale]);
        let checkpoint = Checkpoint::open(&path).unwrap();
        let scaled = |(i, code): (usize, &u8)| value(StoredDType::F8E4M3, &[*code]) as f32 * scales[i / each];
        for target in [DType::F32, DType::BF16] {
            let read = checkpoint.tensor("m.weight", target, &device()).unwrap();
            let expected = codes.iter().enumerate().map(|at| bits_of(scaled(at), target));
            assert_bits(&format!("{count} scales as {target:?}"), &bits(&read), expected);
        }
        let kept = checkpoint.codes("m.weight", &device()).unwrap().unwrap();
        assert_bits("codes", &bits(&kept.codes), codes.iter().map(|code| u32::from(*code)));
    }
}

#[test]
fn a_strided_view_of_many_pieces_is_read_as_the_same_numbers_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.pth");
    let views: &[(&str, usize, &[usize], &[usize])] =
        &[("plain", 0, &[ROWS, COLUMNS], &[COLUMNS, 1]), ("turned", 0, &[COLUMNS, ROWS], &[1, COLUMNS])];
    std::fs::write(&path, crate::weights_corrupted::pth(COUNT, views)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let read = |name| checkpoint.tensor(name, dtype, &device()).unwrap();
        let plain = bits(&read("plain"));
        assert_bits("plain", &plain, (0..COUNT).map(|i| bits_of(i as f32, dtype)));
        let turned = (0..COUNT).map(|i| plain[i % ROWS * COLUMNS + i / ROWS]);
        assert_bits("turned", &bits(&read("turned")), turned);
    }
}

/// Adds one to each number.
#[derive(Debug)]
struct PlusOne;

impl Patch for PlusOne {
    fn patched(&self, weight: Tensor) -> models::Result<Tensor> {
        Ok((weight + 1.0)?)
    }
}

#[test]
fn a_patched_tensor_is_changed_in_f32_and_rounded_once() {
    let bytes = random(StoredDType::BF16, 4);
    let (_folder, path) = file(&[matrix("w", StoredDType::BF16, &bytes)]);
    let mut patches = Patches::default();
    patches.add("w".to_owned(), PlusOne);
    let specs = [TensorSpec::new("w", [ROWS, COLUMNS])];
    let weights = Weights::open(&path, &specs, |_| None, |_| false).unwrap().patched(patches);
    let read = weights.tensor("w", DType::BF16, &device()).unwrap();
    let plus_one = |b: &[u8]| bits_of(value(StoredDType::BF16, b) as f32 + 1.0, DType::BF16);
    assert_bits("patched", &bits(&read), bytes.chunks(2).map(plus_one));
}

/// Pieces are read side by side, so a later bad number may be seen first. After an error the device reads on.
#[test]
fn the_foremost_bad_number_is_named_and_the_next_tensor_is_read() {
    let places = [COUNT - 1, COUNT / 2, 700_001];
    for dtype in FLOATS {
        let size = dtype.size();
        let good = random(dtype, 5);
        let mut bad = good.clone();
        for at in places {
            let nan = &mut bad[at * size..(at + 1) * size];
            nan.fill(0xff);
        }
        let (_folder, path) = file(&[matrix("bad", dtype, &bad), matrix("good", dtype, &good)]);
        let checkpoint = Checkpoint::open(&path).unwrap();
        for target in [DType::F32, DType::BF16] {
            let error = checkpoint.tensor("bad", target, &device()).unwrap_err().to_string();
            for text in
                ["m.safetensors", "`bad`", "NaN", &format!("element {}", places.iter().min().unwrap())]
            {
                assert!(error.contains(text), "{dtype} as {target:?}: {text} not in {error}");
            }
            let read = checkpoint.tensor("good", target, &device()).unwrap();
            let expected = good.chunks(size).map(|b| bits_of(value(dtype, b) as f32, target));
            assert_bits(&format!("{dtype} after an error"), &bits(&read), expected);
        }
    }
}

/// Stages and experts are read at the same time, through one ring where they are on one device.
#[test]
fn threads_that_read_at_once_get_their_own_tensors() {
    let stored: Vec<_> = (0..6)
        .map(|i| matrix(&format!("w{i}"), StoredDType::BF16, &random(StoredDType::BF16, 10 + i)))
        .collect();
    let (_folder, path) = file(&stored);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let device = device();
    std::thread::scope(|scope| {
        for (name, _, _, bytes) in &stored {
            let (checkpoint, device) = (&checkpoint, &device);
            scope.spawn(move || {
                let read = checkpoint.tensor(name, DType::BF16, device).unwrap();
                let expected = bytes.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b).into());
                assert_bits(name, &bits(&read), expected);
            });
        }
    });
}

/// Whichever ends first, parts come back in order; of two that fail the first is told, and nothing is begun behind them.
#[test]
fn parts_that_are_read_at_once_come_in_order_and_stop_at_the_first_that_fails() {
    let items: Vec<usize> = (0..40).collect();
    let slow_if_even =
        |n: usize| std::thread::sleep(std::time::Duration::from_millis(n.is_multiple_of(2).into()));
    let doubled = on_threads(&items, 4, |index, item| {
        slow_if_even(index);
        Ok(2 * item)
    });
    assert_eq!(doubled.unwrap(), items.iter().map(|item| 2 * item).collect::<Vec<_>>());

    let begun = std::sync::atomic::AtomicUsize::new(0);
    let failed = on_threads(&items, 4, |index, _| {
        begun.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        slow_if_even(index);
        match index {
            // The later one fails sooner.
            10 | 11 => Err(models::Error::Mismatch(format!("part {index}"))),
            _ => Ok(()),
        }
    });
    assert_eq!(failed.unwrap_err().to_string(), "part 10");
    assert!(begun.into_inner() <= 11 + 4, "parts were begun after a failure");
}

/// A file that is replaced while a model is read would mix two models.
#[test]
fn a_file_that_is_replaced_after_it_was_opened_is_read_as_it_was() {
    let of = |seed| random(StoredDType::BF16, seed);
    let (_folder, path) = file(&[matrix("w", StoredDType::BF16, &of(20))]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let (_other_folder, other) = file(&[matrix("w", StoredDType::BF16, &of(21))]);
    replace(&other, &path);
    let read = checkpoint.tensor("w", DType::BF16, &device()).unwrap();
    let expected = of(20);
    assert_bits("w", &bits(&read), expected.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b).into()));
}

fn replace(from: &Path, to: &Path) {
    let beside = to.with_extension("new");
    std::fs::copy(from, &beside).unwrap();
    std::fs::rename(&beside, to).unwrap();
}

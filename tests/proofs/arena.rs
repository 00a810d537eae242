//! Memory of the allocator belongs to one tensor at a time, and none of it is lost.

use std::collections::HashMap;

use kernels::arena::{Arena, GRAIN};
use kernels::device::{Settings, memory, open_gpu};
use kernels::random::Key;
use kernels::{DType, Device, Tensor};
use proofs::{assert_same_bits, randn};

const SPAN: u64 = 4096 * GRAIN;

#[test]
fn what_is_taken_never_overlaps_and_all_of_it_comes_back() {
    let key = Key::new(7, "arena", &[]);
    let mut arena = Arena::default();
    arena.free.add(0, SPAN);
    let mut held: HashMap<u64, u64> = HashMap::new();
    for turn in 0..20_000 {
        if key.uniform(2 * turn) < 0.55 {
            let bytes = GRAIN * (1 + (200.0 * key.uniform(2 * turn + 1)) as u64);
            let Some(start) = arena.take(bytes) else {
                assert!(arena.free.fit(bytes).is_none(), "a run that fits was not taken");
                continue;
            };
            assert!(start + bytes <= SPAN && start % GRAIN == 0);
            assert!(held.iter().all(|(at, length)| at + length <= start || start + bytes <= *at));
            held.insert(start, bytes);
        } else if !held.is_empty() {
            let mut starts: Vec<u64> = held.keys().copied().collect();
            starts.sort_unstable();
            let start = starts[(key.uniform(2 * turn + 1) * starts.len() as f64) as usize];
            held.remove(&start);
            assert!(arena.give(start) && !arena.give(start));
        }
        assert_eq!(arena.used(), held.values().sum::<u64>());
    }
    for start in held.into_keys() {
        assert!(arena.give(start));
    }
    assert_eq!((arena.free.fit(SPAN), arena.free.before(SPAN)), (Some(0), SPAN));
}

#[test]
fn whole_pieces_can_be_cut_out_of_what_is_free() {
    const PIECE: u64 = 16 * GRAIN;
    let mut arena = Arena::default();
    arena.free.add(0, 64 * GRAIN);
    let (first, second) = (arena.take(20 * GRAIN).unwrap(), arena.take(20 * GRAIN).unwrap());
    assert!(arena.give(first));
    // 0 to 20 and 40 to 64 are free: the pieces at 0 and 48, and nothing that touches a tensor.
    assert_eq!(arena.free.pieces(PIECE).collect::<Vec<_>>(), [0, 48 * GRAIN]);
    assert!(arena.free.cut(0, PIECE) && !arena.free.cut(0, PIECE) && !arena.free.cut(second, PIECE));
    assert_eq!(arena.free.pieces(PIECE).collect::<Vec<_>>(), [48 * GRAIN]);
    assert!(arena.free.fit(25 * GRAIN).is_none());
}

const MIB: u64 = 1 << 20;

fn numbers(mib: u64) -> usize {
    (mib * MIB / 4) as usize
}

/// The device that is tested, with so little memory.
fn with_limit(mib: u64) -> Device {
    match proofs::device() {
        Device::Cpu => Device::Cpu,
        _ => open_gpu(0, &Settings { memory_limit: Some(mib * MIB), ..Settings::default() }).unwrap(),
    }
}

/// Free fragments that are each too small are joined; tensors between them are unchanged; and the limit is respected.
#[test]
fn the_holes_of_a_gpu_hold_what_their_sum_holds() {
    let device = with_limit(320);
    let first = randn("blocks", (3, 1024, 1024)).to_device(&Device::Cpu).unwrap();
    let block = |n: usize| (&first + n as f64).unwrap();
    // What is being copied from the host is there twice for a moment.
    let mut held: Vec<_> = (0..20).map(|n| Some((block(n), block(n).to_device(&device).unwrap()))).collect();
    for round in 0..4 {
        held.iter_mut().skip(round % 2).step_by(2).for_each(|one| *one = None);
        let large = Tensor::ones(numbers(100), DType::F32, &device).unwrap();
        for (expected, kept) in held.iter().flatten() {
            assert_same_bits("kept", &kept.to_device(&Device::Cpu).unwrap(), expected);
        }
        let sum = large.sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(sum, numbers(100) as f32);
        drop(large);
        for (n, one) in held.iter_mut().enumerate() {
            one.get_or_insert_with(|| (block(n), block(n).to_device(&device).unwrap()));
        }
    }
    if let Some(memory) = memory(&device).unwrap() {
        assert!(memory.peak <= memory.reserved_peak && memory.reserved_peak <= 320 * MIB, "{memory:?}");
        let error = Tensor::zeros(numbers(300), DType::F32, &device).unwrap_err().to_string();
        assert!(error.contains("OUT_OF_MEMORY"), "{error}");
    }
}

/// The same while earlier work still uses the old addresses: nothing is overwritten, and nothing waits.
#[test]
fn the_holes_of_a_busy_gpu_are_joined_behind_its_back() {
    const ROUNDS: usize = 10;
    let device = with_limit(448);
    // 64 MiB and three milliseconds of a GPU each, so that it is far behind; the CPU has nothing to be behind with.
    let (size, count) = if memory(&device).unwrap().is_some() { (4096, 12) } else { (64, 1) };
    let matrix = randn("matrix", (size, size)).to_device(&device).unwrap();
    let full = |mib, value: usize| {
        (Tensor::ones(numbers(mib), DType::F32, &device).unwrap() * value as f64).unwrap()
    };
    let mut held: Vec<_> = (0..20).map(|n| Some((n, full(12, n)))).collect();
    // Sums of few bits' numbers, which f32 holds whole.
    let mut sums = Vec::new();
    let mut round = |round: usize| {
        (0..count).for_each(|_| drop(matrix.matmul(&matrix).unwrap()));
        held.iter_mut().skip(round % 2).step_by(2).for_each(|one| *one = None);
        sums.push((numbers(100) * round, full(100, round).sum_all().unwrap()));
        for (n, one) in held.iter_mut().enumerate() {
            let (value, kept) = one.get_or_insert_with(|| (n + round, full(12, n + round)));
            sums.push((numbers(12) * *value, kept.sum_all().unwrap()));
        }
    };
    // By then small tensors have all the memory that they need.
    round(0);
    let before = memory(&device).unwrap();
    (1..ROUNDS).for_each(&mut round);
    let after = memory(&device).unwrap();
    for (expected, sum) in sums {
        assert_eq!(sum.to_scalar::<f32>().unwrap(), expected as f32);
    }
    if let (Some(before), Some(after)) = (before, after) {
        assert!(after.joined > before.joined, "nothing had to be joined: {after:?}");
        assert_eq!(after.waited, before.waited, "the host waited: {after:?}");
    }
}

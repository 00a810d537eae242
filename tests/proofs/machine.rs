//! The memory of a GPU and the engine that runs are decided in one place, and reported. On the CPU, where there is less to decide, the
//! same bodies hold the parts that every device has.

use std::collections::BTreeMap;

use kernels::device::{self, Settings, open_gpu};
use kernels::weight::Weight;
use kernels::{DType, Device, Tensor, attention, inventory, linear};
use proofs::{Tolerance, assert_close, device, randn};
use trainer::machine::devices::{DevicesConfig, Limits};

const MIB: u64 = 1 << 20;

/// Attention in bf16 against the same in f32: two roundings of 2^-9 on values near 1.
const BF16: Tolerance = Tolerance::absolute(2e-2);

fn bf16(name: &str, shape: (usize, usize, usize, usize)) -> Tensor {
    randn(name, shape).to_dtype(DType::BF16).unwrap()
}

/// The reported engine depends on the device, the dtype and the size of a head alone, with the reason.
#[test]
fn the_engine_of_attention_is_announced_with_its_reason() {
    let device = device();
    let told = |device: &Device, dtype, head| attention::engine(device, dtype, head);
    assert_eq!(told(&Device::Cpu, DType::BF16, 128).name, "chunked");
    let wide = told(&device, DType::F32, 128);
    assert_eq!(wide.name, "chunked");
    let odd = told(&device, DType::BF16, 12);
    assert_eq!(odd.name, "chunked");
    if device.is_cuda() {
        assert!(wide.why.contains("heads of 128 numbers in f32"), "{wide:?}");
        assert!(odd.why.contains("heads of 12 numbers in bf16"), "{odd:?}");
        let (engine, found) = (told(&device, DType::BF16, 128), attention::cudnn());
        match &found {
            Ok((major, minor)) => {
                assert_eq!((engine.name, engine.why), ("cudnn", format!("cuDNN {major}.{minor}")));
            }
            Err(why) => assert!(engine.name == "chunked" && engine.why.contains(why), "{engine:?}"),
        }
    }
}

/// Odd shapes: whether cuDNN has a plan for them or not, the result is right, and a refusal is reported once for each pass. (cuDNN
/// 9.19 refuses none of these on an H200; an older one, or another GPU, may.)
#[test]
fn shapes_at_the_edges_are_right_and_refusals_are_reported_once() {
    let device = device();
    for (n, shape) in
        [(1, 1, 1, 8), (1, 77, 2, 64), (1, 1, 70_000, 8), (70_000, 1, 1, 8)].into_iter().enumerate()
    {
        let [q, k, v, d_out] = ["q", "k", "v", "d_out"].map(|name| bf16(&format!("{name}{n}"), shape));
        let run = || {
            let out = attention::forward(&q, &k, &v).unwrap();
            let gradients = attention::backward(&q, &k, &v, &out, &d_out).unwrap();
            (out, gradients, attention::refusals(&device))
        };
        let (out, gradients, refused) = run();
        let (_, _, again) = run();
        assert!(again.is_empty(), "reported again: {again:?}");
        assert!(
            refused.len() <= 2 && refused.iter().all(|line| line.contains("runs in chunks")),
            "{refused:?}"
        );
        let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
        let exact = attention::forward(&wide(&q), &wide(&k), &wide(&v)).unwrap();
        assert_close("attention", &wide(&out.o), &exact.o, BF16);
        let expected = attention::backward(&wide(&q), &wide(&k), &wide(&v), &exact, &wide(&d_out)).unwrap();
        assert_close("dv", &wide(&gradients.dv), &expected.dv, BF16);
    }
}

/// What the plan takes for the room of a card is what the allocator refuses to go beyond: free memory less the reserve, or
/// the recipe's limit.
#[test]
fn a_gpus_limit_is_the_same_number_in_plan_and_allocator() {
    const RESERVE: u64 = 400 * MIB;
    let name = trainer::machine::devices::default_device();
    let config = |limit: Option<u64>| DevicesConfig {
        stages: vec![name.to_owned()],
        split: vec![1],
        memory_limit: limit.map(trainer::bytes::Bytes),
        ..DevicesConfig::default()
    };
    let free = Limits::measure(&config(None)).of(name).map(|limit| limit.bytes);
    let Some(free) = free else {
        assert!(name == "cpu", "a GPU has a limit");
        return;
    };
    // Other proofs take and give memory meanwhile, so it is compared by what there is at most.
    let total = inventory::gpus().unwrap()[0].memory;
    assert!(free <= total - RESERVE, "{free} of {total}");
    const LIMIT: u64 = 2048 * MIB;
    let limits = Limits::measure(&config(Some(LIMIT)));
    assert_eq!(limits.of(name).unwrap().bytes, LIMIT);
    let (opened, _) = config(Some(LIMIT)).open_within(&limits).unwrap().remove(0);
    let take = |mib: u64| Tensor::zeros((mib * MIB) as usize, DType::U8, &opened);
    // Products have a workspace, and the region is handed out in chunks.
    take(1800).unwrap();
    let refused = take(2080).unwrap_err().to_string();
    assert!(refused.contains("OUT_OF_MEMORY"), "{refused}");
}

/// A resumed run keeps its algorithms: a new measurement would choose others, with other roundings.
#[test]
fn kept_product_choices_are_taken_without_the_clock() {
    if device().is_cpu() {
        assert_eq!(device::product_choices(&Device::Cpu), BTreeMap::new());
        return;
    }
    let fresh = || open_gpu(0, &Settings::default()).unwrap();
    let product = |on: &Device| {
        let matrix = |name, rows| {
            randn(name, (rows, 2048))
                .to_device(&Device::Cpu)
                .unwrap()
                .to_dtype(DType::BF16)
                .unwrap()
                .to_device(on)
                .unwrap()
        };
        let weight = Weight::Dense(matrix("w", 2048));
        linear::forward(&matrix("x", 4096), &weight, None, None).unwrap();
        device::product_choices(on)
    };
    let measured = product(&fresh());
    assert_eq!(measured.len(), 1, "one product, large enough to be timed: {measured:?}");
    for choice in 0..2 {
        let kept: BTreeMap<String, usize> = measured.keys().map(|key| (key.clone(), choice)).collect();
        let again = fresh();
        device::keep_product_choices(&again, kept.clone());
        assert_eq!(product(&again), kept);
    }
}

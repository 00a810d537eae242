//! Tensors that travel arrive as they left, though their source is dropped and its memory overwritten at once.

use kernels::transfer::{HostStore, Link, Route};
use kernels::{DType, Device, Tensor};
use proofs::{assert_same_bits, device, randn, second_device};

const ROUNDS: usize = 20;

/// Two GPUs where there are two, else one device twice.
fn devices() -> [Device; 2] {
    [device(), second_device()]
}

/// Takes the memory that was freed last, and writes over it.
fn overwrite(device: &Device) {
    for _ in 0..3 {
        Tensor::full(f32::NAN, (64, 1024, 33), device).unwrap();
    }
}

/// 8 MiB that differ from round to round.
fn source(round: usize, on: &Device) -> (Tensor, Tensor) {
    let at_home = randn(&format!("source {round}"), (64, 1024, 33)).to_device(&Device::Cpu).unwrap();
    let x = at_home.to_device(on).unwrap();
    // A tensor made by the device itself, so that the copy has something to wait for.
    (at_home, x.affine(1.0, 0.0).unwrap())
}

#[test]
fn what_is_sent_arrives_though_its_source_is_overwritten() {
    let [from, to] = devices();
    for route in [Route::Auto, Route::Host] {
        let link = Link::new(&from, &to, route).unwrap();
        let mut on_the_way = Vec::new();
        for round in 0..ROUNDS {
            let (expected, x) = source(round, &from);
            on_the_way.push((expected, link.send(x).unwrap()));
            overwrite(&from);
            // As in a pipeline: two are under way, and the older one is received first.
            if on_the_way.len() > 2 {
                let (expected, sent) = on_the_way.remove(0);
                let received = sent.receive().unwrap();
                overwrite(&to);
                assert_same_bits(
                    &format!("{route:?} {round}"),
                    &received.to_device(&Device::Cpu).unwrap(),
                    &expected,
                );
            }
        }
    }
}

/// Clips of one length after clips of another: buffers that fit no more make room, and what is in use stays.
#[test]
fn host_memory_that_nobody_uses_is_given_back_at_the_limit() {
    const MIB: u64 = 1 << 20;
    let [device, _] = devices();
    let store = HostStore::new(&device).unwrap();
    store.set_limit(40 * MIB);
    let parked =
        |mib: usize| store.park(Tensor::zeros((mib, 1 << 18), DType::F32, &device).unwrap()).unwrap();
    for lengths in [[8, 8, 8, 8], [4, 4, 4, 4], [16, 16, 2, 2]] {
        let waiting: Vec<_> = lengths.into_iter().map(parked).collect();
        assert!(store.bytes() <= 40 * MIB, "{} bytes", store.bytes());
        waiting.into_iter().for_each(|one| drop(one.take().unwrap()));
    }
    // More than the limit stays allocated while it is used.
    let waiting: Vec<_> = [16, 16, 16].into_iter().map(parked).collect();
    if device.is_cuda() {
        assert_eq!(store.bytes(), 48 * MIB);
    }
    drop(waiting);
}

#[test]
fn what_is_parked_comes_back_though_its_source_is_overwritten() {
    let [device, _] = devices();
    let store = HostStore::new(&device).unwrap();
    for round in 0..3 {
        let mut parked = Vec::new();
        for i in 0..ROUNDS {
            let (expected, x) = source(round * ROUNDS + i, &device);
            store.next_group().unwrap();
            parked.push((expected, store.park(x).unwrap()));
            overwrite(&device);
        }
        while let Some((expected, last)) = parked.pop() {
            if let Some((_, next)) = parked.last_mut() {
                next.prefetch().unwrap();
            }
            let back = last.take().unwrap();
            overwrite(&device);
            assert_eq!(back.dtype(), DType::F32);
            assert_same_bits("parked", &back.to_device(&Device::Cpu).unwrap(), &expected);
        }
    }
}

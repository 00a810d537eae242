//! Checkpoints and adapter files are written in the background: from copies that training does not change, one at a time.

use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kernels::optimiser::State;
use proofs::{assert_same_bits, randn};
use trainer::error::{Error, Result};
use trainer::learning::optim::{Saved, on_host};
use trainer::train::background::Background;

/// Starting returns while the work is still blocked; the next piece waits for it.
#[test]
fn work_in_the_background_holds_nobody_up_and_is_done_one_piece_at_a_time() {
    let (release, held) = mpsc::channel::<()>();
    let (done, order) = mpsc::channel();
    let mut background = Background::default();
    let first = done.clone();
    let piece = move || {
        held.recv().unwrap();
        first.send("first").unwrap();
        Ok("first")
    };
    background.start(piece).unwrap();
    background.check().unwrap();
    let releaser = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        release.send(()).unwrap();
    });
    let second = move || {
        done.send("second").unwrap();
        Ok("second")
    };
    background.start(second).unwrap();
    assert_eq!(background.wait().unwrap(), Some("second"));
    assert_eq!(background.wait().unwrap(), None);
    assert_eq!(order.iter().collect::<Vec<_>>(), ["first", "second"]);
    releaser.join().unwrap();
}

#[test]
fn work_that_failed_in_the_background_is_told_and_nothing_is_started_after_it() {
    let fail = || -> Result<()> { Err(Error::Interrupted) };
    let mut background = Background::default();
    background.start(fail).unwrap();
    let begun = Instant::now();
    while background.check().is_ok() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the failure is never told");
    }
    background.start(fail).unwrap();
    let next = background.start(|| panic!("started after a failure"));
    assert!(matches!(next, Err(Error::Interrupted)));
}

/// An update in place after the copy was taken leaves the copy alone.
#[test]
fn a_snapshot_is_not_changed_by_updates_in_place() {
    let all = || [randn("p", (3, 4)), randn("m", (3, 4)), randn("v", (3, 4))];
    let [parameter, first, second] = all();
    let tensors = BTreeMap::from([("a".to_owned(), State { parameter, slots: vec![first, second] })]);
    let saved = Saved { rule: "adamw".into(), tensors, ..Saved::default() };
    let snapshot = on_host(&saved).unwrap();
    let live = &saved.tensors["a"];
    for tensor in [&live.parameter, &live.slots[0], &live.slots[1]] {
        tensor.slice_set(&tensor.zeros_like().unwrap(), 0, 0).unwrap();
    }
    let State { parameter, slots } = &snapshot.tensors["a"];
    for (got, expected) in [parameter, &slots[0], &slots[1]].into_iter().zip(all()) {
        assert_same_bits("the snapshot", got, &expected.to_device(&kernels::Device::Cpu).unwrap());
    }
}

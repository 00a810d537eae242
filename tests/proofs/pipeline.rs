//! The pipeline: a model cut into stages is the model, to the last bit; and a stage that fails ends all of them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use kernels::Tensor;
use kernels::transfer::Route;
use models::dit::{BlockPlan, Keep, KeepPlace, Role};
use proofs::small::{
    adapters, config, micro_batch, pipeline, pipeline_on, trained, uniform, velocities, weights,
};
use proofs::{assert_same_bits, device, randn, second_device};
use trainer::pipeline::{Calls, MicroBatch, NetworkInput, Pipeline, Returns, run_all, schedule};
use trainer::{Error, Result};

const LAYERS: usize = 5;
/// Even, uneven, three stages, and a stage for each block.
const SPLITS: [&[usize]; 6] = [&[2, 3], &[1, 4], &[4, 1], &[2, 1, 2], &[1, 1, 3], &[1, 1, 1, 1, 1]];

fn split_into(split: &[usize]) -> Pipeline {
    let config = config(LAYERS, 24);
    let mut pipeline = pipeline(&config, &weights(&config), &adapters(&config, 3, 0.7), split);
    pipeline.set_ffn_tokens(5); // of 12, so that chunks are cut
    pipeline
}

/// Micro-batches of one to three samples, with texts of other lengths, all with dropout: more than there are stages,
/// so that forwards and backwards interleave.
fn batches() -> Vec<MicroBatch> {
    let sizes = [(2, 9), (3, 32), (1, 4), (2, 17), (3, 1), (2, 20), (1, 30)];
    let batch = |(i, (samples, rows))| micro_batch(&format!("m{i}"), samples, rows, Some(0.2));
    sizes.into_iter().enumerate().map(batch).collect()
}

#[test]
fn stages_train_as_one_bit_for_bit() {
    let whole = split_into(&[LAYERS]);
    let (losses, gradients) = trained(&whole, &batches(), BlockPlan::default());
    let parameters = 2 * whole.config().adaptable_modules().len();
    assert_eq!((losses.len(), gradients.len()), (batches().len(), parameters));
    for split in SPLITS {
        let parked = BlockPlan { keep: Keep::All, place: KeepPlace::Host };
        for (plan, route) in [(BlockPlan::default(), Route::Auto), (parked, Route::Host)] {
            let mut stages = split_into(split);
            stages.set_route(route).unwrap();
            let (split_losses, split_gradients) = trained(&stages, &batches(), plan);
            let bits = |losses: &[f32]| losses.iter().map(|l| l.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&split_losses), bits(&losses), "losses of {split:?}, {plan:?}");
            assert!(split_gradients.keys().eq(gradients.keys()), "{split:?}: other gradients");
            for (name, gradient) in &gradients {
                assert_same_bits(&format!("{name} of {split:?}, {plan:?}"), &split_gradients[name], gradient);
            }
        }
    }
}

#[test]
fn stages_predict_as_one_bit_for_bit() {
    let inputs: Vec<NetworkInput> = batches().into_iter().map(|batch| batch.input).collect();
    let whole = velocities(&split_into(&[LAYERS]), &inputs);
    assert_eq!(whole.len(), inputs.len());
    for split in SPLITS {
        for (i, (got, expected)) in velocities(&split_into(split), &inputs).iter().zip(&whole).enumerate() {
            assert_same_bits(&format!("velocity {i} of {split:?}"), got, expected);
        }
    }
}

/// A tensor that was sent over a link is freed at its source once it has arrived, on either route: otherwise a night of clips
/// would fill a card. On one device nothing is sent.
#[test]
fn transfers_free_their_sources_after_every_call() {
    let config = config(LAYERS, 24);
    let devices = [device(), second_device()];
    let (weights, adapters) = (weights(&config), adapters(&config, 3, 0.7));
    let mut pipeline = pipeline_on(&devices, &config, &weights, &adapters, &[2, 3]);
    let inputs: Vec<NetworkInput> = batches().into_iter().map(|batch| batch.input).collect();
    for route in [Route::Auto, Route::Host] {
        pipeline.set_route(route).unwrap();
        for call in 0..3 {
            velocities(&pipeline, &inputs);
            assert_eq!(pipeline.live_transfers(), 0, "{route:?}, after prediction {call}");
            trained(&pipeline, &batches(), BlockPlan::default());
            assert_eq!(pipeline.live_transfers(), 0, "{route:?}, after step {call}");
        }
    }
}

/// Two clips of two halves each, on two stages of which the last is slow: when a step of a clip ends, the first stage has work
/// of the other clip in hand or done, so it is never out of work. Where all clips wait for the slowest it would be.
#[test]
fn calls_wait_for_what_they_depend_on_and_for_nothing_else() {
    const HALVES: usize = 2;
    const CLIPS: usize = 2;
    const STEPS: usize = 4;
    let pipeline = split_into(&[2, 3]);
    let call = micro_batch("m", 1, 9, None).input;
    let (begun, ended) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let input = |m: usize, returns: &Returns| {
        if m >= HALVES * CLIPS && m.is_multiple_of(HALVES) {
            let came_back: Vec<f32> = returns.take()?.to_vec1()?;
            // In the order of steps and clips, whatever is in flight.
            assert_eq!(came_back, [(m / HALVES - CLIPS) as f32]);
        }
        begun.store(m + 1, Ordering::SeqCst);
        Ok(call.clone())
    };
    let output = |m: usize, velocity: Tensor| {
        thread::sleep(Duration::from_millis(30));
        let step = m / HALVES;
        let is_end = m % HALVES == HALVES - 1;
        if is_end {
            ended.lock().unwrap().push(begun.load(Ordering::SeqCst));
        }
        let goes_on = is_end && step + CLIPS < CLIPS * STEPS;
        Ok(if goes_on { Some(Tensor::new(&[step as f32], velocity.device())?) } else { None })
    };
    let rest =
        pipeline.call(Calls { count: HALVES * CLIPS * STEPS, input, output, blocks: run_all }).unwrap().rest;
    assert!(rest.is_empty(), "more came back than was taken");
    for (step, begun) in ended.into_inner().unwrap().into_iter().enumerate() {
        // Everything that does not depend on this step has begun: the other clip's next one.
        let expected = (HALVES * (step + CLIPS)).min(HALVES * CLIPS * STEPS);
        assert_eq!(begun, expected, "when step {step} ended");
    }
}

/// A step leaves nothing behind: the same step again gives the same bits.
#[test]
fn a_step_is_a_function_of_its_batches() {
    let pipeline = split_into(&[2, 3]);
    let (losses, gradients) = trained(&pipeline, &batches(), BlockPlan::default());
    let (again, gradients_again) = trained(&pipeline, &batches(), BlockPlan::default());
    assert_eq!(losses, again);
    for (name, gradient) in &gradients {
        assert_same_bits(name, &gradients_again[name], gradient);
    }
}

/// Profiling a step does not change it, and reports what each stage did, in order, without overlaps.
#[test]
fn a_watched_step_is_the_step() {
    let (pipeline, batches) = (split_into(&[2, 1, 2]), batches());
    let plans = uniform(&pipeline, BlockPlan::default());
    let expected = pipeline.train(&batches, &plans).unwrap();
    let (outcome, watched) = pipeline.train_watched(&batches, &plans).unwrap();
    for (name, gradient) in expected.gradients.iter() {
        assert_same_bits(name, outcome.gradients.get(name).unwrap(), gradient);
    }
    let schedule = schedule::one_f_one_b(3, batches.len());
    assert_eq!(watched.len(), schedule.len());
    for (stage, ops) in watched.into_iter().zip(&schedule) {
        assert!(stage.spans.iter().map(|span| span.op).eq(ops.iter().copied()));
        let mut busy = 0.0;
        for (i, span) in stage.spans.iter().enumerate() {
            busy += span.end.seconds_since(&span.start).unwrap();
            let before = &stage.spans[i.saturating_sub(1)].end;
            assert!(i == 0 || span.start.seconds_since(before).unwrap() >= 0.0, "two things at once");
        }
        let in_operations = stage.operations.times().unwrap().total();
        assert!(in_operations > 0.0 && in_operations <= busy, "{in_operations} s in {busy} s");
    }
}

/// What `step` answers, or a panic when it still has not after a time that no step of these sizes takes.
fn answer_in_time<T: Send + 'static>(
    what: &str,
    step: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = channel();
    thread::spawn(move || sender.send(step()));
    receiver.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|_| panic!("{what}: the pipeline hangs"))
}

/// Each stage's own mistake, at the first, a middle and the last micro-batch: it must come out as what it is, never
/// as "another stage stopped", and never as a hang of the others, which are waiting for it.
#[test]
fn an_error_in_a_stage_comes_out_as_its_own() {
    type Spoil = fn(&mut MicroBatch);
    let spoils: [(&str, Spoil, &str); 3] = [
        (
            "first stage",
            |b| b.input.cond.insert(Role::TEXT, randn("text", (b.weights.len(), 4, 23))),
            "width 24",
        ),
        ("last stage", |b| b.target = randn("target", (b.weights.len(), 16, 2, 4, 8)), "shape mismatch"),
        ("dropout keys", |b| b.dropout.as_mut().unwrap().keys.truncate(0), "dropout has"),
    ];
    for split in [&[5][..], &[2, 3], &[2, 1, 2]] {
        for (what, spoil, text) in spoils {
            for at in [0, 3, 6] {
                let (pipeline, mut batches) = (split_into(split), batches());
                spoil(&mut batches[at]);
                let what = format!("{what}, micro-batch {at}, split {split:?}");
                let plans = uniform(&pipeline, BlockPlan::default());
                let error = answer_in_time(&what, move || pipeline.train(&batches, &plans)).unwrap_err();
                assert!(!matches!(error, Error::NeighbourStopped), "{what}");
                assert!(error.to_string().contains(text), "{what}: {error}");
            }
        }
    }
}

/// The same in the middle of a forward-only schedule: an adapter of another width, on one stage alone.
#[test]
fn an_error_in_a_middle_stage_ends_sampling() {
    let mut pipeline = split_into(&[2, 1, 2]);
    let inputs: Vec<NetworkInput> = batches().into_iter().map(|batch| batch.input).collect();
    let foreign = [("blocks.2.ffn.0.lora_A.weight".to_owned(), randn("foreign", (3, 7)))].into();
    pipeline.stages_mut()[1].adapters.set_parameters(&foreign);
    let error = answer_in_time("middle stage", move || pipeline.predict(&inputs)).unwrap_err();
    assert!(error.to_string().contains("matmul"), "{error}");
}

#[test]
fn a_split_must_cover_every_block_once() {
    let config = config(LAYERS, 24);
    let (weights, none) = (weights(&config), Default::default());
    let load = |ranges: &[std::ops::Range<usize>]| {
        let split: Vec<_> = ranges.iter().map(|range| (proofs::device(), range.clone())).collect();
        Pipeline::load(&weights, &config, &split, &none, models::dit::Base::F32)
    };
    let (short, late) = (0..4, 1..5);
    let alone = [std::slice::from_ref(&short), std::slice::from_ref(&late), &[]];
    let several = [&[0..2, 3..5][..], &[0..3, 2..5], &[0..2, 2..2, 2..5]];
    for ranges in several.into_iter().chain(alone) {
        assert!(matches!(load(ranges), Err(Error::Split { layers: LAYERS })), "{ranges:?}");
    }
}

//! The streams of random numbers of a training run.

use kernels::random::Key;
use models::expert::Expert;

/// The nine sigmas of the held-out loss.
pub const EVAL_SIGMAS: [f64; 9] = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];

/// The streams of random numbers of a training run, each a function of seed, step and slot.
///
/// A slot is the index of a sample in its step, counted over all micro-batches, so that the same samples get the same noise
/// for every split into micro-batches.
#[derive(Debug, Clone, Copy)]
pub struct Streams {
    seed: u64,
}

impl Streams {
    /// The streams of `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// For the sigma of a sample.
    pub fn sigma(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "sigma", &[step, slot])
    }

    /// For the noise of a sample.
    pub fn noise(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "noise", &[step, slot])
    }

    /// The expert of a micro-batch, if the one for high noise gets the fraction `high` of them.
    pub fn expert(self, step: u64, micro_batch: u64, high: f64) -> Expert {
        let is_high = Key::new(self.seed, "expert", &[step, micro_batch]).uniform(0) < high;
        if is_high { Expert::High } else { Expert::Low }
    }

    /// For whether a sample's caption is dropped, and for which of its texts it gets.
    pub fn caption(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "caption", &[step, slot])
    }

    /// For whether a sample gets its first frame clean, in models that take it in place.
    pub fn picture(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "picture", &[step, slot])
    }

    /// For which conditions of a sample are left out: a number for each.
    pub fn conditions(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "conditions", &[step, slot])
    }

    /// Whether a micro-batch has a prior beside it, where a fraction `share` of them has.
    pub fn has_prior(self, step: u64, micro_batch: u64, share: f64) -> bool {
        Key::new(self.seed, "prior", &[step, micro_batch]).uniform(0) < share
    }

    /// For which of several sliders a sample is.
    pub fn slider(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "slider", &[step, slot])
    }

    /// For the dropout of the adapters' input.
    pub fn dropout(self, step: u64, slot: u64) -> Key {
        Key::new(self.seed, "dropout", &[step, slot])
    }

    /// For the noise of a held-out item, the same at every evaluation.
    pub fn eval(self, item: u64, sigma: u64) -> Key {
        Key::new(self.seed, "eval", &[item, sigma])
    }
}

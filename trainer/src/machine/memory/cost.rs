//! About how long a block takes, by what is kept of it: enough to tell which plan is the faster one.

use std::ops::Range;

use models::dit::{Architecture, BlockPlan, Keep, KeepPlace, LayerId};
use models::weights::{Frozen, TensorClass};

use super::machine::Card;
use crate::machine::forecast::Task;

/// Share of a card's peak that products and attention reach: 0.51 for the 14B at 20,280 tokens on an H200, products in integers with the
/// quantisation of their rows 0.53 to 0.65. What matters here is its ratio to the link.
const REACHED: f64 = 0.5;
/// Share of a block's forward that copies out may take, and of its backward that copies back may: beyond it the device
/// waits for them.
const LINK_SHARE: f64 = 0.9;
/// Seconds of device time that a second of copying costs, as copies take memory bandwidth from the rest.
const COPY_COST: f64 = 0.05;
/// Seconds that one more chunk of the feed-forward layer costs, forward and backward: launches, and products that end
/// with idle processors.
const CHUNK: f64 = 4e-4;

/// Operations of products with frozen matrices, and of attention.
#[derive(Debug, Clone, Copy)]
struct Work {
    products: f64,
    attention: f64,
}

impl std::ops::Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { products: self.products + other.products, attention: self.attention + other.attention }
    }
}

/// Times of one block for a micro-batch.
#[derive(Debug, Clone)]
pub(super) struct Cost {
    /// Of the forward.
    forward: Work,
    /// Of the gradients, without any replay but the feed-forward's.
    gradients: Work,
    /// Of the replay of products and cross-attention.
    projections: Work,
    /// Of the replay of the self-attention.
    attention: Work,
    frozen: Frozen,
    tokens: usize,
    /// The share of blocks whose matrices are in host memory, and bytes of those of one block.
    streamed: (f64, f64),
    /// Bytes of the input, of the attention's output, and of all else that is kept.
    bytes: [f64; 3],
    /// For each main block, how many times the work of one it takes with the layers that follow it.
    shares: Vec<f64>,
}

/// For each main block, how many times the work of one it takes with the layers that follow it: by the numbers of the matrices
/// that all tokens go through.
fn shares(model: &dyn Architecture) -> Vec<f64> {
    let of = |id: LayerId| -> f64 {
        let specs = model.layer_tensors(id).into_iter().filter(|spec| spec.class == TensorClass::Matrix);
        specs.map(|spec| spec.shape.iter().product::<usize>() as f64).sum()
    };
    let block = of(LayerId::block(0));
    let with_following = |n| model.layers(n).into_iter().map(of).sum::<f64>() / block;
    (0..model.config().layers).map(with_following).collect()
}

impl Cost {
    /// Of a block of `task`.
    pub fn new(task: &Task) -> Self {
        let (dit, tokens) = (task.config(), task.tokens());
        let [d, ffn, text, l, batch] =
            [dit.dim, dit.ffn_dim, dit.text_len, tokens, task.batch].map(|number| number as f64);
        let (product, up) = (2.0 * l * d * d, 2.0 * l * d * ffn);
        let work =
            |products: f64, attention: f64| Work { products: batch * products, attention: batch * attention };
        let across = 4.0 * l * text * d;
        let projections = work(6.0 * product + 4.0 * text * d * d, across);
        let (attention, feed_forward) = (work(0.0, 4.0 * l * l * d), work(2.0 * up, 0.0));
        let forward = projections + feed_forward + attention;
        // Attention has five products to the forward's two; the up product comes again.
        let gradients = projections + work(3.0 * up, 10.0 * l * l * d);
        let stream = batch * l * d;
        let compute = task.base.frozen.compute.size_in_bytes() as f64;
        let bytes =
            [stream * task.base.stream.size_in_bytes() as f64, stream * compute, 7.0 * stream * compute];
        let streamed =
            (task.base.streamed.fraction(), task.base.matrix_bytes(task.dit.as_ref(), &(0..1)) as f64);
        let frozen = task.base.frozen;
        let shares = shares(task.dit.as_ref());
        Self { forward, gradients, projections, attention, frozen, tokens, streamed, bytes, shares }
    }

    /// How many blocks' work the main blocks `range` and the layers that follow them are.
    pub fn blocks(&self, range: &Range<usize>) -> f64 {
        self.shares[range.clone()].iter().sum()
    }

    /// Seconds of the main blocks from number `first` on, each with its plan, and of the layers that follow them.
    pub fn of_blocks(&self, first: usize, plans: &[BlockPlan], ffn_tokens: usize, card: &Card) -> f64 {
        let of = |(plan, share): (&BlockPlan, &f64)| share * self.seconds(*plan, ffn_tokens, card);
        plans.iter().zip(&self.shares[first..]).map(of).sum()
    }

    /// The same with matrices stored as `frozen` says.
    pub fn with_frozen(self, frozen: Frozen) -> Self {
        Self { frozen, ..self }
    }

    /// Seconds of a block's forward alone.
    pub fn call_seconds(&self, ffn_tokens: usize, card: &Card) -> f64 {
        let work = self.of(self.forward, card) + self.chunks(ffn_tokens) / 3.0;
        beside(work, self.weights(card))
    }

    /// Seconds of a block's forward and backward on a card.
    pub fn seconds(&self, plan: BlockPlan, ffn_tokens: usize, card: &Card) -> f64 {
        let (backward, kept) = match plan.keep {
            Keep::Input => (self.gradients + self.projections + self.attention, 1),
            Keep::Attention => (self.gradients + self.projections, 2),
            Keep::All => (self.gradients, 3),
        };
        let chunks = self.chunks(ffn_tokens);
        let forward = self.of(self.forward, card) + chunks / 3.0;
        let backward = self.of(backward, card) + chunks * 2.0 / 3.0;
        let copy = self.bytes[..kept].iter().sum::<f64>() / card.link;
        // Matrices come in for the forward and for the backward.
        let weights = self.weights(card);
        match plan.place {
            KeepPlace::Device => beside(forward, weights) + beside(backward, weights),
            // Copies out and copies in do not hinder each other.
            KeepPlace::Host => beside(forward, copy.max(weights)) + beside(backward, copy + weights),
            KeepPlace::HostUntilUsed => beside(forward, copy.max(weights)) + copy + beside(backward, weights),
        }
    }

    /// Seconds of `work`.
    fn of(&self, work: Work, card: &Card) -> f64 {
        (work.products / card.product_ops(self.frozen) + work.attention / card.flops) / REACHED
    }

    /// Seconds that the chunks of a feed-forward layer cost, forward and backward.
    fn chunks(&self, ffn_tokens: usize) -> f64 {
        CHUNK * (self.tokens.div_ceil(ffn_tokens.max(1)) - 1) as f64
    }

    /// Seconds in which the matrices of a block come in from host memory, of a block on average.
    fn weights(&self, card: &Card) -> f64 {
        let (share, matrices) = self.streamed;
        share * matrices / card.link
    }
}

/// Seconds of `work` while so many seconds of copying go on beside it.
fn beside(work: f64, copy: f64) -> f64 {
    work + COPY_COST * copy + (copy - LINK_SHARE * work).max(0.0)
}

//! About how long a block takes, by what is kept of it: enough to tell which plan is the faster one.

use models::dit::{BlockPlan, Keep, KeepPlace};

use super::machine::Card;
use crate::machine::forecast::Task;

/// Share of a card's peak that products and attention reach: 0.51 for the 14B at 20,280 tokens on an H200. What matters here
/// is its ratio to the link.
const REACHED: f64 = 0.5;
/// Share of a block's forward that copies out may take, and of its backward that copies back may: beyond it the device
/// waits for them.
const LINK_SHARE: f64 = 0.9;
/// Seconds of device time that a second of copying costs, as copies take memory bandwidth from the rest.
const COPY_COST: f64 = 0.05;
/// Seconds that one more chunk of the feed-forward layer costs, forward and backward: launches, and products that end
/// with idle processors.
const CHUNK: f64 = 4e-4;

/// Times of one block for a micro-batch.
#[derive(Debug, Clone)]
pub(super) struct Cost {
    /// Operations of the forward.
    forward: f64,
    /// Of the gradients, without any replay but the feed-forward's.
    gradients: f64,
    /// Operations of the replay of products and cross-attention.
    projections: f64,
    /// Of the replay of the self-attention.
    attention: f64,
    tokens: usize,
    /// The share of blocks whose matrices are in host memory, and bytes of those of one block.
    streamed: (f64, f64),
    /// Bytes of the input, of the attention's output, and of all else that is kept.
    bytes: [f64; 3],
}

impl Cost {
    /// Of a block of `task`.
    pub fn new(task: &Task) -> Self {
        let (dit, tokens) = (task.config(), task.tokens());
        let [d, ffn, text, l, batch] =
            [dit.dim, dit.ffn_dim, dit.text_len, tokens, task.batch].map(|number| number as f64);
        let (product, up) = (2.0 * l * d * d, 2.0 * l * d * ffn);
        let projections = batch * (6.0 * product + 4.0 * text * d * d + 4.0 * l * text * d);
        let (attention, feed_forward) = (batch * 4.0 * l * l * d, batch * 2.0 * up);
        let forward = projections + feed_forward + attention;
        // Attention has five products to the forward's two; the up product comes again.
        let gradients = projections + feed_forward + 2.5 * attention + batch * up;
        let stream = batch * l * d;
        let compute = task.base.frozen.compute.size_in_bytes() as f64;
        let bytes =
            [stream * task.base.stream.size_in_bytes() as f64, stream * compute, 7.0 * stream * compute];
        let streamed =
            (task.base.streamed.fraction(), task.base.matrix_bytes(task.dit.as_ref(), &(0..1)) as f64);
        Self { forward, gradients, projections, attention, tokens, streamed, bytes }
    }

    /// Seconds of a block's forward and backward on a card.
    pub fn seconds(&self, plan: BlockPlan, ffn_tokens: usize, card: &Card) -> f64 {
        let (replayed, kept) = match plan.keep {
            Keep::Input => (self.projections + self.attention, 1),
            Keep::Attention => (self.projections, 2),
            Keep::All => (0.0, 3),
        };
        let speed = card.flops * REACHED;
        let chunks = CHUNK * (self.tokens.div_ceil(ffn_tokens.max(1)) - 1) as f64;
        let forward = self.forward / speed + chunks / 3.0;
        let backward = (self.gradients + replayed) / speed + chunks * 2.0 / 3.0;
        let copy = self.bytes[..kept].iter().sum::<f64>() / card.link;
        let (share, matrices) = self.streamed;
        // Of a block on average; matrices come in for the forward and for the backward.
        let weights = share * matrices / card.link;
        let beside = |work: f64, copy: f64| work + COPY_COST * copy + (copy - LINK_SHARE * work).max(0.0);
        match plan.place {
            KeepPlace::Device => beside(forward, weights) + beside(backward, weights),
            // Copies out and copies in do not hinder each other.
            KeepPlace::Host => beside(forward, copy.max(weights)) + beside(backward, copy + weights),
            KeepPlace::HostUntilUsed => beside(forward, copy.max(weights)) + copy + beside(backward, weights),
        }
    }
}

//! What a stage allocates in a training step. It follows `crate::pipeline` and `models::dit` line by line, as
//! [`super::block`] does.

use std::collections::BTreeMap;
use std::ops::Range;

use kernels::DType;
use kernels::arena::GRAIN;
use kernels::transfer::HOST_GRAIN;
use models::dit::{BlockPlan, Place};

use super::block::{Block, Context, Saved};
use super::ledger::{Held, Ledger, Shadow};
use super::ops::{Layer, Ops};
use super::task::{Engine, LAYERS, Networks, Sizes, Task};
use super::{Neighbours, StagePlan, Way};
use crate::pipeline::schedule::{Op, one_f_one_b};

/// Bytes of an f32.
const F32: u64 = 4;
/// What `kernels` gives cuBLASLt on each GPU.
const GEMM_WORKSPACE: u64 = 32 << 20;
/// The driver hands out multiples of this.
const DEVICE_GRAIN: u64 = 512;
/// Micro-batches that are played beyond those in flight: from then on a stage does the same again and again.
const BEYOND: usize = 1;

/// The pretend memory of a stage's device, and the host memory beside it.
pub(super) struct Memories {
    pub device: Ledger,
    pub host: Ledger,
}

/// Host memory where tensors wait, or pass through.
struct Store<'a> {
    memories: &'a Memories,
    is_apart: bool,
    /// The group that is on its way out.
    leaving: Vec<Shadow>,
}

/// A tensor in a [`Store`].
struct Parked {
    numbers: u64,
    dtype: DType,
    _host: Option<Held>,
    here: Option<Shadow>,
}

/// Text, picture and rotary tables.
struct Conditioning {
    context: Context,
    _tables: Shadow,
}

enum Kept {
    Here(Saved<Shadow>),
    Parked(Saved<Parked>),
    Asleep(Saved<Parked>),
}

/// What is held of a micro-batch between its forward and its backward.
struct InFlight {
    conditioning: Conditioning,
    kept: Vec<Kept>,
    end: Option<[Shadow; 2]>,
}

/// A stage in the middle of a step.
struct Stage<'a> {
    ops: &'a Ops<'a>,
    sizes: &'a Sizes,
    blocks: Vec<Block<'a>>,
    plans: &'a [BlockPlan],
    at: Neighbours,
    store: Store<'a>,
    /// What was sent and is held for its copy.
    onward: End<'a>,
    back: End<'a>,
}

/// The sender's end of a link, which holds what was sent until the other side has answered or the next is sent.
struct End<'a> {
    way: Option<Way>,
    memories: &'a Memories,
    /// With the number of its micro-batch, and its buffer in host memory.
    sent: Option<(usize, Shadow, Option<Held>)>,
}

/// Plays one step of the stage that `plan` describes.
pub(super) fn play(task: &Task, sizes: &Sizes, engine: Engine, plan: &StagePlan, at: Neighbours) -> Memories {
    let grain = if engine.is_gpu() { DEVICE_GRAIN } else { 1 };
    let memories = Memories { device: Ledger::new(grain), host: Ledger::with_sizes(GRAIN) };
    let device = &memories.device;
    let factors: u64 = plan.blocks.clone().map(|block| sizes.factors(block)).sum();
    let networks = task.networks;
    let all = task.base.bytes(task.dit, &plan.blocks);
    // One that rests leaves its embeddings, norms and head; all optimisers stay.
    let beside = match networks {
        Networks::One | Networks::MakesRoom => 0,
        Networks::InTurn if engine.is_gpu() => all - task.base.matrix_bytes(task.dit, &plan.blocks),
        Networks::InTurn | Networks::SideBySide => all,
    };
    let _weights = device.take("weights", all + beside);
    let _resting = engine.is_gpu().then(|| resting(task, &memories.host, &plan.blocks));
    let _workspace = engine.is_gpu().then(|| device.take("workspace", GEMM_WORKSPACE));
    let _adapters = device.take("adapters", task.rule.bytes(factors) * networks.count());
    let ops = Ops::new(device, sizes, engine);
    let mut stage = Stage::new(&ops, plan, at, &memories);
    stage.step(task.accumulate);
    // The new parameters stand beside the old ones until they are handed to the stages.
    drop(device.take("adapters", F32 * factors));
    ops.clear_gradients();
    drop(stage);
    drop(ops);
    memories
}

/// `WeightParking`: the matrices of the network that rests, each pinned by itself.
fn resting(task: &Task, host: &Ledger, blocks: &Range<usize>) -> Vec<Held> {
    // A block leaves before the one that it changes places with has given its buffers back.
    let on_their_way = match task.networks {
        Networks::One | Networks::SideBySide => return Vec::new(),
        // What the blocks kept in host memory is not given back for the time of the clips.
        Networks::MakesRoom => None,
        Networks::InTurn => Some(blocks.start),
    };
    let matrices = blocks.clone().chain(on_their_way).flat_map(|n| task.base.matrices(task.dit, n));
    matrices.map(|bytes| host.take("resting", bytes.next_multiple_of(HOST_GRAIN))).collect()
}

impl<'a> Stage<'a> {
    fn new(ops: &'a Ops<'a>, plan: &'a StagePlan, at: Neighbours, memories: &'a Memories) -> Self {
        let block = |n: usize| Block { ops, layers: layers(ops.sizes, n), ffn_tokens: plan.ffn_tokens };
        let end = |way| End { way, memories, sent: None };
        Self {
            ops,
            sizes: ops.sizes,
            blocks: plan.blocks.clone().map(block).collect(),
            plans: &plan.keep,
            at,
            store: Store { memories, is_apart: ops.engine.is_gpu(), leaving: Vec::new() },
            onward: end(at.next),
            back: end(at.previous),
        }
    }

    /// `Pipeline::train` on this stage.
    fn step(&mut self, accumulate: usize) {
        let Neighbours { index, count, .. } = self.at;
        let played = accumulate.min(count - index + BEYOND);
        let mut placed: Vec<Shadow> = (0..accumulate).map(|_| self.placed()).collect();
        let mut in_flight = BTreeMap::new();
        for op in &one_f_one_b(count, played)[index] {
            match *op {
                Op::Forward(m) => {
                    let _placed = placed.pop();
                    in_flight.insert(m, self.forward(m));
                }
                Op::Backward(m) => {
                    if let Some(held) = in_flight.remove(&m) {
                        self.backward(m, held);
                    }
                }
            }
        }
    }

    /// `Stage::place`: latents, text and picture on the first stage, the target on the last.
    fn placed(&self) -> Shadow {
        let Sizes { batch, text_len, text_dim, picture_rows, picture_dim, input, latents, .. } = *self.sizes;
        let picture = batch * picture_rows * picture_dim;
        let input = if self.is_first() { input + batch * text_len * text_dim + picture } else { 0 };
        let target = if self.is_last() { latents } else { 0 };
        self.ops.ledger.tensor("micro-batches", input + target, DType::F32)
    }

    fn is_first(&self) -> bool {
        self.at.index == 0
    }

    fn is_last(&self) -> bool {
        self.at.index + 1 == self.at.count
    }

    /// `Stage::entry`: the stream, with text, picture and rotary tables.
    fn entry(&self) -> (Shadow, Conditioning) {
        let Sizes { batch, text_len, picture_rows, dim, tokens, heads, stream, .. } = *self.sizes;
        let ledger = self.ops.ledger;
        let numbers = self.sizes.stream_numbers();
        let text = self.ops.computed("conditioning", batch * text_len * dim);
        let picture =
            (picture_rows > 0).then(|| self.ops.computed("conditioning", batch * picture_rows * dim));
        let _tables = ledger.tensor("conditioning", tokens * dim / heads, DType::F32);
        let x = match self.is_first() {
            true => {
                let embedded = self.ops.computed("stream", numbers);
                if embedded.dtype == stream { embedded } else { ledger.tensor("stream", numbers, stream) }
            }
            false => ledger.tensor("stream", numbers, stream),
        };
        (x, Conditioning { context: Context { text, picture }, _tables })
    }

    /// `Stage::forward`, and the sending of what comes of it.
    fn forward(&mut self, m: usize) -> InFlight {
        let (mut x, conditioning) = self.entry();
        let mut kept = Vec::new();
        for (block, plan) in self.blocks.iter().zip(self.plans) {
            let (y, saved) = block.forward(x, &conditioning.context, plan.keep);
            let saved: Saved<Shadow> = saved.into_iter().map(|x| x.renamed("kept")).collect();
            kept.push(match plan.place {
                Place::Device => Kept::Here(saved),
                Place::Host => Kept::Parked(self.store.parked(saved)),
                Place::HostUntilUsed => Kept::Asleep(self.store.parked(saved)),
            });
            x = y;
        }
        let end = self.is_last().then(|| {
            let velocity = self.head(&x);
            // Error, weights and their product, each as large as the latents.
            drop(self.ops.ledger.take("loss", 5 * F32 * self.sizes.latents));
            [x.clone(), velocity]
        });
        if !self.is_last() {
            self.onward.send(m, x);
        }
        InFlight { conditioning, kept, end }
    }

    /// `Head::forward`: the velocity.
    fn head(&self, x: &Shadow) -> Shadow {
        let _normed = self.ops.fused("head", x.numbers, DType::F32, 3);
        self.ops.ledger.tensor("head", 2 * self.sizes.latents, DType::F32)
    }

    /// `Head::backward`: the gradient of the stream.
    fn head_backward(&self, x: &Shadow) -> Shadow {
        let (_nothing, _dy) = (
            self.ops.ledger.tensor("head", x.numbers, DType::F32),
            self.ops.ledger.tensor("head", x.numbers, DType::F32),
        );
        self.ops.fused("stream gradient", x.numbers, DType::F32, 4)
    }

    /// `Stage::backward`, and the sending of what comes of it.
    fn backward(&mut self, m: usize, held: InFlight) {
        let InFlight { conditioning, mut kept, end } = held;
        self.onward.answered(m);
        let numbers = self.sizes.stream_numbers();
        let mut dy = match &end {
            Some([x, _]) => self.head_backward(x),
            None => self.ops.ledger.tensor("stream gradient", numbers, DType::F32),
        };
        drop(end);
        for block in self.blocks.iter().rev() {
            let Some(saved) = self.store.pop(&mut kept) else { break };
            dy = block.backward(saved, dy, &conditioning.context);
        }
        if !self.is_first() {
            self.back.send(m, dy);
        }
    }
}

impl Store<'_> {
    /// `Kept::pop`: the last block's, and the one before it on its way.
    fn pop(&mut self, kept: &mut Vec<Kept>) -> Option<Saved<Shadow>> {
        let saved = match kept.pop()? {
            Kept::Here(saved) => saved,
            Kept::Parked(parked) | Kept::Asleep(parked) => parked.into_iter().map(|x| self.take(x)).collect(),
        };
        if let Some(Kept::Parked(next)) = kept.last_mut() {
            next.iter_mut().for_each(|x| self.prefetch(x));
        }
        Some(saved.into_iter().map(|x| x.renamed("block")).collect())
    }

    /// Sends out all that a block leaves.
    fn parked(&mut self, saved: Saved<Shadow>) -> Saved<Parked> {
        self.leaving.clear();
        saved.into_iter().map(|x| self.park(x)).collect()
    }

    fn park(&mut self, x: Shadow) -> Parked {
        let (numbers, dtype) = (x.numbers, x.dtype);
        if !self.is_apart {
            return Parked { numbers, dtype, _host: None, here: Some(x) };
        }
        let host = self.memories.host.take("parked", x.bytes());
        self.leaving.push(x.renamed("leaving"));
        Parked { numbers, dtype, _host: Some(host), here: None }
    }

    fn prefetch(&mut self, parked: &mut Parked) {
        self.leaving.clear();
        let Parked { numbers, dtype, .. } = *parked;
        parked.here.get_or_insert_with(|| self.memories.device.tensor("coming back", numbers, dtype));
    }

    fn take(&mut self, mut parked: Parked) -> Shadow {
        self.prefetch(&mut parked);
        let Parked { numbers, dtype, .. } = parked;
        parked.here.unwrap_or_else(|| self.memories.device.tensor("coming back", numbers, dtype))
    }
}

impl End<'_> {
    fn send(&mut self, m: usize, x: Shadow) {
        // A buffer for the next tensor is taken before the one of the last is given back.
        let pinned = (self.way == Some(Way::Host)).then(|| self.memories.host.take("boundary", x.bytes()));
        let is_apart = matches!(self.way, Some(Way::Peer | Way::Host));
        self.sent = is_apart.then(|| (m, x.renamed("boundary"), pinned));
    }

    /// What was sent of micro-batch `m` has arrived.
    fn answered(&mut self, m: usize) {
        self.sent.take_if(|(sent, ..)| *sent == m);
    }
}

/// The linear layers of block `n`.
fn layers(sizes: &Sizes, n: usize) -> [Layer; LAYERS.len()] {
    std::array::from_fn(|layer| {
        let (out, input) = sizes.layer(layer);
        Layer { at: (n, layer), out, input, is_adapted: sizes.adapted[n][layer], is_coded: sizes.is_coded }
    })
}

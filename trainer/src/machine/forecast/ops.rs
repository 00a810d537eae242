//! What the operations of `kernels` and the linear layers of `models` allocate.

use std::cell::RefCell;
use std::collections::BTreeMap;

use kernels::DType;
use models::adapter::Kind;

use super::ledger::{Held, Ledger, Name, Shadow};
use super::task::{Engine, Sizes};

/// Bytes of an f32.
const F32: u64 = 4;

/// The operations of one stage.
pub(super) struct Ops<'a> {
    pub ledger: &'a Ledger,
    pub sizes: &'a Sizes,
    pub engine: Engine,
    gradients: RefCell<BTreeMap<(usize, usize), Held>>,
}

/// A linear layer of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layer {
    /// The block, and the layer's number in it.
    pub at: (usize, usize),
    pub out: u64,
    pub input: u64,
    /// Whether it has an adapter.
    pub is_adapted: bool,
    /// Whether its matrix is to be decoded for each product.
    pub is_coded: bool,
}

/// Which way a pass goes.
#[derive(Debug, Clone, Copy)]
enum Way {
    Forward,
    Backward,
}

/// The gradients of attention.
pub(super) struct Attended {
    pub dq: Shadow,
    pub dk: Shadow,
    pub dv: Shadow,
}

impl<'a> Ops<'a> {
    pub fn new(ledger: &'a Ledger, sizes: &'a Sizes, engine: Engine) -> Self {
        Self { ledger, sizes, engine, gradients: RefCell::default() }
    }

    /// A tensor in the dtype that is computed in.
    pub fn computed(&self, name: Name, numbers: u64) -> Shadow {
        self.ledger.tensor(name, numbers, self.sizes.compute)
    }

    /// The result of an operation that the GPU makes in one pass; elsewhere it goes by way of `between` f32 tensors.
    pub fn fused(&self, name: Name, numbers: u64, dtype: DType, between: u64) -> Shadow {
        let _between = (!self.engine.is_gpu()).then(|| self.ledger.take("between", between * numbers * F32));
        self.ledger.tensor(name, numbers, dtype)
    }

    /// `x` in the dtype that is computed in.
    pub fn cast(&self, name: Name, x: &Shadow) -> Shadow {
        if x.dtype == self.sizes.compute { x.clone() } else { self.computed(name, x.numbers) }
    }

    /// One product of `rows` rows and a width of `out`.
    fn product(&self, name: Name, rows: u64, out: u64) -> Shadow {
        self.fused(name, rows * out, self.sizes.compute, 1)
    }

    /// The matrix as a product wants it.
    pub fn decoded(&self, layer: &Layer) -> Option<Held> {
        let bytes = layer.out * layer.input * self.sizes.compute.size_in_bytes() as u64;
        layer.is_coded.then(|| self.ledger.take("decoded weight", bytes))
    }

    /// `models::dit::linear::forward_all`.
    pub fn forward(&self, name: Name, layers: &[Layer], x: &Shadow) -> Vec<Shadow> {
        let x = self.cast("input", x);
        let deltas: Vec<Option<Shadow>> = self.deltas(layers, &x);
        let whole = |(layer, _delta): (&Layer, &Option<Shadow>)| {
            let _matrix = self.decoded(layer);
            self.product(name, x.numbers / layer.input, layer.out)
        };
        layers.iter().zip(&deltas).map(whole).collect()
    }

    fn deltas(&self, layers: &[Layer], x: &Shadow) -> Vec<Option<Shadow>> {
        let adapted = layers.iter().filter(|layer| layer.is_adapted).count() as u64;
        let _thin = self.thin(adapted, x.numbers / layers[0].input, 1);
        let delta = |layer: &Layer| {
            let _dropped = self.dropped(x);
            self.of_kind(layer, x.numbers / layer.input, Way::Forward);
            self.product("delta", x.numbers / layer.input, layer.out)
        };
        layers.iter().map(|layer| layer.is_adapted.then(|| delta(layer))).collect()
    }

    /// `count` tensors [rows, ranks of `adapted` adapters].
    fn thin(&self, adapted: u64, rows: u64, count: u64) -> Option<Shadow> {
        let rank = self.sizes.rank;
        (adapted > 0).then(|| self.computed("delta", count * adapted * rank * rows))
    }

    /// What an adapter of another kind than LoRA holds for a moment, at most: `kernels::{dora, loha, lokr}`.
    fn of_kind(&self, layer: &Layer, rows: u64, way: Way) {
        let compute = self.sizes.compute.size_in_bytes() as u64;
        let (of_output, of_wider) = (rows * layer.out, rows * layer.out.max(layer.input));
        let of_matrix = layer.out * layer.input;
        let bytes = match (self.sizes.adapter.kind, way) {
            (Kind::Lora, _) => return,
            // The plain product, the pair's, and both scaled; back, the sums for the lengths in f32.
            (Kind::Dora, Way::Forward) => 4 * of_output * compute,
            (Kind::Dora, Way::Backward) => of_output * (5 * compute + 3 * F32),
            // Both halves and their product; back, the gradient of the matrix and of its halves in f32.
            (Kind::Loha, Way::Forward) => 3 * of_matrix * compute,
            (Kind::Loha, Way::Backward) => of_matrix * (compute + 5 * F32),
            // Each side of each product, and turned round.
            (Kind::Lokr, Way::Forward) => 3 * of_wider * compute,
            (Kind::Lokr, Way::Backward) => 6 * of_wider * compute,
        };
        drop(self.ledger.take("adapter work", bytes));
    }

    /// A copy of an adapter's input with some of it dropped.
    fn dropped(&self, x: &Shadow) -> Option<Shadow> {
        self.sizes.has_dropout.then(|| self.computed("dropped", x.numbers))
    }

    /// `models::dit::linear::backward_all`: from the gradients `dys` of layers that read `x`.
    pub fn backward(&self, name: Name, layers: &[Layer], x: &Shadow, dys: &[&Shadow]) -> Shadow {
        let rows = x.numbers / layers[0].input;
        let mut dx = self.backward_adapters(layers, x, dys);
        for layer in layers {
            let _matrix = self.decoded(layer);
            dx = Some(self.product(name, rows, layer.input));
        }
        // Layers are never none; an empty tensor keeps the mirror total.
        dx.unwrap_or_else(|| self.computed(name, 0))
    }

    /// `models::dit::linear::backward_adapters`: the gradients of the factors, and what goes back through them.
    pub fn backward_adapters(&self, layers: &[Layer], x: &Shadow, dys: &[&Shadow]) -> Option<Shadow> {
        let x = self.cast("input", x);
        let adapted: Vec<&Layer> = layers.iter().filter(|layer| layer.is_adapted).collect();
        let (first, rows) = (adapted.first()?, x.numbers / layers[0].input);
        let _sum = self.sizes.has_dropout.then(|| self.computed("dropped", 2 * x.numbers));
        // Its input to the ranks, and the gradient of that: apart, and next to each other.
        let _thin = self.thin(adapted.len() as u64, rows, 3);
        let _dys: Vec<Shadow> = dys.iter().map(|dy| self.cast("input", dy)).collect();
        let dx = self.product("delta", rows, first.input);
        adapted.iter().for_each(|layer| self.of_kind(layer, rows, Way::Backward));
        adapted.iter().for_each(|layer| self.note(layer));
        Some(dx)
    }

    /// `models::dit::Gradients::add`, of both factors.
    fn note(&self, layer: &Layer) {
        let new = || self.ledger.take("gradients", F32 * self.sizes.trained(layer.out, layer.input));
        let (mut gradients, gradient) = (self.gradients.borrow_mut(), new());
        let sum = if gradients.contains_key(&layer.at) { new() } else { gradient };
        gradients.insert(layer.at, sum);
    }

    /// Drops all gradients, as a step does behind its update.
    pub fn clear_gradients(&self) {
        self.gradients.borrow_mut().clear();
    }

    /// `kernels::attention::forward`: output and log-sum-exp.
    pub fn attention(&self, q: &Shadow, k: &Shadow) -> [Shadow; 2] {
        let lse = || self.ledger.tensor("attention", self.rows_of_heads(q), DType::F32);
        if self.engine.is_cudnn() {
            return [self.computed("attention", q.numbers), lse()];
        }
        let _copies = self.computed("attention", q.numbers + 2 * k.numbers);
        let outs = self.computed("attention", q.numbers);
        drop(self.ledger.take("scores", 4 * F32 * self.scores(q, k)));
        let joined = self.computed("attention", q.numbers);
        drop(outs);
        let o = self.computed("attention", joined.numbers);
        [o, lse()]
    }

    /// `kernels::attention::backward`.
    pub fn attention_backward(&self, q: &Shadow, k: &Shadow) -> Attended {
        let new = |x: &Shadow| self.computed("attention gradient", x.numbers);
        if let Engine::Cudnn(repeatability) = self.engine {
            let (dq, dk, dv) = (new(q), new(k), new(k));
            drop(self.ledger.take("workspace", self.sizes.attention_workspace(q, k, repeatability)));
            return Attended { dq, dk, dv };
        }
        let _copies = self.computed("attention", 2 * q.numbers + 2 * k.numbers);
        drop(self.ledger.take("attention gradient", 3 * F32 * q.numbers));
        let _sums = self.ledger.take("attention gradient", 2 * F32 * k.numbers);
        let dqs = new(q);
        drop(self.ledger.take("scores", 5 * F32 * self.scores(q, k) + 2 * F32 * k.numbers));
        let dq = { new(q) };
        drop(dqs);
        Attended { dq: new(&dq), dk: new(k), dv: new(k) }
    }

    /// Rows of scores of all heads.
    fn rows_of_heads(&self, q: &Shadow) -> u64 {
        q.numbers / self.sizes.dim * self.sizes.heads
    }

    /// Numbers of a block of scores of chunked attention.
    fn scores(&self, q: &Shadow, k: &Shadow) -> u64 {
        let (keys, queries) =
            (k.numbers / self.sizes.dim / self.sizes.batch, q.numbers / self.sizes.dim / self.sizes.batch);
        let of_row = self.sizes.batch * self.sizes.heads * keys;
        of_row * (kernels::attention::MAX_SCORES as u64 / of_row.max(1)).clamp(1, queries.max(1))
    }
}

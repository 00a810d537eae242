//! What a block of the DiT allocates. It follows `models::dit::block` and its neighbours line by line: who changes one
//! changes the other.

use models::dit::Keep;
use models::dit::ffn::chunks;

use super::ledger::{Name, Shadow};
use super::ops::{Layer, Ops};
use super::task::LAYERS;

/// The frozen block and the bound on its feed-forward layer.
pub(super) struct Block<'a> {
    pub ops: &'a Ops<'a>,
    /// q, k, v, o of both attentions, up and down; k and v of the picture.
    pub layers: [Layer; LAYERS.len()],
    pub ffn_tokens: usize,
}

/// `kernels::residual::Stream`: what it begins with, and what is still to be added.
struct Stream {
    x: Shadow,
    parts: Vec<Shadow>,
}

/// Tokens that go through the feed-forward part together.
struct Chunk {
    tokens: u64,
    /// Whether they are a view of the stream.
    is_view: bool,
}

/// What is kept of a forward: the input; then the self-attention's two tensors; then all of [`Inner`].
pub(super) type Saved<T> = Vec<T>;

/// What the cross-attention looks at.
pub(super) struct Context {
    pub text: Shadow,
    pub picture: Option<Shadow>,
}

/// What products and attentions made on the way to the feed-forward part.
struct Inner {
    projected: [Shadow; 3],
    self_output: Shadow,
    cross_projected: [Shadow; 3],
    cross_attended: [Shadow; 2],
    picture: Option<Picture>,
    cross_output: Shadow,
}

/// Keys and values of the picture, and what its attention made.
struct Picture {
    projected: [Shadow; 2],
    attended: [Shadow; 2],
}

const ACTIVATIONS: Name = "activations";
const STREAM: Name = "stream";
const FEED_FORWARD: Name = "feed-forward";

impl From<&Shadow> for Stream {
    fn from(x: &Shadow) -> Self {
        Self { x: x.clone(), parts: Vec::new() }
    }
}

impl Inner {
    fn into_saved(self) -> impl Iterator<Item = Shadow> {
        let Self { projected, self_output, cross_projected, cross_attended, picture, cross_output } = self;
        let first = projected.into_iter().chain([self_output]).chain(cross_projected);
        let picture = picture.into_iter().flat_map(|p| p.projected.into_iter().chain(p.attended));
        first.chain(cross_attended).chain([cross_output]).chain(picture)
    }

    fn from_saved(saved: &[Shadow]) -> Option<Self> {
        let [q, k, v, self_output, cross_q, cross_k, cross_v, o, lse, cross_output, picture @ ..] = saved
        else {
            return None;
        };
        let three = |a: &Shadow, b: &Shadow, c: &Shadow| [a.clone(), b.clone(), c.clone()];
        Some(Self {
            projected: three(q, k, v),
            self_output: self_output.clone(),
            cross_projected: three(cross_q, cross_k, cross_v),
            cross_attended: [o.clone(), lse.clone()],
            picture: match picture {
                [k, v, o, lse] => {
                    Some(Picture { projected: [k.clone(), v.clone()], attended: [o.clone(), lse.clone()] })
                }
                _ => None,
            },
            cross_output: cross_output.clone(),
        })
    }
}

impl Block<'_> {
    /// `Block::forward`: the stream behind the block, and what is kept.
    pub fn forward(&self, x: Shadow, context: &Context, keep: Keep) -> (Shadow, Saved<Shadow>) {
        let (attended, inner) = self.attend(&x, None, context);
        let after_cross =
            Stream { x: x.clone(), parts: vec![inner.self_output.clone(), inner.cross_output.clone()] };
        let mut saved = vec![x];
        if keep != Keep::Input {
            saved.extend(attended);
        } else {
            drop(attended);
        }
        if keep == Keep::All {
            saved.extend(inner.into_saved());
        } else {
            drop(inner);
        }
        (self.feed_forward(&after_cross), saved)
    }

    /// `Block::backward`: the gradient of the stream before the block, from `dy` behind it.
    pub fn backward(&self, saved: Saved<Shadow>, dy: Shadow, context: &Context) -> Shadow {
        let x = saved[0].clone(); // the input is always saved
        let known = saved.get(1..3).map(|two| [two[0].clone(), two[1].clone()]);
        let inner = saved.get(3..).and_then(Inner::from_saved);
        drop(saved);
        let (attended, inner) = match (known, inner) {
            (Some(attended), Some(inner)) => (attended, inner),
            (known, _) => self.attend(&x, known, context),
        };
        let Inner { projected, self_output, cross_projected, cross_attended, picture, cross_output } = inner;
        let after_self = Stream { x: x.clone(), parts: vec![self_output.clone()] };
        let after_cross = Stream { x: x.clone(), parts: vec![self_output, cross_output] };
        let past = self.feed_forward_backward(&after_cross, dy);
        drop(after_cross);

        let d_attended = self.ops.cast(ACTIVATIONS, &past);
        let dq = self.cross_backward(cross_projected, cross_attended, picture, d_attended, context);
        let d_in = self.ops.backward(ACTIVATIONS, &self.layers[4..5], &self.normed(&after_self), &[&dq]);
        let dx = self.past(&past);
        drop((after_self, past, dq, d_in));

        let d_attended = self.ops.fused(ACTIVATIONS, dx.numbers, self.ops.sizes.compute, 1);
        let _d_in = {
            let [dq, dk, dv] = &self.self_backward(projected, attended, d_attended);
            self.ops.backward(ACTIVATIONS, &self.layers[..3], &self.normed(&Stream::from(&x)), &[dq, dk, dv])
        };
        self.past(&dx)
    }

    /// `Block::attend`.
    fn attend(&self, x: &Shadow, known: Option<[Shadow; 2]>, context: &Context) -> ([Shadow; 2], Inner) {
        let projected =
            three(self.ops.forward(ACTIVATIONS, &self.layers[..3], &self.normed(&Stream::from(x))));
        let attended = known.unwrap_or_else(|| {
            let [q, k] = self.queries_and_keys(&projected);
            self.ops.attention(&q, &k)
        });
        let self_output = one(self.ops.forward(ACTIVATIONS, &self.layers[3..4], &attended[0]));
        let after_self = Stream { x: x.clone(), parts: vec![self_output.clone()] };
        let (cross_projected, of_picture) = self.cross_project(&self.normed(&after_self), context);
        let (cross_attended, picture) = {
            let [q, k] = self.queries_and_keys(&cross_projected);
            let attended = self.ops.attention(&q, &k);
            let over = |projected: [Shadow; 2]| {
                let attended = self.ops.attention(&q, &self.rms_normed(&projected[0]));
                Picture { projected, attended }
            };
            (attended, of_picture.map(over))
        };
        let cross_output = {
            let sum = self.summed(&cross_attended[0], &picture);
            one(self.ops.forward(ACTIVATIONS, &self.layers[7..8], &sum))
        };
        (attended, Inner { projected, self_output, cross_projected, cross_attended, picture, cross_output })
    }

    fn cross_project(&self, x: &Shadow, context: &Context) -> ([Shadow; 3], Option<[Shadow; 2]>) {
        let kv = self.ops.forward(ACTIVATIONS, &self.layers[5..7], &context.text);
        let picture = context.picture.as_ref().map(|picture| {
            let mut kv = self.ops.forward(ACTIVATIONS, &self.layers[10..12], picture);
            let k = kv.remove(0); // two layers, two outputs
            [k, one(kv)]
        });
        let q = self.ops.forward(ACTIVATIONS, &self.layers[4..5], x);
        (three(q.into_iter().chain(kv).collect()), picture)
    }

    /// The outputs of both cross-attentions, added where there are two.
    fn summed(&self, text: &Shadow, picture: &Option<Picture>) -> Shadow {
        match picture {
            Some(_) => self.ops.computed(ACTIVATIONS, text.numbers),
            None => text.clone(),
        }
    }

    fn rms_normed(&self, x: &Shadow) -> Shadow {
        self.ops.fused(ACTIVATIONS, x.numbers, x.dtype, 4)
    }

    fn queries_and_keys(&self, projected: &[Shadow; 3]) -> [Shadow; 2] {
        [self.rms_normed(&projected[0]), self.rms_normed(&projected[1])]
    }

    /// `SelfAttention::attend_backward`.
    fn self_backward(&self, projected: [Shadow; 3], attended: [Shadow; 2], dy: Shadow) -> [Shadow; 3] {
        let ops = self.ops;
        let d_out = ops.backward(ACTIVATIONS, &self.layers[3..4], &attended[0], &[&dy]);
        drop(dy);
        let qk = self.queries_and_keys(&projected);
        let d = ops.attention_backward(&qk[0], &qk[1]);
        drop((qk, attended, d_out));
        let turned = |x: &Shadow| ops.fused(ACTIVATIONS, x.numbers, x.dtype, 4);
        [turned(&d.dq), turned(&d.dk), d.dv.clone()]
    }

    /// `CrossAttention::attend_backward`.
    fn cross_backward(
        &self,
        projected: [Shadow; 3],
        attended: [Shadow; 2],
        picture: Option<Picture>,
        dy: Shadow,
        context: &Context,
    ) -> Shadow {
        let ops = self.ops;
        let d_out = {
            let sum = self.summed(&attended[0], &picture);
            ops.backward(ACTIVATIONS, &self.layers[7..8], &sum, &[&dy])
        };
        drop(dy);
        let normed = |x: &Shadow| ops.fused(ACTIVATIONS, x.numbers, x.dtype, 3);
        let q = self.rms_normed(&projected[0]);
        let over = |k: &Shadow, layers: &[Layer], states: &Shadow| {
            let d = ops.attention_backward(&q, &self.rms_normed(k));
            let dk = normed(&d.dk);
            ops.backward_adapters(layers, states, &[&dk, &d.dv]);
            d.dq
        };
        let mut dq = over(&projected[1], &self.layers[5..7], &context.text);
        drop(attended);
        if let (Some(own), Some(states)) = (&picture, &context.picture) {
            let _past = over(&own.projected[0], &self.layers[10..12], states);
            dq = ops.computed(ACTIVATIONS, dq.numbers);
        }
        drop((q, d_out));
        normed(&dq)
    }

    /// `Block::feed_forward`.
    fn feed_forward(&self, x: &Stream) -> Shadow {
        let (_up, _down) = (self.ops.decoded(&self.layers[8]), self.ops.decoded(&self.layers[9]));
        let y = self.ops.ledger.tensor(STREAM, x.x.numbers, x.x.dtype);
        for chunk in self.chunks() {
            let x = self.part(&chunk, x);
            let ffn_in = self.normed(&x);
            let _fed = {
                let active = self.linear(8, FEED_FORWARD, &ffn_in);
                self.linear(9, ACTIVATIONS, &active)
            };
            drop(ffn_in);
            let made = || self.ops.fused(STREAM, x.x.numbers, x.x.dtype, 2 + x.parts.len() as u64);
            let _y = (!self.writes_into(&chunk)).then(made);
        }
        y
    }

    /// `Block::feed_forward_backward`.
    fn feed_forward_backward(&self, x: &Stream, dy: Shadow) -> Shadow {
        let ops = self.ops;
        let (_up, _down) = (ops.decoded(&self.layers[8]), ops.decoded(&self.layers[9]));
        for chunk in self.chunks() {
            let (x, dy) = (self.part(&chunk, x), self.run(&chunk, &dy));
            let ffn_in = self.normed(&x);
            let d_fed = ops.fused(ACTIVATIONS, dy.numbers, ops.sizes.compute, 1);
            let _d_in = {
                let inner = self.linear(8, FEED_FORWARD, &ffn_in);
                let d_active = {
                    let active = ops.fused(FEED_FORWARD, inner.numbers, inner.dtype, 0);
                    ops.backward(FEED_FORWARD, &[self.decoded_layer(9)], &active, &[&d_fed])
                };
                let d_inner = ops.fused(FEED_FORWARD, inner.numbers, inner.dtype, 3);
                drop((inner, d_active));
                ops.backward(ACTIVATIONS, &[self.decoded_layer(8)], &ffn_in, &[&d_inner])
            };
            let _dx = (!self.writes_into(&chunk)).then(|| self.past(&dy));
        }
        dy
    }

    /// `chunks_of` the block.
    fn chunks(&self) -> Vec<Chunk> {
        let sizes = self.ops.sizes;
        let chunks = chunks(sizes.tokens as usize, 1, self.ffn_tokens);
        // A run of one sample's tokens is a view, and so are all tokens.
        let is_view = sizes.batch == 1 || chunks.len() < 2;
        chunks.into_iter().map(|chunk| Chunk { tokens: chunk.tokens.len() as u64, is_view }).collect()
    }

    /// Whether what is made of a chunk is written where it belongs, not by way of a tensor of its own.
    fn writes_into(&self, chunk: &Chunk) -> bool {
        chunk.is_view && self.ops.engine.is_gpu()
    }

    fn run(&self, chunk: &Chunk, x: &Shadow) -> Shadow {
        let numbers = x.numbers / self.ops.sizes.tokens * chunk.tokens;
        if chunk.is_view { x.view(numbers) } else { self.ops.ledger.tensor(STREAM, numbers, x.dtype) }
    }

    fn part(&self, chunk: &Chunk, x: &Stream) -> Stream {
        let parts = x.parts.iter().map(|part| self.run(chunk, part)).collect();
        Stream { x: self.run(chunk, &x.x), parts }
    }

    /// The output of one layer that was decoded before.
    fn linear(&self, layer: usize, name: Name, x: &Shadow) -> Shadow {
        one(self.ops.forward(name, &[self.decoded_layer(layer)], x))
    }

    fn decoded_layer(&self, layer: usize) -> Layer {
        Layer { is_coded: false, ..self.layers[layer] }
    }

    /// A norm of the stream, in the dtype that is computed in.
    fn normed(&self, x: &Stream) -> Shadow {
        self.ops.fused(ACTIVATIONS, x.x.numbers, self.ops.sizes.compute, 3 + x.parts.len() as u64)
    }

    /// The gradient of the stream, past a norm.
    fn past(&self, dx: &Shadow) -> Shadow {
        self.ops.fused("stream gradient", dx.numbers, dx.dtype, 4)
    }
}

fn one(mut shadows: Vec<Shadow>) -> Shadow {
    shadows.remove(0) // one layer, one output
}

fn three(shadows: Vec<Shadow>) -> [Shadow; 3] {
    let mut each = shadows.into_iter();
    std::array::from_fn(|_| each.next().unwrap_or_else(|| unreachable!("three layers, three outputs")))
}

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
        let x_after_self = self.added(&x);
        let x_after_cross = self.added(&x_after_self);
        drop(x_after_self);
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
        (self.feed_forward(x_after_cross), saved)
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
        let x_after_cross = {
            let x_after_self = self.added(&x);
            self.added(&x_after_self)
        };
        drop(cross_output);
        let past = self.feed_forward_backward(x_after_cross, dy);

        let d_attended = self.ops.cast(ACTIVATIONS, &past);
        let dq = self.cross_backward(cross_projected, cross_attended, picture, d_attended, context);
        let x_after_self = self.added(&x);
        drop(self_output);
        let d_in = self.ops.backward(ACTIVATIONS, &self.layers[4..5], &self.normed(&x_after_self), &[&dq]);
        let dx = self.past(&past);
        drop((x_after_self, past, dq, d_in));

        let d_attended = self.ops.fused(ACTIVATIONS, dx.numbers, self.ops.sizes.compute, 1);
        let _d_in = {
            let [dq, dk, dv] = &self.self_backward(projected, attended, d_attended);
            self.ops.backward(ACTIVATIONS, &self.layers[..3], &self.normed(&x), &[dq, dk, dv])
        };
        self.past(&dx)
    }

    /// `Block::attend`.
    fn attend(&self, x: &Shadow, known: Option<[Shadow; 2]>, context: &Context) -> ([Shadow; 2], Inner) {
        let projected = three(self.ops.forward(ACTIVATIONS, &self.layers[..3], &self.normed(x)));
        let attended = known.unwrap_or_else(|| {
            let [q, k] = self.queries_and_keys(&projected);
            self.ops.attention(&q, &k)
        });
        let self_output = one(self.ops.forward(ACTIVATIONS, &self.layers[3..4], &attended[0]));
        let x_after_self = self.added(x);
        let (cross_projected, of_picture) = self.cross_project(&self.normed(&x_after_self), context);
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
    fn feed_forward(&self, x: Shadow) -> Shadow {
        let (_up, _down) = (self.ops.decoded(&self.layers[8]), self.ops.decoded(&self.layers[9]));
        self.in_chunks([x], |[x]| {
            let ffn_in = self.normed(x);
            let _fed = {
                let active = self.linear(8, FEED_FORWARD, &ffn_in);
                self.linear(9, ACTIVATIONS, &active)
            };
            self.added(x)
        })
    }

    /// `Block::feed_forward_backward`.
    fn feed_forward_backward(&self, x: Shadow, dy: Shadow) -> Shadow {
        let ops = self.ops;
        let (_up, _down) = (ops.decoded(&self.layers[8]), ops.decoded(&self.layers[9]));
        self.in_chunks([x, dy], |[x, dy]| {
            let ffn_in = self.normed(x);
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
            self.past(dy)
        })
    }

    /// `in_chunks` of the block: the result takes the place of the first of `streams`.
    fn in_chunks<const N: usize>(
        &self,
        streams: [Shadow; N],
        work: impl Fn(&[Shadow; N]) -> Shadow,
    ) -> Shadow {
        let sizes = self.ops.sizes;
        let chunks = chunks(sizes.tokens as usize, 1, self.ffn_tokens);
        if chunks.len() < 2 {
            return work(&streams);
        }
        for chunk in chunks {
            let part = |x: &Shadow| {
                let numbers = x.numbers / sizes.tokens * chunk.tokens.len() as u64;
                match sizes.batch {
                    // A run of one sample's tokens is a view.
                    1 => x.view(numbers),
                    _ => self.ops.ledger.tensor(STREAM, numbers, x.dtype),
                }
            };
            let done = work(&streams.each_ref().map(part));
            let _cast = (done.dtype != streams[0].dtype)
                .then(|| self.ops.ledger.tensor(STREAM, done.numbers, streams[0].dtype));
        }
        streams[0].clone()
    }

    /// The output of one layer that was decoded before.
    fn linear(&self, layer: usize, name: Name, x: &Shadow) -> Shadow {
        one(self.ops.forward(name, &[self.decoded_layer(layer)], x))
    }

    fn decoded_layer(&self, layer: usize) -> Layer {
        Layer { is_coded: false, ..self.layers[layer] }
    }

    /// A norm of the stream, in the dtype that is computed in.
    fn normed(&self, x: &Shadow) -> Shadow {
        self.ops.fused(ACTIVATIONS, x.numbers, self.ops.sizes.compute, 3)
    }

    /// The stream with something added.
    fn added(&self, x: &Shadow) -> Shadow {
        self.ops.fused(STREAM, x.numbers, self.ops.sizes.stream, 2)
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

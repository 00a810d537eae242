//! A stream whose sums are not made yet is to its readers what it is with its sums made.

use kernels::residual::{self, Stream};
use kernels::tokens::{self, Destination, unwritten};
use kernels::{DType, Tensor, norm};
use proofs::{assert_same_bits, randn};

const EPS: f64 = 1e-6;

/// Batches, tokens of a group, and widths: two that the kernels of a GPU take, and one that they leave to plain operations.
const SHAPES: [(usize, usize, usize); 3] = [(1, 7, 96), (2, 5, 1536), (2, 3, 6)];
/// Of the stream, and of what is added to it.
const DTYPES: [(DType, DType); 3] =
    [(DType::F32, DType::F32), (DType::F32, DType::BF16), (DType::BF16, DType::BF16)];
const GROUPS: usize = 3;

/// x, what is added to it gated and plain, and rows of modulation.
struct Case {
    x: Tensor,
    h: Tensor,
    plain: Tensor,
    dy: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
}

fn cases() -> impl Iterator<Item = Case> {
    SHAPES.into_iter().flat_map(|(batch, tokens, width)| {
        DTYPES.into_iter().map(move |(stream, part)| {
            let of =
                |name: &str, dtype| randn(name, (batch, GROUPS * tokens, width)).to_dtype(dtype).unwrap();
            let row = |name: &str| randn(name, (batch, GROUPS, 1, width));
            Case {
                x: of("x", stream),
                h: of("h", part),
                plain: of("plain", part),
                dy: of("dy", part),
                gate: row("gate"),
                scale: row("scale"),
                shift: row("shift"),
            }
        })
    })
}

impl Case {
    /// With one sum to make, with the other, with both.
    fn streams(&self) -> [Stream; 3] {
        let x = || Stream::from(&self.x);
        [
            x().gated(&self.h, &self.gate),
            x().plus(&self.plain),
            x().gated(&self.h, &self.gate).plus(&self.plain),
        ]
    }
}

/// In the dtype that both have.
fn same(what: &str, got: &Tensor, expected: &Tensor) {
    assert_eq!(got.dtype(), expected.dtype());
    let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
    assert_same_bits(what, &wide(got), &wide(expected));
}

#[test]
fn norms_of_a_stream_are_those_of_its_sum() {
    for case in cases() {
        let Case { dy, scale, shift, x, .. } = &case;
        // Gradients of the stream are f32, also where the stream is bf16.
        let (dtype, onto) = (dy.dtype(), &x.to_dtype(DType::F32).unwrap());
        let (gain, bias) = (randn("gain", x.dims()[2]), randn("bias", x.dims()[2]));
        for stream in case.streams() {
            let sum = &stream.whole().unwrap();
            let modulated = |x: &Stream| norm::modulated_layer_norm(x, shift, scale, EPS, dtype).unwrap();
            same("modulated", &modulated(&stream), &modulated(&sum.into()));
            let affine = |x: &Stream| norm::affine_layer_norm(x, &gain, &bias, EPS, dtype).unwrap();
            same("affine", &affine(&stream), &affine(&sum.into()));
            let back = |x: &Stream| norm::modulated_layer_norm_backward(x, dy, scale, EPS, onto).unwrap();
            same("modulated, back", &back(&stream), &back(&sum.into()));
            let back = |x: &Stream| norm::affine_layer_norm_backward(x, dy, &gain, EPS, onto).unwrap();
            same("affine, back", &back(&stream), &back(&sum.into()));
        }
    }
}

/// Also group by group into the places of a whole, which holds something else before.
#[test]
fn what_is_added_to_a_stream_is_added_to_its_sum() {
    for case in cases() {
        let Case { dy: fed, scale: gate, x, .. } = &case;
        let of_group = x.dim(1).unwrap() / GROUPS;
        for stream in case.streams() {
            let expected = residual::forward(&stream.whole().unwrap(), fed, gate).unwrap();
            same("whole", &residual::forward(&stream, fed, gate).unwrap(), &expected);
            let whole = unwritten(stream.first()).unwrap();
            for group in 0..GROUPS {
                let run = group * of_group..(group + 1) * of_group;
                let part = stream.part(&run, &(group..group + 1)).unwrap();
                let fed = tokens::run(fed, &run).unwrap();
                let gate = tokens::run(gate, &(group..group + 1)).unwrap();
                let to = Destination { whole: &whole, start: run.start };
                residual::forward_at(to, &part, &fed, &gate).unwrap();
            }
            same("in parts", &whole, &expected);
        }
    }
}

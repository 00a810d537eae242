//! Every op's hand-written backward against finite differences and against candle's autograd.

use kernels::loss::Terms;
use kernels::tokens::Destination;
use kernels::weight::Weight;
use kernels::{
    DType, Result, Tensor, attention, dora, gelu, linear, loha, lokr, loss, low_rank, norm, norm_rope,
    residual, rope,
};
use proofs::autograd::{Slopes, Variable};
use proofs::{Tolerance, assert_close, assert_same_bits, randn};

/// One f32 rounding: a GPU adds before it rounds a result, other devices after it.
const FUSED: Tolerance = Tolerance { absolute: 1e-6, relative: 2e-7 };
/// f32 rounding through a few sums of tiny shapes.
const AUTOGRAD: Tolerance = Tolerance { absolute: 1e-6, relative: 2e-5 };

/// Central differences in f32 with a step of 1e-2: the rounding of the sum (1e-6 / 2e-2) and the third derivative
/// (1e-4) both stay under this share of the largest gradient.
const FINITE: Tolerance = Tolerance { absolute: 2e-4, relative: 4e-3 };

/// Checks `gradient` = d sum(f(x) * seed) / dx by moving each element of `x`.
fn assert_finite_difference(
    what: &str,
    f: &dyn Fn(&Tensor) -> Result<Tensor>,
    x: &Tensor,
    seed: &Tensor,
    gradient: &Tensor,
) {
    const STEP: f64 = 1e-2;
    let value = |x: &[f32]| -> f64 {
        let x = Tensor::from_vec(x.to_vec(), gradient.shape(), gradient.device()).unwrap();
        let product =
            (f(&x).unwrap().to_dtype(DType::F64).unwrap() * seed.to_dtype(DType::F64).unwrap()).unwrap();
        product.sum_all().unwrap().to_scalar().unwrap()
    };
    let base: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    let slopes: Vec<f32> = (0..base.len())
        .map(|i| {
            let moved = |by: f64| {
                let mut x = base.clone();
                x[i] += by as f32;
                (value(&x), f64::from(x[i]))
            };
            let ((above, x_above), (below, x_below)) = (moved(STEP), moved(-STEP));
            ((above - below) / (x_above - x_below)) as f32
        })
        .collect();
    let slopes = Tensor::from_vec(slopes, gradient.shape(), gradient.device()).unwrap();
    assert_close(&format!("{what}, finite differences"), gradient, &slopes, FINITE);
}

/// Checks `gradient` against finite differences of `f`, and against candle's autograd of `twin`, the same formula out
/// of ops that candle can differentiate.
fn assert_gradient(
    what: &str,
    f: &dyn Fn(&Tensor) -> Result<Tensor>,
    twin: &dyn Fn(&Tensor) -> Result<Tensor>,
    x: &Tensor,
    seed: &Tensor,
    gradient: &Tensor,
) {
    assert_finite_difference(what, f, x, seed, gradient);
    let variable = Variable::new(x);
    let y = twin(variable.as_tensor()).unwrap();
    assert_close(&format!("{what}, value"), &f(x).unwrap(), &y, AUTOGRAD);
    let slopes = Slopes::of(&(y * seed).unwrap().sum_all().unwrap());
    assert_close(&format!("{what}, autograd"), gradient, &slopes.get(&variable), AUTOGRAD);
}

#[test]
fn linear_backward() {
    let (x, w, b, dy) = (randn("x", (2, 3, 5)), randn("w", (4, 5)), randn("b", 4), randn("dy", (2, 3, 4)));
    let frozen = Weight::Dense(w.clone());
    let f = |x: &Tensor| linear::forward(x, &frozen, Some(&b), None);
    let twin = |x: &Tensor| x.broadcast_matmul(&w.t()?)?.broadcast_add(&b);
    let dx = linear::backward_input(&dy, &frozen, None).unwrap();
    assert_gradient("linear", &f, &twin, &x, &dy, &dx);
    let onto = linear::forward(&x, &frozen, Some(&b), Some(&dy)).unwrap();
    assert_close("onto", &onto, &(&dy + f(&x).unwrap()).unwrap(), FUSED);
    let onto = linear::backward_input(&dy, &frozen, Some(&x)).unwrap();
    assert_close("gradient onto", &onto, &(&x + dx).unwrap(), FUSED);
}

#[test]
fn low_rank_backward() {
    let (x, dy) = (randn("x", (2, 3, 5)), randn("dy", (2, 3, 4)));
    let factors = |a: &Tensor, b: &Tensor| low_rank::Factors { a: a.clone(), b: b.clone(), scale: 0.7 };
    let (a, b) = (randn("a", (2, 5)), randn("b", (4, 2)));
    let twin =
        |x: &Tensor, a: &Tensor, b: &Tensor| x.broadcast_matmul(&a.t()?)?.broadcast_matmul(&b.t()?)? * 0.7;
    let got = low_rank::backward(&x, &dy, &factors(&a, &b), None).unwrap();
    let by_x = |x: &Tensor| low_rank::forward(x, &factors(&a, &b), None);
    assert_gradient("low rank, input", &by_x, &|x| twin(x, &a, &b), &x, &dy, &got.dx);
    let by_a = |a: &Tensor| low_rank::forward(&x, &factors(a, &b), None);
    assert_gradient("low rank, A", &by_a, &|a| twin(&x, a, &b), &a, &dy, &got.factors[0].da);
    let by_b = |b: &Tensor| low_rank::forward(&x, &factors(&a, b), None);
    assert_gradient("low rank, B", &by_b, &|b| twin(&x, &a, b), &b, &dy, &got.factors[0].db);
}

/// Three layers over one input: the first with one adapter, the second with none, the third with two of other ranks.
#[test]
fn low_rank_groups_equal_their_members_alone() {
    let factors = |name: &str, rank: usize, out: usize| low_rank::Factors {
        a: randn(&format!("{name}.a"), (rank, 5)),
        b: randn(&format!("{name}.b"), (out, rank)),
        scale: 0.3 * rank as f64,
    };
    let all = [(0, factors("q", 2, 4)), (2, factors("v", 3, 6)), (2, factors("w", 1, 6))];
    let members: Vec<_> =
        all.iter().map(|(layer, factors)| low_rank::Member { layer: *layer, factors }).collect();
    let x = randn("x", (2, 3, 5));
    let dys = [4, 4, 6].map(|out| randn(&format!("dy{out}"), (2, 3, out)));
    let onto = randn("onto", (2, 3, 5));

    let (mut expected, mut dx) = (vec![None; 3], onto.clone());
    let together = low_rank::backward_group(&x, &dys, &members, Some(&onto)).unwrap();
    for (member, got) in members.iter().zip(&together.factors) {
        let layer = member.layer;
        let delta = low_rank::forward(&x, member.factors, expected[layer].as_ref());
        expected[layer] = Some(delta.unwrap());
        let alone = low_rank::backward(&x, &dys[layer], member.factors, Some(&dx)).unwrap();
        assert_close("dA", &got.da, &alone.factors[0].da, AUTOGRAD);
        assert_close("dB", &got.db, &alone.factors[0].db, AUTOGRAD);
        dx = alone.dx;
    }
    assert_close("dx", &together.dx, &dx, AUTOGRAD);
    let deltas = low_rank::forward_group(&x, &members, 3).unwrap();
    for (got, expected) in deltas.iter().zip(&expected) {
        match (got, expected) {
            (Some(got), Some(expected)) => assert_close("delta", got, expected, AUTOGRAD),
            (got, expected) => assert_eq!(got.is_some(), expected.is_some()),
        }
    }
}

#[test]
fn loha_backward() {
    let names = ["w1_a", "w1_b", "w2_a", "w2_b"];
    let all = [randn("w1_a", (4, 2)), randn("w1_b", (2, 5)), randn("w2_a", (4, 2)), randn("w2_b", (2, 5))];
    let factors =
        |[w1_a, w1_b, w2_a, w2_b]: [Tensor; 4]| loha::Factors { w1_a, w1_b, w2_a, w2_b, scale: 0.7 };
    let (x, dy) = (randn("x", (2, 3, 5)), randn("dy", (2, 3, 4)));
    let got = loha::backward(&x, &dy, &factors(all.clone())).unwrap();
    let twin = |x: &Tensor, [w1_a, w1_b, w2_a, w2_b]: &[Tensor; 4]| {
        let delta = ((w1_a.matmul(w1_b)? * w2_a.matmul(w2_b)?)? * 0.7)?;
        x.broadcast_matmul(&delta.t()?)
    };
    let by_x = |x: &Tensor| loha::forward(x, &factors(all.clone()));
    assert_gradient("loha, input", &by_x, &|x| twin(x, &all), &x, &dy, &got.dx);
    for (i, name) in names.iter().enumerate() {
        let with = |w: &Tensor| {
            let mut moved = all.clone();
            moved[i] = w.clone();
            moved
        };
        let f = |w: &Tensor| loha::forward(&x, &factors(with(w)));
        assert_gradient(&format!("loha, {name}"), &f, &|w| twin(&x, &with(w)), &all[i], &dy, &got.factors[i]);
    }
}

/// W1 ⊗ W2 out of ops that candle can differentiate.
fn kron(w1: &Tensor, w2: &Tensor) -> Result<Tensor> {
    let ((o1, i1), (o2, i2)) = (w1.dims2()?, w2.dims2()?);
    w1.reshape((o1, 1, i1, 1))?.broadcast_mul(&w2.reshape((1, o2, 1, i2))?)?.reshape((o1 * o2, i1 * i2))
}

/// Both sides whole, and each in thin factors.
#[test]
fn lokr_backward() {
    let (x, dy) = (randn("x", (2, 3, 12)), randn("dy", (2, 3, 10)));
    let (w1, w2) = (randn("w1", (2, 3)), randn("w2", (5, 4)));
    let (a1, b1) = (randn("a1", (2, 1)), randn("b1", (1, 3)));
    let (a2, b2) = (randn("a2", (5, 2)), randn("b2", (2, 4)));
    let apply =
        |w1: lokr::Half, w2: lokr::Half, x: &Tensor| lokr::forward(x, &lokr::Factors { w1, w2, scale: 1.7 });
    let full = |w: &Tensor| lokr::Half::Full(w.clone());
    let low = |a: &Tensor, b: &Tensor| lokr::Half::Low(a.clone(), b.clone());
    let twin = |w1: &Tensor, w2: &Tensor, x: &Tensor| x.broadcast_matmul(&(kron(w1, w2)?.t()? * 1.7)?);

    let got = lokr::backward(&x, &dy, &lokr::Factors { w1: full(&w1), w2: full(&w2), scale: 1.7 }).unwrap();
    assert_gradient(
        "lokr, input",
        &|x| apply(full(&w1), full(&w2), x),
        &|x| twin(&w1, &w2, x),
        &x,
        &dy,
        &got.dx,
    );
    let (lokr::Half::Full(d1), lokr::Half::Full(d2)) = (&got.w1, &got.w2) else { panic!("{got:?}") };
    assert_gradient("lokr, w1", &|w| apply(full(w), full(&w2), &x), &|w| twin(w, &w2, &x), &w1, &dy, d1);
    assert_gradient("lokr, w2", &|w| apply(full(&w1), full(w), &x), &|w| twin(&w1, w, &x), &w2, &dy, d2);

    let thin = lokr::Factors { w1: low(&a1, &b1), w2: low(&a2, &b2), scale: 1.7 };
    let got = lokr::backward(&x, &dy, &thin).unwrap();
    let (lokr::Half::Low(da1, db1), lokr::Half::Low(da2, db2)) = (&got.w1, &got.w2) else {
        panic!("{got:?}")
    };
    let (p1, p2) = (a1.matmul(&b1).unwrap(), a2.matmul(&b2).unwrap());
    let f = |a: &Tensor| apply(low(a, &b1), low(&a2, &b2), &x);
    assert_gradient("lokr, w1_a", &f, &|a| twin(&a.matmul(&b1)?, &p2, &x), &a1, &dy, da1);
    let f = |b: &Tensor| apply(low(&a1, b), low(&a2, &b2), &x);
    assert_gradient("lokr, w1_b", &f, &|b| twin(&a1.matmul(b)?, &p2, &x), &b1, &dy, db1);
    let f = |a: &Tensor| apply(low(&a1, &b1), low(a, &b2), &x);
    assert_gradient("lokr, w2_a", &f, &|a| twin(&p1, &a.matmul(&b2)?, &x), &a2, &dy, da2);
    let f = |b: &Tensor| apply(low(&a1, &b1), low(&a2, b), &x);
    assert_gradient("lokr, w2_b", &f, &|b| twin(&p1, &a2.matmul(b)?, &x), &b2, &dy, db2);
}

/// The lengths that rows are divided by pass no gradient, so they are given here.
#[test]
fn dora_backward() {
    let (x, dy, plain) = (randn("x", (2, 3, 5)), randn("dy", (2, 3, 4)), randn("u", (2, 3, 4)));
    let (a, b) = (randn("a", (2, 5)), randn("b", (4, 2)));
    let positive = |name: &str| (randn(name, 4).abs().unwrap() + 0.5).unwrap();
    let (magnitude, norm) = (positive("m"), positive("n"));
    let lengths = |m: &Tensor| dora::Lengths { magnitude: m.clone(), norm: norm.clone(), strength: 0.8 };
    let factors = |a: &Tensor, b: &Tensor| low_rank::Factors { a: a.clone(), b: b.clone(), scale: 0.7 };
    let got = dora::backward(&x, &plain, &dy, &factors(&a, &b), &lengths(&magnitude)).unwrap();
    let twin = |x: &Tensor, u: &Tensor, a: &Tensor, b: &Tensor, m: &Tensor| {
        let c = m.div(&norm)?;
        let low = (x.broadcast_matmul(&a.t()?)?.broadcast_matmul(&b.t()?)? * 0.7)?;
        (u.broadcast_mul(&(&c - 1.0)?)? + low.broadcast_mul(&c)?)? * 0.8
    };
    let f = |x: &Tensor| dora::forward(x, &plain, &factors(&a, &b), &lengths(&magnitude));
    assert_gradient("dora, input", &f, &|x| twin(x, &plain, &a, &b, &magnitude), &x, &dy, &got.dx);
    let f = |u: &Tensor| dora::forward(&x, u, &factors(&a, &b), &lengths(&magnitude));
    assert_gradient("dora, product", &f, &|u| twin(&x, u, &a, &b, &magnitude), &plain, &dy, &got.d_plain);
    let f = |a: &Tensor| dora::forward(&x, &plain, &factors(a, &b), &lengths(&magnitude));
    assert_gradient("dora, A", &f, &|a| twin(&x, &plain, a, &b, &magnitude), &a, &dy, &got.factors.da);
    let f = |b: &Tensor| dora::forward(&x, &plain, &factors(&a, b), &lengths(&magnitude));
    assert_gradient("dora, B", &f, &|b| twin(&x, &plain, &a, b, &magnitude), &b, &dy, &got.factors.db);
    let f = |m: &Tensor| dora::forward(&x, &plain, &factors(&a, &b), &lengths(m));
    assert_gradient("dora, m", &f, &|m| twin(&x, &plain, &a, &b, m), &magnitude, &dy, &got.d_magnitude);
}

#[test]
fn gelu_backward() {
    let (x, dy) = ((randn("x", (4, 9)) * 2.0).unwrap(), randn("dy", (4, 9)));
    let got = gelu::backward(&x, &dy).unwrap();
    assert_gradient("gelu", &gelu::forward, &|x| x.gelu(), &x, &dy, &got);
}

#[test]
fn norm_backwards() {
    const EPS: f64 = 1e-6;
    let (x, dy) = (randn("x", (2, 6, 8)), randn("dy", (2, 6, 8)));
    let nothing = x.zeros_like().unwrap();
    let centred = |x: &Tensor| x.broadcast_sub(&x.mean_keepdim(2)?);
    let scaled = |x: &Tensor| x.broadcast_div(&(x.sqr()?.mean_keepdim(2)? + EPS)?.sqrt()?);

    // Three groups of two tokens, each with its own modulation row.
    let (shift, scale) = (randn("shift", (2, 3, 1, 8)), randn("scale", (2, 3, 1, 8)));
    let f = |x: &Tensor| norm::modulated_layer_norm(x, &shift, &scale, EPS, DType::F32);
    let rows = |t: &Tensor| t.broadcast_as((2, 3, 2, 8))?.reshape((2, 6, 8));
    let twin = |x: &Tensor| scaled(&centred(x)?)? * (rows(&scale)? + 1.0)? + rows(&shift)?;
    let backward = |onto: &Tensor| norm::modulated_layer_norm_backward(&x, &dy, &scale, EPS, onto).unwrap();
    let got = backward(&nothing);
    assert_close("onto", &backward(&dy), &(&dy + &got).unwrap(), FUSED);
    assert_gradient("modulated layer norm", &f, &twin, &x, &dy, &got);
    let whole = dy.copy().unwrap();
    let to = Destination { whole: &whole, start: 0 };
    norm::modulated_layer_norm_backward_at(to, &x, &dy, &scale, EPS, &whole).unwrap();
    assert_same_bits("in the place of what it goes onto", &whole, &backward(&dy));

    let (w, b) = (randn("w", 8), randn("b", 8));
    let f = |x: &Tensor| norm::affine_layer_norm(x, &w, &b, EPS, DType::F32);
    let twin = |x: &Tensor| scaled(&centred(x)?)?.broadcast_mul(&w)?.broadcast_add(&b);
    let backward = |onto: &Tensor| norm::affine_layer_norm_backward(&x, &dy, &w, EPS, onto).unwrap();
    let got = backward(&nothing);
    assert_close("onto", &backward(&dy), &(&dy + &got).unwrap(), FUSED);
    assert_gradient("affine layer norm", &f, &twin, &x, &dy, &got);

    let f = |x: &Tensor| norm::rms_norm(x, &w, EPS, DType::F32);
    let twin = |x: &Tensor| scaled(x)?.broadcast_mul(&w);
    let got = norm::rms_norm_backward(&x, &dy, &w, EPS).unwrap();
    assert_gradient("rms norm", &f, &twin, &x, &dy, &got);
}

#[test]
fn rope_backward() {
    let (x, dy) = (randn("x", (2, 3, 2, 6)), randn("dy", (2, 3, 2, 6)));
    let angles = randn("angles", (3, 3));
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    // The rotation as a matrix product for each pair, by index.
    let twin = |x: &Tensor| {
        let pairs = x.reshape((2, 3, 2, 3, 2))?;
        let turned = Tensor::stack(
            &[pairs.narrow(4, 1, 1)?.squeeze(4)?.neg()?, pairs.narrow(4, 0, 1)?.squeeze(4)?],
            4,
        )?;
        let wide = |t: &Tensor| t.reshape((1, 3, 1, 3, 1));
        (pairs.broadcast_mul(&wide(&cos)?)? + turned.broadcast_mul(&wide(&sin)?)?)?.reshape((2, 3, 2, 6))
    };
    let got = rope::backward(&dy, &cos, &sin).unwrap();
    assert_gradient("rope", &|x| rope::forward(x, &cos, &sin), &twin, &x, &dy, &got);
}

#[test]
fn norm_rope_backward() {
    const EPS: f64 = 1e-6;
    let (x, dy, w) = (randn("x", (2, 3, 12)), randn("dy", (2, 3, 2, 6)), randn("w", 12));
    let angles = randn("angles", (3, 3));
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    let twin = |x: &Tensor| {
        let scaled = x.broadcast_div(&(x.sqr()?.mean_keepdim(2)? + EPS)?.sqrt()?)?.broadcast_mul(&w)?;
        let pairs = scaled.reshape((2, 3, 2, 3, 2))?;
        let (a, b) = (pairs.narrow(4, 0, 1)?, pairs.narrow(4, 1, 1)?);
        let wide = |t: &Tensor| t.reshape((1, 3, 1, 3, 1));
        let turned_a = (a.broadcast_mul(&wide(&cos)?)? - b.broadcast_mul(&wide(&sin)?)?)?;
        let turned_b = (a.broadcast_mul(&wide(&sin)?)? + b.broadcast_mul(&wide(&cos)?)?)?;
        Tensor::cat(&[turned_a, turned_b], 4)?.reshape((2, 3, 2, 6))
    };
    let got = norm_rope::backward(&x, &dy, &w, &cos, &sin, EPS).unwrap();
    let f = |x: &Tensor| norm_rope::forward(x, &w, &cos, &sin, 2, EPS);
    assert_gradient("norm and rope", &f, &twin, &x, &dy, &got);
}

#[test]
fn gated_residual_backward() {
    let (x, h, dy) = (randn("x", (2, 6, 4)), randn("h", (2, 6, 4)), randn("dy", (2, 6, 4)));
    let gate = randn("gate", (2, 2, 1, 4));
    let twin = |h: &Tensor| &x + (gate.broadcast_as((2, 2, 3, 4))?.reshape((2, 6, 4))? * h)?;
    let got = residual::backward(&dy, &gate, DType::F32).unwrap();
    assert_gradient("gated residual", &|h| residual::forward(&x, h, &gate), &twin, &h, &dy, &got);
}

#[test]
fn attention_backward() {
    let (q, k, v) = (randn("q", (2, 5, 2, 4)), randn("k", (2, 7, 2, 4)), randn("v", (2, 7, 2, 4)));
    let dy = randn("dy", (2, 5, 2, 4));
    let f = |q: &Tensor, k: &Tensor, v: &Tensor| Ok(attention::forward(q, k, v)?.o);
    let twin = |q: &Tensor, k: &Tensor, v: &Tensor| {
        let heads = |t: &Tensor| t.transpose(1, 2)?.contiguous();
        let scores = (heads(q)?.matmul(&heads(k)?.t()?)? * 0.5)?.exp()?;
        let weights = scores.broadcast_div(&scores.sum_keepdim(3)?)?;
        heads(&weights.matmul(&heads(v)?)?)
    };
    let out = attention::forward(&q, &k, &v).unwrap();
    let got = attention::backward(&q, &k, &v, &out, &dy).unwrap();
    assert_gradient("attention, q", &|q| f(q, &k, &v), &|q| twin(q, &k, &v), &q, &dy, &got.dq);
    assert_gradient("attention, k", &|k| f(&q, k, &v), &|k| twin(&q, k, &v), &k, &dy, &got.dk);
    assert_gradient("attention, v", &|v| f(&q, &k, v), &|v| twin(&q, &k, v), &v, &dy, &got.dv);
}

#[test]
fn loss_backward() {
    let (p, y) = (randn("p", (2, 3, 2, 2, 2)), randn("y", (2, 3, 2, 2, 2)));
    let weights = Tensor::new(&[0.5f32, 2.0], p.device()).unwrap();
    let mask = Tensor::new(&[0f32, 1.0], p.device()).unwrap().reshape((1, 1, 2, 1, 1)).unwrap();
    let one = Tensor::new(1f32, p.device()).unwrap();
    let wide = weights.reshape((2, 1, 1, 1, 1)).unwrap();
    let got = loss::loss(&p, &y, &Terms::squares(&weights, None)).unwrap();
    let twin = |p: &Tensor| (p - &y)?.sqr()?.broadcast_mul(&wide)?.mean_all();
    assert_gradient(
        "loss",
        &|p| Ok(loss::loss(p, &y, &Terms::squares(&weights, None))?.value),
        &twin,
        &p,
        &one,
        &got.d_prediction,
    );
    let got = loss::loss(&p, &y, &Terms::squares(&weights, Some(&mask))).unwrap();
    let twin = |p: &Tensor| (p - &y)?.sqr()?.broadcast_mul(&wide)?.narrow(2, 1, 1)?.mean_all();
    let f = |p: &Tensor| Ok(loss::loss(p, &y, &Terms::squares(&weights, Some(&mask)))?.value);
    assert_gradient("masked loss", &f, &twin, &p, &one, &got.d_prediction);
}

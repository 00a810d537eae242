//! The kinds of adapter in a pass through the model: each changes one layer's output and has its own backward. No other code
//! of the pass distinguishes them.

use kernels::low_rank::{self, Factors};
use kernels::weight::Weight;
use kernels::{Device, Tensor, dora, loha, lokr};

use super::AdapterKind;
use super::change::{Change, DoraPair, LoraPair, Magnitude, half_tensors};
use crate::{Error, Result};

/// An adapter's contribution to the output of its layer. Tensors are f32 masters on the layer's device.
#[derive(Debug, Clone)]
pub enum Delta {
    /// scale * (x A^T) B^T.
    Lora(Factors),
    /// The same, with each row of the changed weight scaled to a trained length.
    Dora(Dora),
    /// x (scale * W1 ∘ W2)^T.
    Loha(loha::Factors),
    /// x (scale * W1 ⊗ W2)^T.
    Lokr(lokr::Factors),
}

/// A DoRA on the device of its weight.
#[derive(Debug, Clone)]
pub struct Dora {
    factors: Factors,
    /// `None` until [`Delta::settle`]: then initially the lengths of the weight's rows.
    magnitude: Option<Magnitude>,
    strength: f64,
    /// The squares of the lengths of the weight's rows, `[out]`; set by [`Delta::settle`].
    squares: Option<Tensor>,
}

/// The layer that an adapter belongs to.
#[derive(Debug, Clone, Copy)]
pub struct Site<'a> {
    /// Its frozen weight.
    pub weight: &'a Weight,
    /// The product of the adapter's input with it, without bias, if [`Delta::wants_product`].
    pub product: Option<&'a Tensor>,
}

/// The gradients that flow back through an adapter.
#[derive(Debug)]
pub struct Backward {
    /// Of its input, in the input's dtype.
    pub dx: Tensor,
    /// Of the layer's plain product, if [`Delta::wants_product`].
    pub d_product: Option<Tensor>,
    /// Of its tensors, f32, under the names of [`Delta::tensors`].
    pub gradients: Vec<(&'static str, Tensor)>,
}

impl From<Factors> for Delta {
    fn from(factors: Factors) -> Self {
        Self::Lora(factors)
    }
}

impl Delta {
    /// `change` at `strength`, on the device that its tensors are on.
    pub fn new(change: &Change, strength: f64) -> Result<Self> {
        let thin = |pair: &LoraPair, scale: f64| Factors { a: pair.a.clone(), b: pair.b.clone(), scale };
        Ok(match change {
            Change::Lora(pair) => Self::Lora(thin(pair, pair.scale() * strength)),
            Change::Dora(DoraPair { pair, magnitude }) => Self::Dora(Dora {
                factors: thin(pair, pair.scale()),
                magnitude: Some(magnitude.clone()),
                strength,
                squares: None,
            }),
            Change::Loha(factors) => {
                Self::Loha(loha::Factors { scale: factors.scale * strength, ..factors.clone() })
            }
            Change::Lokr(factors) => {
                Self::Lokr(lokr::Factors { scale: factors.scale * strength, ..factors.clone() })
            }
        })
    }

    /// A DoRA of these factors whose magnitudes start as the lengths of the weight's rows.
    pub fn fresh_dora(factors: Factors) -> Self {
        Self::Dora(Dora { factors, magnitude: None, strength: 1.0, squares: None })
    }

    /// The same as a [`Change`] for a file. A settled DoRA has the magnitudes of both conventions, which it computes from the
    /// weight.
    ///
    /// # Errors
    /// A DoRA that is not settled.
    pub fn to_change(&self, weight: Option<&Weight>) -> Result<Change> {
        Ok(match self {
            Self::Lora(f) => Change::Lora(LoraPair::new(f.a.clone(), f.b.clone(), f.scale)?),
            Self::Loha(factors) => Change::Loha(factors.clone()),
            Self::Lokr(factors) => Change::Lokr(factors.clone()),
            Self::Dora(dora) => {
                let f = &dora.factors;
                let pair = LoraPair::new(f.a.clone(), f.b.clone(), f.scale)?;
                let magnitude = dora.magnitude.clone().ok_or_else(unsettled)?;
                let magnitude = match (weight, &dora.squares, magnitude.of_merged()) {
                    (Some(weight), Some(squares), Some(merged)) => {
                        let norm = dora::merged_norm(weight, squares, f)?;
                        let base = (merged * squares.sqrt()?.div(&norm)?)?;
                        Magnitude::Both { merged: merged.clone(), base }
                    }
                    _ => magnitude,
                };
                Change::Dora(DoraPair { pair, magnitude })
            }
        })
    }

    /// The adapter of this kind whose tensors `find` returns by the names of [`Delta::tensors`]: for reading checkpoints.
    /// `None` where one is missing.
    pub fn from_tensors(
        kind: AdapterKind,
        scale: f64,
        find: impl Fn(&str) -> Option<Tensor>,
    ) -> Option<Self> {
        let half = |[whole, a, b]: [&str; 3]| match find(whole) {
            Some(w) => Some(lokr::Half::Full(w)),
            None => Some(lokr::Half::Low(find(a)?, find(b)?)),
        };
        let thin = || Some(Factors { a: find(A)?, b: find(B)?, scale });
        Some(match kind {
            AdapterKind::Lora => Self::Lora(thin()?),
            AdapterKind::Dora => {
                let magnitude = Some(Magnitude::OfMerged(find(MAGNITUDE)?));
                Self::Dora(Dora { factors: thin()?, magnitude, strength: 1.0, squares: None })
            }
            AdapterKind::Loha => {
                let [w1_a, w1_b] = [find("hada_w1_a")?, find("hada_w1_b")?];
                let [w2_a, w2_b] = [find("hada_w2_a")?, find("hada_w2_b")?];
                Self::Loha(loha::Factors { w1_a, w1_b, w2_a, w2_b, scale })
            }
            AdapterKind::Lokr => {
                let (w1, w2) = (half(W1)?, half(W2)?);
                // Without low-rank factors there is no rank to divide alpha by.
                let scale = if matches!(w2, lokr::Half::Full(_)) { 1.0 } else { scale };
                Self::Lokr(lokr::Factors { w1, w2, scale })
            }
        })
    }

    /// The factors of a LoRA or a DoRA.
    pub(crate) fn factors(&self) -> Option<&Factors> {
        match self {
            Self::Lora(factors) | Self::Dora(Dora { factors, .. }) => Some(factors),
            Self::Loha(_) | Self::Lokr(_) => None,
        }
    }

    /// The factors of a plain LoRA, whose products are batched with those of other layers.
    pub fn plain(&self) -> Option<&Factors> {
        match self {
            Self::Lora(factors) => Some(factors),
            _ => None,
        }
    }

    /// Whether it needs the layer's own product.
    pub fn wants_product(&self) -> bool {
        matches!(self, Self::Dora(_))
    }

    /// Its tensors by the suffix of their names after the module's.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Lora(f) => vec![(A, &f.a), (B, &f.b)],
            Self::Dora(Dora { factors: f, magnitude, .. }) => {
                let lengths = magnitude.iter().map(|m| (MAGNITUDE, m.any()));
                [(A, &f.a), (B, &f.b)].into_iter().chain(lengths).collect()
            }
            Self::Loha(f) => {
                vec![
                    ("hada_w1_a", &f.w1_a),
                    ("hada_w1_b", &f.w1_b),
                    ("hada_w2_a", &f.w2_a),
                    ("hada_w2_b", &f.w2_b),
                ]
            }
            Self::Lokr(f) => {
                let [first, second] =
                    [(&f.w1, W1), (&f.w2, W2)].map(|(half, names)| half_tensors(half, names));
                [first, second].concat()
            }
        }
    }

    /// Replaces its tensors by what `new` returns for the names of [`Delta::tensors`]; `None` leaves a tensor unchanged.
    pub fn replace(&mut self, new: impl Fn(&str) -> Option<Tensor>) {
        let put = |name: &str, place: &mut Tensor| {
            if let Some(tensor) = new(name) {
                *place = tensor;
            }
        };
        match self {
            Self::Lora(f) | Self::Dora(Dora { factors: f, magnitude: None, .. }) => {
                put(A, &mut f.a);
                put(B, &mut f.b);
            }
            Self::Dora(Dora { factors: f, magnitude: Some(magnitude), .. }) => {
                put(A, &mut f.a);
                put(B, &mut f.b);
                if let Some(tensor) = new(MAGNITUDE) {
                    *magnitude = Magnitude::OfMerged(tensor);
                }
            }
            Self::Loha(f) => {
                put("hada_w1_a", &mut f.w1_a);
                put("hada_w1_b", &mut f.w1_b);
                put("hada_w2_a", &mut f.w2_a);
                put("hada_w2_b", &mut f.w2_b);
            }
            Self::Lokr(f) => {
                for (half, [whole, a, b]) in [(&mut f.w1, W1), (&mut f.w2, W2)] {
                    match half {
                        lokr::Half::Full(w) => put(whole, w),
                        lokr::Half::Low(first, second) => {
                            put(a, first);
                            put(b, second);
                        }
                    }
                }
            }
        }
    }

    /// The same on `device`.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let mut placed = self.clone();
        let there = self.tensors().into_iter().map(|(name, t)| Ok((name, t.to_device(device)?)));
        let there: Vec<(&str, Tensor)> = there.collect::<Result<_>>()?;
        let found = |name: &str| there.iter().find(|(n, _)| *n == name).map(|(_, t)| t.clone());
        if let (Self::Dora(dora), Self::Dora(from)) = (&mut placed, self) {
            let to = |t: &Tensor| t.to_device(device);
            // It has the magnitudes of both conventions, in two tensors.
            dora.magnitude = match &from.magnitude {
                Some(Magnitude::OfBase(m)) => Some(Magnitude::OfBase(to(m)?)),
                Some(Magnitude::OfMerged(m)) => Some(Magnitude::OfMerged(to(m)?)),
                Some(Magnitude::Both { merged, base }) => {
                    Some(Magnitude::Both { merged: to(merged)?, base: to(base)? })
                }
                None => None,
            };
            dora.squares = from.squares.as_ref().map(to).transpose()?;
            dora.factors.a = to(&from.factors.a)?;
            dora.factors.b = to(&from.factors.b)?;
            return Ok(placed);
        }
        placed.replace(found);
        Ok(placed)
    }

    /// The same on the same tensors with a strength of 0: it is computed as before and adds zeros, so that what is around it makes the
    /// same operations.
    #[must_use]
    pub fn without_effect(&self) -> Self {
        let mut delta = self.clone();
        match &mut delta {
            Self::Lora(factors) => factors.scale = 0.0,
            Self::Dora(dora) => dora.strength = 0.0,
            Self::Loha(factors) => factors.scale = 0.0,
            Self::Lokr(factors) => factors.scale = 0.0,
        }
        delta
    }

    /// Whether it has no effect, whatever its factors are.
    pub fn is_off(&self) -> bool {
        match self {
            Self::Lora(factors) => factors.scale == 0.0,
            Self::Dora(dora) => dora.strength == 0.0,
            Self::Loha(factors) => factors.scale == 0.0,
            Self::Lokr(factors) => factors.scale == 0.0,
        }
    }

    /// Computes what it needs of the frozen weight of its layer: for a DoRA the lengths of its rows. Must be called before the
    /// first pass.
    pub fn settle(&mut self, weight: &Weight) -> Result<()> {
        let Self::Dora(dora) = self else { return Ok(()) };
        let squares = dora::row_squares(weight)?.maximum(f64::from(f32::MIN_POSITIVE))?;
        let norm = dora::merged_norm(weight, &squares, &dora.factors)?;
        dora.magnitude = Some(Magnitude::OfMerged(match &dora.magnitude {
            None => norm,
            Some(Magnitude::OfBase(m)) => (m * norm.div(&squares.sqrt()?)?)?,
            Some(m) => m.any().clone(),
        }));
        dora.squares = Some(squares);
        Ok(())
    }

    /// Its contribution to the layer's output: `x` [.., in] -> [.., out], in the dtype of `x`.
    pub fn forward(&self, x: &Tensor, site: Site) -> Result<Tensor> {
        Ok(match self {
            Self::Lora(factors) => low_rank::forward(x, factors, None)?,
            Self::Loha(factors) => loha::forward(x, factors)?,
            Self::Lokr(factors) => lokr::forward(x, factors)?,
            Self::Dora(dora) => {
                let product = site.product.ok_or_else(unsettled)?;
                dora::forward(x, product, &dora.factors, &dora.lengths(site.weight)?)?
            }
        })
    }

    /// The gradients of [`Delta::forward`] for `dy` [.., out].
    pub fn backward(&self, x: &Tensor, dy: &Tensor, site: Site) -> Result<Backward> {
        match self {
            Self::Lora(factors) => {
                let low_rank::Gradients { dx, factors } = low_rank::backward(x, dy, factors, None)?;
                let gradients = factors.into_iter().flat_map(|f| [(A, f.da), (B, f.db)]).collect();
                Ok(Backward { dx, d_product: None, gradients })
            }
            Self::Loha(factors) => {
                let loha::Gradients { dx, factors: [w1_a, w1_b, w2_a, w2_b] } =
                    loha::backward(x, dy, factors)?;
                let gradients =
                    vec![("hada_w1_a", w1_a), ("hada_w1_b", w1_b), ("hada_w2_a", w2_a), ("hada_w2_b", w2_b)];
                Ok(Backward { dx, d_product: None, gradients })
            }
            Self::Lokr(factors) => {
                let lokr::Gradients { dx, w1, w2 } = lokr::backward(x, dy, factors)?;
                let halves = [half_tensors(&w1, W1), half_tensors(&w2, W2)].concat();
                let gradients = halves.into_iter().map(|(name, t)| (name, t.clone())).collect();
                Ok(Backward { dx, d_product: None, gradients })
            }
            Self::Dora(dora) => {
                let product = site.product.ok_or_else(unsettled)?;
                let lengths = dora.lengths(site.weight)?;
                let dora::Gradients { dx, d_plain, factors, d_magnitude } =
                    dora::backward(x, product, dy, &dora.factors, &lengths)?;
                let gradients = vec![(A, factors.da), (B, factors.db), (MAGNITUDE, d_magnitude)];
                Ok(Backward { dx, d_product: Some(d_plain), gradients })
            }
        }
    }
}

/// Suffixes of the names after the module's.
const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";
const MAGNITUDE: &str = "magnitude";
const W1: [&str; 3] = ["lokr_w1", "lokr_w1_a", "lokr_w1_b"];
const W2: [&str; 3] = ["lokr_w2", "lokr_w2_a", "lokr_w2_b"];

fn unsettled() -> Error {
    Error::Mismatch(
        "a DoRA was used before its layer's weight was loaded; this is a bug, please report it".into(),
    )
}

impl Dora {
    fn lengths(&self, weight: &Weight) -> Result<dora::Lengths> {
        let merged = self.magnitude.as_ref().and_then(Magnitude::of_merged);
        let (Some(magnitude), Some(squares)) = (merged, &self.squares) else { return Err(unsettled()) };
        let norm = dora::merged_norm(weight, squares, &self.factors)?;
        Ok(dora::Lengths { magnitude: magnitude.clone(), norm, strength: self.strength })
    }
}

//! The change of one weight by an adapter, as in files: whole, on the CPU, in f32.

use kernels::{D, DType, Tensor, loha, lokr};

use super::AdapterKind;
use crate::{Error, Result};

/// A change of the weight of one module.
#[derive(Debug, Clone)]
pub enum Change {
    /// Two low-rank factors.
    Lora(LoraPair),
    /// Two low-rank factors, and a magnitude for each row.
    Dora(DoraPair),
    /// Two pairs of low-rank factors, their products multiplied elementwise.
    Loha(loha::Factors),
    /// Two matrices, their Kronecker product.
    Lokr(lokr::Factors),
}

/// The factors of one module, f32 on the CPU.
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// Down factor A [rank, in].
    pub a: Tensor,
    /// Up factor B [out, rank].
    pub b: Tensor,
    /// The delta is alpha / rank * B A; `None` means alpha = rank, so a scale of 1.
    pub alpha: Option<f32>,
}

/// A pair whose rows are scaled to trained lengths: W' = m (W + s B A) / n.
#[derive(Debug, Clone)]
pub struct DoraPair {
    /// The factors.
    pub pair: LoraPair,
    /// m, and the convention for n.
    pub magnitude: Magnitude,
}

/// The magnitudes m of a DoRA, `[out]` f32. Programs differ in the length n that they divide by, and so in the meaning of m;
/// converting between them needs the base weight.
#[derive(Debug, Clone)]
pub enum Magnitude {
    /// n is the length of a row of W + s B A: the authors' convention, and PEFT's (`lora_magnitude_vector`).
    OfMerged(Tensor),
    /// n is the length of a row of W: ComfyUI's (`dora_scale`, comfy/weight_adapter/base.py `weight_decompose`).
    OfBase(Tensor),
    /// Both, for the same change.
    Both {
        /// As of [`Magnitude::OfMerged`].
        merged: Tensor,
        /// As of [`Magnitude::OfBase`].
        base: Tensor,
    },
}

impl LoraPair {
    /// The factors of a delta `scale` * B A, for any rule of the scale (alpha / rank, or rsLoRA's alpha / sqrt(rank)): files have
    /// only alpha / rank, so alpha becomes `scale` * rank.
    pub fn new(a: Tensor, b: Tensor, scale: f64) -> Result<Self> {
        let rank = a.dim(0)?;
        Ok(Self { a, b, alpha: Some((scale * rank as f64) as f32) })
    }

    /// The rank of the factors.
    pub fn rank(&self) -> usize {
        self.a.dims().first().copied().unwrap_or(0)
    }

    /// The scale of B A: alpha / rank.
    pub fn scale(&self) -> f64 {
        self.alpha.map_or(1.0, |alpha| f64::from(alpha) / self.rank() as f64)
    }

    fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { a: f(&self.a)?, b: f(&self.b)?, alpha: self.alpha })
    }

    /// The delta of its module's weight: alpha / rank * B A, [out, in], f32.
    pub fn delta(&self) -> Result<Tensor> {
        Ok((self.b.matmul(&self.a)? * self.scale())?)
    }
}

impl From<LoraPair> for Change {
    fn from(pair: LoraPair) -> Self {
        Self::Lora(pair)
    }
}

impl Change {
    /// Its kind.
    pub fn kind(&self) -> AdapterKind {
        match self {
            Self::Lora(_) => AdapterKind::Lora,
            Self::Dora(_) => AdapterKind::Dora,
            Self::Loha(_) => AdapterKind::Loha,
            Self::Lokr(_) => AdapterKind::Lokr,
        }
    }

    /// The factors of a LoRA or a DoRA.
    pub fn pair(&self) -> Option<&LoraPair> {
        match self {
            Self::Lora(pair) | Self::Dora(DoraPair { pair, .. }) => Some(pair),
            Self::Loha(_) | Self::Lokr(_) => None,
        }
    }

    /// The rank of its factors; `None` for a LoKr without low-rank factors.
    pub fn rank(&self) -> Option<usize> {
        let of_half = |half: &lokr::Half| match half {
            lokr::Half::Low(a, _) => a.dims().last().copied(),
            lokr::Half::Full(_) => None,
        };
        match self {
            Self::Lora(pair) | Self::Dora(DoraPair { pair, .. }) => Some(pair.rank()),
            Self::Loha(factors) => factors.w1_b.dims().first().copied(),
            Self::Lokr(factors) => of_half(&factors.w2).or(of_half(&factors.w1)),
        }
    }

    /// What the product of its factors is multiplied by.
    pub fn scale(&self) -> f64 {
        match self {
            Self::Lora(pair) | Self::Dora(DoraPair { pair, .. }) => pair.scale(),
            Self::Loha(factors) => factors.scale,
            Self::Lokr(factors) => factors.scale,
        }
    }

    /// (out, in) of the weight that it changes; a convolution's axes after the first count as one.
    pub fn dims(&self) -> Result<(usize, usize)> {
        Ok(match self {
            Self::Lora(pair) | Self::Dora(DoraPair { pair, .. }) => (pair.b.dim(0)?, pair.a.dim(1)?),
            Self::Loha(factors) => (factors.w1_a.dim(0)?, factors.w1_b.dim(1)?),
            Self::Lokr(factors) => factors.dims()?,
        })
    }

    /// Its tensors, by the suffix of their keys.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::Lora(pair) => vec![("lora_A", &pair.a), ("lora_B", &pair.b)],
            Self::Dora(DoraPair { pair, magnitude }) => {
                vec![("lora_A", &pair.a), ("lora_B", &pair.b), ("magnitude", magnitude.any())]
            }
            Self::Loha(f) => {
                vec![
                    ("hada_w1_a", &f.w1_a),
                    ("hada_w1_b", &f.w1_b),
                    ("hada_w2_a", &f.w2_a),
                    ("hada_w2_b", &f.w2_b),
                ]
            }
            Self::Lokr(f) => [
                half_tensors(&f.w1, ["lokr_w1", "lokr_w1_a", "lokr_w1_b"]),
                half_tensors(&f.w2, ["lokr_w2", "lokr_w2_a", "lokr_w2_b"]),
            ]
            .concat(),
        }
    }

    /// The same with its effect multiplied by `strength`; `None` for a DoRA, which is not additive.
    pub fn scaled(&self, strength: f64) -> Option<Self> {
        match self {
            Self::Lora(pair) => {
                let alpha = Some((pair.scale() * strength * pair.rank() as f64) as f32);
                Some(Self::Lora(LoraPair { alpha, ..pair.clone() }))
            }
            Self::Dora(_) => None,
            Self::Loha(f) => Some(Self::Loha(loha::Factors { scale: f.scale * strength, ..f.clone() })),
            Self::Lokr(f) => Some(Self::Lokr(lokr::Factors { scale: f.scale * strength, ..f.clone() })),
        }
    }

    /// The same with every tensor mapped by `f`.
    pub fn map(&self, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let half = |half: &lokr::Half, f: &mut dyn FnMut(&Tensor) -> Result<Tensor>| match half {
            lokr::Half::Full(w) => Ok::<_, Error>(lokr::Half::Full(f(w)?)),
            lokr::Half::Low(a, b) => Ok(lokr::Half::Low(f(a)?, f(b)?)),
        };
        Ok(match self {
            Self::Lora(pair) => Self::Lora(pair.map(f)?),
            Self::Dora(DoraPair { pair, magnitude }) => {
                let pair = pair.map(f)?;
                let magnitude = match magnitude {
                    Magnitude::OfMerged(m) => Magnitude::OfMerged(f(m)?),
                    Magnitude::OfBase(m) => Magnitude::OfBase(f(m)?),
                    Magnitude::Both { merged, base } => {
                        Magnitude::Both { merged: f(merged)?, base: f(base)? }
                    }
                };
                Self::Dora(DoraPair { pair, magnitude })
            }
            Self::Loha(loha::Factors { w1_a, w1_b, w2_a, w2_b, scale }) => Self::Loha(loha::Factors {
                w1_a: f(w1_a)?,
                w1_b: f(w1_b)?,
                w2_a: f(w2_a)?,
                w2_b: f(w2_b)?,
                scale: *scale,
            }),
            Self::Lokr(lokr::Factors { w1, w2, scale }) => {
                Self::Lokr(lokr::Factors { w1: half(w1, f)?, w2: half(w2, f)?, scale: *scale })
            }
        })
    }

    /// The delta of the weight, [out, in] f32; `None` for a DoRA, whose delta depends on the weight.
    pub fn delta(&self) -> Result<Option<Tensor>> {
        Ok(match self {
            Self::Lora(pair) => Some(pair.delta()?),
            Self::Dora(_) => None,
            Self::Loha(factors) => Some(factors.delta(DType::F32)?),
            Self::Lokr(factors) => Some(factors.delta()?),
        })
    }

    /// `weight`, f32, of any shape with `out` first, with `strength` of the change in it.
    ///
    /// # Errors
    /// If the weight has other widths.
    pub fn merged(&self, weight: &Tensor, strength: f64) -> Result<Tensor> {
        let matrix = weight.flatten_from(1)?;
        let dims = self.dims()?;
        if matrix.dims2()? != dims {
            let shape = matrix.dims();
            return Err(Error::Mismatch(format!(
                "a change of a {dims:?} weight cannot go into one of {shape:?}"
            )));
        }
        let delta = match self {
            Self::Dora(dora) => dora.delta(&matrix)?,
            // Only a DoRA depends on the weight.
            other => other.delta()?.unwrap_or(matrix.zeros_like()?),
        };
        let delta = delta.to_device(weight.device())?;
        Ok((matrix + (delta * strength)?)?.reshape(weight.shape())?)
    }
}

impl Magnitude {
    /// One of them, for what they have in common: shape, device.
    pub fn any(&self) -> &Tensor {
        match self {
            Self::OfMerged(m) | Self::OfBase(m) | Self::Both { merged: m, .. } => m,
        }
    }

    /// By the convention of [`Magnitude::OfMerged`].
    pub fn of_merged(&self) -> Option<&Tensor> {
        match self {
            Self::OfMerged(m) | Self::Both { merged: m, .. } => Some(m),
            Self::OfBase(_) => None,
        }
    }

    /// By the convention of [`Magnitude::OfBase`].
    pub fn of_base(&self) -> Option<&Tensor> {
        match self {
            Self::OfBase(m) | Self::Both { base: m, .. } => Some(m),
            Self::OfMerged(_) => None,
        }
    }
}

impl DoraPair {
    /// The delta of `weight` [out, in] f32.
    fn delta(&self, weight: &Tensor) -> Result<Tensor> {
        let merged = (weight + self.pair.delta()?.to_device(weight.device())?)?;
        let (magnitude, divided) = match &self.magnitude {
            Magnitude::OfMerged(m) | Magnitude::Both { merged: m, .. } => (m, &merged),
            Magnitude::OfBase(m) => (m, weight),
        };
        let factor = magnitude.to_device(weight.device())?.div(&lengths(divided)?)?;
        Ok((merged.broadcast_mul(&factor.unsqueeze(1)?)? - weight)?)
    }

    /// The same with both magnitudes known, for `weight` [out, in] f32.
    pub fn with_base(self, weight: &Tensor) -> Result<Self> {
        let merged = lengths(&(weight + self.pair.delta()?)?)?;
        let to_base = lengths(weight)?.div(&merged)?;
        let magnitude = match self.magnitude {
            Magnitude::OfMerged(m) => Magnitude::Both { base: (&m * to_base)?, merged: m },
            Magnitude::OfBase(m) => Magnitude::Both { merged: m.div(&to_base)?, base: m },
            both => both,
        };
        Ok(Self { magnitude, ..self })
    }
}

/// The tensors of one side of a LoKr, by the names of the full matrix, of a and of b.
pub(super) fn half_tensors<'a>(
    half: &'a lokr::Half,
    [whole, a, b]: [&'static str; 3],
) -> Vec<(&'static str, &'a Tensor)> {
    match half {
        lokr::Half::Full(w) => vec![(whole, w)],
        lokr::Half::Low(first, second) => vec![(a, first), (b, second)],
    }
}

/// The length of each row of a matrix; the smallest normal number for a row of zeros, to divide by.
fn lengths(matrix: &Tensor) -> Result<Tensor> {
    Ok(matrix.sqr()?.sum(D::Minus1)?.sqrt()?.maximum(f64::from(f32::MIN_POSITIVE))?)
}

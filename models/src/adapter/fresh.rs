//! Initial adapters: without effect, or from a file.

use std::collections::BTreeMap;

use kernels::low_rank::Factors;
use kernels::random::Key;
use kernels::{DType, Device, Tensor, loha, lokr};

use super::decompose::{Rank, Reduced, resize};
use super::files::{AdapterFile, AdapterSummary};
use super::{LoraConfig, Target};
use crate::delta::{Adapter, AdapterKind, Adapters, Change, Delta, DoraPair, LoraPair};
use crate::dit::DitConfig;
use crate::{Error, Result};

/// The seed of the random sketches that resize factors to another rank.
const SKETCH: u64 = 1;

impl Adapters {
    /// Fresh trainable adapters for `targets`, which leave the model unchanged. Each is a function of `seed` and the module's
    /// name.
    ///
    /// LoRA and DoRA: A uniform in ±1/sqrt(in) (Kaiming with a = sqrt 5, as PEFT and kohya start it), B zero. LoHa: w1_a
    /// normal with deviation 0.1, w1_b and w2_b with 1, w2_a zero. LoKr: w1 and w2_a as A, w2_b (or w2) zero. The last two
    /// are LyCORIS's rules.
    pub fn fresh(targets: &[Target], config: &LoraConfig, seed: u64, device: &Device) -> Result<Self> {
        let mut adapters = Self::default();
        for target in targets {
            // Shadows have no numbers to generate on the host.
            let maker = if device.is_shadow() { device } else { &Device::Cpu };
            let delta = fresh(target, config, seed, maker)?.to_device(device)?;
            adapters.attach(target.module.clone(), Adapter::trainable(delta));
        }
        Ok(adapters)
    }

    /// Trainable adapters for `targets` that start from `file`, and a description of what was done, in lines. Factors of another
    /// rank are resized to that of `config`; modules that the file lacks start fresh.
    ///
    /// # Errors
    /// If a module has another width or is not a target, a kind cannot be converted to that of `config`, or the file has
    /// differences of whole tensors.
    pub fn begun(
        targets: &[Target],
        config: &LoraConfig,
        file: &AdapterFile,
        seed: u64,
        device: &Device,
    ) -> Result<(Self, Vec<String>)> {
        if let Some(name) = file.differences.keys().next() {
            return Err(whole(name));
        }
        let (mut adapters, mut outcome) = (Self::default(), Outcome::default());
        for target in targets {
            let new = fresh(target, config, seed, &Device::Cpu)?;
            let delta = match file.modules.get(&target.module) {
                Some(change) => begun(change, target, config, new, &mut outcome)?,
                None => {
                    outcome.fresh += 1;
                    new
                }
            };
            adapters.attach(target.module.clone(), Adapter::trainable(delta.to_device(device)?));
        }
        let wanted: std::collections::BTreeSet<&str> = targets.iter().map(|t| t.module.as_str()).collect();
        for module in file.modules.keys().filter(|module| !wanted.contains(module.as_str())) {
            if module.contains("_img") {
                outcome.left_out.push(module.clone());
                continue;
            }
            return Err(beyond(module));
        }
        Ok((adapters, outcome.lines()))
    }
}

/// Checks that adapters for `targets` of a model of the sizes `dit` can start from a file, as far as its header shows.
///
/// # Errors
/// Those of [`Adapters::begun`], and modules of the image branch that the model has and `targets` does not name.
pub fn check_beginning(
    targets: &[Target],
    config: &LoraConfig,
    dit: &DitConfig,
    file: &AdapterSummary,
) -> Result<()> {
    for (module, held) in &file.modules {
        let Some(kind) = held.kind else { return Err(whole(module)) };
        match targets.iter().find(|target| target.module == *module) {
            None if module.contains("_img") && dit.image.is_none() => {}
            None => return Err(beyond(module)),
            Some(target) => {
                check_width(target, (held.output, held.input))?;
                if !can_become(kind, config.kind) {
                    return Err(kinds(&config.of(module), kind, Some(held.rank), module));
                }
            }
        }
    }
    Ok(())
}

/// Whether an adapter of the kind `held` can be converted to `new`; for LoHa and LoKr the shapes matter too.
fn can_become(held: AdapterKind, new: AdapterKind) -> bool {
    match new {
        AdapterKind::Lora => held != AdapterKind::Dora,
        AdapterKind::Dora => matches!(held, AdapterKind::Lora | AdapterKind::Dora),
        AdapterKind::Loha | AdapterKind::Lokr => held == new,
    }
}

fn check_width(target: &Target, (out, input): (usize, usize)) -> Result<()> {
    if (out, input) == (target.out, target.input) {
        return Ok(());
    }
    Err(Error::Mismatch(format!(
        "the adapter to begin from has {} as {out} x {input}, the model as {} x {}; it was made for another model",
        target.module, target.out, target.input
    )))
}

fn whole(tensor: &str) -> Error {
    Error::Mismatch(format!(
        "the adapter to begin from adds a whole tensor to {tensor}, which cannot be trained; merge it into the base with \
         `tandem merge` and begin from there"
    ))
}

fn beyond(module: &str) -> Error {
    Error::Mismatch(format!(
        "the adapter to begin from has {module}, which adapter.targets does not name; add it there, so that it is not lost"
    ))
}

/// What was done with the modules of a file.
#[derive(Default)]
struct Outcome {
    begun: usize,
    fresh: usize,
    /// How many modules came from each rank to each other one, which the recipe names.
    ranks: BTreeMap<[usize; 2], usize>,
    /// The fraction of the energy that each one of reduced rank keeps.
    kept: Vec<f64>,
    left_out: Vec<String>,
}

impl Outcome {
    fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("{} modules begin with the file's factors", self.begun)];
        for ([old, rank], count) in self.ranks.iter().filter(|([old, rank], _)| old != rank) {
            let how = if old < rank { "by fresh rows that do nothing yet" } else { "by singular values" };
            lines.push(format!("{count} of them come from rank {old} to rank {rank} {how}"));
        }
        if !self.kept.is_empty() {
            let mean = self.kept.iter().sum::<f64>() / self.kept.len() as f64;
            let least = self.kept.iter().copied().fold(1.0, f64::min);
            lines.push(format!(
                "the shortened ones keep {mean:.4} of their energy on average, {least:.4} at least"
            ));
        }
        if self.fresh > 0 {
            lines.push(format!("{} modules are not in the file and begin fresh", self.fresh));
        }
        if !self.left_out.is_empty() {
            lines.push(format!(
                "left out, since this model has no image branch: {}",
                self.left_out.join(", ")
            ));
        }
        lines
    }
}

/// The adapter of `target` that starts as `change`; `new` is a fresh one of the kind to convert to.
fn begun(
    change: &Change,
    target: &Target,
    config: &LoraConfig,
    new: Delta,
    outcome: &mut Outcome,
) -> Result<Delta> {
    let config = &config.of(&target.module);
    check_width(target, change.dims()?)?;
    let refused = || kinds(config, change.kind(), change.rank(), &target.module);
    let scale = config.scale();
    outcome.begun += 1;
    let mut thin = |pair: &LoraPair, fresh: &Factors, may_shrink: bool| -> Result<Factors> {
        let (old, rank) = (pair.rank(), config.rank());
        *outcome.ranks.entry([old, rank]).or_default() += 1;
        if old > rank && !may_shrink {
            return Err(Error::Mismatch(format!(
                "the DoRA to begin from has rank {old}, and its lengths hold for that: set adapter.rank = {old}"
            )));
        }
        if old > rank {
            let Reduced { pair, energy } = resize(&Change::Lora(pair.clone()), Rank::Fixed(rank), SKETCH)?;
            outcome.kept.push(energy);
            return grown(&pair, fresh, rank, scale);
        }
        grown(pair, fresh, rank, scale)
    };
    match (new, change) {
        (Delta::Lora(fresh), Change::Lora(pair)) => Ok(thin(pair, &fresh, true)?.into()),
        (Delta::Lora(fresh), Change::Loha(_) | Change::Lokr(_)) => {
            let Reduced { pair, energy } = resize(change, Rank::Fixed(config.rank()), SKETCH)?;
            outcome.kept.push(energy);
            Ok(grown(&pair, &fresh, config.rank(), scale)?.into())
        }
        (new @ Delta::Dora(_), Change::Lora(pair)) => {
            let fresh = new.factors().ok_or_else(refused)?;
            Ok(Delta::fresh_dora(thin(pair, fresh, true)?))
        }
        (new @ Delta::Dora(_), Change::Dora(DoraPair { pair, magnitude })) => {
            let fresh = new.factors().ok_or_else(refused)?;
            let factors = thin(pair, fresh, false)?;
            let pair = LoraPair::new(factors.a, factors.b, factors.scale)?;
            Delta::new(&Change::Dora(DoraPair { pair, magnitude: magnitude.clone() }), 1.0)
        }
        (Delta::Loha(_), Change::Loha(f)) if change.rank() == Some(config.rank()) => {
            let w1_a = (&f.w1_a * (f.scale / scale))?;
            Ok(Delta::Loha(loha::Factors { w1_a, scale, ..f.clone() }))
        }
        (Delta::Lokr(like), Change::Lokr(f)) if shapes(&like) == shapes(f) => {
            let by = f.scale / like.scale;
            let w1 = match &f.w1 {
                lokr::Half::Full(w) => lokr::Half::Full((w * by)?),
                lokr::Half::Low(a, b) => lokr::Half::Low((a * by)?, b.clone()),
            };
            Ok(Delta::Lokr(lokr::Factors { w1, w2: f.w2.clone(), scale: like.scale }))
        }
        _ => Err(refused()),
    }
}

fn kinds(config: &LoraConfig, held: AdapterKind, rank: Option<usize>, module: &str) -> Error {
    let rank = rank.map_or("no rank".to_owned(), |rank| format!("rank {rank}"));
    Error::Mismatch(format!(
        "the adapter to begin from has a {} ({rank}) on {module}, which cannot become a {} of rank {}: set adapter.kind, \
         rank and factor to the file's, or make a LoRA of it with `tandem resize`",
        held.name(),
        config.kind.name(),
        config.rank()
    ))
}

fn shapes(factors: &lokr::Factors) -> Vec<Vec<usize>> {
    Change::Lokr(factors.clone()).tensors().into_iter().map(|(_, t)| t.dims().to_vec()).collect()
}

/// The factors of `pair` extended to `rank` with rows and columns of `fresh`, which have no effect. Their scale becomes
/// `scale`.
fn grown(pair: &LoraPair, fresh: &Factors, rank: usize, scale: f64) -> Result<Factors> {
    let own = pair.rank();
    let b = (&pair.b * (pair.scale() / scale))?;
    if own >= rank {
        return Ok(Factors { a: pair.a.clone(), b, scale });
    }
    let a = Tensor::cat(&[&pair.a, &fresh.a.narrow(0, own, rank - own)?], 0)?;
    let b = Tensor::cat(&[&b, &fresh.b.narrow(1, own, rank - own)?], 1)?;
    Ok(Factors { a, b, scale })
}

/// A fresh adapter, on the CPU or a device of shadows.
fn fresh(target: &Target, config: &LoraConfig, seed: u64, device: &Device) -> Result<Delta> {
    let config = &config.of(&target.module);
    let (out, input, rank, scale) = (target.out, target.input, config.rank(), config.scale());
    let key = |part: &str| Key::new(seed, "adapter", &[]).child(&format!("{}{part}", target.module), 0);
    let zeros = |rows: usize, columns: usize| Tensor::zeros((rows, columns), DType::F32, device);
    let uniform = |part: &str, rows: usize, columns: usize| {
        let (key, bound) = (key(part), 1.0 / (columns as f64).sqrt());
        let numbers = (0..(rows * columns) as u64).map(|i| ((2.0 * key.uniform(i) - 1.0) * bound) as f32);
        Tensor::from_fn((rows, columns), device, || numbers.collect())
    };
    let normal = |part: &str, rows: usize, columns: usize, deviation: f64| {
        Tensor::from_fn((rows, columns), device, || key(part).normals(rows * columns))? * deviation
    };
    Ok(match config.kind {
        AdapterKind::Lora => Factors { a: uniform("", rank, input)?, b: zeros(out, rank)?, scale }.into(),
        AdapterKind::Dora => {
            Delta::fresh_dora(Factors { a: uniform("", rank, input)?, b: zeros(out, rank)?, scale })
        }
        AdapterKind::Loha => Delta::Loha(loha::Factors {
            w1_a: normal(".w1_a", out, rank, 0.1)?,
            w1_b: normal(".w1_b", rank, input, 1.0)?,
            w2_a: zeros(out, rank)?,
            w2_b: normal(".w2_b", rank, input, 1.0)?,
            scale,
        }),
        AdapterKind::Lokr => {
            let ((o1, o2), (i1, i2)) = (config.split(out), config.split(input));
            let w1 = lokr::Half::Full(uniform(".w1", o1, i1)?);
            match config.is_thin(o2, i2) {
                true => {
                    let w2 = lokr::Half::Low(uniform(".w2_a", o2, rank)?, zeros(rank, i2)?);
                    Delta::Lokr(lokr::Factors { w1, w2, scale })
                }
                // Without low-rank factors there is no rank to divide alpha by.
                false => Delta::Lokr(lokr::Factors { w1, w2: lokr::Half::Full(zeros(o2, i2)?), scale: 1.0 }),
            }
        }
    })
}

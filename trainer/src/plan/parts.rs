//! Parts of a plan that depend on which networks the model has: clips and their adapters, noise levels, pictures.

use std::path::{Path, PathBuf};

use data::{Dataset, LossMasks, Order};
use kernels::loss::Reduction;
use models::adapter::{LoraConfig, Target};
use models::dit::{DitConfig, Pictures};
use models::expert::Expert;
use models::published::Defaults;

use super::work::Work;
use super::{ClipAdapterPlan, SamplePlan};
use crate::adapters::{self, INIT_FROM, INIT_FROM_HIGH, INIT_FROM_LOW};
use crate::base::{BaseModel, Trained};
use crate::encode::prompt::ClipRequest;
use crate::error::{Error, Result};
use crate::learning::optim::{NormLimit, OptimizerConfig};
use crate::learning::{NoiseRange, mask, patterns};
use crate::machine::forecast::{Decoding, LossTask, Masks, Networks, Task};
use crate::machine::memory::Shapes;
use crate::paths::existing;
use crate::recipe::TrainConfig;
use crate::sample::magcache::{CacheConfig, Skips, Table};
use crate::sample::{PreviewPlan, SampleConfig};
use crate::solver::SolverKind;

/// The clips of `sample`, as it asks for them and without its preset, for a model of which nothing else says size, frames and seed.
pub(super) fn requests(
    sample: &SampleConfig,
    from: &Path,
    (dit, defaults): (&DitConfig, &Defaults),
    (size, frames, seed): ([u32; 2], u32, u64),
) -> Result<[Vec<ClipRequest>; 2]> {
    let of = |sample: &SampleConfig| {
        sample.requests(&sample.request(defaults, size, frames, seed), from, dit, defaults)
    };
    Ok([of(sample)?, of(&SampleConfig { preset: None, ..sample.clone() })?])
}

/// The clips with the adapters for them alone, looked at by their headers.
pub(super) fn sample_plan(
    sample: SampleConfig,
    [clips, full]: [Vec<ClipRequest>; 2],
    (model, dit): (&BaseModel, &DitConfig),
    from: &Path,
) -> Result<SamplePlan> {
    let refuse = |key: &str, why: &str| Err(Error::Setting { key: key.into(), why: why.into() });
    check_preset(&sample, model)?;
    let SampleConfig { every, formats, strength, .. } = sample;
    if !strength.is_finite() {
        return refuse("sample.strength", "must be a finite number");
    }
    let of = |key: &str, path: &Option<PathBuf>, expert: Option<Expert>| -> Result<_> {
        let Some(path) = path else { return Ok(None) };
        let path = existing(key, from, path)?;
        adapters::check_widths(key, &path, dit)?;
        adapters::check_expert(key, &path, expert)?;
        Ok(Some(ClipAdapterPlan { path, strength }))
    };
    let has_own = sample.adapter_high.is_some() || sample.adapter_low.is_some();
    if has_own && model.dits.experts().is_none() {
        let why = "this model is one network; name the adapter with sample.adapter";
        return refuse("sample.adapter_high / adapter_low", why);
    }
    let adapter = of("sample.adapter", &sample.adapter, None)?;
    if let (Some(all), Some(_)) = (&adapter, model.dits.experts()) {
        let path = [all.path.to_string_lossy().into_owned()];
        for expert in Expert::ALL {
            adapters::check_experts("sample.adapter", &path, expert, "sample.adapter_EXPERT")?;
        }
    }
    let cache_table = match (&sample.cache, &sample.cache_table) {
        (None, Some(_)) => return refuse("sample.cache_table", "is for sample.cache, which is not set"),
        (Some(_), Some(path)) => Some(existing("sample.cache_table", from, path)?),
        (_, None) => None,
    };
    check_cache(&sample.cache, cache_table.as_deref(), (model, dit), &clips)?;
    let decoder = sample.tiny_decoder.as_deref();
    let decoder = decoder.map(|path| existing("sample.tiny_decoder", from, path)).transpose()?;
    let keys = ["sample.preview_every", "sample.tiny_decoder"];
    let preview = PreviewPlan::settle(keys, sample.preview_every, decoder, dit)?;
    let full_clips = if sample.full_every > 0 { full } else { Vec::new() };
    Ok(SamplePlan {
        full_every: sample.full_every,
        full_clips,
        cache: sample.cache,
        cache_table,
        layout: sample.layout,
        preview,
        adapter,
        adapter_high: of("sample.adapter_high", &sample.adapter_high, Some(Expert::High))?,
        adapter_low: of("sample.adapter_low", &sample.adapter_low, Some(Expert::Low))?,
        every,
        formats,
        clips,
    })
}

/// Checks that a preset has the adapters that it is for, and nothing set beside it that it sets.
fn check_preset(sample: &SampleConfig, model: &BaseModel) -> Result<()> {
    let refuse = |key: &str, why: String| Err(Error::Setting { key: key.into(), why });
    let Some(preset) = sample.preset else {
        return match sample.full_every {
            0 => Ok(()),
            _ => refuse("sample.full_every", "is for sample.preset, which is not set".into()),
        };
    };
    let SampleConfig { steps, guidance, guidance_high, shift, solver, .. } = sample;
    let is_set = steps.is_some() || guidance.is_some() || guidance_high.is_some() || shift.is_some();
    if is_set || solver.is_some_and(|solver| solver != SolverKind::default()) {
        let why = "sets steps, shift, guidance and solver; leave them out, or the preset";
        return refuse("sample.preset", why.into());
    }
    let has_experts = model.dits.experts().is_some();
    if preset.is_for_experts() != has_experts {
        let of = |experts: bool| if experts { "two experts" } else { "one network" };
        let why = format!("is for a model of {}, and this one has {}", of(!has_experts), of(has_experts));
        return refuse("sample.preset", why);
    }
    let named = [&sample.adapter_high, &sample.adapter_low].into_iter().all(Option::is_some);
    match if has_experts { named } else { sample.adapter.is_some() } {
        true => Ok(()),
        false => {
            let keys =
                if has_experts { "sample.adapter_high and sample.adapter_low" } else { "sample.adapter" };
            let files = preset.adapters();
            refuse(
                "sample.preset",
                format!("needs its distilled adapter, or clips are noise: name it with {keys} ({files})"),
            )
        }
    }
}

/// Checks MagCache's rule, and that the table that is named fits the clips.
fn check_cache(
    cache: &Option<CacheConfig>,
    table: Option<&Path>,
    (model, dit): (&BaseModel, &DitConfig),
    clips: &[ClipRequest],
) -> Result<()> {
    let Some(cache) = cache else { return Ok(()) };
    let settings = cache.settle("sample.cache")?;
    if let Some(path) = table {
        let table = Table::read(path)?;
        Skips::planned(settings, (&table, path.display().to_string()), clips, model.clip_boundary(dit))?;
    }
    Ok(())
}

/// Puts steps in place of `train.epochs`: as many as show every clip of `dataset` that often. What there is to note of the rates of so
/// many steps.
///
/// # Errors
/// No epochs at all, more steps than can be counted, and fewer than the learning rate's schedule takes.
pub(super) fn settle_steps(
    train: &mut TrainConfig,
    optimizer: &OptimizerConfig,
    dataset: &Dataset,
    seed: u64,
) -> Result<Option<String>> {
    if let Some(epochs) = train.epochs.take() {
        train.steps = steps_of(epochs, train, dataset, seed)?;
    }
    let rates = optimizer.rates(train.steps);
    rates.check().map(|()| rates.note())
}

/// The steps that show every clip of `dataset` `epochs` times.
fn steps_of(epochs: u64, train: &TrainConfig, dataset: &Dataset, seed: u64) -> Result<u64> {
    let refuse = |why: &str| Err(Error::Setting { key: "train.epochs".into(), why: why.into() });
    let items = dataset.order_items(&dataset.split().0);
    match Order::new(items, seed, train.batch).batches_of(epochs) {
        Some(0) if epochs == 0 => refuse("must be at least 1"),
        Some(0) => refuse("how many steps an epoch has depends on the clips: give train.steps, or the clips"),
        Some(micro_batches) => Ok(micro_batches.div_ceil(train.accumulate as u64)),
        None => refuse("is more than can be counted"),
    }
}

/// Settles what `train` leaves to the model; the networks that are trained, of which every one can draw its noise levels and
/// begin from the adapter that it is to begin from.
pub(super) fn settle_ranges(
    train: &mut TrainConfig,
    adapter: &LoraConfig,
    targets: &[Target],
    (model, dit): (&BaseModel, &DitConfig),
) -> Result<Vec<NoiseRange>> {
    if !train.timesteps.is_by_size() {
        train.timesteps.shift = Some(train.timesteps.shift());
    }
    train.picture_share = picture_share(train.picture_share, dit)?;
    train.drop = train.drop.settled(dit.kind.facts())?;
    train.high_share = high_share(train, model)?;
    let ranges = trained_ranges(model, train.high_share);
    for range in &ranges {
        train.timesteps.within(*range)?;
    }
    adapters::start_on::check(adapter, &ranges, dit)?;
    for (key, path) in check_beginnings(adapter, &ranges)? {
        adapters::check_beginning(key, path, adapter, (targets, dit))?;
    }
    Ok(ranges)
}

/// The modules that get an adapter, of which every rank, alpha and learning rate by module names some.
///
/// # Errors
/// A pattern that names nothing, two that name one module, and learning rates that fit neither adapter nor model.
pub(super) fn targets(
    adapter: &LoraConfig,
    optimizer: &OptimizerConfig,
    (model, dit): (&BaseModel, &DitConfig),
) -> Result<Vec<Target>> {
    let targets = adapter.select(&dit.adaptable_modules())?;
    patterns::check("adapter.rank_by_module", adapter.rank_by_module.keys(), &targets, "rank")?;
    patterns::check("adapter.alpha_by_module", adapter.alpha_by_module.keys(), &targets, "alpha")?;
    let trained = if model.expert.is_some() { model.trained_experts() } else { &[] };
    optimizer.check_groups(adapter.kind, &targets, trained)?;
    Ok(targets)
}

/// A step of the largest bucket that there is, else of the largest that there could be.
pub(super) fn task<'a>(
    (model, dit): (&BaseModel, &DitConfig),
    (adapter, targets): (&LoraConfig, &'a [Target]),
    (train, optimizer, work): (&TrainConfig, &OptimizerConfig, &Work),
    (shapes, masks): (&Shapes, Option<&LossMasks>),
    (networks, replicas): (Networks, usize),
) -> Task<'a> {
    let objective = LossTask {
        penalty: train.loss.penalty(),
        reduction: masks.map_or_else(Reduction::default, mask::reduction),
        masks: masks.map_or(Masks::None, |_| Masks::Given),
        of_base: work.of_base,
        guides: work.guides,
    };
    Task {
        dit: dit.into(),
        base: model.precision.dit(),
        targets,
        kind: adapter.kind,
        factor: adapter.factor,
        rank: adapter.rank(),
        ranks: adapter.rank_by_module.clone(),
        dropout: adapter.dropout > 0.0,
        batch: train.batch,
        accumulate: work.micro_batches,
        small: work.small,
        replicas,
        latents: shapes.there.first().or(shapes.possible.first()).map_or((1, 1, 1), |shape| shape.1),
        continues: false,
        networks,
        decoding: Decoding::Beside,
        rule: optimizer.rule(),
        ema: train.ema,
        norm_limit: optimizer.norm_limit.map(|most| NormLimit { most, scale: adapter.scale() }),
        objective,
    }
}

/// `train` as one of `replicas` sees it: with its share of the micro-batches of a step, rounded up.
///
/// # Errors
/// A replica that would have none.
pub(super) fn share_of_replica(train: &TrainConfig, replicas: usize) -> Result<TrainConfig> {
    if train.tokens_per_step.is_some() {
        return Ok(train.clone());
    }
    if train.accumulate < replicas {
        let why = format!(
            "{} micro-batch(es) of a step leave replicas without work: it counts those of all {replicas} replicas together, so \
             set it to at least {replicas}, or to a multiple for an even share",
            train.accumulate
        );
        return Err(Error::Setting { key: "train.accumulate".into(), why });
    }
    Ok(TrainConfig { accumulate: train.accumulate.div_ceil(replicas), ..train.clone() })
}

/// The networks that the memory must hold, as long as nothing says that they do not fit.
pub(super) fn networks(ranges: &[NoiseRange], model: &BaseModel, sample: &SamplePlan) -> Networks {
    match (ranges.len(), model.dits.experts()) {
        (2, _) => Networks::SideBySide,
        (_, Some(_)) if !sample.clips.is_empty() => Networks::MakesRoom,
        _ => Networks::One,
    }
}

/// The files to begin with, each with its key: every one is for a network that is trained.
///
/// # Errors
/// The key whose file has no use, or the file of the other expert.
fn check_beginnings<'a>(
    adapter: &'a LoraConfig,
    ranges: &[NoiseRange],
) -> Result<Vec<(&'static str, &'a Path)>> {
    let refuse = |key: &str, why: String| Err(Error::Setting { key: key.into(), why });
    let all = (INIT_FROM, &adapter.init_from);
    let high = (INIT_FROM_HIGH, &adapter.init_from_high);
    let low = (INIT_FROM_LOW, &adapter.init_from_low);
    for (expert, (key, path)) in Expert::ALL.into_iter().zip([high, low]) {
        let Some(path) = path else { continue };
        let is_trained = |expert: Option<Expert>| ranges.iter().any(|range| range.expert() == expert);
        match () {
            () if all.1.is_some() => {
                let why = "goes beside adapter.init_from, which is for every network; name a file for each expert, or one for all";
                return refuse(key, why.to_owned());
            }
            () if is_trained(None) => {
                return refuse(
                    key,
                    "this model is one network; name the file with adapter.init_from".to_owned(),
                );
            }
            () if !is_trained(Some(expert)) => {
                let why = format!(
                    "the expert for {expert} noise is not trained here (model.expert, train.high_share); train it, or leave \
                     the file out"
                );
                return refuse(key, why);
            }
            () => adapters::check_expert(key, path, Some(expert))?,
        }
    }
    if let (key, Some(path)) = all {
        for range in ranges {
            adapters::check_expert(key, path, range.expert())?;
        }
    }
    let files = [all, high, low].into_iter();
    Ok(files.filter_map(|(key, path)| Some((key, path.as_deref()?))).collect())
}

/// `train.high_share`, settled: nothing where not both experts are trained.
fn high_share(train: &TrainConfig, model: &BaseModel) -> Result<Option<f64>> {
    let refuse = |why: &str| Err(Error::Setting { key: "train.high_share".into(), why: why.into() });
    match (model.expert, train.high_share) {
        (Some(Trained::Both), Some(share)) if !(0.0..=1.0).contains(&share) => {
            refuse("must lie between 0 and 1")
        }
        (Some(Trained::Both), None) if train.timesteps.is_by_size() => {
            let name = train.timesteps.distribution.name();
            refuse(&format!("with {name} it depends on the size of each clip: set it"))
        }
        (Some(Trained::Both), asked) => {
            Ok(Some(asked.unwrap_or_else(|| train.timesteps.share_from(model.boundary.unwrap_or(0.0)))))
        }
        (_, Some(_)) => {
            refuse("belongs to model.expert = \"both\"; leave it out where one network is trained")
        }
        (_, None) => Ok(None),
    }
}

/// The networks that are trained, where the expert for high noise gets `high_share` of the micro-batches.
pub(super) fn trained_ranges(model: &BaseModel, high_share: Option<f64>) -> Vec<NoiseRange> {
    let Some(boundary) = model.boundary.filter(|_| model.expert.is_some()) else {
        return vec![NoiseRange::All];
    };
    let is_drawn = |expert: Expert| match (expert, high_share) {
        (Expert::High, Some(share)) => share > 0.0,
        (Expert::Low, Some(share)) => share < 1.0,
        (_, None) => true,
    };
    let trained = model.trained_experts().iter().copied().filter(|expert| is_drawn(*expert));
    trained.map(|expert| NoiseRange::Of { expert, boundary }).collect()
}

/// Share of samples that are shown their first frame where nobody says otherwise: the default of Wan 2.2's own helper,
/// wan/utils/utils.py `masks_like`.
const PICTURE_SHARE: f64 = 0.2;

/// `train.picture_share`, settled: nothing for models that do not take a picture in place of the first frame.
fn picture_share(asked: Option<f64>, dit: &DitConfig) -> Result<Option<f64>> {
    let refuse = |why: &str| Err(Error::Setting { key: "train.picture_share".into(), why: why.into() });
    match (dit.pictures(), asked) {
        (Pictures::InPlace, Some(share)) if !(0.0..=1.0).contains(&share) => {
            refuse("must lie between 0 and 1")
        }
        (Pictures::InPlace, asked) => Ok(Some(asked.unwrap_or(PICTURE_SHARE))),
        (_, Some(_)) => {
            refuse("belongs to TI2V-5B, which takes a picture or none; leave it out for this model")
        }
        (_, None) => Ok(None),
    }
}

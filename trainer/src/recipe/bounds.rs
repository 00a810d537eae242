//! Checks that the numbers of a recipe are within their bounds.

use super::Recipe;
use crate::bounds::*;
use crate::bytes::Bytes;
use crate::error::Result;

/// Checks the numbers of a recipe that do not depend on the model or the clips.
///
/// # Errors
/// The key of the first that is too large, and the bound.
pub fn check(recipe: &Recipe) -> Result<()> {
    let Recipe { adapter, train, optimizer, devices, memory, checkpoint, sample, .. } = recipe;
    let bytes = |bytes: Option<Bytes>| bytes.map_or(0, |bytes| bytes.0);
    let count = |count: Option<usize>| count.unwrap_or(0) as u64;
    let [width, height] = sample.size.unwrap_or([0, 0]).map(u64::from);
    let whole = [
        ("train.steps", train.steps, STEPS),
        ("train.epochs", train.epochs.unwrap_or(0), STEPS),
        ("train.batch", train.batch as u64, BATCH),
        ("train.accumulate", train.accumulate as u64, ACCUMULATE),
        ("train.tokens_per_step", train.tokens_per_step.unwrap_or(0), TOKENS),
        ("train.eval_every", train.eval_every, STEPS),
        ("adapter.rank", count(adapter.rank), RANK),
        ("adapter.factor", count(adapter.factor), RANK),
        ("optimizer.warmup", optimizer.warmup.unwrap_or(0), STEPS),
        ("optimizer.rate.cycles", optimizer.rate.cycles.unwrap_or(0), STEPS),
        ("optimizer.rate.timescale", optimizer.rate.timescale.unwrap_or(0), STEPS),
        ("devices.stages", devices.stages.len() as u64, STAGES),
        ("devices.replicas", devices.replicas.named() as u64, REPLICAS),
        ("devices.exchange_timeout", devices.exchange_timeout, SECONDS),
        ("devices.memory_limit", bytes(devices.memory_limit), MEMORY),
        ("memory.host_memory", bytes(memory.host_memory), MEMORY),
        ("memory.ffn_tokens", count(memory.ffn_tokens), TOKENS),
        ("checkpoint.every_steps", checkpoint.every_steps, STEPS),
        ("checkpoint.every_minutes", checkpoint.every_minutes, MINUTES),
        ("checkpoint.keep_last", checkpoint.keep_last as u64, KEEP_LAST),
        ("sample.every", sample.every, STEPS),
        ("sample.steps", count(sample.steps), SOLVER_STEPS),
        ("sample.preview_every", sample.preview_every as u64, SOLVER_STEPS),
        ("sample.size", width.max(height), SIDE),
        ("sample.frames", u64::from(sample.frames.unwrap_or(0)), FRAMES),
    ];
    let ranks = adapter.rank_by_module.values().map(|rank| ("adapter.rank_by_module", *rank as u64, RANK));
    for (key, value, most) in whole.into_iter().chain(ranks) {
        at_most(key, value, most)?;
    }
    let timesteps = &train.timesteps;
    let real = [
        ("adapter.alpha", adapter.alpha.unwrap_or(0.0)),
        ("optimizer.lr", optimizer.lr),
        ("optimizer.eps", optimizer.eps),
        ("optimizer.weight_decay", optimizer.weight_decay),
        ("optimizer.clip_norm", optimizer.clip_norm),
        ("optimizer.d0", optimizer.d0.unwrap_or(0.0)),
        ("optimizer.d_coef", optimizer.d_coef.unwrap_or(0.0)),
        ("optimizer.growth_rate", optimizer.growth_rate.unwrap_or(0.0)),
        ("optimizer.lr_b_ratio", optimizer.lr_b_ratio.unwrap_or(0.0)),
        ("optimizer.lr_high", optimizer.lr_high.unwrap_or(0.0)),
        ("optimizer.lr_low", optimizer.lr_low.unwrap_or(0.0)),
        ("optimizer.norm_limit", optimizer.norm_limit.unwrap_or(0.0)),
        ("optimizer.rate.power", optimizer.rate.power.unwrap_or(0.0)),
        ("train.timesteps.shift", timesteps.shift.unwrap_or(0.0)),
        ("train.timesteps.scale", timesteps.scale),
        ("train.timesteps.mean", timesteps.mean),
        ("train.timesteps.std", timesteps.std),
        ("train.timesteps.alpha", timesteps.alpha.unwrap_or(0.0)),
        ("train.timesteps.beta", timesteps.beta.unwrap_or(0.0)),
        ("train.loss.c", train.loss.c.unwrap_or(0.0)),
        ("train.timesteps.gamma", timesteps.gamma.unwrap_or(0.0)),
        ("sample.strength", sample.strength),
        ("sample.guidance", sample.guidance.unwrap_or(0.0)),
        ("sample.guidance_high", sample.guidance_high.unwrap_or(0.0)),
        ("sample.shift", sample.shift.unwrap_or(0.0)),
    ];
    let rates = optimizer.lr_by_module.values().map(|lr| ("optimizer.lr_by_module", *lr));
    let alphas = adapter.alpha_by_module.values().map(|alpha| ("adapter.alpha_by_module", *alpha));
    real.into_iter().chain(rates).chain(alphas).try_for_each(|(key, value)| near(key, value))
}

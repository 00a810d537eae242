//! Defaults of other trainers, by name: they replace Tandem's own defaults, so that the same data trains as it did there.
//! Settings of the recipe take precedence.

use serde::{Deserialize, Serialize};
use toml::Table;

/// A trainer whose defaults a recipe may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Like {
    /// kohya-ss/musubi-tuner.
    MusubiTuner,
    /// tdrussell/diffusion-pipe.
    DiffusionPipe,
    /// ostris/ai-toolkit.
    AiToolkit,
    /// modelscope/DiffSynth-Studio.
    DiffsynthStudio,
}

/// A default of a trainer: dotted key of a recipe, its value in TOML, and the file of that project which has it.
type Row = (&'static str, &'static str, &'static str);

/// kohya-ss/musubi-tuner. Its alpha is 1 unless set, so at rank 32 a change counts a 32nd. Versions before the folder
/// `training` have the same defaults in `hv_train_network.py`.
const MUSUBI: [Row; 13] = [
    ("adapter.alpha", "1.0", "src/musubi_tuner/training/parser_common.py, network_alpha"),
    ("train.caption_dropout", "0.0", "it has none"),
    ("train.timesteps.distribution", "\"shift\"", "docs/wan.md, timestep_sampling"),
    ("train.timesteps.shift", "3.0", "docs/wan.md, discrete_flow_shift"),
    ("train.timesteps.scale", "1.0", "src/musubi_tuner/training/parser_common.py, sigmoid_scale"),
    ("train.timesteps.weighting", "\"none\"", "src/musubi_tuner/training/parser_common.py, weighting_scheme"),
    ("optimizer.kind", "\"adamw-8bit\"", "docs/wan.md, optimizer_type"),
    ("optimizer.lr", "2e-4", "docs/wan.md, learning_rate"),
    ("optimizer.warmup", "0", "src/musubi_tuner/training/parser_common.py, lr_warmup_steps"),
    ("optimizer.betas", "[0.9, 0.999]", "bitsandbytes, AdamW8bit"),
    ("optimizer.eps", "1e-8", "bitsandbytes, AdamW8bit"),
    ("optimizer.weight_decay", "0.01", "bitsandbytes, AdamW8bit"),
    ("optimizer.clip_norm", "1.0", "src/musubi_tuner/training/parser_common.py, max_grad_norm"),
];

/// tdrussell/diffusion-pipe. Alpha is always the rank there (train.py), as here.
const DIFFUSION_PIPE: [Row; 14] = [
    ("train.caption_dropout", "0.0", "it has none for Wan"),
    (
        "train.timesteps.distribution",
        "\"logit-normal\"",
        "examples/main_example.toml, timestep_sample_method",
    ),
    ("train.timesteps.grid", "\"quantiles\"", "utils/common.py, get_t_distribution"),
    ("train.timesteps.mean", "0.0", "utils/common.py, get_t_distribution"),
    ("train.timesteps.std", "1.0", "utils/common.py, sigmoid_scale"),
    ("train.timesteps.shift", "1.0", "models/wan/wan.py, shift"),
    ("train.timesteps.weighting", "\"none\"", "models/base.py, get_loss_fn"),
    ("optimizer.lr", "2e-5", "examples/main_example.toml, lr"),
    ("optimizer.warmup", "100", "examples/main_example.toml, warmup_steps"),
    ("optimizer.rate.warmup_start", "0.01", "train.py, LinearLR with start_factor 1 / warmup_steps"),
    ("optimizer.betas", "[0.9, 0.99]", "examples/main_example.toml, betas"),
    ("optimizer.eps", "1e-8", "examples/main_example.toml, eps"),
    ("optimizer.weight_decay", "0.01", "examples/main_example.toml, weight_decay"),
    ("optimizer.clip_norm", "1.0", "examples/main_example.toml, gradient_clipping"),
];

/// ostris/ai-toolkit, as its Wan 2.1 example has it. Alpha is the rank in the files that it writes, as here.
const AI_TOOLKIT: [Row; 13] = [
    ("train.caption_dropout", "0.05", "config/examples/train_lora_wan21_14b_24gb.yaml, caption_dropout_rate"),
    (
        "train.timesteps.distribution",
        "\"sigmoid\"",
        "config/examples/train_lora_wan21_14b_24gb.yaml, timestep_type",
    ),
    ("train.timesteps.shift", "1.0", "toolkit/samplers/custom_flowmatch_sampler.py"),
    ("train.timesteps.scale", "1.0", "toolkit/samplers/custom_flowmatch_sampler.py"),
    ("train.timesteps.weighting", "\"none\"", "toolkit/config_modules.py, linear_timesteps"),
    ("train.ema.decay", "0.99", "config/examples/train_lora_wan21_14b_24gb.yaml, ema_decay"),
    ("optimizer.kind", "\"adamw-8bit\"", "config/examples/train_lora_wan21_14b_24gb.yaml, optimizer"),
    ("optimizer.lr", "1e-4", "config/examples/train_lora_wan21_14b_24gb.yaml, lr"),
    ("optimizer.warmup", "0", "toolkit/config_modules.py, lr_scheduler"),
    ("optimizer.betas", "[0.9, 0.999]", "bitsandbytes, AdamW8bit"),
    ("optimizer.eps", "1e-6", "toolkit/optimizer.py, adamw8bit"),
    ("optimizer.weight_decay", "1e-4", "config/examples/train_lora_wan21_14b_24gb.yaml, weight_decay"),
    ("optimizer.clip_norm", "1.0", "toolkit/config_modules.py, max_grad_norm"),
];

/// modelscope/DiffSynth-Studio. Alpha is the rank there (diffsynth/diffusion/training_module.py), as here.
const DIFFSYNTH: [Row; 13] = [
    ("train.caption_dropout", "0.0", "it has none"),
    ("train.timesteps.distribution", "\"uniform\"", "diffsynth/diffusion/loss.py, FlowMatchSFTLoss"),
    ("train.timesteps.grid", "\"descending\"", "diffsynth/diffusion/loss.py, FlowMatchSFTLoss"),
    ("train.timesteps.shift", "5.0", "diffsynth/diffusion/flow_match.py, set_timesteps_wan"),
    ("train.timesteps.weighting", "\"bsmntw\"", "diffsynth/diffusion/flow_match.py, set_training_weight"),
    ("optimizer.lr", "1e-4", "diffsynth/diffusion/parsers.py, learning_rate"),
    ("optimizer.warmup", "5", "diffsynth/diffusion/runner.py, ConstantLR, whose total_iters are 5"),
    ("optimizer.rate.warmup_shape", "\"constant\"", "diffsynth/diffusion/runner.py, ConstantLR"),
    ("optimizer.rate.warmup_start", "0.3333333333333333", "torch, ConstantLR, whose factor is a third"),
    ("optimizer.betas", "[0.9, 0.999]", "torch.optim.AdamW"),
    ("optimizer.eps", "1e-8", "torch.optim.AdamW"),
    ("optimizer.weight_decay", "0.01", "diffsynth/diffusion/parsers.py, weight_decay"),
    ("optimizer.clip_norm", "0.0", "it has none"),
];

/// A default that was used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// Dotted key.
    pub key: &'static str,
    /// Its value, as in a recipe.
    pub value: &'static str,
    /// Its source in that trainer.
    pub source: &'static str,
}

impl std::fmt::Display for Taken {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} = {} ({})", self.key, self.value, self.source)
    }
}

impl Like {
    /// The trainer's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::MusubiTuner => "musubi-tuner",
            Self::DiffusionPipe => "diffusion-pipe",
            Self::AiToolkit => "ai-toolkit",
            Self::DiffsynthStudio => "DiffSynth-Studio",
        }
    }

    fn defaults(self) -> &'static [Row] {
        match self {
            Self::MusubiTuner => &MUSUBI,
            Self::DiffusionPipe => &DIFFUSION_PIPE,
            Self::AiToolkit => &AI_TOOLKIT,
            Self::DiffsynthStudio => &DIFFSYNTH,
        }
    }

    /// Sets the trainer's defaults for keys that `recipe` does not set; returns them.
    pub fn fill(self, recipe: &mut Table) -> Vec<Taken> {
        let own = recipe.clone();
        let rows = self.defaults().iter().filter(|(key, ..)| !is_moot(key, &own));
        let fill =
            |&(key, value, source): &Row| put(recipe, key, value).then_some(Taken { key, value, source });
        rows.filter_map(fill).collect()
    }
}

/// Whether the default of `key` belongs to one that `recipe` replaces, and would contradict what it has instead.
fn is_moot(key: &str, recipe: &Table) -> bool {
    let is = |key: &str, value: &str| found(recipe, key).and_then(toml::Value::as_str) == Some(value);
    let is_set = |key: &str| found(recipe, key).is_some();
    match key {
        "optimizer.warmup" => is("optimizer.schedule", "one-cycle"),
        "optimizer.rate.warmup_start" | "optimizer.rate.warmup_shape" => {
            is_set("optimizer.warmup") || is("optimizer.schedule", "one-cycle")
        }
        "train.ema.decay" => is("optimizer.kind", "schedule-free"),
        "train.timesteps.grid" => {
            is_set("train.timesteps.distribution") || is_set("train.timesteps.stratified")
        }
        "train.timesteps.shift" => ["flux-shift", "flux-shift-ai-toolkit", "qwen-shift"]
            .iter()
            .any(|name| is("train.timesteps.distribution", name)),
        _ => false,
    }
}

/// The value at the dotted `key`.
fn found<'a>(table: &'a Table, key: &str) -> Option<&'a toml::Value> {
    let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
    let value = table.get(first)?;
    match rest {
        Some(rest) => found(value.as_table()?, rest),
        None => Some(value),
    }
}

/// Sets `value` at the dotted `key`, unless the key is set; returns whether it did.
fn put(mut table: &mut Table, key: &str, value: &str) -> bool {
    let (sections, name) = key.rsplit_once('.').unwrap_or(("", key));
    for section in sections.split('.') {
        let Some(below) =
            table.entry(section).or_insert_with(|| toml::Value::Table(Table::new())).as_table_mut()
        else {
            return false;
        };
        table = below;
    }
    let Ok(mut parsed) = toml::from_str::<Table>(&format!("value = {value}")) else { return false };
    match (table.contains_key(name), parsed.remove("value")) {
        (false, Some(value)) => table.insert(name.to_owned(), value).is_none(),
        _ => false,
    }
}

//! Other trainers' names of settings, to correct recipes that use them; and their files given as a recipe.

use std::collections::BTreeMap;

use data::{CaptionRules, DataConfig};
use serde_json::{Value, json};
use toml::Table;

use super::{CheckpointConfig, ExportConfig, RunConfig, TrainConfig};
use crate::base::ModelConfig;
use crate::learning::optim::OptimizerConfig;
use crate::machine::devices::DevicesConfig;
use crate::machine::memory::MemoryConfig;
use crate::sample::SampleConfig;

/// How similar two words must be for one to be a typo of the other: `trian` and `train` are, `epochs` and `steps` are not.
const ALIKE: f64 = 0.8;

/// A key of another trainer, ours, and what differs.
type Row = (&'static str, &'static str, &'static str);

/// Keys of musubi-tuner, diffusion-pipe, ai-toolkit, DiffSynth-Studio and finetrainers; none of them is a key of ours in the
/// same section.
pub const WORDS: [Row; 146] = [
    // The model.
    ("ckpt_path", "model.folder", ""),
    ("ckpt_dir", "model.folder", ""),
    ("model_path", "model.folder", ""),
    ("name_or_path", "model.folder", ""),
    ("pretrained_model_name_or_path", "model.folder", ""),
    ("transformer_path", "model.dit", ""),
    ("dit_path", "model.dit", ""),
    ("dit_high_noise", "model.dit_high", ""),
    ("vae_path", "model.vae", ""),
    ("llm_path", "model.text_encoder", ""),
    ("t5", "model.text_encoder", ""),
    ("t5_path", "model.text_encoder", ""),
    ("text_encoder_path", "model.text_encoder", ""),
    ("clip_path", "model.clip", ""),
    ("fp8_base", "model.base", "as base = \"fp8\""),
    ("fp8_scaled", "model.base", "as base = \"fp8\", which has a scale for each row"),
    ("transformer_dtype", "model.base", "one of f32, bf16, fp8, int8"),
    ("quantize", "model.base", "as base = \"fp8\" or \"int8\""),
    ("qtype", "model.base", "one of f32, bf16, fp8, int8"),
    ("mixed_precision", "model.base", "bf16 on GPUs by default; adapters and their moments are f32"),
    ("dtype", "model.base", "one of f32, bf16, fp8, int8"),
    ("fp8_t5", "model.text_base", "as text_base = \"fp8\""),
    ("quantize_te", "model.text_base", "as text_base = \"fp8\""),
    ("vae_dtype", "model.vae_base", ""),
    // The data.
    ("resolution", "data.sizes", "a list of [width, height] in pixels"),
    ("resolutions", "data.sizes", "a list of [width, height] in pixels"),
    ("size_buckets", "data.sizes", "a list of [width, height]; lengths are data.frames"),
    ("frame_buckets", "data.frames", ""),
    ("target_frames", "data.frames", ""),
    ("num_frames", "data.frames", "a list of lengths"),
    ("max_frames", "data.frames", "a list of lengths"),
    ("num_repeats", "data.repeats", "by pattern, such as { \"*\" = 3 }"),
    ("dataset_repeat", "data.repeats", "by pattern, such as { \"*\" = 3 }"),
    ("video_directory", "data.folder", ""),
    ("image_directory", "data.folder", ""),
    ("train_data_dir", "data.folder", ""),
    ("folder_path", "data.folder", ""),
    ("dataset_base_path", "data.folder", ""),
    ("dataset", "data.import", "the dataset file, as it is"),
    ("datasets", "data.import", "the dataset file, as it is"),
    ("dataset_config", "data.import", "the dataset file, as it is"),
    ("dataset_metadata_path", "data.import", "the CSV or JSONL file, as it is"),
    (
        "caption_extension",
        "data.captions.source",
        "captions are .txt files beside the clips, or metadata.jsonl or metadata.csv",
    ),
    (
        "caption_ext",
        "data.captions.source",
        "captions are .txt files beside the clips, or metadata.jsonl or metadata.csv",
    ),
    ("trigger_word", "data.trigger", ""),
    ("shuffle_caption", "data.captions.shuffle_tags", ""),
    ("shuffle_tokens", "data.captions.shuffle_tags", ""),
    ("keep_tokens", "data.captions.keep_tags", ""),
    ("frame_extraction", "data.extract", "head, middle, uniform or sliding"),
    ("video_clip_mode", "data.extract", "head, middle, uniform or sliding"),
    ("frame_stride", "data.stride", "with extract = \"sliding\""),
    ("frame_sample", "data.windows", "with extract = \"uniform\""),
    ("eval_datasets", "data.held_out", "patterns of clips in the data folder"),
    ("cache_directory", "run.cache", ""),
    ("cache_dir", "run.cache", ""),
    // The run.
    ("output_dir", "run.folder", ""),
    ("output_path", "run.folder", ""),
    ("training_folder", "run.folder", ""),
    ("output_name", "run.name", ""),
    ("logging_dir", "run.folder", "TensorBoard events are in the run's folder"),
    // The adapter.
    ("network_dim", "adapter.rank", ""),
    ("lora_rank", "adapter.rank", ""),
    ("linear", "adapter.rank", ""),
    ("network_alpha", "adapter.alpha", ""),
    ("lora_alpha", "adapter.alpha", ""),
    ("linear_alpha", "adapter.alpha", ""),
    ("network_dropout", "adapter.dropout", ""),
    ("network_weights", "adapter.init_from", ""),
    ("lora_checkpoint", "adapter.init_from", ""),
    ("preset_lora_path", "adapter.start_on", "a list of { path, strength }"),
    ("init_from_existing", "adapter.init_from", ""),
    ("network_module", "adapter.kind", "lora, dora, loha or lokr"),
    ("network_args", "adapter.targets", "the modules that get an adapter"),
    ("lora_target_modules", "adapter.targets", ""),
    // Training.
    ("max_train_steps", "train.steps", ""),
    ("max_steps", "train.steps", ""),
    ("train_steps", "train.steps", ""),
    ("max_train_epochs", "train.epochs", ""),
    ("num_epochs", "train.epochs", ""),
    ("num_train_epochs", "train.epochs", ""),
    ("gradient_accumulation_steps", "train.accumulate", ""),
    ("gradient_accumulation", "train.accumulate", ""),
    ("train_batch_size", "train.batch", ""),
    ("batch_size", "train.batch", ""),
    ("micro_batch_size_per_gpu", "train.batch", ""),
    (
        "timestep_sampling",
        "train.timesteps.distribution",
        "shift, uniform, sigmoid, logit-normal, mode, logsnr, beta, content, style, flux-shift or qwen-shift",
    ),
    (
        "timestep_type",
        "train.timesteps.distribution",
        "shift, uniform, sigmoid, logit-normal, mode, logsnr, beta, content, style, flux-shift or qwen-shift",
    ),
    (
        "timestep_sample_method",
        "train.timesteps.distribution",
        "shift, uniform, sigmoid, logit-normal, mode, logsnr, beta, content, style, flux-shift or qwen-shift",
    ),
    ("discrete_flow_shift", "train.timesteps.shift", ""),
    ("flow_shift", "train.timesteps.shift", ""),
    ("sigmoid_scale", "train.timesteps.scale", ""),
    (
        "weighting_scheme",
        "train.timesteps.weighting",
        "of the error; the draw is train.timesteps.distribution",
    ),
    ("logit_mean", "train.timesteps.mean", ""),
    ("logit_std", "train.timesteps.std", ""),
    ("mode_scale", "train.timesteps.scale", "with distribution = \"mode\""),
    ("min_snr_gamma", "train.timesteps.gamma", "with weighting = \"min-snr-velocity\""),
    ("min_timestep", "train.timesteps.min", "a sigma, 0 to 1"),
    ("max_timestep", "train.timesteps.max", "a sigma, 0 to 1"),
    ("loss_type", "train.loss.kind", "mse, l1, huber, smooth-l1 or pseudo-huber"),
    ("huber_c", "train.loss.c", ""),
    ("pseudo_huber_c", "train.loss.c", "with kind = \"pseudo-huber\""),
    ("huber_schedule", "train.loss.c_schedule", ""),
    ("diff_output_preservation", "train.prior.weight", "with train.prior.class"),
    ("diff_output_preservation_multiplier", "train.prior.weight", ""),
    ("diff_output_preservation_class", "train.prior.class", ""),
    ("blank_prompt_preservation", "train.prior.weight", "without train.prior.class"),
    ("prior_loss_weight", "train.prior.weight", ""),
    ("inverted_mask_prior", "data.loss_masks", "with outside_target = \"base\""),
    ("masked_prior_preservation_weight", "data.loss_masks", "with outside_target = \"base\""),
    ("caption_dropout_rate", "train.caption_dropout", ""),
    ("uncond_fraction", "train.caption_dropout", ""),
    // The optimiser.
    ("optimizer_type", "optimizer.kind", ""),
    ("learning_rate", "optimizer.lr", ""),
    (
        "lr_scheduler",
        "optimizer.schedule",
        "constant, linear, cosine, polynomial, inverse-sqrt, rex or one-cycle",
    ),
    ("lr_scheduler_num_cycles", "optimizer.rate.cycles", ""),
    ("lr_scheduler_power", "optimizer.rate.power", ""),
    ("lr_scheduler_min_lr_ratio", "optimizer.rate.floor", "a fraction of optimizer.lr"),
    ("lr_scheduler_timescale", "optimizer.rate.timescale", ""),
    ("lr_warmup_steps", "optimizer.warmup", ""),
    ("warmup_steps", "optimizer.warmup", ""),
    ("loraplus_lr_ratio", "optimizer.lr_b_ratio", ""),
    ("scale_weight_norms", "optimizer.norm_limit", ""),
    ("ema_decay", "train.ema.decay", ""),
    ("ema_config", "train.ema.decay", ""),
    ("max_grad_norm", "optimizer.clip_norm", ""),
    ("gradient_clipping", "optimizer.clip_norm", ""),
    // Memory and devices.
    (
        "blocks_to_swap",
        "memory.offload",
        "which the plan decides by itself; model.base = \"fp8\" halves the weights",
    ),
    ("gradient_checkpointing", "memory.keep", "which the plan decides by itself"),
    ("activation_checkpointing", "memory.keep", "which the plan decides by itself"),
    ("pipeline_stages", "devices.stages", "a list of devices, such as [\"cuda:0\", \"cuda:1\"]"),
    ("partition_split", "devices.split", "the blocks of each stage"),
    // Times and files.
    ("save_every_n_steps", "checkpoint.every_steps", ""),
    ("save_every_n_epochs", "checkpoint.every_steps", "in steps"),
    ("save_every", "checkpoint.every_steps", ""),
    ("save_steps", "checkpoint.every_steps", ""),
    ("checkpoint_every_n_minutes", "checkpoint.every_minutes", ""),
    ("save_last_n_steps", "checkpoint.keep_last", "a number of checkpoints"),
    ("max_step_saves_to_keep", "checkpoint.keep_last", ""),
    ("save_precision", "export.precision", ""),
    ("save_dtype", "export.precision", ""),
    ("eval_every_n_steps", "train.eval_every", ""),
    ("sample_every_n_steps", "sample.every", ""),
    ("sample_every", "sample.every", ""),
    ("sample_prompts", "sample.prompts", ""),
    ("sample_steps", "sample.steps", ""),
    ("guidance_scale", "sample.guidance", ""),
];

/// What a user meant by a key that no recipe has, out of the parser's message ("unknown field `x`, expected one of `a`, `b`"):
/// another trainer's word, a key of another section, or a typo; `None` if nothing is similar.
pub(super) fn meant(message: &str) -> Option<String> {
    let mut quoted = message.strip_prefix("unknown field ")?.split('`').skip(1).step_by(2);
    let unknown = quoted.next()?;
    if let Some((_, ours, remark)) = WORDS.iter().find(|(theirs, ..)| *theirs == unknown) {
        let remark = if remark.is_empty() { String::new() } else { format!(" ({remark})") };
        return Some(format!("`{unknown}` is {ours} here{remark}"));
    }
    let keys = keys();
    let named = |key: &&String| key.rsplit('.').next() == Some(unknown);
    let elsewhere: Vec<&str> = keys.iter().filter(named).map(String::as_str).collect();
    if !elsewhere.is_empty() {
        return Some(format!("`{unknown}` is a key of another section: {}", elsewhere.join(", ")));
    }
    let similarity = |key: &str| strsim::jaro_winkler(unknown, key);
    let near = quoted.map(|key| (similarity(key), key)).max_by(|a, b| a.0.total_cmp(&b.0));
    let (_, key) = near.filter(|(similarity, _)| *similarity >= ALIKE)?;
    Some(format!("did you mean `{key}`?"))
}

/// Every section of a recipe with all of its keys and their defaults; those without a default are null.
pub fn defaults() -> Value {
    // The folder of the clips has no default.
    let data = serde_json::from_value::<DataConfig>(json!({ "folder": [] })).ok();
    let mut data = json!(data);
    // The name of a source alone stands for a table.
    data["captions"] = json!(CaptionRules::default());
    json!({
        "run": RunConfig::default(),
        "model": ModelConfig::default(),
        "data": data,
        "adapter": models::adapter::LoraConfig::default(),
        "train": TrainConfig::default(),
        "optimizer": OptimizerConfig::default(),
        "devices": DevicesConfig::default(),
        "memory": MemoryConfig::default(),
        "checkpoint": CheckpointConfig::default(),
        "sample": SampleConfig::default(),
        "export": ExportConfig::default(),
    })
}

/// Every dotted key of a recipe.
fn keys() -> Vec<String> {
    let mut keys = BTreeMap::new();
    below("", &defaults(), &mut keys);
    keys.into_keys().collect()
}

fn below(key: &str, value: &Value, keys: &mut BTreeMap<String, ()>) {
    match value.as_object().filter(|table| !table.is_empty()) {
        Some(table) => {
            for (name, value) in table {
                let dotted = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                below(&dotted, value, keys);
            }
        }
        None => drop(keys.insert(key.to_owned(), ())),
    }
}

/// Which trainer's TOML file was given as a recipe, and what to do with it; `None` if it is not one.
pub(super) fn foreign_file(name: &str, table: &Table) -> Option<String> {
    let import = |what: &str| {
        format!(
            "this is a dataset file of {what}, not a recipe: leave it as it is, and write a recipe with\n  [data]\n  \
             import = \"{name}\""
        )
    };
    let has = |key: &str| table.contains_key(key);
    let is_list = |key: &str| table.get(key).is_some_and(toml::Value::is_array);
    match () {
        () if is_list("datasets") => Some(import("musubi-tuner")),
        () if is_list("directory") => Some(import("diffusion-pipe")),
        () if has("micro_batch_size_per_gpu") || has("pipeline_stages") => Some(
            "this is a training config of diffusion-pipe, not a recipe: `tandem new` writes one; train.like = \
             \"diffusion-pipe\" takes over its defaults, and data.import reads its dataset file"
                .to_owned(),
        ),
        () => None,
    }
}

/// What a file is whose extension is not TOML's, and what to do with it.
pub(super) fn foreign_ending(name: &str) -> Option<String> {
    let ending = name.rsplit_once('.')?.1.to_lowercase();
    match ending.as_str() {
        "csv" | "jsonl" => Some(format!(
            "this is a dataset file, not a recipe: write a recipe with\n  [data]\n  import = \"{name}\""
        )),
        "yaml" | "yml" | "json" => Some(
            "a recipe is a TOML file: `tandem new` writes one; train.like takes over the defaults of another trainer"
                .to_owned(),
        ),
        _ => None,
    }
}

/// Whether a text of `table` is a path of Windows whose backslashes were taken for escapes.
pub(super) fn has_broken_path(table: &Table) -> bool {
    fn is_broken(value: &toml::Value) -> bool {
        match value {
            toml::Value::String(text) => {
                let mut letters = text.chars();
                let first = letters.next();
                let is_drive = first.is_some_and(|c| c.is_ascii_alphabetic()) && letters.next() == Some(':');
                let is_share = first == Some('\\');
                (is_drive && letters.next().is_some_and(char::is_control))
                    || (is_share && letters.any(char::is_control))
            }
            toml::Value::Array(values) => values.iter().any(is_broken),
            toml::Value::Table(table) => has_broken_path(table),
            _ => false,
        }
    }
    table.values().any(is_broken)
}

/// What is wrong with a path in double quotes whose backslashes TOML takes for something else, where `text` has one.
pub(super) fn windows_path(text: &str) -> Option<String> {
    let is_path = |quoted: &str| {
        let bytes = quoted.as_bytes();
        let is_drive = bytes.len() > 3 && bytes[0].is_ascii_alphabetic() && &bytes[1..3] == b":\\";
        let is_share = quoted.starts_with("\\\\");
        (is_drive && bytes[3] != b'\\') || (is_share && !quoted.starts_with("\\\\\\\\"))
    };
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let path = lines.flat_map(|line| line.split('"').skip(1).step_by(2)).find(|quoted| is_path(quoted))?;
    Some(format!(
        "the path \"{path}\" is in double quotes, where a backslash begins an escape: write '{path}' in single quotes, or \
         \"{}\"",
        path.replace('\\', "/")
    ))
}

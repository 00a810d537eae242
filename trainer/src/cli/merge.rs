//! `tandem merge`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use models::Expert;
use models::adapter::ApplyMode;
use models::weights::{Copied, write_copy};

use super::adapter_output::{expert, writable};
use super::base_dit::BaseDit;
use super::fetch::on_this_machine;
use super::force::Force;
use crate::adapters;
use crate::error::Error;
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::Ui;

/// Merge adapters into a model's weights and write the result as one file with official names, as ComfyUI reads it. Only one
/// tensor at a time is in memory.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Merge {
    /// The model: a checkpoint folder, a DiT's folder or file in any supported format, or a model of the hub in the cache.
    #[arg(long, value_name = "PATH", value_parser = on_this_machine)]
    model: PathBuf,
    /// Which expert of a folder with two.
    #[arg(long, value_parser = expert())]
    expert: Option<Expert>,
    /// An adapter in any format, optionally with a strength (FILE:0.8). May be given more than once; they are merged in
    /// order.
    #[arg(long, value_name = "FILE[:STRENGTH]", required = true)]
    lora: Vec<String>,
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Dtype of the file. Sums are computed in f32 and rounded once.
    #[arg(long, value_enum, default_value_t = CopyFormat::Bf16)]
    dtype: CopyFormat,
    #[command(flatten)]
    force: Force,
}

const EXAMPLES: &str = "\
Examples:
  tandem merge --model Wan2.1-T2V-14B --lora style.safetensors --output merged.safetensors
  tandem merge --model Wan-AI/Wan2.1-T2V-14B --lora a.safetensors:0.8 --lora b.safetensors --output m.safetensors --dtype fp8_scaled
  tandem merge --model Wan2.2-T2V-A14B --expert high --lora style_high_noise.safetensors --output high.safetensors";

/// The number format of a model file.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum CopyFormat {
    /// 16 bits with the range of f32.
    #[value(name = "bf16")]
    Bf16,
    /// 16 bits with more digits; values beyond 65504 are refused.
    #[value(name = "fp16")]
    Fp16,
    /// The matrices of the blocks in 8 bits, with a scale for each.
    #[value(name = "fp8_scaled")]
    Fp8Scaled,
}

impl Merge {
    /// Writes the file.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let interrupt = Interrupt::listen().context("cannot listen for Ctrl-C")?;
        let read = |argument: &String| Ok(adapters::with_strength("--lora", argument)?.0.to_owned());
        let loras = self.lora.iter().map(read).collect::<crate::Result<Vec<PathBuf>>>()?;
        let inputs = [&self.model].into_iter().chain(&loras).map(PathBuf::as_path);
        writable(&self.output, "--output", &inputs.collect::<Vec<_>>(), &self.force)?;
        let (config, weights) = BaseDit::open(&self.model, self.expert)?;
        if let Some(expert) = self.expert {
            adapters::check_experts("--lora", &self.lora, expert, "--expert EXPERT for it")?;
        }
        let sources = adapters::sources("--lora", &self.lora, ui)?;
        let (_, weights) = adapters::put(&sources, &config, weights, ApplyMode::Merged, ui)?;
        let specs = config.tensors();
        let copied = match self.dtype {
            CopyFormat::Bf16 => Copied::Bf16,
            CopyFormat::Fp16 => Copied::Fp16,
            CopyFormat::Fp8Scaled => Copied::Fp8Scaled,
        };
        let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let loras: Vec<&str> =
            self.lora.iter().map(|argument| argument.rsplit('/').next().unwrap_or(argument)).collect();
        let metadata = BTreeMap::from([
            ("format".to_owned(), "pt".to_owned()),
            ("software".to_owned(), format!("tandem {}", env!("CARGO_PKG_VERSION"))),
            ("tandem.merged".to_owned(), format!("{} + {}", name(&self.model), loras.join(" + "))),
        ]);
        let bar = ui.bar("merging", specs.len());
        let done = write_copy(&self.output, &weights, &specs, copied, &metadata, |name| {
            // A scale belongs to its matrix.
            bar.inc(usize::from(!name.ends_with(".scale_weight")));
            interrupt.flow()
        });
        bar.finish();
        done.map_err(Error::from)?.ok_or(Error::Interrupted)?;
        let changed = specs.iter().filter(|spec| weights.is_patched(&spec.name)).count();
        let io = |source| Error::Io { action: "look at", path: self.output.clone(), source };
        let bytes = std::fs::metadata(&self.output).map_err(io)?.len();
        let text = format!(
            "{}: {} tensors, {changed} of them changed, {bytes} bytes",
            self.output.display(),
            specs.len()
        );
        let object = serde_json::json!({
            "file": self.output, "tensors": specs.len(), "changed": changed, "bytes": bytes,
        });
        ui.tell(&text, &object);
        Ok(0)
    }
}

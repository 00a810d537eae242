//! `tandem export`.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::DType;
use clap::{Args, ValueEnum};
use models::adapter::files::{self, AdapterFile, LoraPair, Precision, Style};

use crate::checkpoint;
use crate::error::Error;
use crate::export::provenance;
use crate::plan::Plan;
use crate::ui::Ui;

/// Write an adapter in another format: from an adapter file, or from a checkpoint of a run.
#[derive(Debug, Args)]
pub struct Export {
    /// An adapter file in any style, or a file of a run's `checkpoints` folder.
    input: PathBuf,
    /// The file to write.
    output: PathBuf,
    /// The style of the file.
    #[arg(long, value_enum, default_value_t = Format::Comfy)]
    format: Format,
    /// The number format of the factors.
    #[arg(long, value_enum, default_value_t = Numbers::Bf16)]
    precision: Numbers,
}

/// A style of adapter file.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// ComfyUI, DiffSynth; diffusers reads it too.
    Comfy,
    /// diffusers and PEFT.
    Diffusers,
    /// kohya and musubi-tuner.
    Kohya,
}

/// A number format.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Numbers {
    F32,
    Bf16,
    F16,
}

impl Export {
    /// Writes the file and compares what it reads back.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let style = match self.format {
            Format::Comfy => Style::Comfy,
            Format::Diffusers => Style::Diffusers,
            Format::Kohya => Style::Kohya,
        };
        let precision = match self.precision {
            Numbers::F32 => Precision::Float32,
            Numbers::Bf16 => Precision::Bfloat16,
            Numbers::F16 => Precision::Float16,
        };
        let adapter = self.adapter(style)?;
        let written = files::write(&self.output, &adapter, style, precision).map_err(Error::from)?;
        let text = format!(
            "{}: {} modules, {} bytes; read back, the merged delta differs by at most {:.1e}",
            self.output.display(),
            written.modules,
            written.bytes,
            written.largest_error
        );
        let object = serde_json::json!({
            "file": self.output, "modules": written.modules, "bytes": written.bytes, "error": written.largest_error,
        });
        ui.tell(&text, &object);
        Ok(0)
    }

    /// The adapter of the input, with its header.
    fn adapter(&self, style: Style) -> crate::Result<AdapterFile> {
        let Some(folder) = self.input.parent().filter(|folder| folder.ends_with("checkpoints")) else {
            return Ok(files::read(&self.input)?);
        };
        let (progress, states) = checkpoint::load(&self.input)?;
        let plan = Plan::read(&folder.with_file_name("plan.toml"))?;
        let metadata = provenance(&plan, progress.step, progress.cursor.epoch)?.metadata(style);
        let mut file = AdapterFile { metadata, ..AdapterFile::default() };
        let part = |module: &str, factor: &str| {
            states.get(&format!("{module}.{factor}.weight")).map(|s| s.parameter.to_dtype(DType::F32))
        };
        let modules = states.keys().filter_map(|name| name.strip_suffix(".lora_A.weight"));
        for module in modules {
            if let (Some(a), Some(b)) = (part(module, "lora_A"), part(module, "lora_B")) {
                file.modules.insert(module.to_owned(), LoraPair::new(a?, b?, plan.adapter.scale())?.into());
            }
        }
        Ok(file)
    }
}

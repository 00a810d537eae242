//! `tandem export`.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::DType;
use clap::Args;
use models::adapter::files::{self, AdapterFile, LoraPair, Style};

use super::adapter_output::AdapterOutput;
use crate::checkpoint;
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
    #[command(flatten)]
    how: AdapterOutput,
}

impl Export {
    /// Writes the file and compares what it reads back.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let adapter = self.adapter(self.how.style())?;
        let (text, object) = self.how.write(&self.output, &adapter)?;
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

//! `tandem new`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use kernels::inventory;
use models::published::Published;

use super::force::Force;
use crate::error::Error;
use crate::recipe::draft::Draft;
use crate::watch::ui::Ui;

/// Write a commented recipe for a model, a folder of clips and the cards of this machine.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct New {
    /// The model: a checkpoint folder, or a model of the Hugging Face hub as owner/name, which need not be fetched yet. Default:
    /// Wan 2.1 T2V-14B with two GPUs or more, else T2V-1.3B.
    #[arg(long, value_name = "DIR_OR_ID")]
    model: Option<PathBuf>,
    /// The folder of clips.
    #[arg(long, value_name = "DIR", default_value = "clips")]
    data: PathBuf,
    /// The recipe to write. Default: the name of the folder of clips, in the current folder.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    force: Force,
}

/// The default models, by the number of GPUs.
const FOR_ONE_GPU: &str = "t2v-1.3b";
const FOR_TWO_GPUS: &str = "t2v-14b";

const EXAMPLES: &str = "\
Examples:
  tandem new --data clips
  tandem new --model Wan-AI/Wan2.2-T2V-A14B --data clips --output dance.toml

Every key of a recipe is explained in recipes/README.md.";

impl New {
    /// Writes the recipe, and prints the next command.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let gpus = gpus();
        let model = self.model.clone().unwrap_or_else(|| {
            let key = if gpus.len() > 1 { FOR_TWO_GPUS } else { FOR_ONE_GPU };
            PathBuf::from(Published::named(key).map_or(key, Published::repository))
        });
        let output = self.output.clone().unwrap_or_else(|| {
            let name = self.data.file_name().unwrap_or("recipe".as_ref());
            Path::new(&format!("{}.toml", name.to_string_lossy())).to_owned()
        });
        self.force.check(&output, "--output")?;
        let draft = Draft::new(&model, &self.data, output.parent().unwrap_or("".as_ref()), &gpus)?;
        draft.notes.iter().for_each(|note| ui.note(note));
        std::fs::write(&output, draft.recipe()).map_err(|source| Error::Io {
            action: "write the recipe",
            path: output.clone(),
            source,
        })?;
        let next = format!("tandem plan {}", output.display());
        let text = format!("wrote {}\nnext: {next}", output.display());
        ui.tell(&text, &serde_json::json!({ "recipe": output, "next": next }));
        Ok(0)
    }
}

/// The GPUs that this build can use.
fn gpus() -> Vec<String> {
    if inventory::built_for().is_none() {
        return Vec::new();
    }
    let usable = inventory::gpus().unwrap_or_default().into_iter().filter(|gpu| gpu.is_new_enough());
    usable.map(|gpu| format!("cuda:{}", gpu.index)).collect()
}

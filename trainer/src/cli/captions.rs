//! `tandem captions`.

mod write;

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use models::text::MAX_TOKENS;

use super::devices::RecipeDevices;
use super::fetch::{Missing, resolved};
use super::plan::{make, texts};
use crate::bytes::Bytes;
use crate::tools::captions::{ClipTexts, Findings, findings, texts as texts_of};
use crate::watch::ui::Ui;
use write::Writing;

/// List the texts that each clip is trained with and how often, and find empty, identical and over-long ones; or write captions with
/// a model that sees pictures.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Captions {
    /// The recipe.
    recipe: PathBuf,
    /// List every text; without it, three of each clip.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    writing: Writing,
    #[command(flatten)]
    devices: RecipeDevices,
}

const EXAMPLES: &str = "\
Examples:
  tandem captions my.toml
  tandem captions my.toml --all --set data.captions.shuffle_tags=true   # every arrangement of the tags
  tandem captions my.toml --write --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-VL-8B-Instruct

Every key of a recipe is explained in recipes/README.md.";

/// Texts of a clip that are listed unless all are asked for.
const LISTED: usize = 3;

impl Captions {
    /// Prints the list, or writes captions.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        if self.writing.write {
            return self.writing.run(&self.recipe, &self.devices.overrides(), ui);
        }
        let overrides = resolved(&self.recipe, self.devices.overrides(), Missing::Tell, ui)?;
        let planned = make(&self.recipe, &overrides, ui)?;
        let (plan, dataset) = (&planned.plan, &planned.dataset);
        let clips = texts_of(dataset);
        let found = findings(dataset, plan.data.trigger.as_deref(), &plan.model)?;
        let encoded = texts(&planned);
        let mut text = clips.iter().map(|clip| self.in_words(clip)).collect::<String>();
        let dropped = 100.0 * plan.train.caption_dropout;
        writeln!(
            text,
            "{} clips, {} texts to encode, at most {}; {dropped} % of the samples have no text (train.caption_dropout)",
            clips.len(),
            encoded.count,
            Bytes(encoded.bytes)
        )?;
        text.push_str(&odd(&found, plan.data.trigger.as_deref()));
        let object = serde_json::json!({ "clips": clips, "texts": encoded, "findings": found });
        ui.tell(text.trim_end(), &object);
        Ok(0)
    }

    fn in_words(&self, clip: &ClipTexts) -> String {
        let often = match clip.samples {
            0 => "held out".to_owned(),
            1 => "1 sample an epoch".to_owned(),
            more => format!("{more} samples an epoch"),
        };
        let listed = if self.all { clip.texts.len() } else { LISTED };
        let mut text = format!("{} ({often})\n", clip.id);
        for (line, share) in clip.texts.iter().take(listed) {
            let share =
                if clip.texts.len() > 1 { format!("{:.1} %  ", 100.0 * share) } else { String::new() };
            text.push_str(&format!("  {share}{line}\n"));
        }
        if clip.texts.len() > listed {
            text.push_str(&format!("  and {} more (--all)\n", clip.texts.len() - listed));
        }
        text
    }
}

/// What was found, a line for each.
fn odd(found: &Findings, trigger: Option<&str>) -> String {
    let mut lines = Vec::new();
    let mut list = |what: String, clips: &[String]| {
        if !clips.is_empty() {
            lines.push(format!("{what} ({}): {}", clips.len(), clips.join(", ")));
        }
    };
    list("with an empty text".to_owned(), &found.empty);
    for (caption, clips) in &found.identical {
        list(format!("with the same caption, \"{caption}\""), clips);
    }
    let word = trigger.unwrap_or_default();
    list(
        format!("with \"{word}\" in their captions already, so that it is not put in front"),
        &found.with_trigger,
    );
    list(format!("with words of \"{word}\" in their captions"), &found.with_words_of_trigger);
    match &found.long {
        None => lines.push("the model's tokenizer is not here: lengths were not checked".to_owned()),
        Some(long) => {
            let clips: Vec<String> =
                long.iter().map(|text| format!("{} ({})", text.id, text.tokens)).collect();
            if !clips.is_empty() {
                lines.push(format!(
                    "with more than the {MAX_TOKENS} tokens that the model sees: {}",
                    clips.join(", ")
                ));
            }
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

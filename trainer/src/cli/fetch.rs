//! `tandem fetch`, and models of the hub in other commands.

use std::path::{Path, PathBuf};

use clap::Args;
use models::published::Published;

use crate::base::hub::{Hub, HubError, HubId, HubSettings, Wanted};
use crate::base::{Clips, ModelConfig};
use crate::error::Error;
use crate::plan::Overrides;
use crate::recipe::Recipe;
use crate::watch::ui::Ui;

/// Fetch a model from the Hugging Face hub into its cache. What is there already stays, and what broke off goes on.
#[derive(Debug, Args)]
#[command(after_help = ENVIRONMENT)]
pub struct Fetch {
    /// The model: owner/name, or owner/name@revision.
    #[arg(value_name = "ID")]
    id: String,
    /// Only these parts, such as dit_low,vae.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART")]
    only: Vec<Wanted>,
}

const ENVIRONMENT: &str = "\
Examples:
  tandem fetch Wan-AI/Wan2.1-T2V-14B
  tandem fetch Wan-AI/Wan2.2-T2V-A14B --only dit_low,vae

The variables of Python's huggingface_hub say how the hub is reached and where its cache lies: \
HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN (or the login of huggingface-cli), HF_HUB_OFFLINE.";

impl Fetch {
    /// Fetches what is missing and says where the model lies.
    pub fn run(&self, ui: &Ui) -> anyhow::Result<u8> {
        let id: HubId = self.id.parse().map_err(Error::from)?;
        let wanted = if self.only.is_empty() { &Wanted::ALL[..] } else { &self.only };
        let folder = hub().fetch(&id, wanted, ui).map_err(Error::from)?;
        let text = format!("{id} lies in {}", folder.display());
        ui.tell(&text, &serde_json::json!({ "id": id.to_string(), "folder": folder }));
        Ok(0)
    }
}

/// `overrides` with the folder of the recipe's model, if that is one of the hub: fetched where it is `missing`, or assumed
/// where it is not to be fetched and its sizes were published.
///
/// # Errors
/// A recipe that cannot be read, devices that are not here, a model that cannot be had.
pub fn resolved(recipe: &Path, overrides: Overrides, missing: Missing, ui: &Ui) -> crate::Result<Overrides> {
    let Recipe { model, sample, devices, .. } = Recipe::read_with(recipe, &overrides.settings)?;
    // Before anything is downloaded or written. Cards that are assumed are nowhere to be looked at.
    if overrides.cards.is_none() {
        devices.check()?;
    }
    if overrides.assume.is_some() {
        return Ok(overrides);
    }
    let from = recipe.parent().unwrap_or(Path::new(""));
    let clips = if sample.prompts.is_empty() { Clips::None } else { Clips::Some };
    match folder(&model, from, clips, missing, ui) {
        Err(Error::Hub(HubError::NotFetched { .. })) if published(&model, from).is_some() => {
            Ok(Overrides { assume: published(&model, from), ..overrides })
        }
        model_folder => Ok(Overrides { model_folder: model_folder?, ..overrides }),
    }
}

/// The published model that a recipe in the folder `from` names, whose sizes are known without its files.
fn published(model: &ModelConfig, from: &Path) -> Option<&'static Published> {
    Published::in_repository(&model.hub_id(from)?.repository)
}

/// The folder that `model` stands for: itself, or that of a model of the hub, fetched if need be.
///
/// # Errors
/// A model that cannot be had.
pub fn fetched(model: &Path, ui: &Ui) -> crate::Result<PathBuf> {
    let config = ModelConfig { folder: Some(model.to_owned()), ..ModelConfig::default() };
    Ok(folder(&config, Path::new(""), Clips::Some, Missing::Fetch, ui)?.unwrap_or_else(|| model.to_owned()))
}

/// The folder of the model of a recipe in the folder `from`, whole, where that is one of the hub: fetched if need be.
///
/// # Errors
/// A model that cannot be had.
pub fn fetched_for(model: &ModelConfig, from: &Path, ui: &Ui) -> crate::Result<Option<PathBuf>> {
    folder(model, from, Clips::Some, Missing::Fetch, ui)
}

/// Endings of the names of files, which no model of the hub has.
const FILES: [&str; 5] = ["safetensors", "pth", "pt", "gguf", "json"];

/// An argument that is a path, or a model of the hub by its name: then its folder in the cache. Nothing is fetched.
///
/// # Errors
/// A model that is not in the cache.
pub fn on_this_machine(argument: &str) -> Result<PathBuf, HubError> {
    let path = PathBuf::from(argument);
    // A path with a slip in it has a folder to begin with, or is the name of a file.
    let is_path = path.parent().is_none_or(Path::exists)
        || path.extension().is_some_and(|ending| FILES.iter().any(|file| ending == *file));
    match (is_path || path.exists(), argument.parse::<HubId>()) {
        (false, Ok(id)) => hub().cached(&id).ok_or_else(|| HubError::NotFetched { id: id.to_string() }),
        _ => Ok(path),
    }
}

/// What is done about a model of the hub that is not in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// Download it, and check the files that are there.
    Fetch,
    /// Report it.
    Tell,
}

fn folder(
    model: &ModelConfig,
    from: &Path,
    clips: Clips,
    missing: Missing,
    ui: &Ui,
) -> crate::Result<Option<PathBuf>> {
    let Some(id) = model.hub_id(from) else { return Ok(None) };
    let folder = match missing {
        Missing::Fetch => hub().fetch(&id, &model.wanted(clips), ui)?,
        Missing::Tell => hub().cached(&id).ok_or_else(|| HubError::NotFetched { id: id.to_string() })?,
    };
    Ok(Some(folder))
}

fn hub() -> Hub {
    Hub::new(HubSettings::from_environment())
}

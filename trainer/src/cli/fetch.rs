//! `tandem fetch`, and models of the hub in other commands.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use data::DataConfig;
use models::published::Published;

use crate::base::hub::{Hub, HubDataset, HubError, HubId, HubSettings, SCHEME, Wanted};
use crate::base::{Clips, ModelConfig};
use crate::error::Error;
use crate::plan::Overrides;
use crate::recipe::Recipe;
use crate::watch::ui::Ui;

/// Fetch a model or a dataset from the Hugging Face hub into its cache. Complete files are kept, interrupted downloads are resumed.
#[derive(Debug, Args)]
#[command(after_help = ENVIRONMENT)]
pub struct Fetch {
    /// The model: owner/name, or owner/name@revision. Or a dataset: hf://owner/name, with @revision and a folder behind.
    #[arg(value_name = "ID")]
    id: String,
    /// Only these parts of a model, such as dit_low,vae. Tiny decoders are not fetched unless they are named.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART")]
    only: Vec<Wanted>,
}

const ENVIRONMENT: &str = "\
Examples:
  tandem fetch Wan-AI/Wan2.1-T2V-14B
  tandem fetch Wan-AI/Wan2.2-T2V-A14B --only dit_low,vae
  tandem fetch hf://owner/clips/train                  (the folder `train` of a dataset)
  tandem fetch Kijai/WanVideo_comfy --only taew2_1     (the tiny decoder of previews)

The variables of Python's huggingface_hub say how the hub is reached and where its cache lies: \
HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN (or the login of huggingface-cli), HF_HUB_OFFLINE.";

impl Fetch {
    /// Fetches what is missing and prints the model's folder.
    pub fn run(&self, ui: &Ui) -> anyhow::Result<u8> {
        if self.id.starts_with(SCHEME) {
            return self.dataset(ui);
        }
        let id: HubId = self.id.parse().map_err(Error::from)?;
        let wanted = if self.only.is_empty() { &Wanted::ALL[..] } else { &self.only };
        let folder = hub().fetch(&id, wanted, ui).map_err(Error::from)?;
        let text = format!("{id} is in {}", folder.display());
        ui.tell(&text, &serde_json::json!({ "id": id.to_string(), "folder": folder }));
        Ok(0)
    }

    fn dataset(&self, ui: &Ui) -> anyhow::Result<u8> {
        if !self.only.is_empty() {
            let why = "names parts of models, and this is a dataset: put a folder behind its name".into();
            return Err(Error::Setting { key: "--only".into(), why }.into());
        }
        let dataset: HubDataset = self.id.parse().map_err(Error::from)?;
        let folder = hub().fetch_dataset(&dataset, ui).map_err(Error::from)?;
        let text = format!("{dataset} is in {}", folder.display());
        ui.tell(&text, &serde_json::json!({ "id": dataset.to_string(), "folder": folder }));
        Ok(0)
    }
}

/// `overrides` with the folders of the recipe's model and datasets that are the hub's: fetched if they are missing (as `missing`
/// says); a model is assumed if it is not to be fetched and its sizes are published.
///
/// # Errors
/// If the recipe cannot be read, a device does not exist, or the model cannot be fetched.
pub fn resolved(recipe: &Path, overrides: Overrides, missing: Missing, ui: &Ui) -> crate::Result<Overrides> {
    let Recipe { model, sample, devices, data, .. } = Recipe::read_with(recipe, &overrides.settings)?;
    // Before anything is downloaded or written. Assumed cards cannot be checked.
    if overrides.cards.is_none() {
        devices.check()?;
    }
    if overrides.assume.is_some() {
        return Ok(overrides);
    }
    let from = recipe.parent().unwrap_or(Path::new(""));
    let overrides = Overrides { data_folders: data_folders(&data, missing, ui)?, ..overrides };
    let clips = if sample.prompts.is_empty() { Clips::None } else { Clips::Some };
    match folder(&model, from, clips, missing, ui) {
        Err(Error::Hub(HubError::NotFetched { .. })) if published(&model, from).is_some() => {
            Ok(Overrides { assume: published(&model, from), ..overrides })
        }
        model_folder => Ok(Overrides { model_folder: model_folder?, ..overrides }),
    }
}

/// Where the datasets of the hub that `data` names are, by their names.
fn data_folders(data: &DataConfig, missing: Missing, ui: &Ui) -> crate::Result<BTreeMap<String, PathBuf>> {
    let mut folders = BTreeMap::new();
    let named = data.folder.iter().chain(data.sets.iter().flat_map(|set| &set.folder));
    for text in named.filter_map(|folder| folder.to_str()).filter(|text| text.starts_with(SCHEME)) {
        let dataset: HubDataset = text.parse()?;
        let folder = match missing {
            Missing::Fetch => hub().fetch_dataset(&dataset, ui)?,
            Missing::Tell => hub()
                .cached_dataset(&dataset)
                .ok_or_else(|| HubError::DatasetNotFetched { dataset: dataset.to_string() })?,
        };
        folders.insert(text.to_owned(), folder);
    }
    Ok(folders)
}

/// The published model that a recipe in the folder `from` names, whose sizes are known without its files.
fn published(model: &ModelConfig, from: &Path) -> Option<&'static Published> {
    Published::in_repository(&model.hub_id(from)?.repository)
}

/// The folder of `model`: itself, or that of a model of the hub, fetched if necessary.
///
/// # Errors
/// If the model cannot be fetched.
pub fn fetched(model: &Path, ui: &Ui) -> crate::Result<PathBuf> {
    let config = ModelConfig { folder: Some(model.to_owned()), ..ModelConfig::default() };
    Ok(folder(&config, Path::new(""), Clips::Some, Missing::Fetch, ui)?.unwrap_or_else(|| model.to_owned()))
}

/// The folder of the model of a recipe in the folder `from`, complete, if it is one of the hub: fetched if necessary.
///
/// # Errors
/// If the model cannot be fetched.
pub fn fetched_for(model: &ModelConfig, from: &Path, ui: &Ui) -> crate::Result<Option<PathBuf>> {
    folder(model, from, Clips::Some, Missing::Fetch, ui)
}

/// Extensions of files, which no model of the hub has.
const FILES: [&str; 5] = ["safetensors", "pth", "pt", "gguf", "json"];

/// An argument that is a path, or a model of the hub by its name: then its folder in the cache. Makes no request.
///
/// # Errors
/// If the model is not in the cache.
pub fn on_this_machine(argument: &str) -> Result<PathBuf, HubError> {
    let path = PathBuf::from(argument);
    // A mistyped path begins with an existing folder, or is the name of a file.
    let is_path = path.parent().is_none_or(Path::exists)
        || path.extension().is_some_and(|ending| FILES.iter().any(|file| ending == *file));
    match (is_path || path.exists(), argument.parse::<HubId>()) {
        (false, Ok(id)) => hub().cached(&id).ok_or_else(|| HubError::NotFetched { id: id.to_string() }),
        _ => Ok(path),
    }
}

/// What to do if a model of the hub is not in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// Download it, and check the existing files.
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

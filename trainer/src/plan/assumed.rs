//! Plans for what is not here: a published model without its files, cards, clips.

use std::path::Path;

use data::{DataConfig, Dataset, SetFacts};
use models::dit::DitConfig;
use models::published::Defaults;

use super::{DatasetPlan, Overrides};
use crate::base::BaseModel;
use crate::bytes::Bytes;
use crate::error::Result;
use crate::machine::memory::HOST;
use crate::recipe::Recipe;

/// The model of `recipe` with the sizes of its DiT, and what there is to note of it: looked at, or assumed.
///
/// # Errors
/// A part that is missing or does not open.
pub(super) fn settled_model(
    recipe: &Recipe,
    from: &Path,
    overrides: &Overrides,
) -> Result<(BaseModel, DitConfig, Vec<String>)> {
    let processor = recipe.devices.processor();
    let mut notes = Vec::new();
    if overrides.cards.is_some() && recipe.memory.host_memory.is_none() {
        notes.push(format!(
            "planned for a machine with {} of host memory to pin; memory.host_memory says otherwise",
            Bytes(HOST)
        ));
    }
    let (model, dit) = match overrides.assume {
        Some(published) => {
            let (model, dit) = BaseModel::assumed(published, &recipe.model, processor)?;
            notes.push(format!(
                "{} is assumed, with the sizes that it was published with: its files are not looked at. Downloading {} takes \
                 about {:.0} GiB; `tandem fetch {0}` does that",
                published.repository(),
                published.title,
                published.download() as f64 / f64::from(1 << 30)
            ));
            (model, dit)
        }
        None => {
            let model = recipe.model.settle(from, processor)?;
            let dit = model.check()?;
            notes.extend(recipe.model.unused(&dit));
            (model, dit)
        }
    };
    Ok((model, dit, notes))
}

/// What there is to note where a plan for another model or other cards is made before there are clips; `None` where there are,
/// or where they are needed.
pub(super) fn missing_clips(data: &DataConfig, from: &Path, overrides: &Overrides) -> Option<String> {
    let is_assuming = overrides.assume.is_some() || overrides.cards.is_some();
    let imports = data.sets.iter().filter_map(|set| set.import.as_ref()).chain(&data.import);
    let folders = || data.sets.iter().flat_map(|set| &set.folder).chain(&data.folder);
    let are_missing = imports.count() == 0 && folders().all(|folder| !from.join(folder).exists());
    (is_assuming && are_missing).then(|| {
        let names: Vec<String> = folders().map(|folder| folder.display().to_string()).collect();
        format!(
            "there is no folder {} yet: memory is that of the largest clip that data.sizes and data.frames allow",
            names.join(", ")
        )
    })
}

/// A dataset without a clip.
pub(super) fn no_data(data: &mut DataConfig, defaults: &Defaults) -> (Dataset, DatasetPlan) {
    let fps = *data.fps.get_or_insert(defaults.fps);
    let dataset = Dataset {
        sources: Vec::new(),
        windows: Vec::new(),
        sets: vec![SetFacts::default()],
        fps,
        sizes: data.sizes.clone(),
        frames: data.frames.clone(),
        notes: Vec::new(),
        skipped: Vec::new(),
    };
    (dataset, DatasetPlan { clips: 0, items: 0, held_out: 0, skipped: Vec::new(), digest: String::new() })
}

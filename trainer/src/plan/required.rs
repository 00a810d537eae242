//! Whether every clip has what the model learns from.

use data::{Companions, DataConfig, Dataset, Source};
use models::dit::{DitConfig, Pictures};
use models::published::Beside;

use crate::error::{Error, Result};

/// Something that clips need.
struct Need {
    /// Keys of `[data]`, of which any will do; the first is named where none is there.
    keys: &'static [&'static str],
    /// What a model without it is told to do.
    way_out: String,
}

/// Checks that the clips of `dataset` have what `dit` learns from. Sets without clips are judged by the folders that `data` names.
///
/// # Errors
/// A companion that the model needs, and that a clip lacks.
pub(super) fn check(data: &DataConfig, dataset: &Dataset, dit: &DitConfig) -> Result<()> {
    let needs = needs(dit);
    for (number, (set, _)) in data.expanded()?.iter().enumerate() {
        let own: Vec<&Source> = dataset.sources.iter().filter(|source| source.item.set == number).collect();
        for Need { keys, way_out } in &needs {
            let is_made = keys.contains(&"masks") && !set.mask_rules.is_empty();
            if is_made || set.companions().any(|(key, _)| keys.contains(&key)) {
                continue;
            }
            let has = |source: &&&Source| keys.iter().any(|key| has(&source.companions, key));
            let lacking = own.iter().find(|source| !has(source));
            let why = match (own.iter().any(|source| has(&source)), lacking) {
                (true, Some(source)) => {
                    format!("{} has none, and other clips have: {way_out}", source.item.id)
                }
                (false, None) if set.import.is_some() => continue,
                (false, _) => way_out.clone(),
                (true, None) => continue,
            };
            return Err(Error::Setting { key: format!("data.{}", keys[0]), why });
        }
    }
    Ok(())
}

fn has(companions: &Companions, key: &str) -> bool {
    match key {
        "control" => companions.control.is_some(),
        "masks" => companions.mask.is_some(),
        "faces" => companions.faces.is_some(),
        "references" => !companions.references.is_empty(),
        _ => companions.camera.is_some(),
    }
}

fn needs(dit: &DitConfig) -> Vec<Need> {
    let facts = dit.kind.facts();
    let need = |keys: &'static [&'static str], way_out: &str| Need { keys, way_out: way_out.to_owned() };
    let mut needs = Vec::new();
    if dit.pictures() != Pictures::Condition {
        return needs;
    }
    if facts.side_chain {
        needs.push(need(
            &["control", "masks", "references"],
            "VACE learns from control clips, masks or reference pictures: name data.control, data.masks, data.mask_rules or \
             data.references, any of them",
        ));
    }
    if facts.faces {
        let learns =
            |what: &str| format!("Animate learns from {what}: name the folder that has one for each clip");
        needs.push(need(&["control"], &learns("pose clips")));
        needs.push(need(&["faces"], &learns("face clips")));
        needs.push(need(&["references"], &learns("a picture of each clip's character")));
    }
    if facts.camera {
        needs.push(need(
            &["cameras"],
            "this model learns from camera paths: name the folder of the clips' poses",
        ));
    }
    if facts.beside.contains(&Beside::Control) {
        needs.push(need(
            &["control"],
            "this model learns from control clips: name the folder that has one for each clip",
        ));
    }
    needs
}

//! Whether the data of a recipe has what its model is conditioned on.

use std::path::Path;

use data::DataConfig;
use models::dit::{DitConfig, Pictures};
use models::published::Beside;

use crate::error::{Error, Result};

/// Checks that `data` names the companions that `dit` reads, and no others.
///
/// # Errors
/// A folder that is missing, or one that the model has no use for.
pub(super) fn check_data(data: &DataConfig, dit: &DitConfig) -> Result<()> {
    let refuse = |key: &str, why: &str| Err(Error::Setting { key: format!("data.{key}"), why: why.into() });
    let facts = dit.kind.facts();
    let is_read = |key: &str| match key {
        "control" => facts.side_chain || facts.beside.contains(&Beside::Control),
        "masks" => facts.side_chain,
        "references" => facts.side_chain || dit.control.reference.is_some(),
        _ => facts.camera,
    };
    if let Some((key, _)) = data.companions().find(|(key, _)| !is_read(key)) {
        let why = match key {
            "control" => {
                "this model reads no control clips: leave it out, or take a Fun-Control or VACE model"
            }
            "masks" => "this model reads no masks: leave it out, or take a VACE model",
            "references" => {
                "this model reads no reference pictures: leave it out, or take Fun-Control V1.1 or A14B, or VACE"
            }
            _ => "this model reads no camera paths: leave it out, or take a Fun-Control-Camera model",
        };
        return refuse(key, why);
    }
    if dit.pictures() != Pictures::Condition {
        return Ok(());
    }
    if facts.camera && data.cameras.is_none() {
        return refuse("cameras", "this model learns from camera paths: name the folder of the clips' poses");
    }
    if facts.beside.contains(&Beside::Control) && data.control.is_none() {
        return refuse(
            "control",
            "this model learns from control clips: name the folder that has one for each clip",
        );
    }
    Ok(())
}

/// Lets the folders of `data` begin in `from`.
pub(super) fn settle_places(data: &mut DataConfig, from: &Path) {
    let companions = [&mut data.control, &mut data.masks, &mut data.references, &mut data.cameras];
    let places = data.folder.iter_mut().chain(companions.into_iter().flatten());
    places.for_each(|place| *place = from.join(&*place));
}

//! Whether the data of a recipe has what its model is conditioned on.

use std::fs;
use std::path::Path;

use data::{AudioSource, COMPANION_KEYS, CaptionFile, DataConfig, Dataset, ForExpert, LossMasks, SetConfig};
use models::dit::DitConfig;
use models::expert::Expert;
use models::published::Beside;

use super::Overrides;
use crate::base::hub::SCHEME;
use crate::error::{Error, Result};
use crate::learning::NoiseRange;
use crate::recipe::Recipe;

/// `data`, if it names the companions that `dit` reads, and no others.
///
/// # Errors
/// A folder that the model has no use for.
pub(super) fn checked(mut data: DataConfig, dit: &DitConfig) -> Result<DataConfig> {
    if dit.kind.facts().speech {
        data.audio.get_or_insert(AudioSource::Own);
    }
    for (set, _) in data.expanded()? {
        check_set(&set, dit)?;
    }
    Ok(data)
}

/// Keys of the companions that `dit` reads.
pub(super) fn read_by(dit: &DitConfig) -> Vec<&'static str> {
    COMPANION_KEYS.into_iter().filter(|key| is_read(dit, key)).collect()
}

fn is_read(dit: &DitConfig, key: &str) -> bool {
    let facts = dit.kind.facts();
    match key {
        "control" => {
            facts.side_chain || facts.faces || facts.speech || facts.beside.contains(&Beside::Control)
        }
        "masks" => facts.side_chain || facts.faces,
        "faces" => facts.faces,
        "references" => facts.side_chain || facts.faces || dit.control.reference.is_some(),
        "audio" => facts.speech,
        _ => facts.camera,
    }
}

/// [`checked`] of one set.
fn check_set(data: &DataConfig, dit: &DitConfig) -> Result<()> {
    let refuse = |key: &str, why: &str| Err(Error::Setting { key: format!("data.{key}"), why: why.into() });
    let facts = dit.kind.facts();
    let is_read = |key: &str| is_read(dit, key);
    if data.audio.is_some() && !is_read("audio") {
        return refuse("audio", "this model hears no speech: leave it out, or take an S2V model");
    }
    if let Some((key, _)) = data.companions().find(|(key, _)| !is_read(key)) {
        let why = match key {
            "control" => {
                "this model reads no control clips: leave it out, or take a Fun-Control, VACE, Animate or S2V model"
            }
            "masks" => "this model reads no masks: leave it out, or take a VACE or Animate model",
            "faces" => "this model reads no face clips: leave it out, or take an Animate model",
            "references" => {
                "this model reads no reference pictures: leave it out, or take Fun-Control V1.1, A14B or 5B, VACE or Animate"
            }
            _ => "this model reads no camera paths: leave it out, or take a Fun-Control-Camera model",
        };
        return refuse(key, why);
    }
    if !data.mask_rules.is_empty() && !facts.side_chain {
        return refuse("mask_rules", "this model takes no masks by rule: leave it out, or take a VACE model");
    }
    if facts.speech && data.import.is_none() && data.frames.iter().any(|frames| *frames < 5) {
        return refuse(
            "frames",
            "of a clip S2V learns the frames behind the first, which is the reference picture: lengths begin at 5",
        );
    }
    Ok(())
}

/// Checks that each set of `dataset` that is for one expert can be trained: `ranges` are those of the networks that are.
///
/// # Errors
/// A set that no network would learn from.
pub(super) fn check_experts(dataset: &Dataset, ranges: &[NoiseRange]) -> Result<()> {
    let experts: Vec<Expert> = ranges.iter().filter_map(|range| range.expert()).collect();
    for set in &dataset.sets {
        let wanted = match set.expert {
            Some(ForExpert::High) => Expert::High,
            Some(ForExpert::Low) => Expert::Low,
            None => continue,
        };
        if !experts.contains(&wanted) {
            let trained: Vec<String> = experts.iter().map(ToString::to_string).collect();
            let which = match trained.as_slice() {
                [] => "the model has no experts".to_owned(),
                some => format!("the expert for {} noise is trained", some.join(" and ")),
            };
            let why = format!("\"{}\" is for the expert for {wanted} noise alone, and {which}", set.name);
            return Err(Error::Setting { key: "data.sets".into(), why });
        }
    }
    Ok(())
}

/// Checks that no folder is a dataset of the hub, whose place is not known here.
///
/// # Errors
/// A dataset of the hub.
pub(super) fn check_hub(data: &DataConfig) -> Result<()> {
    let folders = data.folder.iter().chain(data.sets.iter().flat_map(|set| &set.folder));
    match folders.filter_map(|folder| folder.to_str()).find(|text| text.starts_with(SCHEME)) {
        Some(text) => {
            let why = format!("{text} is a dataset of the hub, and a folder on this machine is needed here");
            Err(Error::Setting { key: "data.folder".into(), why })
        }
        None => Ok(()),
    }
}

/// Lets the folders of `data` begin in `from`.
pub(super) fn settle_places(data: &mut DataConfig, from: &Path) {
    let companions =
        [&mut data.control, &mut data.masks, &mut data.faces, &mut data.references, &mut data.cameras];
    let loss_masks = data.loss_masks.as_mut().and_then(LossMasks::folder_mut);
    let audio = match &mut data.audio {
        Some(AudioSource::Folder(folder)) => Some(folder),
        Some(AudioSource::Own) | None => None,
    };
    let own = data.folder.iter_mut().chain(companions.into_iter().flatten()).chain(audio).chain(loss_masks);
    let places = own.chain(data.sets.iter_mut().flat_map(SetConfig::places_mut));
    places.for_each(|place| *place = from.join(&*place));
}

/// The clips of the recipe at `path` with `overrides` on top, and where their captions are or would be.
///
/// # Errors
/// A recipe that cannot be read, and as [`data::caption_files`].
pub fn caption_files(path: &Path, overrides: &Overrides) -> Result<Vec<CaptionFile>> {
    let mut data = Recipe::read_with(path, &overrides.settings)?.data;
    check_hub(&data)?;
    settle_places(&mut data, path.parent().unwrap_or(Path::new("")));
    Ok(data::caption_files(&data)?)
}

/// Checks that no clip is driven by itself: a model that reads poses (Animate) would learn to copy.
///
/// # Errors
/// A pose clip that is the clip itself, and one that cannot be read.
pub(super) fn check_driving(dataset: &Dataset, dit: &DitConfig) -> Result<()> {
    if !dit.kind.facts().faces {
        return Ok(());
    }
    for source in &dataset.sources {
        let Some(control) = &source.companions.control else { continue };
        let (own, driving) = (source.item.media.path(), control.media.path());
        if own.is_file() && driving.is_file() && are_same(own, driving)? {
            let why = format!(
                "{} is the clip {} itself: a driving clip that equals its target teaches nothing; draw the poses of the clip",
                driving.display(),
                source.item.id
            );
            return Err(Error::Setting { key: "data.control".into(), why });
        }
    }
    Ok(())
}

/// Whether two files have the same bytes.
fn are_same(a: &Path, b: &Path) -> Result<bool> {
    let read = |path: &Path, source| Error::Io { action: "read", path: path.to_owned(), source };
    let length = |path: &Path| Ok::<_, Error>(fs::metadata(path).map_err(|error| read(path, error))?.len());
    if length(a)? != length(b)? {
        return Ok(false);
    }
    Ok(fs::read(a).map_err(|error| read(a, error))? == fs::read(b).map_err(|error| read(b, error))?)
}

/// The most latent frames beyond a clip's own: the reference pictures of VACE, and the one of Animate; -1 of S2V, whose first frame is
/// its reference picture.
///
/// # Errors
/// Clips with different numbers of them that are to be in one batch.
pub(super) fn frames_beyond(dataset: &Dataset, dit: &DitConfig, batch: usize) -> Result<isize> {
    let count = |given: usize| dit.control.frames_beyond(given);
    let counts = || dataset.sources.iter().map(|source| count(source.companions.references.len()));
    let (least, most) = (counts().min().unwrap_or(count(0)), counts().max().unwrap_or(count(0)));
    if least != most && batch > 1 {
        let why = format!(
            "clips have {least} to {most} reference pictures, and a batch needs as many for each: set train.batch = 1 (and \
             train.accumulate), or give each clip as many"
        );
        return Err(Error::Setting { key: "data.references".into(), why });
    }
    Ok(most)
}

//! Adapter files as commands and recipes name them: `FILE[:STRENGTH]`.

use std::path::Path;

use candle_core::Device;
use models::adapter::files::AdapterSummary;
use models::adapter::{Adapters, Applied, LoraConfig, Place, Source, Target, apply, files};
use models::dit::DitConfig;
use models::expert::Expert;
use models::weights::{Checkpoint, Weights};

use crate::error::{Error, Result};
use crate::ui::Ui;

/// Names quoted where an adapter is left out in part.
const QUOTED: usize = 6;

/// The path and the strength of `FILE[:STRENGTH]`; 1 where none is given.
///
/// # Errors
/// A strength that is not finite.
pub fn with_strength<'a>(key: &str, argument: &'a str) -> Result<(&'a Path, f64)> {
    match argument.rsplit_once(':').map(|(path, strength)| (path, strength.parse::<f64>())) {
        Some((_, Ok(strength))) if !strength.is_finite() => {
            let why = format!("{argument}: the strength behind the colon must be a finite number");
            Err(Error::Setting { key: key.to_owned(), why })
        }
        Some((path, Ok(strength))) => Ok((path.as_ref(), strength)),
        // A colon may be part of a path.
        _ => Ok((argument.as_ref(), 1.0)),
    }
}

/// Reads the adapter at `path`, and tells what there is to know about it.
///
/// # Errors
/// A file that is no adapter, or a broken one.
pub fn source(path: &Path, strength: f64, ui: &Ui) -> Result<Source> {
    let file = files::read(path)?;
    file.notes.iter().for_each(|note| ui.note(note));
    Ok(Source { name: path.display().to_string(), file, strength })
}

/// The adapter of a recipe in the folder `from`, with path, rank and alpha settled.
///
/// # Errors
/// As `settled_rank`.
pub fn settled(mut config: LoraConfig, from: &Path) -> Result<LoraConfig> {
    let files = [&mut config.init_from, &mut config.init_from_high, &mut config.init_from_low];
    files.into_iter().flatten().for_each(|path| *path = from.join(&*path));
    config.rank = Some(settled_rank(&config)?);
    config.alpha = Some(config.alpha());
    Ok(config)
}

/// The rank that a run trains: the recipe's, else the largest in the files that it begins with, else the default.
///
/// # Errors
/// A file to begin with that is no adapter.
fn settled_rank(config: &LoraConfig) -> Result<usize> {
    if config.rank.is_some() {
        return Ok(config.rank());
    }
    let mut largest = 0;
    for path in [&config.init_from, &config.init_from_high, &config.init_from_low].into_iter().flatten() {
        let ranks = look_at(path)?.modules.into_values().map(|module| module.rank);
        largest = largest.max(ranks.max().unwrap_or(0));
    }
    Ok(if largest > 0 { largest } else { config.rank() })
}

/// What the adapter at `path` holds, by its header.
///
/// # Errors
/// A file that is no adapter, or that its header tells to be broken.
pub fn look_at(path: &Path) -> Result<AdapterSummary> {
    let path = files::locate(path).map_err(models::Error::from)?;
    let file = Checkpoint::open(&path).map_err(models::Error::from)?;
    Ok(files::summary(&path, &file)?)
}

/// Checks that the adapter at `path`, which `key` names, is not told to be for the other expert than `wanted`; any of the
/// two where a network for both, or for none, is wanted.
///
/// # Errors
/// The expert that its keys, its header or its name tell.
pub fn check_expert(key: &str, path: &Path, wanted: Option<Expert>) -> Result<()> {
    let at = files::locate(path).map_err(models::Error::from)?;
    let file = Checkpoint::open(&at).map_err(models::Error::from)?;
    let by_header = file.metadata().get("tandem.expert").map(String::as_str);
    let by_header = Expert::ALL.into_iter().find(|expert| by_header == Some(expert.suffix()));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let told = files::summary(&at, &file)?.expert.or(by_header).or(Expert::in_name(&name));
    match (told, wanted) {
        (Some(told), Some(wanted)) if told != wanted => Err(Error::Setting {
            key: key.to_owned(),
            why: format!(
                "{} is an adapter of the expert for {told} noise, and this is the one for {wanted} noise; name the file of the \
                 {} expert",
                path.display(),
                wanted.suffix()
            ),
        }),
        _ => Ok(()),
    }
}

/// The adapters that a network begins with: what the file holds, or fresh ones where there is none. `ui` hears what became of it.
///
/// # Errors
/// A file that cannot be begun with.
pub fn beginning(
    config: &LoraConfig,
    file: Option<&Path>,
    targets: &[Target],
    seed: u64,
    ui: &Ui,
) -> Result<Adapters> {
    let Some(path) = file else {
        return Ok(Adapters::fresh(targets, config, seed, &Device::Cpu)?);
    };
    let file = files::read(path)?;
    file.notes.iter().for_each(|note| ui.note(note));
    let (adapters, told) = Adapters::begun(targets, config, &file, seed, &Device::Cpu)?;
    told.iter().for_each(|line| ui.say(&format!("{}: {line}", path.display())));
    Ok(adapters)
}

/// Reads the adapters that the option `key` names.
///
/// # Errors
/// As [`source`] and [`with_strength`].
pub fn sources(key: &str, arguments: &[String], ui: &Ui) -> Result<Vec<Source>> {
    let read = |argument: &String| {
        let (path, strength) = with_strength(key, argument)?;
        source(path, strength, ui)
    };
    arguments.iter().map(read).collect()
}

/// Puts `sources` to a model, and tells what it has no place for. The adapters that go beside it, and its weights with all
/// else in them.
///
/// # Errors
/// Adapters of another model.
pub fn put(
    sources: &[Source],
    config: &DitConfig,
    weights: Weights,
    place: Place,
    ui: &Ui,
) -> Result<(Adapters, Weights)> {
    let Applied { adapters, patches, left_out } = apply(sources, config, place)?;
    for source in sources {
        let names: Vec<&str> = left_out
            .iter()
            .filter(|(name, _)| *name == source.name)
            .map(|(_, module)| module.as_str())
            .collect();
        if !names.is_empty() {
            let more = if names.len() > QUOTED { ", ..." } else { "" };
            let quoted = names[..names.len().min(QUOTED)].join(", ");
            ui.note(&format!(
                "{}: this model has no image branch, so {} of the adapter's modules are left out: {quoted}{more}",
                source.name,
                names.len()
            ));
        }
    }
    Ok((adapters, weights.patched(patches)))
}

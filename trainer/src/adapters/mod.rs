//! Adapter files as commands and recipes name them: `FILE[:STRENGTH]`.

pub mod candidate;
pub mod start_on;

use std::collections::BTreeSet;
use std::path::Path;

use kernels::Device;
use models::adapter::files::AdapterSummary;
use models::adapter::{Adapters, Applied, ApplyMode, LoraConfig, Source, Target, apply, files};
use models::dit::{DitConfig, LayerId};
use models::expert::Expert;
use models::names::split_layer;
use models::weights::{Checkpoint, Weights};

use crate::error::{Error, Result};
use crate::paths::existing;
use crate::watch::ui::Ui;

/// Keys of the files that training begins with.
pub const INIT_FROM: &str = "adapter.init_from";
/// That of the expert for high noise alone.
pub const INIT_FROM_HIGH: &str = "adapter.init_from_high";
/// That of the expert for low noise alone.
pub const INIT_FROM_LOW: &str = "adapter.init_from_low";

/// Names quoted where an adapter is left out in part.
const QUOTED: usize = 6;

/// The path and the strength of `FILE[:STRENGTH]`; 1 where none is given.
///
/// # Errors
/// If the strength is not a finite number.
pub fn with_strength<'a>(key: &str, argument: &'a str) -> Result<(&'a Path, f64)> {
    match argument.rsplit_once(':').map(|(path, strength)| (path, strength.parse::<f64>())) {
        Some((_, Ok(strength))) if !strength.is_finite() => {
            let why = format!("{argument}: the strength after the colon must be a finite number");
            Err(Error::Setting { key: key.to_owned(), why })
        }
        Some((path, Ok(strength))) => Ok((path.as_ref(), strength)),
        Some((path, Err(_))) if !Path::new(argument).exists() && Path::new(path).exists() => {
            let why = format!(
                "{argument}: the strength after the colon is not a number; write it as in {path}:0.8"
            );
            Err(Error::Setting { key: key.to_owned(), why })
        }
        // A colon may be part of a path.
        _ => Ok((argument.as_ref(), 1.0)),
    }
}

/// Reads the adapter at `path`, and prints notes about it.
///
/// # Errors
/// If the file is not an adapter, or damaged.
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
    for (key, file) in [
        (INIT_FROM, &mut config.init_from),
        (INIT_FROM_HIGH, &mut config.init_from_high),
        (INIT_FROM_LOW, &mut config.init_from_low),
    ] {
        if let Some(path) = file {
            *path = existing(key, from, path)?;
        }
    }
    start_on::settle(&mut config.start_on, from)?;
    config.rank = Some(settled_rank(&config)?);
    // Without one, each module's alpha is its own rank.
    if config.rank_by_module.is_empty() {
        config.alpha = Some(config.alpha());
    }
    Ok(config)
}

/// The rank that a run trains: the recipe's, else the largest in the files that it begins with, else the default.
///
/// # Errors
/// If the initial file is not an adapter.
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

/// Checks by its header that `targets` can begin with the adapter at `path`, which `key` names.
///
/// # Errors
/// Those of [`Adapters::begun`] that the header shows.
pub fn check_beginning(
    key: &str,
    path: &Path,
    config: &LoraConfig,
    (targets, dit): (&[Target], &DitConfig),
) -> Result<()> {
    let held = look_at(path)?;
    models::adapter::check_beginning(targets, config, dit, &held).map_err(|error| of_file(key, path, error))
}

/// Checks by its header that the adapter at `path`, which `key` names, has the widths of the model `dit`.
///
/// # Errors
/// The first module of another width.
pub fn check_widths(key: &str, path: &Path, dit: &DitConfig) -> Result<()> {
    let held = look_at(path)?.modules;
    for (module, out, input) in dit.adaptable_modules() {
        if let Some(other) = held.get(&module).filter(|held| held.kind.is_some())
            && (other.output, other.input) != (out, input)
        {
            let why = format!(
                "it changes {module} ({} x {}), and the model has it {out} x {input}; it was made for another model",
                other.output, other.input
            );
            return Err(of_file(key, path, models::Error::Mismatch(why)));
        }
    }
    Ok(())
}

/// `error` with the file that caused it, and the key that names it, unless it names the file itself.
fn of_file(key: &str, path: &Path, error: models::Error) -> Error {
    match error {
        models::Error::Mismatch(why) => {
            Error::Setting { key: key.to_owned(), why: format!("{}: {why}", path.display()) }
        }
        other => other.into(),
    }
}

/// What the adapter at `path` holds, by its header.
///
/// # Errors
/// If the file is not an adapter, or its header shows that it is damaged.
pub fn look_at(path: &Path) -> Result<AdapterSummary> {
    let path = files::locate(path).map_err(models::Error::from)?;
    let file = Checkpoint::open(&path).map_err(models::Error::from)?;
    Ok(files::summary(&path, &file)?)
}

/// Checks that the adapter at `path`, which `key` names, is not marked as one for the other expert than `wanted`, or for any
/// expert if `wanted` is a single network.
///
/// # Errors
/// The expert in its keys, its header or its name.
pub fn check_expert(key: &str, path: &Path, wanted: Option<Expert>) -> Result<()> {
    match (marked_expert(path)?, wanted) {
        (Some(marked), Some(wanted)) if marked != wanted => Err(Error::Setting {
            key: key.to_owned(),
            why: format!(
                "{} is an adapter of the expert for {marked} noise, and this is the one for {wanted} noise; name the file of the \
                 {} expert",
                path.display(),
                wanted.suffix()
            ),
        }),
        _ => Ok(()),
    }
}

/// The expert that the adapter at `path` was made for, by its keys, its header or its name.
///
/// # Errors
/// If the file is not an adapter.
fn marked_expert(path: &Path) -> Result<Option<Expert>> {
    let at = files::locate(path).map_err(models::Error::from)?;
    let file = Checkpoint::open(&at).map_err(models::Error::from)?;
    let by_header = file.metadata().get("tandem.expert").map(String::as_str);
    let by_header = Expert::ALL.into_iter().find(|expert| by_header == Some(expert.suffix()));
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(files::summary(&at, &file)?.expert.or(by_header).or(Expert::in_name(&name)))
}

/// Checks that none of the adapters of the option `key` is marked as one for the other expert than `wanted`; the message says
/// to give it with `instead`, in which `EXPERT` is replaced by the expert's name.
///
/// # Errors
/// For the first that is.
pub fn check_experts(key: &str, arguments: &[String], wanted: Expert, instead: &str) -> Result<()> {
    for argument in arguments {
        let (path, _) = with_strength(key, argument)?;
        if let Some(marked) = marked_expert(path)?.filter(|marked| *marked != wanted) {
            let why = format!(
                "{} is an adapter of the expert for {marked} noise, and would change the one for {wanted} noise; use {}",
                path.display(),
                instead.replace("EXPERT", marked.name())
            );
            return Err(Error::Setting { key: key.to_owned(), why });
        }
    }
    Ok(())
}

/// The initial adapters of a network: from the file, or fresh ones without a file. Prints what was done to `ui`.
///
/// # Errors
/// If the file cannot be used.
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
    let own = [(INIT_FROM_HIGH, &config.init_from_high), (INIT_FROM_LOW, &config.init_from_low)];
    let key = own.into_iter().find(|(_, own)| own.as_deref() == Some(path)).map_or(INIT_FROM, |(key, _)| key);
    let begun = Adapters::begun(targets, config, &file, seed, &Device::Cpu);
    let (adapters, lines) = begun.map_err(|error| of_file(key, path, error))?;
    lines.iter().for_each(|line| ui.say(&format!("{}: {line}", path.display())));
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

/// Applies `sources` to a model and notes the modules that it does not have. Returns the adapters that stay unmerged, and the
/// weights with everything else merged.
///
/// # Errors
/// If an adapter is for another model.
pub fn put(
    sources: &[Source],
    config: &DitConfig,
    weights: Weights,
    mode: ApplyMode,
    ui: &Ui,
) -> Result<(Adapters, Weights)> {
    let Applied { adapters, patches, left_out } = apply(sources, config, mode)?;
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
    for source in sources {
        let notes = gaps(source, config).into_iter().chain(untouched_chain(source, config));
        notes.for_each(|note| ui.note(&note));
    }
    Ok((adapters, weights.patched(patches)))
}

/// What an adapter of the plain model leaves unchanged in a model with a side chain.
fn untouched_chain(source: &Source, config: &DitConfig) -> Option<String> {
    let is_side =
        |module: &String| split_layer(module).is_some_and(|(layer, _)| layer.chain() == LayerId::SIDE_BLOCKS);
    let is_untouched = config.control.side_chain.is_some() && !source.file.modules.keys().any(is_side);
    is_untouched.then(|| {
        format!(
            "{}: it changes the main blocks alone; the side chain (vace_blocks) is unchanged",
            source.name
        )
    })
}

/// The modules that an adapter changes in some blocks of a chain but not in others: a sign of an incomplete file, or done on
/// purpose.
fn gaps(source: &Source, config: &DitConfig) -> Option<String> {
    let changed = &source.file.modules;
    let kind = |module: &str| split_layer(module).map(|(layer, kind)| (layer.chain(), kind.to_owned()));
    let kinds: BTreeSet<(&str, String)> = changed.keys().filter_map(|module| kind(module)).collect();
    let modules = config.adaptable_modules().into_iter().map(|(module, ..)| module);
    let is_gap = |module: &String| {
        kind(module).is_some_and(|kind| kinds.contains(&kind)) && !changed.contains_key(module)
    };
    let gaps: Vec<String> = modules.filter(is_gap).collect();
    (!gaps.is_empty()).then(|| {
        let more = if gaps.len() > QUOTED { ", ..." } else { "" };
        let quoted = gaps[..gaps.len().min(QUOTED)].join(", ");
        format!(
            "{}: {} modules are unchanged that it changes in other blocks: {quoted}{more}; unless it was trained so, the file \
             is incomplete or of a smaller model",
            source.name,
            gaps.len()
        )
    })
}

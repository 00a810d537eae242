//! Adapters that are added to the base for the time of a training: what is learnt is the difference to that.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use models::adapter::{AdapterKind, ApplyMode, LoraConfig, StartOn, files};
use models::dit::DitConfig;
use models::expert::Expert;
use models::weights::Weights;
use sha2::{Digest, Sha256};

use super::{check_expert, check_widths, put, source};
use crate::base::DitFiles;
use crate::bytes::hex;
use crate::error::{Error, Result};
use crate::learning::NoiseRange;
use crate::paths::existing;
use crate::watch::ui::Ui;

/// The key of these adapters.
pub const START_ON: &str = "adapter.start_on";

/// Bytes that are hashed at once.
const PIECE: usize = 1 << 20;

/// An adapter of [`START_ON`] with the network that it is for.
#[derive(Debug, Clone, PartialEq)]
pub struct Fused {
    /// The expert, of a model of two.
    pub expert: Option<Expert>,
    /// Its file, or its PEFT folder.
    pub path: PathBuf,
    /// What its changes are multiplied by.
    pub strength: f64,
}

fn refuse<T>(why: String) -> Result<T> {
    Err(Error::Setting { key: START_ON.to_owned(), why })
}

/// Settles paths, which begin in the folder `from`, and the hashes of their files.
///
/// # Errors
/// A file that is not there, or has another hash than the recipe says.
pub(super) fn settle(all: &mut [StartOn], from: &Path) -> Result<()> {
    for one in all {
        one.path = existing(START_ON, from, &one.path)?;
        let found = hash(&files::locate(&one.path).map_err(models::Error::from)?)?;
        if let Some(asked) = one.sha256.as_ref().filter(|asked| !asked.eq_ignore_ascii_case(&found)) {
            return refuse(format!(
                "{} has the SHA-256 {found}, and {asked} was asked for",
                one.path.display()
            ));
        }
        one.sha256 = Some(found);
    }
    Ok(())
}

fn hash(path: &Path) -> Result<String> {
    let io = |source| Error::Io { action: "read", path: path.to_owned(), source };
    let (mut file, mut hash) = (File::open(path).map_err(io)?, Sha256::new());
    let mut piece = vec![0; PIECE];
    loop {
        match file.read(&mut piece).map_err(io)? {
            0 => return Ok(hex(&hash.finalize())),
            read => hash.update(&piece[..read]),
        }
    }
}

/// Checks by their headers that the adapters of `config` fit the networks `ranges` of the sizes `dit`, that are trained.
///
/// # Errors
/// An adapter of another model or expert, and settings that have no meaning.
pub fn check(config: &LoraConfig, ranges: &[NoiseRange], dit: &DitConfig) -> Result<()> {
    if config.kind == AdapterKind::Dora && !config.start_on.is_empty() {
        return refuse("a DoRA holds the lengths of the weights that it is trained on, so it would be no difference: train a LoRA".into());
    }
    for one in &config.start_on {
        let path = one.path.display();
        if !one.strength.is_finite() || one.strength == 0.0 {
            return refuse(format!("{path}: strength is {}; it must be a number other than 0", one.strength));
        }
        let of_all: Vec<Option<Expert>> = ranges.iter().map(|range| range.expert()).collect();
        let of_it: Vec<Option<Expert>> = trained(one, &of_all).collect();
        if of_it.is_empty() {
            let expert = one.expert.map_or_else(String::new, |expert| format!(" for {expert} noise"));
            return refuse(format!("{path}: no expert{expert} is trained; leave out expert, or train it"));
        }
        check_widths(START_ON, &one.path, dit)?;
        of_it.into_iter().try_for_each(|expert| check_expert(START_ON, &one.path, expert))?;
    }
    Ok(())
}

/// Those of the trained networks that `one` is for.
fn trained(one: &StartOn, experts: &[Option<Expert>]) -> impl Iterator<Item = Option<Expert>> {
    let wanted = one.expert;
    experts.iter().copied().filter(move |expert| wanted.is_none() || *expert == wanted)
}

/// The adapters of `config`, one by one for each of the networks `ranges` that are trained.
pub fn fused(config: &LoraConfig, ranges: &[NoiseRange]) -> Vec<Fused> {
    let experts: Vec<Option<Expert>> = ranges.iter().map(|range| range.expert()).collect();
    let of = |one: &StartOn| -> Vec<Fused> {
        let all = trained(one, &experts);
        all.map(|expert| Fused { expert, path: one.path.clone(), strength: one.strength }).collect()
    };
    config.start_on.iter().flat_map(of).collect()
}

/// The network of `files` for `expert`, with those of the adapters `fused` that are for it added to its weights as they are read.
///
/// # Errors
/// Files that cannot be read, and an adapter for another model.
pub fn opened(
    files: &DitFiles,
    (fused, expert): (&[Fused], Option<Expert>),
    ui: &Ui,
) -> Result<(DitConfig, Weights)> {
    let (config, weights) = files.open()?;
    let own = fused.iter().filter(|one| one.expert == expert);
    let sources = own.map(|one| source(&one.path, one.strength, ui)).collect::<Result<Vec<_>>>()?;
    if sources.is_empty() {
        return Ok((config, weights));
    }
    let (_, weights) = put(&sources, &config, weights, ApplyMode::Merged, ui)?;
    Ok((config, weights))
}

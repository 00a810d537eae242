//! An adapter that is tried beside others: one file, or one for each expert.

use std::path::{Path, PathBuf};

use models::adapter::{Source, files};
use models::dit::DitConfig;
use models::expert::Expert;

use super::{check_widths, marked_expert, source};
use crate::error::{Error, Result};
use crate::watch::ui::Ui;

/// Who names it.
const KEY: &str = "ADAPTER";

/// An adapter by its files.
#[derive(Debug, Clone)]
pub struct Candidate {
    name: String,
    /// Each file, or PEFT folder, with the expert that it is for; any where nothing says so.
    files: Vec<(PathBuf, Option<Expert>)>,
    bytes: u64,
}

impl Candidate {
    /// Those of `FILE[,FILE]`.
    ///
    /// # Errors
    /// What is no adapter.
    pub fn read(text: &str) -> Result<Self> {
        // A comma may be part of a path.
        let paths: Vec<&str> = if Path::new(text).exists() { vec![text] } else { text.split(',').collect() };
        let (mut all, mut bytes) = (Vec::new(), 0);
        for path in paths.iter().map(Path::new) {
            let file = files::locate(path).map_err(models::Error::from)?;
            let io = |source| Error::Io { action: "read", path: file.clone(), source };
            bytes += std::fs::metadata(&file).map_err(io)?.len();
            all.push((path.to_owned(), marked_expert(path)?));
        }
        let name = |(path, _): &(PathBuf, Option<Expert>)| {
            path.file_stem().map(|stem| stem.to_string_lossy().into_owned())
        };
        let name = all.first().and_then(name).unwrap_or_else(|| "adapter".into());
        Ok(Self { name, files: all, bytes })
    }

    /// The name of its first file, without its ending.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of its files.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Checks that each of its files fits the model `dit`, whose networks are for `experts`, and that one is for some of them.
    ///
    /// # Errors
    /// A file of another model, of another expert, or two for one network.
    pub fn check(&self, dit: &DitConfig, experts: &[Option<Expert>]) -> Result<()> {
        for (path, marked) in &self.files {
            check_widths(KEY, path, dit)?;
            let serves = experts.iter().any(|expert| is_for(*marked, *expert));
            if let (Some(marked), false) = (marked, serves) {
                let why = format!(
                    "{} is an adapter of the expert for {marked} noise, and this model is not",
                    path.display()
                );
                return Err(Error::Setting { key: KEY.into(), why });
            }
        }
        let most = experts.iter().map(|expert| self.files(*expert, 1.0).len()).max().unwrap_or(0);
        if most > 1 {
            let why = format!(
                "{}: {most} of its files are for one network; files with a comma between are one adapter, of which each is for an expert",
                self.name
            );
            return Err(Error::Setting { key: KEY.into(), why });
        }
        Ok(())
    }

    /// Its files for the network of `expert`, each with `strength`.
    pub fn files(&self, expert: Option<Expert>, strength: f64) -> Vec<(PathBuf, f64)> {
        let own = self.files.iter().filter(|(_, marked)| is_for(*marked, expert));
        own.map(|(path, _)| (path.clone(), strength)).collect()
    }

    /// The same, read.
    ///
    /// # Errors
    /// A file that is damaged.
    pub fn sources(&self, expert: Option<Expert>, ui: &Ui) -> Result<Vec<Source>> {
        self.files(expert, 1.0).iter().map(|(path, strength)| source(path, *strength, ui)).collect()
    }
}

/// Whether a file that is marked for an expert is for the network of `expert`.
fn is_for(marked: Option<Expert>, expert: Option<Expert>) -> bool {
    marked.is_none() || expert.is_none() || marked == expert
}

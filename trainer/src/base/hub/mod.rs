//! Models of the Hugging Face hub: found in its cache, which is shared with Python, or fetched into it.
//!
//! A file is downloaded to its hash with the suffix `.incomplete`, resumed after an interruption, and accepted only if its
//! length and its hash are those of the hub: SHA-256 for large files, git's for small ones. The crate `hf-hub` implements the
//! layout of the cache; it neither resumes nor verifies downloads, so they are done here.

mod api;
mod dataset;
mod download;
mod error;
mod hash;
mod redirect;
mod settings;
mod store;
mod wanted;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

pub use dataset::{HubDataset, SCHEME};
pub use error::HubError;
pub use settings::HubSettings;
pub use wanted::Wanted;

use crate::watch::ui::Ui;
use api::{Api, RemoteFile};
use store::Store;

/// The result of asking the hub.
pub type Result<T, E = HubError> = std::result::Result<T, E>;

/// A model of the hub: `owner/name`, or `owner/name@revision` for another revision than `main`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `owner/name`.
    pub repository: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// What it is.
    pub kind: RepoKind,
}

/// What a repository of the hub holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    /// A model.
    Model,
    /// A dataset.
    Dataset,
}

impl FromStr for HubId {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let is_word = |word: &str| {
            let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !word.is_empty() && !word.starts_with('.') && word.chars().all(is_plain)
        };
        let is_repository =
            repository.split_once('/').is_some_and(|(owner, name)| is_word(owner) && is_word(name));
        match is_repository && revision.split('/').all(is_word) {
            true => {
                let (repository, revision) = (repository.to_owned(), revision.to_owned());
                Ok(Self { repository, revision, kind: RepoKind::Model })
            }
            false => Err(HubError::Id { text: text.to_owned() }),
        }
    }
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.repository),
            revision => write!(f, "{}@{revision}", self.repository),
        }
    }
}

/// The hub with its connection settings.
#[derive(Debug)]
pub struct Hub {
    settings: HubSettings,
}

impl Hub {
    /// The hub with these settings; makes no request.
    pub fn new(settings: HubSettings) -> Self {
        Self { settings }
    }

    /// The folder of a model in the cache, whole or in part; `None` if it was never fetched. Makes no request to the
    /// network.
    pub fn cached(&self, id: &HubId) -> Option<PathBuf> {
        Store::new(&self.settings.cache, id).snapshot()
    }

    /// Sees to it that what is `wanted` of a model lies in the cache, and says where. What is there is not fetched
    /// again; offline, or with no way to the hub, what is there is all that there is.
    ///
    /// # Errors
    /// A model that the hub does not have or does not give, a connection that does not come about, bytes that are not
    /// the announced ones, a disk that takes no more.
    pub fn fetch(&self, id: &HubId, wanted: &[Wanted], ui: &Ui) -> Result<PathBuf> {
        let lacks = |what: String| HubError::Lacks { id: id.to_string(), what };
        self.fetch_files(id, &|files: &[RemoteFile]| wanted::select(files, wanted).map_err(lacks), ui)
    }

    /// Sees to it that the files that `select` chooses of a repository lie in the cache, and says where.
    fn fetch_files(
        &self,
        id: &HubId,
        select: &dyn Fn(&[RemoteFile]) -> Result<Vec<RemoteFile>>,
        ui: &Ui,
    ) -> Result<PathBuf> {
        let store = Store::new(&self.settings.cache, id);
        if self.settings.is_offline {
            return store.snapshot().ok_or_else(|| HubError::Offline { id: id.to_string() });
        }
        self.settings.check()?;
        let api = Api::new(&self.settings);
        let listing = match (api.listing(id, ui), store.snapshot()) {
            (Err(error), Some(there)) if error.is_of_the_network() => {
                ui.note(&format!("{error}; continuing with the files in {}", there.display()));
                return Ok(there);
            }
            (listing, _) => listing?,
        };
        let missing: Vec<_> =
            select(&listing.files)?.into_iter().filter(|file| !store.has(&listing.commit, file)).collect();
        let bytes: u64 = missing.iter().map(|file| file.size).sum();
        if !missing.is_empty() {
            let size = crate::bytes::Bytes(bytes);
            ui.note(&format!(
                "fetching {} files of {id}, {size}, into {}",
                missing.len(),
                self.settings.cache.display()
            ));
        }
        for (i, file) in missing.iter().enumerate() {
            let label = format!("{}/{} {}", i + 1, missing.len(), file.name);
            download::download(&api, id, &listing.commit, file, &store, &ui.bytes_bar(label, file.size), ui)?;
        }
        store.refer(&listing.commit)?;
        Ok(store.folder_of(&listing.commit))
    }
}

/// How long to wait before the attempt after `failures` failed ones in a row: 1, 2, 4, ... up to 32 times the first.
fn pause(first: Duration, failures: u32) -> Duration {
    first * 2u32.pow(failures.saturating_sub(1).min(5))
}

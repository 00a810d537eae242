//! The hub's cache on disk: `models--owner--name/{refs,snapshots,blobs}` (`datasets--owner--name`), as Python's `huggingface_hub` lays it out.

use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::api::RemoteFile;
use super::{HubError, HubId, RepoKind, Result};

/// The cache of one model.
pub(super) struct Store {
    repo: CacheRepo,
    folder: PathBuf,
    id: HubId,
}

impl Store {
    pub fn new(cache: &Path, id: &HubId) -> Self {
        let kind = match id.kind {
            RepoKind::Model => RepoType::Model,
            RepoKind::Dataset => RepoType::Dataset,
        };
        let repo = Repo::with_revision(id.repository.clone(), kind, id.revision.clone());
        let folder = cache.join(repo.folder_name());
        Self { repo: Cache::new(cache.to_owned()).repo(repo), folder, id: id.clone() }
    }

    /// The folder of the revision, where it was fetched before.
    pub fn snapshot(&self) -> Option<PathBuf> {
        let referred = fs::read_to_string(self.folder.join("refs").join(&self.id.revision));
        // A commit is its own revision.
        let commit = referred.map_or_else(|_| self.id.revision.clone(), |text| text.trim().to_owned());
        Some(self.folder_of(&commit)).filter(|folder| folder.is_dir())
    }

    /// The folder of a commit.
    pub fn folder_of(&self, commit: &str) -> PathBuf {
        self.repo.pointer_path(commit)
    }

    /// Whether the complete file of a commit is in the cache.
    pub fn has(&self, commit: &str, file: &RemoteFile) -> bool {
        fs::metadata(self.folder_of(commit).join(&file.name)).is_ok_and(|found| found.len() == file.size)
    }

    /// The path of a file's contents, by their hash.
    pub fn blob(&self, file: &RemoteFile) -> PathBuf {
        self.folder.join("blobs").join(&file.hash)
    }

    /// Shows the bytes of a file under its name in a commit.
    pub fn show(&self, commit: &str, file: &RemoteFile) -> Result<()> {
        let (blob, shown) = (self.blob(file), self.folder_of(commit).join(&file.name));
        let parent = shown.parent().unwrap_or(&shown);
        fs::create_dir_all(parent).map_err(HubError::io("make", parent))?;
        // An older link, or one whose target was deleted.
        if fs::symlink_metadata(&shown).is_ok() {
            fs::remove_file(&shown).map_err(HubError::io("replace", &shown))?;
        }
        let up = "../".repeat(file.name.matches('/').count() + 2);
        link(Path::new(&format!("{up}blobs/{}", file.hash)), &blob, &shown)
            .map_err(HubError::io("link", &shown))
    }

    /// Notes which commit the revision is.
    pub fn refer(&self, commit: &str) -> Result<()> {
        if self.id.revision == commit {
            return Ok(());
        }
        self.repo.create_ref(commit).map_err(HubError::io("write refs in", &self.folder))
    }
}

/// A link that survives moving the cache, where the system has such links.
#[cfg(unix)]
fn link(relative: &Path, _blob: &Path, shown: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(relative, shown)
}

/// Two names of one file, which need no rights that users lack.
#[cfg(not(unix))]
fn link(_relative: &Path, blob: &Path, shown: &Path) -> std::io::Result<()> {
    fs::hard_link(blob, shown)
}

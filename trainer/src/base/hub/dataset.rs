//! Datasets of the hub whose clips are files.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use data::media::{PICTURE_EXTENSIONS, VIDEO_EXTENSIONS};

use super::api::RemoteFile;
use super::store::Store;
use super::{Hub, HubError, HubId, RepoKind, Result};
use crate::watch::ui::Ui;

/// How a dataset of the hub begins where folders are named.
pub const SCHEME: &str = "hf://";
/// Extensions of captions, lists of clips and shards.
const TEXTS: [&str; 5] = ["txt", "json", "jsonl", "csv", "tar"];

/// `hf://owner/name`, with `@revision` and a folder or a pattern of tar files behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubDataset {
    /// The repository.
    pub id: HubId,
    /// The folder in it, or a path whose last part may have stars; empty for all of it.
    pub place: String,
}

impl FromStr for HubDataset {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self> {
        let invalid = || HubError::DatasetId { text: text.to_owned() };
        let rest = text.strip_prefix(SCHEME).ok_or_else(invalid)?.trim_end_matches('/');
        let rest = rest.strip_prefix("datasets/").unwrap_or(rest);
        let mut parts = rest.splitn(3, '/');
        let (owner, name) = parts.next().zip(parts.next()).ok_or_else(invalid)?;
        let id: HubId = format!("{owner}/{name}").parse().map_err(|_| invalid())?;
        let place = parts.next().unwrap_or_default();
        let is_part = |part: &str| !["", ".", ".."].contains(&part) && !part.contains('\\');
        if !place.is_empty() && !place.split('/').all(is_part) {
            return Err(invalid());
        }
        Ok(Self { id: HubId { kind: RepoKind::Dataset, ..id }, place: place.to_owned() })
    }
}

impl std::fmt::Display for HubDataset {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{SCHEME}{}", self.id)?;
        if self.place.is_empty() { Ok(()) } else { write!(f, "/{}", self.place) }
    }
}

impl HubDataset {
    /// Whether a file of the repository is read as a part of it.
    fn takes(&self, name: &str) -> bool {
        let extension = Path::new(name).extension().unwrap_or_default().to_string_lossy().to_lowercase();
        let audio = &data::audio::AUDIO_EXTENSIONS[..];
        let all = [&VIDEO_EXTENSIONS[..], &PICTURE_EXTENSIONS, audio, &TEXTS];
        let is_inside = self.place.is_empty()
            || name.strip_prefix(&self.place).is_some_and(|rest| rest.starts_with('/'))
            || data::glob::matches(&self.place, name);
        is_inside && all.iter().any(|kind| kind.contains(&extension.as_str()))
    }

    /// Its files, small ones first; nothing where none of them is a clip or a shard.
    fn files(&self, all: &[RemoteFile]) -> Option<Vec<RemoteFile>> {
        let mut files: Vec<RemoteFile> = all.iter().filter(|file| self.takes(&file.name)).cloned().collect();
        files.sort_by(|a, b| (a.size, &a.name).cmp(&(b.size, &b.name)));
        let is_clip = |file: &RemoteFile| {
            let ending = file.name.rsplit('.').next().unwrap_or_default().to_lowercase();
            let clips = VIDEO_EXTENSIONS.iter().chain(&PICTURE_EXTENSIONS).chain(&["tar"]);
            clips.into_iter().any(|extension| *extension == ending)
        };
        files.iter().any(is_clip).then_some(files)
    }
}

impl Hub {
    /// Where the files of a dataset are in the cache; `None` if it was never fetched. Makes no request to the network.
    pub fn cached_dataset(&self, dataset: &HubDataset) -> Option<PathBuf> {
        let place = Store::new(&self.settings.cache, &dataset.id).snapshot()?.join(&dataset.place);
        let is_pattern = dataset.place.contains(['*', '?']);
        let there = if is_pattern { place.parent()? } else { place.as_path() };
        there.exists().then_some(place)
    }

    /// Sees to it that a dataset lies in the cache, and says where, as [`Hub::fetch`].
    ///
    /// # Errors
    /// As there, and a dataset without clips that are files.
    pub fn fetch_dataset(&self, dataset: &HubDataset, ui: &Ui) -> Result<PathBuf> {
        let select = |files: &[RemoteFile]| {
            dataset.files(files).ok_or_else(|| HubError::NoClips { dataset: dataset.to_string() })
        };
        Ok(self.fetch_files(&dataset.id, &select, ui)?.join(&dataset.place))
    }
}

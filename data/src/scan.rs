//! From folders on disk to items: each clip with its caption, in an order that never depends on the file system.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::captions::{CaptionRules, CaptionSource, Front, PerFile, Texts};
use crate::config::{DataConfig, EmptyCaptions, MaskPlace, Stills, masked_clip};
use crate::error::{DataError, Result};
use crate::media::{Media, PICTURE_EXTENSIONS, VIDEO_EXTENSIONS};
use crate::metadata;
use crate::named::Named;
use crate::skips::Skips;
use crate::unusable::{self, Unusable, Why};

/// Marks a folder as a cache (see bford.info/cachedir); such folders are not searched.
pub const CACHE_MARKER: &str = "CACHEDIR.TAG";

/// One clip to train on: a video, an animated picture, a still, or a folder of numbered pictures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Path relative to its data folder, with forward slashes; with several data folders, prefixed with the folder.
    pub id: String,
    /// Where the pixels are.
    pub media: Media,
    /// The captions as they were found.
    pub found: Vec<String>,
    /// The first caption as it is trained, with prefix and trigger.
    pub caption: String,
    /// The texts of which one is drawn for each sample, where there are several; empty where that is always the caption.
    pub variants: Vec<String>,
    /// How often the clip is shown per epoch.
    pub repeats: u32,
    /// The set that it belongs to; 0 where there are no sets.
    pub set: usize,
    /// Whether the clip only serves to measure the held-out loss.
    pub held_out: bool,
    /// Files that metadata names as its companions.
    pub named: Named,
}

impl Item {
    /// Every text that the clip is trained or measured with.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&self.caption).chain(&self.variants).map(String::as_str)
    }

    /// The text of a sample: `drawn`, from 0 to below 1, says which.
    pub fn drawn(&self, drawn: f64) -> &str {
        let count = self.variants.len();
        self.variants.get((drawn * count as f64) as usize).unwrap_or(&self.caption)
    }
}

/// Finds every clip of the configured folders, sorted by relative path.
///
/// # Errors
/// An empty folder, clips whose captions are missing or cannot be read (all named at once, unless they are to be left out),
/// a metadata file that cannot be used, a held-out pattern that matches nothing, or everything held out.
pub fn scan(config: &DataConfig) -> Result<Vec<Item>> {
    let mut skips = Skips::default();
    let Found { items, unusable, .. } = find(config, ("", &[]), &mut skips)?;
    skips.check(config, &|_| false, items.iter().map(|item| item.id.as_str()))?;
    if !items.is_empty() {
        check_held_out(config, &items)?;
    }
    unusable::settle(unusable, config.bad, way_out(config.captions.source), 0.0)?;
    Ok(items)
}

/// The clips of folders.
#[derive(Default)]
pub(crate) struct Found {
    /// Those to train on.
    pub items: Vec<Item>,
    /// Those whose captions are missing or cannot be read.
    pub unusable: Vec<Unusable>,
    /// Those that are left out by name.
    pub skipped: Vec<Media>,
}

/// The clips of a set's folders, with the `set` in front of their names. Of columns of companions those are read that have the
/// meaning of one of `keys`.
pub(crate) fn find(
    config: &DataConfig,
    (set, keys): (&str, &[&'static str]),
    skips: &mut Skips,
) -> Result<Found> {
    let Found { mut items, mut unusable, mut skipped } = Found::default();
    for folder in &config.folder {
        let mut listing = Listing::of(folder)?;
        if config.loss_masks.as_ref().is_some_and(|masks| masks.from == MaskPlace::Beside) {
            listing.leave_out_masks(folder)?;
        }
        let captions = Captions::read(folder, &mut listing, &config.captions, keys)?;
        let before = items.len() + unusable.len() + skipped.len();
        for (relative, media) in listing.clips {
            if config.stills == Stills::Skip && matches!(media, Media::Still(_)) {
                continue;
            }
            let id = config.id_of(folder, &relative, set);
            if skips.take(config, &id, set) {
                skipped.push(media);
                continue;
            }
            let found = captions.of(&relative, &media);
            match found.map_err(Why::Fault).and_then(|found| item(config, &id, &media, found)) {
                Ok(item) => items.push(Item { named: captions.named(&relative), ..item }),
                Err(why) => unusable.push(Unusable { id, why }),
            }
        }
        if items.len() + unusable.len() + skipped.len() == before {
            return Err(DataError::Empty { folder: folder.clone() });
        }
    }
    if items.is_empty() && unusable.is_empty() && !skipped.is_empty() {
        let folders: Vec<String> = config.folder.iter().map(|folder| folder.display().to_string()).collect();
        let reason = format!("leaves out every clip in {}: leave out the folder", folders.join(", "));
        return Err(DataError::Config { key: "skip", reason });
    }
    items.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(Found { items, unusable, skipped })
}

impl DataConfig {
    /// The name of the clip `relative` of one of the folders, in the set called `set`.
    pub(crate) fn id_of(&self, folder: &Path, relative: &str, set: &str) -> String {
        let name = || self.folder_names.get(folder).cloned().unwrap_or_else(|| slashed(folder));
        let label = (self.folder.len() > 1).then(name);
        let places = [(!set.is_empty()).then_some(set), label.as_deref(), Some(relative)];
        places.into_iter().flatten().collect::<Vec<_>>().join("/")
    }
}

/// The clip `id` with the captions that were `found`.
fn item(
    config: &DataConfig,
    id: &str,
    media: &Media,
    found: Option<Vec<String>>,
) -> std::result::Result<Item, Why> {
    let found = found.ok_or(Why::NoCaption)?;
    if config.empty_captions == EmptyCaptions::Refuse && found.iter().any(String::is_empty) {
        return Err(Why::EmptyCaption);
    }
    let repeats = config.repeats_of(id);
    let item = item_of(config, (id, media.clone()), &found, repeats);
    item.map_err(|reason| Why::Fault(DataError::unreadable(media.path(), reason)))
}

/// The clip `id` with `captions` as they were found; why not.
pub(crate) fn item_of(
    config: &DataConfig,
    (id, media): (&str, Media),
    captions: &[String],
    repeats: u32,
) -> std::result::Result<Item, String> {
    let front = Front { trigger: config.trigger.as_deref(), prefix: &config.caption_prefix };
    let Texts { plain: caption, drawn } = config.captions.texts(front, id, captions)?;
    let variants = if drawn.iter().all(|text| *text == caption) { Vec::new() } else { drawn };
    let (id, found, held_out) = (id.to_owned(), captions.to_vec(), config.is_held_out(id));
    Ok(Item { id, media, found, caption, variants, repeats, set: 0, held_out, named: Named::default() })
}

pub(crate) fn way_out(source: CaptionSource) -> &'static str {
    match source {
        CaptionSource::Metadata => {
            "add each to metadata.jsonl or metadata.csv in its folder, or set data.captions = \"auto\""
        }
        CaptionSource::Txt => {
            "put a .txt file of the same name next to each (for a folder of pictures: next to the folder)"
        }
        CaptionSource::Auto => {
            "put a .txt file of the same name next to each (for a folder of pictures: next to the folder), or list \
             them in metadata.jsonl; data.empty_captions = \"allow\" accepts empty files"
        }
    }
}

pub(crate) fn check_held_out(config: &DataConfig, items: &[Item]) -> Result<()> {
    for pattern in &config.held_out {
        if !items.iter().any(|item| crate::glob::matches(pattern, &item.id)) {
            let known: Vec<&str> = items.iter().take(5).map(|item| item.id.as_str()).collect();
            let reason = format!("\"{pattern}\" matches no clip; clips are named like {}", known.join(", "));
            return Err(DataError::Config { key: "held_out", reason });
        }
    }
    if items.iter().all(|item| item.held_out) {
        let reason = "holds every clip out, so nothing is left to train on".into();
        return Err(DataError::Config { key: "held_out", reason });
    }
    Ok(())
}

/// The contents of a data folder.
#[derive(Default)]
pub(crate) struct Listing {
    /// Clips by relative path.
    pub clips: BTreeMap<String, Media>,
    /// Metadata files by relative folder ("" for the top).
    metadata: BTreeMap<String, PathBuf>,
}

impl Listing {
    pub(crate) fn of(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            let reason = format!(
                "there is no folder {}; the path is relative to the recipe's folder",
                folder.display()
            );
            return Err(DataError::Config { key: "folder", reason });
        }
        let mut listing = Self::default();
        let mut visited = BTreeSet::new();
        listing.walk(folder, "", &mut visited)?;
        Ok(listing)
    }

    fn walk(&mut self, folder: &Path, relative: &str, visited: &mut BTreeSet<PathBuf>) -> Result<()> {
        // A link back to a folder above would otherwise be followed for ever.
        let canonical = folder.canonicalize().map_err(DataError::io("open the folder", folder))?;
        if !visited.insert(canonical) {
            return Ok(());
        }
        let entries = sorted_entries(folder)?;
        if !relative.is_empty() && entries.iter().any(|(name, _)| name == CACHE_MARKER) {
            return Ok(());
        }
        self.note_metadata(relative, &entries)?;
        if !relative.is_empty()
            && let Some(files) = numbered_pictures(&entries)
        {
            return self.add(relative.to_string(), Media::Pictures { folder: folder.to_path_buf(), files });
        }
        for (name, path) in entries {
            let below = if relative.is_empty() { name } else { format!("{relative}/{name}") };
            if path.is_dir() {
                self.walk(&path, &below, visited)?;
            } else if let Some(media) = media_of(&path) {
                self.add(below, media)?;
            }
        }
        Ok(())
    }

    /// Leaves out what is the mask of another clip.
    pub(crate) fn leave_out_masks(&mut self, folder: &Path) -> Result<()> {
        let is_folder = |media: &Media| matches!(media, Media::Pictures { .. });
        let masked: BTreeMap<String, String> = self
            .clips
            .iter()
            .filter_map(|(name, media)| Some((name.clone(), masked_clip(name, is_folder(media))?)))
            .collect();
        let stems: BTreeSet<PathBuf> = self.stems().collect();
        for (mask, clip) in &masked {
            if !stems.contains(Path::new(clip)) {
                let reason =
                    format!("there is no clip {clip} in {} that it could be the mask of", folder.display());
                return Err(DataError::unreadable(folder.join(mask), reason));
            }
            self.clips.remove(mask);
        }
        Ok(())
    }

    /// The clips of a folder by their names without extension.
    pub(crate) fn stems(&self) -> impl Iterator<Item = PathBuf> {
        self.clips.iter().map(|(name, media)| match media {
            Media::Pictures { .. } => PathBuf::from(name),
            _ => Path::new(name).with_extension(""),
        })
    }

    /// Adds a clip; names that are not UTF-8 may look the same.
    fn add(&mut self, relative: String, media: Media) -> Result<()> {
        if self.clips.contains_key(&relative) {
            let reason = "another name differs from its name only in bytes that are not UTF-8 text; rename one of the two";
            return Err(DataError::unreadable(media.path(), reason));
        }
        self.clips.insert(relative, media);
        Ok(())
    }

    fn note_metadata(&mut self, relative: &str, entries: &[(String, PathBuf)]) -> Result<()> {
        for (name, path) in entries {
            if (name == "metadata.jsonl" || name == "metadata.csv")
                && self.metadata.insert(relative.to_string(), path.clone()).is_some()
            {
                return Err(DataError::Metadata {
                    path: path.clone(),
                    line: 1,
                    reason: "the folder has both metadata.csv and metadata.jsonl; keep one".into(),
                });
            }
        }
        Ok(())
    }
}

/// Visible entries of a folder, by name.
fn sorted_entries(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(DataError::io("list", folder))? {
        let entry = entry.map_err(DataError::io("list", folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') && name != "__pycache__" {
            entries.push((name, entry.path()));
        }
    }
    entries.sort();
    Ok(entries)
}

fn extension_of(path: &Path) -> String {
    path.extension().map(|extension| extension.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// The clip at `path`: a file, or a folder of numbered pictures; `None` if it is neither.
///
/// # Errors
/// A folder that cannot be listed.
pub fn media_at(path: &Path) -> Result<Option<Media>> {
    if path.is_dir() {
        let files = numbered_pictures(&sorted_entries(path)?);
        return Ok(files.map(|files| Media::Pictures { folder: path.to_path_buf(), files }));
    }
    Ok(if path.is_file() { media_of(path) } else { None })
}

fn media_of(path: &Path) -> Option<Media> {
    let extension = extension_of(path);
    if VIDEO_EXTENSIONS.contains(&extension.as_str()) {
        return Some(Media::Video(path.to_path_buf()));
    }
    if !PICTURE_EXTENSIONS.contains(&extension.as_str()) {
        return None;
    }
    let moves = crate::decode::animation::moves(path);
    Some(if moves { Media::Animation(path.to_path_buf()) } else { Media::Still(path.to_path_buf()) })
}

/// The pictures of a folder by number, if the folder is one clip: it holds at least two pictures and no other clip or
/// folder, their names are one prefix and a number, and neither a text file nor a metadata file captions them singly.
fn numbered_pictures(entries: &[(String, PathBuf)]) -> Option<Vec<PathBuf>> {
    let mut numbered = Vec::new();
    let mut prefix: Option<&str> = None;
    for (name, path) in entries {
        let extension = extension_of(path);
        if name == "metadata.jsonl" || name == "metadata.csv" || extension == "txt" || path.is_dir() {
            return None;
        }
        if VIDEO_EXTENSIONS.contains(&extension.as_str()) {
            return None;
        }
        if !PICTURE_EXTENSIONS.contains(&extension.as_str()) {
            continue;
        }
        let stem = name.strip_suffix(&name[name.rfind('.')?..])?;
        let letters = stem.trim_end_matches(|character: char| character.is_ascii_digit());
        let number: u64 = stem[letters.len()..].parse().ok()?;
        if *prefix.get_or_insert(letters) != letters || extension == "gif" {
            return None;
        }
        numbered.push((number, path.clone()));
    }
    numbered.sort();
    (numbered.len() >= 2).then(|| numbered.into_iter().map(|(_, path)| path).collect())
}

/// Captions of one data folder.
pub(crate) struct Captions {
    source: CaptionSource,
    per_file: PerFile,
    by_clip: BTreeMap<String, Vec<String>>,
    /// The files that accompany clips, by clip.
    named: BTreeMap<String, Named>,
}

impl Captions {
    /// Those of `folder`; files of `listing` that metadata names as companions are no clips and leave it.
    pub fn read(
        folder: &Path,
        listing: &mut Listing,
        rules: &CaptionRules,
        keys: &[&'static str],
    ) -> Result<Self> {
        let (source, per_file) = (rules.source, rules.per_file);
        let (mut by_clip, mut named, mut companions) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
        if source == CaptionSource::Txt {
            return Ok(Self { source, per_file, by_clip, named });
        }
        for (below, path) in &listing.metadata {
            let inside = |file: &str| match below.is_empty() {
                true => file.to_owned(),
                false => format!("{below}/{file}"),
            };
            for row in metadata::read(path, keys)? {
                let relative = inside(&row.file);
                companions.extend(row.companions.iter().map(|(_, file)| inside(file)));
                let own = Named::of(&row.companions, |file| folder.join(below).join(file));
                named.insert(relative.clone(), own);
                if !listing.clips.contains_key(&relative) {
                    let reason = format!("names {relative}, which is not a clip in {}", folder.display());
                    return Err(DataError::Metadata { path: path.clone(), line: row.line, reason });
                }
                if by_clip.insert(relative.clone(), row.captions).is_some() {
                    let reason = format!("names {relative}, which already has a caption");
                    return Err(DataError::Metadata { path: path.clone(), line: row.line, reason });
                }
            }
        }
        listing.clips.retain(|name, _| !companions.contains(name) || by_clip.contains_key(name));
        Ok(Self { source, per_file, by_clip, named })
    }

    /// Whether a metadata file has the caption of the clip.
    pub fn is_in_metadata(&self, relative: &str) -> bool {
        self.by_clip.contains_key(relative)
    }

    /// The files that accompany the clip.
    fn named(&self, relative: &str) -> Named {
        self.named.get(relative).cloned().unwrap_or_default()
    }

    fn of(&self, relative: &str, media: &Media) -> Result<Option<Vec<String>>> {
        if let Some(captions) = self.by_clip.get(relative) {
            return Ok(Some(captions.clone()));
        }
        if self.source == CaptionSource::Metadata {
            return Ok(None);
        }
        match caption_of(&beside(media, "txt"))? {
            Some(text) if self.per_file == PerFile::Lines && !text.is_empty() => {
                let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
                Ok(Some(lines.map(str::to_owned).collect()))
            }
            Some(text) => Ok(Some(vec![text])),
            None => listed_captions(&beside(media, "json")),
        }
    }
}

/// The file of a clip's caption, next to it: of a folder of pictures next to the folder.
pub(crate) fn beside(media: &Media, extension: &str) -> PathBuf {
    match media {
        Media::Pictures { folder, .. } => {
            let mut name = folder.as_os_str().to_os_string();
            name.push(".");
            name.push(extension);
            PathBuf::from(name)
        }
        _ => media.path().with_extension(extension),
    }
}

/// The captions in a JSON file: a list of texts, or an object with one or several; `None` if there is no such file.
fn listed_captions(path: &Path) -> Result<Option<Vec<String>>> {
    let Some(text) = caption_of(path)? else { return Ok(None) };
    let value = serde_json::from_str(&text).ok();
    let value: Option<serde_json::Value> = value;
    let of_object =
        |value: &serde_json::Value| metadata::CAPTION_COLUMNS.iter().find_map(|key| value.get(key).cloned());
    let value = value.map(|value| of_object(&value).unwrap_or(value));
    let captions = value.as_ref().and_then(metadata::one_or_several);
    let trimmed = captions.map(|all| all.iter().map(|caption| caption.trim().to_owned()).collect());
    let reason = "a JSON file of captions must hold a list of texts, such as [\"one\", \"another\"], or an object with \"caption\", \
                  \"prompt\" or \"text\"";
    trimmed.map(Some).ok_or_else(|| DataError::unreadable(path, reason))
}

/// The most bytes of a caption file: far more than the 512 tokens that the models read.
const MAX_CAPTION: u64 = 1 << 20;

/// The caption in a text file; `None` if there is no such file.
pub(crate) fn caption_of(path: &Path) -> Result<Option<String>> {
    let bytes = match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Ok(found) if found.is_file() && found.len() > MAX_CAPTION => {
            return Err(DataError::unreadable(path, "a caption of more than 1 MiB"));
        }
        _ => {
            crate::decode::check_regular(path)?;
            std::fs::read(path).map_err(DataError::io("read", path))?
        }
    };
    let text =
        String::from_utf8(bytes).map_err(|_| DataError::unreadable(path, "a caption must be UTF-8 text"))?;
    Ok(Some(text.trim_start_matches('\u{feff}').trim().to_string()))
}

fn slashed(path: &Path) -> String {
    path.to_string_lossy().replace('\\', "/").trim_end_matches('/').to_string()
}

//! The folders that the server reads and writes. Nothing outside of them is read, written or served, whatever a request says.

use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use crate::base::hub::HubSettings;
use crate::error::{Error, Result};

/// The folders as they are given.
#[derive(Debug, Clone)]
pub struct Folders {
    /// Runs.
    pub runs: PathBuf,
    /// Recipes, new ones too.
    pub recipes: PathBuf,
    /// Clips: folders of them, or folders with such folders.
    pub data: Vec<PathBuf>,
    /// Base models and adapters.
    pub models: Vec<PathBuf>,
    /// The server's own: queue, requests, gallery, token.
    pub state: PathBuf,
}

/// The folders, all of them there, by their canonical paths.
#[derive(Debug, Clone)]
pub(super) struct Places {
    pub runs: PathBuf,
    pub recipes: PathBuf,
    pub data: Vec<PathBuf>,
    pub models: Vec<PathBuf>,
    pub state: PathBuf,
    /// The cache of the Hugging Face hub, where models by name are.
    hub: Option<PathBuf>,
}

/// The most bytes of a name.
const NAME: usize = 80;

impl Places {
    /// Makes the folders that the server writes, and looks that the others are there.
    ///
    /// # Errors
    /// A folder that is not there or cannot be made.
    pub fn open(folders: &Folders) -> Result<Self> {
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { action, path, source }
        };
        for path in [&folders.runs, &folders.recipes, &folders.state] {
            std::fs::create_dir_all(path).map_err(io("create the folder", path))?;
        }
        for part in ["runs", "videos"] {
            let path = folders.state.join(part);
            std::fs::create_dir_all(&path).map_err(io("create the folder", &path))?;
        }
        let canonical = |path: &PathBuf| path.canonicalize().map_err(io("open the folder", path));
        Ok(Self {
            runs: canonical(&folders.runs)?,
            recipes: canonical(&folders.recipes)?,
            data: folders.data.iter().map(canonical).collect::<Result<_>>()?,
            models: folders.models.iter().map(canonical).collect::<Result<_>>()?,
            state: canonical(&folders.state)?,
            hub: HubSettings::from_environment().cache.canonicalize().ok(),
        })
    }

    fn roots(&self) -> impl Iterator<Item = &PathBuf> {
        let own = [&self.runs, &self.recipes, &self.state];
        own.into_iter().chain(&self.data).chain(&self.models).chain(&self.hub)
    }

    /// Whether `path`, as it is once all links are followed, is in one of the folders. What is not there yet is judged by the
    /// folder that it would be in.
    pub fn contain(&self, path: &Path) -> bool {
        let Some(real) = real(path) else { return false };
        self.roots().any(|root| real.starts_with(root))
    }

    /// The first text in `value` that names something outside of the folders, with its key. Relative paths start in `from`.
    pub fn stray(&self, value: &Value, from: &Path) -> Option<(String, String)> {
        self.stray_below(value, from, "")
    }

    fn stray_below(&self, value: &Value, from: &Path, key: &str) -> Option<(String, String)> {
        match value {
            Value::String(text) => {
                let stray = paths_in(text).find(|path| !self.is_fine(path, from));
                stray.map(|path| (key.to_owned(), path.to_owned()))
            }
            Value::Array(values) => values.iter().find_map(|value| self.stray_below(value, from, key)),
            Value::Object(table) => table.iter().find_map(|(name, value)| {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                self.stray_below(value, from, &key)
            }),
            _ => None,
        }
    }

    /// Whether `text` is no path, or one in the folders.
    fn is_fine(&self, text: &str, from: &Path) -> bool {
        let path = Path::new(text);
        let climbs = path.is_absolute() || path.components().any(|part| part == Component::ParentDir);
        let there = from.join(path);
        if !climbs && !there.exists() {
            return true;
        }
        self.contain(&there)
    }

    /// The folder of the run `name`.
    pub fn run(&self, name: &str) -> Option<PathBuf> {
        is_name(name).then(|| self.runs.join(name))
    }
}

/// The texts in a setting that may be paths: the setting itself, and what options of a prompt line name.
fn paths_in(text: &str) -> impl Iterator<Item = &str> {
    let options =
        text.split(" --").skip(1).filter_map(|option| option.split_once(' ').map(|(_, value)| value.trim()));
    std::iter::once(text).chain(options)
}

/// `path` with all links followed, as far as it is there; nothing where it then goes on through `..`.
fn real(path: &Path) -> Option<PathBuf> {
    let mut behind = Vec::new();
    let mut there = path;
    loop {
        if let Ok(real) = there.canonicalize() {
            return Some(behind.iter().rev().fold(real, |path: PathBuf, name| path.join(name)));
        }
        // A link to nothing is judged by nothing.
        if there.is_symlink() {
            return None;
        }
        behind.push(there.file_name()?.to_owned());
        there = match there.parent()? {
            parent if parent.as_os_str().is_empty() => Path::new("."),
            parent => parent,
        };
    }
}

/// Whether `name` is the name of one file or folder that is not hidden, in letters, digits, `-`, `_` and `.`.
pub(super) fn is_name(name: &str) -> bool {
    let is_fine = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && name.len() <= NAME && !name.starts_with('.') && name.chars().all(is_fine)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Links, `..`, absolute paths and options of prompts do not lead out.
    #[test]
    fn nothing_leads_out_of_the_folders() {
        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name);
        for folder in ["runs", "recipes/clips", "state", "secret"] {
            std::fs::create_dir_all(at(folder)).unwrap();
        }
        std::fs::write(at("secret/key.png"), "x").unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(at("secret"), at("recipes/link")).unwrap();
        let folders = Folders {
            runs: at("runs"),
            recipes: at("recipes"),
            data: Vec::new(),
            models: Vec::new(),
            state: at("state"),
        };
        let places = Places::open(&folders).unwrap();
        let outside = at("secret/key.png").display().to_string();
        let stray = |text: &str| {
            let value = serde_json::json!({ "data": [text] });
            places.stray(&value, &places.recipes).is_some()
        };
        assert!(places.contain(&at("recipes/clips/new/a.mp4")));
        for text in ["clips", "a fox, 24/7", "Wan-AI/Wan2.1-T2V-1.3B", "a fox --i clips/a.png --s 4"] {
            assert!(!stray(text), "{text} was refused");
        }
        let climbing = ["../secret/key.png", "link/key.png", "clips/../../secret", "/", &outside];
        let options = [format!("a fox --i {outside}"), "a fox --s 4 --ref ../secret/key.png".to_owned()];
        for text in climbing.into_iter().chain(options.iter().map(String::as_str)) {
            assert!(stray(text), "{text} was let through");
        }
        for name in ["", "..", ".hidden", "a/b", "a\\b", "a b", "a\0"] {
            assert!(!is_name(name), "{name:?} was taken for a name");
        }
    }
}

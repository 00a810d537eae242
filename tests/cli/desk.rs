//! A small complete project in a folder of its own, and the binary run in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use data::Film;
use tempfile::TempDir;

/// A recipe that trains for two steps on two clips.
const RECIPE: &str = r#"
[run]
folder = "run"
cache = "cache"

[model]
folder = "model"

[data]
folder = "clips"
sizes = [[16, 16]]
frames = [5]

[adapter]
rank = 2

[train]
steps = 2

[checkpoint]
every_steps = 2
"#;

/// A folder with `recipe.toml`, `model` and `clips`.
pub struct Desk {
    folder: TempDir,
}

/// What the program did.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Desk {
    /// A project that works: a tiny model in the official layout, two clips with captions.
    pub fn new() -> Self {
        let desk = Self { folder: tempfile::tempdir().unwrap() };
        let official = fixtures().join("repo_official_a14b");
        copy(&official.join("high_noise_model"), &desk.path("model"));
        copy(&official.join("google"), &desk.path("model/google"));
        for name in ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"] {
            fs::copy(official.join(name), desk.path("model").join(name)).unwrap();
        }
        fs::create_dir(desk.path("clips")).unwrap();
        data::write_gif(&desk.path("clips/a.gif"), &film(6), 16.0).unwrap();
        data::write_mp4(&desk.path("clips/b.mp4"), &film(9), 16.0).unwrap();
        desk.write("clips/a.txt", "a drifting cloud");
        desk.write("clips/b.txt", "a second cloud");
        desk.write("recipe.toml", RECIPE);
        desk
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.path(name), contents).unwrap();
    }

    /// Puts `new` in place of `old` in the recipe.
    pub fn change(&self, old: &str, new: &str) {
        let recipe = fs::read_to_string(self.path("recipe.toml")).unwrap();
        assert!(recipe.contains(old), "the recipe has no {old}");
        self.write("recipe.toml", recipe.replace(old, new));
    }

    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
        command.args(words).current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    /// Runs the binary in the folder.
    pub fn run(&self, words: &[&str]) -> Outcome {
        self.command(words).output().unwrap().into()
    }

    /// Runs `words`, which must be done well.
    pub fn succeed(&self, words: &[&str]) -> Outcome {
        let outcome = self.run(words);
        assert_eq!(outcome.code, Some(0), "{words:?}: {}", outcome.stderr);
        outcome
    }

    /// Runs `words`, which must be refused for a reason that the user can put right: exit code 2, one message with all of
    /// `told` in it, and nothing half-written. `plan` must leave no file at all.
    pub fn refuse(&self, words: &[&str], told: &[&str]) {
        let before = self.files();
        let outcome = self.run(words);
        outcome.assert_refused(told);
        self.assert_no_temporary_files();
        if words[0] == "plan" {
            assert_eq!(self.files(), before, "`plan` changed files");
        }
    }

    pub fn assert_no_temporary_files(&self) {
        let stray: Vec<_> =
            self.files().into_keys().filter(|path| path.extension().is_some_and(|e| e == "tmp")).collect();
        assert!(stray.is_empty(), "half-written files were left: {stray:?}");
    }

    /// Every file below the folder with its bytes.
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        fn walk(folder: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => walk(&path, files),
                    false => drop(files.insert(path.clone(), fs::read(&path).unwrap())),
                }
            }
        }
        let mut files = BTreeMap::new();
        walk(self.folder.path(), &mut files);
        files
    }
}

impl Outcome {
    /// Exit code 2 and one message with all of `told`.
    pub fn assert_refused(&self, told: &[&str]) {
        assert_eq!(self.code, Some(2), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        assert_eq!(self.stderr.matches("error:").count(), 1, "not one message: {}", self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        for words in told {
            assert!(self.stderr.contains(words), "the message lacks \"{words}\":\n{}", self.stderr);
        }
    }
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

/// The folder of the golden files.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// A film of 16 x 16 pixels whose frames all differ.
pub fn film(frames: usize) -> Film {
    let pixel = |i: usize| ((i * 37 + i / 768 * 11) % 256) as u8;
    Film::new(16, 16, (0..frames * 16 * 16 * 3).map(pixel).collect()).unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

//! A small project on disk: generated clips with captions, and a recipe for the tiny model of the fixtures.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::film::drifting;

/// A folder with clips and a recipe, deleted when dropped.
pub struct Project {
    folder: TempDir,
}

/// Frames of every bucket: two latent frames.
pub const FRAMES: u32 = 5;
/// Width and height of every bucket in pixels.
pub const SIZE: [u32; 2] = [48, 32];

impl Project {
    /// A clip for each caption, all different, and a recipe with `settings` after its `[model]` and `[data]`; `fixtures` is the
    /// folder of the fixtures.
    pub fn new(fixtures: &Path, captions: &[&str], settings: &str) -> Self {
        let model = fixtures.join("repo_official_a14b").display().to_string();
        let model = format!(
            r#"dit = "{model}/low_noise_model"
vae = "{model}/Wan2.1_VAE.pth"
text_encoder = "{model}/models_t5_umt5-xxl-enc-bf16.pth"
tokenizer = "{model}/google/umt5-xxl""#
        );
        Self::of_model(&model, SIZE, captions, settings)
    }

    /// The same for the checkpoint folder `model`, with buckets of `size`.
    pub fn of_folder(model: &Path, size: [u32; 2], captions: &[&str], settings: &str) -> Self {
        Self::of_model(&format!("folder = \"{}\"", model.display()), size, captions, settings)
    }

    /// The same for a model whose keys of `[model]` are `model`.
    pub fn of_model(model: &str, size: [u32; 2], captions: &[&str], settings: &str) -> Self {
        let project = Self { folder: tempfile::tempdir().unwrap() };
        let clips = project.clips();
        std::fs::create_dir(&clips).unwrap();
        for (i, caption) in captions.iter().enumerate() {
            // Two frames to spare: a WebP counts whole milliseconds, so its clips end a little early or late.
            let film = drifting(SIZE[0] + 8 * i as u32, SIZE[1] + 8 * i as u32, FRAMES as usize + 2);
            data::write_webp(&clips.join(format!("clip{i:02}.webp")), &film, 16.0).unwrap();
            std::fs::write(clips.join(format!("clip{i:02}.txt")), caption).unwrap();
        }
        std::fs::write(project.recipe(), recipe(model, size, settings)).unwrap();
        project
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        self.folder.path()
    }

    /// The folder of the clips.
    pub fn clips(&self) -> PathBuf {
        self.root().join("clips")
    }

    /// The recipe.
    pub fn recipe(&self) -> PathBuf {
        self.root().join("tiny.toml")
    }

    /// The folder of the run.
    pub fn run(&self) -> PathBuf {
        self.root().join("run")
    }

    /// The folder of the cache.
    pub fn cache(&self) -> PathBuf {
        self.root().join("cache")
    }
}

fn recipe(model: &str, [width, height]: [u32; 2], settings: &str) -> String {
    format!(
        r#"
[model]
{model}

[run]
folder = "run"
cache = "cache"

[data]
folder = "clips"
sizes = [[{width}, {height}]]
frames = [{FRAMES}]
{settings}"#
    )
}

//! ComfyUI's folder of models: which of its files belong to Wan.

use std::path::{Path, PathBuf};

use models::Contents;
use models::expert::Expert;
use models::published::refused;
use models::vae::Sizes;
use models::wav2vec::SpeechEncoder;
use models::weights::Checkpoint;

use super::{ModelConfig, Part};
use crate::error::{Error, Result};

/// A part, its folders (the second is the name of the first in older versions), and its key.
const FOLDERS: [(Part, &[&str]); 5] = [
    (Part::Dit, &["diffusion_models", "unet"]),
    (Part::Vae, &["vae"]),
    (Part::TextEncoder, &["text_encoders", "clip"]),
    (Part::Clip, &["clip_vision"]),
    (Part::SpeechEncoder, &["audio_encoders"]),
];
/// Extensions of weights files.
const ENDINGS: [&str; 4] = ["safetensors", "pth", "pt", "bin"];
/// Folders in folders that are searched.
const DEPTH: usize = 4;
/// Width of CLIP ViT-H, which Wan's image-to-video models use; ComfyUI has towers of other widths as well.
const CLIP_WIDTH: usize = 1280;

/// ComfyUI's folder of models, if `folder` is that or ComfyUI's own.
pub(crate) fn root(folder: &Path) -> Option<PathBuf> {
    let is_root = |root: &PathBuf| {
        let has = |part: usize| FOLDERS[part].1.iter().any(|name| root.join(name).is_dir());
        !root.join("model_index.json").exists() && has(0) && (has(1) || has(2))
    };
    [folder.to_owned(), folder.join("models")].into_iter().find(is_root)
}

/// The weights files of every part, each by its path from `root`, sorted.
pub(crate) fn files(root: &Path) -> Vec<(Part, PathBuf)> {
    let mut files = Vec::new();
    for (part, folders) in FOLDERS {
        for folder in folders {
            let mut found = Vec::new();
            walk(&root.join(folder), DEPTH, &mut found);
            found.sort();
            let below = found.iter().filter_map(|path| path.strip_prefix(root).ok());
            files.extend(below.map(|path| (part, path.to_owned())));
        }
    }
    files
}

/// A folder that cannot be listed counts as empty.
fn walk(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase());
        if path.is_dir() {
            if depth > 0 {
                walk(&path, depth - 1, found);
            }
        } else if ending.is_some_and(|ending| ENDINGS.contains(&ending.as_str())) {
            found.push(path);
        }
    }
}

/// A file of a part of Wan.
struct Candidate {
    part: Part,
    /// From the folder of models.
    path: PathBuf,
    file: Checkpoint,
}

impl Candidate {
    /// The file at `path`, if it is that part of a Wan model.
    fn of(part: Part, root: &Path, path: PathBuf) -> Option<Self> {
        let file = Checkpoint::open(&root.join(&path)).ok()?;
        if part == Part::SpeechEncoder {
            return SpeechEncoder::sizes_at(&root.join(&path), None).is_ok().then_some(Self {
                part,
                path,
                file,
            });
        }
        let file = if part == Part::Dit { file.without_model_prefix().ok()? } else { file };
        let fits = match (part, Contents::of(&file)?) {
            (Part::Dit, Contents::Dit) => refused(&file).is_none(),
            (Part::Vae, Contents::Vae) => Sizes::detect(&file).is_ok(),
            // T5 has positions only in its first layer, UMT5 in each.
            (Part::TextEncoder, Contents::TextEncoder) => {
                let second =
                    ["block.1.layer.0.SelfAttention.relative_attention_bias", "blocks.1.pos_embedding"];
                file.names().any(|name| second.iter().any(|mark| name.contains(mark)))
            }
            (Part::Clip, Contents::Clip) => {
                let is_patch = |name: &&str| name.ends_with("patch_embedding.weight");
                let width = |name: &str| file.shape(name).and_then(|shape| shape.first().copied());
                file.names().find(is_patch).and_then(width) == Some(CLIP_WIDTH)
            }
            _ => false,
        };
        fits.then_some(Self { part, path, file })
    }

    /// The key that names it: of a DiT it depends on whether its name is that of an expert.
    fn key(&self) -> &'static str {
        let name = self.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        match (self.part, Expert::in_name(&name)) {
            (Part::Dit, Some(Expert::High)) => "dit_high",
            (Part::Dit, Some(Expert::Low)) => "dit_low",
            (part, _) => part.key(),
        }
    }
}

/// A DiT's requirements for the other parts.
struct Asked {
    /// Channels of its latents.
    channels: usize,
    /// Whether it needs CLIP.
    has_image_branch: bool,
    /// Whether it needs a speech encoder.
    hears: bool,
}

impl Asked {
    fn of(dit: &Checkpoint) -> Option<Self> {
        let head = dit.shape("head.head.weight").or(dit.shape("proj_out.weight"))?.first()?;
        let has_image_branch =
            dit.names().any(|name| name.starts_with("img_emb.") || name.contains(".image_embedder."));
        let hears = dit.contains("casual_audio_encoder.weights");
        Some(Self { channels: head / 4, has_image_branch, hears })
    }

    fn fits(&self, candidate: &Candidate) -> bool {
        match candidate.part {
            Part::Vae => Sizes::detect(&candidate.file).is_ok_and(|(sizes, _)| sizes.latent == self.channels),
            Part::Clip => self.has_image_branch,
            Part::SpeechEncoder => self.hears,
            _ => true,
        }
    }
}

/// `config`, whose folder is ComfyUI's, with the files of that folder in place of it; `None` for another folder.
///
/// # Errors
/// If there are several files for a part (their keys, ready for the recipe), or none.
pub(super) fn named(config: &ModelConfig, from: &Path) -> Result<Option<ModelConfig>> {
    let Some(folder) = &config.folder else { return Ok(None) };
    let Some(root) = root(&from.join(folder)) else { return Ok(None) };
    // As the recipe would name it.
    let below = if root == from.join(folder) { folder.clone() } else { folder.join("models") };
    let all: Vec<Candidate> =
        files(&root).into_iter().filter_map(|(part, path)| Candidate::of(part, &root, path)).collect();
    let is_dit_named = config.dit.is_some() || config.dit_high.is_some() || config.dit_low.is_some();
    let dits: Vec<&Candidate> = all.iter().filter(|one| one.part == Part::Dit && !is_dit_named).collect();
    let mut keys: Vec<&str> = dits.iter().map(|dit| dit.key()).collect();
    keys.sort_unstable();
    let is_settled = is_dit_named || dits.len() == 1 || keys == ["dit_high", "dit_low"];
    let own = config.dit.as_ref().or(config.dit_high.as_ref()).or(config.dit_low.as_ref());
    let asked = match (own, dits.first()) {
        (Some(path), _) => {
            let file = Checkpoint::open(&from.join(path)).and_then(Checkpoint::without_model_prefix).ok();
            file.as_ref().and_then(Asked::of)
        }
        (None, Some(dit)) if is_settled => Asked::of(&dit.file),
        _ => None,
    };
    let fits = |one: &&Candidate| asked.as_ref().is_none_or(|asked| asked.fits(one));
    let of = |part: Part, named: &Option<PathBuf>| -> Vec<&Candidate> {
        all.iter().filter(|one| one.part == part && named.is_none()).filter(fits).collect()
    };
    let parts = [
        (of(Part::Vae, &config.vae), config.vae.is_some()),
        (of(Part::TextEncoder, &config.text_encoder), config.text_encoder.is_some()),
        (of(Part::Clip, &config.clip), config.clip.is_some()),
        (of(Part::SpeechEncoder, &config.speech_encoder), config.speech_encoder.is_some()),
    ];
    if !is_settled && !dits.is_empty() || parts.iter().any(|(files, _)| files.len() > 1) {
        let listed = dits.iter().chain(parts.iter().flat_map(|(files, _)| files));
        return Err(several(folder, &below, listed.copied()));
    }
    let mut settled = ModelConfig { folder: None, ..config.clone() };
    for one in dits.into_iter().chain(parts.into_iter().flat_map(|(files, _)| files)) {
        let path = Some(below.join(&one.path));
        match one.key() {
            "dit" => settled.dit = path,
            "dit_high" => settled.dit_high = path,
            "dit_low" => settled.dit_low = path,
            "vae" => settled.vae = path,
            "text_encoder" => settled.text_encoder = path,
            "speech_encoder" => settled.speech_encoder = path,
            _ => settled.clip = path,
        }
    }
    let is_missing = [
        (Part::Dit, settled.dit.is_none() && settled.dit_high.is_none() && settled.dit_low.is_none()),
        (Part::Vae, settled.vae.is_none()),
        (Part::TextEncoder, settled.text_encoder.is_none()),
    ];
    match is_missing.into_iter().find(|(_, is_missing)| *is_missing) {
        Some((part, _)) => {
            let folders = FOLDERS.iter().find(|(other, _)| *other == part).map_or(&[][..], |row| row.1);
            let looked =
                folders.iter().map(|name| below.join(name).display().to_string()).collect::<Vec<_>>();
            Err(Error::NoModelPart { key: part.key(), looked: looked.join(", ") })
        }
        None => Ok(Some(settled)),
    }
}

/// The keys of files that exclude each other.
fn several<'a>(folder: &Path, below: &Path, files: impl Iterator<Item = &'a Candidate>) -> Error {
    let line = |one: &Candidate| {
        let path = toml::Value::String(below.join(&one.path).display().to_string());
        format!("\n  {} = {path}", one.key())
    };
    let why = format!(
        "{} has several files that fit. Put one of each part under [model] in the recipe, or both of two experts:{}",
        folder.display(),
        files.map(line).collect::<String>()
    );
    Error::Setting { key: "model.folder".into(), why }
}

//! Checkpoints of published sizes on disk, to measure loading and whole runs.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use half::bf16;
use kernels::random::Key;
use models::dit::DitConfig;
use models::weights::TensorSpec;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// A folder with a checkpoint.
#[derive(Debug)]
pub(super) struct Made {
    folder: PathBuf,
    lifetime: Lifetime,
}

/// What becomes of a checkpoint when it was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lifetime {
    Removed,
    Kept,
}

/// The name of a DiT's file in its folder; of two experts that of the one for low noise.
pub(super) const DIT: &str = "diffusion_pytorch_model.safetensors";
/// That of the expert for high noise.
pub(super) const HIGH_DIT: &str = "high_noise_model.safetensors";
/// The names of the other files of a run.
pub(super) const VAE: &str = "vae.safetensors";
pub(super) const TEXT_ENCODER: &str = "umt5.safetensors";
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const CLIP: &str = "clip.safetensors";
/// In a folder of its own: a config.json beside it would be taken for its own.
pub(super) const SPEECH_ENCODER: &str = "wav2vec/model.safetensors";

/// Numbers that are written repeatedly: their values do not matter.
const NUMBERS: usize = 1 << 20;

impl Made {
    /// Writes a DiT of the sizes `config` in bf16 into a new folder below `scratch`, a part at a time; the folder is removed in the end.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn new(config: &DitConfig, scratch: &Path) -> Result<Self> {
        let folder = scratch.join(format!("tandem-bench-{}", std::process::id()));
        Self::written(config, Self { folder, lifetime: Lifetime::Removed })
    }

    /// Writes such a DiT into `folder`, where it stays.
    ///
    /// # Errors
    /// When there is one already, or the disk does not take it.
    pub fn kept(config: &DitConfig, folder: &Path) -> Result<Self> {
        if folder.join(DIT).exists() {
            let why =
                format!("{} has a model; measure it by --model, or name another folder", folder.display());
            return Err(Error::Setting { key: "--write".to_owned(), why });
        }
        Self::written(config, Self { folder: folder.to_owned(), lifetime: Lifetime::Kept })
    }

    fn written(config: &DitConfig, made: Self) -> Result<Self> {
        let io = |source| Error::Io { action: "write a checkpoint to", path: made.folder.clone(), source };
        fs::create_dir_all(&made.folder).map_err(io)?;
        made.write(config).map_err(io)?;
        Ok(made)
    }

    /// Its path.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn write(&self, config: &DitConfig) -> io::Result<()> {
        let config_json = json!({
            "model_type": "t2v", "dim": config.dim, "ffn_dim": config.ffn_dim, "num_heads": config.heads,
            "num_layers": config.layers, "in_dim": config.in_channels, "out_dim": config.out_channels,
            "freq_dim": config.freq_dim, "text_len": config.text_len, "eps": config.eps,
        });
        fs::write(self.folder.join("config.json"), config_json.to_string())?;
        write_random(&self.folder.join(DIT), config.tensors())
    }

    /// Writes `tensors` of random numbers in bf16 as the file `name`.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn add(&self, name: &str, tensors: Vec<TensorSpec>) -> Result<()> {
        let path = self.folder.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|source| Error::Io {
                action: "create",
                path: parent.to_owned(),
                source,
            })?;
        }
        write_random(&path, tensors).map_err(|source| Error::Io { action: "write", path, source })
    }

    /// Writes a tokenizer of a few words.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn add_tokenizer(&self) -> Result<()> {
        let words = ["<unk>", "</s>", "a", "bench", "on", "hill", "clip", "number"];
        let vocabulary: Map<String, Value> =
            words.iter().enumerate().map(|(id, word)| ((*word).to_owned(), id.into())).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null, "decoder": null,
            "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>" },
        });
        let path = self.folder.join(TOKENIZER);
        fs::write(&path, tokenizer.to_string()).map_err(|source| Error::Io { action: "write", path, source })
    }
}

/// Writes `tensors` in bf16 as a safetensors file, a part at a time.
fn write_random(path: &Path, tensors: Vec<TensorSpec>) -> io::Result<()> {
    let (header, bytes) = header(tensors);
    let values = Key::new(0, "bench checkpoint", &[]).normals(NUMBERS);
    let part: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(v * 0.02).to_le_bytes()).collect();
    let mut out = BufWriter::new(File::create(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let mut left = bytes;
    while left > 0 {
        let now = left.min(part.len());
        out.write_all(&part[..now])?;
        left -= now;
    }
    out.into_inner()?.sync_all()
}

/// The header of a safetensors file with `tensors` in bf16, and the bytes that follow it.
fn header(tensors: Vec<TensorSpec>) -> (Vec<u8>, usize) {
    let (mut entries, mut begin) = (Map::new(), 0);
    for spec in tensors {
        let end = begin + 2 * spec.shape.iter().product::<usize>();
        entries
            .insert(spec.name, json!({"dtype": "BF16", "shape": spec.shape, "data_offsets": [begin, end]}));
        begin = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    (text, begin)
}

impl Drop for Made {
    fn drop(&mut self) {
        if self.lifetime == Lifetime::Removed {
            // Nothing is lost with it, and a bench that measured has done its work.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

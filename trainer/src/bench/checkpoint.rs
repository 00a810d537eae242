//! A checkpoint of a published size on the disk, to measure how it loads.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use half::bf16;
use kernels::random::Key;
use models::dit::DitConfig;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// A folder with a checkpoint, removed in the end.
#[derive(Debug)]
pub(super) struct Made {
    folder: PathBuf,
}

/// Numbers that are written again and again: what they are is no matter.
const NUMBERS: usize = 1 << 20;

impl Made {
    /// Writes a DiT of the sizes `config` in bf16 into a new folder below `scratch`, a part at a time.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn new(config: &DitConfig, scratch: &Path) -> Result<Self> {
        let folder = scratch.join(format!("tandem-bench-load-{}", std::process::id()));
        let made = Self { folder };
        let io = |source| Error::Io { action: "write a checkpoint to", path: made.folder.clone(), source };
        fs::create_dir_all(&made.folder).map_err(io)?;
        made.write(config).map_err(io)?;
        Ok(made)
    }

    /// Where it lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn write(&self, config: &DitConfig) -> io::Result<()> {
        let told = json!({
            "model_type": "t2v", "dim": config.dim, "ffn_dim": config.ffn_dim, "num_heads": config.heads,
            "num_layers": config.layers, "in_dim": config.in_channels, "out_dim": config.out_channels,
            "freq_dim": config.freq_dim, "text_len": config.text_len, "eps": config.eps,
        });
        fs::write(self.folder.join("config.json"), told.to_string())?;
        let (header, bytes) = header(config);
        let values = Key::new(0, "bench checkpoint", &[]).normals(NUMBERS);
        let part: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(v * 0.02).to_le_bytes()).collect();
        let mut out = BufWriter::new(File::create(self.folder.join("diffusion_pytorch_model.safetensors"))?);
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
}

/// The header of a safetensors file with every tensor of the model in bf16, and the bytes that follow it.
fn header(config: &DitConfig) -> (Vec<u8>, usize) {
    let (mut entries, mut begin) = (Map::new(), 0);
    for spec in config.tensors() {
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
        // Nothing is lost with it, and a bench that measured has done its work.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

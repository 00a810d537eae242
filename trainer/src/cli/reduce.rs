//! `tandem extract` and `tandem resize`: low-rank factors by singular value decomposition.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{ArgGroup, Args};
use kernels::{DType, Device, Tensor};
use models::Expert;
use models::adapter::files::{self, AdapterFile};
use models::adapter::{Rank, Reduced, extract, resize};
use models::names::split_layer;
use serde_json::json;

use super::adapter_output::{AdapterOutput, expert, note_expert};
use super::base_dit::BaseDit;
use super::fetch::on_this_machine;
use crate::error::Error;
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::Ui;

/// The seed of the sketches of large matrices: the same input gives the same file.
const SEED: u64 = 1;

/// Extract the difference of two models as a LoRA. A 14B model takes a quarter of an hour on two cores.
#[derive(Debug, Args)]
#[command(after_help = EXTRACT)]
pub struct Extract {
    /// The original model: a checkpoint folder, a DiT's folder or file, or a model of the hub in the cache.
    #[arg(long, value_name = "PATH", value_parser = on_this_machine)]
    base: PathBuf,
    /// The tuned model, as --base.
    #[arg(long, value_name = "PATH", value_parser = on_this_machine)]
    tuned: PathBuf,
    /// Which expert of folders with two.
    #[arg(long, value_parser = expert())]
    expert: Option<Expert>,
    /// The file to write; a folder with --format peft.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// The rank of each module; with --energy the largest.
    #[arg(long, default_value_t = 32)]
    rank: usize,
    /// Give each module the smallest rank that keeps this fraction of its difference's energy (sum of squares), such as 0.95.
    #[arg(long)]
    energy: Option<f64>,
    /// Also write changes outside the matrices of the blocks: embeddings and head as low-rank factors, and the differences of
    /// norms, biases and modulation whole (ComfyUI's `.diff` keys).
    #[arg(long)]
    everything: bool,
    #[command(flatten)]
    how: AdapterOutput,
}

/// Change the rank of an adapter.
#[derive(Debug, Args)]
#[command(after_help = RESIZE, group = ArgGroup::new("how").args(["rank", "energy"]).required(true).multiple(true))]
pub struct Resize {
    /// An adapter in any format: LoRA, LoHa or LoKr. The result is a LoRA.
    input: PathBuf,
    /// The file to write; a folder with --format peft.
    output: PathBuf,
    /// The new rank of each module; with --energy the largest.
    #[arg(long)]
    rank: Option<usize>,
    /// Give each module the smallest rank that keeps this fraction of its energy (sum of squares), such as 0.95.
    #[arg(long)]
    energy: Option<f64>,
    #[command(flatten)]
    how: AdapterOutput,
}

const EXTRACT: &str = "\
Examples:
  tandem extract --base Wan2.1-T2V-14B --tuned tuned.safetensors --output tuned-lora.safetensors --rank 64
  tandem extract --base Wan2.1-T2V-14B --tuned tuned.safetensors --output tuned-lora.safetensors --energy 0.95 --rank 128";

const RESIZE: &str = "\
Examples:
  tandem resize big.safetensors small.safetensors --rank 16
  tandem resize big.safetensors small.safetensors --energy 0.95            # as small as each module allows
  tandem resize big.safetensors small.safetensors --energy 0.95 --rank 32  # and no more than 32";

/// What was kept of all modules.
#[derive(Default)]
struct Kept {
    shares: Vec<f64>,
}

impl Kept {
    fn note(&mut self, module: &str, Reduced { pair, energy }: Reduced, into: &mut AdapterFile) {
        self.shares.push(energy);
        into.modules.insert(module.to_owned(), pair.into());
    }

    /// The mean and the smallest fraction of energy.
    fn energy(&self) -> (f64, f64) {
        let mean = self.shares.iter().sum::<f64>() / self.shares.len().max(1) as f64;
        (mean, self.shares.iter().copied().fold(1.0, f64::min))
    }
}

/// The requested rank.
fn rank(rank: Option<usize>, energy: Option<f64>) -> Result<Rank> {
    let refuse = |key: &str, why: &str| Err(Error::Setting { key: key.into(), why: why.into() }.into());
    match (rank, energy) {
        (Some(0), _) => refuse("--rank", "must be at least 1"),
        (_, Some(energy)) if !(energy > 0.0 && energy <= 1.0) => refuse(
            "--energy",
            "must be above 0 and at most 1: the fraction of the sum of squares that is kept",
        ),
        (rank, Some(energy)) => Ok(Rank::Energy(energy, rank.unwrap_or(usize::MAX / 2))),
        (Some(rank), None) => Ok(Rank::Fixed(rank)),
        (None, None) => refuse("--rank", "is missing"),
    }
}

fn report(kept: &Kept, text: String, mut object: serde_json::Value, file: &AdapterFile, ui: &Ui) {
    let (mean, least) = kept.energy();
    let ranks = file.ranks();
    let ranks = match (ranks.first(), ranks.last()) {
        (Some(first), Some(last)) if first != last => format!("ranks {first} to {last}"),
        (Some(first), _) => format!("rank {first}"),
        _ => "no factors".to_owned(),
    };
    object["energy"] = json!({ "mean": mean, "least": least });
    ui.tell(&format!("{text}; {ranks}, energy kept: {mean:.4} on average, {least:.4} at least"), &object);
}

impl Extract {
    /// Writes the file.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let interrupt = Interrupt::listen().context("cannot listen for Ctrl-C")?;
        let rank = rank(Some(self.rank), self.energy)?;
        self.how.check_output(&self.output, &[&self.base, &self.tuned])?;
        let (config, base) = BaseDit::open(&self.base, self.expert)?;
        let (other, tuned) = BaseDit::open(&self.tuned, self.expert)?;
        if config.tensors() != other.tensors() {
            let why =
                format!("{} and {} are models of different sizes", self.base.display(), self.tuned.display());
            return Err(Error::Setting { key: "--tuned".into(), why }.into());
        }
        let (mut file, mut kept) = (AdapterFile::default(), Kept::default());
        let (mut left, mut rounded) = (0, 0);
        let specs = config.tensors();
        let bar = ui.bar("extracting", specs.len());
        for spec in &specs {
            interrupt.check()?;
            bar.inc(1);
            let read =
                |weights: &models::weights::Weights| weights.tensor(&spec.name, DType::F32, &Device::Cpu);
            let (before, after) = (read(&base).map_err(Error::from)?, read(&tuned).map_err(Error::from)?);
            if is_equal(&before, &after)? {
                continue;
            }
            if is_rounded(&before, &after)? {
                rounded += 1;
                continue;
            }
            let difference = (after - before)?;
            let module = spec.name.strip_suffix(".weight").filter(|_| spec.shape.len() > 1);
            match module {
                Some(module) if self.everything || split_layer(module).is_some() => {
                    let reduced = extract(&difference.flatten_from(1)?, rank, SEED).map_err(Error::from)?;
                    kept.note(module, reduced, &mut file);
                }
                _ if self.everything => drop(file.differences.insert(spec.name.clone(), difference)),
                _ => left += 1,
            }
        }
        bar.finish();
        if rounded > 0 {
            ui.note(&format!(
                "{rounded} tensors differ only by rounding to 16 bits, and are left out: {} is stored in another \
                 number format than {}",
                self.tuned.display(),
                self.base.display()
            ));
        }
        if left == 0 && file.modules.is_empty() && file.differences.is_empty() {
            let but = if rounded > 0 { ", except for rounding" } else { "" };
            let why = format!(
                "the two models are equal{but}: there is no difference to extract from {} and {}",
                self.base.display(),
                self.tuned.display()
            );
            return Err(Error::Setting { key: "--tuned".into(), why }.into());
        }
        if left > 0 {
            ui.note(&format!(
                "{left} tensors outside the matrices of the blocks differ too and are left out; --everything writes them"
            ));
        }
        file.metadata.insert("format".to_owned(), "pt".to_owned());
        if let Some(note) = note_expert(&mut file, &self.output, self.expert) {
            ui.note(&note);
        }
        let (text, object) = self.how.write(&self.output, &file)?;
        report(&kept, text, object, &file, ui);
        Ok(0)
    }
}

/// Whether two tensors have the same numbers.
fn is_equal(a: &Tensor, b: &Tensor) -> crate::Result<bool> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? == 0.0)
}

/// Whether `after` is `before` rounded to a number format of 16 bits.
fn is_rounded(before: &Tensor, after: &Tensor) -> crate::Result<bool> {
    for dtype in [DType::BF16, DType::F16] {
        if is_equal(&before.to_dtype(dtype)?.to_dtype(DType::F32)?, after)? {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Resize {
    /// An error that names the file and the module.
    fn refusal(&self, module: &str, error: models::Error) -> Error {
        match error {
            models::Error::Mismatch(why) => {
                Error::Setting { key: format!("{}: {module}", self.input.display()), why }
            }
            other => other.into(),
        }
    }

    /// Writes the file.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let interrupt = Interrupt::listen().context("cannot listen for Ctrl-C")?;
        let rank = rank(self.rank, self.energy)?;
        self.how.check_output(&self.output, &[&self.input])?;
        let old = files::read(&self.input).map_err(Error::from)?;
        old.notes.iter().for_each(|note| ui.note(note));
        let mut file = AdapterFile { modules: Default::default(), ..old.clone() };
        let mut kept = Kept::default();
        let bar = ui.bar("resizing", old.modules.len());
        for (module, change) in &old.modules {
            interrupt.check()?;
            bar.inc(1);
            let reduced = resize(change, rank, SEED).map_err(|error| self.refusal(module, error))?;
            kept.note(module, reduced, &mut file);
        }
        bar.finish();
        let (Rank::Fixed(wanted) | Rank::Energy(_, wanted)) = rank;
        if matches!(rank, Rank::Fixed(_)) && file.ranks().last().is_some_and(|most| *most < wanted) {
            ui.note(&format!(
                "no module has rank {wanted}: more than the original rank, or than its widths allow, has no effect"
            ));
        }
        let most = file.ranks().last().copied().unwrap_or(0).to_string();
        for (key, text) in [
            ("tandem.rank", &most),
            ("ss_network_dim", &most),
            ("ss_network_alpha", &most),
            ("tandem.alpha", &most),
        ] {
            if let Some(stored) = file.metadata.get_mut(key) {
                stored.clone_from(text);
            }
        }
        let (text, object) = self.how.write(&self.output, &file)?;
        report(&kept, text, object, &file, ui);
        Ok(0)
    }
}

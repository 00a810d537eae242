//! The adapter files of a run.

use std::path::{Path, PathBuf};

use models::adapter::Adapters;
use models::adapter::files::{self, AdapterFile, Provenance, Style};
use models::expert::Expert;

use crate::base::Trained;
use crate::error::{Error, Result};
use crate::plan::Plan;

/// An adapter as it goes into a file: the trainable factors of `adapters`.
pub fn adapter_file(adapters: &Adapters) -> Result<AdapterFile> {
    let mut file = AdapterFile::default();
    for (module, attached) in adapters.iter() {
        for adapter in attached.iter().filter(|adapter| adapter.is_trainable()) {
            file.modules.insert(module.to_owned(), adapter.delta().to_change(None)?);
        }
    }
    Ok(file)
}

/// Which of the adapters of a run a file holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Part<'a> {
    /// When it was made, such as `step-000250`; nothing at the end.
    pub label: Option<&'a str>,
    /// The expert that it is for, of a model of two. Most programs tell that by the file's name alone.
    pub expert: Option<Expert>,
}

/// Writes `adapters` in every format of the plan into `folder` as
/// `<run>[_<label>][_high_noise|_low_noise][_<format>].safetensors`; each file is read back and compared. The paths written.
pub fn write(
    plan: &Plan,
    adapters: &Adapters,
    (steps, epochs): (u64, u64),
    folder: &Path,
    part: Part,
) -> Result<Vec<PathBuf>> {
    let mut file = adapter_file(adapters)?;
    let Part { label, expert } = part;
    let provenance = Provenance { expert, ..provenance(plan, steps, epochs)? };
    std::fs::create_dir_all(folder).map_err(|source| Error::Io {
        action: "create",
        path: folder.to_owned(),
        source,
    })?;
    let mut written = Vec::new();
    for &style in &plan.export.formats {
        file.metadata = provenance.metadata(style);
        let mark = |text: Option<&str>| text.map(|text| format!("_{text}")).unwrap_or_default();
        let (label, of) = (mark(label), mark(expert.map(Expert::suffix)));
        // PEFT's is a folder.
        let ending = if style == Style::Peft { "" } else { ".safetensors" };
        let path = folder.join(format!("{}{label}{of}{}{ending}", plan.run.name, style.suffix()));
        files::write(&path, &file, style, plan.export.precision)?;
        written.push(path);
    }
    Ok(written)
}

/// Where the adapter of a run comes from, after `steps` steps in `epochs` epochs.
pub fn provenance(plan: &Plan, steps: u64, epochs: u64) -> Result<Provenance> {
    let frames = plan.data.frames.iter().copied().max().unwrap_or(1) as usize;
    let largest = plan.data.sizes.iter().max_by_key(|[w, h]| u64::from(*w) * u64::from(*h));
    Ok(Provenance {
        title: plan.run.name.clone(),
        base_model: plan.model.name.clone(),
        expert: plan.model.expert.and_then(Trained::one),
        rank: plan.adapter.rank(),
        alpha: plan.adapter.alpha(),
        steps,
        epochs,
        seed: plan.run.seed,
        learning_rate: plan.optimizer.lr,
        resolution: largest.map(|&[w, h]| (w as usize, h as usize, frames)),
        plan_hash: plan.hash()?,
        date: Some(humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string()),
    })
}

//! The adapter files of a run.

use std::path::{Path, PathBuf};

use models::adapter::files::{self, AdapterFile, Precision, Provenance, Style};
use models::adapter::{AdapterKind, Adapters, Delta, StartOn, complete};
use models::expert::Expert;

use crate::base::Trained;
use crate::error::{Error, Result};
use crate::learning::optim::Shown;
use crate::plan::Plan;
use crate::train::RunFolder;
use crate::train::checkpoint;

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

/// Writes `file` in every format of the plan into `folder` as
/// `<run>[_<label>][_high_noise|_low_noise][_<format>].safetensors`; each file is read back and compared. The paths written.
pub fn write(
    plan: &Plan,
    mut file: AdapterFile,
    (steps, epochs): (u64, u64),
    folder: &Path,
    part: Part,
) -> Result<Vec<PathBuf>> {
    let provenance = Provenance { expert: part.expert, ..provenance(plan, steps, epochs)? };
    std::fs::create_dir_all(folder).map_err(|source| Error::Io {
        action: "create",
        path: folder.to_owned(),
        source,
    })?;
    let mut written = Vec::new();
    for &style in &plan.export.formats {
        file.metadata = provenance.metadata(style);
        let path = folder.join(file_name(&plan.run.name, style, part));
        files::write(&path, &file, style, plan.export.precision)
            .map_err(|cause| Error::NotExported { path: path.clone(), cause: Box::new(cause.into()) })?;
        written.push(path);
    }
    Ok(written)
}

/// The name of an adapter file of the run `run`.
pub fn file_name(run: &str, style: Style, Part { label, expert }: Part) -> String {
    let mark = |text: Option<&str>| text.map(|text| format!("_{text}")).unwrap_or_default();
    let (label, of) = (mark(label), mark(expert.map(Expert::suffix)));
    // PEFT's is a folder.
    let ending = if style == Style::Peft { "" } else { ".safetensors" };
    format!("{run}{label}{of}{}{ending}", style.suffix())
}

/// The commands that make the adapter files of a run out of its checkpoint after `step` steps, one for each network and
/// format, as they go into a shell.
pub fn commands(plan: &Plan, folder: &RunFolder, step: u64) -> Vec<String> {
    let checkpoint = checkpoint::path(&folder.checkpoints(), step).display().to_string();
    let label = format!("step-{step:06}");
    let ranges = plan.trained_ranges();
    let mut commands = Vec::new();
    for expert in ranges.iter().map(|range| range.expert()) {
        for &style in &plan.export.formats {
            let part = Part { label: Some(&label), expert };
            let output = folder.adapters().join(file_name(&plan.run.name, style, part)).display().to_string();
            let mut words = vec!["tandem", "export", &checkpoint, &output];
            if let Some(expert) = expert.filter(|_| ranges.len() > 1) {
                words.extend(["--expert", expert.name()]);
            }
            if style != Style::default() {
                words.extend(["--format", style.name()]);
            }
            match plan.export.precision {
                Precision::Float32 => words.extend(["--precision", "f32"]),
                Precision::Float16 => words.extend(["--precision", "f16"]),
                Precision::Bfloat16 => {}
            }
            commands.push(shell_line(&words));
        }
    }
    commands
}

/// `words` as a line that a shell takes apart again.
pub fn shell_line(words: &[&str]) -> String {
    // Only a null byte cannot be quoted, and no path holds one.
    shlex::try_join(words.iter().copied()).unwrap_or_else(|_| words.join(" "))
}

/// The adapter that a checkpoint of a run holds, with the header of a file of `style`; of two experts that of `expert`.
///
/// # Errors
/// A file that is no checkpoint of a run, and a run without its plan.
pub fn of_checkpoint(checkpoint: &Path, expert: Option<Expert>, style: Style) -> Result<AdapterFile> {
    let (progress, saved) = checkpoint::load(checkpoint)?;
    let run = checkpoint.parent().and_then(Path::parent).unwrap_or(Path::new(""));
    let plan = Plan::read(&run.join("plan.toml"))?;
    let states = checkpoint::part_of(&saved, expert.filter(|_| plan.trained_ranges().len() > 1)).tensors;
    let shown = Shown::in_files(plan.optimizer.rule(), &plan.train.ema);
    let provenance = Provenance { expert, ..provenance(&plan, progress.step, progress.cursor.epoch)? };
    let mut file = AdapterFile { metadata: provenance.metadata(style), ..AdapterFile::default() };
    let config = &plan.adapter;
    // Every tensor of a module stands behind its name; each kind has one that begins it.
    let ends = [".lora_A.weight", ".hada_w1_a", ".lokr_w1"];
    let modules = states.keys().filter_map(|name| ends.iter().find_map(|end| name.strip_suffix(end)));
    for module in modules {
        let find = |name: &str| states.get(&format!("{module}.{name}")).map(|state| shown.of(state).clone());
        let delta = Delta::from_tensors(config.kind, config.of(module).scale(), find)
            .ok_or(Error::ForeignCheckpoint)?;
        file.modules.insert(module.to_owned(), delta.to_change(None)?);
    }
    if config.kind == AdapterKind::Dora {
        let (_, weights) = match expert {
            Some(expert) => plan.model.dits.of(expert).open()?,
            None => plan.model.open_dit()?,
        };
        complete(&mut file, &weights)?;
    }
    Ok(file)
}

/// An adapter that was added to the base, by name, strength and hash.
fn in_words(below: &StartOn) -> String {
    let name = below.path.file_name().unwrap_or(below.path.as_os_str()).to_string_lossy();
    let hash = below.sha256.as_deref().unwrap_or("unknown");
    format!("{name} at strength {} (SHA-256 {hash})", below.strength)
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
        start_on: plan.adapter.start_on.iter().map(in_words).collect(),
        date: Some(humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string()),
    })
}

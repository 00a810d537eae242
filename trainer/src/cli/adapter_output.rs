//! Arguments for the format of an adapter file, and writing it, shared by the commands.

use std::path::Path;

use anyhow::Result;
use clap::builder::TypedValueParser;
use clap::{Args, ValueEnum};
use models::Expert;
use models::adapter::files::{self, AdapterFile, Precision, Style};
use serde_json::{Value, json};

use super::force::Force;
use super::named::one_of;
use crate::error::Error;

/// How an adapter file is written.
#[derive(Debug, Args)]
pub struct AdapterOutput {
    /// The style of the file.
    #[arg(long, value_parser = style(), default_value = Style::Comfy.name())]
    pub format: Style,
    /// The number format of the factors.
    #[arg(long, value_enum, default_value_t = Numbers::Bf16)]
    pub precision: Numbers,
    #[command(flatten)]
    force: Force,
}

/// A number format.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Numbers {
    F32,
    Bf16,
    F16,
}

fn style() -> impl TypedValueParser<Value = Style> {
    one_of(&Style::ALL, |style| (style.name(), style.readers()))
}

/// The parser of `--expert`.
pub fn expert() -> impl TypedValueParser<Value = Expert> {
    one_of(&Expert::ALL, |expert| match expert {
        Expert::High => (expert.name(), "of the steps from the boundary on, which see much noise"),
        Expert::Low => (expert.name(), "of the steps below it"),
    })
}

impl AdapterOutput {
    /// Checks, before anything else, that `output` can be written: see [`writable`].
    ///
    /// # Errors
    /// Those of [`writable`], and for PEFT's folder a name that looks like a file's.
    pub fn check_output(&self, output: &Path, inputs: &[&Path]) -> crate::Result<()> {
        const KEY: &str = "the output";
        if self.format != Style::Peft {
            return writable(output, KEY, inputs, &self.force);
        }
        if output.extension().is_some_and(|ending| ending == "safetensors") {
            let folder = output.with_extension("");
            let why = format!(
                "--format peft writes a folder, and {} is the name of a file; name it {}",
                output.display(),
                folder.display()
            );
            return Err(Error::Setting { key: KEY.to_owned(), why });
        }
        match output.is_dir() {
            true => {
                apart(output, KEY, inputs)?;
                let files = ["adapter_model.safetensors", "adapter_config.json"];
                files.iter().try_for_each(|file| self.force.check(&output.join(file), KEY))
            }
            false => writable(output, KEY, inputs, &self.force),
        }
    }

    /// Writes `adapter` at `path`, verifies it by reading it back, and returns the report.
    pub fn write(&self, path: &Path, adapter: &AdapterFile) -> Result<(String, Value)> {
        let precision = match self.precision {
            Numbers::F32 => Precision::Float32,
            Numbers::Bf16 => Precision::Bfloat16,
            Numbers::F16 => Precision::Float16,
        };
        let written = files::write(path, adapter, self.format, precision).map_err(Error::from)?;
        let kinds = adapter.kinds().join(", ");
        let expert = adapter.expert.map(Expert::suffix);
        let text = format!(
            "{}: {} modules ({kinds}), {} bytes; verified: the largest rounding error is {:.1e}",
            path.display(),
            written.modules,
            written.bytes,
            written.largest_error
        );
        let object = json!({
            "file": path, "modules": written.modules, "kinds": adapter.kinds(), "ranks": adapter.ranks(),
            "expert": expert, "bytes": written.bytes, "error": written.largest_error,
        });
        Ok((text, object))
    }
}

/// Checks that a file can be written at `output`, which `key` names: its folder exists, it is not a folder itself, it is none
/// of the `inputs` (which may be folders) nor one of their files, and an existing file is only overwritten with `force`.
///
/// # Errors
/// What prevents it.
pub fn writable(output: &Path, key: &str, inputs: &[&Path], force: &Force) -> crate::Result<()> {
    let refuse = |why: String| Err(Error::Setting { key: key.to_owned(), why });
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        return refuse(format!("there is no folder {}; create it, or name another", folder.display()));
    }
    if output.is_dir() {
        return refuse(format!("{} is a folder; name the file to write", output.display()));
    }
    apart(output, key, inputs)?;
    force.check(output, key)
}

/// Checks that `output`, if it exists, is none of the `inputs` and not in any of them.
fn apart(output: &Path, key: &str, inputs: &[&Path]) -> crate::Result<()> {
    // Both as written and with links resolved: models of the hub are folders of links.
    let places = |path: &Path| [std::path::absolute(path).ok(), path.canonicalize().ok()];
    let is_within = |input: &&Path| {
        places(output).iter().zip(places(input)).any(|(output, input)| match (output, input) {
            (Some(output), Some(input)) => output.starts_with(input),
            _ => false,
        })
    };
    match inputs.iter().find(|input| output.exists() && is_within(input)) {
        Some(input) => Err(Error::Setting {
            key: key.to_owned(),
            why: match **input == *output {
                true => format!("{} is also an input; name another file", output.display()),
                false => format!(
                    "{} belongs to the input {}; name another file",
                    output.display(),
                    input.display()
                ),
            },
        }),
        None => Ok(()),
    }
}

/// Writes into the header which expert an adapter is for, and suggests a name for the file.
pub fn note_expert(adapter: &mut AdapterFile, output: &Path, given: Option<Expert>) -> Option<String> {
    adapter.expert = given.or(adapter.expert);
    let expert = adapter.expert?;
    adapter.metadata.insert("tandem.expert".to_owned(), expert.suffix().to_owned());
    let name = output.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    (Expert::in_name(&name) != Some(expert)).then(|| {
        format!(
            "the adapter is for the {} expert; most programs recognise that by the file's name only, so call it {name}_{}",
            expert.suffix(),
            expert.suffix()
        )
    })
}

//! Arguments that say how an adapter file is written, and the one way of writing it, shared by the commands.

use std::path::Path;

use anyhow::Result;
use clap::builder::TypedValueParser;
use clap::{Args, ValueEnum};
use models::Expert;
use models::adapter::files::{self, AdapterFile, Precision, Style};
use serde_json::{Value, json};

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
        Expert::High => (expert.name(), "of the noisy steps"),
        Expert::Low => (expert.name(), "of the steps below the boundary"),
    })
}

impl AdapterOutput {
    /// Writes `adapter` at `path`, compares what it reads back, and gives what there is to tell of it.
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
            "{}: {} modules ({kinds}), {} bytes; read back, what it adds differs by at most {:.1e}",
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

/// Writes into the header which expert an adapter is for, and says how the file should be called.
pub fn tell_expert(adapter: &mut AdapterFile, output: &Path, told: Option<Expert>) -> Option<String> {
    adapter.expert = told.or(adapter.expert);
    let expert = adapter.expert?;
    adapter.metadata.insert("tandem.expert".to_owned(), expert.suffix().to_owned());
    let name = output.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    (Expert::in_name(&name) != Some(expert)).then(|| {
        format!(
            "the adapter is for the {} expert; most programs tell that by the file's name alone, so call it {name}_{}",
            expert.suffix(),
            expert.suffix()
        )
    })
}

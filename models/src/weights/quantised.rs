//! 8-bit weights in files, with their scales in separate tensors.
//!
//! The conventions, with `X` for a module: `X.scale_weight` (ComfyUI until 2025, with one marker `scaled_fp8` for the
//! file; musubi-tuner, without it) or `X.weight_scale` with `X.comfy_quant` or the header's `_quantization_metadata`
//! (ComfyUI since). A weight is `value(code) * scale` in f32; the scale is one for the tensor, one for each row, or one
//! for each block of consecutive numbers of a row. Weights of eight bits without a scale are their codes' values. Scales of
//! inputs (`scale_input`, `input_scale`) are for 8-bit products, which Tandem does not compute.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::dtype::StoredDType;
use super::entry::Entry;

/// The last part of the names of tensors that describe a `weight`.
const SIDE: [&str; 5] = ["scale_weight", "weight_scale", "scale_input", "input_scale", "comfy_quant"];
/// Marks a file, or a module, of the old convention.
const MARKER: &str = "scaled_fp8";
/// The key of the header that lists formats in the new convention.
const METADATA: &str = "_quantization_metadata";
/// Formats of the new convention that are read.
const FORMATS: [&str; 2] = ["float8_e4m3fn", "float8_e5m2"];

/// How many numbers of a weight share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grid {
    /// All of them.
    Tensor,
    /// Those of a row.
    Row,
    /// This many consecutive ones of a row.
    Block(usize),
}

/// The scale of one weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scale {
    /// The tensor that holds it, row by row.
    pub tensor: String,
    pub grid: Grid,
}

/// The scales of the quantised weights of a checkpoint, by names in its files.
#[derive(Debug, Default)]
pub(super) struct StoredScales {
    /// Scales of the weights that have one.
    pub scales: BTreeMap<String, Scale>,
    /// Tensors that only describe others.
    pub side: BTreeSet<String>,
    /// Why the weights cannot be read, if they cannot.
    pub refusal: Option<String>,
}

/// A layer's `comfy_quant`, or an entry of the header's list; other keys are about the computation of products.
#[derive(Deserialize)]
struct Layer {
    format: String,
}

/// The header's list.
#[derive(Deserialize)]
struct Layers {
    layers: BTreeMap<String, Layer>,
}

impl StoredScales {
    /// Finds what is quantised among `entries`; `bytes` reads the tensor of a name.
    pub fn find<E>(
        entries: &BTreeMap<String, Entry>,
        metadata: &BTreeMap<String, String>,
        bytes: impl Fn(&str) -> Result<Vec<u8>, E>,
    ) -> Result<Self, E> {
        let mut found = Self { refusal: listed_formats(metadata), ..Self::default() };
        for (name, entry) in entries {
            let Some((module, kind)) = split(name) else { continue };
            if kind == MARKER {
                found.side.insert(name.clone());
                continue;
            }
            let weight = format!("{module}.weight");
            let Some(of) = entries.get(&weight) else { continue };
            found.side.insert(name.clone());
            let refusal = match kind {
                "comfy_quant" => layer_format(module, &bytes(name)?),
                "scale_weight" | "weight_scale" => match grid(of, entry) {
                    Ok(grid) => {
                        found.scales.insert(weight, Scale { tensor: name.clone(), grid });
                        None
                    }
                    Err(why) => Some(format!("the scale `{name}` {why}")),
                },
                _ => None,
            };
            found.refusal = found.refusal.take().or(refusal);
        }
        Ok(found)
    }
}

/// The module and the kind of a tensor that describes another.
fn split(name: &str) -> Option<(&str, &str)> {
    if name == MARKER {
        return Some(("", MARKER));
    }
    let (module, kind) = name.rsplit_once('.')?;
    (kind == MARKER || SIDE.contains(&kind)).then_some((module, kind))
}

/// The grid of the scale `scale` of the weight `of`.
fn grid(of: &Entry, scale: &Entry) -> Result<Grid, String> {
    if !matches!(of.dtype, StoredDType::F8E4M3 | StoredDType::F8E5M2) {
        return Err(format!(
            "belongs to weights stored as {}: only fp8 is read, not int8, mxfp8 or nvfp4; use the fp8 or bf16 file of the \
             same model",
            of.dtype
        ));
    }
    if !scale.dtype.is_float() {
        return Err(format!("is stored as {}, not as a float", scale.dtype));
    }
    let count = scale.elements();
    let columns = of.shape.last().copied().unwrap_or(1);
    let rows = of.elements() / columns.max(1);
    let leads = scale.shape.first() == Some(&rows);
    match count {
        1 => Ok(Grid::Tensor),
        _ if of.shape.len() == 2 && count == rows && leads => Ok(Grid::Row),
        _ if of.shape.len() == 2
            && leads
            && count.is_multiple_of(rows)
            && columns.is_multiple_of(count / rows) =>
        {
            Ok(Grid::Block(columns / (count / rows)))
        }
        _ => Err(format!("of shape {:?} does not divide the weight's {:?}", scale.shape, of.shape)),
    }
}

/// Why a layer's format is not read.
fn layer_format(module: &str, json: &[u8]) -> Option<String> {
    match serde_json::from_slice::<Layer>(json) {
        Ok(layer) => refused(module, &layer.format),
        Err(error) => Some(format!("`{module}.comfy_quant` cannot be read ({error}); fetch this file again")),
    }
}

/// Why a format of the header's list is not read.
fn listed_formats(metadata: &BTreeMap<String, String>) -> Option<String> {
    match serde_json::from_str::<Layers>(metadata.get(METADATA)?) {
        Ok(listed) => listed.layers.iter().find_map(|(module, layer)| refused(module, &layer.format)),
        Err(error) => {
            Some(format!("`{METADATA}` in its header cannot be read ({error}); fetch this file again"))
        }
    }
}

fn refused(module: &str, format: &str) -> Option<String> {
    (!FORMATS.contains(&format)).then(|| {
        format!(
            "`{module}` is stored as {format}, which Tandem does not read; use the fp8 (float8_e4m3fn), bf16 or fp16 file \
             of the same model"
        )
    })
}

impl std::fmt::Display for Grid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tensor => f.write_str("one scale a tensor"),
            Self::Row => f.write_str("one scale a row"),
            Self::Block(size) => write!(f, "one scale for {size} numbers of a row"),
        }
    }
}

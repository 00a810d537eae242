//! What a file or folder is: adapters, checkpoints of models and of runs, model folders. From headers alone.

mod adapter;
mod dit;
mod folder;

use std::path::Path;

use models::Contents;
use models::vae::{Generation, Naming, Sizes, TinyLatents, TinySizes};
use models::weights::{Checkpoint, FileKind, Grid};
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::train::checkpoint::Progress;

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// In plain words.
    pub kind: String,
    /// Its properties, in the order of the report.
    pub facts: Map<String, Value>,
    /// The parts of a folder, by their path in it.
    pub parts: Vec<(String, Report)>,
}

/// Says what `path` is.
///
/// # Errors
/// When it cannot be read, or is damaged.
pub fn inspect(path: &Path) -> Result<Report> {
    if path.is_dir() {
        if let Some(report) = folder::report(path)? {
            return Ok(report);
        }
    } else {
        let kind = FileKind::of(path).map_err(models::Error::from)?;
        if let Some(refusal) = kind.refusal() {
            return Ok(Report::new(kind.to_string()).with("note", refusal));
        }
    }
    checkpoint(path)
}

fn checkpoint(path: &Path) -> Result<Report> {
    let file = Checkpoint::open(path).map_err(models::Error::from)?;
    let report = match kind_of(&file) {
        Kind::RunCheckpoint => run_checkpoint(&file),
        Kind::CacheEntry => Report::new("Tandem cache entry").with_metadata(&file),
        Kind::Adapter => adapter::report(path, &file)?,
        Kind::Dit => dit::report(path, &file),
        Kind::Vae(sizes, naming) => vae(&sizes, naming),
        Kind::TinyDecoder => tiny_decoder(path),
        Kind::TextEncoder => text_encoder(&file),
        Kind::Clip => clip(&file),
        Kind::Unknown => {
            let first: Vec<&str> = file.names().take(5).collect();
            Report::new("tensors of an unknown kind").with("names", first).with_metadata(&file)
        }
    };
    Ok(report.with_storage(&file))
}

/// A checkpoint by what it is for.
enum Kind {
    RunCheckpoint,
    CacheEntry,
    Adapter,
    Dit,
    Vae(Sizes, Naming),
    TinyDecoder,
    TextEncoder,
    Clip,
    Unknown,
}

fn kind_of(file: &Checkpoint) -> Kind {
    if file.metadata().contains_key("tandem.progress") {
        return Kind::RunCheckpoint;
    }
    if file.metadata().contains_key("tandem.key") {
        return Kind::CacheEntry;
    }
    match Contents::of(file) {
        Some(Contents::Adapter) => Kind::Adapter,
        Some(Contents::Dit) => Kind::Dit,
        Some(Contents::Vae) => {
            Sizes::detect(file).map_or(Kind::Unknown, |(sizes, naming)| Kind::Vae(sizes, naming))
        }
        Some(Contents::TinyDecoder) => Kind::TinyDecoder,
        Some(Contents::TextEncoder) => Kind::TextEncoder,
        Some(Contents::Clip) => Kind::Clip,
        None => Kind::Unknown,
    }
}

fn run_checkpoint(file: &Checkpoint) -> Report {
    let report = Report::new("checkpoint of a Tandem run");
    let progress = file.metadata().get("tandem.progress");
    let Some(progress) = progress.and_then(|text| serde_json::from_str::<Progress>(text).ok()) else {
        return report.with("note", "its progress was written by another version");
    };
    // Each kind of adapter has one tensor that identifies a module.
    let firsts = [".lora_A.weight.parameter", ".hada_w1_a.parameter", ".lokr_w1.parameter"];
    let is_first = |name: &&str| firsts.iter().any(|first| name.ends_with(first));
    let trained = file.names().filter(is_first).count();
    report.with("step", progress.step).with("epoch", progress.cursor.epoch).with("modules", trained)
}

/// Official files hold the tower of texts too.
fn clip(file: &Checkpoint) -> Report {
    let is_official = file.names().any(|name| name.starts_with("visual."));
    let (patch, layer) = match is_official {
        true => ("visual.patch_embedding.weight", ".attn.to_qkv.weight"),
        false => ("vision_model.embeddings.patch_embedding.weight", ".self_attn.q_proj.weight"),
    };
    let axis = |axis: usize| file.shape(patch).and_then(|shape| shape.get(axis).copied()).unwrap_or(0);
    let in_tower = |name: &&str| {
        (name.starts_with("visual.") || name.contains("vision_model.")) && name.ends_with(layer)
    };
    Report::new("CLIP vision tower")
        .with("layout", if is_official { "official" } else { "Hugging Face" })
        .with("width", axis(0))
        .with("layers", file.names().filter(in_tower).count())
        .with("patch", axis(2))
        .with_metadata(file)
}

fn vae(sizes: &Sizes, naming: Naming) -> Report {
    let (kind, layout) = match sizes.generation {
        Generation::Wan21 => ("Wan 2.1 VAE", naming),
        Generation::Wan22 => ("Wan 2.2 VAE", naming),
    };
    let layout = match layout {
        Naming::Official => "official",
        Naming::Diffusers => "diffusers",
    };
    Report::new(kind)
        .with("layout", layout)
        .with("latent channels", sizes.latent)
        .with("width", json!({ "encoder": sizes.encoder, "decoder": sizes.decoder }))
        .with("pixels per latent", sizes.spatial_ratio())
}

fn tiny_decoder(path: &Path) -> Report {
    let report = Report::new("tiny decoder for previews (TAEHV)");
    match TinySizes::at(path) {
        Ok(TinySizes { latent, widths, patch, .. }) => report
            .with("latent channels", latent)
            .with("widths", widths.to_vec())
            .with("pixels per latent", 8 * patch)
            .with(
                "latents",
                match TinyLatents::by_name(path) {
                    TinyLatents::Scaled => "scaled, as the DiT has them",
                    TinyLatents::Raw => "without scaling, by the file's name",
                },
            ),
        Err(error) => report.with("cannot be used", error.to_string()),
    }
}

fn text_encoder(file: &Checkpoint) -> Report {
    let is_official = file.contains("token_embedding.weight");
    let (embedding, layers) = match is_official {
        true => (file.shape("token_embedding.weight"), ".norm1.weight"),
        false => (
            file.shape("shared.weight").or(file.shape("encoder.embed_tokens.weight")),
            ".layer.0.layer_norm.weight",
        ),
    };
    let embedding = embedding.unwrap_or_default();
    Report::new("UMT5 text encoder")
        .with("layout", if is_official { "official" } else { "Hugging Face" })
        .with("vocabulary", embedding.first().copied().unwrap_or(0))
        .with("width", embedding.get(1).copied().unwrap_or(0))
        .with("layers", file.names().filter(|name| name.ends_with(layers)).count())
        .with("carries its tokenizer", file.contains("spiece_model"))
}

impl Report {
    fn new(kind: impl Into<String>) -> Self {
        Self { kind: kind.into(), facts: Map::new(), parts: Vec::new() }
    }

    fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.facts.insert(key.to_owned(), value.into());
        self
    }

    /// The strings of the file's header.
    fn with_metadata(self, file: &Checkpoint) -> Self {
        match file.metadata().is_empty() {
            true => self,
            false => self.with("metadata", json!(file.metadata())),
        }
    }

    /// Numbers, types and files of the tensors.
    fn with_storage(self, file: &Checkpoint) -> Self {
        let mut types: Map<String, Value> = Map::new();
        let mut numbers = 0u64;
        for (_, entry) in file.entries() {
            // An adapter's alphas are single numbers, not parameters.
            numbers += if entry.shape.is_empty() { 0 } else { entry.elements() as u64 };
            let count = types.get(entry.dtype.name()).and_then(Value::as_u64).unwrap_or(0);
            types.insert(entry.dtype.name().to_owned(), (count + 1).into());
        }
        let mut report = self;
        if let Some(refusal) = file.refusal() {
            report = report.with("cannot be used", refusal);
        }
        let scalings = file.scalings();
        if !scalings.is_empty() {
            let describe = |(grid, count): (&Option<Grid>, &usize)| match grid {
                Some(grid) => format!("{count} weights in fp8, {grid}"),
                None => format!("{count} weights in fp8, without scales"),
            };
            report = report.with("quantisation", scalings.iter().map(describe).collect::<Vec<_>>());
        }
        report
            .with("tensors", file.names().count())
            .with("parameters", numbers)
            .with("types", types)
            .with("files", file.files().len())
            .with("bytes", file.total_bytes())
    }

    /// The report as one object.
    pub fn to_json(&self) -> Value {
        let mut object = Map::from_iter([("kind".to_owned(), self.kind.clone().into())]);
        object.extend(self.facts.clone());
        if !self.parts.is_empty() {
            let parts = self.parts.iter().map(|(place, part)| (place.clone(), part.to_json()));
            object.insert("parts".into(), Value::Object(parts.collect()));
        }
        Value::Object(object)
    }

    fn lines(&self, indent: usize, out: &mut Vec<String>) {
        let space = " ".repeat(indent);
        let width = self.facts.keys().map(String::len).max().unwrap_or(0);
        for (key, value) in &self.facts {
            match value {
                Value::Object(map)
                    if map.values().any(|value| value.as_str().is_some_and(|s| s.len() > 12)) =>
                {
                    out.push(format!("{space}{key}"));
                    out.extend(map.iter().map(|(key, value)| format!("{space}  {key} = {}", plain(value))));
                }
                value => out.push(format!("{space}{key:<width$}  {}", plain(value))),
            }
        }
        for (place, part) in &self.parts {
            out.push(format!("{space}{place}: {}", part.kind));
            part.lines(indent + 4, out);
        }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let mut lines = vec![self.kind.clone()];
        self.lines(2, &mut lines);
        f.write_str(&lines.join("\n"))
    }
}

/// A value as people write it.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(is_so) => (if *is_so { "yes" } else { "no" }).to_owned(),
        Value::Array(list) => list.iter().map(plain).collect::<Vec<_>>().join(", "),
        Value::Object(map) => {
            map.iter().map(|(key, value)| format!("{key} {}", plain(value))).collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}

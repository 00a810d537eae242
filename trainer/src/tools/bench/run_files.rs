//! The files of a whole run: a model of random weights, two clips with everything that its kind of network is conditioned on,
//! and their recipe.

use std::fs;
use std::path::{Path, PathBuf};

use data::{Film, Picture, SPEECH_RATE};
use models::clip::ClipSizes;
use models::dit::{DitConfig, Pictures};
use models::expert::Networks;
use models::published::{Beside, Defaults, KindFacts, Published};
use models::vae::Generation;
use models::wav2vec::SpeechSizes;
use models::weights::TensorSpec;
use serde_json::{Value, json};

use super::ClipSize;
use super::checkpoint::{CLIP, DIT, HIGH_DIT, Made, SPEECH_ENCODER, TEXT_ENCODER, TOKENIZER, VAE};
use super::model::{dit_preset, umt5_preset, vae_preset};
use super::run::RunBench;
use crate::error::{Error, Result};
use crate::watch::ui::Ui;

/// Clips that are trained on.
const CLIPS: usize = 2;
/// Sides of a face clip in pixels, as Animate's motion encoder reads them.
const FACE: usize = 512;

/// The model of a run.
struct Model {
    dit: DitConfig,
    networks: Networks,
    /// Names of presets.
    vae: &'static str,
    text: &'static str,
}

impl Model {
    fn of(name: &str) -> Result<Self> {
        let dit = dit_preset(name)?;
        let (vae, text) = match (Published::named(name), dit.kind.facts().vae) {
            (None, _) => ("tiny", "tiny"),
            (Some(_), Generation::Wan21) => ("wan2.1", "umt5-xxl"),
            (Some(_), Generation::Wan22) => ("wan2.2", "umt5-xxl"),
        };
        let networks = Published::named(name).map_or(Networks::Whole, |model| model.networks);
        Ok(Self { dit, networks, vae, text })
    }

    fn facts(&self) -> &'static KindFacts {
        self.dit.kind.facts()
    }

    /// Writes its networks below `scratch`.
    fn write(&self, scratch: &Path) -> Result<Made> {
        let made = Made::new(&self.dit, scratch)?;
        if self.networks == Networks::Pair {
            made.add(HIGH_DIT, self.dit.tensors())?;
        }
        made.add(VAE, vae_preset(self.vae)?.tensors())?;
        made.add(TEXT_ENCODER, umt5_preset(self.text)?.tensors())?;
        made.add_tokenizer()?;
        if self.dit.image.is_some() {
            let official = ClipSizes::PUBLISHED.tensors(models::clip::Naming::Official);
            made.add(CLIP, below("visual.", official))?;
        }
        if self.facts().speech {
            made.add(SPEECH_ENCODER, below("wav2vec2.", SpeechSizes::published().tensors()))?;
        }
        Ok(made)
    }

    /// The `[model]` of the recipe.
    fn table(&self, bench: &RunBench) -> Value {
        let mut table = json!({
            "dit_config": "config.json", "vae": VAE, "text_encoder": TEXT_ENCODER, "tokenizer": TOKENIZER,
        });
        match self.networks {
            Networks::Whole => table["dit"] = DIT.into(),
            Networks::Pair => {
                (table["dit_low"], table["dit_high"]) = (DIT.into(), HIGH_DIT.into());
                table["expert"] = "both".into();
            }
        }
        if self.dit.image.is_some() {
            table["clip"] = CLIP.into();
        }
        if self.facts().speech {
            table["speech_encoder"] = SPEECH_ENCODER.into();
        }
        if let Some(base) = bench.base {
            table["base"] = base.name().into();
        }
        if let Some(arithmetic) = bench.arithmetic {
            table["arithmetic"] = arithmetic.name().into();
        }
        table
    }

    /// The `[data]` of the recipe, and the options behind its prompt.
    fn conditions(&self, ClipSize { width, height, frames }: ClipSize) -> (Value, String) {
        let facts = self.facts();
        let mut data =
            json!({ "folder": "clips", "sizes": [[width, height]], "frames": [frames], "stills": "skip" });
        let mut options = String::new();
        let mut option = |words: &str| options.push_str(words);
        if facts.pictures == Pictures::Beside {
            option(" --i references/clip0.png");
        }
        if facts.clip_pictures > 1 {
            option(" --ei references/clip1.png");
        }
        if facts.beside.contains(&Beside::Control) || facts.faces {
            data["control"] = "control".into();
        }
        if facts.beside.contains(&Beside::Control) || facts.faces || facts.side_chain {
            option(" --cv control/clip0.mp4");
        }
        if facts.side_chain {
            data["mask_rules"] = json!(["boxes"]);
        }
        if self.dit.control.reference.is_some() || facts.faces {
            data["references"] = "references".into();
        }
        if self.dit.control.reference.is_some() || facts.faces || facts.speech {
            option(" --ref references/clip0.png");
        }
        if facts.faces {
            data["faces"] = "faces".into();
            option(" --fc faces/clip0.mp4");
        }
        if facts.camera {
            data["cameras"] = "cameras".into();
            option(" --i references/clip0.png --cam left");
        }
        if facts.speech {
            option(" --au clips/clip0.wav");
        }
        (data, options)
    }
}

/// Writes the files of a run, and its recipe beside them; they are gone with the first of the two.
pub(super) fn prepared(bench: &RunBench, ui: &Ui) -> Result<(Made, PathBuf)> {
    let model = Model::of(bench.model)?;
    let made = ui.phase("writing random weights", || model.write(bench.scratch))?;
    write_clips(&model, bench.size, made.folder())?;
    let recipe = made.folder().join("bench.toml");
    save(&recipe, self::recipe(&model, bench)?)?;
    Ok((made, recipe))
}

/// The recipe of the run, with its files in the same folder.
fn recipe(model: &Model, bench: &RunBench) -> Result<String> {
    let (data, options) = model.conditions(bench.size);
    let mut recipe = json!({
        "run": { "name": "bench", "folder": "run", "cache": "cache" },
        "model": model.table(bench),
        "data": data,
        "adapter": { "rank": bench.rank },
        "train": { "steps": bench.steps, "accumulate": bench.accumulate },
        "devices": bench.devices,
        "checkpoint": { "every_steps": (bench.steps / 2).max(1), "every_minutes": 0 },
        "sample": { "prompts": [format!("a bench on a hill{options}")], "steps": bench.solver_steps },
    });
    if let Some(cache) = bench.cache {
        recipe["sample"]["cache"] = json!(cache);
    }
    without_nulls(&mut recipe);
    toml::to_string(&recipe).map_err(|error| Error::PlanText { why: error.to_string() })
}

/// TOML has no null.
fn without_nulls(value: &mut Value) {
    if let Some(table) = value.as_object_mut() {
        table.retain(|_, value| !value.is_null());
        table.values_mut().for_each(without_nulls);
    }
}

/// Clips that drift, a little longer than is needed, with captions and what accompanies them.
fn write_clips(model: &Model, size: ClipSize, below: &Path) -> Result<()> {
    let ClipSize { width, height, frames } = size;
    let (facts, Defaults { fps, .. }) = (model.facts(), model.facts().whole);
    let (data, _) = model.conditions(size);
    let has = |key: &str| !data[key].is_null();
    let count = frames + 2;
    let folder = |name: &str| {
        let path = below.join(name);
        fs::create_dir_all(&path).map(|()| path.clone()).map_err(|source| Error::Io {
            action: "create",
            path,
            source,
        })
    };
    let (clips, control, pictures) = (folder("clips")?, folder("control")?, folder("references")?);
    for clip in 0..CLIPS {
        let name = format!("clip{clip}");
        let film = drifting((width, height, count), clip + 2)?;
        data::write_mp4(&clips.join(&name).with_extension("mp4"), &film, fps)?;
        save(&clips.join(&name).with_extension("txt"), format!("clip number {clip}"))?;
        let first = film.frames().next().unwrap_or_default().to_vec();
        let picture = Picture::new(width as u32, height as u32, first).ok_or_else(no_pixels)?;
        save(&pictures.join(&name).with_extension("png"), picture.png()?)?;
        if has("control") || facts.side_chain {
            let film = drifting((width, height, count), clip + 5)?;
            data::write_mp4(&control.join(&name).with_extension("mp4"), &film, fps)?;
        }
        if has("faces") {
            let film = drifting((FACE, FACE, count), clip + 3)?;
            data::write_mp4(&folder("faces")?.join(&name).with_extension("mp4"), &film, fps)?;
        }
        if has("cameras") {
            save(&folder("cameras")?.join(&name).with_extension("txt"), forward(count))?;
        }
        if facts.speech {
            let samples = hum(count as f64 / fps + 1.0);
            data::write_wav(&clips.join(&name).with_extension("wav"), &[&samples], SPEECH_RATE)?;
        }
    }
    Ok(())
}

/// `count` frames of a pattern that moves by `speed`.
fn drifting((width, height, count): (usize, usize, usize), speed: usize) -> Result<Film> {
    let pixel = |i: usize| {
        let (frame, at) = (i / (width * height * 3), i / 3 % (width * height));
        ((at % width + at / width + frame * speed) * (i % 3 + 1) / 4 % 256) as u8
    };
    let rgb = (0..count * width * height * 3).map(pixel).collect();
    Film::new(width as u32, height as u32, rgb).ok_or_else(no_pixels)
}

/// Poses of a camera that goes forward.
fn forward(count: usize) -> String {
    let pose = |frame: usize| {
        let far = -(frame as f64) / 50.0;
        format!("{frame} 0.532 0.946 0.5 0.5 0 0 1 0 0 0 0 1 0 0 0 0 1 {far}\n")
    };
    (0..count).map(pose).collect()
}

/// A tone that rises and falls.
fn hum(seconds: f64) -> Vec<f32> {
    let at = |n: usize| {
        let time = n as f64 / f64::from(SPEECH_RATE);
        (0.4 * (2.0 * std::f64::consts::PI * 180.0 * time).sin() * (5.0 * time).sin()) as f32
    };
    (0..(seconds * f64::from(SPEECH_RATE)) as usize).map(at).collect()
}

/// The same tensors with a prefix before their names.
fn below(prefix: &str, tensors: Vec<TensorSpec>) -> Vec<TensorSpec> {
    let named = |spec: TensorSpec| TensorSpec::new(format!("{prefix}{}", spec.name), spec.shape);
    tensors.into_iter().map(named).collect()
}

fn no_pixels() -> Error {
    data::DataError::unreadable("the clips of a bench", "a clip without pixels").into()
}

fn save(path: &Path, contents: impl AsRef<[u8]>) -> Result<()> {
    fs::write(path, contents).map_err(|source| Error::Io { action: "write", path: path.to_owned(), source })
}

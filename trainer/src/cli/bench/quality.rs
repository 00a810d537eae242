//! `tandem bench quality`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use super::super::devices::RecipeDevices;
use crate::error::{Error, Result};
use crate::tools::quality::{QualityBench, quality};
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::Ui;

/// Arguments of `bench quality`.
#[derive(Debug, Args)]
pub struct QualityArguments {
    /// The recipe. Without one, the model and the clips of --model and --clips.
    #[arg(required_unless_present_all = ["model", "clips"])]
    recipe: Option<PathBuf>,
    /// The folder of the model, or its name on the hub.
    #[arg(long, value_name = "DIR", requires = "clips", conflicts_with = "recipe")]
    model: Option<PathBuf>,
    /// The folder of the clips.
    #[arg(long, value_name = "DIR", requires = "model", conflicts_with = "recipe")]
    clips: Option<PathBuf>,
    #[command(flatten)]
    devices: RecipeDevices,
    /// Clips that are looked at, each at nine noise levels.
    #[arg(long, default_value_t = 2)]
    items: usize,
    /// Also train whole runs, from so many seeds, with each arithmetic.
    #[arg(long, default_value_t = 0)]
    seeds: u64,
    /// Where the figures are also written, as JSON.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Folder of the whole runs, and of the cache where there is no recipe. Default: the system's for temporary files.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
}

impl QualityArguments {
    /// Measures, writes the file that was asked for, and returns the figures.
    ///
    /// # Errors
    /// Those of [`quality`], and files that cannot be written.
    pub fn measure(&self, interrupt: &Interrupt, ui: &Ui) -> Result<Value> {
        let folder = self.scratch.clone().unwrap_or_else(std::env::temp_dir).join("tandem-quality");
        let recipe = match (&self.recipe, &self.model, &self.clips) {
            (Some(recipe), _, _) => recipe.clone(),
            (None, Some(model), Some(clips)) => written(&folder, model, clips)?,
            _ => return Err(Error::Setting { key: "--model".into(), why: "and --clips are needed".into() }),
        };
        let overrides = self.devices.overrides();
        let bench = QualityBench {
            recipe: &recipe,
            overrides: &overrides,
            items: self.items.max(1),
            seeds: self.seeds,
            scratch: &folder.join("runs"),
        };
        let figures = quality(&bench, interrupt, ui)?;
        if let Some(path) = &self.output {
            write(path, &format!("{figures:#}\n"))?;
        }
        Ok(figures)
    }
}

/// The figures as lines for people.
pub fn table(figures: &Value) -> String {
    let verdict = |gate: &Value| if gate["passes"] == true { "passes" } else { "FAILS" };
    let percent = |value: &Value| format!("{:.2} %", 100.0 * value.as_f64().unwrap_or(f64::NAN));
    let number = |value: &Value| format!("{:.5}", value.as_f64().unwrap_or(f64::NAN));
    let mut lines = vec![format!("int8 products in {}", figures["model"].as_str().unwrap_or_default())];
    for network in figures["networks"].as_array().into_iter().flatten() {
        let (layers, velocities, gradients) =
            (&network["layers"], &network["velocities"], &network["gradients"]);
        if let Some(name) = network["network"].as_str() {
            lines.push(format!("expert for {name} noise"));
        }
        let worst = &layers["worst"][0];
        lines.push(format!(
            "  {} layers: {}; y is off by {} and dx by {} on average; furthest off is {} with {} and {}",
            layers["layers"],
            verdict(layers),
            percent(&layers["mean"]["y"]),
            percent(&layers["mean"]["dx"]),
            worst["layer"].as_str().unwrap_or_default(),
            percent(&worst["deviation"]["y"]),
            percent(&worst["deviation"]["dx"])
        ));
        lines.extend(
            layers["beyond"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|name| format!("    beyond its bound: {name}")),
        );
        lines.push(format!(
            "  velocities of {} samples: {}; cosine {} on average, {} at worst; loss {} beside int8 weights",
            network["samples"],
            verdict(velocities),
            number(&velocities["mean_cosine"]),
            number(&velocities["worst_cosine"]),
            percent(&velocities["loss_change"])
        ));
        lines.push(format!(
            "  gradients of a step: {}; cosine {} at worst ({}), norms {} to {} of those with int8 weights",
            verdict(gradients),
            number(&gradients["worst_cosine"]),
            gradients["worst"].as_str().unwrap_or_default(),
            number(&gradients["norm_ratios"][0]),
            number(&gradients["norm_ratios"][1])
        ));
    }
    for run in figures["training"]["runs"].as_array().into_iter().flatten() {
        lines.push(format!("  seed {}: loss {}, held out {}", run["seed"], run["losses"], run["held_out"]));
    }
    if let Some(variants) = figures["training"]["variants"].as_array() {
        let names: Vec<&str> = variants.iter().filter_map(Value::as_str).collect();
        lines.push(format!("  in the order {}; int8: {}", names.join(", "), figures["training"]["int8"]));
    }
    lines.join("\n")
}

/// A recipe in `folder` that names nothing but the model and the clips.
fn written(folder: &Path, model: &Path, clips: &Path) -> Result<PathBuf> {
    let absolute = |path: &Path| match path.exists() {
        true => std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
        false => path.to_owned(),
    };
    let table = |pairs: &[(&str, &Path)]| -> toml::Table {
        let entry = |(key, path): &(&str, &Path)| ((*key).to_owned(), path.display().to_string().into());
        pairs.iter().map(entry).collect()
    };
    let (model, clips) = (absolute(model), absolute(clips));
    let recipe = toml::Table::from_iter([
        ("model".to_owned(), table(&[("folder", &model)]).into()),
        ("data".to_owned(), table(&[("folder", &clips)]).into()),
    ]);
    std::fs::create_dir_all(folder).map_err(|source| Error::Io {
        action: "create",
        path: folder.to_owned(),
        source,
    })?;
    let path = folder.join("quality.toml");
    write(&path, &recipe.to_string())?;
    Ok(path)
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|source| Error::Io { action: "write", path: path.to_owned(), source })
}

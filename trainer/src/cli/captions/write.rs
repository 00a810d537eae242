//! `tandem captions --write`.

use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;
use data::{CaptionFile, HasCaption};
use serde_json::json;

use crate::error::Error;
use crate::plan::{Overrides, caption_files};
use crate::tools::captioning::{Endpoint, LONGEST_SIDE, PROMPT};
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::Ui;

/// Frames of each clip that are sent unless the user says how many.
const FRAMES: u32 = 4;

/// Captions by a model behind an endpoint.
#[derive(Debug, Args)]
pub struct Writing {
    /// Send frames of each clip that has no caption to an OpenAI-compatible endpoint, and write its answer beside the clip. Nothing
    /// is sent anywhere without this.
    #[arg(long, requires_all = ["endpoint", "model"])]
    pub write: bool,
    /// Address of the endpoint up to /v1: vLLM, Ollama, llama.cpp, or a hosted one.
    #[arg(long, value_name = "URL", requires = "write")]
    endpoint: Option<String>,
    /// The model there, which must see pictures.
    #[arg(long, value_name = "NAME", requires = "write")]
    model: Option<String>,
    /// What the model is asked about the frames. Default: a description in one paragraph.
    #[arg(long, value_name = "TEXT", requires = "write")]
    prompt: Option<String>,
    /// Frames of each clip that are sent, evenly spaced, 1 to 32. Default 4.
    #[arg(long, value_name = "N", requires = "write", value_parser = clap::value_parser!(u32).range(1..=32))]
    frames: Option<u32>,
    /// Environment variable that holds the key of the endpoint.
    #[arg(long, value_name = "NAME", requires = "write")]
    key_env: Option<String>,
    /// Also write the captions of clips that have a text file, in place of what is in it.
    #[arg(long, requires = "write")]
    force: bool,
}

impl Writing {
    /// Writes the captions of the recipe's clips.
    pub fn run(&self, recipe: &Path, overrides: &Overrides, ui: &Ui) -> Result<u8> {
        let endpoint = self.endpoint()?;
        let files = caption_files(recipe, overrides)?;
        let wanted = |file: &&CaptionFile| match file.has {
            HasCaption::No => true,
            HasCaption::InTextFile => self.force,
            HasCaption::Elsewhere => false,
        };
        let missing: Vec<&CaptionFile> = files.iter().filter(wanted).collect();
        let frames = self.frames.unwrap_or(FRAMES);
        let interrupt = Interrupt::listen().context("cannot listen for Ctrl-C")?;
        if !missing.is_empty() {
            let (clips, host) = (missing.len(), endpoint.host());
            ui.note(&format!("sending up to {frames} frames of each of {clips} clips to {host}"));
        }
        let bar = ui.bar("writing captions", missing.len());
        let mut written = Vec::new();
        for file in missing {
            interrupt.check()?;
            let pictures =
                data::pictures_of(&file.media, frames as usize, LONGEST_SIDE).map_err(Error::from)?;
            let caption = endpoint.caption(&pictures, &interrupt).with_context(|| file.id.clone())?;
            // Somebody may have written one meanwhile.
            if self.force || !file.path.exists() {
                write(&file.path, &caption)?;
                written.push(json!({ "id": file.id, "file": file.path, "caption": caption }));
            }
            bar.inc(1);
        }
        bar.finish();
        let (count, kept) = (written.len(), files.len() - written.len());
        let text = format!("{count} captions were written, {kept} clips have theirs");
        ui.tell(&text, &json!({ "written": written, "kept": kept }));
        Ok(0)
    }

    fn endpoint(&self) -> Result<Endpoint> {
        let key = self.key_env.as_ref().map(|name| {
            let set = std::env::var(name).ok().filter(|key| !key.is_empty());
            let why = format!("the environment variable {name} is not set");
            set.ok_or_else(|| Error::Setting { key: "--key-env".into(), why })
        });
        let text = |option: &Option<String>| option.clone().unwrap_or_default();
        let prompt = self.prompt.as_deref().unwrap_or(PROMPT);
        Ok(Endpoint::new(&text(&self.endpoint), &text(&self.model), prompt, key.transpose()?)?)
    }
}

fn write(path: &Path, caption: &str) -> Result<(), Error> {
    data::atomic::write(path, |file| writeln!(file, "{caption}")).map_err(|source| Error::Io {
        action: "write",
        path: path.to_owned(),
        source,
    })
}

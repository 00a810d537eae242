//! `tandem compare`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use models::vae::Tiling;
use serde_json::json;

use super::sample::{Done, Sample};
use crate::adapters::candidate::Candidate;
use crate::error::Error;
use crate::machine::forecast::Residuals;
use crate::sample::{self, ClipFiles, ClipFormat, Course, clip_name};
use crate::tools::comparison::{self, Column, Comparison};
use crate::watch::ui::Ui;

/// Strengths beyond this make noise of every adapter.
const MOST: f64 = 10.0;

/// Make the same clips without an adapter and with each of several, at several strengths, side by side.
///
/// The clips of a prompt have one seed. They are written with a table of their middle frames (grid.png), a film of all of them side by
/// side (grid.mp4), and a page with a slider over the strengths (index.html). Options are those of `sample`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Compare {
    #[command(flatten)]
    sample: Sample,
    /// Adapters in any format; of a model of two experts a file for each, with a comma between. With --model the first argument
    /// is one too; a run or recipe before them gives model, prompts and settings, and none of its adapters.
    #[arg(value_name = "ADAPTER[,ADAPTER]")]
    adapters: Vec<String>,
    /// Strengths of each adapter.
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_values_t = [0.5, 0.75, 1.0, 1.25])]
    strengths: Vec<f64>,
}

const EXAMPLES: &str = "\
Examples:
  tandem compare --model Wan2.1-T2V-14B a.safetensors b.safetensors --prompts prompts.txt --out compare
  tandem compare runs/cat runs/cat/adapters/cat-step-000500.safetensors runs/cat/adapters/cat.safetensors --strengths 1";

impl Compare {
    /// Makes the clips, and what shows them side by side.
    pub fn run(mut self: Box<Self>, ui: &Ui) -> Result<u8> {
        let ui = &ui.with_phases();
        let first = self.sample.adapter_in_place_of_source();
        let named: Vec<String> = first.into_iter().chain(self.adapters).collect();
        self.sample.check_nothing_else_is_compared()?;
        check_strengths(&self.strengths)?;
        if named.is_empty() {
            let why = "none is named: give one or more behind the run, or behind --model".into();
            return Err(Error::Setting { key: "ADAPTER".into(), why }.into());
        }
        let candidates = named.iter().map(|text| Candidate::read(text)).collect::<crate::Result<Vec<_>>>()?;

        let (sample, mut job) = (&self.sample, self.sample.job(ui)?);
        let names: Vec<String> =
            job.requests.iter().enumerate().map(|(i, request)| clip_name(i, &request.prompt)).collect();
        let columns = columns(&candidates, &self.strengths);
        let folders: Vec<PathBuf> =
            columns.iter().map(|(column, _)| sample.out().join(&column.folder)).collect();
        let formats = [ClipFormat::Mp4];
        sample.find_networks(&mut job, ui)?;
        let experts: Vec<_> = job.networks.iter().map(|network| network.range.expert()).collect();
        candidates.iter().try_for_each(|candidate| candidate.check(&job.basis.dit, &experts))?;
        sample.check_variants(&folders, &names, &comparison::files(sample.out()))?;
        // Its place is that of the largest.
        let largest = candidates.iter().max_by_key(|candidate| candidate.bytes());
        for network in &mut job.networks {
            let own = largest.map(|candidate| candidate.sources(network.range.expert(), ui)).transpose()?;
            network.adapters = own.unwrap_or_default();
        }
        sample.lay(&mut job, (Residuals::None, Tiling::Off, None), ui)?;
        job.networks.iter_mut().for_each(|network| network.adapters.clear());
        if !sample.are_worth_it(&mut job, columns.len(), ui)? {
            ui.note("nothing was made");
            return Ok(0);
        }
        let (fps, bands) = (sample.rate(&job), job.bands);
        let ranges: Vec<_> = job.networks.iter().map(|network| network.range).collect();
        let Done { prompted, stepped, mut residents, interrupt } =
            sample.steps(job, Course::default(), ui)?;
        let mut made = vec![stepped.pieces];
        for (column, variant) in columns.iter().skip(1) {
            ui.say(&format!("clips with {}", column.label));
            for range in &ranges {
                let own = variant.map(|(candidate, strength)| candidate.files(range.expert(), strength));
                residents.set_clip_adapters(*range, own.unwrap_or_default())?;
            }
            let stepped = sample::latents(&prompted, &mut residents, Course::default(), &interrupt)?;
            made.push(stepped.ok_or(Error::Interrupted)?.pieces);
        }
        let files = ClipFiles { tiling: Tiling::Off, bands, fps, formats: &formats };
        for ((folder, (column, _)), pieces) in folders.iter().zip(&columns).zip(made) {
            let title = format!("{}: ", column.label);
            sample::files(folder, (&prompted, pieces, &[]), &title, &mut residents, files)?;
        }
        let prompts: Vec<String> = prompted.iter().map(|clip| clip.request.prompt.clone()).collect();
        let columns: Vec<Column> = columns.into_iter().map(|(column, _)| column).collect();
        let comparison = Comparison { columns: &columns, prompts: &prompts, clips: &names, fps };
        let written = ui.phase("side by side", || comparison.write(sample.out()))?;
        let lines: Vec<String> = written.iter().map(|path| path.display().to_string()).collect();
        ui.tell(&lines.join("\n"), &json!({ "files": written, "clips": folders }));
        Ok(0)
    }
}

/// The base alone, then each adapter at each strength.
fn columns<'a>(
    candidates: &'a [Candidate],
    strengths: &[f64],
) -> Vec<(Column, Option<(&'a Candidate, f64)>)> {
    let base = Column { label: "base".into(), folder: "base".into(), adapter: None, strength: 0.0 };
    let of = |(index, candidate): (usize, &'a Candidate)| {
        let column = move |&strength: &f64| {
            let label = format!("{} at {strength}", candidate.name());
            let folder = format!("{}-{}-at-{strength}", index + 1, candidate.name());
            (Column { label, folder, adapter: Some(index), strength }, Some((candidate, strength)))
        };
        strengths.iter().map(column).collect::<Vec<_>>()
    };
    std::iter::once((base, None)).chain(candidates.iter().enumerate().flat_map(of)).collect()
}

fn check_strengths(strengths: &[f64]) -> crate::Result<()> {
    match strengths.iter().find(|strength| !(f64::MIN_POSITIVE..=MOST).contains(*strength)) {
        Some(strength) => {
            let why = format!(
                "{strength} must be above 0 and at most {MOST}; without an adapter clips are made anyway"
            );
            Err(Error::Setting { key: "--strengths".into(), why })
        }
        None => Ok(()),
    }
}

//! `tandem sample --cache-preset` and `--plan`: which steps are skipped.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use models::published::Published;

use super::{Job, Sample};
use crate::encode::prompt::ClipRequest;
use crate::error::Error;
use crate::sample::SampleConfig;
use crate::sample::magcache::{self, CacheConfig, MagCache, Skips, Table};
use crate::watch::ui::Ui;

/// MagCache's options.
#[derive(Debug, Args)]
pub struct SkipOptions {
    /// Skip solver steps with MagCache: E012K2R20 is threshold 0.12, at most 2 steps in a row, the first 20 % always computed.
    /// Faster; clips differ a little from exact ones. Default: the recipe's sample.cache, else every step is computed.
    #[arg(long, value_name = "PRESET")]
    cache_preset: Option<CacheConfig>,
    /// A table of `tandem calibrate` for it. Default: the run's, the one beside the adapter or the model, else the published one.
    #[arg(long, value_name = "FILE")]
    cache_table: Option<PathBuf>,
}

impl Sample {
    /// The rule that is named here, or by the recipe.
    fn rule(&self, own: Option<&CacheConfig>) -> crate::Result<Option<MagCache>> {
        let settled = match (&self.skips.cache_preset, own) {
            (Some(named), _) => Some(named.settle("--cache-preset")?),
            (None, Some(own)) => Some(own.settle("sample.cache")?),
            (None, None) => None,
        };
        match (&settled, &self.skips.cache_table) {
            (None, Some(_)) => {
                let why = "is for --cache-preset, which is not given".into();
                Err(Error::Setting { key: "--cache-table".into(), why })
            }
            _ => Ok(settled),
        }
    }

    /// The steps that the clips of `job` skip; nothing where no rule is given.
    pub(super) fn skips(&self, job: &Job) -> crate::Result<Option<Skips>> {
        let Job { basis, model, requests, .. } = job;
        let Some(rule) = self.rule(basis.magcache.as_ref())? else { return Ok(None) };
        let boundary = model.clip_boundary(&basis.dit);
        let there = self.tables(job).into_iter().find(|path| path.is_file());
        if let Some(path) = self.skips.cache_table.clone().or(there) {
            let table = Table::read(&path)?;
            return Skips::planned(rule, (&table, path.display().to_string()), requests, boundary).map(Some);
        }
        let known = magcache::skips::published_model(model)?;
        let table = known.and_then(|known| magcache::skips::published(known, &requests[0])); // there is a request
        let Some((table, source)) = table else {
            let why = "nobody published a table for this model, and none was measured".to_owned();
            return Err(Error::MagCacheTable {
                what: model.dits.of(models::Expert::High).weights.display().to_string(),
                why,
            });
        };
        Skips::planned(rule, (&table, source), requests, boundary).map(Some)
    }

    /// Where tables are looked for: the one that `calibrate` writes, the first of them.
    pub(in crate::cli) fn tables(&self, job: &Job) -> Vec<PathBuf> {
        let loras = [&self.lora, &self.lora_high, &self.lora_low].into_iter().flatten();
        let beside = loras.filter_map(|named| {
            let (path, _) = crate::adapters::with_strength("--lora", named).ok()?;
            Some(PathBuf::from(format!("{}.magcache.json", path.display())))
        });
        let weights = &job.model.dits.of(models::Expert::High).weights;
        let folder = if weights.is_dir() { Some(weights.as_path()) } else { weights.parent() };
        let of_model = folder.unwrap_or(Path::new("")).join(TABLE);
        beside.take(1).chain(job.basis.table.clone()).chain([of_model]).collect()
    }

    /// `--plan` for a published model whose files are not here.
    pub(super) fn tell_assumed(&self, model: &'static Published, ui: &Ui) -> Result<u8> {
        let (defaults, dit) = (model.defaults(), model.dit());
        let seed = self.seed.unwrap_or(42);
        let base = SampleConfig::default().request(defaults, defaults.size, defaults.frames, seed);
        let base = self.over(&base, defaults)?;
        let requests = match &self.prompts {
            Some(path) => base.from_file(path, "--prompts")?,
            None if self.prompt.is_empty() => vec![base],
            None => {
                let of = |prompt: &String| ClipRequest { prompt: prompt.clone(), ..base.clone() };
                self.prompt.iter().map(of).collect()
            }
        };
        requests.iter().try_for_each(|request| request.check(defaults.multiple()))?;
        let pair = model.networks == models::expert::Networks::Pair;
        let boundary = pair.then_some(dit.defaults(model.networks).boundary);
        let skips = match self.rule(None)? {
            None => None,
            Some(rule) => {
                let given = match &self.skips.cache_table {
                    Some(path) => Some((Table::read(path)?, path.display().to_string())),
                    None => magcache::skips::published(model, &requests[0]), // there is a request
                };
                let missing = || Error::MagCacheTable {
                    what: model.title.to_owned(),
                    why: "nobody published a table for this model".to_owned(),
                };
                let (table, source) = given.ok_or_else(missing)?;
                Some(Skips::planned(rule, (&table, source), &requests, boundary)?)
            }
        };
        tell_plan(skips.as_ref(), &requests, ui);
        Ok(0)
    }
}

/// Name of a table in the folder of a model or a run.
pub const TABLE: &str = "magcache.json";

/// Prints which steps are skipped, as the result.
pub(super) fn tell_plan(skips: Option<&Skips>, requests: &[ClipRequest], ui: &Ui) {
    let text = match skips {
        Some(skips) => skips.lines(requests).join("\n"),
        None => "every step is computed".to_owned(),
    };
    ui.tell(&text, &magcache::skips::json(requests, skips));
}

//! What `tandem compare` needs of the options of `sample`.

use std::path::{Path, PathBuf};

use super::{Job, Sample};
use crate::error::{Error, Result};
use crate::sample::{ClipFormat, clip_files};
use crate::watch::ui::Ui;

impl Sample {
    /// The first argument where a model is named by --model: then it is an adapter, and no run.
    pub(in crate::cli) fn adapter_in_place_of_source(&mut self) -> Option<String> {
        let first = self.source.take_if(|_| self.model.is_some());
        first.map(|path| path.display().to_string())
    }

    /// Refuses options of `sample` that name other adapters or write other things.
    pub(in crate::cli) fn check_nothing_else_is_compared(&self) -> Result<()> {
        let stray = [
            ("--lora, --lora-high, --lora-low", self.names_adapters()),
            ("--checkpoint", self.checkpoint.is_some()),
            ("--preset", self.preset.is_some()),
            ("--save-latents", self.save_latents.is_some()),
            ("--format", !self.format.is_empty()),
            ("--preview", self.preview.is_some()),
            ("--compare-exact", self.compare_exact),
            ("--plan", self.plan),
            ("--assume", self.assume.is_some()),
        ];
        match stray.into_iter().find(|(_, is_given)| *is_given) {
            Some((key, _)) => {
                let why = "has no meaning for `compare`: it makes MP4 files, without an adapter and with each that is named".into();
                Err(Error::Setting { key: key.into(), why })
            }
            None => Ok(()),
        }
    }

    /// Where everything is written.
    pub(in crate::cli) fn out(&self) -> &Path {
        &self.out
    }

    /// Frames a second of the files.
    pub(in crate::cli) fn rate(&self, job: &Job) -> f64 {
        self.fps.unwrap_or(job.basis.fps)
    }

    /// Makes the folders of the variants, and checks that nothing is overwritten.
    ///
    /// # Errors
    /// Files that are there, and folders that cannot be written to.
    pub(in crate::cli) fn check_variants(
        &self,
        folders: &[PathBuf],
        names: &[String],
        others: &[PathBuf],
    ) -> Result<()> {
        others.iter().try_for_each(|file| self.force().check(file, "--out"))?;
        for folder in folders {
            let files = clip_files(folder, names, &[ClipFormat::Mp4]);
            files.iter().try_for_each(|file| self.force().check(file, "--out"))?;
            let io = |source| Error::Io { action: "create the folder", path: folder.clone(), source };
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        Ok(())
    }

    /// [`Self::is_worth_it`] of the clips of `job` so many times.
    ///
    /// # Errors
    /// Sizes that the model does not take.
    pub(in crate::cli) fn are_worth_it(&self, job: &mut Job, times: usize, ui: &Ui) -> Result<bool> {
        let once = job.requests.clone();
        job.requests = once.iter().cycle().take(times * once.len()).cloned().collect();
        let is_worth_it = self.is_worth_it(job, None, ui);
        job.requests = once;
        is_worth_it
    }
}

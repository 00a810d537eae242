//! `tandem sample --compare-exact`: what the steps that MagCache skips cost.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use models::vae::Bands;

use super::{Done, Sample};
use crate::error::{Error, Result};
use crate::sample::{self, ClipFiles, Course, Likeness, Own, Piece, clip_files, clip_name};

/// The folder of the exact clips, in that of the others.
const EXACT: &str = "exact";

impl Sample {
    /// Whether clips can be compared, and the exact ones be written.
    pub(super) fn check_comparison(&self, done_otherwise: bool, files: &[PathBuf]) -> Result<()> {
        if !self.compare_exact {
            return Ok(());
        }
        if !done_otherwise {
            let why = "compares clips of which steps are skipped: give --cache-preset too".into();
            return Err(Error::Setting { key: "--compare-exact".into(), why });
        }
        files.iter().try_for_each(|file| self.force().check(file, "--out"))
    }

    /// The files of the exact clips.
    pub(super) fn exact_files(&self, names: &[String], formats: &[sample::ClipFormat]) -> Vec<PathBuf> {
        clip_files(&self.out.join(EXACT), names, formats)
    }

    /// Makes the same clips with every step computed, and holds those that were made, which are `made`, against them.
    pub(super) fn compare(
        &self,
        done: &mut Done,
        made: &[Vec<Piece>],
        files: ClipFiles,
    ) -> Result<Vec<Likeness>> {
        let Done { prompted, residents, interrupt, .. } = done;
        let exact = sample::latents(prompted, residents, Course::default(), interrupt)?;
        let exact = exact.ok_or(Error::Interrupted)?.pieces;
        let folder = self.out.join(EXACT);
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { action: "create the folder", path, source }
        };
        std::fs::create_dir_all(&folder).map_err(io(&folder))?;
        sample::files(&folder, (prompted, exact.clone(), &[]), "exact: ", residents, files)?;
        let vae = Bands::new(residents.vaes(files.bands)?, residents.route())?;
        let ratio = vae.first().sizes().spatial_ratio();
        let frames = |pieces: &[Piece]| {
            let mut frames = Vec::new();
            for piece in pieces {
                let (_, _, _, height, width) = piece.latents.dims5()?;
                let mut own = Own::of(piece, height * width * ratio * ratio * 3);
                vae.decode_frames(&piece.latents, files.tiling, &mut |bytes| {
                    frames.extend(own.of_these(bytes));
                    ControlFlow::Continue(())
                })?;
            }
            Ok::<_, Error>(frames)
        };
        let ui = residents.ui();
        let mut all = Vec::new();
        for (index, (made, exact)) in made.iter().zip(&exact).enumerate() {
            let Some(first) = made.first() else { continue };
            let (_, _, _, height, width) = first.latents.dims5()?;
            let likeness = Likeness::of(&frames(made)?, &frames(exact)?, width * ratio, height * ratio);
            let missing = || kernels::Error::msg("clips of unlike sizes were compared");
            let likeness = likeness.ok_or_else(missing)?;
            let name = clip_name(index, &prompted[index].request.prompt);
            let psnr = likeness.psnr.map_or_else(|| "equal".to_owned(), |psnr| format!("PSNR {psnr:.1} dB"));
            ui.note(&format!("{name}: {psnr}, SSIM {:.3} against the exact clip", likeness.ssim));
            all.push(likeness);
        }
        Ok(all)
    }
}

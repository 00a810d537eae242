//! `report.html` in the folder of a run: how it learns, its clips of every step side by side, its checkpoints, its plan. A page that
//! asks no other host for anything; clips and files are those beside it.

mod charts;
pub mod history;
pub mod html;
mod page;
pub mod scores;

use std::io::Write;
use std::path::{Path, PathBuf};

pub use page::Facts;

use crate::error::{Error, Result};
use crate::plan::Plan;
use history::History;

/// The name of the page.
pub const NAME: &str = "report.html";

/// Writes the report of the run of `plan` in the folder `root`. Its path.
///
/// # Errors
/// A log that cannot be read, a file that cannot be written.
pub fn write(root: &Path, plan: &Plan, facts: &Facts) -> Result<PathBuf> {
    let history = History::read(&root.join("metrics.jsonl"))?;
    let scored = scores::scored(root, &history)?;
    let page = page::page(root, plan, (&history, &scored), facts)?;
    let path = root.join(NAME);
    data::atomic::write(&path, |file| file.write_all(page.as_bytes())).map_err(|source| Error::Io {
        action: "write",
        path: path.clone(),
        source,
    })?;
    Ok(path)
}

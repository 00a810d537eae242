//! Files that are either whole or absent.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes a file under a sibling temporary name, syncs it and renames it into place, so that a crash, a kill or a full disk
/// leaves what was there before. On failure the temporary file is removed.
///
/// # Errors
/// Whatever `write` or the system refuses.
pub fn write(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let temporary = temporary_name(path);
    let outcome = write_and_sync(&temporary, write).and_then(|()| std::fs::rename(&temporary, path));
    if outcome.is_err() {
        // The first error is the one to report; a file that was never created cannot be removed.
        let _ = std::fs::remove_file(&temporary);
        return outcome;
    }
    sync_folder(path);
    outcome
}

/// Unique in this process and among running ones, so that two writers never share a half-written file.
fn temporary_name(path: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (process, number) = (std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
    path.with_file_name(format!(".{name}.{process}-{number}.tmp"))
}

fn write_and_sync(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let mut writer = BufWriter::new(File::create(path)?);
    write(&mut writer)?;
    writer.flush()?;
    writer.get_ref().sync_all()
}

/// Makes the rename itself durable. Not every file system can sync a folder, and the file is whole either way.
fn sync_folder(path: &Path) {
    if let Some(folder) = path.parent().and_then(|folder| File::open(folder).ok()) {
        let _ = folder.sync_all();
    }
}

//! Files that are either whole or absent.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

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

/// Most bytes of a file's name in the name of its temporary file: file systems allow 255 in total.
const NAME_BYTES: usize = 128;

/// Unique in this process and among running ones, so that two writers never share a half-written file.
fn temporary_name(path: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = &name[..name.floor_char_boundary(NAME_BYTES)];
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

/// A temporary file that was not renamed: its writer is still at it, or died.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// The file.
    pub path: PathBuf,
    /// The process that wrote it, and its host.
    pub process: u32,
    /// When it was last written to.
    pub modified: SystemTime,
}

/// After this long no write is still going on, wherever its process runs.
const LONGEST_WRITE: Duration = Duration::from_secs(3600);
/// A process of another host that shares the folder, and whose number is free on this one, writes at least this often.
const SHARED_WRITE: Duration = Duration::from_secs(60);

impl Leftover {
    /// Whether its writer has certainly ended, in a folder that other processes write to as well.
    pub fn is_abandoned(&self) -> bool {
        let age = self.modified.elapsed().unwrap_or_default();
        age > LONGEST_WRITE || (age > SHARED_WRITE && is_dead(self.process))
    }
}

/// The temporary files directly in `folder`, of any process.
///
/// # Errors
/// When the folder cannot be listed.
pub fn leftovers(folder: &Path) -> io::Result<Vec<Leftover>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let Some(process) = entry.file_name().to_str().and_then(process_of) else { continue };
        // A file that no longer exists was renamed, or removed by another process.
        let Ok(modified) = entry.metadata().and_then(|metadata| metadata.modified()) else { continue };
        found.push(Leftover { path: entry.path(), process, modified });
    }
    Ok(found)
}

/// The process in the name of a temporary file: `.NAME.PROCESS-NUMBER.tmp`, of an adapter that is being verified
/// `.NAME.PROCESS.unverified.tmp`.
fn process_of(name: &str) -> Option<u32> {
    let (rest, last) = name.strip_prefix('.')?.strip_suffix(".tmp")?.rsplit_once('.')?;
    match last {
        "unverified" => rest.rsplit_once('.')?.1.parse().ok(),
        _ => {
            let (process, number) = last.split_once('-')?;
            number.parse::<u64>().ok()?;
            process.parse().ok()
        }
    }
}

/// Whether no process of this host has the number `process`; false if the system cannot tell.
fn is_dead(process: u32) -> bool {
    let processes = Path::new("/proc");
    processes.join("self").exists() && !processes.join(process.to_string()).exists()
}

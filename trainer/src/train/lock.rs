//! The lock on a run folder: one process at a time writes into it.

#[cfg(unix)]
use std::fs::Metadata;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The lock file in a run folder. It stays there when the run ends: removing it would let two processes lock two files of
/// one name.
pub(super) const LOCK_FILE: &str = "run.lock";

/// A held lock on a run folder; the system releases it when this is dropped or the process dies.
#[derive(Debug)]
pub(super) struct RunLock {
    /// Owns the lock.
    file: File,
    /// Whether the file system has no locks, so that nothing keeps a second run away.
    pub is_void: bool,
}

impl RunLock {
    /// Locks the run folder `folder` for this process, and writes pid and host into its lock file.
    ///
    /// # Errors
    /// [`Error::RunInUse`] with the process that holds it, and files that cannot be made.
    pub fn acquire(folder: &Path) -> Result<Self> {
        let path = folder.join(LOCK_FILE);
        let io = |source| Error::Io { action: "lock", path: path.clone(), source };
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(io)?;
        let is_void = match file.try_lock() {
            Ok(()) => false,
            Err(TryLockError::WouldBlock) => {
                return Err(Error::RunInUse { folder: folder.to_owned(), holder: holder(&mut file) });
            }
            // A file system without locks.
            Err(TryLockError::Error(_)) => true,
        };
        let host = gethostname::gethostname();
        let text = format!("process {} on host {}\n", std::process::id(), host.to_string_lossy());
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(text.as_bytes()))
            .map_err(io)?;
        Ok(Self { file, is_void })
    }

    /// Whether the file that is locked is still the one in `folder`: a run that never began removes its folder.
    fn is_in(&self, folder: &Path) -> bool {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let identity = |metadata: std::io::Result<Metadata>| metadata.ok().map(|m| (m.dev(), m.ino()));
            identity(self.file.metadata()) == identity(std::fs::metadata(folder.join(LOCK_FILE)))
        }
        #[cfg(not(unix))]
        {
            self.file.metadata().is_ok() && folder.join(LOCK_FILE).exists()
        }
    }
}

/// Whether a process holds the lock on the run folder `folder`. Where the file system has no locks, one may.
///
/// # Errors
/// A lock file that cannot be opened.
pub(super) fn is_held(folder: &Path) -> Result<bool> {
    let path = folder.join(LOCK_FILE);
    match File::open(&path) {
        Ok(file) => Ok(file.try_lock().is_err()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::Io { action: "open", path, source }),
    }
}

/// Who holds the lock, as it wrote it; it may not have come to that yet.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    match file.take(1024).read_to_string(&mut text) {
        Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
        _ => "another process".to_owned(),
    }
}

/// Claims the folder of a fresh run: `folder` itself, or where a run is there already or another process is about to begin
/// one, the first free name of `numbered`.
///
/// # Errors
/// A folder that cannot be made or locked.
pub(super) fn claim(
    numbered: impl Fn(usize) -> PathBuf,
    is_run: impl Fn(&Path) -> bool,
) -> Result<(PathBuf, RunLock)> {
    let mut number = 1;
    loop {
        let folder = numbered(number);
        number += 1;
        if is_run(&folder) {
            continue;
        }
        let is_new = make(&folder)?;
        let lock = match RunLock::acquire(&folder) {
            Ok(lock) => lock,
            Err(Error::RunInUse { .. }) => continue,
            Err(error) => return Err(error),
        };
        if !lock.is_in(&folder) {
            number -= 1;
            continue;
        }
        // Another process may have begun a run here, and even ended it, since this one looked. Without locks only a folder
        // of our own making is certainly ours.
        if !is_run(&folder) && (is_new || !lock.is_void) {
            return Ok((folder, lock));
        }
    }
}

/// Makes `folder`; whether it was not there before.
fn make(folder: &Path) -> Result<bool> {
    let io = |source| Error::Io { action: "create", path: folder.to_owned(), source };
    if let Some(parent) = folder.parent() {
        std::fs::create_dir_all(parent).map_err(io)?;
    }
    match std::fs::create_dir(folder) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists && folder.is_dir() => Ok(false),
        Err(error) => Err(io(error)),
    }
}

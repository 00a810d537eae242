//! The processes that train: `tandem train`, one each. They outlive the server, and are known again by the lock of their run.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::error::{Error, Result};

/// This program with `words`, without a terminal.
///
/// # Errors
/// If its own file is gone.
pub(in crate::serve) fn tandem(words: &[&str]) -> Result<Command> {
    let program = std::env::current_exe().map_err(failed)?;
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::null());
    // Ctrl-C in the server's terminal is for the server.
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    Ok(command)
}

/// What another call of this program gave as JSON.
///
/// # Errors
/// Its own error.
pub(in crate::serve) fn told(mut command: Command) -> Result<serde_json::Value, String> {
    let Output { stdout, stderr, .. } = command.output().map_err(|error| error.to_string())?;
    let last = String::from_utf8_lossy(&stdout);
    let value = last.lines().rev().find_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    match value {
        Some(value) => match value.get("error").and_then(|error| error.as_str()) {
            Some(error) => Err(error.to_owned()),
            None => Ok(value),
        },
        None => Err(String::from_utf8_lossy(&stderr).trim().to_owned()),
    }
}

fn failed(source: std::io::Error) -> Error {
    Error::Io { action: "start", path: "tandem".into(), source }
}

/// Starts `command`, whose output is appended to the file `log`.
///
/// # Errors
/// What the system says.
pub(super) fn start(mut command: Command, log: &Path) -> Result<Child> {
    let io = |source| Error::Io { action: "write", path: log.to_owned(), source };
    let file = OpenOptions::new().create(true).append(true).open(log).map_err(io)?;
    let errors = file.try_clone().map_err(io)?;
    command.stdout(file).stderr(errors).spawn().map_err(failed)
}

/// The process that works in the run folder `folder`, if one does. The lock itself is not tried: a run that begins at that moment
/// would find it taken.
pub(super) fn worker(folder: &Path) -> Option<u32> {
    let text = std::fs::read_to_string(folder.join("run.lock")).ok()?;
    let (process, host) = text.strip_prefix("process ")?.split_once(" on host ")?;
    let is_here = host.trim() == gethostname::gethostname().to_string_lossy();
    let process = process.parse().ok()?;
    (is_here && trains(process)).then_some(process)
}

/// Whether the process `id` is there and trains: its number may belong to another one by now.
fn trains(id: u32) -> bool {
    let Ok(arguments) = std::fs::read(format!("/proc/{id}/cmdline")) else { return false };
    let is_over = std::fs::read_to_string(format!("/proc/{id}/stat"))
        .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')));
    !is_over && arguments.split(|byte| *byte == 0).any(|word| word == b"train")
}

/// Asks the process `id` to save and stop.
pub(super) fn ask_to_stop(id: u32) {
    #[cfg(unix)]
    if let Ok(id) = i32::try_from(id) {
        // One that has ended needs no signal.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), nix::sys::signal::Signal::SIGINT);
    }
    #[cfg(not(unix))]
    let _ = id;
}

/// Bytes of host memory that the process `id` has.
pub(super) fn memory_of(id: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kibibytes| kibibytes << 10)
}

/// The last `most` bytes of the file at `path`, from the beginning of a line on.
pub(in crate::serve) fn tail(path: &Path, most: u64) -> String {
    let read = || -> std::io::Result<(Vec<u8>, bool)> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
        let mut bytes = Vec::new();
        file.take(most).read_to_end(&mut bytes)?;
        Ok((bytes, length > most))
    };
    let (bytes, is_cut) = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    match (is_cut, text.split_once('\n')) {
        (true, Some((_, rest))) => rest.to_owned(),
        _ => text,
    }
}

/// The error that a log ends with.
pub(super) fn error_in(log: &Path) -> Option<String> {
    let text = tail(log, 16 << 10);
    let start = text.rfind("error: ")?;
    Some(text[start + "error: ".len()..].trim().to_owned())
}

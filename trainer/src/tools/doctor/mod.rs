//! What this machine offers: devices, programs, folders, engines; what is missing and how to get it.

pub mod cluster;
mod cuda;

use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

/// The state of a requirement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// There and in order.
    Good,
    /// Not there; much works without it.
    Missing,
    /// Prevents runs.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub what: &'static str,
    /// Its state.
    pub standing: Standing,
    /// What was found.
    pub found: String,
    /// What to do about it, where something can be done.
    pub way_out: Option<String>,
}

/// Looks at everything; `runs` is the folder that runs would be written to.
pub fn examine(runs: &Path) -> Vec<Finding> {
    let mut findings = vec![version(), processor(), memory()];
    findings.extend(cuda::examine());
    let why = "needed for WebM, MKV, AVI, HEVC and AV1 clips only; H.264 MP4 and MOV, GIF, WebP, APNG and stills are \
               read without it";
    findings.extend(["ffmpeg", "ffprobe"].map(|name| program(name, why)));
    findings.push(writable(runs));
    findings
}

fn good(what: &'static str, found: impl Into<String>) -> Finding {
    Finding { what, standing: Standing::Good, found: found.into(), way_out: None }
}

fn version() -> Finding {
    let system = format!("{} {}", std::env::consts::OS, std::env::consts::ARCH);
    good("tandem", format!("{} on {system}", env!("TANDEM_VERSION")))
}

fn processor() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    good("processor", format!("{cores} {}", if cores == 1 { "core" } else { "cores" }))
}

/// Total and free memory, where the system keeps `/proc/meminfo`.
fn memory() -> Finding {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let gib = |key: &str| -> Option<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? / 1024.0 / 1024.0)
    };
    match (gib("MemTotal"), gib("MemAvailable")) {
        (Some(total), Some(free)) => {
            good("memory", format!("{total:.1} GiB, {free:.1} GiB of them available"))
        }
        _ => good("memory", "unknown on this system"),
    }
}

/// A program on PATH with its first line of `-version`.
fn program(name: &'static str, why: &str) -> Finding {
    let output = Command::new(name).arg("-version").stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            good(name, text.lines().next().unwrap_or("no version given").to_owned())
        }
        _ => Finding {
            what: name,
            standing: Standing::Missing,
            found: format!("not found on PATH; {why}"),
            way_out: Some("apt install ffmpeg, or brew install ffmpeg".into()),
        },
    }
}

/// Whether runs can be written. A folder that is created for the check is removed again.
fn writable(runs: &Path) -> Finding {
    // The nearest existing parent of the folder; for a plain name the current folder.
    let nearest = runs.ancestors().find(|place| place.exists()).unwrap_or(Path::new("."));
    let there = if nearest.as_os_str().is_empty() { Path::new(".") } else { nearest };
    let probe = there.join(format!(".tandem-doctor-{}", std::process::id()));
    let attempt = std::fs::write(&probe, b"").and_then(|()| std::fs::remove_file(&probe));
    match attempt {
        Ok(()) => good("runs folder", format!("{} can be written", runs.display())),
        Err(error) => Finding {
            what: "runs folder",
            standing: Standing::Bad,
            found: format!("{} cannot be written: {error}", runs.display()),
            way_out: Some(
                "make it writable, start from another folder, or set run.folder and run.cache".into(),
            ),
        },
    }
}

//! Time and memory of a measured piece of work.

use std::time::Instant;

use kernels::Device;
use kernels::device::{Memory, memory, reset_peak, synchronize};

use super::{Repeats, gib, rounded};
use crate::error::Result;

/// What a measurement found.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Measured {
    /// Median seconds of the runs that count.
    pub seconds: f64,
    /// How many of the devices are GPUs.
    pub gpus: usize,
    /// The most memory of each device in all runs, the ones before those that count too, in GiB.
    pub peak_gib: Vec<f64>,
    /// The same without the runs before.
    pub steady_peak_gib: Vec<f64>,
    /// The most memory that each GPU's allocator took from the driver, in GiB.
    pub reserved_gib: Vec<f64>,
}

/// The devices of a measurement, each once.
pub(super) struct Meter<'a> {
    devices: Vec<&'a Device>,
}

impl<'a> Meter<'a> {
    /// Measures `devices`; duplicates are measured once.
    pub fn of(devices: impl IntoIterator<Item = &'a Device>) -> Self {
        let mut distinct: Vec<&Device> = Vec::new();
        for device in devices {
            if distinct.iter().all(|other| other.location() != device.location()) {
                distinct.push(device);
            }
        }
        Self { devices: distinct }
    }

    /// Runs `work` as often as `repeats` says, with idle devices before and after each counted run.
    ///
    /// # Errors
    /// The first error of `work`.
    pub fn measure(&self, repeats: Repeats, mut work: impl FnMut() -> Result<()>) -> Result<Measured> {
        self.reset()?;
        for _ in 0..repeats.warmup {
            work()?;
        }
        self.wait()?;
        let (first, _) = self.peaks()?;
        self.reset()?;
        let mut seconds = Vec::new();
        for _ in 0..repeats.iters.max(1) {
            let start = Instant::now();
            work()?;
            self.wait()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        let (steady_peak_gib, reserved_gib) = self.peaks()?;
        let peak_gib = first.iter().zip(&steady_peak_gib).map(|(a, b)| a.max(*b)).collect();
        let gpus = self.devices.iter().filter(|device| device.is_cuda()).count();
        Ok(Measured { seconds: seconds[seconds.len() / 2], gpus, peak_gib, steady_peak_gib, reserved_gib })
    }

    fn wait(&self) -> Result<()> {
        Ok(self.devices.iter().try_for_each(|device| synchronize(device))?)
    }

    fn reset(&self) -> Result<()> {
        reset_host_peak();
        Ok(self.devices.iter().try_for_each(|device| reset_peak(device))?)
    }

    /// Peaks of each device, and what its allocator reserved; for the CPU those of the process.
    fn peaks(&self) -> Result<(Vec<f64>, Vec<f64>)> {
        let (mut held, mut reserved) = (Vec::new(), Vec::new());
        for device in &self.devices {
            match memory(device)? {
                Some(Memory { peak, reserved_peak, .. }) => {
                    held.push(gib(peak));
                    reserved.push(gib(reserved_peak));
                }
                None => held.extend(host_peak_gib()),
            }
        }
        Ok((held, reserved))
    }
}

/// Forgets the process's peak so far, where the system can.
fn reset_host_peak() {
    // Refused without privileges on some systems: the peak is then that of the process's whole life.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The peak memory of the process since the last reset, in GiB, if the system reports it. Files that are mapped
/// count where they were read.
pub(super) fn host_peak_gib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(rounded(kib / 1024.0 / 1024.0, 2))
}

//! A profiler: records how long each operation takes on its device, by class.
//!
//! Off by default, and then an operation pays for one look at a thread-local. [`record`] turns it on for the thread that
//! calls it, for as long as its work runs; every public operation of this crate opens a scope of its class.
//! An operation that calls others counts as one, of its own class.

use std::cell::RefCell;
use std::ops::{Add, AddAssign};

use crate::Device;
use crate::clock::Mark;
use crate::{Error, Result};

/// What kind of work an operation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Matrix products and convolutions.
    Gemm,
    /// Softmax attention.
    Attention,
    /// Norms, activations, sums, casts: bound by memory.
    Elementwise,
    /// Between devices, and to the host and back.
    Copy,
}

/// Seconds by class.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Times {
    /// Of [`Class::Gemm`].
    pub gemm: f64,
    /// Of [`Class::Attention`].
    pub attention: f64,
    /// Of [`Class::Elementwise`].
    pub elementwise: f64,
    /// Of [`Class::Copy`].
    pub copy: f64,
}

impl Times {
    /// All classes together.
    pub fn total(&self) -> f64 {
        self.gemm + self.attention + self.elementwise + self.copy
    }

    fn of(&mut self, class: Class) -> &mut f64 {
        match class {
            Class::Gemm => &mut self.gemm,
            Class::Attention => &mut self.attention,
            Class::Elementwise => &mut self.elementwise,
            Class::Copy => &mut self.copy,
        }
    }
}

impl Add for Times {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            gemm: self.gemm + other.gemm,
            attention: self.attention + other.attention,
            elementwise: self.elementwise + other.elementwise,
            copy: self.copy + other.copy,
        }
    }
}

impl AddAssign for Times {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// What was noted while some work ran.
#[derive(Debug, Default)]
pub struct Recording {
    spans: Vec<(Class, Mark, Mark)>,
    /// The first mark that could not be made.
    failed: Option<Error>,
    /// Whether an operation is under way, whose inner ones are not noted.
    is_inside: bool,
}

impl Recording {
    /// The device's seconds by class. Waits for the device.
    ///
    /// # Errors
    /// When a mark could not be made, or the device failed.
    pub fn times(self) -> Result<Times> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let mut times = Times::default();
        for (class, start, end) in &self.spans {
            *times.of(*class) += end.seconds_since(start)?;
        }
        Ok(times)
    }
}

thread_local! {
    // An operation takes tensors and nothing else, so what notes it can only be found through its thread. It is there
    // between the two ends of `record` and changes no result.
    static RECORDING: RefCell<Option<Recording>> = const { RefCell::new(None) };
}

/// Runs `work` and notes every operation that it calls on this thread.
pub fn record<T>(work: impl FnOnce() -> T) -> (T, Recording) {
    let before = RECORDING.replace(Some(Recording::default()));
    let result = work();
    let recording = RECORDING.replace(before);
    (result, recording.unwrap_or_default())
}

/// Records an operation on `device` from here to the end of the scope, if this thread records and no other operation is
/// under way.
#[must_use = "the scope ends where it is dropped"]
pub(crate) fn scope(class: Class, device: &Device) -> Scope {
    let is_noted = RECORDING.with_borrow_mut(|recording| match recording {
        Some(recording) if !recording.is_inside => {
            recording.is_inside = true;
            true
        }
        _ => false,
    });
    Scope { begun: is_noted.then(|| Begun { class, device: device.clone(), start: Mark::now(device) }) }
}

/// An operation under way.
pub(crate) struct Scope {
    begun: Option<Begun>,
}

struct Begun {
    class: Class,
    device: Device,
    start: Result<Mark>,
}

impl Drop for Scope {
    fn drop(&mut self) {
        let Some(Begun { class, device, start }) = self.begun.take() else { return };
        let end = Mark::now(&device);
        RECORDING.with_borrow_mut(|recording| {
            let Some(recording) = recording else { return };
            recording.is_inside = false;
            match (start, end) {
                (Ok(start), Ok(end)) => recording.spans.push((class, start, end)),
                (Err(error), _) | (_, Err(error)) => {
                    recording.failed.get_or_insert(error);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;
    use std::time::Duration;

    use super::*;

    const NAP: Duration = Duration::from_millis(5);

    #[test]
    fn an_operation_within_another_counts_as_one() {
        let ((), recording) = record(|| {
            let _outer = scope(Class::Attention, &Device::Cpu);
            let _inner = scope(Class::Gemm, &Device::Cpu);
            sleep(NAP);
        });
        let times = recording.times().unwrap();
        assert!(times.attention >= NAP.as_secs_f64(), "{times:?}");
        assert_eq!(times.gemm + times.elementwise + times.copy, 0.0);
    }

    #[test]
    fn nothing_is_noted_outside_of_a_recording() {
        drop(scope(Class::Gemm, &Device::Cpu));
        let ((), recording) = record(|| {});
        assert_eq!(recording.times().unwrap(), Times::default());
        assert!(RECORDING.take().is_none());
    }
}

//! The learning rate as a function of the step.

use serde::{Deserialize, Serialize};

/// The shape of the learning rate over a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedule {
    /// The same all along.
    Constant,
    /// Falls evenly to 0 at the last step.
    Linear,
    /// Falls along half a cosine to 0 at the last step.
    Cosine,
}

/// The learning rate of update `step` (from 0) of `steps`: rises evenly over `warmup` updates, then follows `schedule`.
pub fn learning_rate(peak: f64, schedule: LrSchedule, warmup: u64, steps: u64, step: u64) -> f64 {
    if step < warmup {
        return peak * (step + 1) as f64 / (warmup + 1) as f64;
    }
    let progress = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
    match schedule {
        LrSchedule::Constant => peak,
        LrSchedule::Linear => peak * (1.0 - progress),
        LrSchedule::Cosine => peak * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_warm_up_peak_and_end() {
        let at = |schedule, step| learning_rate(1.0, schedule, 4, 14, step);
        for schedule in [LrSchedule::Constant, LrSchedule::Linear, LrSchedule::Cosine] {
            assert!((at(schedule, 0) - 0.2).abs() < 1e-12 && (at(schedule, 3) - 0.8).abs() < 1e-12);
            assert!((at(schedule, 4) - 1.0).abs() < 1e-12);
        }
        assert!(
            (at(LrSchedule::Linear, 9) - 0.5).abs() < 1e-12
                && (at(LrSchedule::Cosine, 9) - 0.5).abs() < 1e-12
        );
        assert!(at(LrSchedule::Linear, 13) > 0.0 && at(LrSchedule::Constant, 13) == 1.0);
    }
}

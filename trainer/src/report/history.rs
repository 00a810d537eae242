//! What the log of a run tells: its steps, its held-out losses, what it was told.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};

/// The rows of `metrics.jsonl`, in order.
#[derive(Debug, Default, PartialEq)]
pub struct History {
    /// A step each.
    pub steps: Vec<StepRow>,
    /// Held-out losses of each network: `""` of a model that is whole, `high` and `low` of two experts.
    pub held_out: BTreeMap<String, Vec<HeldOutRow>>,
    /// What the run was told, with the steps made before.
    pub told: Vec<(u64, String)>,
}

/// A step.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct StepRow {
    /// Steps made, this one included.
    pub step: u64,
    /// Loss over all micro-batches.
    pub loss: f64,
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Sigma of each sample.
    pub sigma: Vec<f64>,
    /// Wall-clock time.
    pub seconds: f64,
    /// Losses of the two experts, of those that had a micro-batch.
    #[serde(default)]
    pub experts: BTreeMap<String, ExpertLoss>,
}

/// The loss of one expert in a step.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub struct ExpertLoss {
    /// Mean over its own samples.
    pub loss: f64,
}

/// A held-out loss.
#[derive(Debug, Clone, PartialEq)]
pub struct HeldOutRow {
    /// Steps made.
    pub step: u64,
    /// Mean over items and sigmas.
    pub loss: f64,
    /// Two standard errors of its change since the first: the items and their noise are the same every time, so what is left is
    /// how differently the nine noise levels changed.
    pub band: f64,
}

/// Any row.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Row {
    HeldOut { step: u64, eval_loss: f64, by_sigma: Vec<f64>, expert: Option<String> },
    Told { step: u64, told: String },
    Step(StepRow),
}

impl History {
    /// Reads the log at `path`. The last line may be half-written.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        Ok(Self::of(&text))
    }

    /// The rows of a log.
    pub fn of(text: &str) -> Self {
        let mut history = Self::default();
        let mut first: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for row in text.lines().filter_map(|line| serde_json::from_str::<Row>(line).ok()) {
            match row {
                Row::Step(row) => history.steps.push(row),
                Row::Told { step, told } => history.told.push((step, told)),
                Row::HeldOut { step, eval_loss: loss, by_sigma, expert } => {
                    let name = expert.unwrap_or_default();
                    let before = first.entry(name.clone()).or_insert_with(|| by_sigma.clone());
                    let band = 2.0 * standard_error(before, &by_sigma);
                    history.held_out.entry(name).or_default().push(HeldOutRow { step, loss, band });
                }
            }
        }
        history
    }

    /// The held-out loss of all networks after `step` steps: the mean of theirs, and its band.
    pub fn held_out_at(&self, step: u64) -> Option<(f64, f64)> {
        let at = |rows: &Vec<HeldOutRow>| rows.iter().rfind(|row| row.step == step).cloned();
        let rows: Option<Vec<HeldOutRow>> = self.held_out.values().map(at).collect();
        let rows = rows.filter(|rows| !rows.is_empty())?;
        let count = rows.len() as f64;
        let loss = rows.iter().map(|row| row.loss).sum::<f64>() / count;
        Some((loss, rows.iter().map(|row| row.band * row.band).sum::<f64>().sqrt() / count))
    }
}

/// The standard error of the mean of the differences of two rows of numbers.
fn standard_error(before: &[f64], after: &[f64]) -> f64 {
    let changes: Vec<f64> = before.iter().zip(after).map(|(before, after)| after - before).collect();
    if changes.len() < 2 {
        return 0.0;
    }
    let count = changes.len() as f64;
    let mean = changes.iter().sum::<f64>() / count;
    let squares = changes.iter().map(|change| (change - mean).powi(2)).sum::<f64>();
    (squares / (count - 1.0) / count).sqrt()
}

/// `rows` averaged over the `window` newest up to each.
pub fn smoothed(rows: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let mut sum = 0.0;
    let mean = |(index, (x, y)): (usize, &(f64, f64))| {
        sum += y;
        if index >= window {
            sum -= rows[index - window].1;
        }
        (*x, sum / (index + 1).min(window) as f64)
    };
    rows.iter().enumerate().map(mean).collect()
}

/// `rows` as at most `most` points: means of as many neighbours as that takes.
pub fn thinned(rows: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let each = rows.len().div_ceil(most.max(1)).max(1);
    let mean = |part: &[(f64, f64)]| {
        let count = part.len() as f64;
        let sum = part.iter().fold((0.0, 0.0), |sum, row| (sum.0 + row.0, sum.1 + row.1));
        (sum.0 / count, sum.1 / count)
    };
    rows.chunks(each).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_each_kind_are_told_apart_and_broken_ones_passed_over() {
        let text = r#"{"step":0,"eval_loss":2.0,"by_sigma":[1.0,2.0,3.0]}
{"step":1,"epoch":0,"loss":0.5,"grad_norm":1.0,"lr":0.1,"sigma":[0.3],"seconds":2.0,"items":["a"]}
{"step":1,"told":"lr=0.1"}
{"step":4,"eval_loss":1.0,"by_sigma":[0.0,1.5,1.5]}
{"step":5,"epo"#;
        let history = History::of(text);
        assert_eq!(
            (history.steps.len(), history.told.as_slice()),
            (1, [(1, "lr=0.1".to_owned())].as_slice())
        );
        // Changes of -1, -0.5 and -1.5: a standard deviation of 0.5 over three.
        let (loss, band) = history.held_out_at(4).unwrap();
        assert!((loss - 1.0).abs() < 1e-12 && (band - 2.0 * 0.5 / 3f64.sqrt()).abs() < 1e-12, "{band}");
        assert_eq!(history.held_out_at(3), None);
    }

    #[test]
    fn means_are_over_the_newest_and_points_are_means() {
        let rows: Vec<(f64, f64)> = (1..=5).map(|x| (f64::from(x), f64::from(x))).collect();
        let means: Vec<f64> = smoothed(&rows, 3).into_iter().map(|(_, y)| y).collect();
        assert_eq!(means, [1.0, 1.5, 2.0, 3.0, 4.0]);
        assert_eq!(thinned(&rows, 3), [(1.5, 1.5), (3.5, 3.5), (5.0, 5.0)]);
        assert_eq!(thinned(&rows, 9), rows);
    }
}

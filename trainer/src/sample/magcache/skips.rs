//! Which steps each clip of a set skips: settled and printed before the first step.

use models::published::{Facts, Published};
use serde_json::{Value, json};

use super::{Halves, MagCache, Table, skipped};
use crate::base::BaseModel;
use crate::encode::prompt::ClipRequest;
use crate::error::{Error, Result};
use crate::learning::NoiseRange;

/// The steps that the clips of a set skip.
#[derive(Debug, Clone)]
pub struct Skips {
    /// By which rule.
    pub settings: MagCache,
    /// What the table is, or where it was read.
    pub source: String,
    /// Of each clip, from 0.
    pub clips: Vec<Vec<usize>>,
}

impl Skips {
    /// What `requests` skip by `table`, which is called `source`, on a model whose experts change at the sigma `boundary`; none
    /// where it is one network.
    ///
    /// # Errors
    /// A table that does not fit.
    pub fn planned(
        settings: MagCache,
        (table, source): (&Table, String),
        requests: &[ClipRequest],
        boundary: Option<f64>,
    ) -> Result<Self> {
        let named = |error| match error {
            Error::MagCacheTable { why, .. } => Error::MagCacheTable { what: source.clone(), why },
            other => other,
        };
        let of = |request| of_clip(&settings, table, request, boundary).map_err(named);
        let clips = requests.iter().map(of).collect::<Result<_>>()?;
        Ok(Self { settings, source, clips })
    }

    /// For people: a line for the rule and a line for each clip.
    pub fn lines(&self, requests: &[ClipRequest]) -> Vec<String> {
        let of = |(index, (skipped, request)): (usize, (&Vec<usize>, &ClipRequest))| {
            let steps = request.steps;
            let list = skipped.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
            let left = steps - skipped.len();
            format!("  clip {index}: the blocks run in {left} of {steps} steps; skipped: {list}")
        };
        let head = format!("{}; {}", self.settings, self.source);
        std::iter::once(head).chain(self.clips.iter().zip(requests).enumerate().map(of)).collect()
    }
}

/// For machines: the steps that are skipped of the first clip, and of each, by halves of the guidance.
pub fn json(requests: &[ClipRequest], skips: Option<&Skips>) -> Value {
    let of = |(index, request): (usize, &ClipRequest)| {
        let skipped = skips.map_or(&[][..], |skips| &skips.clips[index]);
        let is_guided = request.guidance != 1.0 || request.guidance_high != 1.0;
        json!({ "cond": skipped, "uncond": if is_guided { skipped } else { &[] } })
    };
    let all: Vec<Value> = requests.iter().enumerate().map(of).collect();
    let clips = requests.iter().zip(&all).map(
        |(request, skipped)| json!({ "prompt": request.prompt, "steps": request.steps, "skipped": skipped }),
    );
    json!({ "skipped": all.first(), "clips": clips.collect::<Vec<_>>() })
}

/// The published table for `request` on `model`, with what it is called.
pub fn published(model: &Published, request: &ClipRequest) -> Option<(Table, String)> {
    let known = model.magnitudes(request.image.is_some(), request.width * request.height)?;
    Some((known.into(), format!("published table of {}", model.title)))
}

/// The published model that `model` is, where its tensors and names tell.
///
/// # Errors
/// Files that do not open.
pub fn published_model(model: &BaseModel) -> Result<Option<&'static Published>> {
    let files = model.dits.of(models::Expert::High);
    let (_, weights) = files.open()?;
    let facts = Facts::read(|name| weights.shape(name).map(<[usize]>::to_vec));
    let found = Published::at(facts, &files.weights);
    Ok(found.into_iter().find(|known| known.networks == model.dits.networks()))
}

fn of_clip(
    settings: &MagCache,
    table: &Table,
    request: &ClipRequest,
    boundary: Option<f64>,
) -> Result<Vec<usize>> {
    if let Some(made) = table.made.as_ref().filter(|made| (made.shift - request.shift).abs() > 1e-6) {
        let why =
            format!("it was measured with shift {}, and the clip has shift {}", made.shift, request.shift);
        return Err(Error::MagCacheTable { what: "the table".to_owned(), why });
    }
    let (schedule, high) = (request.schedule()?, high_steps(request, boundary)?);
    let table = table.fitted(schedule.steps(), high)?;
    let of = |scale: f64| if scale == 1.0 { Halves::Cond } else { Halves::Both };
    let halves = [of(request.guidance_high), of(request.guidance)];
    Ok(skipped(settings, &table, high.unwrap_or(0), halves))
}

/// The steps of `request` that the expert for high noise makes; nothing where there is one network.
///
/// # Errors
/// A grid that cannot be.
pub fn high_steps(request: &ClipRequest, boundary: Option<f64>) -> Result<Option<usize>> {
    let Some(boundary) = boundary else { return Ok(None) };
    let range = NoiseRange::Of { expert: models::Expert::High, boundary };
    let by_sigma =
        request.schedule()?.timesteps.into_iter().filter(|timestep| range.holds(*timestep)).count();
    Ok(Some(request.high_steps.unwrap_or(by_sigma)))
}

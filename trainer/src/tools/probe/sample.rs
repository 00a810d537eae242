//! A whole sampling loop on tensors from a file: experts, guidance, solver, skipped steps.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use kernels::{Device, Tensor};
use models::dit::{Conditioning, Raw, Role};
use models::expert::{Expert, Networks};
use serde::Deserialize;
use serde_json::Value;

use super::{Inputs, Outputs};
use crate::encode::PictureInputs;
use crate::encode::prompt::ClipRequest;
use crate::error::{Error, Result};
use crate::learning::NoiseRange;
use crate::pipeline::Pipeline;
use crate::sample::magcache::{CacheConfig, CacheValues, Halves, Table, skipped};
use crate::sample::{Prompted, SampleConfig, Session};
use crate::solver::{FreshNoise, Schedule, SolverKind};

/// Settings of a loop. Unknown keys are reported.
#[derive(Debug, Clone, Deserialize)]
pub struct Settings {
    steps: Option<usize>,
    shift: Option<f64>,
    solver: Option<SolverKind>,
    /// The same, as few-step files call it.
    rule: Option<SolverKind>,
    /// A scale; or that of the low and of the high expert; words mean none.
    guidance: Option<Value>,
    boundary: Option<f64>,
    /// Steps of the expert for high noise, in place of the boundary.
    first_low_step: Option<usize>,
    /// A grid in place of one by steps and shift, without the final 0.
    sigmas: Option<Vec<f32>>,
    timesteps: Option<Vec<f32>>,
    threshold: Option<f64>,
    #[serde(rename = "K")]
    most: Option<usize>,
    retention: Option<f64>,
    /// Keys that are not used.
    #[serde(flatten)]
    pub unused: BTreeMap<String, Value>,
}

impl Settings {
    /// Reads a JSON file, or the object `case` in it.
    ///
    /// # Errors
    /// If it is not JSON settings.
    pub fn read(path: &Path, case: Option<&str>) -> Result<Self> {
        let refuse = |why: String| Error::ProbeInput { path: path.to_owned(), why };
        let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
        let mut whole: Value = serde_json::from_str(&text).map_err(|error| refuse(error.to_string()))?;
        let object = match case {
            Some(case) => whole.get_mut(case).map(Value::take),
            None => Some(whole),
        };
        let object = object.ok_or_else(|| refuse(format!("it has no `{}`", case.unwrap_or_default())))?;
        serde_json::from_value(object).map_err(|error| refuse(error.to_string()))
    }

    /// Of the low and of the high expert.
    fn guidance(&self) -> [f64; 2] {
        match &self.guidance {
            Some(Value::Array(both)) => [0, 1].map(|i| both.get(i).and_then(Value::as_f64).unwrap_or(1.0)),
            Some(one) => [one.as_f64().unwrap_or(1.0); 2],
            None => [1.0; 2],
        }
    }

    fn schedule(&self) -> Result<Schedule> {
        let kind = self.solver.or(self.rule).unwrap_or_default();
        Ok(match (&self.sigmas, &self.timesteps) {
            (Some(sigmas), Some(timesteps)) => Schedule::given(kind, sigmas, timesteps)?,
            _ => Schedule::new(kind, Default::default(), self.steps.unwrap_or(0), self.shift.unwrap_or(5.0))?,
        })
    }

    /// The steps that are skipped, if there is a `table`.
    fn skipped(
        &self,
        table: Option<Vec<Vec<f64>>>,
        (steps, high): (usize, Option<usize>),
    ) -> Result<Vec<usize>> {
        let (Some(rows), Some(threshold), Some(most), Some(retention)) =
            (table, self.threshold, self.most, self.retention)
        else {
            return Ok(Vec::new());
        };
        let column = |i: usize| rows.iter().map(|row| row.get(i).copied().unwrap_or(1.0)).collect();
        let table = Table { cond: column(0), uncond: column(1), high_steps: high, made: None };
        let table = if rows.len() == steps { table } else { table.fitted(steps, high)? };
        let settings = CacheConfig::Values(CacheValues { threshold, most, retention }).settle("threshold")?;
        let halves = self.guidance().map(|scale| if scale == 1.0 { Halves::Cond } else { Halves::Both });
        Ok(skipped(&settings, &table, high.unwrap_or(0), [halves[1], halves[0]]))
    }
}

/// Goes from `noise` [c, t, h, w] to a latent with `context` and `context_null` [rows, width], through `networks`, one or the
/// experts for high and low noise: `latents` [steps, c, t, h, w] after each step, and the steps that were skipped.
///
/// # Errors
/// Missing tensors, and settings that fit no network.
pub fn run(networks: &[Pipeline], inputs: &Inputs, settings: &Settings) -> Result<(Outputs, Vec<usize>)> {
    let (schedule, dit) = (settings.schedule()?, networks[0].config().clone());
    let (steps, device) = (schedule.steps(), networks[0].ends()[0].clone());
    let ranges = match (networks.len(), settings.boundary) {
        (1, _) => vec![NoiseRange::All],
        (_, boundary) => {
            let boundary = boundary.unwrap_or(dit.defaults(Networks::Pair).boundary);
            Expert::ALL.map(|expert| NoiseRange::Of { expert, boundary }).to_vec()
        }
    };
    let by_sigma = || schedule.timesteps.iter().filter(|timestep| ranges[0].holds(**timestep)).count();
    let high = (networks.len() > 1).then(|| settings.first_low_step.unwrap_or_else(by_sigma));
    let skips = settings.skipped(inputs.rows("table")?, (steps, high))?;

    let batched = |name: &str| Ok::<_, Error>(inputs.optional(name)?.map(|x| x.unsqueeze(0)).transpose()?);
    let text = |x: Tensor| Conditioning::<Raw>::new().with(Role::TEXT, x);
    let positive = text(inputs.ranked("context", 2)?.unsqueeze(0)?);
    let negative = batched("context_null")?.map_or_else(|| positive.clone(), text);
    let [low, high_guidance] = settings.guidance();
    let base = SampleConfig::default().request(dit.defaults(Networks::Whole), [16, 16], 1, 0);
    let request = ClipRequest { guidance: low, guidance_high: high_guidance, high_steps: high, ..base };
    let noise_bcthw = inputs.ranked("noise", 4)?.unsqueeze(0)?.to_device(&device)?;
    let clips = [Prompted { request, positive, negative, noise_bcthw, shown: PictureInputs::default() }];
    let renoise = match inputs.optional("renoise")? {
        Some(all) => {
            let one = |i: usize| Ok(all.get(i)?.unsqueeze(0)?.to_device(&device)?);
            (0..all.dim(0)?).map(one).collect::<Result<Vec<_>>>()?
        }
        None => Vec::new(),
    };
    let session = Session::on(&clips, vec![schedule])?.with_noise(0, FreshNoise::Given(renoise));
    let mut session = session.skipping(std::slice::from_ref(&skips));
    let mut latents = Vec::new();
    for (pipeline, range) in networks.iter().zip(ranges) {
        let keep = |done: crate::sample::StepDone| {
            latents.push(done.latents.clone());
            ControlFlow::Continue(())
        };
        let _never_broken_off = session.run(std::slice::from_ref(pipeline), range, keep)?;
    }
    let latents = latents.iter().map(|x| Ok(x.squeeze(0)?.to_device(&Device::Cpu)?));
    let latents = Tensor::stack(&latents.collect::<Result<Vec<_>>>()?, 0)?;
    Ok((Outputs::from([("latents".to_owned(), latents)]), skips))
}

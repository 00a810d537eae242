//! What conditions take of host memory beside the forecast: rays of camera paths, and listening to speech.

use data::{Dataset, SPEECH_RATE};
use kernels::Device;
use kernels::ledger::Ledger;
use models::dit::{Architecture, DitConfig};
use models::wav2vec::{SpeechEncoder, SpeechSizes};

use crate::base::BaseModel;
use crate::bytes::Bytes;
use crate::encode::prompt::ClipRequest;
use crate::error::Result;
use crate::machine::forecast::Task;

/// The most host memory in bytes that an encoder of these sizes takes to listen to `seconds` of sound, its weights included.
///
/// # Errors
/// Sizes that fit no encoder.
pub fn bytes_to_listen(sizes: SpeechSizes, seconds: f64) -> Result<u64> {
    let ledger = Ledger::new(1);
    let device = Device::shadow_cpu(Some(ledger.clone()));
    let samples = (seconds * f64::from(SPEECH_RATE)).ceil() as usize;
    let samples = samples.max(sizes.samples_of_one_state());
    let encoder = SpeechEncoder::seeded(sizes, 0, &device)?;
    drop(encoder.encode(&vec![0.0; samples])?);
    Ok(ledger.peak())
}

/// Lines about the run of `task` by `model`, with the clips of `dataset` and those that are asked for.
///
/// # Errors
/// A speech encoder that does not open.
pub(super) fn notes(
    model: &BaseModel,
    clips: (&Dataset, &[ClipRequest]),
    task: &Task,
) -> Result<Vec<String>> {
    let rays = rays(task.config(), task.latents, task.batch * task.accumulate);
    Ok(listening(model, clips)?.into_iter().chain(rays).collect())
}

/// What it takes to listen to the longest of the clips; nothing of models that hear nothing.
fn listening(model: &BaseModel, (dataset, clips): (&Dataset, &[ClipRequest])) -> Result<Option<String>> {
    let Some(path) = &model.speech_encoder else { return Ok(None) };
    let of_clips = dataset.sources.iter().map(|source| source.probe.end);
    let asked = clips.iter().map(|clip| f64::from(clip.frames) / dataset.fps);
    let seconds = of_clips.chain(asked).fold(0.0, f64::max);
    // Files of a model that is assumed are not here.
    let sizes = if path.exists() { SpeechEncoder::sizes_at(path, None)? } else { SpeechSizes::published() };
    let bytes = bytes_to_listen(sizes, seconds)?;
    Ok(Some(format!(
        "the speech encoder runs on the processor: while clips are listened to it takes {} of host memory, for the {seconds:.1} s of \
         the longest clip; a longer file of sound takes more",
        Bytes(bytes)
    )))
}

/// What the rays of camera paths take, in a step of `samples` clips with these latents and in the next, which
/// is prepared meanwhile; nothing for models without such conditions.
fn rays(dit: &DitConfig, latents: (usize, usize, usize), samples: usize) -> Option<String> {
    let conditioning = Architecture::conditioning(dit, latents);
    let numbers = |shape: &Vec<usize>| shape.iter().product::<usize>() as u64;
    let of_clip: u64 =
        conditioning.iter().filter(|(role, _)| role.is_on_host()).map(|(_, shape)| 4 * numbers(shape)).sum();
    (of_clip > 0).then(|| {
        let of_steps = 2 * samples as u64 * of_clip;
        format!(
            "the rays of a camera path take {} of host memory a clip, and {} for the clips of a step and of the next",
            Bytes(of_clip),
            Bytes(of_steps)
        )
    })
}

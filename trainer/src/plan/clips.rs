//! Whether clips that no run makes fit, before anything is loaded.

use std::num::NonZeroUsize;
use std::path::Path;

use models::adapter::Adapters;
use models::dit::pass::FFN_TOKENS;
use models::dit::{Base, DitConfig, Streamed};
use models::expert::Networks;
use models::published::Defaults;
use models::vae::{Tiling, TinySizes};

use super::{BehindSampling, Laid, Rest, Split, Wording, checked, laid};
use crate::base::BaseModel;
use crate::encode::LatentStore;
use crate::encode::prompt::ClipRequest;
use crate::error::Result;
use crate::machine::devices::{DevicesConfig, Limits};
use crate::machine::forecast::{Residuals, Task};
use crate::machine::memory::{Machine, Phase, PhaseForecast, Room, Shapes, WeightPlace, devices_of};
use crate::sample::{ClipLayout, PreviewPlan};

/// Clips, and what they are made with.
#[derive(Debug)]
pub struct ClipsOf<'a> {
    /// The base model.
    pub model: &'a BaseModel,
    /// Sizes of its DiT, or of both.
    pub dit: &'a DitConfig,
    /// The settings that it was published with.
    pub defaults: &'a Defaults,
    /// The devices, settled.
    pub devices: &'a DevicesConfig,
    /// The clips.
    pub requests: &'a [ClipRequest],
    /// The adapters of each network that they go through.
    pub attached: Vec<Adapters>,
    /// Prompts that are cached here need no text encoder.
    pub cache: &'a Path,
}

/// How clips fit onto the devices.
#[derive(Debug)]
pub struct ClipsFit {
    /// How they go through the network.
    pub laid: Laid,
    /// The blocks whose matrices are in host memory.
    pub streamed: Streamed,
    /// How many devices decode clips together, a band of rows each.
    pub bands: usize,
    /// Whether all models, the text encoder included, fit onto the devices beside each other.
    pub together: bool,
}

/// Checks that the models that `clips` go through fit onto their devices: each is there alone. How clips go through the network:
/// the layout that is `asked` for, or the best; the blocks whose matrices are streamed from host memory, as few as will do; and
/// how many devices decode clips together.
///
/// # Errors
/// What does not fit, and what would.
pub fn clips_fit(
    clips: ClipsOf,
    (residuals, tiling, preview): (Residuals, Tiling, Option<&PreviewPlan>),
    (asked, weights): (ClipLayout, WeightPlace),
) -> Result<ClipsFit> {
    let ClipsOf { model, dit: config, defaults, devices, requests, attached, cache } = clips;
    let encoded = LatentStore::open(cache, model)?;
    let mut task = Task::without_training(config, model.precision.dit(), (1, 2, 2));
    let rest = Rest {
        precision: model.precision,
        encoders: model.encoder_sizes(config)?,
        defaults: *defaults,
        bucket: None,
        beyond: 0,
        control: config.control.clone(),
        holds_out: false,
        clips: requests.to_vec(),
        residuals,
        tiling,
        preview: preview.map(|preview| TinySizes::at(&preview.decoder)).transpose()?,
        attached,
        clip_groups: NonZeroUsize::MIN,
        clip_sharing: NonZeroUsize::MIN,
        behind_sampling: BehindSampling::Dropped,
    };
    let machine = Machine::here(devices, &Limits::measure(devices), task.base, config, None);
    for streamed in weights.streamed(&machine) {
        let base = Base { streamed: *streamed, ..task.base };
        let tried = Task { base, ..task.clone() };
        let dit = split(&tried, &machine, &devices.split);
        let is_housed = base.streamed_bytes(config, &(0..config.layers)) <= machine.host;
        if weights != WeightPlace::Auto || is_housed && rest.sampling(dit, &rest.clips)?.misfit().is_none() {
            task = tried;
            break;
        }
    }
    let dit = split(&task, &machine, &devices.split);
    let mut phases = rest.phases(dit)?;
    let together = fits_together(&phases, model.dits.networks());
    let texts = requests.iter().flat_map(|request| [request.prompt.as_str(), request.negative.as_str()]);
    if encoded.has_prompts(texts)? {
        phases.retain(|phase| phase.phase != Phase::TextEncoder);
    }
    checked(&rest, dit, &phases, &Shapes::default(), Wording::Command)?;
    let laid = laid(&rest, dit, asked, Wording::Command)?;
    let bands = devices_of(Phase::Decoding, &phases);
    Ok(ClipsFit { laid, streamed: task.base.streamed, bands, together })
}

fn split<'a>(task: &'a Task<'a>, machine: &'a Machine, blocks: &'a [usize]) -> Split<'a> {
    Split { task, machine, blocks, ffn_tokens: FFN_TOKENS, pinned: 0 }
}

/// Whether what all `phases` take, with `networks` beside each other, is there on each device at once.
fn fits_together(phases: &[PhaseForecast], networks: Networks) -> bool {
    let own = |phase: &PhaseForecast| match (phase.phase, networks) {
        (Phase::Sampling, Networks::Pair) => 2,
        _ => 1,
    };
    let mut devices: Vec<(&str, u64, Room)> = Vec::new();
    for phase in phases {
        for device in &phase.devices {
            let needed = own(phase) * device.needed;
            match devices.iter_mut().find(|(name, ..)| *name == device.device) {
                Some((_, sum, _)) => *sum += needed,
                None => devices.push((&device.device, needed, device.room)),
            }
        }
    }
    devices.iter().all(|(_, needed, room)| room.bytes().is_some_and(|room| *needed <= room))
}

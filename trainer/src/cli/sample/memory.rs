//! Whether clips fit, before anything is loaded.

use std::num::NonZeroUsize;
use std::path::Path;

use models::adapter::{ApplyMode, apply};
use models::dit::pass::FFN_TOKENS;
use models::dit::{Base, Streamed};
use models::vae::{Tiling, TinySizes};

use super::Job;
use crate::encode::LatentStore;
use crate::error::Result;
use crate::machine::devices::Limits;
use crate::machine::forecast::{Residuals, Task};
use crate::machine::memory::{Machine, Phase, Shapes, WeightPlace, devices_of};
use crate::plan::{BehindSampling, Laid, Rest, Split, Wording, checked, laid};
use crate::residents::FromFiles;
use crate::sample::{ClipLayout, PreviewPlan};

/// How clips fit onto the devices.
pub(super) struct Fit {
    /// How they go through the network.
    pub laid: Laid,
    /// The blocks whose matrices are in host memory.
    pub streamed: Streamed,
    /// How many devices decode clips together, a band of rows each.
    pub bands: usize,
}

/// Checks that the models that the clips of `job` go through fit onto its devices: each is there alone. Prompts that are in
/// the cache, in `folder` where it is named, need no text encoder. How clips go through the network: the layout that is `asked`
/// for, or the best; the blocks whose matrices are streamed from host memory, as few as will do; and how many devices decode clips
/// together.
///
/// # Errors
/// What does not fit, and what would.
pub(super) fn check(
    job: &Job,
    (residuals, tiling, preview): (Residuals, Tiling, Option<&PreviewPlan>),
    folder: Option<&Path>,
    (asked, weights): (ClipLayout, WeightPlace),
) -> Result<Fit> {
    let Job { basis, model, devices, requests, networks, .. } = job;
    let encoded = LatentStore::open(folder.unwrap_or(&basis.cache), model)?;
    let mut task = Task::without_training(&basis.dit, model.precision.dit(), (1, 2, 2));
    let adapters =
        |network: &FromFiles| Ok(apply(&network.adapters, &basis.dit, ApplyMode::Unmerged)?.adapters);
    let rest = Rest {
        precision: model.precision,
        encoders: model.encoder_sizes(&basis.dit)?,
        defaults: basis.defaults,
        bucket: None,
        in_front: 0,
        control: basis.dit.control.clone(),
        holds_out: false,
        clips: requests.clone(),
        residuals,
        tiling,
        preview: preview.map(|preview| TinySizes::at(&preview.decoder)).transpose()?,
        attached: networks.iter().map(adapters).collect::<Result<_>>()?,
        clip_groups: NonZeroUsize::MIN,
        clip_sharing: NonZeroUsize::MIN,
        behind_sampling: BehindSampling::Dropped,
    };
    let machine = Machine::here(devices, &Limits::measure(devices), task.base, &basis.dit, None);
    for streamed in weights.streamed(&machine) {
        let base = Base { streamed: *streamed, ..task.base };
        let tried = Task { base, ..task.clone() };
        let dit = split(&tried, &machine, &devices.split);
        let is_housed = base.streamed_bytes(&basis.dit, &(0..basis.dit.layers)) <= machine.host;
        if weights != WeightPlace::Auto || is_housed && rest.sampling(dit, &rest.clips)?.misfit().is_none() {
            task = tried;
            break;
        }
    }
    let dit = split(&task, &machine, &devices.split);
    let mut phases = rest.phases(dit)?;
    let texts = requests.iter().flat_map(|request| [request.prompt.as_str(), request.negative.as_str()]);
    if encoded.has_prompts(texts)? {
        phases.retain(|phase| phase.phase != Phase::TextEncoder);
    }
    checked(&rest, dit, &phases, &Shapes::default(), Wording::Command)?;
    let laid = laid(&rest, dit, asked, Wording::Command)?;
    Ok(Fit { laid, streamed: task.base.streamed, bands: devices_of(Phase::Decoding, &phases) })
}

fn split<'a>(task: &'a Task<'a>, machine: &'a Machine, blocks: &'a [usize]) -> Split<'a> {
    Split { task, machine, blocks, ffn_tokens: FFN_TOKENS, pinned: 0 }
}

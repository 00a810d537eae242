//! The models of clips: loaded with the first clip, and kept for the next ones.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;

use models::adapter::{Adapters, ApplyMode, apply};
use models::expert::{Expert, Networks as Count};
use models::vae::{Tiling, TinySizes};

use super::basis::Basis;
use super::job::{Chosen, Job};
use crate::adapters;
use crate::base::BaseModel;
use crate::base::hub::HubSettings;
use crate::encode::{Encoding, LatentStore};
use crate::error::{Error, Result};
use crate::machine::devices::DevicesConfig;
use crate::machine::forecast::{Decoding, Networks, Residuals};
use crate::machine::memory::WeightPlace;
use crate::machine::products::KnownProducts;
use crate::plan::{ClipsFit, ClipsOf, clips_fit};
use crate::residents::{Between, FromFiles, Residency, Residents, Setup, WhenIdle};
use crate::sample::{self, ClipFiles, ClipFormat, Course, PreviewPlan, Previews, Prompted, starting_noise};
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::Ui;

/// Solver steps between two previews.
const PREVIEW_EVERY: usize = 4;

/// What the models were loaded for; with anything else they are loaded anew.
#[derive(Debug, PartialEq)]
struct Loaded {
    model: BaseModel,
    devices: DevicesConfig,
    groups: usize,
    sharing: usize,
    together: bool,
}

/// The models of the last clip.
#[derive(Debug)]
pub(super) struct Resident {
    loaded: Loaded,
    residents: Residents,
    encoded: LatentStore,
}

/// A clip that is to be made.
pub(super) struct Order<'a> {
    pub job: &'a Job,
    pub basis: Basis,
    /// The folder of the job.
    pub folder: &'a Path,
    pub tiny_decoder: Option<&'a Path>,
    pub interrupt: &'a Interrupt,
    pub made: &'a AtomicUsize,
}

/// Makes a clip with the models of the last one, where they are the same. The name of its file.
///
/// # Errors
/// What does not fit, files that do not open, and [`Error::Interrupted`].
pub(super) fn make(resident: &mut Option<Resident>, order: Order, ui: &Ui) -> Result<PathBuf> {
    let Order { job, basis, folder, tiny_decoder, interrupt, made } = order;
    let request = job.settings.request.clone();
    let ranges = basis.model.clip_ranges(&basis.dit);
    let chosen = |expert: Option<Expert>| of_network(&job.settings.adapters, expert);
    let attached =
        ranges.iter().map(|range| read(&chosen(range.expert()), &basis, ui)).collect::<Result<_>>()?;
    let preview = preview_plan(tiny_decoder, &basis)?;
    let fit = clips_fit(
        ClipsOf {
            model: &basis.model,
            dit: &basis.dit,
            defaults: &basis.defaults,
            devices: &basis.devices,
            requests: std::slice::from_ref(&request),
            attached,
            cache: &basis.cache,
        },
        (Residuals::None, Tiling::Off, preview.as_ref()),
        (basis.layout, WeightPlace::Auto),
    )?;
    let resident = ready(resident, &basis, &fit, ui)?;
    let Resident { residents, encoded, .. } = resident;
    for range in &ranges {
        let adapters = chosen(range.expert()).iter().map(|own| (own.path.clone(), own.strength)).collect();
        residents.set_clip_adapters(*range, adapters)?;
    }
    let mut with = Encoding { residents, interrupt };
    encoded.encode_prompts([request.prompt.as_str(), request.negative.as_str()], &mut with)?;
    encoded.encode_pictures(std::slice::from_ref(&request), &mut with)?;
    let device = residents.first_device().clone();
    let noise = starting_noise(&request, &basis.dit, &device)?;
    let prompted = [Prompted::new(&request, noise, encoded, &basis.dit)?];
    let previews = preview.as_ref().map(|plan| Previews { plan, folder, fps: job.settings.fps });
    let course = Course { previews, made: Some(made), ..Course::default() };
    let stepped = sample::latents(&prompted, residents, course, interrupt)?.ok_or(Error::Interrupted)?;
    let files = ClipFiles {
        tiling: Tiling::Off,
        bands: fit.bands,
        fps: job.settings.fps,
        formats: &[ClipFormat::Mp4],
    };
    let written = sample::files(folder, (&prompted, stepped.pieces, &[]), "", residents, files)?;
    previews.map_or(Ok(()), |previews| previews.remove(&prompted))?;
    // The clip comes before its contact sheet.
    written.into_iter().next().ok_or_else(|| kernels::Error::msg("no clip was written").into())
}

/// The adapters of the network of `expert`, or of the only one.
fn of_network(adapters: &[Chosen], expert: Option<Expert>) -> Vec<Chosen> {
    let is_its = |chosen: &&Chosen| chosen.expert.is_none() || expert.is_none() || chosen.expert == expert;
    adapters.iter().filter(is_its).cloned().collect()
}

/// The adapters as the plan counts them.
fn read(chosen: &[Chosen], basis: &Basis, ui: &Ui) -> Result<Adapters> {
    let sources = chosen.iter().map(|own| adapters::source(&own.path, own.strength, ui));
    let sources = sources.collect::<Result<Vec<_>>>()?;
    Ok(apply(&sources, &basis.dit, ApplyMode::Unmerged)?.adapters)
}

/// Previews by the tiny decoder that the server has, where it is for this model's latents.
fn preview_plan(decoder: Option<&Path>, basis: &Basis) -> Result<Option<PreviewPlan>> {
    let Some(decoder) = decoder else { return Ok(None) };
    let fits = TinySizes::at(decoder)?.latent == basis.dit.out_channels;
    Ok(fits.then(|| PreviewPlan { every: PREVIEW_EVERY, decoder: decoder.to_owned() }))
}

/// The models that are there, or new ones in their place.
fn ready<'a>(
    resident: &'a mut Option<Resident>,
    basis: &Basis,
    fit: &ClipsFit,
    ui: &Ui,
) -> Result<&'a mut Resident> {
    let mut model = basis.model.clone();
    model.precision.streamed = fit.streamed;
    let loaded = Loaded {
        model,
        devices: basis.devices.clone(),
        groups: fit.laid.groups.get(),
        sharing: fit.laid.sharing.get(),
        together: fit.together,
    };
    if resident.as_ref().is_none_or(|there| there.loaded != loaded) {
        // Before the new ones come.
        *resident = None;
        let new = load(loaded, basis, fit, ui)?;
        return Ok(resident.insert(new));
    }
    resident.as_mut().ok_or_else(|| kernels::Error::msg("the models are gone").into())
}

fn load(loaded: Loaded, basis: &Basis, fit: &ClipsFit, ui: &Ui) -> Result<Resident> {
    let model = &loaded.model;
    let (networks, decoding, between) = match (fit.together, model.dits.networks()) {
        (true, Count::Whole) => (Networks::One, Decoding::Beside, Between::Everything),
        (true, Count::Pair) => (Networks::SideBySide, Decoding::Beside, Between::Everything),
        (false, _) => (Networks::InTurn, Decoding::Alone, Between::Networks),
    };
    let residency = Residency { networks, decoding, vae: WhenIdle::Park, clip_groups: fit.laid.groups };
    let (route, sharing) = (basis.devices.transfer.into(), Some(fit.laid.sharing));
    let setup = Setup { route, sharing, ..Setup::default() };
    let split = basis.devices.open()?;
    let mut residents = Residents::new((model, &basis.dit), split, residency, setup, ui).keeping(between);
    let products = KnownProducts::at(HubSettings::from_environment().beside().join("products.json"));
    products.restore(residents.devices());
    let experts: &[Option<Expert>] = match model.dits.networks() {
        Count::Whole => &[None],
        Count::Pair => &[Some(Expert::High), Some(Expert::Low)],
    };
    for expert in experts {
        let range = model.noise_range_of(*expert, &basis.dit);
        let files = model.dits.of(expert.unwrap_or(Expert::High)).clone();
        residents.add(FromFiles { range, files, adapters: Vec::new(), for_clips: Vec::new() });
    }
    let encoded = LatentStore::open(&basis.cache, model)?;
    Ok(Resident { loaded, residents, encoded })
}

//! The clips of `tandem sample`: requests, the networks that they go through, and what they start from.

use anyhow::Result;
use kernels::{DType, Device, Tensor};
use models::dit::DitConfig;
use models::expert::Expert;
use models::published::Defaults;
use models::weights::Checkpoint;

use super::Sample;
use super::basis::{Basis, Loras};
use crate::adapters;
use crate::base::BaseModel;
use crate::encode::LatentStore;
use crate::encode::preset::Preset;
use crate::encode::prompt::ClipRequest;
use crate::error::Error;
use crate::residents::FromFiles;
use crate::sample::{Prompted, starting_noise};
use crate::watch::ui::Ui;

impl Sample {
    /// The networks that the clips go through, in order, each with what is named here and with `own`.
    pub(super) fn networks(
        &self,
        model: &BaseModel,
        dit: &DitConfig,
        mut own: Loras,
        ui: &Ui,
    ) -> Result<Vec<FromFiles>> {
        if let Some(preset) = self.preset {
            self.check_preset(preset, model)?;
        }
        own.all.extend(adapters::sources("--lora", &self.lora, ui)?);
        if model.dits.experts().is_none() {
            if !(self.lora_high.is_empty() && self.lora_low.is_empty()) {
                let why = "this model has no experts; give the adapter with --lora".into();
                return Err(Error::Setting { key: "--lora-high, --lora-low".into(), why }.into());
            }
            // Those of a run of one expert whose model is that expert alone.
            let adapters = [own.all, own.high, own.low].concat();
            let files = model.dits.of(Expert::High).clone();
            let range = model.noise_range_of(None, dit);
            return Ok(vec![FromFiles { range, files, adapters, for_clips: Vec::new() }]);
        }
        let mut network = |expert: Expert| {
            let (key, named) = match expert {
                Expert::High => ("--lora-high", &self.lora_high),
                Expert::Low => ("--lora-low", &self.lora_low),
            };
            adapters::check_experts("--lora", &self.lora, expert, "--lora-EXPERT")?;
            adapters::check_experts(key, named, expert, "--lora-EXPERT")?;
            let mut adapters = own.all.clone();
            adapters.append(own.of(Some(expert)));
            adapters.extend(adapters::sources(key, named, ui)?);
            let (range, files) = (model.noise_range_of(Some(expert), dit), model.dits.of(expert).clone());
            Ok(FromFiles { range, files, adapters, for_clips: Vec::new() })
        };
        Expert::ALL.into_iter().map(&mut network).collect()
    }

    /// Checks that a preset is for this model, and that adapters are named that could be its own.
    fn check_preset(&self, preset: Preset, model: &BaseModel) -> Result<()> {
        let has_experts = model.dits.experts().is_some();
        let has_adapters = match has_experts {
            true => !self.lora_high.is_empty() && !self.lora_low.is_empty(),
            false => !self.lora.is_empty(),
        };
        let why = match (preset.is_for_experts() == has_experts, has_adapters) {
            (true, true) => return Ok(()),
            (true, false) => {
                let keys = if has_experts { "--lora-high and --lora-low" } else { "--lora" };
                format!(
                    "needs its distilled adapter, or clips are noise: name it with {keys} ({})",
                    preset.adapters()
                )
            }
            (false, _) if has_experts => {
                "is for a model of one network, and this one has two experts".to_owned()
            }
            (false, _) => "is for a model of two experts, and this one has one network".to_owned(),
        };
        Err(Error::Setting { key: "--preset".into(), why }.into())
    }

    /// The requests with what the cache has of them, and their starting noise.
    pub(super) fn prompted(
        &self,
        requests: &[ClipRequest],
        encoded: &LatentStore,
        config: &DitConfig,
        device: &Device,
    ) -> Result<Vec<Prompted>> {
        let given = self.latents.as_deref().map(Checkpoint::open).transpose().map_err(models::Error::from);
        let given = given.map_err(Error::from)?;
        let mut prompted = Vec::new();
        for (i, request) in requests.iter().enumerate() {
            let noise = match &given {
                Some(file) => given_noise(file, i)?,
                None => starting_noise(request, config, device)?,
            };
            prompted.push(Prompted::new(request, noise.to_device(device)?, encoded, config)?);
        }
        Ok(prompted)
    }

    /// The clips to make: those that are named here, else those of the run or the recipe, with the options of the command
    /// line over theirs.
    pub(super) fn requests(&self, basis: &Basis) -> Result<Vec<ClipRequest>> {
        let defaults = &basis.defaults;
        let base = self.over(&basis.request, defaults)?;
        let requests = match &self.prompts {
            Some(path) => base.from_file(path, "--prompts")?,
            None if self.prompt.is_empty() => {
                basis.clips.iter().map(|clip| self.over(clip, defaults)).collect::<Result<_>>()?
            }
            None => {
                let request = |prompt: &String| ClipRequest { prompt: prompt.clone(), ..base.clone() };
                self.prompt.iter().map(request).collect()
            }
        };
        if requests.is_empty() {
            let why = "neither the run nor the recipe has one: give some with --prompt or --prompts".into();
            return Err(Error::Setting { key: "sample.prompts".into(), why }.into());
        }
        let settled = |request: ClipRequest| {
            request.check_pictures(&basis.dit)?;
            let request = request.settled(&basis.dit)?;
            request.check(defaults.multiple())?;
            Ok(request)
        };
        requests.into_iter().map(settled).collect()
    }

    /// `request` with the options of the command line over it.
    pub(super) fn over(&self, request: &ClipRequest, defaults: &Defaults) -> Result<ClipRequest> {
        let own = request.clone();
        let [width, height] = match &self.image {
            Some(path) if self.width.is_none() || self.height.is_none() => {
                let picture = data::Picture::open(path).map_err(Error::from)?;
                let defaults = Defaults { size: [own.width, own.height], ..*defaults };
                defaults.size_for(picture.width(), picture.height())
            }
            _ => [own.width, own.height],
        };
        let request = ClipRequest {
            prompt: own.prompt,
            negative: self.negative.clone().unwrap_or(own.negative),
            width: self.width.unwrap_or(width),
            height: self.height.unwrap_or(height),
            frames: self.frames.unwrap_or(own.frames),
            steps: self.steps.unwrap_or(own.steps),
            guidance: self.guidance.unwrap_or(own.guidance),
            guidance_high: self.guidance_high.or(self.guidance).unwrap_or(own.guidance_high),
            shift: self.shift.unwrap_or(own.shift),
            seed: self.seed.unwrap_or(own.seed),
            solver: self.solver.unwrap_or(own.solver),
            convention: self.convention.unwrap_or(own.convention),
            high_steps: own.high_steps,
            preset: own.preset,
            timesteps: own.timesteps,
            image: self.image.clone().or(own.image),
            last_image: self.last_image.clone().or(own.last_image),
            conditions: self.conditions.given().over(own.conditions),
        };
        Ok(match self.preset {
            Some(preset) => preset.over(request),
            None => request,
        })
    }
}

/// The starting noise of the clip `index`.
fn given_noise(file: &Checkpoint, index: usize) -> crate::Result<Tensor> {
    let own = format!("latents.{index}");
    let name = if file.contains(&own) { own.as_str() } else { "latents" };
    Ok(file.tensor(name, DType::F32, &Device::Cpu)?)
}

//! The owner of a process's models: it reads them, and decides which are on the devices and which wait in host memory or in
//! their files.
//!
//! What fits onto the devices together is settled by the plan and never measured here, so a run does the same at every
//! start. Whoever needs a model asks for it, and whatever does not fit beside it leaves first: a network that is trained is
//! parked in host memory, one that clips go through is dropped, an encoder does as its [`WhenIdle`] says.

mod clip_adapter;
mod network;
mod slot;
mod warm_up;

use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::Device;
use kernels::attention::Heads;
use kernels::transfer::{HostStore, Route};
use models::adapter::{Adapters, Source};
use models::clip::Clip;
use models::dit::DitConfig;
use models::dit::animate::MotionEncoder;
use models::text::TextEncoder;
use models::vae::{TinyDecoder, TinyLatents, Vae};
use models::wav2vec::SpeechEncoder;

use crate::adapters::start_on::{Fused, opened};
use crate::base::{BaseModel, DitFiles, WritingBehind, check_speech, check_vae};
use crate::error::Result;
use crate::learning::NoiseRange;
use crate::machine::forecast::{Decoding, Networks};
use crate::pipeline::{Pipeline, WeightParking};
use crate::watch::ui::Ui;
use network::{Network, NetworkState};
use slot::Slot;

pub use slot::WhenIdle;

/// Whether networks have the adapters that are for clips alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ClipAdapters {
    /// They have.
    #[default]
    Applied,
    /// They have not.
    LeftOut,
}

/// What may be on the devices together.
#[derive(Debug, Clone, Copy)]
pub struct Residency {
    /// Whether networks stay on the devices beside each other.
    pub networks: Networks,
    /// Whether networks stay on the devices while the VAE is.
    pub decoding: Decoding,
    /// What becomes of the VAE while a network works. The text encoder and CLIP are dropped.
    pub vae: WhenIdle,
    /// Groups of devices that clips go through, each of which holds the whole network meanwhile; 1 for the split as it is.
    pub clip_groups: NonZeroUsize,
}

/// What stays loaded from one set of clips to the next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Between {
    /// Nothing: what has to make room is dropped, except as the [`Residency`] says.
    #[default]
    Nothing,
    /// Networks: they wait in host memory while something else needs their devices.
    Networks,
    /// Everything: all models are on the devices beside each other, once they are loaded.
    Everything,
}

/// How networks are set up on the devices.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// How tensors go from one stage to the next.
    pub route: Route,
    /// The most tokens of a sample that go through a feed-forward layer at once; the model's default where nothing is said.
    pub ffn_tokens: Option<usize>,
    /// Where each stage parks what its blocks keep; of its own where there are none.
    pub stores: Vec<HostStore>,
    /// Devices that encode training clips side by side, at most; one where nothing is said.
    pub encoders: Option<usize>,
    /// Attentions whose forwards are planned while networks are loaded.
    pub attentions: Vec<Heads>,
    /// Adapters that are added to the weights of networks as they are read.
    pub fused: Vec<Fused>,
    /// Devices of a group that share the tokens of a call of a clip, each with the whole network; none where nothing is said.
    pub sharing: Option<NonZeroUsize>,
}

/// A network that is read from its files when it is first used.
#[derive(Debug)]
pub struct FromFiles {
    /// The noise levels that it is for.
    pub range: NoiseRange,
    /// Its files.
    pub files: DitFiles,
    /// Adapters that stay on it.
    pub adapters: Vec<Source>,
    /// Adapters that are applied for clips alone: file, or PEFT folder, and strength.
    pub for_clips: Vec<(PathBuf, f64)>,
}

/// The models of a run, or of a set of clips.
#[derive(Debug)]
pub struct Residents {
    model: BaseModel,
    dit: DitConfig,
    split: Vec<(Device, Range<usize>)>,
    residency: Residency,
    between: Between,
    setup: Setup,
    networks: Vec<Network>,
    /// Host memory of networks that are parked; there as long as one is.
    parking: Option<WeightParking>,
    vae: Slot<Vae>,
    clip: Slot<Clip>,
    text_encoder: Slot<TextEncoder>,
    tiny_decoder: Slot<TinyDecoder>,
    /// Files of quantised weights that are being written.
    writing: Vec<WritingBehind>,
    ui: Ui,
}

impl Residents {
    /// The models of `model`, whose DiT, or each of both, is `dit`, on the devices of `split`. None is loaded yet.
    pub fn new(
        (model, dit): (&BaseModel, &DitConfig),
        split: Vec<(Device, Range<usize>)>,
        residency: Residency,
        setup: Setup,
        ui: &Ui,
    ) -> Self {
        let (vae, clip) = (Slot::Files, Slot::Files);
        let (text_encoder, tiny_decoder) = (Slot::Files, Slot::Files);
        let (model, dit, ui) = (model.clone(), dit.clone(), ui.clone());
        let (networks, parking) = (Vec::new(), None);
        Self {
            model,
            dit,
            split,
            residency,
            between: Between::Nothing,
            setup,
            networks,
            parking,
            vae,
            clip,
            text_encoder,
            tiny_decoder,
            writing: Vec::new(),
            ui,
        }
    }

    /// The same, for several sets of clips one after the other. To be said before networks are added.
    pub fn keeping(self, between: Between) -> Self {
        Self { between, ..self }
    }

    /// The base model.
    pub fn model(&self) -> &BaseModel {
        &self.model
    }

    /// Sizes of the DiT, or of both.
    pub fn dit(&self) -> &DitConfig {
        &self.dit
    }

    /// The devices of the stages, first to last.
    pub fn devices(&self) -> impl Iterator<Item = &Device> {
        self.split.iter().map(|(device, _)| device)
    }

    /// The device of the first stage, which encoders and the VAE run on too.
    pub fn first_device(&self) -> &Device {
        &self.split[0].0 // a settled config has a stage
    }

    /// Where progress is shown.
    pub fn ui(&self) -> &Ui {
        &self.ui
    }

    /// The noise ranges of the networks that clips go through, in order.
    pub fn clip_ranges(&self) -> Vec<NoiseRange> {
        self.model.clip_ranges(&self.dit)
    }

    /// Parks what blocks of networks that are loaded from now on keep in `stores`, one for each stage.
    pub fn set_stores(&mut self, stores: &[HostStore]) {
        self.setup.stores = stores.to_vec();
    }

    /// Adds a network that is read when it is first used, and again after others needed its place.
    pub fn add(&mut self, network: FromFiles) {
        let FromFiles { range, files, adapters, for_clips } = network;
        let when_idle = if self.between == Between::Nothing { WhenIdle::Drop } else { WhenIdle::Park };
        let state = NetworkState::Files;
        self.networks.push(Network { range, files, state, adapters, for_clips, when_idle });
    }

    /// Reads the network of `range` onto the devices with `adapters`, to be trained: it never loses them. `for_clips` are
    /// adapters that are applied for clips alone.
    ///
    /// # Errors
    /// Files that cannot be read, and memory that runs out.
    pub fn add_trained(
        &mut self,
        range: NoiseRange,
        adapters: &Adapters,
        for_clips: Vec<(PathBuf, f64)>,
    ) -> Result<&mut Pipeline> {
        let files = match range.expert() {
            Some(expert) => self.model.dits.of(expert),
            None => self.model.trained_dit()?,
        };
        let files = files.clone();
        self.make_room_for_network(None)?;
        let (config, weights) = opened(&files, (&self.setup.fused, range.expert()), &self.ui)?;
        let pipeline = self.read(&config, weights, adapters)?;
        let (state, adapters, when_idle) = (NetworkState::OnDevices(pipeline), Vec::new(), WhenIdle::Park);
        self.networks.push(Network { range, files, state, adapters, for_clips, when_idle });
        self.network(range)
    }

    /// The VAE on the first device.
    ///
    /// # Errors
    /// Files that do not open, the VAE of another model, and memory that runs out.
    pub fn vae(&mut self) -> Result<Arc<Vae>> {
        if self.between != Between::Everything {
            self.text_encoder.leave(WhenIdle::Drop)?;
        }
        if self.residency.decoding == Decoding::Alone {
            self.clear_networks()?;
        }
        let Self { model, dit, split, ui, .. } = self;
        let device = &split[0].0; // a settled config has a stage
        self.vae.on(device, || {
            let vae = ui.phase("loading the VAE", || model.load_vae(device))?;
            check_vae(vae.sizes(), dit)?;
            Ok(vae)
        })
    }

    /// The VAE on the first `count` devices: copies of [`Self::vae`] that are gone when they are dropped.
    ///
    /// # Errors
    /// As there.
    pub fn vaes(&mut self, count: usize) -> Result<Vec<Arc<Vae>>> {
        let mut vaes = vec![self.vae()?];
        for (device, _) in &self.split {
            if vaes.len() < count && vaes.iter().all(|vae| !vae.device().same_device(device)) {
                let copied = || vaes[0].copied_to(device);
                vaes.push(Arc::new(self.ui.phase("loading the VAE", copied)?));
            }
        }
        Ok(vaes)
    }

    /// The VAEs that training clips are dealt out to: one on each device that the setup has for them.
    ///
    /// # Errors
    /// As [`Self::vae`].
    pub fn encoding_vaes(&mut self) -> Result<Vec<Arc<Vae>>> {
        self.vaes(self.setup.encoders.unwrap_or(1))
    }

    /// How tensors go from one device to another.
    pub fn route(&self) -> Route {
        self.setup.route
    }

    /// The text encoder on the first device, without anything else.
    ///
    /// # Errors
    /// Files that do not open, and memory that runs out.
    pub fn text_encoder(&mut self) -> Result<Arc<TextEncoder>> {
        if self.between != Between::Everything {
            self.clear_networks()?;
            self.clip.leave(WhenIdle::Drop)?;
            self.vae.leave(self.residency.vae)?;
        }
        let Self { model, split, ui, .. } = self;
        let device = &split[0].0; // a settled config has a stage
        self.text_encoder
            .on(device, || ui.phase("loading the text encoder", || model.load_text_encoder(device)))
    }

    /// CLIP on the first device, without a network; the VAE stays if it is there.
    ///
    /// # Errors
    /// Files that do not open, and memory that runs out.
    pub fn clip(&mut self) -> Result<Arc<Clip>> {
        if self.between != Between::Everything {
            self.clear_networks()?;
            self.text_encoder.leave(WhenIdle::Drop)?;
        }
        let Self { model, split, ui, .. } = self;
        let device = &split[0].0; // a settled config has a stage
        self.clip.on(device, || {
            let (path, dtype) = (model.clip()?, model.precision.compute.dtype());
            Ok(ui.phase("loading CLIP", || Clip::load(path, None, dtype, device))?)
        })
    }

    /// Animate's motion encoder on the first device, without a network; the VAE stays if it is there. It is a part of the DiT's files, and
    /// gone when it is dropped; `None` for other models.
    ///
    /// # Errors
    /// Files that do not open, and memory that runs out.
    pub fn motion_encoder(&mut self) -> Result<Option<MotionEncoder>> {
        let Some(animate) = self.dit.control.animate.clone() else { return Ok(None) };
        self.clear_networks()?;
        self.text_encoder.leave(WhenIdle::Drop)?;
        let (_, weights) = self.model.trained_dit()?.open()?;
        let device = &self.split[0].0; // a settled config has a stage
        let load = || MotionEncoder::load(&weights, &animate.motion, device);
        Ok(Some(self.ui.phase("loading the motion encoder", load)?))
    }

    /// S2V's speech encoder, in host memory: it is gone when it is dropped.
    ///
    /// # Errors
    /// Files that do not open, and an encoder of other states than the DiT reads.
    pub fn speech_encoder(&mut self) -> Result<SpeechEncoder> {
        let path = self.model.speech_encoder()?;
        let load = || SpeechEncoder::load(path, None, &Device::Cpu);
        let encoder = self.ui.phase("loading the speech encoder", load)?;
        if let Some(speech) = &self.dit.control.speech {
            check_speech(encoder.sizes(), speech)?;
        }
        Ok(encoder)
    }

    /// The tiny decoder at `path`, which takes `latents`, on the last device, beside everything else.
    ///
    /// # Errors
    /// A file that does not open, and memory that runs out.
    pub fn tiny_decoder(&mut self, path: &Path, latents: TinyLatents) -> Result<Arc<TinyDecoder>> {
        let Self { model, split, ui, .. } = self;
        let device = &split[split.len() - 1].0; // a settled config has a stage
        let dtype = model.precision.compute.dtype();
        self.tiny_decoder.on(device, || {
            Ok(ui.phase("loading the tiny decoder", || TinyDecoder::load(path, latents, dtype, device))?)
        })
    }

    /// Takes encoders and the VAE that nobody uses off their device.
    ///
    /// # Errors
    /// When the host's memory runs out.
    pub fn rest_encoders(&mut self) -> Result<()> {
        if self.between == Between::Everything {
            return Ok(());
        }
        self.text_encoder.leave(WhenIdle::Drop)?;
        self.clip.leave(WhenIdle::Drop)?;
        self.tiny_decoder.leave(WhenIdle::Drop)?;
        self.vae.leave(self.residency.vae)
    }
}

//! What happens before the blocks: patches to tokens, timesteps and text to conditioning.

use std::fmt;

use kernels::weight::Weight;
use kernels::{DType, Device, Tensor};

use super::animate::{FACES, FaceEncoder, POSE, face_frames};
use super::base::Base;
use super::camera::CameraAdapter;
use super::conditioning::{Conditioning, Embedded, Raw};
use super::config::{DitConfig, ImageBranch, PATCH};
use super::control::{CAMERA, CONTEXT, HINT_SCALE, REFERENCE};
use super::input::{Boundary, NetworkInput};
use super::patches::patches_of;
use super::reader::Reader;
use super::role::Role;
use super::side_chain;
use super::speech::{AUDIO, PAST, PAST_FRAMES, SpeechEmbedding};
use super::streams::Streams;
use crate::weights::Weights;
use crate::{Error, Result};

/// A model's embeddings: the first stage's part before the layers.
pub trait Embed: fmt::Debug + Send + Sync {
    /// The streams at the first layer, and the conditioning that the layers read.
    ///
    /// # Errors
    /// If shapes of latents or conditioning do not fit the model, a role that it reads is missing, or one that it does not read
    /// is given.
    fn embed(&self, input: &NetworkInput) -> Result<Boundary>;

    /// Every tensor of it.
    fn tensors_mut(&mut self) -> Vec<&mut Tensor>;

    /// The same embeddings, on the same memory.
    fn share(&self) -> Box<dyn Embed>;
}

/// The embeddings. Time runs in f32, patches and text in the compute dtype.
#[derive(Debug, Clone)]
pub struct Embedder {
    config: DitConfig,
    stream: DType,
    patch: (Weight, Tensor),
    text: [(Weight, Tensor); 2],
    time: [(Weight, Tensor); 2],
    time_projection: (Weight, Tensor),
    picture: Option<PictureEmbedding>,
    reference: Option<(Weight, Tensor)>,
    camera: Option<CameraAdapter>,
    /// The patches of the side chain's context, and what they go through before the first side block.
    side: Option<[(Weight, Tensor); 2]>,
    /// The patches of Animate's pose clip, and its face encoder.
    animate: Option<((Weight, Tensor), FaceEncoder)>,
    speech: Option<SpeechEmbedding>,
}

/// The embedding of CLIP's states: norm, linear, GELU (the exact one), linear, norm; preceded by learned positions in models
/// of two pictures. Norms and positions run in f32. Source: Wan-Video/Wan2.1 wan/modules/model.py `MLPProj`.
#[derive(Debug, Clone)]
struct PictureEmbedding {
    branch: ImageBranch,
    positions: Option<Tensor>,
    norms: [(Tensor, Tensor); 2],
    linears: [(Weight, Tensor); 2],
}

/// The epsilon of both norms of the picture's embedding.
const PICTURE_EPS: f64 = 1e-5;

impl Embedder {
    /// Reads the embeddings of `config`.
    pub fn load(weights: &Weights, config: &DitConfig, base: Base, device: &Device) -> Result<Self> {
        let read = Reader::outside(weights, base.frozen, device);
        Ok(Self {
            config: config.clone(),
            stream: base.stream,
            patch: read.dense("patch_embedding")?,
            text: [read.dense("text_embedding.0")?, read.dense("text_embedding.2")?],
            time: [read.dense("time_embedding.0")?, read.dense("time_embedding.2")?],
            time_projection: read.dense("time_projection.1")?,
            picture: config.image.map(|branch| PictureEmbedding::load(&read, branch)).transpose()?,
            reference: config.control.reference.map(|_| read.dense("ref_conv")).transpose()?,
            camera: config.control.camera.map(|sizes| CameraAdapter::load(&read, sizes)).transpose()?,
            side: match config.control.side_chain {
                Some(_) => Some([read.dense("vace_patch_embedding")?, read.before_side_chain()?]),
                None => None,
            },
            animate: match config.control.animate {
                Some(_) => Some((read.dense("pose_patch_embedding")?, FaceEncoder::load(&read)?)),
                None => None,
            },
            speech: config
                .control
                .speech
                .as_ref()
                .map(|sizes| SpeechEmbedding::load(&read, sizes))
                .transpose()?,
        })
    }

    /// Tokens [b, l, d], the stream's beginning in its dtype, of the latents `x` [b, c, t, h, w]; tokens are ordered (frame, row, column).
    ///
    /// The patch convolution has stride = kernel, so it is a product with each patch's values in the order
    /// (channel, dy, dx).
    pub fn tokens(&self, x: &Tensor) -> Result<Tensor> {
        let (_, channels, _, height, width) = x.dims5()?;
        if channels != self.config.in_channels || height % PATCH != 0 || width % PATCH != 0 {
            return Err(Error::Mismatch(format!(
                "the network input has shape {:?}: {} channels and even height and width are expected",
                x.dims(),
                self.config.in_channels
            )));
        }
        Ok(through(&patches_of(x, 1)?, &self.patch)?.to_dtype(self.stream)?)
    }

    /// The main stream with the camera's share of the tokens and a reference picture's tokens in front; and the side stream.
    fn streams(&self, input: &NetworkInput) -> Result<Streams> {
        let (grid, cond) = (input.grid()?, &input.cond);
        let device = self.patch.0.device();
        let mut main = self.tokens(&input.x_bcthw)?;
        if let Some(adapter) = &self.camera {
            let added = adapter.forward(cond.require(CAMERA)?, grid, device)?;
            main = (main + added.to_dtype(self.stream)?)?;
        }
        if let Some(reference) = &self.reference {
            let latents = cond.require(REFERENCE)?.unsqueeze(2)?;
            self.check_shape(REFERENCE, &latents, self.config.control.reference, (1, grid.1, grid.2))?;
            let tokens = through(&patches_of(&latents.to_device(device)?, 1)?, reference)?;
            main = Tensor::cat(&[tokens.to_dtype(self.stream)?, main], 1)?;
        }
        if let Some((patch, _)) = &self.animate {
            let poses = cond.require(POSE)?;
            let channels = Some(self.config.out_channels);
            self.check_shape(POSE, poses, channels, (grid.0.saturating_sub(1), grid.1, grid.2))?;
            let added = through(&patches_of(&poses.to_device(device)?, 1)?, patch)?.to_dtype(self.stream)?;
            // The reference picture's frame has no pose.
            let of_reference = main.dim(1)? - added.dim(1)?;
            main = (main + added.pad_with_zeros(1, of_reference, 0)?)?;
        }
        if let Some(speech) = &self.speech {
            main = self.with_speech(speech, main, input)?;
        }
        let Some([patch, before]) = &self.side else { return Ok(Streams::new(main)) };
        let context = cond.require(CONTEXT)?;
        let channels = self.config.control.side_chain.as_ref().map(|chain| chain.channels);
        self.check_shape(CONTEXT, context, channels, grid)?;
        let side = through(&through(&patches_of(&context.to_device(device)?, 1)?, patch)?, before)?;
        let side = (side.to_dtype(self.stream)? + &main)?;
        Ok(Streams::new(main).with(side_chain::STREAM, side))
    }

    /// The tokens `main` of the latents with the poses added, and those of the reference and of the frames before behind them.
    fn with_speech(&self, speech: &SpeechEmbedding, main: Tensor, input: &NetworkInput) -> Result<Tensor> {
        let (grid, cond, device) = (input.grid()?, &input.cond, self.patch.0.device());
        let channels = Some(self.config.out_channels);
        let (poses, reference) = (cond.require(POSE)?, cond.require(REFERENCE)?.unsqueeze(2)?);
        self.check_shape(POSE, poses, channels, grid)?;
        self.check_shape(REFERENCE, &reference, channels, (1, grid.1, grid.2))?;
        let past = cond.get(PAST).map(|past| past.to_device(device)).transpose()?;
        if let Some(past) = &past {
            self.check_shape(PAST, past, channels, (PAST_FRAMES, grid.1, grid.2))?;
        }
        let reference = through(&patches_of(&reference.to_device(device)?, 1)?, &self.patch)?;
        let reference = reference.to_dtype(self.stream)?;
        speech.tokens(main, &poses.to_device(device)?, &reference, past.as_ref())
    }

    /// Checks that `x` [b, c, t, h, w], which is `role`, has as many channels as the model reads, and the size of the latents.
    fn check_shape(
        &self,
        role: Role,
        x: &Tensor,
        channels: Option<usize>,
        grid: (usize, usize, usize),
    ) -> Result<()> {
        let (_, own, frames, height, width) = x.dims5()?;
        if (Some(own), (frames, height, width)) == (channels, grid) {
            return Ok(());
        }
        Err(Error::Mismatch(format!(
            "{} has {own} channels, {frames} frames, height {height} and width {width}; the model reads {} channels and the \
             latents have {grid:?}",
            role.what(),
            channels.unwrap_or(0)
        )))
    }

    /// The conditioning of a batch for latents of `grid` = (frames, height, width), as the blocks read it.
    ///
    /// A text of fewer rows than the model's text length is padded with zero rows. A model of a first and a last picture
    /// takes CLIP's states of both, concatenated.
    ///
    /// # Errors
    /// If shapes do not fit the model, a role that it reads is missing, or one that it does not read is given.
    pub fn conditioning(
        &self,
        raw: &Conditioning<Raw>,
        grid: (usize, usize, usize),
    ) -> Result<Conditioning<Embedded>> {
        let known = [
            Some(Role::TIMESTEP),
            Some(Role::TEXT),
            self.picture.as_ref().map(|_| Role::PICTURE),
            self.reference.as_ref().map(|_| REFERENCE),
            self.camera.as_ref().map(|_| CAMERA),
            self.side.as_ref().map(|_| CONTEXT),
            self.side.as_ref().map(|_| HINT_SCALE),
            self.animate.as_ref().map(|_| POSE),
            self.animate.as_ref().map(|_| FACES),
            self.speech.as_ref().map(|_| POSE),
            self.speech.as_ref().map(|_| REFERENCE),
            self.speech.as_ref().map(|_| PAST),
            self.speech.as_ref().map(|_| AUDIO),
        ];
        raw.check_known(&known.into_iter().flatten().collect::<Vec<_>>())?;
        let timestep = raw.require(Role::TIMESTEP)?;
        let (time_bgd, mut time_bg6d) = self.time(timestep, grid)?;
        let mut audio = Conditioning::new();
        if let Some(speech) = &self.speech {
            if timestep.rank() != 1 {
                let shape = timestep.dims();
                let why = format!("timestep has shape {shape:?}: S2V takes one for each sample, [batch]");
                return Err(Error::Mismatch(why));
            }
            // What is not of the clip is clean.
            let (_, still) = self.time(&timestep.zeros_like()?, grid)?;
            time_bg6d = speech.modulation((&time_bg6d, &still), grid, raw.get(PAST).is_some())?;
            audio = speech.audio(raw, grid.0)?;
        }
        let text_bsd = self.text(raw.require(Role::TEXT)?, self.patch.0.device())?;
        let picture = self.picture.as_ref().map(|picture| picture.forward(raw.require(Role::PICTURE)?));
        Ok(Conditioning::new()
            .with(Role::TIME, time_bgd)
            .with(Role::MODULATION, time_bg6d)
            .with(Role::TEXT, text_bsd)
            .with_optional(Role::PICTURE, picture.transpose()?)
            .with_optional(FACES, self.faces(raw, grid)?)
            .with_optional(HINT_SCALE, self.hint_scale(raw)?)
            .merged(audio))
    }

    /// What the hints of each sample are multiplied by, [b, 1, 1] f32, where that is given.
    fn hint_scale(&self, raw: &Conditioning<Raw>) -> Result<Option<Tensor>> {
        let Some(scale) = raw.get(HINT_SCALE) else { return Ok(None) };
        let batch = scale.dim(0)?;
        let scale = scale.to_dtype(DType::F32)?.reshape((batch, 1, 1))?;
        Ok(Some(scale.to_device(self.patch.0.device())?))
    }

    /// The face tokens [b, t, 5, d] of the motion vectors in `raw`, of a model that reads faces.
    fn faces(
        &self,
        raw: &Conditioning<Raw>,
        (frames, _, _): (usize, usize, usize),
    ) -> Result<Option<Tensor>> {
        let (Some((_, encoder)), Some(sizes)) = (&self.animate, &self.config.control.animate) else {
            return Ok(None);
        };
        let vectors = raw.require(FACES)?;
        let expected = (face_frames(frames), sizes.motion.width);
        let (_, count, width) = vectors.dims3()?;
        if (count, width) != expected {
            return Err(Error::Mismatch(format!(
                "{} has {count} frames of width {width}: {expected:?} are expected for {frames} latent frames, the first of \
                 which is the reference picture",
                FACES.what()
            )));
        }
        Ok(Some(encoder.forward(vectors)?))
    }

    /// The time embedding [b, g, d] f32 and its projection [b, g, 6, d] f32 of timesteps `[b]` or `[b, tokens]`.
    fn time(&self, timestep: &Tensor, grid: (usize, usize, usize)) -> Result<(Tensor, Tensor)> {
        let (frames, rows, columns) = (grid.0, grid.1 / PATCH, grid.2 / PATCH);
        let in_front = self.config.control.tokens_in_front(grid.1, grid.2);
        let groups = timestep_groups(timestep, frames, rows * columns, in_front)?;
        let (batch, group_count) = (groups.len(), groups[0].len());
        let angles = sinusoid(&groups.concat(), self.config.freq_dim, self.patch.0.device())?;
        let [first, second] = &self.time;
        let e = kernels::linear::forward(&angles, &first.0, Some(&first.1), None)?.silu()?;
        let e = kernels::linear::forward(&e, &second.0, Some(&second.1), None)?;
        let (projection, bias) = &self.time_projection;
        let e0 = kernels::linear::forward(&e.silu()?, projection, Some(bias), None)?;
        let dim = self.config.dim;
        Ok((e.reshape((batch, group_count, dim))?, e0.reshape((batch, group_count, 6, dim))?))
    }

    /// Text states [b, s, text_dim], zero-padded, through the text embedding: [b, text_len, d].
    fn text(&self, text: &Tensor, device: &Device) -> Result<Tensor> {
        let (batch, rows, width) = text.dims3()?;
        let DitConfig { text_len, text_dim, .. } = self.config;
        if width != text_dim || rows > text_len {
            return Err(Error::Mismatch(format!(
                "text states of shape {:?} do not fit a model that takes up to {text_len} rows of width {text_dim}",
                text.dims()
            )));
        }
        let [first, second] = &self.text;
        let text = text.to_device(device)?.to_dtype(first.0.dtype())?;
        let text = match text_len - rows {
            0 => text,
            missing => {
                Tensor::cat(&[&text, &Tensor::zeros((batch, missing, width), text.dtype(), device)?], 1)?
            }
        };
        let inner =
            kernels::gelu::forward(&kernels::linear::forward(&text, &first.0, Some(&first.1), None)?)?;
        Ok(kernels::linear::forward(&inner, &second.0, Some(&second.1), None)?)
    }
}

impl Embed for Embedder {
    fn embed(&self, input: &NetworkInput) -> Result<Boundary> {
        let cond = self.conditioning(&input.cond, input.grid()?)?;
        Ok(Boundary { streams: self.streams(input)?, cond })
    }

    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self {
            patch,
            text,
            time,
            time_projection,
            picture,
            reference,
            camera,
            side,
            animate,
            speech,
            ..
        } = self;
        let linears = [patch, time_projection].into_iter().chain(text).chain(time);
        let of_control = reference.iter_mut().chain(side.iter_mut().flatten());
        let of_picture = picture.iter_mut().flat_map(PictureEmbedding::tensors_mut);
        let of_camera = camera.iter_mut().flat_map(CameraAdapter::tensors_mut);
        let (poses, faces): (Option<_>, Option<_>) =
            animate.as_mut().map(|(poses, faces)| (poses, faces)).unzip();
        let linears = linears.chain(of_control).chain(poses).flat_map(of_linear);
        let of_faces = faces.into_iter().flat_map(FaceEncoder::tensors_mut);
        let of_speech = speech.iter_mut().flat_map(SpeechEmbedding::tensors_mut);
        linears.chain(of_picture).chain(of_camera).chain(of_faces).chain(of_speech).collect()
    }

    fn share(&self) -> Box<dyn Embed> {
        Box::new(self.clone())
    }
}

/// `x` [b, l, in] through a linear layer of the embeddings.
fn through(x: &Tensor, (weight, bias): &(Weight, Tensor)) -> Result<Tensor> {
    Ok(kernels::linear::forward(x, weight, Some(bias), None)?)
}

/// The tensors of a linear layer.
fn of_linear((weight, bias): &mut (Weight, Tensor)) -> Vec<&mut Tensor> {
    weight.tensors_mut().into_iter().chain([bias]).collect()
}

impl PictureEmbedding {
    fn load(read: &Reader, branch: ImageBranch) -> Result<Self> {
        let norm = |module: &str| -> Result<(Tensor, Tensor)> {
            Ok((read.tensor(module, ".weight")?, read.tensor(module, ".bias")?))
        };
        Ok(Self {
            branch,
            positions: branch.positions.map(|_| read.tensor("img_emb.emb_pos", "")).transpose()?,
            norms: [norm("img_emb.proj.0")?, norm("img_emb.proj.4")?],
            linears: [read.dense("img_emb.proj.1")?, read.dense("img_emb.proj.3")?],
        })
    }

    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { positions, norms, linears, .. } = self;
        let norms = norms.iter_mut().flat_map(|(gain, shift)| [gain, shift]);
        positions.iter_mut().chain(norms).chain(linears.iter_mut().flat_map(of_linear)).collect()
    }

    fn forward(&self, states: &Tensor) -> Result<Tensor> {
        let (_, rows, width) = states.dims3()?;
        if width != self.branch.dim || self.branch.positions.is_some_and(|positions| positions != rows) {
            let rows = self.branch.positions.map_or_else(|| "any number of".into(), |n| n.to_string());
            return Err(Error::Mismatch(format!(
                "a picture's states (clip_fea) have shape {:?}: {rows} rows of width {} are expected",
                states.dims(),
                self.branch.dim
            )));
        }
        let [(gain_in, shift_in), (gain_out, shift_out)] = &self.norms;
        let [(first, first_bias), (second, second_bias)] = &self.linears;
        let dtype = first.dtype();
        let x = states.to_device(gain_in.device())?.to_dtype(DType::F32)?;
        let x = match &self.positions {
            Some(positions) => x.broadcast_add(positions)?,
            None => x,
        };
        let x = kernels::norm::affine_layer_norm(&x, gain_in, shift_in, PICTURE_EPS, dtype)?;
        let x = kernels::linear::forward(&x, first, Some(first_bias), None)?.gelu_erf()?;
        let x = kernels::linear::forward(&x, second, Some(second_bias), None)?;
        Ok(kernels::norm::affine_layer_norm(&x, gain_out, shift_out, PICTURE_EPS, dtype)?)
    }
}

/// The timesteps of each sample's groups of tokens: one if all tokens share it, one per frame if the tokens of each frame
/// do, else one per token. Tokens in front, as many as a frame's or none, share the last token's timestep.
fn timestep_groups(
    timestep: &Tensor,
    frames: usize,
    tokens_per_frame: usize,
    in_front: usize,
) -> Result<Vec<Vec<f64>>> {
    let timestep = timestep.to_dtype(DType::F64)?.to_device(&Device::Cpu)?;
    let per_token: Vec<Vec<f64>> = match timestep.dims() {
        [_] => return Ok(timestep.to_vec1()?.into_iter().map(|t| vec![t]).collect()),
        [_, tokens] if *tokens == frames * tokens_per_frame => timestep.to_vec2()?,
        shape => {
            return Err(Error::Mismatch(format!(
                "timestep has shape {shape:?}: [batch] or [batch, {}] is expected",
                frames * tokens_per_frame
            )));
        }
    };
    let with_front = |row: Vec<f64>| {
        let last = row.last().copied();
        last.into_iter().cycle().take(in_front).chain(row).collect()
    };
    let per_token: Vec<Vec<f64>> = per_token.into_iter().map(with_front).collect();
    let grouped = |size: usize| -> Option<Vec<Vec<f64>>> {
        let same = |row: &[f64]| row.chunks(size).all(|group| group.iter().all(|t| t == &group[0]));
        let firsts = |row: &[f64]| row.chunks(size).map(|group| group[0]).collect();
        per_token.iter().all(|row| same(row)).then(|| per_token.iter().map(|row| firsts(row)).collect())
    };
    let whole = in_front + frames * tokens_per_frame;
    Ok(grouped(whole).or_else(|| grouped(tokens_per_frame)).unwrap_or_else(|| per_token.clone()))
}

/// Sinusoidal embedding [n, freq_dim] f32 of timesteps in 0..1000: cosines, then sines, of t * 10000^(-i/k).
///
/// The angles are computed in f64, as the official code does; f32 angles are off by 4e-5 at t = 1000.
pub fn sinusoid(timesteps: &[f64], freq_dim: usize, device: &Device) -> Result<Tensor> {
    let half = freq_dim / 2;
    let angle = |t: f64, i: usize| t * 10000f64.powf(-(i as f64) / half as f64);
    let row = |&t: &f64| {
        let cosines = (0..half).map(move |i| angle(t, i).cos() as f32);
        cosines.chain((0..half).map(move |i| angle(t, i).sin() as f32))
    };
    let values: Vec<f32> = timesteps.iter().flat_map(row).collect();
    Ok(Tensor::from_vec(values, (timesteps.len(), 2 * half), device)?)
}

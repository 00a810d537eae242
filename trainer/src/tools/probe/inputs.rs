//! The tensors that a probe is given.

use std::path::Path;

use kernels::{DType, Device, Tensor};
use models::dit::animate::{FACES, MotionEncoder, POSE};
use models::dit::control::{CAMERA, CONTEXT, REFERENCE};
use models::dit::speech::{AUDIO, PAST};
use models::dit::{Conditioning, DitConfig, Raw, Role};
use models::weights::{Checkpoint, Weights};

use crate::error::{Error, Result};

/// A file of tensors by name.
#[derive(Debug)]
pub struct Inputs {
    file: Checkpoint,
    /// The motion of `face_pixel_values`.
    faces: Option<Tensor>,
}

impl Inputs {
    /// Opens a safetensors file.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { file: Checkpoint::open(path).map_err(models::Error::from)?, faces: None })
    }

    /// The same, with `face_pixel_values` [b, 3, f, side, side] in -1..1 through the motion encoder of `dit`, where it has one.
    ///
    /// # Errors
    /// Pictures of another size than the encoder's, and weights that cannot be read.
    pub fn with_faces(self, dit: &DitConfig, weights: &Weights) -> Result<Self> {
        let Some(animate) = &dit.control.animate else { return Ok(self) };
        let encoder = MotionEncoder::load(weights, &animate.motion, &Device::Cpu)?;
        let faces = encoder.forward(&self.ranked("face_pixel_values", 5)?)?;
        Ok(Self { faces: Some(faces), ..self })
    }

    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.file.names()
    }

    /// The tensor `name` in f32 on the CPU, converted from its stored type.
    ///
    /// # Errors
    /// If it is missing (the message lists the tensors of the file), or has values that are not finite.
    pub fn float(&self, name: &str) -> Result<Tensor> {
        let Some(stored) = self.file.dtype(name) else {
            let known: Vec<&str> = self.names().take(20).collect();
            return Err(
                self.refuse(format!("there is no tensor `{name}`; the file has {}", known.join(", ")))
            );
        };
        let whole_number = stored.to_candle().filter(|_| !stored.is_float());
        Ok(self.file.tensor(name, whole_number.unwrap_or(DType::F32), &Device::Cpu)?.to_dtype(DType::F32)?)
    }

    /// The rows of the tensor `name` of two axes in f64; `None` if it is missing.
    ///
    /// # Errors
    /// As [`Inputs::float`].
    pub fn rows(&self, name: &str) -> Result<Option<Vec<Vec<f64>>>> {
        if !self.file.contains(name) {
            return Ok(None);
        }
        let tensor = self.file.tensor(name, DType::F64, &Device::Cpu)?;
        match tensor.rank() {
            2 => Ok(Some(tensor.to_vec2()?)),
            _ => Err(self.refuse(format!("`{name}` has shape {:?}: 2 axes are expected", tensor.dims()))),
        }
    }

    /// [`Inputs::float`] of an optional tensor.
    pub fn optional(&self, name: &str) -> Result<Option<Tensor>> {
        self.file.contains(name).then(|| self.float(name)).transpose()
    }

    /// [`Inputs::float`] of a tensor that must have `rank` axes.
    pub fn ranked(&self, name: &str, rank: usize) -> Result<Tensor> {
        let tensor = self.float(name)?;
        match tensor.rank() == rank {
            true => Ok(tensor),
            false => {
                Err(self.refuse(format!("`{name}` has shape {:?}: {rank} axes are expected", tensor.dims())))
            }
        }
    }

    /// The conditioning of the network besides its timestep: `context` [b, s, text_dim], and if given `clip_fea` [b, s, width],
    /// `ref_latent` [b, c, h, w], `camera` [b, 24, t, 8h, 8w], `vace_context` [b, 96, t, h, w], `pose_latents` [b, c, t-1, h, w] and
    /// `face_pixel_values` by [`Self::with_faces`], of S2V `pose_latents` [b, c, t, h, w], `audio_embeds` [b, 25, width, 4t] and
    /// `motion_latents` [b, c, 19, h, w].
    ///
    /// # Errors
    /// As [`Inputs::ranked`].
    pub fn conditioning(&self) -> Result<Conditioning<Raw>> {
        let text = self.ranked("context", 3)?;
        Ok(Conditioning::new()
            .with(Role::TEXT, text)
            .with_optional(Role::PICTURE, self.optional("clip_fea")?)
            .with_optional(REFERENCE, self.reference()?)
            .with_optional(CAMERA, self.optional("camera")?)
            .with_optional(CONTEXT, self.optional("vace_context")?)
            .with_optional(POSE, self.optional("pose_latents")?)
            .with_optional(FACES, self.faces.clone())
            .with_optional(AUDIO, self.optional("audio_embeds")?)
            .with_optional(PAST, self.optional("motion_latents")?))
    }

    /// `ref_latent` [b, c, h, w], also where it has an axis of one frame.
    fn reference(&self) -> Result<Option<Tensor>> {
        let latent = self.optional("ref_latent")?;
        let still = |latent: Tensor| if latent.rank() == 5 { latent.squeeze(2) } else { Ok(latent) };
        Ok(latent.map(still).transpose()?)
    }

    /// An error that names the file.
    pub fn refuse(&self, why: String) -> Error {
        Error::ProbeInput { path: self.file.path().to_owned(), why }
    }
}

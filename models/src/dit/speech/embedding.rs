//! What S2V's tokens begin as: those of the clip with its poses, of a reference picture and of the frames before, each with the
//! vector of its kind; and audio for the injections.

use kernels::weight::Weight;
use kernels::{DType, Tensor};

use super::super::reader::Reader;
use super::audio_encoder::{AudioEncoder, AudioTokens};
use super::{
    AUDIO, COLUMNS_PER_LATENT, INJECTED, KINDS, PACKS, PAST_FRAMES, SIDE, Speech, adain, tokens_behind,
};
use crate::dit::conditioning::{Conditioning, Embedded, Raw};
use crate::dit::patches::patches_of;
use crate::{Error, Result};

type Linear = (Weight, Tensor);

/// S2V's own embeddings.
#[derive(Debug, Clone)]
pub struct SpeechEmbedding {
    sizes: Speech,
    poses: Linear,
    packs: [Linear; 3],
    /// [3, d].
    kinds: Tensor,
    audio: AudioEncoder,
    adain: Vec<Linear>,
}

impl SpeechEmbedding {
    pub fn load(read: &Reader, sizes: &Speech) -> Result<Self> {
        let pack = |name: &str| read.dense(&format!("frame_packer.{name}"));
        let modulation = |n: usize| read.undescribed_linear(&adain(n));
        Ok(Self {
            poses: read.dense("cond_encoder")?,
            packs: [pack("proj")?, pack("proj_2x")?, pack("proj_4x")?],
            kinds: read.tensor("trainable_cond_mask", ".weight")?,
            audio: AudioEncoder::load(read)?,
            adain: (0..sizes.after.len()).map(modulation).collect::<Result<_>>()?,
            sizes: sizes.clone(),
        })
    }

    /// The tokens [b, l, d] of `clip` [b, t h w, d] and what is behind it: poses [b, c, t, h, w] are added, `reference` [b, h w, d]
    /// follows, then the past [b, c, 19, h, w] in packs.
    ///
    /// # Errors
    /// Latents whose sides are no multiples of 8 in a clip with a past, and one of another length.
    pub fn tokens(
        &self,
        clip: Tensor,
        poses: &Tensor,
        reference: &Tensor,
        past: Option<&Tensor>,
    ) -> Result<Tensor> {
        let stream = clip.dtype();
        let through = |x: &Tensor, (weight, bias): &Linear| -> Result<Tensor> {
            Ok(kernels::linear::forward(x, weight, Some(bias), None)?.to_dtype(stream)?)
        };
        let clip = (clip + through(&patches_of(poses, 1)?, &self.poses)?)?;
        let mut parts = vec![self.of_kind(&clip, 0)?, self.of_kind(reference, 1)?];
        if let Some(past) = past {
            let (_, _, frames, height, width) = past.dims5()?;
            if frames != PAST_FRAMES || height % SIDE != 0 || width % SIDE != 0 {
                return Err(Error::Mismatch(format!(
                    "the latents of the frames before (motion_latents) have shape {:?}: {PAST_FRAMES} frames, and sides that are \
                     multiples of {SIDE}, are expected",
                    past.dims()
                )));
            }
            for ((first, count, patch), linear) in PACKS.into_iter().zip(&self.packs) {
                let own = past.narrow(2, first, count)?.contiguous()?;
                parts.push(self.of_kind(&through(&patches_of(&own, patch)?, linear)?, 2)?);
            }
        }
        Ok(Tensor::cat(&parts, 1)?)
    }

    fn of_kind(&self, tokens: &Tensor, kind: usize) -> Result<Tensor> {
        let row = self.kinds.narrow(0, kind, 1)?.unsqueeze(0)?.to_dtype(tokens.dtype())?;
        Ok(tokens.broadcast_add(&row)?)
    }

    /// The audio of a clip of `frames` latent frames as the injections read it.
    ///
    /// # Errors
    /// Another number of states or columns.
    pub fn audio(&self, raw: &Conditioning<Raw>, frames: usize) -> Result<Conditioning<Embedded>> {
        let states = raw.require(AUDIO)?;
        let (_, count, width, columns) = states.dims4()?;
        let expected = (self.sizes.states, self.sizes.audio_width, COLUMNS_PER_LATENT * frames);
        if (count, width, columns) != expected {
            return Err(Error::Mismatch(format!(
                "{} have {count} states of width {width} in {columns} columns: {expected:?} are expected for {frames} latent frames",
                AUDIO.what()
            )));
        }
        let AudioTokens { local, global } = self.audio.forward(states)?;
        let active = global.silu()?;
        let modulation = |(weight, bias): &Linear| -> Result<Tensor> {
            Ok(kernels::linear::forward(&active, weight, Some(bias), None)?.to_dtype(DType::F32)?)
        };
        let all = self.adain.iter().map(modulation).collect::<Result<Vec<_>>>()?;
        Ok(Conditioning::new().with(AUDIO, local).with(INJECTED, Tensor::stack(&all, 1)?))
    }

    /// The modulation [b, g, 6, d] of all tokens, in equal groups: `clip` [b, 1, 6, d] of the clip's, and `still` [b, 1, 6, d], at
    /// timestep 0, of those behind.
    ///
    /// # Errors
    /// When the tensor library fails.
    pub fn modulation(
        &self,
        (clip, still): (&Tensor, &Tensor),
        (frames, height, width): (usize, usize, usize),
        has_past: bool,
    ) -> Result<Tensor> {
        let (own, behind) =
            (frames * tokens_behind(height, width, false), tokens_behind(height, width, has_past));
        let unit = common_divisor(own, behind);
        let spread = |x: &Tensor, tokens: usize| -> Result<Tensor> {
            let (batch, _, rows, dim) = x.dims4()?;
            Ok(x.broadcast_as((batch, tokens / unit, rows, dim))?.contiguous()?)
        };
        Ok(Tensor::cat(&[spread(clip, own)?, spread(still, behind)?], 1)?)
    }

    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Self { poses, packs, kinds, audio, adain, .. } = self;
        let linears = [poses].into_iter().chain(packs).chain(adain);
        let of_linears = linears.flat_map(|(weight, bias)| weight.tensors_mut().into_iter().chain([bias]));
        of_linears.chain([kinds]).chain(audio.tensors_mut()).collect()
    }
}

fn common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_divisor(b, a % b) }
}

const _: () = assert!(KINDS == 3 && PACKS.len() == 3);

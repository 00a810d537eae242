//! The speech encoder.

use models::wav2vec::{SpeechEncoder, normalised};

use super::{Inputs, Outputs};
use crate::encode::conditions::speech::at_middle_rate;
use crate::error::Result;

/// Of `waveform_16k` `[n]`: `input_values` [1, n], normalised, `hidden_states` [layers + 1, t, width] at 50 a second, and
/// `audio_hidden_30hz` at 30.
///
/// # Errors
/// A missing tensor, and audio that is too short.
pub fn encode(encoder: &SpeechEncoder, inputs: &Inputs) -> Result<Outputs> {
    let samples: Vec<f32> = inputs.ranked("waveform_16k", 1)?.to_vec1()?;
    let count = samples.len();
    let values = kernels::Tensor::from_vec(normalised(&samples), (1, count), &kernels::Device::Cpu)?;
    let states = encoder.encode(&samples)?;
    let middle = at_middle_rate(&states)?;
    Ok(Outputs::from([
        ("input_values".to_owned(), values),
        ("hidden_states".to_owned(), states),
        ("audio_hidden_30hz".to_owned(), middle),
    ]))
}

//! Sound as a WAV file.

use std::fs;
use std::path::Path;

use crate::error::{DataError, Result};

/// Bytes of a sample of 16 bits.
const SAMPLE: usize = 2;

/// `channels` of one length, each sample between -1 and 1, side by side as 16-bit integers, little end first.
pub fn pcm(channels: &[&[f32]]) -> Vec<u8> {
    let count = channels.iter().map(|channel| channel.len()).min().unwrap_or(0);
    let values = (0..count).flat_map(|n| channels.iter().map(move |channel| channel[n]));
    values.flat_map(|value| ((value * 32767.0).round() as i16).to_le_bytes()).collect()
}

/// Writes `channels` of one length as a WAV file of 16 bits and `rate` samples a second.
///
/// # Errors
/// If the file cannot be written.
pub fn write_wav(path: &Path, channels: &[&[f32]], rate: u32) -> Result<()> {
    let (samples, width) = (pcm(channels), (SAMPLE * channels.len()) as u32);
    let mut bytes = b"RIFF".to_vec();
    bytes.extend((36 + samples.len() as u32).to_le_bytes());
    bytes.extend(b"WAVEfmt \x10\0\0\0\x01\0");
    bytes.extend((channels.len() as u16).to_le_bytes());
    bytes.extend(rate.to_le_bytes());
    bytes.extend((rate * width).to_le_bytes());
    bytes.extend((width as u16).to_le_bytes());
    bytes.extend(16u16.to_le_bytes());
    bytes.extend(b"data");
    bytes.extend((samples.len() as u32).to_le_bytes());
    bytes.extend(samples);
    fs::write(path, bytes).map_err(DataError::io("write", path))
}

//! Encoding a film with openh264.

use openh264::OpenH264API;
use openh264::encoder::{
    BitRate, Encoder, EncoderConfig, FrameRate, FrameType, IntraFramePeriod, QpRange, RateControlMode,
    VuiConfig,
};
use openh264::formats::YUVSlices;

use super::Film;
use crate::colour::{Colour, to_planes};

/// A coded film, ready for a container.
pub(super) struct Stream {
    /// Width in pixels, even.
    pub width: u16,
    /// Height in pixels, even.
    pub height: u16,
    /// Sequence parameter set.
    pub sps: Vec<u8>,
    /// Picture parameter set.
    pub pps: Vec<u8>,
    /// One coded frame each: NAL units with a four-byte length in front.
    pub samples: Vec<Vec<u8>>,
    /// Which frames can be decoded on their own, counted from 0.
    pub keyframes: Vec<usize>,
}

/// The smallest side that the encoder supports.
const SMALLEST_SIDE: u32 = 16;
/// Bits a pixel: generous, because people judge training by these clips.
const BITS_PER_PIXEL: f64 = 0.4;
/// Coarsest quantiser allowed: about 37 dB, where people see no difference.
const COARSEST_QP: u8 = 24;

/// Codes every frame.
///
/// # Errors
/// What openh264 refuses, in its words.
pub(super) fn encode(film: &Film, fps: f64) -> Result<Stream, String> {
    let even = |side: u32| side.max(SMALLEST_SIDE).next_multiple_of(2) as usize;
    let (width, height) = (even(film.width()), even(film.height()));
    let colour = Colour::WRITTEN;
    let mut encoder =
        Encoder::with_api_config(OpenH264API::from_source(), config(width, height, fps)).map_err(words)?;
    let mut stream = Stream {
        width: u16::try_from(width).map_err(|_| "it is too wide")?,
        height: u16::try_from(height).map_err(|_| "it is too high")?,
        sps: Vec::new(),
        pps: Vec::new(),
        samples: Vec::with_capacity(film.len()),
        keyframes: Vec::new(),
    };
    for frame in film.frames() {
        let size = (film.width() as usize, film.height() as usize);
        let [y, cb, cr] = to_planes(frame, size, (width, height), colour);
        let planes = YUVSlices::new((&y, &cb, &cr), (width, height), (width, width / 2, width / 2));
        let coded = encoder.encode(&planes).map_err(words)?;
        if coded.frame_type() == FrameType::IDR {
            stream.keyframes.push(stream.samples.len());
        }
        let mut sample = Vec::new();
        for layer in (0..coded.num_layers()).filter_map(|index| coded.layer(index)) {
            for unit in (0..layer.nal_count()).filter_map(|index| layer.nal_unit(index)) {
                stream.sort_unit(without_start_code(unit), &mut sample);
            }
        }
        if sample.is_empty() {
            return Err(format!("the encoder left out frame {}", stream.samples.len() + 1));
        }
        stream.samples.push(sample);
    }
    Ok(stream)
}

fn config(width: usize, height: usize, fps: f64) -> EncoderConfig {
    let bits_per_second = (width * height) as f64 * fps * BITS_PER_PIXEL;
    EncoderConfig::new()
        .bitrate(BitRate::from_bps(bits_per_second.clamp(200_000.0, 100_000_000.0) as u32))
        .max_frame_rate(FrameRate::from_hz(fps as f32))
        // The modes that may skip frames print warnings if skipping is disabled.
        .rate_control_mode(RateControlMode::Bufferbased)
        .qp(QpRange::new(0, COARSEST_QP))
        // No frame may be skipped: the timing of the clip would be wrong.
        .skip_frames(false)
        .scene_change_detect(false)
        .background_detection(false)
        .intra_frame_period(IntraFramePeriod::from_num_frames((fps * 2.0).ceil() as u32))
        .vui(VuiConfig::bt709())
}

fn words(error: openh264::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

fn without_start_code(unit: &[u8]) -> &[u8] {
    let zeros = unit.iter().take_while(|&&byte| byte == 0).count();
    unit.get(zeros + 1..).unwrap_or_default()
}

impl Stream {
    /// Parameter sets go to the container's header, all else into the frame.
    fn sort_unit(&mut self, unit: &[u8], sample: &mut Vec<u8>) {
        const SEQUENCE_SET: u8 = 7;
        const PICTURE_SET: u8 = 8;
        match unit.first().map(|header| header & 0x1f) {
            Some(SEQUENCE_SET) => self.sps = unit.to_vec(),
            Some(PICTURE_SET) => self.pps = unit.to_vec(),
            Some(_) => {
                sample.extend((unit.len() as u32).to_be_bytes());
                sample.extend_from_slice(unit);
            }
            None => {}
        }
    }
}

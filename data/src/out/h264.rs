//! Encoding a film with openh264.

use openh264::OpenH264API;
use openh264::encoder::{
    BitRate, Encoder, EncoderConfig, FrameRate, FrameType, IntraFramePeriod, QpRange, RateControlMode,
    VuiConfig,
};
use openh264::formats::YUVSlices;

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

/// An encoder that takes a film frame by frame.
pub(super) struct Coder {
    encoder: Encoder,
    stream: Stream,
    /// Width and height of frames.
    size: (usize, usize),
    /// The same in the stream, even.
    coded: (usize, usize),
}

impl Coder {
    /// For frames of `width` x `height`.
    ///
    /// # Errors
    /// What openh264 refuses, in its words; here and below.
    pub fn new(width: u32, height: u32, fps: f64) -> Result<Self, String> {
        let even = |side: u32| side.max(SMALLEST_SIDE).next_multiple_of(2) as usize;
        let coded = (even(width), even(height));
        let config = config(coded.0, coded.1, fps);
        let encoder = Encoder::with_api_config(OpenH264API::from_source(), config).map_err(words)?;
        let stream = Stream {
            width: u16::try_from(coded.0).map_err(|_| "it is too wide")?,
            height: u16::try_from(coded.1).map_err(|_| "it is too high")?,
            sps: Vec::new(),
            pps: Vec::new(),
            samples: Vec::new(),
            keyframes: Vec::new(),
        };
        Ok(Self { encoder, stream, size: (width as usize, height as usize), coded })
    }

    /// Codes the next frame, `height * width * 3` bytes.
    pub fn push(&mut self, frame: &[u8]) -> Result<(), String> {
        let Self { encoder, stream, size, coded: (width, height) } = self;
        let [y, cb, cr] = to_planes(frame, *size, (*width, *height), Colour::WRITTEN);
        let planes = YUVSlices::new((&y, &cb, &cr), (*width, *height), (*width, *width / 2, *width / 2));
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
        Ok(())
    }

    /// All frames.
    pub fn finish(self) -> Stream {
        self.stream
    }
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

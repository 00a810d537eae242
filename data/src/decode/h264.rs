//! H.264 in MP4, decoded in process by openh264.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use openh264::OpenH264API;
use openh264::decoder::{DecodedYUV, Decoder, DecoderConfig, Flush};
use openh264::formats::YUVSource;

use super::mp4::Track;
use super::sps::{self, Sps};
use super::{Alpha, Engine, Frame, FrameStream, PixelAspect, Probe};
use crate::colour::{self, Colour, Planes};
use crate::error::{DataError, Result};

/// Reads size and times from the index and the stream's own header. Streams that openh264 cannot take go to ffmpeg.
pub(super) fn probe(path: &Path, track: &Track) -> Result<Probe> {
    let header = header(path, track)?;
    if let Some(codec) = header.unsupported {
        return super::ffmpeg::probe(path, &codec);
    }
    let sideways = track.quarter_turns % 2 == 1;
    let (width, height) =
        if sideways { (header.height, header.width) } else { (header.width, header.height) };
    let pixel_aspect = track.pixel_aspect.or(header.pixel_aspect).unwrap_or(PixelAspect::SQUARE);
    let pixel_aspect = if sideways { pixel_aspect.turned() } else { pixel_aspect };
    let times = track.shown.times.iter().copied().flatten().collect();
    let (end, codec) = (track.shown.end, "H.264".to_string());
    Ok(Probe { width, height, pixel_aspect, times, end, codec, engine: Engine::OpenH264, alpha: Alpha::None })
}

fn header(path: &Path, track: &Track) -> Result<Sps> {
    let parsed = track.sps.first().and_then(|nal| sps::parse(nal));
    parsed.ok_or_else(|| DataError::unreadable(path, "its H.264 header (sequence parameter set) is damaged"))
}

/// Streams the frames that the edit shows, in display order.
pub(super) fn frames(path: &Path, track: Box<Track>) -> Result<FrameStream> {
    let header = header(path, &track)?;
    let file = File::open(path).map_err(DataError::io("read", path))?;
    // Flushing after each picture, the crate's default, would give B-frames in decoding order.
    let config = DecoderConfig::new().flush_after_decode(Flush::NoFlush);
    let decoder = Decoder::with_api_config(OpenH264API::from_source(), config)
        .map_err(|error| DataError::unreadable(path, format!("openh264 did not start: {error}")))?;
    let colour = header.colour.or(track.colour).unwrap_or(Colour::UNLABELLED);
    Ok(Box::new(Stream {
        path: path.to_path_buf(),
        file,
        track,
        decoder,
        colour,
        next_sample: 0,
        displayed: 0,
        ready: VecDeque::new(),
        state: State::Reading,
    }))
}

struct Stream {
    path: PathBuf,
    file: File,
    track: Box<Track>,
    decoder: Decoder,
    colour: Colour,
    /// Next sample to decode, in decoding order.
    next_sample: usize,
    /// Pictures decoded so far, in display order.
    displayed: usize,
    ready: VecDeque<Frame>,
    state: State,
}

#[derive(PartialEq)]
enum State {
    Reading,
    Done,
}

impl Iterator for Stream {
    type Item = Result<Frame>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Some(Ok(frame));
            }
            if self.state == State::Done {
                return None;
            }
            if let Err(reason) = self.advance() {
                self.state = State::Done;
                return Some(Err(DataError::unreadable(&self.path, reason)));
            }
        }
    }
}

impl Stream {
    /// Decodes one more sample, or flushes the decoder after the last.
    fn advance(&mut self) -> std::result::Result<(), String> {
        if self.next_sample == self.track.samples.len() {
            self.state = State::Done;
            let pictures = self.decoder.flush_remaining().map_err(|error| error.to_string())?;
            for picture in &pictures {
                deliver(picture, &self.track, self.colour, &mut self.displayed, &mut self.ready)?;
            }
            let (shown, listed) = (self.displayed, self.track.samples.len());
            return if shown == listed {
                Ok(())
            } else {
                Err(format!("only {shown} of its {listed} frames could be decoded; the file is damaged"))
            };
        }
        let packet = self.packet()?;
        self.next_sample += 1;
        let number = self.next_sample;
        let picture = self.decoder.decode(&packet);
        let picture =
            picture.map_err(|error| format!("frame {number} is damaged ({})", first_line(&error)))?;
        match picture {
            Some(picture) => {
                deliver(&picture, &self.track, self.colour, &mut self.displayed, &mut self.ready)
            }
            None => Ok(()),
        }
    }

    /// The next sample with start codes in place of lengths (ITU-T H.264 Annex B); the first one brings the parameter sets.
    fn packet(&mut self) -> std::result::Result<Vec<u8>, String> {
        const START_CODE: [u8; 4] = [0, 0, 0, 1];
        let sample = self.track.samples[self.next_sample];
        let read = self.file.seek(SeekFrom::Start(sample.offset)).and_then(|_| {
            let mut bytes = vec![0; sample.size as usize];
            self.file.read_exact(&mut bytes).map(|()| bytes)
        });
        let bytes = read.map_err(|error| error.to_string())?;
        let mut packet = Vec::with_capacity(bytes.len() + 64);
        if self.next_sample == 0 {
            for set in self.track.sps.iter().chain(&self.track.pps) {
                packet.extend_from_slice(&START_CODE);
                packet.extend_from_slice(set);
            }
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let unit = split_unit(&mut rest, self.track.length_bytes);
            let unit = unit.ok_or_else(|| format!("frame {} is damaged", self.next_sample + 1))?;
            packet.extend_from_slice(&START_CODE);
            packet.extend_from_slice(unit);
        }
        Ok(packet)
    }
}

fn first_line(error: &openh264::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

/// Takes one length-prefixed NAL unit off the front.
fn split_unit<'a>(rest: &mut &'a [u8], length_bytes: usize) -> Option<&'a [u8]> {
    let (prefix, after) = rest.split_at_checked(length_bytes)?;
    let length = prefix.iter().fold(0_usize, |length, &byte| length << 8 | usize::from(byte));
    let (unit, after) = after.split_at_checked(length)?;
    *rest = after;
    Some(unit)
}

/// Converts a decoded picture and queues it, unless the edit cuts it off.
fn deliver(
    picture: &DecodedYUV,
    track: &Track,
    colour: Colour,
    displayed: &mut usize,
    ready: &mut VecDeque<Frame>,
) -> std::result::Result<(), String> {
    let time = track.shown.times.get(*displayed).copied();
    let time = time.ok_or("it holds more frames than its index lists; the file is damaged")?;
    *displayed += 1;
    let Some(time) = time else { return Ok(()) };
    let (width, height) = picture.dimensions();
    let (luma_stride, chroma_stride, _) = picture.strides();
    let planes =
        Planes { y_cb_cr: [picture.y(), picture.u(), picture.v()], strides: (luma_stride, chroma_stride) };
    let rgb =
        colour::to_rgb(&planes, width, height, colour).ok_or("the decoder gave an incomplete picture")?;
    let frame = Frame { width: width as u32, height: height as u32, rgb, time };
    ready.push_back(turned(frame, track.quarter_turns));
    Ok(())
}

/// The frame turned clockwise.
fn turned(frame: Frame, quarter_turns: u8) -> Frame {
    if quarter_turns == 0 {
        return frame;
    }
    let (width, height) = (frame.width as usize, frame.height as usize);
    let (new_width, new_height) = if quarter_turns % 2 == 1 { (height, width) } else { (width, height) };
    let mut rgb = Vec::with_capacity(frame.rgb.len());
    for row in 0..new_height {
        for column in 0..new_width {
            let (from_column, from_row) = match quarter_turns {
                1 => (row, height - 1 - column),
                2 => (width - 1 - column, height - 1 - row),
                _ => (width - 1 - row, column),
            };
            let at = (from_row * width + from_column) * 3;
            rgb.extend_from_slice(&frame.rgb[at..at + 3]);
        }
    }
    Frame { width: new_width as u32, height: new_height as u32, rgb, time: frame.time }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quarter_turns_move_the_top_left_pixel_clockwise() {
        let rgb = (0..6).flat_map(|pixel| [pixel; 3]).collect();
        let frame = Frame { width: 3, height: 2, rgb, time: 0.0 };
        let order =
            |turns| -> Vec<u8> { turned(frame.clone(), turns).rgb.iter().step_by(3).copied().collect() };
        assert_eq!(order(1), [3, 0, 4, 1, 5, 2]);
        assert_eq!(order(2), [5, 4, 3, 2, 1, 0]);
        assert_eq!(order(3), [2, 5, 1, 4, 0, 3]);
    }
}

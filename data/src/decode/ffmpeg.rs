//! Formats that the built-in decoders do not support, through the `ffmpeg` and `ffprobe` programs.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use super::{Alpha, Channel, Engine, Frame, FrameStream, MAX_PIXELS, PixelAspect, Probe};
use crate::error::{DataError, Result};

/// Asks ffprobe for the time of each frame, and ffmpeg for the first one, whose size is the displayed one.
///
/// `ffprobe` decodes the whole file for it: packet times alone count frames that are never shown.
pub(super) fn probe(path: &Path, codec: &str) -> Result<Probe> {
    let arguments = ["-v", "error", "-select_streams", "v:0", "-show_entries"];
    let wanted = "frame=best_effort_timestamp_time,pkt_duration_time,duration_time:\
                  stream=codec_name,width,height,sample_aspect_ratio,pix_fmt:stream_tags=alpha_mode";
    let mut command = program("ffprobe");
    command.args(arguments).arg(wanted).args(["-of", "json"]).arg(input(path));
    let output = command.stdin(Stdio::null()).output().map_err(|error| absent(path, codec, error))?;
    if !output.status.success() {
        return Err(DataError::unreadable(path, message(&output.stderr)));
    }
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).map_err(|error| DataError::unreadable(path, error))?;
    let (times, end) = frame_times(&report);
    let name =
        report.pointer("/streams/0/codec_name").and_then(|name| name.as_str()).unwrap_or(codec).to_string();
    if times.is_empty() {
        return Err(DataError::unreadable(path, "ffmpeg finds no frame in it"));
    }
    let first = frames(path, vec![0.0; times.len()], Channel::Colour)?.next();
    let first = first.ok_or_else(|| DataError::unreadable(path, "ffmpeg finds no frame in it"))??;
    let (width, height) = (first.width, first.height);
    let pixel_aspect = pixel_aspect(&report, (width, height));
    let alpha = alpha(&report);
    Ok(Probe { width, height, pixel_aspect, times, end, codec: name, engine: Engine::Ffmpeg, alpha })
}

/// Whether ffprobe reports a pixel format with an alpha channel, or one that ffmpeg's own decoder leaves out: that of VP8 and VP9 is
/// a second stream.
fn alpha(report: &serde_json::Value) -> Alpha {
    let text = |path: &str| report.pointer(path).and_then(serde_json::Value::as_str).unwrap_or_default();
    let format = text("/streams/0/pix_fmt");
    let with_alpha = ["yuva", "rgba", "argb", "bgra", "abgr", "gbrap", "ya8", "ya16", "pal8"];
    match with_alpha.iter().any(|start| format.starts_with(start)) {
        true => Alpha::Channel,
        false if text("/streams/0/tags/alpha_mode") == "1" => Alpha::Unread,
        false => Alpha::None,
    }
}

/// The pixel aspect of upright frames of the size `upright`, from ffprobe's of the stored ones.
fn pixel_aspect(report: &serde_json::Value, upright: (u32, u32)) -> PixelAspect {
    let stream = |key: &str| report.pointer("/streams/0").and_then(|stream| stream.get(key));
    let side = |key: &str| stream(key).and_then(serde_json::Value::as_u64).unwrap_or(0);
    let ratio = stream("sample_aspect_ratio").and_then(|ratio| ratio.as_str()?.split_once(':'));
    let stored =
        ratio.and_then(|(width, height)| PixelAspect::new(width.parse().ok()?, height.parse().ok()?));
    let stored = stored.unwrap_or(PixelAspect::SQUARE);
    let (width, height) = (side("width"), side("height"));
    let is_sideways = width != height && (width, height) == (u64::from(upright.1), u64::from(upright.0));
    if is_sideways { stored.turned() } else { stored }
}

/// A program of ffmpeg in a process group of its own: Ctrl-C in a terminal only reaches Tandem, which stops it.
fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command
}

/// Keeps a file name that begins with a dash, or looks like a protocol, from being read as anything else.
fn input(path: &Path) -> std::ffi::OsString {
    let mut input = std::ffi::OsString::from("file:");
    input.push(path);
    input
}

fn absent(path: &Path, codec: &str, error: std::io::Error) -> DataError {
    if error.kind() == std::io::ErrorKind::NotFound {
        DataError::NoDecoder { path: path.to_path_buf(), codec: codec.to_string() }
    } else {
        DataError::unreadable(path, format!("ffmpeg could not be started: {error}"))
    }
}

/// What ffmpeg complained about, short enough for a message.
fn message(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no reason given");
    format!("ffmpeg reports: {last}")
}

/// Times from the first frame on, and when the last one ends.
fn frame_times(report: &serde_json::Value) -> (Vec<f64>, f64) {
    let seconds =
        |frame: &serde_json::Value, key: &str| -> Option<f64> { frame.get(key)?.as_str()?.parse().ok() };
    let empty = Vec::new();
    let frames = report.get("frames").and_then(|frames| frames.as_array()).unwrap_or(&empty);
    let mut times: Vec<f64> = Vec::with_capacity(frames.len());
    let mut last_duration = None;
    for frame in frames {
        let previous = times.last().copied();
        let step = last_duration.unwrap_or(0.04);
        let time = seconds(frame, "best_effort_timestamp_time");
        times.push(time.unwrap_or_else(|| previous.map_or(0.0, |previous| previous + step)));
        last_duration = seconds(frame, "duration_time").or_else(|| seconds(frame, "pkt_duration_time"));
    }
    let Some(&first) = times.first() else { return (times, 0.0) };
    for time in &mut times {
        *time -= first;
    }
    // Where the last frame carries no duration, it lasts as long as the frames before it did on average.
    let last = times[times.len() - 1];
    let mean = if times.len() > 1 { last / (times.len() - 1) as f64 } else { 0.04 };
    (times, last + last_duration.unwrap_or(mean))
}

/// Streams a channel of every frame as ffmpeg shows it (turned upright), with the times of the probe.
pub(super) fn frames(path: &Path, times: Vec<f64>, channel: Channel) -> Result<FrameStream> {
    let mut command = program("ffmpeg");
    command.args(["-v", "error", "-nostdin", "-i"]).arg(input(path));
    command.args(["-map", "0:v:0"]);
    if channel == Channel::Alpha {
        command.args(["-vf", "alphaextract"]);
    }
    command.args([
        "-fps_mode",
        "passthrough",
        "-f",
        "image2pipe",
        "-pix_fmt",
        "rgb24",
        "-c:v",
        "ppm",
        "pipe:1",
    ]);
    // Complaints were read by the probe; here an unread pipe that fills up would stop the program for ever.
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| absent(path, "a video", error))?;
    let Some(output) = child.stdout.take() else {
        return Err(DataError::unreadable(path, "ffmpeg gave no output"));
    };
    let output = BufReader::with_capacity(1 << 20, output);
    Ok(Box::new(Stream { path: path.to_path_buf(), child, output, times: times.into_iter(), done: false }))
}

struct Stream {
    path: PathBuf,
    child: Child,
    output: BufReader<ChildStdout>,
    times: std::vec::IntoIter<f64>,
    done: bool,
}

impl Iterator for Stream {
    type Item = Result<Frame>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let time = self.times.next()?;
        match read_ppm(&mut self.output, time) {
            Ok(frame) => Some(Ok(frame)),
            Err(error) => {
                self.done = true;
                let reason =
                    format!("ffmpeg stopped {} frames before the end ({error})", self.times.len() + 1);
                Some(Err(DataError::unreadable(&self.path, reason)))
            }
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // Streams are often dropped before the film's end; ffmpeg must not linger. Failing means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads one binary PPM picture: "P6 width height 255" and the pixels.
fn read_ppm(input: &mut impl Read, time: f64) -> std::io::Result<Frame> {
    let unexpected = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_string());
    let mut word = || -> std::io::Result<String> {
        let mut word = String::new();
        loop {
            let mut byte = [0];
            input.read_exact(&mut byte)?;
            match byte[0] {
                byte if byte.is_ascii_whitespace() && word.is_empty() => {}
                byte if byte.is_ascii_whitespace() => return Ok(word),
                byte if word.len() < 16 => word.push(char::from(byte)),
                _ => return Err(unexpected("not a PPM header")),
            }
        }
    };
    if word()? != "P6" {
        return Err(unexpected("not a PPM picture"));
    }
    let mut number = || word()?.parse::<u32>().map_err(|_| unexpected("not a PPM header"));
    let (width, height, _) = (number()?, number()?, number()?);
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(unexpected("a picture larger than 8192x8192 pixels"));
    }
    let mut rgb = vec![0; width as usize * height as usize * 3];
    input.read_exact(&mut rgb)?;
    Ok(Frame { width, height, rgb, time })
}

//! TensorBoard event files: scalars and pictures, appended record by record.
//!
//! A file is a row of TFRecords (length, its checksum, bytes, their checksum), each an `Event` protocol buffer. Sources:
//! tensorflow/core/lib/io/record_writer.h for the framing, tensorflow/core/util/event.proto and
//! tensorflow/core/framework/summary.proto for the field numbers.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Why an event file could not be written.
#[derive(Debug, thiserror::Error)]
pub enum TensorboardError {
    /// The file could not be read or written.
    #[error("{path}: cannot write the TensorBoard events: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// There is another kind of file.
    #[error("{path}: this is not a TensorBoard event file; move it away, a new one will be started")]
    NotEvents {
        /// The file.
        path: PathBuf,
    },
}

type Result<T, E = TensorboardError> = std::result::Result<T, E>;

/// A picture to show: an encoded PNG, GIF or JPEG and its size.
#[derive(Debug, Clone, Copy)]
pub struct Picture<'a> {
    /// The file's bytes.
    pub encoded: &'a [u8],
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
}

/// A file that can be synced to disk.
pub trait Durable: Write {
    /// Waits until everything written would survive a power loss.
    ///
    /// # Errors
    /// The system's error.
    fn make_durable(&mut self) -> std::io::Result<()>;
}

impl Durable for File {
    fn make_durable(&mut self) -> std::io::Result<()> {
        self.sync_data()
    }
}

/// Appends events to one file. TensorBoard finds it if its name contains `tfevents`.
pub struct EventWriter<F: Durable = File> {
    path: PathBuf,
    out: BufWriter<F>,
    length: u64,
}

impl EventWriter {
    /// Opens the file at `path` and keeps its whole records within the first `keep` bytes: what
    /// [`EventWriter::sync`] returned at the checkpoint that a run is resumed from, or 0 for a new run. Everything after them is
    /// truncated. A file that is missing, or becomes empty, is started at `wall_time` (seconds since 1970).
    ///
    /// # Errors
    /// If the file cannot be read or written, or is not an event file.
    pub fn open(path: &Path, keep: u64, wall_time: f64) -> Result<Self> {
        let io = |source| TensorboardError::Io { path: path.to_owned(), source };
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        if size > 0 && whole_records(&file, size).map_err(io)? == 0 {
            return Err(TensorboardError::NotEvents { path: path.to_owned() });
        }
        let length = whole_records(&file, keep.min(size)).map_err(io)?;
        file.set_len(length).map_err(io)?;
        file.seek(SeekFrom::Start(length)).map_err(io)?;
        let mut writer = Self { path: path.to_owned(), out: BufWriter::new(file), length };
        if length == 0 {
            let mut version = event(wall_time, 0);
            bytes_field(&mut version, 3, b"brain.Event:2");
            writer.append(&version)?;
        }
        Ok(writer)
    }
}

impl<F: Durable> EventWriter<F> {
    /// Adds values at optimiser step `step`: (tag, value) pairs such as ("loss/train", 0.12).
    pub fn scalars(&mut self, step: u64, wall_time: f64, values: &[(&str, f32)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            bytes_field(&mut entry, 1, tag.as_bytes());
            key(&mut entry, 2, Wire::Fixed32);
            entry.extend(value.to_le_bytes());
            bytes_field(&mut summary, 1, &entry);
        }
        self.summary(step, wall_time, &summary)
    }

    /// Adds a picture at optimiser step `step`.
    pub fn picture(&mut self, step: u64, wall_time: f64, tag: &str, picture: Picture) -> Result<()> {
        let mut image = Vec::new();
        for (field, number) in [(1, picture.height), (2, picture.width), (3, RGB)] {
            key(&mut image, field, Wire::Varint);
            varint(&mut image, number as u64);
        }
        bytes_field(&mut image, 4, picture.encoded);
        let (mut entry, mut summary) = (Vec::new(), Vec::new());
        bytes_field(&mut entry, 1, tag.as_bytes());
        bytes_field(&mut entry, 4, &image);
        bytes_field(&mut summary, 1, &entry);
        self.summary(step, wall_time, &summary)
    }

    /// Makes sure that everything written is on the disk. Returns the length of the file in bytes, for
    /// [`EventWriter::open`].
    pub fn sync(&mut self) -> Result<u64> {
        let io = |source| TensorboardError::Io { path: self.path.clone(), source };
        self.out.flush().map_err(io)?;
        self.out.get_mut().make_durable().map_err(io)?;
        Ok(self.length)
    }

    fn summary(&mut self, step: u64, wall_time: f64, summary: &[u8]) -> Result<()> {
        let mut event = event(wall_time, step);
        bytes_field(&mut event, 5, summary);
        self.append(&event)
    }

    fn append(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + FRAME);
        record.extend(length);
        record.extend(masked_crc32c(&length).to_le_bytes());
        record.extend(data);
        record.extend(masked_crc32c(data).to_le_bytes());
        self.out
            .write_all(&record)
            .map_err(|source| TensorboardError::Io { path: self.path.clone(), source })?;
        self.length += record.len() as u64;
        Ok(())
    }
}

/// Bytes of a record around its data.
const FRAME: usize = 16;
/// The colour space number of three channels.
const RGB: usize = 3;

/// The end of the last whole record within the first `limit` bytes, which the file must have.
fn whole_records(file: &File, limit: u64) -> std::io::Result<u64> {
    let mut reader = BufReader::new(file);
    let mut end = 0;
    while end + FRAME as u64 <= limit {
        let mut head = [0; 12];
        reader.seek(SeekFrom::Start(end))?;
        reader.read_exact(&mut head)?;
        let [length @ .., c0, c1, c2, c3] = head;
        let next = end.checked_add(u64::from_le_bytes(length)).and_then(|n| n.checked_add(FRAME as u64));
        match next {
            Some(next) if next <= limit && masked_crc32c(&length) == u32::from_le_bytes([c0, c1, c2, c3]) => {
                end = next;
            }
            _ => break,
        }
    }
    Ok(end)
}

/// The wire type of a protocol buffer field.
#[derive(Clone, Copy)]
enum Wire {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

/// An `Event` with its wall time and step, open for more fields.
fn event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut out = Vec::new();
    key(&mut out, 1, Wire::Fixed64);
    out.extend(wall_time.to_le_bytes());
    key(&mut out, 2, Wire::Varint);
    varint(&mut out, step);
    out
}

fn key(out: &mut Vec<u8>, field: u64, wire: Wire) {
    varint(out, field << 3 | wire as u64);
}

fn bytes_field(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    key(out, field, Wire::Bytes);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The checksum of TFRecords: CRC-32C, rotated and offset so that checksums of checksums stay useful.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| CRC_TABLE[(crc as u8 ^ byte) as usize] ^ (crc >> 8))
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk: what was written, and how much of it would outlive a power loss.
    #[derive(Default)]
    struct Disk {
        written: Vec<u8>,
        safe: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.written.write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Durable for Disk {
        fn make_durable(&mut self) -> std::io::Result<()> {
            self.safe = self.written.len();
            Ok(())
        }
    }

    /// A checkpoint says how long the file was: after a power loss it must not be shorter.
    #[test]
    fn what_sync_counts_outlives_a_power_loss() {
        let (path, out) = (PathBuf::from("events"), BufWriter::new(Disk::default()));
        let mut writer = EventWriter { path, out, length: 0 };
        for step in 1..=3 {
            writer.scalars(step, 0.0, &[("loss/train", 0.5)]).unwrap();
            let length = writer.sync().unwrap();
            assert_eq!((writer.out.get_ref().safe as u64, length), (length, writer.length));
        }
        writer.scalars(4, 0.0, &[("loss/train", 0.5)]).unwrap();
        assert!((writer.out.get_ref().safe as u64) < writer.length);
    }

    /// The check value of the CRC catalogue, and a vector of RFC 3720, appendix B.4.
    #[test]
    fn crc32c_equals_published_values() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }
}

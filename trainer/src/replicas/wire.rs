//! Frames on a connection between two ranks: a kind, a number and a length, then the bytes.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::{ReplicaError, Result};

/// How long a read or write waits before it asks whether to go on.
const PATIENCE: Duration = Duration::from_millis(100);
/// The longest message that is no tensor: a plan has a few kilobytes, a list of all ranks' losses less.
const LONGEST_MESSAGE: u64 = 64 << 20;
/// Kind, number and length.
const HEADER: usize = 1 + 8 + 8;

/// What a frame contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Who comes; answered by one of the next four.
    Hello = 1,
    /// This is rank 0 of the job; the verdict follows when all are there.
    Here = 2,
    /// This is rank 0 of another job.
    Elsewhere = 3,
    /// All match.
    Welcome = 4,
    /// The ranks do not match, with a sentence.
    Refused = 5,
    /// A second connection of a rank that was welcomed.
    Data = 6,
    /// The sender is alive.
    Beat = 7,
    /// The sender has failed, with the reason.
    Abort = 8,
    /// The sender leaves because all is done.
    Bye = 9,
    /// A message to all ranks.
    Message = 10,
    /// Numbers to be summed.
    Numbers = 11,
}

impl Kind {
    fn read(byte: u8) -> Option<Self> {
        use Kind::*;
        [Hello, Here, Elsewhere, Welcome, Refused, Data, Beat, Abort, Bye, Message, Numbers]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// Asked while a connection is silent: an error ends the read or write.
pub(super) type GoOn<'a> = &'a dyn Fn() -> Result<()>;

/// A connection to another rank.
#[derive(Debug)]
pub(super) struct Wire {
    stream: TcpStream,
    /// Who is at the other end, for messages.
    pub peer: String,
}

impl Wire {
    /// Frames on `stream`.
    ///
    /// # Errors
    /// A connection that is closed already.
    pub fn new(stream: TcpStream, peer: String) -> Result<Self> {
        let set_up = || {
            // An accepted connection inherits it from the listener on some systems.
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))
        };
        set_up().map_err(|error| ReplicaError::io(format!("connect to {peer}"), &error))?;
        Ok(Self { stream, peer })
    }

    /// The same connection, to be used by another thread for the other direction.
    ///
    /// # Errors
    /// When the system has no handles left.
    pub fn second(&self) -> Result<Self> {
        let stream = self.stream.try_clone();
        let stream = stream.map_err(|error| ReplicaError::io(format!("connect to {}", self.peer), &error))?;
        Ok(Self { stream, peer: self.peer.clone() })
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// A connection that breaks, and what `go_on` says.
    pub fn send(&mut self, kind: Kind, number: u64, bytes: &[u8], go_on: GoOn) -> Result<()> {
        let mut header = [0; HEADER];
        header[0] = kind as u8;
        header[1..9].copy_from_slice(&number.to_le_bytes());
        header[9..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.write(&header, go_on)?;
        self.write(bytes, go_on)
    }

    /// Sends `value` as a message of `kind`.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_json(&mut self, kind: Kind, value: &impl Serialize, go_on: GoOn) -> Result<()> {
        let bytes = serde_json::to_vec(value).map_err(|error| ReplicaError::OutOfStep {
            why: format!("a message cannot be written: {error}"),
        })?;
        self.send(kind, 0, &bytes, go_on)
    }

    /// The next frame, of a message's length at most.
    ///
    /// # Errors
    /// A connection that breaks, what `go_on` says, and what is no frame.
    pub fn receive(&mut self, go_on: GoOn) -> Result<(Kind, u64, Vec<u8>)> {
        let (kind, number, length) = self.header(go_on)?;
        if length > LONGEST_MESSAGE {
            let why = format!("{} sends a message of {length} bytes", self.peer);
            return Err(ReplicaError::OutOfStep { why });
        }
        let mut bytes = vec![0; length as usize];
        self.read(&mut bytes, go_on)?;
        Ok((kind, number, bytes))
    }

    /// The next frame, which has to be of `kind` and `number` and as long as `into`.
    ///
    /// # Errors
    /// As [`Self::receive`], and another frame.
    pub fn receive_into(&mut self, kind: Kind, number: u64, into: &mut [u8], go_on: GoOn) -> Result<()> {
        let got = self.header(go_on)?;
        let expected = (kind, number, into.len() as u64);
        if got != expected {
            let why = format!("{} sends {got:?} where {expected:?} is expected", self.peer);
            return Err(ReplicaError::OutOfStep { why });
        }
        self.read(into, go_on)
    }

    fn header(&mut self, go_on: GoOn) -> Result<(Kind, u64, u64)> {
        let mut header = [0; HEADER];
        self.read(&mut header, go_on)?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let why = || format!("{} does not speak this program's language", self.peer);
        let kind = Kind::read(header[0]).ok_or_else(|| ReplicaError::OutOfStep { why: why() })?;
        Ok((kind, number(1), number(9)))
    }

    fn read(&mut self, mut into: &mut [u8], go_on: GoOn) -> Result<()> {
        while !into.is_empty() {
            match self.stream.read(into) {
                Ok(0) => return Err(self.closed()),
                Ok(count) => into = &mut into[count..],
                Err(error) => self.waited(&error, go_on)?,
            }
        }
        Ok(())
    }

    fn write(&mut self, mut bytes: &[u8], go_on: GoOn) -> Result<()> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(0) => return Err(self.closed()),
                Ok(count) => bytes = &bytes[count..],
                Err(error) => self.waited(&error, go_on)?,
            }
        }
        Ok(())
    }

    /// Whether to try again after `error`.
    fn waited(&self, error: &std::io::Error, go_on: GoOn) -> Result<()> {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => go_on(),
            ErrorKind::Interrupted => Ok(()),
            _ => Err(ReplicaError::io(format!("talk to {}", self.peer), error)),
        }
    }

    fn closed(&self) -> ReplicaError {
        let why = "the connection is closed".to_owned();
        ReplicaError::Io { action: format!("talk to {}", self.peer), why }
    }
}

/// The value of a message.
///
/// # Errors
/// Bytes that are something else.
pub(super) fn json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| ReplicaError::OutOfStep { why: format!("a message cannot be read: {error}") })
}

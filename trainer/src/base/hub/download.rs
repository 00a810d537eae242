//! One file: fetched in as many connections as it takes, and believed only when its hash is right.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use ureq::Body;
use ureq::http::{Response, StatusCode};

use super::api::{Api, RemoteFile};
use super::hash::Running;
use super::store::Store;
use super::{HubError, HubId, Result, pause};
use crate::watch::ui::{Bar, Ui};

/// Bytes that are read at a time.
const PIECE: usize = 1 << 20;

/// Brings `file` of `commit` into the cache.
pub(super) fn download(
    api: &Api,
    id: &HubId,
    commit: &str,
    file: &RemoteFile,
    store: &Store,
    bar: &Bar,
    ui: &Ui,
) -> Result<()> {
    let blob = store.blob(file);
    if !fs::metadata(&blob).is_ok_and(|found| found.len() == file.size) {
        let parent = blob.parent().unwrap_or(&blob);
        fs::create_dir_all(parent).map_err(HubError::io("make", parent))?;
        let path = parent.join(format!("{}.incomplete", file.hash));
        let mut partial = Partial::open(&path, file, bar)?;
        partial.complete(api, &api.file_url(id, commit, &file.name), ui)?;
        partial.finish(&blob)?;
    }
    bar.finish();
    store.show(commit, file)
}

/// A file that is being fetched.
struct Partial<'a> {
    remote: &'a RemoteFile,
    path: &'a Path,
    file: File,
    /// Bytes that are already on disk.
    there: u64,
    /// The hash of those bytes.
    hash: Running,
    bar: &'a Bar,
}

impl<'a> Partial<'a> {
    /// Takes up what an earlier attempt left.
    fn open(path: &'a Path, remote: &'a RemoteFile, bar: &'a Bar) -> Result<Self> {
        let io = |source| HubError::Io { action: "write", path: path.to_owned(), source };
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(HubError::Taken { path: path.to_owned() }),
            // A file system without locks: the hash shows if two processes wrote at once.
            Err(fs::TryLockError::Error(_)) => {}
        }
        let hash = Running::new(remote.kind, remote.size);
        let mut partial = Self { remote, path, file, there: 0, hash, bar };
        let length = partial.file.metadata().map_err(io)?.len();
        if length > remote.size {
            partial.start_over()?;
        }
        let mut piece = vec![0; PIECE];
        loop {
            match partial.file.read(&mut piece).map_err(io)? {
                0 => break,
                count => {
                    partial.hash.update(&piece[..count]);
                    partial.there += count as u64;
                }
            }
        }
        bar.skip(partial.there as usize);
        Ok(partial)
    }

    fn io(&self) -> impl FnOnce(std::io::Error) -> HubError + use<> {
        HubError::io("write", self.path)
    }

    fn start_over(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(self.io())?;
        self.file.seek(SeekFrom::Start(0)).map_err(self.io())?;
        (self.there, self.hash) = (0, Running::new(self.remote.kind, self.remote.size));
        self.bar.skip(0);
        Ok(())
    }

    /// Downloads until the file is complete; gives up after some connections in a row without progress.
    fn complete(&mut self, api: &Api, url: &str, ui: &Ui) -> Result<()> {
        let mut failures = 0;
        while self.there < self.remote.size {
            let before = self.there;
            let response = api.get(url, (before > 0).then_some(before), ui)?;
            let why = match self.place(url, &response)? {
                Place::Next => self.append(response)?,
                Place::Nowhere => "the server cannot resume an interrupted download".to_owned(),
            };
            failures = if self.there > before { 0 } else { failures + 1 };
            if failures >= api.settings().attempts {
                return Err(HubError::Network { url: url.to_owned(), why });
            }
            if self.there < self.remote.size {
                std::thread::sleep(pause(api.settings().pause, failures));
            }
        }
        Ok(())
    }

    /// Where the body of an answer belongs; where the server begins at the start, so does the file.
    fn place(&mut self, url: &str, response: &Response<Body>) -> Result<Place> {
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        if response.status() == StatusCode::PARTIAL_CONTENT {
            let range = header("Content-Range").and_then(|text| text.strip_prefix("bytes "));
            let (span, total) = range.and_then(|text| text.split_once('/')).unwrap_or(("", ""));
            if total.parse().is_ok_and(|total: u64| total != self.remote.size) {
                return Err(self.other_size(url, total));
            }
            let begins = span.split_once('-').and_then(|(from, _)| from.trim().parse().ok());
            return Ok(if begins == Some(self.there) { Place::Next } else { self.restart()? });
        }
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            return self.restart();
        }
        if self.there > 0 {
            self.start_over()?;
        }
        Ok(Place::Next)
    }

    /// Discards the bytes on disk: the server cannot resume after them.
    fn restart(&mut self) -> Result<Place> {
        self.start_over()?;
        Ok(Place::Nowhere)
    }

    fn other_size(&self, url: &str, total: &str) -> HubError {
        let why = format!(
            "the server reports {total} bytes, the hub's list {}; fetch again later",
            self.remote.size
        );
        HubError::Answer { url: url.to_owned(), why }
    }

    /// Appends a body to the file, as far as it is received. Returns why it ended.
    fn append(&mut self, response: Response<Body>) -> Result<String> {
        let mut body = response.into_body().into_reader();
        let mut piece = vec![0; PIECE];
        loop {
            let room = (self.remote.size - self.there).min(PIECE as u64) as usize;
            let count = match body.read(&mut piece[..room.max(1)]) {
                Ok(0) => return Ok("the connection ended before the file did".to_owned()),
                Ok(count) if room > 0 => count,
                Ok(_) => return Ok("the server sent more than it announced".to_owned()),
                Err(error) => return Ok(error.to_string()),
            };
            self.file.write_all(&piece[..count]).map_err(self.io())?;
            self.hash.update(&piece[..count]);
            self.there += count as u64;
            self.bar.inc(count);
            if self.there == self.remote.size {
                return Ok(String::new());
            }
        }
    }

    /// Gives the file its name, if it is the announced one.
    fn finish(self, blob: &Path) -> Result<()> {
        self.file.sync_all().map_err(self.io())?;
        let found = self.hash.clone().digits();
        let RemoteFile { name, hash: announced, kind, .. } = self.remote;
        if found != announced.to_lowercase() {
            fs::remove_file(self.path).map_err(self.io())?;
            let (file, announced) = (name.clone(), announced.clone());
            return Err(HubError::Hash { file, kind: kind.name(), found, announced });
        }
        fs::rename(self.path, blob).map_err(HubError::io("rename", self.path))
    }
}

/// Where the body of an answer belongs.
enum Place {
    /// After the bytes on disk.
    Next,
    /// Nowhere: ask again.
    Nowhere,
}

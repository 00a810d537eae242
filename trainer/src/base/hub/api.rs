//! Requests to the hub, one at a time, with retries.

use std::time::Duration;

use serde::Deserialize;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use super::hash::HashKind;
use super::redirect::{is_same_origin, resolved};
use super::settings::HubSettings;
use super::{HubError, HubId, RepoKind, Result, pause};
use crate::watch::ui::Ui;

/// The longest that a connection is used: a stalled one ends by this, and the next one resumes the download.
const LONGEST: Duration = Duration::from_secs(600);
/// The longest wait that is honoured when an answer asks to wait.
const LONGEST_WAIT: Duration = Duration::from_secs(600);
/// Most redirects in a row.
const MOST_REDIRECTS: usize = 10;
/// The largest listing of a model.
const MOST_JSON: u64 = 32 << 20;

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    /// Path in the repository.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// In hexadecimal digits: the name of its bytes in the cache.
    pub hash: String,
    /// The kind of `hash`.
    pub kind: HashKind,
}

/// The files of a revision.
pub(super) struct Listing {
    pub commit: String,
    pub files: Vec<RemoteFile>,
}

/// The hub's description of a revision; other keys are ignored.
#[derive(Deserialize)]
struct Description {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// The hub's end of the line.
pub(super) struct Api<'a> {
    agent: Agent,
    settings: &'a HubSettings,
}

impl<'a> Api<'a> {
    pub fn new(settings: &'a HubSettings) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("tandem/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_recv_body(Some(LONGEST))
            // Followed here: what is shown to the hub must not go elsewhere, not even to another port of its host.
            .max_redirects(0)
            .build();
        Self { agent: config.into(), settings }
    }

    pub fn settings(&self) -> &HubSettings {
        self.settings
    }

    /// Address of a file.
    pub fn file_url(&self, id: &HubId, commit: &str, name: &str) -> String {
        let kind = match id.kind {
            RepoKind::Model => "",
            RepoKind::Dataset => "datasets/",
        };
        format!("{}/{kind}{}/resolve/{commit}/{}", self.settings.endpoint, id.repository, escaped(name))
    }

    /// The files of a revision, with their sizes and hashes.
    pub fn listing(&self, id: &HubId, ui: &Ui) -> Result<Listing> {
        let revision = id.revision.replace('/', "%2F");
        let kind = match id.kind {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        };
        let (endpoint, name) = (&self.settings.endpoint, &id.repository);
        let url = format!("{endpoint}/api/{kind}/{name}/revision/{revision}?blobs=true");
        let answer = |why: String| HubError::Answer { url: url.clone(), why };
        let mut failures = 0;
        loop {
            let why = match self.get(&url, None, ui)?.body_mut().with_config().limit(MOST_JSON).read_to_vec()
            {
                Ok(text) => {
                    let described: Description = serde_json::from_slice(&text).map_err(|error| {
                        answer(format!(
                            "the answer is not a description of a model ({error}); is HF_ENDPOINT a hub?"
                        ))
                    })?;
                    return listing(described).map_err(answer);
                }
                Err(error) => error.to_string(),
            };
            failures += 1;
            if failures >= self.settings.attempts {
                return Err(HubError::Network { url, why });
            }
            std::thread::sleep(pause(self.settings.pause, failures));
        }
    }

    /// Requests `url`, from the byte `from` on, until there is a valid answer.
    pub fn get(&self, url: &str, from: Option<u64>, ui: &Ui) -> Result<Response<Body>> {
        let mut failures = 0;
        loop {
            failures += 1;
            let is_last = failures >= self.settings.attempts;
            let wait = match self.follow(url, from) {
                Ok(response)
                    if response.status().is_success()
                        || response.status() == StatusCode::RANGE_NOT_SATISFIABLE =>
                {
                    return Ok(response);
                }
                Ok(response) => self.refused(url, &response, failures, is_last)?,
                Err(why) if is_last => return Err(HubError::Network { url: url.to_owned(), why }),
                Err(_) => pause(self.settings.pause, failures),
            };
            if wait > Duration::from_secs(10) {
                ui.note(&format!("{url}: the hub asks to wait {} seconds", wait.as_secs()));
            }
            std::thread::sleep(wait);
        }
    }

    /// Requests `url` and follows redirects. The error says why there was no answer.
    fn follow(&self, url: &str, from: Option<u64>) -> Result<Response<Body>, String> {
        let mut url = url.to_owned();
        for _ in 0..=MOST_REDIRECTS {
            let mut request = self.agent.get(&url).header("Accept-Encoding", "identity");
            if let Some(secret) = self.settings.authorization()
                && is_same_origin(&url, &self.settings.endpoint)
            {
                request = request.header("Authorization", secret);
            }
            if let Some(from) = from {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|error| error.to_string())?;
            let location = response.headers().get("Location").and_then(|value| value.to_str().ok());
            url = match location {
                Some(location) if [301, 302, 303, 307, 308].contains(&response.status().as_u16()) => {
                    resolved(&url, location).ok_or_else(|| "it redirects to an invalid address".to_owned())?
                }
                _ => return Ok(response),
            };
        }
        Err(format!("it sends us on more than {MOST_REDIRECTS} times"))
    }

    /// How long to wait before a retry, if the answer is an error that may pass.
    fn refused(
        &self,
        url: &str,
        response: &Response<Body>,
        attempts: u32,
        is_last: bool,
    ) -> Result<Duration> {
        let (url, status) = (url.to_owned(), response.status().as_u16());
        match status {
            401 | 403 => {
                let who = if self.settings.token.is_some() { "the owner of this token" } else { "strangers" };
                Err(HubError::Refused { url, status, who })
            }
            404 | 410 => Err(HubError::Missing { url }),
            408 | 425 | 429 | 500.. if is_last => Err(HubError::Busy { url, status, attempts }),
            408 | 425 | 429 | 500.. => {
                let header = response.headers().get("Retry-After").and_then(|value| value.to_str().ok());
                let asked = header.and_then(|seconds| seconds.trim().parse().ok()).map(Duration::from_secs);
                Ok(asked.unwrap_or_else(|| pause(self.settings.pause, attempts)).min(LONGEST_WAIT))
            }
            _ => Err(HubError::Answer { url, why: format!("the answer is {status}; is HF_ENDPOINT a hub?") }),
        }
    }
}

fn listing(described: Description) -> Result<Listing, String> {
    let is_hash = |hash: &str| !hash.is_empty() && hash.bytes().all(|b| b.is_ascii_hexdigit());
    let is_of = |kind: HashKind, hash: &str| is_hash(hash) && hash.len() == kind.digits();
    let is_inside = |name: &str| !name.split(['/', '\\']).any(|part| ["", ".", ".."].contains(&part));
    if !is_hash(&described.sha) {
        return Err(format!("\"{}\" is not a commit", described.sha));
    }
    let file = |sibling: Sibling| {
        let name = sibling.rfilename;
        let (size, hash, kind) = match (sibling.lfs, sibling.size, sibling.blob_id) {
            (Some(lfs), ..) => (lfs.size, lfs.sha256, HashKind::Sha256),
            (None, Some(size), Some(hash)) => (size, hash, HashKind::GitBlob),
            _ => return Err(format!("it gives neither size nor hash of {name}; is HF_ENDPOINT a hub?")),
        };
        match is_of(kind, &hash) && is_inside(&name) {
            true => Ok(RemoteFile { name, size, hash, kind }),
            false => Err(format!("it has a file \"{name}\" with the invalid hash \"{hash}\"")),
        }
    };
    Ok(Listing {
        files: described.siblings.into_iter().map(file).collect::<Result<_, _>>()?,
        commit: described.sha,
    })
}

/// A path, escaped for an address.
fn escaped(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte);
    name.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

//! How the hub is reached: the one place that reads the environment for it.

use std::path::PathBuf;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use percent_encoding::percent_decode_str;

use super::{HubError, Result};

/// How the hub is reached, and the folder of its cache.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// Address of the hub or of a mirror, without a slash at the end and without user and password.
    pub endpoint: String,
    /// `user:password` of the endpoint's address. Sent to the endpoint only, if there is no token.
    pub login: Option<String>,
    /// The cache: the folder of `models--owner--name` folders.
    pub cache: PathBuf,
    /// Shown to the endpoint alone: its scheme, host and port.
    pub token: Option<String>,
    /// No network requests are made.
    pub is_offline: bool,
    /// The pause before the first new attempt; each next one is twice as long.
    pub pause: Duration,
    /// Attempts in a row without progress before a download is given up.
    pub attempts: u32,
}

impl HubSettings {
    /// As the environment says, by the variables that Python's `huggingface_hub` reads, which is how its cache and its
    /// login are found: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` (or the file of `huggingface-cli login`),
    /// `HF_HUB_OFFLINE`, `XDG_CACHE_HOME`. Everything else in Tandem is said by recipes and arguments.
    pub fn from_environment() -> Self {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// [`HubSettings::from_environment`] with the variables that `variable` gives.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let set = |name: &str| {
            variable(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
        };
        let user =
            set("HOME").or_else(|| set("USERPROFILE")).map_or_else(|| PathBuf::from("."), PathBuf::from);
        let caches = set("XDG_CACHE_HOME").map_or_else(|| user.join(".cache"), PathBuf::from);
        let home = set("HF_HOME").map_or_else(|| caches.join("huggingface"), PathBuf::from);
        let login = set("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let of_login = || std::fs::read_to_string(&login).ok().map(|text| text.trim().to_owned());
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let is_offline = set("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "true", "yes", "on"].contains(&value.to_lowercase().as_str()));
        let (endpoint, login) = without_login(endpoint.trim_end_matches('/'));
        Self {
            endpoint,
            login,
            cache: set("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: set("HF_TOKEN").or_else(of_login).filter(|token| !token.is_empty()),
            is_offline,
            pause: Duration::from_secs(1),
            attempts: 6,
        }
    }

    /// The folder beside the cache for what is made of its models and can be made again.
    pub fn beside(&self) -> PathBuf {
        self.cache.with_file_name("tandem")
    }

    /// Checks what is to be sent.
    ///
    /// # Errors
    /// [`HubError::Token`].
    pub(super) fn check(&self) -> Result<()> {
        match &self.token {
            Some(token) if !token.bytes().all(|byte| byte.is_ascii_graphic()) => Err(HubError::Token),
            _ => Ok(()),
        }
    }

    /// The authorization header.
    pub(super) fn authorization(&self) -> Option<String> {
        match (&self.token, &self.login) {
            (Some(token), _) => Some(format!("Bearer {token}")),
            (None, Some(login)) => Some(format!("Basic {}", BASE64_STANDARD.encode(login))),
            (None, None) => None,
        }
    }
}

/// An address without the user and password in it, and these.
fn without_login(endpoint: &str) -> (String, Option<String>) {
    let parts = endpoint.split_once("://").and_then(|(scheme, rest)| {
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (login, host) = authority.rsplit_once('@')?;
        let login = percent_decode_str(login).decode_utf8_lossy().into_owned();
        Some((format!("{scheme}://{host}{path}"), login))
    });
    match parts {
        Some((endpoint, login)) => (endpoint, Some(login)),
        None => (endpoint.to_owned(), None),
    }
}

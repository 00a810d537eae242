//! How the hub is reached: the one place that reads the environment for it.

use std::path::PathBuf;
use std::time::Duration;

/// How the hub is reached, and where its cache lies.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// Address of the hub or of a mirror, without a slash at the end.
    pub endpoint: String,
    /// The cache: the folder of `models--owner--name` folders.
    pub cache: PathBuf,
    /// Shown to the endpoint, and to nobody that it sends us on to.
    pub token: Option<String>,
    /// Nothing is asked of the network.
    pub is_offline: bool,
    /// The pause before the first new attempt; each next one is twice as long.
    pub pause: Duration,
    /// Attempts in a row that bring nothing before a download is given up.
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
        let told = |name: &str| {
            variable(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
        };
        let user =
            told("HOME").or_else(|| told("USERPROFILE")).map_or_else(|| PathBuf::from("."), PathBuf::from);
        let caches = told("XDG_CACHE_HOME").map_or_else(|| user.join(".cache"), PathBuf::from);
        let home = told("HF_HOME").map_or_else(|| caches.join("huggingface"), PathBuf::from);
        let login = told("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let of_login = || std::fs::read_to_string(&login).ok().map(|text| text.trim().to_owned());
        let endpoint = told("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let is_offline = told("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "true", "yes", "on"].contains(&value.to_lowercase().as_str()));
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: told("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: told("HF_TOKEN").or_else(of_login).filter(|token| !token.is_empty()),
            is_offline,
            pause: Duration::from_secs(1),
            attempts: 6,
        }
    }
}

//! Why a model could not be had from the hub.

use std::path::PathBuf;

/// Why a model could not be had from the hub.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// No id of a model.
    #[error(
        "\"{text}\" is not a model of the hub: write owner/name, such as Wan-AI/Wan2.1-T2V-1.3B, or owner/name@revision"
    )]
    Id {
        /// What was given.
        text: String,
    },
    /// No id of a dataset.
    #[error(
        "\"{text}\" is not a dataset of the hub: write hf://owner/name, hf://owner/name@revision or hf://owner/name/folder"
    )]
    DatasetId {
        /// What was given.
        text: String,
    },
    /// A dataset that was never fetched, where nothing is fetched.
    #[error(
        "{dataset} is not on this machine yet: `tandem fetch {dataset}` gets it, and so do `tandem cache` and `tandem train`"
    )]
    DatasetNotFetched {
        /// The dataset.
        dataset: String,
    },
    /// A dataset of another kind.
    #[error(
        "{dataset} has neither videos, pictures nor tar files there: datasets in Parquet files are not read; look at the folder and \
         its spelling"
    )]
    NoClips {
        /// The dataset.
        dataset: String,
    },
    /// The network must not be used, and the cache lacks the model.
    #[error(
        "{id} is not in the cache, and HF_HUB_OFFLINE says not to ask the hub; unset it, or name a folder on this machine"
    )]
    Offline {
        /// The model.
        id: String,
    },
    /// A model of the hub where only folders on this machine are looked at.
    #[error(
        "{id} is not on this machine yet: `tandem fetch {id}` gets it (or correct the path, if it is meant to be one)"
    )]
    NotFetched {
        /// The model.
        id: String,
    },
    /// A token that cannot be sent.
    #[error(
        "the token of the hub (HF_TOKEN, or the file that `huggingface-cli login` wrote) holds a line break or another \
         character that no token has: set it again"
    )]
    Token,
    /// The hub requires a login.
    #[error(
        "{url}: the hub does not give this to {who} (status {status}): log in with `huggingface-cli login` or set HF_TOKEN, and \
         accept the model's terms on its page where it has any; a model that does not exist is refused in the same way"
    )]
    Refused {
        /// What was asked for.
        url: String,
        /// Its answer.
        status: u16,
        /// With or without a token.
        who: &'static str,
    },
    /// The hub has no such model, revision or file.
    #[error(
        "{url}: the hub has no such thing (status 404): look at the spelling of owner, name and revision"
    )]
    Missing {
        /// What was asked for.
        url: String,
    },
    /// The hub gave up on us, or we on it.
    #[error("{url}: the hub answered {status} {attempts} times; try again later, what was fetched is kept")]
    Busy {
        /// What was asked for.
        url: String,
        /// Its last answer.
        status: u16,
        /// How often it was asked.
        attempts: u32,
    },
    /// An invalid answer.
    #[error("{url}: {why}")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        why: String,
    },
    /// No connection, or one that breaks again and again.
    #[error(
        "{url}: no connection ({why}); look at the network and at HF_ENDPOINT and try again, what was fetched is kept"
    )]
    Network {
        /// What was asked for.
        url: String,
        /// The last attempt's end.
        why: String,
    },
    /// Bytes that are not the announced ones.
    #[error(
        "{file}: the download is not what the hub announced ({kind} {found} instead of {announced}), so it was discarded; fetch \
         again, and if it comes again, the mirror at HF_ENDPOINT or something in between changes files"
    )]
    Hash {
        /// The file of the model.
        file: String,
        /// Which hash.
        kind: &'static str,
        /// Of the received bytes.
        found: String,
        /// The hub's.
        announced: String,
    },
    /// A part that the model does not have.
    #[error(
        "{id} has no {what}: it is not a Wan model in the official or the diffusers layout, or leave it out of --only"
    )]
    Lacks {
        /// The model.
        id: String,
        /// The part.
        what: String,
    },
    /// Another program is at it.
    #[error("{}: another program is fetching this file; wait for it, or stop it", path.display())]
    Taken {
        /// The file in the cache.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being attempted, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's own reason.
        source: std::io::Error,
    },
}

impl HubError {
    /// Whether the hub could not be reached or did not answer, so that what is in the cache is as good as can be had.
    pub(super) fn is_of_the_network(&self) -> bool {
        matches!(self, Self::Network { .. } | Self::Busy { .. })
    }

    /// Turns an I/O error into one that names the file and what was being done to it.
    pub(super) fn io(
        action: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

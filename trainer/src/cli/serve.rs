//! `tandem serve`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::error::Error;
use crate::serve::{Access, Folders, Settings, serve};
use crate::watch::ui::Ui;

/// Start, watch and try runs in a browser, and make clips over an API in the manner of OpenAI's /v1/videos.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Serve {
    /// Folder of runs.
    #[arg(long, value_name = "DIR", default_value = "runs")]
    runs: PathBuf,
    /// Folder of recipes; new ones are written there, and their paths start there.
    #[arg(long, value_name = "DIR", default_value = "recipes")]
    recipes: PathBuf,
    /// Folder of clips, or of folders of clips, to train on and to edit captions in. May be given more than once.
    #[arg(long, value_name = "DIR")]
    data: Vec<PathBuf>,
    /// Folder of a base model, of several, or of adapters. May be given more than once. Models of the Hugging Face hub are found in
    /// its cache.
    #[arg(long, value_name = "DIR")]
    models: Vec<PathBuf>,
    /// Folder of the server's own files: queue, clips, token. Default: serve in the folder of runs.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Address to listen on. Others than this host's own are reached by whoever has the token, without encryption.
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen on; 0 for any that is free.
    #[arg(long, default_value_t = 7860)]
    port: u16,
    /// File with the token. Default: token in the server's own folder, made at the first start.
    #[arg(long, value_name = "FILE", conflicts_with = "no_token")]
    token_file: Option<PathBuf>,
    /// Ask for no token: on this host's own address only.
    #[arg(long)]
    no_token: bool,
    /// The tiny decoder that makes previews of clips: taew2_1, for models of 5B taew2_2, as .pth or .safetensors.
    #[arg(long, value_name = "FILE")]
    tiny_decoder: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  tandem serve --data clips
  tandem serve --data recipes/first-run/clips --models recipes/first-run/model
  tandem serve --host 0.0.0.0 --data clips        # for other machines, with the token that it prints

Nothing outside of these folders is read, written or served. The API is described at /openapi.json.";

impl Serve {
    /// Serves until Ctrl-C.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let state = self.state.clone().unwrap_or_else(|| self.runs.join("serve"));
        if self.no_token && !self.host.is_loopback() {
            let why =
                format!("{} is reached from other hosts, and a server without a token is not", self.host);
            return Err(Error::Setting { key: "--no-token".into(), why }.into());
        }
        let access = match self.no_token {
            true => Access::Open,
            false => {
                std::fs::create_dir_all(&state).map_err(|source| Error::Io {
                    action: "create the folder",
                    path: state.clone(),
                    source,
                })?;
                Access::of_file(self.token_file.as_ref().unwrap_or(&state.join("token")))?
            }
        };
        let folders = Folders {
            runs: self.runs.clone(),
            recipes: self.recipes.clone(),
            data: self.data.clone(),
            models: self.models.clone(),
            state,
        };
        let address = SocketAddr::new(self.host, self.port);
        serve(Settings { folders, address, access, tiny_decoder: self.tiny_decoder.clone() }, ui)?;
        Ok(0)
    }
}

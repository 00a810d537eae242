//! `tandem launch`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;

use crate::error::Error;
use crate::machine::replica_devices::visible_gpus;
use crate::recipe::Recipe;
use crate::replicas::launcher::PORT;
use crate::tools::launch::{self, Hosts, Place};
use crate::watch::ui::{Ui, Voice};

/// Train on several replicas: start them on this host or others, join their output, pass signals on, and end all when one fails.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Launch {
    /// Replicas on each host. Default: devices.replicas of the recipe.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    replicas: Option<u16>,
    /// Hosts to start them on over ssh, in place of this one. The first has rank 0. Program, recipe, model and clips have to be at the
    /// same paths everywhere.
    #[arg(long, value_delimiter = ',', value_name = "HOST,HOST")]
    hosts: Vec<String>,
    /// The port of the first host that the rendezvous is beside.
    #[arg(long, default_value_t = PORT, requires = "hosts")]
    port: u16,
    /// The ssh command with its options.
    #[arg(long, default_value = "ssh -o BatchMode=yes", requires = "hosts")]
    ssh: String,
    /// The program on the hosts. Default: the path of this one.
    #[arg(long, requires = "hosts")]
    program: Option<String>,
    /// How often to start all again, resuming the run, when a replica fails.
    #[arg(long, default_value_t = 0)]
    max_restarts: u32,
    /// Do not train: report what every replica runs on, what does not match, and how fast they exchange (`tandem doctor --cluster`, whose
    /// options may follow).
    #[arg(long, requires = "replicas")]
    doctor: bool,
    /// The recipe, and options of `tandem train` behind it.
    #[arg(
        required_unless_present = "doctor",
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "RECIPE"
    )]
    train: Vec<OsString>,
}

const EXAMPLES: &str = "\
Examples:
  tandem launch --replicas 4 my.toml                      # four replicas on this host
  tandem launch --hosts node1,node2 my.toml --resume      # as many on each host as the recipe says
  tandem launch --replicas 2 --max-restarts 3 my.toml     # when one fails, all resume

torchrun, srun, mpirun, Kubernetes and SkyPilot start `tandem train` themselves: recipes/CLUSTER.md";

impl Launch {
    /// Runs the replicas to the end.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let recipe = self.train.first().map(PathBuf::from).unwrap_or_default();
        let replicas = match self.replicas {
            Some(replicas) => usize::from(replicas),
            None => here(&recipe)?,
        };
        let place = match self.hosts.is_empty() {
            true => Place::Here,
            false => Place::Hosts(self.hosts()?),
        };
        let mut arguments: Vec<OsString> = match self.doctor {
            true => vec!["doctor".into(), "--cluster".into()],
            false => vec!["train".into()],
        };
        if ui.voice() == Voice::Json {
            arguments.insert(0, "--json".into());
        }
        arguments.extend(self.train.iter().cloned());
        let launch = launch::Launch { arguments, replicas, place, max_restarts: self.max_restarts };
        Ok(launch.run(ui)?)
    }

    fn hosts(&self) -> Result<Hosts> {
        let folder = std::env::current_dir();
        let program = std::env::current_exe();
        let io = |action| move |source| Error::Io { action, path: PathBuf::from("."), source };
        let own = program.map_err(io("find the program in"))?.display().to_string();
        let ssh = shlex::split(&self.ssh).unwrap_or_default();
        Ok(Hosts {
            names: self.hosts.clone(),
            ssh,
            port: self.port,
            program: self.program.clone().unwrap_or(own),
            folder: folder.map_err(io("find"))?,
        })
    }
}

/// The replicas of this host that the recipe at `path` asks for.
fn here(path: &Path) -> crate::Result<usize> {
    Recipe::read_with(path, &[])?.devices.replicas_here(visible_gpus())
}

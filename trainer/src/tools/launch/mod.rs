//! Starts the replicas of a run as processes, here or over ssh, passes signals on to them, joins their output, and ends all when one
//! fails.

mod team;

use std::ffi::OsString;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

use crate::error::{Error, Result};
use crate::replicas::{Job, Meeting, Node};
use crate::train::export::shell_line;
use crate::watch::ui::Ui;
pub use team::{Member, Passed};

/// The replicas to start.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The command that each replica runs, without the name of the program.
    pub arguments: Vec<OsString>,
    /// Replicas on each host.
    pub replicas: usize,
    /// Where they run.
    pub place: Place,
    /// How often all are started again when one fails.
    pub max_restarts: u32,
}

/// Where replicas run.
#[derive(Debug, Clone)]
pub enum Place {
    /// On this host alone.
    Here,
    /// On this host, which a launcher has started as one of several.
    Node(Node),
    /// On other hosts.
    Hosts(Hosts),
}

/// Hosts that are reached over ssh.
#[derive(Debug, Clone)]
pub struct Hosts {
    /// Their names; the first has rank 0.
    pub names: Vec<String>,
    /// The ssh command, whose words are followed by the host and by the line that it runs.
    pub ssh: Vec<String>,
    /// The port of the rendezvous on the first host.
    pub port: u16,
    /// The program there.
    pub program: String,
    /// The folder that it runs in there.
    pub folder: PathBuf,
}

/// How a team of replicas ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The exit code of the whole.
    pub code: u8,
    /// Whether a signal asked for it.
    pub is_asked: bool,
}

impl Launch {
    /// Runs the replicas to the end, again where one fails and restarts are left. The exit code.
    ///
    /// # Errors
    /// Processes that cannot be started.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let signals = team::Signals::listen()?;
        let mut restarts = 0;
        loop {
            let members = self.members(restarts)?;
            let ended = team::run(members, &signals, ui)?;
            if ended.code == 0 || ended.is_asked || restarts == self.max_restarts {
                return Ok(ended.code);
            }
            restarts += 1;
            ui.note(&format!(
                "a replica failed (exit code {}); start {restarts} again of {}",
                ended.code, self.max_restarts
            ));
        }
    }

    fn members(&self, restarts: u32) -> Result<Vec<Member>> {
        let job = self.job()?;
        let (first, world) = match &self.place {
            Place::Here => (0, self.replicas),
            Place::Node(node) => (node.rank * self.replicas, node.count * self.replicas),
            Place::Hosts(hosts) => (0, hosts.names.len() * self.replicas),
        };
        let count = if let Place::Hosts(_) = self.place { world } else { self.replicas };
        let member = |index: usize| -> Result<Member> {
            let rank = first + index;
            let mut arguments = self.arguments.clone();
            let numbers =
                [rank, world, index % self.replicas, self.replicas, (job.restarts + restarts) as usize];
            let names = ["--rank", "--world", "--local-rank", "--local-world", "--restarts"];
            arguments.extend(
                names
                    .iter()
                    .zip(numbers)
                    .flat_map(|(name, number)| [(*name).into(), number.to_string().into()]),
            );
            arguments.extend(["--job".into(), job.id.clone().into(), "--until-stdin-ends".into()]);
            arguments.extend(match &job.meeting {
                Meeting::Port(host, port) => ["--master".into(), format!("{host}:{port}").into()],
                Meeting::File(path) => ["--rendezvous".into(), path.clone().into()],
            });
            let (command, passed) = self.command(index, arguments)?;
            Ok(Member { name: format!("rank {rank}"), command, passed })
        };
        (0..count).map(member).collect()
    }

    fn job(&self) -> Result<Job> {
        let id = || format!("launch-{}-{}", gethostname::gethostname().to_string_lossy(), std::process::id());
        let launcher = "tandem launch";
        let meeting = match &self.place {
            Place::Node(node) => return Ok(node.job.clone()),
            Place::Here => {
                let io = |source| Error::Io {
                    action: "find a free port beside",
                    path: PathBuf::from("localhost"),
                    source,
                };
                let port = TcpListener::bind(("localhost", 0))
                    .and_then(|listener| listener.local_addr())
                    .map_err(io)?;
                Meeting::Port("localhost".to_owned(), port.port())
            }
            Place::Hosts(hosts) => {
                let first = hosts.names.first().cloned().unwrap_or_default();
                // Behind a user's name, as ssh has it.
                let host = first.rsplit('@').next().unwrap_or(&first).to_owned();
                Meeting::Port(host, hosts.port)
            }
        };
        Ok(Job { meeting, id: id(), restarts: 0, launcher })
    }

    /// The process of replica `index`, and how signals reach it.
    fn command(&self, index: usize, arguments: Vec<OsString>) -> Result<(Command, Passed)> {
        let Place::Hosts(hosts) = &self.place else {
            let program = std::env::current_exe().map_err(|source| Error::Io {
                action: "find",
                path: PathBuf::from("tandem"),
                source,
            })?;
            let mut command = Command::new(program);
            command.args(arguments);
            return Ok((command, Passed::AsSignal));
        };
        let host = &hosts.names[index / self.replicas]; // as many as there are hosts' replicas
        let folder = hosts.folder.display().to_string();
        let arguments: Vec<String> =
            arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        let words: Vec<&str> =
            std::iter::once(hosts.program.as_str()).chain(arguments.iter().map(String::as_str)).collect();
        let line = format!("cd {} && exec {}", shell_line(&[&folder]), shell_line(&words));
        let (ssh, options) = hosts
            .ssh
            .split_first()
            .ok_or_else(|| Error::Setting { key: "--ssh".into(), why: "is empty".into() })?;
        let mut command = Command::new(ssh);
        command.args(options).arg(host).arg(line);
        Ok((command, Passed::AsEndOfInput))
    }
}

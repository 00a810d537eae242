//! Options and steps of a command that is one of several replicas.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use crate::error::{Error, Result};
use crate::machine::devices::DevicesConfig;
use crate::machine::replica_devices::visible_gpus;
use crate::plan::common;
use crate::recipe::Recipe;
use crate::replicas::launcher::{checked, found};
use crate::replicas::{Introduction, Job, Launched, Meeting, Member, ReplicaError, Replicas, Share, Timing};
use crate::watch::interrupt::Interrupt;
use crate::watch::ui::{Ui, fail};

/// Which replica a process is. Without these the variables of torchrun, Slurm, Open MPI, MPICH, Kubeflow, Kubernetes and SkyPilot
/// say it.
#[derive(Debug, Clone, Default, Args)]
#[command(
    next_help_heading = "Replicas (set by `tandem launch`; other launchers are recognised by their variables)"
)]
pub struct ReplicaOptions {
    /// The number of this replica, from 0.
    #[arg(long, requires = "world")]
    rank: Option<usize>,
    /// How many replicas there are.
    #[arg(long, requires = "rank")]
    world: Option<usize>,
    /// The number of this replica on its host. Default: --rank.
    #[arg(long, requires = "rank")]
    local_rank: Option<usize>,
    /// How many replicas there are on this host. Default: --world.
    #[arg(long, requires = "rank")]
    local_world: Option<usize>,
    /// The host of rank 0 with a port: rank 0 listens at one of the 16 ports behind it.
    #[arg(long, value_name = "HOST:PORT")]
    master: Option<String>,
    /// Meet through this file on a folder that all hosts see, in place of an agreed port.
    #[arg(long, value_name = "FILE", conflicts_with = "master")]
    rendezvous: Option<PathBuf>,
    /// Tells this job from others that use the same port.
    #[arg(long, requires = "rank")]
    job: Option<String>,
    /// How often the launcher has started the job again; from 1 on a run is resumed without --resume.
    #[arg(long, requires = "rank", default_value_t = 0)]
    restarts: u32,
    /// Slow the exchange of gradients down to so many Gb/s, to measure what a slower link would do.
    #[arg(long, value_name = "GB_S")]
    exchange_gbits: Option<f64>,
    /// Save and stop when standard input ends: the launcher is gone, or asks for it.
    #[arg(long, requires = "rank")]
    until_stdin_ends: bool,
}

/// Bytes of a gigabit, less the headers of Ethernet.
pub const BYTES_OF_GIGABIT: f64 = 1.17e8;

/// Who these options are of.
const OPTIONS: &str = "options --rank and --world";

impl ReplicaOptions {
    /// What these options, or else the environment, say of this process.
    ///
    /// # Errors
    /// Numbers or variables that are incomplete or contradict each other.
    pub fn launched(&self) -> Result<Launched> {
        let refuse = |why: &str| ReplicaError::Launch { launcher: OPTIONS, why: why.to_owned() };
        let given = self.meeting()?;
        let (Some(rank), Some(world)) = (self.rank, self.world) else {
            let mut launched = found(&|name| std::env::var(name).ok())?;
            let job = match &mut launched {
                Launched::Alone => None,
                Launched::Replica(member) => Some(&mut member.job),
                Launched::Host(node) => Some(&mut node.job),
            };
            if let (Some(job), Some(meeting)) = (job, given) {
                job.meeting = meeting;
            }
            return Ok(launched);
        };
        let meeting =
            given.ok_or_else(|| refuse("nothing says where rank 0 is: add --master or --rendezvous"))?;
        let id = self.job.clone().unwrap_or_else(|| format!("{meeting}"));
        let job = Job { meeting, id, restarts: self.restarts, launcher: OPTIONS };
        let (local_rank, local_world) = (self.local_rank.unwrap_or(rank), self.local_world.unwrap_or(world));
        let member = checked(Member { rank, world, local_rank, local_world, job })?;
        Ok(if world == 1 { Launched::Alone } else { Launched::Replica(member) })
    }

    fn meeting(&self) -> Result<Option<Meeting>> {
        if let Some(path) = &self.rendezvous {
            return Ok(Some(Meeting::File(path.clone())));
        }
        let Some(master) = &self.master else { return Ok(None) };
        let why = || format!("--master is \"{master}\"; write a host and a port, such as node1:29400");
        let refuse = || ReplicaError::Launch { launcher: OPTIONS, why: why() };
        let (host, port) = master.rsplit_once(':').ok_or_else(refuse)?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        Ok(Some(Meeting::Port(host, port.parse().map_err(|_| refuse())?)))
    }

    /// The rate that the exchange is slowed down to, in bytes a second.
    ///
    /// # Errors
    /// A rate that is none.
    pub fn exchange_rate(&self) -> Result<Option<f64>> {
        match self.exchange_gbits {
            Some(gigabits) if !(gigabits.is_finite() && gigabits > 0.0) => {
                let why = format!("{gigabits} is no rate in Gb/s");
                Err(Error::Setting { key: "--exchange-gbits".into(), why })
            }
            given => Ok(given.map(|gigabits| gigabits * BYTES_OF_GIGABIT)),
        }
    }

    /// Lets `interrupt` be asked when standard input ends, where the options say so.
    pub fn follow_stdin(&self, interrupt: &Interrupt) {
        if self.until_stdin_ends {
            let interrupt = interrupt.clone();
            std::thread::spawn(move || {
                // Nothing is expected there but its end; an error is one too.
                let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                interrupt.ask();
            });
        }
    }
}

/// The devices of `member`'s replica, as `recipe` deals them out.
///
/// # Errors
/// Fewer GPUs than the replicas of this host need.
pub fn devices_of(member: &Member, recipe: &Recipe) -> Result<DevicesConfig> {
    let share = Share { rank: member.local_rank, world: member.local_world };
    recipe.devices.of_replica(share, visible_gpus())
}

/// Joins the other replicas of `member`'s job, to train `recipe` on `devices`.
///
/// # Errors
/// Replicas that do not come or do not match.
pub fn join(member: &Member, recipe: &Recipe, devices: &DevicesConfig, ui: &Ui) -> Result<Replicas> {
    meet(member, common::of_recipe(recipe)?, devices, ui)
}

/// Joins the other replicas of `member`'s job, which have the same `settings`, with `devices`.
///
/// # Errors
/// Replicas that do not come or do not match.
pub fn meet(
    member: &Member,
    settings: BTreeMap<String, String>,
    devices: &DevicesConfig,
    ui: &Ui,
) -> Result<Replicas> {
    let introduction = Introduction {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        settings,
        devices: devices.identities(),
    };
    let timing = Timing { exchange: Duration::from_secs(devices.exchange_timeout), ..Timing::default() };
    let voice = ui.voice();
    let last = move |error: &ReplicaError| {
        let code = super::exit_code(&anyhow::Error::from(Error::from(error.clone())));
        fail(voice, &error.to_string(), code);
        end(code);
    };
    ui.note(&member.to_string());
    Ok(ui.phase("meeting replicas", || Replicas::join(member, introduction, timing, Arc::new(last)))?)
}

/// Ends this process although its main thread may be stuck in a driver.
fn end(code: u8) {
    #[cfg(unix)]
    std::thread::spawn(|| {
        // What runs at the end of a process may wait for a GPU that waits for another replica.
        std::thread::sleep(Duration::from_secs(5));
        // Nothing can be done where even that fails.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
    });
    std::process::exit(i32::from(code));
}

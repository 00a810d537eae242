//! Which process of a group this one is, as the launcher that started it says.
//!
//! Some launchers start a process for each replica (torchrun, srun, mpirun): they name a [`Member`]. Others start one for each
//! host (PyTorchJob, Indexed Job, SkyPilot): they name a [`Node`], and the replicas of that host are started here.

use std::path::PathBuf;

use super::error::{ReplicaError, Result};
use super::node_list;

/// Where ranks meet, unless they are told: torchrun's own default for a rendezvous.
pub const PORT: u16 = 29400;

/// Where the ranks of a group find rank 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Meeting {
    /// At one of the ports behind this one, on this host: the launcher itself may use the port.
    Port(String, u16),
    /// At the address that rank 0 writes into this file, which all hosts see.
    File(PathBuf),
}

impl std::fmt::Display for Meeting {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Port(host, port) => write!(f, "{host}:{port}"),
            Self::File(path) => write!(f, "the address in {}", path.display()),
        }
    }
}

/// What a group of processes shares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Where they meet.
    pub meeting: Meeting,
    /// Tells this job from others that meet at the same place.
    pub id: String,
    /// How often the launcher has started it again.
    pub restarts: u32,
    /// Who started it.
    pub launcher: &'static str,
}

/// One process of a group: a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub world: usize,
    /// Its number on this host, from 0.
    pub local_rank: usize,
    /// How many there are on this host.
    pub local_world: usize,
    /// The group.
    pub job: Job,
}

/// One host of a group, whose replicas are still to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub count: usize,
    /// The group.
    pub job: Job,
}

/// What the launcher says of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Launched {
    /// No launcher, or one that has started this process alone.
    Alone,
    /// It is a replica.
    Replica(Member),
    /// It is the only process on its host.
    Host(Node),
}

impl std::fmt::Display for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { rank, world, local_rank, local_world, job } = self;
        write!(
            f,
            "{}: rank {rank} of {world}, {local_rank} of {local_world} on this host; rank 0 is at {}",
            job.launcher, job.meeting
        )?;
        if job.restarts > 0 {
            write!(f, "; restart {}", job.restarts)?;
        }
        Ok(())
    }
}

/// The variables of a process.
struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    fn has(&self, names: &[&str]) -> bool {
        names.iter().all(|name| self.text(name).is_some())
    }

    fn number(&self, launcher: &'static str, name: &str) -> Result<Option<usize>> {
        let refuse = |text: &str| ReplicaError::Launch {
            launcher,
            why: format!("{name} is \"{text}\", not a number"),
        };
        self.text(name).map(|text| text.parse().map_err(|_| refuse(&text))).transpose()
    }

    fn required(&self, launcher: &'static str, name: &str) -> Result<usize> {
        let why = format!("{name} is not set, and the variables beside it are");
        self.number(launcher, name)?.ok_or(ReplicaError::Launch { launcher, why })
    }

    /// `MASTER_PORT` or `default`.
    fn port(&self, launcher: &'static str, name: &str, default: u16) -> Result<u16> {
        let port = self.number(launcher, name)?.unwrap_or(usize::from(default));
        let why = || format!("{name} is {port}, which is no port");
        u16::try_from(port).map_err(|_| ReplicaError::Launch { launcher, why: why() })
    }
}

/// What `variable` (the environment) says of this process: torchrun, Slurm, Open MPI, MPICH, Kubeflow's PyTorchJob and
/// Trainer, Kubernetes' Indexed Job and JobSet, SkyPilot, asked in this order.
///
/// # Errors
/// Variables of a launcher that are incomplete or contradict each other.
pub fn found(variable: &dyn Fn(&str) -> Option<String>) -> Result<Launched> {
    let variables = Variables(variable);
    let asked = [torchrun, slurm, open_mpi, mpich, pytorch_job, trainer, indexed_job, sky_pilot];
    for ask in asked {
        match ask(&variables)? {
            None | Some(Launched::Alone) => {}
            Some(Launched::Replica(member)) => return checked(member).map(Launched::Replica),
            Some(Launched::Host(node)) => return checked_node(node).map(Launched::Host),
        }
    }
    Ok(Launched::Alone)
}

/// `member`, unless its numbers contradict each other.
///
/// # Errors
/// [`ReplicaError::Launch`].
pub fn checked(member: Member) -> Result<Member> {
    let Member { rank, world, local_rank, local_world, .. } = member;
    let launcher = member.job.launcher;
    match rank < world && local_rank < local_world && local_world <= world {
        true => Ok(member),
        false => {
            let why = format!(
                "rank {rank} of {world}, {local_rank} of {local_world} on this host, is impossible: ranks count from 0"
            );
            Err(ReplicaError::Launch { launcher, why })
        }
    }
}

fn checked_node(node: Node) -> Result<Node> {
    let Node { rank, count, job } = &node;
    match rank < count {
        true => Ok(node),
        false => {
            let why = format!("host {rank} of {count} is impossible: hosts count from 0");
            Err(ReplicaError::Launch { launcher: job.launcher, why })
        }
    }
}

/// torchrun, and what sets the same variables (accelerate, `tandem launch` over ssh).
fn torchrun(variables: &Variables) -> Result<Option<Launched>> {
    const NAME: &str = "torchrun";
    if !variables.has(&["RANK", "LOCAL_RANK", "WORLD_SIZE"]) {
        return Ok(None);
    }
    let number = |name| variables.required(NAME, name);
    let why = "MASTER_ADDR is not set, and the variables beside it are".to_owned();
    let host = variables.text("MASTER_ADDR").ok_or(ReplicaError::Launch { launcher: NAME, why })?;
    let port = variables.port(NAME, "MASTER_PORT", PORT)?;
    let run = variables.text("TORCHELASTIC_RUN_ID").unwrap_or_else(|| "none".into());
    let restarts = variables.number(NAME, "TORCHELASTIC_RESTART_COUNT")?.unwrap_or(0) as u32;
    let (rank, world) = (number("RANK")?, number("WORLD_SIZE")?);
    let (local_rank, local_world) = (number("LOCAL_RANK")?, number("LOCAL_WORLD_SIZE")?);
    // "none" is the id of every run whose rendezvous is static.
    let id = format!("{run}@{host}:{port}");
    let job = Job { meeting: Meeting::Port(host, port), id, restarts, launcher: NAME };
    Ok(Some(Launched::Replica(Member { rank, world, local_rank, local_world, job })))
}

/// A step that srun started. A batch script itself has the variables of its job, but no step.
fn slurm(variables: &Variables) -> Result<Option<Launched>> {
    const NAME: &str = "Slurm";
    if !variables.has(&["SLURM_STEP_ID", "SLURM_PROCID"]) {
        return Ok(None);
    }
    let number = |name| variables.required(NAME, name);
    let world = match variables.number(NAME, "SLURM_STEP_NUM_TASKS")? {
        Some(world) => world,
        None => number("SLURM_NTASKS")?,
    };
    if world == 1 {
        return Ok(Some(Launched::Alone));
    }
    let list = variables.text("SLURM_STEP_NODELIST").or_else(|| variables.text("SLURM_JOB_NODELIST"));
    let why = "SLURM_STEP_NODELIST is not set, and the variables beside it are".to_owned();
    let hosts = node_list::expand(&list.ok_or(ReplicaError::Launch { launcher: NAME, why })?)?;
    let job_id = number("SLURM_JOB_ID")?;
    let tasks =
        variables.text("SLURM_STEP_TASKS_PER_NODE").or_else(|| variables.text("SLURM_TASKS_PER_NODE"));
    let local_world = match tasks {
        Some(tasks) => tasks_of(&tasks, variables.number(NAME, "SLURM_NODEID")?.unwrap_or(0))?,
        None => world.div_ceil(hosts.len()),
    };
    let host = variables.text("MASTER_ADDR").unwrap_or_else(|| hosts[0].clone()); // `expand` refuses an empty list
    let port = variables.port(NAME, "MASTER_PORT", PORT + (job_id % 1024) as u16)?;
    let job = Job {
        meeting: Meeting::Port(host, port),
        id: format!("slurm-{job_id}.{}", number("SLURM_STEP_ID")?),
        restarts: variables.number(NAME, "SLURM_RESTART_COUNT")?.unwrap_or(0) as u32,
        launcher: NAME,
    };
    let (rank, local_rank) = (number("SLURM_PROCID")?, number("SLURM_LOCALID")?);
    Ok(Some(Launched::Replica(Member { rank, world, local_rank, local_world, job })))
}

/// The tasks of node `index` in Slurm's `2(x3),1`.
fn tasks_of(list: &str, index: usize) -> Result<usize> {
    let why = format!("the tasks of node {index} cannot be read from \"{list}\"");
    let refuse = || ReplicaError::Launch { launcher: "Slurm", why };
    let mut before = 0;
    for part in list.split(',') {
        let (tasks, nodes) = match part.split_once("(x") {
            Some((tasks, nodes)) => (tasks, nodes.strip_suffix(')').and_then(|nodes| nodes.parse().ok())),
            None => (part, Some(1)),
        };
        let (Ok(tasks), Some(nodes)) = (tasks.trim().parse::<usize>(), nodes) else { return Err(refuse()) };
        before += nodes;
        if index < before {
            return Ok(tasks);
        }
    }
    Err(refuse())
}

/// What an MPI launcher says of the process.
struct Mpi {
    launcher: &'static str,
    rank: usize,
    world: usize,
    local_rank: usize,
    local_world: usize,
    /// Tells the job from others, where the launcher does.
    job: Option<String>,
}

fn open_mpi(variables: &Variables) -> Result<Option<Launched>> {
    const NAME: &str = "Open MPI";
    if !variables.has(&["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"]) {
        return Ok(None);
    }
    let number = |name| variables.required(NAME, name);
    let job = variables.text("PMIX_NAMESPACE").or_else(|| variables.text("OMPI_MCA_ess_base_jobid"));
    let mpi = Mpi {
        launcher: NAME,
        rank: number("OMPI_COMM_WORLD_RANK")?,
        world: number("OMPI_COMM_WORLD_SIZE")?,
        local_rank: number("OMPI_COMM_WORLD_LOCAL_RANK")?,
        local_world: number("OMPI_COMM_WORLD_LOCAL_SIZE")?,
        job,
    };
    mpi.launched(variables).map(Some)
}

/// MPICH, Intel MPI and what else speaks PMI.
fn mpich(variables: &Variables) -> Result<Option<Launched>> {
    const NAME: &str = "MPICH";
    if !variables.has(&["PMI_RANK"]) {
        return match variables.text("PMIX_RANK") {
            Some(rank) if !variables.has(&["RANK"]) => Err(ReplicaError::Launch {
                launcher: "PMIx",
                why: format!(
                    "PMIX_RANK is {rank}, but nothing says how many ranks there are: pass --rank, --world, --local-rank, \
                     --local-world and --master, or start with torchrun"
                ),
            }),
            _ => Ok(None),
        };
    }
    let (rank, world) = (variables.required(NAME, "PMI_RANK")?, variables.required(NAME, "PMI_SIZE")?);
    let local_rank = variables.number(NAME, "MPI_LOCALRANKID")?;
    let local_world = variables.number(NAME, "MPI_LOCALNRANKS")?;
    let mpi = Mpi {
        launcher: NAME,
        rank,
        world,
        local_rank: local_rank.unwrap_or(rank),
        local_world: local_world.unwrap_or(world),
        job: variables.text("PMI_ID").and(variables.text("PMI_PORT")),
    };
    mpi.launched(variables).map(Some)
}

impl Mpi {
    fn launched(self, variables: &Variables) -> Result<Launched> {
        let Self { launcher, rank, world, local_rank, local_world, job } = self;
        if world == 1 {
            return Ok(Launched::Alone);
        }
        let host = match variables.text("MASTER_ADDR") {
            Some(host) => host,
            None if local_world == world => "localhost".to_owned(),
            None => {
                let why = "the ranks are on several hosts and nothing says where rank 0 is: pass its host with -x MASTER_ADDR=..., \
                           or a file that all see with --rendezvous";
                return Err(ReplicaError::Launch { launcher, why: why.to_owned() });
            }
        };
        let job = job.unwrap_or_default();
        let spread = xxhash_rust::xxh3::xxh3_64(job.as_bytes()) % 1024;
        let port = variables.port(launcher, "MASTER_PORT", PORT + spread as u16)?;
        let meeting = Meeting::Port(host, port);
        let job = Job { id: format!("mpi-{job}"), meeting, restarts: 0, launcher };
        Ok(Launched::Replica(Member { rank, world, local_rank, local_world, job }))
    }
}

/// Kubeflow's PyTorchJob (training operator v1): `RANK` and `WORLD_SIZE` count pods.
fn pytorch_job(variables: &Variables) -> Result<Option<Launched>> {
    const NAME: &str = "PyTorchJob";
    if !variables.has(&["RANK", "WORLD_SIZE", "MASTER_ADDR"]) {
        return Ok(None);
    }
    let (rank, count) = (variables.required(NAME, "RANK")?, variables.required(NAME, "WORLD_SIZE")?);
    host_of(variables, NAME, (rank, count), ["MASTER_ADDR", "MASTER_PORT"]).map(Some)
}

/// Kubeflow's Trainer (v2), which sets torchrun's own options as variables.
fn trainer(variables: &Variables) -> Result<Option<Launched>> {
    const NAME: &str = "Kubeflow Trainer";
    if !variables.has(&["PET_NNODES", "PET_NODE_RANK"]) {
        return Ok(None);
    }
    let rank = variables.required(NAME, "PET_NODE_RANK")?;
    let count = variables.required(NAME, "PET_NNODES")?;
    host_of(variables, NAME, (rank, count), ["PET_MASTER_ADDR", "PET_MASTER_PORT"]).map(Some)
}

/// An Indexed Job, alone or in a JobSet. How many pods there are and where the first one is stands in no variable of
/// Kubernetes: the manifest sets `NNODES` and `MASTER_ADDR`.
fn indexed_job(variables: &Variables) -> Result<Option<Launched>> {
    const NAME: &str = "Indexed Job";
    if !variables.has(&["JOB_COMPLETION_INDEX"]) {
        return Ok(None);
    }
    let rank = variables.required(NAME, "JOB_COMPLETION_INDEX")?;
    let Some(count) = variables.number(NAME, "NNODES")? else {
        let why = "NNODES is not set: set it in the manifest to the number of pods (spec.completions), and MASTER_ADDR to \
                   the first pod's name in the headless service; recipes/CLUSTER.md has a manifest";
        return match rank {
            0 => Ok(Some(Launched::Alone)),
            _ => Err(ReplicaError::Launch { launcher: NAME, why: why.to_owned() }),
        };
    };
    host_of(variables, NAME, (rank, count), ["MASTER_ADDR", "MASTER_PORT"]).map(Some)
}

fn sky_pilot(variables: &Variables) -> Result<Option<Launched>> {
    const NAME: &str = "SkyPilot";
    if !variables.has(&["SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS"]) {
        return Ok(None);
    }
    let rank = variables.required(NAME, "SKYPILOT_NODE_RANK")?;
    let count = variables.required(NAME, "SKYPILOT_NUM_NODES")?;
    let ips = variables.text("SKYPILOT_NODE_IPS").unwrap_or_default();
    let port = variables.port(NAME, "MASTER_PORT", PORT)?;
    let head = ips.lines().next().unwrap_or_default().trim().to_owned();
    let id = variables.text("SKYPILOT_TASK_ID").unwrap_or_else(|| format!("skypilot-{head}"));
    let job = Job { meeting: Meeting::Port(head, port), id, restarts: 0, launcher: NAME };
    Ok(Some(Launched::Host(Node { rank, count, job })))
}

/// Host `rank` of `count`; alone where there is only one, and nothing says where it is.
fn host_of(
    variables: &Variables,
    launcher: &'static str,
    (rank, count): (usize, usize),
    [address, port]: [&'static str; 2],
) -> Result<Launched> {
    let host = match variables.text(address) {
        Some(host) => host,
        None if count == 1 => "localhost".to_owned(),
        None => {
            let why = format!("{address} is not set: it names the host of rank 0");
            return Err(ReplicaError::Launch { launcher, why });
        }
    };
    let port = variables.port(launcher, port, PORT)?;
    let id = format!("{}@{host}:{port}", launcher.to_lowercase().replace(' ', "-"));
    let job = Job { meeting: Meeting::Port(host, port), id, restarts: 0, launcher };
    Ok(Launched::Host(Node { rank, count, job }))
}

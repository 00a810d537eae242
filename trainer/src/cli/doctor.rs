//! `tandem doctor`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::explain;
use super::replica::{self, ReplicaOptions};
use crate::error::Error;
use crate::machine::devices::{DevicesConfig, default_device, open};
use crate::machine::replica_devices::visible_gpus;
use crate::replicas::{Launched, Member, Node, STOPPED, Share};
use crate::tools::doctor::{Finding, Standing, cluster, examine};
use crate::watch::ui::Ui;

/// Show what this machine offers, which engines will run, what is missing and how to get it.
///
/// Exits with 2 if something prevents runs (marked !!); what is merely missing (marked --) is not a failure.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Doctor {
    /// The folder that runs would be written to.
    #[arg(long, default_value = "runs")]
    runs: PathBuf,
    /// Under a launcher, or by `tandem launch --doctor`: what every replica runs on, what does not match, and how fast they exchange.
    #[arg(long)]
    cluster: bool,
    /// With --cluster, the devices of the first replica of a host. Default: the first GPU of a CUDA build, else the CPU.
    #[arg(long, value_delimiter = ',', requires = "cluster")]
    stages: Vec<String>,
    /// With --cluster, megabytes that are summed over all replicas.
    #[arg(long, default_value_t = 512, requires = "cluster", value_parser = clap::value_parser!(u32).range(1..=16384))]
    megabytes: u32,
    #[command(flatten)]
    replica: ReplicaOptions,
}

const EXAMPLES: &str = "\
Examples:
  tandem doctor
  tandem doctor --runs /data/runs   # whether runs can be written there
  tandem doctor --cluster --rank 0 --world 2 --master node1:29400   # as one of two replicas; launchers set the numbers";

impl Doctor {
    /// Reports every finding; returns 2 if one of them prevents runs.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        if self.cluster {
            return self.cluster(ui);
        }
        tell(&examine(&self.runs), ui)
    }

    /// Reports from rank 0 what all replicas found.
    fn cluster(&self, ui: &Ui) -> Result<u8> {
        let member = match self.replica.launched()? {
            Launched::Replica(member) => member,
            Launched::Host(Node { rank, count, job }) => {
                Member { rank, world: count, local_rank: 0, local_world: 1, job }
            }
            Launched::Alone => {
                let why = "there is no launcher: start it by torchrun, srun or mpirun, or by `tandem launch --doctor`";
                return Err(Error::Setting { key: "--cluster".into(), why: why.into() }.into());
            }
        };
        let asked = DevicesConfig { stages: self.stages.clone(), ..DevicesConfig::default() };
        let share = Share { rank: member.local_rank, world: member.local_world };
        let config = asked.of_replica(share, visible_gpus())?;
        let stages = match config.stages.is_empty() {
            true => vec![default_device().to_owned()],
            false => config.stages.clone(),
        };
        let mut replicas = replica::meet(&member, BTreeMap::new(), &config, ui)?;
        let mut work = || -> crate::Result<_> {
            let settings = config.settings();
            let devices =
                stages.iter().map(|name| open(name, &settings)).collect::<crate::Result<Vec<_>>>()?;
            if config.wants_nccl() {
                replicas.use_nccl(&devices)?;
            }
            cluster::examine(&mut replicas, &stages, &devices, self.megabytes as usize * 1_000_000)
        };
        match work() {
            Ok(findings) => {
                let is_first = replicas.is_first();
                replicas.leave().map_err(Error::from)?;
                if is_first { tell(&findings, ui) } else { Ok(0) }
            }
            Err(error) => {
                let error = anyhow::Error::from(error);
                replicas.abort(&explain(&error), STOPPED);
                Err(error)
            }
        }
    }
}

/// Prints every finding; returns 2 if one of them prevents runs.
fn tell(findings: &[Finding], ui: &Ui) -> Result<u8> {
    for finding in findings {
        let mark = match finding.standing {
            Standing::Good => "ok",
            Standing::Missing => "--",
            Standing::Bad => "!!",
        };
        let mut line = format!("{mark} {:<12} {}", finding.what, finding.found);
        if let Some(way_out) = &finding.way_out {
            line.push_str(&format!("\n   {:<12} -> {way_out}", ""));
        }
        ui.tell(&line, &serde_json::to_value(finding)?);
    }
    let is_broken = findings.iter().any(|finding| finding.standing == Standing::Bad);
    Ok(if is_broken { 2 } else { 0 })
}

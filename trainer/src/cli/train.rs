//! `tandem train`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::devices::RecipeDevices;
use super::fetch::{Missing, resolved};
use super::plan::{buckets, experts, make};
use super::replica::{self, ReplicaOptions};
use super::{USAGE, exit_code, explain};
use crate::error::Error;
use crate::machine::replica_devices::visible_gpus;
use crate::plan::{Overrides, Planned};
use crate::recipe::{Recipe, TrainConfig};
use crate::replicas::{Launched, Member, Node, Replicas, STOPPED};
use crate::tools::launch::{Launch, Place};
use crate::train::{self, Ending, RunFolder, newest};
use crate::watch::interrupt::{INTERRUPTED, Interrupt, OnStop};
use crate::watch::ui::Ui;
use crate::watch::webhook::Webhook;

/// Train an adapter. Clips that are not cached are encoded first. Ctrl-C finishes the step, saves and stops.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Train {
    /// The recipe.
    recipe: PathBuf,
    /// Resume from the last checkpoint of this recipe's newest run, or of the run in the folder RUN. The result is that of a
    /// run that was never interrupted, bit for bit (on GPUs with devices.deterministic).
    #[arg(long, value_name = "RUN", num_args = 0..=1, require_equals = true)]
    resume: Option<Option<PathBuf>>,
    /// Resume where there is a run to resume, else begin one: for job schedulers that start a job again.
    #[arg(long, conflicts_with = "resume")]
    resume_or_begin: bool,
    /// Post JSON to this address when the run starts, has made clips, is stopped, finishes or fails: {"event": "clips", ...}.
    #[arg(long, value_name = "URL", conflicts_with = "webhook_env")]
    webhook: Option<String>,
    /// The same for the address in an environment variable: for one that holds a secret, which is written and shown nowhere.
    #[arg(long, value_name = "NAME")]
    webhook_env: Option<String>,
    #[command(flatten)]
    devices: RecipeDevices,
    #[command(flatten)]
    replica: ReplicaOptions,
}

const EXAMPLES: &str = "\
Examples:
  tandem train my.toml
  tandem train my.toml --resume              # continue the newest run of this recipe
  tandem train my.toml --resume=runs/my-2    # continue this run
  tandem train my.toml --set train.steps=20  # a quick trial
  tandem --json train my.toml     # a JSON object for each step
  tandem train my.toml --webhook-env HOOK    # JSON to the address in $HOOK at start, clips, stop, end, failure

Every key of a recipe is explained in recipes/README.md.";

impl Train {
    /// Trains to the end, or until Ctrl-C: alone, as one of several replicas, or by starting them.
    pub fn run(&self, ui: &Ui) -> Result<u8> {
        let ui = &self.telling(&ui.with_phases())?;
        let recipe = Recipe::read_with(&self.recipe, &self.devices.overrides().settings)?;
        let (node, member) = match self.replica.launched()? {
            Launched::Replica(member) => (None, Some(member)),
            Launched::Host(node) => (Some(node), None),
            Launched::Alone => (None, None),
        };
        if let Some(member) = member {
            return self.as_replica(&member, &recipe, ui);
        }
        let replicas = recipe.devices.replicas_here(visible_gpus())?;
        match node.filter(|node| node.count > 1) {
            None if replicas == 1 => self.train(Overrides::default(), &mut Replicas::alone(), ui),
            Some(Node { rank, count, job }) if replicas == 1 => {
                let member = Member { rank, world: count, local_rank: 0, local_world: 1, job };
                self.as_replica(&member, &recipe, ui)
            }
            node => {
                let arguments = std::env::args_os().skip(1).collect();
                let place = node.map_or(Place::Here, Place::Node);
                ui.note(&format!("starting {replicas} replicas on this host"));
                Ok(Launch { arguments, replicas, place, max_restarts: 0 }.run(ui)?)
            }
        }
    }

    /// `ui`, which also tells the webhook that is asked for. A launcher leaves that to the replica of rank 0.
    fn telling(&self, ui: &Ui) -> Result<Ui> {
        let (url, option) = match (&self.webhook, &self.webhook_env) {
            (Some(url), _) => (url.clone(), "--webhook".to_owned()),
            (None, Some(name)) => {
                let url = std::env::var(name).map_err(|_| Error::Setting {
                    key: "--webhook-env".into(),
                    why: format!("there is no environment variable {name} with text in it"),
                })?;
                (url, format!("--webhook-env {name}"))
            }
            (None, None) => return Ok(ui.clone()),
        };
        Ok(ui.with_webhook(Webhook::new(&url, &option)?))
    }

    /// Trains as `member` of a group of replicas.
    fn as_replica(&self, member: &Member, recipe: &Recipe, ui: &Ui) -> Result<u8> {
        let silent = ui.silent();
        let ui = if member.rank == 0 { ui } else { &silent };
        let devices = replica::devices_of(member, recipe)?;
        let rate = self.replica.exchange_rate()?;
        let mut replicas = replica::join(member, recipe, &devices, ui)?;
        rate.into_iter().for_each(|rate| replicas.slow_down(rate));
        let overrides =
            Overrides { devices: Some(devices), world: Some(member.world), ..Overrides::default() };
        match self.train(overrides, &mut replicas, ui) {
            Ok(code) => {
                replicas.leave().map_err(Error::from)?;
                Ok(code)
            }
            Err(error) => {
                let code = exit_code(&error);
                // The others may try again, unless the user has to correct something first.
                replicas.abort(&explain(&error), if code == USAGE { USAGE } else { STOPPED });
                Err(error)
            }
        }
    }

    /// Trains as planned from the recipe with `own` overrides and those of the command line.
    fn train(&self, own: Overrides, replicas: &mut Replicas, ui: &Ui) -> Result<u8> {
        let asked = self.devices.overrides();
        let overrides = Overrides { devices: own.devices, world: own.world, ..asked };
        let overrides = self.fetched(overrides, replicas, ui)?;
        let interrupt = Interrupt::listen_to(OnStop::Save).context("cannot listen for Ctrl-C")?;
        self.replica.follow_stdin(&interrupt);
        let overrides = Overrides { interrupt: interrupt.clone(), ..overrides };
        let mut planned = ui.phase("planning", || make(&self.recipe, &overrides, ui))?;
        replicas.compare(&planned.plan.common_settings()?).map_err(Error::from)?;
        let (folder, is_new) = self.folder(&mut planned, replicas, ui)?;
        folder.warning().into_iter().for_each(|line| ui.note(line));
        tell(&planned, &folder, replicas, ui)?;
        let ending = train::train_together(&planned, &folder, replicas, &interrupt, ui);
        if let Err(error) = &ending {
            let run = &planned.plan.run.name;
            ui.event(
                "failed",
                serde_json::json!({ "run": run, "folder": folder.root(), "error": error.to_string() }),
            );
        }
        let is_over = matches!(ending, Ok(Ending::Finished));
        if replicas.is_first() && is_new && !is_over && folder.is_untouched()? {
            ui.note(&format!("nothing was trained: {} is removed", folder.root().display()));
            folder.discard()?;
        }
        match ending? {
            Ending::Finished => Ok(0),
            // Another replica was asked to stop.
            Ending::Interrupted if !interrupt.is_asked() => Ok(STOPPED),
            Ending::Interrupted => Ok(INTERRUPTED),
        }
    }

    /// `overrides` with the model of the hub where it is: the first replica of each host fetches it, the others find it there.
    fn fetched(&self, overrides: Overrides, replicas: &mut Replicas, ui: &Ui) -> Result<Overrides> {
        // Before listening for Ctrl-C, which then ends a download at once; nothing is lost.
        let fetch = |overrides| resolved(&self.recipe, overrides, Missing::Fetch, ui);
        if replicas.local_share().rank == 0 {
            let overrides = fetch(overrides)?;
            replicas.barrier().map_err(Error::from)?;
            return Ok(overrides);
        }
        replicas.barrier().map_err(Error::from)?;
        Ok(fetch(overrides)?)
    }

    /// The folder of the run, which rank 0 begins or resumes, and whether it is new.
    fn folder(&self, planned: &mut Planned, replicas: &mut Replicas, ui: &Ui) -> Result<(RunFolder, bool)> {
        if !replicas.is_first() {
            let root = replicas.broadcast(Vec::new()).map_err(Error::from)?;
            let root = PathBuf::from(String::from_utf8_lossy(&root).into_owned());
            planned.plan.run.folder.clone_from(&root);
            return Ok((RunFolder::of_replica(root), false));
        }
        let may_resume = self.resume_or_begin || replicas.restarts() > 0;
        let named = match &self.resume {
            Some(named) => Some(named.clone()),
            None => (may_resume && newest(&planned.plan.run.folder).is_some()).then_some(None),
        };
        let folder = match &named {
            Some(run) => RunFolder::resume(planned, run.as_deref(), |line| ui.note(line))?,
            None => RunFolder::begin(&mut planned.plan)?,
        };
        let root = std::path::absolute(folder.root()).unwrap_or_else(|_| folder.root().to_owned());
        replicas.broadcast(root.to_string_lossy().into_owned().into_bytes()).map_err(Error::from)?;
        Ok((folder, named.is_none()))
    }
}

/// Tells what is trained, where, and by how many.
fn tell(planned: &Planned, folder: &RunFolder, replicas: &Replicas, ui: &Ui) -> Result<()> {
    let plan = &planned.plan;
    ui.say(&format!(
        "{}: {} on {} clips ({} windows), {} steps of {}, rank {} on {} modules, stages {}",
        plan.run.name,
        plan.model.name,
        plan.dataset.clips,
        plan.dataset.items,
        plan.train.steps,
        step_size(&plan.train),
        plan.adapter.ranks(),
        planned.targets.len(),
        plan.devices.stages.join(" + "),
    ));
    if replicas.world() > 1 {
        let each = match plan.train.tokens_per_step {
            Some(_) => "each with its share of a step's micro-batches".to_owned(),
            None => {
                let (most, all) = (plan.micro_batches_of_replica(), plan.train.accumulate);
                format!("each with {most} of a step's {all} micro-batches at most")
            }
        };
        let (world, carrier) = (replicas.world(), replicas.carrier());
        let names: String = replicas.names().iter().map(|name| format!("\n  {name}")).collect();
        ui.say(&format!("{world} replicas, {each}, exchange gradients over {carrier}:{names}"));
    }
    let experts = experts(plan)?;
    ui.say(&format!("{}\n{experts}run folder: {}", buckets(planned), folder.root().display()));
    Ok(())
}

/// How long a step is, in words.
fn step_size(train: &TrainConfig) -> String {
    match train.tokens_per_step {
        Some(tokens) => format!("{tokens} tokens, in batches of {}", train.batch),
        None => format!("{} x {}", train.accumulate, train.batch),
    }
}

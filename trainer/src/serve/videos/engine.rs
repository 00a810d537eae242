//! The thread that makes clips, one after the other, whenever their devices are free.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::basis::{Basis, split_name};
use super::job::{Job, JobError};
use super::resident::{Order, Resident, make};
use super::{Current, Made, cancelled, webhook};
use crate::error::{Error, Result};
use crate::serve::Server;
use crate::serve::reply::in_full;
use crate::watch::ui::Ui;

/// How long the thread sleeps where nothing wakes it.
const PAUSE: Duration = Duration::from_millis(300);

/// Makes clips until the process ends.
pub(in crate::serve) fn run(server: &Arc<Server>, ui: &Ui) {
    let mut resident: Option<Resident> = None;
    let mut devices: Vec<String> = Vec::new();
    loop {
        if server.cards.is_wanted() {
            resident = None;
            server.cards.take_from_clips();
        }
        let may = |job: &Job| server.cards.give_to_clips(&job.settings.devices);
        match server.videos.next(may) {
            Ok(Some((job, current))) => {
                if devices != job.settings.devices {
                    resident = None;
                    devices.clone_from(&job.settings.devices);
                }
                let made = one(server, &mut resident, &job, &current, ui);
                match server.videos.ended(&job.id, made) {
                    Ok(job) => job.into_iter().for_each(webhook::send),
                    Err(error) => ui.note(&in_full(&error)),
                }
            }
            Ok(None) => server.videos.wait(PAUSE),
            Err(error) => {
                ui.note(&in_full(&error));
                server.videos.wait(PAUSE);
            }
        }
    }
}

/// Makes one clip; whatever goes wrong ends this clip alone.
fn one(
    server: &Server,
    resident: &mut Option<Resident>,
    job: &Job,
    current: &Current,
    ui: &Ui,
) -> std::result::Result<Made, JobError> {
    let begun = Instant::now();
    let done = catch_unwind(AssertUnwindSafe(|| attempt(server, resident, job, current, ui)));
    let failed = |message: String| JobError { code: "failed".into(), message };
    match done {
        Ok(Ok(file)) => Ok(Made { file, seconds: begun.elapsed().as_secs_f64() }),
        Ok(Err(Error::Interrupted)) => Err(cancelled()),
        Ok(Err(error)) => {
            // Half of a change may have been made to them.
            *resident = None;
            Err(failed(in_full(&error)))
        }
        Err(_) => {
            *resident = None;
            Err(failed("the program failed at this clip; its terminal says where".into()))
        }
    }
}

fn attempt(
    server: &Server,
    resident: &mut Option<Resident>,
    job: &Job,
    current: &Current,
    ui: &Ui,
) -> Result<String> {
    let name = split_name(&job.model).0;
    let basis = Basis::of(server, name)
        .map_err(|refusal| Error::Setting { key: "model".into(), why: refusal.message().to_owned() })?;
    let folder = server.videos.folder_of(&job.id);
    let order = Order {
        job,
        basis,
        folder: &folder,
        tiny_decoder: server.tiny_decoder.as_deref(),
        interrupt: &current.interrupt,
        made: &current.made,
    };
    let path = make(resident, order, ui)?;
    Ok(path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default())
}

//! Tells whoever asked for a clip that it is over: the job is posted to the address that came with it.

use super::job::Job;
use crate::watch::ui::complain;
use crate::watch::webhook::post;

const ATTEMPTS: u32 = 3;

/// Sends `job` to its webhook, where it has one, on a thread of its own.
pub(super) fn send(job: Job) {
    let Some(url) = job.webhook.clone() else { return };
    std::thread::spawn(move || {
        let Ok(body) = serde_json::to_string(&job) else { return };
        if let Err(error) = post(&url, &body, ATTEMPTS) {
            complain(&format!("the webhook of {} was not reached: {error}", job.id));
        }
    });
}

//! Tells whoever asked for a clip that it is over: the job is posted to the address that came with it.

use std::time::Duration;

use ureq::Agent;

use super::job::Job;
use crate::watch::ui::complain;

/// Attempts, each twice as long after the one before.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(10);

/// Sends `job` to its webhook, where it has one, on a thread of its own.
pub(super) fn send(job: Job) {
    let Some(url) = job.webhook.clone() else { return };
    std::thread::spawn(move || {
        let agent: Agent =
            Agent::config_builder().timeout_global(Some(TIMEOUT)).max_redirects(0).build().into();
        let Ok(body) = serde_json::to_string(&job) else { return };
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                std::thread::sleep(PAUSE * 2u32.pow(attempt - 1));
            }
            match agent.post(&url).header("content-type", "application/json").send(&body) {
                Ok(_) => return,
                Err(error) if attempt + 1 == ATTEMPTS => {
                    complain(&format!("the webhook of {} was not reached: {error}", job.id));
                }
                Err(_) => {}
            }
        }
    });
}

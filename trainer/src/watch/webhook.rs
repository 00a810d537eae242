//! Tells an address what happens, as JSON over HTTP: `run` for a training run, `serve` for clips.

use std::sync::Mutex;
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::http::Uri;

use super::ui::complain;
use crate::error::{Error, Result};

/// Attempts for an event, the pause before each twice as long as the one before.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(10);

/// An address that is told events in their order, on a thread of its own; dropped, it waits until the last one is sent or given
/// up. It has no `Debug` of its address, which may hold a secret.
pub struct Webhook {
    events: Mutex<Option<Sender<Value>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("Webhook")
    }
}

impl Webhook {
    /// For the address `url`; `option` names where it comes from. Nothing is sent yet.
    ///
    /// # Errors
    /// What is no address of HTTP.
    pub fn new(url: &str, option: &str) -> Result<Self> {
        let uri: Option<Uri> = url.parse().ok();
        let host = uri.filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")));
        let Some(host) = host.and_then(|uri| uri.host().map(str::to_owned)) else {
            let why = "is no address: it begins with http:// or https:// and a host".into();
            return Err(Error::Setting { key: option.into(), why });
        };
        let (events, coming) = mpsc::channel::<Value>();
        let url = url.to_owned();
        let thread = std::thread::spawn(move || {
            // Once an address was not reached it has one attempt for each event, so that a run's end does not wait for it.
            let mut attempts = ATTEMPTS;
            for event in coming {
                match post(&url, &event.to_string(), attempts) {
                    Ok(()) => attempts = ATTEMPTS,
                    Err(why) => {
                        complain(&format!(
                            "the webhook at {host} was not told \"{}\": {why}",
                            name_of(&event)
                        ));
                        attempts = 1;
                    }
                }
            }
        });
        Ok(Self { events: Mutex::new(Some(events)), thread: Mutex::new(Some(thread)) })
    }

    /// Sends `event` when those before it are sent.
    pub fn tell(&self, event: Value) {
        let events = self.events.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // A thread that is gone has complained.
        events.iter().for_each(|events| drop(events.send(event.clone())));
    }
}

impl Drop for Webhook {
    fn drop(&mut self) {
        drop(self.events.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).take());
        let thread = self.thread.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        thread.into_iter().for_each(|thread| drop(thread.join()));
    }
}

fn name_of(event: &Value) -> &str {
    event["event"].as_str().unwrap_or("an event")
}

/// Posts `body`, JSON, to `url` in at most `attempts`.
///
/// # Errors
/// Why the last attempt failed, without the address.
pub(crate) fn post(url: &str, body: &str, attempts: u32) -> std::result::Result<(), String> {
    let agent: Agent = Agent::config_builder().timeout_global(Some(TIMEOUT)).max_redirects(0).build().into();
    let mut why = String::new();
    for attempt in 0..attempts {
        if attempt > 0 {
            std::thread::sleep(PAUSE * 2u32.pow(attempt - 1));
        }
        match agent.post(url).header("content-type", "application/json").send(body) {
            Ok(_) => return Ok(()),
            Err(ureq::Error::BadUri(_)) => return Err("the address cannot be used".to_owned()),
            Err(error) => why = error.to_string(),
        }
    }
    Err(why)
}

//! Captions by a model behind an OpenAI-compatible endpoint that the user names.

use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use data::Picture;
use serde::Deserialize;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::Uri;

use crate::error::{Error, Result};
use crate::watch::interrupt::Interrupt;

/// What is asked where the user asks nothing else.
pub const PROMPT: &str = "These pictures are frames of one clip, in order of time. Describe the clip for training a video model, in one \
    paragraph of plain English: the subject, what happens, the surroundings, the light, and how the camera moves. Answer with the \
    description alone.";
/// The longest side in pixels of the pictures that are sent.
pub const LONGEST_SIDE: u32 = 1024;
/// Quality of their JPEG files.
const QUALITY: u8 = 85;
/// Attempts for a clip.
const ATTEMPTS: u32 = 5;
/// The pause after the first failed attempt; each next one is twice as long.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause that is honoured when an answer asks for one.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// A large model on a small machine takes minutes for an answer.
const LONGEST_ANSWER: Duration = Duration::from_secs(600);
/// The largest answer that is read, in bytes.
const MOST_BYTES: u64 = 4 << 20;
/// Characters of an error's text that are shown.
const SHOWN: usize = 300;

/// The endpoint, and what it is asked. It has no `Debug`, so that the key is never printed.
pub struct Endpoint {
    agent: Agent,
    url: String,
    host: String,
    model: String,
    prompt: String,
    key: Option<String>,
}

/// An answer of `/v1/chat/completions`; other keys are ignored.
#[derive(Deserialize)]
struct Completion {
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    message: Message,
}

#[derive(Deserialize)]
struct Message {
    content: Option<String>,
}

/// What became of an attempt.
enum Attempt {
    Caption(String),
    /// It may work the next time, at the earliest after this pause.
    Failed(String, Option<Duration>),
    /// It will not work.
    Refused(String),
}

fn refused(why: impl Into<String>) -> Error {
    Error::Setting { key: "--endpoint".into(), why: why.into() }
}

impl Endpoint {
    /// The endpoint at `address`, up to `/v1` or with `/chat/completions`; makes no request. `key` is sent as a bearer token.
    ///
    /// # Errors
    /// An address that is none, or that has a password in it, and a key that cannot be sent.
    pub fn new(address: &str, model: &str, prompt: &str, key: Option<String>) -> Result<Self> {
        let uri: Option<Uri> = address.parse().ok();
        let uri = uri.filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")));
        let Some(authority) = uri.as_ref().and_then(Uri::authority) else {
            return Err(refused(format!(
                "\"{address}\" is no address: write http:// or https:// and a host, such as http://localhost:8000/v1"
            )));
        };
        if authority.as_str().contains('@') {
            return Err(refused("an address must not contain a password: name a variable with --key-env"));
        }
        if key.as_ref().is_some_and(|key| !key.bytes().all(|byte| byte.is_ascii_graphic())) {
            let why = "the variable holds a line break or another character that no key has".into();
            return Err(Error::Setting { key: "--key-env".into(), why });
        }
        let base = address.trim_end_matches('/');
        let url = match uri.as_ref().map(Uri::path) {
            Some(path) if path.trim_end_matches('/').ends_with("/chat/completions") => base.to_owned(),
            Some("" | "/") => format!("{base}/v1/chat/completions"),
            _ => format!("{base}/chat/completions"),
        };
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("tandem/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(LONGEST_ANSWER))
            .timeout_recv_body(Some(LONGEST_ANSWER))
            // Pictures and key are for this address and no other.
            .max_redirects(0)
            .build()
            .into();
        let (host, model, prompt) = (authority.to_string(), model.to_owned(), prompt.to_owned());
        Ok(Self { agent, url, host, model, prompt, key })
    }

    /// Host and port.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// A caption of the clip with these frames, in one line.
    ///
    /// # Errors
    /// An endpoint that refuses, that gives no caption, or that is not reached in several attempts; and [`Error::Interrupted`].
    pub fn caption(&self, frames: &[Picture], interrupt: &Interrupt) -> Result<String> {
        let body = self.body(frames)?.to_string();
        let mut failures = 0;
        loop {
            interrupt.check()?;
            let (why, wait) = match self.attempt(&body) {
                Attempt::Caption(caption) => return Ok(caption),
                Attempt::Refused(why) => return Err(refused(format!("{}: {why}", self.url))),
                Attempt::Failed(why, wait) => (why, wait),
            };
            failures += 1;
            if failures == ATTEMPTS {
                let why = format!("{}: {why}, {ATTEMPTS} times; what was written is kept", self.url);
                return Err(refused(why));
            }
            let pause = PAUSE * 2u32.pow(failures - 1);
            rest(wait.map_or(pause, |wait| wait.clamp(pause, LONGEST_PAUSE)), interrupt)?;
        }
    }

    /// What is sent.
    fn body(&self, frames: &[Picture]) -> Result<Value> {
        let mut content = vec![json!({ "type": "text", "text": self.prompt })];
        for frame in frames {
            let jpeg = BASE64_STANDARD.encode(frame.jpeg(QUALITY)?);
            let url = format!("data:image/jpeg;base64,{jpeg}");
            content.push(json!({ "type": "image_url", "image_url": { "url": url } }));
        }
        let messages = json!([{ "role": "user", "content": content }]);
        Ok(json!({ "model": self.model, "stream": false, "messages": messages }))
    }

    fn attempt(&self, body: &str) -> Attempt {
        let mut request = self.agent.post(&self.url).header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = match request.send(body) {
            Ok(response) => response,
            Err(error) => return Attempt::Failed(format!("no connection ({error})"), None),
        };
        let status = response.status().as_u16();
        let header = response.headers().get("retry-after").and_then(|value| value.to_str().ok());
        let wait = header.and_then(|seconds| seconds.trim().parse().ok()).map(Duration::from_secs);
        let text = match response.body_mut().with_config().limit(MOST_BYTES).read_to_vec() {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => return Attempt::Failed(format!("the answer breaks off ({error})"), None),
        };
        match status {
            200..=299 => captioned(&text),
            401 | 403 => Attempt::Refused(format!(
                "the endpoint does not answer this key (status {status}): name the variable that holds a valid one with --key-env"
            )),
            408 | 429 | 500..=599 => Attempt::Failed(format!("the endpoint answered {status}"), wait),
            300..=399 => {
                let to =
                    response.headers().get("location").and_then(|place| place.to_str().ok()).unwrap_or("?");
                Attempt::Refused(format!(
                    "the endpoint sends us on to {to}: name that address, if it is meant"
                ))
            }
            _ => Attempt::Refused(format!("the endpoint answered {status}: {}", shortened(&text))),
        }
    }
}

/// The caption in an answer.
fn captioned(text: &str) -> Attempt {
    let completion: Completion = match serde_json::from_str(text) {
        Ok(completion) => completion,
        Err(error) => {
            let why = format!("the answer is no chat completion ({error}): {}", shortened(text));
            return Attempt::Refused(why);
        }
    };
    let content = completion.choices.into_iter().next().and_then(|choice| choice.message.content);
    let caption = content.map(|content| in_one_line(&content)).filter(|caption| !caption.is_empty());
    match caption {
        Some(caption) => Attempt::Caption(caption),
        None => Attempt::Refused("the answer holds no text: is it a model that sees pictures?".into()),
    }
}

/// What a model says behind its reasoning, in one line.
fn in_one_line(content: &str) -> String {
    let said = content.rsplit_once("</think>").map_or(content, |(_, said)| said);
    said.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn shortened(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= SHOWN { line } else { line.chars().take(SHOWN).chain("...".chars()).collect() }
}

/// Waits, and ends early when the user asks to stop.
fn rest(pause: Duration, interrupt: &Interrupt) -> Result<()> {
    const PIECE: Duration = Duration::from_millis(100);
    for _ in 0..pause.as_millis() / PIECE.as_millis() {
        interrupt.check()?;
        std::thread::sleep(PIECE);
    }
    Ok(())
}

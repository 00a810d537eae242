//! `tandem serve` on a desk, and a client of it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use ureq::Agent;

use crate::desk::Desk;

/// A server on a desk, killed when it is dropped.
pub struct Server {
    child: Child,
    pub port: u16,
    pub token: String,
}

/// The status of a request that was not read to its end.
pub const HUNG_UP: u16 = 0;

/// An answer: status and body.
pub struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    #[track_caller]
    pub fn ok(self) -> Value {
        let value = self.json();
        assert!((200..300).contains(&self.status), "{}: {value}", self.status);
        value
    }

    #[track_caller]
    pub fn refused(&self, status: u16, told: &str) {
        let message = self.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
        assert_eq!(self.status, status, "{message}");
        assert!(message.contains(told), "the message lacks \"{told}\": {message}");
    }
}

impl Server {
    pub fn on(desk: &Desk) -> Self {
        let words =
            ["serve", "--json", "--port", "0", "--recipes", ".", "--data", "clips", "--models", "model"];
        let mut child = desk.command(&words).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let told: Value = serde_json::from_str(&line).unwrap();
        let port = u16::try_from(told["port"].as_u64().unwrap()).unwrap();
        Self { child, port, token: told["token"].as_str().unwrap().to_owned() }
    }

    pub fn call(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let agent: Agent =
            Agent::config_builder().http_status_as_error(false).max_redirects(0).build().into();
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("http://localhost:{}{path}", self.port));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = match agent.run(request.body(body).unwrap()) {
            Ok(response) => response,
            // It was hung up on in the middle of its body.
            Err(ureq::Error::Io(_)) => return Answer { status: HUNG_UP, body: Vec::new() },
            Err(error) => panic!("{method} {path}: {error}"),
        };
        let status = response.status().as_u16();
        Answer { status, body: response.body_mut().read_to_vec().unwrap() }
    }

    pub fn get(&self, path: &str) -> Answer {
        self.call("GET", path, &[("authorization", &self.bearer())], b"")
    }

    pub fn send(&self, method: &str, path: &str, body: &Value) -> Answer {
        let headers = [("authorization", self.bearer()), ("content-type", "application/json".to_owned())];
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        self.call(method, path, &headers, body.to_string().as_bytes())
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, body)
    }

    pub fn form(&self, path: &str, fields: &[(&str, &str)]) -> Answer {
        let part = |(name, value): &(&str, &str)| {
            format!("--edge\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
        };
        let body: String = fields.iter().map(part).collect::<String>() + "--edge--\r\n";
        let headers = [
            ("authorization", self.bearer()),
            ("content-type", "multipart/form-data; boundary=edge".to_owned()),
        ];
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        self.call("POST", path, &headers, body.as_bytes())
    }

    pub fn bearer(&self) -> String {
        format!("Bearer {}", self.token)
    }

    /// The run `name`, once `is_it`.
    #[track_caller]
    pub fn run_that(&self, name: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        until(|| self.get(&format!("/api/runs/{name}")).json()["run"].clone(), is_it)
    }

    /// The bytes of the clip that `body` asks for.
    #[track_caller]
    pub fn clip(&self, body: &Value) -> Vec<u8> {
        let answer = self.post("/v1/videos/sync", body);
        assert_eq!(answer.status, 200, "{}", answer.json());
        answer.body
    }

    /// Bytes of memory that it has.
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
    }

    /// Kills it at once, as the system would.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[track_caller]
pub fn until(look: impl Fn() -> Value, is_it: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let seen = look();
        if is_it(&seen) {
            return seen;
        }
        assert!(begun.elapsed() < Duration::from_secs(120), "it did not come to that: {seen}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

//! A fake hub on this machine that behaves as a test says: serves files, disconnects, sends wrong data, refuses.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// What was asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// Path and query.
    pub path: String,
    /// By lower-case name.
    pub headers: BTreeMap<String, String>,
}

impl Request {
    /// The first byte of the range that is asked for.
    pub fn from(&self) -> Option<usize> {
        self.headers.get("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// What is answered.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Status.
    pub status: u16,
    /// Headers besides the length.
    pub headers: Vec<(String, String)>,
    /// What is sent before the connection is closed.
    pub body: Vec<u8>,
    /// What is said to be sent.
    pub length: usize,
}

impl Reply {
    /// Nothing but a status.
    pub fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), length: 0 }
    }

    /// A whole body.
    pub fn body(body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self { length: body.len(), body, ..Self::status(200) }
    }

    /// With a header more.
    pub fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    /// Breaks off after `count` bytes.
    pub fn cut(mut self, count: usize) -> Self {
        self.body.truncate(count);
        self
    }
}

/// A repository that the server has.
#[derive(Debug, Clone, Default)]
pub struct Repository {
    /// Path and bytes.
    pub files: BTreeMap<String, Vec<u8>>,
}

fn is_small(name: &str) -> bool {
    name.ends_with("config.json")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The commit of every repository here.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

impl Repository {
    /// All files below `folder`.
    pub fn of(folder: &Path) -> Self {
        let mut files = BTreeMap::new();
        let mut open = vec![folder.to_owned()];
        while let Some(place) = open.pop() {
            for item in std::fs::read_dir(place).unwrap() {
                let path = item.unwrap().path();
                if path.is_dir() {
                    open.push(path);
                } else {
                    let name = path.strip_prefix(folder).unwrap().to_str().unwrap().replace('\\', "/");
                    files.insert(name, std::fs::read(&path).unwrap());
                }
            }
        }
        Self { files }
    }

    /// The hash that the hub announces for a file: git's for configs, which are small and in git; for others the SHA-256.
    pub fn hash(&self, name: &str) -> String {
        let bytes = &self.files[name];
        match is_small(name) {
            true => hex(&Sha1::digest([format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat())),
            false => hex(&Sha256::digest(bytes)),
        }
    }

    /// The hub's list.
    pub fn listing(&self) -> Reply {
        let sibling = |(name, bytes): (&String, &Vec<u8>)| {
            // Of a large file git has a pointer, which is another blob.
            let blob = &self.hash(name)[..40];
            let mut sibling = json!({ "rfilename": name, "size": bytes.len(), "blobId": blob });
            if !is_small(name) {
                sibling["lfs"] =
                    json!({ "sha256": self.hash(name), "size": bytes.len(), "pointerSize": 130 });
            }
            sibling
        };
        let siblings: Vec<_> = self.files.iter().map(sibling).collect();
        Reply::body(json!({ "id": "a/b", "sha": COMMIT, "siblings": siblings }).to_string())
    }

    /// What an honest hub answers.
    pub fn honest(&self, request: &Request) -> Reply {
        if ["/api/models/", "/api/datasets/"].iter().any(|start| request.path.starts_with(start)) {
            return self.listing();
        }
        let name = request.path.split_once(&format!("/resolve/{COMMIT}/")).map(|(_, name)| name);
        let Some(bytes) = name.and_then(|name| self.files.get(name)) else { return Reply::status(404) };
        match request.from() {
            None => Reply::body(bytes.clone()),
            Some(from) if from >= bytes.len() => Reply::status(416),
            Some(from) => {
                let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
                Reply { status: 206, ..Reply::body(&bytes[from..]) }.with("Content-Range", range)
            }
        }
    }
}

/// A server on a port of its own; it ends with the process.
pub struct Server {
    /// `http://...`.
    pub address: String,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Answers each request with what `answer` says to it and to the number of requests for the same path before it.
    pub fn start(answer: impl Fn(&Request, usize) -> Reply + Send + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::<Request>::new()));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Some(request) = read(&stream) else { continue };
                let before = {
                    let mut log = log.lock().unwrap();
                    log.push(request.clone());
                    log.iter().filter(|other| other.path == request.path).count() - 1
                };
                // The client may have disconnected, which is fine.
                let _ = write(&stream, &answer(&request, before));
            }
        });
        Self { address, asked }
    }

    /// All requests so far.
    pub fn asked(&self) -> Vec<Request> {
        self.asked.lock().unwrap().clone()
    }

    /// Requests so far for paths that end in `end`.
    pub fn asked_for(&self, end: &str) -> Vec<Request> {
        self.asked().into_iter().filter(|request| request.path.ends_with(end)).collect()
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers = lines.take_while(|line| !line.is_empty()).filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_lowercase(), value.trim().to_owned()))
    });
    Some(Request { path, headers: headers.collect() })
}

fn write(mut stream: &TcpStream, reply: &Reply) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 {} x\r\nConnection: close\r\nContent-Length: {}\r\n",
        reply.status, reply.length
    )?;
    for (name, value) in &reply.headers {
        write!(stream, "{name}: {value}\r\n")?;
    }
    stream.write_all(b"\r\n")?;
    stream.write_all(&reply.body)?;
    stream.flush()
}

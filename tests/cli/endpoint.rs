//! An HTTP endpoint on this machine, with answers made beforehand.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::Value;

/// What the endpoint does with a request.
pub enum Reply {
    /// A status with a text.
    Status(u16, String),
    /// The connection is closed without an answer.
    Drop,
}

/// What was sent.
pub struct Request {
    pub line: String,
    pub headers: String,
    pub body: Value,
}

/// An endpoint on this machine that gives `replies` in turn, and what it was sent.
pub struct Endpoint {
    /// Its address with `/v1`.
    pub address: String,
    pub seen: Arc<Mutex<Vec<Request>>>,
}

impl Endpoint {
    pub fn new(replies: Vec<Reply>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = format!("http://{}/v1", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let known = Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut replies = replies.into_iter();
            for stream in listener.incoming() {
                serve(&mut stream.unwrap(), &mut replies, &known);
            }
        });
        Self { address, seen }
    }

    pub fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

/// Answers one request, and closes the connection.
fn serve(stream: &mut TcpStream, replies: &mut impl Iterator<Item = Reply>, seen: &Mutex<Vec<Request>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut line, mut headers) = (String::new(), String::new());
    reader.read_line(&mut line).unwrap();
    loop {
        let before = headers.len();
        reader.read_line(&mut headers).unwrap();
        if headers[before..].trim().is_empty() {
            break;
        }
    }
    let headers = headers.to_lowercase();
    let length = headers.lines().find_map(|line| line.strip_prefix("content-length:")).unwrap();
    let mut body = vec![0; length.trim().parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    seen.lock().unwrap().push(Request { line, headers, body: serde_json::from_slice(&body).unwrap() });
    match replies.next().unwrap() {
        Reply::Drop => {}
        Reply::Status(status, text) => {
            let head =
                format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", text.len());
            stream.write_all((head + &text).as_bytes()).unwrap();
        }
    }
}

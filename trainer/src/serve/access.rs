//! Who may use the server: whoever has its token, in a header or in the cookie that the page gets for it.

use std::path::Path;
use std::sync::Arc;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::Server;
use super::listener::Work;
use super::reply::Refusal;
use crate::bytes::hex;
use crate::error::{Error, Result};

/// The name of the cookie.
const COOKIE: &str = "tandem_token";
/// Bytes of a token that is made here.
const TOKEN: usize = 24;

/// Who may use the server.
#[derive(Debug, Clone)]
pub enum Access {
    /// Whoever has this token.
    Token(String),
    /// Everyone who reaches it: on this host alone.
    Open,
}

impl Access {
    /// The token in the file `path`, which is made with a new one where there is none, for its owner alone.
    ///
    /// # Errors
    /// A file that cannot be read or written, and an empty one.
    pub fn of_file(path: &Path) -> Result<Self> {
        let io = |action| {
            let path = path.to_owned();
            move |source| Error::Io { action, path, source }
        };
        match std::fs::read_to_string(path) {
            Ok(text) if text.trim().is_empty() => {
                let why = format!("{} is empty", path.display());
                Err(Error::Setting { key: "--token-file".into(), why })
            }
            Ok(text) => Ok(Self::Token(text.trim().to_owned())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let mut bytes = [0; TOKEN];
                getrandom::fill(&mut bytes)
                    .map_err(|error| io("make a token in")(std::io::Error::other(error.to_string())))?;
                let token = hex(&bytes);
                write_private(path, &token).map_err(io("write"))?;
                Ok(Self::Token(token))
            }
            Err(error) => Err(io("read")(error)),
        }
    }

    /// Whether `given` is the token. Takes the same time for every wrong one.
    fn accepts(&self, given: Option<&str>) -> bool {
        match (self, given) {
            (Self::Open, _) => true,
            (Self::Token(token), Some(given)) => Sha256::digest(token) == Sha256::digest(given),
            (Self::Token(_), None) => false,
        }
    }
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    std::io::Write::write_all(&mut options.open(path)?, text.as_bytes())
}

/// Lets a request through that may be met, and adds what browsers are to know about the answer.
pub(super) async fn guard(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let mut response = match refused(&server, &request) {
        Some(refusal) => refusal.into_response(),
        None => {
            let work = request.extensions().get::<ConnectInfo<Work>>().map(|work| work.0.begin());
            let response = next.run(request).await;
            drop(work);
            response
        }
    };
    const POLICY: &str =
        "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'";
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ] {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

/// Why a request is not met, if it is not.
fn refused(server: &Server, request: &Request) -> Option<Refusal> {
    let (headers, path) = (request.headers(), request.uri().path());
    // Another site's name that was made to point here.
    if server.is_local && !is_local(headers) {
        return Some(Refusal::new(StatusCode::MISDIRECTED_REQUEST, "this server is called localhost"));
    }
    let is_public = path == "/" || path == "/login" || path == "/healthz" || path.starts_with("/static/");
    if is_public {
        return None;
    }
    if server.access.accepts(bearer(headers)) && bearer(headers).is_some() {
        return None;
    }
    if !is_known(server, headers) {
        let message = "the token is missing or wrong: send it as \"Authorization: Bearer TOKEN\"; `tandem serve` prints it";
        return Some(Refusal::new(StatusCode::UNAUTHORIZED, message));
    }
    // A cookie comes by itself, also with what another site's page sends.
    let changes = ![Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method());
    (changes && is_from_elsewhere(headers))
        .then(|| Refusal::new(StatusCode::FORBIDDEN, "the request comes from another site's page"))
}

/// Whether whoever sends these headers may use the server.
pub(super) fn is_known(server: &Server, headers: &HeaderMap) -> bool {
    server.access.accepts(bearer(headers)) || server.access.accepts(cookie(headers))
}

/// The answer to someone who shows `token`: the cookie and the way to the page, or a refusal.
pub(super) fn login(server: &Server, token: &str) -> Response {
    if !server.access.accepts(Some(token)) {
        return Refusal::new(StatusCode::UNAUTHORIZED, "this is not the token; `tandem serve` prints it")
            .into_response();
    }
    let mut response = StatusCode::SEE_OTHER.into_response();
    response.headers_mut().insert(header::LOCATION, HeaderValue::from_static("/"));
    let cookie = format!("{COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/; Max-Age=31536000");
    if let Ok(cookie) = HeaderValue::from_str(&cookie) {
        response.headers_mut().insert(header::SET_COOKIE, cookie);
    }
    response
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ")
}

fn cookie(headers: &HeaderMap) -> Option<&str> {
    let cookies = headers.get(header::COOKIE)?.to_str().ok()?;
    cookies.split(';').find_map(|cookie| cookie.trim().strip_prefix(COOKIE)?.strip_prefix('='))
}

/// Whether the request was sent to a name of this host.
fn is_local(headers: &HeaderMap) -> bool {
    let Some(Ok(host)) = headers.get(header::HOST).map(HeaderValue::to_str) else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.chars().all(|c| c.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether a browser says that another site's page sent it.
fn is_from_elsewhere(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let host = text(header::HOST).unwrap_or_default();
    match text(header::ORIGIN) {
        Some(origin) => origin.split_once("://").is_none_or(|(_, from)| from != host),
        None => headers.get("sec-fetch-site").is_some_and(|site| site != "same-origin" && site != "none"),
    }
}

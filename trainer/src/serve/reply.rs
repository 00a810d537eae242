//! Answers: JSON, and errors in the form that clients of OpenAI's API expect.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// A request that is not met, and why.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    message: String,
    param: Option<String>,
}

/// The answer to a request.
pub(super) type Answer = Result<Response, Refusal>;

impl Refusal {
    /// With `status`, for `message`.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None }
    }

    /// 400: the request says something that cannot be.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 400 for the field `param`.
    pub fn field(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::bad(format!("{param}: {}", message.into())) }
    }

    /// 404: there is no `what`.
    pub fn missing(what: impl std::fmt::Display) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("there is no {what}"))
    }

    /// 409: not in the present state.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    /// What went wrong, in words.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl From<crate::Error> for Refusal {
    fn from(error: crate::Error) -> Self {
        Self::bad(in_full(&error))
    }
}

/// An error with its causes; many of ours include their cause.
pub(super) fn in_full(error: &crate::Error) -> String {
    let (mut text, mut cause) = (error.to_string(), std::error::Error::source(error));
    while let Some(next) = cause {
        let words = next.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = next.source();
    }
    text
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self { status, message, param } = self;
        let kind = if status.is_server_error() { "server_error" } else { "invalid_request_error" };
        let error =
            serde_json::json!({ "message": message, "type": kind, "param": param, "code": status.as_u16() });
        json_with(status, &serde_json::json!({ "error": error }))
    }
}

/// 200 with `value`.
pub(super) fn json(value: &impl Serialize) -> Response {
    json_with(StatusCode::OK, value)
}

/// `value` with another status.
pub(super) fn json_with(status: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(bytes) => {
            let mut response = Response::new(Body::from(bytes));
            *response.status_mut() = status;
            let kind = HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            response
        }
        // Only a map whose keys are no strings cannot be written.
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// Reads a JSON object out of a body.
pub(super) fn parsed<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(bytes)
        .map_err(|error| Refusal::bad(format!("the body is not as expected: {error}")))
}

/// Does `work`, which may take a while, on a thread that may wait.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(_) => Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the server failed at this request")),
    }
}

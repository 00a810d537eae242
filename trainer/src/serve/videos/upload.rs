//! The body of a request: JSON, or a form with a picture. Nothing larger than its bounds is read to its end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::{Bytes, to_bytes};
use axum::extract::{FromRequest, Multipart, Request};
use axum::http::{StatusCode, header};
use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::{Map, Value};

use super::fields::Fields;
use crate::error::Error;
use crate::serve::reply::Refusal;

/// The most bytes of a body in JSON, of a field of a form, and of a picture.
const JSON: usize = 48 << 20;
const FIELD: usize = 64 << 10;
const PICTURE: usize = 32 << 20;
/// The most fields of a form.
const FIELDS: usize = 100;
/// How long an upload may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// The fields of a body, and the picture that is now in `folder`, if there is one.
///
/// # Errors
/// 400 for what cannot be read, 408 for what takes too long, 413 for what is too large.
pub(super) async fn read(request: Request, folder: &Path) -> Result<(Fields, Option<PathBuf>), Refusal> {
    let late = || Refusal::new(StatusCode::REQUEST_TIMEOUT, "the upload took longer than two minutes");
    tokio::time::timeout(PATIENCE, read_all(request, folder)).await.map_err(|_| late())?
}

async fn read_all(request: Request, folder: &Path) -> Result<(Fields, Option<PathBuf>), Refusal> {
    let kind =
        request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let (map, uploaded) = match kind.split(';').next().unwrap_or_default().trim() {
        "multipart/form-data" => form(request).await?,
        "application/json" => {
            let large = |_| Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "the body has more than 48 MiB");
            let bytes = to_bytes(request.into_body(), JSON).await.map_err(large)?;
            match serde_json::from_slice(&bytes) {
                Ok(Value::Object(map)) => (map, None),
                Ok(_) => return Err(Refusal::bad("the body must be a JSON object")),
                Err(error) => return Err(Refusal::bad(format!("the body is no JSON: {error}"))),
            }
        }
        _ => {
            let why = "the body must be application/json or multipart/form-data";
            return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, why));
        }
    };
    let mut fields = Fields::of(Value::Object(map))?;
    let given = match uploaded {
        Some(bytes) => Some(bytes),
        None => in_fields(&mut fields)?,
    };
    let picture = given.map(|bytes| keep(&bytes, folder)).transpose()?;
    Ok((fields, picture))
}

/// The fields of a form, and the bytes of its file.
async fn form(request: Request) -> Result<(Map<String, Value>, Option<Bytes>), Refusal> {
    let unreadable = |error: String| Refusal::bad(format!("the form cannot be read: {error}"));
    let form = Multipart::from_request(request, &()).await;
    let mut form = form.map_err(|error| unreadable(error.body_text()))?;
    let (mut fields, mut picture) = (Map::new(), None);
    while let Some(mut field) = form.next_field().await.map_err(|error| unreadable(error.body_text()))? {
        let name = field.name().unwrap_or_default().to_owned();
        let is_file = field.file_name().is_some();
        let most = if is_file { PICTURE } else { FIELD };
        let mut bytes = Vec::new();
        while let Some(chunk) = field.chunk().await.map_err(|error| unreadable(error.body_text()))? {
            if bytes.len() + chunk.len() > most {
                let why = format!("{name} has more than {most} bytes");
                return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, why));
            }
            bytes.extend_from_slice(&chunk);
        }
        if is_file {
            if name != "input_reference" || picture.is_some() {
                return Err(Refusal::field(
                    &name,
                    "is not supported here: one file, input_reference, is taken",
                ));
            }
            picture = Some(Bytes::from(bytes));
            continue;
        }
        let text = String::from_utf8(bytes).map_err(|_| Refusal::field(&name, "must be UTF-8 text"))?;
        // Objects come as JSON in a text.
        let value = match name.as_str() {
            "extra_body" | "extra_params" | "video_params" | "image_reference" => serde_json::from_str(&text)
                .map_err(|error| Refusal::field(&name, format!("is no JSON: {error}")))?,
            _ => Value::String(text),
        };
        if fields.len() >= FIELDS || fields.insert(name.clone(), value).is_some() {
            return Err(Refusal::field(&name, "comes twice, or there are too many fields"));
        }
    }
    Ok((fields, picture))
}

/// The picture that a field holds as a `data:` address. Nothing is fetched from elsewhere.
fn in_fields(fields: &mut Fields) -> Result<Option<Bytes>, Refusal> {
    let mut found = None;
    for name in ["input_reference", "image_reference", "reference_url"] {
        let Some(value) = fields.take(name) else { continue };
        let text = match &value {
            Value::String(text) => text.as_str(),
            Value::Object(map) if map.len() == 1 => {
                map.get("image_url").and_then(Value::as_str).unwrap_or_default()
            }
            _ => "",
        };
        let bytes = text
            .strip_prefix("data:image/")
            .and_then(|rest| rest.split_once(";base64,"))
            .and_then(|(_, coded)| BASE64_STANDARD.decode(coded.trim()).ok());
        let why =
            "must be a file of the form, or a data:image/...;base64 address: this server fetches nothing";
        let bytes = bytes.ok_or_else(|| Refusal::field(name, why))?;
        if bytes.len() > PICTURE || found.replace(Bytes::from(bytes)).is_some() {
            return Err(Refusal::field(name, "is larger than 32 MiB, or a second picture"));
        }
    }
    Ok(found)
}

/// Writes a picture that can be read as one into `folder`.
fn keep(bytes: &[u8], folder: &Path) -> Result<PathBuf, Refusal> {
    let ending = match bytes {
        [0x89, b'P', b'N', b'G', ..] => "png",
        [0xff, 0xd8, ..] => "jpg",
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => "webp",
        _ => return Err(Refusal::field("input_reference", "is no PNG, JPEG or WebP")),
    };
    let path = folder.join(format!("input.{ending}"));
    let io = |source| Error::Io { action: "write", path: path.clone(), source };
    std::fs::write(&path, bytes).map_err(io)?;
    let wrong = |error: data::DataError| Refusal::field("input_reference", error.to_string());
    data::Picture::open(&path).map_err(wrong)?;
    Ok(path)
}

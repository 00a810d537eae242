//! Files of the folders, served in pieces as the reader takes them; players ask for ranges.

use std::path::Path;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::reply::{Answer, Refusal};

/// Bytes that are read at once.
const PIECE: usize = 64 << 10;

/// The kind of a file that is served, by its name; nothing else is served.
pub(super) fn kind_of(path: &Path) -> Option<&'static str> {
    let ending = path.extension()?.to_str()?.to_ascii_lowercase();
    Some(match ending.as_str() {
        "mp4" | "m4v" => "video/mp4",
        "mov" => "video/quicktime",
        "webm" => "video/webm",
        "mkv" => "video/x-matroska",
        "gif" => "image/gif",
        "webp" => "image/webp",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "safetensors" => "application/octet-stream",
        "jsonl" | "toml" | "txt" | "log" => "text/plain; charset=utf-8",
        _ => return None,
    })
}

/// Serves the file at `path`, which is in the folder `root` and of a kind that is served.
///
/// # Errors
/// 404 for everything else.
pub(super) async fn serve(root: &Path, path: &Path, headers: &HeaderMap) -> Answer {
    let missing = || Refusal::missing("such file");
    let kind = kind_of(path).ok_or_else(missing)?;
    let real = tokio::fs::canonicalize(path).await.map_err(|_| missing())?;
    let root = tokio::fs::canonicalize(root).await.map_err(|_| missing())?;
    if !real.starts_with(root) {
        return Err(missing());
    }
    let mut file = tokio::fs::File::open(real).await.map_err(|_| missing())?;
    let metadata = file.metadata().await.map_err(|_| missing())?;
    if !metadata.is_file() {
        return Err(missing());
    }
    let length = metadata.len();
    let (status, start, end) = match headers.get(header::RANGE).map(|range| range_of(range, length)) {
        None => (StatusCode::OK, 0, length),
        Some(Some((start, end))) => (StatusCode::PARTIAL_CONTENT, start, end),
        Some(None) => {
            let mut response = StatusCode::RANGE_NOT_SATISFIABLE.into_response();
            put(&mut response, header::CONTENT_RANGE, &format!("bytes */{length}"));
            return Ok(response);
        }
    };
    file.seek(std::io::SeekFrom::Start(start)).await.map_err(|_| missing())?;
    // Read only as fast as it is taken; a reader that is gone drops it.
    let pieces = stream::unfold((file, end - start), |(mut file, left)| async move {
        if left == 0 {
            return None;
        }
        let mut piece = vec![0; PIECE.min(left.try_into().unwrap_or(PIECE))];
        match file.read(&mut piece).await {
            Ok(0) => None,
            Ok(count) => {
                piece.truncate(count);
                Some((Ok::<_, std::io::Error>(Bytes::from(piece)), (file, left - count as u64)))
            }
            Err(error) => Some((Err(error), (file, 0))),
        }
    });
    let mut response = Response::new(Body::from_stream(pieces));
    *response.status_mut() = status;
    put(&mut response, header::CONTENT_TYPE, kind);
    put(&mut response, header::CONTENT_LENGTH, &(end - start).to_string());
    put(&mut response, header::ACCEPT_RANGES, "bytes");
    put(&mut response, header::CACHE_CONTROL, "private, max-age=60");
    if status == StatusCode::PARTIAL_CONTENT {
        put(&mut response, header::CONTENT_RANGE, &format!("bytes {start}-{}/{length}", end - 1));
    }
    Ok(response)
}

/// Start and end of the one range that a header asks of `length` bytes.
fn range_of(range: &HeaderValue, length: u64) -> Option<(u64, u64)> {
    let (first, last) = range.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
    let (start, end) = match (first.trim(), last.trim()) {
        ("", last) => (length.saturating_sub(last.parse().ok()?), length),
        (first, "") => (first.parse().ok()?, length),
        (first, last) => (first.parse().ok()?, last.parse::<u64>().ok()?.saturating_add(1).min(length)),
    };
    (start < end).then_some((start, end))
}

/// Sets a header whose value is plain text.
pub(super) fn put(response: &mut Response, name: header::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

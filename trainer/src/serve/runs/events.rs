//! What happens, as server-sent events: the rows of a run's log as they are written, and the lists of runs and clips.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Value, json};

use crate::serve::Server;
use crate::serve::reply::{Answer, Refusal};

/// How often a log is looked at.
const PAUSE: Duration = Duration::from_millis(500);
/// The most bytes of a log that are read at once.
const PIECE: u64 = 1 << 20;

/// A reader of a run's log.
struct Reader {
    path: PathBuf,
    offset: u64,
    ready: VecDeque<Event>,
}

/// `GET /api/runs/{name}/events`.
pub(in crate::serve) async fn of_run(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Answer {
    let missing = || Refusal::missing(format!("run {name}"));
    let folder = server.places.run(&name).ok_or_else(missing)?;
    if !server.runs.is_taken(&name) {
        return Err(missing());
    }
    let reader = Reader { path: folder.join("metrics.jsonl"), offset: 0, ready: VecDeque::new() };
    let events = stream::unfold(reader, |mut reader| async move {
        let mut is_first = reader.offset == 0 && reader.ready.is_empty();
        loop {
            if let Some(event) = reader.ready.pop_front() {
                return Some((Ok::<_, Infallible>(event), reader));
            }
            if !is_first {
                tokio::time::sleep(PAUSE).await;
            }
            is_first = false;
            // A panic there ends the stream.
            reader = tokio::task::spawn_blocking(move || reader.looked()).await.ok()?;
        }
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}

impl Reader {
    /// After a look at the log. A log that is shorter than before was cut: the run went on from an earlier step.
    fn looked(mut self) -> Self {
        let length = std::fs::metadata(&self.path).map_or(0, |metadata| metadata.len());
        if length < self.offset {
            self.offset = 0;
            self.ready.push_back(Event::default().event("reset").data("{}"));
        }
        let mut bytes = Vec::new();
        let read = File::open(&self.path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.offset))?;
            file.take(PIECE).read_to_end(&mut bytes)
        });
        // The last line may not be whole yet.
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        if read.is_ok() && whole > 0 {
            self.offset += whole as u64;
            let text = String::from_utf8_lossy(&bytes[..whole]);
            let rows: Vec<Value> = text.lines().filter_map(slim).collect();
            self.ready.push_back(Event::default().event("rows").data(json!(rows).to_string()));
        }
        self
    }
}

/// What a curve needs of a row.
fn slim(line: &str) -> Option<Value> {
    let row: Value = serde_json::from_str(line).ok()?;
    let step = row.get("step")?;
    Some(match row.get("eval_loss") {
        Some(loss) => json!({ "step": step, "eval_loss": loss, "expert": row.get("expert") }),
        None => json!({
            "step": step,
            "loss": row.get("loss"),
            "lr": row.get("lr"),
            "grad_norm": row.get("grad_norm"),
            "seconds": row.get("seconds"),
            "experts": row.get("experts"),
        }),
    })
}

/// `GET /api/events`: the lists, whenever they change.
pub(in crate::serve) async fn of_all(State(server): State<Arc<Server>>) -> Response {
    let receiver = server.news.subscribe();
    let events = stream::unfold((receiver, true), |(mut receiver, is_first)| async move {
        if !is_first {
            receiver.changed().await.ok()?;
        }
        let text = receiver.borrow_and_update().to_string();
        Some((Ok::<_, Infallible>(Event::default().event("state").data(text)), (receiver, false)))
    });
    Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

//! `tandem serve`: runs and clips in a browser, and an API for programs.
//!
//! Runs are processes of their own, `tandem train`, which the server starts when their devices are free and which outlive it. Clips
//! are made by one thread, whose models stay loaded from one request to the next. Everything that the server has to remember is in
//! files that are written whole: after a kill it goes on where it was.

mod access;
mod cards;
mod datasets;
mod files;
mod listener;
mod metrics;
mod pages;
mod places;
mod reply;
mod runs;
mod videos;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use access::Access;
pub use places::Folders;

use crate::base::ModelConfig;
use crate::bytes::hex;
use crate::error::{Error, Result};
use crate::machine::devices::DevicesConfig;
use crate::watch::ui::Ui;
use cards::Cards;
use listener::{Door, Work};
use places::Places;
use reply::{Refusal, in_full};
use runs::Runs;
use runs::view::names_in;
use videos::Videos;

/// What a server is told.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its folders.
    pub folders: Folders,
    /// Where it listens.
    pub address: SocketAddr,
    /// Who may use it.
    pub access: Access,
    /// The tiny decoder that makes previews of clips.
    pub tiny_decoder: Option<PathBuf>,
}

/// How often the queue of runs is looked after.
const TICK: Duration = Duration::from_millis(300);
/// How often lists are sent to pages that are open.
const NEWS: Duration = Duration::from_millis(700);
/// How old a list may be that is sent.
const FRESH: Duration = Duration::from_millis(400);
/// The most bytes of a request, uploads of pictures excepted.
const BODY: usize = 1 << 20;
/// Clips that a page gets without asking for more.
const RECENT: usize = 200;

/// A server at work.
#[derive(Debug)]
struct Server {
    places: Places,
    access: Access,
    /// Whether it listens on this host alone.
    is_local: bool,
    cards: Arc<Cards>,
    runs: Runs,
    videos: Videos,
    tiny_decoder: Option<PathBuf>,
    /// The lists as they were last sent.
    news: watch::Sender<Arc<str>>,
    last: Mutex<Option<(Instant, Arc<Value>)>>,
    /// One plan at a time.
    planning: Mutex<()>,
    started: Instant,
}

/// A base model in one of the folders.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
struct ModelFolder {
    name: String,
    folder: PathBuf,
}

/// Serves until the process is told to end.
///
/// # Errors
/// Folders that cannot be used, and an address that is taken.
pub fn serve(settings: Settings, ui: &Ui) -> Result<()> {
    let io = |source| Error::Io { action: "listen on", path: settings.address.to_string().into(), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(io)?;
    let _inside = runtime.enter();
    let listener = runtime.block_on(TcpListener::bind(settings.address)).map_err(io)?;
    let address = listener.local_addr().map_err(io)?;
    let server = Arc::new(Server::open(&settings, address)?);
    // Runs that an earlier server has started have their devices before any clip is made.
    server.runs.tick()?;
    tell(&server, address, ui);
    let keeper = Arc::clone(&server);
    let complains = ui.clone();
    std::thread::spawn(move || keeper.keep(&complains));
    let (engine, quiet) = (Arc::clone(&server), ui.silent());
    std::thread::spawn(move || videos::run_engine(&engine, &quiet));
    let app = router(Arc::clone(&server)).into_make_service_with_connect_info::<Work>();
    let served = runtime.block_on(async {
        tokio::select! {
            served = axum::serve(Door::new(listener), app) => served,
            _ = tokio::signal::ctrl_c() => Ok(()),
        }
    });
    server.part(ui);
    // Threads that read for someone are not waited for.
    runtime.shutdown_background();
    served.map_err(io)
}

fn tell(server: &Server, address: SocketAddr, ui: &Ui) {
    let host = if address.ip().is_loopback() { "localhost".to_owned() } else { address.ip().to_string() };
    let url = match &server.access {
        Access::Token(token) => format!("http://{host}:{}/login?token={token}", address.port()),
        Access::Open => format!("http://{host}:{}/", address.port()),
    };
    let token = match &server.access {
        Access::Token(token) => Some(token),
        Access::Open => None,
    };
    let object = json!({ "url": url, "port": address.port(), "token": token });
    ui.tell(&format!("open {url}\nCtrl-C ends the server; runs that train go on"), &object);
}

impl Server {
    fn open(settings: &Settings, address: SocketAddr) -> Result<Self> {
        let places = Places::open(&settings.folders)?;
        let cards = Arc::new(Cards::default());
        Ok(Self {
            runs: Runs::open(&places, &cards)?,
            videos: Videos::open(places.state.join("videos"))?,
            access: settings.access.clone(),
            is_local: address.ip().is_loopback(),
            tiny_decoder: settings.tiny_decoder.clone(),
            news: watch::Sender::new("{}".into()),
            last: Mutex::new(None),
            planning: Mutex::new(()),
            started: Instant::now(),
            places,
            cards,
        })
    }

    /// Looks after the queue of runs and after pages that are open, as long as the process is there.
    fn keep(&self, ui: &Ui) {
        let mut told = Instant::now();
        let mut complaint = String::new();
        loop {
            if let Err(error) = self.runs.tick() {
                let words = in_full(&error);
                if words != complaint {
                    ui.note(&words);
                    complaint = words;
                }
            }
            if told.elapsed() >= NEWS {
                told = Instant::now();
                let text: Arc<str> = match self.news.receiver_count() {
                    0 => "{}".into(),
                    _ => self.snapshot().to_string().into(),
                };
                self.news.send_if_modified(|before| {
                    let is_new = *before != text;
                    *before = text;
                    is_new
                });
            }
            std::thread::sleep(TICK);
        }
    }

    /// Runs and clips as they stand, at most a moment ago.
    fn snapshot(&self) -> Arc<Value> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((when, value)) = &*last
            && when.elapsed() < FRESH
        {
            return Arc::clone(value);
        }
        let videos = self.videos.all();
        let recent = &videos[videos.len().saturating_sub(RECENT)..];
        let value = Arc::new(
            json!({ "runs": self.runs.list(), "videos": recent, "videos_in_all": videos.len(), "previews": self.tiny_decoder.is_some() }),
        );
        *last = Some((Instant::now(), Arc::clone(&value)));
        value
    }

    /// The base models in the folders of models: the folders themselves, or those in them.
    fn models(&self) -> Vec<ModelFolder> {
        let processor = DevicesConfig::default().processor();
        let is_model = |folder: &Path| {
            let config = ModelConfig { folder: Some(folder.to_owned()), ..ModelConfig::default() };
            config.settle(Path::new(""), processor).is_ok()
        };
        let mut found = Vec::new();
        for root in &self.places.models {
            let below = names_in(root).into_iter().map(|name| root.join(name)).filter(|path| path.is_dir());
            let folders: Vec<PathBuf> = match is_model(root) {
                true => vec![root.clone()],
                false => below.filter(|folder| is_model(folder)).collect(),
            };
            for folder in folders {
                let name =
                    folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                found.push(ModelFolder { name, folder });
            }
        }
        found
    }

    /// What a clip is made with whose request names no model: the run that made steps last, else the first model.
    fn default_model(&self) -> Option<String> {
        let runs = names_in(&self.places.runs).into_iter();
        let trained = runs.filter_map(|name| {
            let log = self.places.runs.join(&name).join("metrics.jsonl");
            Some((std::fs::metadata(log).ok()?.modified().ok()?, name))
        });
        trained.max().map(|(_, name)| name).or_else(|| Some(self.models().into_iter().next()?.name))
    }

    /// A number that nobody has had before.
    fn fresh_id(&self) -> std::result::Result<String, Refusal> {
        let mut bytes = [0; 12];
        let none = |error: getrandom::Error| {
            Refusal::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, format!("no random numbers: {error}"))
        };
        getrandom::fill(&mut bytes).map_err(none)?;
        Ok(hex(&bytes))
    }

    /// Says what goes on without the server.
    fn part(&self, ui: &Ui) {
        for run in self.runs.list().iter().filter(|run| run.status == runs::view::Status::Running) {
            ui.note(&format!("{} goes on training; `tandem serve` shows it again", run.name));
        }
    }
}

/// All routes.
fn router(server: Arc<Server>) -> Router {
    use runs::{events, routes as run};
    use videos::routes as video;
    let uploads = Router::new()
        .route("/v1/videos", post(video::create).get(video::list))
        .route("/v1/videos/sync", post(video::create_and_wait))
        // They count the bytes of each field themselves.
        .layer(DefaultBodyLimit::disable());
    Router::new()
        .route("/", get(pages::index))
        .route("/login", get(pages::login))
        .route("/static/{name}", get(pages::asset))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/openapi.json", get(pages::openapi))
        .route("/metrics", get(metrics::metrics))
        .route("/api/events", get(events::of_all))
        .route("/api/recipes", get(run::recipes))
        .route("/api/draft", post(run::draft))
        .route("/api/plan", post(run::check_plan))
        .route("/api/runs", get(run::list).post(run::create))
        .route("/api/runs/{name}", get(run::one).delete(run::forget))
        .route("/api/runs/{name}/events", get(events::of_run))
        .route("/api/runs/{name}/{action}", post(run::act))
        .route("/api/runs/{name}/files/{*path}", get(run::file))
        .route("/api/datasets", get(datasets::list))
        .route("/api/datasets/{index}/clips", get(datasets::clips))
        .route("/api/datasets/{index}/caption", post(datasets::set_caption))
        .route("/api/datasets/{index}/exclude", post(datasets::exclude))
        .route("/api/datasets/{index}/files/{*path}", get(datasets::file))
        .route("/v1/models", get(video::models))
        .route("/v1/videos/{id}", get(video::one).delete(video::delete))
        .route("/v1/videos/{id}/content", get(video::content))
        .route("/v1/videos/{id}/preview", get(video::preview))
        .route("/v1/videos/{id}/cancel", post(video::cancel))
        .layer(DefaultBodyLimit::max(BODY))
        .merge(uploads)
        .fallback(pages::nothing)
        .layer(from_fn_with_state(Arc::clone(&server), access::guard))
        .with_state(server)
}

//! The hub: only what is needed is fetched, once, goes on where it broke off, and counts when its hash is right.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proofs::fixture;
use proofs::hub::{COMMIT, Reply, Repository, Request, Server};
use tempfile::TempDir;
use trainer::base::ModelConfig;
use trainer::base::hub::{Hub, HubError, HubId, HubSettings, Wanted};
use trainer::machine::precision::Processor;
use trainer::watch::ui::{Ui, Voice};

const FILE: &str = "Wan2.1_VAE.pth";
const ATTEMPTS: u32 = 3;

/// A cache, and the hub as it is reached from there.
struct Desk {
    folder: TempDir,
    settings: HubSettings,
}

impl Desk {
    fn new(endpoint: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let settings = HubSettings {
            endpoint: endpoint.to_owned(),
            login: None,
            cache: folder.path().join("hub"),
            token: None,
            is_offline: false,
            pause: Duration::from_millis(1),
            attempts: ATTEMPTS,
        };
        Self { folder, settings }
    }

    fn fetch(&self, wanted: &[Wanted]) -> Result<PathBuf, HubError> {
        Hub::new(self.settings.clone()).fetch(&id(), wanted, &Ui::new(Voice::Json))
    }

    fn in_cache(&self, place: &str) -> PathBuf {
        self.folder.path().join("hub/models--someone--tiny-wan").join(place)
    }

    fn refusal(&self) -> String {
        self.fetch(&[Wanted::Vae]).unwrap_err().to_string()
    }

    /// Names of all that lies in the folder of bytes.
    fn blobs(&self) -> Vec<String> {
        let Ok(folder) = fs::read_dir(self.in_cache("blobs")) else { return Vec::new() };
        folder.map(|item| item.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn id() -> HubId {
    "someone/tiny-wan".parse().unwrap()
}

/// A model in the official layout, with the files beside it that no model needs.
fn official() -> Repository {
    let mut repository = Repository::of(&fixture("repo_official_a14b"));
    repository.files.insert("README.md".into(), b"# Wan".to_vec());
    repository.files.insert("assets/logo.png".into(), vec![1, 2, 3]);
    repository
}

/// A file of some pieces whose bytes all differ from their neighbours.
fn long() -> Repository {
    let bytes: Vec<u8> = (0..300_000u32).map(|i| (i ^ i >> 8 ^ i >> 16) as u8).collect();
    Repository { files: [(FILE.to_owned(), bytes)].into() }
}

/// The file of [`long`] as it lies in `folder` is the one that the server has.
fn assert_whole(folder: &Path) {
    assert!(fs::read(folder.join(FILE)).unwrap() == long().files[FILE], "other bytes");
}

/// A server of [`long`] that answers the `n`th request for the file as `fault` says, and honestly where it says nothing.
fn faulty(fault: impl Fn(&Repository, &Request, usize) -> Option<Reply> + Send + 'static) -> Server {
    let repository = long();
    Server::start(move |request, n| match request.path.ends_with(FILE) {
        true => fault(&repository, request, n).unwrap_or_else(|| repository.honest(request)),
        false => repository.honest(request),
    })
}

#[test]
fn a_model_is_fetched_once_without_what_it_does_not_need_and_loads() {
    let repository = official();
    let served = repository.clone();
    let server = Server::start(move |request, _| served.honest(request));
    let desk = Desk::new(&server.address);
    let folder = desk.fetch(&Wanted::ALL).unwrap();
    assert_eq!(folder, desk.in_cache(&format!("snapshots/{COMMIT}")));
    let fetched = Repository::of(&folder).files;
    let needed = |name: &String| {
        !["README.md", "assets/logo.png"].contains(&name.as_str()) && !name.ends_with("spiece.model")
    };
    let config_of_tokenizer =
        |name: &String| name.starts_with("google/") && !name.ends_with("/tokenizer.json");
    let expected: Vec<&String> =
        repository.files.keys().filter(|n| needed(n) && !config_of_tokenizer(n)).collect();
    assert_eq!(fetched.keys().collect::<Vec<_>>(), expected);
    assert!(fetched.iter().all(|(name, bytes)| *bytes == repository.files[name]));

    // As Python lays it out: a name for the commit, bytes by their hash, links between them.
    assert_eq!(fs::read_to_string(desk.in_cache("refs/main")).unwrap(), COMMIT);
    let blob = desk.in_cache("blobs").join(repository.hash(FILE));
    assert_eq!(fs::canonicalize(folder.join(FILE)).unwrap(), fs::canonicalize(blob).unwrap());

    let config = ModelConfig { folder: Some(folder), ..ModelConfig::default() };
    let model = config.settle(Path::new(""), Processor::Cpu).unwrap();
    assert_eq!(model.name, "tiny-wan", "named for the model, not for the commit");
    assert!(model.dits.experts().is_some());
    let (dit, _) = model.dits.of(models::Expert::High).open().unwrap();
    model.check_encoders(&dit).unwrap();

    let before = server.asked().len();
    desk.fetch(&Wanted::ALL).unwrap();
    let again: Vec<String> = server.asked()[before..].iter().map(|request| request.path.clone()).collect();
    assert_eq!(
        again,
        ["/api/models/someone/tiny-wan/revision/main?blobs=true"],
        "only the list is asked for again"
    );
}

#[test]
fn single_parts_are_fetched_in_both_layouts_and_a_part_that_is_not_there_is_named() {
    for (repository, part, expected) in [
        ("repo_official_a14b", Wanted::DitLow, &["low_noise_model/"][..]),
        ("repo_official_a14b", Wanted::Tokenizer, &["google/umt5-xxl/tokenizer.json"]),
        ("repo_diffusers_a14b", Wanted::DitHigh, &["model_index.json", "transformer/"]),
        ("repo_diffusers_a14b", Wanted::Dit, &["model_index.json", "transformer/", "transformer_2/"]),
        ("repo_diffusers_a14b", Wanted::TextEncoder, &["model_index.json", "text_encoder/"]),
        ("repo_official_a14b", Wanted::Clip, &[]),
    ] {
        let repository = Repository::of(&fixture(repository));
        let server = Server::start(move |request, _| repository.honest(request));
        let desk = Desk::new(&server.address);
        let folder = desk.fetch(&[part]).unwrap();
        let names =
            if folder.is_dir() { Repository::of(&folder).files.into_keys().collect() } else { vec![] };
        let is_expected = |name: &String| expected.iter().any(|start| name.starts_with(start));
        assert!(names.iter().all(is_expected), "{part:?}: {names:?}");
        assert!(
            expected.iter().all(|start| names.iter().any(|n| n.starts_with(start))),
            "{part:?}: {names:?}"
        );
    }
    let files = ["lighttaew2_1.safetensors", "taew2_1.safetensors", "taew2_2.pth", "taew2_1.txt"];
    let server = Server::start(move |request, _| {
        Repository { files: files.map(|name| (name.to_owned(), name.into())).into() }.honest(request)
    });
    for (part, expected) in
        [(Wanted::TinyDecoder21, "taew2_1.safetensors"), (Wanted::TinyDecoder22, "taew2_2.pth")]
    {
        let desk = Desk::new(&server.address);
        let folder = desk.fetch(&[part]).unwrap();
        assert_eq!(Repository::of(&folder).files.into_keys().collect::<Vec<_>>(), [expected]);
    }
    let server = Server::start(|request, _| {
        Repository { files: [("README.md".into(), vec![1])].into() }.honest(request)
    });
    let error = Desk::new(&server.address).refusal();
    assert!(error.contains("someone/tiny-wan has no VAE") && error.contains("--only"), "{error}");
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_broke_off() {
    // Two connections break after 100 000 bytes each.
    let server = faulty(|repository, request, n| (n < 2).then(|| repository.honest(request).cut(100_000)));
    let desk = Desk::new(&server.address);
    assert_whole(&desk.fetch(&[Wanted::Vae]).unwrap());
    let starts: Vec<Option<usize>> = server.asked_for(FILE).iter().map(Request::from).collect();
    assert_eq!(starts, [None, Some(100_000), Some(200_000)], "no byte comes twice");

    // What a killed program left is taken up; what it left is not believed either.
    for (left, is_whole) in [(long().files[FILE][..50_000].to_vec(), true), (vec![7; 50_000], false)] {
        let server = faulty(|_, _, _| None);
        let desk = Desk::new(&server.address);
        let hash = long().hash(FILE);
        fs::create_dir_all(desk.in_cache("blobs")).unwrap();
        fs::write(desk.in_cache("blobs").join(format!("{hash}.incomplete")), left).unwrap();
        match desk.fetch(&[Wanted::Vae]) {
            Ok(folder) => assert_whole(&folder),
            Err(error) => assert!(!is_whole && error.to_string().contains("SHA-256"), "{error}"),
        }
        assert_eq!(server.asked_for(FILE)[0].from(), Some(50_000));
        if !is_whole {
            assert_whole(&desk.fetch(&[Wanted::Vae]).unwrap());
        }
    }
}

#[test]
fn a_server_that_lies_about_lengths_or_ranges_is_seen_through() {
    type Fault = fn(&Repository, &Request, usize) -> Option<Reply>;
    let faults: [(&str, Fault); 5] = [
        ("says more than it sends", |repository, request, n| {
            (n == 0).then(|| Reply { length: 400_000, ..repository.honest(request) }.cut(250_000))
        }),
        ("says less than there is", |repository, request, n| {
            (n == 0).then(|| Reply { length: 1000, ..repository.honest(request) }.cut(1000))
        }),
        ("knows no ranges", |repository, request, n| {
            let whole = Reply::body(repository.files[FILE].clone());
            Some(if n == 0 { repository.honest(request).cut(5000) } else { whole })
        }),
        ("sends another range", |repository, request, n| match n {
            0 => Some(repository.honest(request).cut(5000)),
            1 => Some(
                Reply { status: 206, ..Reply::body([9; 100]) }.with("Content-Range", "bytes 0-99/300000"),
            ),
            _ => None,
        }),
        ("knows no such range", |repository, request, n| match n {
            0 => Some(repository.honest(request).cut(5000)),
            1 => Some(Reply::status(416)),
            _ => None,
        }),
    ];
    for (lie, fault) in faults {
        let server = faulty(fault);
        let desk = Desk::new(&server.address);
        let folder = desk.fetch(&[Wanted::Vae]).unwrap_or_else(|error| panic!("{lie}: {error}"));
        assert_whole(&folder);
    }
    // One that speaks of another file altogether.
    let server = faulty(|repository, request, n| match n {
        0 => Some(repository.honest(request).cut(5000)),
        _ => Some(Reply { status: 206, ..Reply::body([9; 10]) }.with("Content-Range", "bytes 5000-5009/77")),
    });
    assert!(
        Desk::new(&server.address).refusal().contains("the server reports 77 bytes, the hub's list 300000")
    );
    // One that never sends anything more: given up, and what came is kept for the next time.
    let server =
        faulty(|repository, request, n| Some(repository.honest(request).cut(if n == 0 { 5000 } else { 0 })));
    let desk = Desk::new(&server.address);
    let error = desk.refusal();
    assert!(error.contains("no connection") && error.contains("what was fetched is kept"), "{error}");
    assert_eq!(server.asked_for(FILE).len() as u32, 1 + ATTEMPTS);
    let left = fs::read(desk.in_cache("blobs").join(format!("{}.incomplete", long().hash(FILE)))).unwrap();
    assert!(left == long().files[FILE][..5000]);
}

#[test]
fn bytes_with_another_hash_are_thrown_away() {
    let server = faulty(|repository, request, _| {
        let mut reply = repository.honest(request);
        reply.body[1234] ^= 1;
        Some(reply)
    });
    let desk = Desk::new(&server.address);
    let error = desk.refusal();
    for told in [FILE, "SHA-256", &long().hash(FILE), "discarded"] {
        assert!(error.contains(told), "{error}");
    }
    assert_eq!(desk.blobs(), Vec::<String>::new());
    assert!(!desk.in_cache(&format!("snapshots/{COMMIT}")).join(FILE).exists());
}

/// Small files are in git, and the hub gives git's hash of them: a config that was changed on the way is not accepted
/// either, though its length is right.
#[test]
fn small_files_with_another_hash_are_thrown_away_too() {
    const CONFIG: &str = "low_noise_model/config.json";
    let small = |bytes: &[u8]| Repository { files: [("config.json".to_owned(), bytes.to_vec())].into() };
    // The result of `git hash-object`.
    assert_eq!(small(b"hello\n").hash("config.json"), "ce013625030ba8dba906f756967f9e9ca394464a");
    let repository = official();
    let server = Server::start(move |request, n| {
        let mut reply = repository.honest(request);
        if request.path.ends_with(CONFIG) && n == 0 {
            let digit = reply.body.iter().position(u8::is_ascii_digit).unwrap();
            reply.body[digit] ^= 1;
        }
        reply
    });
    let desk = Desk::new(&server.address);
    let error = desk.fetch(&[Wanted::DitLow]).unwrap_err().to_string();
    for told in [CONFIG, "git's SHA-1", &official().hash(CONFIG), "discarded"] {
        assert!(error.contains(told), "{error}");
    }
    assert!(!desk.blobs().contains(&official().hash(CONFIG)), "{:?}", desk.blobs());
    let folder = desk.fetch(&[Wanted::DitLow]).unwrap();
    assert!(fs::read(folder.join(CONFIG)).unwrap() == official().files[CONFIG], "other bytes");
}

#[test]
fn refusals_are_told_and_busy_servers_waited_for() {
    for (status, token, told) in [
        (401, None, &["strangers", "HF_TOKEN", "huggingface-cli login"][..]),
        (403, Some("secret"), &["the owner of this token", "terms"]),
        (404, None, &["no such thing", "spelling of owner, name and revision"]),
        (429, None, &["answered 429 3 times", "try again later"]),
        (503, None, &["answered 503 3 times"]),
        (418, None, &["418", "HF_ENDPOINT"]),
    ] {
        let server = Server::start(move |_, _| Reply::status(status).with("Retry-After", 0));
        let mut desk = Desk::new(&server.address);
        desk.settings.token = token.map(str::to_owned);
        let error = desk.refusal();
        assert!(told.iter().all(|words| error.contains(words)), "{status}: {error}");
        assert!(error.contains("/api/models/someone/tiny-wan/") && !error.contains("secret"), "{error}");
        let sent = server.asked()[0].headers.get("authorization").cloned();
        assert_eq!(sent, token.map(|token| format!("Bearer {token}")));
        assert_eq!(server.asked().len(), if status == 429 || status == 503 { ATTEMPTS as usize } else { 1 });
    }
    // Busy once, for the list and for the file: waited for as it asks.
    let repository = long();
    let server = Server::start(move |request, n| match n {
        0 => Reply::status(429).with("Retry-After", 1),
        _ => repository.honest(request),
    });
    let begun = std::time::Instant::now();
    assert_whole(&Desk::new(&server.address).fetch(&[Wanted::Vae]).unwrap());
    assert!(begun.elapsed() >= Duration::from_secs(2), "it did not wait as asked");
}

/// Large files are on other hosts: the hub redirects, and the token is only sent to the hub.
#[test]
fn the_token_is_shown_to_the_hub_alone() {
    let repository = long();
    let elsewhere = faulty(|repository, request, _| {
        Some(repository.honest(&Request { path: format!("/resolve/{COMMIT}/{FILE}"), ..request.clone() }))
    });
    // By another name of this machine, so that it counts as another host.
    let place = format!(
        "{}/far/{FILE}",
        elsewhere.address.replace(&std::net::Ipv4Addr::LOCALHOST.to_string(), "localhost")
    );
    let server = Server::start(move |request, _| match request.path.ends_with(FILE) {
        true => Reply::status(302).with("Location", &place),
        false => repository.honest(request),
    });
    let mut desk = Desk::new(&server.address);
    desk.settings.token = Some("secret".into());
    assert_whole(&desk.fetch(&[Wanted::Vae]).unwrap());
    assert!(server.asked().iter().all(|request| request.headers["authorization"] == "Bearer secret"));
    assert_eq!(elsewhere.asked().len(), 1);
    assert!(!elsewhere.asked()[0].headers.contains_key("authorization"), "the token was sent on");
}

/// Another port of the hub's host is another server; the hub itself gets the token after every redirect.
#[test]
fn the_token_stays_with_scheme_host_and_port() {
    let repository = long();
    let elsewhere = faulty(|repository, request, _| {
        Some(repository.honest(&Request { path: format!("/resolve/{COMMIT}/{FILE}"), ..request.clone() }))
    });
    let place = format!("{}/far/{FILE}", elsewhere.address);
    let server = Server::start(move |request, _| match request.path.as_str() {
        path if path.starts_with("/moved/") => Reply::status(307).with("Location", &place),
        path if path.ends_with(FILE) => Reply::status(302).with("Location", format!("/moved/{FILE}")),
        _ => repository.honest(request),
    });
    let mut desk = Desk::new(&server.address);
    desk.settings.token = Some("secret".into());
    assert_whole(&desk.fetch(&[Wanted::Vae]).unwrap());
    let asked = server.asked();
    assert!(asked.iter().any(|request| request.path.starts_with("/moved/")));
    assert!(asked.iter().all(|request| request.headers["authorization"] == "Bearer secret"));
    assert!(
        !elsewhere.asked()[0].headers.contains_key("authorization"),
        "the token was sent to another port"
    );
}

#[test]
fn a_password_in_the_endpoint_is_sent_but_never_told_and_a_broken_token_is_refused_at_once() {
    let server = Server::start(|_, _| Reply::status(503).with("Retry-After", 0));
    let endpoint = server.address.replace("://", "://user:pass%40word@");
    let mut desk = Desk::new(&server.address);
    let told = HubSettings::from_variables(|name| (name == "HF_ENDPOINT").then(|| endpoint.clone()));
    assert_eq!((told.endpoint.as_str(), told.login.as_deref()), (&*server.address, Some("user:pass@word")));
    (desk.settings.endpoint, desk.settings.login) = (told.endpoint, told.login);
    let error = desk.refusal();
    assert!(error.contains(&server.address) && !error.contains("pass"), "{error}");
    assert_eq!(server.asked()[0].headers["authorization"], "Basic dXNlcjpwYXNzQHdvcmQ=");

    let asked = server.asked().len();
    desk.settings.token = Some("line\r\nbreak".into());
    let error = desk.refusal();
    assert!(error.contains("HF_TOKEN") && !error.contains("break\""), "{error}");
    assert_eq!(server.asked().len(), asked, "the hub was asked with a broken token");
}

#[test]
fn offline_the_cache_is_all_that_there_is() {
    let server = faulty(|_, _, _| None);
    let mut desk = Desk::new(&server.address);
    desk.settings.is_offline = true;
    assert!(desk.refusal().contains("HF_HUB_OFFLINE"));
    assert_eq!(Hub::new(desk.settings.clone()).cached(&id()), None);
    assert!(server.asked().is_empty(), "it asked though it must not");
    desk.settings.is_offline = false;
    let folder = desk.fetch(&[Wanted::Vae]).unwrap();
    let asked = server.asked().len();
    desk.settings.is_offline = true;
    assert_eq!(desk.fetch(&[Wanted::Vae]).unwrap(), folder);
    let by_commit: HubId = format!("someone/tiny-wan@{COMMIT}").parse().unwrap();
    assert_eq!(Hub::new(desk.settings.clone()).cached(&by_commit), Some(folder.clone()));
    assert_eq!(server.asked().len(), asked);
    // Without a connection to the hub the cached files are used; without any, the message names the address.
    desk.settings.is_offline = false;
    let closed =
        std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    desk.settings.endpoint = format!("http://{closed}");
    assert_eq!(desk.fetch(&[Wanted::Vae]).unwrap(), folder);
    let error = Desk::new(&desk.settings.endpoint).refusal();
    assert!(error.contains("no connection") && error.contains(&closed.to_string()), "{error}");
}

#[test]
fn a_list_that_is_none_or_leads_out_of_the_cache_is_refused() {
    for (list, told) in [
        ("<html>", "not a description of a model"),
        (r#"{"sha":"main","siblings":[]}"#, "\"main\" is not a commit"),
        (
            r#"{"sha":"ab","siblings":[{"rfilename":"../Wan2.1_VAE.pth","size":1,"blobId":"0123456789abcdef0123456789abcdef01234567"}]}"#,
            "\"../Wan2.1_VAE.pth\"",
        ),
        (
            r#"{"sha":"ab","siblings":[{"rfilename":"Wan2.1_VAE.pth","size":1,"blobId":"../../x"}]}"#,
            "\"../../x\"",
        ),
        (
            r#"{"sha":"ab","siblings":[{"rfilename":"Wan2.1_VAE.pth","size":1,"blobId":"abcd"}]}"#,
            "the invalid hash \"abcd\"",
        ),
        (
            r#"{"sha":"ab","siblings":[{"rfilename":"Wan2.1_VAE.pth"}]}"#,
            "neither size nor hash of Wan2.1_VAE.pth",
        ),
    ] {
        let server = Server::start(move |_, _| Reply::body(list));
        let error = Desk::new(&server.address).refusal();
        assert!(error.contains(told), "{told} not in {error}");
    }
}

#[test]
fn ids_and_settings_are_read() {
    for (text, told) in
        [("Wan-AI/Wan2.2-T2V-A14B", "main"), ("a/b@v1.0", "v1.0"), ("a/b@refs/pr/3", "refs/pr/3")]
    {
        let id: HubId = text.parse().unwrap();
        assert_eq!((id.revision.as_str(), id.to_string().as_str()), (told, text));
    }
    for text in ["", "wan", "a/b/c", "../b", "a/", "/b", "a/b@", "a/b@../x", "a b/c", "./model"] {
        assert!(text.parse::<HubId>().is_err(), "{text}");
    }
    let settings = |told: &'static [(&str, &str)]| {
        let of =
            move |name: &str| told.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        HubSettings::from_variables(of)
    };
    let plain = settings(&[("HOME", "/u")]);
    assert_eq!(plain.cache, Path::new("/u/.cache/huggingface/hub"));
    assert_eq!(
        (plain.endpoint.as_str(), plain.token, plain.is_offline),
        ("https://huggingface.co", None, false)
    );
    let told = settings(&[
        ("HF_HOME", "/h"),
        ("HF_ENDPOINT", "http://mirror/"),
        ("HF_TOKEN", " t "),
        ("HF_HUB_OFFLINE", "1"),
    ]);
    assert_eq!((told.cache.as_path(), told.endpoint.as_str()), (Path::new("/h/hub"), "http://mirror"));
    assert_eq!((told.token.as_deref(), told.is_offline), (Some("t"), true));
    assert_eq!(settings(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h")]).cache, Path::new("/c"));
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("token"), "of the login\n").unwrap();
    let place = home.path().to_str().unwrap().to_owned();
    let login = HubSettings::from_variables(|name| (name == "HF_HOME").then(|| place.clone()));
    assert_eq!(login.token.as_deref(), Some("of the login"));
}

//! `tandem serve`: who may use it, what it reads and serves, runs and clips that survive it.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::desk::Desk;
use crate::server::{HUNG_UP, Server, until};

fn status(run: &Value) -> &str {
    run["status"].as_str().unwrap_or_default()
}

/// The desk's recipe with other numbers, for a run that the server names.
fn recipe(desk: &Desk, steps: u64, every: u64) -> String {
    let text = fs::read_to_string(desk.path("recipe.toml")).unwrap();
    let text = text.replace("[train]\nsteps = 2", &format!("[train]\nsteps = {steps}"));
    text.replace("every_steps = 2", &format!("every_steps = {every}"))
        + "\n[sample]\nprompts = [\"a cloud\"]\nsteps = 2\nguidance = 1.0\n"
}

#[test]
fn only_who_has_the_token_is_served() {
    let desk = Desk::new();
    let server = Server::on(&desk);
    let with =
        |headers: &[(&str, &str)], method: &str| server.call(method, "/api/runs", headers, b"{}").status;
    let (bearer, cookie) = (server.bearer(), format!("tandem_token={}", server.token));
    let home = format!("http://localhost:{}", server.port);
    assert_eq!(with(&[], "GET"), 401);
    assert_eq!(with(&[("authorization", "Bearer 0000")], "GET"), 401);
    assert_eq!(with(&[("cookie", "tandem_token=0000")], "GET"), 401);
    assert_eq!(with(&[("authorization", &bearer)], "GET"), 200);
    assert_eq!(with(&[("cookie", &cookie)], "GET"), 200);
    // A name of another site that points here, and another site's page in a browser that has the cookie.
    assert_eq!(with(&[("authorization", &bearer), ("host", "rebound.example")], "GET"), 421);
    assert_eq!(with(&[("cookie", &cookie), ("origin", "http://elsewhere.example")], "POST"), 403);
    assert_eq!(with(&[("cookie", &cookie), ("sec-fetch-site", "cross-site")], "POST"), 403);
    assert_eq!(with(&[("cookie", &cookie), ("origin", &home)], "POST"), 400);
    assert_eq!(server.call("GET", "/login?token=0000", &[], b"").status, 401);
    assert_eq!(server.call("GET", &format!("/login?token={}", server.token), &[], b"").status, 303);
    let page = server.call("GET", "/", &[], b"");
    assert_eq!(page.status, 401);
    assert!(!String::from_utf8_lossy(&page.body).contains(&server.token));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(desk.path("runs/serve/token")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "others can read the token");
    }
    desk.run(&["serve", "--no-token", "--host", "0.0.0.0"]).assert_refused(&["--no-token", "other hosts"]);
}

#[test]
fn nothing_outside_of_the_folders_is_read_or_served() {
    let desk = Desk::new();
    let elsewhere = tempfile::tempdir().unwrap();
    let secret = elsewhere.path().join("secret.png");
    fs::write(&secret, "a secret").unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(&secret, desk.path("clips/link.png")).unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(elsewhere.path(), desk.path("model/link")).unwrap();
    let server = Server::on(&desk);
    let climbs = [
        "..%2f..%2frecipe.toml",
        "..%2f..%2f..%2f..%2f..%2fetc%2fhostname",
        "%2e%2e/%2e%2e/recipe.toml",
        "link.png",
    ];
    for path in climbs {
        for base in ["/api/datasets/0/files/", "/api/runs/serve/files/", "/api/runs/run/files/", "/static/"] {
            let answer = server.get(&format!("{base}{path}"));
            assert!([400, 404].contains(&answer.status), "{base}{path}: {}", answer.status);
        }
    }
    assert_eq!(server.get("/api/runs/serve/files/token").status, 404);
    #[cfg(unix)]
    fs::remove_file(desk.path("clips/link.png")).unwrap();
    let own = recipe(&desk, 2, 0);
    let refuse = |text: String, key: &str| {
        for path in ["/api/plan", "/api/runs"] {
            server.post(path, &json!({ "name": "out", "recipe": text })).refused(400, key);
        }
    };
    let folder = elsewhere.path().display();
    refuse(own.replace("folder = \"clips\"", &format!("folder = \"{folder}\"")), "data.folder");
    refuse(own.replace("folder = \"clips\"", "folder = \"../../etc\""), "data.folder");
    refuse(
        own.replace("[\"a cloud\"]", &format!("[\"a cloud --i {}\"]", secret.display())),
        "sample.prompts",
    );
    // What a file names that the recipe names.
    desk.write("clips/prompts.txt", format!("a cloud --i {}\n", secret.display()));
    refuse(own.replace("[\"a cloud\"]", "\"clips/prompts.txt\""), "outside of the folders");
    desk.write("clips/set.toml", format!("[[datasets]]\nvideo_directory = \"{folder}\"\n"));
    refuse(own.replace("folder = \"clips\"", "import = \"clips/set.toml\""), "outside of the folders");
    desk.write("clips/set.csv", "video,prompt\n../../a.mp4,a cloud\n");
    refuse(own.replace("folder = \"clips\"", "import = \"clips/set.csv\""), "outside of the folders");
    assert!(!desk.path("out.toml").exists(), "a recipe that was refused was kept");
    for name in ["../out", "a/b", ".out", ""] {
        server.post("/api/runs", &json!({ "name": name, "recipe": own })).refused(400, "name");
    }
    let lora = |path: &str| {
        server.post("/v1/videos", &json!({ "prompt": "a", "model": "model", "lora": { "path": path } }))
    };
    for path in [secret.display().to_string().as_str(), "../recipe.toml", "link/secret.png"] {
        lora(path).refused(400, "there is no run and no adapter");
    }
    let picture = format!("file://{}", secret.display());
    server
        .post("/v1/videos", &json!({ "prompt": "a", "model": "model", "reference_url": picture }))
        .refused(400, "fetches nothing");
    desk.assert_no_temporary_files();
}

/// A run goes on when the server is killed, a server that comes back knows it again, its clips wait for it, and a run that was
/// disturbed in all these ways trains the bits of one that was not.
#[test]
fn runs_and_requests_survive_the_server() {
    let desk = Desk::new();
    let text = recipe(&desk, 400, 0);
    desk.write("alone.toml", text.replace("folder = \"run\"", "folder = \"alone\""));
    let server = Server::on(&desk);
    server.post("/api/runs", &json!({ "name": "cloud", "recipe": text })).ok();
    server.run_that("cloud", |run| run["step"].as_u64() > Some(5));
    server.post("/api/runs/cloud/save", &Value::Null).ok();
    let ask = json!({ "prompt": "a cloud", "model": "model", "seed": 5, "size": "16x16", "num_frames": 5, "num_inference_steps": 2 });
    let waiting = server.post("/v1/videos", &ask).ok()["id"].as_str().unwrap().to_owned();
    let job = |server: &Server| server.get(&format!("/v1/videos/{waiting}")).json();
    until(
        || job(&server),
        |job| job["waits_for"].as_str().is_some_and(|why| why.contains("cloud trains on cpu")),
    );
    server.kill();

    let server = Server::on(&desk);
    assert_eq!(status(&server.run_that("cloud", |run| run["step"].as_u64() > Some(20))), "running");
    assert_eq!(job(&server)["status"], "queued");
    // A second run waits for the first, and in the queue for its devices.
    server.post("/api/runs", &json!({ "name": "second", "recipe": recipe(&desk, 2, 0) })).ok();
    server.run_that("second", |run| run["waits_for"].as_str().is_some_and(|why| why.contains("cloud")));
    server.post("/api/runs/second/pause", &Value::Null).ok();
    server.post("/api/runs/cloud/sample", &Value::Null).ok();
    server.run_that("cloud", |run| run["samples"].as_array().is_some_and(|sets| sets.len() > 1));
    server.post("/api/runs/cloud/pause", &Value::Null).ok();
    let paused = server.run_that("cloud", |run| status(run) == "paused");
    assert!(paused["step"].as_u64() < Some(400), "it was not stopped on its way: {paused}");
    let kept = paused["checkpoints"][0].clone();
    assert_eq!(kept["files"][0], format!("cloud_step-{:06}.safetensors", kept["step"].as_u64().unwrap()));
    until(|| job(&server), |job| job["status"] == "completed");
    server.post("/api/runs/cloud/resume", &Value::Null).ok();
    server.run_that("cloud", |run| status(run) == "finished");
    server.post("/api/runs/cloud/resume", &Value::Null).refused(409, "all of its steps");

    desk.succeed(&["train", "alone.toml"]);
    let adapter = |path: &Path| -> Vec<(String, Vec<u8>)> {
        let bytes = fs::read(path).unwrap();
        let file = safetensors(&bytes);
        file.into_iter().map(|(name, range)| (name, bytes[range].to_vec())).collect()
    };
    let disturbed = adapter(&desk.path("runs/cloud/adapters/cloud.safetensors"));
    assert!(!disturbed.is_empty());
    assert!(disturbed == adapter(&desk.path("alone/adapters/alone.safetensors")), "other bits were trained");
}

/// Name and bytes of each tensor of a safetensors file.
fn safetensors(bytes: &[u8]) -> Vec<(String, std::ops::Range<usize>)> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let at = |range: &Value, i: usize| 8 + length + range[i].as_u64().unwrap() as usize;
    let tensors = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
    let mut found: Vec<_> = tensors
        .map(|(name, tensor)| (name.clone(), at(&tensor["data_offsets"], 0)..at(&tensor["data_offsets"], 1)))
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// The clips of the server are those of `tandem sample`, to the byte, whatever was made before with the same models.
#[test]
fn clips_are_those_of_the_command_line() {
    let desk = Desk::new();
    desk.write("cloud.toml", recipe(&desk, 3, 2).replace("folder = \"run\"", "folder = \"runs/cloud\""));
    desk.succeed(&["train", "cloud.toml"]);
    let server = Server::on(&desk);
    let sampled = |words: &[&str]| {
        let all = ["sample", "--prompt", "a cloud", "--seed", "7", "--force"];
        desk.succeed(&[&all, words].concat());
        fs::read(desk.path("clips/00-a-cloud.mp4")).unwrap()
    };
    let ask = |more: Value| {
        let mut body = json!({ "prompt": "a cloud", "seed": 7 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let file = "runs/cloud/adapters/cloud.safetensors";
    let strong = ask(json!({ "model": "cloud", "lora": { "name": "cloud", "scale": 40.0 } }));
    let own = server.clip(&ask(json!({ "model": "cloud" })));
    let scaled = server.clip(&strong);
    assert_ne!(scaled, own, "the strength changes nothing");
    assert_eq!(own, sampled(&["runs/cloud"]));
    assert_eq!(scaled, sampled(&["runs/cloud", "--lora", &format!("{file}:40")]));
    let step = server.clip(&ask(json!({ "model": "cloud@2" })));
    assert_eq!(step, sampled(&["runs/cloud", "--checkpoint", "2"]));
    assert_eq!(server.clip(&strong), scaled, "what was made before shows");
    let base = server.clip(&ask(json!({ "model": "cloud@base" })));
    assert_eq!(server.clip(&ask(json!({ "model": "cloud", "lora": { "name": "cloud", "scale": 0 } }))), base);
    server.post("/v1/videos", &ask(json!({ "model": "cloud@9" }))).refused(400, "there are 2, 3");
}

/// What the documentation of two public servers tells their clients to send, and what such clients then do.
#[test]
fn requests_of_public_clients_are_met() {
    let desk = Desk::new();
    let server = Server::on(&desk);
    // vLLM-Omni, docs/serving/videos_api.md: a form. Sizes and steps are those of a tiny model.
    let form = [
        ("prompt", "A cinematic tracking shot of a mountain lake at sunrise"),
        ("width", "32"),
        ("height", "16"),
        ("num_frames", "8"),
        ("fps", "16"),
        ("num_inference_steps", "2"),
        ("guidance_scale", "4.0"),
        ("guidance_scale_2", "4.0"),
        ("flow_shift", "5.0"),
        ("seed", "42"),
        ("negative_prompt", ""),
        ("extra_params", "{}"),
    ];
    let created = server.form("/v1/videos", &form).ok();
    let id = created["id"].as_str().unwrap();
    assert!(id.starts_with("video_gen_") && created["object"] == "video" && created["status"] == "queued");
    assert_eq!(created["settings"]["request"]["frames"], 9);
    // SGLang, docs/diffusion/api/openai_api.md: the OpenAI SDK sends JSON, with other fields in extra_body.
    let sdk = json!({ "prompt": "A calico cat playing a piano on stage", "size": "16x16", "seconds": "0.5", "extra_body":
        { "num_inference_steps": 2, "enable_teacache": false, "seed": 1024 } });
    let second = server.post("/v1/videos", &sdk).ok();
    assert_eq!((&second["size"], &second["settings"]["request"]["frames"]), (&json!("16x16"), &json!(9)));
    let done = until(|| server.get(&format!("/v1/videos/{id}")).json(), |job| job["status"] == "completed");
    assert_eq!((&done["progress"], &done["media_type"]), (&json!(100), &json!("video/mp4")));
    let content = server.get(&format!("/v1/videos/{id}/content"));
    assert_eq!((content.status, &content.body[4..8]), (200, &b"ftyp"[..]));
    let auth = server.bearer();
    let range = [("authorization", auth.as_str()), ("range", "bytes=4-7")];
    let part = server.call("GET", &format!("/v1/videos/{id}/content"), &range, b"");
    assert_eq!((part.status, part.body.as_slice()), (206, &b"ftyp"[..]));
    let list = server.get("/v1/videos?limit=1").ok();
    assert_eq!(
        (&list["object"], &list["first_id"], &list["has_more"]),
        (&json!("list"), &second["id"], &json!(true))
    );
    let next = server.get(&format!("/v1/videos?limit=5&after={}", second["id"].as_str().unwrap())).ok();
    assert_eq!((&next["data"][0]["id"], &next["has_more"]), (&json!(id), &json!(false)));
    let gone = server.send("DELETE", &format!("/v1/videos/{id}"), &Value::Null).ok();
    assert_eq!(gone, json!({ "id": id, "deleted": true, "object": "video.deleted" }));
    assert_eq!(server.get(&format!("/v1/videos/{id}")).status, 404);
    assert!(!desk.path("runs/serve/videos").join(id).exists(), "the files of a deleted clip were kept");
    let refuse = |body: Value, told: &str| server.post("/v1/videos", &body).refused(400, told);
    refuse(json!({ "prompt": "a", "generate_sound": true }), "generate_sound");
    refuse(json!({ "prompt": "a", "size": "17x16" }), "multiples of");
    refuse(json!({ "prompt": "a", "model": "nobody" }), "no run and no model");
    refuse(json!({ "model": "model" }), "prompt");
    let described = server.get("/openapi.json").ok();
    for path in ["/v1/videos", "/v1/videos/sync", "/v1/videos/{id}", "/v1/videos/{id}/content"] {
        assert!(described["paths"][path].is_object(), "{path} is not described");
    }
    let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
    assert!(metrics.contains("\ntandem_clips{status=\"completed\"} "), "{metrics}");
}

/// A clip that is under way stops when it is cancelled, and the next one is made; whoever asked is told.
#[test]
fn clips_are_cancelled_and_told() {
    let desk = Desk::new();
    let server = Server::on(&desk);
    let listener = std::net::TcpListener::bind(("localhost", 0)).unwrap();
    let hook = format!("http://localhost:{}/done", listener.local_addr().unwrap().port());
    let ask = |steps: u64| json!({ "prompt": "a cloud", "size": "64x64", "num_frames": 17, "num_inference_steps": steps, "webhook": hook });
    let long = server.post("/v1/videos", &ask(900)).ok()["id"].as_str().unwrap().to_owned();
    let short = server.post("/v1/videos", &ask(1)).ok()["id"].as_str().unwrap().to_owned();
    let job = |id: &str| server.get(&format!("/v1/videos/{id}")).json();
    until(|| job(&long), |job| job["progress"].as_u64() > Some(0));
    let begun = Instant::now();
    server.post(&format!("/v1/videos/{long}/cancel"), &Value::Null).ok();
    let cancelled = until(|| job(&long), |job| job["status"] == "failed");
    assert_eq!(cancelled["error"]["code"], "cancelled");
    until(|| job(&short), |job| job["status"] == "completed");
    assert!(begun.elapsed() < Duration::from_secs(30), "the clip was made to its end");
    let mut told = Vec::new();
    for _ in 0..2 {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut text = Vec::new();
        let mut piece = [0; 4096];
        while !String::from_utf8_lossy(&text).trim_end().ends_with('}') {
            let count = stream.read(&mut piece).unwrap();
            text.extend_from_slice(&piece[..count]);
        }
        stream
            .write_all(b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            .unwrap();
        let text = String::from_utf8(text).unwrap();
        let job: Value = serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap();
        told.push((job["id"].as_str().unwrap().to_owned(), job["status"].clone()));
    }
    assert!(
        told.contains(&(long, json!("failed"))) && told.contains(&(short, json!("completed"))),
        "{told:?}"
    );
}

/// Requests that are broken, too large, too slow or broken off neither end the server nor leave anything behind.
#[test]
fn broken_requests_leave_nothing_behind() {
    let desk = Desk::new();
    let server = Server::on(&desk);
    let auth = server.bearer();
    // It sends half of a request and waits.
    let mut silent = TcpStream::connect(("localhost", server.port)).unwrap();
    silent.write_all(b"GET / HTTP/1.1\r\nHost: local").unwrap();
    let mut number = 1_u64;
    let mut random = || {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (number >> 33) as usize
    };
    let heads = [
        "GET / HTTP/1.1\r\n\r\n".to_owned(),
        "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n"
            .to_owned(),
        format!(
            "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nAuthorization: {auth}\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 5000\r\n\r\n--x\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\n"
        ),
        format!(
            "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nAuthorization: {auth}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
        ),
        format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "a".repeat(200_000)),
        format!("GET /api/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: {auth}\r\n\r\n"),
    ];
    for round in 0..600 {
        let mut stream = TcpStream::connect(("localhost", server.port)).unwrap();
        let mut bytes = heads[round % heads.len()].clone().into_bytes();
        for _ in 0..random() % 4 {
            let at = random() % bytes.len();
            bytes[at] = random() as u8;
        }
        // It may have hung up already. Nothing is read, and the connection is dropped in the middle.
        let _ = stream.write_all(&bytes);
    }
    let many = |length: usize| vec![b'a'; length];
    let typed = |kind: &str, body: &[u8]| {
        server.call("POST", "/v1/videos", &[("authorization", &auth), ("content-type", kind)], body).status
    };
    assert_eq!(typed("text/plain", b"prompt"), 415);
    assert_eq!(typed("application/json", b"{\"prompt\": "), 400);
    assert_eq!(typed("application/json", b"[[[[[["), 400);
    assert_eq!(typed("multipart/form-data", b"--x"), 400);
    let field = [
        b"--x\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\n".to_vec(),
        many(100 << 10),
        b"\r\n--x--".to_vec(),
    ];
    assert!([413, HUNG_UP].contains(&typed("multipart/form-data; boundary=x", &field.concat())));
    let picture = [
        b"--x\r\nContent-Disposition: form-data; name=\"input_reference\"; filename=\"a.png\"\r\n\r\n"
            .to_vec(),
        b"\x89PNG\r\n\x1a\nno picture".to_vec(),
        b"\r\n--x\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\na\r\n--x--".to_vec(),
    ];
    assert_eq!(typed("multipart/form-data; boundary=x", &picture.concat()), 400);
    let large = json!({ "name": "a", "recipe": "x".repeat(2 << 20) });
    assert!([413, HUNG_UP].contains(&server.post("/api/runs", &large).status));
    assert_eq!(server.get("/v1/videos?limit=0").status, 400);
    assert_eq!(server.send("PUT", "/v1/videos", &Value::Null).status, 405);
    silent.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(silent.read(&mut [0; 16]).ok(), Some(0), "a silent client was not hung up on");
    assert_eq!(server.get("/healthz").status, 200);
    assert_eq!(server.get("/v1/videos").ok()["data"], json!([]));
    let left = until(
        || json!(fs::read_dir(desk.path("runs/serve/videos")).unwrap().count()),
        |count| *count == json!(0),
    );
    assert_eq!(left, json!(0));
}

/// A caption is replaced with its first wording kept beside it, and a clip that is left out is not trained on.
#[test]
fn captions_are_edited_and_clips_left_out() {
    let desk = Desk::new();
    let server = Server::on(&desk);
    let caption =
        |text: &str| server.post("/api/datasets/0/caption", &json!({ "clip": "a.gif", "caption": text }));
    caption("a cloud that drifts").ok();
    caption("a cloud that stays").ok();
    assert_eq!(fs::read_to_string(desk.path("clips/a.txt")).unwrap(), "a cloud that stays\n");
    assert_eq!(fs::read_to_string(desk.path("clips/a.txt.bak")).unwrap(), "a drifting cloud");
    server
        .post("/api/datasets/0/caption", &json!({ "clip": "../recipe.toml", "caption": "x" }))
        .refused(404, "clip");
    let clips = || {
        let clips = desk.succeed(&["plan", "recipe.toml", "--json"]).stdout;
        serde_json::from_str::<Value>(&clips).unwrap()["plan"]["dataset"]["clips"].clone()
    };
    let exclude = |excluded: bool| {
        server.post("/api/datasets/0/exclude", &json!({ "clip": "a.gif", "excluded": excluded })).ok();
        let all = server.get("/api/datasets/0/clips").ok()["clips"].clone();
        let own = all.as_array().unwrap().iter().find(|clip| clip["name"] == "a.gif").unwrap().clone();
        (own["excluded"].clone(), own["caption"].clone())
    };
    assert_eq!(clips(), json!(2));
    assert_eq!(exclude(true), (json!(true), json!("a cloud that stays")));
    assert_eq!(clips(), json!(1));
    assert_eq!(exclude(false), (json!(false), json!("a cloud that stays")));
    assert_eq!(clips(), json!(2));
}

/// Many pages that watch, and many clips that wait, cost neither answers nor memory.
#[test]
fn many_watch_and_many_clips_wait() {
    let desk = Desk::new();
    let server = Server::on(&desk);
    let auth = server.bearer();
    server.post("/api/runs", &json!({ "name": "cloud", "recipe": recipe(&desk, 3000, 0) })).ok();
    server.run_that("cloud", |run| run["step"].as_u64() > Some(5));
    let watch = |path: &str| {
        let mut stream = TcpStream::connect(("localhost", server.port)).unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {auth}\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream
    };
    // Half of them never read what they are sent.
    let mut watchers: Vec<TcpStream> =
        (0..100).flat_map(|_| [watch("/api/events"), watch("/api/runs/cloud/events")]).collect();
    for number in 0..50 {
        server.post("/v1/videos", &json!({ "prompt": format!("cloud {number}"), "model": "model", "size": "16x16", "num_inference_steps": 2 })).ok();
    }
    let memory = || server.memory();
    let poll = |rounds: usize| {
        for _ in 0..rounds {
            assert_eq!(server.get("/v1/videos?limit=100").ok()["data"].as_array().map(Vec::len), Some(50));
            assert_eq!(server.get("/api/runs").ok()["runs"][0]["status"], "running");
        }
    };
    poll(50);
    let before = memory();
    poll(400);
    let grown = memory().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more after 800 requests");
    let mut piece = [0; 4096];
    for watcher in watchers.iter_mut().step_by(2) {
        watcher.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert!(watcher.read(&mut piece).unwrap() > 0, "a page that watches was told nothing");
    }
    server.post("/api/runs/cloud/pause", &Value::Null).ok();
    let done = || {
        json!(
            server.get("/v1/videos?limit=100").ok()["data"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|job| job["status"] == "completed")
                .count()
        )
    };
    until(done, |count| *count == json!(50));
}

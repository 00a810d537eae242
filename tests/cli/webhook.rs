//! `tandem train --webhook`: an address is told what happens in a run, in its order, and a run does not depend on it.

use std::net::{Ipv4Addr, TcpListener};

use serde_json::Value;

use crate::desk::Desk;
use crate::endpoint::{Endpoint, Reply};

const SECRET: &str = "a-secret-that-nobody-must-see";

/// What the endpoint was told, each event with its name.
fn events(endpoint: &Endpoint) -> Vec<(String, Value)> {
    let seen = endpoint.seen.lock().unwrap();
    seen.iter()
        .map(|request| (request.body["event"].as_str().unwrap().to_owned(), request.body.clone()))
        .collect()
}

fn ok(count: usize) -> Vec<Reply> {
    (0..count).map(|_| Reply::Status(200, String::new())).collect()
}

/// Start, clips before and after, end; one attempt that fails is made again.
#[test]
fn a_run_tells_what_happens() {
    let desk = Desk::new();
    let replies = [Reply::Status(503, String::new())].into_iter().chain(ok(4)).collect();
    let endpoint = Endpoint::new(replies);
    let hook = format!("{}/{SECRET}", endpoint.address);
    let words =
        ["train", "recipe.toml", "--webhook-env", "HOOK", "--set", "sample.prompts=[\"a cloud --s 1\"]"];
    let output = desk.command(&words).env("HOOK", hook).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let told = events(&endpoint);
    let names: Vec<&str> = told.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["started", "started", "clips", "clips", "finished"]);
    assert_eq!(told[0].1, told[1].1, "the second attempt says the same");
    assert_eq!((&told[1].1["run"], &told[1].1["steps"]), (&"recipe".into(), &2.into()));
    let clip = told[3].1["files"][0].as_str().unwrap();
    assert!(told[3].1["step"] == 2 && desk.path(clip).is_file(), "{:?}", told[3]);
    assert_eq!(told[4].1["finished"], 2);
    let everything = [output.stdout, output.stderr].into_iter().chain(desk.files().into_values());
    for bytes in everything {
        let found = bytes.windows(SECRET.len()).any(|part| part == SECRET.as_bytes());
        assert!(!found, "the address is written down");
    }
}

/// A run that fails says why; one whose address is not reached goes on, and says that once an event without the address.
#[test]
fn failures_are_told_and_an_address_that_is_gone_is_no_failure() {
    let desk = Desk::new();
    let endpoint = Endpoint::new(ok(2));
    let words = ["train", "recipe.toml", "--webhook", &endpoint.address];
    let broken =
        ["--set", "optimizer.lr=1e3", "--set", "train.steps=40", "--set", "checkpoint.every_steps=0"];
    let outcome = desk.run(&[&words[..], &broken].concat());
    assert_ne!(outcome.code, Some(0), "{}", outcome.stdout);
    let told = events(&endpoint);
    let (name, facts) = told.last().unwrap();
    let why = facts["error"].as_str().unwrap_or_else(|| panic!("{told:?}\n{outcome:?}"));
    assert!(name == "failed" && outcome.stderr.contains(why), "{told:?}\n{}", outcome.stderr);

    let port = {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.local_addr().unwrap().port()
    };
    let desk = Desk::new();
    let gone = format!("http://localhost:{port}/{SECRET}");
    let outcome = desk.succeed(&["train", "recipe.toml", "--webhook", &gone]);
    assert!(outcome.stderr.contains("localhost") && !outcome.stderr.contains(SECRET), "{}", outcome.stderr);
}

#[test]
fn an_address_that_is_none_is_refused() {
    let desk = Desk::new();
    desk.refuse(&["train", "recipe.toml", "--webhook", "ftp://host/x"], &["--webhook", "http://"]);
    desk.refuse(
        &["train", "recipe.toml", "--webhook-env", "NO_SUCH_HOOK"],
        &["NO_SUCH_HOOK", "--webhook-env"],
    );
}

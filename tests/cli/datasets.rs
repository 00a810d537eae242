//! Datasets of the hub: from a recipe that names one to its cached clips.

use std::fs;

use proofs::hub::{Repository, Server};

use crate::desk::{Desk, Outcome};

/// A hub with the clips of `desk` in `train`, as a tar file in `shards`, and a table in `tables`; and `desk` without clips.
fn hub(desk: &Desk) -> Server {
    fs::create_dir_all(desk.path("repository/shards")).unwrap();
    fs::create_dir_all(desk.path("repository/tables")).unwrap();
    let mut shard = tar::Builder::new(fs::File::create(desk.path("repository/shards/0.tar")).unwrap());
    shard.append_dir_all("", desk.path("clips")).unwrap();
    shard.finish().unwrap();
    fs::rename(desk.path("clips"), desk.path("repository/train")).unwrap();
    desk.write("repository/train/0.parquet", "a table");
    desk.write("repository/tables/0.parquet", "a table");
    let repository = Repository::of(&desk.path("repository"));
    Server::start(move |request, _| repository.honest(request))
}

fn run(desk: &Desk, server: &Server, words: &[&str], offline: &str) -> Outcome {
    let mut command = desk.command(words);
    command.env("HF_HOME", desk.path("hugging")).env("HF_ENDPOINT", &server.address);
    command.env("HF_HUB_OFFLINE", offline).env_remove("HF_HUB_CACHE").output().unwrap().into()
}

#[test]
fn a_dataset_of_the_hub_is_told_fetched_and_read_as_a_folder() {
    let desk = Desk::new();
    let server = hub(&desk);
    desk.change("folder = \"clips\"", "folder = \"hf://someone/clips/train\"");
    let plan = ["plan", "recipe.toml"];
    let told = run(&desk, &server, &plan, "0");
    told.assert_refused(&[
        "hf://someone/clips/train is not on this machine yet",
        "`tandem fetch hf://someone",
    ]);
    assert!(server.asked().is_empty(), "a plan fetches nothing");
    let fetched = run(&desk, &server, &["fetch", "hf://someone/clips/train", "--json"], "0");
    assert_eq!(fetched.code, Some(0), "{}", fetched.stderr);
    assert_eq!(server.asked_for("/a.gif").len(), 1);
    assert!(server.asked()[0].path.starts_with("/api/datasets/someone/clips/revision/main"));
    assert!(server.asked_for(".parquet").is_empty() && server.asked_for(".tar").is_empty());
    assert!(desk.path("hugging/hub/datasets--someone--clips/snapshots").is_dir());
    let planned = run(&desk, &server, &plan, "1");
    assert_eq!(planned.code, Some(0), "{}", planned.stderr);
    let cached = run(&desk, &server, &["cache", "recipe.toml"], "0");
    assert!(cached.code == Some(0) && cached.stdout.contains("2 clips are cached"), "{}", cached.stderr);
    assert_eq!(server.asked_for("/a.gif").len(), 1, "what is there is not fetched again");

    // Shards of the hub; the set has the name of their folder.
    let sets = "folder = \"hf://someone/clips/train\"";
    desk.change(sets, "sets = [{ folder = \"hf://someone/clips/shards/*.tar\" }]");
    let cached = run(&desk, &server, &["cache", "recipe.toml"], "0");
    assert!(cached.code == Some(0) && cached.stdout.contains("2 clips are cached"), "{}", cached.stderr);
    let told = run(&desk, &server, &["captions", "recipe.toml"], "1");
    assert!(told.stdout.contains("shards/a.gif (1 sample an epoch)\n  a drifting cloud"), "{}", told.stdout);
}

#[test]
fn datasets_that_are_none_are_refused_by_name() {
    let desk = Desk::new();
    let server = hub(&desk);
    let refused = |id: &str, told: &[&str]| run(&desk, &server, &["fetch", id], "0").assert_refused(told);
    refused("hf://someone", &["is not a dataset of the hub", "hf://owner/name"]);
    refused("hf://someone/clips/../other", &["is not a dataset of the hub"]);
    refused("hf://someone/clips/tables", &["hf://someone/clips/tables has neither videos", "Parquet"]);
    refused("hf://someone/clips/trainee", &["has neither videos"]);
    run(&desk, &server, &["fetch", "hf://someone/clips", "--only", "vae"], "0").assert_refused(&["--only"]);
    run(&desk, &server, &["fetch", "hf://someone/clips"], "1").assert_refused(&["HF_HUB_OFFLINE"]);
    desk.change("folder = \"clips\"", "folder = \"hf://someone/clips\"");
    let write = ["captions", "recipe.toml", "--write", "--endpoint", &server.address, "--model", "eyes"];
    run(&desk, &server, &write, "0")
        .assert_refused(&["data.folder", "a folder on this machine is needed here"]);
}

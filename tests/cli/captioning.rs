//! `tandem captions --write`: frames go to the endpoint that the user names, and captions come back into files.

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::json;

use crate::desk::{Desk, Outcome};
use crate::endpoint::{Endpoint, Reply};

/// A chat completion that says `text`.
fn says(text: &str) -> Reply {
    let message = json!({ "role": "assistant", "content": text });
    Reply::Status(200, json!({ "choices": [{ "message": message }] }).to_string())
}

const KEY: &str = "a-key-that-nobody-must-see";

/// Two clips without a caption, `b.mp4` and `c.gif`, beside one that has one.
fn desk() -> Desk {
    let desk = Desk::new();
    std::fs::remove_file(desk.path("clips/b.txt")).unwrap();
    std::fs::copy(desk.path("clips/a.gif"), desk.path("clips/c.gif")).unwrap();
    desk
}

fn write(desk: &Desk, endpoint: &str, more: &[&str]) -> Outcome {
    let arguments = [
        "captions",
        "recipe.toml",
        "--write",
        "--endpoint",
        endpoint,
        "--model",
        "eyes",
        "--key-env",
        "EYES_KEY",
    ];
    desk.command(&[&arguments[..], more].concat()).env("EYES_KEY", KEY).output().unwrap().into()
}

fn caption(desk: &Desk, name: &str) -> Option<String> {
    std::fs::read_to_string(desk.path(&format!("clips/{name}.txt"))).ok()
}

/// An answer that fails is asked for again, what is there is neither overwritten nor asked for, and the key stays secret.
#[test]
fn captions_are_written_by_an_endpoint_that_fails_now_and_then() {
    let desk = desk();
    let busy = || Reply::Status(500, "try again".into());
    let replies = vec![
        busy(),
        Reply::Drop,
        says("A grey cloud\n drifts. "),
        says("<think>What is it?</think>\n\nA second cloud."),
    ];
    let endpoint = Endpoint::new(replies);
    let outcome = write(&desk, &endpoint.address, &["--frames", "3", "--prompt", "What is it?"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(caption(&desk, "a").as_deref(), Some("a drifting cloud"), "it had a caption");
    assert_eq!(caption(&desk, "b").as_deref(), Some("A grey cloud drifts.\n"));
    assert_eq!(caption(&desk, "c").as_deref(), Some("A second cloud.\n"));
    assert!(!format!("{}{}", outcome.stdout, outcome.stderr).contains(KEY), "the key was printed");
    assert_eq!(endpoint.count(), 4);
    for request in endpoint.seen.lock().unwrap().iter() {
        assert!(request.line.starts_with("POST /v1/chat/completions "), "{}", request.line);
        assert!(request.headers.contains(&format!("authorization: bearer {KEY}")));
        assert_eq!(request.body["model"], "eyes");
        let content = request.body["messages"][0]["content"].as_array().unwrap();
        assert_eq!(content[0], json!({ "type": "text", "text": "What is it?" }));
        assert_eq!(content.len(), 4);
        for frame in &content[1..] {
            assert_eq!(frame["type"], "image_url");
            let url = frame["image_url"]["url"].as_str().unwrap();
            let jpeg = BASE64_STANDARD.decode(url.strip_prefix("data:image/jpeg;base64,").unwrap()).unwrap();
            let path = desk.path("frame.jpg");
            std::fs::write(&path, jpeg).unwrap();
            let picture = data::Picture::open(&path).unwrap();
            assert_eq!((picture.width(), picture.height()), (16, 16));
        }
    }
    let again = write(&desk, &endpoint.address, &[]);
    assert!(
        again.code == Some(0) && again.stdout.contains("0 captions were written, 3 clips have theirs"),
        "{}",
        again.stdout
    );
    assert_eq!(endpoint.count(), 4, "all clips have captions, and something was sent");
    // The recipe is as good as any other now.
    desk.succeed(&["captions", "recipe.toml"]);
}

/// What was written is kept when the endpoint gives up, and the same command goes on; `--force` begins again.
#[test]
fn captioning_goes_on_where_it_ended() {
    let desk = desk();
    let endpoint = Endpoint::new(vec![
        says("one"),
        Reply::Status(400, "{\"error\": \"too many pictures\"}".into()),
        says("two"),
        says("three"),
        says("four"),
        says("five"),
    ]);
    write(&desk, &endpoint.address, &[]).assert_refused(&["c.gif", "400", "too many pictures"]);
    assert_eq!((caption(&desk, "b").as_deref(), caption(&desk, "c")), (Some("one\n"), None));
    assert_eq!(write(&desk, &endpoint.address, &[]).code, Some(0));
    assert_eq!(caption(&desk, "c").as_deref(), Some("two\n"));
    assert_eq!(write(&desk, &endpoint.address, &["--force"]).code, Some(0));
    let all = ["a", "b", "c"].map(|name| caption(&desk, name).unwrap());
    assert_eq!(all, ["three\n", "four\n", "five\n"]);
}

#[test]
fn endpoints_that_cannot_be_meant_are_refused_and_get_nothing() {
    let desk = desk();
    let endpoint = Endpoint::new(vec![Reply::Status(401, "no".into()), Reply::Status(302, String::new())]);
    write(&desk, &endpoint.address, &[]).assert_refused(&["--key-env", "401"]);
    write(&desk, &endpoint.address, &[]).assert_refused(&["sends us on"]);
    assert_eq!(endpoint.count(), 2, "a refusal is final");
    for address in ["localhost:8000", "ftp://localhost/v1", "http://"] {
        write(&desk, address, &[]).assert_refused(&["--endpoint", "is no address"]);
    }
    let secret = endpoint.address.replace("http://", "http://me:secret@");
    write(&desk, &secret, &[]).assert_refused(&["must not contain a password"]);
    let refuse = |arguments: &[&str], told: &[&str]| {
        desk.refuse(&[&["captions", "recipe.toml"], arguments].concat(), told);
    };
    refuse(&["--endpoint", &endpoint.address], &["--write"]);
    refuse(&["--write", "--model", "eyes"], &["--endpoint"]);
    let with_key =
        ["--write", "--endpoint", &endpoint.address, "--model", "eyes", "--key-env", "NO_SUCH_KEY"];
    refuse(&with_key, &["NO_SUCH_KEY is not set"]);
    let outcome = write(&desk, &endpoint.address, &["--set", "data.captions=metadata"]);
    outcome.assert_refused(&["data.captions", "metadata alone"]);
    assert_eq!(endpoint.count(), 2);
    assert_eq!((caption(&desk, "b"), caption(&desk, "c")), (None, None));
}

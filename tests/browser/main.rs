//! The page of `tandem serve` as people use it, in Debian's Chromium, on the tiny model of the first run, from an empty state.
//!
//! `cargo test --release -p tandem --test browser` needs the packages `chromium` and `chromium-driver`; without them it says so and
//! passes. Pictures of every page are left in `target/tmp/browser`.

// Helpers of tests are outside of `#[test]` functions, where the lint does not know them for what they are.
#![allow(clippy::unwrap_used)]

mod driver;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use driver::{Browser, Theme};

/// A server from an empty state on the clips and the model of the first run.
struct Server {
    child: Child,
    url: String,
    home: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let home = tempfile::tempdir().unwrap();
        let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/first-run");
        for part in ["clips", "model"] {
            copy(&recipes.join(part), &home.path().join(part));
        }
        let mut child = Command::new(env!("CARGO_BIN_EXE_tandem"))
            .args(["serve", "--json", "--port", "0", "--data", "clips", "--models", "model"])
            .current_dir(home.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let told: Value = serde_json::from_str(&line).unwrap();
        Self { child, url: told["url"].as_str().unwrap().to_owned(), home }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        match entry.path().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

/// Where pictures go.
fn album() -> PathBuf {
    let album = Path::new(env!("CARGO_TARGET_TMPDIR")).join("browser");
    fs::create_dir_all(&album).unwrap();
    album
}

/// A browser, or the reason that there is none past the capture of the test's output.
fn browser() -> Option<Browser> {
    let browser = Browser::start();
    if browser.is_none() {
        let words = b"skipped: no Chromium here; `apt-get install chromium chromium-driver` brings it and its driver\n";
        std::io::stderr().write_all(words).unwrap();
    }
    browser
}

#[test]
fn the_journey_on_a_desk_in_the_light() {
    if let Some(browser) = browser() {
        journey(&browser, 1440, Theme::Light);
    }
}

#[test]
fn the_journey_on_a_phone_in_the_dark() {
    if let Some(browser) = browser() {
        journey(&browser, 390, Theme::Dark);
    }
}

/// What may be wrong with clips, as `tandem cache --report` shows it, on a desk and on a phone.
#[test]
fn the_page_of_the_checks_of_clips() {
    if let Some(browser) = browser() {
        checks(&browser);
    }
}

/// One journey at a time: both train on all cores.
static TURN: Mutex<()> = Mutex::new(());

fn journey(browser: &Browser, width: u32, theme: Theme) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let server = Server::start();
    let height = if width < 600 { 844 } else { 900 };
    browser.shape(width, height, theme);
    let page = |name: &str| {
        browser.picture(&album().join(format!("{name}-{width}-{}.png", theme.name())));
        let overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth";
        assert_eq!(browser.run(overflow), 0, "{name} is wider than the window");
    };
    browser.open(&server.url);
    browser.reads("No runs yet");
    page("empty");
    train(browser, &page);
    try_it(browser, &page);
    edit(browser, &server, &page);
    // Keys change the page.
    browser.key("1");
    browser.wait("location.hash === '#/runs' && document.querySelector('[data-run]')");
    page("runs");
    report(browser, &server, &page);
    let foreign = "return performance.getEntriesByType('resource').map((one) => new URL(one.name).origin)\
                   .filter((origin) => origin !== location.origin && origin !== 'null')";
    assert_eq!(browser.run(foreign), serde_json::json!([]), "the page asks other hosts");
    // But for the plan that was to be refused.
    let is_refusal = |text: &String| text.contains("/api/plan - ") && text.contains("status of 400");
    let complaints: Vec<String> = browser.complaints().into_iter().filter(|text| !is_refusal(text)).collect();
    assert_eq!(complaints, Vec::<String>::new());
    // The same pages the other way round, to be looked at.
    let other = if theme == Theme::Light { Theme::Dark } else { Theme::Light };
    browser.shape(width, height, other);
    for (name, hash) in
        [("run", "#/runs/fox"), ("try", "#/try"), ("data", "#/data"), ("new-run", "#/runs/new")]
    {
        browser.run(&format!("location.hash = '{hash}'"));
        browser.wait("document.querySelector('main h1')");
        std::thread::sleep(std::time::Duration::from_millis(1200));
        browser.picture(&album().join(format!("{name}-{width}-{}.png", other.name())));
    }
}

/// A run from the form: planned, started, stopped in the middle, looked at anew, resumed, finished.
fn train(browser: &Browser, page: &dyn Fn(&str)) {
    browser.press("main", "New run");
    browser.press("main", "Write a recipe");
    browser.wait("document.querySelector('#run-recipe').value.includes('[model]')");
    browser.enter("#run-name", "fox");
    // What does not fit is said before anything starts.
    browser.enter("#run-data-sizes", "[[97, 96]]");
    browser.press("main", "Check the plan");
    browser.reads("97x96");
    browser.wait("document.querySelector('.message:not(.fine)')");
    page("refused");
    for (field, value) in [
        ("data-sizes", "[[96, 96]]"),
        ("train-steps", "30"),
        ("adapter-rank", "16"),
        ("optimizer-lr", "2e-3"),
        ("checkpoint-every_steps", "10"),
        ("sample-every", "10"),
        ("sample-steps", "6"),
    ] {
        browser.enter(&format!("#run-{field}"), value);
    }
    browser.enter("#run-prompts", "a tandi fox swinging on a blue background");
    browser.press("main", "Check the plan");
    browser.reads("Fits. 6 clips");
    page("new-run");
    browser.press("main", "Start");
    browser.wait("location.hash === '#/runs/fox'");
    browser.reads("running");
    browser.wait("/Step\\s+([1-9]\\d*) of 30/.test(document.querySelector('.facts').innerText)");
    browser.press("main", "Pause");
    browser.reads("paused");
    // In the middle of it all.
    browser.reload();
    browser.reads("paused");
    browser.press("main", "Resume");
    browser.reads("running");
    browser.press("main", "Save now");
    browser.press("main", "Sample now");
    browser.reads("finished");
    browser.wait("document.querySelectorAll('.sheet video').length >= 4");
    browser.wait("[...document.querySelectorAll('.sheet video')].every((one) => one.readyState >= 2)");
    // They play, and in step.
    browser.wait("document.querySelector('.sheet video').currentTime > 0");
    let apart = "(() => { const at = [...document.querySelectorAll('.sheet video')].map((one) => one.currentTime); \
                 return Math.max(...at) - Math.min(...at) < 0.2 })()";
    browser.wait(apart);
    page("run");
    browser.press(".sheet", "Before / after");
    browser.wait("document.querySelector('dialog[open] .slider .over video')?.readyState >= 2");
    page("before-after");
    browser.press("dialog", "Close");
    browser.click(".sheet .film");
    browser.reads("step 0");
    browser.key("\u{e014}"); // arrow to the right
    browser.wait("document.querySelector('dialog p').innerText.match(/step (\\d+)/)[1] > 0");
    browser.key("\u{e00c}"); // escape
    browser.wait("!document.querySelector('dialog').open");
}

/// A sweep, a comparison, and a clip that is cancelled.
fn try_it(browser: &Browser, page: &dyn Fn(&str)) {
    browser.press("main", "Try it");
    browser.enter("#try-prompt", "a tandi fox swinging on a blue background");
    browser.wait("document.querySelector('#try-model').value === 'fox'");
    browser.enter("#try-strengths", "0, 0.5, 1");
    browser.press("main", "Make");
    browser.wait("document.querySelectorAll('.gallery video').length === 3");
    let different = "(() => { const all = [...document.querySelectorAll('.gallery figcaption')].map((one) => one.innerText); \
                     return all.some((one) => one.includes('no adapter')) && all.some((one) => one.includes('at 0.5')) })()";
    browser.wait(different);
    browser.wait("[...document.querySelectorAll('.gallery video')].every((one) => one.readyState >= 2)");
    browser.click(".gallery figure:nth-child(1) input");
    browser.click(".gallery figure:nth-child(3) input");
    browser.press("main", "Compare two");
    browser.wait("document.querySelector('dialog[open] .slider')");
    browser.key("\u{e00c}");
    browser.click("details summary");
    browser.enter("#try-steps", "900");
    browser.enter("#try-strengths", "1");
    browser.press("main", "Make");
    browser.reads("in progress");
    page("try");
    browser.press("main", "Cancel");
    browser.reads("Nothing waits");
    browser.reload();
    browser.wait("document.querySelectorAll('.gallery video').length === 3");
}

/// The report of the run, as a file: charts, clips that play together, the plan.
fn report(browser: &Browser, server: &Server, page: &dyn Fn(&str)) {
    let path = server.home.path().join("runs/fox/report.html");
    browser.open(&format!("file://{}", path.display()));
    browser.reads("ended: step 30 of 30");
    browser.wait("document.querySelectorAll('.chart svg').length >= 5");
    browser.wait("document.querySelectorAll('video').length >= 4");
    browser.wait(
        "[...document.querySelectorAll('video')].every((one) => one.readyState >= 2 && one.currentTime > 0)",
    );
    browser.reads("step-000010.safetensors");
    let links = "return [...document.querySelectorAll('a')].map((one) => one.href)";
    let links = browser.run(links);
    let links = links.as_array().unwrap();
    assert!(
        !links.is_empty() && links.iter().all(|link| link.as_str().unwrap().starts_with("file:///")),
        "{links:?}"
    );
    page("report");
    browser.open(&server.url);
    browser.wait("document.querySelector('[data-run]')");
}

/// The page of clips of which one is nearly the same as another and one has bars: every clip with its pictures and what was found, whole
/// in a narrow window too, without a request to anyone.
fn checks(browser: &Browser) {
    let home = tempfile::tempdir().unwrap();
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/first-run");
    for part in ["clips", "model"] {
        copy(&recipes.join(part), &home.path().join(part));
    }
    let clips = home.path().join("clips");
    for ending in ["mp4", "txt"] {
        let to = format!(
            "a_very_long_name_of_a_clip_that_has_no_room_on_a_phone_and_no_space_to_break_at.{ending}"
        );
        fs::copy(clips.join(format!("hop_green.{ending}")), clips.join(to)).unwrap();
    }
    let grey =
        |y: usize, x: usize, t: usize| if (12..52).contains(&y) { (80 + 3 * x + 5 * t) as u8 } else { 4 };
    let pixels =
        (0..17).flat_map(|t| (0..64).flat_map(move |y| (0..64).flat_map(move |x| [grey(y, x, t); 3])));
    let film = data::Film::new(64, 64, pixels.collect()).unwrap();
    data::write_webp(&clips.join("with_bars.webp"), &film, 16.0).unwrap();
    fs::write(clips.join("with_bars.txt"), "a gradient").unwrap();
    let recipe =
        "[model]\nfolder = \"model\"\n[data]\nfolder = \"clips\"\nsizes = [[64, 64]]\nframes = [5]\n";
    fs::write(home.path().join("fox.toml"), recipe).unwrap();
    let written = Command::new(env!("CARGO_BIN_EXE_tandem"))
        .args(["cache", "fox.toml", "--report", "clips.html"])
        .current_dir(home.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(written.status.success(), "{}", String::from_utf8_lossy(&written.stderr));
    for (width, height, theme) in [(1440, 900, Theme::Light), (390, 844, Theme::Dark)] {
        browser.shape(width, height, theme);
        browser.open(&format!("file://{}", home.path().join("clips.html").display()));
        browser.reads("8 clips, ");
        browser.reads("nearly the same as a_very_long_name");
        browser.reads("black bars (12 above, 12 below, in pixels)");
        browser.reads("data.crop_bars = true cuts them off");
        browser.wait("document.querySelectorAll('section').length === 8");
        browser.wait(
            "[...document.querySelectorAll('section')].every((one) => one.querySelectorAll('img').length === 4)",
        );
        browser.wait("[...document.images].every((one) => one.complete && one.naturalWidth > 0)");
        let overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth";
        assert_eq!(browser.run(overflow), 0, "the page is wider than a window of {width} pixels");
        let pictures = "return [...document.querySelectorAll('.row')].filter((one) => \
                        one.scrollWidth > one.clientWidth).length";
        assert_eq!(browser.run(pictures), 0, "pictures are cut off");
        let names = "return [...document.querySelectorAll('h1, h2, li')].filter((one) => \
                     one.scrollWidth > one.clientWidth).map((one) => one.textContent)";
        assert_eq!(browser.run(names), serde_json::json!([]), "words run out of their card");
        let asked = "return performance.getEntriesByType('resource').map((one) => one.name)\
                     .filter((name) => !name.startsWith('data:'))";
        assert_eq!(browser.run(asked), serde_json::json!([]), "the page asks for something");
        assert_eq!(browser.complaints(), Vec::<String>::new());
        browser.picture(&album().join(format!("checks-{width}-{}.png", theme.name())));
    }
}

/// A caption, edited in place, and a clip that is left out.
fn edit(browser: &Browser, server: &Server, page: &dyn Fn(&str)) {
    browser.press("header", "Data");
    browser.wait("document.querySelectorAll('.gallery figure').length === 6");
    browser.reads("Sizes and lengths are those of fox.toml");
    browser.enter(".gallery figure:nth-child(1) textarea", "a tandi fox that hops");
    browser.reads("saved");
    let clips = server.home.path().join("clips");
    assert_eq!(fs::read_to_string(clips.join("hop_green.txt")).unwrap(), "a tandi fox that hops\n");
    assert!(clips.join("hop_green.txt.bak").is_file(), "the caption before is gone");
    browser.press(".gallery figure:nth-child(2)", "Exclude");
    browser.wait("document.querySelectorAll('.gallery .excluded').length === 1");
    assert!(!clips.join("look_teal.gif").exists());
    page("data");
    browser.press(".gallery .excluded", "Include");
    browser.wait(
        "document.querySelectorAll('.gallery figure').length === 6 && !document.querySelector('.excluded')",
    );
    assert!(clips.join("look_teal.gif").is_file());
}

//! A browser, driven by the WebDriver protocol.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::{Value, json};
use ureq::Agent;

/// Where Debian's packages `chromium` and `chromium-driver` put them.
const CHROMIUM: &str = "/usr/bin/chromium";
const DRIVER: &str = "/usr/bin/chromedriver";
/// How long something may take to show.
const PATIENCE: Duration = Duration::from_secs(240);

/// A window of a browser.
pub struct Browser {
    driver: Child,
    agent: Agent,
    session: String,
}

/// Light or dark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Theme {
    Light,
    Dark,
}

impl Theme {
    pub fn name(self) -> &'static str {
        match self {
            Self::Light => "light",
            Self::Dark => "dark",
        }
    }
}

impl Browser {
    /// A window of its own; nothing where no browser is installed.
    pub fn start() -> Option<Self> {
        if !Path::new(CHROMIUM).exists() || !Path::new(DRIVER).exists() {
            return None;
        }
        let mut driver = Command::new(DRIVER)
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let port = lines.find_map(|line| {
            let line = line.unwrap();
            line.split("successfully on port ").nth(1)?.trim_end_matches('.').parse::<u16>().ok()
        });
        // The rest of what it says must go somewhere.
        std::thread::spawn(move || lines.for_each(drop));
        let agent: Agent = Agent::config_builder().http_status_as_error(false).build().into();
        let home = format!("http://localhost:{}/session", port.unwrap());
        let mut browser = Self { driver, agent, session: home.clone() };
        let options = json!({
            "binary": CHROMIUM,
            "args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars",
                     "--force-device-scale-factor=1", "--autoplay-policy=no-user-gesture-required"],
        });
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "goog:chromeOptions": options, "goog:loggingPrefs": { "browser": "ALL" } } } });
        let session = browser.post("", &wanted);
        browser.session = format!("{home}/{}", session["sessionId"].as_str().unwrap());
        Some(browser)
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        let url = format!("{}{path}", self.session);
        let sent = self.agent.post(&url).header("content-type", "application/json").send(body.to_string());
        let mut response = sent.unwrap();
        let text = response.body_mut().with_config().limit(64 << 20).read_to_string().unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert!(response.status().is_success(), "{path} {body}: {value}");
        value["value"].clone()
    }

    fn devtools(&self, command: &str, parameters: Value) -> Value {
        self.post("/goog/cdp/execute", &json!({ "cmd": command, "params": parameters }))
    }

    /// The size and the colours of the page from now on.
    pub fn shape(&self, width: u32, height: u32, theme: Theme) {
        let phone = width < 600;
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone });
        self.devtools("Emulation.setDeviceMetricsOverride", size);
        let scheme = json!([{ "name": "prefers-color-scheme", "value": theme.name() }]);
        self.devtools("Emulation.setEmulatedMedia", json!({ "features": scheme }));
    }

    pub fn open(&self, url: &str) {
        self.post("/url", &json!({ "url": url }));
    }

    pub fn reload(&self) {
        self.post("/refresh", &json!({}));
    }

    /// What the body of a function gives.
    pub fn run(&self, script: &str) -> Value {
        self.post("/execute/sync", &json!({ "script": script, "args": [] }))
    }

    /// Waits until an expression holds.
    #[track_caller]
    pub fn wait(&self, expression: &str) {
        let begun = Instant::now();
        while self.run(&format!("return Boolean({expression})")) != json!(true) {
            let page = || self.run("return document.body.innerText").as_str().unwrap_or_default().to_owned();
            assert!(begun.elapsed() < PATIENCE, "not in {PATIENCE:?}: {expression}\n{}", page());
            std::thread::sleep(Duration::from_millis(80));
        }
    }

    /// Waits until the page says `text`.
    #[track_caller]
    pub fn reads(&self, text: &str) {
        self.wait(&format!("document.body.innerText.toLowerCase().includes({}.toLowerCase())", json!(text)));
    }

    /// The element that a CSS selector finds, once it can be seen.
    #[track_caller]
    fn element(&self, selector: &str) -> String {
        self.wait(&format!("document.querySelector({})?.checkVisibility()", json!(selector)));
        let found = self.post("/element", &json!({ "using": "css selector", "value": selector }));
        found.as_object().unwrap().values().next().unwrap().as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub fn click(&self, selector: &str) {
        let element = self.element(selector);
        // Out from under the header.
        self.run(&format!(
            "document.querySelector({}).scrollIntoView({{ block: 'center' }})",
            json!(selector)
        ));
        self.post(&format!("/element/{element}/click"), &json!({}));
    }

    /// Clicks the first button or link that says `text`, in what `within` finds.
    #[track_caller]
    pub fn press(&self, within: &str, text: &str) {
        let (within, words) = (json!(within), json!(text));
        let find = format!(
            "[...document.querySelectorAll({within})].flatMap((one) => [...one.querySelectorAll('button, a')])\
             .find((one) => one.innerText.trim() === {words} && one.checkVisibility() && !one.disabled)"
        );
        self.wait(&find);
        self.run(&format!("{find}.setAttribute('data-press', '')"));
        self.click("[data-press]");
        self.run("document.querySelector('[data-press]')?.removeAttribute('data-press')");
    }

    /// Types `text` in place of what a field has, and leaves it.
    #[track_caller]
    pub fn enter(&self, selector: &str, text: &str) {
        let element = self.element(selector);
        self.post(&format!("/element/{element}/clear"), &json!({}));
        self.post(&format!("/element/{element}/value"), &json!({ "text": text }));
        self.run("document.activeElement.blur()");
    }

    /// Presses a key.
    pub fn key(&self, key: &str) {
        let actions = json!([{ "type": "keyDown", "value": key }, { "type": "keyUp", "value": key }]);
        self.post("/actions", &json!({ "actions": [{ "type": "key", "id": "keys", "actions": actions }] }));
    }

    /// The whole page as a PNG.
    pub fn picture(&self, path: &Path) {
        self.run("scrollTo(0, 0)");
        let shot = self.devtools("Page.captureScreenshot", json!({ "captureBeyondViewport": true }));
        std::fs::write(path, BASE64_STANDARD.decode(shot["data"].as_str().unwrap()).unwrap()).unwrap();
    }

    /// Complaints of the page since this was asked last.
    pub fn complaints(&self) -> Vec<String> {
        let log = self.post("/se/log", &json!({ "type": "browser" }));
        let rows = log.as_array().cloned().unwrap_or_default();
        let severe = rows.iter().filter(|row| row["level"] == "SEVERE");
        severe.map(|row| row["message"].as_str().unwrap_or_default().to_owned()).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.agent.delete(&self.session).call();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

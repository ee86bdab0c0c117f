//! A headless Chromium in a place of the laboratory, driven by the DevTools protocol over a pipe.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::laboratory::lab::Place;
use crate::laboratory::process::Process;

/// How long the browser may take for anything on a busy machine.
const PATIENCE: Duration = Duration::from_secs(40);
const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");
/// Without a sandbox, because it is root; and without what it does for its maker.
const FLAGS: [&str; 14] = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-crash-reporter",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--user-data-dir=/tmp/profile",
    "--remote-debugging-pipe",
    "about:blank",
];

/// Where the browser is: the system's, or unpacked below target/tools, which takes a minute once.
///
/// # Errors
/// Why there is none.
pub fn find() -> Result<(PathBuf, PathBuf)> {
    let program = Path::new("/usr/lib/chromium/chromium");
    if program.exists() {
        return Ok((PathBuf::new(), program.to_owned()));
    }
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| Path::new(REPOSITORY).join("target"), PathBuf::from);
    let root = target.join("tools/chromium");
    let unpack = Path::new(REPOSITORY).join("release/unpack");
    let output = Command::new(unpack).arg("trixie").arg(&root).args(["chromium", "fonts-dejavu-core"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.success(),
        "no Chromium, and it cannot be unpacked: {}",
        said.lines().last().unwrap_or_default()
    );
    Ok((root, program.to_owned()))
}

/// A browser with one page. Dropping it ends all its processes.
pub struct Browser {
    _process: Process,
    commands: ChildStdin,
    answers: Receiver<Value>,
    session: String,
    next: u64,
    /// What the page's console, its policy and its scripts complained of.
    pub complaints: Vec<String>,
}

impl Browser {
    /// Starts it among a place's processes.
    pub fn start(place: &Place, (root, program): &(PathBuf, PathBuf)) -> Result<Browser> {
        let run = Path::new(REPOSITORY).join("tests/cli/browser/run");
        let (root, program) = (root.display().to_string(), program.display().to_string());
        let arguments = [&[root.as_str(), program.as_str()][..], &FLAGS].concat();
        let mut process = place.spawn(&run, &arguments)?;
        let (commands, output) = (process.stdin()?, process.stdout()?);
        let (sender, answers) = channel();
        std::thread::spawn(move || read(output, |answer| sender.send(answer).is_ok()));
        let mut browser =
            Browser { _process: process, commands, answers, session: String::new(), next: 0, complaints: vec![] };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"})).context(place.log_tail())?;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        browser.session =
            browser.call("Target.attachToTarget", attach)?["sessionId"].as_str().unwrap_or_default().to_owned();
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(browser)
    }

    /// One command, and what comes back.
    pub fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.next += 1;
        let mut command = json!({"id": self.next, "method": method, "params": parameters});
        if !self.session.is_empty() {
            command["sessionId"] = json!(self.session);
        }
        self.commands.write_all(&[command.to_string().as_bytes(), b"\0"].concat()).context("the browser is gone")?;
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let answer =
                self.answers.recv_timeout(left).with_context(|| format!("{method}: the browser does not answer"))?;
            if answer["id"] != self.next {
                self.note(&answer);
                continue;
            }
            ensure!(answer["error"].is_null(), "{method}: {}", answer["error"]);
            return Ok(answer["result"].clone());
        }
    }

    fn note(&mut self, event: &Value) {
        let said = match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => &event["params"]["exceptionDetails"],
            Some("Log.entryAdded") => &event["params"]["entry"],
            Some("Runtime.consoleAPICalled") => &event["params"]["args"],
            _ => return,
        };
        self.complaints.push(said.to_string());
    }

    /// Goes to an address, in a window of this width.
    pub fn open(&mut self, address: &str, width: u32) -> Result<()> {
        self.resize(width)?;
        let gone = self.call("Page.navigate", json!({"url": address}))?;
        ensure!(gone["errorText"].is_null(), "{address}: {}", gone["errorText"]);
        Ok(())
    }

    pub fn resize(&mut self, width: u32) -> Result<()> {
        let size = json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", size).map(drop)
    }

    /// `dark` or `light`.
    pub fn prefer(&mut self, scheme: &str) -> Result<()> {
        let features = json!([{"name": "prefers-color-scheme", "value": scheme}]);
        self.call("Emulation.setEmulatedMedia", json!({"features": features})).map(drop)
    }

    /// The value of an expression in the page.
    pub fn value(&mut self, expression: &str) -> Result<Value> {
        let asked = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let answer = self.call("Runtime.evaluate", asked)?;
        ensure!(answer["exceptionDetails"].is_null(), "{expression}: {}", answer["exceptionDetails"]);
        Ok(answer["result"]["value"].clone())
    }

    /// The text that a person would see.
    pub fn text(&mut self) -> Result<String> {
        Ok(self.value("document.body.innerText")?.as_str().unwrap_or_default().to_owned())
    }

    /// Waits until an expression is true.
    pub fn wait_for(&mut self, expression: &str) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while self.value(expression)? != true {
            if Instant::now() > until {
                let text = self.text()?;
                bail!("{expression} did not come true: {:?}; {text}", self.complaints);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Waits until this is to be read.
    pub fn wait_for_text(&mut self, text: &str) -> Result<()> {
        self.wait_for(&format!("document.body.innerText.includes({})", json!(text)))
    }

    /// A key as a keyboard sends it: `Enter`, `Tab`, `Escape`, or a character.
    pub fn press(&mut self, key: &str) -> Result<()> {
        let (code, number, text) = match key {
            "Enter" => ("Enter", 13, "\r"),
            "Tab" => ("Tab", 9, ""),
            "Escape" => ("Escape", 27, ""),
            character => ("", 0, character),
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({"type": kind, "key": key, "code": code, "windowsVirtualKeyCode": number});
            if kind == "keyDown" && !text.is_empty() {
                event["text"] = json!(text);
            }
            self.call("Input.dispatchKeyEvent", event)?;
        }
        Ok(())
    }

    pub fn write(&mut self, text: &str) -> Result<()> {
        text.chars().try_for_each(|c| self.press(&c.to_string()))
    }

    /// Saves target/screenshots/NAME.png, of the whole page.
    pub fn screenshot(&mut self, name: &str) -> Result<PathBuf> {
        let shot = self.call("Page.captureScreenshot", json!({"format": "png", "captureBeyondViewport": true}))?;
        let picture = data_encoding::BASE64.decode(shot["data"].as_str().unwrap_or_default().as_bytes())?;
        let directory = Path::new(REPOSITORY).join("target/screenshots");
        std::fs::create_dir_all(&directory)?;
        let path = directory.join(format!("{name}.png"));
        std::fs::write(&path, picture)?;
        Ok(path)
    }
}

/// Messages end with a zero.
fn read(mut output: BufReader<std::process::ChildStdout>, mut each: impl FnMut(Value) -> bool) {
    let mut message = Vec::new();
    while matches!(output.read_until(0, &mut message), Ok(1..)) {
        let text = message.strip_suffix(b"\0").unwrap_or(&message);
        if serde_json::from_slice(text).is_ok_and(|answer| !each(answer)) {
            return;
        }
        message.clear();
    }
}

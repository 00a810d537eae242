//! The program's output: lines, progress bars, and JSON for machines. The only module that prints.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{
    FormattedDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle,
};

use super::webhook::Webhook;

/// The format of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Voice {
    /// Lines for people on standard output; bars on standard error if that is a terminal.
    Human,
    /// One JSON object a line on standard output, nothing else there; notes on standard error.
    Json,
    /// Nothing but notes on standard error, for replicas other than rank 0.
    Silent,
}

/// The output of a command.
#[derive(Debug, Clone)]
pub struct Ui {
    voice: Voice,
    events: Events,
    bars: MultiProgress,
    done: Arc<Mutex<Vec<PhaseDone>>>,
    webhook: Option<Arc<Webhook>>,
}

/// What is reported to machines besides results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Events {
    /// Nothing: a command gives one object.
    None,
    /// Each phase as it ends.
    Phases,
}

/// A finished phase.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PhaseDone {
    /// Its label.
    pub label: &'static str,
    /// Its duration.
    pub seconds: f64,
}

/// Shorter phases are not announced.
const WORTH_A_LINE: Duration = Duration::from_secs(1);

impl Ui {
    /// A user interface; bars are hidden if standard error is not a terminal.
    pub fn new(voice: Voice) -> Self {
        let is_visible = std::io::stderr().is_terminal() && voice == Voice::Human;
        let target = if is_visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self {
            voice,
            events: Events::None,
            bars: MultiProgress::with_draw_target(target),
            done: Arc::default(),
            webhook: None,
        }
    }

    /// The same, which says nothing but notes.
    pub fn silent(&self) -> Self {
        Self {
            voice: Voice::Silent,
            bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()),
            webhook: None,
            ..self.clone()
        }
    }

    /// The format of results.
    pub fn voice(&self) -> Voice {
        self.voice
    }

    /// The same, which also reports phases to machines: for commands that take long.
    pub fn with_phases(&self) -> Self {
        Self { events: Events::Phases, ..self.clone() }
    }

    /// The same, whose events are also sent to `webhook`.
    pub fn with_webhook(&self, webhook: Webhook) -> Self {
        Self { webhook: Some(Arc::new(webhook)), ..self.clone() }
    }

    /// Something that happened in a run, for its webhook; nothing without one.
    pub fn event(&self, name: &str, mut facts: serde_json::Value) {
        if let Some(webhook) = &self.webhook {
            facts["event"] = name.into();
            webhook.tell(facts);
        }
    }

    /// A line for people on standard output; nothing with `--json`.
    pub fn say(&self, line: &str) {
        if self.voice == Voice::Human {
            self.bars.suspend(|| print(&mut std::io::stdout().lock(), line));
        }
    }

    /// A line on standard error, also with `--json`: warnings and notes that are not the result.
    pub fn note(&self, line: &str) {
        self.bars.suspend(|| print(&mut std::io::stderr().lock(), line));
    }

    /// An object for machines; people get `line` instead.
    pub fn tell(&self, line: &str, object: &serde_json::Value) {
        match self.voice {
            Voice::Human => self.say(line),
            Voice::Json => print(&mut std::io::stdout().lock(), &object.to_string()),
            Voice::Silent => {}
        }
    }

    /// Asks a yes-no question; the default is no. Without a terminal, or with `--json`, nothing is asked and the answer is yes.
    pub fn confirm(&self, question: &str) -> bool {
        let is_attended = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        if self.voice != Voice::Human || !is_attended {
            return true;
        }
        self.note(&format!("{question} [y/N]"));
        let mut answer = String::new();
        match std::io::stdin().read_line(&mut answer) {
            Ok(_) => is_yes(&answer),
            Err(_) => false,
        }
    }

    /// A row of a log: an object for machines; people without a progress bar get `line`.
    pub fn progress(&self, line: &str, row: &impl serde::Serialize) {
        match (self.voice, serde_json::to_value(row)) {
            (Voice::Json, Ok(value)) => print(&mut std::io::stdout().lock(), &value.to_string()),
            _ if self.bars.is_hidden() => self.say(line),
            _ => {}
        }
    }

    /// Runs `work` without countable progress. People see a spinner, and the duration if it was over a second; machines get
    /// `{"phase": label, "seconds": ...}` at the end, if phases are reported.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn phase<T, E>(
        &self,
        label: &'static str,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let spinner = self.bars.add(ProgressBar::new_spinner());
        if let Ok(style) = ProgressStyle::with_template("{prefix:>16} {spinner} {elapsed_precise}") {
            spinner.set_style(style);
        }
        spinner.set_prefix(label);
        spinner.enable_steady_tick(Duration::from_millis(250));
        let (begun, announced) = (Instant::now(), self.announce(label.to_owned()));
        let done = work();
        drop(announced);
        spinner.finish_and_clear();
        if done.is_ok() {
            let took = begun.elapsed();
            let object = serde_json::json!({ "phase": label, "seconds": took.as_secs_f64() });
            self.phase_done(label, &format!("{label}: {:.1} s", took.as_secs_f64()), &object, took);
        }
        done
    }

    /// Announces a phase to people without a progress bar, unless it ends (the result is dropped) within a second.
    fn announce(&self, label: String) -> Option<mpsc::Sender<()>> {
        if self.voice != Voice::Human || !self.bars.is_hidden() {
            return None;
        }
        let (alive, over) = mpsc::channel();
        let ui = self.clone();
        thread::spawn(move || {
            if over.recv_timeout(WORTH_A_LINE) == Err(mpsc::RecvTimeoutError::Timeout) {
                ui.say(&format!("{label} ..."));
            }
        });
        Some(alive)
    }

    /// The finished phases, in the order in which they ended.
    pub fn phases(&self) -> Vec<PhaseDone> {
        // A panic elsewhere leaves the list intact.
        self.done.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn phase_done(&self, label: &'static str, line: &str, object: &serde_json::Value, took: Duration) {
        let done = PhaseDone { label, seconds: took.as_secs_f64() };
        self.done.lock().unwrap_or_else(PoisonError::into_inner).push(done);
        match self.voice {
            Voice::Json if self.events == Events::Phases => {
                print(&mut std::io::stdout().lock(), &object.to_string());
            }
            Voice::Human if took >= WORTH_A_LINE => self.say(line),
            _ => {}
        }
    }

    /// A bar of `length` steps. It shows speed and the remaining time; [`Bar::inform`] adds a text. When it is finished it is
    /// reported as a phase, with its count.
    pub fn bar(&self, label: &'static str, length: usize) -> Bar {
        let bar = self.bars.add(ProgressBar::new(length as u64));
        let style =
            ProgressStyle::with_template("{prefix:>16} {wide_bar:.cyan/dim} {pos}/{len} {msg} {left}");
        if let Ok(style) = style {
            bar.set_style(style.with_key("left", left).progress_chars("━╸─"));
        }
        bar.set_prefix(label);
        bar.enable_steady_tick(Duration::from_millis(250));
        let phase = BarPhase {
            ui: self.clone(),
            label,
            begun: Instant::now(),
            skipped: AtomicU64::new(0),
            announced: Mutex::new(self.announce(format!("{label} ({length})"))),
        };
        Bar { bar, phase: Some(Arc::new(phase)) }
    }

    /// A bar of `bytes` to download.
    pub fn bytes_bar(&self, label: String, bytes: u64) -> Bar {
        let bar = self.bars.add(ProgressBar::new(bytes));
        let template = "{prefix} {wide_bar:.cyan/dim} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta_precise}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_prefix(label);
        bar.enable_steady_tick(Duration::from_millis(250));
        Bar { bar, phase: None }
    }
}

fn left(state: &ProgressState, out: &mut dyn std::fmt::Write) {
    let is_over = state.len().is_some_and(|length| state.pos() >= length);
    // A terminal that cannot be written to shows no bar.
    let _ = out.write_str(&time_left(state.eta(), is_over));
}

/// The remaining time as a bar shows it: unknown before the first step, when `eta` is zero.
pub fn time_left(eta: Duration, is_over: bool) -> String {
    match eta.is_zero() && !is_over {
        true => "--:--:--".to_owned(),
        false => FormattedDuration(eta).to_string(),
    }
}

/// A progress bar.
#[derive(Debug, Clone)]
pub struct Bar {
    bar: ProgressBar,
    phase: Option<Arc<BarPhase>>,
}

/// The phase that a bar reports when it is finished.
#[derive(Debug)]
struct BarPhase {
    ui: Ui,
    label: &'static str,
    begun: Instant,
    skipped: AtomicU64,
    /// Until it is dropped, the beginning is not announced yet.
    announced: Mutex<Option<mpsc::Sender<()>>>,
}

impl BarPhase {
    /// Cancels the announcement of the beginning.
    fn begin(&self) {
        // A panic elsewhere leaves the value intact.
        self.announced.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Bar {
    /// The same, whose beginning is not announced: rows of a log show the progress.
    pub fn unannounced(self) -> Self {
        if let Some(phase) = &self.phase {
            phase.begin();
        }
        self
    }

    /// `count` more steps are done.
    pub fn inc(&self, count: usize) {
        self.bar.inc(count as u64);
    }

    /// Steps that were done before the bar was created: they do not count for its speed.
    pub fn skip(&self, done: usize) {
        self.bar.set_position(done as u64);
        self.bar.reset_eta();
        if let Some(phase) = &self.phase {
            phase.skipped.store(done as u64, Ordering::Relaxed);
        }
    }

    /// Sets the text next to the bar.
    pub fn inform(&self, text: String) {
        self.bar.set_message(text);
    }

    /// Removes the bar, and reports what was done.
    pub fn finish(&self) {
        // Finishing sets a bar to its end.
        let position = self.bar.position();
        self.bar.finish_and_clear();
        let Some(phase) = &self.phase else { return };
        phase.begin();
        let count = position.saturating_sub(phase.skipped.load(Ordering::Relaxed));
        let (label, took) = (phase.label, phase.begun.elapsed());
        let object = serde_json::json!({ "phase": label, "count": count, "seconds": took.as_secs_f64() });
        phase.ui.phase_done(
            label,
            &format!("{label}: {count} in {:.1} s", took.as_secs_f64()),
            &object,
            took,
        );
    }
}

/// Whether an answer is a yes.
fn is_yes(answer: &str) -> bool {
    matches!(answer.trim().to_lowercase().as_str(), "y" | "yes")
}

/// Reports the error that ended a command: as a line on standard error, and for machines also as the last object on
/// standard output, `{"error": message, "exit_code": code}`.
pub fn fail(voice: Voice, message: &str, code: u8) {
    if voice == Voice::Json {
        let object = serde_json::json!({ "error": message, "exit_code": code });
        print(&mut std::io::stdout().lock(), &object.to_string());
    }
    complain(&format!("error: {message}"));
}

/// A line of another program on standard output.
pub fn pass_on(line: &str) {
    print(&mut std::io::stdout().lock(), line);
}

/// A line on standard error where there is no [`Ui`]: at the end of the program, and in the handler of Ctrl-C.
pub fn complain(line: &str) {
    print(&mut std::io::stderr().lock(), line);
}

/// A pipe that the reader closed is not an error.
fn print(out: &mut impl Write, line: &str) {
    let _ = writeln!(out, "{line}");
}

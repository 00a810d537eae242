//! What the user sees while something runs: lines, progress bars, and JSON for machines. The only place that prints.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{
    FormattedDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle,
};

/// How results are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Voice {
    /// Lines for people on standard output; bars on standard error where that is a terminal.
    Human,
    /// One JSON object a line on standard output, nothing else there; notes on standard error.
    Json,
}

/// The user's side of a command.
#[derive(Debug)]
pub struct Ui {
    voice: Voice,
    bars: MultiProgress,
}

impl Ui {
    /// A user interface; bars are hidden where standard error is no terminal.
    pub fn new(voice: Voice) -> Self {
        let is_visible = std::io::stderr().is_terminal() && voice == Voice::Human;
        let target = if is_visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self { voice, bars: MultiProgress::with_draw_target(target) }
    }

    /// A line for people: on standard output, or nothing when a machine listens.
    pub fn say(&self, line: &str) {
        if self.voice == Voice::Human {
            self.bars.suspend(|| print(&mut std::io::stdout().lock(), line));
        }
    }

    /// A line on standard error, whoever listens: warnings and news that are not the result.
    pub fn note(&self, line: &str) {
        self.bars.suspend(|| print(&mut std::io::stderr().lock(), line));
    }

    /// An object for machines; people get `line` instead.
    pub fn tell(&self, line: &str, object: &serde_json::Value) {
        match self.voice {
            Voice::Human => self.say(line),
            Voice::Json => print(&mut std::io::stdout().lock(), &object.to_string()),
        }
    }

    /// Asks a question that is answered by y or n, which is no. Nothing is asked where nobody is at a terminal, or a machine
    /// listens: the answer is yes.
    pub fn confirm(&self, question: &str) -> bool {
        let is_attended = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        if self.voice == Voice::Json || !is_attended {
            return true;
        }
        self.note(&format!("{question} [y/N]"));
        let mut answer = String::new();
        match std::io::stdin().read_line(&mut answer) {
            Ok(_) => is_yes(&answer),
            Err(_) => false,
        }
    }

    /// A row of a log: an object for machines; people without a bar to look at get `line`.
    pub fn progress(&self, line: &str, row: &impl serde::Serialize) {
        match (self.voice, serde_json::to_value(row)) {
            (Voice::Json, Ok(value)) => print(&mut std::io::stdout().lock(), &value.to_string()),
            _ if self.bars.is_hidden() => self.say(line),
            _ => {}
        }
    }

    /// A bar of `length` steps. It shows speed and the time that is left; [`Bar::inform`] puts something beside it.
    pub fn bar(&self, label: &'static str, length: usize) -> Bar {
        let bar = self.bars.add(ProgressBar::new(length as u64));
        let style =
            ProgressStyle::with_template("{prefix:>16} {wide_bar:.cyan/dim} {pos}/{len} {msg} {left}");
        if let Ok(style) = style {
            bar.set_style(style.with_key("left", left).progress_chars("━╸─"));
        }
        bar.set_prefix(label);
        bar.enable_steady_tick(Duration::from_millis(250));
        Bar(bar)
    }

    /// A bar of `bytes` that come from afar.
    pub fn bytes_bar(&self, label: String, bytes: u64) -> Bar {
        let bar = self.bars.add(ProgressBar::new(bytes));
        let template = "{prefix} {wide_bar:.cyan/dim} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta_precise}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_prefix(label);
        bar.enable_steady_tick(Duration::from_millis(250));
        Bar(bar)
    }
}

fn left(state: &ProgressState, out: &mut dyn std::fmt::Write) {
    let is_over = state.len().is_some_and(|length| state.pos() >= length);
    // A terminal that cannot be written to shows no bar at all.
    let _ = out.write_str(&time_left(state.eta(), is_over));
}

/// The time that is left as a bar shows it: nothing is known of it before the first step is made, when `eta` is zero.
pub fn time_left(eta: Duration, is_over: bool) -> String {
    match eta.is_zero() && !is_over {
        true => "--:--:--".to_owned(),
        false => FormattedDuration(eta).to_string(),
    }
}

/// A progress bar.
#[derive(Debug, Clone)]
pub struct Bar(ProgressBar);

impl Bar {
    /// `count` more steps are done.
    pub fn inc(&self, count: usize) {
        self.0.inc(count as u64);
    }

    /// Steps that were done before the bar came up: they do not count for its speed.
    pub fn skip(&self, done: usize) {
        self.0.set_position(done as u64);
        self.0.reset_eta();
    }

    /// Text beside the bar.
    pub fn inform(&self, text: String) {
        self.0.set_message(text);
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.0.finish_and_clear();
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

/// A line on standard error from where there is no [`Ui`]: the end of the program, and the handler of Ctrl-C.
pub fn complain(line: &str) {
    print(&mut std::io::stderr().lock(), line);
}

/// A closed pipe at the other end is no reason to fail.
fn print(out: &mut impl Write, line: &str) {
    let _ = writeln!(out, "{line}");
}

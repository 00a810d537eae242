//! Processes that end together.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::Ended;
use crate::error::{Error, Result};
use crate::replicas::STOPPED;
use crate::watch::ui::{Ui, Voice, complain, pass_on};

/// How long the others may take to end by themselves after one has failed: they tell each other.
const PATIENCE: Duration = Duration::from_secs(40);
/// How long they may take after they were asked to.
const GRACE: Duration = Duration::from_secs(10);
/// The exit code of a process that a signal has ended, behind which shells have the signal's number.
const BY_SIGNAL: u8 = 128;

/// A process to start.
#[derive(Debug)]
pub struct Member {
    /// What its lines begin with.
    pub name: String,
    /// It.
    pub command: Command,
    /// How a signal to this process reaches it.
    pub passed: Passed,
}

/// How signals are passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passed {
    /// As they are.
    AsSignal,
    /// By the end of its standard input: signals do not go over ssh.
    AsEndOfInput,
}

/// A process that runs.
struct Running {
    name: String,
    child: Child,
    input: Option<ChildStdin>,
    passed: Passed,
    status: Option<ExitStatus>,
}

/// Runs `members` until all have ended.
///
/// # Errors
/// A process that cannot be started: those that were are ended.
pub(super) fn run(members: Vec<Member>, signals: &Signals, ui: &Ui) -> Result<Ended> {
    let (mut running, mut printers) = (Vec::new(), Vec::new());
    for member in members {
        match start(member, ui.voice(), &mut printers) {
            Ok(process) => running.push(process),
            Err(error) => {
                running.iter_mut().for_each(Running::kill);
                return Err(error);
            }
        }
    }
    let ended = watch(&mut running, signals);
    // Whoever printed last may have left lines in its pipe.
    printers.into_iter().for_each(|printer| drop(printer.join()));
    ended
}

/// Starts `member` in a process group of its own, so that the terminal's Ctrl-C reaches it once, from here.
fn start(member: Member, voice: Voice, printers: &mut Vec<thread::JoinHandle<()>>) -> Result<Running> {
    let Member { name, mut command, passed } = member;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let program = std::path::PathBuf::from(command.get_program());
    let mut child = command.spawn().map_err(|source| Error::Io { action: "start", path: program, source })?;
    let input = child.stdin.take();
    let prefix = match voice {
        Voice::Human | Voice::Silent => format!("[{name}] "),
        Voice::Json => String::new(),
    };
    if let Some(out) = child.stdout.take() {
        let prefix = prefix.clone();
        printers.push(thread::spawn(move || lines(out, |line| pass_on(&format!("{prefix}{line}")))));
    }
    if let Some(errors) = child.stderr.take() {
        let prefix = format!("[{name}] ");
        printers.push(thread::spawn(move || lines(errors, |line| complain(&format!("{prefix}{line}")))));
    }
    Ok(Running { name, child, input, passed, status: None })
}

/// Gives every line of `from` to `take`, whatever bytes it has.
fn lines(from: impl Read, take: impl Fn(&str)) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        take(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
        line.clear();
    }
}

/// Waits for all, and ends all when one has failed and the others do not end by themselves.
fn watch(running: &mut [Running], signals: &Signals) -> Result<Ended> {
    let (mut is_asked, mut failed, mut asked_at): (bool, Option<Instant>, Option<Instant>) =
        (false, None, None);
    let mut codes = Vec::new();
    loop {
        if let Some(signal) = signals.next() {
            is_asked = true;
            running.iter_mut().for_each(|process| process.pass(signal));
        }
        for process in running.iter_mut().filter(|process| process.status.is_none()) {
            let status = process.child.try_wait();
            let status = status.map_err(|source| Error::Io {
                action: "wait for",
                path: process.name.clone().into(),
                source,
            })?;
            if let Some(status) = status {
                process.status = Some(status);
                let code = code(status);
                codes.push(code);
                if code != 0 && failed.is_none() {
                    failed = Some(Instant::now());
                }
            }
        }
        if running.iter().all(|process| process.status.is_some()) {
            // One that stopped because of another says less than that one.
            let first = codes
                .iter()
                .find(|code| ![0, STOPPED].contains(code))
                .or_else(|| codes.iter().find(|code| **code != 0));
            return Ok(Ended { code: first.copied().unwrap_or(0), is_asked });
        }
        let left = running.iter_mut().filter(|process| process.status.is_none());
        match (failed, asked_at) {
            (Some(_), Some(at)) if at.elapsed() > GRACE => left.for_each(Running::kill),
            (Some(at), None) if at.elapsed() > PATIENCE => {
                asked_at = Some(Instant::now());
                left.for_each(|process| process.pass(TERMINATE));
            }
            _ => {}
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn code(status: ExitStatus) -> u8 {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return BY_SIGNAL.wrapping_add(signal as u8);
    }
    status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[cfg(unix)]
const TERMINATE: i32 = signal_hook::consts::SIGTERM;
#[cfg(not(unix))]
const TERMINATE: i32 = 15;

impl Running {
    /// Passes a signal on; a process that has ended meanwhile needs none.
    fn pass(&mut self, signal: i32) {
        match self.passed {
            Passed::AsEndOfInput => drop(self.input.take()),
            Passed::AsSignal if self.status.is_none() => {
                #[cfg(unix)]
                if let Ok(signal) = nix::sys::signal::Signal::try_from(signal) {
                    let _ =
                        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id() as i32), signal);
                }
                #[cfg(not(unix))]
                let _ = signal;
            }
            Passed::AsSignal => {}
        }
    }

    fn kill(&mut self) {
        // It has ended, or cannot be killed.
        let _ = self.child.kill();
    }
}

/// Signals to this process.
pub(super) struct Signals {
    #[cfg(unix)]
    all: std::sync::Mutex<signal_hook::iterator::Signals>,
}

impl Signals {
    /// Listens for those that ask a run to stop, and for the one that announces the end of a job.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn listen() -> Result<Self> {
        #[cfg(unix)]
        {
            use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
            let all = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1]);
            let io = |source| Error::Io { action: "listen for", path: "signals".into(), source };
            Ok(Self { all: std::sync::Mutex::new(all.map_err(io)?) })
        }
        #[cfg(not(unix))]
        Ok(Self {})
    }

    /// The next signal that has come.
    fn next(&self) -> Option<i32> {
        #[cfg(unix)]
        {
            let mut all = self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            all.pending().next()
        }
        #[cfg(not(unix))]
        None
    }
}

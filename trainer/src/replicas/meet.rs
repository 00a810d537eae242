//! The rendezvous: all ranks find rank 0, say who they are, and are told whether they match.
//!
//! Rank 0 listens at one of the ports behind `MASTER_PORT` (torchrun keeps that one for itself), or at any port whose address it
//! writes into a shared file. Each other rank opens two connections to it: one for heartbeats and failures, one for
//! everything else. Ranks that come to the wrong job go on looking, those that come late or twice are sent away.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::{ReplicaError, Result};
use super::hello::{Hello, check};
use super::launcher::Meeting;
use super::wire::{Kind, Wire, json};

/// Ports behind the one of the launcher that rank 0 tries.
const PORTS: u16 = 16;
/// How long an answer takes that waits for no other rank.
const PROMPT: Duration = Duration::from_secs(5);
/// How long ranks that come after a mismatch was found are still told of it.
const LINGER: Duration = Duration::from_secs(5);

/// The connections of a rank: of rank 0 to each other rank in their order, of another rank to rank 0.
pub(super) struct Met {
    /// For heartbeats and failures.
    pub control: Vec<Wire>,
    /// For all else.
    pub data: Vec<Wire>,
    /// The names of all ranks.
    pub names: Vec<String>,
    /// Where rank 0 still listens, to send away who comes late.
    pub door: Option<Door>,
}

/// What rank 0 tells everyone at the end of the rendezvous.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Welcome {
    /// Tells the second connection of a rank from those of strangers.
    token: u64,
    names: Vec<String>,
}

/// The address of rank 0 in a shared file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Address {
    job: String,
    restarts: u32,
    host: String,
    port: u16,
}

/// Brings the ranks of `own`'s job together.
///
/// # Errors
/// Ranks that do not come or do not match; ports and files that cannot be used.
pub(super) fn meet(own: &Hello, meeting: &Meeting, join: Duration) -> Result<Met> {
    match own.rank {
        0 => Door::open(own, meeting)?.gather(own, join),
        _ => find(own, meeting, join),
    }
}

/// A rank that has come, with its first connection.
type Come = (Hello, Wire);
/// The second connection of a rank, with its number and what it was told.
type Second = (usize, u64, Wire);

/// Rank 0's listener.
pub(super) struct Door {
    is_closed: Arc<AtomicBool>,
    /// Whether all have come, and what who comes now is told.
    late: Arc<Mutex<Option<String>>>,
    hellos: Receiver<Come>,
    seconds: Receiver<Second>,
}

impl Drop for Door {
    fn drop(&mut self) {
        self.is_closed.store(true, Ordering::SeqCst);
    }
}

impl Door {
    fn open(own: &Hello, meeting: &Meeting) -> Result<Self> {
        let listener = match meeting {
            Meeting::Port(host, port) => listen(host, *port)?,
            Meeting::File(path) => listen_by_file(own, path)?,
        };
        let place = "wait for other ranks";
        listener.set_nonblocking(true).map_err(|error| ReplicaError::io(place, &error))?;
        let (send_hello, hellos) = channel();
        let (send_second, seconds) = channel();
        let door = Self { is_closed: Arc::default(), late: Arc::default(), hellos, seconds };
        let (is_closed, late, own) = (Arc::clone(&door.is_closed), Arc::clone(&door.late), own.clone());
        thread::spawn(move || {
            while !is_closed.load(Ordering::SeqCst) {
                let Ok((stream, from)) = listener.accept() else {
                    thread::sleep(Duration::from_millis(10));
                    continue;
                };
                let (late, own) = (Arc::clone(&late), own.clone());
                let (hello, second) = (send_hello.clone(), send_second.clone());
                // A stranger that says nothing must not keep others out.
                thread::spawn(move || answer(stream, from, &own, &late, (hello, second)));
            }
        });
        Ok(door)
    }

    /// Waits for all other ranks and looks at what they say of themselves.
    fn gather(self, own: &Hello, join: Duration) -> Result<Met> {
        let (begun, mut come) = (Instant::now(), BTreeMap::new());
        let mut strange = None;
        while come.len() + 1 < own.world {
            let left = join.saturating_sub(begun.elapsed());
            let Ok((hello, wire)) = self.hellos.recv_timeout(left) else {
                return Err(missing(own, &come, join));
            };
            let is_known = hello.rank == 0 || hello.rank >= own.world || come.contains_key(&hello.rank);
            let is_other = hello.world != own.world;
            if is_known || is_other {
                strange = Some((hello, wire));
                break;
            }
            come.insert(hello.rank, (hello, wire));
        }
        let all = || come.values().chain(&strange).map(|(hello, _)| hello.clone()).collect::<Vec<_>>();
        if let Err(error) = check(own, &all()) {
            let wires = come.into_values().chain(strange).map(|(_, wire)| wire);
            self.refuse(own, wires.collect(), &error);
            return Err(error);
        }
        self.welcome(own, come.into_values().collect())
    }

    /// Tells all that have come, and those that come within some seconds, why nobody trains.
    fn refuse(&self, own: &Hello, mut wires: Vec<Wire>, error: &ReplicaError) {
        let begun = Instant::now();
        let go_on = || within(begun, LINGER);
        let mut told = 0;
        loop {
            for mut wire in wires.drain(..) {
                // Whoever has gone away meanwhile needs no answer.
                let _ = wire.send(Kind::Refused, 0, error.to_string().as_bytes(), &go_on);
                told += 1;
            }
            let left = LINGER.saturating_sub(begun.elapsed());
            match self.hellos.recv_timeout(left) {
                Ok((_, wire)) if told + 1 < own.world => wires.push(wire),
                _ => return,
            }
        }
    }

    fn welcome(self, own: &Hello, come: Vec<(Hello, Wire)>) -> Result<Met> {
        let late = format!("all {} ranks of {} are there already", own.world, own.job);
        *self.late.lock().unwrap_or_else(PoisonError::into_inner) = Some(late);
        let names: Vec<String> =
            std::iter::once(own.name()).chain(come.iter().map(|(hello, _)| hello.name())).collect();
        let seed = format!("{names:?}{:?}", std::time::SystemTime::now());
        let token = xxhash_rust::xxh3::xxh3_64(seed.as_bytes());
        let begun = Instant::now();
        let go_on = || within(begun, PROMPT);
        let mut control = Vec::new();
        for (_, mut wire) in come {
            wire.send_json(Kind::Welcome, &Welcome { token, names: names.clone() }, &go_on)?;
            control.push(wire);
        }
        let mut data: BTreeMap<usize, Wire> = BTreeMap::new();
        while data.len() < control.len() {
            let left = (2 * PROMPT).saturating_sub(begun.elapsed());
            let Ok((rank, theirs, mut wire)) = self.seconds.recv_timeout(left) else {
                let gone = (1..own.world).filter(|rank| !data.contains_key(rank));
                let ranks = gone.map(|rank| names[rank].clone()).collect::<Vec<_>>();
                let reason = format!("{} went away while the ranks met", ranks.join(", "));
                return Err(ReplicaError::Stopped { reason, code: super::STOPPED });
            };
            if theirs == token && (1..own.world).contains(&rank) {
                wire.peer.clone_from(&names[rank]);
                data.insert(rank, wire);
            }
        }
        Ok(Met { control, data: data.into_values().collect(), names, door: Some(self) })
    }
}

fn within(begun: Instant, limit: Duration) -> Result<()> {
    match begun.elapsed() < limit {
        true => Ok(()),
        false => {
            Err(ReplicaError::Io { action: "wait for an answer".into(), why: "it took too long".into() })
        }
    }
}

fn missing(own: &Hello, come: &BTreeMap<usize, (Hello, Wire)>, waited: Duration) -> ReplicaError {
    let gone: Vec<String> =
        (1..own.world).filter(|rank| !come.contains_key(rank)).map(|rank| format!("rank {rank}")).collect();
    ReplicaError::Missing { missing: gone.len(), world: own.world, ranks: gone.join(", "), waited }
}

/// Answers one connection to rank 0.
fn answer(
    stream: TcpStream,
    from: SocketAddr,
    own: &Hello,
    late: &Mutex<Option<String>>,
    (hellos, seconds): (Sender<Come>, Sender<Second>),
) {
    let begun = Instant::now();
    let go_on = || within(begun, PROMPT);
    let work = || -> Result<()> {
        let mut wire = Wire::new(stream, from.to_string())?;
        match wire.receive(&go_on)? {
            (Kind::Hello, _, bytes) => {
                let hello: Hello = json(&bytes)?;
                if !hello.is_of_job(own) {
                    return wire.send(Kind::Elsewhere, 0, &[], &go_on);
                }
                let late = late.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if let Some(sentence) = late {
                    return wire.send(Kind::Refused, 0, sentence.as_bytes(), &go_on);
                }
                wire.send(Kind::Here, 0, &[], &go_on)?;
                wire.peer = hello.name();
                // The receiver is gone where rank 0 has given up.
                let _ = hellos.send((hello, wire));
            }
            (Kind::Data, token, bytes) => {
                let _ = seconds.send((json(&bytes)?, token, wire));
            }
            _ => {}
        }
        Ok(())
    };
    // A stranger: the ranks of this job would try again.
    let _ = work();
}

/// A listener at one of the ports behind `port`, for this host alone where `host` is itself.
fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let is_local =
        addresses(host, port).is_ok_and(|all| all.iter().all(|address| address.ip().is_loopback()));
    let mut last = "there is no port behind it".to_owned();
    for port in ports(port) {
        let bound = match is_local {
            true => TcpListener::bind((Ipv4Addr::LOCALHOST, port)),
            // Both kinds of addresses where the system has both.
            false => TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
                .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))),
        };
        match bound {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error.to_string(),
        }
    }
    let place = format!("the {PORTS} ports behind {port}");
    Err(ReplicaError::NoPort { place, why: last })
}

/// A listener at any port, whose address is in the file at `path`.
fn listen_by_file(own: &Hello, path: &Path) -> Result<TcpListener> {
    let refuse = |error: std::io::Error| {
        ReplicaError::io(format!("write the address of rank 0 to {}", path.display()), &error)
    };
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))
        .map_err(refuse)?;
    let port = listener.local_addr().map_err(refuse)?.port();
    let address = Address { job: own.job.clone(), restarts: own.restarts, host: own.host.clone(), port };
    let text = serde_json::to_string(&address).map_err(|error| refuse(error.into()))?;
    data::atomic::write(path, |file| std::io::Write::write_all(file, text.as_bytes())).map_err(refuse)?;
    Ok(listener)
}

fn ports(port: u16) -> impl Iterator<Item = u16> {
    (1..=PORTS).filter_map(move |offset| port.checked_add(offset))
}

fn addresses(host: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

/// Looks for rank 0 until it is found or `join` is over.
fn find(own: &Hello, meeting: &Meeting, join: Duration) -> Result<Met> {
    let (begun, mut pause) = (Instant::now(), Duration::from_millis(20));
    let mut why = "nothing was tried".to_owned();
    while begun.elapsed() < join {
        for address in candidates(own, meeting, &mut why) {
            match call(own, address, begun, join) {
                Ok(met) => return Ok(met),
                Err(ReplicaError::Io { why: cause, .. }) => why = format!("{address}: {cause}"),
                // Another program.
                Err(ReplicaError::OutOfStep { why: cause }) => why = format!("{address}: {cause}"),
                Err(error) => return Err(error),
            }
        }
        thread::sleep(pause);
        pause = (2 * pause).min(Duration::from_secs(1));
    }
    Err(ReplicaError::NoRankZero { place: meeting.to_string(), waited: join, why })
}

/// Where rank 0 may be found now.
fn candidates(own: &Hello, meeting: &Meeting, why: &mut String) -> Vec<SocketAddr> {
    let resolved = |host: &str, port| addresses(host, port);
    let found = match meeting {
        Meeting::Port(host, port) => {
            ports(*port).map(|port| resolved(host, port)).collect::<std::io::Result<Vec<_>>>()
        }
        Meeting::File(path) => match address_in(own, path) {
            Ok(Address { host, port, .. }) if host == own.host => {
                Ok(vec![vec![SocketAddr::from((Ipv4Addr::LOCALHOST, port))]])
            }
            Ok(Address { host, port, .. }) => resolved(&host, port).map(|all| vec![all]),
            Err(error) => Err(error),
        },
    };
    match found {
        Ok(found) => found.concat(),
        Err(error) => {
            *why = error.to_string();
            Vec::new()
        }
    }
}

fn address_in(own: &Hello, path: &Path) -> std::io::Result<Address> {
    let text = std::fs::read_to_string(path)?;
    let address: Address = serde_json::from_str(&text)?;
    match (&address.job, address.restarts) == (&own.job, own.restarts) {
        true => Ok(address),
        false => Err(std::io::Error::other("the file is of another job")),
    }
}

/// Introduces this rank to whoever listens at `address`.
fn call(own: &Hello, address: SocketAddr, begun: Instant, join: Duration) -> Result<Met> {
    let connect = || {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(2));
        let stream = stream.map_err(|error| ReplicaError::io("connect", &error))?;
        Wire::new(stream, format!("rank 0 at {address}"))
    };
    let mut control = connect()?;
    let called = Instant::now();
    let prompt = || within(called, PROMPT);
    control.send_json(Kind::Hello, own, &prompt)?;
    let other = |what: &str| ReplicaError::Io { action: "find rank 0".to_owned(), why: what.to_owned() };
    let late =
        |bytes: &[u8]| ReplicaError::Mismatch { sentence: String::from_utf8_lossy(bytes).into_owned() };
    match control.receive(&prompt)? {
        (Kind::Here, ..) => {}
        (Kind::Refused, _, bytes) => return Err(late(&bytes)),
        _ => return Err(other("rank 0 of another job, or of an earlier start, listens there")),
    }
    // Rank 0 may have to wait for ranks that come later.
    let patience = || within(begun, join + PROMPT);
    let welcome: Welcome = match control.receive(&patience)? {
        (Kind::Welcome, _, bytes) => json(&bytes)?,
        (Kind::Refused, _, bytes) => return Err(late(&bytes)),
        _ => return Err(other("it speaks another language")),
    };
    control.peer.clone_from(&welcome.names[0]);
    let mut data = connect()?;
    data.peer.clone_from(&welcome.names[0]);
    let rank = serde_json::to_vec(&own.rank).unwrap_or_default();
    let welcomed = Instant::now();
    data.send(Kind::Data, welcome.token, &rank, &|| within(welcomed, PROMPT))?;
    Ok(Met { control: vec![control], data: vec![data], names: welcome.names, door: None })
}

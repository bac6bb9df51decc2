//! One question to the monitor and its answer, over TCP, blocking, under deadlines.
//!
//! It must never hang and never believe anything: a monitor that is stopped still accepts connections, and whatever
//! listens on the port may send anything, for ever. What cannot be read as an answer is an error with its reason.

use mmm_common::control::{Answer, Command, Request};
use mmm_common::frame::{FrameError, LineDecoder};
use mmm_common::wire::{self, PROTOCOL};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// A move answers when it has ended: grace, catching up, draining and the round trips between, with the defaults.
const MOVE_TIMEOUT: Duration = Duration::from_secs(90);
/// Every host at once; the slowest part has a deadline of its own.
const DOCTOR_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest answer: `checks` of thousands of hosts fits many times.
const MAX_ANSWER: usize = 16 * 1024 * 1024;

/// Why there is no answer. The texts stand after `ERROR: `.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NoAnswer {
    /// Nobody is there: MMM's sentence is printed, this is the reason.
    NoMonitor(String),
    /// Somebody is there, but no answer came, or one that is none.
    Broken(String),
}

/// Asks, and waits for the answer.
pub(crate) fn ask(at: SocketAddr, command: &Command, timeout: Option<Duration>) -> Result<Answer, NoAnswer> {
    let timeout = timeout.unwrap_or_else(|| usual_timeout(command));
    let mut stream = TcpStream::connect_timeout(&at, CONNECT_TIMEOUT.min(timeout))
        .map_err(|e| NoAnswer::NoMonitor(format!("connecting to {at}: {e}. Is mmm_mond running?")))?;
    let deadline = Instant::now() + timeout;
    let broken = |why: String| NoAnswer::Broken(why);
    send(&mut stream, command, timeout)
        .map_err(|e| broken(format!("Sending the request to the monitor at {at}: {e}")))?;
    match receive(&mut stream, deadline) {
        Ok(line) => serde_json::from_str(&line).map_err(|e| {
            broken(format!(
                "The answer from {at} is not understood ({e}). Is it a monitor of this version ({})?",
                env!("CARGO_PKG_VERSION")
            ))
        }),
        Err(Lost::Late) => Err(broken(late(at, command, timeout))),
        Err(Lost::Closed) => Err(broken(format!(
            "The monitor at {at} closed the connection without an answer.{}",
            perhaps_done(command)
        ))),
        Err(Lost::Unreadable(why)) => Err(broken(format!("The answer from {at} cannot be read: {why}"))),
    }
}

fn usual_timeout(command: &Command) -> Duration {
    match command {
        Command::MoveRole { .. } => MOVE_TIMEOUT,
        Command::Doctor => DOCTOR_TIMEOUT,
        Command::Ping
        | Command::Show
        | Command::Checks { .. }
        | Command::Mode
        | Command::SetActive
        | Command::SetManual
        | Command::SetPassive
        | Command::SetOnline { .. }
        | Command::SetOffline { .. }
        | Command::SetIp { .. }
        | Command::ConfirmDead { .. }
        | Command::Lost { .. }
        | Command::Reclone { .. } => ANSWER_TIMEOUT,
    }
}

fn send(stream: &mut TcpStream, command: &Command, timeout: Duration) -> io::Result<()> {
    let request = Request { protocol: PROTOCOL, command: command.clone() };
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(wire::to_line(&request)?.as_bytes())
}

enum Lost {
    Late,
    Closed,
    Unreadable(String),
}

/// One line, until the deadline: also when it arrives byte by byte.
fn receive(stream: &mut TcpStream, deadline: Instant) -> Result<String, Lost> {
    let unreadable = |e: io::Error| Lost::Unreadable(e.to_string());
    let mut lines = LineDecoder::new(MAX_ANSWER);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match lines.next_line() {
            Ok(Some(line)) => return Ok(line),
            Ok(None) => {}
            Err(FrameError::TooLong { limit }) => {
                return Err(Lost::Unreadable(format!("longer than {} MiB", limit / 1024 / 1024)));
            }
            Err(FrameError::NotUtf8) => return Err(Lost::Unreadable("not UTF-8".into())),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Lost::Late);
        }
        stream.set_read_timeout(Some(left)).map_err(unreadable)?;
        match stream.read(&mut buffer) {
            Ok(0) => return Err(Lost::Closed),
            Ok(n) => lines.push(&buffer[..n]),
            // The next turn finds out whether the time is up.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(Lost::Closed),
            Err(e) => return Err(unreadable(e)),
        }
    }
}

fn late(at: SocketAddr, command: &Command, timeout: Duration) -> String {
    let after = format!("{} s", timeout.as_secs());
    if let Command::MoveRole { role, host, .. } = command {
        return format!(
            "Moving role '{role}' to '{host}' is still under way after {after}. It is neither done nor given up; \
             look at 'mmm_control show' and the monitor's log."
        );
    }
    format!("The monitor at {at} has not answered within {after}.{}", perhaps_done(command))
}

/// A request that was sent may have been obeyed; only looking tells.
fn perhaps_done(command: &Command) -> &'static str {
    if command.is_read_only() { "" } else { " The command may have been carried out; look at 'mmm_control show'." }
}

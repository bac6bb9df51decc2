//! Lines of text over TCP, for every connection that the agent has: to the monitor and to other agents, whoever began it.
//!
//! Whoever can reach the port can send bytes, so everything has a limit: the length of a line, the time in which one has
//! to go out, and what is logged of those who break the rules. All of these are counted, also when they are not logged.

use mmm_common::frame::LineDecoder;
use mmm_common::refusals::{self, Count};
use mmm_common::wire::MAX_LINE;
use nix::sys::socket::{setsockopt, sockopt};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;

/// For one line to go out. Who does not take it has to connect anew.
pub(crate) const WRITE_TIME: Duration = Duration::from_secs(2);

/// Why a connection is over.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The other side broke the rules.
    Refused(String),
    /// It breaks no rule, and may come again: another monitor commands this host.
    NotNow(NotNow),
    /// It closed, broke, or does not take what we send.
    Lost(String),
    /// We closed it.
    Closed,
}

#[derive(Debug)]
pub(crate) struct NotNow {
    /// The same words each time, so that trying again does not fill the log.
    pub(crate) logged: String,
    pub(crate) told: String,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ended::Refused(why) | Ended::NotNow(NotNow { logged: why, .. }) => write!(f, "refused: {why}"),
            Ended::Lost(why) => f.write_str(why),
            Ended::Closed => f.write_str("closed by this agent"),
        }
    }
}

impl From<io::Error> for Ended {
    fn from(e: io::Error) -> Self {
        Ended::Lost(e.to_string())
    }
}

impl From<serde_json::Error> for Ended {
    fn from(e: serde_json::Error) -> Self {
        Ended::Lost(format!("a message cannot be written as JSON: {e}"))
    }
}

/// Both halves of a connection. `dead_after`: data that nobody acknowledges for so long ends it, because the other
/// machine is gone.
pub(crate) fn split(stream: TcpStream, dead_after: Duration) -> io::Result<(Reading, OwnedWriteHalf)> {
    // Both ends need it, or every exchange waits for a delayed acknowledgement (43 ms instead of 56 µs).
    stream.set_nodelay(true)?;
    let dead_after = u32::try_from(dead_after.as_millis()).unwrap_or(u32::MAX);
    setsockopt(&stream, sockopt::TcpUserTimeout, &dead_after).map_err(io::Error::from)?;
    let (from, writing) = stream.into_split();
    Ok((Reading { from, decoder: LineDecoder::new(MAX_LINE), within_a_line: false }, writing))
}

pub(crate) struct Reading {
    from: OwnedReadHalf,
    decoder: LineDecoder,
    /// The last byte that came did not end a line.
    within_a_line: bool,
}

impl Reading {
    /// The next line. Loses nothing when it is dropped while waiting.
    pub(crate) async fn line(&mut self) -> Result<String, Ended> {
        let mut bytes = [0u8; 8192];
        loop {
            if let Some(line) = self.decoder.next_line().map_err(|e| Ended::Refused(e.to_string()))? {
                return Ok(line);
            }
            match self.from.read(&mut bytes).await? {
                0 if self.within_a_line => {
                    return Err(Ended::Refused("the other side closed it in the middle of a line".to_owned()));
                }
                0 => return Err(Ended::Lost("the other side closed it".to_owned())),
                n => {
                    self.within_a_line = bytes[n - 1] != b'\n';
                    self.decoder.push(&bytes[..n]);
                }
            }
        }
    }

    /// Takes what still comes and keeps none of it. To be called under a deadline.
    pub(crate) async fn drain(&mut self) -> io::Result<()> {
        let mut rest = [0u8; 8192];
        while self.from.read(&mut rest).await? > 0 {}
        Ok(())
    }
}

/// Sends one line, made by [`mmm_common::wire::to_line`].
pub(crate) async fn write(writing: &mut OwnedWriteHalf, line: &str) -> Result<(), Ended> {
    match timeout(WRITE_TIME, writing.write_all(line.as_bytes())).await {
        Ok(written) => Ok(written?),
        Err(_) => Err(Ended::Lost(format!("it did not take a message within {} s", WRITE_TIME.as_secs()))),
    }
}

/// Sends what waits, one line after the other, until nobody sends any more or one does not go out in time.
pub(crate) async fn speak(writing: &mut OwnedWriteHalf, mut waiting: mpsc::Receiver<String>) -> Ended {
    while let Some(line) = waiting.recv().await {
        if let Err(ended) = write(writing, &line).await {
            return ended;
        }
    }
    let _ = timeout(WRITE_TIME, writing.shutdown()).await;
    Ended::Closed
}

/// The beginning of a line that was not understood, for a message about it.
pub(crate) fn shortened(line: &str) -> String {
    let start: String = line.chars().take(60).collect();
    if start.len() < line.len() { format!("{start:?}…") } else { format!("{start:?}") }
}

/// Counts every refused connection and message since the start, and logs few of them.
#[derive(Clone, Default)]
pub(crate) struct Refusals(Arc<Mutex<refusals::Refusals>>);

impl Refusals {
    pub(crate) fn warn(&self, peer: SocketAddr, text: &str) {
        let mut refusals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Count { total, left_out }) = refusals.count(Instant::now(), text) {
            tracing::warn!(%peer, left_out, "{text} ({total} refused since the start)");
        }
    }

    #[cfg(test)]
    pub(crate) fn total(&self) -> u64 {
        self.0.lock().unwrap().total()
    }
}

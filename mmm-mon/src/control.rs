//! Where `mmm_control` asks: one JSON line in, one JSON line out, then the connection is closed.
//!
//! Whatever somebody sends, or does not send, holds up no other request: connections, time and line length are bounded,
//! and when all places are taken the one that has been silent for longest makes room.

use crate::doctor::Doctor;
use crate::feed::{Event, Feed};
use crate::lines::Lines;
use mmm_common::control::{Answer, Command, Request};
use mmm_common::wire::{PROTOCOL, to_line};
use serde::Deserialize;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::{Instrument as _, warn};

const CONNECTIONS: usize = 64;
/// For sending the request, and again for taking the answer.
const PATIENCE: Duration = Duration::from_secs(2);
const MAX_REQUEST: usize = 64 * 1024;
/// After an accept failed (too many open files): long enough not to spin, short enough for an operator.
const AFTER_FAILED_ACCEPT: Duration = Duration::from_millis(100);

/// # Errors
/// In words, with the address.
pub(crate) async fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(at).await.map_err(|e| {
        io::Error::new(e.kind(), format!("listening for mmm_control at {at} (monitor.ip and monitor.port): {e}"))
    })
}

/// Takes requests for ever.
pub(crate) async fn serve(listener: TcpListener, feed: Feed, doctor: Doctor) {
    let mut visitors: VecDeque<Visitor> = VecDeque::new();
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(connection) => connection,
            Err(e) => {
                warn!("a connection of mmm_control could not be taken: {e}");
                sleep(AFTER_FAILED_ACCEPT).await;
                continue;
            }
        };
        visitors.retain(|v| !v.task.is_finished());
        if visitors.len() >= CONNECTIONS
            && let Some(silent) = visitors.iter().position(|v| !v.has_asked.load(Ordering::Relaxed))
            && let Some(visitor) = visitors.remove(silent)
        {
            visitor.task.abort();
        }
        // Every place holds a request that waits for its answer: this one is only told so.
        let full = visitors.len() >= CONNECTIONS;
        let has_asked = Arc::new(AtomicBool::new(false));
        let visit = visit(stream, from, feed.clone(), doctor.clone(), has_asked.clone(), full);
        let task = tokio::spawn(visit.in_current_span()).abort_handle();
        visitors.push_back(Visitor { task, has_asked });
    }
}

struct Visitor {
    task: AbortHandle,
    /// Its request has been read.
    has_asked: Arc<AtomicBool>,
}

async fn visit(
    mut stream: TcpStream,
    from: SocketAddr,
    feed: Feed,
    doctor: Doctor,
    has_asked: Arc<AtomicBool>,
    full: bool,
) {
    let mut lines = Lines::new(&mut stream, MAX_REQUEST);
    let answer = if full {
        refused(format!("{CONNECTIONS} requests wait for their answer already. Try again later"))
    } else {
        match timeout(PATIENCE, lines.next()).await {
            Err(_) => no_request(&feed, from, format!("No request came within {PATIENCE:?}")),
            Ok(Err(why)) => no_request(&feed, from, format!("No request came: {why}")),
            Ok(Ok(line)) => {
                has_asked.store(true, Ordering::Relaxed);
                ask(&line, from, &feed, &doctor).await
            }
        }
    };
    let stream = lines.into_inner();
    let Ok(line) = to_line(&answer) else { return };
    let last_words = async {
        stream.write_all(line.as_bytes()).await?;
        stream.shutdown().await?;
        // What is still on its way here would reset the connection, and the answer with it, if it were not read.
        let mut rest = [0; 1024];
        while stream.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    // Whoever does not take the answer does not want it.
    let _ = timeout(PATIENCE, last_words).await;
}

async fn ask(line: &str, from: SocketAddr, feed: &Feed, doctor: &Doctor) -> Answer {
    // The number first: another version's request may look different otherwise.
    if let Ok(AnyRequest { protocol }) = serde_json::from_str(line)
        && protocol != PROTOCOL
    {
        return no_request(
            feed,
            from,
            format!(
                "mmm_control speaks protocol {protocol}, this mmm_mond {PROTOCOL}: install the same version of both"
            ),
        );
    }
    let Request { command, .. } = match serde_json::from_str(line) {
        Ok(request) => request,
        Err(e) => return no_request(feed, from, format!("What was sent is no request of mmm_control: {e}")),
    };
    // Takes seconds, and the core has no part in it.
    if command == Command::Doctor {
        return Answer::Doctor { findings: doctor.examine().await };
    }
    let (reply, answer) = oneshot::channel();
    feed.send(Event::Command { command, who: from.to_string(), reply }).await;
    answer.await.unwrap_or_else(|_| refused("mmm_mond is ending".to_owned()))
}

#[derive(Deserialize)]
struct AnyRequest {
    protocol: u32,
}

/// Counted: it did not come from `mmm_control`.
fn no_request(feed: &Feed, from: SocketAddr, text: String) -> Answer {
    feed.refused(from, &text);
    refused(text)
}

fn refused(text: String) -> Answer {
    Answer::Refused { text }
}

#[cfg(test)]
mod tests;

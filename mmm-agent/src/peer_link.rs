//! Other agents that ask this one to vouch for them: from a checked hello to the end of their connection.
//!
//! They came to the port on which `monitor_link` listens, from the configured address of the host that they say they are;
//! more cannot be known without certificates. One connection per host, a newer one replaces the older. They can ask, and
//! nothing else. They must never get in the way of the monitor: what they say has a queue of its own.

use crate::lines::{self, Ended, Reading, shortened};
use mmm_agent_core::io::{AskId, Input};
use mmm_common::ids::HostName;
use mmm_common::vouch::VouchAnswer;
use mmm_common::wire::{self, FromAgent, ToAgent};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// An honest agent asks a few times a second.
const REQUESTS_PER_SECOND: u32 = 100;
/// Answers waiting to be written. More than these only wait when the other side is stuck.
const WAITING_ANSWERS: usize = 16;

#[derive(Clone)]
pub(crate) struct PeerLink {
    askers: Arc<Mutex<Askers>>,
    inputs: mpsc::Sender<Input>,
}

#[derive(Default)]
struct Askers {
    connected: BTreeMap<HostName, Asker>,
    /// Not answered yet: the connection that each came from. No more than wait in the queue of inputs.
    asks: BTreeMap<AskId, u64>,
    next_ask: u64,
}

struct Asker {
    connection: u64,
    lines: mpsc::Sender<String>,
    task: JoinHandle<()>,
}

impl PeerLink {
    pub(crate) fn new(inputs: mpsc::Sender<Input>) -> Self {
        PeerLink { askers: Arc::default(), inputs }
    }

    /// Sends the answer if the connection that asked is still there. A lost answer is no harm: it is asked again.
    pub(crate) fn answer(&self, ask: AskId, answer: VouchAnswer) {
        let mut askers = self.askers();
        let Some(connection) = askers.asks.remove(&ask) else { return };
        let Some(asker) = askers.connected.values().find(|a| a.connection == connection) else { return };
        match wire::to_line(&FromAgent::Vouch(answer)) {
            // Full: the writer is stuck at an earlier line and will close the connection.
            Ok(line) => drop(asker.lines.try_send(line)),
            Err(e) => tracing::error!("an answer to another agent cannot be written as JSON and was not sent: {e}"),
        }
    }

    /// Enters a connection, whose task is `task`; what is to be said to it comes out of the receiver. An older one of the
    /// same host ends here.
    pub(crate) fn connected(&self, from: &HostName, connection: u64, task: JoinHandle<()>) -> mpsc::Receiver<String> {
        let (lines, waiting) = mpsc::channel(WAITING_ANSWERS);
        let mut askers = self.askers();
        if let Some(old) = askers.connected.insert(from.clone(), Asker { connection, lines, task }) {
            tracing::debug!("a newer connection of the agent of {from} replaces the older one");
            old.task.abort();
            askers.forget(old.connection);
        }
        waiting
    }

    /// Requests in and answers out, until the connection ends.
    pub(crate) async fn serve(
        &self,
        from: &HostName,
        connection: u64,
        reading: &mut Reading,
        writing: &mut OwnedWriteHalf,
        waiting: mpsc::Receiver<String>,
    ) -> Ended {
        let ended = tokio::select! {
            ended = self.hear(from, connection, reading) => ended,
            ended = lines::speak(writing, waiting) => ended,
        };
        let mut askers = self.askers();
        if askers.connected.get(from).is_some_and(|a| a.connection == connection) {
            askers.connected.remove(from);
        }
        askers.forget(connection);
        ended
    }

    async fn hear(&self, from: &HostName, connection: u64, reading: &mut Reading) -> Ended {
        let mut pace = Pace { since: Instant::now(), requests: 0 };
        loop {
            let line = match reading.line().await {
                Ok(line) => line,
                Err(ended) => return ended,
            };
            match serde_json::from_str(&line) {
                Ok(ToAgent::Vouch(request)) => {
                    if !pace.allows(Instant::now()) {
                        return Ended::Refused(format!("it asks more than {REQUESTS_PER_SECOND} times a second"));
                    }
                    let ask = self.askers().begin(connection);
                    if self.inputs.send(Input::Asked { ask, from: from.clone(), request }).await.is_err() {
                        return Ended::Closed;
                    }
                }
                Ok(ToAgent::Hello { .. } | ToAgent::PeerHello { .. } | ToAgent::Examine { .. }) => {
                    return Ended::Refused("a second hello on the same connection".to_owned());
                }
                Ok(ToAgent::Order(_)) => {
                    return Ended::Refused(format!("the agent of '{from}' sent an order; only a monitor may"));
                }
                Err(e) => return Ended::Refused(format!("a line is no request ({e}): {}", shortened(&line))),
            }
        }
    }

    pub(crate) fn close(&self) {
        let mut askers = self.askers();
        askers.asks.clear();
        for asker in std::mem::take(&mut askers.connected).into_values() {
            asker.task.abort();
        }
    }

    fn askers(&self) -> MutexGuard<'_, Askers> {
        self.askers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Askers {
    fn begin(&mut self, connection: u64) -> AskId {
        self.next_ask += 1;
        let ask = AskId(self.next_ask);
        self.asks.insert(ask, connection);
        ask
    }

    fn forget(&mut self, connection: u64) {
        self.asks.retain(|_, asked_by| *asked_by != connection);
    }
}

struct Pace {
    since: Instant,
    requests: u32,
}

impl Pace {
    fn allows(&mut self, now: Instant) -> bool {
        if now.duration_since(self.since) >= Duration::from_secs(1) {
            *self = Pace { since: now, requests: 0 };
        }
        self.requests += 1;
        self.requests <= REQUESTS_PER_SECOND
    }
}

//! The links to the agents: one task per host keeps a TCP connection, hands in reports, and sends orders.
//!
//! Sending never waits: each link has room for one order, the newest, because every order is the whole picture. A slow,
//! silent or confused agent costs only its own connection.

use crate::feed::{Feed, Worker};
use crate::lines::Lines;
use mmm_common::config::{Host, Monitor as Config};
use mmm_common::epoch::Boot;
use mmm_common::ids::HostName;
use mmm_common::order::Order;
use mmm_common::wire::{FromAgent, MAX_LINE, PROTOCOL, ToAgent, to_line};
use mmm_mon_core::io::Input;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, warn};

const CONNECT: Duration = Duration::from_secs(1);
const HELLO: Duration = Duration::from_secs(2);
/// An order that the agent has not taken after this long closes the connection.
const WRITE: Duration = Duration::from_secs(2);
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(1);
/// Between attempts at an agent that somebody has to put right first.
const MISMATCH_RETRY: Duration = Duration::from_secs(5);

type Orders = watch::Receiver<Option<Arc<Order>>>;

pub(crate) struct Agents {
    feed: Feed,
    /// Which monitor this is.
    identity: u64,
    links: BTreeMap<HostName, Running>,
}

struct Running {
    spec: Spec,
    newest: watch::Sender<Option<Arc<Order>>>,
    up: Arc<AtomicBool>,
    _worker: Worker,
}

impl Agents {
    pub(crate) fn new(feed: Feed, identity: u64) -> Self {
        Agents { feed, identity, links: BTreeMap::new() }
    }

    /// Starts what is missing, ends what is gone, and builds anew what has changed. Gives the inputs that say so of
    /// links that were up and belong to a host that is still there.
    pub(crate) fn arrange(&mut self, config: &Config) -> Vec<Input> {
        let mut before = std::mem::take(&mut self.links);
        let mut downs = Vec::new();
        for (name, host) in &config.cluster.hosts {
            let spec = Spec::new(name, host, config.cluster.heartbeat_interval);
            let old = before.remove(name);
            let link = match old {
                Some(same) if same.spec == spec => same,
                Some(changed) => {
                    if changed.up.load(Ordering::Relaxed) {
                        let why = "its address in the configuration has changed".to_owned();
                        downs.push(Input::AgentDown { host: name.clone(), why });
                    }
                    self.start(spec)
                }
                None => self.start(spec),
            };
            self.links.insert(name.clone(), link);
        }
        downs
    }

    /// Puts the order where the link finds it, in place of one that is not sent yet. Never waits.
    pub(crate) fn send(&self, host: &HostName, order: Order) {
        if let Some(link) = self.links.get(host) {
            link.newest.send_replace(Some(Arc::new(order)));
        }
    }

    fn start(&self, spec: Spec) -> Running {
        let (newest, orders) = watch::channel(None);
        let up = Arc::new(AtomicBool::new(false));
        let link = Link { spec: spec.clone(), identity: self.identity, orders, up: up.clone() };
        Running { spec, newest, up, _worker: self.feed.worker(|feed| link.keep(feed)) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Spec {
    host: HostName,
    agent: SocketAddr,
    /// Without a report for this long the connection is closed.
    silence: Duration,
}

impl Spec {
    fn new(name: &HostName, host: &Host, heartbeat: Duration) -> Self {
        let silence = (heartbeat * 3 + Duration::from_secs(1)).max(Duration::from_secs(2));
        Spec { host: name.clone(), agent: SocketAddr::new(host.ip, host.agent_port), silence }
    }
}

struct Link {
    spec: Spec,
    identity: u64,
    orders: Orders,
    up: Arc<AtomicBool>,
}

/// Why a connection has ended, or has not come about.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// Tried again soon.
    Broken(String),
    /// So is this: something was sent that an agent does not send.
    NoMessage(String),
    /// Somebody has to do something first.
    Mismatch(String),
    /// The agent obeys another monitor. Tried again soon: that one may be the one that this one is to replace.
    Occupied(String),
}

impl End {
    /// The words about another monitor tell how long it has been there, so they differ each time.
    fn says_the_same(&self, before: &End) -> bool {
        matches!((self, before), (End::Occupied(_), End::Occupied(_))) || self == before
    }
}

impl Link {
    async fn keep(mut self, feed: Feed) {
        let mut told: Option<End> = None;
        let mut retry = FIRST_RETRY;
        loop {
            let end = self.connection(&feed).await;
            let was_up = self.up.swap(false, Ordering::Relaxed);
            if was_up {
                retry = FIRST_RETRY;
            }
            let news = told.as_ref().is_none_or(|before| !end.says_the_same(before));
            if was_up || news {
                let why = match &end {
                    End::Broken(why) => {
                        debug!(host = %self.spec.host, "link to the agent: {why}");
                        why.clone()
                    }
                    End::NoMessage(why) => why.clone(),
                    End::Mismatch(why) | End::Occupied(why) => {
                        if news {
                            warn!(host = %self.spec.host, "agent refused: {why}");
                        }
                        why.clone()
                    }
                };
                feed.input(Input::AgentDown { host: self.spec.host.clone(), why }).await;
            }
            if let End::NoMessage(why) = &end {
                feed.refused(self.spec.agent, why);
            }
            match &end {
                End::Broken(_) | End::NoMessage(_) => {
                    sleep(retry).await;
                    retry = (retry * 2).min(LAST_RETRY);
                }
                End::Occupied(_) => sleep(LAST_RETRY).await,
                End::Mismatch(_) => sleep(MISMATCH_RETRY).await,
            }
            told = Some(end);
        }
    }

    /// One connection from its beginning to its end.
    async fn connection(&mut self, feed: &Feed) -> End {
        let agent = self.spec.agent;
        let mut stream = match timeout(CONNECT, TcpStream::connect(agent)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(e)) => return End::Broken(format!("connecting to the agent at {agent}: {e}")),
            Err(_) => return End::Broken(format!("connecting to the agent at {agent}: no answer within {CONNECT:?}")),
        };
        if let Err(e) = stream.set_nodelay(true) {
            return End::Broken(format!("setting up the connection to the agent at {agent}: {e}"));
        }
        let (read, mut write) = stream.split();
        let mut lines = Lines::new(read, MAX_LINE);
        let (boot, version) = match self.hellos(&mut lines, &mut write).await {
            Ok(hello) => hello,
            Err(end) => return end,
        };
        // An order from before answers nothing that this connection has brought. What comes after AgentUp counts.
        self.orders.mark_unchanged();
        self.up.store(true, Ordering::Relaxed);
        let host = self.spec.host.clone();
        feed.input(Input::AgentUp { host: host.clone(), boot, version }).await;
        tokio::select! {
            end = reports(&host, self.spec.silence, &mut lines, feed) => end,
            end = send_orders(&mut self.orders, &mut write) => end,
        }
    }

    async fn hellos(
        &self,
        lines: &mut Lines<impl AsyncRead + Unpin>,
        write: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(Boot, String), End> {
        let ours = ToAgent::Hello { protocol: PROTOCOL, host: self.spec.host.clone(), monitor: self.identity };
        let both = async {
            write_line(write, &ours).await?;
            lines.next().await
        };
        let agent = self.spec.agent;
        match timeout(HELLO, both).await {
            Ok(Ok(line)) => self.judge_hello(&line),
            Ok(Err(why)) => Err(End::Broken(format!("the agent at {agent} gave no hello: {why}"))),
            Err(_) => Err(End::Broken(format!("the agent at {agent} gave no hello within {HELLO:?}"))),
        }
    }

    fn judge_hello(&self, line: &str) -> Result<(Boot, String), End> {
        let Spec { host, agent, .. } = &self.spec;
        // The number first: another version's hello may look different otherwise.
        if let Ok(AnyHello { protocol }) = serde_json::from_str(line)
            && protocol != PROTOCOL
        {
            return Err(End::Mismatch(format!(
                "the agent at {agent} speaks protocol {protocol}, this monitor {PROTOCOL}: install the same version of \
                 mmm_agentd and mmm_mond"
            )));
        }
        match serde_json::from_str(line) {
            Ok(FromAgent::Hello { host: its, boot, version, .. }) if its == *host => Ok((boot, version)),
            Ok(FromAgent::Hello { host: its, .. }) => Err(End::Mismatch(format!(
                "the agent at {agent} says it is '{its}', not '{host}': compare 'this' in its mmm_agent.toml with \
                 [host.{host}] ip and agent_port here"
            ))),
            Ok(FromAgent::Refused { why, passes }) => {
                let why = format!("the agent at {agent} refuses this monitor: {why}");
                Err(if passes { End::Occupied(why) } else { End::Mismatch(why) })
            }
            Ok(FromAgent::Report(_) | FromAgent::Vouch(_) | FromAgent::Examining { .. } | FromAgent::Examined(_)) => {
                Err(End::NoMessage(format!("the agent at {agent} sent something else before its hello")))
            }
            Err(e) => Err(End::NoMessage(format!(
                "what listens at {agent} is no mmm_agentd ({e}): check agent_port and what runs there"
            ))),
        }
    }
}

#[derive(Deserialize)]
struct AnyHello {
    protocol: u32,
}

/// Hands in reports until there are no more.
async fn reports(host: &HostName, silence: Duration, lines: &mut Lines<impl AsyncRead + Unpin>, feed: &Feed) -> End {
    let mut heard = Instant::now();
    loop {
        let line = match timeout_at(heard + silence, lines.next()).await {
            Ok(Ok(line)) => line,
            Ok(Err(why)) => return End::Broken(why),
            Err(_) => return End::Broken(format!("no report for {silence:?}")),
        };
        match serde_json::from_str(&line) {
            Ok(FromAgent::Report(report)) => {
                feed.input(Input::Report { host: host.clone(), report }).await;
                heard = Instant::now();
            }
            Ok(FromAgent::Refused { why, .. }) => return End::Broken(format!("the agent closed the link: {why}")),
            Ok(FromAgent::Hello { .. }) => return End::NoMessage("the agent sent a second hello".to_owned()),
            Ok(FromAgent::Vouch(_)) => return End::NoMessage("the agent vouched; nobody had asked it".to_owned()),
            Ok(FromAgent::Examining { .. } | FromAgent::Examined(_)) => {
                return End::NoMessage("the agent told of an examination; nobody had asked for one here".to_owned());
            }
            Err(e) => return End::NoMessage(format!("the agent sent something that is no message: {e}")),
        }
    }
}

/// Sends the newest order whenever there is a new one.
async fn send_orders(orders: &mut Orders, write: &mut (impl AsyncWrite + Unpin)) -> End {
    loop {
        if orders.changed().await.is_err() {
            return End::Broken("the link is no longer wanted".to_owned());
        }
        let Some(order) = orders.borrow_and_update().clone() else { continue };
        let message = ToAgent::Order(Order::clone(&order));
        match timeout(WRITE, write_line(write, &message)).await {
            Ok(Ok(())) => {}
            Ok(Err(why)) => return End::Broken(why),
            Err(_) => return End::Broken(format!("the agent did not take an order within {WRITE:?}")),
        }
    }
}

async fn write_line(write: &mut (impl AsyncWrite + Unpin), message: &ToAgent) -> Result<(), String> {
    let line = to_line(message).map_err(|e| format!("writing a message: {e}"))?;
    write.write_all(line.as_bytes()).await.map_err(|e| format!("the connection broke: {e}"))
}

#[cfg(test)]
mod tests;

//! The agent's port: listens, checks the hello of whoever connects, and is the agent's end of the connection to the
//! monitor: lines become inputs, and reports lines. Other agents that say hello go on in `peer_link`.
//!
//! One monitor at a time commands this host. Two of them, each with a memory of its own, could give one address to two
//! hosts, so another one is refused until what the present one has given is over. After a restart of the agent any
//! monitor may be the first.
//!
//! Whoever can reach the port can send bytes here, so everything is bounded: how many have not said hello, for how
//! long, the length of a line, the lines that wait to be sent, and the log lines about refusals. Nothing here ever
//! makes the loop wait for the other side.

use crate::clock;
use crate::examine::Examiner;
use crate::jobs::Donor;
use crate::lines::{self, Ended, NotNow, Reading, Refusals, shortened};
use crate::peer_link::PeerLink;
use mmm_agent_core::io::{AskId, Input};
use mmm_common::epoch::Boot;
use mmm_common::ids::{HostName, Millis};
use mmm_common::report::Report;
use mmm_common::vouch::VouchAnswer;
use mmm_common::wire::{self, FromAgent, PROTOCOL, ToAgent, ToDonor};
use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::timeout;

/// From the connection to the whole hello.
const HELLO_TIME: Duration = Duration::from_secs(2);
/// Connections that have not said hello. One more pushes out the oldest, so that silent ones cannot keep the monitor
/// away.
const STRANGERS: usize = 16;
/// Reports waiting to be written. More than these only wait when the other side is stuck.
const WAITING_LINES: usize = 64;
/// Orders read and not yet handled; then the connection is simply not read any further.
const WAITING_INPUTS: usize = 64;
/// Sent data that nobody acknowledges for so long ends the connection: the other machine is gone.
const DEAD_AFTER: Duration = Duration::from_secs(5);

/// What the agent says of itself, and whom it knows.
#[derive(Clone, Debug)]
pub(crate) struct Myself {
    pub(crate) host: HostName,
    pub(crate) boot: Boot,
    /// Every configured host's own address: another agent is believed only when it comes from there.
    pub(crate) hosts: BTreeMap<HostName, IpAddr>,
    /// What a monitor has given is over so long after its last word.
    pub(crate) monitor_gone_after: Duration,
    pub(crate) examiner: Examiner,
    pub(crate) donor: Donor,
}

/// The port, the one connection to a monitor, if there is one, and those of other agents.
pub(crate) struct MonitorLink {
    shared: Arc<Shared>,
    listening: AbortHandle,
}

struct Shared {
    myself: Myself,
    inputs: mpsc::Sender<Input>,
    peers: PeerLink,
    refusals: Refusals,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    monitor: Option<Connected>,
    /// The monitor that is connected, or else the last one that was.
    commander: Option<Commander>,
    strangers: VecDeque<(u64, JoinHandle<()>)>,
    next_id: u64,
}

/// Whom this host obeys.
#[derive(Clone, Copy)]
struct Commander {
    identity: u64,
    at: IpAddr,
    since: Millis,
    /// Its last line.
    heard: Millis,
}

struct Connected {
    id: u64,
    lines: mpsc::Sender<String>,
    task: JoinHandle<()>,
}

impl MonitorLink {
    /// Listens on `at` from now on, and tries each second again while that fails. What the monitor says comes out of the
    /// receiver: `MonitorUp`, `Order`, `MonitorDown`. A newer connection of the same monitor replaces the older one
    /// without a `MonitorDown`. What other agents ask goes into `asked`.
    pub(crate) fn start(
        at: SocketAddr,
        myself: Myself,
        refusals: Refusals,
        asked: mpsc::Sender<Input>,
    ) -> (MonitorLink, mpsc::Receiver<Input>) {
        let (inputs, heard) = mpsc::channel(WAITING_INPUTS);
        let shared =
            Arc::new(Shared { myself, inputs, peers: PeerLink::new(asked), refusals, state: Mutex::default() });
        let listening = tokio::spawn(listen(at, Arc::clone(&shared))).abort_handle();
        (MonitorLink { shared, listening }, heard)
    }

    /// Sends the report if a monitor is connected. A lost report is no harm: the next one says everything again.
    pub(crate) fn send(&self, report: Box<Report>) {
        let state = self.shared.state();
        let Some(monitor) = &state.monitor else { return };
        match wire::to_line(&FromAgent::Report(report)) {
            // Full: the writer is stuck at an earlier line and will close the connection.
            Ok(line) => drop(monitor.lines.try_send(line)),
            Err(e) => tracing::error!("a report cannot be written as JSON and was not sent: {e}"),
        }
    }

    /// Answers another agent, if the connection that asked is still there.
    pub(crate) fn answer(&self, ask: AskId, answer: VouchAnswer) {
        self.shared.peers.answer(ask, answer);
    }

    /// Lets the last reports go out and closes, within one second.
    pub(crate) async fn close(self) {
        self.listening.abort();
        self.shared.peers.close();
        let monitor = self.shared.state().monitor.take();
        if let Some(Connected { lines, mut task, .. }) = monitor {
            drop(lines);
            if timeout(Duration::from_secs(1), &mut task).await.is_err() {
                task.abort();
            }
        }
    }
}

impl Drop for MonitorLink {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// No IP_FREEBIND: before the host's address is there nobody could reach the port, and a wrong address in the
/// configuration would go unnoticed. Trying again each second finds the address as soon as it matters, and gets over
/// a port that a process before us has not given up yet, too.
async fn listen(at: SocketAddr, shared: Arc<Shared>) {
    let mut failures = 0u64;
    let listener = loop {
        match TcpListener::bind(at).await {
            Ok(listener) => break listener,
            Err(e) if failures.is_multiple_of(60) => {
                tracing::warn!("cannot listen for the monitor on {at}: {e}; trying again each second");
            }
            Err(_) => {}
        }
        failures += 1;
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    tracing::info!("listening for the monitor on {at}");
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => welcome(&shared, stream, peer),
            Err(e) => {
                // Out of file descriptors, mostly; accepting again at once would only spin.
                tracing::warn!("cannot accept connections on {at}: {e}; trying again in 1 s");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// Gives a new connection its task and its place among the strangers.
fn welcome(shared: &Arc<Shared>, stream: TcpStream, peer: SocketAddr) {
    let mut state = shared.state();
    let id = state.next_id;
    state.next_id += 1;
    if state.strangers.len() >= STRANGERS
        && let Some((_, oldest)) = state.strangers.pop_front()
    {
        oldest.abort();
        shared.refusals.warn(peer, "too many connections without a hello on the agent's port; the oldest was closed");
    }
    let task = tokio::spawn(serve(Arc::clone(shared), id, stream, peer));
    state.strangers.push_back((id, task));
}

/// One connection, from its first byte to its end.
async fn serve(shared: Arc<Shared>, id: u64, stream: TcpStream, peer: SocketAddr) {
    let (mut reading, mut writing) = match lines::split(stream, DEAD_AFTER) {
        Ok(halves) => halves,
        Err(e) => {
            shared.state().leaves_strangers(id);
            return tracing::debug!(%peer, "connection over: {e}");
        }
    };
    let hello = match timeout(HELLO_TIME, hello(&mut reading, &mut writing, &shared.myself, peer)).await {
        Ok(hello) => hello,
        Err(_) => Err(Ended::Refused(format!("no hello within {} s", HELLO_TIME.as_secs()))),
    };
    // Without a place among the strangers any more, this task is being ended.
    let Some(task) = shared.state().leaves_strangers(id) else { return };
    let ended = match hello {
        Err(ended) => ended,
        Ok(Caller::Monitor(identity)) => {
            shared.serve_monitor(id, task, peer, identity, &mut reading, &mut writing).await
        }
        Ok(Caller::Agent(from)) => {
            tracing::debug!(%peer, "the agent of {from} has connected and may ask for vouches");
            let waiting = shared.peers.connected(&from, id, task);
            shared.peers.serve(&from, id, &mut reading, &mut writing, waiting).await
        }
        // Its task, dropped here, runs on; it is bounded by the time of an examination.
        Ok(Caller::Doctor(identity)) => {
            let other = shared.state().commander.filter(|c| c.identity != identity);
            let obeyed = other.map(|c| c.is_obeyed(clock::now(), shared.myself.monitor_gone_after).told);
            shared.myself.examiner.serve(&mut writing, obeyed).await
        }
        // As the doctor's; it ends with the data, or when they stand still.
        Ok(Caller::Copier(from)) => shared.myself.donor.serve(&from, &mut writing).await,
    };
    refuse(&shared.refusals, reading, writing, peer, ended).await;
}

impl Shared {
    /// Takes the place of an older connection of the same monitor. Aborting that one's task closes it, and it gets no
    /// further word to the core: the runtime has one thread, so it is not in the middle of one.
    async fn serve_monitor(
        &self,
        id: u64,
        task: JoinHandle<()>,
        peer: SocketAddr,
        identity: u64,
        reading: &mut Reading,
        writing: &mut OwnedWriteHalf,
    ) -> Ended {
        let hello = match self.myself.hello() {
            Ok(hello) => hello,
            Err(ended) => return ended,
        };
        let (lines, waiting) = mpsc::channel(WAITING_LINES);
        // Before any report, and only to the monitor that is obeyed. The queue is empty, so there is room.
        let _ = lines.try_send(hello);
        let old = {
            let mut state = self.state();
            if let Err(not_now) = state.obey(identity, peer.ip(), clock::now(), self.myself.monitor_gone_after) {
                return Ended::NotNow(not_now);
            }
            state.monitor.replace(Connected { id, lines, task })
        };
        if let Some(old) = old {
            tracing::info!("a newer connection of the monitor replaces the older one");
            old.task.abort();
        }
        tracing::info!(%peer, "the monitor has connected");
        if self.inputs.send(Input::MonitorUp).await.is_err() {
            return Ended::Closed;
        }
        let ended = tokio::select! {
            ended = self.hear(reading) => ended,
            ended = lines::speak(writing, waiting) => ended,
        };
        // Nothing to tell when this connection was replaced or closed from our side.
        let mine = self.state().monitor.take_if(|m| m.id == id).is_some();
        if mine {
            let why = ended.to_string();
            tracing::warn!(%peer, "the connection to the monitor has ended: {why}");
            let _ = self.inputs.send(Input::MonitorDown { why }).await;
        }
        ended
    }

    /// Orders, one after the other, until the connection ends.
    async fn hear(&self, reading: &mut Reading) -> Ended {
        loop {
            let line = match reading.line().await {
                Ok(line) => line,
                Err(ended) => return ended,
            };
            if let Some(commander) = &mut self.state().commander {
                commander.heard = clock::now();
            }
            match serde_json::from_str(&line) {
                Ok(ToAgent::Order(order)) => {
                    if self.inputs.send(Input::Order(order)).await.is_err() {
                        return Ended::Closed;
                    }
                }
                Ok(ToAgent::Hello { .. } | ToAgent::PeerHello { .. } | ToAgent::Examine { .. }) => {
                    return Ended::Refused("a second hello on the same connection".to_owned());
                }
                Ok(ToAgent::Vouch(_)) => {
                    return Ended::Refused("the monitor asked for a vouch; only another agent may".to_owned());
                }
                Err(e) => return Ended::Refused(format!("a line is no order ({e}): {}", shortened(&line))),
            }
        }
    }
}

impl State {
    /// From now on this host obeys that monitor, unless another one is connected or may still count on what it gave.
    fn obey(&mut self, identity: u64, at: IpAddr, now: Millis, gone_after: Duration) -> Result<(), NotNow> {
        let since = match self.commander {
            Some(same) if same.identity == identity => same.since,
            Some(other) if self.monitor.is_some() || now.since(other.heard) < gone_after => {
                return Err(other.is_obeyed(now, gone_after));
            }
            Some(_) | None => now,
        };
        self.commander = Some(Commander { identity, at, since, heard: now });
        Ok(())
    }

    fn leaves_strangers(&mut self, id: u64) -> Option<JoinHandle<()>> {
        let at = self.strangers.iter().position(|(stranger, _)| *stranger == id)?;
        self.strangers.remove(at).map(|(_, task)| task)
    }
}

impl Commander {
    fn is_obeyed(&self, now: Millis, gone_after: Duration) -> NotNow {
        let Commander { identity, at, since, .. } = self;
        let words = |for_how_long: &str| {
            format!(
                "another monitor (at {at}, identity {identity:016x}) commands this host{for_how_long}; two monitors could \
                 give one address to two hosts, so stop one of the two; if the other one is gone for good, this passes by \
                 itself when its connection has ended and its last word is {:.1} s old",
                gone_after.as_secs_f64()
            )
        };
        NotNow { logged: words(""), told: words(&format!(", for {} s now", now.since(*since).as_secs())) }
    }
}

impl Myself {
    fn hello(&self) -> Result<String, Ended> {
        Ok(wire::to_line(&FromAgent::Hello {
            protocol: PROTOCOL,
            host: self.host.clone(),
            boot: self.boot,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        })?)
    }
}

/// Who has said a right hello.
enum Caller {
    /// Its identity. Whether it is obeyed, and so answered, is decided when it takes its place.
    Monitor(u64),
    Agent(HostName),
    /// A monitor that has this host examined. Its identity.
    Doctor(u64),
    /// Another agent that copies this host's data.
    Copier(HostName),
}

/// The other side's hello, checked; another agent's is answered, too.
async fn hello(
    reading: &mut Reading,
    writing: &mut OwnedWriteHalf,
    myself: &Myself,
    peer: SocketAddr,
) -> Result<Caller, Ended> {
    let line = reading.line().await?;
    let caller = check_hello(&line, myself, peer.ip()).map_err(Ended::Refused)?;
    match caller {
        Caller::Agent(_) => lines::write(writing, &myself.hello()?).await?,
        Caller::Monitor(_) | Caller::Doctor(_) | Caller::Copier(_) => {}
    }
    Ok(caller)
}

fn check_hello(line: &str, myself: &Myself, came_from: IpAddr) -> Result<Caller, String> {
    // The number first and by itself: a hello of another version may look different in everything else.
    let fields = serde_json::from_str::<serde_json::Value>(line).unwrap_or_default();
    let number = fields.get("protocol").and_then(|number| number.as_u64());
    if let Some(protocol) = number.filter(|p| *p != u64::from(PROTOCOL)) {
        return Err(format!(
            "the other side speaks protocol {protocol}, this agent (version {}) protocol {PROTOCOL}; bring both to the \
             same version",
            env!("CARGO_PKG_VERSION")
        ));
    }
    if let Ok(ToDonor::Donate { host, from, .. }) = serde_json::from_str(line) {
        return check_agent(&host, from, myself, came_from).map(Caller::Copier);
    }
    match serde_json::from_str(line) {
        Ok(ToAgent::Hello { host, monitor, .. }) if host == myself.host => Ok(Caller::Monitor(monitor)),
        Ok(ToAgent::Examine { host, monitor, .. }) if host == myself.host => Ok(Caller::Doctor(monitor)),
        Ok(ToAgent::Hello { host, .. } | ToAgent::Examine { host, .. }) => Err(format!(
            "the monitor wants host '{host}', but this is the agent of '{}'; compare the ip of both hosts in the \
             monitor's configuration, and 'this' in mmm_agent.toml",
            myself.host
        )),
        Ok(ToAgent::PeerHello { host, from, .. }) => check_agent(&host, from, myself, came_from).map(Caller::Agent),
        Ok(ToAgent::Order(_)) => Err("an order came before the hello".to_owned()),
        Ok(ToAgent::Vouch(_)) => Err("a request to vouch came before the hello".to_owned()),
        Err(_) if fields.get("message").is_some_and(|m| m == "hello") && fields.get("monitor").is_none() => {
            Err(format!(
                "the hello does not say which monitor it comes from, so it speaks another protocol than this agent \
                 (version {}); bring both to the same version",
                env!("CARGO_PKG_VERSION")
            ))
        }
        Err(e) => Err(format!("the first line is no hello ({e}): {}", shortened(line))),
    }
}

/// Its configured address is all that can be checked of another agent.
fn check_agent(host: &HostName, from: HostName, myself: &Myself, came_from: IpAddr) -> Result<HostName, String> {
    if *host != myself.host {
        return Err(format!(
            "the agent of '{from}' wants host '{host}', but this is the agent of '{}'; use the same mmm_common.toml on \
             all hosts",
            myself.host
        ));
    }
    if from == myself.host {
        return Err(format!(
            "another agent says that it is '{from}', which is this one; compare 'this' in mmm_agent.toml"
        ));
    }
    match myself.hosts.get(&from) {
        None => {
            Err(format!("an agent says that it is '{from}', and there is no [host.{from}] in the configuration here"))
        }
        Some(ip) if *ip != came_from => {
            Err(format!("an agent says that it is '{from}', whose ip is {ip}, and it has come from {came_from}"))
        }
        Some(_) => Ok(from),
    }
}

/// Says why, if the other side broke the rules or is not obeyed, and closes.
async fn refuse(
    refusals: &Refusals,
    mut reading: Reading,
    mut writing: OwnedWriteHalf,
    peer: SocketAddr,
    ended: Ended,
) {
    let (logged, why, passes) = match ended {
        Ended::Refused(why) => (why.clone(), why, false),
        Ended::NotNow(NotNow { logged, told }) => (logged, told, true),
        // Port scans and health checks; not worth more.
        Ended::Lost(why) => return tracing::debug!(%peer, "connection over: {why}"),
        Ended::Closed => return,
    };
    refusals.warn(peer, &format!("refused a connection on the agent's port: {logged}"));
    let _ = timeout(Duration::from_secs(1), async {
        lines::write(&mut writing, &wire::to_line(&FromAgent::Refused { why, passes })?).await?;
        writing.shutdown().await?;
        // Closing with unread bytes would send a reset, and that can overtake the line. Bounded by this second, and
        // by not keeping anything.
        reading.drain().await?;
        Ok::<(), Ended>(())
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmm_common::epoch::{Anchor, Epoch};
    use mmm_common::order::{Order, ReplicationOrder};
    use mmm_common::report::ServerReport;
    use mmm_common::state::HostState;
    use mmm_common::vouch::VouchRequest;
    use mmm_common::wire::MAX_LINE;
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::TcpSocket;
    use tokio::time::Instant;

    const HELLO: &str = r#"{"message":"hello","protocol":3,"host":"db1","monitor":11}"#;
    const PEER_HELLO: &str = r#"{"message":"peer_hello","protocol":3,"host":"db1","from":"db2"}"#;
    /// Where db2 and db3 are configured to be, and where nobody is.
    const DB2: &str = "127.0.0.2";
    const DB3: &str = "127.0.0.3";
    const ELSEWHERE: &str = "127.0.0.1";
    /// Long enough for a busy machine, short enough to be waited for.
    const GONE_AFTER: Duration = Duration::from_secs(2);

    /// An agent's port, and what came in by it.
    struct Port {
        at: SocketAddr,
        link: MonitorLink,
        inputs: mpsc::Receiver<Input>,
        asked: mpsc::Receiver<Input>,
        refusals: Refusals,
    }

    fn start_at(at: SocketAddr) -> Port {
        let hosts = [("db1", ELSEWHERE), ("db2", DB2), ("db3", DB3)];
        let hosts = hosts.into_iter().map(|(name, ip)| (name.into(), ip.parse().unwrap())).collect();
        let (to_core, asked) = mpsc::channel(4);
        let refusals = Refusals::default();
        let (examiner, donor) = (Examiner::nothing(), Donor::nothing());
        let boot = Boot(7);
        let myself = Myself { host: "db1".into(), boot, hosts, monitor_gone_after: GONE_AFTER, examiner, donor };
        let (link, inputs) = MonitorLink::start(at, myself, refusals.clone(), to_core);
        Port { at, link, inputs, asked, refusals }
    }

    fn free() -> SocketAddr {
        std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    fn start() -> (SocketAddr, MonitorLink, mpsc::Receiver<Input>) {
        let Port { at, link, inputs, .. } = start_at(free());
        (at, link, inputs)
    }

    async fn connect(at: SocketAddr) -> BufReader<TcpStream> {
        connect_from(ELSEWHERE, at).await
    }

    /// The listener comes up in a task of its own.
    async fn connect_from(source: &str, at: SocketAddr) -> BufReader<TcpStream> {
        for _ in 0..300 {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
            if let Ok(stream) = socket.connect(at).await {
                return BufReader::new(stream);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nobody listens on {at} after 3 s");
    }

    async fn say(stream: &mut BufReader<TcpStream>, line: &str) {
        stream.get_mut().write_all(format!("{line}\n").as_bytes()).await.unwrap();
    }

    /// None: closed.
    async fn hear_line(stream: &mut BufReader<TcpStream>) -> Option<FromAgent> {
        let mut line = String::new();
        let read = timeout(Duration::from_secs(5), stream.read_line(&mut line)).await.expect("no line within 5 s");
        match read {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
        }
    }

    async fn next(inputs: &mut mpsc::Receiver<Input>) -> Input {
        timeout(Duration::from_secs(5), inputs.recv()).await.expect("no input within 5 s").unwrap()
    }

    async fn monitor(at: SocketAddr, inputs: &mut mpsc::Receiver<Input>) -> BufReader<TcpStream> {
        let mut stream = connect(at).await;
        say(&mut stream, HELLO).await;
        let Some(FromAgent::Hello { protocol: PROTOCOL, host, boot: Boot(7), .. }) = hear_line(&mut stream).await
        else {
            panic!("no hello")
        };
        assert_eq!(host.as_str(), "db1");
        assert_eq!(next(inputs).await, Input::MonitorUp);
        stream
    }

    fn order(seq: u64) -> Order {
        Order {
            answers: Anchor { boot: Boot(7), seq },
            lease_ttl_ms: 3000,
            state: HostState::Online,
            addresses: BTreeMap::new(),
            replication: ReplicationOrder::Keep,
            wait_for_replica: true,
            task: None,
            job: None,
        }
    }

    fn report(troubles: Vec<String>) -> Box<Report> {
        Box::new(Report {
            anchor: Anchor { boot: Boot(7), seq: 1 },
            addresses: BTreeMap::new(),
            server: ServerReport::unknown("test"),
            task: None,
            job: None,
            troubles,
            vouched: BTreeMap::new(),
            conflicts: BTreeMap::new(),
            machine_boot: "m".to_owned(),
            guarded: false,
            leaving: false,
        })
    }

    #[tokio::test]
    async fn orders_come_in_and_reports_go_out() {
        let (at, link, mut inputs) = start();
        let mut stream = monitor(at, &mut inputs).await;
        for seq in 1..=3 {
            say(&mut stream, wire::to_line(&ToAgent::Order(order(seq))).unwrap().trim()).await;
        }
        for seq in 1..=3 {
            assert_eq!(next(&mut inputs).await, Input::Order(order(seq)));
        }
        link.send(report(vec!["one".to_owned()]));
        link.send(report(vec!["last".to_owned()]));
        link.close().await;
        for text in ["one", "last"] {
            assert_eq!(hear_line(&mut stream).await, Some(FromAgent::Report(report(vec![text.to_owned()]))));
        }
        assert_eq!(hear_line(&mut stream).await, None, "closed, after the last report went out");
        assert!(inputs.try_recv().is_err(), "no MonitorDown for what the agent closed itself");
    }

    #[tokio::test]
    async fn who_breaks_the_rules_is_told_why_and_closed() {
        let (at, _link, mut inputs) = start();
        let too_long = "x".repeat(MAX_LINE + 1);
        let first_order = wire::to_line(&ToAgent::Order(order(1))).unwrap();
        let cases = [
            (r#"{"message":"hello","protocol":99,"new":"words"}"#, "protocol 99, this agent"),
            (
                r#"{"message":"hello","protocol":3,"host":"db2","monitor":11}"#,
                "wants host 'db2', but this is the agent of 'db1'",
            ),
            (
                r#"{"message":"hello","protocol":3,"host":"db1"}"#,
                "does not say which monitor it comes from, so it speaks",
            ),
            (r#"{"message":"hello","protocol":3,"host":"db1","monitor":-1}"#, "the first line is no hello"),
            ("GET / HTTP/1.1", "the first line is no hello"),
            ("\u{0}\u{1}{{{{", "the first line is no hello"),
            (first_order.trim(), "an order came before the hello"),
            (&too_long, "longer than 262144 bytes"),
        ];
        for (line, why) in cases {
            let mut stream = connect(at).await;
            say(&mut stream, line).await;
            match hear_line(&mut stream).await {
                Some(FromAgent::Refused { why: said, passes: false }) => assert!(said.contains(why), "{said}"),
                other => panic!("{why}: {other:?}"),
            }
            assert_eq!(hear_line(&mut stream).await, None, "{why}");
        }
        assert!(inputs.try_recv().is_err(), "none of them reached the core");

        // The same after a right hello: the core hears of the end.
        for line in ["garbage", HELLO, &too_long] {
            let mut stream = monitor(at, &mut inputs).await;
            say(&mut stream, line).await;
            assert!(matches!(hear_line(&mut stream).await, Some(FromAgent::Refused { .. })));
            assert!(matches!(next(&mut inputs).await, Input::MonitorDown { .. }));
        }
    }

    #[tokio::test]
    async fn the_silent_are_refused_in_time_and_cannot_keep_the_monitor_away() {
        let (at, _link, mut inputs) = start();
        let mut first = connect(at).await;
        let mut silent = vec![];
        for _ in 0..STRANGERS {
            silent.push(connect(at).await);
        }
        assert_eq!(hear_line(&mut first).await, None, "the oldest one had to go");
        let begin = Instant::now();
        monitor(at, &mut inputs).await;
        assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
        let last = silent.last_mut().unwrap();
        match hear_line(last).await {
            Some(FromAgent::Refused { why, .. }) => assert_eq!(why, "no hello within 2 s"),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_newer_connection_of_the_same_monitor_replaces_the_older_one() {
        let (at, link, mut inputs) = start();
        let mut old = monitor(at, &mut inputs).await;
        let mut new = monitor(at, &mut inputs).await;
        assert_eq!(hear_line(&mut old).await, None);
        link.send(report(vec![]));
        assert_eq!(hear_line(&mut new).await, Some(FromAgent::Report(report(vec![]))));
        drop(old);
        drop(new);
        let end = next(&mut inputs).await;
        assert!(matches!(&end, Input::MonitorDown { why } if why.contains("closed it")), "{end:?}");
        assert!(inputs.try_recv().is_err());
    }

    async fn is_not_obeyed(at: SocketAddr, identity: u64) {
        let mut stream = connect(at).await;
        say(&mut stream, wire::to_line(&hello_of(identity)).unwrap().trim()).await;
        match hear_line(&mut stream).await {
            Some(FromAgent::Refused { why, passes: true }) => {
                for words in
                    ["another monitor (at 127.0.0.1, identity 000000000000000b) commands this host, for ", "stop"]
                {
                    assert!(why.contains(words), "{why}");
                }
                assert!(why.contains("passes by itself when") && why.contains("2.0 s old"), "{why}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(hear_line(&mut stream).await, None);
    }

    fn hello_of(monitor: u64) -> ToAgent {
        ToAgent::Hello { protocol: PROTOCOL, host: "db1".into(), monitor }
    }

    #[tokio::test]
    async fn another_monitor_is_refused_until_nothing_of_the_present_one_is_left() {
        let mut port = start_at(free());
        let mut first = monitor(port.at, &mut port.inputs).await;
        is_not_obeyed(port.at, 12).await;
        // Silent for longer than a lease, but connected.
        tokio::time::sleep(GONE_AFTER + Duration::from_millis(100)).await;
        is_not_obeyed(port.at, 12).await;
        say(&mut first, wire::to_line(&ToAgent::Order(order(1))).unwrap().trim()).await;
        assert_eq!(next(&mut port.inputs).await, Input::Order(order(1)), "the refused one has disturbed nothing");
        let last_word = Instant::now();
        drop(first);
        assert!(matches!(next(&mut port.inputs).await, Input::MonitorDown { .. }));
        is_not_obeyed(port.at, 12).await;
        assert_eq!(port.refusals.total(), 3);

        let mut tries = 0;
        let second = loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let mut stream = connect(port.at).await;
            say(&mut stream, wire::to_line(&hello_of(12)).unwrap().trim()).await;
            if let Some(FromAgent::Hello { .. }) = hear_line(&mut stream).await {
                break stream;
            }
            assert!(last_word.elapsed() < 3 * GONE_AFTER);
            tries += 1;
        };
        assert!(last_word.elapsed() >= GONE_AFTER - Duration::from_millis(50), "{:?}", last_word.elapsed());
        assert!(tries > 0);
        assert_eq!(next(&mut port.inputs).await, Input::MonitorUp);

        // Now the first one is another.
        let mut stream = connect(port.at).await;
        say(&mut stream, HELLO).await;
        let refused = hear_line(&mut stream).await;
        assert!(
            matches!(&refused, Some(FromAgent::Refused { why, passes: true }) if why.contains("identity 000000000000000c")),
            "{refused:?}"
        );
        drop(second);
    }

    #[tokio::test]
    async fn a_monitor_that_does_not_read_is_given_up() {
        let (at, link, mut inputs) = start();
        let _stuck = monitor(at, &mut inputs).await;
        let begin = Instant::now();
        // More than the socket buffers of both sides hold.
        for _ in 0..WAITING_LINES + 10 {
            link.send(report(vec!["x".repeat(200_000)]));
        }
        // Writing them as JSON takes its time on a busy machine; waiting for the other side would never end.
        assert!(begin.elapsed() < Duration::from_secs(10), "sending never waits");
        let end = next(&mut inputs).await;
        assert!(matches!(&end, Input::MonitorDown { why } if why.contains("did not take a message")), "{end:?}");
        monitor(at, &mut inputs).await;
    }

    #[tokio::test]
    async fn an_address_that_cannot_be_had_yet_is_tried_again() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = taken.local_addr().unwrap();
        let mut port = start_at(at);
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(taken);
        monitor(at, &mut port.inputs).await;
    }

    async fn agent(port: &Port) -> BufReader<TcpStream> {
        let mut stream = connect_from(DB2, port.at).await;
        say(&mut stream, PEER_HELLO).await;
        let hello = hear_line(&mut stream).await;
        assert!(matches!(&hello, Some(FromAgent::Hello { host, .. }) if host.as_str() == "db1"), "{hello:?}");
        stream
    }

    fn request(seq: u64) -> VouchRequest {
        let addresses = BTreeMap::from([([10, 0, 0, 50].into(), Epoch(5))]);
        VouchRequest { anchor: Anchor { boot: Boot(9), seq }, lease_ttl_ms: 3000, guarded: false, addresses }
    }

    fn answer(seq: u64) -> VouchAnswer {
        let VouchRequest { anchor, lease_ttl_ms, guarded: _, addresses } = request(seq);
        VouchAnswer { anchor, lease_ttl_ms, vouched: addresses, refused: BTreeMap::new() }
    }

    async fn ask(stream: &mut BufReader<TcpStream>, seq: u64) {
        say(stream, wire::to_line(&ToAgent::Vouch(request(seq))).unwrap().trim()).await;
    }

    async fn asked(port: &mut Port) -> (AskId, u64) {
        let input = next(&mut port.asked).await;
        let Input::Asked { ask, from, request } = input else { panic!("{input:?}") };
        assert_eq!(from.as_str(), "db2");
        (ask, request.anchor.seq)
    }

    #[tokio::test]
    async fn another_agent_asks_and_is_answered_beside_the_monitor() {
        let mut port = start_at(free());
        let mut seen_by_monitor = monitor(port.at, &mut port.inputs).await;
        let mut db2 = agent(&port).await;
        ask(&mut db2, 1).await;
        ask(&mut db2, 2).await;
        let (first, seq) = asked(&mut port).await;
        assert_eq!(seq, 1);
        let (second, seq) = asked(&mut port).await;
        assert_eq!(seq, 2);
        port.link.answer(first, answer(1));
        port.link.answer(first, answer(99));
        port.link.answer(second, answer(2));
        for seq in [1, 2] {
            assert_eq!(hear_line(&mut db2).await, Some(FromAgent::Vouch(answer(seq))), "each is answered once");
        }
        port.link.send(report(vec![]));
        assert_eq!(hear_line(&mut seen_by_monitor).await, Some(FromAgent::Report(report(vec![]))));
        assert!(port.inputs.try_recv().is_err(), "the monitor's queue has nothing of it");
        assert_eq!(port.refusals.total(), 0);
    }

    #[tokio::test]
    async fn an_examination_needs_nobodys_leave_and_disturbs_nobody() {
        let mut port = start_at(free());
        let mut seen_by_monitor = monitor(port.at, &mut port.inputs).await;
        let examine = |host: &str, monitor: u64| {
            wire::to_line(&ToAgent::Examine { protocol: PROTOCOL, host: host.into(), monitor }).unwrap()
        };
        for (identity, findings) in [(11, 0), (12, 1)] {
            let mut stream = connect(port.at).await;
            say(&mut stream, examine("db1", identity).trim()).await;
            let Some(FromAgent::Examining { unix_ms }) = hear_line(&mut stream).await else { panic!("{identity}") };
            assert!(unix_ms > 1_700_000_000_000, "{unix_ms}");
            let Some(FromAgent::Examined(examined)) = hear_line(&mut stream).await else { panic!("{identity}") };
            assert_eq!(examined.findings.len(), findings, "one, when another monitor is obeyed: {examined:?}");
            assert_eq!(hear_line(&mut stream).await, None, "closed");
        }
        let mut stream = connect(port.at).await;
        say(&mut stream, examine("db2", 11).trim()).await;
        is_refused(&mut stream, "wants host 'db2'").await;

        assert!(port.asked.try_recv().is_err() && port.inputs.try_recv().is_err(), "the core has heard nothing");
        port.link.send(report(vec![]));
        assert_eq!(hear_line(&mut seen_by_monitor).await, Some(FromAgent::Report(report(vec![]))));
    }

    #[tokio::test]
    async fn an_answer_goes_only_to_the_connection_that_asked() {
        let mut port = start_at(free());
        let mut old = agent(&port).await;
        ask(&mut old, 1).await;
        let (id, _) = asked(&mut port).await;
        let mut new = agent(&port).await;
        assert_eq!(hear_line(&mut old).await, None, "the newer one replaces it");
        port.link.answer(id, answer(1));
        ask(&mut new, 2).await;
        let (id, _) = asked(&mut port).await;
        port.link.answer(id, answer(2));
        assert_eq!(hear_line(&mut new).await, Some(FromAgent::Vouch(answer(2))));
    }

    async fn is_refused(stream: &mut BufReader<TcpStream>, why: &str) {
        match hear_line(stream).await {
            Some(FromAgent::Refused { why: said, passes: false }) => {
                assert!(said.contains(why), "'{why}' is not in: {said}")
            }
            other => panic!("{why}: {other:?}"),
        }
        assert_eq!(hear_line(stream).await, None, "{why}");
    }

    // lessons.md 8
    #[tokio::test]
    async fn forged_agents_are_refused_and_counted() {
        let mut port = start_at(free());
        let hello = |protocol: u32, host: &str, from: &str| {
            wire::to_line(&ToAgent::PeerHello { protocol, host: host.into(), from: from.into() }).unwrap()
        };
        let vouch = wire::to_line(&ToAgent::Vouch(request(1))).unwrap();
        let cases = [
            (ELSEWHERE, hello(PROTOCOL, "db1", "db2"), "whose ip is 127.0.0.2, and it has come from 127.0.0.1"),
            (DB3, hello(PROTOCOL, "db1", "db2"), "it has come from 127.0.0.3"),
            (DB2, hello(PROTOCOL, "db1", "db9"), "there is no [host.db9]"),
            (ELSEWHERE, hello(PROTOCOL, "db1", "db1"), "which is this one"),
            (DB2, hello(PROTOCOL, "db3", "db2"), "wants host 'db3', but this is the agent of 'db1'"),
            (DB2, hello(PROTOCOL + 1, "db1", "db2"), "speaks protocol 4"),
            (DB2, vouch, "a request to vouch came before the hello"),
        ];
        for (count, (source, line, why)) in cases.iter().enumerate() {
            let mut stream = connect_from(source, port.at).await;
            say(&mut stream, line.trim()).await;
            is_refused(&mut stream, why).await;
            assert_eq!(port.refusals.total(), count as u64 + 1, "{why}");
        }
        assert!(port.asked.try_recv().is_err() && port.inputs.try_recv().is_err(), "none of them reached the core");
    }

    #[tokio::test]
    async fn what_an_agent_may_not_say_ends_its_connection_and_no_other() {
        let mut port = start_at(free());
        let mut seen_by_monitor = monitor(port.at, &mut port.inputs).await;
        let too_long = "x".repeat(MAX_LINE + 1);
        let order = wire::to_line(&ToAgent::Order(order(1))).unwrap();
        let cases = [
            (order.trim(), "sent an order; only a monitor may"),
            (PEER_HELLO, "a second hello"),
            (HELLO, "a second hello"),
            (r#"{"message":"vouch","anchor":{"boot":1}}"#, "a line is no request"),
            ("\u{0}garbage", "a line is no request"),
            (&too_long, "longer than 262144 bytes"),
        ];
        for (count, (line, why)) in cases.iter().enumerate() {
            let mut db2 = agent(&port).await;
            say(&mut db2, line).await;
            is_refused(&mut db2, why).await;
            assert_eq!(port.refusals.total(), count as u64 + 1, "{why}");
        }
        let mut db2 = agent(&port).await;
        db2.get_mut().write_all(br#"{"message":"vouch","anch"#).await.unwrap();
        db2.get_mut().shutdown().await.unwrap();
        is_refused(&mut db2, "in the middle of a line").await;
        assert_eq!(port.refusals.total(), cases.len() as u64 + 1);

        assert!(port.asked.try_recv().is_err() && port.inputs.try_recv().is_err(), "nothing of it reached the core");
        port.link.send(report(vec![]));
        assert_eq!(hear_line(&mut seen_by_monitor).await, Some(FromAgent::Report(report(vec![]))));
        agent(&port).await;
    }

    #[tokio::test]
    async fn an_agent_that_asks_without_end_is_closed() {
        let mut port = start_at(free());
        let mut db2 = agent(&port).await;
        let lines: String = (0..1000).map(|seq| wire::to_line(&ToAgent::Vouch(request(seq))).unwrap()).collect();
        db2.get_mut().write_all(lines.as_bytes()).await.unwrap();
        let mut handled = 0;
        while let Ok(Some(input)) = timeout(Duration::from_millis(300), port.asked.recv()).await {
            assert!(matches!(input, Input::Asked { .. }), "{input:?}");
            handled += 1;
        }
        assert!((100..1000).contains(&handled), "{handled}, each second 100 of them");
        is_refused(&mut db2, "more than 100 times a second").await;
        assert_eq!(port.refusals.total(), 1);
    }

    #[tokio::test]
    async fn a_monitor_that_speaks_as_an_agent_or_stops_within_a_line_is_refused_and_counted() {
        let mut port = start_at(free());
        let mut stream = monitor(port.at, &mut port.inputs).await;
        ask(&mut stream, 1).await;
        is_refused(&mut stream, "only another agent may").await;
        let end = next(&mut port.inputs).await;
        assert!(matches!(&end, Input::MonitorDown { why } if why.contains("asked for a vouch")), "{end:?}");

        let mut stream = monitor(port.at, &mut port.inputs).await;
        let line = wire::to_line(&ToAgent::Order(order(1))).unwrap();
        stream.get_mut().write_all(&line.as_bytes()[..line.len() / 2]).await.unwrap();
        stream.get_mut().shutdown().await.unwrap();
        is_refused(&mut stream, "in the middle of a line").await;
        assert!(matches!(next(&mut port.inputs).await, Input::MonitorDown { .. }));
        assert_eq!(port.refusals.total(), 2);
        assert!(port.asked.try_recv().is_err() && port.inputs.try_recv().is_err());
    }
}

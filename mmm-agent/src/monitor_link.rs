//! The agent's end of the connection to the monitor: listens, checks the hello, turns lines into inputs and reports
//! into lines.
//!
//! Whoever can reach the port can send bytes here, so everything is bounded: how many have not said hello, for how
//! long, the length of a line, the lines that wait to be sent, and the log lines about refusals. Nothing here ever
//! makes the loop wait for the other side.

use mmm_agent_core::io::Input;
use mmm_common::epoch::Boot;
use mmm_common::frame::LineDecoder;
use mmm_common::ids::HostName;
use mmm_common::report::Report;
use mmm_common::wire::{self, FromAgent, MAX_LINE, PROTOCOL, ToAgent};
use nix::sys::socket::{setsockopt, sockopt};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, timeout};

/// From the connection to the whole hello.
const HELLO_TIME: Duration = Duration::from_secs(2);
/// For one line to go out. A monitor that does not take it has to connect anew.
const WRITE_TIME: Duration = Duration::from_secs(2);
/// Connections that have not said hello. One more pushes out the oldest, so that silent ones cannot keep the monitor
/// away.
const STRANGERS: usize = 16;
/// Reports waiting to be written. More than these only wait when the other side is stuck.
const WAITING_LINES: usize = 64;
/// Orders read and not yet handled; then the connection is simply not read any further.
const WAITING_INPUTS: usize = 64;
/// Sent data that nobody acknowledges for so long ends the connection: the other machine is gone.
const DEAD_AFTER: Duration = Duration::from_secs(5);

/// What the agent says of itself.
#[derive(Clone, Debug)]
pub(crate) struct Myself {
    pub(crate) host: HostName,
    pub(crate) boot: Boot,
}

/// The one connection to a monitor, if there is one.
pub(crate) struct MonitorLink {
    shared: Arc<Shared>,
    listening: AbortHandle,
}

struct Shared {
    myself: Myself,
    inputs: mpsc::Sender<Input>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    monitor: Option<Connected>,
    strangers: VecDeque<(u64, JoinHandle<()>)>,
    refusals: Quiet,
    next_id: u64,
}

struct Connected {
    id: u64,
    lines: mpsc::Sender<String>,
    task: JoinHandle<()>,
}

impl MonitorLink {
    /// Listens on `at` from now on, and tries each second again while that fails. What is heard comes out of the
    /// receiver: `MonitorUp`, `Order`, `MonitorDown`. A newer monitor replaces an older one without a `MonitorDown`.
    pub(crate) fn start(at: SocketAddr, myself: Myself) -> (MonitorLink, mpsc::Receiver<Input>) {
        let (inputs, heard) = mpsc::channel(WAITING_INPUTS);
        let shared = Arc::new(Shared { myself, inputs, state: Mutex::default() });
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

    /// Lets the last reports go out and closes, within one second.
    pub(crate) async fn close(self) {
        self.listening.abort();
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
        state.refusals.warn(peer, "too many connections without a hello; the oldest one was closed");
    }
    let task = tokio::spawn(serve(Arc::clone(shared), id, stream, peer));
    state.strangers.push_back((id, task));
}

/// One connection, from its first byte to its end.
async fn serve(shared: Arc<Shared>, id: u64, stream: TcpStream, peer: SocketAddr) {
    let mut lines = Lines { stream, decoder: LineDecoder::new(MAX_LINE) };
    let hello = match timeout(HELLO_TIME, hello(&mut lines, &shared.myself)).await {
        Ok(hello) => hello,
        Err(_) => Err(Ended::Refused(format!("no hello within {} s", HELLO_TIME.as_secs()))),
    };
    if let Err(ended) = hello {
        shared.state().forget_stranger(id);
        refuse(&shared, lines.stream, peer, ended).await;
        return;
    }
    let (sender, waiting) = mpsc::channel(WAITING_LINES);
    if !shared.state().becomes_monitor(id, sender) {
        return;
    }
    tracing::info!(%peer, "the monitor has connected");
    if shared.inputs.send(Input::MonitorUp).await.is_err() {
        return;
    }
    let Lines { stream, decoder } = lines;
    let (mut reading, mut writing) = stream.into_split();
    let ended = tokio::select! {
        ended = hear(&mut reading, decoder, &shared.inputs) => ended,
        ended = speak(&mut writing, waiting) => ended,
    };
    // Nothing to tell when this connection was replaced or closed from our side.
    let mine = shared.state().monitor.take_if(|m| m.id == id).is_some();
    let why = ended.to_string();
    if mine {
        tracing::warn!(%peer, "the connection to the monitor has ended: {why}");
        let _ = shared.inputs.send(Input::MonitorDown { why }).await;
    }
    if let Ok(stream) = reading.reunite(writing) {
        refuse(&shared, stream, peer, ended).await;
    }
}

impl State {
    fn forget_stranger(&mut self, id: u64) {
        self.strangers.retain(|(stranger, _)| *stranger != id);
    }

    /// Takes the place of an older monitor. Aborting that one's task closes its connection, and it gets no further
    /// word to the core: the runtime has one thread, so it is not in the middle of one.
    fn becomes_monitor(&mut self, id: u64, lines: mpsc::Sender<String>) -> bool {
        let Some(at) = self.strangers.iter().position(|(stranger, _)| *stranger == id) else { return false };
        let Some((_, task)) = self.strangers.remove(at) else { return false };
        if let Some(old) = self.monitor.replace(Connected { id, lines, task }) {
            tracing::info!("a newer connection of the monitor replaces the older one");
            old.task.abort();
        }
        true
    }
}

/// Why a connection is over.
#[derive(Debug)]
enum Ended {
    /// The other side broke the rules: it is told so.
    Refused(String),
    /// It closed, broke, or does not take what we send.
    Lost(String),
    /// We closed it.
    Closed,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ended::Refused(why) => write!(f, "refused: {why}"),
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

struct Lines {
    stream: TcpStream,
    decoder: LineDecoder,
}

/// The other side's hello, checked and answered.
async fn hello(lines: &mut Lines, myself: &Myself) -> Result<(), Ended> {
    // Both ends need it, or every exchange waits for a delayed acknowledgement (43 ms instead of 56 µs).
    lines.stream.set_nodelay(true)?;
    let dead_after = u32::try_from(DEAD_AFTER.as_millis()).unwrap_or(u32::MAX);
    setsockopt(&lines.stream, sockopt::TcpUserTimeout, &dead_after).map_err(io::Error::from)?;
    let line = loop {
        if let Some(line) = next_line(&mut lines.decoder)? {
            break line;
        }
        read_more(&mut lines.stream, &mut lines.decoder).await?;
    };
    check_hello(&line, myself).map_err(Ended::Refused)?;
    let answer = FromAgent::Hello {
        protocol: PROTOCOL,
        host: myself.host.clone(),
        boot: myself.boot,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let answer = wire::to_line(&answer).map_err(|e| Ended::Lost(e.to_string()))?;
    lines.stream.write_all(answer.as_bytes()).await?;
    Ok(())
}

fn check_hello(line: &str, myself: &Myself) -> Result<(), String> {
    // The number first and by itself: a hello of another version may look different in everything else.
    let number = serde_json::from_str::<serde_json::Value>(line).ok().and_then(|v| v.get("protocol")?.as_u64());
    if let Some(protocol) = number.filter(|p| *p != u64::from(PROTOCOL)) {
        return Err(format!(
            "the monitor speaks protocol {protocol}, this agent (version {}) protocol {PROTOCOL}; bring both to the \
             same version",
            env!("CARGO_PKG_VERSION")
        ));
    }
    match serde_json::from_str(line) {
        Ok(ToAgent::Hello { host, .. }) if host == myself.host => Ok(()),
        Ok(ToAgent::Hello { host, .. }) => Err(format!(
            "the monitor wants host '{host}', but this is the agent of '{}'; compare the ip of both hosts in the \
             monitor's configuration, and 'this' in mmm_agent.toml",
            myself.host
        )),
        Ok(ToAgent::Order(_)) => Err("an order came before the hello".to_owned()),
        Ok(ToAgent::PeerHello { from, .. }) => Err(format!("'{from}' cannot be vouched for here")),
        Ok(ToAgent::Vouch(_)) => Err("a request to vouch came before the hello".to_owned()),
        Err(e) => Err(format!("the first line is no hello ({e}): {}", shortened(line))),
    }
}

/// Orders, one after the other, until the connection ends.
async fn hear(
    reading: &mut (impl AsyncReadExt + Unpin),
    mut decoder: LineDecoder,
    inputs: &mpsc::Sender<Input>,
) -> Ended {
    loop {
        let line = match next_line(&mut decoder) {
            Ok(Some(line)) => line,
            Ok(None) => match read_more(reading, &mut decoder).await {
                Ok(()) => continue,
                Err(ended) => return ended,
            },
            Err(ended) => return ended,
        };
        match serde_json::from_str(&line) {
            Ok(ToAgent::Order(order)) => {
                if inputs.send(Input::Order(order)).await.is_err() {
                    return Ended::Closed;
                }
            }
            Ok(ToAgent::Hello { .. } | ToAgent::PeerHello { .. }) => {
                return Ended::Refused("a second hello on the same connection".to_owned());
            }
            Ok(ToAgent::Vouch(_)) => return Ended::Refused("a monitor asks nobody to vouch".to_owned()),
            Err(e) => return Ended::Refused(format!("a line is no order ({e}): {}", shortened(&line))),
        }
    }
}

/// Reports, one after the other, until nobody sends any more or one does not go out in time.
async fn speak(writing: &mut (impl AsyncWriteExt + Unpin), mut waiting: mpsc::Receiver<String>) -> Ended {
    while let Some(line) = waiting.recv().await {
        match timeout(WRITE_TIME, writing.write_all(line.as_bytes())).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return e.into(),
            Err(_) => {
                return Ended::Lost(format!("it did not take a report within {} s", WRITE_TIME.as_secs()));
            }
        }
    }
    let _ = timeout(WRITE_TIME, writing.shutdown()).await;
    Ended::Closed
}

fn next_line(decoder: &mut LineDecoder) -> Result<Option<String>, Ended> {
    decoder.next_line().map_err(|e| Ended::Refused(e.to_string()))
}

async fn read_more(reading: &mut (impl AsyncReadExt + Unpin), decoder: &mut LineDecoder) -> Result<(), Ended> {
    let mut bytes = [0u8; 8192];
    match reading.read(&mut bytes).await? {
        0 => Err(Ended::Lost("the other side closed it".to_owned())),
        n => {
            decoder.push(&bytes[..n]);
            Ok(())
        }
    }
}

/// Says why, if the other side broke the rules, and closes.
async fn refuse(shared: &Shared, mut stream: TcpStream, peer: SocketAddr, ended: Ended) {
    let why = match ended {
        Ended::Refused(why) => why,
        // Port scans and health checks; not worth more.
        Ended::Lost(why) => return tracing::debug!(%peer, "connection over: {why}"),
        Ended::Closed => return,
    };
    shared.state().refusals.warn(peer, &why);
    let Ok(line) = wire::to_line(&FromAgent::Refused { why }) else { return };
    let _ = timeout(Duration::from_secs(1), async {
        stream.write_all(line.as_bytes()).await?;
        stream.shutdown().await?;
        // Closing with unread bytes would send a reset, and that can overtake the line. Bounded by this second, and
        // by not keeping anything.
        let mut rest = [0u8; 8192];
        while stream.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    })
    .await;
}

fn shortened(line: &str) -> String {
    let start: String = line.chars().take(60).collect();
    if start.len() < line.len() { format!("{start:?}…") } else { format!("{start:?}") }
}

/// At most one log line a second about refused connections, with a count of those that were left out.
#[derive(Default)]
struct Quiet {
    last: Option<Instant>,
    left_out: u64,
}

impl Quiet {
    fn warn(&mut self, peer: SocketAddr, why: &str) {
        if let Some(left_out) = self.counts(Instant::now()) {
            tracing::warn!(%peer, left_out, "refused a connection on the agent's port: {why}");
        }
    }

    /// How many were left out since the last line, if now is the time for another one.
    fn counts(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.duration_since(last) < Duration::from_secs(1)) {
            self.left_out += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmm_common::epoch::Anchor;
    use mmm_common::order::{Order, ReplicationOrder};
    use mmm_common::report::ServerReport;
    use mmm_common::state::HostState;
    use std::collections::BTreeMap;
    use tokio::io::{AsyncBufReadExt, BufReader};

    const HELLO: &str = r#"{"message":"hello","protocol":2,"host":"db1"}"#;

    fn start() -> (SocketAddr, MonitorLink, mpsc::Receiver<Input>) {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (link, inputs) = MonitorLink::start(free, Myself { host: "db1".into(), boot: Boot(7) });
        (free, link, inputs)
    }

    /// The listener comes up in a task of its own.
    async fn connect(at: SocketAddr) -> BufReader<TcpStream> {
        for _ in 0..300 {
            if let Ok(stream) = TcpStream::connect(at).await {
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
            task: None,
        }
    }

    fn report(troubles: Vec<String>) -> Box<Report> {
        Box::new(Report {
            anchor: Anchor { boot: Boot(7), seq: 1 },
            addresses: BTreeMap::new(),
            server: ServerReport::unknown("test"),
            task: None,
            troubles,
            vouched: BTreeMap::new(),
            conflicts: BTreeMap::new(),
            machine_boot: "m".to_owned(),
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
            (r#"{"message":"hello","protocol":2,"host":"db2"}"#, "wants host 'db2', but this is the agent of 'db1'"),
            ("GET / HTTP/1.1", "the first line is no hello"),
            ("\u{0}\u{1}{{{{", "the first line is no hello"),
            (first_order.trim(), "an order came before the hello"),
            (&too_long, "longer than 262144 bytes"),
        ];
        for (line, why) in cases {
            let mut stream = connect(at).await;
            say(&mut stream, line).await;
            match hear_line(&mut stream).await {
                Some(FromAgent::Refused { why: said }) => assert!(said.contains(why), "{said}"),
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
            Some(FromAgent::Refused { why }) => assert_eq!(why, "no hello within 2 s"),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_newer_monitor_replaces_the_older_one() {
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

    #[tokio::test]
    async fn a_monitor_that_does_not_read_is_given_up() {
        let (at, link, mut inputs) = start();
        let _stuck = monitor(at, &mut inputs).await;
        let begin = Instant::now();
        // More than the socket buffers of both sides hold.
        for _ in 0..WAITING_LINES + 10 {
            link.send(report(vec!["x".repeat(200_000)]));
        }
        assert!(begin.elapsed() < Duration::from_secs(1), "sending never waits");
        let end = next(&mut inputs).await;
        assert!(matches!(&end, Input::MonitorDown { why } if why.contains("did not take a report")), "{end:?}");
        monitor(at, &mut inputs).await;
    }

    #[tokio::test]
    async fn an_address_that_cannot_be_had_yet_is_tried_again() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = taken.local_addr().unwrap();
        let (_link, mut inputs) = MonitorLink::start(at, Myself { host: "db1".into(), boot: Boot(7) });
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(taken);
        monitor(at, &mut inputs).await;
    }

    #[test]
    fn one_line_a_second_says_how_many_were_left_out() {
        let mut quiet = Quiet::default();
        let start = Instant::now();
        assert_eq!(quiet.counts(start), Some(0));
        assert_eq!(quiet.counts(start + Duration::from_millis(1)), None);
        assert_eq!(quiet.counts(start + Duration::from_millis(999)), None);
        assert_eq!(quiet.counts(start + Duration::from_millis(1000)), Some(2));
    }
}

//! Asking the other agents to vouch for this host's roles (safety.md, R6): one kept connection to each host that shares a
//! role with this one.
//!
//! The source is always this host's own configured address, never a role address: that is what the other side knows this
//! host by, and a role address leaves. Only the newest request is ever sent: an older one that waits is worth less. An
//! answer is passed on only when it answers what was asked on the same connection, with the same addresses and times.

use crate::lines::{self, Ended, Reading, Refusals, shortened};
use mmm_agent_core::io::Input;
use mmm_common::config::Cluster;
use mmm_common::ids::HostName;
use mmm_common::vouch::{VouchAnswer, VouchRequest};
use mmm_common::wire::{self, FromAgent, PROTOCOL, ToAgent};
use socket2::{SockRef, TcpKeepalive};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// For a connection to be there, and again for the hello to come.
const REACH_TIME: Duration = Duration::from_secs(1);

/// Whatever the heartbeat: the other side closes the connection of whom it takes for broken.
const BETWEEN_REQUESTS: Duration = Duration::from_millis(20);

/// The connections to all peers. They are tried again for ever, and end when this is dropped.
#[derive(Default)]
pub(crate) struct Peers {
    peers: BTreeMap<HostName, Asking>,
}

struct Asking {
    /// The newest request; the one before is replaced, sent or not.
    newest: watch::Sender<Option<Arc<VouchRequest>>>,
    task: AbortHandle,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Peers {
    /// Begins to connect at once. What happens comes as `PeerUp`, `PeerDown` and `Vouched`.
    pub(crate) fn start(me: &HostName, cluster: &Cluster, refusals: &Refusals, inputs: &mpsc::Sender<Input>) -> Peers {
        let shares_a_role =
            |host: &HostName| cluster.roles.values().any(|role| role.hosts.contains(me) && role.hosts.contains(host));
        let Some(from) = cluster.hosts.get(me).map(|host| host.ip) else { return Peers::default() };
        let others = cluster.hosts.iter().filter(|(name, _)| *name != me && shares_a_role(name));
        let peers = others
            .map(|(name, host)| {
                let (newest, requests) = watch::channel(None);
                let peer = Peer {
                    me: me.clone(),
                    from,
                    host: name.clone(),
                    at: SocketAddr::new(host.ip, host.agent_port),
                    ttl: cluster.lease_ttl,
                    requests,
                    inputs: inputs.clone(),
                    refusals: refusals.clone(),
                };
                let task = tokio::spawn(peer.run()).abort_handle();
                (name.clone(), Asking { newest, task })
            })
            .collect();
        Peers { peers }
    }

    /// Asks if connected, and never waits.
    pub(crate) fn ask(&self, to: &HostName, request: VouchRequest) {
        match self.peers.get(to) {
            Some(peer) => drop(peer.newest.send_replace(Some(Arc::new(request)))),
            None => tracing::debug!("'{to}' is to vouch, and shares no role with this host in the configuration here"),
        }
    }
}

/// One other agent, as its task sees it.
struct Peer {
    me: HostName,
    from: IpAddr,
    host: HostName,
    at: SocketAddr,
    ttl: Duration,
    requests: watch::Receiver<Option<Arc<VouchRequest>>>,
    inputs: mpsc::Sender<Input>,
    refusals: Refusals,
}

impl Peer {
    async fn run(mut self) {
        // Several times within a lease: a restart of the other agent must not cost this host its roles.
        let pause = (self.ttl / 6).clamp(Duration::from_millis(100), Duration::from_secs(1));
        let mut told: Option<String> = None;
        loop {
            let ended = match self.connect().await {
                Ok((reading, writing)) => {
                    // What waited was meant for earlier; the core asks anew when it hears of the connection.
                    self.requests.mark_unchanged();
                    told = None;
                    if self.inputs.send(Input::PeerUp { host: self.host.clone() }).await.is_err() {
                        return;
                    }
                    self.talk(reading, writing).await
                }
                Err(ended) => ended,
            };
            if let Ended::Refused(why) = &ended {
                self.refusals.warn(self.at, &format!("refused what the agent of {} said: {why}", self.host));
            }
            let why = ended.to_string();
            if told.as_ref() != Some(&why) {
                told = Some(why.clone());
                if self.inputs.send(Input::PeerDown { host: self.host.clone(), why }).await.is_err() {
                    return;
                }
            }
            sleep(pause).await;
        }
    }

    /// Connected means that the other side's hello has come and was right.
    async fn connect(&self) -> Result<(Reading, OwnedWriteHalf), Ended> {
        let (mut reading, mut writing) = lines::split(self.reach().await?, self.ttl)?;
        let hello = ToAgent::PeerHello { protocol: PROTOCOL, host: self.host.clone(), from: self.me.clone() };
        lines::write(&mut writing, &wire::to_line(&hello)?).await?;
        let within = || Ended::Lost(format!("it did not say hello within {} s", REACH_TIME.as_secs()));
        let line = timeout(REACH_TIME, reading.line()).await.map_err(|_| within())??;
        self.check_hello(&line)?;
        Ok((reading, writing))
    }

    async fn reach(&self) -> Result<TcpStream, Ended> {
        let socket = if self.at.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        let own = |e: io::Error| Ended::Lost(format!("this host's own address {} cannot be used: {e}", self.from));
        socket.bind(SocketAddr::new(self.from, 0)).map_err(own)?;
        let stream = match timeout(REACH_TIME, socket.connect(self.at)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(e)) => return Err(Ended::Lost(format!("connecting to {}: {e}", self.at))),
            Err(_) => {
                return Err(Ended::Lost(format!(
                    "connecting to {}: no answer within {} s",
                    self.at,
                    REACH_TIME.as_secs()
                )));
            }
        };
        // A host that asks nothing for a while still has to notice that the other machine has gone.
        let alive = TcpKeepalive::new().with_time(REACH_TIME).with_interval(REACH_TIME);
        SockRef::from(&stream).set_tcp_keepalive(&alive)?;
        Ok(stream)
    }

    fn check_hello(&self, line: &str) -> Result<(), Ended> {
        // The number first and by itself, as on the other side.
        let number = serde_json::from_str::<serde_json::Value>(line).ok().and_then(|v| v.get("protocol")?.as_u64());
        if let Some(protocol) = number.filter(|p| *p != u64::from(PROTOCOL)) {
            let mine = env!("CARGO_PKG_VERSION");
            return Err(Ended::Refused(format!(
                "it speaks protocol {protocol}, this agent (version {mine}) protocol {PROTOCOL}; bring both to the same \
                 version"
            )));
        }
        match serde_json::from_str(line) {
            Ok(FromAgent::Hello { host, .. }) if host == self.host => Ok(()),
            Ok(FromAgent::Hello { host, .. }) => Err(Ended::Refused(format!(
                "the agent at {} is that of '{host}'; compare the ip of both hosts in mmm_common.toml",
                self.at
            ))),
            Ok(FromAgent::Refused { why, .. }) => Err(Ended::Lost(format!("it refuses this agent: {why}"))),
            Ok(FromAgent::Report(_) | FromAgent::Vouch(_) | FromAgent::Examining { .. } | FromAgent::Examined(_)) => {
                Err(Ended::Refused("the first line is no hello".to_owned()))
            }
            Err(e) => Err(Ended::Refused(format!("the first line is no hello ({e}): {}", shortened(line)))),
        }
    }

    /// Requests out and answers in, until the connection ends.
    async fn talk(&mut self, mut reading: Reading, mut writing: OwnedWriteHalf) -> Ended {
        let mut asked = Asked::default();
        let mut may_send = Instant::now();
        loop {
            let patience = asked.oldest().map(|at| at + self.ttl);
            tokio::select! {
                line = reading.line() => {
                    let answer = match line.and_then(|line| self.read_answer(&line, &mut asked)) {
                        Ok(answer) => answer,
                        Err(ended) => return ended,
                    };
                    if self.inputs.send(Input::Vouched { by: self.host.clone(), answer }).await.is_err() {
                        return Ended::Closed;
                    }
                }
                changed = async {
                    sleep_until(may_send).await;
                    self.requests.changed().await
                } => {
                    if changed.is_err() {
                        return Ended::Closed;
                    }
                    let Some(request) = self.requests.borrow_and_update().clone() else { continue };
                    if let Err(ended) = send(&mut writing, &request).await {
                        return ended;
                    }
                    asked.note(request);
                    may_send = Instant::now() + BETWEEN_REQUESTS;
                }
                () = wait(patience) => {
                    return Ended::Lost(format!("no answer to a request within {} ms", self.ttl.as_millis()));
                }
            }
        }
    }

    fn read_answer(&self, line: &str, asked: &mut Asked) -> Result<VouchAnswer, Ended> {
        match serde_json::from_str(line) {
            Ok(FromAgent::Vouch(answer)) => asked.check(&answer).map(|()| answer).map_err(Ended::Refused),
            Ok(FromAgent::Refused { why, .. }) => Err(Ended::Lost(format!("it refuses this agent: {why}"))),
            Ok(FromAgent::Hello { .. }) => Err(Ended::Refused("a second hello on the same connection".to_owned())),
            Ok(FromAgent::Report(_) | FromAgent::Examining { .. } | FromAgent::Examined(_)) => {
                Err(Ended::Refused("what is for the monitor only".to_owned()))
            }
            Err(e) => Err(Ended::Refused(format!("a line is no answer ({e}): {}", shortened(line)))),
        }
    }
}

async fn send(writing: &mut OwnedWriteHalf, request: &VouchRequest) -> Result<(), Ended> {
    lines::write(writing, &wire::to_line(&ToAgent::Vouch(request.clone()))?).await
}

async fn wait(until: Option<Instant>) {
    match until {
        Some(until) => sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// What was asked on one connection and not answered yet, oldest first. Answers come in the same order.
#[derive(Default)]
struct Asked(VecDeque<(Instant, Arc<VouchRequest>)>);

impl Asked {
    fn note(&mut self, request: Arc<VouchRequest>) {
        self.0.push_back((Instant::now(), request));
    }

    fn oldest(&self) -> Option<Instant> {
        self.0.front().map(|(at, _)| *at)
    }

    /// An answer gives a lease, so it must not say more than was asked. Each request is answered once.
    fn check(&mut self, answer: &VouchAnswer) -> Result<(), String> {
        let Some(at) = self.0.iter().position(|(_, request)| request.anchor == answer.anchor) else {
            return Err(format!("an answer to request {}, which is not waited for", answer.anchor.seq));
        };
        let Some((_, request)) = self.0.drain(..=at).next_back() else { return Ok(()) };
        if answer.lease_ttl_ms != request.lease_ttl_ms {
            return Err(format!(
                "it vouches for {} ms and was asked for {} ms",
                answer.lease_ttl_ms, request.lease_ttl_ms
            ));
        }
        match answer.vouched.iter().find(|(ip, epoch)| request.addresses.get(ip) != Some(epoch)) {
            Some((ip, epoch)) => Err(format!("it vouches for {ip} at epoch {epoch} and was not asked for that")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmm_common::epoch::{Anchor, Boot, Epoch};
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::TcpListener;

    const TTL: Duration = Duration::from_secs(3);
    const OURS: &str = "127.0.0.2";
    const ROLE: &str = "10.0.0.50";

    /// This agent, db1, and the place where the other one, db2, is to listen.
    struct Fixture {
        other: TcpListener,
        newest: watch::Sender<Option<Arc<VouchRequest>>>,
        inputs: mpsc::Receiver<Input>,
        refusals: Refusals,
        task: AbortHandle,
    }

    impl Drop for Fixture {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    async fn start(ttl: Duration) -> Fixture {
        let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (newest, requests) = watch::channel(None);
        let (sender, inputs) = mpsc::channel(16);
        let refusals = Refusals::default();
        let peer = Peer {
            me: "db1".into(),
            from: OURS.parse().unwrap(),
            host: "db2".into(),
            at: other.local_addr().unwrap(),
            ttl,
            requests,
            inputs: sender,
            refusals: refusals.clone(),
        };
        let task = tokio::spawn(peer.run()).abort_handle();
        Fixture { other, newest, inputs, refusals, task }
    }

    impl Fixture {
        async fn accept(&mut self) -> BufReader<TcpStream> {
            let (stream, from) = soon(self.other.accept()).await.unwrap();
            assert_eq!(from.ip().to_string(), OURS, "never by another address");
            let mut stream = BufReader::new(stream);
            let hello = ToAgent::PeerHello { protocol: PROTOCOL, host: "db2".into(), from: "db1".into() };
            assert_eq!(heard(&mut stream).await, hello);
            stream
        }

        async fn connected(&mut self) -> BufReader<TcpStream> {
            let mut stream = self.accept().await;
            say(&mut stream, &hello("db2", PROTOCOL)).await;
            assert_eq!(self.next().await, Input::PeerUp { host: "db2".into() });
            stream
        }

        async fn next(&mut self) -> Input {
            soon(self.inputs.recv()).await.unwrap()
        }

        async fn is_down(&mut self, why: &str) {
            let input = self.next().await;
            let Input::PeerDown { why: said, .. } = &input else { panic!("{why}: {input:?}") };
            assert!(said.contains(why), "'{why}' is not in: {said}");
        }

        fn ask(&self, seq: u64) {
            self.newest.send_replace(Some(Arc::new(request(seq))));
        }
    }

    async fn soon<T>(work: impl Future<Output = T>) -> T {
        timeout(Duration::from_secs(10), work).await.expect("not within 10 s")
    }

    async fn heard(stream: &mut BufReader<TcpStream>) -> ToAgent {
        let mut line = String::new();
        soon(stream.read_line(&mut line)).await.unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
    }

    async fn say(stream: &mut BufReader<TcpStream>, line: &str) {
        stream.get_mut().write_all(line.as_bytes()).await.unwrap();
    }

    fn line(message: &FromAgent) -> String {
        wire::to_line(message).unwrap()
    }

    fn hello(host: &str, protocol: u32) -> String {
        line(&FromAgent::Hello { protocol, host: host.into(), boot: Boot(1), version: "1".to_owned() })
    }

    fn request(seq: u64) -> VouchRequest {
        let addresses = BTreeMap::from([(ROLE.parse().unwrap(), Epoch(5))]);
        VouchRequest { anchor: Anchor { boot: Boot(9), seq }, lease_ttl_ms: 3000, guarded: false, addresses }
    }

    fn answer(seq: u64) -> VouchAnswer {
        let VouchRequest { anchor, lease_ttl_ms, guarded: _, addresses } = request(seq);
        VouchAnswer { anchor, lease_ttl_ms, vouched: addresses, refused: BTreeMap::new() }
    }

    #[tokio::test]
    async fn the_newest_request_is_asked_and_its_answer_comes_in() {
        let mut f = start(TTL).await;
        f.ask(1);
        let mut db2 = f.connected().await;
        f.ask(2);
        f.ask(3);
        assert_eq!(heard(&mut db2).await, ToAgent::Vouch(request(3)), "the older ones were overtaken");
        say(&mut db2, &line(&FromAgent::Vouch(answer(3)))).await;
        assert_eq!(f.next().await, Input::Vouched { by: "db2".into(), answer: answer(3) });
        assert_eq!(f.refusals.total(), 0);
    }

    #[tokio::test]
    async fn a_restart_of_the_other_agent_costs_a_fraction_of_the_lease() {
        let mut f = start(TTL).await;
        let mut db2 = f.connected().await;
        f.ask(1);
        assert_eq!(heard(&mut db2).await, ToAgent::Vouch(request(1)));
        let gone = Instant::now();
        drop(db2);
        f.is_down("closed it").await;
        let mut db2 = f.connected().await;
        assert!(gone.elapsed() < TTL / 2, "{:?}", gone.elapsed());
        f.ask(2);
        assert_eq!(heard(&mut db2).await, ToAgent::Vouch(request(2)));
        say(&mut db2, &line(&FromAgent::Vouch(answer(2)))).await;
        assert_eq!(f.next().await, Input::Vouched { by: "db2".into(), answer: answer(2) });
    }

    #[tokio::test]
    async fn what_does_not_answer_the_request_ends_the_connection_and_is_counted() {
        let mut f = start(Duration::from_millis(600)).await;
        let vouch = |change: fn(&mut VouchAnswer)| {
            let mut answer = answer(7);
            change(&mut answer);
            line(&FromAgent::Vouch(answer))
        };
        let cases = [
            (vouch(|a| a.lease_ttl_ms = 60_000), "vouches for 60000 ms and was asked for 3000 ms"),
            (
                vouch(|a| a.vouched = BTreeMap::from([(ROLE.parse().unwrap(), Epoch(6))])),
                "at epoch 6 and was not asked",
            ),
            (vouch(|a| a.vouched.extend([("10.0.0.51".parse::<IpAddr>().unwrap(), Epoch(5))])), "10.0.0.51 at epoch 5"),
            (vouch(|a| a.anchor.seq = 6), "request 6, which is not waited for"),
            (vouch(|a| a.anchor.boot = Boot(8)), "which is not waited for"),
            (hello("db2", PROTOCOL), "a second hello"),
            ("}{\n".to_owned(), "a line is no answer"),
            (format!("{}\n", "x".repeat(wire::MAX_LINE + 1)), "longer than"),
        ];
        for (count, (line, why)) in cases.iter().enumerate() {
            let mut db2 = f.connected().await;
            f.ask(7);
            heard(&mut db2).await;
            say(&mut db2, line).await;
            f.is_down(why).await;
            assert_eq!(f.refusals.total(), count as u64 + 1, "{why}");
        }
        // Doubled: the first one counts, the second one is not waited for.
        let mut db2 = f.connected().await;
        f.ask(7);
        heard(&mut db2).await;
        let twice = line(&FromAgent::Vouch(answer(7))).repeat(2);
        say(&mut db2, &twice).await;
        assert_eq!(f.next().await, Input::Vouched { by: "db2".into(), answer: answer(7) });
        f.is_down("which is not waited for").await;

        let mut db2 = f.connected().await;
        f.ask(7);
        heard(&mut db2).await;
        let half = line(&FromAgent::Vouch(answer(7)));
        say(&mut db2, &half[..half.len() / 2]).await;
        drop(db2);
        f.is_down("in the middle of a line").await;
    }

    #[tokio::test]
    async fn who_does_not_answer_is_connected_to_anew() {
        let mut f = start(Duration::from_millis(600)).await;
        let mut db2 = f.connected().await;
        f.ask(1);
        assert_eq!(heard(&mut db2).await, ToAgent::Vouch(request(1)));
        f.is_down("no answer to a request within 600 ms").await;
        f.connected().await;
    }

    #[tokio::test]
    async fn the_same_reason_is_told_once_and_a_wrong_hello_connects_nobody() {
        let mut f = start(Duration::from_millis(600)).await;
        for _ in 0..3 {
            let mut other = f.accept().await;
            say(&mut other, &hello("db3", PROTOCOL)).await;
        }
        f.is_down("is that of 'db3'").await;
        let mut other = f.accept().await;
        say(&mut other, &hello("db2", PROTOCOL + 1)).await;
        f.is_down(&format!("speaks protocol {}", PROTOCOL + 1)).await;
        let mut other = f.accept().await;
        say(&mut other, &line(&FromAgent::Refused { why: "no room".to_owned(), passes: false })).await;
        f.is_down("it refuses this agent: no room").await;
        assert_eq!(f.refusals.total(), 4);
        let _silent = f.accept().await;
        f.is_down("did not say hello").await;
        f.connected().await;
    }

    #[tokio::test]
    async fn those_who_share_a_role_with_this_host_are_asked() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let hosts = ["db1", "db2", "db3", "db4"].iter().enumerate().map(|(number, name)| {
            let peer = ["db2", "db1"]
                .get(number)
                .map_or("mode = 'slave'".to_owned(), |p| format!("mode = 'master'\npeer = '{p}'"));
            format!("[host.{name}]\nip = '127.0.7.{number}'\n{peer}\n")
        });
        let text = format!(
            "this = 'db1'\ninsecure_plaintext = true\n[agent]\nstate_path = '/nowhere/state'\n[host.default]\n\
             cluster_interface = 'eth0'\nagent_user = 'a'\nagent_password = 'a'\nreplication_user = 'r'\n\
             replication_password = 'r'\n{}[role.writer]\nmode = 'exclusive'\nhosts = ['db1', 'db2']\n\
             ips = ['10.0.0.50']\n[role.reader]\nmode = 'balanced'\nhosts = ['db1', 'db3']\nips = ['10.0.0.51']\n\
             [role.reports]\nmode = 'balanced'\nhosts = ['db2', 'db4']\nips = ['10.0.0.52']\n",
            hosts.collect::<String>()
        );
        let path = dir.path().join("mmm_agent.toml");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let config = mmm_common::config::parse::agent(&path).unwrap();

        let (inputs, _heard) = mpsc::channel(16);
        let peers = Peers::start(&config.this, &config.cluster, &Refusals::default(), &inputs);
        let asked: Vec<&str> = peers.peers.keys().map(HostName::as_str).collect();
        assert_eq!(asked, ["db2", "db3"], "not this host, and not db4");
    }

    #[tokio::test]
    async fn an_address_that_is_not_ours_is_no_source() {
        let mut f = start(TTL).await;
        f.task.abort();
        let (_newest, requests) = watch::channel(None);
        let (inputs, heard) = mpsc::channel(16);
        f.inputs = heard;
        let peer = Peer {
            me: "db1".into(),
            // TEST-NET-1, RFC 5737.
            from: "192.0.2.1".parse().unwrap(),
            host: "db2".into(),
            at: f.other.local_addr().unwrap(),
            ttl: TTL,
            requests,
            inputs,
            refusals: f.refusals.clone(),
        };
        f.task = tokio::spawn(peer.run()).abort_handle();
        f.is_down("this host's own address 192.0.2.1 cannot be used").await;
    }
}

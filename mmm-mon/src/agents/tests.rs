//! The link against scripted agents on loopback.

use super::*;
use crate::feed::{Event, Inbox, feed};
use mmm_common::epoch::{Anchor, Epoch};
use mmm_common::order::{AddressOrder, ReplicationOrder};
use mmm_common::report::{Report, ServerReport};
use mmm_common::state::HostState;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;

/// A link to a listener that the test plays the agent behind.
struct Scene {
    agent: TcpListener,
    newest: watch::Sender<Option<Arc<Order>>>,
    inbox: Inbox,
    _worker: Worker,
}

async fn scene() -> Scene {
    scene_with_silence(Duration::from_secs(10)).await
}

async fn scene_with_silence(silence: Duration) -> Scene {
    let agent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let spec = Spec { host: "db1".into(), agent: agent.local_addr().unwrap(), silence };
    let (feed, inbox) = feed();
    let (newest, orders) = watch::channel(None);
    let link = Link { spec, identity: u64::MAX, orders, up: Arc::default() };
    Scene { agent, newest, inbox, _worker: feed.worker(|feed| link.keep(feed)) }
}

impl Scene {
    async fn accept(&self) -> Lines<TcpStream> {
        let (stream, _) = timeout(Duration::from_secs(6), self.agent.accept()).await.expect("the link comes").unwrap();
        Lines::new(stream, MAX_LINE)
    }

    /// A connection that has got as far as the agent's hello.
    async fn greet(&mut self) -> Lines<TcpStream> {
        let mut link = self.accept().await;
        let ours = format!(r#"{{"message":"hello","protocol":{PROTOCOL},"host":"db1","monitor":{}}}"#, u64::MAX);
        assert_eq!(link.next().await.unwrap(), ours);
        say(&mut link, &hello(PROTOCOL, "db1")).await;
        let up = self.input().await;
        assert_eq!(up, Input::AgentUp { host: "db1".into(), boot: Boot(7), version: "0.1.0".into() });
        link
    }

    async fn input(&mut self) -> Input {
        let event = timeout(Duration::from_secs(5), self.inbox.next()).await.expect("an input comes");
        let Some(Event::Core(input)) = event else { panic!("{event:?}") };
        input
    }

    async fn down(&mut self) -> String {
        let input = self.input().await;
        let Input::AgentDown { host, why } = input else { panic!("{input:?}") };
        assert_eq!(host, "db1".into());
        why
    }

    fn send(&self, number: u64) {
        self.newest.send_replace(Some(Arc::new(order(number, 1))));
    }
}

async fn say(link: &mut Lines<TcpStream>, message: &str) {
    link.get_mut().write_all(format!("{message}\n").as_bytes()).await.unwrap();
}

fn hello(protocol: u32, host: &str) -> String {
    format!(r#"{{"message":"hello","protocol":{protocol},"host":"{host}","boot":7,"version":"0.1.0"}}"#)
}

fn report(seq: u64) -> Report {
    Report {
        anchor: Anchor { boot: Boot(7), seq },
        addresses: BTreeMap::new(),
        server: ServerReport::unknown("not looked"),
        task: None,
        job: None,
        troubles: vec![],
        vouched: Default::default(),
        conflicts: Default::default(),
        machine_boot: "m".into(),
        guarded: false,
        leaving: false,
    }
}

fn report_line(seq: u64) -> String {
    to_line(&FromAgent::Report(Box::new(report(seq)))).unwrap().trim_end().to_owned()
}

/// An order that says something about so many addresses.
fn order(seq: u64, addresses: u32) -> Order {
    Order {
        answers: Anchor { boot: Boot(7), seq },
        lease_ttl_ms: 3000,
        state: HostState::Online,
        addresses: (0..addresses)
            .map(|n| (std::net::Ipv4Addr::from(n).into(), AddressOrder::LetGo { epoch: Epoch(1) }))
            .collect(),
        replication: ReplicationOrder::Keep,
        wait_for_replica: true,
        task: None,
        job: None,
    }
}

async fn next_order(link: &mut Lines<TcpStream>) -> u64 {
    let line = timeout(Duration::from_secs(5), link.next()).await.expect("an order comes").unwrap();
    let ToAgent::Order(order) = serde_json::from_str(&line).unwrap() else { panic!("{line}") };
    order.answers.seq
}

#[tokio::test]
async fn reports_come_in_and_orders_go_out() {
    let mut s = scene().await;
    let mut link = s.greet().await;
    say(&mut link, &report_line(1)).await;
    assert_eq!(s.input().await, Input::Report { host: "db1".into(), report: Box::new(report(1)) });
    s.send(1);
    assert_eq!(next_order(&mut link).await, 1);
    s.send(2);
    assert_eq!(next_order(&mut link).await, 2);
    drop(link);
    assert!(s.down().await.contains("closed the connection"));
    s.greet().await;
}

// lessons.md 7
#[tokio::test]
async fn an_order_from_before_the_connection_is_not_sent_on_it() {
    let mut s = scene().await;
    s.send(1);
    let mut link = s.greet().await;
    s.send(2);
    assert_eq!(next_order(&mut link).await, 2);
    drop(link);
    s.down().await;
    s.send(3);
    let mut link = s.greet().await;
    s.send(4);
    assert_eq!(next_order(&mut link).await, 4);
}

// lessons.md 11
#[tokio::test]
async fn a_slow_reader_gets_the_newest_order_and_sending_never_waits() {
    let mut s = scene().await;
    let mut link = s.greet().await;
    // More than both sockets' buffers hold.
    for seq in 1..=40 {
        s.newest.send_replace(Some(Arc::new(order(seq, 3000))));
        sleep(Duration::from_millis(5)).await;
    }
    let mut got = vec![];
    while got.last() != Some(&40) {
        got.push(next_order(&mut link).await);
    }
    assert!(got.len() < 40, "some were replaced before they were sent: {got:?}");
    assert!(got.is_sorted(), "{got:?}");
}

// lessons.md 11
#[tokio::test]
async fn an_agent_that_reads_nothing_is_closed() {
    let mut s = scene().await;
    let mut link = s.greet().await;
    let began = Instant::now();
    let why = loop {
        // It still reports, so it is not silent.
        say(&mut link, &report_line(1)).await;
        s.newest.send_replace(Some(Arc::new(order(1, 3000))));
        let input = s.input().await;
        if let Input::AgentDown { why, .. } = input {
            break why;
        }
        assert!(matches!(input, Input::Report { .. }), "{input:?}");
        assert!(began.elapsed() < Duration::from_secs(6));
        sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(why, "the agent did not take an order within 2s");
}

#[tokio::test]
async fn another_version_is_named_once_and_not_tried_again_at_once() {
    let mut s = scene().await;
    let mut link = s.accept().await;
    say(&mut link, r#"{"message":"hello","protocol":9,"name":"something new"}"#).await;
    let why = s.down().await;
    assert!(why.contains(&format!("speaks protocol 9, this monitor {PROTOCOL}: install the same version")), "{why}");
    assert!(timeout(Duration::from_secs(2), s.agent.accept()).await.is_err(), "it waits");
    let mut link = s.accept().await;
    say(&mut link, &hello(9, "db1")).await;
    drop(link);
    assert!(timeout(Duration::from_millis(300), s.inbox.next()).await.is_err(), "said once");
}

#[tokio::test]
async fn another_host_is_refused_with_what_to_compare() {
    let mut s = scene().await;
    let mut link = s.accept().await;
    say(&mut link, &hello(PROTOCOL, "db2")).await;
    let why = s.down().await;
    assert!(why.contains("says it is 'db2', not 'db1'") && why.contains("mmm_agent.toml"), "{why}");
}

#[tokio::test]
async fn an_agent_of_another_monitor_is_told_once_and_tried_again_each_second() {
    let mut s = scene().await;
    for since in 0..3 {
        let began = Instant::now();
        let mut link = s.accept().await;
        if since > 0 {
            let waited = began.elapsed();
            assert!((Duration::from_millis(700)..Duration::from_secs(2)).contains(&waited), "{waited:?}");
        }
        let why = format!("another monitor (at 10.0.0.9) commands this host, for {since} s now");
        say(&mut link, to_line(&FromAgent::Refused { why, passes: true }).unwrap().trim_end()).await;
        if since == 0 {
            let why = s.down().await;
            assert!(why.contains("refuses this monitor: another monitor (at 10.0.0.9) commands this host"), "{why}");
        }
    }
    // Said once, and nothing more before it is let in.
    s.greet().await;
}

#[tokio::test]
async fn what_is_no_agent_is_closed() {
    for (sent, word) in [
        ("SSH-2.0-OpenSSH_9.2", "is no mmm_agentd"),
        (r#"{"message":"report"}"#, "is no mmm_agentd"),
        (r#"{"message":"refused","why":"I am busy"}"#, "refuses this monitor: I am busy"),
    ] {
        let mut s = scene().await;
        let mut link = s.accept().await;
        say(&mut link, sent).await;
        let why = s.down().await;
        assert!(why.contains(word), "{why}");
    }
}

#[tokio::test]
async fn after_the_hello_nonsense_closes_too() {
    for (sent, word) in [
        ("{}", "no message"),
        (hello(PROTOCOL, "db1").as_str(), "second hello"),
        (r#"{"message":"refused","why":"a newer monitor"}"#, "a newer monitor"),
    ] {
        let mut s = scene().await;
        let mut link = s.greet().await;
        say(&mut link, sent).await;
        let why = s.down().await;
        assert!(why.contains(word), "{why}");
    }
}

#[tokio::test]
async fn a_line_without_an_end_closes() {
    let mut s = scene().await;
    let mut link = s.greet().await;
    // The link may close before everything is written.
    let _ = link.get_mut().write_all(&vec![b'x'; 2 * MAX_LINE]).await;
    let why = s.down().await;
    assert!(why.contains("line longer than"), "{why}");
}

// lessons.md 11
#[tokio::test]
async fn who_says_nothing_is_closed_before_and_after_the_hello() {
    let mut s = scene_with_silence(Duration::from_millis(300)).await;
    let began = Instant::now();
    let silent = s.accept().await;
    assert!(s.down().await.contains("no hello within 2s"));
    assert!(began.elapsed() >= HELLO);
    drop(silent);

    let mut link = s.greet().await;
    say(&mut link, &report_line(1)).await;
    s.input().await;
    let began = Instant::now();
    // Bytes that make no report are silence.
    link.get_mut().write_all(b"{").await.unwrap();
    assert_eq!(s.down().await, "no report for 300ms");
    assert!((Duration::from_millis(250)..Duration::from_secs(1)).contains(&began.elapsed()), "{:?}", began.elapsed());
    let mut rest = Vec::new();
    link.get_mut().read_to_end(&mut rest).await.unwrap_or_default();
}

#[tokio::test]
async fn a_refused_connection_is_tried_again_without_haste_and_told_once() {
    let mut s = scene().await;
    let at = s.agent.local_addr().unwrap();
    s.agent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let why = s.down().await;
    assert!(why.contains("connecting to the agent at") && why.contains("refused"), "{why}");
    assert!(timeout(Duration::from_millis(1500), s.inbox.next()).await.is_err(), "told once");
    s.agent = TcpListener::bind(at).await.unwrap();
    s.greet().await;
}

#[tokio::test]
async fn a_changed_address_makes_a_new_link_and_an_unchanged_one_stays() {
    let agent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (feed, mut inbox) = feed();
    let mut agents = Agents::new(feed, 1);
    let mut config = crate::checks::tests::config("127.0.0.1");
    let host = config.cluster.hosts.get_mut(&"db1".into()).unwrap();
    host.agent_port = agent.local_addr().unwrap().port();
    assert_eq!(agents.arrange(&config), vec![]);
    let mut link = Lines::new(agent.accept().await.unwrap().0, MAX_LINE);
    link.next().await.unwrap();
    say(&mut link, &hello(PROTOCOL, "db1")).await;
    assert!(matches!(inbox.next().await, Some(Event::Core(Input::AgentUp { .. }))));

    assert_eq!(agents.arrange(&config), vec![], "nothing has changed");
    agents.send(&"db1".into(), order(5, 1));
    assert_eq!(next_order(&mut link).await, 5);

    config.cluster.hosts.get_mut(&"db1".into()).unwrap().ip = "127.0.0.2".parse().unwrap();
    let downs = agents.arrange(&config);
    assert!(matches!(downs.as_slice(), [Input::AgentDown { .. }]), "{downs:?}");
    assert!(link.next().await.is_err(), "the old link is closed");
}

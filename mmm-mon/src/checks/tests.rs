//! The checkers against scripted peers on loopback: whatever a server does, each result comes in time.

mod real;
mod server;

use super::*;
use crate::feed::{Event, Inbox, feed};
use mmm_common::config::{Cluster, Secret};
use mmm_common::state::HostMode;
use std::collections::BTreeMap;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// One host, db1, and nothing to ping.
pub(crate) fn config(ip: &str) -> Config {
    let check = Check {
        check_period: Duration::from_millis(300),
        trap_period: Duration::from_secs(3),
        timeout: Duration::from_millis(200),
        restart_after: 10_000,
        max_backlog: Duration::from_secs(60),
    };
    let host = Host {
        agent_port: 1,
        mysql_port: 1,
        monitor_user: "mmm_monitor".into(),
        monitor_password: Secret("TopSecret".into()),
        ..Host::of(ip.parse().unwrap(), HostMode::Slave, None)
    };
    Config {
        ping_interval: Duration::from_millis(100),
        checks: CheckKind::ALL.iter().map(|kind| (*kind, check.clone())).collect(),
        ..Config::of(Cluster::of([("db1".into(), host)].into(), BTreeMap::new()))
    }
}

async fn check_input(inbox: &mut Inbox, wanted: CheckKind) -> CheckResult {
    loop {
        match tokio::time::timeout(Duration::from_secs(5), inbox.next()).await.expect("a result comes") {
            Some(Event::Core(Input::Check { host, check, result })) if check == wanted => {
                assert_eq!(host, "db1".into());
                assert!(!result.to_string().contains("TopSecret"), "{result}");
                return result;
            }
            Some(Event::Core(Input::Check { .. } | Input::Network { .. })) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Runs the mysql check and rep_threads against a server that does `serve` with every connection.
async fn against<F>(serve: fn(TcpStream) -> F) -> (String, String)
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    let results = results_of(port).await;
    server.abort();
    results
}

async fn results_of(mysql_port: u16) -> (String, String) {
    let host = Host { mysql_port, ..config("127.0.0.1").cluster.hosts[&HostName::from("db1")].clone() };
    let limit = Duration::from_millis(200);
    let mut mysql = MysqlCheck::new(&host);
    let mut threads = ReplicationCheck::new(&host, Question::Threads);
    let first = mysql.check(Instant::now() + limit, limit).await.to_string();
    let second = mysql.check(Instant::now() + limit, limit).await.to_string();
    assert_eq!(first, second, "and the same again");
    let third = threads.check(Instant::now() + limit, limit).await.to_string();
    let port = mysql_port.to_string();
    (first.replace(&port, "PORT"), third.replace(&port, "PORT"))
}

/// MySQL's error packet, as it comes instead of a greeting.
fn error_packet(code: u16, text: &str) -> Vec<u8> {
    let mut body = vec![0xff];
    body.extend(code.to_le_bytes());
    body.extend(text.as_bytes());
    packet(0, &body)
}

fn packet(number: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap().to_le_bytes();
    [&length[..3], &[number], body].concat()
}

/// A greeting of protocol 10 that offers mysql_native_password.
fn greeting() -> Vec<u8> {
    let mut body = vec![10];
    body.extend(b"5.5.5-10.11.6-MariaDB\0");
    body.extend(1u32.to_le_bytes());
    body.extend(b"abcdefgh\0");
    let capabilities: u32 = 0x0000_0200 | 0x0000_8000 | 0x0008_0000 | 0x1;
    body.extend(&capabilities.to_le_bytes()[..2]);
    body.push(33);
    body.extend(2u16.to_le_bytes());
    body.extend(&capabilities.to_le_bytes()[2..]);
    body.push(21);
    body.extend([0; 10]);
    body.extend(b"ijklmnopqrst\0");
    body.extend(b"mysql_native_password\0");
    packet(0, &body)
}

async fn read_packet(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await.ok()?;
    let mut body = vec![0; usize::from(head[0]) + 256 * usize::from(head[1])];
    stream.read_exact(&mut body).await.ok()?;
    Some(body)
}

/// Greets, and lets the client in.
async fn log_in(stream: &mut TcpStream) {
    stream.write_all(&greeting()).await.unwrap();
    read_packet(stream).await.unwrap();
    stream.write_all(&packet(2, &[0, 0, 0, 2, 0, 0, 0])).await.unwrap();
}

/// Reads until the other side is gone.
async fn listen_only(mut stream: TcpStream) {
    let mut rest = vec![];
    let _ = stream.read_to_end(&mut rest).await;
}

#[tokio::test]
async fn a_server_that_accepts_and_says_nothing() {
    let (mysql, threads) = against(listen_only).await;
    assert_eq!(mysql, "ERROR: mysql: no answer to a new connection from 127.0.0.1:PORT within 200ms");
    assert_eq!(threads, "UNKNOWN: rep_threads: no answer to a new connection from 127.0.0.1:PORT within 200ms");
}

#[tokio::test]
async fn a_server_that_lets_in_and_then_says_nothing() {
    let (mysql, threads) = against(|mut stream| async move {
        log_in(&mut stream).await;
        listen_only(stream).await;
    })
    .await;
    assert_eq!(mysql, "ERROR: mysql: no answer to a query from 127.0.0.1:PORT within 200ms");
    assert_eq!(threads, "UNKNOWN: rep_threads: no answer to a query from 127.0.0.1:PORT within 200ms");
}

#[tokio::test]
async fn no_server() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let (mysql, threads) = results_of(port).await;
    assert_eq!(mysql, "ERROR: mysql: 127.0.0.1:PORT refuses connections: no server runs there");
    assert_eq!(threads, "UNKNOWN: rep_threads: 127.0.0.1:PORT refuses connections: no server runs there");
}

#[tokio::test]
async fn something_else_listens() {
    let (mysql, _) = against(|mut stream| async move {
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\nTopSecret").await.unwrap();
        listen_only(stream).await;
    })
    .await;
    assert_eq!(mysql, "ERROR: mysql: what answers at 127.0.0.1:PORT does not speak MySQL's protocol");
}

#[tokio::test]
async fn a_server_that_hangs_up() {
    let (mysql, _) = against(|stream| async move { drop(stream) }).await;
    assert_eq!(mysql, "ERROR: mysql: 127.0.0.1:PORT closed the connection");
}

// lessons.md 15
#[tokio::test]
async fn too_many_connections_is_unknown_and_says_what_to_do() {
    let (mysql, threads) = against(|mut stream| async move {
        stream.write_all(&error_packet(1040, "Too many connections")).await.unwrap();
        listen_only(stream).await;
    })
    .await;
    assert_eq!(
        mysql,
        "UNKNOWN: mysql: too many connections: the server at 127.0.0.1:PORT answers, but lets 'mmm_monitor' not in \
         (1040: Too many connections). Raise max_connections or end connections"
    );
    assert!(threads.starts_with("UNKNOWN: rep_threads: too many connections"), "{threads}");
}

#[tokio::test]
async fn access_denied_is_unknown_and_names_the_user() {
    let (mysql, _) = against(|mut stream| async move {
        stream.write_all(&greeting()).await.unwrap();
        read_packet(&mut stream).await.unwrap();
        let text = "#28000Access denied for user 'mmm_monitor'@'m' (using password: YES)";
        let mut error = error_packet(1045, text);
        error[3] = 2;
        stream.write_all(&error).await.unwrap();
        listen_only(stream).await;
    })
    .await;
    assert!(mysql.starts_with("UNKNOWN: mysql: access denied") && mysql.contains("monitor_password"), "{mysql}");
}

#[tokio::test]
async fn a_shutdown_is_an_error() {
    let (mysql, _) = against(|mut stream| async move {
        stream.write_all(&error_packet(1053, "Server shutdown in progress")).await.unwrap();
    })
    .await;
    assert!(mysql.starts_with("ERROR: mysql: the server at 127.0.0.1:PORT is shutting down"), "{mysql}");
}

// lessons.md 11
#[tokio::test]
async fn a_check_that_times_out_delays_neither_the_next_nor_another() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = config("127.0.0.1");
    config.cluster.hosts.get_mut(&"db1".into()).unwrap().mysql_port = listener.local_addr().unwrap().port();
    let (feed, mut inbox) = feed();
    let mut checkers = Checkers::new(feed);
    checkers.prepare(&config).unwrap();
    let began = Instant::now();
    checkers.arrange(&config);
    let mut mysql = vec![];
    let mut pings = 0;
    while mysql.len() < 4 {
        match inbox.next().await {
            Some(Event::Core(Input::Check { check: CheckKind::Mysql, result, .. })) => {
                assert!(matches!(result, CheckResult::Error(_)), "{result}");
                mysql.push(began.elapsed());
            }
            Some(Event::Core(Input::Check { check: CheckKind::Ping, result, .. })) => {
                assert_eq!(result, CheckResult::Ok(String::new()));
                pings += 1;
            }
            Some(Event::Core(Input::Check { .. } | Input::Network { .. })) => {}
            other => panic!("{other:?}"),
        }
    }
    // Started at 0, 300, 600, 900 ms, each ended by its timeout 200 ms later.
    for (n, at) in (0..).zip(&mysql) {
        let due = Duration::from_millis(200 + 300 * n);
        assert!((due..due + Duration::from_millis(150)).contains(at), "check {n}: {at:?}");
    }
    assert!((4..=5).contains(&pings), "{pings}");
}

#[tokio::test]
async fn a_reload_restarts_only_what_has_changed() {
    let (feed, mut inbox) = feed();
    let mut checkers = Checkers::new(feed);
    let mut config = config("127.0.0.1");
    for check in config.checks.values_mut() {
        check.check_period = Duration::from_secs(3600);
    }
    checkers.arrange(&config);
    assert_eq!(check_input(&mut inbox, CheckKind::Ping).await, CheckResult::Ok(String::new()));
    checkers.arrange(&config);
    config.checks.get_mut(&CheckKind::Mysql).unwrap().timeout = Duration::from_millis(201);
    checkers.arrange(&config);
    check_input(&mut inbox, CheckKind::Mysql).await;
    config.cluster.hosts.clear();
    checkers.arrange(&config);
    assert!(checkers.running.is_empty());
    let later = tokio::time::timeout(Duration::from_millis(300), check_input(&mut inbox, CheckKind::Ping)).await;
    assert!(later.is_err(), "the ping check was neither started again nor left over: {later:?}");
}

/// Runs one of the ignored tests again, inside a new network namespace with a loopback; it vanishes with the process.
pub(crate) fn in_namespace(test: &str, setup: &str) {
    let me = std::env::current_exe().unwrap();
    let out = std::process::Command::new("unshare")
        .args(["-n", "sh", "-ec"])
        .arg(format!("ip link set lo up\n{setup}\ntimeout 20 \"$0\" --exact {test} --ignored --nocapture"))
        .arg(me)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && text.contains("1 passed"), "{text}");
}

#[test]
fn the_network_is_there_when_any_one_answers() {
    in_namespace("checks::tests::inside_the_network", "");
}

#[tokio::test]
#[ignore = "run by the_network_is_there_when_any_one_answers"]
async fn inside_the_network() {
    for (ips, expected) in [
        (vec![], true),
        (vec!["127.0.0.1"], true),
        (vec!["192.0.2.1", "127.0.0.1"], true),
        (vec!["192.0.2.1", "192.0.2.2"], false),
    ] {
        let (feed, mut inbox) = feed();
        let ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        let check = NetworkCheck { ips, every: Duration::from_millis(100) };
        let _worker = feed.worker(|feed| check.run(Arc::new(Pings::new()), feed));
        for _ in 0..2 {
            let event = tokio::time::timeout(Duration::from_secs(1), inbox.next()).await.unwrap();
            let Some(Event::Core(Input::Network { reachable })) = event else { panic!("{event:?}") };
            assert_eq!(reachable, expected);
        }
    }
}

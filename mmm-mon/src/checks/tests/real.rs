//! The MySQL checks against real servers, one story for each dialect.

use super::server::{Dialect, Server};
use super::*;
use crate::checks::session::Session;
use mysql_async::prelude::Queryable as _;
use mysql_async::{Conn, OptsBuilder};
use nix::sys::signal::Signal;
use std::fmt::Display;

const LIMIT: Duration = Duration::from_secs(1);

struct Checks {
    mysql: MysqlCheck,
    threads: ReplicationCheck,
    backlog: ReplicationCheck,
}

impl Checks {
    fn of(server: &Server, user: &str, password: &str) -> Self {
        let host = host(server, user, password);
        Checks {
            mysql: MysqlCheck::new(&host),
            threads: ReplicationCheck::new(&host, Question::Threads),
            backlog: ReplicationCheck::new(&host, Question::Backlog { max: Duration::from_secs(60) }),
        }
    }

    async fn mysql(&mut self) -> String {
        self.mysql.check(Instant::now() + LIMIT, LIMIT).await.to_string()
    }

    async fn threads(&mut self) -> String {
        self.threads.check(Instant::now() + LIMIT, LIMIT).await.to_string()
    }

    async fn backlog(&mut self) -> String {
        self.backlog.check(Instant::now() + LIMIT, LIMIT).await.to_string()
    }

    async fn threads_until(&mut self, wanted: impl Fn(&str) -> bool) -> String {
        let began = Instant::now();
        loop {
            let found = self.threads().await;
            if wanted(&found) {
                return found;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{found}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn host(server: &Server, user: &str, password: &str) -> Host {
    Host {
        mysql_port: server.port,
        monitor_user: user.into(),
        monitor_password: Secret(password.into()),
        ..config("127.0.0.1").cluster.hosts[&HostName::from("db1")].clone()
    }
}

fn assert_has(text: &str, parts: &[&dyn Display]) {
    for part in parts {
        assert!(text.contains(&part.to_string()), "'{part}' is not in: {text}");
    }
}

#[tokio::test]
async fn mariadb() {
    story("mariadb-10.11").await;
}

#[tokio::test]
async fn mysql() {
    story("mysql-9.7").await;
}

async fn story(kind: &str) {
    let (Some(source), Some(mut replica)) = (Server::start(kind, 1).await, Server::start(kind, 2).await) else {
        return;
    };
    let mut checks = Checks::of(&replica, "mmm_monitor", "RepMonitor");
    replication(&source, &replica, &mut checks).await;
    connections(&replica, &mut checks).await;
    hanging(&replica).await;
    accounts(&replica).await;
    stopped_and_gone(&mut replica, &mut checks).await;
}

async fn replication(source: &Server, replica: &Server, checks: &mut Checks) {
    assert_eq!(checks.threads().await, "ERROR: Replication is not set up");
    assert_eq!(checks.backlog().await, "ERROR: Replication is not set up");
    let port = source.port;
    let (set_up, stop_sql, start_sql) = match source.dialect {
        Dialect::MariaDb => (
            [
                format!(
                    "CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT={port}, MASTER_USER='replication', \
                     MASTER_PASSWORD='slave', MASTER_USE_GTID=slave_pos"
                ),
                "START SLAVE".to_owned(),
            ],
            "STOP SLAVE SQL_THREAD",
            "START SLAVE SQL_THREAD",
        ),
        Dialect::MySql => (
            [
                format!(
                    "CHANGE REPLICATION SOURCE TO SOURCE_HOST='127.0.0.1', SOURCE_PORT={port}, \
                     SOURCE_USER='replication', SOURCE_PASSWORD='slave', GET_SOURCE_PUBLIC_KEY=1"
                ),
                "START REPLICA".to_owned(),
            ],
            "STOP REPLICA SQL_THREAD",
            "START REPLICA SQL_THREAD",
        ),
    };
    replica.sql(&[&set_up[0], &set_up[1]]).await;
    checks.threads_until(|found| found == "OK").await;
    assert_eq!(checks.backlog().await, "OK");

    replica.sql(&[stop_sql]).await;
    assert_eq!(checks.threads().await, "ERROR: Replication is broken: SQL thread running: No (no error is given)");
    assert_eq!(checks.backlog().await, "OK: Backlog is null");
    // An error in the SQL thread: the row is there already.
    replica.sql(&["SET sql_log_bin=0", "CREATE DATABASE d", "CREATE TABLE d.t (id INT PRIMARY KEY)"]).await;
    replica.sql(&["SET sql_log_bin=0", "INSERT INTO d.t VALUES (1)"]).await;
    let other = "CREATE DATABASE IF NOT EXISTS d";
    source.sql(&[other, "CREATE TABLE IF NOT EXISTS d.t (id INT PRIMARY KEY)", "INSERT INTO d.t VALUES (1)"]).await;
    replica.sql(&[start_sql]).await;
    let found = checks.threads_until(|found| found.contains("No (") && !found.contains("no error")).await;
    assert_has(&found, &[&"ERROR: Replication is broken: SQL thread running: No ("]);
}

async fn connections(server: &Server, checks: &mut Checks) {
    assert_eq!(checks.mysql().await, "OK");
    let mut admin = server.admin().await;
    // Killed connections say nothing about the server.
    for _ in 0..2 {
        let mine: Vec<u64> =
            admin.query("SELECT ID FROM information_schema.PROCESSLIST WHERE USER = 'mmm_monitor'").await.unwrap();
        assert_eq!(mine.len(), 3, "one kept connection for each check");
        for id in mine {
            admin.query_drop(format!("KILL {id}")).await.unwrap();
        }
        assert_eq!(checks.mysql().await, "OK");
        assert_has(&checks.threads().await, &[&"ERROR: Replication is broken"]);
        assert_eq!(checks.backlog().await, "OK: Backlog is null");
    }
    // A full server: the kept connection goes on, and the next trial of a login says so.
    admin.query_drop("SET GLOBAL max_connections = 10").await.unwrap();
    let mut guests = vec![];
    while let Ok(guest) = Conn::new(
        OptsBuilder::default()
            .ip_or_hostname("127.0.0.1")
            .tcp_port(server.port)
            .user(Some("nobody"))
            .pass(Some("RepMonitor"))
            .prefer_socket(false),
    )
    .await
    {
        guests.push(guest);
        assert!(guests.len() < 20);
    }
    let mut found = vec![];
    for _ in 0..12 {
        found.push(checks.mysql().await);
    }
    assert_eq!(found[0], "OK");
    let full = format!("UNKNOWN: mysql: too many connections: the server at 127.0.0.1:{} answers", server.port);
    assert_has(&found[10], &[&full]);
    assert_has(&found[11], &[&full]);
    for guest in guests {
        guest.disconnect().await.unwrap();
    }
    let began = Instant::now();
    while checks.mysql().await != "OK" {
        assert!(began.elapsed() < Duration::from_secs(5));
    }
    admin.query_drop("SET GLOBAL max_connections = 100").await.unwrap();
}

/// What is not answered in time hangs on in the server. It is ended, so that the checks of a stuck server do not fill it.
async fn hanging(server: &Server) {
    let mut session = Session::new(&host(server, "mmm_monitor", "RepMonitor"));
    let mut admin = server.admin().await;
    for _ in 0..6 {
        let answer = tokio::time::timeout(Duration::from_millis(200), session.query("SELECT SLEEP(600)")).await;
        assert!(answer.is_err(), "SLEEP(600) ended: {answer:?}");
        session.abandon();
    }
    let began = Instant::now();
    loop {
        session.query("SELECT 1").await.unwrap();
        let asleep = "SELECT ID FROM information_schema.PROCESSLIST WHERE INFO LIKE 'SELECT SLEEP%'";
        let ids: Vec<u64> = admin.query(asleep).await.unwrap();
        assert!(ids.len() <= 2, "{ids:?}");
        if ids.is_empty() {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{ids:?}");
    }
}

async fn accounts(server: &Server) {
    let mut wrong = Checks::of(server, "mmm_monitor", "TopSecret");
    for found in [wrong.mysql().await, wrong.threads().await] {
        assert_has(&found, &[&"UNKNOWN", &"access denied", &"'mmm_monitor'", &"monitor_password"]);
        assert!(!found.contains("TopSecret"), "{found}");
    }
    let mut poor = Checks::of(server, "nobody", "RepMonitor");
    assert_eq!(poor.mysql().await, "OK");
    for found in [poor.threads().await, poor.backlog().await] {
        assert_has(&found, &[&"UNKNOWN", &"'nobody' lacks a privilege", &"GRANT REPLICATION CLIENT"]);
    }
}

async fn stopped_and_gone(server: &mut Server, checks: &mut Checks) {
    server.freeze().await;
    for doing in ["to a query", "to a new connection"] {
        let began = Instant::now();
        let found = checks.mysql().await;
        assert_has(&found, &[&"ERROR: mysql: no answer", &doing, &"within 1s"]);
        let took = began.elapsed();
        assert!((LIMIT..LIMIT + Duration::from_millis(300)).contains(&took), "{took:?}");
        assert_has(&checks.threads().await, &[&"UNKNOWN: rep_threads: no answer"]);
    }
    server.signal(Signal::SIGCONT);
    let began = Instant::now();
    while checks.mysql().await != "OK" {
        assert!(began.elapsed() < Duration::from_secs(5));
    }
    server.crash();
    assert_has(&checks.mysql().await, &[&"ERROR: mysql: 127.0.0.1:", &"refuses connections: no server runs there"]);
    assert_has(&checks.threads().await, &[&"UNKNOWN: rep_threads:", &"refuses connections"]);
}

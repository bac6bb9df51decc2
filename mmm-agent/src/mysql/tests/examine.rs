//! What doctor finds on real servers: each setting made wrong gives its finding and no other, and the cure that is named,
//! carried out word by word, makes it go.

use super::servers::{Instance, start};
use super::{PATIENCE, config};
use crate::mysql::examine;
use mmm_common::config::Agent;
use mmm_common::examine::{Finding, Severity, Subject};
use mysql_async::prelude::Queryable;
use std::collections::BTreeSet;
use tokio::time::timeout;

macro_rules! stories {
    ($($name:ident),* $(,)?) => {
        mod mariadb_10_11 { $(#[tokio::test] async fn $name() { super::$name("mariadb-10.11").await })* }
        mod mariadb_11_8 { $(#[tokio::test] async fn $name() { super::$name("mariadb-11.8").await })* }
        mod mysql_9_7 { $(#[tokio::test] async fn $name() { super::$name("mysql-9.7").await })* }
    };
}

stories!(
    a_wrong_setting_is_found_and_its_cure_cures_it,
    what_only_a_file_can_cure_is_cured_by_its_lines,
    a_missing_privilege_is_named_and_its_grant_is_enough,
    replication_is_looked_at_from_both_ends,
    a_server_that_is_not_there_is_one_finding,
);

/// As doctor wants it.
const MARIADB: &[&str] = &[
    "--read-only=1",
    "--sync-binlog=1",
    "--innodb-flush-log-at-trx-commit=1",
    "--binlog-format=ROW",
    "--binlog-expire-logs-seconds=604800",
    "--slave-net-timeout=4",
    "--rpl-semi-sync-slave-enabled=1",
    "--rpl-semi-sync-master-wait-point=AFTER_SYNC",
    "--init-rpl-role=SLAVE",
];
const MYSQL: &[&str] = &[
    "--super-read-only=1",
    "--sync-binlog=1",
    "--innodb-flush-log-at-trx-commit=1",
    "--replica-net-timeout=4",
    "--relay-log-recovery=ON",
    "--plugin-load-add=semisync_source.so",
    "--plugin-load-add=semisync_replica.so",
    "--plugin-load-add=mysql_clone.so",
    "--rpl-semi-sync-replica-enabled=1",
];

async fn with(kind: &str, server_id: u32, more: &[&str]) -> Option<Instance> {
    let mut server = start(kind, server_id).await?;
    restart(&mut server, more).await;
    Some(server)
}

async fn restart(server: &mut Instance, more: &[&str]) {
    let right = if server.is_mariadb() { MARIADB } else { MYSQL };
    restart_bare(server, right.iter().chain(more).map(|o| (*o).to_owned())).await;
}

async fn restart_bare(server: &mut Instance, options: impl Iterator<Item = String>) {
    server.kill9();
    server.reap();
    server.options = options.collect();
    server.run().await;
}

/// Findings that are more than a notice. Not about privileges, nor programs of the machine that runs the tests.
async fn troubles(config: &Agent) -> Vec<Finding> {
    let (findings, facts) = examine::server(config).await;
    assert!(facts.is_some(), "{findings:?}");
    let of_settings = |f: &Finding| f.subject != Subject::AgentUser && !f.cure.starts_with("apt-get");
    findings.into_iter().filter(|f| f.severity >= Severity::Notice && of_settings(f)).collect()
}

fn subjects(findings: &[Finding]) -> Vec<(Subject, Severity)> {
    findings.iter().map(|f| (f.subject, f.severity)).collect()
}

/// The statements of a cure, without the lines for the file.
fn statements(cure: &str) -> Vec<&str> {
    let now = cure.split("my.cnf [mysqld]: ").next().unwrap_or_default();
    let now = now.trim_start_matches("on the active master: ");
    now.split(';').map(str::trim).filter(|s| !s.is_empty()).collect()
}

/// The lines for the file, as options.
fn lines(cure: &str) -> Vec<String> {
    let Some((_, file)) = cure.split_once("my.cnf [mysqld]: ") else { return vec![] };
    let file = file.split(';').next().unwrap_or_default();
    file.split(", ").map(|line| format!("--{}", line.trim())).collect()
}

async fn carry_out(server: &Instance, cure: &str) {
    let mut boss = server.boss().await;
    for sql in statements(cure) {
        timeout(PATIENCE, boss.query_drop(sql)).await.unwrap().unwrap_or_else(|e| panic!("{sql}: {e}"));
    }
    boss.disconnect().await.unwrap();
}

async fn a_wrong_setting_is_found_and_its_cure_cures_it(kind: &str) {
    let Some(server) = with(kind, 1, &[]).await else { return };
    let config = config("db1", server.port, server.port);
    assert_eq!(subjects(&troubles(&config).await), [], "as it should be");
    // It is the active master now.
    server.sql("SET GLOBAL read_only=0").await;
    server.sql("GRANT EVENT ON app.* TO mmm_agent@'%'").await;

    let (warning, notice) = (Severity::Warning, Severity::Notice);
    let mut cases = vec![
        ("sync_binlog=0", Subject::Durability, warning),
        ("innodb_flush_log_at_trx_commit=2", Subject::Durability, warning),
        ("binlog_row_image=MINIMAL", Subject::BinlogFormat, notice),
        ("binlog_expire_logs_seconds=0", Subject::BinlogRetention, notice),
        ("binlog_expire_logs_seconds=3600", Subject::BinlogRetention, warning),
        ("slave_net_timeout=60", Subject::SlaveNetTimeout, warning),
        ("slave_exec_mode=IDEMPOTENT", Subject::SkipErrors, warning),
    ];
    cases.extend(if server.is_mariadb() {
        vec![
            ("gtid_strict_mode=0", Subject::GtidStrictMode, Severity::Error),
            ("binlog_format=MIXED", Subject::BinlogFormat, warning),
            ("rpl_semi_sync_slave_enabled=0", Subject::Semisync, warning),
            ("rpl_semi_sync_master_wait_point='AFTER_COMMIT'", Subject::Semisync, warning),
            ("rpl_semi_sync_master_timeout=6500", Subject::Semisync, warning),
        ]
    } else {
        vec![
            ("rpl_semi_sync_replica_enabled=0", Subject::Semisync, warning),
            ("rpl_semi_sync_source_wait_point='AFTER_COMMIT'", Subject::Semisync, warning),
            ("rpl_semi_sync_source_timeout=6500", Subject::Semisync, warning),
        ]
    });
    for (wrong, subject, severity) in cases {
        server.sql(&format!("SET GLOBAL {wrong}")).await;
        let found = troubles(&config).await;
        assert_eq!(subjects(&found), [(subject, severity)], "{wrong}: {found:?}");
        carry_out(&server, &found[0].cure).await;
        assert_eq!(subjects(&troubles(&config).await), [], "{wrong}, after {}", found[0].cure);
        let file = lines(&found[0].cure);
        assert!(!file.is_empty(), "it would be back after a restart: {}", found[0].cure);
    }

    server.sql("CREATE EVENT app.e ON SCHEDULE EVERY 1 DAY DO DO 1").await;
    server.sql("SET GLOBAL event_scheduler=ON").await;
    let set = server.words("SET GLOBAL read_only=1", "SET GLOBAL super_read_only=1");
    server.sql(set).await;
    let found = troubles(&config).await;
    assert_eq!(subjects(&found), [(Subject::EventScheduler, warning)], "{found:?}");
    carry_out(&server, &found[0].cure).await;
    assert_eq!(subjects(&troubles(&config).await), []);

    let mut clients = vec![];
    for _ in 0..7 {
        clients.push(server.app().await);
    }
    server.sql("SET GLOBAL max_connections=10").await;
    let found = troubles(&config).await;
    assert_eq!(subjects(&found), [(Subject::MaxConnections, warning)], "{found:?}");
    carry_out(&server, &found[0].cure).await;
    assert_eq!(subjects(&troubles(&config).await), []);
}

async fn what_only_a_file_can_cure_is_cured_by_its_lines(kind: &str) {
    let wrong = if kind.starts_with("mariadb") {
        vec![
            "--read-only=0",
            "--skip-log-bin",
            "--skip-log-slave-updates",
            "--slave-skip-errors=1062",
            "--init-rpl-role=MASTER",
        ]
    } else {
        vec![
            "--read-only=0",
            "--super-read-only=0",
            "--skip-log-bin",
            "--log-replica-updates=OFF",
            "--replica-skip-errors=1062",
            "--relay-log-recovery=OFF",
            "--gtid-mode=OFF",
            "--enforce-gtid-consistency=OFF",
        ]
    };
    let Some(mut server) = with(kind, 1, &wrong).await else { return };
    let config = config("db1", server.port, server.port);
    let found = troubles(&config).await;
    let errors: BTreeSet<Subject> = found.iter().filter(|f| f.severity == Severity::Error).map(|f| f.subject).collect();
    let warnings: BTreeSet<Subject> =
        found.iter().filter(|f| f.severity == Severity::Warning).map(|f| f.subject).collect();
    let mut wanted = BTreeSet::from([Subject::LogBin, Subject::LogSlaveUpdates, Subject::ReadOnly]);
    if server.is_mariadb() {
        assert_eq!(warnings, [Subject::InitRplRole, Subject::SkipErrors].into(), "{found:?}");
    } else {
        wanted.insert(Subject::Gtid);
        assert_eq!(warnings, [Subject::RelayLogRecovery, Subject::SkipErrors].into(), "{found:?}");
    }
    assert_eq!(errors, wanted, "{found:?}");

    let cures: Vec<String> = found.iter().flat_map(|f| lines(&f.cure)).collect();
    assert!(found.iter().all(|f| f.cure.ends_with("; restart the server")), "{found:?}");
    let all: Vec<&str> = wrong.iter().copied().chain(cures.iter().map(String::as_str)).collect();
    restart(&mut server, &all).await;
    assert_eq!(troubles(&config).await, [], "with {cures:?}");

    // A server that is writable now, as the active master is, comes up read-only all the same.
    server.sql("SET GLOBAL read_only=0").await;
    assert_eq!(troubles(&config).await, []);

    if server.is_mariadb() {
        return;
    }
    // Plugins: by the file while the server is read-only, by a statement while it is not.
    for (read_only, by_file) in [("--super-read-only=1", true), ("--read-only=1", false)] {
        let bare = [read_only, "--sync-binlog=1", "--innodb-flush-log-at-trx-commit=1", "--replica-net-timeout=4"];
        restart_bare(&mut server, bare.iter().chain(&["--relay-log-recovery=ON"]).map(|o| (*o).to_owned())).await;
        let found = troubles(&config).await;
        assert_eq!(subjects(&found), [(Subject::Clone, Severity::Warning), (Subject::Semisync, Severity::Warning)]);
        for finding in &found {
            assert_eq!(finding.cure.ends_with("; restart the server"), by_file, "{found:?}");
            if !by_file {
                carry_out(&server, &finding.cure).await;
            }
        }
        if by_file {
            let cures = found.iter().flat_map(|f| lines(&f.cure));
            let all: Vec<String> = server.options.iter().cloned().chain(cures).collect();
            restart_bare(&mut server, all.into_iter()).await;
        }
        // The plugins are there now; the replica side is off by default.
        let found = troubles(&config).await;
        assert_eq!(subjects(&found), [(Subject::Semisync, Severity::Warning)], "{found:?}");
        carry_out(&server, &found[0].cure).await;
        assert_eq!(troubles(&config).await, []);
    }
}

async fn privileges(config: &Agent) -> Vec<Finding> {
    let (findings, _) = examine::server(config).await;
    findings.into_iter().filter(|f| f.subject == Subject::AgentUser && f.severity != Severity::Ok).collect()
}

async fn a_missing_privilege_is_named_and_its_grant_is_enough(kind: &str) {
    let Some(server) = with(kind, 1, &[]).await else { return };
    let mut config = config("db1", server.port, server.port);
    config.cluster.hosts.get_mut(&"db1".into()).unwrap().agent_user = "blind_agent".to_owned();
    server.sql("SET GLOBAL read_only=0").await;
    let before = server.sql(server.words("SELECT @@gtid_binlog_pos", "SELECT @@gtid_executed")).await;
    let (all, _) = examine::server(&config).await;
    assert!(all.iter().any(|f| f.severity == Severity::Error), "{all:?}");
    let found = privileges(&config).await;
    let severities: Vec<Severity> = found.iter().map(|f| f.severity).collect();
    assert_eq!(severities, [Severity::Error, Severity::Warning, Severity::Notice], "{all:?}");
    let named: &[&str] = if server.is_mariadb() {
        &["READ_ONLY ADMIN", "CONNECTION ADMIN", "SLAVE MONITOR", "REPLICATION SLAVE ADMIN", "REPLICATION MASTER ADMIN"]
    } else {
        &[
            "SYSTEM_VARIABLES_ADMIN",
            "CONNECTION_ADMIN",
            "REPLICATION CLIENT",
            "REPLICATION_SLAVE_ADMIN",
            "XA_RECOVER_ADMIN",
        ]
    };
    for privilege in named {
        assert!(found[0].found.contains(privilege) && found[0].cure.contains(privilege), "{privilege}: {found:?}");
    }
    assert!(!found[0].found.contains("PROCESS"), "it has that: {found:?}");
    assert!(!format!("{all:?}").contains("IDENTIFIED"), "no hash of a password is quoted");
    let after = server.sql(server.words("SELECT @@gtid_binlog_pos", "SELECT @@gtid_executed")).await;
    assert_eq!(after, before, "trying has written nothing");
    assert_eq!(server.sql("SELECT @@GLOBAL.read_only+0").await, "0", "nor changed anything");

    for finding in &found {
        carry_out(&server, &finding.cure).await;
    }
    assert_eq!(privileges(&config).await, []);
}

async fn replication_is_looked_at_from_both_ends(kind: &str) {
    let (Some(db1), Some(db2)) = (with(kind, 1, &[]).await, with(kind, 2, &[]).await) else { return };
    let config = config("db2", db1.port, db2.port);
    let only = async || {
        let logins = examine::replication_logins(&config).await;
        assert_eq!(logins.len(), 1);
        logins.into_iter().next().unwrap()
    };
    assert_eq!(only().await.severity, Severity::Ok);

    db1.sql("SET GLOBAL read_only=0").await;
    db1.sql("REVOKE REPLICATION SLAVE ON *.* FROM replication@'%'").await;
    let login = only().await;
    assert!(login.severity == Severity::Error && login.found == "without REPLICATION SLAVE", "{login:?}");
    carry_out(&db1, &login.cure).await;
    assert_eq!(only().await.severity, Severity::Ok);
    db1.sql("ALTER USER replication@'%' IDENTIFIED BY 'another'").await;
    let login = only().await;
    assert!(login.severity == Severity::Error && login.found.contains("1045"), "{login:?}");
    assert!(!format!("{login:?}").contains("sl'a"), "without the password");
    assert!(login.cure.contains("replication_password"), "{login:?}");

    // By file and position, and stopped. That it gives up soon is MySQL's default.
    let file = db1.sql(db1.words("SHOW MASTER STATUS", "SHOW BINARY LOG STATUS")).await;
    let port = db1.port;
    let change = if db2.is_mariadb() {
        format!(
            "CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT={port}, MASTER_USER='replication', \
             MASTER_PASSWORD='another', MASTER_LOG_FILE='{file}', MASTER_LOG_POS=4, MASTER_USE_GTID=no"
        )
    } else {
        format!(
            "CHANGE REPLICATION SOURCE TO SOURCE_HOST='127.0.0.1', SOURCE_PORT={port}, SOURCE_USER='replication', \
             SOURCE_PASSWORD='another', SOURCE_LOG_FILE='{file}', SOURCE_LOG_POS=4, GET_SOURCE_PUBLIC_KEY=1"
        )
    };
    db2.sql(&change).await;
    let mut wanted = vec![(Subject::Gtid, Severity::Error), (Subject::Replication, Severity::Error)];
    if !db2.is_mariadb() {
        wanted.push((Subject::Replication, Severity::Warning));
    }
    let found = troubles(&config).await;
    assert_eq!(subjects(&found), wanted, "{found:?}");
    // That of the stopped threads last: the others begin with stopping, or start only one.
    for finding in found.iter().rev() {
        carry_out(&db2, &finding.cure).await;
    }
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        let found = troubles(&config).await;
        if found.is_empty() {
            break;
        }
        assert!(tokio::time::Instant::now() < until, "{found:?}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }

    db2.sql(db2.words("STOP SLAVE SQL_THREAD", "STOP REPLICA SQL_THREAD")).await;
    let found = troubles(&config).await;
    assert_eq!(subjects(&found), [(Subject::Replication, Severity::Error)], "{found:?}");
    assert!(!db2.is_mariadb() || found[0].cure.starts_with("START SLAVE SQL_THREAD;"), "SQL first: {found:?}");
    carry_out(&db2, &found[0].cure).await;
    let (_, facts) = examine::server(&config).await;
    let source = facts.unwrap().source.unwrap();
    assert!(source.is(std::net::SocketAddr::from(([127, 0, 0, 1], port))), "{source:?}");
}

async fn a_server_that_is_not_there_is_one_finding(kind: &str) {
    let Some(mut server) = start(kind, 1).await else { return };
    let mut config = config("db1", server.port, server.port);
    config.cluster.hosts.get_mut(&"db1".into()).unwrap().agent_password = mmm_common::config::Secret("geheim".into());
    let (findings, facts) = examine::server(&config).await;
    assert_eq!((subjects(&findings), facts), (vec![(Subject::Server, Severity::Error)], None));
    assert!(findings[0].cure.contains("agent_password") && !format!("{findings:?}").contains("geheim"), "{findings:?}");

    server.kill9();
    server.reap();
    let (findings, facts) = examine::server(&config).await;
    assert_eq!((subjects(&findings), facts), (vec![(Subject::Server, Severity::Error)], None));
    assert!(findings[0].cure.starts_with("start the server"), "{findings:?}");
}

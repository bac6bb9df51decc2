//! db1 is dead, db2 is to be the writer, and db3 has more than db2 (data-safety.md, unplanned failover, step 2).

use super::servers::{start, start_with};
use super::*;

stories!(
    what_only_another_replica_has_is_fetched,
    a_fetch_that_cannot_be_done_says_why_and_fetches_nothing,
    what_was_received_is_not_thrown_away_for_a_fetch,
);

fn three(this: &str, ports: [u16; 3]) -> Agent {
    let mut config = config(this, ports[0], ports[1]);
    config.cluster.hosts.insert("db3".into(), Host { mode: HostMode::Slave, peer: None, ..host(ports[2], "db1") });
    config
}

struct Three {
    db1: Instance,
    db2: Instance,
    db3: Instance,
    side2: Side,
    config: Agent,
    /// What db3 has executed.
    position: Gtids,
}

/// db2 has rows 1 and 2 and does not fetch; db3 has 1 to 6. db1 is dead.
async fn db3_has_more(kind: &str, db3_args: &[&str]) -> Option<Three> {
    let (mut db1, db2) = (start(kind, 1).await?, start(kind, 2).await?);
    let db3 = start_with(kind, 3, db3_args).await?;
    let config = three("db2", [db1.port, db2.port, db3.port]);
    let mut side2 = Side::of(config.clone());
    let mut side3 = Side::of(three("db3", [db1.port, db2.port, db3.port]));
    for side in [&mut side2, &mut side3] {
        side.step(follow("db1")).await.unwrap();
    }
    db1.sql("INSERT INTO app.t (id) VALUES (1), (2)").await;
    side2.task(catch_up_with(&db1).await).await.unwrap();
    side2.step(Step::Detach).await.unwrap();
    for id in 3..=6 {
        db1.sql(&format!("INSERT INTO app.t (id) VALUES ({id})")).await;
    }
    let position = side3.task(catch_up_with(&db1).await).await.unwrap().unwrap();
    db1.kill9();
    db1.reap();
    side3.task(Work::Drain { timeout_ms: 5000 }).await.unwrap();
    Some(Three { db1, db2, db3, side2, config, position })
}

fn fetch(from: &str, position: &Gtids, timeout_ms: u64) -> Work {
    Work::Fetch { from: from.into(), position: position.clone(), timeout_ms }
}

async fn what_only_another_replica_has_is_fetched(kind: &str) {
    let Some(mut three) = db3_has_more(kind, &[]).await else { return };
    let side = &mut three.side2;
    side.task(Work::Drain { timeout_ms: 5000 }).await.unwrap();
    let begun = Instant::now();
    let position = side.task(fetch("db3", &three.position, 8000)).await.unwrap().unwrap();
    assert!(begun.elapsed() < 5 * SECOND, "{:?}", begun.elapsed());
    assert_eq!(position.contains(&three.position), Some(true));
    assert_eq!(three.db2.sql("SELECT GROUP_CONCAT(id ORDER BY n) FROM app.t").await, "1,2,3,4,5,6");
    let replication = side.last.replication.clone().unwrap();
    assert!(!replication.io_running && replication.sql_running && replication.port == three.db3.port);
    // Nothing missing: nothing done.
    side.task(fetch("db3", &three.position, 1000)).await.unwrap();
    // It is whole, and can be the writer that db3 follows.
    side.step(writable()).await.unwrap();
    three.db2.sql("INSERT INTO app.t (id) VALUES (7)").await;
    let mut side3 = Side::of(self::three("db3", [three.db1.port, three.db2.port, three.db3.port]));
    side3.step(follow("db2")).await.unwrap();
    side3.task(catch_up_with(&three.db2).await).await.unwrap();
    assert_eq!(three.db3.sql("SELECT COUNT(*) FROM app.t").await, "7");
}

async fn a_fetch_that_cannot_be_done_says_why_and_fetches_nothing(kind: &str) {
    let none = if kind.starts_with("mysql") { "--log-replica-updates=OFF" } else { "--skip-log-slave-updates" };
    let Some(mut three) = db3_has_more(kind, &[none]).await else { return };
    let side = &mut three.side2;
    let why = side.task(fetch("db2", &three.position, 2000)).await.unwrap_err();
    assert!(why.contains("from itself"), "{why}");
    let why = side.task(fetch("db1", &three.position, 2000)).await.unwrap_err();
    assert!(why.contains("db1") && why.contains("refused"), "{why}");
    let why = side.task(fetch("db3", &three.position, 2000)).await.unwrap_err();
    assert!(why.contains("log_slave_updates"), "{why}");

    let mut wrong = three.config.clone();
    let db3 = wrong.cluster.hosts.get_mut(&HostName::from("db3")).unwrap();
    db3.replication_password = Secret("wrong-secret".to_owned());
    let mut other = Side::of(wrong);
    let why = other.task(fetch("db3", &three.position, 2000)).await.unwrap_err();
    assert!(why.contains("1045") && !why.contains("wrong-secret"), "{why}");

    // It has the binary logs no more.
    let Some(mut three) = db3_has_more(kind, &[]).await else { return };
    three.db3.sql("FLUSH LOCAL BINARY LOGS").await;
    let log = three.db3.sql(three.db3.words("SHOW MASTER STATUS", "SHOW BINARY LOG STATUS")).await;
    let until = Instant::now() + PATIENCE;
    while three.db3.sql("SHOW BINARY LOGS").await != log {
        assert!(Instant::now() < until, "the old binary log is not purged");
        three.db3.sql(&format!("PURGE BINARY LOGS TO '{log}'")).await;
    }
    let begun = Instant::now();
    let why = three.side2.task(fetch("db3", &three.position, 8000)).await.unwrap_err();
    assert!(why.contains("1236") && why.contains("missing"), "{why}");
    assert!(begun.elapsed() < 7 * SECOND, "{:?}", begun.elapsed());
    let stopped = |r: &ServerReport| r.replication.as_ref().is_none_or(|r| !r.io_running);
    three.side2.until("not fetching", stopped).await;

    // It hangs: over in time, and nothing is being fetched afterwards.
    let Some(mut three) = db3_has_more(kind, &[]).await else { return };
    three.db3.pause();
    let begun = Instant::now();
    three.side2.task(fetch("db3", &three.position, 2000)).await.unwrap_err();
    assert!(begun.elapsed() < 6 * SECOND, "{:?}", begun.elapsed());
    three.db3.go_on();
    three.side2.until("not fetching", stopped).await;
    assert_eq!(three.db2.sql("SELECT COUNT(*) FROM app.t").await, "2");
}

async fn what_was_received_is_not_thrown_away_for_a_fetch(kind: &str) {
    let Some((mut db1, db2, mut side)) = received_not_applied(kind).await else { return };
    db1.kill9();
    db1.reap();
    if !db2.is_mariadb() {
        // MySQL applies it first.
        let received = side.last.replication.as_ref().unwrap().received.clone().unwrap();
        side.task(fetch("db1", &received, 3000)).await.unwrap();
        assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "5");
        return;
    }
    db2.sql("STOP SLAVE").await;
    let why = side.task(fetch("db1", &Gtids::MariaDb("0-1-9".parse().unwrap()), 2000)).await.unwrap_err();
    assert!(why.contains("5 transactions") && why.contains("relay log"), "{why}");
    assert_eq!(db2.status().await.text(&["Gtid_IO_Pos"]).unwrap(), "0-1-5", "still there");
}

/// MySQL 8.3 and later: a transaction's GTID may carry a tag.
#[tokio::test]
async fn tagged_transactions_are_missed_counted_and_fetched() {
    let Some(mut three) = db3_has_more("mysql-9.7", &[]).await else { return };
    let mut boss = three.db3.boss().await;
    boss.query_drop("SET GLOBAL read_only=0; SET SESSION gtid_next='AUTOMATIC:mmm'").await.unwrap();
    boss.query_drop("INSERT INTO app.t (id) VALUES (7)").await.unwrap();
    let mut db3 = Side::alone(&three.db3);
    db3.until("tagged", |r| r.executed.as_ref().is_some_and(|g| g.to_string().contains(":mmm:1"))).await;
    let position = db3.last.executed.clone().unwrap();
    three.side2.until("seen", |r| r.executed.as_ref().and_then(|g| g.missing(&position)) == Some(5)).await;
    let why = three.side2.task(Work::CatchUp { position: position.clone().into(), timeout_ms: 100 }).await.unwrap_err();
    assert!(why.contains("5 transactions missing"), "{why}");
    three.side2.task(fetch("db3", &position, 8000)).await.unwrap();
    assert_eq!(three.db2.sql("SELECT COUNT(*) FROM app.t").await, "7");
}

//! MariaDB's relay log: what throws it away, and that the product's order of statements does not (data-safety.md,
//! unplanned failover, step 3).

use super::servers::{start, start_with};
use super::*;
use crate::mysql::clients;
use crate::mysql::follow::change_by_position;
use crate::mysql::session::{LOGIN, Server};

stories!(
    every_other_order_of_statements_loses_what_was_received,
    an_idle_replica_that_was_restarted_is_followed_again,
    a_restarted_replica_keeps_what_it_had_received_until_its_source_is_back,
    a_drain_does_not_take_null_for_applied,
    a_drain_waits_for_what_workers_still_apply,
);

/// Done by hand on db2, with db1 dead and five transactions received that are not applied.
struct Order {
    name: &'static str,
    restart: bool,
    statements: &'static [[&'static str; 2]],
    left_on_mariadb: &'static str,
}

const ORDERS: [Order; 4] = [
    Order {
        name: "stop all, start all",
        restart: false,
        statements: &[["STOP SLAVE", "STOP REPLICA"], ["START SLAVE", "START REPLICA"]],
        left_on_mariadb: "0",
    },
    Order {
        name: "stop fetching, then apply",
        restart: false,
        statements: &[
            ["STOP SLAVE IO_THREAD", "STOP REPLICA IO_THREAD"],
            ["START SLAVE SQL_THREAD", "START REPLICA SQL_THREAD"],
        ],
        left_on_mariadb: "0",
    },
    Order {
        name: "a restart of the server",
        restart: true,
        statements: &[["START SLAVE", "START REPLICA"]],
        left_on_mariadb: "0",
    },
    Order {
        name: "apply, then stop fetching",
        restart: false,
        statements: &[
            ["START SLAVE SQL_THREAD", "START REPLICA SQL_THREAD"],
            ["STOP SLAVE IO_THREAD", "STOP REPLICA IO_THREAD"],
        ],
        left_on_mariadb: "5",
    },
];

async fn every_other_order_of_statements_loses_what_was_received(kind: &str) {
    for order in ORDERS {
        let Some((mut db1, mut db2, side)) = received_not_applied(kind).await else { return };
        drop(side);
        db1.kill9();
        db1.reap();
        if order.restart {
            db2.kill9();
            db2.reap();
            db2.run().await;
        }
        for [mariadb, mysql] in order.statements {
            db2.sql(db2.words(mariadb, mysql)).await;
        }
        let expected = db2.words(order.left_on_mariadb, "5");
        let until = Instant::now() + 5 * SECOND;
        let mut rows = String::new();
        // Whatever is going to be applied is applied by the time the SQL thread has nothing to read any more.
        while Instant::now() < until {
            rows = db2.sql("SELECT COUNT(*) FROM app.t").await;
            let status = db2.status().await;
            let doing = status.text(&["Slave_SQL_Running_State", "Replica_SQL_Running_State"]).unwrap().to_owned();
            if rows == expected && doing.contains("has read all relay log") {
                break;
            }
            sleep(SECOND / 20).await;
        }
        assert_eq!(rows, expected, "{kind}: {}", order.name);
    }
    // The product's order, in the same situation.
    let Some((db1, db2, mut side)) = received_not_applied(kind).await else { return };
    db1.kill9();
    side.task(Work::Drain { timeout_ms: 5000 }).await.unwrap();
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "5");
}

async fn an_idle_replica_that_was_restarted_is_followed_again(kind: &str) {
    let (Some(db1), Some(mut db2)) = (start(kind, 1).await, start(kind, 2).await) else { return };
    let mut side = Side::of(config("db2", db1.port, db2.port));
    side.step(follow("db1")).await.unwrap();
    db1.sql("INSERT INTO app.t (id) VALUES (1)").await;
    side.task(catch_up_with(&db1).await).await.unwrap();
    for clean in [false, true] {
        if clean {
            db2.sql("SHUTDOWN").await;
        } else {
            db2.kill9();
        }
        db2.reap();
        db2.run().await;
        side.until("alive, both threads stopped", |r| {
            r.life == Life::Alive && r.replication.as_ref().is_some_and(|r| !r.io_running && !r.sql_running)
        })
        .await;
        // Nothing was received that is not applied: a drain has nothing to do, and following nothing to lose.
        side.task(Work::Drain { timeout_ms: 2000 }).await.unwrap();
        side.step(follow("db1")).await.unwrap();
        db1.sql("INSERT INTO app.t (id) VALUES (2)").await;
        side.task(catch_up_with(&db1).await).await.unwrap();
    }
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "3");
}

async fn a_restarted_replica_keeps_what_it_had_received_until_its_source_is_back(kind: &str) {
    let Some((mut db1, mut db2, mut side)) = received_not_applied(kind).await else { return };
    db1.kill9();
    db1.reap();
    db2.kill9();
    db2.reap();
    db2.run().await;
    side.until("alive again", |r| r.life == Life::Alive && r.replication.is_some()).await;
    if db2.is_mariadb() {
        let why = side.task(Work::Drain { timeout_ms: 2000 }).await.unwrap_err();
        assert!(why.contains("5 transactions") && why.contains("both replication threads are stopped"), "{why}");
        let why = side.step(follow("db1")).await.unwrap_err();
        assert!(why.contains("5 transactions") && why.contains("cannot be asked"), "{why}");
        let mut gtids = 0;
        for number in 1..10 {
            let sql = format!("SHOW RELAYLOG EVENTS IN 'relay.{number:06}'");
            let events: Vec<mysql_async::Row> = db2.boss().await.query(sql).await.unwrap_or_default();
            gtids += events.iter().filter(|e| e.get::<String, _>("Event_type").unwrap() == "Gtid").count();
        }
        assert_eq!(gtids, 5, "they are still there, for the binlog tool");
    } else {
        side.task(Work::Drain { timeout_ms: 5000 }).await.unwrap();
        assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "5");
    }
    db1.run().await;
    side.step(follow("db1")).await.unwrap();
    side.task(catch_up_with(&db1).await).await.unwrap();
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "5");
}

/// What a MariaDB without MASTER_DEMOTE_TO_SLAVE (before 10.10) is told, tried on those that have it.
#[tokio::test]
async fn an_older_ex_master_follows_from_its_own_position() {
    for kind in ["mariadb-10.11", "mariadb-11.8"] {
        let (Some(db1), Some(db2)) = (start(kind, 1).await, start(kind, 2).await) else { continue };
        let mut new = Side::of(config("db2", db1.port, db2.port));
        new.step(follow("db1")).await.unwrap();
        db1.sql("INSERT INTO app.t (id) VALUES (1), (2)").await;
        new.task(catch_up_with(&db1).await).await.unwrap();
        new.step(Step::Detach).await.unwrap();
        // It could not be sent again: only the right position lets db1 go on.
        db2.sql("FLUSH LOCAL BINARY LOGS").await;
        db2.sql("INSERT INTO app.t (id) VALUES (3)").await;
        let config = config("db1", db1.port, db2.port);
        let mut session = Server::local(&config).unwrap().connect(LOGIN).await.unwrap();
        change_by_position(&mut session, &config.cluster.hosts[&HostName::from("db2")], SECOND).await.unwrap();
        assert_eq!(db1.sql("SELECT @@GLOBAL.gtid_slave_pos").await, "0-1-1");
        db1.sql("START SLAVE").await;
        let mut old = Side::of(config);
        old.task(catch_up_with(&db2).await).await.unwrap();
        assert_eq!(db1.sql("SELECT GROUP_CONCAT(id ORDER BY n) FROM app.t").await, "1,2,3");
    }
}

/// A broken SQL thread: Seconds_Behind is NULL, and that is a failure (lessons.md 6).
async fn a_drain_does_not_take_null_for_applied(kind: &str) {
    let Some((db1, db2, mut side)) = received_not_applied(kind).await else { return };
    // The third of the five collides with a row that was written here behind everybody's back.
    db2.sql("SET GLOBAL read_only=0").await;
    let mut boss = db2.boss().await;
    boss.query_drop("SET sql_log_bin=0").await.unwrap();
    boss.query_drop("INSERT INTO app.t (n, id) VALUES (3, 99)").await.unwrap();
    db1.kill9();
    let begun = Instant::now();
    let why = side.task(Work::Drain { timeout_ms: 5000 }).await.unwrap_err();
    assert!(begun.elapsed() < 4 * SECOND, "{:?}", begun.elapsed());
    // MySQL tells of a worker of many (3030).
    assert!(why.contains("SQL thread") && (why.contains("1062") || why.contains("3030")), "{why}");
    side.until("NULL", |r| r.replication.as_ref().is_some_and(|r| r.behind_ms.is_none() && !r.sql_running)).await;
}

/// The SQL thread has read everything and handed it on; a worker is not done with it for longer than that may last.
async fn a_drain_waits_for_what_workers_still_apply(kind: &str) {
    // MySQL has four of them by itself.
    let workers: &[&str] = if kind.starts_with("mysql") { &[] } else { &["--slave-parallel-threads=4"] };
    let (Some(mut db1), Some(db2)) = (start(kind, 1).await, start_with(kind, 2, workers).await) else { return };
    let mut side = Side::of(config("db2", db1.port, db2.port));
    side.step(follow("db1")).await.unwrap();
    let mut lock = db2.boss().await;
    lock.query_drop("LOCK TABLES app.t READ").await.unwrap();
    db1.sql("INSERT INTO app.t (id) VALUES (1)").await;
    let Work::CatchUp { position, .. } = catch_up_with(&db1).await else { panic!("no position") };
    let wanted = position.gtids().cloned();
    side.until("received", |r| r.replication.as_ref().is_some_and(|r| r.received == wanted)).await;
    let mut session = Server::local(&config("db2", db1.port, db2.port)).unwrap().connect(LOGIN).await.unwrap();
    let until = Instant::now() + PATIENCE;
    loop {
        let status = db2.status().await;
        let doing = status.text(&["Slave_SQL_Running_State", "Replica_SQL_Running_State"]).unwrap();
        let at_work = clients::all(&mut session).await.unwrap().iter().filter(|c| c.applies()).count();
        // One of four, as the agent's user sees them.
        if doing.contains("has read all relay log") && at_work == usize::from(db2.is_mariadb()) {
            break;
        }
        assert!(Instant::now() < until, "{doing}; {at_work} workers at work");
        sleep(SECOND / 50).await;
    }
    db1.kill9();
    db1.reap();
    let unlock = tokio::spawn(async move {
        sleep(2 * SECOND).await;
        lock.query_drop("UNLOCK TABLES").await.unwrap();
    });
    let drained = side.task(Work::Drain { timeout_ms: 8000 }).await.unwrap();
    assert_eq!(drained, wanted);
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "1");
    unlock.await.unwrap();
}

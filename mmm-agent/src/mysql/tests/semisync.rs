//! Semi-synchronous replication: read and switched on both sides, and what commits that wait for it must not hold up.

use super::servers::{semisync_args, start_with};
use super::*;
use mmm_agent_core::io::Side as SemiSide;
use mmm_common::report::SemiSync;

stories!(
    both_sides_are_read_and_switched,
    a_replica_that_died_without_a_word_stops_counting,
    the_replica_side_is_not_switched_where_that_would_throw_the_relay_log_away,
    read_only_gets_past_commits_that_wait_for_an_acknowledgement,
    a_planned_move_is_over_in_time_whoever_holds_it_up,
    a_long_statement_gets_the_grace,
    somebody_who_may_write_anyway_and_never_stops_hangs_no_move,
    a_drain_is_not_held_up_by_a_hung_master,
    a_drain_does_not_wait_for_the_end_of_a_thread_that_takes_nothing_more,
);

#[tokio::test]
async fn without_the_plugins_there_is_none() {
    let Some(db1) = start("mysql-9.7", 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    assert_eq!(side.last.semisync, None);
    let why = side.step(switch(SemiSide::Source, true)).await.unwrap_err();
    assert!(why.contains("install") && why.contains("semisync_source"), "{why}");
}

fn switch(side: SemiSide, on: bool) -> Step {
    Step::SemiSync { side, on }
}

async fn start_both(kind: &str) -> Option<(Instance, Instance, Side, Side)> {
    let (db1, db2) = (start_with(kind, 1, semisync_args(kind)).await?, start_with(kind, 2, semisync_args(kind)).await?);
    let sides = ["db1", "db2"].map(|this| Side::of(config(this, db1.port, db2.port)));
    let [side1, side2] = sides;
    Some((db1, db2, side1, side2))
}

fn is(report: &ServerReport, cond: impl Fn(&SemiSync) -> bool) -> bool {
    report.semisync.as_ref().is_some_and(cond)
}

async fn both_sides_are_read_and_switched(kind: &str) {
    let Some((db1, db2, mut master, mut replica)) = start_both(kind).await else { return };
    master.until("read", |r| is(r, |s| !s.source && !s.waits && s.replicas == 0 && s.wait_count == 1)).await;
    // The I/O thread does not run: nothing is restarted.
    replica.step(switch(SemiSide::Replica, true)).await.unwrap();
    assert!(is(&replica.last, |s| s.replica && !s.acknowledges), "{:?}", replica.last.semisync);
    assert_eq!(replica.last.replication, None);
    replica.step(follow("db1")).await.unwrap();
    replica.until("acknowledging", |r| is(r, |s| s.acknowledges)).await;
    // Counted while the source side is off: this is how it is known when it may be switched on.
    master.until("attached", |r| is(r, |s| s.replicas == 1 && !s.source)).await;

    db1.sql(&format!("SET GLOBAL {}=3000", db1.words("rpl_semi_sync_master_timeout", "rpl_semi_sync_source_timeout")))
        .await;
    master.step(switch(SemiSide::Source, true)).await.unwrap();
    let fenced_within = config("db1", 1, 2).cluster.fenced_within();
    assert_eq!(master.last.semisync.as_ref().unwrap().in_effect(fenced_within), Ok(()));
    let begun = Instant::now();
    db1.sql("INSERT INTO app.t (id) VALUES (1)").await;
    assert!(begun.elapsed() < SECOND, "the first commit waited: {:?}", begun.elapsed());

    // The I/O thread runs: it connects again, and nothing is lost.
    for on in [false, true] {
        replica.step(switch(SemiSide::Replica, on)).await.unwrap();
        replica.until("as switched", |r| is(r, |s| s.replica == on && s.acknowledges == on)).await;
        assert!(replica.last.replication.as_ref().is_some_and(|r| r.io_running && r.sql_running));
        master.until("counted", |r| is(r, |s| s.replicas == u64::from(on))).await;
    }
    db1.sql("INSERT INTO app.t (id) VALUES (2)").await;
    replica.task(catch_up_with(&db1).await).await.unwrap();
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "2");
    master.step(switch(SemiSide::Source, false)).await.unwrap();
    assert!(is(&master.last, |s| !s.source && !s.waits));

    // Nothing of all this, nor of a move, is a transaction of its own.
    replica.step(Step::ReadOnly).await.unwrap();
    master.task(Work::Quiesce { grace_ms: 100, timeout_ms: 3000 }).await.unwrap();
    replica.task(Work::Drain { timeout_ms: 3000 }).await.unwrap();
    replica.step(writable()).await.unwrap();
    master.step(follow("db2")).await.unwrap();
    for side in [&master, &replica] {
        let executed = side.last.executed.as_ref().unwrap();
        let none = match executed {
            Gtids::MariaDb(_) => Gtids::MariaDb("".parse().unwrap()),
            Gtids::MySql(_) => Gtids::MySql("".parse().unwrap()),
        };
        assert_eq!(none.missing(executed), Some(2), "{executed}");
    }
}

/// With replicas that ask for a heartbeat every second, as the product's do.
async fn a_replica_that_died_without_a_word_stops_counting(kind: &str) {
    let Some((_db1, mut db2, mut master, mut replica)) = start_both(kind).await else { return };
    replica.step(switch(SemiSide::Replica, true)).await.unwrap();
    replica.step(follow("db1")).await.unwrap();
    master.until("attached", |r| is(r, |s| s.replicas == 1)).await;
    db2.kill9();
    db2.reap();
    let took = master.until("not counted", |r| is(r, |s| s.replicas == 0)).await;
    assert!(took < 4 * SECOND, "{took:?}");
}

async fn the_replica_side_is_not_switched_where_that_would_throw_the_relay_log_away(kind: &str) {
    let Some((_db1, db2, _, mut replica)) = start_both(kind).await else { return };
    replica.step(follow("db1")).await.unwrap();
    db2.sql(db2.words("STOP SLAVE SQL_THREAD", "STOP REPLICA SQL_THREAD")).await;
    for id in 1..=5 {
        _db1.sql(&format!("INSERT INTO app.t (id) VALUES ({id})")).await;
    }
    replica
        .until("received", |r| match (&r.replication, &r.executed) {
            (Some(r), Some(executed)) => r.received.as_ref().and_then(|x| executed.missing(x)) == Some(5),
            (..) => false,
        })
        .await;
    let answer = replica.step(switch(SemiSide::Replica, true)).await;
    if db2.is_mariadb() {
        let why = answer.unwrap_err();
        assert!(why.contains("SQL thread") && why.contains("relay log"), "{why}");
        assert!(is(&replica.last, |s| !s.replica), "not switched either, so that it is asked for again");
        assert_eq!(db2.status().await.text(&["Gtid_IO_Pos"]).unwrap(), "0-1-5");
    } else {
        answer.unwrap();
    }
    db2.sql(db2.words("START SLAVE SQL_THREAD", "START REPLICA SQL_THREAD")).await;
    replica.step(switch(SemiSide::Replica, true)).await.unwrap();
    replica.until("acknowledging", |r| is(r, |s| s.acknowledges)).await;
    replica.task(catch_up_with(&_db1).await).await.unwrap();
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "5");
}

/// The source side on with nobody there, and a long timeout: every commit waits.
async fn all_commits_wait(db1: &Instance) {
    let word = db1.words("master", "source");
    db1.sql(&format!(
        "SET GLOBAL rpl_semi_sync_{word}_timeout=30000, GLOBAL rpl_semi_sync_{word}_wait_point=AFTER_SYNC"
    ))
    .await;
    db1.sql(&format!("SET GLOBAL rpl_semi_sync_{word}_enabled=1")).await;
}

/// A commit by a client of its own, and when it is in its wait.
async fn waiting_commit(db1: &Instance, ip: &str, id: u32) -> tokio::task::JoinHandle<Result<(), mysql_async::Error>> {
    let mut app = db1.login("app", ip).await.unwrap();
    let commit = tokio::spawn(async move { app.query_drop(format!("INSERT INTO app.t (id) VALUES ({id})")).await });
    let until = Instant::now() + PATIENCE;
    let waiting = "SELECT COUNT(*) FROM information_schema.processlist WHERE INFO LIKE 'INSERT%' AND TIME >= 0 AND \
                   (STATE LIKE 'Waiting for semi-sync ACK%' OR STATE LIKE 'waiting for handler commit%' OR STATE='Commit')";
    while db1.sql(waiting).await == "0" {
        assert!(Instant::now() < until, "no commit waits");
        sleep(SECOND / 50).await;
    }
    commit
}

async fn read_only_gets_past_commits_that_wait_for_an_acknowledgement(kind: &str) {
    let Some(db1) = start_with(kind, 1, semisync_args(kind)).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    all_commits_wait(&db1).await;
    let mut commits = Vec::new();
    for id in 1..=3 {
        commits.push(waiting_commit(&db1, "127.0.0.1", id).await);
    }
    let begun = Instant::now();
    side.step(Step::ReadOnly).await.unwrap();
    assert!(begun.elapsed() < 2 * SECOND, "{:?}", begun.elapsed());
    assert_eq!(side.last.writing, Writing::ReadOnly);
    for commit in commits {
        assert!(timeout(SECOND, commit).await.expect("a client hangs").unwrap().is_err(), "nobody acknowledged it");
    }
    // What waits is in the binary log, and so in what is reported. One that is only in line for it may be taken back.
    let there: usize = db1.sql("SELECT COUNT(*) FROM app.t").await.parse().unwrap();
    assert!((1..=3).contains(&there), "{there}");
    let before = side.last.executed.clone();
    side.until("the same", |r| r.executed == before).await;
    assert!(before.is_some_and(|g| !g.to_string().is_empty()));
}

/// A long transaction, a long statement, somebody who never reads what he asked for, a commit that waits, and
/// somebody who comes again and again: the move ends in time, and a reader elsewhere notices nothing.
async fn a_planned_move_is_over_in_time_whoever_holds_it_up(kind: &str) {
    let Some(db1) = start_with(kind, 1, semisync_args(kind)).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    db1.sql("INSERT INTO app.t (id) VALUES (1), (2), (3), (4), (5), (6), (7), (8)").await;
    let mut long = db1.login("app", WRITER).await.unwrap();
    long.query_drop("START TRANSACTION; INSERT INTO app.t (id) VALUES (100)").await.unwrap();
    let mut statement = db1.app().await;
    let statement =
        tokio::spawn(async move { statement.query_drop("UPDATE app.t SET id=id+SLEEP(30) WHERE id=1").await });
    let mut reader = db1.app().await;
    let reader = tokio::spawn(async move {
        let n: Option<u64> = reader.query_first("SELECT COUNT(*) + SLEEP(8) FROM (SELECT 1) AS one").await?;
        Ok::<_, mysql_async::Error>(n)
    });
    let mut never_reads = db1.login("app", WRITER).await.unwrap();
    let big = "SELECT REPEAT('x', 1000000) FROM app.t a, app.t b, app.t c";
    let mut rows = never_reads.query_iter(big).await.unwrap();
    // One row read, and then no more.
    assert!(rows.next().await.unwrap().is_some());
    all_commits_wait(&db1).await;
    let commit = waiting_commit(&db1, WRITER, 200).await;
    let (port, stop) = (db1.port, Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let again = tokio::spawn({
        let stop = Arc::clone(&stop);
        async move {
            let opts = mysql_async::OptsBuilder::default()
                .ip_or_hostname(WRITER)
                .tcp_port(port)
                .user(Some("app"))
                .pass(Some("app"))
                .prefer_socket(false);
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                if let Ok(mut conn) = Conn::new(opts.clone()).await {
                    let _refused = conn.query_drop("UPDATE app.t SET id=id WHERE id=2").await;
                }
            }
        }
    });
    let begun = Instant::now();
    let position = side.task(Work::Quiesce { grace_ms: 500, timeout_ms: 6000 }).await.unwrap();
    let took = begun.elapsed();
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(took < 5 * SECOND, "{took:?}");
    assert_eq!(side.last.writing, Writing::ReadOnly);
    side.until("standing still", |r| r.executed == position).await;
    for (name, result) in [
        ("a long transaction", timeout(SECOND, long.query_drop("COMMIT")).await),
        ("a long statement", timeout(SECOND, statement).await.map(Result::unwrap)),
        ("a commit that waits", timeout(SECOND, commit).await.map(Result::unwrap)),
    ] {
        assert!(result.unwrap_or_else(|_| panic!("{name}: the client hangs")).is_err(), "{name}");
    }
    drop(rows);
    assert_eq!(db1.sql("SELECT COUNT(*) FROM app.t WHERE id=100").await, "0");
    let read = timeout(PATIENCE, reader).await.expect("the reader hangs").unwrap();
    assert_eq!(read.unwrap(), Some(1), "who reads elsewhere is left alone");
    timeout(PATIENCE, again).await.unwrap().unwrap();
}

/// Stopping the I/O thread asks a hung master to end the connection (MariaDB, semi-sync on).
async fn a_drain_is_not_held_up_by_a_hung_master(kind: &str) {
    let Some((db1, db2, mut master, mut replica)) = start_both(kind).await else { return };
    replica.step(switch(SemiSide::Replica, true)).await.unwrap();
    replica.step(follow("db1")).await.unwrap();
    master.until("attached", |r| is(r, |s| s.replicas == 1)).await;
    master.step(switch(SemiSide::Source, true)).await.unwrap();
    db2.sql(db2.words("STOP SLAVE SQL_THREAD", "STOP REPLICA SQL_THREAD")).await;
    for id in 1..=5 {
        db1.sql(&format!("INSERT INTO app.t (id) VALUES ({id})")).await;
    }
    db1.pause();
    let begun = Instant::now();
    replica.task(Work::Drain { timeout_ms: 8000 }).await.unwrap();
    assert!(begun.elapsed() < 4 * SECOND, "{:?}", begun.elapsed());
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "5", "acknowledged, so not to be lost");
    db1.go_on();
}

/// As before, with the SQL thread at work: MariaDB's I/O thread tries to log in to the hung master for a second or longer,
/// and the drain is over by then. A busy machine may be slower than that, but not every time.
async fn a_drain_does_not_wait_for_the_end_of_a_thread_that_takes_nothing_more(kind: &str) {
    let mut over_first = false;
    for _attempt in 0..3 {
        let Some((db1, db2, mut master, mut replica)) = start_both(kind).await else { return };
        replica.step(switch(SemiSide::Replica, true)).await.unwrap();
        replica.step(follow("db1")).await.unwrap();
        master.until("attached", |r| is(r, |s| s.replicas == 1)).await;
        master.step(switch(SemiSide::Source, true)).await.unwrap();
        let mut lock = db2.boss().await;
        lock.query_drop("LOCK TABLES app.t READ").await.unwrap();
        for id in 1..=5 {
            db1.sql(&format!("INSERT INTO app.t (id) VALUES ({id})")).await;
        }
        db1.pause();
        let unlock = tokio::spawn(async move {
            sleep(SECOND / 10).await;
            lock.query_drop("UNLOCK TABLES").await.unwrap();
        });
        replica.task(Work::Drain { timeout_ms: 8000 }).await.unwrap();
        let stopping = "SELECT COUNT(*) FROM information_schema.processlist WHERE STATE LIKE 'Killing%'";
        over_first = db2.sql(stopping).await == "1";
        assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "5", "acknowledged, so not to be lost");
        unlock.await.unwrap();
        let until = Instant::now() + PATIENCE;
        while db2.status().await.text(&["Slave_IO_Running", "Replica_IO_Running"]).unwrap() != "No" {
            assert!(Instant::now() < until, "the I/O thread does not end");
            sleep(SECOND / 20).await;
        }
        db1.go_on();
        if over_first || !db2.is_mariadb() {
            break;
        }
    }
    assert!(over_first || kind.starts_with("mysql"), "the drain has waited for the STOP");
}

/// It has changed nothing yet that InnoDB would show.
async fn a_long_statement_gets_the_grace(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    db1.sql("INSERT INTO app.t (id) VALUES (1)").await;
    let mut app = db1.login("app", WRITER).await.unwrap();
    let update = tokio::spawn(async move { app.query_drop("UPDATE app.t SET id=SLEEP(4) WHERE id=1").await });
    let running = "SELECT COUNT(*) FROM information_schema.processlist WHERE INFO LIKE 'UPDATE%' AND TIME >= 2";
    let until = Instant::now() + PATIENCE;
    while db1.sql(running).await == "0" {
        assert!(Instant::now() < until, "the update does not run for long");
        sleep(SECOND / 20).await;
    }
    let begun = Instant::now();
    side.task(Work::Quiesce { grace_ms: 8000, timeout_ms: 20_000 }).await.unwrap();
    assert!(begun.elapsed() < 7 * SECOND, "the grace ends with the statement: {:?}", begun.elapsed());
    timeout(SECOND, update).await.expect("the client hangs").unwrap().expect("it was waited for");
    assert_eq!(db1.sql("SELECT id FROM app.t").await, "0");
}

/// MariaDB: who has READ ONLY ADMIN and comes again at once after each KILL; whether the move fails or is done between two
/// visits is chance, and in time. MySQL's super_read_only stops everybody.
async fn somebody_who_may_write_anyway_and_never_stops_hangs_no_move(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    let (port, stop) = (db1.port, Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let comes = |stop: Arc<std::sync::atomic::AtomicBool>| async move {
        let opts = mysql_async::OptsBuilder::default()
            .ip_or_hostname("127.0.0.1")
            .tcp_port(port)
            .user(Some("boss"))
            .pass(Some("boss"))
            .prefer_socket(false);
        while !stop.load(std::sync::atomic::Ordering::Relaxed) {
            if let Ok(mut conn) = Conn::new(opts.clone()).await {
                while !stop.load(std::sync::atomic::Ordering::Relaxed)
                    && conn.query_drop("INSERT INTO app.t (id) VALUES (1)").await.is_ok()
                {}
            }
        }
    };
    let clients: Vec<_> = (0..4).map(|_| tokio::spawn(comes(Arc::clone(&stop)))).collect();
    sleep(SECOND / 4).await;
    let begun = Instant::now();
    let result = side.task(Work::Quiesce { grace_ms: 100, timeout_ms: 2000 }).await;
    let took = begun.elapsed();
    match result {
        Err(why) => {
            assert!(db1.is_mariadb() && why.contains("read_only was switched on"), "{why}");
            assert_eq!(db1.sql("SELECT @@GLOBAL.read_only").await, "1");
        }
        Ok(position) => {
            side.until("read-only", |r| r.writing == Writing::ReadOnly).await;
            assert!(db1.is_mariadb() || side.last.executed == position, "super_read_only stops everybody");
        }
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for client in clients {
        timeout(PATIENCE, client).await.unwrap().unwrap();
    }
    assert!(took < 4 * SECOND, "{took:?}");
}

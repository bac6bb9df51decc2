//! Stories on real servers, each told for every kind that is unpacked on this machine.

mod examine;
mod servers;

use super::Database;
use crate::clock;
use mmm_agent_core::io::{Input, Step};
use mmm_common::config::{Agent, Cluster, Host, Role, Secret};
use mmm_common::epoch::Epoch;
use mmm_common::gtid::Gtids;
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::{Task, Work};
use mmm_common::position::Position;
use mmm_common::report::{Life, ServerReport, TaskOutcome, Writing};
use mmm_common::state::{HostMode, RoleMode};
use mysql_async::Conn;
use mysql_async::prelude::Queryable;
use servers::{AGENT_PASSWORD, Instance, REPLICATION_PASSWORD, WRITER, start};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);
const HANG: Duration = SECOND;
const PATIENCE: Duration = Duration::from_secs(15);

macro_rules! stories {
    ($($name:ident),* $(,)?) => {
        mod mariadb_10_11 { $(#[tokio::test] async fn $name() { super::$name("mariadb-10.11").await })* }
        mod mariadb_11_8 { $(#[tokio::test] async fn $name() { super::$name("mariadb-11.8").await })* }
        mod mysql_9_7 { $(#[tokio::test] async fn $name() { super::$name("mysql-9.7").await })* }
    };
}

mod fetch;
mod log_position;
mod relay_log;
mod saturated;
mod semisync;

stories!(
    a_killed_server_is_dead_at_once_and_alive_again_after_its_start,
    a_clean_shutdown_is_death_too,
    the_replication_status_is_read_again_after_a_restart,
    a_stopped_server_is_hung_after_the_timeout_and_alive_when_it_goes_on,
    who_is_not_let_in_or_may_not_look_says_what_is_missing,
    a_saturated_server_is_alive_to_who_is_in_and_unknown_to_who_is_not,
    read_only_gets_past_lock_tables_and_running_updates,
    writable_is_not_begun_after_the_lease,
    the_last_word_wins_between_writable_and_read_only,
    quiesce_loses_no_acknowledged_write,
    idle_clients_cost_a_move_nothing_and_an_open_transaction_only_the_grace,
    quiesce_refuses_prepared_transactions_and_leaves_the_server_writable,
    a_quiesce_that_cannot_make_it_read_only_gives_up,
    a_failed_quiesce_leaves_the_server_read_only,
    a_hung_server_is_not_heaped_with_broken_logins,
    a_follow_again_starts_what_is_stopped_and_names_what_stops_again,
    a_drain_and_a_follow_do_not_mix,
    the_writer_moves_there_and_back,
    a_detached_server_has_nobody_to_fetch_from_when_it_starts_again,
    drain_applies_what_was_received_with_the_sql_thread_stopped,
    what_cannot_be_applied_is_not_thrown_away,
    catching_up_fails_at_once_when_the_sql_thread_is_stopped,
    a_long_task_holds_nothing_up_and_a_new_one_ends_it,
    a_wrong_login_for_replication_is_told_without_the_password,
);

fn host(port: u16, peer: &str) -> Host {
    Host {
        ip: "127.0.0.1".parse().unwrap(),
        mode: HostMode::Master,
        peer: Some(peer.into()),
        cluster_interface: "lo".to_owned(),
        agent_port: 9989,
        mysql_port: port,
        agent_user: "mmm_agent".to_owned(),
        agent_password: Secret(AGENT_PASSWORD.to_owned()),
        replication_user: "replication".to_owned(),
        replication_password: Secret(REPLICATION_PASSWORD.to_owned()),
        monitor_user: String::new(),
        monitor_password: Secret::default(),
    }
}

/// db1 and db2 at these ports, `this` being the agent's.
fn config(this: &str, db1: u16, db2: u16) -> Agent {
    let roles = [(
        "writer".into(),
        Role {
            mode: RoleMode::Exclusive,
            hosts: vec!["db1".into(), "db2".into()],
            ips: vec![WRITER.parse().unwrap()],
            prefer: None,
        },
    )];
    let hosts = [("db1".into(), host(db1, "db2")), ("db2".into(), host(db2, "db1"))].into();
    Agent::of(Cluster { hang_timeout: HANG, ..Cluster::of(hosts, roles.into()) }, this.into())
}

/// The database side of one agent, and what it has said.
struct Side {
    database: Database,
    inputs: UnboundedReceiver<Input>,
    last: ServerReport,
    tasks: u64,
}

impl Side {
    fn of(config: Agent) -> Side {
        let (tell, inputs) = unbounded_channel();
        let database = Database::start(Arc::new(config), tell);
        Side { database, inputs, last: ServerReport::unknown("test"), tasks: 0 }
    }

    /// An agent for one server alone.
    fn alone(db1: &Instance) -> Side {
        Side::of(config("db1", db1.port, 1))
    }

    async fn next(&mut self, limit: Duration) -> Input {
        let input =
            timeout(limit, self.inputs.recv()).await.unwrap_or_else(|_| panic!("no input; last {:?}", self.last));
        let input = input.unwrap();
        if let Input::Server(report) = &input {
            self.last = report.clone();
        }
        input
    }

    /// Waits for such a report; panics with the last one when it does not come.
    async fn until(&mut self, what: &str, cond: impl Fn(&ServerReport) -> bool) -> Duration {
        let begun = Instant::now();
        loop {
            let rest = (begun + PATIENCE).saturating_duration_since(Instant::now());
            assert!(!rest.is_zero(), "not {what}: {:?}", self.last);
            if let Input::Server(report) = self.next(rest).await
                && cond(&report)
            {
                return begun.elapsed();
            }
        }
    }

    async fn alive(&mut self) {
        self.until("alive", |r| r.life == Life::Alive).await;
    }

    async fn step(&mut self, step: Step) -> Result<(), String> {
        self.database.queue(step.clone());
        self.done(step).await
    }

    async fn done(&mut self, step: Step) -> Result<(), String> {
        loop {
            if let Input::Done { step: this, result } = self.next(PATIENCE).await
                && this == step
            {
                return result;
            }
        }
    }

    async fn task(&mut self, work: Work) -> Result<Option<Gtids>, String> {
        Ok(self.task_at(work).await?.and_then(|at| at.gtids().cloned()))
    }

    async fn task_at(&mut self, work: Work) -> Result<Option<Position>, String> {
        self.tasks += 1;
        let id = Epoch(self.tasks);
        self.database.queue(Step::Task(Task { id, work }));
        loop {
            if let Input::TaskDone { id: this, outcome } = self.next(PATIENCE).await {
                assert_eq!(this, id);
                return match outcome {
                    TaskOutcome::Done { position } => Ok(position),
                    TaskOutcome::Failed { why } => Err(why),
                    TaskOutcome::Running => panic!("an ended task is not running"),
                };
            }
        }
    }
}

fn writable() -> Step {
    Step::Writable { until: clock::now() + 60 * SECOND }
}

fn follow(name: &str) -> Step {
    Step::Follow { host: HostName::from(name) }
}

/// Until everything that this server has executed is applied.
async fn catch_up_with(db: &Instance) -> Work {
    let mut side = Side::alone(db);
    side.until("read", |r| r.executed.is_some()).await;
    catch_up(side.last.executed.clone())
}

fn catch_up(position: Option<Gtids>) -> Work {
    Work::CatchUp { position: position.unwrap().into(), timeout_ms: 5000 }
}

// lessons.md 17
async fn a_killed_server_is_dead_at_once_and_alive_again_after_its_start(kind: &str) {
    let Some(mut db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.until("alive and writing", |r| r.life == Life::Alive && r.writing == Writing::Allowed).await;
    // Long enough for the tripwire to be set.
    sleep(SECOND / 4).await;
    db1.kill9();
    let took = side.until("dead", |r| matches!(r.life, Life::Dead { .. })).await;
    assert!(took < 2 * SECOND, "{took:?}");
    let Life::Dead { why, .. } = &side.last.life else { unreachable!() };
    assert!(why.contains("broke") && why.contains("refused"), "{why}");
    assert_eq!(side.last.writing, Writing::Unknown);
    db1.reap();
    db1.run().await;
    side.alive().await;
}

/// Found by the chaos campaign: one failed look at it was the last.
async fn the_replication_status_is_read_again_after_a_restart(kind: &str) {
    let (Some(db1), Some(mut db2)) = (start(kind, 1).await, start(kind, 2).await) else { return };
    let mut side = Side::of(config("db2", db1.port, db2.port));
    side.step(follow("db1")).await.unwrap();
    let fresh = |r: &ServerReport| r.replication.as_ref().is_some_and(|r| r.io_running && r.error.is_empty());
    side.until("following", fresh).await;
    db2.kill9();
    side.until("dead", |r| matches!(r.life, Life::Dead { .. })).await;
    db2.reap();
    db2.run().await;
    side.alive().await;
    db2.sql(db2.words("START SLAVE", "START REPLICA")).await;
    side.until("following again, as the server itself says", fresh).await;
}

async fn a_clean_shutdown_is_death_too(kind: &str) {
    let Some(mut db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    db1.sql("SHUTDOWN").await;
    side.until("dead", |r| matches!(r.life, Life::Dead { .. })).await;
    db1.reap();
}

// lessons.md 12
async fn a_stopped_server_is_hung_after_the_timeout_and_alive_when_it_goes_on(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    db1.pause();
    let took = side.until("hung", |r| matches!(r.life, Life::Hung { .. })).await;
    assert!(took > HANG / 2 && took < 3 * HANG, "{took:?}");
    assert_eq!(side.last.writing, Writing::Unknown);
    let begun = Instant::now();
    let refused = side.step(Step::ReadOnly).await.unwrap_err();
    assert!(refused.contains("no answer") && begun.elapsed() < 4 * SECOND, "{refused} {:?}", begun.elapsed());
    db1.go_on();
    side.until("alive", |r| r.life == Life::Alive && r.writing == Writing::Allowed).await;
    side.step(Step::ReadOnly).await.unwrap();
}

async fn who_is_not_let_in_or_may_not_look_says_what_is_missing(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let unknown = async |change: fn(&mut Host)| {
        let mut config = config("db1", db1.port, 1);
        change(config.cluster.hosts.get_mut(&HostName::from("db1")).unwrap());
        let mut side = Side::of(config);
        side.until("a look", |r| r.life != ServerReport::unknown("not looked at yet").life).await;
        let Life::Unknown { why } = side.last.life else { panic!("{:?}", side.last) };
        why
    };
    let why = unknown(|h| h.agent_password = Secret("secret-and-wrong".to_owned())).await;
    assert!(why.contains("1045") && why.contains("'mmm_agent'") && !why.contains("secret"), "{why}");
    let why = unknown(|h| h.agent_user = "blind_agent".to_owned()).await;
    assert!(why.contains("1227") && why.contains(db1.words("SLAVE MONITOR", "REPLICATION CLIENT")), "{why}");
}

/// The agent's logins that wait for something to do, once they are all there.
async fn all_logins_open(db: &Instance) -> BTreeSet<u64> {
    let mine = "SELECT GROUP_CONCAT(ID) FROM information_schema.processlist WHERE USER='mmm_agent' AND COMMAND='Sleep'";
    let until = Instant::now() + PATIENCE;
    loop {
        let ids: BTreeSet<u64> = db.sql(mine).await.split(',').filter_map(|id| id.parse().ok()).collect();
        if ids.len() >= 6 {
            return ids;
        }
        assert!(Instant::now() < until, "not all logins are open: {ids:?}");
        sleep(SECOND / 20).await;
    }
}

// lessons.md 15
async fn a_saturated_server_is_alive_to_who_is_in_and_unknown_to_who_is_not(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    all_logins_open(&db1).await;
    db1.sql("SET GLOBAL max_connections=15").await;
    let mut crowd: Vec<Conn> = Vec::new();
    // On a busy machine the agent gives a login up and takes another one: somebody has to stand in line for that place.
    let until = Instant::now() + PATIENCE;
    loop {
        while let Ok(conn) = db1.login("app", "127.0.0.1").await {
            crowd.push(conn);
            assert!(crowd.len() < 30);
        }
        // The one place more, for those with CONNECTION ADMIN, unless the agent has it.
        let _extra = db1.login("boss", "127.0.0.1").await;
        let mut other = Side::alone(&db1);
        other.until("a look", |r| r.life != ServerReport::unknown("not looked at yet").life).await;
        let found = &other.last.life;
        if matches!(found, Life::Unknown { why } if why.contains("1040")) {
            break;
        }
        assert!(Instant::now() < until, "the other one is not refused: {found:?}");
    }
    side.step(Step::ReadOnly).await.unwrap();
    assert_eq!((&side.last.life, side.last.writing), (&Life::Alive, Writing::ReadOnly));
}

async fn read_only_gets_past_lock_tables_and_running_updates(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    db1.sql("INSERT INTO app.t (id) VALUES (1)").await;

    let mut locking = db1.app().await;
    locking.query_drop("LOCK TABLES app.t WRITE").await.unwrap();
    let begun = Instant::now();
    side.step(Step::ReadOnly).await.unwrap();
    assert!(begun.elapsed() < 3 * SECOND);
    assert_eq!(side.last.writing, Writing::ReadOnly, "the report came before the answer");
    assert_eq!(db1.sql("SELECT @@GLOBAL.read_only").await, "1");

    side.step(writable()).await.unwrap();
    side.until("open, as the watcher sees it", |r| r.writing == Writing::Allowed).await;

    let mut updating = db1.app().await;
    let update = tokio::spawn(async move { updating.query_drop("UPDATE app.t SET id=id+SLEEP(20)").await });
    // In a transaction of its own, not holding anything up: it lives, and its COMMIT is refused.
    let mut open = db1.app().await;
    open.query_drop("START TRANSACTION; INSERT INTO app.t (id) VALUES (2)").await.unwrap();
    sleep(SECOND / 4).await;
    side.step(Step::ReadOnly).await.unwrap();
    assert!(timeout(SECOND, update).await.unwrap().unwrap().is_err(), "the update was killed");
    let refused = open.query_drop("COMMIT").await.unwrap_err().to_string();
    assert!(refused.contains("1290"), "{refused}");
    assert_eq!(db1.sql("SELECT COUNT(*) FROM app.t").await, "1");
}

async fn writable_is_not_begun_after_the_lease(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.step(Step::ReadOnly).await.unwrap();
    let late = side.step(Step::Writable { until: Millis(clock::now().0 - 1) }).await.unwrap_err();
    assert!(late.contains("lease"), "{late}");
    assert_eq!(db1.sql("SELECT @@GLOBAL.read_only").await, "1");
}

async fn the_last_word_wins_between_writable_and_read_only(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    for _ in 0..20 {
        side.database.queue(writable());
        // Sometimes it has begun by then, sometimes not.
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        side.step(Step::ReadOnly).await.unwrap();
        assert_eq!(side.last.writing, Writing::ReadOnly);
        assert_eq!(db1.sql("SELECT @@GLOBAL.read_only").await, "1");
    }
    side.step(writable()).await.unwrap();
    assert_eq!(db1.sql("SELECT @@GLOBAL.read_only").await, "0");
}

async fn quiesce_loses_no_acknowledged_write(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    let mut idle_on_writer = db1.login("app", WRITER).await.unwrap();
    let mut idle_elsewhere = db1.app().await;
    let mut may_write_anyway = db1.boss().await;
    let mut writers = Vec::new();
    for client in 0..6u64 {
        let mut conn = db1.login("app", if client % 2 == 0 { WRITER } else { "127.0.0.1" }).await.unwrap();
        writers.push(tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for n in 0u64.. {
                let id = client * 1_000_000 + n;
                let sql = if n % 3 == 0 {
                    format!("START TRANSACTION; INSERT INTO app.t (id) VALUES ({id}); COMMIT")
                } else {
                    format!("INSERT INTO app.t (id) VALUES ({id})")
                };
                match conn.query_drop(sql).await {
                    Ok(()) => acknowledged.push(id),
                    Err(_) => break,
                }
            }
            acknowledged
        }));
    }
    sleep(SECOND / 2).await;
    let position = side.task(Work::Quiesce { grace_ms: 300, timeout_ms: 3000 }).await.unwrap().unwrap();
    assert_eq!(side.last.writing, Writing::ReadOnly, "the report came before the answer");
    let rows: BTreeSet<u64> = {
        let rows: Vec<u64> = db1.boss().await.query("SELECT id FROM app.t").await.unwrap();
        rows.into_iter().collect()
    };
    let mut acknowledged = 0;
    for writer in writers {
        let ids = timeout(PATIENCE, writer).await.expect("a client hangs").unwrap();
        acknowledged += ids.len();
        assert!(ids.iter().all(|id| rows.contains(id)), "an acknowledged write is lost");
    }
    assert!(acknowledged > 50, "{acknowledged} writes are no load");
    // Nothing came after the position: what the server has executed by now is exactly it.
    side.until("reported", |r| r.executed.is_some()).await;
    assert_eq!(side.last.executed.as_ref(), Some(&position));
    assert!(idle_on_writer.query_drop("DO 1").await.is_err(), "idle sessions on the writer's address are closed");
    idle_elsewhere.query_drop("DO 1").await.unwrap();
    // Under MySQL's super_read_only nobody may.
    assert_eq!(may_write_anyway.query_drop("DO 1").await.is_err(), db1.is_mariadb(), "who may write under read_only");
}

// lessons.md 16
async fn idle_clients_cost_a_move_nothing_and_an_open_transaction_only_the_grace(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    let grace = 2 * SECOND;
    let quiesce = || Work::Quiesce { grace_ms: 2000, timeout_ms: 8000 };
    // A pool of connections, one of them in a transaction that has read only.
    let mut pool = Vec::new();
    for _ in 0..20 {
        pool.push(db1.login("app", WRITER).await.unwrap());
    }
    pool[0].query_drop("START TRANSACTION; SELECT * FROM app.t").await.unwrap();
    let begun = Instant::now();
    side.task(quiesce()).await.unwrap();
    assert!(begun.elapsed() < grace / 2, "idle connections were waited for: {:?}", begun.elapsed());
    for conn in &mut pool {
        let end = timeout(SECOND, conn.query_drop("DO 1")).await.expect("an idle client hangs");
        assert!(end.is_err(), "an idle connection is left open");
    }

    side.step(writable()).await.unwrap();
    let mut open = db1.login("app", WRITER).await.unwrap();
    open.query_drop("START TRANSACTION; INSERT INTO app.t (id) VALUES (1)").await.unwrap();
    // Longer than InnoDB goes on showing the list of transactions that the first one read.
    sleep(SECOND / 5).await;
    let begun = Instant::now();
    side.task(quiesce()).await.unwrap();
    let took = begun.elapsed();
    assert!(took > grace / 2 && took < 2 * grace, "the grace is {grace:?}, it took {took:?}");
    assert!(timeout(SECOND, open.query_drop("COMMIT")).await.expect("the client hangs").is_err());
    assert_eq!(db1.sql("SELECT COUNT(*) FROM app.t").await, "0");
}

/// Somebody who is never killed holds a lock.
async fn a_quiesce_that_cannot_make_it_read_only_gives_up(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut config = config("db1", db1.port, 1);
    config.cluster.hosts.get_mut(&HostName::from("db1")).unwrap().monitor_user = "app".to_owned();
    let mut side = Side::of(config);
    side.alive().await;
    let mut spared = db1.app().await;
    spared.query_drop("LOCK TABLES app.t WRITE").await.unwrap();
    let begun = Instant::now();
    let why = side.task(Work::Quiesce { grace_ms: 100, timeout_ms: 500 }).await.unwrap_err();
    // Free now: were the statement that was given up still waiting, it would come true.
    spared.query_drop("UNLOCK TABLES").await.unwrap();
    assert!(begun.elapsed() < 2 * SECOND, "{:?}", begun.elapsed());
    assert!(why.contains("not done") && !why.contains("read_only was switched on"), "{why}");
    sleep(SECOND).await;
    spared.query_drop("INSERT INTO app.t (id) VALUES (1)").await.unwrap();
    assert_eq!(db1.sql("SELECT @@GLOBAL.read_only").await, "0");
    spared.query_drop("LOCK TABLES app.t WRITE").await.unwrap();
    let begun = Instant::now();
    let why = side.step(Step::ReadOnly).await.unwrap_err();
    assert!(begun.elapsed() < 5 * SECOND, "{:?}", begun.elapsed());
    assert!(why.contains("not done"), "{why}");
    assert_eq!(side.last.writing, Writing::Allowed);
}

/// Only an order to open it has a right to: a quiesce that fails late may end when another is the writer already.
async fn a_failed_quiesce_leaves_the_server_read_only(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    // A busy machine may not get as far as read_only in the shortest of these times.
    let mut found = Vec::new();
    for timeout_ms in [100, 100, 300, 300, 900] {
        // Its rollback takes longer than the move has time.
        let mut app = db1.login("app", WRITER).await.unwrap();
        app.query_drop("START TRANSACTION; INSERT INTO app.t (id) VALUES (1)").await.unwrap();
        for _ in 0..18 {
            app.query_drop("INSERT INTO app.t (id) SELECT id FROM app.t").await.unwrap();
        }
        let ended = side.task(Work::Quiesce { grace_ms: 0, timeout_ms }).await;
        if ended.as_ref().is_err_and(|why| why.contains("did not end after KILL")) {
            found = vec![ended];
            break;
        }
        found.push(ended);
        side.step(writable()).await.unwrap();
    }
    let Some(Err(why)) = found.pop().filter(|_| found.is_empty()) else {
        // MySQL takes a killed session off its list before its rollback has ended.
        assert!(kind.starts_with("mysql") && found.iter().all(Result::is_ok), "{found:?}");
        return;
    };
    assert!(why.contains("read_only was switched on"), "{why}");
    assert_eq!(side.last.writing, Writing::ReadOnly, "the report came before the answer");
    assert_eq!(db1.sql("SELECT @@GLOBAL.read_only").await, "1");
    side.step(writable()).await.unwrap();
    assert_eq!(db1.sql("SELECT @@GLOBAL.read_only").await, "0");
}

/// After max_connect_errors of them it lets nobody in from there any more (1129).
async fn a_hung_server_is_not_heaped_with_broken_logins(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    let logins = all_logins_open(&db1).await;
    let aborted = async || -> u64 {
        let sql = "SHOW GLOBAL STATUS LIKE 'Aborted_connects'";
        let row: Option<(String, String)> = db1.boss().await.query_first(sql).await.unwrap();
        row.unwrap().1.parse().unwrap()
    };
    let before = aborted().await;
    db1.pause();
    sleep(12 * SECOND).await;
    db1.go_on();
    side.alive().await;
    let again = all_logins_open(&db1).await;
    assert_ne!(logins, again, "those that gave no answer are given up");
    let broken = aborted().await - before;
    assert!(broken <= 2, "{broken} logins were begun and given up");
}

/// As after a Follow that was given up after its CHANGE.
async fn a_follow_again_starts_what_is_stopped_and_names_what_stops_again(kind: &str) {
    let Some((db1, db2, mut side)) = received_not_applied(kind).await else { return };
    let received = side.last.replication.as_ref().unwrap().received.clone();
    db2.sql(db2.words("STOP SLAVE", "STOP REPLICA")).await;
    if db2.is_mariadb() {
        // Its START throws the relay log away, so the source must be there. A CHANGE would set this again.
        db2.sql("CHANGE MASTER TO MASTER_CONNECT_RETRY=7").await;
        side.step(follow("db1")).await.unwrap();
        assert_eq!(db2.status().await.text(&["Connect_Retry"]).unwrap(), "7");
    } else {
        // After a CHANGE nothing of it would be left.
        db1.pause();
        side.step(follow("db1")).await.unwrap();
        side.task(catch_up(received.clone())).await.unwrap();
        db1.go_on();
    }
    side.task(catch_up(received)).await.unwrap();
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "5");

    // The next row collides with one that was written here behind everybody's back.
    db2.sql("SET GLOBAL read_only=0").await;
    let mut boss = db2.boss().await;
    boss.query_drop("SET sql_log_bin=0").await.unwrap();
    boss.query_drop("INSERT INTO app.t (n, id) VALUES (6, 99)").await.unwrap();
    db1.sql("INSERT INTO app.t (n, id) VALUES (6, 6)").await;
    side.until("stopped", |r| r.replication.as_ref().is_some_and(|r| !r.sql_running)).await;
    for both in [false, true] {
        if both {
            db2.sql(db2.words("STOP SLAVE", "STOP REPLICA")).await;
        }
        let why = side.step(follow("db1")).await.unwrap_err();
        // MySQL tells of a worker of many (3030).
        assert!(why.contains("SQL thread") && (why.contains("1062") || why.contains("3030")), "{why}");
    }
}

/// A Follow changes the source while a drain begins: the drain's word on what was received would not be the last.
async fn a_drain_and_a_follow_do_not_mix(kind: &str) {
    let (Some(db1), Some(db2)) = (start(kind, 1).await, start(kind, 2).await) else { return };
    let mut side = Side::of(config("db2", db1.port, db2.port));
    side.step(follow("db1")).await.unwrap();
    // The same server at another address is another source.
    let elsewhere = [
        "STOP SLAVE; CHANGE MASTER TO MASTER_HOST='127.0.0.50'; START SLAVE",
        "STOP REPLICA; CHANGE REPLICATION SOURCE TO SOURCE_HOST='127.0.0.50'; START REPLICA",
    ];
    db2.boss().await.query_drop(db2.words(elsewhere[0], elsewhere[1])).await.unwrap();
    let mut lock = db2.boss().await;
    lock.query_drop("LOCK TABLES app.t READ").await.unwrap();
    db1.sql("INSERT INTO app.t (id) VALUES (1)").await;
    side.until("received", |r| {
        r.replication.as_ref().is_some_and(|x| x.io_running && x.received.is_some() && x.received != r.executed)
    })
    .await;
    side.database.queue(follow("db1"));
    side.until("waiting for what was received", |r| r.replication.as_ref().is_some_and(|r| !r.io_running)).await;

    let begun = Instant::now();
    let why = side.task(Work::Drain { timeout_ms: 500 }).await.unwrap_err();
    assert!(begun.elapsed() < 2 * SECOND, "{:?}", begun.elapsed());
    assert!(why.contains("500 ms") && why.contains("under way"), "{why}");

    let id = Epoch(100);
    side.database.queue(Step::Task(Task { id, work: Work::Drain { timeout_ms: 8000 } }));
    sleep(SECOND / 4).await;
    lock.query_drop("UNLOCK TABLES").await.unwrap();
    let (mut drained, mut followed) = (None, false);
    while drained.is_none() || !followed {
        let input = side.next(PATIENCE).await;
        followed |= matches!(input, Input::Done { .. });
        if let Input::TaskDone { id: this, outcome } = input
            && this == id
        {
            drained = Some(outcome);
        }
    }
    assert!(matches!(drained, Some(TaskOutcome::Done { position: Some(_) })), "{drained:?}");
    assert_eq!(db2.status().await.text(&["Slave_IO_Running", "Replica_IO_Running"]).unwrap(), "No", "{drained:?}");
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "1");
}

async fn quiesce_refuses_prepared_transactions_and_leaves_the_server_writable(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    let mut app = db1.app().await;
    for sql in ["XA START 'shop42'", "INSERT INTO app.t (id) VALUES (1)", "XA END 'shop42'", "XA PREPARE 'shop42'"] {
        app.query_drop(sql).await.unwrap();
    }
    let why = side.task(Work::Quiesce { grace_ms: 100, timeout_ms: 1000 }).await.unwrap_err();
    assert!(why.contains("shop42"), "{why}");
    assert_eq!(db1.sql("SELECT @@GLOBAL.read_only").await, "0");
}

// lessons.md 5
async fn the_writer_moves_there_and_back(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let Some(db2) = start(kind, 2).await else { return };
    let servers = [&db1, &db2];
    let mut sides = [Side::of(config("db1", db1.port, db2.port)), Side::of(config("db2", db1.port, db2.port))];
    let names = ["db1", "db2"];
    sides[1].step(Step::ReadOnly).await.unwrap();
    db1.sql("INSERT INTO app.t (id) VALUES (0)").await;
    sides[1].step(follow("db1")).await.unwrap();
    assert!(sides[1].last.replication.as_ref().is_some_and(|r| r.io_running && r.sql_running && r.port == db1.port));
    // Asked again, nothing is done.
    sides[1].step(follow("db1")).await.unwrap();
    for turn in 0..4usize {
        let (from, to) = (turn % 2, (turn + 1) % 2);
        servers[from].sql(&format!("INSERT INTO app.t (id) VALUES ({})", turn + 1)).await;
        let position = sides[from].task(Work::Quiesce { grace_ms: 200, timeout_ms: 2000 }).await.unwrap();
        let applied = sides[to].task(catch_up(position.clone())).await.unwrap().unwrap();
        assert_eq!(applied.contains(&position.unwrap()), Some(true));
        sides[to].step(Step::Detach).await.unwrap();
        sides[to].step(writable()).await.unwrap();
        // What the old master wrote is no longer in the new one's binary log: it must not be asked for.
        servers[to].sql("FLUSH LOCAL BINARY LOGS").await;
        let log = servers[to].sql(servers[to].words("SHOW MASTER STATUS", "SHOW BINARY LOG STATUS")).await;
        let until = Instant::now() + PATIENCE;
        // MariaDB keeps a log until the storage engine has no more need of it.
        while servers[to].sql("SHOW BINARY LOGS").await != log {
            assert!(Instant::now() < until, "the old binary log is not purged");
            servers[to].sql(&format!("PURGE BINARY LOGS TO '{log}'")).await;
        }
        servers[to].sql(&format!("INSERT INTO app.t (id) VALUES ({})", 100 + turn)).await;
        sides[from].step(follow(names[to])).await.unwrap();
        let ahead = sides[to].task(Work::Drain { timeout_ms: 2000 }).await.unwrap();
        sides[from].task(catch_up(ahead)).await.unwrap();
        let rows = "SELECT GROUP_CONCAT(id ORDER BY n) FROM app.t";
        assert_eq!(servers[from].sql(rows).await, servers[to].sql(rows).await);
        assert_eq!(servers[from].sql("SELECT COUNT(*) FROM app.t").await, (2 * turn + 3).to_string());
    }
}

/// A server that starts begins to fetch from the source that it knows, before an agent can forbid it.
async fn a_detached_server_has_nobody_to_fetch_from_when_it_starts_again(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let Some(db2) = start(kind, 2).await else { return };
    // Without the privilege it fetches nothing, and knows its source. A login keeps the privileges that it began with.
    let mut boss = db2.boss().await;
    boss.query_drop("SET sql_log_bin=0").await.unwrap();
    boss.query_drop("REVOKE RELOAD ON *.* FROM mmm_agent").await.unwrap();
    let mut side = Side::of(config("db2", db1.port, db2.port));
    side.step(follow("db1")).await.unwrap();
    db1.sql("INSERT INTO app.t (id) VALUES (1), (2)").await;
    side.task(catch_up_with(&db1).await).await.unwrap();
    side.step(Step::Detach).await.unwrap();
    side.until("stopped", |r| r.replication.as_ref().is_some_and(|r| !r.io_running && r.sql_running)).await;
    boss.query_drop("GRANT RELOAD ON *.* TO mmm_agent").await.unwrap();
    let mut side = Side::of(config("db2", db1.port, db2.port));
    side.step(follow("db1")).await.unwrap();
    side.step(Step::Detach).await.unwrap();
    side.until("forgotten", |r| r.replication.is_none()).await;
    db1.sql("INSERT INTO app.t (id) VALUES (3)").await;
    side.step(follow("db1")).await.unwrap();
    side.task(catch_up_with(&db1).await).await.unwrap();
    assert_eq!(db2.sql("SELECT GROUP_CONCAT(id ORDER BY n) FROM app.t").await, "1,2,3");
    // What is not applied is not thrown away with the source.
    db2.sql(db2.words("STOP SLAVE SQL_THREAD", "STOP REPLICA SQL_THREAD")).await;
    let mut lock = db2.boss().await;
    lock.query_drop("LOCK TABLES app.t READ").await.unwrap();
    db1.sql("INSERT INTO app.t (id) VALUES (4)").await;
    let there = catch_up_with(&db1).await;
    let Work::CatchUp { position, .. } = &there else { panic!("no position") };
    let wanted = position.gtids().cloned();
    side.until("received", |r| r.replication.as_ref().is_some_and(|r| r.received == wanted)).await;
    db2.sql(db2.words("START SLAVE SQL_THREAD", "START REPLICA SQL_THREAD")).await;
    side.step(Step::Detach).await.unwrap();
    lock.query_drop("UNLOCK TABLES").await.unwrap();
    side.task(there).await.unwrap();
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "4");
}

/// db2 follows db1 and has received, not applied, rows 1 to 5.
async fn received_not_applied(kind: &str) -> Option<(Instance, Instance, Side)> {
    let db1 = start(kind, 1).await?;
    let db2 = start(kind, 2).await?;
    let mut side = Side::of(config("db2", db1.port, db2.port));
    side.step(Step::ReadOnly).await.unwrap();
    side.step(follow("db1")).await.unwrap();
    db2.sql(db2.words("STOP SLAVE SQL_THREAD", "STOP REPLICA SQL_THREAD")).await;
    for id in 1..=5 {
        db1.sql(&format!("INSERT INTO app.t (id) VALUES ({id})")).await;
    }
    side.until("received", |r| match (&r.replication, &r.executed) {
        (Some(r), Some(executed)) => r.received.as_ref().and_then(|x| executed.missing(x)) == Some(5),
        (..) => false,
    })
    .await;
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "0");
    Some((db1, db2, side))
}

// lessons.md 5
async fn drain_applies_what_was_received_with_the_sql_thread_stopped(kind: &str) {
    let Some((db1, db2, mut side)) = received_not_applied(kind).await else { return };
    db1.kill9();
    let position = side.task(Work::Drain { timeout_ms: 5000 }).await.unwrap().unwrap();
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "5");
    assert_eq!(side.last.executed, Some(position));
    assert!(side.last.replication.as_ref().is_some_and(|r| !r.io_running));
}

// lessons.md 5
async fn what_cannot_be_applied_is_not_thrown_away(kind: &str) {
    let Some((mut db1, db2, mut side)) = received_not_applied(kind).await else { return };
    if !db2.is_mariadb() {
        // MySQL keeps its relay log: with both threads stopped the drain just goes on.
        db2.sql("STOP REPLICA").await;
        side.task(Work::Drain { timeout_ms: 5000 }).await.unwrap();
        assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "5");
        return;
    }
    db1.kill9();
    db1.reap();
    db2.sql("STOP SLAVE").await;
    let why = side.task(Work::Drain { timeout_ms: 2000 }).await.unwrap_err();
    assert!(why.contains("5 transactions") && why.contains("both replication threads are stopped"), "{why}");
    let why = side.step(follow("db1")).await.unwrap_err();
    assert!(why.contains("5 transactions") && why.contains("cannot be asked"), "{why}");
    assert_eq!(db2.status().await.text(&["Gtid_IO_Pos"]).unwrap(), "0-1-5", "still there");
    // The source is back and has them: now starting loses nothing.
    db1.run().await;
    side.step(follow("db1")).await.unwrap();
    side.task(catch_up(Some(Gtids::MariaDb("0-1-5".parse().unwrap())))).await.unwrap();
    assert_eq!(db2.sql("SELECT COUNT(*) FROM app.t").await, "5");
}

// lessons.md 6
async fn catching_up_fails_at_once_when_the_sql_thread_is_stopped(kind: &str) {
    let Some((_db1, _db2, mut side)) = received_not_applied(kind).await else { return };
    let received = side.last.replication.as_ref().unwrap().received.clone();
    let begun = Instant::now();
    let why = side.task(catch_up(received)).await.unwrap_err();
    assert!(why.contains("5 transactions missing") && why.contains("SQL thread does not run"), "{why}");
    assert!(begun.elapsed() < 2 * SECOND, "{:?}", begun.elapsed());
    // Following again starts the thread, and throws nothing away.
    side.step(follow("db1")).await.unwrap();
    side.until("applied", |r| r.replication.as_ref().is_some_and(|x| x.received == r.executed)).await;
}

// lessons.md 6
async fn a_long_task_holds_nothing_up_and_a_new_one_ends_it(kind: &str) {
    let Some((_db1, _db2, mut side)) = received_not_applied(kind).await else { return };
    side.step(follow("db1")).await.unwrap();
    side.until("applied", |r| r.replication.as_ref().is_some_and(|x| x.received == r.executed)).await;
    let never = match side.last.executed.clone().unwrap() {
        Gtids::MariaDb(_) => Gtids::MariaDb("0-1-9000".parse().unwrap()),
        Gtids::MySql(_) => Gtids::MySql("3e11fa47-71ca-11e1-9e33-c80aa9429562:1-9000".parse().unwrap()),
    };
    let long = Task { id: Epoch(100), work: Work::CatchUp { position: never.clone().into(), timeout_ms: 60_000 } };
    side.database.queue(Step::Task(long));
    let begun = Instant::now();
    side.step(writable()).await.unwrap();
    side.step(Step::ReadOnly).await.unwrap();
    assert!(begun.elapsed() < 2 * SECOND, "{:?}", begun.elapsed());
    let short = Task { id: Epoch(101), work: Work::CatchUp { position: never.into(), timeout_ms: 300 } };
    side.database.queue(Step::Task(short));
    let mut ends = Vec::new();
    while ends.len() < 2 {
        assert!(begun.elapsed() < PATIENCE, "a task does not end: {ends:?}");
        if let Input::TaskDone { id, outcome: TaskOutcome::Failed { why } } = side.next(PATIENCE).await {
            ends.push((id.0, why));
        }
    }
    assert!(ends[0].0 == 100 && ends[0].1.contains("task 101 came instead"), "{ends:?}");
    assert!(ends[1].0 == 101 && ends[1].1.contains("missing") && ends[1].1.contains("after 300 ms"), "{ends:?}");
}

// lessons.md 28
async fn a_wrong_login_for_replication_is_told_without_the_password(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let Some(db2) = start(kind, 2).await else { return };
    let mut config = config("db2", db1.port, db2.port);
    config.cluster.hosts.get_mut(&HostName::from("db1")).unwrap().replication_password =
        Secret("wrong-secret".to_owned());
    let mut side = Side::of(config);
    let answer = side.step(follow("db1")).await;
    side.until("told", |r| r.replication.as_ref().is_some_and(|x| x.error.contains("1045"))).await;
    let all = format!("{answer:?} {:?}", side.last);
    assert!(!all.contains("wrong-secret"), "{all}");
    assert!(!side.last.replication.as_ref().unwrap().io_running);
}

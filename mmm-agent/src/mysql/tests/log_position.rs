//! Servers without GTIDs: planned moves by file and position.

use super::servers::{Instance, REPLICATION_PASSWORD, start_with};
use super::*;
use crate::mysql::session::quote;
use mmm_common::position::{LogPosition, Position};

const NO_GTIDS: &[&str] = &["--gtid-mode=OFF", "--enforce-gtid-consistency=OFF"];

/// Points `replica` at the beginning of the file that `source` writes now.
async fn point(replica: &Instance, source: &Instance) {
    let file = source.sql("SHOW BINARY LOG STATUS").await;
    replica
        .sql(&format!(
            "CHANGE REPLICATION SOURCE TO SOURCE_HOST='127.0.0.1', SOURCE_PORT={}, SOURCE_USER='replication', \
             SOURCE_PASSWORD={}, SOURCE_LOG_FILE='{file}', SOURCE_LOG_POS=4, GET_SOURCE_PUBLIC_KEY=1, \
             SOURCE_CONNECT_RETRY=1",
            source.port,
            quote(REPLICATION_PASSWORD)
        ))
        .await;
    replica.sql("START REPLICA").await;
}

#[tokio::test]
async fn without_gtids_the_writer_moves_there_and_back_by_file_and_position() {
    let Some(db1) = start_with("mysql-9.7", 1, NO_GTIDS).await else { return };
    let Some(db2) = start_with("mysql-9.7", 2, NO_GTIDS).await else { return };
    let servers = [&db1, &db2];
    point(&db2, &db1).await;
    point(&db1, &db2).await;
    let mut sides = [Side::of(config("db1", db1.port, db2.port)), Side::of(config("db2", db1.port, db2.port))];
    sides[1].step(Step::ReadOnly).await.unwrap();
    for turn in 0..4usize {
        let (from, to) = (turn % 2, (turn + 1) % 2);
        servers[from].sql(&format!("INSERT INTO app.t (id) VALUES ({turn})")).await;
        servers[from].sql("FLUSH LOCAL BINARY LOGS").await;
        servers[from].sql(&format!("INSERT INTO app.t (id) VALUES ({})", 100 + turn)).await;
        let closed = sides[from].task_at(Work::Quiesce { grace_ms: 200, timeout_ms: 2000 }).await.unwrap().unwrap();
        let Position::Log(LogPosition { host, place }) = &closed else { panic!("{closed} is no place in a log") };
        assert_eq!(host.as_str(), ["db1", "db2"][from]);
        let work = Work::CatchUp { position: closed.clone(), timeout_ms: 5000 };
        let reached = sides[to].task_at(work).await.unwrap().unwrap();
        let Position::Log(reached) = reached else { panic!("{reached} is no place in a log") };
        assert_eq!(reached.place.reaches(place), Some(true));
        assert_eq!(servers[to].sql("SELECT COUNT(*) FROM app.t").await, (2 * turn + 2).to_string());
        sides[to].step(writable()).await.unwrap();
    }
}

#[tokio::test]
async fn a_place_in_a_log_that_is_not_reached_or_is_anothers_is_told() {
    let Some(db1) = start_with("mysql-9.7", 1, NO_GTIDS).await else { return };
    let Some(db2) = start_with("mysql-9.7", 2, NO_GTIDS).await else { return };
    point(&db2, &db1).await;
    let mut sides = [Side::of(config("db1", db1.port, db2.port)), Side::of(config("db2", db1.port, db2.port))];
    let closed = sides[0].task_at(Work::Quiesce { grace_ms: 200, timeout_ms: 2000 }).await.unwrap().unwrap();
    let Position::Log(at) = closed else { panic!("{closed} is no place in a log") };
    let mut failed = async |position: LogPosition| {
        sides[1].task_at(Work::CatchUp { position: Position::Log(position), timeout_ms: 300 }).await.unwrap_err()
    };
    let mut beyond = at.clone();
    beyond.place.pos += 1;
    let why = failed(beyond).await;
    assert!(why.contains("it has applied up to") && why.contains("after 300 ms"), "{why}");
    let why = failed(LogPosition { host: "db2".into(), ..at.clone() }).await;
    assert!(why.contains("not from db2"), "{why}");
    db2.sql("STOP REPLICA SQL_THREAD").await;
    db1.sql("SET GLOBAL read_only=0").await;
    db1.sql("INSERT INTO app.t (id) VALUES (1)").await;
    let mut beyond = at;
    beyond.place.pos += 1;
    let why = failed(beyond).await;
    assert!(why.contains("the SQL thread does not run"), "{why}");
}

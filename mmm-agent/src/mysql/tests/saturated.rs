//! Too many connections: the agent that is in stays in, and one that must come in uses the last place (lessons.md 15).

use super::servers::{start, start_with};
use super::*;

stories!(
    an_agent_that_starts_at_a_saturated_server_sees_and_fences_it,
    logins_that_were_ended_are_opened_again,
    a_side_door_is_used_when_every_place_is_taken,
);

/// Every place but the one for administrators.
async fn crowd(db1: &Instance, places: u32) -> Vec<Conn> {
    db1.sql(&format!("SET GLOBAL max_connections={places}")).await;
    let mut crowd = Vec::new();
    while let Ok(conn) = db1.login("app", "127.0.0.1").await {
        crowd.push(conn);
        assert!(crowd.len() < 40);
    }
    crowd
}

async fn an_agent_that_starts_at_a_saturated_server_sees_and_fences_it(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut crowd = crowd(&db1, 12).await;
    let mut side = Side::alone(&db1);
    side.until("alive and seen", |r| r.life == Life::Alive && r.writing == Writing::Allowed).await;
    let begun = Instant::now();
    side.step(Step::ReadOnly).await.unwrap();
    assert!(begun.elapsed() < 3 * SECOND, "{:?}", begun.elapsed());
    assert_eq!((&side.last.life, side.last.writing), (&Life::Alive, Writing::ReadOnly));
    // It goes on seeing and doing, with that one login.
    side.step(writable()).await.unwrap();
    side.until("open", |r| r.life == Life::Alive && r.writing == Writing::Allowed).await;

    // Held up, it makes way by turns.
    crowd[0].query_drop("LOCK TABLES app.t WRITE").await.unwrap();
    let begun = Instant::now();
    side.step(Step::ReadOnly).await.unwrap();
    assert!(begun.elapsed() < 4 * SECOND, "{:?}", begun.elapsed());
    side.until("closed", |r| r.life == Life::Alive && r.writing == Writing::ReadOnly).await;
}

/// Idle ones are ended by the server in time; a saturated server would not let them in again.
async fn logins_that_were_ended_are_opened_again(kind: &str) {
    let Some(db1) = start(kind, 1).await else { return };
    let mut side = Side::alone(&db1);
    side.alive().await;
    let before = all_logins_open(&db1).await;
    for id in &before {
        db1.sql(&format!("KILL {id}")).await;
    }
    let until = Instant::now() + PATIENCE;
    while !all_logins_open(&db1).await.is_disjoint(&before) {
        assert!(Instant::now() < until, "a login that was killed lives on");
    }
    let _crowd = crowd(&db1, 14).await;
    let _extra = db1.login("boss", "127.0.0.1").await;
    side.step(Step::ReadOnly).await.unwrap();
    assert_eq!((&side.last.life, side.last.writing), (&Life::Alive, Writing::ReadOnly));
}

async fn a_side_door_is_used_when_every_place_is_taken(kind: &str) {
    let door = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let args = if kind.starts_with("mysql") {
        vec!["--admin-address=127.0.0.1".to_owned(), format!("--admin-port={door}")]
    } else {
        vec![format!("--extra-port={door}"), "--extra-max-connections=10".to_owned()]
    };
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let Some(db1) = start_with(kind, 1, &args).await else { return };
    if !db1.is_mariadb() {
        db1.sql("GRANT SERVICE_CONNECTION_ADMIN ON *.* TO mmm_agent").await;
    }
    let mut side = Side::alone(&db1);
    side.alive().await;
    let mut boss = db1.boss().await;
    let _crowd = crowd(&db1, 14).await;
    // The place for administrators is taken too.
    let _extra = db1.login("boss", "127.0.0.1").await;
    let mine = "SELECT GROUP_CONCAT(ID) FROM information_schema.processlist WHERE USER='mmm_agent'";
    let ids: Option<String> = boss.query_first(mine).await.unwrap();
    let mut more = Vec::new();
    for id in ids.unwrap().split(',') {
        boss.query_drop(format!("KILL {id}")).await.unwrap();
        // Its place is taken at once.
        more.extend(db1.login("app", "127.0.0.1").await.ok());
    }
    sleep(SECOND).await;
    side.until("alive", |r| r.life == Life::Alive).await;
    side.step(Step::ReadOnly).await.unwrap();
    assert_eq!((&side.last.life, side.last.writing), (&Life::Alive, Writing::ReadOnly));
}

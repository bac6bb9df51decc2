//! Stories on real servers: an old master comes back with transactions that the active one lacks.

mod hosts;

use super::*;
use hosts::{Host, Pair, REPLICATION};
use mmm_common::wire::{FromDonor, ToDonor, to_line};
use mmm_helper::frames;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;

const MARIADBS: [&str; 2] = ["mariadb-10.11", "mariadb-11.8"];
const ROWS: &str = "SELECT GROUP_CONCAT(n, ':', id ORDER BY n) FROM app.t";

/// Carries one job out on the host; how it ended, and the steps that were told.
async fn carry_out(host: &Host, work: JobWork) -> (Result<Option<Extras>, String>, Vec<String>) {
    carry_out_with(host, work, vec![]).await
}

async fn carry_out_with(host: &Host, work: JobWork, has: Vec<IpAddr>) -> (Result<Option<Extras>, String>, Vec<String>) {
    let (inputs, mut told) = mpsc::unbounded_channel();
    let present: Present = Arc::new(move || {
        let has = has.clone();
        Box::pin(async move { Ok(has) })
    });
    let jobs = Jobs::new(Arc::clone(&host.config), present, inputs);
    jobs.begin(Job { id: Epoch(7), work });
    let mut steps = vec![];
    loop {
        let input = timeout(Duration::from_secs(120), told.recv()).await.unwrap().unwrap();
        let Input::Job { id: Epoch(7), state } = input else { panic!("{input:?}") };
        match state {
            JobState::Running { step } => steps.push(step),
            JobState::Done { extras } => return (Ok(extras), steps),
            JobState::Failed { why } => return (Err(why), steps),
        }
    }
}

async fn executed(host: &Host) -> Gtids {
    Session::own(&host.config).await.unwrap().executed().await.unwrap()
}

async fn save(host: &Host, lacking: &Gtids) -> Result<Extras, String> {
    let work = JobWork::Save { having: executed(host).await, lacking: lacking.clone() };
    carry_out(host, work).await.0.map(Option::unwrap)
}

async fn undo(host: &Host, lacking: &Gtids) -> Result<(), String> {
    let work = JobWork::Undo { having: executed(host).await, lacking: lacking.clone() };
    carry_out(host, work).await.0.map(|extras| assert_eq!(extras, None))
}

async fn reclone(host: &Host) -> Result<(), String> {
    let (ended, steps) = carry_out(host, JobWork::Reclone { from: "db2".into() }).await;
    ended.map(|extras| {
        assert_eq!(extras, None);
        assert!(!steps.is_empty());
    })
}

/// db1 was the master and db2 its replica; they have three rows in common, and then db2 was made the master.
async fn split(kind: &str) -> Option<Pair> {
    let pair = Pair::start(kind).await?;
    pair.db1.sql("INSERT INTO app.t VALUES (1,1),(2,2)").await;
    pair.db1.sql("INSERT INTO app.t VALUES (3,3)").await;
    pair.db2.follow(&pair.db1).await;
    pair.db2.forget_source().await;
    pair.db1.sql("SET GLOBAL read_only=1").await;
    Some(pair)
}

#[tokio::test]
async fn extra_transactions_are_saved_and_undone_also_where_keys_collide() {
    for kind in MARIADBS {
        let Some(Pair { db1, db2 }) = split(kind).await else { continue };
        let before = db1.sql(ROWS).await;
        db1.sql("INSERT INTO app.t VALUES (10,100),(11,110)").await;
        db1.sql("FLUSH BINARY LOGS").await;
        db1.sql("UPDATE app.t SET id=id+1000 WHERE n IN (1,10)").await;
        db1.sql("FLUSH TABLES").await;
        db1.sql("DELETE FROM app.t WHERE n=2").await;
        // The same key, and a row that db1 has deleted.
        db2.sql("INSERT INTO app.t VALUES (10,555)").await;
        db2.sql("UPDATE app.t SET id=22 WHERE n=2").await;
        let theirs = executed(&db2).await;

        let extras = save(&db1, &theirs).await.unwrap();
        assert_eq!(extras.transactions, 4, "{extras:?}");
        let ends: Vec<&str> = extras.list.iter().map(|l| l.splitn(3, "  ").nth(2).unwrap()).collect();
        assert_eq!(
            ends,
            ["app.t: 2 inserted", "app.t: 2 updated", "harmless, no row changes: FLUSH TABLES", "app.t: 1 deleted"]
        );
        let file = std::fs::metadata(&extras.saved).unwrap();
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
        assert!(extras.saved.contains("/lost/db1-"), "{}", extras.saved);
        // What was saved works elsewhere: on a host without the extra rows it makes them.
        let saved = std::fs::read_to_string(&extras.saved).unwrap();
        assert!(!saved.contains("VALUES (3,3)") && saved.contains("-- 0-1-"), "{saved}");
        assert_eq!(db1.sql(ROWS).await, "1:1001,3:3,10:1100,11:110", "saving changes nothing");
        let state = db1.sql("SELECT @@gtid_binlog_state").await;

        // A writable host is left alone, and one with an address.
        db1.sql("SET GLOBAL read_only=0").await;
        assert!(undo(&db1, &theirs).await.unwrap_err().contains("read_only is off"));
        db1.sql("SET GLOBAL read_only=1").await;
        let work = JobWork::Undo { having: executed(&db1).await, lacking: theirs.clone() };
        let (refused, _) = carry_out_with(&db1, work, vec!["10.0.0.50".parse().unwrap()]).await;
        assert!(refused.unwrap_err().contains("10.0.0.50"));
        assert_eq!(db1.sql("SELECT @@gtid_binlog_state").await, state);

        undo(&db1, &theirs).await.unwrap();
        assert_eq!(db1.sql(ROWS).await, before);
        assert_eq!(theirs.missing(&executed(&db1).await), Some(0), "nothing is extra any more");
        assert_eq!(db1.sql("SELECT @@read_only").await, "1");
        db1.follow(&db2).await;
        assert_eq!(db1.sql(ROWS).await, "1:1,2:22,3:3,10:555");
        assert_eq!(db2.sql(ROWS).await, db1.sql(ROWS).await);
    }
}

#[tokio::test]
async fn what_was_saved_can_be_replayed() {
    for kind in MARIADBS {
        let Some(Pair { db1, db2 }) = split(kind).await else { continue };
        let theirs = executed(&db2).await;
        db1.sql("INSERT INTO app.t VALUES (10,100),(11,110)").await;
        db1.sql("DELETE FROM app.t WHERE n=2").await;
        db1.sql("CREATE TABLE app.new (n INT PRIMARY KEY)").await;
        let extras = save(&db1, &theirs).await.unwrap();
        assert!(extras.list[2].ends_with("DDL: CREATE TABLE app.new (n INT PRIMARY KEY)"), "{extras:?}");
        db2.replay(&extras.saved);
        assert_eq!(db2.sql(ROWS).await, db1.sql(ROWS).await);
        assert_eq!(db2.sql("SELECT COUNT(*) FROM app.new").await, "0", "and the table is there");
    }
}

/// Extra transactions that cannot be undone: nothing may change.
#[tokio::test]
async fn what_cannot_be_undone_is_left_as_it_is() {
    for kind in MARIADBS {
        let stories: [(&[&str], &str); 5] = [
            (&["INSERT INTO app.t VALUES (11,1)", "CREATE TABLE app.x (n INT)"], "DDL: CREATE TABLE app.x"),
            (&["SET binlog_format=STATEMENT", "INSERT INTO app.t VALUES (12,1)"], "statement: INSERT INTO app.t"),
            (&["SET binlog_row_image=MINIMAL", "DELETE FROM app.t WHERE n=2"], "binlog_row_image"),
            (&["INSERT INTO app.loose VALUES (1)"], "not in InnoDB"),
            // Somebody has taken it back by hand already.
            (
                &["INSERT INTO app.t VALUES (10,1)", "SET sql_log_bin=0", "DELETE FROM app.t WHERE n=10"],
                "cannot be set back",
            ),
        ];
        let Some(Pair { db1, db2 }) = split(kind).await else { continue };
        for (statements, why) in stories {
            let theirs = executed(&db1).await;
            db1.sql_all(statements).await;
            let (rows, state) = (db1.sql(ROWS).await, db1.sql("SELECT @@gtid_binlog_state").await);
            let refused = undo(&db1, &theirs).await.unwrap_err();
            assert!(refused.contains(why) && refused.contains("nothing was changed"), "{kind}: {refused}");
            assert_eq!(db1.sql(ROWS).await, rows);
            assert_eq!(db1.sql("SELECT @@gtid_binlog_state").await, state);
        }
        drop(db2);
    }
}

#[tokio::test]
async fn purged_binary_logs_are_an_error_in_words() {
    for kind in MARIADBS {
        let Some(Pair { db1, db2 }) = split(kind).await else { continue };
        let theirs = executed(&db2).await;
        db1.sql("INSERT INTO app.t VALUES (10,1)").await;
        db1.sql("FLUSH BINARY LOGS").await;
        db1.sql("INSERT INTO app.t VALUES (11,1)").await;
        let newest = db1.sql("SHOW MASTER STATUS").await;
        db1.until_purged(&newest).await;
        let why = save(&db1, &theirs).await.unwrap_err();
        assert!(why.contains("about 1 extra transactions are in binary logs that this host has purged"), "{why}");
        assert!(why.contains("1 of them are saved in") && why.contains(&newest), "{why}");
        assert!(undo(&db1, &theirs).await.unwrap_err().contains("purged"));
        assert_eq!(db1.sql(ROWS).await, "1:1,2:2,3:3,10:1,11:1");
    }
}

#[tokio::test]
async fn a_missing_privilege_is_named_with_its_statement() {
    for kind in MARIADBS {
        let Some(Pair { db1, db2 }) = split(kind).await else { continue };
        let theirs = executed(&db2).await;
        db1.sql_all(&["SET sql_log_bin=0", "REVOKE RELOAD, BINLOG MONITOR ON *.* FROM mmm_agent@'%'"]).await;
        db1.sql("INSERT INTO app.t VALUES (10,1)").await;
        let why = save(&db1, &theirs).await.unwrap_err();
        assert!(
            why.contains("GRANT BINLOG MONITOR, BINLOG ADMIN, BINLOG REPLAY, REPLICATION MASTER ADMIN, RELOAD"),
            "{why}"
        );
        let why = undo(&db1, &theirs).await.unwrap_err();
        assert!(why.contains("lacks the privilege") && why.contains("GRANT BINLOG MONITOR"), "{why}");
    }
}

#[tokio::test]
async fn a_host_is_copied_anew_from_another() {
    for kind in MARIADBS {
        let Some(Pair { mut db1, mut db2 }) = split(kind).await else { continue };
        db1.sql("INSERT INTO app.t VALUES (10,1)").await;
        db1.sql("CREATE TABLE app.x (n INT)").await;
        db2.sql("INSERT INTO app.t VALUES (10,555),(20,20)").await;
        let why = reclone(&db1).await.unwrap_err();
        assert!(why.contains("mmm_helperd cannot be asked"), "{why}");
        db1.start_helper();
        let why = reclone(&db1).await.unwrap_err();
        assert!(why.contains("the agent of db2") && why.contains("nothing was changed"), "{why}");
        let _agent = db2.start_agent().await;
        let why = reclone(&db1).await.unwrap_err();
        assert!(why.contains("mmm_helperd cannot be asked to send this host's data"), "{why}");
        db2.start_helper();
        db1.sql("SET GLOBAL read_only=0").await;
        assert!(reclone(&db1).await.unwrap_err().contains("read_only is off"));
        db1.sql("SET GLOBAL read_only=1").await;
        assert!(db1.sql(ROWS).await.contains("10:1"), "all refusals changed nothing");

        reclone(&db1).await.unwrap();
        assert_eq!(db1.sql(ROWS).await, "1:1,2:2,3:3,10:555,20:20");
        assert_eq!(db1.sql("SHOW TABLES FROM app LIKE 'x'").await, "");
        assert_eq!(executed(&db1).await, executed(&db2).await);
        assert_eq!(db1.sql("SELECT @@gtid_binlog_state").await, db2.sql("SELECT @@gtid_binlog_state").await);
        assert_eq!(db1.sql("SELECT @@read_only").await, "1");
        assert_eq!(db1.sql("SHOW SLAVE STATUS").await, "");
        assert_eq!(db1.neighbours(), ["data"], "the old data are deleted once the new are good");
        db2.sql("INSERT INTO app.t VALUES (21,21)").await;
        db1.follow(&db2).await;
        assert!(db1.sql(ROWS).await.ends_with("21:21"));

        // A server that is down is copied anew as well.
        db1.kill_server();
        reclone(&db1).await.unwrap();
        assert_eq!(executed(&db1).await, executed(&db2).await);
        assert!(db1.sql(ROWS).await.ends_with("21:21"));
    }
}

/// A donor that behaves as told: so many bytes announced, these sent, and no end of the stream.
async fn broken_donor(db2: &Host, bytes: u64, data: Vec<u8>) -> JoinHandle<()> {
    let listener = TcpListener::bind(db2.agent()).await.unwrap();
    tokio::spawn(async move {
        let (stream, peer) = listener.accept().await.unwrap();
        assert_eq!(peer.ip().to_string(), "127.0.0.1", "by the configured address");
        let mut stream = BufReader::new(stream);
        let mut hello = String::new();
        stream.read_line(&mut hello).await.unwrap();
        let ToDonor::Donate { host, from, .. } = serde_json::from_str(&hello).unwrap();
        assert_eq!((host.as_str(), from.as_str()), ("db2", "db1"));
        let line = to_line(&FromDonor::Donating { bytes }).unwrap();
        stream.get_mut().write_all(line.as_bytes()).await.unwrap();
        let mut framed = Vec::new();
        frames::write_data(&mut framed, &data).unwrap();
        // The other side may give up before all is sent.
        let _ = stream.get_mut().write_all(&framed).await;
    })
}

#[tokio::test]
async fn a_copy_that_breaks_off_changes_nothing() {
    for kind in MARIADBS {
        let Some(Pair { mut db1, db2 }) = split(kind).await else { continue };
        db1.start_helper();
        let pid = db1.pid();
        let stream = db2.backup_stream();
        let half = stream[..stream.len() / 2].to_vec();

        let donor = broken_donor(&db2, 1, half).await;
        let why = reclone(&db1).await.unwrap_err();
        assert!(why.contains("the stream broke off") && why.contains("nothing was changed"), "{why}");
        donor.await.unwrap();

        let donor = broken_donor(&db2, u64::MAX / 2, vec![]).await;
        let why = reclone(&db1).await.unwrap_err();
        assert!(why.contains("the copy needs about") && why.contains("MiB are free"), "{why}");
        donor.await.unwrap();

        let donor = broken_donor(&db2, 1, b"this is no backup at all".repeat(1000)).await;
        let why = reclone(&db1).await.unwrap_err();
        assert!(why.contains("nothing was changed"), "{why}");
        donor.await.unwrap();

        assert_eq!(db1.neighbours(), ["data"]);
        assert_eq!(db1.pid(), pid, "the server went on all the while");
        assert_eq!(db1.sql(ROWS).await, "1:1,2:2,3:3");
    }
}

#[tokio::test]
async fn a_full_disk_at_the_recipient_changes_nothing() {
    for kind in MARIADBS {
        let Some(Pair { mut db1, db2 }) = split(kind).await else { continue };
        let Some(_disk) = db1.move_to_small_disk(4).await else { continue };
        db1.start_helper();
        let donor = broken_donor(&db2, 1, db2.backup_stream()).await;
        let why = reclone(&db1).await.unwrap_err();
        assert!(why.contains("No space left") || why.contains("Errcode: 28"), "{why}");
        donor.await.unwrap();
        assert_eq!(db1.neighbours(), ["data"]);
        assert_eq!(db1.sql(ROWS).await, "1:1,2:2,3:3");
        // The helper is not stuck.
        assert!(reclone(&db1).await.unwrap_err().contains("the agent of db2"));
    }
}

#[tokio::test]
async fn a_copy_whose_server_does_not_start_gives_the_old_data_back() {
    for kind in MARIADBS {
        let Some(Pair { mut db1, mut db2 }) = split(kind).await else { continue };
        db1.sql("INSERT INTO app.t VALUES (10,1)").await;
        db1.start_helper();
        db2.start_helper();
        let _agent = db2.start_agent().await;
        // The copy brings the donor's users, and this agent is none of them.
        db2.sql_all(&["SET sql_log_bin=0", "SET PASSWORD FOR mmm_agent@'%' = PASSWORD('other')"]).await;
        let why = reclone(&db1).await.unwrap_err();
        // The donor's backup needs the same login; so it is refused there already, in words.
        assert!(why.contains("denied") && why.contains("GRANT RELOAD"), "{why}");
        db2.sql_all(&["SET sql_log_bin=0", "SET PASSWORD FOR mmm_agent@'%' = PASSWORD('RepAgent')"]).await;
        db1.break_next_start();
        let why = reclone(&db1).await.unwrap_err();
        assert!(why.contains("the copy could not be used") && why.contains("old data are back in place"), "{why}");
        assert_eq!(db1.until_sql(ROWS).await, "1:1,2:2,3:3,10:1");
        assert_eq!(db1.neighbours(), ["data"]);
    }
}

#[tokio::test]
async fn a_server_whose_stop_or_swap_is_refused_runs_again_with_its_data() {
    for kind in MARIADBS {
        let Some(Pair { mut db1, mut db2 }) = split(kind).await else { continue };
        db1.sql("INSERT INTO app.t VALUES (10,1)").await;
        db1.start_helper();
        db2.start_helper();
        let _agent = db2.start_agent().await;
        let reader = db1.read_in_datadir();
        let why = reclone(&db1).await.unwrap_err();
        let me = format!("{} (", std::process::id());
        assert!(why.contains(&me) && why.contains("old data are back in place"), "{why}");
        assert_eq!(db1.until_sql(ROWS).await, "1:1,2:2,3:3,10:1");
        drop(reader);
        db1.sql("SET GLOBAL read_only=1").await;
        db1.stop_with("exit 3");
        let why = reclone(&db1).await.unwrap_err();
        assert!(why.contains("could not be stopped") && why.ends_with("and the server runs"), "{why}");
        assert_eq!(db1.sql(ROWS).await, "1:1,2:2,3:3,10:1");
        assert!(db1.neighbours().iter().all(|name| !name.contains("mmm-old")), "{:?}", db1.neighbours());
    }
}

#[tokio::test]
async fn mysql_saves_cannot_undo_and_copies() {
    let Some(Pair { mut db1, db2 }) = split("mysql-9.7").await else { return };
    db1.sql("INSERT INTO app.t VALUES (10,100),(11,110)").await;
    db1.sql("FLUSH BINARY LOGS").await;
    db1.sql("UPDATE app.t SET id=id+1000 WHERE n IN (1,10)").await;
    db1.sql("ANALYZE TABLE app.t").await;
    db2.sql("INSERT INTO app.t VALUES (10,555)").await;
    let theirs = executed(&db2).await;
    let extras = save(&db1, &theirs).await.unwrap();
    let ends: Vec<&str> = extras.list.iter().map(|l| l.splitn(3, "  ").nth(2).unwrap()).collect();
    assert_eq!(ends, ["app.t: 2 inserted", "app.t: 2 updated", "harmless, no row changes: ANALYZE TABLE app.t"]);
    assert_eq!((extras.transactions, theirs.missing(&extras.gtids)), (3, Some(3)));
    db2.sql("DELETE FROM app.t WHERE n=10").await;
    db2.replay(&extras.saved);
    assert_eq!(db2.sql(ROWS).await, db1.sql(ROWS).await);

    let why = undo(&db1, &theirs).await.unwrap_err();
    assert!(why.contains("cannot undo") && why.contains("nothing was changed"), "{why}");

    db1.start_helper();
    let why = reclone(&db1).await.unwrap_err();
    assert!(why.contains("INSTALL PLUGIN clone") && why.contains("nothing was changed"), "{why}");
    assert!(why.contains("this host has no clone plugin"), "{why}");
    db1.sql_all(&["SET GLOBAL super_read_only=0", "INSTALL PLUGIN clone SONAME 'mysql_clone.so'"]).await;
    let why = reclone(&db1).await.unwrap_err();
    assert!(why.contains("the other host has no clone plugin") && why.contains("nothing was changed"), "{why}");
    db2.sql("INSTALL PLUGIN clone SONAME 'mysql_clone.so'").await;
    db2.sql_all(&["SET sql_log_bin=0", &format!("REVOKE BACKUP_ADMIN ON *.* FROM {REPLICATION}@'%'")]).await;
    let why = reclone(&db1).await.unwrap_err();
    assert!(why.contains("GRANT BACKUP_ADMIN") && why.contains("nothing was changed"), "{why}");
    db2.sql_all(&["SET sql_log_bin=0", &format!("GRANT BACKUP_ADMIN ON *.* TO {REPLICATION}@'%'")]).await;

    // The donor dies half way: what is left is said, and the copy can be ordered again.
    let dropped = async {
        while db1.sql("SELECT COUNT(*) FROM information_schema.TABLES WHERE TABLE_SCHEMA='app'").await != "0" {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        db2.kill_server();
    };
    let (broken, ()) = tokio::join!(reclone(&db1), dropped);
    let why = broken.unwrap_err();
    assert!(why.contains("tables 0 are left") && why.contains("order the copy again"), "{why}");
    db2.start_server().await;

    db1.sql("SET GLOBAL super_read_only=1").await;
    reclone(&db1).await.unwrap();
    assert_eq!(db1.sql(ROWS).await, db2.sql(ROWS).await);
    assert_eq!(executed(&db1).await, executed(&db2).await);
    assert_eq!(db1.sql("SELECT @@super_read_only").await, "1");
    db2.sql("INSERT INTO app.t VALUES (30,30)").await;
    db1.follow(&db2).await;
    assert!(db1.sql(ROWS).await.ends_with("30:30"));

    // Purged: what is missing is counted.
    db1.forget_source().await;
    db1.sql("SET GLOBAL super_read_only=0").await;
    let theirs = executed(&db1).await;
    db1.sql("INSERT INTO app.t VALUES (40,1)").await;
    db1.sql("FLUSH BINARY LOGS").await;
    let newest = db1.sql("SHOW BINARY LOG STATUS").await;
    db1.sql(&format!("PURGE BINARY LOGS TO '{newest}'")).await;
    db1.sql("INSERT INTO app.t VALUES (41,1)").await;
    let why = save(&db1, &theirs).await.unwrap_err();
    assert!(why.contains("1 of 2 extra transactions are in no binary log") && why.contains(&newest), "{why}");
}

#[tokio::test]
async fn who_is_no_host_of_the_cluster_gets_no_data() {
    let Some(Pair { db1, mut db2 }) = split("mariadb-10.11").await else { return };
    db2.start_helper();
    let _agent = db2.start_agent().await;
    let answer = async |from: &str, name: &str| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
        let mut stream = BufReader::new(socket.connect(db2.agent()).await.unwrap());
        let hello =
            format!(r#"{{"message":"donate","protocol":{},"host":"db2","from":"{name}"}}"#, mmm_common::wire::PROTOCOL);
        stream.get_mut().write_all(format!("{hello}\n").as_bytes()).await.unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        line
    };
    assert!(answer("127.0.0.9", "db1").await.contains("has come from 127.0.0.9"));
    assert!(answer("127.0.0.9", "db9").await.contains("there is no [host.db9]"));
    assert!(answer("127.0.0.1", "db1").await.contains("donating"), "{}", db1.agent());
}

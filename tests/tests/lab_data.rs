//! No acknowledged write is lost: short campaigns of `mmm-lab data`, and stories in which something is in the way of a
//! move or a failover. Each story ends in a bounded time with one writer, or with a hold that `show` gives a reason for,
//! and never in a hang. MMM_LAB_DATA_RUNS is how many moves and kills a campaign has (2 unless it is set); for long ones
//! use the program.

#[path = "lab_data/conflicts.rs"]
mod conflicts;
#[path = "lab_data/positions.rs"]
mod positions;
#[path = "lab_data/sessions.rs"]
mod sessions;

use anyhow::{Context as _, Result, bail, ensure};
use mmm_tests::lab::data::{Config, SemiSync, Summary, Work, prove, run};
use mmm_tests::lab::load::{Load, LoadConfig};
use mmm_tests::lab::network::{DB, WRITER, ip_of};
use mmm_tests::lab::server::{Dialect, Server};
use mmm_tests::lab::{Lab, LabConfig, stays, wait_for};
use sessions::{AtEnd, Habit, Sessions};
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(40);
/// drain_timeout, the time in which a dead server and a dead link are believed, and what a slow machine needs.
const BOUND: Duration = Duration::from_secs(75);
/// A planned move waits at most for drain_timeout, move_grace and move_timeout.
const MOVE_BOUND: Duration = Duration::from_secs(45);

// ---- campaigns ---------------------------------------------------------------------------------------------------

fn runs() -> Result<usize> {
    match std::env::var("MMM_LAB_DATA_RUNS") {
        Ok(text) => text.parse().with_context(|| format!("MMM_LAB_DATA_RUNS={text} is not a number")),
        Err(_) => Ok(2),
    }
}

/// Nothing lost, nothing doubled, all tables the same, nothing unexpected, and enough written to say so.
fn campaign(server: &str, work: Work, runs: usize, semisync: SemiSync) -> Result<Summary> {
    // The program's own rate is what the figures are measured at; here a busy machine must keep up with it, or replicas
    // that are seconds behind are a good reason to refuse a move.
    let rate = if server == MYSQL { 400 } else { 800 };
    let config = Config::new(server, work, runs);
    let summary = run(&Config { semisync, load: LoadConfig { rate, ..config.load }, ..config })?;
    ensure!(summary.is_good(), "see above; the same again: {}", summary.command);
    ensure!(summary.runs.len() == runs && summary.acknowledged > 500 * runs, "too little was written to say anything");
    Ok(summary)
}

fn default_server() -> String {
    LabConfig::default().server
}

const MYSQL: &str = "mysql-9.7";

/// MySQL comes from Debian's unstable branch, which is not always whole.
fn mysql() -> Option<&'static str> {
    match Server::find(MYSQL) {
        Ok(_) => Some(MYSQL),
        Err(e) => {
            println!("NOT TESTED: {MYSQL} cannot be had: {e:#}");
            None
        }
    }
}

#[test]
fn moves_under_load_lose_nothing() -> Result<()> {
    let summary = campaign(&default_server(), Work::Moves, runs()?, SemiSync::File)?;
    ensure!(summary.without_semisync == 0, "semi-sync was not in effect");
    Ok(())
}

#[test]
fn kills_under_load_lose_nothing_and_the_old_master_comes_back() -> Result<()> {
    let summary = campaign(&default_server(), Work::Kills, runs()?, SemiSync::File)?;
    ensure!(summary.without_semisync == 0, "semi-sync was not in effect");
    ensure!(summary.back * 100 >= summary.runs.len() * 95, "{} of {} came back", summary.back, summary.runs.len());
    Ok(())
}

#[test]
fn cuts_under_load_lose_nothing() -> Result<()> {
    campaign(&default_server(), Work::Cuts, 1, SemiSync::File).map(drop)
}

#[test]
fn without_semisync_what_is_lost_is_kept_and_counted_right() -> Result<()> {
    let summary = campaign(&default_server(), Work::Kills, runs()?, SemiSync::Off)?;
    ensure!(summary.said_wrong == 0, "the product's number of lost transactions is wrong");
    Ok(())
}

#[test]
fn moves_and_kills_on_mysql_lose_nothing() -> Result<()> {
    let Some(server) = mysql() else { return Ok(()) };
    for work in [Work::Moves, Work::Kills] {
        campaign(server, work, runs()?, SemiSync::File)?;
    }
    Ok(())
}

// ---- stories -----------------------------------------------------------------------------------------------------

/// How a story ended.
#[derive(Debug)]
enum End {
    Writer(&'static str),
    /// Nobody is the writer, and `show` says why.
    Held(String),
}

/// Given a cluster under a light load; when `story` has happened; then clients write again, and everything that any
/// client was promised is on every ONLINE host.
fn check(story: impl FnOnce(&Lab, &Load) -> Result<()>) -> Result<()> {
    Lab::run(LabConfig { durable: false, ..LabConfig::default() }, |lab| {
        lab.bring_online()?;
        let load = lab.load(LoadConfig { clients: 6, rate: 200, ..LoadConfig::default() })?;
        load.wait_rows(100, SOON)?;
        story(lab, &load)?;
        load.wait_write(Instant::now(), SOON).context("nobody can write at the end of the story")?;
        let journal = load.finish()?;
        println!("the clients met: {:?}", journal.troubles);
        let proof = prove(lab, &journal, None)?;
        ensure!(proof.lost.is_empty() && proof.lost_found.is_empty(), "acknowledged and lost: {proof:?}");
        ensure!(proof.doubled.is_empty() && proof.refused_but_there.is_empty(), "{proof:?}");
        ensure!(proof.differ.is_none(), "{proof:?}");
        ensure!(proof.there > 100, "too little was written to say anything");
        println!("{} rows, none lost on {:?}", proof.there, proof.compared);
        Ok(())
    })
}

/// Waits until another host is the writer, or nobody is and `show` says why for at least three seconds.
fn ends(lab: &Lab, old: &str, limit: Duration) -> Result<End> {
    let began = Instant::now();
    let mut held: Option<(Instant, String)> = None;
    let end = lab.wait_for(&format!("another writer than {old}, or a stated hold"), limit, || {
        let why = match lab.writer() {
            Ok(writer) if writer != old => return Ok(End::Writer(writer)),
            Ok(_) => {
                held = None;
                bail!("{old} is still the writer");
            }
            Err(why) => why,
        };
        let shown = lab.must_control(&["show"])?.text;
        let reason = shown.lines().find(|l| l.starts_with("# ") && l.contains("writer"));
        let Some(reason) = reason else {
            held = None;
            bail!("{why:#}, and `show` gives no reason");
        };
        match &held {
            // The steps of a failover are shown too; a hold stays.
            Some((since, text)) if text == reason && since.elapsed() > Duration::from_secs(3) => {
                Ok(End::Held(reason.to_owned()))
            }
            Some((_, text)) if text == reason => bail!("{reason}"),
            Some(_) | None => {
                held = Some((Instant::now(), reason.to_owned()));
                bail!("{reason}");
            }
        }
    })?;
    println!("after {:.1} s: {end:?}", began.elapsed().as_secs_f64());
    Ok(end)
}

/// A planned move answers in time, and afterwards there is exactly one writer, to which clients can write.
fn moves_in_time(lab: &Lab, load: &Load, new: &str) -> Result<String> {
    let answer = lab.control(&["move_role", "writer", new])?;
    println!("move_role writer {new} after {:.1} s: {}", answer.took.as_secs_f64(), answer.text.trim());
    ensure!(answer.took < MOVE_BOUND, "the answer took {:?}", answer.took);
    let writer = lab.wait_for("one writer", Duration::from_secs(5), || lab.writer())?;
    ensure!(
        (writer == new) == answer.text.starts_with("OK"),
        "the writer is {writer}, and the answer was: {}",
        answer.text.trim()
    );
    let other = other_master(writer);
    ensure!(lab.read_only(other)?, "{other} is writable too");
    load.wait_write(Instant::now(), SOON)?;
    Ok(writer.to_owned())
}

fn other_master(host: &str) -> &'static str {
    if host == DB[0] { DB[1] } else { DB[0] }
}

/// The statement in the words of the lab's server.
fn sql(lab: &Lab, mariadb: &'static str, mysql: &'static str) -> &'static str {
    match lab.server().dialect {
        Dialect::MariaDb => mariadb,
        Dialect::MySql => mysql,
    }
}

#[test]
fn a_candidate_whose_sql_thread_is_stopped_applies_all_it_has_received() -> Result<()> {
    check(|lab, load| {
        let old = lab.writer()?;
        let new = other_master(old);
        lab.mysql(new, sql(lab, "STOP SLAVE SQL_THREAD", "STOP REPLICA SQL_THREAD"))?;
        load.wait_rows(load.acknowledged() + 200, SOON)?;
        lab.kill_mysqld(old)?;
        match ends(lab, old, BOUND)? {
            End::Writer(writer) => ensure!(writer == new, "{writer} is the writer"),
            End::Held(why) => {
                println!("the operator starts what was stopped: {why}");
                lab.mysql(new, sql(lab, "START SLAVE SQL_THREAD", "START REPLICA SQL_THREAD"))?;
                lab.wait_for("a writer", BOUND, || lab.writer())?;
            }
        }
        Ok(())
    })
}

#[test]
fn a_long_transaction_and_a_long_statement_do_not_hold_up_a_move() -> Result<()> {
    check(|lab, load| {
        let old = lab.writer()?;
        let open = Habit { first: vec!["BEGIN", "INSERT INTO t (id, server) VALUES (1, 1)"], then: None };
        let long = Habit { first: vec![], then: Some("INSERT INTO t (id, server) SELECT 2, SLEEP(600)") };
        let idle = Sessions::open(lab, WRITER, 1, open)?;
        let busy = Sessions::open(lab, WRITER, 1, long)?;
        let writer = moves_in_time(lab, load, other_master(old))?;
        ensure!(writer != old, "two sessions kept the writer where it was");
        for (what, end) in [("open", idle.finish()?), ("running", busy.finish()?)] {
            println!("the session with the {what} transaction: {end:?}");
            ensure!(end.iter().all(|e| matches!(e, AtEnd::Gone(_))), "{what}: {end:?}");
        }
        for id in [1, 2] {
            let there = lab.mysql(&writer, &format!("SELECT COUNT(*) FROM app.t WHERE id = {id}"))?;
            ensure!(there.value()? == "0", "row {id} was never committed, and is there");
        }
        Ok(())
    })
}

#[test]
fn a_locked_table_does_not_hold_up_a_move() -> Result<()> {
    check(|lab, load| {
        let old = lab.writer()?;
        let locks = Habit { first: vec!["LOCK TABLES t WRITE"], then: None };
        let held = Sessions::open(lab, WRITER, 1, locks)?;
        // Every other client waits for it now.
        let writer = moves_in_time(lab, load, other_master(old))?;
        ensure!(writer != old, "a locked table kept the writer where it was");
        let end = held.finish()?;
        ensure!(end.iter().all(|e| matches!(e, AtEnd::Gone(_))), "{end:?}");
        Ok(())
    })
}

#[test]
fn clients_that_never_go_away_lose_their_connections_at_a_move() -> Result<()> {
    check(|lab, load| {
        let old = lab.writer()?;
        let idle = Sessions::open(lab, WRITER, 20, Habit::default())?;
        ensure!(idle.open == 20, "{:?}", idle.refused);
        let writer = moves_in_time(lab, load, other_master(old))?;
        ensure!(writer != old, "idle clients kept the writer where it was");
        let end = idle.finish()?;
        ensure!(end.len() == 20 && end.iter().all(|e| matches!(e, AtEnd::Gone(_))), "{end:?}");
        Ok(())
    })
}

#[test]
fn too_many_connections_on_the_writer_are_no_death_and_no_obstacle() -> Result<()> {
    check(|lab, load| {
        let old = lab.writer()?;
        let _hogs = exhaust(lab, old, WRITER)?;
        stays("the writer", Duration::from_secs(10), || {
            ensure!(lab.only_holder(WRITER.into())? == old, "it has moved");
            Ok(())
        })?;
        let writer = moves_in_time(lab, load, other_master(old))?;
        ensure!(writer != old, "too many connections kept the writer where it was");
        Ok(())
    })
}

#[test]
fn too_many_connections_on_the_candidate_do_not_keep_it_from_taking_over() -> Result<()> {
    check(|lab, load| {
        let old = lab.writer()?;
        let new = other_master(old);
        let hogs = exhaust(lab, new, ip_of(new)?)?;
        load.wait_rows(load.acknowledged() + 50, SOON)?;
        lab.kill_mysqld(old)?;
        let end = ends(lab, old, BOUND)?;
        if let End::Held(why) = &end {
            println!("the operator ends the sessions: {why}");
        }
        drop(hogs);
        lab.mysql(new, "SET GLOBAL max_connections=151")?;
        let writer = lab.wait_for("a writer", BOUND, || lab.writer())?;
        ensure!(writer == new, "{writer} is the writer");
        Ok(())
    })
}

/// Ordinary users take every connection of a host there is.
fn exhaust(lab: &Lab, host: &str, address: std::net::Ipv4Addr) -> Result<Sessions> {
    lab.mysql(host, "SET GLOBAL max_connections=30")?;
    let hogs = Sessions::open(lab, address, 60, Habit::default())?;
    let refused = hogs.refused.clone().unwrap_or_default();
    ensure!(refused.contains("1040") || refused.contains("Too many"), "{} sessions, then: {refused}", hogs.open);
    println!("{} sessions on {host}, then: {refused}", hogs.open);
    Ok(hogs)
}

#[test]
fn a_candidate_whose_sql_thread_is_broken_is_not_promoted_blindly() -> Result<()> {
    check(|lab, load| {
        let old = lab.writer()?;
        let new = other_master(old);
        // Rows of its own where the next ones of the writer will go.
        let next: u64 = lab.mysql(old, "SELECT MAX(n) FROM app.t")?.value()?.parse()?;
        let from = next + 1;
        let rows: Vec<String> = (from..from + 800).map(|n| format!("({n}, 0, 0)")).collect();
        let insert = format!("INSERT IGNORE INTO app.t (n, id, server) VALUES {}", rows.join(", "));
        let open = sql(lab, "SET sql_log_bin=0", "SET GLOBAL super_read_only=0");
        lab.mysql_session(new, &["SET sql_log_bin=0", open, &insert])?;
        lab.wait_for("a broken SQL thread", SOON, || match lab.replicates(new) {
            Ok(()) => bail!("it goes on"),
            Err(why) if why.to_string().contains("SQL thread No") => Ok(()),
            Err(why) => Err(why),
        })?;
        println!("{:#}", lab.replicates(new).expect_err("it is broken"));
        load.wait_rows(load.acknowledged() + 100, SOON)?;
        lab.kill_mysqld(old)?;
        match ends(lab, old, BOUND)? {
            End::Writer(writer) => bail!("{writer} was promoted without what it could not apply"),
            End::Held(_) => {}
        }
        // The operator repairs it: the rows that should never have been there go.
        let delete = format!("DELETE FROM app.t WHERE id = 0 AND n >= {from}");
        lab.mysql_session(new, &["SET sql_log_bin=0", open, &delete])?;
        lab.mysql(new, sql(lab, "START SLAVE SQL_THREAD", "START REPLICA SQL_THREAD"))?;
        let writer = lab.wait_for("a writer", BOUND, || lab.writer())?;
        ensure!(writer == new, "{writer} is the writer");
        Ok(())
    })
}

#[test]
fn a_candidate_with_a_full_disk_hangs_nobody() -> Result<()> {
    check(|lab, load| {
        let old = lab.writer()?;
        let new = other_master(old);
        let data = lab.restart_on_small_disk(new, 48)?;
        lab.wait_back_online(new, SOON)?;
        load.wait_rows(load.acknowledged() + 100, SOON)?;
        let ballast = data.join("ballast");
        fill(&ballast)?;
        lab.wait_for(&format!("no room for replication on {new}"), SOON, || {
            let log = std::fs::read_to_string(lab.dir().join(new).join("mysqld.log"))?;
            let full = ["Disk is full", "disk is full", "No space left", "errno: 28", "error: 28", "error 28"];
            if full.iter().any(|f| log.contains(f)) { Ok(()) } else { bail!("its log does not say so") }
        })?;
        println!("{new}: {:?}", lab.replicates(new).map_err(|e| format!("{e:#}")));
        lab.kill_mysqld(old)?;
        let end = ends(lab, old, BOUND)?;
        let show = lab.must_control(&["show"])?;
        ensure!(show.took < Duration::from_secs(1), "show took {:?}", show.took);
        if let End::Held(why) = end {
            println!("the operator makes room on {new} and starts {old}: {why}");
        }
        match std::fs::remove_file(&ballast) {
            Ok(()) => {}
            // The disk is gone with the server that could not live without room.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => lab.start_mysqld(new)?,
            Err(e) => return Err(e).with_context(|| format!("remove {}", ballast.display())),
        }
        lab.start_mysqld(old)?;
        load.wait_write(Instant::now(), BOUND)?;
        // A server that waited for room needs up to a minute to look again.
        lab.wait_back_online(new, Duration::from_secs(120))
    })
}

/// Until nothing more fits.
fn fill(file: &Path) -> Result<()> {
    let mut out = File::create(file).with_context(|| format!("make {}", file.display()))?;
    let block = vec![0_u8; 64 << 10];
    for size in [block.len(), 512] {
        for _ in 0..100_000 {
            if let Err(e) = out.write_all(&block[..size]) {
                ensure!(e.kind() == std::io::ErrorKind::StorageFull, "fill {}: {e}", file.display());
                break;
            }
        }
    }
    Ok(())
}

#[test]
fn what_only_a_slave_has_received_is_fetched_before_the_candidate_takes_over() -> Result<()> {
    check(|lab, load| {
        let old = lab.writer()?;
        let new = other_master(old);
        // One after the other: with a transaction in the relay log and both threads stopped nobody could be promoted.
        lab.mysql(new, sql(lab, "STOP SLAVE IO_THREAD", "STOP REPLICA IO_THREAD"))?;
        lab.wait_for("an empty relay log", SOON, || {
            let status = lab.replication(new)?;
            let state = status.get("Slave_SQL_Running_State").map_or("", String::as_str);
            ensure!(state.contains("has read all relay log"), "the SQL thread is at: {state}");
            Ok(())
        })?;
        lab.mysql(new, sql(lab, "STOP SLAVE SQL_THREAD", "STOP REPLICA SQL_THREAD"))?;
        let stopped = Instant::now();
        while stopped.elapsed() < Duration::from_secs(16) {
            load.wait_write(Instant::now(), SOON)?;
        }
        let count =
            |host: &str| lab.mysql(host, "SELECT COUNT(*) FROM app.t")?.value()?.parse::<u64>().context("a count");
        let behind = count(DB[2])?.saturating_sub(count(new)?);
        ensure!(behind > 1000, "{new} lacks only {behind} rows");
        lab.kill_mysqld(old)?;
        let last = lab.mysql(DB[2], "SELECT COALESCE(MAX(n), 0) FROM app.t")?.value()?.to_owned();
        match ends(lab, old, BOUND)? {
            End::Writer(writer) => ensure!(writer == new, "{writer} is the writer"),
            End::Held(why) => bail!("held, although db3 can be fetched from: {why}"),
        }
        // What db3 had it has still: if the successor lacks a row of that, they never become the same.
        let rows =
            format!("SELECT COUNT(*), COALESCE(BIT_XOR(CRC32(CONCAT(n, '/', id))), 0) FROM app.t WHERE n <= {last}");
        wait_for("all that db3 had on the successor", SOON, || {
            let (here, there) = (lab.mysql(new, &rows)?.rows, lab.mysql(DB[2], &rows)?.rows);
            ensure!(here == there, "{new} has {here:?}, db3 {there:?} of the rows up to {last}");
            Ok(())
        })?;
        println!("{new} lacked {behind} rows that db3 had, and has them all");
        Ok(())
    })
}

#[test]
fn what_an_old_master_took_back_is_not_written_again_under_the_same_gtids() -> Result<()> {
    check(|lab, load| {
        let old = lab.writer()?;
        let new = other_master(old);
        // The other master acknowledges, and is no candidate.
        lab.must_control(&["set_offline", new])?;
        lab.wait_state(new, "ADMIN_OFFLINE", SOON)?;
        load.wait_rows(load.acknowledged() + 50, SOON)?;
        // Now nobody acknowledges: what is written reaches the slave only.
        let before = lab.mysql(DB[2], "SELECT COUNT(*) FROM app.t")?;
        lab.cut_both(old, new)?;
        lab.wait_for("unacknowledged rows on db3", SOON, || {
            let now = lab.mysql(DB[2], "SELECT COUNT(*) FROM app.t")?;
            if now.value()?.parse::<u64>()? > before.value()?.parse::<u64>()? { Ok(()) } else { bail!("none yet") }
        })?;
        std::thread::sleep(Duration::from_millis(500));
        lab.kill_mysqld(old)?;
        lab.heal_all()?;
        lab.start_mysqld(old)?;
        load.wait_write(Instant::now(), BOUND)?;
        load.wait_rows(load.acknowledged() + 100, SOON)?;
        lab.must_control(&["set_online", new])?;
        lab.wait_back_online(new, SOON)
    })
}

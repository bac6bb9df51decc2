//! Servers without GTIDs: planned moves by file and position lose nothing, and after a failover nobody comes ONLINE by
//! itself, because nothing can be compared.

use super::{BOUND, End, SOON, ends, moves_in_time, mysql, other_master};
use anyhow::{Context as _, Result, bail, ensure};
use mmm_tests::lab::data::prove;
use mmm_tests::lab::load::{Load, LoadConfig};
use mmm_tests::lab::network::{DB, MONITOR, ip_of};
use mmm_tests::lab::server::query;
use mmm_tests::lab::{Lab, LabConfig, stays};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

const SLAVE: &str = DB[2];
/// A planned move of servers without GTIDs says so in the monitor's log.
const LIMITS: &str = "Without GTIDs only the writer moves";
/// Longer than it takes to compare a host that can be compared, and to let it come back after a short absence.
const KEPT_OUT: Duration = Duration::from_secs(15);

/// Given three MySQL servers with gtid_mode=OFF in a cluster that serves, and clients that write.
fn check(story: impl FnOnce(&Lab, Load) -> Result<()>) -> Result<()> {
    let Some(server) = mysql() else { return Ok(()) };
    let config = LabConfig { server: server.to_owned(), gtids: false, durable: false, ..LabConfig::default() };
    Lab::run(config, |lab| {
        lab.bring_online()?;
        for host in DB {
            ensure!(lab.mysql(host, "SELECT @@global.gtid_mode")?.value()? == "OFF", "{host} has GTIDs");
            ensure!(lab.replication(host)?.get("Auto_Position").is_some_and(|a| a == "0"), "{host}: auto-position");
        }
        let load = lab.load(LoadConfig { clients: 6, rate: 200, ..LoadConfig::default() })?;
        load.wait_rows(100, SOON)?;
        story(lab, load)
    })
}

#[test]
fn without_gtids_the_writer_moves_six_times_and_no_row_is_lost() -> Result<()> {
    check(|lab, load| {
        for _ in 0..6 {
            let old = lab.writer()?;
            let before = load.acknowledged();
            let writer = moves_in_time(lab, &load, other_master(old))?;
            ensure!(writer != old, "the writer has stayed on {old}");
            load.wait_rows(before + 100, SOON)?;
        }
        let log = log(lab)?;
        ensure!(log.matches(LIMITS).count() == 6, "the monitor's log does not say at each move: {LIMITS}");
        same_rows(lab, load, &DB)?;
        both_ways(lab)?;
        for host in DB {
            ensure!(lab.state_of(host)? == "ONLINE", "{host} is {}", lab.state_of(host)?);
        }
        Ok(())
    })
}

#[test]
fn without_gtids_nobody_comes_back_by_itself_after_a_failover() -> Result<()> {
    check(|lab, load| {
        let old = lab.writer()?;
        let new = other_master(old);
        // What it has received and not applied is there when the writer dies.
        lab.mysql(new, "STOP REPLICA SQL_THREAD")?;
        load.wait_rows(load.acknowledged() + 200, SOON)?;
        lab.kill_mysqld(old)?;
        match ends(lab, old, BOUND)? {
            End::Writer(writer) => ensure!(writer == new, "{writer} is the writer"),
            End::Held(why) => bail!("held: {why}"),
        }
        load.wait_write(Instant::now(), SOON)?;
        lab.start_mysqld(old)?;
        lab.wait_state(old, "AWAITING_RECOVERY", SOON)?;
        stays(&format!("{old} out"), KEPT_OUT, || {
            let state = lab.state_of(old)?;
            ensure!(state == "AWAITING_RECOVERY", "{old} is {state}");
            ensure!(lab.writer()? == new, "the writer has moved");
            ensure!(lab.read_only(old)?, "{old} can be written to");
            Ok(())
        })?;
        let shown = lab.must_control(&["show"])?.text;
        let why = format!("Warning: host {old} cannot be compared with the active master: gtid_mode is OFF");
        ensure!(shown.contains(&why), "`show` does not say `{why}`:\n{shown}");
        // The operator answers for what nobody can compare.
        lab.must_control(&["set_online", old])?;
        lab.wait_state(old, "ONLINE", SOON)?;
        lab.wait_for(&format!("replication of {old}"), SOON, || lab.replicates(old))?;
        // The writer goes back, and with it all is as before.
        let writer = moves_in_time(lab, &load, old)?;
        ensure!(writer == old, "the writer has stayed on {writer}");
        same_rows(lab, load, &DB)?;
        both_ways(lab)
    })
}

/// Both masters replicate from each other, and the slave from the first as ever.
fn both_ways(lab: &Lab) -> Result<()> {
    for (host, source) in [(DB[0], DB[1]), (DB[1], DB[0]), (SLAVE, DB[0])] {
        lab.wait_for(&format!("replication of {host}"), SOON, || lab.replicates(host))?;
        replicates_from(lab, host, source)?;
    }
    Ok(())
}

/// Ends the load: every row that a client was promised is there once, and on the other hosts as well.
fn same_rows(lab: &Lab, load: Load, hosts: &[&str]) -> Result<()> {
    let journal = load.finish()?;
    println!("the clients met: {:?}", journal.troubles);
    // Nobody can say by GTID whether all have everything: the rows do.
    lab.wait_for("the same rows everywhere", SOON, || {
        let first = rows(lab, hosts[0])?;
        for host in hosts {
            let there = rows(lab, host)?;
            let (lacks, more) = (first.difference(&there).count(), there.difference(&first).count());
            ensure!(lacks == 0 && more == 0, "{host} lacks {lacks} rows of {}, and has {more} more", hosts[0]);
        }
        Ok(())
    })?;
    let proof = prove(lab, &journal, None)?;
    ensure!(proof.lost.is_empty() && proof.lost_found.is_empty(), "acknowledged and lost: {proof:?}");
    ensure!(proof.doubled.is_empty() && proof.refused_but_there.is_empty() && proof.differ.is_none(), "{proof:?}");
    ensure!(proof.there > 400, "too little was written to say anything");
    println!("{} rows, none lost on {:?}", proof.there, proof.compared);
    Ok(())
}

fn rows(lab: &Lab, host: &str) -> Result<BTreeSet<String>> {
    let sql = "SELECT CONCAT_WS(' ', n, id, server) FROM app.t";
    let all = query(&lab.socket(host), sql, Duration::from_secs(20)).with_context(|| format!("read {host}"))?;
    Ok(all.rows.into_iter().flatten().flatten().collect())
}

fn replicates_from(lab: &Lab, host: &str, source: &str) -> Result<()> {
    let from = lab.replication(host)?.remove("Master_Host").unwrap_or_default();
    ensure!(from == ip_of(source)?.to_string(), "{host} replicates from {from}, and should from {source}");
    Ok(())
}

fn log(lab: &Lab) -> Result<String> {
    let file = lab.dir().join(MONITOR).join("mmm_mond.log");
    std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
}

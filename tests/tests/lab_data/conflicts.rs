//! An old master comes back with rows of its own whose keys the new master has meanwhile given to others, and with
//! changes of rows that the new master has changed differently: it stays out until somebody decides, nothing is merged,
//! everything it had is saved, and both ways back end with the active master's table.

use super::{BOUND, SOON, mysql, other_master};
use anyhow::{Context as _, Result, ensure};
use mmm_tests::lab::configs::Extra;
use mmm_tests::lab::load::LoadConfig;
use mmm_tests::lab::network::{DB, ip_of};
use mmm_tests::lab::server::Dialect;
use mmm_tests::lab::{Lab, LabConfig, stays};
use std::time::Duration;

/// Saving, undoing or copying a small server anew, and what it takes until it is ONLINE.
const RETURN: Duration = Duration::from_secs(120);
/// Longer than any rule that brings a host back by itself needs here.
const KEPT_OUT: Duration = Duration::from_secs(12);

#[derive(Clone, Copy)]
enum Way {
    AcceptLost,
    Reclone,
}

#[test]
fn conflicting_rows_of_an_old_master_are_saved_and_discarded_on_request() -> Result<()> {
    goes(&LabConfig::default().server, &[Way::AcceptLost])
}

#[test]
fn conflicting_rows_of_an_old_master_are_saved_before_it_is_copied_anew() -> Result<()> {
    goes(&LabConfig::default().server, &[Way::Reclone])
}

/// The second time both have written before, so that each has numbers of both.
#[test]
fn conflicting_rows_of_a_master_that_was_one_before_are_saved_too() -> Result<()> {
    goes(&LabConfig::default().server, &[Way::AcceptLost, Way::Reclone])
}

#[test]
fn conflicting_rows_of_an_old_master_on_mysql_are_saved_and_neither_way_back_merges_them() -> Result<()> {
    let Some(server) = mysql() else { return Ok(()) };
    goes(server, &[Way::AcceptLost, Way::Reclone])
}

/// One after the other in one cluster, each time with the host that has come back.
fn goes(server: &str, ways: &[Way]) -> Result<()> {
    let extra = Extra { common: vec!["semisync = false".to_owned()], ..Extra::default() };
    let config =
        LabConfig { server: server.to_owned(), semisync: false, durable: false, extra, ..LabConfig::default() };
    Lab::run(config, |lab| {
        lab.bring_online()?;
        // Two seconds of ordinary rows: a failover needs a monitor that has seen who was fetching.
        let load = lab.load(LoadConfig { clients: 4, rate: 200, ..LoadConfig::default() })?;
        load.wait_rows(400, SOON)?;
        load.finish()?;
        for (base, way) in (1..).map(|n| n * 100_000).zip(ways) {
            let diverged = Diverged::make(lab, base)?;
            let saved = diverged.is_kept_out(lab)?;
            match way {
                Way::AcceptLost => lab.must_control(&["set_online", "--accept-lost", diverged.old])?,
                Way::Reclone => lab.must_control(&["reclone", diverged.old, "--from", diverged.new])?,
            };
            diverged.is_back(lab, &saved, base + 900)?;
        }
        Ok(())
    })
}

/// Two masters that have both written since they last saw each other. All keys are `base` and a small number.
struct Diverged {
    base: u64,
    old: &'static str,
    new: &'static str,
    /// The old master's table, when it died.
    kept: Vec<String>,
    /// The new master's, and up to where it had executed then.
    wanted: Vec<String>,
    position: String,
}

impl Diverged {
    /// The old master is the last to hear of four transactions of its own, dies, and is started again after the new one
    /// has used the same keys.
    fn make(lab: &Lab, base: u64) -> Result<Diverged> {
        let old = lab.wait_serving(SOON)?;
        let new = other_master(old);
        let key = |n: u64| base + n;
        let common: Vec<String> = (1..10).map(|n| format!("({0}, {0}, 0)", key(n))).collect();
        lab.mysql(old, &format!("INSERT INTO app.t (n, id, server) VALUES {}", common.join(", ")))?;
        same_tables(lab, &DB)?;

        let others = DB.into_iter().filter(|host| *host != old);
        lab.network().set_cuts(&others.map(|host| (old.to_owned(), host.to_owned())).collect())?;
        for sql in [
            format!(
                "INSERT INTO app.t (n, id, server) VALUES ({}, 1, 1), ({}, 2, 1), ({}, 3, 1)",
                key(101),
                key(102),
                key(103)
            ),
            format!("UPDATE app.t SET id = id + 50000, server = 1 WHERE n IN ({}, {})", key(1), key(3)),
            format!("DELETE FROM app.t WHERE n = {}", key(2)),
            format!("INSERT INTO app.t (n, id, server) VALUES ({}, 4, 1)", key(104)),
        ] {
            lab.mysql(old, &sql)?;
        }
        let kept = table(lab, old)?;
        lab.kill_mysqld(old)?;
        let writer = lab.wait_for(&format!("{new} to be the writer"), BOUND, || {
            let writer = lab.writer()?;
            ensure!(writer == new, "{writer} is the writer");
            Ok(writer)
        })?;
        // What the dead server has sent may still be under way in its kernel: nobody listens for it before the cut ends.
        lab.wait_for(&format!("db3 to follow {writer}"), SOON, || {
            let from = lab.replication(DB[2])?.remove("Master_Host").unwrap_or_default();
            ensure!(from == ip_of(new)?.to_string(), "it replicates from {from}");
            lab.replicates(DB[2])
        })?;
        lab.heal_all()?;

        // The first needs a row that the old master has deleted, so a server that goes on fetching stops there.
        for sql in [
            format!("UPDATE app.t SET id = id + 70000, server = 2 WHERE n IN ({}, {})", key(1), key(2)),
            format!("DELETE FROM app.t WHERE n = {}", key(3)),
            format!(
                "INSERT INTO app.t (n, id, server) VALUES ({}, 11, 2), ({}, 12, 2), ({}, 13, 2)",
                key(101),
                key(102),
                key(104)
            ),
        ] {
            lab.mysql(new, &sql)?;
        }
        same_tables(lab, &[new, DB[2]])?;
        let diverged = Diverged { base, old, new, kept, wanted: table(lab, new)?, position: position(lab, new)? };
        ensure!(diverged.kept != diverged.wanted, "the two have the same rows");
        lab.start_mysqld(old)?;
        Ok(diverged)
    }

    /// The old master is shown with what it has, all of which is saved, and nothing else happens. Gives the file.
    fn is_kept_out(&self, lab: &Lab) -> Result<Saved> {
        let (old, new) = (self.old, self.new);
        let saved = lab.wait_for(&format!("what only {old} has to be saved"), SOON, || {
            let saved = Saved::of(lab, old)?;
            let now = format!("{old}: 4 transactions are on {old} and not on the active master");
            ensure!(saved.said.contains(&now), "`lost` does not say `{now}`: {}", saved.said);
            Ok(saved)
        })?;
        println!("{}", saved.said.trim());
        for line in [
            "lost, as clients may have been told that they are committed",
            "app.t: 3 inserted",
            "app.t: 2 updated",
            "app.t: 1 deleted",
            "app.t: 1 inserted",
        ] {
            ensure!(saved.said.contains(line), "`lost {old}` does not say `{line}`:\n{}", saved.said);
        }
        self.has_every_row(&saved)?;
        let shown = lab.must_control(&["show"])?.text;
        let warning = format!("Warning: host {old} has 4 transactions that the active master {new} lacks (lost, ");
        ensure!(shown.contains(&warning), "`show` has no `{warning}`:\n{shown}");

        stays(&format!("{old} out, and the tables as they are"), KEPT_OUT, || {
            let state = lab.state_of(old)?;
            ensure!(state != "ONLINE", "{old} is {state}");
            ensure!(lab.readers_of(old)?.is_empty(), "{old} has reader addresses");
            ensure!(lab.read_only(old)?, "{old} can be written to");
            self.nothing_has_reached_the_active(lab)?;
            equal("the rows it died with", &self.kept, old, &table(lab, old)?)
        })?;
        let refusal = lab.control(&["set_online", old])?;
        ensure!(!refusal.ok(), "set_online {old}: {}", refusal.text);
        ensure!(refusal.text.contains("that the active master"), "set_online {old}: {}", refusal.text);
        Ok(saved)
    }

    /// The four transactions, row by row, as the tool's comments tell them.
    fn has_every_row(&self, saved: &Saved) -> Result<()> {
        let rows = changes(&saved.text);
        for (what, n, id) in [
            ("INSERT INTO", 101, 1),
            ("INSERT INTO", 102, 2),
            ("INSERT INTO", 103, 3),
            ("INSERT INTO", 104, 4),
            ("UPDATE", 1, self.base + 50_001),
            ("UPDATE", 3, self.base + 50_003),
            ("DELETE FROM", 2, self.base + 2),
        ] {
            let row = (what.to_owned(), self.base + n, id);
            ensure!(rows.contains(&row), "{row:?} is not in {}, which has {rows:?}", saved.path);
        }
        ensure!(rows.len() == 7, "{} has {rows:?}", saved.path);
        Ok(())
    }

    fn nothing_has_reached_the_active(&self, lab: &Lab) -> Result<()> {
        for host in [self.new, DB[2]] {
            equal("the active master's rows", &self.wanted, host, &table(lab, host)?)?;
        }
        let position = position(lab, self.new)?;
        ensure!(position == self.position, "{} has executed {position} instead of {}", self.new, self.position);
        Ok(())
    }

    /// It is ONLINE by itself, with the active master's rows and nothing else, follows it, and can have the writer again.
    fn is_back(&self, lab: &Lab, saved: &Saved, next: u64) -> Result<()> {
        let (old, new) = (self.old, self.new);
        lab.wait_state(old, "ONLINE", RETURN)?;
        lab.wait_for(&format!("replication of {old}"), SOON, || lab.replicates(old))?;
        lab.wait_for("the active master's rows everywhere", SOON, || {
            for host in DB {
                equal("the active master's rows", &self.wanted, host, &table(lab, host)?)?;
            }
            Ok(())
        })?;
        self.nothing_has_reached_the_active(lab)?;
        let from = lab.replication(old)?.remove("Master_Host").unwrap_or_default();
        ensure!(from == ip_of(new)?.to_string(), "{old} replicates from {from}");
        lab.mysql(new, &format!("INSERT INTO app.t (n, id, server) VALUES ({next}, {next}, 2)"))?;
        same_tables(lab, &DB)?;
        // An undo has saved them once more.
        let last = Saved::of(lab, old)?;
        ensure!(last.said.contains("4 transactions were saved before"), "lost {old}: {}", last.said);
        self.has_every_row(&last)?;
        ensure!(read(&saved.path)? == saved.text, "{} has changed", saved.path);

        lab.must_control(&["move_role", "writer", old])?;
        lab.wait_serving(SOON)?;
        lab.mysql(old, &format!("INSERT INTO app.t (n, id, server) VALUES ({}, {}, 1)", next + 1, next + 1))?;
        same_tables(lab, &DB)
    }
}

struct Saved {
    path: String,
    /// The answer to `lost`.
    said: String,
    text: String,
}

impl Saved {
    fn of(lab: &Lab, host: &str) -> Result<Saved> {
        let said = lab.must_control(&["lost", host])?.text;
        let path = said.lines().find_map(|l| l.trim().strip_prefix(&format!("saved as SQL on {host}: ")));
        let path = path.filter(|path| path.starts_with('/')).with_context(|| format!("`lost` says {said}"))?.to_owned();
        Ok(Saved { text: read(&path)?, path, said })
    }
}

fn read(path: &str) -> Result<String> {
    Ok(String::from_utf8_lossy(&std::fs::read(path).with_context(|| format!("read {path}"))?).into_owned())
}

/// The row changes in a binary log tool's output: the statement, the key, and the `id` that the row has last.
fn changes(text: &str) -> Vec<(String, u64, u64)> {
    let mut rows: Vec<(String, u64, u64)> = Vec::new();
    for line in text.lines().filter_map(|l| l.strip_prefix("### ")) {
        let line = line.trim();
        if let Some((what, _)) = line.split_once(" `app`.`t`") {
            rows.push((what.to_owned(), 0, 0));
        }
        let Some(row) = rows.last_mut() else { continue };
        let number = |column: &str| line.strip_prefix(column)?.split_whitespace().next()?.parse().ok();
        row.1 = number("@1=").unwrap_or(row.1);
        row.2 = number("@2=").unwrap_or(row.2);
    }
    rows
}

/// Every row as `n id server`, by its key.
fn table(lab: &Lab, host: &str) -> Result<Vec<String>> {
    let rows = lab.mysql(host, "SELECT CONCAT_WS(' ', n, id, server) FROM app.t ORDER BY n")?.rows;
    Ok(rows.into_iter().flatten().flatten().collect())
}

/// The error names the rows that only one of the two has.
fn equal(one: &str, rows: &[String], other: &str, there: &[String]) -> Result<()> {
    let only = |a: &[String], b: &[String]| a.iter().filter(|row| !b.contains(row)).cloned().collect::<Vec<_>>();
    ensure!(rows == there, "only {one}: {:?}; only {other}: {:?}", only(rows, there), only(there, rows));
    Ok(())
}

fn same_tables(lab: &Lab, hosts: &[&str]) -> Result<()> {
    lab.wait_for(&format!("the same rows on {}", hosts.join(" and ")), SOON, || {
        let first = table(lab, hosts[0])?;
        for host in hosts {
            equal(hosts[0], &first, host, &table(lab, host)?)?;
        }
        Ok(())
    })
}

/// Up to where a host has executed, with what it wrote itself.
fn position(lab: &Lab, host: &str) -> Result<String> {
    let sql = match lab.server().dialect {
        Dialect::MariaDb => "SELECT @@global.gtid_binlog_state",
        Dialect::MySql => "SELECT @@global.gtid_executed",
    };
    Ok(lab.mysql(host, sql)?.value()?.to_owned())
}

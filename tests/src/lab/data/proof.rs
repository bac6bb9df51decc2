//! Whether every row that a client was promised is there, once, on every host that is ONLINE, and whether the tables
//! of these hosts are the same. It reads only, over the servers' own sockets, once nothing is written any more.

use crate::lab::Lab;
use crate::lab::load::LoadJournal;
use crate::lab::network::DB;
use crate::lab::server::{Dialect, query};
use crate::lab::wait_for;
use anyhow::{Context as _, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

/// How long replicas may take to have everything, once nothing is written any more.
const IN_STEP: Duration = Duration::from_secs(90);
const ANSWER: Duration = Duration::from_secs(60);

#[derive(Clone, Debug, Default)]
pub struct Proof {
    /// The hosts that were compared: all that are ONLINE.
    pub compared: Vec<&'static str>,
    /// Rows of this load on the active master.
    pub there: usize,
    /// Acknowledged, and not on the active master.
    pub lost: Vec<u64>,
    /// Read back after a lost answer, and not there.
    pub lost_found: Vec<u64>,
    /// More than once on the active master.
    pub doubled: Vec<u64>,
    /// Refused by the server every time, and there.
    pub refused_but_there: Vec<u64>,
    /// None: all compared hosts have the same tables.
    pub differ: Option<String>,
    /// Rows on the host that is kept out and not on the active master.
    pub extra: Option<usize>,
    /// Of these, rows that no client was promised.
    pub extra_unacknowledged: usize,
}

/// Waits until the ONLINE hosts are in step, then compares. `kept_out`: the host whose extra rows are to be counted.
pub fn prove(lab: &Lab, journal: &LoadJournal, kept_out: Option<&str>) -> Result<Proof> {
    let active = lab.writer().context("nobody is the writer at the end")?;
    // A host that has rows of its own may still be shown ONLINE for some seconds: who is, is asked each time.
    let compared = wait_for("the same position on all ONLINE hosts", IN_STEP, || {
        let mut positions: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        let mut online = Vec::new();
        for host in DB {
            if host == active || lab.state_of(host)? == "ONLINE" {
                positions.entry(position(lab, host)?).or_default().push(host);
                online.push(host);
            }
        }
        if positions.len() == 1 { Ok(online) } else { bail!("{positions:?}") }
    })?;
    let rows = rows(lab, active, journal.base)?;
    let mut proof = Proof { there: rows.len(), ..Proof::default() };
    let mut ids: BTreeMap<u64, u32> = BTreeMap::new();
    for (_, id) in &rows {
        *ids.entry(*id).or_default() += 1;
    }
    proof.doubled = ids.iter().filter(|(_, n)| **n > 1).map(|(id, _)| *id).collect();
    let mut promised = BTreeSet::new();
    for row in &journal.rows {
        let there = ids.contains_key(&row.id);
        if row.is_promised() {
            promised.insert(row.id);
        }
        match row.fate {
            crate::lab::load::Fate::Acknowledged if !there => proof.lost.push(row.id),
            crate::lab::load::Fate::Found if !there => proof.lost_found.push(row.id),
            crate::lab::load::Fate::Refused if there => proof.refused_but_there.push(row.id),
            crate::lab::load::Fate::Acknowledged
            | crate::lab::load::Fate::Found
            | crate::lab::load::Fate::Refused
            | crate::lab::load::Fate::Unknown => {}
        }
    }
    let mut sums: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for host in &compared {
        sums.entry(checksum(lab, host)?).or_default().push(host);
    }
    if sums.len() > 1 {
        proof.differ =
            Some(format!("the tables differ: {sums:?}{}", differences(lab, active, &compared, &rows, journal)));
    }
    if let Some(host) = kept_out.filter(|h| !compared.contains(h)) {
        let there = self::rows(lab, host, journal.base)?;
        let extra: Vec<u64> = there.difference(&rows).map(|(_, id)| *id).collect();
        // A row that its client has written again elsewhere is not lost: this copy of it was never promised.
        proof.extra_unacknowledged = extra.iter().filter(|id| !promised.contains(id) || ids.contains_key(id)).count();
        proof.extra = Some(extra.len());
    }
    proof.compared = compared;
    Ok(proof)
}

/// Which rows of this load other hosts lack or have alone, with the servers that wrote them.
fn differences(
    lab: &Lab,
    active: &str,
    compared: &[&'static str],
    rows: &BTreeSet<(u64, u64)>,
    journal: &LoadJournal,
) -> String {
    let promised: BTreeSet<u64> = journal.rows.iter().filter(|r| r.is_promised()).map(|r| r.id).collect();
    let mut text = String::new();
    for host in compared.iter().filter(|host| **host != active) {
        let there = match self::rows(lab, host, journal.base) {
            Ok(there) => there,
            Err(e) => {
                let _ = write!(text, "; {host}: {e:#}");
                continue;
            }
        };
        let lacks: Vec<&(u64, u64)> = rows.difference(&there).collect();
        let alone: Vec<&(u64, u64)> = there.difference(rows).collect();
        let of = lacks.iter().filter(|(_, id)| promised.contains(id)).count();
        let (few_lacks, few_alone) = (&lacks[..lacks.len().min(5)], &alone[..alone.len().min(5)]);
        let _ = write!(
            text,
            "; {host} lacks {} rows of this load, {of} of them promised, (n, id) {few_lacks:?}, and has {} alone {few_alone:?}",
            lacks.len(),
            alone.len()
        );
    }
    text
}

/// What a host has executed, in the server's own words.
pub(super) fn position(lab: &Lab, host: &str) -> Result<String> {
    let sql = match lab.server().dialect {
        // A host that was copied anew begins with an empty binary log.
        Dialect::MariaDb => "SELECT IF(@@global.gtid_binlog_pos='', @@global.gtid_slave_pos, @@global.gtid_binlog_pos)",
        Dialect::MySql => "SELECT REPLACE(@@global.gtid_executed, '\\n', '')",
    };
    Ok(lab.mysql(host, sql)?.value()?.to_owned())
}

/// The table's own key and the client's number, of one load.
fn rows(lab: &Lab, host: &str, base: u64) -> Result<BTreeSet<(u64, u64)>> {
    let sql = format!("SELECT n, id FROM app.t WHERE id >= {base} AND id < {}", base + (1 << 32));
    let table = query(&lab.socket(host), &sql, ANSWER).with_context(|| format!("read the rows of {host}"))?;
    let number = |value: Option<&Option<String>>| -> Result<u64> {
        Ok(value.and_then(Option::as_deref).context("a NULL among the rows")?.parse()?)
    };
    table.rows.iter().map(|row| Ok((number(row.first())?, number(row.get(1))?))).collect()
}

/// Of the whole table, rows of earlier loads too.
fn checksum(lab: &Lab, host: &str) -> Result<String> {
    let table = query(&lab.socket(host), "CHECKSUM TABLE app.t", ANSWER).with_context(|| format!("on {host}"))?;
    let sum = table.rows.first().and_then(|r| r.get(1).cloned().flatten());
    sum.with_context(|| format!("{host} has no checksum of app.t"))
}

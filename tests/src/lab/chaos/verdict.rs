//! What a campaign has shown: whether any address was on two hosts, whether an acknowledged row is missing that should
//! be there, how long nobody could write around each fault, and whether everything came back.
//!
//! A missing row is only excused for a reason that can be read from what was seen while it was acknowledged; everything
//! else counts against the product.

use super::holders::{BLIND, Looked, SemiSync, ServerSeen};
use super::wire::Heard;
use super::{Anew, Config, Done, Field, lock};
use crate::lab::Lab;
use crate::lab::client::{Journal, Outcome};
use crate::lab::network::{DB, MONITOR};
use crate::lab::server::query;
use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// A copy that was acknowledged may be in a relay log for so long, and is thrown away with it at a restart.
const RELAYED: Duration = Duration::from_secs(10);

/// How late a kernel may be when it takes an address away whose agent cannot (safety.md calls it margin).
const KERNEL_LATE: Duration = Duration::from_millis(1500);
const LOOK_LATE: Duration = Duration::from_millis(100);

pub(super) struct Evidence<'a> {
    pub(super) config: &'a Config,
    pub(super) field: &'a Field<'a>,
    pub(super) looked: Looked,
    pub(super) heard: Heard,
    /// In the order of [`DB`].
    pub(super) seen: Vec<ServerSeen>,
    pub(super) journals: Vec<Journal>,
    pub(super) converged: Result<&'static str>,
    pub(super) compared: Result<Compared>,
}

/// The rows of the final writer, and whether all hosts have the same.
pub(super) struct Compared {
    /// How often each number is there.
    rows: BTreeMap<u64, u32>,
    /// None: all hosts have the same rows.
    differ: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct FaultLine {
    pub round: usize,
    pub at_s: f64,
    pub fault: String,
    /// Without the hosts' names.
    pub kind: String,
    pub lasted_s: f64,
    /// The longest time without any acknowledged row, from the fault's beginning until the next round's.
    pub outage_s: f64,
    /// How long the writer address stayed on a host that nobody of the cluster could reach.
    pub kept_s: Option<f64>,
    pub writer_before: String,
    pub writer_after: String,
    /// Acknowledged in the same time, and missing at the end.
    pub lost: usize,
    pub note: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Missing {
    pub id: u64,
    pub acknowledged_at_s: f64,
    pub writer: String,
    pub semisync: SemiSync,
    /// Faults that were under way, or the last one before.
    pub during: String,
    /// None: it should be there.
    pub excuse: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    pub seed: u64,
    pub command: String,
    pub server: String,
    pub lasted_s: f64,
    pub faults: Vec<FaultLine>,
    pub looks: u64,
    pub look_median_ms: f64,
    pub look_p999_ms: f64,
    pub look_longest_ms: f64,
    pub blind_s: f64,
    pub blind_above_ms: u64,
    /// Looks at which an address was on two hosts.
    pub two_holders: u64,
    pub two_holders_said: Vec<String>,
    /// Looks at which the writer address was on two hosts and both were writable.
    pub two_writers: u64,
    /// Looks at which two servers were writable, wherever the address was. Not a fault by itself: the address decides.
    pub two_writable: u64,
    pub arp_rounds: u64,
    pub arp_writer_answered: u64,
    pub arp_two_answers: Vec<String>,
    pub acknowledged: usize,
    pub missing: Vec<Missing>,
    pub missing_unexcused: usize,
    pub doubled_rows: usize,
    pub refused_but_there: usize,
    /// All times above 0.5 s without an acknowledged row together.
    pub without_writer_s: f64,
    pub brought_in_line: Vec<String>,
    /// Programs that ended by themselves, panics, a writer that had to be forced.
    pub wrongs: Vec<String>,
    /// None: everything serves, and all hosts have the same rows.
    pub not_converged: Option<String>,
}

/// Reads the tables once nothing is written any more. Replicas are given a moment to catch up.
pub(super) fn compare(lab: &Lab, writer: Option<&'static str>) -> Result<Compared> {
    let writer = match writer {
        Some(writer) => writer,
        None => lab.writer().or_else(|_| most_rows(lab))?,
    };
    let sql = "SELECT COUNT(*), BIT_XOR(CRC32(CONCAT(n, '/', id, '/', server))) FROM app.t";
    let end = Instant::now() + Duration::from_secs(30);
    let differ = loop {
        let mut found = BTreeMap::new();
        for host in DB {
            let said = query(&lab.socket(host), sql, Duration::from_secs(20));
            let said = said.map(|t| format!("{:?}", t.rows)).unwrap_or_else(|e| format!("{e:#}"));
            found.entry(said).or_insert_with(Vec::new).push(host);
        }
        if found.len() == 1 {
            break None;
        }
        if Instant::now() > end {
            break Some(format!("the hosts' rows differ (count, checksum): {found:?}"));
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    let table = query(&lab.socket(writer), "SELECT id FROM app.t", Duration::from_secs(60))?;
    let mut rows = BTreeMap::new();
    for row in table.rows {
        let id = row.into_iter().next().flatten().context("a NULL id")?.parse()?;
        *rows.entry(id).or_default() += 1;
    }
    Ok(Compared { rows, differ })
}

/// With no writer at all, the master that has most.
fn most_rows(lab: &Lab) -> Result<&'static str> {
    let mut best: Option<(u64, &'static str)> = None;
    for host in [DB[0], DB[1]] {
        let Ok(table) = lab.mysql(host, "SELECT COUNT(*) FROM app.t") else { continue };
        let count = table.value()?.parse()?;
        if best.is_none_or(|(most, _)| count > most) {
            best = Some((count, host));
        }
    }
    best.map(|(_, host)| host).context("neither master answers")
}

pub(super) fn judge(all: &Evidence<'_>) -> Result<Verdict> {
    let timeline = &all.field.timeline;
    let secs = |at: Instant| at.saturating_duration_since(timeline.began).as_secs_f64();
    let mut done = lock(&all.field.done).clone();
    done.sort_by_key(|d| d.began);
    let anew = lock(&all.field.anew).clone();
    let compared = match &all.compared {
        Ok(compared) => compared,
        Err(e) => bail!("the rows at the end cannot be read: {e:#}"),
    };

    let mut acks: Vec<Instant> = all.journals.iter().flat_map(|j| j.acknowledged().map(|w| w.ended)).collect();
    acks.sort();
    let ended = acks.last().copied().unwrap_or(timeline.began);

    let (mut missing, mut refused_but_there, mut doubled_rows) = (Vec::new(), 0, 0);
    let mut lost_at = Vec::new();
    for write in all.journals.iter().flat_map(|j| &j.writes) {
        let there = compared.rows.get(&write.id).copied().unwrap_or(0);
        doubled_rows += usize::from(there > 1);
        match (&write.outcome, there) {
            (Outcome::Acknowledged, 0) => {
                lost_at.push(write.ended);
                missing.push(explain(all, &done, &anew, write.id, write.sent, write.ended));
            }
            (Outcome::Refused(_), 1..) => refused_but_there += 1,
            (Outcome::Acknowledged, 1..) | (Outcome::Refused(_), 0) | (Outcome::Unknown(_), _) => {}
        }
    }
    let faults = done
        .iter()
        .map(|d| {
            let until = done.iter().find(|o| o.round > d.round).map_or(ended.max(d.healed), |o| o.began);
            let writer = |at: Instant| {
                let there: Vec<&str> = all.looked.writers_between(at, at).into_iter().collect();
                if there.is_empty() { "-".to_owned() } else { there.join("+") }
            };
            FaultLine {
                round: d.round,
                at_s: secs(d.began),
                fault: d.what.clone(),
                kind: d.kind.clone(),
                lasted_s: (d.healed - d.began).as_secs_f64(),
                outage_s: longest_gap(&acks, d.began, until).as_secs_f64(),
                kept_s: kept(&all.looked, d).map(|kept| kept.as_secs_f64()),
                writer_before: writer(d.began),
                writer_after: writer(until),
                lost: lost_at.iter().filter(|at| **at >= d.began && **at < until).count(),
                note: d.note.clone(),
            }
        })
        .collect();
    let mut not_converged = all.converged.as_ref().err().map(|e| format!("{e:#}"));
    if not_converged.is_none() {
        not_converged.clone_from(&compared.differ);
    }
    let mut wrongs = lock(&all.field.wrongs).clone();
    wrongs.extend(panics(all.field.lab.dir()));
    let file = crate::lab::configs::monitor_file(all.field.lab.dir());
    let parsed = mmm_common::config::parse::monitor(&file);
    let lease = parsed.map_err(|e| anyhow::anyhow!("{}: {e:?}", file.display()))?.cluster.lease_ttl;
    for d in &done {
        // What is seen is up to one look late, and a look on a busy machine.
        if let Some(kept) = kept(&all.looked, d).filter(|kept| *kept > lease + KERNEL_LATE + LOOK_LATE) {
            wrongs.push(format!("{}: the writer address stayed on the host for {:.3} s", d.what, kept.as_secs_f64()));
        }
    }
    let doubled = &all.looked.doubled;
    let steps = acks.windows(2).map(|w| w[1] - w[0]).filter(|gap| *gap > Duration::from_millis(500));
    Ok(Verdict {
        seed: all.config.seed,
        command: all.config.command(),
        server: all.field.lab.server().version.clone(),
        lasted_s: secs(ended),
        faults,
        looks: all.looked.looks,
        look_median_ms: all.looked.gap_at(0.5),
        look_p999_ms: all.looked.gap_at(0.999),
        look_longest_ms: all.looked.longest_gap.as_secs_f64() * 1000.0,
        blind_s: all.looked.blind.as_secs_f64(),
        blind_above_ms: u64::try_from(BLIND.as_millis()).unwrap_or(0),
        two_holders: doubled.iter().map(|d| d.looks).sum(),
        two_holders_said: doubled
            .iter()
            .map(|d| {
                format!(
                    "{} on {} from {:.3} s to {:.3} s ({} looks, at {} of them all writable)",
                    d.ip,
                    d.hosts.join(" and "),
                    secs(d.from),
                    secs(d.until),
                    d.looks,
                    d.all_writable
                )
            })
            .collect(),
        two_writers: doubled.iter().filter(|d| d.ip == crate::lab::network::WRITER).map(|d| d.all_writable).sum(),
        two_writable: all.looked.two_writable,
        arp_rounds: all.heard.rounds,
        arp_writer_answered: all.heard.writer_answered,
        arp_two_answers: all.heard.doubled.clone(),
        acknowledged: acks.len(),
        missing_unexcused: missing.iter().filter(|m| m.excuse.is_none()).count(),
        missing,
        doubled_rows,
        refused_but_there,
        without_writer_s: steps.map(|gap| gap.as_secs_f64()).sum(),
        brought_in_line: anew
            .iter()
            .map(|a| {
                let (at, rows) = (secs(a.at), a.extra.len());
                format!("{} at {at:.1} s, with {rows} rows that the active master lacked: {}", a.host, a.how)
            })
            .collect(),
        wrongs,
        not_converged,
    })
}

/// The longest time without an acknowledgement of all gaps that touch the window.
fn longest_gap(acks: &[Instant], from: Instant, until: Instant) -> Duration {
    let first = acks.partition_point(|at| *at < from).saturating_sub(1);
    let behind = (acks.partition_point(|at| *at <= until) + 1).min(acks.len());
    let within = acks.get(first..behind).unwrap_or_default();
    within.windows(2).map(|w| w[1] - w[0]).max().unwrap_or_else(|| until.saturating_duration_since(from))
}

/// How long the writer address stayed on the host that nobody reached, if it was there and left before the healing.
fn kept(looked: &Looked, done: &Done) -> Option<Duration> {
    let host = done.alone.filter(|_| !done.left_out)?;
    if !looked.writers_between(done.began, done.began).contains(host) {
        return None;
    }
    let off = looked.writer.iter().find(|(at, hosts)| *at > done.began && !hosts.contains(&host));
    let until = off.map_or(done.healed, |(at, _)| (*at).min(done.healed));
    Some(until - done.began)
}

/// What was so when a row was acknowledged that is missing now.
fn explain(all: &Evidence<'_>, done: &[Done], anew: &[Anew], id: u64, sent: Instant, acknowledged: Instant) -> Missing {
    let timeline = &all.field.timeline;
    let writers = all.looked.writers_between(sent, acknowledged);
    let mut semisync = SemiSync::Unknown;
    let position = |host: &&str| DB.iter().position(|h| h == host);
    if let (1, Some(n)) = (writers.len(), writers.first().and_then(position)) {
        semisync = all.seen[n].semisync_between(sent, acknowledged);
    }
    let under_way: Vec<&Done> = done.iter().filter(|d| d.began <= acknowledged && d.healed >= sent).collect();
    let during = if under_way.is_empty() {
        let last = done.iter().rev().find(|d| d.healed < sent);
        last.map_or_else(|| "nothing".to_owned(), |d| format!("nothing; before: {}", d.what))
    } else {
        under_way.iter().map(|d| d.what.as_str()).collect::<Vec<_>>().join("; ")
    };
    let near: Vec<&Done> =
        done.iter().filter(|d| !d.left_out && d.began <= acknowledged + RELAYED && d.healed >= sent).collect();
    let hit: BTreeSet<&str> =
        near.iter().flat_map(|d| d.hosts.iter().copied()).filter(|h| *h == DB[0] || *h == DB[1]).collect();
    let excuse = match semisync {
        SemiSync::Off => Some("semi-sync was off: nobody else had to have it".to_owned()),
        // One master had it only in a relay log that ended with its server, and the other one was hit as well.
        SemiSync::On if hit.len() > 1 && near.iter().any(|d| d.ended_server && !d.hosts.contains(DB[2])) => {
            Some("a master's server ended and the other master was hit, within ten seconds".to_owned())
        }
        SemiSync::On | SemiSync::Unknown => None,
    };
    let kept = anew.iter().find(|a| a.extra.contains(&id)).map_or("", |a| a.host);
    let kept = if kept.is_empty() { String::new() } else { format!("; it was on {kept} and was discarded there") };
    Missing {
        id,
        acknowledged_at_s: acknowledged.saturating_duration_since(timeline.began).as_secs_f64(),
        writer: writers.into_iter().collect::<Vec<_>>().join("+"),
        semisync,
        during: format!("{during}{kept}"),
        excuse,
    }
}

/// Panics and aborts in the daemons' logs.
fn panics(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for host in DB.into_iter().chain([MONITOR]) {
        for name in ["mmm_mond.log", "mmm_agentd.log", "mmm_helperd.log"] {
            let Ok(log) = fs::read(dir.join(host).join(name)) else { continue };
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().collect();
            for (n, line) in lines.iter().enumerate().filter(|(_, l)| l.contains("panicked at")) {
                found.push(format!("{name} on {host}: {line} {}", lines.get(n + 1).unwrap_or(&"")));
            }
        }
    }
    found
}

impl Verdict {
    pub fn is_safe(&self) -> bool {
        self.two_holders == 0
            && self.two_writers == 0
            && self.arp_two_answers.is_empty()
            && self.missing_unexcused == 0
            && self.doubled_rows == 0
            && self.refused_but_there == 0
    }

    /// Safe, nothing went wrong with a daemon, and everything serves at the end.
    pub fn is_good(&self) -> bool {
        self.is_safe() && self.wrongs.is_empty() && self.not_converged.is_none()
    }

    pub fn text(&self) -> String {
        let mut t = String::new();
        let _ = self.write(&mut t);
        t
    }

    /// What each kind of fault cost the clients, of those that came alone.
    fn write_kinds(&self, t: &mut String) -> std::fmt::Result {
        let mut rounds: BTreeMap<usize, usize> = BTreeMap::new();
        for f in &self.faults {
            *rounds.entry(f.round).or_default() += 1;
        }
        let mut kinds: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for f in self.faults.iter().filter(|f| rounds.get(&f.round) == Some(&1)) {
            kinds.entry(&f.kind).or_default().push(f.outage_s);
        }
        writeln!(t, "\n  {:<34} {:>5} {:>8} {:>8}", "alone in its round", "times", "median", "longest outage")?;
        for (kind, mut outages) in kinds {
            outages.sort_by(f64::total_cmp);
            let (median, longest) = (outages[outages.len() / 2], outages[outages.len() - 1]);
            writeln!(t, "  {kind:<34} {:>5} {median:>8.3} {longest:>8.3}", outages.len())?;
        }
        Ok(())
    }

    fn write(&self, t: &mut String) -> std::fmt::Result {
        writeln!(
            t,
            "  {:>5} {:>8}  {:<44} {:>7} {:>8}  {:<11} {:>4}",
            "round", "at s", "fault", "lasted", "outage", "writer", "lost"
        )?;
        writeln!(t, "  {}", "-".repeat(96))?;
        for f in &self.faults {
            let kept = f.kept_s.map_or_else(String::new, |s| format!("the address stayed {s:.3} s "));
            writeln!(
                t,
                "  {:>5} {:>8.1}  {:<44} {:>7.2} {:>8.3}  {:<11} {:>4}  {kept}{}",
                f.round,
                f.at_s,
                f.fault,
                f.lasted_s,
                f.outage_s,
                format!("{} {}", f.writer_before, f.writer_after),
                f.lost,
                f.note
            )?;
        }
        self.write_kinds(t)?;
        writeln!(
            t,
            "\n  seed {}, {} faults in {:.0} s, server {}",
            self.seed,
            self.faults.len(),
            self.lasted_s,
            self.server
        )?;
        writeln!(
            t,
            "  looks at every kernel          {} (one every {:.1} ms, 99.9 % within {:.1} ms, longest gap {:.1} ms, blind \
             {:.3} s in gaps above {} ms)",
            self.looks, self.look_median_ms, self.look_p999_ms, self.look_longest_ms, self.blind_s, self.blind_above_ms
        )?;
        writeln!(t, "  an address on two hosts        {} looks", self.two_holders)?;
        for said in &self.two_holders_said {
            writeln!(t, "      {said}")?;
        }
        writeln!(t, "  ... and both servers writable  {} looks", self.two_writers)?;
        writeln!(
            t,
            "  two answers on the wire        {} of {} ARP rounds (the writer answered in {})",
            self.arp_two_answers.len(),
            self.arp_rounds,
            self.arp_writer_answered
        )?;
        for said in self.arp_two_answers.iter().take(20) {
            writeln!(t, "      {said}")?;
        }
        writeln!(
            t,
            "  two servers writable at once   {} looks (counted only: the address decides who is the writer)",
            self.two_writable
        )?;
        writeln!(
            t,
            "  acknowledged rows missing      {} of {}; {} of them without an excuse",
            self.missing.len(),
            self.acknowledged,
            self.missing_unexcused
        )?;
        let mut kinds: BTreeMap<String, Vec<&Missing>> = BTreeMap::new();
        for m in &self.missing {
            let why = m.excuse.clone().unwrap_or_else(|| "NO EXCUSE".to_owned());
            let kind = format!("{why} (writer {}, semi-sync {:?}, during: {})", m.writer, m.semisync, m.during);
            kinds.entry(kind).or_default().push(m);
        }
        for (kind, rows) in kinds {
            let (first, last) = (rows.first(), rows.last());
            let at = |m: Option<&&Missing>| m.map_or(0.0, |m| m.acknowledged_at_s);
            writeln!(t, "      {} rows, {:.3} s to {:.3} s: {kind}", rows.len(), at(first), at(last))?;
        }
        writeln!(t, "  rows doubled                   {}", self.doubled_rows)?;
        writeln!(t, "  rows there that were refused   {}", self.refused_but_there)?;
        writeln!(t, "  time without a writer          {:.1} s in gaps above 0.5 s", self.without_writer_s)?;
        for anew in &self.brought_in_line {
            writeln!(t, "  brought in line                {anew}")?;
        }
        for wrong in &self.wrongs {
            writeln!(t, "  WRONG                          {wrong}")?;
        }
        match &self.not_converged {
            None => writeln!(t, "  at the end                     everything serves, all hosts have the same rows")?,
            Some(why) => writeln!(t, "  NOT CONVERGED                  {why}")?,
        }
        let (safe, good) = (self.is_safe(), self.is_good());
        writeln!(
            t,
            "\n  {}",
            if good {
                "SAFE AND WHOLE"
            } else if safe {
                "SAFE, BUT NOT WHOLE"
            } else {
                "NOT SAFE"
            }
        )?;
        writeln!(t, "  the same again: {}", self.command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_is_the_longest_that_touches_the_window() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let acks: Vec<Instant> = [0, 20, 40, 400, 420, 2000].into_iter().map(at).collect();
        let gap = |from, until| longest_gap(&acks, at(from), at(until)).as_millis();
        assert_eq!(gap(10, 410), 360);
        assert_eq!(gap(401, 410), 20);
        assert_eq!(gap(410, 1000), 1580, "it ends with the next row, also behind the window");
    }
}

//! What the runs have shown: a line for each, and what they say together, as text and as JSON.

use super::proof::Proof;
use super::{Config, SemiSync, Work};
use crate::lab::load::{Fate, LoadJournal};
use serde::Serialize;
use std::fmt::Write as _;

#[derive(Clone, Debug, Default, Serialize)]
pub struct RunLine {
    pub run: usize,
    pub writer: String,
    /// In effect when the fault came.
    pub semisync: bool,
    /// Rows acknowledged a second before the fault.
    pub rate: f64,
    /// Until `move_role` had answered, or another host was seen as writer.
    pub answer_s: Option<f64>,
    /// No client was acknowledged anything.
    pub outage_s: f64,
    pub worst_client_s: f64,
    pub acknowledged: usize,
    /// Answers that were lost, and the row was there.
    pub found: usize,
    pub unknown: usize,
    /// Acknowledged rows that are missing at the end.
    pub lost: usize,
    pub lost_found: usize,
    pub doubled: usize,
    pub refused_but_there: usize,
    pub differ: Option<String>,
    pub compared: Vec<String>,
    /// The old master was ONLINE without an operator so long after its server or its cable was back.
    pub back_s: Option<f64>,
    /// Why it was not.
    pub kept_out: Option<String>,
    /// Rows that the host which is kept out has and the active master lacks, by comparing tables.
    pub extra: Option<usize>,
    pub extra_unacknowledged: usize,
    /// The same number, as the product says it.
    pub said_lost: Option<u64>,
    pub surprises: Vec<String>,
    /// Everything serves at the end of the run.
    pub whole: bool,
    pub logs: Option<String>,
    /// The proof has been made.
    pub proved: bool,
}

impl RunLine {
    pub const HEAD: &str = "  run  writer     semisync  rows/s  answer  outage  worst client  acknowledged  found  unknown  lost  doubled  tables  back";

    pub(super) fn new(run: usize) -> RunLine {
        RunLine { run, whole: true, ..RunLine::default() }
    }

    pub(super) fn surprise(&mut self, what: String) {
        self.surprises.push(what);
    }

    pub(super) fn take(&mut self, journal: &LoadJournal, proof: &Proof) {
        self.acknowledged = journal.count(Fate::Acknowledged);
        self.found = journal.count(Fate::Found);
        self.unknown = journal.count(Fate::Unknown);
        self.lost = proof.lost.len();
        self.lost_found = proof.lost_found.len();
        self.doubled = proof.doubled.len();
        self.refused_but_there = proof.refused_but_there.len();
        self.differ.clone_from(&proof.differ);
        self.compared = proof.compared.iter().map(|h| (*h).to_owned()).collect();
        self.extra = proof.extra;
        self.extra_unacknowledged = proof.extra_unacknowledged;
        self.proved = true;
    }

    /// Nothing that was promised is missing, nothing is doubled, and the tables are the same.
    /// Without semi-sync rows may be lost; whether they are counted and kept is in the surprises.
    pub fn is_right(&self, semisync: SemiSync) -> bool {
        let lost = if semisync == SemiSync::Off { 0 } else { self.lost + self.lost_found };
        self.proved && lost + self.doubled + self.refused_but_there == 0 && self.differ.is_none()
    }

    pub fn text(&self) -> String {
        let seconds = |s: Option<f64>| s.map_or("-".to_owned(), |s| format!("{s:.2}"));
        let back = match (&self.kept_out, self.extra) {
            (Some(why), Some(extra)) => {
                format!("kept out ({why}; by tables {extra}, {} of them unacknowledged)", self.extra_unacknowledged)
            }
            (Some(why), None) => format!("kept out ({why})"),
            (None, _) => seconds(self.back_s),
        };
        let tables = match (&self.differ, self.proved) {
            (None, true) => "same",
            (Some(_), _) => "DIFFER",
            (None, false) => "?",
        };
        let mut text = format!(
            "  {:>3}  {:<9}  {:<8}  {:>6.0}  {:>6}  {:>6.3}  {:>12.3}  {:>12}  {:>5}  {:>7}  {:>4}  {:>7}  {tables:<6}  {back}",
            self.run,
            self.writer,
            if self.semisync { "on" } else { "off" },
            self.rate,
            seconds(self.answer_s),
            self.outage_s,
            self.worst_client_s,
            self.acknowledged,
            self.found,
            self.unknown,
            self.lost + self.lost_found,
            self.doubled,
        );
        if let Some(differ) = &self.differ {
            let _ = write!(text, "\n       {differ}");
        }
        if self.refused_but_there > 0 {
            let _ = write!(text, "\n       {} rows are there that were refused", self.refused_but_there);
        }
        for surprise in &self.surprises {
            let _ = write!(text, "\n       SURPRISE: {}", surprise.trim().replace('\n', "\n       "));
        }
        if let Some(logs) = &self.logs {
            let _ = write!(text, "\n       logs: {logs}");
        }
        text
    }
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Spread {
    pub median: f64,
    pub p95: f64,
    pub max: f64,
}

impl Spread {
    fn of(mut all: Vec<f64>) -> Spread {
        all.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let n = ((all.len() as f64 * share).ceil() as usize).clamp(1, all.len().max(1));
            all.get(n - 1).copied().unwrap_or_default()
        };
        Spread { median: at(0.5), p95: at(0.95), max: at(1.0) }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub command: String,
    pub server: String,
    pub work: Work,
    pub semisync: SemiSync,
    pub durable: bool,
    pub runs: Vec<RunLine>,
    pub rate_wanted: u32,
    pub rate: Spread,
    pub outage_s: Spread,
    pub worst_client_s: Spread,
    pub acknowledged: usize,
    pub lost_acknowledged: usize,
    pub doubled: usize,
    /// Runs in which the tables of the ONLINE hosts differ.
    pub differing: usize,
    pub unproved: usize,
    /// Rows on old masters that were kept out, by comparing tables: acknowledged and not.
    pub extra_acknowledged: usize,
    pub extra_unacknowledged: usize,
    /// Runs in which the product's number of lost transactions was another one.
    pub said_wrong: usize,
    pub back: usize,
    pub back_s: Spread,
    pub without_semisync: usize,
    pub surprises: usize,
}

impl Summary {
    pub(super) fn of(config: &Config, server: String, runs: Vec<RunLine>) -> Summary {
        let sum = |of: fn(&RunLine) -> usize| runs.iter().map(of).sum::<usize>();
        let spread = |of: fn(&RunLine) -> f64| Spread::of(runs.iter().map(of).collect());
        let back: Vec<f64> = runs.iter().filter_map(|r| r.back_s).collect();
        Summary {
            command: config.command(),
            server,
            work: config.work,
            semisync: config.semisync,
            durable: config.durable,
            rate_wanted: config.load.rate,
            rate: spread(|r| r.rate),
            outage_s: spread(|r| r.outage_s),
            worst_client_s: spread(|r| r.worst_client_s),
            acknowledged: sum(|r| r.acknowledged),
            lost_acknowledged: sum(|r| r.lost + r.lost_found),
            doubled: sum(|r| r.doubled),
            differing: sum(|r| usize::from(r.differ.is_some())),
            unproved: sum(|r| usize::from(!r.proved)),
            extra_acknowledged: sum(|r| r.extra.unwrap_or(0) - r.extra_unacknowledged),
            extra_unacknowledged: sum(|r| r.extra_unacknowledged),
            said_wrong: sum(|r| usize::from(r.said_lost.is_some_and(|n| Some(n) != r.extra.map(|e| e as u64)))),
            back: back.len(),
            back_s: Spread::of(back),
            without_semisync: sum(|r| usize::from(!r.semisync)),
            surprises: sum(|r| r.surprises.len()),
            runs,
        }
    }

    /// Nothing promised is lost, nothing doubled, nothing different anywhere.
    pub fn is_right(&self) -> bool {
        !self.runs.is_empty() && self.runs.iter().all(|r| r.is_right(self.semisync))
    }

    /// ... and nothing else was unexpected.
    pub fn is_good(&self) -> bool {
        self.is_right() && self.surprises == 0
    }

    pub fn text(&self) -> String {
        let mut t = String::new();
        let _ = self.write(&mut t);
        t
    }

    fn write(&self, t: &mut String) -> std::fmt::Result {
        let spread = |s: &Spread| format!("{:.3} median, {:.3} p95, {:.3} max", s.median, s.p95, s.max);
        let n = self.runs.len();
        writeln!(
            t,
            "  {} {} on {}{}",
            n,
            self.work.as_str(),
            self.server,
            if self.durable { ", durable" } else { "" }
        )?;
        let slowest = self.runs.iter().map(|r| r.rate).fold(f64::INFINITY, f64::min);
        writeln!(
            t,
            "  rows a second before the fault  {:.0} wanted, {:.0} reached (median), {slowest:.0} in the slowest run",
            self.rate_wanted, self.rate.median
        )?;
        writeln!(t, "  write outage, seconds           {}", spread(&self.outage_s))?;
        writeln!(t, "  ... of the worst client         {}", spread(&self.worst_client_s))?;
        writeln!(t, "  acknowledged rows lost          {} of {}", self.lost_acknowledged, self.acknowledged)?;
        writeln!(t, "  rows doubled                    {}", self.doubled)?;
        writeln!(t, "  runs with different tables      {} (not compared: {})", self.differing, self.unproved)?;
        writeln!(t, "  runs without semi-sync          {}", self.without_semisync)?;
        if self.work != Work::Moves {
            writeln!(t, "  old master ONLINE by itself     {} of {n}, after {} s", self.back, spread(&self.back_s))?;
            writeln!(
                t,
                "  rows only on old masters        {} acknowledged, {} not; the product's number was another one {} times",
                self.extra_acknowledged, self.extra_unacknowledged, self.said_wrong
            )?;
        }
        writeln!(t, "  surprises                       {}", self.surprises)?;
        writeln!(t, "  the same again: {}", self.command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_is_of_measured_values() {
        let spread = Spread::of((1..=20).map(f64::from).collect());
        assert_eq!((spread.median, spread.p95, spread.max), (10.0, 19.0, 20.0));
        assert_eq!(Spread::of(vec![]).max, 0.0);
    }

    #[test]
    fn a_run_that_was_not_proved_is_not_right() {
        let mut line = RunLine::new(1);
        assert!(!line.is_right(SemiSync::Off));
        line.proved = true;
        assert!(line.is_right(SemiSync::File));
        line.lost_found = 1;
        assert!(!line.is_right(SemiSync::File));
        assert!(line.is_right(SemiSync::Off));
        line.doubled = 1;
        assert!(!line.is_right(SemiSync::Off));
    }
}

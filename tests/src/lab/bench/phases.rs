//! Where the time of a failover went, from the moments that the daemons' own logs give. All run on one machine, so their
//! clock is one.

use crate::lab::Lab;
use crate::lab::network::{MONITOR, WRITER};
use anyhow::{Context as _, Result};
use serde::Serialize;
use std::fmt;
use std::time::{Duration, SystemTime};

const DAY_US: u64 = 86_400_000_000;

/// Each part in milliseconds, from the end of the one before it; NaN was not found in the logs. With how often the monitor
/// and the two agents have saved their state to disk meanwhile, each save being waited for by somebody.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Phases {
    /// From the fault until somebody knows of it.
    notice: f64,
    /// Until it is decided who gets the writer.
    decide: f64,
    /// Until the old holder is off for certain, and the new one has applied what it has.
    fence_and_drain: f64,
    /// Until the new one's server is open.
    open: f64,
    /// Until it has the address and says so.
    announce: f64,
    /// Until the client's first write is acknowledged.
    client: f64,
    saves: [f64; 6],
}

/// What the daemons are to log for it.
pub(super) const LOG: &str = "info,mmm_agentd::disk=debug,mmm_mond::status=debug";
const SAVED: &str = "the state is on disk";

/// Microseconds of the day (UTC), as the logs have it.
pub(super) fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros() % u128::from(DAY_US)).unwrap_or(0)
}

impl Phases {
    /// `fault` is a moment of [`now`]; `answered`: from there to the client's first write on the new writer.
    pub(super) fn read(lab: &Lab, from: &str, to: &str, fault: u64, answered: Duration) -> Result<Phases> {
        let log = |host: &str, program: &str| {
            let file = lab.dir().join(host).join(format!("{program}.log"));
            std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))
        };
        let monitor = log(MONITOR, "mmm_mond")?;
        let old = log(from, "mmm_agentd")?;
        let new = log(to, "mmm_agentd")?;
        let first = |log: &str, words: &[&str]| first(log, fault, words);
        let here = format!("writer({WRITER}) is on this host");
        let noticed = [
            first(&old, &["The local server has ended", "The local server hangs"]),
            first(&monitor, &["changed from ONLINE to", "The writer goes from", "The writer moves from"]),
        ];
        let marks = [
            noticed.into_iter().reduce(f64::min).unwrap_or(f64::NAN),
            first(&monitor, &["The writer goes from", "The writer moves from"]),
            first(&monitor, &["The writer is given to"]),
            first(&new, &["The server is writable"]),
            first(&new, &[&here]),
            answered.as_secs_f64() * 1000.0,
        ];
        let saves: Vec<f64> = [&monitor, &old, &new].into_iter().flat_map(|log| times(log, fault, &[SAVED])).collect();
        Ok(Phases::between(marks, &saves))
    }

    /// `saved`: when each save was on disk. All in milliseconds since the fault.
    fn between(marks: [f64; 6], saved: &[f64]) -> Phases {
        let mut before = 0.0;
        let parts = marks.map(|at| {
            let part = at - before;
            let saves = saved.iter().filter(|save| **save > before && **save <= at).count();
            before = if at.is_nan() { before } else { at };
            (part, saves as f64)
        });
        let [notice, decide, fence_and_drain, open, announce, client] = parts.map(|(part, _)| part);
        Phases { notice, decide, fence_and_drain, open, announce, client, saves: parts.map(|(_, saves)| saves) }
    }

    fn parts(&self) -> [f64; 6] {
        [self.notice, self.decide, self.fence_and_drain, self.open, self.announce, self.client]
    }

    /// Of each part for itself.
    pub(super) fn median<'p>(all: impl Iterator<Item = &'p Phases>) -> Phases {
        let all: Vec<&Phases> = all.collect();
        let middle = |values: Vec<f64>| {
            let mut known: Vec<f64> = values.into_iter().filter(|value| !value.is_nan()).collect();
            known.sort_by(f64::total_cmp);
            known.get(known.len() / 2).copied().unwrap_or(f64::NAN)
        };
        let [notice, decide, fence_and_drain, open, announce, client] =
            std::array::from_fn(|n| middle(all.iter().map(|phases| phases.parts()[n]).collect()));
        let saves = std::array::from_fn(|n| middle(all.iter().map(|phases| phases.saves[n]).collect()));
        Phases { notice, decide, fence_and_drain, open, announce, client, saves }
    }
}

impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = ["notice", "decide", "fence and drain", "open", "announce", "client"];
        let parts: Vec<String> = names.iter().zip(self.parts()).map(|(name, ms)| format!("{name} {ms:.0}")).collect();
        let saves = self.saves.map(|n| format!("{n:.0}")).join("+");
        write!(f, "{} ms; saves {saves}", parts.join(", "))
    }
}

/// As [`times`], the first one; NaN: there is none.
fn first(log: &str, fault: u64, words: &[&str]) -> f64 {
    times(log, fault, words).next().unwrap_or(f64::NAN)
}

/// Milliseconds after the fault of each line since then that has any of the words.
fn times(log: &str, fault: u64, words: &[&str]) -> impl Iterator<Item = f64> {
    let after = move |line: &str| (time_of(line)? + DAY_US - fault).checked_rem(DAY_US).filter(|us| *us < DAY_US / 2);
    let lines = log.lines().filter(|line| words.iter().any(|w| line.contains(w)));
    lines.filter_map(after).map(|us| us as f64 / 1000.0)
}

/// Microseconds of the day of a line such as `2026-11-22T02:59:06.105029Z  INFO …`.
fn time_of(line: &str) -> Option<u64> {
    let (_, time) = line.split_once('T')?;
    let time = time.get(..15)?;
    let number = |from: usize, to: usize| time.get(from..to)?.parse::<u64>().ok();
    Some(((number(0, 2)? * 60 + number(3, 5)?) * 60 + number(6, 8)?) * 1_000_000 + number(9, 15)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
2026-11-22T02:59:06.105029Z  INFO earlier: The writer goes from db1 to db2
2026-11-22T02:59:07.000001Z  INFO State of host 'db1' changed from ONLINE to HARD_OFFLINE
2026-11-22T02:59:07.250001Z  INFO The writer goes from db1 to db2
-- lab: process 7 has ended";

    #[test]
    fn a_moment_is_that_of_the_first_line_after_the_fault() {
        let fault = time_of(LOG.lines().nth(1).unwrap()).unwrap() - 1_000;
        assert_eq!(first(LOG, fault, &["The writer goes from"]), 251.0);
        assert_eq!(first(LOG, fault, &["changed from", "The writer goes"]), 1.0);
        assert!(first(LOG, fault, &["nothing"]).is_nan());
    }

    #[test]
    fn a_fault_before_midnight_is_seen_after_it() {
        let log = "2026-11-23T00:00:00.100000Z  INFO The server is writable";
        assert_eq!(first(log, DAY_US - 100_000, &["writable"]), 200.0);
    }

    #[test]
    fn parts_follow_each_other_and_a_missing_one_belongs_to_the_next() {
        let phases = Phases::between([10.0, 11.0, f64::NAN, 20.0, 21.0, 40.0], &[2.0, 10.5, 15.0, 99.0]);
        assert_eq!(
            phases.to_string(),
            "notice 10, decide 1, fence and drain NaN, open 9, announce 1, client 19 ms; saves 1+1+0+1+0+0"
        );
        let other = Phases::between([30.0, 32.0, 33.0, 34.0, 35.0, 36.0], &[]);
        let median = Phases::median([phases, other, other].iter());
        assert_eq!((median.notice, median.fence_and_drain, median.saves[0]), (30.0, 1.0, 0.0));
    }
}

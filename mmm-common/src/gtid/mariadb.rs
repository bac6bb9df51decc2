//! MariaDB: the highest sequence number per (domain, server_id), as in gtid_binlog_state.
//!
//! Within one domain and one server_id, sequence numbers only grow and arrive in order (gtid_strict_mode), so
//! "has number n" means "has every one up to n that exists". Counting the difference counts sequence numbers.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// `domain-server_id-sequence`, highest per domain and server. Text form: `0-1-100,0-2-57`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MariaGtids {
    highest: BTreeMap<(u32, u32), u64>,
}

impl MariaGtids {
    /// Takes the higher number of both, for each domain and server.
    #[must_use]
    pub fn union(mut self, other: &MariaGtids) -> MariaGtids {
        for (key, seq) in &other.highest {
            let mine = self.highest.entry(*key).or_insert(0);
            *mine = (*mine).max(*seq);
        }
        self
    }

    /// How many sequence numbers of `other` lie above what is here.
    pub fn missing(&self, other: &MariaGtids) -> u64 {
        self.missing_by_source(other).values().sum()
    }

    /// Of how many of its servers' transactions some are missing here although others of the same domain, which came
    /// after them in `other`, are here: within a domain everything is applied in order, so they will never come. A server
    /// of which nothing at all is here tells nothing: its transactions may have come with a copy.
    pub(super) fn gone_past(&self, other: &MariaGtids) -> u64 {
        let last = |domain: u32| self.highest.iter().filter(|((d, _), _)| *d == domain).map(|(_, n)| *n).max();
        let gaps = other.highest.iter().filter_map(|(key, theirs)| {
            let mine = *self.highest.get(key)?;
            (mine < *theirs && last(key.0).is_some_and(|last| *theirs < last)).then(|| theirs - mine)
        });
        gaps.sum()
    }

    pub(super) fn missing_by_source(&self, other: &MariaGtids) -> BTreeMap<String, u64> {
        let rest = |key: &(u32, u32), seq: u64| seq.saturating_sub(self.highest.get(key).copied().unwrap_or(0));
        let all = other.highest.iter().map(|(key, seq)| (format!("{}-{}", key.0, key.1), rest(key, *seq)));
        all.filter(|(_, n)| *n > 0).collect()
    }
}

impl FromStr for MariaGtids {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let mut highest = BTreeMap::new();
        for one in s.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let bad = || format!("'{one}' is no MariaDB GTID (domain-server-sequence)");
            let mut parts = one.split('-');
            let (Some(d), Some(s), Some(n), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
                return Err(bad());
            };
            let key = (d.parse().map_err(|_| bad())?, s.parse().map_err(|_| bad())?);
            let seq: u64 = n.parse().map_err(|_| bad())?;
            let mine = highest.entry(key).or_insert(0);
            *mine = seq.max(*mine);
        }
        Ok(MariaGtids { highest })
    }
}

impl fmt::Display for MariaGtids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, ((d, s), n)) in self.highest.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{d}-{s}-{n}")?;
        }
        Ok(())
    }
}

impl TryFrom<String> for MariaGtids {
    type Error = String;
    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

impl From<MariaGtids> for String {
    fn from(g: MariaGtids) -> String {
        g.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(have: &str, want: &str) -> u64 {
        have.parse::<MariaGtids>().unwrap().missing(&want.parse().unwrap())
    }

    #[test]
    fn what_was_gone_past_is_told_from_what_is_still_to_come() {
        let gone = |mine: &str, theirs: &str| mine.parse::<MariaGtids>().unwrap().gone_past(&theirs.parse().unwrap());
        assert_eq!(gone("0-1-38502,0-2-39000", "0-1-38504,0-2-39000"), 2, "0-2-39000 was applied without them");
        assert_eq!(gone("0-1-38502", "0-1-38504"), 0, "they come next");
        assert_eq!(gone("0-1-38502,0-2-38400", "0-1-38504,0-2-39000"), 0);
        assert_eq!(gone("0-2-39000", "0-1-38504,0-2-39000"), 0, "a copy");
        assert_eq!(gone("0-1-5,1-2-90", "0-1-7,1-2-90"), 0, "every domain for itself");
    }

    #[test]
    fn counts_per_domain_and_server_never_one_number() {
        assert_eq!(missing("0-1-100", "0-1-100"), 0);
        assert_eq!(missing("0-1-100", "0-1-105"), 5);
        // A higher number of another server does not stand in for this one's.
        assert_eq!(missing("0-2-900", "0-1-3"), 3);
        assert_eq!(missing("0-1-5,0-2-9", "0-1-5"), 0);
        assert_eq!(missing("", "1-1-2,0-1-1"), 3);
    }

    #[test]
    fn reads_what_servers_write_and_refuses_the_rest() {
        let g: MariaGtids = " 0-1-5, 0-1-7,1-3-2 ".parse().unwrap();
        assert_eq!(g.to_string(), "0-1-7,1-3-2");
        for bad in ["0-1", "0-1-x", "0-1-2-3", "a", "0--1"] {
            assert!(bad.parse::<MariaGtids>().is_err(), "{bad}");
        }
    }
}

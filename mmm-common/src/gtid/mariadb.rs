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

    /// How many transactions of `other` are not here. Numbers are a domain's, whoever writes: where both go different
    /// ways, all that `other` has goes on from the last number that both have.
    pub fn missing(&self, other: &MariaGtids) -> u64 {
        let mut ends: BTreeMap<u32, u64> = BTreeMap::new();
        let mut holes = 0;
        for ((domain, _), seq, mine) in self.behind(other) {
            if seq > self.common(other, domain) {
                let end = ends.entry(domain).or_insert(0);
                *end = seq.max(*end);
            } else {
                holes += seq - mine;
            }
        }
        ends.iter().map(|(domain, end)| end - self.common(other, *domain)).sum::<u64>() + holes
    }

    /// Whose numbers in `other` are higher than here: both numbers.
    fn behind<'a>(&'a self, other: &'a MariaGtids) -> impl Iterator<Item = ((u32, u32), u64, u64)> + 'a {
        let both = other.highest.iter().map(|(key, seq)| (*key, *seq, self.highest.get(key).copied().unwrap_or(0)));
        both.filter(|(_, seq, mine)| seq > mine)
    }

    /// The last number of the domain that is certainly in both.
    fn common(&self, other: &MariaGtids, domain: u32) -> u64 {
        let of_domain = self.highest.iter().filter(|((d, _), _)| *d == domain);
        of_domain.filter_map(|(key, mine)| other.highest.get(key).map(|theirs| *mine.min(theirs))).max().unwrap_or(0)
    }

    /// Of how many of its servers' transactions some are missing here although others of the same domain, which came
    /// after them in `other`, are here: within a domain everything is applied in order, so they will never come. A server
    /// of which nothing at all is here tells nothing: its transactions may have come with a copy.
    pub(super) fn gone_past(&self, other: &MariaGtids) -> u64 {
        let gaps = other.highest.iter().filter_map(|(key, theirs)| {
            let mine = *self.highest.get(key)?;
            // What only this server has came after nothing in `other`.
            (mine < *theirs && *theirs < self.common(other, key.0)).then(|| theirs - mine)
        });
        gaps.sum()
    }

    pub(super) fn missing_by_source(&self, other: &MariaGtids) -> BTreeMap<String, u64> {
        let counted = self.behind(other).map(|((domain, server), seq, mine)| {
            let common = self.common(other, domain);
            (format!("{domain}-{server}"), if seq > common { seq - common } else { seq - mine })
        });
        counted.collect()
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
        assert_eq!(
            gone("0-2-405,0-1-411", "0-1-407,0-2-410"),
            0,
            "0-1-408 to 411 are its own: they came after nothing there"
        );
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
    fn numbers_go_on_from_the_master_before() {
        assert_eq!(missing("0-1-531", "0-1-531,0-2-533"), 2, "server 2 has taken over after 531");
        assert_eq!(missing("0-1-531,0-2-57", "0-1-531,0-2-533"), 2, "for the second time");
        assert_eq!(missing("0-1-540", "0-1-531,0-2-533"), 2, "server 1 has written on alone");
        assert_eq!(missing("0-1-531", "0-1-537,0-2-533"), 6, "to and fro");
        assert_eq!(missing("0-1-38502,0-2-39000", "0-1-38504,0-2-39000"), 2, "a hole");
        assert_eq!(missing("0-1-531,1-2-7", "0-1-531,1-2-9"), 2, "every domain for itself");
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

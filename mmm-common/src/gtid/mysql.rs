//! MySQL: closed intervals of transaction numbers per source UUID and, since 8.3, per tag.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Text form: `uuid:1-5:7,uuid2:1-3:tag:1-4`. Source is `uuid`, or `uuid:tag` for tagged transactions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MysqlGtids {
    /// Sorted, disjoint, never touching.
    intervals: BTreeMap<String, Vec<(u64, u64)>>,
}

impl MysqlGtids {
    #[must_use]
    pub fn union(mut self, other: &MysqlGtids) -> MysqlGtids {
        for (source, theirs) in &other.intervals {
            let mine = self.intervals.entry(source.clone()).or_default();
            mine.extend(theirs);
            *mine = merged(std::mem::take(mine));
        }
        self
    }

    /// How many transactions of `other` are not here.
    pub fn missing(&self, other: &MysqlGtids) -> u64 {
        self.missing_by_source(other).values().sum()
    }

    pub(super) fn missing_by_source(&self, other: &MysqlGtids) -> BTreeMap<String, u64> {
        let all = other.intervals.iter().map(|(source, theirs)| {
            let mine = self.intervals.get(source).map_or(&[][..], Vec::as_slice);
            let rest: u64 = theirs.iter().map(|&(from, to)| (to - from + 1) - covered(mine, from, to)).sum();
            (source.clone(), rest)
        });
        all.filter(|(_, n)| *n > 0).collect()
    }
}

/// How many of `from..=to` lie in the sorted, disjoint intervals.
fn covered(intervals: &[(u64, u64)], from: u64, to: u64) -> u64 {
    intervals.iter().map(|&(a, b)| (b.min(to) + 1).saturating_sub(a.max(from))).sum()
}

fn merged(mut list: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    list.sort_unstable();
    let mut out: Vec<(u64, u64)> = Vec::with_capacity(list.len());
    for (from, to) in list {
        match out.last_mut() {
            Some(last) if from <= last.1 + 1 => last.1 = last.1.max(to),
            Some(_) | None => out.push((from, to)),
        }
    }
    out
}

impl FromStr for MysqlGtids {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let mut intervals: BTreeMap<String, Vec<(u64, u64)>> = BTreeMap::new();
        // The server breaks lines after commas.
        for one in s.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let mut parts = one.split(':').map(str::trim);
            let uuid = parts.next().unwrap_or_default().to_ascii_lowercase();
            if uuid.len() != 36 || !uuid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') {
                return Err(format!("'{one}' is no MySQL GTID set (uuid:interval)"));
            }
            let mut source = uuid.clone();
            for part in parts {
                if part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
                    source = format!("{uuid}:{}", part.to_ascii_lowercase());
                    continue;
                }
                let bad = || format!("'{part}' is no interval of transaction numbers in '{one}'");
                let (from, to) = part.split_once('-').unwrap_or((part, part));
                let (from, to) = (from.parse::<u64>().map_err(|_| bad())?, to.parse::<u64>().map_err(|_| bad())?);
                // The largest number a server uses is i64::MAX - 1.
                if from == 0 || to < from || to > i64::MAX as u64 {
                    return Err(bad());
                }
                intervals.entry(source.clone()).or_default().push((from, to));
            }
        }
        for list in intervals.values_mut() {
            *list = merged(std::mem::take(list));
        }
        Ok(MysqlGtids { intervals })
    }
}

impl fmt::Display for MysqlGtids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (source, list)) in self.intervals.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            f.write_str(source)?;
            for (from, to) in list {
                if from == to { write!(f, ":{from}")? } else { write!(f, ":{from}-{to}")? }
            }
        }
        Ok(())
    }
}

impl TryFrom<String> for MysqlGtids {
    type Error = String;
    fn try_from(s: String) -> Result<Self, String> {
        s.parse()
    }
}

impl From<MysqlGtids> for String {
    fn from(g: MysqlGtids) -> String {
        g.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const A: &str = "3e11fa47-71ca-11e1-9e33-c80aa9429562";

    fn missing(have: &str, want: &str) -> u64 {
        let full = |s: &str| s.replace('A', A).parse::<MysqlGtids>().unwrap();
        full(have).missing(&full(want))
    }

    #[test]
    fn intervals_gaps_and_tags() {
        assert_eq!(missing("A:1-10", "A:1-10"), 0);
        assert_eq!(missing("A:1-10", "A:1-12"), 2);
        assert_eq!(missing("A:1-3:5-10", "A:1-10"), 1);
        assert_eq!(missing("A:1-10", "A:t:1-4"), 4, "a tag is a source of its own");
        assert_eq!(missing("A:1-10:t:1-4", "A:3:t:2"), 0);
        assert_eq!(missing("", "A:7"), 1);
        let gtids = |s: &str| crate::gtid::Gtids::MySql(s.replace('A', A).parse().unwrap());
        let by_source = gtids("A:1-3").missing_by_source(&gtids("A:1-5:t:1"));
        assert_eq!(by_source, [(A.to_owned(), 2), (format!("{A}:t"), 1)].into());
        assert_eq!(gtids("A:1-5:t:1").sources(), [A.to_owned(), format!("{A}:t")].into());
    }

    #[test]
    fn text_goes_round_and_rubbish_is_refused() {
        let text = format!("{}:1-5:7,\n{}:t:1-2", A.to_uppercase(), A);
        let set: MysqlGtids = text.parse().unwrap();
        assert_eq!(set.to_string(), format!("{A}:1-5:7,{A}:t:1-2"));
        for bad in ["0-1-5", "x:1", &format!("{A}:0"), &format!("{A}:5-4"), &format!("{A}:1-99999999999999999999")] {
            assert!(bad.parse::<MysqlGtids>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn missing_is_set_difference(have in prop::collection::vec((1u64..60, 0u64..9), 0..6),
                                     want in prop::collection::vec((1u64..60, 0u64..9), 0..6)) {
            let set = |v: &[(u64, u64)]| v.iter().flat_map(|&(a, n)| a..=a + n).collect::<BTreeSet<u64>>();
            let gtids = |v: &[(u64, u64)]| v.iter().fold(MysqlGtids::default(), |all, &(a, n)| {
                all.union(&format!("{A}:{a}-{}", a + n).parse().unwrap())
            });
            prop_assert_eq!(gtids(&have).missing(&gtids(&want)), set(&want).difference(&set(&have)).count() as u64);
        }
    }
}

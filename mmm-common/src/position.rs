//! Up to where a server has executed: by GTID, or without those by a place in one host's binary log.

use crate::gtid::Gtids;
use crate::ids::HostName;
use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", content = "at", rename_all = "snake_case")]
pub enum Position {
    Gtids(Gtids),
    /// Says something only to a server that replicates from that host.
    Log(LogPosition),
}

impl Position {
    pub fn gtids(&self) -> Option<&Gtids> {
        match self {
            Position::Gtids(gtids) => Some(gtids),
            Position::Log(_) => None,
        }
    }
}

impl From<Gtids> for Position {
    fn from(gtids: Gtids) -> Self {
        Position::Gtids(gtids)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Position::Gtids(gtids) => gtids.fmt(f),
            Position::Log(log) => write!(f, "{} of {}", log.place, log.host),
        }
    }
}

/// A place in the binary log of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPosition {
    pub host: HostName,
    pub place: LogPlace,
}

/// `mysql-bin.000012:157`: the file's name, and bytes from its beginning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPlace {
    pub file: String,
    pub pos: u64,
}

impl LogPlace {
    /// Whether this is at or behind `other` in the same log. None: the files are none of one log, or have no number.
    pub fn reaches(&self, other: &LogPlace) -> Option<bool> {
        let (mine, theirs) = (numbered(&self.file)?, numbered(&other.file)?);
        (mine.0 == theirs.0).then(|| (mine.1, self.pos) >= (theirs.1, other.pos))
    }
}

/// The number grows past six digits: the files of a log are not in the order of their names.
fn numbered(file: &str) -> Option<(&str, u64)> {
    let (base, number) = file.rsplit_once('.')?;
    Some((base, number.parse().ok()?))
}

impl fmt::Display for LogPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.pos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_one_log_are_in_the_order_of_their_numbers() {
        let place = |file: &str, pos| LogPlace { file: file.to_owned(), pos };
        let reaches = |a: (&str, u64), b: (&str, u64)| place(a.0, a.1).reaches(&place(b.0, b.1));
        assert_eq!(reaches(("bin.000002", 157), ("bin.000002", 157)), Some(true));
        assert_eq!(reaches(("bin.000002", 156), ("bin.000002", 157)), Some(false));
        assert_eq!(reaches(("bin.000003", 4), ("bin.000002", 900)), Some(true));
        assert_eq!(reaches(("bin.1000000", 4), ("bin.999999", 900)), Some(true), "not by name");
        assert_eq!(reaches(("other.000003", 4), ("bin.000002", 900)), None);
        assert_eq!(reaches(("", 0), ("bin.000002", 900)), None, "nothing is known yet");
    }
}

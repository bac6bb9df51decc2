//! Sets of transactions, as both dialects name them, with the three questions a failover asks: does one side have
//! everything of the other, what is missing, and how many.

mod mariadb;
mod mysql;

pub use mariadb::MariaGtids;
pub use mysql::MysqlGtids;

use serde::{Deserialize, Serialize};
use std::fmt;

/// What a server has executed or received, by GTID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "dialect", content = "gtids", rename_all = "lowercase")]
pub enum Gtids {
    MariaDb(MariaGtids),
    MySql(MysqlGtids),
}

impl Gtids {
    /// Whether everything in `other` is in `self`; None when the two are of different dialects.
    pub fn contains(&self, other: &Gtids) -> Option<bool> {
        self.missing(other).map(|n| n == 0)
    }

    /// How many transactions of `other` are not in `self`; None when the two are of different dialects.
    pub fn missing(&self, other: &Gtids) -> Option<u64> {
        match (self, other) {
            (Gtids::MariaDb(a), Gtids::MariaDb(b)) => Some(a.missing(b)),
            (Gtids::MySql(a), Gtids::MySql(b)) => Some(a.missing(b)),
            (Gtids::MariaDb(_), Gtids::MySql(_)) | (Gtids::MySql(_), Gtids::MariaDb(_)) => None,
        }
    }
}

impl fmt::Display for Gtids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Gtids::MariaDb(g) => g.fmt(f),
            Gtids::MySql(g) => g.fmt(f),
        }
    }
}

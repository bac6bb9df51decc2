//! Sets of transactions, as both dialects name them, with the three questions a failover asks: does one side have
//! everything of the other, what is missing, and how many.

mod mariadb;
mod mysql;

pub use mariadb::MariaGtids;
pub use mysql::MysqlGtids;

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
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

    /// How many transactions of `other` are not in `self`, by who wrote them first: `domain-server_id`, or MySQL's UUID
    /// (with the tag). Empty when the two are of different dialects.
    pub fn missing_by_source(&self, other: &Gtids) -> BTreeMap<String, u64> {
        match (self, other) {
            (Gtids::MariaDb(a), Gtids::MariaDb(b)) => a.missing_by_source(b),
            (Gtids::MySql(a), Gtids::MySql(b)) => a.missing_by_source(b),
            (Gtids::MariaDb(_), Gtids::MySql(_)) | (Gtids::MySql(_), Gtids::MariaDb(_)) => BTreeMap::new(),
        }
    }

    /// How many transactions of `other` are not in `self` and never will be, since later ones of the same domain are.
    /// MariaDB only: MySQL's sets show what is missing, and fetch it.
    pub fn gone_past(&self, other: &Gtids) -> u64 {
        match (self, other) {
            (Gtids::MariaDb(a), Gtids::MariaDb(b)) => a.gone_past(b),
            (Gtids::MySql(_), _) | (Gtids::MariaDb(_), Gtids::MySql(_)) => 0,
        }
    }

    /// Everything of both; `self` when the two are of different dialects.
    #[must_use]
    pub fn union(self, other: &Gtids) -> Gtids {
        match (self, other) {
            (Gtids::MariaDb(a), Gtids::MariaDb(b)) => Gtids::MariaDb(a.union(b)),
            (Gtids::MySql(a), Gtids::MySql(b)) => Gtids::MySql(a.union(b)),
            (a @ Gtids::MariaDb(_), Gtids::MySql(_)) | (a @ Gtids::MySql(_), Gtids::MariaDb(_)) => a,
        }
    }

    /// Who has written anything in it; as in [`Gtids::missing_by_source`].
    pub fn sources(&self) -> BTreeSet<String> {
        let nothing = match self {
            Gtids::MariaDb(_) => Gtids::MariaDb(MariaGtids::default()),
            Gtids::MySql(_) => Gtids::MySql(MysqlGtids::default()),
        };
        nothing.missing_by_source(self).into_keys().collect()
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

//! MariaDB or MySQL: which words a server understands, and what its answers mean.
//!
//! MariaDB is told by its name in VERSION(), never by a number. Within a dialect, older spellings are tried when the
//! server does not know the newer one. Everything here is text in, value out.

use super::session::{Fields, QUERY, Session, Trouble};
use super::{mariadb, mysql8, status};
use mmm_common::gtid::Gtids;
use mmm_common::position::LogPlace;
use mmm_common::report::Writing;
use status::Status;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    MariaDb,
    MySql,
}

/// The statements that differ in spelling only. Each a list: the next one is tried when the one before is unknown.
pub(super) struct Words {
    pub(super) vitals: &'static [&'static str],
    pub(super) status: &'static [&'static str],
    /// The end of its own binary log.
    pub(super) log_status: &'static [&'static str],
    pub(super) start: &'static [&'static str],
    pub(super) stop: &'static [&'static str],
    pub(super) start_sql: &'static [&'static str],
    pub(super) start_io: &'static [&'static str],
    pub(super) stop_io: &'static [&'static str],
    /// Forgets the source, and the relay log with it.
    pub(super) forget: &'static [&'static str],
    pub(super) read_only_on: &'static [&'static str],
    pub(super) read_only_off: &'static [&'static str],
}

/// What the server's variables say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Vitals {
    pub(super) writing: Writing,
    pub(super) executed: Option<Gtids>,
    /// Why there is no `executed`, and what to configure.
    pub(super) no_gtids: Option<String>,
    /// MariaDB: it has written transactions of its own that its replication position does not cover.
    pub(super) ex_master: bool,
}

impl Dialect {
    pub(super) fn of_version(version: &str) -> Dialect {
        if version.to_ascii_lowercase().contains("mariadb") { Dialect::MariaDb } else { Dialect::MySql }
    }

    pub(super) fn words(self) -> &'static Words {
        match self {
            Dialect::MariaDb => &mariadb::WORDS,
            Dialect::MySql => &mysql8::WORDS,
        }
    }

    fn vitals(self, row: &Fields) -> Result<Vitals, Trouble> {
        match self {
            Dialect::MariaDb => mariadb::vitals(row),
            Dialect::MySql => mysql8::vitals(row),
        }
    }

    fn status(self, row: &Fields) -> Result<Status, Trouble> {
        match self {
            Dialect::MariaDb => mariadb::status(row),
            Dialect::MySql => mysql8::status(row),
        }
    }
}

/// `read_only` as 0/1, ON/OFF, or one of newer MariaDB's other kinds of ON.
pub(super) fn is_on(value: &str) -> bool {
    !matches!(value.to_ascii_uppercase().as_str(), "" | "0" | "OFF")
}

/// Everything of both.
pub(super) fn union(a: Option<Gtids>, b: Option<&Gtids>) -> Option<Gtids> {
    match (a, b) {
        (Some(Gtids::MariaDb(a)), Some(Gtids::MariaDb(b))) => Some(Gtids::MariaDb(a.union(b))),
        (Some(Gtids::MySql(a)), Some(Gtids::MySql(b))) => Some(Gtids::MySql(a.union(b))),
        (Some(a), _) => Some(a),
        (None, b) => b.cloned(),
    }
}

impl Session {
    pub(super) async fn vitals(&mut self) -> Result<Vitals, Trouble> {
        let rows = self.rows_of(QUERY, self.dialect.words().vitals).await?;
        let row =
            rows.first().ok_or_else(|| Trouble::Strange { why: "no row for the server's variables".to_owned() })?;
        self.dialect.vitals(row)
    }

    /// The end of the server's own binary log; None when it writes none.
    pub(super) async fn log_end(&mut self) -> Result<Option<LogPlace>, Trouble> {
        let rows = self.rows_of(QUERY, self.dialect.words().log_status).await?;
        let place =
            |row: &Fields| Ok(LogPlace { file: row.text(&["File"])?.to_owned(), pos: row.number(&["Position"])? });
        rows.first().map(place).transpose()
    }

    /// The default replication connection; None when no source is configured.
    pub(super) async fn status(&mut self) -> Result<Option<Status>, Trouble> {
        self.status_within(QUERY).await
    }

    pub(super) async fn status_within(&mut self, limit: Duration) -> Result<Option<Status>, Trouble> {
        let rows = self.rows_of(limit, self.dialect.words().status).await?;
        // MySQL: one row per channel, the default one has no name.
        let row = rows.iter().find(|r| r.text(&["Channel_Name", "Connection_name"]).unwrap_or_default().is_empty());
        let Some(row) = row else { return Ok(None) };
        let status = self.dialect.status(row)?;
        Ok(Some(status).filter(|s| !s.source.is_empty()))
    }
}

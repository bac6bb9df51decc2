//! The replication status of a server, out of one row of SHOW REPLICA STATUS. Pure.
//!
//! Both dialects' column names are known; a missing column is an error, never a default: a wrong guess here would call
//! broken replication whole.

use super::dialect::union;
use super::session::{Fields, Trouble};
use mmm_common::gtid::Gtids;
use mmm_common::position::LogPlace;
use mmm_common::report::ReplicationReport;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IoThread {
    Running,
    Connecting,
    Stopped,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) source: String,
    pub(super) port: u16,
    pub(super) io: IoThread,
    pub(super) sql: bool,
    /// Positions come by GTID (MariaDB: slave_pos; MySQL: Auto_Position=1).
    pub(super) by_gtid: bool,
    /// What the relay log has brought, as the server says it. A restarted MariaDB does not know (`relay::complete`).
    pub(super) received: Option<Gtids>,
    /// Where the SQL thread stands in the relay log.
    pub(super) relay: LogPlace,
    read: LogPlace,
    /// Up to where in the source's binary log it has applied.
    pub(super) applied: LogPlace,
    behind_s: Option<u64>,
    pub(super) io_error: String,
    pub(super) sql_error: String,
    /// What the SQL thread says it does.
    sql_doing: String,
}

impl Status {
    /// The columns that both dialects have; the caller adds what is its own.
    pub(super) fn common(row: &Fields) -> Result<Status, Trouble> {
        let io = match row.text(&["Replica_IO_Running", "Slave_IO_Running"])? {
            "Yes" => IoThread::Running,
            "Connecting" | "Preparing" => IoThread::Connecting,
            _other => IoThread::Stopped,
        };
        let error = |kind: &str| -> Result<String, Trouble> {
            let number = row.text(&[&format!("Last_{kind}_Errno")])?;
            let text = row.text(&[&format!("Last_{kind}_Error")])?;
            Ok(if number == "0" && text.is_empty() { String::new() } else { format!("error {number}: {text}") })
        };
        let behind = row.get(&["Seconds_Behind_Source", "Seconds_Behind_Master"])?;
        Ok(Status {
            source: row.text(&["Source_Host", "Master_Host"])?.to_owned(),
            port: u16::try_from(row.number(&["Source_Port", "Master_Port"])?).unwrap_or_default(),
            io,
            sql: row.text(&["Replica_SQL_Running", "Slave_SQL_Running"])? == "Yes",
            by_gtid: false,
            received: None,
            relay: LogPlace { file: row.text(&["Relay_Log_File"])?.to_owned(), pos: row.number(&["Relay_Log_Pos"])? },
            read: LogPlace {
                file: row.text(&["Source_Log_File", "Master_Log_File"])?.to_owned(),
                pos: row.number(&["Read_Source_Log_Pos", "Read_Master_Log_Pos"])?,
            },
            applied: LogPlace {
                file: row.text(&["Relay_Source_Log_File", "Relay_Master_Log_File"])?.to_owned(),
                pos: row.number(&["Exec_Source_Log_Pos", "Exec_Master_Log_Pos"])?,
            },
            behind_s: behind.and_then(|s| s.parse().ok()),
            io_error: error("IO")?,
            sql_error: error("SQL")?,
            sql_doing: row.text(&["Replica_SQL_Running_State", "Slave_SQL_Running_State"])?.to_owned(),
        })
    }

    /// What was received and is not in `executed`, in words; None when everything is applied.
    pub(super) fn unapplied(&self, executed: Option<&Gtids>) -> Option<String> {
        match (&self.received, executed) {
            (Some(received), Some(executed)) => match executed.missing(received) {
                Some(0) => None,
                Some(n) => Some(format!("{n} transactions received but not applied (received {received})")),
                None => Some("received and executed transactions are of different kinds".to_owned()),
            },
            (Some(_), None) | (None, Some(_)) | (None, None) if self.read == self.applied => None,
            (Some(_), None) | (None, Some(_)) | (None, None) => {
                Some(format!("received up to {}, applied up to {}", self.read, self.applied))
            }
        }
    }

    /// What had been received when `recorded` was read, and is not applied now.
    pub(super) fn unapplied_of(&self, recorded: &Status, executed: Option<&Gtids>) -> Option<String> {
        if let (Some(_), Some(_)) = (&recorded.received, executed) {
            return recorded.unapplied(executed);
        }
        let there = recorded.read == self.applied || self.applied.reaches(&recorded.read) == Some(true);
        (!there).then(|| format!("received up to {}, applied up to {}", recorded.read, self.applied))
    }

    /// The SQL thread waits for more, having nothing left to read.
    pub(super) fn relay_log_is_read(&self) -> bool {
        self.sql && self.sql_doing.contains("has read all relay log")
    }

    /// Why the SQL thread is not running; for messages.
    pub(super) fn why_sql_stopped(&self) -> String {
        if self.sql_error.is_empty() { "it was stopped, without an error".to_owned() } else { self.sql_error.clone() }
    }

    pub(super) fn report(&self, executed: Option<&Gtids>) -> ReplicationReport {
        ReplicationReport {
            source: self.source.clone(),
            port: self.port,
            io_running: self.io == IoThread::Running,
            sql_running: self.sql,
            received: if self.by_gtid { union(self.received.clone(), executed) } else { None },
            behind_ms: self.behind_s.map(|s| s.saturating_mul(1000)),
            error: ReplicationReport::errors(&self.io_error, &self.sql_error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{mariadb, mysql8};
    use super::*;

    fn row(text: &str) -> Fields {
        let pairs: Vec<(&str, Option<&str>)> = text
            .lines()
            .filter_map(|l| l.split_once(':'))
            .map(|(k, v)| (k.trim(), Some(v.trim()).filter(|v| *v != "NULL")))
            .collect();
        Fields::of(&pairs)
    }

    const MARIADB: &str = "Master_Host: 10.0.0.2
        Master_Port: 3306
        Slave_IO_Running: Connecting
        Slave_SQL_Running: No
        Master_Log_File: bin.000002
        Read_Master_Log_Pos: 900
        Relay_Log_File: relay.000002
        Relay_Log_Pos: 715
        Relay_Master_Log_File: bin.000002
        Exec_Master_Log_Pos: 400
        Seconds_Behind_Master: NULL
        Last_IO_Errno: 2003
        Last_IO_Error: error connecting to master
        Last_SQL_Errno: 0
        Last_SQL_Error:
        Slave_SQL_Running_State:
        Using_Gtid: Slave_Pos
        Gtid_IO_Pos: 0-2-105";

    const MYSQL: &str = "Source_Host: 10.0.0.2
        Source_Port: 3307
        Replica_IO_Running: Yes
        Replica_SQL_Running: Yes
        Source_Log_File: bin.000002
        Read_Source_Log_Pos: 900
        Relay_Log_File: relay.000002
        Relay_Log_Pos: 715
        Relay_Source_Log_File: bin.000002
        Exec_Source_Log_Pos: 900
        Seconds_Behind_Source: 3
        Last_IO_Errno: 0
        Last_IO_Error:
        Last_SQL_Errno: 0
        Last_SQL_Error:
        Replica_SQL_Running_State: Replica has read all relay log; waiting for more updates
        Auto_Position: 1
        Retrieved_Gtid_Set: 3e11fa47-71ca-11e1-9e33-c80aa9429562:4-9";

    #[test]
    fn connecting_is_not_running_and_what_is_missing_is_counted() {
        let status = mariadb::status(&row(MARIADB)).unwrap();
        let executed = Gtids::MariaDb("0-1-7,0-2-100".parse().unwrap());
        let report = status.report(Some(&executed));
        assert_eq!((report.io_running, report.sql_running), (false, false));
        assert_eq!(report.error, "I/O thread: error 2003: error connecting to master");
        assert_eq!(report.sql_error(), None, "it was only stopped");
        let refused = Status { sql_error: "error 1062: duplicate".to_owned(), ..status.clone() }.report(None);
        assert_eq!(refused.sql_error(), Some("error 1062: duplicate"));
        assert_eq!(report.received.unwrap().to_string(), "0-1-7,0-2-105", "received includes what is executed");
        assert_eq!(report.behind_ms, None);
        assert!(status.unapplied(Some(&executed)).unwrap().starts_with("5 transactions"));
        assert_eq!(status.unapplied(None).unwrap(), "received up to bin.000002:900, applied up to bin.000002:400");
    }

    #[test]
    fn both_vocabularies_are_read() {
        for (from, to) in [("Source", "Source"), ("Source_", "Master_"), ("Replica_", "Slave_")] {
            let mut text = MYSQL.replace(from, to);
            if to == "Master_" {
                text = text.replace("_Source", "_Master");
            }
            let status = mysql8::status(&row(&text)).unwrap();
            let executed = Gtids::MySql("3e11fa47-71ca-11e1-9e33-c80aa9429562:1-9".parse().unwrap());
            assert_eq!(status.unapplied(Some(&executed)), None);
            assert!(status.by_gtid && status.relay_log_is_read());
            assert_eq!(status.report(Some(&executed)).behind_ms, Some(3000));
            assert_eq!(status.port, 3307);
        }
    }

    #[test]
    fn a_missing_column_is_an_error() {
        for column in ["Slave_SQL_Running:", "Gtid_IO_Pos", "Last_IO_Errno", "Using_Gtid"] {
            let text: String = MARIADB.lines().filter(|l| !l.contains(column)).map(|l| format!("{l}\n")).collect();
            let e = mariadb::status(&row(&text)).unwrap_err();
            assert!(e.to_string().contains("has no column"), "{column}: {e}");
        }
    }
}

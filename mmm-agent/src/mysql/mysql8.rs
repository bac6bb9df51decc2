//! MySQL's words: 8.0 to 9.7 and later, with 5.7's spellings behind them. Tried on 9.7.
//!
//! super_read_only counts: while it exists and is off, users with CONNECTION_ADMIN may write, and that is not called
//! read-only.

use super::dialect::{Vitals, Words, is_on};
use super::session::{Fields, Trouble, quote};
use super::status::Status;
use mmm_common::config::Host;
use mmm_common::gtid::{Gtids, MysqlGtids};
use mmm_common::report::Writing;

pub(super) const WORDS: Words = Words {
    vitals: &[
        "SELECT @@GLOBAL.read_only AS read_only, @@GLOBAL.super_read_only AS super_read_only, \
         @@GLOBAL.gtid_mode AS gtid_mode, @@GLOBAL.gtid_executed AS executed",
        "SELECT @@GLOBAL.read_only AS read_only, @@GLOBAL.read_only AS super_read_only, \
         @@GLOBAL.gtid_mode AS gtid_mode, @@GLOBAL.gtid_executed AS executed",
    ],
    status: &["SHOW REPLICA STATUS", "SHOW SLAVE STATUS"],
    log_status: &["SHOW BINARY LOG STATUS", "SHOW MASTER STATUS"],
    start: &["START REPLICA", "START SLAVE"],
    stop: &["STOP REPLICA", "STOP SLAVE"],
    start_sql: &["START REPLICA SQL_THREAD", "START SLAVE SQL_THREAD"],
    start_io: &["START REPLICA IO_THREAD", "START SLAVE IO_THREAD"],
    stop_io: &["STOP REPLICA IO_THREAD", "STOP SLAVE IO_THREAD"],
    forget: &["RESET REPLICA ALL", "RESET SLAVE ALL"],
    // Setting super_read_only sets read_only, and clearing read_only clears super_read_only.
    read_only_on: &["SET GLOBAL super_read_only=1", "SET GLOBAL read_only=1"],
    read_only_off: &["SET GLOBAL read_only=0"],
};

pub(super) fn vitals(row: &Fields) -> Result<Vitals, Trouble> {
    let fully = is_on(row.text(&["read_only"])?) && is_on(row.text(&["super_read_only"])?);
    let mode = row.text(&["gtid_mode"])?;
    let executed = row.text(&["executed"])?;
    let gtids = mode == "ON";
    Ok(Vitals {
        writing: if fully { Writing::ReadOnly } else { Writing::Allowed },
        executed: if gtids { Some(Gtids::MySql(parse(executed)?)) } else { None },
        no_gtids: (!gtids)
            .then(|| format!("gtid_mode is {mode}: set log_bin, enforce_gtid_consistency=ON and gtid_mode=ON")),
        ex_master: false,
    })
}

pub(super) fn status(row: &Fields) -> Result<Status, Trouble> {
    let mut status = Status::common(row)?;
    status.by_gtid = row.text(&["Auto_Position"])? == "1";
    if status.by_gtid {
        status.received = Some(Gtids::MySql(parse(row.text(&["Retrieved_Gtid_Set"])?)?));
    }
    Ok(status)
}

/// The present form, and the one before 8.0.23.
pub(super) fn change(source: &Host) -> [String; 2] {
    let form = |verb: &str, word: &str, key: &str| {
        format!(
            "CHANGE {verb} TO {word}_HOST={}, {word}_PORT={}, {word}_CONNECT_RETRY=1, {word}_RETRY_COUNT=86400, \
             {word}_HEARTBEAT_PERIOD=1, {word}_AUTO_POSITION=1,{key} {word}_USER={}, {word}_PASSWORD={}",
            quote(&source.ip.to_string()),
            source.mysql_port,
            quote(&source.replication_user),
            quote(&source.replication_password.0),
        )
    };
    [form("REPLICATION SOURCE", "SOURCE", " GET_SOURCE_PUBLIC_KEY=1,"), form("MASTER", "MASTER", "")]
}

fn parse(text: &str) -> Result<MysqlGtids, Trouble> {
    text.parse().map_err(|why| Trouble::Strange { why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_only_without_super_read_only_still_lets_somebody_write() {
        let row = |ro, sro| {
            Fields::of(&[
                ("read_only", Some(ro)),
                ("super_read_only", Some(sro)),
                ("gtid_mode", Some("OFF")),
                ("executed", Some("")),
            ])
        };
        assert_eq!(vitals(&row("1", "0")).unwrap().writing, Writing::Allowed);
        assert_eq!(vitals(&row("1", "1")).unwrap().writing, Writing::ReadOnly);
        let off = vitals(&row("0", "0")).unwrap();
        assert_eq!(off.executed, None);
        assert!(off.no_gtids.unwrap().contains("gtid_mode=ON"));
    }
}

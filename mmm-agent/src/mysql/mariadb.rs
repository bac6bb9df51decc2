//! MariaDB's words. Tried on 10.11 and 11.8.
//!
//! "Executed" is gtid_binlog_state together with gtid_slave_pos, never one of them: a writing master's gtid_slave_pos
//! stands still, and a replica without a binary log has nothing else.

use super::dialect::{Vitals, Words, is_on};
use super::session::{Fields, Trouble, quote};
use super::status::Status;
use mmm_common::config::Host;
use mmm_common::gtid::{Gtids, MariaGtids};
use mmm_common::report::Writing;
use std::collections::BTreeMap;

pub(super) const WORDS: Words = Words {
    vitals: &["SELECT @@GLOBAL.read_only AS read_only, @@GLOBAL.log_bin AS log_bin, @@GLOBAL.server_id AS server_id, \
               @@GLOBAL.gtid_binlog_state AS binlog_state, @@GLOBAL.gtid_slave_pos AS slave_pos"],
    status: &["SHOW SLAVE STATUS"],
    log_status: &["SHOW MASTER STATUS"],
    start: &["START SLAVE"],
    stop: &["STOP SLAVE"],
    start_sql: &["START SLAVE SQL_THREAD"],
    start_io: &["START SLAVE IO_THREAD"],
    stop_io: &["STOP SLAVE IO_THREAD"],
    forget: &["RESET SLAVE ALL"],
    read_only_on: &["SET GLOBAL read_only=1"],
    read_only_off: &["SET GLOBAL read_only=0"],
};

pub(super) fn vitals(row: &Fields) -> Result<Vitals, Trouble> {
    let (state, slave_pos) = (row.text(&["binlog_state"])?, row.text(&["slave_pos"])?);
    let log_bin = is_on(row.text(&["log_bin"])?);
    let executed = gtids(state)?.union(&gtids(slave_pos)?);
    let known = log_bin || !slave_pos.is_empty();
    let server_id = row.number(&["server_id"])?;
    if let Some(why) = claims_more(server_id, state, slave_pos).filter(|_| log_bin) {
        return Ok(Vitals {
            writing: if is_on(row.text(&["read_only"])?) { Writing::ReadOnly } else { Writing::Allowed },
            executed: None,
            no_gtids: Some(why),
            ex_master: true,
        });
    }
    Ok(Vitals {
        writing: if is_on(row.text(&["read_only"])?) { Writing::ReadOnly } else { Writing::Allowed },
        executed: known.then_some(Gtids::MariaDb(executed)),
        no_gtids: (!known).then(|| "log_bin is OFF: set log_bin, log_slave_updates and gtid_strict_mode=1".to_owned()),
        ex_master: wrote_beyond(server_id, state, slave_pos),
    })
}

/// The replication position names a transaction of the server's own that its binary log does not have: it has thrown it
/// away (init_rpl_role=SLAVE), and fetches from after it. What it has executed is not known then.
fn claims_more(server_id: u64, state: &str, slave_pos: &str) -> Option<String> {
    let own = |text: &str| -> BTreeMap<u64, u64> {
        parts(text).into_iter().filter(|(_, server, _)| *server == server_id).map(|(d, _, seq)| (d, seq)).collect()
    };
    let logged = own(state);
    own(slave_pos).into_iter().find_map(|(domain, seq)| {
        let last = logged.get(&domain).copied().unwrap_or_default();
        (seq > last && last > 0).then(|| {
            format!(
                "its replication position is at {domain}-{server_id}-{seq}, a transaction of its own, but its binary log \
                 ends with {domain}-{server_id}-{last}: what is between was thrown away at the start. STOP SLAVE, SET \
                 GLOBAL gtid_slave_pos=@@gtid_binlog_pos, START SLAVE; or copy it anew"
            )
        })
    })
}

/// domain, server and number of each.
fn parts(text: &str) -> Vec<(u64, u64, u64)> {
    text.split(',')
        .filter_map(|g| {
            let mut n = g.trim().split('-').map(str::parse::<u64>);
            match (n.next(), n.next(), n.next()) {
                (Some(Ok(domain)), Some(Ok(server)), Some(Ok(seq))) => Some((domain, server, seq)),
                (..) => None,
            }
        })
        .collect()
}

/// Whether the server's own transactions in `state` go beyond `slave_pos`: then it was a master, and its replication
/// position must be moved forward before it follows anybody.
fn wrote_beyond(server_id: u64, state: &str, slave_pos: &str) -> bool {
    let mut followed: BTreeMap<u64, u64> = BTreeMap::new();
    for (domain, _, seq) in parts(slave_pos) {
        let highest = followed.entry(domain).or_default();
        *highest = seq.max(*highest);
    }
    parts(state)
        .iter()
        .any(|(domain, server, seq)| *server == server_id && *seq > followed.get(domain).copied().unwrap_or_default())
}

pub(super) fn status(row: &Fields) -> Result<Status, Trouble> {
    let mut status = Status::common(row)?;
    // Current_Pos goes by GTID too, but lets an ex-master's own writes decide where it starts: not wanted.
    status.by_gtid = row.text(&["Using_Gtid"])? == "Slave_Pos";
    let received = row.text(&["Gtid_IO_Pos"])?;
    status.received = if received.is_empty() { None } else { Some(Gtids::MariaDb(gtids(received)?)) };
    Ok(status)
}

pub(super) fn change(source: &Host, demote: bool) -> String {
    format!(
        "CHANGE MASTER TO MASTER_HOST={}, MASTER_PORT={}, MASTER_CONNECT_RETRY=1, MASTER_HEARTBEAT_PERIOD=1, \
         MASTER_USE_GTID=slave_pos,{} MASTER_USER={}, MASTER_PASSWORD={}",
        quote(&source.ip.to_string()),
        source.mysql_port,
        if demote { " MASTER_DEMOTE_TO_SLAVE=1," } else { "" },
        quote(&source.replication_user),
        quote(&source.replication_password.0),
    )
}

/// Before 10.10, instead of MASTER_DEMOTE_TO_SLAVE.
pub(super) const DEMOTE: &str = "SET GLOBAL gtid_slave_pos=@@GLOBAL.gtid_binlog_pos";

fn gtids(text: &str) -> Result<MariaGtids, Trouble> {
    text.parse().map_err(|why| Trouble::Strange { why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ex_master_is_told_by_its_own_writes_above_its_replication_position() {
        assert!(wrote_beyond(1, "0-1-100", ""));
        assert!(wrote_beyond(1, "0-2-90,0-1-100", "0-2-90"));
        assert!(!wrote_beyond(1, "0-1-100,0-2-105", "0-2-105"));
        assert!(!wrote_beyond(3, "0-1-100,0-2-105", ""));
        assert!(wrote_beyond(1, "0-1-5,1-1-7", "0-2-9,1-2-6"), "every domain for itself");
    }

    #[test]
    fn a_position_beyond_the_servers_own_binary_log_is_no_position() {
        assert!(claims_more(1, "0-1-38502,0-2-300", "0-1-38504").unwrap().contains("ends with 0-1-38502"));
        assert_eq!(claims_more(1, "0-1-38504,0-2-300", "0-1-38504"), None);
        assert_eq!(claims_more(1, "0-1-38502", "0-2-38600"), None, "nothing of its own is claimed");
        assert_eq!(claims_more(1, "", "0-1-38504"), None, "a copy, whose state is not completed yet");
    }

    #[test]
    fn without_a_binary_log_and_position_nothing_is_claimed() {
        let row = |log_bin, pos| {
            Fields::of(&[
                ("read_only", Some("NO_LOCK")),
                ("log_bin", Some(log_bin)),
                ("server_id", Some("1")),
                ("binlog_state", None),
                ("slave_pos", Some(pos)),
            ])
        };
        let nothing = vitals(&row("0", "")).unwrap();
        assert_eq!((nothing.executed, nothing.writing), (None, Writing::ReadOnly));
        assert!(nothing.no_gtids.unwrap().contains("log_bin"));
        assert_eq!(vitals(&row("0", "0-1-4")).unwrap().executed.unwrap().to_string(), "0-1-4");
        assert_eq!(vitals(&row("1", "")).unwrap().executed.unwrap().to_string(), "");
    }
}

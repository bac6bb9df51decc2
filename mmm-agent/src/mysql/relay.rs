//! What a restarted MariaDB replica still has in its relay log.
//!
//! After a restart Gtid_IO_Pos is empty and the positions in files say nothing, while the relay log is still there, until
//! the first START throws it away. So it is read, event by event. Must never call less received than there is: a relay
//! log that cannot be read is an error.

use super::dialect::Dialect;
use super::session::{Fields, Session, Trouble, quote};
use super::status::{IoThread, Status};
use mmm_common::gtid::{Gtids, MariaGtids};
use std::time::Duration;

/// Events per question, and how many are read at most.
const CHUNK: usize = 5_000;
const AT_MOST: usize = 1_000_000;
/// How long one question may take.
const LIMIT: Duration = Duration::from_secs(5);
/// "Could not find target log", among others.
const NO_SUCH_LOG: u16 = 1220;

/// Fills in `received` where the server itself does not know it any more.
pub(super) async fn complete(session: &mut Session, status: &mut Status) -> Result<(), Trouble> {
    if session.dialect != Dialect::MariaDb || !status.by_gtid || status.received.is_some() {
        return Ok(());
    }
    let received = if status.sql || status.io != IoThread::Stopped {
        // The thread that was started has thrown away what there was, and nothing has come since.
        MariaGtids::default()
    } else {
        whole_transactions(session, status).await?
    };
    status.received = Some(Gtids::MariaDb(received));
    Ok(())
}

async fn whole_transactions(session: &mut Session, status: &Status) -> Result<MariaGtids, Trouble> {
    let mut reader = Reader::default();
    let mut read = 0;
    let mut from = status.relay.clone();
    while !from.file.is_empty() {
        let sql = format!("SHOW RELAYLOG EVENTS IN {} FROM {} LIMIT {CHUNK}", quote(&from.file), from.pos);
        let rows = match session.rows(LIMIT, &sql).await {
            Ok(rows) => rows,
            Err(Trouble::Refused { code: NO_SUCH_LOG, message })
                if from.file != status.relay.file && message.contains("Could not find target log") =>
            {
                break;
            }
            Err(e) => return Err(Trouble::Strange { why: format!("the relay log cannot be read ({e})") }),
        };
        for row in &rows {
            reader.take(row)?;
        }
        read += rows.len();
        if read >= AT_MOST {
            return Err(Trouble::Strange { why: format!("the relay log holds more than {AT_MOST} events") });
        }
        match rows.last() {
            // The last one is read again as the first of the next chunk, which changes nothing.
            Some(last) if rows.len() == CHUNK => from.pos = last.number(&["Pos"])?,
            Some(_) | None => {
                from.file = following(&from.file)?;
                from.pos = 4;
            }
        }
    }
    reader.whole.join(",").parse().map_err(|why| Trouble::Strange { why })
}

/// `relay.000009` is followed by `relay.000010`.
fn following(file: &str) -> Result<String, Trouble> {
    let next = file.rsplit_once('.').and_then(|(base, number)| {
        let next = number.parse::<u64>().ok()? + 1;
        Some(format!("{base}.{next:0width$}", width = number.len()))
    });
    next.ok_or_else(|| Trouble::Strange { why: format!("'{file}' is no name of a relay log") })
}

/// Collects the transactions whose end has been received too: half a one cannot be applied by anybody.
#[derive(Default)]
struct Reader {
    open: Option<Open>,
    whole: Vec<String>,
}

struct Open {
    gtid: String,
    /// One statement without COMMIT, such as CREATE TABLE.
    alone: bool,
}

impl Reader {
    fn take(&mut self, row: &Fields) -> Result<(), Trouble> {
        let (kind, info) = (row.text(&["Event_type"])?, row.text(&["Info"])?);
        if kind == "Gtid" {
            let gtid = info.split_once("GTID ").and_then(|(_, rest)| rest.split_whitespace().next());
            let gtid = gtid.ok_or_else(|| Trouble::Strange { why: format!("no GTID in '{info}'") })?.to_owned();
            self.open = Some(Open { gtid, alone: info.starts_with("GTID ") });
            return Ok(());
        }
        let query = kind.starts_with("Query");
        let last = |open: &mut Open| {
            matches!(kind, "Xid" | "XA_prepare")
                || query && (open.alone || info.ends_with("COMMIT") || info.ends_with("ROLLBACK"))
        };
        self.whole.extend(self.open.take_if(last).map(|open| open.gtid));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_transactions_count() {
        let mut reader = Reader::default();
        for (kind, info) in [
            ("Rotate", "bin.000001;pos=4"),
            ("Gtid_list", "[0-1-3]"),
            ("Gtid", "BEGIN GTID 0-1-4"),
            ("Intvar", "INSERT_ID=4"),
            ("Query", "use `app`; insert into t (id) values (4)"),
            ("Xid", "COMMIT /* xid=33 */"),
            ("Gtid", "GTID 0-1-5"),
            ("Query", "use `app`; create table u (id int)"),
            ("Gtid", "BEGIN GTID 0-2-6 cid=12"),
            ("Annotate_rows", "insert into myisam values (1)"),
            ("Write_rows_v1", "table_id: 18 flags: STMT_END_F"),
            ("Query", "COMMIT"),
            ("Gtid", "XA START X'61',X'',1 GTID 0-2-7"),
            ("Query", "XA END X'61',X'',1"),
            ("XA_prepare", "XA PREPARE X'61',X'',1"),
            ("Gtid", "BEGIN GTID 0-2-8"),
            ("Query", "insert into t (id) values (8)"),
        ] {
            reader.take(&Fields::of(&[("Event_type", Some(kind)), ("Info", Some(info))])).unwrap();
        }
        assert_eq!(reader.whole, ["0-1-4", "0-1-5", "0-2-6", "0-2-7"]);
    }

    #[test]
    fn relay_logs_are_numbered() {
        assert_eq!(following("relay.000009").unwrap(), "relay.000010");
        assert_eq!(following("db1-relay-bin.999999").unwrap(), "db1-relay-bin.1000000");
        assert!(following("relay").is_err());
    }
}

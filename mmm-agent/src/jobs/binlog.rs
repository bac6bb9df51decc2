//! What the binary log tools print, read transaction by transaction: which rows of which tables, which statements, and
//! whether it could be undone. Text in, values out; nothing is run here.
//!
//! A transaction begins at its GTID. Lines that look like the head of an event count as one only between statements: a
//! statement may hold any text.

use mmm_common::gtid::{Gtids, MysqlGtids};
use mmm_common::report::Extras;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

/// What ends a statement in the tools' output.
const END: &[u8] = b"/*!*/;";
/// How much of a statement is looked at and shown.
const SHOWN: usize = 80;
/// Tables and statements that are named of one transaction.
const NAMED: usize = 5;
/// Statements that change no row, and yet are written to the binary log.
const HARMLESS: [&str; 5] = ["FLUSH", "ANALYZE", "OPTIMIZE", "REPAIR", "CHECK"];
/// Another one for each connection.
const THREAD: &[u8] = b"SET @@session.pseudo_thread_id";
const DATA: [&str; 6] = ["INSERT", "UPDATE", "DELETE", "REPLACE", "LOAD", "CALL"];

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rows {
    inserted: u64,
    updated: u64,
    deleted: u64,
}

/// A place in the binary log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) file: String,
    pub(super) position: u64,
}

/// Which transactions are extra: those of `having` that are not in `lacking`.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) having: Gtids,
    pub(super) lacking: Gtids,
}

impl Wanted {
    fn is_extra(&self, gtid: &str) -> bool {
        let one = match self.lacking {
            Gtids::MariaDb(_) => gtid.parse().map(Gtids::MariaDb),
            Gtids::MySql(_) => gtid.parse::<MysqlGtids>().map(Gtids::MySql),
        };
        one.is_ok_and(|one| self.having.contains(&one) == Some(true) && self.lacking.contains(&one) == Some(false))
    }
}

/// What was found of the extra transactions.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    pub(super) transactions: u64,
    pub(super) list: Vec<String>,
    pub(super) gtids: Vec<String>,
    /// Where the first of them begins.
    pub(super) first: Option<Place>,
    /// Why they cannot be undone row by row.
    pub(super) not_undoable: Option<String>,
    /// Events that change rows, and their tables.
    pub(super) row_events: u64,
    pub(super) tables: BTreeSet<String>,
}

/// Reads lines; what belongs to extra transactions goes on to `to`, less what would give it a GTID again.
pub(super) struct Scanner<'a, W> {
    wanted: &'a Wanted,
    to: W,
    found: Found,
    file: String,
    /// Where the next event begins, in `file`.
    position: u64,
    /// In the middle of a statement, and its beginning so far.
    statement: Option<Vec<u8>>,
    part: Part,
    /// Settings of what was left out before the first extra transaction, the latest last.
    settings: Vec<Vec<u8>>,
}

enum Part {
    /// The tool's own frame, and descriptions of files.
    Frame,
    Transaction(Transaction),
}

#[derive(Default)]
struct Transaction {
    place: Option<Place>,
    time: String,
    gtid: Option<String>,
    extra: bool,
    /// Not written yet: its GTID is not known.
    waiting: Vec<u8>,
    tables: BTreeMap<String, Rows>,
    row_events: u64,
    statements: Vec<String>,
    more: u64,
    /// A statement that changes something, and is not told row by row.
    changing: Option<String>,
}

impl<'a, W: Write> Scanner<'a, W> {
    pub(super) fn new(wanted: &'a Wanted, to: W) -> Self {
        Scanner {
            wanted,
            to,
            found: Found::default(),
            file: String::new(),
            position: 4,
            statement: None,
            part: Part::Frame,
            settings: Vec::new(),
        }
    }

    /// The file that is being read.
    pub(super) fn file(&self) -> &str {
        &self.file
    }

    /// One line with its end.
    pub(super) fn feed(&mut self, line: &[u8]) -> io::Result<()> {
        let text = line.trim_ascii_end();
        if let Some(statement) = &mut self.statement {
            if statement.len() < 4 * SHOWN {
                statement.extend_from_slice(line);
            }
            if text.ends_with(END) {
                self.end_statement();
            }
            return self.keep(line);
        }
        if text.starts_with(b"DELIMITER") {
            self.end_transaction()?;
            return self.keep(line);
        }
        if let Some(head) = Head::of(text) {
            self.event(&head)?;
            return self.keep(line);
        }
        if let Some(rows) = text.strip_prefix(b"### ") {
            self.rows(rows);
        } else if !text.is_empty() && !text.starts_with(b"#") {
            self.statement = Some(line.to_vec());
            // What stands outside of the delimiters ends in a plain semicolon.
            if text.ends_with(END) || (matches!(self.part, Part::Frame) && text.ends_with(b"*/;")) {
                self.end_statement();
            }
        }
        self.keep(line)
    }

    pub(super) fn finish(mut self) -> io::Result<Found> {
        self.end_transaction()?;
        self.to.flush()?;
        Ok(self.found)
    }

    fn event(&mut self, head: &Head) -> io::Result<()> {
        let at = self.position;
        if head.end > 0 {
            self.position = head.end;
        }
        let kind = head.kind;
        if let Some(to) = kind.strip_prefix("Rotate to ") {
            self.end_transaction()?;
            self.file = to.split_whitespace().next().unwrap_or_default().to_owned();
            self.position = 4;
        } else if ["Start:", "Gtid list", "Previous-GTIDs", "Binlog checkpoint", "Stop"]
            .iter()
            .any(|k| kind.starts_with(k))
        {
            self.end_transaction()?;
        } else if let Some(rest) = kind.strip_prefix("GTID").or_else(|| kind.strip_prefix("Anonymous_GTID")) {
            self.end_transaction()?;
            let place = Some(Place { file: self.file.clone(), position: at });
            self.part = Part::Transaction(Transaction { place, time: head.time.clone(), ..Transaction::default() });
            // MariaDB's stands here, MySQL's in a statement.
            if let Some(gtid) = rest.split_whitespace().next().filter(|g| g.split('-').count() == 3 && !g.contains('='))
            {
                self.named(gtid)?;
            }
        } else if let Part::Transaction(transaction) = &mut self.part {
            if ["Write_", "Update_", "Delete_"].iter().any(|k| kind.starts_with(k)) {
                transaction.row_events += 1;
            } else if kind.contains("_compressed") {
                transaction.changing = Some("compressed events".to_owned());
            }
        }
        Ok(())
    }

    /// The transaction's GTID has been read.
    fn named(&mut self, gtid: &str) -> io::Result<()> {
        let Part::Transaction(transaction) = &mut self.part else { return Ok(()) };
        // The tool says AUTOMATIC when it has come to its end.
        if transaction.gtid.is_some() {
            return Ok(());
        }
        transaction.extra = self.wanted.is_extra(gtid);
        transaction.gtid = Some(gtid.to_owned());
        if transaction.extra {
            for setting in self.settings.drain(..) {
                self.to.write_all(&setting)?;
            }
            writeln!(self.to, "-- {gtid}  {}", transaction.time)?;
            if let Gtids::MySql(_) = self.wanted.lacking {
                // Rows in BINLOG statements leave the session without a way to get one.
                writeln!(self.to, "SET @@SESSION.GTID_NEXT= 'AUTOMATIC'/*!*/;")?;
            }
            let waiting = std::mem::take(&mut transaction.waiting);
            for line in waiting.split_inclusive(|b| *b == b'\n').filter(|line| !gives_gtid(line)) {
                self.to.write_all(line)?;
            }
        }
        Ok(())
    }

    fn keep(&mut self, line: &[u8]) -> io::Result<()> {
        match &mut self.part {
            Part::Frame if gives_gtid(line) => Ok(()),
            Part::Frame => self.to.write_all(line),
            Part::Transaction(t) if t.gtid.is_none() => {
                t.waiting.extend_from_slice(line);
                Ok(())
            }
            Part::Transaction(t) if t.extra && !gives_gtid(line) => self.to.write_all(line),
            // The settings in one that is left out hold for those after it.
            Part::Transaction(t) if !t.extra && is_setting(line) => {
                if self.found.transactions > 0 {
                    return self.to.write_all(line);
                }
                let same = |other: &Vec<u8>| other == line || (line.starts_with(THREAD) && other.starts_with(THREAD));
                self.settings.retain(|other| !same(other));
                self.settings.push(line.to_vec());
                Ok(())
            }
            Part::Transaction(_) => Ok(()),
        }
    }

    fn end_statement(&mut self) {
        let statement = self.statement.take().unwrap_or_default();
        let text = String::from_utf8_lossy(&statement);
        let text = text.split("/*!*/;").next().unwrap_or_default().trim();
        if let Some(gtid) = text.strip_prefix("SET @@SESSION.GTID_NEXT= '").and_then(|g| g.split('\'').next()) {
            // Writing to a buffer of ours that is full fails later, too.
            let _ = self.named(gtid);
            return;
        }
        let Part::Transaction(transaction) = &mut self.part else { return };
        match what_is(text) {
            What::Frame => {}
            What::Harmless(shown) => transaction.name(shown),
            What::Changes(shown) => {
                transaction.changing.get_or_insert_with(|| shown.clone());
                transaction.name(shown);
            }
        }
    }

    fn rows(&mut self, text: &[u8]) {
        let Part::Transaction(transaction) = &mut self.part else { return };
        let text = String::from_utf8_lossy(text);
        let tables = &mut transaction.tables;
        let mut of = |table: &str, change: fn(&mut Rows)| change(tables.entry(table.replace('`', "")).or_default());
        if let Some(table) = text.strip_prefix("INSERT INTO ") {
            of(table, |rows| rows.inserted += 1);
        } else if let Some(table) = text.strip_prefix("UPDATE ") {
            of(table, |rows| rows.updated += 1);
        } else if let Some(table) = text.strip_prefix("DELETE FROM ") {
            of(table, |rows| rows.deleted += 1);
        }
    }

    fn end_transaction(&mut self) -> io::Result<()> {
        self.statement = None;
        let Part::Transaction(t) = std::mem::replace(&mut self.part, Part::Frame) else { return Ok(()) };
        let gtid = t.gtid.clone().unwrap_or_else(|| "without GTID".to_owned());
        let found = &mut self.found;
        if !t.extra {
            if let Some(first) = found.gtids.first() {
                let why = format!("{gtid}, which the active master has too, comes after {first}");
                found.not_undoable.get_or_insert(why);
            }
            return Ok(());
        }
        found.transactions += 1;
        if found.list.len() < Extras::LISTED {
            found.list.push(format!("{gtid}  {}  {}", t.time, t.describe()));
        }
        if let Some(changing) = &t.changing {
            found.not_undoable.get_or_insert(format!("{gtid} is not told row by row: {changing}"));
        } else if t.row_events == 0 && !t.tables.is_empty() {
            found.not_undoable.get_or_insert(format!("{gtid} has rows of events that are not known here"));
        }
        if found.first.is_none() {
            found.first = t.place;
        }
        found.gtids.push(gtid);
        found.row_events += t.row_events;
        found.tables.extend(t.tables.into_keys());
        Ok(())
    }
}

impl Transaction {
    fn name(&mut self, statement: String) {
        if self.statements.len() < NAMED { self.statements.push(statement) } else { self.more += 1 }
    }

    fn describe(&self) -> String {
        let mut parts: Vec<String> = self
            .tables
            .iter()
            .take(NAMED)
            .map(|(table, rows)| {
                let counts = [(rows.inserted, "inserted"), (rows.updated, "updated"), (rows.deleted, "deleted")];
                let counts: Vec<String> =
                    counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
                format!("{table}: {}", counts.join(", "))
            })
            .collect();
        if self.tables.len() > NAMED {
            parts.push(format!("{} more tables", self.tables.len() - NAMED));
        }
        parts.extend(self.statements.iter().cloned());
        if self.more > 0 {
            parts.push(format!("{} more statements", self.more));
        }
        if self.tables.is_empty() && self.changing.is_none() {
            let rest = if parts.is_empty() { String::new() } else { format!(": {}", parts.join("; ")) };
            return format!("harmless, no row changes{rest}");
        }
        parts.join("; ")
    }
}

enum What {
    /// Of the tool or of the transaction itself.
    Frame,
    Harmless(String),
    Changes(String),
}

fn what_is(text: &str) -> What {
    // Versioned comments hold settings only when the tool wrote them.
    let inner = text
        .strip_prefix("/*M!")
        .or_else(|| text.strip_prefix("/*!"))
        .map(|rest| rest.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start());
    let plain = inner.unwrap_or(text);
    let frame =
        ["SET @", "SET TIMESTAMP", "SET INSERT_ID", "SET LAST_INSERT_ID", "SET TRANSACTION ISOLATION", "BINLOG '"];
    let words = ["BEGIN", "COMMIT", "ROLLBACK", "START TRANSACTION"];
    let is_word = |w: &str| plain.strip_prefix(w).is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()));
    if plain.is_empty()
        || plain.starts_with("\\C")
        || plain.starts_with("use `")
        || frame.iter().any(|f| plain.starts_with(f))
        || words.iter().any(|w| is_word(w))
        || plain.starts_with("SAVEPOINT")
    {
        return What::Frame;
    }
    let first = text.split(|c: char| !c.is_ascii_alphabetic()).next().unwrap_or_default().to_ascii_uppercase();
    let shown = shown(text);
    if HARMLESS.contains(&first.as_str()) {
        What::Harmless(shown)
    } else if DATA.contains(&first.as_str()) {
        What::Changes(format!("statement: {shown}"))
    } else {
        What::Changes(format!("DDL: {shown}"))
    }
}

/// The beginning, on one line, and nothing of a password.
fn shown(text: &str) -> String {
    let one_line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let secret = one_line.to_ascii_uppercase().find("IDENTIFIED").or(one_line.to_ascii_uppercase().find("PASSWORD"));
    let open = secret.and_then(|at| one_line.get(..at)).unwrap_or(&one_line);
    let start: String = open.chars().take(SHOWN).collect();
    if start.len() < one_line.len() { format!("{}…", start.trim_end()) } else { start }
}

/// A setting by which a replay would get the GTID, or the server's number, of the one that is gone.
fn gives_gtid(line: &[u8]) -> bool {
    let words: [&[u8]; 6] = [
        b"SET @@SESSION.GTID_NEXT",
        b"SET @@session.gtid_",
        b"SET @@session.server_id",
        b"SET @@session.original_",
        b"SET @@session.immediate_",
        b"SET @@SESSION.GTID_DOMAIN_ID",
    ];
    let head = &line[..line.len().min(60)];
    (head.starts_with(b"SET") || head.starts_with(b"/*"))
        && words.iter().any(|w| head.windows(w.len()).any(|at| at == *w))
}

fn is_setting(line: &[u8]) -> bool {
    let starts: [&[u8]; 3] = [b"SET @@session.", b"/*!\\C", b"use `"];
    starts.iter().any(|s| line.starts_with(s)) && line.trim_ascii_end().ends_with(END) && !gives_gtid(line)
}

/// `#261121 17:09:17 server id 1  end_log_pos 364 CRC32 0xd1784c5f`, a tab, `GTID 0-1-1 trans`
struct Head<'a> {
    time: String,
    end: u64,
    kind: &'a str,
}

impl Head<'_> {
    fn of(line: &[u8]) -> Option<Head<'_>> {
        let text = std::str::from_utf8(line).ok()?;
        let (head, kind) = text.strip_prefix('#')?.split_once('\t')?;
        let (when, rest) = head.split_once(" server id ")?;
        let (date, time) = when.split_once(' ')?;
        let digits = |at| date.get(at).filter(|d: &&str| d.bytes().all(|b| b.is_ascii_digit()));
        let (year, month, day) = (digits(0..2)?, digits(2..4)?, digits(4..6)?);
        let end = rest.split_once("end_log_pos ")?.1.split_whitespace().next()?.parse().ok()?;
        Some(Head { time: format!("20{year}-{month}-{day} {:0>8}", time.trim()), end, kind: kind.trim_start() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARIADB: &str = r"/*!50530 SET @@SESSION.PSEUDO_SLAVE_MODE=1*/;
DELIMITER /*!*/;
# at 4
#700101  0:00:00 server id 1  end_log_pos 0 	Rotate to bin.000003  pos: 4
# at 4
#261121 17:09:16 server id 1  end_log_pos 256 CRC32 0xb45fcbe9 	Start: binlog v 4, server v 10.11.18-MariaDB created 261121 17:09:16
BINLOG '
PNABaw8BAAAA
'/*!*/;
#261121 17:09:16 server id 1  end_log_pos 285 CRC32 0x9c8150c8 	Gtid list []
#261121 17:09:17 server id 1  end_log_pos 364 CRC32 0xd1784c5f 	GTID 0-1-1 trans
/*M!100001 SET @@session.gtid_domain_id=0*//*!*/;
/*M!100001 SET @@session.gtid_seq_no=1*//*!*/;
START TRANSACTION
/*!*/;
#261121 17:09:17 server id 1  end_log_pos 495 CRC32 0x57e57f63 	Query	thread_id=5	exec_time=0	error_code=0	xid=0
SET @@session.sql_mode=1411383296/*!*/;
insert into app.t(id) values (1)
/*!*/;
#261121 17:09:17 server id 1  end_log_pos 526 CRC32 0xd3d6089a 	Xid = 5
COMMIT/*!*/;
#261121 17:09:18 server id 1  end_log_pos 568 CRC32 0x32b795b2 	GTID 0-1-2 trans
/*M!100001 SET @@session.gtid_seq_no=2*//*!*/;
START TRANSACTION
/*!*/;
#261121 17:09:18 server id 1  end_log_pos 600 CRC32 0x0f52d69c 	Annotate_rows:
#Q> insert into app.t(id) values (101),(102)
#261121 17:09:18 server id 1  end_log_pos 722 CRC32 0x06873a71 	Table_map: `app`.`t` mapped to number 22
# Number of rows: 2
#261121 17:09:18 server id 1  end_log_pos 766 CRC32 0x06873a71 	Write_rows: table id 22 flags: STMT_END_F

BINLOG '
Z9ABaxMBAAAALAAAANwCAAAA
'/*!*/;
### INSERT INTO `app`.`t`
### SET
###   @1=5
### INSERT INTO `app`.`t`
### SET
###   @1=6
#261121 17:09:18 server id 1  end_log_pos 805 CRC32 0xd3d6089a 	Xid = 6
COMMIT/*!*/;
#261121  7:09:19 server id 1  end_log_pos 850 CRC32 0x0f9bf6d2 	GTID 0-1-3 ddl
/*M!100001 SET @@session.gtid_seq_no=3*//*!*/;
#261121  7:09:19 server id 1  end_log_pos 900 CRC32 0x0f9bf6d2 	Query	thread_id=5	exec_time=0	error_code=0	xid=0
flush tables
/*!*/;
DELIMITER ;
# End of log file
";

    fn scan(lacking: &str, text: &str) -> (Found, String) {
        let gtids = |text: &str| Gtids::MariaDb(text.parse().unwrap());
        let wanted = Wanted { having: gtids("0-1-3,0-2-3"), lacking: gtids(lacking) };
        let mut sql = Vec::new();
        let mut scanner = Scanner::new(&wanted, &mut sql);
        for line in text.as_bytes().split_inclusive(|b| *b == b'\n') {
            scanner.feed(line).unwrap();
        }
        let found = scanner.finish().unwrap();
        (found, String::from_utf8(sql).unwrap())
    }

    #[test]
    fn extra_transactions_are_listed_with_rows_and_place() {
        let (found, sql) = scan("0-1-1", MARIADB);
        assert_eq!(found.transactions, 2);
        assert_eq!(
            found.list,
            [
                "0-1-2  2026-11-21 17:09:18  app.t: 2 inserted",
                "0-1-3  2026-11-21 07:09:19  harmless, no row changes: flush tables"
            ]
        );
        assert_eq!(found.first, Some(Place { file: "bin.000003".to_owned(), position: 526 }));
        assert_eq!((found.row_events, found.not_undoable), (1, None));
        assert!(sql.contains("-- 0-1-2  2026-11-21 17:09:18\n") && sql.contains("Z9ABaxMB"), "{sql}");
        assert!(sql.contains("PNABaw8B"), "the description of the file is needed to read the rows");
        assert!(sql.contains("SET @@session.sql_mode=1411383296"), "settings of what is left out go on to hold");
        assert!(!sql.contains("values (1)\n") && !sql.contains("gtid_seq_no"), "{sql}");
    }

    #[test]
    fn statements_that_are_not_told_row_by_row_cannot_be_undone() {
        let (found, _) = scan("", MARIADB);
        assert_eq!(found.list[0], "0-1-1  2026-11-21 17:09:17  statement: insert into app.t(id) values (1)");
        assert!(found.not_undoable.unwrap().starts_with("0-1-1 is not told row by row"));
        let (found, _) = scan("", &MARIADB.replace("flush tables", "create table app.x (n int)"));
        assert_eq!(found.list[2], "0-1-3  2026-11-21 07:09:19  DDL: create table app.x (n int)");
    }

    #[test]
    fn nothing_can_be_undone_below_what_others_have() {
        let other = MARIADB.replace("GTID 0-1-3 ddl", "GTID 0-2-3 ddl");
        let (found, _) = scan("0-1-1,0-2-3", &other);
        assert_eq!(found.not_undoable.unwrap(), "0-2-3, which the active master has too, comes after 0-1-2");
    }

    #[test]
    fn a_statement_that_looks_like_an_event_is_no_event() {
        let evil = "insert into app.t(id) values (1)\n#261121 17:09:18 server id 1  end_log_pos 1 \tGTID 0-9-9 trans\n";
        let (found, _) = scan("", &MARIADB.replace("insert into app.t(id) values (1)\n", evil));
        assert_eq!(found.gtids, ["0-1-1", "0-1-2", "0-1-3"]);
    }

    #[test]
    fn what_a_statement_is() {
        let kind = |text| match what_is(text) {
            What::Frame => "frame".to_owned(),
            What::Harmless(s) => format!("harmless {s}"),
            What::Changes(s) => s,
        };
        for text in
            ["BEGIN", "COMMIT", "/*!\\C utf8mb4 */", "/*!80011 SET @@session.default_collation_for_utf8mb4=255*/"]
        {
            assert_eq!(kind(text), "frame");
        }
        assert_eq!(kind("FLUSH PRIVILEGES"), "harmless FLUSH PRIVILEGES");
        assert_eq!(kind("SET PASSWORD FOR 'a'@'b'='*123'"), "DDL: SET…");
        assert_eq!(kind("CREATE USER 'a'@'%' IDENTIFIED BY 'secret'"), "DDL: CREATE USER 'a'@'%'…");
        assert_eq!(kind("XA PREPARE X'61'"), "DDL: XA PREPARE X'61'");
        assert_eq!(kind("/* app */ insert into t values (1)"), "DDL: /* app */ insert into t values (1)");
    }

    #[test]
    fn mysql_names_its_transactions_in_a_statement() {
        let text = "DELIMITER /*!*/;\n\
#261121 17:10:04 server id 1  end_log_pos 237 CRC32 0xbe1e9c26 \tGTID\tlast_committed=0\tsequence_number=1\n\
/*!80014 SET @@session.original_server_version=90704*//*!*/;\n\
SET @@SESSION.GTID_NEXT= '62c803ed-e5ce-11f1-b142-02fc00000001:7'/*!*/;\n\
#261121 17:10:04 server id 1  end_log_pos 308 CRC32 0xd076b08f \tQuery\tthread_id=9\n\
BEGIN\n/*!*/;\n\
#261121 17:10:04 server id 1  end_log_pos 424 CRC32 0x66b284ad \tDelete_rows: table id 104 flags: STMT_END_F\n\n\
BINLOG '\nbNAB\n'/*!*/;\n### DELETE FROM `app`.`t`\n### WHERE\nCOMMIT/*!*/;\n\
SET @@SESSION.GTID_NEXT= 'AUTOMATIC' /* added by mysqlbinlog */ /*!*/;\nDELIMITER ;\n";
        let gtids = |text: &str| Gtids::MySql(text.parse().unwrap());
        let wanted = Wanted {
            having: gtids("62c803ed-e5ce-11f1-b142-02fc00000001:1-7"),
            lacking: gtids("62c803ed-e5ce-11f1-b142-02fc00000001:1-6"),
        };
        let mut sql = Vec::new();
        let mut scanner = Scanner::new(&wanted, &mut sql);
        for line in text.as_bytes().split_inclusive(|b| *b == b'\n') {
            scanner.feed(line).unwrap();
        }
        let found = scanner.finish().unwrap();
        assert_eq!(found.list, ["62c803ed-e5ce-11f1-b142-02fc00000001:7  2026-11-21 17:10:04  app.t: 1 deleted"]);
        let sql = String::from_utf8(sql).unwrap();
        assert!(sql.contains("GTID_NEXT= 'AUTOMATIC'") && !sql.contains("GTID_NEXT= '62c8"), "{sql}");
        assert!(!sql.contains("original_server") && sql.contains("bNAB"), "{sql}");
    }
}

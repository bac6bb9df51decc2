//! Undoing extra transactions on MariaDB: their rows are set back by what mariadb-binlog makes of them backwards, in one
//! transaction, and then they are taken out of the server's GTID state.
//!
//! Nothing is changed unless every one of them can be undone: each told row by row, with whole rows, in InnoDB tables,
//! and nothing that others have among them. What goes with the binary logs was saved before.

use super::Work;
use super::binlog::Wanted;
use super::extras::{self, Saved, pairs};
use super::sql::{self, Dialect, MARIADB_GRANTS, Session};
use super::tool::{Go, lines};
use mmm_common::gtid::Gtids;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// For reading and applying it all.
const LIMIT: Duration = Duration::from_secs(4 * 3600);
/// Statements on their way from the tool to the server.
const WAITING: usize = 16;
const STATE: &str = "SELECT CONCAT_WS(' ', @@GLOBAL.gtid_binlog_state, @@GLOBAL.gtid_slave_pos)";

pub(super) async fn undo(work: &Work, wanted: &Wanted) -> Result<(), String> {
    let mut session = Session::own(&work.config).await.map_err(|e| format!("no login: {e}"))?;
    if session.dialect == Dialect::MySql {
        return Err(
            "MySQL's tools cannot undo transactions; nothing was changed; the ways out are a copy of the active \
                    master (reclone), or undoing them by hand"
                .to_owned(),
        );
    }
    work.must_be_idle(&mut session).await?;
    may_undo(&mut session).await?;
    session.run("STOP ALL SLAVES").await?;
    let before = session.one(STATE).await?;
    // What is undone is what is saved, whenever that was done last.
    let Some(saved) = extras::save(work, &mut session, wanted).await? else { return Ok(()) };
    let nothing = |why: String| format!("{why}; nothing was changed");
    can_be_undone(&mut session, &saved).await.map_err(nothing)?;

    work.progress.step("undoing the rows");
    session.run("SET SESSION sql_log_bin=0, innodb_lock_wait_timeout=10").await?;
    session.run("START TRANSACTION").await?;
    let applied = match apply(work, &mut session, saved).await {
        Ok(()) if session.one(STATE).await? != before => Err("the server has executed more meanwhile".to_owned()),
        applied => applied,
    };
    if let Err(why) = applied {
        // A login that is lost rolls back by itself.
        let _ = session.run("ROLLBACK").await;
        return Err(nothing(format!("the rows cannot be set back: {why}")));
    }
    session.rows(LIMIT, "COMMIT").await.map_err(|e| {
        format!("the outcome of setting the rows back is not known ({e}); copy the active master (reclone)")
    })?;

    work.progress.step("taking the transactions out of the GTID state");
    forget(&mut session, wanted).await.map_err(|why| {
        format!("the rows were set back, but the GTID state could not be ({why}); copy the active master (reclone)")
    })
}

/// Before anything is begun: half way without a privilege would be the worst place to stop.
async fn may_undo(session: &mut Session) -> Result<(), String> {
    let rows = session.rows(sql::ASK, "SHOW GRANTS").await?;
    let all: String = rows.into_iter().flat_map(BTreeMap::into_values).collect::<Vec<_>>().join("\n");
    let everywhere: String = all.lines().filter(|line| line.contains(" ON *.* ")).collect();
    let needed = [
        "BINLOG ADMIN",
        "BINLOG REPLAY",
        "BINLOG MONITOR",
        "RELOAD",
        "REPLICATION MASTER ADMIN",
        "REPLICATION SLAVE ADMIN",
    ];
    match needed.into_iter().find(|p| !everywhere.contains(p) && !everywhere.contains("ALL PRIVILEGES")) {
        Some(missing) => Err(format!("the agent lacks the privilege {missing}: {MARIADB_GRANTS} its user")),
        None => Ok(()),
    }
}

async fn can_be_undone(session: &mut Session, saved: &Saved) -> Result<(), String> {
    if let Some(why) = &saved.found.not_undoable {
        return Err(format!("they cannot be undone: {why}"));
    }
    for table in &saved.found.tables {
        let inside = table.split_once('.').map(|(db, name)| format!("{}/{}", encoded(db), encoded(name)));
        let Some(inside) = inside else { return Err(format!("they cannot be undone: table name '{table}'")) };
        let part = format!("{inside}#P#");
        let count = session
            .one(&format!(
                "SELECT COUNT(*) FROM information_schema.INNODB_SYS_TABLES WHERE NAME={} OR LEFT(NAME,{})={}",
                sql::quote(&inside),
                part.chars().count(),
                sql::quote(&part)
            ))
            .await?;
        if count == "0" {
            return Err(format!(
                "they cannot be undone: table {table} is not in InnoDB (any more), so not in one piece"
            ));
        }
    }
    Ok(())
}

/// As the server names files.
fn encoded(name: &str) -> String {
    name.chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '_' { c.to_string() } else { format!("@{:04x}", u32::from(c)) })
        .collect()
}

/// Everything backwards, within the open transaction.
async fn apply(work: &Work, session: &mut Session, saved: Saved) -> Result<(), String> {
    let Some(first) = &saved.found.first else { return Err("it is not known where they begin".to_owned()) };
    let files: Vec<String> = saved.files.iter().skip_while(|file| **file != first.file).cloned().collect();
    if files.is_empty() {
        return Err(format!("binary log {} is gone", first.file));
    }
    let arguments = ["--flashback".to_owned(), format!("--start-position={}", first.position)];
    let command = saved.tool.command(&arguments, &files);
    let (statements, mut waiting) = mpsc::channel(WAITING);
    let cancelled = work.cancelled.clone();
    let reading = tokio::task::spawn_blocking(move || {
        let mut statement: Option<String> = None;
        let mut rows = 0;
        lines(command, Instant::now() + LIMIT, &cancelled, |line| {
            let text = std::str::from_utf8(line).unwrap_or_default().trim_end();
            if text == "BINLOG '" {
                statement = Some(String::new());
            } else if text == "'/*!*/;" {
                if let Some(base64) = statement.take() {
                    rows += whole_rows(&base64)?;
                    // Nobody takes it: the other side has failed, and says why.
                    if statements.blocking_send(format!("BINLOG '\n{base64}'")).is_err() {
                        return Ok(Go::Enough);
                    }
                }
            } else if let Some(statement) = &mut statement {
                statement.push_str(text);
                statement.push('\n');
            }
            Ok(Go::On)
        })?;
        Ok::<u64, String>(rows)
    });
    let mut count = 0u64;
    let mut failed = None;
    while let Some(statement) = waiting.recv().await {
        if let Err(e) = session.rows(LIMIT, &statement).await {
            failed = Some(e.to_string());
            break;
        }
        count += 1;
        work.progress.now_and_then(|| format!("undoing the rows: {count} statements"));
    }
    drop(waiting);
    let rows = reading.await.map_err(|e| e.to_string())?;
    if let Some(why) = failed {
        return Err(why);
    }
    match rows? {
        rows if rows == saved.found.row_events => Ok(()),
        rows => Err(format!("{} row events were saved, and {rows} would be undone", saved.found.row_events)),
    }
}

/// How many events that change rows are in a BINLOG statement. An error when one of them does not have whole rows
/// (binlog_row_image): what is not in it cannot be set back.
fn whole_rows(base64: &str) -> Result<u64, String> {
    const HEADER: usize = 19;
    let bytes = decode(base64).ok_or("the tool's BINLOG statement is no base64")?;
    let broken = || "the tool's BINLOG statement is not understood".to_owned();
    let (mut rest, mut count) = (&bytes[..], 0);
    while !rest.is_empty() {
        let length = rest.get(9..13).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes).ok_or_else(broken)?;
        let length = usize::try_from(length).map_err(|_| broken())?;
        let event = rest.get(..length).filter(|e| e.len() > HEADER).ok_or_else(broken)?;
        let (old, update) = match event[4] {
            // A description of the file; a table.
            15 | 19 => {
                rest = &rest[length..];
                continue;
            }
            23 | 25 => (true, false),
            24 => (true, true),
            30 | 32 => (false, false),
            31 => (false, true),
            other => return Err(format!("events of type {other} are not known here")),
        };
        let mut body = event.get(HEADER + 8..).ok_or_else(broken)?;
        if !old {
            let extra = body.get(..2).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]]))).ok_or_else(broken)?;
            body = body.get(extra..).ok_or_else(broken)?;
        }
        let (columns, images) = match body {
            [n, images @ ..] if *n < 251 => (usize::from(*n), images),
            [252, a, b, images @ ..] => (usize::from(u16::from_le_bytes([*a, *b])), images),
            _ => return Err(broken()),
        };
        let bytes_each = columns.div_ceil(8);
        for image in 0..=usize::from(update) {
            let present = images.get(image * bytes_each..(image + 1) * bytes_each).ok_or_else(broken)?;
            if !(0..columns).all(|c| present[c / 8] & (1 << (c % 8)) != 0) {
                return Err("the rows were not logged whole (binlog_row_image was not FULL)".to_owned());
            }
        }
        count += 1;
        rest = &rest[length..];
    }
    Ok(count)
}

fn decode(base64: &str) -> Option<Vec<u8>> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let letters: Vec<u8> = base64.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    let mut bytes = Vec::with_capacity(letters.len() / 4 * 3);
    for four in letters.chunks(4) {
        // Each event was encoded by itself, so padding may stand in the middle.
        let used = four.iter().take_while(|c| **c != b'=').count();
        let mut bits = 0u32;
        for c in four.iter().take(used) {
            bits = bits << 6 | u32::from(value(*c)?);
        }
        bits <<= 6 * (4 - used);
        bytes.extend_from_slice(&bits.to_be_bytes()[1..used.max(1)]);
    }
    Some(bytes)
}

/// The server's GTID state becomes what it was without them. RESET MASTER comes first: the state can only be given to
/// an empty binary log.
async fn forget(session: &mut Session, wanted: &Wanted) -> Result<(), String> {
    let remaining = remaining(&session.executed().await?, wanted);
    session.run("RESET MASTER").await?;
    set_state(session, &remaining).await?;
    let executed = session.executed().await?;
    if pairs(&executed) == remaining { Ok(()) } else { Err(format!("it was set, and reads back as '{executed}'")) }
}

/// Gives an empty binary log its state, and replication its position.
pub(super) async fn set_state(session: &mut Session, state: &BTreeMap<(u64, u64), u64>) -> Result<(), String> {
    let list: Vec<String> = state.iter().map(|((d, s), n)| format!("{d}-{s}-{n}")).collect();
    session.run(&format!("SET GLOBAL gtid_binlog_state={}", sql::quote(&list.join(",")))).await?;
    session.run(&format!("SET GLOBAL gtid_slave_pos={}", sql::quote(&position(state)))).await?;
    Ok(())
}

/// The newest of each domain.
fn position(state: &BTreeMap<(u64, u64), u64>) -> String {
    let mut newest: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for ((domain, server), seq) in state {
        let highest = newest.entry(*domain).or_default();
        *highest = (*seq, *server).max(*highest);
    }
    newest.iter().map(|(d, (n, s))| format!("{d}-{s}-{n}")).collect::<Vec<_>>().join(",")
}

/// What is executed, less what is extra. It was made sure that nothing came after that.
fn remaining(executed: &Gtids, wanted: &Wanted) -> BTreeMap<(u64, u64), u64> {
    let (having, lacking) = (pairs(&wanted.having), pairs(&wanted.lacking));
    let less = |(key, seq): ((u64, u64), u64)| match (having.get(&key), lacking.get(&key)) {
        (Some(had), Some(theirs)) if had > theirs => Some((key, *theirs)),
        (Some(_), None) => None,
        (Some(_), Some(_)) | (None, _) => Some((key, seq)),
    };
    pairs(executed).into_iter().filter_map(less).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gtids(text: &str) -> Gtids {
        Gtids::MariaDb(text.parse().unwrap())
    }

    #[test]
    fn what_remains_is_what_the_active_master_has_too() {
        let having = gtids("0-1-105,0-2-90,0-3-106,1-1-7");
        let wanted = Wanted { having: having.clone(), lacking: gtids("0-1-102,0-2-120,1-1-9") };
        let left = remaining(&having, &wanted);
        assert_eq!(left, BTreeMap::from([((0, 1), 102), ((0, 2), 90), ((1, 1), 7)]));
        assert_eq!(position(&left), "0-1-102,1-1-7");
    }

    #[test]
    fn whole_rows_are_told_from_parts_of_rows() {
        // From mariadb-binlog --flashback of 10.11: a delete undone, and one that was logged with the key only.
        let whole = "Z9ABaxMBAAAALAAAAAACAAAAABYAAAAAAAEAA2FwcAABdAACCAgAAJQ2yBA=\n\
                     Z9ABaxcBAAAAMgAAADICAAAAABYAAAAAAAEAAgP8BQAAAAAAAABmAAAAAAAAAFmhcE4=\n";
        let minimal = "Z9ABaxMBAAAALAAAANwCAAAAABYAAAAAAAEAA2FwcAABdAACCAgAAHDb6tE=\n\
                       Z9ABaxcBAAAAKgAAAAYDAAAAABYAAAAAAAEAAgH+BgAAAAAAAAA3h3WF\n";
        assert_eq!(whole_rows(whole), Ok(1));
        assert!(whole_rows(minimal).unwrap_err().contains("binlog_row_image"));
        assert!(whole_rows("Z9ABaxMB").is_err());
        assert!(whole_rows("****").is_err());
    }

    #[test]
    fn tables_are_found_under_the_names_of_their_files() {
        assert_eq!(encoded("t_1"), "t_1");
        assert_eq!(encoded("a-b"), "a@002db");
    }
}

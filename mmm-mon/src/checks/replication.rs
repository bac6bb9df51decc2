//! The two replication checks: do both threads run (rep_threads), and how far are they behind (rep_backlog)?
//!
//! A server that cannot be asked is UNKNOWN here; whether it serves is the mysql check's business. Statement and column
//! names are looked for in both vocabularies, apart from each other, because servers mix them; a column that is
//! missing is an error, never a guess.

use super::session::{Session, Trouble, text};
use mmm_common::config::Host;
use mmm_common::state::{CheckKind, CheckResult};
use mysql_async::Row;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// Newer servers know only the first, older ones only the second.
const STATEMENTS: [&str; 2] = ["SHOW REPLICA STATUS", "SHOW SLAVE STATUS"];
/// "You have an error in your SQL syntax": the server does not know this spelling.
const SYNTAX_ERROR: u16 = 1064;

/// Which of the two questions is asked of the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    Threads,
    Backlog { max: Duration },
}

pub(crate) struct ReplicationCheck {
    session: Session,
    question: Question,
    /// The spelling that this server understood last.
    statement: usize,
}

impl ReplicationCheck {
    pub(crate) fn new(host: &Host, question: Question) -> Self {
        ReplicationCheck { session: Session::new(host), question, statement: 0 }
    }

    /// Ends at `deadline` at the latest; `timeout` is only for the text.
    pub(crate) async fn check(&mut self, deadline: Instant, timeout: Duration) -> CheckResult {
        let name = self.question.kind();
        match timeout_at(deadline, self.status()).await {
            Ok(Ok(rows)) => self.question.judge(&rows),
            Ok(Err(trouble)) => CheckResult::Unknown(format!("{name}: {}", trouble.text())),
            Err(_) => {
                self.session.abandon();
                let (server, doing) = (self.session.login().server, self.session.doing());
                CheckResult::Unknown(format!("{name}: no answer {doing} from {server} within {timeout:?}"))
            }
        }
    }

    pub(crate) fn restart(&mut self) {
        self.session.throw_away();
        self.statement = 0;
    }

    async fn status(&mut self) -> Result<Vec<Status>, Trouble> {
        let rows = match self.session.query(STATEMENTS[self.statement]).await {
            Err(Trouble::Answered { code: SYNTAX_ERROR, .. }) => {
                let other = 1 - self.statement;
                let rows = self.session.query(STATEMENTS[other]).await?;
                self.statement = other;
                rows
            }
            other => other?,
        };
        Ok(rows.iter().map(Status::from).collect())
    }
}

/// One row of the status: one connection to one source.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Status(Vec<(String, Option<String>)>);

impl From<&Row> for Status {
    fn from(row: &Row) -> Self {
        let columns = row.columns_ref().iter().enumerate();
        Status(columns.map(|(i, c)| (c.name_str().into_owned(), row.as_ref(i).and_then(text))).collect())
    }
}

impl Status {
    /// A column by either name.
    ///
    /// # Errors
    /// The column is not there.
    fn column(&self, names: [&str; 2]) -> Result<Option<&str>, String> {
        let found = self.0.iter().find(|(name, _)| names.iter().any(|n| n.eq_ignore_ascii_case(name)));
        found.map(|(_, value)| value.as_deref()).ok_or_else(|| {
            format!("the server's replication status has neither a column {} nor {}", names[0], names[1])
        })
    }

    /// " of channel 'x'" when the row belongs to a named one.
    fn channel(&self) -> String {
        match self.column(["Channel_Name", "Connection_name"]) {
            Ok(Some(name)) if !name.is_empty() => format!(" of channel '{name}'"),
            Ok(_) | Err(_) => String::new(),
        }
    }
}

impl Question {
    pub(crate) fn kind(self) -> CheckKind {
        match self {
            Question::Threads => CheckKind::RepThreads,
            Question::Backlog { .. } => CheckKind::RepBacklog,
        }
    }

    fn judge(self, rows: &[Status]) -> CheckResult {
        if rows.is_empty() {
            return CheckResult::Error("Replication is not set up".to_owned());
        }
        let found = match self {
            Question::Threads => threads(rows),
            Question::Backlog { max } => backlog(rows, max),
        };
        found.unwrap_or_else(CheckResult::Error)
    }
}

fn threads(rows: &[Status]) -> Result<CheckResult, String> {
    let mut broken = Vec::new();
    for row in rows {
        for (thread, running, error) in [
            ("IO", ["Replica_IO_Running", "Slave_IO_Running"], ["Last_IO_Error"; 2]),
            ("SQL", ["Replica_SQL_Running", "Slave_SQL_Running"], ["Last_SQL_Error"; 2]),
        ] {
            let is = row.column(running)?.unwrap_or("NULL");
            let error = row.column(error)?.unwrap_or("");
            if is != "Yes" {
                let error = if error.is_empty() { "no error is given".to_owned() } else { one_line(error) };
                broken.push(format!("{thread} thread{} running: {is} ({error})", row.channel()));
            }
        }
    }
    Ok(if broken.is_empty() {
        CheckResult::Ok(String::new())
    } else {
        CheckResult::Error(format!("Replication is broken: {}", broken.join("; ")))
    })
}

fn backlog(rows: &[Status], max: Duration) -> Result<CheckResult, String> {
    let mut worst: Option<u64> = None;
    for row in rows {
        if let Some(behind) = row.column(["Seconds_Behind_Source", "Seconds_Behind_Master"])? {
            let behind = behind.parse().map_err(|_| format!("the backlog '{}' is no number", one_line(behind)))?;
            worst = worst.max(Some(behind));
        }
    }
    Ok(match worst {
        None => CheckResult::Ok("Backlog is null".to_owned()),
        Some(behind) if Duration::from_secs(behind) > max => {
            CheckResult::Error(format!("Backlog is too big: {behind}s, max_backlog is {max:?}"))
        }
        Some(_) => CheckResult::Ok(String::new()),
    })
}

/// A server's text for one line of a log, and not more of it than one wants to read there.
fn one_line(text: &str) -> String {
    const MOST: usize = 300;
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MOST).collect();
    if line.len() < text.len() { line + " …" } else { line }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `Name: value` lines as in the servers' \G output; NULL is NULL; rows are divided by an empty line.
    fn judge(question: Question, status: &str) -> String {
        let rows: Vec<Status> = status
            .split("\n\n")
            .filter(|row| !row.trim().is_empty())
            .map(|row| {
                let columns = row.lines().filter_map(|line| line.trim().split_once(':'));
                Status(
                    columns.map(|(n, v)| (n.to_owned(), Some(v.trim().to_owned()).filter(|v| v != "NULL"))).collect(),
                )
            })
            .collect();
        question.judge(&rows).to_string()
    }

    const MARIADB: &str = "Slave_IO_State: Waiting for master to send event
        Master_Host: 10.0.0.1
        Slave_IO_Running: Yes
        Slave_SQL_Running: Yes
        Last_Errno: 0
        Seconds_Behind_Master: 0
        Last_IO_Error:
        Last_SQL_Error:";
    const MYSQL: &str = "Replica_IO_State: Waiting for source to send event
        Source_Host: 10.0.0.1
        Replica_IO_Running: Yes
        Replica_SQL_Running: Yes
        Seconds_Behind_Source: 61
        Last_IO_Error:
        Last_SQL_Error:
        Channel_Name:";
    const BACKLOG: Question = Question::Backlog { max: Duration::from_secs(60) };

    #[test]
    fn both_vocabularies_are_understood() {
        assert_eq!(judge(Question::Threads, MARIADB), "OK");
        assert_eq!(judge(Question::Threads, MYSQL), "OK");
        assert_eq!(judge(BACKLOG, MARIADB), "OK");
        assert_eq!(judge(BACKLOG, MYSQL), "ERROR: Backlog is too big: 61s, max_backlog is 60s");
    }

    #[test]
    fn a_backlog_of_exactly_the_limit_is_fine_and_null_is_as_in_mmm() {
        assert_eq!(judge(BACKLOG, &MYSQL.replace(": 61", ": 60")), "OK");
        assert_eq!(judge(BACKLOG, &MYSQL.replace(": 61", ": NULL")), "OK: Backlog is null");
        assert_eq!(judge(BACKLOG, &MYSQL.replace(": 61", ": -1")), "ERROR: the backlog '-1' is no number");
    }

    #[test]
    fn a_thread_that_does_not_run_is_named_with_its_error() {
        let stopped = MARIADB
            .replace("SQL_Running: Yes", "SQL_Running: No")
            .replace("Last_SQL_Error:", "Last_SQL_Error: Dup\tkey");
        assert_eq!(
            judge(Question::Threads, &stopped),
            "ERROR: Replication is broken: SQL thread running: No (Dup key)"
        );
        let connecting = MYSQL.replace("IO_Running: Yes", "IO_Running: Connecting");
        assert_eq!(
            judge(Question::Threads, &connecting),
            "ERROR: Replication is broken: IO thread running: Connecting (no error is given)"
        );
    }

    #[test]
    fn the_worst_channel_counts() {
        let two = format!("{MYSQL}\n\n{}", MYSQL.replace("Channel_Name:", "Channel_Name: b").replace(": 61", ": 7"));
        assert_eq!(judge(Question::Threads, &two), "OK");
        assert_eq!(judge(BACKLOG, &two), "ERROR: Backlog is too big: 61s, max_backlog is 60s");
        let half = two.replacen("IO_Running: Yes", "IO_Running: On", 1).replace("IO_Running: Yes", "IO_Running: No");
        assert_eq!(
            judge(Question::Threads, &half),
            "ERROR: Replication is broken: IO thread running: On (no error is given); \
             IO thread of channel 'b' running: No (no error is given)"
        );
    }

    #[test]
    fn what_is_missing_is_never_ok() {
        assert_eq!(judge(Question::Threads, ""), "ERROR: Replication is not set up");
        assert_eq!(judge(BACKLOG, ""), "ERROR: Replication is not set up");
        for (question, column) in [
            (Question::Threads, "Slave_IO_Running"),
            (Question::Threads, "Slave_SQL_Running"),
            (Question::Threads, "Last_IO_Error"),
            (BACKLOG, "Seconds_Behind_Master"),
        ] {
            let without = judge(question, &MARIADB.replace(column, "Other"));
            assert!(without.starts_with("ERROR:") && without.contains(column), "{without}");
        }
        let null = judge(Question::Threads, &MARIADB.replace("SQL_Running: Yes", "SQL_Running: NULL"));
        assert!(null.contains("SQL thread running: NULL"), "{null}");
    }
}

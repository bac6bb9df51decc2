//! Semi-synchronous replication: both sides of the local server, read for the report and switched for the core.
//!
//! Three vocabularies (MariaDB's and older MySQL's master/slave, MySQL's source/replica) differ in words only, so each
//! statement is made of the words that the server's own variables have. The replica side takes effect when the I/O
//! thread connects: restarting that must never throw a MariaDB relay log away.

use super::context::{ALONE, Context};
use super::dialect::{Dialect, is_on};
use super::session::{Fields, LOGIN, QUERY, Session, Trouble};
use super::status::IoThread;
use super::tasks;
use mmm_agent_core::io::Side;
use mmm_common::config::Cluster;
use mmm_common::report::SemiSync;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// The timeout that is set where the server's own is too short.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long received transactions may take to be applied before the I/O thread is started again.
const APPLY: Duration = Duration::from_secs(1);
/// How long stopping the I/O thread may take.
const STOP: Duration = Duration::from_secs(2);
/// How long the restarted I/O thread may take to connect; longer is the link's trouble, and in the report.
const COME_UP: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(5);

/// What commits here show in the process list while they wait for a replica.
pub(super) const WAITING: &str = "Waiting for semi-sync ACK";

/// The words of a server; a side is None when it is not installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Words {
    source: Option<&'static str>,
    replica: Option<&'static str>,
    /// The variable of how many must acknowledge; MariaDB has none, and one is enough.
    wait_count: Option<String>,
    dialect: Dialect,
}

impl Words {
    /// None: this server has no semi-synchronous replication.
    pub(super) async fn of(session: &mut Session) -> Result<Option<Words>, Trouble> {
        let rows = session.rows(QUERY, "SHOW GLOBAL VARIABLES LIKE 'rpl\\_semi\\_sync\\_%'").await?;
        let names: Vec<String> =
            rows.iter().map(|r| r.text(&["Variable_name"]).map(str::to_lowercase)).collect::<Result<_, _>>()?;
        Ok(Words::among(session.dialect, &names))
    }

    fn among(dialect: Dialect, names: &[String]) -> Option<Words> {
        let side = |words: [&'static str; 2]| {
            words.into_iter().find(|w| names.iter().any(|n| *n == format!("rpl_semi_sync_{w}_enabled")))
        };
        let (source, replica) = (side(["source", "master"]), side(["replica", "slave"]));
        (source.is_some() || replica.is_some()).then(|| Words {
            source,
            replica,
            wait_count: names.iter().find(|n| n.contains("_wait_for_")).cloned(),
            dialect,
        })
    }

    /// One row with everything.
    fn question(&self) -> String {
        let mut counted = Vec::new();
        let mut statuses = Vec::new();
        let mut status = |column: &str, name: String| {
            counted.push(format!("MAX(CASE WHEN VARIABLE_NAME='{name}' THEN VARIABLE_VALUE END) AS {column}"));
            statuses.push(format!("'{name}'"));
        };
        if let Some(source) = self.source {
            status("waits", format!("Rpl_semi_sync_{source}_status"));
            status("replicas", format!("Rpl_semi_sync_{source}_clients"));
        }
        if let Some(replica) = self.replica {
            status("acknowledges", format!("Rpl_semi_sync_{replica}_status"));
        }
        let mut columns = Vec::new();
        let variable = |column: &str, name: &str| format!("@@GLOBAL.{name} AS {column}");
        if let Some(source) = self.source {
            columns.push(variable("source", &format!("rpl_semi_sync_{source}_enabled")));
            columns.push(variable("wait_point", &format!("rpl_semi_sync_{source}_wait_point")));
            columns.push(variable("timeout_ms", &format!("rpl_semi_sync_{source}_timeout")));
        }
        columns.extend(self.wait_count.as_ref().map(|name| variable("wait_count", name)));
        if let Some(replica) = self.replica {
            columns.push(variable("replica", &format!("rpl_semi_sync_{replica}_enabled")));
        }
        let table = match self.dialect {
            Dialect::MariaDb => "information_schema.GLOBAL_STATUS",
            Dialect::MySql => "performance_schema.global_status",
        };
        // Variables stay outside: beside MAX() MariaDB gives 0 for rpl_semi_sync_slave_enabled (tried on 10.11 and 11.8).
        format!(
            "SELECT s.*, {} FROM (SELECT {} FROM {table} WHERE VARIABLE_NAME IN ({})) AS s",
            columns.join(", "),
            counted.join(", "),
            statuses.join(", ")
        )
    }

    fn answer(&self, row: &Fields) -> Result<SemiSync, Trouble> {
        let mut semisync = SemiSync { wait_count: 1, ..SemiSync::default() };
        if self.source.is_some() {
            semisync.source = is_on(row.text(&["source"])?);
            semisync.waits = is_on(row.text(&["waits"])?);
            semisync.after_sync = row.text(&["wait_point"])?.eq_ignore_ascii_case("AFTER_SYNC");
            semisync.timeout_ms = row.number(&["timeout_ms"])?;
            semisync.replicas = row.number(&["replicas"])?;
        }
        if self.wait_count.is_some() {
            semisync.wait_count = row.number(&["wait_count"])?;
        }
        if self.replica.is_some() {
            semisync.replica = is_on(row.text(&["replica"])?);
            semisync.acknowledges = is_on(row.text(&["acknowledges"])?);
        }
        Ok(semisync)
    }
}

/// Both sides now.
///
/// `replicas` counts those whose replica side was on when they connected, also while the source side here is off (tried
/// on MariaDB 10.11 and 11.8 and MySQL 9.7). One that has died without a word is counted until a heartbeat to it fails.
pub(super) async fn read(session: &mut Session, words: &Words, limit: Duration) -> Result<SemiSync, Trouble> {
    let rows = session.rows(limit, &words.question()).await?;
    let row = rows.first().ok_or_else(|| Trouble::Strange { why: "no row for semi-sync's state".to_owned() })?;
    words.answer(row)
}

pub(super) async fn switch(context: &Context, side: Side, on: bool) -> Result<(), String> {
    let name = match side {
        Side::Source => "source",
        Side::Replica => "replica",
    };
    let to = if on { "on" } else { "off" };
    let at = |why: String| format!("switching semi-sync's {name} side {to} at {}: {why}", context.server.place);
    // A drain and a fetch decide alone when the I/O thread runs.
    let alone = match side {
        Side::Source => None,
        Side::Replica => Some(context.alone_for_step(ALONE).await.map_err(at)?),
    };
    let mut session = context.take(&context.lane).await.map_err(|e| at(format!("no login: {e}")))?;
    let mut stopped = false;
    let result = switch_to(&mut session, side, on, &context.config.cluster, &mut stopped).await.map_err(at);
    if stopped && !session.usable() {
        // What this has stopped must not stay stopped.
        match context.server.connect(LOGIN).await {
            Ok(mut session) => {
                start_io(&mut session).await.map_err(|why| format!("semi-sync's replica side: {why}"))?
            }
            Err(e) => tracing::warn!(%e, "the I/O thread may be left stopped"),
        }
    }
    drop(alone);
    let result = match result {
        Ok(()) if stopped => connected(&mut session).await.map_err(at),
        result => result,
    };
    context.lane.put(session);
    result
}

async fn switch_to(
    session: &mut Session,
    side: Side,
    on: bool,
    cluster: &Cluster,
    stopped: &mut bool,
) -> Result<(), String> {
    let text = |e: Trouble| e.to_string();
    let words = Words::of(session).await.map_err(text)?;
    let word = words.as_ref().and_then(|w| match side {
        Side::Source => w.source,
        Side::Replica => w.replica,
    });
    let (Some(words), Some(word)) = (&words, word) else {
        return Err("the server has none: install the plugins semisync_source.so and semisync_replica.so".to_owned());
    };
    match side {
        Side::Source => {
            let sql = source_sql(word, on, read(session, words, QUERY).await.map_err(text)?, cluster.fenced_within());
            session.run(QUERY, &sql).await.map_err(text)?;
        }
        Side::Replica => switch_replica(session, word, on, stopped).await?,
    }
    let now = read(session, words, QUERY).await.map_err(|e| format!("it could not be read back: {e}"))?;
    let is = match side {
        Side::Source => now.source,
        Side::Replica => now.replica,
    };
    if is == on { Ok(()) } else { Err("set without an error, but it reads back unchanged".to_owned()) }
}

/// Ends the wait of commits whose clients are gone already; else they would be told that all is well. MySQL's do not end
/// by KILL, and hold up read_only until the timeout (tried on 9.7).
pub(super) async fn release(session: &mut Session) -> Result<(), Trouble> {
    let words = Words::of(session).await?;
    match words.and_then(|w| w.source) {
        Some(word) => session.run(QUERY, &format!("SET GLOBAL rpl_semi_sync_{word}_enabled=0")).await,
        None => Ok(()),
    }
}

/// On: with a wait point and a timeout that keep what was acknowledged (data-safety.md).
fn source_sql(word: &str, on: bool, now: SemiSync, fenced_within: Duration) -> String {
    let mut sets = Vec::new();
    if on && !now.after_sync {
        sets.push(format!("GLOBAL rpl_semi_sync_{word}_wait_point=AFTER_SYNC"));
    }
    if on {
        // Else an isolated master falls back, and acknowledges alone, as soon as it notices that the replicas have gone.
        let no_replica = if word == "source" { "replica" } else { "slave" };
        sets.push(format!("GLOBAL rpl_semi_sync_{word}_wait_no_{no_replica}=1"));
    }
    if on && Duration::from_millis(now.timeout_ms) <= fenced_within {
        let timeout = TIMEOUT.max(fenced_within + Duration::from_secs(1));
        sets.push(format!("GLOBAL rpl_semi_sync_{word}_timeout={}", timeout.as_millis()));
    }
    sets.push(format!("GLOBAL rpl_semi_sync_{word}_enabled={}", u8::from(on)));
    format!("SET {}", sets.join(", "))
}

/// The variable, and a new connection of the I/O thread where it runs.
async fn switch_replica(session: &mut Session, word: &str, on: bool, stopped: &mut bool) -> Result<(), String> {
    let text = |e: Trouble| e.to_string();
    let status = session.status().await.map_err(text)?.filter(|s| s.io != IoThread::Stopped);
    if status.as_ref().is_some_and(|s| !s.sql) && session.dialect == Dialect::MariaDb {
        // Not set either, so that it is asked for again.
        return Err("its I/O thread would have to be restarted, and while the SQL thread is stopped that would throw \
                    the relay log away: start the SQL thread"
            .to_owned());
    }
    session.run(QUERY, &format!("SET GLOBAL rpl_semi_sync_{word}_enabled={}", u8::from(on))).await.map_err(text)?;
    if status.is_none() {
        return Ok(());
    }
    *stopped = true;
    let restarted = restart_io(session).await;
    if restarted.is_err() && session.usable() {
        // As it was, so that it is asked for again.
        let back = format!("SET GLOBAL rpl_semi_sync_{word}_enabled={}", u8::from(!on));
        session.run(QUERY, &back).await.map_err(text)?;
    }
    restarted
}

async fn restart_io(session: &mut Session) -> Result<(), String> {
    tasks::stop_fetching(session, Instant::now() + STOP).await.map_err(|e| format!("I/O thread not stopped: {e}"))?;
    start_io(session).await
}

async fn start_io(session: &mut Session) -> Result<(), String> {
    let text = |e: Trouble| e.to_string();
    // With everything applied, no start can throw anything away.
    let until = Instant::now() + APPLY;
    loop {
        let status = session.status().await.map_err(text)?;
        let Some(status) = status else { return Err("the replication configuration was removed meanwhile".to_owned()) };
        if !status.sql && session.dialect == Dialect::MariaDb {
            return Err(format!(
                "the SQL thread stopped meanwhile ({}), so the I/O thread was not started again: it would throw the \
                 relay log away",
                status.why_sql_stopped()
            ));
        }
        let executed = session.vitals().await.map_err(text)?.executed;
        if status.unapplied(executed.as_ref()).is_none() || Instant::now() >= until {
            break;
        }
        sleep(POLL).await;
    }
    session
        .run_of(QUERY, session.dialect.words().start_io)
        .await
        .map_err(|e| format!("I/O thread not started again: {e}"))
}

async fn connected(session: &mut Session) -> Result<(), String> {
    let until = Instant::now() + COME_UP;
    loop {
        match session.status().await.map_err(|e| e.to_string())? {
            Some(s) if s.io == IoThread::Connecting && Instant::now() < until => sleep(POLL).await,
            Some(s) if s.io == IoThread::Stopped && !s.io_error.is_empty() => {
                return Err(format!("the I/O thread stopped: {}", s.io_error));
            }
            Some(_) | None => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(dialect: Dialect, names: &[&str]) -> Option<Words> {
        let names: Vec<String> = names.iter().map(|n| format!("rpl_semi_sync_{n}")).collect();
        Words::among(dialect, &names)
    }

    #[test]
    fn each_servers_own_words_are_used() {
        let mariadb = words(Dialect::MariaDb, &["master_enabled", "slave_enabled"]).unwrap();
        let question = mariadb.question();
        assert!(
            question.contains("'Rpl_semi_sync_master_clients'")
                && question.contains("@@GLOBAL.rpl_semi_sync_slave_enabled")
        );
        let names = ["source_enabled", "source_wait_for_replica_count", "replica_enabled"];
        let question = words(Dialect::MySql, &names).unwrap().question();
        assert!(question.contains("@@GLOBAL.rpl_semi_sync_source_wait_for_replica_count AS wait_count"), "{question}");
        let old = words(Dialect::MySql, &["master_enabled", "master_wait_for_slave_count", "slave_enabled"]).unwrap();
        assert!(old.question().contains("@@GLOBAL.rpl_semi_sync_master_wait_for_slave_count AS wait_count"));
        assert_eq!(words(Dialect::MySql, &[]), None);
    }

    #[test]
    fn one_side_alone_is_read_too() {
        let words = words(Dialect::MySql, &["replica_enabled"]).unwrap();
        assert!(!words.question().contains("source"), "{}", words.question());
        let row = Fields::of(&[("replica", Some("1")), ("acknowledges", Some("ON"))]);
        let now = words.answer(&row).unwrap();
        assert!(now.replica && now.acknowledges && !now.source && now.replicas == 0, "{now:?}");
    }

    #[test]
    fn the_source_side_is_never_on_with_a_wait_that_ends_before_the_fence() {
        let fenced = Duration::from_millis(6500);
        let short = SemiSync { timeout_ms: 6500, after_sync: false, ..SemiSync::default() };
        let sql = source_sql("master", true, short, fenced);
        assert!(sql.contains("wait_point=AFTER_SYNC") && sql.contains("timeout=10000"), "{sql}");
        let enough = SemiSync { timeout_ms: 6501, after_sync: true, ..SemiSync::default() };
        assert_eq!(
            source_sql("source", true, enough, fenced),
            "SET GLOBAL rpl_semi_sync_source_wait_no_replica=1, GLOBAL rpl_semi_sync_source_enabled=1"
        );
        let long = SemiSync { timeout_ms: 1, after_sync: true, ..SemiSync::default() };
        assert!(source_sql("source", true, long.clone(), 3 * fenced).contains("timeout=20500"));
        assert_eq!(source_sql("source", false, long, fenced), "SET GLOBAL rpl_semi_sync_source_enabled=0");
    }
}

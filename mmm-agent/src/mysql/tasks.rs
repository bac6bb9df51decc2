//! CatchUp and Drain: waiting until the SQL thread has applied what it must.
//!
//! A stopped SQL thread, or no answer, is a failure and never "in sync". On MariaDB nothing here starts one replication
//! thread while the other is stopped with unapplied transactions: the server would throw its relay log away.

use super::clients::{self, Client};
use super::context::{Alone, Context};
use super::dialect::{Dialect, Vitals};
use super::follow::is_source;
use super::relay;
use super::session::{LOGIN, QUERY, Session, Trouble};
use super::status::{IoThread, Status};
use mmm_common::gtid::Gtids;
use mmm_common::position::{LogPosition, Position};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

/// Between two looks at the position.
const POLL: Duration = Duration::from_millis(2);
/// Between two looks at the SQL thread.
const STATUS_POLL: Duration = Duration::from_millis(50);
/// For so long an I/O thread has to be seen doing nothing, after the STOP has arrived, before it counts as ended.
const AT_REST: Duration = Duration::from_millis(20);
/// How long the status may take after that.
const READ_BACK: Duration = Duration::from_millis(200);
/// How long a started thread may take to show that it runs.
const START: Duration = Duration::from_secs(1);
/// An SQL thread that has read everything, and whose workers have been idle, for so long will not apply what is missing.
const NOTHING_LEFT: Duration = Duration::from_millis(500);

pub(super) async fn catch_up(context: &Context, position: &Gtids, limit: Duration) -> Result<Option<Gtids>, String> {
    let deadline = Instant::now() + limit;
    let at = |what: &str| format!("catching up at {}: {what}", context.server.place);
    let mut session = context.take(&context.task).await.map_err(|e| at(&format!("no login: {e}")))?;
    let mut look = Instant::now();
    loop {
        let vitals = session.vitals().await.map_err(|e| at(&e.to_string()))?;
        let (executed, missing) = missing(vitals, position).map_err(|why| at(&why))?;
        if missing == 0 {
            context.task.put(session);
            return Ok(Some(executed));
        }
        let rest = format!("{missing} transactions missing of {position}");
        if Instant::now() >= look {
            match session.status().await {
                Ok(None) => return Err(at(&format!("{rest}; no replication is configured"))),
                Ok(Some(s)) if !s.sql => {
                    return Err(at(&format!("{rest}; the SQL thread does not run: {}", s.why_sql_stopped())));
                }
                Ok(Some(_)) => {}
                // The status can be held up where the position is not.
                Err(Trouble::Late { .. }) => {
                    session = context.server.connect(QUERY).await.map_err(|e| at(&e.to_string()))?;
                }
                Err(e) => return Err(at(&e.to_string())),
            }
            look = Instant::now() + STATUS_POLL;
        }
        if Instant::now() >= deadline {
            return Err(at(&format!("{rest} after {} ms", limit.as_millis())));
        }
        sleep(POLL).await;
    }
}

/// What the server has executed, and how many of the position's transactions are not in it. Not known is an error.
pub(super) fn missing(vitals: Vitals, position: &Gtids) -> Result<(Gtids, u64), String> {
    let Some(executed) = vitals.executed else {
        return Err(vitals.no_gtids.unwrap_or_else(|| "what it has executed is not known".to_owned()));
    };
    match executed.missing(position) {
        Some(n) => Ok((executed, n)),
        None => Err("the position is of the other dialect (MariaDB and MySQL do not replicate by GTID)".to_owned()),
    }
}

/// As [`catch_up`], for servers without GTIDs: by the place that the SQL thread has reached in the old master's log.
pub(super) async fn catch_up_in_log(
    context: &Context,
    position: &LogPosition,
    limit: Duration,
) -> Result<Position, String> {
    let deadline = Instant::now() + limit;
    let at = |what: &str| format!("catching up at {}: {what}", context.server.place);
    let Some(old) = context.config.cluster.hosts.get(&position.host) else {
        return Err(at(&format!("[host.{}] is not in the configuration", position.host)));
    };
    let mut session = context.take(&context.task).await.map_err(|e| at(&format!("no login: {e}")))?;
    loop {
        let status = session.status().await.map_err(|e| at(&e.to_string()))?;
        let s = status.ok_or_else(|| at("no replication is configured"))?;
        if !is_source(&s, old) {
            return Err(at(&format!("it replicates from {}:{}, not from {}", s.source, s.port, position.host)));
        }
        let rest = format!("it has applied up to {} of {}", s.applied, position.place);
        match s.applied.reaches(&position.place) {
            Some(true) => {
                context.task.put(session);
                return Ok(Position::Log(LogPosition { host: position.host.clone(), place: s.applied }));
            }
            _ if !s.sql => return Err(at(&format!("{rest}; the SQL thread does not run: {}", s.why_sql_stopped()))),
            Some(false) if Instant::now() < deadline => sleep(POLL).await,
            Some(false) => return Err(at(&format!("{rest} after {} ms", limit.as_millis()))),
            None => return Err(at(&format!("{rest}, which are not of one log"))),
        }
    }
}

pub(super) async fn drain(context: &Context, limit: Duration) -> Result<Option<Gtids>, String> {
    let at = |what: &str| format!("draining {}: {what}", context.server.place);
    let deadline = Instant::now() + limit;
    // Nobody starts the I/O thread again while this goes on.
    let alone = context.alone(limit).await.map_err(|why| at(&why))?;
    let mut session = context.take(&context.task).await.map_err(|e| at(&format!("no login: {e}")))?;
    end_fetchers(&mut session).await.map_err(|e| at(&format!("what fetches from here could not be ended: {e}")))?;
    let fetching = session.status().await.map_err(|e| at(&e.to_string()))?;
    // Only MariaDB's thread, and one that is connecting, take long to end.
    let lingers = |s: &Status| match s.io {
        IoThread::Connecting => true,
        IoThread::Running => session.dialect == Dialect::MariaDb,
        IoThread::Stopped => false,
    };
    let beside = match fetching.filter(|s| s.sql && lingers(s)) {
        // On a full or a busy server the one login there is has to do.
        Some(recorded) => context.server.connect(LOGIN).await.ok().map(|other| (recorded, other)),
        None => None,
    };
    let position = match beside {
        Some((recorded, other)) => drained_beside(context, alone, &mut session, other, recorded, deadline).await,
        None => drained(&mut session, deadline).await,
    };
    let position = position.map_err(|why| at(&why))?;
    context.task.put(session);
    Ok(position)
}

/// As [`drained`], with a STOP by the `other` login that nobody waits for longer than the I/O thread can still take
/// something.
async fn drained_beside(
    context: &Context,
    alone: Alone,
    session: &mut Session,
    other: Session,
    mut recorded: Status,
    deadline: Instant,
) -> Result<Option<Gtids>, String> {
    let text = |e: Trouble| e.to_string();
    relay::complete(session, &mut recorded).await.map_err(text)?;
    // Nothing comes to who has no connection. That is used first: his STOP can hold the status up.
    let before = match recorded.io {
        IoThread::Connecting => Some(wait_applied(session, &recorded, deadline).await?),
        IoThread::Running | IoThread::Stopped => None,
    };
    match stop_beside(context, alone, session, other, before.is_some(), deadline).await.map_err(text)? {
        Stopped::Over(_alone) => wait_applied(session, &recorded, deadline).await,
        Stopped::AtRest { mut stopping, connecting } => {
            match (session.status_within(READ_BACK).await, before.filter(|_| connecting)) {
                (Ok(_), _) => {
                    let position = wait_applied(session, &recorded, deadline).await?;
                    // It was at rest, so nothing has come since.
                    let last = session.status_within(READ_BACK).await.map_err(text)?;
                    if last.is_none_or(|s| s.unapplied(position.as_ref()).is_none()) {
                        return Ok(position);
                    }
                }
                (Err(Trouble::Late { .. }), Some(position)) => return Ok(position),
                (Err(Trouble::Late { .. }), None) => {}
                (Err(e), _) => return Err(e.to_string()),
            }
            let (ended, _alone) = (&mut stopping).await.map_err(|e| e.to_string())?;
            ended.map_err(text)?;
            if !session.usable() {
                *session = context.server.connect(LOGIN).await.map_err(text)?;
            }
            wait_applied(session, &recorded, deadline).await
        }
    }
}

/// Ends the sessions of those who fetch from here. That of a dead or hung master stays for a long while and counts as
/// a semi-synchronous replica: the first commit of the new master would wait for it until the timeout (tried: 10 s of
/// 10 s). The living connect again by themselves.
async fn end_fetchers(session: &mut Session) -> Result<(), Trouble> {
    for fetcher in clients::all(session).await?.into_iter().filter(Client::fetches) {
        clients::kill(session, fetcher.id).await?;
    }
    Ok(())
}

/// Stops the I/O thread. With semi-sync on, MariaDB's replica first logs in to its master to end the dump thread there,
/// and waits long for one that hangs or is gone (tried: 2 s of the default 5); one second is the least that can be set.
pub(super) async fn stop_fetching(session: &mut Session, deadline: Instant) -> Result<(), Trouble> {
    if session.dialect == Dialect::MariaDb {
        match session.run(QUERY, "SET GLOBAL rpl_semi_sync_slave_kill_conn_timeout=1").await {
            // A server without it waits for nobody.
            Ok(()) | Err(Trouble::Refused { code: 1193, .. }) => {}
            Err(e) => return Err(e),
        }
    }
    let limit = QUERY.max(deadline.saturating_duration_since(Instant::now()));
    session.run_of(limit, session.dialect.words().stop_io).await
}

/// A STOP of the I/O thread that goes on, with the right to do so.
type Stopping = JoinHandle<(Result<(), Trouble>, Option<Alone>)>;

enum Stopped {
    Over(Option<Alone>),
    /// The thread takes nothing any more, and only its end is waited for. `connecting`: it has no connection.
    AtRest {
        stopping: Stopping,
        connecting: bool,
    },
}

/// Has the I/O thread stopped, and returns when that is done, or when the thread can take nothing any more and only its
/// end is waited for: with semi-sync, MariaDB's logs in to a master that does not answer (see `stop_fetching`).
///
/// After the STOP has taken effect the thread drops what it reads, and no acknowledgement leaves any more (10.11 and 11.8:
/// its socket is shut down). So it is taken to be at rest when it is seen doing nothing for a while after the server has
/// begun the STOP, and no other command that changes replication may be holding that up. Nobody starts it again before
/// the STOP is over.
async fn stop_beside(
    context: &Context,
    alone: Alone,
    session: &mut Session,
    mut other: Session,
    unconnected: bool,
    deadline: Instant,
) -> Result<Stopped, Trouble> {
    let (id, ending) = (other.id, context.ending(alone));
    let mut stopping = tokio::spawn(async move {
        let ended = stop_fetching(&mut other, deadline).await;
        (ended, ending.ended())
    });
    let mut at_rest: Option<Instant> = None;
    loop {
        if let Ok(ended) = timeout(POLL, &mut stopping).await {
            let (answer, alone) = ended.map_err(|e| Trouble::Lost { why: e.to_string() })?;
            return answer.map(|()| Stopped::Over(alone));
        }
        let all = clients::all(session).await?;
        let begun = all.iter().any(|c| c.id == id && c.stops_replication());
        let held_up = all.iter().any(|c| c.id != id && c.changes_replication());
        let connecting = unconnected && all.iter().any(Client::is_connecting);
        let idle = connecting || all.iter().any(Client::fetches_nothing_more);
        let rests = begun && idle && !held_up && !all.iter().any(Client::queues_event);
        at_rest = if rests { at_rest.or(Some(Instant::now())) } else { None };
        if at_rest.is_some_and(|since| since.elapsed() >= AT_REST) {
            tracing::info!(
                place = context.server.place,
                "the I/O thread is still ending its connection to the old master"
            );
            return Ok(Stopped::AtRest { stopping, connecting });
        }
    }
}

/// Stops fetching and waits until everything received is applied. The order of statements is what keeps MariaDB's relay
/// log (see the top of the file).
pub(super) async fn drained(session: &mut Session, deadline: Instant) -> Result<Option<Gtids>, String> {
    let text = |e: Trouble| e.to_string();
    let recorded = session.status().await.map_err(text)?;
    let Some(mut recorded) = recorded else {
        return Ok(session.vitals().await.map_err(text)?.executed);
    };
    relay::complete(session, &mut recorded).await.map_err(text)?;
    if !recorded.sql {
        let executed = session.vitals().await.map_err(text)?.executed;
        let io_runs = recorded.io != IoThread::Stopped;
        match recorded.unapplied(executed.as_ref()) {
            None if !io_runs => return Ok(executed),
            Some(left) if !io_runs && session.dialect == Dialect::MariaDb => {
                return Err(format!(
                    "both replication threads are stopped with {left}; starting one would throw the relay log away \
                     (SQL thread: {}). Apply it with mariadb-binlog, or re-clone",
                    recorded.why_sql_stopped()
                ));
            }
            Some(_) | None => start_sql(session).await?,
        }
    }
    stop_fetching(session, deadline).await.map_err(text)?;
    wait_applied(session, &recorded, deadline).await
}

/// Starts the SQL thread and waits until it runs, or says why it does not.
pub(super) async fn start_sql(session: &mut Session) -> Result<(), String> {
    session
        .run_of(QUERY, session.dialect.words().start_sql)
        .await
        .map_err(|e| format!("SQL thread not started: {e}"))?;
    let until = Instant::now() + START;
    loop {
        match session.status().await.map_err(|e| e.to_string())? {
            Some(s) if s.sql => return Ok(()),
            Some(s) if !s.sql_error.is_empty() => return Err(format!("the SQL thread stops again: {}", s.sql_error)),
            Some(_) | None if Instant::now() < until => sleep(POLL).await,
            Some(_) | None => return Err("the SQL thread was started and does not run".to_owned()),
        }
    }
}

async fn wait_applied(session: &mut Session, recorded: &Status, deadline: Instant) -> Result<Option<Gtids>, String> {
    let text = |e: Trouble| e.to_string();
    let mut idle_since: Option<Instant> = None;
    loop {
        let Some(mut status) = session.status().await.map_err(text)? else {
            return Err("the replication configuration was removed meanwhile".to_owned());
        };
        relay::complete(session, &mut status).await.map_err(text)?;
        let executed = session.vitals().await.map_err(text)?.executed;
        // With the I/O thread stopped, the second look at what was received is the last word; the first one guards
        // against a relay log that was thrown away between.
        let left = status.unapplied(executed.as_ref()).or_else(|| status.unapplied_of(recorded, executed.as_ref()));
        let Some(left) = left else { return Ok(executed) };
        if !status.sql {
            return Err(format!("{left}; the SQL thread has stopped: {}", status.why_sql_stopped()));
        }
        // Only MariaDB throws its relay log away; and workers apply what the SQL thread has handed on to them.
        let idle = session.dialect == Dialect::MariaDb
            && status.relay_log_is_read()
            && !clients::all(session).await.map_err(text)?.iter().any(Client::applies);
        idle_since = if idle { idle_since.or(Some(Instant::now())) } else { None };
        if idle_since.is_some_and(|since| since.elapsed() >= NOTHING_LEFT) {
            return Err(format!("{left}, but the SQL thread has read the whole relay log: part of it was thrown away"));
        }
        if Instant::now() >= deadline {
            return Err(format!("{left} when the time was over"));
        }
        sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmm_common::report::Writing;

    #[test]
    fn not_known_is_not_nothing_missing() {
        let position = Gtids::MariaDb("0-1-9".parse().unwrap());
        let vitals = |executed: Option<Gtids>| {
            let no_gtids = executed.is_none().then(|| "its replication position is beyond its binary log".to_owned());
            Vitals { writing: Writing::ReadOnly, executed, no_gtids, ex_master: false }
        };
        let have = Gtids::MariaDb("0-1-7".parse().unwrap());
        assert_eq!(missing(vitals(Some(have.clone())), &position), Ok((have, 2)));
        assert!(missing(vitals(None), &position).unwrap_err().contains("beyond its binary log"));
        let other = Gtids::MySql("3e11fa47-71ca-11e1-9e33-c80aa9429562:1".parse().unwrap());
        assert!(missing(vitals(Some(other)), &position).unwrap_err().contains("dialect"));
    }
}

//! Pointing replication at a source by GTID, and stopping to fetch.
//!
//! Changing the source throws the relay log away, so what was received is applied first, or the new source must have it;
//! else the step is refused with the reason. The password never gets into an error or the log.

use super::context::{ALONE, Context};
use super::dialect::{Dialect, Vitals};
use super::session::{LOGIN, QUERY, Server, Session, Trouble};
use super::status::{IoThread, Status};
use super::{mariadb, mysql8, relay, tasks};
use mmm_common::config::Host;
use mmm_common::gtid::Gtids;
use mmm_common::ids::HostName;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How long transactions already received may take to be applied before the source is changed.
const APPLY: Duration = Duration::from_secs(10);
/// How long a server that fetches no more may take to apply the rest before its source is forgotten.
const APPLY_REST: Duration = Duration::from_secs(2);
/// How long STOP may take: it waits for the transaction in hand.
const STOP: Duration = Duration::from_secs(5);
/// How long the threads may take to come up; a connection that takes longer is no error of the step.
const COME_UP: Duration = Duration::from_secs(2);
/// An SQL thread that cannot apply what comes next runs for a moment first, as seen from outside.
const STAYS: Duration = Duration::from_millis(250);

pub(super) async fn follow(context: &Context, name: &HostName) -> Result<(), String> {
    let at = |why: String| format!("following {name} at {}: {why}", context.server.place);
    let Some(host) = context.config.cluster.hosts.get(name) else {
        return Err(at(format!("[host.{name}] is not in the configuration")));
    };
    if *name == context.config.this {
        return Err(at("a host cannot replicate from itself".to_owned()));
    }
    let alone = context.alone_for_step(ALONE).await.map_err(at)?;
    let mut session = context.take(&context.lane).await.map_err(|e| at(format!("no login: {e}")))?;
    let pointed = point(&mut session, name, host).await;
    // What is left is only looked at: a drain need not wait for that.
    drop(alone);
    let result = match pointed {
        Ok(by_gtid) => come_up(&mut session, host, by_gtid).await,
        Err(why) => Err(why),
    };
    context.lane.put(session);
    result.map_err(at)
}

/// True: by GTID.
async fn point(session: &mut Session, name: &HostName, host: &Host) -> Result<bool, String> {
    let text = |e: Trouble| e.to_string();
    let vitals = session.vitals().await.map_err(text)?;
    let mut status = session.status().await.map_err(text)?;
    if let (Some(cure), Dialect::MySql) = (&vitals.no_gtids, session.dialect) {
        // By file and position only what is pointed there already can go on.
        return match status {
            Some(s) if is_source(&s, host) => start(session, &s, &vitals, name, host).await.map(|()| false),
            Some(_) | None => Err(format!("it cannot replicate by GTID: {cure}")),
        };
    }
    if let Some(s) = &mut status {
        relay::complete(session, s).await.map_err(text)?;
    }
    match status {
        // An ex-master that starts to fetch again would ask for what it wrote itself, from before it wrote.
        Some(s) if s.by_gtid && is_source(&s, host) && !(vitals.ex_master && s.io == IoThread::Stopped) => {
            start(session, &s, &vitals, name, host).await?;
        }
        Some(s) => {
            apply_received(session, &s, &vitals, name, host).await?;
            change(session, host, STOP).await?;
        }
        None => change(session, host, STOP).await?,
    }
    Ok(true)
}

pub(super) fn is_source(status: &Status, host: &Host) -> bool {
    status.port == host.mysql_port && status.source.parse().is_ok_and(|ip: std::net::IpAddr| ip == host.ip)
}

/// The source is right already: only what is stopped is started.
async fn start(session: &mut Session, s: &Status, vitals: &Vitals, name: &HostName, host: &Host) -> Result<(), String> {
    let words = session.dialect.words();
    match (s.io != IoThread::Stopped, s.sql) {
        (true, true) => Ok(()),
        (true, false) => tasks::start_sql(session).await,
        (false, true) => session.run_of(QUERY, words.start_io).await.map_err(|e| format!("I/O thread: {e}")),
        (false, false) => {
            if let (Some(left), Dialect::MariaDb) = (s.unapplied(vitals.executed.as_ref()), session.dialect) {
                source_has(name, host, s.received.as_ref()).await.map_err(|why| {
                    format!("both threads are stopped with {left}; starting them would throw that away, and {why}")
                })?;
            }
            session.run_of(QUERY, words.start).await.map_err(|e| format!("replication threads: {e}"))
        }
    }
}

/// Nothing that was received may be lost with the relay log: it is applied, or the new source has it.
async fn apply_received(
    session: &mut Session,
    s: &Status,
    vitals: &Vitals,
    name: &HostName,
    host: &Host,
) -> Result<(), String> {
    let idle = s.io == IoThread::Stopped && !s.sql;
    if idle && s.unapplied(vitals.executed.as_ref()).is_none() {
        return Ok(());
    }
    let why = match tasks::drained(session, Instant::now() + APPLY).await {
        Ok(_) => return Ok(()),
        Err(why) => why,
    };
    if !session.usable() {
        return Err(why);
    }
    // Read again: more may have come in before the I/O thread stopped.
    let mut now = session.status().await.map_err(|e| e.to_string())?;
    if let Some(now) = &mut now {
        relay::complete(session, now).await.map_err(|e| e.to_string())?;
    }
    let received = now.and_then(|s| s.received);
    source_has(name, host, received.as_ref()).await.map_err(|also| {
        format!("its present source {}:{}: {why}; changing it would throw that away, and {also}", s.source, s.port)
    })
}

/// Whether the host has executed everything in `received`, asked with the replication login; the error says why not.
async fn source_has(name: &HostName, host: &Host, received: Option<&Gtids>) -> Result<(), String> {
    let Some(received) = received else { return Err("it is not known by GTID what that is".to_owned()) };
    let server = Server::source(name.as_str(), host);
    let mut session =
        server.connect(LOGIN).await.map_err(|e| format!("{} cannot be asked for it: {e}", server.place))?;
    let vitals = session.vitals().await.map_err(|e| format!("{} cannot be asked for it: {e}", server.place))?;
    match vitals.executed.as_ref().and_then(|e| e.missing(received)) {
        Some(0) => Ok(()),
        Some(n) => Err(format!("{n} of it are not on {}", server.place)),
        None => Err(format!("{} has no comparable GTIDs", server.place)),
    }
}

/// Changes the source and starts both threads. Whatever is in the relay log is gone afterwards. `limit`: for each of the
/// statements that may wait for something.
pub(super) async fn change(session: &mut Session, host: &Host, limit: Duration) -> Result<(), String> {
    let words = session.dialect.words();
    session
        .run_of(limit, words.stop)
        .await
        .or_else(not_a_replica)
        .map_err(|e| format!("replication not stopped: {e}"))?;
    let answer = match session.dialect {
        // Asked for only now, when the SQL thread stands still.
        Dialect::MariaDb => {
            let ex_master = session.vitals().await.map_err(|e| e.to_string())?.ex_master;
            change_mariadb(session, host, ex_master, limit).await
        }
        Dialect::MySql => {
            let [present, old] = mysql8::change(host);
            session.run_secret(limit, &[&present, &old]).await
        }
    };
    answer.map_err(|e| format!("source not changed: {e}"))?;
    session.run_of(QUERY, words.start).await.map_err(|e| format!("replication not started: {e}"))
}

async fn change_mariadb(session: &mut Session, host: &Host, ex_master: bool, limit: Duration) -> Result<(), Trouble> {
    if !ex_master {
        return session.run_secret(limit, &[&mariadb::change(host, false)]).await;
    }
    match session.run_secret(limit, &[&mariadb::change(host, true)]).await {
        Err(e) if e.code() == Some(1064) => change_by_position(session, host, limit).await,
        answer => answer,
    }
}

/// For an ex-master older than 10.10.
pub(super) async fn change_by_position(session: &mut Session, host: &Host, limit: Duration) -> Result<(), Trouble> {
    session.run(QUERY, mariadb::DEMOTE).await?;
    session.run_secret(limit, &[&mariadb::change(host, false)]).await
}

/// Read back: right source, both threads. "Connecting" after the time is the link's trouble, and in the report.
async fn come_up(session: &mut Session, host: &Host, by_gtid: bool) -> Result<(), String> {
    let until = Instant::now() + COME_UP;
    let mut up_since: Option<Instant> = None;
    loop {
        let Some(s) = session.status().await.map_err(|e| e.to_string())? else {
            return Err("set, but the server shows no replication".to_owned());
        };
        if !is_source(&s, host) || s.by_gtid != by_gtid {
            return Err(format!("set, but it reads back as {}:{} (by GTID: {})", s.source, s.port, s.by_gtid));
        }
        let late = Instant::now() >= until;
        match (s.io, s.sql) {
            (IoThread::Running, true) if up_since.get_or_insert_with(Instant::now).elapsed() >= STAYS => return Ok(()),
            (IoThread::Running, true) => sleep(Duration::from_millis(5)).await,
            (IoThread::Connecting, true) if late => return Ok(()),
            (_, false) if !s.sql_error.is_empty() => return Err(format!("the SQL thread stopped: {}", s.sql_error)),
            (IoThread::Stopped, _) if !s.io_error.is_empty() => {
                return Err(format!("the I/O thread stopped: {}", s.io_error));
            }
            (..) if late => return Err(format!("started, but not running (I/O: {:?}, SQL: {})", s.io, s.sql)),
            (..) => sleep(Duration::from_millis(5)).await,
        }
    }
}

/// Stops the I/O thread. On MariaDB a stopped SQL thread is started first, for with both stopped nothing could start
/// again without losing what was received.
pub(super) async fn detach(context: &Context) -> Result<(), String> {
    let at = |why: String| format!("detaching {}: {why}", context.server.place);
    let _alone = context.alone_for_step(ALONE).await.map_err(at)?;
    let mut session = context.take(&context.lane).await.map_err(|e| at(format!("no login: {e}")))?;
    let mut result = stop_and_apply(&mut session).await;
    if result.is_ok() {
        result = forget_source(&mut session).await;
    }
    context.lane.put(session);
    result.map_err(at)
}

/// A server that starts again begins to fetch by itself from the source that it knows: a crashed active master would get
/// what its diverged peer wrote (tried: MariaDB then cannot apply its own end, error 1950). So the source is forgotten, once
/// nothing is left to apply. To follow somebody, it is set anew in any case.
async fn forget_source(session: &mut Session) -> Result<(), String> {
    let text = |e: Trouble| e.to_string();
    let words = session.dialect.words();
    let until = Instant::now() + APPLY_REST;
    loop {
        let Some(mut s) = session.status().await.map_err(text)? else { return Ok(()) };
        relay::complete(session, &mut s).await.map_err(text)?;
        let executed = session.vitals().await.map_err(text)?.executed;
        if s.io != IoThread::Stopped {
            return Err("the I/O thread was started again meanwhile".to_owned());
        }
        if !s.by_gtid || s.unapplied(executed.as_ref()).is_some() {
            if s.by_gtid && s.sql && Instant::now() < until {
                sleep(Duration::from_millis(5)).await;
                continue;
            }
            // What waits in the relay log would be lost with the source; without GTIDs, so would the position.
            return Ok(());
        }
        session.run_of(STOP, words.stop).await.map_err(|e| format!("SQL thread not stopped: {e}"))?;
        return match session.run_of(STOP, words.forget).await {
            Err(e @ Trouble::Refused { code: 1227 | 1045 | 1044, .. }) => {
                tracing::warn!(%e, "the replication source is not forgotten: a restart would fetch from it. GRANT RELOAD");
                // As it was before: it applies, and fetches nothing.
                tasks::start_sql(session).await
            }
            answer => answer.map_err(|e| format!("the source was not forgotten: {e}")),
        };
    }
}

async fn stop_and_apply(session: &mut Session) -> Result<(), String> {
    let Some(s) = session.status().await.map_err(|e| e.to_string())? else { return Ok(()) };
    if s.io == IoThread::Stopped {
        return Ok(());
    }
    let started = match (session.dialect, s.sql) {
        (Dialect::MariaDb, false) => tasks::start_sql(session).await,
        (Dialect::MariaDb | Dialect::MySql, _) => Ok(()),
    };
    tasks::stop_fetching(session, Instant::now() + STOP).await.map_err(|e| format!("I/O thread not stopped: {e}"))?;
    match session.status().await.map_err(|e| e.to_string())? {
        Some(s) if s.io != IoThread::Stopped => {
            Err("I/O thread stopped without an error, but it reads back as running".to_owned())
        }
        Some(_) | None => started.map_err(|why| format!("it fetches no more, but received transactions wait: {why}")),
    }
}

/// STOP where nothing is configured.
fn not_a_replica(e: Trouble) -> Result<(), Trouble> {
    match e.code() {
        Some(1200 | 1617) => Ok(()),
        Some(_) | None => Err(e),
    }
}

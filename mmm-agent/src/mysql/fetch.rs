//! Fetch: after a drain, what only another replica has is fetched from it and applied (data-safety.md, unplanned, step 2).
//!
//! Replication is pointed at that replica, which throws the relay log away: so it is not begun before everything received
//! has been applied. However it ends, nothing is being fetched afterwards.

use super::context::Context;
use super::session::{LOGIN, QUERY, Server, Session, Trouble};
use super::status::{IoThread, Status};
use super::{clients, follow, tasks};
use mmm_common::config::Host;
use mmm_common::gtid::Gtids;
use mmm_common::ids::HostName;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// Between two looks.
const POLL: Duration = Duration::from_millis(5);
/// How long the I/O thread may go on trying after an error.
const CONNECT: Duration = Duration::from_secs(3);
/// How long ending it may take when the time is over.
const END: Duration = Duration::from_secs(3);

pub(super) async fn fetch(
    context: &Context,
    from: &HostName,
    position: &Gtids,
    limit: Duration,
) -> Result<Option<Gtids>, String> {
    let at = |why: String| format!("fetching from {from} at {}: {why}", context.server.place);
    let Some(host) = context.config.cluster.hosts.get(from) else {
        return Err(at(format!("[host.{from}] is not in the configuration")));
    };
    if *from == context.config.this {
        return Err(at("a host cannot replicate from itself".to_owned()));
    }
    let deadline = Instant::now() + limit;
    let _alone = context.alone(limit).await.map_err(at)?;
    let mut session = context.take(&context.task).await.map_err(|e| at(format!("no login: {e}")))?;
    let id = session.id;
    let rest = deadline.saturating_duration_since(Instant::now());
    let mut begun = false;
    let result = match timeout(rest, run(&mut session, from, host, position, deadline, &mut begun)).await {
        Ok(result) => result,
        Err(_) => Err(format!("not done within {} ms", limit.as_millis())),
    };
    let result = match result {
        Err(why) if begun => match end(context, id).await {
            Ok(()) => Err(why),
            Err(also) => Err(format!("{why}; and the I/O thread could not be stopped: {also}")),
        },
        result => result,
    };
    context.task.put(session);
    result.map_err(at)
}

/// `begun`: the I/O thread may be running.
async fn run(
    session: &mut Session,
    from: &HostName,
    host: &Host,
    position: &Gtids,
    deadline: Instant,
    begun: &mut bool,
) -> Result<Option<Gtids>, String> {
    let text = |e: Trouble| e.to_string();
    // Fails where something received cannot be applied, and does nothing after a drain.
    let executed = tasks::drained(session, deadline).await?;
    let Some(executed) = executed else {
        return Err(session.vitals().await.map_err(text)?.no_gtids.unwrap_or_default());
    };
    match executed.missing(position) {
        Some(0) => return Ok(Some(executed)),
        Some(_) => can_serve(from, host).await?,
        None => return Err("the position is of the other dialect".to_owned()),
    }
    *begun = true;
    let rest = deadline.saturating_duration_since(Instant::now());
    follow::change(session, host, rest).await?;
    until_applied(session, host, position, deadline).await?;
    tasks::stop_fetching(session, deadline).await.map_err(|e| format!("I/O thread not stopped: {e}"))?;
    // It may have had more than was asked for.
    tasks::drained(session, deadline).await
}

/// A replica serves only what is in its binary log.
async fn can_serve(from: &HostName, host: &Host) -> Result<(), String> {
    let server = Server::source(from.as_str(), host);
    let refused = |e: Trouble| format!("{} does not let the replication user in: {e}", server.place);
    let mut session = server.connect(LOGIN).await.map_err(refused)?;
    let words = [
        "SELECT @@GLOBAL.log_bin AS log_bin, @@GLOBAL.log_slave_updates AS updates",
        "SELECT @@GLOBAL.log_bin AS log_bin, @@GLOBAL.log_replica_updates AS updates",
    ];
    let rows = session.rows_of(QUERY, &words).await.map_err(|e| format!("{} cannot be asked: {e}", server.place))?;
    for name in ["log_bin", "updates"] {
        if rows.iter().any(|r| r.text(&[name]) != Ok("1")) {
            return Err(format!(
                "{} cannot serve what it has: it needs log_bin and log_slave_updates (log_replica_updates)",
                server.place
            ));
        }
    }
    Ok(())
}

async fn until_applied(session: &mut Session, host: &Host, position: &Gtids, deadline: Instant) -> Result<(), String> {
    let text = |e: Trouble| e.to_string();
    let mut trying_since: Option<Instant> = None;
    loop {
        let (_, missing) = tasks::missing(session.vitals().await.map_err(text)?, position)?;
        if missing == 0 {
            return Ok(());
        }
        let rest = format!("{missing} transactions missing of {position}");
        let Some(s) = session.status().await.map_err(text)?.filter(|s| follow::is_source(s, host)) else {
            return Err(format!("{rest}; replication was pointed elsewhere meanwhile"));
        };
        if !s.sql && (!s.sql_error.is_empty() || s.io == IoThread::Stopped) {
            return Err(format!("{rest}; the SQL thread has stopped: {}", s.why_sql_stopped()));
        }
        trying_since = if s.io == IoThread::Running { None } else { trying_since.or(Some(Instant::now())) };
        let trying = trying_since.map(|since| since.elapsed()).unwrap_or_default();
        if !s.io_error.is_empty() && (s.io == IoThread::Stopped || trying >= CONNECT) {
            return Err(format!("{rest}; nothing more comes: {}", s.io_error));
        }
        if Instant::now() >= deadline {
            return Err(format!("{rest} when the time was over ({})", doing(&s)));
        }
        sleep(POLL).await;
    }
}

fn doing(s: &Status) -> String {
    format!("I/O thread: {:?}, SQL thread: {}", s.io, if s.sql { "running" } else { "stopped" })
}

/// Ends what a given-up statement of `id` may still be about to do, and stops the I/O thread.
async fn end(context: &Context, id: u32) -> Result<(), String> {
    let text = |e: Trouble| e.to_string();
    let mut session = context.server.connect(LOGIN).await.map_err(text)?;
    let until = Instant::now() + END;
    loop {
        let all = clients::all(&mut session).await.map_err(text)?;
        // Idle: whatever it was asked has ended.
        if !all.iter().any(|c| c.id == id && c.busy()) {
            break;
        }
        clients::kill(&mut session, id).await.map_err(text)?;
        if Instant::now() >= until {
            return Err("its statement does not end".to_owned());
        }
        sleep(POLL).await;
    }
    tasks::stop_fetching(&mut session, until).await.map_err(text)?;
    match session.status().await.map_err(text)? {
        Some(s) if s.io != IoThread::Stopped => Err("it reads back as running".to_owned()),
        Some(_) | None => Ok(()),
    }
}

//! The planned move's step at the old master (data-safety.md, step 2): no acknowledged commit may be missing in the
//! position that this reports.
//!
//! It never makes the server writable, however it ends: by then another may be the writer. After a failure the monitor
//! orders it open again, if it may be.

use super::clients::{self, Client, LIST_AGE};
use super::context::Context;
use super::read_only;
use super::session::{Session, Trouble};
use mmm_common::position::{LogPosition, Position};
use mmm_common::report::Writing;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::{Instant, sleep};

pub(super) async fn run(context: &Context, grace: Duration, limit: Duration) -> Result<Option<Position>, String> {
    let deadline = Instant::now() + limit;
    let at = |what: &str, e: &Trouble| format!("quiesce at {}: {what}: {e}", context.server.place);
    let mut session = context.take(&context.task).await.map_err(|e| at("no login", &e))?;
    refuse_prepared(context, &mut session).await?;
    let before = session.vitals().await.map_err(|e| at("its state could not be read", &e))?.writing;

    if before == Writing::Allowed {
        // At least half of the time is left for what has to be done.
        quiet_moment(context, &mut session, grace.min(limit / 2))
            .await
            .map_err(|e| at("its transactions could not be read", &e))?;
    }
    read_only::on(context, deadline.saturating_duration_since(Instant::now())).await?;
    let position = close_and_read(context, &mut session, deadline)
        .await
        .map_err(|why| format!("{why} (read_only was switched on before that)"))?;
    context.task.put(session);
    Ok(position)
}

/// A prepared XA transaction outlives its session and can be committed by nobody but its manager: a move would lose it.
async fn refuse_prepared(context: &Context, session: &mut Session) -> Result<(), String> {
    match session.rows(super::session::QUERY, "XA RECOVER").await {
        Ok(rows) if rows.is_empty() => Ok(()),
        Ok(rows) => {
            let names: Vec<&str> = rows.iter().filter_map(|r| r.text(&["data"]).ok()).collect();
            Err(format!(
                "quiesce at {}: prepared XA transactions wait for XA COMMIT or XA ROLLBACK there: {}",
                context.server.place,
                names.join(", ")
            ))
        }
        Err(e) if e.is_answer() => {
            tracing::warn!(%e, "prepared XA transactions could not be looked for (MySQL: grant XA_RECOVER_ADMIN)");
            Ok(())
        }
        Err(e) => Err(format!("quiesce at {}: XA RECOVER: {e}", context.server.place)),
    }
}

/// Waits for a moment without open write transactions or long statements; none in time is no error.
async fn quiet_moment(context: &Context, session: &mut Session, grace: Duration) -> Result<(), Trouble> {
    let until = Instant::now() + grace;
    loop {
        let open = clients::transactions(session).await?.values().any(|changed| *changed > 0)
            || clients::ordinary(session, &context.config).await?.iter().any(Client::is_long);
        if !open || Instant::now() + LIST_AGE > until {
            return Ok(());
        }
        sleep(LIST_AGE).await;
    }
}

/// The server is read-only: what could still write or hang is closed, and the position is read until it stands still.
async fn close_and_read(
    context: &Context,
    session: &mut Session,
    deadline: Instant,
) -> Result<Option<Position>, String> {
    let at = |what: &str, e: &Trouble| format!("quiesce at {}: {what}: {e}", context.server.place);
    close_clients(context, session, deadline).await.map_err(|e| at("sessions could not be closed", &e))?;
    let mut last = position(context, session).await.map_err(|e| at("position could not be read", &e))?;
    loop {
        sleep(Duration::from_millis(2)).await;
        let now = position(context, session).await.map_err(|e| at("position could not be read", &e))?;
        if now.0 != Writing::ReadOnly {
            return Err(format!("quiesce at {}: somebody switched read_only off", context.server.place));
        }
        if now == last {
            return Ok(now.1);
        }
        if Instant::now() >= deadline {
            return Err(format!("quiesce at {}: its position does not stand still", context.server.place));
        }
        last = now;
    }
}

/// By GTID, or else in its own binary log.
async fn position(context: &Context, session: &mut Session) -> Result<(Writing, Option<Position>), Trouble> {
    let vitals = session.vitals().await?;
    let position = match vitals.executed {
        Some(gtids) => Some(Position::Gtids(gtids)),
        None => {
            let end = session.log_end().await?;
            end.map(|place| Position::Log(LogPosition { host: context.config.this.clone(), place }))
        }
    };
    Ok((vitals.writing, position))
}

async fn close_clients(context: &Context, session: &mut Session, deadline: Instant) -> Result<(), Trouble> {
    let privileged = match clients::privileged(session).await {
        Ok(users) => users,
        Err(e) if e.is_answer() => BTreeSet::new(),
        Err(e) => return Err(e),
    };
    let transactions = clients::transactions(session).await?;
    let present = clients::ordinary(session, &context.config).await?;
    let mut go = on_writer(context, &present).await;
    go.extend(present.iter().map(|c| c.id).filter(|id| transactions.get(id).is_some_and(|changed| *changed > 0)));
    let mut told = false;
    loop {
        // Who comes in now finds the server read-only and has written nothing: waiting for a moment without such
        // clients would wait for ever. Only who may write in spite of read_only is closed, whenever it came.
        let all = clients::ordinary(session, &context.config).await?;
        go.extend(all.iter().filter(|c| privileged.contains(&c.user)).map(|c| c.id));
        go.retain(|id| all.iter().any(|c| c.id == *id));
        if go.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(Trouble::Strange { why: format!("{} sessions did not end after KILL", go.len()) });
        }
        if !std::mem::replace(&mut told, true) {
            let names: Vec<String> =
                all.iter().filter(|c| go.contains(&c.id)).map(|c| format!("{}@{}", c.user, c.host)).collect();
            tracing::info!(sessions = names.join(", "), "closing sessions for the move");
        }
        let mut spared = Vec::new();
        for id in &go {
            match clients::kill(session, *id).await {
                Ok(()) => {}
                // Not ours to kill (1095: a user with SYSTEM_USER); read_only holds it.
                Err(Trouble::Refused { code: 1095, message }) => {
                    tracing::warn!(message, "a session could not be closed");
                    spared.push(*id);
                }
                Err(e) => return Err(e),
            }
        }
        if spared.len() == go.len() {
            return Ok(());
        }
        sleep(Duration::from_millis(2)).await;
    }
}

/// Sessions that came in by an address of the writer role, idle or not.
async fn on_writer(context: &Context, all: &[Client]) -> BTreeSet<u32> {
    let cluster = &context.config.cluster;
    let (Some(writer), Some(this)) = (cluster.writer(), cluster.hosts.get(&context.config.this)) else {
        return BTreeSet::new();
    };
    let ips: Vec<IpAddr> = writer.ips.iter().map(IpAddr::to_canonical).collect();
    let port = this.mysql_port;
    // The kernel's tables of a busy machine are long, and addresses wait for nobody's reading them.
    let read = tokio::task::spawn_blocking(move || clients::far_ends(&ips, port)).await;
    match read.unwrap_or_else(|e| Err(std::io::Error::other(e))) {
        Ok(ends) => clients::on_addresses(all, &ends).into_iter().map(|c| c.id).collect(),
        Err(e) => {
            tracing::warn!(%e, "sessions on the writer's address could not be looked up in /proc/self/net");
            BTreeSet::new()
        }
    }
}

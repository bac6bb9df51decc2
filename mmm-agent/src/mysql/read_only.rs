//! read_only on and off, and read back.
//!
//! Switching it on waits for running updates, LOCK TABLES and commits that wait for a semi-sync acknowledgement. So from
//! 50 ms on, a second login kills what holds it up: first running writes, then open transactions, then everybody (LOCK
//! TABLES shows in no list). Without a second login (too many connections) the first one does it by turns. It must never
//! be said to be on when it is not.

use super::clients::{self, Client, LIST_AGE};
use super::context::Context;
use super::dialect::Dialect;
use super::semisync;
use super::session::{Session, Trouble};
use crate::clock;
use mmm_common::ids::Millis;
use mmm_common::report::Writing;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

/// The step fails within this.
pub(super) const LIMIT: Duration = Duration::from_secs(3);

/// How long a blocked `SET` waits before somebody is killed, and between the rounds.
const PATIENCE: Duration = Duration::from_millis(50);
/// So many rounds that found nobody to kill, and everybody is killed.
const IN_VAIN: u32 = 2;
/// From this round on at the latest.
const EVERYBODY_FROM: u32 = 12;

/// Who is killed in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    Writing,
    InTransaction,
    Everybody,
}

/// Within `limit`; the error says what was tried and found.
pub(super) async fn on(context: &Context, limit: Duration) -> Result<(), String> {
    let deadline = Instant::now() + limit;
    let at = |what: &str, e: &Trouble| format!("read_only=1 at {}: {what}: {e}", context.server.place);
    context.end_given_up().await.map_err(|e| at("an earlier change of read_only does not end", &e))?;
    let mut setter = context.take(&context.fence).await.map_err(|e| at("no login", &e))?;
    if setter.vitals().await.map_err(|e| at("could not be read", &e))?.writing == Writing::ReadOnly {
        context.fence.put(setter);
        return Ok(());
    }
    let done = Notify::new();
    let setter_id = setter.id;
    let set = async {
        let answer = set_on(context, &mut setter, deadline).await;
        done.notify_one();
        answer
    };
    let (answer, killed) = tokio::join!(set, clear_the_way(context, setter_id, &done, deadline));
    if !killed.is_empty() {
        tracing::warn!(sessions = killed.join(", "), "killed to make the server read-only");
    }
    if let Err(e) = answer {
        let given_up = context.end_given_up().await;
        let still = if given_up.is_err() { "; the statement may still be waiting there" } else { "" };
        return Err(format!("{}{still}", at("not done", &e)));
    }
    let now = setter.vitals().await.map_err(|e| at("could not be read back", &e))?.writing;
    context.fence.put(setter);
    match now {
        Writing::ReadOnly => Ok(()),
        Writing::Allowed | Writing::Unknown => {
            Err(format!("read_only=1 at {}: set without an error, but it reads back as off", context.server.place))
        }
    }
}

async fn set_on(context: &Context, setter: &mut Session, deadline: Instant) -> Result<(), Trouble> {
    let sql = setter.dialect.words().read_only_on;
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        match context.set(setter, rest, sql).await {
            // Lock wait timeout (1 s in our sessions): what held it up may be killed by now.
            Err(Trouble::Refused { code: 1205, .. }) if Instant::now() < deadline => {
                let id = setter.id;
                let killed = kill_round(context, setter, id, Reach::Everybody).await?.killed;
                if !killed.is_empty() {
                    tracing::warn!(sessions = killed.join(", "), "killed to make the server read-only");
                }
            }
            answer => return answer,
        }
    }
}

/// Kills what holds the `SET` up, until it is done. Gives back whom.
async fn clear_the_way(context: &Context, setter: u32, done: &Notify, deadline: Instant) -> Vec<String> {
    let mut killed = Vec::new();
    let mut killer = None;
    let mut in_vain = 0;
    for round in 1u32.. {
        let answered = timeout(PATIENCE, done.notified()).await.is_ok();
        if answered || Instant::now() >= deadline {
            break;
        }
        let mut session = match killer.take() {
            Some(session) => session,
            None => match context.take(&context.killer).await {
                Ok(session) => session,
                Err(e) => {
                    tracing::warn!(%e, "no login to look for what holds up read_only");
                    continue;
                }
            },
        };
        let reach = match round {
            1 => Reach::Writing,
            _ if in_vain >= IN_VAIN || round >= EVERYBODY_FROM => Reach::Everybody,
            _ => Reach::InTransaction,
        };
        match kill_round(context, &mut session, setter, reach).await {
            Ok(now) => {
                in_vain = if now.found || reach == Reach::Writing { 0 } else { in_vain + 1 };
                killed.extend(now.killed);
            }
            Err(e) => tracing::warn!(%e, "what holds up read_only could not be killed"),
        }
        killer = Some(session).filter(Session::usable);
    }
    if let Some(session) = killer {
        context.killer.put(session);
    }
    killed
}

/// Who was killed, and whether anything was found that may hold read_only up.
struct Round {
    killed: Vec<String>,
    found: bool,
}

async fn kill_round(context: &Context, session: &mut Session, setter: u32, reach: Reach) -> Result<Round, Trouble> {
    let mut found = session.dialect == Dialect::MySql && release_killed(context, session, setter).await?;
    let transactions =
        if reach >= Reach::InTransaction { clients::transactions(session).await? } else { Default::default() };
    let mut killed = Vec::new();
    for client in clients::ordinary(session, &context.config).await? {
        let in_the_way = client.busy() && !client.only_reads() || transactions.contains_key(&client.id);
        found |= in_the_way;
        if in_the_way || reach == Reach::Everybody {
            match clients::kill(session, client.id).await {
                Ok(()) => killed.push(format!("{}@{} ({})", client.user, client.host, client.id)),
                Err(e) if e.is_answer() => tracing::warn!(user = client.user, %e, "session could not be killed"),
                Err(e) => return Err(e),
            }
        }
    }
    Ok(Round { killed, found })
}

/// MySQL: a commit that waits for an acknowledgement goes on doing so when its session is killed. It is let go once
/// nobody is left to be told that it is done, and nobody else can commit before read_only is on.
///
/// True: there are commits that wait.
async fn release_killed(context: &Context, session: &mut Session, setter: u32) -> Result<bool, Trouble> {
    let all = clients::all(session).await?;
    let queues = |c: &Client| c.id == setter && (c.waits_for_commits() || c.waits_for_writes());
    let waits = all.iter().any(Client::waits_for_ack);
    if !waits || !all.iter().any(queues) {
        return Ok(waits);
    }
    // The list of transactions must be younger than the wait.
    sleep(LIST_AGE).await;
    let open = clients::transactions(session).await?;
    let present = clients::ordinary(session, &context.config).await?;
    let nobody_else =
        present.iter().all(|c| c.killed() || (!open.contains_key(&c.id) && (!c.busy() || c.only_reads())));
    if nobody_else && clients::all(session).await?.iter().any(queues) {
        tracing::warn!("semi-sync's source side is switched off: killed sessions wait for an acknowledgement");
        semisync::release(session).await?;
    }
    Ok(true)
}

/// read_only off, and super_read_only with it. Not begun after `until`, the end of the lease.
pub(super) async fn off(context: &Context, until: Millis) -> Result<(), String> {
    let at = |what: &str, e: &Trouble| format!("read_only=0 at {}: {what}: {e}", context.server.place);
    context.end_given_up().await.map_err(|e| at("an earlier change of read_only does not end", &e))?;
    let mut session = context.take(&context.fence).await.map_err(|e| at("no login", &e))?;
    let sql = session.dialect.words().read_only_off;
    let rest = until.since(clock::now()).min(LIMIT / 3);
    if rest.is_zero() {
        context.fence.put(session);
        return Err(format!("read_only=0 at {}: not begun, the lease has ended", context.server.place));
    }
    if let Err(e) = context.set(&mut session, rest, sql).await {
        // Were it done later after all, it would undo a fence.
        if context.end_given_up().await.is_err() {
            return Err(format!("{}; the statement may still be waiting there", at("not done", &e)));
        }
        return Err(at("not done", &e));
    }
    let row = session.vitals().await.map_err(|e| at("could not be read back", &e))?;
    context.fence.put(session);
    match row.writing {
        Writing::Allowed => Ok(()),
        Writing::ReadOnly | Writing::Unknown => {
            Err(format!("read_only=0 at {}: set without an error, but it reads back as on", context.server.place))
        }
    }
}

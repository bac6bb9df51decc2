//! What every step works with: the server, logins that are kept open, and the way to ask for a fresh look.
//!
//! Logins are kept because a saturated server lets nobody new in: what fences it must be in already. When it has room for
//! a single one, that is handed from whoever has it to whoever needs it: fencing, then looking, then the rest.

use super::clients;
use super::session::{LOGIN, Server, Session, Trouble};
use super::watch::Watch;
use mmm_common::config;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::OwnedMutexGuard;
use tokio::time::{Instant, sleep, timeout};

/// How long a kept login may take to show that it still works.
const STILL_THERE: Duration = Duration::from_millis(500);
/// How long a statement that was given up may take to end after its session was killed.
const END_OF_KILLED: Duration = Duration::from_millis(800);

/// How long a step waits for a task that decides over the I/O thread. Not for its end: a Writable may be next in line.
pub(super) const ALONE: Duration = Duration::from_secs(2);

pub(super) struct Context {
    pub(super) server: Server,
    pub(super) config: Arc<config::Agent>,
    pub(super) watch: Watch,
    /// Sets read_only.
    pub(super) fence: Kept,
    /// Looks for what holds that up, and kills it.
    pub(super) killer: Kept,
    /// Follow, Detach, SemiSync.
    pub(super) lane: Kept,
    /// CatchUp, Drain, Fetch, Quiesce.
    pub(super) task: Kept,
    /// Whoever starts the I/O thread again, or wants it to stay stopped.
    fetching: Arc<tokio::sync::Mutex<()>>,
    /// How many drains and fetches have begun: what was asked for before one must not start the I/O thread after it.
    finals: AtomicU64,
    /// A STOP goes on that perhaps no drain waits for any more.
    stopping: Arc<AtomicBool>,
    /// Sessions with a `SET GLOBAL read_only` under way. One that was given up stays here until it is known to be gone,
    /// for else it could still take effect after a later statement.
    setting: Mutex<BTreeSet<u32>>,
}

/// The right to start and stop the I/O thread, and to change the source.
pub(super) type Alone = OwnedMutexGuard<()>;

/// See [`Context::ending`].
pub(super) struct Ending {
    alone: Option<Alone>,
    stopping: Arc<AtomicBool>,
}

impl Ending {
    pub(super) fn ended(mut self) -> Option<Alone> {
        self.alone.take()
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.stopping.store(false, Ordering::SeqCst);
    }
}

fn under_way(limit: Duration) -> String {
    format!("not begun within {} ms: another change of its replication is under way", limit.as_millis())
}

impl Context {
    pub(super) fn new(server: Server, config: Arc<config::Agent>, watch: Watch, logins: Logins) -> Context {
        let [fence, killer, lane, task] = logins.0;
        Context {
            server,
            config,
            watch,
            fence,
            killer,
            lane,
            task,
            fetching: Arc::default(),
            finals: AtomicU64::new(0),
            stopping: Arc::default(),
            setting: Mutex::default(),
        }
    }

    /// Opens the logins that a failover needs, where they are not open or have ended (the server ends idle ones). One that
    /// gets no answer is the last of this round: login after login given up makes a server block the host (error 1129).
    pub(super) async fn keep_open(&self) {
        for kept in [&self.fence, &self.killer, &self.lane, &self.task] {
            let still = match kept.take() {
                Some(mut session) => session.ping(STILL_THERE).await.is_ok().then_some(session),
                None => None,
            };
            let session = match still {
                Some(session) => Ok(session),
                None => self.server.connect(LOGIN).await,
            };
            match session {
                Ok(session) => kept.put_if_empty(session),
                Err(Trouble::Late { .. }) => return,
                Err(_) => {}
            }
        }
    }

    /// Until it is dropped, nobody else starts or stops the I/O thread, or changes the source. For a drain or a fetch.
    pub(super) async fn alone(&self, limit: Duration) -> Result<Alone, String> {
        self.finals.fetch_add(1, Ordering::SeqCst);
        timeout(limit, Arc::clone(&self.fetching).lock_owned()).await.map_err(|_| under_way(limit))
    }

    /// The same for a step of the lane, which is tried again later: it is not done after a drain that began since, and it
    /// does not hold up other steps while the I/O thread is only ending.
    pub(super) async fn alone_for_step(&self, limit: Duration) -> Result<Alone, String> {
        if self.stopping.load(Ordering::SeqCst) {
            return Err("the I/O thread is still ending its connection to the old master".to_owned());
        }
        let before = self.finals.load(Ordering::SeqCst);
        let alone = timeout(limit, Arc::clone(&self.fetching).lock_owned()).await.map_err(|_| under_way(limit))?;
        match self.finals.load(Ordering::SeqCst) == before {
            true => Ok(alone),
            false => Err("a drain or a fetch has begun since".to_owned()),
        }
    }

    /// To be kept for as long as a STOP of the I/O thread goes on, whether or not a drain still waits for it.
    pub(super) fn ending(&self, alone: Alone) -> Ending {
        self.stopping.store(true, Ordering::SeqCst);
        Ending { alone: Some(alone), stopping: Arc::clone(&self.stopping) }
    }

    pub(super) async fn take(&self, kept: &Kept) -> Result<Session, Trouble> {
        if let Some(mut session) = kept.take()
            && session.ping(STILL_THERE).await.is_ok()
        {
            return Ok(session);
        }
        let full = match self.server.connect(LOGIN).await {
            Err(e) if e.is_full() => e,
            answer => return answer,
        };
        for other in [&self.task, &self.lane, &self.killer] {
            if let Some(mut session) = other.take()
                && session.ping(STILL_THERE).await.is_ok()
            {
                return Ok(session);
            }
        }
        // The watcher goes without for as long as fencing takes, and for nothing else.
        if kept.is(&self.fence)
            && let Some(session) = self.watch.lend().await
        {
            tracing::warn!(place = self.server.place, "{full}: the watcher's login is used for fencing");
            return Ok(session);
        }
        Err(full)
    }

    /// Runs a statement that changes read_only, so that it cannot outlive its being given up unnoticed.
    pub(super) async fn set(&self, session: &mut Session, limit: Duration, sql: &[&str]) -> Result<(), Trouble> {
        self.setting().insert(session.id);
        let answer = session.run_of(limit, sql).await;
        // Answered: it has ended. Dropped or late: it stays in the list.
        if session.usable() {
            self.setting().remove(&session.id);
        }
        answer
    }

    /// Kills what was given up while it changed read_only, and waits until it is gone.
    pub(super) async fn end_given_up(&self) -> Result<(), Trouble> {
        let left: BTreeSet<u32> = self.setting().clone();
        if left.is_empty() {
            return Ok(());
        }
        let mut killer = self.take(&self.killer).await?;
        let deadline = Instant::now() + END_OF_KILLED;
        loop {
            let mut still = false;
            for client in clients::all(&mut killer).await? {
                if left.contains(&client.id) {
                    still = true;
                    clients::kill(&mut killer, client.id).await?;
                }
            }
            if !still {
                break;
            }
            if Instant::now() >= deadline {
                return Err(Trouble::Late { limit: END_OF_KILLED });
            }
            sleep(Duration::from_millis(2)).await;
        }
        self.killer.put(killer);
        self.setting().retain(|id| !left.contains(id));
        Ok(())
    }

    fn setting(&self) -> std::sync::MutexGuard<'_, BTreeSet<u32>> {
        self.setting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kept logins, as the watcher sees them.
#[derive(Clone, Default)]
pub(super) struct Logins([Kept; 4]);

impl Logins {
    /// One that is not in use now, for who cannot get in otherwise.
    pub(super) fn any(&self) -> Option<Session> {
        self.0.iter().rev().find_map(Kept::take)
    }
}

/// A login kept between uses.
#[derive(Clone, Default)]
pub(super) struct Kept(Arc<Mutex<Option<Session>>>);

impl Kept {
    fn is(&self, other: &Kept) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    fn put_if_empty(&self, session: Session) {
        self.slot().get_or_insert(session);
    }

    fn take(&self) -> Option<Session> {
        self.slot().take()
    }

    /// For the next use, unless it has been late or lost.
    pub(super) fn put(&self, session: Session) {
        if session.usable() {
            *self.slot() = Some(session);
        }
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Session>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

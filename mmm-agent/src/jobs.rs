//! Long work on this host's data: saving, undoing and copying (data-safety.md, "When the old master comes back").
//!
//! Jobs run beside everything else, never in the line of the steps: what fences must not wait for them. One at a time. A
//! job ends with a `Done` or a `Failed` that says what state things are in; it never goes on after a restart of the agent.

mod binlog;
mod donor;
mod extras;
mod helper;
mod progress;
mod reclone;
mod sql;
#[cfg(test)]
mod tests;
mod tool;
mod undo;

pub(crate) use donor::Donor;
pub(crate) use helper::Helper;

use binlog::Wanted;
use mmm_agent_core::io::{Input, Step};
use mmm_common::config::Agent as Config;
use mmm_common::epoch::Epoch;
use mmm_common::gtid::Gtids;
use mmm_common::order::{Job, JobWork};
use mmm_common::report::{Extras, JobState};
use mmm_helper::Verb;
use progress::Progress;
use sql::Session;
use std::future::Future;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;
use tool::Cancelled;

/// For a process to end that is killed; one that waits for a disk may not.
const KILL: Duration = Duration::from_secs(10);

/// Asks the kernel which role addresses are on this host.
pub(crate) type Present =
    Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Vec<IpAddr>, String>> + Send>> + Send + Sync>;

pub(crate) struct Jobs {
    config: Arc<Config>,
    inputs: UnboundedSender<Input>,
    present: Present,
    running: Mutex<Option<Running>>,
}

struct Running {
    job: Job,
    task: JoinHandle<()>,
    cancelled: Cancelled,
}

/// What a job works with.
struct Work {
    id: Epoch,
    config: Arc<Config>,
    present: Present,
    progress: Progress,
    cancelled: Cancelled,
}

impl Jobs {
    pub(crate) fn new(config: Arc<Config>, present: Present, inputs: UnboundedSender<Input>) -> Jobs {
        tool::clear(&state_folder(&config));
        extras::clear(&state_folder(&config));
        Jobs { config, inputs, present, running: Mutex::default() }
    }

    /// Begins at once and never waits. How it goes comes as `Input::Job`.
    pub(crate) fn begin(&self, job: Job) {
        let progress = Progress::new(job.id, self.inputs.clone());
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = running.take_if(|r| !r.task.is_finished()) {
            if !matches!(old.job.work, JobWork::Save { .. }) {
                let why = format!("job {} is still under way on this host; it cannot be interrupted", old.job.id);
                progress.state(JobState::Failed { why });
                *running = Some(old);
                return;
            }
            // Reading can be broken off at any time.
            old.cancelled.cancel();
            old.task.abort();
            let why = format!("job {} came instead", job.id);
            Progress::new(old.job.id, self.inputs.clone()).state(JobState::Failed { why });
        }
        let cancelled = Cancelled::default();
        let work = Work {
            id: job.id,
            config: Arc::clone(&self.config),
            present: Arc::clone(&self.present),
            progress,
            cancelled: cancelled.clone(),
        };
        let what = job.work.clone();
        let task = tokio::spawn(async move {
            let state = match work.carry_out(what).await {
                Ok(extras) => JobState::Done { extras },
                Err(why) => JobState::Failed { why },
            };
            work.progress.state(state);
        });
        *running = Some(Running { job, task, cancelled });
    }
}

/// Has mmm_helperd kill the server; the answer comes as `Input::Done`.
pub(crate) fn kill_server(config: &Config, inputs: UnboundedSender<Input>) {
    let helper = Helper::of(config);
    tokio::spawn(async move {
        let result = helper.tell(Verb::Kill, KILL).await;
        // Nobody is left to be told when the agent ends.
        let _ended = inputs.send(Input::Done { step: Step::KillServer, result });
    });
}

/// What reads binary logs is told to end: the process could not end before it.
impl Drop for Jobs {
    fn drop(&mut self) {
        if let Some(running) = self.running.get_mut().unwrap_or_else(PoisonError::into_inner) {
            running.cancelled.cancel();
            running.task.abort();
        }
    }
}

fn state_folder(config: &Config) -> PathBuf {
    config.state_path.parent().unwrap_or(Path::new("/")).to_owned()
}

impl Work {
    async fn carry_out(&self, work: JobWork) -> Result<Option<Extras>, String> {
        match work {
            JobWork::Save { having, lacking } => {
                let wanted = Wanted { having, lacking };
                let mut session = Session::own(&self.config).await.map_err(|e| format!("no login: {e}"))?;
                let saved = extras::save(self, &mut session, &wanted).await?;
                Ok(Some(saved.map_or_else(|| nothing(&wanted), |saved| saved.extras)))
            }
            JobWork::Undo { having, lacking } => undo::undo(self, &Wanted { having, lacking }).await.map(|()| None),
            JobWork::Reclone { from } => reclone::reclone(self, &from).await.map(|()| None),
        }
    }

    /// Data that somebody may be using are left alone.
    async fn must_be_idle(&self, session: &mut Session) -> Result<(), String> {
        self.no_addresses().await?;
        match session.is_read_only().await {
            Ok(true) => Ok(()),
            Ok(false) => Err("the server is writable (read_only is off); its data are left alone".to_owned()),
            Err(e) => Err(format!("it cannot be found out whether the server is read-only: {e}")),
        }
    }

    async fn no_addresses(&self) -> Result<(), String> {
        match (self.present)().await {
            Ok(addresses) if addresses.is_empty() => Ok(()),
            Ok(addresses) => Err(format!("this host has the role addresses {addresses:?}; its data are left alone")),
            Err(e) => Err(format!("it cannot be found out which role addresses this host has: {e}")),
        }
    }
}

fn nothing(wanted: &Wanted) -> Extras {
    let gtids = match wanted.lacking {
        Gtids::MariaDb(_) => Gtids::MariaDb(Default::default()),
        Gtids::MySql(_) => Gtids::MySql(Default::default()),
    };
    Extras { gtids, transactions: 0, list: vec![], saved: String::new() }
}

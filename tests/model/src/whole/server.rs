//! A database server of layer B: read_only, replication positions, and the agent's steps on it, which take no time.
//!
//! Positions move only as far as a decision can depend on them: a client's write is not repeated while it is everywhere.

use super::HANG;
use super::config::place;
use mmm_agent_core::io::{Input as AgentInput, Step};
use mmm_common::gtid::Gtids;
use mmm_common::order::{Task, Work};
use mmm_common::report::{Life, ReplicationReport, ServerReport, TaskOutcome, Writing};
use std::collections::BTreeMap;
use std::net::IpAddr;

type Positions = BTreeMap<usize, u64>;

#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) up: bool,
    pub(crate) hung_since: Option<u64>,
    pub(crate) read_only: bool,
    /// Highest number per server.
    pub(crate) executed: Positions,
    pub(crate) received: Positions,
    pub(crate) source: usize,
    pub(crate) io: bool,
    pub(crate) sql: bool,
    pub(crate) task: Option<Task>,
    pub(crate) task_until: u64,
    /// Clients have written since it was opened.
    pub(crate) written: bool,
    /// Clients have written something that somebody could not fetch.
    pub(crate) ahead: bool,
}

impl Server {
    pub(crate) fn new(source: usize) -> Server {
        Server {
            up: true,
            hung_since: None,
            read_only: true,
            executed: BTreeMap::new(),
            received: BTreeMap::new(),
            source,
            io: true,
            sql: true,
            task: None,
            task_until: 0,
            written: false,
            ahead: false,
        }
    }

    pub(crate) fn answers(&self) -> bool {
        self.up && self.hung_since.is_none()
    }

    pub(crate) fn kill(&mut self) {
        self.up = false;
        self.hung_since = None;
        self.task = None;
    }

    pub(crate) fn hang(&mut self, now: u64) {
        self.hung_since = Some(now);
    }

    /// It answers again: started, or going on.
    pub(crate) fn restore(&mut self) {
        if self.hung_since.take().is_none() {
            self.restart();
        }
    }

    pub(crate) fn restart(&mut self) {
        self.up = true;
        self.hung_since = None;
        self.read_only = true;
        self.received = self.executed.clone();
        (self.io, self.sql) = (true, true);
        self.task = None;
    }

    /// When its agent's watcher or worker has something to say by time alone.
    pub(crate) fn due(&self, now: u64) -> impl Iterator<Item = u64> {
        let hang = self.hung_since.map(|since| since + HANG);
        let task = self.task.as_ref().map(|_| self.task_until);
        hang.into_iter().chain(task).filter(move |at| *at > now)
    }

    pub(crate) fn written_by_clients(&mut self, id: usize, somebody_is_behind: bool) {
        if self.read_only {
            (self.written, self.ahead) = (false, false);
            return;
        }
        if !self.written || (somebody_is_behind && !self.ahead) {
            // As MariaDB numbers within a domain: above everything that is there.
            let number = self.executed.values().max().copied().unwrap_or(0) + 1;
            self.executed.insert(id, number);
        }
        (self.written, self.ahead) = (true, somebody_is_behind);
    }

    pub(crate) fn replicate(&mut self, source: Option<&Positions>) {
        if !self.answers() {
            return;
        }
        if let Some(there) = source.filter(|_| self.io) {
            for (id, n) in there {
                let mine = self.received.entry(*id).or_insert(0);
                *mine = (*mine).max(*n);
            }
        }
        if self.sql {
            for (id, n) in &self.received {
                let mine = self.executed.entry(*id).or_insert(0);
                *mine = (*mine).max(*n);
            }
        }
    }

    pub(crate) fn carry_out(&mut self, step: &Step, source: Option<usize>, now: u64) -> Result<(), String> {
        if !self.answers() {
            return Err("the server does not answer".to_owned());
        }
        match step {
            Step::ReadOnly => self.read_only = true,
            Step::Writable { until } => {
                if until.0 <= now {
                    return Err("too late".to_owned());
                }
                self.read_only = false;
            }
            Step::Follow { .. } => {
                self.source = source.unwrap_or(self.source);
                (self.io, self.sql) = (true, true);
            }
            Step::Detach => self.io = false,
            // Without disagreements there is nothing to work on, and nobody is asked to acknowledge.
            Step::Task(_)
            | Step::Job(_)
            | Step::SemiSync { .. }
            | Step::Address { .. }
            | Step::Allow { .. }
            | Step::KillServer
            | Step::Announce { .. }
            | Step::Probe { .. }
            | Step::Remove { .. } => {}
        }
        Ok(())
    }

    /// What the worker says at once; None: it has begun.
    pub(crate) fn begin(&mut self, task: Task, now: u64) -> Option<AgentInput> {
        if !self.answers() {
            let outcome = TaskOutcome::Failed { why: "the server does not answer".to_owned() };
            return Some(AgentInput::TaskDone { id: task.id, outcome });
        }
        let limit = match task.work {
            Work::Quiesce { timeout_ms, .. } => {
                self.read_only = true;
                timeout_ms
            }
            Work::CatchUp { timeout_ms, .. } => timeout_ms,
            Work::Drain { timeout_ms } => {
                (self.io, self.sql) = (false, true);
                timeout_ms
            }
            Work::Fetch { ref from, timeout_ms, .. } => {
                self.source = place(from).unwrap_or(self.source);
                (self.io, self.sql) = (true, true);
                timeout_ms
            }
        };
        self.task = Some(task);
        self.task_until = now + limit;
        None
    }

    /// What the worker has to say about its task now.
    pub(crate) fn worked(&mut self, now: u64) -> Option<AgentInput> {
        let task = self.task.as_ref()?;
        let executed = gtids(&self.executed);
        let ready = self.answers()
            && match &task.work {
                Work::Quiesce { .. } => true,
                Work::CatchUp { position, .. } => position.gtids().and_then(|p| executed.contains(p)) == Some(true),
                Work::Fetch { position, .. } => executed.contains(position) == Some(true),
                Work::Drain { .. } => executed.contains(&gtids(&self.received)) == Some(true),
            };
        let outcome = if ready {
            TaskOutcome::Done { position: Some(executed.into()) }
        } else if now >= self.task_until {
            TaskOutcome::Failed { why: "not in time".to_owned() }
        } else {
            return None;
        };
        let id = task.id;
        self.io &= !matches!(task.work, Work::Fetch { .. });
        self.task = None;
        Some(AgentInput::TaskDone { id, outcome })
    }

    /// What the agent's watcher sees.
    pub(crate) fn looks(&self, told: Option<&ServerReport>, source: IpAddr, connected: bool, now: u64) -> ServerReport {
        let before = || told.cloned().unwrap_or_else(|| ServerReport::unknown("not looked at yet"));
        match self.hung_since {
            Some(since) if now - since >= HANG => ServerReport { life: Life::Hung { for_ms: HANG }, ..before() },
            Some(_) => before(),
            None if !self.up => ServerReport {
                life: Life::Dead { why: "connection refused".to_owned(), restarted: false },
                writing: Writing::Unknown,
                ..ServerReport::unknown("")
            },
            None => ServerReport {
                life: Life::Alive,
                writing: if self.read_only { Writing::ReadOnly } else { Writing::Allowed },
                executed: Some(gtids(&self.executed)),
                replication: Some(ReplicationReport {
                    source: source.to_string(),
                    port: 3306,
                    io_running: self.io && connected,
                    sql_running: self.sql,
                    received: Some(gtids(&self.received)),
                    behind_ms: (self.io && self.sql && connected).then_some(0),
                    error: String::new(),
                }),
                semisync: None,
            },
        }
    }
}

fn gtids(set: &Positions) -> Gtids {
    let text: Vec<String> = set.iter().map(|(id, n)| format!("0-{}-{n}", id + 1)).collect();
    Gtids::MariaDb(text.join(",").parse().expect("GTIDs of our own making"))
}

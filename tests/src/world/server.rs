//! The simulated database servers: replication positions, read_only, and what each host's agent asks of its own. Also
//! the clients, who write through the writer address and count what was acknowledged.

use super::{Event, SimHost, WRITER, World};
use mmm_agent_core::io::{Input as AgentInput, Step};
use mmm_common::epoch::Boot;
use mmm_common::gtid::Gtids;
use mmm_common::ids::HostName;
use mmm_common::order::{Job, JobWork, Task, Work};
use mmm_common::report::{Extras, JobState, Life, ReplicationReport, SemiSync, ServerReport, TaskOutcome, Writing};
use mmm_common::state::HostMode;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// How long a server step takes.
pub(super) const STEP: u64 = 3;
/// How often servers replicate, clients write and watchers look.
pub(super) const BEAT: u64 = 20;
/// How long a commit waits for an acknowledgement.
const SEMISYNC_TIMEOUT: u64 = 10_000;
/// How long work on a server's data takes.
const JOB: u64 = 2_000;
/// How often the watcher tells what has not changed.
const LOOK_AGAIN: u64 = 1_000;

#[derive(Clone, Debug)]
pub struct Server {
    pub up: bool,
    /// When it stopped answering (SIGSTOP).
    pub hung_since: Option<u64>,
    pub read_only: bool,
    /// Highest number per server id.
    pub executed: BTreeMap<u32, u64>,
    pub received: BTreeMap<u32, u64>,
    pub source: Option<HostName>,
    pub io: bool,
    pub sql: bool,
    /// Starting the SQL thread does not help.
    pub sql_refuses: bool,
    pub task: Option<Task>,
    pub task_until: u64,
    /// Work on the data, and when it is done.
    pub job: Option<(Job, u64)>,
    /// Without a replica that acknowledges, commits wait for no longer than this.
    pub waits_until: u64,
}

impl Server {
    pub(super) fn new(source: HostName) -> Server {
        Server {
            up: true,
            hung_since: None,
            read_only: true,
            executed: BTreeMap::new(),
            received: BTreeMap::new(),
            source: Some(source),
            io: true,
            sql: true,
            sql_refuses: false,
            task: None,
            task_until: 0,
            job: None,
            waits_until: 0,
        }
    }

    pub(crate) fn answers(&self) -> bool {
        self.up && self.hung_since.is_none()
    }

    fn gtids(&self, set: &BTreeMap<u32, u64>) -> Gtids {
        let text: Vec<String> = set.iter().map(|(id, n)| format!("0-{id}-{n}")).collect();
        Gtids::MariaDb(text.join(",").parse().expect("GTIDs of our own making"))
    }
}

/// Whether the set has this transaction.
fn has(set: &Gtids, id: u32, number: u64) -> bool {
    let Ok(one) = format!("0-{id}-{number}").parse() else { return false };
    set.contains(&Gtids::MariaDb(one)) == Some(true)
}

impl World {
    pub fn kill_server(&mut self, name: &str) {
        let server = &mut self.host(name).server;
        server.up = false;
        server.task = None;
        server.job = None;
        // A crash keeps what was executed; MariaDB drops the relay log at the restart.
    }

    pub fn start_server(&mut self, name: &str) {
        let server = &mut self.host(name).server;
        server.up = true;
        server.hung_since = None;
        server.read_only = true;
        server.received = server.executed.clone();
        (server.io, server.sql) = (true, true);
    }

    /// The server's SQL thread can no longer apply what it received.
    pub fn refuse_sql(&mut self, name: &str) {
        self.host(name).server.sql_refuses = true;
    }

    /// Whether clients can write through the writer address now.
    pub fn writer_is_open(&self) -> bool {
        self.open_for_writes().is_some()
    }

    /// How many acknowledged writes this host does not have.
    pub fn lost_on(&self, name: &str) -> usize {
        self.lacks(name, &self.acknowledged)
    }

    /// How many of these writes this host does not have.
    pub fn lacks(&self, name: &str, writes: &[(u32, u64)]) -> usize {
        let has = &self.hosts[&HostName::from(name)].server.executed;
        writes.iter().filter(|(id, n)| has.get(id).is_none_or(|mine| mine < n)).count()
    }

    /// Replication, clients, watchers.
    pub(super) fn beat(&mut self) {
        self.after(BEAT, Event::Beat);
        self.client_writes();
        let names: Vec<HostName> = self.hosts.keys().cloned().collect();
        for name in &names {
            self.replicate(name);
            if self.hosts[name].runs() {
                self.look_at_server(name);
                self.work_on_task(name);
                self.work_on_job(name);
            }
        }
    }

    pub(super) fn server_step(&mut self, name: &HostName) {
        let now = self.now;
        let Some(host) = self.hosts.get_mut(name) else { return };
        if !host.runs() {
            // The worker is stopped with its process.
            if host.agent.is_some() {
                self.after(BEAT, Event::ServerStep(name.clone()));
            }
            return;
        }
        let Some(step) = host.steps.pop_front() else { return };
        let word = match &step {
            Step::ReadOnly => "read_only",
            Step::Writable { .. } => "writable",
            Step::Follow { .. } => "follow",
            Step::Detach => "detach",
            Step::SemiSync { .. } => "semisync",
            Step::Task(_) => "task",
            Step::Job(_) => "job",
            Step::Address { .. }
            | Step::Allow { .. }
            | Step::KillServer
            | Step::Announce { .. }
            | Step::Probe { .. }
            | Step::Remove { .. } => "",
        };
        let refused = self.refuse_steps.contains(&(name.clone(), word));
        let answers = host.server.answers() && !refused;
        let result = if answers { Ok(()) } else { Err("the server does not answer".to_owned()) };
        let clock = host.clock;
        let server = &mut host.server;
        if answers {
            match &step {
                Step::ReadOnly => server.read_only = true,
                Step::Writable { until } => {
                    if *until <= clock.shows(now) {
                        self.agent_input(name, AgentInput::Done { step, result: Err("too late".into()) });
                        return;
                    }
                    server.read_only = false;
                }
                Step::Follow { host } => {
                    server.source = Some(host.clone());
                    (server.io, server.sql) = (true, true);
                }
                Step::Detach => {
                    server.io = false;
                    if server.received.iter().all(|(id, n)| server.executed.get(id).is_some_and(|mine| mine >= n)) {
                        server.source = None;
                    }
                }
                Step::Task(task) => {
                    let limit = match task.work {
                        Work::Quiesce { timeout_ms, .. } => {
                            server.read_only = true;
                            timeout_ms
                        }
                        Work::CatchUp { timeout_ms, .. } => timeout_ms,
                        Work::Drain { timeout_ms } => {
                            (server.io, server.sql) = (false, true);
                            timeout_ms
                        }
                        Work::Fetch { ref from, timeout_ms, .. } => {
                            server.source = Some(from.clone());
                            (server.io, server.sql) = (true, true);
                            timeout_ms
                        }
                    };
                    server.task = Some(task.clone());
                    server.task_until = now + limit;
                    self.look_at_server(name);
                    self.work_on_task(name);
                    return;
                }
                Step::Job(job) => {
                    server.job = Some((job.clone(), now + JOB));
                    return;
                }
                // Simulated replicas acknowledge what they receive, and are asked to by nobody.
                Step::SemiSync { .. }
                | Step::Address { .. }
                | Step::Allow { .. }
                | Step::KillServer
                | Step::Announce { .. }
                | Step::Probe { .. }
                | Step::Remove { .. } => {}
            }
        }
        if let Step::Task(task) = &step {
            let outcome = TaskOutcome::Failed { why: "the server does not answer".into() };
            self.local_input(name, AgentInput::TaskDone { id: task.id, outcome });
            return;
        }
        if let Step::Job(job) = &step {
            let state = JobState::Failed { why: "the server does not answer".into() };
            self.local_input(name, AgentInput::Job { id: job.id, state });
            return;
        }
        if matches!(step, Step::Writable { .. }) && result.is_ok() {
            self.agent_input(name, AgentInput::Done { step, result });
            self.look_at_server(name);
        } else {
            self.look_at_server(name);
            self.local_input(name, AgentInput::Done { step, result });
        }
    }

    /// What the agent's watcher or worker says.
    fn local_input(&mut self, name: &HostName, input: AgentInput) {
        if self.slow_looks == 0 {
            self.agent_input(name, input);
            return;
        }
        let at = self.now + self.any(self.slow_looks);
        let Some(host) = self.hosts.get_mut(name) else { return };
        host.last_look = at.max(host.last_look);
        let (wait, boot) = (host.last_look - self.now, Boot(host.boots));
        self.after(wait, Event::Local(name.clone(), boot, Box::new(input)));
    }

    fn work_on_task(&mut self, name: &HostName) {
        let now = self.now;
        let Some(host) = self.hosts.get_mut(name) else { return };
        let Some(task) = host.server.task.clone() else { return };
        let executed = host.server.gtids(&host.server.executed);
        let ready = match &task.work {
            Work::Quiesce { .. } => true,
            Work::CatchUp { position, .. } => position.gtids().and_then(|p| executed.contains(p)) == Some(true),
            Work::Fetch { position, .. } => executed.contains(position) == Some(true),
            Work::Drain { .. } => executed.contains(&host.server.gtids(&host.server.received)) == Some(true),
        };
        let outcome = if ready {
            TaskOutcome::Done { position: Some(executed.into()) }
        } else if now >= host.server.task_until {
            TaskOutcome::Failed { why: "not in time".into() }
        } else {
            return;
        };
        host.server.task = None;
        if matches!(task.work, Work::Fetch { .. }) {
            host.server.io = false;
        }
        self.local_input(name, AgentInput::TaskDone { id: task.id, outcome });
    }

    fn work_on_job(&mut self, name: &HostName) {
        let now = self.now;
        let Some(host) = self.hosts.get_mut(name) else { return };
        let Some((job, _)) = host.server.job.take_if(|(_, at)| *at <= now) else { return };
        let state = match &job.work {
            JobWork::Save { having, lacking } => {
                let transactions = lacking.missing(having).unwrap_or_default();
                let gtids = having.clone();
                let saved = "/var/lib/mysql-mmm/lost".to_owned();
                JobState::Done { extras: Some(Extras { gtids, transactions, list: vec![], saved }) }
            }
            JobWork::Undo { .. } if self.no_undo => JobState::Failed { why: "a table was dropped".to_owned() },
            JobWork::Undo { having, lacking } => {
                let extra = |id: u32, n: u64| has(having, id, n) && !has(lacking, id, n);
                let keep = |id: u32, n: u64| (1..=n).rev().find(|n| !extra(id, *n)).unwrap_or_default();
                host.server.executed.iter_mut().for_each(|(id, n)| *n = keep(*id, *n));
                host.server.received = host.server.executed.clone();
                JobState::Done { extras: None }
            }
            JobWork::Reclone { from } => {
                let copied = self.serves(from).then(|| self.hosts[from].server.executed.clone());
                let server = &mut self.host(name.as_str()).server;
                match copied {
                    Some(executed) => {
                        (server.received, server.executed) = (executed.clone(), executed);
                        (server.up, server.read_only, server.io, server.sql) = (true, true, false, false);
                        server.source = None;
                        JobState::Done { extras: None }
                    }
                    None => JobState::Failed { why: format!("{from} does not answer") },
                }
            }
        };
        self.local_input(name, AgentInput::Job { id: job.id, state });
    }

    /// Its server serves, and it is in the network at all.
    pub(super) fn serves(&self, name: &HostName) -> bool {
        self.hosts.get(name).is_some_and(|h| h.answers() && h.server.answers()) && !self.cut.contains(name)
    }

    /// The I/O thread is connected, not "Connecting".
    pub(super) fn source_answers(&self, name: &HostName) -> bool {
        let source = self.hosts.get(name).and_then(|h| h.server.source.as_ref());
        self.serves(name) && source.is_some_and(|s| self.serves(s) && self.passes(s, name) && self.passes(name, s))
    }

    fn replicate(&mut self, name: &HostName) {
        let fetches = self.lag == 0 || self.any(100) >= self.lag;
        let applies = self.lag == 0 || self.any(100) >= self.lag;
        if !self.serves(name) {
            return;
        }
        let Some(source) = self.hosts.get(name).and_then(|h| h.server.source.clone()) else { return };
        let there = self.source_answers(name).then(|| self.hosts[&source].server.executed.clone());
        let Some(host) = self.hosts.get_mut(name) else { return };
        let server = &mut host.server;
        if let (Some(there), true) = (&there, server.io && fetches) {
            for (id, n) in there {
                let mine = server.received.entry(*id).or_insert(0);
                *mine = (*mine).max(*n);
            }
        }
        if server.sql && !server.sql_refuses && applies {
            for (id, n) in server.received.clone() {
                let mine = server.executed.entry(id).or_insert(0);
                *mine = (*mine).max(n);
            }
        }
    }

    fn open_for_writes(&self) -> Option<HostName> {
        let writer: IpAddr = WRITER.parse().expect("an address");
        let open = |(name, h): &(&HostName, &SimHost)| {
            h.answers_for(writer, self.now) && !h.server.read_only && self.serves(name)
        };
        self.hosts.iter().find(open).map(|(name, _)| name.clone())
    }

    /// With semi-synchronous replication a write is acknowledged once a replica has received it, or after its timeout
    /// when there is none: every write is acknowledged here, and `secured` are those that another master has.
    fn client_writes(&mut self) {
        if !self.writing {
            return;
        }
        let Some(name) = self.open_for_writes() else { return };
        let Some(host) = self.hosts.get_mut(&name) else { return };
        let id = host.server_id;
        // As MariaDB numbers within a domain: above everything that is there, whoever wrote it.
        let number = host.server.executed.values().max().copied().unwrap_or(0) + 1;
        host.server.executed.insert(id, number);
        self.acknowledged.push((id, number));
        self.outage = self.outage.max(self.now.saturating_sub(self.last_write.max(1 << 40)));
        self.last_write = self.now;
        if self.lag > 0 {
            return;
        }
        let readers: Vec<HostName> = self.hosts.keys().filter(|n| **n != name).cloned().collect();
        for reader in readers {
            self.replicate(&reader);
        }
        let masters = self.config.cluster.writer().map(|role| role.hosts.as_slice()).unwrap_or_default();
        let received = |n: &HostName| self.hosts[n].server.received.get(&id).is_some_and(|last| *last >= number);
        if masters.iter().any(|n| *n != name && received(n)) {
            self.secured.push((id, number));
        }
    }

    /// Masters acknowledge what they fetch.
    fn semisync_of(&self, name: &HostName) -> Option<SemiSync> {
        let writes = self.semisync && !self.hosts.get(name)?.server.read_only;
        let is_master = |n: &HostName| self.config.cluster.hosts.get(n).is_some_and(|h| h.mode == HostMode::Master);
        let attached = |n: &HostName| self.fetches_from(n, name) || self.attached.contains(n);
        let replicas = self.hosts.keys().filter(|n| *n != name && attached(n)).count() as u64;
        self.semisync.then(|| SemiSync {
            source: writes,
            waits: writes && self.now < self.hosts[name].server.waits_until,
            after_sync: true,
            timeout_ms: SEMISYNC_TIMEOUT,
            replicas,
            wait_count: 1,
            replica: is_master(name),
            acknowledges: is_master(name),
        })
    }

    /// It acknowledges what it fetches there. With a `lag` of 100 nothing comes through, and nobody notices.
    fn fetches_from(&self, name: &HostName, source: &HostName) -> bool {
        let server = &self.hosts[name].server;
        let is_master = self.config.cluster.hosts.get(name).is_some_and(|h| h.mode == HostMode::Master);
        is_master && server.io && server.source.as_ref() == Some(source) && self.source_answers(name)
    }

    fn look_at_server(&mut self, name: &HostName) {
        let hang = self.config.cluster.hang_timeout.as_millis() as u64;
        let now = self.now;
        let connected = self.source_answers(name);
        // Who is only taken for attached acknowledges nothing.
        if self.semisync
            && self.lag < 100
            && self.hosts.keys().any(|n| n != name && self.fetches_from(n, name))
            && let Some(host) = self.hosts.get_mut(name)
        {
            host.server.waits_until = now + SEMISYNC_TIMEOUT;
        }
        let Some(host) = self.hosts.get(name) else { return };
        let server = &host.server;
        let mut report = host.told.clone().unwrap_or_else(|| ServerReport::unknown("not looked at yet"));
        match server.hung_since {
            Some(since) if now - since >= hang => report.life = Life::Hung { for_ms: hang },
            Some(_) => {}
            None if !server.up => {
                report = ServerReport {
                    life: Life::Dead { why: "connection refused".into(), restarted: false },
                    writing: Writing::Unknown,
                    ..ServerReport::unknown("")
                };
            }
            None => {
                let source_ip = server.source.as_ref().map(|s| self.hosts[s].ip.to_string()).unwrap_or_default();
                report = ServerReport {
                    life: Life::Alive,
                    writing: if server.read_only { Writing::ReadOnly } else { Writing::Allowed },
                    executed: Some(server.gtids(&server.executed)),
                    replication: Some(ReplicationReport {
                        source: source_ip,
                        port: 3306,
                        io_running: server.io && connected,
                        sql_running: server.sql,
                        received: Some(server.gtids(&server.received)),
                        behind_ms: (server.io && server.sql && connected).then_some(0),
                        error: ReplicationReport::errors("", if server.sql_refuses { "cannot be applied" } else { "" }),
                    }),
                    semisync: self.semisync_of(name),
                };
            }
        }
        // The watcher tells every change, and once a second what has not changed.
        let due = server.hung_since.is_none() && now >= host.told_at + LOOK_AGAIN;
        if host.told.as_ref() != Some(&report) || due {
            if let Some(h) = self.hosts.get_mut(name) {
                h.told_at = now;
                h.told = Some(report.clone());
            }
            self.local_input(name, AgentInput::Server(report));
        }
    }
}

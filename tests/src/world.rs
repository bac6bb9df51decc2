//! A simulated cluster around the real cores: kernels with address lifetimes, servers with replication positions,
//! a network with delays and cuts, one clock. Time is simulated, so a minute of the cluster takes milliseconds.
//!
//! After every event the invariants are looked at: never two kernels with one address, no address that the monitor's
//! disk knows nothing of, and never two open servers under running agents. It never uses real time or threads, and no
//! chance but that of its own seed.

use mmm_agent_core::Core as AgentCore;
use mmm_agent_core::io::{AskId, Input as AgentInput, Output as AgentOutput, Saved, Step};
use mmm_common::config::{Agent as AgentConfig, Check, Cluster, Host, Monitor as MonitorConfig, OnDrainTimeout, Role};
use mmm_common::control::{Answer, Command};
use mmm_common::epoch::{Boot, Epoch};
use mmm_common::gtid::Gtids;
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::{Task, Work};
use mmm_common::report::{Life, ReplicationReport, ServerReport, TaskOutcome, Writing};
use mmm_common::state::{CheckKind, CheckResult, HostMode, MonitorMode, RoleMode};
use mmm_common::vouch::{VouchAnswer, VouchRequest};
use mmm_common::wire::{FromAgent, ToAgent};
use mmm_mon_core::io::{Input as MonInput, Output as MonOutput, RequestId};
use mmm_mon_core::{Core as MonCore, Snapshot};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

/// One way, in simulated milliseconds.
const DELAY: u64 = 1;
/// How long three probes on the wire take.
const PROBE: u64 = 100;
/// How long a server step takes.
const STEP: u64 = 3;
/// How often servers replicate, clients write and watchers look.
const BEAT: u64 = 20;
/// How late the kernel removes an address whose lifetime is over (safety.md: up to 1.0 s).
const KERNEL_LATE: u64 = 1000;
/// How soon a running agent has closed a server that answers and that it has no right to keep open: the agent's wait
/// after a step that failed while the server did not answer (0.5 s), looks at the server and a step.
const CLOSED_WITHIN: u64 = 1000;

pub struct World {
    pub now: u64,
    pub config: MonitorConfig,
    monitor: Option<MonCore>,
    saved: Option<(Snapshot, u64)>,
    pub hosts: BTreeMap<HostName, SimHost>,
    queue: BTreeMap<(u64, u64), Event>,
    number: u64,
    pub answers: BTreeMap<u64, Answer>,
    /// What happened, for people.
    pub story: Vec<String>,
    pub network: bool,
    /// Links that are cut, by host: monitor to agent and back.
    pub cut: BTreeSet<HostName>,
    /// Hosts that only the monitor cannot reach.
    pub unseen: BTreeSet<HostName>,
    /// Who asked, by request.
    asks: BTreeMap<AskId, HostName>,
    /// Since when a cut link has been waiting for a report.
    silent_since: BTreeMap<HostName, u64>,
    /// How long the monitor's shell waits for a report before it takes a cut connection for dead.
    pub link_patience: u64,
    pub writing: bool,
    /// Acknowledged writes: (server id, number).
    pub acknowledged: Vec<(u32, u64)>,
    /// Those of them that another host of the writer role had received by then: what semi-synchronous replication
    /// promises to keep.
    pub secured: Vec<(u32, u64)>,
    pub last_write: u64,
    /// The longest time between two acknowledged writes since it was last reset.
    pub outage: u64,
    /// Messages take up to this many milliseconds more; within one direction of one link they stay in order.
    pub jitter: u64,
    /// Of 100 times, how often a replica fetches or applies nothing in a beat. Above zero, writes are acknowledged
    /// without waiting for a replica.
    pub lag: u64,
    /// What the watcher sees and how steps end takes up to this many milliseconds to get to the agent's core, in order.
    /// The end of an opening step overtakes looks that began before it.
    pub slow_looks: u64,
    last_look: BTreeMap<HostName, u64>,
    /// Nobody fails in this story: never two open servers at one moment, whatever their agents do.
    pub strict: bool,
    /// The only source of chance (splitmix64); the same seed gives the same story.
    pub chance: u64,
    /// When the last message of a direction (true: to the agent) arrives.
    last_delivery: BTreeMap<(HostName, bool), u64>,
    /// How often the monitor saved, and how often either core was ticked.
    pub saves: u64,
    pub ticks: u64,
    /// Server steps that fail at this host, by name of the step.
    pub refuse_steps: BTreeSet<(HostName, &'static str)>,
    /// Agents that start from now on have another `lease_ttl` in their configuration than the monitor.
    pub agents_lease_ttl: Option<Duration>,
    /// kill_host_bin was called, for this host, asked for at this epoch.
    kill: Option<(HostName, Epoch)>,
}

pub struct SimHost {
    pub ip: IpAddr,
    server_id: u32,
    /// Address and when the kernel removes it.
    pub kernel: BTreeMap<IpAddr, u64>,
    agent: Option<AgentCore>,
    boots: u64,
    machine_boot: u64,
    saved: Option<Saved>,
    linked: bool,
    pub server: Server,
    /// Steps for the server, done one after the other.
    steps: VecDeque<Step>,
    told: Option<ServerReport>,
    alive: bool,
    /// Since when its server has answered a running agent.
    minded_since: Option<u64>,
}

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
}

#[derive(Clone, Debug)]
enum Event {
    MonitorTick,
    AgentTick(HostName, Boot),
    ToAgent(HostName, ToAgent),
    ToMonitor(HostName, FromAgent),
    Link(HostName),
    /// From one agent to another.
    Ask(HostName, HostName, Box<VouchRequest>),
    Vouch(HostName, HostName, Box<VouchAnswer>),
    /// From the watcher or the worker of this life of the agent.
    Local(HostName, Boot, AgentInput),
    Ended(HostName),
    Check(HostName),
    Network,
    ServerStep(HostName),
    Beat,
}

impl World {
    /// Two masters and a replica, one writer and three reader addresses, default settings.
    pub fn new() -> World {
        World::with(config(&["db1", "db2", "db3"]))
    }

    pub fn with(config: MonitorConfig) -> World {
        let hosts = config
            .cluster
            .hosts
            .iter()
            .enumerate()
            .map(|(i, (name, host))| {
                let server = Server {
                    up: true,
                    hung_since: None,
                    read_only: true,
                    executed: BTreeMap::new(),
                    received: BTreeMap::new(),
                    source: Some(if name.as_str() == "db1" { "db2".into() } else { "db1".into() }),
                    io: true,
                    sql: true,
                    sql_refuses: false,
                    task: None,
                    task_until: 0,
                };
                let host = SimHost {
                    ip: host.ip,
                    server_id: i as u32 + 1,
                    kernel: BTreeMap::new(),
                    agent: None,
                    boots: 0,
                    machine_boot: 1,
                    saved: None,
                    linked: false,
                    server,
                    steps: VecDeque::new(),
                    told: None,
                    alive: true,
                    minded_since: None,
                };
                (name.clone(), host)
            })
            .collect();
        let mut world = World {
            now: 1 << 40,
            config,
            monitor: None,
            saved: None,
            hosts,
            queue: BTreeMap::new(),
            number: 0,
            answers: BTreeMap::new(),
            story: Vec::new(),
            network: true,
            cut: BTreeSet::new(),
            unseen: BTreeSet::new(),
            asks: BTreeMap::new(),
            silent_since: BTreeMap::new(),
            link_patience: 0,
            writing: true,
            acknowledged: Vec::new(),
            secured: Vec::new(),
            last_write: 0,
            outage: 0,
            jitter: 0,
            lag: 0,
            slow_looks: 0,
            last_look: BTreeMap::new(),
            strict: false,
            chance: 0,
            last_delivery: BTreeMap::new(),
            saves: 0,
            ticks: 0,
            refuse_steps: BTreeSet::new(),
            agents_lease_ttl: None,
            kill: None,
        };
        let names: Vec<HostName> = world.hosts.keys().cloned().collect();
        for (i, name) in names.iter().enumerate() {
            world.start_agent(name);
            // Every checker has its own timer; the first host is looked at last.
            world.after(907 - 300 * (i as u64 % 4), Event::Check(name.clone()));
        }
        world.after(BEAT, Event::Beat);
        world.start_monitor();
        world
    }

    /// Lets the cluster run.
    pub fn run(&mut self, ms: u64) {
        let end = self.now + ms;
        while let Some(((at, _), _)) = self.queue.first_key_value() {
            if *at > end {
                break;
            }
            let Some(((at, _), event)) = self.queue.pop_first() else { break };
            self.now = at;
            self.happen(event);
            self.look_at_invariants();
        }
        self.now = end;
    }

    /// Runs until the condition holds; how long that took, or None after `limit` milliseconds.
    pub fn run_until(&mut self, limit: u64, condition: impl Fn(&World) -> bool) -> Option<u64> {
        let begin = self.now;
        while self.now - begin <= limit {
            if condition(self) {
                return Some(self.now - begin);
            }
            self.run(1);
        }
        None
    }

    pub fn command(&mut self, command: Command) -> Option<Answer> {
        self.number += 1;
        let id = self.number;
        self.monitor_input(MonInput::Command { id: RequestId(id), command, who: "test".into() });
        self.answers.get(&id).cloned()
    }

    /// The answer of the last command, now that some time has passed.
    pub fn late_answer(&self) -> Option<&Answer> {
        self.answers.last_key_value().map(|(_, a)| a)
    }

    pub fn show(&mut self) -> String {
        self.command(Command::Show).map(|a| a.text(&|_| String::new())).unwrap_or_default()
    }

    pub fn text(&mut self, command: Command) -> String {
        self.command(command).map(|a| a.text(&|_| String::new())).unwrap_or_default()
    }

    pub fn holders(&self, ip: &str) -> Vec<&str> {
        let ip: IpAddr = ip.parse().expect("an address");
        self.hosts.iter().filter(|(_, h)| h.alive && h.kernel.contains_key(&ip)).map(|(n, _)| n.as_str()).collect()
    }

    pub fn host(&mut self, name: &str) -> &mut SimHost {
        self.hosts.get_mut(&HostName::from(name)).expect("a host of the world")
    }

    /// Whether clients can write through the writer address now.
    pub fn writer_is_open(&self) -> bool {
        self.open_for_writes().is_some()
    }

    // ---- faults ---------------------------------------------------------------------------------

    pub fn stop_monitor(&mut self) {
        self.monitor = None;
        for host in self.hosts.values_mut() {
            host.linked = false;
        }
        let names: Vec<HostName> = self.hosts.keys().cloned().collect();
        for name in names {
            self.agent_input(&name, AgentInput::MonitorDown { why: "closed".into() });
        }
    }

    /// The monitor's disk is lost.
    pub fn forget_status(&mut self) {
        self.saved = None;
    }

    /// The server's SQL thread can no longer apply what it received.
    pub fn refuse_sql(&mut self, name: &str) {
        self.host(name).server.sql_refuses = true;
    }

    pub fn start_monitor(&mut self) {
        let saved = self.saved.clone().map(|(s, at)| (s, Duration::from_millis(self.now - at)));
        self.monitor =
            Some(MonCore::new(self.config.clone(), saved, (self.now - (1 << 40)) / 1000 + 1_000_000, Millis(self.now)));
        self.queue.retain(|_, e| !matches!(e, Event::Link(_) | Event::Network));
        let names: Vec<HostName> = self.hosts.keys().cloned().collect();
        for name in names {
            self.after(DELAY * 3, Event::Link(name));
        }
        self.after(1, Event::Network);
        self.after(1, Event::MonitorTick);
    }

    pub fn stop_agent(&mut self, name: &str) {
        let name = HostName::from(name);
        self.host(name.as_str()).agent = None;
        self.unlink(&name, "connection closed");
    }

    /// SIGTERM.
    pub fn end_agent(&mut self, name: &str) {
        self.agent_input(&HostName::from(name), AgentInput::Shutdown { keep: false });
    }

    pub fn start_agent(&mut self, name: &HostName) {
        let now = Millis(self.now);
        let mut cluster = self.config.cluster.clone();
        cluster.lease_ttl = self.agents_lease_ttl.unwrap_or(cluster.lease_ttl);
        let config = AgentConfig {
            cluster,
            this: name.clone(),
            state_path: "/dev/null".into(),
            mysql_socket: None,
            watchdog_device: None,
        };
        let Some(host) = self.hosts.get_mut(name) else { return };
        host.boots += 1;
        let boot = Boot(host.boots);
        let machine = format!("machine-{}", host.machine_boot);
        host.agent = Some(AgentCore::new(&config, host.saved.clone(), boot, machine, now));
        host.told = None;
        host.minded_since = None;
        host.steps.clear();
        self.after(0, Event::AgentTick(name.clone(), boot));
    }

    pub fn kill_server(&mut self, name: &str) {
        let server = &mut self.host(name).server;
        server.up = false;
        server.task = None;
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

    /// The machine loses power: its kernel forgets all.
    pub fn crash_host(&mut self, name: &str) {
        self.kill_server(name);
        let host = self.host(name);
        host.kernel.clear();
        host.agent = None;
        host.alive = false;
        host.machine_boot += 1;
        self.unlink(&HostName::from(name), "no answer");
    }

    /// kill_host_bin says that it has killed the host. True if it was called for this one.
    pub fn confirm_kill(&mut self, name: &str) -> bool {
        let Some((host, asked)) = self.kill.take().filter(|(host, _)| host.as_str() == name) else { return false };
        self.monitor_input(MonInput::Killed { host, asked, result: Ok(()) });
        true
    }

    pub fn boot_host(&mut self, name: &str) {
        self.host(name).alive = true;
        self.start_server(name);
        self.start_agent(&HostName::from(name));
    }

    pub fn has_agent(&self, name: &str) -> bool {
        self.hosts.get(&HostName::from(name)).is_some_and(|h| h.agent.is_some())
    }

    pub fn is_alive(&self, name: &str) -> bool {
        self.hosts.get(&HostName::from(name)).is_some_and(|h| h.alive)
    }

    fn unlink(&mut self, name: &HostName, why: &str) {
        let Some(host) = self.hosts.get_mut(name) else { return };
        if std::mem::take(&mut host.linked) {
            self.monitor_input(MonInput::AgentDown { host: name.clone(), why: why.to_owned() });
            self.agent_input(name, AgentInput::MonitorDown { why: why.to_owned() });
        }
    }

    /// A number below `n`.
    pub fn any(&mut self, n: u64) -> u64 {
        self.chance = self.chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.chance;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n.max(1)
    }

    pub fn has_monitor(&self) -> bool {
        self.monitor.is_some()
    }

    /// The monitor's disk is put back to an older state.
    pub fn restore_status(&mut self, snapshot: Snapshot) {
        let now = self.now;
        self.saved = Some((snapshot, now));
    }

    pub fn saved(&self) -> Option<&Snapshot> {
        self.saved.as_ref().map(|(s, _)| s)
    }

    /// When a message sent now arrives.
    fn delivery(&mut self, name: &HostName, to_agent: bool) -> u64 {
        let more = if self.jitter > 0 { self.any(self.jitter) } else { 0 };
        let at = self.now + DELAY + more;
        let last = self.last_delivery.entry((name.clone(), to_agent)).or_insert(0);
        *last = at.max(*last);
        *last
    }

    // ---- events ---------------------------------------------------------------------------------

    fn after(&mut self, ms: u64, event: Event) {
        self.number += 1;
        self.queue.insert((self.now + ms, self.number), event);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::MonitorTick => {
                // Ticks of an earlier plan come too; they do no harm.
                self.ticks += 1;
                self.monitor_input(MonInput::Tick);
            }
            Event::AgentTick(name, boot) => {
                if self.hosts.get(&name).is_some_and(|h| Boot(h.boots) == boot) {
                    self.ticks += 1;
                    self.agent_input(&name, AgentInput::Tick);
                }
            }
            Event::Link(name) => self.link(name),
            Event::Ask(from, to, request) => {
                if self.peers(&from, &to) {
                    self.number += 1;
                    let ask = AskId(self.number);
                    self.asks.insert(ask, from.clone());
                    self.agent_input(&to, AgentInput::Asked { ask, from, request: *request });
                }
            }
            Event::Vouch(by, to, answer) => {
                if self.peers(&by, &to) {
                    self.agent_input(&to, AgentInput::Vouched { by, answer: *answer });
                }
            }
            Event::ToAgent(name, message) => {
                if let (ToAgent::Order(order), true) = (message, self.linked(&name)) {
                    self.agent_input(&name, AgentInput::Order(order));
                }
            }
            Event::ToMonitor(name, message) => {
                if let (FromAgent::Report(report), true) = (message, self.linked(&name)) {
                    self.monitor_input(MonInput::Report { host: name, report });
                }
            }
            Event::Network => {
                self.monitor_input(MonInput::Network { reachable: self.network });
                self.after(1000, Event::Network);
            }
            Event::Local(name, boot, input) => {
                if self.hosts.get(&name).is_some_and(|h| Boot(h.boots) == boot) {
                    self.agent_input(&name, input);
                }
            }
            Event::Ended(name) => self.unlink(&name, "connection closed"),
            Event::Check(name) => self.check(&name),
            Event::ServerStep(name) => self.server_step(&name),
            Event::Beat => self.beat(),
        }
    }

    fn linked(&self, name: &HostName) -> bool {
        self.hosts.get(name).is_some_and(|h| h.linked) && self.is_reached(name)
    }

    /// The monitor can reach the host.
    fn is_reached(&self, name: &HostName) -> bool {
        !self.cut.contains(name) && !self.unseen.contains(name)
    }

    /// What one agent sends arrives at the other.
    fn peers(&self, from: &HostName, to: &HostName) -> bool {
        [from, to].iter().all(|name| {
            !self.cut.contains(*name) && self.hosts.get(*name).is_some_and(|h| h.alive && h.agent.is_some())
        })
    }

    fn link(&mut self, name: HostName) {
        let Some(host) = self.hosts.get_mut(&name) else { return };
        if self.monitor.is_none() {
            return;
        }
        let reached = !self.cut.contains(&name) && !self.unseen.contains(&name);
        if !host.linked && host.agent.is_some() && host.alive && reached {
            host.linked = true;
            let boot = Boot(host.boots);
            self.monitor_input(MonInput::AgentUp { host: name.clone(), boot, version: "sim".into() });
            self.agent_input(&name, AgentInput::MonitorUp);
        } else if host.linked && !reached {
            let since = *self.silent_since.entry(name.clone()).or_insert(self.now);
            if self.now - since >= self.link_patience {
                self.unlink(&name, "no report in time");
            }
        }
        if reached {
            self.silent_since.remove(&name);
        }
        self.after(500, Event::Link(name));
    }

    fn check(&mut self, name: &HostName) {
        self.after(1000, Event::Check(name.clone()));
        let Some(host) = self.hosts.get(name) else { return };
        let reached = host.alive && self.is_reached(name);
        let serves = reached && host.server.up && host.server.hung_since.is_none();
        let threads = host.server.io && host.server.sql && self.source_answers(name);
        let verdict = |ok: bool, why: &str| {
            if ok { CheckResult::Ok(String::new()) } else { CheckResult::Error(why.to_owned()) }
        };
        for (check, result) in [
            (CheckKind::Ping, verdict(reached, "no echo reply")),
            (CheckKind::Mysql, verdict(serves, "no answer")),
            (
                CheckKind::RepThreads,
                if serves {
                    verdict(threads, "a thread is not running")
                } else {
                    CheckResult::Unknown("no answer".into())
                },
            ),
            (CheckKind::RepBacklog, if serves { verdict(true, "") } else { CheckResult::Unknown("no answer".into()) }),
        ] {
            self.monitor_input(MonInput::Check { host: name.clone(), check, result });
        }
    }

    fn monitor_input(&mut self, input: MonInput) {
        let Some(core) = &mut self.monitor else { return };
        let mut out = Vec::new();
        core.handle(Millis(self.now), input, &mut out);
        let deadline = core.next_deadline();
        for output in out {
            match output {
                MonOutput::Persist(snapshot) => {
                    self.saves += 1;
                    self.saved = Some((*snapshot, self.now));
                }
                MonOutput::Send { host, order } => {
                    let at = self.delivery(&host, true);
                    self.after(at - self.now, Event::ToAgent(host, ToAgent::Order(*order)));
                }
                MonOutput::Kill { host, asked, .. } => {
                    self.tell(format!("kill_host {host}"));
                    self.kill = Some((host, asked));
                }
                MonOutput::Reply { id, answer } => {
                    self.answers.insert(id.0, answer);
                }
                MonOutput::Audit(line) => {
                    let epoch = line.epoch.map(|e| format!(" [{e}]")).unwrap_or_default();
                    let host = line.host.map(|h| format!("{h}: ")).unwrap_or_default();
                    self.tell(format!("monitor{epoch}: {host}{}", line.text));
                }
            }
        }
        if let Some((at, _)) = deadline {
            self.number += 1;
            self.queue.insert((at.0.max(self.now + 1), self.number), Event::MonitorTick);
            self.drop_later_ticks();
        }
    }

    /// Each input plans a tick; only the earliest monitor tick is needed.
    fn drop_later_ticks(&mut self) {
        let mut seen = false;
        self.queue.retain(|_, e| !matches!(e, Event::MonitorTick) || !std::mem::replace(&mut seen, true));
    }

    fn agent_input(&mut self, name: &HostName, input: AgentInput) {
        let now = self.now;
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let Some(host) = self.hosts.get_mut(name) else { return };
            let Some(core) = &mut host.agent else { return };
            let mut ended = false;
            let mut out = Vec::new();
            let mut reports = Vec::new();
            let mut asks = Vec::new();
            let mut vouches = Vec::new();
            let mut probes = Vec::new();
            core.handle(Millis(now), input, &mut out);
            for output in out {
                match output {
                    AgentOutput::Persist(saved) => host.saved = Some(saved),
                    AgentOutput::LookUp { asked } => {
                        inputs.push_back(AgentInput::Kernel { asked, present: host.kernel.keys().copied().collect() });
                    }
                    AgentOutput::Send(report) => {
                        if host.linked {
                            reports.push(report);
                        }
                    }
                    AgentOutput::Ask { to, request } => asks.push((to, request)),
                    AgentOutput::Vouch { ask, answer } => vouches.push((ask, answer)),
                    AgentOutput::Audit(line) => {
                        let text = match line {
                            mmm_agent_core::io::Audit::Info(t)
                            | mmm_agent_core::io::Audit::Warn(t)
                            | mmm_agent_core::io::Audit::Error(t) => t,
                        };
                        self.story.push(format!("{:>9.3} {name}: {text}", (now - (1 << 40)) as f64 / 1000.0));
                    }
                    AgentOutput::Do(step) => match step {
                        Step::Address { ip, lifetime_s, .. } => {
                            host.kernel.insert(ip, now + u64::from(lifetime_s) * 1000 + KERNEL_LATE);
                            inputs.push_back(AgentInput::Done { step, result: Ok(()) });
                        }
                        Step::Remove { ip, .. } => {
                            host.kernel.remove(&ip);
                            inputs.push_back(AgentInput::Done { step, result: Ok(()) });
                        }
                        Step::Announce { .. } => {}
                        Step::Probe { ip } => probes.push(ip),
                        Step::ReadOnly | Step::Writable { .. } | Step::Follow { .. } | Step::Detach | Step::Task(_) => {
                            host.steps.push_back(step);
                            self.number += 1;
                            self.queue.insert((now + STEP, self.number), Event::ServerStep(name.clone()));
                        }
                    },
                    AgentOutput::Exit => ended = true,
                }
            }
            if let Some((at, _)) = core.next_deadline() {
                let boot = Boot(host.boots);
                self.number += 1;
                self.queue.retain(|_, e| !matches!(e, Event::AgentTick(n, _) if n == name));
                self.queue.insert((at.0.max(now + 1), self.number), Event::AgentTick(name.clone(), boot));
            }
            for (to, request) in asks {
                let at = self.peer_delivery();
                self.after(at, Event::Ask(name.clone(), to, request));
            }
            for (ask, answer) in vouches {
                let at = self.peer_delivery();
                if let Some(to) = self.asks.remove(&ask) {
                    self.after(at, Event::Vouch(name.clone(), to, answer));
                }
            }
            for ip in probes {
                let boot = Boot(self.hosts[name].boots);
                let answered_by = self.other_holder(name, ip).map(|h| format!("the MAC address of {h}"));
                self.after(PROBE, Event::Local(name.clone(), boot, AgentInput::Probed { ip, answered_by }));
            }
            for report in reports {
                let at = self.delivery(name, false);
                self.after(at - now, Event::ToMonitor(name.clone(), FromAgent::Report(report)));
            }
            if ended {
                if let Some(host) = self.hosts.get_mut(name) {
                    host.agent = None;
                }
                // Its last words arrive before the end of the connection is seen.
                let at = self.delivery(name, false);
                self.after(at - now + 1, Event::Ended(name.clone()));
            }
        }
    }

    /// How long a message between two agents takes; they come in any order.
    fn peer_delivery(&mut self) -> u64 {
        let more = if self.jitter > 0 { self.any(self.jitter) } else { 0 };
        DELAY + more
    }

    /// Who else would answer on the wire for this address.
    fn other_holder(&self, asking: &HostName, ip: IpAddr) -> Option<HostName> {
        if self.cut.contains(asking) {
            return None;
        }
        let has = |(name, h): &(&HostName, &SimHost)| {
            *name != asking && h.alive && h.kernel.contains_key(&ip) && !self.cut.contains(*name)
        };
        self.hosts.iter().find(has).map(|(name, _)| name.clone())
    }

    fn server_step(&mut self, name: &HostName) {
        let now = self.now;
        let Some(host) = self.hosts.get_mut(name) else { return };
        let Some(step) = host.steps.pop_front() else { return };
        let word = match &step {
            Step::ReadOnly => "read_only",
            Step::Writable { .. } => "writable",
            Step::Follow { .. } => "follow",
            Step::Detach => "detach",
            Step::Task(_) => "task",
            Step::Address { .. } | Step::Announce { .. } | Step::Probe { .. } | Step::Remove { .. } => "",
        };
        let refused = self.refuse_steps.contains(&(name.clone(), word));
        let answers = host.server.up && host.server.hung_since.is_none() && !refused;
        let result = if answers { Ok(()) } else { Err("the server does not answer".to_owned()) };
        let server = &mut host.server;
        if answers {
            match &step {
                Step::ReadOnly => server.read_only = true,
                Step::Writable { until } => {
                    if until.0 <= now {
                        self.agent_input(name, AgentInput::Done { step, result: Err("too late".into()) });
                        return;
                    }
                    server.read_only = false;
                }
                Step::Follow { host } => {
                    server.source = Some(host.clone());
                    (server.io, server.sql) = (true, true);
                }
                Step::Detach => server.io = false,
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
                    };
                    server.task = Some(task.clone());
                    server.task_until = now + limit;
                    self.look_at_server(name);
                    self.work_on_task(name);
                    return;
                }
                Step::Address { .. } | Step::Announce { .. } | Step::Probe { .. } | Step::Remove { .. } => {}
            }
        }
        if let Step::Task(task) = &step {
            let outcome = TaskOutcome::Failed { why: "the server does not answer".into() };
            self.local_input(name, AgentInput::TaskDone { id: task.id, outcome });
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
        let last = self.last_look.entry(name.clone()).or_insert(0);
        *last = at.max(*last);
        let (wait, boot) = (*last - self.now, Boot(self.hosts[name].boots));
        self.after(wait, Event::Local(name.clone(), boot, input));
    }

    fn work_on_task(&mut self, name: &HostName) {
        let now = self.now;
        let Some(host) = self.hosts.get_mut(name) else { return };
        let Some(task) = host.server.task.clone() else { return };
        let executed = host.server.gtids(&host.server.executed);
        let ready = match &task.work {
            Work::Quiesce { .. } => true,
            Work::CatchUp { position, .. } => executed.contains(position) == Some(true),
            Work::Drain { .. } => executed.contains(&host.server.gtids(&host.server.received)) == Some(true),
        };
        let outcome = if ready {
            TaskOutcome::Done { position: Some(executed) }
        } else if now >= host.server.task_until {
            TaskOutcome::Failed { why: "not in time".into() }
        } else {
            return;
        };
        host.server.task = None;
        self.local_input(name, AgentInput::TaskDone { id: task.id, outcome });
    }

    /// Replication, clients, watchers, kernels.
    fn beat(&mut self) {
        self.after(BEAT, Event::Beat);
        let now = self.now;
        for (_, host) in self.hosts.iter_mut() {
            host.kernel.retain(|_, until| *until > now);
        }
        self.client_writes();
        let names: Vec<HostName> = self.hosts.keys().cloned().collect();
        for name in &names {
            self.replicate(name);
            self.look_at_server(name);
            self.work_on_task(name);
        }
    }

    /// Its server serves, and nothing is between it and the others.
    fn serves(&self, name: &HostName) -> bool {
        self.hosts.get(name).is_some_and(|h| h.alive && h.server.up && h.server.hung_since.is_none())
            && !self.cut.contains(name)
    }

    /// The I/O thread is connected, not "Connecting".
    fn source_answers(&self, name: &HostName) -> bool {
        let source = self.hosts.get(name).and_then(|h| h.server.source.as_ref());
        self.serves(name) && source.is_some_and(|s| self.serves(s))
    }

    fn replicate(&mut self, name: &HostName) {
        let fetches = self.lag == 0 || self.any(100) >= self.lag;
        let applies = self.lag == 0 || self.any(100) >= self.lag;
        let Some(source) = self.hosts.get(name).and_then(|h| h.server.source.clone()) else { return };
        if !self.serves(name) {
            return;
        }
        let there = self.serves(&source).then(|| self.hosts[&source].server.executed.clone());
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
        self.hosts
            .iter()
            .find(|(name, h)| {
                h.alive
                    && h.kernel.contains_key(&writer)
                    && h.server.up
                    && h.server.hung_since.is_none()
                    && !h.server.read_only
                    && !self.cut.contains(*name)
            })
            .map(|(name, _)| name.clone())
    }

    /// A write is acknowledged once the other master has received it, as with semi-synchronous replication.
    fn client_writes(&mut self) {
        if !self.writing {
            return;
        }
        let Some(name) = self.open_for_writes() else { return };
        let Some(host) = self.hosts.get_mut(&name) else { return };
        let id = host.server_id;
        let number = host.server.executed.entry(id).or_insert(0);
        *number += 1;
        let number = *number;
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

    /// How many acknowledged writes this host does not have.
    pub fn lost_on(&self, name: &str) -> usize {
        self.lacks(name, &self.acknowledged)
    }

    /// How many of these writes this host does not have.
    pub fn lacks(&self, name: &str, writes: &[(u32, u64)]) -> usize {
        let has = &self.hosts[&HostName::from(name)].server.executed;
        writes.iter().filter(|(id, n)| has.get(id).is_none_or(|mine| mine < n)).count()
    }

    fn look_at_server(&mut self, name: &HostName) {
        let hang = self.config.cluster.hang_timeout.as_millis() as u64;
        let now = self.now;
        let Some(host) = self.hosts.get(name) else { return };
        let server = &host.server;
        let mut report = host.told.clone().unwrap_or_else(|| ServerReport::unknown("not looked at yet"));
        match server.hung_since {
            Some(since) if now - since >= hang => report.life = Life::Hung { for_ms: hang },
            Some(_) => {}
            None if !server.up => {
                report = ServerReport {
                    life: Life::Dead { why: "connection refused".into() },
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
                        io_running: server.io && self.source_answers(name),
                        sql_running: server.sql,
                        received: Some(server.gtids(&server.received)),
                        behind_ms: (server.io && server.sql && self.source_answers(name)).then_some(0),
                        error: String::new(),
                    }),
                };
            }
        }
        if host.told.as_ref() != Some(&report) {
            if let Some(h) = self.hosts.get_mut(name) {
                h.told = Some(report.clone());
            }
            self.local_input(name, AgentInput::Server(report));
        }
    }

    fn look_at_invariants(&mut self) {
        let mut seen: BTreeMap<IpAddr, &HostName> = BTreeMap::new();
        for (name, host) in self.hosts.iter().filter(|(_, h)| h.alive) {
            for ip in host.kernel.keys() {
                let other = seen.insert(*ip, name);
                assert!(other.is_none(), "TWO HOLDERS: {ip} is on {other:?} and {name}\n{}", self.story.join("\n"));
                // `live` names everybody who may be acting on an order (R7), on disk before anything is sent (R3).
                let known = self.saved.as_ref().is_none_or(|(saved, _)| {
                    saved.slots.get(ip).is_some_and(|slot| slot.live.iter().any(|o| o.to == *name))
                });
                assert!(known, "NOT ORDERED: {ip} is on {name} without a trace on disk\n{}", self.story.join("\n"));
            }
        }
        for (ip, slot) in self.saved.iter().flat_map(|(s, _)| &s.slots) {
            assert!(slot.live.len() < 30, "LIVE GROWS: {ip}: {:?}\n{}", slot.live, self.story.join("\n"));
        }
        self.look_at_open_servers();
    }

    /// Never two writable servers that have answered their running agents for a while. A server that hung, or whose
    /// agent was gone, may be open for the moment until its agent has closed it (R13).
    fn look_at_open_servers(&mut self) {
        let now = self.now;
        let mut open = Vec::new();
        for (name, host) in &mut self.hosts {
            let refuses = self.refuse_steps.iter().any(|(refuser, _)| refuser == name);
            let answers = host.alive && host.server.up && host.server.hung_since.is_none() && !refuses;
            if self.strict {
                open.extend((!host.server.read_only).then_some(name.as_str()));
                continue;
            }
            if !answers || host.agent.is_none() {
                host.minded_since = None;
                continue;
            }
            let since = *host.minded_since.get_or_insert(now);
            if !host.server.read_only && now - since >= CLOSED_WITHIN {
                open.push(name.as_str());
            }
        }
        assert!(open.len() < 2, "BOTH OPEN: {open:?} are writable\n{}", self.story.join("\n"));
    }

    fn tell(&mut self, text: String) {
        self.story.push(format!("{:>9.3} {text}", (self.now - (1 << 40)) as f64 / 1000.0));
    }
}

impl Default for World {
    fn default() -> Self {
        World::new()
    }
}

impl Server {
    fn gtids(&self, set: &BTreeMap<u32, u64>) -> Gtids {
        let text: Vec<String> = set.iter().map(|(id, n)| format!("0-{id}-{n}")).collect();
        Gtids::MariaDb(text.join(",").parse().expect("GTIDs of our own making"))
    }
}

/// The writer address of every simulated cluster.
pub const WRITER: &str = "10.0.0.50";

/// Default settings (interfaces.md); `db1` and `db2` are masters, the others slaves.
pub fn config(names: &[&str]) -> MonitorConfig {
    let hosts: BTreeMap<HostName, Host> = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let peer = match *name {
                "db1" => Some("db2".into()),
                "db2" => Some("db1".into()),
                _ => None,
            };
            let host = Host {
                ip: format!("10.0.0.{}", 11 + i).parse().expect("an address"),
                mode: if peer.is_some() { HostMode::Master } else { HostMode::Slave },
                peer,
                cluster_interface: "eth0".into(),
                agent_port: 9989,
                mysql_port: 3306,
                agent_user: String::new(),
                agent_password: Default::default(),
                replication_user: String::new(),
                replication_password: Default::default(),
                monitor_user: String::new(),
                monitor_password: Default::default(),
            };
            ((*name).into(), host)
        })
        .collect();
    let writer = Role {
        mode: RoleMode::Exclusive,
        hosts: vec!["db1".into(), "db2".into()],
        ips: vec![WRITER.parse().expect("an address")],
        prefer: None,
    };
    let reader = Role {
        mode: RoleMode::Balanced,
        hosts: names.iter().map(|n| (*n).into()).collect(),
        ips: (51..54).map(|n| format!("10.0.0.{n}").parse().expect("an address")).collect(),
        prefer: None,
    };
    let check = Check {
        check_period: Duration::from_secs(1),
        trap_period: Duration::from_secs(3),
        timeout: Duration::from_secs(1),
        restart_after: 10_000,
        max_backlog: Duration::from_secs(60),
    };
    MonitorConfig {
        cluster: Cluster {
            active_master_role: "writer".into(),
            lease_ttl: Duration::from_secs(3),
            heartbeat_interval: Duration::from_millis(500),
            insecure_plaintext: true,
            move_grace: Duration::from_secs(1),
            move_timeout: Duration::from_secs(2),
            drain_timeout: Duration::from_secs(30),
            on_drain_timeout: OnDrainTimeout::Hold,
            hang_timeout: Duration::from_secs(3),
            restart_grace: Duration::ZERO,
            hosts,
            roles: BTreeMap::from([("writer".into(), writer), ("reader".into(), reader)]),
        },
        ip: "127.0.0.1".parse().expect("an address"),
        port: 9988,
        status_path: "/dev/null".into(),
        ping_ips: vec![],
        ping_interval: Duration::from_secs(1),
        mode: MonitorMode::Active,
        wait_for_other_master: Duration::from_secs(120),
        careful_startup: true,
        auto_set_online: Duration::ZERO,
        flap_duration: Duration::from_secs(3600),
        flap_count: 3,
        kill_host_bin: None,
        checks: CheckKind::ALL.iter().map(|kind| (*kind, check.clone())).collect(),
    }
}

//! A simulated cluster around the real cores: kernels with address lifetimes, servers with replication positions, a
//! network with delays and cuts, a clock for each machine. Time is simulated, so a minute of the cluster takes
//! milliseconds.
//!
//! After every event the rules in src/invariants/ are looked at; a broken one panics with its name and the story.
//! It never uses real time or threads, and no chance but that of its own seed.

mod agent;
pub(crate) mod clock;
mod config;
pub(crate) mod kernel;
mod monitor;
mod network;
mod server;

pub use config::{WRITER, config};
pub use network::MONITOR;
pub use server::Server;

use crate::invariants::{Invariants, Seen};
use clock::{Clock, DRIFT_PPM};
use mmm_agent_core::Core as AgentCore;
use mmm_agent_core::io::{AskId, Input as AgentInput, Saved, Step};
use mmm_common::config::Monitor as MonitorConfig;
use mmm_common::control::{Answer, Command};
use mmm_common::epoch::{Boot, Epoch};
use mmm_common::ids::HostName;
use mmm_common::order::Order;
use mmm_common::report::{Report, ServerReport};
use mmm_common::vouch::{VouchAnswer, VouchRequest};
use mmm_mon_core::io::{Input as MonInput, RequestId};
use mmm_mon_core::{Core as MonCore, Snapshot};
use server::BEAT;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

pub struct World {
    /// True time.
    pub now: u64,
    pub config: MonitorConfig,
    monitor: Option<MonCore>,
    monitor_clock: Clock,
    monitor_stopped: bool,
    monitor_pile: Vec<MonInput>,
    monitor_tick: Option<u64>,
    /// The monitor's disk.
    pub(crate) saved: Option<(Snapshot, u64)>,
    pub hosts: BTreeMap<HostName, SimHost>,
    queue: BTreeMap<(u64, u64), Event>,
    number: u64,
    pub answers: BTreeMap<u64, Answer>,
    /// What happened, for people.
    pub story: Vec<String>,
    pub network: bool,
    /// Hosts that nobody can reach.
    pub cut: BTreeSet<HostName>,
    /// Hosts that only the monitor cannot reach.
    pub unseen: BTreeSet<HostName>,
    /// From, to.
    pub ways_cut: BTreeSet<(HostName, HostName)>,
    /// Who asked, by request.
    /// Who asked, and whether it has the exact guard.
    asks: BTreeMap<AskId, (HostName, bool)>,
    /// How long the monitor's shell waits for a report before it takes a silent connection for dead.
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
    /// Of 100 orders and vouches, how many come a second time, up to ten seconds later.
    pub echo: u64,
    /// Of 100 times, how often a replica fetches or applies nothing in a beat. Above zero, writes are acknowledged
    /// without waiting for a replica.
    pub lag: u64,
    /// What the watcher sees and how steps end takes up to this many milliseconds to get to the agent's core, in order.
    /// The end of an opening step overtakes looks that began before it.
    pub slow_looks: u64,
    /// Nobody fails in this story: never two open servers at one moment, whatever their agents do.
    pub strict: bool,
    /// The only source of chance (splitmix64); the same seed gives the same story.
    pub chance: u64,
    /// Kernels are late by chance, up to the worst case; otherwise always in the worst case.
    kernels_differ: bool,
    /// When the last message of a direction (true: to the agent) arrives.
    last_delivery: BTreeMap<(HostName, bool), u64>,
    /// How often the monitor saved, and how often either core was ticked.
    pub saves: u64,
    pub ticks: u64,
    /// Server steps that fail at this host, by name of the step.
    pub refuse_steps: BTreeSet<(HostName, &'static str)>,
    /// What extra transactions did cannot be undone.
    pub no_undo: bool,
    /// Servers have semi-synchronous replication, and say so. Writes do not wait for it here.
    pub semisync: bool,
    /// Replicas whose connection the writer takes for alive, though nothing comes through.
    pub attached: BTreeSet<HostName>,
    /// Of 100 times, how often the exact guard cannot be armed.
    pub guard_fails: u64,
    /// Agents may start with the exact guard where the life before had none, and without where it had one.
    pub guards_switch: bool,
    /// Agents that start from now on have another `lease_ttl` in their configuration than the monitor.
    pub agents_lease_ttl: Option<Duration>,
    /// What the monitor's wall clock says when it starts, in seconds since 1970; otherwise it goes with the story.
    pub wall_clock: Option<u64>,
    /// kill_host_bin was called, for this host, asked for at this epoch.
    kill: Option<(HostName, Epoch)>,
    /// What becomes of a kill.
    pub kills: Kills,
    /// What happened since the rules were last looked at.
    pub(crate) seen: Vec<Seen>,
    invariants: Invariants,
}

pub struct SimHost {
    pub ip: IpAddr,
    server_id: u32,
    pub(crate) clock: Clock,
    /// Address and when (in true time) the kernel removes it.
    pub kernel: BTreeMap<IpAddr, u64>,
    /// Its agents that start from now on have the exact guard.
    pub guarded: bool,
    /// The guard's tables: until when (in true time) an address may answer. None: there are no tables.
    pub(crate) allowed: Option<BTreeMap<IpAddr, u64>>,
    pub(crate) agent: Option<AgentCore>,
    boots: u64,
    machine_boot: u64,
    /// The agent's disk.
    pub(crate) saved: Option<Saved>,
    linked: bool,
    /// Since when a link has been waiting for a report.
    silent_since: Option<u64>,
    pub server: Server,
    /// Steps for the server, done one after the other.
    steps: VecDeque<Step>,
    told: Option<ServerReport>,
    told_at: u64,
    last_look: u64,
    /// When its agent's next tick comes.
    tick: Option<u64>,
    pub(crate) alive: bool,
    /// The agent's process is stopped (SIGSTOP).
    stopped: bool,
    /// What it has not handled because it stood still.
    pile: VecDeque<AgentInput>,
    /// The whole machine stands still.
    pub(crate) frozen: Option<Frozen>,
    /// When its clock last went on after it had stood still.
    clock_stood_until: u64,
    /// Since when its server has answered a running agent.
    pub(crate) minded_since: Option<u64>,
}

/// What becomes of a call of kill_host_bin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kills {
    /// The story says so ([`World::confirm_kill`]).
    Told,
    /// It cuts the power, or fails late.
    Chance,
    /// It fails.
    Fail,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Frozen {
    since: u64,
    clock_goes_on: bool,
}

impl SimHost {
    /// The address is here, and nothing holds its answers back.
    pub(crate) fn answers_for(&self, ip: IpAddr, now: u64) -> bool {
        let allowed = |tables: &BTreeMap<IpAddr, u64>| tables.get(&ip).is_some_and(|until| *until > now);
        self.answers() && self.kernel.contains_key(&ip) && self.allowed.as_ref().is_none_or(allowed)
    }

    /// The machine takes part in the network.
    pub(crate) fn answers(&self) -> bool {
        self.alive && self.frozen.is_none()
    }

    /// The agent's process is there and does something.
    pub(crate) fn runs(&self) -> bool {
        self.agent.is_some() && !self.stopped && self.frozen.is_none()
    }
}

#[derive(Clone, Debug)]
enum Event {
    MonitorTick,
    AgentTick(HostName, Boot),
    Order(HostName, Box<Order>),
    Report(HostName, Box<Report>),
    Link(HostName),
    /// From one agent to another.
    Ask(HostName, HostName, Box<VouchRequest>),
    Vouch(HostName, HostName, Box<VouchAnswer>),
    /// The message comes again, whatever has become of its connection.
    Echo(Box<Event>),
    /// From the watcher or the worker of this life of the agent.
    Local(HostName, Boot, Box<AgentInput>),
    Ended(HostName),
    /// An address may have outlived its time.
    Expire(HostName),
    Check(HostName),
    Network,
    ServerStep(HostName),
    Beat,
    /// kill_host_bin does its work, or cannot.
    Kill(HostName, Epoch, bool),
    Killed(HostName, Epoch, Result<(), String>),
    /// A pause ends by itself.
    Resume(HostName),
    Wake(HostName),
    ResumeMonitor,
}

impl World {
    /// Two masters and a replica, one writer and three reader addresses, default settings.
    pub fn new() -> World {
        World::with(config(&["db1", "db2", "db3"]))
    }

    /// Exact clocks, no chance: every story goes the same way.
    pub fn with(config: MonitorConfig) -> World {
        World::build(config, None)
    }

    /// Clocks and kernels as the seed has it.
    pub fn by_chance(config: MonitorConfig, seed: u64) -> World {
        World::build(config, Some(seed))
    }

    fn build(config: MonitorConfig, seed: Option<u64>) -> World {
        let hosts = config
            .cluster
            .hosts
            .iter()
            .enumerate()
            .map(|(i, (name, host))| {
                let host = SimHost {
                    ip: host.ip,
                    server_id: i as u32 + 1,
                    clock: Clock::exact(),
                    kernel: BTreeMap::new(),
                    guarded: false,
                    allowed: None,
                    agent: None,
                    boots: 0,
                    machine_boot: 1,
                    saved: None,
                    linked: false,
                    silent_since: None,
                    server: Server::new(if name.as_str() == "db1" { "db2".into() } else { "db1".into() }),
                    steps: VecDeque::new(),
                    told: None,
                    told_at: 0,
                    last_look: 0,
                    tick: None,
                    alive: true,
                    stopped: false,
                    pile: VecDeque::new(),
                    frozen: None,
                    clock_stood_until: 0,
                    minded_since: None,
                };
                (name.clone(), host)
            })
            .collect();
        let mut world = World {
            now: 1 << 40,
            config,
            monitor: None,
            monitor_clock: Clock::exact(),
            monitor_stopped: false,
            monitor_pile: Vec::new(),
            monitor_tick: None,
            saved: None,
            hosts,
            queue: BTreeMap::new(),
            number: 0,
            answers: BTreeMap::new(),
            story: Vec::new(),
            network: true,
            cut: BTreeSet::new(),
            unseen: BTreeSet::new(),
            ways_cut: BTreeSet::new(),
            asks: BTreeMap::new(),
            link_patience: 0,
            writing: true,
            acknowledged: Vec::new(),
            secured: Vec::new(),
            last_write: 0,
            outage: 0,
            jitter: 0,
            echo: 0,
            lag: 0,
            slow_looks: 0,
            strict: false,
            chance: seed.unwrap_or(0),
            kernels_differ: seed.is_some(),
            last_delivery: BTreeMap::new(),
            saves: 0,
            ticks: 0,
            refuse_steps: BTreeSet::new(),
            no_undo: false,
            semisync: false,
            attached: BTreeSet::new(),
            guard_fails: 0,
            guards_switch: false,
            agents_lease_ttl: None,
            wall_clock: None,
            kill: None,
            kills: Kills::Told,
            seen: Vec::new(),
            invariants: Invariants::default(),
        };
        let names: Vec<HostName> = world.hosts.keys().cloned().collect();
        if seed.is_some() {
            world.monitor_clock = world.any_clock();
        }
        for (i, name) in names.iter().enumerate() {
            if seed.is_some() {
                let clock = world.any_clock();
                world.host(name.as_str()).clock = clock;
            }
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
        self.text(Command::Show)
    }

    pub fn text(&mut self, command: Command) -> String {
        self.command(command).map(|a| a.text(&|_| String::new())).unwrap_or_default()
    }

    pub fn holders(&self, ip: &str) -> Vec<&str> {
        let ip: IpAddr = ip.parse().expect("an address");
        self.hosts.iter().filter(|(_, h)| h.answers_for(ip, self.now)).map(|(n, _)| n.as_str()).collect()
    }

    pub fn host(&mut self, name: &str) -> &mut SimHost {
        self.hosts.get_mut(&HostName::from(name)).expect("a host of the world")
    }

    /// A number below `n`.
    pub fn any(&mut self, n: u64) -> u64 {
        self.chance = self.chance.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.chance;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n.max(1)
    }

    fn any_clock(&mut self) -> Clock {
        let shown = (1 << 40) + self.any(1 << 40);
        let ppm = self.any(2 * DRIFT_PPM as u64 + 1) as i64 - DRIFT_PPM;
        Clock::new(self.now, shown, ppm)
    }

    /// One line of the story.
    pub fn tell(&mut self, text: String) {
        self.story.push(format!("{:>9.3} {text}", (self.now - (1 << 40)) as f64 / 1000.0));
    }

    /// Ends a pause of the agent, of the machine or of the monitor after so long.
    pub fn resume_agent_after(&mut self, name: &str, ms: u64) {
        self.after(ms, Event::Resume(name.into()));
    }

    pub fn wake_host_after(&mut self, name: &str, ms: u64) {
        self.after(ms, Event::Wake(name.into()));
    }

    pub fn resume_monitor_after(&mut self, ms: u64) {
        self.after(ms, Event::ResumeMonitor);
    }

    fn after(&mut self, ms: u64, event: Event) {
        self.number += 1;
        self.queue.insert((self.now + ms, self.number), event);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::MonitorTick => {
                // Of an earlier plan: another one has been made since.
                if self.monitor_tick == Some(self.now) && !self.monitor_stopped {
                    self.monitor_tick = None;
                    self.ticks += 1;
                    self.monitor_input(MonInput::Tick);
                }
            }
            Event::AgentTick(name, boot) => self.agent_tick(&name, boot),
            Event::Link(name) => self.link(name),
            Event::Ask(from, to, request) => {
                if self.peers(&from, &to) {
                    self.asked(from, &to, *request);
                }
            }
            Event::Vouch(by, to, answer) => {
                if self.peers(&by, &to) {
                    self.vouched(by, &to, *answer);
                }
            }
            Event::Order(name, order) => {
                if self.hosts.get(&name).is_some_and(|h| h.linked) && self.hears_monitor(&name) {
                    self.agent_input(&name, AgentInput::Order(*order));
                }
            }
            Event::Report(name, report) => {
                if self.hosts.get(&name).is_some_and(|h| h.linked) && self.is_heard_by_monitor(&name) {
                    self.monitor_input(MonInput::Report { host: name, report });
                }
            }
            Event::Echo(message) => self.echo(*message),
            Event::Network => self.check_network(),
            Event::Local(name, boot, input) => {
                if self.hosts.get(&name).is_some_and(|h| Boot(h.boots) == boot) {
                    self.agent_input(&name, *input);
                }
            }
            Event::Ended(name) => self.unlink(&name, "connection closed"),
            Event::Expire(name) => self.expire(&name),
            Event::Check(name) => self.check(&name),
            Event::ServerStep(name) => self.server_step(&name),
            Event::Beat => self.beat(),
            Event::Kill(name, asked, works) => self.kill_host(name, asked, works),
            Event::Killed(host, asked, result) => self.monitor_input(MonInput::Killed { host, asked, result }),
            Event::Resume(name) => self.resume_agent(name.as_str()),
            Event::Wake(name) => self.wake_host(name.as_str()),
            Event::ResumeMonitor => self.resume_monitor(),
        }
    }

    /// As if the shells had been fooled: straight into the core, if the machine is in the network at all.
    fn echo(&mut self, message: Event) {
        let there = |name: &HostName| self.hosts.get(name).is_some_and(|h| h.answers() && !self.cut.contains(name));
        match message {
            Event::Order(name, order) if there(&name) => self.agent_input(&name, AgentInput::Order(*order)),
            Event::Ask(from, to, request) if there(&to) => self.asked(from, &to, *request),
            Event::Vouch(by, to, answer) if there(&to) => self.vouched(by, &to, *answer),
            Event::Order(..)
            | Event::Ask(..)
            | Event::Vouch(..)
            | Event::MonitorTick
            | Event::AgentTick(..)
            | Event::Report(..)
            | Event::Link(_)
            | Event::Echo(_)
            | Event::Local(..)
            | Event::Ended(_)
            | Event::Expire(_)
            | Event::Check(_)
            | Event::Network
            | Event::ServerStep(_)
            | Event::Beat
            | Event::Kill(..)
            | Event::Killed(..)
            | Event::Resume(_)
            | Event::Wake(_)
            | Event::ResumeMonitor => {}
        }
    }

    #[cfg(test)]
    pub(crate) fn invariants(&self) -> &Invariants {
        &self.invariants
    }

    fn look_at_invariants(&mut self) {
        let mut invariants = std::mem::take(&mut self.invariants);
        invariants.follow(self);
        let found = invariants.look(self);
        self.invariants = invariants;
        self.seen.clear();
        if let Err(what) = found {
            panic!("{what}\n{}", self.story.join("\n"));
        }
    }
}

impl Default for World {
    fn default() -> Self {
        World::new()
    }
}

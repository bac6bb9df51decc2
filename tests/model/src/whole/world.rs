//! The cluster around the real cores: kernels that are as late as they may be, servers, connections, and messages that
//! arrive at once unless a fault was chosen. Everything between two choices goes one way only.
//!
//! What is there is looked at after every event, also in the middle of a step. It knows no rule of the cores.

use super::STEP;
use super::config::{self, WRITER, ip, name, place};
use super::server::Server;
use mmm_agent_core::Core as AgentCore;
use mmm_agent_core::io::{AskId, Audit, Input as AgentInput, Output as AgentOutput, Saved, Step};
use mmm_common::config::Monitor as Config;
use mmm_common::control::Command;
use mmm_common::epoch::Boot;
use mmm_common::ids::Millis;
use mmm_common::order::{AddressOrder, Order};
use mmm_common::report::{JobState, Report, ServerReport};
use mmm_common::state::{CheckKind, CheckResult};
use mmm_common::vouch::{VouchAnswer, VouchRequest};
use mmm_mon_core::io::{Input as MonInput, Output as MonOutput, RequestId};
use mmm_mon_core::{Core as MonCore, Snapshot};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// The monitor's place in the network; the hosts are 0, 1, 2.
pub(crate) const MONITOR: usize = 9;
/// How late a kernel removes an address whose lifetime is over: always as late as it may be.
const KERNEL_LATE: u64 = 1000;
/// How long three probes on the wire take.
const PROBE: u64 = 100;
/// After so many steps without an answer a connection counts as dead.
const PATIENCE: u8 = 2;
/// How soon a running agent has closed a server that it has no right to keep open (as in the simulator).
const CLOSED_WITHIN: u64 = 1000;
/// Each life of each agent has a number of its own: host and life.
pub(crate) const LIVES: u64 = 1000;
pub(crate) const BEGIN: u64 = 1 << 40;

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Message {
    Report(usize, Box<Report>),
    Order(usize, Box<Order>),
    Ask { from: usize, to: usize, request: Box<VouchRequest> },
    Vouch { from: usize, to: usize, answer: Box<VouchAnswer> },
}

/// One kind of messages from one place to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Channel {
    Reports(usize),
    Orders(usize),
    Asks(usize, usize),
    Vouches(usize, usize),
}

impl Message {
    pub(crate) fn channel(&self) -> Channel {
        match self {
            Message::Report(from, _) => Channel::Reports(*from),
            Message::Order(to, _) => Channel::Orders(*to),
            Message::Ask { from, to, .. } => Channel::Asks(*from, *to),
            Message::Vouch { from, to, .. } => Channel::Vouches(*from, *to),
        }
    }

    fn way(&self) -> (usize, usize) {
        match self {
            Message::Report(from, _) => (*from, MONITOR),
            Message::Order(to, _) => (MONITOR, *to),
            Message::Ask { from, to, .. } | Message::Vouch { from, to, .. } => (*from, *to),
        }
    }
}

/// What is done with the first message of a channel in this step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trick {
    HoldBack,
    Double,
}

#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) core: AgentCore,
    pub(crate) disk: Option<Saved>,
    pub(crate) boot: Boot,
    pub(crate) machine: u64,
    /// When the kernel removes each address.
    pub(crate) kernel: BTreeMap<IpAddr, u64>,
    pub(crate) linked: bool,
    /// For so many steps nobody has answered on the connection to the monitor.
    pub(crate) silent: u8,
    pub(crate) paused: bool,
    pub(crate) pile: Vec<AgentInput>,
    pub(crate) server: Server,
    pub(crate) told: Option<ServerReport>,
    pub(crate) probes: Vec<(u64, IpAddr)>,
    /// Since when its server has answered a running agent.
    pub(crate) minded: Option<u64>,
    /// When the reports and requests of each life were sent.
    pub(crate) sent: BTreeMap<Boot, Vec<(u64, u64)>>,
    /// When an order last came, and whether it proved each address.
    pub(crate) heard: u64,
    pub(crate) proved: BTreeMap<IpAddr, bool>,
}

#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) now: u64,
    pub(crate) config: Arc<Config>,
    pub(crate) monitor: MonCore,
    pub(crate) disk: Option<(Snapshot, u64)>,
    pub(crate) hosts: Vec<Host>,
    /// From, to.
    pub(crate) cuts: BTreeSet<(usize, usize)>,
    trick: Option<(Channel, Trick)>,
    /// Held back or to come again.
    pub(crate) aside: Vec<Message>,
    net: VecDeque<Message>,
    pub(crate) two_holders: bool,
    pub(crate) two_open: bool,
    /// Who had each address last.
    had: BTreeMap<IpAddr, usize>,
    /// Addresses that came to another host in the last step: whether with proof.
    pub(crate) moved: Vec<bool>,
    /// What happened, for people; only when a story is told.
    pub(crate) story: Option<Vec<String>>,
}

impl World {
    /// A healthy cluster: everybody is ONLINE for longer than any rule looks back, and db1 is written to.
    pub(crate) fn healthy(hosts: usize) -> World {
        let config = Arc::new(config::monitor(hosts));
        let now = BEGIN;
        let mut world = World {
            now,
            monitor: MonCore::new((*config).clone(), None, 1_000_000, Millis(now)),
            config,
            disk: None,
            hosts: Vec::new(),
            cuts: BTreeSet::new(),
            trick: None,
            aside: Vec::new(),
            net: VecDeque::new(),
            two_holders: false,
            two_open: false,
            had: BTreeMap::new(),
            moved: Vec::new(),
            story: None,
        };
        for i in 0..hosts {
            let boot = Boot(LIVES * (i as u64 + 1));
            world.hosts.push(Host {
                core: AgentCore::new(&config::agent(hosts, i), None, boot, "machine-1".to_owned(), None, Millis(now)),
                disk: None,
                boot,
                machine: 1,
                kernel: BTreeMap::new(),
                linked: false,
                silent: 0,
                paused: false,
                pile: Vec::new(),
                server: Server::new(if i == 0 { 1 } else { 0 }),
                told: None,
                probes: Vec::new(),
                minded: None,
                sent: BTreeMap::new(),
                heard: now,
                proved: BTreeMap::new(),
            });
        }
        (0..6).for_each(|_| world.pass(None));
        for i in 0..hosts {
            world.command(Command::SetOnline { host: name(i), accept_lost: false });
            (0..6).for_each(|_| world.pass(None));
        }
        (0..180).for_each(|_| world.pass(None));
        // Fresh agents have less to remember.
        for i in 0..hosts {
            world.restart_agent(i, false);
            (0..20).for_each(|_| world.pass(None));
        }
        assert!(world.hosts[0].kernel.contains_key(&WRITER) && !world.hosts[0].server.read_only, "db1 is written to");
        world
    }

    /// One step of time.
    pub(crate) fn pass(&mut self, trick: Option<(Channel, Trick)>) {
        let end = self.now + STEP;
        self.trick = trick;
        self.moved.clear();
        self.settle_links();
        self.check();
        self.settle();
        for _ in 0..10_000 {
            match self.due().filter(|(at, _)| *at <= end) {
                Some((at, what)) => {
                    self.now = at.max(self.now);
                    self.happen(what);
                    self.settle();
                }
                None => {
                    self.now = end;
                    self.look();
                    return;
                }
            }
        }
        panic!("a step without an end");
    }

    /// The trick of the step that was just made found a message.
    pub(crate) fn tricked(&self) -> bool {
        self.trick.is_none()
    }

    pub(crate) fn tell(&mut self, text: impl FnOnce() -> String) {
        if let Some(story) = &mut self.story {
            story.push(format!("{:>8.3} {}", (self.now - BEGIN) as f64 / 1000.0, text()));
        }
    }

    // ---- what is due ----------------------------------------------------------------------------------------------

    fn due(&self) -> Option<(u64, Due)> {
        let mut all: Vec<(u64, Due)> = Vec::new();
        for (i, host) in self.hosts.iter().enumerate() {
            all.extend(host.kernel.values().map(|gone| (*gone, Due::Kernel(i))));
            if host.paused {
                continue;
            }
            all.extend(host.probes.iter().map(|(at, _)| (*at, Due::Probe(i))));
            all.extend(host.server.due(self.now).map(|at| (at, Due::Server(i))));
            all.extend(host.core.next_deadline().map(|(at, _)| (at.0, Due::Agent(i))));
        }
        all.extend(self.monitor.next_deadline().map(|(at, _)| (at.0, Due::Monitor)));
        all.into_iter().min()
    }

    fn happen(&mut self, what: Due) {
        match what {
            Due::Kernel(i) => {
                let now = self.now;
                self.hosts[i].kernel.retain(|_, gone| *gone > now);
                self.tell(|| format!("kernel of {}: a lifetime is over, the address is removed", name(i)));
                self.agent(i, AgentInput::KernelChanged);
            }
            Due::Probe(i) => {
                // It comes on top of the rules, and must not hide one that is missing: it sees nobody.
                let (_, ip) = self.hosts[i].probes.remove(0);
                self.agent(i, AgentInput::Probed { ip, answered_by: None });
            }
            Due::Server(i) => self.work(i),
            Due::Agent(i) => self.agent(i, AgentInput::Tick),
            Due::Monitor => self.decide(MonInput::Tick),
        }
    }

    /// Delivers what is under way, then looks at what is there.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            self.look();
            let Some(message) = self.net.pop_front() else { return };
            match self.trick.filter(|(channel, _)| *channel == message.channel()) {
                Some((_, Trick::HoldBack)) => {
                    self.trick = None;
                    self.tell(|| format!("held back: {message:?}"));
                    self.aside.push(message);
                    continue;
                }
                Some((_, Trick::Double)) => {
                    self.trick = None;
                    self.aside.push(message.clone());
                }
                None => {}
            }
            if !self.cuts.contains(&message.way()) {
                self.deliver(message);
            }
        }
        panic!("messages without an end");
    }

    /// As if the shells had been fooled, when it comes late: the cores have to refuse it by themselves.
    pub(crate) fn deliver_late(&mut self, message: usize) {
        let message = self.aside.remove(message);
        self.tell(|| format!("comes late: {message:?}"));
        self.deliver(message);
        self.settle();
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::Report(from, report) => self.decide(MonInput::Report { host: name(from), report }),
            Message::Order(to, order) => self.agent(to, AgentInput::Order(*order)),
            Message::Ask { from, to, request } => {
                self.agent(to, AgentInput::Asked { ask: AskId(from as u64), from: name(from), request: *request });
            }
            Message::Vouch { from, to, answer } => {
                self.agent(to, AgentInput::Vouched { by: name(from), answer: *answer });
            }
        }
    }

    fn look(&mut self) {
        let mut on: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for host in &mut self.hosts {
            host.kernel.keys().for_each(|ip| *on.entry(*ip).or_default() += 1);
            if host.server.answers() && !host.paused {
                host.minded.get_or_insert(self.now);
            } else {
                host.minded = None;
            }
        }
        let two = on.values().any(|n| *n > 1);
        if two && !self.two_holders {
            self.two_holders = true;
            self.tell(|| "TWO HOLDERS".to_owned());
        }
        let now = self.now;
        let minded = |host: &&Host| host.minded.is_some_and(|since| now - since >= CLOSED_WITHIN);
        let open = self.hosts.iter().filter(minded).filter(|host| !host.server.read_only).count();
        if open > 1 && !self.two_open {
            self.two_open = true;
            self.tell(|| "TWO OPEN SERVERS".to_owned());
        }
    }

    // ---- the monitor ----------------------------------------------------------------------------------------------

    pub(crate) fn decide(&mut self, input: MonInput) {
        let mut out = Vec::new();
        self.monitor.handle(Millis(self.now), input, &mut out);
        for output in out {
            match output {
                MonOutput::Persist(snapshot) => self.disk = Some((*snapshot, self.now)),
                MonOutput::Send { host, order } => {
                    let Some(to) = place(&host) else { continue };
                    if self.hosts[to].linked {
                        self.net.push_back(Message::Order(to, order));
                    }
                }
                MonOutput::Kill { .. } => {}
                MonOutput::Reply { answer, .. } => self.tell(|| format!("monitor answers: {answer:?}")),
                MonOutput::Audit(line) => self.tell(|| {
                    let host = line.host.map(|h| format!("{h}: ")).unwrap_or_default();
                    format!("monitor: {host}{}", line.text)
                }),
            }
        }
    }

    pub(crate) fn command(&mut self, command: Command) {
        self.decide(MonInput::Command { id: RequestId(1), command, who: "operator".to_owned() });
        self.settle();
    }

    pub(crate) fn restart_monitor(&mut self, keeps_disk: bool) {
        let config = (*self.config).clone();
        let saved = self.disk.clone().filter(|_| keeps_disk);
        let saved = saved.map(|(snapshot, at)| (snapshot, Duration::from_millis(self.now - at)));
        let unix_s = 1_000_000 + (self.now - BEGIN) / 1000;
        self.monitor = MonCore::new(config, saved, unix_s, Millis(self.now));
        for i in 0..self.hosts.len() {
            self.hosts[i].linked = false;
            self.agent(i, AgentInput::MonitorDown { why: "closed".to_owned() });
        }
        self.decide(MonInput::Network { reachable: true });
        self.settle();
    }

    fn speaks(&self, host: usize) -> bool {
        let cut = self.cuts.contains(&(host, MONITOR)) || self.cuts.contains(&(MONITOR, host));
        !cut && !self.hosts[host].paused
    }

    fn settle_links(&mut self) {
        for i in 0..self.hosts.len() {
            let speaks = self.speaks(i);
            let host = &mut self.hosts[i];
            if speaks {
                host.silent = 0;
                if !host.linked {
                    host.linked = true;
                    let boot = host.boot;
                    self.decide(MonInput::AgentUp { host: name(i), boot, version: "model".to_owned() });
                    self.agent(i, AgentInput::MonitorUp);
                }
            } else if host.linked {
                host.silent += 1;
                if host.silent >= PATIENCE {
                    self.unlink(i, "no report in time");
                }
            }
        }
        self.decide(MonInput::Network { reachable: true });
    }

    pub(crate) fn unlink(&mut self, i: usize, why: &str) {
        let host = &mut self.hosts[i];
        host.silent = 0;
        if std::mem::take(&mut host.linked) {
            self.decide(MonInput::AgentDown { host: name(i), why: why.to_owned() });
            self.agent(i, AgentInput::MonitorDown { why: why.to_owned() });
        }
    }

    /// All checks of all hosts; and servers replicate, clients write, watchers look.
    fn check(&mut self) {
        self.beat();
        for i in 0..self.hosts.len() {
            let reached = !self.cuts.contains(&(i, MONITOR)) && !self.cuts.contains(&(MONITOR, i));
            let server = &self.hosts[i].server;
            let serves = reached && server.answers();
            let threads = server.io && server.sql && self.source_answers(i);
            let verdict = |ok: bool| {
                if ok { CheckResult::Ok(String::new()) } else { CheckResult::Error("no answer".to_owned()) }
            };
            let unknown = || CheckResult::Unknown("no answer".to_owned());
            for (check, result) in [
                (CheckKind::Ping, verdict(reached)),
                (CheckKind::Mysql, verdict(serves)),
                (CheckKind::RepThreads, if serves { verdict(threads) } else { unknown() }),
                (CheckKind::RepBacklog, if serves { verdict(true) } else { unknown() }),
            ] {
                self.decide(MonInput::Check { host: name(i), check, result });
            }
        }
    }

    // ---- the agents -----------------------------------------------------------------------------------------------

    pub(crate) fn restart_agent(&mut self, i: usize, reboot: bool) {
        if reboot {
            self.hosts[i].kernel.clear();
            self.hosts[i].machine += 1;
            self.hosts[i].server.restart();
        }
        self.unlink(i, "connection closed");
        let now = self.now;
        let count = self.hosts.len();
        let host = &mut self.hosts[i];
        host.boot = Boot(host.boot.0 + 1);
        let machine = format!("machine-{}", host.machine);
        host.core = AgentCore::new(&config::agent(count, i), host.disk.clone(), host.boot, machine, None, Millis(now));
        host.paused = false;
        host.pile.clear();
        host.told = None;
        host.probes.clear();
        host.minded = None;
        host.server.task = None;
        self.settle();
    }

    pub(crate) fn resume(&mut self, i: usize, tick_first: bool) {
        self.hosts[i].paused = false;
        if tick_first {
            self.agent(i, AgentInput::Tick);
        }
        for input in std::mem::take(&mut self.hosts[i].pile) {
            self.agent(i, input);
        }
        if !tick_first {
            self.agent(i, AgentInput::Tick);
        }
        self.settle();
    }

    pub(crate) fn agent(&mut self, i: usize, input: AgentInput) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let host = &mut self.hosts[i];
            if host.paused {
                host.pile.push(input);
                continue;
            }
            if let AgentInput::Order(order) = &input {
                host.heard = self.now;
                for (ip, word) in &order.addresses {
                    if let AddressOrder::Hold(hold) = word {
                        host.proved.insert(*ip, hold.proof);
                    }
                }
            }
            let mut out = Vec::new();
            host.core.handle(Millis(self.now), input, &mut out);
            for output in out {
                self.done(i, output, &mut inputs);
            }
        }
    }

    /// As the shell carries it out.
    fn done(&mut self, i: usize, output: AgentOutput, inputs: &mut VecDeque<AgentInput>) {
        let now = self.now;
        let host = &mut self.hosts[i];
        match output {
            AgentOutput::Persist(saved) => host.disk = Some(saved),
            AgentOutput::LookUp { asked } => {
                inputs.push_back(AgentInput::Kernel { asked, present: host.kernel.keys().copied().collect() });
            }
            AgentOutput::Send(report) => {
                host.sent.entry(report.anchor.boot).or_default().push((report.anchor.seq, now));
                if host.linked {
                    self.net.push_back(Message::Report(i, report));
                }
            }
            AgentOutput::Ask { to, request } => {
                let sent = host.sent.entry(request.anchor.boot).or_default();
                if sent.last().is_none_or(|(seq, _)| *seq != request.anchor.seq) {
                    sent.push((request.anchor.seq, now));
                }
                let Some(to) = place(&to) else { return };
                self.net.push_back(Message::Ask { from: i, to, request });
            }
            AgentOutput::Vouch { ask: AskId(to), answer } => {
                self.net.push_back(Message::Vouch { from: i, to: to as usize, answer });
            }
            AgentOutput::Audit(Audit::Info(text) | Audit::Warn(text) | Audit::Error(text)) => {
                self.tell(|| format!("{}: {text}", name(i)));
            }
            AgentOutput::Do(step) => match step {
                Step::Address { ip, lifetime_s, until } => {
                    let result = if now < until.0 {
                        let gone = now + u64::from(lifetime_s) * 1000 + KERNEL_LATE;
                        host.kernel.insert(ip, gone);
                        if self.had.insert(ip, i).is_some_and(|before| before != i) {
                            self.moved.push(host.proved.get(&ip).copied().unwrap_or(false));
                        }
                        Ok(())
                    } else {
                        Err("the lease has ended".to_owned())
                    };
                    inputs.push_back(AgentInput::Done { step, result });
                    // Looked at before the agent goes on.
                    self.look();
                }
                // Nobody has the exact guard here, nor kills a server.
                Step::Allow { .. } | Step::KillServer => {}
                Step::Remove { ip, .. } => {
                    host.kernel.remove(&ip);
                    inputs.push_back(AgentInput::Done { step, result: Ok(()) });
                }
                Step::Announce { .. } => {}
                Step::Probe { ip } => host.probes.push((now + PROBE, ip)),
                Step::ReadOnly
                | Step::Writable { .. }
                | Step::Follow { .. }
                | Step::Detach
                | Step::SemiSync { .. }
                | Step::Task(_)
                | Step::Job(_) => {
                    self.serve(i, step, inputs);
                }
            },
            AgentOutput::Exit => {}
        }
    }

    // ---- the servers ----------------------------------------------------------------------------------------------

    /// The I/O thread is connected.
    pub(crate) fn source_answers(&self, i: usize) -> bool {
        let server = &self.hosts[i].server;
        let source = server.source;
        let wire = !self.cuts.contains(&(i, source)) && !self.cuts.contains(&(source, i));
        server.answers() && wire && self.hosts[source].server.answers()
    }

    fn serve(&mut self, i: usize, step: Step, inputs: &mut VecDeque<AgentInput>) {
        let now = self.now;
        let server = &mut self.hosts[i].server;
        if let Step::Task(task) = step {
            match server.begin(task, now) {
                None => self.work_into(i, inputs),
                Some(failed) => inputs.push_back(failed),
            }
            return;
        }
        if let Step::Job(job) = step {
            // Nobody's data are changed here: what is extra stays extra.
            let state = JobState::Failed { why: "not in this world".to_owned() };
            inputs.push_back(AgentInput::Job { id: job.id, state });
            return;
        }
        let source = if let Step::Follow { host } = &step { place(host) } else { None };
        let result = server.carry_out(&step, source, now);
        // The end of an opening step overtakes the look that shows it.
        let opened = matches!(step, Step::Writable { .. }) && result.is_ok();
        inputs.push_back(AgentInput::Done { step, result });
        self.look();
        if let Some(look) = self.watch(i) {
            inputs.push_back(look);
            if !opened {
                let last = inputs.len() - 1;
                inputs.swap(last - 1, last);
            }
        }
    }

    fn beat(&mut self) {
        let writer = |host: &&mut Host| host.server.answers() && host.kernel.contains_key(&WRITER);
        // A client writes when the last write is everywhere it can get to, so that one at most is not.
        let behind: Vec<bool> = (0..self.hosts.len())
            .map(|i| {
                let mut others = (0..self.hosts.len()).filter(|j| *j != i);
                others.any(|j| self.hosts[j].server.source == i && !self.source_answers(j))
            })
            .collect();
        for (i, host) in self.hosts.iter_mut().enumerate() {
            if writer(&host) {
                host.server.written_by_clients(i, behind[i]);
            }
        }
        for i in 0..self.hosts.len() {
            let source = self.hosts[i].server.source;
            let there = self.source_answers(i).then(|| self.hosts[source].server.executed.clone());
            self.hosts[i].server.replicate(there.as_ref());
        }
        for i in 0..self.hosts.len() {
            self.work(i);
        }
    }

    /// What its watcher sees, and its worker has done, by now.
    fn work(&mut self, i: usize) {
        if self.hosts[i].paused {
            return;
        }
        let mut inputs: VecDeque<AgentInput> = self.watch(i).into_iter().collect();
        self.work_into(i, &mut inputs);
        for input in inputs {
            self.agent(i, input);
        }
    }

    fn work_into(&mut self, i: usize, inputs: &mut VecDeque<AgentInput>) {
        let now = self.now;
        if let Some(done) = self.hosts[i].server.worked(now) {
            inputs.extend(self.watch(i));
            inputs.push_back(done);
        }
    }

    fn watch(&mut self, i: usize) -> Option<AgentInput> {
        let connected = self.source_answers(i);
        let now = self.now;
        let host = &mut self.hosts[i];
        let report = host.server.looks(host.told.as_ref(), ip(host.server.source), connected, now);
        if host.told.as_ref() == Some(&report) {
            return None;
        }
        host.told = Some(report.clone());
        Some(AgentInput::Server(report))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Kernel(usize),
    Probe(usize),
    Server(usize),
    Agent(usize),
    Monitor,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::whole::render::key;

    #[test]
    fn a_second_open_server_and_a_second_holder_are_found() {
        let mut w = World::healthy(2);
        w.look();
        assert!(!w.two_open && !w.two_holders);
        w.hosts[1].server.read_only = false;
        w.look();
        assert!(w.two_open && !w.two_holders);
        let gone = w.now + 1;
        w.hosts[1].kernel.insert(WRITER, gone);
        w.look();
        assert!(w.two_holders);
    }

    #[test]
    fn a_healthy_cluster_comes_back_to_the_same_state_and_a_cut_is_another_one() {
        let mut w = World::healthy(2);
        let before = key(&w);
        w.pass(None);
        assert_eq!(key(&w), before, "only time has passed");
        w.cuts.insert((0, 1));
        assert_ne!(key(&w), before);
    }
}

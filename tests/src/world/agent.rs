//! The agents' processes in the simulated world: each host's core, its disk, its ends and pauses.
//!
//! A stopped process (SIGSTOP) handles nothing while its kernel goes on, and finds all that came meanwhile when it goes
//! on. A machine that stands still (a paused virtual machine) answers nobody; when it wakes, the kernel's timers and
//! the agent come before any packet is answered. If its clock has stood still too, nothing but the margin covers that.

use super::kernel::PROBE;
use super::server::STEP;
use super::{Event, Frozen, World};
use crate::invariants::Seen;
use mmm_agent_core::Core as AgentCore;
use mmm_agent_core::io::{AskId, Audit, Input as AgentInput, Output as AgentOutput, Step};
use mmm_common::config::Agent as AgentConfig;
use mmm_common::epoch::Boot;
use mmm_common::ids::HostName;
use mmm_common::vouch::{VouchAnswer, VouchRequest};
use std::collections::{BTreeMap, VecDeque};

impl World {
    pub fn start_agent(&mut self, name: &HostName) {
        let mut cluster = self.config.cluster.clone();
        cluster.lease_ttl = self.agents_lease_ttl.unwrap_or(cluster.lease_ttl);
        let config = AgentConfig::of(cluster, name.clone());
        let Some(host) = self.hosts.get_mut(name) else { return };
        host.boots += 1;
        let boot = Boot(host.boots);
        let machine = format!("machine-{}", host.machine_boot);
        let now = host.clock.shows(self.now);
        // As the shell does it: without the guard, what a life with it has left is given up first; with it, what one
        // without it has left is armed for the rest of its lifetime.
        let mut guard = None;
        if host.guarded {
            let tables = host.allowed.get_or_insert_with(|| host.kernel.clone());
            let armed = tables.iter().filter(|(_, until)| **until > self.now);
            guard = Some(armed.map(|(ip, until)| (*ip, host.clock.shows(*until))).collect());
        } else if host.allowed.is_some() || host.saved.as_ref().is_some_and(|s| s.guarded) {
            host.kernel.clear();
            host.allowed = None;
        }
        host.agent = Some(AgentCore::new(&config, host.saved.clone(), boot, machine, guard, now));
        host.told = None;
        host.minded_since = None;
        host.steps.clear();
        host.stopped = false;
        host.pile.clear();
        host.tick = None;
        self.seen.push(Seen::AgentStarted { host: name.clone(), boot, at: now });
        self.plan_agent_tick(name, self.now);
    }

    /// SIGKILL.
    pub fn stop_agent(&mut self, name: &str) {
        let name = HostName::from(name);
        self.end_process(&name);
        self.unlink(&name, "connection closed");
    }

    /// SIGTERM.
    pub fn end_agent(&mut self, name: &str) {
        self.agent_input(&HostName::from(name), AgentInput::Shutdown { keep: false });
    }

    fn end_process(&mut self, name: &HostName) {
        let Some(host) = self.hosts.get_mut(name) else { return };
        host.agent = None;
        host.stopped = false;
        host.pile.clear();
    }

    pub fn has_agent(&self, name: &str) -> bool {
        self.hosts.get(&HostName::from(name)).is_some_and(|h| h.agent.is_some())
    }

    /// SIGSTOP.
    pub fn pause_agent(&mut self, name: &str) {
        let host = self.host(name);
        host.stopped = host.agent.is_some();
    }

    pub fn resume_agent(&mut self, name: &str) {
        if std::mem::take(&mut self.host(name).stopped) {
            let first = self.any(2) == 0;
            self.go_on(&name.into(), first);
        }
    }

    /// The machine loses power: its kernel forgets all.
    pub fn crash_host(&mut self, name: &str) {
        self.kill_server(name);
        let host = self.host(name);
        host.kernel.clear();
        host.allowed = None;
        host.alive = false;
        host.frozen = None;
        host.machine_boot += 1;
        self.end_process(&name.into());
        self.seen.push(Seen::Crashed { host: name.into() });
        self.unlink(&HostName::from(name), "no answer");
    }

    pub fn boot_host(&mut self, name: &str) {
        self.host(name).alive = true;
        self.start_server(name);
        self.start_agent(&HostName::from(name));
    }

    pub fn is_alive(&self, name: &str) -> bool {
        self.hosts.get(&HostName::from(name)).is_some_and(|h| h.alive)
    }

    /// The machine stands still. `clock_goes_on`: at its wake CLOCK_BOOTTIME and the kernel's timers show what passed.
    pub fn freeze_host(&mut self, name: &str, clock_goes_on: bool) {
        let since = self.now;
        let host = self.host(name);
        if host.alive && host.frozen.is_none() {
            host.frozen = Some(Frozen { since, clock_goes_on });
        }
    }

    /// Its clock may stand still for a moment (0.3 s): not again soon, for the margin covers no more.
    pub fn clock_may_stand(&self, name: &str) -> bool {
        self.hosts.get(&HostName::from(name)).is_some_and(|h| self.now - h.clock_stood_until > 10_000)
    }

    pub fn is_frozen(&self, name: &str) -> bool {
        self.hosts.get(&HostName::from(name)).is_some_and(|h| h.frozen.is_some())
    }

    pub fn is_paused(&self, name: &str) -> bool {
        self.hosts.get(&HostName::from(name)).is_some_and(|h| h.stopped)
    }

    pub fn wake_host(&mut self, name: &str) {
        let now = self.now;
        let host = self.host(name);
        let Some(frozen) = host.frozen.take() else { return };
        let lost = now - frozen.since;
        if !frozen.clock_goes_on {
            host.clock.stood_still(frozen.since, now);
            host.clock_stood_until = now;
            let gone: Vec<u64> = host
                .kernel
                .values_mut()
                .map(|at| {
                    *at += lost;
                    *at
                })
                .collect();
            for until in host.allowed.iter_mut().flat_map(BTreeMap::values_mut) {
                *until += lost;
            }
            for at in gone {
                self.after(at - now, Event::Expire(name.into()));
            }
        }
        self.expire(&name.into());
        if !self.is_paused(name) {
            self.go_on(&name.into(), true);
        }
    }

    /// What came while the process stood still, and a tick: it may be handled first or last.
    fn go_on(&mut self, name: &HostName, tick_first: bool) {
        let Some(host) = self.hosts.get_mut(name) else { return };
        let mut inputs: VecDeque<AgentInput> = std::mem::take(&mut host.pile);
        if tick_first {
            inputs.push_front(AgentInput::Tick);
        } else {
            inputs.push_back(AgentInput::Tick);
        }
        for input in inputs {
            self.agent_input(name, input);
        }
    }

    pub(super) fn agent_tick(&mut self, name: &HostName, boot: Boot) {
        let now = self.now;
        let Some(host) = self.hosts.get_mut(name) else { return };
        if Boot(host.boots) != boot || host.tick != Some(now) || !host.runs() {
            return;
        }
        host.tick = None;
        self.ticks += 1;
        self.agent_input(name, AgentInput::Tick);
    }

    fn plan_agent_tick(&mut self, name: &HostName, at: u64) {
        let now = self.now;
        let Some(host) = self.hosts.get_mut(name) else { return };
        if host.tick != Some(at) {
            host.tick = Some(at);
            let boot = Boot(host.boots);
            self.after(at - now, Event::AgentTick(name.clone(), boot));
        }
    }

    pub(super) fn asked(&mut self, from: HostName, to: &HostName, request: VouchRequest) {
        self.number += 1;
        let ask = AskId(self.number);
        self.asks.insert(ask, (from.clone(), request.guarded));
        self.agent_input(to, AgentInput::Asked { ask, from, request });
    }

    pub(super) fn vouched(&mut self, by: HostName, to: &HostName, answer: VouchAnswer) {
        self.agent_input(to, AgentInput::Vouched { by, answer });
    }

    pub(super) fn agent_input(&mut self, name: &HostName, input: AgentInput) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let Some(host) = self.hosts.get_mut(name) else { return };
            let now = host.clock.shows(self.now);
            if host.agent.is_none() {
                return;
            }
            if !host.runs() {
                host.pile.push_back(input);
                continue;
            }
            match &input {
                AgentInput::Order(order) => {
                    self.seen.push(Seen::Ordered { host: name.clone(), order: order.clone(), at: now });
                }
                AgentInput::Vouched { by, answer } => {
                    self.seen.push(Seen::Answered { host: name.clone(), by: by.clone(), answer: answer.clone() });
                }
                AgentInput::Tick
                | AgentInput::MonitorUp
                | AgentInput::MonitorDown { .. }
                | AgentInput::Kernel { .. }
                | AgentInput::KernelUnreadable { .. }
                | AgentInput::KernelChanged
                | AgentInput::Server(_)
                | AgentInput::PeerUp { .. }
                | AgentInput::PeerDown { .. }
                | AgentInput::Asked { .. }
                | AgentInput::Probed { .. }
                | AgentInput::Done { .. }
                | AgentInput::TaskDone { .. }
                | AgentInput::Job { .. }
                | AgentInput::Shutdown { .. } => {}
            }
            let Some(core) = &mut host.agent else { return };
            let mut out = Vec::new();
            core.handle(now, input, &mut out);
            let deadline = core.next_deadline();
            let mut ended = false;
            for output in out {
                self.agent_output(name, output, &mut inputs, &mut ended);
            }
            if let Some((at, _)) = deadline {
                let at = self.hosts[name].clock.when(at).max(self.now + 1);
                self.plan_agent_tick(name, at);
            }
            if ended {
                self.end_process(name);
                let host = self.host(name.as_str());
                if host.kernel.is_empty() {
                    host.allowed = None;
                }
                // Its last words arrive before the end of the connection is seen.
                let ms = self.delivery(name, false);
                self.after(ms + 1, Event::Ended(name.clone()));
            }
        }
    }

    /// As the shell carries it out.
    fn agent_output(
        &mut self,
        name: &HostName,
        output: AgentOutput,
        inputs: &mut VecDeque<AgentInput>,
        ended: &mut bool,
    ) {
        let Some(host) = self.hosts.get_mut(name) else { return };
        let at = host.clock.shows(self.now);
        match output {
            AgentOutput::Persist(saved) => {
                host.saved = Some(saved);
                self.seen.push(Seen::Saved);
            }
            AgentOutput::LookUp { asked } => {
                inputs.push_back(AgentInput::Kernel { asked, present: host.kernel.keys().copied().collect() });
            }
            AgentOutput::Send(report) => {
                self.seen.push(Seen::Sent { host: name.clone(), anchor: report.anchor, at });
                if host.linked {
                    let ms = self.delivery(name, false);
                    self.after(ms, Event::Report(name.clone(), report));
                }
            }
            AgentOutput::Ask { to, request } => {
                self.seen.push(Seen::Sent { host: name.clone(), anchor: request.anchor, at });
                let ms = self.peer_delivery();
                self.send(ms, Event::Ask(name.clone(), to, request));
            }
            AgentOutput::Vouch { ask, answer } => {
                let ms = self.peer_delivery();
                if let Some((to, guarded)) = self.asks.remove(&ask) {
                    let answer_ = (*answer).clone();
                    self.seen.push(Seen::Promised { host: name.clone(), answer: answer_, guarded, at });
                    self.send(ms, Event::Vouch(name.clone(), to, answer));
                }
            }
            AgentOutput::Audit(Audit::Info(text) | Audit::Warn(text) | Audit::Error(text)) => {
                self.tell(format!("{name}: {text}"));
            }
            AgentOutput::Do(step) => match step {
                Step::Address { ip, lifetime_s, until } => {
                    let fresh = !host.kernel.contains_key(&ip);
                    let result = self.add_address(name, ip, lifetime_s, until);
                    if result.is_ok() {
                        self.seen.push(Seen::Taken { host: name.clone(), ip, until, fresh, at });
                    }
                    inputs.push_back(AgentInput::Done { step, result });
                }
                Step::Allow { ip, until } => {
                    let result = self.allow_address(name, ip, until);
                    if result.is_ok() {
                        self.seen.push(Seen::Taken { host: name.clone(), ip, until, fresh: false, at });
                    }
                    inputs.push_back(AgentInput::Done { step, result });
                }
                Step::Remove { ip, .. } => {
                    host.kernel.remove(&ip);
                    if let Some(tables) = &mut host.allowed {
                        tables.remove(&ip);
                    }
                    inputs.push_back(AgentInput::Done { step, result: Ok(()) });
                }
                Step::Announce { .. } => {}
                Step::KillServer => {
                    self.kill_server(name.as_str());
                    inputs.push_back(AgentInput::Done { step, result: Ok(()) });
                }
                Step::Probe { ip } => {
                    let boot = Boot(host.boots);
                    let answered_by = self.other_holder(name, ip).map(|h| format!("the MAC address of {h}"));
                    let probed = Box::new(AgentInput::Probed { ip, answered_by });
                    self.after(PROBE, Event::Local(name.clone(), boot, probed));
                }
                Step::ReadOnly
                | Step::Writable { .. }
                | Step::Follow { .. }
                | Step::Detach
                | Step::SemiSync { .. }
                | Step::Task(_)
                | Step::Job(_) => {
                    host.steps.push_back(step);
                    self.after(STEP, Event::ServerStep(name.clone()));
                }
            },
            AgentOutput::Exit => *ended = true,
        }
    }
}

//! The network of the simulated world: which messages arrive, when, and how often.
//!
//! A cut has a direction. Messages on one connection stay in order, but those of an earlier connection may still come,
//! and with `echo` orders and vouches come a second time long after, as if the shells had been fooled: the cores have
//! to refuse them by themselves.

use super::{Event, World};
use mmm_agent_core::io::Input as AgentInput;
use mmm_common::epoch::Boot;
use mmm_common::ids::HostName;
use mmm_mon_core::io::Input as MonInput;

/// One way, in simulated milliseconds.
pub(super) const DELAY: u64 = 1;
/// How late an echo comes at most.
const ECHO_WITHIN: u64 = 10_000;

/// The monitor's place in the network.
pub const MONITOR: &str = "monitor";

impl World {
    /// Nothing that `from` sends gets to `to`; the way back is not touched. Either may be [`MONITOR`].
    pub fn cut_way(&mut self, from: &str, to: &str) {
        self.ways_cut.insert((from.into(), to.into()));
    }

    pub fn cut_between(&mut self, one: &str, other: &str) {
        self.cut_way(one, other);
        self.cut_way(other, one);
    }

    /// Cut from the monitor and all other hosts, but not from clients.
    pub fn isolate(&mut self, name: &str) {
        self.cut_between(name, MONITOR);
        let others: Vec<HostName> = self.hosts.keys().filter(|n| n.as_str() != name).cloned().collect();
        for other in others {
            self.cut_between(name, other.as_str());
        }
    }

    pub fn end_cuts(&mut self) {
        self.cut.clear();
        self.unseen.clear();
        self.ways_cut.clear();
    }

    /// What one sends gets to the other. Either may be [`MONITOR`].
    pub(super) fn passes(&self, from: &HostName, to: &HostName) -> bool {
        let whole = |name: &HostName| {
            !self.cut.contains(name) && self.hosts.get(name).is_none_or(|h| h.alive && h.frozen.is_none())
        };
        let unseen = (to.as_str() == MONITOR && self.unseen.contains(from))
            || (from.as_str() == MONITOR && self.unseen.contains(to));
        whole(from)
            && whole(to)
            && !unseen
            && (self.ways_cut.is_empty() || !self.ways_cut.contains(&(from.clone(), to.clone())))
    }

    pub(super) fn is_heard_by_monitor(&self, name: &HostName) -> bool {
        self.passes(name, &MONITOR.into())
    }

    pub(super) fn hears_monitor(&self, name: &HostName) -> bool {
        self.passes(&MONITOR.into(), name)
    }

    /// The monitor and the host hear each other.
    pub(super) fn is_reached(&self, name: &HostName) -> bool {
        self.is_heard_by_monitor(name) && self.hears_monitor(name)
    }

    /// What one agent sends arrives at the other.
    pub(super) fn peers(&self, from: &HostName, to: &HostName) -> bool {
        self.has_agent(from.as_str()) && self.has_agent(to.as_str()) && self.passes(from, to)
    }

    /// How long a message sent now on the link takes.
    pub(super) fn delivery(&mut self, name: &HostName, to_agent: bool) -> u64 {
        let at = self.now + self.peer_delivery();
        let last = self.last_delivery.entry((name.clone(), to_agent)).or_insert(0);
        *last = at.max(*last);
        *last - self.now
    }

    /// How long a message between two agents takes; they come in any order.
    pub(super) fn peer_delivery(&mut self) -> u64 {
        let more = if self.jitter > 0 { self.any(self.jitter) } else { 0 };
        DELAY + more
    }

    /// Sends; perhaps it also comes a second time.
    pub(super) fn send(&mut self, ms: u64, event: Event) {
        if self.echo > 0 && self.any(100) < self.echo {
            let late = ms + self.any(ECHO_WITHIN);
            self.after(late, Event::Echo(Box::new(event.clone())));
        }
        self.after(ms, event);
    }

    /// The monitor's shell tries to connect, or finds that a connection is silent.
    pub(super) fn link(&mut self, name: HostName) {
        if self.monitor.is_none() {
            return;
        }
        self.after(500, Event::Link(name.clone()));
        let reached = self.is_reached(&name);
        let Some(host) = self.hosts.get_mut(&name) else { return };
        let speaks = reached && host.agent.is_some() && !host.stopped;
        if self.monitor_stopped {
            return;
        }
        if !host.linked && speaks {
            host.linked = true;
            host.silent_since = None;
            let boot = Boot(host.boots);
            self.monitor_input(MonInput::AgentUp { host: name.clone(), boot, version: "sim".into() });
            self.agent_input(&name, AgentInput::MonitorUp);
        } else if host.linked && !speaks {
            let since = *host.silent_since.get_or_insert(self.now);
            if self.now - since >= self.link_patience {
                self.unlink(&name, "no report in time");
            }
        } else if speaks {
            host.silent_since = None;
        }
    }

    pub(super) fn unlink(&mut self, name: &HostName, why: &str) {
        let Some(host) = self.hosts.get_mut(name) else { return };
        if std::mem::take(&mut host.linked) {
            host.silent_since = None;
            self.monitor_input(MonInput::AgentDown { host: name.clone(), why: why.to_owned() });
            self.agent_input(name, AgentInput::MonitorDown { why: why.to_owned() });
        }
    }
}

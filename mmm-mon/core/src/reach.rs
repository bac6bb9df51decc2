//! Whom the monitor can reach, and what peers tell of those it cannot (safety.md, "Peers as observers").
//!
//! Silence means little when the monitor itself was stopped or is cut off, and nothing while a peer sees the host at work.

use crate::io::Output;
use crate::{Core, info, warn};
use mmm_common::config::Cluster;
use mmm_common::ids::{HostName, Millis};
use mmm_common::state::HostState;
use std::time::Duration;

/// A deadline that is handled so late was not waited for: the process was stopped.
const LATE: Duration = Duration::from_millis(500);

impl Core {
    /// A process that was stopped, or had no processor, finds everybody silent before it has read what they said
    /// meanwhile. So nobody is called silent, and no check failed, before they have had the time to be heard.
    pub(crate) fn notice_a_pause(&mut self, now: Millis, out: &mut Vec<Output>) {
        let Some((due, _)) = self.due.filter(|(due, _)| now.since(*due) >= LATE) else { return };
        let late = now.since(due).as_millis();
        warn(
            out,
            None,
            format!(
                "This monitor was stopped, or had no processor: it is {late} ms late. Silence and failed checks count anew"
            ),
        );
        self.woke = Some(now);
        self.hosts.values_mut().for_each(|h| h.facts.excuse(now));
    }

    /// No agent answers at all. That all of them have died is less likely than that this monitor is cut off; and if they
    /// have, there is nobody who could be given anything. They vouch for each other meanwhile.
    pub(crate) fn is_cut_off(&self) -> bool {
        !self.hosts.keys().any(|name| self.agent_answers(self.now, name))
    }

    /// Whoever was cut off finds everybody silent, and checks that failed, before all are connected again.
    pub(crate) fn notice_a_return(&mut self, now: Millis, out: &mut Vec<Output>) {
        let cut_off = self.is_cut_off();
        let starting = now.since(self.started) < self.startup_grace();
        if cut_off && !self.told_cut_off && !starting {
            self.told_cut_off = true;
            let text = "No agent answers: this monitor may be cut off, and changes nothing until one does";
            warn(out, None, text.to_owned());
        } else if !cut_off && std::mem::take(&mut self.told_cut_off) {
            info(out, None, "Agents answer again: silence and failed checks count anew".to_owned());
        }
        if cut_off || !self.network {
            self.woke = Some(now);
            self.hosts.values_mut().for_each(|h| h.facts.excuse(now));
        }
    }

    /// How old a report may be for its agent to be given something new.
    pub(crate) fn agent_limit(&self) -> Duration {
        self.config.cluster.heartbeat_interval * 3
    }

    /// Agents need a moment to be connected after a start of the monitor.
    pub(crate) fn startup_grace(&self) -> Duration {
        self.config.cluster.lease_ttl + Cluster::MARGIN
    }

    pub(crate) fn agent_answers(&self, now: Millis, name: &HostName) -> bool {
        self.hosts.get(name).is_some_and(|h| h.facts.agent_answers(now, self.agent_limit()))
    }

    /// The agent has been told to end: its roles go elsewhere while it can still help with that.
    pub(crate) fn is_leaving(&self, name: &HostName) -> bool {
        self.hosts.get(name).and_then(|h| h.facts.report.as_ref()).is_some_and(|r| r.leaving)
    }

    pub(crate) fn agent_stays(&self, now: Millis, name: &HostName) -> bool {
        self.agent_answers(now, name) && !self.is_leaving(name)
    }

    /// The agent was heard recently enough for its leases to run on, or may not have had the time to say anything; or
    /// one of its peers vouches for it.
    pub(crate) fn agent_may_hold(&self, now: Millis, name: &HostName) -> bool {
        let starting = now.since(self.started) < self.startup_grace();
        !self.is_silent(now, name) || starting || self.seen_by(now, name).is_some()
    }

    pub(crate) fn is_silent(&self, now: Millis, name: &HostName) -> bool {
        let awake = self.woke.is_none_or(|at| now.since(at) >= self.config.cluster.lease_ttl);
        awake && self.hosts.get(name).is_some_and(|h| now.since(h.facts.heard) >= self.config.cluster.lease_ttl)
    }

    /// A peer that has vouched for this host within lease_ttl, as it tells itself, while the monitor cannot reach the
    /// host (safety.md, "Peers as observers"). A host that has just died was vouched for up to its last moment too: so
    /// only a vouch that is clearly younger than the monitor's own last word from the host tells more than that word.
    pub(crate) fn seen_by(&self, now: Millis, name: &HostName) -> Option<&HostName> {
        let last_word = self.hosts.get(name).map(|h| now.since(h.facts.heard))?;
        if self.agent_answers(now, name) {
            return None;
        }
        let Cluster { lease_ttl, heartbeat_interval, .. } = &self.config.cluster;
        self.hosts.iter().find_map(|(peer, host)| {
            let ago =
                Duration::from_millis(*host.facts.report.as_ref()?.vouched.get(name)?) + now.since(host.facts.heard);
            (ago < *lease_ttl && ago + *heartbeat_interval <= last_word).then_some(peer)
        })
    }

    /// Before checks are judged.
    pub(crate) fn excuse_unreachable(&mut self, now: Millis) {
        let seen: Vec<HostName> = self.hosts.keys().filter(|h| self.seen_by(now, h).is_some()).cloned().collect();
        for name in seen {
            if let Some(host) = self.hosts.get_mut(&name) {
                host.facts.excuse(now);
            }
        }
    }

    /// Why a host that the monitor cannot reach is left alone.
    pub(crate) fn remark_observers(&mut self, now: Millis, out: &mut Vec<Output>) {
        let names: Vec<HostName> = self.hosts.keys().cloned().collect();
        for name in names {
            // A host that has just died was seen a moment ago too: that is not worth a line.
            let limit = self.config.cluster.lease_ttl + self.config.cluster.heartbeat_interval;
            let away = self.hosts.get(&name).is_some_and(|h| {
                let down = h.status.state == HostState::HardOffline || h.facts.link.is_some();
                !down && now.since(h.facts.heard) >= limit
            });
            let peer = self.seen_by(now, &name).filter(|_| away).cloned();
            let text = peer.map(|peer| {
                format!("Host {name} cannot be reached from the monitor, but is seen by {peer}, which vouches for it: its roles stay")
            });
            self.remark(format!("host {name}"), text, out);
        }
    }
}

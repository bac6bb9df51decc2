//! What agents have on their machines, against what the monitor has decided: conflicts, and who is at work by orders that
//! a monitor without its state does not know (safety.md, R11).

use crate::io::Output;
use crate::slot::Slot;
use crate::{Core, error};
use mmm_common::ids::{HostName, Millis};
use mmm_common::state::{HostState, MonitorMode};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

impl Core {
    /// Two hosts say that the same address is on them. That cannot come from our orders: somebody else's hand. Only at
    /// the start it is not known who is right (safety.md, "modes and outages"); later the epochs tell.
    pub(crate) fn find_contested(&mut self, now: Millis, out: &mut Vec<Output>) {
        let mut on: BTreeMap<IpAddr, BTreeSet<HostName>> = BTreeMap::new();
        for (name, host) in &self.hosts {
            // A report of an earlier connection may have been overtaken, and one that is older than a lease by its end.
            let old = now.since(host.facts.heard) >= self.config.cluster.lease_ttl;
            if old || host.facts.link.as_ref().is_none_or(|l| l.anchor.is_none()) {
                continue;
            }
            for (ip, _) in host.facts.report.iter().flat_map(|r| &r.addresses).filter(|(_, a)| a.present) {
                on.entry(*ip).or_default().insert(name.clone());
            }
        }
        on.retain(|_, hosts| hosts.len() > 1);
        let starting = now.since(self.started) < self.startup_grace();
        let before = std::mem::replace(&mut self.seen_on_several, on.clone());
        for (ip, hosts) in on.iter().filter(|(ip, _)| !before.contains_key(*ip)) {
            let names: Vec<&str> = hosts.iter().map(HostName::as_str).collect();
            let text = format!("Address {ip} is on several hosts: {}", names.join(", "));
            error(out, None, text.clone());
            if starting {
                self.contested.insert(*ip);
                if self.config.careful_startup && self.mode != MonitorMode::Passive {
                    self.switch_mode(MonitorMode::Passive, Some(text), out);
                }
            }
        }
        self.contested.retain(|ip| on.contains_key(ip));
    }

    /// R11: who has an address of which no order is known, because this monitor's state was lost. One that is ONLINE, or
    /// may become so by that, is given it again once the others have answered; anybody else has to let it go.
    pub(crate) fn find_holders(&mut self) {
        let mut found = BTreeMap::new();
        for (ip, slot) in &self.slots {
            let has = |name: &HostName| {
                let host =
                    self.hosts.get(name).filter(|h| h.facts.link.as_ref().is_some_and(|l| l.anchor.is_some()))?;
                let there = host.facts.report.as_ref()?.addresses.get(ip)?;
                (there.present && there.seen.0 > 0).then_some(host)
            };
            let mut holders = slot.unknown().filter_map(|name| has(name).map(|host| (name, host)));
            if let (Some((name, host)), None) = (holders.next(), holders.next())
                && (host.status.state == HostState::Online || !host.status.known)
            {
                found.insert(*ip, name.clone());
            }
        }
        self.found = found;
    }

    /// Whether nothing may be said of the address yet: a let-go at a new epoch ends the vouches on which somebody may be
    /// holding it, so it is said only when it can be answered by all (R11), when something may be decided at all, and when
    /// whoever was found with it can be given it again.
    pub(crate) fn is_unspoken(&self, ip: IpAddr, slot: &Slot) -> bool {
        let answered = |host: &HostName| {
            self.hosts.get(host).is_none_or(|h| h.facts.link.as_ref().is_some_and(|l| l.anchor.is_some()))
        };
        // Its checks may take a moment longer than its agent.
        let ready = self
            .found
            .get(&ip)
            .is_none_or(|found| self.hosts.get(found).is_some_and(|h| h.status.state == HostState::Online));
        let mut unknown = slot.unknown().peekable();
        unknown.peek().is_some()
            && slot.state.holder.is_none()
            && (self.is_held_back() || !ready || !unknown.all(answered))
    }
}

//! Stage 5: one complete order per connected host. Changes are sent at once, renewals in answer to each report.
//!
//! Renewing is not deciding: it goes on in every mode and without a network (safety.md, "modes and outages").

use crate::io::Output;
use crate::slot::Slot;
use crate::states::Compared;
use crate::{Core, Host};
use mmm_common::epoch::Anchor;
use mmm_common::gtid::Gtids;
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::{AddressOrder, Job, Order, ReplicationOrder};
use mmm_common::state::{HostMode, HostState};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

impl Core {
    /// `answer`: the host whose report is being handled; it gets an order whether or not anything changed.
    pub(crate) fn send_orders(&mut self, now: Millis, answer: Option<&HostName>, out: &mut Vec<Output>) {
        let names: Vec<HostName> = self.hosts.keys().cloned().collect();
        for name in names {
            let Some(anchor) = self.hosts[&name].facts.link.as_ref().and_then(|l| l.anchor) else { continue };
            let before = self.sent.get(&name);
            let renew = answer == Some(&name) || before.is_none_or(|o| o.answers.boot != anchor.boot);
            // Looking must not extend leases: what would be sent is compared on copies of nothing but the decision.
            if !renew && before.is_some_and(|o| self.says_the_same(&name, o)) {
                continue;
            }
            // Each sending of a hold order puts off the moment when its lease is surely over (R3). An agent whose report
            // is overdue may never hear of it: the news waits for its next report, and a failover does not.
            let overdue = now.since(self.hosts[&name].facts.heard) > self.config.cluster.heartbeat_interval * 3 / 2;
            if !renew && overdue {
                continue;
            }
            let order = self.order_for(&name, anchor, now);
            self.sent.insert(name.clone(), order.clone());
            out.push(Output::Send { host: name, order: Box::new(order) });
        }
    }

    fn says_the_same(&self, name: &HostName, before: &Order) -> bool {
        let Some(host) = self.hosts.get(name) else { return true };
        before.state == host.status.state
            && before.task == self.handover.task_for(name, &self.config.cluster)
            && before.job == self.job_for(name)
            && before.replication == self.replication_for(name, host)
            && before.wait_for_replica == self.is_acknowledged(name)
            && self.slots.iter().all(|(ip, slot)| match before.addresses.get(ip) {
                Some(AddressOrder::Hold(h)) => {
                    h.epoch == slot.state.epoch && h.proof == slot.others_than(Some(name)).is_empty()
                }
                Some(AddressOrder::LetGo { epoch }) => *epoch == slot.told_epoch(),
                None => self.says_nothing(name, *ip, slot),
            })
    }

    /// Addresses that this host hears nothing of: neither renewed nor taken away.
    fn says_nothing(&self, name: &HostName, ip: IpAddr, slot: &Slot) -> bool {
        let holds = slot.state.holder.as_ref() == Some(name);
        (holds && self.contested.contains(&ip))
            || self.is_unspoken(ip, slot)
            || (slot.state.holder.is_none() && self.found.get(&ip) == Some(name))
    }

    fn order_for(&mut self, name: &HostName, anchor: Anchor, now: Millis) -> Order {
        let silent: BTreeSet<IpAddr> =
            self.slots.iter().filter(|(ip, slot)| self.says_nothing(name, **ip, slot)).map(|(ip, _)| *ip).collect();
        let guarded = self.hosts.get(name).and_then(|h| h.facts.report.as_ref()).is_some_and(|r| r.guarded);
        let spoken = self.slots.iter_mut().filter(|(ip, _)| !silent.contains(ip));
        let addresses: BTreeMap<IpAddr, AddressOrder> =
            spoken.map(|(ip, slot)| (*ip, slot.order_for(name, guarded, now))).collect();
        self.spoken.extend(addresses.keys());
        let wait_for_replica = self.is_acknowledged(name);
        if !wait_for_replica && let Some(host) = self.hosts.get_mut(name) {
            host.facts.waits_for_nobody();
        }
        let host = &self.hosts[name];
        Order {
            answers: anchor,
            lease_ttl_ms: u64::try_from(self.config.cluster.lease_ttl.as_millis()).unwrap_or(0),
            state: host.status.state,
            addresses,
            replication: self.replication_for(name, host),
            wait_for_replica,
            task: self.handover.task_for(name, &self.config.cluster),
            job: self.job_for(name),
        }
    }

    /// Another host that acknowledges is in line with this one, and not known to be down.
    fn is_acknowledged(&self, name: &HostName) -> bool {
        let cluster = &self.config.cluster;
        let acknowledges = |other: &HostName| {
            cluster.semisync_slaves || cluster.hosts.get(other).is_some_and(|h| h.mode == HostMode::Master)
        };
        self.hosts.iter().any(|(other, host)| {
            other != name
                && acknowledges(other)
                && host.compared == Compared::Subset
                && host.status.state != HostState::HardOffline
                && host.facts.gone.is_none()
                && !self.is_rebuilt(other)
        })
    }

    fn job_for(&self, name: &HostName) -> Option<Job> {
        self.returns.get(name)?.job().cloned()
    }

    /// Nobody is pointed at anybody before their data have been compared.
    fn replication_for(&self, name: &HostName, host: &Host) -> ReplicationOrder {
        if !self.handover.is_settled() || self.is_held_back() || self.is_rebuilt(name) {
            return ReplicationOrder::Keep;
        }
        let Some(active) = self.active.as_ref().filter(|a| self.writer_holder() == Some(*a)) else {
            return ReplicationOrder::Keep;
        };
        // A MariaDB master that fetches gets its own transactions back, and its replication position goes ahead of what it
        // has committed: after a crash it would go on from there and lack what it has thrown away (tried, 10.11 and 11.8).
        if name == active && matches!(host.facts.executed(), Some(Gtids::MariaDb(_))) {
            return ReplicationOrder::Detached;
        }
        if name == active {
            let peer = self.config.cluster.hosts.get(name).and_then(|h| h.peer.as_ref());
            let Some(peer) = peer else { return ReplicationOrder::Keep };
            return match self.hosts.get(peer).map(|h| (h.status.state, h.compared)) {
                Some((HostState::HardOffline, _)) | None => ReplicationOrder::Keep,
                Some((_, Compared::Subset)) => ReplicationOrder::Follow { host: peer.clone() },
                Some((_, Compared::Extra(_) | Compared::Lacks(_))) => ReplicationOrder::Detached,
                Some((_, Compared::Open | Compared::Needless)) => ReplicationOrder::Keep,
            };
        }
        match (host.status.state, host.compared) {
            (HostState::HardOffline, _) => ReplicationOrder::Keep,
            (_, Compared::Subset) => ReplicationOrder::Follow { host: active.clone() },
            // Its data may be thrown away: what it would acknowledge is on no second host.
            (_, Compared::Extra(_) | Compared::Lacks(_)) => ReplicationOrder::Detached,
            (_, Compared::Open | Compared::Needless) => ReplicationOrder::Keep,
        }
    }
}

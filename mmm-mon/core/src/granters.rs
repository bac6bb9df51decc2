//! Who can succeed a holder, and therefore has to vouch for it (safety.md, "Choosing granters").

use crate::handover::next;
use crate::io::Output;
use crate::{Core, Host, decided};
use mmm_common::config::Cluster;
use mmm_common::ids::{HostName, Millis};
use mmm_common::state::HostState;
use std::collections::BTreeSet;
use std::time::Duration;

impl Core {
    /// How long a host's agent is silent before the others go on without its vouches: clearly longer than a flap.
    pub(crate) fn absence(&self) -> Duration {
        (self.config.cluster.lease_ttl + Cluster::MARGIN) * 3
    }

    /// Who is no granter (safety.md, "Choosing granters").
    pub(crate) fn excluded(&self, now: Millis) -> BTreeSet<HostName> {
        let is_excluded =
            |host: &Host| host.status.state == HostState::AdminOffline || now.since(host.facts.heard) >= self.absence();
        let seen = |name| self.seen_by(now, name).is_some();
        self.hosts
            .iter()
            .filter(|(name, host)| is_excluded(host) && !seen(name))
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// Who could take each address over, and is asked to vouch for its holder: changed while the holder can hear of it.
    pub(crate) fn choose_granters(&mut self, now: Millis, out: &mut Vec<Output>) {
        let excluded = self.excluded(now);
        let mut changes = Vec::new();
        for (ip, slot) in &self.slots {
            let (Some(holder), Some(before)) = (&slot.state.holder, slot.settled_granters()) else { continue };
            let Some(role) = self.config.cluster.roles.get(&slot.state.role) else { continue };
            if self.writer_ip() == Some(*ip) && !self.handover.is_settled() {
                continue;
            }
            let mut wanted = granters_of(&role.hosts, holder, &excluded);
            // Who joins must be there to vouch: a restarted monitor does not know at once who is away.
            wanted.retain(|host| before.contains(host) || self.agent_answers(now, host));
            if wanted != *before && self.agent_answers(now, holder) {
                changes.push((*ip, holder.clone(), before.clone(), wanted));
            }
        }
        for (ip, holder, before, wanted) in changes {
            let epoch = next(&mut self.epoch);
            let Some(slot) = self.slots.get_mut(&ip) else { continue };
            slot.regrant(epoch, wanted.clone());
            let names = |set: &BTreeSet<HostName>| set.iter().map(HostName::as_str).collect::<Vec<_>>().join(", ");
            let (gone, come) = (names(&(&before - &wanted)), names(&(&wanted - &before)));
            let name = self.address_name(ip);
            if !gone.is_empty() {
                let text = format!(
                    "{gone} is offline: {holder} keeps {name} without its vouch, and {gone} could not take it over if {holder} died silently"
                );
                decided(out, Some(&holder), epoch, text);
            }
            if !come.is_empty() {
                decided(
                    out,
                    Some(&holder),
                    epoch,
                    format!("{come} is back: it vouches for {name} on {holder}, and can take it over"),
                );
            }
        }
    }
}

/// Who may grant to whom: all other hosts of the role that are not offline (safety.md, "Choosing granters").
pub(crate) fn granters_of(hosts: &[HostName], holder: &HostName, excluded: &BTreeSet<HostName>) -> BTreeSet<HostName> {
    hosts.iter().filter(|h| *h != holder && !excluded.contains(*h)).cloned().collect()
}

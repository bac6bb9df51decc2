//! What the kernels of the simulated hosts do with addresses: they remove them by themselves when the lifetime is over,
//! up to a second late (safety.md, guards, 1), and answer for them on the wire as long as the machine runs.

use super::{Event, World};
use mmm_agent_core::io::Input as AgentInput;
use mmm_common::ids::{HostName, Millis};
use std::net::IpAddr;

/// How late the kernel removes an address whose lifetime is over.
pub(crate) const KERNEL_LATE: u64 = 1000;
/// How long three probes on the wire take.
pub(super) const PROBE: u64 = 100;

impl World {
    /// As the agent's shell does it: a lease that has ended meanwhile is an error.
    pub(super) fn add_address(
        &mut self,
        name: &HostName,
        ip: IpAddr,
        lifetime_s: u32,
        until: Millis,
    ) -> Result<(), String> {
        let late = if self.kernels_differ { self.any(KERNEL_LATE + 1) } else { KERNEL_LATE };
        let now = self.now;
        let Some(host) = self.hosts.get_mut(name) else { return Err("no such host".into()) };
        if host.clock.shows(now) >= until {
            return Err("the lease has ended before the address could be added".into());
        }
        let allowed = host.clock.when(until);
        if let Some(tables) = &mut host.allowed {
            tables.insert(ip, allowed);
        }
        let gone = now + host.clock.lasts(u64::from(lifetime_s) * 1000) + late;
        host.kernel.insert(ip, gone);
        self.after(gone - now, Event::Expire(name.clone()));
        Ok(())
    }

    /// As the agent's shell does it.
    pub(super) fn allow_address(&mut self, name: &HostName, ip: IpAddr, until: Millis) -> Result<(), String> {
        if self.guard_fails > 0 && self.any(100) < self.guard_fails {
            return Err("no buffer space available".into());
        }
        let now = self.now;
        let Some(host) = self.hosts.get_mut(name) else { return Err("no such host".into()) };
        let allowed = host.clock.when(until);
        match &mut host.allowed {
            Some(_) if allowed <= now => Err("the lease has ended before the guard could be armed".into()),
            Some(tables) => {
                tables.insert(ip, allowed);
                Ok(())
            }
            None => Err("this agent has no exact guard".into()),
        }
    }

    /// Removes what has outlived its time; an agent that runs is told by the kernel.
    pub(super) fn expire(&mut self, name: &HostName) {
        let now = self.now;
        let Some(host) = self.hosts.get_mut(name) else { return };
        if host.frozen.is_some() {
            return;
        }
        let over: Vec<IpAddr> = host.kernel.iter().filter(|(_, gone)| **gone <= now).map(|(ip, _)| *ip).collect();
        if over.is_empty() {
            return;
        }
        for ip in over {
            self.host(name.as_str()).kernel.remove(&ip);
            self.tell(format!("kernel of {name}: the lifetime of {ip} is over, it is removed"));
        }
        self.agent_input(name, AgentInput::KernelChanged);
    }

    /// Who else would answer on the wire for this address.
    pub(super) fn other_holder(&self, asking: &HostName, ip: IpAddr) -> Option<HostName> {
        self.hosts
            .iter()
            .find(|(name, h)| {
                *name != asking && h.answers_for(ip, self.now) && self.passes(asking, name) && self.passes(name, asking)
            })
            .map(|(name, _)| name.clone())
    }
}

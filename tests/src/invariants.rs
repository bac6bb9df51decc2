//! The rules that hold in the simulated world after every event, one per file. Each has a test in which it is broken,
//! so that none of them is true only because it looks at nothing.
//!
//! They look at what is really there (kernels, disks, servers) and at what was really said ([`Seen`]), and never at
//! what a core believes.

mod epochs;
mod known_on_disk;
mod leases;
pub(crate) mod ledger;
mod lifetimes;
mod live_bounded;
mod open_servers;
mod promises;
mod two_holders;

use crate::world::World;
use ledger::Ledger;
use mmm_common::epoch::{Anchor, Boot};
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::Order;
use mmm_common::vouch::VouchAnswer;
use std::net::IpAddr;

/// What happened since the rules were last looked at, in order; `at` on the clock of the host.
#[derive(Clone, Debug)]
pub(crate) enum Seen {
    AgentStarted {
        host: HostName,
        boot: Boot,
        at: Millis,
    },
    Crashed {
        host: HostName,
    },
    /// A report or a request to vouch left the agent.
    Sent {
        host: HostName,
        anchor: Anchor,
        at: Millis,
    },
    /// An order was handled, accepted or not.
    Ordered {
        host: HostName,
        order: Order,
        at: Millis,
    },
    /// Another agent's answer was handled.
    Answered {
        host: HostName,
        by: HostName,
        answer: VouchAnswer,
    },
    /// The agent has vouched. `guarded`: the asker has the exact guard.
    Promised {
        host: HostName,
        answer: VouchAnswer,
        guarded: bool,
        at: Millis,
    },
    /// The agent has given the kernel an address (`fresh`: it was not there), under a lease that ends at `until`.
    Taken {
        host: HostName,
        ip: IpAddr,
        until: Millis,
        fresh: bool,
        at: Millis,
    },
    /// Something was written to a disk.
    Saved,
    MonitorDiskReplaced,
}

/// What the rules have to remember.
#[derive(Default)]
pub(crate) struct Invariants {
    ledger: Ledger,
    epochs: epochs::Epochs,
}

impl Invariants {
    /// Takes in what is new. Some rules note times in the world.
    pub(crate) fn follow(&mut self, world: &mut World) {
        self.ledger.follow(world);
        open_servers::note(world);
    }

    /// An error begins with the name of the rule that is broken, in capitals.
    pub(crate) fn look(&mut self, world: &World) -> Result<(), String> {
        two_holders::look(world)?;
        promises::look(world, &self.ledger)?;
        leases::look(&self.ledger)?;
        lifetimes::look(world, &self.ledger)?;
        known_on_disk::look(world)?;
        self.epochs.look(world)?;
        live_bounded::look(world)?;
        open_servers::look(world)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three hosts, all ONLINE; db1 has the writer address.
    pub(super) fn cluster() -> World {
        let mut w = World::new();
        w.run(2_500);
        for host in ["db1", "db2", "db3"] {
            w.command(mmm_common::control::Command::SetOnline { host: host.into(), accept_lost: false });
            w.run(1_500);
        }
        w.run(3_000);
        assert_eq!(w.holders(crate::world::WRITER), ["db1"], "{}", w.story.join("\n"));
        w
    }

    pub(super) fn writer() -> IpAddr {
        crate::world::WRITER.parse().expect("an address")
    }

    /// The rule is broken, and it says so by its name.
    pub(super) fn breaks(found: Result<(), String>, name: &str) {
        let what = found.expect_err("the rule is broken");
        assert!(what.starts_with(name), "{what}");
    }
}

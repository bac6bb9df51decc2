//! No agent acts on a longer lease than orders gave it, or the vouches of all granters of its newest order (safety.md,
//! R4, R6): counted from when the report or the request left, for this life of the agent and this epoch.

use super::ledger::Ledger;

pub(super) fn look(ledger: &Ledger) -> Result<(), String> {
    for take in &ledger.takes {
        if take.until > take.lease {
            let more = take.until.0 - take.lease.0;
            return Err(format!(
                "LEASE TOO LONG: {} has {} under a lease {more} ms longer than orders and vouches give it",
                take.host, take.ip
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Seen;
    use super::super::tests::{breaks, cluster, writer};
    use super::*;
    use crate::world::World;
    use mmm_common::epoch::{Anchor, Boot, Epoch};
    use mmm_common::ids::Millis;
    use mmm_common::order::{AddressOrder, Hold, Order, ReplicationOrder};
    use mmm_common::state::HostState;
    use mmm_common::vouch::VouchAnswer;
    use std::collections::BTreeMap;

    const FIRST: Anchor = Anchor { boot: Boot(9), seq: 1 };
    const SECOND: Anchor = Anchor { boot: Boot(9), seq: 2 };

    fn tell(w: &mut World, ledger: &mut Ledger, seen: Seen) {
        w.seen = vec![seen];
        ledger.follow(w);
    }

    fn take(w: &mut World, ledger: &mut Ledger, until: u64) -> Result<(), String> {
        let seen = Seen::Taken { host: "db1".into(), ip: writer(), until: Millis(until), fresh: true, at: Millis(0) };
        tell(w, ledger, seen);
        look(ledger)
    }

    fn vouch(w: &mut World, ledger: &mut Ledger, by: &str, epoch: u64) {
        let vouched = BTreeMap::from([(writer(), Epoch(epoch))]);
        let answer = VouchAnswer { anchor: SECOND, lease_ttl_ms: 3_000, vouched, refused: BTreeMap::new() };
        tell(w, ledger, Seen::Answered { host: "db1".into(), by: by.into(), answer });
    }

    /// An order of epoch 5 to db1 with the granters db2 and db3, in answer to a report sent at 100; asked at 1000.
    fn told() -> (World, Ledger) {
        let (mut w, mut ledger) = (cluster(), Ledger::default());
        let host = || "db1".into();
        tell(&mut w, &mut ledger, Seen::AgentStarted { host: host(), boot: Boot(9), at: Millis(0) });
        tell(&mut w, &mut ledger, Seen::Sent { host: host(), anchor: FIRST, at: Millis(100) });
        tell(&mut w, &mut ledger, Seen::Sent { host: host(), anchor: SECOND, at: Millis(1_000) });
        let granters = ["db2".into(), "db3".into()].into();
        let hold = Hold { epoch: Epoch(5), role: "writer".into(), granters, proof: true, write: true };
        let order = Order {
            answers: FIRST,
            lease_ttl_ms: 3_000,
            state: HostState::Online,
            addresses: BTreeMap::from([(writer(), AddressOrder::Hold(hold))]),
            replication: ReplicationOrder::Keep,
            wait_for_replica: true,
            task: None,
            job: None,
        };
        tell(&mut w, &mut ledger, Seen::Ordered { host: host(), order, at: Millis(200) });
        (w, ledger)
    }

    #[test]
    fn a_lease_beyond_the_order_is_found() {
        let (mut w, mut ledger) = told();
        assert_eq!(take(&mut w, &mut ledger, 3_100), Ok(()));
        breaks(take(&mut w, &mut ledger, 3_101), "LEASE TOO LONG: db1 has 10.0.0.50 under a lease 1 ms longer");
    }

    #[test]
    fn one_granter_of_two_is_not_enough_nor_a_vouch_for_another_epoch() {
        let (mut w, mut ledger) = told();
        vouch(&mut w, &mut ledger, "db2", 5);
        vouch(&mut w, &mut ledger, "db3", 4);
        breaks(take(&mut w, &mut ledger, 4_000), "LEASE TOO LONG");
        vouch(&mut w, &mut ledger, "db3", 5);
        assert_eq!(take(&mut w, &mut ledger, 4_000), Ok(()));
        breaks(take(&mut w, &mut ledger, 4_001), "LEASE TOO LONG");
    }
}

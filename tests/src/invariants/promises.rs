//! Who has vouched for another takes the address only with proof, or after the promise is over (safety.md, R5, R6); a
//! restarted agent behaves as if it had vouched just before (R9).

use super::ledger::Ledger;
use crate::world::World;

/// Both clocks are read in whole milliseconds.
const ROUNDING: u64 = 2;

pub(super) fn look(world: &World, ledger: &Ledger) -> Result<(), String> {
    for take in ledger.takes.iter().filter(|take| take.fresh && !take.proof) {
        if world.now + ROUNDING < take.promised_until {
            let early = take.promised_until - world.now;
            return Err(format!(
                "BROKEN PROMISE: {} takes {} without proof, {early} ms before its word to others is over",
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
    use mmm_common::epoch::Anchor;
    use mmm_common::ids::Millis;
    use mmm_common::vouch::VouchAnswer;
    use std::collections::BTreeMap;

    #[test]
    fn a_take_within_a_promise_is_found_and_one_after_it_is_not() {
        let mut w = cluster();
        let mut ledger = Ledger::default();
        let vouched = BTreeMap::from([(writer(), mmm_common::epoch::Epoch(1))]);
        let (anchor, refused) = (Anchor::default(), BTreeMap::new());
        let answer = VouchAnswer { anchor, lease_ttl_ms: 3_000, vouched, refused };
        w.seen = vec![Seen::Promised { host: "db2".into(), answer, guarded: false, at: Millis(w.now) }];
        ledger.follow(&w);
        let take = |w: &World| Seen::Taken {
            host: "db2".into(),
            ip: writer(),
            until: Millis(w.now),
            fresh: true,
            at: Millis(w.now),
        };
        w.now += 4_000;
        w.seen = vec![take(&w)];
        ledger.follow(&w);
        breaks(look(&w, &ledger), "BROKEN PROMISE: db2 takes 10.0.0.50");
        w.now += 500;
        w.seen = vec![take(&w)];
        ledger.follow(&w);
        assert_eq!(look(&w, &ledger), Ok(()));
    }
}

//! Vouching between agents (safety.md, R6): what one is worth to the agent that asked, and when this agent may give one.
//!
//! It must never give a vouch that this agent does not keep: who vouched takes the address itself only with proof, or
//! after `vouched_until`.

use crate::accept::{Held, Lease, Slot};
use mmm_common::config::Cluster;
use mmm_common::epoch::Epoch;
use mmm_common::ids::{HostName, Millis};
use mmm_common::safeguard::{Safeguard, stands};
use std::time::Duration;

/// Longer leases are not vouched for: the margin does not cover the drift of clocks over them.
const LONGEST: Duration = Cluster::LONGEST_TTL;

/// How long an asker's lease may be, if that can be vouched for at all. `ours`: lease_ttl here.
pub(crate) fn asked_ttl(asked_ms: u64, ours: Duration) -> Result<Duration, String> {
    let asked = Duration::from_millis(asked_ms);
    if asked > LONGEST {
        return Err(format!("its lease_ttl is {asked:?} and ours {ours:?}: use the same mmm_common.toml on all hosts"));
    }
    Ok(asked)
}

impl Slot {
    /// R6 (b). `has`: the address is here, or the server may still be open because of it. `until`: now, the asker's
    /// lease and the margin. An error says why not.
    pub(crate) fn vouch(&mut self, asked: Epoch, has: bool, until: Millis, now: Millis) -> Result<(), String> {
        if self.seen.0 == 0 {
            // An agent that has forgotten what it has heard cannot know whether it has heard of a newer one.
            return Err("no order for it has ever been heard here".to_owned());
        }
        if asked < self.seen && stands(Safeguard::VouchEpoch) {
            return Err(format!("epoch {asked} is older than {}, seen here", self.seen));
        }
        if has && stands(Safeguard::VouchNotHolding) {
            return Err("it is not given up here yet".to_owned());
        }
        let waiting = !has && self.hold.as_ref().is_some_and(|held| held.lease.runs(now));
        if waiting && stands(Safeguard::VouchNotWaiting) {
            return Err("there is a hold order here".to_owned());
        }
        self.vouched_until = self.vouched_until.max(until);
        Ok(())
    }

    /// R6 (c): `by` has vouched for a lease of `ttl` from `sent`, when it was asked. True if the lease was extended by it.
    pub(crate) fn vouched(&mut self, by: &HostName, epoch: Epoch, sent: Millis, ttl: Duration) -> bool {
        let Some(held) = self.hold.as_mut().filter(|h| h.order.granters.contains(by)) else { return false };
        if held.order.epoch != epoch && stands(Safeguard::VouchOfThisEpoch) {
            return false;
        }
        let until = sent + ttl;
        let longest = held.vouches.entry(by.clone()).or_insert(until);
        *longest = until.max(*longest);
        let granters = held.order.granters.iter().map(|g| held.vouches.get(g));
        match granters.filter(|vouch| vouch.is_some() || stands(Safeguard::EveryGranter)).min() {
            Some(Some(first)) => {
                let until = *first;
                held.extend(until)
            }
            Some(None) | None => false,
        }
    }

    /// R6 (c): whom nobody could succeed extends by itself.
    pub(crate) fn extend_alone(&mut self, now: Millis) {
        if let Some(held) = self.hold.as_mut().filter(|h| h.order.granters.is_empty()) {
            held.extend(now + held.ttl);
        }
    }
}

impl Held {
    /// A lease never moves back.
    fn extend(&mut self, until: Millis) -> bool {
        let longer = match self.lease {
            Lease::Until(end) => until > end,
            Lease::Inherited { .. } => true,
        };
        if longer {
            self.lease = Lease::Until(until);
        }
        longer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmm_common::order::{AddressOrder, Hold};
    use std::collections::BTreeSet;

    const TTL: Duration = Duration::from_secs(3);

    fn holder(granters: &[&str]) -> Slot {
        let mut s = Slot::fresh(Millis(0));
        let hold = Hold {
            epoch: Epoch(5),
            role: "writer".into(),
            granters: granters.iter().map(|g| HostName::from(*g)).collect::<BTreeSet<_>>(),
            proof: true,
            write: true,
        };
        s.accept(AddressOrder::Hold(hold), Some(Millis(0)), TTL, Millis(0));
        s
    }

    fn lease(s: &Slot) -> Lease {
        s.hold.as_ref().unwrap().lease
    }

    #[test]
    fn a_lease_goes_on_once_every_granter_has_vouched_from_the_oldest_asking() {
        let mut s = holder(&["db2", "db3"]);
        assert!(!s.vouched(&"db2".into(), Epoch(5), Millis(1000), TTL), "one is not enough");
        assert!(s.vouched(&"db3".into(), Epoch(5), Millis(1500), TTL));
        assert_eq!(lease(&s), Lease::Until(Millis(4000)));
        assert!(!s.vouched(&"db3".into(), Epoch(5), Millis(2500), TTL), "the oldest counts");
        assert!(s.vouched(&"db2".into(), Epoch(5), Millis(2000), TTL));
        assert_eq!(lease(&s), Lease::Until(Millis(5000)));
    }

    #[test]
    fn a_vouch_for_another_epoch_or_by_somebody_else_is_worth_nothing() {
        let mut s = holder(&["db2"]);
        assert!(!s.vouched(&"db2".into(), Epoch(4), Millis(1000), TTL));
        assert!(!s.vouched(&"db3".into(), Epoch(5), Millis(1000), TTL));
        assert_eq!(lease(&s), Lease::Until(Millis(3000)));
    }

    #[test]
    fn vouches_do_not_outlive_the_epoch() {
        let mut s = holder(&["db2"]);
        s.vouched(&"db2".into(), Epoch(5), Millis(1000), TTL);
        let AddressOrder::Hold(hold) =
            AddressOrder::Hold(Hold { epoch: Epoch(6), ..s.hold.as_ref().unwrap().order.clone() })
        else {
            unreachable!()
        };
        s.accept(AddressOrder::Hold(hold), Some(Millis(2000)), TTL, Millis(2000));
        assert!(s.hold.as_ref().unwrap().vouches.is_empty());
    }

    #[test]
    fn nobody_to_ask_is_nobody_who_could_succeed() {
        let mut s = holder(&[]);
        s.extend_alone(Millis(2000));
        assert_eq!(lease(&s), Lease::Until(Millis(5000)));
        let mut other = holder(&["db2"]);
        other.extend_alone(Millis(2000));
        assert_eq!(lease(&other), Lease::Until(Millis(3000)));
    }

    #[test]
    fn a_vouch_is_refused_by_whom_it_would_be_a_lie() {
        let (now, until) = (Millis(10_000), Millis(14_500));
        let mut s = Slot::fresh(Millis(0));
        s.seen = Epoch(7);
        assert!(s.vouch(Epoch(6), false, until, now).unwrap_err().contains("older than 7"));
        assert!(s.vouch(Epoch(7), true, until, now).unwrap_err().contains("not given up"));
        assert_eq!(s.vouched_until, Millis(0), "a refusal promises nothing");
        assert_eq!(s.vouch(Epoch(7), false, until, now), Ok(()));
        assert_eq!(s.vouched_until, until);
        assert_eq!(s.vouch(Epoch(8), false, Millis(12_000), now), Ok(()));
        assert_eq!(s.vouched_until, until, "a promise is never shortened");

        let mut own = holder(&["db2"]);
        assert!(own.vouch(Epoch(5), false, until, Millis(1000)).unwrap_err().contains("hold order"));
        assert_eq!(own.vouch(Epoch(5), false, until, now), Ok(()), "its lease is over");
    }

    #[test]
    fn a_lease_is_waited_out_as_long_as_the_asker_takes_it_for() {
        assert_eq!(asked_ttl(1000, TTL), Ok(Duration::from_secs(1)));
        assert_eq!(asked_ttl(5000, TTL), Ok(Duration::from_secs(5)));
        assert!(asked_ttl(3_600_000, TTL).unwrap_err().contains("same mmm_common.toml"));
    }
}

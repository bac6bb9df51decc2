//! Does somebody else answer for an address that this host is to take (safety.md, guards, 3)?
//!
//! With proof that nobody else may have it, the address is taken all the same, loudly: it is the other one that is wrong.
//! Without, taking waits until nobody answers any more. It must never make a proved take wait.

use crate::accept::Slot;
use mmm_common::ids::Millis;
use std::time::Duration;

/// So old an answer is good enough to take an address without proof.
const FRESH: Duration = Duration::from_secs(1);
/// While a take waits for it, it is asked this often.
const AGAIN: Duration = Duration::from_millis(500);
/// A look takes up to 130 ms. One that begins this long before a promise ends is over by then.
const AHEAD: Duration = Duration::from_millis(200);
/// A conflict about an address that was taken all the same is looked at this often.
const WATCH: Duration = Duration::from_secs(5);
/// Whoever has an address asks this often whether somebody else has it too: an address that was added by hand elsewhere.
const STEADY: Duration = Duration::from_secs(30);
/// After this long with somebody else's answers an operator is called.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// A probe that was never answered by the shell is not waited for.
const LOST: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Probe {
    /// When the one under way was begun.
    asked: Option<Millis>,
    /// When the last one ended.
    pub(crate) answered: Option<Millis>,
    /// When somebody was looked for before this host was given anything.
    ahead: Option<Millis>,
    /// Somebody else's MAC address, and since when.
    pub(crate) conflict: Option<(String, Millis)>,
    /// The operator has been called.
    pub(crate) alarmed: bool,
}

impl Probe {
    pub(crate) fn is_asked(&self) -> bool {
        self.asked.is_some()
    }

    pub(crate) fn begun(&mut self, now: Millis) {
        self.asked = Some(now);
        self.ahead = Some(now);
    }

    pub(crate) fn ended(&mut self, now: Millis, answered_by: Option<String>) {
        self.asked = None;
        self.answered = Some(now);
        self.conflict = answered_by.map(|mac| {
            let since = self.conflict.as_ref().map_or(now, |(_, since)| *since);
            (mac, since)
        });
        self.alarmed &= self.conflict.is_some();
    }

    /// As `ended`, for a look ahead: who answers may well be the rightful one, and is looked for again before a take.
    pub(crate) fn ended_ahead(&mut self, now: Millis, answered_by: Option<String>) {
        self.asked = None;
        self.answered = (answered_by.is_none() && self.conflict.is_none()).then_some(now);
    }

    /// Nobody else answered, a moment ago.
    pub(crate) fn is_clear(&self, now: Millis) -> bool {
        self.conflict.is_none() && self.answered.is_some_and(|at| now.since(at) <= FRESH)
    }

    fn is_under_way(&self, now: Millis) -> bool {
        self.asked.is_some_and(|at| now.since(at) < LOST)
    }
}

impl Slot {
    /// When to look before this host is given the address. A promise ends only when its holder has stopped asking, and this
    /// host may be its successor a moment later: the answer is there by then, and the take does not wait for it.
    pub(crate) fn look_ahead(&self, now: Millis) -> Option<Millis> {
        let at = self.vouched_until - AHEAD;
        let looked = self.probe.ahead.is_some_and(|last| last >= at);
        let promised = !self.present && self.hold.is_none() && now < self.vouched_until;
        (promised && !looked && !self.probe.is_under_way(now)).then_some(at)
    }

    /// When the next probe is due; None: there is nothing to find out.
    pub(crate) fn next_probe(&self, now: Millis) -> Option<Millis> {
        let held = self.hold.as_ref().filter(|h| h.lease.runs(now))?;
        if self.probe.is_under_way(now) {
            return None;
        }
        let last = self.probe.answered;
        if self.present {
            let pause = if self.probe.conflict.is_some() { WATCH } else { STEADY };
            return Some(last.map_or(now, |at| at + pause));
        }
        if held.order.proof {
            // Once, to be able to say so.
            return last.is_none_or(|at| now.since(at) > FRESH).then_some(now);
        }
        let may_soon = (self.vouched_until - AGAIN).max(now);
        Some(last.map_or(may_soon, |at| (at + AGAIN).max(may_soon)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmm_common::epoch::Epoch;
    use mmm_common::order::{AddressOrder, Hold};

    #[test]
    fn it_is_clear_only_when_a_fresh_answer_says_so() {
        let mut p = Probe::default();
        assert!(!p.is_clear(Millis(0)), "nothing is known before it was asked");
        p.begun(Millis(0));
        assert!(!p.is_clear(Millis(50)));
        p.ended(Millis(100), None);
        assert!(p.is_clear(Millis(1_100)) && !p.is_clear(Millis(1_101)));
    }

    #[test]
    fn whoever_has_an_address_goes_on_asking() {
        let mut s = Slot::fresh(Millis(0));
        let hold =
            Hold { epoch: Epoch(5), role: "writer".into(), granters: Default::default(), proof: true, write: true };
        s.accept(AddressOrder::Hold(hold), Some(Millis(0)), Duration::from_secs(600), Millis(0));
        s.present = true;
        s.probe.ended(Millis(1_000), None);
        assert_eq!(s.next_probe(Millis(2_000)), Some(Millis(31_000)));
        s.probe.ended(Millis(31_100), Some("02:00:00:00:00:09".into()));
        assert_eq!(s.next_probe(Millis(32_000)), Some(Millis(36_100)), "more often while it stands");
    }

    #[test]
    fn a_conflict_stands_from_its_first_answer_until_one_without() {
        let mut p = Probe::default();
        p.ended(Millis(100), Some("aa".into()));
        p.ended(Millis(600), Some("bb".into()));
        assert_eq!(p.conflict, Some(("bb".into(), Millis(100))));
        assert!(!p.is_clear(Millis(600)));
        p.ended(Millis(1_100), None);
        assert!(p.is_clear(Millis(1_100)));
    }
}

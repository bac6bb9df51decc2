//! One role address on this host: the newest order for it, and the lease that the order gives (safety.md, R4, R5, R9).
//!
//! This file decides what an order is worth. It never decides what to do about it: that is `plan.rs`.

use crate::io::SavedAddress;
use crate::probe::Probe;
use mmm_common::epoch::{Anchor, Boot, Epoch};
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::{AddressOrder, Hold};
use mmm_common::safeguard::{Safeguard, stands};
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Clone, Debug)]
pub(crate) struct Slot {
    /// The highest epoch seen; on disk before it is acted on or told.
    pub(crate) seen: Epoch,
    pub(crate) hold: Option<Held>,
    /// Until then this agent may have vouched for another holder, in this life or (after a restart) in one before.
    pub(crate) vouched_until: Millis,
    /// What the kernel said when last asked.
    pub(crate) present: bool,
    /// When the kernel will remove the address by itself, as last set by this process.
    pub(crate) kernel_until: Option<Millis>,
    /// Until when the exact guard lets it answer, as last set by this process.
    pub(crate) allowed_until: Option<Millis>,
    pub(crate) probe: Probe,
    /// An agent of before had the address, and nothing else is known of that.
    pub(crate) forgotten: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) order: Hold,
    pub(crate) lease: Lease,
    /// How long a lease is: ours or the monitor's, whichever is shorter.
    pub(crate) ttl: Duration,
    /// How long each granter's vouches let the lease run, in this life and for this epoch (R6).
    pub(crate) vouches: BTreeMap<HostName, Millis>,
}

impl Held {
    /// How long before the end of a lease an agent without renewal lets go, so that the address is gone when it ends.
    pub(crate) fn lead(&self) -> Duration {
        // Of a short lease most has to be left; such ones need the exact guard, which ends the answers in time.
        Duration::from_millis(200).min(self.ttl / 10)
    }

    /// How long before the end of a kernel lifetime it is refreshed. A whole second of a lease's rest begins in this time, so
    /// one that is not renewed any more is given its last, exact one before it ends.
    pub(crate) fn refresh_before(&self) -> Duration {
        Duration::from_millis(1500).max(self.ttl / 2)
    }

    /// When the guard, armed until `armed`, is armed for a lease until `until`: at once for a renewal, and for the little
    /// that a vouch adds to it when that was the last. None: it is.
    pub(crate) fn rearm_at(&self, armed: Millis, until: Millis) -> Option<Millis> {
        let worth = until >= armed + self.ttl / 20;
        (until > armed).then(|| if worth { Millis(0) } else { armed - self.ttl / 2 })
    }

    /// When the address goes, without a renewal. None: when the kernel removes it.
    pub(crate) fn lets_go(&self) -> Option<Millis> {
        match self.lease {
            Lease::Until(end) => Some(end - self.lead()),
            Lease::Inherited { until } => until.map(|end| end - self.lead()),
        }
    }
}

/// How long a hold order is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lease {
    Until(Millis),
    /// Left by the process before this one, on the same boot of the machine. How long it still runs is known to the
    /// kernel only, so it is good while the address is there, and never to add it. Some: the exact guard lets it answer
    /// until then; whoever waits for its end waits no longer than that, while the kernel may keep the address for another
    /// second (safety.md, R9 and "margin").
    Inherited {
        until: Option<Millis>,
    },
}

impl Lease {
    /// Whether the order may be acted on at all; `Inherited` only matters while the address is there.
    pub(crate) fn runs(self, now: Millis) -> bool {
        match self {
            Lease::Until(end) => end > now,
            Lease::Inherited { .. } => false,
        }
    }
}

/// What became of an address's part of an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// Same epoch, newer anchor: only the lease moved.
    Renewed,
    /// A new epoch: it must be on disk before more is done than before.
    New,
    Refused(String),
}

impl Slot {
    pub(crate) fn fresh(vouched_until: Millis) -> Self {
        Slot {
            seen: Epoch(0),
            hold: None,
            vouched_until,
            present: false,
            kernel_until: None,
            allowed_until: None,
            probe: Probe::default(),
            forgotten: false,
        }
    }

    /// R9: the epoch always survives, the order only within one boot of the machine.
    /// `inherited`: what the order of the life before is still good for, if for anything.
    pub(crate) fn restored(
        saved: SavedAddress,
        inherited: Option<Lease>,
        ttl: Duration,
        vouched_until: Millis,
    ) -> Self {
        let hold = saved.hold.zip(inherited);
        let hold = hold.map(|(order, lease)| Held { order, lease, ttl, vouches: BTreeMap::new() });
        let seen = if stands(Safeguard::EpochSurvives) { saved.seen } else { Epoch(0) };
        let vouched_until = if stands(Safeguard::VouchQuarantine) { vouched_until } else { Millis(0) };
        Slot { seen, hold, forgotten: saved.forgotten, ..Slot::fresh(vouched_until) }
    }

    pub(crate) fn saved(&self) -> SavedAddress {
        SavedAddress { seen: self.seen, hold: self.hold.as_ref().map(|h| h.order.clone()), forgotten: self.forgotten }
    }

    /// It has left the machine.
    pub(crate) fn gone(&mut self) {
        (self.present, self.kernel_until, self.allowed_until) = (false, None, None);
    }

    /// An address that no order ever spoke about (an agent just installed beside MMM) is reported, not touched.
    pub(crate) fn is_managed(&self) -> bool {
        self.seen.0 > 0 || self.forgotten
    }

    /// R4. `sent` is when the report that the order answers was sent, if that is still remembered.
    pub(crate) fn accept(&mut self, order: AddressOrder, sent: Option<Millis>, ttl: Duration, now: Millis) -> Accepted {
        if order.epoch() < self.seen && stands(Safeguard::EpochCheck) {
            return Accepted::Refused(format!("epoch {} is older than {}, seen before", order.epoch(), self.seen));
        }
        let new = order.epoch() > self.seen;
        match order {
            AddressOrder::LetGo { epoch } => {
                let had = self.hold.take().is_some();
                self.seen = epoch;
                if new {
                    self.probe = Probe::default();
                }
                if new || had { Accepted::New } else { Accepted::Renewed }
            }
            AddressOrder::Hold(mut order) => {
                let counted_from = if stands(Safeguard::LeaseFromSending) { sent } else { sent.and(Some(now)) };
                let Some(until) = counted_from.map(|s| s + ttl).filter(|until| *until > now) else {
                    return Accepted::Refused("it answers a report that is too old or not of this life".to_owned());
                };
                let before = self.hold.take().filter(|_| !new);
                order.proof |= before.as_ref().is_some_and(|h| h.order.proof);
                let (lease, vouches) = match before {
                    Some(Held { lease: Lease::Until(earlier), vouches, .. }) => (earlier.max(until), vouches),
                    Some(Held { lease: Lease::Inherited { .. }, vouches, .. }) => (until, vouches),
                    None => (until, BTreeMap::new()),
                };
                self.seen = order.epoch;
                self.hold = Some(Held { order, lease: Lease::Until(lease), ttl, vouches });
                if new { Accepted::New } else { Accepted::Renewed }
            }
        }
    }

    /// The order under which the address may be (or stay) on the machine until `Some(end)`; None: it must go.
    /// Adding it needs `may_add` as well.
    pub(crate) fn right(&self, now: Millis) -> Option<&Held> {
        self.hold.as_ref().filter(|held| match held.lease {
            Lease::Until(_) => held.lets_go().is_some_and(|at| at > now),
            Lease::Inherited { .. } => self.present && held.lets_go().is_none_or(|at| at > now),
        })
    }

    /// R5, both looked at when adding; and without proof nobody else may be answering for it (guards, 3).
    pub(crate) fn may_add(&self, now: Millis) -> bool {
        self.hold.as_ref().is_some_and(|held| {
            let promised = now < self.vouched_until && stands(Safeguard::VouchWait);
            let free = held.order.proof || (!promised && self.probe.is_clear(now));
            held.lease.runs(now) && free
        })
    }
}

/// When the reports of this life were sent; leases are counted from there (R4).
#[derive(Clone, Debug, Default)]
pub(crate) struct SentReports {
    /// By number, oldest first.
    sent: std::collections::VecDeque<(u64, Millis)>,
}

impl SentReports {
    /// An order to a report this old gives no lease any more, whatever the ttl.
    const KEPT: usize = 4096;

    pub(crate) fn remember(&mut self, anchor: Anchor, now: Millis) {
        self.sent.push_back((anchor.seq, now));
        if self.sent.len() > Self::KEPT {
            self.sent.pop_front();
        }
    }

    /// None: not of this life, or too old to be remembered.
    pub(crate) fn when(&self, anchor: Anchor, this_life: Boot) -> Option<Millis> {
        if anchor.boot != this_life && stands(Safeguard::AnchorOfThisLife) {
            return None;
        }
        self.sent.binary_search_by_key(&anchor.seq, |(seq, _)| *seq).ok().map(|at| self.sent[at].1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const TTL: Duration = Duration::from_secs(3);

    fn hold(epoch: u64, proof: bool) -> AddressOrder {
        AddressOrder::Hold(Hold {
            epoch: Epoch(epoch),
            role: "writer".into(),
            granters: BTreeSet::new(),
            proof,
            write: true,
        })
    }

    fn let_go(epoch: u64) -> AddressOrder {
        AddressOrder::LetGo { epoch: Epoch(epoch) }
    }

    fn slot() -> Slot {
        Slot::fresh(Millis(0))
    }

    #[test]
    fn a_lease_counts_from_when_the_report_was_sent_not_from_when_the_order_came() {
        let mut s = slot();
        assert_eq!(s.accept(hold(5, true), Some(Millis(1000)), TTL, Millis(3500)), Accepted::New);
        assert_eq!(s.hold.unwrap().lease, Lease::Until(Millis(4000)));
    }

    // lessons.md 7
    #[test]
    fn delayed_orders_of_lower_epochs_are_refused() {
        let mut s = slot();
        s.accept(let_go(7), Some(Millis(0)), TTL, Millis(0));
        let refused = s.accept(hold(6, true), Some(Millis(100)), TTL, Millis(100));
        assert!(matches!(refused, Accepted::Refused(_)), "{refused:?}");
        assert_eq!((s.seen, s.hold), (Epoch(7), None));
    }

    // lessons.md 7
    #[test]
    fn an_order_to_a_report_older_than_the_ttl_or_of_another_life_is_refused_and_its_epoch_not_seen() {
        for sent in [Some(Millis(1000)), None] {
            let mut s = slot();
            assert!(matches!(s.accept(hold(5, true), sent, TTL, Millis(4000)), Accepted::Refused(_)));
            assert_eq!(s.seen, Epoch(0));
        }
    }

    #[test]
    fn proof_once_true_stays_true_within_an_epoch_and_no_longer() {
        let mut s = slot();
        s.accept(hold(5, true), Some(Millis(0)), TTL, Millis(0));
        s.accept(hold(5, false), Some(Millis(500)), TTL, Millis(500));
        assert!(s.hold.as_ref().unwrap().order.proof);
        s.accept(hold(6, false), Some(Millis(600)), TTL, Millis(600));
        assert!(!s.hold.as_ref().unwrap().order.proof);
    }

    #[test]
    fn a_lease_never_moves_back() {
        let mut s = slot();
        s.accept(hold(5, true), Some(Millis(900)), TTL, Millis(1000));
        s.accept(hold(5, true), Some(Millis(400)), TTL, Millis(1001));
        assert_eq!(s.hold.unwrap().lease, Lease::Until(Millis(3900)));
    }

    #[test]
    fn after_a_restart_an_address_is_not_added_before_the_quarantine_is_over_unless_proved() {
        let mut s = Slot::fresh(Millis(4500));
        s.accept(hold(5, false), Some(Millis(4000)), TTL, Millis(4000));
        s.probe.ended(Millis(4400), None);
        assert!(!s.may_add(Millis(4400)));
        assert!(s.may_add(Millis(4500)));
        s.probe.ended(Millis(4500), Some("02:00:00:00:00:01".into()));
        assert!(!s.may_add(Millis(4500)), "somebody answers for it");
        s.accept(hold(5, true), Some(Millis(4300)), TTL, Millis(4400));
        assert!(s.may_add(Millis(4400)), "proof is stronger than an answer");
    }

    // lessons.md 9
    #[test]
    fn an_inherited_order_is_good_only_while_the_kernel_keeps_the_address_and_never_after_a_reboot() {
        let AddressOrder::Hold(order) = hold(5, true) else { unreachable!() };
        let saved = SavedAddress { seen: Epoch(5), hold: Some(order), forgotten: false };
        let inherited = |until| Some(Lease::Inherited { until });
        let mut s = Slot::restored(saved.clone(), inherited(None), TTL, Millis(0));
        assert!(!s.may_add(Millis(1)) && s.right(Millis(1)).is_none());
        s.present = true;
        assert!(s.right(Millis(1)).is_some());
        let mut guarded = Slot::restored(saved.clone(), inherited(Some(Millis(1000))), TTL, Millis(0));
        guarded.present = true;
        assert!(guarded.right(Millis(799)).is_some() && guarded.right(Millis(800)).is_none());
        let rebooted = Slot::restored(saved, None, TTL, Millis(0));
        assert_eq!((rebooted.seen, rebooted.hold), (Epoch(5), None));
    }
}

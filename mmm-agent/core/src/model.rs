//! One role address of an agent as the model checker (tests/model) moves it: the real `Slot`, taken apart into plain
//! values between two steps.
//!
//! No rule is here: every method is one of the slot's own.

use crate::accept::{Accepted, Held, Lease, SentReports, Slot};
use crate::probe::Probe;
use mmm_common::epoch::{Anchor, Boot, Epoch};
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::{AddressOrder, Hold};
use std::collections::BTreeMap;
use std::time::Duration;

pub struct Address(Slot);

/// What a slot consists of, besides what the kernel was told and what was last found on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts {
    pub seen: Epoch,
    pub hold: Option<HoldParts>,
    pub vouched_until: Millis,
    pub present: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoldParts {
    pub order: Hold,
    /// None: inherited from the process before.
    pub lease: Option<Millis>,
    pub vouches: BTreeMap<HostName, Millis>,
}

impl Address {
    /// Nobody else answers on the wire: that guard comes on top of the rules, and must not hide one that is missing.
    pub fn assembled(parts: Parts, ttl: Duration, now: Millis) -> Self {
        let Parts { seen, hold, vouched_until, present } = parts;
        let hold = hold.map(|HoldParts { order, lease, vouches }| Held {
            order,
            lease: lease.map_or(Lease::Inherited { until: None }, Lease::Until),
            ttl,
            vouches,
        });
        let mut probe = Probe::default();
        probe.ended(now, None);
        Address(Slot {
            seen,
            hold,
            vouched_until,
            present,
            kernel_until: None,
            allowed_until: None,
            probe,
            forgotten: false,
        })
    }

    pub fn parts(self) -> Parts {
        let Slot { seen, hold, vouched_until, present, kernel_until: _, allowed_until: _, probe: _, forgotten: _ } =
            self.0;
        let hold = hold.map(|Held { order, lease, ttl: _, vouches }| {
            let lease = match lease {
                Lease::Until(end) => Some(end),
                Lease::Inherited { .. } => None,
            };
            HoldParts { order, lease, vouches }
        });
        Parts { seen, hold, vouched_until, present }
    }

    /// The next process, with what this one saved.
    pub fn restarted(self, same_machine_boot: bool, vouched_until: Millis) -> Self {
        let inherited = same_machine_boot.then_some(Lease::Inherited { until: None });
        // Leases that are inherited without a guard end by the kernel's hand: their length is not looked at.
        Address(Slot::restored(self.0.saved(), inherited, Duration::ZERO, vouched_until))
    }

    /// False if the order is refused.
    pub fn accept(&mut self, order: AddressOrder, sent: Option<Millis>, ttl: Duration, now: Millis) -> bool {
        match self.0.accept(order, sent, ttl, now) {
            Accepted::Renewed | Accepted::New => true,
            Accepted::Refused(_) => false,
        }
    }

    pub fn has_right(&self, now: Millis) -> bool {
        self.0.right(now).is_some()
    }

    pub fn may_add(&self, now: Millis) -> bool {
        self.0.may_add(now)
    }

    pub fn vouch(&mut self, asked: Epoch, has: bool, until: Millis, now: Millis) -> bool {
        self.0.vouch(asked, has, until, now).is_ok()
    }

    pub fn vouched(&mut self, by: &HostName, epoch: Epoch, sent: Millis, ttl: Duration) {
        self.0.vouched(by, epoch, sent, ttl);
    }

    pub fn extend_alone(&mut self, now: Millis) {
        self.0.extend_alone(now);
    }
}

/// When a report was sent by what an agent of life `this_life` remembers, which is the one report (`known`, sent at `at`).
pub fn sent(asked: Anchor, this_life: Boot, known: Anchor, at: Millis) -> Option<Millis> {
    let mut reports = SentReports::default();
    reports.remember(known, at);
    reports.when(asked, this_life)
}

//! The decisions for one address as the model checker (tests/model) moves them: the real `Slot`, taken apart into
//! plain values between two steps.
//!
//! No rule is here: every method is one of the slot's own.

use crate::slot::Slot;
pub use crate::slot::{Given, Granters, SlotState};
use mmm_common::config::Quarantine;
use mmm_common::epoch::Epoch;
use mmm_common::ids::{HostName, Millis, RoleName};
use mmm_common::order::AddressOrder;
use std::collections::{BTreeMap, BTreeSet};

pub struct Decisions(Slot);

impl Decisions {
    pub fn first(role: RoleName, epoch: Epoch, hosts: &[HostName], now: Millis, quarantine: Quarantine) -> Self {
        Decisions(Slot::first(role, epoch, hosts, now, quarantine))
    }

    pub fn restored(state: SlotState, now: Millis, quarantine: Quarantine) -> Self {
        Decisions(Slot::restored(state, now, quarantine))
    }

    /// What a slot of [`Decisions::parts`] was.
    pub fn assembled(state: SlotState, deadline: BTreeMap<HostName, Millis>, quarantine: Quarantine) -> Self {
        Decisions(Slot { state, deadline, quarantine })
    }

    /// The state on disk, and until when the monitor waits for each host.
    pub fn parts(self) -> (SlotState, BTreeMap<HostName, Millis>) {
        let Slot { state, deadline, quarantine: _ } = self.0;
        (state, deadline)
    }

    /// Grants if that is proved to be safe.
    pub fn grant(&mut self, to: &HostName, epoch: Epoch, granters: BTreeSet<HostName>, now: Millis) -> bool {
        let Ok(proof) = self.0.free_for(to, now) else { return false };
        self.0.grant(proof, epoch, granters, false);
        true
    }

    pub fn rewrite(&mut self, epoch: Epoch, granters: BTreeSet<HostName>) {
        self.0.rewrite(epoch, granters, false);
    }

    pub fn release(&mut self, epoch: Epoch) {
        self.0.release(epoch);
    }

    pub fn heard(&mut self, from: &HostName, seen: Epoch, has: bool, now: Millis) {
        self.0.heard(from, seen, has, now);
    }

    pub fn killed(&mut self, host: &HostName, asked: Epoch) {
        self.0.killed(host, asked);
    }

    pub fn order_for(&mut self, host: &HostName, guarded: bool, now: Millis) -> AddressOrder {
        self.0.order_for(host, guarded, now)
    }
}

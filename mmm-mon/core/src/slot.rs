//! Who may hold one address now (safety.md, R2, R3, R7, R8, R10, R11). The only code that can build a [`Fenced`],
//! and so the only way to a new hold order.
//!
//! It knows orders, reports and time. It must never know why somebody should hold the address.

use mmm_common::config::Quarantine;
use mmm_common::epoch::Epoch;
use mmm_common::ids::RoleName;
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::{AddressOrder, Hold};
use mmm_common::safeguard::{Safeguard, stands};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A hold order that an agent may be acting on, now or later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    pub epoch: Epoch,
    pub to: HostName,
    pub granters: Granters,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granters {
    Known(BTreeSet<HostName>),
    /// R11: after the loss of the monitor's disk (or before the first start) anybody may act on an order of which
    /// nothing is known. Nobody can take over from it by expiry.
    Unknown,
}

/// What survives a restart of the monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotState {
    pub role: RoleName,
    /// The newest decision: its number, who holds, and whether the holder's server may be written to.
    pub epoch: Epoch,
    pub holder: Option<HostName>,
    pub write: bool,
    pub live: Vec<Given>,
    /// The decision by which the holder got it; later ones only changed what it may do, or its granters.
    #[serde(default)]
    pub given: Epoch,
}

#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) state: SlotState,
    /// When the leases that the monitor itself gave to a host are surely over.
    pub(crate) deadline: BTreeMap<HostName, Millis>,
    pub(crate) quarantine: Quarantine,
}

/// Proof that nobody but the named host can be acting on an order for the address, now or later (R7).
#[derive(Debug)]
pub(crate) struct Fenced {
    to: HostName,
}

/// Why a host cannot be given the address yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Blocked {
    /// The lease of this host may still run; over at this time at the latest.
    Lease { of: HostName, until: Millis },
    /// The order of this host cannot be waited out: the wanted host is not among its granters, so that it goes on without.
    NoGranter { of: HostName },
    /// Nothing is known of the orders of this host (R11): it has to answer.
    Unknown { of: HostName },
}

impl Slot {
    /// R11: nothing is known of the time before.
    pub(crate) fn first(role: RoleName, epoch: Epoch, hosts: &[HostName], now: Millis, quarantine: Quarantine) -> Self {
        let before = Epoch(epoch.0.saturating_sub(1));
        let live =
            hosts.iter().map(|to| Given { epoch: before, to: to.clone(), granters: Granters::Unknown }).collect();
        Slot::restored(SlotState { role, epoch, holder: None, write: false, live, given: epoch }, now, quarantine)
    }

    /// R10: what was sent before the restart is waited out in full; to whom, with a guard or without, is not known.
    pub(crate) fn restored(state: SlotState, now: Millis, quarantine: Quarantine) -> Self {
        let until = if stands(Safeguard::RestartQuarantine) { now + quarantine.plain } else { now };
        let deadline = state.live.iter().map(|o| (o.to.clone(), until)).collect();
        Slot { state, deadline, quarantine }
    }

    /// The epoch that everybody but the holder is told. While a newer decision only changes what the holder may do, or who
    /// can succeed it, and the holder has not acknowledged it, the others are told the one by which it still holds: from
    /// the newer one on they would refuse to vouch for it, although it may never have heard of that.
    pub(crate) fn told_epoch(&self) -> Epoch {
        let Some(holder) = &self.state.holder else { return self.state.epoch };
        let acts_on = self.state.live.iter().filter(|o| o.to == *holder).map(|o| o.epoch).min();
        acts_on.unwrap_or(self.state.epoch).max(self.state.given.min(self.state.epoch))
    }

    /// What is sent from now on is waited out for so long.
    pub(crate) fn with_quarantine(self, quarantine: Quarantine) -> Self {
        Slot { quarantine, ..self }
    }

    /// R7.
    pub(crate) fn free_for(&self, to: &HostName, now: Millis) -> Result<Fenced, Blocked> {
        let others = || self.state.live.iter().filter(|o| o.to != *to);
        let last = others().max_by_key(|o| o.epoch).map(|o| &o.to);
        for order in others().filter(|o| Some(&o.to) == last || stands(Safeguard::EveryOrder)) {
            match &order.granters {
                Granters::Known(granters) if granters.contains(to) || !stands(Safeguard::GrantersOnly) => {}
                Granters::Known(_) => return Err(Blocked::NoGranter { of: order.to.clone() }),
                Granters::Unknown => return Err(Blocked::Unknown { of: order.to.clone() }),
            }
            let until = self.deadline.get(&order.to).copied().unwrap_or(now);
            if now < until && stands(Safeguard::LeaseWait) {
                return Err(Blocked::Lease { of: order.to.clone(), until });
            }
        }
        Ok(Fenced { to: to.clone() })
    }

    /// A new decision: the proved host holds. It must be on disk before the order is sent (R3).
    pub(crate) fn grant(&mut self, proof: Fenced, epoch: Epoch, granters: BTreeSet<HostName>, write: bool) {
        (self.state.epoch, self.state.given) = (epoch, epoch);
        self.state.live.push(Given { epoch, to: proof.to.clone(), granters: Granters::Known(granters) });
        self.state.holder = Some(proof.to);
        self.state.write = write;
    }

    /// A new decision for the same holder: whether it may write (R13). It needs no fence: nobody else comes in.
    pub(crate) fn rewrite(&mut self, epoch: Epoch, granters: BTreeSet<HostName>, write: bool) {
        let Some(to) = self.state.holder.clone() else { return };
        self.state.epoch = epoch;
        self.state.live.push(Given { epoch, to, granters: Granters::Known(granters) });
        self.state.write = write;
    }

    /// A new decision for the same holder: who can succeed it, and is therefore asked to vouch for it. Who leaves counts
    /// as gone when this is sent; who joins counts once the holder has acknowledged it and its older leases are over.
    pub(crate) fn regrant(&mut self, epoch: Epoch, granters: BTreeSet<HostName>) {
        self.rewrite(epoch, granters, self.state.write);
    }

    /// The granters of the holder's newest order, once the holder has acknowledged it: until then an older one stands,
    /// and yet another would only make them more.
    pub(crate) fn settled_granters(&self) -> Option<&BTreeSet<HostName>> {
        let holder = self.state.holder.as_ref()?;
        let mut own = self.state.live.iter().filter(|o| o.to == *holder);
        match (own.next(), own.next()) {
            (Some(Given { epoch, granters: Granters::Known(granters), .. }), None) if *epoch == self.state.epoch => {
                Some(granters)
            }
            (Some(_) | None, _) => None,
        }
    }

    /// With whose vouches together the holder may go on, by each order that it may be acting on.
    pub(crate) fn extending(&self) -> Vec<BTreeSet<HostName>> {
        let own = self.state.live.iter().filter(|o| Some(&o.to) == self.state.holder.as_ref());
        own.filter_map(|o| match &o.granters {
            Granters::Known(granters) => Some(granters.clone()),
            Granters::Unknown => None,
        })
        .collect()
    }

    /// R11: hosts of whose orders nothing is known.
    pub(crate) fn unknown(&self) -> impl Iterator<Item = &HostName> {
        self.state.live.iter().filter(|o| o.granters == Granters::Unknown).map(|o| &o.to)
    }

    /// A new decision: nobody holds.
    pub(crate) fn release(&mut self, epoch: Epoch) {
        self.state.epoch = epoch;
        self.state.holder = None;
        self.state.write = false;
    }

    /// R8 (a) and (b). True if `live` changed.
    pub(crate) fn heard(&mut self, from: &HostName, seen: Epoch, has: bool, now: Millis) -> bool {
        let before = self.state.live.len();
        let by_live_order = self.state.live.iter().any(|o| o.to == *from && o.epoch == seen);
        if !has || by_live_order || !stands(Safeguard::ReleaseWithoutAddress) {
            let own = |live: &[Given]| live.iter().filter(|o| o.to == *from).count();
            let mine = own(&self.state.live);
            // Without a rule, not having it would clear orders of any epoch.
            let counts = |o: &Given| match o.granters {
                Granters::Known(_) => stands(Safeguard::ReleaseAtLaterEpoch),
                Granters::Unknown => stands(Safeguard::LostDiskEpoch),
            };
            self.state.live.retain(|o| o.to != *from || (o.epoch >= seen && (has || counts(o))));
            let left = own(&self.state.live);
            if left < mine && left > 0 && stands(Safeguard::AcknowledgedWait) {
                // What is left may be of a life without the guard.
                self.extend(from, false, now);
            }
        }
        if has && by_live_order && stands(Safeguard::HoldReportClears) {
            self.state.live.retain(|o| o.epoch >= seen);
        }
        before != self.state.live.len()
    }

    /// R8 (c): the host was confirmed dead by a kill that was asked for at `asked`.
    pub(crate) fn killed(&mut self, host: &HostName, asked: Epoch) -> bool {
        let before = self.state.live.len();
        self.state.live.retain(|o| o.to != *host || o.epoch > asked);
        before != self.state.live.len()
    }

    /// The word for one host, to be sent now (R2, R3). `guarded`: as the report says that it answers, for an agent of
    /// another life refuses it.
    pub(crate) fn order_for(&mut self, host: &HostName, guarded: bool, now: Millis) -> AddressOrder {
        let newest = self.state.live.iter().find(|o| o.to == *host && o.epoch == self.state.epoch);
        match newest.map(|o| &o.granters) {
            Some(Granters::Known(granters)) if self.state.holder.as_ref() == Some(host) => {
                let hold = Hold {
                    epoch: self.state.epoch,
                    role: self.state.role.clone(),
                    granters: granters.clone(),
                    proof: self.state.live.iter().all(|o| o.to == *host) || !stands(Safeguard::ProofOfAll),
                    write: self.state.write,
                };
                self.extend(host, guarded, now);
                AddressOrder::Hold(hold)
            }
            Some(Granters::Known(_) | Granters::Unknown) | None => AddressOrder::LetGo { epoch: self.told_epoch() },
        }
    }

    fn extend(&mut self, host: &HostName, guarded: bool, now: Millis) {
        let until = now + self.quarantine.for_a_host(guarded);
        let deadline = self.deadline.entry(host.clone()).or_insert(until);
        *deadline = until.max(*deadline);
    }

    /// When a lease that somebody may wait for is over.
    pub(crate) fn deadlines(&self) -> impl Iterator<Item = Millis> + '_ {
        self.state.live.iter().filter_map(|o| self.deadline.get(&o.to).copied())
    }

    /// The hosts that may be acting on an order, other than this one.
    pub(crate) fn others_than(&self, host: Option<&HostName>) -> BTreeSet<HostName> {
        self.state.live.iter().filter(|o| Some(&o.to) != host).map(|o| o.to.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const QUARANTINE: Quarantine =
        Quarantine { plain: Duration::from_millis(4500), guarded: Duration::from_millis(3200) };

    fn h(name: &str) -> HostName {
        name.into()
    }

    fn set(names: &[&str]) -> BTreeSet<HostName> {
        names.iter().map(|n| h(n)).collect()
    }

    /// db1 holds by epoch 10, granted at 0 and renewed last at `renewed`.
    fn held_by_db1(renewed: u64) -> Slot {
        let mut s = Slot::first("writer".into(), Epoch(9), &[], Millis(0), QUARANTINE);
        let proof = s.free_for(&h("db1"), Millis(0)).unwrap();
        s.grant(proof, Epoch(10), set(&["db2"]), true);
        s.order_for(&h("db1"), false, Millis(renewed));
        s
    }

    // lessons.md 2
    #[test]
    fn a_silent_holder_is_waited_out_from_its_last_renewal() {
        let s = held_by_db1(1000);
        assert_eq!(
            s.free_for(&h("db2"), Millis(5499)).unwrap_err(),
            Blocked::Lease { of: h("db1"), until: Millis(5500) }
        );
        assert!(s.free_for(&h("db2"), Millis(5500)).is_ok());
    }

    #[test]
    fn a_holder_with_the_exact_guard_is_waited_out_for_less_and_never_for_less_than_before() {
        let mut s = held_by_db1(1000);
        let blocked = |s: &Slot| s.free_for(&h("db2"), Millis(1001)).unwrap_err();
        s.order_for(&h("db1"), true, Millis(1100));
        assert_eq!(
            blocked(&s),
            Blocked::Lease { of: h("db1"), until: Millis(5500) },
            "what was sent to it before counts"
        );
        s.order_for(&h("db1"), true, Millis(3000));
        assert_eq!(blocked(&s), Blocked::Lease { of: h("db1"), until: Millis(6200) });
        let restarted = Slot::restored(s.state, Millis(3000), QUARANTINE);
        assert_eq!(blocked(&restarted), Blocked::Lease { of: h("db1"), until: Millis(7500) }, "it is not remembered");
    }

    // lessons.md 2
    #[test]
    fn who_is_no_granter_can_never_wait_it_out() {
        let s = held_by_db1(0);
        assert_eq!(s.free_for(&h("db3"), Millis(1_000_000)).unwrap_err(), Blocked::NoGranter { of: h("db1") });
    }

    #[test]
    fn a_new_granter_counts_once_the_holder_has_acknowledged_and_its_older_leases_are_over() {
        let mut s = held_by_db1(0);
        s.regrant(Epoch(11), set(&["db2", "db3"]));
        s.order_for(&h("db1"), false, Millis(1000));
        assert_eq!(s.settled_granters(), None, "not acknowledged");
        assert_eq!(s.free_for(&h("db3"), Millis(60_000)).unwrap_err(), Blocked::NoGranter { of: h("db1") });
        s.heard(&h("db1"), Epoch(11), true, Millis(1100));
        assert_eq!(s.settled_granters(), Some(&set(&["db2", "db3"])));
        assert!(s.free_for(&h("db3"), Millis(5599)).is_err());
        assert!(s.free_for(&h("db3"), Millis(5600)).is_ok());
    }

    #[test]
    fn the_others_are_told_of_a_change_once_the_holder_has_acknowledged_it() {
        let mut s = held_by_db1(0);
        let told = |s: &mut Slot| s.order_for(&h("db2"), false, Millis(100)).epoch();
        assert_eq!(told(&mut s), Epoch(10));
        s.regrant(Epoch(11), set(&["db2", "db3"]));
        assert_eq!(told(&mut s), Epoch(10), "db1 may not have heard of it, and needs their vouches");
        s.heard(&h("db1"), Epoch(11), true, Millis(200));
        assert_eq!(told(&mut s), Epoch(11));
        s.rewrite(Epoch(12), set(&["db2"]), false);
        assert_eq!(told(&mut s), Epoch(11));
        s.release(Epoch(13));
        assert_eq!(told(&mut s), Epoch(13), "whom it is taken from has no vouches to lose");
        // Given again before the release was acknowledged: nothing older than that is told.
        let proof = s.free_for(&h("db1"), Millis(300)).unwrap();
        s.grant(proof, Epoch(14), set(&["db2"]), true);
        assert_eq!(told(&mut s), Epoch(14));
    }

    #[test]
    fn a_granter_that_was_left_out_can_take_over_no_more_from_the_sending_on() {
        let mut s = held_by_db1(0);
        s.regrant(Epoch(11), set(&[]));
        assert_eq!(s.free_for(&h("db2"), Millis(60_000)).unwrap_err(), Blocked::NoGranter { of: h("db1") });
    }

    #[test]
    fn a_release_reported_at_the_new_epoch_frees_at_once() {
        let mut s = held_by_db1(0);
        s.release(Epoch(11));
        assert!(!s.heard(&h("db1"), Epoch(10), false, Millis(1)), "not holding at its own epoch clears nothing");
        assert!(!s.heard(&h("db1"), Epoch(11), true, Millis(1)), "having it clears nothing");
        assert!(s.heard(&h("db1"), Epoch(11), false, Millis(1)));
        assert!(s.free_for(&h("db2"), Millis(1)).is_ok());
    }

    #[test]
    fn the_first_start_trusts_nobody_until_all_have_answered_at_the_new_epoch() {
        let mut s = Slot::first("writer".into(), Epoch(100), &[h("db1"), h("db2")], Millis(0), QUARANTINE);
        assert_eq!(s.free_for(&h("db1"), Millis(1 << 40)).unwrap_err(), Blocked::Unknown { of: h("db2") });
        assert_eq!(s.order_for(&h("db2"), false, Millis(0)), AddressOrder::LetGo { epoch: Epoch(100) });
        s.heard(&h("db2"), Epoch(0), false, Millis(1));
        assert!(s.free_for(&h("db1"), Millis(1)).is_err(), "an answer from before says nothing");
        s.heard(&h("db2"), Epoch(100), false, Millis(2));
        assert!(s.free_for(&h("db1"), Millis(2)).is_ok());
    }

    #[test]
    fn proof_is_only_for_a_holder_whom_nobody_can_contest() {
        let mut s = held_by_db1(0);
        s.release(Epoch(11));
        let proof = s.free_for(&h("db2"), Millis(4500)).unwrap();
        s.grant(proof, Epoch(12), set(&["db1"]), true);
        let proved = |s: &mut Slot| match s.order_for(&h("db2"), false, Millis(4501)) {
            AddressOrder::Hold(hold) => hold.proof,
            AddressOrder::LetGo { .. } => panic!("db2 holds"),
        };
        assert!(!proved(&mut s), "db1 has not answered");
        s.heard(&h("db1"), Epoch(12), false, Millis(9000));
        assert!(proved(&mut s));
    }

    #[test]
    fn after_a_restart_what_was_sent_before_is_waited_out() {
        let s = Slot::restored(held_by_db1(0).state, Millis(50_000), QUARANTINE);
        assert!(s.free_for(&h("db2"), Millis(54_499)).is_err());
        assert!(s.free_for(&h("db2"), Millis(54_500)).is_ok());
    }

    #[test]
    fn a_confirmed_kill_clears_only_what_was_sent_before_it_was_asked_for() {
        let mut s = held_by_db1(0);
        assert!(!s.killed(&h("db1"), Epoch(9)));
        assert!(s.killed(&h("db1"), Epoch(10)));
        assert!(s.free_for(&h("db2"), Millis(1)).is_ok());
    }
}

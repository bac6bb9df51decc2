//! Each step of layer A with the real code: a compact value becomes a real slot, one of its methods is called, and what
//! has become of it is made compact again.
//!
//! The real code is without memory or chance, and equal questions come up again and again: answers are kept.

// Answers are looked up, never walked through.
#![allow(clippy::disallowed_types)]

use crate::compact::{Agent, Anchor, Decided, Given, Granters, Hold, Id, Lease, MOST, Set, has};
use crate::rules::Grant;
use mmm_agent_core::model::{Address, HoldParts, Parts};
use mmm_common::config::{Cluster, Quarantine};
use mmm_common::epoch::{Anchor as RealAnchor, Boot, Epoch};
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::{AddressOrder, Hold as RealHold};
use mmm_common::safeguard::{Safeguard, stands};
use mmm_mon_core::model::{Decisions, Given as RealGiven, Granters as RealGranters, SlotState};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

/// One tick is the margin: what the kernel may be late, with some drift.
const TICK: Duration = Cluster::MARGIN;
/// All moments are counted from here.
const NOW: Millis = Millis(1 << 40);

fn ticks(n: i8) -> Duration {
    TICK * u32::try_from(n.max(0)).unwrap_or(0)
}

fn at(left: i8) -> Millis {
    NOW + ticks(left)
}

/// Rounded up, so that nothing that has a moment left looks as if it were over.
fn left(at: Millis) -> i8 {
    let ms = at.since(NOW).as_millis();
    i8::try_from(ms.div_ceil(TICK.as_millis())).unwrap_or(i8::MAX)
}

fn name(id: Id) -> HostName {
    HostName(format!("db{}", id + 1))
}

fn id(name: &HostName) -> Id {
    name.as_str().trim_start_matches("db").parse::<Id>().map_or(Id::MAX, |n| n - 1)
}

fn names(set: Set) -> BTreeSet<HostName> {
    (0..MOST as Id).filter(|i| has(set, *i)).map(name).collect()
}

fn set(names: &BTreeSet<HostName>) -> Set {
    names.iter().fold(0, |set, name| set | 1 << id(name))
}

/// Never 0, which would be an agent that has never heard anything, and vouches for nobody: ranks begin at 0 again and again.
fn epoch(rank: u8) -> Epoch {
    Epoch(u64::from(rank) + 1)
}

fn rank(epoch: Epoch) -> u8 {
    u8::try_from(epoch.0.saturating_sub(1)).unwrap_or(u8::MAX)
}

// ---- agents ---------------------------------------------------------------------------------------------------

fn address(a: &Agent, ttl: i8) -> Address {
    let hold = a.hold.map(|h| HoldParts {
        order: order(a.seen, h.granters, h.proof),
        lease: match h.lease {
            Lease::Ticks(left) => Some(at(left)),
            Lease::Inherited => None,
        },
        vouches: (0..MOST as Id)
            .filter(|i| h.vouches[*i as usize] > 0)
            .map(|i| (name(i), at(h.vouches[i as usize])))
            .collect(),
    });
    let parts = Parts { seen: epoch(a.seen), hold, vouched_until: at(a.vouched), present: a.present };
    Address::assembled(parts, ticks(ttl), NOW)
}

fn compact(address: Address, kernel: Option<i8>) -> Agent {
    let Parts { seen, hold, vouched_until, present } = address.parts();
    // They differ only when an agent has forgotten what it saw (`Safeguard::EpochSurvives`): then the order is lost too.
    let hold = hold.filter(|h| h.order.epoch == seen);
    let hold = hold.map(|HoldParts { order, lease, vouches }| {
        let lease = lease.map_or(Lease::Inherited, |end| Lease::Ticks(left(end)));
        let useless = match lease {
            Lease::Ticks(left) => left,
            Lease::Inherited => 0,
        };
        let mut kept = [0; MOST];
        for (by, until) in &vouches {
            // One that lasts no longer than the lease can never make it longer.
            kept[id(by) as usize] = Some(left(*until)).filter(|left| *left > useless).unwrap_or(0);
        }
        Hold { granters: set(&order.granters), proof: order.proof, lease, vouches: kept }
    });
    Agent { seen: rank(seen), hold, vouched: left(vouched_until), present, kernel }
}

fn order(seen: u8, granters: Set, proof: bool) -> RealHold {
    RealHold { epoch: epoch(seen), role: "writer".into(), granters: names(granters), proof, write: false }
}

/// When the agent believes to have sent what this names. Every life numbers from one again.
fn sent(anchor: Anchor, ttl: i8) -> Option<Millis> {
    let this_life = Boot(2);
    let number = 1;
    let asked = RealAnchor { boot: if anchor.old_life { Boot(1) } else { this_life }, seq: number };
    // Of another life it could only be taken for one of this, and at best for the newest.
    let at = if anchor.old_life { NOW } else { NOW - ticks(anchor.age.min(ttl)) };
    mmm_agent_core::model::sent(asked, this_life, RealAnchor { boot: this_life, seq: number }, at)
}

fn obey(a: &Agent, seen: u8, grant: Option<Grant>, ttl: i8) -> Agent {
    let mut slot = address(a, ttl);
    match grant {
        Some(g) => {
            let order = AddressOrder::Hold(order(seen, g.granters, g.proof));
            slot.accept(order, sent(g.at, ttl), ticks(ttl), NOW);
        }
        None => {
            slot.accept(AddressOrder::LetGo { epoch: epoch(seen) }, Some(NOW), ticks(ttl), NOW);
        }
    }
    compact(slot, a.kernel)
}

fn vouched(a: &Agent, by: Id, anchor: Anchor, asked: u8, ttl: i8) -> Agent {
    let mut slot = address(a, ttl);
    if let Some(sent) = sent(anchor, ttl) {
        // What the core hands over.
        let counted_from = if stands(Safeguard::VouchFromSending) { sent } else { NOW };
        slot.vouched(&name(by), epoch(asked), counted_from, ticks(ttl));
    }
    compact(slot, a.kernel)
}

/// None: it refuses.
pub(crate) fn vouch(a: &Agent, asked: u8, quarantine: i8, ttl: i8) -> Option<Agent> {
    let mut slot = address(a, ttl);
    slot.vouch(epoch(asked), a.present, at(quarantine), NOW).then(|| compact(slot, a.kernel))
}

pub(crate) fn extend_alone(a: &Agent, ttl: i8) -> Agent {
    let mut slot = address(a, ttl);
    slot.extend_alone(NOW);
    compact(slot, a.kernel)
}

pub(crate) fn restarted(a: &Agent, same_machine_boot: bool, quarantine: i8, ttl: i8) -> Agent {
    compact(address(a, ttl).restarted(same_machine_boot, at(quarantine)), a.kernel)
}

/// What an agent may do of itself.
#[derive(Clone, Copy)]
pub(crate) struct Allowed {
    pub(crate) add: bool,
    pub(crate) keep: bool,
}

pub(crate) fn allows(a: &Agent, ttl: i8) -> Allowed {
    ALLOWED.with_borrow_mut(|memory| {
        *memory.entry((*a, ttl)).or_insert_with(|| {
            let slot = address(a, ttl);
            Allowed { add: slot.may_add(NOW), keep: slot.has_right(NOW) }
        })
    })
}

// ---- the monitor ----------------------------------------------------------------------------------------------

/// Nobody has the exact guard here.
fn waits(quarantine: i8) -> Quarantine {
    Quarantine { plain: ticks(quarantine), guarded: ticks(quarantine) }
}

fn decisions(d: &Decided, quarantine: i8) -> Decisions {
    let deadline =
        (0..MOST as Id).filter(|i| d.wait[*i as usize] > 0).map(|i| (name(i), at(d.wait[i as usize]))).collect();
    Decisions::assembled(state(d), deadline, waits(quarantine))
}

fn state(d: &Decided) -> SlotState {
    let live = d.live.iter().map(|o| RealGiven {
        epoch: epoch(o.epoch),
        to: name(o.to),
        granters: match o.granters {
            Granters::Known(set) => RealGranters::Known(names(set)),
            Granters::Unknown => RealGranters::Unknown,
        },
    });
    SlotState {
        role: "writer".into(),
        epoch: epoch(d.epoch),
        holder: d.holder.map(name),
        write: false,
        live: live.collect(),
        // Everybody is told of the newest decision.
        given: epoch(d.given),
    }
}

fn decided(slot: Decisions) -> Decided {
    let (state, deadline): (SlotState, BTreeMap<HostName, Millis>) = slot.parts();
    let mut live: Vec<Given> = state
        .live
        .iter()
        .map(|o| Given {
            epoch: rank(o.epoch),
            to: id(&o.to),
            granters: match &o.granters {
                RealGranters::Known(names) => Granters::Known(set(names)),
                RealGranters::Unknown => Granters::Unknown,
            },
        })
        .collect();
    live.sort_unstable();
    let mut wait = [0; MOST];
    for (host, until) in &deadline {
        // Nobody waits for a host without an order; the next order to it waits longer.
        if live.iter().any(|o| o.to == id(host)) {
            wait[id(host) as usize] = left(*until);
        }
    }
    let holder = state.holder.as_ref().map(id);
    let given = holder.map_or(0, |_| rank(state.given));
    Decided { epoch: rank(state.epoch), holder, given, live, wait }
}

pub(crate) fn first(epoch_: u8, hosts: u8, quarantine: i8) -> Decided {
    let hosts: Vec<HostName> = (0..hosts).map(name).collect();
    decided(Decisions::first("writer".into(), epoch(epoch_), &hosts, NOW, waits(quarantine)))
}

pub(crate) fn restored(d: &Decided, quarantine: i8) -> Decided {
    decided(Decisions::restored(state(d), NOW, waits(quarantine)))
}

pub(crate) fn rewrite(d: &Decided, granters: Set, quarantine: i8) -> Decided {
    let mut slot = decisions(d, quarantine);
    slot.rewrite(epoch(d.epoch + 1), names(granters));
    decided(slot)
}

pub(crate) fn release(d: &Decided, quarantine: i8) -> Decided {
    let mut slot = decisions(d, quarantine);
    slot.release(epoch(d.epoch + 1));
    decided(slot)
}

/// As the core does it: a holder that was killed is one no more.
pub(crate) fn killed(d: &Decided, host: Id, quarantine: i8) -> Decided {
    let mut slot = decisions(d, quarantine);
    slot.killed(&name(host), epoch(d.epoch));
    if d.holder == Some(host) {
        slot.release(epoch(d.epoch + 1));
    }
    decided(slot)
}

/// What the monitor's slot is asked most.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Word {
    Grant {
        to: Id,
        granters: Set,
    },
    Heard {
        from: Id,
        epoch: u8,
        has: bool,
    },
    /// What it has to say to this host now.
    Order {
        to: Id,
    },
}

/// What a host is told.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Told {
    /// By the newest epoch.
    Hold {
        granters: Set,
        proof: bool,
    },
    LetGo {
        epoch: u8,
    },
}

/// The slot after that, and what was said, if that was asked for. None: nothing proves that the grant is safe.
type Said = Option<(Decided, Option<Told>)>;

/// From memory, if it was asked before.
pub(crate) fn asked(d: &Decided, word: Word, quarantine: i8) -> Said {
    DECIDED.with_borrow_mut(|memory| {
        memory.entry((d.clone(), word, quarantine)).or_insert_with(|| ask(d, word, quarantine)).clone()
    })
}

fn ask(d: &Decided, word: Word, quarantine: i8) -> Said {
    let mut slot = decisions(d, quarantine);
    let mut said = None;
    match word {
        Word::Grant { to, granters } => {
            if !slot.grant(&name(to), epoch(d.epoch + 1), names(granters), NOW) {
                return None;
            }
        }
        Word::Heard { from, epoch: seen, has } => slot.heard(&name(from), epoch(seen), has, NOW),
        Word::Order { to } => match slot.order_for(&name(to), false, NOW) {
            AddressOrder::Hold(hold) => {
                said = Some(Told::Hold { granters: set(&hold.granters), proof: hold.proof });
            }
            AddressOrder::LetGo { epoch } => said = Some(Told::LetGo { epoch: rank(epoch) }),
        },
    }
    Some((decided(slot), said))
}

// With the ttl or the quarantine: the thread that tells a run's paths outlives it, and the next run has others.
thread_local! {
    static AGENTS: RefCell<HashMap<(Agent, Question, i8), Agent>> = RefCell::default();
    static ALLOWED: RefCell<HashMap<(Agent, i8), Allowed>> = RefCell::default();
    static DECIDED: RefCell<HashMap<(Decided, Word, i8), Said>> = RefCell::default();
}

/// What can happen to an agent.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Question {
    Obey { seen: u8, grant: Option<Grant> },
    Vouched { by: Id, at: Anchor, asked: u8 },
}

/// `obey` or `vouched`, from memory if it was asked before.
pub(crate) fn becomes(a: &Agent, question: Question, ttl: i8) -> Agent {
    AGENTS.with_borrow_mut(|memory| {
        *memory.entry((*a, question, ttl)).or_insert_with(|| match question {
            Question::Obey { seen, grant } => obey(a, seen, grant, ttl),
            Question::Vouched { by, at, asked } => vouched(a, by, at, asked, ttl),
        })
    })
}

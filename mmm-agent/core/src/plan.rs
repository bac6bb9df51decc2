//! What should be so, against what is so: the steps that close the difference (safety.md, R5 and R13).
//!
//! Called after every input. It looks at everything anew each time, so a lost or failed step is simply planned again.
//! It must never give more than an order with a running lease allows, and letting go waits for nothing.

use crate::accept::{Held, Lease, Slot};
use crate::io::{Side, Step};
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::{Hold, ReplicationOrder};
use mmm_common::report::{Life, ServerReport, Writing};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// What a step is about. While one is under way, or has just failed, the same is not begun again.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Subject {
    Add(IpAddr),
    Allow(IpAddr),
    Remove(IpAddr),
    ReadOnly,
    Writable,
    Kill,
    Replication,
    SemiSync(Side),
}

impl Subject {
    /// None: nobody waits for the step's end.
    pub(crate) fn of(step: &Step) -> Option<Subject> {
        match step {
            Step::Address { ip, .. } => Some(Subject::Add(*ip)),
            Step::Allow { ip, .. } => Some(Subject::Allow(*ip)),
            Step::Remove { ip, .. } => Some(Subject::Remove(*ip)),
            Step::ReadOnly => Some(Subject::ReadOnly),
            Step::Writable { .. } => Some(Subject::Writable),
            Step::KillServer => Some(Subject::Kill),
            Step::Follow { .. } | Step::Detach => Some(Subject::Replication),
            Step::SemiSync { side, .. } => Some(Subject::SemiSync(*side)),
            Step::Announce { .. } | Step::Probe { .. } | Step::Task(_) | Step::Job(_) => None,
        }
    }
}

/// Whether the local server can carry a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fitness {
    /// It answers.
    Good,
    /// Its end or its hang is certain, and any grace is over: roles leave.
    Gone,
    /// Not known (yet): nothing new is taken, nothing is dropped.
    Unclear,
}

pub(crate) struct Situation<'a> {
    pub(crate) now: Millis,
    /// The exact guard is up.
    pub(crate) guarded: bool,
    pub(crate) slots: &'a BTreeMap<IpAddr, Slot>,
    pub(crate) server: &'a ServerReport,
    pub(crate) fitness: Fitness,
    /// Shutting down: nothing is a right any more.
    pub(crate) leaving: bool,
    /// The server ended under the order to write: it is not opened under that order again.
    pub(crate) crashed: bool,
    /// A quiesce task has charge of read_only while its order stands.
    pub(crate) quiescing: bool,
    pub(crate) replication: &'a ReplicationOrder,
    /// The configured source of each host: address and port.
    pub(crate) sources: &'a BTreeMap<HostName, (IpAddr, u16)>,
    pub(crate) detached: bool,
    /// The last change of replication, if it has failed half way.
    pub(crate) broken_off: Option<&'a Step>,
    /// The last change of replication that was done.
    pub(crate) replicated: Option<&'a Step>,
    /// A job changes the server's data as a whole.
    pub(crate) rebuilding: bool,
    /// A task is under way.
    pub(crate) working: bool,
    /// Whether this host is to acknowledge what it receives; None: semi-synchronous replication is left as it is.
    pub(crate) acknowledging: Option<bool>,
    /// There is a replica whose acknowledgement is worth waiting for.
    pub(crate) wait_for_replica: bool,
    /// The address of the active master's role.
    pub(crate) writer: Option<IpAddr>,
    /// A hung server that may be writable is killed.
    pub(crate) kills_hung: bool,
    /// The server was opened, and has not been seen closed since.
    pub(crate) opened: bool,
    pub(crate) under_way: &'a BTreeSet<Subject>,
    /// What has failed, and when it is tried again.
    pub(crate) failed: &'a BTreeMap<Subject, (String, Millis)>,
}

impl Situation<'_> {
    /// Steps in order; the ones that give something up come first.
    pub(crate) fn plan(&self) -> Vec<Step> {
        let mut steps: Vec<Step> = self.slots.iter().filter_map(|(ip, slot)| self.remove(*ip, slot)).collect();
        steps.extend(self.slots.iter().filter_map(|(ip, slot)| self.probe(*ip, slot)));
        steps.extend(self.kill());
        steps.extend(self.read_only());
        steps.extend(self.writable());
        for (ip, slot) in self.slots {
            let address = self.address(*ip, slot);
            // An address that is to be refreshed, and just could not be, is to answer all the same.
            let waits = self.failed.get(&Subject::Add(*ip)).is_some_and(|(_, at)| *at > self.now);
            let allow = if address.is_none() || waits { self.allow(*ip, slot) } else { None };
            steps.extend(address.into_iter().chain(allow));
        }
        steps.extend(self.replication());
        steps.extend(self.semisync());
        steps.retain(|step| Subject::of(step).is_none_or(|subject| !self.under_way.contains(&subject)));
        steps
    }

    /// The order under which this address may be here now.
    fn right<'s>(&self, slot: &'s Slot) -> Option<&'s Held> {
        if self.leaving || self.fitness == Fitness::Gone {
            return None;
        }
        // Reader addresses may stay: it serves.
        slot.right(self.now).filter(|held| !(self.crashed && held.order.write))
    }

    fn remove(&self, ip: IpAddr, slot: &Slot) -> Option<Step> {
        // Whoever lost touch goes silently: somebody else may be about to answer for the address.
        let turn_away = self.leaving || self.fitness == Fitness::Gone || self.crashed || slot.hold.is_none();
        (slot.present && slot.is_managed() && self.right(slot).is_none()).then_some(Step::Remove { ip, turn_away })
    }

    /// The hold orders under which the server may be written to.
    fn writing_right(&self) -> Option<(&Slot, &Held)> {
        self.slots
            .values()
            .filter_map(|slot| self.right(slot).map(|held| (slot, held)))
            .find(|(_, held)| held.order.write)
    }

    fn read_only(&self) -> Option<Step> {
        let answers = match self.server.life {
            Life::Alive => true,
            Life::Dead { .. } | Life::Hung { .. } | Life::Unknown { .. } => false,
        };
        let managed = self.slots.values().any(Slot::is_managed);
        (managed
            && answers
            && self.server.writing != Writing::ReadOnly
            && self.writing_right().is_none()
            // MySQL's clone needs super_read_only off; read_only keeps everybody else out meanwhile.
            && !self.rebuilding
            && (self.leaving || !self.quiescing))
            .then_some(Step::ReadOnly)
    }

    /// What is under way in it may be committed when it wakes, so this comes after the address has left.
    fn kill(&self) -> Option<Step> {
        let hangs = matches!(self.server.life, Life::Hung { .. });
        let left = self.slots.values().all(|slot| !slot.present || !slot.is_managed());
        (self.kills_hung && hangs && self.opened && left).then_some(Step::KillServer)
    }

    fn writable(&self) -> Option<Step> {
        let (slot, held) = self.writing_right()?;
        let Lease::Until(end) = held.lease else { return None };
        let allowed = slot.present || slot.may_add(self.now);
        (self.fitness == Fitness::Good && allowed && self.server.writing != Writing::Allowed)
            .then_some(Step::Writable { until: end - held.lead() })
    }

    fn address(&self, ip: IpAddr, slot: &Slot) -> Option<Step> {
        let held = self.right(slot)?;
        let Lease::Until(end) = held.lease else { return None };
        // The guard ends the answers by itself, so the address may stay longer than its lease.
        let whole_seconds = end.since(self.now).as_secs().max(u64::from(self.guarded));
        if whole_seconds == 0 {
            return None;
        }
        let until = self.now + Duration::from_secs(whole_seconds);
        let wanted = if slot.present {
            // Too long is what an order before this one, for a longer time, has left.
            slot.kernel_until.is_none_or(|set| {
                set > until.max(end) || (set < until.min(end) && set.since(self.now) <= held.refresh_before())
            })
        } else {
            // The server opens before the address does: whoever reaches the writer address can write.
            slot.may_add(self.now) && self.fitness == Fitness::Good && self.is_open_for(&held.order)
        };
        let lifetime_s = u32::try_from(whole_seconds).unwrap_or(u32::MAX);
        wanted.then_some(Step::Address { ip, lifetime_s, until: end })
    }

    /// What a renewal adds to the lease of an address that is here and whose lifetime needs nothing; or takes from it, when
    /// leases have become shorter.
    fn allow(&self, ip: IpAddr, slot: &Slot) -> Option<Step> {
        let held = self.right(slot)?;
        let Lease::Until(until) = held.lease else { return None };
        let due = slot
            .allowed_until
            .is_none_or(|armed| until < armed || held.rearm_at(armed, until).is_some_and(|at| at <= self.now));
        (self.guarded && slot.present && due).then_some(Step::Allow { ip, until })
    }

    fn probe(&self, ip: IpAddr, slot: &Slot) -> Option<Step> {
        let due = match self.right(slot) {
            Some(_) => slot.next_probe(self.now).filter(|_| self.fitness != Fitness::Unclear),
            None => slot.look_ahead(self.now).filter(|_| self.writer == Some(ip)),
        };
        due.filter(|at| *at <= self.now).map(|_| Step::Probe { ip })
    }

    fn is_open_for(&self, order: &Hold) -> bool {
        !order.write || (self.server.writing == Writing::Allowed && !self.under_way.contains(&Subject::ReadOnly))
    }

    /// Re-points when the source is another one, and starts again what this agent has stopped. Threads that somebody
    /// else has stopped stay stopped: an operator may be working on them.
    fn replication(&self) -> Option<Step> {
        if self.leaving || self.fitness != Fitness::Good || self.rebuilding {
            return None;
        }
        let current = self.server.replication.as_ref().filter(|r| !r.source.is_empty());
        match self.replication {
            ReplicationOrder::Keep => None,
            ReplicationOrder::Follow { host } => {
                let (ip, port) = self.sources.get(host)?;
                let right_source = current.is_some_and(|r| r.port == *port && r.source.parse() == Ok(*ip));
                // With both threads stopped it was this agent's hand: errors stop one of them.
                let stopped = current.is_some_and(|r| !r.io_running && !r.sql_running);
                let failed = matches!(self.broken_off, Some(Step::Follow { .. }));
                let unfinished = self.detached || (failed && stopped);
                (!right_source || unfinished).then(|| Step::Follow { host: host.clone() })
            }
            ReplicationOrder::Detached => {
                let source = current?;
                (source.io_running || (!self.working && self.may_forget_source())).then_some(Step::Detach)
            }
        }
    }

    /// A drain stops the threads and leaves the source, and a server that starts again fetches from the source that it
    /// knows: the new master, when it crashes, would get what its diverged predecessor wrote. So the source is forgotten
    /// as well, once commits wait for a replica, which is more urgent. What a Detach has left of it is left.
    fn may_forget_source(&self) -> bool {
        let waits = self.server.semisync.as_ref().is_none_or(|s| s.source) || self.acknowledging.is_none();
        let later = self.writing_right().is_some() && self.wait_for_replica && !waits;
        let failed = self.broken_off == Some(&Step::Detach);
        failed || (self.replicated != Some(&Step::Detach) && !later)
    }

    /// The source side is on at the writer, from when a replica is there to acknowledge: the first commit would wait out
    /// the timeout without one. It stays on when that replica goes without the monitor's saying so, so that an isolated
    /// writer acknowledges nothing alone for as long as the timeout lasts, and until the role has left (data-safety.md, "Semi-synchronous replication").
    fn semisync(&self) -> Vec<Step> {
        let (Some(now), Some(acknowledging)) = (self.server.semisync.as_ref(), self.acknowledging) else {
            return Vec::new();
        };
        if self.leaving || self.fitness != Fitness::Good || self.rebuilding || self.working {
            return Vec::new();
        }
        let mut steps = Vec::new();
        if now.replica != acknowledging {
            steps.push(Step::SemiSync { side: Side::Replica, on: acknowledging });
        }
        let holds = self.writer.and_then(|ip| self.slots.get(&ip)).is_some_and(|s| s.present || s.hold.is_some());
        let writes = self.writing_right().is_some() && self.server.writing == Writing::Allowed;
        let released = !holds && self.server.writing == Writing::ReadOnly;
        if writes && !now.source && now.replicas > 0 && self.wait_for_replica {
            steps.push(Step::SemiSync { side: Side::Source, on: true });
        } else if now.source && (released || (writes && !self.wait_for_replica)) {
            steps.push(Step::SemiSync { side: Side::Source, on: false });
        }
        steps
    }
}

//! What was really said to each agent and by it, kept apart from the cores: which order is its newest, how long orders
//! and vouches let it hold, and what it has promised to others (safety.md, R4, R6, R9). The rules judge by it.
//!
//! It repeats the rules in their plainest form. It must never ask a core what it thinks.

use super::Seen;
use crate::world::World;
use crate::world::clock::Clock;
use mmm_common::config::Cluster;
use mmm_common::epoch::{Anchor, Boot, Epoch};
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::{AddressOrder, Order};
use mmm_common::vouch::VouchAnswer;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

#[derive(Default)]
pub(crate) struct Ledger {
    pub(super) books: BTreeMap<HostName, Book>,
    /// Of the last event: addresses given to kernels.
    pub(super) takes: Vec<Take>,
}

/// One agent.
#[derive(Debug, Default)]
pub(super) struct Book {
    boot: Boot,
    /// lease_ttl in its configuration.
    ttl: Duration,
    /// When its reports and requests of this life left, on its own clock.
    sent: BTreeMap<Anchor, Millis>,
    answered: u64,
    pub(super) pages: BTreeMap<IpAddr, Page>,
}

/// One address there.
#[derive(Debug, Default)]
pub(super) struct Page {
    epoch: Epoch,
    /// None: it has been told to let go, or nothing.
    granters: Option<BTreeSet<HostName>>,
    proof: bool,
    /// How long the newest epoch's orders let it hold.
    ordered_until: Millis,
    /// And the vouches of each granter.
    vouched: BTreeMap<HostName, Millis>,
    /// The end of the longest lease it ever had on this boot of the machine.
    pub(super) longest: Millis,
    /// In true time: until then it may not take the address without proof.
    pub(super) promised_until: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Take {
    pub(super) host: HostName,
    pub(super) ip: IpAddr,
    /// The lease under which it acts, as it says.
    pub(super) until: Millis,
    /// As the ledger has it.
    pub(super) lease: Millis,
    pub(super) fresh: bool,
    pub(super) proof: bool,
    pub(super) promised_until: u64,
}

impl Page {
    /// R4 and R6 (c).
    fn lease(&self, now: Millis, ttl: Duration) -> Millis {
        let by_vouches = match &self.granters {
            None => Millis(0),
            Some(granters) if granters.is_empty() => now + ttl,
            Some(granters) => {
                granters.iter().map(|g| self.vouched.get(g).copied().unwrap_or_default()).min().unwrap_or_default()
            }
        };
        self.ordered_until.max(by_vouches)
    }
}

impl Ledger {
    pub(super) fn follow(&mut self, world: &World) {
        self.takes.clear();
        for seen in &world.seen {
            let (Seen::AgentStarted { host, .. }
            | Seen::Crashed { host }
            | Seen::Sent { host, .. }
            | Seen::Ordered { host, .. }
            | Seen::Answered { host, .. }
            | Seen::Promised { host, .. }
            | Seen::Taken { host, .. }) = seen
            else {
                continue;
            };
            if !self.books.contains_key(host) {
                self.books.insert(host.clone(), Book::default());
            }
            let Some(book) = self.books.get_mut(host) else { continue };
            if matches!(seen, Seen::AgentStarted { .. }) {
                book.ttl = world.agents_lease_ttl.unwrap_or(world.config.cluster.lease_ttl);
            }
            let ttl = book.ttl;
            match seen {
                Seen::AgentStarted { boot, at, .. } => {
                    let ips = world.config.cluster.addresses();
                    book.started(*boot, ips.keys(), world.hosts[host].clock.when(*at + ttl + Cluster::MARGIN));
                }
                Seen::Crashed { .. } => book.pages.values_mut().for_each(|page| {
                    (page.granters, page.longest) = (None, Millis(0));
                }),
                Seen::Sent { anchor, at, .. } => {
                    book.sent.insert(*anchor, *at);
                }
                Seen::Ordered { order, at, .. } => book.ordered(order, *at, ttl),
                Seen::Answered { by, answer, .. } => book.answered(by, answer),
                Seen::Promised { answer, guarded, at, .. } => {
                    book.promised(answer, *guarded, *at, &world.hosts[host].clock);
                }
                Seen::Taken { ip, until, fresh, at, .. } => {
                    let page = book.pages.entry(*ip).or_default();
                    let lease = page.lease(*at, ttl);
                    page.longest = page.longest.max(lease);
                    self.takes.push(Take {
                        host: host.clone(),
                        ip: *ip,
                        until: *until,
                        lease,
                        fresh: *fresh,
                        proof: page.proof,
                        promised_until: page.promised_until,
                    });
                }
                Seen::Saved | Seen::MonitorDiskReplaced => {}
            }
        }
    }
}

impl Book {
    /// R9: what is known of the time before is the order, not its lease; and it may have vouched just before it ended.
    fn started<'i>(&mut self, boot: Boot, ips: impl Iterator<Item = &'i IpAddr>, quarantine_until: u64) {
        (self.boot, self.answered) = (boot, 0);
        self.sent.clear();
        for ip in ips {
            let page = self.pages.entry(*ip).or_default();
            page.ordered_until = Millis(0);
            page.vouched.clear();
            page.promised_until = page.promised_until.max(quarantine_until);
        }
    }

    /// R4.
    fn ordered(&mut self, order: &Order, at: Millis, ttl: Duration) {
        let sent = (order.answers.boot == self.boot).then(|| self.sent.get(&order.answers).copied()).flatten();
        if sent.is_some() && order.answers.seq < self.answered {
            return;
        }
        if sent.is_some() {
            self.answered = order.answers.seq;
        }
        let ttl = ttl.min(Duration::from_millis(order.lease_ttl_ms));
        for (ip, order) in &order.addresses {
            let page = self.pages.entry(*ip).or_default();
            match order {
                AddressOrder::LetGo { epoch } if *epoch >= page.epoch => {
                    (page.epoch, page.granters, page.proof) = (*epoch, None, false);
                    page.ordered_until = Millis(0);
                    page.vouched.clear();
                }
                AddressOrder::Hold(hold) if hold.epoch >= page.epoch => {
                    let Some(until) = sent.map(|s| s + ttl).filter(|until| *until > at) else { continue };
                    if hold.epoch > page.epoch || page.granters.is_none() {
                        (page.proof, page.ordered_until) = (false, Millis(0));
                        page.vouched.clear();
                    }
                    page.epoch = hold.epoch;
                    page.granters = Some(hold.granters.clone());
                    page.proof |= hold.proof;
                    page.ordered_until = page.ordered_until.max(until);
                }
                AddressOrder::LetGo { .. } | AddressOrder::Hold(_) => {}
            }
        }
    }

    /// R6 (c).
    fn answered(&mut self, by: &HostName, answer: &VouchAnswer) {
        if answer.anchor.boot != self.boot {
            return;
        }
        let Some(sent) = self.sent.get(&answer.anchor) else { return };
        let until = *sent + Duration::from_millis(answer.lease_ttl_ms);
        for (ip, epoch) in &answer.vouched {
            let Some(page) = self.pages.get_mut(ip).filter(|page| page.epoch == *epoch) else { continue };
            let longest = page.vouched.entry(by.clone()).or_default();
            *longest = until.max(*longest);
        }
    }

    /// R6 (b).
    fn promised(&mut self, answer: &VouchAnswer, guarded: bool, at: Millis, clock: &Clock) {
        let ttl = Duration::from_millis(answer.lease_ttl_ms);
        let until = clock.when(at + ttl + Cluster::margin(ttl, guarded));
        for ip in answer.vouched.keys() {
            let page = self.pages.entry(*ip).or_default();
            page.promised_until = page.promised_until.max(until);
        }
    }
}

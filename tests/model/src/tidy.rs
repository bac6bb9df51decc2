//! Keeps layer A finite: what can never again have an effect is dropped, epochs are renumbered by rank, hosts may change
//! names. It must never drop what the real code could still act on; whether a message has an effect is asked of the real
//! code itself.

use crate::compact::{Anchor, Granters, Hold, Id, Lease, MOST, Set, has};
use crate::rules::{Message, Rules, State};
use crate::wake::{self, Word};
use mmm_common::safeguard::{Safeguard, stands};

impl Rules {
    pub(crate) fn tidy(&self, n: &mut State) {
        for i in self.ids() {
            let a = &mut n.agents[i as usize];
            if let (Some(left), Some(Hold { lease: Lease::Ticks(lease), .. })) = (a.kernel, a.hold)
                && a.present
            {
                // The lifetime follows the lease; not always, but an agent may give up at any time.
                a.kernel = Some(left.max(lease));
            }
            if a.present == a.kernel.is_some() {
                // Agents report all the time.
                n.net.push(Message::Report { from: i, epoch: a.seen, has: a.present });
            }
        }
        n.net.sort_unstable();
        n.net.dedup();
        let net = std::mem::take(&mut n.net);
        n.net = net.iter().copied().filter(|m| self.matters(n, m)).collect();
        let net = std::mem::take(&mut n.net);
        let is_covered = |m: &Message| net.iter().any(|better| better != m && covers(better, m));
        n.net = net.iter().copied().filter(|m| !is_covered(m)).collect();
        if self.complete {
            self.forget_dead_holds(n);
        }
        self.renumber(n);
        if self.symmetry {
            self.permute(n);
        }
    }

    /// False only if delivering the message has no effect now and never will. With a rule taken away, a report or an
    /// order that is without effect now may get one.
    pub(crate) fn matters(&self, n: &State, m: &Message) -> bool {
        match *m {
            Message::Report { from, epoch, has } => {
                let later = !stands(Safeguard::ReleaseAtLaterEpoch) || !stands(Safeguard::LostDiskEpoch);
                (later && !has) || self.changes(n, from, epoch, has)
            }
            Message::Hold { to, .. } | Message::LetGo { to, .. } | Message::Vouch { to, .. } => {
                // A lease is a moment in time: what does not make it longer now never will.
                self.obeyed(&n.agents[to as usize], m).is_some() || self.may_be_obeyed(m)
            }
        }
    }

    fn changes(&self, n: &State, from: Id, epoch: u8, has: bool) -> bool {
        let heard = wake::asked(&n.monitor, Word::Heard { from, epoch, has }, self.quarantine());
        heard.is_some_and(|(after, _)| after != n.monitor)
    }

    /// With a rule taken away, an order that is refused or without effect may come to have one.
    fn may_be_obeyed(&self, m: &Message) -> bool {
        match m {
            Message::Hold { .. } => !stands(Safeguard::LeaseFromSending) || !stands(Safeguard::AnchorOfThisLife),
            Message::Vouch { at, .. } => !stands(Safeguard::VouchFromSending) && !at.old_life,
            Message::LetGo { .. } | Message::Report { .. } => false,
        }
    }

    /// Forgets a hold order that can never again give a lease: out of time, no longer renewed, no copy of it under way,
    /// and a granter that will always refuse.
    fn forget_dead_holds(&self, n: &mut State) {
        for i in self.ids() {
            let a = n.agents[i as usize];
            let Some(h) = a.hold else { continue };
            let on_the_way = |m: &Message| match *m {
                Message::Hold { to, epoch, .. } => to == i && epoch == a.seen,
                Message::LetGo { .. } | Message::Vouch { .. } | Message::Report { .. } => false,
            };
            let vouched = |by: Id| {
                let coming = |m: &Message| matches!(*m, Message::Vouch { to, by: b, .. } if to == i && b == by);
                h.vouches[by as usize] > 0 || n.net.iter().any(coming)
            };
            let refused = self.ids().any(|g| has(h.granters, g) && n.agents[g as usize].seen > a.seen && !vouched(g));
            let renewed = n.monitor.epoch == a.seen || n.net.iter().any(on_the_way);
            if h.lease != Lease::Inherited && h.lease != Lease::Ticks(0) || a.kernel.is_some() || a.present {
                continue;
            }
            if refused && !renewed {
                n.agents[i as usize].hold = None;
            }
        }
    }

    /// Epochs are only compared with those of orders: what lies between two orders is the same.
    fn renumber(&self, n: &mut State) {
        let hosts = usize::from(self.hosts);
        let mut orders: u64 = 0;
        n.agents[..hosts].iter().filter(|a| a.hold.is_some()).for_each(|a| orders |= 1u64 << a.seen);
        n.monitor.live.iter().for_each(|o| orders |= 1 << o.epoch);
        if n.monitor.holder.is_some() {
            orders |= 1 << n.monitor.given;
        }
        for m in &n.net {
            match *m {
                Message::Hold { epoch, .. } | Message::LetGo { epoch, .. } => orders |= 1 << epoch,
                Message::Report { .. } | Message::Vouch { .. } => {}
            }
        }
        let place = |e: u8| 2 * (orders & ((1 << e) - 1)).count_ones() + (orders >> e & 1) as u32;
        let mut used: u64 = 1 << place(n.monitor.epoch) | 1 << place(n.monitor.given);
        n.agents[..hosts].iter().for_each(|a| used |= 1 << place(a.seen));
        n.monitor.live.iter().for_each(|o| used |= 1 << place(o.epoch));
        for m in &n.net {
            let (Message::Report { epoch, .. }
            | Message::Hold { epoch, .. }
            | Message::LetGo { epoch, .. }
            | Message::Vouch { epoch, .. }) = *m;
            used |= 1 << place(epoch);
        }
        let rank = |e: &mut u8| *e = (used & ((1 << place(*e)) - 1)).count_ones() as u8;
        rank(&mut n.monitor.epoch);
        rank(&mut n.monitor.given);
        n.agents[..hosts].iter_mut().for_each(|a| rank(&mut a.seen));
        n.monitor.live.iter_mut().for_each(|o| rank(&mut o.epoch));
        for m in &mut n.net {
            let (Message::Report { epoch, .. }
            | Message::Hold { epoch, .. }
            | Message::LetGo { epoch, .. }
            | Message::Vouch { epoch, .. }) = m;
            rank(epoch);
        }
        n.net.sort_unstable();
        n.net.dedup();
    }

    /// How a run with interchangeable hosts sees this state.
    pub(crate) fn same_for_all_names(&self, s: &State) -> State {
        let mut s = s.clone();
        if self.symmetry {
            self.permute(&mut s);
        }
        s
    }

    /// The least of the states that differ in the hosts' names only.
    fn permute(&self, n: &mut State) {
        let renamed = |p: &[Id; MOST]| {
            let mut agents = n.agents;
            for i in self.ids() {
                let mut a = n.agents[i as usize];
                if let Some(h) = &mut a.hold {
                    h.granters = set(p, h.granters);
                    h.vouches = moved(p, &h.vouches);
                }
                agents[p[i as usize] as usize] = a;
            }
            agents
        };
        let names = names(self.hosts);
        let Some(least) = names.iter().map(&renamed).min() else { return };
        let candidates = names.iter().filter(|p| renamed(p) == least).map(|p| {
            let mut m = State { agents: least, monitor: n.monitor.clone(), net: n.net.clone() };
            m.monitor.wait = moved(p, &n.monitor.wait);
            m.monitor.holder = n.monitor.holder.map(|h| p[h as usize]);
            for order in &mut m.monitor.live {
                order.to = p[order.to as usize];
                if let Granters::Known(granters) = &mut order.granters {
                    *granters = set(p, *granters);
                }
            }
            m.monitor.live.sort_unstable();
            for message in &mut m.net {
                match message {
                    Message::Report { from, .. } => *from = p[*from as usize],
                    Message::LetGo { to, .. } => *to = p[*to as usize],
                    Message::Hold { to, grant, .. } => {
                        *to = p[*to as usize];
                        grant.granters = set(p, grant.granters);
                    }
                    Message::Vouch { to, by, .. } => {
                        *to = p[*to as usize];
                        *by = p[*by as usize];
                    }
                }
            }
            m.net.sort_unstable();
            m
        });
        if let Some(best) = candidates.min() {
            *n = best;
        }
    }
}

/// `a` allows everything that `b` allows: a longer lease allows what a shorter one does, also to vouch (main.rs).
fn covers(a: &Message, b: &Message) -> bool {
    let newer = |x: Anchor, y: Anchor| x.old_life == y.old_life && x.age <= y.age;
    match (*a, *b) {
        (Message::Vouch { to, by, at, epoch }, Message::Vouch { to: t, by: y, at: other, epoch: e }) => {
            to == t && by == y && epoch == e && newer(at, other)
        }
        (Message::Hold { to, epoch, grant: g }, Message::Hold { to: t, epoch: e, grant: h }) => {
            to == t && epoch == e && g.granters == h.granters && newer(g.at, h.at) && g.proof >= h.proof
        }
        (Message::Vouch { .. } | Message::Hold { .. } | Message::LetGo { .. } | Message::Report { .. }, _) => false,
    }
}

fn set(p: &[Id; MOST], s: Set) -> Set {
    (0..MOST).filter(|i| s >> i & 1 == 1).fold(0, |all, i| all | 1 << p[i])
}

fn moved(p: &[Id; MOST], values: &[i8; MOST]) -> [i8; MOST] {
    let mut out = [0; MOST];
    (0..MOST).for_each(|i| out[p[i] as usize] = values[i]);
    out
}

/// Every way to rename the hosts.
fn names(hosts: u8) -> &'static [[Id; MOST]] {
    match hosts {
        2 => &[[0, 1, 2], [1, 0, 2]],
        3 => &[[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]],
        _ => &[[0, 1, 2]],
    }
}

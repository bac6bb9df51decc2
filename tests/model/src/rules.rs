//! Layer A: the two places where the safety rules live, the monitor's `Slot` and the agents' `Slot`, for one address,
//! under every policy. Whoever decides may grant, renew and take back whenever the real code lets it; the network keeps
//! every message for ever; agents obey, take, vouch, give up and restart whenever they like.
//!
//! All rules are the real code's (`wake.rs`). This file only says what may happen when, what a message is, and how time
//! passes; it must never refuse what the real programs could do.

use crate::compact::{Agent, Anchor, Decided, Granters, Id, Lease, MOST, Set, has};
use crate::wake::{self, Question, Told, Word};
use mmm_common::safeguard::{Safeguard, stands};
use stateright::{Model, Property};

/// One run. Time is in ticks of 1.5 s, which is also the margin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    pub hosts: u8,
    pub ttl: i8,
    /// How many epochs may be in use at one time. Over a whole run there may be any number.
    pub epochs: u8,
    /// Processes of agents restart, and machines reboot.
    pub restart: bool,
    pub kill: bool,
    pub monitor_restart: bool,
    pub lost_disk: bool,
    /// The holder's order is given anew: other granters, another word about writing.
    pub rewrite: bool,
    /// Addresses leave machines by the kernel's hand, without the agent's knowledge.
    pub unseen: bool,
    /// An agent may be asked to vouch before its first look into the kernel.
    pub(crate) blind: bool,
    pub(crate) sets: Sets,
    /// Hosts are interchangeable: states that differ in their names only are one.
    pub symmetry: bool,
    /// All rules stand: some messages and orders that have become meaningless may then be forgotten.
    pub complete: bool,
}

/// Which granters an order may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sets {
    Any,
    /// All other hosts.
    All,
    /// One other host.
    One,
}

impl Sets {
    fn has(self, set: Set, others: Set) -> bool {
        let wanted = match self {
            Sets::Any => true,
            Sets::All => set == others,
            Sets::One => set.count_ones() == 1,
        };
        wanted && set & !others == 0
    }
}

/// The kernel removes an address less than so many ticks after its lease.
const LATE: i8 = 1;

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Grant {
    pub at: Anchor,
    pub granters: Set,
    pub proof: bool,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Message {
    Report {
        from: Id,
        epoch: u8,
        has: bool,
    },
    Hold {
        to: Id,
        epoch: u8,
        grant: Grant,
    },
    LetGo {
        to: Id,
        epoch: u8,
    },
    /// The answer to a request. Requests are not kept: an agent can always ask again, and an older one gives less.
    Vouch {
        to: Id,
        by: Id,
        at: Anchor,
        epoch: u8,
    },
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct State {
    pub agents: [Agent; MOST],
    pub monitor: Decided,
    pub net: Vec<Message>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Tick,
    Grant {
        to: Id,
        granters: Set,
    },
    Rewrite {
        granters: Set,
    },
    Release,
    /// The monitor says to this host what it has to say now.
    Send(Id),
    Deliver(Message),
    Take(Id),
    /// An agent that still believes that it has the address sets its lifetime, which puts it back.
    PutBack(Id),
    Remove(Id),
    KernelRemoves(Id),
    /// The agent looks into the kernel.
    Look(Id),
    Vouch {
        by: Id,
        to: Id,
    },
    ExtendAlone(Id),
    RestartAgent(Id),
    Reboot(Id),
    /// kill_host is confirmed, and the machine comes back.
    Kill(Id),
    RestartMonitor,
    LoseDisk,
}

/// Names a report or a request that was sent just now.
const JUST_SENT: Anchor = Anchor { age: 0, old_life: false };

impl Rules {
    /// Nothing fails but the network, and machines as slow as they like.
    pub(crate) fn calm(hosts: u8, epochs: u8) -> Self {
        Rules {
            hosts,
            ttl: 2,
            epochs,
            restart: false,
            kill: false,
            monitor_restart: false,
            lost_disk: false,
            rewrite: false,
            unseen: false,
            blind: false,
            sets: Sets::Any,
            symmetry: true,
            complete: true,
        }
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = Id> + use<> {
        0..self.hosts
    }

    fn others(&self, id: Id) -> Set {
        ((1 << self.hosts) - 1) & !(1 << id)
    }

    /// ttl and margin.
    pub(crate) fn quarantine(&self) -> i8 {
        self.ttl + if stands(Safeguard::Margin) { LATE } else { 0 }
    }

    // ---- the monitor ------------------------------------------------------------------------------------------

    fn send(&self, n: &mut State, to: Id) {
        let epoch = n.monitor.epoch;
        let Some((monitor, said)) = wake::asked(&n.monitor, Word::Order { to }, self.quarantine()) else { return };
        n.monitor = monitor;
        n.net.extend(said.map(|said| match said {
            Told::Hold { granters, proof } => {
                Message::Hold { to, epoch, grant: Grant { at: JUST_SENT, granters, proof } }
            }
            Told::LetGo { epoch } => Message::LetGo { to, epoch },
        }));
    }

    /// What the shell reads from the disk.
    fn restart_monitor(&self, n: &mut State) {
        let monitor = &mut n.monitor;
        if !stands(Safeguard::DiskFirst) && monitor.live.iter().any(|o| o.epoch == monitor.epoch) {
            // The newest decision was sent and is not on disk.
            monitor.live.retain(|o| o.epoch != monitor.epoch);
            monitor.epoch -= 1;
            monitor.holder = None;
        }
        if !stands(Safeguard::GrantersOnDisk) {
            monitor.live.iter_mut().for_each(|o| o.granters = Granters::Known(self.others(o.to)));
        }
        *monitor = wake::restored(monitor, self.quarantine());
    }

    /// R11: the unix time is above every epoch ever sent, and so is the number before it.
    fn lose_disk(&self, n: &mut State) {
        let seen = n.agents.iter().map(|a| a.seen).max().unwrap_or(0);
        let epoch = if stands(Safeguard::LostDiskNumbering) { n.monitor.epoch + 2 } else { seen + 1 };
        n.monitor = wake::first(epoch, self.hosts, self.quarantine());
    }

    // ---- the agents -------------------------------------------------------------------------------------------

    fn restart_agent(&self, n: &mut State, i: Id, reboot: bool) {
        let agent = &mut n.agents[i as usize];
        if reboot {
            agent.kernel = None;
        }
        *agent = wake::restarted(agent, !reboot, self.quarantine(), self.ttl);
        // The shell looks into the kernel before it hands over anything else, unless the kernel cannot be read.
        agent.present = agent.kernel.is_some() && !self.blind;
        for message in &mut n.net {
            match message {
                Message::Hold { to, grant: Grant { at, .. }, .. } | Message::Vouch { to, at, .. } if *to == i => {
                    at.old_life = true;
                }
                Message::Hold { .. } | Message::Vouch { .. } | Message::LetGo { .. } | Message::Report { .. } => {}
            }
        }
    }

    /// What becomes of the agent that this message is for; None: nothing, or it is for the monitor.
    pub(crate) fn obeyed(&self, agent: &Agent, message: &Message) -> Option<Agent> {
        let question = match *message {
            Message::Hold { epoch, grant, .. } => Question::Obey { seen: epoch, grant: Some(grant) },
            Message::LetGo { epoch, .. } => Question::Obey { seen: epoch, grant: None },
            Message::Vouch { by, at, epoch, .. } => Question::Vouched { by, at, asked: epoch },
            Message::Report { .. } => return None,
        };
        let after = wake::becomes(agent, question, self.ttl);
        (after != *agent).then_some(after)
    }
}

impl Model for Rules {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let monitor = Decided { epoch: 0, holder: None, given: 0, live: vec![], wait: [0; MOST] };
        let mut s = State { agents: Default::default(), monitor, net: vec![] };
        self.tidy(&mut s);
        vec![s]
    }

    fn actions(&self, s: &State, out: &mut Vec<Action>) {
        if !s.agents.iter().any(|a| a.kernel.is_some_and(|left| left <= 1 - LATE)) {
            out.push(Action::Tick);
        }
        let may_decide = s.monitor.epoch < self.epochs;
        for i in self.ids() {
            let a = &s.agents[i as usize];
            let gone = a.kernel.is_none();
            if !a.present && gone && wake::allows(a, self.ttl).add {
                out.push(Action::Take(i));
            }
            if a.present && gone && wake::allows(a, self.ttl).keep {
                out.push(Action::PutBack(i));
            }
            if !gone {
                out.push(Action::Remove(i));
                if self.unseen {
                    out.push(Action::KernelRemoves(i));
                }
            }
            if a.present == gone {
                out.push(Action::Look(i));
            }
            let granters = a.hold.map_or(0, |h| h.granters);
            out.extend(self.ids().filter(|by| has(granters, *by)).map(|by| Action::Vouch { by, to: i }));
            if a.hold.is_some() && granters == 0 {
                out.push(Action::ExtendAlone(i));
            }
            if self.restart {
                out.extend([Action::RestartAgent(i), Action::Reboot(i)]);
            }
            if self.kill {
                out.push(Action::Kill(i));
            }
            out.push(Action::Send(i));
            let others = self.others(i);
            let sets = || (0..1 << self.hosts).filter(|set| self.sets.has(*set, others));
            if may_decide && wake::asked(&s.monitor, Word::Grant { to: i, granters: 0 }, self.quarantine()).is_some() {
                out.extend(sets().map(|granters| Action::Grant { to: i, granters }));
            }
            if may_decide && self.rewrite && s.monitor.holder == Some(i) {
                out.extend(sets().map(|granters| Action::Rewrite { granters }));
            }
        }
        if may_decide && s.monitor.holder.is_some() {
            out.push(Action::Release);
        }
        out.extend(s.net.iter().map(|m| Action::Deliver(*m)));
        if self.monitor_restart {
            out.push(Action::RestartMonitor);
        }
        if self.lost_disk && may_decide {
            out.push(Action::LoseDisk);
        }
    }

    fn next_state(&self, s: &State, action: Action) -> Option<State> {
        let quarantine = self.quarantine();
        let mut n = s.clone();
        match action {
            Action::Tick => tick(&mut n, self.ttl),
            Action::Grant { to, granters } => {
                n.monitor = wake::asked(&n.monitor, Word::Grant { to, granters }, quarantine)?.0;
                self.send(&mut n, to);
            }
            Action::Rewrite { granters } => {
                let to = s.monitor.holder?;
                n.monitor = wake::rewrite(&n.monitor, granters, quarantine);
                self.send(&mut n, to);
            }
            Action::Release => n.monitor = wake::release(&n.monitor, quarantine),
            Action::Send(to) => self.send(&mut n, to),
            Action::Deliver(Message::Report { from, epoch, has }) => {
                n.monitor = wake::asked(&n.monitor, Word::Heard { from, epoch, has }, quarantine)?.0;
            }
            Action::Deliver(m @ (Message::Hold { to, .. } | Message::LetGo { to, .. } | Message::Vouch { to, .. })) => {
                n.agents[to as usize] = self.obeyed(&s.agents[to as usize], &m)?;
            }
            Action::Take(i) | Action::PutBack(i) => {
                let a = &mut n.agents[i as usize];
                let Lease::Ticks(left) = a.hold?.lease else { return None };
                (a.present, a.kernel) = (true, Some(left));
            }
            Action::Remove(i) => {
                let a = &mut n.agents[i as usize];
                (a.present, a.kernel) = (false, None);
            }
            Action::KernelRemoves(i) => n.agents[i as usize].kernel = None,
            Action::Look(i) => {
                let a = &mut n.agents[i as usize];
                a.present = a.kernel.is_some();
            }
            Action::Vouch { by, to } => {
                let epoch = s.agents[to as usize].seen;
                let vouch = Message::Vouch { to, by, at: JUST_SENT, epoch };
                if !self.matters(s, &vouch) || s.net.contains(&vouch) {
                    // It would only make the voucher wait longer.
                    return None;
                }
                n.agents[by as usize] = wake::vouch(&s.agents[by as usize], epoch, quarantine, self.ttl)?;
                n.net.push(vouch);
            }
            Action::ExtendAlone(i) => n.agents[i as usize] = wake::extend_alone(&s.agents[i as usize], self.ttl),
            Action::RestartAgent(i) => self.restart_agent(&mut n, i, false),
            Action::Reboot(i) => self.restart_agent(&mut n, i, true),
            Action::Kill(i) => {
                self.restart_agent(&mut n, i, true);
                n.monitor = wake::killed(&n.monitor, i, quarantine);
            }
            Action::RestartMonitor => self.restart_monitor(&mut n),
            Action::LoseDisk => self.lose_disk(&mut n),
        }
        self.tidy(&mut n);
        (n != *s).then_some(n)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let never_two = |_: &Self, s: &State| s.agents.iter().filter(|a| a.kernel.is_some()).count() < 2;
        let on_vouches = |_: &Self, s: &State| {
            s.agents.iter().zip(0..).any(|(a, i)| {
                let waited_out = s.monitor.wait[i as usize] == 0 && s.monitor.live.iter().any(|o| o.to == i);
                let vouched = a.hold.is_some_and(|h| h.granters != 0);
                waited_out && vouched && a.kernel.is_some_and(|left| left > 0)
            })
        };
        let by_expiry = |_: &Self, s: &State| {
            s.agents.iter().zip(0..).any(|(a, i)| {
                let unproved = a.kernel.is_some() && a.hold.is_some_and(|h| !h.proof);
                unproved && s.monitor.live.iter().any(|o| o.to != i && o.epoch < a.seen)
            })
        };
        let by_release = |_: &Self, s: &State| {
            s.agents.iter().any(|a| a.kernel.is_some() && a.vouched > 0 && a.hold.is_some_and(|h| h.proof))
        };
        vec![
            Property::always(NEVER_TWO, never_two),
            Property::sometimes(ON_VOUCHES, on_vouches),
            Property::sometimes(BY_EXPIRY, by_expiry),
            Property::sometimes(BY_RELEASE, by_release),
        ]
    }
}

pub(crate) const NEVER_TWO: &str = "never two holders";
/// What must happen in a run, so that it says something.
pub(crate) const ON_VOUCHES: &str = "a holder lives on vouches alone";
pub(crate) const BY_EXPIRY: &str = "the address moves by expiry";
pub(crate) const BY_RELEASE: &str = "the address moves by a release, to one that has just vouched";

fn tick(n: &mut State, ttl: i8) {
    for a in &mut n.agents {
        a.vouched = (a.vouched - 1).max(0);
        a.kernel = a.kernel.map(|left| left - 1);
        if let Some(hold) = &mut a.hold {
            if let Lease::Ticks(left) = &mut hold.lease {
                *left = (*left - 1).max(0);
            }
            hold.vouches.iter_mut().for_each(|left| *left = (*left - 1).max(0));
        }
    }
    n.monitor.wait.iter_mut().for_each(|left| *left = (*left - 1).max(0));
    for message in &mut n.net {
        if let Message::Hold { grant: Grant { at, .. }, .. } | Message::Vouch { at, .. } = message {
            at.age = (at.age + 1).min(ttl);
        }
    }
}

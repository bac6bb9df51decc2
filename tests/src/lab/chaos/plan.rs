//! What a campaign does, drawn from its seed: rounds of one to three faults, each with its beginning, its length and
//! its target. A target is named by what it is at that moment (the writer, the standby, the replica), so the same seed
//! tells the same list whatever the cluster has made of the faults before.
//!
//! Nothing here looks at a clock or at the cluster.

use serde::Serialize;
use std::fmt;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Who {
    /// The master that has the writer address, or had it last.
    Writer,
    /// The other master.
    Standby,
    Replica,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Program {
    Mysqld(Who),
    Agent(Who),
    Helper(Who),
    Monitor,
}

/// One end of a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Place {
    Host(Who),
    Monitor,
    /// What the monitor pings to see whether its own network works.
    Gateway,
}

/// What happens to a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Blow {
    /// kill -9; healed by a start.
    Kill,
    /// SIGSTOP; healed by SIGCONT.
    Stop,
    /// SIGTERM; healed by a start as soon as it has ended.
    Restart,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Fault {
    Hit(Blow, Program),
    /// What one sends does not reach the other.
    Cut(Place, Place),
    CutBoth(Place, Place),
    /// Cut from the monitor and from the other database hosts in both directions; the clients still reach it.
    Isolate(Who),
    /// The cable is out.
    LinkDown(Place),
    /// `move_role writer` to the standby.
    Move,
    /// `set_offline`; healed by `set_online`.
    Offline(Who),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Step {
    /// Since the round began.
    pub(super) after: Duration,
    pub(super) lasts: Duration,
    pub(super) fault: Fault,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Round {
    /// Before its first fault.
    pub(super) calm: Duration,
    /// Whether the cluster is given the time to serve again afterwards; otherwise the next faults meet it as it is.
    pub(super) settle: bool,
    pub(super) steps: Vec<Step>,
}

/// The endless list of rounds of one seed.
pub(super) struct Plan {
    state: u64,
}

impl Plan {
    pub(super) fn new(seed: u64) -> Plan {
        Plan { state: seed ^ 0x6d6d_6d2d_6c61_6221 }
    }

    /// splitmix64: small, and the same everywhere.
    fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    fn any(&mut self, n: u64) -> u64 {
        self.number() % n.max(1)
    }

    /// Short ones as often as long ones: as many from 0.1 to 1 s as from 1 to 10 s.
    fn length(&mut self, from_ms: u64, to_ms: u64) -> Duration {
        let share = self.any(10_000) as f64 / 10_000.0;
        let (low, high) = ((from_ms as f64).ln(), (to_ms as f64).ln());
        Duration::from_millis((low + (high - low) * share).exp() as u64)
    }

    fn who(&mut self) -> Who {
        match self.any(10) {
            0..=4 => Who::Writer,
            5..=7 => Who::Standby,
            _ => Who::Replica,
        }
    }

    /// Two different ends; a pair of database hosts, or the monitor and something else.
    fn pair(&mut self) -> (Place, Place) {
        let (one, other) = match self.any(8) {
            0..=2 => (Place::Monitor, Place::Host(Who::Writer)),
            3 => (Place::Monitor, Place::Host(Who::Standby)),
            4 => (Place::Monitor, Place::Host(Who::Replica)),
            5 => (Place::Host(Who::Writer), Place::Host(Who::Standby)),
            6 => (Place::Host(Who::Writer), Place::Host(Who::Replica)),
            _ => (Place::Monitor, Place::Gateway),
        };
        if self.any(2) == 0 { (one, other) } else { (other, one) }
    }

    fn step(&mut self) -> Step {
        let (fault, lasts) = match self.any(100) {
            0..=11 => (Fault::Hit(Blow::Kill, Program::Mysqld(self.who())), self.length(100, 20_000)),
            12..=19 => (Fault::Hit(Blow::Stop, Program::Mysqld(self.who())), self.length(50, 20_000)),
            20..=25 => (Fault::Hit(Blow::Restart, Program::Mysqld(self.who())), self.length(50, 2_000)),
            26..=31 => (Fault::Hit(Blow::Kill, Program::Agent(self.who())), self.length(50, 20_000)),
            32..=33 => (Fault::Hit(Blow::Kill, Program::Helper(self.who())), self.length(50, 20_000)),
            34..=39 => (Fault::Hit(Blow::Stop, Program::Agent(self.who())), self.length(50, 20_000)),
            40..=43 => (Fault::Hit(Blow::Restart, Program::Agent(self.who())), self.length(50, 2_000)),
            44..=49 => (Fault::Hit(Blow::Kill, Program::Monitor), self.length(50, 20_000)),
            50..=53 => (Fault::Hit(Blow::Stop, Program::Monitor), self.length(50, 20_000)),
            54..=56 => (Fault::Hit(Blow::Restart, Program::Monitor), self.length(50, 2_000)),
            57..=65 => {
                let (from, to) = self.pair();
                (Fault::Cut(from, to), self.length(200, 20_000))
            }
            66..=74 => {
                let (one, other) = self.pair();
                (Fault::CutBoth(one, other), self.length(200, 20_000))
            }
            75..=81 => (Fault::Isolate(self.who()), self.length(500, 20_000)),
            82..=87 => {
                let place = if self.any(6) == 0 { Place::Monitor } else { Place::Host(self.who()) };
                (Fault::LinkDown(place), self.length(50, 5_000))
            }
            88..=89 => (Fault::LinkDown(Place::Host(self.who())), self.length(5_000, 20_000)),
            90..=95 => (Fault::Move, Duration::ZERO),
            _ => (Fault::Offline(self.who()), self.length(1_000, 10_000)),
        };
        Step { after: Duration::ZERO, lasts, fault }
    }

    fn steps(&mut self) -> Vec<Step> {
        match self.any(100) {
            // The case that the kernel's lifetimes are for: the agent cannot let go, and nobody can tell it to.
            0..=11 => {
                let who = if self.any(3) == 0 { self.who() } else { Who::Writer };
                let (agent, cut) = (Program::Agent(who), Fault::Isolate(who));
                let fault =
                    if self.any(2) == 0 { Fault::Hit(Blow::Kill, agent) } else { Fault::Hit(Blow::Stop, agent) };
                let lasts = self.length(2_000, 20_000);
                let cut = Step { after: self.length(10, 1_000), lasts, fault: cut };
                vec![Step { after: Duration::ZERO, lasts: cut.after + lasts + self.length(50, 5_000), fault }, cut]
            }
            // In the middle of a planned move.
            12..=21 => {
                let moved = Step { after: Duration::ZERO, lasts: Duration::ZERO, fault: Fault::Move };
                vec![moved, Step { after: self.length(5, 1_000), ..self.step() }]
            }
            22..=41 => {
                let first = self.step();
                let second = Step { after: self.length(10, 6_000), ..self.step() };
                vec![first, second]
            }
            // A link that comes and goes.
            42..=45 => {
                let place = Place::Host(self.who());
                let mut after = Duration::ZERO;
                let mut steps = Vec::new();
                for _ in 0..3 {
                    let lasts = self.length(50, 3_000);
                    steps.push(Step { after, lasts, fault: Fault::LinkDown(place) });
                    after += lasts + self.length(50, 3_000);
                }
                steps
            }
            _ => vec![self.step()],
        }
    }
}

impl Iterator for Plan {
    type Item = Round;

    fn next(&mut self) -> Option<Round> {
        let calm = self.length(300, 8_000);
        let settle = self.any(6) > 0;
        let steps = self.steps();
        Some(Round { calm, settle, steps })
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Who::Writer => "writer",
            Who::Standby => "standby",
            Who::Replica => "replica",
        })
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Program::Mysqld(who) => write!(f, "server of {who}"),
            Program::Agent(who) => write!(f, "agent of {who}"),
            Program::Helper(who) => write!(f, "helper of {who}"),
            Program::Monitor => f.write_str("monitor"),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Host(who) => write!(f, "{who}"),
            Place::Monitor => f.write_str("monitor"),
            Place::Gateway => f.write_str("gateway"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Hit(Blow::Kill, program) => write!(f, "kill -9 {program}"),
            Fault::Hit(Blow::Stop, program) => write!(f, "SIGSTOP {program}"),
            Fault::Hit(Blow::Restart, program) => write!(f, "restart {program}"),
            Fault::Cut(from, to) => write!(f, "cut {from} -> {to}"),
            Fault::CutBoth(one, other) => write!(f, "cut {one} <-> {other}"),
            Fault::Isolate(who) => write!(f, "isolate {who}"),
            Fault::LinkDown(place) => write!(f, "link down {place}"),
            Fault::Move => f.write_str("move_role writer"),
            Fault::Offline(who) => write!(f, "set_offline {who}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_same_seed_gives_the_same_list_and_another_seed_another() {
        let rounds = |seed| Plan::new(seed).take(200).collect::<Vec<_>>();
        assert_eq!(rounds(7), rounds(7));
        assert_ne!(rounds(7), rounds(8));
    }

    #[test]
    fn every_kind_of_fault_comes_up_and_all_of_them_end() {
        let mut kinds = BTreeSet::new();
        for round in Plan::new(1).take(500) {
            assert!(!round.steps.is_empty() && round.steps.len() <= 3, "{round:?}");
            assert!(round.calm <= Duration::from_secs(8), "{round:?}");
            for step in &round.steps {
                assert!(step.after + step.lasts <= Duration::from_secs(60), "{step:?}");
                kinds.insert(step.fault.to_string());
            }
        }
        for wanted in [
            "kill -9 server of writer",
            "SIGSTOP server of writer",
            "restart server of standby",
            "kill -9 agent of writer",
            "SIGSTOP agent of writer",
            "restart agent of writer",
            "kill -9 helper of writer",
            "kill -9 monitor",
            "SIGSTOP monitor",
            "cut monitor -> writer",
            "cut writer -> monitor",
            "cut writer <-> standby",
            "cut monitor <-> gateway",
            "isolate writer",
            "link down writer",
            "move_role writer",
            "set_offline writer",
        ] {
            assert!(kinds.contains(wanted), "{wanted} is not among {kinds:?}");
        }
    }
}

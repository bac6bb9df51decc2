//! What came of a run, and a way to two holders as a story to read.

use crate::compact::{Granters, Lease};
use crate::rules::{Action, Message, Rules, State};
use stateright::{Model, Path};
use std::collections::BTreeSet;
use std::time::Duration;

pub(crate) struct Outcome {
    pub(crate) states: usize,
    pub(crate) steps: usize,
    pub(crate) took: Duration,
    pub(crate) finished: bool,
    pub(crate) two_holders: Option<Path<State, Action>>,
    pub(crate) reached: BTreeSet<&'static str>,
}

impl Outcome {
    pub(crate) fn line(&self) -> String {
        let verdict = match &self.two_holders {
            Some(path) => format!("two holders after {} steps", path.clone().into_actions().len()),
            None if self.finished => format!("never two holders, whatever happens (up to {} steps)", self.steps),
            None => "NOT FINISHED".to_owned(),
        };
        format!("{:>9} states {:>6.1} s  {verdict}", self.states, self.took.as_secs_f64())
    }

    /// What a run in which everything works comes by.
    pub(crate) fn never_reached(&self) -> Vec<&'static str> {
        [crate::rules::ON_VOUCHES, crate::rules::BY_EXPIRY, crate::rules::BY_RELEASE]
            .into_iter()
            .filter(|name| !self.reached.contains(name))
            .collect()
    }
}

/// The way of a run with interchangeable hosts, told with hosts that keep their names.
pub(crate) fn print(rules: &Rules, path: &Path<State, Action>) {
    let named = Rules { symmetry: false, ..*rules };
    let Some(mut state) = named.init_states().pop() else { return };
    for (number, wanted) in path.clone().into_states().iter().skip(1).enumerate() {
        let mut actions = Vec::new();
        named.actions(&state, &mut actions);
        let next = actions.into_iter().find_map(|action| {
            let next = named.next_state(&state, action)?;
            (rules.same_for_all_names(&next) == *wanted).then_some((action, next))
        });
        let Some((action, next)) = next else {
            println!("    the rest cannot be told with fixed names: {wanted:?}");
            return;
        };
        state = next;
        println!("    {:2} {}", number + 1, told(action));
        println!("         {}", picture(rules, &state));
    }
}

fn db(id: u8) -> String {
    format!("db{}", id + 1)
}

fn set(hosts: u8) -> String {
    let names: Vec<String> = (0..8).filter(|i| hosts >> i & 1 == 1).map(db).collect();
    format!("{{{}}}", names.join(","))
}

fn told(action: Action) -> String {
    match action {
        Action::Tick => "1.5 s pass".to_owned(),
        Action::Grant { to, granters } => {
            format!("the monitor grants it to {} with granters {}", db(to), set(granters))
        }
        Action::Rewrite { granters } => format!("the monitor gives the holder granters {}", set(granters)),
        Action::Release => "the monitor decides that nobody holds it".to_owned(),
        Action::Send(to) => format!("the monitor says it again to {}", db(to)),
        Action::Deliver(message) => delivered(message),
        Action::Take(i) => format!("{} takes the address", db(i)),
        Action::PutBack(i) => format!("{} thinks it has the address, and refreshes it", db(i)),
        Action::Remove(i) => format!("{} removes the address", db(i)),
        Action::KernelRemoves(i) => format!("the address leaves {} without its agent's knowledge", db(i)),
        Action::Look(i) => format!("{} looks into its kernel", db(i)),
        Action::Vouch { by, to } => format!("{} vouches for {}", db(by), db(to)),
        Action::ExtendAlone(i) => format!("{} extends its lease by itself", db(i)),
        Action::RestartAgent(i) => format!("the agent of {} restarts", db(i)),
        Action::Reboot(i) => format!("{} reboots", db(i)),
        Action::Kill(i) => format!("{} is killed for certain, and comes back", db(i)),
        Action::RestartMonitor => "the monitor restarts".to_owned(),
        Action::LoseDisk => "the monitor loses its disk and starts".to_owned(),
    }
}

fn delivered(message: Message) -> String {
    match message {
        Message::Report { from, epoch, has } => {
            let word = if has { "has it" } else { "does not have it" };
            format!("the monitor hears that {} {word}, epoch {epoch}", db(from))
        }
        Message::Hold { to, epoch, grant } => {
            let proof = if grant.proof { "proved" } else { "not proved" };
            let life = if grant.at.old_life { ", to an earlier life" } else { "" };
            format!(
                "{} gets hold order {epoch} ({proof}, answers what was sent {} ticks ago{life})",
                db(to),
                grant.at.age
            )
        }
        Message::LetGo { to, epoch } => format!("{} gets let-go {epoch}", db(to)),
        Message::Vouch { to, by, at, epoch } => {
            let life = if at.old_life { ", to an earlier life" } else { "" };
            format!("{} gets the vouch of {} for epoch {epoch} (asked {} ticks ago{life})", db(to), db(by), at.age)
        }
    }
}

fn picture(rules: &Rules, s: &State) -> String {
    let mut parts: Vec<String> = rules
        .ids()
        .map(|i| {
            let a = &s.agents[i as usize];
            let hold = a.hold.map_or(String::new(), |h| {
                let lease = match h.lease {
                    Lease::Ticks(left) => left.to_string(),
                    Lease::Inherited => "inherited".to_owned(),
                };
                let proof = if h.proof { " proved" } else { "" };
                format!(" order(granters {}{proof}, lease {lease})", set(h.granters))
            });
            let has = a.kernel.map_or(String::new(), |left| format!("HAS IT({left}) "));
            format!("{}: {has}seen {}{hold} promised {}", db(i), a.seen, a.vouched)
        })
        .collect();
    let live: Vec<String> = s
        .monitor
        .live
        .iter()
        .map(|o| match o.granters {
            Granters::Known(granters) => format!("{}:{} {}", o.epoch, db(o.to), set(granters)),
            Granters::Unknown => format!("{}:{} unknown", o.epoch, db(o.to)),
        })
        .collect();
    let wait = &s.monitor.wait[..usize::from(rules.hosts)];
    parts.push(format!("monitor: epoch {} live [{}] waits {wait:?}", s.monitor.epoch, live.join(", ")));
    parts.join(" | ")
}

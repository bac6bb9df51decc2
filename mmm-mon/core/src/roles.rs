//! Stage 3: who should hold what. Only wishes: whether and when a wish may come true is decided by `slot.rs`.
//!
//! Only balanced and orphaned addresses move by themselves; nothing else moves without cause (MMM's manual, "Roles").

use mmm_common::config::Role;
use mmm_common::ids::HostName;
use mmm_common::state::{MonitorMode, RoleMode};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// A host that may be given a role: it is ONLINE, its agent answers, its server is alive.
/// Built only by [`Eligible::if_fit`], so that no other stage can invent one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Eligible(HostName);

impl Eligible {
    pub(crate) fn if_fit(host: &HostName, online: bool, agent_answers: bool, server_alive: bool) -> Option<Self> {
        (online && agent_answers && server_alive).then(|| Eligible(host.clone()))
    }

    pub(crate) fn host(&self) -> &HostName {
        &self.0
    }
}

/// What stage 3 looks at. Hosts that are in neither set can neither keep nor get a role.
pub(crate) struct Standing<'a> {
    pub(crate) mode: MonitorMode,
    /// May be given a role.
    pub(crate) eligible: &'a BTreeSet<Eligible>,
    /// May keep what they have.
    pub(crate) keeping: &'a BTreeSet<HostName>,
    /// What an operator asked for.
    pub(crate) intent: &'a BTreeMap<IpAddr, HostName>,
    /// Hosts that an operator has set offline: their roles leave in every mode.
    pub(crate) offline: &'a BTreeSet<HostName>,
    /// Balanced addresses that an operator wants off their host.
    pub(crate) taken_off: &'a BTreeSet<IpAddr>,
    /// Who has an address that nobody holds by a known order: the monitor's state was lost (safety.md, R11).
    pub(crate) found: &'a BTreeMap<IpAddr, HostName>,
    /// In a mode that moves nothing by itself: who had this role when its server ended, and has it no longer but in name.
    pub(crate) crashed: Option<&'a HostName>,
}

/// Where an address should be, and why it should move if it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    /// None: on nobody.
    pub(crate) host: Option<Eligible>,
    /// Stays where it is (if anywhere).
    pub(crate) stays: bool,
    /// It could as well stay: only a preference moves it.
    pub(crate) by_preference: bool,
    pub(crate) why: String,
}

impl Wish {
    fn stay(why: impl Into<String>) -> Self {
        Wish { host: None, stays: true, by_preference: false, why: why.into() }
    }

    fn go(host: &Eligible, why: impl Into<String>) -> Self {
        Wish { host: Some(host.clone()), stays: false, by_preference: false, why: why.into() }
    }

    fn nobody(why: impl Into<String>) -> Self {
        Wish { host: None, stays: false, by_preference: false, why: why.into() }
    }
}

impl Standing<'_> {
    fn find(&self, host: &HostName) -> Option<&Eligible> {
        self.eligible.iter().find(|e| e.host() == host)
    }

    /// The wishes for all addresses of one role. `holders`: who has each address by the newest decision.
    /// `rank` orders candidates for an orphaned exclusive role, best first.
    pub(crate) fn wishes(
        &self,
        role: &Role,
        holders: &BTreeMap<IpAddr, Option<HostName>>,
        rank: &dyn Fn(&HostName) -> u64,
    ) -> BTreeMap<IpAddr, Wish> {
        match role.mode {
            RoleMode::Exclusive => {
                holders.iter().map(|(ip, holder)| (*ip, self.exclusive(role, *ip, holder.as_ref(), rank))).collect()
            }
            RoleMode::Balanced => self.balanced(role, holders),
        }
    }

    fn exclusive(&self, role: &Role, ip: IpAddr, holder: Option<&HostName>, rank: &dyn Fn(&HostName) -> u64) -> Wish {
        if let Some(asked) = self.intent.get(&ip)
            && let Some(host) = self.find(asked)
        {
            return if holder == Some(asked) { Wish::stay("") } else { Wish::go(host, "asked for by the operator") };
        }
        if let (None, Some(found)) = (holder, self.found.get(&ip)) {
            return self.find(found).map_or_else(
                || Wish::stay(format!("{found} has it, and is to be ONLINE before it is given to anybody")),
                |host| Wish::go(host, "it has it already"),
            );
        }
        if let (Some(holder), true) = (holder, self.mode != MonitorMode::Active)
            && self.crashed == Some(holder)
            && !self.offline.contains(holder)
        {
            return Wish::nobody(format!(
                "{holder}'s server ended and runs again: it is compared before it gets it back"
            ));
        }
        if let (None, Some(before)) = (holder, self.crashed) {
            return self.find(before).map_or_else(
                || Wish::stay(format!("{before} had it when its server ended, and is to be ONLINE to get it back")),
                |host| Wish::go(host, "it had it when its server ended, and no other host gets it in this mode"),
            );
        }
        let candidates = || role.hosts.iter().filter_map(|h| self.find(h)).filter(|e| Some(e.host()) != holder);
        let preferred = role.prefer.as_ref().filter(|p| Some(*p) != holder).and_then(|p| self.find(p));
        match holder {
            Some(h) if self.keeping.contains(h) => match preferred {
                Some(p) if self.mode == MonitorMode::Active => {
                    let wish = Wish::go(p, format!("{} is preferred and ONLINE", p.host()));
                    Wish { by_preference: true, ..wish }
                }
                Some(_) | None => Wish::stay(""),
            },
            Some(h) if self.mode != MonitorMode::Active && !self.offline.contains(h) => Wish::stay(format!(
                "{h} cannot serve it, but no role leaves a failed host by itself in {} mode",
                self.mode
            )),
            Some(_) | None => {
                let best = candidates().min_by_key(|e| {
                    (std::cmp::Reverse(rank(e.host())), Some(e.host()) != role.prefer.as_ref(), e.host().clone())
                });
                let why = holder.map_or_else(|| "nobody holds it".to_owned(), |h| format!("{h} can no longer hold it"));
                best.map_or_else(
                    || {
                        Wish::nobody(format!(
                            "{why}, and no other host of the role is ONLINE with a living server and agent"
                        ))
                    },
                    |host| Wish::go(host, why.clone()),
                )
            }
        }
    }

    /// Spread so that no host has two more than another, moving as little as possible.
    fn balanced(&self, role: &Role, holders: &BTreeMap<IpAddr, Option<HostName>>) -> BTreeMap<IpAddr, Wish> {
        let mut load: BTreeMap<&HostName, Vec<IpAddr>> =
            role.hosts.iter().filter(|h| self.find(h).is_some()).map(|h| (h, Vec::new())).collect();
        let mut wishes = BTreeMap::new();
        let mut orphans = Vec::new();
        for (ip, holder) in holders {
            match holder {
                Some(h) if self.taken_off.contains(ip) => {
                    orphans.push((*ip, Some(h), "taken off by the operator".to_owned()));
                }
                Some(h) if self.keeping.contains(h) && role.hosts.contains(h) => {
                    if let Some(mine) = load.get_mut(h) {
                        mine.push(*ip);
                    }
                    wishes.insert(*ip, Wish::stay(""));
                }
                Some(h) if self.stays_in_this_mode(role, *ip, h) => {
                    let why = format!(
                        "{h} cannot serve it, but no role leaves a failed host by itself in {} mode",
                        self.mode
                    );
                    wishes.insert(*ip, Wish::stay(why));
                }
                Some(h) => orphans.push((*ip, None, format!("{h} can no longer hold it"))),
                None => orphans.push((*ip, None, "nobody holds it".to_owned())),
            }
        }
        for (ip, not, why) in orphans {
            let asked = self.intent.get(&ip).or(self.found.get(&ip)).filter(|h| load.contains_key(h));
            let least = load.iter().min_by_key(|(h, ips)| (Some(**h) == not, ips.len())).map(|(h, _)| *h);
            let Some(host) = asked.or(least).cloned() else {
                wishes.insert(
                    ip,
                    Wish::nobody(format!("{why}, and no host of the role is ONLINE with a living server and agent")),
                );
                continue;
            };
            if let Some(ips) = load.get_mut(&host) {
                ips.push(ip);
            }
            if let Some(e) = self.find(&host) {
                wishes.insert(ip, Wish::go(e, why));
            }
        }
        // Each round takes one from the fullest: it ends because the difference shrinks.
        for _ in 0..holders.len() {
            let Some((most, from)) = load.iter().map(|(h, ips)| (ips.len(), (*h).clone())).max() else { break };
            let Some((least, to)) = load.iter().map(|(h, ips)| (ips.len(), (*h).clone())).min() else { break };
            if most < least + 2 {
                break;
            }
            let Some(ip) = load.get_mut(&from).and_then(Vec::pop) else { break };
            if let (Some(ips), Some(e)) = (load.get_mut(&to), self.find(&to)) {
                ips.push(ip);
                wishes.insert(ip, Wish::go(e, format!("{from} had {most} addresses of the role and {to} {least}")));
            }
        }
        wishes
    }

    /// No role leaves a failed host by itself but in active mode.
    fn stays_in_this_mode(&self, role: &Role, ip: IpAddr, holder: &HostName) -> bool {
        self.mode != MonitorMode::Active
            && role.hosts.contains(holder)
            && !self.offline.contains(holder)
            && !self.intent_away(ip, holder)
    }

    fn intent_away(&self, ip: IpAddr, holder: &HostName) -> bool {
        self.intent.get(&ip).is_some_and(|asked| asked != holder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IPS: [&str; 4] = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"];

    struct Case {
        mode: MonitorMode,
        online: &'static [&'static str],
        role: Role,
        intent: &'static [(usize, &'static str)],
    }

    fn role(mode: RoleMode, prefer: Option<&str>) -> Role {
        Role {
            mode,
            hosts: ["db1", "db2", "db3"].map(Into::into).to_vec(),
            ips: vec![],
            prefer: prefer.map(Into::into),
        }
    }

    fn case(mode: RoleMode, online: &'static [&'static str]) -> Case {
        Case { mode: MonitorMode::Active, online, role: role(mode, None), intent: &[] }
    }

    /// `holders` by address, `-` for none; gives the hosts after the wishes came true.
    fn check(case: &Case, holders: &[&str], expected: &[&str]) {
        let ip = |i: usize| -> IpAddr { IPS[i].parse().unwrap() };
        let holders: BTreeMap<IpAddr, Option<HostName>> =
            holders.iter().enumerate().map(|(i, h)| (ip(i), (*h != "-").then(|| (*h).into()))).collect();
        let keeping: BTreeSet<HostName> = case.online.iter().map(|h| (*h).into()).collect();
        let eligible = keeping.iter().filter_map(|h| Eligible::if_fit(h, true, true, true)).collect();
        let intent = case.intent.iter().map(|(i, h)| (ip(*i), (*h).into())).collect();
        let standing = Standing {
            mode: case.mode,
            eligible: &eligible,
            keeping: &keeping,
            intent: &intent,
            offline: &BTreeSet::new(),
            taken_off: &BTreeSet::new(),
            found: &BTreeMap::new(),
            crashed: None,
        };
        let rank = |h: &HostName| u64::from(h.as_str() == "db3");
        let found: Vec<String> = standing
            .wishes(&case.role, &holders, &rank)
            .iter()
            .map(|(ip, wish)| {
                let host = if wish.stays { holders[ip].clone() } else { wish.host.as_ref().map(|e| e.host().clone()) };
                host.map_or("-".to_owned(), |h| h.0)
            })
            .collect();
        assert_eq!(found, expected);
    }

    use RoleMode::{Balanced, Exclusive};

    #[test]
    fn an_exclusive_role_stays_until_its_holder_cannot_hold_it() {
        check(&case(Exclusive, &["db1", "db2"]), &["db2"], &["db2"]);
        check(&case(Exclusive, &["db1"]), &["db2"], &["db1"]);
        check(&case(Exclusive, &[]), &["db2"], &["-"]);
        check(&case(Exclusive, &["db1", "db2", "db3"]), &["-"], &["db3"]);
    }

    #[test]
    fn a_preferred_host_gets_it_back_in_active_mode_only() {
        let mut c = Case { role: role(Exclusive, Some("db1")), ..case(Exclusive, &["db1", "db2"]) };
        check(&c, &["db2"], &["db1"]);
        c.mode = MonitorMode::Manual;
        check(&c, &["db2"], &["db2"]);
    }

    #[test]
    fn in_manual_mode_no_role_leaves_a_failed_host_but_orphans_are_given_away() {
        let mut c = Case { mode: MonitorMode::Manual, ..case(Exclusive, &["db1"]) };
        check(&c, &["db2"], &["db2"]);
        check(&c, &["-"], &["db1"]);
        c.intent = &[(0, "db1")];
        check(&c, &["db2"], &["db1"]);
        let c = Case { mode: MonitorMode::Manual, ..case(Balanced, &["db1"]) };
        check(&c, &["db2", "db1"], &["db2", "db1"]);
    }

    #[test]
    fn balanced_addresses_are_spread_and_move_as_little_as_possible() {
        check(&case(Balanced, &["db1", "db2", "db3"]), &["-", "-", "-"], &["db1", "db2", "db3"]);
        check(&case(Balanced, &["db1", "db2"]), &["db1", "db2", "db3"], &["db1", "db2", "db1"]);
        check(&case(Balanced, &["db1", "db2", "db3"]), &["db1", "db2", "db1"], &["db1", "db2", "db3"]);
        check(&case(Balanced, &["db1", "db2"]), &["db1", "db2", "db1"], &["db1", "db2", "db1"]);
        check(&case(Balanced, &["db1", "db2", "db3"]), &["db1", "db1", "db1", "db2"], &["db1", "db1", "db3", "db2"]);
        check(&case(Balanced, &[]), &["db1"], &["-"]);
    }
}

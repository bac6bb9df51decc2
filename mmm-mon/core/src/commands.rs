//! What an operator asks. Texts are MMM's where MMM has one; every refusal says what was asked, why not, and what helps.

use crate::facts::Verdict;
use crate::io::{Output, RequestId};
use crate::states::Compared;
use crate::{Core, error, info, warn};
use mmm_common::control::{Answer, CheckLine, Command, Show, ShowHost, ShowRole};
use mmm_common::ids::{HostName, Millis, RoleName};
use mmm_common::order::ReplicationOrder;
use mmm_common::state::{CheckKind, CheckResult, HostState, MonitorMode, RoleMode};
use std::net::IpAddr;

/// An answer now, or later (a move of the writer).
enum Outcome {
    Now(Answer),
    Later,
}

fn done(text: impl Into<String>) -> Outcome {
    Outcome::Now(Answer::Done { text: text.into() })
}

fn refused(text: impl Into<String>) -> Outcome {
    Outcome::Now(Answer::Refused { text: text.into() })
}

impl Core {
    pub(crate) fn command(&mut self, now: Millis, id: RequestId, command: Command, who: &str, out: &mut Vec<Output>) {
        let asked = (!command.is_read_only()).then(|| format!("{command}"));
        let outcome = match command {
            Command::Ping => done("Pinged successfully!"),
            Command::Show => Outcome::Now(Answer::Show(self.show(now))),
            Command::Checks { host, check } => self.checks(now, host, check),
            Command::Mode => Outcome::Now(Answer::Mode { mode: self.mode }),
            Command::SetActive => self.set_mode(MonitorMode::Active, "active", out),
            Command::SetManual => self.set_mode(MonitorMode::Manual, "manual", out),
            Command::SetPassive => self.set_mode(MonitorMode::Passive, "passive", out),
            Command::SetOnline { host, accept_lost } => self.set_online(now, &host, accept_lost.then_some(who), out),
            Command::SetOffline { host } => self.set_offline(now, &host, out),
            Command::MoveRole { role, host, force } => self.move_role(now, id, &role, &host, force, out),
            Command::SetIp { ip, host } => self.set_ip(ip, &host, out),
            Command::ConfirmDead { host } => self.confirm_dead(now, &host, out),
            Command::Lost { host } => {
                self.unknown_host(&host).unwrap_or_else(|| Outcome::Now(Answer::Lost(self.lost(&host))))
            }
            Command::Reclone { host, from } => self.reclone(now, &host, &from, who),
            Command::Doctor => refused("doctor is answered where mmm_control connects, not here.".to_owned()),
        };
        let answer = match outcome {
            Outcome::Later => None,
            Outcome::Now(answer) => Some(answer),
        };
        if let Some(asked) = asked {
            let result = match &answer {
                None => "under way".to_owned(),
                Some(Answer::Done { text } | Answer::Refused { text }) => text.clone(),
                Some(
                    Answer::Mode { .. }
                    | Answer::Show(_)
                    | Answer::Checks { .. }
                    | Answer::Lost(_)
                    | Answer::Doctor { .. },
                ) => String::new(),
            };
            info(out, None, format!("Operator ({who}) asked {asked}: {result}"));
        }
        if let Some(answer) = answer {
            // After the save of what it promises.
            self.replies.push((id, answer));
        }
    }

    fn unknown_host(&self, host: &HostName) -> Option<Outcome> {
        (!self.hosts.contains_key(host)).then(|| refused(format!("Unknown host name '{host}'!")))
    }

    fn not_in_passive(&self) -> Option<Outcome> {
        (self.mode == MonitorMode::Passive).then(|| {
            refused("This command is not available in PASSIVE mode. Look at 'show' for the cause, then use set_active or set_manual.")
        })
    }

    fn set_mode(&mut self, mode: MonitorMode, word: &str, out: &mut Vec<Output>) -> Outcome {
        if self.mode == mode {
            return done(format!("Already in {word} mode."));
        }
        self.switch_mode(mode, (mode == MonitorMode::Passive).then(|| "set by the operator".to_owned()), out);
        done(format!("Switched into {word} mode."))
    }

    /// `accept_lost`: who accepts that what only this host has is discarded after saving it.
    fn set_online(
        &mut self,
        now: Millis,
        name: &HostName,
        accept_lost: Option<&str>,
        out: &mut Vec<Output>,
    ) -> Outcome {
        if let Some(no) = self.unknown_host(name).or_else(|| self.not_in_passive()) {
            return no;
        }
        let active = self.active.clone();
        let Some(host) = self.hosts.get(name) else { return refused("") };
        match host.status.state {
            HostState::Online => return done("This host is already ONLINE. Skipping command."),
            HostState::HardOffline | HostState::ReplicationDelay | HostState::ReplicationFail => {
                return refused(format!(
                    "Host '{name}' is {} at the moment. It can't be switched to ONLINE: it comes back by itself when its checks are OK ({}).",
                    host.status.state,
                    host.facts.summary()
                ));
            }
            HostState::AdminOffline | HostState::AwaitingRecovery => {}
        }
        if self.is_rebuilt(name) {
            return refused(format!(
                "The data of '{name}' are being replaced. Look at 'show' for how far it is, and try again when that is done."
            ));
        }
        if host.facts.check(CheckKind::Ping) != Verdict::Good || host.facts.check(CheckKind::Mysql) != Verdict::Good {
            return refused(format!(
                "Checks 'ping' and 'mysql' of host '{name}' must be OK first ({}). Look at 'checks {name}'.",
                host.facts.summary()
            ));
        }
        if !self.agent_stays(now, name) {
            return refused(format!(
                "Can't reach agent daemon on '{name}'! Can't switch its state! ({})",
                host.facts.link_down
            ));
        }
        let host_is_offline = host.status.state == HostState::AdminOffline;
        match (host.compared, &active) {
            (Compared::Extra(n), Some(active)) => {
                let n = self.saved_count(name).unwrap_or(n);
                let Some(who) = accept_lost else {
                    return refused(format!(
                        "Host '{name}' has {n} transactions that the active master '{active}' lacks. It can't be switched to ONLINE. Look at 'lost {name}', then use set_online --accept-lost {name} to discard them, or reclone {name} --from {active}."
                    ));
                };
                let alive = self.hosts.get(active).is_some_and(|a| a.facts.server_alive());
                if !alive || !self.agent_answers(now, active) {
                    return refused(format!(
                        "Host '{name}' has {n} transactions that the active master '{active}' lacks, and '{active}' does not answer: nothing can be discarded before there is an active master to bring '{name}' in line with. Bring '{active}' back or move its role, then try again."
                    ));
                }
                self.accept_lost(name, who);
                if host_is_offline {
                    self.set_state(now, name, HostState::AwaitingRecovery, "by the operator", out);
                }
                return done(format!(
                    "The {n} transactions that only '{name}' has are discarded, after saving them. It comes ONLINE by itself when that is done. Look at 'show' for how far it is."
                ));
            }
            (Compared::Lacks(n), Some(active)) => {
                return refused(format!(
                    "Host '{name}' lacks {n} transactions of the active master '{active}' and has gone past them, so they will never come. Use reclone {name} --from {active}."
                ));
            }
            (Compared::Open, Some(active))
                if host.facts.executed().is_some()
                    && self.agent_answers(now, active)
                    && active != name
                    && self.hosts.get(active).is_some_and(|a| a.facts.server_alive()) =>
            {
                return refused(format!(
                    "Host '{name}' is still being compared with the active master '{active}'. Try again in some seconds."
                ));
            }
            (Compared::Open, Some(active))
                if host.facts.executed().is_none() && self.uses_gtids(active) && active != name =>
            {
                let why =
                    host.facts.report.as_ref().and_then(|r| r.server.replication.as_ref()).map(|r| r.error.as_str());
                return refused(format!(
                    "Host '{name}' cannot be compared with the active master '{active}': {}",
                    why.filter(|e| !e.is_empty()).unwrap_or("its position is not known")
                ));
            }
            (Compared::Open | Compared::Extra(_) | Compared::Lacks(_) | Compared::Subset | Compared::Needless, _) => {}
        }
        self.set_state(now, name, HostState::Online, "by the operator", out);
        done(format!("State of '{name}' changed to ONLINE. Now you can wait some time and check its new roles!"))
    }

    fn uses_gtids(&self, name: &HostName) -> bool {
        self.hosts.get(name).is_some_and(|h| h.facts.executed().is_some())
    }

    fn set_offline(&mut self, now: Millis, name: &HostName, out: &mut Vec<Output>) -> Outcome {
        if let Some(no) = self.unknown_host(name).or_else(|| self.not_in_passive()) {
            return no;
        }
        if self.hosts.get(name).is_some_and(|h| h.status.state == HostState::AdminOffline) {
            return done("This host is already ADMIN_OFFLINE. Skipping command.");
        }
        self.intent.retain(|_, host| host != name);
        self.set_state(now, name, HostState::AdminOffline, "by the operator", out);
        done(format!("State of '{name}' changed to ADMIN_OFFLINE. Now you can wait some time and check all roles!"))
    }

    fn move_role(
        &mut self,
        now: Millis,
        id: RequestId,
        role_name: &RoleName,
        name: &HostName,
        force: bool,
        out: &mut Vec<Output>,
    ) -> Outcome {
        let Some(role) = self.config.cluster.roles.get(role_name).cloned() else {
            return refused(format!("Unknown role name '{role_name}'!"));
        };
        if let Some(no) = self.unknown_host(name).or_else(|| self.not_in_passive()) {
            return no;
        }
        if !role.hosts.contains(name) {
            let hosts: Vec<&str> = role.hosts.iter().map(HostName::as_str).collect();
            return refused(format!(
                "Host '{name}' can't handle role '{role_name}'. Only following hosts could: {}.",
                hosts.join(", ")
            ));
        }
        if role.mode == RoleMode::Balanced {
            return self.take_off(role_name, name);
        }
        let Some(ip) = role.ips.first().copied() else { return refused(format!("Role '{role_name}' has no address.")) };
        let holder = self.slots.get(&ip).and_then(|s| s.state.holder.clone());
        if holder.as_ref() == Some(name) {
            self.intent.remove(&ip);
            return done(format!("Role is on '{name}' already. Skipping command."));
        }
        let Some(host) = self.hosts.get(name) else { return refused("") };
        let state = host.status.state;
        let broken_replication = matches!(state, HostState::ReplicationDelay | HostState::ReplicationFail);
        if state != HostState::Online && !(force && broken_replication) {
            return refused(format!("Can't move role to host with state {state}."));
        }
        if !self.agent_stays(now, name) {
            return refused(format!(
                "Can't reach agent daemon on '{name}'! Can't move roles there! ({})",
                host.facts.link_down
            ));
        }
        if !host.facts.server_alive() {
            return refused(format!("The server of '{name}' is not known to be alive. Can't move roles there!"));
        }
        if let Some(preferred) = role.prefer.as_ref().filter(|p| holder.as_ref() == Some(*p))
            && self.mode == MonitorMode::Active
        {
            return refused(format!("Role '{role_name}' is assigned to preferred host '{preferred}'. Can't move it!"));
        }
        if !self.network {
            return refused("The monitor's own network check fails (ping_ips): no role is moved until it is OK again.");
        }
        if state != HostState::Online {
            self.set_state(now, name, HostState::Online, "by the operator (move_role --force)", out);
        }
        let from = holder.map_or_else(|| "nobody".to_owned(), |h| h.0);
        let is_writer = *role_name == self.config.cluster.active_master_role;
        if is_writer {
            if self.handover.request.is_some() {
                return refused("The role is being moved already. Wait for the end of that.");
            }
            self.handover.request = Some(id);
            self.handover.force = force.then(|| name.clone());
            self.moving = Some((role_name.clone(), from, name.clone()));
            self.intent.insert(ip, name.clone());
            return Outcome::Later;
        }
        self.intent.insert(ip, name.clone());
        info(out, None, format!("Role '{role_name}' moves from '{from}' to '{name}': asked for by the operator"));
        done(moved(role_name, &from, name))
    }

    /// MMM: a balanced role is taken off the host; its addresses go to the others, as far as the balance allows.
    fn take_off(&mut self, role: &RoleName, name: &HostName) -> Outcome {
        let mine: Vec<IpAddr> = self
            .slots
            .iter()
            .filter(|(_, s)| s.state.role == *role && s.state.holder.as_ref() == Some(name))
            .map(|(ip, _)| *ip)
            .collect();
        if mine.is_empty() {
            return done(format!("Role is not on '{name}'. Skipping command."));
        }
        self.taken_off.extend(mine);
        done(format!("Role '{role}' has been taken off '{name}'. Now you can wait some time and check new roles info!"))
    }

    fn set_ip(&mut self, ip: IpAddr, name: &HostName, out: &mut Vec<Output>) -> Outcome {
        if self.mode != MonitorMode::Passive {
            return refused(
                "This command is only available in PASSIVE mode: it prepares roles by hand. Use set_passive first.",
            );
        }
        if let Some(no) = self.unknown_host(name) {
            return no;
        }
        let Some(role_name) = self.slots.get(&ip).map(|s| s.state.role.clone()) else {
            return refused(format!("Unknown ip '{ip}': it is no role's address!"));
        };
        let hosts = self.config.cluster.roles.get(&role_name).map(|r| r.hosts.clone()).unwrap_or_default();
        if !hosts.contains(name) {
            let hosts: Vec<&str> = hosts.iter().map(HostName::as_str).collect();
            return refused(format!(
                "Host '{name}' can't handle role '{role_name}'. Only following hosts could: {}.",
                hosts.join(", ")
            ));
        }
        self.intent.insert(ip, name.clone());
        info(
            out,
            None,
            format!("Role '{role_name}({ip})' is prepared for '{name}'; it takes effect in active or manual mode"),
        );
        done(format!("Set role '{role_name}({ip})' to host '{name}'."))
    }

    fn confirm_dead(&mut self, now: Millis, name: &HostName, out: &mut Vec<Output>) -> Outcome {
        // A host that has left the configuration may still be acting on an order.
        let bound = self.slots.values().any(|slot| slot.others_than(None).contains(name));
        if let Some(no) = self.unknown_host(name).filter(|_| !bound) {
            return no;
        }
        if self.agent_answers(now, name) {
            return refused(format!("The agent on '{name}' answers: it is not dead."));
        }
        if let Some(peer) = self.seen_by(now, name) {
            return refused(format!(
                "'{peer}' sees the agent of '{name}' and has just vouched for it: it is not dead."
            ));
        }
        warn(out, Some(name), "The operator confirms that the host is off: its orders count as over".to_owned());
        let epoch = self.epoch;
        for slot in self.slots.values_mut() {
            if slot.killed(name, epoch) && slot.state.holder.as_ref() == Some(name) {
                slot.release(crate::handover::next(&mut self.epoch));
            }
        }
        done(format!(
            "Host '{name}' counts as dead. Keep it switched off: after a reboot it takes nothing up by itself."
        ))
    }

    fn reclone(&mut self, now: Millis, name: &HostName, from: &HostName, who: &str) -> Outcome {
        let unknown = self.unknown_host(name).or_else(|| self.unknown_host(from));
        if let Some(no) = unknown.or_else(|| self.not_in_passive()) {
            return no;
        }
        if let Some(why) = self.refuses_reclone(now, name, from) {
            return refused(why);
        }
        self.ask_for_reclone(name, from, who);
        let runs = self.hosts.get(name).is_some_and(|h| h.facts.server_alive());
        let unsaved = if runs {
            ""
        } else {
            " Its server does not answer: what only it has can be saved first only if that comes back within a minute."
        };
        let then = match self.hosts.get(name).map(|h| h.status.state) {
            Some(HostState::AdminOffline) => format!("Use set_online {name} when that is done."),
            Some(_) | None => "It comes ONLINE by itself when that is done.".to_owned(),
        };
        done(format!(
            "The data of '{name}' are replaced by those of '{from}'.{unsaved} {then} Look at 'show' for how far it is."
        ))
    }

    fn checks(&self, now: Millis, host: Option<HostName>, check: Option<CheckKind>) -> Outcome {
        if let Some(no) = host.as_ref().and_then(|h| self.unknown_host(h)) {
            return no;
        }
        let mut checks = Vec::new();
        for (name, h) in self.hosts.iter().filter(|(name, _)| host.as_ref().is_none_or(|only| only == *name)) {
            for (kind, fact) in h.facts.checks.iter().filter(|(kind, _)| check.is_none_or(|only| only == **kind)) {
                let ago = now.since(fact.changed).as_millis();
                let detached = *kind == CheckKind::RepThreads && self.is_detached(name) && !fact.result.is_ok();
                let result = if detached {
                    CheckResult::Ok("The active master fetches from nobody".to_owned())
                } else {
                    fact.result.clone()
                };
                checks.push(CheckLine {
                    host: name.clone(),
                    check: *kind,
                    changed_ms_ago: u64::try_from(ago).unwrap_or(u64::MAX),
                    result,
                });
            }
        }
        Outcome::Now(Answer::Checks { checks })
    }

    /// It was told not to fetch, and its SQL thread runs: nothing is wrong with its replication.
    fn is_detached(&self, name: &HostName) -> bool {
        let told = self.sent.get(name).is_some_and(|o| o.replication == ReplicationOrder::Detached);
        let replication = self.hosts.get(name).and_then(|h| h.facts.report.as_ref()?.server.replication.as_ref());
        told && replication.is_some_and(|r| !r.io_running && r.sql_running && r.error.is_empty())
    }

    fn show(&self, now: Millis) -> Show {
        let mut warnings = Vec::new();
        for (name, host) in &self.hosts {
            if !self.agent_answers(now, name) {
                warnings.push(format!("Warning: agent on host {name} is not reachable"));
            }
            for trouble in host.facts.report.iter().flat_map(|r| &r.troubles) {
                warnings.push(format!("Warning: host {name}: {trouble}"));
            }
            for (ip, mac) in host.facts.report.iter().flat_map(|r| &r.conflicts) {
                warnings.push(format!("Warning: host {name}: somebody else, {mac}, answers for {ip}"));
            }
        }
        for (name, _) in self.hosts.iter().filter(|(_, host)| host.facts.lacks_guard(&self.config.cluster)) {
            warnings.push(format!(
                "Warning: host {name} gets no role: lease_ttl {:?} needs the exact guard, and its agent has none; use the \
                 same mmm_common.toml on all hosts, and see its log for why there is no guard",
                self.config.cluster.lease_ttl
            ));
        }
        warnings.extend(self.losses());
        warnings.extend(self.remarks.values().map(|text| format!("Warning: {text}")));
        for (ip, slot) in &self.slots {
            let (Some(holder), Some(granters)) = (&slot.state.holder, slot.settled_granters()) else { continue };
            let hosts = self.config.cluster.roles.get(&slot.state.role).map(|r| r.hosts.as_slice()).unwrap_or_default();
            let left_out: Vec<&str> =
                hosts.iter().filter(|h| *h != holder && !granters.contains(*h)).map(HostName::as_str).collect();
            if !left_out.is_empty() {
                let (who, are) = (left_out.join(" and "), if left_out.len() > 1 { "are" } else { "is" });
                warnings.push(format!(
                    "Warning: {}: {who} {are} offline and could not take over from {holder} if that died silently",
                    self.address_name(*ip)
                ));
            }
        }
        if self.hosts.values().all(|h| h.status.state == HostState::AwaitingRecovery && h.status.down.is_none()) {
            warnings.push("No host is ONLINE yet: use set_online <host> to bring the cluster up".to_owned());
        }
        let hosts = self
            .hosts
            .iter()
            .filter_map(|(name, host)| {
                let configured = self.config.cluster.hosts.get(name)?;
                let mut roles: Vec<ShowRole> = self
                    .slots
                    .iter()
                    .filter(|(_, s)| s.state.holder.as_ref() == Some(name))
                    .map(|(ip, s)| ShowRole { role: s.state.role.clone(), ip: *ip })
                    .collect();
                roles.sort();
                Some(ShowHost {
                    name: name.clone(),
                    ip: configured.ip,
                    mode: configured.mode,
                    state: host.status.state,
                    roles,
                })
            })
            .collect();
        let mut notes: Vec<String> = self
            .config
            .cluster
            .roles
            .iter()
            .filter_map(|(name, role)| role.prefer.as_ref().map(|p| format!("Role {name} has preferred host {p}")))
            .collect();
        notes.extend(self.semisync_note());
        Show { mode: self.mode, cause: self.cause.clone(), warnings, hosts, notes }
    }

    /// Whether an acknowledged commit is on a second host.
    fn semisync_note(&self) -> Option<String> {
        let writer = self.active.as_ref().filter(|a| self.writer_holder() == Some(*a))?;
        let role = &self.config.cluster.active_master_role;
        let facts = &self.hosts.get(writer)?.facts;
        let state = match facts.semisync.as_ref().map(|s| (s, s.in_effect(self.config.cluster.fenced_within()))) {
            Some((s, Ok(()))) => {
                let who = match s.replicas {
                    1 => "1 replica acknowledges".to_owned(),
                    n => format!("{n} replicas acknowledge"),
                };
                format!("semi-synchronous: {who} commits of {writer}")
            }
            Some((_, Err(why))) => format!("ASYNC, a failover can lose acknowledged commits of {writer}: {why}"),
            None => {
                format!(
                    "ASYNC, a failover can lose acknowledged commits of {writer}: it has no semi-synchronous replication"
                )
            }
        };
        Some(format!("Role {role} is {state}"))
    }

    /// The end of a move of the writer that somebody waits for.
    pub(crate) fn moved_writer(&mut self, id: RequestId, result: Result<String, String>, out: &mut Vec<Output>) {
        let Some((role, from, to)) = self.moving.take() else { return };
        let answer = match result {
            Ok(_) if self.writer_holder() != Some(&to) => {
                let holder = self.writer_holder().map_or("nobody", HostName::as_str);
                Answer::Refused { text: format!("Role '{role}' could not be moved to '{to}': '{holder}' has got it.") }
            }
            Ok(_) => Answer::Done { text: moved(&role, &from, &to) },
            Err(why) => {
                error(out, None, format!("move_role {role} {to} failed: {why}"));
                Answer::Refused { text: format!("Role '{role}' could not be moved to '{to}': {why}") }
            }
        };
        self.replies.push((id, answer));
    }
}

fn moved(role: &RoleName, from: &str, to: &HostName) -> String {
    format!(
        "Role '{role}' has been moved from '{from}' to '{to}'. Now you can wait some time and check new roles info!"
    )
}

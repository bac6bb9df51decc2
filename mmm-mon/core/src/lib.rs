//! The deciding part of `mmm_mond`: events in, an ordered list of things to do out. No I/O, no clock, no randomness.
//!
//! ```text
//! checks, reports -> 1 facts -> 2 host states -> 3 wanted roles -> 4 who may hold them now -> 5 orders
//! ```
//!
//! Start at [`Core::handle`]: the five stages, once each, in order.

mod commands;
mod compare;
mod evidence;
mod facts;
mod gather;
mod granters;
mod handover;
mod invariants;
pub mod io;
mod losses;
#[cfg(feature = "model")]
pub mod model;
mod orders;
mod reach;
mod roles;
mod slot;
mod snapshot;
mod states;
mod writers;

pub use losses::{Acknowledged, Return};
pub use snapshot::Snapshot;
pub use writers::Writers;

use facts::{AgentLink, HostFacts};
use granters::granters_of;
use handover::{Event, Handover, HostView, Scene, Turn, next};
use io::{Audit, Input, Level, Output, RequestId};
use mmm_common::config::{Cluster, Monitor as Config, Quarantine};
use mmm_common::control::Answer;
use mmm_common::epoch::Epoch;
use mmm_common::gtid::Gtids;
use mmm_common::ids::{HostName, Millis, RoleName};
use mmm_common::order::Order;
use mmm_common::report::Report;
use mmm_common::state::{CheckKind, HostMode, HostState, MonitorMode, RoleMode};
use roles::{Eligible, Standing, Wish};
use slot::Slot;
use states::{Compared, HostStatus, RULES, View};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

#[derive(Clone, Debug)]
pub struct Core {
    config: Config,
    started: Millis,
    /// Wall time at the start, in seconds: above every epoch ever sent, unless that clock was wrong.
    unix_s: u64,
    /// The last epoch used.
    epoch: Epoch,
    mode: MonitorMode,
    cause: Option<String>,
    /// The monitor's own network check. False until it has said otherwise: nothing is decided blindly.
    network: bool,
    hosts: BTreeMap<HostName, Host>,
    slots: BTreeMap<IpAddr, Slot>,
    handover: Handover,
    active: Option<HostName>,
    intent: BTreeMap<IpAddr, HostName>,
    /// The longest lease_ttl under which orders have been sent that may still be acted on.
    longest_ttl: Duration,
    /// When the configuration was taken into use.
    configured_at: Millis,
    /// Balanced addresses that an operator wants off their host.
    taken_off: BTreeSet<IpAddr>,
    /// Addresses that are on several hosts, as they say.
    seen_on_several: BTreeMap<IpAddr, BTreeSet<HostName>>,
    /// Those of them that were so at the start: not renewed until it is settled.
    contested: BTreeSet<IpAddr>,
    /// kill_host_bin is under way, asked for at this epoch. What is sent to a host after that it cannot clear (R8c), so
    /// it is forgotten when the host's agent comes back.
    killing: BTreeMap<HostName, Epoch>,
    /// Hosts with transactions that others lack, or had (data-safety.md).
    returns: BTreeMap<HostName, Return>,
    /// The move of the writer that an operator waits for: role, from, to.
    moving: Option<(RoleName, String, HostName)>,
    /// Who has an address that nobody holds by a known order (R11).
    found: BTreeMap<IpAddr, HostName>,
    /// In a mode that moves nothing by itself: the active master whose server ended, until somebody holds the role again.
    crashed: Option<HostName>,
    /// Addresses whose first epoch somebody has been told. Who names that one before has it from another numbering.
    spoken: BTreeSet<IpAddr>,
    /// What stands in the way, by subject; logged when it changes, shown as long as it stands.
    remarks: BTreeMap<String, String>,
    sent: BTreeMap<HostName, Order>,
    persisted: Option<Snapshot>,
    replies: Vec<(RequestId, Answer)>,
    now: Millis,
    /// What `next_deadline` said after the last input.
    due: Option<(Millis, &'static str)>,
    /// When this process was last found to have been stopped for a while, or to be cut off.
    woke: Option<Millis>,
    /// It is said in the log that no agent answers.
    told_cut_off: bool,
}

#[derive(Clone, Debug)]
struct Host {
    facts: HostFacts,
    status: HostStatus,
    compared: Compared,
    /// It was found to have nothing that the active master lacks, before it was away. It has only been fetching since.
    in_line: bool,
    /// Being compared: what the host had executed, and when that was told.
    sample: Option<(Gtids, Millis)>,
    /// What it had, and what the active master had, when it was last found to have extra transactions.
    extra: Option<(Gtids, Gtids)>,
}

impl Core {
    /// `saved`: the last snapshot and how long ago it was saved, by wall clock. `unix_s`: wall time at start, used
    /// only to number the first epoch when there is no snapshot (R11).
    pub fn new(config: Config, saved: Option<(Snapshot, Duration)>, unix_s: u64, now: Millis) -> Self {
        let saved = saved.map(|(snapshot, ago)| snapshot.on_clock(now, ago));
        let mut core = Core {
            started: now,
            unix_s,
            epoch: saved.as_ref().map_or(Epoch(unix_s), |s| s.epoch),
            mode: saved.as_ref().map_or(config.mode, |s| s.mode),
            cause: saved.as_ref().and_then(|s| s.cause.clone()),
            network: false,
            hosts: BTreeMap::new(),
            slots: BTreeMap::new(),
            handover: Handover::new(
                now,
                saved.as_ref().map(|s| s.preferred_moves.clone()).unwrap_or_default(),
                saved.as_ref().map(|s| s.writers.clone()).unwrap_or_default(),
            ),
            active: saved.as_ref().and_then(|s| s.active.clone()),
            intent: saved.as_ref().map(|s| s.intent.clone()).unwrap_or_default(),
            longest_ttl: saved
                .as_ref()
                .map_or(Duration::ZERO, |s| Duration::from_millis(s.lease_ttl_ms))
                .max(config.cluster.lease_ttl),
            configured_at: now,
            taken_off: BTreeSet::new(),
            seen_on_several: BTreeMap::new(),
            contested: BTreeSet::new(),
            killing: BTreeMap::new(),
            returns: saved.as_ref().map(|s| s.returns.clone()).unwrap_or_default(),
            moving: None,
            found: BTreeMap::new(),
            crashed: None,
            spoken: BTreeSet::new(),
            remarks: BTreeMap::new(),
            sent: BTreeMap::new(),
            persisted: None,
            replies: Vec::new(),
            now,
            due: None,
            woke: None,
            told_cut_off: false,
            config,
        };
        if core.mode == MonitorMode::Passive && core.cause.is_none() {
            core.cause = Some("mode = passive in the configuration".to_owned());
        }
        let (hosts, slots) = saved.map(|s| (s.hosts, s.slots)).unwrap_or_default();
        core.fit_to_config(hosts, slots);
        core
    }

    /// # Panics
    /// When an invariant is broken (invariants.rs).
    pub fn handle(&mut self, now: Millis, input: Input, out: &mut Vec<Output>) {
        self.notice_a_pause(now, out);
        self.now = now;
        let answer = self.take_in(now, input, out);
        // 1
        if now.since(self.configured_at) >= self.longest_ttl + Cluster::MARGIN {
            // What was given under a longer lease_ttl is over.
            self.longest_ttl = self.config.cluster.lease_ttl;
        }
        self.notice_a_return(now, out);
        self.excuse_unreachable(now);
        let config = &self.config;
        self.hosts.values_mut().for_each(|h| h.facts.judge(now, config));
        self.compare(now, out);
        self.find_holes(out);
        self.mend(now, out);
        self.find_contested(now, out);
        self.find_holders();
        self.remark_observers(now, out);
        if !self.is_held_back() {
            self.leave_wait_mode(now, out);
            // 2
            self.change_states(now, out);
            // 3 and 4
            self.place_roles(now, out);
            self.choose_granters(now, out);
        } else {
            self.suspend_handover(now, out);
        }
        for (ip, slot) in &self.slots {
            if let Some(why) = invariants::broken(&slot.state, self.epoch) {
                panic!("the decisions for {ip} make no sense: {why}");
            }
        }
        self.persist(now, out);
        // 5
        self.send_orders(now, answer.as_ref(), out);
        out.extend(self.replies.drain(..).map(|(id, answer)| Output::Reply { id, answer }));
        self.due = self.deadline();
    }

    /// When to send a `Tick`, and what for.
    pub fn next_deadline(&self) -> Option<(Millis, &'static str)> {
        self.due.or_else(|| self.deadline())
    }

    fn deadline(&self) -> Option<(Millis, &'static str)> {
        let ttl = self.config.cluster.lease_ttl;
        let mut all: Vec<(Millis, &'static str)> = Vec::new();
        for host in self.hosts.values() {
            all.extend(host.facts.deadlines(&self.config));
            all.push((host.facts.heard + ttl, "an agent has been silent for lease_ttl"));
            all.push((host.facts.heard + self.absence(), "an agent is away for long"));
            let vouches = host.facts.report.iter().flat_map(|r| r.vouched.values());
            all.extend(vouches.map(|ago| {
                (host.facts.heard - Duration::from_millis(*ago) + ttl, "a peer has not vouched for lease_ttl")
            }));
            all.push((host.facts.heard + self.agent_limit(), "an agent is late"));
            if host.status.state == HostState::AwaitingRecovery {
                all.push((host.status.since + self.config.auto_set_online, "auto_set_online"));
                all.extend(host.status.flapping_since.map(|at| (at + self.config.flap_duration, "flap_duration ends")));
            }
            if matches!(host.status.state, HostState::Online) {
                all.push((host.status.since + states::SHORT + Duration::from_millis(1), "a peer counts as settled"));
            }
        }
        all.push((self.started + self.startup_grace(), "the start is over"));
        all.extend(
            self.woke
                .map(|at| (at + self.config.cluster.lease_ttl, "everybody has had the time to be heard after a pause")),
        );
        all.push((
            self.configured_at + self.longest_ttl + Cluster::MARGIN,
            "a longer lease_ttl of before is waited out",
        ));
        if self.mode == MonitorMode::Wait {
            all.push((self.started + self.config.wait_for_other_master, "wait_for_other_master"));
        }
        all.extend(self.slots.values().flat_map(Slot::deadlines).map(|at| (at, "a lease is over")));
        for (host, address) in self.hosts.values().filter_map(|h| {
            let writer = self.writer_ip().filter(|_| !self.handover.is_settled())?;
            h.facts.report.as_ref()?.addresses.get(&writer).map(|address| (h, address))
        }) {
            all.push((
                host.facts.heard + Duration::from_millis(address.promised_ms),
                "a promise to the old master is over",
            ));
        }
        all.extend(self.handover.deadline(&self.config.cluster));
        all.extend(self.mend_deadlines());
        // What was due up to the last input was looked at then.
        all.into_iter().filter(|(at, _)| *at > self.now).min()
    }

    /// The host to answer, if the input was its report.
    fn take_in(&mut self, now: Millis, input: Input, out: &mut Vec<Output>) -> Option<HostName> {
        match input {
            Input::Tick => {}
            Input::Check { host, check, result } => {
                if let Some(h) = self.hosts.get_mut(&host) {
                    h.facts.checked(now, check, result);
                }
            }
            Input::Network { reachable } => {
                if self.network != reachable {
                    self.network = reachable;
                    if reachable {
                        info(out, None, "Network check: OK".to_owned());
                    } else {
                        error(
                            out,
                            None,
                            "Network check: none of ping_ips answers. Failed checks are ignored and nothing is changed"
                                .to_owned(),
                        );
                    }
                }
            }
            Input::AgentUp { host, boot, version } => {
                self.killing.remove(&host);
                if let Some(h) = self.hosts.get_mut(&host) {
                    h.facts.link = Some(AgentLink { boot, anchor: None });
                    info(out, Some(&host), format!("Agent is connected (version {version})"));
                }
                self.sent.remove(&host);
            }
            Input::AgentDown { host, why } => {
                if let Some(h) = self.hosts.get_mut(&host) {
                    let had = h.facts.link.take().is_some();
                    if had || h.facts.link_down != why {
                        warn(out, Some(&host), format!("Agent is not reachable: {why}"));
                    }
                    h.facts.link_down = why;
                }
                self.sent.remove(&host);
            }
            Input::Report { host, report } => return self.report(now, host, report, out),
            Input::Command { id, command, who } => self.command(now, id, command, &who, out),
            Input::Killed { host, asked, result } => match result {
                Ok(()) if self.killing.remove(&host) != Some(asked) => warn(
                    out,
                    Some(&host),
                    "kill_host_bin confirms that the host is off, but its agent was connected meanwhile: it proves nothing"
                        .to_owned(),
                ),
                Ok(()) => {
                    warn(
                        out,
                        Some(&host),
                        "kill_host_bin confirms that the host is off: its orders are over".to_owned(),
                    );
                    for slot in self.slots.values_mut() {
                        if slot.killed(&host, asked) && slot.state.holder.as_ref() == Some(&host) {
                            slot.release(next(&mut self.epoch));
                        }
                    }
                }
                Err(why) => error(out, Some(&host), format!("kill_host_bin failed, which proves nothing: {why}")),
            },
            Input::Reload(config) => {
                if let Some(why) = self.still_bound(&config) {
                    error(out, None, format!("The new configuration is not taken, the old one stays: {why}"));
                    return None;
                }
                self.config = *config;
                self.longest_ttl = self.longest_ttl.max(self.config.cluster.lease_ttl);
                let hosts = std::mem::take(&mut self.hosts);
                let slots = std::mem::take(&mut self.slots);
                let mut known: BTreeMap<HostName, Host> = BTreeMap::new();
                let mut statuses = BTreeMap::new();
                for (name, host) in hosts {
                    statuses.insert(name.clone(), host.status.clone());
                    known.insert(name, host);
                }
                self.fit_to_config(statuses, slots.into_iter().map(|(ip, s)| (ip, s.state)).collect());
                for (name, host) in known {
                    if let Some(h) = self.hosts.get_mut(&name) {
                        *h = host;
                    }
                }
                self.forget_returns();
                self.sent.clear();
                info(out, None, "The new configuration is in use".to_owned());
            }
        }
        None
    }

    fn report(&mut self, now: Millis, name: HostName, report: Box<Report>, out: &mut Vec<Output>) -> Option<HostName> {
        let host = self.hosts.get_mut(&name)?;
        if host.facts.link.as_ref().is_none_or(|l| l.boot != report.anchor.boot) {
            // Of a connection that has ended: what it says may have been overtaken.
            return None;
        }
        for (ip, address) in &report.addresses {
            if let Some(slot) = self.slots.get_mut(ip) {
                if address.seen > slot.state.epoch || (address.seen == slot.state.epoch && !self.spoken.contains(ip)) {
                    // R11: after the loss of the disk, numbering goes on above everything ever sent.
                    warn(
                        out,
                        Some(&name),
                        format!(
                            "It has seen epoch {}, which this monitor has told nobody (ours is {})",
                            address.seen, self.epoch
                        ),
                    );
                    self.spoken.remove(ip);
                    // Also above what went to somebody else only, after that (R11).
                    self.epoch = self.epoch.max(address.seen).max(Epoch(self.unix_s));
                    let above = next(&mut self.epoch);
                    let role = slot.state.role.clone();
                    let hosts = self.config.cluster.roles.get(&role).map(|r| r.hosts.clone()).unwrap_or_default();
                    *slot = Slot::first(role, above, &hosts, now, Quarantine::of(self.longest_ttl))
                        .with_quarantine(Quarantine::of(self.config.cluster.lease_ttl));
                }
                slot.heard(&name, address.seen, address.has(), now);
            }
        }
        for (ip, mac) in &report.conflicts {
            if host.facts.report.as_ref().is_none_or(|before| before.conflicts.get(ip) != Some(mac)) {
                error(
                    out,
                    Some(&name),
                    format!("{mac} answers for {ip}, as {name} finds on its network: somebody else has it"),
                );
            }
        }
        if report.leaving && host.facts.report.as_ref().is_none_or(|r| !r.leaving) {
            info(out, Some(&name), "Agent is shutting down: its roles go elsewhere".to_owned());
        }
        let vouched = report.vouched.clone();
        host.facts.reported(now, report);
        for (seen, ago) in vouched {
            if let Some(seen) = self.hosts.get_mut(&seen) {
                seen.facts.vouched.insert(name.clone(), now - Duration::from_millis(ago));
            }
        }
        Some(name)
    }

    /// R12: who may still be acting on an order cannot leave the configuration, nor can the address.
    fn still_bound(&self, new: &Config) -> Option<String> {
        let addresses = new.cluster.addresses();
        for (ip, slot) in &self.slots {
            let bound = slot.others_than(None);
            if let Some(gone) = bound.iter().find(|host| !new.cluster.hosts.contains_key(*host)) {
                return Some(format!(
                    "{gone} may still hold {ip}: set_offline {gone} and wait, or confirm_dead {gone}"
                ));
            }
            if let Some(host) = bound.first().filter(|_| !addresses.contains_key(ip)) {
                return Some(format!(
                    "{host} may still hold {ip}: set all hosts of the role offline before it is removed"
                ));
            }
        }
        None
    }

    /// Hosts and addresses as configured, keeping what is known of them.
    fn fit_to_config(
        &mut self,
        mut statuses: BTreeMap<HostName, HostStatus>,
        mut saved: BTreeMap<IpAddr, slot::SlotState>,
    ) {
        let now = self.now;
        self.configured_at = now;
        let before = Quarantine::of(self.longest_ttl);
        let quarantine = Quarantine::of(self.config.cluster.lease_ttl);
        self.hosts = self
            .config
            .cluster
            .hosts
            .keys()
            .map(|name| {
                let status = statuses.remove(name).unwrap_or_else(|| HostStatus::new(now));
                (
                    name.clone(),
                    Host {
                        facts: HostFacts::new(now),
                        status,
                        compared: Compared::Open,
                        in_line: false,
                        sample: None,
                        extra: None,
                    },
                )
            })
            .collect();
        let mut first_epoch = None;
        self.slots = self
            .config
            .cluster
            .addresses()
            .into_iter()
            .map(|(ip, role_name)| {
                let hosts = self.config.cluster.roles.get(&role_name).map(|r| r.hosts.clone()).unwrap_or_default();
                let slot = match saved.remove(&ip) {
                    Some(state) => {
                        self.spoken.insert(ip);
                        Slot::restored(slot::SlotState { role: role_name, ..state }, now, before)
                    }
                    None => {
                        let epoch = *first_epoch.get_or_insert_with(|| next(&mut self.epoch));
                        Slot::first(role_name, epoch, &hosts, now, before)
                    }
                };
                (ip, slot.with_quarantine(quarantine))
            })
            .collect();
        self.intent.retain(|ip, _| self.slots.contains_key(ip));
    }

    /// "Nothing changes": only leases are renewed.
    fn is_held_back(&self) -> bool {
        !self.network || self.mode == MonitorMode::Passive || self.is_cut_off()
    }

    fn leave_wait_mode(&mut self, now: Millis, out: &mut Vec<Output>) {
        if self.mode != MonitorMode::Wait {
            return;
        }
        let masters = || {
            let cluster = &self.config.cluster;
            self.hosts.iter().filter(|(name, _)| cluster.hosts.get(name).is_some_and(|h| h.mode == HostMode::Master))
        };
        if masters().all(|(_, h)| h.status.state == HostState::Online) {
            self.switch_mode(MonitorMode::Active, None, out);
            info(out, None, "All masters are ONLINE: switched from WAIT into ACTIVE mode".to_owned());
        } else if now.since(self.started) >= self.config.wait_for_other_master {
            self.switch_mode(MonitorMode::Active, None, out);
            info(out, None, "wait_for_other_master has passed: switched from WAIT into ACTIVE mode".to_owned());
        }
    }

    fn switch_mode(&mut self, mode: MonitorMode, cause: Option<String>, out: &mut Vec<Output>) {
        let because = cause.as_ref().map(|c| format!(": {c}")).unwrap_or_default();
        info(out, None, format!("Mode changed from {} to {mode}{because}", self.mode));
        self.mode = mode;
        self.cause = cause;
    }

    /// Stage 2.
    fn change_states(&mut self, now: Millis, out: &mut Vec<Output>) {
        let names: Vec<HostName> = self.hosts.keys().cloned().collect();
        for name in names {
            // Two transitions may follow one another (HARD_OFFLINE, AWAITING_RECOVERY, ONLINE); no rule goes in circles.
            for _ in 0..RULES.len() {
                let Some(view) = self.view(now, &name) else { break };
                let Some((to, why)) = RULES.iter().find_map(|rule| rule.fires(&view).map(|why| (rule.to, why))) else {
                    break;
                };
                self.set_state(now, &name, to, &why, out);
            }
        }
    }

    fn view<'a>(&'a self, now: Millis, name: &HostName) -> Option<View<'a>> {
        let host = self.hosts.get(name)?;
        let configured = self.config.cluster.hosts.get(name)?;
        // Whom it replicates from.
        let other = self.active.as_ref().filter(|active| *active != name);
        let peer = match configured.mode {
            HostMode::Master => other.or(configured.peer.as_ref()),
            HostMode::Slave => other,
        };
        let facts = &host.facts;
        Some(View {
            now,
            status: &host.status,
            ping: facts.check(CheckKind::Ping),
            mysql: facts.check(CheckKind::Mysql),
            rep_threads: facts.check(CheckKind::RepThreads),
            rep_backlog: facts.check(CheckKind::RepBacklog),
            sql_error: facts.sql_error(),
            summary: facts.summary(),
            agent_answers: self.agent_stays(now, name) && facts.server_alive(),
            holds: self.found.iter().find(|(_, host)| *host == name).map(|(ip, _)| self.address_name(*ip)),
            machine_boot: facts.report.as_ref().map(|r| r.machine_boot.as_str()),
            is_active_master: self.active.as_ref() == Some(name) || self.writer_holder() == Some(name),
            peer_online_for: peer
                .and_then(|p| self.hosts.get(p))
                .filter(|p| p.facts.serves())
                .and_then(|p| p.status.online_for(now)),
            compared: self.compared(name),
            mended: self.mended(name),
            auto_set_online: self.config.auto_set_online,
            flap_duration: self.config.flap_duration,
        })
    }

    fn set_state(&mut self, now: Millis, name: &HostName, to: HostState, why: &str, out: &mut Vec<Output>) {
        let flap = (self.config.flap_count, self.config.flap_duration);
        let Some(host) = self.hosts.get_mut(name) else { return };
        let from = host.status.state;
        let boot = host.facts.report.as_ref().map(|r| r.machine_boot.clone());
        let flaps = host.status.change(to, now, boot.as_deref(), flap);
        if to == HostState::HardOffline {
            // What it has may be more than what it could hand over.
            host.in_line |= host.compared == Compared::Subset;
            host.compared = Compared::Open;
            host.sample = None;
        }
        if to == HostState::Online {
            self.is_back(name);
        }
        let text = format!("State of host '{name}' changed from {from} to {to} {why}");
        match to {
            HostState::HardOffline | HostState::ReplicationFail | HostState::ReplicationDelay => {
                warn(out, Some(name), text)
            }
            HostState::Online | HostState::AdminOffline | HostState::AwaitingRecovery => info(out, Some(name), text),
        }
        if flaps {
            warn(out, Some(name), format!("Host '{name}' is flapping! It waits for set_online"));
        }
    }

    /// `writer(10.0.0.50)`.
    fn address_name(&self, ip: IpAddr) -> String {
        self.slots.get(&ip).map_or_else(|| ip.to_string(), |slot| format!("{}({ip})", slot.state.role))
    }

    fn writer_ip(&self) -> Option<IpAddr> {
        self.config.cluster.writer()?.ips.first().copied()
    }

    fn writer_holder(&self) -> Option<&HostName> {
        self.slots.get(&self.writer_ip()?)?.state.holder.as_ref()
    }

    /// Stages 3 and 4: what is wished, and as much of it as may be now.
    fn place_roles(&mut self, now: Millis, out: &mut Vec<Output>) {
        let mut keeping = BTreeSet::new();
        let mut eligible = BTreeSet::new();
        let mut offline = BTreeSet::new();
        for (name, host) in &self.hosts {
            if host.status.state == HostState::AdminOffline {
                offline.insert(name.clone());
            }
            let online = host.status.state == HostState::Online;
            let lacks_guard = host.facts.lacks_guard(&self.config.cluster);
            if online && self.agent_may_hold(now, name) && !self.is_leaving(name) && !lacks_guard {
                keeping.insert(name.clone());
            }
            let answers = self.agent_stays(now, name) && !lacks_guard;
            eligible.extend(Eligible::if_fit(name, online, answers, host.facts.server_alive()));
        }
        self.note_crash();
        let excluded = self.excluded(now);
        let roles: Vec<_> = self.config.cluster.roles.iter().map(|(n, r)| (n.clone(), r.clone())).collect();
        for (name, role) in roles {
            let holders: BTreeMap<IpAddr, Option<HostName>> =
                role.ips.iter().filter_map(|ip| self.slots.get(ip).map(|s| (*ip, s.state.holder.clone()))).collect();
            let is_writer = name == self.config.cluster.active_master_role && role.mode == RoleMode::Exclusive;
            let candidates = if is_writer { self.candidates(now, &role.hosts, &eligible) } else { eligible.clone() };
            // Who was closed for a move that failed, and cannot be told to open again, holds the address for nothing.
            let closed = self.closed_for_nothing(now).filter(|_| is_writer);
            let keeping: BTreeSet<HostName> = keeping.iter().filter(|h| Some(*h) != closed.as_ref()).cloned().collect();
            let standing = Standing {
                mode: self.mode,
                eligible: &candidates,
                keeping: &keeping,
                intent: &self.intent,
                offline: &offline,
                taken_off: &self.taken_off,
                found: &self.found,
                crashed: self.crashed.as_ref().filter(|_| is_writer),
            };
            let rank = |host: &HostName| self.rank(host, &role.hosts);
            let mut wishes = standing.wishes(&role, &holders, &rank);
            if is_writer {
                if let Some((ip, wish)) = wishes.pop_first() {
                    self.place_writer(now, ip, &wish, &candidates, &excluded, out);
                }
            } else {
                for (ip, wish) in wishes {
                    self.place(now, ip, &wish, (&role.hosts, &excluded), out);
                }
            }
        }
    }

    /// Its agent does not open a server again that has ended under the order to write, so somebody has to get a new one. In
    /// ACTIVE mode that is a failover; in the others nobody else is to have it.
    fn note_crash(&mut self) {
        if self.mode == MonitorMode::Active {
            self.crashed = None;
        } else if let Some(holder) = self.writer_holder().cloned() {
            let runs_again = self.hosts.get(&holder).is_some_and(|host| host.facts.restarted());
            self.crashed = runs_again.then_some(holder);
        }
    }

    /// The holder is at work, as its peers say, was closed for a move that has failed, and has not been heard since it was
    /// told to open again.
    fn closed_for_nothing(&self, now: Millis) -> Option<HostName> {
        let (ip, holder) = (self.writer_ip()?, self.writer_holder()?);
        let told = self.handover.reopening.filter(|_| self.handover.is_settled() && self.is_silent(now, holder))?;
        let report = self.hosts.get(holder)?.facts.report.as_ref();
        let heard = report.and_then(|r| r.addresses.get(&ip)).is_some_and(|a| a.seen >= told);
        (!heard).then(|| holder.clone())
    }

    /// Where no host of the role is ONLINE, one whose replication is late or broken may be promoted as well, once it has
    /// applied and fetched everything that is to be had (handover.rs holds otherwise).
    fn candidates(&self, now: Millis, hosts: &[HostName], eligible: &BTreeSet<Eligible>) -> BTreeSet<Eligible> {
        let holder = self.writer_holder();
        let online = hosts.iter().any(|h| {
            self.hosts.get(h).is_some_and(|host| host.status.state == HostState::Online)
                && (eligible.iter().any(|e| e.host() == h) || holder == Some(h))
        });
        let mut all = eligible.clone();
        if online {
            return all;
        }
        for name in hosts {
            let Some(host) = self.hosts.get(name) else { continue };
            let troubled = matches!(host.status.state, HostState::ReplicationDelay | HostState::ReplicationFail)
                && !matches!(host.compared, Compared::Extra(_) | Compared::Lacks(_));
            all.extend(Eligible::if_fit(name, troubled, self.agent_stays(now, name), host.facts.server_alive()));
        }
        all
    }

    /// How many of the other hosts of the role have received nothing that this one lacks. Who was open for writes last
    /// lacks nothing by definition, whatever the others tell of themselves.
    fn rank(&self, host: &HostName, others: &[HostName]) -> u64 {
        if self.active.as_ref() == Some(host) {
            return u64::MAX;
        }
        let Some(mine) = self.hosts.get(host).and_then(|h| h.facts.report.as_ref()).map(|r| &r.server) else {
            return 0;
        };
        let received = mine.replication.as_ref().and_then(|r| r.received.as_ref());
        let has = |theirs: &Gtids| {
            [mine.executed.as_ref(), received].into_iter().flatten().any(|g| g.contains(theirs) == Some(true))
        };
        let covered = others.iter().filter(|o| *o != host).filter(|o| {
            self.hosts.get(*o).and_then(|h| h.facts.report.as_ref()).is_some_and(|r| {
                let theirs = &r.server;
                theirs.executed.as_ref().is_some_and(&has)
                    && theirs.replication.as_ref().and_then(|x| x.received.as_ref()).is_none_or(&has)
            })
        });
        covered.count() as u64
    }

    /// An address whose move needs no handing over of data.
    fn place(
        &mut self,
        now: Millis,
        ip: IpAddr,
        wish: &Wish,
        (hosts, excluded): (&[HostName], &BTreeSet<HostName>),
        out: &mut Vec<Output>,
    ) {
        let Some(slot) = self.slots.get_mut(&ip) else { return };
        let role = slot.state.role.clone();
        let subject = format!("{role}({ip})");
        if wish.stays {
            self.remark_role(subject, (!wish.why.is_empty()).then(|| wish.why.clone()), out);
            return;
        }
        let to = wish.host.as_ref().map(Eligible::host);
        if let Some(holder) = slot.state.holder.clone().filter(|h| Some(h) != to) {
            slot.release(next(&mut self.epoch));
            let text = format!("Role '{role}({ip})' is taken from '{holder}': {}", wish.why);
            decided(out, Some(&holder), self.epoch, text);
        }
        self.taken_off.remove(&ip);
        let Some(to) = to else {
            self.remark_role(subject, Some(wish.why.clone()), out);
            return;
        };
        let Some(slot) = self.slots.get_mut(&ip) else { return };
        if slot.state.holder.as_ref() == Some(to) {
            return;
        }
        match slot.free_for(to, now) {
            Ok(proof) => {
                let epoch = next(&mut self.epoch);
                slot.grant(proof, epoch, granters_of(hosts, to, excluded), false);
                decided(out, Some(to), epoch, format!("Role '{role}({ip})' is given to '{to}': {}", wish.why));
                self.intent.remove(&ip);
                self.remark_role(subject, None, out);
            }
            Err(blocked) => {
                let text = match blocked {
                    slot::Blocked::NoGranter { of } | slot::Blocked::Unknown { of } if self.agent_answers(now, &of) => {
                        format!("{to} is to have it and waits until {of} has let go")
                    }
                    slot::Blocked::Lease { of, .. } => {
                        format!("{to} is to have it and waits until {of} has let go or its lease is over")
                    }
                    slot::Blocked::NoGranter { of } | slot::Blocked::Unknown { of } => format!(
                        "{to} is to have it, and only an answer of {of} can free it: bring its agent back, or switch it off and confirm_dead {of}"
                    ),
                };
                self.remark_role(subject, Some(text), out);
            }
        }
    }

    fn place_writer(
        &mut self,
        now: Millis,
        ip: IpAddr,
        wish: &Wish,
        eligible: &BTreeSet<Eligible>,
        excluded: &BTreeSet<HostName>,
        out: &mut Vec<Output>,
    ) {
        let silent: BTreeSet<HostName> = self.hosts.keys().filter(|h| self.is_silent(now, h)).cloned().collect();
        let answering: BTreeSet<HostName> = self.hosts.keys().filter(|h| self.agent_answers(now, h)).cloned().collect();
        let may_hold: BTreeSet<HostName> = self.hosts.keys().filter(|h| self.agent_may_hold(now, h)).cloned().collect();
        let rebuilt: BTreeSet<HostName> = self.hosts.keys().filter(|h| self.is_rebuilt(h)).cloned().collect();
        let closed = self.closed_for_nothing(now);
        let Core { hosts, config, handover, slots, epoch, active, .. } = self;
        let Some(slot) = slots.get_mut(&ip) else { return };
        let extending = slot.extending();
        let views = hosts
            .iter()
            .filter_map(|(name, host)| {
                let view = HostView {
                    ip: config.cluster.hosts.get(name)?.ip,
                    report: host.facts.fresh_report(),
                    agent_answers: answering.contains(name),
                    server_alive: host.facts.server_alive(),
                    may_hold: may_hold.contains(name),
                    silent: silent.contains(name),
                    offline: host.status.state == HostState::AdminOffline,
                    closed: closed.as_ref() == Some(name),
                    heard: host.facts.heard,
                    server_gone: host.facts.gone.is_some(),
                    last_alive: host.facts.last_alive(if slot.state.holder.as_ref() == Some(name) {
                        &extending
                    } else {
                        &[]
                    }),
                    replicating: host.facts.replicating.as_ref(),
                    // With nobody seen open since this monitor lost its state, there was nobody to compare with.
                    trusted: (matches!(host.compared, Compared::Subset | Compared::Needless)
                        || (host.compared == Compared::Open && host.in_line)
                        || active.as_ref() == Some(name)
                        || (active.is_none() && handover.writers.given().is_some())),
                    rebuilt: rebuilt.contains(name) || host.facts.is_at_a_job(),
                    semisync: host.facts.semisync.as_ref(),
                    semisync_at: host.facts.semisync_at,
                    waits_since: host.facts.waits_since(),
                    attached: host.facts.attached.0,
                    last_executed: host.facts.last_executed.as_ref(),
                    let_go: host.facts.has_let_go(ip, slot.state.epoch),
                    for_good: host.facts.has_for_good(),
                    most: host.facts.has_at_most(),
                    received_once: host.facts.received_once.as_ref(),
                    acknowledges: config.cluster.semisync_slaves
                        || config.cluster.hosts.get(name).is_some_and(|h| h.mode == HostMode::Master),
                };
                Some((name.clone(), view))
            })
            .collect();
        let scene = Scene {
            now,
            address: ip,
            wish,
            eligible,
            hosts: &views,
            can_kill: config.kill_host_bin.is_some(),
            active: active.as_ref(),
            flap: (config.flap_count, config.flap_duration),
        };
        let mut turn = Turn { cluster: &config.cluster, excluded, slot, epochs: epoch, events: Vec::new() };
        handover.advance(&scene, &mut turn);
        let events = turn.events;
        if !events.iter().any(|e| matches!(e, Event::Waits(_))) {
            let stays = wish.stays && !wish.why.is_empty();
            self.remark_role(self.writer_subject(ip), stays.then(|| wish.why.clone()), out);
        }
        for event in events {
            self.follow_up(now, event, out);
        }
    }

    /// Nothing new may be decided: a move under way is undone as far as it closed the writer.
    fn suspend_handover(&mut self, now: Millis, out: &mut Vec<Output>) {
        let why = if !self.network {
            "the monitor's own network check fails"
        } else if self.mode == MonitorMode::Passive {
            "the mode is PASSIVE"
        } else {
            "no agent answers"
        };
        let Some(ip) = self.writer_ip() else { return };
        let excluded = self.excluded(now);
        let Core { config, handover, slots, epoch, .. } = self;
        let Some(slot) = slots.get_mut(&ip) else { return };
        let mut turn = Turn { cluster: &config.cluster, excluded: &excluded, slot, epochs: epoch, events: Vec::new() };
        handover.suspend(&mut turn, why);
        for event in turn.events {
            self.follow_up(now, event, out);
        }
    }

    fn follow_up(&mut self, now: Millis, event: Event, out: &mut Vec<Output>) {
        match event {
            Event::Decided(text) => decided(out, None, self.epoch, text),
            Event::Waits(text) => {
                if let Some(ip) = self.writer_ip() {
                    self.remark_role(self.writer_subject(ip), Some(text), out);
                }
            }
            Event::Kill(host) => {
                let ping_ok =
                    self.hosts.get(&host).is_some_and(|h| h.facts.check(CheckKind::Ping) == facts::Verdict::Good);
                warn(out, Some(&host), "The host neither answers nor lets go: kill_host_bin is called".to_owned());
                self.killing.insert(host.clone(), self.epoch);
                out.push(Output::Kill { host, asked: self.epoch, ping_ok });
            }
            Event::Opened { from, to, in_step } => {
                for (name, host) in self.hosts.iter_mut().filter(|(name, _)| **name != to) {
                    // In step, the old master has what the new one has. After anything else nobody is trusted.
                    let known = in_step && (from.as_ref() == Some(name) || host.compared == Compared::Subset);
                    host.compared = if known || (in_step && self.active.as_ref() == Some(name)) {
                        Compared::Subset
                    } else {
                        Compared::Open
                    };
                    host.sample = None;
                    host.in_line &= in_step;
                    host.facts.replicating = host.facts.replicating.take().filter(|_| in_step);
                }
                self.hosts.values_mut().for_each(|h| h.facts.received_once = None);
                if let Some(before) = self.active.replace(to).and_then(|before| self.hosts.get_mut(&before)) {
                    before.facts.excuse_replication(now);
                }
                if let Some(ip) = self.writer_ip().filter(|_| self.handover.request.is_none()) {
                    // The wish has come true; it must not call the role back after a failover.
                    self.intent.remove(&ip);
                }
                self.compare(now, out);
            }
            Event::Lost(host) => self.lost_writer(now, &host, out),
            Event::FailedOver { from, to, acknowledged, ahead } => {
                let state = self.hosts.get(&to).map(|h| h.status.state);
                if matches!(state, Some(HostState::ReplicationDelay | HostState::ReplicationFail)) {
                    let why = "because it has applied everything that is to be had, and has the writer";
                    self.set_state(now, &to, HostState::Online, why, out);
                }
                if let Some(from) = from.filter(|from| *from != to) {
                    self.remember_failover(from, acknowledged);
                }
                for (name, ahead) in ahead {
                    self.remember_ahead(name, ahead);
                }
            }
            Event::Answer(id, result) => self.moved_writer(id, result, out),
            Event::GaveUp => {
                if let Some(ip) = self.writer_ip() {
                    self.intent.remove(&ip);
                }
            }
        }
    }

    /// lessons.md 20: a role that goes to and fro is bounded by keeping out whoever keeps losing it.
    fn lost_writer(&mut self, now: Millis, name: &HostName, out: &mut Vec<Output>) {
        let flap = (self.config.flap_count, self.config.flap_duration);
        let Some(host) = self.hosts.get_mut(name) else { return };
        if !host.status.loses_writer(now, flap) {
            return;
        }
        let (times, state) = (host.status.lost_writer.len(), host.status.state);
        warn(
            out,
            Some(name),
            format!("Host '{name}' has lost the writer {times} times within flap_duration. It waits for set_online"),
        );
        if state == HostState::Online {
            self.set_state(now, name, HostState::AwaitingRecovery, "(it keeps losing the writer)", out);
        }
    }

    fn writer_subject(&self, ip: IpAddr) -> String {
        format!("{}({ip})", self.config.cluster.active_master_role)
    }

    fn remark_role(&mut self, subject: String, text: Option<String>, out: &mut Vec<Output>) {
        let line = text.map(|text| format!("Role {subject}: {text}"));
        self.remark(subject, line, out);
    }

    /// What stands in somebody's way: logged when it changes, shown as long as it stands.
    fn remark(&mut self, subject: String, text: Option<String>, out: &mut Vec<Output>) {
        match text {
            None => {
                self.remarks.remove(&subject);
            }
            Some(line) => {
                // The rest of a lease counts down: not every number is news.
                let is_number = |word: &&str| word.chars().all(|c| c.is_ascii_digit());
                let words =
                    |t: &str| t.split(' ').filter(|word| !is_number(word)).map(str::to_owned).collect::<Vec<_>>();
                if self.remarks.get(&subject).is_none_or(|before| words(before) != words(&line)) {
                    info(out, None, line.clone());
                }
                self.remarks.insert(subject, line);
            }
        }
    }

    /// Before anything that was decided is sent.
    fn persist(&mut self, now: Millis, out: &mut Vec<Output>) {
        let snapshot = Snapshot {
            epoch: self.epoch,
            mode: self.mode,
            cause: self.cause.clone(),
            hosts: self.hosts.iter().map(|(name, h)| (name.clone(), h.status.clone())).collect(),
            slots: self.slots.iter().map(|(ip, s)| (*ip, s.state.clone())).collect(),
            active: self.active.clone(),
            intent: self.intent.clone(),
            lease_ttl_ms: u64::try_from(self.longest_ttl.as_millis()).unwrap_or(u64::MAX),
            preferred_moves: self.handover.preferred_moves.clone(),
            writers: self.handover.writers.clone(),
            returns: self.returns.clone(),
            saved_at: now,
        };
        if self.persisted.as_ref().is_none_or(|before| snapshot.differs(before)) {
            self.persisted = Some(snapshot.clone());
            out.push(Output::Persist(Box::new(snapshot)));
        }
    }
}

fn audit(out: &mut Vec<Output>, level: Level, host: Option<&HostName>, epoch: Option<Epoch>, text: String) {
    out.push(Output::Audit(Audit { level, host: host.cloned(), epoch, text }));
}

fn decided(out: &mut Vec<Output>, host: Option<&HostName>, epoch: Epoch, text: String) {
    audit(out, Level::Info, host, Some(epoch), text);
}

fn info(out: &mut Vec<Output>, host: Option<&HostName>, text: String) {
    audit(out, Level::Info, host, None, text);
}

fn warn(out: &mut Vec<Output>, host: Option<&HostName>, text: String) {
    audit(out, Level::Warn, host, None, text);
}

fn error(out: &mut Vec<Output>, host: Option<&HostName>, text: String) {
    audit(out, Level::Error, host, None, text);
}

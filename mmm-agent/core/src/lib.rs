//! The deciding part of `mmm_agentd`: events in, an ordered list of things to do out. No I/O, no clock.
//!
//! ```text
//! order -> accept (is it newer, is its lease running) -> plan (what should be, against what is) -> steps
//!       -> what came of them, what the kernel and the server say -> report
//! ```
//!
//! Start at [`Core::handle`].

mod accept;
pub mod io;
mod job;
#[cfg(feature = "model")]
pub mod model;
mod plan;
mod probe;
#[cfg(test)]
mod tests;
mod vouch;

use accept::{Accepted, Held, Lease, SentReports, Slot};
use io::{AskId, Audit, Input, Output, Saved, SavedAddress, Side, Step};
use mmm_common::config::{Agent as Config, Cluster, OnHang};
use mmm_common::epoch::{Anchor, Boot, Epoch};
use mmm_common::ids::{HostName, Millis, RoleName};
use mmm_common::order::{AddressOrder, Job, Order, ReplicationOrder, Task, Work};
use mmm_common::report::{
    AddressReport, JobState, Life, Report, SemiSync, ServerReport, TaskOutcome, TaskReport, Writing,
};
use mmm_common::safeguard::{Safeguard, stands};
use mmm_common::state::HostMode;
use mmm_common::vouch::{VouchAnswer, VouchRequest};
use plan::{Fitness, Situation, Subject};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// A step that failed is tried again after this long.
const RETRY: Duration = Duration::from_millis(500);
/// Within this time what a step has done shows in the watcher's looks at the server.
const LOOKED_AT: Duration = Duration::from_secs(2);
/// How long a shutdown leaves the monitor to move the roles away before it lets go by itself.
const HAND_OVER: Duration = Duration::from_secs(5);
/// How long it then waits for the server to become read-only before it ends anyway.
const LEAVE_WITHIN: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct Core {
    ttl: Duration,
    /// The exact guard is up for as long as this process lives.
    guarded: bool,
    /// What is on disk says otherwise.
    guard_to_save: bool,
    heartbeat: Duration,
    restart_grace: Duration,
    sources: BTreeMap<HostName, (IpAddr, u16)>,
    roles: BTreeMap<IpAddr, RoleName>,

    /// When the last input came.
    now: Millis,
    anchor: Anchor,
    sent: SentReports,
    machine_boot: String,

    slots: BTreeMap<IpAddr, Slot>,
    /// What was saved for addresses that are not in the configuration any more: they may come back.
    others: BTreeMap<IpAddr, SavedAddress>,
    replication: ReplicationOrder,
    wait_for_replica: bool,
    detached: bool,
    task: Option<(Task, TaskOutcome)>,
    /// The last one begun. On disk before it is begun.
    last_task: Epoch,
    task_to_start: bool,
    job: Option<(Job, JobState)>,
    /// The last one begun. On disk before it is begun.
    last_job: Epoch,
    job_to_start: bool,
    /// Whether this host is to acknowledge what it receives: a master always, a slave if so configured. None:
    /// semi-synchronous replication is left as it is.
    acknowledging: Option<bool>,
    /// `on_hang`.
    kills_hung: bool,
    /// The newest report that was answered; an order to an older one has been overtaken.
    answered: Option<Anchor>,

    server: ServerReport,
    died_at: Option<Millis>,
    /// The server ended while this host was, or was about to become, the active master.
    crashed: bool,
    /// A life before this one had opened it, and it has not been looked at since.
    opened_before: bool,
    /// It was opened, and not closed by this agent's hand since.
    open: bool,
    /// The same, as the disk has it.
    open_on_disk: bool,
    /// The address of the active master's role.
    writer: Option<IpAddr>,
    /// The first look of this life at the server has ended.
    looked_at_server: bool,
    /// The writer address for which the server was opened and has not been seen closed since (R13).
    opened: Option<IpAddr>,
    /// The server was closed by a step, or got other data, and has not been looked at since: its position is still that of
    /// before.
    position_old: bool,

    under_way: BTreeSet<Subject>,
    /// The last change of replication that was done, and when.
    replicated: Option<(Step, Millis)>,
    /// The last change of replication, and when, if it failed: what it has stopped is to be started again, or what it has
    /// not forgotten to be forgotten.
    broken_off: Option<(Step, Millis)>,
    /// What failed, in words, and when it is tried again.
    failed: BTreeMap<Subject, (String, Millis)>,
    refusals: BTreeMap<IpAddr, String>,
    /// Orders that were overtaken, of another life, too late, or of an older epoch.
    refused: u64,

    /// Whom this agent has vouched for, and when last.
    vouched_for: BTreeMap<HostName, Millis>,
    /// The longest lease vouched for, on disk before the first such vouch is given.
    vouched_ttl: Duration,
    /// Why each granter last refused to vouch, by address.
    vouch_refusals: BTreeMap<(HostName, IpAddr), String>,
    ask_due: bool,

    monitor_up: bool,
    lookups: u64,
    looking: bool,
    /// The last look at the kernel succeeded, and there was one in this life.
    kernel_known: bool,
    report_due: bool,
    next_heartbeat: Millis,
    leaving_since: Option<Millis>,
    gone: bool,
}

impl Core {
    /// `boot` names this life of the process: never used before by this agent. `machine_boot` is the kernel's boot id.
    /// `guard`: the exact guard is up, and stays up for as long as this process lives; with until when it lets each
    /// address answer by what the life before has armed.
    pub fn new(
        config: &Config,
        saved: Option<Saved>,
        boot: Boot,
        machine_boot: String,
        guard: Option<BTreeMap<IpAddr, Millis>>,
        now: Millis,
    ) -> Self {
        let cluster = &config.cluster;
        let mut saved = saved.unwrap_or_default();
        let same_boot = saved.machine_boot == machine_boot;
        let was_guarded = saved.guarded;
        let inherited = |ip: &IpAddr| match &guard {
            _ if !same_boot => None,
            // An order of a life with the guard is waited out for less time than the kernel needs without it.
            None => (!was_guarded).then_some(Lease::Inherited { until: None }),
            // What is over may still be vouched for or renewed.
            Some(armed) => Some(Lease::Inherited { until: Some(armed.get(ip).copied().unwrap_or(now)) }),
        };
        // R9: whom this agent vouched for in the life before is not known.
        let vouched_ttl = Duration::from_millis(saved.vouched_ttl_ms);
        let vouched_until = now + cluster.lease_ttl.max(vouched_ttl) + Cluster::MARGIN;
        let roles = cluster.addresses();
        let slots: BTreeMap<IpAddr, Slot> = roles
            .keys()
            .map(|ip| {
                let slot = saved.addresses.remove(ip).unwrap_or_default();
                (*ip, Slot::restored(slot, inherited(ip), cluster.lease_ttl, vouched_until))
            })
            .collect();
        let opened =
            slots.iter().find(|(_, s)| s.hold.as_ref().is_some_and(|held| held.order.write)).map(|(ip, _)| *ip);
        Core {
            ttl: cluster.lease_ttl,
            guarded: guard.is_some(),
            guard_to_save: was_guarded != guard.is_some(),
            heartbeat: cluster.heartbeat_interval,
            restart_grace: cluster.restart_grace,
            sources: cluster.hosts.iter().map(|(name, h)| (name.clone(), (h.ip, h.mysql_port))).collect(),
            roles,
            now,
            anchor: Anchor { boot, seq: 0 },
            sent: SentReports::default(),
            machine_boot,
            slots,
            others: saved.addresses.into_iter().map(|(ip, s)| (ip, SavedAddress { hold: None, ..s })).collect(),
            replication: ReplicationOrder::Keep,
            wait_for_replica: true,
            detached: saved.detached,
            task: None,
            last_task: saved.task,
            task_to_start: false,
            job: None,
            last_job: saved.job,
            job_to_start: false,
            acknowledging: cluster.semisync.then(|| {
                let master = cluster.hosts.get(&config.this).is_some_and(|h| h.mode == HostMode::Master);
                master || cluster.semisync_slaves
            }),
            kills_hung: cluster.on_hang == OnHang::Kill,
            answered: None,
            server: ServerReport::unknown("not looked at yet"),
            died_at: None,
            crashed: false,
            opened_before: saved.open,
            open: saved.open,
            open_on_disk: saved.open,
            writer: cluster.writer().and_then(|role| role.ips.first().copied()),
            looked_at_server: false,
            opened,
            position_old: false,
            under_way: BTreeSet::new(),
            replicated: None,
            broken_off: None,
            failed: BTreeMap::new(),
            refusals: BTreeMap::new(),
            refused: 0,
            vouched_for: BTreeMap::new(),
            vouched_ttl,
            vouch_refusals: BTreeMap::new(),
            ask_due: false,
            monitor_up: false,
            lookups: 0,
            looking: false,
            kernel_known: false,
            // The first look at the kernel is due at once: nothing is assumed about what is there.
            report_due: true,
            next_heartbeat: now,
            leaving_since: None,
            gone: false,
        }
    }

    pub fn handle(&mut self, now: Millis, input: Input, out: &mut Vec<Output>) {
        if self.gone {
            return;
        }
        self.now = now;
        // Before the first report says so.
        let guard_to_save = std::mem::take(&mut self.guard_to_save);
        let mut persist = false;
        match input {
            Input::Tick => {}
            Input::MonitorUp => {
                self.monitor_up = true;
                self.report_due = true;
                info(out, "The monitor is connected".to_owned());
            }
            Input::MonitorDown { why } => {
                self.monitor_up = false;
                warn(
                    out,
                    format!(
                        "Connection to the monitor ended ({why}); roles stay as long as the other hosts vouch for them"
                    ),
                );
            }
            Input::Order(order) => persist = self.accept(now, order, out),
            Input::Kernel { asked, present } => self.looked(now, asked, &present, out),
            Input::KernelUnreadable { asked, why } => {
                if asked == self.lookups {
                    self.looking = false;
                    self.kernel_known = false;
                    error(out, format!("The kernel's addresses cannot be read: {why}. No report is sent without them"));
                }
            }
            Input::KernelChanged => self.report_due = true,
            Input::Server(server) => self.observe(now, server, out),
            Input::PeerUp { host } => {
                info(out, format!("Agent of {host} can be asked to vouch for this host's roles"));
                self.ask_due = true;
            }
            Input::PeerDown { host, why } => warn(out, format!("Agent of {host} cannot be asked to vouch: {why}")),
            Input::Asked { ask, from, request } => self.asked(now, ask, &from, &request, out),
            Input::Vouched { by, answer } => self.vouched(&by, &answer, out),
            Input::Probed { ip, answered_by } => self.probed(now, ip, answered_by, out),
            Input::Done { step, result } => persist = self.done(now, &step, result, out),
            Input::TaskDone { id, outcome } => self.task_done(id, outcome, out),
            Input::Job { id, state } => self.job_went(id, state, out),
            Input::Shutdown { keep: true } => {
                info(out, "Ending and keeping roles: they last until their leases end".to_owned());
                self.save(out);
                out.push(Output::Exit);
                self.gone = true;
                return;
            }
            Input::Shutdown { keep: false } => {
                if self.leaving_since.is_none() {
                    info(out, "Ending: the monitor is asked to move the roles away first".to_owned());
                    self.leaving_since = Some(now);
                    self.report_due = true;
                }
            }
        }
        self.note_crash(out);
        self.act(now, persist || guard_to_save, out);
        self.report_if_due(now, out);
        self.ask_if_due(now, out);
        self.leave_if_done(now, out);
    }

    /// Whether this host may be writing for the cluster: its shell then keeps the machine's watchdog fed.
    pub fn is_writer(&self) -> bool {
        self.opened.is_some()
            || self.writer.and_then(|ip| self.slots.get(&ip)).is_some_and(|slot| slot.present && slot.hold.is_some())
    }

    /// When to send a `Tick`, and what for.
    pub fn next_deadline(&self) -> Option<(Millis, &'static str)> {
        let mut all = vec![(self.next_heartbeat, "heartbeat")];
        for (ip, slot) in &self.slots {
            let ahead = slot.look_ahead(self.now).filter(|_| self.writer == Some(*ip));
            all.extend(ahead.map(|at| (at, "somebody else is looked for before a promise ends")));
            all.extend(slot.hold.as_ref().and_then(Held::lets_go).map(|at| (at, "a lease is about to end")));
            if let Some(Lease::Until(end)) = slot.hold.as_ref().map(|h| h.lease) {
                // The kernel takes whole seconds only: what was rounded off is given when the rest is a whole one.
                let whole = end.since(self.now + Duration::from_millis(1)).as_secs();
                if slot.present && whole > 0 {
                    all.push((end - Duration::from_secs(whole), "a kernel lifetime is refreshed"));
                }
                let armed = slot.allowed_until.filter(|_| self.guarded && slot.present).zip(slot.hold.as_ref());
                let rearm = armed.and_then(|(armed, held)| held.rearm_at(armed, end)).filter(|at| *at > self.now);
                all.extend(rearm.map(|at| (at, "the guard is armed for the rest of a lease")));
                if !slot.present {
                    all.push((slot.vouched_until, "a promise to another host ends"));
                }
                all.extend(slot.next_probe(self.now).map(|at| (at, "somebody else is looked for on the wire")));
            }
        }
        all.extend(self.failed.values().map(|(_, at)| (*at, "a failed step is tried again")));
        all.extend(self.died_at.map(|at| (at + self.restart_grace, "restart_grace ends")));
        if let Some(at) = self.leaving_since {
            all.push((at + HAND_OVER, "the monitor has had its time to move the roles"));
            all.push((at + HAND_OVER + LEAVE_WITHIN, "the shutdown has waited long enough"));
        }
        // What was due up to the last input was looked at then.
        all.into_iter().filter(|(at, _)| *at > self.now).min()
    }

    /// R4. True if something must be on disk before it is acted on.
    fn accept(&mut self, now: Millis, order: Order, out: &mut Vec<Output>) -> bool {
        let of_this_life = order.answers.boot == self.anchor.boot;
        if of_this_life && self.answered.is_some_and(|newest| order.answers.seq < newest.seq) {
            // Orders are whole pictures: one that was overtaken says nothing that is still wanted.
            self.refused += 1;
            return false;
        }
        let ttl = self.ttl.min(Duration::from_millis(order.lease_ttl_ms));
        let sent = self.sent.when(order.answers, self.anchor.boot);
        let mut new = false;
        let told_to_let_go = self.writer.is_some_and(|ip| order.addresses.get(&ip).is_some_and(|o| !is_hold(o)));
        for (ip, order) in order.addresses {
            let Some(slot) = self.slots.get_mut(&ip) else { continue };
            let text = describe(&order);
            match slot.accept(order, sent, ttl, now) {
                Accepted::Renewed => {}
                Accepted::New => {
                    new = true;
                    info(out, format!("{}({ip}): {text}", self.roles[&ip]));
                }
                Accepted::Refused(why) => {
                    self.refused += 1;
                    if self.refusals.insert(ip, why.clone()).as_ref() != Some(&why) {
                        let count = self.refused;
                        let text = format!(
                            "Refused an order for {}({ip}), {text}: {why} ({count} refused since the start)",
                            self.roles[&ip]
                        );
                        warn(out, text);
                    }
                    continue;
                }
            }
            self.refusals.remove(&ip);
        }
        self.report_due |= new;
        if sent.is_none() {
            return new;
        }
        self.answered = Some(order.answers);
        self.replication = order.replication;
        self.wait_for_replica = order.wait_for_replica;
        let begun = self.begin(order.task, out) | self.begin_job(order.job, out);
        if told_to_let_go && self.task.is_none() && !self.is_active_master() {
            // Whatever it is told next comes from a look at what it has now.
            (self.crashed, self.opened_before, self.open) = (false, false, false);
        }
        new | begun
    }

    /// A task is begun once per id; the order that no longer names it ends our reporting of it.
    fn begin(&mut self, task: Option<Task>, out: &mut Vec<Output>) -> bool {
        let Some(task) = task else {
            self.task = None;
            return false;
        };
        if task.id <= self.last_task {
            if self.task.as_ref().is_none_or(|(mine, _)| mine.id != task.id) {
                // Begun by the process before this one: how it ended is not known.
                let why = "the agent was restarted while it was under way".to_owned();
                self.task = Some((task, TaskOutcome::Failed { why }));
                self.report_due = true;
            }
            return false;
        }
        info(out, format!("Task of epoch {}: {}", task.id, describe_work(&task.work)));
        self.last_task = task.id;
        if is_final(&task.work) {
            self.detached = true;
        }
        if matches!(task.work, Work::Drain { .. }) {
            // This host is about to be the writer: whoever still answers for the address is found while it drains.
            if let Some((ip, slot)) = self.writer.and_then(|ip| self.slots.get_mut(&ip).map(|s| (ip, s)))
                && !slot.present
            {
                slot.probe.begun(self.now);
                out.push(Output::Do(Step::Probe { ip }));
            }
        }
        self.task = Some((task, TaskOutcome::Running));
        self.task_to_start = true;
        true
    }

    fn looked(&mut self, now: Millis, asked: u64, present: &BTreeSet<IpAddr>, out: &mut Vec<Output>) {
        if asked != self.lookups {
            return;
        }
        self.looking = false;
        self.kernel_known = true;
        for (ip, slot) in &mut self.slots {
            let there = present.contains(ip);
            if slot.present && !there && slot.right(now).is_some() {
                warn(out, format!("{}({ip}) has left the machine, and not by this agent's hand", self.roles[ip]));
            }
            slot.present = there;
            if !there {
                slot.gone();
            }
        }
        // With what is there now known, steps may follow; what they change is reported when they are done.
        self.send(now, out);
    }

    fn observe(&mut self, now: Millis, server: ServerReport, out: &mut Vec<Output>) {
        if server.life != self.server.life && (life_word(&server.life) != life_word(&self.server.life)) {
            match &server.life {
                Life::Alive => info(out, "The local server answers".to_owned()),
                Life::Dead { why, .. } => warn(out, format!("The local server has ended: {why}")),
                Life::Hung { for_ms } => warn(out, format!("The local server hangs: no answer for {for_ms} ms")),
                Life::Unknown { why } => warn(out, format!("The local server's state is not known: {why}")),
            }
        }
        match server.life {
            Life::Dead { .. } => self.died_at = self.died_at.or(Some(now)),
            Life::Alive | Life::Hung { .. } | Life::Unknown { .. } => self.died_at = None,
        }
        if matches!(server.life, Life::Alive)
            && server.writing != Writing::Unknown
            && std::mem::take(&mut self.opened_before)
        {
            // A server starts read-only.
            self.crashed |= server.writing == Writing::ReadOnly;
        }
        self.open |=
            matches!(server.life, Life::Alive) && server.writing == Writing::Allowed && self.is_active_master();
        self.report_due |= is_news(&self.server, &server) || self.position_old;
        self.server = server;
        self.position_old = false;
        // A look from before the step can come after it.
        let running = self.server.replication.as_ref().is_some_and(|r| r.io_running || r.sql_running);
        self.broken_off
            .take_if(|(step, at)| running && matches!(step, Step::Follow { .. }) && now.since(*at) >= LOOKED_AT);
        let closed = match (&self.server.life, self.server.writing) {
            // What is under way may yet open the next one.
            (Life::Dead { .. }, _) => !self.under_way.contains(&Subject::Writable),
            // A look from before the server was opened can come after that: while read_only is being changed, only the
            // step's own reading back counts.
            (Life::Alive, Writing::ReadOnly) => {
                !self.under_way.contains(&Subject::Writable) && !self.under_way.contains(&Subject::ReadOnly)
            }
            (Life::Alive, Writing::Allowed | Writing::Unknown) | (Life::Hung { .. } | Life::Unknown { .. }, _) => false,
        };
        self.looked_at_server = true;
        if closed {
            self.opened = None;
        } else if matches!(self.server.life, Life::Alive)
            && self.server.writing == Writing::Allowed
            && !self.is_rebuilding()
        {
            self.opened = self.writer.filter(|ip| self.slots.get(ip).is_some_and(Slot::is_managed));
        }
    }

    /// A crash can take back what was written last, also what a replica has already (MariaDB, data-safety.md): to write on
    /// would be to use its GTIDs again. So whatever lease there is, the server is not opened before the monitor has taken
    /// the role away, compared everybody, and given it anew.
    fn note_crash(&mut self, out: &mut Vec<Output>) {
        let dead = matches!(self.server.life, Life::Dead { .. });
        let concerned = self.is_active_master() || self.task.is_some() || self.opened_before || self.open;
        if self.crashed || !dead || !concerned {
            return;
        }
        self.crashed = true;
        if self.is_active_master() || self.opened_before {
            let text = "The active master's server has ended: it is not opened again before what it has is compared";
            warn(out, text.to_owned());
        }
    }

    /// Told so until the role has been taken away. With Alive or Unknown the monitor would leave it where it is.
    fn crashed_master(&self) -> bool {
        self.crashed && self.is_active_master()
    }

    /// There is an order for it, whatever it is worth by now.
    fn is_active_master(&self) -> bool {
        self.writer.and_then(|ip| self.slots.get(&ip)).is_some_and(|slot| slot.hold.is_some())
    }

    /// True if something must be on disk.
    fn done(&mut self, now: Millis, step: &Step, result: Result<(), String>, out: &mut Vec<Output>) -> bool {
        let Some(subject) = Subject::of(step) else { return false };
        self.under_way.remove(&subject);
        let was_due = std::mem::replace(&mut self.report_due, true);
        if let Err(why) = result {
            let text = format!("{}: {why}", self.describe_step(step));
            if self.failed.get(&subject).is_none_or(|(before, _)| *before != text) {
                error(out, format!("Failed, and will be tried again: {text}"));
            }
            if subject == Subject::Replication {
                self.broken_off = Some((step.clone(), now));
            }
            // What keeps an address answering cannot wait until its lease is over.
            let pause = match step {
                Step::Address { ip, .. } | Step::Allow { ip, .. } => {
                    if let Some(slot) = self.slots.get_mut(ip) {
                        slot.allowed_until = None;
                    }
                    RETRY.min(self.ttl / 10)
                }
                Step::Remove { .. }
                | Step::Probe { .. }
                | Step::Announce { .. }
                | Step::ReadOnly
                | Step::Writable { .. }
                | Step::KillServer
                | Step::Follow { .. }
                | Step::Detach
                | Step::SemiSync { .. }
                | Step::Task(_)
                | Step::Job(_) => RETRY,
            };
            self.failed.insert(subject, (text, now + pause));
            return false;
        }
        self.failed.remove(&subject);
        if subject == Subject::Replication {
            self.replicated = Some((step.clone(), now));
            self.broken_off = None;
        }
        match step {
            Step::Address { ip, lifetime_s, until } => {
                let Some(slot) = self.slots.get_mut(ip) else { return false };
                slot.kernel_until = Some(now + Duration::from_secs(u64::from(*lifetime_s)));
                slot.allowed_until = Some(*until);
                if slot.present {
                    // Only the lifetime moved: nothing to report.
                    self.report_due = was_due;
                    return false;
                }
                slot.present = true;
                info(out, format!("{} is on this host", self.named(*ip)));
                out.push(Output::Do(Step::Announce { ip: *ip }));
                false
            }
            Step::Remove { ip, .. } => {
                if let Some(slot) = self.slots.get_mut(ip) {
                    slot.gone();
                }
                info(out, format!("{} is off this host", self.named(*ip)));
                false
            }
            Step::ReadOnly => {
                // Read back by the step itself.
                self.server.writing = Writing::ReadOnly;
                self.open = false;
                self.position_old = true;
                if !self.under_way.contains(&Subject::Writable) {
                    self.opened = None;
                }
                info(out, "The server is read-only".to_owned());
                false
            }
            Step::Writable { .. } => {
                // Read back by the step itself.
                self.server.writing = Writing::Allowed;
                self.open = true;
                self.opened = self.writer;
                info(out, "The server is writable".to_owned());
                false
            }
            Step::KillServer => {
                info(out, "The server, which hung, is killed".to_owned());
                false
            }
            Step::Follow { host } => {
                info(out, format!("The server replicates from {host}"));
                // One that was under way when a drain began: the drain stops it again.
                let drains = self.task.as_ref().is_some_and(|(task, _)| is_final(&task.work));
                !drains && std::mem::take(&mut self.detached)
            }
            Step::Detach => {
                info(out, "The server fetches from nobody".to_owned());
                !std::mem::replace(&mut self.detached, true)
            }
            Step::SemiSync { side, on } => {
                if let Some(semisync) = &mut self.server.semisync {
                    // Read back by the step itself.
                    match side {
                        Side::Source => semisync.source = *on,
                        Side::Replica => semisync.replica = *on,
                    }
                }
                info(out, describe_side(*side, *on).to_owned());
                false
            }
            Step::Allow { ip, until } => {
                if let Some(slot) = self.slots.get_mut(ip) {
                    slot.allowed_until = Some(*until);
                }
                self.report_due = was_due;
                false
            }
            Step::Announce { .. } | Step::Probe { .. } | Step::Task(_) | Step::Job(_) => false,
        }
    }

    /// R6 (b): the promise is made before it is told.
    fn asked(&mut self, now: Millis, ask: AskId, from: &HostName, request: &VouchRequest, out: &mut Vec<Output>) {
        let ttl = vouch::asked_ttl(request.lease_ttl_ms, self.ttl);
        let mut answer = VouchAnswer {
            anchor: request.anchor,
            lease_ttl_ms: request.lease_ttl_ms,
            vouched: BTreeMap::new(),
            refused: BTreeMap::new(),
        };
        for (ip, epoch) in &request.addresses {
            let vouched = match (&ttl, self.slots.get_mut(ip)) {
                (Err(why), _) => Err(why.clone()),
                (_, None) => Err("it is no role address in the configuration here".to_owned()),
                // The address may be here from a life before.
                (Ok(_), Some(_)) if !self.kernel_known && stands(Safeguard::VouchNotHolding) => {
                    Err("what is on this machine is not known".to_owned())
                }
                (Ok(ttl), Some(slot)) => {
                    let has = slot.present || self.opened == Some(*ip);
                    // What is waited out is the asker's lateness.
                    let until = now + *ttl + Cluster::margin(*ttl, request.guarded);
                    slot.vouch(*epoch, has, until, now)
                }
            };
            match vouched {
                Ok(()) => {
                    self.vouched_for.insert(from.clone(), now);
                    answer.vouched.insert(*ip, *epoch);
                }
                Err(why) => {
                    answer.refused.insert(*ip, why);
                }
            }
        }
        if let Some(longer) = ttl.ok().filter(|ttl| *ttl > self.vouched_ttl && !answer.vouched.is_empty()) {
            self.vouched_ttl = longer;
            self.save(out);
        }
        out.push(Output::Vouch { ask, answer: Box::new(answer) });
    }

    /// R6 (c).
    fn vouched(&mut self, by: &HostName, answer: &VouchAnswer, out: &mut Vec<Output>) {
        // Of this life only, and asked so recently that it is still known when.
        let Some(sent) = self.sent.when(answer.anchor, self.anchor.boot) else { return };
        for (ip, epoch) in &answer.vouched {
            if let Some(slot) = self.slots.get_mut(ip) {
                slot.vouched(by, *epoch, sent, Duration::from_millis(answer.lease_ttl_ms));
            }
            self.vouch_refusals.remove(&(by.clone(), *ip));
        }
        for (ip, why) in &answer.refused {
            let before = self.vouch_refusals.insert((by.clone(), *ip), why.clone());
            // Epochs pass by all the time; a refusal matters when it lasts, and is then seen in the lease.
            if before.is_none() && self.slots.get(ip).is_some_and(|slot| slot.hold.is_some()) {
                info(out, format!("{by} does not vouch for {}: {why}", self.named(*ip)));
            }
        }
    }

    /// R6 (a).
    fn ask_if_due(&mut self, now: Millis, out: &mut Vec<Output>) {
        if !std::mem::take(&mut self.ask_due) || self.fitness(now) == Fitness::Gone || self.is_letting_go(now) {
            return;
        }
        let mut requests: BTreeMap<HostName, BTreeMap<IpAddr, Epoch>> = BTreeMap::new();
        let mut ttl = Duration::ZERO;
        for (ip, slot) in &mut self.slots {
            slot.extend_alone(now);
            let Some(held) = &slot.hold else { continue };
            ttl = ttl.max(held.ttl);
            for granter in &held.order.granters {
                requests.entry(granter.clone()).or_default().insert(*ip, held.order.epoch);
            }
        }
        if requests.is_empty() {
            return;
        }
        self.anchor.seq += 1;
        self.sent.remember(self.anchor, now);
        let lease_ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        for (to, addresses) in requests {
            let request =
                Box::new(VouchRequest { anchor: self.anchor, lease_ttl_ms, guarded: self.guarded, addresses });
            out.push(Output::Ask { to, request });
        }
    }

    fn probed(&mut self, now: Millis, ip: IpAddr, answered_by: Option<String>, out: &mut Vec<Output>) {
        let name = self.named(ip);
        let drains = matches!(&self.task, Some((Task { work: Work::Drain { .. }, .. }, _)));
        let Some(slot) = self.slots.get_mut(&ip).filter(|slot| slot.probe.is_asked()) else {
            // Asked before the address was let go: who answers now may well be the rightful one.
            return;
        };
        if slot.hold.is_none() && !drains {
            return slot.probe.ended_ahead(now, answered_by);
        }
        let before = slot.probe.conflict.clone();
        slot.probe.ended(now, answered_by);
        self.report_due |= before.is_some() != slot.probe.conflict.is_some();
        let held = slot.hold.as_ref().filter(|h| h.lease.runs(now));
        let here = slot.present;
        match (&before, &slot.probe.conflict) {
            (None, Some((mac, _))) => {
                let then = match held {
                    Some(_) if here => "it is here by an order that holds: the other has no right to it",
                    Some(held) if held.order.proof => {
                        "it is taken all the same: nobody else may have it by the monitor's orders"
                    }
                    Some(_) => "it is not taken until that ends: nothing proves that the other has no right to it",
                    None => "this host is not to have it yet",
                };
                error(out, format!("Somebody else, {mac}, answers for {name}; {then}"));
            }
            (Some((mac, since)), Some(_)) if now.since(*since) >= probe::PATIENCE && !slot.probe.alarmed => {
                slot.probe.alarmed = true;
                let seconds = now.since(*since).as_secs();
                error(
                    out,
                    format!(
                        "{mac} has been answering for {name} for {seconds} s. Find that machine and remove the address from it, or switch it off and use confirm_dead"
                    ),
                );
            }
            (Some((mac, _)), None) => info(out, format!("{mac} no longer answers for {name}")),
            (Some(_), Some(_)) | (None, None) => {}
        }
    }

    fn task_done(&mut self, id: Epoch, outcome: TaskOutcome, out: &mut Vec<Output>) {
        let Some((task, mine)) = self.task.as_mut().filter(|(task, _)| task.id == id) else { return };
        let what = describe_work(&task.work);
        match &outcome {
            TaskOutcome::Running => {}
            TaskOutcome::Done { position: Some(at) } => info(out, format!("Done, at {at}: {what}")),
            TaskOutcome::Done { position: None } => info(out, format!("Done: {what}")),
            TaskOutcome::Failed { why } => warn(out, format!("Failed: {what}: {why}")),
        }
        if matches!((&task.work, &outcome), (Work::Quiesce { .. }, TaskOutcome::Done { .. })) {
            self.open = false;
        }
        *mine = outcome;
        self.report_due = true;
    }

    /// Plans, and puts the saving of new epochs between what gives up (waits for nothing) and what takes.
    fn act(&mut self, now: Millis, persist: bool, out: &mut Vec<Output>) {
        let situation = Situation {
            now,
            guarded: self.guarded,
            slots: &self.slots,
            server: &self.server,
            fitness: self.fitness(now),
            leaving: self.is_letting_go(now),
            crashed: self.crashed_master(),
            quiescing: self.is_quiescing(now),
            replication: &self.replication,
            sources: &self.sources,
            detached: self.detached,
            broken_off: self.broken_off.as_ref().map(|(step, _)| step),
            replicated: self.replicated.as_ref().map(|(step, _)| step),
            rebuilding: self.is_rebuilding(),
            working: self.task.as_ref().is_some_and(|(_, outcome)| *outcome == TaskOutcome::Running),
            acknowledging: self.acknowledging,
            wait_for_replica: self.wait_for_replica,
            writer: self.writer,
            kills_hung: self.kills_hung,
            opened: self.opened.is_some(),
            under_way: &self.under_way,
            failed: &self.failed,
        };
        let mut steps = situation.plan();
        // What is no longer wanted is no trouble any more; what is waits for its next try.
        let wanted: BTreeSet<Subject> = steps.iter().filter_map(Subject::of).collect();
        self.failed.retain(|subject, _| wanted.contains(subject) || self.under_way.contains(subject));
        // The next look at the server shows what came of it; until then it would be done over and over.
        let just_done = self.replicated.as_ref().filter(|(_, at)| now.since(*at) < LOOKED_AT).map(|(step, _)| step);
        steps.retain(|step| Some(step) != just_done);
        steps.retain(|step| {
            Subject::of(step).is_none_or(|subject| self.failed.get(&subject).is_none_or(|(_, at)| *at <= now))
        });
        // A removal ends connections first, for up to a tenth of a second, which another lease may not have.
        let (going_on, steps): (Vec<Step>, Vec<Step>) =
            steps.into_iter().partition(|s| matches!(s, Step::Allow { .. }) && !persist);
        let (giving_up, taking): (Vec<Step>, Vec<Step>) =
            steps.into_iter().partition(|s| matches!(s, Step::Remove { .. } | Step::ReadOnly));
        self.start(going_on, out);
        self.start(giving_up, out);
        if persist {
            self.save(out);
        }
        if self.task_to_start
            && let Some((task, _)) = &self.task
            && self.may_start(task)
        {
            self.task_to_start = false;
            out.push(Output::Do(Step::Task(task.clone())));
        }
        self.start_job(out);
        self.start(taking, out);
        // For the next life. Clients wait for the address first.
        let served = self.writer.and_then(|ip| self.slots.get(&ip)).is_some_and(|slot| slot.present);
        if self.next_life_finds_it_open() && served && !self.open_on_disk {
            self.save(out);
        }
    }

    /// Unless it ends in between.
    fn next_life_finds_it_open(&self) -> bool {
        self.open && (self.is_active_master() || self.opened_before || self.crashed)
    }

    fn save(&mut self, out: &mut Vec<Output>) {
        let saved = self.saved();
        self.open_on_disk = saved.open;
        out.push(Output::Persist(saved));
    }

    /// The position at the end of a drain is taken for final: nobody may be able to add to it.
    fn may_start(&self, task: &Task) -> bool {
        let can_close = matches!(self.server.life, Life::Alive) && self.slots.values().any(Slot::is_managed);
        !is_final(&task.work) || !can_close || (self.server.writing == Writing::ReadOnly && self.opened.is_none())
    }

    /// While a quiesce task works under a running order of its own epoch, read_only is its business.
    fn is_quiescing(&self, now: Millis) -> bool {
        self.task.as_ref().is_some_and(|(task, _)| {
            matches!(task.work, Work::Quiesce { .. })
                && self.slots.values().any(|s| s.right(now).is_some_and(|held| held.order.epoch == task.id))
        })
    }

    fn start(&mut self, steps: Vec<Step>, out: &mut Vec<Output>) {
        for step in steps {
            if let Some(subject) = Subject::of(&step) {
                self.under_way.insert(subject);
            }
            match &step {
                Step::Writable { .. } => self.opened = self.writer,
                Step::Probe { ip } => {
                    if let Some(slot) = self.slots.get_mut(ip) {
                        slot.probe.begun(self.now);
                    }
                }
                Step::Address { .. }
                | Step::Allow { .. }
                | Step::Announce { .. }
                | Step::Remove { .. }
                | Step::ReadOnly
                | Step::KillServer
                | Step::Follow { .. }
                | Step::Detach
                | Step::SemiSync { .. }
                | Step::Task(_)
                | Step::Job(_) => {}
            }
            out.push(Output::Do(step));
        }
    }

    fn fitness(&self, now: Millis) -> Fitness {
        match self.server.life {
            Life::Alive => Fitness::Good,
            Life::Hung { .. } => Fitness::Gone,
            Life::Dead { .. } if self.died_at.is_some_and(|at| now.since(at) >= self.restart_grace) => Fitness::Gone,
            Life::Dead { .. } | Life::Unknown { .. } => Fitness::Unclear,
        }
    }

    /// R1: every report is preceded by a look at the kernel, after the epochs it tells are on disk.
    fn report_if_due(&mut self, now: Millis, out: &mut Vec<Output>) {
        if now >= self.next_heartbeat {
            self.next_heartbeat = now + self.heartbeat;
            self.report_due = true;
            self.ask_due = true;
            // A look that was never answered is not waited for.
            self.looking = false;
        }
        if self.report_due && !self.looking {
            self.report_due = false;
            self.looking = true;
            self.lookups += 1;
            out.push(Output::LookUp { asked: self.lookups });
        }
    }

    fn send(&mut self, now: Millis, out: &mut Vec<Output>) {
        if !self.monitor_up {
            return;
        }
        self.anchor.seq += 1;
        self.sent.remember(self.anchor, now);
        let addresses = self
            .slots
            .iter()
            .map(|(ip, slot)| {
                // R13: a release is not told before the server has been read back as closed.
                let unclear = !self.looked_at_server || matches!(self.server.life, Life::Alive);
                // A life before may have failed to close it. Who holds by an order says what it has by that order only: to
                // have it proves that nobody else does (R8).
                let let_go = slot.is_managed() && slot.hold.is_none();
                let unseen = self.writer == Some(*ip) && let_go && !self.looked_at_server;
                let open = (self.opened == Some(*ip) && unclear) || unseen;
                let promised_ms = slot.vouched_until.0.saturating_sub(now.0);
                (*ip, AddressReport { seen: slot.seen, present: slot.present, open, promised_ms })
            })
            .collect();
        out.push(Output::Send(Box::new(Report {
            anchor: self.anchor,
            addresses,
            server: self.told_server(),
            task: self.task.as_ref().map(|(task, outcome)| TaskReport { id: task.id, outcome: outcome.clone() }),
            job: self.job_report(),
            troubles: self.failed.values().map(|(text, _)| text.clone()).collect(),
            vouched: self
                .vouched_for
                .iter()
                .map(|(host, at)| (host.clone(), now.since(*at)))
                .filter(|(_, ago)| *ago < self.ttl)
                .map(|(host, ago)| (host, u64::try_from(ago.as_millis()).unwrap_or(u64::MAX)))
                .collect(),
            conflicts: self
                .slots
                .iter()
                .filter_map(|(ip, slot)| slot.probe.conflict.as_ref().map(|(mac, _)| (*ip, mac.clone())))
                .collect(),
            machine_boot: self.machine_boot.clone(),
            guarded: self.guarded,
            leaving: self.leaving_since.is_some(),
        })));
    }

    /// A position counts as final when it is told together with read_only: both have to be from one look.
    fn told_server(&self) -> ServerReport {
        let mut server = self.server.clone();
        if self.crashed_master() && matches!(server.life, Life::Alive | Life::Unknown { .. }) {
            let why = "it was started again, and is not opened before what it has is compared".to_owned();
            server.life = Life::Dead { why, restarted: true };
        }
        if self.position_old {
            server.writing = Writing::Unknown;
        }
        server
    }

    /// A shutdown that nobody helps with (any more).
    fn is_letting_go(&self, now: Millis) -> bool {
        self.leaving_since.is_some_and(|since| !self.monitor_up || now.since(since) >= HAND_OVER)
    }

    fn leave_if_done(&mut self, now: Millis, out: &mut Vec<Output>) {
        let Some(since) = self.leaving_since else { return };
        let managed = self.slots.values().any(Slot::is_managed);
        let open = self.opened.is_some()
            || (managed && self.server.writing == Writing::Allowed && matches!(self.server.life, Life::Alive));
        let off = !open && self.slots.values().all(|slot| !slot.present || !slot.is_managed());
        // The last word tells what the server has for good.
        if off && !self.looking && !self.position_old {
            info(out, "Ended: no role is left on this host".to_owned());
        } else if now.since(since) >= HAND_OVER + LEAVE_WITHIN {
            error(out, format!("Ended without having given up everything: {}", self.leftovers()));
        } else {
            return;
        }
        // The last word, so that nobody has to wait for a lease.
        self.send(now, out);
        self.save(out);
        out.push(Output::Exit);
        self.gone = true;
    }

    fn leftovers(&self) -> String {
        let mut left: Vec<String> =
            self.slots.iter().filter(|(_, slot)| slot.present).map(|(ip, _)| self.named(*ip)).collect();
        if self.opened.is_some() {
            left.push("the server may be writable".to_owned());
        }
        left.extend(self.failed.values().map(|(text, _)| text.clone()));
        left.join("; ")
    }

    fn saved(&self) -> Saved {
        Saved {
            addresses: (self.slots.iter().map(|(ip, slot)| (*ip, slot.saved())))
                .chain(self.others.iter().map(|(ip, saved)| (*ip, saved.clone())))
                .collect(),
            task: self.last_task,
            job: self.last_job,
            detached: self.detached,
            machine_boot: self.machine_boot.clone(),
            guarded: self.guarded,
            open: self.next_life_finds_it_open(),
            vouched_ttl_ms: u64::try_from(self.vouched_ttl.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// `writer(10.0.0.50)`.
    fn named(&self, ip: IpAddr) -> String {
        self.roles.get(&ip).map_or_else(|| ip.to_string(), |role| format!("{role}({ip})"))
    }

    fn describe_step(&self, step: &Step) -> String {
        match step {
            Step::Address { ip, .. } => format!("adding {}", self.named(*ip)),
            Step::Allow { ip, .. } => format!("letting {} answer", self.named(*ip)),
            Step::Announce { ip } => format!("announcing {}", self.named(*ip)),
            Step::Probe { ip } => format!("looking for somebody else with {}", self.named(*ip)),
            Step::Remove { ip, .. } => format!("removing {}", self.named(*ip)),
            Step::ReadOnly => "making the server read-only".to_owned(),
            Step::Writable { .. } => "making the server writable".to_owned(),
            Step::KillServer => "killing the server, which hangs".to_owned(),
            Step::Follow { host } => format!("replicating from {host}"),
            Step::Detach => "stopping to fetch".to_owned(),
            Step::SemiSync { side, on } => describe_side(*side, *on).to_owned(),
            Step::Task(task) => describe_work(&task.work),
            Step::Job(job) => job::describe_job(&job.work),
        }
    }
}

/// It ends with nothing being fetched any more.
fn is_final(work: &Work) -> bool {
    match work {
        Work::Drain { .. } | Work::Fetch { .. } => true,
        Work::Quiesce { .. } | Work::CatchUp { .. } => false,
    }
}

/// Whether the monitor should hear of it before the next heartbeat. Positions change with every write: they can wait.
fn is_news(before: &ServerReport, after: &ServerReport) -> bool {
    let threads = |s: &ServerReport| {
        s.replication.as_ref().map(|r| (r.source.clone(), r.port, r.io_running, r.sql_running, r.error.clone()))
    };
    let semisync =
        |s: &ServerReport| s.semisync.as_ref().map(|s| SemiSync { replicas: s.replicas.min(1), ..s.clone() });
    life_word(&before.life) != life_word(&after.life)
        || before.writing != after.writing
        || threads(before) != threads(after)
        || semisync(before) != semisync(after)
}

fn life_word(life: &Life) -> &'static str {
    match life {
        Life::Alive => "alive",
        Life::Dead { .. } => "dead",
        Life::Hung { .. } => "hung",
        Life::Unknown { .. } => "unknown",
    }
}

fn is_hold(order: &AddressOrder) -> bool {
    matches!(order, AddressOrder::Hold(_))
}

fn describe(order: &AddressOrder) -> String {
    match order {
        AddressOrder::LetGo { epoch } => format!("let go (epoch {epoch})"),
        AddressOrder::Hold(h) => {
            let write = if h.write { ", writable" } else { "" };
            let proof = if h.proof { "" } else { ", not proved free" };
            format!("hold{write} (epoch {}{proof})", h.epoch)
        }
    }
}

fn describe_work(work: &Work) -> String {
    match work {
        Work::Quiesce { grace_ms, timeout_ms } => {
            format!("close the server for writes without losing one (grace {grace_ms} ms, at most {timeout_ms} ms)")
        }
        Work::CatchUp { position, timeout_ms } => {
            format!("apply everything up to {position} (at most {timeout_ms} ms)")
        }
        Work::Drain { timeout_ms } => format!("apply everything received and fetch no more (at most {timeout_ms} ms)"),
        Work::Fetch { from, position, timeout_ms } => {
            format!("fetch and apply what {from} has, up to {position} (at most {timeout_ms} ms)")
        }
    }
}

fn describe_side(side: Side, on: bool) -> &'static str {
    match (side, on) {
        (Side::Source, true) => "commits wait for a replica's acknowledgement (semi-sync, source side on)",
        (Side::Source, false) => "commits wait for nobody (semi-sync, source side off)",
        (Side::Replica, true) => "what is received is acknowledged (semi-sync, replica side on)",
        (Side::Replica, false) => "what is received is not acknowledged (semi-sync, replica side off)",
    }
}

fn info(out: &mut Vec<Output>, text: String) {
    out.push(Output::Audit(Audit::Info(text)));
}

fn warn(out: &mut Vec<Output>, text: String) {
    out.push(Output::Audit(Audit::Warn(text)));
}

fn error(out: &mut Vec<Output>, text: String) {
    out.push(Output::Audit(Audit::Error(text)));
}

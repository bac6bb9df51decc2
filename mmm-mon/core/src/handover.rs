//! The steps of moving the active master (data-safety.md): planned, with the old master's help, and unplanned.
//!
//! Whatever step fails, there is exactly one writer afterwards, or a stated reason why there is none. This file decides
//! which step comes next; it never gives the address to anybody without the proof that only `slot.rs` can make.

use crate::gather::{Gathering, Next, lacks_unwaited, unsecured};
use crate::granters::granters_of;
use crate::io::RequestId;
use crate::losses::{Acknowledged, Ahead};
use crate::roles::{Eligible, Wish};
use crate::slot::{Blocked, Slot};
use crate::writers::Writers;
use mmm_common::config::{Cluster, OnDrainTimeout};
use mmm_common::epoch::Epoch;
use mmm_common::gtid::Gtids;
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::{Task, Work};
use mmm_common::position::Position;
use mmm_common::report::{Report, SemiSync, TaskOutcome, Writing};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// After a planned move that the monitor began by itself has failed, it is not tried again for this long.
const PAUSE: Duration = Duration::from_secs(60);
/// A drain that failed is tried again after this long, while the decision is to hold.
const DRAIN_AGAIN: Duration = Duration::from_secs(30);
/// How long past its own deadline a task's outcome is waited for.
const SLACK: Duration = Duration::from_secs(2);
/// A new writer that has not opened within this is reported as a failed move (it may still open).
const OPEN_WITHIN: Duration = Duration::from_secs(10);
/// kill_host_bin is tried again after this long, while nothing else helps.
const KILL_AGAIN: Duration = Duration::from_secs(30);
/// With --force others have this long to tell what they have.
const FORCED_WITHIN: Duration = Duration::from_secs(5);
/// "Nearly caught up": the target may be this far behind when the old master is closed.
const NEAR: Duration = Duration::from_millis(500);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Nothing is under way.
    Settled,
    /// Planned, step 1: wait until the target is nearly caught up. The old master still writes.
    Nearing { to: Eligible, since: Millis },
    /// Planned, step 2: the old master is being closed for writes.
    Quiescing { to: Eligible, task: Epoch, since: Millis },
    /// Planned, step 3: the target applies everything up to the old master's last position.
    CatchingUp { to: Eligible, task: Epoch, position: Position, since: Millis },
    /// Nobody may hold the address but the target: wait for the release, the end of the lease, or a kill.
    Fencing { to: Eligible, in_step: bool },
    /// Unplanned, step 3: the target, and every other replica, applies everything it has received.
    Draining { to: Eligible, task: Epoch, since: Millis, gather: Gathering },
    /// Unplanned, step 2: the target has applied everything; what others have is looked at.
    Gathering { to: Eligible, task: Epoch, since: Millis, position: Option<Gtids>, gather: Gathering },
    /// What only another replica has is fetched from it.
    Fetching {
        to: Eligible,
        from: HostName,
        position: Gtids,
        task: Epoch,
        drain: Epoch,
        since: Millis,
        gather: Gathering,
    },
    /// Draining or fetching failed, and nobody is promoted. It is tried again when `of` answers, and from time to time.
    Holding { to: Eligible, since: Millis, why: String, of: Option<HostName> },
    /// The target has the order; wait until it reports itself open.
    Opening { to: HostName, since: Millis },
}

#[derive(Clone, Debug)]
pub(crate) struct Handover {
    pub(crate) phase: Phase,
    /// Where the writer was when it began.
    pub(crate) from: Option<HostName>,
    began: Millis,
    why: String,
    /// Who waits for the end.
    pub(crate) request: Option<RequestId>,
    /// The operator takes the loss, with this host as the writer.
    pub(crate) force: Option<HostName>,
    kill_asked: Option<Millis>,
    pub(crate) writers: Writers,
    /// When the old master was last at work, as it looked when it was given up.
    failed_at: Option<Millis>,
    /// What the target lacks, or may lack, when it is promoted all the same.
    short_of: Option<String>,
    /// The target had applied everything of the old master's when it took over.
    in_step: bool,
    /// The order by which the old master opens again after a move that has failed.
    pub(crate) reopening: Option<Epoch>,
    /// Why the new writer has not opened for so long.
    not_open: Option<String>,
    /// When a preference moved the writer, within flap_duration: a host that comes and goes must not take it to and fro.
    pub(crate) preferred_moves: Vec<Millis>,
    /// Somebody had asked for the move that is under way.
    asked_for: bool,
    /// No planned move by the monitor's own wish before this.
    paused_until: Millis,
}

/// What the stage sees of a host.
pub(crate) struct HostView<'a> {
    pub(crate) ip: IpAddr,
    pub(crate) report: Option<&'a Report>,
    pub(crate) agent_answers: bool,
    pub(crate) server_alive: bool,
    /// Its agent was heard within lease_ttl, or a peer vouches for it: its leases may run on.
    pub(crate) may_hold: bool,
    /// Its agent was not heard within lease_ttl.
    pub(crate) silent: bool,
    /// An operator has set it offline.
    pub(crate) offline: bool,
    /// It holds the writer, is closed for a move that has failed, and does not hear that it is to open again.
    pub(crate) closed: bool,
    /// When its last report came.
    pub(crate) heard: Millis,
    /// Its agent says that its server has ended or hangs.
    pub(crate) server_gone: bool,
    /// When it last showed that it was alive.
    pub(crate) last_alive: Millis,
    /// When its I/O thread was last connected, and to where.
    pub(crate) replicating: Option<&'a (Millis, String)>,
    /// It is known to have nothing that the active master lacks, and its data are not being changed as a whole.
    pub(crate) trusted: bool,
    /// Its data are being changed as a whole.
    pub(crate) rebuilt: bool,
    /// Semi-synchronous replication, as last told while its server could be written to.
    pub(crate) semisync: Option<&'a SemiSync>,
    pub(crate) semisync_at: Millis,
    /// What it had when its commits began to wait for a replica, if they have done so ever since.
    pub(crate) waits_since: Option<&'a Gtids>,
    /// How many replicas that acknowledge were attached lately.
    pub(crate) attached: u64,
    /// What its server had executed, as last told while it could be written to.
    pub(crate) last_executed: Option<&'a Gtids>,
    /// It has said that it holds nothing by the newest decision, or that it is ending and has nothing, its server alive.
    pub(crate) let_go: bool,
    /// What it had then for good, as far as it has said that.
    pub(crate) for_good: Option<Gtids>,
    /// The most that it was ever said to have, received or executed.
    pub(crate) most: Option<Gtids>,
    /// Everything that it was ever said to have received, since the writer last moved.
    pub(crate) received_once: Option<&'a Gtids>,
    /// It is one of those that acknowledge.
    pub(crate) acknowledges: bool,
}

/// What came of one round; the caller logs it and acts on it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A line for the log: the newest epoch, and the reason.
    Decided(String),
    /// Why nothing happens at the moment. Logged when it changes, and shown.
    Waits(String),
    /// Ask kill_host_bin for this host.
    Kill(HostName),
    /// The writer is open on this host. `in_step`: it and the old one have the same data.
    Opened { from: Option<HostName>, to: HostName, in_step: bool },
    /// The writer had to be taken from this host without its help, and nobody had asked for it.
    Lost(HostName),
    /// The writer is given to `to` without the help of `from`.
    /// `ahead`: who had more, with what, and what the new master had; their numbers will be used again.
    FailedOver { from: Option<HostName>, to: HostName, acknowledged: Acknowledged, ahead: Vec<(HostName, Ahead)> },
    /// The move asked for by this request has ended.
    Answer(RequestId, Result<String, String>),
    /// The wish could not be fulfilled; an operator's wish is forgotten.
    GaveUp,
}

pub(crate) struct Scene<'a> {
    pub(crate) now: Millis,
    pub(crate) address: IpAddr,
    pub(crate) wish: &'a Wish,
    pub(crate) eligible: &'a BTreeSet<Eligible>,
    pub(crate) hosts: &'a BTreeMap<HostName, HostView<'a>>,
    pub(crate) can_kill: bool,
    /// flap_count and flap_duration.
    pub(crate) flap: (u32, Duration),
    /// Who was seen open for writes last.
    pub(crate) active: Option<&'a HostName>,
}

impl Handover {
    pub(crate) fn new(now: Millis, preferred_moves: Vec<Millis>, writers: Writers) -> Self {
        Handover {
            phase: Phase::Settled,
            from: None,
            began: now,
            why: String::new(),
            request: None,
            force: None,
            kill_asked: None,
            writers,
            failed_at: None,
            short_of: None,
            in_step: false,
            reopening: None,
            not_open: None,
            preferred_moves,
            asked_for: false,
            paused_until: now,
        }
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.phase == Phase::Settled
    }

    /// What this host has to do for the move.
    pub(crate) fn task_for(&self, host: &HostName, cluster: &Cluster) -> Option<Task> {
        let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        match &self.phase {
            Phase::Quiescing { task, .. } if self.from.as_ref() == Some(host) => Some(Task {
                id: *task,
                work: Work::Quiesce { grace_ms: ms(cluster.move_grace), timeout_ms: ms(cluster.move_timeout) },
            }),
            Phase::CatchingUp { to, task, position, .. } if to.host() == host => Some(Task {
                id: *task,
                work: Work::CatchUp { position: position.clone(), timeout_ms: ms(cluster.move_timeout) },
            }),
            Phase::Draining { to, task, gather, .. } | Phase::Gathering { to, task, gather, .. }
                if to.host() == host || gather.others.contains(host) =>
            {
                Some(Task { id: *task, work: Work::Drain { timeout_ms: ms(cluster.drain_timeout) } })
            }
            Phase::Fetching { to, from, position, task, .. } if to.host() == host => Some(Task {
                id: *task,
                work: Work::Fetch {
                    from: from.clone(),
                    position: position.clone(),
                    timeout_ms: ms(cluster.drain_timeout),
                },
            }),
            Phase::Fetching { drain, gather, .. } if gather.others.contains(host) => {
                Some(Task { id: *drain, work: Work::Drain { timeout_ms: ms(cluster.drain_timeout) } })
            }
            Phase::Settled
            | Phase::Nearing { .. }
            | Phase::Quiescing { .. }
            | Phase::CatchingUp { .. }
            | Phase::Fencing { .. }
            | Phase::Draining { .. }
            | Phase::Gathering { .. }
            | Phase::Fetching { .. }
            | Phase::Holding { .. }
            | Phase::Opening { .. } => None,
        }
    }

    /// When time alone changes something.
    pub(crate) fn deadline(&self, cluster: &Cluster) -> Option<(Millis, &'static str)> {
        match &self.phase {
            Phase::Settled => Some((self.paused_until, "a failed move may be tried again")),
            Phase::Fencing { .. } => self.kill_asked.map(|at| (at + KILL_AGAIN, "kill_host_bin is tried again")),
            Phase::Nearing { since, .. } => Some((*since + cluster.drain_timeout, "waiting to be near has its end")),
            Phase::Quiescing { since, .. } => Some((*since + quiesce_limit(cluster), "quiescing has its end")),
            Phase::CatchingUp { since, .. } => Some((*since + cluster.move_timeout + SLACK, "catching up has its end")),
            Phase::Gathering { to, since, .. } => {
                Some((*since + self.patience(to.host(), cluster), "others have had their time to tell"))
            }
            Phase::Draining { since, .. } | Phase::Fetching { since, .. } => {
                Some((*since + cluster.drain_timeout + SLACK, "draining has its end"))
            }
            Phase::Holding { since, .. } => Some((*since + DRAIN_AGAIN, "draining is tried again")),
            Phase::Opening { since, .. } => Some((*since + OPEN_WITHIN, "opening has its end")),
        }
    }

    /// Nothing new may be decided (passive mode, no network): what has closed the writer is undone.
    pub(crate) fn suspend(&mut self, turn: &mut Turn<'_>, why: &str) {
        match self.phase {
            Phase::Nearing { .. } | Phase::Quiescing { .. } | Phase::CatchingUp { .. } => self.fail(None, why, turn),
            Phase::Settled => self.undo_unfinished(turn),
            Phase::Fencing { .. }
            | Phase::Draining { .. }
            | Phase::Gathering { .. }
            | Phase::Fetching { .. }
            | Phase::Holding { .. } => {
                let text = format!("nobody has it, and it is given to nobody now: {why}");
                self.answer(Err(text.clone()), turn);
                turn.waits(text);
            }
            Phase::Opening { .. } => {}
        }
    }

    /// A monitor that restarted in the middle of a planned move: whatever comes next, the holder does not wait for it closed.
    fn undo_unfinished(&mut self, turn: &mut Turn<'_>) {
        if turn.slot.state.holder.is_some() && !turn.slot.state.write {
            self.reopening = Some(turn.rewrite(true));
            turn.decided("An unfinished move is undone: the holder writes again".to_owned());
        }
    }

    /// Goes as many steps as can be gone now.
    pub(crate) fn advance(&mut self, scene: &Scene<'_>, turn: &mut Turn<'_>) {
        // Ten phases: more rounds than that would be a circle.
        for _ in 0..12 {
            let before = (self.phase.clone(), turn.slot.state.epoch);
            self.step(scene, turn);
            // What the scene says of the active master is old once it has changed.
            let opened = turn.events.iter().any(|e| matches!(e, Event::Opened { .. }));
            if opened || before == (self.phase.clone(), turn.slot.state.epoch) {
                break;
            }
        }
    }

    fn step(&mut self, scene: &Scene<'_>, turn: &mut Turn<'_>) {
        let now = scene.now;
        self.hear_writers(scene, turn.slot);
        if let Some(why) = self.old_master_lost(scene, turn.slot) {
            // The planned way needs the old master: from here on it is fenced like any dead one.
            turn.decided(format!("The move goes on without the old master's help: {why}"));
            if let Some(from) = self.from.clone() {
                self.failed_at = scene.hosts.get(&from).map(|h| h.last_alive);
                self.lost(from, turn);
            }
            self.release(scene, turn);
            match scene.wish.host.clone() {
                Some(to) => self.phase = Phase::Fencing { to, in_step: false },
                None => self.end(Err("no host is left that could take the role".to_owned()), turn),
            }
            return;
        }
        if let Phase::Nearing { to, .. } | Phase::Quiescing { to, .. } | Phase::CatchingUp { to, .. } = &self.phase
            && scene.wish.host.as_ref() != Some(to)
        {
            let why = format!("{} can no longer take it, or is no longer wanted", to.host());
            self.fail(Some(now), &why, turn);
            return;
        }
        if let Phase::Nearing { .. } | Phase::Quiescing { .. } | Phase::CatchingUp { .. } = &self.phase
            && self.from.as_ref().and_then(|f| scene.hosts.get(f)).is_some_and(|h| !h.agent_answers)
        {
            let why = format!("the agent of {} does not answer at the moment", self.old_master());
            self.fail(Some(now), &why, turn);
            return;
        }
        match self.phase.clone() {
            Phase::Settled => self.begin(scene, turn),
            Phase::Nearing { to, since } => match far(scene, self.from.as_ref(), to.host()) {
                None => {
                    let epoch = turn.rewrite(false);
                    turn.decided(format!("{} is close enough: {} stops writing", to.host(), self.old_master()));
                    self.phase = Phase::Quiescing { to, task: epoch, since: now };
                }
                Some(why) if now.since(since) >= turn.cluster.drain_timeout => {
                    let why = format!("{} did not catch up within {:?}: {why}", to.host(), turn.cluster.drain_timeout);
                    self.fail(Some(now), &why, turn);
                }
                Some(why) => turn.waits(format!("the move to {} waits: {why}", to.host())),
            },
            Phase::Quiescing { to, task, since } => {
                let outcome = self.from.as_ref().and_then(|from| outcome_of(scene, from, task));
                match outcome {
                    Some(TaskOutcome::Done { position: Some(position) }) => {
                        let task = turn.next();
                        let old = self.old_master();
                        let limits = match position {
                            Position::Gtids(_) => String::new(),
                            Position::Log(_) => format!(
                                ". Without GTIDs only the writer moves: who replicates from {old} goes on doing so, and a failover could compare nothing"
                            ),
                        };
                        turn.decided(format!("{old} is closed at {position}: {} catches up{limits}", to.host()));
                        self.phase = Phase::CatchingUp { to, task, position: position.clone(), since: now };
                    }
                    Some(TaskOutcome::Done { position: None }) => {
                        let why = format!(
                            "{} tells no position: it needs log_bin, and should replicate by GTID",
                            self.old_master()
                        );
                        self.fail(Some(now), &why, turn);
                    }
                    Some(TaskOutcome::Failed { why }) => {
                        let why = format!("{} could not be closed for writes: {why}", self.old_master());
                        self.fail(Some(now), &why, turn);
                    }
                    Some(TaskOutcome::Running) | None if now.since(since) >= quiesce_limit(turn.cluster) => {
                        let why = format!("{} was not closed for writes in time", self.old_master());
                        self.fail(Some(now), &why, turn);
                    }
                    Some(TaskOutcome::Running) | None => {}
                }
            }
            Phase::CatchingUp { to, task, since, .. } => match outcome_of(scene, to.host(), task) {
                Some(TaskOutcome::Done { .. }) => {
                    turn.decided(format!("{} has everything: {} lets go", to.host(), self.old_master()));
                    self.failed_at = Some(now);
                    self.release(scene, turn);
                    self.phase = Phase::Fencing { to, in_step: true };
                }
                Some(TaskOutcome::Failed { why }) => {
                    let why = format!("{} did not catch up: {why}", to.host());
                    self.fail(Some(now), &why, turn);
                }
                Some(TaskOutcome::Running) | None if now.since(since) >= turn.cluster.move_timeout + SLACK => {
                    let why = format!("{} did not catch up in time", to.host());
                    self.fail(Some(now), &why, turn);
                }
                Some(TaskOutcome::Running) | None => {}
            },
            Phase::Fencing { to, in_step } => self.fence(scene, &to, in_step, turn),
            Phase::Draining { to, task, since, gather } => {
                if !scene.eligible.contains(&to) {
                    self.retarget(scene, to.host(), turn);
                    return;
                }
                match outcome_of(scene, to.host(), task) {
                    Some(TaskOutcome::Done { position }) => {
                        let position = position.as_ref().and_then(Position::gtids).cloned();
                        self.phase = Phase::Gathering { to, task, since, position, gather };
                    }
                    Some(TaskOutcome::Failed { why }) => {
                        let why = why.clone();
                        self.drain_failed(scene, to, why, turn);
                    }
                    Some(TaskOutcome::Running) | None if now.since(since) >= turn.cluster.drain_timeout + SLACK => {
                        let why = format!("nothing heard of it within {:?}", turn.cluster.drain_timeout + SLACK);
                        self.drain_failed(scene, to, why, turn);
                    }
                    Some(TaskOutcome::Running) | None => {}
                }
            }
            Phase::Gathering { to, task, since, position, gather } => {
                if !scene.eligible.contains(&to) {
                    self.retarget(scene, to.host(), turn);
                    return;
                }
                let late = now.since(since) >= self.patience(to.host(), turn.cluster);
                match gather.next(scene, &self.writers, to.host(), position.as_ref(), (task, late)) {
                    Next::Wait(text) => turn.waits(text),
                    Next::Fetch { from, position } => {
                        let id = turn.next();
                        let gather = gather.fetching(&from);
                        turn.decided(format!("{} fetches from {from} what only that has, up to {position}", to.host()));
                        self.phase = Phase::Fetching { to, from, position, task: id, drain: task, since: now, gather };
                    }
                    Next::Hold(why, of) => {
                        let forced = self.forces(to.host());
                        self.incomplete(scene, to, (why, of), forced, turn);
                    }
                    Next::Grant => match self.asks_for_told(scene, to.host(), turn) {
                        Some(why) => self.hold(now, to, (why, None), turn),
                        None => self.grant(scene, &to, turn),
                    },
                    Next::Again(back) => {
                        turn.decided(format!("{back} is back and is asked too"));
                        self.phase = Phase::Fencing { to, in_step: false };
                    }
                }
            }
            Phase::Fetching { to, from, task, drain, since, gather, .. } => {
                if !scene.eligible.contains(&to) {
                    self.retarget(scene, to.host(), turn);
                    return;
                }
                match outcome_of(scene, to.host(), task) {
                    Some(TaskOutcome::Done { position }) => {
                        let position = position.as_ref().and_then(Position::gtids).cloned();
                        self.phase = Phase::Gathering { to, task: drain, since, position, gather };
                    }
                    Some(TaskOutcome::Failed { why }) => {
                        let why = format!("what only {from} has could not be fetched: {why}");
                        let forced = self.forces(to.host());
                        self.incomplete(scene, to, (why, None), forced, turn);
                    }
                    Some(TaskOutcome::Running) | None if now.since(since) >= turn.cluster.drain_timeout + SLACK => {
                        let why = format!("what only {from} has was not fetched in time");
                        let forced = self.forces(to.host());
                        self.incomplete(scene, to, (why, None), forced, turn);
                    }
                    Some(TaskOutcome::Running) | None => {
                        turn.waits(format!("{} fetches from {from} what only that has", to.host()));
                    }
                }
            }
            Phase::Holding { to, since, why, of } => {
                let answers = |of: &HostName| scene.hosts.get(of).is_some_and(|h| h.agent_answers && h.server_alive);
                if !scene.eligible.contains(&to) {
                    self.retarget(scene, to.host(), turn);
                } else if let Some(better) = scene.wish.host.clone().filter(|w| *w != to) {
                    self.phase = Phase::Fencing { to: better, in_step: false };
                } else if self.forces(to.host())
                    || self.request.is_some()
                    || of.as_ref().is_some_and(answers)
                    || now.since(since) >= DRAIN_AGAIN
                {
                    self.asked_for |= self.request.is_some();
                    self.phase = Phase::Fencing { to, in_step: false };
                } else {
                    turn.waits(format!(
                        "{} is not promoted: {why}. move_role --force promotes it with what it has",
                        to.host()
                    ));
                }
            }
            Phase::Opening { to, since } => {
                let open = is_open(scene, &to) && seen_by(scene, &to) == Some(turn.slot.state.epoch);
                let holds = turn.slot.state.holder.as_ref() == Some(&to);
                let lost = !scene.wish.stays
                    && scene.wish.host.as_ref().is_none_or(|w| *w.host() != to)
                    && !scene.eligible.iter().any(|e| *e.host() == to);
                if !holds || (lost && !open) {
                    self.end(Err(format!("{to} was lost before it had opened")), turn);
                } else if open {
                    let took = now.since(self.began).as_millis();
                    turn.decided(format!("The writer is open on {to}, {took} ms after it was decided ({})", self.why));
                    let opened = to.clone();
                    turn.events.push(Event::Opened { from: self.from.clone(), to, in_step: self.in_step });
                    self.failed_at = None;
                    self.writers.opened();
                    if self.request.is_some() && scene.wish.host.as_ref().is_some_and(|w| *w.host() != opened) {
                        // Asked for meanwhile: from here it is a planned move.
                        self.phase = Phase::Settled;
                    } else {
                        self.end(Ok(()), turn);
                    }
                } else if let Some(other) =
                    scene.wish.host.clone().filter(|w| {
                        self.request.is_some() && *w.host() != to && has_failed_to_open(scene, &to, turn.slot)
                    })
                {
                    self.go_elsewhere(scene, &to, other, turn);
                } else if now.since(since) >= OPEN_WITHIN {
                    let troubles =
                        scene.hosts.get(&to).and_then(|h| h.report).map(|r| r.troubles.join("; ")).unwrap_or_default();
                    let text = format!("{to} has the role but has not opened yet: {troubles}");
                    self.answer(
                        Err(format!("{to} has the role but has not opened within {OPEN_WITHIN:?}: {troubles}")),
                        turn,
                    );
                    // lessons.md 3: a master that cannot be opened does not keep the role while another could have it.
                    // But one that does not say so itself may be open without our knowing.
                    match other_candidate(scene, turn.cluster, &to).filter(|_| is_closed(scene, &to, turn.slot)) {
                        Some(other) => {
                            turn.decided(text);
                            self.go_elsewhere(scene, &to, other, turn);
                        }
                        None => {
                            self.not_open = Some(text);
                            self.phase = Phase::Opening { to, since: now };
                        }
                    }
                }
                if let (Phase::Opening { .. }, Some(text)) = (&self.phase, &self.not_open) {
                    turn.waits(text.clone());
                }
            }
        }
    }

    /// The host that has the role has not opened: the role goes on. It may open before it hears of that, and is asked for
    /// what it has, like everybody else.
    fn go_elsewhere(&mut self, scene: &Scene<'_>, not_open: &HostName, other: Eligible, turn: &mut Turn<'_>) {
        turn.decided(format!("{not_open} has not opened: {} is to have the writer", other.host()));
        self.lost(not_open.clone(), turn);
        self.release(scene, turn);
        // What was forced was that host's promotion.
        (self.began, self.in_step) = (scene.now, false);
        self.force = self.force.take().filter(|forced| forced == other.host());
        // The data to be had are still those of the last one that was open.
        if self.from.as_ref().is_none_or(|from| from == other.host()) {
            self.from = Some(not_open.clone());
        }
        self.why = format!("{not_open} has not opened");
        self.phase = Phase::Fencing { to: other, in_step: false };
    }

    fn begin(&mut self, scene: &Scene<'_>, turn: &mut Turn<'_>) {
        let now = scene.now;
        let holder = turn.slot.state.holder.clone();
        self.not_open = None;
        if let Some(to) = holder.as_ref().filter(|h| scene.active != Some(h)) {
            // Given away, and nobody was here to see it open (the monitor restarted, or its agent did): it may have written.
            self.writers.find(to);
            if is_open(scene, to) && seen_by(scene, to) == Some(turn.slot.state.epoch) {
                self.from = scene.active.cloned();
                (self.began, self.in_step) = (now, false);
                self.why = "found open".to_owned();
                self.phase = Phase::Opening { to: to.clone(), since: now };
                return;
            }
        }
        self.undo_unfinished(turn);
        if scene.wish.stays {
            if let Some(request) = self.request.take() {
                let why = "the host asked for can not take the role (any more)".to_owned();
                turn.events.push(Event::Answer(request, Err(why)));
                turn.events.push(Event::GaveUp);
                self.force = None;
            }
            if let Some(to) = holder.filter(|h| scene.active != Some(h)) {
                // A monitor that restarted before it had seen the new writer open.
                self.from = scene.active.cloned();
                (self.began, self.in_step) = (now, false);
                self.why = "found after a restart of the monitor".to_owned();
                self.phase = Phase::Opening { to, since: now };
            }
            return;
        }
        self.from = holder.clone().or_else(|| scene.active.cloned());
        self.began = now;
        self.why.clone_from(&scene.wish.why);
        self.kill_asked = None;
        self.in_step = false;
        self.asked_for = self.request.is_some();
        // Others have been fetching from the active master only; who was given the writer after it has nobody.
        let writes = holder.as_ref().filter(|h| scene.active.is_none_or(|active| active == *h));
        if let Some(from) = writes.and_then(|h| scene.hosts.get(h)) {
            self.failed_at = Some(from.last_alive);
        }
        match (scene.wish.host.clone(), holder) {
            (None, None) => turn.waits(format!("nobody can have it: {}", scene.wish.why)),
            (None, Some(_)) => {
                turn.decided(format!("The writer is taken away: {}", scene.wish.why));
                self.release(scene, turn);
            }
            (Some(to), None) => self.phase = Phase::Fencing { to, in_step: false },
            (Some(to), Some(from)) if can_cooperate(scene, &from, turn.slot.state.epoch) => {
                let (count, duration) = scene.flap;
                self.preferred_moves.retain(|at| now.since(*at) < duration);
                if scene.wish.by_preference && count > 0 && self.preferred_moves.len() >= count as usize {
                    turn.waits(format!(
                        "{count} moves to preferred hosts within flap_duration are enough: it stays on {from} until move_role"
                    ));
                    return;
                }
                if now < self.paused_until && self.request.is_none() {
                    turn.waits(format!("the move to {} failed and is not tried again yet", to.host()));
                    return;
                }
                turn.decided(format!("The writer moves from {from} to {}: {}", to.host(), scene.wish.why));
                if scene.wish.by_preference {
                    self.preferred_moves.push(now);
                }
                self.phase = Phase::Nearing { to, since: now };
            }
            (Some(to), Some(from)) if self.is_waited_for(scene, &from, turn.slot.state.epoch) => {
                turn.waits(format!("the move to {} waits for the agent of {from}", to.host()));
            }
            (Some(to), Some(from)) => {
                turn.decided(format!(
                    "The writer goes from {from} to {} without its help: {}",
                    to.host(),
                    scene.wish.why
                ));
                self.lost(from, turn);
                self.release(scene, turn);
                self.phase = Phase::Fencing { to, in_step: false };
            }
        }
    }

    /// The holder cannot be asked at this moment, but is at work: only an operator moves the role away without it.
    fn is_waited_for(&self, scene: &Scene<'_>, from: &HostName, epoch: Epoch) -> bool {
        scene.hosts.get(from).is_some_and(|h| {
            let behind =
                h.report.and_then(|r| r.addresses.get(&scene.address)).is_some_and(|a| a.present && a.seen < epoch);
            let asked = self.request.is_some() || h.offline || h.closed;
            let away = !h.agent_answers && (!h.silent || !asked);
            h.may_hold && !h.server_gone && (away || (h.agent_answers && behind))
        })
    }

    /// In the planned phases: why the old master can no longer be asked.
    fn old_master_lost(&self, scene: &Scene<'_>, slot: &Slot) -> Option<String> {
        match self.phase {
            Phase::Nearing { .. } | Phase::Quiescing { .. } | Phase::CatchingUp { .. } => {
                let from = self.from.as_ref()?;
                let host = scene.hosts.get(from)?;
                if slot.state.holder.as_ref() != Some(from) {
                    Some(format!("{from} no longer holds it"))
                } else if !host.may_hold {
                    Some(format!("the agent of {from} does not answer"))
                } else if host.server_gone {
                    Some(format!("the server of {from} has ended or hangs"))
                } else {
                    None
                }
            }
            Phase::Settled
            | Phase::Fencing { .. }
            | Phase::Draining { .. }
            | Phase::Gathering { .. }
            | Phase::Fetching { .. }
            | Phase::Holding { .. }
            | Phase::Opening { .. } => None,
        }
    }

    fn fence(&mut self, scene: &Scene<'_>, to: &Eligible, in_step: bool, turn: &mut Turn<'_>) {
        if !scene.eligible.contains(to) {
            self.retarget(scene, to.host(), turn);
            return;
        }
        match turn.slot.free_for(to.host(), scene.now) {
            // It has answered meanwhile that it has the address, and hears nothing until it is given it again (R11).
            Err(Blocked::Unknown { of })
                if self.request.is_none()
                    && let Some(has) = scene.wish.host.clone().filter(|wished| *wished.host() == of) =>
            {
                turn.decided(format!("{of} has the writer already: it is to keep it"));
                self.phase = Phase::Fencing { to: has, in_step: false };
            }
            Err(blocked) => {
                let mut help = true;
                let answers = |of: &HostName| scene.hosts.get(of).is_some_and(|h| h.agent_answers);
                let (of, text) = match blocked {
                    Blocked::NoGranter { of } | Blocked::Unknown { of } if answers(&of) => {
                        let text = format!("waiting for {of} to let go");
                        (of, text)
                    }
                    Blocked::Lease { of, until } => {
                        let rest = until.since(scene.now).as_millis();
                        (of.clone(), format!("waiting for {of} to let go; its lease is over in {rest} ms at most"))
                    }
                    Blocked::NoGranter { of } => {
                        let text = format!(
                            "{of} does not answer, and its last order does not end by itself because {} was offline when it was given: bring its agent back, or switch it off and confirm_dead {of}",
                            to.host()
                        );
                        (of, text)
                    }
                    Blocked::Unknown { of } => {
                        let text = format!(
                            "{of} has not answered yet, and what it was ordered is not known here: bring its agent back, or switch it off and confirm_dead {of}"
                        );
                        // Nobody is killed because its agent was never there.
                        help = false;
                        (of, text)
                    }
                };
                turn.waits(text);
                let silent = scene.hosts.get(&of).is_some_and(|h| !h.may_hold);
                let due = self.kill_asked.is_none_or(|at| scene.now.since(at) >= KILL_AGAIN);
                if silent && help && scene.can_kill && due {
                    self.kill_asked = Some(scene.now);
                    turn.events.push(Event::Kill(of));
                }
            }
            Ok(_) if in_step => {
                self.in_step = true;
                self.grant(scene, to, turn);
            }
            // What is received is complete only once the old master cannot have been writing any more.
            Ok(_) if let Some(until) = vouched_until(scene, to.host(), turn.slot) => {
                let rest =
                    until.map_or_else(String::new, |at| format!(" in {} ms at most", at.since(scene.now).as_millis()));
                let old = self.old_master();
                turn.waits(format!("{} has vouched for {old}, whose lease is over{rest}", to.host()));
            }
            // A monitor that has lost its state finds the writer at work: there is nothing to hand over.
            Ok(_) if is_open(scene, to.host()) => self.grant(scene, to, turn),
            // Who had the writer is back before anybody else has written: nobody has more than it.
            Ok(_) if let Some(back) = self.is_back(scene, to) => {
                turn.decided(format!("{} is back and has everything: it keeps the writer", back.host()));
                self.phase = Phase::Fencing { to: back, in_step: false };
            }
            Ok(_) => {
                let writers = (self.wrote_last(scene), self.writers.given(), self.writers.earlier());
                let gather = Gathering::begin(scene, turn.cluster, to.host(), writers, self.failed_at);
                let why = gather
                    .hopeless(to.host())
                    .map(str::to_owned)
                    .or_else(|| self.asks_for_semisync(scene, to.host(), turn));
                if let Some(why) = why.filter(|_| !self.forces(to.host())) {
                    self.hold(scene.now, to.clone(), (why, None), turn);
                    return;
                }
                let others: Vec<&str> = gather.others.iter().map(HostName::as_str).collect();
                let too =
                    if others.is_empty() { String::new() } else { format!(", and so does {}", others.join(" and ")) };
                turn.decided(format!("{} applies everything it has received{too}", to.host()));
                self.phase = Phase::Draining { to: to.clone(), task: turn.next(), since: scene.now, gather };
            }
        }
    }

    /// What those say who had the writer: a move in step needs none of it.
    fn hear_writers(&mut self, scene: &Scene<'_>, slot: &Slot) {
        let needless = match self.phase {
            Phase::Settled => slot.state.holder.is_some(),
            Phase::Fencing { in_step, .. } => in_step,
            Phase::Opening { .. } => self.in_step,
            Phase::Nearing { .. }
            | Phase::Quiescing { .. }
            | Phase::CatchingUp { .. }
            | Phase::Draining { .. }
            | Phase::Gathering { .. }
            | Phase::Fetching { .. }
            | Phase::Holding { .. } => false,
        };
        if needless {
            return;
        }
        let had = [self.wrote_last(scene).cloned(), self.writers.given().cloned()].into_iter().flatten();
        let had: Vec<HostName> = had.chain(self.writers.earlier().iter().cloned()).collect();
        for host in had.into_iter().filter(|host| slot.state.holder.as_ref() != Some(host)) {
            if let Some(view) = scene.hosts.get(&host) {
                self.writers.hear(&host, view);
            }
        }
    }

    /// Whose data the successor has to have.
    fn wrote_last<'a>(&'a self, scene: &Scene<'a>) -> Option<&'a HostName> {
        scene.active.or(self.from.as_ref())
    }

    /// How long other replicas may take to tell what they have. Who has said --force waits for nobody for long.
    fn patience(&self, to: &HostName, cluster: &Cluster) -> Duration {
        let limit = cluster.drain_timeout + SLACK;
        if self.forces(to) { limit.min(FORCED_WITHIN) } else { limit }
    }

    fn is_back(&self, scene: &Scene<'_>, to: &Eligible) -> Option<Eligible> {
        let from = self.from.as_ref().filter(|_| !self.asked_for)?;
        scene.wish.host.clone().filter(|wished| wished.host() == from && wished != to)
    }

    fn forces(&self, to: &HostName) -> bool {
        self.force.as_ref() == Some(to)
    }

    /// require_semisync: an automatic failover that may lose acknowledged writes is for an operator to ask for.
    fn asks_for_semisync(&self, scene: &Scene<'_>, to: &HostName, turn: &Turn<'_>) -> Option<String> {
        let from = self.wrote_last(scene).filter(|from| *from != to)?;
        let why = unsecured(scene, from, self.failed_at, turn.cluster)?;
        (turn.cluster.require_semisync && !self.asked_for)
            .then(|| format!("require_semisync is set, and {why}: acknowledged writes of {from} may be lost"))
    }

    /// The same, once it is known what the candidate has.
    fn asks_for_told(&self, scene: &Scene<'_>, to: &HostName, turn: &Turn<'_>) -> Option<String> {
        let from = self.wrote_last(scene).filter(|from| *from != to)?;
        let why = lacks_unwaited(scene, from, to)?;
        (turn.cluster.require_semisync && !self.asked_for && !self.forces(to))
            .then(|| format!("require_semisync is set, and {why}: acknowledged writes of {from} may be lost"))
    }

    fn drain_failed(&mut self, scene: &Scene<'_>, to: Eligible, why: String, turn: &mut Turn<'_>) {
        let anyway = self.forces(to.host()) || turn.cluster.on_drain_timeout == OnDrainTimeout::Promote;
        let why = format!("it could not apply everything it has received: {why}");
        self.incomplete(scene, to, (why, None), anyway, turn);
    }

    /// The candidate lacks, or may lack, something. With whose answer that would change.
    fn incomplete(
        &mut self,
        scene: &Scene<'_>,
        to: Eligible,
        (why, of): (String, Option<HostName>),
        anyway: bool,
        turn: &mut Turn<'_>,
    ) {
        if anyway {
            let by = if self.forces(to.host()) { "the operator's --force" } else { "on_drain_timeout = promote" };
            turn.decided(format!("{} is promoted by {by}, although {why}", to.host()));
            self.short_of = Some(why);
            self.grant(scene, &to, turn);
        } else {
            self.hold(scene.now, to, (why, of), turn);
        }
    }

    fn hold(&mut self, now: Millis, to: Eligible, (why, of): (String, Option<HostName>), turn: &mut Turn<'_>) {
        let text = format!("{} is not promoted: {why}", to.host());
        self.answer(Err(text.clone()), turn);
        if !matches!(&self.phase, Phase::Holding { why: before, .. } if *before == why) {
            turn.waits(format!("{text}. move_role --force promotes it with what it has"));
        }
        self.phase = Phase::Holding { to, since: now, why, of };
    }

    fn grant(&mut self, scene: &Scene<'_>, to: &Eligible, turn: &mut Turn<'_>) {
        let Ok(proof) = turn.slot.free_for(to.host(), scene.now) else {
            self.phase = Phase::Fencing { to: to.clone(), in_step: false };
            return;
        };
        let (epoch, granters) = (turn.next(), turn.granters(to.host()));
        (self.not_open, self.reopening) = (None, None);
        turn.slot.grant(proof, epoch, granters, true);
        self.writers.give(to.host(), scene.now, self.short_of.is_some() || self.forces(to.host()));
        turn.decided(format!("The writer is given to {} ({})", to.host(), self.why));
        if !self.in_step {
            let short = self
                .short_of
                .take()
                .or_else(|| self.forces(to.host()).then(|| "it was promoted by --force".to_owned()));
            let ahead = if short.is_some() { ahead_of(scene, to.host()) } else { Vec::new() };
            let from = self.wrote_last(scene).cloned();
            let why = short.or_else(|| {
                let from = from.as_ref()?;
                let why = unsecured(scene, from, self.failed_at, turn.cluster);
                why.or_else(|| lacks_unwaited(scene, from, to.host()))
            });
            let acknowledged = why.map_or(Acknowledged::None, |why| Acknowledged::Perhaps { why });
            turn.events.push(Event::FailedOver { from, to: to.host().clone(), acknowledged, ahead });
        }
        self.phase = Phase::Opening { to: to.host().clone(), since: scene.now };
    }

    /// The target is lost while nobody holds: the next best, or none.
    fn retarget(&mut self, scene: &Scene<'_>, lost: &HostName, turn: &mut Turn<'_>) {
        match scene.wish.host.clone().filter(|_| !scene.wish.stays) {
            Some(other) => {
                turn.decided(format!("{lost} can no longer take the writer: {} is to have it", other.host()));
                self.phase = Phase::Fencing { to: other, in_step: false };
            }
            None => {
                turn.decided(format!("{lost} can no longer take the writer: {}", scene.wish.why));
                self.end(Err(format!("{lost} can no longer take it, and nobody else can")), turn);
            }
        }
    }

    fn lost(&self, host: HostName, turn: &mut Turn<'_>) {
        if !self.asked_for {
            turn.events.push(Event::Lost(host));
        }
    }

    fn release(&mut self, scene: &Scene<'_>, turn: &mut Turn<'_>) {
        if let Some(holder) = turn.slot.state.holder.clone() {
            if let Some(view) = scene.hosts.get(&holder) {
                self.writers.take(&holder, view.last_alive);
            }
            let epoch = turn.next();
            turn.slot.release(epoch);
            turn.decided(format!("{holder} is to let go of the writer"));
        }
    }

    /// Goes back: the old master writes again. `again_from`: no automatic try for a while from then.
    fn fail(&mut self, again_from: Option<Millis>, why: &str, turn: &mut Turn<'_>) {
        if turn.slot.state.holder.is_some() && !turn.slot.state.write {
            self.reopening = Some(turn.rewrite(true));
        }
        turn.decided(format!("The move of the writer has failed, {} writes on: {why}", self.old_master()));
        if let Some(now) = again_from {
            self.paused_until = now + PAUSE;
        }
        let text = format!("{why}. The writer is still on '{}'.", self.old_master());
        self.end(Err(text), turn);
    }

    fn end(&mut self, result: Result<(), String>, turn: &mut Turn<'_>) {
        if result.is_err() {
            turn.events.push(Event::GaveUp);
        }
        self.answer(result, turn);
        self.phase = Phase::Settled;
        self.force = None;
    }

    fn answer(&mut self, result: Result<(), String>, turn: &mut Turn<'_>) {
        if let Some(request) = self.request.take() {
            turn.events.push(Event::Answer(request, result.map(|()| self.old_master())));
        }
    }

    fn old_master(&self) -> String {
        self.from.as_ref().map_or_else(|| "nobody".to_owned(), |h| h.0.clone())
    }
}

/// What one call may change besides the move's own phase, and what it has to say.
pub(crate) struct Turn<'a> {
    pub(crate) cluster: &'a Cluster,
    /// Who is no granter, because it is offline.
    pub(crate) excluded: &'a BTreeSet<HostName>,
    pub(crate) slot: &'a mut Slot,
    pub(crate) epochs: &'a mut Epoch,
    pub(crate) events: Vec<Event>,
}

impl Turn<'_> {
    fn next(&mut self) -> Epoch {
        next(self.epochs)
    }

    fn decided(&mut self, text: String) {
        self.events.push(Event::Decided(text));
    }

    fn waits(&mut self, text: String) {
        self.events.push(Event::Waits(text));
    }

    /// A new decision for the same holder: whether it may write.
    fn rewrite(&mut self, write: bool) -> Epoch {
        let epoch = self.next();
        if let Some(holder) = self.slot.state.holder.clone() {
            self.slot.rewrite(epoch, self.granters(&holder), write);
        }
        epoch
    }

    fn granters(&self, holder: &HostName) -> BTreeSet<HostName> {
        self.cluster.writer().map(|role| granters_of(&role.hosts, holder, self.excluded)).unwrap_or_default()
    }
}

/// Whoever takes the address by expiry may have vouched for the one who had it. How long that is good for it tells in its
/// report, which counts once it has heard of the newer decision: from then on it vouches no more. `Some(None)`: it has not
/// heard of it yet. None: nobody has to be waited for.
fn vouched_until(scene: &Scene<'_>, to: &HostName, slot: &Slot) -> Option<Option<Millis>> {
    if slot.others_than(Some(to)).is_empty() {
        return None;
    }
    let host = scene.hosts.get(to)?;
    let Some(address) =
        host.report.and_then(|r| r.addresses.get(&scene.address)).filter(|a| a.seen >= slot.state.epoch)
    else {
        return Some(None);
    };
    let until = host.heard + Duration::from_millis(address.promised_ms);
    (scene.now < until).then_some(Some(until))
}

/// Who is known to have what the host lacks that is promoted all the same.
fn ahead_of(scene: &Scene<'_>, to: &HostName) -> Vec<(HostName, Ahead)> {
    let Some(mine) = scene.hosts.get(to).and_then(|h| h.report?.server.executed.clone()) else { return Vec::new() };
    let others = scene.hosts.iter().filter(|(name, _)| *name != to);
    others
        .filter_map(|(name, h)| {
            let having = h.most.clone().filter(|theirs| mine.missing(theirs).is_some_and(|n| n > 0))?;
            Some((name.clone(), Ahead { having, lacking: mine.clone() }))
        })
        .collect()
}

/// The newest decision that the host's agent knows of.
fn seen_by(scene: &Scene<'_>, host: &HostName) -> Option<Epoch> {
    scene.hosts.get(host)?.report?.addresses.get(&scene.address).map(|a| a.seen)
}

/// The host's agent answers, knows the newest decision, and says that it is not open.
fn is_closed(scene: &Scene<'_>, host: &HostName, slot: &Slot) -> bool {
    !is_open(scene, host)
        && scene.hosts.get(host).is_some_and(|h| h.agent_answers && seen_by(scene, host) == Some(slot.state.epoch))
}

/// It has tried in vain. Without that it may be about to open.
fn has_failed_to_open(scene: &Scene<'_>, host: &HostName, slot: &Slot) -> bool {
    let tried = scene.hosts.get(host).and_then(|h| h.report).is_some_and(|r| !r.troubles.is_empty());
    tried && is_closed(scene, host, slot)
}

/// The host has the address, and its server may be written to.
fn is_open(scene: &Scene<'_>, host: &HostName) -> bool {
    scene.hosts.get(host).and_then(|h| h.report).is_some_and(|r| {
        r.server.writing == Writing::Allowed && r.addresses.get(&scene.address).is_some_and(|a| a.present)
    })
}

pub(crate) fn next(epochs: &mut Epoch) -> Epoch {
    epochs.0 += 1;
    *epochs
}

fn quiesce_limit(cluster: &Cluster) -> Duration {
    cluster.move_grace + cluster.move_timeout + SLACK
}

pub(crate) fn outcome_of<'a>(scene: &Scene<'a>, host: &HostName, task: Epoch) -> Option<&'a TaskOutcome> {
    scene.hosts.get(host)?.report?.task.as_ref().filter(|t| t.id == task).map(|t| &t.outcome)
}

fn other_candidate(scene: &Scene<'_>, cluster: &Cluster, than: &HostName) -> Option<Eligible> {
    let hosts = &cluster.writer()?.hosts;
    scene.eligible.iter().find(|e| e.host() != than && hosts.contains(e.host())).cloned()
}

/// The holder is there, holds by the newest decision, and its server can be asked to stop writing.
fn can_cooperate(scene: &Scene<'_>, from: &HostName, epoch: Epoch) -> bool {
    scene.hosts.get(from).is_some_and(|h| {
        h.agent_answers
            && h.server_alive
            && h.report.is_some_and(|r| r.addresses.get(&scene.address).is_some_and(|a| a.present && a.seen == epoch))
    })
}

/// Why the target is not near enough to the old master; None: it is.
fn far(scene: &Scene<'_>, from: Option<&HostName>, to: &HostName) -> Option<String> {
    let from = scene.hosts.get(from?)?;
    let Some(replication) = scene.hosts.get(to).and_then(|h| h.report).and_then(|r| r.server.replication.as_ref())
    else {
        return Some("it does not replicate".to_owned());
    };
    if replication.source.parse() != Ok(from.ip) {
        return Some(format!("it replicates from '{}', not from {}", replication.source, from.ip));
    }
    if !(replication.io_running && replication.sql_running) {
        return Some(format!("its replication is not running: {}", replication.error));
    }
    match replication.behind_ms {
        Some(behind) if Duration::from_millis(behind) <= NEAR => None,
        Some(behind) => Some(format!("it is {behind} ms behind")),
        None => Some("how far it is behind is not known".to_owned()),
    }
}

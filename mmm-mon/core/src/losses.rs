//! The return of a host with transactions that the active master lacks (data-safety.md, "When the old master comes back").
//!
//! They are saved as SQL on that host at once, counted and listed. Nothing more is done to anybody's data until an
//! operator accepts the loss, or `auto_reclone` may: then they are undone, or the host is copied anew. A host never joins
//! with rows that others lack, and nothing is thrown away unsaved.

use crate::handover::next;
use crate::io::Output;
use crate::states::Compared;
use crate::{Core, decided, error, info, warn};
use mmm_common::control::Lost;
use mmm_common::gtid::Gtids;
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::{Job, JobWork};
use mmm_common::report::{Extras, JobState};
use mmm_common::state::HostState;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;

/// A server that has ended may be about to start again, with what is to be saved; after this long it is not waited for.
const DEAD: Duration = Duration::from_secs(60);
/// A failed saving is tried again after this long.
const SAVE_AGAIN: Duration = Duration::from_secs(60);

/// Whether clients were told that what only an old master has is committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "acknowledged", rename_all = "snake_case")]
pub enum Acknowledged {
    /// Semi-synchronous replication was in effect: what no replica has was acknowledged to nobody.
    None,
    /// Some or all may have been.
    Perhaps { why: String },
}

impl Acknowledged {
    fn words(&self) -> String {
        match self {
            Acknowledged::None => "unacknowledged: no client was told that they are committed".to_owned(),
            Acknowledged::Perhaps { why } => {
                format!("lost, as clients may have been told that they are committed: {why}")
            }
        }
    }
}

/// What a host had, and the new master had not, when that was promoted all the same. The new master's own transactions
/// may get the numbers of the missing ones (MariaDB): later the two look alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ahead {
    pub(crate) having: Gtids,
    pub(crate) lacking: Gtids,
}

/// What is known of, and done about, a host whose data differ from the active master's; survives a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Return {
    /// Of the last automatic failover away from this host.
    pub(crate) acknowledged: Option<Acknowledged>,
    pub(crate) extras: Option<Extras>,
    /// It is extra by this, whatever the numbers say since.
    #[serde(default)]
    pub(crate) ahead: Option<Ahead>,
    /// How many it seemed to have when they were saved: others are saved anew.
    saved_for: u64,
    /// What was saved before it was last brought back in line.
    past: Option<Extras>,
    /// The loss is accepted: by whom.
    pub(crate) accepted: Option<String>,
    /// Asked for with a source of its own, or the way to go when undoing has failed.
    reclone_from: Option<HostName>,
    /// Under way, or the last one that failed.
    job: Option<Job>,
    /// Of the job, as last told; not worth a save.
    #[serde(skip)]
    pub(crate) progress: String,
    failed: Option<(String, Millis)>,
    /// What has been done about it; the host may then come back by itself.
    pub(crate) mended: Option<String>,
}

impl Return {
    pub(crate) fn shift(&mut self, shift: impl FnMut(&mut Millis)) {
        self.failed.iter_mut().map(|(_, at)| at).for_each(shift);
    }

    /// The job to be ordered now.
    pub(crate) fn job(&self) -> Option<&Job> {
        self.job.as_ref().filter(|_| self.failed.is_none())
    }

    fn rebuilds(&self) -> bool {
        self.job().is_some_and(|job| matches!(job.work, JobWork::Undo { .. } | JobWork::Reclone { .. }))
    }

    /// What the host has is about to be replaced, is being changed, or is what a failed copy has left.
    fn is_unsettled(&self) -> bool {
        self.reclone_from.is_some() || self.job.as_ref().is_some_and(|job| !matches!(job.work, JobWork::Save { .. }))
    }

    fn unacknowledged(&self) -> bool {
        self.acknowledged == Some(Acknowledged::None)
    }
}

impl Core {
    /// The host's data are being changed as a whole: it is told nothing about replication.
    pub(crate) fn is_rebuilt(&self, name: &HostName) -> bool {
        self.returns.get(name).is_some_and(Return::rebuilds)
    }

    /// By its own will it does not come back before it has other data, or an operator has spoken.
    pub(crate) fn is_unsettled(&self, name: &HostName) -> bool {
        self.returns.get(name).is_some_and(Return::is_unsettled)
    }

    /// The writer was taken from `from` without its help and has been given to somebody who has `acknowledged` ones.
    pub(crate) fn remember_failover(&mut self, from: HostName, acknowledged: Acknowledged) {
        // What others have beyond the new master may be what `from` had acknowledged: it is counted and saved anew.
        for (_, ret) in self.returns.iter_mut().filter(|(name, _)| **name != from) {
            (ret.acknowledged, ret.saved_for) = (None, 0);
        }
        let before = self.returns.remove(&from);
        // The next successor knows no more of what was lost than the first one did.
        let known = before.as_ref().and_then(|ret| ret.acknowledged.clone());
        let acknowledged = known.filter(|before| *before != Acknowledged::None).unwrap_or(acknowledged);
        let past = before.and_then(|ret| ret.extras.or(ret.past));
        self.returns.insert(from, Return { acknowledged: Some(acknowledged), past, ..Return::default() });
    }

    /// The host had more than the new master when that was promoted.
    pub(crate) fn remember_ahead(&mut self, name: HostName, ahead: Ahead) {
        self.returns.entry(name).or_default().ahead = Some(ahead);
    }

    /// Takes in what agents say of their jobs, and begins what is due.
    pub(crate) fn mend(&mut self, now: Millis, out: &mut Vec<Output>) {
        let names: Vec<HostName> = self.hosts.keys().cloned().collect();
        for name in &names {
            self.hear_of_job(now, name, out);
        }
        if self.is_held_back() || !self.handover.is_settled() {
            return;
        }
        for name in &names {
            self.begin_what_is_due(now, name, out);
        }
    }

    fn hear_of_job(&mut self, now: Millis, name: &HostName, out: &mut Vec<Output>) {
        let Some(host) = self.hosts.get_mut(name) else { return };
        let Some(ret) = self.returns.get_mut(name) else { return };
        if host.compared == Compared::Subset && self.active.as_ref() != Some(name) && !ret.rebuilds() {
            // Whatever it had is no longer extra. What was saved stays listed, and so does a copy that failed.
            (ret.accepted, ret.acknowledged) = (None, None);
            if ret.job.as_ref().is_some_and(|job| matches!(job.work, JobWork::Save { .. })) {
                (ret.job, ret.failed) = (None, None);
            }
        }
        let Some(job) = ret.job().cloned() else { return };
        let told = host.facts.fresh_report().and_then(|r| r.job.as_ref());
        let Some(told) = told.filter(|told| told.id == job.id) else { return };
        match &told.state {
            JobState::Running { step } => ret.progress.clone_from(step),
            JobState::Done { extras } => {
                ret.job = None;
                match &job.work {
                    JobWork::Save { .. } => {
                        if let Some(extras) = extras {
                            let (n, path) = (extras.transactions, &extras.saved);
                            let class = ret.acknowledged.as_ref().map_or_else(unknown, Acknowledged::words);
                            let text = format!(
                                "{n} transactions of {name} that others lack are saved there in {path}: {class}"
                            );
                            warn(out, Some(name), text);
                        }
                        ret.extras.clone_from(extras);
                    }
                    JobWork::Undo { .. } => {
                        ret.mended = Some("what others lack was saved and undone".to_owned());
                        info(out, Some(name), format!("What others lack is undone on {name}: it is compared again"));
                    }
                    JobWork::Reclone { from } => {
                        ret.mended = Some(format!("it was copied anew from {from}"));
                        info(out, Some(name), format!("{name} has the data of {from}: it is compared again"));
                    }
                }
                if !matches!(job.work, JobWork::Save { .. }) {
                    (ret.accepted, ret.reclone_from, ret.ahead) = (None, None, None);
                    (host.compared, host.sample, host.extra) = (Compared::Open, None, None);
                    host.facts.received_once = None;
                }
            }
            JobState::Failed { why } => {
                let why = why.clone();
                match &job.work {
                    JobWork::Undo { .. } => {
                        // Nothing was changed: the long way is left.
                        warn(out, Some(name), format!("{name} cannot be undone and is copied anew instead: {why}"));
                        (ret.job, ret.reclone_from) = (None, self.active.clone());
                    }
                    JobWork::Save { .. } | JobWork::Reclone { .. } => {
                        error(out, Some(name), format!("Failed: {}: {why}", describe(&job.work)));
                        ret.failed = Some((format!("{}: {why}", describe(&job.work)), now));
                    }
                }
            }
        }
    }

    fn begin_what_is_due(&mut self, now: Millis, name: &HostName, out: &mut Vec<Output>) {
        let Some(host) = self.hosts.get(name) else { return };
        let extra = matches!(host.compared, Compared::Extra(_));
        let lacks = matches!(host.compared, Compared::Lacks(_));
        if lacks {
            self.returns.entry(name.clone()).or_default();
        }
        if let Compared::Extra(n) = host.compared {
            let ret = self.returns.entry(name.clone()).or_default();
            if ret.saved_for != n && ret.job.is_none() {
                (ret.saved_for, ret.extras) = (n, None);
            }
        }
        let active = self.active.clone().filter(|active| active != name && self.writer_holder() == Some(active));
        let compared = host.extra.clone().filter(|_| active.is_some());
        let Some(ret) = self.returns.get(name) else { return };
        let again = match &ret.failed {
            // Reclone is for an operator to ask for again.
            Some((_, at)) => {
                matches!(ret.job.as_ref().map(|j| &j.work), Some(JobWork::Save { .. })) && now.since(*at) >= SAVE_AGAIN
            }
            None => ret.job.is_none(),
        };
        if !again || !self.agent_stays(now, name) || self.holds_anything(name) {
            return;
        }
        let accepted = ret.accepted.is_some()
            || (self.config.cluster.auto_reclone && ret.unacknowledged() && ret.mended.is_none());
        let work = if extra && ret.extras.is_none() {
            compared.map(|(having, lacking)| JobWork::Save { having, lacking })
        } else if let Some(from) = &ret.reclone_from {
            Some(JobWork::Reclone { from: from.clone() })
        } else if extra && ret.accepted.is_some() {
            compared.map(|(having, lacking)| JobWork::Undo { having, lacking })
        } else if (extra && accepted) || (lacks && self.config.cluster.auto_reclone) {
            active.map(|from| JobWork::Reclone { from })
        } else {
            None
        };
        let Some(work) = work else { return };
        if !matches!(work, JobWork::Save { .. }) {
            let away = match host.status.state {
                HostState::AdminOffline | HostState::HardOffline | HostState::AwaitingRecovery => true,
                HostState::Online | HostState::ReplicationDelay | HostState::ReplicationFail => false,
            };
            let may_act = self.slots.values().any(|s| s.others_than(None).contains(name));
            // What a server has is compared, and saved if others lack it, before it is thrown away; unless it is surely dead.
            let unseen = host.compared == Compared::Open && !host.facts.is_dead_for(now, DEAD);
            if !away || may_act || unseen {
                return;
            }
        }
        if let JobWork::Reclone { from } = &work
            && let Some(why) = self.unfit_source(now, from)
        {
            // The active master's trouble passes, or there will be another one.
            if self.active.as_ref() != Some(from) {
                let text = format!("{}: {why}", describe(&work));
                error(out, Some(name), format!("Failed: {text}"));
                if let Some(ret) = self.returns.get_mut(name) {
                    (ret.failed, ret.reclone_from) = (Some((text, now)), None);
                }
            }
            return;
        }
        let id = next(&mut self.epoch);
        let text = format!("{name} is to {}", describe(&work));
        decided(out, Some(name), id, text);
        if let Some(ret) = self.returns.get_mut(name) {
            ret.job = Some(Job { id, work });
            ret.failed = None;
            ret.progress = "not begun yet".to_owned();
        }
    }

    pub(crate) fn holds_anything(&self, name: &HostName) -> bool {
        self.slots.values().any(|s| s.state.holder.as_ref() == Some(name))
    }

    /// Numbers of transactions can have gaps: what was saved is counted.
    pub(crate) fn saved_count(&self, name: &HostName) -> Option<u64> {
        Some(self.returns.get(name)?.extras.as_ref()?.transactions)
    }

    /// An operator accepts that what the host has and others lack is discarded, after saving it.
    pub(crate) fn accept_lost(&mut self, name: &HostName, who: &str) {
        if let Some(host) = self.hosts.get_mut(name) {
            host.status.flapping_since = None;
        }
        let ret = self.returns.entry(name.clone()).or_default();
        ret.accepted = Some(who.to_owned());
        if ret.failed.take().is_some() {
            ret.job = None;
        }
    }

    /// The host's data are to be replaced by those of `from`, after saving what others lack.
    pub(crate) fn ask_for_reclone(&mut self, name: &HostName, from: &HostName, who: &str) {
        self.accept_lost(name, who);
        if let Some(ret) = self.returns.get_mut(name) {
            (ret.reclone_from, ret.mended) = (Some(from.clone()), None);
        }
    }

    /// It is ONLINE again: there is nothing left to tell but what was saved.
    pub(crate) fn is_back(&mut self, name: &HostName) {
        if let Some(ret) = self.returns.get_mut(name) {
            let past = ret.extras.take().or(ret.past.take());
            if past.is_none() {
                self.returns.remove(name);
            } else {
                *ret = Return { past, ..Return::default() };
            }
        }
    }

    pub(crate) fn mended(&self, name: &HostName) -> Option<String> {
        self.returns.get(name)?.mended.clone()
    }

    /// When time alone begins something.
    pub(crate) fn mend_deadlines(&self) -> impl Iterator<Item = (Millis, &'static str)> {
        let failed = self.returns.values().filter_map(|r| r.failed.as_ref());
        let dead =
            self.hosts.iter().filter(|(name, _)| self.is_unsettled(name)).filter_map(|(_, h)| h.facts.gone.as_ref());
        failed
            .map(|(_, at)| (*at + SAVE_AGAIN, "a failed saving is tried again"))
            .chain(dead.map(|(at, _)| (*at + DEAD, "a server is surely dead")))
    }

    /// For `show`.
    pub(crate) fn losses(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (name, host) in &self.hosts {
            let ret = self.returns.get(name);
            if let (Compared::Extra(n), Some(active)) = (host.compared, &self.active) {
                let n = self.saved_count(name).unwrap_or(n);
                let class = ret.and_then(|r| r.acknowledged.as_ref()).map_or_else(unknown, Acknowledged::words);
                lines.push(format!(
                    "Warning: host {name} has {n} transactions that the active master {active} lacks ({class}). Look at 'lost {name}'"
                ));
            }
            if let (Compared::Lacks(n), Some(active)) = (host.compared, &self.active) {
                lines.push(format!(
                    "Warning: host {name} lacks {n} transactions of the active master {active} and has gone past them. Use reclone {name} --from {active}"
                ));
            }
            let server = host.facts.report.as_ref().map(|r| &r.server).filter(|s| s.executed.is_none());
            let unclear = server.and_then(|s| s.replication.as_ref()).filter(|r| !r.error.is_empty());
            if let Some(replication) = unclear.filter(|_| host.status.state == HostState::AwaitingRecovery) {
                lines.push(format!(
                    "Warning: host {name} cannot be compared with the active master: {}",
                    replication.error
                ));
            }
            let Some(ret) = ret else { continue };
            if let Some((why, _)) = &ret.failed {
                lines.push(format!("Warning: host {name}: failed: {why}"));
            } else if let Some(job) = ret.job() {
                lines.push(format!("Host {name} is to {}: {}", describe(&job.work), ret.progress));
            } else if let Some(from) = &ret.reclone_from {
                lines.push(format!(
                    "Host {name} is to throw its data away and copy those of {from}: waiting until what it has is known, or its server has been dead for {} s, and {from} is ONLINE",
                    DEAD.as_secs()
                ));
            }
        }
        lines
    }

    /// For `lost`.
    pub(crate) fn lost(&self, name: &HostName) -> Lost {
        let host = self.hosts.get(name);
        let ret = self.returns.get(name);
        let now_extra = match host.map(|h| h.compared) {
            Some(Compared::Extra(n)) => Some(n),
            Some(Compared::Needless | Compared::Open | Compared::Lacks(_) | Compared::Subset) | None => None,
        };
        let extras = ret.and_then(|r| r.extras.as_ref().or(r.past.as_ref().filter(|_| now_extra.is_none())));
        let state = match (now_extra, extras) {
            (Some(n), e) => {
                let n = e.map_or(n, |e| e.transactions);
                format!("{n} transactions are on {name} and not on the active master")
            }
            (None, Some(e)) => {
                format!("{} transactions were saved before {name} was brought back in line", e.transactions)
            }
            (None, None) => format!("nothing is known of transactions that only {name} has"),
        };
        let class = ret.and_then(|r| r.acknowledged.as_ref()).filter(|_| now_extra.is_some()).map(Acknowledged::words);
        let cure = now_extra.map(|_| match ret.and_then(Return::job) {
            Some(job) => format!("under way: {}", describe(&job.work)),
            None => format!(
                "to discard them and bring the host back: set_online --accept-lost {name}; to copy all data anew: reclone {name} --from HOST"
            ),
        });
        Lost {
            host: name.clone(),
            transactions: extras.map(|e| e.transactions).or(now_extra).unwrap_or(0),
            state,
            acknowledged: class,
            saved: extras.map(|e| e.saved.clone()),
            gtids: extras.map(|e| e.gtids.to_string()),
            list: extras.map(|e| e.list.clone()).unwrap_or_default(),
            cure,
        }
    }

    /// Hosts that are no longer in the configuration are forgotten.
    pub(crate) fn forget_returns(&mut self) {
        let names: BTreeSet<HostName> = self.hosts.keys().cloned().collect();
        self.returns.retain(|name, _| names.contains(name));
    }

    /// Why `name` may not be copied anew from `from`.
    pub(crate) fn refuses_reclone(&self, now: Millis, name: &HostName, from: &HostName) -> Option<String> {
        if name == from {
            return Some(format!("'{name}' cannot be copied from itself."));
        }
        if self.is_rebuilt(name) {
            return Some(format!("The data of '{name}' are being changed already. Look at 'show' for how far it is."));
        }
        let state = self.hosts.get(name)?.status.state;
        if matches!(state, HostState::Online | HostState::ReplicationDelay | HostState::ReplicationFail) {
            return Some(format!(
                "Host '{name}' is {state}: its data would be thrown away. Use set_offline {name} first."
            ));
        }
        if self.holds_anything(name) {
            return Some(format!("Host '{name}' still has a role. Wait until it has let go, then try again."));
        }
        if !self.agent_stays(now, name) {
            return Some(format!("Can't reach agent daemon on '{name}'! ({})", self.hosts.get(name)?.facts.link_down));
        }
        self.unfit_source(now, from)
    }

    /// Why nobody may be copied from this host.
    fn unfit_source(&self, now: Millis, from: &HostName) -> Option<String> {
        let Some(source) = self.hosts.get(from) else {
            return Some(format!("Host '{from}' is not in the configuration."));
        };
        let current = self.active.as_ref() == Some(from) || source.compared == Compared::Subset;
        if source.status.state != HostState::Online || !current {
            return Some(format!(
                "Host '{from}' is {} and is no source: it has to be ONLINE and in line with the active master.",
                source.status.state
            ));
        }
        (!self.agent_stays(now, from) || !source.facts.server_alive())
            .then(|| format!("Can't reach agent daemon and server on '{from}'! ({})", source.facts.link_down))
    }
}

fn unknown() -> String {
    "whether clients were told that they are committed is not known".to_owned()
}

fn describe(work: &JobWork) -> String {
    match work {
        JobWork::Save { .. } => "save the transactions that others lack".to_owned(),
        JobWork::Undo { .. } => "undo the transactions that others lack".to_owned(),
        JobWork::Reclone { from } => format!("throw its data away and copy those of {from}"),
    }
}

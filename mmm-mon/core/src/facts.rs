//! Stage 1: check results and reports become facts about a host.
//!
//! A check counts as failed only when it has not succeeded for `trap_period`; a death or hang that the host's own
//! agent has seen counts at once. Results that are too old count as unknown, and the unknown moves nothing.

use mmm_common::config::{Check as CheckConfig, Cluster, Monitor as Config};
use mmm_common::epoch::{Anchor, Boot, Epoch};
use mmm_common::gtid::Gtids;
use mmm_common::ids::{HostName, Millis};
use mmm_common::report::{JobState, Life, Report, SemiSync, Writing};
use mmm_common::state::{CheckKind, CheckResult};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

/// A replica that has gone may be the only one that acknowledged what was written before; after this long the others have
/// received that too.
const ATTACHED_FOR: Duration = Duration::from_secs(60);

/// What a check says, all periods considered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Good,
    Bad,
    Unknown,
}

#[derive(Clone, Debug)]
pub(crate) struct CheckFact {
    pub(crate) result: CheckResult,
    /// None: no result yet in this life of the monitor.
    at: Option<Millis>,
    /// The last success, or when watching began.
    last_good: Millis,
    pub(crate) verdict: Verdict,
    pub(crate) changed: Millis,
}

#[derive(Clone, Debug)]
pub(crate) struct AgentLink {
    pub(crate) boot: Boot,
    /// The newest report of this connection; orders answer it.
    pub(crate) anchor: Option<Anchor>,
}

/// What is known of one host.
#[derive(Clone, Debug)]
pub(crate) struct HostFacts {
    pub(crate) checks: BTreeMap<CheckKind, CheckFact>,
    pub(crate) link: Option<AgentLink>,
    /// Why there is no link.
    pub(crate) link_down: String,
    pub(crate) report: Option<Box<Report>>,
    /// When the last report came, or when watching began.
    pub(crate) heard: Millis,
    /// The agent's certain findings: since when its server is dead or hung, with the reason.
    pub(crate) gone: Option<(Millis, String)>,
    /// How long before that it had answered for the last time.
    silent_before: Duration,
    /// When a report last said that the I/O thread is connected, and to which address.
    pub(crate) replicating: Option<(Millis, String)>,
    /// Semi-synchronous replication, as last told while its server could be written to, and when that was.
    pub(crate) semisync: Option<SemiSync>,
    pub(crate) semisync_at: Millis,
    /// When each peer vouched for it last: with all of them it writes on, whether or not the monitor hears of it.
    pub(crate) vouched: BTreeMap<HostName, Millis>,
    /// How many replicas that acknowledge were attached at most within `ATTACHED_FOR`, and when there were so many last.
    pub(crate) attached: (u64, Millis),
    /// Its commits have waited for a replica without interruption since then.
    waits: Waits,
    /// Everything that it was ever said to have received, since the writer last moved: a relay log can be thrown away by a
    /// START in the wrong order, and nobody tells.
    pub(crate) received_once: Option<Gtids>,
    /// What its server had executed, as last told while it could be written to.
    pub(crate) last_executed: Option<Gtids>,
}

/// Whether the commits of a host that can be written to wait for a replica.
#[derive(Clone, Debug, Default)]
enum Waits {
    #[default]
    Not,
    /// And what it had, once that is known.
    Since(Option<Gtids>),
}

impl HostFacts {
    pub(crate) fn new(now: Millis) -> Self {
        let unknown = CheckFact {
            result: CheckResult::Unknown("not checked yet".to_owned()),
            at: None,
            last_good: now,
            verdict: Verdict::Unknown,
            changed: now,
        };
        HostFacts {
            checks: CheckKind::ALL.iter().map(|kind| (*kind, unknown.clone())).collect(),
            link: None,
            link_down: "not connected yet".to_owned(),
            report: None,
            heard: now,
            gone: None,
            silent_before: Duration::ZERO,
            replicating: None,
            semisync: None,
            semisync_at: now,
            vouched: BTreeMap::new(),
            attached: (0, now),
            waits: Waits::Not,
            received_once: None,
            last_executed: None,
        }
    }

    pub(crate) fn check(&self, kind: CheckKind) -> Verdict {
        self.checks.get(&kind).map_or(Verdict::Unknown, |c| c.verdict)
    }

    pub(crate) fn checked(&mut self, now: Millis, kind: CheckKind, result: CheckResult) {
        let Some(fact) = self.checks.get_mut(&kind) else { return };
        fact.at = Some(now);
        if result.is_ok() {
            fact.last_good = now;
        }
        fact.result = result;
    }

    pub(crate) fn reported(&mut self, now: Millis, report: Box<Report>) {
        self.heard = now;
        if let Some(link) = &mut self.link {
            // On an earlier connection something may have been said that did not arrive.
            if link.anchor.replace(report.anchor).is_none() {
                self.waits = Waits::Not;
            }
        }
        match &report.server.life {
            Life::Alive | Life::Unknown { .. } => self.gone = None,
            Life::Dead { why, restarted: _ } => {
                if self.gone.is_none() {
                    self.silent_before = Duration::ZERO;
                }
                self.gone.get_or_insert((now, format!("its agent says that the server has ended: {why}")));
            }
            Life::Hung { for_ms } => {
                if self.gone.is_none() {
                    self.silent_before = Duration::from_millis(*for_ms);
                }
                self.gone
                    .get_or_insert((now, format!("its agent says that the server has not answered for {for_ms} ms")));
            }
        }
        // What it says after a restart, or as a replica, tells nothing of when it was written to.
        if report.server.life == Life::Alive && report.server.writing == Writing::Allowed {
            self.semisync.clone_from(&report.server.semisync);
            if let Some(semisync) = &self.semisync {
                self.semisync_at = now;
                if semisync.replicas >= self.attached.0 || now.since(self.attached.1) >= ATTACHED_FOR {
                    self.attached = (semisync.replicas, now);
                }
            }
            self.last_executed.clone_from(&report.server.executed);
            let wait = report.server.semisync.as_ref().is_some_and(SemiSync::is_acknowledged);
            self.waits = match std::mem::take(&mut self.waits) {
                _ if !wait => Waits::Not,
                // The position was read a moment before it was seen that commits wait.
                Waits::Not => Waits::Since(None),
                Waits::Since(None) => Waits::Since(report.server.executed.clone()),
                since @ Waits::Since(Some(_)) => since,
            };
        } else if report.server.life == Life::Alive {
            self.waits = Waits::Not;
        }
        // While it does not fetch, MariaDB's word may be of before its data were undone or copied anew (tried).
        let fetching = report.server.replication.as_ref().filter(|r| r.io_running);
        if let Some(received) = fetching.and_then(|r| r.received.as_ref()) {
            let all = self.received_once.take().map_or_else(|| received.clone(), |all| all.union(received));
            self.received_once = Some(all);
        }
        if let Some(r) = report.server.replication.as_ref().filter(|r| r.io_running) {
            self.replicating = Some((now, r.source.clone()));
        }
        self.report = Some(report);
    }

    /// Its commits are not to wait for anybody.
    pub(crate) fn waits_for_nobody(&mut self) {
        self.waits = Waits::Not;
    }

    /// What it had when its commits began to wait for a replica, as far as they have done so ever since: with that, and with
    /// what a replica has that acknowledges, comes everything that clients were told of. None: it is not known.
    pub(crate) fn waits_since(&self) -> Option<&Gtids> {
        match &self.waits {
            Waits::Since(had) => had.as_ref(),
            Waits::Not => None,
        }
    }

    /// Failed checks say nothing now: a peer sees the host at work while the monitor cannot reach it (lessons.md 18), or the
    /// monitor itself was stopped or is cut off. They count again from here: the host fails only after another trap_period.
    pub(crate) fn excuse(&mut self, now: Millis) {
        for kind in [CheckKind::Ping, CheckKind::Mysql] {
            if let Some(fact) = self.checks.get_mut(&kind).filter(|fact| fact.verdict == Verdict::Good) {
                fact.last_good = now;
            }
        }
    }

    /// It is no longer the active master, which may have been told not to fetch: its replication checks have a trap_period
    /// to get well.
    pub(crate) fn excuse_replication(&mut self, now: Millis) {
        for kind in [CheckKind::RepThreads, CheckKind::RepBacklog] {
            if let Some(fact) = self.checks.get_mut(&kind).filter(|fact| !fact.result.is_ok()) {
                fact.last_good = now;
                if fact.verdict == Verdict::Bad {
                    fact.verdict = Verdict::Unknown;
                }
            }
        }
    }

    /// Turns results into verdicts. Call after every input, whatever it was: time alone changes verdicts.
    pub(crate) fn judge(&mut self, now: Millis, config: &Config) {
        let gone = self.gone.as_ref().filter(|(at, _)| now.since(*at) >= self.grace(config)).cloned();
        for (kind, fact) in &mut self.checks {
            let Some(limits) = config.checks.get(kind) else { continue };
            let mut verdict = fact.judged(now, limits);
            if *kind == CheckKind::Mysql
                && let Some((since, _)) = &gone
            {
                verdict = Verdict::Bad;
                // Only a success after the certain end counts again.
                fact.last_good = fact.last_good.min(*since);
            }
            if fact.verdict != verdict {
                if (fact.verdict == Verdict::Good) != (verdict == Verdict::Good) {
                    fact.changed = now;
                }
                fact.verdict = verdict;
            }
        }
    }

    /// `restart_grace` is for servers that have ended, and over when they are back; a hang has had its `hang_timeout`.
    fn grace(&self, config: &Config) -> Duration {
        match self.report.as_ref().map(|r| &r.server.life) {
            Some(Life::Dead { restarted: false, .. }) => config.cluster.restart_grace,
            Some(Life::Dead { restarted: true, .. } | Life::Hung { .. } | Life::Alive | Life::Unknown { .. })
            | None => Duration::ZERO,
        }
    }

    /// Its agent says so now, and not on a connection that has ended.
    pub(crate) fn sql_error(&self) -> Option<&str> {
        self.link.as_ref()?.anchor?;
        let server = &self.report.as_ref()?.server;
        server.replication.as_ref().filter(|_| server.life == Life::Alive)?.sql_error()
    }

    /// Its agent, with another configuration than the monitor, would take leases that the kernel alone cannot end in time.
    pub(crate) fn lacks_guard(&self, cluster: &Cluster) -> bool {
        cluster.lease_ttl < Cluster::SHORTEST_UNGUARDED_TTL && self.report.as_ref().is_some_and(|r| !r.guarded)
    }

    /// Its server has ended and runs again, and its agent keeps it closed.
    pub(crate) fn restarted(&self) -> bool {
        self.report.as_ref().is_some_and(|r| matches!(r.server.life, Life::Dead { restarted: true, .. }))
    }

    /// When the host's server last showed that it was alive, or may have written on: with the vouches of everybody in
    /// one of `extending`.
    pub(crate) fn last_alive(&self, extending: &[BTreeSet<HostName>]) -> Millis {
        if let Some((at, _)) = &self.gone {
            return *at - self.silent_before;
        }
        let all = |granters: &BTreeSet<HostName>| granters.iter().map(|g| self.vouched.get(g).copied()).min().flatten();
        extending.iter().filter_map(all).max().map_or(self.heard, |at| at.max(self.heard))
    }

    /// Its agent is there to say that the server has ended, that long ago.
    pub(crate) fn is_dead_for(&self, now: Millis, long: Duration) -> bool {
        let dead = self.report.as_ref().is_some_and(|r| matches!(r.server.life, Life::Dead { .. }));
        self.link.is_some() && dead && self.gone.as_ref().is_some_and(|(at, _)| now.since(*at) >= long)
    }

    /// The agent is connected and has reported within `limit`.
    pub(crate) fn agent_answers(&self, now: Millis, limit: Duration) -> bool {
        self.link.as_ref().is_some_and(|l| l.anchor.is_some()) && now.since(self.heard) < limit
    }

    /// What the agent says on its present connection. What it said on an earlier one may have been overtaken.
    pub(crate) fn fresh_report(&self) -> Option<&Report> {
        self.report.as_deref().filter(|_| self.link.as_ref().is_some_and(|l| l.anchor.is_some()))
    }

    /// Its agent is at long work on its data, whether or not this monitor knows of that.
    pub(crate) fn is_at_a_job(&self) -> bool {
        let job = self.fresh_report().and_then(|r| r.job.as_ref());
        job.is_some_and(|job| matches!(job.state, JobState::Running { .. }))
    }

    /// The agent's last word is that the server answers it, and the agent is still there to say otherwise.
    pub(crate) fn server_alive(&self) -> bool {
        self.fresh_report().is_some_and(|r| matches!(r.server.life, Life::Alive))
    }

    /// The newest look at it succeeded. A replica of a server that may be dying is not to blame: its own checks can
    /// fail a moment earlier than its master's, and the only candidate would be lost.
    pub(crate) fn serves(&self) -> bool {
        self.gone.is_none()
            && self.check(CheckKind::Mysql) == Verdict::Good
            && self.checks.get(&CheckKind::Mysql).is_some_and(|c| c.result.is_ok())
    }

    /// What it has executed, once nothing but replication can add to it: read_only waits for commits under way, so a
    /// position read with it on has everything that clients had written (a hung server that wakes goes on with them).
    /// What it has received counts too: that will be applied.
    pub(crate) fn has_for_good(&self) -> Option<Gtids> {
        let server = self.report.as_ref().map(|r| &r.server).filter(|s| s.writing == Writing::ReadOnly)?;
        let executed = server.executed.clone()?;
        let received = server.replication.as_ref().and_then(|r| r.received.as_ref());
        Some(match received {
            Some(received) => executed.union(received),
            None => executed,
        })
    }

    /// The most that it was last said to have, received, executed, or executed while it could be written to.
    pub(crate) fn has_at_most(&self) -> Option<Gtids> {
        let server = self.report.as_ref().map(|r| &r.server)?;
        let received = server.replication.as_ref().and_then(|r| r.received.as_ref());
        let all = [server.executed.as_ref(), received, self.last_executed.as_ref()];
        all.into_iter()
            .flatten()
            .fold(None, |all: Option<Gtids>, one| Some(all.map_or_else(|| one.clone(), |all| all.union(one))))
    }

    /// The last that was heard of it, however long ago: its server lives, and it holds nothing by this decision, or has
    /// let go of everything because its agent ends.
    pub(crate) fn has_let_go(&self, ip: IpAddr, epoch: Epoch) -> bool {
        self.report.as_ref().is_some_and(|r| {
            let let_go = r.addresses.get(&ip).is_some_and(|a| !a.has() && (a.seen >= epoch || r.leaving));
            r.server.life == Life::Alive && let_go
        })
    }

    pub(crate) fn executed(&self) -> Option<&Gtids> {
        self.report.as_ref()?.server.executed.as_ref()
    }

    /// When a verdict may change by time alone.
    pub(crate) fn deadlines<'a>(&'a self, config: &'a Config) -> impl Iterator<Item = (Millis, &'static str)> + 'a {
        let traps = self.checks.iter().filter_map(|(kind, fact)| {
            let limits = config.checks.get(kind)?;
            Some([
                (fact.last_good + limits.trap_period, "a trap_period ends"),
                (fact.at.unwrap_or(fact.last_good) + stale_after(limits), "a check result gets too old"),
            ])
        });
        let grace = self.gone.as_ref().map(|(at, _)| (*at + config.cluster.restart_grace, "restart_grace ends"));
        traps.flatten().chain(grace)
    }

    /// `ping: OK, mysql: not OK`, with the reason when one is known.
    pub(crate) fn summary(&self) -> String {
        let word = |kind| match self.check(kind) {
            Verdict::Good => "OK",
            Verdict::Bad => "not OK",
            Verdict::Unknown => "UNKNOWN",
        };
        let mut text = format!("ping: {}, mysql: {}", word(CheckKind::Ping), word(CheckKind::Mysql));
        if let Some((_, why)) = self.gone.as_ref().filter(|_| self.check(CheckKind::Mysql) == Verdict::Bad) {
            text = format!("{text}; {why}");
        }
        text
    }
}

impl CheckFact {
    fn judged(&self, now: Millis, limits: &CheckConfig) -> Verdict {
        let Some(at) = self.at else { return Verdict::Unknown };
        if now.since(at) >= stale_after(limits) {
            return Verdict::Unknown;
        }
        match &self.result {
            CheckResult::Ok(_) => Verdict::Good,
            // MMM: a check that cannot tell leaves things as they are.
            CheckResult::Unknown(_) => self.verdict,
            CheckResult::Error(_) if now.since(self.last_good) >= limits.trap_period => Verdict::Bad,
            CheckResult::Error(_) => self.verdict,
        }
    }
}

/// A checker that has said nothing for this long is not to be believed any more.
fn stale_after(limits: &CheckConfig) -> Duration {
    limits.trap_period + limits.check_period * 3 + limits.timeout
}

#[cfg(test)]
mod tests {
    use super::*;

    // lessons.md 19
    #[test]
    fn a_result_that_is_too_old_is_unknown_whatever_it_said() {
        let seconds = Duration::from_secs;
        let limits = CheckConfig {
            check_period: seconds(1),
            trap_period: seconds(3),
            timeout: seconds(1),
            restart_after: 10_000,
            max_backlog: seconds(60),
        };
        let mut fact = CheckFact {
            result: CheckResult::Error("no answer".to_owned()),
            at: Some(Millis(20_000)),
            last_good: Millis(10_000),
            verdict: Verdict::Good,
            changed: Millis(0),
        };
        assert_eq!(fact.judged(Millis(20_000), &limits), Verdict::Bad);
        assert_eq!(fact.judged(Millis(26_999), &limits), Verdict::Bad);
        assert_eq!(fact.judged(Millis(27_000), &limits), Verdict::Unknown);
        fact.result = CheckResult::Ok(String::new());
        assert_eq!(fact.judged(Millis(26_999), &limits), Verdict::Good);
        assert_eq!(fact.judged(Millis(27_000), &limits), Verdict::Unknown);
    }
}

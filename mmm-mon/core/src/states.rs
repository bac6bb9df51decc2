//! Stage 2: facts become host states, by a table of rules with one row per transition.
//!
//! The states and transitions are MMM's (`check_host_states`), less one: a replica in trouble is never set ONLINE only
//! because its peer went away (it promoted stale masters). To find out why a host changed, find the row.

use crate::facts::Verdict;
use mmm_common::ids::Millis;
use mmm_common::state::HostState::{self, AwaitingRecovery, HardOffline, Online, ReplicationDelay, ReplicationFail};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::Duration;

/// MMM: a host that was down for less than this, without a reboot, comes back by itself; and a replica's trouble is
/// ignored for this long after its peer came online.
pub(crate) const SHORT: Duration = Duration::from_secs(60);

/// A host's state with what its rules need to remember; survives a restart of the monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    pub state: HostState,
    pub since: Millis,
    /// When it went HARD_OFFLINE last, and the machine's boot id before that.
    pub down: Option<Down>,
    /// When it went from ONLINE to HARD_OFFLINE, within flap_duration.
    pub falls: VecDeque<Millis>,
    pub flapping_since: Option<Millis>,
    /// When it lost the writer by a failover, within flap_duration.
    #[serde(default)]
    pub lost_writer: VecDeque<Millis>,
    /// It has been ONLINE, or an operator has spoken about it, since this monitor's state began.
    #[serde(default)]
    pub known: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Down {
    pub at: Millis,
    pub machine_boot: Option<String>,
    /// How long it was away; None while it is.
    pub for_ms: Option<u64>,
}

impl HostStatus {
    /// A host that the monitor has never seen at work.
    pub(crate) fn new(now: Millis) -> Self {
        HostStatus {
            state: AwaitingRecovery,
            since: now,
            down: None,
            falls: VecDeque::new(),
            flapping_since: None,
            lost_writer: VecDeque::new(),
            known: false,
        }
    }

    pub(crate) fn online_for(&self, now: Millis) -> Option<Duration> {
        (self.state == Online).then(|| now.since(self.since))
    }
}

/// How a returning host's data compare with the active master's (data-safety.md, "When the old master comes back").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    /// Nothing to compare with: no active master, or this is it.
    Needless,
    /// Not known yet.
    Open,
    /// It has nothing that the active master lacks.
    Subset,
    /// It has so many transactions that the active master lacks.
    Extra(u64),
    /// It has gone past so many transactions of the active master's without having them: they will never come.
    Lacks(u64),
}

/// Everything that a rule may look at.
pub(crate) struct View<'a> {
    pub(crate) now: Millis,
    pub(crate) status: &'a HostStatus,
    pub(crate) ping: Verdict,
    pub(crate) mysql: Verdict,
    pub(crate) rep_threads: Verdict,
    pub(crate) rep_backlog: Verdict,
    /// What its SQL thread has stopped with, as its own agent says: that is certain, and waits for no `trap_period`.
    pub(crate) sql_error: Option<&'a str>,
    /// `ping: OK, mysql: not OK; …`.
    pub(crate) summary: String,
    pub(crate) agent_answers: bool,
    /// An address that it has by an order of before the monitor's state was lost (safety.md, R11).
    pub(crate) holds: Option<String>,
    pub(crate) machine_boot: Option<&'a str>,
    pub(crate) is_active_master: bool,
    /// How long the peer (a slave's: the active master) has been ONLINE; None if it is not, is not seen to serve at
    /// this moment, or there is none.
    pub(crate) peer_online_for: Option<Duration>,
    pub(crate) compared: Compared,
    /// What has been done about transactions that others lacked.
    pub(crate) mended: Option<String>,
    pub(crate) auto_set_online: Duration,
    pub(crate) flap_duration: Duration,
}

pub(crate) struct Rule {
    from: &'static [HostState],
    pub(crate) to: HostState,
    /// The reason in words, if the rule fires.
    when: fn(&View<'_>) -> Option<String>,
}

/// In order; the first that fires is taken. ADMIN_OFFLINE is left by `set_online` only.
pub(crate) const RULES: &[Rule] = &[
    Rule {
        from: &[Online, ReplicationDelay, ReplicationFail, AwaitingRecovery],
        to: HardOffline,
        when: |v| (v.ping == Verdict::Bad || v.mysql == Verdict::Bad).then(|| format!("({})", v.summary)),
    },
    Rule {
        from: &[Online, ReplicationDelay, ReplicationFail],
        to: AwaitingRecovery,
        when: |v| match v.compared {
            Compared::Extra(n) if !v.is_active_master => Some(format!("(it has {n} transactions that others lack)")),
            Compared::Lacks(n) if !v.is_active_master => {
                Some(format!("(it lacks {n} transactions that it has gone past)"))
            }
            Compared::Extra(_) | Compared::Lacks(_) | Compared::Needless | Compared::Open | Compared::Subset => None,
        },
    },
    Rule {
        from: &[HardOffline],
        to: AwaitingRecovery,
        when: |v| (v.ping == Verdict::Good && v.mysql == Verdict::Good).then(|| format!("({})", v.summary)),
    },
    Rule { from: &[AwaitingRecovery], to: Online, when: was_mended },
    Rule { from: &[AwaitingRecovery], to: Online, when: was_down_shortly },
    // lessons.md 21: a monitor that knows nothing believes what is there.
    Rule {
        from: &[AwaitingRecovery],
        to: Online,
        when: |v| {
            let address = v.holds.as_ref().filter(|_| v.ping == Verdict::Good && v.mysql == Verdict::Good)?;
            v.agent_answers
                .then(|| format!("because it has {address}, by an order of before this monitor's state was lost"))
        },
    },
    Rule { from: &[AwaitingRecovery], to: Online, when: waited_for_auto_set_online },
    Rule {
        from: &[Online, ReplicationDelay],
        to: ReplicationFail,
        when: |v| {
            let error = v.sql_error.filter(|_| !v.is_active_master && v.peer_online_for.is_some())?;
            Some(format!("(its SQL thread has stopped: {error})"))
        },
    },
    Rule {
        from: &[Online, ReplicationDelay],
        to: ReplicationFail,
        when: |v| (may_complain(v) && v.rep_threads == Verdict::Bad).then(|| "(rep_threads: not OK)".to_owned()),
    },
    Rule {
        from: &[Online],
        to: ReplicationDelay,
        when: |v| {
            (may_complain(v) && v.rep_threads == Verdict::Good && v.rep_backlog == Verdict::Bad)
                .then(|| "(rep_threads: OK, rep_backlog: not OK)".to_owned())
        },
    },
    Rule {
        from: &[ReplicationFail],
        to: ReplicationDelay,
        when: |v| {
            (v.sql_error.is_none() && v.rep_threads == Verdict::Good && v.rep_backlog == Verdict::Bad)
                .then(|| "(rep_threads: OK, rep_backlog: not OK)".to_owned())
        },
    },
    Rule {
        from: &[ReplicationFail, ReplicationDelay],
        to: Online,
        when: |v| replicates(v).then(|| "(rep_threads: OK, rep_backlog: OK)".to_owned()),
    },
];

impl Rule {
    pub(crate) fn fires(&self, view: &View<'_>) -> Option<String> {
        if self.from.contains(&view.status.state) { (self.when)(view) } else { None }
    }
}

fn replicates(v: &View<'_>) -> bool {
    v.sql_error.is_none() && v.rep_threads == Verdict::Good && v.rep_backlog == Verdict::Good
}

/// Replication trouble on the active master moves nothing, and a replica's counts only while there is somebody to
/// replicate from, who has been there long enough for it to have caught up.
fn may_complain(v: &View<'_>) -> bool {
    !v.is_active_master && v.peer_online_for.is_some_and(|d| d > SHORT)
}

/// What every way back to ONLINE needs. Rows that others lack are never let in.
fn may_return(v: &View<'_>) -> bool {
    let data_fits = match v.compared {
        Compared::Needless => true,
        Compared::Subset => replicates(v),
        Compared::Open | Compared::Extra(_) | Compared::Lacks(_) => false,
    };
    v.ping == Verdict::Good && v.mysql == Verdict::Good && v.agent_answers && data_fits
}

fn was_down_shortly(v: &View<'_>) -> Option<String> {
    let down = v.status.down.as_ref()?;
    let gone = Duration::from_millis(down.for_ms?);
    let same_boot = down.machine_boot.is_some() && down.machine_boot.as_deref() == v.machine_boot;
    (may_return(v) && v.status.flapping_since.is_none() && gone < SHORT && same_boot)
        .then(|| format!("because it was down for only {} seconds", gone.as_secs()))
}

/// It was away because of its data, and those are in line now.
fn was_mended(v: &View<'_>) -> Option<String> {
    let how = v.mended.as_ref()?;
    (may_return(v) && v.status.flapping_since.is_none()).then(|| format!("because {how}"))
}

fn waited_for_auto_set_online(v: &View<'_>) -> Option<String> {
    let waited = v.now.since(v.status.since);
    let calm = v.status.flapping_since.is_none_or(|since| v.now.since(since) >= v.flap_duration);
    (may_return(v) && !v.auto_set_online.is_zero() && waited >= v.auto_set_online && calm).then(|| {
        format!(
            "because of auto_set_online({} seconds). It was in state AWAITING_RECOVERY for {} seconds",
            v.auto_set_online.as_secs(),
            waited.as_secs()
        )
    })
}

impl HostStatus {
    /// The writer had to be taken from the host, and nobody had asked for it. True if the host was found to be flapping by
    /// it: a role that goes to and fro between hosts that never fall is bounded too.
    pub(crate) fn loses_writer(&mut self, now: Millis, (count, duration): (u32, Duration)) -> bool {
        self.lost_writer.push_back(now);
        while self.lost_writer.front().is_some_and(|at| now.since(*at) > duration) {
            self.lost_writer.pop_front();
        }
        let flaps = count > 0 && self.lost_writer.len() >= count as usize && self.flapping_since.is_none();
        if flaps {
            self.flapping_since = Some(now);
        }
        flaps
    }

    /// Carries out a transition. True if the host was found to be flapping by it.
    pub(crate) fn change(
        &mut self,
        to: HostState,
        now: Millis,
        machine_boot: Option<&str>,
        flap: (u32, Duration),
    ) -> bool {
        let from = std::mem::replace(&mut self.state, to);
        let mut flaps = false;
        if to == HardOffline {
            self.down = Some(Down { at: now, machine_boot: machine_boot.map(str::to_owned), for_ms: None });
            if from == Online {
                let (count, duration) = flap;
                self.falls.push_back(now);
                while self.falls.front().is_some_and(|at| now.since(*at) > duration) {
                    self.falls.pop_front();
                }
                if count > 0 && self.falls.len() >= count as usize && self.flapping_since.is_none() {
                    self.flapping_since = Some(now);
                    flaps = true;
                }
            }
        }
        if from == HardOffline
            && let Some(down) = &mut self.down
        {
            down.for_ms = Some(u64::try_from(now.since(down.at).as_millis()).unwrap_or(u64::MAX));
        }
        self.known |= matches!(to, Online | HostState::AdminOffline);
        if to == Online {
            self.flapping_since = None;
            self.down = None;
        }
        self.since = now;
        flaps
    }
}

#[cfg(test)]
mod tests {
    use super::HostState::AdminOffline;
    use super::Verdict::{Bad, Good, Unknown};
    use super::*;

    /// A healthy replica in `state`, its peer long online; tests change one thing.
    fn check(
        state: HostState,
        change: impl FnOnce(&mut View<'_>, &mut HostStatus),
        expected: Option<(HostState, &str)>,
    ) {
        let mut status = HostStatus { state, ..HostStatus::new(Millis(0)) };
        let empty = HostStatus::new(Millis(0));
        let mut view = View {
            now: Millis(1_000_000),
            status: &empty,
            ping: Good,
            mysql: Good,
            rep_threads: Good,
            rep_backlog: Good,
            sql_error: None,
            summary: "ping: OK, mysql: not OK".into(),
            agent_answers: true,
            holds: None,
            machine_boot: Some("boot-a"),
            is_active_master: false,
            peer_online_for: Some(Duration::from_secs(3600)),
            compared: Compared::Subset,
            mended: None,
            auto_set_online: Duration::ZERO,
            flap_duration: Duration::from_secs(3600),
        };
        change(&mut view, &mut status);
        let view = View { status: &status, ..view };
        let found = RULES.iter().find_map(|rule| rule.fires(&view).map(|why| (rule.to, why)));
        assert_eq!(found.as_ref().map(|(to, why)| (*to, why.as_str())), expected);
    }

    fn down_for(seconds: u64) -> Option<Down> {
        Some(Down { at: Millis(0), machine_boot: Some("boot-a".into()), for_ms: Some(seconds * 1000) })
    }

    #[test]
    fn a_failed_ping_or_mysql_check_is_hard_offline_and_says_which() {
        let reason = Some((HardOffline, "(ping: OK, mysql: not OK)"));
        for state in [Online, ReplicationDelay, ReplicationFail, AwaitingRecovery] {
            check(state, |v, _| v.mysql = Bad, reason);
            check(state, |v, _| v.ping = Bad, reason);
        }
        check(AdminOffline, |v, _| v.mysql = Bad, None);
        check(Online, |v, _| v.mysql = Unknown, None);
    }

    // lessons.md 21
    #[test]
    fn a_host_that_has_an_address_by_an_order_that_is_forgotten_goes_on() {
        let text = "because it has writer(10.0.0.50), by an order of before this monitor's state was lost";
        let holds = |v: &mut View<'_>, _: &mut HostStatus| v.holds = Some("writer(10.0.0.50)".into());
        check(AwaitingRecovery, holds, Some((Online, text)));
        check(AwaitingRecovery, |v, _| (v.holds, v.mysql) = (Some("writer(10.0.0.50)".into()), Unknown), None);
    }

    #[test]
    fn it_recovers_only_when_both_answer() {
        check(HardOffline, |_, _| {}, Some((AwaitingRecovery, "(ping: OK, mysql: not OK)")));
        check(HardOffline, |v, _| v.ping = Unknown, None);
    }

    #[test]
    fn a_short_downtime_without_reboot_needs_no_operator() {
        let back = Some((Online, "because it was down for only 59 seconds"));
        check(AwaitingRecovery, |_, s| s.down = down_for(59), back);
        check(AwaitingRecovery, |_, s| s.down = down_for(60), None);
        check(AwaitingRecovery, |_, s| s.down = None, None);
        check(AwaitingRecovery, |v, s| (v.machine_boot, s.down) = (Some("boot-b"), down_for(5)), None);
        check(AwaitingRecovery, |_, s| (s.flapping_since, s.down) = (Some(Millis(1)), down_for(5)), None);
    }

    // lessons.md 10
    #[test]
    fn nobody_comes_back_by_itself_with_rows_that_others_lack_or_before_that_is_known() {
        for compared in [Compared::Extra(3), Compared::Open] {
            check(AwaitingRecovery, |v, s| (v.compared, s.down) = (compared, down_for(5)), None);
            check(AwaitingRecovery, |v, _| (v.compared, v.auto_set_online) = (compared, Duration::from_secs(1)), None);
        }
        check(AwaitingRecovery, |v, s| (v.rep_threads, s.down) = (Bad, down_for(5)), None);
    }

    #[test]
    fn auto_set_online_waits_its_time_and_for_flapping_to_end() {
        let text = "because of auto_set_online(30 seconds). It was in state AWAITING_RECOVERY for 1000 seconds";
        let auto = Duration::from_secs(30);
        check(AwaitingRecovery, |v, _| v.auto_set_online = auto, Some((Online, text)));
        check(AwaitingRecovery, |v, s| (v.auto_set_online, s.since) = (auto, Millis(980_000)), None);
        let flapping = |since| {
            move |v: &mut View<'_>, s: &mut HostStatus| {
                (v.auto_set_online, v.flap_duration, s.flapping_since) =
                    (auto, Duration::from_secs(100), Some(Millis(since)));
            }
        };
        check(AwaitingRecovery, flapping(950_000), None);
        check(AwaitingRecovery, flapping(900_000), Some((Online, text)));
    }

    #[test]
    fn replication_trouble_fails_or_delays_a_replica_but_never_the_active_master() {
        check(Online, |v, _| v.rep_threads = Bad, Some((ReplicationFail, "(rep_threads: not OK)")));
        let stopped = Some((ReplicationFail, "(its SQL thread has stopped: no such table)"));
        let just_online = Some(Duration::from_secs(1));
        check(Online, |v, _| (v.sql_error, v.peer_online_for) = (Some("no such table"), just_online), stopped);
        check(Online, |v, _| (v.sql_error, v.is_active_master) = (Some("no such table"), true), None);
        check(Online, |v, _| (v.sql_error, v.peer_online_for) = (Some("no such table"), None), None);
        check(ReplicationFail, |v, _| v.sql_error = Some("no such table"), None);
        check(ReplicationFail, |v, _| (v.sql_error, v.rep_backlog) = (Some("no such table"), Bad), None);
        check(Online, |v, _| v.rep_backlog = Bad, Some((ReplicationDelay, "(rep_threads: OK, rep_backlog: not OK)")));
        check(Online, |v, _| (v.rep_threads, v.is_active_master) = (Bad, true), None);
        check(Online, |v, _| (v.rep_threads, v.peer_online_for) = (Bad, Some(Duration::from_secs(59))), None);
        check(Online, |v, _| (v.rep_threads, v.peer_online_for) = (Bad, None), None);
    }

    #[test]
    fn a_replica_recovers_when_it_replicates_and_never_because_its_peer_went() {
        check(ReplicationFail, |_, _| {}, Some((Online, "(rep_threads: OK, rep_backlog: OK)")));
        check(ReplicationFail, |v, _| (v.rep_threads, v.peer_online_for) = (Bad, None), None);
        check(
            ReplicationFail,
            |v, _| v.rep_backlog = Bad,
            Some((ReplicationDelay, "(rep_threads: OK, rep_backlog: not OK)")),
        );
        check(ReplicationDelay, |v, _| v.rep_threads = Bad, Some((ReplicationFail, "(rep_threads: not OK)")));
    }

    // lessons.md 20
    #[test]
    fn who_loses_the_writer_three_times_within_flap_duration_is_flapping() {
        let mut s = HostStatus::new(Millis(0));
        let mut loses = |at| s.loses_writer(Millis(at), (3, Duration::from_secs(100)));
        assert!(!loses(1_000));
        assert!(!loses(200_000), "the first is out of the window");
        assert!(!loses(210_000));
        assert!(loses(220_000));
        assert!(!loses(221_000), "it is known already");
    }

    // lessons.md 20
    #[test]
    fn the_third_fall_within_flap_duration_is_flapping() {
        let mut s = HostStatus::new(Millis(0));
        let flap = (3, Duration::from_secs(100));
        let mut fall = |at| {
            s.change(Online, Millis(at - 1), None, flap);
            s.change(HardOffline, Millis(at), None, flap)
        };
        assert!(!fall(1_000));
        assert!(!fall(200_000), "the first is out of the window");
        assert!(!fall(210_000));
        assert!(fall(220_000));
    }
}

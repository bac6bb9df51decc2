//! What the candidate of an unplanned failover must have before it may write: everything that any host that can be asked
//! has received (data-safety.md, "Unplanned", 2 and 3).
//!
//! Every replica stops fetching and applies what it has, together with the candidate. Whoever then has more is fetched
//! from. A replica that cannot apply what it has received, or whoever had to be asked and cannot be, is a reason to hold.

use crate::handover::{HostView, Scene, outcome_of};
use crate::writers::Writers;
use mmm_common::config::Cluster;
use mmm_common::epoch::Epoch;
use mmm_common::gtid::Gtids;
use mmm_common::ids::{HostName, Millis};
use mmm_common::position::Position;
use mmm_common::report::TaskOutcome;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A host that stopped fetching longer than this before the old master failed lacks what was written since.
const STALE: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gathering {
    /// The others that are asked to drain too.
    pub(crate) others: BTreeSet<HostName>,
    /// Who was fetching from the old master until it failed, the candidate included.
    fresh: BTreeSet<HostName>,
    /// Why the candidate alone is not enough.
    stale: Option<String>,
    /// The candidate is the old master itself, which acknowledges nothing of its own.
    again: bool,
    /// How many of the hosts that acknowledge have to be asked, so that what was acknowledged is among them.
    need: u64,
    /// Who may have acknowledged the old master's last commits.
    acknowledged: BTreeSet<HostName>,
    /// Everybody but the old master who is set up to acknowledge.
    acknowledging: BTreeSet<HostName>,
    /// How many of those had each commit before a client was told of it, and what the old master had when that began. None:
    /// it is not known.
    copies: Option<(u64, Gtids)>,
    /// What the old master had when it was last heard of.
    old: Option<Gtids>,
    /// From whom everything was fetched already.
    fetched: BTreeSet<HostName>,
    /// Who had the writer last: what they wrote is a master's.
    wrote: BTreeSet<HostName>,
    /// The last of them, when it is there to be asked: what it has, closed, is everything.
    last: Option<HostName>,
}

/// What another replica has.
enum Has {
    /// Nothing that the candidate lacks.
    Nothing,
    /// Applied, up to here.
    More(Gtids, u64),
    /// Received, and not to be had.
    Stuck(String),
    /// It can no longer be asked.
    Gone,
    NotKnownYet,
}

/// What comes next.
pub(crate) enum Next {
    Wait(String),
    Fetch {
        from: HostName,
        position: Gtids,
    },
    /// Somebody has, or may have, what the candidate lacks. With a host: its answer would change that.
    Hold(String, Option<HostName>),
    Grant,
    /// This host had the writer, and can be asked again.
    Again(HostName),
}

fn can_be_asked(host: &HostView<'_>) -> bool {
    host.agent_answers && host.server_alive && !host.server_gone && !host.rebuilt
}

impl Gathering {
    /// `from` wrote last, and `given` was given the writer after that and not seen open.
    pub(crate) fn begin(
        scene: &Scene<'_>,
        cluster: &Cluster,
        to: &HostName,
        (from, given, earlier): (Option<&HostName>, Option<&HostName>, &BTreeSet<HostName>),
        failed_at: Option<Millis>,
    ) -> Self {
        let others: BTreeSet<HostName> = scene
            .hosts
            .iter()
            .filter(|(name, h)| {
                let replica = h.report.is_some_and(|r| r.server.replication.is_some());
                let wrote = Some(*name) == from || Some(*name) == given || earlier.contains(*name);
                *name != to && can_be_asked(h) && (wrote || (replica && h.trusted))
            })
            .map(|(name, _)| name.clone())
            .collect();
        let alone = stale(scene, to, from, failed_at);
        let mut fresh: BTreeSet<HostName> =
            others.iter().filter(|o| stale(scene, o, from, failed_at).is_none()).cloned().collect();
        if alone.is_none() {
            fresh.insert(to.clone());
        }
        let old = from.and_then(|from| scene.hosts.get(from)?.last_executed).cloned();
        // MariaDB may have been started with init_rpl_role=SLAVE: then it has thrown away the end of its own binary log
        // (tried: acknowledged rows of it too), and only the others know whether that was acknowledged.
        let again = from == Some(to);
        let asks_others = !again || matches!(old, Some(Gtids::MariaDb(_)));
        let host = from.filter(|_| asks_others).and_then(|from| scene.hosts.get(from));
        let need = host
            .and_then(|h| h.semisync.filter(|s| s.in_effect(cluster.fenced_within()).is_ok()).zip(Some(h.attached)))
            .map_or(0, |(s, attached)| (attached.max(1) + 1).saturating_sub(s.wait_count.max(1)));
        let late = |h: &HostName| gap(scene, h, from, failed_at);
        let until = host.and_then(|h| h.semisync).map_or(Duration::ZERO, |s| Duration::from_millis(s.timeout_ms));
        let acknowledged = (others.iter().chain([to]))
            .filter(|h| !again || *h != to)
            .filter(|h| scene.hosts.get(*h).is_some_and(|v| v.acknowledges) && late(h).is_ok_and(|gap| gap <= until))
            .cloned()
            .collect();
        // Without our hand on semi-synchronous replication anybody may acknowledge.
        let all = scene.hosts.iter().filter(|(name, h)| Some(*name) != from && (h.acknowledges || !cluster.semisync));
        let acknowledging = all.map(|(name, _)| name.clone()).collect();
        // The look at the server that its last report tells of was not made just then.
        let until = failed_at.map(|at| at + STALE).or_else(|| Some(host?.last_alive + STALE));
        let secured = from.is_some_and(|from| unsecured(scene, from, until, cluster).is_none());
        let waits = host.filter(|_| secured).and_then(|h| Some((h.semisync?, h.waits_since?.clone())));
        let copies = waits.map(|(s, since)| (s.wait_count.max(1), since));
        let wrote = from.into_iter().chain(given).chain(earlier).cloned().collect();
        let last = given.or(from).filter(|last| others.contains(*last)).cloned();
        Gathering {
            others,
            fresh,
            stale: alone,
            again,
            need,
            acknowledged,
            acknowledging,
            copies,
            old,
            fetched: BTreeSet::new(),
            wrote,
            last,
        }
    }

    /// Whoever has acknowledged a commit, one of these has it: too few others could have. So it does not matter that this
    /// monitor has not seen them fetching until the end, because it was restarted, or an agent was. Of what the old master
    /// had in its last report nothing may be lacking: that had waited for nobody knows how long, and may have stopped
    /// before the lease was over.
    fn has_every_acknowledged(&self, mine: Option<&Gtids>, asked: impl Fn(&HostName) -> bool) -> bool {
        let others = self.acknowledging.iter().filter(|host| !asked(host)).count() as u64;
        let has = |theirs: &Gtids| mine.is_none_or(|mine| mine.missing(theirs) == Some(0));
        self.copies
            .as_ref()
            .is_some_and(|(copies, since)| others < *copies && has(since) && self.old.as_ref().is_some_and(has))
    }

    pub(crate) fn fetching(mut self, from: &HostName) -> Self {
        self.fetched.insert(from.clone());
        self
    }

    /// Nobody who can be asked had been fetching until the end.
    pub(crate) fn hopeless(&self, to: &HostName) -> Option<&str> {
        let everybody = self.has_every_acknowledged(None, |host| host == to || self.others.contains(host));
        self.stale.as_deref().filter(|_| self.fresh.is_empty() && self.last.is_none() && !everybody)
    }

    /// The candidate has drained and has executed `mine`. `late`: nobody is waited for any longer.
    pub(crate) fn next(
        &self,
        scene: &Scene<'_>,
        writers: &Writers,
        to: &HostName,
        mine: Option<&Gtids>,
        (task, late): (Epoch, bool),
    ) -> Next {
        let back = |host: &&HostName| *host != to && !self.others.contains(*host);
        let mut back = self.wrote.iter().filter(back);
        if let Some(back) = back.find(|host| scene.hosts.get(*host).is_some_and(can_be_asked)) {
            return Next::Again(back.clone());
        }
        let Some(mine) = mine else {
            // Without GTIDs nothing can be compared or fetched.
            return Next::Grant;
        };
        let mut asked: BTreeSet<&HostName> = BTreeSet::from([to]);
        let mut waits = Vec::new();
        let mut stuck = Vec::new();
        let mut most: Option<(u64, &HostName, Gtids)> = None;
        for other in &self.others {
            let old = self.old.as_ref().filter(|_| !self.wrote.contains(other));
            match has(scene, other, mine, task, (old, self.wrote.contains(other))) {
                Has::Nothing => drop(asked.insert(other)),
                Has::More(_, n) if self.fetched.contains(other) => {
                    stuck.push(format!("{to} still lacks {n} transactions of {other} after fetching from it"));
                }
                Has::More(position, n) => {
                    asked.insert(other);
                    if most.as_ref().is_none_or(|(before, ..)| n > *before) {
                        most = Some((n, other, position));
                    }
                }
                Has::Stuck(why) => stuck.push(why),
                Has::NotKnownYet if late => stuck.push(format!("{other} has not told in time what it has")),
                Has::NotKnownYet => waits.push(other.as_str()),
                Has::Gone => {}
            }
        }
        if !waits.is_empty() {
            return Next::Wait(format!("waiting for {} to tell what it has received", waits.join(" and ")));
        }
        if let Some((_, from, position)) = most {
            return Next::Fetch { from: from.clone(), position };
        }
        if !stuck.is_empty() {
            return Next::Hold(stuck.join("; "), None);
        }
        for host in self.wrote.iter().filter(|host| !asked.contains(*host)).collect::<Vec<_>>() {
            match writers.last_word(host, to, mine) {
                None => {}
                Some(Ok(())) => drop(asked.insert(host)),
                Some(Err(why)) => {
                    let away = scene.hosts.get(host).is_some_and(|h| !(h.agent_answers && h.server_alive));
                    return Next::Hold(why, Some(host.clone()).filter(|_| away));
                }
            }
        }
        for host in asked.iter().copied() {
            let once = scene.hosts.get(host).and_then(|h| h.received_once);
            let gone = once.map_or(0, |once| mine.missing(once).unwrap_or_default());
            if gone > 0 {
                let why = format!(
                    "{host} had received {gone} transactions which are nowhere now: its relay log was thrown away before they were applied"
                );
                return Next::Hold(why, None);
            }
        }
        if self.last.as_ref().is_some_and(|last| asked.contains(last) && !writers.was_short(last)) {
            return Next::Grant;
        }
        if self.has_every_acknowledged(Some(mine), |host| asked.contains(host)) {
            return Next::Grant;
        }
        if let Some(why) = self.stale.as_ref().filter(|_| !self.fresh.iter().any(|f| asked.contains(f))) {
            return Next::Hold(why.clone(), None);
        }
        let acknowledging = asked.iter().filter(|h| self.acknowledged.contains(**h)).count() as u64;
        // With all of them asked there are no others, whenever they fetched last.
        if acknowledging < self.need && !self.acknowledging.is_subset(&asked.iter().copied().cloned().collect()) {
            let why = format!(
                "only {acknowledging} of the hosts that acknowledged the old master's commits can be asked, and {} have to be: what was acknowledged may be on the others",
                self.need
            );
            return Next::Hold(why, None);
        }
        Next::Grant
    }
}

/// `wrote`: only what it says at the end of its drain, closed, is final.
fn has(scene: &Scene<'_>, other: &HostName, mine: &Gtids, task: Epoch, (old, wrote): (Option<&Gtids>, bool)) -> Has {
    let Some(host) = scene.hosts.get(other).filter(|h| h.agent_answers && h.server_alive) else { return Has::Gone };
    let Some(server) = host.report.map(|r| &r.server) else { return Has::Gone };
    let received = server.replication.as_ref().and_then(|r| r.received.as_ref());
    let lacking = |theirs: Option<&Gtids>| theirs.map_or(Some(0), |theirs| mine.missing(theirs));
    let executed = server.executed.as_ref().and_then(|theirs| mine.missing(theirs));
    let covered = !wrote && executed == Some(0) && lacking(received) == Some(0);
    match outcome_of(scene, other, task) {
        Some(TaskOutcome::Done { position: Some(Position::Gtids(position)) }) => match mine.missing(position) {
            Some(0) => Has::Nothing,
            Some(_) => more(other, mine, position, old.map(|old| known_to(host, old))),
            None => Has::Stuck(format!("{other} has GTIDs of another kind")),
        },
        Some(TaskOutcome::Failed { .. }) if covered => Has::Nothing,
        Some(TaskOutcome::Failed { why }) => {
            Has::Stuck(format!("{other} has received what nobody else has, and cannot apply it: {why}"))
        }
        // It has stopped fetching: what it has received is final, whenever it will be applied.
        Some(TaskOutcome::Running) if covered && server.replication.as_ref().is_some_and(|r| !r.io_running) => {
            Has::Nothing
        }
        Some(TaskOutcome::Done { position: Some(Position::Log(_)) | None } | TaskOutcome::Running) | None => {
            Has::NotKnownYet
        }
    }
}

/// Who has written on masters: in what the old one had when it was last heard of, which may be of before its own first
/// write, or in what was fetched.
fn known_to(host: &HostView<'_>, old: &Gtids) -> BTreeSet<String> {
    let received = host.report.and_then(|r| r.server.replication.as_ref()?.received.as_ref());
    [Some(old), received, host.received_once].into_iter().flatten().flat_map(Gtids::sources).collect()
}

/// What it has may have been written there and nowhere else: that came from no master, and belongs to nobody.
fn more(other: &HostName, mine: &Gtids, position: &Gtids, known: Option<BTreeSet<String>>) -> Has {
    let beyond = mine.missing_by_source(position);
    let (of_masters, own): (BTreeMap<_, _>, BTreeMap<_, _>) =
        beyond.into_iter().partition(|(source, _)| known.as_ref().is_none_or(|known| known.contains(source)));
    let n: u64 = of_masters.values().sum();
    match (n, own.is_empty()) {
        (0, _) => Has::Nothing,
        (n, true) => Has::More(position.clone(), n),
        (n, false) => {
            let sources: Vec<&str> = own.keys().map(String::as_str).collect();
            Has::Stuck(format!(
                "{other} has {n} transactions of the old master that nobody else has, and others that never were on it ({}): fetching would spread those",
                sources.join(", ")
            ))
        }
    }
}

/// Why the host must be lacking something, although it may look well. `failed_at`: when the old master was last at work.
fn stale(scene: &Scene<'_>, to: &HostName, from: Option<&HostName>, failed_at: Option<Millis>) -> Option<String> {
    let name = from.filter(|from| *from != to)?;
    match gap(scene, to, from, failed_at) {
        Err(why) => Some(why),
        Ok(gap) => (gap > STALE)
            .then(|| format!("it had stopped fetching from {name} {} s before {name} failed", gap.as_secs())),
    }
}

/// Why what the old master had acknowledged need not be on a replica.
pub(crate) fn unsecured(
    scene: &Scene<'_>,
    from: &HostName,
    failed_at: Option<Millis>,
    cluster: &Cluster,
) -> Option<String> {
    let host = scene.hosts.get(from);
    let unheard = host.map_or(Duration::ZERO, |h| failed_at.unwrap_or(h.last_alive).since(h.semisync_at));
    match host.and_then(|h| h.semisync).map(|s| (s, s.in_effect(cluster.fenced_within()))) {
        Some((s, Ok(()))) if s.replicas < s.wait_count.max(1) => Some(format!(
            "the last that was heard of {from} is that {} replicas acknowledged its commits, and {} had to: they may have stopped waiting",
            s.replicas,
            s.wait_count.max(1)
        )),
        Some((s, Ok(()))) if unheard >= Duration::from_millis(s.timeout_ms) => Some(format!(
            "nothing was heard of semi-synchronous replication on {from} in the last {} s before it failed",
            unheard.as_secs()
        )),
        Some((_, Ok(()))) if host.is_some_and(|h| h.waits_since.is_none()) => {
            Some(format!("it is not known since when commits on {from} had waited for a replica"))
        }
        Some((_, Ok(()))) => None,
        Some((_, Err(why))) => Some(format!("semi-synchronous replication was not in effect on {from}: {why}")),
        None => Some(format!("nothing is known of semi-synchronous replication on {from}")),
    }
}

/// What the old master wrote before its commits waited for a replica, and the new one lacks: clients were told of it. They
/// may have been told of what the old one had in its last report, too: that may have waited for its whole time.
pub(crate) fn lacks_unwaited(scene: &Scene<'_>, from: &HostName, to: &HostName) -> Option<String> {
    let host = scene.hosts.get(from)?;
    let since = host.waits_since?;
    let mine = scene.hosts.get(to)?.report?.server.executed.as_ref();
    match mine.and_then(|mine| mine.missing(since)) {
        Some(0) => {
            let n = mine.zip(host.last_executed).and_then(|(mine, old)| mine.missing(old)).filter(|n| *n > 0)?;
            Some(format!(
                "{to} lacks {n} transactions that {from} had when it was last heard of: they may have stopped waiting"
            ))
        }
        Some(n) => Some(format!("{to} lacks {n} transactions from before commits on {from} waited for a replica")),
        None => Some(format!("what {to} has of {from} is not known")),
    }
}

/// How long before the old master failed the host was last seen fetching from it, or why that cannot be told.
fn gap(
    scene: &Scene<'_>,
    of: &HostName,
    from: Option<&HostName>,
    failed_at: Option<Millis>,
) -> Result<Duration, String> {
    let nobody = || "nobody is known to have been open for writes".to_owned();
    let from = from.ok_or_else(nobody)?;
    let old = scene.hosts.get(from).ok_or_else(nobody)?;
    let failed_at = failed_at.unwrap_or(old.last_alive);
    let Some((last, source)) = scene.hosts.get(of).and_then(|h| h.replicating) else {
        return Err(format!("it has not been seen fetching from {from} by this monitor"));
    };
    if source.parse() != Ok(old.ip) {
        return Err(format!("it fetched from {source} and not from {from} ({})", old.ip));
    }
    Ok(failed_at.since(*last))
}

//! The checkers: for every host and check its own task with its own timer, so that no check ever delays another.
//!
//! Also the monitor's own network check. Each result becomes an input of the core at once; nothing is judged here.

pub(crate) mod mysql;
pub(crate) mod ping;
pub(crate) mod replication;
pub(crate) mod session;
#[cfg(test)]
pub(crate) mod tests;

use crate::feed::{Feed, Worker};
use mmm_common::config::{Check, Host, Monitor as Config};
use mmm_common::ids::HostName;
use mmm_common::state::{CheckKind, CheckResult};
use mmm_mon_core::io::Input;
use mysql::MysqlCheck;
use ping::{NoSocket, Pings};
use replication::{Question, ReplicationCheck};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tracing::warn;

pub(crate) struct Checkers {
    feed: Feed,
    pings: Arc<Pings>,
    running: BTreeMap<(HostName, CheckKind), Running>,
    network: Option<(NetworkCheck, Worker)>,
}

struct Running {
    host: Host,
    check: Check,
    _worker: Worker,
}

impl Checkers {
    /// Nothing runs yet; [`Checkers::arrange`] starts them.
    pub(crate) fn new(feed: Feed) -> Self {
        Checkers { feed, pings: Arc::new(Pings::new()), running: BTreeMap::new(), network: None }
    }

    /// Makes sure that everything in this configuration can be pinged.
    pub(crate) fn prepare(&self, config: &Config) -> Result<(), NoSocket> {
        let hosts = config.cluster.hosts.values().map(|h| h.ip);
        let addresses: BTreeSet<IpAddr> = hosts.chain(config.ping_ips.iter().copied()).collect();
        self.pings.open_for(&addresses)
    }

    /// Starts what is missing, ends what is gone, and builds anew what has changed. The rest goes on undisturbed.
    pub(crate) fn arrange(&mut self, config: &Config) {
        let mut before = std::mem::take(&mut self.running);
        for (name, host) in &config.cluster.hosts {
            for (kind, check) in &config.checks {
                let key = (name.clone(), *kind);
                let same = before.remove(&key).filter(|r| r.host == *host && r.check == *check);
                let running = same.unwrap_or_else(|| self.start(name, *kind, host, check));
                self.running.insert(key, running);
            }
        }
        let network = NetworkCheck { ips: config.ping_ips.clone(), every: config.ping_interval };
        if self.network.as_ref().is_none_or(|(running, _)| *running != network) {
            let (check, pings) = (network.clone(), self.pings.clone());
            self.network = Some((network, self.feed.worker(|feed| check.run(pings, feed))));
        }
    }

    fn start(&self, name: &HostName, kind: CheckKind, host: &Host, check: &Check) -> Running {
        let probe = match kind {
            CheckKind::Ping => Probe::Ping { ip: host.ip, pings: self.pings.clone() },
            CheckKind::Mysql => Probe::Mysql(MysqlCheck::new(host)),
            CheckKind::RepThreads => Probe::Replication(ReplicationCheck::new(host, Question::Threads)),
            CheckKind::RepBacklog => {
                Probe::Replication(ReplicationCheck::new(host, Question::Backlog { max: check.max_backlog }))
            }
        };
        let checker = Checker { host: name.clone(), kind, check: check.clone(), probe };
        let worker = self.feed.worker(|feed| checker.run(feed));
        Running { host: host.clone(), check: check.clone(), _worker: worker }
    }
}

/// One check of one host.
struct Checker {
    host: HostName,
    kind: CheckKind,
    check: Check,
    probe: Probe,
}

impl Checker {
    async fn run(mut self, feed: Feed) {
        let mut timer = every(self.check.check_period);
        let mut done = 0;
        loop {
            timer.tick().await;
            if done >= self.check.restart_after {
                self.probe.restart();
                done = 0;
            }
            let timeout = self.check.timeout;
            let result = self.probe.check(Instant::now() + timeout, timeout).await;
            done += 1;
            feed.input(Input::Check { host: self.host.clone(), check: self.kind, result }).await;
        }
    }
}

enum Probe {
    Ping { ip: IpAddr, pings: Arc<Pings> },
    Mysql(MysqlCheck),
    Replication(ReplicationCheck),
}

impl Probe {
    async fn check(&mut self, deadline: Instant, timeout: Duration) -> CheckResult {
        match self {
            Probe::Ping { ip, pings } => pings.check(*ip, deadline, timeout).await,
            Probe::Mysql(check) => check.check(deadline, timeout).await,
            Probe::Replication(check) => check.check(deadline, timeout).await,
        }
    }

    /// Throws its socket or connection away; the next check builds a new one.
    fn restart(&mut self) {
        match self {
            Probe::Ping { ip, pings } => {
                if let Err(e) = pings.renew(*ip) {
                    warn!("ping goes on with the old socket: {e}");
                }
            }
            Probe::Mysql(check) => check.restart(),
            Probe::Replication(check) => check.restart(),
        }
    }
}

/// Whether the monitor's own network works: does any one of these addresses answer?
#[derive(Clone, Debug, PartialEq, Eq)]
struct NetworkCheck {
    ips: Vec<IpAddr>,
    every: Duration,
}

impl NetworkCheck {
    async fn run(self, pings: Arc<Pings>, feed: Feed) {
        let mut timer = every(self.every);
        loop {
            timer.tick().await;
            let reachable = self.ips.is_empty() || self.any_answers(&pings).await;
            feed.input(Input::Network { reachable }).await;
        }
    }

    async fn any_answers(&self, pings: &Arc<Pings>) -> bool {
        let deadline = Instant::now() + self.every;
        let mut all = JoinSet::new();
        for ip in self.ips.iter().copied() {
            let (pings, every) = (pings.clone(), self.every);
            all.spawn(async move { pings.check(ip, deadline, every).await });
        }
        while let Some(result) = all.join_next().await {
            if matches!(result, Ok(CheckResult::Ok(_))) {
                return true;
            }
        }
        false
    }
}

/// A timer that keeps its beat: after a late check the next one comes at its ordinary time.
fn every(period: Duration) -> Interval {
    let mut timer = interval(period.max(Duration::from_millis(1)));
    timer.set_missed_tick_behavior(MissedTickBehavior::Skip);
    timer
}

//! `mmm_control doctor`: has every agent examine its host, tries what the monitor itself relies on, and compares.
//!
//! It never goes through the core and never touches the links to the agents: every examination is a short connection of
//! its own, and so is every login. All hosts are looked at at once, and each step has a deadline, so a host that does
//! not answer costs its own findings only. It changes nothing.

mod compare;

use crate::checks::ping::Pings;
use crate::checks::session::{Session, Trouble, text};
use crate::lines::Lines;
use compare::Compared;
use mmm_common::config::{Cluster, Host, Monitor as Config};
use mmm_common::examine::{Examined, Facts, Finding, Severity, Subject};
use mmm_common::gtid::Gtids;
use mmm_common::ids::HostName;
use mmm_common::state::CheckResult;
use mmm_common::wire::{FromAgent, MAX_LINE, PROTOCOL, ToAgent, to_line};
use mysql_async::Row;
use nix::unistd::{AccessFlags, access};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

const CONNECT: Duration = Duration::from_secs(2);
/// From the request to the word that it begins.
const BEGIN: Duration = Duration::from_secs(2);
/// From there to the findings. The parts of an agent's examination have 6 s.
const EXAMINE: Duration = Duration::from_secs(10);
const LOGIN: Duration = Duration::from_secs(3);
const PING: Duration = Duration::from_secs(1);
/// Clocks that are further apart make the logs of two hosts hard to read together. Nothing is decided by them.
const SKEW_MS: u64 = 1000;

#[derive(Clone)]
pub(crate) struct Doctor {
    config: watch::Receiver<Arc<Config>>,
    /// Which monitor this is.
    identity: u64,
    /// One at a time: an agent refuses a second one.
    turn: Arc<Mutex<()>>,
}

/// What one host has given.
struct Answer {
    host: HostName,
    findings: Vec<Finding>,
    facts: Option<Facts>,
}

impl Doctor {
    pub(crate) fn new(config: watch::Receiver<Arc<Config>>, identity: u64) -> Self {
        Doctor { config, identity, turn: Arc::default() }
    }

    /// Everything, by host; the monitor's own findings first.
    pub(crate) async fn examine(&self) -> Vec<Finding> {
        let _turn = self.turn.lock().await;
        let config = self.config.borrow().clone();
        let mut hosts = JoinSet::new();
        for (name, host) in &config.cluster.hosts {
            hosts.spawn(examine_host(name.clone(), host.clone(), self.identity));
        }
        let mut findings = vec![kill_host(config.kill_host_bin.as_deref())];
        findings.extend(ping_ips(&config.ping_ips).await);
        let mut facts = BTreeMap::new();
        while let Some(answer) = hosts.join_next().await {
            let Ok(Answer { host, findings: found, facts: told }) = answer else { continue };
            findings.extend(found.into_iter().map(|f| f.on(&host)));
            facts.extend(told.map(|told| (host, told)));
        }
        let Compared { findings: compared, writer } = compare::judge(&config.cluster, &facts);
        findings.extend(compared);
        findings.extend(errant(&config.cluster, writer.as_ref(), &facts).await);
        findings.sort_by(|a, b| (&a.host, a.subject).cmp(&(&b.host, b.subject)));
        findings
    }
}

async fn examine_host(name: HostName, host: Host, identity: u64) -> Answer {
    let (login, examined) = tokio::join!(monitor_user(&host), ask_agent(&name, &host, identity));
    let mut findings = vec![login];
    let facts = match examined {
        Ok((clock, examined)) => {
            findings.push(clock);
            findings.extend(examined.findings);
            Some(examined.facts)
        }
        Err(finding) => {
            findings.push(*finding);
            None
        }
    };
    Answer { host: name, findings, facts }
}

/// The agent's findings, and one about the clocks.
async fn ask_agent(name: &HostName, host: &Host, identity: u64) -> Result<(Finding, Examined), Box<Finding>> {
    let agent = SocketAddr::new(host.ip, host.agent_port);
    let bad = |found: String| {
        let cure =
            format!("start mmm_agentd on {name}, of this monitor's version; let TCP port {} in there", agent.port());
        Box::new(Finding::bad(Severity::Error, Subject::Agent, format!("asking the agent at {agent}"), found, cure))
    };
    let connect = timeout(CONNECT, TcpStream::connect(agent)).await;
    let mut stream = match connect {
        Ok(Ok(stream)) => stream,
        Ok(Err(e)) => return Err(bad(e.to_string())),
        Err(_) => return Err(bad(format!("no answer within {CONNECT:?}"))),
    };
    let request = ToAgent::Examine { protocol: PROTOCOL, host: name.clone(), monitor: identity };
    let line = to_line(&request).map_err(|e| bad(e.to_string()))?;
    let sent = Instant::now();
    let sent_at = crate::clock::unix_ms();
    stream.write_all(line.as_bytes()).await.map_err(|e| bad(e.to_string()))?;
    let mut lines = Lines::new(stream, MAX_LINE);
    let clock = match hear(&mut lines, BEGIN).await.map_err(&bad)? {
        FromAgent::Examining { unix_ms } => clock(unix_ms, sent_at, sent.elapsed()),
        other @ (FromAgent::Hello { .. }
        | FromAgent::Report(_)
        | FromAgent::Vouch(_)
        | FromAgent::Examined(_)
        | FromAgent::Refused { .. }) => return Err(bad(unexpected(other))),
    };
    match hear(&mut lines, EXAMINE).await.map_err(&bad)? {
        FromAgent::Examined(examined) => Ok((clock, *examined)),
        other @ (FromAgent::Hello { .. }
        | FromAgent::Report(_)
        | FromAgent::Vouch(_)
        | FromAgent::Examining { .. }
        | FromAgent::Refused { .. }) => Err(bad(unexpected(other))),
    }
}

async fn hear(lines: &mut Lines<TcpStream>, limit: Duration) -> Result<FromAgent, String> {
    let line = timeout(limit, lines.next()).await.map_err(|_| format!("no answer within {limit:?}"))??;
    serde_json::from_str(&line).map_err(|e| format!("what answers is no mmm_agentd of this version: {e}"))
}

fn unexpected(message: FromAgent) -> String {
    match message {
        FromAgent::Refused { why, .. } => format!("it refuses: {why}"),
        FromAgent::Hello { .. }
        | FromAgent::Report(_)
        | FromAgent::Vouch(_)
        | FromAgent::Examining { .. }
        | FromAgent::Examined(_) => "it answered something else".to_owned(),
    }
}

/// `its` lies somewhere between the sending and the hearing.
fn clock(its: u64, sent_at: u64, round_trip: Duration) -> Finding {
    let tried = "the host's wall clock against the monitor's";
    let round_trip = u64::try_from(round_trip.as_millis()).unwrap_or(u64::MAX);
    let heard_at = sent_at.saturating_add(round_trip);
    let off = if its < sent_at { sent_at - its } else { its.saturating_sub(heard_at) };
    if off < SKEW_MS {
        return Finding::ok(Subject::Clock, tried, format!("less than {} ms apart", off + round_trip + 1));
    }
    let found = format!("{:.1} s apart: logs of both are hard to read together", off as f64 / 1000.0);
    let cure = "run an NTP client (chrony, systemd-timesyncd) on both";
    Finding::bad(Severity::Warning, Subject::Clock, tried, found, cure)
}

async fn monitor_user(host: &Host) -> Finding {
    let tried =
        format!("logging in to {}:{} as '{}', and its replication status", host.ip, host.mysql_port, host.monitor_user);
    let mut session = Session::new(host);
    let asked = timeout(LOGIN, async {
        match session.query("SHOW REPLICA STATUS").await {
            Err(Trouble::Answered { code: 1064, .. }) => session.query("SHOW SLAVE STATUS").await,
            answer => answer,
        }
    });
    let (found, cure) = match asked.await {
        Ok(Ok(_)) => return Finding::ok(Subject::MonitorUser, tried, "answered"),
        Ok(Err(Trouble::NotServing(why))) => (why, "start the server; let its port in from the monitor".to_owned()),
        Ok(Err(Trouble::Answered { code: 1142 | 1227, text })) => (
            text,
            format!(
                "on the active master: GRANT REPLICATION CLIENT ON *.* TO '{0}'@'%' (MariaDB: GRANT SLAVE MONITOR ON \
                 *.* TO '{0}'@'%')",
                host.monitor_user
            ),
        ),
        Ok(Err(Trouble::Answered { text, .. })) => {
            (text, "compare monitor_user and monitor_password with the account on the server".to_owned())
        }
        Err(_) => {
            session.throw_away();
            (format!("no answer within {LOGIN:?}"), "see the load of that host".to_owned())
        }
    };
    Finding::bad(Severity::Error, Subject::MonitorUser, tried, found, cure)
}

/// Never run here.
fn kill_host(bin: Option<&Path>) -> Finding {
    let Some(bin) = bin else {
        return Finding::bad(
            Severity::Notice,
            Subject::KillHost,
            "kill_host_bin",
            "not configured: a host that does not answer is waited for until its lease is over",
            "in [monitor]: kill_host_bin = \"/usr/local/sbin/kill_host\", a program that switches a host off",
        );
    };
    let tried = format!("whether kill_host_bin {} can be run", bin.display());
    let bad = |found: String| {
        let cure = format!("chmod 755 {}, or correct kill_host_bin in [monitor]", bin.display());
        Finding::bad(Severity::Error, Subject::KillHost, tried.clone(), found, cure)
    };
    match std::fs::metadata(bin) {
        Err(e) => bad(e.to_string()),
        Ok(file) if !file.is_file() => bad("it is no file".to_owned()),
        Ok(_) => match access(bin, AccessFlags::X_OK) {
            Ok(()) => Finding::ok(Subject::KillHost, tried.clone(), "it can (it was not run)"),
            Err(e) => bad(e.to_string()),
        },
    }
}

/// The monitor does nothing while none of them answers, so each should.
async fn ping_ips(ips: &[IpAddr]) -> Vec<Finding> {
    let pings = Arc::new(Pings::new());
    let mut asked = JoinSet::new();
    for ip in ips.iter().copied() {
        let pings = Arc::clone(&pings);
        asked.spawn(async move { (ip, pings.check(ip, Instant::now() + PING, PING).await) });
    }
    let mut answers: Vec<(IpAddr, CheckResult)> = Vec::new();
    while let Some(answer) = asked.join_next().await {
        answers.extend(answer.ok());
    }
    answers.sort_by_key(|(ip, _)| *ip);
    let none = !answers.iter().any(|(_, result)| matches!(result, CheckResult::Ok(_)));
    answers
        .into_iter()
        .map(|(ip, result)| {
            let tried = format!("pinging {ip} of ping_ips");
            match result {
                CheckResult::Ok(_) => Finding::ok(Subject::PingIps, tried, "it answers"),
                CheckResult::Error(why) | CheckResult::Unknown(why) => {
                    let severity = if none { Severity::Error } else { Severity::Warning };
                    let cure = "name addresses in ping_ips that always answer, as the gateway's";
                    Finding::bad(severity, Subject::PingIps, tried, why, cure)
                }
            }
        })
        .collect()
}

/// What the other hosts have executed and the active master has not. Its position is read after theirs, so what was
/// written meanwhile does not look like an extra.
async fn errant(cluster: &Cluster, writer: Option<&HostName>, facts: &BTreeMap<HostName, Facts>) -> Vec<Finding> {
    let Some((name, host)) = writer.and_then(|w| cluster.hosts.get_key_value(w)) else { return Vec::new() };
    let Some(server) = facts.get(name).and_then(|f| f.server.as_ref()) else { return Vec::new() };
    let executed = facts.iter().filter_map(|(other, f)| Some((other, f.server.as_ref()?.executed.as_ref()?)));
    let others: Vec<(&HostName, &Gtids)> = executed.filter(|(other, _)| *other != name).collect();
    let mut session = Session::new(host);
    let asked = timeout(LOGIN, has_executed(&mut session, server.mariadb)).await;
    let now = match asked {
        Ok(Ok(now)) => now,
        // What stands in the way is told by the finding about monitor_user.
        Ok(Err(_)) | Err(_) => return Vec::new(),
    };
    others.into_iter().map(|(other, its)| compare::errant(other, its, name, &now)).collect()
}

async fn has_executed(session: &mut Session, mariadb: bool) -> Result<Gtids, String> {
    let sql = if mariadb {
        "SELECT @@GLOBAL.gtid_binlog_state, @@GLOBAL.gtid_slave_pos"
    } else {
        "SELECT @@GLOBAL.gtid_executed, ''"
    };
    let rows = session.query(sql).await.map_err(Trouble::text)?;
    let column = |row: &Row, at: usize| row.as_ref(at).and_then(text).unwrap_or_default();
    let row = rows.first().ok_or("no row")?;
    Ok(if mariadb {
        let state: mmm_common::gtid::MariaGtids = column(row, 0).parse()?;
        Gtids::MariaDb(state.union(&column(row, 1).parse()?))
    } else {
        Gtids::MySql(column(row, 0).parse()?)
    })
}

#[cfg(test)]
mod tests;

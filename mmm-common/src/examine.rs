//! What `mmm_control doctor` finds: one finding for each thing looked at, and what the hosts tell of themselves so that
//! the monitor can compare them.
//!
//! A finding names the cure as it is to be typed: a statement, or a line of a configuration file. No password is ever in
//! one. The names of subjects and severities are stable: scripts read them.

use crate::config::Cluster;
use crate::gtid::Gtids;
use crate::ids::HostName;
use crate::state::HostMode;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// How bad it is. In this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Ok,
    /// Nothing is wrong; it is good to know.
    Notice,
    /// Something works worse than it could: slower, or with less certainty.
    Warning,
    /// Something that is relied on does not work.
    Error,
}

macro_rules! subjects {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// What was looked at.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Subject {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)*
        }

        impl Subject {
            pub const ALL: &[Subject] = &[$(Subject::$variant),*];

            pub fn as_str(self) -> &'static str {
                match self { $(Subject::$variant => $name),* }
            }
        }
    };
}

subjects! {
    /// It answers, is of this version, and obeys this monitor.
    Agent = "agent",
    /// TCP from agent to agent.
    AgentPort = "agent_port",
    AgentUser = "agent_user",
    /// Announcements of addresses leave this host, and are heard by the others.
    Arp = "arp",
    AutoIncrement = "auto_increment",
    BinlogFormat = "binlog_format",
    BinlogRetention = "binlog_retention",
    Capabilities = "capabilities",
    Clock = "clock",
    /// The tools for copying a host anew.
    Clone = "clone",
    /// All hosts read the same mmm_common.toml.
    Configuration = "configuration",
    /// What a crash of the machine may cost.
    Durability = "durability",
    ErrantTransactions = "errant_transactions",
    EventScheduler = "event_scheduler",
    Filters = "filters",
    Gtid = "gtid",
    GtidDomainId = "gtid_domain_id",
    GtidStrictMode = "gtid_strict_mode",
    InitRplRole = "init_rpl_role",
    Interface = "interface",
    Kernel = "kernel",
    KillHost = "kill_host",
    LogBin = "log_bin",
    LogSlaveUpdates = "log_slave_updates",
    MaxConnections = "max_connections",
    MonitorUser = "monitor_user",
    PingIps = "ping_ips",
    ReadOnly = "read_only",
    RelayLogRecovery = "relay_log_recovery",
    Replication = "replication",
    ReplicationUser = "replication_user",
    Semisync = "semisync",
    /// The local server answers.
    Server = "server",
    ServerId = "server_id",
    SkipErrors = "skip_errors",
    SlaveNetTimeout = "slave_net_timeout",
    Version = "version",
    Watchdog = "watchdog",
}

/// One thing that was looked at on one host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// None: the monitor's own machine.
    pub host: Option<HostName>,
    pub subject: Subject,
    pub severity: Severity,
    pub tried: String,
    pub found: String,
    /// What to do about it; empty when there is nothing to do.
    pub cure: String,
}

impl Finding {
    pub fn ok(subject: Subject, tried: impl Into<String>, found: impl Into<String>) -> Self {
        Finding {
            host: None,
            subject,
            severity: Severity::Ok,
            tried: tried.into(),
            found: found.into(),
            cure: String::new(),
        }
    }

    pub fn bad(
        severity: Severity,
        subject: Subject,
        tried: impl Into<String>,
        found: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Finding { severity, cure: cure.into(), ..Finding::ok(subject, tried, found) }
    }

    #[must_use]
    pub fn on(mut self, host: &HostName) -> Self {
        self.host = Some(host.clone());
        self
    }
}

impl Severity {
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Ok => "ok",
            Severity::Notice => "notice",
            Severity::Warning => "warning",
            Severity::Error => "error",
        }
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What an agent found on its own machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Examined {
    pub findings: Vec<Finding>,
    pub facts: Facts,
}

/// What only a comparison of the hosts can judge.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The agent's version.
    pub version: String,
    /// As [`cluster_words`] gives it.
    pub cluster: BTreeMap<String, String>,
    /// None: the server did not let the agent look.
    pub server: Option<ServerFacts>,
    /// Hosts whose announcements arrived here during the examination; None: it could not be listened.
    pub heard: Option<Vec<HostName>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerFacts {
    pub mariadb: bool,
    pub version: String,
    pub server_id: u64,
    /// MySQL.
    pub server_uuid: Option<String>,
    /// MariaDB.
    pub gtid_domain_id: Option<u64>,
    pub auto_increment_increment: u64,
    pub auto_increment_offset: u64,
    pub writable: bool,
    /// Where the default replication connection leads to, running or not.
    pub source: Option<SourceFacts>,
    pub executed: Option<Gtids>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFacts {
    pub host: String,
    pub port: u16,
}

impl SourceFacts {
    pub fn is(&self, at: SocketAddr) -> bool {
        self.port == at.port() && self.host.parse::<IpAddr>().is_ok_and(|ip| ip == at.ip())
    }
}

/// What every host must have read the same in mmm_common.toml, without passwords: option and value, in words.
pub fn cluster_words(cluster: &Cluster) -> BTreeMap<String, String> {
    let mut words: BTreeMap<String, String> = [
        ("active_master_role", cluster.active_master_role.to_string()),
        ("lease_ttl", format!("{:?}", cluster.lease_ttl)),
        ("heartbeat_interval", format!("{:?}", cluster.heartbeat_interval)),
        ("move_grace", format!("{:?}", cluster.move_grace)),
        ("move_timeout", format!("{:?}", cluster.move_timeout)),
        ("drain_timeout", format!("{:?}", cluster.drain_timeout)),
        ("on_drain_timeout", format!("{:?}", cluster.on_drain_timeout).to_lowercase()),
        ("hang_timeout", format!("{:?}", cluster.hang_timeout)),
        ("restart_grace", format!("{:?}", cluster.restart_grace)),
        ("require_semisync", cluster.require_semisync.to_string()),
        ("semisync_slaves", cluster.semisync_slaves.to_string()),
        ("auto_reclone", cluster.auto_reclone.to_string()),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect();
    for (name, host) in &cluster.hosts {
        let peer = host.peer.as_ref().map_or(String::new(), |peer| format!(", peer {peer}"));
        let text =
            format!("{} {}{peer}, agent_port {}, mysql_port {}", host.mode, host.ip, host.agent_port, host.mysql_port);
        words.insert(format!("[host.{name}]"), text);
    }
    for (name, role) in &cluster.roles {
        let hosts: Vec<&str> = role.hosts.iter().map(HostName::as_str).collect();
        let ips: Vec<String> = role.ips.iter().map(ToString::to_string).collect();
        words.insert(format!("[role.{name}]"), format!("hosts {}; ips {}", hosts.join(" "), ips.join(" ")));
    }
    words
}

/// The hosts that may hold the writer role, by what the configuration says of them.
pub fn masters(cluster: &Cluster) -> Vec<&HostName> {
    cluster.hosts.iter().filter(|(_, host)| host.mode == HostMode::Master).map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Host, Secret};

    #[test]
    fn names_are_stable_and_each_is_its_own() {
        let finding = Finding::bad(Severity::Error, Subject::LogBin, "@@log_bin", "OFF", "log_bin").on(&"db1".into());
        assert_eq!(
            serde_json::to_string(&finding).unwrap(),
            r#"{"host":"db1","subject":"log_bin","severity":"error","tried":"@@log_bin","found":"OFF","cure":"log_bin"}"#
        );
        for subject in Subject::ALL {
            assert_eq!(serde_json::to_string(subject).unwrap(), format!("\"{subject}\""));
        }
        let names: std::collections::BTreeSet<&str> = Subject::ALL.iter().map(|s| s.as_str()).collect();
        assert_eq!(names.len(), Subject::ALL.len());
        assert!(Severity::Error > Severity::Warning && Severity::Notice > Severity::Ok);
    }

    #[test]
    fn every_subject_is_in_the_documentation() {
        let page = include_str!("../../docs/doctor.md");
        for subject in Subject::ALL {
            assert!(page.contains(&format!("\n| `{subject}` | ")), "{subject} is missing in docs/doctor.md");
        }
    }

    #[test]
    fn no_password_is_among_the_words() {
        let host = Host {
            replication_password: Secret("geheim".into()),
            ..Host::of("10.0.0.1".parse().unwrap(), HostMode::Master, Some("db2".into()))
        };
        let mut cluster = Cluster::of([("db1".into(), host)].into(), BTreeMap::new());
        let before = cluster_words(&cluster);
        assert!(!format!("{before:?}").contains("geheim"));
        assert_eq!(before["lease_ttl"], "3s");
        cluster.lease_ttl *= 2;
        assert_ne!(cluster_words(&cluster), before, "a difference shows");
    }
}

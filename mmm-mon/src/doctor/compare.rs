//! What only a comparison of the hosts shows. Pure: what the agents told goes in, findings come out.

use mmm_common::config::Cluster;
use mmm_common::examine::{Facts, Finding, ServerFacts, Severity, Subject, cluster_words, masters};
use mmm_common::gtid::Gtids;
use mmm_common::ids::HostName;
use mmm_common::state::HostMode;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

pub(super) struct Compared {
    pub(super) findings: Vec<Finding>,
    /// The one writable master, if there is exactly one.
    pub(super) writer: Option<HostName>,
}

type Hosts = BTreeMap<HostName, Facts>;
type Servers<'a> = BTreeMap<&'a HostName, &'a ServerFacts>;

pub(super) fn judge(cluster: &Cluster, hosts: &Hosts) -> Compared {
    let servers: Servers = hosts.iter().filter_map(|(name, f)| Some((name, f.server.as_ref()?))).collect();
    let writable: Vec<&HostName> = servers.iter().filter(|(_, s)| s.writable).map(|(name, _)| *name).collect();
    let writer = match writable.as_slice() {
        [one] if masters(cluster).contains(one) => Some(*one),
        _ => None,
    };
    let mut findings = Vec::new();
    for (name, facts) in hosts {
        findings.push(configuration(cluster, facts).on(name));
        findings.push(agent_version(facts).on(name));
    }
    findings.extend(announcements(hosts));
    for (name, server) in &servers {
        findings.extend(identity(name, server, &servers).into_iter().map(|f| f.on(name)));
        findings.push(dialect(server, writer.and_then(|w| servers.get(w).copied()), &servers).on(name));
        findings.push(writing(cluster, name, server, &writable).on(name));
        findings.push(replication(cluster, name, server, writer).on(name));
    }
    let masters: Servers =
        servers.iter().filter(|(n, _)| mode(cluster, n) == Some(HostMode::Master)).map(|(n, s)| (*n, *s)).collect();
    findings.extend(auto_increment(&masters));
    findings.extend(versions(&masters, &servers));
    Compared { findings, writer: writer.cloned() }
}

fn mode(cluster: &Cluster, name: &HostName) -> Option<HostMode> {
    cluster.hosts.get(name).map(|h| h.mode)
}

fn configuration(cluster: &Cluster, facts: &Facts) -> Finding {
    let tried = "its mmm_common.toml against the monitor's";
    let (ours, theirs) = (cluster_words(cluster), &facts.cluster);
    let names: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    let differences: Vec<String> = names
        .into_iter()
        .filter(|name| ours.get(*name) != theirs.get(*name))
        .map(|name| {
            let word = |words: &BTreeMap<String, String>| words.get(name).cloned().unwrap_or("nothing".to_owned());
            format!("{name}: the monitor has {}, this host {}", word(&ours), word(theirs))
        })
        .collect();
    if differences.is_empty() {
        return Finding::ok(Subject::Configuration, tried, "the same");
    }
    let cure = "copy one mmm_common.toml to all hosts, then: systemctl reload mmm_agentd (mmm_mond)";
    Finding::bad(Severity::Error, Subject::Configuration, tried, differences.join("; "), cure)
}

fn agent_version(facts: &Facts) -> Finding {
    let ours = env!("CARGO_PKG_VERSION");
    let tried = "the agent's version";
    if facts.version == ours {
        return Finding::ok(Subject::Agent, tried, ours);
    }
    let found = format!("{}, the monitor's is {ours}", facts.version);
    Finding::bad(Severity::Notice, Subject::Agent, tried, found, "install one version everywhere")
}

/// Each host that spoke should have been heard by each that listened.
fn announcements(hosts: &Hosts) -> Vec<Finding> {
    let listened = hosts.iter().filter_map(|(name, facts)| Some((name, facts.heard.as_ref()?)));
    let spoke: BTreeSet<&HostName> = listened.clone().map(|(name, _)| name).collect();
    let tried = "hearing the announcements of the other hosts";
    listened
        .filter(|_| spoke.len() > 1)
        .map(|(name, heard)| {
            let missed: Vec<&str> =
                spoke.iter().filter(|o| **o != name && !heard.contains(o)).map(|o| o.as_str()).collect();
            let finding = if missed.is_empty() {
                Finding::ok(Subject::Arp, tried, "all were heard")
            } else {
                let found = format!("nothing was heard of {}", missed.join(", "));
                let cure = "put all hosts of a role into one layer-2 network, and let ARP through its switches: where \
                            announcements do not arrive, clients go on to the old host";
                Finding::bad(Severity::Warning, Subject::Arp, tried, found, cure)
            };
            finding.on(name)
        })
        .collect()
}

/// Names that every server must have for itself, and the one that all share.
fn identity(name: &HostName, server: &ServerFacts, servers: &Servers) -> Vec<Finding> {
    let same = |equal: &dyn Fn(&ServerFacts) -> bool| -> Vec<&str> {
        servers.iter().filter(|(other, s)| **other != name && equal(s)).map(|(other, _)| other.as_str()).collect()
    };
    let mut findings = Vec::new();
    let id = server.server_id;
    let twins = same(&|s| s.server_id == id);
    findings.push(if twins.is_empty() {
        Finding::ok(Subject::ServerId, "server_id of all hosts", format!("{id}, nobody else's"))
    } else {
        let free = (1..).find(|n| servers.values().all(|s| s.server_id != *n)).unwrap_or(0);
        let found = format!("{id}, as {}: they ignore each other's transactions", twins.join(", "));
        let cure = format!("SET GLOBAL server_id={free}; my.cnf [mysqld]: server_id={free}");
        Finding::bad(Severity::Error, Subject::ServerId, "server_id of all hosts", found, cure)
    });
    if let Some(uuid) = &server.server_uuid {
        let twins = same(&|s| s.server_uuid.as_ref() == Some(uuid));
        if !twins.is_empty() {
            let found = format!("{uuid}, as {}", twins.join(", "));
            let cure = "stop the server, remove auto.cnf from its data directory, start it";
            findings.push(Finding::bad(Severity::Error, Subject::ServerId, "server_uuid of all hosts", found, cure));
        }
    }
    if let Some(domain) = server.gtid_domain_id {
        // What most have; of equals the lowest.
        let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
        servers.values().filter_map(|s| s.gtid_domain_id).for_each(|d| *counts.entry(d).or_default() += 1);
        let usual = counts.into_iter().max_by_key(|(d, n)| (*n, std::cmp::Reverse(*d))).map_or(domain, |(d, _)| d);
        let tried = "gtid_domain_id of all hosts";
        findings.push(if domain == usual {
            Finding::ok(Subject::GtidDomainId, tried, domain.to_string())
        } else {
            let found = format!("{domain}, other hosts have {usual}: with two domains there is no one order");
            let cure = format!("SET GLOBAL gtid_domain_id={usual}; my.cnf [mysqld]: gtid_domain_id={usual}");
            Finding::bad(Severity::Error, Subject::GtidDomainId, tried, found, cure)
        });
    }
    findings
}

fn dialect(server: &ServerFacts, writer: Option<&ServerFacts>, servers: &Servers) -> Finding {
    let tried = "MariaDB or MySQL, on all hosts";
    let word = |mariadb| if mariadb { "MariaDB" } else { "MySQL" };
    let wanted = writer.or(servers.values().next().copied()).is_none_or(|s| s.mariadb == server.mariadb);
    if wanted {
        return Finding::ok(Subject::Version, tried, word(server.mariadb));
    }
    let found = format!("{}, and the others are {}", word(server.mariadb), word(!server.mariadb));
    Finding::bad(Severity::Error, Subject::Version, tried, found, "run one kind of server in a cluster")
}

fn writing(cluster: &Cluster, name: &HostName, server: &ServerFacts, writable: &[&HostName]) -> Finding {
    let (subject, tried) = (Subject::ReadOnly, "which hosts can be written to");
    let cure = "SET GLOBAL read_only=1 (and start mmm_agentd there, which keeps it so)";
    if server.writable && mode(cluster, name) != Some(HostMode::Master) {
        return Finding::bad(Severity::Error, subject, tried, "this host is no master and can be written to", cure);
    }
    match (server.writable, writable) {
        (true, [_]) => Finding::ok(subject, tried, "this host only"),
        (true, _) => {
            let all: Vec<&str> = writable.iter().map(|w| w.as_str()).collect();
            let found = format!("{} at once", all.join(" and "));
            Finding::bad(Severity::Error, subject, tried, found, format!("on all but the active master: {cure}"))
        }
        (false, []) => {
            let cure = "when the cluster should serve: mmm_control set_online for each host, and look at show";
            Finding::bad(Severity::Notice, subject, tried, "none, so extra transactions are not looked for", cure)
        }
        (false, _) => Finding::ok(subject, tried, "not this one"),
    }
}

/// Whether replication leads to where it should; whether it runs is the agent's finding.
fn replication(cluster: &Cluster, name: &HostName, server: &ServerFacts, writer: Option<&HostName>) -> Finding {
    let (subject, tried) = (Subject::Replication, "whom this host replicates from");
    let is_writer = writer == Some(name);
    let at = |host: &HostName| cluster.hosts.get(host).map(|h| SocketAddr::new(h.ip, h.mysql_port));
    let peer = cluster.hosts.get(name).and_then(|h| h.peer.as_ref());
    // For a cure: the active master; its own peer for itself, and for the others while nobody is writable.
    let wanted = writer.filter(|w| *w != name).or(peer).or(masters(cluster).into_iter().find(|m| *m != name));
    let cure = wanted.and_then(at).map_or(String::new(), |at| follow(server.mariadb, at));
    let Some(source) = &server.source else {
        return if is_writer && server.mariadb {
            Finding::ok(subject, tried, "nobody, as an active MariaDB master should")
        } else if is_writer {
            let found = "nobody: after the next failover it would have to be set up first";
            Finding::bad(Severity::Warning, subject, tried, found, cure)
        } else {
            Finding::bad(Severity::Error, subject, tried, "nobody: it has nothing of what is written", cure)
        };
    };
    let host = cluster.hosts.keys().find(|other| at(other).is_some_and(|at| source.is(at)));
    match host {
        Some(host) if host == name => {
            Finding::bad(Severity::Error, subject, tried, "from itself", format!("STOP SLAVE; {cure}"))
        }
        None => {
            let found = format!("{}:{}, which is no host of this cluster", source.host, source.port);
            let severity = if is_writer { Severity::Warning } else { Severity::Error };
            Finding::bad(severity, subject, tried, found, cure)
        }
        Some(host) if mode(cluster, host) != Some(HostMode::Master) => {
            Finding::bad(Severity::Error, subject, tried, format!("{host}, which is no master"), cure)
        }
        Some(host) if !is_writer && writer.is_some_and(|w| w != host) => {
            Finding::bad(Severity::Error, subject, tried, format!("{host}, which is not the active master"), cure)
        }
        Some(host) => Finding::ok(subject, tried, host.to_string()),
    }
}

/// The passwords are for the operator to fill in.
fn follow(mariadb: bool, at: SocketAddr) -> String {
    let (ip, port) = (at.ip(), at.port());
    let login = |word: &str| format!("{word}_USER='<replication_user>', {word}_PASSWORD='<replication_password>'");
    if mariadb {
        format!(
            "CHANGE MASTER TO MASTER_HOST='{ip}', MASTER_PORT={port}, {}, MASTER_USE_GTID=slave_pos; START SLAVE",
            login("MASTER")
        )
    } else {
        format!(
            "CHANGE REPLICATION SOURCE TO SOURCE_HOST='{ip}', SOURCE_PORT={port}, {}, SOURCE_AUTO_POSITION=1, \
             SOURCE_RETRY_COUNT=86400, GET_SOURCE_PUBLIC_KEY=1; START REPLICA",
            login("SOURCE")
        )
    }
}

/// Two masters must never give the same number: after a crash, extra rows of the one would stand in the other's way.
fn auto_increment(masters: &Servers) -> Vec<Finding> {
    let (subject, tried) =
        (Subject::AutoIncrement, "auto_increment_increment and auto_increment_offset of all masters");
    let count = masters.len();
    masters
        .iter()
        .enumerate()
        .map(|(number, (name, server))| {
            let (step, first) = (server.auto_increment_increment, server.auto_increment_offset);
            let meets: Vec<&str> = masters
                .iter()
                .filter(|(other, s)| *other != name && share_numbers((step, first), sequence(s)))
                .map(|(other, _)| other.as_str())
                .collect();
            let finding = if meets.is_empty() {
                Finding::ok(subject, tried, format!("increment {step}, offset {first}"))
            } else {
                let found = format!("increment {step}, offset {first}: numbers that {} gives too", meets.join(", "));
                let offset = number + 1;
                let cure = format!(
                    "SET GLOBAL auto_increment_increment={count}; SET GLOBAL auto_increment_offset={offset}; my.cnf \
                     [mysqld]: auto_increment_increment={count}, auto_increment_offset={offset}"
                );
                Finding::bad(Severity::Warning, subject, tried, found, cure)
            };
            finding.on(name)
        })
        .collect()
}

fn sequence(server: &ServerFacts) -> (u64, u64) {
    (server.auto_increment_increment, server.auto_increment_offset)
}

/// An offset beyond the increment is ignored by the servers, which then count from 1.
fn share_numbers(a: (u64, u64), b: (u64, u64)) -> bool {
    let start = |(step, first): (u64, u64)| if first > step { 1 } else { first };
    let mut step = (a.0.max(1), b.0.max(1));
    while step.1 != 0 {
        step = (step.1, step.0 % step.1);
    }
    start(a).abs_diff(start(b)).is_multiple_of(step.0)
}

/// A replica can read what an older or equal server writes, not what a newer one does.
fn versions(masters: &Servers, servers: &Servers) -> Vec<Finding> {
    let tried = "whether every host can read what this one would write";
    masters
        .iter()
        .map(|(name, master)| {
            let older: Vec<String> = servers
                .iter()
                .filter(|(_, s)| s.mariadb == master.mariadb && release(&s.version) < release(&master.version))
                .map(|(other, s)| format!("{other} ({})", s.version))
                .collect();
            let finding = if older.is_empty() {
                Finding::ok(Subject::Version, tried, master.version.clone())
            } else {
                let found = format!("{} is newer than {}", master.version, older.join(", "));
                let cure = "bring those to this version before this host becomes the writer";
                Finding::bad(Severity::Warning, Subject::Version, tried, found, cure)
            };
            finding.on(name)
        })
        .collect()
}

/// `10.11` of `10.11.6-MariaDB`.
fn release(version: &str) -> (u32, u32) {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// What `host` has executed and the active master, asked afterwards, has not.
pub(super) fn errant(host: &HostName, its: &Gtids, writer: &HostName, writers: &Gtids) -> Finding {
    let (subject, tried) = (Subject::ErrantTransactions, format!("transactions that {writer} lacks"));
    let finding = match writers.missing(its) {
        Some(0) => Finding::ok(subject, tried, "none"),
        Some(n) => {
            let found = format!("{n}; executed here: {its}; on {writer}: {writers}");
            let cure = match its {
                Gtids::MariaDb(_) => {
                    format!("mmm_control lost {host}, then mmm_control reclone {host} --from {writer}")
                }
                Gtids::MySql(_) => format!(
                    "if they changed nothing that counts, on {writer} for each GTID of GTID_SUBTRACT('{its}', \
                     @@gtid_executed): SET gtid_next='<gtid>'; BEGIN; COMMIT; SET gtid_next='AUTOMATIC'; else \
                     mmm_control lost {host}, then mmm_control reclone {host} --from {writer}"
                ),
            };
            Finding::bad(Severity::Error, subject, tried, found, cure)
        }
        None => {
            Finding::bad(Severity::Error, subject, tried, "GTIDs of another kind of server", "run one kind of server")
        }
    };
    finding.on(host)
}

#[cfg(test)]
mod tests;

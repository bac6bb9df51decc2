//! Mistakes that lie between options: each value is possible, but together they cannot be meant.
//!
//! Pure: a configuration in, findings out. A finding names the options it follows from, so that the parser can show
//! its line, and leave it out when one of them could not be read in the first place.

use super::suggest::known;
use super::{Agent, Cluster, Host, Monitor, Role};
use crate::ids::HostName;
use crate::state::{HostMode, RoleMode};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

/// A lease survives the loss of this many renewals, less one.
const HEARTBEATS_PER_LEASE: u32 = 4;

/// An option in its section: `("host.db1", "peer")`. The section is empty for the top of a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    pub section: String,
    pub key: &'static str,
}

/// Something that cannot be meant, and the cure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The options it follows from, the one to change first.
    pub about: Vec<At>,
    pub text: String,
}

/// What is wrong with the monitor's configuration, the cluster included.
pub fn monitor(monitor: &Monitor) -> Vec<Finding> {
    let mut found = cluster(&monitor.cluster);
    plaintext(&mut found, &monitor.cluster, monitor.ip, at("monitor", "ip"), "mmm_mond", "monitor.ip");
    if monitor.ping_ips.is_empty() {
        found.push(finding(
            [at("monitor", "ping_ips")],
            "ping_ips is empty, so the monitor could never tell a dead host from its own dead network: name addresses \
             that always answer, such as the gateway's",
        ));
    }
    for (ip, role) in monitor.cluster.addresses() {
        if monitor.ping_ips.contains(&ip) {
            let text =
                format!("ping_ips holds {ip}, an address of role '{role}', which moves: name fixed addresses only");
            found.push(finding([at("monitor", "ping_ips"), in_role(role.as_str(), "ips")], text));
        }
        if monitor.ip == ip {
            let text =
                format!("the monitor's ip {ip} is an address of role '{role}', which moves: give it one of its own");
            found.push(finding([at("monitor", "ip"), in_role(role.as_str(), "ips")], text));
        }
    }
    for (name, host) in &monitor.cluster.hosts {
        if monitor.ip != host.ip {
            continue;
        }
        for (key, port) in [("agent_port", host.agent_port), ("mysql_port", host.mysql_port)] {
            if port == monitor.port {
                let text =
                    format!("the monitor's port {port} is also the {key} of '{name}' on the same ip: change one");
                found.push(finding([at("monitor", "port"), in_host(name, key)], text));
            }
        }
    }
    never_zero(
        &mut found,
        "monitor",
        &[("ping_interval", monitor.ping_interval), ("flap_duration", monitor.flap_duration)],
    );
    for (kind, check) in &monitor.checks {
        let section = format!("check.{kind}");
        never_zero(
            &mut found,
            &section,
            &[("check_period", check.check_period), ("trap_period", check.trap_period), ("timeout", check.timeout)],
        );
        for (key, least) in [("check_period", check.check_period), ("timeout", check.timeout)] {
            if check.trap_period < least && !check.trap_period.is_zero() {
                // Without the check's name: what stands in [check.default] is then said once.
                let text = format!(
                    "trap_period {} is shorter than {key} {}: a single late answer would count as a failure; \
                     make trap_period at least as long, better three times that",
                    shown(check.trap_period),
                    shown(least)
                );
                found.push(finding([at(&section, "trap_period"), at(&section, key)], text));
            }
        }
    }
    found
}

/// What is wrong with an agent's configuration, the cluster included.
pub fn agent(agent: &Agent) -> Vec<Finding> {
    let mut found = cluster(&agent.cluster);
    match agent.cluster.hosts.get(&agent.this) {
        Some(host) => {
            let what = format!("the ip of '{}'", agent.this);
            plaintext(&mut found, &agent.cluster, host.ip, in_host(&agent.this, "ip"), "mmm_agentd", &what);
        }
        None => {
            let text = format!("this = \"{}\" is not a host of the cluster: {}", agent.this, hosts_of(&agent.cluster));
            found.push(finding([at("", "this")], text));
        }
    }
    let lease = agent.cluster.lease_ttl;
    if !agent.exact_guard && (Cluster::SHORTEST_TTL..Cluster::SHORTEST_UNGUARDED_TTL).contains(&lease) {
        let text = format!(
            "lease_ttl is {}, which needs the exact guard, and exact_guard is false: without it the kernel may remove an \
             address up to 1 s late. Turn it on, or make lease_ttl {} or longer",
            shown(lease),
            shown(Cluster::SHORTEST_UNGUARDED_TTL)
        );
        found.push(finding([at("agent", "exact_guard"), at("", "lease_ttl")], text));
    }
    found
}

/// What is wrong with the part that all hosts share.
pub fn cluster(cluster: &Cluster) -> Vec<Finding> {
    let mut found = Vec::new();
    times(&mut found, cluster);
    writer(&mut found, cluster);
    for (name, host) in &cluster.hosts {
        peers(&mut found, cluster, name, host);
        if host.agent_port == host.mysql_port {
            let text = format!("'{name}' has the same agent_port and mysql_port {}: change one", host.agent_port);
            found.push(finding([in_host(name, "agent_port"), in_host(name, "mysql_port")], text));
        }
        if name.as_str() == "all" {
            // `mmm_control checks all` means every host.
            found.push(finding(
                [in_host(name, "")],
                "a host cannot be called 'all': mmm_control means every host by it",
            ));
        }
    }
    for (name, role) in &cluster.roles {
        one_role(&mut found, cluster, name.as_str(), role);
    }
    addresses(&mut found, cluster);
    found
}

fn times(found: &mut Vec<Finding>, cluster: &Cluster) {
    let lease = cluster.lease_ttl;
    let heartbeat = cluster.heartbeat_interval;
    never_zero(
        found,
        "",
        &[
            ("heartbeat_interval", heartbeat),
            ("move_timeout", cluster.move_timeout),
            ("drain_timeout", cluster.drain_timeout),
            ("hang_timeout", cluster.hang_timeout),
        ],
    );
    if lease < Cluster::SHORTEST_TTL {
        let text = format!(
            "lease_ttl is {}, and the margin that is waited out besides it 200 ms: less than {} gains nothing, and a \
             healthy host would lose its roles by a hiccup of the network",
            shown(lease),
            shown(Cluster::SHORTEST_TTL)
        );
        found.push(finding([at("", "lease_ttl")], text));
    }
    if lease > Cluster::LONGEST_TTL {
        let text = format!(
            "lease_ttl is {}, but over longer than {} the clocks of two machines may drift apart by more than is allowed for: \
             make it {} or shorter",
            shown(lease),
            shown(Cluster::LONGEST_TTL),
            shown(Cluster::LONGEST_TTL)
        );
        found.push(finding([at("", "lease_ttl")], text));
    }
    if lease < heartbeat.saturating_mul(HEARTBEATS_PER_LEASE) {
        let text = format!(
            "lease_ttl is {} and heartbeat_interval {}: a few lost messages would take a healthy \
             host's roles away; make lease_ttl at least {HEARTBEATS_PER_LEASE} times heartbeat_interval",
            shown(lease),
            shown(heartbeat)
        );
        found.push(finding([at("", "lease_ttl"), at("", "heartbeat_interval")], text));
    }
}

fn writer(found: &mut Vec<Finding>, cluster: &Cluster) {
    let name = &cluster.active_master_role;
    let Some(role) = cluster.roles.get(name) else {
        let roles = known(cluster.roles.keys().map(|role| role.as_str()));
        let text = format!("active_master_role is '{name}', but there is no [role.{name}]: {roles}");
        return found.push(finding([at("", "active_master_role")], text));
    };
    if role.mode != RoleMode::Exclusive {
        let text =
            format!("role '{name}' is the active_master_role, so it has one writer: make it mode = \"exclusive\"");
        found.push(finding([in_role(name.as_str(), "mode")], text));
    }
    for host in &role.hosts {
        if cluster.hosts.get(host).is_some_and(|h| h.mode == HostMode::Slave) {
            let text = format!(
                "'{host}' is a slave and cannot hold the active_master_role '{name}': take it out of hosts, or make it a \
                 master with a peer"
            );
            found.push(finding([in_role(name.as_str(), "hosts"), in_host(host, "mode")], text));
        }
    }
}

fn peers(found: &mut Vec<Finding>, cluster: &Cluster, name: &HostName, host: &Host) {
    let about = |other: &HostName, key| [in_host(name, "peer"), in_host(name, "mode"), in_host(other, key)];
    let peer = match (host.mode, &host.peer) {
        (HostMode::Slave, None) => return,
        (HostMode::Slave, Some(peer)) => {
            let text = format!("'{name}' is a slave and has no peer: leave peer = \"{peer}\" out, or make it a master");
            return found.push(finding(about(name, "mode"), text));
        }
        // More than two need none: all others replicate from the active one.
        (HostMode::Master, None) if cluster.hosts.values().filter(|h| h.mode == HostMode::Master).count() > 2 => return,
        (HostMode::Master, None) => {
            let text = format!("'{name}' is a master without a peer: name the other master, as in peer = \"db2\"");
            return found.push(finding(about(name, "mode"), text));
        }
        (HostMode::Master, Some(peer)) => peer,
    };
    if peer == name {
        let text = format!("'{name}' is its own peer: name the other master");
        return found.push(finding(about(name, "peer"), text));
    }
    let Some(other) = cluster.hosts.get(peer) else {
        let text = format!("the peer of '{name}' is '{peer}', which is not a host: {}", hosts_of(cluster));
        return found.push(finding(about(name, "peer"), text));
    };
    if other.mode == HostMode::Slave {
        let text = format!("the peer of '{name}' is '{peer}', which is a slave: a peer is the other master");
        return found.push(finding(about(peer, "mode"), text));
    }
    // Where the other's peer cannot be one, that has been said there.
    let possible =
        |back: &HostName| back != peer && cluster.hosts.get(back).is_some_and(|h| h.mode == HostMode::Master);
    if let Some(back) = other.peer.as_ref().filter(|back| *back != name && possible(back)) {
        let text = format!("'{name}' names '{peer}' as its peer, but '{peer}' names '{back}': masters go in pairs");
        found.push(finding(about(peer, "peer"), text));
    }
}

fn one_role(found: &mut Vec<Finding>, cluster: &Cluster, name: &str, role: &Role) {
    for (i, host) in role.hosts.iter().enumerate() {
        if !cluster.hosts.contains_key(host) {
            let text = format!("role '{name}' names host '{host}', which does not exist: {}", hosts_of(cluster));
            found.push(finding([in_role(name, "hosts")], text));
        }
        if role.hosts[..i].contains(host) {
            found.push(finding([in_role(name, "hosts")], format!("role '{name}' names host '{host}' twice")));
        }
    }
    if role.hosts.is_empty() {
        let text = format!("role '{name}' has no hosts, so nobody could hold it: name some, or leave the role out");
        found.push(finding([in_role(name, "hosts")], text));
    }
    match (role.mode, role.ips.len()) {
        (RoleMode::Exclusive | RoleMode::Balanced, 0) => {
            let text = format!("role '{name}' has no ips: name its addresses, or leave the role out");
            found.push(finding([in_role(name, "ips")], text));
        }
        (RoleMode::Exclusive, 1) | (RoleMode::Balanced, _) => {}
        (RoleMode::Exclusive, several) => {
            let text = format!("role '{name}' is exclusive and has {several} ips: it has exactly one, or is balanced");
            found.push(finding([in_role(name, "ips"), in_role(name, "mode")], text));
        }
    }
    let Some(prefer) = &role.prefer else { return };
    if role.mode == RoleMode::Balanced {
        let text = format!("role '{name}' is balanced, so it can prefer no host: leave prefer = \"{prefer}\" out");
        found.push(finding([in_role(name, "prefer"), in_role(name, "mode")], text));
    }
    if !role.hosts.contains(prefer) {
        let hosts = known(role.hosts.iter().map(HostName::as_str));
        let text = format!("role '{name}' prefers '{prefer}', which is not one of its hosts: {hosts}");
        found.push(finding([in_role(name, "prefer"), in_role(name, "hosts")], text));
    }
}

/// Every address has one meaning.
fn addresses(found: &mut Vec<Finding>, cluster: &Cluster) {
    let mut hosts: BTreeMap<IpAddr, Vec<(&HostName, &Host)>> = BTreeMap::new();
    for (name, host) in &cluster.hosts {
        let same_ip = hosts.entry(host.ip).or_default();
        for (other_name, other) in same_ip.iter() {
            let ports =
                [("agent_port", host.agent_port, other.agent_port), ("mysql_port", host.mysql_port, other.mysql_port)];
            for (key, port, _) in ports.into_iter().filter(|(_, port, other)| port == other) {
                let text = format!(
                    "'{other_name}' and '{name}' have the same ip {} and the same {key} {port}: correct one ip, or give \
                     them different ports",
                    host.ip
                );
                let about =
                    [in_host(name, "ip"), in_host(other_name, "ip"), in_host(name, key), in_host(other_name, key)];
                found.push(finding(about, text));
            }
        }
        same_ip.push((name, host));
    }
    let mut roles: BTreeMap<IpAddr, &str> = BTreeMap::new();
    for (name, role) in &cluster.roles {
        let name = name.as_str();
        for ip in &role.ips {
            if let Some(other) = roles.insert(*ip, name) {
                let text = if other == name {
                    format!("role '{name}' names the address {ip} twice")
                } else {
                    format!("the address {ip} belongs to role '{other}' and to role '{name}': only one can have it")
                };
                found.push(finding([in_role(name, "ips"), in_role(other, "ips")], text));
            }
            for (host, _) in hosts.get(ip).into_iter().flatten() {
                let text = format!(
                    "role '{name}' names {ip}, which is the own ip of host '{host}': role addresses move, so they must be \
                     others"
                );
                found.push(finding([in_role(name, "ips"), in_host(host, "ip")], text));
            }
        }
    }
}

fn plaintext(found: &mut Vec<Finding>, cluster: &Cluster, ip: IpAddr, ip_at: At, daemon: &str, what: &str) {
    if !ip.is_loopback() && !cluster.insecure_plaintext {
        let text = format!(
            "{daemon} would listen on {ip} ({what}) without TLS, and whoever reaches that port could move roles: there is \
             no TLS in this version yet, so keep the port inside a trusted network and say insecure_plaintext = true, or \
             use a loopback address"
        );
        found.push(finding([at("", "insecure_plaintext"), ip_at], text));
    }
}

fn never_zero(found: &mut Vec<Finding>, section: &str, times: &[(&'static str, Duration)]) {
    for (key, _) in times.iter().filter(|(_, time)| time.is_zero()) {
        found.push(finding([at(section, key)], format!("{key} cannot be 0: give it a time such as \"1s\"")));
    }
}

fn hosts_of(cluster: &Cluster) -> String {
    known(cluster.hosts.keys().map(HostName::as_str))
}

/// As one would write it.
fn shown(time: Duration) -> String {
    if time.is_zero() { "0".to_owned() } else { format!("{time:?}") }
}

fn at(section: &str, key: &'static str) -> At {
    At { section: section.to_owned(), key }
}

fn in_host(host: &HostName, key: &'static str) -> At {
    At { section: format!("host.{host}"), key }
}

fn in_role(role: &str, key: &'static str) -> At {
    At { section: format!("role.{role}"), key }
}

fn finding(about: impl Into<Vec<At>>, text: impl Into<String>) -> Finding {
    Finding { about: about.into(), text: text.into() }
}

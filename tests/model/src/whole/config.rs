//! The cluster of layer B: two masters, with three hosts a replica too, and one address each of a writer and a reader role.
//! Default settings (interfaces.md), but that every check is made once in a step, as the heartbeat is.

use super::STEP;
use mmm_common::config::{Agent, Check, Cluster, Host, Monitor, Role};
use mmm_common::ids::HostName;
use mmm_common::state::{CheckKind, HostMode, RoleMode};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

pub(crate) const WRITER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 50));
const READER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 51));

pub(crate) fn name(host: usize) -> HostName {
    format!("db{}", host + 1).as_str().into()
}

/// Which host has this name.
pub(crate) fn place(name: &HostName) -> Option<usize> {
    (0..3).find(|host| self::name(*host) == *name)
}

pub(crate) fn ip(host: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, 11 + host as u8))
}

pub(crate) fn monitor(hosts: usize) -> Monitor {
    let names: Vec<HostName> = (0..hosts).map(name).collect();
    let mode = |i: usize| if i < 2 { HostMode::Master } else { HostMode::Slave };
    let host = |i: usize| Host::of(ip(i), mode(i), (i < 2).then(|| name(1 - i)));
    let writer = Role { mode: RoleMode::Exclusive, hosts: names[..2].to_vec(), ips: vec![WRITER], prefer: None };
    let reader = Role { mode: RoleMode::Balanced, hosts: names.clone(), ips: vec![READER], prefer: None };
    let roles = BTreeMap::from([("writer".into(), writer), ("reader".into(), reader)]);
    let check = Check {
        check_period: Duration::from_millis(STEP),
        trap_period: Duration::from_secs(3),
        timeout: Duration::from_millis(STEP),
        restart_after: 10_000,
        max_backlog: Duration::from_secs(60),
    };
    let hosts = names.iter().enumerate().map(|(i, name)| (name.clone(), host(i))).collect();
    let cluster = Cluster {
        heartbeat_interval: Duration::from_millis(STEP),
        hang_timeout: Duration::from_millis(super::HANG),
        ..Cluster::of(hosts, roles)
    };
    Monitor { checks: CheckKind::ALL.iter().map(|kind| (*kind, check.clone())).collect(), ..Monitor::of(cluster) }
}

pub(crate) fn agent(hosts: usize, this: usize) -> Agent {
    Agent::of(monitor(hosts).cluster, name(this))
}

//! The cluster of layer B: two masters, with three hosts a replica too, and one address each of a writer and a reader role.
//! Default settings (interfaces.md), but that every check is made once in a step, as the heartbeat is.

use super::STEP;
use mmm_common::config::{Agent, Check, Cluster, Host, Monitor, OnDrainTimeout, Role};
use mmm_common::ids::HostName;
use mmm_common::state::{CheckKind, HostMode, MonitorMode, RoleMode};
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
    let host = |i: usize| Host {
        ip: ip(i),
        mode: if i < 2 { HostMode::Master } else { HostMode::Slave },
        peer: (i < 2).then(|| name(1 - i)),
        cluster_interface: "eth0".into(),
        agent_port: 9989,
        mysql_port: 3306,
        agent_user: String::new(),
        agent_password: Default::default(),
        replication_user: String::new(),
        replication_password: Default::default(),
        monitor_user: String::new(),
        monitor_password: Default::default(),
    };
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
    Monitor {
        cluster: Cluster {
            active_master_role: "writer".into(),
            lease_ttl: Duration::from_secs(3),
            heartbeat_interval: Duration::from_millis(STEP),
            insecure_plaintext: true,
            move_grace: Duration::from_secs(1),
            move_timeout: Duration::from_secs(2),
            drain_timeout: Duration::from_secs(30),
            on_drain_timeout: OnDrainTimeout::Hold,
            hang_timeout: Duration::from_millis(super::HANG),
            restart_grace: Duration::ZERO,
            hosts: names.iter().enumerate().map(|(i, name)| (name.clone(), host(i))).collect(),
            roles,
        },
        ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
        port: 9988,
        status_path: "/dev/null".into(),
        ping_ips: vec![],
        ping_interval: Duration::from_secs(1),
        mode: MonitorMode::Active,
        wait_for_other_master: Duration::from_secs(120),
        careful_startup: true,
        auto_set_online: Duration::ZERO,
        flap_duration: Duration::from_secs(3600),
        flap_count: 3,
        kill_host_bin: None,
        checks: CheckKind::ALL.iter().map(|kind| (*kind, check.clone())).collect(),
    }
}

pub(crate) fn agent(hosts: usize, this: usize) -> Agent {
    Agent {
        cluster: monitor(hosts).cluster,
        this: name(this),
        state_path: "/dev/null".into(),
        mysql_socket: None,
        watchdog_device: None,
    }
}

//! The configuration of every simulated cluster: default settings (interfaces.md), one writer and three reader addresses.

use mmm_common::config::{Check, Cluster, Host, Monitor as MonitorConfig, OnDrainTimeout, Role};
use mmm_common::ids::HostName;
use mmm_common::state::{CheckKind, HostMode, MonitorMode, RoleMode};
use std::collections::BTreeMap;
use std::time::Duration;

/// The writer address of every simulated cluster.
pub const WRITER: &str = "10.0.0.50";

/// Default settings (interfaces.md); `db1` and `db2` are masters, the others slaves.
pub fn config(names: &[&str]) -> MonitorConfig {
    let hosts: BTreeMap<HostName, Host> = names
        .iter()
        .enumerate()
        .map(|(i, name)| {
            let peer = match *name {
                "db1" => Some("db2".into()),
                "db2" => Some("db1".into()),
                _ => None,
            };
            let host = Host {
                ip: format!("10.0.0.{}", 11 + i).parse().expect("an address"),
                mode: if peer.is_some() { HostMode::Master } else { HostMode::Slave },
                peer,
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
            ((*name).into(), host)
        })
        .collect();
    let writer = Role {
        mode: RoleMode::Exclusive,
        hosts: vec!["db1".into(), "db2".into()],
        ips: vec![WRITER.parse().expect("an address")],
        prefer: None,
    };
    let reader = Role {
        mode: RoleMode::Balanced,
        hosts: names.iter().map(|n| (*n).into()).collect(),
        ips: (51..54).map(|n| format!("10.0.0.{n}").parse().expect("an address")).collect(),
        prefer: None,
    };
    let check = Check {
        check_period: Duration::from_secs(1),
        trap_period: Duration::from_secs(3),
        timeout: Duration::from_secs(1),
        restart_after: 10_000,
        max_backlog: Duration::from_secs(60),
    };
    MonitorConfig {
        cluster: Cluster {
            active_master_role: "writer".into(),
            lease_ttl: Duration::from_secs(3),
            heartbeat_interval: Duration::from_millis(500),
            insecure_plaintext: true,
            move_grace: Duration::from_secs(1),
            move_timeout: Duration::from_secs(2),
            drain_timeout: Duration::from_secs(30),
            on_drain_timeout: OnDrainTimeout::Hold,
            hang_timeout: Duration::from_secs(3),
            restart_grace: Duration::ZERO,
            hosts,
            roles: BTreeMap::from([("writer".into(), writer), ("reader".into(), reader)]),
        },
        ip: "127.0.0.1".parse().expect("an address"),
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

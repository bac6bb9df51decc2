//! The configuration of every simulated cluster: default settings (interfaces.md), one writer and three reader addresses.

use mmm_common::config::{Cluster, Host, Monitor as MonitorConfig, Role};
use mmm_common::ids::HostName;
use mmm_common::state::{HostMode, RoleMode};
use std::collections::BTreeMap;

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
            let mode = if peer.is_some() { HostMode::Master } else { HostMode::Slave };
            let ip = format!("10.0.0.{}", 11 + i).parse().expect("an address");
            ((*name).into(), Host::of(ip, mode, peer))
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
    let roles = BTreeMap::from([("writer".into(), writer), ("reader".into(), reader)]);
    MonitorConfig::of(Cluster::of(hosts, roles))
}

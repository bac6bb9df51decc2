//! The configuration as the programs use it: complete, checked, every default filled in.
//!
//! [`parse`] reads the files (includes, `host.default`, durations, unknown keys with a suggestion), [`check`] finds
//! the mistakes that lie between options. Both give all mistakes at once, each with file, line and cure.

pub mod check;
mod files;
mod merged;
mod options;
pub mod parse;
mod suggest;
mod tree;
mod values;

use crate::ids::{HostName, RoleName};
use crate::state::{CheckKind, HostMode, MonitorMode, RoleMode};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// What every host knows of the cluster (`mmm_common.toml`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    pub active_master_role: RoleName,
    /// How long a host that hears nobody keeps its roles.
    pub lease_ttl: Duration,
    pub heartbeat_interval: Duration,
    pub insecure_plaintext: bool,
    pub move_grace: Duration,
    pub move_timeout: Duration,
    pub drain_timeout: Duration,
    pub on_drain_timeout: OnDrainTimeout,
    pub hang_timeout: Duration,
    pub restart_grace: Duration,
    pub hosts: BTreeMap<HostName, Host>,
    pub roles: BTreeMap<RoleName, Role>,
}

impl Cluster {
    /// What the monitor and an agent add to a ttl before they trust that a lease is over: the kernel's lateness in
    /// removing an address (up to 1.0 s), clock drift, rounding (safety.md, "margin", without the exact guard).
    pub const MARGIN: Duration = Duration::from_millis(1500);

    /// The longest `lease_ttl` that the margin is good for: two clocks may each be 1 % wrong, and the kernel takes 1.0 s of
    /// the 1.5.
    pub const LONGEST_TTL: Duration = Duration::from_secs(20);

    /// The role that carries the writer: exactly one exclusive role.
    pub fn writer(&self) -> Option<&Role> {
        self.roles.get(&self.active_master_role)
    }

    /// Every role address with its role, by address.
    pub fn addresses(&self) -> BTreeMap<IpAddr, RoleName> {
        self.roles.iter().flat_map(|(name, role)| role.ips.iter().map(|ip| (*ip, name.clone()))).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDrainTimeout {
    /// Nobody is promoted; the operator decides.
    Hold,
    /// The candidate is promoted with what it has applied, and what is missing is said.
    Promote,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    pub ip: IpAddr,
    pub mode: HostMode,
    /// The other master; masters only.
    pub peer: Option<HostName>,
    pub cluster_interface: String,
    pub agent_port: u16,
    pub mysql_port: u16,
    /// This and the next three are empty in the monitor's configuration, which needs none of them.
    pub agent_user: String,
    /// In an agent's configuration only its own host's.
    pub agent_password: Secret,
    pub replication_user: String,
    pub replication_password: Secret,
    /// Empty in an agent's configuration.
    pub monitor_user: String,
    pub monitor_password: Secret,
}

/// A password. Never shown: its Debug is `***`, and it has no Display.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    pub mode: RoleMode,
    pub hosts: Vec<HostName>,
    pub ips: Vec<IpAddr>,
    pub prefer: Option<HostName>,
}

/// `mmm_mon.toml`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Monitor {
    pub cluster: Cluster,
    pub ip: IpAddr,
    pub port: u16,
    pub status_path: PathBuf,
    pub ping_ips: Vec<IpAddr>,
    pub ping_interval: Duration,
    pub mode: MonitorMode,
    pub wait_for_other_master: Duration,
    pub careful_startup: bool,
    /// Zero: never.
    pub auto_set_online: Duration,
    pub flap_duration: Duration,
    pub flap_count: u32,
    pub kill_host_bin: Option<PathBuf>,
    /// All four kinds.
    pub checks: BTreeMap<CheckKind, Check>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub check_period: Duration,
    pub trap_period: Duration,
    pub timeout: Duration,
    /// After this many checks the checker is torn down and built anew.
    pub restart_after: u32,
    /// rep_backlog only.
    pub max_backlog: Duration,
}

/// `mmm_agent.toml`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    pub cluster: Cluster,
    pub this: HostName,
    pub state_path: PathBuf,
    pub mysql_socket: Option<PathBuf>,
    /// Held open and fed while this host may be writing; None: no such guard.
    pub watchdog_device: Option<PathBuf>,
}

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
    pub on_hang: OnHang,
    pub restart_grace: Duration,
    /// Both sides of semi-synchronous replication are switched as the roles move.
    pub semisync: bool,
    /// An automatic failover without semi-synchronous replication in effect waits for the operator.
    pub require_semisync: bool,
    /// Slaves acknowledge too.
    pub semisync_slaves: bool,
    /// A host whose extra transactions were never acknowledged is copied anew without asking.
    pub auto_reclone: bool,
    pub hosts: BTreeMap<HostName, Host>,
    pub roles: BTreeMap<RoleName, Role>,
}

impl Cluster {
    /// What the monitor and an agent add to a ttl before they trust that a lease is over: the kernel's lateness in
    /// removing an address (up to 1.0 s), clock drift, rounding (safety.md, "margin"). It is good for every host;
    /// [`Cluster::margin`] is shorter for some.
    pub const MARGIN: Duration = Duration::from_millis(1500);

    /// The longest `lease_ttl` that the margin is good for: two clocks may each be 1 % wrong, and the kernel takes 1.0 s of
    /// the 1.5.
    pub const LONGEST_TTL: Duration = Duration::from_secs(20);

    /// The same for a host whose kernel ends the answers exactly (safety.md, "The guards behind the rules", 1).
    pub const GUARDED_MARGIN: Duration = Duration::from_millis(200);

    /// The longest `lease_ttl` for which that is enough: the clocks take 120 ms of it.
    pub const LONGEST_GUARDED_TTL: Duration = Duration::from_secs(6);

    /// The shortest `lease_ttl`, for hosts with the exact guard.
    pub const SHORTEST_TTL: Duration = Duration::from_millis(300);

    /// The shortest `lease_ttl` without it: kernel lifetimes are whole seconds.
    pub const SHORTEST_UNGUARDED_TTL: Duration = Duration::from_secs(3);

    /// What is added to a lease of `ttl` before it is over for certain. `guarded`: the host that has the lease has said in
    /// this life of its agent that it uses the exact guard.
    pub fn margin(ttl: Duration, guarded: bool) -> Duration {
        if guarded && ttl <= Cluster::LONGEST_GUARDED_TTL { Cluster::GUARDED_MARGIN } else { Cluster::MARGIN }
    }

    /// With the default of every option (interfaces.md), beyond loopback in plain text; for tests and tools.
    pub fn of(hosts: BTreeMap<HostName, Host>, roles: BTreeMap<RoleName, Role>) -> Self {
        Cluster {
            active_master_role: "writer".into(),
            lease_ttl: Duration::from_secs(3),
            heartbeat_interval: Duration::from_millis(500),
            insecure_plaintext: true,
            move_grace: Duration::from_secs(1),
            move_timeout: Duration::from_secs(2),
            drain_timeout: Duration::from_secs(30),
            on_drain_timeout: OnDrainTimeout::Hold,
            hang_timeout: Duration::from_secs(3),
            on_hang: OnHang::Fence,
            restart_grace: Duration::ZERO,
            semisync: true,
            require_semisync: false,
            semisync_slaves: false,
            auto_reclone: false,
            hosts,
            roles,
        }
    }

    /// Within this a writer that has lost touch with everybody is fenced, with 2 s to spare: for longer it must not
    /// acknowledge alone (data-safety.md, "Semi-synchronous replication").
    pub fn fenced_within(&self) -> Duration {
        self.lease_ttl + Cluster::MARGIN + Duration::from_secs(2)
    }

    /// The role that carries the writer: exactly one exclusive role.
    pub fn writer(&self) -> Option<&Role> {
        self.roles.get(&self.active_master_role)
    }

    /// Every role address with its role, by address.
    pub fn addresses(&self) -> BTreeMap<IpAddr, RoleName> {
        self.roles.iter().flat_map(|(name, role)| role.ips.iter().map(|ip| (*ip, name.clone()))).collect()
    }
}

/// How long what is sent now is waited out: ttl + margin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quarantine {
    /// Of any host.
    pub plain: Duration,
    /// Of a host that has said in the life of its agent to which it is sent that it has the exact guard.
    pub guarded: Duration,
}

impl Quarantine {
    /// After leases of so long.
    pub fn of(lease_ttl: Duration) -> Self {
        let [plain, guarded] = [false, true].map(|guarded| lease_ttl + Cluster::margin(lease_ttl, guarded));
        Quarantine { plain, guarded }
    }

    /// `guarded`: as the host has said.
    pub fn for_a_host(self, guarded: bool) -> Duration {
        if guarded { self.guarded } else { self.plain }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDrainTimeout {
    /// Nobody is promoted; the operator decides.
    Hold,
    /// The candidate is promoted with what it has applied, and what is missing is said.
    Promote,
}

/// What is done with a server that hangs, besides taking its addresses away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnHang {
    /// It is made read-only as the first thing when it answers again.
    Fence,
    /// One that may be writable is killed, by mmm_helperd.
    Kill,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    pub ip: IpAddr,
    pub mode: HostMode,
    /// The other master; masters only, and where there are two.
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

impl Host {
    /// With the default of every option and no logins; for tests and tools.
    pub fn of(ip: IpAddr, mode: HostMode, peer: Option<HostName>) -> Self {
        Host {
            ip,
            mode,
            peer,
            cluster_interface: "eth0".into(),
            agent_port: 9989,
            mysql_port: 3306,
            agent_user: String::new(),
            agent_password: Secret::default(),
            replication_user: String::new(),
            replication_password: Secret::default(),
            monitor_user: String::new(),
            monitor_password: Secret::default(),
        }
    }
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

impl Monitor {
    /// With the default of every option and no `ping_ips`; for tests and tools.
    pub fn of(cluster: Cluster) -> Self {
        let check = Check {
            check_period: Duration::from_secs(1),
            trap_period: Duration::from_secs(3),
            timeout: Duration::from_secs(1),
            restart_after: 10_000,
            max_backlog: Duration::from_secs(60),
        };
        Monitor {
            cluster,
            ip: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
            port: 9988,
            status_path: "/var/lib/mysql-mmm/mmm_mond.status".into(),
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
    /// The exact guard is used if the kernel can do it.
    pub exact_guard: bool,
    /// What the helper program (mmm_helperd) does to the server as root.
    pub server: ServerControl,
}

/// How the local server is started, stopped and found; read by the helper program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerControl {
    /// Run by /bin/sh; None: `systemctl start` of the server's unit.
    pub start_command: Option<String>,
    pub stop_command: Option<String>,
    pub pid_file: Option<PathBuf>,
    /// Needed to copy another host.
    pub datadir: Option<PathBuf>,
}

impl Agent {
    /// With the default of every option; for tests and tools.
    pub fn of(cluster: Cluster, this: HostName) -> Self {
        Agent {
            cluster,
            this,
            state_path: "/var/lib/mysql-mmm/mmm_agentd.state".into(),
            mysql_socket: None,
            watchdog_device: None,
            exact_guard: true,
            server: ServerControl::default(),
        }
    }
}

//! Every option: where it stands, what it may be, its default; and those of MMM 2.x that no longer mean anything,
//! with what replaced them.
//!
//! A new option is one `static` here and its name in one of the lists; the example files in `etc/` must name it too
//! (a test compares them).

use super::tree::{Node, Value};
use super::values::{self, Wrong};
use super::{OnDrainTimeout, OnHang, Secret};
use crate::ids::{HostName, RoleName};
use crate::state::{HostMode, MonitorMode, RoleMode};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

pub(super) struct Opt<T: 'static> {
    pub(super) name: &'static str,
    pub(super) read: fn(&Node) -> Result<T, Wrong>,
    pub(super) default: Preset,
}

/// A default, as it would stand in the file.
#[derive(Clone, Copy)]
pub(super) enum Preset {
    Nothing,
    Text(&'static str),
    Number(i64),
    Flag(bool),
}

impl<T> Opt<T> {
    pub(super) fn default(&self) -> Option<T> {
        let value = match self.default {
            Preset::Nothing => return None,
            Text(text) => Value::Text(text.to_owned()),
            Number(number) => Value::Number(number),
            Flag(flag) => Value::Flag(flag),
        };
        (self.read)(&Node { line: 0, value }).ok()
    }
}

/// An option whatever its type, for looking at what stands in a file.
pub(super) trait Known: Sync {
    fn name(&self) -> &'static str;
    fn wrong(&self, node: &Node) -> Wrong;
    /// The default as it would stand in the file, for comparing it with the documentation.
    #[cfg(test)]
    fn documented(&self) -> Option<String>;
}

impl<T> Known for Opt<T> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn wrong(&self, node: &Node) -> Wrong {
        (self.read)(node).err().unwrap_or_default()
    }

    #[cfg(test)]
    fn documented(&self) -> Option<String> {
        match self.default {
            Preset::Nothing => None,
            Text(text) => Some(format!("{text:?}")),
            Number(number) => Some(number.to_string()),
            Flag(flag) => Some(flag.to_string()),
        }
    }
}

macro_rules! options {
    ($($id:ident: $type:ty = $name:literal, $read:ident, $default:expr;)*) => {
        $(pub(super) static $id: Opt<$type> = Opt { name: $name, read: values::$read, default: $default };)*
    };
}

use Preset::{Flag, Number, Text};

/// No default: it must be given.
const NEEDED: Preset = Preset::Nothing;
/// No default: it may be left out.
const OPTIONAL: Preset = Preset::Nothing;

options! {
    // At the top of a file. `include` is followed by files.rs.
    INCLUDE: Vec<(usize, PathBuf)> = "include", paths, OPTIONAL;
    THIS: HostName = "this", host_name, NEEDED;
    ACTIVE_MASTER_ROLE: RoleName = "active_master_role", role_name, Text("writer");
    LEASE_TTL: Duration = "lease_ttl", duration, Text("3s");
    HEARTBEAT_INTERVAL: Duration = "heartbeat_interval", duration, Text("500ms");
    INSECURE_PLAINTEXT: bool = "insecure_plaintext", flag, Flag(false);
    MOVE_GRACE: Duration = "move_grace", duration, Text("1s");
    MOVE_TIMEOUT: Duration = "move_timeout", duration, Text("2s");
    DRAIN_TIMEOUT: Duration = "drain_timeout", duration, Text("30s");
    ON_DRAIN_TIMEOUT: OnDrainTimeout = "on_drain_timeout", on_drain_timeout, Text("hold");
    HANG_TIMEOUT: Duration = "hang_timeout", duration, Text("3s");
    RESTART_GRACE: Duration = "restart_grace", duration, Text("0s");
    ON_HANG: OnHang = "on_hang", on_hang, Text("fence");
    SEMISYNC: bool = "semisync", flag, Flag(true);
    REQUIRE_SEMISYNC: bool = "require_semisync", flag, Flag(false);
    SEMISYNC_SLAVES: bool = "semisync_slaves", flag, Flag(false);
    AUTO_RECLONE: bool = "auto_reclone", flag, Flag(false);

    // [host.*]
    HOST_IP: IpAddr = "ip", ip, NEEDED;
    HOST_MODE: HostMode = "mode", host_mode, NEEDED;
    PEER: HostName = "peer", host_name, OPTIONAL;
    CLUSTER_INTERFACE: String = "cluster_interface", interface, NEEDED;
    AGENT_PORT: u16 = "agent_port", port, Number(9989);
    MYSQL_PORT: u16 = "mysql_port", port, Number(3306);
    AGENT_USER: String = "agent_user", text, NEEDED;
    AGENT_PASSWORD: Secret = "agent_password", secret, NEEDED;
    AGENT_PASSWORD_FILE: PathBuf = "agent_password_file", path, OPTIONAL;
    REPLICATION_USER: String = "replication_user", text, NEEDED;
    REPLICATION_PASSWORD: Secret = "replication_password", secret, NEEDED;
    REPLICATION_PASSWORD_FILE: PathBuf = "replication_password_file", path, OPTIONAL;
    MONITOR_USER: String = "monitor_user", text, NEEDED;
    MONITOR_PASSWORD: Secret = "monitor_password", secret, NEEDED;
    MONITOR_PASSWORD_FILE: PathBuf = "monitor_password_file", path, OPTIONAL;

    // [role.*]
    ROLE_MODE: RoleMode = "mode", role_mode, NEEDED;
    ROLE_HOSTS: Vec<HostName> = "hosts", host_names, NEEDED;
    ROLE_IPS: Vec<IpAddr> = "ips", ips, NEEDED;
    PREFER: HostName = "prefer", host_name, OPTIONAL;

    // [monitor]
    MONITOR_IP: IpAddr = "ip", listen_ip, Text("127.0.0.1");
    MONITOR_PORT: u16 = "port", port, Number(9988);
    STATUS_PATH: PathBuf = "status_path", absolute_path, Text("/var/lib/mysql-mmm/mmm_mond.status");
    PING_IPS: Vec<IpAddr> = "ping_ips", ips, NEEDED;
    PING_INTERVAL: Duration = "ping_interval", duration, Text("1s");
    MONITOR_MODE: MonitorMode = "mode", monitor_mode, Text("active");
    WAIT_FOR_OTHER_MASTER: Duration = "wait_for_other_master", duration, Text("120s");
    CAREFUL_STARTUP: bool = "careful_startup", flag, Flag(true);
    AUTO_SET_ONLINE: Duration = "auto_set_online", duration, Text("0s");
    FLAP_DURATION: Duration = "flap_duration", duration, Text("1h");
    FLAP_COUNT: u32 = "flap_count", count, Number(3);
    KILL_HOST_BIN: Option<PathBuf> = "kill_host_bin", path_or_none, Text("");

    // [check.*]
    CHECK_PERIOD: Duration = "check_period", duration, Text("1s");
    TRAP_PERIOD: Duration = "trap_period", duration, Text("3s");
    TIMEOUT: Duration = "timeout", duration, Text("1s");
    RESTART_AFTER: u32 = "restart_after", count, Number(10000);
    MAX_BACKLOG: Duration = "max_backlog", duration, Text("60s");

    // [agent]
    STATE_PATH: PathBuf = "state_path", absolute_path, Text("/var/lib/mysql-mmm/mmm_agentd.state");
    MYSQL_SOCKET: Option<PathBuf> = "mysql_socket", path_or_none, Text("");
    WATCHDOG_DEVICE: Option<PathBuf> = "watchdog_device", path_or_none, Text("");
    EXACT_GUARD: bool = "exact_guard", flag, Flag(true);
    MYSQL_START_COMMAND: Option<String> = "mysql_start_command", text_or_none, Text("");
    MYSQL_STOP_COMMAND: Option<String> = "mysql_stop_command", text_or_none, Text("");
    MYSQL_PID_FILE: Option<PathBuf> = "mysql_pid_file", path_or_none, Text("");
    DATADIR: Option<PathBuf> = "datadir", path_or_none, Text("");
}

/// A password and its alternative, the name of a file that holds it.
pub(super) struct Password {
    pub(super) password: &'static Opt<Secret>,
    pub(super) file: &'static Opt<PathBuf>,
}

pub(super) static AGENT_LOGIN: Password = Password { password: &AGENT_PASSWORD, file: &AGENT_PASSWORD_FILE };
pub(super) static REPLICATION_LOGIN: Password =
    Password { password: &REPLICATION_PASSWORD, file: &REPLICATION_PASSWORD_FILE };
pub(super) static MONITOR_LOGIN: Password = Password { password: &MONITOR_PASSWORD, file: &MONITOR_PASSWORD_FILE };
pub(super) static PASSWORDS: &[&Password] = &[&AGENT_LOGIN, &REPLICATION_LOGIN, &MONITOR_LOGIN];

/// A kind of section. `Top` is the part of a file before its first section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Top,
    Host,
    Role,
    Monitor,
    Check,
    Agent,
}

impl Kind {
    pub(super) const ALL: [Kind; 6] = [Kind::Top, Kind::Host, Kind::Role, Kind::Monitor, Kind::Check, Kind::Agent];

    /// The first word of the section's header.
    pub(super) fn word(self) -> &'static str {
        match self {
            Kind::Top => "",
            Kind::Host => "host",
            Kind::Role => "role",
            Kind::Monitor => "monitor",
            Kind::Check => "check",
            Kind::Agent => "agent",
        }
    }

    /// Whether there may be several, each with a name: `[host.db1]`.
    pub(super) fn named(self) -> bool {
        match self {
            Kind::Host | Kind::Role | Kind::Check => true,
            Kind::Top | Kind::Monitor | Kind::Agent => false,
        }
    }

    /// Where an option of this kind of section belongs, in words.
    fn place(self) -> &'static str {
        match self {
            Kind::Top => "at the top of the file, before the first [section]",
            Kind::Host => "in [host.default] or [host.NAME]",
            Kind::Role => "in [role.NAME]",
            Kind::Monitor => "in [monitor]",
            Kind::Check => "in [check.default] or [check.NAME]",
            Kind::Agent => "in [agent]",
        }
    }

    pub(super) fn options(self) -> &'static [&'static dyn Known] {
        match self {
            Kind::Top => TOP,
            Kind::Host => HOST,
            Kind::Role => ROLE,
            Kind::Monitor => MONITOR,
            Kind::Check => CHECK,
            Kind::Agent => AGENT,
        }
    }
}

static TOP: &[&dyn Known] = &[
    &INCLUDE,
    &THIS,
    &ACTIVE_MASTER_ROLE,
    &LEASE_TTL,
    &HEARTBEAT_INTERVAL,
    &INSECURE_PLAINTEXT,
    &MOVE_GRACE,
    &MOVE_TIMEOUT,
    &DRAIN_TIMEOUT,
    &ON_DRAIN_TIMEOUT,
    &HANG_TIMEOUT,
    &RESTART_GRACE,
    &ON_HANG,
    &SEMISYNC,
    &REQUIRE_SEMISYNC,
    &SEMISYNC_SLAVES,
    &AUTO_RECLONE,
];
static HOST: &[&dyn Known] = &[
    &HOST_IP,
    &HOST_MODE,
    &PEER,
    &CLUSTER_INTERFACE,
    &AGENT_PORT,
    &MYSQL_PORT,
    &AGENT_USER,
    &AGENT_PASSWORD,
    &AGENT_PASSWORD_FILE,
    &REPLICATION_USER,
    &REPLICATION_PASSWORD,
    &REPLICATION_PASSWORD_FILE,
    &MONITOR_USER,
    &MONITOR_PASSWORD,
    &MONITOR_PASSWORD_FILE,
];
static ROLE: &[&dyn Known] = &[&ROLE_MODE, &ROLE_HOSTS, &ROLE_IPS, &PREFER];
static MONITOR: &[&dyn Known] = &[
    &MONITOR_IP,
    &MONITOR_PORT,
    &STATUS_PATH,
    &PING_IPS,
    &PING_INTERVAL,
    &MONITOR_MODE,
    &WAIT_FOR_OTHER_MASTER,
    &CAREFUL_STARTUP,
    &AUTO_SET_ONLINE,
    &FLAP_DURATION,
    &FLAP_COUNT,
    &KILL_HOST_BIN,
];
static CHECK: &[&dyn Known] = &[&CHECK_PERIOD, &TRAP_PERIOD, &TIMEOUT, &RESTART_AFTER, &MAX_BACKLOG];
static AGENT: &[&dyn Known] = &[
    &STATE_PATH,
    &MYSQL_SOCKET,
    &WATCHDOG_DEVICE,
    &EXACT_GUARD,
    &MYSQL_START_COMMAND,
    &MYSQL_STOP_COMMAND,
    &MYSQL_PID_FILE,
    &DATADIR,
];

/// Where an option belongs that is known, but not in the section where it stands.
pub(super) fn belongs(name: &str) -> Option<String> {
    let places: Vec<&str> = Kind::ALL
        .into_iter()
        .filter(|kind| kind.options().iter().any(|option| option.name() == name))
        .map(Kind::place)
        .collect();
    if places.is_empty() { None } else { Some(places.join(", or ")) }
}

/// What to write where an option is missing.
pub(super) fn example(kind: Kind, name: &str) -> Option<&'static str> {
    let text = match (kind, name) {
        (Kind::Top, "this") => r#"this = "db1" (the name of this host)"#,
        (Kind::Host, "ip") => r#"ip = "192.168.0.31""#,
        (Kind::Host, "mode") => r#"mode = "master" or mode = "slave""#,
        (Kind::Host, "cluster_interface") => r#"cluster_interface = "eth0""#,
        (Kind::Role, "mode") => r#"mode = "exclusive" or mode = "balanced""#,
        (Kind::Role, "hosts") => r#"hosts = ["db1", "db2"]"#,
        (Kind::Role, "ips") => r#"ips = ["192.168.0.50"]"#,
        (Kind::Monitor, "ping_ips") => r#"ping_ips = ["192.168.0.1"] (addresses that always answer, as the gateway's)"#,
        (Kind::Top | Kind::Host | Kind::Role | Kind::Monitor | Kind::Check | Kind::Agent, _) => return None,
    };
    Some(text)
}

const TOOLS: &str = "the backup and clone tools of MMM 2.x are not part of this version: leave it out";
const SYSTEMD: &str = "the daemons stay in the foreground and systemd knows their process: leave it out";

/// What replaced an option or section of MMM 2.x (or 1.x) that no longer means anything.
pub(super) fn replaced(kind: Kind, name: &str) -> Option<&'static str> {
    let text = match (kind, name) {
        (_, "bin_path") => "the checks and the agent's helpers are built into the daemons: leave it out",
        (_, "pid_path") => SYSTEMD,
        (_, "debug") => "logging is set by the environment (RUST_LOG=debug in the service's unit): leave it out",
        (_, "max_kill_retries") => {
            "the sessions of the old writer are killed until none is left or move_timeout has passed: see move_timeout"
        }
        (_, "auto_increment_increment" | "auto_increment_offset") => {
            "it is set in the configuration of the database server (my.cnf) of each master"
        }
        (_, "failover_method") => "it is now called mode, in [monitor] (\"auto\" is now \"active\")",
        (_, "default_copy_method" | "clone_dirs" | "copy_method") => TOOLS,
        (Kind::Top, "socket") => {
            "there is no TLS in this version yet: leave it out, and see insecure_plaintext (later: [tls])"
        }
        (Kind::Host | Kind::Top, "mysql_pidfile") => "it is now called mysql_pid_file, in [agent] of mmm_agent.toml",
        (Kind::Host | Kind::Top, "mysql_rcscript") => {
            "it is now mysql_start_command and mysql_stop_command, in [agent] of mmm_agent.toml"
        }
        (Kind::Host | Kind::Top, "mysql_cnf") => "the server's own configuration file is not read: leave it out",
        (Kind::Host | Kind::Top, "backup_dir" | "restore_dir") => TOOLS,
        (Kind::Host | Kind::Top, name)
            if name.starts_with("ssh_") || name.starts_with("tools_") || name.starts_with("lvm_") =>
        {
            TOOLS
        }
        (Kind::Top | Kind::Host | Kind::Role | Kind::Monitor | Kind::Check | Kind::Agent, _) => return None,
    };
    Some(text)
}

//! Reading the files: every mistake at once, or the finished configuration.
//!
//! Read from here: `files` loads the file and what it includes, `merged` looks at each option and decides which value
//! counts, `Draft` fills the structs in, and [`check`] looks at what lies between options. Never repeats a password.

use super::check::{self, At, Finding};
use super::files::{self, Loaded};
use super::merged::{Merged, Place};
use super::options::{self as opt, Kind, Opt, Password};
use super::{Agent, Check, Cluster, Host, Monitor, OnDrainTimeout, OnHang, Role, Secret, ServerControl};
use crate::ids::{HostName, RoleName};
use crate::state::{CheckKind, HostMode, MonitorMode, RoleMode};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One mistake in the configuration, with its place and its cure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    pub file: PathBuf,
    /// From 1; None when it belongs to no line.
    pub line: Option<usize>,
    pub text: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file.display(), self.text),
            None => write!(f, "{}: {}", self.file.display(), self.text),
        }
    }
}

/// Where `mmm_control` finds the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlAddress {
    /// To connect to: loopback when the monitor listens on all addresses.
    pub ip: IpAddr,
    pub port: u16,
    pub insecure_plaintext: bool,
}

/// Reads and checks the monitor's configuration. On failure: every mistake.
pub fn monitor(path: &Path) -> Result<Monitor, Vec<Mistake>> {
    let mut draft = Draft::of(path, For::Monitor);
    let monitor = draft.monitor();
    let found = check::monitor(&monitor);
    draft.finish(monitor, found)
}

/// Reads and checks an agent's configuration. On failure: every mistake.
pub fn agent(path: &Path) -> Result<Agent, Vec<Mistake>> {
    let mut draft = Draft::of(path, For::Agent);
    let agent = draft.agent();
    let found = check::agent(&agent);
    draft.finish(agent, found)
}

/// Reads the monitor's address from its configuration. Mistakes elsewhere, and included files that this user may not
/// read, do not matter: whoever looks for help must not be stopped by them. On failure: every mistake that does.
pub fn control(path: &Path) -> Result<ControlAddress, Vec<Mistake>> {
    let mut draft = Draft::of(path, For::Control);
    let here = ["monitor".to_owned()];
    let ip = draft.need(&here, &opt::MONITOR_IP);
    let address = ControlAddress {
        ip: match ip {
            IpAddr::V4(v4) if v4.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(v6) if v6.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            IpAddr::V4(_) | IpAddr::V6(_) => ip,
        },
        port: draft.need(&here, &opt::MONITOR_PORT),
        insecure_plaintext: draft.need(&top(), &opt::INSECURE_PLAINTEXT),
    };
    let unread = std::mem::take(&mut draft.loaded.mistakes);
    // Not said in any file that could be read, so perhaps in one that could not.
    if draft.loaded.incomplete && draft.merged.get(&here, &opt::MONITOR_IP).is_none() {
        draft.mistakes.extend(unread);
    }
    if draft.mistakes.is_empty() { Ok(address) } else { Err(in_order(draft.mistakes)) }
}

/// Who asks: each program reads only the secrets it needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum For {
    Monitor,
    Agent,
    Control,
}

/// A configuration being filled in. Where a value is missing or unreadable a blank takes its place, and `blank` says so.
struct Draft {
    main: PathBuf,
    reader: For,
    loaded: Loaded,
    merged: Merged,
    mistakes: Vec<Mistake>,
    /// Obligatory options that stand nowhere: key, and the section that should have it.
    missing: BTreeMap<&'static str, Vec<String>>,
    blank: BTreeSet<At>,
}

fn top() -> [String; 1] {
    [String::new()]
}

impl Draft {
    fn of(path: &Path, reader: For) -> Self {
        let loaded = files::load(path);
        let merged = Merged::of(&loaded.files);
        Draft {
            main: path.to_owned(),
            reader,
            loaded,
            merged,
            mistakes: Vec::new(),
            missing: BTreeMap::new(),
            blank: BTreeSet::new(),
        }
    }

    fn finish<T>(mut self, finished: T, found: Vec<Finding>) -> Result<T, Vec<Mistake>> {
        // What seems to be missing, or to be named by nobody, may stand in the file that could not be read.
        if !self.loaded.incomplete {
            self.say_missing();
            for Finding { about, text } in found {
                if !about.iter().any(|at| self.blank.contains(at)) {
                    let place = self.merged.place(&about);
                    self.mistake(place, text);
                }
            }
        }
        self.mistakes.append(&mut self.loaded.mistakes);
        self.mistakes.append(&mut self.merged.mistakes);
        if self.mistakes.is_empty() { Ok(finished) } else { Err(in_order(self.mistakes)) }
    }

    fn monitor(&mut self) -> Monitor {
        let here = ["monitor".to_owned()];
        let kill_host_bin = self.need(&here, &opt::KILL_HOST_BIN);
        if let Some(program) = &kill_host_bin {
            self.executable(&here, program);
        }
        Monitor {
            cluster: self.cluster(),
            ip: self.need(&here, &opt::MONITOR_IP),
            port: self.need(&here, &opt::MONITOR_PORT),
            status_path: self.need(&here, &opt::STATUS_PATH),
            ping_ips: self.need(&here, &opt::PING_IPS),
            ping_interval: self.need(&here, &opt::PING_INTERVAL),
            mode: self.need(&here, &opt::MONITOR_MODE),
            wait_for_other_master: self.need(&here, &opt::WAIT_FOR_OTHER_MASTER),
            careful_startup: self.need(&here, &opt::CAREFUL_STARTUP),
            auto_set_online: self.need(&here, &opt::AUTO_SET_ONLINE),
            flap_duration: self.need(&here, &opt::FLAP_DURATION),
            flap_count: self.need(&here, &opt::FLAP_COUNT),
            kill_host_bin,
            checks: CheckKind::ALL.iter().map(|kind| (*kind, self.check(*kind))).collect(),
        }
    }

    fn check(&mut self, kind: CheckKind) -> Check {
        let here = [format!("check.{kind}"), "check.default".to_owned()];
        Check {
            check_period: self.need(&here, &opt::CHECK_PERIOD),
            trap_period: self.need(&here, &opt::TRAP_PERIOD),
            timeout: self.need(&here, &opt::TIMEOUT),
            restart_after: self.need(&here, &opt::RESTART_AFTER),
            max_backlog: self.need(&here, &opt::MAX_BACKLOG),
        }
    }

    fn agent(&mut self) -> Agent {
        let here = ["agent".to_owned()];
        Agent {
            cluster: self.cluster(),
            this: self.need(&top(), &opt::THIS),
            state_path: self.need(&here, &opt::STATE_PATH),
            mysql_socket: self.need(&here, &opt::MYSQL_SOCKET),
            watchdog_device: self.need(&here, &opt::WATCHDOG_DEVICE),
            exact_guard: self.need(&here, &opt::EXACT_GUARD),
            server: ServerControl {
                start_command: self.need(&here, &opt::MYSQL_START_COMMAND),
                stop_command: self.need(&here, &opt::MYSQL_STOP_COMMAND),
                pid_file: self.need(&here, &opt::MYSQL_PID_FILE),
                datadir: self.need(&here, &opt::DATADIR),
            },
        }
    }

    fn cluster(&mut self) -> Cluster {
        Cluster {
            active_master_role: self.need(&top(), &opt::ACTIVE_MASTER_ROLE),
            lease_ttl: self.need(&top(), &opt::LEASE_TTL),
            heartbeat_interval: self.need(&top(), &opt::HEARTBEAT_INTERVAL),
            insecure_plaintext: self.need(&top(), &opt::INSECURE_PLAINTEXT),
            move_grace: self.need(&top(), &opt::MOVE_GRACE),
            move_timeout: self.need(&top(), &opt::MOVE_TIMEOUT),
            drain_timeout: self.need(&top(), &opt::DRAIN_TIMEOUT),
            on_drain_timeout: self.need(&top(), &opt::ON_DRAIN_TIMEOUT),
            hang_timeout: self.need(&top(), &opt::HANG_TIMEOUT),
            on_hang: self.need(&top(), &opt::ON_HANG),
            restart_grace: self.need(&top(), &opt::RESTART_GRACE),
            semisync: self.need(&top(), &opt::SEMISYNC),
            require_semisync: self.need(&top(), &opt::REQUIRE_SEMISYNC),
            semisync_slaves: self.need(&top(), &opt::SEMISYNC_SLAVES),
            auto_reclone: self.need(&top(), &opt::AUTO_RECLONE),
            hosts: self.hosts(),
            roles: self.roles(),
        }
    }

    fn hosts(&mut self) -> BTreeMap<HostName, Host> {
        let names = self.merged.names(Kind::Host);
        if names.is_empty() && !self.loaded.incomplete {
            let text =
                "there are no hosts: name each in a [host.NAME], usually in mmm_common.toml, and include that file";
            self.mistake(None, text.to_owned());
            // The roles are in the same file, most likely.
            self.blank.insert(At { section: String::new(), key: opt::ACTIVE_MASTER_ROLE.name });
        }
        // An agent logs in to its own server only.
        let this = self.merged.get(&top(), &opt::THIS).and_then(|found| (opt::THIS.read)(&found.node).ok());
        let this = this.as_ref().map(HostName::as_str);
        names.into_iter().map(|name| (HostName::from(name.as_str()), self.host(&name, this == Some(&name)))).collect()
    }

    fn host(&mut self, name: &str, this: bool) -> Host {
        let here = [format!("host.{name}"), "host.default".to_owned()];
        let of_agent = self.reader == For::Agent;
        Host {
            ip: self.need(&here, &opt::HOST_IP),
            mode: self.need(&here, &opt::HOST_MODE),
            peer: self.want(&here, &opt::PEER),
            cluster_interface: self.need(&here, &opt::CLUSTER_INTERFACE),
            agent_port: self.need(&here, &opt::AGENT_PORT),
            mysql_port: self.need(&here, &opt::MYSQL_PORT),
            agent_user: self.user(&here, &opt::AGENT_USER, of_agent),
            agent_password: self.password(&here, &opt::AGENT_LOGIN, of_agent, this),
            replication_user: self.user(&here, &opt::REPLICATION_USER, of_agent),
            replication_password: self.password(&here, &opt::REPLICATION_LOGIN, of_agent, true),
            monitor_user: self.user(&here, &opt::MONITOR_USER, !of_agent),
            monitor_password: self.password(&here, &opt::MONITOR_LOGIN, !of_agent, true),
        }
    }

    fn user(&mut self, sections: &[String], option: &Opt<String>, needed: bool) -> String {
        if needed { self.need(sections, option) } else { String::new() }
    }

    /// A password or the content of its file. `needed`: this program's configuration must name it; `used`: and this
    /// program uses it, so a file must be there.
    fn password(&mut self, sections: &[String], option: &Password, needed: bool, used: bool) -> Secret {
        if !needed {
            return Secret::default();
        }
        let Some((key, found)) = self.merged.password(sections, option) else {
            return self.need(sections, option.password);
        };
        if !used {
            return Secret::default();
        }
        let place = found.place.clone();
        if key == option.password.name {
            // What is no text has been said by `merged`.
            let secret = (option.password.read)(&found.node).ok();
            // An account that is known by its unix socket has none; over the network everybody could log in.
            if secret.as_ref().is_some_and(|s| s.0.is_empty()) && key != opt::AGENT_PASSWORD.name {
                self.mistake(Some(place), format!("{key} is empty: give the account a password"));
            }
            return secret.unwrap_or_default();
        }
        let Ok(path) = (option.file.read)(&found.node) else { return Secret::default() };
        // A relative name is looked for beside the file that names it.
        let path = place.file.parent().unwrap_or(Path::new("")).join(path);
        match files::password(&path) {
            Ok(password) => Secret(password),
            Err(why) => {
                self.mistake(Some(place), format!("{key}: {why}"));
                Secret::default()
            }
        }
    }

    fn roles(&mut self) -> BTreeMap<RoleName, Role> {
        let names = self.merged.names(Kind::Role);
        names.into_iter().map(|name| (RoleName::from(name.as_str()), self.role(&name))).collect()
    }

    fn role(&mut self, name: &str) -> Role {
        let here = [format!("role.{name}")];
        Role {
            mode: self.need(&here, &opt::ROLE_MODE),
            hosts: self.need(&here, &opt::ROLE_HOSTS),
            ips: self.need(&here, &opt::ROLE_IPS),
            prefer: self.want(&here, &opt::PREFER),
        }
    }

    /// The STONITH hook is called when nothing else helps: a slip in its name should not come out then.
    fn executable(&mut self, sections: &[String], program: &Path) {
        let why = match std::fs::metadata(program) {
            Ok(found) if found.is_file() && found.permissions().mode() & 0o111 != 0 => return,
            Ok(_) => "is not an executable file: chmod +x, or correct the name".to_owned(),
            Err(why) => format!("cannot be looked at ({why}): correct the name, or leave the option out"),
        };
        let place = self.merged.get(sections, &opt::KILL_HOST_BIN).map(|found| found.place.clone());
        self.mistake(place, format!("kill_host_bin {} {why}", program.display()));
    }

    /// The value that counts, or the default; a blank and a mistake when there is neither.
    fn need<T: Blank>(&mut self, sections: &[String], option: &Opt<T>) -> T {
        let stands = self.merged.get(sections, option).is_some();
        match self.want(sections, option).or_else(|| option.default()) {
            Some(value) => value,
            None => {
                if !stands {
                    self.missing.entry(option.name).or_default().push(sections[0].clone());
                }
                self.blank.insert(At { section: sections[0].clone(), key: option.name });
                T::blank()
            }
        }
    }

    /// The value that counts, if the option stands anywhere.
    fn want<T>(&mut self, sections: &[String], option: &Opt<T>) -> Option<T> {
        let found = self.merged.get(sections, option)?;
        match (option.read)(&found.node) {
            Ok(value) => Some(value),
            Err(wrong) => {
                let file = found.place.file.clone();
                for (line, text) in wrong {
                    self.mistake(Some(Place { file: file.clone(), line }), format!("{} {text}", option.name));
                }
                self.blank.insert(At { section: sections[0].clone(), key: option.name });
                None
            }
        }
    }

    /// One mistake per option that is missing; what no host has is said once.
    fn say_missing(&mut self) {
        let hosts = self.merged.names(Kind::Host).len();
        for (key, sections) in std::mem::take(&mut self.missing) {
            let of_hosts = sections.iter().filter(|s| s.starts_with("host.")).count();
            let alternative = match opt::PASSWORDS.iter().find(|p| p.password.name == key) {
                Some(password) => format!(" (or {})", password.file.name),
                None => String::new(),
            };
            let own = [opt::HOST_IP.name, opt::HOST_MODE.name].contains(&key);
            if of_hosts == hosts && hosts > 1 && !own {
                let place = self.merged.place(&[At { section: "host.default".to_owned(), key: "" }]);
                self.mistake(place, format!("{key}{alternative} is missing for every host: give it in [host.default]"));
                continue;
            }
            for section in sections {
                let place = self.merged.place(&[At { section: section.clone(), key: "" }]);
                let (word, _) = section.split_once('.').unwrap_or((&section, ""));
                let kind = Kind::ALL.into_iter().find(|kind| kind.word() == word);
                let cure = match kind.and_then(|kind| opt::example(kind, key)) {
                    Some(example) => format!("add {example}"),
                    None => "add it".to_owned(),
                };
                let here = if section.is_empty() { " at the top".to_owned() } else { format!(" in [{section}]") };
                let text = format!("{key}{alternative} is missing{here}: {cure}");
                self.mistake(place, text);
            }
        }
    }

    fn mistake(&mut self, place: Option<Place>, text: String) {
        let (file, line) = place.map_or((self.main.clone(), None), |place| (place.file, Some(place.line)));
        self.mistakes.push(Mistake { file, line, text });
    }
}

/// By file and line, each once: a wrong default is found again for every host.
fn in_order(mut mistakes: Vec<Mistake>) -> Vec<Mistake> {
    mistakes.sort_by(|a, b| (&a.file, a.line, &a.text).cmp(&(&b.file, b.line, &b.text)));
    mistakes.dedup();
    mistakes
}

/// What stands in for a value that is missing. Never gets out: there is a mistake then.
trait Blank {
    fn blank() -> Self;
}

macro_rules! blank {
    ($($type:ty = $value:expr;)*) => {
        $(impl Blank for $type { fn blank() -> Self { $value } })*
    };
}

blank! {
    bool = false;
    u16 = 0;
    u32 = 0;
    String = String::new();
    Duration = Duration::ZERO;
    IpAddr = Ipv4Addr::UNSPECIFIED.into();
    PathBuf = PathBuf::new();
    Secret = Secret::default();
    HostName = HostName(String::new());
    RoleName = RoleName(String::new());
    HostMode = HostMode::Slave;
    RoleMode = RoleMode::Balanced;
    MonitorMode = MonitorMode::Passive;
    OnDrainTimeout = OnDrainTimeout::Hold;
    OnHang = OnHang::Fence;
}

impl<T> Blank for Vec<T> {
    fn blank() -> Self {
        Vec::new()
    }
}

impl<T> Blank for Option<T> {
    fn blank() -> Self {
        None
    }
}

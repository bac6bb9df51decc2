//! What an operator may ask of the monitor, and what it answers: one JSON line each way.
//!
//! The texts are MMM's, because scripts parse them; they are made in one place, [`Answer::text`].

use crate::ids::{HostName, RoleName};
use crate::state::{CheckKind, CheckResult, HostMode, HostState, MonitorMode};
use serde::{Deserialize, Serialize};
use std::fmt::{self, Write as _};
use std::net::IpAddr;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub enum Command {
    Ping,
    Show,
    /// None: every host; None: every check.
    Checks {
        host: Option<HostName>,
        check: Option<CheckKind>,
    },
    Mode,
    SetActive,
    SetManual,
    SetPassive,
    SetOnline {
        host: HostName,
    },
    SetOffline {
        host: HostName,
    },
    MoveRole {
        role: RoleName,
        host: HostName,
        force: bool,
    },
    SetIp {
        ip: IpAddr,
        host: HostName,
    },
    /// The operator's word that a host is off and stays off until its agent has answered anew (safety.md, R8c).
    ConfirmDead {
        host: HostName,
    },
}

impl Command {
    /// Whether it only looks. Anything else is logged with who asked.
    pub fn is_read_only(&self) -> bool {
        match self {
            Command::Ping | Command::Show | Command::Checks { .. } | Command::Mode => true,
            Command::SetActive
            | Command::SetManual
            | Command::SetPassive
            | Command::SetOnline { .. }
            | Command::SetOffline { .. }
            | Command::MoveRole { .. }
            | Command::SetIp { .. }
            | Command::ConfirmDead { .. } => false,
        }
    }
}

/// As typed after `mmm_control`: for the log.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Command::Ping => f.write_str("ping"),
            Command::Show => f.write_str("show"),
            Command::Checks { host, check } => {
                let host = host.as_ref().map_or("all", HostName::as_str);
                write!(f, "checks {host} {}", check.map_or("all", CheckKind::as_str))
            }
            Command::Mode => f.write_str("mode"),
            Command::SetActive => f.write_str("set_active"),
            Command::SetManual => f.write_str("set_manual"),
            Command::SetPassive => f.write_str("set_passive"),
            Command::SetOnline { host } => write!(f, "set_online {host}"),
            Command::SetOffline { host } => write!(f, "set_offline {host}"),
            Command::MoveRole { role, host, force } => {
                let force = if *force { "--force " } else { "" };
                write!(f, "move_role {force}{role} {host}")
            }
            Command::SetIp { ip, host } => write!(f, "set_ip {ip} {host}"),
            Command::ConfirmDead { host } => write!(f, "confirm_dead {host}"),
        }
    }
}

/// First line a client sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub protocol: u32,
    pub command: Command,
}

/// The monitor's answer to one request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// Printed as `OK: …`.
    Done {
        text: String,
    },
    /// Printed as `ERROR: …`; exit code 1.
    Refused {
        text: String,
    },
    Mode {
        mode: MonitorMode,
    },
    Show(Show),
    Checks {
        checks: Vec<CheckLine>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Show {
    pub mode: MonitorMode,
    /// Why the monitor is in passive mode; only then.
    pub cause: Option<String>,
    /// Without the leading `# `: unreachable agents, suspended roles, diverged hosts, a cluster that never ran.
    pub warnings: Vec<String>,
    /// By name.
    pub hosts: Vec<ShowHost>,
    /// Without the leading `# `: preferences, roles nobody holds.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShowHost {
    pub name: HostName,
    pub ip: IpAddr,
    pub mode: HostMode,
    pub state: HostState,
    /// By name, then address.
    pub roles: Vec<ShowRole>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ShowRole {
    pub role: RoleName,
    pub ip: IpAddr,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckLine {
    pub host: HostName,
    pub check: CheckKind,
    /// How long ago the result last changed between good and bad, in milliseconds. Printed as local time.
    pub changed_ms_ago: u64,
    pub result: CheckResult,
}

impl Answer {
    pub fn is_error(&self) -> bool {
        match self {
            Answer::Refused { .. } => true,
            Answer::Done { .. } | Answer::Mode { .. } | Answer::Show(_) | Answer::Checks { .. } => false,
        }
    }

    /// MMM's text, with a newline at the end of every line. `local_time` turns "so many milliseconds ago" into
    /// `YYYY/MM/DD hh:mm:ss`.
    pub fn text(&self, local_time: &dyn Fn(u64) -> String) -> String {
        match self {
            Answer::Done { text } => format!("OK: {}\n", one_line(text)),
            Answer::Refused { text } => format!("ERROR: {}\n", one_line(text)),
            Answer::Mode { mode } => format!("{mode}\n"),
            Answer::Show(show) => show.text(),
            Answer::Checks { checks } => checks_text(checks, local_time),
        }
    }
}

impl Show {
    fn text(&self) -> String {
        let mut out = String::new();
        if self.mode == MonitorMode::Passive {
            let cause = one_line(self.cause.as_deref().unwrap_or("set by the operator"));
            let _ = write!(out, "# --- Monitor is in PASSIVE MODE ---\n# Cause: {cause}\n");
        }
        for warning in &self.warnings {
            let _ = writeln!(out, "# {}", one_line(warning));
        }
        for h in &self.hosts {
            let roles: Vec<String> = h.roles.iter().map(|r| format!("{}({})", r.role, r.ip)).collect();
            let _ = writeln!(out, "  {}({}) {}/{}. Roles: {}", h.name, h.ip, h.mode, h.state, roles.join(", "));
        }
        for note in &self.notes {
            let _ = writeln!(out, "# {}", one_line(note));
        }
        out
    }
}

/// One line a check, in columns as wide as the widest name.
fn checks_text(checks: &[CheckLine], local_time: &dyn Fn(u64) -> String) -> String {
    let host = checks.iter().map(|c| c.host.as_str().len()).max().unwrap_or(0);
    let name = checks.iter().map(|c| c.check.as_str().len()).max().unwrap_or(0).max("rep_threads".len());
    let mut out = String::new();
    for c in checks {
        let _ = writeln!(
            out,
            "{:host$}  {:name$}  [last change: {}]  {}",
            c.host,
            c.check,
            local_time(c.changed_ms_ago),
            one_line(&c.result.to_string())
        );
    }
    out
}

/// Texts carry what servers said, and servers quote whole statements: a line break in one must not look like the next
/// line of the answer, nor an escape sequence reach the operator's terminal.
fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn show_looks_as_in_mmm() {
        let host = |name: &str, ip: &str, mode, state, roles: &[(&str, &str)]| ShowHost {
            name: name.into(),
            ip: ip.parse().unwrap(),
            mode,
            state,
            roles: roles.iter().map(|(r, ip)| ShowRole { role: (*r).into(), ip: ip.parse().unwrap() }).collect(),
        };
        let show = Answer::Show(Show {
            mode: MonitorMode::Active,
            cause: None,
            warnings: vec!["Warning: agent on host db2 is not reachable".into()],
            hosts: vec![
                host(
                    "db1",
                    "192.168.0.31",
                    HostMode::Master,
                    HostState::Online,
                    &[("reader", "192.168.0.51"), ("writer", "192.168.0.50")],
                ),
                host("db2", "192.168.0.32", HostMode::Master, HostState::AwaitingRecovery, &[]),
            ],
            notes: vec!["Role writer has preferred host db1".into()],
        });
        assert_eq!(
            show.text(&|_| String::new()),
            "# Warning: agent on host db2 is not reachable\n\
             \x20 db1(192.168.0.31) master/ONLINE. Roles: reader(192.168.0.51), writer(192.168.0.50)\n\
             \x20 db2(192.168.0.32) master/AWAITING_RECOVERY. Roles: \n\
             # Role writer has preferred host db1\n"
        );
    }

    #[test]
    fn checks_look_as_in_mmm() {
        let line = |check, result| CheckLine { host: "db1".into(), check, changed_ms_ago: 7, result };
        let checks = Answer::Checks {
            checks: vec![
                line(CheckKind::Ping, CheckResult::Ok(String::new())),
                line(CheckKind::RepBacklog, CheckResult::Ok("Backlog is null".into())),
                line(CheckKind::Mysql, CheckResult::Error("Connect error".into())),
            ],
        };
        assert_eq!(
            checks.text(&|ago| {
                assert_eq!(ago, 7);
                "2010/02/11 12:43:16".into()
            }),
            "db1  ping         [last change: 2010/02/11 12:43:16]  OK\n\
             db1  rep_backlog  [last change: 2010/02/11 12:43:16]  OK: Backlog is null\n\
             db1  mysql        [last change: 2010/02/11 12:43:16]  ERROR: Connect error\n"
        );
    }
}

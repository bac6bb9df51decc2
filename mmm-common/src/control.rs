//! What an operator may ask of the monitor, and what it answers: one JSON line each way.
//!
//! The texts are MMM's, because scripts parse them; they are made in one place, [`Answer::text`].

use crate::examine::{Finding, Severity};
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
    /// `accept_lost`: transactions that only this host has are discarded, after saving them (data-safety.md).
    SetOnline {
        host: HostName,
        #[serde(default)]
        accept_lost: bool,
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
    /// What only this host has, or had when it was last brought back in line.
    Lost {
        host: HostName,
    },
    /// Throw the host's data away, after saving what only it has, and copy those of another.
    Reclone {
        host: HostName,
        from: HostName,
    },
    /// Examine everything that must be so, on every host. Answered beside the core.
    Doctor,
}

impl Command {
    /// Whether it only looks. Anything else is logged with who asked.
    pub fn is_read_only(&self) -> bool {
        match self {
            Command::Ping | Command::Show | Command::Checks { .. } | Command::Mode | Command::Lost { .. } => true,
            Command::Doctor => true,
            Command::SetActive
            | Command::SetManual
            | Command::SetPassive
            | Command::SetOnline { .. }
            | Command::SetOffline { .. }
            | Command::MoveRole { .. }
            | Command::SetIp { .. }
            | Command::ConfirmDead { .. }
            | Command::Reclone { .. } => false,
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
            Command::SetOnline { host, accept_lost } => {
                let accept = if *accept_lost { "--accept-lost " } else { "" };
                write!(f, "set_online {accept}{host}")
            }
            Command::SetOffline { host } => write!(f, "set_offline {host}"),
            Command::MoveRole { role, host, force } => {
                let force = if *force { "--force " } else { "" };
                write!(f, "move_role {force}{role} {host}")
            }
            Command::SetIp { ip, host } => write!(f, "set_ip {ip} {host}"),
            Command::ConfirmDead { host } => write!(f, "confirm_dead {host}"),
            Command::Lost { host } => write!(f, "lost {host}"),
            Command::Reclone { host, from } => write!(f, "reclone {host} --from {from}"),
            Command::Doctor => f.write_str("doctor"),
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
    Lost(Lost),
    /// An error when one of the findings is.
    Doctor {
        findings: Vec<Finding>,
    },
}

/// Transactions that only one host has, or had when it was brought back in line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    pub host: HostName,
    pub transactions: u64,
    /// In words: whether they are still there.
    pub state: String,
    /// Whether clients were told that they are committed; None: there is nothing to tell.
    pub acknowledged: Option<String>,
    /// Where the SQL is, on that host; None: not saved yet.
    pub saved: Option<String>,
    pub gtids: Option<String>,
    /// One line each, at most [`crate::report::Extras::LISTED`].
    pub list: Vec<String>,
    pub cure: Option<String>,
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
            Answer::Doctor { findings } => findings.iter().any(|f| f.severity == Severity::Error),
            Answer::Done { .. } | Answer::Mode { .. } | Answer::Show(_) | Answer::Checks { .. } | Answer::Lost(_) => {
                false
            }
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
            Answer::Lost(lost) => lost.text(),
            Answer::Doctor { findings } => doctor_text(findings),
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

impl Lost {
    fn text(&self) -> String {
        let mut out = format!("{}: {}\n", self.host, one_line(&self.state));
        if let Some(acknowledged) = &self.acknowledged {
            let _ = writeln!(out, "  {}", one_line(acknowledged));
        }
        if self.transactions > 0 {
            let saved = self.saved.as_deref().unwrap_or("not yet");
            let _ = writeln!(out, "  saved as SQL on {}: {}", self.host, one_line(saved));
        }
        if let Some(gtids) = &self.gtids {
            let _ = writeln!(out, "  gtids: {}", one_line(gtids));
        }
        for line in &self.list {
            let _ = writeln!(out, "    {}", one_line(line));
        }
        let listed = u64::try_from(self.list.len()).unwrap_or(u64::MAX);
        if !self.list.is_empty() && self.transactions > listed {
            let _ = writeln!(out, "    and {} more", self.transactions - listed);
        }
        if let Some(cure) = &self.cure {
            let _ = writeln!(out, "  {}", one_line(cure));
        }
        out
    }
}

/// What is not as it should be, the worst first, each with its cure; then how many things were looked at.
fn doctor_text(findings: &[Finding]) -> String {
    let mut out = String::new();
    let mut bad: Vec<&Finding> = findings.iter().filter(|f| f.severity != Severity::Ok).collect();
    // Stable: within one severity as the monitor has sorted them, by host.
    bad.sort_by_key(|f| std::cmp::Reverse(f.severity));
    for f in bad {
        let host = f.host.as_ref().map_or("monitor", HostName::as_str);
        let severity = f.severity.as_str().to_uppercase();
        let _ = writeln!(out, "{severity} {host} {}: {}", f.subject, one_line(&f.found));
        let _ = writeln!(out, "  tried: {}", one_line(&f.tried));
        if !f.cure.is_empty() {
            let _ = writeln!(out, "  cure:  {}", one_line(&f.cure));
        }
    }
    let count = |severity| findings.iter().filter(|f| f.severity == severity).count();
    let _ = writeln!(
        out,
        "# {} examined: {} errors, {} warnings, {} notices, {} in order",
        findings.len(),
        count(Severity::Error),
        count(Severity::Warning),
        count(Severity::Notice),
        count(Severity::Ok)
    );
    out
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
    fn doctor_names_the_worst_first_and_counts_the_rest() {
        use crate::examine::Subject;
        let bad = |severity, found: &str| Finding::bad(severity, Subject::LogBin, "log_bin", found, "log_bin=x");
        let answer = |findings| Answer::Doctor { findings };
        let ok = Finding::ok(Subject::Server, "logging in", "9.7.4").on(&"db1".into());
        let mixed =
            answer(vec![bad(Severity::Warning, "a\nb").on(&"db1".into()), ok.clone(), bad(Severity::Error, "OFF")]);
        assert!(mixed.is_error());
        assert_eq!(
            mixed.text(&|_| String::new()),
            "ERROR monitor log_bin: OFF\n\
             \x20 tried: log_bin\n\
             \x20 cure:  log_bin=x\n\
             WARNING db1 log_bin: a b\n\
             \x20 tried: log_bin\n\
             \x20 cure:  log_bin=x\n\
             # 3 examined: 1 errors, 1 warnings, 0 notices, 1 in order\n"
        );
        let fine = answer(vec![ok, bad(Severity::Warning, "w"), bad(Severity::Notice, "n")]);
        assert!(!fine.is_error(), "warnings and notices are no error");
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

//! The words for how a host, a check and the monitor itself stand. MMM's words, as `mmm_control` prints them.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! word {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[$vdoc])* #[serde(rename = $text)] $variant),+ }

        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = String;
            fn from_str(s: &str) -> Result<Self, String> {
                Self::ALL.iter().copied().find(|v| v.as_str() == s).ok_or_else(|| {
                    let known: Vec<&str> = Self::ALL.iter().map(|v| v.as_str()).collect();
                    format!("'{s}' is none of {}", known.join(", "))
                })
            }
        }
    };
}

word! {
    /// MMM's six host states. Only `ONLINE` hosts hold roles.
    HostState {
        Online = "ONLINE",
        AdminOffline = "ADMIN_OFFLINE",
        HardOffline = "HARD_OFFLINE",
        AwaitingRecovery = "AWAITING_RECOVERY",
        ReplicationDelay = "REPLICATION_DELAY",
        ReplicationFail = "REPLICATION_FAIL",
    }
}

word! {
    /// What a host is for: masters may hold the writer role, slaves follow the active master.
    HostMode { Master = "master", Slave = "slave" }
}

word! {
    /// The four checks of MMM, on every host.
    CheckKind { Ping = "ping", Mysql = "mysql", RepThreads = "rep_threads", RepBacklog = "rep_backlog" }
}

word! {
    /// How much the monitor does by itself. `mmm_control mode` prints these words.
    MonitorMode { Active = "ACTIVE", Manual = "MANUAL", Wait = "WAIT", Passive = "PASSIVE" }
}

word! {
    /// How a role's addresses are spread: one address on one host, or several over all hosts.
    RoleMode { Exclusive = "exclusive", Balanced = "balanced" }
}

/// What one check of one host found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", content = "detail", rename_all = "lowercase")]
pub enum CheckResult {
    /// Fine. The detail may be empty (`OK`) or not (`OK: Backlog is null`).
    Ok(String),
    /// Looked at and found bad, with the reason.
    Error(String),
    /// Could not be looked at, so nothing is known. Never counts as OK.
    Unknown(String),
}

impl CheckResult {
    pub fn is_ok(&self) -> bool {
        match self {
            CheckResult::Ok(_) => true,
            CheckResult::Error(_) | CheckResult::Unknown(_) => false,
        }
    }
}

impl fmt::Display for CheckResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, detail) = match self {
            CheckResult::Ok(d) => ("OK", d),
            CheckResult::Error(d) => ("ERROR", d),
            CheckResult::Unknown(d) => ("UNKNOWN", d),
        };
        if detail.is_empty() { f.write_str(word) } else { write!(f, "{word}: {detail}") }
    }
}

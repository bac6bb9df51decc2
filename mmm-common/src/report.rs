//! What an agent tells the monitor: what is really there, read back from the kernel and the server.

use crate::epoch::{Anchor, Epoch};
use crate::gtid::Gtids;
use crate::ids::HostName;
use crate::position::Position;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub anchor: Anchor,
    /// Every role address of the configuration, on this machine or not.
    pub addresses: BTreeMap<IpAddr, AddressReport>,
    pub server: ServerReport,
    pub task: Option<TaskReport>,
    #[serde(default)]
    pub job: Option<JobReport>,
    /// What the agent tried and could not do, in words, newest state of each thing only.
    pub troubles: Vec<String>,
    /// Whom this agent has vouched for within the last `lease_ttl`, and how many milliseconds ago the last time was: the
    /// monitor may not reach a host that its peers still see at work.
    pub vouched: BTreeMap<HostName, u64>,
    /// Addresses that this agent is to take and that somebody else answers for, with the MAC address that did.
    pub conflicts: BTreeMap<IpAddr, String>,
    /// The kernel's boot id: tells a restart of the agent from a reboot of the machine.
    pub machine_boot: String,
    /// The exact guard is up in this life of the agent: its answers for an address end with the lease to the millisecond,
    /// also when the agent is dead, so that less has to be waited out besides (safety.md, "margin").
    #[serde(default)]
    pub guarded: bool,
    /// The agent is shutting down and has let go (or is about to let go) of everything.
    pub leaving: bool,
}

/// R1: both fields together, the kernel looked at after `seen` was on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressReport {
    /// The highest epoch seen for the address.
    pub seen: Epoch,
    /// The address is on the machine.
    pub present: bool,
    /// The server may still be written to because of it (R13).
    pub open: bool,
    /// For how many milliseconds from now on this agent has promised not to take it without proof: as long, another host
    /// for which it has vouched may go on with it (R6).
    pub promised_ms: u64,
}

impl AddressReport {
    /// Not released yet: what "has it" means in safety.md, R8 and R13.
    pub fn has(&self) -> bool {
        self.present || self.open
    }
}

/// What the agent knows of its own server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerReport {
    pub life: Life,
    pub writing: Writing,
    /// Everything executed here: MySQL's gtid_executed; MariaDB's gtid_binlog_state with gtid_slave_pos.
    pub executed: Option<Gtids>,
    pub replication: Option<ReplicationReport>,
    /// None: the server has none (MySQL: the plugins are not installed), or it is not known.
    #[serde(default)]
    pub semisync: Option<SemiSync>,
}

impl ServerReport {
    /// Before anything is known.
    pub fn unknown(why: &str) -> Self {
        ServerReport {
            life: Life::Unknown { why: why.to_owned() },
            writing: Writing::Unknown,
            executed: None,
            replication: None,
            semisync: None,
        }
    }
}

/// Whether the server runs. `Dead` and `Hung` are the agent's own, certain findings; `Unknown` moves nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "life", rename_all = "snake_case")]
pub enum Life {
    Alive,
    /// Its process has ended: connections broke and a new one was refused on the host itself.
    Dead {
        why: String,
        /// Another one runs by now, and nobody has looked yet at what a crash has left to it.
        #[serde(default)]
        restarted: bool,
    },
    /// Neither the kept connection nor a new one has answered for `hang_timeout`.
    Hung {
        for_ms: u64,
    },
    /// Not looked at yet, or it runs but will not let the agent in (privileges, too many connections).
    Unknown {
        why: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Writing {
    Allowed,
    ReadOnly,
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicationReport {
    /// The source's address as the server has it configured; empty when none is.
    pub source: String,
    pub port: u16,
    /// The I/O thread is running and connected ("Yes"; "Connecting" is not).
    pub io_running: bool,
    pub sql_running: bool,
    /// Everything received into the relay log, applied or not.
    pub received: Option<Gtids>,
    /// Seconds_Behind, in milliseconds; None when the server says NULL.
    pub behind_ms: Option<u64>,
    /// Last error of either thread ([`ReplicationReport::errors`]); empty when there is none.
    pub error: String,
}

impl ReplicationReport {
    const SQL_THREAD: &str = "SQL thread: ";

    /// Those of both threads as one text; empty is none.
    pub fn errors(io: &str, sql: &str) -> String {
        let named = [("I/O thread: ", io), (Self::SQL_THREAD, sql)].into_iter().filter(|(_, error)| !error.is_empty());
        named.map(|(thread, error)| format!("{thread}{error}")).collect::<Vec<_>>().join("; ")
    }

    /// What the SQL thread has stopped with; None: it runs, or was stopped without an error.
    pub fn sql_error(&self) -> Option<&str> {
        let (_, error) = self.error.rsplit_once(Self::SQL_THREAD)?;
        (!self.sql_running).then_some(error)
    }
}

/// Semi-synchronous replication, both sides of one server (data-safety.md).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemiSync {
    /// The source side is switched on.
    pub source: bool,
    /// Commits wait for an acknowledgement now: switched on, and not fallen back.
    pub waits: bool,
    /// The wait comes before others see the commit (AFTER_SYNC).
    pub after_sync: bool,
    /// How long a commit waits before it is acknowledged without a replica, in milliseconds.
    pub timeout_ms: u64,
    /// How many replicas that acknowledge are attached.
    pub replicas: u64,
    /// How many of them have to acknowledge a commit.
    pub wait_count: u64,
    /// The replica side is switched on.
    pub replica: bool,
    /// The I/O thread runs and acknowledges.
    pub acknowledges: bool,
}

impl SemiSync {
    /// Commits wait now, and as many replicas are attached as have to acknowledge them.
    pub fn is_acknowledged(&self) -> bool {
        self.source && self.waits && self.replicas >= self.wait_count.max(1)
    }

    /// Whether an acknowledged commit is on a replica, also when this host is isolated: it must not fall back before it
    /// is fenced, for which `fenced_within` is allowed. The error says why not.
    pub fn in_effect(&self, fenced_within: Duration) -> Result<(), String> {
        let timeout = Duration::from_millis(self.timeout_ms);
        if !self.source {
            Err("its source side is off".to_owned())
        } else if !self.waits {
            Err("commits do not wait: no replica acknowledges".to_owned())
        } else if !self.after_sync {
            Err("the wait point is not AFTER_SYNC".to_owned())
        } else if timeout <= fenced_within {
            Err(format!(
                "its timeout of {} ms is not longer than {} ms",
                timeout.as_millis(),
                fenced_within.as_millis()
            ))
        } else {
            Ok(())
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskReport {
    pub id: Epoch,
    pub outcome: TaskOutcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum TaskOutcome {
    Running,
    /// Done; the position is what the server had executed when it was done.
    Done {
        position: Option<Position>,
    },
    Failed {
        why: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobReport {
    pub id: Epoch,
    pub state: JobState,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum JobState {
    Running {
        /// What is being done, in words, with how far it is: `copying from db1: 120 of 300 MiB`.
        step: String,
    },
    /// `extras`: after Save.
    Done {
        extras: Option<Extras>,
    },
    Failed {
        why: String,
    },
}

/// Transactions that a host has and the active master lacks, as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extras {
    pub gtids: Gtids,
    pub transactions: u64,
    /// One line each, oldest first, at most [`Extras::LISTED`]: `0-1-17  2026-11-21 16:55:01  app.t: 1 inserted`.
    pub list: Vec<String>,
    /// Where the SQL is, on that host.
    pub saved: String,
}

impl Extras {
    pub const LISTED: usize = 100;
}

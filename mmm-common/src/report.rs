//! What an agent tells the monitor: what is really there, read back from the kernel and the server.

use crate::epoch::{Anchor, Epoch};
use crate::gtid::Gtids;
use crate::ids::HostName;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub anchor: Anchor,
    /// Every role address of the configuration, on this machine or not.
    pub addresses: BTreeMap<IpAddr, AddressReport>,
    pub server: ServerReport,
    pub task: Option<TaskReport>,
    /// What the agent tried and could not do, in words, newest state of each thing only.
    pub troubles: Vec<String>,
    /// Whom this agent has vouched for within the last `lease_ttl`, and how many milliseconds ago the last time was: the
    /// monitor may not reach a host that its peers still see at work.
    pub vouched: BTreeMap<HostName, u64>,
    /// Addresses that this agent is to take and that somebody else answers for, with the MAC address that did.
    pub conflicts: BTreeMap<IpAddr, String>,
    /// The kernel's boot id: tells a restart of the agent from a reboot of the machine.
    pub machine_boot: String,
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
}

impl ServerReport {
    /// Before anything is known.
    pub fn unknown(why: &str) -> Self {
        ServerReport {
            life: Life::Unknown { why: why.to_owned() },
            writing: Writing::Unknown,
            executed: None,
            replication: None,
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
    /// Last error of either thread; empty when there is none.
    pub error: String,
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
        position: Option<Gtids>,
    },
    Failed {
        why: String,
    },
}

//! What the monitor tells an agent: always the whole picture of what the host should be doing, never a change.
//!
//! An order answers one report. Sending the same picture again in answer to a newer report renews the leases.

use crate::epoch::{Anchor, Epoch};
use crate::gtid::Gtids;
use crate::ids::{HostName, RoleName};
use crate::position::Position;
use crate::state::HostState;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The report that this answers; leases count from when that one was sent (R4).
    pub answers: Anchor,
    /// How long the monitor believes a lease to last, in milliseconds. An agent whose own `lease_ttl` is longer must
    /// not outstay what the monitor waits out.
    pub lease_ttl_ms: u64,
    /// What the monitor thinks of the host; for the agent's log.
    pub state: HostState,
    /// Addresses the monitor has a word to say about. One that is not named is neither renewed nor taken away.
    pub addresses: BTreeMap<IpAddr, AddressOrder>,
    pub replication: ReplicationOrder,
    /// Whether there is a replica whose acknowledgement is worth waiting for: in line with this host, and not known to be
    /// down. Only a monitor that is heard can say that there is none, so an isolated writer goes on waiting.
    #[serde(default = "yes")]
    pub wait_for_replica: bool,
    /// One piece of work in the path of a move, with an end; done once per id.
    pub task: Option<Task>,
    /// Long work on this host's data, outside of any move; done once per id.
    #[serde(default)]
    pub job: Option<Job>,
}

fn yes() -> bool {
    true
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum AddressOrder {
    Hold(Hold),
    /// Forget any order for the address, remove it, report.
    LetGo {
        epoch: Epoch,
    },
}

impl AddressOrder {
    pub fn epoch(&self) -> Epoch {
        match self {
            AddressOrder::Hold(h) => h.epoch,
            AddressOrder::LetGo { epoch } => *epoch,
        }
    }
}

/// An order to have an address (safety.md, R2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    pub epoch: Epoch,
    pub role: RoleName,
    /// The other agents that could be given the address, and whose vouches together extend the lease (R6).
    pub granters: BTreeSet<HostName>,
    /// True only if nobody else could be acting on an order for this address when it was sent (R3).
    pub proof: bool,
    /// Whether the server is to be writable while the address is held (R13). A change is a new epoch.
    pub write: bool,
}

/// Whom the host's server should replicate from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "replicate", rename_all = "snake_case")]
pub enum ReplicationOrder {
    /// Leave replication as it is.
    Keep,
    /// Replicate from `host`, both threads running. The login is in the agent's own configuration.
    Follow { host: HostName },
    /// Fetch from nobody (the I/O thread is stopped); what was received is still applied.
    Detached,
}

/// Work with an end. The agent does it once per `id` and goes on reporting how it ended until the order drops it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// The epoch of the decision that this belongs to.
    pub id: Epoch,
    pub work: Work,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "work", rename_all = "snake_case")]
pub enum Work {
    /// Make the server read-only without losing an acknowledged commit, and tell its position (data-safety.md,
    /// planned move, step 2). Fails within `timeout_ms`, and then the server is as it was.
    Quiesce {
        /// How long to wait for a moment without open write transactions before forcing one.
        grace_ms: u64,
        timeout_ms: u64,
    },
    /// Wait until everything in `position` has been applied here (step 3).
    CatchUp { position: Position, timeout_ms: u64 },
    /// Stop fetching, apply everything that has been received, and tell the position (unplanned failover, step 3).
    /// A stopped SQL thread is started first; one that cannot go on is a failure, not "in sync".
    Drain { timeout_ms: u64 },
    /// After a drain: fetch from another replica what only that one has, until everything in `position` has been applied
    /// here, then stop fetching and tell the position (unplanned failover, step 2).
    Fetch { from: HostName, position: Gtids, timeout_ms: u64 },
}

/// Long work on the data of a host that serves nothing. The agent begins it once per `id` and goes on reporting how it
/// goes until the order drops it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The epoch of the decision that this belongs to.
    pub id: Epoch,
    pub work: JobWork,
}

/// What is done to transactions that a host has and the active master lacks (data-safety.md, "When the old master comes
/// back"). Extra is what is in `having`, this host's position when the two were compared, and not in `lacking`, the active
/// master's. What this host has executed since then was replicated to it and is not extra.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "job", rename_all = "snake_case")]
pub enum JobWork {
    /// Count them, list them, and save them as SQL on this host. Changes nothing.
    Save { having: Gtids, lacking: Gtids },
    /// Saved before: undo their row changes and take them out of the server's GTID state, where every one of them can
    /// be undone; else fail, having changed nothing.
    Undo { having: Gtids, lacking: Gtids },
    /// Saved before: throw this host's data away and copy those of `from`. Ends with the server running, read-only, its
    /// GTID state that of the copy, and nothing to replicate from.
    Reclone { from: HostName },
}

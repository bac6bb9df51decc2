//! What agents say to each other: one that has a hold order asks its granters to vouch for it (safety.md, R6).
//!
//! A vouch is a promise of the granter: for `lease_ttl` and the margin it will not take the address without proof that
//! nobody else has it. So a monitor may be away for as long as it likes, and the holder goes on.

use crate::epoch::{Anchor, Epoch};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Asked by an agent that has hold orders, whether it holds, waits or has run out of time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VouchRequest {
    /// Of the asking agent, from the counter that numbers its reports: leases count from when this was sent.
    pub anchor: Anchor,
    /// How long a lease the asking agent will take from the answer, in milliseconds.
    pub lease_ttl_ms: u64,
    /// As in its reports: the granter waits out a shorter margin then.
    #[serde(default)]
    pub guarded: bool,
    /// The epoch of the hold order for each address that it asks about.
    pub addresses: BTreeMap<IpAddr, Epoch>,
}

/// The answer to one request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VouchAnswer {
    /// Of the request.
    pub anchor: Anchor,
    /// How long a lease the granter waits out from now on, besides its margin; of the request.
    pub lease_ttl_ms: u64,
    /// What is vouched for, with the epoch that was asked about.
    pub vouched: BTreeMap<IpAddr, Epoch>,
    /// What is not, and why, in words.
    pub refused: BTreeMap<IpAddr, String>,
}

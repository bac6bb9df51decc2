//! Numbers that decide who is right: the epoch of a decision, and the anchor that ties an order to the report
//! it answers (safety.md, R1 to R4).

use serde::{Deserialize, Serialize};
use std::fmt;

/// The number of a decision of the monitor: who holds an address, with which granters, and whether it may write.
/// Numbers only grow; one counter serves all addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One life of an agent process. A new one at every start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Boot(pub u64);

/// Names one report (or vouch request) of one agent: its life and the number within it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Anchor {
    pub boot: Boot,
    pub seq: u64,
}

//! How messages travel: one JSON document a line, over TCP, the monitor connecting to the agents.
//!
//! The first line of either side is its hello. A side that hears another protocol number says so and closes.

use crate::epoch::Boot;
use crate::ids::HostName;
use crate::order::Order;
use crate::report::Report;
use serde::{Deserialize, Serialize};

/// Raised when old and new programs would misunderstand each other.
pub const PROTOCOL: u32 = 1;

/// The longest line either daemon accepts, in bytes. A report of a host with hundreds of GTID sources fits.
pub const MAX_LINE: usize = 256 * 1024;

/// Monitor to agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum ToAgent {
    Hello {
        protocol: u32,
        /// Whom the monitor thinks it is talking to; an agent of another name refuses.
        host: HostName,
    },
    Order(Order),
}

/// Agent to monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum FromAgent {
    Hello {
        protocol: u32,
        host: HostName,
        boot: Boot,
        version: String,
    },
    Report(Box<Report>),
    /// The last word before the connection is closed: why.
    Refused {
        why: String,
    },
}

/// One message as a line, ready to send.
pub fn to_line<T: Serialize>(message: &T) -> Result<String, serde_json::Error> {
    let mut line = serde_json::to_string(message)?;
    line.push('\n');
    Ok(line)
}

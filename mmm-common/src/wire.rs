//! How messages travel: one JSON document a line, over TCP. The monitor connects to the agents, and each agent to those
//! that could take its addresses from it (its granters); both to the same port.
//!
//! The first line of either side is its hello. A side that hears another protocol number says so and closes.

use crate::epoch::Boot;
use crate::examine::Examined;
use crate::ids::HostName;
use crate::order::Order;
use crate::report::Report;
use crate::vouch::{VouchAnswer, VouchRequest};
use serde::{Deserialize, Serialize};

/// Raised when old and new programs would misunderstand each other.
pub const PROTOCOL: u32 = 3;

/// The longest line either daemon accepts, in bytes. A report of a host with hundreds of GTID sources fits.
pub const MAX_LINE: usize = 256 * 1024;

/// To an agent, from the monitor or from another agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum ToAgent {
    Hello {
        protocol: u32,
        /// Whom the monitor thinks it is talking to; an agent of another name refuses.
        host: HostName,
        /// Which monitor this is. Two of them could give one address to two hosts, so an agent obeys one at a time.
        monitor: u64,
    },
    Order(Order),
    /// The first line of another agent; it goes on with `Vouch` only.
    PeerHello {
        protocol: u32,
        /// Whom it thinks it is talking to.
        host: HostName,
        /// Who it is. The connection must come from that host's configured address.
        from: HostName,
    },
    Vouch(VouchRequest),
    /// The first and only line of a connection by which a monitor has the host examined for `mmm_control doctor`. It
    /// changes nothing, so it does not matter whom the agent obeys.
    Examine {
        protocol: u32,
        /// Whom the monitor thinks it is talking to.
        host: HostName,
        monitor: u64,
    },
}

/// The first and only line of a connection by which another agent copies this host's data. It must come from that host's
/// configured address. These have a connection of their own: bulk data must not hold up vouching.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum ToDonor {
    Donate {
        protocol: u32,
        /// Whom it thinks it is talking to.
        host: HostName,
        /// Who it is.
        from: HostName,
    },
}

/// The answer, before the data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub enum FromDonor {
    /// Frames of the helpers follow, about so many bytes.
    Donating { bytes: u64 },
    /// As [`FromAgent::Refused`].
    Refused { why: String },
}

/// From an agent, to the monitor or to another agent that asks.
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
    Vouch(VouchAnswer),
    /// An examination begins: this host's wall clock at that moment.
    Examining {
        unix_ms: u64,
    },
    /// It has ended; the last word.
    Examined(Box<Examined>),
    /// The last word before the connection is closed: why.
    Refused {
        why: String,
        /// Nobody has to put anything right here: it passes, so try again soon.
        #[serde(default)]
        passes: bool,
    },
}

/// One message as a line, ready to send.
pub fn to_line<T: Serialize>(message: &T) -> Result<String, serde_json::Error> {
    let mut line = serde_json::to_string(message)?;
    line.push('\n');
    Ok(line)
}

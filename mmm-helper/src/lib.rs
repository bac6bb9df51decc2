//! How the agent and its helper, `mmm_helperd`, talk: over a unix socket, one request a connection.
//!
//! The agent needs no more than two capabilities; what only root can do to the database server is done by the helper. It
//! takes fixed verbs with numbers at most: never a command, a path or a name, so that whoever gets hold of the agent gets
//! no shell with it. Everything else it reads from the agent's configuration itself.

pub mod frames;

use mmm_common::config::Agent;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The longest line either side accepts, in bytes.
pub const MAX_LINE: usize = 64 * 1024;

/// The folder of the default state_path, and the socket that belongs to it.
const DEFAULT_STATE: &str = "/var/lib/mysql-mmm";
const DEFAULT_SOCKET: &str = "/run/mysql-mmm/helper.sock";

/// Where the helper of this agent listens: `/run/mysql-mmm/helper.sock`, and with a state_path in another folder than
/// the default's, `helper.sock` in that folder (several agents on one machine, as in a laboratory).
pub fn socket_path(config: &Agent) -> PathBuf {
    match config.state_path.parent() {
        Some(folder) if folder != Path::new(DEFAULT_STATE) => folder.join("helper.sock"),
        Some(_) | None => PathBuf::from(DEFAULT_SOCKET),
    }
}

/// The one line of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
pub enum Verb {
    /// What is there. The only one that may be asked while something else is under way, besides `Kill`.
    Status,
    /// Runs mysql_start_command. Answered when that has ended; whether the server takes logins is not looked at.
    Start,
    /// Runs mysql_stop_command and waits until no server uses the datadir any more.
    Stop,
    /// SIGKILL to the server.
    Kill,
    /// Sends this host's data (MariaDB): `Go`, and then frames until one says that it was all.
    Donate,
    /// Takes the data of another host: answered by `Go`, then frames are read, and what came is made ready to run
    /// beside the datadir, which stays untouched, as does the server.
    Receive {
        /// What the donor thinks that it will be; refused when it does not fit on the disk.
        expected_bytes: u64,
    },
    /// Puts what was received into the place of the datadir, whose present content is kept aside. Refused while anybody
    /// uses one of them.
    Swap,
    /// The way back from `Swap`: the data kept aside return. Refused while anybody uses the datadir or them.
    Restore,
    /// Deletes what is kept aside and what was received and is not in place (any more).
    Discard,
}

impl Verb {
    /// In words, for the log and for "busy".
    pub fn describe(&self) -> &'static str {
        match self {
            Verb::Status => "look",
            Verb::Start => "start the server",
            Verb::Stop => "stop the server",
            Verb::Kill => "kill the server",
            Verb::Donate => "send this host's data",
            Verb::Receive { .. } => "receive another host's data",
            Verb::Swap => "put the received data in place",
            Verb::Restore => "put the old data back",
            Verb::Discard => "delete the old data",
        }
    }
}

/// Lines in answer: any number of `Step`, then one of the others. After `Go` frames follow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    Step {
        step: String,
    },
    /// The data come (Donate), or may be sent (Receive).
    Go {
        /// About how much it will be.
        bytes: u64,
    },
    Status(Status),
    /// After Receive: the GTID position of the copy.
    Received {
        gtid_position: String,
    },
    Done,
    Failed {
        why: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Database servers with files of the datadir open.
    pub users: Vec<u32>,
    pub datadir: Option<String>,
    /// Why this host could not receive a copy now, in words.
    pub cannot_receive: Option<String>,
}

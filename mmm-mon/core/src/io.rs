//! What goes into the monitor's core, and what comes out.
//!
//! The shell carries out outputs in the order given. A `Persist` is on disk before anything after it happens; if it
//! cannot be saved, the shell drops the rest of the list and ends the process (the agents then live on their leases).
//! The core cannot fail: what did not work comes back as an input.

use crate::Snapshot;
use mmm_common::config::Monitor as Config;
use mmm_common::control::{Answer, Command};
use mmm_common::epoch::{Boot, Epoch};
use mmm_common::ids::HostName;
use mmm_common::order::Order;
use mmm_common::report::Report;
use mmm_common::state::{CheckKind, CheckResult};

/// Names one request of an operator, so that its answer finds the way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestId(pub u64);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A deadline of `next_deadline` has come.
    Tick,
    /// One check of one host has ended.
    Check {
        host: HostName,
        check: CheckKind,
        result: CheckResult,
    },
    /// The monitor's own network check: whether any of `ping_ips` answers.
    Network {
        reachable: bool,
    },
    /// An agent is connected and its hello was right.
    AgentUp {
        host: HostName,
        boot: Boot,
        version: String,
    },
    AgentDown {
        host: HostName,
        why: String,
    },
    Report {
        host: HostName,
        report: Box<Report>,
    },
    Command {
        id: RequestId,
        command: Command,
        who: String,
    },
    /// `kill_host_bin` has ended. `asked`: the epoch in `Output::Kill`.
    Killed {
        host: HostName,
        asked: Epoch,
        result: Result<(), String>,
    },
    /// SIGHUP with a good new configuration.
    Reload(Box<Config>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Persist(Box<Snapshot>),
    /// Send to the agent if connected; never waits for it.
    Send {
        host: HostName,
        order: Box<Order>,
    },
    /// Run `kill_host_bin HOST 1|0`, with a deadline.
    Kill {
        host: HostName,
        asked: Epoch,
        ping_ok: bool,
    },
    Reply {
        id: RequestId,
        answer: Answer,
    },
    Audit(Audit),
}

/// One line for the log: a decision (also the decision to do nothing) or a finding, with its reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audit {
    pub level: Level,
    pub host: Option<HostName>,
    pub epoch: Option<Epoch>,
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Info,
    Warn,
    Error,
}

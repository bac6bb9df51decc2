//! What goes into the agent's core, and what comes out.
//!
//! The shell carries out outputs in the order given. A `Persist` is on disk before anything after it happens; if it
//! cannot be saved, the shell drops the rest of the list and ends the process (its addresses then leave by the
//! kernel's hand). The core cannot fail: what did not work comes back as an input.

use mmm_common::epoch::Epoch;
use mmm_common::ids::{HostName, Millis};
use mmm_common::order::{Hold, Job, Order, Task};
use mmm_common::report::{JobState, Report, ServerReport, TaskOutcome};
use mmm_common::vouch::{VouchAnswer, VouchRequest};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A deadline of `next_deadline` has come.
    Tick,
    /// A monitor has connected and its hello was right. Any older connection is closed by the shell.
    MonitorUp,
    MonitorDown {
        why: String,
    },
    Order(Order),
    /// Answer to `LookUp`: which role addresses of the configuration are on the machine now.
    Kernel {
        asked: u64,
        present: BTreeSet<IpAddr>,
    },
    /// The kernel could not be asked.
    KernelUnreadable {
        asked: u64,
        why: String,
    },
    /// The kernel announced a change of a role address or of a cluster interface (link down or up).
    KernelChanged,
    /// What the database watcher sees; sent at every change and at least once a second.
    Server(ServerReport),
    /// The connection to another agent, over which it can be asked to vouch, is there.
    PeerUp {
        host: HostName,
    },
    PeerDown {
        host: HostName,
        why: String,
    },
    /// Another agent asks this one to vouch for it. The shell has made sure that it is the one it says it is, as far as
    /// the channel allows. `ask` names the request until it is answered.
    Asked {
        ask: AskId,
        from: HostName,
        request: VouchRequest,
    },
    /// Another agent's answer to this one's `Ask`.
    Vouched {
        by: HostName,
        answer: VouchAnswer,
    },
    /// Answer to `Step::Probe`: the MAC address of somebody else on the wire who has the address; None: nobody answered.
    Probed {
        ip: IpAddr,
        answered_by: Option<String>,
    },
    /// A step was carried out, or not.
    Done {
        step: Step,
        result: Result<(), String>,
    },
    /// A `Step::Task` has ended.
    TaskDone {
        id: Epoch,
        outcome: TaskOutcome,
    },
    /// How a `Step::Job` goes, or has ended.
    Job {
        id: Epoch,
        state: JobState,
    },
    /// SIGTERM. `keep`: an upgrade; leave everything as it is and save, so that the next process goes on.
    Shutdown {
        keep: bool,
    },
}

/// Names one request of another agent until it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AskId(pub u64);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Persist(Saved),
    /// Read the kernel's addresses and give them back as `Kernel`, before handling any other input.
    LookUp {
        asked: u64,
    },
    /// Send to the monitor, if connected.
    Send(Box<Report>),
    /// Ask another agent to vouch, if connected; never waits for it.
    Ask {
        to: HostName,
        request: Box<VouchRequest>,
    },
    /// The answer to `Input::Asked`, to be sent if that connection is still there.
    Vouch {
        ask: AskId,
        answer: Box<VouchAnswer>,
    },
    Do(Step),
    Audit(Audit),
    /// Everything is let go (or kept on purpose): end the process.
    Exit,
}

/// Something to do on this host. Address steps are done at once, in order, and answered by `Done` before the next
/// input. Server steps are queued to one worker that does them one after the other under deadlines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Add the address, or refresh it when it is there, with a kernel lifetime of so many whole seconds. It fails, and
    /// leaves nothing behind that outlasts `until`, when this process was stopped between the decision and the kernel.
    /// With the exact guard the address is allowed to answer until `until` first, and the lifetime may be longer.
    Address {
        ip: IpAddr,
        lifetime_s: u32,
        until: Millis,
    },
    /// With the exact guard only: the address, which is here, may answer until then and not longer.
    Allow {
        ip: IpAddr,
        until: Millis,
    },
    /// Ask on the wire, three times within a tenth of a second, whether somebody else has the address (ARP; IPv6:
    /// neighbour solicitation), without waiting for it here. Answered by `Probed`, not by `Done`.
    Probe {
        ip: IpAddr,
    },
    /// Gratuitous ARP (IPv6: neighbour advertisement) at 0, 0.1, 0.3, 1, 3 and 5 s, until the address is removed.
    Announce {
        ip: IpAddr,
    },
    /// Destroy the sockets on the address, then remove it. Not being there is success. `turn_away`: connections that
    /// are still tried here are refused for a moment, so that clients need not wait for an answer that never comes.
    Remove {
        ip: IpAddr,
        turn_away: bool,
    },
    /// `read_only = 1` (and super_read_only), at once, and read it back. Clients that write are killed when they
    /// hold it up.
    ReadOnly,
    /// `read_only = 0`, and read it back. Not begun after `until`, the end of the lease (R13).
    Writable {
        until: Millis,
    },
    /// Point replication at this host (login from the configuration) and start both threads. Nothing is done when
    /// it is so already.
    Follow {
        host: HostName,
    },
    /// Stop the I/O thread; the SQL thread goes on.
    Detach,
    /// Switch one side of semi-synchronous replication. The replica side takes effect by a restart of the I/O thread,
    /// which is part of the step.
    SemiSync {
        side: Side,
        on: bool,
    },
    /// SIGKILL to the local server, which hangs and may be writable.
    KillServer,
    Task(Task),
    /// Answered by `Input::Job`, several times.
    Job(Job),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// Commits here wait for a replica.
    Source,
    /// What is received here is acknowledged.
    Replica,
}

/// What must survive the process (safety.md, R4 and R9).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    pub addresses: BTreeMap<IpAddr, SavedAddress>,
    /// The last task that was begun; an older one is never begun again.
    pub task: Epoch,
    /// The last job that was begun; an older one is never begun again, and one that was under way has failed.
    #[serde(default)]
    pub job: Epoch,
    /// This agent has stopped the I/O thread, so an order to follow has to start it again.
    pub detached: bool,
    /// The kernel's boot id when this was saved: hold orders are used again only within it.
    pub machine_boot: String,
    /// The exact guard was up: whoever has orders from that life may have less time to give its addresses up than a
    /// process without the guard needs.
    #[serde(default)]
    pub guarded: bool,
    /// The server had been opened by this life or one before, and no agent has closed it since: who finds it closed knows
    /// that it has ended in between.
    #[serde(default)]
    pub open: bool,
    /// The longest lease, in milliseconds, that this agent has ever vouched for: the next life waits it out (R9).
    #[serde(default)]
    pub vouched_ttl_ms: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedAddress {
    pub seen: Epoch,
    /// The hold order; how long its lease still runs is known to the kernel, which has the address's lifetime.
    pub hold: Option<Hold>,
    /// An agent has put the address on this machine, and no order for it is remembered: the state file was lost. It is
    /// given up, and the server closed.
    #[serde(default)]
    pub forgotten: bool,
}

/// One line for the log: a decision or a finding, with its reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Audit {
    Info(String),
    Warn(String),
    Error(String),
}

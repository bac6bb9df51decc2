//! The safety rules by name, so that the model checker (tests/model) can take one away from the real code and show what
//! then goes wrong.
//!
//! In the programs every rule stands: [`stands`] is the constant `true`, and nothing can change it. Only with the
//! feature `model`, which no program has, can they be removed, for the whole process.

/// One rule of safety.md that the code keeps at one place. Removing it must let the model checker find two holders,
/// but for the two marked otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Safeguard {
    /// R4: an agent refuses an order of an epoch lower than the highest it has seen.
    EpochCheck,
    /// R4: a lease counts from when the report was sent, not from when the order came.
    LeaseFromSending,
    /// R4: an order or a vouch that answers a report of another life gives nothing.
    AnchorOfThisLife,
    /// R9: the highest epoch seen survives the agent's restart.
    EpochSurvives,
    /// R5: without proof an address is not added before the own promises are over.
    VouchWait,
    /// R9: after a restart an agent waits as if it had vouched just before.
    VouchQuarantine,
    /// R6 (b): nobody vouches for an epoch lower than it has seen.
    VouchEpoch,
    /// R6 (b): nobody vouches who has the address.
    VouchNotHolding,
    /// R6 (b): nobody vouches who has an order with a running lease. Kept for clarity, not needed.
    VouchNotWaiting,
    /// R6 (c): a vouch counts from when it was asked for, not from when it came.
    VouchFromSending,
    /// R6 (c): a vouch counts only for the epoch of the present order.
    VouchOfThisEpoch,
    /// R6 (c): every granter has to vouch.
    EveryGranter,
    /// R7: the leases that the monitor gave to others are waited out.
    LeaseWait,
    /// R7: only a granter can succeed by waiting.
    GrantersOnly,
    /// R7: every order that somebody may act on is looked at, not only the last.
    EveryOrder,
    /// R3: proof is true only if nobody else may be acting on an order.
    ProofOfAll,
    /// R3: a decision is on disk before it is sent.
    DiskFirst,
    /// R3: the granters of an order survive the monitor's restart.
    GrantersOnDisk,
    /// R8 (a): an acknowledgement while something remains restarts the waiting: older leases may have been extended.
    AcknowledgedWait,
    /// R8 (a): only a report at a later epoch clears an order.
    ReleaseAtLaterEpoch,
    /// R8 (a): a report of somebody who still has the address clears nothing, unless it holds by a known order.
    ReleaseWithoutAddress,
    /// R8 (b): somebody holding by a newer order clears the older ones. It only shortens waits: not needed.
    HoldReportClears,
    /// R10: a restarted monitor waits out everything sent before.
    RestartQuarantine,
    /// R11: after the loss of the monitor's disk only a report at the new epoch counts.
    LostDiskEpoch,
    /// R11: after the loss of the disk, numbering goes on above every epoch ever sent.
    LostDiskNumbering,
    /// "margin": the kernel's lateness and the clocks' drift are waited out as well.
    Margin,
}

impl Safeguard {
    pub const ALL: [Safeguard; 26] = [
        Safeguard::EpochCheck,
        Safeguard::LeaseFromSending,
        Safeguard::AnchorOfThisLife,
        Safeguard::EpochSurvives,
        Safeguard::VouchWait,
        Safeguard::VouchQuarantine,
        Safeguard::VouchEpoch,
        Safeguard::VouchNotHolding,
        Safeguard::VouchNotWaiting,
        Safeguard::VouchFromSending,
        Safeguard::VouchOfThisEpoch,
        Safeguard::EveryGranter,
        Safeguard::LeaseWait,
        Safeguard::GrantersOnly,
        Safeguard::EveryOrder,
        Safeguard::ProofOfAll,
        Safeguard::DiskFirst,
        Safeguard::GrantersOnDisk,
        Safeguard::AcknowledgedWait,
        Safeguard::ReleaseAtLaterEpoch,
        Safeguard::ReleaseWithoutAddress,
        Safeguard::HoldReportClears,
        Safeguard::RestartQuarantine,
        Safeguard::LostDiskEpoch,
        Safeguard::LostDiskNumbering,
        Safeguard::Margin,
    ];
}

/// Whether the rule is in force.
#[cfg(not(feature = "model"))]
pub const fn stands(_: Safeguard) -> bool {
    true
}

#[cfg(feature = "model")]
pub use removal::{remove, stands};

#[cfg(feature = "model")]
mod removal {
    use super::Safeguard;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// One bit per rule.
    static REMOVED: AtomicU32 = AtomicU32::new(0);

    /// Whether the rule is in force.
    pub fn stands(rule: Safeguard) -> bool {
        REMOVED.load(Ordering::Relaxed) & (1 << rule as u32) == 0
    }

    /// Takes a rule away from this process, for good. For the model checker only.
    pub fn remove(rule: Safeguard) {
        REMOVED.fetch_or(1 << rule as u32, Ordering::Relaxed);
    }
}

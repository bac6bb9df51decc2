//! The runs: how far each looks. The standard ones are small enough for every change to be checked; each safeguard is
//! taken away within bounds in which it is missed.

use crate::rules::{Rules, Sets};
use mmm_common::safeguard::Safeguard;

pub(crate) struct Run {
    pub(crate) name: &'static str,
    pub(crate) rules: Rules,
}

fn run(name: &'static str, rules: Rules) -> Run {
    Run { name, rules }
}

/// With every rule in force; these are CI's.
pub(crate) fn standard() -> Vec<Run> {
    let calm = Rules::calm(2, 2);
    let short = Rules { ttl: 1, ..calm };
    vec![
        run("calm", calm),
        run("granters", Rules { rewrite: true, unseen: true, ..short }),
        run("agents", Rules { restart: true, ..short }),
        run("monitor", Rules { monitor_restart: true, ..short }),
        run("kill", Rules { kill: true, ..short }),
        run("disk", Rules { lost_disk: true, ..short }),
        run("three", Rules { ttl: 1, sets: Sets::All, ..Rules::calm(3, 1) }),
    ]
}

/// For a machine with time (minutes to hours) and memory.
pub(crate) fn large() -> Vec<Run> {
    let calm = Rules::calm(2, 2);
    let short = Rules { ttl: 1, ..calm };
    vec![
        run("calm-granters", Rules { rewrite: true, unseen: true, ..calm }),
        run("calm-agents", Rules { restart: true, ..calm }),
        run("calm-monitor", Rules { monitor_restart: true, ..calm }),
        run("restarts", Rules { restart: true, monitor_restart: true, ..calm }),
        run(
            "everything",
            Rules { restart: true, monitor_restart: true, kill: true, rewrite: true, unseen: true, ..calm },
        ),
        run(
            "everything-short",
            Rules { restart: true, monitor_restart: true, kill: true, rewrite: true, unseen: true, ..short },
        ),
        run("epochs", Rules { epochs: 3, ..short }),
        run("epochs-restarts", Rules { epochs: 3, restart: true, monitor_restart: true, ..short }),
        run("blind", Rules { restart: true, blind: true, sets: Sets::One, ..calm }),
        run("disk-restarts", Rules { restart: true, monitor_restart: true, lost_disk: true, epochs: 3, ..short }),
        run("three-sets", Rules { ttl: 1, ..Rules::calm(3, 2) }),
        run("three-epochs", Rules { ttl: 1, sets: Sets::All, ..Rules::calm(3, 2) }),
    ]
}

/// Whether two holders are possible without this rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missed {
    Yes,
    /// Not within these bounds: the rule makes the others easier to understand, or only shortens a wait.
    No,
}

/// Where the loss of one rule shows.
pub(crate) fn without(rule: Safeguard) -> (Rules, Missed) {
    let calm = Rules { complete: false, ..Rules::calm(2, 2) };
    let agents = Rules { restart: true, ..calm };
    let monitor = Rules { monitor_restart: true, ..calm };
    let disk = Rules { lost_disk: true, epochs: 3, ..calm };
    let three = Rules { ttl: 1, sets: Sets::All, complete: false, ..Rules::calm(3, 3) };
    match rule {
        Safeguard::EpochCheck
        | Safeguard::LeaseFromSending
        | Safeguard::VouchWait
        | Safeguard::VouchEpoch
        | Safeguard::VouchNotHolding
        | Safeguard::VouchFromSending
        | Safeguard::LeaseWait
        | Safeguard::GrantersOnly
        | Safeguard::ProofOfAll
        | Safeguard::AcknowledgedWait
        | Safeguard::ReleaseAtLaterEpoch
        | Safeguard::ReleaseWithoutAddress
        | Safeguard::Margin => (calm, Missed::Yes),
        Safeguard::AnchorOfThisLife | Safeguard::VouchQuarantine => (agents, Missed::Yes),
        Safeguard::EpochSurvives => (Rules { sets: Sets::All, ..agents }, Missed::Yes),
        Safeguard::DiskFirst | Safeguard::GrantersOnDisk | Safeguard::RestartQuarantine => (monitor, Missed::Yes),
        Safeguard::LostDiskEpoch | Safeguard::LostDiskNumbering => (disk, Missed::Yes),
        Safeguard::EveryGranter => (three, Missed::Yes),
        Safeguard::EveryOrder => (Rules { complete: true, sets: Sets::One, ..three }, Missed::Yes),
        Safeguard::VouchNotWaiting | Safeguard::VouchOfThisEpoch | Safeguard::HoldReportClears => {
            (Rules { ttl: 1, ..calm }, Missed::No)
        }
    }
}

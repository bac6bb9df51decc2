//! The monitor's only clock for decisions: CLOCK_BOOTTIME, which also counts the time a machine was suspended.
//! It must never be replaced by wall time, which jumps, nor by CLOCK_MONOTONIC, which stops during a suspend.

use mmm_common::ids::Millis;
use nix::time::{ClockId, clock_gettime};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Added to every reading, so that "so long before now" is never below zero soon after a boot.
const OFFSET_MS: u64 = 1 << 40;

/// Milliseconds since the machine's boot, suspended time included, plus a constant.
pub(crate) fn now() -> Millis {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME exists since Linux 2.6.39");
    Millis(OFFSET_MS + millis(Duration::from(time)))
}

/// Wall time in milliseconds since 1970; zero when the clock says an earlier year. For the age of the status file
/// and for numbering the very first epoch only.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(millis).unwrap_or(0)
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_and_can_be_looked_back_from() {
        let before = now();
        std::thread::sleep(Duration::from_millis(20));
        let passed = now().since(before);
        assert!((Duration::from_millis(19)..Duration::from_secs(5)).contains(&passed), "{passed:?}");
        assert!((before - Duration::from_secs(10 * 365 * 86400)).0 > 0);
    }
}

//! A machine's CLOCK_BOOTTIME in the simulated world: it starts anywhere and runs up to 1 % fast or slow.
//!
//! Cores see only their own machine's clock; the world's own time is the true one. Nothing else converts between them.

use mmm_common::ids::Millis;

/// How far clocks run apart, in millionths.
pub(crate) const DRIFT_PPM: i64 = 10_000;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    /// At this true time it showed `shown`.
    since: u64,
    shown: u64,
    /// Millionths that it runs fast.
    ppm: i64,
}

impl Clock {
    /// The true time itself.
    pub(crate) fn exact() -> Clock {
        Clock { since: 0, shown: 0, ppm: 0 }
    }

    pub(crate) fn new(now: u64, shown: u64, ppm: i64) -> Clock {
        Clock { since: now, shown, ppm }
    }

    fn rate(&self) -> u128 {
        u128::from(1_000_000_u64.saturating_add_signed(self.ppm))
    }

    /// What it shows at a true time.
    pub(crate) fn shows(&self, at: u64) -> Millis {
        let ran = u128::from(at.saturating_sub(self.since)) * self.rate() / 1_000_000;
        Millis(self.shown + ran as u64)
    }

    /// The first true time at which it shows this or more.
    pub(crate) fn when(&self, shown: Millis) -> u64 {
        let ran = u128::from(shown.0.saturating_sub(self.shown)) * 1_000_000;
        self.since + ran.div_ceil(self.rate()) as u64
    }

    /// How long something takes in true time that takes `ms` on this clock.
    pub(crate) fn lasts(&self, ms: u64) -> u64 {
        (u128::from(ms) * 1_000_000).div_ceil(self.rate()) as u64
    }

    /// It stood still from `since` to `now`.
    pub(crate) fn stood_still(&mut self, since: u64, now: u64) {
        *self = Clock { since: now, shown: self.shows(since).0, ppm: self.ppm };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_comes_when_the_clock_shows_it_and_not_before() {
        for ppm in [-DRIFT_PPM, -1, 0, 3_333, DRIFT_PPM] {
            let clock = Clock::new(1 << 40, 77, ppm);
            for shown in [77, 78, 1_000, 123_456] {
                let at = clock.when(Millis(shown));
                assert!(clock.shows(at) >= Millis(shown), "{ppm} {shown}");
                assert!(at == 1 << 40 || clock.shows(at - 1) < Millis(shown), "{ppm} {shown}");
            }
        }
    }

    #[test]
    fn a_clock_that_stood_still_has_lost_that_time() {
        let mut clock = Clock::new(1_000, 500, 10_000);
        clock.stood_still(2_000, 10_000);
        assert_eq!(clock.shows(10_000), Millis(500 + 1_010));
    }
}

//! Counts the connections and messages that a daemon has refused, and says which of them are worth a log line: whoever
//! can reach a port must not be able to fill a disk.

use std::time::{Duration, Instant};

/// Between two log lines about refusals; between two that say the same, a minute.
const QUIET: Duration = Duration::from_secs(1);
const QUIET_SAME: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub struct Refusals {
    total: u64,
    left_out: u64,
    last: Option<(Instant, String)>,
}

/// What a log line about a refusal tells besides the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Since the start of the process.
    pub total: u64,
    /// Since the last line.
    pub left_out: u64,
}

impl Refusals {
    /// One more, at `now`, for the reason in `text`. None: it is counted, and no line is written.
    pub fn count(&mut self, now: Instant, text: &str) -> Option<Count> {
        self.total += 1;
        if let Some((at, before)) = &self.last
            && now.saturating_duration_since(*at) < if before == text { QUIET_SAME } else { QUIET }
        {
            self.left_out += 1;
            return None;
        }
        self.last = Some((now, text.to_owned()));
        Some(Count { total: self.total, left_out: std::mem::take(&mut self.left_out) })
    }

    /// All since the start of the process.
    pub fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_refusals_are_logged_and_all_are_counted() {
        let mut refusals = Refusals::default();
        let start = Instant::now();
        let mut after =
            |ms, text| refusals.count(start + Duration::from_millis(ms), text).map(|c| (c.total, c.left_out));
        assert_eq!(after(0, "a"), Some((1, 0)));
        assert_eq!(after(1, "b"), None);
        assert_eq!(after(999, "b"), None);
        assert_eq!(after(1000, "b"), Some((4, 2)));
        assert_eq!(after(60_999, "b"), None, "the same again");
        assert_eq!(after(61_000, "b"), Some((6, 1)));
        assert_eq!(refusals.total(), 6);
    }
}

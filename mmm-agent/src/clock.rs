//! The agent's only clock: CLOCK_BOOTTIME, which goes on counting while the machine is suspended, so that a lease
//! does not live longer because the lid was closed. Wall time is for log lines only and is never read here.

use mmm_common::epoch::Boot;
use mmm_common::ids::Millis;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId as TimerClock, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId, clock_gettime};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;
use tokio::io::unix::AsyncFd;

/// Added to the kernel's number, so that "so long ago" never goes below zero just after the machine has started.
/// A constant: times saved by one process are right in the next one (within one boot of the machine).
const OFFSET_MS: u64 = 1 << 40;

/// The time since the machine started.
///
/// # Panics
/// When the kernel has no CLOCK_BOOTTIME. Without a clock no lease can be judged; the process ends, and its addresses
/// leave by the kernel's hand.
pub(crate) fn now() -> Millis {
    Millis(OFFSET_MS) + since_start()
}

fn since_start() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).expect("reading CLOCK_BOOTTIME"))
}

/// A number for this life of the process that no earlier one had: 53 random bits (every JSON reader can hold them).
pub(crate) fn new_boot() -> Boot {
    const MASK: u64 = (1 << 53) - 1;
    let mut bytes = [0u8; 8];
    let random = std::fs::File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes));
    let number = match random {
        Ok(()) => u64::from_le_bytes(bytes),
        // A start takes longer than a nanosecond, and two processes alive at once differ in their pid.
        Err(_) => since_start().as_nanos() as u64 ^ (u64::from(std::process::id()) << 32),
    };
    Boot(number & MASK)
}

/// The kernel's own name for this boot of the machine.
pub(crate) fn machine_boot() -> io::Result<String> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(PATH).map_err(|e| io::Error::new(e.kind(), format!("reading {PATH}: {e}")))?;
    Ok(text.trim().to_owned())
}

/// Wakes at a moment of [`now`]'s clock. tokio's own timers stand still while the machine sleeps; this one rings as
/// soon as it wakes.
pub(crate) struct Alarm {
    timer: AsyncFd<Timer>,
}

struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Alarm {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(TimerClock::CLOCK_BOOTTIME, flags)?;
        #[expect(deprecated, reason = "its successor needs unsafe for descriptors that may be closed; ours is owned")]
        let timer = AsyncFd::new(Timer(timer))?;
        Ok(Alarm { timer })
    }

    /// Returns at `when` or after it; at once when it has passed. May be dropped and called anew at any time.
    pub(crate) async fn at(&self, when: Millis) -> io::Result<()> {
        while now() < when {
            let moment = TimeSpec::from_duration(Duration::from_millis(when.0.saturating_sub(OFFSET_MS)));
            self.timer.get_ref().0.set(Expiration::OneShot(moment), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
            let mut ready = self.timer.readable().await?;
            // A ring of an earlier setting is WouldBlock here (setting the timer takes it back), and the loop goes on.
            let _ = ready.try_io(|timer| timer.get_ref().0.wait().map_err(io::Error::from));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_lives_have_the_same_number() {
        let boots: std::collections::BTreeSet<_> = (0..100).map(|_| new_boot()).collect();
        assert_eq!(boots.len(), 100);
    }

    #[tokio::test]
    async fn the_alarm_rings_in_time_and_again_after_being_dropped() {
        let alarm = Alarm::new().unwrap();
        let start = now();
        // Dropped while waiting, after another setting: neither may disturb the next one.
        let _ = tokio::time::timeout(Duration::from_millis(5), alarm.at(start + Duration::from_millis(20))).await;
        alarm.at(start + Duration::from_millis(60)).await.unwrap();
        let after = now().since(start);
        assert!(after >= Duration::from_millis(60) && after < Duration::from_secs(2), "{after:?}");
        tokio::time::timeout(Duration::from_secs(1), alarm.at(start)).await.unwrap().unwrap();
    }
}

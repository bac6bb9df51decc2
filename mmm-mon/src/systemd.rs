//! What systemd is told: that the daemon is ready, reads its configuration again, ends, and is alive. Without systemd
//! there is nobody to tell.

use sd_notify::NotifyState;
use std::time::Duration;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tracing::warn;

/// Who may speak for the process: with several clusters in it not the loop of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Systemd {
    Told,
    NotTold,
}

impl Systemd {
    pub(crate) fn ready(self) {
        self.tell(&[NotifyState::Ready]);
    }

    pub(crate) fn reloading(self) {
        let mut words = vec![NotifyState::Reloading];
        words.extend(NotifyState::monotonic_usec_now());
        self.tell(&words);
    }

    pub(crate) fn stopping(self) {
        self.tell(&[NotifyState::Stopping]);
    }

    /// Twice as often as systemd asks for; None when it does not ask.
    pub(crate) fn watchdog(self) -> Watchdog {
        let asked = sd_notify::watchdog_enabled().filter(|_| self == Systemd::Told);
        let timer = asked.map(|every| {
            let mut timer = interval((every / 2).max(Duration::from_millis(10)));
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
            timer
        });
        Watchdog { systemd: self, timer }
    }

    fn tell(self, words: &[NotifyState]) {
        if self == Systemd::Told
            && let Err(e) = sd_notify::notify(words)
        {
            warn!("systemd could not be told {words:?}: {e}");
        }
    }
}

pub(crate) struct Watchdog {
    systemd: Systemd,
    timer: Option<Interval>,
}

impl Watchdog {
    /// When the next sign of life is due.
    pub(crate) async fn due(&mut self) -> Instant {
        match &mut self.timer {
            Some(timer) => timer.tick().await,
            None => std::future::pending().await,
        }
    }

    pub(crate) fn alive(&self) {
        self.systemd.tell(&[NotifyState::Watchdog]);
    }
}

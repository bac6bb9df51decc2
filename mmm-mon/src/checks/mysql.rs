//! Does the host's MySQL server serve? Asked on a kept connection, and now and then by a new login as well, because a
//! server that lets nobody in does not serve either.
//!
//! ERROR is for a server that does not serve. One that answers, but not to us (too many connections, access denied),
//! is alive: that is UNKNOWN, and says what to do.

use super::session::{Session, Trouble};
use mmm_common::config::Host;
use mmm_common::state::CheckResult;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// Every so many checks a new login is tried, and then at every check until one has worked.
const LOGIN_EVERY: u32 = 10;

pub(crate) struct MysqlCheck {
    session: Session,
    /// Checks since the last login that worked.
    since_login: u32,
    /// A number that the server has to give back, so that an answer to an older question is noticed.
    asked: u32,
}

impl MysqlCheck {
    pub(crate) fn new(host: &Host) -> Self {
        MysqlCheck { session: Session::new(host), since_login: 0, asked: 0 }
    }

    /// Ends at `deadline` at the latest; `timeout` is only for the text.
    pub(crate) async fn check(&mut self, deadline: Instant, timeout: Duration) -> CheckResult {
        match timeout_at(deadline, self.look()).await {
            Ok(Ok(())) => CheckResult::Ok(String::new()),
            Ok(Err(Trouble::NotServing(text))) => CheckResult::Error(format!("mysql: {text}")),
            Ok(Err(Trouble::Answered { text, .. })) => CheckResult::Unknown(format!("mysql: {text}")),
            Err(_) => {
                self.session.abandon();
                let (server, doing) = (self.session.login().server, self.session.doing());
                CheckResult::Error(format!("mysql: no answer {doing} from {server} within {timeout:?}"))
            }
        }
    }

    pub(crate) fn restart(&mut self) {
        self.session.throw_away();
    }

    async fn look(&mut self) -> Result<(), Trouble> {
        let fresh = !self.session.is_connected();
        self.ask().await?;
        self.since_login = if fresh { 0 } else { self.since_login.saturating_add(1) };
        if self.since_login >= LOGIN_EVERY {
            self.session.connect().await?;
            self.ask().await?;
            self.since_login = 0;
        }
        Ok(())
    }

    async fn ask(&mut self) -> Result<(), Trouble> {
        self.asked = self.asked.wrapping_add(1);
        let rows = self.session.query(&format!("SELECT {}", self.asked)).await?;
        let answer: Option<u32> = rows.into_iter().next().and_then(|mut row| row.take_opt(0)?.ok());
        if answer == Some(self.asked) {
            return Ok(());
        }
        self.session.throw_away();
        Err(Trouble::NotServing(format!(
            "{} gave a wrong answer to SELECT {}",
            self.session.login().server,
            self.asked
        )))
    }
}

//! The client that writes: numbered rows into `app.t` through the writer address, one after the other, from the host
//! `app`. It keeps what happened to each row, so that an outage has a length and a lost write has a number.
//!
//! It never waits longer than its time limit for anything, and never uses a connection again after one has passed:
//! the answer to the old statement could be taken for that of the next.

use super::network::WRITER;
use super::process::within;
use super::server::query;
use anyhow::{Context as _, Result, bail};
use mysql_async::prelude::Queryable as _;
use mysql_async::{Conn, Error, OptsBuilder};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

/// Least time between two attempts to connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug)]
pub struct ClientConfig {
    /// Time between two writes.
    pub period: Duration,
    /// For connecting, and for each statement.
    pub limit: Duration,
}

impl Default for ClientConfig {
    fn default() -> Self {
        ClientConfig { period: Duration::from_millis(20), limit: Duration::from_millis(500) }
    }
}

/// What became of one write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The server has said that it is committed.
    Acknowledged,
    /// The server has said that it is not.
    Refused(String),
    /// The connection was lost, or the time limit passed, after the statement was sent.
    Unknown(String),
}

#[derive(Clone, Debug)]
pub struct Write {
    pub id: u64,
    pub sent: Instant,
    pub ended: Instant,
    pub outcome: Outcome,
}

#[derive(Clone, Debug)]
pub struct FailedConnect {
    pub at: Instant,
    pub took: Duration,
    pub why: String,
}

/// Everything the client has seen.
#[derive(Clone, Debug)]
pub struct Journal {
    /// Ids of this client are `base..base + 2^32`.
    pub base: u64,
    pub began: Instant,
    pub limit: Duration,
    pub writes: Vec<Write>,
    pub failed_connects: Vec<FailedConnect>,
}

/// The longest time without an acknowledged write.
#[derive(Clone, Copy, Debug)]
pub struct Outage {
    pub from: Instant,
    pub until: Instant,
}

/// Calls that were given up at the client's time limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// A first packet that met nobody is repeated after a second, later than the limit.
    pub connects: usize,
    pub statements: usize,
}

impl Timeouts {
    pub fn all(self) -> usize {
        self.connects + self.statements
    }
}

impl Outage {
    pub fn length(&self) -> Duration {
        self.until.saturating_duration_since(self.from)
    }
}

impl Journal {
    pub fn acknowledged(&self) -> impl Iterator<Item = &Write> {
        self.writes.iter().filter(|w| w.outcome == Outcome::Acknowledged)
    }

    /// The longest gap between two acknowledged writes, of all gaps that touch the window. The last gap ends with the
    /// window, when no later write has been acknowledged.
    pub fn outage(&self, from: Instant, until: Instant) -> Outage {
        let mut longest = Outage { from, until: from };
        let mut last = self.began;
        for at in self.acknowledged().map(|w| w.ended).chain([until]) {
            if at >= from && last <= until && at.saturating_duration_since(last) > longest.length() {
                longest = Outage { from: last, until: at };
            }
            last = last.max(at);
        }
        longest
    }

    /// Calls that were given up at the time limit since `from`.
    pub fn timeouts(&self, from: Instant) -> Timeouts {
        let connects = self.failed_connects.iter().filter(|c| c.at + c.took >= from && c.took >= self.limit);
        let statements = self.writes.iter().filter(|w| w.ended >= from && w.ended - w.sent >= self.limit);
        Timeouts { connects: connects.count(), statements: statements.count() }
    }

    /// How often each reason was seen since `from`, of writes without an acknowledgement and of failed connects.
    pub fn troubles(&self, from: Instant) -> BTreeMap<String, usize> {
        let mut seen = BTreeMap::new();
        let writes = self.writes.iter().filter(|w| w.sent >= from).filter_map(|w| match &w.outcome {
            Outcome::Acknowledged => None,
            Outcome::Refused(why) => Some(format!("refused: {why}")),
            Outcome::Unknown(why) => Some(format!("outcome unknown: {why}")),
        });
        let connects = self.failed_connects.iter().filter(|c| c.at >= from).map(|c| format!("connect: {}", c.why));
        for why in writes.chain(connects) {
            *seen.entry(why).or_default() += 1;
        }
        seen
    }

    /// Compares with the rows that a server has.
    pub fn verify(&self, socket: &Path) -> Result<Verified> {
        let sql = format!(
            "SELECT id, COUNT(*) FROM app.t WHERE id >= {} AND id < {} GROUP BY id",
            self.base,
            self.base + (1 << 32)
        );
        let mut there = BTreeMap::new();
        for row in query(socket, &sql, Duration::from_secs(20))?.rows {
            let number = |i: usize| -> Result<u64> {
                Ok(row.get(i).and_then(Option::as_deref).context("a NULL among the counts")?.parse()?)
            };
            there.insert(number(0)?, number(1)?);
        }
        let mut found = Verified {
            duplicates: there.iter().filter(|(_, n)| **n > 1).map(|(id, _)| *id).collect(),
            ..Verified::default()
        };
        for write in &self.writes {
            let present = there.contains_key(&write.id);
            match (&write.outcome, present) {
                (Outcome::Acknowledged, true) => found.acknowledged += 1,
                (Outcome::Acknowledged, false) => {
                    found.acknowledged += 1;
                    found.missing.push(write.id);
                }
                (Outcome::Refused(_), true) => found.refused_but_there.push(write.id),
                (Outcome::Unknown(_), true) => found.unknown_there += 1,
                (Outcome::Unknown(_), false) => found.unknown_not_there += 1,
                (Outcome::Refused(_), false) => {}
            }
        }
        Ok(found)
    }
}

/// One server's table against what the client was told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Acknowledged writes, there or not.
    pub acknowledged: usize,
    /// Acknowledged, and not there: lost.
    pub missing: Vec<u64>,
    pub duplicates: Vec<u64>,
    /// The server had said no.
    pub refused_but_there: Vec<u64>,
    pub unknown_there: usize,
    pub unknown_not_there: usize,
}

impl Verified {
    /// Nothing lost, nothing doubled, nothing there that was refused.
    pub fn is_right(&self) -> bool {
        self.missing.is_empty() && self.duplicates.is_empty() && self.refused_but_there.is_empty()
    }
}

/// A running client. Dropping it ends it.
pub struct Client {
    stop: Arc<AtomicBool>,
    journal: Arc<Mutex<Journal>>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Starts writing from inside the namespace.
    pub fn start(netns: &Path, config: ClientConfig) -> Result<Client> {
        // Two clients never share an id: the high half is the time in milliseconds, cut to 30 bits.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let base = u64::try_from(now.as_millis() & 0x3fff_ffff).unwrap_or(0) << 32;
        let journal = Arc::new(Mutex::new(Journal {
            base,
            began: Instant::now(),
            limit: config.limit,
            writes: Vec::new(),
            failed_connects: Vec::new(),
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (netns, stop, journal) = (netns.to_owned(), Arc::clone(&stop), Arc::clone(&journal));
            thread::spawn(move || {
                if let Err(e) = within(&netns, || write_until(&stop, &journal, config)).and_then(|r| r) {
                    lock(&journal).failed_connects.push(FailedConnect {
                        at: Instant::now(),
                        took: Duration::ZERO,
                        why: format!("the client has ended: {e:#}"),
                    });
                }
            })
        };
        Ok(Client { stop, journal, thread: Some(thread) })
    }

    /// What was seen so far.
    pub fn journal(&self) -> Journal {
        lock(&self.journal).clone()
    }

    /// Waits for the acknowledgement of a write that was sent after `since`, and gives its time.
    pub fn wait_write(&self, since: Instant, limit: Duration) -> Result<Instant> {
        let end = Instant::now() + limit;
        loop {
            let seen = {
                let journal = lock(&self.journal);
                let later = journal.writes.iter().rev().take_while(|w| w.sent >= since);
                later.filter(|w| w.outcome == Outcome::Acknowledged).last().map(|w| w.ended)
            };
            if let Some(at) = seen {
                return Ok(at);
            }
            if Instant::now() > end {
                let troubles = self.journal().troubles(since);
                bail!("no write was acknowledged within {limit:?}; what the client met: {troubles:?}");
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the client and gives all it has seen.
    pub fn finish(mut self) -> Journal {
        self.end();
        self.journal()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock(journal: &Mutex<Journal>) -> std::sync::MutexGuard<'_, Journal> {
    journal.lock().unwrap_or_else(|e| e.into_inner())
}

fn write_until(stop: &AtomicBool, journal: &Mutex<Journal>, config: ClientConfig) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut next = lock(journal).base;
        let mut conn = None;
        let mut beat = tokio::time::interval(config.period);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !stop.load(Ordering::Relaxed) {
            let mut open = match conn.take() {
                Some(open) => open,
                None => match connect(config.limit).await {
                    Ok(open) => open,
                    Err(failed) => {
                        lock(journal).failed_connects.push(failed);
                        tokio::time::sleep(CONNECT_PAUSE).await;
                        continue;
                    }
                },
            };
            beat.tick().await;
            let id = next;
            next += 1;
            let sent = Instant::now();
            let sql = format!("INSERT INTO t (id, server) VALUES ({id}, @@server_id)");
            let answer = tokio::time::timeout(config.limit, open.query_drop(sql)).await;
            let ended = Instant::now();
            let outcome = match answer {
                Ok(Ok(())) => Outcome::Acknowledged,
                Ok(Err(Error::Server(e))) if is_refusal(e.code) => {
                    Outcome::Refused(format!("{} {}", e.code, e.message))
                }
                Ok(Err(e)) => Outcome::Unknown(e.to_string()),
                Err(_) => Outcome::Unknown("time limit".to_owned()),
            };
            if outcome == Outcome::Acknowledged {
                conn = Some(open);
            }
            lock(journal).writes.push(Write { id, sent, ended, outcome });
        }
        if let Some(open) = conn {
            let _ = tokio::time::timeout(config.limit, open.disconnect()).await;
        }
    });
    runtime.shutdown_background();
    Ok(())
}

/// Server errors after which the row is surely not there; every other one leaves it open.
fn is_refusal(code: u16) -> bool {
    const READ_ONLY: u16 = 1290;
    const READ_ONLY_MODE: u16 = 1836;
    const LOCK_WAIT: u16 = 1205;
    const DEADLOCK: u16 = 1213;
    const NO_SUCH_TABLE: u16 = 1146;
    [READ_ONLY, READ_ONLY_MODE, LOCK_WAIT, DEADLOCK, NO_SUCH_TABLE].contains(&code)
}

async fn connect(limit: Duration) -> std::result::Result<Conn, FailedConnect> {
    let at = Instant::now();
    // The two sizes are given so that no queries for them are needed.
    let opts = OptsBuilder::default()
        .ip_or_hostname(WRITER.to_string())
        .tcp_port(3306)
        .user(Some("app"))
        .pass(Some("app"))
        .db_name(Some("app"))
        .prefer_socket(false)
        .max_allowed_packet(Some(16 << 20))
        .wait_timeout(Some(600));
    let why = match tokio::time::timeout(limit, Conn::new(opts)).await {
        Ok(Ok(conn)) => return Ok(conn),
        Ok(Err(e)) => e.to_string(),
        Err(_) => "time limit".to_owned(),
    };
    Err(FailedConnect { at, took: at.elapsed(), why })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes that were sent and answered at once, so many milliseconds after the beginning.
    fn journal(acknowledged_at: &[u64]) -> Journal {
        let began = Instant::now();
        let write = |(i, ms): (usize, &u64)| {
            let at = began + Duration::from_millis(*ms);
            Write { id: i as u64, sent: at, ended: at, outcome: Outcome::Acknowledged }
        };
        let writes = acknowledged_at.iter().enumerate().map(write).collect();
        Journal { base: 0, began, limit: Duration::from_millis(500), writes, failed_connects: Vec::new() }
    }

    fn outage(acknowledged_at: &[u64], from: u64, until: u64) -> u128 {
        let j = journal(acknowledged_at);
        j.outage(j.began + Duration::from_millis(from), j.began + Duration::from_millis(until)).length().as_millis()
    }

    #[test]
    fn the_outage_is_the_longest_gap_that_touches_the_window() {
        assert_eq!(outage(&[0, 20, 40, 400, 420], 0, 420), 360);
        // A longer gap before the window does not count.
        assert_eq!(outage(&[0, 900, 920, 960], 910, 960), 40);
        // One that began before it does.
        assert_eq!(outage(&[0, 900, 920], 500, 920), 900);
        // No write since: it lasts until the end of the window.
        assert_eq!(outage(&[0, 20], 10, 1020), 1000);
        assert_eq!(outage(&[], 0, 700), 700);
    }

    #[test]
    fn a_call_at_its_limit_counts_as_a_timeout() {
        let mut j = journal(&[0, 20]);
        j.writes[1].ended += Duration::from_millis(500);
        assert_eq!(j.timeouts(j.began), Timeouts { connects: 0, statements: 1 });
        assert_eq!(j.timeouts(j.began + Duration::from_millis(510)).all(), 1, "it was sent before, and given up after");
        assert_eq!(j.timeouts(j.began + Duration::from_millis(530)).all(), 0);
    }
}

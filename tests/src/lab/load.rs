//! The load: many clients that write numbered rows into `app.t` through the writer address, from the host `app`, each
//! at most once. A client whose connection broke does what a careful program does: it connects anew, reads whether its
//! row is there (with a lock, so that a commit still under way is waited for) and only then writes it again.
//!
//! It never uses a connection again after a time limit has passed, and it ends: after a number of rows, after a time,
//! or when it is told to. What became of every row is kept, in the server's words and by time.

use super::network::WRITER;
use super::process::within;
use anyhow::{Context as _, Result, bail};
use mysql_async::prelude::Queryable as _;
use mysql_async::{Conn, Error, OptsBuilder};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

/// Least time between two attempts of one client.
const PAUSE: Duration = Duration::from_millis(10);
/// For the row that a client is at when the load is told to end.
const SETTLE: Duration = Duration::from_secs(5);
/// A client's rows have numbers of so many bits.
const SEQUENCE_BITS: u32 = 24;
const MOST_CLIENTS: u32 = 1 << (32 - SEQUENCE_BITS);

#[derive(Clone, Copy, Debug)]
pub struct LoadConfig {
    pub clients: u32,
    /// Rows a second, all clients together. Every row is a transaction of its own.
    pub rate: u32,
    /// For connecting.
    pub connect_limit: Duration,
    /// For one statement.
    pub limit: Duration,
    pub most_rows: u64,
    pub longest: Duration,
}

impl Default for LoadConfig {
    fn default() -> Self {
        LoadConfig {
            clients: 24,
            rate: 2000,
            connect_limit: Duration::from_millis(500),
            limit: Duration::from_secs(1),
            most_rows: 2_000_000,
            longest: Duration::from_secs(600),
        }
    }
}

/// What became of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The server has said that it is committed.
    Acknowledged,
    /// The answer was lost, and the row was there when the client looked: it goes on as after an acknowledgement.
    Found,
    /// Every answer was a refusal, or it was never sent.
    Refused,
    /// The answer was lost, and the load ended before it could be found out.
    Unknown,
}

#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub id: u64,
    /// The first attempt.
    pub began: Instant,
    /// When its fate was known; of `Unknown` and `Refused` when the client gave up.
    pub ended: Instant,
    pub fate: Fate,
    /// Statements sent that would have written it.
    pub attempts: u32,
}

impl Row {
    /// The client goes on in the belief that the row is safe.
    pub fn is_promised(&self) -> bool {
        matches!(self.fate, Fate::Acknowledged | Fate::Found)
    }
}

/// Everything the clients have seen.
#[derive(Clone, Debug)]
pub struct LoadJournal {
    /// Ids of this load are `base..base + 2^32`.
    pub base: u64,
    pub began: Instant,
    pub ended: Instant,
    /// By the time they ended.
    pub rows: Vec<Row>,
    /// How often each reason was met: refusals, lost answers, failed connects.
    pub troubles: BTreeMap<String, usize>,
}

impl LoadJournal {
    pub fn acknowledged(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|r| r.fate == Fate::Acknowledged)
    }

    pub fn count(&self, fate: Fate) -> usize {
        self.rows.iter().filter(|r| r.fate == fate).count()
    }

    /// The longest time in which no client got an acknowledgement, of all gaps that touch the window.
    pub fn outage(&self, from: Instant, until: Instant) -> Duration {
        longest_gap(self.acknowledged().map(|r| r.ended), self.began, from, until)
    }

    /// The same for the client that was worst off.
    pub fn worst_client(&self, from: Instant, until: Instant) -> Duration {
        let mut clients: BTreeMap<u64, Vec<Instant>> = BTreeMap::new();
        for row in self.acknowledged() {
            clients.entry((row.id - self.base) >> SEQUENCE_BITS).or_default().push(row.ended);
        }
        let gaps = clients.values().map(|ends| longest_gap(ends.iter().copied(), self.began, from, until));
        gaps.max().unwrap_or_default()
    }

    /// Acknowledged rows a second between the two.
    pub fn rate(&self, from: Instant, until: Instant) -> f64 {
        let there = self.acknowledged().filter(|r| r.ended >= from && r.ended < until).count();
        there as f64 / until.saturating_duration_since(from).as_secs_f64().max(0.001)
    }
}

/// `ends` in order of time.
fn longest_gap(ends: impl Iterator<Item = Instant>, began: Instant, from: Instant, until: Instant) -> Duration {
    let (mut longest, mut last) = (Duration::ZERO, began);
    for at in ends.chain([until]) {
        if at >= from && last <= until {
            longest = longest.max(at.saturating_duration_since(last));
        }
        last = last.max(at);
    }
    longest
}

/// What can be looked at while it runs; times are microseconds since `began`.
struct Shared {
    began: Instant,
    stop: AtomicBool,
    acknowledged: AtomicU64,
    /// When the youngest acknowledged row was begun.
    begun: AtomicU64,
    gathered: Mutex<Gathered>,
}

#[derive(Default)]
struct Gathered {
    rows: Vec<Row>,
    troubles: BTreeMap<String, usize>,
}

impl Shared {
    fn gathered(&self) -> MutexGuard<'_, Gathered> {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn since_began(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.began).as_micros()).unwrap_or(u64::MAX)
    }

    fn trouble(&self, why: String) {
        *self.gathered().troubles.entry(why).or_default() += 1;
    }
}

/// A running load. Dropping it ends it.
pub struct Load {
    base: u64,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Load {
    /// Starts writing from inside the namespace.
    pub fn start(netns: &Path, config: LoadConfig) -> Result<Load> {
        if config.clients == 0 || config.clients >= MOST_CLIENTS || config.rate == 0 {
            bail!("a load of {} clients with {} rows a second cannot be made", config.clients, config.rate);
        }
        // Two loads never share an id: the high half is the time in milliseconds, cut to 30 bits.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let base = u64::try_from(now.as_millis() & 0x3fff_ffff).unwrap_or(0) << 32;
        let shared = Arc::new(Shared {
            began: Instant::now(),
            stop: AtomicBool::new(false),
            acknowledged: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            gathered: Mutex::default(),
        });
        let thread = {
            let (netns, shared) = (netns.to_owned(), Arc::clone(&shared));
            thread::spawn(move || within(&netns, || write_all(&shared, base, config))?)
        };
        Ok(Load { base, shared, thread: Some(thread) })
    }

    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits for so many acknowledged rows.
    pub fn wait_rows(&self, wanted: u64, limit: Duration) -> Result<()> {
        self.wait(limit, || self.acknowledged() >= wanted, || format!("{} of {wanted} rows", self.acknowledged()))
    }

    /// Waits for the acknowledgement of a row that was begun after `since`.
    pub fn wait_write(&self, since: Instant, limit: Duration) -> Result<()> {
        let since = self.shared.since_began(since).max(1);
        let so = || self.shared.begun.load(Ordering::Relaxed) >= since;
        self.wait(limit, so, || "no row begun since then".to_owned())
    }

    fn wait(&self, limit: Duration, so: impl Fn() -> bool, seen: impl Fn() -> String) -> Result<()> {
        let end = Instant::now() + limit;
        while !so() {
            if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
                bail!("the load has ended by itself: {} acknowledged", seen());
            }
            if Instant::now() > end {
                let troubles = self.shared.gathered().troubles.clone();
                bail!("after {limit:?}: {} acknowledged; what the clients met: {troubles:?}", seen());
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Ends the load and gives all it has seen.
    pub fn finish(mut self) -> Result<LoadJournal> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the load has been finished before")?;
        match thread.join() {
            Ok(result) => result?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        let mut gathered = std::mem::take(&mut *self.shared.gathered());
        gathered.rows.sort_by_key(|r| r.ended);
        Ok(LoadJournal {
            base: self.base,
            began: self.shared.began,
            ended: Instant::now(),
            rows: gathered.rows,
            troubles: gathered.troubles,
        })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write_all(shared: &Arc<Shared>, base: u64, config: LoadConfig) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let mut clients = tokio::task::JoinSet::new();
        for number in 0..config.clients {
            clients.spawn(client(Arc::clone(shared), base + (u64::from(number) << SEQUENCE_BITS), number, config));
        }
        let mut ended = Ok(());
        while let Some(client) = clients.join_next().await {
            ended = ended.and(client.context("a client of the load has panicked"));
        }
        ended
    });
    // Connections to a dead host are still being closed politely.
    runtime.shutdown_background();
    ended
}

/// Writes one row after the other.
async fn client(shared: Arc<Shared>, first: u64, number: u32, config: LoadConfig) {
    let period = Duration::from_secs(1) * config.clients / config.rate;
    // The clients' beats are spread over one period.
    let start = tokio::time::Instant::now() + period * number / config.clients;
    let mut beat = tokio::time::interval_at(start, period);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let end = shared.began + config.longest;
    let most = (config.most_rows / u64::from(config.clients)).min((1 << SEQUENCE_BITS) - 1);
    let mut conn = None;
    for id in first..first + most {
        beat.tick().await;
        if shared.stop.load(Ordering::Relaxed) || Instant::now() >= end {
            break;
        }
        let row = write(&shared, &mut conn, id, config).await;
        if row.fate == Fate::Acknowledged {
            shared.acknowledged.fetch_add(1, Ordering::Relaxed);
            shared.begun.fetch_max(shared.since_began(row.began), Ordering::Relaxed);
        }
        shared.gathered().rows.push(row);
    }
    if let Some(open) = conn {
        let _ = tokio::time::timeout(config.connect_limit, open.disconnect()).await;
    }
}

/// Writes one row until its fate is known, or the load is told to end.
async fn write(shared: &Shared, conn: &mut Option<Conn>, id: u64, config: LoadConfig) -> Row {
    let began = Instant::now();
    let (mut attempts, mut unknown, mut give_up) = (0, false, None);
    let fate = loop {
        if shared.stop.load(Ordering::Relaxed)
            && Instant::now() >= *give_up.get_or_insert_with(|| Instant::now() + SETTLE)
        {
            break if unknown { Fate::Unknown } else { Fate::Refused };
        }
        let mut open = match conn.take() {
            Some(open) => open,
            None => match connect(config.connect_limit).await {
                Ok(open) => open,
                Err(why) => {
                    shared.trouble(format!("connect: {why}"));
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
        };
        if unknown {
            match is_there(&mut open, id, config.limit).await {
                Ok(true) => {
                    *conn = Some(open);
                    break Fate::Found;
                }
                Ok(false) => {}
                Err(why) => {
                    shared.trouble(format!("read: {why}"));
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            }
        }
        attempts += 1;
        let sql = format!("INSERT INTO t (id, server) VALUES ({id}, @@server_id)");
        match tokio::time::timeout(config.limit, open.query_drop(sql)).await {
            Ok(Ok(())) => {
                *conn = Some(open);
                break Fate::Acknowledged;
            }
            Ok(Err(Error::Server(e))) if is_refusal(e.code) => {
                shared.trouble(format!("refused: {} {}", e.code, e.message));
            }
            Ok(Err(e)) => {
                unknown = true;
                shared.trouble(format!("answer lost: {e}"));
            }
            Err(_) => {
                unknown = true;
                shared.trouble("answer lost: time limit".to_owned());
            }
        }
        // After any trouble the next attempt is on a new connection, which finds the writer of that time.
        drop(open);
        tokio::time::sleep(PAUSE).await;
    };
    Row { id, began, ended: Instant::now(), fate, attempts }
}

/// Whether the row is there. A lock is asked for, so that the answer waits for a commit of it that is under way.
async fn is_there(conn: &mut Conn, id: u64, limit: Duration) -> std::result::Result<bool, String> {
    let sql = format!("SELECT COUNT(*) FROM t WHERE id = {id} LOCK IN SHARE MODE");
    match tokio::time::timeout(limit, conn.query_first::<u64, _>(sql)).await {
        Ok(Ok(count)) => Ok(count.unwrap_or(0) > 0),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err("time limit".to_owned()),
    }
}

/// Server errors after which the row is surely not there; every other one leaves it open.
fn is_refusal(code: u16) -> bool {
    const READ_ONLY: u16 = 1290;
    const READ_ONLY_MODE: u16 = 1836;
    const LOCK_WAIT: u16 = 1205;
    const DEADLOCK: u16 = 1213;
    [READ_ONLY, READ_ONLY_MODE, LOCK_WAIT, DEADLOCK].contains(&code)
}

async fn connect(limit: Duration) -> std::result::Result<Conn, String> {
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
    match tokio::time::timeout(limit, Conn::new(opts)).await {
        Ok(Ok(conn)) => Ok(conn),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err("time limit".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of two clients, acknowledged so many milliseconds after the beginning.
    fn journal(ends: &[(u64, u64)]) -> LoadJournal {
        let began = Instant::now();
        let rows = ends.iter().enumerate().map(|(n, (client, ms))| {
            let at = began + Duration::from_millis(*ms);
            let id = (client << SEQUENCE_BITS) + n as u64;
            Row { id, began: at, ended: at, fate: Fate::Acknowledged, attempts: 1 }
        });
        LoadJournal { base: 0, began, ended: began, rows: rows.collect(), troubles: BTreeMap::new() }
    }

    #[test]
    fn the_outage_ends_with_the_first_client_and_the_worst_clients_with_its_own() {
        let j = journal(&[(0, 0), (1, 10), (1, 410), (0, 900), (1, 910)]);
        let at = |ms: u64| j.began + Duration::from_millis(ms);
        assert_eq!(j.outage(at(20), at(500)).as_millis(), 490, "from 410 to 900, which touches the window");
        assert_eq!(j.outage(at(20), at(400)).as_millis(), 400);
        assert_eq!(j.worst_client(at(20), at(500)).as_millis(), 900);
        assert_eq!(j.rate(at(0), at(1000)).round() as u64, 5);
    }

    #[test]
    fn a_row_that_was_read_after_a_lost_answer_is_promised() {
        let mut j = journal(&[(0, 1)]);
        for (fate, promised) in
            [(Fate::Acknowledged, true), (Fate::Found, true), (Fate::Refused, false), (Fate::Unknown, false)]
        {
            j.rows[0].fate = fate;
            assert_eq!(j.rows[0].is_promised(), promised, "{fate:?}");
        }
    }
}

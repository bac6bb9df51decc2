//! Sessions of ordinary users, from the host `app`, that do what ordinary users should not: keep a transaction open, run
//! one statement for minutes, take every connection there is, never go away.

use anyhow::{Context as _, Result, bail};
use mmm_tests::lab::Lab;
use mmm_tests::lab::network::APP;
use mmm_tests::lab::process::within;
use mysql_async::prelude::Queryable as _;
use mysql_async::{Conn, OptsBuilder};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(5);
/// How long a session that is asked at the end may take to answer or to break.
const ASK: Duration = Duration::from_secs(2);

/// What each session does before it is kept.
#[derive(Clone, Debug, Default)]
pub(crate) struct Habit {
    /// One after the other, each answered.
    pub(crate) first: Vec<&'static str>,
    /// Sent last, and not waited for.
    pub(crate) then: Option<&'static str>,
}

/// What a session says when it is asked at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AtEnd {
    Answers,
    Gone(String),
    /// Neither an answer nor an error: what a client must never meet.
    Hangs,
}

/// Open sessions; dropping it ends them.
pub(crate) struct Sessions {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<AtEnd>>>,
    pub(crate) open: usize,
    /// Why no more than these were let in; None: all that were wanted.
    pub(crate) refused: Option<String>,
}

impl Sessions {
    /// Opens up to `most` sessions with `server`, fewer when the server lets no more in.
    pub(crate) fn open(lab: &Lab, server: Ipv4Addr, most: usize, habit: Habit) -> Result<Sessions> {
        let stop = Arc::new(AtomicBool::new(false));
        let (say, hear) = mpsc::channel();
        let thread = {
            let (stop, netns) = (Arc::clone(&stop), lab.network().netns(APP));
            thread::spawn(move || {
                within(&netns, || keep(server, most, &habit, &stop, &say))
                    .unwrap_or_else(|e| vec![AtEnd::Gone(format!("{e:#}"))])
            })
        };
        let mut sessions = Sessions { stop, thread: Some(thread), open: 0, refused: None };
        let said = hear.recv_timeout(Duration::from_secs(60)).context("the sessions were not opened in a minute")?;
        let (open, refused) = said.map_err(|why| anyhow::anyhow!("open sessions with {server}: {why}"))?;
        if open == 0 {
            bail!("{server} lets nobody in: {refused:?}");
        }
        (sessions.open, sessions.refused) = (open, refused);
        Ok(sessions)
    }

    /// Asks each session whether it is still there, and ends them all.
    pub(crate) fn finish(mut self) -> Result<Vec<AtEnd>> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("finished before")?;
        thread.join().map_err(|_| anyhow::anyhow!("the thread with the sessions has panicked"))
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

type Opened = std::result::Result<(usize, Option<String>), String>;

fn keep(server: Ipv4Addr, most: usize, habit: &Habit, stop: &AtomicBool, say: &mpsc::Sender<Opened>) -> Vec<AtEnd> {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return vec![AtEnd::Gone(e.to_string())],
    };
    let at_end = runtime.block_on(async {
        let mut sessions = Vec::new();
        let mut refused = None;
        while sessions.len() < most {
            match open(server, habit).await {
                Ok(conn) => sessions.push(conn),
                Err(why) => {
                    refused = Some(why);
                    break;
                }
            }
        }
        let (mut quiet, mut busy) = (Vec::new(), Vec::new());
        for mut conn in sessions {
            match habit.then {
                None => quiet.push(conn),
                Some(sql) => busy.push(tokio::spawn(async move {
                    match conn.query_drop(sql).await {
                        Ok(()) => AtEnd::Answers,
                        Err(e) => AtEnd::Gone(e.to_string()),
                    }
                })),
            }
        }
        // Nobody may listen any more; then the sessions end below.
        let _ = say.send(Ok((quiet.len() + busy.len(), refused)));
        while !stop.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let mut at_end = Vec::new();
        for mut conn in quiet {
            at_end.push(match tokio::time::timeout(ASK, conn.query_drop("SELECT 1")).await {
                Ok(Ok(())) => AtEnd::Answers,
                Ok(Err(e)) => AtEnd::Gone(e.to_string()),
                Err(_) => AtEnd::Hangs,
            });
        }
        for task in busy {
            at_end.push(match tokio::time::timeout(ASK, task).await {
                Ok(Ok(end)) => end,
                Ok(Err(e)) => AtEnd::Gone(e.to_string()),
                Err(_) => AtEnd::Hangs,
            });
        }
        at_end
    });
    runtime.shutdown_background();
    at_end
}

async fn open(server: Ipv4Addr, habit: &Habit) -> std::result::Result<Conn, String> {
    let opts = OptsBuilder::default()
        .ip_or_hostname(server.to_string())
        .tcp_port(3306)
        .user(Some("app"))
        .pass(Some("app"))
        .db_name(Some("app"))
        .prefer_socket(false)
        .max_allowed_packet(Some(16 << 20))
        .wait_timeout(Some(28_800));
    let all = async {
        let mut conn = Conn::new(opts).await?;
        for sql in &habit.first {
            conn.query_drop(*sql).await?;
        }
        Ok::<Conn, mysql_async::Error>(conn)
    };
    match tokio::time::timeout(LIMIT, all).await {
        Ok(Ok(conn)) => Ok(conn),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err(format!("no answer within {LIMIT:?}")),
    }
}

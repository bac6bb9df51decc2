//! The one way into the loop: everything that happens becomes an event in one bounded queue.
//!
//! Checkers and agent links run as workers. Dropping a worker ends its task and takes back what it has queued, so that
//! nothing from before a reload is ever believed after it.

use mmm_common::config::Monitor as Config;
use mmm_common::config::parse::Mistake;
use mmm_common::control::{Answer, Command};
use mmm_common::refusals::{Count, Refusals};
use mmm_mon_core::io::Input;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tracing::{Instrument as _, warn};

/// Events waiting at once; whoever has one more waits until the loop has caught up.
const QUEUE: usize = 1024;

#[derive(Debug)]
pub(crate) enum Event {
    Core(Input),
    /// One request of an operator; the answer goes back by `reply`, also much later.
    Command {
        command: Command,
        who: String,
        reply: oneshot::Sender<Answer>,
    },
    /// The configuration was read again after SIGHUP.
    Reread(Result<Box<Config>, Vec<Mistake>>),
}

/// The sending end.
#[derive(Clone, Debug)]
pub(crate) struct Feed {
    queue: mpsc::Sender<(Arc<AtomicBool>, Event)>,
    current: Arc<AtomicBool>,
    /// Of the whole process.
    refusals: Arc<Mutex<Refusals>>,
}

/// The receiving end: the loop's.
#[derive(Debug)]
pub(crate) struct Inbox {
    queue: mpsc::Receiver<(Arc<AtomicBool>, Event)>,
}

pub(crate) fn feed() -> (Feed, Inbox) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let current = Arc::new(AtomicBool::new(true));
    (Feed { queue: sender, current, refusals: Arc::default() }, Inbox { queue: receiver })
}

impl Feed {
    /// Queues an event. When the loop has ended there is nobody left to tell, and that is fine.
    pub(crate) async fn send(&self, event: Event) {
        let _ = self.queue.send((self.current.clone(), event)).await;
    }

    pub(crate) async fn input(&self, input: Input) {
        self.send(Event::Core(input)).await;
    }

    /// Somebody has sent what is no message, or what no side of that connection may send.
    pub(crate) fn refused(&self, peer: SocketAddr, text: &str) {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Count { total, left_out }) = refusals.count(Instant::now(), text) {
            warn!(%peer, left_out, "{text} ({total} refused since the start)");
        }
    }

    #[cfg(test)]
    pub(crate) fn refusals(&self) -> u64 {
        self.refusals.lock().unwrap().total()
    }

    /// Starts a task with a feed of its own; both end when the worker is dropped.
    pub(crate) fn worker<F>(&self, work: impl FnOnce(Feed) -> F) -> Worker
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let current = Arc::new(AtomicBool::new(true));
        let feed = Feed { queue: self.queue.clone(), current: current.clone(), refusals: self.refusals.clone() };
        Worker { task: tokio::spawn(work(feed).in_current_span()).abort_handle(), current }
    }
}

impl Inbox {
    /// The next event of a worker that is still wanted. Never lost when the caller stops waiting.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        loop {
            let (current, event) = self.queue.recv().await?;
            if current.load(Ordering::Relaxed) {
                return Some(event);
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct Worker {
    task: AbortHandle,
    current: Arc<AtomicBool>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.current.store(false, Ordering::Relaxed);
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // lessons.md 19
    #[tokio::test]
    async fn what_a_dropped_worker_had_queued_is_not_believed() {
        let (feed, mut inbox) = feed();
        let (queued, when_queued) = oneshot::channel();
        let worker = feed.worker(|feed| async move {
            feed.input(Input::Network { reachable: false }).await;
            let _ = queued.send(());
        });
        when_queued.await.unwrap();
        drop(worker);
        feed.input(Input::Tick).await;
        assert!(matches!(inbox.next().await, Some(Event::Core(Input::Tick))));
    }
}

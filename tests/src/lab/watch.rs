//! A watcher over the rule that matters most: no two hosts answer for one address at once. It looks into every host's kernel all
//! the time a test runs, from outside of the network, so no cut hides anything from it.

use super::network::{DB, Network, READERS, WRITER, answering};
use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};
use std::collections::BTreeSet;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(5);

pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Seen>>>,
}

#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Looks at all hosts.
    pub rounds: usize,
    /// One sentence for each change of the writer address, with the time since the watch began.
    pub writer_moves: Vec<String>,
    /// One sentence for each address that was on two hosts.
    pub doubled: Vec<String>,
}

impl Watch {
    pub(super) fn start(network: &Network) -> Result<Watch> {
        let mut namespaces = Vec::new();
        for host in DB {
            let path = network.netns(host);
            let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
            namespaces.push((path, file));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let stop = Arc::clone(&stop);
            thread::spawn(move || look_until(&stop, &namespaces))
        };
        Ok(Watch { stop, thread: Some(thread) })
    }

    /// Ends the watch. An address that was on two hosts at once is an error.
    pub fn finish(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the watch has been finished before")?;
        let seen = match thread.join() {
            Ok(seen) => seen?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        if !seen.doubled.is_empty() {
            bail!("an address was on two hosts at once: {}", seen.doubled.join("; "));
        }
        if seen.rounds == 0 {
            bail!("the watch has not looked once");
        }
        Ok(seen)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn look_until(stop: &AtomicBool, namespaces: &[(PathBuf, File)]) -> Result<Seen> {
    let began = Instant::now();
    let roles: Vec<Ipv4Addr> = READERS.into_iter().chain([WRITER]).collect();
    let mut seen = Seen::default();
    let mut writer = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let mut there = Vec::new();
        for (_, namespace) in namespaces {
            there.push(addresses(namespace)?);
        }
        for ip in &roles {
            let holders: Vec<usize> = (0..DB.len()).filter(|i| there[*i].contains(ip)).collect();
            // The hosts are looked at one after the other, so an address that moved meanwhile shows twice: it was on
            // two hosts only if the one looked at first still has it.
            let mut still = Vec::new();
            for host in holders.iter().take(if holders.len() > 1 { holders.len() } else { 0 }) {
                if addresses(&namespaces[*host].1)?.contains(ip) {
                    still.push((DB[*host], namespaces[*host].0.as_path()));
                }
            }
            let still = if still.len() > 1 { answering(&still, *ip)? } else { Vec::new() };
            let at = began.elapsed().as_secs_f64();
            if still.len() > 1 {
                seen.doubled.push(format!("{ip} on {} at {at:.3} s", still.join(" and ")));
            }
            if *ip == WRITER && holders != writer {
                let names: Vec<&str> = holders.iter().map(|h| DB[*h]).collect();
                seen.writer_moves.push(format!("{at:.3} s: [{}]", names.join(" ")));
                writer = holders;
            }
        }
        seen.rounds += 1;
        thread::sleep(PAUSE);
    }
    Ok(seen)
}

/// Moves this thread into the namespace and asks its kernel.
fn addresses(namespace: &File) -> Result<BTreeSet<Ipv4Addr>> {
    setns(namespace, CloneFlags::CLONE_NEWNET).context("enter a network namespace")?;
    let all = nix::ifaddrs::getifaddrs().context("list addresses")?;
    Ok(all.filter_map(|i| i.address?.as_sockaddr_in().map(|a| a.ip())).collect())
}

//! One agent per network namespace: a second one would take the first one's addresses and tables for its own leftovers.
//!
//! The lock is on a file that every network namespace has and that only root and holders of CAP_NET_ADMIN can open, so
//! that nobody else can keep an agent from starting. Nothing is written to it. It is free again when the process ends,
//! however it ends, and needs no folder that can be written to.

use crate::guard;
use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// Mode 0600; for a holder of CAP_NET_ADMIN as for root (net/sysctl_net.c). The one of the caller's network namespace.
const FILE: &str = "/proc/sys/net/ipv4/tcp_fastopen_key";

/// How long a process that was killed may take to be gone, and a child that it was about to start to let go of its files.
/// Whoever starts an agent again right after the kill must not find it in the way of itself.
const LINGERS: Duration = Duration::from_millis(500);
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(5);

/// No other agent runs in this network namespace for as long as this lives.
pub(crate) struct Alone(#[expect(dead_code, reason = "held, not used")] Flock<File>);

impl Alone {
    /// To be had before anything in the kernel is touched.
    ///
    /// # Errors
    /// Another agent runs here, with its process id as far as it can be known.
    pub(crate) fn make_sure() -> anyhow::Result<Alone> {
        let file =
            File::open(FILE).with_context(|| format!("opening {FILE}, the lock that keeps a second agent out"))?;
        let inode = file.metadata().with_context(|| format!("looking at {FILE}"))?.ino();
        let Some(lock) = lock(file)? else {
            bail!(
                "another mmm_agentd{} runs in this network namespace (it has the lock on {FILE}); two would take each \
                 other's role addresses away. Stop that one first, or run this one in a network namespace of its own",
                holder(inode)
            );
        };
        // One in a container with a /proc of its own does not see the lock.
        if let Some(port) = owner()? {
            bail!(
                "another mmm_agentd guards its role addresses in this network namespace: netlink port {port}, which is \
                 mostly its process id, owns the nftables tables mmm_guard. Stop that one first"
            );
        }
        Ok(Alone(lock))
    }
}

/// None: another process has it, and goes on having it.
fn lock(mut file: File) -> anyhow::Result<Option<Flock<File>>> {
    let end = Instant::now() + LINGERS;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() >= end => return Ok(None),
            Err((back, Errno::EWOULDBLOCK)) => file = back,
            Err((_, e)) => return Err(e).with_context(|| format!("locking {FILE}")),
        }
        std::thread::sleep(LOOK);
    }
}

fn owner() -> anyhow::Result<Option<u32>> {
    let end = Instant::now() + LINGERS;
    loop {
        let owner = guard::owner().map_err(anyhow::Error::msg)?;
        if owner.is_none() || Instant::now() >= end {
            return Ok(owner);
        }
        std::thread::sleep(LOOK);
    }
}

/// proc(5), /proc/locks: `1: FLOCK ADVISORY WRITE 731 00:15:4026532281 0 EOF`.
fn holder(inode: u64) -> String {
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let of_this = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let kind = words.next()?;
        let pid = words.nth(2)?;
        let file = words.next()?;
        (kind == "FLOCK" && file.ends_with(&format!(":{inode}"))).then(|| pid.to_owned())
    };
    // 0: in another pid namespace.
    locks.lines().find_map(of_this).filter(|pid| pid != "0").map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testnet::TwoHosts;
    use std::process::Command;
    use std::thread;

    #[test]
    fn one_that_is_just_ending_is_waited_for() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let first = Alone::make_sure().unwrap();
            let ending = thread::spawn(move || {
                thread::sleep(LINGERS / 10);
                drop(first);
            });
            Alone::make_sure().unwrap();
            ending.join().unwrap();
        });
    }

    #[test]
    fn one_in_each_network_namespace_and_nobody_without_rights_can_take_its_place() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let first = Alone::make_sure().unwrap();
            let why = Alone::make_sure().err().unwrap().to_string();
            assert!(why.contains(&format!("another mmm_agentd (pid {})", std::process::id())), "{why}");
            hosts.on_there(async || Alone::make_sure().map(|_| ())).unwrap();
            drop(first);
            Alone::make_sure().unwrap();
        });
        let lock = |words: &[&str]| {
            let lock = ["netns", "exec", &hosts.here, "setpriv", "--reuid=65534", "--clear-groups"];
            Command::new("ip").args(lock).args(words).args(["flock", "-n", FILE, "true"]).output().unwrap().status
        };
        assert!(!lock(&[]).success(), "an ordinary user cannot open it");
        assert!(lock(&["--inh-caps=+net_admin", "--ambient-caps=+net_admin"]).success(), "one with the capability can");
    }
}

//! The exact guard (safety.md, "The guards behind the rules", 1): the kernel answers for a role address, by packets and
//! by ARP, only while its element lives in an nftables set with timeouts. The answers end with the lease to the
//! millisecond, also when this process is stopped or dead, and also while the address itself is still here.
//!
//! It never lets an element live longer than it was told, touches no table but its own two, and never removes these
//! while an address that they hold back is on this machine. Starts no program, and waits for nothing but the kernel.
//!
//! Limits. Element timeouts count the kernel's ticks: like an address's lifetime they stand still while the machine
//! sleeps, which [`crate::clock`] does not. They are rounded down to a tick (1 to 10 ms) and so end early rather than
//! late. A process that is stopped between reading the clock and the kernel's acknowledgement, and wakes just to be
//! stopped again before it has looked at the clock, leaves an element that is too long by the first stop. Before
//! kernel 6.9 a firewall's `flush ruleset` takes the tables away: they are made anew as soon as this process hears of
//! it, within milliseconds, but not by one that is stopped or dead. With DNAT, what reaches this host for an address
//! that has left it (by a neighbour's old entry) is changed before anything here sees that it is for the address.

mod proof;
mod table;
#[cfg(test)]
mod tests;
mod wire;

use crate::alone::Alone;
use crate::clock;
use futures_util::future::join_all;
use mmm_common::ids::Millis;
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::time::Duration;
use tokio::sync::mpsc;
use wire::{Changes, Kernel};

/// From reading the clock to the kernel's acknowledgement; usually some 0.05 ms. What is above it is made good.
const LATE: Duration = Duration::from_millis(20);
/// How often arming is repeated when it took longer.
const TRIES: usize = 5;
/// How often the addresses of the machine are listed until two listings are alike.
const LISTINGS: usize = 10;

/// What the guard begins with.
#[derive(Default)]
pub(crate) struct Known {
    /// Every address that may be allowed some day. What no agent has ever had anything to do with is left alone until
    /// then: it may be here by somebody's hand.
    pub(crate) roles: BTreeSet<IpAddr>,
    /// What an order has spoken of, or an agent has marked, so also what has left the configuration and may still be
    /// here: closed from the start.
    pub(crate) managed: BTreeSet<IpAddr>,
    /// Of these, what an agent without the guard has left here by an order that still holds, and until when the kernel
    /// keeps it: it answers until then, as that agent has told everybody.
    pub(crate) unguarded: BTreeMap<IpAddr, Millis>,
}

pub(crate) struct Guard {
    kernel: Kernel,
    /// Of the tables, when they are made: [`table::OWNED`] or, to see what older kernels do, 0.
    flags: u32,
    /// In the sets of `guarded`.
    guarded: BTreeSet<IpAddr>,
    /// What was armed, and until when; for making the tables anew.
    armed: BTreeMap<IpAddr, Millis>,
    /// The tables stay when this is dropped.
    stays: bool,
    changes: Option<Watch>,
}

/// Says that somebody else has changed the tables; [`Guard::check`] is to look at them then.
pub(crate) type Watch = mpsc::Receiver<()>;

impl Guard {
    /// Puts the guard up, and proves that it works on this machine: some 0.1 s, once after each start of the machine. An
    /// address that an earlier process has armed stays so for its rest, without a gap.
    ///
    /// # Errors
    /// What is missing and what can be done about it. Nothing is left behind then, unless one of the addresses is here.
    pub(crate) async fn begin(alone: &Alone, known: Known) -> Result<Guard, String> {
        Guard::begin_as(alone, known, table::OWNED).await
    }

    /// As on a kernel before 6.9, where others can change the tables.
    #[cfg(test)]
    pub(crate) async fn begin_unowned(alone: &Alone, known: Known) -> Result<Guard, String> {
        Guard::begin_as(alone, known, 0).await
    }

    async fn begin_as(_: &Alone, known: Known, flags: u32) -> Result<Guard, String> {
        let kernel = Kernel::open().map_err(|e| in_words("open a netlink socket to nf_tables", &e))?;
        let refused = |e: io::Error| in_words("read what an earlier process has left in the guard", &e);
        let start = clock::now();
        // Reckoned from before the listing: rather too early.
        let mut armed: BTreeMap<IpAddr, Millis> = (table::alive_in(&kernel).map_err(refused)?.into_iter())
            .filter(|(ip, _)| known.managed.contains(ip))
            .map(|(ip, rest)| (ip, start + rest))
            .collect();
        armed.extend(&known.unguarded);
        let mut proofs = Vec::new();
        for proof in proof::FOR {
            // The proof by IPv4 is made in any case.
            let needed = proof.is_ipv4() || known.roles.iter().chain(&known.managed).any(IpAddr::is_ipv6);
            if needed && !table::is_proved(&kernel, proof).map_err(refused)? {
                proofs.push(proof);
            }
        }
        let changes = Some(watch(&kernel).map_err(|e| in_words("listen for changes of the tables", &e))?);
        let guarded = known.managed.iter().chain(&proofs).copied().collect();
        let mut guard = Guard { kernel, flags, guarded, armed, stays: false, changes };
        // What the process before has armed runs on by itself: nothing is made longer by reckoning it twice.
        guard.put_up(&known.unguarded)?;
        table::read_back(&guard.kernel, &guard.guarded)?;
        // Side by side: while it is proved nothing is re-armed, and what an earlier process has armed runs out.
        for proved in join_all(proofs.iter().map(|proof| proof::prove(&guard.kernel, *proof))).await {
            proved?;
        }
        for proof in proofs {
            guard.guarded.remove(&proof);
            table::unguard(&guard.kernel, proof)
                .and_then(|()| table::mark_proved(&guard.kernel, proof))
                .map_err(|e| in_words("end the proof of the guard", &e))?;
        }
        Ok(guard)
    }

    /// Until when each address answers by what was armed. Right after the beginning: what is left of the life before.
    /// For an address that is not in it nothing is left.
    pub(crate) fn left(&self) -> &BTreeMap<IpAddr, Millis> {
        &self.armed
    }

    /// What is held back unless it is armed.
    pub(crate) fn guarded(&self) -> &BTreeSet<IpAddr> {
        &self.guarded
    }

    /// Once.
    pub(crate) fn watch(&mut self) -> Option<Watch> {
        self.changes.take()
    }

    /// Looks whether everything is as it was put up, and puts it up again if not.
    ///
    /// # Errors
    /// It cannot be put up again: nothing holds the addresses back any more.
    pub(crate) fn check(&mut self) -> Result<(), String> {
        let Err(mut found) = table::read_back(&self.kernel, &self.guarded) else { return Ok(()) };
        for _ in 0..TRIES {
            match self.put_up_again(&found).and_then(|()| table::read_back(&self.kernel, &self.guarded)) {
                Ok(()) => return Ok(()),
                Err(why) => found = why,
            }
        }
        Err(found)
    }

    /// The address answers until then and not longer, whatever it was allowed before.
    ///
    /// # Errors
    /// The lease has ended, and then the address is closed; or the kernel refused, and then what it was allowed before
    /// runs on to its own end.
    pub(crate) fn allow_until(&mut self, ip: IpAddr, until: Millis) -> Result<(), String> {
        self.arm(ip, until, clock::now)
    }

    fn arm(&mut self, ip: IpAddr, until: Millis, now: impl FnMut() -> Millis) -> Result<(), String> {
        let armed = in_time(&BTreeMap::from([(ip, until)]), now, |rests| match rests.get(&ip) {
            Some(rest_ms) => self.set(ip, Some(*rest_ms)).map(|()| true),
            None => Ok(false),
        })?;
        if armed {
            self.armed.insert(ip, until);
            return Ok(());
        }
        self.deny(ip)?;
        Err(format!("the lease of {ip} ended before the guard could be armed; the address is closed"))
    }

    /// The address does not answer from now on.
    ///
    /// # Errors
    /// The kernel refused; what it was allowed before runs on to its own end.
    pub(crate) fn deny(&mut self, ip: IpAddr) -> Result<(), String> {
        self.armed.remove(&ip);
        self.set(ip, None)
    }

    /// Removes the tables, so that nothing is held back any more.
    ///
    /// # Errors
    /// An address is still on this machine: without the guard it would answer at once. The tables stay and keep it
    /// closed. Or the kernel refused.
    pub(crate) fn end(mut self) -> Result<(), String> {
        self.stays = true;
        self.remove()
    }

    /// For an upgrade or a restart: what is armed runs on, and the next process takes the tables over.
    pub(crate) fn leave(mut self) {
        self.stays = true;
    }

    fn remove(&self) -> Result<(), String> {
        remove(&self.kernel, &self.guarded)
    }

    fn set(&mut self, ip: IpAddr, rest_ms: Option<NonZeroU64>) -> Result<(), String> {
        let tried = || format!("{} {ip} in the guard", if rest_ms.is_some() { "arm" } else { "close" });
        let is_new = !self.guarded.contains(&ip);
        // The second time for an element that has ended by itself in the middle of the batch.
        for _ in 0..2 {
            match table::set_alive(&self.kernel, ip, rest_ms, is_new) {
                Err(e) if e.raw_os_error() == Some(Errno::ENOENT as i32) => {}
                Err(e) => return Err(in_words(&tried(), &e)),
                Ok(()) => {
                    self.guarded.insert(ip);
                    return Ok(());
                }
            }
        }
        self.put_up_again("the tables cannot be changed")?;
        table::set_alive(&self.kernel, ip, rest_ms, is_new).map_err(|e| in_words(&tried(), &e))?;
        self.guarded.insert(ip);
        Ok(())
    }

    /// Somebody has removed the tables, or changed them.
    fn put_up_again(&self, found: &str) -> Result<(), String> {
        tracing::warn!(
            "the guard is not as it was put up: {found}. Was the firewall loaded anew with 'flush ruleset'? The tables \
             {} are made again; until now the role addresses were guarded by their lifetimes only",
            table::TABLE
        );
        let put_up =
            |guard: &Guard| guard.put_up(&guard.armed).and_then(|()| table::read_back(&guard.kernel, &guard.guarded));
        put_up(self).or_else(|_| {
            // What is there cannot be made right.
            table::remove(&self.kernel).map_err(|e| in_words("remove the guard's tables, which are not right", &e))?;
            put_up(self)
        })
    }

    /// With these armed in the same moment.
    fn put_up(&self, armed: &BTreeMap<IpAddr, Millis>) -> Result<(), String> {
        let quick = in_time(armed, clock::now, |rests| {
            // The second time for an element that has ended by itself in the middle of the batch.
            table::put_up(&self.kernel, &self.guarded, rests, self.flags)
                .or_else(|_| table::put_up(&self.kernel, &self.guarded, rests, self.flags))
                .map(|()| true)
                .map_err(|e| in_words("make the guard's tables", &e))
        })?;
        if quick { Ok(()) } else { Err("this process was stopped again and again while it made the tables".to_owned()) }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.stays
            && let Err(why) = self.remove()
        {
            tracing::warn!("{why}");
        }
    }
}

/// Does something with the rest of each lease, in milliseconds, and does it again when that took too long. False: it says
/// that it is too late, or it was never quick enough.
fn in_time(
    until: &BTreeMap<IpAddr, Millis>,
    mut now: impl FnMut() -> Millis,
    mut work: impl FnMut(&BTreeMap<IpAddr, NonZeroU64>) -> Result<bool, String>,
) -> Result<bool, String> {
    // What is taken off because the last try took so long; the kernel counts from some moment within the try.
    let mut off = Duration::ZERO;
    for _ in 0..TRIES {
        let start = now();
        // The clock's milliseconds are rounded down, so up to one of them has passed already.
        let rest = |until: Millis| until.since(start).saturating_sub(off + Duration::from_millis(1));
        let rest_ms = |until| u64::try_from(rest(until).as_millis()).ok().and_then(NonZeroU64::new);
        let rests = until.iter().filter_map(|(ip, until)| Some((*ip, rest_ms(*until)?))).collect();
        if !work(&rests)? {
            return Ok(false);
        }
        let took = now().since(start);
        if rests.is_empty() || took <= LATE + off {
            return Ok(true);
        }
        tracing::warn!(took_ms = took.as_millis() as u64, "the guard was armed slowly; arming it again");
        off = took;
    }
    Ok(false)
}

/// Told are changes from now on, until nobody listens any more. Several together are told once.
fn watch(kernel: &Kernel) -> io::Result<Watch> {
    let (mut changes, port) = (Changes::listen()?, kernel.port());
    let (tell, told) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = tell.closed() => return,
                change = changes.next(table::TABLE, port) => match change {
                    // One that waits to be told stands for this one too.
                    Ok(()) => drop(tell.try_send(())),
                    Err(e) => {
                        tracing::warn!("changes of the guard's tables are not heard of any more, only looked for: {e}");
                        return;
                    }
                },
            }
        }
    });
    Ok(told)
}

/// A living process that owns the tables: its netlink port, which is mostly its process id. Before kernel 6.9 nobody is
/// known to.
///
/// # Errors
/// The kernel refused to tell.
pub(crate) fn owner() -> Result<Option<u32>, String> {
    let Ok(kernel) = Kernel::open() else { return Ok(None) };
    table::owner(&kernel).map_err(|e| in_words("tell whose the guard's tables are", &e))
}

/// An earlier life of this agent had the guard, and its tables are still here. Which addresses they hold back.
///
/// # Errors
/// The kernel refused to tell.
pub(crate) fn left() -> Result<Option<BTreeSet<IpAddr>>, String> {
    // A kernel that has no netfilter has no tables.
    let Ok(kernel) = Kernel::open() else { return Ok(None) };
    let refused = |e: io::Error| in_words("tell what an earlier process has left in the guard", &e);
    let are_there = table::are_there(&kernel).map_err(refused)?;
    are_there.then(|| table::guarded_by(&kernel).map_err(refused)).transpose()
}

/// For a life without the guard: role addresses that the tables hold back could never answer again.
///
/// # Errors
/// One of the addresses is on this machine; or the kernel refused. The tables stay.
pub(crate) fn clear_away(_: &Alone) -> Result<(), String> {
    let kernel = Kernel::open().map_err(|e| in_words("open a netlink socket to nf_tables", &e))?;
    let guarded = table::guarded_by(&kernel).map_err(|e| in_words("tell which addresses the guard holds back", &e))?;
    remove(&kernel, &guarded)
}

fn remove(kernel: &Kernel, guarded: &BTreeSet<IpAddr>) -> Result<(), String> {
    let here: Vec<String> = own_addresses()?.intersection(guarded).map(IpAddr::to_string).collect();
    if !here.is_empty() {
        return Err(format!(
            "the guard's tables stay, because {} is still on this host and would answer without them; remove it, then \
             `nft delete table inet {name}` and `nft delete table arp {name}`",
            here.join(", "),
            name = table::TABLE
        ));
    }
    table::remove(kernel).map_err(|e| in_words("remove the guard's tables", &e))
}

/// As if another program had made the tables its own, until this is dropped.
#[cfg(test)]
pub(crate) fn take_the_tables() -> impl Drop {
    struct Other(Kernel);
    impl Drop for Other {
        fn drop(&mut self) {
            table::remove(&self.0).expect("they are this socket's");
        }
    }
    let kernel = Kernel::open().expect("a socket");
    table::remove(&kernel).expect("nobody owns them");
    table::put_up(&kernel, &BTreeSet::new(), &BTreeMap::new(), table::OWNED).expect("a kernel from 6.9 on");
    Other(kernel)
}

/// Every address of this machine. The listing can miss one while others come and go, so two have to be alike.
fn own_addresses() -> Result<BTreeSet<IpAddr>, String> {
    let mut before = None;
    for _ in 0..LISTINGS {
        let list = nix::ifaddrs::getifaddrs().map_err(|e| format!("listing the addresses of this host: {e}"))?;
        let now: BTreeSet<IpAddr> = list
            .filter_map(|interface| {
                let address = interface.address?;
                let v4 = address.as_sockaddr_in().map(|a| IpAddr::from(a.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::from(a.ip())))
            })
            .collect();
        if before.as_ref() == Some(&now) {
            return Ok(now);
        }
        before = Some(now);
    }
    Err(format!("the addresses of this host changed during each of {LISTINGS} listings"))
}

/// What the kernel's answer means here, and what to do.
fn in_words(tried: &str, error: &io::Error) -> String {
    let hint = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM | Errno::EACCES) => {
            "CAP_NET_ADMIN is missing (run as root, or with AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW in the \
             systemd unit), or another process owns the tables"
        }
        Some(Errno::EPROTONOSUPPORT) => {
            "this kernel has no netlink to netfilter (CONFIG_NETFILTER_NETLINK): `modprobe nf_tables`, or another kernel"
        }
        Some(Errno::EOPNOTSUPP | Errno::EINVAL) => {
            "this kernel has no nf_tables, or one that is too old (CONFIG_NF_TABLES, 4.14 or newer): `modprobe \
             nf_tables`, or another kernel"
        }
        Some(Errno::EAFNOSUPPORT) => {
            "this kernel's nf_tables cannot do inet or arp (CONFIG_NF_TABLES_INET, CONFIG_NF_TABLES_ARP)"
        }
        Some(Errno::ENOENT) => {
            "the tables are not there, or this kernel's nf_tables lacks set look-ups or fib (CONFIG_NFT_FIB_INET)"
        }
        Some(Errno::EEXIST | Errno::EBUSY) => {
            "tables of that name are there and look otherwise: with no role address on this host, `nft delete table \
             inet mmm_guard` and `nft delete table arp mmm_guard`, and start again"
        }
        Some(_) | None => "the kernel's log may say more",
    };
    format!("the kernel refused to {tried}: {error}; {hint}")
}

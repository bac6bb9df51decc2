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
//! kernel 6.9 a firewall's `flush ruleset` takes the tables away; the next `allow` makes them anew.

mod proof;
mod table;
#[cfg(test)]
mod tests;
mod wire;

use crate::clock;
use futures_util::future::join_all;
use mmm_common::ids::Millis;
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;
use wire::Kernel;

/// From reading the clock to the kernel's acknowledgement; usually some 0.05 ms. What is above it is made good.
const LATE: Duration = Duration::from_millis(20);
/// How often arming is repeated when it took longer.
const TRIES: usize = 5;
/// How often the addresses of the machine are listed until two listings are alike.
const LISTINGS: usize = 10;

pub(crate) struct Guard {
    kernel: Kernel,
    addresses: BTreeSet<IpAddr>,
    /// What was armed, and until when; for making the tables anew.
    armed: BTreeMap<IpAddr, Millis>,
    /// The tables stay when this is dropped.
    stays: bool,
    _alone: UnixDatagram,
}

impl Guard {
    /// Puts the guard up for these addresses, and proves that it works on this machine: some 0.1 s. An address that an
    /// earlier process has armed stays so for its rest, without a gap; every other one is closed from now on.
    ///
    /// To be given: every address that this machine may have, so also one that has left the configuration and may
    /// still be here.
    ///
    /// # Errors
    /// What is missing and what can be done about it. Nothing is left behind then, unless one of the addresses is here.
    pub(crate) async fn begin(addresses: &BTreeSet<IpAddr>) -> Result<Guard, String> {
        let alone = alone()?;
        let kernel = Kernel::open().map_err(|e| in_words("open a netlink socket to nf_tables", &e))?;
        let guard = Guard { kernel, addresses: addresses.clone(), armed: BTreeMap::new(), stays: false, _alone: alone };
        let proofs: Vec<IpAddr> = proof::FOR.into_iter().filter(|proof| guard.has_family_of(*proof)).collect();
        let with_proofs = addresses.iter().chain(&proofs).copied().collect();
        table::put_up(&guard.kernel, &with_proofs).map_err(|e| in_words("make the guard's tables", &e))?;
        table::read_back(&guard.kernel)?;
        // Side by side: while it is proved nothing is re-armed, and what an earlier process has armed runs out.
        for proved in join_all(proofs.iter().map(|proof| proof::prove(&guard.kernel, *proof))).await {
            proved?;
        }
        for proof in proofs {
            table::unguard(&guard.kernel, proof).map_err(|e| in_words("end the proof of the guard", &e))?;
        }
        Ok(guard)
    }

    /// The address answers until then and not longer, whatever it was allowed before.
    ///
    /// # Errors
    /// The lease has ended, and then the address is closed; or the kernel refused, and then what it was allowed before
    /// runs on to its own end.
    pub(crate) fn allow_until(&mut self, ip: IpAddr, until: Millis) -> Result<(), String> {
        self.arm(ip, until, clock::now)
    }

    fn arm(&mut self, ip: IpAddr, until: Millis, mut now: impl FnMut() -> Millis) -> Result<(), String> {
        // What is taken off because the last try took so long; the kernel counts from some moment within the try.
        let mut off = Duration::ZERO;
        for _ in 0..TRIES {
            let start = now();
            // The clock's milliseconds are rounded down, so up to one of them has passed already.
            let rest = until.since(start).saturating_sub(off + Duration::from_millis(1));
            let Some(rest_ms) = u64::try_from(rest.as_millis()).ok().and_then(NonZeroU64::new) else { break };
            self.set(ip, Some(rest_ms))?;
            let took = now().since(start);
            if took <= LATE + off {
                self.armed.insert(ip, until);
                return Ok(());
            }
            tracing::warn!(%ip, took_ms = took.as_millis() as u64, "the guard was armed slowly; arming it again");
            off = took;
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
        let here: Vec<String> = own_addresses()?.intersection(&self.addresses).map(IpAddr::to_string).collect();
        if !here.is_empty() {
            return Err(format!(
                "the guard's tables stay, because {} is still on this host and would answer without them; remove it, \
                 then `nft delete table inet {name}` and `nft delete table arp {name}`",
                here.join(", "),
                name = table::TABLE
            ));
        }
        table::remove(&self.kernel).map_err(|e| in_words("remove the guard's tables", &e))
    }

    fn set(&self, ip: IpAddr, rest_ms: Option<NonZeroU64>) -> Result<(), String> {
        if !self.addresses.contains(&ip) {
            return Err(format!("{ip} is none of the addresses that the guard was put up for"));
        }
        let tried = || format!("{} {ip} in the guard", if rest_ms.is_some() { "arm" } else { "close" });
        // The second time for an element that has ended by itself in the middle of the batch.
        for _ in 0..2 {
            match table::set_alive(&self.kernel, ip, rest_ms) {
                Err(e) if e.raw_os_error() == Some(Errno::ENOENT as i32) => {}
                done => return done.map_err(|e| in_words(&tried(), &e)),
            }
        }
        self.put_up_again()?;
        table::set_alive(&self.kernel, ip, rest_ms).map_err(|e| in_words(&tried(), &e))
    }

    /// Somebody has removed the tables.
    fn put_up_again(&self) -> Result<(), String> {
        tracing::warn!(
            "the guard's tables {} are gone: was the firewall loaded anew with 'flush ruleset'? They are made again; \
             until now the role addresses were guarded by their lifetimes only",
            table::TABLE
        );
        let refused = |e: io::Error| in_words("make the guard's tables anew", &e);
        table::put_up(&self.kernel, &self.addresses).map_err(refused)?;
        for (ip, until) in &self.armed {
            let rest = u64::try_from(until.since(clock::now()).as_millis()).unwrap_or(0).saturating_sub(1);
            if let Some(rest_ms) = NonZeroU64::new(rest) {
                table::set_alive(&self.kernel, *ip, Some(rest_ms)).map_err(refused)?;
            }
        }
        Ok(())
    }

    fn has_family_of(&self, other: IpAddr) -> bool {
        // The proof by IPv4 is made in any case.
        other.is_ipv4() || self.addresses.iter().any(IpAddr::is_ipv6)
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

/// An earlier life of this agent had the guard, and its tables are still here.
pub(crate) fn is_left() -> bool {
    Kernel::open().is_ok_and(|kernel| table::are_there(&kernel))
}

/// For a life without the guard: role addresses that the tables hold back could never answer again. To be called when
/// none is on this machine.
///
/// # Errors
/// The kernel refused.
pub(crate) fn clear_away() -> Result<(), String> {
    let kernel = Kernel::open().map_err(|e| in_words("open a netlink socket to nf_tables", &e))?;
    table::remove(&kernel).map_err(|e| in_words("remove the guard's tables", &e))
}

/// A second agent would take the first one's addresses out of the guard. The name is free again when the process ends,
/// however it ends, and is that of the network namespace, as the tables are.
fn alone() -> Result<UnixDatagram, String> {
    let name = SocketAddr::from_abstract_name(table::TABLE);
    name.and_then(|name| UnixDatagram::bind_addr(&name)).map_err(|e| {
        if e.kind() == io::ErrorKind::AddrInUse {
            "another mmm_agentd guards its addresses in this network namespace; only one can".to_owned()
        } else {
            format!("taking the name '@{}' that keeps a second agent out: {e}", table::TABLE)
        }
    })
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
        Some(Errno::ENOENT) => "the tables are not there, or this kernel's nf_tables lacks set look-ups",
        Some(Errno::EEXIST | Errno::EBUSY) => {
            "tables of that name are there and look otherwise: with no role address on this host, `nft delete table \
             inet mmm_guard` and `nft delete table arp mmm_guard`, and start again"
        }
        Some(_) | None => "the kernel's log may say more",
    };
    format!("the kernel refused to {tried}: {error}; {hint}")
}

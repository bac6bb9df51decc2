//! The rules of the guard, and its elements. As `nft list ruleset` shows them, shortened:
//!
//! ```text
//! table inet mmm_guard {
//!   set guarded4 { type ipv4_addr }                set guarded6 { type ipv6_addr }
//!   set alive4 { type ipv4_addr; flags timeout }   set alive6 { type ipv6_addr; flags timeout }
//!   chain prerouting {
//!     ip daddr @guarded4 ip daddr != @alive4 fib daddr type local drop
//!     ip6 daddr @guarded6 ip6 daddr != @alive6 fib daddr type local drop
//!   }
//!   chain input {
//!     ip daddr @guarded4 ip daddr != @alive4 drop
//!     ip6 daddr @guarded6 ip6 daddr != @alive6 drop
//!     icmpv6 type nd-neighbor-solicit icmpv6 taddr @guarded6 icmpv6 taddr != @alive6 drop
//!   }
//!   chain output {
//!     ip saddr @guarded4 ip saddr != @alive4 drop
//!     ip6 saddr @guarded6 ip6 saddr != @alive6 drop
//!   }
//!   chain postrouting {
//!     ip saddr @guarded4 ip saddr != @alive4 fib saddr type local drop
//!     ip6 saddr @guarded6 ip6 saddr != @alive6 fib saddr type local drop
//!   }
//! }
//! table arp mmm_guard {
//!   set guarded4 …   set alive4 …   set announced4 { type ipv4_addr . ipv4_addr }
//!   chain input {
//!     arp daddr ip @guarded4 arp daddr ip != @alive4 arp saddr ip . arp daddr ip != @announced4 drop
//!   }
//!   chain output { arp saddr ip @guarded4 arp saddr ip != @alive4 drop }
//! }
//! ```
//!
//! The new holder's gratuitous ARP names the address as sender and as target. It must get in, or programs on this host
//! would go on talking to the old holder: `announced4` has each address paired with itself. The kernel never answers
//! such a one. Neighbour solicitations go to a multicast address, so their target is looked at; the advertisement that
//! would answer them is stopped by `output` as well, except one that is sent for somebody else (`proxy_ndp`).
//!
//! `prerouting` and `postrouting` are for hosts with DNAT or REDIRECT (a server in a container with its port published):
//! a packet for the address has another destination before `input` sees it, or never comes there, and its answer gets
//! the address as its source after `output`. So they are the first and the last. What this host passes on between
//! others, one of whom has the address now, is none of their business: only addresses of this host (`fib`).
//!
//! Frames of packet sockets (announcements, probes) pass no such chain in either direction.

use super::wire::{Attributes, Batch, Family, Kernel, Verb, attribute, attributes};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::time::Duration;

/// Of both tables.
pub(super) const TABLE: &str = "mmm_guard";

/// NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST, kernel 6.9: only this socket can change the tables, so that a firewall's
/// `flush ruleset` leaves them alone; they stay when the socket closes, and the next process adopts them.
pub(super) const OWNED: u32 = 2 | 4;
/// NFT_TABLE_F_DORMANT: the table is there and does nothing.
const DORMANT: u32 = 1;

struct Set {
    family: Family,
    name: &'static str,
    kind: Kind,
    timeout: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    V4,
    V6,
    /// The same IPv4 address twice.
    V4Pair,
}

impl Kind {
    /// The number by which nft shows the elements in the right way, and the key's length.
    fn key(self) -> (u32, u32) {
        match self {
            Kind::V4 => (7, 4),
            Kind::V6 => (8, 16),
            // nft's way to write a concatenation: six bits for each part.
            Kind::V4Pair => ((7 << 6) | 7, 8),
        }
    }

    fn element(self, ip: IpAddr) -> Option<Vec<u8>> {
        match (self, ip) {
            (Kind::V4, IpAddr::V4(ip)) => Some(ip.octets().to_vec()),
            (Kind::V6, IpAddr::V6(ip)) => Some(ip.octets().to_vec()),
            (Kind::V4Pair, IpAddr::V4(ip)) => Some([ip.octets(), ip.octets()].concat()),
            (Kind::V4 | Kind::V4Pair, IpAddr::V6(_)) | (Kind::V6, IpAddr::V4(_)) => None,
        }
    }

    /// The address of an element.
    fn address(self, key: &[u8]) -> Option<IpAddr> {
        match self {
            Kind::V4 | Kind::V4Pair => key.get(..4).and_then(|b| <[u8; 4]>::try_from(b).ok()).map(IpAddr::from),
            Kind::V6 => <[u8; 16]>::try_from(key).ok().map(IpAddr::from),
        }
    }
}

const fn guarded(family: Family, name: &'static str, kind: Kind) -> Set {
    Set { family, name, kind, timeout: false }
}

const fn alive(family: Family, name: &'static str, kind: Kind) -> Set {
    Set { family, name, kind, timeout: true }
}

const SETS: [Set; 7] = [
    guarded(Family::Inet, "guarded4", Kind::V4),
    guarded(Family::Inet, "guarded6", Kind::V6),
    alive(Family::Inet, "alive4", Kind::V4),
    alive(Family::Inet, "alive6", Kind::V6),
    guarded(Family::Arp, "guarded4", Kind::V4),
    guarded(Family::Arp, "announced4", Kind::V4Pair),
    alive(Family::Arp, "alive4", Kind::V4),
];

struct Chain {
    family: Family,
    name: &'static str,
    /// linux/netfilter.h: NF_INET_PRE_ROUTING 0, NF_INET_LOCAL_IN 1, NF_INET_LOCAL_OUT 3, NF_INET_POST_ROUTING 4;
    /// linux/netfilter_arp.h: NF_ARP_IN 0, NF_ARP_OUT 1.
    hook: u32,
    priority: i32,
    rules: &'static [&'static [Part]],
}

/// Part of a rule; all must be true for the last one to be reached.
enum Part {
    /// The packet's family: 2 is IPv4, 10 is IPv6 (NFPROTO_*).
    Is(u8),
    /// ICMPv6 of this type.
    Icmpv6(u8),
    /// Bytes of the network header into the register.
    Network {
        offset: u32,
        length: u32,
    },
    /// The same into the second four bytes of the register, for a pair.
    NetworkSecond {
        offset: u32,
        length: u32,
    },
    /// Bytes of the transport header into the register.
    Transport {
        offset: u32,
        length: u32,
    },
    In(&'static str),
    NotIn(&'static str),
    /// The packet's destination is an address of this host.
    ToLocal,
    /// So is its source.
    FromLocal,
    Drop,
}

use Part::{Drop, FromLocal, Icmpv6, In, Is, Network, NetworkSecond, NotIn, ToLocal, Transport};

/// NF_IP_PRI_RAW: before connection tracking, changes of addresses and other filters.
const FIRST: i32 = -300;
/// After those (NF_IP_PRI_NAT_SRC is 100).
const LAST: i32 = 300;

/// Offsets: RFC 791, 8200, 4861 (4.3), 826.
const CHAINS: [Chain; 6] = [
    Chain {
        family: Family::Inet,
        name: "prerouting",
        hook: 0,
        priority: FIRST,
        rules: &[
            &[Is(2), Network { offset: 16, length: 4 }, In("guarded4"), NotIn("alive4"), ToLocal, Drop],
            &[Is(10), Network { offset: 24, length: 16 }, In("guarded6"), NotIn("alive6"), ToLocal, Drop],
        ],
    },
    Chain {
        family: Family::Inet,
        name: "input",
        hook: 1,
        priority: FIRST,
        rules: &[
            &[Is(2), Network { offset: 16, length: 4 }, In("guarded4"), NotIn("alive4"), Drop],
            &[Is(10), Network { offset: 24, length: 16 }, In("guarded6"), NotIn("alive6"), Drop],
            &[Is(10), Icmpv6(135), Transport { offset: 8, length: 16 }, In("guarded6"), NotIn("alive6"), Drop],
        ],
    },
    Chain {
        family: Family::Inet,
        name: "output",
        hook: 3,
        priority: FIRST,
        rules: &[
            &[Is(2), Network { offset: 12, length: 4 }, In("guarded4"), NotIn("alive4"), Drop],
            &[Is(10), Network { offset: 8, length: 16 }, In("guarded6"), NotIn("alive6"), Drop],
        ],
    },
    Chain {
        family: Family::Inet,
        name: "postrouting",
        hook: 4,
        priority: LAST,
        rules: &[
            &[Is(2), Network { offset: 12, length: 4 }, In("guarded4"), NotIn("alive4"), FromLocal, Drop],
            &[Is(10), Network { offset: 8, length: 16 }, In("guarded6"), NotIn("alive6"), FromLocal, Drop],
        ],
    },
    Chain {
        family: Family::Arp,
        name: "input",
        hook: 0,
        priority: FIRST,
        rules: &[&[
            Network { offset: 24, length: 4 },
            In("guarded4"),
            NotIn("alive4"),
            Network { offset: 14, length: 4 },
            NetworkSecond { offset: 24, length: 4 },
            NotIn("announced4"),
            Drop,
        ]],
    },
    Chain {
        family: Family::Arp,
        name: "output",
        hook: 1,
        priority: FIRST,
        rules: &[&[Network { offset: 14, length: 4 }, In("guarded4"), NotIn("alive4"), Drop]],
    },
];

/// Makes the tables, or takes over what is there: then the rules and `guarded` are replaced in the same moment, and
/// what is alive stays so for its rest. `alive` gets new rests with it.
///
/// `flags`: of the table, 0 or [`OWNED`]. Kernels before 6.9 do not know that; tables that were made without do not get
/// it.
pub(super) fn put_up(
    kernel: &Kernel,
    guarded: &BTreeSet<IpAddr>,
    alive: &BTreeMap<IpAddr, NonZeroU64>,
    flags: u32,
) -> io::Result<()> {
    let mut batch = rules(guarded, flags);
    for (ip, ms) in alive {
        set_alive_in(&mut batch, *ip, Some(*ms));
    }
    match kernel.change(batch) {
        Err(refused) if flags != 0 => match put_up(kernel, guarded, alive, 0) {
            // They are there with these flags, so it was something else.
            Err(e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => Err(refused),
            without => without,
        },
        done => done,
    }
}

fn rules(guarded: &BTreeSet<IpAddr>, flags: u32) -> Batch {
    let mut batch = Batch::new();
    for family in [Family::Inet, Family::Arp] {
        batch.add(Verb::NewTable, family, |a| {
            a.text(1, TABLE);
            // Given also when there are none: a table that was made dormant wakes.
            a.number(2, flags);
        });
    }
    for (number, set) in (1..).zip(&SETS) {
        /// NFT_SET_TIMEOUT
        const TIMEOUT: u32 = 0x10;
        let (key_type, key_length) = set.kind.key();
        batch.add(Verb::NewSet, set.family, |a| {
            a.text(1, TABLE);
            a.text(2, set.name);
            a.number(3, if set.timeout { TIMEOUT } else { 0 });
            a.number(4, key_type);
            a.number(5, key_length);
            a.number(10, number);
        });
        if !set.timeout {
            batch.add(Verb::DelElement, set.family, |a| {
                a.text(1, TABLE);
                a.text(2, set.name);
            });
            elements(&mut batch, Verb::NewElement, set, guarded, None);
        }
    }
    for chain in &CHAINS {
        batch.add(Verb::NewChain, chain.family, |a| {
            a.text(1, TABLE);
            a.text(3, chain.name);
            a.nested(4, |hook| {
                hook.number(1, chain.hook);
                hook.number(2, chain.priority.cast_unsigned());
            });
            a.number(5, NF_ACCEPT);
            a.text(7, "filter");
        });
        batch.add(Verb::DelRule, chain.family, |a| {
            a.text(1, TABLE);
            a.text(2, chain.name);
        });
        for rule in chain.rules {
            batch.add(Verb::NewRule, chain.family, |a| {
                a.text(1, TABLE);
                a.text(2, chain.name);
                a.nested(4, |parts| rule.iter().for_each(|part| part.write(parts)));
            });
        }
    }
    batch
}

const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

impl Part {
    fn write(&self, to: &mut Attributes<'_>) {
        /// NFT_REG_1, of 16 bytes, and its second four bytes (NFT_REG32_01).
        const REGISTER: u32 = 1;
        const SECOND: u32 = 9;
        const VERDICT: u32 = 0;
        const NETWORK: u32 = 1;
        const TRANSPORT: u32 = 2;
        const META_NFPROTO: u32 = 15;
        const META_L4PROTO: u32 = 16;
        const IPPROTO_ICMPV6: u8 = 58;
        /// NFTA_FIB_F_SADDR, NFTA_FIB_F_DADDR; linux/rtnetlink.h: RTN_LOCAL.
        const FIB_SOURCE: u32 = 1;
        const FIB_DESTINATION: u32 = 2;
        const RTN_LOCAL: u32 = 2;
        fn expression(to: &mut Attributes<'_>, name: &str, fill: impl FnOnce(&mut Attributes<'_>)) {
            to.nested(1, |e| {
                e.text(1, name);
                e.nested(2, fill);
            });
        }
        fn meta(to: &mut Attributes<'_>, key: u32) {
            expression(to, "meta", |e| {
                e.number(1, REGISTER);
                e.number(2, key);
            });
        }
        fn load(to: &mut Attributes<'_>, register: u32, base: u32, offset: u32, length: u32) {
            expression(to, "payload", |e| {
                e.number(1, register);
                e.number(2, base);
                e.number(3, offset);
                e.number(4, length);
            });
        }
        fn equals(to: &mut Attributes<'_>, value: &[u8]) {
            expression(to, "cmp", |e| {
                e.number(1, REGISTER);
                e.number(2, 0);
                e.nested(3, |data| data.bytes(1, value));
            });
        }
        fn is_local(to: &mut Attributes<'_>, which: u32) {
            expression(to, "fib", |e| {
                e.number(1, REGISTER);
                // NFT_FIB_RESULT_ADDRTYPE
                e.number(2, 3);
                e.number(3, which);
            });
            equals(to, &RTN_LOCAL.to_ne_bytes());
        }
        fn look_up(to: &mut Attributes<'_>, set: &str, inverted: u32) {
            expression(to, "lookup", |e| {
                e.text(1, set);
                e.number(2, REGISTER);
                e.number(5, inverted);
            });
        }
        match self {
            Is(family) => {
                meta(to, META_NFPROTO);
                equals(to, &[*family]);
            }
            Icmpv6(kind) => {
                meta(to, META_L4PROTO);
                equals(to, &[IPPROTO_ICMPV6]);
                load(to, REGISTER, TRANSPORT, 0, 1);
                equals(to, &[*kind]);
            }
            Network { offset, length } => load(to, REGISTER, NETWORK, *offset, *length),
            NetworkSecond { offset, length } => load(to, SECOND, NETWORK, *offset, *length),
            Transport { offset, length } => load(to, REGISTER, TRANSPORT, *offset, *length),
            In(set) => look_up(to, set, 0),
            NotIn(set) => look_up(to, set, 1),
            ToLocal => is_local(to, FIB_DESTINATION),
            FromLocal => is_local(to, FIB_SOURCE),
            Drop => expression(to, "immediate", |e| {
                e.number(1, VERDICT);
                e.nested(2, |data| data.nested(2, |verdict| verdict.number(1, NF_DROP)));
            }),
        }
    }
}

fn elements(batch: &mut Batch, verb: Verb, set: &Set, ips: &BTreeSet<IpAddr>, timeout_ms: Option<u64>) {
    // An empty list of elements would mean all of them when deleting.
    let keys: Vec<Vec<u8>> = ips.iter().filter_map(|ip| set.kind.element(*ip)).collect();
    // The length of an attribute has 16 bits.
    for keys in keys.chunks(1000) {
        batch.add(verb, set.family, |a| {
            a.text(1, TABLE);
            a.text(2, set.name);
            a.nested(3, |list| {
                for key in keys {
                    list.nested(1, |element| {
                        element.nested(1, |data| data.bytes(1, key));
                        if let Some(ms) = timeout_ms {
                            element.bytes(4, &ms.to_be_bytes());
                        }
                    });
                }
            });
        });
    }
}

/// The address's elements end after so many milliseconds from now, whatever they had before; None: now. All at once.
/// `guard`: it is put into `guarded` in the same moment.
pub(super) fn set_alive(kernel: &Kernel, ip: IpAddr, ms: Option<NonZeroU64>, guard: bool) -> io::Result<()> {
    let mut batch = Batch::new();
    for set in SETS.iter().filter(|set| guard && !set.timeout) {
        elements(&mut batch, Verb::NewElement, set, &BTreeSet::from([ip]), None);
    }
    set_alive_in(&mut batch, ip, ms);
    kernel.change(batch)
}

/// Added, deleted and added again in one batch: deleting what is not there would fail, and adding what is there changes
/// no timeout before kernel 6.12. A packet sees either the old elements or the new ones.
fn set_alive_in(batch: &mut Batch, ip: IpAddr, timeout_ms: Option<NonZeroU64>) {
    let ips = BTreeSet::from([ip]);
    // Zero would mean: for ever.
    let ms = timeout_ms.map_or(1000, NonZeroU64::get);
    for set in SETS.iter().filter(|set| set.timeout && set.kind.element(ip).is_some()) {
        elements(batch, Verb::NewElement, set, &ips, Some(ms));
        elements(batch, Verb::DelElement, set, &ips, None);
        if timeout_ms.is_some() {
            elements(batch, Verb::NewElement, set, &ips, Some(ms));
        }
    }
}

/// Takes the address out of `guarded`: nothing is dropped for it any more.
pub(super) fn unguard(kernel: &Kernel, ip: IpAddr) -> io::Result<()> {
    let mut batch = Batch::new();
    for set in SETS.iter().filter(|set| !set.timeout) {
        elements(&mut batch, Verb::DelElement, set, &BTreeSet::from([ip]), None);
    }
    kernel.change(batch)
}

/// Removes both tables. Not being there is success.
pub(super) fn remove(kernel: &Kernel) -> io::Result<()> {
    for family in [Family::Inet, Family::Arp] {
        let mut batch = Batch::new();
        batch.add(Verb::DelTable, family, |a| a.text(1, TABLE));
        match kernel.change(batch) {
            Err(e) if e.raw_os_error() != Some(Errno::ENOENT as i32) => return Err(e),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// None for what is not there, also because this kernel cannot have it.
pub(super) fn unless_missing<T>(answer: io::Result<T>) -> io::Result<Option<T>> {
    match answer {
        Ok(found) => Ok(Some(found)),
        Err(e) => match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT) => {
                Ok(None)
            }
            Some(_) | None => Err(e),
        },
    }
}

/// The attributes of both tables, as far as they are there.
fn tables(kernel: &Kernel) -> io::Result<Vec<(Family, Vec<u8>)>> {
    let mut found = Vec::new();
    for family in [Family::Inet, Family::Arp] {
        let table = unless_missing(kernel.one(Verb::GetTable, family, |a| a.text(1, TABLE)))?;
        found.extend(table.map(|table| (family, table)));
    }
    Ok(found)
}

/// Whether one of the tables is there.
pub(super) fn are_there(kernel: &Kernel) -> io::Result<bool> {
    Ok(!tables(kernel)?.is_empty())
}

/// The netlink port, which is mostly its process id, of a living process that owns one of the tables.
pub(super) fn owner(kernel: &Kernel) -> io::Result<Option<u32>> {
    let owners = |(_, table): &(Family, Vec<u8>)| number(table, 7).filter(|port| *port != 0);
    Ok(tables(kernel)?.iter().find_map(owners))
}

/// The addresses that the tables hold back, or did: those in one of the sets of `guarded`.
pub(super) fn guarded_by(kernel: &Kernel) -> io::Result<BTreeSet<IpAddr>> {
    let mut all = BTreeSet::new();
    for set in SETS.iter().filter(|set| !set.timeout) {
        all.extend(list(kernel, set)?.unwrap_or_default().into_keys());
    }
    Ok(all)
}

/// What still lives, and how long: of an address with several elements the shortest, and nothing if one is missing.
pub(super) fn alive_in(kernel: &Kernel) -> io::Result<BTreeMap<IpAddr, Duration>> {
    let (mut v4, mut v6): (Option<BTreeMap<IpAddr, Duration>>, _) = (None, BTreeMap::new());
    for set in SETS.iter().filter(|set| set.timeout) {
        let found = list(kernel, set)?.unwrap_or_default();
        // One without an end was not put there by an agent.
        let ends = found.into_iter().filter_map(|(ip, rest)| rest.map(|rest| (ip, rest)));
        if set.kind == Kind::V6 {
            v6.extend(ends);
        } else {
            let before = v4.take();
            let rest = |ip, rest: Duration| match &before {
                None => Some(rest),
                Some(before) => before.get(&ip).map(|earlier| rest.min(*earlier)),
            };
            v4 = Some(ends.filter_map(|(ip, ms)| rest(ip, ms).map(|ms| (ip, ms))).collect());
        }
    }
    Ok(v4.into_iter().flatten().chain(v6).collect())
}

/// The addresses in a set, with what is left of those that end. None: there is no such set.
fn list(kernel: &Kernel, set: &Set) -> io::Result<Option<BTreeMap<IpAddr, Option<Duration>>>> {
    let parts = unless_missing(kernel.list(Verb::GetElement, set.family, |a| {
        a.text(1, TABLE);
        a.text(2, set.name);
    }))?;
    let Some(parts) = parts else { return Ok(None) };
    let lists = parts.iter().filter_map(|part| attribute(part, 3)).flat_map(attributes);
    let element = |(_, element)| {
        let key = attribute(attribute(element, 1)?, 1)?;
        let rest = attribute(element, 5).and_then(|b| <[u8; 8]>::try_from(b).ok()).map(u64::from_be_bytes);
        Some((set.kind.address(key)?, rest.map(Duration::from_millis)))
    };
    Ok(Some(lists.filter_map(element).collect()))
}

/// Reads everything back: every chain is at its place with its rules, in tables that are awake, and these addresses are
/// guarded.
pub(super) fn read_back(kernel: &Kernel, guarded: &BTreeSet<IpAddr>) -> Result<(), String> {
    let failed = |e: io::Error| format!("the tables {TABLE} cannot be read back: {e}");
    let tables = tables(kernel).map_err(failed)?;
    for family in [Family::Inet, Family::Arp] {
        let name = format!("table {family:?} {TABLE}").to_lowercase();
        let Some((_, table)) = tables.iter().find(|(found, _)| *found == family) else {
            return Err(format!("{name} is gone"));
        };
        if number(table, 2).unwrap_or(0) & DORMANT != 0 {
            return Err(format!("{name} was made dormant"));
        }
    }
    for chain in &CHAINS {
        let name = format!("chain {} of table {:?} {TABLE}", chain.name, chain.family).to_lowercase();
        let found = kernel
            .one(Verb::GetChain, chain.family, |a| {
                a.text(1, TABLE);
                a.text(3, chain.name);
            })
            .map_err(|e| format!("{name} cannot be read back: {e}"))?;
        let hook = attribute(&found, 4);
        let is = (
            hook.and_then(|hook| number(hook, 1)),
            hook.and_then(|hook| number(hook, 2)).map(u32::cast_signed),
            number(&found, 6),
        );
        let (at, priority, rules) = (chain.hook, chain.priority, chain.rules.len() as u32);
        if is != (Some(at), Some(priority), Some(rules)) {
            return Err(format!(
                "{name} is at hook {:?} with priority {:?} and {:?} rules, and should be at {at} with {priority} and \
                 {rules}",
                is.0, is.1, is.2
            ));
        }
    }
    for set in SETS.iter().filter(|set| !set.timeout) {
        let found = list(kernel, set).map_err(failed)?.unwrap_or_default();
        let expected = guarded.iter().filter(|ip| set.kind.element(**ip).is_some());
        if let Some(missing) = expected.into_iter().find(|ip| !found.contains_key(ip)) {
            let name = format!("set {} of table {:?} {TABLE}", set.name, set.family).to_lowercase();
            return Err(format!("{missing} is missing in {name}"));
        }
    }
    Ok(())
}

fn number(attributes: &[u8], kind: u16) -> Option<u32> {
    attribute(attributes, kind).and_then(|b| <[u8; 4]>::try_from(b).ok()).map(u32::from_be_bytes)
}

/// Whether these rules were proved to work on this machine since it was started. The tables do not outlive that, and
/// the name of the mark, which is an empty chain, changes with the rules.
pub(super) fn is_proved(kernel: &Kernel, by: IpAddr) -> io::Result<bool> {
    let mark = kernel.one(Verb::GetChain, Family::Inet, |a| {
        a.text(1, TABLE);
        a.text(3, &mark(by));
    });
    Ok(unless_missing(mark)?.is_some())
}

pub(super) fn mark_proved(kernel: &Kernel, by: IpAddr) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.add(Verb::NewChain, Family::Inet, |a| {
        a.text(1, TABLE);
        a.text(3, &mark(by));
    });
    kernel.change(batch)
}

fn mark(by: IpAddr) -> String {
    // FNV-1a, which stays the same from one build to the next.
    let hash = rules(&BTreeSet::new(), 0)
        .bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("proved{}_{hash:016x}", if by.is_ipv4() { 4 } else { 6 })
}

//! The rules of the guard, and its elements. As `nft list ruleset` shows them, shortened:
//!
//! ```text
//! table inet mmm_guard {
//!   set guarded4 { type ipv4_addr }                set guarded6 { type ipv6_addr }
//!   set alive4 { type ipv4_addr; flags timeout }   set alive6 { type ipv6_addr; flags timeout }
//!   chain input {
//!     ip daddr @guarded4 ip daddr != @alive4 drop
//!     ip6 daddr @guarded6 ip6 daddr != @alive6 drop
//!     icmpv6 type nd-neighbor-solicit icmpv6 taddr @guarded6 icmpv6 taddr != @alive6 drop
//!   }
//!   chain output {
//!     ip saddr @guarded4 ip saddr != @alive4 drop
//!     ip6 saddr @guarded6 ip6 saddr != @alive6 drop
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
//! Frames of packet sockets (announcements, probes) pass no such chain in either direction.

use super::wire::{Attributes, Batch, Family, Kernel, Verb, attribute};
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::num::NonZeroU64;

/// Of both tables.
pub(super) const TABLE: &str = "mmm_guard";

/// NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST, kernel 6.9: only this socket can change the tables, so that a firewall's
/// `flush ruleset` leaves them alone; they stay when the socket closes, and the next process adopts them.
const OWNED: u32 = 2 | 4;

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
    /// linux/netfilter.h: NF_INET_LOCAL_IN 1, NF_INET_LOCAL_OUT 3; linux/netfilter_arp.h: NF_ARP_IN 0, NF_ARP_OUT 1.
    hook: u32,
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
    Drop,
}

use Part::{Drop, Icmpv6, In, Is, Network, NetworkSecond, NotIn, Transport};

/// Offsets: RFC 791, 8200, 4861 (4.3), 826.
const CHAINS: [Chain; 4] = [
    Chain {
        family: Family::Inet,
        name: "input",
        hook: 1,
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
        rules: &[
            &[Is(2), Network { offset: 12, length: 4 }, In("guarded4"), NotIn("alive4"), Drop],
            &[Is(10), Network { offset: 8, length: 16 }, In("guarded6"), NotIn("alive6"), Drop],
        ],
    },
    Chain {
        family: Family::Arp,
        name: "input",
        hook: 0,
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
        rules: &[&[Network { offset: 14, length: 4 }, In("guarded4"), NotIn("alive4"), Drop]],
    },
];

/// Makes the tables, or takes over what is there: then the rules and `guarded` are replaced in the same moment, and
/// what is alive stays so for its rest.
pub(super) fn put_up(kernel: &Kernel, addresses: &BTreeSet<IpAddr>) -> io::Result<()> {
    let owned = put_up_as(kernel, addresses, Some(OWNED));
    // Kernels before 6.9 do not know it; tables that were made without it do not get it.
    if owned.is_err() { put_up_as(kernel, addresses, None) } else { owned }
}

pub(super) fn put_up_as(kernel: &Kernel, addresses: &BTreeSet<IpAddr>, flags: Option<u32>) -> io::Result<()> {
    let mut batch = Batch::new();
    for family in [Family::Inet, Family::Arp] {
        batch.add(Verb::NewTable, family, |a| {
            a.text(1, TABLE);
            if let Some(flags) = flags {
                a.number(2, flags);
            }
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
            elements(&mut batch, Verb::NewElement, set, addresses, None);
        }
    }
    for chain in &CHAINS {
        batch.add(Verb::NewChain, chain.family, |a| {
            a.text(1, TABLE);
            a.text(3, chain.name);
            a.nested(4, |hook| {
                hook.number(1, chain.hook);
                // NF_IP_PRI_RAW: before connection tracking and other filters.
                hook.number(2, (-300_i32).cast_unsigned());
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
    kernel.change(batch)
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
        fn equals(to: &mut Attributes<'_>, value: u8) {
            expression(to, "cmp", |e| {
                e.number(1, REGISTER);
                e.number(2, 0);
                e.nested(3, |data| data.bytes(1, &[value]));
            });
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
                equals(to, *family);
            }
            Icmpv6(kind) => {
                meta(to, META_L4PROTO);
                equals(to, IPPROTO_ICMPV6);
                load(to, REGISTER, TRANSPORT, 0, 1);
                equals(to, *kind);
            }
            Network { offset, length } => load(to, REGISTER, NETWORK, *offset, *length),
            NetworkSecond { offset, length } => load(to, SECOND, NETWORK, *offset, *length),
            Transport { offset, length } => load(to, REGISTER, TRANSPORT, *offset, *length),
            In(set) => look_up(to, set, 0),
            NotIn(set) => look_up(to, set, 1),
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
///
/// Added, deleted and added again in one batch: deleting what is not there would fail, and adding what is there changes
/// no timeout before kernel 6.12. A packet sees either the old elements or the new ones.
pub(super) fn set_alive(kernel: &Kernel, ip: IpAddr, timeout_ms: Option<NonZeroU64>) -> io::Result<()> {
    let mut batch = Batch::new();
    let ips = BTreeSet::from([ip]);
    // Zero would mean: for ever.
    let ms = timeout_ms.map_or(1000, NonZeroU64::get);
    for set in SETS.iter().filter(|set| set.timeout && set.kind.element(ip).is_some()) {
        elements(&mut batch, Verb::NewElement, set, &ips, Some(ms));
        elements(&mut batch, Verb::DelElement, set, &ips, None);
        if timeout_ms.is_some() {
            elements(&mut batch, Verb::NewElement, set, &ips, Some(ms));
        }
    }
    kernel.change(batch)
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
            Err(e) if e.raw_os_error() != Some(nix::errno::Errno::ENOENT as i32) => return Err(e),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// Whether one of the tables is there. What cannot be known counts as there.
pub(super) fn are_there(kernel: &Kernel) -> bool {
    CHAINS.iter().any(|chain| {
        let found = kernel.chain(chain.family, |a| {
            a.text(1, TABLE);
            a.text(3, chain.name);
        });
        !matches!(found, Err(e) if e.raw_os_error() == Some(nix::errno::Errno::ENOENT as i32))
    })
}

/// Reads every chain back: it is at its place, with its rules.
pub(super) fn read_back(kernel: &Kernel) -> Result<(), String> {
    for chain in &CHAINS {
        let name = format!("chain {} of table {:?} {TABLE}", chain.name, chain.family).to_lowercase();
        let found = kernel
            .chain(chain.family, |a| {
                a.text(1, TABLE);
                a.text(3, chain.name);
            })
            .map_err(|e| format!("{name} cannot be read back: {e}"))?;
        let number = |bytes: &[u8], kind| {
            attribute(bytes, kind).and_then(|b| <[u8; 4]>::try_from(b).ok()).map(u32::from_be_bytes)
        };
        let hook = attribute(&found, 4).and_then(|hook| number(hook, 1));
        let rules = number(&found, 6);
        if (hook, rules) != (Some(chain.hook), Some(chain.rules.len() as u32)) {
            return Err(format!(
                "{name} is at hook {hook:?} with {rules:?} rules, and should be at {} with {}",
                chain.hook,
                chain.rules.len()
            ));
        }
    }
    Ok(())
}

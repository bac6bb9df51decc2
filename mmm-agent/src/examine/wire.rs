//! The cluster's interface, and whether announcements leave it and arrive: this host says a few times where its own
//! address is (which is true, and teaches nobody anything new), hears itself doing so on the wire, and notes which of
//! the other hosts it hears. All hosts do this at the same time.
//!
//! It never announces a role address, and never an address that is not on the machine.

use super::interface;
use crate::arp::{advertisement, announcement, on_interface};
use crate::netlink::Link;
use mmm_common::config::{Agent as Config, Host};
use mmm_common::examine::{Finding, Severity, Subject};
use mmm_common::ids::HostName;
use pnet_datalink::MacAddr;
use pnet_packet::Packet;
use pnet_packet::arp::{ArpOperations, ArpPacket};
use pnet_packet::ethernet::{EtherTypes, EthernetPacket};
use pnet_packet::icmpv6::Icmpv6Types;
use pnet_packet::icmpv6::ndp::NeighborAdvertPacket;
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv6::Ipv6Packet;
use socket2::{Domain, SockFilter, Socket, Type};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// When this host speaks; the others may begin a little earlier or later.
const SPEAK_MS: [u64; 4] = [100, 400, 800, 1200];
const LISTEN: Duration = Duration::from_millis(1700);
/// A read of the socket waits no longer than this.
const LOOK: Duration = Duration::from_millis(10);
/// From linux/if_ether.h: every protocol, also of what goes out.
const ETH_P_ALL: u16 = 0x0003;

/// Findings, and which hosts were heard (None: nothing could be heard).
pub(super) async fn look(config: &Config, host: &Host) -> (Vec<Finding>, Option<Vec<HostName>>) {
    let on = host.cluster_interface.clone();
    let addresses = interface(host);
    let tried = format!("interface {on}");
    let link = match addresses.link().await {
        Ok(link) => link,
        Err(e) => {
            let cure = format!("set cluster_interface of [host.{}] to the interface that has {}", config.this, host.ip);
            return (vec![Finding::bad(Severity::Error, Subject::Interface, tried, e.to_string(), cure)], None);
        }
    };
    if !link.up {
        let cure = format!("ip link set {on} up, and look at the cable");
        let found = "it is down, or has no carrier";
        return (vec![Finding::bad(Severity::Error, Subject::Interface, tried, found, cure)], None);
    }
    let mut findings = Vec::new();
    let own = BTreeSet::from([host.ip]);
    match addresses.present(&own).await {
        Ok(here) if here == own => {
            findings.push(Finding::ok(Subject::Interface, tried, format!("up, and {} is on this host", host.ip)));
        }
        Ok(_) => {
            let found = format!("{} is not on this host", host.ip);
            let cure = format!("put it there, or correct ip of [host.{}]", config.this);
            findings.push(Finding::bad(Severity::Error, Subject::Interface, tried, found, cure));
            return (findings, None);
        }
        Err(e) => {
            findings.push(Finding::bad(Severity::Error, Subject::Interface, tried, e.to_string(), "ask again"));
            return (findings, None);
        }
    }
    let Some(mac) = link.mac else {
        findings.push(Finding::bad(
            Severity::Notice,
            Subject::Arp,
            format!("announcing {} on {on}", host.ip),
            "it has no MAC address (loopback, or a tunnel), so nothing is announced there",
            "use an Ethernet interface for role addresses that move between machines",
        ));
        return (findings, None);
    };
    let others = config.cluster.hosts.iter().filter(|(name, _)| **name != config.this);
    let others: BTreeMap<IpAddr, HostName> = others.map(|(name, other)| (other.ip, name.clone())).collect();
    let (interface_name, ip) = (on.clone(), host.ip);
    let heard = tokio::task::spawn_blocking(move || speak_and_hear(&interface_name, link, mac.into(), ip, &others));
    let tried = format!("announcing {ip} on {on}, and hearing it there on a socket of its own");
    match heard.await {
        Ok(Ok(Heard { itself: true, others })) => {
            findings.push(Finding::ok(Subject::Arp, tried, "it went out"));
            (findings, Some(others.into_iter().collect()))
        }
        Ok(Ok(Heard { itself: false, others })) => {
            let found = "sent without an error, but not seen on the wire";
            let cure = "look for a packet filter on this host (nft list ruleset, tc filter show) and in its hypervisor";
            findings.push(Finding::bad(Severity::Error, Subject::Arp, tried, found, cure));
            (findings, Some(others.into_iter().collect()))
        }
        Ok(Err(e)) => {
            let cure = "give mmm_agentd CAP_NET_RAW, and look at the interface";
            findings.push(Finding::bad(Severity::Error, Subject::Arp, tried, e.to_string(), cure));
            (findings, None)
        }
        Err(e) => {
            findings.push(Finding::bad(Severity::Error, Subject::Arp, tried, e.to_string(), "ask again"));
            (findings, None)
        }
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Heard {
    itself: bool,
    others: BTreeSet<HostName>,
}

/// Blocks for [`LISTEN`].
fn speak_and_hear(
    on: &str,
    link: Link,
    mac: MacAddr,
    ip: IpAddr,
    others: &BTreeMap<IpAddr, HostName>,
) -> io::Result<Heard> {
    let (frames, filter) = match ip {
        IpAddr::V4(ip) => {
            let both = [ArpOperations::Request, ArpOperations::Reply].map(|form| announcement(mac, ip, form));
            (both.to_vec(), only(&[(HALF, 12, EtherTypes::Arp.0.into())]))
        }
        IpAddr::V6(ip) => {
            let advertisements = [
                (HALF, 12, EtherTypes::Ipv6.0.into()),
                (BYTE, 20, IpNextHeaderProtocols::Icmpv6.0.into()),
                (BYTE, 54, Icmpv6Types::NeighborAdvert.0.into()),
            ];
            (vec![advertisement(mac, ip)], only(&advertisements))
        }
    };
    // Without a protocol until the filter is there: nothing else ever gets in.
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    socket.attach_filter(&filter)?;
    let (_, mut ear) = on_interface(on, link, socket.into(), ETH_P_ALL, LOOK)?;
    // Of its own: the kernel shows nobody what left by the same socket.
    let (mut mouth, _) =
        on_interface(on, link, Socket::new(Domain::PACKET, Type::RAW, None)?.into(), 0, Duration::ZERO)?;
    let begin = Instant::now();
    let mut speak = SPEAK_MS.iter().map(|ms| begin + Duration::from_millis(*ms)).peekable();
    let mut heard = Heard::default();
    while begin.elapsed() < LISTEN {
        if speak.next_if(|at| *at <= Instant::now()).is_some() {
            for frame in &frames {
                mouth.send_to(frame, None).unwrap_or_else(|| Err(io::Error::other("the frame is too long")))?;
            }
        }
        match ear.next() {
            Ok(frame) => match announced(frame) {
                Some(it) if it == ip => heard.itself |= frame.get(6..12) == Some(&<[u8; 6]>::from(mac)[..]),
                Some(it) => heard.others.extend(others.get(&it).cloned()),
                None => {}
            },
            Err(e) if matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(heard)
}

/// The address that this frame announces, if it is an announcement.
fn announced(frame: &[u8]) -> Option<IpAddr> {
    let ethernet = EthernetPacket::new(frame)?;
    if ethernet.get_ethertype() == EtherTypes::Arp {
        let arp = ArpPacket::new(ethernet.payload())?;
        let ip = arp.get_sender_proto_addr();
        return (ip == arp.get_target_proto_addr()).then_some(IpAddr::V4(ip));
    }
    let packet = Ipv6Packet::new(ethernet.payload())?;
    let advert = NeighborAdvertPacket::new(packet.payload())?;
    let unasked = packet.get_destination().is_multicast();
    (unasked && advert.get_icmpv6_type() == Icmpv6Types::NeighborAdvert).then(|| advert.get_target_addr().into())
}

/// Classic BPF: load a half word.
const HALF: u16 = 0x28;
/// Load a byte.
const BYTE: u16 = 0x30;

/// Lets in only frames in which all of these hold: load so much, from there, it is that.
fn only(tests: &[(u16, u32, u32)]) -> Vec<SockFilter> {
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let op = |code, k| SockFilter::new(code, 0, 0, k);
    let mut program = Vec::new();
    for (number, (load, at, wanted)) in tests.iter().enumerate() {
        // Over the tests that are left and over the acceptance, to the end.
        let to_drop = (2 * (tests.len() - number - 1) + 1) as u8;
        program.extend([op(*load, *at), SockFilter::new(JUMP_IF_EQUAL, 0, to_drop, *wanted)]);
    }
    program.extend([op(RETURN, u32::MAX), op(RETURN, 0)]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testnet::{TwoHosts, ip};
    use mmm_common::config::Cluster;
    use mmm_common::state::HostMode;

    /// `here` is db1, `there` is db2, with these last parts of their addresses.
    fn config(this: &str, net: &str) -> Config {
        let host = |number: u8, peer: &str| {
            Host::of(format!("{net}{number}").parse().unwrap(), HostMode::Master, Some(peer.into()))
        };
        let hosts = [("db1".into(), host(1, "db2")), ("db2".into(), host(2, "db1"))].into();
        Config::of(Cluster::of(hosts, BTreeMap::new()), this.into())
    }

    async fn look_as(this: &str, net: &str) -> (Vec<Finding>, Option<Vec<HostName>>) {
        let config = config(this, net);
        look(&config, &config.cluster.hosts[&config.this]).await
    }

    fn severities(findings: &[Finding]) -> Vec<(Subject, Severity)> {
        findings.iter().map(|f| (f.subject, f.severity)).collect()
    }

    const FINE: [(Subject, Severity); 2] = [(Subject::Interface, Severity::Ok), (Subject::Arp, Severity::Ok)];

    #[test]
    fn two_hosts_hear_themselves_and_each_other() {
        let Some(hosts) = TwoHosts::new() else { return };
        for net in ["10.77.0.", "fd77::"] {
            let (one, two) = std::thread::scope(|scope| {
                let two = scope.spawn(|| hosts.on_there(async || look_as("db2", net).await));
                (hosts.on_here(async || look_as("db1", net).await), two.join().unwrap())
            });
            assert_eq!(severities(&one.0), FINE, "{one:?}");
            assert_eq!(one.1, Some(vec!["db2".into()]));
            assert_eq!((severities(&two.0), two.1), (FINE.to_vec(), Some(vec!["db1".into()])));
        }
    }

    #[test]
    fn silence_of_the_other_side_is_told_from_silence_here() {
        let Some(hosts) = TwoHosts::new() else { return };
        let (found, heard) = hosts.on_here(async || look_as("db1", "10.77.0.").await);
        assert_eq!((severities(&found), heard), (FINE.to_vec(), Some(vec![])));
    }

    #[test]
    fn what_cannot_work_is_an_error_with_its_cure() {
        let Some(hosts) = TwoHosts::new() else { return };
        let here = &hosts.here;
        let look = || hosts.on_here(async || look_as("db1", "10.77.0.").await);
        ip(&format!("-n {here} address del 10.77.0.1/24 dev eth0"));
        let (found, heard) = look();
        assert_eq!((severities(&found), heard), (vec![(Subject::Interface, Severity::Error)], None));
        assert!(found[0].cure.contains("[host.db1]"), "{found:?}");

        ip(&format!("-n {here} link set eth0 down"));
        let (found, _) = look();
        assert_eq!(severities(&found), [(Subject::Interface, Severity::Error)]);
        assert!(found[0].cure.starts_with("ip link set eth0 up"), "{found:?}");

        ip(&format!("-n {here} link del eth0"));
        let (found, _) = look();
        assert!(found[0].found.contains("'eth0' does not exist"), "{found:?}");
    }
}

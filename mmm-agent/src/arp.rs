//! Tells the neighbours where an address is now: gratuitous ARP as request and as reply, for IPv6 an unsolicited
//! neighbour advertisement. At once and then up to 5 s later, because neighbours ignore some forms for a while and
//! frames get lost; again when the link has come back.
//!
//! It never announces an address that is not on the machine at that moment: a process that was stopped and wakes after
//! its lease would otherwise pull the clients away from the new holder. It never waits for the network.

use crate::netlink::{Addresses, Link};
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use pnet_datalink::{Channel, ChannelType, Config, DataLinkReceiver, DataLinkSender, MacAddr, NetworkInterface};
use pnet_packet::arp::{ArpHardwareTypes, ArpOperation, ArpOperations, MutableArpPacket};
use pnet_packet::ethernet::{EtherType, EtherTypes, MutableEthernetPacket};
use pnet_packet::icmpv6::ndp::{
    MutableNdpOptionPacket, MutableNeighborAdvertPacket, MutableNeighborSolicitPacket, NdpOptionTypes,
};
use pnet_packet::icmpv6::{Icmpv6Packet, Icmpv6Types, MutableIcmpv6Packet};
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv6::MutableIpv6Packet;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// When to repeat, counted from the first announcement.
const REPEATS_MS: [u64; 5] = [100, 300, 1000, 3000, 5000];

pub(crate) struct Announcer {
    mouth: Mouth,
    /// Addresses that are ours until [`Announcer::stop`], with what is left of their repeats.
    announced: BTreeMap<IpAddr, Option<AbortHandle>>,
}

impl Announcer {
    pub(crate) fn new(addresses: Addresses) -> Self {
        Announcer { mouth: Mouth { addresses, wire: Arc::default() }, announced: BTreeMap::new() }
    }

    /// Says it once now, and leaves the repeats to a task of its own. The error is about the first one only; the
    /// repeats are made in any case.
    pub(crate) async fn announce(&mut self, ip: IpAddr) -> Result<(), String> {
        self.stop(ip);
        let start = Instant::now();
        let first = self.mouth.say(ip).await;
        let mouth = self.mouth.clone();
        let repeats = tokio::spawn(async move {
            for pause in REPEATS_MS {
                tokio::time::sleep_until(start + Duration::from_millis(pause)).await;
                if let Err(why) = mouth.say(ip).await {
                    tracing::warn!(%ip, after_ms = pause, "an announcement was not sent: {why}");
                }
            }
        });
        self.announced.insert(ip, Some(repeats.abort_handle()));
        first
    }

    /// The address goes away: nothing more is said about it.
    pub(crate) fn stop(&mut self, ip: IpAddr) {
        if let Some(Some(repeats)) = self.announced.remove(&ip) {
            repeats.abort();
        }
    }

    /// The link was down, so neighbours may have missed everything (and switches forgotten us): from the start again.
    pub(crate) async fn link_up(&mut self) {
        let ours: BTreeSet<IpAddr> = self.announced.keys().copied().collect();
        for ip in ours {
            match self.announce(ip).await {
                Ok(()) => tracing::info!(%ip, "announcing again, because the link has come back"),
                Err(why) => tracing::warn!(%ip, "announcing again after the link came back: {why}"),
            }
        }
    }
}

#[derive(Clone)]
struct Mouth {
    addresses: Addresses,
    /// One packet socket, kept open: closing one takes up to 24 ms.
    wire: Arc<Mutex<Option<Wire>>>,
}

struct Wire {
    link: Link,
    sender: Box<dyn DataLinkSender>,
}

impl Mouth {
    async fn say(&self, ip: IpAddr) -> Result<(), String> {
        let on = self.addresses.interface();
        let here = self.addresses.present(&BTreeSet::from([ip])).await.map_err(|e| e.to_string())?;
        if here.is_empty() {
            return Err(format!("{ip} is not on this machine now, so it is not announced"));
        }
        let link = self.addresses.link().await.map_err(|e| e.to_string())?;
        let Some(mac) = link.mac else {
            // Loopback or a tunnel: nobody there keeps a table of neighbours.
            return Ok(());
        };
        if !link.up {
            return Err(format!("announcing {ip}: interface {on} is down; it is done when the link comes back"));
        }
        let mac = MacAddr::from(mac);
        let frames = match ip {
            IpAddr::V4(ip) => {
                vec![announcement(mac, ip, ArpOperations::Request), announcement(mac, ip, ArpOperations::Reply)]
            }
            IpAddr::V6(ip) => vec![advertisement(mac, ip)],
        };
        let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        if wire.as_ref().is_none_or(|w| (w.link.index, w.link.mac) != (link.index, link.mac)) {
            *wire = Some(Wire::open(on, link).map_err(|e| format!("opening a packet socket on {on}: {e}"))?);
        }
        for frame in frames {
            let sent = wire.as_mut().and_then(|w| w.sender.send_to(&frame, None));
            if let Some(Err(e)) = sent {
                *wire = None;
                return Err(format!("announcing {ip} on {on}: {e}"));
            }
        }
        Ok(())
    }
}

impl Wire {
    fn open(name: &str, link: Link) -> io::Result<Wire> {
        // Protocol 0, here and in the bind that "layer 3, protocol 0" makes: the socket sends whole frames and
        // receives none, so a busy host does not pay for it with a copy of every packet. Not inherited over exec.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = nix::sys::socket::socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
        let (sender, _) = on_interface(name, link, socket, 0, Duration::ZERO)?;
        Ok(Wire { link, sender })
    }
}

/// Binds a raw packet socket to the interface. It sends whole frames, and receives those of this protocol (0: none).
pub(crate) fn on_interface(
    name: &str,
    link: Link,
    socket: OwnedFd,
    protocol: u16,
    read_timeout: Duration,
) -> io::Result<(Box<dyn DataLinkSender>, Box<dyn DataLinkReceiver>)> {
    let interface = NetworkInterface {
        name: name.to_owned(),
        description: String::new(),
        index: link.index,
        mac: link.mac.map(MacAddr::from),
        ips: Vec::new(),
        flags: 0,
    };
    let config = Config {
        channel_type: ChannelType::Layer3(protocol),
        promiscuous: false,
        read_timeout: Some(read_timeout),
        // A queue that is full now loses this frame, which is asked or said more than once for that.
        write_timeout: Some(Duration::ZERO),
        socket_fd: Some(socket.into_raw_fd()),
        ..Config::default()
    };
    match pnet_datalink::channel(&interface, config)? {
        Channel::Ethernet(sender, receiver) => Ok((sender, receiver)),
        _ => Err(io::Error::other("not an Ethernet channel")),
    }
}

const ETHERNET: usize = 14;

fn frame(source: MacAddr, destination: MacAddr, kind: EtherType, payload: &[u8]) -> Vec<u8> {
    // 60 bytes is the shortest Ethernet frame without its checksum.
    let mut bytes = vec![0; (ETHERNET + payload.len()).max(60)];
    if let Some(mut ethernet) = MutableEthernetPacket::new(&mut bytes) {
        ethernet.set_source(source);
        ethernet.set_destination(destination);
        ethernet.set_ethertype(kind);
    }
    bytes[ETHERNET..ETHERNET + payload.len()].copy_from_slice(payload);
    bytes
}

/// RFC 5227 section 3 (the request form) and RFC 826 (a reply that nobody asked for): sender and target are the
/// address itself. Some neighbours believe only the one, some only the other.
pub(crate) fn announcement(mac: MacAddr, ip: Ipv4Addr, operation: ArpOperation) -> Vec<u8> {
    let target_mac = if operation == ArpOperations::Reply { mac } else { MacAddr::zero() };
    arp(operation, (mac, ip), (target_mac, ip))
}

/// RFC 5227 section 2.1.1: who has the address? Names nobody as the asker, so no neighbour learns anything from it.
pub(crate) fn arp_probe(mac: MacAddr, ip: Ipv4Addr) -> Vec<u8> {
    arp(ArpOperations::Request, (mac, Ipv4Addr::UNSPECIFIED), (MacAddr::zero(), ip))
}

/// To everybody on the wire.
fn arp(operation: ArpOperation, sender: (MacAddr, Ipv4Addr), target: (MacAddr, Ipv4Addr)) -> Vec<u8> {
    let mut bytes = [0u8; 28];
    if let Some(mut arp) = MutableArpPacket::new(&mut bytes) {
        arp.set_hardware_type(ArpHardwareTypes::Ethernet);
        arp.set_protocol_type(EtherTypes::Ipv4);
        arp.set_hw_addr_len(6);
        arp.set_proto_addr_len(4);
        arp.set_operation(operation);
        arp.set_sender_hw_addr(sender.0);
        arp.set_sender_proto_addr(sender.1);
        arp.set_target_hw_addr(target.0);
        arp.set_target_proto_addr(target.1);
    }
    frame(sender.0, MacAddr::broadcast(), EtherTypes::Arp, &bytes)
}

/// RFC 4861 section 7.2.6: to all nodes, override flag set, with the target link-layer address option.
pub(crate) fn advertisement(mac: MacAddr, ip: Ipv6Addr) -> Vec<u8> {
    const OVERRIDE: u8 = 0x20;
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

    let mut advert = [0u8; 32];
    if let Some(mut a) = MutableNeighborAdvertPacket::new(&mut advert) {
        a.set_icmpv6_type(Icmpv6Types::NeighborAdvert);
        a.set_flags(OVERRIDE);
        a.set_target_addr(ip);
    }
    let option = &mut advert[24..];
    if let Some(mut o) = MutableNdpOptionPacket::new(option) {
        o.set_option_type(NdpOptionTypes::TargetLLAddr);
        // In units of 8 bytes.
        o.set_length(1);
    }
    option[2..].copy_from_slice(&<[u8; 6]>::from(mac));
    icmpv6(mac, ip, all_nodes, &mut advert)
}

/// RFC 4862 section 5.4.2: who has the address? From no address, so no neighbour learns anything from it.
pub(crate) fn solicitation(mac: MacAddr, ip: Ipv6Addr) -> Vec<u8> {
    let [.., x, y] = ip.segments();
    let solicited_node = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (x & 0xff), y);
    let mut solicit = [0u8; 24];
    if let Some(mut s) = MutableNeighborSolicitPacket::new(&mut solicit) {
        s.set_icmpv6_type(Icmpv6Types::NeighborSolicit);
        s.set_target_addr(ip);
    }
    icmpv6(mac, Ipv6Addr::UNSPECIFIED, solicited_node, &mut solicit)
}

/// To a multicast address. Fills in the message's checksum.
fn icmpv6(mac: MacAddr, source: Ipv6Addr, destination: Ipv6Addr, message: &mut [u8]) -> Vec<u8> {
    const IPV6: usize = 40;
    let sum = Icmpv6Packet::new(message).map(|p| pnet_packet::icmpv6::checksum(&p, &source, &destination));
    if let (Some(sum), Some(mut m)) = (sum, MutableIcmpv6Packet::new(message)) {
        m.set_checksum(sum);
    }
    let mut packet = vec![0; IPV6 + message.len()];
    if let Some(mut header) = MutableIpv6Packet::new(&mut packet) {
        header.set_version(6);
        header.set_payload_length(message.len() as u16);
        header.set_next_header(IpNextHeaderProtocols::Icmpv6);
        // Neighbours drop anything that has passed a router.
        header.set_hop_limit(255);
        header.set_source(source);
        header.set_destination(destination);
    }
    packet[IPV6..].copy_from_slice(message);
    // RFC 2464 section 7.
    let [.., a, b, c, d] = destination.octets();
    frame(mac, MacAddr::new(0x33, 0x33, a, b, c, d), EtherTypes::Ipv6, &packet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{Change, watch};
    use crate::testnet::{TwoHosts, ip};
    use pnet_packet::Packet;
    use pnet_packet::arp::ArpPacket;
    use pnet_packet::ethernet::EthernetPacket;
    use pnet_packet::icmpv6::ndp::NeighborAdvertPacket;
    use pnet_packet::ipv6::Ipv6Packet;
    use std::sync::mpsc;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Heard {
        Request,
        Reply,
        Advertisement,
    }

    /// What the neighbour hears about the address, with its time, until this is dropped.
    struct Ear {
        heard: Mutex<mpsc::Receiver<(std::time::Instant, Heard, MacAddr)>>,
    }

    impl Ear {
        fn new(hosts: &TwoHosts, role: IpAddr) -> Ear {
            let (sender, heard) = mpsc::channel();
            let (ready, is_ready) = mpsc::channel();
            let there = hosts.there.clone();
            std::thread::spawn(move || {
                crate::testnet::inside(&there, async move || {
                    let index = nix::net::if_::if_nametoindex("eth0").unwrap();
                    let interface = NetworkInterface {
                        name: "eth0".to_owned(),
                        description: String::new(),
                        index,
                        mac: None,
                        ips: vec![],
                        flags: 0,
                    };
                    let config = Config { read_timeout: Some(Duration::from_millis(50)), ..Config::default() };
                    let Channel::Ethernet(_, mut receiver) = pnet_datalink::channel(&interface, config).unwrap() else {
                        panic!("no Ethernet channel")
                    };
                    ready.send(()).unwrap();
                    let end = std::time::Instant::now() + Duration::from_secs(20);
                    while std::time::Instant::now() < end {
                        let Ok(frame) = receiver.next() else { continue };
                        if let Some((what, mac)) = about(frame, role)
                            && sender.send((std::time::Instant::now(), what, mac)).is_err()
                        {
                            return;
                        }
                    }
                });
            });
            is_ready.recv_timeout(Duration::from_secs(5)).unwrap();
            Ear { heard: Mutex::new(heard) }
        }

        /// Everything up to the moment when nothing has been heard for this long.
        fn until_quiet(&self, quiet: Duration) -> Vec<(std::time::Instant, Heard, MacAddr)> {
            let heard = self.heard.lock().unwrap();
            std::iter::from_fn(|| heard.recv_timeout(quiet).ok()).collect()
        }
    }

    /// A gratuitous announcement of the address, checked in all its fields.
    fn about(frame: &[u8], role: IpAddr) -> Option<(Heard, MacAddr)> {
        let ethernet = EthernetPacket::new(frame)?;
        let mac = ethernet.get_source();
        match role {
            IpAddr::V4(role) if ethernet.get_ethertype() == EtherTypes::Arp => {
                let arp = ArpPacket::new(ethernet.payload())?;
                if arp.get_sender_proto_addr() != role {
                    return None;
                }
                assert_eq!(arp.get_target_proto_addr(), role);
                assert_eq!(arp.get_sender_hw_addr(), mac);
                assert_eq!(ethernet.get_destination(), MacAddr::broadcast());
                let request = arp.get_operation() == ArpOperations::Request;
                Some((if request { Heard::Request } else { Heard::Reply }, mac))
            }
            IpAddr::V6(role) if ethernet.get_ethertype() == EtherTypes::Ipv6 => {
                let ipv6 = Ipv6Packet::new(ethernet.payload())?;
                let to_all = ipv6.get_destination() == "ff02::1".parse::<Ipv6Addr>().unwrap();
                let advert = NeighborAdvertPacket::new(ipv6.payload())?;
                if !to_all || advert.get_target_addr() != role {
                    return None;
                }
                assert_eq!(ipv6.get_hop_limit(), 255);
                assert_eq!(advert.get_flags(), 0x20);
                assert_eq!(advert.get_options()[0].data, mac_bytes(mac));
                let sum = pnet_packet::icmpv6::checksum(
                    &Icmpv6Packet::new(ipv6.payload()).unwrap(),
                    &ipv6.get_source(),
                    &ipv6.get_destination(),
                );
                assert_eq!(advert.get_checksum(), sum);
                Some((Heard::Advertisement, mac))
            }
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        }
    }

    fn mac_bytes(mac: MacAddr) -> Vec<u8> {
        <[u8; 6]>::from(mac).to_vec()
    }

    // lessons.md 23
    #[test]
    fn the_neighbour_hears_request_and_reply_at_once_and_repeated_up_to_five_seconds() {
        let Some(hosts) = TwoHosts::new() else { return };
        for (role, forms) in
            [("10.77.0.50", vec![Heard::Request, Heard::Reply]), ("fd77::50", vec![Heard::Advertisement])]
        {
            let role: IpAddr = role.parse().unwrap();
            let ear = Ear::new(&hosts, role);
            let start = std::time::Instant::now();
            let mac = hosts.on_here(async || {
                let addresses = Addresses::new("eth0");
                addresses.add(role, 60).await.unwrap();
                Announcer::new(addresses.clone()).announce(role).await.unwrap();
                let mac = addresses.link().await.unwrap().mac.unwrap();
                tokio::time::sleep(Duration::from_millis(5300)).await;
                mac
            });
            let heard = ear.until_quiet(Duration::from_millis(300));
            let kinds: Vec<Heard> = heard.iter().map(|(_, what, _)| *what).collect();
            assert_eq!(kinds, forms.repeat(6), "{role}");
            for (group, at_ms) in heard.chunks(forms.len()).zip([0, 100, 300, 1000, 3000, 5000]) {
                let after = group[0].0.duration_since(start).as_millis();
                assert!((at_ms..at_ms + 500).contains(&after), "{role}: {after} ms instead of {at_ms}");
                assert_eq!(group[0].2, MacAddr::from(mac));
            }
        }
    }

    // lessons.md 23
    #[test]
    fn the_neighbours_entry_moves_here() {
        let Some(hosts) = TwoHosts::new() else { return };
        let there = &hosts.there;
        for role in ["10.77.0.50", "fd77::50"] {
            ip(&format!("-n {there} neigh replace {role} lladdr 02:00:00:00:00:99 dev eth0 nud stale"));
            let mac = hosts.on_here(async || {
                let addresses = Addresses::new("eth0");
                let role: IpAddr = role.parse().unwrap();
                addresses.add(role, 60).await.unwrap();
                Announcer::new(addresses.clone()).announce(role).await.unwrap();
                tokio::time::sleep(Duration::from_millis(400)).await;
                MacAddr::from(addresses.link().await.unwrap().mac.unwrap())
            });
            let entry = ip(&format!("-n {there} neigh show {role} dev eth0"));
            assert!(entry.contains(&format!("lladdr {mac}")), "{role}: {entry}, and not {mac}");
        }
    }

    #[test]
    fn nothing_is_said_about_an_address_that_has_gone() {
        let Some(hosts) = TwoHosts::new() else { return };
        let role: IpAddr = [10, 77, 0, 50].into();
        let here = &hosts.here;
        let ear = Ear::new(&hosts, role);
        hosts.on_here(async || {
            let addresses = Addresses::new("eth0");
            let mut announcer = Announcer::new(addresses.clone());
            let absent = announcer.announce(role).await.unwrap_err();
            assert!(absent.contains("not on this machine"), "{absent}");
            assert_eq!(ear.until_quiet(Duration::from_millis(500)), []);
            announcer.stop(role);

            // Taken away behind the agent's back, while repeats are still to come.
            addresses.add(role, 60).await.unwrap();
            announcer.announce(role).await.unwrap();
            ip(&format!("-n {here} address del 10.77.0.50/32 dev eth0"));
            tokio::time::sleep(Duration::from_millis(1300)).await;
            assert_eq!(ear.until_quiet(Duration::from_millis(100)).len(), 2, "the first pair only");

            // Stopped by the agent.
            addresses.add(role, 60).await.unwrap();
            announcer.announce(role).await.unwrap();
            announcer.stop(role);
            tokio::time::sleep(Duration::from_millis(1300)).await;
            assert_eq!(ear.until_quiet(Duration::from_millis(100)).len(), 2, "the first pair only");
        });
    }

    // lessons.md 23
    #[test]
    fn after_a_flap_of_the_link_it_is_said_again() {
        let Some(hosts) = TwoHosts::new() else { return };
        let role: IpAddr = [10, 77, 0, 50].into();
        let there = &hosts.there;
        hosts.on_here(async || {
            let addresses = Addresses::new("eth0");
            let mut announcer = Announcer::new(addresses.clone());
            addresses.add(role, 60).await.unwrap();
            announcer.announce(role).await.unwrap();
            let (sender, mut changes) = tokio::sync::mpsc::unbounded_channel();
            watch("eth0", BTreeSet::from([role]), sender).unwrap();
            ip(&format!("-n {there} link set eth0 down"));
            assert_eq!(changes.recv().await, Some(Change::LinkDown));
            let down = announcer.announce(role).await.unwrap_err();
            assert!(down.contains("eth0 is down"), "{down}");
            ip(&format!("-n {there} link set eth0 up"));
            let ear = Ear::new(&hosts, role);
            while changes.recv().await != Some(Change::LinkUp) {}
            announcer.link_up().await;
            let what: Vec<Heard> = ear.until_quiet(Duration::from_millis(50)).iter().map(|h| h.1).collect();
            assert_eq!(what, [Heard::Request, Heard::Reply]);
        });
    }
}

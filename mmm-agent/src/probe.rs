//! Asks on the wire whether somebody else has an address, before this host takes it and while a conflict lasts
//! (safety.md, guards, 3): three questions within 60 ms, and 100 ms to hear anybody who speaks as the address.
//!
//! What it must never do: hold up the agent's loop, or say "nobody" when it could not ask. Without a link, or when a
//! question was not sent, there is no answer at all; the core asks again. IPv4 by RFC 5227, IPv6 by RFC 4862.
//!
//! Limits: only this wire is asked, and only the living answer. A host that is stopped, or whose kernel drops ARP, is
//! not heard; neither is anybody while a switch holds back a port that has just come up. So "nobody" is no proof that
//! the address is free (the leases are), but an answer is proof that it is not.

use crate::arp;
use crate::netlink::{Addresses, Link};
use mmm_agent_core::io::Input;
use pnet_datalink::{DataLinkReceiver, DataLinkSender, MacAddr};
use pnet_packet::Packet;
use pnet_packet::arp::{ArpHardwareTypes, ArpPacket};
use pnet_packet::ethernet::{EtherTypes, EthernetPacket};
use pnet_packet::icmpv6::Icmpv6Types;
use pnet_packet::icmpv6::ndp::{NdpOptionTypes, NeighborAdvertPacket};
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv6::Ipv6Packet;
use socket2::{Domain, SockFilter, Socket, Type};
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// From one question to the next.
const BETWEEN: Duration = Duration::from_millis(30);
const QUESTIONS: u32 = 3;
/// How long to listen after the last question. Some 100 ms in all.
const HEAR: Duration = Duration::from_millis(40);
/// A read of the socket waits no longer than this, so that the next question is not late.
const LOOK: Duration = Duration::from_millis(5);

pub(crate) struct Prober(Arc<Shared>);

struct Shared {
    addresses: Addresses,
    inputs: UnboundedSender<Input>,
    under_way: Mutex<BTreeSet<IpAddr>>,
    /// Why the last probe gave no answer: the same reason is not logged twice a second.
    silent: Mutex<Option<String>>,
}

impl Prober {
    pub(crate) fn new(addresses: Addresses, inputs: UnboundedSender<Input>) -> Self {
        Prober(Arc::new(Shared { addresses, inputs, under_way: Mutex::default(), silent: Mutex::default() }))
    }

    /// Asks in the background; the answer is sent as `Input::Probed`. Nothing new is begun while the address is being
    /// asked for.
    pub(crate) fn probe(&self, ip: IpAddr) {
        let shared = Arc::clone(&self.0);
        let Some(turn) = Turn::take(&shared, ip) else { return };
        tokio::spawn(async move {
            let answer = shared.ask(ip).await;
            // Before the answer: it may bring the next question about.
            drop(turn);
            shared.tell(ip, answer);
        });
    }
}

/// The right to ask for one address; given back when dropped, also when the asking was broken off.
struct Turn {
    shared: Arc<Shared>,
    ip: IpAddr,
}

impl Turn {
    fn take(shared: &Arc<Shared>, ip: IpAddr) -> Option<Turn> {
        let mut under_way = shared.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.insert(ip).then(|| Turn { shared: Arc::clone(shared), ip })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.shared.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.ip);
    }
}

impl Shared {
    /// Somebody else's MAC address, or that nobody spoke up. The error is why it could not be found out.
    async fn ask(&self, ip: IpAddr) -> Result<Option<MacAddr>, String> {
        let on = self.addresses.interface().to_owned();
        let link = self.usable_link().await?;
        if link.mac.is_none() {
            // Loopback or a tunnel: there is no asking by ARP there, and nobody who would take an address by it.
            return Ok(None);
        }
        let asked = tokio::task::spawn_blocking(move || ask_on(&on, link, ip)).await;
        let heard = asked.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        // A link that was away for a part of the time has carried neither questions nor answers.
        if heard.is_none() && self.usable_link().await? != link {
            return Err("it is another interface now than a moment ago".to_owned());
        }
        Ok(heard)
    }

    async fn usable_link(&self) -> Result<Link, String> {
        let link = self.addresses.link().await.map_err(|e| e.to_string())?;
        if link.up { Ok(link) } else { Err("it is down, or has no carrier".to_owned()) }
    }

    fn tell(&self, ip: IpAddr, answer: Result<Option<MacAddr>, String>) {
        let mut silent = self.silent.lock().unwrap_or_else(PoisonError::into_inner);
        match answer {
            Ok(mac) => {
                *silent = None;
                // Nobody listens any more when the agent is ending.
                let _ = self.inputs.send(Input::Probed { ip, answered_by: mac.map(|mac| mac.to_string()) });
            }
            Err(why) if silent.as_ref() != Some(&why) => {
                let on = self.addresses.interface();
                tracing::warn!(%ip, "cannot find out on interface {on} whether another host has the address: {why}; \
                    it is not taken without the monitor's word that nobody else may have it");
                *silent = Some(why);
            }
            Err(_) => {}
        }
    }
}

/// Blocks for a tenth of a second at most, and for the 8 to 24 ms that closing the socket takes.
fn ask_on(interface: &str, link: Link, ip: IpAddr) -> io::Result<Option<MacAddr>> {
    let Some(mac) = link.mac.map(MacAddr::from) else { return Ok(None) };
    let question = match ip {
        IpAddr::V4(ip) => arp::arp_probe(mac, ip),
        IpAddr::V6(ip) => arp::solicitation(mac, ip),
    };
    let ours = our_macs(mac)?;
    let (mut mouth, mut ear) = open(interface, link, ip)?;
    for _ in 1..QUESTIONS {
        send(&mut *mouth, &question)?;
        if let Some(other) = hear(&mut *ear, ip, &ours, BETWEEN)? {
            return Ok(Some(other));
        }
    }
    send(&mut *mouth, &question)?;
    hear(&mut *ear, ip, &ours, HEAR)
}

/// Those of all interfaces: Linux answers on each of them for the addresses of the others, so on a wire to which this
/// host has two cables it would hear itself.
fn our_macs(mac: MacAddr) -> io::Result<BTreeSet<MacAddr>> {
    let all = nix::ifaddrs::getifaddrs()?.filter_map(|i| i.address?.as_link_addr()?.addr().map(MacAddr::from));
    Ok(all.chain([mac]).collect())
}

type Channel = (Box<dyn DataLinkSender>, Box<dyn DataLinkReceiver>);

fn open(interface: &str, link: Link, ip: IpAddr) -> io::Result<Channel> {
    // Without a protocol until the filter is there and the interface is chosen: nothing else ever gets in.
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    let protocol = match ip {
        IpAddr::V4(_) => EtherTypes::Arp,
        IpAddr::V6(_) => EtherTypes::Ipv6,
    };
    socket.attach_filter(&from_holders_of(ip))?;
    arp::on_interface(interface, link, socket.into(), protocol.0, LOOK)
}

/// Classic BPF over the Ethernet frame, so that a busy host does not pay with a copy of its traffic: ARP with this
/// sender, or an advertisement for this target (of which the last four bytes are looked at).
fn from_holders_of(ip: IpAddr) -> Vec<SockFilter> {
    const LOAD_WORD: u16 = 0x20;
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let tests = match ip {
        IpAddr::V4(ip) => vec![(LOAD_WORD, 28, u32::from(ip))],
        IpAddr::V6(ip) => vec![
            (LOAD_BYTE, 20, u32::from(IpNextHeaderProtocols::Icmpv6.0)),
            (LOAD_BYTE, 54, u32::from(Icmpv6Types::NeighborAdvert.0)),
            (LOAD_WORD, 74, u128::from(ip) as u32),
        ],
    };
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

fn send(mouth: &mut dyn DataLinkSender, question: &[u8]) -> io::Result<()> {
    mouth.send_to(question, None).unwrap_or_else(|| Err(io::Error::other("the frame is too long")))
}

fn hear(
    ear: &mut dyn DataLinkReceiver,
    ip: IpAddr,
    ours: &BTreeSet<MacAddr>,
    time: Duration,
) -> io::Result<Option<MacAddr>> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        match ear.next() {
            Ok(frame) => {
                if let Some(mac) = speaks_as(frame, ip).filter(|mac| !ours.contains(mac)) {
                    return Ok(Some(mac));
                }
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

/// The MAC address of whoever says in this frame that the address is theirs: ARP of either form with it as sender
/// (an answer, a question of its own, an announcement), or an advertisement for it.
fn speaks_as(frame: &[u8], ip: IpAddr) -> Option<MacAddr> {
    let ethernet = EthernetPacket::new(frame)?;
    match ip {
        IpAddr::V4(ip) => {
            let arp = ArpPacket::new(ethernet.payload())?;
            let about_ipv4 =
                arp.get_hardware_type() == ArpHardwareTypes::Ethernet && arp.get_protocol_type() == EtherTypes::Ipv4;
            (about_ipv4 && arp.get_sender_proto_addr() == ip).then(|| arp.get_sender_hw_addr())
        }
        IpAddr::V6(ip) => {
            let packet = Ipv6Packet::new(ethernet.payload())?;
            // One that has passed a router is forged (RFC 4861, 7.1.2).
            if packet.get_next_header() != IpNextHeaderProtocols::Icmpv6 || packet.get_hop_limit() != 255 {
                return None;
            }
            let advert = NeighborAdvertPacket::new(packet.payload())?;
            if advert.get_icmpv6_type() != Icmpv6Types::NeighborAdvert || advert.get_target_addr() != ip {
                return None;
            }
            let options = advert.get_options();
            let named = options.iter().find(|o| o.option_type == NdpOptionTypes::TargetLLAddr);
            let named = named.and_then(|o| <[u8; 6]>::try_from(o.data.get(..6)?).ok());
            Some(named.map_or(ethernet.get_source(), MacAddr::from))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testnet::{TwoHosts, inside, ip};
    use pnet_packet::arp::ArpOperations;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    const PATIENCE: Duration = Duration::from_secs(5);
    const ROLES: [&str; 2] = ["10.77.0.50", "fd77::50"];

    fn prober() -> (Prober, UnboundedReceiver<Input>) {
        let (inputs, answers) = unbounded_channel();
        (Prober::new(Addresses::new("eth0"), inputs), answers)
    }

    async fn next(answers: &mut UnboundedReceiver<Input>) -> Input {
        tokio::time::timeout(PATIENCE, answers.recv()).await.expect("an answer in time").unwrap()
    }

    fn probed(role: &str, by: Option<&str>) -> Input {
        Input::Probed { ip: role.parse().unwrap(), answered_by: by.map(str::to_owned) }
    }

    fn mac_of(ns: &str) -> String {
        let words = ip(&format!("-n {ns} -o link show eth0"));
        let mut words = words.split_whitespace().skip_while(|word| *word != "link/ether");
        words.nth(1).expect("a MAC address").to_owned()
    }

    /// Until no probe is under way. True: in time.
    async fn is_idle(prober: &Prober) -> bool {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if prober.0.under_way.lock().unwrap().is_empty() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        false
    }

    /// An address of ours too is nobody else's.
    #[test]
    fn silence_means_nobody_and_takes_a_tenth_of_a_second() {
        let Some(hosts) = TwoHosts::new() else { return };
        let here = &hosts.here;
        hosts.on_here(async || {
            let (prober, mut answers) = prober();
            for role in ROLES {
                for ours in [false, true] {
                    if ours {
                        ip(&format!("-n {here} address add {role} dev eth0 nodad"));
                    }
                    let start = Instant::now();
                    prober.probe(role.parse().unwrap());
                    assert_eq!(next(&mut answers).await, probed(role, None), "ours: {ours}");
                    assert!(start.elapsed() >= Duration::from_millis(95), "{:?}", start.elapsed());
                }
            }
        });
    }

    #[test]
    fn who_has_the_address_is_named() {
        let Some(hosts) = TwoHosts::new() else { return };
        let mac = mac_of(&hosts.there);
        for role in ROLES {
            ip(&format!("-n {} address add {role} dev eth0 nodad", hosts.there));
        }
        hosts.on_here(async || {
            let (prober, mut answers) = prober();
            for role in ROLES {
                prober.probe(role.parse().unwrap());
                assert_eq!(next(&mut answers).await, probed(role, Some(&mac)));
            }
            // Having it too does not hide the other one.
            ip(&format!("-n {} address add {} dev eth0", hosts.here, ROLES[0]));
            prober.probe(ROLES[0].parse().unwrap());
            assert_eq!(next(&mut answers).await, probed(ROLES[0], Some(&mac)));
        });
        let known = ip(&format!("-n {} neighbour show", hosts.there));
        assert!(!known.contains("10.77.0.50") && !known.contains("0.0.0.0"), "asking teaches nothing: {known}");
    }

    /// The two cables of one host lie on one wire: it hears itself answer on the other one.
    #[test]
    fn an_answer_by_another_interface_of_this_host_is_our_own() {
        let Some(hosts) = TwoHosts::new() else { return };
        let (here, there) = (&hosts.here, &hosts.there);
        ip(&format!("-n {there} link add br0 type bridge"));
        ip(&format!("-n {there} link set eth0 master br0"));
        ip(&format!("-n {there} link set br0 up"));
        ip(&format!("-n {here} link add eth1 type veth peer name eth1 netns {there}"));
        ip(&format!("-n {there} link set eth1 master br0 up"));
        ip(&format!("-n {here} link set eth1 up"));
        ip(&format!("-n {here} address add 10.77.0.50 dev eth1"));
        hosts.on_here(async || {
            let (prober, mut answers) = prober();
            // The bridge lets a new port in after a while: until then the probe is silent for that reason.
            let role = "10.77.0.50".parse().unwrap();
            let link = prober.0.addresses.link().await.unwrap();
            let heard = (0..100).any(|_| {
                let (mut mouth, mut ear) = open("eth0", link, role).unwrap();
                send(&mut *mouth, &arp::arp_probe(link.mac.unwrap().into(), "10.77.0.50".parse().unwrap())).unwrap();
                hear(&mut *ear, role, &BTreeSet::new(), Duration::from_millis(50)).unwrap().is_some()
            });
            assert!(heard, "without the list of our own, it hears itself");
            prober.probe(role);
            assert_eq!(next(&mut answers).await, probed("10.77.0.50", None));
        });
    }

    #[test]
    fn whoever_announces_the_address_meanwhile_is_heard_and_others_are_not() {
        let Some(hosts) = TwoHosts::new() else { return };
        let stranger = MacAddr::new(2, 0, 0, 0, 0, 0x99);
        for role in ROLES {
            let (about_it, about_another) = match role.parse().unwrap() {
                IpAddr::V4(ip) => (
                    arp::announcement(stranger, ip, ArpOperations::Request),
                    arp::announcement(stranger, "10.77.0.51".parse().unwrap(), ArpOperations::Reply),
                ),
                IpAddr::V6(ip) => (
                    arp::advertisement(stranger, ip),
                    // The filter in the kernel lets this one through.
                    arp::advertisement(stranger, "fd78::50".parse().unwrap()),
                ),
            };
            for (frame, heard) in [(about_another, None), (about_it, Some("02:00:00:00:00:99"))] {
                let (done, is_done) = std::sync::mpsc::channel::<()>();
                std::thread::scope(|scope| {
                    let there = &hosts.there;
                    scope.spawn(move || {
                        inside(there, async move || {
                            let link = Addresses::new("eth0").link().await.unwrap();
                            let (mut mouth, _) = open("eth0", link, role.parse().unwrap()).unwrap();
                            let end = Instant::now() + PATIENCE;
                            while is_done.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty)
                                && Instant::now() < end
                            {
                                send(&mut *mouth, &frame).unwrap();
                                std::thread::sleep(Duration::from_millis(3));
                            }
                        });
                    });
                    let answer = hosts.on_here(async || {
                        let (prober, mut answers) = prober();
                        prober.probe(role.parse().unwrap());
                        next(&mut answers).await
                    });
                    drop(done);
                    assert_eq!(answer, probed(role, heard));
                });
            }
        }
    }

    #[test]
    fn without_a_link_there_is_no_answer_and_with_it_there_is_again() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let (prober, mut answers) = prober();
            for side in [&hosts.here, &hosts.there] {
                ip(&format!("-n {side} link set eth0 down"));
                for role in ROLES {
                    prober.probe(role.parse().unwrap());
                    assert!(is_idle(&prober).await);
                    assert!(answers.try_recv().is_err(), "{role}");
                }
                let why = prober.0.silent.lock().unwrap().clone().unwrap_or_default();
                assert!(why.contains("down"), "{why}");
                ip(&format!("-n {side} link set eth0 up"));
                while !prober.0.addresses.link().await.unwrap().up {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                prober.probe(ROLES[0].parse().unwrap());
                assert_eq!(next(&mut answers).await, probed(ROLES[0], None));
                assert_eq!(*prober.0.silent.lock().unwrap(), None);
            }
        });
    }

    /// Nobody could have been heard, so it must not be "nobody": neither when the next question could not be sent, nor
    /// when all were sent.
    #[test]
    fn a_link_that_goes_while_it_listens_gives_no_answer() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            for after_ms in [10, 65] {
                // On a busy machine `ip` may come too late, and the question was answered before: once more then.
                let shown = async || {
                    let (prober, mut answers) = prober();
                    let start = Instant::now();
                    prober.probe(ROLES[0].parse().unwrap());
                    tokio::time::sleep(Duration::from_millis(after_ms)).await;
                    ip(&format!("-n {} link set eth0 down", hosts.there));
                    let in_time = start.elapsed() < Duration::from_millis(90);
                    assert!(is_idle(&prober).await);
                    if in_time {
                        let why = prober.0.silent.lock().unwrap().clone();
                        assert_eq!((answers.try_recv().ok(), why.is_some()), (None, true), "down after {after_ms} ms");
                    }
                    ip(&format!("-n {} link set eth0 up", hosts.there));
                    while !prober.0.addresses.link().await.unwrap().up {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                    in_time
                };
                let mut times = 0;
                while !shown().await {
                    times += 1;
                    assert!(times < 30, "'ip' was never quick enough");
                }
            }
        });
    }

    #[test]
    fn one_address_is_asked_for_once_at_a_time() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let (prober, mut answers) = prober();
            for _ in 0..3 {
                for role in ROLES {
                    prober.probe(role.parse().unwrap());
                }
            }
            let mut both = vec![next(&mut answers).await, next(&mut answers).await];
            both.sort_by_key(|answer| format!("{answer:?}"));
            assert_eq!(both, ROLES.map(|role| probed(role, None)));
            assert!(is_idle(&prober).await);
            assert!(answers.try_recv().is_err(), "no third one");
            prober.probe(ROLES[0].parse().unwrap());
            assert_eq!(next(&mut answers).await, probed(ROLES[0], None), "and again afterwards");
        });
    }

    #[test]
    fn an_interface_without_arp_has_nobody_else() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let (inputs, mut answers) = unbounded_channel();
            Prober::new(Addresses::new("lo"), inputs).probe(ROLES[0].parse().unwrap());
            assert_eq!(next(&mut answers).await, probed(ROLES[0], None));
        });
    }

    #[test]
    fn broken_frames_say_nothing() {
        let role: IpAddr = ROLES[0].parse().unwrap();
        let mac = MacAddr::new(2, 0, 0, 0, 0, 0x99);
        let good = arp::announcement(mac, "10.77.0.50".parse().unwrap(), ArpOperations::Reply);
        assert_eq!(speaks_as(&good, role), Some(mac));
        for length in 0..42 {
            assert_eq!(speaks_as(&good[..length], role), None, "{length} bytes");
        }
        let good = arp::advertisement(mac, "fd77::50".parse().unwrap());
        for length in 0..good.len() {
            // Without the option the sender of the frame is meant.
            let heard = speaks_as(&good[..length], "fd77::50".parse().unwrap());
            assert!(heard.is_none_or(|by| by == mac), "{length} bytes: {heard:?}");
        }
    }
}

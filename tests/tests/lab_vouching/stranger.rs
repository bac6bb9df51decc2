//! A further machine on the lab's network, which no configuration knows, and what it and the clients' host can hear.
//!
//! Its namespace has no name: it goes with this process, whatever ends that. It never touches the lab's own hosts.

use anyhow::{Context as _, Result, bail, ensure};
use mmm_tests::lab::Lab;
use mmm_tests::lab::network::{APP, DB, MONITOR, READERS, WRITER, ip_of};
use mmm_tests::lab::process::{must, within};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket};
use nix::sys::time::TimeVal;
use nix::unistd::gettid;
use pnet_datalink::{Channel, ChannelType, Config, MacAddr, NetworkInterface};
use pnet_packet::Packet as _;
use pnet_packet::arp::{ArpHardwareTypes, ArpOperations, ArpPacket, MutableArpPacket};
use pnet_packet::ethernet::{EtherTypes, EthernetPacket, MutableEthernetPacket};
use pnet_packet::ipv4::Ipv4Packet;
use pnet_packet::tcp::TcpPacket;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, IntoRawFd as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(10);
const OWN: &str = "10.77.0.99";
/// An answer on a network without distance takes far less.
const ANSWER: Duration = Duration::from_millis(60);

pub(crate) fn roles() -> Vec<Ipv4Addr> {
    [WRITER].into_iter().chain(READERS).collect()
}

/// A machine on the bridge until it is dropped.
pub(crate) struct Stranger {
    netns: PathBuf,
    /// Its thread holds the namespace, and ends when this is gone.
    _hold: mpsc::Sender<()>,
}

impl Stranger {
    pub(crate) fn join(lab: &Lab) -> Result<Stranger> {
        let (ready, made) = mpsc::channel();
        let (hold, until) = mpsc::channel::<()>();
        thread::spawn(move || {
            let _ = ready.send(unshare(CloneFlags::CLONE_NEWNET).map(|()| gettid().as_raw()));
            let _ = until.recv();
        });
        let tid = made.recv_timeout(LIMIT)?.context("make a network namespace")?;
        let netns = PathBuf::from(format!("/proc/{}/task/{tid}/ns/net", std::process::id()));
        // A bridge takes the lowest MAC of its ports for its own: it must not change, or the gateway is lost for a while.
        let port = format!("link add ext address fe:ff:ff:ff:ff:fe type veth peer name eth0 netns {tid}");
        let bridge = lab.network().netns("net");
        for words in [port.as_str(), "link set ext master br0", "link set ext up"] {
            must(Some(&bridge), ip(words), LIMIT)?;
        }
        for words in ["link set lo up", &format!("addr add {OWN}/24 dev eth0"), "link set eth0 up"] {
            must(Some(&netns), ip(words), LIMIT)?;
        }
        Ok(Stranger { netns, _hold: hold })
    }

    /// What somebody does by hand on a machine that is no business of the cluster's.
    pub(crate) fn take_address(&self, address: Ipv4Addr) -> Result<()> {
        must(Some(&self.netns), ip(&format!("addr add {address}/32 dev eth0")), LIMIT).map(drop)
    }

    pub(crate) fn give_up_address(&self, address: Ipv4Addr) -> Result<()> {
        must(Some(&self.netns), ip(&format!("addr del {address}/32 dev eth0")), LIMIT).map(drop)
    }

    pub(crate) fn mac(&self) -> Result<MacAddr> {
        mac_in(&self.netns)
    }

    /// Whatever it sends to a role address goes to this host from now on, who ever announces itself.
    fn look_at_only(&self, mac: MacAddr) -> Result<()> {
        for role in roles() {
            must(Some(&self.netns), ip(&format!("neigh replace {role} lladdr {mac} nud permanent dev eth0")), LIMIT)?;
        }
        Ok(())
    }
}

fn ip(words: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(words.split(' '));
    command
}

fn eth0() -> Result<NetworkInterface> {
    let found = pnet_datalink::interfaces().into_iter().find(|i| i.name == "eth0");
    found.context("there is no eth0 in this namespace")
}

fn mac_in(netns: &Path) -> Result<MacAddr> {
    within(netns, eth0)??.mac.context("eth0 without a MAC")
}

/// Listens to one host: who answers for a role address when the clients' host asks by ARP, and whether a TCP connection
/// that is certain to go to the host is taken.
pub(crate) struct Ears {
    stop: Arc<AtomicBool>,
    arp: Option<JoinHandle<Result<Heard>>>,
    tcp: Option<JoinHandle<Result<Heard>>>,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Heard {
    pub(crate) answers: usize,
    pub(crate) last: Option<Instant>,
}

impl Heard {
    fn note(&mut self, at: Instant) {
        self.answers += 1;
        self.last = Some(at);
    }
}

impl Ears {
    /// Both have heard the host when this comes back.
    pub(crate) fn open(lab: &Lab, stranger: &Stranger, host: &str, addresses: &[Ipv4Addr]) -> Result<Ears> {
        let mac = mac_in(&lab.network().netns(host))?;
        stranger.look_at_only(mac)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (told, first) = mpsc::channel();
        let arp = {
            let (netns, stop, told) = (lab.network().netns(APP), Arc::clone(&stop), told.clone());
            thread::spawn(move || within(&netns, || ask_by_arp(mac, &stop, &told))?)
        };
        let tcp = {
            let (netns, stop, addresses) = (stranger.netns.clone(), Arc::clone(&stop), addresses.to_vec());
            thread::spawn(move || within(&netns, || connect(&addresses, &stop, &told)))
        };
        let ears = Ears { stop, arp: Some(arp), tcp: Some(tcp) };
        let (end, mut heard) = (Instant::now() + LIMIT, BTreeSet::new());
        while heard.len() < 2 {
            ensure!(Instant::now() < end, "of {host} only this is heard: {heard:?}");
            heard.extend(first.recv_timeout(Duration::from_millis(100)));
        }
        Ok(ears)
    }

    /// What was heard by ARP and by TCP.
    pub(crate) fn close(mut self) -> Result<(Heard, Heard)> {
        self.stop.store(true, Ordering::Relaxed);
        let end = |thread: Option<JoinHandle<Result<Heard>>>| match thread.map(JoinHandle::join) {
            Some(Ok(heard)) => heard,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => bail!("these ears were closed before"),
        };
        Ok((end(self.arp.take())?, end(self.tcp.take())?))
    }
}

impl Drop for Ears {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn connect(addresses: &[Ipv4Addr], stop: &AtomicBool, told: &mpsc::Sender<&'static str>) -> Heard {
    let mut heard = Heard::default();
    while !stop.load(Ordering::Relaxed) {
        for address in addresses {
            if TcpStream::connect_timeout(&SocketAddr::from((*address, 3306)), ANSWER).is_ok() {
                heard.note(Instant::now());
            }
        }
        if heard.answers > 0 {
            let _ = told.send("tcp");
        }
        thread::sleep(Duration::from_millis(20));
    }
    heard
}

fn ask_by_arp(wanted: MacAddr, stop: &AtomicBool, told: &mpsc::Sender<&'static str>) -> Result<Heard> {
    let interface = eth0()?;
    let (mac, own) = (interface.mac.context("eth0 without a MAC")?, ip_of(APP)?);
    // Whole frames, but of ARP only: "layer 3" names the protocol when the socket is bound.
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    let config = Config {
        channel_type: ChannelType::Layer3(EtherTypes::Arp.0),
        promiscuous: false,
        read_timeout: Some(Duration::from_millis(5)),
        write_timeout: Some(Duration::from_millis(50)),
        socket_fd: Some(socket.into_raw_fd()),
        ..Config::default()
    };
    let Channel::Ethernet(mut sender, mut receiver) = pnet_datalink::channel(&interface, config)? else {
        bail!("not an Ethernet channel");
    };
    let mut heard = Heard::default();
    while !stop.load(Ordering::Relaxed) {
        for role in roles() {
            if let Some(sent) = sender.send_to(&request(mac, own, role), None) {
                sent.context("send an ARP request")?;
            }
        }
        let end = Instant::now() + Duration::from_millis(20);
        while Instant::now() < end {
            // An error is the read's time limit.
            let Ok(frame) = receiver.next() else { continue };
            if answers(frame, own) == Some(wanted) {
                heard.note(Instant::now());
                let _ = told.send("arp");
            }
        }
    }
    Ok(heard)
}

/// RFC 826, as arping sends it.
fn request(mac: MacAddr, own: Ipv4Addr, wanted: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0; 42];
    if let Some(mut ethernet) = MutableEthernetPacket::new(&mut frame) {
        ethernet.set_destination(MacAddr::broadcast());
        ethernet.set_source(mac);
        ethernet.set_ethertype(EtherTypes::Arp);
    }
    if let Some(mut arp) = MutableArpPacket::new(&mut frame[14..]) {
        arp.set_hardware_type(ArpHardwareTypes::Ethernet);
        arp.set_protocol_type(EtherTypes::Ipv4);
        arp.set_hw_addr_len(6);
        arp.set_proto_addr_len(4);
        arp.set_operation(ArpOperations::Request);
        arp.set_sender_hw_addr(mac);
        arp.set_sender_proto_addr(own);
        arp.set_target_proto_addr(wanted);
    }
    frame
}

/// Who answers the one that asked, for a role address.
fn answers(frame: &[u8], own: Ipv4Addr) -> Option<MacAddr> {
    let ethernet = EthernetPacket::new(frame)?;
    let arp = ArpPacket::new(ethernet.payload())?;
    let to_us = ethernet.get_ethertype() == EtherTypes::Arp
        && arp.get_operation() == ArpOperations::Reply
        && arp.get_target_proto_addr() == own
        && roles().contains(&arp.get_sender_proto_addr());
    to_us.then(|| arp.get_sender_hw_addr())
}

/// Every message that goes over the lab's plain-text connections to and from the agents' port, as lines by direction.
pub(crate) struct Recorder {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<BTreeSet<Line>>>>,
}

/// One recorded line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Line {
    pub(crate) from: Ipv4Addr,
    pub(crate) to: Ipv4Addr,
    pub(crate) text: String,
}

pub(crate) const AGENT_PORT: u16 = 9989;

impl Recorder {
    pub(crate) fn start(lab: &Lab) -> Result<Recorder> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for host in DB.into_iter().chain([MONITOR]) {
            let socket = within(&lab.network().netns(host), || {
                socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
            })??;
            setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 100_000))?;
            let (stop, own) = (Arc::clone(&stop), ip_of(host)?);
            threads.push(thread::spawn(move || {
                let mut streams: BTreeMap<(Ipv4Addr, u16), Vec<u8>> = BTreeMap::new();
                let mut lines = BTreeSet::new();
                let mut packet = vec![0; 70_000];
                while !stop.load(Ordering::Relaxed) {
                    // An error is the time limit.
                    let Ok(length) = recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty()) else { continue };
                    let Some((from, port, payload)) = incoming(&packet[..length], own) else { continue };
                    let stream = streams.entry((from, port)).or_default();
                    stream.extend(payload);
                    while let Some(end) = stream.iter().position(|b| *b == b'\n') {
                        let line: Vec<u8> = stream.drain(..=end).collect();
                        if let Ok(text) = String::from_utf8(line) {
                            lines.insert(Line { from, to: own, text });
                        }
                    }
                }
                Ok(lines)
            }));
        }
        Ok(Recorder { stop, threads })
    }

    pub(crate) fn finish(self) -> Result<BTreeSet<Line>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = BTreeSet::new();
        for thread in self.threads {
            match thread.join() {
                Ok(lines) => all.extend(lines?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(all)
    }
}

/// Sender, its port, and the payload, of what comes to this host from or to an agent's port.
fn incoming(packet: &[u8], own: Ipv4Addr) -> Option<(Ipv4Addr, u16, Vec<u8>)> {
    let ip = Ipv4Packet::new(packet)?;
    if ip.get_version() != 4 || ip.get_next_level_protocol().0 != 6 || ip.get_destination() != own {
        return None;
    }
    let tcp = TcpPacket::new(ip.payload())?;
    let ports = (tcp.get_source(), tcp.get_destination());
    if (ports.0 != AGENT_PORT && ports.1 != AGENT_PORT) || tcp.payload().is_empty() {
        return None;
    }
    // The agent's end and its peer's end of one connection are told apart by the sender's port.
    Some((ip.get_source(), ports.0, tcp.payload().to_vec()))
}

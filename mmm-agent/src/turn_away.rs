//! For a short while after a role address was released, connections to it are refused with a reset.
//!
//! Until the next holder has announced itself, clients still send to this host. Without an answer, a client's first
//! packet is repeated after a second (RFC 6298: initial timeout 1 s), so whoever connects in the few milliseconds in
//! which nobody has the address waits for that second. With a reset it tries again at once.
//!
//! It never accepts anything, answers nothing but the first packet of a TCP connection, and only what was sent to this
//! machine. IPv4 only; over IPv6 clients wait as they would without it.

use pnet_packet::MutablePacket;
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv4::{self, Ipv4Packet, MutableIpv4Packet};
use pnet_packet::tcp::{self, MutableTcpPacket, TcpFlags, TcpPacket};
use socket2::{Domain, Protocol, SockAddr, SockFilter, Socket, Type};
use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long. The next holder needs some milliseconds, or as long as it takes to apply what it has received.
const FOR: Duration = Duration::from_secs(2);
/// How often the end is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Enough for any IPv4 and TCP header.
const HEADERS: usize = 120;
/// ETH_P_IP as the kernel wants it: in network order.
const ETH_P_IP: i32 = (0x0800_u16).to_be() as i32;

/// Hears connection attempts from now on; answers them once told to `begin`.
pub(crate) struct TurnAway {
    address: Ipv4Addr,
    attempts: Socket,
    resets: Socket,
}

impl TurnAway {
    /// To be opened while the address is still here, so that no attempt falls between. None for IPv6.
    ///
    /// # Errors
    /// A socket could not be had (CAP_NET_RAW).
    pub(crate) fn open(address: IpAddr) -> io::Result<Option<TurnAway>> {
        let IpAddr::V4(address) = address else { return Ok(None) };
        // What came in before the filter was there is told apart later, by `reset_for`.
        let attempts = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(ETH_P_IP)))?;
        attempts.attach_filter(&first_packets_to(address))?;
        attempts.set_read_timeout(Some(LOOK))?;
        let resets = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(IPPROTO_RAW)))?;
        resets.set_header_included_v4(true)?;
        resets.set_nonblocking(true)?;
        Ok(Some(TurnAway { address, attempts, resets }))
    }

    /// The address is gone: refuses for a while, beside everything else, or until what it gives back is dropped.
    pub(crate) fn begin(self) -> Refusing {
        let refusing = Refusing(Arc::new(AtomicBool::new(true)));
        let on = Arc::clone(&refusing.0);
        tokio::task::spawn_blocking(move || match self.refuse_until(Instant::now() + FOR, &on) {
            Ok(0) => {}
            Ok(count) => tracing::info!(ip = %self.address, count, "connections were turned away"),
            Err(e) => tracing::warn!(ip = %self.address, "connections could not be turned away: {e}"),
        });
        refusing
    }

    fn refuse_until(&self, end: Instant, on: &AtomicBool) -> io::Result<u32> {
        let mut count = 0;
        let mut buffer = [0; HEADERS];
        while Instant::now() < end && on.load(Ordering::SeqCst) {
            let length = match (&self.attempts).read(&mut buffer) {
                Ok(length) => length,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                    continue;
                }
                Err(e) => return Err(e),
            };
            let Some((reset, client)) = reset_for(self.address, &buffer[..length]) else { continue };
            if !on.load(Ordering::SeqCst) {
                break;
            }
            match self.resets.send_to(&reset, &SockAddr::from(client)) {
                Ok(_) => count += 1,
                // A full queue: the client tries again by itself.
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
        Ok(count)
    }
}

/// While it lives, connections are refused (for two seconds at most). Dropped before the address comes back.
pub(crate) struct Refusing(Arc<AtomicBool>);

impl Drop for Refusing {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// The kernel's number for raw packets with our own header (netinet/in.h).
const IPPROTO_RAW: i32 = 255;

/// Classic BPF over the IP header: for this machine, TCP, to this address, no fragment, SYN and neither ACK, RST nor FIN.
/// A bridge that floods, or a promiscuous interface, brings also what is for the address's new holder.
fn first_packets_to(address: Ipv4Addr) -> [SockFilter; 14] {
    /// SKF_AD_OFF + SKF_AD_PKTTYPE (linux/filter.h): whom the frame was sent to.
    const PACKET_TYPE: u32 = 0xffff_f004;
    /// linux/if_packet.h: to this machine.
    const PACKET_HOST: u32 = 0;
    const LOAD_WORD: u16 = 0x20;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const LOAD_BYTE_AFTER_HEADER: u16 = 0x50;
    const HEADER_LENGTH: u16 = 0xb1;
    const AND: u16 = 0x54;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const JUMP_IF_SET: u16 = 0x45;
    const RETURN: u16 = 0x06;
    let op = |code, k| SockFilter::new(code, 0, 0, k);
    let unless_drop = |k, to_drop| SockFilter::new(JUMP_IF_EQUAL, 0, to_drop, k);
    [
        op(LOAD_WORD, PACKET_TYPE),
        unless_drop(PACKET_HOST, 11),
        op(LOAD_WORD, 16),
        unless_drop(u32::from(address), 9),
        op(LOAD_BYTE, 9),
        unless_drop(6, 7),
        op(LOAD_HALF, 6),
        SockFilter::new(JUMP_IF_SET, 5, 0, 0x1fff),
        op(HEADER_LENGTH, 0),
        op(LOAD_BYTE_AFTER_HEADER, 13),
        op(AND, 0x17),
        unless_drop(2, 1),
        op(RETURN, HEADERS as u32),
        op(RETURN, 0),
    ]
}

/// The refusal of a connection attempt (RFC 9293, 3.10.7.1), and whom it goes to.
fn reset_for(address: Ipv4Addr, attempt: &[u8]) -> Option<(Vec<u8>, SocketAddrV4)> {
    const IP_HEADER: usize = 20;
    const TCP_HEADER: usize = 20;
    let ip = Ipv4Packet::new(attempt)?;
    let header = usize::from(ip.get_header_length()) * 4;
    let syn = TcpPacket::new(attempt.get(header..)?)?;
    if ip.get_destination() != address
        || syn.get_flags() & (TcpFlags::SYN | TcpFlags::ACK | TcpFlags::RST) != TcpFlags::SYN
    {
        return None;
    }
    let client = SocketAddrV4::new(ip.get_source(), syn.get_source());

    let mut packet = vec![0; IP_HEADER + TCP_HEADER];
    let mut out = MutableIpv4Packet::new(&mut packet)?;
    out.set_version(4);
    out.set_header_length(5);
    out.set_total_length((IP_HEADER + TCP_HEADER) as u16);
    out.set_ttl(64);
    out.set_next_level_protocol(IpNextHeaderProtocols::Tcp);
    out.set_source(address);
    out.set_destination(*client.ip());
    let mut reset = MutableTcpPacket::new(out.payload_mut())?;
    reset.set_source(syn.get_destination());
    reset.set_destination(client.port());
    reset.set_acknowledgement(syn.get_sequence().wrapping_add(1));
    reset.set_data_offset(5);
    reset.set_flags(TcpFlags::RST | TcpFlags::ACK);
    let sum = tcp::ipv4_checksum(&reset.to_immutable(), &address, client.ip());
    reset.set_checksum(sum);
    let sum = ipv4::checksum(&out.to_immutable());
    out.set_checksum(sum);
    Some((packet, client))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Addresses;
    use crate::testnet::{TwoHosts, ip};
    use pnet_packet::Packet;
    use std::net::{TcpListener, TcpStream};

    // lessons.md 25
    #[test]
    fn whoever_connects_after_the_release_is_refused_at_once_and_not_left_waiting() {
        let Some(hosts) = TwoHosts::new() else { return };
        let role = IpAddr::from([10, 77, 0, 50]);
        let connect = || {
            // Below the second after which a lost first packet is repeated.
            hosts.on_there(async || TcpStream::connect_timeout(&(role, 3306).into(), Duration::from_millis(900)))
        };
        hosts.on_here(async || {
            let addresses = Addresses::new("eth0");
            addresses.add(role, 60).await.unwrap();
            let listener = TcpListener::bind((role, 3306)).unwrap();
            connect().unwrap();
            let turn_away = TurnAway::open(role).unwrap().unwrap();
            connect().expect("while the address is here nothing is refused");
            drop(listener);
            addresses.remove(role).await.unwrap();
            let refusing = turn_away.begin();
            assert_eq!(connect().unwrap_err().kind(), ErrorKind::ConnectionRefused);
            // The address comes back, and nobody is refused any more.
            drop(refusing);
            addresses.add(role, 60).await.unwrap();
            let listener = TcpListener::bind((role, 3306)).unwrap();
            connect().expect("it is here again");
            drop(listener);
            let turn_away = TurnAway::open(role).unwrap().unwrap();
            addresses.remove(role).await.unwrap();
            let _refusing = turn_away.begin();
            assert_eq!(connect().unwrap_err().kind(), ErrorKind::ConnectionRefused);
            // It ends by itself, and then there is no answer any more.
            let end = Instant::now() + FOR * 5;
            while connect().unwrap_err().kind() == ErrorKind::ConnectionRefused {
                assert!(Instant::now() < end, "still refused");
            }
        });
    }

    #[test]
    fn what_was_sent_to_another_machine_is_not_answered() {
        let Some(hosts) = TwoHosts::new() else { return };
        let role = IpAddr::from([10, 77, 0, 50]);
        let connect =
            || hosts.on_there(async || TcpStream::connect_timeout(&(role, 3306).into(), Duration::from_millis(500)));
        let (here, there) = (&hosts.here, &hosts.there);
        ip(&format!("-n {here} link set eth0 promisc on"));
        let own = ip(&format!("-n {here} link show eth0"));
        let own = own.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap();
        hosts.on_here(async || {
            let refusing = TurnAway::open(role).unwrap().unwrap().begin();
            ip(&format!("-n {there} neighbour replace {role} lladdr 02:00:00:00:00:99 dev eth0"));
            assert_eq!(connect().unwrap_err().kind(), ErrorKind::TimedOut, "the new holder's connection");
            ip(&format!("-n {there} neighbour replace {role} lladdr {own} dev eth0"));
            assert_eq!(connect().unwrap_err().kind(), ErrorKind::ConnectionRefused);
            drop(refusing);
        });
    }

    #[test]
    fn only_the_first_packet_of_a_connection_is_answered() {
        let address = Ipv4Addr::new(10, 0, 0, 50);
        let attempt = |flags, to: Ipv4Addr| {
            let mut bytes = vec![0; 40];
            let mut ip = MutableIpv4Packet::new(&mut bytes).unwrap();
            ip.set_version(4);
            ip.set_header_length(5);
            ip.set_total_length(40);
            ip.set_source(Ipv4Addr::new(10, 0, 0, 3));
            ip.set_destination(to);
            let mut tcp = MutableTcpPacket::new(ip.payload_mut()).unwrap();
            tcp.set_source(4711);
            tcp.set_destination(3306);
            tcp.set_sequence(u32::MAX);
            tcp.set_flags(flags);
            bytes
        };
        let (reset, client) = reset_for(address, &attempt(TcpFlags::SYN, address)).unwrap();
        assert_eq!(client.to_string(), "10.0.0.3:4711");
        let ip = Ipv4Packet::new(&reset).unwrap();
        let tcp = TcpPacket::new(ip.payload()).unwrap();
        assert_eq!((ip.get_source(), tcp.get_source(), tcp.get_destination()), (address, 3306, 4711));
        assert_eq!((tcp.get_flags(), tcp.get_acknowledgement()), (TcpFlags::RST | TcpFlags::ACK, 0));
        for no in [
            attempt(TcpFlags::SYN | TcpFlags::ACK, address),
            attempt(TcpFlags::RST, address),
            attempt(TcpFlags::SYN, Ipv4Addr::new(10, 0, 0, 51)),
            vec![0x45, 0, 0],
            vec![],
        ] {
            assert!(reset_for(address, &no).is_none(), "{no:?}");
        }
    }
}

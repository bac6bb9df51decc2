//! TCP connections on a role address, by the kernel's sock_diag: destroyed before the address goes, so that clients
//! get a reset at once instead of hanging until their own timeout.
//!
//! Listening sockets are never touched: the server goes on serving its other addresses.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel's vocabulary grows, and what is not named is not for us"
)]

use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use rtnetlink::sys::protocols::NETLINK_SOCK_DIAG;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr as KernelAddr, TokioSocket};
use std::io;
use std::net::IpAddr;
use std::time::Duration;
use thiserror::Error;

/// For looking, which changes nothing.
const DEADLINE: Duration = Duration::from_millis(300);

const EOPNOTSUPP: i32 = nix::errno::Errno::EOPNOTSUPP as i32;
const ENOENT: i32 = nix::errno::Errno::ENOENT as i32;

#[derive(Debug, Error)]
pub(crate) enum SocketsError {
    #[error("{tried}: {why}")]
    Io { tried: String, why: io::Error },
    #[error(
        "{tried}: this kernel cannot destroy sockets (it was built without CONFIG_INET_DIAG_DESTROY); clients of a \
         removed address hang until their own timeout"
    )]
    NotSupported { tried: String },
    #[error("{tried}: not ready within {} ms ({done} were ended)", within.as_millis())]
    NoAnswer { tried: String, within: Duration, done: usize },
}

/// Ends every TCP connection whose local address is `ip`, with a reset to the other side. Returns how many. Takes no
/// longer than `within`, and has then ended as many as it could: the address must go, with or without resets.
pub(crate) async fn destroy_on(ip: IpAddr, within: Duration) -> Result<usize, SocketsError> {
    let tried = || format!("ending the TCP connections on {ip}");
    let mut done = 0;
    let work = async {
        let kernel = Kernel::open()?;
        for socket in kernel.list(ip, ends_at_once()).await? {
            done += usize::from(kernel.destroy(socket).await?);
        }
        Ok(())
    };
    match tokio::time::timeout(within, work).await {
        Ok(Ok(())) => Ok(done),
        Ok(Err(e)) => Err(named(tried(), e)),
        Err(_) => Err(SocketsError::NoAnswer { tried: tried(), within, done }),
    }
}

/// Whether this kernel can destroy sockets, found by asking it to destroy one that cannot exist.
pub(crate) async fn can_destroy() -> Result<(), SocketsError> {
    let tried = || "trying whether TCP connections can be ended".to_owned();
    let work = async {
        let mut id = SocketId::new_v4();
        // 192.0.2.0/24 is for documentation (RFC 5737); port 0 is nobody's.
        id.source_address = IpAddr::from([192, 0, 2, 1]);
        id.destination_address = IpAddr::from([192, 0, 2, 2]);
        Kernel::open()?.destroy(Socket { family: AF_INET, id }).await
    };
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(e)) => Err(named(tried(), e)),
        Err(_) => Err(SocketsError::NoAnswer { tried: tried(), within: DEADLINE, done: 0 }),
    }
}

/// Every state that has somebody at the other end. Not: listening, closed, and TIME_WAIT (over already).
fn ends_at_once() -> StateFlags {
    StateFlags::ESTABLISHED
        | StateFlags::SYN_SENT
        | StateFlags::SYN_RECV
        | StateFlags::FIN_WAIT1
        | StateFlags::FIN_WAIT2
        | StateFlags::CLOSE_WAIT
        | StateFlags::LAST_ACK
        | StateFlags::CLOSING
}

fn named(tried: String, why: io::Error) -> SocketsError {
    if why.raw_os_error() == Some(EOPNOTSUPP) {
        SocketsError::NotSupported { tried }
    } else {
        SocketsError::Io { tried, why }
    }
}

struct Socket {
    family: u8,
    id: SocketId,
}

/// One question at a time over one socket of its own, so a late answer can never be taken for another one's.
struct Kernel {
    socket: TokioSocket,
}

impl Kernel {
    fn open() -> io::Result<Kernel> {
        let mut socket = TokioSocket::new(NETLINK_SOCK_DIAG)?;
        socket.socket_mut().bind_auto()?;
        socket.socket_ref().connect(&KernelAddr::new(0, 0))?;
        Ok(Kernel { socket })
    }

    /// IPv4 connections are also looked for among the IPv6 sockets: a server that listens on `::` has them there,
    /// as ::ffff:a.b.c.d.
    async fn list(&self, ip: IpAddr, states: StateFlags) -> io::Result<Vec<Socket>> {
        let mut found = Vec::new();
        for family in [AF_INET, AF_INET6] {
            if family == AF_INET && ip.is_ipv6() {
                continue;
            }
            let socket_id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
            let request = SockDiagMessage::InetRequest(InetRequest {
                family,
                protocol: IPPROTO_TCP,
                extensions: ExtensionFlags::empty(),
                states: states.clone(),
                socket_id,
            });
            self.send(NLM_F_REQUEST | NLM_F_DUMP, request).await?;
            loop {
                let (listed, end) = self.receive().await?;
                let on_it = |id: &SocketId| id.source_address.to_canonical() == ip;
                found.extend(listed.into_iter().filter(on_it).map(|id| Socket { family, id }));
                match end {
                    End::NotYet => {}
                    End::Fine => break,
                    End::Refused(e) => return Err(e),
                }
            }
        }
        Ok(found)
    }

    /// False when the socket was gone before.
    async fn destroy(&self, socket: Socket) -> io::Result<bool> {
        let request = SockDiagDestroy::new(SockDiagMessage::InetRequest(InetRequest {
            family: socket.family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::all(),
            socket_id: socket.id,
        }));
        self.send(NLM_F_REQUEST | NLM_F_ACK, request).await?;
        loop {
            match self.receive().await?.1 {
                End::NotYet => {}
                End::Fine => return Ok(true),
                End::Refused(e) if e.raw_os_error() == Some(ENOENT) => return Ok(false),
                End::Refused(e) => return Err(e),
            }
        }
    }

    async fn send<T>(&self, flags: u16, message: T) -> io::Result<()>
    where
        T: NetlinkSerializable + Into<NetlinkPayload<T>>,
    {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        let mut packet = NetlinkMessage::new(header, message.into());
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes).await.map(|_| ())
    }

    /// One datagram of the kernel's: some sockets, and whether the answer ends with it.
    async fn receive(&self) -> io::Result<(Vec<SocketId>, End)> {
        let (bytes, _) = self.socket.recv_from_full().await?;
        let mut listed = Vec::new();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(io::Error::other)?;
            // Messages begin at multiples of four bytes.
            let length = (message.header.length as usize).next_multiple_of(4).max(4);
            rest = rest.get(length..).unwrap_or_default();
            match message.payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(socket)) => {
                    listed.push(socket.header.socket_id);
                }
                NetlinkPayload::Done(done) if done.code == 0 => return Ok((listed, End::Fine)),
                NetlinkPayload::Done(done) => {
                    return Ok((listed, End::Refused(io::Error::from_raw_os_error(-done.code))));
                }
                NetlinkPayload::Error(e) if e.code.is_none() => return Ok((listed, End::Fine)),
                NetlinkPayload::Error(e) => return Ok((listed, End::Refused(e.to_io()))),
                other => return Err(io::Error::other(format!("unexpected answer {other:?}"))),
            }
        }
        Ok((listed, End::NotYet))
    }
}

enum End {
    NotYet,
    Fine,
    Refused(io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Addresses;
    use crate::testnet::TwoHosts;
    use std::io::{ErrorKind, Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};

    const PORT: u16 = 3306;

    /// Who is connected to `ip`:`port` now: the other ends of its established connections.
    async fn sessions_on(ip: IpAddr, port: u16) -> Result<Vec<SocketAddr>, SocketsError> {
        let tried = || format!("listing the TCP connections on {ip} port {port}");
        let work = async { Kernel::open()?.list(ip, StateFlags::ESTABLISHED).await };
        match tokio::time::timeout(DEADLINE, work).await {
            Ok(Ok(sockets)) => Ok(sockets
                .into_iter()
                .map(|socket| socket.id)
                .filter(|id| id.source_port == port)
                .map(|id| SocketAddr::new(id.destination_address.to_canonical(), id.destination_port))
                .collect()),
            Ok(Err(e)) => Err(named(tried(), e)),
            Err(_) => Err(SocketsError::NoAnswer { tried: tried(), within: DEADLINE, done: 0 }),
        }
    }

    /// Server sockets on the role address and a client's end of each, on the other host.
    async fn connected(hosts: &TwoHosts, role: IpAddr, listen: &str) -> (TcpListener, TcpStream, TcpStream) {
        Addresses::new("eth0").add(role, 60).await.unwrap();
        let listener = TcpListener::bind((listen, PORT)).unwrap();
        let client = hosts.on_there(async || TcpStream::connect((role, PORT)).unwrap());
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(b"hello").unwrap();
        let mut hello = [0; 5];
        (&client).read_exact(&mut hello).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        (listener, server, client)
    }

    fn is_reset(mut client: TcpStream) {
        let end = client.read(&mut [0; 8]).unwrap_err();
        assert_eq!(end.kind(), ErrorKind::ConnectionReset, "{end}");
    }

    // lessons.md 25
    #[test]
    fn clients_of_the_address_are_reset_and_nobody_else() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let cases =
                [("10.77.0.50", "10.77.0.50"), ("10.77.0.50", "::"), ("10.77.0.50", "0.0.0.0"), ("fd77::50", "::")];
            for (role, listen) in cases {
                let role: IpAddr = role.parse().unwrap();
                let (listener, _server, client) = connected(&hosts, role, listen).await;
                let other: IpAddr = if role.is_ipv4() { [10, 77, 0, 1].into() } else { "fd77::1".parse().unwrap() };
                let by_host_address = (listen != "10.77.0.50").then(|| {
                    let client = hosts.on_there(async || TcpStream::connect((other, PORT)).unwrap());
                    (client, listener.accept().unwrap().0)
                });

                let peer = client.local_addr().unwrap();
                assert_eq!(sessions_on(role, PORT).await.unwrap(), [peer], "{role} on {listen}");
                assert_eq!(sessions_on(role, PORT + 1).await.unwrap(), []);
                assert_eq!(destroy_on(role, Duration::from_secs(1)).await.unwrap(), 1, "{role} on {listen}");
                is_reset(client);
                assert_eq!(destroy_on(role, Duration::from_secs(1)).await.unwrap(), 0);

                if let Some((mut client, mut server)) = by_host_address {
                    server.write_all(b"x").unwrap();
                    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                    assert_eq!(client.read(&mut [0; 8]).unwrap(), 1, "the host's own address goes on");
                }
                let again = hosts.on_there(async || TcpStream::connect((role, PORT)));
                assert!(again.is_ok(), "the listening socket is left alone: {again:?}");
            }
        });
    }

    #[test]
    fn many_connections_are_found_and_ended() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let role: IpAddr = [10, 77, 0, 50].into();
            let (listener, _server, _client) = connected(&hosts, role, "0.0.0.0").await;
            let clients: Vec<TcpStream> =
                hosts.on_there(async || (0..100).map(|_| TcpStream::connect((role, PORT)).unwrap()).collect());
            let _servers: Vec<TcpStream> = clients.iter().map(|_| listener.accept().unwrap().0).collect();
            assert_eq!(destroy_on(role, Duration::from_secs(2)).await.unwrap(), 101);
            assert_eq!(sessions_on(role, PORT).await.unwrap(), []);
            for client in clients {
                client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                is_reset(client);
            }
        });
    }

    #[test]
    fn the_kernel_is_asked_whether_it_can() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || can_destroy().await.unwrap());
        let text = named("ending".to_owned(), io::Error::from_raw_os_error(EOPNOTSUPP)).to_string();
        assert!(text.contains("CONFIG_INET_DIAG_DESTROY"), "{text}");
    }
}

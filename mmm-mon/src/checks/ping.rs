//! Does the host's kernel answer? One ICMP socket per address family, shared by all hosts.
//!
//! Only an echo reply that comes from the host itself is "OK". A router's "host unreachable" is an answer too, and must
//! never count as one (surge-ping gives it as `Ok`).

use mmm_common::state::CheckResult;
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use surge_ping::{Client, Config, ICMP, IcmpPacket, PingIdentifier, PingSequence, SurgeError};
use thiserror::Error;
use tokio::time::{Instant, timeout_at};

const PAYLOAD: &[u8] = b"mmm_mond looks whether you live";

#[derive(Debug, Error)]
#[error(
    "no socket for pinging ({family}): {source}. mmm_mond needs the capability CAP_NET_RAW: start it as root, or with \
     AmbientCapabilities=CAP_NET_RAW in its systemd unit"
)]
pub(crate) struct NoSocket {
    family: &'static str,
    source: io::Error,
}

#[derive(Debug)]
pub(crate) struct Pings {
    v4: Family,
    v6: Family,
    identifier: PingIdentifier,
    /// One counter for all, so that two who ping the same address at once do not take each other's reply.
    sequence: AtomicU16,
}

struct Family {
    icmp: ICMP,
    client: Mutex<Option<Client>>,
}

impl std::fmt::Debug for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.icmp)
    }
}

impl Pings {
    /// Needs no right yet; [`Pings::open_for`] does.
    pub(crate) fn new() -> Self {
        let id = u16::try_from(std::process::id() & 0xffff).unwrap_or(1);
        Pings { v4: Family::new(ICMP::V4), v6: Family::new(ICMP::V6), identifier: id.into(), sequence: 0.into() }
    }

    /// Opens the sockets that these addresses need, and keeps those that are open already.
    pub(crate) fn open_for(&self, addresses: &BTreeSet<IpAddr>) -> Result<(), NoSocket> {
        for ip in addresses {
            self.family(*ip).client()?;
        }
        Ok(())
    }

    /// Replaces the socket that is used for this address. Whoever waits on the old one still gets its answer.
    pub(crate) fn renew(&self, ip: IpAddr) -> Result<(), NoSocket> {
        let family = self.family(ip);
        let new = family.open()?;
        *family.lock() = Some(new);
        Ok(())
    }

    /// One echo request. Ends at `deadline` at the latest; `timeout` is only for the text.
    pub(crate) async fn check(&self, ip: IpAddr, deadline: Instant, timeout: Duration) -> CheckResult {
        let client = match self.family(ip).client() {
            Ok(client) => client,
            Err(e) => return CheckResult::Unknown(format!("ping: {e}")),
        };
        let sequence = PingSequence(self.sequence.fetch_add(1, Ordering::Relaxed));
        let mut pinger = client.pinger(ip, self.identifier).await;
        // The deadline outside is the one that counts.
        pinger.timeout(timeout + Duration::from_secs(1));
        match timeout_at(deadline, pinger.ping(sequence, PAYLOAD)).await {
            Err(_) | Ok(Err(SurgeError::Timeout { .. })) => {
                CheckResult::Error(format!("ping: no echo reply from {ip} within {timeout:?}"))
            }
            Ok(Ok((packet, _))) => judge(ip, &packet),
            Ok(Err(SurgeError::IOError(e))) => sending_failed(ip, &e),
            Ok(Err(e)) => CheckResult::Unknown(format!("ping: {ip} could not be pinged: {e}")),
        }
    }

    fn family(&self, ip: IpAddr) -> &Family {
        match ip {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        }
    }
}

impl Family {
    fn new(icmp: ICMP) -> Self {
        Family { icmp, client: Mutex::new(None) }
    }

    fn client(&self) -> Result<Client, NoSocket> {
        let mut client = self.lock();
        match client.as_ref() {
            Some(open) => Ok(open.clone()),
            None => Ok(client.insert(self.open()?).clone()),
        }
    }

    fn open(&self) -> Result<Client, NoSocket> {
        let family = match self.icmp {
            ICMP::V4 => "IPv4",
            ICMP::V6 => "IPv6",
        };
        Client::new(&Config::builder().kind(self.icmp).build()).map_err(|source| NoSocket { family, source })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Client>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn judge(ip: IpAddr, packet: &IcmpPacket) -> CheckResult {
    /// ICMP types of an echo reply (RFC 792, RFC 4443).
    const ECHO_REPLY_V4: u8 = 0;
    const ECHO_REPLY_V6: u8 = 129;
    let (source, is_reply, kind, code) = match packet {
        IcmpPacket::V4(p) => {
            let kind = p.get_icmp_type().0;
            (IpAddr::V4(p.get_source()), kind == ECHO_REPLY_V4, kind, p.get_icmp_code().0)
        }
        IcmpPacket::V6(p) => {
            let kind = p.get_icmpv6_type().0;
            (IpAddr::V6(p.get_source()), kind == ECHO_REPLY_V6, kind, p.get_icmpv6_code().0)
        }
    };
    if is_reply && source == ip {
        CheckResult::Ok(String::new())
    } else {
        CheckResult::Error(format!(
            "ping: {ip} does not answer; {source} says it cannot be reached (ICMP type {kind}, code {code})"
        ))
    }
}

/// No route is a finding; a machine that may not or cannot send has found out nothing.
fn sending_failed(ip: IpAddr, e: &io::Error) -> CheckResult {
    let no_way = [io::ErrorKind::HostUnreachable, io::ErrorKind::NetworkUnreachable, io::ErrorKind::NetworkDown];
    if no_way.contains(&e.kind()) {
        CheckResult::Error(format!("ping: no way to {ip}: {e}"))
    } else {
        CheckResult::Unknown(format!("ping: no echo request could be sent to {ip}: {e}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checks::tests::in_namespace;

    async fn ping(ip: &str, timeout: Duration) -> (CheckResult, Duration) {
        let began = Instant::now();
        let result = Pings::new().check(ip.parse().unwrap(), began + timeout, timeout).await;
        (result, began.elapsed())
    }

    #[tokio::test]
    async fn a_host_that_answers_is_ok_also_by_a_renewed_socket() {
        let pings = Pings::new();
        let me: BTreeSet<IpAddr> = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()].into();
        pings.open_for(&me).unwrap();
        for ip in me {
            let second = Duration::from_secs(1);
            assert_eq!(pings.check(ip, Instant::now() + second, second).await, CheckResult::Ok(String::new()));
            pings.renew(ip).unwrap();
            assert_eq!(pings.check(ip, Instant::now() + second, second).await, CheckResult::Ok(String::new()));
        }
    }

    #[tokio::test]
    async fn many_pings_of_one_address_at_once_all_get_their_own_reply() {
        let pings = std::sync::Arc::new(Pings::new());
        let all: Vec<_> = (0..50)
            .map(|_| {
                let pings = pings.clone();
                tokio::spawn(async move {
                    let second = Duration::from_secs(1);
                    pings.check("127.0.0.1".parse().unwrap(), Instant::now() + second, second).await
                })
            })
            .collect();
        for one in all {
            assert_eq!(one.await.unwrap(), CheckResult::Ok(String::new()));
        }
    }

    #[test]
    fn silence_is_an_error_in_time() {
        in_namespace(
            "checks::ping::tests::inside_silence",
            // Frames for the other address arrive at v1, which is not that machine.
            "ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
             ip addr add 10.99.0.1/24 dev v0; ip neigh add 10.99.0.2 lladdr 02:00:00:00:00:02 dev v0",
        );
    }

    #[tokio::test]
    #[ignore = "run by silence_is_an_error_in_time"]
    async fn inside_silence() {
        let (result, took) = ping("10.99.0.2", Duration::from_millis(300)).await;
        assert_eq!(result, CheckResult::Error("ping: no echo reply from 10.99.0.2 within 300ms".into()));
        assert!((Duration::from_millis(299)..Duration::from_millis(600)).contains(&took), "{took:?}");
    }

    #[test]
    fn a_router_that_says_unreachable_is_not_an_answer() {
        in_namespace(
            "checks::ping::tests::inside_unreachable",
            "unshare -n sleep 20 & other=$!
             trap 'kill $other' EXIT
             i=0; while [ $(readlink /proc/$other/ns/net) = $(readlink /proc/self/ns/net) ]; do
                 i=$((i + 1)); [ $i -lt 500 ]; sleep 0.01; done
             ip link add v0 type veth peer name v1 netns $other
             ip addr add 10.98.0.2/24 dev v0; ip link set v0 up
             nsenter -t $other -n sh -ec 'ip addr add 10.98.0.1/24 dev v1; ip link set v1 up
                 echo 1 >/proc/sys/net/ipv4/ip_forward; ip route add unreachable 10.97.0.0/16'
             ip route add 10.97.0.0/16 via 10.98.0.1",
        );
    }

    #[tokio::test]
    #[ignore = "run by a_router_that_says_unreachable_is_not_an_answer"]
    async fn inside_unreachable() {
        let (result, _) = ping("10.98.0.1", Duration::from_secs(2)).await;
        assert_eq!(result, CheckResult::Ok(String::new()), "the router itself");
        let (result, took) = ping("10.97.0.9", Duration::from_secs(2)).await;
        let why = "ping: 10.97.0.9 does not answer; 10.98.0.1 says it cannot be reached (ICMP type 3, code 1)";
        assert_eq!(result, CheckResult::Error(why.into()));
        assert!(took < Duration::from_secs(1), "{took:?}");
        let (result, _) = ping("192.0.2.1", Duration::from_secs(2)).await;
        assert!(matches!(&result, CheckResult::Error(e) if e.contains("no way to 192.0.2.1")), "{result}");
    }
}

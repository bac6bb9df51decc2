//! Role addresses in the kernel, by rtnetlink: what is there, add with a lifetime, remove, and word of changes.
//!
//! Addresses are compared as parsed values, never as text. Every address is added with a lifetime, so that it leaves
//! by the kernel's hand when this process is stopped or dead. Nothing here waits longer than [`DEADLINE`] for the
//! kernel, and "not on this machine" is never said after a listing that the kernel marked as interrupted.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "the kernel's vocabulary grows, and what is not named is not for us"
)]

use futures_util::StreamExt;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, MulticastGroup};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use thiserror::Error;
use tokio::sync::mpsc::UnboundedSender;

/// The longest wait for one answer of the kernel; the usual one takes some 30 µs.
const DEADLINE: Duration = Duration::from_secs(1);

/// IFA_PROTO of our addresses: `ip address` shows them with `proto 0x6d`. Kernels before 5.18 ignore it.
const OUR_PROTO: u8 = 0x6d;

const EEXIST: i32 = nix::errno::Errno::EEXIST as i32;
const EADDRNOTAVAIL: i32 = nix::errno::Errno::EADDRNOTAVAIL as i32;
const ENODEV: i32 = nix::errno::Errno::ENODEV as i32;

#[derive(Debug, Error)]
pub(crate) enum NetlinkError {
    #[error("opening a netlink socket to {tried}: {why}")]
    Open { tried: String, why: io::Error },
    #[error("the kernel refused to {tried}: {why}")]
    Refused { tried: String, why: io::Error },
    #[error("tried to {tried}: the netlink connection broke ({why})")]
    Broken { tried: String, why: String },
    #[error("tried to {tried}: no answer from the kernel within {} ms", DEADLINE.as_millis())]
    NoAnswer { tried: String },
    #[error("listing addresses: they changed during each of {LISTINGS} listings, so none could be trusted")]
    Unsteady,
    #[error("interface '{0}' does not exist on this host (cluster_interface in the configuration)")]
    NoInterface(String),
    #[error("adding {0}: a lifetime of 0 seconds means it must not be there")]
    NoLifetime(IpAddr),
    #[error("removing {0}: it is still there after {REMOVALS} rounds; something else adds it again")]
    StillThere(IpAddr),
}

/// How often a listing is repeated when addresses changed during it.
const LISTINGS: usize = 5;
/// How often removing starts again when the address is still (or again) there.
const REMOVALS: usize = 3;

/// The addresses of this machine, and the one interface on which role addresses are put.
#[derive(Clone)]
pub(crate) struct Addresses {
    interface: String,
    /// Kept open; thrown away when an answer failed to come, because a late one would be taken for the next.
    handle: Arc<Mutex<Option<Handle>>>,
}

/// The cluster interface as it is now. Looked up every time: an interface that was made anew has a new index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    /// None for an interface that is not Ethernet (loopback, tunnels).
    pub(crate) mac: Option<[u8; 6]>,
    /// Set up and with a carrier.
    pub(crate) up: bool,
}

/// One address as the kernel lists it.
#[derive(Clone, Debug)]
struct Found {
    ip: IpAddr,
    message: AddressMessage,
}

impl Addresses {
    pub(crate) fn new(interface: &str) -> Self {
        Addresses { interface: interface.to_owned(), handle: Arc::new(Mutex::new(None)) }
    }

    pub(crate) fn interface(&self) -> &str {
        &self.interface
    }

    /// Which of these are on this machine, on whatever interface and with whatever prefix.
    pub(crate) async fn present(&self, wanted: &BTreeSet<IpAddr>) -> Result<BTreeSet<IpAddr>, NetlinkError> {
        Ok(self.list().await?.into_iter().map(|found| found.ip).filter(|ip| wanted.contains(ip)).collect())
    }

    /// Which of these an agent has put on this machine: they carry its mark.
    pub(crate) async fn marked(&self, wanted: &BTreeSet<IpAddr>) -> Result<BTreeSet<IpAddr>, NetlinkError> {
        let found = self.list().await?.into_iter();
        Ok(found.filter(|f| wanted.contains(&f.ip) && f.is_marked()).map(|f| f.ip).collect())
    }

    /// Which of these are on this machine without an end of their lifetime: not put there by an agent, and nothing
    /// would take them away in time.
    pub(crate) async fn endless(&self, wanted: &BTreeSet<IpAddr>) -> Result<BTreeSet<IpAddr>, NetlinkError> {
        let found = self.list().await?.into_iter();
        Ok(found.filter(|f| wanted.contains(&f.ip) && f.is_endless()).map(|f| f.ip).collect())
    }

    /// How long the kernel still keeps these, of those that are here and have a lifetime, in whole seconds rounded up; of
    /// one that is here several times the shortest.
    pub(crate) async fn lifetimes(
        &self,
        wanted: &BTreeSet<IpAddr>,
    ) -> Result<BTreeMap<IpAddr, Duration>, NetlinkError> {
        let mut lifetimes = BTreeMap::new();
        for found in self.list().await?.into_iter().filter(|f| wanted.contains(&f.ip)) {
            if let Some(valid) = found.valid_s() {
                let valid = Duration::from_secs(valid.into());
                lifetimes
                    .entry(found.ip)
                    .and_modify(|before: &mut Duration| *before = valid.min(*before))
                    .or_insert(valid);
            }
        }
        Ok(lifetimes)
    }

    /// Puts the address on the cluster interface with a lifetime, or refreshes the lifetime when it is there. The same
    /// address elsewhere (another interface, another prefix) is removed afterwards: it would outlive the lease.
    ///
    /// Works on an interface without a carrier too; the announcer speaks up when the carrier comes back.
    pub(crate) async fn add(&self, ip: IpAddr, lifetime_s: u32) -> Result<(), NetlinkError> {
        if lifetime_s == 0 {
            return Err(NetlinkError::NoLifetime(ip));
        }
        let link = self.link().await?;
        let tried = format!("add {ip} to {} for {lifetime_s} s", self.interface);
        let message = RouteNetlinkMessage::NewAddress(ours(ip, link.index, lifetime_s));
        self.change(&tried, message, NLM_F_CREATE | NLM_F_REPLACE, EEXIST).await?;
        for stray in self.list().await?.into_iter().filter(|f| f.ip == ip && !f.is_at(link.index)) {
            tracing::warn!(%ip, index = stray.message.header.index, prefix = stray.message.header.prefix_len,
                "role address was also there without a lifetime of ours; removing that one");
            self.delete(&stray).await?;
        }
        Ok(())
    }

    /// Removes the address wherever it is on this machine, and looks again. Not being there is success.
    pub(crate) async fn remove(&self, ip: IpAddr) -> Result<(), NetlinkError> {
        for _ in 0..REMOVALS {
            let there: Vec<Found> = self.list().await?.into_iter().filter(|f| f.ip == ip).collect();
            if there.is_empty() {
                return Ok(());
            }
            for found in &there {
                self.delete(found).await?;
            }
        }
        if self.list().await?.iter().any(|f| f.ip == ip) { Err(NetlinkError::StillThere(ip)) } else { Ok(()) }
    }

    /// The cluster interface.
    pub(crate) async fn link(&self) -> Result<Link, NetlinkError> {
        let tried = format!("look up interface {}", self.interface);
        let handle = self.handle(&tried)?;
        let name = self.interface.clone();
        let answer = async move {
            let mut links = handle.link().get().match_name(name).execute();
            links.next().await.transpose()
        };
        match self.within(&tried, answer).await? {
            Ok(Some(message)) => Ok(Link::from(&message)),
            Ok(None) => Err(NetlinkError::NoInterface(self.interface.clone())),
            Err(rtnetlink::Error::NetlinkError(e)) if -e.raw_code() == ENODEV => {
                Err(NetlinkError::NoInterface(self.interface.clone()))
            }
            Err(e) => Err(self.failed(tried, e)),
        }
    }

    async fn delete(&self, found: &Found) -> Result<(), NetlinkError> {
        let header = &found.message.header;
        let mut message = AddressMessage::default();
        message.header.family = header.family;
        message.header.prefix_len = header.prefix_len;
        message.header.index = header.index;
        message.attributes = found
            .message
            .attributes
            .iter()
            .filter(|a| matches!(a, AddressAttribute::Local(_) | AddressAttribute::Address(_)))
            .cloned()
            .collect();
        let tried = format!("remove {}/{} from interface {}", found.ip, header.prefix_len, header.index);
        self.change(&tried, RouteNetlinkMessage::DelAddress(message), 0, EADDRNOTAVAIL).await
    }

    /// Sends one change and waits for its acknowledgement. `fine`: the errno that means it is so already.
    async fn change(
        &self,
        tried: &str,
        message: RouteNetlinkMessage,
        flags: u16,
        fine: i32,
    ) -> Result<(), NetlinkError> {
        let mut handle = self.handle(tried)?;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let answer = async move {
            let mut answers = handle.request(request)?;
            while let Some(answer) = answers.next().await {
                if let NetlinkPayload::Error(e) = answer.payload {
                    return if e.code.is_some() { Err(rtnetlink::Error::NetlinkError(e)) } else { Ok(()) };
                }
            }
            Err(rtnetlink::Error::RequestFailed)
        };
        match self.within(tried, answer).await? {
            Ok(()) => Ok(()),
            Err(rtnetlink::Error::NetlinkError(e)) if -e.raw_code() == fine => Ok(()),
            Err(e) => Err(self.failed(tried.to_owned(), e)),
        }
    }

    /// Every address of the machine, from a listing during which nothing changed.
    async fn list(&self) -> Result<Vec<Found>, NetlinkError> {
        let tried = "list the addresses of this machine";
        for _ in 0..LISTINGS {
            let mut handle = self.handle(tried)?;
            let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetAddress(AddressMessage::default()));
            request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
            let answer = async move {
                let mut found = Vec::new();
                let mut interrupted = false;
                let mut answers = handle.request(request)?;
                while let Some(answer) = answers.next().await {
                    interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
                    match answer.payload {
                        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(message)) => {
                            found.extend(Found::from(message));
                        }
                        NetlinkPayload::Done(done) if done.code == 0 => return Ok((found, interrupted)),
                        NetlinkPayload::Error(e) => return Err(rtnetlink::Error::NetlinkError(e)),
                        other => return Err(rtnetlink::Error::InvalidNla(format!("unexpected answer {other:?}"))),
                    }
                }
                Err(rtnetlink::Error::RequestFailed)
            };
            match self.within(tried, answer).await? {
                Ok((found, false)) => return Ok(found),
                Ok((_, true)) => {}
                Err(e) => return Err(self.failed(tried.to_owned(), e)),
            }
        }
        Err(NetlinkError::Unsteady)
    }

    fn handle(&self, tried: &str) -> Result<Handle, NetlinkError> {
        let mut kept = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = kept.as_ref() {
            return Ok(handle.clone());
        }
        let (mut connection, handle, _) =
            rtnetlink::new_connection().map_err(|why| NetlinkError::Open { tried: tried.to_owned(), why })?;
        // Without these the end of an answer and the death of the connection look the same, and a listing cut short
        // would pass for a whole one.
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        // Ends by itself when the last handle is dropped.
        tokio::spawn(connection);
        *kept = Some(handle.clone());
        Ok(handle)
    }

    async fn within<T>(&self, tried: &str, answer: impl Future<Output = T>) -> Result<T, NetlinkError> {
        match tokio::time::timeout(DEADLINE, answer).await {
            Ok(answer) => Ok(answer),
            Err(_) => {
                self.forget();
                Err(NetlinkError::NoAnswer { tried: tried.to_owned() })
            }
        }
    }

    fn failed(&self, tried: String, error: rtnetlink::Error) -> NetlinkError {
        if let rtnetlink::Error::NetlinkError(e) = &error {
            return NetlinkError::Refused { tried, why: e.to_io() };
        }
        self.forget();
        NetlinkError::Broken { tried, why: error.to_string() }
    }

    fn forget(&self) {
        *self.handle.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Found {
    /// IFA_LOCAL is the machine's own address; IFA_ADDRESS is the peer's where both are given.
    fn from(message: AddressMessage) -> Option<Found> {
        let mut local = None;
        let mut address = None;
        for attribute in &message.attributes {
            if let AddressAttribute::Local(ip) = attribute {
                local = Some(*ip);
            } else if let AddressAttribute::Address(ip) = attribute {
                address = Some(*ip);
            }
        }
        local.or(address).map(|ip| Found { ip, message })
    }

    fn is_marked(&self) -> bool {
        self.message.attributes.contains(&AddressAttribute::Protocol(AddressProtocol::Other(OUR_PROTO)))
    }

    fn is_endless(&self) -> bool {
        self.valid_s().is_none()
    }

    /// None: for ever.
    fn valid_s(&self) -> Option<u32> {
        self.message.attributes.iter().find_map(|a| match a {
            AddressAttribute::CacheInfo(c) if c.ifa_valid != u32::MAX => Some(c.ifa_valid),
            _ => None,
        })
    }

    /// Exactly where and how [`Addresses::add`] puts it.
    fn is_at(&self, index: u32) -> bool {
        self.message.header.index == index
            && self.message.header.prefix_len == host_prefix(self.ip)
            && self.message.attributes.contains(&AddressAttribute::Address(self.ip))
    }
}

impl From<&LinkMessage> for Link {
    fn from(message: &LinkMessage) -> Link {
        let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
        let mac = message.attributes.iter().find_map(|a| match a {
            LinkAttribute::Address(bytes) if ethernet => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            _ => None,
        });
        let up = message.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp);
        Link { index: message.header.index, mac, up }
    }
}

fn host_prefix(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn ours(ip: IpAddr, index: u32, lifetime_s: u32) -> AddressMessage {
    let mut lifetime = CacheInfo::default();
    lifetime.ifa_valid = lifetime_s;
    lifetime.ifa_preferred = lifetime_s;
    let mut message = AddressMessage::default();
    message.header.family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.prefix_len = host_prefix(ip);
    message.header.scope = AddressScope::Universe;
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(ip),
        AddressAttribute::Address(ip),
        AddressAttribute::CacheInfo(lifetime),
        AddressAttribute::Protocol(AddressProtocol::Other(OUR_PROTO)),
    ];
    if ip.is_ipv6() {
        // Without this the address is unusable for about a second (duplicate address detection). Two holders are
        // kept apart by leases, not by the network.
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

/// What the kernel announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A role address came or went, or some announcements were lost.
    Addresses,
    /// The cluster interface has a carrier again (or is a new one).
    LinkUp,
    LinkDown,
}

/// Tells of every change of a role address or of the cluster interface from the moment this returns, until nobody
/// listens any more. Refreshed lifetimes are no changes.
pub(crate) fn watch(
    interface: &str,
    roles: BTreeSet<IpAddr>,
    changes: UnboundedSender<Change>,
) -> Result<(), NetlinkError> {
    let mut watcher = Watcher { interface: interface.to_owned(), roles, here: BTreeSet::new(), link: None };
    let mut messages = subscribe()?;
    tokio::spawn(async move {
        loop {
            while let Some((message, _)) = messages.next().await {
                for change in watcher.read(message) {
                    if changes.send(change).is_err() {
                        return;
                    }
                }
            }
            tracing::warn!("the kernel's announcements of address changes ended; listening anew");
            messages = loop {
                match subscribe() {
                    Ok(messages) => break messages,
                    Err(e) => tracing::error!("cannot listen for address changes, trying again in 1 s: {e}"),
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
                if changes.is_closed() {
                    return;
                }
            };
            watcher.here.clear();
            if changes.send(Change::Addresses).is_err() {
                return;
            }
        }
    });
    Ok(())
}

type Messages =
    futures_util::stream::BoxStream<'static, (NetlinkMessage<RouteNetlinkMessage>, rtnetlink::sys::SocketAddr)>;

fn subscribe() -> Result<Messages, NetlinkError> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, handle, messages) = rtnetlink::new_multicast_connection(&groups)
        .map_err(|why| NetlinkError::Open { tried: "hear of address changes".to_owned(), why })?;
    tokio::spawn(connection);
    // The connection ends with its last handle, so the stream keeps it.
    Ok(messages
        .map(move |message| {
            let _ = &handle;
            message
        })
        .boxed())
}

struct Watcher {
    interface: String,
    roles: BTreeSet<IpAddr>,
    /// Role addresses known to be there, by interface: the kernel announces a refreshed lifetime like a new address.
    here: BTreeSet<(u32, IpAddr)>,
    link: Option<Link>,
}

impl Watcher {
    fn read(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) -> Vec<Change> {
        match message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(m)) => {
                let index = m.header.index;
                let role = Found::from(m).filter(|f| self.roles.contains(&f.ip));
                if role.is_some_and(|f| self.here.insert((index, f.ip))) { vec![Change::Addresses] } else { vec![] }
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelAddress(m)) => {
                let index = m.header.index;
                let Some(f) = Found::from(m).filter(|f| self.roles.contains(&f.ip)) else { return vec![] };
                self.here.remove(&(index, f.ip));
                vec![Change::Addresses]
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(m)) if self.is_cluster_interface(&m) => {
                self.link_is(Some(Link::from(&m)))
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(m)) if self.is_cluster_interface(&m) => {
                self.link_is(None)
            }
            // The socket's buffer was too small for a burst: anything may have been in what is lost.
            NetlinkPayload::Overrun(_) => {
                self.here.clear();
                vec![Change::Addresses]
            }
            _ => vec![],
        }
    }

    fn is_cluster_interface(&self, message: &LinkMessage) -> bool {
        message.attributes.iter().any(|a| matches!(a, LinkAttribute::IfName(name) if *name == self.interface))
    }

    fn link_is(&mut self, link: Option<Link>) -> Vec<Change> {
        if link == self.link {
            return vec![];
        }
        self.link = link;
        match link {
            Some(link) if link.up => vec![Change::LinkUp],
            Some(_) | None => vec![Change::LinkDown],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testnet::{TwoHosts, ip};
    use std::time::Instant;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    fn set(ips: &[&str]) -> BTreeSet<IpAddr> {
        ips.iter().map(|ip| ip.parse().unwrap()).collect()
    }

    fn one(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    async fn next(changes: &mut UnboundedReceiver<Change>) -> Change {
        tokio::time::timeout(Duration::from_secs(5), changes.recv()).await.expect("no change within 5 s").unwrap()
    }

    // lessons.md 1
    #[test]
    fn an_address_leaves_by_the_kernels_hand() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            for role in ["10.77.0.50", "fd77::50"] {
                let roles = set(&[role]);
                let (sender, mut changes) = unbounded_channel();
                watch("eth0", roles.clone(), sender).unwrap();
                let addresses = Addresses::new("eth0");
                let start = Instant::now();
                addresses.add(one(role), 1).await.unwrap();
                assert_eq!(addresses.present(&roles).await.unwrap(), roles);
                assert_eq!(addresses.marked(&roles).await.unwrap(), roles, "it can be told from one added by hand");
                assert_eq!(next(&mut changes).await, Change::Addresses, "it came");
                assert_eq!(next(&mut changes).await, Change::Addresses, "it went");
                let after = start.elapsed();
                assert_eq!(addresses.present(&roles).await.unwrap(), set(&[]), "{role}");
                assert!(after >= Duration::from_millis(900) && after < Duration::from_millis(2200), "{role} {after:?}");
            }
        });
    }

    #[test]
    fn a_refreshed_address_stays_and_that_is_no_change() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let roles = set(&["10.77.0.50", "fd77::50"]);
            let (sender, mut changes) = unbounded_channel();
            watch("eth0", roles.clone(), sender).unwrap();
            let addresses = Addresses::new("eth0");
            for round in 0..4 {
                for ip in &roles {
                    addresses.add(*ip, 2).await.unwrap();
                }
                tokio::time::sleep(Duration::from_millis(1200)).await;
                assert_eq!(addresses.present(&roles).await.unwrap(), roles, "round {round}");
            }
            assert_eq!(next(&mut changes).await, Change::Addresses);
            assert_eq!(next(&mut changes).await, Change::Addresses);
            assert!(changes.try_recv().is_err(), "only the two that came");
        });
    }

    // lessons.md 24
    #[test]
    fn an_address_is_no_piece_of_text() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let addresses = Addresses::new("eth0");
            addresses.add(one("110.0.0.1"), 60).await.unwrap();
            addresses.add(one("10.0.0.15"), 60).await.unwrap();
            addresses.add(one("fd77::10:1"), 60).await.unwrap();
            let lookalikes = set(&["10.0.0.1", "110.0.0.15", "fd77::10", "fd77::0:1:1"]);
            assert_eq!(addresses.present(&lookalikes).await.unwrap(), set(&[]));
            addresses.remove(one("10.0.0.1")).await.unwrap();
            let real = set(&["110.0.0.1", "10.0.0.15", "fd77::10:1"]);
            assert_eq!(addresses.present(&real).await.unwrap(), real);
        });
    }

    #[test]
    fn an_address_elsewhere_is_found_taken_over_and_removed() {
        let Some(hosts) = TwoHosts::new() else { return };
        let here = &hosts.here;
        hosts.on_here(async || {
            let addresses = Addresses::new("eth0");
            let role = one("10.77.0.60");
            let roles = BTreeSet::from([role]);
            let show = || ip(&format!("-n {here} address show to 10.77.0.60"));
            addresses.remove(role).await.expect("not being there is success");

            ip(&format!("-n {here} address add 10.77.0.60/24 dev lo"));
            ip(&format!("-n {here} address add 10.77.0.60/24 dev eth0"));
            assert_eq!(addresses.endless(&roles).await.unwrap(), roles);
            addresses.add(role, 60).await.unwrap();
            let after = show();
            assert!(after.contains("inet 10.77.0.60/32"), "{after}");
            assert_eq!(after.matches("inet ").count(), 1, "only ours is left: {after}");
            assert_eq!(addresses.endless(&roles).await.unwrap(), set(&[]));
            let ours = addresses.list().await.unwrap().into_iter().find(|f| f.ip == role).unwrap();
            let proto = AddressAttribute::Protocol(AddressProtocol::Other(OUR_PROTO));
            assert!(ours.message.attributes.contains(&proto), "{ours:?}");

            ip(&format!("-n {here} address add 10.77.0.60/24 dev lo"));
            addresses.remove(role).await.unwrap();
            assert_eq!(show(), "");
            assert_eq!(
                addresses.present(&set(&["10.77.0.1"])).await.unwrap(),
                set(&["10.77.0.1"]),
                "nothing else went"
            );
        });
    }

    #[test]
    fn a_link_that_is_down_takes_addresses_and_is_reported() {
        let Some(hosts) = TwoHosts::new() else { return };
        let here = &hosts.here;
        hosts.on_here(async || {
            let addresses = Addresses::new("eth0");
            let (sender, mut changes) = unbounded_channel();
            watch("eth0", set(&[]), sender).unwrap();
            assert!(addresses.link().await.unwrap().up);
            ip(&format!("-n {here} link set eth0 down"));
            assert_eq!(next(&mut changes).await, Change::LinkDown);
            assert!(!addresses.link().await.unwrap().up);
            let role = one("10.77.0.50");
            addresses.add(role, 60).await.unwrap();
            assert!(addresses.present(&BTreeSet::from([role])).await.unwrap().contains(&role));
            ip(&format!("-n {here} link set eth0 up"));
            while next(&mut changes).await != Change::LinkUp {}
            assert!(addresses.link().await.unwrap().up);
        });
    }

    #[test]
    fn errors_say_what_was_tried() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let missing = Addresses::new("eth7").add(one("10.77.0.50"), 3).await.unwrap_err().to_string();
            assert!(missing.contains("'eth7' does not exist"), "{missing}");
            let zero = Addresses::new("eth0").add(one("10.77.0.50"), 0).await.unwrap_err().to_string();
            assert!(zero.contains("lifetime of 0 seconds"), "{zero}");
            let bad = Addresses::new("eth0").add(one("::"), 3).await.map_err(|e| e.to_string());
            assert!(bad.as_ref().is_err_and(|e| e.contains("add :: to eth0 for 3 s")), "{bad:?}");
        });
    }
}

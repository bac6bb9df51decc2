//! Who answers on the wire: from the clients' host, an ARP request for every role address each 50 ms. Two machines that
//! answer the same request are two holders, whatever their own kernels list.
//!
//! Announcements are not counted: only what answers the request itself, addressed to the one who asked.

use super::Timeline;
use super::holders::roles;
use crate::lab::Lab;
use crate::lab::network::{APP, DB, WRITER, ip_of};
use crate::lab::process::within;
use anyhow::{Context as _, Result, anyhow};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use pnet_datalink::{Channel, ChannelType, Config, MacAddr, NetworkInterface};
use pnet_packet::Packet as _;
use pnet_packet::arp::{ArpHardwareTypes, ArpOperations, ArpPacket, MutableArpPacket};
use pnet_packet::ethernet::{EtherTypes, EthernetPacket, MutableEthernetPacket};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::os::fd::IntoRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_millis(50);

#[derive(Clone, Debug, Default)]
pub(super) struct Heard {
    pub(super) rounds: u64,
    /// Rounds in which somebody answered for the writer address.
    pub(super) writer_answered: u64,
    /// One sentence for each round with two answers.
    pub(super) doubled: Vec<String>,
}

/// Asks until told to stop.
pub(super) fn probe(lab: &Lab, stop: &AtomicBool, timeline: &Timeline) -> Result<Heard> {
    let mut names = BTreeMap::new();
    for host in DB {
        let mac = within(&lab.network().netns(host), eth0)??.mac.context("eth0 without a MAC")?;
        names.insert(mac.octets(), host);
    }
    within(&lab.network().netns(APP), || inside(&names, stop, timeline))?
}

fn eth0() -> Result<NetworkInterface> {
    let found = pnet_datalink::interfaces().into_iter().find(|i| i.name == "eth0");
    found.context("there is no eth0 in this namespace")
}

fn inside(names: &BTreeMap<[u8; 6], &'static str>, stop: &AtomicBool, timeline: &Timeline) -> Result<Heard> {
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
        return Err(anyhow!("not an Ethernet channel"));
    };
    let mut heard = Heard::default();
    let mut before: BTreeMap<Ipv4Addr, BTreeSet<[u8; 6]>> = BTreeMap::new();
    while !stop.load(Ordering::Relaxed) {
        let end = Instant::now() + EVERY;
        for ip in roles() {
            if let Some(Err(e)) = sender.send_to(&request(mac, own, ip), None) {
                timeline.note(format!("the ARP probe cannot send: {e}"));
            }
        }
        let mut answers: BTreeMap<Ipv4Addr, BTreeSet<[u8; 6]>> = BTreeMap::new();
        while Instant::now() < end {
            // An error is the read's time limit.
            let Ok(frame) = receiver.next() else { continue };
            if let Some((ip, mac)) = answer(frame, own) {
                answers.entry(ip).or_default().insert(mac);
            }
        }
        heard.rounds += 1;
        for ip in roles() {
            let now = answers.remove(&ip).unwrap_or_default();
            let shown: Vec<String> = now
                .iter()
                .map(|mac| names.get(mac).map_or_else(|| format!("{mac:x?}"), |host| (*host).to_owned()))
                .collect();
            if ip == WRITER && !now.is_empty() {
                heard.writer_answered += 1;
            }
            if now.len() > 1 {
                heard.doubled.push(format!("{ip} answered by {} at {}", shown.join(" and "), timeline.at(end)));
            }
            if now.len() > 1 && before.get(&ip) != Some(&now) {
                timeline.say(format!("TWO ANSWERS ON THE WIRE: {ip} by {}", shown.join(" and ")));
            }
            before.insert(ip, now);
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

/// Whose address, and the MAC that answers for it to us.
fn answer(frame: &[u8], own: Ipv4Addr) -> Option<(Ipv4Addr, [u8; 6])> {
    let ethernet = EthernetPacket::new(frame)?;
    let arp = ArpPacket::new(ethernet.payload())?;
    let to_us = ethernet.get_ethertype() == EtherTypes::Arp
        && arp.get_operation() == ArpOperations::Reply
        && arp.get_target_proto_addr() == own;
    to_us.then(|| (arp.get_sender_proto_addr(), arp.get_sender_hw_addr().octets()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_to_the_one_who_asked_counts() {
        let (own, ip) = (Ipv4Addr::new(10, 77, 0, 3), Ipv4Addr::new(10, 77, 0, 50));
        let (mac, holder) = (MacAddr::new(2, 0, 0, 0, 0, 3), MacAddr::new(2, 0, 0, 0, 0, 11));
        let mut frame = request(mac, own, ip);
        assert_eq!(answer(&frame, own), None, "a request is no answer");
        let mut arp = MutableArpPacket::new(&mut frame[14..]).unwrap();
        arp.set_operation(ArpOperations::Reply);
        arp.set_sender_hw_addr(holder);
        arp.set_sender_proto_addr(ip);
        arp.set_target_proto_addr(own);
        assert_eq!(answer(&frame, own), Some((ip, holder.octets())));
        // The gratuitous form, with which a new holder announces itself to all.
        MutableArpPacket::new(&mut frame[14..]).unwrap().set_target_proto_addr(ip);
        assert_eq!(answer(&frame, own), None);
    }
}

//! The proof at the start that this kernel does what the guard is for: packets for an address that nobody else has pass
//! while its element lives, and not after it. Over `lo`, so nothing leaves the machine.
//!
//! ARP cannot be tried without a second machine (`lo` does none); its chains are read back instead, see
//! [`super::table::read_back`]. The real thing is tried in the tests.

use super::wire::Kernel;
use super::{in_words, table};
use crate::clock;
use crate::netlink::Addresses;
use nix::errno::Errno;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU64;
use std::time::Duration;
use tokio::net::UdpSocket;
use tokio::time::{sleep, timeout};

/// IPv4: 127/8 is on `lo` of every machine as a whole and on no network (RFC 1122, 3.2.1.3), so the address has not
/// even to be added. IPv6 has only one such address, which others use; this one is from the prefix that is for throwing
/// away and goes nowhere (RFC 6666), and is on `lo` for the time of the proof.
pub(super) const FOR: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(127, 109, 109, 109)),
    IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0x6d6d, 0x6d5f, 0x6775, 0x6172)),
];

const SHORT_MS: u64 = 20;
/// For a machine that is very busy at this moment.
const LONG_MS: u64 = 10_000;
/// The kernel's longest (CONFIG_HZ=100).
const TICK_MS: u64 = 10;
/// How long after its end an element may still let something pass.
const GRACE_MS: u64 = 50;
/// For a packet that should arrive.
const ARRIVES: Duration = Duration::from_secs(2);
/// For one that should not: over `lo` it arrives within the sending of it.
const LOST: Duration = Duration::from_millis(10);

/// Seconds. Leaves by itself when this process does not come to remove it.
const LIFETIME_S: u32 = 5;

pub(super) async fn prove(kernel: &Kernel, proof: IpAddr) -> Result<(), String> {
    if proof.is_ipv4() {
        return try_it(kernel, proof).await;
    }
    let lo = Addresses::new("lo");
    let put = |e| format!("proving the guard for IPv6: {e}");
    lo.add(proof, LIFETIME_S).await.map_err(put)?;
    let proved = try_it(kernel, proof).await;
    lo.remove(proof).await.map_err(put)?;
    proved
}

async fn try_it(kernel: &Kernel, proof: IpAddr) -> Result<(), String> {
    let arm = |ms| {
        table::set_alive(kernel, proof, NonZeroU64::new(ms), false).map_err(|e| in_words(&format!("arm {proof}"), &e))
    };
    expect(proof, false, "before it was allowed").await?;
    // Re-armed longer, and then shorter, than before: some kernels leave the timeout of what is there as it is.
    arm(SHORT_MS)?;
    arm(LONG_MS)?;
    sleep(Duration::from_millis(SHORT_MS + TICK_MS)).await;
    expect(proof, true, "while it was allowed").await?;
    arm(SHORT_MS)?;
    let latest = clock::now() + Duration::from_millis(SHORT_MS + GRACE_MS);
    while clock::now() < latest && passes(other_than(proof), proof, LOST).await.unwrap_or(false) {
        sleep(Duration::from_millis(2)).await;
    }
    expect(proof, false, "after its time was over").await?;
    arm(LONG_MS)?;
    expect(proof, true, "while it was allowed again").await?;
    table::set_alive(kernel, proof, None, false).map_err(|e| in_words(&format!("close {proof}"), &e))?;
    expect(proof, false, "after it was closed").await
}

/// To the address, and from it.
async fn expect(proof: IpAddr, pass: bool, when: &str) -> Result<(), String> {
    let other = other_than(proof);
    for (from, to) in [(other, proof), (proof, other)] {
        let passed = passes(from, to, if pass { ARRIVES } else { LOST })
            .await
            .map_err(|e| format!("proving the guard with a packet from {from} to {to} on lo: {e}; is lo up?"))?;
        if passed != pass {
            return Err(format!(
                "the guard does not work here: a packet from {from} to {to} on lo {} {when}{}",
                if passed { "passed" } else { "did not pass" },
                if pass { "; does another firewall stop it?" } else { "" }
            ));
        }
    }
    Ok(())
}

fn other_than(proof: IpAddr) -> IpAddr {
    if proof.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}

async fn passes(from: IpAddr, to: IpAddr, within: Duration) -> io::Result<bool> {
    let receiver = UdpSocket::bind((to, 0)).await?;
    let sender = UdpSocket::bind((from, 0)).await?;
    match sender.send_to(b"mmm_guard", receiver.local_addr()?).await {
        // What is dropped on its way out is refused to the sender.
        Err(e) if e.raw_os_error() == Some(Errno::EPERM as i32) => return Ok(false),
        sent => sent?,
    };
    match timeout(within, receiver.recv(&mut [0; 16])).await {
        Ok(received) => received.map(|_| true),
        Err(_) => Ok(false),
    }
}

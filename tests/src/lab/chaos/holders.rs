//! Who has which role address, and which server is writable, seen from outside of the daemons: each host's kernel is
//! asked over a netlink socket that was opened inside its namespace, and each server over its unix socket. No cut of
//! the network hides anything from it.
//!
//! It starts a program to look only when two hosts have an address (nft: does the exact guard let both answer?), never waits for a hanging server longer than its time limit, and counts as blind
//! every moment between two looks.

use super::Timeline;
use crate::lab::Lab;
use crate::lab::network::{DB, READERS, WRITER, answering};
use crate::lab::process::within;
use crate::lab::server::Dialect;
use anyhow::{Context as _, Result, bail};
use mysql_async::prelude::Queryable as _;
use mysql_async::{Conn, OptsBuilder, Row};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket,
};
use nix::sys::time::TimeVal;
use serde::Serialize;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks at all kernels.
const PAUSE: Duration = Duration::from_millis(2);
/// A longer time without a look is blind time.
pub(super) const BLIND: Duration = Duration::from_millis(10);
/// Between two questions to a server.
const ASK: Duration = Duration::from_millis(25);
const ANSWER: Duration = Duration::from_millis(400);

pub(super) fn roles() -> Vec<Ipv4Addr> {
    [WRITER].into_iter().chain(READERS).collect()
}

// ---- addresses ---------------------------------------------------------------------------------------------------

/// One address on several hosts, from the first look that saw it to the last.
#[derive(Clone, Debug)]
pub(super) struct Doubled {
    pub(super) ip: Ipv4Addr,
    pub(super) hosts: Vec<&'static str>,
    pub(super) from: Instant,
    pub(super) until: Instant,
    pub(super) looks: u64,
    /// Looks at which all of its holders were writable.
    pub(super) all_writable: u64,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Looked {
    pub(super) looks: u64,
    /// How many times between two looks took so many tenths of a millisecond; the last one counts all longer ones.
    gaps: Vec<u64>,
    pub(super) longest_gap: Duration,
    /// All gaps above [`BLIND`] together.
    pub(super) blind: Duration,
    pub(super) doubled: Vec<Doubled>,
    /// Who had the writer address from when on.
    pub(super) writer: Vec<(Instant, Vec<&'static str>)>,
    /// Looks at which two servers were writable, wherever the address was.
    pub(super) two_writable: u64,
}

impl Looked {
    fn gap(&mut self, gap: Duration) {
        const LAST: usize = 1000;
        self.gaps.resize(LAST + 1, 0);
        let tenths = usize::try_from(gap.as_micros() / 100).unwrap_or(LAST);
        self.gaps[tenths.min(LAST)] += 1;
        self.longest_gap = self.longest_gap.max(gap);
        if gap > BLIND {
            self.blind += gap;
        }
    }

    /// In milliseconds; `share` of all gaps are shorter.
    pub(super) fn gap_at(&self, share: f64) -> f64 {
        let all: u64 = self.gaps.iter().sum();
        let mut seen = 0;
        for (tenths, n) in self.gaps.iter().enumerate() {
            seen += n;
            if seen as f64 >= all as f64 * share {
                return (tenths + 1) as f64 / 10.0;
            }
        }
        f64::INFINITY
    }

    /// The hosts that had the writer address at any time between the two.
    pub(super) fn writers_between(&self, from: Instant, until: Instant) -> BTreeSet<&'static str> {
        let before = self.writer.iter().rev().find(|(at, _)| *at <= from).into_iter();
        let during = self.writer.iter().filter(|(at, _)| *at > from && *at <= until);
        before.chain(during).flat_map(|(_, hosts)| hosts.iter().copied()).collect()
    }
}

/// Looks until told to stop. `last_writer` is kept at the index in [`DB`] of the latest single holder.
pub(super) fn look(
    lab: &Lab,
    stop: &AtomicBool,
    servers: &[ServerState; 3],
    last_writer: &AtomicU8,
    timeline: &Timeline,
) -> Result<Looked> {
    let mut kernels = Vec::new();
    for host in DB {
        kernels.push(Kernel::open(lab, host)?);
    }
    let roles = roles();
    let mut seen = Looked::default();
    let mut before: Vec<Vec<&'static str>> = vec![Vec::new(); roles.len()];
    let mut last: Option<Instant> = None;
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        if let Some(last) = last {
            seen.gap(now - last);
        }
        last = Some(now);
        let mut there = Vec::new();
        for kernel in &mut kernels {
            there.push(kernel.addresses()?);
        }
        seen.looks += 1;
        if servers.iter().filter(|s| s.writable.load(Ordering::Relaxed) == YES).count() > 1 {
            seen.two_writable += 1;
        }
        for (n, ip) in roles.iter().enumerate() {
            let mut holders: Vec<usize> = (0..DB.len()).filter(|i| there[*i].contains(ip)).collect();
            if holders.len() > 1 {
                // One after the other was asked: an address that moved meanwhile was on two hosts only if the one
                // asked first still has it.
                let mut still = Vec::new();
                for host in holders {
                    if kernels[host].addresses()?.contains(ip) {
                        still.push((host, kernels[host].netns.clone()));
                    }
                }
                let asked: Vec<(usize, &Path)> = still.iter().map(|(host, netns)| (*host, netns.as_path())).collect();
                holders =
                    if asked.len() > 1 { answering(&asked, *ip)? } else { asked.iter().map(|(h, _)| *h).collect() };
            }
            let names: Vec<&'static str> = holders.iter().map(|i| DB[*i]).collect();
            if holders.len() > 1 {
                let writable = holders.iter().all(|i| servers[*i].writable.load(Ordering::Relaxed) == YES);
                let known = seen.doubled.iter_mut().rev().find(|d| d.ip == *ip && d.hosts == names);
                match known.filter(|_| before[n] == names) {
                    Some(known) => {
                        known.until = now;
                        known.looks += 1;
                        known.all_writable += u64::from(writable);
                    }
                    None => seen.doubled.push(Doubled {
                        ip: *ip,
                        hosts: names.clone(),
                        from: now,
                        until: now,
                        looks: 1,
                        all_writable: u64::from(writable),
                    }),
                }
            }
            if names != before[n] || seen.looks == 1 {
                let what = if *ip == WRITER { "writer" } else { "reader" };
                let words = format!("{what} {ip} on [{}]", names.join(" "));
                if names.len() > 1 {
                    timeline.say_at(now, format!("TWO HOLDERS: {words}"));
                } else {
                    timeline.note_at(now, words);
                }
                if *ip == WRITER {
                    if let [only] = holders.as_slice() {
                        last_writer.store(u8::try_from(*only).unwrap_or(0), Ordering::Relaxed);
                    }
                    seen.writer.push((now, names.clone()));
                }
                before[n] = names;
            }
        }
        thread::sleep(PAUSE);
    }
    Ok(seen)
}

/// A netlink socket in a host's namespace; it stays there wherever the thread is that uses it.
struct Kernel {
    host: &'static str,
    netns: PathBuf,
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Kernel {
    fn open(lab: &Lab, host: &'static str) -> Result<Kernel> {
        let netns = lab.network().netns(host);
        let socket = within(&netns, || {
            let flags = SockFlag::SOCK_CLOEXEC;
            socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)
        })?
        .with_context(|| format!("open a netlink socket on {host}"))?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(2, 0))?;
        Ok(Kernel { host, netns, socket, sequence: 0, buffer: vec![0; 32 << 10] })
    }

    /// Role addresses only. See rtnetlink(7): RTM_GETADDR with NLM_F_DUMP.
    fn addresses(&mut self) -> Result<BTreeSet<Ipv4Addr>> {
        for _ in 0..20 {
            if let Some(found) = self.dump().with_context(|| format!("ask the kernel of {}", self.host))? {
                return Ok(found);
            }
        }
        bail!("the addresses of {} change too fast to be listed", self.host)
    }

    /// None: they changed while they were listed.
    fn dump(&mut self) -> Result<Option<BTreeSet<Ipv4Addr>>> {
        const GET: u16 = 22;
        const NEW: u16 = 20;
        const ERROR: u16 = 2;
        const DONE: u16 = 3;
        const REQUEST_AND_DUMP: u16 = 0x301;
        const INTERRUPTED: u16 = 0x10;
        const LOCAL: u16 = 2;
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = Vec::with_capacity(24);
        request.extend(24_u32.to_ne_bytes());
        request.extend(GET.to_ne_bytes());
        request.extend(REQUEST_AND_DUMP.to_ne_bytes());
        request.extend(self.sequence.to_ne_bytes());
        request.extend(0_u32.to_ne_bytes());
        request.extend([2, 0, 0, 0, 0, 0, 0, 0]); // AF_INET
        let fd = self.socket.as_raw_fd();
        sendto(fd, &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut found = BTreeSet::new();
        let mut whole = true;
        for _ in 0..100 {
            let length = recv(fd, &mut self.buffer, MsgFlags::empty())?;
            let mut rest = &self.buffer[..length];
            while rest.len() >= 16 {
                let size = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
                if size < 16 || size > rest.len() {
                    bail!("a netlink message of {size} bytes in {} bytes", rest.len());
                }
                let kind = u16::from_ne_bytes([rest[4], rest[5]]);
                let flags = u16::from_ne_bytes([rest[6], rest[7]]);
                let sequence = u32::from_ne_bytes([rest[8], rest[9], rest[10], rest[11]]);
                let body = &rest[16..size];
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
                if sequence != self.sequence {
                    continue;
                }
                whole &= flags & INTERRUPTED == 0;
                match kind {
                    DONE => return Ok(whole.then_some(found)),
                    ERROR => bail!("netlink error {body:?}"),
                    NEW => found.extend(attributes(body.get(8..).unwrap_or_default(), LOCAL)),
                    _ => {}
                }
            }
        }
        bail!("a list without an end")
    }
}

/// The IPv4 addresses among the attributes of one kind.
fn attributes(mut rest: &[u8], wanted: u16) -> Vec<Ipv4Addr> {
    let mut found = Vec::new();
    while rest.len() >= 4 {
        let size = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]);
        if size < 4 || size > rest.len() {
            break;
        }
        if let (true, &[a, b, c, d]) = (kind == wanted, &rest[4..size]) {
            found.push(Ipv4Addr::new(a, b, c, d));
        }
        rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

// ---- servers -----------------------------------------------------------------------------------------------------

const NO: u8 = 1;
const YES: u8 = 2;

/// What the thread that asks one server shows the others.
#[derive(Debug, Default)]
pub(super) struct ServerState {
    /// 0: it is not there. A server that hangs keeps what it was.
    pub(super) writable: AtomicU8,
}

/// Semi-synchronous replication at one moment, as the server that waits for acknowledgements says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum SemiSync {
    On,
    Off,
    /// The server did not answer.
    Unknown,
}

#[derive(Clone, Debug, Default)]
pub(super) struct ServerSeen {
    /// Each with the moments before asking and after the answer.
    pub(super) semisync: Vec<(Instant, Instant, SemiSync)>,
    pub(super) answers: u64,
}

impl ServerSeen {
    /// What it was between the two, with the answers that surround them: On only if all say so.
    pub(super) fn semisync_between(&self, from: Instant, until: Instant) -> SemiSync {
        let first = self.semisync.partition_point(|(_, answered, _)| *answered <= from).saturating_sub(1);
        let behind = self.semisync.partition_point(|(asked, ..)| *asked < until);
        let Some(around) = self.semisync.get(first..(behind + 1).min(self.semisync.len())) else {
            return SemiSync::Unknown;
        };
        if around.is_empty() || around.iter().any(|s| s.2 == SemiSync::Off) {
            return if around.is_empty() { SemiSync::Unknown } else { SemiSync::Off };
        }
        if around.iter().any(|s| s.2 == SemiSync::Unknown) { SemiSync::Unknown } else { SemiSync::On }
    }
}

/// Asks one server until told to stop.
pub(super) fn ask(
    lab: &Lab,
    host: &'static str,
    stop: &AtomicBool,
    state: &ServerState,
    timeline: &Timeline,
) -> ServerSeen {
    let socket = lab.socket(host);
    let status = match lab.server().dialect {
        Dialect::MariaDb => "SHOW GLOBAL STATUS LIKE 'Rpl_semi_sync_master_status'",
        Dialect::MySql => "SHOW GLOBAL STATUS LIKE 'Rpl_semi_sync_source_status'",
    };
    let mut seen = ServerSeen::default();
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return seen };
    runtime.block_on(async {
        let mut conn: Option<Conn> = None;
        let mut semisync = SemiSync::Unknown;
        while !stop.load(Ordering::Relaxed) {
            let asked = Instant::now();
            let all = async {
                let mut open = match conn.take() {
                    Some(open) => open,
                    None => Conn::new(options(socket.clone())).await?,
                };
                let read_only: Option<u8> = open.query_first("SELECT @@global.read_only").await?;
                let on: Option<Row> = open.query_first(status).await?;
                let on = on.and_then(|mut row| row.take::<String, usize>(1));
                Ok::<_, mysql_async::Error>((open, read_only, on))
            };
            let (writable, now) = match tokio::time::timeout(ANSWER, all).await {
                Ok(Ok((open, read_only, on))) => {
                    conn = Some(open);
                    seen.answers += 1;
                    let on = if on.as_deref() == Some("ON") { SemiSync::On } else { SemiSync::Off };
                    (if read_only == Some(0) { YES } else { NO }, on)
                }
                Ok(Err(_)) => (0, SemiSync::Unknown),
                Err(_) => (state.writable.load(Ordering::Relaxed), SemiSync::Unknown),
            };
            let answered = Instant::now();
            let before = state.writable.swap(writable, Ordering::Relaxed);
            if before != writable {
                let words = ["not there", "read-only", "WRITABLE"];
                timeline.note_at(answered, format!("server {host} is {}", words[usize::from(writable.min(2))]));
            }
            if semisync != now {
                timeline.note_at(answered, format!("semi-sync source of {host}: {now:?}"));
                semisync = now;
            }
            seen.semisync.push((asked, answered, now));
            tokio::time::sleep(ASK).await;
        }
    });
    runtime.shutdown_background();
    seen
}

fn options(socket: PathBuf) -> OptsBuilder {
    OptsBuilder::default()
        .socket(Some(socket.display().to_string()))
        .user(Some("lab"))
        .pass(Some("lab"))
        .max_allowed_packet(Some(16 << 20))
        .wait_timeout(Some(600))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn semisync_counts_as_on_only_when_every_answer_around_the_moment_says_so() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let answers = [(0, SemiSync::On), (30, SemiSync::On), (60, SemiSync::Off), (90, SemiSync::On)];
        let answers = answers.map(|(ms, what)| (at(ms), at(ms + 1), what)).to_vec();
        let seen = ServerSeen { semisync: answers, answers: 4 };
        assert_eq!(seen.semisync_between(at(10), at(20)), SemiSync::On);
        assert_eq!(seen.semisync_between(at(10), at(40)), SemiSync::Off);
        assert_eq!(seen.semisync_between(at(40), at(50)), SemiSync::Off);
        assert_eq!(ServerSeen::default().semisync_between(at(1), at(2)), SemiSync::Unknown);
    }

    #[test]
    fn the_writers_of_a_moment_are_the_last_ones_before_it_and_those_during_it() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let writer = vec![(at(0), vec!["db1"]), (at(100), Vec::new()), (at(150), vec!["db2"])];
        let seen = Looked { writer, ..Looked::default() };
        let between = |from, until| seen.writers_between(at(from), at(until)).into_iter().collect::<Vec<_>>();
        assert_eq!(between(10, 20), ["db1"]);
        assert_eq!(between(90, 160), ["db1", "db2"]);
        assert_eq!(between(110, 120), Vec::<&str>::new());
    }
}

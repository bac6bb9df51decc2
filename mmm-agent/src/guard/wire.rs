//! The few words of nf_tables' netlink that the guard speaks: a batch that the kernel takes as a whole or not at all,
//! questions, and word of what others change. Numbers are from linux/netfilter/nf_tables.h and nfnetlink.h; all values are in network order.
//!
//! The kernel does a batch within the call that sends it, and its answers are in the socket's queue when the call
//! returns. So nothing here waits, except for other programs that are changing the rules at this moment, and for
//! [`Changes::next`].

use nix::errno::Errno;
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, Socket, SocketAddr, TokioSocket};
use std::cell::Cell;
use std::io::{self, ErrorKind};

/// linux/netfilter.h: NFPROTO_INET, NFPROTO_ARP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Inet = 1,
    Arp = 3,
}

/// What a message does. `nf_tables_msg_types`.
#[derive(Clone, Copy)]
pub(super) enum Verb {
    NewTable = 0,
    GetTable = 1,
    DelTable = 2,
    NewChain = 3,
    GetChain = 4,
    NewRule = 6,
    DelRule = 8,
    NewSet = 9,
    NewElement = 12,
    GetElement = 13,
    DelElement = 14,
}

/// How often a list is asked for until nothing changes meanwhile.
const LISTINGS: usize = 10;

const HEADER: usize = 16;
/// `struct nfgenmsg`: family, version, resource.
const NFGENMSG: usize = 4;
/// `struct nlattr`: length, kind.
const ATTRIBUTE: usize = 4;

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Every change of nf_tables is told to it.
const NFNLGRP_NFTABLES: u32 = 7;

const REQUEST: u16 = 1;
/// Of an answer: something changed while it was made.
const INTERRUPTED: u16 = 0x10;
const LIST: u16 = 0x300;
const ACK: u16 = 4;
const CREATE: u16 = 0x400;
/// With NEWRULE: behind the others.
const APPEND: u16 = 0x800;

/// Marks attributes that contain attributes.
const NESTED: u16 = 0x8000;

/// Attributes of a message, or of an attribute that contains others.
pub(super) struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) {
        self.nested_as(kind, |inner| inner.0.extend_from_slice(value));
    }

    pub(super) fn text(&mut self, kind: u16, value: &str) {
        self.nested_as(kind, |inner| {
            inner.0.extend_from_slice(value.as_bytes());
            inner.0.push(0);
        });
    }

    pub(super) fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(super) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        self.nested_as(kind | NESTED, fill);
    }

    fn nested_as(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; ATTRIBUTE]);
        fill(&mut Attributes(self.0));
        // The length is without the padding behind it.
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

/// Changes that happen together or not at all.
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// Where the newest message begins.
    newest: usize,
    messages: u32,
}

impl Batch {
    pub(super) fn new() -> Batch {
        let mut batch = Batch { bytes: Vec::with_capacity(1024), newest: 0, messages: 0 };
        batch.put(BATCH_BEGIN, 0, 0, NFNL_SUBSYS_NFTABLES, |_| {});
        batch
    }

    fn question(verb: Verb, flags: u16, family: Family, fill: impl FnOnce(&mut Attributes<'_>)) -> Batch {
        let mut question = Batch { bytes: Vec::new(), newest: 0, messages: 0 };
        question.put((NFNL_SUBSYS_NFTABLES << 8) | verb as u16, flags, family as u8, 0, fill);
        question
    }

    /// As it will be sent, but for its number.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn add(&mut self, verb: Verb, family: Family, fill: impl FnOnce(&mut Attributes<'_>)) {
        let flags = match verb {
            Verb::NewTable | Verb::NewChain | Verb::NewSet | Verb::NewElement => CREATE,
            Verb::NewRule => CREATE | APPEND,
            Verb::DelTable | Verb::DelRule | Verb::DelElement | Verb::GetTable | Verb::GetChain | Verb::GetElement => 0,
        };
        self.put((NFNL_SUBSYS_NFTABLES << 8) | verb as u16, flags, family as u8, 0, fill);
    }

    fn put(&mut self, kind: u16, flags: u16, family: u8, resource: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        self.newest = self.bytes.len();
        self.bytes.extend_from_slice(&[0; HEADER]);
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        fill(&mut Attributes(&mut self.bytes));
        let length = (self.bytes.len() - self.newest) as u32;
        let header = &mut self.bytes[self.newest..];
        header[0..4].copy_from_slice(&length.to_ne_bytes());
        header[4..6].copy_from_slice(&kind.to_ne_bytes());
        header[6..8].copy_from_slice(&(flags | REQUEST).to_ne_bytes());
        // Its number within the batch; the socket adds its own count.
        header[8..12].copy_from_slice(&self.messages.to_ne_bytes());
        self.messages += 1;
    }

    /// The last change is acknowledged when all are done.
    fn finish(mut self) -> Batch {
        let flags = self.newest + 6;
        let with_ack = u16::from_ne_bytes([self.bytes[flags], self.bytes[flags + 1]]) | ACK;
        self.bytes[flags..flags + 2].copy_from_slice(&with_ack.to_ne_bytes());
        self.put(BATCH_END, 0, 0, NFNL_SUBSYS_NFTABLES, |_| {});
        self
    }
}

/// A socket to nf_tables, kept open. In the network namespace in which it was opened.
pub(super) struct Kernel {
    socket: Socket,
    /// The kernel's name for the socket; its changes are told with it.
    port: u32,
    /// The number of the next message. Numbers tell an answer from a late one of an earlier question.
    next: Cell<u32>,
}

impl Kernel {
    pub(super) fn open() -> io::Result<Kernel> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        let port = socket.bind_auto()?.port_number();
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        // An error does not bring the whole message back.
        socket.set_cap_ack(true)?;
        Ok(Kernel { socket, port, next: Cell::new(1) })
    }

    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// All of it or nothing.
    pub(super) fn change(&self, batch: Batch) -> io::Result<()> {
        let batch = batch.finish();
        self.exchange(batch.bytes, batch.messages).map(|_| ())
    }

    /// Asks for one thing; the attributes of the answer.
    pub(super) fn one(
        &self,
        verb: Verb,
        family: Family,
        fill: impl FnOnce(&mut Attributes<'_>),
    ) -> io::Result<Vec<u8>> {
        let question = Batch::question(verb, ACK, family, fill);
        self.exchange(question.bytes, 1)?.ok_or_else(|| io::Error::other("an answer without content"))
    }

    /// Asks for a list; the attributes of each answer. Asked again when something changed meanwhile.
    pub(super) fn list(
        &self,
        verb: Verb,
        family: Family,
        fill: impl Fn(&mut Attributes<'_>),
    ) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..LISTINGS {
            let question = Batch::question(verb, LIST, family, &fill);
            if let Some(list) = self.listed(question.bytes)? {
                return Ok(list);
            }
        }
        Err(io::Error::other(format!("the tables changed during each of {LISTINGS} listings")))
    }

    /// None: something changed meanwhile. The kernel makes the next part of the list when one is read, so that there is
    /// always one to be read before the end.
    fn listed(&self, mut bytes: Vec<u8>) -> io::Result<Option<Vec<Vec<u8>>>> {
        let number = self.next.get();
        self.next.set(number.wrapping_add(1));
        bytes[8..12].copy_from_slice(&number.to_ne_bytes());
        self.socket.send(&bytes, 0)?;
        let (mut list, mut whole) = (Vec::new(), true);
        loop {
            let mut buffer = Vec::with_capacity(64 * 1024);
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
            for message in messages(&buffer).filter(|message| word(message, 8) == Some(number)) {
                whole &= half(message, 6).is_some_and(|flags| flags & INTERRUPTED == 0);
                if !matches!(half(message, 4), Some(NLMSG_DONE | NLMSG_ERROR)) {
                    list.extend(message.get(HEADER + NFGENMSG..).map(<[u8]>::to_vec));
                    continue;
                }
                return match word(message, HEADER).map(u32::cast_signed) {
                    Some(errno @ ..0) => Err(io::Error::from_raw_os_error(-errno)),
                    Some(0..) | None => Ok(whole.then_some(list)),
                };
            }
        }
    }

    /// Sends, and reads what the kernel has put into the queue meanwhile. An acknowledgement alone proves nothing: a
    /// batch that failed as a whole acknowledges its messages too, after the error.
    fn exchange(&self, mut bytes: Vec<u8>, sent: u32) -> io::Result<Option<Vec<u8>>> {
        let first = self.next.get();
        self.next.set(first.wrapping_add(sent));
        let mut at = 0;
        while let Some(length) = word(&bytes, at) {
            let number = word(&bytes, at + 8).unwrap_or_default().wrapping_add(first);
            bytes[at + 8..at + 12].copy_from_slice(&number.to_ne_bytes());
            at += length as usize;
        }
        self.socket.send(&bytes, 0)?;

        let (mut acknowledged, mut refused, mut content) = (false, None, None);
        loop {
            let mut buffer = Vec::with_capacity(16 * 1024);
            match self.socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
            for message in messages(&buffer) {
                if word(message, 8).is_none_or(|number| number.wrapping_sub(first) >= sent) {
                    continue;
                }
                if half(message, 4) != Some(NLMSG_ERROR) {
                    content = message.get(HEADER + NFGENMSG..).map(<[u8]>::to_vec);
                    continue;
                }
                match word(message, HEADER).map(u32::cast_signed) {
                    Some(0) => acknowledged = true,
                    Some(errno) => refused = refused.or(Some(errno)),
                    None => {}
                }
            }
        }
        match refused {
            Some(errno) => Err(io::Error::from_raw_os_error(-errno)),
            None if acknowledged => Ok(content),
            None => Err(io::Error::other("the kernel did not acknowledge it")),
        }
    }
}

/// Word of every change of nf_tables in this network namespace.
pub(super) struct Changes(TokioSocket);

impl Changes {
    /// Told are those from now on.
    pub(super) fn listen() -> io::Result<Changes> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        socket.socket_mut().bind_auto()?;
        socket.socket_ref().add_membership(NFNLGRP_NFTABLES)?;
        Ok(Changes(socket))
    }

    /// Waits until somebody else than `port` has changed, or may have changed, something in a table of this name.
    pub(super) async fn next(&mut self, table: &str, port: u32) -> io::Result<()> {
        loop {
            let (buffer, _) = match self.0.recv_from_full().await {
                Ok(received) => received,
                // More than there was room for.
                Err(e) if e.raw_os_error() == Some(Errno::ENOBUFS as i32) => return Ok(()),
                Err(e) => return Err(e),
            };
            let concerns = |message: &[u8]| {
                let name = message.get(HEADER + NFGENMSG..).and_then(|content| attribute(content, 1));
                word(message, 12) != Some(port) && name.is_some_and(|name| name == [table.as_bytes(), &[0]].concat())
            };
            if messages(&buffer).any(concerns) {
                return Ok(());
            }
        }
    }
}

/// The messages that were read at one time, each without what is behind its length.
fn messages(mut rest: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = word(rest, 0).map(|l| l as usize).filter(|l| (HEADER..=rest.len()).contains(l))?;
        let message = &rest[..length];
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        Some(message)
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The content of the first attribute of this kind.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, content)| content)
}

/// Each with its kind.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(half(bytes, 0)?);
        let kind = half(bytes, 2)? & !NESTED;
        let content = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, content))
    })
}

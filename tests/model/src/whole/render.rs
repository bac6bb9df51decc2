//! What identifies a state of layer B: everything that can influence what comes, and nothing else.
//!
//! Cores show themselves by `Debug`. Times are written as distances from now, epochs as ranks, lives and reports by
//! their age; texts for people are dropped. Two states that are taken for one must go on alike: where that is only nearly
//! so (ages beyond what any rule looks at are cut off) something may be overlooked, but nothing is invented.

use super::world::{LIVES, World};
use mmm_common::epoch::Boot;
use std::collections::hash_map::DefaultHasher;
use std::fmt::{Debug, Write};
use std::hash::{Hash, Hasher};

/// Longer ago or ahead than any rule looks.
const LONG: i64 = 70_000;
/// For times that matter only for a moment, or only while they lie ahead.
const SHORT: i64 = 5_000;

/// Only for people, or follows from the rest.
fn is_dropped(field: &[u8]) -> bool {
    matches!(
        field,
        b"config" | b"remarks" | b"refusals" | b"vouch_refusals" | b"lookups" | b"due" | b"saved_at" | b"changed"
    ) || matches!(field, b"link_down" | b"persisted")
        // No server here has semi-synchronous replication.
        || matches!(field, b"semisync_at" | b"attached")
}

/// What lies so far back is the same as if it lay further back.
fn past(field: &[u8]) -> i64 {
    let short =
        matches!(field, b"answered" | b"replicated" | b"vouched_for" | b"vouches" | b"vouched_until" | b"lease")
            || matches!(
                field,
                b"replicating"
                    | b"last_good"
                    | b"deadline"
                    | b"kernel_until"
                    | b"next_heartbeat"
                    | b"sample"
                    | b"failed"
                    | b"asked"
                    | b"ahead"
            );
    if short { SHORT } else { LONG }
}

pub(crate) fn key(world: &World) -> u64 {
    let mut text = String::new();
    let mut add = |value: &dyn Debug| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{value:?};");
    };
    add(&world.monitor);
    add(&world.disk.as_ref().map(|(snapshot, _)| snapshot));
    for host in &world.hosts {
        add(&host.core);
        add(&host.disk);
        add(&host.pile);
        add(&(host.linked, host.silent, host.paused, host.machine));
    }
    add(&world.aside);
    let mut scan =
        Scan { world, text: text.as_bytes(), at: 0, field: b"", boot: 0, out: String::new(), epochs: vec![] };
    scan.out.reserve(text.len());
    scan.all();
    let (mut out, mut epochs) = (scan.out, scan.epochs);
    for host in &world.hosts {
        let left = |at: u64| at as i64 - world.now as i64;
        let kernel: Vec<_> = host.kernel.iter().map(|(ip, gone)| (ip, left(*gone))).collect();
        let probes: Vec<_> = host.probes.iter().map(|(at, ip)| (ip, left(*at))).collect();
        let s = &host.server;
        let server = (s.up, s.read_only, &s.executed, &s.received, s.source, s.io, s.sql, s.written, s.ahead);
        let hung = s.hung_since.map(|at| left(at).max(-SHORT));
        let task = s.task.as_ref().map(|task| (&task.work, left(s.task_until)));
        let minded = host.minded.map(|since| left(since).max(-2_000));
        let _ = write!(out, "{kernel:?}{probes:?}{server:?}{hung:?}{task:?}{minded:?}");
        epochs.extend(s.task.as_ref().map(|task| task.id.0));
    }
    let _ = write!(out, "{:?}{}{}", world.cuts, world.two_holders, world.two_open);
    let mut ranks = epochs.clone();
    ranks.sort_unstable();
    ranks.dedup();
    let ranked: Vec<usize> = epochs.iter().map(|e| ranks.binary_search(e).unwrap_or(0)).collect();
    let mut hasher = DefaultHasher::new();
    (out, ranked).hash(&mut hasher);
    hasher.finish()
}

struct Scan<'a> {
    world: &'a World,
    text: &'a [u8],
    at: usize,
    /// The last field's name.
    field: &'a [u8],
    boot: u64,
    out: String,
    /// In the order in which they are come by.
    epochs: Vec<u64>,
}

impl<'a> Scan<'a> {
    fn all(&mut self) {
        while let Some(byte) = self.text.get(self.at).copied() {
            if byte == b'"' {
                let text = self.quoted();
                if text.len() < 20 && !text.contains(&b' ') {
                    self.copy(text);
                }
                self.out.push('"');
            } else if is_letter(byte) && !byte.is_ascii_digit() {
                self.word();
            } else {
                self.out.push(char::from(byte));
                self.at += 1;
            }
        }
    }

    fn copy(&mut self, text: &[u8]) {
        self.out.extend(text.iter().copied().map(char::from));
    }

    fn word(&mut self) {
        let rest = &self.text[self.at..];
        let length = rest.iter().position(|byte| !is_letter(*byte)).unwrap_or(rest.len());
        let word = &rest[..length];
        self.at += length;
        if rest[length..].starts_with(b": ") {
            self.at += 2;
            self.field = word;
            let next = self.text.get(self.at).copied().unwrap_or(0);
            // The list of all that was sent; a count for people.
            let counted = (word == b"sent" && next == b'[') || (word == b"refused" && next.is_ascii_digit());
            if counted || is_dropped(word) {
                self.skip();
                return;
            }
            self.copy(word);
            if word == b"seq" {
                let seq = self.number();
                self.sent(seq);
            }
            return;
        }
        match word {
            b"Millis" => {
                self.at += 1;
                let at = self.number() as i64 - self.world.now as i64;
                let _ = write!(self.out, "@{}", at.clamp(-past(self.field), LONG));
                self.at += 1;
            }
            b"Epoch" => {
                self.at += 1;
                let epoch = self.number();
                self.epochs.push(epoch);
                self.out.push('E');
                self.at += 1;
            }
            b"Boot" => {
                self.at += 1;
                self.boot = self.number();
                let host = (self.boot / LIVES).saturating_sub(1);
                let life = self.world.hosts.get(host as usize).map_or(0, |h| h.boot.0);
                let _ = write!(self.out, "B{host}-{}", life.saturating_sub(self.boot));
                self.at += 1;
            }
            word => self.copy(word),
        }
    }

    /// A report or request by when it was sent, and which of that moment it was.
    fn sent(&mut self, seq: u64) {
        let host = (self.boot / LIVES).saturating_sub(1) as usize;
        let life = self.world.hosts.get(host).and_then(|h| h.sent.get(&Boot(self.boot)));
        let sent = life.map(Vec::as_slice).unwrap_or_default();
        let Ok(index) = sent.binary_search_by_key(&seq, |(seq, _)| *seq) else {
            self.out.push('-');
            return;
        };
        let age = self.world.now as i64 - sent[index].1 as i64;
        if age > SHORT {
            self.out.push_str("old");
            return;
        }
        let twin = sent[..index].iter().rev().take_while(|(_, at)| *at == sent[index].1).count();
        let _ = write!(self.out, "{age}.{twin}");
    }

    fn number(&mut self) -> u64 {
        let mut n = 0;
        while let Some(digit) = self.text.get(self.at).filter(|b| b.is_ascii_digit()) {
            n = n * 10 + u64::from(digit - b'0');
            self.at += 1;
        }
        n
    }

    /// The text at the quote here; goes on behind it.
    fn quoted(&mut self) -> &'a [u8] {
        let begin = self.at + 1;
        self.at = begin;
        while let Some(byte) = self.text.get(self.at) {
            match byte {
                b'"' => break,
                b'\\' => self.at += 2,
                _ => self.at += 1,
            }
        }
        let end = self.at.min(self.text.len());
        self.at += 1;
        &self.text[begin..end]
    }

    /// Over one value.
    fn skip(&mut self) {
        let mut depth = 0;
        while let Some(byte) = self.text.get(self.at) {
            match byte {
                b'"' => {
                    self.quoted();
                    continue;
                }
                b'{' | b'[' | b'(' => depth += 1,
                b'}' | b']' | b')' if depth == 0 => return,
                b'}' | b']' | b')' => depth -= 1,
                b',' if depth == 0 => return,
                _ => {}
            }
            self.at += 1;
        }
    }
}

fn is_letter(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

//! What an option's value may look like, one reader per kind.
//!
//! A reader's message goes on after the option's name ("is a port …, not 0") and says what is right. The reader of
//! passwords never repeats what it found.

use super::suggest::hint;
use super::tree::{Node, Value};
use super::{OnDrainTimeout, OnHang, Secret};
use crate::ids::{HostName, RoleName};
use crate::state::{HostMode, MonitorMode, RoleMode};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Every line with what is wrong there.
pub(super) type Wrong = Vec<(usize, String)>;

fn wrong<T>(node: &Node, text: String) -> Result<T, Wrong> {
    Err(vec![(node.line, text)])
}

fn not<T>(node: &Node, what: &str) -> Result<T, Wrong> {
    wrong(node, format!("is {what}, not {}", node.found()))
}

/// Longer than this is a slip of the pen: ten years.
const LONGEST: f64 = 10.0 * 365.0 * 86400.0;

pub(super) fn duration(node: &Node) -> Result<Duration, Wrong> {
    let seconds = match &node.value {
        Value::Text(text) => duration_text(text),
        Value::Number(n) => u32::try_from(*n).ok().map(f64::from),
        Value::Fraction(f) => Some(*f),
        Value::Flag(_) | Value::List(_) | Value::Table(_) | Value::Other(_) => None,
    };
    match seconds {
        Some(s) if s == 0.0 || (0.001..=LONGEST).contains(&s) => {
            // Times are kept in milliseconds.
            Ok(Duration::from_millis(Duration::from_secs_f64(s + 0.0005).as_millis().try_into().unwrap_or(u64::MAX)))
        }
        Some(s) if s > LONGEST => wrong(node, format!("is at most 3650 days, not {}", node.found())),
        Some(_) | None => not(node, r#"a duration such as "500ms", "3s", "2m" or "1h" (a bare number means seconds)"#),
    }
}

/// Seconds.
fn duration_text(text: &str) -> Option<f64> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim_start() {
        "ms" => 0.001,
        "s" | "" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return None,
    };
    number.parse::<f64>().ok().map(|n| n * factor)
}

pub(super) fn flag(node: &Node) -> Result<bool, Wrong> {
    match node.flag() {
        Some(flag) => Ok(flag),
        None => not(node, "true or false (without quotes)"),
    }
}

pub(super) fn port(node: &Node) -> Result<u16, Wrong> {
    match node.number().and_then(|n| u16::try_from(n).ok()) {
        Some(port) if port > 0 => Ok(port),
        Some(_) | None => not(node, "a port, 1 to 65535 (without quotes)"),
    }
}

pub(super) fn count(node: &Node) -> Result<u32, Wrong> {
    match node.number().and_then(|n| u32::try_from(n).ok()) {
        Some(count) if count > 0 => Ok(count),
        Some(_) | None => not(node, "a whole number from 1 on (without quotes)"),
    }
}

fn text_of<'a>(node: &'a Node, what: &str) -> Result<&'a str, Wrong> {
    match node.text() {
        Some(text) if !text.trim().is_empty() => Ok(text),
        Some(_) | None => not(node, what),
    }
}

pub(super) fn text(node: &Node) -> Result<String, Wrong> {
    text_of(node, "text in quotes that is not empty").map(str::to_owned)
}

pub(super) fn secret(node: &Node) -> Result<Secret, Wrong> {
    match node.text() {
        Some(text) => Ok(Secret(text.to_owned())),
        None => wrong(node, format!("is text in quotes, not {}", node.shape())),
    }
}

/// An address that one machine can have.
pub(super) fn ip(node: &Node) -> Result<IpAddr, Wrong> {
    let ip = listen_ip(node)?;
    if ip.is_unspecified() {
        return wrong(node, format!("is the address of one machine, not {ip}"));
    }
    Ok(ip)
}

/// An address to listen on: "all of them" (`0.0.0.0`, `::`) as well.
pub(super) fn listen_ip(node: &Node) -> Result<IpAddr, Wrong> {
    let text = text_of(node, r#"an IP address in quotes, such as "192.168.0.31""#)?;
    let ip: IpAddr = match text.parse() {
        Ok(ip) => ip,
        Err(_) => {
            return match text.split_once('/') {
                Some((ip, _)) if ip.parse::<IpAddr>().is_ok() => {
                    wrong(node, format!("has no prefix length (addresses are /32 or /128): write \"{ip}\""))
                }
                Some(_) | None => not(node, r#"an IP address (no name, no port), such as "192.168.0.31""#),
            };
        }
    };
    match ip {
        IpAddr::V6(v6) => {
            if let Some(v4) = v6.to_ipv4_mapped() {
                return wrong(node, format!("is an IPv4 address in IPv6 form: write \"{v4}\""));
            }
            if v6.is_unicast_link_local() {
                return wrong(node, format!("is a link-local address ({ip}), which is not unique: use another one"));
            }
        }
        IpAddr::V4(v4) if v4.is_broadcast() => return wrong(node, format!("is the broadcast address {ip}")),
        IpAddr::V4(_) => {}
    }
    if ip.is_multicast() {
        return wrong(node, format!("is a multicast address ({ip}): use one of a single machine"));
    }
    Ok(ip)
}

fn list<T>(node: &Node, example: &str, read: fn(&Node) -> Result<T, Wrong>) -> Result<Vec<T>, Wrong> {
    if let Some(text) = node.text() {
        // MMM 2.x wrote lists with commas.
        let items: Vec<String> = text.split(',').map(|item| format!("{:?}", item.trim())).collect();
        return wrong(node, format!("is a list: write [{}]", items.join(", ")));
    }
    let Some(items) = node.list() else { return not(node, &format!("a list, such as [{example}]")) };
    let mut good = Vec::new();
    let mut bad = Vec::new();
    for item in items {
        match read(item) {
            Ok(value) => good.push(value),
            Err(texts) => bad.extend(texts.into_iter().map(|(line, text)| (line, format!("entry {text}")))),
        }
    }
    if bad.is_empty() { Ok(good) } else { Err(bad) }
}

pub(super) fn ips(node: &Node) -> Result<Vec<IpAddr>, Wrong> {
    list(node, r#""192.168.0.51", "192.168.0.52""#, ip)
}

pub(super) fn host_names(node: &Node) -> Result<Vec<HostName>, Wrong> {
    list(node, r#""db1", "db2""#, host_name)
}

pub(super) fn paths(node: &Node) -> Result<Vec<(usize, PathBuf)>, Wrong> {
    if node.text().is_some() {
        return Ok(vec![(node.line, path(node)?)]);
    }
    list(node, r#""mmm_common.toml""#, |item| path(item).map(|path| (item.line, path)))
}

pub(super) fn host_name(node: &Node) -> Result<HostName, Wrong> {
    text_of(node, r#"the name of a host, such as "db1""#).map(HostName::from)
}

pub(super) fn role_name(node: &Node) -> Result<RoleName, Wrong> {
    text_of(node, r#"the name of a role, such as "writer""#).map(RoleName::from)
}

/// A path, possibly relative to the file that names it.
pub(super) fn path(node: &Node) -> Result<PathBuf, Wrong> {
    text_of(node, "the name of a file in quotes").map(PathBuf::from)
}

pub(super) fn absolute_path(node: &Node) -> Result<PathBuf, Wrong> {
    let path = path(node)?;
    if path.is_absolute() { Ok(path) } else { not(node, "a file's whole path, from / on") }
}

/// Empty text: none.
pub(super) fn path_or_none(node: &Node) -> Result<Option<PathBuf>, Wrong> {
    if node.text() == Some("") { Ok(None) } else { absolute_path(node).map(Some) }
}

/// A network interface as the kernel names it (15 bytes at most, no `/`, no blanks); labels such as `eth0:1` are none.
pub(super) fn interface(node: &Node) -> Result<String, Wrong> {
    let name = text_of(node, r#"the name of a network interface, such as "eth0""#)?;
    if let Some((real, _)) = name.split_once(':') {
        return wrong(node, format!("is an interface, not a label of one: write {real:?} instead of {name:?}"));
    }
    if name.len() > 15 || name.contains(|c: char| c == '/' || c.is_whitespace()) {
        return not(node, r#"the name of a network interface (at most 15 letters), such as "eth0""#);
    }
    Ok(name.to_owned())
}

fn word<T: Copy>(node: &Node, words: &[(&'static str, T)]) -> Result<T, Wrong> {
    let known = || words.iter().map(|(word, _)| *word);
    let all = known().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(" or ");
    let Some(text) = node.text() else { return not(node, &all) };
    match words.iter().find(|(word, _)| *word == text) {
        Some((_, value)) => Ok(*value),
        None => match super::suggest::nearest(text, known()) {
            Some(_) => wrong(node, format!("is {all}, not {text:?}: {}", hint(text, known().collect::<Vec<_>>()))),
            None => not(node, &all),
        },
    }
}

pub(super) fn host_mode(node: &Node) -> Result<HostMode, Wrong> {
    word(node, &[("master", HostMode::Master), ("slave", HostMode::Slave)])
}

pub(super) fn role_mode(node: &Node) -> Result<RoleMode, Wrong> {
    word(node, &[("exclusive", RoleMode::Exclusive), ("balanced", RoleMode::Balanced)])
}

pub(super) fn monitor_mode(node: &Node) -> Result<MonitorMode, Wrong> {
    word(
        node,
        &[
            ("active", MonitorMode::Active),
            ("manual", MonitorMode::Manual),
            ("wait", MonitorMode::Wait),
            ("passive", MonitorMode::Passive),
        ],
    )
}

pub(super) fn on_drain_timeout(node: &Node) -> Result<OnDrainTimeout, Wrong> {
    word(node, &[("hold", OnDrainTimeout::Hold), ("promote", OnDrainTimeout::Promote)])
}

/// Empty: none.
pub(super) fn text_or_none(node: &Node) -> Result<Option<String>, Wrong> {
    match node.text() {
        Some("") => Ok(None),
        Some(text) => Ok(Some(text.to_owned())),
        None => not(node, "text in quotes"),
    }
}

pub(super) fn on_hang(node: &Node) -> Result<OnHang, Wrong> {
    word(node, &[("fence", OnHang::Fence), ("kill", OnHang::Kill)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T>(value: Value, read: fn(&Node) -> Result<T, Wrong>) -> Result<T, String> {
        read(&Node { line: 1, value }).map_err(|wrong| wrong.into_iter().map(|(_, text)| text).collect())
    }

    fn text(s: &str) -> Value {
        Value::Text(s.to_owned())
    }

    #[test]
    fn durations() {
        for (value, ms) in [
            (text("500ms"), 500),
            (text("3s"), 3000),
            (text("1.5s"), 1500),
            (text("0.3"), 300),
            (text("2m"), 120_000),
            (text("2 min"), 120_000),
            (text("1h"), 3_600_000),
            (text("7d"), 604_800_000),
            (text("0s"), 0),
            (Value::Number(3), 3000),
            (Value::Number(0), 0),
            (Value::Fraction(0.25), 250),
            (Value::Fraction(1.001), 1001),
        ] {
            assert_eq!(read(value, duration), Ok(Duration::from_millis(ms)));
        }
    }

    #[test]
    fn no_durations() {
        for value in [
            text(""),
            text("s"),
            text("3 weeks"),
            text("-1s"),
            text("1h30m"),
            text("1.2.3s"),
            text("0.1ms"),
            text("1e9s"),
            text("\u{661}s"),
            Value::Number(-1),
            Value::Number(i64::MAX),
            Value::Fraction(-0.5),
            Value::Fraction(f64::NAN),
            Value::Flag(true),
            Value::List(Vec::new()),
        ] {
            let found = read(value, duration).unwrap_err();
            assert!(found.starts_with("is a duration such as"), "{found}");
        }
        assert_eq!(read(text("4000d"), duration).unwrap_err(), "is at most 3650 days, not \"4000d\"");
        assert_eq!(read(Value::Fraction(f64::INFINITY), duration).unwrap_err(), "is at most 3650 days, not inf");
    }

    #[test]
    fn addresses() {
        assert_eq!(read(text("192.168.0.31"), ip), Ok("192.168.0.31".parse().unwrap()));
        assert_eq!(read(text("fd00::31"), ip), Ok("fd00::31".parse().unwrap()));
        assert_eq!(read(text("0.0.0.0"), listen_ip), Ok("0.0.0.0".parse().unwrap()));
        for (value, says) in [
            ("0.0.0.0", "is the address of one machine"),
            ("192.168.0.50/24", "write \"192.168.0.50\""),
            ("db1.example.com", "no name, no port"),
            ("192.168.0.50:3306", "no name, no port"),
            ("::ffff:192.168.0.50", "write \"192.168.0.50\""),
            ("fe80::1", "link-local"),
            ("224.0.0.1", "multicast"),
            ("255.255.255.255", "broadcast"),
            ("", "an IP address in quotes"),
        ] {
            let found = read(text(value), ip).unwrap_err();
            assert!(found.contains(says), "{value}: {found}");
        }
    }

    #[test]
    fn a_password_that_is_no_text_is_not_repeated() {
        assert_eq!(read(Value::Number(47114711), secret), Err("is text in quotes, not a number".to_owned()));
    }
}

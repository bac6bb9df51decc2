//! Whoever can reach the ports of a running cluster sends what he should not: garbage, half messages, endless ones, true
//! messages that were recorded earlier, and hellos in somebody else's name.
//!
//! Not here: a forged order of a higher epoch. On plain-text connections nothing tells it from the monitor's.

use super::stranger::{AGENT_PORT, Line, Recorder};
use super::{log_of, other_master, running};
use anyhow::{Context as _, Result, bail, ensure};
use mmm_common::epoch::Epoch;
use mmm_common::order::AddressOrder;
use mmm_common::wire::{FromAgent, MAX_LINE, PROTOCOL, ToAgent, to_line};
use mmm_tests::lab::network::{APP, DB, MONITOR, WRITER, ip_of};
use mmm_tests::lab::process::within;
use mmm_tests::lab::{Lab, wait_for};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(20);
const MONITOR_PORT: u16 = 9988;
/// Two log lines about refusals are at least so far apart.
const BETWEEN_LINES: Duration = Duration::from_millis(1100);

/// True messages of an earlier time, when the writer role was elsewhere.
pub(crate) struct Recorded {
    /// To the writer: to let the writer address go.
    let_go: String,
    /// To the other master: to hold it.
    hold: String,
    /// Of the writer to the other master, at an epoch that is over.
    vouch: String,
    /// Of the writer to the monitor.
    report: String,
}

/// Listens while the writer role goes to the other master and back again.
pub(crate) fn record(lab: &Lab) -> Result<Recorded> {
    let writer = lab.writer()?;
    let other = other_master(writer);
    let recorder = Recorder::start(lab)?;
    // Something of each kind goes over every connection several times a second.
    std::thread::sleep(Duration::from_secs(1));
    for host in [other, writer] {
        lab.must_control(&["move_role", "writer", host])?;
        lab.wait_serving(SOON)?;
    }
    let lines = recorder.finish()?;
    let ip = |host: &str| ip_of(host);
    let role = IpAddr::V4(WRITER);
    let find = |from: Ipv4Addr, to: Ipv4Addr, is_it: &dyn Fn(&str) -> bool| {
        let mut between = lines.iter().filter(|l| l.from == from && l.to == to);
        between.find(|l: &&Line| is_it(&l.text)).map(|l| l.text.clone())
    };
    let ordered = |text: &str| match serde_json::from_str(text) {
        Ok(ToAgent::Order(order)) => order.addresses.get(&role).cloned(),
        Ok(ToAgent::Hello { .. } | ToAgent::PeerHello { .. } | ToAgent::Vouch(_) | ToAgent::Examine { .. })
        | Err(_) => None,
    };
    let let_go = find(ip(MONITOR)?, ip(writer)?, &|l| matches!(ordered(l), Some(AddressOrder::LetGo { .. })));
    let hold = find(ip(MONITOR)?, ip(other)?, &|l| matches!(ordered(l), Some(AddressOrder::Hold(_))));
    let newest = lines.iter().filter_map(|l| ordered(&l.text)).map(|o| o.epoch()).max().unwrap_or_default();
    let asks = |text: &str| matches!(asked_epoch(text), Some(epoch) if epoch < newest);
    let vouch = find(ip(writer)?, ip(other)?, &asks);
    let report = find(ip(writer)?, ip(MONITOR)?, &|l| matches!(serde_json::from_str(l), Ok(FromAgent::Report(_))));
    println!("bad_input: {} different lines recorded", lines.len());
    Ok(Recorded {
        let_go: let_go.with_context(|| format!("no order to let {WRITER} go was heard"))?,
        hold: hold.with_context(|| format!("no order to hold {WRITER} was heard"))?,
        vouch: vouch.context("no request to vouch was heard")?,
        report: report.context("no report was heard")?,
    })
}

/// The epoch at which somebody asks for a vouch for the writer address.
fn asked_epoch(line: &str) -> Option<Epoch> {
    match serde_json::from_str(line) {
        Ok(ToAgent::Vouch(request)) => request.addresses.get(&IpAddr::V4(WRITER)).copied(),
        Ok(ToAgent::Hello { .. } | ToAgent::PeerHello { .. } | ToAgent::Order(_) | ToAgent::Examine { .. })
        | Err(_) => None,
    }
}

/// Everything is refused and counted, and the same processes serve afterwards as before.
pub(crate) fn attack(lab: &Lab, recorded: &Recorded) -> Result<()> {
    let daemons = || -> Result<Vec<_>> {
        let mut all = vec![running(lab, MONITOR, "mmm_mond")?];
        for host in DB {
            all.push(running(lab, host, "mmm_agentd")?);
        }
        Ok(all)
    };
    let before = daemons()?;
    let writer = lab.writer()?;
    let mut refused = attack_agent(lab, recorded, writer, other_master(writer))?;
    refused += attack_agent(lab, recorded, other_master(writer), writer)?;
    refused += attack_monitor(lab, recorded)?;
    println!("FIGURE bad_input refused_and_counted {refused} messages");
    pretend_to_be_the_monitor(lab, recorded, writer)?;
    replay_a_vouch(lab, recorded, writer)?;
    // What one of them was made to wait for would have come by now.
    super::quiet_time();
    ensure!(daemons()? == before, "a daemon has ended");
    ensure!(lab.must_control(&["ping"])?.ok());
    Ok(())
}

/// What anybody may send to an agent's port; gives how much of it was counted.
fn attack_agent(lab: &Lab, recorded: &Recorded, host: &str, other: &str) -> Result<u64> {
    let before = counted(lab, host, "mmm_agentd")?;
    let at = SocketAddr::from((ip_of(host)?, AGENT_PORT));
    let monitor = identity(lab)?;
    let hello_of = |host: &str, monitor| to_line(&ToAgent::Hello { protocol: PROTOCOL, host: host.into(), monitor });
    let hello = hello_of(host, monitor)?;
    let peer =
        |to: &str, from: &str| to_line(&ToAgent::PeerHello { protocol: PROTOCOL, host: to.into(), from: from.into() });
    let half = &hello[..hello.len() / 2];
    let endless = vec![b'x'; MAX_LINE + 4096];
    let old = to_line(&ToAgent::Hello { protocol: PROTOCOL - 1, host: host.into(), monitor })?;
    let mut messages: Vec<(&str, &str, Vec<u8>)> = vec![
        ("garbage", APP, b"\x00\xff\xfe\x80garbage\r\n".to_vec()),
        ("no message", APP, b"{}\n".to_vec()),
        ("half a line", APP, half.as_bytes().to_vec()),
        ("a line of half a message", APP, format!("{half}\n").into_bytes()),
        ("a line that is too long", APP, endless),
        ("another protocol", APP, old.into_bytes()),
        ("a hello for another host", APP, hello_of(other, monitor)?.into_bytes()),
        ("a hello of another monitor", APP, hello_of(host, !monitor)?.into_bytes()),
        ("an agent's hello from no agent's address", APP, (peer(host, other)? + &recorded.vouch).into_bytes()),
        ("an agent's hello from another agent's address", "db3", (peer(host, other)? + &recorded.vouch).into_bytes()),
        ("an agent's hello in the host's own name", APP, peer(host, host)?.into_bytes()),
        ("an agent's hello for another host", "db3", peer(other, "db3")?.into_bytes()),
        ("a hello of nobody", APP, peer(host, "db9")?.into_bytes()),
    ];
    for (what, line) in [
        ("a recorded order before any hello", &recorded.let_go),
        ("a recorded request to vouch before any hello", &recorded.vouch),
        ("a recorded report", &recorded.report),
    ] {
        messages.push((what, APP, line.clone().into_bytes()));
    }
    for (what, more) in [
        ("a second hello", hello.clone()),
        ("garbage after the hello", "garbage\n".to_owned()),
        ("a request to vouch from the monitor", recorded.vouch.clone()),
        ("half an order", format!("{}\n", &recorded.let_go[..recorded.let_go.len() / 2])),
    ] {
        messages.push((what, APP, (hello.clone() + &more).into_bytes()));
    }
    for (what, from, bytes) in &messages {
        let answer = send(lab, from, at, bytes)?;
        ensure!(answer.contains(r#""message":"refused""#), "{what} to the agent of {host}: {answer:?}");
    }
    // More than the places for those who have not said hello: some are shut out, and the monitor is not.
    let silent: Vec<TcpStream> = within(&lab.network().netns(APP), || {
        (0..40).map(|_| TcpStream::connect_timeout(&at, SOON)).collect::<Result<_, _>>()
    })??;
    ensure!(lab.must_control(&["show"])?.ok());
    drop(silent);
    let all = messages.len() as u64 + 1;
    std::thread::sleep(BETWEEN_LINES);
    send(lab, APP, at, format!("the last word to the agent of {host}\n").as_bytes())?;
    wait_counted(lab, host, "mmm_agentd", before + all)?;
    Ok(all)
}

/// The monitor's, which everybody can have heard who listens.
fn identity(lab: &Lab) -> Result<u64> {
    let file = lab.dir().join(MONITOR).join("mmm_mond.status.id");
    let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    Ok(u64::from_str_radix(text.trim(), 16)?)
}

fn attack_monitor(lab: &Lab, recorded: &Recorded) -> Result<u64> {
    let before = counted(lab, MONITOR, "mmm_mond")?;
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, MONITOR_PORT));
    let old = format!("{{\"protocol\":{},\"command\":{{\"verb\":\"set_passive\"}}}}\n", PROTOCOL - 1);
    let half = format!("{{\"protocol\":{PROTOCOL},\"command\":{{\"verb\":\"set_pass");
    let messages = [
        ("garbage", b"\x00\xff\xfe\x80garbage\r\n".to_vec()),
        ("no request", b"{}\n".to_vec()),
        ("half a line", half.clone().into_bytes()),
        ("a line of half a request", format!("{half}\n").into_bytes()),
        ("a line that is too long", vec![b'x'; MAX_LINE]),
        ("another protocol", old.into_bytes()),
        ("a recorded order", recorded.let_go.clone().into_bytes()),
        ("a recorded report", recorded.report.clone().into_bytes()),
        ("a recorded request to vouch", recorded.vouch.clone().into_bytes()),
    ];
    for (what, bytes) in &messages {
        let answer = send(lab, MONITOR, at, bytes)?;
        ensure!(answer.contains(r#""answer":"refused""#), "{what} to the monitor: {answer:?}");
    }
    let all = messages.len() as u64 + 1;
    std::thread::sleep(BETWEEN_LINES);
    send(lab, MONITOR, at, b"the last word to the monitor\n")?;
    wait_counted(lab, MONITOR, "mmm_mond", before + all)?;
    Ok(all)
}

/// Recorded orders over a connection that the agent must take for the monitor's. As they were, they have been overtaken;
/// with the number of a report that is still to come, their epochs tell.
fn pretend_to_be_the_monitor(lab: &Lab, recorded: &Recorded, writer: &str) -> Result<()> {
    for (host, line) in [(writer, &recorded.let_go), (other_master(writer), &recorded.hold)] {
        let at = SocketAddr::from((ip_of(host)?, AGENT_PORT));
        let hello = to_line(&ToAgent::Hello { protocol: PROTOCOL, host: host.into(), monitor: identity(lab)? })?;
        for order in [line, line, &as_if_new(line)?] {
            let answer = send(lab, APP, at, (hello.clone() + order).as_bytes())?;
            ensure!(answer.contains(r#""message":"hello""#), "the agent of {host} did not listen: {answer:?}");
        }
        wait_for(&format!("a word of the agent of {host} about the old epoch"), SOON, || {
            let log = log_of(lab, host, "mmm_agentd")?;
            let refusal = format!("Refused an order for writer({WRITER})");
            let said = log.lines().any(|l| l.contains(&refusal) && l.contains("is older than"));
            if said { Ok(()) } else { bail!("its log has no line with '{refusal}'") }
        })?;
        ensure!(lab.only_holder(WRITER.into())? == writer, "{host} believed a recorded order");
    }
    Ok(())
}

fn as_if_new(order: &str) -> Result<String> {
    match serde_json::from_str(order)? {
        ToAgent::Order(mut order) => {
            order.answers.seq += 1_000_000;
            Ok(to_line(&ToAgent::Order(order))?)
        }
        ToAgent::Hello { .. } | ToAgent::PeerHello { .. } | ToAgent::Vouch(_) | ToAgent::Examine { .. } => {
            bail!("no order: {order}")
        }
    }
}

/// From the right address: nothing is given for an epoch that is over.
fn replay_a_vouch(lab: &Lab, recorded: &Recorded, writer: &str) -> Result<()> {
    let other = other_master(writer);
    let hello = to_line(&ToAgent::PeerHello { protocol: PROTOCOL, host: other.into(), from: writer.into() })?;
    let at = SocketAddr::from((ip_of(other)?, AGENT_PORT));
    let heard = send(lab, writer, at, (hello + &recorded.vouch).as_bytes())?;
    let answers: Vec<FromAgent> = heard.lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    let role = IpAddr::V4(WRITER);
    let given = answers.iter().find_map(|a| match a {
        FromAgent::Vouch(answer) => Some(answer.vouched.contains_key(&role)),
        FromAgent::Hello { .. }
        | FromAgent::Report(_)
        | FromAgent::Examining { .. }
        | FromAgent::Examined(_)
        | FromAgent::Refused { .. } => None,
    });
    ensure!(given == Some(false), "an old request to vouch was answered: {heard}");
    Ok(())
}

/// Sends it from a host, says that there is no more, and gives what is answered until the other side closes or a second
/// is over.
fn send(lab: &Lab, from: &str, at: SocketAddr, bytes: &[u8]) -> Result<String> {
    /// An agent waits so long for a hello.
    const LISTEN: Duration = Duration::from_millis(1000);
    within(&lab.network().netns(from), || {
        // The writer's host has its own address before any role address.
        let mut stream = TcpStream::connect_timeout(&at, SOON).with_context(|| format!("connect to {at}"))?;
        stream.set_write_timeout(Some(SOON))?;
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        // The other side may have closed before it had everything: that is one way to refuse.
        let _ = stream.write_all(bytes);
        if !bytes.ends_with(b"\n") && bytes.len() < MAX_LINE {
            let _ = stream.shutdown(Shutdown::Write);
        }
        let (mut heard, end) = (Vec::new(), Instant::now() + LISTEN);
        let mut piece = [0; 4096];
        while Instant::now() < end && !String::from_utf8_lossy(&heard).contains(r#""refused""#) {
            match stream.read(&mut piece) {
                Ok(0) => break,
                Ok(n) => heard.extend(&piece[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(_) => break,
            }
        }
        Ok(String::from_utf8_lossy(&heard).into_owned())
    })?
}

/// The newest number of refusals in a daemon's log.
fn counted(lab: &Lab, host: &str, program: &str) -> Result<u64> {
    let log = log_of(lab, host, program)?;
    let number = |line: &str| line.split_once(" refused since the start)")?.0.rsplit_once('(')?.1.parse().ok();
    Ok(log.lines().rev().find_map(number).unwrap_or(0))
}

fn wait_counted(lab: &Lab, host: &str, program: &str, wanted: u64) -> Result<()> {
    wait_for(&format!("{wanted} refusals in the log of {program} on {host}"), SOON, || {
        match counted(lab, host, program)? {
            n if n >= wanted => Ok(()),
            n => bail!("it says {n}"),
        }
    })
}

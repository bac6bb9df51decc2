//! Faults by chance in the simulated world, by seed: the same number gives the same story, byte by byte.
//!
//! A time with faults, then one in which everything is whole again and the cluster must heal. The world looks at the
//! rules of safety after every event; what is looked at here is progress and data. It never uses real time.

use crate::world::{Kills, MONITOR, WRITER, World, config};
use mmm_common::config::Monitor as MonitorConfig;
use mmm_common::control::Command;
use mmm_common::ids::HostName;
use mmm_common::state::HostState;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// What may happen in a story.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What an operator asks for, and silences too short to fail over, with replication that lags and that no commit
    /// waits for: nothing may be lost, and no two servers are ever open together.
    Planned,
    /// One fault at a time, of every kind, healed before the next.
    Single,
    /// The network is cut in every way, and processes and machines stand still; nobody dies.
    Partition,
    /// Everything at once.
    Storm,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Planned, Kind::Single, Kind::Partition, Kind::Storm];

    pub fn by_name(name: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| format!("{kind:?}").eq_ignore_ascii_case(name))
    }
}

const HOSTS: [&str; 3] = ["db1", "db2", "db3"];
const MASTERS: u64 = 2;
const READERS: [&str; 3] = ["10.0.0.51", "10.0.0.52", "10.0.0.53"];
const STEPS: u64 = 12;
/// So long after the last fault every address is on a host and the writer is open.
const HEALED_WITHIN: u64 = 90_000;
/// An operator who does not give up asks for a stuck writer with --force after so long.
const FORCE_AFTER: u64 = 60_000;
/// In this long in peace nothing is saved, and the cores are not woken more often than `CALM_TICKS` times.
const PEACE: u64 = 5_000;
const CALM_TICKS: u64 = 500;
/// So short may a clock stand still: margin less the kernel's second and the drift of clocks over a lease.
const CLOCK_STANDS: u64 = 300;
/// The same for the margin of hosts with the exact guard.
const CLOCK_STANDS_GUARDED: u64 = 100;
/// The monitor is away for so long, and nobody notices.
const WITHOUT_MONITOR: u64 = 30_000;
const NOT_NOTICED: u64 = 300;

/// How a story went.
pub struct Told {
    pub seed: u64,
    pub kind: Kind,
    /// What did not hold, its name in capitals.
    pub broken: Option<String>,
    pub story: Vec<String>,
}

/// Tells one story.
pub fn tell(seed: u64, kind: Kind) -> Told {
    let mut w = world(seed, kind);
    // A broken rule of safety panics in the middle of the story, in the world or in a core.
    let end = catch_unwind(AssertUnwindSafe(|| happen(&mut w, kind)));
    let broken = match end {
        Ok(Ok(())) => None,
        Ok(Err(what)) => Some(what),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned()));
            Some(text.as_deref().and_then(|t| t.lines().next()).unwrap_or("PANIC without a word").to_owned())
        }
    };
    Told { seed, kind, broken, story: std::mem::take(&mut w.story) }
}

fn happen(w: &mut World, kind: Kind) -> Result<(), String> {
    begin(w);
    for step in 1..=STEPS {
        match kind {
            Kind::Planned => operate(w),
            Kind::Single => {
                if w.any(12) == 0 {
                    do_without_monitor(w)?;
                }
                fault(w);
                let ms = 200 + w.any(9_000);
                w.run(ms);
                heal(w);
            }
            Kind::Partition => disturb(w),
            Kind::Storm => fault(w),
        }
        let ms = if w.any(3) == 0 { w.any(8_000) } else { w.any(700) };
        w.run(ms);
        if step % 4 == 0 && kind != Kind::Planned {
            set_online(w);
        }
    }
    heal(w);
    let forced = get_whole(w)?;
    look_at_data(w, kind, forced)?;
    look_at_peace(w)
}

fn world(seed: u64, kind: Kind) -> World {
    let mut c = config(&HOSTS);
    // Who waits for an operator is set online below; flapping would only make that slower.
    c.flap_count = 0;
    c.cluster.drain_timeout = Duration::from_secs(5);
    if seed.is_multiple_of(2) {
        c.kill_host_bin = Some("/usr/local/sbin/kill_host".into());
    }
    let short = kind != Kind::Planned && shorten_leases(&mut c, seed);
    let mut w = World::by_chance(c, seed);
    w.jitter = [0, 20, 300, 900][w.any(4) as usize];
    if kind == Kind::Planned {
        w.lag = w.any(60);
        w.jitter = w.jitter.min(300);
        w.strict = true;
    } else {
        w.link_patience = [0, 500, 2_000, 5_000][w.any(4) as usize];
    }
    w.kills = Kills::Fail;
    w.slow_looks = [0, 0, 10, 80][w.any(4) as usize];
    let mut guards = w.any(3);
    if short {
        guards = 2;
        w.jitter = w.jitter.min(20);
        w.slow_looks = w.slow_looks.min(10);
    }
    for name in HOSTS {
        w.host(name).guarded = guards == 2 || (guards == 1 && w.any(2) == 0);
        // The one that the world has begun with has none.
        w.stop_agent(name);
        w.start_agent(&name.into());
    }
    if guards > 0 && kind != Kind::Planned {
        w.guard_fails = [0, 1, 20][w.any(3) as usize];
        w.guards_switch = guards == 1;
    }
    w
}

/// Leases that only the exact guard can end in time, on a network that is good enough for them.
fn shorten_leases(config: &mut MonitorConfig, seed: u64) -> bool {
    let (lease, heartbeat) = match seed / 4 % 6 {
        0 => (1_000, 200),
        1 => (300, 50),
        _ => return false,
    };
    config.cluster.lease_ttl = Duration::from_millis(lease);
    config.cluster.heartbeat_interval = Duration::from_millis(heartbeat);
    true
}

fn begin(w: &mut World) {
    w.run(4_000);
    for host in HOSTS {
        w.command(Command::SetOnline { host: host.into(), accept_lost: false });
        w.run(3_000);
    }
}

fn note(w: &mut World, text: &str) {
    w.tell(format!("==== {text}"));
}

fn ask(w: &mut World, command: Command) {
    note(w, &command.to_string());
    w.command(command);
}

fn move_writer(to: &str, force: bool) -> Command {
    Command::MoveRole { role: "writer".into(), host: to.into(), force }
}

fn operate(w: &mut World) {
    let host = HOSTS[w.any(3) as usize];
    match w.any(9) {
        0 => ask(w, Command::SetOffline { host: host.into() }),
        1 => set_online(w),
        2 => {
            note(w, &format!("restart agent {host}"));
            w.stop_agent(host);
            let ms = w.any(1_000);
            w.run(ms);
            w.start_agent(&host.into());
        }
        3 => {
            note(w, &format!("cut {host} for a moment"));
            w.cut.insert(host.into());
            let ms = w.any(1_000);
            w.run(ms);
            w.cut.clear();
        }
        4 => {
            note(w, "restart monitor");
            w.stop_monitor();
            let ms = w.any(500);
            w.run(ms);
            w.start_monitor();
        }
        _ => {
            let to = HOSTS[w.any(MASTERS) as usize];
            ask(w, move_writer(to, false));
        }
    }
}

/// The monitor is away while everybody else is well: the agents vouch for each other, and nobody notices.
fn do_without_monitor(w: &mut World) -> Result<(), String> {
    set_online(w);
    w.outage = 0;
    w.run(8_000);
    if !w.writer_is_open() || w.outage > NOT_NOTICED || w.now - w.last_write > NOT_NOTICED {
        return Ok(());
    }
    note(w, "the monitor is away for long, and nothing else happens");
    let writer = w.holders(WRITER).join(" ");
    w.stop_monitor();
    w.run(WITHOUT_MONITOR);
    let (outage, now) = (w.outage.max(w.now - w.last_write), w.holders(WRITER).join(" "));
    if outage > NOT_NOTICED || now != writer {
        return broken(w, &format!("NOTICED: no writes for {outage} ms, writer on {writer} and then on {now}"));
    }
    note(w, "start monitor");
    w.start_monitor();
    Ok(())
}

/// Cuts of every kind, and whatever stands still.
fn disturb(w: &mut World) {
    w.echo = [0, 0, 5, 30][w.any(4) as usize];
    let host = HOSTS[w.any(3) as usize];
    let other = HOSTS[w.any(3) as usize];
    let most = [500, 3_000, 8_000][w.any(3) as usize];
    let ms = 100 + w.any(most);
    match w.any(14) {
        0 => {
            note(w, &format!("cut {host}"));
            w.cut.insert(host.into());
        }
        1 | 2 => {
            note(w, &format!("isolate {host}: only clients reach it"));
            w.isolate(host);
        }
        3 => {
            note(w, &format!("cut {host} - monitor"));
            w.cut_between(host, MONITOR);
        }
        4 => {
            note(w, &format!("cut {host} -> monitor"));
            w.cut_way(host, MONITOR);
        }
        5 => {
            note(w, &format!("cut monitor -> {host}"));
            w.cut_way(MONITOR, host);
        }
        6 if host != other => {
            note(w, &format!("cut {host} - {other}"));
            w.cut_between(host, other);
        }
        7 if host != other => {
            note(w, &format!("cut {host} -> {other}"));
            w.cut_way(host, other);
        }
        8 if w.has_agent(host) && !w.is_paused(host) => {
            note(w, &format!("agent {host} is stopped for {ms} ms"));
            w.pause_agent(host);
            w.resume_agent_after(host, ms);
        }
        9 if w.is_alive(host) && !w.is_frozen(host) => {
            note(w, &format!("machine {host} stands still for {ms} ms"));
            w.freeze_host(host, true);
            w.wake_host_after(host, ms);
        }
        10 if w.is_alive(host) && !w.is_frozen(host) && w.clock_may_stand(host) => {
            let guarded = HOSTS.iter().any(|host| w.host(host).guarded);
            let ms = 1 + w.any(if guarded { CLOCK_STANDS_GUARDED } else { CLOCK_STANDS });
            note(w, &format!("machine {host} stands still for {ms} ms, and so does its clock"));
            w.freeze_host(host, false);
            w.wake_host_after(host, ms);
        }
        11 if w.has_monitor() && !w.monitor_is_paused() => {
            note(w, &format!("the monitor is stopped for {ms} ms"));
            w.pause_monitor();
            w.resume_monitor_after(ms);
        }
        _ => {
            note(w, "end cuts");
            w.end_cuts();
        }
    }
}

fn fault(w: &mut World) {
    w.kills = Kills::Chance;
    let host = HOSTS[w.any(3) as usize];
    let name = HostName::from(host);
    match w.any(36) {
        0 => {
            note(w, &format!("kill server {host}"));
            w.kill_server(host);
        }
        1 if w.is_alive(host) && !w.host(host).server.up => {
            note(w, &format!("start server {host}"));
            w.start_server(host);
        }
        2 if w.has_agent(host) => {
            note(w, &format!("kill agent {host}"));
            w.stop_agent(host);
        }
        3 if w.is_alive(host) && !w.has_agent(host) => {
            note(w, &format!("start agent {host}"));
            w.start_agent(&name);
        }
        4 if w.has_agent(host) => {
            note(w, &format!("restart agent {host}"));
            w.stop_agent(host);
            let ms = w.any(3_000);
            w.run(ms);
            w.start_agent(&name);
        }
        5 if w.has_monitor() => {
            note(w, "stop monitor");
            w.stop_monitor();
        }
        6 if !w.has_monitor() => {
            note(w, "start monitor");
            w.start_monitor();
        }
        7 if w.has_monitor() => {
            note(w, "restart monitor");
            w.stop_monitor();
            let ms = w.any(2_000);
            w.run(ms);
            w.start_monitor();
        }
        8 if w.any(3) == 0 => {
            note(w, "the monitor loses its disk");
            if w.has_monitor() {
                w.stop_monitor();
            }
            w.forget_status();
            let ms = 1_000 + w.any(2_000);
            w.run(ms);
            w.start_monitor();
        }
        9 | 10 => {
            note(w, &format!("cut {host}"));
            w.cut.insert(name);
        }
        11 | 12 => {
            note(w, "end cuts");
            w.end_cuts();
        }
        13 => {
            note(w, &format!("hang server {host}"));
            let now = w.now;
            w.host(host).server.hung_since.get_or_insert(now);
        }
        14 => {
            note(w, &format!("server {host} goes on"));
            w.host(host).server.hung_since = None;
        }
        15 => ask(w, Command::SetOffline { host: name }),
        16 => set_online(w),
        17 => {
            let to = HOSTS[w.any(MASTERS) as usize];
            ask(w, move_writer(to, false));
        }
        18 if w.is_alive(host) => {
            note(w, &format!("crash host {host}"));
            w.crash_host(host);
        }
        19 => {
            w.network = !w.network;
            let text = format!("the monitor's own network works: {}", w.network);
            note(w, &text);
        }
        20 => {
            note(w, &format!("{host} fetches no more"));
            w.host(host).server.io = false;
        }
        21 => {
            note(w, &format!("{host} can apply no more"));
            w.refuse_sql(host);
        }
        22 if w.is_alive(host) => {
            note(w, &format!("reboot host {host}"));
            w.crash_host(host);
            let ms = w.any(3_000);
            w.run(ms);
            if !w.is_alive(host) {
                w.boot_host(host);
            }
        }
        23..=32 => disturb(w),
        // What is chosen and cannot be done now is a time without a fault.
        _ => {
            let ms = w.any(3_000);
            w.run(ms);
        }
    }
}

/// Ends every fault.
fn heal(w: &mut World) {
    note(w, "heal all");
    w.end_cuts();
    w.end_kills();
    w.network = true;
    w.echo = 0;
    w.guard_fails = 0;
    w.resume_monitor();
    for host in HOSTS {
        w.wake_host(host);
        w.resume_agent(host);
        let server = &mut w.host(host).server;
        (server.hung_since, server.sql_refuses, server.io) = (None, false, true);
        if !w.is_alive(host) {
            w.boot_host(host);
        }
        if !w.host(host).server.up {
            w.start_server(host);
        }
        if !w.has_agent(host) {
            w.start_agent(&host.into());
        }
    }
    if !w.has_monitor() {
        w.start_monitor();
    }
}

/// What an operator does: whoever waits is set online.
fn set_online(w: &mut World) {
    for host in HOSTS {
        let state = w.saved().and_then(|s| s.hosts.get(&HostName::from(host))).map(|h| h.state);
        if matches!(state, Some(HostState::AdminOffline | HostState::AwaitingRecovery)) {
            let answer = w.text(Command::SetOnline { host: host.into(), accept_lost: false });
            note(w, &format!("set_online {host}: {}", answer.trim()));
        }
    }
}

/// True if that needed an operator who takes a loss.
fn get_whole(w: &mut World) -> Result<bool, String> {
    w.command(Command::SetActive);
    let begin = w.now;
    let mut forced = false;
    let mut since = None;
    while w.now - begin < HEALED_WITHIN {
        set_online(w);
        if w.now - begin >= FORCE_AFTER && !w.writer_is_open() {
            forced = true;
            for to in &HOSTS[..MASTERS as usize] {
                ask(w, move_writer(to, true));
            }
        }
        w.run(1_000);
        if !(w.writer_is_open() && READERS.iter().all(|ip| w.holders(ip).len() == 1)) {
            since = None;
        } else if w.now - *since.get_or_insert(w.now) >= 8_000 {
            return Ok(forced);
        }
    }
    let show = w.show();
    broken(w, &format!("NOT HEALED\n{show}"))
}

fn look_at_data(w: &mut World, kind: Kind, forced: bool) -> Result<(), String> {
    w.writing = false;
    w.run(3_000);
    w.writing = true;
    let writer = w.holders(WRITER).first().map_or("nobody", |h| h).to_owned();
    match kind {
        Kind::Planned => {
            let lost: Vec<usize> = HOSTS.iter().map(|h| w.lost_on(h)).collect();
            if lost.iter().any(|n| *n > 0) {
                return broken(w, &format!("LOST: the hosts lack {lost:?} of {} writes", w.acknowledged.len()));
            }
        }
        Kind::Single => {
            let lost = w.lacks(&writer, &w.secured);
            if lost > 0 || forced {
                return broken(
                    w,
                    &format!("LOST: {writer} lacks {lost} of {} secured writes, forced: {forced}", w.secured.len()),
                );
            }
        }
        // Two at a time can take what only these two had.
        Kind::Partition | Kind::Storm => {}
    }
    Ok(())
}

/// In a healthy cluster nothing is saved, the cores sleep, and replicas follow the writer.
fn look_at_peace(w: &mut World) -> Result<(), String> {
    w.run(10_000);
    // A job that failed a minute ago is begun again, which is saved: in one of two windows at most.
    for _ in 0..2 {
        (w.saves, w.ticks) = (0, 0);
        w.run(PEACE);
        if w.saves == 0 {
            break;
        }
    }
    if w.saves > 0 {
        return broken(w, &format!("SAVES: {} in {PEACE} ms of peace", w.saves));
    }
    if w.ticks > CALM_TICKS {
        return broken(w, &format!("TICKS: {} in {PEACE} ms of peace", w.ticks));
    }
    let writer = w.holders(WRITER).first().map(|h| HostName::from(*h));
    let show = w.show();
    // Who has transactions that others lack waits for a re-clone and follows nobody; neither does the writer follow it.
    let diverged = |host: &str| show.contains(&format!("host {host} has "));
    for host in HOSTS.iter().filter(|h| Some(HostName::from(**h)) != writer && !diverged(h)) {
        let server = w.host(host).server.clone();
        if server.source != writer || !server.io || !server.sql {
            return broken(w, &format!("NOT FOLLOWED: {host} follows {:?}, io {}\n{show}", server.source, server.io));
        }
    }
    Ok(())
}

fn broken<T>(w: &mut World, what: &str) -> Result<T, String> {
    note(w, what.lines().next().unwrap_or_default());
    Err(what.to_owned())
}

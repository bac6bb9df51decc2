//! Faults by chance in the simulated world, by seed: the same number gives the same story, byte by byte.
//!
//! A time with faults, then one in which everything is whole again and the cluster must heal. The world looks at the
//! rules of safety after every event and panics; what is looked at here is progress and data. It never uses real time.

use crate::world::{WRITER, World, config};
use mmm_common::control::Command;
use mmm_common::ids::HostName;
use mmm_common::state::HostState;
use std::time::Duration;

/// What may happen in a story.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What an operator asks for, and silences too short to fail over, with replication that lags and that no commit
    /// waits for: nothing may be lost, and no two servers are ever open together.
    Planned,
    /// One fault at a time, of every kind, healed before the next.
    Single,
    /// Everything at once.
    Storm,
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

/// Tells one story. An error says what did not hold, in its first line and in capitals, with the story.
pub fn run(seed: u64, kind: Kind) -> Result<(), String> {
    let mut w = begin(seed, kind);
    for step in 1..=STEPS {
        match kind {
            Kind::Planned => operate(&mut w),
            Kind::Single => {
                fault(&mut w);
                let ms = 200 + w.any(9_000);
                w.run(ms);
                heal(&mut w);
            }
            Kind::Storm => fault(&mut w),
        }
        let ms = if w.any(3) == 0 { w.any(8_000) } else { w.any(700) };
        w.run(ms);
        if step % 4 == 0 && kind != Kind::Planned {
            set_online(&mut w);
        }
    }
    heal(&mut w);
    let forced = get_whole(&mut w)?;
    look_at_data(&mut w, kind, forced)?;
    look_at_peace(&mut w)
}

fn begin(seed: u64, kind: Kind) -> World {
    let mut c = config(&HOSTS);
    // Who waits for an operator is set online below; flapping would only make that slower.
    c.flap_count = 0;
    c.cluster.drain_timeout = Duration::from_secs(5);
    let mut w = World::with(c);
    w.chance = seed;
    w.jitter = [0, 20, 300, 900][w.any(4) as usize];
    if kind == Kind::Planned {
        w.lag = w.any(60);
        w.jitter = w.jitter.min(300);
        w.strict = true;
    }
    w.slow_looks = [0, 0, 10, 80][w.any(4) as usize];
    w.run(4_000);
    for host in HOSTS {
        w.command(Command::SetOnline { host: host.into() });
        w.run(3_000);
    }
    w
}

fn note(w: &mut World, text: &str) {
    let at = (w.now - (1 << 40)) as f64 / 1000.0;
    w.story.push(format!("{at:>9.3} ==== {text}"));
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

fn fault(w: &mut World) {
    let host = HOSTS[w.any(3) as usize];
    let name = HostName::from(host);
    match w.any(22) {
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
            w.cut.clear();
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
    w.cut.clear();
    w.network = true;
    for host in HOSTS {
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
            let answer = w.text(Command::SetOnline { host: host.into() });
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
        Kind::Storm => {}
    }
    Ok(())
}

/// In a healthy cluster nothing is saved, the cores sleep, and replicas follow the writer.
fn look_at_peace(w: &mut World) -> Result<(), String> {
    w.run(10_000);
    (w.saves, w.ticks) = (0, 0);
    w.run(PEACE);
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

fn broken<T>(w: &World, what: &str) -> Result<T, String> {
    Err(format!("{what}\n{}", w.story.join("\n")))
}

//! Starting, stopping and killing the database server.
//!
//! Whether it runs is told by the files that processes hold open below the datadir: a pid file may be old, and a unit
//! may not be the one that runs. Only what uses the datadir, or what the pid file names and is a database server, is
//! ever killed.

use crate::child::shell;
use crate::datadir::{Places, users_of};
use crate::places;
use mmm_common::config::Agent as Config;
use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// For the command to end. Crash recovery may be part of it.
const START: Duration = Duration::from_secs(600);
/// A clean shutdown of a server with a large pool writes it all out.
const STOP: Duration = Duration::from_secs(600);
const KILL: Duration = Duration::from_secs(30);
/// The units that servers come with.
const UNITS: [&str; 3] = ["mariadb", "mysql", "mysqld"];

pub(crate) fn start(config: &Config) -> Result<(), String> {
    let users = places(config).map(|p| p.users()).unwrap_or_default();
    if !users.is_empty() {
        tracing::info!("the server runs already: processes {users:?}");
        return Ok(());
    }
    let until = Instant::now() + START;
    match &config.server.start_command {
        Some(command) => shell("mysql_start_command", Command::new("/bin/sh").args(["-c", command]), until),
        None => shell("systemctl start", Command::new("systemctl").args(["start", unit()?]), until),
    }
}

/// The command is run also when nothing runs: it ends a restart that systemd may have in mind. What counts is that
/// nothing uses the datadir in the end.
pub(crate) fn stop(config: &Config) -> Result<(), String> {
    let until = Instant::now() + STOP;
    let stopped = match &config.server.stop_command {
        Some(command) => shell("mysql_stop_command", Command::new("/bin/sh").args(["-c", command]), until),
        None => unit().and_then(|unit| shell("systemctl stop", Command::new("systemctl").args(["stop", unit]), until)),
    };
    match (places(config), stopped) {
        (Ok(places), Ok(())) => wait_unused(&places, until),
        (Ok(places), Err(why)) if places.users().is_empty() => {
            tracing::warn!("nothing uses {}, so this is no failure: {why}", places.datadir.display());
            Ok(())
        }
        // Without a datadir the command's word has to do.
        (Ok(_) | Err(_), stopped) => stopped,
    }
}

pub(crate) fn kill(config: &Config) -> Result<(), String> {
    let until = Instant::now() + KILL;
    let places = places(config).ok();
    let mut victims = places.as_ref().map(|p| p.users()).unwrap_or_default();
    if let Some(pid) = config.server.pid_file.as_deref().and_then(server_in) {
        victims.push(pid);
    }
    victims.sort_unstable();
    victims.dedup();
    if victims.is_empty() {
        if config.server.start_command.is_some() || places.is_some() {
            tracing::info!("no server runs");
            return Ok(());
        }
        return shell("systemctl kill", Command::new("systemctl").args(["kill", "-s", "KILL", unit()?]), until);
    }
    for pid in &victims {
        tracing::warn!("killing process {pid}");
        send(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).map_err(|e| format!("killing process {pid}: {e}"))?;
    }
    match &places {
        Some(places) => wait_unused(places, until),
        None => Ok(()),
    }
}

fn wait_unused(places: &Places, until: Instant) -> Result<(), String> {
    loop {
        let users = places.users();
        if users.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(format!("the server still runs: processes {users:?} use {}", places.datadir.display()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What the pid file names, if that is a database server.
fn server_in(pid_file: &Path) -> Option<u32> {
    let pid: u32 = fs::read_to_string(pid_file).ok()?.trim().parse().ok()?;
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
    let is_server = line.split('\0').take(6).any(|word| {
        let name = word.rsplit('/').next().unwrap_or(word);
        name == "mysqld" || name == "mariadbd"
    });
    is_server.then_some(pid)
}

fn unit() -> Result<&'static str, String> {
    let known = |unit: &&'static str| {
        let mut look = Command::new("systemctl");
        look.args(["cat", &format!("{unit}.service")]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        look.status().is_ok_and(|status| status.success())
    };
    UNITS.into_iter().find(known).ok_or_else(|| {
        "systemd has no unit mariadb, mysql or mysqld; set mysql_start_command and mysql_stop_command in [agent] of \
         mmm_agent.toml"
            .to_owned()
    })
}

/// Refuses while anything uses the folder.
pub(crate) fn must_not_run(datadir: &Path) -> Result<(), String> {
    let users = users_of(datadir);
    if users.is_empty() {
        Ok(())
    } else {
        Err(format!("processes {users:?} use {}: the server runs, so its data are left alone", datadir.display()))
    }
}

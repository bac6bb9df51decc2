//! Starting, stopping and killing the database server.
//!
//! Whether it runs is told by the files that database servers hold open below the datadir: a pid file may be old, and a
//! unit may not be the one that runs. Others read there too, such as what ships a log: they are neither waited for nor
//! killed, but while they do nothing is renamed. Only a database server that uses the datadir, or that the pid file
//! names, is ever killed.

use crate::child::{Late, shell};
use crate::datadir::Places;
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
    let servers = places(config).map(|p| p.servers()).unwrap_or_default();
    if !servers.is_empty() {
        tracing::info!("the server runs already: processes {servers:?}");
        return Ok(());
    }
    let until = Instant::now() + START;
    match &config.server.start_command {
        Some(command) => {
            shell("mysql_start_command", Command::new("/bin/sh").args(["-c", command]), until, Late::LeaveStarted)
        }
        None => shell("systemctl start", Command::new("systemctl").args(["start", unit()?]), until, Late::KillAll),
    }
}

/// The command is run also when nothing runs: it ends a restart that systemd may have in mind. What counts is that
/// no server uses the datadir in the end.
pub(crate) fn stop(config: &Config) -> Result<(), String> {
    let until = Instant::now() + STOP;
    let stopped = match &config.server.stop_command {
        Some(command) => {
            shell("mysql_stop_command", Command::new("/bin/sh").args(["-c", command]), until, Late::KillAll)
        }
        None => unit().and_then(|unit| {
            shell("systemctl stop", Command::new("systemctl").args(["stop", unit]), until, Late::KillAll)
        }),
    };
    match (places(config), stopped) {
        (Ok(places), Ok(())) => wait_ended(&places, until),
        (Ok(places), Err(why)) if places.servers().is_empty() => {
            tracing::warn!("no server uses {}, so this is no failure: {why}", places.datadir.display());
            Ok(())
        }
        // Without a datadir the command's word has to do.
        (Ok(_) | Err(_), stopped) => stopped,
    }
}

pub(crate) fn kill(config: &Config) -> Result<(), String> {
    let until = Instant::now() + KILL;
    let places = places(config).ok();
    let mut victims = places.as_ref().map(|p| p.servers()).unwrap_or_default();
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
        let mut command = Command::new("systemctl");
        return shell("systemctl kill", command.args(["kill", "-s", "KILL", unit()?]), until, Late::KillAll);
    }
    for pid in &victims {
        tracing::warn!("killing process {pid}");
        send(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).map_err(|e| format!("killing process {pid}: {e}"))?;
    }
    match &places {
        Some(places) => wait_ended(places, until),
        None => Ok(()),
    }
}

fn wait_ended(places: &Places, until: Instant) -> Result<(), String> {
    loop {
        let servers = places.servers();
        if servers.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(format!("the server still runs: processes {servers:?} use {}", places.datadir.display()));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What the pid file names, if that is a database server.
fn server_in(pid_file: &Path) -> Option<u32> {
    fs::read_to_string(pid_file).ok()?.trim().parse().ok().filter(|pid| is_server(*pid))
}

fn is_server(pid: u32) -> bool {
    // It may begin with what has started the server.
    command_line(pid).split('\0').take(6).any(|word| {
        let name = word.rsplit('/').next().unwrap_or(word);
        name == "mysqld" || name == "mariadbd"
    })
}

/// For a process that has files of the datadir open. One that is ending has them for longer than its command line (a
/// large pool takes seconds to be given back), and may be the server.
pub(crate) fn may_be_server(pid: u32) -> bool {
    is_server(pid) || command_line(pid).is_empty()
}

fn command_line(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_ending_may_be_the_server() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let until = Instant::now() + Duration::from_secs(10);
        let becomes = |maybe: bool| {
            while may_be_server(pid) != maybe {
                assert!(Instant::now() < until, "{:?}", command_line(pid));
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        // A process that is just beginning has none either.
        becomes(false);
        child.kill().unwrap();
        becomes(true);
        assert!(!is_server(pid));
        child.wait().unwrap();
    }
}

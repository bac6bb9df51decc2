//! The servers' own binary log tools: where they are, how they log in, and their output line by line.
//!
//! They read over a connection as the replication user, so the agent needs no right to the server's files. The password
//! stands in a file that only this user can read, never on a command line. They run on a thread of their own: reading
//! gigabytes must not hold up the loop that fences.

use super::sql::Dialect;
use mmm_common::config::Host;
use mmm_common::epoch::Epoch;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

/// The folder of a job begins so; its number follows.
const FOLDER: &str = "job.";

/// Removes what an agent that was killed has left: passwords are in it.
pub(super) fn clear(state_folder: &Path) {
    let Ok(entries) = fs::read_dir(state_folder) else { return };
    for left in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(FOLDER)) {
        if let Err(e) = fs::remove_dir_all(left.path()) {
            tracing::warn!("{} was left: {e}", left.path().display());
        }
    }
}

/// A program that prints binary logs, and how to log in. Its option file is gone with this.
pub(super) struct Tool {
    program: PathBuf,
    options: PathBuf,
    host: String,
    port: u16,
    folder: PathBuf,
}

/// Set when nobody wants the result any more.
#[derive(Clone, Default)]
pub(super) struct Cancelled(Arc<AtomicBool>);

impl Cancelled {
    pub(super) fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Whether to go on reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Go {
    On,
    Enough,
}

impl Tool {
    /// `folder`: of this agent's own, for the option file. `basedir`: the server's, whose programs are looked at after
    /// those in the PATH.
    pub(super) fn find(
        dialect: Dialect,
        host: &Host,
        basedir: &str,
        folder: &Path,
        job: Epoch,
    ) -> Result<Tool, String> {
        let (names, package): (&[&str], _) = match dialect {
            Dialect::MariaDb => (&["mariadb-binlog", "mysqlbinlog"], "mariadb-client (or mariadb-server)"),
            Dialect::MySql => (&["mysqlbinlog"], "mysql-client-core (or mysql-community-client)"),
        };
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders: Vec<PathBuf> = std::env::split_paths(&path).chain([Path::new(basedir).join("bin")]).collect();
        let program = names
            .iter()
            .flat_map(|name| folders.iter().map(move |folder| folder.join(name)))
            .find(|program| program.is_file())
            .ok_or_else(|| {
                format!("the program {} is not installed on this host; it comes in the package {package}", names[0])
            })?;
        let folder = folder.join(format!("{FOLDER}{job}"));
        let options = folder.join("login.cnf");
        let write = || -> io::Result<()> {
            if folder.exists() {
                fs::remove_dir_all(&folder)?;
            }
            fs::DirBuilder::new().mode(0o700).create(&folder)?;
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&options)?;
            file.write_all(login(dialect, host).as_bytes())
        };
        write().map_err(|e| format!("writing {}: {e}", options.display()))?;
        Ok(Tool { program, options, host: host.ip.to_string(), port: host.mysql_port, folder })
    }

    /// Reads these files of the server, in order.
    pub(super) fn command(&self, arguments: &[String], files: &[String]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg(format!("--defaults-file={}", self.options.display()))
            .args(["--read-from-remote-server", "--protocol=tcp"])
            .args([format!("--host={}", self.host), format!("--port={}", self.port)])
            .args(arguments)
            .args(files);
        command
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.folder) {
            tracing::warn!("{} was left: {e}", self.folder.display());
        }
    }
}

fn login(dialect: Dialect, host: &Host) -> String {
    let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    // The server is this host's own: its certificate and key need not be known beforehand.
    let trust = match dialect {
        Dialect::MariaDb => "loose-disable-ssl-verify-server-cert",
        Dialect::MySql => "get-server-public-key",
    };
    format!(
        "[client]\nuser=\"{}\"\npassword=\"{}\"\n{trust}\n",
        quoted(&host.replication_user),
        quoted(&host.replication_password.0)
    )
}

/// Runs the tool and hands on its lines. Blocks; ends it at the deadline and when it is cancelled.
pub(super) fn lines(
    mut command: Command,
    until: Instant,
    cancelled: &Cancelled,
    mut take: impl FnMut(&[u8]) -> Result<Go, String>,
) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut running = Running(child.map_err(|e| format!("{name} cannot be started: {e}"))?);
    let (Some(stdout), Some(stderr)) = (running.0.stdout.take(), running.0.stderr.take()) else {
        return Err(format!("{name}: no pipes"));
    };
    let said = std::thread::spawn(move || end_of(stderr));
    let mut from = BufReader::with_capacity(64 * 1024, Patient { stdout, until, cancelled: cancelled.clone() });
    let mut line = Vec::new();
    loop {
        line.clear();
        match from.read_until(b'\n', &mut line) {
            Ok(0) => break,
            Ok(_) => {}
            Err(e) => return Err(format!("{name}: {e}")),
        }
        match take(&line)? {
            Go::On => {}
            Go::Enough => return Ok(()),
        }
    }
    let status = running.0.wait().map_err(|e| format!("{name} cannot be waited for: {e}"))?;
    let said = last_lines(said);
    if status.success() { Ok(()) } else { Err(format!("{name} ended with {status}: {said}")) }
}

/// Killed when dropped; one that has ended and was waited for does not mind.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn end_of(mut stderr: ChildStderr) -> Vec<u8> {
    let (mut kept, mut bytes) = (Vec::new(), [0; 4096]);
    while let Ok(n) = stderr.read(&mut bytes) {
        if n == 0 {
            break;
        }
        kept.extend_from_slice(&bytes[..n]);
        if kept.len() > 8192 {
            kept.drain(..kept.len() - 4096);
        }
    }
    kept
}

fn last_lines(said: JoinHandle<Vec<u8>>) -> String {
    let said = said.join().unwrap_or_default();
    let text = String::from_utf8_lossy(&said);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    lines.iter().rev().take(2).rev().copied().collect::<Vec<_>>().join(" | ")
}

/// Reads with a deadline.
struct Patient {
    stdout: ChildStdout,
    until: Instant,
    cancelled: Cancelled,
}

impl Read for Patient {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.cancelled.0.load(Ordering::Relaxed) {
                return Err(io::Error::other("ended: another job came"));
            }
            if Instant::now() >= self.until {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it took too long and was ended"));
            }
            let mut fds = [PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(500u16))? > 0 {
                return self.stdout.read(buffer);
            }
        }
    }
}

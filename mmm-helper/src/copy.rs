//! MariaDB's data on the way from one host to another: mariadb-backup at the donor writes a stream, mbstream at the
//! recipient unpacks it beside the datadir, and mariadb-backup makes it ready to run. (MySQL's servers copy each other by
//! themselves, with the clone plugin.)
//!
//! Neither server is stopped for it. Nothing of what is there at the recipient is touched here.

use crate::child::{self, Asker, Running};
use crate::datadir::Places;
use crate::places;
use mmm_common::config::{Agent as Config, Host};
use mmm_common::gtid::MariaGtids;
use mmm_helper::frames::{self, Next};
use mmm_helper::{Answer, socket_path};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::statvfs::statvfs;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

const BACKUP: &str = "mariadb-backup";
const UNPACK: &str = "mbstream";
const PACKAGE: &str = "mariadb-backup";
/// A stream that stands still for so long has broken. A donor may wait for locks before it goes on.
const STANDSTILL: Duration = Duration::from_secs(300);
/// For making a copy ready to run.
const PREPARE: Duration = Duration::from_secs(4 * 3600);
/// From the end of the data to the end of the program.
const LAST_WORDS: Duration = Duration::from_secs(300);
/// The file in a copy that names its position; its old name and its new one.
const POSITION: [&str; 2] = ["mariadb_backup_binlog_info", "xtrabackup_binlog_info"];

/// Whether the programs are there.
pub(crate) fn has_tools() -> Result<(), String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = |name: &str| std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
    match [BACKUP, UNPACK].into_iter().find(|name| !there(name)) {
        Some(name) => Err(format!("the program {name} is not installed; it comes in the package {PACKAGE}")),
        None => Ok(()),
    }
}

pub(crate) fn donate(config: &Config, asker: &Asker) -> Result<(), String> {
    let places = places(config)?;
    has_tools()?;
    let host = config.cluster.hosts.get(&config.this).ok_or_else(|| format!("there is no [host.{}]", config.this))?;
    let logins = Logins::write(config, host).map_err(|e| format!("writing the login of {BACKUP}: {e}"))?;
    let mut command = Command::new(BACKUP);
    command.arg(format!("--defaults-extra-file={}", logins.file().display()));
    command.args(["--backup", "--stream=mbstream"]);
    command.arg(format!("--target-dir={}", logins.0.display()));
    command.arg(format!("--datadir={}", places.datadir.display()));
    match &config.mysql_socket {
        Some(socket) => command.arg(format!("--socket={}", socket.display())),
        None => {
            command.args(["--protocol=tcp", &format!("--host={}", host.ip), &format!("--port={}", host.mysql_port)])
        }
    };
    let mut running = Running::start(command.stdin(Stdio::null()).stdout(Stdio::piped()), PACKAGE)?;
    let mut data = running.child.stdout.take().ok_or("no pipe to the backup program")?;
    let bytes = size_of(&places.datadir);
    child::tell(asker.0, &Answer::Go { bytes }).map_err(|e| format!("the recipient has gone: {e}"))?;
    let mut to = asker.0;
    let sent = match send(&mut data, asker) {
        Ok(sent) => running.wait(Instant::now() + LAST_WORDS, asker).map(|()| sent),
        Err(why) => Err(format!("{why} ({BACKUP}: {})", running.end())),
    };
    match &sent {
        Ok(sent) => {
            tracing::info!("{sent} bytes were sent");
            frames::write_end(&mut to)
        }
        Err(why) => frames::write_failed(&mut to, &with_grants(why, host)),
    }
    .map_err(|e| format!("the recipient has gone: {e}"))?;
    sent.map(drop)
}

fn send(data: &mut ChildStdout, asker: &Asker) -> Result<u64, String> {
    let mut buffer = vec![0; frames::MAX_FRAME];
    let (mut sent, mut last, mut to) = (0, Instant::now(), asker.0);
    loop {
        let mut fds = [PollFd::new(data.as_fd(), PollFlags::POLLIN), PollFd::new(asker.0.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::from(1000u16)).map_err(|e| e.to_string())?;
        let [ready, gone] = fds.map(|fd| fd.any().unwrap_or_default());
        if gone {
            return Err("the recipient has gone".to_owned());
        }
        if !ready {
            if last.elapsed() > STANDSTILL {
                return Err(format!("nothing came for {} s", STANDSTILL.as_secs()));
            }
            continue;
        }
        let n = data.read(&mut buffer).map_err(|e| e.to_string())?;
        if n == 0 {
            return Ok(sent);
        }
        frames::write_data(&mut to, &buffer[..n]).map_err(|e| format!("the recipient does not take it: {e}"))?;
        last = Instant::now();
        sent += n as u64;
    }
}

pub(crate) fn receive(config: &Config, expected: u64, asker: &Asker) -> Result<Answer, String> {
    let places = places(config)?;
    places.can_receive()?;
    has_tools()?;
    let parent = places.datadir.parent().unwrap_or(Path::new("/"));
    let free = free_below(parent).map_err(|e| format!("asking for the free space of {}: {e}", parent.display()))?;
    if expected > free {
        return Err(format!(
            "the copy needs about {} MiB beside {}, and {} MiB are free there",
            expected >> 20,
            places.datadir.display(),
            free >> 20
        ));
    }
    places.begin()?;
    let received = receive_into(&places, asker);
    if received.is_err()
        && let Err(why) = fs::remove_dir_all(&places.new)
    {
        tracing::warn!("the half copy {} was left: {why}", places.new.display());
    }
    received.map(|gtid_position| Answer::Received { gtid_position })
}

fn receive_into(places: &Places, asker: &Asker) -> Result<String, String> {
    let mut unpack = Command::new(UNPACK);
    unpack.arg("-x").arg("-C").arg(&places.new).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut running = Running::start(&mut unpack, PACKAGE)?;
    let mut to = running.child.stdin.take().ok_or("no pipe to the program that unpacks")?;
    asker.0.set_read_timeout(Some(STANDSTILL)).map_err(|e| e.to_string())?;
    child::tell(asker.0, &Answer::Go { bytes: 0 }).map_err(|e| format!("the agent has gone: {e}"))?;
    match unpack_all(asker, &mut to) {
        Ok(bytes) => tracing::info!("{bytes} bytes were received"),
        // The program's words say more than "broken pipe": a full disk, mostly.
        Err(Broken::Unpacking(e)) => return Err(format!("unpacking failed ({e}): {}", running.end())),
        Err(Broken::Stream(why)) => return Err(why),
    }
    drop(to);
    running.wait(Instant::now() + LAST_WORDS, asker)?;
    asker.step("making the copy ready to run");
    let mut prepare = Command::new(BACKUP);
    prepare.arg("--prepare").arg(format!("--target-dir={}", places.new.display()));
    let running = Running::start(prepare.stdin(Stdio::null()).stdout(Stdio::null()), PACKAGE)?;
    running.wait(Instant::now() + PREPARE, asker)?;
    let position = position_of(&places.new)?;
    // Notes of the backup, and an option file that nothing reads.
    for entry in fs::read_dir(&places.new).map_err(|e| e.to_string())?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if ["xtrabackup_", "mariadb_backup_", "backup-my.cnf"].iter().any(|note| name.starts_with(note)) {
            fs::remove_file(entry.path()).map_err(|e| format!("removing {name}: {e}"))?;
        }
    }
    places.finish()?;
    Ok(position)
}

enum Broken {
    Stream(String),
    Unpacking(io::Error),
}

fn unpack_all(asker: &Asker, to: &mut impl Write) -> Result<u64, Broken> {
    let (mut from, mut buffer, mut bytes) = (asker.0, Vec::new(), 0);
    loop {
        match frames::read(&mut from, &mut buffer) {
            Ok(Next::Data(_)) => to.write_all(&buffer).map_err(Broken::Unpacking)?,
            Ok(Next::End) => return Ok(bytes),
            Ok(Next::Failed(why)) => return Err(Broken::Stream(format!("the donor failed: {why}"))),
            Err(e) => {
                return Err(Broken::Stream(format!("the stream broke off after {} MiB: {e}", bytes >> 20)));
            }
        }
        bytes += buffer.len() as u64;
    }
}

/// The GTID position that the backup noted.
fn position_of(copy: &Path) -> Result<String, String> {
    let text = POSITION.iter().find_map(|name| fs::read_to_string(copy.join(name)).ok()).ok_or_else(|| {
        "the copy does not tell its position: is the donor's binary log switched on (log_bin)?".to_owned()
    })?;
    // File, offset and GTIDs with tabs between; a long list of GTIDs may go on in further lines.
    let gtids = text.split_once('\t').and_then(|(_, rest)| rest.split_once('\t')).map_or("", |(_, gtids)| gtids);
    let gtids: String = gtids.split_whitespace().collect();
    match gtids.parse::<MariaGtids>() {
        Ok(_) if !gtids.is_empty() => Ok(gtids),
        Ok(_) => Err("the copy's position has no GTID: the donor has not written or replicated one yet".to_owned()),
        Err(e) => Err(format!("the copy's position is not understood: {e}")),
    }
}

fn free_below(folder: &Path) -> io::Result<u64> {
    let about = statvfs(folder)?;
    Ok(about.blocks_available() * about.fragment_size())
}

/// About what a backup of the folder has: everything but binary and relay logs, by what they look like.
fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .filter_map(|entry| Some((entry.path(), entry.metadata().ok()?)))
        .map(|(path, meta)| match path.extension().and_then(|e| e.to_str()) {
            _ if meta.is_dir() => size_of(&path),
            Some(number) if number.len() >= 6 && number.bytes().all(|b| b.is_ascii_digit()) => 0,
            Some(_) | None => std::os::unix::fs::MetadataExt::blocks(&meta) * 512,
        })
        .sum()
}

fn with_grants(why: &str, host: &Host) -> String {
    if !["privilege", "denied", "Access"].iter().any(|word| why.contains(word)) {
        return why.to_owned();
    }
    format!(
        "{why}; the user '{}' of the donor needs: GRANT RELOAD, PROCESS, LOCK TABLES, BINLOG MONITOR, SLAVE MONITOR ON \
         *.* TO …",
        host.agent_user
    )
}

/// A folder with the option file that the backup program logs in by, and for its own use; readable by root only, and
/// gone with this. On a command line every user could read the password.
struct Logins(PathBuf);

impl Logins {
    fn write(config: &Config, host: &Host) -> io::Result<Logins> {
        let beside = socket_path(config);
        let folder = beside.with_file_name("helper.donating");
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::DirBuilder::new().mode(0o700).create(&folder)?;
        let logins = Logins(folder);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(logins.file())?;
        let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
        // The server is this host's own, and its certificate need not be known.
        write!(
            file,
            "[client]\nuser=\"{}\"\npassword=\"{}\"\nloose-disable-ssl-verify-server-cert\n",
            quoted(&host.agent_user),
            quoted(&host.agent_password.0)
        )?;
        Ok(logins)
    }

    fn file(&self) -> PathBuf {
        self.0.join("login.cnf")
    }
}

impl Drop for Logins {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.0) {
            tracing::warn!("{} was left: {e}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_tells_its_position_or_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let position = |text: &str| {
            fs::write(dir.path().join("xtrabackup_binlog_info"), text).unwrap();
            position_of(dir.path())
        };
        assert!(position_of(dir.path()).unwrap_err().contains("log_bin"));
        assert_eq!(position("bin.000004\t991\t0-1-13\n").unwrap(), "0-1-13");
        assert_eq!(position("bin.000004\t991\t0-1-13,\n1-2-7\n").unwrap(), "0-1-13,1-2-7");
        assert!(position("bin.000004\t991\t\n").unwrap_err().contains("no GTID"));
        assert!(position("bin.000004\t991\tnonsense\n").unwrap_err().contains("not understood"));
    }
}

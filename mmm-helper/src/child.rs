//! Programs that the helper runs: each with a deadline, with the end of what it said for the error, and ended when
//! whoever wanted it has gone.

use mmm_helper::Answer;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How much of what a program said is kept: its end.
const KEPT: usize = 4096;
/// How often a program is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Whoever asked, at the other end of the socket.
pub(crate) struct Asker<'a>(pub(crate) &'a UnixStream);

impl Asker<'_> {
    /// Waits for so long, or until the asker has gone; true: it has.
    pub(crate) fn gone_within(&self, wait: Duration) -> bool {
        // That the other side has closed is told without asking (POLLHUP).
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        let wait = PollTimeout::try_from(wait).unwrap_or(PollTimeout::ZERO);
        matches!(poll(&mut fds, wait), Ok(n) if n > 0)
    }

    /// What is being done, in words. That nobody hears it is found out elsewhere.
    pub(crate) fn step(&self, step: &str) {
        tracing::info!("{step}");
        let _ = tell(self.0, &Answer::Step { step: step.to_owned() });
    }
}

pub(crate) fn tell(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_string(answer)?;
    line.push('\n');
    stream.write_all(line.as_bytes())
}

/// A program under way, in a process group of its own. Killed when this is dropped.
pub(crate) struct Running {
    name: String,
    pub(crate) child: Child,
    said: Option<JoinHandle<Vec<u8>>>,
    ended: bool,
}

impl Running {
    /// `package`: where the program comes from, for the error when it is not there.
    pub(crate) fn start(command: &mut Command, package: &str) -> Result<Running, String> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command.stderr(Stdio::piped()).process_group(0).spawn().map_err(|e| {
            if e.kind() == io::ErrorKind::NotFound {
                format!("the program {name} is not installed; it comes in the package {package}")
            } else {
                format!("{name} cannot be started: {e}")
            }
        })?;
        let said = child.stderr.take().map(|stderr| std::thread::spawn(move || end_of(stderr)));
        Ok(Running { name, child, said, ended: false })
    }

    /// The end of what it said on stderr goes into the error.
    pub(crate) fn wait(mut self, until: Instant, asker: &Asker) -> Result<(), String> {
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => {}
                Err(e) => return Err(format!("{} cannot be waited for: {e}", self.name)),
            }
            if asker.gone_within(LOOK) {
                return Err(format!("{} was ended: the agent that wanted it has gone", self.name));
            }
            if Instant::now() >= until {
                return Err(format!("{} was ended: it took too long", self.name));
            }
        };
        self.ended = true;
        self.judge(status)
    }

    /// Ends it; why it would have failed, if it said so.
    pub(crate) fn end(mut self) -> String {
        self.kill();
        self.last_words()
    }

    fn judge(&mut self, status: ExitStatus) -> Result<(), String> {
        if status.success() {
            return Ok(());
        }
        let said = self.last_words();
        Err(format!("{} ended with {status}: {said}", self.name))
    }

    fn last_words(&mut self) -> String {
        let said = self.said.take().and_then(|t| t.join().ok()).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let lines: Vec<&str> = said.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        let tell = lines.iter().rev().take(4).rev().copied().collect::<Vec<_>>().join(" | ");
        if tell.is_empty() { "it said nothing".to_owned() } else { tell }
    }

    fn kill(&mut self) {
        if !self.ended {
            self.ended = true;
            let group = Pid::from_raw(self.child.id().cast_signed());
            let _ = killpg(group, Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

fn end_of(mut stderr: ChildStderr) -> Vec<u8> {
    let (mut kept, mut bytes) = (Vec::new(), [0; 4096]);
    while let Ok(n) = stderr.read(&mut bytes) {
        if n == 0 {
            break;
        }
        kept.extend_from_slice(&bytes[..n]);
        if kept.len() > 2 * KEPT {
            kept.drain(..kept.len() - KEPT);
        }
    }
    kept
}

/// What happens to a command of the configuration that does not end in time.
#[derive(Clone, Copy)]
pub(crate) enum Late {
    /// With all that it has started: a stop that goes on would stop the server that is started next.
    KillAll,
    /// But not what it has started: that may be a server in the middle of its recovery.
    LeaveStarted,
}

/// Runs a command of the configuration. It may leave the server behind in the background, so what it says is not piped
/// but goes to the helper's own log.
pub(crate) fn shell(what: &str, command: &mut Command, until: Instant, late: Late) -> Result<(), String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|e| format!("{what} cannot be run: {e}"))?;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => {
                return Err(format!("{what} ended with {status}; what it said is in the log of mmm_helperd"));
            }
            Ok(None) => {}
            Err(e) => return Err(format!("{what} cannot be waited for: {e}")),
        }
        if Instant::now() >= until {
            let what_became = match late {
                Late::KillAll => {
                    let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
                    "was killed"
                }
                Late::LeaveStarted => {
                    let _ = child.kill();
                    "was killed; what it has started goes on"
                }
            };
            let _ = child.wait();
            return Err(format!("{what} did not end in time and {what_became}"));
        }
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_late_command_has_started_is_killed_with_it_unless_it_may_be_the_server() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let started = |late| {
            let command = format!("sleep 1000 & echo $! > {}; wait", file.display());
            let until = Instant::now() + Duration::from_secs(1);
            let why = shell("it", Command::new("/bin/sh").args(["-c", &command]), until, late).unwrap_err();
            assert!(why.contains("did not end in time and was killed"), "{why}");
            std::fs::read_to_string(&file).unwrap().trim().parse::<i32>().unwrap()
        };
        // Of a process that has ended and that nobody has waited for, the command line is empty.
        let lives = |pid| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty());
        let left = started(Late::LeaveStarted);
        assert!(lives(left));
        nix::sys::signal::kill(Pid::from_raw(left), Signal::SIGKILL).unwrap();
        let killed = started(Late::KillAll);
        let end = Instant::now() + Duration::from_secs(10);
        while lives(killed) {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

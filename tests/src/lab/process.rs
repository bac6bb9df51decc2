//! Processes of a lab: started inside a network namespace without a wrapper, so the pid is the program's own, and
//! known by (pid, start time), so that a pid used again by somebody else is never signalled.
//!
//! A program's `run` file in the lab's folder holds both; any later `mmm-lab` call finds the process by it.

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// False once this process takes its labs down because of a signal: nothing may be started any more.
static MAY_START: Mutex<bool> = Mutex::new(true);

/// From here on nothing is started by this process.
pub fn forbid_starts() {
    *MAY_START.lock().unwrap_or_else(|e| e.into_inner()) = false;
}

/// Whether [`forbid_starts`] was called.
pub fn starts_are_forbidden() -> bool {
    !*MAY_START.lock().unwrap_or_else(|e| e.into_inner())
}

/// Runs `f` on a thread of its own inside a network namespace. Everything started or opened there belongs to it.
pub fn within<T: Send>(netns: &Path, f: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|s| {
        let inside = s.spawn(|| -> Result<T> {
            let ns = File::open(netns).with_context(|| format!("open network namespace {}", netns.display()))?;
            setns(&ns, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("enter network namespace {} (root is needed)", netns.display()))?;
            Ok(f())
        });
        match inside.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// One process, named so that it cannot be taken for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    pub pid: i32,
    /// Clock ticks since boot at which it began (field 22 of /proc/PID/stat).
    pub began: u64,
}

impl Running {
    pub fn of(pid: i32) -> Option<Running> {
        stat(pid).map(|(_, began)| Running { pid, began })
    }

    pub fn myself() -> Option<Running> {
        i32::try_from(std::process::id()).ok().and_then(Running::of)
    }

    /// A zombie is not alive.
    pub fn is_alive(self) -> bool {
        stat(self.pid).is_some_and(|(state, began)| began == self.began && state != 'Z' && state != 'X')
    }

    pub fn signal(self, signal: Signal) -> Result<()> {
        if !self.is_alive() {
            bail!("process {} is not running", self.pid);
        }
        kill(Pid::from_raw(self.pid), signal).with_context(|| format!("send {signal} to process {}", self.pid))
    }

    pub fn wait_gone(self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while self.is_alive() {
            if Instant::now() > end {
                bail!("process {} is still running after {limit:?}", self.pid);
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    pub fn save(self, file: &Path) -> Result<()> {
        fs::write(file, serde_json::to_vec(&self)?).with_context(|| format!("write {}", file.display()))
    }

    /// The process of a `run` file, if it is alive.
    pub fn load(file: &Path) -> Option<Running> {
        let running: Running = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
        running.is_alive().then_some(running)
    }
}

/// State letter and start time.
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything: look behind the last one.
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let began = fields.nth(18)?.parse().ok()?;
    Some((state, began))
}

/// Every process whose main thread is in the network namespace.
pub fn inside(netns: &Path) -> Vec<Running> {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(wanted) = fs::metadata(netns) else { return Vec::new() };
    let Ok(proc) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = proc.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| ns.ino() == wanted.ino() && ns.dev() == wanted.dev())
    })
    .filter_map(Running::of)
    .collect()
}

/// What to start, where, and where its words go.
pub struct Start<'a> {
    pub netns: &'a Path,
    pub program: &'a Path,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    pub log: PathBuf,
    /// Written once it runs.
    pub run_file: PathBuf,
}

/// Starts a daemon that outlives this process if nobody ends it. It is reaped by a thread, which also writes into the
/// log how it ended.
pub fn start(what: Start<'_>) -> Result<Running> {
    let may = MAY_START.lock().unwrap_or_else(|e| e.into_inner());
    if !*may {
        bail!("the lab is being taken down: {} is not started", what.program.display());
    }
    let log = File::options().create(true).append(true).open(&what.log)?;
    let mut command = Command::new(what.program);
    command
        .args(&what.args)
        .envs(what.env.iter().cloned())
        .env_remove("NOTIFY_SOCKET")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?)
        // Ctrl-C at the terminal is for the lab's program, which then ends the daemons in order.
        .process_group(0);
    let mut child = within(what.netns, || command.spawn())?
        .with_context(|| format!("start {}; its arguments: {}", what.program.display(), what.args.join(" ")))?;
    drop(may);
    let pid = i32::try_from(child.id())?;
    let running = Running::of(pid).with_context(|| format!("process {pid} is not in /proc"))?;
    running.save(&what.run_file)?;
    thread::spawn(move || {
        if let Ok(status) = child.wait() {
            let mut log = log;
            let _ = writeln!(log, "-- lab: process {pid} has ended: {status}");
        }
    });
    Ok(running)
}

/// What a command said, and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// Standard output, then standard error.
    pub text: String,
    pub code: i32,
    pub took: Duration,
}

impl Output {
    pub fn ok(&self) -> bool {
        self.code == 0
    }
}

/// Runs a command inside a namespace (None: where this process is) and collects what it says. After `limit` it is
/// killed, and that is an error.
pub fn run(netns: Option<&Path>, mut command: Command, limit: Duration) -> Result<Output> {
    let began = Instant::now();
    let shown = format!("{command:?}");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = match netns {
        Some(netns) => within(netns, || command.spawn())?,
        None => command.spawn(),
    };
    let child = child.with_context(|| format!("start {shown}"))?;
    let running = Running::of(i32::try_from(child.id())?);
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        // Nobody listens any more after the limit.
        let _ = send.send(child.wait_with_output());
    });
    let Ok(output) = receive.recv_timeout(limit) else {
        if let Some(running) = running {
            let _ = running.signal(Signal::SIGKILL);
        }
        bail!("{shown} had not ended after {limit:?} and was killed");
    };
    let output = output.with_context(|| format!("wait for {shown}"))?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Ok(Output { text, code: output.status.code().unwrap_or(-1), took: began.elapsed() })
}

/// Like [`run`], where anything but success is an error with everything that was said.
pub fn must(netns: Option<&Path>, command: Command, limit: Duration) -> Result<String> {
    let shown = format!("{command:?}");
    let output = run(netns, command, limit)?;
    if !output.ok() {
        bail!("{shown} ended with {}: {}", output.code, output.text.trim());
    }
    Ok(output.text)
}

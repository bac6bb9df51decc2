//! Runs the operator's `kill_host_bin HOST 1|0`: the only way to be certain of a host that does not answer.
//!
//! It has a deadline, and only exit code 0 counts as a confirmed kill. A script that is late is killed itself, with
//! everything it started that stayed in its process group.

use mmm_common::ids::HostName;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};
use tokio::time::timeout;

pub(crate) const DEADLINE: Duration = Duration::from_secs(10);
/// How long to collect what was printed, when something the script started still has its output open.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How much of what the script printed is kept, from the end of its output and of its errors each: of the two, either may
/// be read first.
const TAIL: usize = 512;

/// # Errors
/// In words: why the host cannot be taken for dead.
pub(crate) async fn run(bin: &Path, host: &HostName, ping_ok: bool, deadline: Duration) -> Result<(), String> {
    let ping = if ping_ok { "1" } else { "0" };
    let what = format!("kill_host_bin {} {host} {ping}", bin.display());
    let mut child = Command::new(bin)
        .args([host.as_str(), ping])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|e| format!("{what} could not be started: {e}"))?;
    let tails: [Tail; 2] = [Tail::default(), Tail::default()];
    let readers = [
        child.stdout.take().map(|pipe| tokio::spawn(keep_tail(pipe, tails[0].clone()))),
        child.stderr.take().map(|pipe| tokio::spawn(keep_tail(pipe, tails[1].clone()))),
    ];
    let ended = wait(&mut child, deadline).await;
    for reader in readers.into_iter().flatten() {
        let stop = reader.abort_handle();
        if timeout(LAST_WORDS, reader).await.is_err() {
            stop.abort();
        }
    }
    match ended {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{what} failed: {status}{}", printed(&tails))),
        Err(why) => Err(format!("{what} {why}{}", printed(&tails))),
    }
}

async fn wait(child: &mut Child, deadline: Duration) -> Result<ExitStatus, String> {
    match timeout(deadline, child.wait()).await {
        Ok(Ok(status)) => Ok(status),
        Ok(Err(e)) => Err(format!("could not be waited for: {e}")),
        Err(_) => {
            if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()) {
                // Gone in the meantime is as good.
                let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
            }
            // Only to leave no zombie; a process that the kernel cannot end holds up nobody.
            let _ = timeout(Duration::from_secs(1), child.wait()).await;
            Err(format!("had not ended after {deadline:?} and was stopped"))
        }
    }
}

type Tail = Arc<Mutex<Vec<u8>>>;

async fn keep_tail(mut pipe: impl AsyncRead + Unpin, tail: Tail) {
    let mut piece = [0; 512];
    while let Ok(n @ 1..) = pipe.read(&mut piece).await {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend_from_slice(&piece[..n]);
        let over = tail.len().saturating_sub(TAIL);
        tail.drain(..over);
    }
}

fn printed(tails: &[Tail]) -> String {
    let texts = tails.iter().map(|tail| {
        let tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&tail).trim().to_owned()
    });
    let text = texts.filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n");
    if text.is_empty() { "; it printed nothing".to_owned() } else { format!("; it printed: {text}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;
    use std::time::Instant;

    struct Script {
        dir: tempfile::TempDir,
        path: PathBuf,
    }

    fn script(body: &str) -> Script {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kill_host");
        std::fs::write(&path, format!("#!/bin/sh\ncd {}\n{body}\n", dir.path().display())).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Script { dir, path }
    }

    async fn kill(script: &Script, ping_ok: bool, deadline: Duration) -> Result<(), String> {
        run(&script.path, &"db1".into(), ping_ok, deadline).await
    }

    #[tokio::test]
    async fn it_is_called_with_the_host_and_whether_ping_was_ok() {
        let s = script("echo \"$# $1 $2\" >called");
        assert_eq!(kill(&s, true, DEADLINE).await, Ok(()));
        assert_eq!(std::fs::read_to_string(s.dir.path().join("called")).unwrap(), "2 db1 1\n");
        assert_eq!(kill(&s, false, DEADLINE).await, Ok(()));
        assert_eq!(std::fs::read_to_string(s.dir.path().join("called")).unwrap(), "2 db1 0\n");
    }

    #[tokio::test]
    async fn any_other_exit_is_a_failure_with_the_end_of_what_it_printed() {
        let s = script("head -c 100000 /dev/zero | tr '\\0' x; echo; echo 'no such outlet' >&2; exit 3");
        let why = kill(&s, true, DEADLINE).await.unwrap_err();
        assert!(why.contains("exit status: 3") && why.contains("no such outlet"), "{why}");
        assert!(why.len() < 3 * TAIL, "{}", why.len());
    }

    #[tokio::test]
    async fn a_late_script_is_killed_with_its_children() {
        let s = script("sleep 60 & echo $! >child; wait");
        let began = Instant::now();
        let why = kill(&s, true, Duration::from_millis(300)).await.unwrap_err();
        assert!(why.contains("had not ended after 300ms"), "{why}");
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        let child = std::fs::read_to_string(s.dir.path().join("child")).unwrap();
        let stat = format!("/proc/{}/stat", child.trim());
        // Its end is the kernel's work from here on, and it may be left as a zombie to a parent that is not ours.
        while std::fs::read_to_string(&stat).is_ok_and(|state| !state.contains(") Z ")) {
            assert!(began.elapsed() < Duration::from_secs(5), "still running");
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn an_output_that_stays_open_holds_up_nothing() {
        let s = script("setsid sleep 3 & exit 0");
        let began = Instant::now();
        assert_eq!(kill(&s, true, DEADLINE).await, Ok(()));
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_missing_script_is_a_failure() {
        let why = run(Path::new("/nonexistent/kill_host"), &"db1".into(), true, DEADLINE).await.unwrap_err();
        assert!(why.contains("could not be started"), "{why}");
    }
}

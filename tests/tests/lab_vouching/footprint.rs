//! What the daemons cost when nothing happens: memory, and programs started. A program that is started and ends between
//! two looks is still found, because its parent's account of ended children grows.

use super::running;
use anyhow::{Context as _, Result, ensure};
use mmm_tests::lab::Lab;
use mmm_tests::lab::network::{DB, MONITOR};
use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const HOW_LONG: Duration = Duration::from_secs(20);
const MONITOR_LIMIT_KIB: u64 = 30 * 1024;

/// No child is started by any daemon, and the monitor is small.
pub(crate) fn check(lab: &Lab) -> Result<()> {
    a_started_program_is_noticed()?;
    let mut pids = vec![running(lab, MONITOR, "mmm_mond")?.pid];
    for host in DB {
        pids.push(running(lab, host, "mmm_agentd")?.pid);
    }
    let started = children_of(&pids, HOW_LONG)?;
    println!("FIGURE footprint programs_started_in_{}_s {} programs", HOW_LONG.as_secs(), started.len());
    ensure!(started.is_empty(), "programs were started: {started:?}");
    let monitor = resident_kib(pids[0])?;
    println!("FIGURE footprint monitor_resident {:.1} MB", monitor as f64 / 1024.0);
    for (host, pid) in DB.into_iter().zip(&pids[1..]) {
        println!("FIGURE footprint agent_of_{host}_resident {:.1} MB", resident_kib(*pid)? as f64 / 1024.0);
    }
    ensure!(monitor < MONITOR_LIMIT_KIB, "the monitor has {monitor} KiB in memory");
    Ok(())
}

/// The check of the check.
fn a_started_program_is_noticed() -> Result<()> {
    let mut shell = Command::new("sh");
    shell.args(["-c", "i=0; while [ $i -lt 20 ]; do /bin/true; sleep 0.02; i=$((i+1)); done; sleep 1"]);
    let mut shell = shell.stdin(Stdio::null()).spawn()?;
    let found = children_of(&[i32::try_from(shell.id())?], Duration::from_millis(500));
    shell.kill()?;
    shell.wait()?;
    ensure!(!found?.is_empty(), "a shell that starts programs was not noticed");
    Ok(())
}

/// One sentence for each sign of a child of one of the processes.
fn children_of(pids: &[i32], how_long: Duration) -> Result<BTreeSet<String>> {
    let mut signs = BTreeSet::new();
    let before: Vec<Stat> = pids.iter().map(|pid| stat(*pid)).collect::<Result<_>>()?;
    let (began, mut known) = (Instant::now(), BTreeSet::new());
    while began.elapsed() < how_long {
        let now = all_pids()?;
        for pid in now.difference(&known) {
            // It may have ended meanwhile.
            let Ok(found) = stat(*pid) else { continue };
            if pids.contains(&found.parent) {
                signs.insert(format!("process {pid} is a child of {}", found.parent));
            }
        }
        known = now;
        std::thread::sleep(Duration::from_millis(2));
    }
    for (pid, before) in pids.iter().zip(before) {
        let after = stat(*pid)?;
        if after.of_ended_children != before.of_ended_children {
            let (now, then) = (&after.of_ended_children, before.of_ended_children);
            signs
                .insert(format!("process {pid} has ended children: its account of them went from {then:?} to {now:?}"));
        }
    }
    Ok(signs)
}

fn all_pids() -> Result<BTreeSet<i32>> {
    Ok(fs::read_dir("/proc")?.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
}

struct Stat {
    parent: i32,
    /// Page faults without and with a disk, and time in user and kernel mode.
    of_ended_children: [u64; 4],
}

/// See proc_pid_stat(5).
fn stat(pid: i32) -> Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = text.rfind(')').and_then(|at| text.get(at + 2..)).context("no name in stat")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // Field 3 is the first of these.
    let field = |n: usize| -> Result<u64> { Ok(fields.get(n - 3).context("too few fields in stat")?.parse()?) };
    Ok(Stat { parent: i32::try_from(field(4)?)?, of_ended_children: [field(11)?, field(13)?, field(16)?, field(17)?] })
}

fn resident_kib(pid: i32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

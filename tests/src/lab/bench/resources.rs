//! What a process uses while nothing happens, from /proc (proc(5)).

use anyhow::{Context as _, Result};
use serde::Serialize;
use std::fs;
use std::time::Duration;

#[derive(Clone, Debug, Serialize)]
pub(super) struct Used {
    pub(super) program: String,
    /// Resident, at the end.
    pub(super) megabytes: f64,
    /// Of one core.
    pub(super) cpu_percent: f64,
    /// `none`, or `some`: a child that has ended in the meantime has left its page faults.
    pub(super) programs: &'static str,
}

struct Sample {
    ticks: u64,
    faults_of_children: u64,
}

/// Each process by its name in the table and its pid.
pub(super) fn over(time: Duration, watched: &[(String, i32)]) -> Result<Vec<Used>> {
    let before = watched.iter().map(|(_, pid)| sample(*pid)).collect::<Result<Vec<_>>>()?;
    std::thread::sleep(time);
    let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("the kernel has no clock ticks")?;
    watched
        .iter()
        .zip(before)
        .map(|((program, pid), before)| {
            let after = sample(*pid)?;
            let seconds = (after.ticks - before.ticks) as f64 / hertz as f64;
            Ok(Used {
                program: program.clone(),
                megabytes: resident_kb(*pid)? as f64 / 1024.0,
                cpu_percent: 100.0 * seconds / time.as_secs_f64(),
                programs: if after.faults_of_children == before.faults_of_children { "none" } else { "some" },
            })
        })
        .collect()
}

fn sample(pid: i32) -> Result<Sample> {
    let file = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    // The name in parentheses may hold anything: look behind the last one. The first field there is the third of all.
    let fields: Vec<&str> = text.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let number = |n: usize| -> Result<u64> {
        fields.get(n - 3).and_then(|f| f.parse().ok()).with_context(|| format!("field {n} of {file}"))
    };
    Ok(Sample { ticks: number(14)? + number(15)?, faults_of_children: number(11)? })
}

fn resident_kb(pid: i32) -> Result<u64> {
    let file = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).with_context(|| format!("no VmRSS in {file}"))?;
    line.split_whitespace().next().and_then(|kb| kb.parse().ok()).with_context(|| format!("{line:?} in {file}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_process_and_its_children_are_seen() {
        let me = [("this test".to_owned(), std::process::id().cast_signed())];
        let busy = std::thread::spawn(|| {
            let end = std::time::Instant::now() + Duration::from_millis(600);
            while std::time::Instant::now() < end {
                std::hint::spin_loop();
            }
            std::process::Command::new("true").status().map(|s| s.success()).unwrap_or(false)
        });
        let used = over(Duration::from_secs(1), &me).unwrap();
        assert!(busy.join().unwrap());
        assert!(used[0].cpu_percent > 1.0 && used[0].megabytes > 1.0, "{used:?}");
        assert_eq!(used[0].programs, "some");
    }
}

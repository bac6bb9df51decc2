//! What this process may do, and what the kernel can: capabilities, lifetimes of addresses, ending of connections, the
//! watchdog's device.

use crate::sockets;
use mmm_common::config::Agent as Config;
use mmm_common::examine::{Finding, Severity, Subject};
use std::fs;
use std::path::Path;

/// IPv4 addresses have lifetimes since 3.9, and their protocol (by which an address of ours is told from one put there
/// by hand) is kept since 5.18.
const LIFETIMES: (u32, u32) = (3, 9);
const PROTOCOL: (u32, u32) = (5, 18);

pub(super) async fn look(config: &Config, unguarded: Option<String>) -> Vec<Finding> {
    let device = config.watchdog_device.clone();
    let files = tokio::task::spawn_blocking(move || {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").map_err(|e| e.to_string());
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        (kernel(release), capabilities(&status), device.map(|device| watchdog(&device)))
    });
    let mut findings = vec![sock_diag().await, guard(unguarded)];
    if let Ok((kernel, capabilities, watchdog)) = files.await {
        findings.extend([kernel, capabilities]);
        findings.extend(watchdog);
    }
    findings
}

async fn sock_diag() -> Finding {
    let tried = "whether this kernel ends connections on request (sock_diag, SOCK_DESTROY)";
    match sockets::can_destroy().await {
        Ok(()) => Finding::ok(Subject::Kernel, tried, "it does"),
        Err(e) => Finding::bad(
            Severity::Warning,
            Subject::Kernel,
            tried,
            e.to_string(),
            "run a kernel with CONFIG_INET_DIAG_DESTROY=y: without it, clients of a moved address hang until their own \
             timeout",
        ),
    }
}

fn guard(unguarded: Option<String>) -> Finding {
    let tried = "whether role addresses fall silent when their lease ends (exact guard, nf_tables)";
    match unguarded {
        None => Finding::ok(Subject::Kernel, tried, "they do"),
        Some(why) => Finding::bad(
            Severity::Notice,
            Subject::Kernel,
            tried,
            format!("{why}; a failover from this host, when it is silent, waits 1.3 s longer"),
            "exact_guard = true in [agent], and a kernel with nf_tables; then restart mmm_agentd",
        ),
    }
}

fn kernel(release: Result<String, String>) -> Finding {
    let tried = "/proc/sys/kernel/osrelease";
    let release = match release {
        Ok(release) => release.trim().to_owned(),
        Err(e) => return Finding::bad(Severity::Notice, Subject::Kernel, tried, e, "mount /proc"),
    };
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < LIFETIMES {
        let found = format!("{release}: its addresses have no lifetimes, so a dead agent's roles would stay for ever");
        Finding::bad(Severity::Error, Subject::Kernel, tried, found, "run Linux 3.9 or later")
    } else if version < PROTOCOL {
        let found = format!("{release}: addresses of an agent that lost its state file are not recognised");
        Finding::bad(Severity::Notice, Subject::Kernel, tried, found, "run Linux 5.18 or later")
    } else {
        Finding::ok(Subject::Kernel, tried, release)
    }
}

fn capabilities(status: &str) -> Finding {
    // linux/capability.h
    const NEEDED: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (13, "CAP_NET_RAW")];
    let tried = "CapEff of mmm_agentd";
    let held = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let held = held.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    let missing: Vec<&str> = NEEDED.iter().filter(|(bit, _)| held & (1 << bit) == 0).map(|(_, name)| *name).collect();
    if missing.is_empty() {
        Finding::ok(Subject::Capabilities, tried, "CAP_NET_ADMIN and CAP_NET_RAW")
    } else {
        let cure = "in the systemd unit: AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW";
        Finding::bad(Severity::Error, Subject::Capabilities, tried, format!("without {}", missing.join(", ")), cure)
    }
}

/// Never opened here: opening it arms it.
fn watchdog(device: &Path) -> Finding {
    let tried = format!("watchdog_device {}", device.display());
    match fs::metadata(device) {
        Ok(_) => Finding::ok(Subject::Watchdog, tried, "it is there"),
        Err(e) => {
            let cure = "load a watchdog driver (modprobe softdog), or leave watchdog_device out of [agent]";
            Finding::bad(Severity::Warning, Subject::Watchdog, tried, e.to_string(), cure)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_told_by_what_they_lack() {
        let judge = |release: &str| kernel(Ok(release.to_owned())).severity;
        assert_eq!(judge("6.1.0-28-amd64\n"), Severity::Ok);
        assert_eq!(judge("5.18.0"), Severity::Ok);
        assert_eq!(judge("4.19.0-27-amd64"), Severity::Notice);
        assert_eq!(judge("3.2.0"), Severity::Error);
    }

    #[test]
    fn a_missing_capability_is_named() {
        assert_eq!(capabilities("CapEff:\t0000000000003000\n").severity, Severity::Ok);
        let finding = capabilities("CapEff:\t0000000000001000\n");
        assert_eq!((finding.severity, finding.found.as_str()), (Severity::Error, "without CAP_NET_RAW"));
    }

    #[test]
    fn a_watchdog_that_is_not_there_is_a_warning() {
        assert_eq!(watchdog(Path::new("/dev/null")).severity, Severity::Ok);
        assert_eq!(watchdog(Path::new("/dev/no-such-watchdog")).severity, Severity::Warning);
    }
}

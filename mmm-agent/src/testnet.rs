//! Network namespaces for the unit tests: two hosts joined by a cable. Removed again also when a test fails.

use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Two namespaces `.here` and `.there` with an interface `eth0` each, 10.77.0.1/24 and 10.77.0.2/24 (fd77::1, ::2).
pub(crate) struct TwoHosts {
    pub(crate) here: String,
    pub(crate) there: String,
}

impl TwoHosts {
    /// None, with the reason printed, only when the tests do not run as root.
    #[expect(clippy::print_stderr, reason = "a test that was left out has to say so")]
    pub(crate) fn new() -> Option<TwoHosts> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("left out: network namespaces need root");
            return None;
        }
        let unique = format!("mtag{}n{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let hosts = TwoHosts { here: format!("{unique}a"), there: format!("{unique}b") };
        let (a, b) = (&hosts.here, &hosts.there);
        ip(&format!("netns add {a}"));
        ip(&format!("netns add {b}"));
        ip(&format!("-n {a} link add eth0 type veth peer name eth0 netns {b}"));
        for ns in [a, b] {
            ip(&format!("-n {ns} link set lo up"));
            ip(&format!("-n {ns} link set eth0 up"));
        }
        for (ns, number) in [(a, 1), (b, 2)] {
            // Multicast is not routed before the kernel has seen the carrier, which takes it a moment.
            let ready = (0..500).any(|_| {
                std::thread::sleep(std::time::Duration::from_millis(10));
                ip(&format!("-n {ns} -6 route show table local dev eth0")).contains("ff00::/8")
            });
            assert!(ready, "no carrier on eth0 of {ns} within 5 s");
            ip(&format!("-n {ns} address add 10.77.0.{number}/24 dev eth0"));
            ip(&format!("-n {ns} address add fd77::{number}/64 dev eth0 nodad"));
        }
        Some(hosts)
    }

    /// Runs on this side, on a thread of its own with a tokio runtime of its own.
    pub(crate) fn on_here<T: Send>(&self, work: impl AsyncFnOnce() -> T + Send) -> T {
        inside(&self.here, work)
    }

    pub(crate) fn on_there<T: Send>(&self, work: impl AsyncFnOnce() -> T + Send) -> T {
        inside(&self.there, work)
    }
}

impl Drop for TwoHosts {
    fn drop(&mut self) {
        for ns in [&self.here, &self.there] {
            let _ = Command::new("ip").args(["netns", "del", ns]).status();
        }
    }
}

/// Runs `ip` with these words; its output.
pub(crate) fn ip(words: &str) -> String {
    let output = Command::new("ip").args(words.split_whitespace()).output().expect("running ip");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs in a namespace, on a thread of its own with a tokio runtime of its own.
pub(crate) fn inside<T: Send>(ns: &str, work: impl AsyncFnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let file = File::open(format!("/run/netns/{ns}")).unwrap();
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(work())
        });
        match thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

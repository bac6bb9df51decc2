//! A real `mmm_agentd` in a network namespace, its configuration, and the test as its monitor.

#![allow(dead_code, reason = "each test program uses its part")]

pub(crate) mod server;
#[path = "../../src/testnet.rs"]
pub(crate) mod testnet;

use mmm_common::epoch::{Anchor, Epoch};
use mmm_common::ids::HostName;
use mmm_common::order::{AddressOrder, Hold, Order, ReplicationOrder};
use mmm_common::report::Report;
use mmm_common::state::HostState;
use mmm_common::wire::{self, FromAgent, PROTOCOL, ToAgent};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use testnet::{TwoHosts, ip};

pub(crate) const ROLE: &str = "10.77.0.50";
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// A folder with the configuration of one host.
pub(crate) struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    /// Of db1.
    pub(crate) fn new() -> Files {
        Files::of("db1")
    }

    pub(crate) fn of(this: &str) -> Files {
        let files = Files { dir: tempfile::tempdir().unwrap() };
        files.write_common("eth0", "3s");
        let state = files.path("state/agent.state");
        let agent = format!("include = [\"mmm_common.toml\"]\nthis = \"{this}\"\n[agent]\nstate_path = {state:?}\n");
        files.write("mmm_agent.toml", &agent);
        files
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.path("mmm_agent.toml")
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    pub(crate) fn write_common(&self, interface: &str, move_grace: &str) {
        self.write(
            "mmm_common.toml",
            &format!(
                r#"
                insecure_plaintext = true
                lease_ttl = "3s"
                hang_timeout = "1h"
                move_grace = "{move_grace}"
                [host.default]
                cluster_interface = "{interface}"
                agent_user = "mmm_agent"
                agent_password = "a"
                replication_user = "replication"
                replication_password = "r"
                [host.db1]
                ip = "10.77.0.1"
                mode = "master"
                peer = "db2"
                [host.db2]
                ip = "10.77.0.2"
                mode = "master"
                peer = "db1"
                [role.writer]
                mode = "exclusive"
                hosts = ["db1", "db2"]
                ips = ["{ROLE}"]
                "#
            ),
        );
    }
}

pub(crate) fn in_namespace(ns: &str, config: &Path) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", ns, env!("CARGO_BIN_EXE_mmm_agentd"), "--config"]).arg(config);
    command.env_remove("NOTIFY_SOCKET").env_remove("RUST_LOG");
    command
}

/// A running agent. `ip netns exec` becomes the program itself, so the pid is the agent's.
pub(crate) struct Agent {
    pub(crate) child: Child,
    log: PathBuf,
}

impl Agent {
    pub(crate) fn start(hosts: &TwoHosts, files: &Files) -> Agent {
        Agent::start_in(&hosts.here, files)
    }

    pub(crate) fn start_in(ns: &str, files: &Files) -> Agent {
        let log = files.path("log");
        let out = fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let child = in_namespace(ns, &files.config()).stderr(out).stdin(Stdio::null()).spawn().unwrap();
        Agent { child, log }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn logs(&self, text: &str, times: usize) {
        let there = until(|| self.log().matches(text).count() >= times);
        assert!(there, "'{text}' is not {times} times in the log:\n{}", self.log());
    }

    pub(crate) fn end(&mut self) -> ExitStatus {
        let mut status = None;
        until(|| {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap_or_else(|| panic!("still running:\n{}", self.log()))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn until(mut good: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if good() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    good()
}

pub(crate) fn is_there(hosts: &TwoHosts) -> bool {
    ip(&format!("-n {} address show to {ROLE}/32", hosts.here)).contains(ROLE)
}

pub(crate) fn hold(epoch: u64) -> Hold {
    Hold { epoch: Epoch(epoch), role: "writer".into(), granters: BTreeSet::new(), proof: true, write: false }
}

/// The monitor, on the other host.
pub(crate) struct Monitor {
    pub(crate) lines: BufReader<TcpStream>,
}

impl Monitor {
    /// To the agent of db1.
    pub(crate) fn connect(hosts: &TwoHosts) -> Monitor {
        Monitor::connect_to(hosts, "db1", "10.77.0.1:9989")
    }

    pub(crate) fn connect_to(hosts: &TwoHosts, host: &str, agent: &str) -> Monitor {
        let mut stream = None;
        until(|| {
            stream = hosts.on_there(async || TcpStream::connect(agent)).ok();
            stream.is_some()
        });
        let stream = stream.expect("the agent listens");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut monitor = Monitor { lines: BufReader::new(stream) };
        monitor.send(&ToAgent::Hello { protocol: PROTOCOL, host: host.into(), monitor: 11 });
        let (hello, its) = (monitor.hear(), HostName::from(host));
        assert!(matches!(&hello, FromAgent::Hello { host, .. } if *host == its), "{hello:?}");
        monitor
    }

    pub(crate) fn send(&mut self, message: &ToAgent) {
        self.lines.get_mut().write_all(wire::to_line(message).unwrap().as_bytes()).unwrap();
    }

    pub(crate) fn hear(&mut self) -> FromAgent {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
    }

    pub(crate) fn report(&mut self) -> Report {
        match self.hear() {
            FromAgent::Report(report) => *report,
            other @ (FromAgent::Hello { .. }
            | FromAgent::Vouch(_)
            | FromAgent::Examining { .. }
            | FromAgent::Examined(_)
            | FromAgent::Refused { .. }) => panic!("{other:?}"),
        }
    }

    /// Orders the role to this host, in answer to a report.
    pub(crate) fn order(&mut self, answers: Anchor, hold: Hold) {
        self.order_address(answers, AddressOrder::Hold(hold));
    }

    pub(crate) fn order_address(&mut self, answers: Anchor, role: AddressOrder) {
        self.send(&ToAgent::Order(Order {
            answers,
            lease_ttl_ms: u64::MAX,
            state: HostState::Online,
            addresses: BTreeMap::from([(ROLE.parse().unwrap(), role)]),
            replication: ReplicationOrder::Keep,
            wait_for_replica: true,
            task: None,
            job: None,
        }));
    }

    /// Renews the lease report by report until the agent says that it has the role.
    pub(crate) fn until_held(&mut self, epoch: u64) -> Report {
        self.until_holds(&hold(epoch))
    }

    pub(crate) fn until_holds(&mut self, hold: &Hold) -> Report {
        let role: IpAddr = ROLE.parse().unwrap();
        for _ in 0..50 {
            let report = self.report();
            self.order(report.anchor, hold.clone());
            if report.addresses[&role].present && report.addresses[&role].seen == hold.epoch {
                return report;
            }
        }
        panic!("the role was not taken within 50 reports");
    }
}

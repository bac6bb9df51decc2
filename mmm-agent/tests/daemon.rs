//! The real `mmm_agentd` in a network namespace: how it starts, what it refuses, how it ends and reloads. The test is
//! the monitor. The database server accepts connections and says nothing: its state is unknown, so the agent takes no
//! new role, but keeps the one it goes on with from the process before it.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its helpers too")]

#[path = "../src/testnet.rs"]
mod testnet;

use mmm_agent_core::io::{Saved, SavedAddress};
use mmm_common::epoch::{Anchor, Epoch};
use mmm_common::ids::HostName;
use mmm_common::order::{AddressOrder, Hold, Order, ReplicationOrder};
use mmm_common::report::Report;
use mmm_common::slots_file::SlotsFile;
use mmm_common::state::HostState;
use mmm_common::wire::{self, FromAgent, PROTOCOL, ToAgent};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};
use testnet::{TwoHosts, ip};

const ROLE: &str = "10.77.0.50";
const PATIENCE: Duration = Duration::from_secs(10);

/// A folder with the configuration of host db1.
struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new() -> Files {
        let files = Files { dir: tempfile::tempdir().unwrap() };
        files.write_common("eth0", "3s");
        let state = files.path("state/agent.state");
        let agent = format!("include = [\"mmm_common.toml\"]\nthis = \"db1\"\n[agent]\nstate_path = {state:?}\n");
        files.write("mmm_agent.toml", &agent);
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self) -> PathBuf {
        self.path("mmm_agent.toml")
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn write_common(&self, interface: &str, move_grace: &str) {
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

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mmm_agentd"))
}

/// Runs to its end.
fn finished(command: &mut Command) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = command.output().unwrap();
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

fn in_namespace(ns: &str, config: &Path) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", ns, env!("CARGO_BIN_EXE_mmm_agentd"), "--config"]).arg(config);
    command.env_remove("NOTIFY_SOCKET").env_remove("RUST_LOG");
    command
}

/// A running agent. `ip netns exec` becomes the program itself, so the pid is the agent's.
struct Agent {
    child: Child,
    log: PathBuf,
}

impl Agent {
    fn start(hosts: &TwoHosts, files: &Files) -> Agent {
        let log = files.path("log");
        let out = fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let child = in_namespace(&hosts.here, &files.config()).stderr(out).stdin(Stdio::null()).spawn().unwrap();
        Agent { child, log }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    fn logs(&self, text: &str, times: usize) {
        let there = until(|| self.log().matches(text).count() >= times);
        assert!(there, "'{text}' is not {times} times in the log:\n{}", self.log());
    }

    fn end(&mut self) -> ExitStatus {
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

fn until(mut good: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if good() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    good()
}

fn is_there(hosts: &TwoHosts) -> bool {
    ip(&format!("-n {} address show to {ROLE}/32", hosts.here)).contains(ROLE)
}

fn hold(epoch: u64) -> Hold {
    Hold { epoch: Epoch(epoch), role: "writer".into(), granters: BTreeSet::new(), proof: true, write: false }
}

/// As if an agent that held the role had just ended for an upgrade. Comes with the silent server.
fn held_before(hosts: &TwoHosts, files: &Files) -> TcpListener {
    let saved = Saved {
        addresses: BTreeMap::from([(ROLE.parse().unwrap(), SavedAddress { seen: Epoch(5), hold: Some(hold(5)) })]),
        machine_boot: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned(),
        ..Saved::default()
    };
    fs::create_dir(files.path("state")).unwrap();
    SlotsFile::open::<Saved>(&files.path("state/agent.state")).unwrap().0.save(&saved).unwrap();
    ip(&format!("-n {} address add {ROLE}/32 dev eth0 valid_lft 5 preferred_lft 5", hosts.here));
    hosts.on_here(async || TcpListener::bind("0.0.0.0:3306").unwrap())
}

/// The monitor, on the other host.
struct Monitor {
    lines: BufReader<TcpStream>,
}

impl Monitor {
    fn connect(hosts: &TwoHosts) -> Monitor {
        let mut stream = None;
        until(|| {
            stream = hosts.on_there(async || TcpStream::connect("10.77.0.1:9989")).ok();
            stream.is_some()
        });
        let stream = stream.expect("the agent listens");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut monitor = Monitor { lines: BufReader::new(stream) };
        monitor.send(&ToAgent::Hello { protocol: PROTOCOL, host: "db1".into() });
        let hello = monitor.hear();
        assert!(matches!(&hello, FromAgent::Hello { host, .. } if *host == HostName::from("db1")), "{hello:?}");
        monitor
    }

    fn send(&mut self, message: &ToAgent) {
        self.lines.get_mut().write_all(wire::to_line(message).unwrap().as_bytes()).unwrap();
    }

    fn hear(&mut self) -> FromAgent {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
    }

    fn report(&mut self) -> Report {
        match self.hear() {
            FromAgent::Report(report) => *report,
            other @ (FromAgent::Hello { .. } | FromAgent::Vouch(_) | FromAgent::Refused { .. }) => panic!("{other:?}"),
        }
    }

    /// Orders the role to this host, in answer to a report.
    fn order_to_hold(&mut self, answers: Anchor, epoch: u64) {
        self.send(&ToAgent::Order(Order {
            answers,
            lease_ttl_ms: u64::MAX,
            state: HostState::Online,
            addresses: BTreeMap::from([(ROLE.parse().unwrap(), AddressOrder::Hold(hold(epoch)))]),
            replication: ReplicationOrder::Keep,
            task: None,
        }));
    }

    /// Renews the lease report by report until the agent says that it has the role.
    fn until_held(&mut self, epoch: u64) -> Report {
        let role: IpAddr = ROLE.parse().unwrap();
        for _ in 0..50 {
            let report = self.report();
            self.order_to_hold(report.anchor, epoch);
            if report.addresses[&role].has() && report.addresses[&role].seen == Epoch(epoch) {
                return report;
            }
        }
        panic!("the role was not taken within 50 reports");
    }
}

#[test]
fn check_config_says_everything_and_exits_0_or_2() {
    let files = Files::new();
    let (code, text) = finished(program().arg("--check-config").arg("-c").arg(files.config()));
    assert_eq!(code, Some(0), "{text}");
    assert!(text.starts_with("OK: ") && text.contains("'db1'"), "{text}");

    files.write(
        "mmm_agent.toml",
        "include = [\"mmm_common.toml\"]\nthis = \"db7\"\nthat = 1\n[agent]\nstate_pth = \"x\"\n",
    );
    let (code, text) = finished(program().arg("--check-config").arg("-c").arg(files.config()));
    assert_eq!(code, Some(2), "{text}");
    for mistake in ["db7", "that", "state_pth"] {
        assert!(text.contains(mistake), "{mistake} is missing in: {text}");
    }
    // Starting with it is refused the same way.
    let (code, text) = finished(program().arg("--config").arg(files.config()));
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("db7") && text.contains("state_pth"), "{text}");
    assert!(!text.contains('\u{1b}'), "no colours when stderr is no terminal");

    let version = program().arg("--version").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&version.stdout).trim(), concat!("mmm_agentd ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn it_does_not_start_where_it_could_not_work() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    files.write_common("eth7", "1s");
    let (code, text) = finished(&mut in_namespace(&hosts.here, &files.config()));
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("interface 'eth7' does not exist"), "{text}");

    files.write_common("eth0", "1s");
    let (code, text) = finished(
        Command::new("setpriv")
            .args(["--bounding-set=-net_raw", env!("CARGO_BIN_EXE_mmm_agentd"), "-c"])
            .arg(files.config()),
    );
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("CAP_NET_RAW") && !text.contains("CAP_NET_ADMIN (to"), "{text}");

    let agent = Agent::start(&hosts, &files);
    agent.logs("listening for the monitor", 1);
    let (code, text) = finished(&mut in_namespace(&hosts.there, &files.config()));
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains(&format!("another mmm_agentd (pid {})", agent.child.id())), "{text}");
}

#[test]
fn a_renewed_role_stays_and_a_term_signal_gives_it_back() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    let _server = held_before(&hosts, &files);
    let mut agent = Agent::start(&hosts, &files);
    let mut monitor = Monitor::connect(&hosts);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(7) {
        monitor.until_held(5);
    }
    assert!(is_there(&hosts), "longer than any lifetime without renewals: {}", agent.log());
    agent.signal(Signal::SIGTERM);
    assert!(agent.end().success(), "{}", agent.log());
    assert!(!is_there(&hosts), "{}", agent.log());
    let mut rest = String::new();
    monitor.lines.read_to_string(&mut rest).unwrap();
    let last = rest.lines().last().unwrap_or_default();
    let FromAgent::Report(last) = serde_json::from_str(last).unwrap() else { panic!("{last}") };
    assert!(last.leaving, "{last:?}");
}

#[test]
fn a_role_nobody_renews_leaves_also_when_the_agent_was_killed() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    let _server = held_before(&hosts, &files);
    let mut agent = Agent::start(&hosts, &files);
    Monitor::connect(&hosts).until_held(5);
    let start = Instant::now();
    agent.child.kill().unwrap();
    agent.end();
    assert!(is_there(&hosts));
    assert!(until(|| !is_there(&hosts)));
    assert!(start.elapsed() < Duration::from_secs(7), "the lifetime and the kernel's second: {:?}", start.elapsed());
}

#[test]
fn an_inherited_address_without_an_end_is_not_trusted() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    let _server = held_before(&hosts, &files);
    ip(&format!("-n {} address replace {ROLE}/32 dev eth0 valid_lft forever preferred_lft forever", hosts.here));
    let agent = Agent::start(&hosts, &files);
    agent.logs("without a lifetime", 1);
    assert!(until(|| !is_there(&hosts)), "{}", agent.log());
}

#[test]
fn an_upgrade_and_a_reload_keep_the_role() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    let _server = held_before(&hosts, &files);
    let mut agent = Agent::start(&hosts, &files);
    let mut monitor = Monitor::connect(&hosts);
    monitor.until_held(5);
    agent.signal(Signal::SIGUSR2);
    assert!(agent.end().success(), "{}", agent.log());
    assert!(is_there(&hosts), "{}", agent.log());

    let agent = Agent::start(&hosts, &files);
    let mut monitor = Monitor::connect(&hosts);
    let role: IpAddr = ROLE.parse().unwrap();
    let first = monitor.until_held(5);
    assert!(first.addresses[&role].has());

    // A bad configuration changes nothing, an unchanged one neither.
    files.write("mmm_common.toml", "lease_ttl = \"often\"\nfoo = 1\n");
    agent.signal(Signal::SIGHUP);
    agent.logs("keeping the old one", 1);
    assert!(agent.log().contains("often") && agent.log().contains("foo"), "{}", agent.log());
    files.write_common("eth9", "1s");
    agent.signal(Signal::SIGHUP);
    agent.logs("interface 'eth9' does not exist", 1);
    files.write_common("eth0", "3s");
    agent.signal(Signal::SIGHUP);
    agent.logs("the configuration has not changed", 1);
    let before = monitor.until_held(5);

    files.write_common("eth0", "2s");
    agent.signal(Signal::SIGHUP);
    agent.logs("started;", 3);
    assert!(is_there(&hosts), "{}", agent.log());
    let mut monitor = Monitor::connect(&hosts);
    let after = monitor.until_held(5);
    assert_ne!(after.anchor.boot, before.anchor.boot, "a new life");
    let comm = fs::read_to_string(format!("/proc/{}/comm", agent.child.id())).unwrap();
    assert_eq!(comm.trim(), "mmm_agentd", "the same process, by the same name");
}

//! The real `mmm_agentd` in a network namespace: how it starts, what it refuses, how it ends and reloads. The test is
//! the monitor. The database server accepts connections and says nothing: its state is unknown, so the agent takes no
//! new role, but keeps the one it goes on with from the process before it.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its helpers too")]

mod common;

use common::testnet::{TwoHosts, ip};
use common::{Agent, Files, Monitor, ROLE, hold, in_namespace, is_there, until};
use mmm_agent_core::io::{Saved, SavedAddress};
use mmm_common::epoch::Epoch;
use mmm_common::slots_file::SlotsFile;
use mmm_common::wire::FromAgent;
use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::net::{IpAddr, TcpListener};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mmm_agentd"))
}

/// Runs to its end.
fn finished(command: &mut Command) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = command.output().unwrap();
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

/// As if an agent that held the role had just ended for an upgrade. Comes with the silent server.
fn held_before(hosts: &TwoHosts, files: &Files) -> TcpListener {
    let saved = Saved {
        addresses: BTreeMap::from([(
            ROLE.parse().unwrap(),
            SavedAddress { seen: Epoch(5), hold: Some(hold(5)), forgotten: false },
        )]),
        machine_boot: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned(),
        ..Saved::default()
    };
    fs::create_dir(files.path("state")).unwrap();
    SlotsFile::open::<Saved>(&files.path("state/agent.state")).unwrap().0.save(&saved).unwrap();
    ip(&format!("-n {} address add {ROLE}/32 dev eth0 valid_lft 5 preferred_lft 5", hosts.here));
    hosts.on_here(async || TcpListener::bind("0.0.0.0:3306").unwrap())
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

// lessons.md 1
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

// lessons.md 9
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

// lessons.md 9
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

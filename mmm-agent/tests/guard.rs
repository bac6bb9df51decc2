//! The exact guard in the hands of the real `mmm_agentd` (safety.md, "The guards behind the rules", 1): answers end with
//! the lease whatever becomes of the agent, restarts keep them, a life without the guard gives up what it is left, and
//! what is not this agent's is not touched.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its helpers too")]

mod common;

use common::testnet::{TwoHosts, ip};
use common::{Agent, Files, Monitor, ROLE, hold, in_namespace, is_there, server, until};
use nix::sys::signal::Signal;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Nobody listens there: a refusal is an answer.
const PORT: u16 = 1;
/// `lease_ttl` of these tests.
const LEASE: Duration = Duration::from_secs(3);
/// What a test needs to see that the answers have ended.
const SEEN_WITHIN: Duration = Duration::from_millis(400);

fn answers(hosts: &TwoHosts) -> bool {
    hosts.on_there(async || one_answer())
}

/// From the thread's network namespace.
fn one_answer() -> bool {
    let role: IpAddr = ROLE.parse().unwrap();
    let tried = TcpStream::connect_timeout(&(role, PORT).into(), Duration::from_millis(300));
    tried.is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused)
}

fn has_tables(hosts: &TwoHosts) -> bool {
    nft(hosts, "list tables").contains("mmm_guard")
}

fn nft(hosts: &TwoHosts, words: &str) -> String {
    ip(&format!("netns exec {} nft {words}", hosts.here))
}

/// The kernel will not take the address away for a minute, whatever the agent has told it: what ends the answers then
/// is the guard.
fn keep_there(hosts: &TwoHosts) {
    ip(&format!("-n {} address change {ROLE}/32 dev eth0 valid_lft 60 preferred_lft 60", hosts.here));
}

/// The agent has the address, and has said that it has the guard.
fn holding(hosts: &TwoHosts, files: &Files) -> (Agent, Monitor) {
    server::start(hosts);
    let agent = Agent::start(hosts, files);
    let mut monitor = Monitor::connect(hosts);
    let report = monitor.until_held(5);
    assert!(report.guarded && answers(hosts), "{}", agent.log());
    (agent, monitor)
}

fn renew(monitor: &mut Monitor) {
    let report = monitor.report();
    monitor.order(report.anchor, hold(5));
}

fn write_agent(files: &Files, state: &str, exact_guard: bool) {
    let state = files.path(state);
    let text = format!(
        "include = [\"mmm_common.toml\"]\nthis = \"db1\"\n[agent]\nstate_path = {state:?}\nexact_guard = {exact_guard}\n"
    );
    files.write("mmm_agent.toml", &text);
}

/// The answers end with the lease, whose last renewal was asked for before `renewed`, and the address is still there.
fn falls_silent(hosts: &TwoHosts, agent: &Agent, renewed: Instant) {
    assert!(until(|| !answers(hosts)), "{}", agent.log());
    let took = renewed.elapsed();
    assert!(took < LEASE + SEEN_WITHIN, "after {took:?}: {}", agent.log());
    assert!(is_there(hosts), "the kernel's lifetime was quicker than the guard: {}", agent.log());
}

#[test]
fn the_answers_end_with_the_lease_of_an_agent_that_stands_still() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    let (agent, _monitor) = holding(&hosts, &files);
    let renewed = Instant::now();
    agent.signal(Signal::SIGSTOP);
    keep_there(&hosts);
    falls_silent(&hosts, &agent, renewed);
    assert!(has_tables(&hosts));
    agent.signal(Signal::SIGCONT);
    agent.logs("is off this host", 1);
    agent.signal(Signal::SIGTERM);
    assert!(until(|| !has_tables(&hosts)), "nothing is held back any more: {}", agent.log());
}

#[test]
fn what_a_killed_agent_has_left_is_silent_until_the_next_life_has_a_lease() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    let (mut agent, _monitor) = holding(&hosts, &files);
    let renewed = Instant::now();
    agent.child.kill().unwrap();
    agent.end();
    keep_there(&hosts);
    falls_silent(&hosts, &agent, renewed);
    let agent = Agent::start(&hosts, &files);
    // R6 (c): the order names nobody who could succeed it, so it needs nobody's word.
    assert!(until(|| answers(&hosts)), "{}", agent.log());
}

/// Asks again and again, until it is told to stop; how often, and how often in vain.
fn ask(hosts: &TwoHosts, stop: &AtomicBool) -> (usize, usize) {
    hosts.on_there(async || {
        let (mut asked, mut lost) = (0, 0);
        while !stop.load(Ordering::SeqCst) {
            asked += 1;
            lost += usize::from(!one_answer());
            std::thread::sleep(Duration::from_millis(2));
        }
        (asked, lost)
    })
}

#[test]
#[expect(clippy::print_stderr, reason = "a measurement is to be seen with --nocapture")]
fn no_restart_makes_a_gap() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    let (mut agent, mut monitor) = holding(&hosts, &files);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asker = scope.spawn(|| ask(&hosts, &stop));
        let restarts = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for signal in [Signal::SIGUSR2, Signal::SIGKILL] {
                let start = Instant::now();
                renew(&mut monitor);
                agent.signal(signal);
                agent.end();
                agent = Agent::start(&hosts, &files);
                monitor = Monitor::connect(&hosts);
                let first = monitor.until_held(5);
                assert!(first.guarded && start.elapsed() < LEASE, "too slow to see anything: {}", agent.log());
                // Longer than what was left of the life before.
                while start.elapsed() < LEASE + SEEN_WITHIN {
                    monitor.until_held(5);
                }
            }
            let start = Instant::now();
            let starts = agent.log().matches("started;").count();
            files.write_common("eth0", "4s");
            agent.signal(Signal::SIGHUP);
            agent.logs("started;", starts + 1);
            monitor = Monitor::connect(&hosts);
            while start.elapsed() < LEASE + SEEN_WITHIN {
                monitor.until_held(5);
            }
        }));
        stop.store(true, Ordering::SeqCst);
        let (asked, lost) = asker.join().unwrap();
        restarts.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        eprintln!("asked {asked} times over three restarts, {lost} times in vain");
        assert!(asked > 500 && lost == 0, "{lost} of {asked} without an answer: {}", agent.log());
    });
}

#[test]
fn an_upgrade_from_an_agent_without_the_guard_keeps_the_answers_until_its_lease_ends() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    server::start(&hosts);
    write_agent(&files, "state/agent.state", false);
    let mut agent = Agent::start(&hosts, &files);
    let mut monitor = Monitor::connect(&hosts);
    assert!(!monitor.until_held(5).guarded);
    renew(&mut monitor);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asker = scope.spawn(|| ask(&hosts, &stop));
        agent.signal(Signal::SIGUSR2);
        agent.end();
        write_agent(&files, "state/agent.state", true);
        agent = Agent::start(&hosts, &files);
        let up = until(|| agent.log().contains("the exact guard is up"));
        let mut monitor = Monitor::connect(&hosts);
        let renewed = (0..3).map(|_| monitor.until_held(5)).all(|report| report.guarded);
        stop.store(true, Ordering::SeqCst);
        let (asked, lost) = asker.join().unwrap();
        assert!(up && renewed && asked > 10 && lost == 0, "{lost} of {asked} without an answer: {}", agent.log());
    });
}

#[test]
fn an_upgrade_keeps_the_answers_and_a_life_without_the_guard_gives_the_address_up() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    let (mut agent, mut monitor) = holding(&hosts, &files);
    // So that there is time for all of this.
    renew(&mut monitor);
    agent.signal(Signal::SIGUSR2);
    assert!(agent.end().success(), "{}", agent.log());
    assert!(answers(&hosts) && has_tables(&hosts), "{}", agent.log());
    // As a kernel before 5.18 has it: nothing tells that an agent has put it there.
    ip(&format!("-n {} address del {ROLE}/32 dev eth0", hosts.here));
    ip(&format!("-n {} address add {ROLE}/32 dev eth0 valid_lft 60 preferred_lft 60", hosts.here));
    let role: IpAddr = ROLE.parse().unwrap();
    let client = hosts.on_there(async || TcpStream::connect_timeout(&(role, 3306).into(), Duration::from_secs(1)));
    let client = client.unwrap();

    write_agent(&files, "state/agent.state", false);
    let agent = Agent::start(&hosts, &files);
    agent.logs("is given up without it", 1);
    agent.logs("connections on the address were ended", 1);
    assert!(until(|| !is_there(&hosts) && !has_tables(&hosts)), "{}", agent.log());
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let end = (&client).read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(end.kind(), ErrorKind::ConnectionReset, "{end}");
    let mut monitor = Monitor::connect(&hosts);
    let report = monitor.until_held(5);
    assert!(!report.guarded && answers(&hosts), "nothing holds it back: {}", agent.log());
}

#[test]
fn a_second_agent_refuses_to_start_and_changes_nothing() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    let (agent, mut monitor) = holding(&hosts, &files);
    // Without what lives, whose timeouts are those of each renewal.
    let tables = || {
        let all = nft(&hosts, "list ruleset");
        all.lines().filter(|line| !line.contains("expires")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = tables();
    for exact_guard in [true, false] {
        write_agent(&files, "other/agent.state", exact_guard);
        let second = in_namespace(&hosts.here, &files.config()).output().unwrap();
        let said = String::from_utf8_lossy(&second.stderr).into_owned();
        assert_eq!(second.status.code(), Some(1), "{said}");
        let pid = agent.child.id();
        assert!(said.contains(&format!("another mmm_agentd (pid {pid}) runs in this network namespace")), "{said}");
        assert!(!files.path("other").exists(), "{said}");
        assert!(answers(&hosts) && tables() == before, "{said}");
        assert!(monitor.until_held(5).guarded);
    }
}

#[test]
fn an_address_put_there_by_hand_is_not_touched_before_an_order_speaks_of_it() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    ip(&format!("-n {} address add {ROLE}/32 dev eth0", hosts.here));
    server::start(&hosts);
    for _ in 0..2 {
        let mut agent = Agent::start(&hosts, &files);
        let mut monitor = Monitor::connect(&hosts);
        let role: IpAddr = ROLE.parse().unwrap();
        for _ in 0..3 {
            let report = monitor.report();
            assert!(report.guarded && report.addresses[&role].present, "{}", agent.log());
            assert!(answers(&hosts), "{}", agent.log());
        }
        agent.signal(Signal::SIGTERM);
        assert!(agent.end().success(), "{}", agent.log());
        assert!(answers(&hosts) && !has_tables(&hosts), "{}", agent.log());
    }
}

#[test]
fn a_firewall_loaded_anew_on_an_older_kernel_does_not_take_the_guard_away() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    // Those that are there belong to nobody, as all do before kernel 6.9.
    for family in ["inet", "arp"] {
        nft(&hosts, &format!("add table {family} mmm_guard"));
    }
    let (agent, _monitor) = holding(&hosts, &files);
    nft(&hosts, "flush ruleset");
    agent.logs("are made again", 1);
    let renewed = Instant::now();
    agent.signal(Signal::SIGSTOP);
    keep_there(&hosts);
    assert!(answers(&hosts), "what was armed is armed again: {}", agent.log());
    falls_silent(&hosts, &agent, renewed);
    agent.signal(Signal::SIGCONT);
}

#[test]
fn an_interface_that_is_not_ethernet_has_no_guard() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    files.write_common("lo", "3s");
    let agent = Agent::start(&hosts, &files);
    agent.logs("interface lo has no Ethernet addresses", 1);
    assert!(!Monitor::connect(&hosts).report().guarded && !has_tables(&hosts), "{}", agent.log());
}

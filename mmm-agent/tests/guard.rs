//! The exact guard in the hands of the real `mmm_agentd` (safety.md, "The guards behind the rules", 1): answers end with
//! the lease whatever becomes of the agent, an upgrade keeps them, and a life without the guard gives up what it is left.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its helpers too")]

mod common;

use common::testnet::{TwoHosts, ip};
use common::{Agent, Files, Monitor, ROLE, hold, is_there, server, until};
use nix::sys::signal::Signal;
use std::io::ErrorKind;
use std::net::{IpAddr, TcpStream};
use std::time::Duration;

/// Nobody listens there: a refusal is an answer.
const PORT: u16 = 1;

fn answers(hosts: &TwoHosts) -> bool {
    let role: IpAddr = ROLE.parse().unwrap();
    let tried = hosts.on_there(async || TcpStream::connect_timeout(&(role, PORT).into(), Duration::from_millis(300)));
    tried.is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused)
}

fn has_tables(hosts: &TwoHosts) -> bool {
    ip(&format!("netns exec {} nft list tables", hosts.here)).contains("mmm_guard")
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

#[test]
fn the_answers_end_with_the_lease_of_an_agent_that_stands_still() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    let (agent, _monitor) = holding(&hosts, &files);
    agent.signal(Signal::SIGSTOP);
    assert!(until(|| !answers(&hosts)), "{}", agent.log());
    assert!(has_tables(&hosts));
    agent.signal(Signal::SIGCONT);
    assert!(until(|| !is_there(&hosts)), "{}", agent.log());
    agent.signal(Signal::SIGTERM);
    assert!(until(|| !has_tables(&hosts)), "nothing is held back any more: {}", agent.log());
}

#[test]
fn an_upgrade_keeps_the_answers_and_a_life_without_the_guard_gives_the_address_up() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    let (mut agent, mut monitor) = holding(&hosts, &files);
    // So that there is time for all of this.
    let report = monitor.report();
    monitor.order(report.anchor, hold(5));
    agent.signal(Signal::SIGUSR2);
    assert!(agent.end().success(), "{}", agent.log());
    assert!(answers(&hosts) && has_tables(&hosts), "{}", agent.log());

    let state = files.path("state/agent.state");
    let without = format!(
        "include = [\"mmm_common.toml\"]\nthis = \"db1\"\n[agent]\nstate_path = {state:?}\nexact_guard = false\n"
    );
    files.write("mmm_agent.toml", &without);
    let agent = Agent::start(&hosts, &files);
    agent.logs("is given up without it", 1);
    assert!(until(|| !is_there(&hosts) && !has_tables(&hosts)), "{}", agent.log());
    let mut monitor = Monitor::connect(&hosts);
    let report = monitor.until_held(5);
    assert!(!report.guarded && answers(&hosts), "nothing holds it back: {}", agent.log());
}

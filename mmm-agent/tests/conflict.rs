//! Somebody else has a role address that the monitor orders this host to hold: the real `mmm_agentd` looks on the wire
//! before it takes it (safety.md, guards, 3). Without proof it does not take it while the other one answers; with
//! proof it takes it at once. The monitor hears of it with the MAC address in both cases. The test is the monitor.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its helpers too")]

mod common;

use common::testnet::{TwoHosts, ip};
use common::{Agent, Files, Monitor, ROLE, hold, is_there, server};
use mmm_common::order::Hold;
use mmm_common::report::Report;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// What the agent keeps to after its start without proof: lease_ttl and the margin.
const QUARANTINE: Duration = Duration::from_millis(4_500);
/// For things that take seconds anyway.
const LONG: Duration = Duration::from_secs(30);

fn role() -> IpAddr {
    ROLE.parse().unwrap()
}

fn without_proof() -> Hold {
    Hold { proof: false, granters: ["db2".into()].into(), ..hold(5) }
}

/// The other host has the address, outside of everything that the monitor has ordered. Its MAC address.
fn squat(hosts: &TwoHosts) -> String {
    let there = &hosts.there;
    ip(&format!("-n {there} address add {ROLE}/32 dev eth0"));
    let link = ip(&format!("-n {there} -o link show eth0"));
    link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap().to_owned()
}

fn go_away(hosts: &TwoHosts) {
    ip(&format!("-n {} address del {ROLE}/32 dev eth0", hosts.there));
}

/// Answers every report with this order until one is as wanted; all of them go through `check`.
fn renewed_until(
    monitor: &mut Monitor,
    order: &Hold,
    mut check: impl FnMut(&Report),
    wanted: impl Fn(&Report) -> bool,
) -> Report {
    let end = Instant::now() + LONG;
    while Instant::now() < end {
        let report = monitor.report();
        monitor.order(report.anchor, order.clone());
        check(&report);
        if wanted(&report) {
            return report;
        }
    }
    panic!("not within {} s", LONG.as_secs());
}

#[test]
fn without_proof_it_is_not_taken_while_somebody_else_answers() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    server::start(&hosts);
    let mac = squat(&hosts);
    let agent = Agent::start(&hosts, &files);
    let start = Instant::now();
    let mut monitor = Monitor::connect(&hosts);
    let order = without_proof();
    let not_held = |report: &Report| {
        assert!(!report.addresses[&role()].has() && !is_there(&hosts), "{}", agent.log());
    };

    let report = renewed_until(&mut monitor, &order, not_held, |r| !r.conflicts.is_empty());
    assert_eq!(report.conflicts[&role()], mac);
    let late = start + QUARANTINE + Duration::from_secs(3);
    let report = renewed_until(&mut monitor, &order, not_held, |_| Instant::now() >= late);
    assert_eq!(report.conflicts[&role()], mac, "it stays so: {}", agent.log());
    agent.logs("it is not taken until that ends", 1);

    go_away(&hosts);
    let report = renewed_until(&mut monitor, &order, |_| {}, |r| r.addresses[&role()].has());
    assert!(is_there(&hosts));
    assert_eq!(report.conflicts, [].into(), "{}", agent.log());
    agent.logs(&format!("{mac} no longer answers"), 1);
}

#[test]
fn without_proof_and_without_anybody_else_it_is_taken_after_the_quarantine() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    server::start(&hosts);
    // The agent counts from a moment after this one.
    let start = Instant::now();
    let agent = Agent::start(&hosts, &files);
    let mut monitor = Monitor::connect(&hosts);
    let held = |report: &Report| report.addresses[&role()].has();
    let report = renewed_until(&mut monitor, &without_proof(), |r| assert_eq!(r.conflicts, [].into()), held);
    assert!(report.addresses[&role()].has() && is_there(&hosts));
    assert!(start.elapsed() >= QUARANTINE, "{:?}: {}", start.elapsed(), agent.log());
}

#[test]
fn with_proof_it_is_taken_at_once_and_the_other_is_named() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    server::start(&hosts);
    let mac = squat(&hosts);
    let agent = Agent::start(&hosts, &files);
    let start = Instant::now();
    let mut monitor = Monitor::connect(&hosts);
    let order = hold(5);

    renewed_until(&mut monitor, &order, |_| {}, |r| r.addresses[&role()].has());
    assert!(start.elapsed() < QUARANTINE, "{:?}: {}", start.elapsed(), agent.log());
    let held = |report: &Report| assert!(report.addresses[&role()].has(), "{}", agent.log());
    let report = renewed_until(&mut monitor, &order, held, |r| !r.conflicts.is_empty());
    assert_eq!(report.conflicts[&role()], mac);
    assert!(is_there(&hosts));
    // Before or after it was put on: the one says "it is taken all the same", the other "it is here by an order".
    agent.logs(&format!("Somebody else, {mac}, answers for writer"), 1);

    go_away(&hosts);
    renewed_until(&mut monitor, &order, held, |r| r.conflicts.is_empty());
    agent.logs(&format!("{mac} no longer answers"), 1);
}

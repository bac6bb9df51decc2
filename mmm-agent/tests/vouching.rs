//! Two real agents and a monitor that has spoken once: db1 holds the role for as long as db2 vouches for it, whatever
//! happens to db1's own process, and no longer (safety.md, R6, R9, and the kernel's lifetime).

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its helpers too")]

mod common;

use common::testnet::{self, TwoHosts, ip};
use common::{Agent, Files, Monitor, ROLE, hold, is_there, server, until};
use mmm_common::epoch::Epoch;
use mmm_common::order::{AddressOrder, Hold};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What the configuration says.
const LEASE_TTL: Duration = Duration::from_secs(3);
/// The kernel's lateness, and what it takes to see it.
const MARGIN: Duration = Duration::from_millis(1500);
const CONNECTED: &str = "Agent of db2 can be asked";

/// db1 holds the role, and only db2 could take it; db2's agent runs. The monitor has said so to both and then no more.
struct Vouching {
    hosts: TwoHosts,
    files: Files,
    other_files: Files,
    db1: Agent,
    db2: Agent,
    _silent: Monitor,
}

impl Vouching {
    fn new() -> Option<Vouching> {
        let hosts = TwoHosts::new()?;
        let (files, other_files) = (Files::of("db1"), Files::of("db2"));
        server::start(&hosts);
        let db2 = Agent::start_in(&hosts.there, &other_files);
        let db1 = Agent::start(&hosts, &files);
        tell_that_it_is_not_here(&hosts);
        let mut monitor = Monitor::connect(&hosts);
        monitor.until_holds(&Hold { granters: BTreeSet::from(["db2".into()]), write: true, ..hold(6) });
        Some(Vouching { hosts, files, other_files, db1, db2, _silent: monitor })
    }

    /// The address is there at every look, one every few milliseconds, until `work` has ended.
    fn stays_while(&mut self, work: impl FnOnce(&mut Vouching)) {
        let ns = self.hosts.here.clone();
        let end = AtomicBool::new(false);
        let (looks, misses) = std::thread::scope(|scope| {
            let looking = scope.spawn(|| testnet::inside(&ns, async || look(&end)));
            let worked = std::panic::catch_unwind(AssertUnwindSafe(|| work(self)));
            end.store(true, Ordering::Relaxed);
            let seen = looking.join().unwrap();
            if let Err(panic) = worked {
                std::panic::resume_unwind(panic);
            }
            seen
        });
        assert!(looks > 100, "only {looks} looks");
        assert_eq!(misses, 0, "of {looks} looks; db1:\n{}\ndb2:\n{}", self.db1.log(), self.db2.log());
    }

    /// From now on.
    fn is_gone_within(&self, limit: Duration) {
        let start = Instant::now();
        assert!(until(|| !is_there(&self.hosts)), "it stays; db1:\n{}", self.db1.log());
        assert!(start.elapsed() < limit, "after {:?}; db1:\n{}", start.elapsed(), self.db1.log());
    }
}

/// To db2: an agent vouches only for an address of which it has heard.
fn tell_that_it_is_not_here(hosts: &TwoHosts) {
    let mut monitor = Monitor::connect_to(hosts, "db2", "10.77.0.2:9989");
    let told = (0..50).any(|_| {
        let report = monitor.report();
        monitor.order_address(report.anchor, AddressOrder::LetGo { epoch: Epoch(5) });
        report.addresses[&ROLE.parse().unwrap()].seen == Epoch(5)
    });
    assert!(told, "db2 has not heard the order within 50 reports");
}

/// Looks and misses.
fn look(end: &AtomicBool) -> (u32, u32) {
    let (mut looks, mut misses) = (0, 0);
    while !end.load(Ordering::Relaxed) {
        looks += 1;
        // A local address can be bound, and no other.
        misses += u32::from(UdpSocket::bind((ROLE, 0)).is_err());
        std::thread::sleep(Duration::from_millis(3));
    }
    (looks, misses)
}

/// Longer than any lease lasts by itself.
fn outlast_a_lease() {
    std::thread::sleep(LEASE_TTL + MARGIN);
}

#[test]
fn a_silent_monitor_costs_no_role_while_the_other_agent_vouches_and_no_longer() {
    let Some(mut test) = Vouching::new() else { return };
    test.stays_while(|_| std::thread::sleep(LEASE_TTL * 3));
    test.db2.child.kill().unwrap();
    test.db2.end();
    assert!(is_there(&test.hosts), "the last vouch still counts");
    test.is_gone_within(LEASE_TTL + MARGIN);
}

#[test]
fn an_agent_that_starts_again_in_time_keeps_its_role_by_its_peers_word() {
    let Some(mut test) = Vouching::new() else { return };
    test.stays_while(|test| {
        test.db1.logs(CONNECTED, 1);
        outlast_a_lease();

        test.db1.child.kill().unwrap();
        test.db1.end();
        std::thread::sleep(Duration::from_millis(400));
        test.db1 = Agent::start(&test.hosts, &test.files);
        test.db1.logs(CONNECTED, 2);
        outlast_a_lease();

        // An upgrade.
        test.db1.signal(Signal::SIGUSR2);
        assert!(test.db1.end().success(), "{}", test.db1.log());
        test.db1 = Agent::start(&test.hosts, &test.files);
        test.db1.logs(CONNECTED, 3);
        outlast_a_lease();

        // A new configuration.
        test.files.write_common("eth0", "2s");
        test.db1.signal(Signal::SIGHUP);
        test.db1.logs(CONNECTED, 4);
        outlast_a_lease();

        // And the other one's restart.
        test.db2.child.kill().unwrap();
        test.db2.end();
        test.db2 = Agent::start_in(&test.hosts.there, &test.other_files);
        test.db1.logs(CONNECTED, 5);
        outlast_a_lease();
    });
    let log = test.db1.log();
    assert_eq!(log.matches("the monitor has connected").count(), 1, "only at first: {log}");
}

#[test]
fn a_killed_agents_role_leaves_by_the_kernels_hand_though_its_peer_would_vouch() {
    let Some(mut test) = Vouching::new() else { return };
    test.stays_while(|_| outlast_a_lease());
    test.db1.child.kill().unwrap();
    test.db1.end();
    assert!(is_there(&test.hosts));
    test.is_gone_within(LEASE_TTL + MARGIN);
}

#[test]
fn a_stopped_agents_role_leaves_and_comes_back_only_by_a_new_vouch() {
    let Some(mut test) = Vouching::new() else { return };
    test.stays_while(|_| outlast_a_lease());
    let stopped = Instant::now();
    test.db1.signal(Signal::SIGSTOP);
    test.is_gone_within(LEASE_TTL + MARGIN);
    // The kernel counts whole seconds and may be earlier than the lease, by which the address would come back.
    std::thread::sleep(LEASE_TTL.saturating_sub(stopped.elapsed()));
    // Nobody can vouch when it wakes.
    test.db2.signal(Signal::SIGSTOP);
    test.db1.signal(Signal::SIGCONT);
    test.db1.logs("is off this host", 1);
    let start = Instant::now();
    while start.elapsed() < LEASE_TTL {
        assert!(!is_there(&test.hosts), "{}", test.db1.log());
    }
    test.db2.signal(Signal::SIGCONT);
    assert!(until(|| is_there(&test.hosts)), "db1:\n{}\ndb2:\n{}", test.db1.log(), test.db2.log());
}

/// Nothing passes between the two hosts for so long: each looks for the other at a MAC address that nobody has.
fn cut(hosts: &TwoHosts, time: Duration) {
    let ways = [(&hosts.here, "10.77.0.2"), (&hosts.there, "10.77.0.1")];
    for (ns, other) in ways {
        ip(&format!("-n {ns} neigh replace {other} lladdr 02:00:00:00:00:99 dev eth0 nud permanent"));
    }
    std::thread::sleep(time);
    for (ns, other) in ways {
        ip(&format!("-n {ns} neigh del {other} dev eth0"));
    }
}

#[test]
fn a_cut_of_half_a_lease_between_the_agents_costs_no_role_and_a_long_one_does() {
    let Some(mut test) = Vouching::new() else { return };
    test.db1.logs(CONNECTED, 1);
    test.stays_while(|test| {
        for _ in 0..3 {
            // Longer ones may cost it: a lease is shorter by a heartbeat and the time to let go, and TCP tries again
            // at growing pauses.
            cut(&test.hosts, LEASE_TTL / 2);
            std::thread::sleep(LEASE_TTL / 2);
        }
    });
    std::thread::scope(|scope| {
        scope.spawn(|| cut(&test.hosts, LEASE_TTL * 2));
        test.is_gone_within(LEASE_TTL + MARGIN);
    });
    test.db1.logs(CONNECTED, 2);
    assert!(until(|| is_there(&test.hosts)), "vouched for again: {}", test.db1.log());
}

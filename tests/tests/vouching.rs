//! Stories about hosts that vouch for each other: losing the monitor costs nothing, losing touch with everybody costs the
//! roles (safety.md, R6, R11, "Choosing granters", "Peers as observers"). lessons.md 1, 18, 21, 22.

use mmm_common::control::{Answer, Command};
use mmm_tests::stories::{HOSTS, cluster, set_online, shows, told};
use mmm_tests::world::{WRITER, World, config};
use std::time::Duration;

const READERS: [&str; 3] = ["10.0.0.51", "10.0.0.52", "10.0.0.53"];

fn readers(w: &World) -> Vec<String> {
    READERS.iter().map(|ip| w.holders(ip).join("+")).collect()
}

#[test]
fn a_monitor_that_is_dead_for_long_costs_no_write_and_no_address() {
    let mut w = cluster();
    let before = readers(&w);
    w.stop_monitor();
    w.run(120_000);
    assert_eq!((w.holders(WRITER), readers(&w)), (vec!["db1"], before.clone()), "{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
    w.start_monitor();
    w.run(20_000);
    assert_eq!((w.holders(WRITER), readers(&w)), (vec!["db1"], before), "{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
}

// lessons.md 18
#[test]
fn a_writer_that_only_the_monitor_cannot_reach_keeps_its_role_and_show_says_why() {
    let mut w = cluster();
    w.unseen.insert("db1".into());
    w.run(30_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
    shows(&mut w, "db1(10.0.0.11) master/ONLINE");
    shows(&mut w, "Host db1 cannot be reached from the monitor, but is seen by db2");
    shows(&mut w, "# Warning: agent on host db1 is not reachable");
    w.unseen.clear();
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(!w.show().contains("seen by"), "{}", w.show());
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
}

#[test]
fn who_was_seen_by_a_peer_only_and_then_dies_is_failed_over() {
    let mut w = cluster();
    w.unseen.insert("db1".into());
    w.run(20_000);
    w.crash_host("db1");
    w.run(9_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(w.lost_on("db2"), 0, "{}", told(&w));
}

/// What a peer saw of it before its death excuses nothing afterwards.
#[test]
fn a_host_that_dies_is_hard_offline_as_soon_as_its_checks_have_failed_for_long_enough() {
    let mut w = cluster();
    w.crash_host("db1");
    w.run(4_500);
    shows(&mut w, "db1(10.0.0.11) master/HARD_OFFLINE");
}

#[test]
fn an_operator_may_move_the_writer_away_from_a_host_that_only_peers_see() {
    let mut w = cluster();
    w.unseen.insert("db1".into());
    w.run(20_000);
    w.command(Command::MoveRole { role: "writer".into(), host: "db2".into(), force: false });
    w.run(12_000);
    assert!(matches!(w.late_answer(), Some(Answer::Done { .. })), "{:?}\n{}", w.late_answer(), told(&w));
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(w.lost_on("db2"), 0, "{}", told(&w));
}

// lessons.md 1
#[test]
fn an_isolated_writer_has_no_address_after_its_lease_and_the_other_writes() {
    let mut w = cluster();
    w.cut.insert("db1".into());
    let gone = w.run_until(10_000, |w| !w.holders(WRITER).contains(&"db1")).expect("it lets go");
    assert!(gone <= 3_000, "{gone} ms\n{}", told(&w));
    let open = w.run_until(10_000, World::writer_is_open).expect("db2 opens");
    assert!(gone + open <= 5_500, "{gone} + {open} ms\n{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db2"]);
}

// lessons.md 1
#[test]
fn without_the_monitor_a_writer_that_loses_its_only_granter_lets_go() {
    let mut w = cluster();
    w.stop_monitor();
    w.run(10_000);
    w.crash_host("db2");
    w.run(5_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "nobody knows whether db2 is to have it\n{}", told(&w));
    w.boot_host("db2");
    let back = w.run_until(20_000, World::writer_is_open);
    assert!(back.is_some(), "with its granter the writer comes back\n{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db1"]);
}

#[test]
fn a_granter_that_is_away_for_long_is_left_out_so_that_the_monitor_may_die_too() {
    let mut w = cluster();
    w.crash_host("db2");
    w.run(20_000);
    shows(&mut w, "writer(10.0.0.50): db2 is offline and could not take over from db1 if that died silently");
    w.stop_monitor();
    w.outage = 0;
    w.run(60_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
}

#[test]
fn a_granter_that_is_back_can_take_over_again() {
    let mut w = cluster();
    w.crash_host("db2");
    w.run(20_000);
    w.boot_host("db2");
    w.run(5_000);
    set_online(&mut w, "db2");
    w.run(15_000);
    assert!(!w.show().contains("could not take over"), "{}\n{}", w.show(), told(&w));
    w.crash_host("db1");
    w.run(9_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

#[test]
fn a_host_that_was_left_out_takes_over_only_after_a_kill_or_the_operators_word() {
    for kill in [true, false] {
        let mut c = config(&HOSTS);
        c.kill_host_bin = kill.then(|| "/bin/kill_host".into());
        let mut w = World::with(c);
        w.run(2_500);
        for host in HOSTS {
            set_online(&mut w, host);
            w.run(2_000);
        }
        w.run(6_000);
        w.command(Command::SetOffline { host: "db2".into() });
        w.run(5_000);
        w.cut.insert("db1".into());
        w.run(30_000);
        set_online(&mut w, "db2");
        w.run(10_000);
        assert_eq!(w.holders(WRITER), ["db1"], "it goes on by itself\n{}", told(&w));
        shows(&mut w, "its last order does not end by itself because db2 was offline when it was given");
        if kill {
            assert!(w.confirm_kill("db1"), "{}", told(&w));
        } else {
            let answer = w.text(Command::ConfirmDead { host: "db1".into() });
            assert!(answer.starts_with("OK"), "{answer}");
        }
        // Whoever says that it is dead has to be right.
        w.crash_host("db1");
        w.run(5_000);
        assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    }
}

// lessons.md 21
#[test]
fn a_monitor_that_has_lost_its_disk_finds_the_writer_at_work_and_lets_it_go_on() {
    let mut w = cluster();
    let before = readers(&w);
    w.stop_monitor();
    w.forget_status();
    w.run(5_000);
    w.start_monitor();
    w.run(15_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert_eq!(readers(&w), before, "{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
    for host in HOSTS {
        shows(
            &mut w,
            &format!("{host}(10.0.0.1{}) {}/ONLINE", &host[2..], if host == "db3" { "slave" } else { "master" }),
        );
    }
    w.kill_server("db1");
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db2"], "it decides again\n{}", told(&w));
}

#[test]
fn a_monitor_without_its_disk_waits_for_an_agent_that_does_not_answer_and_the_holder_goes_on() {
    let mut w = cluster();
    w.stop_monitor();
    w.forget_status();
    w.unseen.insert("db2".into());
    w.run(5_000);
    w.start_monitor();
    w.run(30_000);
    assert_eq!(w.holders(WRITER), ["db1"], "db2 still vouches for it\n{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
    w.unseen.clear();
    w.run(15_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
    set_online(&mut w, "db2");
    w.command(Command::MoveRole { role: "writer".into(), host: "db2".into(), force: false });
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db2"], "it can be moved again\n{}", told(&w));
}

// lessons.md 22
#[test]
fn an_agent_that_is_killed_for_good_loses_its_roles_by_the_kernels_hand() {
    let mut w = cluster();
    w.stop_agent("db1");
    let gone = w.run_until(10_000, |w| !w.holders(WRITER).contains(&"db1")).expect("the kernel removes it");
    assert!(gone <= 4_500, "{gone} ms\n{}", told(&w));
    w.run(6_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

// lessons.md 9
#[test]
fn an_agent_that_is_back_within_a_second_keeps_its_roles_also_without_a_monitor() {
    for monitor in [true, false] {
        let mut w = cluster();
        if !monitor {
            w.stop_monitor();
            w.run(2_000);
        }
        for _ in 0..5 {
            w.stop_agent("db1");
            w.run(900);
            w.start_agent(&"db1".into());
            w.run(4_000);
        }
        assert_eq!(w.holders(WRITER), ["db1"], "monitor: {monitor}\n{}", told(&w));
        assert!(w.outage <= 100, "monitor: {monitor}, {} ms\n{}", w.outage, told(&w));
    }
}

/// Both at once: the agents come back within their leases, the monitor later.
#[test]
fn all_agents_and_the_monitor_restarted_within_a_second_lose_nothing() {
    let mut w = cluster();
    w.stop_monitor();
    for host in HOSTS {
        w.stop_agent(host);
        w.run(100);
        w.start_agent(&host.into());
    }
    w.run(10_000);
    w.start_monitor();
    w.run(20_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
}

/// The monitor that is told of a shorter lease_ttl waits out what it gave under the longer one. The hosts cannot hear each
/// other, so nobody's vouch covers for it.
#[test]
fn a_shorter_lease_ttl_in_the_configuration_does_not_shorten_leases_that_were_given() {
    let mut c = config(&HOSTS);
    c.cluster.lease_ttl = Duration::from_secs(20);
    let mut w = World::with(c);
    w.run(2_500);
    for host in HOSTS {
        set_online(&mut w, host);
        w.run(2_000);
    }
    w.run(2_000);
    let reader = *READERS.iter().find(|ip| w.holders(ip) == ["db1"]).expect("db1 has a reader address");
    w.cut_between("db1", "db2");
    w.cut_between("db1", "db3");
    w.run(22_000);
    w.stop_monitor();
    w.isolate("db1");
    w.config.cluster.lease_ttl = Duration::from_secs(3);
    w.start_monitor();
    // The world looks after every event that nobody has it twice.
    w.run(16_000);
    assert_eq!(w.holders(reader), ["db1"], "its lease runs\n{}", told(&w));
    w.run(14_000);
    assert!(["db2", "db3"].contains(&w.holders(reader)[0]), "{}", told(&w));
}

/// The same for who has vouched: its next life waits as long as its promise.
#[test]
fn a_restart_with_a_shorter_lease_ttl_does_not_shorten_a_promise() {
    let mut c = config(&HOSTS);
    c.cluster.lease_ttl = Duration::from_secs(20);
    let mut w = World::with(c);
    w.run(2_500);
    for host in HOSTS {
        set_online(&mut w, host);
        w.run(2_000);
    }
    w.unseen.insert("db1".into());
    w.run(40_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    w.agents_lease_ttl = Some(Duration::from_secs(3));
    w.command(Command::MoveRole { role: "writer".into(), host: "db2".into(), force: false });
    w.stop_agent("db2");
    w.start_agent(&"db2".into());
    w.cut_between("db1", "db2");
    w.run(40_000);
    assert_eq!(w.holders(WRITER).len(), 1, "{}", told(&w));
}

/// Found by the chaos campaign: its first tick after the pause found everybody silent, before it had read what they said.
#[test]
fn a_monitor_that_was_stopped_for_a_while_moves_nothing_when_it_goes_on() {
    for pause in [2_000, 3_500, 4_000, 20_000] {
        let mut w = cluster();
        let before = readers(&w);
        w.pause_monitor();
        w.run(pause);
        w.resume_monitor();
        w.run(10_000);
        assert_eq!((w.holders(WRITER), readers(&w)), (vec!["db1"], before), "{pause} ms\n{}", told(&w));
        assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
        shows(&mut w, "db1(10.0.0.11) master/ONLINE");
    }
}

/// And what died meanwhile is failed over.
#[test]
fn who_dies_while_the_monitor_is_stopped_is_failed_over_when_it_goes_on() {
    let mut w = cluster();
    w.pause_monitor();
    w.run(3_000);
    w.crash_host("db1");
    w.run(3_000);
    w.resume_monitor();
    w.run(6_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

/// A monitor that is cut off from everybody sees everybody die at once. Its own network check may fail too, or not.
#[test]
fn a_monitor_that_was_cut_off_from_all_hosts_moves_nothing_when_it_is_back() {
    for away in [4_000, 10_000, 30_000, 90_000] {
        for pings in ["answer", "fail and come back early", "fail and come back late"] {
            let mut w = cluster();
            let before = readers(&w);
            w.network = pings == "answer";
            w.run(1_100);
            w.unseen = HOSTS.map(Into::into).into();
            w.run(away);
            if pings == "fail and come back early" {
                w.network = true;
                w.run(1_500);
            }
            w.unseen.clear();
            w.run(3_000);
            w.network = true;
            w.run(20_000);
            let what = format!("{away} ms, pings {pings}");
            assert_eq!((w.holders(WRITER), readers(&w)), (vec!["db1"], before), "{what}\n{}", told(&w));
            assert!(w.outage <= 100, "{what}, {} ms\n{}", w.outage, told(&w));
            for host in HOSTS {
                shows(
                    &mut w,
                    &format!(
                        "{host}(10.0.0.1{}) {}/ONLINE",
                        &host[2..],
                        if host == "db3" { "slave" } else { "master" }
                    ),
                );
            }
        }
    }
}

/// Its agent has a configuration of its own, with a lease that it can end by itself.
#[test]
fn an_agent_without_the_exact_guard_gets_no_role_while_leases_are_too_short_for_it() {
    let mut c = config(&HOSTS);
    c.cluster.lease_ttl = Duration::from_secs(1);
    c.cluster.heartbeat_interval = Duration::from_millis(200);
    let mut w = World::with(c);
    for host in ["db2", "db3"] {
        w.host(host).guarded = true;
        w.stop_agent(host);
        w.start_agent(&host.into());
    }
    w.run(4_000);
    for host in HOSTS {
        set_online(&mut w, host);
        w.run(2_000);
    }
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    shows(&mut w, "Warning: host db1 gets no role: lease_ttl 1s needs the exact guard");
    w.host("db1").guarded = true;
    w.stop_agent("db1");
    w.start_agent(&"db1".into());
    w.run(4_000);
    w.crash_host("db2");
    w.run(9_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
}

//! Attacks on vouching, on choosing granters and on the memory of both sides, which the cores stand (src/world.rs).

use mmm_common::config::Cluster;
use mmm_common::control::Command;
use mmm_common::ids::HostName;
use mmm_common::state::MonitorMode;
use mmm_tests::stories::{HOSTS, cluster, cluster_of, move_writer, set_online, shows, shows_not, told};
use mmm_tests::world::{WRITER, World, config};

const READERS: [&str; 3] = ["10.0.0.51", "10.0.0.52", "10.0.0.53"];

#[test]
fn a_monitor_without_its_disk_lets_the_writer_go_on_in_wait_and_manual_mode_too() {
    for mode in [MonitorMode::Wait, MonitorMode::Manual] {
        let mut w = cluster();
        w.stop_monitor();
        w.forget_status();
        w.config.mode = mode;
        w.start_monitor();
        w.run(15_000);
        assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
        assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
    }
}

#[test]
fn a_link_that_flaps_while_granters_change_ends_with_one_writer_and_no_more_epochs() {
    for (n, every) in [130, 370, 1_100].into_iter().enumerate() {
        let mut w = cluster();
        w.link_patience = [0, 700, 2_000][n % 3];
        for i in 0..60 {
            if i % 2 == 0 {
                w.unseen.insert("db1".into());
            } else {
                w.unseen.clear();
            }
            if i == 10 || i == 40 {
                w.crash_host("db3");
            }
            if i == 30 || i == 50 {
                w.boot_host("db3");
            }
            w.run(every);
        }
        w.unseen.clear();
        w.run(60_000);
        assert!(w.writer_is_open(), "every {every} ms\n{}", told(&w));
        let epoch = w.saved().expect("saved").epoch;
        w.run(60_000);
        assert_eq!(w.saved().expect("saved").epoch, epoch, "it goes on deciding\n{}", told(&w));
    }
}

#[test]
fn a_machine_whose_clock_has_jumped_by_hours_takes_nothing_by_what_it_was_told_before() {
    for jump in [4_000, 600_000] {
        for step in [0, 250] {
            let mut w = cluster();
            w.run(step);
            w.freeze_host("db1", true);
            w.run(jump);
            w.wake_host("db1");
            w.run(20_000);
            assert!(w.writer_is_open(), "{}", told(&w));
            assert_eq!(w.holders(WRITER).len(), 1, "{}", told(&w));
        }
    }
}

#[test]
fn a_lost_disk_of_the_monitor_and_a_granter_that_was_rebooted_meanwhile() {
    for mode in [MonitorMode::Active, MonitorMode::Manual, MonitorMode::Wait] {
        let mut w = cluster();
        w.stop_monitor();
        w.forget_status();
        w.crash_host("db2");
        w.run(500);
        w.boot_host("db2");
        w.run(10_000);
        assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
        w.config.mode = mode;
        w.outage = 0;
        w.start_monitor();
        w.run(20_000);
        assert_eq!(w.holders(WRITER), ["db1"], "{mode}\n{}", told(&w));
        assert!(w.outage <= 100, "{mode} {} ms\n{}", w.outage, told(&w));
    }
}

#[test]
fn an_agent_killed_at_any_moment_of_taking_over_does_not_leave_two_or_none() {
    for ms in (0..60).step_by(4) {
        let mut w = cluster();
        w.command(move_writer("db2", false));
        w.run(ms);
        w.stop_agent("db2");
        w.start_agent(&"db2".into());
        w.run(20_000);
        assert!(w.writer_is_open(), "{ms}\n{}", told(&w));
        assert_eq!(w.lost_on("db2") + w.lost_on("db1"), 0, "{ms}\n{}", told(&w));
    }
}

#[test]
fn a_regrant_at_the_instant_of_a_move_costs_nothing() {
    for ms in 0..12 {
        let mut w = cluster();
        w.command(Command::SetOffline { host: "db3".into() });
        w.run(5_000);
        w.outage = 0;
        set_online(&mut w, "db3");
        w.run(ms);
        w.command(move_writer("db2", false));
        w.run(10_000);
        assert_eq!(w.holders(WRITER), ["db2"], "{ms}\n{}", told(&w));
        assert!(w.outage < 500, "{ms}: {} ms\n{}", w.outage, told(&w));
        assert_eq!(w.lost_on("db2"), 0, "{ms}\n{}", told(&w));
    }
}

#[test]
fn a_host_killed_by_the_operators_word_that_comes_back_alive_gives_up_at_once() {
    // Its isolation ends only when it may be seen again: until then the operator was right.
    let mut w = cluster();
    w.freeze_host("db1", true);
    w.run(4_000);
    let said = w.text(Command::ConfirmDead { host: "db1".into() });
    assert!(said.starts_with("OK"), "{said}");
    w.run(6_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.wake_host("db1");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

#[test]
fn passive_while_granters_come_and_go() {
    let mut w = cluster();
    w.command(Command::SetPassive);
    w.crash_host("db2");
    w.run(30_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    w.boot_host("db2");
    w.run(10_000);
    w.stop_monitor();
    w.run(20_000);
    w.start_monitor();
    w.run(10_000);
    w.command(Command::SetActive);
    w.run(20_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
}

#[test]
fn an_agent_restarted_at_any_moment_of_a_regrant_keeps_its_roles() {
    for ms in 0..12 {
        let mut w = cluster();
        w.command(Command::SetOffline { host: "db2".into() });
        w.run(ms);
        w.stop_agent("db1");
        w.run(300);
        w.start_agent(&"db1".into());
        w.run(10_000);
        set_online(&mut w, "db2");
        w.run(ms);
        w.stop_agent("db1");
        w.run(300);
        w.start_agent(&"db1".into());
        w.run(10_000);
        assert_eq!(w.holders(WRITER), ["db1"], "{ms}\n{}", told(&w));
        assert!(w.outage <= 100, "{ms}: {} ms\n{}", w.outage, told(&w));
    }
}

fn holder_is(w: &World, host: &str) -> bool {
    let writer = WRITER.parse().expect("an address");
    w.saved().is_some_and(|s| s.slots[&writer].holder == Some(host.into()))
}

fn reader_on(w: &World, host: &str) -> &'static str {
    READERS.into_iter().find(|ip| w.holders(ip) == [host]).expect("it has a reader address")
}

#[test]
fn a_monitor_put_back_to_an_older_state_does_not_take_a_number_that_was_used_for_its_own() {
    let mut w = cluster();
    let old = w.saved().cloned().expect("saved");
    w.command(move_writer("db2", false));
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.refuse_steps.insert(("db1".into(), "writable"));
    w.command(move_writer("db1", false));
    w.run_until(5_000, |w| holder_is(w, "db1")).expect("granted");
    // The last decision reaches db1 only, and the monitor ends. Its machine is put back to an older state.
    w.unseen.insert("db2".into());
    w.unseen.insert("db3".into());
    w.run(100);
    w.stop_monitor();
    w.restore_status(old);
    w.unseen = ["db1", "db3"].map(HostName::from).into();
    w.start_monitor();
    w.run(600);
    // db1 says one word, and hears none: the way there fails.
    w.unseen.clear();
    let before = w.story.len();
    for i in 0..1_000 {
        // Something is replicated, so that db1's watcher looks (the real one does so each second).
        if i % 20 == 0 {
            *w.host("db2").server.executed.entry(2).or_insert(0) += 1;
        }
        w.run(1);
        if w.story[before..].iter().any(|l| l.contains("db1: The monitor is connected")) {
            break;
        }
    }
    w.cut_way(mmm_tests::world::MONITOR, "db1");
    // The world looks after every event that nobody has it twice.
    w.run(5_000);
    w.refuse_steps.clear();
    w.run(5_000);
    w.end_cuts();
    w.run(30_000);
    assert_eq!(w.holders(WRITER).len(), 1, "{}", told(&w));
}

#[test]
fn a_granter_that_has_forgotten_an_address_does_not_vouch_for_who_had_it_long_ago() {
    let mut w = cluster();
    w.cut.insert("db1".into());
    w.run(12_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.cut.clear();
    w.unseen.insert("db1".into());
    w.run(3_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    // db2's configuration loses the role for a moment.
    let good = w.config.clone();
    w.config.cluster.roles.get_mut(&"writer".into()).expect("the role").ips.clear();
    w.stop_agent("db2");
    w.start_agent(&"db2".into());
    w.run(1_500);
    w.end_agent("db2");
    w.run(12_000);
    assert!(!w.has_agent("db2"), "{}", told(&w));
    w.config = good;
    w.unseen.insert("db2".into());
    w.refuse_steps.insert(("db1".into(), "writable"));
    w.start_agent(&"db2".into());
    w.run(1_000);
    w.unseen.remove(&HostName::from("db2"));
    w.run_until(5_000, |w| w.holders(WRITER) == ["db2"]).unwrap_or_else(|| panic!("db2 gets it\n{}", told(&w)));
    w.refuse_steps.clear();
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

#[test]
fn a_monitor_without_its_disk_lets_the_writer_go_on_also_when_it_reaches_the_agents_later() {
    let mut w = cluster();
    w.stop_monitor();
    w.forget_status();
    w.unseen = HOSTS.map(HostName::from).into();
    w.start_monitor();
    w.run(6_000);
    w.unseen.clear();
    w.run(20_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
}

// Simulator, storm 9099046: db2 was to have the writer when db1 said that it has it, and each waited for the other.
#[test]
fn a_monitor_without_its_disk_lets_the_writer_go_on_that_answers_after_another_master_is_online() {
    let mut w = cluster();
    w.stop_monitor();
    w.forget_status();
    w.unseen.insert("db1".into());
    w.start_monitor();
    w.run(6_000);
    set_online(&mut w, "db2");
    w.run(2_000);
    shows(&mut w, "db1 has not answered yet, and what it was ordered is not known here");
    w.unseen.clear();
    w.run(15_000);
    shows(&mut w, "db1(10.0.0.11) master/ONLINE. Roles: reader(10.0.0.51), writer(10.0.0.50)");
    shows_not(&mut w, "to let go");
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
    w.command(move_writer("db2", false));
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db2"], "it can be moved\n{}", told(&w));
}

#[test]
fn a_monitor_without_its_disk_in_passive_mode_lets_the_writer_go_on_when_it_is_set_active() {
    let mut w = cluster();
    w.stop_monitor();
    w.forget_status();
    w.config.mode = MonitorMode::Passive;
    w.start_monitor();
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    w.command(Command::SetActive);
    w.run(15_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
}

#[test]
fn a_monitor_without_its_disk_and_for_a_moment_without_network_lets_the_writer_go_on() {
    let mut w = cluster();
    w.stop_monitor();
    w.forget_status();
    w.network = false;
    w.start_monitor();
    w.run(6_000);
    w.network = true;
    w.run(15_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
}

#[test]
fn a_new_writer_that_only_its_peers_see_open_keeps_the_role() {
    let mut w = cluster();
    w.command(move_writer("db2", false));
    w.run_until(5_000, |w| holder_is(w, "db2")).expect("granted");
    w.run(2);
    w.unseen.insert("db2".into());
    w.run(1_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.outage = 0;
    w.run(30_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!(w.outage <= 100, "{} ms\n{}", w.outage, told(&w));
}

#[test]
fn a_role_that_goes_back_to_where_it_came_from_loses_no_writes_unsaid() {
    let mut w = cluster();
    w.command(move_writer("db2", false));
    w.run_until(5_000, |w| holder_is(w, "db2")).expect("granted");
    w.run(2);
    w.unseen.insert("db2".into());
    w.host("db1").server.io = false;
    w.run(40_000);
    assert!(w.holders(WRITER) != ["db1"] || w.lost_on("db1") == 0, "lost {}\n{}", w.lost_on("db1"), told(&w));
}

#[test]
fn a_change_of_granters_that_the_holder_does_not_hear_of_costs_it_nothing() {
    for ms in [0, 3] {
        let mut w = cluster();
        w.link_patience = 2_000;
        let ip = reader_on(&w, "db1");
        w.crash_host("db3");
        w.run(20_000);
        w.boot_host("db3");
        w.run(ms);
        w.unseen.insert("db1".into());
        w.run(30_000);
        assert_eq!(w.holders(ip), ["db1"], "{ms}\n{}", told(&w));
        assert_eq!(w.holders(WRITER), ["db1"], "{ms}\n{}", told(&w));
    }
}

#[test]
fn a_long_lease_and_clocks_that_run_apart_do_not_make_two_holders() {
    for seed in 0..8 {
        let mut c = config(&HOSTS);
        c.cluster.lease_ttl = Cluster::LONGEST_TTL;
        let mut w = cluster_of(World::by_chance(c, seed));
        w.cut.insert("db1".into());
        w.run(1_500);
        // Its kernel goes on alone, and clients still reach it.
        w.stop_agent("db1");
        w.run(60_000);
    }
}

#[test]
fn set_offline_takes_the_writer_from_a_host_that_only_peers_see() {
    let mut w = cluster();
    w.unseen.insert("db1".into());
    w.run(20_000);
    assert!(w.text(Command::SetOffline { host: "db1".into() }).starts_with("OK"));
    w.run(60_000);
    let show = w.show();
    assert_eq!(w.holders(WRITER), ["db2"], "{show}\n{}", told(&w));
}

/// A wall clock that was put back, or many decisions within a few seconds: a monitor without its disk begins with the
/// number of an order that somebody still holds by.
#[test]
fn a_number_that_was_used_before_the_disk_was_lost_is_no_answer_to_the_new_monitor() {
    let mut w = cluster();
    let given = w.story.iter().rfind(|line| line.contains("The writer is given to db1")).expect("given");
    let epoch: u64 = given.split(['[', ']']).nth(1).and_then(|n| n.parse().ok()).expect("an epoch");
    w.stop_monitor();
    w.forget_status();
    w.unseen.insert("db2".into());
    w.wall_clock = Some(epoch - 1);
    w.start_monitor();
    w.run(3_000);
    // db1 loses its granter for longer than a lease, and gets it back: it may still act on its order.
    w.cut.insert("db2".into());
    w.run(8_000);
    assert_eq!(w.holders(WRITER), [""; 0], "{}", told(&w));
    w.cut.clear();
    w.run(8_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    w.unseen.clear();
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
}

//! Stories of a cluster, told to the real cores in a simulated world (src/world.rs). Given, when, then.

use mmm_common::control::{Answer, Command};
use mmm_common::ids::HostName;
use mmm_common::state::MonitorMode;
use mmm_tests::stories::{set_online, told};
use mmm_tests::world::{WRITER, World, config};

/// Three hosts, all ONLINE, db1 writing.
fn cluster() -> World {
    let mut w = World::new();
    w.run(2_500);
    for host in ["db1", "db2", "db3"] {
        set_online(&mut w, host);
        w.run(1_500);
    }
    settle(&mut w);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    w
}

fn settle(w: &mut World) {
    w.run(3_000);
    w.outage = 0;
}

fn move_writer(w: &mut World, to: &str) -> Answer {
    w.command(Command::MoveRole { role: "writer".into(), host: to.into(), force: false });
    let id = *w.answers.keys().last().unwrap_or(&0);
    w.run(5_000);
    let _ = id;
    w.late_answer().cloned().unwrap_or(Answer::Refused { text: "no answer".into() })
}

fn state_of(w: &mut World, host: &str) -> String {
    let show = w.show();
    let line = show.lines().find(|l| l.starts_with(&format!("  {host}("))).unwrap_or_default().to_owned();
    line.split('/').nth(1).and_then(|rest| rest.split('.').next()).unwrap_or_default().to_owned()
}

#[test]
fn a_new_cluster_waits_for_set_online_and_says_so() {
    let mut w = World::new();
    w.run(10_000);
    assert!(w.show().contains("# No host is ONLINE yet"), "{}", w.show());
    assert_eq!(w.holders(WRITER), Vec::<&str>::new());
    assert_eq!(state_of(&mut w, "db1"), "AWAITING_RECOVERY");
}

#[test]
fn readers_are_spread_and_replicas_follow() {
    let mut w = cluster();
    for ip in ["10.0.0.51", "10.0.0.52", "10.0.0.53"] {
        assert_eq!(w.holders(ip).len(), 1, "{ip}\n{}", told(&w));
    }
    assert_eq!(w.host("db3").server.source, Some("db1".into()));
}

#[test]
fn a_planned_move_loses_nothing_and_is_short() {
    let mut w = cluster();
    let answer = move_writer(&mut w, "db2");
    assert_eq!(
        answer.text(&|_| String::new()),
        "OK: Role 'writer' has been moved from 'db1' to 'db2'. Now you can wait some time and check new roles info!\n",
        "{}",
        told(&w)
    );
    assert_eq!(w.holders(WRITER), ["db2"]);
    assert!(w.outage < 300, "{} ms\n{}", w.outage, told(&w));
    assert!(w.host("db1").server.read_only);
    settle(&mut w);
    assert_eq!((w.lost_on("db1"), w.lost_on("db2"), w.lost_on("db3")), (0, 0, 0));
    assert_eq!(w.host("db3").server.source.clone(), Some("db2".into()), "{}", told(&w));
    // And back again.
    let answer = move_writer(&mut w, "db1");
    assert!(!answer.is_error(), "{answer:?}\n{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db1"]);
    // What was asked for once does not call the role back later.
    w.kill_server("db1");
    w.run(2_000);
    w.start_server("db1");
    w.run(8_000);
    assert_eq!(state_of(&mut w, "db1"), "ONLINE");
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

// lessons.md 17
#[test]
fn a_killed_server_is_failed_over_in_well_under_a_second_and_comes_back() {
    let mut w = cluster();
    w.kill_server("db1");
    w.run(2_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!(w.outage < 500, "{} ms\n{}", w.outage, told(&w));
    assert_eq!(state_of(&mut w, "db1"), "HARD_OFFLINE");
    assert_eq!(w.lost_on("db2"), 0);
    w.start_server("db1");
    w.run(8_000);
    assert_eq!(state_of(&mut w, "db1"), "ONLINE", "{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db2"], "nothing moves back by itself");
    assert_eq!(w.host("db1").server.source, Some("db2".into()));
    assert!(w.host("db1").server.read_only);
    assert_eq!(w.lost_on("db1"), 0);
}

// lessons.md 12
#[test]
fn a_hung_server_is_failed_over_after_hang_timeout() {
    let mut w = cluster();
    w.host("db1").server.hung_since = Some(w.now);
    w.run(8_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!((3_000..4_500).contains(&w.outage), "{} ms", w.outage);
    w.host("db1").server.hung_since = None;
    w.run(200);
    assert!(w.host("db1").server.read_only, "made read-only as the first thing when it answers");
}

// lessons.md 17
#[test]
fn a_dead_host_is_failed_over_when_its_lease_is_surely_over() {
    let mut w = cluster();
    w.crash_host("db1");
    w.run(8_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!((4_000..5_500).contains(&w.outage), "{} ms\n{}", w.outage, told(&w));
    w.boot_host("db1");
    w.run(5_000);
    assert_eq!(state_of(&mut w, "db1"), "AWAITING_RECOVERY", "a reboot waits for the operator");
}

// lessons.md 1, 2
#[test]
fn an_isolated_host_loses_its_addresses_before_others_get_them() {
    let mut w = cluster();
    w.cut.insert("db1".into());
    // The invariant "never two holders" is looked at after every event.
    let gone = w.run_until(10_000, |w| w.holders(WRITER) != ["db1"]).expect("it goes");
    assert!(gone <= 3_000, "{gone} ms");
    w.run(6_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!(w.host("db1").server.read_only);
    w.cut.clear();
    w.run(10_000);
    assert_eq!(state_of(&mut w, "db1"), "ONLINE", "{}", told(&w));
    assert_eq!(w.lost_on("db1"), 0);
}

// Each sending of a hold order puts off the end of its lease: sent into the void, it would delay the failover.
#[test]
fn what_is_decided_about_a_silent_host_does_not_put_off_the_end_of_its_lease() {
    for wait in 0..10 {
        let mut w = cluster();
        w.link_patience = 6_000;
        w.run(wait * 100);
        w.cut.insert("db1".into());
        let taken = w.run_until(20_000, |w| w.holders(WRITER) == ["db2"]).expect("db2 takes it");
        assert!(taken <= 5_000, "{taken} ms\n{}", told(&w));
    }
}

#[test]
fn an_isolated_host_without_an_agent_loses_its_addresses_by_the_kernels_hand() {
    let mut w = cluster();
    w.stop_agent("db1");
    w.cut.insert("db1".into());
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

// Without the agent's word both checks fail by trap_period, at about the same time: the replica's trouble must not take
// the only candidate away.
#[test]
fn a_server_that_dies_together_with_its_agent_is_failed_over() {
    for wait in 0..10 {
        let mut w = cluster();
        w.run(70_000 + wait * 100);
        w.stop_agent("db1");
        w.kill_server("db1");
        w.run(10_000);
        assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    }
}

#[test]
fn a_restart_of_an_agent_costs_nothing() {
    let mut w = cluster();
    w.stop_agent("db1");
    w.run(700);
    w.start_agent(&"db1".into());
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.outage < 100, "{} ms\n{}", w.outage, told(&w));
}

#[test]
fn an_agent_that_is_told_to_end_has_its_roles_moved_first() {
    let mut w = cluster();
    w.end_agent("db1");
    w.run(2_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!(w.host("db1").kernel.is_empty() && w.host("db1").server.read_only);
    assert!(w.outage < 300, "{} ms\n{}", w.outage, told(&w));
    assert!(told(&w).contains("db1: Ended: no role is left on this host"), "{}", told(&w));
    w.start_agent(&"db1".into());
    w.run(4_000);
    assert_eq!(w.host("db1").kernel.len(), 1, "a reader comes back\n{}", told(&w));
}

// lessons.md 22
#[test]
fn the_agent_of_the_writer_is_killed_for_good_and_the_role_moves() {
    let mut w = cluster();
    w.stop_agent("db1");
    w.run(8_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!(w.show().contains("# Warning: agent on host db1 is not reachable"));
}

#[test]
fn a_restart_of_the_monitor_moves_nothing_and_keeps_states_and_modes() {
    let mut w = cluster();
    w.command(Command::SetManual);
    w.command(Command::SetOffline { host: "db3".into() });
    w.run(2_000);
    let before = w.show();
    w.outage = 0;
    w.stop_monitor();
    w.run(1_500);
    w.start_monitor();
    w.run(6_000);
    assert_eq!(w.show(), before, "{}", told(&w));
    assert_eq!(w.text(Command::Mode), "MANUAL\n");
    assert!(w.outage < 100, "{} ms\n{}", w.outage, told(&w));
}

#[test]
fn a_monitor_that_forgot_everything_gives_no_address_to_two() {
    let mut w = cluster();
    w.stop_monitor();
    w.forget_status();
    for host in ["db1", "db2", "db3"] {
        w.crash_host(host);
        w.boot_host(host);
    }
    w.start_monitor();
    w.run(10_000);
    assert_eq!(state_of(&mut w, "db1"), "AWAITING_RECOVERY", "{}", told(&w));
    for host in ["db2", "db1"] {
        set_online(&mut w, host);
        w.run(3_000);
    }
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

// lessons.md 29
#[test]
fn without_a_network_failed_checks_are_ignored_and_leases_go_on() {
    let mut w = cluster();
    w.network = false;
    w.run(1_500);
    w.kill_server("db3");
    w.run(10_000);
    assert_eq!(state_of(&mut w, "db3"), "ONLINE", "{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db1"]);
    assert!(w.outage < 100);
    w.network = true;
    w.run(3_000);
    assert_eq!(state_of(&mut w, "db3"), "HARD_OFFLINE");
}

#[test]
fn in_passive_mode_nothing_moves_and_leases_go_on() {
    let mut w = cluster();
    assert_eq!(w.text(Command::SetPassive), "OK: Switched into passive mode.\n");
    w.kill_server("db3");
    w.run(10_000);
    let show = w.show();
    assert!(show.starts_with("# --- Monitor is in PASSIVE MODE ---\n# Cause: set by the operator\n"), "{show}");
    assert_eq!(state_of(&mut w, "db3"), "ONLINE");
    assert_eq!(w.holders(WRITER), ["db1"]);
    assert!(w.outage < 100);
    assert!(w.text(Command::SetOnline { host: "db3".into(), accept_lost: false }).contains("PASSIVE"));
}

#[test]
fn set_ip_prepares_roles_for_the_end_of_passive_mode() {
    let mut w = cluster();
    let ip = WRITER.parse().expect("an address");
    assert!(w.text(Command::SetIp { ip, host: "db2".into() }).starts_with("ERROR"));
    w.command(Command::SetPassive);
    assert_eq!(w.text(Command::SetIp { ip, host: "db2".into() }), "OK: Set role 'writer(10.0.0.50)' to host 'db2'.\n");
    assert!(w.text(Command::SetIp { ip, host: "db3".into() }).contains("Only following hosts could: db1, db2"));
    w.run(3_000);
    assert_eq!(w.holders(WRITER), ["db1"]);
    w.command(Command::SetActive);
    w.run(3_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

// lessons.md 29
#[test]
fn in_manual_mode_no_role_leaves_a_failed_host_until_an_operator_says_so() {
    let mut w = cluster();
    w.command(Command::SetManual);
    w.kill_server("db1");
    w.run(8_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new());
    assert!(w.show().contains("no role leaves a failed host by itself in MANUAL mode"), "{}", w.show());
    let answer = move_writer(&mut w, "db2");
    assert!(!answer.is_error(), "{answer:?}\n{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db2"]);
}

#[test]
fn wait_mode_becomes_active_when_both_masters_are_online() {
    let mut config = config(&["db1", "db2", "db3"]);
    config.mode = MonitorMode::Wait;
    let mut w = World::with(config);
    w.run(2_500);
    assert_eq!(w.text(Command::Mode), "WAIT\n");
    for host in ["db1", "db2"] {
        set_online(&mut w, host);
        w.run(1_500);
    }
    assert_eq!(w.text(Command::Mode), "ACTIVE\n", "{}", told(&w));
}

#[test]
fn set_offline_moves_roles_away_and_set_online_brings_the_host_back() {
    let mut w = cluster();
    assert_eq!(
        w.text(Command::SetOffline { host: "db1".into() }),
        "OK: State of 'db1' changed to ADMIN_OFFLINE. Now you can wait some time and check all roles!\n"
    );
    w.run(4_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!(w.host("db1").kernel.is_empty());
    assert!(w.outage < 300, "{} ms\n{}", w.outage, told(&w));
    set_online(&mut w, "db1");
    w.run(4_000);
    assert_eq!(w.holders(WRITER), ["db2"]);
    assert_eq!(w.host("db1").kernel.len(), 1, "a reader address comes back");
}

#[test]
fn a_preferred_host_gets_the_writer_back_by_a_planned_move() {
    let mut config = config(&["db1", "db2", "db3"]);
    config.cluster.roles.get_mut(&"writer".into()).expect("the role").prefer = Some("db1".into());
    let mut w = World::with(config);
    w.run(2_500);
    for host in ["db2", "db1"] {
        set_online(&mut w, host);
        w.run(4_000);
    }
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.show().contains("# Role writer has preferred host db1\n"));
    let answer = move_writer(&mut w, "db2");
    assert_eq!(
        answer.text(&|_| String::new()),
        "ERROR: Role 'writer' is assigned to preferred host 'db1'. Can't move it!\n"
    );
}

// lessons.md 10
#[test]
fn an_old_master_with_rows_that_nobody_else_has_stays_out_and_show_says_so() {
    let mut w = cluster();
    w.kill_server("db1");
    *w.host("db1").server.executed.entry(1).or_insert(0) += 3;
    w.run(2_000);
    w.start_server("db1");
    w.run(15_000);
    assert_eq!(state_of(&mut w, "db1"), "AWAITING_RECOVERY", "{}", told(&w));
    assert!(
        w.show().contains("host db1 has 3 transactions that the active master db2 lacks"),
        "{}\n{}",
        w.show(),
        told(&w)
    );
    assert!(w.text(Command::SetOnline { host: "db1".into(), accept_lost: false }).starts_with("ERROR"));
}

// data-safety.md: measured with MMM, a stale master was promoted and 902 of 1205 acknowledged writes were lost.
#[test]
fn a_master_that_stopped_fetching_long_before_the_failure_is_not_promoted() {
    let mut w = cluster();
    w.host("db3").server.io = false;
    w.host("db2").server.io = false;
    w.run(16_000);
    w.kill_server("db1");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    assert!(w.show().contains("stopped fetching from db1"), "{}", w.show());
    w.command(Command::MoveRole { role: "writer".into(), host: "db2".into(), force: true });
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db2"], "the operator may take the loss\n{}", told(&w));
}

#[test]
fn a_master_with_broken_replication_is_promoted_by_force_only() {
    let mut w = cluster();
    w.run(70_000);
    w.host("db3").server.io = false;
    w.host("db2").server.io = false;
    w.run(6_000);
    assert_eq!(state_of(&mut w, "db2"), "REPLICATION_FAIL", "{}", told(&w));
    w.kill_server("db1");
    w.run(5_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    let move_to_db2 = |force| Command::MoveRole { role: "writer".into(), host: "db2".into(), force };
    assert_eq!(w.text(move_to_db2(false)), "ERROR: Can't move role to host with state REPLICATION_FAIL.\n");
    w.command(move_to_db2(true));
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

// lessons.md 3
#[test]
fn a_replica_that_does_not_apply_blocks_the_failover_with_a_reason() {
    let mut config = config(&["db1", "db2", "db3"]);
    config.cluster.drain_timeout = std::time::Duration::from_secs(2);
    let mut w = World::with(config);
    w.run(2_500);
    for host in ["db1", "db2"] {
        set_online(&mut w, host);
        w.run(1_500);
    }
    // Received and not applicable: draining starts the thread, and it never gets there.
    w.host("db2").server.received.insert(9, 100);
    w.host("db2").server.sql = false;
    w.refuse_sql("db2");
    w.kill_server("db1");
    w.run(12_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    assert!(w.show().contains("could not apply everything it has received"), "{}", w.show());
}

#[test]
fn flapping_hosts_wait_for_the_operator() {
    let mut w = cluster();
    for _ in 0..3 {
        w.kill_server("db3");
        w.run(3_000);
        w.start_server("db3");
        w.run(8_000);
    }
    assert_eq!(state_of(&mut w, "db3"), "AWAITING_RECOVERY", "{}", told(&w));
    assert!(told(&w).contains("Host 'db3' is flapping!"));
    set_online(&mut w, "db3");
    w.run(1_000);
    assert_eq!(state_of(&mut w, "db3"), "ONLINE");
}

#[test]
fn commands_refuse_with_the_reason() {
    let mut w = cluster();
    let role = |role: &str, host: &str| Command::MoveRole { role: role.into(), host: host.into(), force: false };
    for (command, answer) in [
        (role("writer", "db9"), "ERROR: Unknown host name 'db9'!\n"),
        (role("wirter", "db1"), "ERROR: Unknown role name 'wirter'!\n"),
        (
            role("writer", "db3"),
            "ERROR: Host 'db3' can't handle role 'writer'. Only following hosts could: db1, db2.\n",
        ),
        (role("writer", "db1"), "OK: Role is on 'db1' already. Skipping command.\n"),
        (
            Command::SetOnline { host: "db1".into(), accept_lost: false },
            "OK: This host is already ONLINE. Skipping command.\n",
        ),
        (Command::SetActive, "OK: Already in active mode.\n"),
        (Command::Ping, "OK: Pinged successfully!\n"),
    ] {
        assert_eq!(w.text(command), answer);
    }
    w.kill_server("db2");
    w.run(2_000);
    assert_eq!(w.text(role("writer", "db2")), "ERROR: Can't move role to host with state HARD_OFFLINE.\n");
}

#[test]
fn a_balanced_role_is_taken_off_a_host() {
    let mut w = cluster();
    w.command(Command::SetOffline { host: "db3".into() });
    w.run(3_000);
    let mine = |w: &mut World, h: &str| w.host(h).kernel.keys().filter(|ip| ip.to_string() != WRITER).count();
    let fuller = if mine(&mut w, "db1") == 2 { "db1" } else { "db2" };
    let answer = w.text(Command::MoveRole { role: "reader".into(), host: HostName::from(fuller), force: false });
    assert!(answer.starts_with("OK"), "{answer}");
    w.run(3_000);
    assert_eq!(mine(&mut w, "db1") + mine(&mut w, "db2"), 3, "{}", told(&w));
}

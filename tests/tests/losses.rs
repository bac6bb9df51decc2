//! Stories about data (data-safety.md): a candidate has what any host has that can be asked; what only an old master has
//! is saved, counted and told; it is discarded only when that is accepted. lessons.md 9, 10, 11.

use mmm_common::config::Cluster;
use mmm_common::control::{Answer, Command};
use mmm_common::state::HostMode;
use mmm_tests::stories::{HOSTS, cluster, cluster_of, move_writer, shows, told};
use mmm_tests::world::{WRITER, World, config};
use std::time::Duration;

/// db1's server ends with three rows that nobody else has, db2 takes over, db1's server is back.
fn returned(mut w: World) -> World {
    w.kill_server("db1");
    *w.host("db1").server.executed.entry(1).or_insert(0) += 3;
    w.run(2_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.start_server("db1");
    w.run(15_000);
    w
}

// lessons.md 5: MMM promoted a master whose replication had stopped 16 s before, and lost 902 of 1205 acknowledged writes.
#[test]
fn a_candidate_that_had_stopped_fetching_gets_the_rest_from_another_replica() {
    let mut w = cluster();
    w.host("db2").server.io = false;
    w.run(16_000);
    let behind = w.lost_on("db2");
    assert!(behind > 100, "db2 is to lack something: {behind}");
    w.kill_server("db1");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(w.lost_on("db2"), 0, "{}", told(&w));
    assert!(told(&w).contains("db2 fetches from db3 what only that has"), "{}", told(&w));
    shows(&mut w, "db2(10.0.0.12) master/ONLINE");
}

#[test]
fn a_master_in_replication_fail_is_promoted_when_it_can_get_everything_and_nobody_else_is_online() {
    let mut w = cluster();
    w.run(70_000);
    w.host("db2").server.io = false;
    w.run(10_000);
    shows(&mut w, "db2(10.0.0.12) master/REPLICATION_FAIL");
    w.kill_server("db1");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(w.lost_on("db2"), 0, "{}", told(&w));
    shows(&mut w, "db2(10.0.0.12) master/ONLINE");
}

// lessons.md 6
#[test]
fn what_a_replica_has_received_and_cannot_apply_is_a_reason_to_hold() {
    let mut w = cluster();
    w.host("db2").server.io = false;
    w.refuse_sql("db3");
    w.run(1_500);
    w.kill_server("db1");
    w.run(40_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    shows(&mut w, "db2 is not promoted");
    shows(&mut w, "db3 has received what nobody else has");
    w.command(move_writer("db2", true));
    w.run(8_000);
    assert_eq!(w.holders(WRITER), ["db2"], "the operator may take the loss\n{}", told(&w));
}

#[test]
fn a_replica_that_dies_while_it_is_asked_holds_nothing_up() {
    let mut w = cluster();
    w.refuse_steps.insert(("db3".into(), "task"));
    w.kill_server("db1");
    w.run(100);
    w.crash_host("db3");
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(w.lost_on("db2"), 0, "{}", told(&w));
}

#[test]
fn what_was_written_on_a_slave_only_is_not_spread_by_a_failover() {
    let mut w = cluster();
    w.host("db3").server.executed.insert(3, 5);
    w.kill_server("db1");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    let spread = w.host("db2").server.executed.contains_key(&3);
    assert!(!spread, "{}", told(&w));
}

// data-safety.md: a MariaDB that was started with init_rpl_role=SLAVE may have thrown away acknowledged rows.
#[test]
fn an_old_master_that_comes_back_without_its_last_rows_gets_them_from_whoever_has_them() {
    let mut c = config(&HOSTS);
    c.cluster.hosts.get_mut(&"db2".into()).expect("db2").mode = HostMode::Master;
    let mut w = cluster_of(World::with(c));
    // Given that nobody can take over.
    let answer = w.text(Command::SetOffline { host: "db2".into() });
    assert!(answer.starts_with("OK"), "{answer}");
    w.run(1_000);
    w.kill_server("db1");
    w.run(1_000);
    let number = w.host("db1").server.executed[&1];
    w.host("db1").server.executed.insert(1, number - 2);
    w.start_server("db1");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert_eq!(w.lost_on("db1"), 0, "{}", told(&w));
}

#[test]
fn an_old_master_that_may_have_thrown_away_its_end_waits_for_who_acknowledged_it() {
    let mut w = World::with(config(&HOSTS));
    w.semisync = true;
    w.run(2_500);
    for host in HOSTS {
        w.text(Command::SetOnline { host: host.into(), accept_lost: false });
        w.run(2_000);
    }
    w.run(6_000);
    // Given that the only host that acknowledges is gone when the writer's server ends and comes back.
    w.crash_host("db2");
    w.run(40);
    w.kill_server("db1");
    w.run(3_000);
    w.start_server("db1");
    w.run(20_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    shows(&mut w, "hosts that acknowledged");
    w.boot_host("db2");
    w.run(60_000);
    assert_eq!(w.holders(WRITER).len(), 1, "{}", told(&w));
}

#[test]
fn with_semi_sync_an_old_masters_extra_rows_are_told_to_be_unacknowledged() {
    let mut w = cluster();
    w.semisync = true;
    w.run(3_000);
    shows(&mut w, "# Role writer is semi-synchronous: 1 replica acknowledges commits of db1");
    let mut w = returned(w);
    shows(&mut w, "host db1 has 3 transactions that the active master db2 lacks (unacknowledged");
    let lost = w.text(Command::Lost { host: "db1".into() });
    assert!(lost.contains("3 transactions are on db1") && lost.contains("/var/lib/mysql-mmm/lost"), "{lost}");
}

// lessons.md 10
#[test]
fn without_semi_sync_they_are_told_to_be_lost_and_nothing_is_done_before_that_is_accepted() {
    let mut w = returned(cluster());
    shows(&mut w, "# Role writer is ASYNC");
    shows(&mut w, "host db1 has 3 transactions that the active master db2 lacks (lost");
    w.run(120_000);
    shows(&mut w, "db1(10.0.0.11) master/AWAITING_RECOVERY");
    let plain = w.text(Command::SetOnline { host: "db1".into(), accept_lost: false });
    assert!(plain.starts_with("ERROR") && plain.contains("set_online --accept-lost db1"), "{plain}");
    let accepted = w.text(Command::SetOnline { host: "db1".into(), accept_lost: true });
    assert!(accepted.starts_with("OK: The 3 transactions that only 'db1' has are discarded"), "{accepted}");
    w.run(15_000);
    shows(&mut w, "db1(10.0.0.11) master/ONLINE");
    assert!(told(&w).contains("because what others lack was saved and undone"), "{}", told(&w));
    let lost = w.text(Command::Lost { host: "db1".into() });
    assert!(lost.contains("3 transactions were saved before db1 was brought back in line"), "{lost}");
    w.run(60_000);
    assert_eq!(w.lost_on("db1"), w.lost_on("db2"), "it follows\n{}", told(&w));
}

#[test]
fn what_cannot_be_undone_is_copied_anew() {
    let mut w = cluster();
    w.no_undo = true;
    let mut w = returned(w);
    w.text(Command::SetOnline { host: "db1".into(), accept_lost: true });
    w.run(20_000);
    shows(&mut w, "db1(10.0.0.11) master/ONLINE");
    assert!(told(&w).contains("because it was copied anew from db2"), "{}", told(&w));
}

#[test]
fn reclone_refuses_what_would_throw_away_data_in_use_and_ends_online() {
    let mut w = cluster();
    let reclone = |host: &str, from: &str| Command::Reclone { host: host.into(), from: from.into() };
    for (host, from, why) in [
        ("db1", "db2", "Use set_offline db1 first"),
        ("db3", "db3", "cannot be copied from itself"),
        ("db9", "db1", "Unknown host name 'db9'"),
        ("db3", "db9", "Unknown host name 'db9'"),
    ] {
        let answer = w.text(reclone(host, from));
        assert!(answer.starts_with("ERROR") && answer.contains(why), "{answer}");
    }
    let mut w = returned(w);
    let answer = w.text(reclone("db1", "db3"));
    assert!(answer.starts_with("OK"), "{answer}");
    w.run(20_000);
    shows(&mut w, "db1(10.0.0.11) master/ONLINE");
    assert!(told(&w).contains("because it was copied anew from db3"), "{}", told(&w));
}

#[test]
fn auto_reclone_copies_anew_by_itself_only_what_was_never_acknowledged() {
    for (semisync, state) in [(true, "ONLINE"), (false, "AWAITING_RECOVERY")] {
        let mut c = config(&HOSTS);
        c.cluster.auto_reclone = true;
        let mut w = cluster_of(World::with(c));
        w.semisync = semisync;
        w.run(3_000);
        let mut w = returned(w);
        w.run(15_000);
        shows(&mut w, &format!("db1(10.0.0.11) master/{state}"));
    }
}

#[test]
fn require_semisync_leaves_a_failover_without_it_to_the_operator() {
    let mut c = config(&HOSTS);
    c.cluster.require_semisync = true;
    let mut w = cluster_of(World::with(c));
    w.kill_server("db1");
    w.run(20_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    shows(&mut w, "require_semisync is set");
    w.command(move_writer("db2", false));
    w.run(3_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

#[test]
fn with_three_masters_the_best_takes_over_and_all_others_follow_it() {
    let mut c = config(&HOSTS);
    let Cluster { hosts, roles, .. } = &mut c.cluster;
    hosts.get_mut(&"db3".into()).expect("db3").mode = HostMode::Master;
    roles.get_mut(&"writer".into()).expect("the role").hosts = HOSTS.map(Into::into).to_vec();
    let mut w = cluster_of(World::with(c));
    w.host("db2").server.io = false;
    w.run(1_500);
    w.kill_server("db1");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db3"], "it has received most\n{}", told(&w));
    assert_eq!(w.lost_on("db3"), 0, "{}", told(&w));
    w.start_server("db1");
    w.run(20_000);
    for host in ["db1", "db2"] {
        let source = w.host(host).server.source.clone();
        assert_eq!(source, Some("db3".into()), "{host}\n{}", told(&w));
        shows(&mut w, &format!("{host}(10.0.0.1{}) master/ONLINE", &host[2..]));
    }
    let answer = w.command(Command::MoveRole { role: "writer".into(), host: "db2".into(), force: false });
    assert_eq!(answer, None::<Answer>);
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(w.lost_on("db2"), 0, "{}", told(&w));
}

/// db1's server ends, has lost the last three of its rows, which the others have, and is there again half a second later.
fn takes_back(w: &mut World) {
    w.kill_server("db1");
    w.run(500);
    *w.host("db1").server.executed.get_mut(&1).expect("db1 has written") -= 3;
    w.start_server("db1");
}

/// Clients can write, and whoever has the writer has every write that was acknowledged.
#[track_caller]
fn is_served_with_everything(w: &World, case: &str) {
    assert!(w.writer_is_open(), "{case}: {}", told(w));
    assert_eq!(w.lost_on(w.holders(WRITER)[0]), 0, "{case}: {}", told(w));
}

/// Nobody but the monitor can compare, so this is what it costs to lose it and the server at the same time.
#[test]
fn a_writer_that_crashes_while_the_monitor_is_dead_is_not_opened_before_it_has_been_compared() {
    let mut w = cluster();
    w.stop_monitor();
    w.run(5_000);
    assert!(w.writer_is_open(), "{}", told(&w));
    takes_back(&mut w);
    w.run(30_000);
    assert!(!w.writer_is_open(), "{}", told(&w));
    w.start_monitor();
    w.run(20_000);
    is_served_with_everything(&w, "with the monitor");
}

#[test]
fn what_a_crash_took_back_is_there_again_before_anybody_writes() {
    for (grace, others) in [(0, true), (10, true), (0, false), (10, false)] {
        let mut c = config(&HOSTS);
        c.cluster.restart_grace = Duration::from_secs(grace);
        let mut w = cluster_of(World::with(c));
        if !others {
            // No candidate, and it has everything.
            w.command(Command::SetOffline { host: "db2".into() });
            w.run(2_000);
        }
        takes_back(&mut w);
        w.run(8_000);
        is_served_with_everything(&w, &format!("grace {grace} s, others {others}"));
    }
}

/// In MANUAL mode a role leaves nobody by itself: it is taken from the one that crashed, and goes to nobody else.
#[test]
fn a_writer_that_crashes_in_manual_mode_gets_its_role_back_when_it_has_been_compared() {
    let mut w = cluster();
    w.command(Command::SetManual);
    w.run(1_000);
    takes_back(&mut w);
    w.run(8_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    is_served_with_everything(&w, "in MANUAL mode");
}

//! Attacks on moves that a restart, the mode or a cut interrupts half way, and on what a writer tells clients after its last
//! report (data-safety.md, "Semi-synchronous replication").

use mmm_common::control::Command;
use mmm_tests::stories::{cluster, cluster_of, move_writer, set_offline, set_online, shows, shows_not, times, told};
use mmm_tests::world::{MONITOR, WRITER, World, config};

fn preferring_db1(flap_count: u32) -> World {
    let mut c = config(&["db1", "db2", "db3"]);
    c.cluster.roles.get_mut(&"writer".into()).expect("the role").prefer = Some("db1".into());
    c.flap_count = flap_count;
    cluster_of(World::with(c))
}

// The last of the moves that flap_count allows was interrupted: the holder stayed closed.
#[test]
fn a_move_to_the_preferred_host_that_a_restart_interrupts_is_undone_though_no_other_is_allowed() {
    let mut w = preferring_db1(1);
    set_offline(&mut w, "db1");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    set_online(&mut w, "db1");
    w.run_until(120_000, |w| times(w, "db2 stops writing") > 0).expect("a move");
    w.run(5);
    w.stop_monitor();
    w.run(3_000);
    w.start_monitor();
    w.run(60_000);
    assert!(w.writer_is_open(), "{}\n{}", w.show(), told(&w));
}

#[test]
fn a_move_that_a_restart_interrupts_is_undone_while_the_network_check_fails() {
    let mut w = cluster();
    w.command(move_writer("db2", false));
    w.run_until(10_000, |w| times(w, "db1 stops writing") > 0).expect("a move");
    w.run(5);
    w.stop_monitor();
    w.network = false;
    w.run(1_000);
    w.start_monitor();
    w.run(60_000);
    assert!(w.writer_is_open(), "{}\n{}", w.show(), told(&w));
}

#[test]
fn after_a_restart_the_old_master_writes_while_its_successor_is_waited_for() {
    let mut w = preferring_db1(3);
    set_offline(&mut w, "db1");
    w.run(10_000);
    set_online(&mut w, "db1");
    w.run_until(120_000, |w| times(w, "db2 stops writing") > 0).expect("a move");
    w.run(5);
    w.stop_monitor();
    w.host("db1").server.io = false;
    w.run(1_000);
    w.start_monitor();
    w.run(4_000);
    assert!(w.writer_is_open(), "{}\n{}", w.show(), told(&w));
}

// require_semisync
#[test]
fn who_lacks_what_may_have_been_told_alone_is_for_an_operator_to_promote_if_semisync_is_required() {
    let mut c = config(&["db1", "db2"]);
    c.cluster.require_semisync = true;
    let mut w = cluster_of(World::with(c));
    w.semisync = true;
    w.run(5_000);
    w.lag = 100;
    w.run(8_000);
    w.isolate("db1");
    w.run(20_000);
    assert!(w.holders(WRITER).is_empty(), "db2 lacks {}\n{}", w.lost_on("db2"), told(&w));
    shows(&mut w, "require_semisync is set, and db2 lacks");
    w.command(move_writer("db2", false));
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

#[test]
fn who_cannot_open_and_has_no_successor_is_told_of_once() {
    let mut w = cluster();
    w.refuse_steps.insert(("db2".into(), "writable"));
    w.crash_host("db1");
    w.run(120_000);
    assert_eq!(times(&w, "has not opened yet"), 1, "{}", told(&w));
    shows(&mut w, "db2 has the role but has not opened yet");
}

/// db1 takes db2 for attached, though nothing comes through, and its commits wait; then the monitor loses db1 too. Before
/// db1's lease is over it has stopped waiting, and tells clients what nobody else has.
fn stops_waiting_after_its_last_report(mut w: World) -> World {
    w.semisync = true;
    w.run(5_000);
    shows(&mut w, "# Role writer is semi-synchronous");
    w.attached.insert("db2".into());
    w.cut_between("db1", "db2");
    w.run(8_000);
    shows(&mut w, "# Role writer is semi-synchronous");
    w.cut_between("db1", MONITOR);
    w.run(2_100);
    let waited = w.acknowledged.len();
    w.run(20_000);
    let told_of = w.acknowledged.iter().skip(waited).filter(|(server, _)| *server == 1).count();
    assert!(told_of > 0, "{}", told(&w));
    w
}

#[test]
fn what_was_told_alone_after_the_last_report_is_not_called_unacknowledged() {
    let mut w = cluster_of(World::with(config(&["db1", "db2"])));
    w.semisync = true;
    w.run(5_000);
    // Given that nothing comes through to db2, which does not notice.
    w.lag = 100;
    w.run(8_000);
    shows(&mut w, "# Role writer is semi-synchronous");
    w.isolate("db1");
    w.run(20_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.lag = 0;
    w.end_cuts();
    w.run(60_000);
    shows(&mut w, "they may have stopped waiting");
    assert_eq!(times(&w, "unacknowledged"), 0, "{}", told(&w));
}

#[test]
fn who_has_not_fetched_for_longer_than_commits_wait_is_not_promoted() {
    let w = stops_waiting_after_its_last_report(cluster_of(World::with(config(&["db1", "db2"]))));
    assert!(w.holders(WRITER).is_empty(), "db2 lacks {}\n{}", w.lost_on("db2"), told(&w));
}

// What was waited for before has come; what keeps the writer away is the mode.
#[test]
fn a_move_that_passive_mode_stops_half_way_says_so_and_goes_on_afterwards() {
    let mut w = cluster();
    w.jitter = 300;
    w.command(move_writer("db2", false));
    w.run_until(10_000, |w| times(w, "db1 is to let go of the writer") > 0).expect("released");
    w.text(Command::SetPassive);
    w.run(10_000);
    shows(&mut w, "nobody has it, and it is given to nobody now: the mode is PASSIVE");
    assert_eq!(times(&w, "it is given to nobody now"), 2, "told once, and to who asked\n{}", told(&w));
    w.text(Command::SetActive);
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    shows_not(&mut w, "given to nobody now");
}

// One fault: the monitor cannot reach db1, which it has just closed. Its peers vouch for it.
#[test]
fn a_holder_that_was_closed_for_a_move_and_is_seen_by_peers_only_does_not_keep_the_writer() {
    for host_hears in [true, false] {
        let mut w = cluster();
        w.jitter = 50;
        w.command(move_writer("db2", false));
        w.run_until(10_000, |w| times(w, "db1 stops writing") > 0).expect("a move");
        w.run(60);
        if host_hears {
            w.cut_way("db1", MONITOR)
        } else {
            w.cut_between("db1", MONITOR)
        }
        w.run(30_000);
        assert!(w.writer_is_open(), "{}\n{}", w.show(), told(&w));
        assert_eq!(w.lost_on(&w.holders(WRITER).join("")), 0, "{}", told(&w));
        w.end_cuts();
        w.run(30_000);
        assert!(w.writer_is_open(), "{}\n{}", w.show(), told(&w));
    }
}

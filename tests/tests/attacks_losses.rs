//! Attacks on the handling of data: rebuilding a host at the wrong moment or from the wrong source, throwing away what
//! was not saved, calling rows unacknowledged that clients were told of, promoting who stopped fetching unseen, and
//! turning without end (data-safety.md).

use mmm_common::control::Command;
use mmm_common::ids::HostName;
use mmm_tests::stories::{
    HOSTS, cluster, cluster_of, masters, move_writer, opened_unseen, reclone, set_offline, set_online, shows,
    shows_not, times, told,
};
use mmm_tests::world::{WRITER, World, config};

/// db1's server ends with three rows that nobody else has, db2 takes over, db1's server is back.
fn returned(mut w: World) -> World {
    w.kill_server("db1");
    *w.host("db1").server.executed.entry(1).or_insert(0) += 3;
    w.run(2_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.start_server("db1");
    w
}

// lessons.md 10
#[test]
fn a_host_whose_data_are_being_replaced_does_not_come_online_before_that_is_done() {
    let mut w = cluster();
    set_offline(&mut w, "db3");
    w.run(1_000);
    reclone(&mut w, "db3", "db1");
    w.run(500);
    let answer = w.text(Command::SetOnline { host: "db3".into(), accept_lost: false });
    assert!(answer.starts_with("ERROR") && answer.contains("being replaced"), "{answer}\n{}", told(&w));
    w.run(5_000);
    set_online(&mut w, "db3");
    w.run(1_000);
    shows(&mut w, "db3(10.0.0.13) slave/ONLINE. Roles: reader");
    let source = w.host("db3").server.source.clone();
    assert_eq!(source, Some("db1".into()), "{}", told(&w));
}

#[test]
fn auto_set_online_waits_for_the_end_of_a_copy() {
    let mut c = config(&HOSTS);
    c.auto_set_online = std::time::Duration::from_secs(3);
    let mut w = cluster_of(World::with(c));
    w.run(61_000);
    // Given a host that is about to come back by itself, with the same data as the others.
    w.crash_host("db3");
    w.run(20_000);
    w.boot_host("db3");
    w.run(1_500);
    shows(&mut w, "db3(10.0.0.13) slave/AWAITING_RECOVERY");
    reclone(&mut w, "db3", "db1");
    for _ in 0..15 {
        w.run(100);
        shows(&mut w, "db3(10.0.0.13) slave/AWAITING_RECOVERY");
    }
    w.run(10_000);
    shows(&mut w, "db3(10.0.0.13) slave/ONLINE");
}

#[test]
fn a_copy_that_fails_is_not_begun_again_by_itself() {
    let mut w = cluster();
    w.refuse_steps.insert(("db3".into(), "job"));
    set_offline(&mut w, "db3");
    w.run(1_000);
    let saves = w.saves;
    reclone(&mut w, "db3", "db1");
    w.run(120_000);
    assert_eq!(times(&w, "db3 is to throw its data away"), 1, "{}", told(&w));
    assert!(w.saves - saves < 10, "{} saves", w.saves - saves);
    shows(&mut w, "Warning: host db3: failed: throw its data away and copy those of db1");
    w.refuse_steps.clear();
    reclone(&mut w, "db3", "db1");
    w.run(5_000);
    set_online(&mut w, "db3");
    shows_not(&mut w, "failed");
}

#[test]
fn a_source_that_is_no_longer_fit_when_the_copy_is_to_begin_is_not_copied_from() {
    let mut w = returned(cluster());
    let saving = w.run_until(20_000, |w| times(w, "db1 is to save the transactions") > 0);
    assert!(saving.is_some(), "{}", told(&w));
    reclone(&mut w, "db1", "db3");
    w.crash_host("db3");
    w.run(20_000);
    assert_eq!(times(&w, "db1 is to throw its data away"), 0, "{}", told(&w));
    shows(
        &mut w,
        "Warning: host db1: failed: throw its data away and copy those of db3: Can't reach agent daemon and server on 'db3'",
    );
    reclone(&mut w, "db1", "db2");
    w.run(20_000);
    shows(&mut w, "db1(10.0.0.11) master/ONLINE");
}

#[test]
fn what_cannot_be_seen_for_a_moment_is_not_thrown_away_unsaved() {
    let mut w = returned(cluster());
    let awaiting = w.run_until(20_000, |w| times(w, "'db1' changed from HARD_OFFLINE to AWAITING_RECOVERY") > 0);
    assert!(awaiting.is_some(), "{}", told(&w));
    // Given that db1's data are not compared yet, and that its agent starts anew and has not looked at the server.
    w.stop_agent("db1");
    w.run(500);
    w.start_agent(&"db1".into());
    let now = w.now;
    w.host("db1").server.hung_since = Some(now);
    w.run(300);
    reclone(&mut w, "db1", "db2");
    w.run(1_000);
    w.host("db1").server.hung_since = None;
    w.run(30_000);
    let line = |text: &str| w.story.iter().position(|l| l.contains(text));
    let (saved, thrown) = (line("db1 that others lack are saved there"), line("db1 is to throw its data away"));
    assert!(saved.is_some() && thrown.is_some() && saved < thrown, "{}", told(&w));
    shows(&mut w, "db1(10.0.0.11) master/ONLINE");
}

#[test]
fn a_copy_that_was_asked_for_is_not_begun_on_a_host_that_has_come_online_meanwhile() {
    let mut w = returned(cluster());
    w.run(15_000);
    w.text(Command::SetOnline { host: "db1".into(), accept_lost: true });
    w.run(15_000);
    shows(&mut w, "db1(10.0.0.11) master/ONLINE");
    set_offline(&mut w, "db1");
    w.run(1_000);
    // Given that nothing is begun while the monitor's own network fails.
    w.network = false;
    w.run(1_100);
    reclone(&mut w, "db1", "db2");
    let answer = w.text(Command::SetOnline { host: "db1".into(), accept_lost: false });
    w.network = true;
    w.run(10_000);
    if answer.starts_with("OK") {
        assert_eq!(times(&w, "db1 is to throw its data away"), 0, "{}", told(&w));
    } else {
        assert!(answer.contains("being replaced"), "{answer}");
        assert_eq!(times(&w, "db1 is to throw its data away"), 1, "{}", told(&w));
    }
}

#[test]
fn a_host_whose_data_are_being_replaced_has_no_part_in_a_failover() {
    let mut w = cluster();
    set_offline(&mut w, "db3");
    w.run(1_000);
    reclone(&mut w, "db3", "db2");
    w.run(500);
    w.kill_server("db1");
    w.run(3_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(times(&w, "db3: Task of epoch"), 0, "{}", told(&w));
}

// lessons.md 18: peers vouch for a writer that the monitor cannot reach: it writes on after the monitor's last word from it.
#[test]
fn a_candidate_that_stopped_fetching_while_only_peers_saw_the_writer_is_not_promoted() {
    let mut w = cluster_of(World::with(config(&["db1", "db2"])));
    w.unseen.insert("db1".into());
    w.run(20_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    w.host("db2").server.io = false;
    w.run(15_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.lost_on("db2") > 100);
    w.crash_host("db1");
    w.run(30_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    shows(&mut w, "db2 is not promoted: it had stopped fetching from db1");
}

#[test]
fn rows_of_a_writer_that_was_not_heard_for_long_are_not_called_unacknowledged() {
    let mut w = cluster();
    w.semisync = true;
    w.run(3_000);
    shows(&mut w, "# Role writer is semi-synchronous");
    // Given that only the peers see db1, and nobody knows whether its commits still wait.
    w.unseen.insert("db1".into());
    w.run(40_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    w.crash_host("db1");
    w.run(20_000);
    *w.host("db1").server.executed.entry(1).or_insert(0) += 3;
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.unseen.clear();
    w.boot_host("db1");
    w.run(20_000);
    shows(&mut w, "host db1 has 3 transactions that the active master db2 lacks (lost");
}

#[test]
fn rows_of_a_writer_without_a_replica_to_acknowledge_are_not_called_unacknowledged() {
    let mut w = cluster();
    w.semisync = true;
    w.run(3_000);
    shows(&mut w, "# Role writer is semi-synchronous");
    w.host("db2").server.io = false;
    // Commits wait, and stop waiting soon after the last that is heard of it.
    w.run(9_000);
    w.pause_agent("db1");
    w.run(15_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    *w.host("db1").server.executed.entry(1).or_insert(0) += 3;
    w.resume_agent("db1");
    w.run(15_000);
    shows(&mut w, "transactions that the active master db2 lacks (lost");
}

/// Found by the chaos campaign, seed 4001: nobody was promoted before an operator's --force.
#[test]
fn who_alone_can_have_acknowledged_is_promoted_though_its_agent_was_away_for_long() {
    let mut w = cluster();
    w.semisync = true;
    w.run(3_000);
    shows(&mut w, "# Role writer is semi-synchronous");
    w.stop_agent("db2");
    w.run(12_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    w.kill_server("db1");
    w.start_agent(&"db2".into());
    w.run(3_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    // Its commits had stopped waiting: what was acknowledged last need not be on anybody else.
    let mut w = cluster();
    w.semisync = true;
    w.run(3_000);
    w.stop_agent("db2");
    for replica in ["db2", "db3"] {
        w.host(replica).server.io = false;
    }
    w.run(13_000);
    w.kill_server("db1");
    w.start_agent(&"db2".into());
    w.run(3_000);
    assert!(w.holders(WRITER).is_empty(), "{}", told(&w));
    shows(&mut w, "db2 is not promoted: ");
}

/// Found by the chaos campaign, seed 5004: the old master was back, everybody was asked, and nobody was promoted.
#[test]
fn an_old_master_that_is_back_writes_again_when_all_who_can_have_acknowledged_are_asked() {
    let mut w = cluster_of(World::with(masters(&["db1", "db2"], &["db1", "db2"])));
    w.semisync = true;
    w.run(3_000);
    shows(&mut w, "# Role writer is semi-synchronous");
    w.host("db2").server.io = false;
    w.run(13_000);
    w.attached.insert("db2".into());
    w.run(2_000);
    w.kill_server("db1");
    w.run(5_000);
    shows(&mut w, "db2 is not promoted: ");
    w.attached.clear();
    w.start_server("db1");
    w.run(1_000);
    set_online(&mut w, "db1");
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.writer_is_open(), "{}", told(&w));
}

/// What was acknowledged while nobody was there to wait for is not on who was away then, although commits wait again.
#[test]
fn what_was_acknowledged_before_commits_waited_again_keeps_who_lacks_it_from_being_promoted() {
    let mut w = cluster_of(World::with(masters(&["db1", "db2"], &["db1", "db2"])));
    w.semisync = true;
    w.run(3_000);
    w.host("db2").server.io = false;
    w.semisync = false;
    w.run(8_000);
    // The connection of before is still counted as an attached replica.
    w.semisync = true;
    w.attached.insert("db2".into());
    w.run(2_000);
    let behind = w.lost_on("db2");
    assert!(behind > 0, "{}", told(&w));
    w.kill_server("db1");
    w.run(8_000);
    assert!(w.holders(WRITER).is_empty(), "db2 lacks {behind}\n{}", told(&w));
    shows(&mut w, "db2 is not promoted: ");
}

#[test]
fn what_is_called_unacknowledged_is_only_what_was_so_at_that_failover() {
    let mut w = cluster_of(World::with(masters(&HOSTS, &HOSTS)));
    w.semisync = true;
    w.run(3_000);
    let mut w = returned(w);
    w.run(15_000);
    shows(&mut w, "host db1 has 3 transactions that the active master db2 lacks (unacknowledged");
    // Given that db1 goes on fetching, and has what db3 lacks when that is made the writer.
    w.semisync = false;
    w.host("db3").server.io = false;
    w.run(10_000);
    w.crash_host("db2");
    w.run(10_000);
    w.command(move_writer("db3", true));
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db3"], "{}", told(&w));
    w.run(10_000);
    shows(&mut w, "transactions that the active master db3 lacks");
    shows_not(&mut w, "unacknowledged");
}

#[test]
fn who_acknowledged_long_ago_does_not_stand_for_who_did_at_the_end() {
    let mut w = cluster_of(World::with(masters(&["db1", "db2", "db3", "db4"], &["db1", "db2", "db3"])));
    w.semisync = true;
    w.run(3_000);
    w.host("db2").server.io = false;
    w.run(70_000);
    w.crash_host("db3");
    w.kill_server("db1");
    w.run(20_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    shows(&mut w, "hosts that acknowledged");
}

// lessons.md 3
#[test]
fn a_third_master_takes_over_when_the_second_cannot_be_opened() {
    let mut w = cluster_of(World::with(masters(&HOSTS, &HOSTS)));
    w.refuse_steps.insert(("db2".into(), "writable"));
    w.crash_host("db1");
    w.run(40_000);
    assert_eq!(w.holders(WRITER), ["db3"], "{}", told(&w));
    assert_eq!(w.lost_on("db3"), 0, "{}", told(&w));
}

#[test]
fn a_reload_in_the_middle_of_a_failover_forgets_nobody_who_has_more() {
    let mut w = cluster();
    w.host("db2").server.io = false;
    w.run(1_500);
    assert!(w.lost_on("db2") > 0);
    w.kill_server("db1");
    let begun = w.run_until(1_000, |w| times(w, "The writer goes from db1 to db2 without its help") > 0);
    assert!(begun.is_some(), "{}", told(&w));
    w.reload();
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(w.lost_on("db2"), 0, "{}", told(&w));
}

// A hold, its retries and its end are counted: nothing turns without end.
#[test]
fn a_hold_is_quiet() {
    let mut w = cluster();
    w.host("db2").server.io = false;
    w.refuse_sql("db3");
    w.run(1_500);
    w.kill_server("db1");
    w.run(40_000);
    let (lines, saves, ticks) = (w.story.len(), w.saves, w.ticks);
    let epoch = w.saved().expect("saved").epoch;
    w.run(300_000);
    assert!(w.story.len() - lines < 150, "{} lines\n{}", w.story.len() - lines, told(&w));
    assert!(w.saves - saves < 100, "{} saves", w.saves - saves);
    assert!(w.saved().expect("saved").epoch.0 - epoch.0 < 60, "epochs");
    assert!(w.ticks - ticks < 60_000, "{} ticks", w.ticks - ticks);
}

// Its rows are as good as before: who was a replica in line does not become a stranger because its server was started anew.
#[test]
fn a_replica_that_was_away_for_a_moment_is_asked_when_it_is_back() {
    let mut w = cluster();
    w.host("db2").server.io = false;
    w.run(16_000);
    w.kill_server("db3");
    w.kill_server("db1");
    w.run(20_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    shows(&mut w, "db2 is not promoted");
    w.start_server("db3");
    w.run(60_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(w.lost_on("db2"), 0, "{}", told(&w));
}

#[test]
fn a_source_that_dies_while_it_is_fetched_from_ends_in_bounded_time_and_is_asked_again() {
    let mut w = cluster();
    w.host("db2").server.io = false;
    w.run(16_000);
    w.kill_server("db1");
    let begun = w.run_until(1_000, |w| times(w, "db2 fetches from db3 what only that has") > 0);
    assert!(begun.is_some(), "{}", told(&w));
    w.kill_server("db3");
    w.run(40_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    shows(&mut w, "db2 is not promoted: what only db3 has could not be fetched");
    w.start_server("db3");
    w.run(60_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(w.lost_on("db2"), 0, "{}", told(&w));
}

// A monitor that has not seen the old master at work cannot know who was fetching from it: that is for an operator.
#[test]
fn a_monitor_that_is_restarted_in_the_middle_of_a_failover_says_why_it_holds() {
    let mut w = cluster();
    w.kill_server("db1");
    let begun = w.run_until(1_000, |w| times(w, "db2 applies everything it has received") > 0);
    assert!(begun.is_some(), "{}", told(&w));
    w.stop_monitor();
    w.run(200);
    w.start_monitor();
    w.run(30_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    shows(&mut w, "db2 is not promoted: it has not been seen fetching from db1 by this monitor");
    w.command(move_writer("db2", true));
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(w.lost_on("db2"), 0, "{}", told(&w));
}

#[test]
fn passive_mode_in_the_middle_of_a_failover_costs_only_its_time() {
    let mut w = cluster();
    w.host("db2").server.io = false;
    w.run(1_500);
    w.kill_server("db1");
    w.run_until(1_000, |w| times(w, "db2 applies everything it has received") > 0);
    w.command(Command::SetPassive);
    w.run(120_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    w.command(Command::SetActive);
    w.run(40_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(w.lost_on("db2"), 0, "{}", told(&w));
}

// The monitor's disk is lost while a copy runs: the agent is told nothing of the copy any more, and lets it run undisturbed.
#[test]
fn a_copy_that_the_monitor_has_forgotten_is_not_disturbed() {
    let mut w = cluster();
    set_offline(&mut w, "db3");
    w.run(1_000);
    w.host("db3").server.source = Some("db2".into());
    reclone(&mut w, "db3", "db1");
    w.run(200);
    w.stop_monitor();
    w.forget_status();
    w.start_monitor();
    w.run(1_500);
    assert_eq!(times(&w, "db3: The server replicates from"), 0, "{}", told(&w));
    w.run(5_000);
    assert_eq!(times(&w, "db3: Done: throw the data away"), 1, "{}", told(&w));
}

#[test]
fn a_restart_of_either_side_in_the_middle_of_a_copy_neither_begins_it_twice_nor_lets_the_host_in_half_copied() {
    let mut w = returned(cluster());
    w.run(15_000);
    reclone(&mut w, "db1", "db2");
    w.run(500);
    w.stop_monitor();
    w.run(300);
    w.start_monitor();
    w.run(15_000);
    shows(&mut w, "db1(10.0.0.11) master/ONLINE");
    assert_eq!(times(&w, "db1: Done: throw the data away"), 1, "{}", told(&w));
    assert_eq!(times(&w, "db1: db1 is to throw its data away"), 1, "{}", told(&w));

    let mut w = returned(cluster());
    w.run(15_000);
    reclone(&mut w, "db1", "db2");
    w.run(500);
    w.stop_agent("db1");
    w.run(300);
    w.start_agent(&"db1".into());
    w.run(120_000);
    shows(&mut w, "db1(10.0.0.11) master/AWAITING_RECOVERY");
    shows(&mut w, "the agent was restarted while it was under way");
    assert_eq!(times(&w, "db1: db1 is to throw its data away"), 1, "{}", told(&w));
}

#[test]
fn accept_lost_promises_nothing_while_there_is_nobody_to_be_brought_in_line_with() {
    let mut w = returned(cluster());
    w.run(15_000);
    w.crash_host("db2");
    w.run(30_000);
    let accept = Command::SetOnline { host: "db1".into(), accept_lost: true };
    let answer = w.text(accept.clone());
    assert!(answer.starts_with("ERROR") && answer.contains("'db2' does not answer"), "{answer}");
    w.boot_host("db2");
    w.run(20_000);
    let of_db1 = |w: &mut World, host: &str| w.host(host).server.executed[&1];
    assert_eq!(of_db1(&mut w, "db2") + 3, of_db1(&mut w, "db1"), "not fetched by itself at its start\n{}", told(&w));
    set_online(&mut w, "db2");
    w.run(5_000);
    let answer = w.text(accept);
    assert!(answer.starts_with("OK"), "{answer}\n{}", told(&w));
    w.run(20_000);
    shows(&mut w, "db1(10.0.0.11) master/ONLINE");
}

// lessons.md 10
#[test]
fn who_loses_the_writer_in_the_moment_of_opening_is_asked_for_what_it_wrote() {
    let mut w = cluster();
    w.jitter = 300;
    w.command(move_writer("db2", false));
    let wrote = |w: &World| w.acknowledged.iter().any(|(server, _)| *server == 2);
    w.run_until(20_000, wrote).expect("db2 is open");
    assert_eq!(times(&w, "The writer is open on db2"), 0, "the monitor knows already\n{}", told(&w));
    set_offline(&mut w, "db2");
    w.run_until(20_000, |w| times(w, "The writer is open on db1") == 2).expect("back");
    w.run(20_000);
    assert_eq!(w.lost_on("db1"), 0, "{}", told(&w));
    assert_eq!(times(&w, "that the active master db1 lacks: it stays out"), 0, "{}", told(&w));
}

#[test]
fn a_move_that_is_asked_for_while_another_host_opens_is_a_planned_one_from_there() {
    let mut w = cluster();
    w.jitter = 300;
    set_offline(&mut w, "db1");
    w.run_until(20_000, |w| times(w, "db2: The server is writable") == 1).expect("db2 is open");
    set_online(&mut w, "db1");
    assert!(w.command(move_writer("db1", false)).is_none(), "answered at once");
    assert_eq!(times(&w, "The writer is open on db2"), 0, "the monitor knows already\n{}", told(&w));
    w.run_until(20_000, |w| times(w, "The writer is open on db1") == 2).expect("moved");
    assert_eq!(times(&w, "The writer moves from db2 to db1: asked for by the operator"), 1, "{}", told(&w));
    let answer = w.late_answer().map(|a| a.text(&|_| String::new())).unwrap_or_default();
    assert!(answer.starts_with("OK"), "{answer}\n{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert_eq!(w.lost_on("db1"), 0, "{}", told(&w));
}

#[test]
fn who_loses_the_writer_in_the_moment_of_opening_and_goes_away_is_waited_for() {
    let mut w = cluster();
    w.jitter = 300;
    w.command(move_writer("db2", false));
    let wrote = |w: &World| w.acknowledged.iter().any(|(server, _)| *server == 2);
    w.run_until(20_000, wrote).expect("db2 is open");
    assert_eq!(times(&w, "The writer is open on db2"), 0, "the monitor knows already\n{}", told(&w));
    set_offline(&mut w, "db2");
    w.run_until(5_000, |w| times(w, "db1 applies everything it has received, and so does db2") == 1).expect("asked");
    w.cut.insert("db2".into());
    w.run(20_000);
    assert_eq!(w.holders(WRITER), [""; 0], "{}", told(&w));
    shows(&mut w, "db1 is not promoted: db2 ");
    w.cut.clear();
    w.run_until(20_000, |w| times(w, "The writer is open on db1") == 2).expect("back");
    w.run(1_000);
    assert_eq!(w.lost_on("db1"), 0, "{}", told(&w));
}

/// db2 is given the writer, opens and writes, and the monitor does not know yet that it is open.
fn opening(w: &mut World) {
    w.jitter = 300;
    w.command(move_writer("db2", false));
    opened_unseen(w);
}

/// db2 has lost the writer in the moment of opening, and is asked for what it wrote.
fn asked_after_opening(w: &mut World) {
    opening(w);
    set_offline(w, "db2");
    w.run_until(5_000, |w| times(w, "db1 applies everything it has received, and so does db2") == 1).expect("asked");
}

/// Whoever has the writer in the end, has everything.
#[track_caller]
fn nothing_is_lost(w: &mut World) {
    let show = w.show();
    let holder = w.holders(WRITER).join(" and ");
    assert!(["db1", "db2", "db3"].contains(&holder.as_str()), "'{holder}'\n{show}\n{}", told(w));
    assert_eq!(w.lost_on(&holder), 0, "on {holder}\n{show}\n{}", told(w));
}

// Who is to be asked is settled when the drain begins; who comes back after that and before the grant is passed over.
#[test]
fn an_old_master_that_is_back_before_the_grant_is_asked() {
    let mut w = cluster_of(World::with(config(&["db1", "db2"])));
    w.jitter = 200;
    w.run(2_000);
    // Given that db2 lacks one second of it when db1 is cut off.
    w.host("db2").server.io = false;
    w.run(1_000);
    w.cut.insert("db1".into());
    w.run_until(20_000, |w| times(w, "db2 applies everything it has received") > 0).expect("drains");
    w.slow_looks = 500;
    w.cut.clear();
    w.run_until(20_000, |w| times(w, "db1: Agent is connected") > 1).expect("back");
    assert_eq!(times(&w, "The writer is given to db2"), 0, "{}", told(&w));
    w.run(60_000);
    nothing_is_lost(&mut w);
}

#[test]
fn who_lost_the_writer_while_opening_and_is_back_before_the_grant_is_asked() {
    let mut w = cluster();
    w.jitter = 300;
    w.command(move_writer("db2", false));
    w.run_until(20_000, |w| times(w, "The writer is given to db2") > 0).expect("given");
    w.slow_looks = 500;
    opened_unseen(&mut w);
    w.cut.insert("db2".into());
    w.run(4_300);
    w.cut.clear();
    w.run_until(20_000, |w| times(w, "db2: Agent is connected") > 1).expect("back");
    assert_eq!(times(&w, "The writer is given to db1"), 1, "{}", told(&w));
    w.run(60_000);
    nothing_is_lost(&mut w);
}

// Once it has been compared with the active master, which lacks what it wrote, it is not trusted and never asked again.
#[test]
fn a_hold_for_who_wrote_ends_when_that_is_back() {
    let mut w = cluster();
    w.jitter = 300;
    w.command(move_writer("db2", false));
    w.run_until(20_000, |w| times(w, "The writer is given to db2") > 0).expect("given");
    w.slow_looks = 3_000;
    opened_unseen(&mut w);
    w.cut.insert("db2".into());
    w.run(5_000);
    w.cut.clear();
    w.run(10_000);
    (w.slow_looks, w.jitter) = (0, 0);
    w.run(120_000);
    nothing_is_lost(&mut w);
}

// The same without slowness: both masters were away, and db2 was back for three seconds before db1 could take the writer.
#[test]
fn a_hold_for_who_wrote_ends_when_both_are_back() {
    let mut w = cluster();
    asked_after_opening(&mut w);
    set_online(&mut w, "db2");
    w.cut.insert("db2".into());
    w.run(20_000);
    assert_eq!(w.holders(WRITER), [""; 0], "{}", told(&w));
    w.kill_server("db1");
    w.run(70_000);
    w.start_server("db1");
    w.host("db1").server.io = false;
    w.cut.clear();
    w.run(10_000);
    set_online(&mut w, "db1");
    w.run(120_000);
    nothing_is_lost(&mut w);
}

#[test]
fn a_restarted_monitor_asks_who_lost_the_writer_in_the_moment_of_opening() {
    let mut w = cluster();
    opening(&mut w);
    set_offline(&mut w, "db2");
    w.run_until(5_000, |w| times(w, "db2: The server is read-only") > 0).expect("closed");
    assert_eq!(times(&w, "The writer is given to db1"), 1, "{}", told(&w));
    w.stop_monitor();
    w.run(200);
    w.start_monitor();
    w.run(60_000);
    nothing_is_lost(&mut w);
}

#[test]
fn a_monitor_that_is_restarted_while_it_waits_for_who_wrote_goes_on_waiting() {
    let mut w = cluster();
    asked_after_opening(&mut w);
    w.cut.insert("db2".into());
    w.run(20_000);
    assert_eq!(w.holders(WRITER), [""; 0], "{}", told(&w));
    w.stop_monitor();
    w.run(500);
    w.start_monitor();
    w.run(20_000);
    assert_eq!(w.holders(WRITER), [""; 0], "{}", told(&w));
    w.cut.clear();
    w.run(60_000);
    nothing_is_lost(&mut w);
}

#[test]
fn who_wrote_and_let_go_is_waited_for_while_its_server_is_started_anew() {
    let mut w = cluster();
    asked_after_opening(&mut w);
    w.kill_server("db2");
    w.run(50_000);
    w.start_server("db2");
    w.run(60_000);
    nothing_is_lost(&mut w);
}

#[test]
fn who_wrote_and_let_go_is_waited_for_until_its_server_is_there() {
    let mut w = cluster();
    asked_after_opening(&mut w);
    w.crash_host("db2");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), [""; 0], "{}", told(&w));
    // Given that its agent is there before its server has recovered.
    w.boot_host("db2");
    w.kill_server("db2");
    w.run(40_000);
    w.start_server("db2");
    w.run(60_000);
    nothing_is_lost(&mut w);
}

// lessons.md 18
#[test]
fn a_writer_that_only_peers_have_seen_since_it_opened_is_missed_when_it_dies() {
    let mut w = cluster();
    opening(&mut w);
    w.unseen.insert("db2".into());
    w.run(30_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.crash_host("db2");
    w.run(20_000);
    assert_eq!(w.holders(WRITER), [""; 0], "{} are lost\n{}", w.lost_on("db1"), told(&w));
    w.unseen.clear();
    w.boot_host("db2");
    w.run(60_000);
    nothing_is_lost(&mut w);
}

#[test]
fn set_offline_of_a_writer_that_only_peers_have_seen_since_it_opened_loses_nothing() {
    let mut w = cluster();
    opening(&mut w);
    w.unseen.insert("db2".into());
    w.run(30_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    set_offline(&mut w, "db2");
    w.run(20_000);
    w.unseen.clear();
    w.run(60_000);
    nothing_is_lost(&mut w);
}

#[test]
fn a_writer_that_opened_and_died_while_the_monitor_was_away_is_missed() {
    let mut w = cluster();
    opening(&mut w);
    w.stop_monitor();
    w.run(20_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.kill_server("db2");
    w.run(1_000);
    w.start_monitor();
    w.run(10_000);
    w.start_server("db2");
    w.run(60_000);
    nothing_is_lost(&mut w);
}

// What a host said before it was away is no comparison when its connection is back.
#[test]
fn nobody_is_compared_by_a_report_of_before_it_was_away() {
    let mut w = cluster();
    opening(&mut w);
    w.unseen.insert("db2".into());
    w.run(30_000);
    set_offline(&mut w, "db2");
    w.run(20_000);
    w.command(move_writer("db1", true));
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    w.unseen.clear();
    w.run(20_000);
    assert!(w.lost_on("db1") > 1_000);
    let answer = w.text(Command::SetOnline { host: "db2".into(), accept_lost: false });
    assert!(answer.starts_with("ERROR"), "{answer}\n{}", told(&w));
    shows(&mut w, "transactions that the active master db1 lacks");
}

// Its last word says what it has, and is not listened to.
#[test]
fn an_agent_that_ends_in_order_tells_what_its_server_has() {
    let mut w = cluster_of(World::with(config(&["db1", "db2"])));
    w.command(Command::SetPassive);
    w.end_agent("db1");
    w.run(4_000);
    w.host("db2").server.io = false;
    w.run_until(60_000, |w| !w.has_agent("db1")).expect("ended");
    assert!(w.lost_on("db2") > 0);
    w.command(Command::SetActive);
    w.run(20_000);
    w.start_agent(&"db1".into());
    w.run(60_000);
    nothing_is_lost(&mut w);
}

// When the last but one failed is not when the last one did.
#[test]
fn a_third_master_takes_over_with_everything_of_who_lost_the_writer_while_opening() {
    let mut w = cluster_of(World::with(masters(&HOSTS, &HOSTS)));
    w.jitter = 300;
    w.crash_host("db1");
    opened_unseen(&mut w);
    set_offline(&mut w, "db2");
    w.run(100_000);
    assert_eq!(w.holders(WRITER), ["db3"], "{}", told(&w));
    nothing_is_lost(&mut w);
}

#[test]
fn a_third_master_takes_over_when_the_second_dies_before_it_opens() {
    let mut w = cluster_of(World::with(masters(&HOSTS, &HOSTS)));
    w.refuse_steps.insert(("db2".into(), "writable"));
    w.crash_host("db1");
    w.run_until(20_000, |w| times(w, "The writer is given to db2") > 0).expect("given");
    w.run(1_000);
    w.kill_server("db2");
    w.run(40_000);
    assert_eq!(times(&w, "it had stopped fetching from db1"), 0, "{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db3"], "{}", told(&w));
    nothing_is_lost(&mut w);
}

#[test]
fn what_a_forced_master_lacks_is_not_called_unacknowledged_by_its_successor() {
    let mut w = cluster_of(World::with(masters(&HOSTS, &HOSTS)));
    w.semisync = true;
    w.run(3_000);
    // Given that db3 alone has received the last three rows of db1, so that they were acknowledged, and throws them away.
    w.host("db2").server.io = false;
    w.run(100);
    *w.host("db1").server.executed.entry(1).or_insert(0) += 3;
    *w.host("db3").server.received.entry(1).or_insert(0) += 3;
    w.crash_host("db3");
    w.kill_server("db1");
    w.run(600);
    assert_eq!(w.holders(WRITER), [""; 0], "{}", told(&w));
    w.jitter = 100;
    w.command(move_writer("db2", true));
    opened_unseen(&mut w);
    set_offline(&mut w, "db2");
    w.run(1_000);
    w.boot_host("db3");
    w.run(8_000);
    w.text(Command::SetOnline { host: "db3".into(), accept_lost: false });
    w.run(60_000);
    assert_eq!(w.holders(WRITER), ["db3"], "{}", told(&w));
    w.start_server("db1");
    w.host("db1").server.io = false;
    w.run(20_000);
    shows(&mut w, "host db1 has 3 transactions that the active master db3 lacks");
    shows_not(&mut w, "unacknowledged");
}

#[test]
fn force_is_for_whom_it_was_said() {
    let mut w = cluster_of(World::with(masters(&HOSTS, &HOSTS)));
    w.host("db3").server.io = false;
    w.run(10_000);
    w.refuse_sql("db2");
    w.run(100);
    w.kill_server("db1");
    w.refuse_steps.insert(("db2".into(), "writable"));
    w.run(40_000);
    assert_eq!(w.holders(WRITER), [""; 0], "{}", told(&w));
    w.command(move_writer("db2", true));
    w.run(9_000);
    assert!(w.lost_on("db3") > w.lost_on("db2") + 100);
    w.run(60_000);
    assert_eq!(w.holders(WRITER), [""; 0], "{}", told(&w));
}

// R13: a release is not told before the server has been read back as closed.
#[test]
fn an_agent_that_starts_does_not_say_that_it_is_off_before_it_has_looked() {
    let mut w = cluster();
    opening(&mut w);
    w.jitter = 0;
    w.refuse_steps.insert(("db2".into(), "read_only"));
    set_offline(&mut w, "db2");
    w.run_until(5_000, |w| times(w, "db2: writer(10.0.0.50) is off this host") > 0).expect("told");
    w.run(400);
    assert!(!w.host("db2").server.read_only);
    w.stop_agent("db2");
    w.slow_looks = 4_000;
    w.run(20);
    w.start_agent(&"db2".into());
    w.run(200);
    let both = |w: &World| !w.hosts[&HostName::from("db2")].server.read_only && w.writer_is_open();
    assert_eq!(w.run_until(10_000, both), None, "two open servers\n{}", told(&w));
}

#[test]
fn a_restart_of_the_monitor_and_set_offline_in_the_moment_of_opening_lose_nothing() {
    let mut w = cluster();
    opening(&mut w);
    w.stop_monitor();
    w.run(200);
    w.start_monitor();
    set_offline(&mut w, "db2");
    w.run(60_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    nothing_is_lost(&mut w);
}

#[test]
fn an_agent_that_is_told_to_end_in_the_moment_of_opening_loses_nothing() {
    let mut w = cluster();
    opening(&mut w);
    w.end_agent("db2");
    w.run(60_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    nothing_is_lost(&mut w);
}

#[test]
fn an_agent_that_is_restarted_while_it_is_asked_loses_nothing() {
    let mut w = cluster();
    asked_after_opening(&mut w);
    w.stop_agent("db2");
    w.slow_looks = 3_000;
    w.run(100);
    w.start_agent(&"db2".into());
    w.run(60_000);
    nothing_is_lost(&mut w);
}

#[test]
fn who_had_more_than_a_forced_master_stays_out_over_a_restart_of_the_monitor() {
    let mut w = cluster();
    // db2 cannot apply what it has received; db3 has applied it.
    w.refuse_sql("db2");
    w.host("db2").server.sql = false;
    w.run(500);
    w.kill_server("db1");
    w.run(20_000);
    assert_eq!(w.holders(WRITER), [""; 0], "{}", told(&w));
    w.command(move_writer("db2", true));
    w.run(60_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!(times(&w, "db3: db3 has ") > 0, "{}", told(&w));
    assert_eq!(times(&w, "db3: db3 has nothing that the active master db2 lacks"), 0, "{}", told(&w));
    shows(&mut w, "db3(10.0.0.13) slave/AWAITING_RECOVERY");
    w.stop_monitor();
    w.start_monitor();
    w.run(10_000);
    shows(&mut w, "db3(10.0.0.13) slave/AWAITING_RECOVERY");
    reclone(&mut w, "db3", "db2");
    w.run(20_000);
    shows(&mut w, "db3(10.0.0.13) slave/ONLINE");
}

//! Stories that once broke the cores, in the simulated world (src/world.rs). Each is named after what must not happen.
//! Given, when, then.

use mmm_common::config::Monitor;
use mmm_common::control::Command;
use mmm_common::ids::HostName;
use mmm_tests::stories::{HOSTS, move_writer, times, told};
use mmm_tests::world::{WRITER, World, config};
use std::time::Duration;

/// Three hosts, all ONLINE, db1 writing.
fn cluster() -> World {
    cluster_with(config(&HOSTS))
}

fn cluster_with(config: Monitor) -> World {
    let mut w = World::with(config);
    w.run(2_500);
    for host in HOSTS {
        let answer = set_online(&mut w, host);
        assert!(answer.starts_with("OK"), "{answer}\n{}", told(&w));
        w.run(1_500);
    }
    w.run(3_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    w.story.clear();
    w.outage = 0;
    w
}

fn set_online(w: &mut World, host: &str) -> String {
    w.text(Command::SetOnline { host: host.into(), accept_lost: false })
}

fn shows(w: &mut World, text: &str) -> bool {
    w.show().contains(text)
}

// A planned move keeps every write; nothing but the certain end of the old master may turn it into a failover.
#[test]
fn a_planned_move_does_not_become_a_failover_by_a_short_silence() {
    // Given a move that waits for its target to catch up.
    let mut w = cluster();
    w.host("db2").server.io = false;
    w.run(600);
    w.command(move_writer("db2", false));
    w.run(1_000);
    // When the old master's agent is away for less than a lease.
    w.stop_agent("db1");
    w.run(2_000);
    w.start_agent(&"db1".into());
    w.outage = 0;
    w.run(5_000);
    // Then the old master writes on, and whoever asked for the move is told why.
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.outage < 500, "{} ms\n{}", w.outage, told(&w));
    let answer = w.late_answer().map(|a| a.text(&|_| String::new())).unwrap_or_default();
    assert!(answer.contains("the agent of db1 does not answer at the moment"), "{answer}\n{}", told(&w));
}

#[test]
fn a_planned_move_does_not_become_a_failover_by_a_server_that_is_not_known_to_be_alive() {
    let mut w = cluster();
    w.host("db2").server.io = false;
    w.run(600);
    w.command(move_writer("db2", false));
    w.run(1_000);
    // A restarted agent has not looked at its server yet.
    w.stop_agent("db1");
    w.start_agent(&"db1".into());
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert_eq!(times(&w, "without the old master's help"), 0, "{}", told(&w));
}

// data-safety.md: what is not known of a candidate is no proof that it has everything.
#[test]
fn a_stale_master_is_not_promoted_because_its_agent_was_away_for_a_moment() {
    let mut w = cluster();
    w.host("db2").server.io = false;
    w.host("db3").server.io = false;
    w.run(16_000);
    w.stop_agent("db2");
    w.run(1_000);
    w.kill_server("db1");
    w.run(2_000);
    w.start_agent(&"db2".into());
    w.run(10_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "it lacks {} writes\n{}", w.lost_on("db2"), told(&w));
    assert!(shows(&mut w, "stopped fetching from db1"), "{}", w.show());
}

#[test]
fn a_stale_master_is_not_promoted_because_the_monitor_has_forgotten_since_when() {
    let mut w = cluster();
    w.host("db2").server.io = false;
    w.host("db3").server.io = false;
    w.run(16_000);
    w.stop_monitor();
    w.run(500);
    w.start_monitor();
    w.run(6_000);
    w.kill_server("db1");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "it lacks {} writes\n{}", w.lost_on("db2"), told(&w));
    assert!(shows(&mut w, "has not been seen fetching from db1"), "{}", w.show());
}

#[test]
fn nobody_waits_for_a_stale_master_when_the_old_one_is_back() {
    let mut w = cluster();
    w.host("db2").server.io = false;
    w.host("db3").server.io = false;
    w.run(16_000);
    w.kill_server("db1");
    w.run(5_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    w.start_server("db1");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.writer_is_open());
}

// lessons.md 21: it can only be told from the epochs who is right, and they tell it.
#[test]
fn an_isolation_that_ends_is_not_told_as_a_conflict() {
    let mut w = cluster();
    w.cut.insert("db1".into());
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.outage = 0;
    w.cut.clear();
    w.run(10_000);
    assert_eq!(times(&w, "is on several hosts"), 0, "{}", told(&w));
    assert!(w.outage < 100, "{} ms\n{}", w.outage, told(&w));
}

// lessons.md 4: what cannot be closed is told, and it does not count as having the address.
#[test]
fn an_old_master_that_cannot_be_closed_does_not_take_the_address_from_the_new_one() {
    let mut w = cluster();
    w.host("db1").server.hung_since = Some(w.now);
    w.run(8_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.refuse_steps.insert(("db1".into(), "read_only"));
    w.host("db1").server.hung_since = None;
    w.outage = 0;
    w.run(30_000);
    // Nor when a monitor starts, which trusts nobody yet.
    w.stop_monitor();
    w.start_monitor();
    w.run(10_000);
    assert!(!w.host("db1").server.read_only, "the story needs an old master that stays open");
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(times(&w, "db2: writer(10.0.0.50) is off this host"), 0, "{}", told(&w));
    assert_eq!(times(&w, "is on several hosts"), 0, "{}", told(&w));
    assert_eq!(w.text(Command::Mode), "ACTIVE\n");
    assert!(w.outage < 100, "{} ms\n{}", w.outage, told(&w));
    assert!(shows(&mut w, "Warning: host db1: "), "{}", w.show());
    // Once it can be closed, it is.
    w.refuse_steps.clear();
    w.run(2_000);
    let closed = w.host("db1").server.read_only;
    assert!(closed, "{}", told(&w));
}

#[test]
fn a_forced_move_to_a_host_in_replication_fail_is_not_left_without_an_answer() {
    let mut w = cluster();
    w.run(70_000);
    w.host("db2").server.io = false;
    w.run(6_000);
    assert!(shows(&mut w, "db2(10.0.0.12) master/REPLICATION_FAIL"), "{}", w.show());
    let asked = w.answers.len();
    w.command(move_writer("db2", true));
    w.run(60_000);
    assert_eq!(w.answers.len(), asked + 1, "the move is answered\n{}", told(&w));
    let again = w.text(move_writer("db2", true));
    assert!(!again.contains("being moved already"), "{again}\n{}", told(&w));
    assert!(w.writer_is_open(), "{}", told(&w));
}

// R11: a state that is older than what the agents have seen is as good as none.
// lessons.md 21
#[test]
fn an_old_state_of_the_monitor_does_not_stop_the_cluster_for_good() {
    let mut w = cluster();
    let old = w.saved().cloned().expect("something is saved");
    for to in ["db2", "db1"] {
        w.command(move_writer(to, false));
        w.run(3_000);
        assert_eq!(w.holders(WRITER), [to], "{}", told(&w));
    }
    w.stop_monitor();
    w.restore_status(old);
    w.start_monitor();
    w.run(20_000);
    assert!(w.writer_is_open(), "{}", told(&w));
}

// Every address has its own newest epoch: others may have gone on meanwhile.
#[test]
fn an_old_state_of_one_address_is_not_hidden_by_the_epochs_of_others() {
    let mut w = cluster();
    let old = w.saved().cloned().expect("something is saved");
    // Given moves of the writer of which db3 hears nothing, and a monitor that has forgotten them.
    w.cut.insert("db3".into());
    for to in ["db2", "db1"] {
        w.command(move_writer(to, false));
        w.run(1_000);
        assert_eq!(w.holders(WRITER), [to], "{}", told(&w));
    }
    w.stop_monitor();
    w.restore_status(old);
    // When it goes on numbering with db3 alone, past what the others have seen.
    w.cut = ["db1", "db2"].map(HostName::from).into();
    w.start_monitor();
    w.run(600);
    for _ in 0..10 {
        w.command(Command::SetOffline { host: "db3".into() });
        w.run(50);
        set_online(&mut w, "db3");
        w.run(50);
    }
    w.cut.clear();
    w.run(15_000);
    assert!(w.writer_is_open(), "{}", told(&w));
}

#[test]
fn a_holder_confirmed_dead_by_the_operator_does_not_keep_its_role() {
    let mut w = cluster();
    w.command(Command::SetManual);
    w.crash_host("db1");
    w.run(6_000);
    let answer = w.text(Command::ConfirmDead { host: "db1".into() });
    assert!(answer.starts_with("OK"), "{answer}");
    assert!(!shows(&mut w, "writer(10.0.0.50)\n"), "{}", w.show());
    w.boot_host("db1");
    w.run(8_000);
    set_online(&mut w, "db1");
    w.run(10_000);
    assert!(w.writer_is_open(), "{}", told(&w));
}

// R8 (c).
#[test]
fn a_holder_confirmed_dead_by_kill_host_is_not_waited_for() {
    let mut c = config(&HOSTS);
    c.kill_host_bin = Some("/bin/kill_host".into());
    let mut w = cluster_with(c);
    w.stop_agent("db1");
    w.cut.insert("db1".into());
    w.run_until(4_000, |w| times(w, "kill_host db1") == 1).expect("it is asked for before the lease is over");
    w.crash_host("db1");
    assert!(w.confirm_kill("db1"), "{}", told(&w));
    w.run(500);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

// lessons.md 2
#[test]
fn a_kill_that_is_confirmed_after_the_agent_is_back_does_not_count() {
    let mut c = config(&HOSTS);
    c.kill_host_bin = Some("/bin/kill_host".into());
    let mut w = cluster_with(c);
    w.cut.insert("db1".into());
    w.run_until(5_000, |w| times(w, "kill_host db1") == 1).expect("it is asked for before the lease is over");
    w.cut.clear();
    w.run(1_000);
    assert!(w.confirm_kill("db1"), "{}", told(&w));
    assert_eq!(times(&w, "confirms that the host is off: its orders are over"), 0, "{}", told(&w));
    assert_eq!(times(&w, "its agent was connected meanwhile: it proves nothing"), 1, "{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
}

#[test]
fn a_target_set_offline_in_the_middle_of_a_move_does_not_leave_the_cluster_without_a_writer() {
    for ms in 0..40 {
        let mut w = cluster();
        w.command(move_writer("db2", false));
        w.run(ms);
        w.command(Command::SetOffline { host: "db2".into() });
        w.run(10_000);
        assert_eq!(w.holders(WRITER), ["db1"], "{ms} ms\n{}", told(&w));
        assert!(w.writer_is_open(), "{ms} ms\n{}", told(&w));
        // One way and back at the most.
        assert!(times(&w, "The writer is given to") <= 2, "{ms} ms\n{}", told(&w));
    }
}

#[test]
fn a_writer_just_given_is_not_taken_back_for_a_preferred_host_before_it_has_opened() {
    let mut c = config(&HOSTS);
    let writer = c.cluster.roles.get_mut(&"writer".into()).expect("the role");
    writer.prefer = Some("db1".into());
    let mut w = cluster_with(c);
    w.refuse_steps.insert(("db2".into(), "writable"));
    w.kill_server("db1");
    w.run(1_000);
    w.start_server("db1");
    w.run(5_000);
    assert!(shows(&mut w, "db1(10.0.0.11) master/ONLINE"), "{}", w.show());
    w.refuse_steps.clear();
    w.run(10_000);
    assert_eq!(times(&w, "without its help"), 1, "the first way\n{}", told(&w));
    assert_eq!(times(&w, "The writer moves from db2 to db1: db1 is preferred"), 1, "the way back\n{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
}

#[test]
fn a_monitor_restarted_between_grant_and_open_does_not_forget_the_replicas() {
    let mut w = cluster();
    w.kill_server("db1");
    let writer = WRITER.parse().expect("an address");
    let granted = |w: &World| w.saved().is_some_and(|s| s.slots[&writer].holder == Some("db2".into()));
    w.run_until(2_000, granted).expect("db2 gets the writer");
    w.stop_monitor();
    w.run(200);
    w.start_monitor();
    w.run(20_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert_eq!(w.host("db3").server.source.clone(), Some("db2".into()), "{}", told(&w));
}

// R4: the world itself looks after every event that nobody has it twice.
#[test]
fn an_agent_with_a_longer_lease_ttl_does_not_outstay_what_the_monitor_waits_out() {
    let mut w = cluster();
    w.agents_lease_ttl = Some(Duration::from_secs(20));
    for host in HOSTS {
        w.stop_agent(host);
        w.start_agent(&host.into());
        w.run(3_000);
    }
    // An agent trusts in the time that it has waited by its own clock and its own lease_ttl.
    w.run(25_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    w.cut.insert("db1".into());
    let gone = w.run_until(10_000, |w| w.holders(WRITER) != ["db1"]).expect("it goes");
    assert!(gone <= 3_000, "{gone} ms\n{}", told(&w));
    w.run(6_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

#[test]
fn nobody_is_killed_because_its_agent_was_never_there() {
    let mut c = config(&HOSTS);
    c.kill_host_bin = Some("/bin/kill_host".into());
    let mut w = World::with(c);
    w.stop_agent("db2");
    w.run(2_500);
    set_online(&mut w, "db1");
    w.run(10_000);
    assert_eq!(times(&w, "kill_host db2"), 0, "{}", told(&w));
    assert!(shows(&mut w, "db2 has not answered"), "the reason is told: {}", w.show());
}

// lessons.md 10
#[test]
fn a_host_with_rows_that_others_lack_does_not_stay_online() {
    let mut w = cluster();
    w.host("db3").server.executed.insert(3, 5);
    w.kill_server("db1");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!(shows(&mut w, "db3(10.0.0.13) slave/AWAITING_RECOVERY. Roles: \n"), "{}", w.show());
    assert!(shows(&mut w, "host db3 has 5 transactions that the active master db2 lacks"), "{}", w.show());
    let addresses = w.host("db3").kernel.len();
    assert_eq!(addresses, 0, "no reader sees them\n{}", told(&w));
}

// A dead master whose agent answers is nobody to compare with: the operator who brings the rest back must not be told
// to wait for it for ever.
#[test]
fn the_operator_is_not_left_without_a_way_while_a_dead_masters_agent_answers() {
    let mut w = cluster();
    w.kill_server("db2");
    w.run(3_000);
    w.kill_server("db1");
    w.start_server("db2");
    w.run(10_000);
    assert_eq!(w.holders(WRITER), Vec::<&str>::new(), "{}", told(&w));
    let said = set_online(&mut w, "db2");
    assert!(said.starts_with("OK"), "{said}\n{}", told(&w));
    w.run(5_000);
    let said = w.text(move_writer("db2", true));
    w.run(10_000);
    assert!(w.writer_is_open(), "{said}\n{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db2"]);
}

// lessons.md 20
#[test]
fn a_preferred_host_that_comes_and_goes_does_not_take_the_writer_to_and_fro_without_end() {
    let mut c = config(&HOSTS);
    let writer = c.cluster.roles.get_mut(&"writer".into()).expect("the role");
    writer.prefer = Some("db1".into());
    let limit = c.flap_count as usize;
    let mut w = cluster_with(c);
    for _ in 0..20 {
        w.command(Command::SetOffline { host: "db1".into() });
        w.run(6_000);
        set_online(&mut w, "db1");
        w.run(6_000);
    }
    assert_eq!(times(&w, "The writer moves from db2 to db1: db1 is preferred"), limit, "{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!(shows(&mut w, "moves to preferred hosts within flap_duration are enough"), "{}", w.show());
}

#[test]
fn a_step_that_fails_is_not_told_with_every_try() {
    let mut w = cluster();
    w.refuse_steps.insert(("db2".into(), "follow"));
    w.host("db2").server.source = Some("db3".into());
    w.run(10_000);
    assert_eq!(times(&w, "db2: Failed, and will be tried again"), 1, "{}", told(&w));
    w.refuse_steps.clear();
    w.run(2_000);
    assert_eq!(w.host("db2").server.source.clone(), Some(HostName::from("db1")), "{}", told(&w));
}

// lessons.md 3
#[test]
fn a_new_master_that_cannot_be_opened_does_not_keep_the_role() {
    let mut w = cluster();
    w.refuse_steps.insert(("db2".into(), "writable"));
    w.command(move_writer("db2", false));
    w.run(20_000);
    let answer = w.late_answer().map(|a| a.text(&|_| String::new())).unwrap_or_default();
    assert!(answer.starts_with("ERROR") && answer.contains("has not opened"), "{answer}\n{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.writer_is_open());
}

#[test]
fn set_offline_takes_roles_away_in_manual_mode_too() {
    let mut w = cluster();
    w.command(Command::SetManual);
    w.command(Command::SetOffline { host: "db1".into() });
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!(w.host("db1").kernel.is_empty());
}

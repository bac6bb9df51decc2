//! Attacks on failovers that come right after something else: a master's first write, a writer that nobody saw open, an
//! operator's --force for a host that is then lost (data-safety.md, "Unplanned").

use mmm_tests::stories::{
    HOSTS, cluster, cluster_of, masters, move_writer, opened_unseen, set_offline, shows, times, told,
};
use mmm_tests::world::{WRITER, World};

/// db2 has the writer, and has never written before.
fn moved_before_any_write(mut w: World) -> World {
    w.writing = false;
    w.run(1_000);
    w.command(move_writer("db2", false));
    w.run(20_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w
}

/// Whoever has the writer, or is asked for it, has what db2 wrote; nobody is promoted without it.
#[track_caller]
fn keeps_what_db2_wrote(w: &World) {
    let wrote: Vec<(u32, u64)> = w.acknowledged.iter().copied().filter(|(server, _)| *server == 2).collect();
    assert!(!wrote.is_empty(), "{}", told(w));
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(w));
    assert_eq!(w.lacks("db1", &wrote), 0, "of {}\n{}", wrote.len(), told(w));
}

/// In the last that was heard of db2 nothing was of its own: what db3 had of it was taken for rows that came from no master.
#[test]
fn the_first_rows_of_a_master_are_not_taken_for_a_replicas_own() {
    let mut w = moved_before_any_write(cluster());
    w.host("db1").server.io = false;
    w.writing = true;
    w.run(100);
    w.kill_server("db2");
    w.run(20_000);
    keeps_what_db2_wrote(&w);
}

#[test]
fn the_first_rows_of_a_master_that_only_its_peers_hear_are_not_taken_for_a_replicas_own() {
    let mut w = moved_before_any_write(cluster());
    w.unseen.insert("db2".into());
    w.writing = true;
    w.run(15_000);
    w.host("db1").server.io = false;
    w.run(300);
    w.crash_host("db2");
    w.run(40_000);
    keeps_what_db2_wrote(&w);
}

#[test]
fn the_first_rows_of_a_master_that_only_an_offline_one_has_acknowledged_are_kept() {
    let mut w = cluster_of(World::with(masters(&HOSTS, &HOSTS)));
    w.semisync = true;
    let mut w = moved_before_any_write(w);
    set_offline(&mut w, "db3");
    w.run(3_000);
    shows(&mut w, "# Role writer is semi-synchronous");
    w.host("db1").server.io = false;
    w.writing = true;
    w.run(100);
    w.kill_server("db2");
    w.run(20_000);
    keeps_what_db2_wrote(&w);
}

/// db2 writes unseen, db3 gets that and dies before it opens: the next one has to ask db2 as well.
#[test]
fn what_an_unseen_writer_wrote_is_asked_for_by_its_successors_successor() {
    let four = ["db1", "db2", "db3", "db4"];
    let mut w = cluster_of(World::with(masters(&four, &four)));
    w.jitter = 300;
    w.crash_host("db1");
    opened_unseen(&mut w);
    w.refuse_steps.insert(("db3".into(), "writable"));
    set_offline(&mut w, "db2");
    w.run_until(100_000, |w| times(w, "The writer is given to db3") > 0).expect("given");
    w.run(500);
    w.crash_host("db3");
    w.run(60_000);
    assert_eq!(w.holders(WRITER), ["db4"], "{}", told(&w));
    assert_eq!(w.lost_on("db4"), 0, "{}", told(&w));
}

#[test]
fn another_host_in_the_way_for_the_same_reason_is_news() {
    let mut w = cluster_of(World::with(masters(&HOSTS, &HOSTS)));
    for standby in ["db2", "db3"] {
        w.host(standby).server.io = false;
    }
    w.run(10_000);
    w.kill_server("db1");
    w.run(10_000);
    let first = if times(&w, "db2 is not promoted") > 0 { "db2" } else { "db3" };
    let other = if first == "db2" { "db3" } else { "db2" };
    w.crash_host(first);
    w.run(100_000);
    let text = format!("{other} is not promoted");
    shows(&mut w, &text);
    assert_eq!(times(&w, &text), 1, "{}", told(&w));
}

#[test]
fn force_for_a_host_that_dies_is_not_for_the_next() {
    let mut w = cluster_of(World::with(masters(&HOSTS, &HOSTS)));
    w.host("db3").server.io = false;
    w.run(10_000);
    w.refuse_sql("db2");
    w.run(100);
    w.kill_server("db1");
    w.run(40_000);
    assert!(w.holders(WRITER).is_empty(), "{}", told(&w));
    w.command(move_writer("db2", true));
    w.run(1_000);
    w.kill_server("db2");
    w.run(60_000);
    assert!(w.holders(WRITER).is_empty(), "db3 lacks {}\n{}", w.lost_on("db3"), told(&w));
}

#[test]
fn force_for_one_host_is_not_for_the_one_that_drains_at_that_moment() {
    let mut w = cluster_of(World::with(masters(&["db1", "db2", "db3", "db4"], &HOSTS)));
    w.run(10_000);
    w.refuse_sql("db4");
    for standby in ["db2", "db3"] {
        w.host(standby).server.io = false;
    }
    w.run(500);
    w.kill_server("db1");
    let drains = |w: &World| ["db2", "db3"].map(|host| times(w, &format!("{host} applies everything")));
    let before = drains(&w);
    w.run_until(10_000, |w| drains(w) != before).expect("drains");
    let [to, other] = if drains(&w)[0] != before[0] { ["db2", "db3"] } else { ["db3", "db2"] };
    w.command(move_writer(other, true));
    w.run(60_000);
    assert_eq!(times(&w, &format!("{to} is promoted by the operator's --force")), 0, "{}", told(&w));
}

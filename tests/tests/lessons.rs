//! What went wrong in MMM 2.2 must not go wrong here: the list of its lessons, and which tests hold each of them.
//!
//! A test that holds a lesson says so in a comment directly above it (`lessons.md` and the number), a scenario in any of
//! its comments. The first test here reads all these marks. It fails when a lesson has none, and when a test that the list
//! names is gone or no longer marked. What a lesson still lacks is said in `missing` and must never be hidden by a mark.
//! Then follow the stories that had no better place.

use mmm_common::control::Command;
use mmm_common::ids::HostName;
use mmm_tests::stories::{HOSTS, cluster, cluster_of, move_writer, set_online, shows, times, told};
use mmm_tests::world::{Kills, WRITER, World, config};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

struct Lesson {
    number: u32,
    /// What MMM did, and what is wanted instead.
    words: &'static str,
    /// `file::test`, the file without `.rs` and with as much of its path as is needed, or a scenario.
    held_by: &'static [&'static str],
    missing: &'static str,
}

const fn lesson(number: u32, words: &'static str, held_by: &'static [&'static str]) -> Lesson {
    Lesson { number, words, held_by, missing: "" }
}

const fn in_part(number: u32, words: &'static str, held_by: &'static [&'static str], missing: &'static str) -> Lesson {
    Lesson { number, words, held_by, missing }
}

const LESSONS: &[Lesson] = &[
    // Safety.
    lesson(
        1,
        "An agent without its monitor kept its addresses and stayed writable for ever: what it has, it has by a lease.",
        &[
            "scenarios/isolated_writer.txt",
            "scenarios/isolated_writer_without_its_agent.txt",
            "tests/vouching::an_isolated_writer_has_no_address_after_its_lease_and_the_other_writes",
            "tests/vouching::without_the_monitor_a_writer_that_loses_its_only_granter_lets_go",
            "mmm-agent/core/src/tests::without_renewal_the_address_is_gone_before_the_lease_ends_and_then_the_server_is_closed",
            "netlink::an_address_leaves_by_the_kernels_hand",
            "mmm-agent/tests/daemon::a_role_nobody_renews_leaves_also_when_the_agent_was_killed",
        ],
    ),
    lesson(
        2,
        "The failover went on although the old host could not be fenced: nothing is given without a proof.",
        &[
            "lessons::a_fencing_that_fails_gives_the_role_to_nobody",
            "slot::a_silent_holder_is_waited_out_from_its_last_renewal",
            "slot::who_is_no_granter_can_never_wait_it_out",
            "cluster::an_isolated_host_loses_its_addresses_before_others_get_them",
            "attacks::a_kill_that_is_confirmed_after_the_agent_is_back_does_not_count",
        ],
    ),
    lesson(
        3,
        "A new master that had not synchronised answered OK and was opened later: a failed step is told, and waited for or \
         done elsewhere.",
        &[
            "lessons::a_target_that_does_not_catch_up_is_told_and_never_opened",
            "cluster::a_replica_that_does_not_apply_blocks_the_failover_with_a_reason",
            "attacks::a_new_master_that_cannot_be_opened_does_not_keep_the_role",
            "attacks_losses::a_third_master_takes_over_when_the_second_cannot_be_opened",
        ],
    ),
    lesson(
        4,
        "A read_only or a removal that failed was reported as done: what is there is read back.",
        &[
            "mmm-agent/core/src/tests::a_release_is_not_told_before_the_server_reads_back_as_closed",
            "mmm-agent/core/src/tests::a_failed_removal_is_never_told_as_done",
            "attacks::an_old_master_that_cannot_be_closed_does_not_take_the_address_from_the_new_one",
        ],
    ),
    lesson(
        5,
        "Replicas were pointed at a new master that had not applied its relay log: it drains first, and GTIDs say the rest.",
        &[
            "lessons::what_a_new_master_has_received_is_applied_before_it_opens",
            "losses::a_candidate_that_had_stopped_fetching_gets_the_rest_from_another_replica",
            "mysql/tests::drain_applies_what_was_received_with_the_sql_thread_stopped",
            "mysql/tests::what_cannot_be_applied_is_not_thrown_away",
            "mysql/tests::the_writer_moves_there_and_back",
        ],
    ),
    lesson(
        6,
        "Waiting for a position had no end, and a stopped SQL thread counted as in sync: a deadline, and a failure.",
        &[
            "lessons::a_target_that_applies_nothing_costs_move_timeout_and_the_old_master_writes_on",
            "losses::what_a_replica_has_received_and_cannot_apply_is_a_reason_to_hold",
            "mysql/tests::catching_up_fails_at_once_when_the_sql_thread_is_stopped",
            "mysql/tests::a_long_task_holds_nothing_up_and_a_new_one_ends_it",
        ],
    ),
    lesson(
        7,
        "A delayed old command was obeyed: orders have epochs and answer a report.",
        &[
            "accept::delayed_orders_of_lower_epochs_are_refused",
            "accept::an_order_to_a_report_older_than_the_ttl_or_of_another_life_is_refused_and_its_epoch_not_seen",
            "mmm-agent/core/src/tests::orders_of_another_life_and_overtaken_ones_are_not_obeyed",
            "agents/tests::an_order_from_before_the_connection_is_not_sent_on_it",
            "scenarios/agent_of_the_writer_stopped.txt",
        ],
    ),
    in_part(
        8,
        "Whoever reached the port could set roles: the channel is authenticated and encrypted.",
        &["config::plaintext_beyond_loopback", "monitor_link::forged_agents_are_refused_and_counted"],
        "There is no TLS yet. Until then a daemon listens beyond loopback only if insecure_plaintext says so, and one that \
         does believes whoever speaks the protocol; an agent is known by the address it comes from, and that is no proof.",
    ),
    lesson(
        9,
        "A restarted agent had forgotten its roles, and their addresses stayed: it reads the kernel and its own state.",
        &[
            "scenarios/agent_restarted_within_a_second.txt",
            "tests/vouching::an_agent_that_is_back_within_a_second_keeps_its_roles_also_without_a_monitor",
            "accept::an_inherited_order_is_good_only_while_the_kernel_keeps_the_address_and_never_after_a_reboot",
            "mmm-agent/tests/daemon::an_upgrade_and_a_reload_keep_the_role",
            "mmm-agent/tests/daemon::an_inherited_address_without_an_end_is_not_trusted",
        ],
    ),
    lesson(
        10,
        "A host that was down shortly came back ONLINE with rows that nobody else had: its data are compared first.",
        &[
            "states::nobody_comes_back_by_itself_with_rows_that_others_lack_or_before_that_is_known",
            "cluster::an_old_master_with_rows_that_nobody_else_has_stays_out_and_show_says_so",
            "attacks::a_host_with_rows_that_others_lack_does_not_stay_online",
            "losses::without_semi_sync_they_are_told_to_be_lost_and_nothing_is_done_before_that_is_accepted",
            "attacks_losses::a_host_whose_data_are_being_replaced_does_not_come_online_before_that_is_done",
        ],
    ),
    // Progress.
    lesson(
        11,
        "One hung agent stopped all monitoring and every command: nothing waits for one host.",
        &[
            "agents/tests::a_slow_reader_gets_the_newest_order_and_sending_never_waits",
            "agents/tests::an_agent_that_reads_nothing_is_closed",
            "agents/tests::who_says_nothing_is_closed_before_and_after_the_hello",
            "checks/tests::a_check_that_times_out_delays_neither_the_next_nor_another",
            "mmm-mon/src/control/tests::a_hundred_silent_visitors_hold_up_nobody",
            "lab_failover::show_answers_while_an_agent_and_a_host_hang",
        ],
    ),
    lesson(
        12,
        "A hung server hung its agent: every question to it has a deadline, and addresses do not wait for it.",
        &[
            "mysql/tests::a_stopped_server_is_hung_after_the_timeout_and_alive_when_it_goes_on",
            "runtime::removing_resets_the_clients_and_waits_for_no_server",
            "mmm-agent/core/src/tests::a_server_that_has_ended_or_hangs_is_fenced_by_its_address_and_told_at_once",
            "cluster::a_hung_server_is_failed_over_after_hang_timeout",
        ],
    ),
    lesson(
        13,
        "The replicas were moved one by one before the new master was opened: they follow it afterwards, all at once.",
        &["lessons::a_hanging_replica_holds_up_neither_the_move_nor_its_neighbours"],
    ),
    lesson(
        14,
        "A preferred master that lagged took the writer as soon as it was ONLINE: it catches up while the other one writes.",
        &["lessons::a_preferred_host_that_lags_catches_up_before_it_gets_the_writer"],
    ),
    in_part(
        15,
        "A server with too many connections was unknown for ever: a reserved login, a clear result, a decision that is set.",
        &[
            "watch::a_refusal_is_an_answer_and_never_life_or_death",
            "mysql/tests::a_saturated_server_is_alive_to_who_is_in_and_unknown_to_who_is_not",
            "checks/tests::too_many_connections_is_unknown_and_says_what_to_do",
        ],
        "The agent keeps logins from before, and may use the one place more that a full server has for CONNECTION ADMIN; \
         the result says what is the matter. But no option makes it a reason for a failover: a saturated master keeps the \
         role until an operator moves it.",
    ),
    lesson(
        16,
        "Idle connections made a planned move wait 10 s: they are closed at once, and transactions have a bounded grace.",
        &[
            "mysql/tests::idle_clients_cost_a_move_nothing_and_an_open_transaction_only_the_grace",
            "lab_failover::a_planned_move_loses_nothing_and_hangs_nobody",
        ],
    ),
    lesson(
        17,
        "A death was found after 13 to 22 s: what makes a decision possible is an event.",
        &[
            "cluster::a_killed_server_is_failed_over_in_well_under_a_second_and_comes_back",
            "cluster::a_dead_host_is_failed_over_when_its_lease_is_surely_over",
            "mysql/tests::a_killed_server_is_dead_at_once_and_alive_again_after_its_start",
            "lab_failover::a_killed_server_is_succeeded_and_comes_back",
        ],
    ),
    // Judgement.
    lesson(
        18,
        "One observer, who asked nobody else: no failover while a peer sees the master and vouches for it.",
        &[
            "scenarios/monitor_cut_from_the_writer_only.txt",
            "scenarios/monitor_dead_for_a_minute.txt",
            "tests/vouching::a_writer_that_only_the_monitor_cannot_reach_keeps_its_role_and_show_says_why",
            "attacks_losses::a_candidate_that_stopped_fetching_while_only_peers_saw_the_writer_is_not_promoted",
        ],
    ),
    lesson(
        19,
        "Old check results were believed: they go stale, and then they are unknown.",
        &[
            "facts::a_result_that_is_too_old_is_unknown_whatever_it_said",
            "lessons::an_old_failed_check_decides_nothing",
            "scenarios/monitor_stopped_and_late.txt",
            "feed::what_a_dropped_worker_had_queued_is_not_believed",
        ],
    ),
    lesson(
        20,
        "Flapping was counted per host and forgotten at a restart: it is counted for the role too, and saved.",
        &[
            "states::the_third_fall_within_flap_duration_is_flapping",
            "lessons::a_flapping_host_is_found_across_restarts_of_the_monitor",
            "lessons::servers_that_fail_in_turns_do_not_take_the_writer_to_and_fro_without_end",
            "states::who_loses_the_writer_three_times_within_flap_duration_is_flapping",
            "lessons::agents_that_die_in_turns_do_not_take_the_writer_to_and_fro_without_end",
            "lessons::a_preferred_host_that_comes_and_goes_is_not_followed_without_end",
            "attacks::a_preferred_host_that_comes_and_goes_does_not_take_the_writer_to_and_fro_without_end",
        ],
    ),
    lesson(
        21,
        "A saved status that did not fit ended in passive mode: the evidence is weighed.",
        &[
            "states::a_host_that_has_an_address_by_an_order_that_is_forgotten_goes_on",
            "tests/vouching::a_monitor_that_has_lost_its_disk_finds_the_writer_at_work_and_lets_it_go_on",
            "attacks::an_isolation_that_ends_is_not_told_as_a_conflict",
            "attacks::an_old_state_of_the_monitor_does_not_stop_the_cluster_for_good",
        ],
    ),
    in_part(
        22,
        "A dead agent on a living host was nobody's business: it is shown, and its roles move once the lease is over.",
        &[
            "scenarios/agent_of_the_writer_killed_for_good.txt",
            "tests/vouching::an_agent_that_is_killed_for_good_loses_its_roles_by_the_kernels_hand",
            "cluster::the_agent_of_the_writer_is_killed_for_good_and_the_role_moves",
        ],
        "It is in the log and in show; nothing sends an alert yet.",
    ),
    // Network.
    lesson(
        23,
        "Gratuitous ARP was sent once, within half a millisecond: in both forms, for IPv6 too, and up to 5 s later.",
        &[
            "arp::the_neighbour_hears_request_and_reply_at_once_and_repeated_up_to_five_seconds",
            "arp::the_neighbours_entry_moves_here",
            "arp::after_a_flap_of_the_link_it_is_said_again",
        ],
    ),
    lesson(
        24,
        "Addresses were looked for as pieces of text: they are values from netlink.",
        &["netlink::an_address_is_no_piece_of_text"],
    ),
    lesson(
        25,
        "Connections to an address that had gone hung: they are closed or reset while it is still there.",
        &[
            "sockets::clients_of_the_address_are_reset_and_nobody_else",
            "runtime::removing_resets_the_clients_and_waits_for_no_server",
            "turn_away::whoever_connects_after_the_release_is_refused_at_once_and_not_left_waiting",
            "lab_failover::a_planned_move_loses_nothing_and_hangs_nobody",
        ],
    ),
    // Habit.
    lesson(
        26,
        "mmm_control ended with 0 after an ERROR.",
        &["tests/control::every_verb_asks_for_what_it_says", "tests/control::without_a_monitor_every_verb_says_so"],
    ),
    lesson(
        27,
        "Mistakes in the configuration were told one at a time.",
        &["config::many_mistakes_in_several_files_at_once", "mmm-mon/tests/daemon::every_mistake_is_printed_at_once"],
    ),
    lesson(
        28,
        "Passwords could be read by everybody, in files and in logs.",
        &[
            "config::passwords_that_everybody_can_read",
            "config::debug_output_shows_no_password",
            "mysql/tests::a_wrong_login_for_replication_is_told_without_the_password",
        ],
    ),
    in_part(
        29,
        "Nobody could say afterwards why it had failed over, or why not: a decision not to act is a decision too.",
        &[
            "cluster::in_manual_mode_no_role_leaves_a_failed_host_until_an_operator_says_so",
            "cluster::without_a_network_failed_checks_are_ignored_and_leases_go_on",
        ],
        "Decisions and the reasons for not deciding are in the log and in show; nothing keeps them to be asked for later.",
    ),
];

// The list and the marks.

/// Which lessons a comment names: `lessons.md 1, 2, 7.` gives 1, 2 and 7.
fn numbers(comment: &str) -> Vec<u32> {
    let Some((_, rest)) = comment.split_once("lessons.md ") else { return Vec::new() };
    let mut found = Vec::new();
    for word in rest.split(", ") {
        let digits = word.find(|c: char| !c.is_ascii_digit()).unwrap_or(word.len());
        found.extend(word[..digits].parse::<u32>());
        if digits < word.len() {
            break;
        }
    }
    found
}

/// The test that this line of the file stands directly above, if it does: other comments and attributes may be between.
fn test_below(lines: &[&str], from: usize) -> Option<String> {
    let mut below = lines[from + 1..].iter().map(|l| l.trim());
    let (mut attribute, mut line) = (false, below.next()?);
    while line.starts_with("//") || line.starts_with("#[") {
        attribute |= line == "#[test]" || line.starts_with("#[tokio::test");
        line = below.next()?;
    }
    let name = line.trim_start_matches("async ").strip_prefix("fn ")?.split('(').next()?.to_owned();
    // Stories on real servers are made into tests by a list of their names.
    let listed = lines.iter().any(|l| l.trim() == format!("{name},"));
    (attribute || listed).then_some(name)
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of the project") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if path.is_dir() && !name.starts_with('.') && !name.starts_with("target") {
            files(&path, found);
        } else if name.ends_with(".rs") || (name.ends_with(".txt") && folder.ends_with("tests/scenarios")) {
            found.push(path);
        }
    }
}

/// All marks of the project: for each lesson the tests that name it, as `path/of/file::test`, and the scenarios.
fn marks() -> BTreeMap<u32, BTreeSet<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the project's folder");
    let mut found = Vec::new();
    files(root, &mut found);
    let mut marks: BTreeMap<u32, BTreeSet<String>> = BTreeMap::new();
    for path in found {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let place = path.strip_prefix(root).expect("below the root").display().to_string();
        for (i, line) in lines.iter().enumerate() {
            let holder = match place.strip_suffix(".rs") {
                Some(module) if line.trim().starts_with("// ") => {
                    test_below(&lines, i).map(|test| format!("{module}::{test}"))
                }
                None if line.starts_with('#') => Some(place.clone()),
                Some(_) | None => None,
            };
            for number in numbers(line) {
                marks.entry(number).or_default().extend(holder.clone());
            }
        }
    }
    marks
}

#[test]
fn every_lesson_is_held_by_a_test_that_names_it() {
    let marks = marks();
    let mut wrong = Vec::new();
    for (lesson, number) in LESSONS.iter().zip(1..) {
        assert_eq!(lesson.number, number, "the list is in order and complete");
        let held_by = marks.get(&number).cloned().unwrap_or_default();
        println!("{number}. {}", lesson.words);
        held_by.iter().for_each(|test| println!("     {test}"));
        if !lesson.missing.is_empty() {
            println!("     MISSING: {}", lesson.missing);
        }
        if held_by.is_empty() {
            wrong.push(format!("{number}: no test or scenario names it ({})", lesson.words));
        }
        for name in lesson.held_by {
            if !held_by.iter().any(|test| test == name || test.ends_with(&format!("/{name}"))) {
                wrong.push(format!("{number}: {name} is not there, or does not name it"));
            }
        }
    }
    assert_eq!(LESSONS.len(), 29);
    wrong.extend(marks.keys().filter(|n| !(1..=29).contains(*n)).map(|n| format!("there is no lesson {n}")));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_mark_counts_only_directly_above_a_test() {
    assert_eq!(numbers("// lessons.md 1, 2, 7."), [1, 2, 7]);
    assert_eq!(numbers("# roles move (safety.md). lessons.md 4: what failed, 5 times, is told"), [4]);
    assert_eq!(numbers("// lessons"), Vec::<u32>::new());
    let mark = "// the mark";
    let below = |lines: &[&str]| test_below(&[&[mark], lines].concat(), 0);
    assert_eq!(below(&["// R4", "#[test]", "fn it_holds() {"]), Some("it_holds".into()));
    assert_eq!(below(&["#[tokio::test]", "async fn it_holds() {"]), Some("it_holds".into()));
    assert_eq!(below(&["async fn it_holds(kind: &str) {", "    it_holds,"]), Some("it_holds".into()));
    assert_eq!(below(&["fn helps() {"]), None);
    assert_eq!(below(&["", "#[test]", "fn it_holds() {"]), None);
}

// The stories.

fn late_answer(w: &World) -> String {
    w.late_answer().map(|a| a.text(&|_| String::new())).unwrap_or_default()
}

/// Whom it replicates from.
fn follows(w: &World, host: &str) -> String {
    w.hosts[&HostName::from(host)].server.source.as_ref().map(ToString::to_string).unwrap_or_default()
}

// lessons.md 2: "there may be some duplicate ips now!", and the failover goes on.
#[test]
fn a_fencing_that_fails_gives_the_role_to_nobody() {
    let mut c = config(&HOSTS);
    c.kill_host_bin = Some("/bin/kill_host".into());
    let mut w = cluster_of(World::with(c));
    w.kills = Kills::Fail;
    // Given a writer whose orders do not end by themselves, because nobody else was there to take over.
    w.command(Command::SetOffline { host: "db2".into() });
    w.run(5_000);
    w.cut.insert("db1".into());
    w.run(5_000);
    set_online(&mut w, "db2");
    // When it cannot be killed either, however often it is tried.
    w.run(120_000);
    assert!(times(&w, "kill_host_bin failed, which proves nothing") >= 2, "{}", told(&w));
    // Then nobody else gets its address, and the reason is shown.
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert_eq!(times(&w, "The writer is given to db2"), 0, "{}", told(&w));
    shows(&mut w, "its last order does not end by itself");
}

// lessons.md 3: a failed synchronisation of the new master is told as failed, and does not open it.
#[test]
fn a_target_that_does_not_catch_up_is_told_and_never_opened() {
    let mut w = cluster();
    w.refuse_steps.insert(("db2".into(), "task"));
    w.command(move_writer("db2", false));
    w.run(20_000);
    let answer = late_answer(&w);
    assert!(answer.starts_with("ERROR") && answer.contains("db2 did not catch up"), "{answer}\n{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.writer_is_open() && w.host("db2").server.read_only, "{}", told(&w));
    assert_eq!(times(&w, "The writer is given to db2"), 0, "{}", told(&w));
}

// lessons.md 5: the new master has applied its whole relay log before it opens and before anybody follows it.
#[test]
fn what_a_new_master_has_received_is_applied_before_it_opens() {
    let mut w = cluster();
    w.host("db2").server.sql = false;
    w.run(400);
    w.kill_server("db1");
    assert!(w.lost_on("db2") > 0, "the story needs a relay log that is not applied");
    assert_eq!(follows(&w, "db3"), "db1");
    w.run_until(10_000, |w| w.holders(WRITER) == ["db2"]).expect("db2 takes it");
    assert_eq!(w.lost_on("db2"), 0, "{}", told(&w));
    w.run(5_000);
    assert_eq!(follows(&w, "db3"), "db2", "{}", told(&w));
    assert_eq!(w.lost_on("db3"), 0, "{}", told(&w));
}

// lessons.md 6: waiting for the position has an end, and what ended without it is a failure.
#[test]
fn a_target_that_applies_nothing_costs_move_timeout_and_the_old_master_writes_on() {
    let mut w = cluster();
    w.refuse_sql("db2");
    w.run(300);
    w.command(move_writer("db2", false));
    w.run(20_000);
    let answer = late_answer(&w);
    assert!(answer.starts_with("ERROR") && answer.contains("did not catch up"), "{answer}\n{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.writer_is_open(), "{}", told(&w));
    assert!((1_900..2_500).contains(&w.outage), "move_timeout is 2 s; {} ms\n{}", w.outage, told(&w));
}

// lessons.md 13: one broken replica holds up neither the writer nor the other replicas.
#[test]
fn a_hanging_replica_holds_up_neither_the_move_nor_its_neighbours() {
    for planned in [true, false] {
        let mut w = cluster_of(World::with(config(&["db1", "db2", "db3", "db4"])));
        w.host("db3").server.hung_since = Some(w.now);
        if planned {
            w.command(move_writer("db2", false));
        } else {
            w.kill_server("db1");
        }
        w.run_until(3_000, |w| w.writer_is_open() && w.holders(WRITER) == ["db2"]).expect("db2 opens");
        w.run(1_000);
        assert!(w.outage < if planned { 300 } else { 500 }, "{} ms\n{}", w.outage, told(&w));
        assert_eq!(follows(&w, "db4"), "db2", "{}", told(&w));
        assert_eq!(follows(&w, "db3"), "db1", "the story needs a replica that does not follow");
    }
}

// lessons.md 14: the writer goes to a preferred host only when that has caught up; until then the other one writes.
#[test]
fn a_preferred_host_that_lags_catches_up_before_it_gets_the_writer() {
    let mut c = config(&HOSTS);
    c.cluster.roles.get_mut(&"writer".into()).expect("the role").prefer = Some("db1".into());
    let mut w = cluster_of(World::with(c));
    w.command(Command::SetOffline { host: "db1".into() });
    w.run(5_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    w.host("db1").server.sql = false;
    w.run(5_000);
    w.outage = 0;
    set_online(&mut w, "db1");
    w.run(25_000);
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
    assert!(w.lost_on("db1") > 0, "the story needs a host that lags");
    assert!(w.outage < 100, "the writer was closed for nothing, {} ms\n{}", w.outage, told(&w));
    shows(&mut w, "its replication is not running");
    // When it has caught up, it gets the writer without a loss.
    w.host("db1").server.sql = true;
    w.run(70_000);
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert_eq!(w.lost_on("db1"), 0, "{}", told(&w));
    assert!(w.outage < 300, "{} ms\n{}", w.outage, told(&w));
}

// lessons.md 19: what was seen before the monitor stood still says nothing about now.
#[test]
fn an_old_failed_check_decides_nothing() {
    let mut w = cluster();
    // Given checks that failed, for less than trap_period.
    w.host("db1").server.hung_since = Some(w.now);
    w.run(1_500);
    // When the monitor stands still, and all is well long before it goes on.
    w.pause_monitor();
    w.host("db1").server.hung_since = None;
    w.run(15_000);
    w.outage = 0;
    w.resume_monitor();
    w.run(10_000);
    assert_eq!(times(&w, "HARD_OFFLINE"), 0, "{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db1"], "{}", told(&w));
    assert!(w.outage < 100, "{} ms\n{}", w.outage, told(&w));
}

// lessons.md 20: a restart of the monitor forgets no fall.
#[test]
fn a_flapping_host_is_found_across_restarts_of_the_monitor() {
    let mut w = cluster();
    for fall in 1..=3 {
        w.kill_server("db3");
        w.run(2_000);
        w.start_server("db3");
        w.run(10_000);
        let show = w.show();
        assert_eq!(show.contains("db3(10.0.0.13) slave/ONLINE"), fall < 3, "fall {fall}: {show}\n{}", told(&w));
        w.stop_monitor();
        w.run(500);
        w.start_monitor();
        w.run(5_000);
    }
    shows(&mut w, "db3(10.0.0.13) slave/AWAITING_RECOVERY");
}

// lessons.md 20: A to B to A to B comes to an end, however often the monitor was restarted meanwhile.
#[test]
fn servers_that_fail_in_turns_do_not_take_the_writer_to_and_fro_without_end() {
    let mut w = cluster();
    let limit = 2 * w.config.flap_count as usize;
    let before = times(&w, "The writer is given to");
    for _ in 0..5 {
        for host in ["db1", "db2"] {
            w.kill_server(host);
            w.run(5_000);
            w.start_server(host);
            w.run(10_000);
            w.stop_monitor();
            w.start_monitor();
            w.run(5_000);
        }
    }
    let given = times(&w, "The writer is given to") - before;
    assert!((3..=limit).contains(&given), "{given} times\n{}", told(&w));
    for host in ["db1(10.0.0.11)", "db2(10.0.0.12)"] {
        shows(&mut w, &format!("{host} master/AWAITING_RECOVERY"));
    }
}

// lessons.md 20: nor hosts that never fall: it is the role that is counted then.
#[test]
fn agents_that_die_in_turns_do_not_take_the_writer_to_and_fro_without_end() {
    let mut w = cluster();
    let limit = 2 * w.config.flap_count as usize;
    for _ in 0..5 {
        for host in ["db1", "db2"] {
            w.stop_agent(host);
            w.run(12_000);
            w.start_agent(&host.into());
            w.run(8_000);
            w.stop_monitor();
            w.start_monitor();
            w.run(5_000);
        }
    }
    let mut holders: Vec<&str> =
        w.story.iter().filter_map(|line| line.split("The writer is given to ").nth(1)).collect();
    holders.iter_mut().for_each(|words| *words = words.split(' ').next().unwrap_or_default());
    holders.dedup();
    assert!((3..=limit).contains(&holders.len()), "{holders:?}\n{}", told(&w));
    assert!(times(&w, "times within flap_duration. It waits for set_online") > 0, "{}", told(&w));
}

// lessons.md 20: moves to a preferred host are counted over restarts of the monitor too.
#[test]
fn a_preferred_host_that_comes_and_goes_is_not_followed_without_end() {
    let mut c = config(&HOSTS);
    c.flap_count = 3;
    if let Some(role) = c.cluster.roles.get_mut(&"writer".into()) {
        role.prefer = Some("db1".into());
    }
    let mut w = World::with(c);
    w.run(2_500);
    for host in HOSTS {
        set_online(&mut w, host);
        w.run(2_000);
    }
    for _ in 0..6 {
        w.command(Command::SetOffline { host: "db1".into() });
        w.run(5_000);
        set_online(&mut w, "db1");
        w.run(10_000);
        w.stop_monitor();
        w.start_monitor();
        w.run(5_000);
    }
    let back = times(&w, "The writer moves from db2 to db1: db1 is preferred and ONLINE");
    assert_eq!(back, 3, "{}", told(&w));
    assert_eq!(w.holders(WRITER), ["db2"], "{}", told(&w));
}

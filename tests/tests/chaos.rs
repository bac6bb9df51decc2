//! Stories by chance (src/chaos.rs), by seed: a few of each kind. `mmm-sim run` tells as many as there is time for, and
//! `mmm-sim tell` one of them again.

use mmm_tests::chaos::{Kind, tell};

/// So that all of them together take well under a minute in debug on two cores.
const SEEDS: u64 = 12;

/// Tells the stories of all seeds, also after a failing one: how many fail says more than the first.
fn all_hold(kind: Kind) {
    let mut failed = Vec::new();
    for seed in 1..=SEEDS {
        let told = tell(seed, kind);
        if let Some(what) = told.broken {
            failed.push((told.story.len(), format!("mmm-sim tell --kind {kind:?} --seed {seed}: {what}")));
        }
    }
    failed.sort();
    let lines: Vec<&str> = failed.iter().map(|(_, line)| line.as_str()).collect();
    assert!(lines.is_empty(), "{} of {SEEDS} stories failed; the shortest first:\n{}", lines.len(), lines.join("\n"));
}

#[test]
fn what_operators_ask_for_never_loses_a_write() {
    all_hold(Kind::Planned);
}

#[test]
fn one_fault_at_a_time_is_survived_and_healed() {
    all_hold(Kind::Single);
}

#[test]
fn cuts_and_pauses_never_break_safety_and_are_healed() {
    all_hold(Kind::Partition);
}

#[test]
fn many_faults_at_once_never_break_safety_and_are_healed() {
    all_hold(Kind::Storm);
}

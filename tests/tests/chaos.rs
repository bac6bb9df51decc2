//! Stories by chance (src/chaos.rs), by seed. `MMM_CHAOS_FIRST` and `MMM_CHAOS_SEEDS` choose others and more;
//! `MMM_CHAOS_DIR` is where the stories of all failing seeds are written.

use mmm_tests::chaos::{Kind, run};
use std::panic::catch_unwind;

/// So that all of them together take well under a minute in debug on two cores.
const SEEDS: u64 = 50;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| v.parse().expect("a number"))
}

/// Tells the stories of all seeds, also after a failing one: how many fail says more than the first.
fn tell(kind: Kind, test: &str) {
    let first = number("MMM_CHAOS_FIRST", 1);
    let mut failed: Vec<(u64, String)> = Vec::new();
    for seed in first..first + number("MMM_CHAOS_SEEDS", SEEDS) {
        let told = catch_unwind(|| run(seed, kind)).unwrap_or_else(|panic| {
            Err(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "PANIC, as told above".to_owned()))
        });
        let Err(story) = told else { continue };
        if let Ok(dir) = std::env::var("MMM_CHAOS_DIR") {
            std::fs::write(format!("{dir}/{kind:?}-{seed}.txt"), &story).expect("the story is written");
        }
        failed.push((seed, story));
    }
    for (seed, story) in &failed {
        println!("seed {seed}: {}", story.lines().next().unwrap_or_default());
    }
    let shortest = failed.iter().min_by_key(|(_, story)| story.len());
    if let Some((seed, story)) = shortest {
        panic!(
            "{} stories failed; the shortest is seed {seed}. To tell it again:\n\
             MMM_CHAOS_FIRST={seed} MMM_CHAOS_SEEDS=1 cargo test -p mmm-tests --test chaos {test}\n{story}",
            failed.len()
        );
    }
}

#[test]
fn what_operators_ask_for_never_loses_a_write() {
    tell(Kind::Planned, "what_operators_ask_for_never_loses_a_write");
}

#[test]
fn one_fault_at_a_time_is_survived_and_healed() {
    tell(Kind::Single, "one_fault_at_a_time_is_survived_and_healed");
}

#[test]
fn many_faults_at_once_never_break_safety_and_are_healed() {
    tell(Kind::Storm, "many_faults_at_once_never_break_safety_and_are_healed");
}

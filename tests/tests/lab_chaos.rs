//! A short chaos campaign on real servers; see `mmm-lab chaos` for long ones. MMM_LAB_CHAOS_MINUTES is how long faults
//! go on (1 unless it is set), MMM_LAB_CHAOS_SEED which ones (a new number each time unless it is set: it is printed,
//! with the command that does the same again).

use anyhow::{Context as _, Result, ensure};
use mmm_tests::lab::chaos::{Config, catch_two_writers, run};
use mmm_tests::lab::{Lab, LabConfig};
use std::time::{Duration, SystemTime};

fn number<T: std::str::FromStr>(variable: &str) -> Result<Option<T>> {
    let Ok(text) = std::env::var(variable) else { return Ok(None) };
    text.parse().ok().map(Some).with_context(|| format!("{variable}={text} is not a number"))
}

#[test]
fn whatever_happens_no_address_is_on_two_hosts_and_nothing_acknowledged_is_lost_without_an_excuse() -> Result<()> {
    let minutes: f64 = number("MMM_LAB_CHAOS_MINUTES")?.unwrap_or(1.0);
    let seed = match number("MMM_LAB_CHAOS_SEED")? {
        Some(seed) => seed,
        None => SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs(),
    };
    let verdict = run(&Config::new(seed, Duration::from_secs_f64(minutes * 60.0)))?;
    ensure!(verdict.looks > 1000 && verdict.acknowledged > 100, "too little was seen to say anything");
    ensure!(verdict.is_safe(), "NOT SAFE; the same again: {}", verdict.command);
    ensure!(verdict.is_good(), "safe, but not whole; the same again: {}", verdict.command);
    Ok(())
}

#[test]
fn two_writers_made_by_hand_are_seen_in_the_kernels_in_the_servers_and_on_the_wire() -> Result<()> {
    Lab::run(LabConfig { daemons: false, ..LabConfig::default() }, |lab| {
        let seen = catch_two_writers(lab, Duration::from_secs(1))?;
        println!("two writers for a second: {seen:?}");
        ensure!(seen.looks > 20 && seen.both_writable > 10 && seen.on_the_wire > 3, "{seen:?}");
        Ok(())
    })
}

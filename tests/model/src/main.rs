//! The model checker: every order of events within small bounds, against the real safety rules of both cores.
//!
//! `check` looks for two holders with every rule in force and compares the number of states with what was recorded;
//! `without` takes one rule away and must find two holders. `README.md` says what is covered and what is not.

mod bounds;
mod compact;
mod report;
mod rules;
mod tidy;
mod wake;
mod whole;

use anyhow::{Context, Result, bail, ensure};
use bounds::{Missed, Run};
use clap::{Parser, Subcommand};
use mmm_common::safeguard::{Safeguard, remove};
use report::Outcome;
use rules::{NEVER_TWO, Rules};
use stateright::{Checker, HasDiscoveries, Model};
use std::process::Command;
use std::time::{Duration, Instant};

#[derive(Parser)]
#[command(about = "Looks for two holders of one address in every order of events within small bounds")]
struct Arguments {
    #[command(subcommand)]
    what: What,
    /// End a run after so many seconds; a run that was cut short proves nothing and fails.
    #[arg(long, global = true, default_value_t = 3600)]
    seconds: u64,
    #[arg(long, global = true, default_value_t = 2)]
    threads: usize,
}

#[derive(Subcommand)]
enum What {
    /// With every rule in force: the named runs, or the standard ones, or `large`.
    Check {
        runs: Vec<String>,
        /// Print the state counts as they belong into tests/model/counts.txt, instead of comparing them.
        #[arg(long)]
        counts: bool,
    },
    /// Take one safeguard away: two holders must be found.
    Without { safeguard: String },
    /// The whole cores, with a few faults at any moments (layer B).
    Whole(whole::Bounds),
    /// The standard runs, and every safeguard taken away in turn, each in a process of its own.
    All,
    /// The names of the runs and of the safeguards.
    List,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let What::Whole(bounds) = &arguments.what {
        let rules = bounds.without.iter().map(|name| find(name)).collect::<Result<Vec<Safeguard>>>()?;
        return whole::run(bounds, &rules, arguments.seconds);
    }
    // One rule is not needed (safety.md, R6). Without it a longer lease allows all that a shorter one does, so that far
    // fewer states are enough; and what is safe without it is safe with it.
    remove(Safeguard::VouchNotWaiting);
    match &arguments.what {
        What::Check { runs, counts } => {
            for run in named(runs)? {
                check(&run, *counts, &arguments)?;
            }
            Ok(())
        }
        What::Without { safeguard } => without(find(safeguard)?, &arguments),
        What::Whole(_) | What::All => all(&arguments),
        What::List => {
            bounds::standard().iter().for_each(|run| println!("check {}", run.name));
            bounds::large().iter().for_each(|run| println!("check {} (large)", run.name));
            Safeguard::ALL.iter().for_each(|rule| println!("without {rule:?}"));
            Ok(())
        }
    }
}

fn named(names: &[String]) -> Result<Vec<Run>> {
    match names {
        [] => Ok(bounds::standard()),
        [one] if one == "large" => Ok(bounds::large()),
        names => {
            let mut known: Vec<Run> = bounds::standard();
            known.extend(bounds::large());
            let unknown = names.iter().find(|name| known.iter().all(|run| run.name != **name));
            ensure!(unknown.is_none(), "no run is called {unknown:?}: see `mmm-model list`");
            known.retain(|run| names.iter().any(|name| name == run.name));
            Ok(known)
        }
    }
}

fn find(name: &str) -> Result<Safeguard> {
    let known = Safeguard::ALL.into_iter().find(|rule| format!("{rule:?}") == name);
    known.with_context(|| format!("no safeguard is called {name}: see `mmm-model list`"))
}

fn check(run: &Run, only_count: bool, arguments: &Arguments) -> Result<()> {
    let outcome = explore(&run.rules, arguments);
    println!("{:20} {}", run.name, outcome.line());
    if let Some(path) = &outcome.two_holders {
        report::print(&run.rules, path);
        bail!("TWO HOLDERS with every rule in force, in the run {}: the trace is above", run.name);
    }
    ensure!(outcome.finished, "{} was cut short after {} s and proves nothing", run.name, arguments.seconds);
    let never = outcome.never_reached();
    ensure!(never.is_empty() || run.rules.epochs < 2, "{} no longer reaches: {}", run.name, never.join("; "));
    if only_count {
        println!("{} {}", run.name, outcome.states);
        return Ok(());
    }
    let recorded = include_str!("../counts.txt").lines().filter(|line| !line.starts_with('#'));
    let expected = recorded.filter_map(|line| line.split_once(' ')).find(|(name, _)| *name == run.name);
    match expected {
        Some((_, count)) if count.trim() == outcome.states.to_string() => Ok(()),
        Some((_, count)) => bail!(
            "{}: {} states, and {count} are recorded. If a rule or the model was changed on purpose, look whether the new number makes sense, and write it into tests/model/counts.txt (`mmm-model check {} --counts`)",
            run.name,
            outcome.states,
            run.name
        ),
        None => bail!("{}: no count is recorded in tests/model/counts.txt", run.name),
    }
}

fn without(rule: Safeguard, arguments: &Arguments) -> Result<()> {
    let (rules, missed) = bounds::without(rule);
    remove(rule);
    let outcome = explore(&rules, arguments);
    println!("without {rule:?}: {}", outcome.line());
    match (&outcome.two_holders, missed) {
        (Some(path), Missed::Yes) => {
            report::print(&rules, path);
            Ok(())
        }
        (Some(path), Missed::No) => {
            report::print(&rules, path);
            bail!("{rule:?} was thought not to be needed for safety, and it is: safety.md and bounds.rs have to say so")
        }
        (None, Missed::Yes) => {
            bail!("{rule:?} can be taken away and nothing is found: either it is dead, or the model is")
        }
        (None, Missed::No) => {
            ensure!(outcome.finished, "without {rule:?}: cut short after {} s", arguments.seconds);
            Ok(())
        }
    }
}

fn explore(rules: &Rules, arguments: &Arguments) -> Outcome {
    let begun = Instant::now();
    let limit = Duration::from_secs(arguments.seconds);
    let checker = rules
        .checker()
        .threads(arguments.threads)
        .timeout(limit)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    let took = begun.elapsed();
    let reached = checker.discoveries();
    Outcome {
        states: checker.unique_state_count(),
        steps: checker.max_depth(),
        took,
        finished: checker.is_done() && took < limit,
        two_holders: checker.discovery(NEVER_TWO),
        reached: reached.keys().copied().collect(),
    }
}

/// Safeguards are removed for a whole process: one process each.
fn all(arguments: &Arguments) -> Result<()> {
    let program = std::env::current_exe().context("this program's own path")?;
    let mut failed = Vec::new();
    let checks = bounds::standard().into_iter().map(|run| vec!["check".to_owned(), run.name.to_owned()]);
    let removals = Safeguard::ALL.into_iter().map(|rule| vec!["without".to_owned(), format!("{rule:?}")]);
    let whole = whole::STANDARD.into_iter().chain(whole::MISSED);
    let whole = whole.map(|line| line.split(' ').map(str::to_owned).collect());
    for what in checks.chain(removals).chain(whole) {
        let ended = Command::new(&program)
            .args(&what)
            .args(["--seconds", &arguments.seconds.to_string(), "--threads", &arguments.threads.to_string()])
            .status()
            .with_context(|| format!("starting {}", program.display()))?;
        if !ended.success() {
            failed.push(what.join(" "));
        }
    }
    ensure!(failed.is_empty(), "FAILED: {}", failed.join(", "));
    Ok(())
}

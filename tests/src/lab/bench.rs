//! The figures of the README: how long a writing client is held up by what can happen to its writer, on real servers.
//!
//! Every run has a cluster of its own, so that none starts from what the one before has left. What is lost is counted
//! by comparing tables. Times are the client's: from one acknowledged write to the next.

use super::client::ClientConfig;
use super::{Lab, LabConfig, wait_for};
use anyhow::{Result, bail};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(60);

/// What is done to the writer of a fresh cluster.
struct Work {
    name: &'static str,
    act: fn(&Lab, writer: &str) -> Result<()>,
}

const WORKS: [Work; 4] = [
    Work {
        name: "planned move (move_role)",
        act: |lab, writer| {
            let other = if writer == "db1" { "db2" } else { "db1" };
            lab.must_control(&["move_role", "writer", other]).map(drop)
        },
    },
    Work { name: "kill -9 of the server", act: |lab, writer| lab.kill_mysqld(writer) },
    Work { name: "SIGSTOP of the server (hang_timeout 3 s)", act: |lab, writer| lab.stop_mysqld(writer) },
    Work { name: "cable of the host out (lease_ttl 3 s)", act: |lab, writer| lab.link_down(writer) },
];

struct Figure {
    outage: Duration,
    lost: usize,
    acknowledged: usize,
}

/// Prints a table: `runs` clusters for every kind of trouble.
pub fn run(server: &str, runs: usize) -> Result<()> {
    if runs == 0 {
        bail!("--runs 0 measures nothing");
    }
    println!("  {:<42} {:>8} {:>8} {:>8}   lost writes", "write outage, seconds", "median", "min", "max");
    println!("  {}", "-".repeat(88));
    for work in &WORKS {
        let mut figures = Vec::with_capacity(runs);
        for _ in 0..runs {
            figures.push(once(server, work)?);
        }
        let mut outages: Vec<f64> = figures.iter().map(|f| f.outage.as_secs_f64()).collect();
        outages.sort_by(f64::total_cmp);
        let lost: usize = figures.iter().map(|f| f.lost).sum();
        let acknowledged: usize = figures.iter().map(|f| f.acknowledged).sum();
        println!(
            "  {:<42} {:>8.3} {:>8.3} {:>8.3}   {lost} of {acknowledged}",
            work.name,
            outages[runs / 2],
            outages[0],
            outages[runs - 1]
        );
    }
    println!("\n  {runs} runs each; a client writes a row every 20 ms and gives a call up after 0.5 s.");
    Ok(())
}

fn once(server: &str, work: &Work) -> Result<Figure> {
    let mut figure = None;
    let config = LabConfig { server: server.to_owned(), print_logs: false, ..LabConfig::default() };
    Lab::run(config, |lab| {
        lab.bring_online()?;
        lab.wait_serving(SOON)?;
        let client = lab.client(ClientConfig::default())?;
        wait_for("the client's first writes", SOON, || match client.journal().acknowledged().count() {
            50.. => Ok(()),
            n => bail!("{n} acknowledged"),
        })?;
        let before = lab.writer()?;
        let began = Instant::now();
        (work.act)(lab, before)?;
        let after = lab.wait_for(&format!("another writer than {before}"), SOON, || {
            let writer = lab.writer()?;
            if writer == before { bail!("{before} is still the writer") } else { Ok(writer) }
        })?;
        // Writes before the trouble was felt are acknowledged too: the one that counts comes from the new writer.
        let until = client.wait_write(Instant::now(), SOON)?;
        let journal = client.finish();
        let found = journal.verify(&lab.socket(after))?;
        figure = Some(Figure {
            outage: journal.outage(began, until).length(),
            lost: found.missing.len(),
            acknowledged: found.acknowledged,
        });
        Ok(())
    })?;
    figure.ok_or_else(|| anyhow::anyhow!("the run ended without a figure"))
}

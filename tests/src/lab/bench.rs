//! How long a writing client is held up by what can happen to its writer, on real servers; where that time went; and
//! what the daemons use while nothing happens. The figures of the README and of docs/benchmarks.md.
//!
//! Every run has a cluster of its own, so that none starts from what the one before has left. Times are the client's:
//! from one acknowledged write to the next. What is lost is counted by comparing tables.

mod phases;
mod resources;

use super::client::{Client, ClientConfig};
use super::configs::Extra;
use super::load::{Load, LoadConfig};
use super::network::{DB, READERS, WRITER};
use super::{Lab, LabConfig, wait_for};
use anyhow::{Context as _, Result, bail};
use phases::Phases;
use resources::Used;
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(60);
/// Steps of the client: a row this often, and a call is given up after the second.
const CLIENT: ClientConfig = ClientConfig { period: Duration::from_millis(20), limit: Duration::from_millis(200) };

/// What is measured, on a fresh cluster each time.
struct Work {
    key: &'static str,
    name: &'static str,
    common: &'static [&'static str],
    agent: &'static [&'static str],
    /// Done to the host named, which is the writer (or for a reader the replica).
    act: fn(&Lab, host: &str) -> Result<()>,
    /// A replica's reader addresses are waited for, and not another writer.
    reader: bool,
}

const PLAIN: Work = Work { key: "", name: "", common: &[], agent: &[], act: |_, _| Ok(()), reader: false };

const WORKS: [Work; 9] = [
    Work {
        key: "move",
        name: "planned move (move_role)",
        act: |lab, writer| {
            let other = if writer == "db1" { "db2" } else { "db1" };
            lab.must_control(&["move_role", "writer", other]).map(drop)
        },
        ..PLAIN
    },
    Work { key: "kill", name: "kill -9 of the writer's server", act: |lab, writer| lab.kill_mysqld(writer), ..PLAIN },
    Work { key: "stop", name: "SIGSTOP of it (hang_timeout 3 s)", act: |lab, writer| lab.stop_mysqld(writer), ..PLAIN },
    Work {
        key: "stop-500ms",
        name: "the same, hang_timeout 500 ms",
        common: &["hang_timeout = \"500ms\""],
        act: |lab, writer| lab.stop_mysqld(writer),
        ..PLAIN
    },
    Work {
        key: "cable",
        name: "cable of the writer's host out (lease_ttl 3 s)",
        act: |lab, writer| lab.link_down(writer),
        ..PLAIN
    },
    Work {
        key: "cable-1s",
        name: "the same, lease_ttl 1 s, heartbeat 200 ms",
        common: &["lease_ttl = \"1s\"", "heartbeat_interval = \"200ms\""],
        act: |lab, writer| lab.link_down(writer),
        ..PLAIN
    },
    Work {
        key: "cable-300ms",
        name: "the same, lease_ttl 300 ms, heartbeat 50 ms",
        common: &["lease_ttl = \"300ms\"", "heartbeat_interval = \"50ms\""],
        act: |lab, writer| lab.link_down(writer),
        ..PLAIN
    },
    Work {
        key: "cable-unguarded",
        name: "the same, lease_ttl 3 s, without the exact guard",
        agent: &["exact_guard = false"],
        act: |lab, writer| lab.link_down(writer),
        ..PLAIN
    },
    Work {
        key: "reader",
        name: "a replica's SQL thread fails: its reader address",
        act: |lab, replica| break_replication(lab, replica),
        reader: true,
        ..PLAIN
    },
];

/// One run.
#[derive(Clone, Debug, Serialize)]
struct Figure {
    seconds: f64,
    lost: usize,
    acknowledged: usize,
    phases: Phases,
}

/// All runs of one work. Times are in seconds.
#[derive(Clone, Debug, Serialize)]
struct Line {
    key: &'static str,
    name: &'static str,
    runs: usize,
    median: f64,
    p95: f64,
    max: f64,
    lost: usize,
    acknowledged: usize,
    /// Medians of the parts.
    phases: Phases,
    all: Vec<Figure>,
}

#[derive(Clone, Debug, Serialize)]
struct Measured {
    server: String,
    kernel: String,
    cores: usize,
    /// Rows a second that others wrote meanwhile.
    load: u32,
    lines: Vec<Line>,
    used: Vec<Used>,
}

/// Prints a table: `runs` clusters for every kind of trouble. `only`: of these keys, and `idle` for what the daemons use;
/// empty is all. `load`: rows a second that 24 other clients write meanwhile.
pub fn run(server: &str, runs: usize, only: &[String], load: u32, json: Option<&Path>) -> Result<()> {
    if runs == 0 {
        bail!("--runs 0 measures nothing");
    }
    let keys: Vec<&str> = WORKS.iter().map(|w| w.key).chain(["idle"]).collect();
    if let Some(unknown) = only.iter().find(|key| !keys.contains(&key.as_str())) {
        bail!("--only {unknown} is none of {}", keys.join(", "));
    }
    let wanted = |key: &str| only.is_empty() || only.iter().any(|k| k == key);
    println!("  {:<50} {:>8} {:>8} {:>8}   lost writes", "held up, seconds", "median", "p95", "max");
    println!("  {}", "-".repeat(94));
    let mut measured = Measured {
        server: super::server::Server::find(server)?.version,
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        load,
        lines: Vec::new(),
        used: Vec::new(),
    };
    for work in WORKS.iter().filter(|work| wanted(work.key)) {
        let figures = (0..runs).map(|_| once(server, work, load)).collect::<Result<Vec<_>>>()?;
        let line = Line::of(work, figures);
        println!(
            "  {:<50} {:>8.3} {:>8.3} {:>8.3}   {} of {}",
            line.name, line.median, line.p95, line.max, line.lost, line.acknowledged
        );
        if !work.reader {
            println!("      {}", line.phases);
        }
        measured.lines.push(line);
    }
    if wanted("idle") {
        measured.used = idle(server)?;
        println!("\n  {:<50} {:>10} {:>8} {:>9}", "while nothing happens, 3 hosts", "resident", "CPU", "programs");
        println!("  {}", "-".repeat(94));
        for used in &measured.used {
            println!(
                "  {:<50} {:>7.1} MB {:>7.2}% {:>9}",
                used.program, used.megabytes, used.cpu_percent, used.programs
            );
        }
    }
    println!(
        "\n  {runs} runs each on {} cores; a client writes a row every {} ms and gives a call up after {} ms{}.",
        measured.cores,
        CLIENT.period.as_millis(),
        CLIENT.limit.as_millis(),
        if load > 0 { format!("; others write {load} rows a second") } else { String::new() }
    );
    if let Some(file) = json {
        std::fs::write(file, serde_json::to_vec_pretty(&measured)?)
            .with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

impl Line {
    fn of(work: &Work, all: Vec<Figure>) -> Line {
        let mut seconds: Vec<f64> = all.iter().map(|f| f.seconds).collect();
        seconds.sort_by(f64::total_cmp);
        let at = |share: f64| seconds[((seconds.len() as f64 * share).ceil() as usize).clamp(1, seconds.len()) - 1];
        Line {
            key: work.key,
            name: work.name,
            runs: all.len(),
            median: at(0.5),
            p95: at(0.95),
            max: at(1.0),
            lost: all.iter().map(|f| f.lost).sum(),
            acknowledged: all.iter().map(|f| f.acknowledged).sum(),
            phases: Phases::median(all.iter().map(|f| &f.phases)),
            all,
        }
    }
}

fn lab_config(server: &str, work: &Work) -> LabConfig {
    let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect();
    let extra = Extra { common: lines(work.common), agent: lines(work.agent), ..Extra::default() };
    let log = phases::LOG.to_owned();
    LabConfig { server: server.to_owned(), extra, log, print_logs: false, ..LabConfig::default() }
}

fn once(server: &str, work: &Work, load: u32) -> Result<Figure> {
    let mut figure = None;
    Lab::run(lab_config(server, work), |lab| {
        lab.bring_online()?;
        lab.wait_serving(SOON)?;
        let others = match load {
            0 => None,
            rate => Some(lab.load(LoadConfig { rate, ..LoadConfig::default() })?),
        };
        others.as_ref().map_or(Ok(()), |others: &Load| others.wait_rows(u64::from(load), SOON))?;
        let client = lab.client(CLIENT)?;
        wait_for("the client's first writes", SOON, || match client.journal().acknowledged().count() {
            50.. => Ok(()),
            n => bail!("{n} acknowledged"),
        })?;
        figure = Some(if work.reader { reader_leaves(lab, work, client)? } else { writer_moves(lab, work, client)? });
        others.map_or(Ok(()), |others| others.finish().map(drop))
    })
    .with_context(|| format!("measure '{}'", work.key))?;
    figure.context("the run ended without a figure")
}

fn writer_moves(lab: &Lab, work: &Work, client: Client) -> Result<Figure> {
    let before = lab.writer()?;
    let (began, began_at) = (Instant::now(), phases::now());
    (work.act)(lab, before)?;
    let after = lab.wait_for(&format!("another writer than {before}"), SOON, || {
        let writer = lab.writer()?;
        if writer == before { bail!("{before} is still the writer") } else { Ok(writer) }
    })?;
    // Writes before the trouble was felt are acknowledged too: the one that counts comes from the new writer.
    let until = client.wait_write(Instant::now(), SOON)?;
    let journal = client.finish();
    let found = journal.verify(&lab.socket(after))?;
    let outage = journal.outage(began, until);
    let answered = outage.until.saturating_duration_since(began);
    Ok(Figure {
        seconds: outage.length().as_secs_f64(),
        lost: found.missing.len(),
        acknowledged: found.acknowledged,
        phases: Phases::read(lab, before, after, began_at, answered)?,
    })
}

fn reader_leaves(lab: &Lab, work: &Work, client: Client) -> Result<Figure> {
    let replica = "db3";
    let readers = lab.readers_of(replica)?;
    if readers.is_empty() {
        bail!("{replica} has none of {READERS:?}");
    }
    (work.act)(lab, replica)?;
    let began = Instant::now();
    while !lab.readers_of(replica)?.is_empty() {
        if began.elapsed() > SOON {
            bail!("{replica} has kept its reader addresses for {SOON:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let seconds = began.elapsed().as_secs_f64();
    let journal = client.finish();
    let found = journal.verify(&lab.socket(lab.only_holder(WRITER.into())?))?;
    Ok(Figure { seconds, lost: found.missing.len(), acknowledged: found.acknowledged, phases: Phases::default() })
}

/// A row goes into a table that the replica has lost; returns when its SQL thread has ended with the error.
fn break_replication(lab: &Lab, replica: &str) -> Result<()> {
    let writer = lab.writer()?;
    lab.mysql(writer, "CREATE TABLE app.broken (id INT PRIMARY KEY)")?;
    wait_for("the new table on the replica", SOON, || lab.mysql(replica, "SELECT COUNT(*) FROM app.broken").map(drop))?;
    lab.mysql_session(replica, &["SET SESSION sql_log_bin = 0", "DROP TABLE app.broken"])?;
    lab.mysql(writer, "INSERT INTO app.broken VALUES (1)")?;
    let began = Instant::now();
    while lab.replicates(replica).is_ok() {
        if began.elapsed() > SOON {
            bail!("the SQL thread of {replica} still runs");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// What the monitor and an agent use, over half a minute.
fn idle(server: &str) -> Result<Vec<Used>> {
    let mut used = Vec::new();
    Lab::run(lab_config(server, &PLAIN), |lab| {
        lab.bring_online()?;
        lab.wait_serving(SOON)?;
        let watched: Vec<(String, i32)> = lab
            .running()
            .into_iter()
            .filter(|(host, program, _)| *program == "mmm_mond" || (*program == "mmm_agentd" && *host == DB[0]))
            .filter_map(|(host, program, pid)| Some((format!("{program} ({host})"), pid?)))
            .collect();
        used = resources::over(Duration::from_secs(30), &watched)?;
        Ok(())
    })?;
    Ok(used)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_middle_and_the_worst_of_its_runs() {
        let figure =
            |ms: u32| Figure { seconds: f64::from(ms) / 1000.0, lost: 1, acknowledged: 10, phases: Phases::default() };
        let line = Line::of(&PLAIN, (1..=20).rev().map(figure).collect());
        assert_eq!((line.median, line.p95, line.max), (0.010, 0.019, 0.020));
        assert_eq!((line.runs, line.lost, line.acknowledged), (20, 20, 200));
        let one = Line::of(&PLAIN, vec![figure(7)]);
        assert_eq!((one.median, one.p95, one.max), (0.007, 0.007, 0.007));
    }
}

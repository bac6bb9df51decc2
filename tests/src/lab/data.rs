//! The proof that no acknowledged write is lost: the writer is moved, killed or cut off again and again while many
//! clients write, and after each time every row that a client was promised is looked for on every host that is ONLINE.
//!
//! A run never ends in a hang: every wait has a limit, and what was waited for in vain is written down as a surprise of
//! that run, with the logs of all daemons. The next run begins only in a cluster in which everything serves; when the
//! product does not get it there by itself, the lab is made anew, and the run says so.

mod proof;
mod summary;

pub use proof::{Proof, prove};
pub use summary::{RunLine, Summary};

use super::configs::Extra;
use super::load::{LoadConfig, LoadJournal};
use super::network::{DB, MONITOR};
use super::process;
use super::server::{Dialect, Sides};
use super::{Lab, LabConfig, wait_for};
use anyhow::{Context as _, Result, anyhow, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(60);
/// How long a killed server stays away, as under a service manager that starts it again.
const AWAY: Duration = Duration::from_secs(2);
/// How long the load goes on after the last thing has happened.
const AFTER: Duration = Duration::from_millis(1500);
/// How long an old master may take to be ONLINE again by itself.
const RETURN: Duration = Duration::from_secs(120);
/// A host that is shown with rows of its own for so long is not coming back by itself.
const EXTRA_FOR: Duration = Duration::from_secs(8);
/// Without semi-sync: how long before a crash the replicas stop getting anything, so that there is something to lose.
const HICCUP: Duration = Duration::from_millis(150);
/// How long semi-synchronous replication may take to be in effect.
const IN_EFFECT: Duration = Duration::from_secs(30);

/// What is done to the writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Work {
    /// `move_role` to the other master.
    Moves,
    /// `kill -9` of its server, which is started again two seconds later. Without semi-sync the replicas get nothing
    /// for a moment before: on a network this short hardly anything is under way when a server dies.
    Kills,
    /// Its cable is out until another host is the writer.
    Cuts,
}

impl Work {
    pub fn as_str(self) -> &'static str {
        match self {
            Work::Moves => "moves",
            Work::Kills => "kills",
            Work::Cuts => "cuts",
        }
    }
}

impl FromStr for Work {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        [Work::Moves, Work::Kills, Work::Cuts]
            .into_iter()
            .find(|w| w.as_str() == text)
            .with_context(|| format!("'{text}' is not one of moves, kills, cuts"))
    }
}

/// Who sees to semi-synchronous replication.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SemiSync {
    /// It is off, and what is lost is counted.
    Off,
    /// Both sides on in both masters' files.
    File,
    /// The lab turns the right sides on by SQL before each run.
    Lab,
    /// The product does; the lab only waits for it.
    Product,
}

impl SemiSync {
    pub fn as_str(self) -> &'static str {
        match self {
            SemiSync::Off => "off",
            SemiSync::File => "file",
            SemiSync::Lab => "lab",
            SemiSync::Product => "product",
        }
    }
}

impl FromStr for SemiSync {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        [SemiSync::Off, SemiSync::File, SemiSync::Lab, SemiSync::Product]
            .into_iter()
            .find(|s| s.as_str() == text)
            .with_context(|| format!("'{text}' is not one of off, file, lab, product"))
    }
}

#[derive(Clone, Debug)]
pub struct Config {
    pub server: String,
    pub work: Work,
    pub runs: usize,
    pub semisync: SemiSync,
    pub durable: bool,
    pub load: LoadConfig,
    /// How the moments of the faults are spread.
    pub seed: u64,
    pub extra: Extra,
    /// Logs of runs with a surprise, one folder each.
    pub dir: Option<PathBuf>,
}

impl Config {
    pub fn new(server: &str, work: Work, runs: usize) -> Config {
        Config {
            server: server.to_owned(),
            work,
            runs,
            semisync: SemiSync::File,
            durable: false,
            load: LoadConfig::default(),
            seed: 1,
            extra: Extra::default(),
            dir: None,
        }
    }

    fn lab(&self) -> LabConfig {
        let mut extra = self.extra.clone();
        // Many failovers within an hour are what is wanted here.
        if self.semisync == SemiSync::Off {
            extra.common.push("semisync = false".to_owned());
        }
        extra.monitor.extend(["flap_count = 100000".to_owned(), "flap_duration = \"1s\"".to_owned()]);
        LabConfig {
            server: self.server.clone(),
            semisync: self.semisync != SemiSync::Off,
            sides: if self.semisync == SemiSync::File { Sides::InFile } else { Sides::BySql },
            durable: self.durable,
            extra,
            log: std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned()),
            print_logs: false,
            ..LabConfig::default()
        }
    }

    /// The command that does the same again.
    fn command(&self) -> String {
        let durable = if self.durable { " --durable" } else { "" };
        let lines = [("common", &self.extra.common), ("monitor", &self.extra.monitor), ("agent", &self.extra.agent)];
        let lines: String =
            lines.iter().flat_map(|(to, all)| all.iter().map(move |line| format!(" --{to} '{line}'"))).collect();
        format!(
            "mmm-lab data --server {} --work {} --runs {} --semisync {} --rate {} --clients {} --seed {}{durable}{lines}",
            self.server,
            self.work.as_str(),
            self.runs,
            self.semisync.as_str(),
            self.load.rate,
            self.load.clients,
            self.seed
        )
    }
}

/// Does all runs, and prints a line for each and the summary. An error is one of the lab itself.
pub fn run(config: &Config) -> Result<Summary> {
    if config.runs == 0 {
        bail!("--runs 0 shows nothing");
    }
    println!("{}", config.command());
    let mut lines: Vec<RunLine> = Vec::with_capacity(config.runs);
    let mut version = String::new();
    println!("{}", RunLine::HEAD);
    while lines.len() < config.runs && !process::starts_are_forbidden() {
        Lab::run(config.lab(), |lab| {
            version.clone_from(&lab.server().version);
            lab.bring_online()?;
            while lines.len() < config.runs {
                let line = once(lab, config, lines.len() + 1)?;
                println!("{}", line.text());
                let whole = line.whole;
                lines.push(line);
                if !whole {
                    println!("       the cluster is not whole: the next run begins in a new one");
                    break;
                }
            }
            Ok(())
        })?;
    }
    let summary = Summary::of(config, version, lines);
    println!("\n{}", summary.text());
    Ok(summary)
}

fn other_master(host: &str) -> &'static str {
    if host == DB[0] { DB[1] } else { DB[0] }
}

/// One run in a lab that serves.
fn once(lab: &Lab, config: &Config, number: usize) -> Result<RunLine> {
    let mut line = RunLine::new(number);
    let old = lab.wait_serving(SOON)?;
    let new = other_master(old);
    line.writer = format!("{old}->{new}");
    if config.semisync == SemiSync::Lab {
        set_sides(lab, old)?;
    }
    if config.semisync != SemiSync::Off {
        match wait_for("semi-synchronous replication", IN_EFFECT, || in_effect(lab, old)) {
            Ok(()) => line.semisync = true,
            Err(e) => line.surprise(format!("no semi-sync before the fault: {e:#}")),
        }
    }
    let load = lab.load(config.load)?;
    load.wait_rows(u64::from(config.load.rate) / 4, SOON)?;
    let steady = Instant::now();
    // Another moment each time: between two commits, in the middle of a group of them.
    thread::sleep(Duration::from_millis(1500 + spread(config.seed, number) % 500));
    if line.semisync && in_effect(lab, old).is_err() {
        line.surprise("semi-sync was no longer in effect when the fault came".to_owned());
        line.semisync = false;
    }
    let fault = Instant::now();
    let happened = match config.work {
        Work::Moves => make_move(lab, new, &mut line),
        Work::Kills => kill(lab, old, config.semisync == SemiSync::Off, &mut line),
        Work::Cuts => cut(lab, old, &mut line),
    };
    if let Err(e) = happened {
        line.surprise(format!("{e:#}"));
    }
    // Whatever happened: whoever is the writer now must take rows.
    let opened = Instant::now();
    let written = load.wait_write(opened, SOON);
    let until = Instant::now();
    if let Err(e) = &written {
        line.surprise(format!("nobody can write: {e:#}"));
    }
    let mut extra: Option<Said> = None;
    if config.work != Work::Moves {
        extra = wait_return(lab, old, &mut line);
    }
    thread::sleep(AFTER);
    let journal = load.finish()?;
    line.rate = journal.rate(steady, fault);
    line.outage_s = journal.outage(fault, until).as_secs_f64();
    line.worst_client_s = journal.worst_client(fault, journal.ended).as_secs_f64();
    let kept_out = extra.is_some().then_some(old);
    match prove(lab, &journal, kept_out) {
        Ok(proof) => {
            if let (Some(said), Some(found)) = (&extra, proof.extra) {
                line.said_lost = Some(said.transactions);
                let acknowledged = found - proof.extra_unacknowledged;
                if said.transactions != found as u64 {
                    let said = said.transactions;
                    line.surprise(format!("{old}: the product says {said} lost, comparing tables finds {found}"));
                }
                if said.unacknowledged && acknowledged > 0 {
                    line.surprise(format!("{old}: the product calls {acknowledged} acknowledged rows unacknowledged"));
                }
            }
            line.take(&journal, &proof);
            // What is missing on one host now would be missing everywhere after the next run.
            line.whole &= line.differ.is_none();
            let lost = line.lost + line.lost_found;
            if config.semisync == SemiSync::Off && lost > 0 {
                match line.extra {
                    // What was acknowledged and is not there is all on the old master, and can be saved from it.
                    Some(extra) if extra - line.extra_unacknowledged == lost => {}
                    Some(_) | None => line.surprise(format!("{lost} acknowledged rows lost, and not all are kept")),
                }
            }
        }
        Err(e) => line.surprise(format!("cannot be proved: {e:#}")),
    }
    match lab.wait_serving(Duration::from_secs(20)).and_then(|_| all_online(lab)) {
        Ok(()) => {}
        Err(e) => {
            line.whole = false;
            if kept_out.is_none() {
                line.surprise(format!("not whole at the end of the run: {e:#}"));
            }
        }
    }
    if !line.whole || !line.surprises.is_empty() || !line.is_right(config.semisync) {
        let dir = config.dir.clone().unwrap_or_else(|| PathBuf::from(format!("/tmp/lab-data-{}", lab.id())));
        let dir = dir.join(format!("run-{number}"));
        keep(lab, &dir, &line, &journal)?;
        line.logs = Some(dir.display().to_string());
    }
    Ok(line)
}

/// The same seed gives the same moments.
fn spread(seed: u64, number: usize) -> u64 {
    let mixed = (seed ^ (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed >> 33
}

fn all_online(lab: &Lab) -> Result<()> {
    for host in DB {
        let state = lab.state_of(host)?;
        if state != "ONLINE" {
            bail!("{host} is {state}");
        }
    }
    Ok(())
}

// ---- what is done ------------------------------------------------------------------------------------------------

fn make_move(lab: &Lab, new: &str, line: &mut RunLine) -> Result<()> {
    let began = Instant::now();
    let answer = lab.control(&["move_role", "writer", new])?;
    line.answer_s = Some(began.elapsed().as_secs_f64());
    if !answer.ok() {
        let writer = lab.writer().map_or_else(|e| format!("{e:#}"), |w| format!("the writer is {w}"));
        bail!("move_role failed: {} ({writer})", answer.text.trim());
    }
    let writer = lab.writer()?;
    if writer != new {
        bail!("move_role answered `{}`, and the writer is {writer}", answer.text.trim());
    }
    Ok(())
}

fn kill(lab: &Lab, old: &str, hiccup: bool, line: &mut RunLine) -> Result<()> {
    if hiccup {
        let others = DB.into_iter().filter(|host| *host != old);
        lab.network().set_cuts(&others.map(|host| (old.to_owned(), host.to_owned())).collect())?;
        thread::sleep(HICCUP);
    }
    let began = Instant::now();
    let killed = lab.kill_mysqld(old);
    if hiccup {
        lab.heal_all()?;
    }
    killed?;
    thread::scope(|s| {
        let service = s.spawn(|| {
            thread::sleep(AWAY.saturating_sub(began.elapsed()));
            lab.start_mysqld(old)
        });
        let opened = wait_other_writer(lab, old);
        line.answer_s = Some(began.elapsed().as_secs_f64());
        service.join().map_err(|_| anyhow!("the thread that starts the server has panicked"))??;
        opened
    })
}

fn cut(lab: &Lab, old: &str, line: &mut RunLine) -> Result<()> {
    let began = Instant::now();
    lab.link_down(old)?;
    let opened = wait_other_writer(lab, old);
    line.answer_s = Some(began.elapsed().as_secs_f64());
    // The new writer is at work for a while before the old one is seen again.
    thread::sleep(Duration::from_secs(1));
    lab.link_up(old)?;
    opened
}

fn wait_other_writer(lab: &Lab, old: &str) -> Result<()> {
    lab.wait_for(&format!("another writer than {old}"), SOON, || {
        let writer = lab.writer()?;
        if writer == old { bail!("{old} is still the writer") } else { Ok(()) }
    })
}

/// What the product says of a host with transactions that the others lack.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    transactions: u64,
    unacknowledged: bool,
    /// Something is being done about it.
    under_way: bool,
}

/// Waits until the old master is ONLINE and replicates, without doing anything for it. Gives what the product says of
/// its own transactions, when they are why it stays out.
fn wait_return(lab: &Lab, old: &str, line: &mut RunLine) -> Option<Said> {
    let began = Instant::now();
    let silent = format!("agent on host {old} is not reachable");
    let mut shown_extra: Option<Instant> = None;
    let mut last = String::new();
    while began.elapsed() < RETURN {
        match lab.control(&["show"]) {
            Ok(shown) => {
                let text = shown.text;
                let state = super::state_in(&text, old).unwrap_or_default();
                let extra = extra_in(&text, old);
                if state == "ONLINE" && !text.contains(&silent) && lab.replicates(old).is_ok() {
                    line.back_s = Some(began.elapsed().as_secs_f64());
                    return None;
                }
                match extra {
                    Some(said) if said.under_way => shown_extra = None,
                    Some(said) if shown_extra.is_some_and(|at| at.elapsed() > EXTRA_FOR) => {
                        line.kept_out = Some(format!("{state}, {} extra", said.transactions));
                        return Some(said);
                    }
                    Some(_) => {
                        shown_extra.get_or_insert_with(Instant::now);
                    }
                    None => shown_extra = None,
                }
                last = format!("{old} is {state}");
            }
            Err(e) => last = format!("{e:#}"),
        }
        thread::sleep(Duration::from_millis(50));
    }
    let replication = lab.replicates(old).err().map_or_else(String::new, |e| format!("; {e:#}"));
    line.surprise(format!("not back ONLINE after {RETURN:?}: {last}{replication}\n{}", lab.shown()));
    None
}

/// From `Warning: host db1 has N transactions that the active master db2 lacks (unacknowledged: …)`, and the line that
/// says what is done about it.
fn extra_in(shown: &str, host: &str) -> Option<Said> {
    let start = format!("Warning: host {host} has ");
    let rest = shown.lines().find_map(|l| l.split_once(start.as_str()))?.1;
    let transactions = rest.split_whitespace().next()?.parse().ok()?;
    let under_way = shown.lines().any(|l| l.starts_with(&format!("# Host {host} is to ")));
    Some(Said { transactions, unacknowledged: rest.contains("(unacknowledged"), under_way })
}

// ---- semi-synchronous replication --------------------------------------------------------------------------------

/// The source side on at the writer, with at least one replica that acknowledges.
fn in_effect(lab: &Lab, writer: &str) -> Result<()> {
    let table = lab.mysql(writer, "SHOW GLOBAL STATUS LIKE 'Rpl_semi_sync_%'")?;
    let of = |names: [&str; 2]| {
        let row = table.rows.iter().find(|r| r.first().is_some_and(|n| names.contains(&n.as_deref().unwrap_or(""))));
        row.and_then(|r| r.get(1).cloned().flatten()).unwrap_or_default()
    };
    let status = of(["Rpl_semi_sync_master_status", "Rpl_semi_sync_source_status"]);
    let clients = of(["Rpl_semi_sync_master_clients", "Rpl_semi_sync_source_clients"]);
    if status != "ON" || clients == "0" || clients.is_empty() {
        bail!("{writer}: source status {status}, {clients} replicas");
    }
    Ok(())
}

/// What the product is to do at every move: the source side at the writer only, the replica side at both masters.
fn set_sides(lab: &Lab, writer: &str) -> Result<()> {
    let (source, replica, stop, start) = match lab.server().dialect {
        Dialect::MariaDb => (
            "rpl_semi_sync_master_enabled",
            "rpl_semi_sync_slave_enabled",
            "STOP SLAVE IO_THREAD",
            "START SLAVE IO_THREAD",
        ),
        Dialect::MySql => (
            "rpl_semi_sync_source_enabled",
            "rpl_semi_sync_replica_enabled",
            "STOP REPLICA IO_THREAD",
            "START REPLICA IO_THREAD",
        ),
    };
    for host in [DB[0], DB[1]] {
        let on = |variable: &str| -> Result<bool> {
            Ok(lab.mysql(host, &format!("SELECT @@global.{variable}"))?.value()? == "1")
        };
        if !on(replica)? {
            lab.mysql(host, &format!("SET GLOBAL {replica}=1"))?;
            // Only a thread that starts asks for it. The one that applies goes on, so nothing received is lost.
            lab.mysql(host, stop)?;
            lab.mysql(host, start)?;
        }
        if on(source)? != (host == writer) {
            lab.mysql(host, &format!("SET GLOBAL {source}={}", u8::from(host == writer)))?;
        }
    }
    Ok(())
}

// ---- evidence ----------------------------------------------------------------------------------------------------

/// Everything somebody needs who was not there.
fn keep(lab: &Lab, dir: &Path, line: &RunLine, journal: &LoadJournal) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let mut text = format!("{}\n{}\n", RunLine::HEAD, line.text());
    text.push_str(&format!("\nwhat the clients met: {:#?}\n", journal.troubles));
    text.push_str(&format!("\n{}\n", lab.shown()));
    for host in DB {
        let replication = lab.replication(host).map(|r| format!("{r:#?}")).unwrap_or_else(|e| format!("{e:#}"));
        let position = proof::position(lab, host).unwrap_or_else(|e| format!("{e:#}"));
        text.push_str(&format!("\n{host}: position {position}\nreplication {replication}\n"));
    }
    fs::write(dir.join("run.txt"), text)?;
    fs::write(dir.join("run.json"), serde_json::to_vec_pretty(line)?)?;
    for host in DB.into_iter().chain([MONITOR]) {
        for entry in fs::read_dir(lab.dir().join(host))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if [".log", ".toml", ".cnf", ".status"].iter().any(|end| name.ends_with(end)) {
                fs::copy(entry.path(), dir.join(format!("{host}.{name}")))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_product_says_of_extra_transactions_is_read_from_show() {
        let shown = "# Warning: host db1 has 12 transactions that the active master db2 lacks (lost, as …)\n\
                     # Warning: host db3 has 2 transactions that the active master db2 lacks (unacknowledged: no …)\n\
                     # Host db3 is to be copied anew from db2: 12 of 90 MB\n";
        let said = |host| extra_in(shown, host);
        assert_eq!(said("db1"), Some(Said { transactions: 12, unacknowledged: false, under_way: false }));
        assert_eq!(said("db3"), Some(Said { transactions: 2, unacknowledged: true, under_way: true }));
        assert_eq!(said("db2"), None);
        assert_eq!(extra_in("# Warning: agent on host db1 is not reachable\n", "db1"), None);
    }

    #[test]
    fn the_moments_differ_and_are_the_same_again() {
        let moments = |seed| (0..8).map(|n| spread(seed, n) % 500).collect::<Vec<_>>();
        assert_eq!(moments(7), moments(7));
        assert_ne!(moments(7), moments(8));
        let mut of_one = moments(7);
        of_one.sort();
        of_one.dedup();
        assert!(of_one.len() > 4, "{of_one:?}");
    }
}

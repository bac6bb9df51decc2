//! The chaos campaign: a lab in which faults drawn from a seed happen to real servers and the real daemons, while
//! clients write numbered rows and watchers look at kernels, servers and the wire. What it proves is in chaos/verdict.rs.
//!
//! It ends: every fault is healed after its time, every wait has a limit, and an operator (a thread of its own, see
//! chaos/operator.rs) sees to what waits for one, by the product's own commands. It never touches a host's state in any
//! other way while it looks at it.

mod holders;
mod operator;
mod plan;
mod verdict;
mod wire;

pub use holders::SemiSync;
pub use verdict::{FaultLine, Missing, Verdict};

use super::client::{Client, ClientConfig};
use super::configs::Extra;
use super::network::{APP, DB, GATEWAY, MONITOR};
use super::process;
use super::{Lab, LabConfig, wait_for};
use anyhow::{Context as _, Result, anyhow, bail};
use holders::ServerState;
use plan::{Blow, Fault, Place, Plan, Program, Round, Step, Who};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a cluster in which everything is whole again may take until everything serves.
const CONVERGE: Duration = Duration::from_secs(120);
/// How long the next faults are put off for a cluster that does not serve yet.
const SETTLE: Duration = Duration::from_secs(40);
const ROUND_TRIP: Duration = Duration::from_millis(500);

#[derive(Clone, Debug)]
pub struct Config {
    pub seed: u64,
    /// How long faults go on; the healing at the end comes on top.
    pub length: Duration,
    pub server: String,
    pub clients: usize,
    /// Where the timeline, the verdict and the logs go; None: a folder in /tmp, and only if something is wrong.
    pub dir: Option<PathBuf>,
    /// Lines for mmm_common.toml and the `[monitor]` section.
    pub extra: Extra,
}

impl Config {
    pub fn new(seed: u64, length: Duration) -> Config {
        let server = LabConfig::default().server;
        Config { seed, length, server, clients: 4, dir: None, extra: Extra::default() }
    }

    /// The command that does the same again.
    fn command(&self) -> String {
        let minutes = self.length.as_secs_f64() / 60.0;
        format!("mmm-lab chaos --seed {} --minutes {minutes} --server {}", self.seed, self.server)
    }
}

/// Prints what happens as it happens, then the verdict. An error is one of the lab itself.
pub fn run(config: &Config) -> Result<Verdict> {
    println!("seed {}; the same again: {}", config.seed, config.command());
    let mut verdict = None;
    let lab = LabConfig {
        server: config.server.clone(),
        extra: config.extra.clone(),
        log: std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned()),
        print_logs: false,
        ..LabConfig::default()
    };
    Lab::run(lab, |lab| {
        verdict = Some(campaign(lab, config)?);
        Ok(())
    })?;
    verdict.context("the campaign ended without a verdict")
}

/// What the watchers have seen of an address that was on two hosts.
#[derive(Clone, Copy, Debug)]
pub struct Caught {
    /// Looks into the kernels.
    pub looks: u64,
    /// Of these, with both servers writable.
    pub both_writable: u64,
    /// ARP rounds with two answers.
    pub on_the_wire: usize,
}

/// The check of the check: in a lab without daemons the writer address is put on two writable hosts by hand, and the
/// watchers of a campaign say what they see of it.
pub fn catch_two_writers(lab: &Lab, how_long: Duration) -> Result<Caught> {
    let field = &Field::new(lab);
    thread::scope(|s| {
        let ender = Ender(&field.stop);
        let look =
            s.spawn(move || holders::look(lab, &field.stop, &field.servers, &field.last_writer, &field.timeline));
        let probe = s.spawn(move || wire::probe(lab, &field.stop, &field.timeline));
        for (n, host) in DB.into_iter().enumerate() {
            s.spawn(move || holders::ask(lab, host, &field.stop, &field.servers[n], &field.timeline));
        }
        lab.make_writer_by_hand(DB[0])?;
        thread::sleep(how_long);
        lab.make_writer_by_hand(DB[1])?;
        thread::sleep(how_long);
        drop(ender);
        let looked = look.join().map_err(|_| anyhow!("the watcher of the kernels has panicked"))??;
        let heard = probe.join().map_err(|_| anyhow!("the watcher of the wire has panicked"))??;
        Ok(Caught {
            looks: looked.doubled.iter().map(|d| d.looks).sum(),
            both_writable: looked.doubled.iter().map(|d| d.all_writable).sum(),
            on_the_wire: heard.doubled.len(),
        })
    })
}

/// What happened, by time since the campaign began.
struct Timeline {
    began: Instant,
    lines: Mutex<Vec<(Instant, String)>>,
}

impl Timeline {
    fn new() -> Timeline {
        Timeline { began: Instant::now(), lines: Mutex::new(Vec::new()) }
    }

    fn note(&self, what: String) {
        self.note_at(Instant::now(), what);
    }

    fn note_at(&self, at: Instant, what: String) {
        lock(&self.lines).push((at, what));
    }

    /// The operator's and the faults' lines, and every alarm, are also printed.
    fn say(&self, what: String) {
        self.say_at(Instant::now(), what);
    }

    fn say_at(&self, at: Instant, what: String) {
        println!("  {} {what}", self.at(at));
        self.note_at(at, what);
    }

    fn at(&self, when: Instant) -> String {
        format!("{:>9.3}", when.saturating_duration_since(self.began).as_secs_f64())
    }

    fn text(&self) -> String {
        let mut lines = lock(&self.lines).clone();
        lines.sort_by_key(|(at, _)| *at);
        lines.into_iter().map(|(at, what)| format!("{} {what}\n", self.at(at))).collect()
    }
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One fault as it happened.
#[derive(Clone, Debug)]
struct Done {
    round: usize,
    /// With the hosts' names, e.g. `kill -9 server of writer (db1)`.
    what: String,
    kind: String,
    /// Hosts whose server or link was hit.
    hosts: BTreeSet<&'static str>,
    /// A server ended, and what it had received and not applied may be gone with it.
    ended_server: bool,
    /// The host that nobody of the cluster could reach meanwhile.
    alone: Option<&'static str>,
    began: Instant,
    healed: Instant,
    /// Why it was left out or what it answered.
    note: String,
    left_out: bool,
}

/// A host was brought in line with the active master, and what only it had was discarded.
#[derive(Clone, Debug)]
struct Anew {
    at: Instant,
    host: &'static str,
    /// The operator's command.
    how: String,
    /// Rows that were on it and not on the active master, by the clients' numbers.
    extra: BTreeSet<u64>,
}

/// Ends the threads of the campaign, also on the way out of a panic.
struct Ender<'a>(&'a AtomicBool);

impl Drop for Ender<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What all threads of a campaign share.
struct Field<'a> {
    lab: &'a Lab,
    timeline: Timeline,
    stop: AtomicBool,
    servers: [ServerState; 3],
    /// Index in [`DB`].
    last_writer: AtomicU8,
    /// Programs that a fault or the operator is busy with; nobody else touches them meanwhile.
    busy: Mutex<BTreeSet<(&'static str, &'static str)>>,
    /// How many faults ask for each cut.
    cuts: Mutex<BTreeMap<(&'static str, &'static str), usize>>,
    done: Mutex<Vec<Done>>,
    anew: Mutex<Vec<Anew>>,
    /// Programs that ended without being told to, and what else a daemon did wrong.
    wrongs: Mutex<Vec<String>>,
    /// The hosts' states, as `show` had them last.
    online: Mutex<BTreeMap<&'static str, String>>,
}

fn campaign(lab: &Lab, config: &Config) -> Result<Verdict> {
    lab.bring_online()?;
    let field = &Field::new(lab);
    let mut clients = Vec::new();
    for _ in 0..config.clients {
        clients.push(lab.client(ClientConfig { period: Duration::from_millis(40), ..ClientConfig::default() })?);
        // A client's numbers begin with the millisecond of its start.
        thread::sleep(Duration::from_millis(3));
    }
    wait_for("the clients' first writes", Duration::from_secs(30), || {
        let quiet = clients.iter().filter(|c| c.journal().acknowledged().count() < 10).count();
        if quiet == 0 { Ok(()) } else { bail!("{quiet} clients have less than ten acknowledged rows") }
    })?;
    let verdict = thread::scope(|s| -> Result<Verdict> {
        let ender = Ender(&field.stop);
        let look = s.spawn(move || {
            sooner();
            holders::look(lab, &field.stop, &field.servers, &field.last_writer, &field.timeline)
        });
        let probe = s.spawn(move || wire::probe(lab, &field.stop, &field.timeline));
        let mut ask = Vec::new();
        for (n, host) in DB.into_iter().enumerate() {
            let work = move || holders::ask(lab, host, &field.stop, &field.servers[n], &field.timeline);
            ask.push(s.spawn(work));
        }
        let operator = s.spawn(move || operator::operate(field, config.seed));
        let worked = make_trouble(field, config);
        let converged = converge(field);
        let mut journals = Vec::new();
        for client in clients {
            journals.push(Client::finish(client));
        }
        let compared = verdict::compare(lab, converged.as_ref().ok().copied());
        drop(ender);
        let joined = "a thread of the campaign has panicked";
        let looked = look.join().map_err(|_| anyhow!(joined))??;
        let heard = probe.join().map_err(|_| anyhow!(joined))??;
        let mut seen = Vec::new();
        for ask in ask {
            seen.push(ask.join().map_err(|_| anyhow!(joined))?);
        }
        operator.join().map_err(|_| anyhow!(joined))?;
        worked?;
        let all = verdict::Evidence { config, field, looked, heard, seen, journals, converged, compared };
        verdict::judge(&all)
    })?;
    println!("\n{}", verdict.text());
    let dir = match (&config.dir, verdict.is_good()) {
        (Some(dir), _) => Some(dir.clone()),
        (None, false) => Some(PathBuf::from(format!("/tmp/lab-chaos-{}-{}", config.seed, lab.id()))),
        (None, true) => None,
    };
    if let Some(dir) = dir {
        keep(lab, &dir, &field.timeline, &verdict)?;
        println!("timeline, verdict and logs: {}", dir.display());
    }
    Ok(verdict)
}

/// The thread that looks goes before the servers that it looks at: two cores are few for all of them.
fn sooner() {
    let mut renice = std::process::Command::new("renice");
    renice.args(["-n", "-15", "-p", &nix::unistd::gettid().to_string()]);
    // Without it the gaps between two looks are longer, and the verdict says how long.
    let _ = process::run(None, renice, Duration::from_secs(2));
}

/// Everything somebody needs who was not there.
fn keep(lab: &Lab, dir: &Path, timeline: &Timeline, verdict: &Verdict) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    fs::write(dir.join("timeline.txt"), timeline.text())?;
    fs::write(dir.join("verdict.txt"), verdict.text())?;
    fs::write(dir.join("verdict.json"), serde_json::to_vec_pretty(verdict)?)?;
    for host in DB.into_iter().chain([MONITOR]) {
        for entry in fs::read_dir(lab.dir().join(host))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if [".log", ".toml", ".cnf", ".state", ".status"].iter().any(|end| name.ends_with(end)) {
                fs::copy(entry.path(), dir.join(format!("{host}.{name}")))?;
            }
        }
    }
    Ok(())
}

// ---- faults ------------------------------------------------------------------------------------------------------

/// Round after round until the time is over; everything is healed when it returns.
fn make_trouble(field: &Field<'_>, config: &Config) -> Result<()> {
    let end = Instant::now() + config.length;
    for (number, round) in Plan::new(config.seed).enumerate() {
        if Instant::now() + round.calm >= end || process::starts_are_forbidden() {
            break;
        }
        thread::sleep(round.calm);
        play(field, number + 1, &round)?;
        if round.settle {
            let settled = wait_for("a cluster that serves", SETTLE, || field.serves());
            field.timeline.note(match settled {
                Ok(()) => "the cluster serves".to_owned(),
                Err(e) => format!("the cluster does not serve yet: {e:#}"),
            });
        }
    }
    Ok(())
}

fn play(field: &Field<'_>, number: usize, round: &Round) -> Result<()> {
    let began = Instant::now();
    thread::scope(|s| {
        let threads: Vec<_> = round
            .steps
            .iter()
            .map(|step| {
                s.spawn(move || {
                    thread::sleep((began + step.after).saturating_duration_since(Instant::now()));
                    let done = field.suffer(number, step);
                    lock(&field.done).push(done);
                })
            })
            .collect();
        for thread in threads {
            if thread.join().is_err() {
                bail!("a thread that makes faults has panicked");
            }
        }
        Ok(())
    })
}

impl<'a> Field<'a> {
    fn new(lab: &'a Lab) -> Field<'a> {
        Field {
            lab,
            timeline: Timeline::new(),
            stop: AtomicBool::new(false),
            servers: Default::default(),
            last_writer: AtomicU8::new(0),
            busy: Mutex::default(),
            cuts: Mutex::default(),
            done: Mutex::default(),
            anew: Mutex::default(),
            wrongs: Mutex::default(),
            online: Mutex::default(),
        }
    }

    fn host(&self, who: Who) -> &'static str {
        let writer = usize::from(self.last_writer.load(Ordering::Relaxed)).min(1);
        match who {
            Who::Writer => DB[writer],
            Who::Standby => DB[1 - writer],
            Who::Replica => DB[2],
        }
    }

    fn place(&self, place: Place) -> &'static str {
        match place {
            Place::Host(who) => self.host(who),
            Place::Monitor => MONITOR,
            Place::Gateway => GATEWAY,
        }
    }

    /// Host and program's name.
    fn program(&self, program: Program) -> (&'static str, &'static str) {
        match program {
            Program::Mysqld(who) => (self.host(who), "mysqld"),
            Program::Agent(who) => (self.host(who), "mmm_agentd"),
            Program::Helper(who) => (self.host(who), "mmm_helperd"),
            Program::Monitor => (MONITOR, "mmm_mond"),
        }
    }

    /// Lets one fault happen, waits, and heals it. Its targets get their names now.
    fn suffer(&self, round: usize, step: &Step) -> Done {
        let fault = step.fault;
        let began = Instant::now();
        let (targets, outcome) = match fault {
            Fault::Hit(blow, program) => {
                let (host, name) = self.program(program);
                (vec![host], self.hit(blow, fault, host, name, step.lasts))
            }
            Fault::Cut(from, to) => {
                let (from, to) = (self.place(from), self.place(to));
                (vec![from, to], self.cut_for(&[(from, to)], fault, step.lasts))
            }
            Fault::CutBoth(one, other) => {
                let (one, other) = (self.place(one), self.place(other));
                (vec![one, other], self.cut_for(&[(one, other), (other, one)], fault, step.lasts))
            }
            Fault::Isolate(who) => {
                let host = self.host(who);
                let others = DB.into_iter().chain([MONITOR]).filter(|h| *h != host);
                let cuts: Vec<_> = others.flat_map(|other| [(host, other), (other, host)]).collect();
                (vec![host], self.cut_for(&cuts, fault, step.lasts))
            }
            Fault::LinkDown(place) => {
                let host = self.place(place);
                (vec![host], self.unplug(fault, host, step.lasts))
            }
            Fault::Move => {
                let host = self.host(Who::Standby);
                self.timeline.say(format!("{fault} {host}"));
                let answer = self.lab.control(&["move_role", "writer", host]);
                (vec![host], answer.map(|a| a.text.lines().next().unwrap_or_default().to_owned()))
            }
            Fault::Offline(who) => {
                let host = self.host(who);
                (vec![host], self.set_offline(fault, host, step.lasts))
            }
        };
        let healed = Instant::now();
        let what = format!("{fault} ({})", targets.join(", "));
        let left_out = outcome.is_err();
        let note = outcome.unwrap_or_else(|e| format!("left out: {e:#}"));
        self.timeline.note(format!("round {round}: healed: {what} {note}"));
        let between_servers = targets.iter().all(|t| DB.contains(t));
        let (ended_server, touches_data) = match fault {
            Fault::Hit(Blow::Kill | Blow::Restart, Program::Mysqld(_)) => (true, true),
            Fault::Hit(_, program) => (false, matches!(program, Program::Mysqld(_))),
            Fault::Cut(..) | Fault::CutBoth(..) => (false, between_servers),
            Fault::Isolate(_) | Fault::LinkDown(_) => (false, true),
            Fault::Move | Fault::Offline(_) => (false, false),
        };
        let alone = match fault {
            Fault::Isolate(_) | Fault::LinkDown(Place::Host(_)) => targets.first().copied(),
            Fault::Hit(..) | Fault::Cut(..) | Fault::CutBoth(..) | Fault::LinkDown(_) => None,
            Fault::Move | Fault::Offline(_) => None,
        };
        let hosts = targets.into_iter().filter(|_| touches_data).collect();
        Done { round, what, kind: fault.to_string(), hosts, ended_server, alone, began, healed, note, left_out }
    }

    fn hit(&self, blow: Blow, fault: Fault, host: &'static str, name: &'static str, lasts: Duration) -> Result<String> {
        let _claim = self.claim(host, name)?;
        self.timeline.say(format!("{fault} ({host}) for {:.3} s", lasts.as_secs_f64()));
        let lab = self.lab;
        match blow {
            Blow::Kill => {
                lab.kill(host, name)?;
                thread::sleep(lasts);
                self.start(host, name)?;
            }
            Blow::Stop => {
                let running = lab.process(host, name)?;
                running.signal(nix::sys::signal::Signal::SIGSTOP)?;
                thread::sleep(lasts);
                running.signal(nix::sys::signal::Signal::SIGCONT)?;
            }
            Blow::Restart => {
                let began = Instant::now();
                if let Err(e) = lab.end(host, name) {
                    self.wrong(format!("{name} on {host} did not end by SIGTERM: {e:#}"));
                    lab.kill(host, name)?;
                }
                let took = began.elapsed();
                thread::sleep(lasts.saturating_sub(took));
                self.start(host, name)?;
                return Ok(format!("ended in {:.3} s", took.as_secs_f64()));
            }
        }
        Ok(String::new())
    }

    fn start(&self, host: &'static str, name: &str) -> Result<()> {
        let started = match name {
            "mysqld" => match self.lab.revive_mysqld(host) {
                Ok(true) => Ok(()),
                // The product has stopped it for a copy and starts it, or has started it already.
                Ok(false) => {
                    self.timeline.note(format!("{name} on {host} is not started: it is mmm_helperd's"));
                    Ok(())
                }
                Err(e) => Err(e),
            },
            "mmm_agentd" => self.lab.start_agent(host),
            "mmm_helperd" => self.lab.start_helper(host),
            _ => self.lab.start_monitor(),
        };
        if let Err(e) = &started {
            self.timeline.say(format!("{name} on {host} cannot be started: {e:#}"));
        }
        started
    }

    fn cut_for(&self, pairs: &[(&'static str, &'static str)], fault: Fault, lasts: Duration) -> Result<String> {
        let shown: Vec<String> = pairs.iter().map(|(a, b)| format!("{a}->{b}")).collect();
        self.timeline.say(format!("{fault} ({}) for {:.3} s", shown.join(" "), lasts.as_secs_f64()));
        self.change_cuts(pairs, true)?;
        thread::sleep(lasts);
        self.change_cuts(pairs, false)?;
        Ok(String::new())
    }

    /// All of them in one transaction of the kernel's; a cut that two faults ask for stays until both are over.
    fn change_cuts(&self, pairs: &[(&'static str, &'static str)], more: bool) -> Result<()> {
        let mut cuts = lock(&self.cuts);
        for pair in pairs {
            let count = cuts.entry(*pair).or_default();
            *count = if more { *count + 1 } else { count.saturating_sub(1) };
        }
        let wanted = cuts.iter().filter(|(_, n)| **n > 0).map(|((a, b), _)| ((*a).to_owned(), (*b).to_owned()));
        self.lab.network().set_cuts(&wanted.collect())
    }

    fn unplug(&self, fault: Fault, host: &'static str, lasts: Duration) -> Result<String> {
        let _claim = self.claim(host, "link")?;
        self.timeline.say(format!("{fault} ({host}) for {:.3} s", lasts.as_secs_f64()));
        self.lab.link_down(host)?;
        thread::sleep(lasts);
        self.lab.link_up(host)?;
        Ok(String::new())
    }

    fn set_offline(&self, fault: Fault, host: &'static str, lasts: Duration) -> Result<String> {
        let _claim = self.claim(host, "offline")?;
        self.timeline.say(format!("{fault} ({host}) for {:.3} s", lasts.as_secs_f64()));
        let answer = self.lab.control(&["set_offline", host])?;
        thread::sleep(lasts);
        // When this is refused, the operator goes on asking.
        let _ = self.lab.control(&["set_online", host])?;
        Ok(answer.text.lines().next().unwrap_or_default().to_owned())
    }

    /// Err: somebody is busy with it.
    fn claim(&self, host: &'static str, name: &'static str) -> Result<Claim<'_>> {
        if !lock(&self.busy).insert((host, name)) {
            bail!("something else happens to {name} of {host} now");
        }
        Ok(Claim { busy: &self.busy, what: (host, name) })
    }

    fn wrong(&self, what: String) {
        self.timeline.say(format!("WRONG: {what}"));
        lock(&self.wrongs).push(what);
    }

    /// One writer that can be written to, and every host ONLINE, as far as can be seen without asking anybody.
    fn serves(&self) -> Result<()> {
        for (host, state) in lock(&self.online).iter() {
            if state != "ONLINE" {
                bail!("{host} is {state}");
            }
        }
        self.lab.serving().map(drop)
    }
}

struct Claim<'a> {
    busy: &'a Mutex<BTreeSet<(&'static str, &'static str)>>,
    what: (&'static str, &'static str),
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        lock(self.busy).remove(&self.what);
    }
}

// ---- the end -----------------------------------------------------------------------------------------------------

/// Waits until everything serves with nothing broken; gives the writer.
fn converge(field: &Field<'_>) -> Result<&'static str> {
    lock(&field.cuts).clear();
    field.lab.heal_all()?;
    for host in DB.into_iter().chain([MONITOR, APP]) {
        field.lab.link_up(host)?;
    }
    field.timeline.say(format!("everything is healed; at most {} s until all serve", CONVERGE.as_secs()));
    let began = Instant::now();
    // A copy takes its time, and one that a fault has broken off is ordered again: the time counts from the last order,
    // three times at most.
    let mut last = None;
    while began.elapsed() < CONVERGE * 3 {
        let since = lock(&field.anew).iter().map(|a| a.at).max().map_or(began, |at| at.max(began));
        if since.elapsed() > CONVERGE || process::starts_are_forbidden() {
            break;
        }
        // What `show` said before the healing is no answer.
        let fresh = began.elapsed() > ROUND_TRIP * 4;
        match field.serves().and_then(|()| field.lab.serving()) {
            Ok(_) if !fresh => {}
            Ok(writer) => {
                field
                    .timeline
                    .say(format!("all serve after {:.1} s, the writer is {writer}", began.elapsed().as_secs_f64()));
                return Ok(writer);
            }
            Err(e) => last = Some(e),
        }
        thread::sleep(Duration::from_millis(200));
    }
    let last = last.map_or_else(String::new, |e| format!("{e:#}"));
    bail!(
        "not everything serves {:.0} s after the last fault was healed: {last}\n{}",
        began.elapsed().as_secs_f64(),
        field.lab.shown()
    )
}

//! `mmm_agentd`: holds addresses, read_only and replication of one database host to what the monitor ordered.
//!
//! This file starts and ends the process: configuration, logging, what must be there before anything is promised,
//! and signals. What it does while running is in [`runtime`]; what it decides is in the crate `mmm-agent-core`.
//!
//! Signals: SIGTERM and SIGINT let every role go and end; SIGUSR2 ends and leaves everything as it is (an upgrade: the
//! next process goes on with the leases that still run); SIGHUP reads the configuration again, and when it is good
//! and different the process replaces itself, keeping its roles.

mod alone;
mod arp;
mod clock;
mod disk;
mod examine;
mod guard;
mod jobs;
mod lines;
mod monitor_link;
mod mysql;
mod netlink;
mod peer_link;
mod peers;
mod probe;
mod runtime;
mod sockets;
#[cfg(test)]
mod testnet;
mod turn_away;
mod watchdog;

use alone::Alone;
use anyhow::{Context, bail};
use clap::Parser;
use guard::{Guard, Known};
use mmm_agent_core::Core;
use mmm_agent_core::io::{Saved, SavedAddress};
use mmm_common::config::parse::{self, Mistake};
use mmm_common::config::{Agent as Config, Cluster, Host};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::{SigSet, Signal as UnixSignal};
use runtime::{Ending, Inbox, Runtime, Signal};
use std::collections::BTreeSet;
use std::io::{IsTerminal, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// The agent of MMM: runs on each database host and does what the monitor orders.
#[derive(Parser)]
#[command(name = "mmm_agentd", version)]
struct Arguments {
    /// The configuration.
    #[arg(short, long, value_name = "FILE", default_value = "/etc/mysql-mmm/mmm_agent.toml")]
    config: PathBuf,
    /// Read the configuration, print every mistake in it, and exit with 0 (good) or 2.
    #[arg(long)]
    check_config: bool,
}

/// What other agents have said and is not handled yet; then their connections are simply not read any further.
const WAITING_OF_AGENTS: usize = 64;
/// Leases that do not outlast a page fault of a machine that swaps.
const SHORT_LEASE: Duration = Duration::from_secs(1);
/// The exit code for a configuration with mistakes.
const BAD_CONFIG: u8 = 2;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.check_config {
        return check_config(&arguments.config);
    }
    start_logging();
    let config = match parse::agent(&arguments.config) {
        Ok(config) => Arc::new(config),
        Err(mistakes) => {
            log_mistakes(&mistakes);
            return ExitCode::from(BAD_CONFIG);
        }
    };
    let span = tracing::info_span!("agent", host = %config.this);
    let _host = span.enter();
    match run(config, &arguments.config) {
        Ok(Ending::Stop | Ending::Kept) => {
            tracing::info!("ended");
            ExitCode::SUCCESS
        }
        Ok(Ending::Restart) => {
            // Returns only when it failed. The addresses stay until their kernel lifetimes end or a new start
            // goes on with them.
            let e = become_new_self();
            tracing::error!("could not start anew: {e:#}");
            ExitCode::FAILURE
        }
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn check_config(path: &Path) -> ExitCode {
    let mut stderr = std::io::stderr();
    // Nobody to tell when stderr is closed; the exit code says it too.
    match parse::agent(path) {
        Ok(config) => {
            let _ = writeln!(stderr, "OK: {} is good; this is host '{}'.", path.display(), config.this);
            ExitCode::SUCCESS
        }
        Err(mistakes) => {
            for mistake in mistakes {
                let _ = writeln!(stderr, "{mistake}");
            }
            ExitCode::from(BAD_CONFIG)
        }
    }
}

fn start_logging() {
    let (filter, bad) = match std::env::var("RUST_LOG") {
        Ok(text) => match text.parse() {
            Ok(filter) => (filter, None),
            Err(e) => (tracing_subscriber::EnvFilter::new("info"), Some(e)),
        },
        Err(_) => (tracing_subscriber::EnvFilter::new("info"), None),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        // Otherwise a log that cannot be written (a full disk) ends the process with a panic.
        .log_internal_errors(false)
        .init();
    if let Some(e) = bad {
        tracing::warn!("RUST_LOG is not understood ({e}); logging at info");
    }
}

fn log_mistakes(mistakes: &[Mistake]) {
    for mistake in mistakes {
        tracing::error!("{mistake}");
    }
}

fn run(config: Arc<Config>, path: &Path) -> anyhow::Result<Ending> {
    let host = config
        .cluster
        .hosts
        .get(&config.this)
        .with_context(|| format!("'this' is '{}', and there is no [host.{}]", config.this, config.this))?;
    check_capabilities()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting tokio")?;
    runtime.block_on(serve(&config, host, path))
}

async fn serve(config: &Arc<Config>, host: &Host, path: &Path) -> anyhow::Result<Ending> {
    // Before anything else: a signal during the start must not be lost, nor end the process by its default.
    let signals = listen_for_signals(config, path)?;
    let alone = Alone::make_sure()?;
    let addresses = netlink::Addresses::new(&host.cluster_interface);
    let link = addresses.link().await?;
    if !link.up {
        tracing::warn!("interface {} is down", host.cluster_interface);
    }
    if let Err(e) = sockets::can_destroy().await {
        tracing::warn!("{e}");
    }
    let (disk, saved) = disk::Disk::open(&config.state_path)?;
    let boot = clock::new_boot();
    let machine_boot = clock::machine_boot()?;

    let roles: BTreeSet<IpAddr> = config.cluster.addresses().into_keys().collect();
    if let Some(saved) = &saved {
        remove_endless(&addresses, saved).await?;
    }
    let mut marked = addresses.marked(&roles).await?;
    let held_back = guard::left().map_err(anyhow::Error::msg)?;
    // The tables hold back nothing but what an agent had, so they are a mark as well, on kernels that keep no other.
    marked.extend(addresses.present(held_back.as_ref().unwrap_or(&BTreeSet::new())).await?.intersection(&roles));
    let saved = with_marked(saved, marked);
    let start =
        Start { config, addresses: &addresses, roles: &roles, saved: saved.as_ref(), machine_boot: &machine_boot };
    let mut guard = start.put_up_guard(&alone, link.mac.is_some(), held_back).await?;
    if config.cluster.lease_ttl < SHORT_LEASE {
        lock_memory(config.cluster.lease_ttl);
    }
    GUARDED.get_or_init(|| guard.is_ok());
    let left = guard.as_ref().ok().map(|guard| guard.left().clone());
    let guard_changes = guard.as_mut().ok().and_then(Guard::watch);
    let (changes, kernel) = mpsc::unbounded_channel();
    netlink::watch(&host.cluster_interface, roles.clone(), changes)?;
    let (inputs, database) = mpsc::unbounded_channel();
    let prober = probe::Prober::new(addresses.clone(), inputs.clone());
    let (for_kill, kill_config) = (inputs.clone(), Arc::clone(config));
    let jobs = jobs::Jobs::new(Arc::clone(config), present(&addresses, &roles), inputs.clone());
    let server = mysql::Database::start(Arc::clone(config), inputs);
    let hosts = config.cluster.hosts.iter().map(|(name, host)| (name.clone(), host.ip)).collect();
    let monitor_gone_after = config.cluster.lease_ttl + Cluster::MARGIN;
    let (examiner, donor) =
        (examine::of(config, guard.as_ref().err().cloned()), jobs::Donor::new(jobs::Helper::of(config)));
    let myself = monitor_link::Myself { host: config.this.clone(), boot, hosts, monitor_gone_after, examiner, donor };
    let refusals = lines::Refusals::default();
    let (from_agents, agents) = mpsc::channel(WAITING_OF_AGENTS);
    let peers = peers::Peers::start(&config.this, &config.cluster, &refusals, &from_agents);
    let port = SocketAddr::new(host.ip, host.agent_port);
    let (link, monitor) = monitor_link::MonitorLink::start(port, myself, refusals, from_agents);

    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        boot = boot.0,
        "started; role addresses go on interface {}",
        host.cluster_interface
    );
    Runtime {
        core: Core::new(config, saved, boot, machine_boot, left, clock::now()),
        disk,
        roles,
        announcer: arp::Announcer::new(addresses.clone()),
        prober,
        refusing: Default::default(),
        addresses,
        guard: guard.ok(),
        link,
        peers,
        server: Box::new(move |step| server.queue(step)),
        jobs: Box::new(move |job| jobs.begin(job)),
        kill_server: Box::new(move || jobs::kill_server(&kill_config, for_kill.clone())),
        inbox: Inbox { signals, database, kernel, monitor, agents, guard: guard_changes },
        alarm: clock::Alarm::new().context("making a timer on CLOCK_BOOTTIME")?,
        systemd_watchdog: sd_notify::watchdog_enabled(),
        watchdog: watchdog::Watchdog::new(config.watchdog_device.clone()),
    }
    .run()
    .await
}

/// What is known when the agent starts.
struct Start<'a> {
    config: &'a Config,
    addresses: &'a netlink::Addresses,
    roles: &'a BTreeSet<IpAddr>,
    saved: Option<&'a Saved>,
    machine_boot: &'a str,
}

impl Start<'_> {
    /// The exact guard, or why there is none: it is not wanted, or does not work here. Without it addresses of a life that
    /// had it are given up: their leases are waited out for less time than the kernel takes to remove them.
    async fn put_up_guard(
        &self,
        alone: &Alone,
        has_ethernet: bool,
        held_back: Option<BTreeSet<IpAddr>>,
    ) -> anyhow::Result<Result<Guard, String>> {
        let why = if !self.config.exact_guard {
            "exact_guard is false".to_owned()
        } else if !has_ethernet {
            format!(
                "interface {} has no Ethernet addresses (6 bytes), by which it tells whose an ARP packet is",
                self.addresses.interface()
            )
        } else {
            match Guard::begin(alone, self.known().await?).await {
                Ok(guard) => {
                    let now = clock::now();
                    let left: Vec<String> = guard
                        .left()
                        .iter()
                        .map(|(ip, until)| format!("{ip}: {} ms", until.since(now).as_millis()))
                        .collect();
                    tracing::info!(
                        left = left.join(", "),
                        "the exact guard is up: role addresses answer until their leases end, and not longer"
                    );
                    return Ok(Ok(guard));
                }
                Err(why) => why,
            }
        };
        let lease = self.config.cluster.lease_ttl;
        if lease < Cluster::SHORTEST_UNGUARDED_TTL {
            bail!(
                "lease_ttl is {lease:?}, which needs the exact guard: {why}. Or make lease_ttl 3s or longer on all hosts"
            );
        }
        tracing::warn!("there is no exact guard, so a failover from a silent host waits 1.3 s longer: {why}");
        if self.saved.is_some_and(|s| s.guarded) || held_back.is_some() {
            let mut left: BTreeSet<IpAddr> = self.managed().chain(held_back.iter().flatten().copied()).collect();
            left.extend(self.addresses.marked(self.roles).await?);
            for ip in self.addresses.present(&left).await? {
                tracing::warn!(%ip, "role address was left by a process with the exact guard, and is given up without it");
                runtime::remove_with_connections(self.addresses, ip).await?;
            }
        }
        if guard::left().map_err(anyhow::Error::msg)?.is_some() {
            // With them role addresses would never answer.
            guard::clear_away(alone).map_err(anyhow::Error::msg)?;
        }
        Ok(Err(why))
    }

    /// What an order has spoken of, or an agent has left, also when it is in the configuration no more.
    fn managed(&self) -> impl Iterator<Item = IpAddr> {
        let saved = self.saved.iter().flat_map(|s| &s.addresses);
        saved.filter(|(_, slot)| slot.seen.0 > 0 || slot.forgotten).map(|(ip, _)| *ip)
    }

    async fn known(&self) -> anyhow::Result<Known> {
        // By these the core goes on as well, and by those of a life with the guard only as long as that lets them answer.
        let inherits = |s: &&Saved| !s.guarded && s.machine_boot == self.machine_boot;
        let slots = self.saved.filter(inherits).into_iter().flat_map(|s| &s.addresses);
        let held = slots.filter(|(_, slot)| slot.hold.is_some()).map(|(ip, _)| *ip).collect();
        let start = clock::now();
        let lifetimes = self.addresses.lifetimes(&held).await?;
        Ok(Known {
            roles: self.roles.clone(),
            managed: self.managed().collect(),
            unguarded: lifetimes.into_iter().map(|(ip, rest)| (ip, start + rest)).collect(),
        })
    }
}

/// A page that has to be read from a busy disk first costs more than a heartbeat. What is not used yet is locked when it
/// is used: the stacks of the threads are much larger than what they need.
fn lock_memory(lease_ttl: Duration) {
    let flags = MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE;
    if let Err(e) = mlockall(flags | MlockAllFlags::from_bits_retain(nix::libc::MCL_ONFAULT)) {
        tracing::warn!(
            "memory cannot be locked, so with lease_ttl = {lease_ttl:?} roles may be lost when this host needs its memory \
             elsewhere: {e}; give the unit CAP_IPC_LOCK or LimitMEMLOCK=infinity"
        );
    }
}

/// For jobs, which may only touch the data of a host that holds nothing.
fn present(addresses: &netlink::Addresses, roles: &BTreeSet<IpAddr>) -> jobs::Present {
    let (addresses, roles) = (addresses.clone(), roles.clone());
    Arc::new(move || {
        let (addresses, roles) = (addresses.clone(), roles.clone());
        Box::pin(async move {
            let present = addresses.present(&roles).await.map_err(|e| e.to_string())?;
            Ok(present.into_iter().collect())
        })
    })
}

/// Addresses that an agent has left here and of which nothing is remembered: its state file was lost.
fn with_marked(saved: Option<Saved>, marked: BTreeSet<IpAddr>) -> Option<Saved> {
    let known = saved.as_ref().map(|s| s.addresses.keys().copied().collect()).unwrap_or_default();
    let forgotten: Vec<IpAddr> = marked.difference(&known).copied().collect();
    if forgotten.is_empty() {
        return saved;
    }
    tracing::warn!(?forgotten, "role addresses were left here by an agent whose state is lost; they are given up");
    let mut saved = saved.unwrap_or_default();
    saved
        .addresses
        .extend(forgotten.into_iter().map(|ip| (ip, SavedAddress { forgotten: true, ..Default::default() })));
    Some(saved)
}

/// An agent that goes on after a restart with the orders of the process before it trusts that the kernel takes their
/// addresses away in time. One that somebody has configured by hand meanwhile would stay for ever.
async fn remove_endless(addresses: &netlink::Addresses, saved: &Saved) -> anyhow::Result<()> {
    let inherited = saved.addresses.iter().filter(|(_, slot)| slot.hold.is_some()).map(|(ip, _)| *ip).collect();
    for ip in addresses.endless(&inherited).await? {
        tracing::warn!(%ip, "role address was on this host without a lifetime, so not put there by an agent; removing it");
        runtime::remove_with_connections(addresses, ip).await?;
    }
    Ok(())
}

/// The kernel would refuse later, one step at a time, in the middle of a failover.
fn check_capabilities() -> anyhow::Result<()> {
    // linux/capability.h
    const NEEDED: [(u32, &str, &str); 2] =
        [(12, "CAP_NET_ADMIN", "to add and remove role addresses"), (13, "CAP_NET_RAW", "to announce them by ARP")];
    let status = std::fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let held = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .context("no line CapEff in /proc/self/status")?;
    let missing: Vec<String> = NEEDED
        .iter()
        .filter(|(bit, _, _)| held & (1 << bit) == 0)
        .map(|(_, name, why)| format!("{name} ({why})"))
        .collect();
    if !missing.is_empty() {
        bail!(
            "missing: {}; run as root, or with AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW in the systemd unit",
            missing.join(" and ")
        );
    }
    Ok(())
}

/// Turns signals into words for the loop.
fn listen_for_signals(config: &Arc<Config>, path: &Path) -> anyhow::Result<mpsc::UnboundedReceiver<Signal>> {
    let (to_loop, signals) = mpsc::unbounded_channel();
    let listen = |kind: SignalKind| signal(kind).context("listening for signals");
    let plain = [
        (listen(SignalKind::terminate())?, Signal::Leave),
        (listen(SignalKind::interrupt())?, Signal::Leave),
        (listen(SignalKind::user_defined2())?, Signal::Keep),
    ];
    for (mut stream, word) in plain {
        let to_loop = to_loop.clone();
        tokio::spawn(async move { while stream.recv().await.is_some() && to_loop.send(word).is_ok() {} });
    }
    let mut hangup = listen(SignalKind::hangup())?;
    let (config, path) = (Arc::clone(config), path.to_owned());
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            if is_good_and_different(&config, &path).await && to_loop.send(Signal::Restart).is_err() {
                return;
            }
        }
    });
    // Blocked by a process that became this one (below); those that came in between arrive now.
    ours().thread_unblock().context("unblocking signals")?;
    Ok(signals)
}

/// Whether this process has put up the exact guard; not known before it has tried.
static GUARDED: OnceLock<bool> = OnceLock::new();

/// On SIGHUP. A configuration with which the agent would not start is refused too.
async fn is_good_and_different(config: &Config, path: &Path) -> bool {
    let new = match parse::agent(path) {
        Ok(new) => new,
        Err(mistakes) => {
            log_mistakes(&mistakes);
            tracing::error!("SIGHUP: the configuration has {} mistakes; keeping the old one", mistakes.len());
            return false;
        }
    };
    if new == *config {
        tracing::info!("SIGHUP: the configuration has not changed");
        return false;
    }
    let Some(host) = new.cluster.hosts.get(&new.this) else {
        tracing::error!("SIGHUP: there is no [host.{}]; keeping the old configuration", new.this);
        return false;
    };
    let lease = new.cluster.lease_ttl;
    if GUARDED.get() == Some(&false) && lease < Cluster::SHORTEST_UNGUARDED_TTL {
        tracing::error!(
            "SIGHUP: keeping the old configuration: lease_ttl = {lease:?} needs the exact guard, and there is none here; \
             the log of this agent's start says why"
        );
        return false;
    }
    if let Err(e) = netlink::Addresses::new(&host.cluster_interface).link().await {
        tracing::error!("SIGHUP: keeping the old configuration: {e}");
        return false;
    }
    true
}

fn ours() -> SigSet {
    [UnixSignal::SIGTERM, UnixSignal::SIGINT, UnixSignal::SIGUSR2, UnixSignal::SIGHUP].into_iter().collect()
}

/// Replaces this process by a new one of the same program with the same arguments and the same pid. Descriptors are
/// closed by the kernel (all are opened so), the lock of the state file among them.
fn become_new_self() -> anyhow::Error {
    // The path, so that the process keeps its name; the open file itself when an upgrade has replaced that.
    let program = match std::env::current_exe() {
        Ok(path) if path.exists() => path,
        Ok(_) | Err(_) => PathBuf::from("/proc/self/exe"),
    };
    // Until the new one listens, a signal would end it by the default: it waits instead (the mask survives exec).
    if let Err(e) = ours().thread_block() {
        return anyhow::Error::new(e).context("blocking signals");
    }
    let mut arguments = std::env::args_os();
    let mut command = Command::new(&program);
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    anyhow::Error::new(command.args(arguments).exec()).context(format!("executing {}", program.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Set for the part of the test whose log cannot be written.
    const FULL: &str = "MMM_AGENT_TEST_FULL_LOG";

    #[test]
    fn a_log_that_cannot_be_written_ends_nothing() {
        if std::env::var_os(FULL).is_some() {
            start_logging();
            tracing::error!("nobody reads this");
            return;
        }
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        // Without --nocapture what goes to stderr would not get there.
        let logged = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "tests::a_log_that_cannot_be_written_ends_nothing"])
            .env(FULL, "1")
            .stderr(full)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&logged.stdout);
        assert!(logged.status.success() && said.contains("1 passed"), "{said}");
    }
}

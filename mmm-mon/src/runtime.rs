//! The loop: one input at a time into the core, then what the core wants done, in its order.
//!
//! Nothing here decides anything about roles. The loop waits for nobody: not for an agent, a check, an operator or a
//! kill script. It waits only for the disk, because what was decided must be saved before anything follows from it.

use crate::agents::Agents;
use crate::checks::Checkers;
use crate::doctor::Doctor;
use crate::feed::{Event, Feed, Inbox, Worker, feed};
use crate::status::Status;
use crate::systemd::Systemd;
use crate::{clock, control, identity, kill};
use anyhow::{Context, anyhow, bail};
use mmm_common::config::Monitor as Config;
use mmm_common::config::parse::{self, Mistake};
use mmm_common::control::Answer;
use mmm_common::epoch::Epoch;
use mmm_common::ids::HostName;
use mmm_mon_core::io::{Audit, Input, Level, Output, RequestId};
use mmm_mon_core::{Core, Snapshot};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::{oneshot, watch};
use tokio::time::sleep;
use tracing::{error, info, warn};

/// The least pause after a tick, so that a deadline that does not go away cannot keep out everything else.
const LEAST_PAUSE: Duration = Duration::from_millis(1);

/// What a loop is told from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// To read its configuration again.
    Reread,
    End,
}

/// The process's signals as words for its loops.
///
/// # Errors
/// They cannot be waited for.
pub(crate) fn signals() -> anyhow::Result<UnboundedReceiver<Told>> {
    let (words, told) = unbounded_channel();
    for (kind, name, word) in [
        (SignalKind::terminate(), "SIGTERM", Told::End),
        (SignalKind::interrupt(), "SIGINT", Told::End),
        (SignalKind::hangup(), "SIGHUP", Told::Reread),
    ] {
        let mut stream = signal(kind).with_context(|| format!("waiting for {name}"))?;
        let words = words.clone();
        tokio::spawn(async move { while stream.recv().await.is_some() && words.send(word).is_ok() {} });
    }
    Ok(told)
}

/// Runs the monitor of one cluster until it is told to end.
///
/// # Errors
/// What it needs at the start is not to be had, or the status could not be saved.
pub(crate) async fn run(
    path: &Path,
    config: Config,
    mut told: UnboundedReceiver<Told>,
    systemd: Systemd,
) -> anyhow::Result<()> {
    let (mut runtime, mut inbox) = Runtime::start(path, config, systemd).await?;
    let mut watchdog = systemd.watchdog();
    systemd.ready();
    let mut ticked = false;
    loop {
        let wait = runtime.until_tick();
        if wait.is_zero() && !ticked {
            runtime.input(Input::Tick).await?;
            ticked = true;
            continue;
        }
        tokio::select! {
            biased;
            word = told.recv() => match word {
                Some(Told::Reread) => reread(path.to_owned(), runtime.feed.clone(), systemd),
                Some(Told::End) | None => break,
            },
            _ = watchdog.due() => watchdog.alive(),
            event = inbox.next() => {
                let Some(event) = event else { bail!("the queue of inputs has closed") };
                runtime.event(event).await?;
                ticked = false;
            }
            () = sleep(wait.max(LEAST_PAUSE)) => ticked = false,
        }
    }
    systemd.stopping();
    info!("ending; everything is saved, and the agents keep their roles for as long as their leases and peers allow");
    Ok(())
}

struct Runtime {
    core: Core,
    config: Config,
    /// The same, for what goes on beside the core.
    shared: watch::Sender<Arc<Config>>,
    doctor: Doctor,
    feed: Feed,
    checkers: Checkers,
    agents: Agents,
    /// Only away while a save is going on in another thread.
    status: Option<Status>,
    replies: BTreeMap<RequestId, oneshot::Sender<Answer>>,
    requests: u64,
    control: Worker,
    systemd: Systemd,
}

impl Runtime {
    async fn start(path: &Path, config: Config, systemd: Systemd) -> anyhow::Result<(Self, Inbox)> {
        let (status, saved) = Status::open::<Snapshot>(&config.status_path)?;
        let identity = identity::read_or_make(&config.status_path)?;
        let (feed, inbox) = feed();
        let checkers = Checkers::new(feed.clone());
        checkers.prepare(&config)?;
        let listener = control::listen(SocketAddr::new(config.ip, config.port)).await?;
        info!(
            version = env!("CARGO_PKG_VERSION"),
            config = %path.display(),
            hosts = config.cluster.hosts.len(),
            identity = %format_args!("{identity:016x}"),
            "mmm_mond starts; mmm_control is answered at {}:{}, {}",
            config.ip,
            config.port,
            match &saved {
                Some((_, age)) => format!("the saved status is {} s old", age.as_secs()),
                None => format!("there is no saved status in {}", config.status_path.display()),
            }
        );
        let (shared, for_doctor) = watch::channel(Arc::new(config.clone()));
        let doctor = Doctor::new(for_doctor, identity);
        let core = Core::new(config.clone(), saved, clock::unix_ms() / 1000, clock::now());
        let mut runtime = Runtime {
            core,
            agents: Agents::new(feed.clone(), identity),
            checkers,
            control: serve(listener, &feed, &doctor),
            doctor,
            shared,
            feed,
            config,
            status: Some(status),
            replies: BTreeMap::new(),
            requests: 0,
            systemd,
        };
        runtime.checkers.arrange(&runtime.config);
        runtime.agents.arrange(&runtime.config);
        Ok((runtime, inbox))
    }

    fn until_tick(&self) -> Duration {
        /// Looked at again at least so often, because a timer does not count the time of a suspend, as the clock does.
        const LOOK_AGAIN: Duration = Duration::from_secs(1);
        self.core.next_deadline().map_or(LOOK_AGAIN, |(due, _)| due.since(clock::now()).min(LOOK_AGAIN))
    }

    async fn event(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Core(input) => self.input(input).await,
            Event::Command { command, who, reply } => {
                self.replies.retain(|_, waiting| !waiting.is_closed());
                self.requests += 1;
                let id = RequestId(self.requests);
                self.replies.insert(id, reply);
                self.input(Input::Command { id, command, who }).await
            }
            Event::Reread(Ok(config)) => self.reload(*config).await,
            Event::Reread(Err(mistakes)) => {
                log_mistakes(&mistakes);
                error!("the new configuration is refused; the old one goes on");
                self.systemd.ready();
                Ok(())
            }
        }
    }

    async fn reload(&mut self, config: Config) -> anyhow::Result<()> {
        match self.prepare(&config).await {
            Err(e) => error!("the new configuration is refused; the old one goes on: {e:#}"),
            Ok(listener) => {
                if let Some(listener) = listener {
                    self.control = serve(listener, &self.feed, &self.doctor);
                }
                self.config = config;
                self.shared.send_replace(Arc::new(self.config.clone()));
                self.input(Input::Reload(Box::new(self.config.clone()))).await?;
                self.checkers.arrange(&self.config);
                for down in self.agents.arrange(&self.config) {
                    self.input(down).await?;
                }
                info!("the configuration has been read again");
            }
        }
        self.systemd.ready();
        Ok(())
    }

    /// Everything about a new configuration that can fail, before anything is changed.
    async fn prepare(&self, new: &Config) -> anyhow::Result<Option<TcpListener>> {
        if new.status_path != self.config.status_path {
            bail!(
                "monitor.status_path was {} and is now {}: restart mmm_mond for that, after moving the file",
                self.config.status_path.display(),
                new.status_path.display()
            );
        }
        self.checkers.prepare(new)?;
        if (new.ip, new.port) == (self.config.ip, self.config.port) {
            return Ok(None);
        }
        Ok(Some(control::listen(SocketAddr::new(new.ip, new.port)).await?))
    }

    async fn input(&mut self, input: Input) -> anyhow::Result<()> {
        let mut outputs = Vec::new();
        self.core.handle(clock::now(), input, &mut outputs);
        for output in outputs {
            self.carry_out(output).await?;
        }
        Ok(())
    }

    async fn carry_out(&mut self, output: Output) -> anyhow::Result<()> {
        match output {
            Output::Persist(snapshot) => self.save(snapshot).await?,
            Output::Send { host, order } => self.agents.send(&host, *order),
            Output::Kill { host, asked, ping_ok } => self.kill(host, asked, ping_ok),
            Output::Reply { id, answer } => {
                if let Some(reply) = self.replies.remove(&id) {
                    // Whoever asked may have gone in the meantime.
                    let _ = reply.send(answer);
                }
            }
            Output::Audit(audit) => log(&audit),
        }
        Ok(())
    }

    /// In another thread, so that the checks' own deadlines go on meanwhile; the loop waits for it.
    async fn save(&mut self, snapshot: Box<Snapshot>) -> anyhow::Result<()> {
        let mut status = self.status.take().ok_or_else(|| anyhow!("the status file is already being saved"))?;
        let saving = tokio::task::spawn_blocking(move || status.save(&*snapshot).map(|()| status));
        self.status = Some(saving.await.context("the thread that saves the status has ended")??);
        Ok(())
    }

    fn kill(&self, host: HostName, asked: Epoch, ping_ok: bool) {
        let (bin, feed) = (self.config.kill_host_bin.clone(), self.feed.clone());
        tokio::spawn(async move {
            let result = match bin {
                Some(bin) => kill::run(&bin, &host, ping_ok, kill::DEADLINE).await,
                None => Err("kill_host_bin is not configured".to_owned()),
            };
            feed.input(Input::Killed { host, asked, result }).await;
        });
    }
}

fn serve(listener: TcpListener, feed: &Feed, doctor: &Doctor) -> Worker {
    feed.worker(|feed| control::serve(listener, feed, doctor.clone()))
}

/// Reads the configuration in another thread: a file system that does not answer holds up nothing.
fn reread(path: PathBuf, feed: Feed, systemd: Systemd) {
    info!("SIGHUP: reading {} again", path.display());
    systemd.reloading();
    tokio::spawn(async move {
        let read = tokio::task::spawn_blocking(move || parse::monitor(&path)).await;
        if let Ok(result) = read {
            feed.send(Event::Reread(result.map(Box::new))).await;
        }
    });
}

pub(crate) fn log_mistakes(mistakes: &[Mistake]) {
    for mistake in mistakes {
        error!("{mistake}");
    }
}

fn log(audit: &Audit) {
    let host = audit.host.as_ref().map(tracing::field::display);
    let epoch = audit.epoch.map(|e| e.0);
    match audit.level {
        Level::Info => info!(host, epoch, "{}", audit.text),
        Level::Warn => warn!(host, epoch, "{}", audit.text),
        Level::Error => error!(host, epoch, "{}", audit.text),
    }
}

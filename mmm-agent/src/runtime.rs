//! The loop around the core: one input at a time goes in, and what comes out is carried out in order.
//!
//! Order of importance: a deadline that has come is handled before any waiting input, and nothing here waits for the
//! database or for another machine. Address steps are done at once; server steps go to a worker's queue, and its
//! results come back as inputs. What cannot be saved is never acted on: the process ends instead.

use crate::arp::Announcer;
use crate::clock::{self, Alarm};
use crate::disk::Disk;
use crate::guard::{Guard, Watch};
use crate::monitor_link::MonitorLink;
use crate::netlink::{Addresses, Change, NetlinkError};
use crate::peers::Peers;
use crate::probe::Prober;
use crate::sockets;
use crate::turn_away::{Refusing, TurnAway};
use crate::watchdog::Watchdog;
use anyhow::{Context, bail};
use mmm_agent_core::Core;
use mmm_agent_core::io::{Audit, Input, Output, Saved, Step};
use mmm_common::ids::Millis;
use mmm_common::order::Job;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::IpAddr;
use std::time::Duration;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver};

/// How long letting go may take after SIGTERM; then the addresses are removed without the core.
const LEAVE_TIME: Duration = Duration::from_secs(20);
/// How long handing over to the next process may take.
const KEEP_TIME: Duration = Duration::from_secs(5);
/// From the core's decision to the kernel's hearing of it; less is noise, and well within the margin of a lease.
const DECIDED_WITHIN: Duration = Duration::from_millis(200);
/// How often the guard is looked at, in case nobody tells of a change.
const CHECK_GUARD: Duration = Duration::from_secs(2);
/// What ending the connections may take of the short time in which an address has to go. Some ten thousand fit.
const RESETS_TIME: Duration = Duration::from_millis(100);
/// Answers that one input may bring about, one after the other. A hundred addresses need a few hundred.
const ROUNDS: usize = 2000;
/// The pause when the core's deadline stays in the past (a mistake in the core must not become a busy loop).
const STUCK_PAUSE: Duration = Duration::from_secs(1);
/// Ticks without anything else in between. Several deadlines may well pass at one time.
const TICKS_IN_A_ROW: u32 = 20;

/// What the runtime needs of the core; the tests put a scripted one here.
pub(crate) trait Decide {
    fn handle(&mut self, now: Millis, input: Input, out: &mut Vec<Output>);
    fn next_deadline(&self) -> Option<(Millis, &'static str)>;
    fn is_writer(&self) -> bool;
}

impl Decide for Core {
    fn handle(&mut self, now: Millis, input: Input, out: &mut Vec<Output>) {
        Core::handle(self, now, input, out);
    }

    fn next_deadline(&self) -> Option<(Millis, &'static str)> {
        Core::next_deadline(self)
    }

    fn is_writer(&self) -> bool {
        Core::is_writer(self)
    }
}

/// What the runtime needs of the disk.
pub(crate) trait Save {
    fn save(&mut self, saved: &Saved) -> io::Result<()>;
}

impl Save for Disk {
    fn save(&mut self, saved: &Saved) -> io::Result<()> {
        Disk::save(self, saved)
    }
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// Let everything go and end. Twice: without asking the core any more.
    Leave,
    /// End and leave everything as it is, for the next process.
    Keep,
    /// Like `Keep`, and start anew: there is a new, checked configuration.
    Restart,
}

/// How the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Stop,
    /// Everything was left as it is, for the next process.
    Kept,
    /// Start anew with the configuration as it is on disk now.
    Restart,
}

pub(crate) struct Runtime<C, D> {
    pub(crate) core: C,
    pub(crate) disk: D,
    /// Role addresses of the configuration.
    pub(crate) roles: BTreeSet<IpAddr>,
    pub(crate) addresses: Addresses,
    /// None: what ends a lease is the address's lifetime.
    pub(crate) guard: Option<Guard>,
    pub(crate) announcer: Announcer,
    pub(crate) prober: Prober,
    /// Addresses that were here a moment ago.
    pub(crate) refusing: BTreeMap<IpAddr, Refusing>,
    pub(crate) link: MonitorLink,
    pub(crate) peers: Peers,
    /// Takes server steps; never waits.
    pub(crate) server: Box<dyn Fn(Step)>,
    /// Takes jobs; never waits.
    pub(crate) jobs: Box<dyn Fn(Job)>,
    /// Has the local server killed, and tells what came of it; never waits.
    pub(crate) kill_server: Box<dyn Fn()>,
    pub(crate) inbox: Inbox,
    pub(crate) alarm: Alarm,
    /// How often systemd wants to hear from the loop.
    pub(crate) systemd_watchdog: Option<Duration>,
    /// The kernel's, for as long as this host may be writing.
    pub(crate) watchdog: Watchdog,
}

/// Everything that comes in from outside. The senders are in other tasks.
pub(crate) struct Inbox {
    pub(crate) signals: UnboundedReceiver<Signal>,
    pub(crate) database: UnboundedReceiver<Input>,
    pub(crate) kernel: UnboundedReceiver<Change>,
    pub(crate) monitor: Receiver<Input>,
    /// What other agents ask and answer.
    pub(crate) agents: Receiver<Input>,
    /// Somebody has changed the guard's tables.
    pub(crate) guard: Option<Watch>,
}

enum Event {
    Signal(Signal),
    Kernel(Change),
    Guard,
    Input(Box<Input>),
}

impl Inbox {
    /// Signals first; the others take turns, so that a busy one cannot keep a quiet one waiting. Loses nothing when
    /// it is dropped while waiting.
    async fn next(&mut self) -> Event {
        tokio::select! {
            biased;
            Some(signal) = self.signals.recv() => Event::Signal(signal),
            event = async {
                tokio::select! {
                    Some(input) = self.database.recv() => Event::Input(Box::new(input)),
                    Some(change) = self.kernel.recv() => Event::Kernel(change),
                    Some(()) = changed(&mut self.guard) => Event::Guard,
                    Some(input) = self.monitor.recv() => Event::Input(Box::new(input)),
                    Some(input) = self.agents.recv() => Event::Input(Box::new(input)),
                    else => std::future::pending().await,
                }
            } => event,
        }
    }
}

async fn changed(guard: &mut Option<Watch>) -> Option<()> {
    guard.as_mut()?.recv().await
}

/// On the way out.
struct Leaving {
    ending: Ending,
    keep: bool,
    latest: Millis,
}

impl<C: Decide, D: Save> Runtime<C, D> {
    /// Runs until the core says `Exit`.
    ///
    /// # Errors
    /// The state could not be saved, the clock failed, or letting go took too long. The process ends with these; what
    /// addresses are left then leave by the kernel's hand.
    pub(crate) async fn run(mut self) -> anyhow::Result<Ending> {
        let ending = self.rounds().await;
        match (&ending, self.guard.take()) {
            (Ok(Ending::Stop), Some(guard)) => {
                if let Err(why) = guard.end() {
                    tracing::warn!("{why}");
                }
            }
            (Ok(Ending::Kept | Ending::Restart), Some(guard)) => guard.leave(),
            // Its end keeps closed what is still here.
            (Err(_), Some(guard)) => drop(guard),
            (_, None) => {}
        }
        self.link.close().await;
        ending
    }

    async fn rounds(&mut self) -> anyhow::Result<Ending> {
        let mut leaving: Option<Leaving> = None;
        let mut feed_dog = clock::now();
        let mut check_guard = clock::now() + CHECK_GUARD;
        let mut ticks_in_a_row = 0;
        tell_systemd(&[sd_notify::NotifyState::Ready]);
        // The core learns what is on the machine before anything else.
        let mut input = Some(Input::KernelChanged);
        loop {
            if let Some(input) = input.take()
                && self.feed(input).await?
            {
                return Ok(leaving.map_or(Ending::Stop, |l| l.ending));
            }
            let now = clock::now();
            self.watchdog.serve(self.core.is_writer(), now);
            if let Some(every) = self.systemd_watchdog
                && now >= feed_dog
            {
                tell_systemd(&[sd_notify::NotifyState::Watchdog]);
                feed_dog = now + every / 2;
            }
            if self.guard.is_some() && now >= check_guard {
                self.check_guard().await?;
                check_guard = now + CHECK_GUARD;
            }
            if let Some(leaving) = leaving.as_ref().filter(|l| now >= l.latest) {
                return self.give_up(leaving).await;
            }

            let mut wake = None;
            match self.core.next_deadline() {
                Some((at, _)) if at <= now && ticks_in_a_row < TICKS_IN_A_ROW => {
                    ticks_in_a_row += 1;
                    input = Some(Input::Tick);
                    continue;
                }
                Some((at, what)) if at <= now => {
                    tracing::error!("the core's deadline '{what}' stays in the past after {ticks_in_a_row} ticks");
                    ticks_in_a_row = 0;
                    wake = Some(now + STUCK_PAUSE);
                }
                Some((at, _)) => {
                    ticks_in_a_row = 0;
                    wake = Some(at);
                }
                None => ticks_in_a_row = 0,
            }
            wake = earliest(wake, self.systemd_watchdog.map(|_| feed_dog));
            wake = earliest(wake, self.watchdog.deadline());
            wake = earliest(wake, self.guard.as_ref().map(|_| check_guard));
            wake = earliest(wake, leaving.as_ref().map(|l| l.latest));
            let event = tokio::select! {
                biased;
                rung = ring(&self.alarm, wake) => {
                    rung.context("waiting for the clock")?;
                    continue;
                }
                event = self.inbox.next() => event,
            };
            input = match event {
                Event::Signal(signal) => {
                    if let Some(leaving) = leaving.as_ref().filter(|_| signal == Signal::Leave) {
                        return self.give_up(leaving).await;
                    }
                    let (chosen, shutdown) = leave(signal);
                    leaving = Some(chosen);
                    Some(shutdown)
                }
                Event::Kernel(change) => {
                    if change == Change::LinkUp {
                        self.announcer.link_up().await;
                    }
                    Some(Input::KernelChanged)
                }
                Event::Guard => {
                    self.check_guard().await?;
                    None
                }
                Event::Input(input) => Some(*input),
            };
        }
    }

    /// Whoever waits out a lease of this agent counts on the guard. Without it the addresses leave while their leases still
    /// run; the next start goes on without it, or says why it cannot.
    async fn check_guard(&mut self) -> anyhow::Result<()> {
        let Some(guard) = &mut self.guard else { return Ok(()) };
        let Err(why) = guard.check() else { return Ok(()) };
        tracing::error!(
            "the exact guard is gone and cannot be put up again, so the role addresses are given up: {why}"
        );
        let mut left = Vec::new();
        for ip in guard.guarded().clone() {
            if let Err(e) = self.remove(ip, false).await {
                left.push(e);
            }
        }
        if left.is_empty() {
            bail!("the exact guard was lost ({why}); the role addresses were removed, read_only may not be set")
        }
        bail!("the exact guard was lost ({why}), and: {}", left.join("; "))
    }

    /// Carries one input through the core, and the answers to what the core wanted done, until there are none left.
    /// True: the core said `Exit`.
    async fn feed(&mut self, input: Input) -> anyhow::Result<bool> {
        let mut inputs = VecDeque::from([input]);
        for _ in 0..ROUNDS {
            let Some(input) = inputs.pop_front() else { return Ok(false) };
            let mut outputs = Vec::new();
            self.core.handle(clock::now(), input, &mut outputs);
            // The worker takes it at once and works beside this loop, while a removal ends connections here first. The one that
            // is next may open its server as soon as the lease is over.
            let (closing, others): (Vec<Output>, Vec<Output>) =
                outputs.into_iter().partition(|output| matches!(output, Output::Do(Step::ReadOnly)));
            for output in closing.into_iter().chain(others) {
                match output {
                    Output::Persist(saved) => {
                        self.disk.save(&saved).context("the agent's state could not be saved, so nothing is done")?;
                    }
                    Output::LookUp { asked } => inputs.push_back(self.look_up(asked).await),
                    Output::Send(report) => self.link.send(report),
                    Output::Ask { to, request } => self.peers.ask(&to, *request),
                    Output::Vouch { ask, answer } => self.link.answer(ask, *answer),
                    Output::Do(step) => inputs.extend(self.carry_out(step).await),
                    Output::Audit(audit) => log(audit),
                    Output::Exit => return Ok(true),
                }
            }
        }
        tracing::error!("one input went through the core {ROUNDS} times; the rest waits for the next deadline");
        Ok(false)
    }

    async fn look_up(&self, asked: u64) -> Input {
        match self.addresses.present(&self.roles).await {
            Ok(present) => Input::Kernel { asked, present },
            Err(e) => Input::KernelUnreadable { asked, why: e.to_string() },
        }
    }

    /// Does an address step now and gives its result; hands a server step on, whose result comes later.
    async fn carry_out(&mut self, step: Step) -> Option<Input> {
        let result = match step {
            Step::Address { ip, lifetime_s, until } => self.add(ip, lifetime_s, until, clock::now).await,
            Step::Allow { ip, until } => match &mut self.guard {
                Some(guard) => guard.allow_until(ip, until),
                None => Err("this agent has no exact guard".to_owned()),
            },
            Step::Probe { ip } => {
                self.prober.probe(ip);
                return None;
            }
            Step::Announce { ip } => self.announcer.announce(ip).await,
            Step::Remove { ip, turn_away } => self.remove(ip, turn_away).await,
            Step::ReadOnly
            | Step::Writable { .. }
            | Step::Follow { .. }
            | Step::Detach
            | Step::SemiSync { .. }
            | Step::Task(_) => {
                (self.server)(step);
                return None;
            }
            Step::Job(job) => {
                (self.jobs)(job);
                return None;
            }
            Step::KillServer => {
                (self.kill_server)();
                return None;
            }
        };
        Some(Input::Done { step, result })
    }

    /// This process may have been stopped between the core's decision and here, and here too: what the kernel was given
    /// then would outlive the lease.
    async fn add(
        &mut self,
        ip: IpAddr,
        lifetime_s: u32,
        until: Millis,
        now: impl Fn() -> Millis,
    ) -> Result<(), String> {
        let rest = until.since(now());
        if rest.is_zero() {
            return Err("the lease has ended before the address could be added".to_owned());
        }
        self.refusing.remove(&ip);
        match &mut self.guard {
            Some(guard) => guard.allow_until(ip, until)?,
            // The lifetime was reckoned when the core decided. If this process was stopped since, it would begin only
            // now and outlast the lease, also when the process is never heard of again.
            None if Duration::from_secs(lifetime_s.into()) > rest + DECIDED_WITHIN => {
                return Err("this process was stopped between the decision and the adding".to_owned());
            }
            None => {}
        }
        let added = self.addresses.add(ip, lifetime_s).await;
        if now() >= until {
            let why = "the lease ended while the address was being added";
            return match self.remove(ip, false).await {
                Ok(()) => Err(why.to_owned()),
                Err(e) => Err(format!("{why}, and it could not be removed: {e}")),
            };
        }
        added.map_err(|e| e.to_string())
    }

    /// The connections go first, while the kernel can still send their resets. That they could not be ended is a
    /// warning and no failure: what counts is that the address is gone.
    async fn remove(&mut self, ip: IpAddr, turn_away: bool) -> Result<(), String> {
        self.announcer.stop(ip);
        let turn_away = turn_away.then(|| TurnAway::open(ip)).transpose().unwrap_or_else(|e| {
            tracing::warn!(%ip, "connections cannot be turned away: {e}");
            None
        });
        let removed = remove_with_connections(&self.addresses, ip).await;
        // While connections are turned away the address has to get through the guard, for the rest of its lease.
        if let Some(turn_away) = turn_away.flatten().filter(|_| removed.is_ok()) {
            self.refusing.insert(ip, turn_away.begin());
        } else if let Some(Err(why)) = self.guard.as_mut().map(|guard| guard.deny(ip)) {
            tracing::warn!(%ip, "{why}");
        }
        removed.map_err(|e| e.to_string())
    }

    /// The way out when the core does not end in time, or the operator will not wait for it.
    async fn give_up(&mut self, leaving: &Leaving) -> anyhow::Result<Ending> {
        if leaving.keep {
            tracing::error!("handing over did not end in time; going on without the last save");
            return Ok(leaving.ending);
        }
        let mut left = Vec::new();
        for ip in self.roles.clone() {
            if let Err(e) = self.remove(ip, false).await {
                left.push(e);
            }
        }
        if left.is_empty() {
            bail!("letting go did not end in time: the role addresses were removed, read_only may not be set")
        }
        bail!("letting go did not end in time, and: {}", left.join("; "))
    }
}

/// The connections go first. Also for an address that was left by the life before, whose connections are still there.
pub(crate) async fn remove_with_connections(addresses: &Addresses, ip: IpAddr) -> Result<(), NetlinkError> {
    end_connections(ip, RESETS_TIME).await;
    let removed = addresses.remove(ip).await;
    // Whoever got in between, or did not fit into the time. Their clients hear nothing any more, but the server's
    // side ends, and with it what their transactions hold locked. Nothing waits for it.
    tokio::spawn(end_connections(ip, Duration::from_secs(2)));
    removed
}

async fn end_connections(ip: IpAddr, within: Duration) {
    match sockets::destroy_on(ip, within).await {
        Ok(0) => {}
        Ok(count) => tracing::info!(%ip, count, "connections on the address were ended"),
        Err(e) => tracing::warn!(%ip, "{e}"),
    }
}

fn leave(signal: Signal) -> (Leaving, Input) {
    let (ending, keep, time) = match signal {
        Signal::Leave => (Ending::Stop, false, LEAVE_TIME),
        Signal::Keep => (Ending::Kept, true, KEEP_TIME),
        Signal::Restart => (Ending::Restart, true, KEEP_TIME),
    };
    match signal {
        Signal::Leave => tracing::info!("asked to end: letting go of all roles"),
        Signal::Keep => tracing::info!("asked to end for an upgrade: roles are kept for the next start"),
        Signal::Restart => tracing::info!("starting anew with the new configuration, keeping the roles"),
    }
    match ending {
        Ending::Stop | Ending::Kept => tell_systemd(&[sd_notify::NotifyState::Stopping]),
        Ending::Restart => match sd_notify::NotifyState::monotonic_usec_now() {
            Ok(now) => tell_systemd(&[sd_notify::NotifyState::Reloading, now]),
            Err(e) => tracing::debug!("systemd is not told of the reload: {e}"),
        },
    }
    (Leaving { ending, keep, latest: clock::now() + time }, Input::Shutdown { keep })
}

fn earliest(a: Option<Millis>, b: Option<Millis>) -> Option<Millis> {
    a.into_iter().chain(b).min()
}

async fn ring(alarm: &Alarm, at: Option<Millis>) -> io::Result<()> {
    match at {
        Some(at) => alarm.at(at).await,
        None => std::future::pending().await,
    }
}

fn tell_systemd(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(state) {
        tracing::debug!("systemd could not be told {state:?}: {e}");
    }
}

fn log(audit: Audit) {
    match audit {
        Audit::Info(text) => tracing::info!("{text}"),
        Audit::Warn(text) => tracing::warn!("{text}"),
        Audit::Error(text) => tracing::error!("{text}"),
    }
}

#[cfg(test)]
#[expect(clippy::wildcard_enum_match_arm, reason = "a scripted core has nothing to say about other inputs")]
mod tests {
    use super::*;
    use crate::alone::Alone;
    use crate::examine::Examiner;
    use crate::guard::Known;
    use crate::jobs::Donor;
    use crate::lines::Refusals;
    use crate::monitor_link::Myself;
    use crate::testnet::TwoHosts;
    use mmm_common::epoch::Boot;
    use mmm_common::report::ServerReport;
    use std::cell::RefCell;
    use std::rc::Rc;
    use tokio::sync::mpsc::{self, UnboundedSender};

    type Answer = Box<dyn FnMut(&Input) -> Vec<Output>>;

    /// A core that does as the test says, and notes what it was given.
    struct Script {
        given: Rc<RefCell<Vec<Input>>>,
        answer: Answer,
        deadline: Option<Millis>,
        is_writer: bool,
    }

    impl Decide for Script {
        fn handle(&mut self, _now: Millis, input: Input, out: &mut Vec<Output>) {
            out.extend((self.answer)(&input));
            self.given.borrow_mut().push(input);
        }

        fn next_deadline(&self) -> Option<(Millis, &'static str)> {
            self.deadline.map(|at| (at, "test"))
        }

        fn is_writer(&self) -> bool {
            self.is_writer
        }
    }

    struct NoDisk;

    impl Save for NoDisk {
        fn save(&mut self, _: &Saved) -> io::Result<()> {
            Err(io::Error::other("disk full"))
        }
    }

    struct Wires {
        signals: UnboundedSender<Signal>,
        database: UnboundedSender<Input>,
        given: Rc<RefCell<Vec<Input>>>,
        queued: Rc<RefCell<Vec<Step>>>,
        addresses: Addresses,
    }

    fn role() -> IpAddr {
        [10, 77, 0, 50].into()
    }

    fn runtime(answer: impl FnMut(&Input) -> Vec<Output> + 'static) -> (Runtime<Script, NoDisk>, Wires) {
        let given = Rc::new(RefCell::default());
        let queued = Rc::new(RefCell::new(vec![]));
        let addresses = Addresses::new("eth0");
        let (signals, signals_out) = mpsc::unbounded_channel();
        let (database, database_out) = mpsc::unbounded_channel();
        let (_, kernel) = mpsc::unbounded_channel();
        let at = "127.0.0.1:9989".parse().unwrap();
        let myself = Myself {
            host: "db1".into(),
            boot: Boot(1),
            hosts: BTreeMap::new(),
            monitor_gone_after: Duration::ZERO,
            examiner: Examiner::nothing(),
            donor: Donor::nothing(),
        };
        let (from_agents, agents) = mpsc::channel(1);
        let (link, monitor) = MonitorLink::start(at, myself, Refusals::default(), from_agents);
        let wires = Wires {
            signals,
            database,
            given: Rc::clone(&given),
            queued: Rc::clone(&queued),
            addresses: addresses.clone(),
        };
        let runtime = Runtime {
            core: Script { given, answer: Box::new(answer), deadline: None, is_writer: false },
            disk: NoDisk,
            roles: BTreeSet::from([role()]),
            announcer: Announcer::new(addresses.clone()),
            prober: Prober::new(addresses.clone(), wires.database.clone()),
            refusing: BTreeMap::new(),
            addresses,
            guard: None,
            link,
            peers: Peers::default(),
            jobs: Box::new(|job| panic!("no story has a job: {job:?}")),
            kill_server: Box::new(|| panic!("no story kills the server")),
            server: Box::new(move |step| queued.borrow_mut().push(step)),
            inbox: Inbox { signals: signals_out, database: database_out, kernel, monitor, agents, guard: None },
            alarm: Alarm::new().unwrap(),
            systemd_watchdog: None,
            watchdog: Watchdog::new(None),
        };
        (runtime, wires)
    }

    fn server() -> Input {
        Input::Server(ServerReport::unknown("test"))
    }

    async fn is_there(wires: &Wires) -> bool {
        !wires.addresses.present(&BTreeSet::from([role()])).await.unwrap().is_empty()
    }

    #[test]
    fn answers_go_in_before_what_waits_outside_and_outputs_are_done_in_order() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let add = Step::Address { ip: role(), lifetime_s: 60, until: clock::now() + Duration::from_secs(60) };
            let first = add.clone();
            let (runtime, wires) = runtime(move |input| match input {
                Input::KernelChanged => {
                    vec![Output::LookUp { asked: 1 }, Output::Do(first.clone()), Output::LookUp { asked: 2 }]
                }
                Input::Shutdown { .. } => vec![Output::Exit],
                _ => vec![],
            });
            wires.database.send(server()).unwrap();
            wires.signals.send(Signal::Keep).unwrap();
            assert_eq!(runtime.run().await.unwrap(), Ending::Kept);
            let given = wires.given.borrow();
            assert_eq!(
                given[..4],
                [
                    Input::KernelChanged,
                    Input::Kernel { asked: 1, present: BTreeSet::new() },
                    Input::Done { step: add, result: Ok(()) },
                    Input::Kernel { asked: 2, present: BTreeSet::from([role()]) },
                ]
            );
            assert_eq!(given[4], Input::Shutdown { keep: true }, "signals before everything else that waits");
        });
    }

    #[test]
    fn what_cannot_be_saved_is_not_acted_on() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let (runtime, wires) = runtime(|_| {
                let add = Step::Address { ip: role(), lifetime_s: 60, until: clock::now() + Duration::from_secs(60) };
                vec![Output::Persist(Saved::default()), Output::Do(add), Output::Do(Step::Detach)]
            });
            let end = format!("{:#}", runtime.run().await.unwrap_err());
            assert!(end.contains("could not be saved") && end.contains("disk full"), "{end}");
            assert!(!is_there(&wires).await);
            assert_eq!(*wires.queued.borrow(), []);
        });
    }

    #[test]
    fn a_core_that_never_rests_does_not_stop_the_loop() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let (mut runtime, wires) = runtime(|input| match input {
                Input::KernelChanged | Input::Kernel { .. } => vec![Output::LookUp { asked: 1 }],
                Input::Server(_) => vec![Output::Exit],
                _ => vec![],
            });
            runtime.core.deadline = Some(Millis(0));
            wires.database.send(server()).unwrap();
            assert_eq!(runtime.run().await.unwrap(), Ending::Stop);
            let given = wires.given.borrow();
            let ticks = given.iter().filter(|i| **i == Input::Tick).count();
            assert_eq!(ticks, TICKS_IN_A_ROW as usize);
            assert_eq!(given.len(), ROUNDS + ticks + 1);
        });
    }

    #[test]
    fn an_address_is_not_added_for_a_lease_that_is_over_nor_left_when_it_ended_meanwhile() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let (mut runtime, wires) = runtime(|_| vec![]);
            let until = Millis(10_000);
            let times = Rc::new(RefCell::new(VecDeque::new()));
            let clock = |at: [u64; 2]| {
                *times.borrow_mut() = VecDeque::from(at.map(Millis));
                let times = Rc::clone(&times);
                move || times.borrow_mut().pop_front().unwrap()
            };

            let late = runtime.add(role(), 60, until, clock([10_000, 0])).await.unwrap_err();
            assert!(late.contains("before the address could be added"), "{late}");
            assert_eq!(times.borrow().len(), 1, "it was not even tried");
            assert!(!is_there(&wires).await);

            runtime.add(role(), 1, until, clock([9_000, 9_999])).await.unwrap();
            assert!(is_there(&wires).await);

            // As if the process had been stopped for a second while the kernel was asked.
            let late = runtime.add(role(), 1, until, clock([9_000, 10_500])).await.unwrap_err();
            assert_eq!(late, "the lease ended while the address was being added");
            assert!(!is_there(&wires).await, "also when it was there before");

            // Stopped between the core's decision and the kernel: the lifetime of then would outlast the lease.
            let late = runtime.add(role(), 3, until, clock([8_000, 8_001])).await.unwrap_err();
            assert!(late.contains("stopped between the decision and the adding"), "{late}");
            assert!(!is_there(&wires).await);
        });
    }

    #[test]
    fn with_the_guard_an_address_answers_until_its_lease_ends_although_it_stays_longer() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let (mut runtime, wires) = runtime(|_| vec![]);
            let alone = Alone::make_sure().unwrap();
            let known = Known { managed: BTreeSet::from([role()]), ..Default::default() };
            runtime.guard = Some(Guard::begin(&alone, known).await.unwrap());
            let _listener = std::net::TcpListener::bind("0.0.0.0:3306").unwrap();
            let connects = |limit| {
                let to = std::net::SocketAddr::from((role(), 3306));
                hosts.on_there(async || std::net::TcpStream::connect_timeout(&to, limit)).is_ok()
            };
            let until = clock::now() + Duration::from_secs(3);
            runtime.add(role(), 60, until, clock::now).await.unwrap();
            assert!(connects(Duration::from_secs(2)));
            runtime.alarm.at(until).await.unwrap();
            assert!(is_there(&wires).await && !connects(Duration::from_millis(300)));

            let longer = Step::Allow { ip: role(), until: clock::now() + Duration::from_secs(60) };
            let done = runtime.carry_out(longer.clone()).await;
            assert_eq!(done, Some(Input::Done { step: longer, result: Ok(()) }));
            assert!(connects(Duration::from_secs(2)));
            runtime.remove(role(), false).await.unwrap();
            wires.addresses.add(role(), 60).await.unwrap();
            assert!(!connects(Duration::from_millis(300)), "put there by hand, it is closed");
        });
    }

    /// As on a kernel before 6.9.
    #[test]
    fn a_guard_that_is_taken_away_comes_back_or_the_addresses_leave() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let (mut runtime, wires) = runtime(|_| vec![]);
            let alone = Alone::make_sure().unwrap();
            let known = Known { managed: BTreeSet::from([role()]), ..Default::default() };
            let mut guard = Guard::begin_unowned(&alone, known).await.unwrap();
            runtime.inbox.guard = guard.watch();
            runtime.guard = Some(guard);
            let until = clock::now() + Duration::from_secs(60);
            runtime.add(role(), 60, until, clock::now).await.unwrap();
            let listener = std::net::TcpListener::bind("0.0.0.0:3306").unwrap();
            let connect = || {
                let to = std::net::SocketAddr::from((role(), 3306));
                hosts.on_there(async || std::net::TcpStream::connect_timeout(&to, Duration::from_secs(2)))
            };
            let meanwhile = async {
                let tables = || crate::testnet::ip(&format!("netns exec {} nft list tables", hosts.here));
                crate::testnet::ip(&format!("netns exec {} nft flush ruleset", hosts.here));
                assert_eq!(tables(), "");
                let end = tokio::time::Instant::now() + CHECK_GUARD / 2;
                while tables().is_empty() && tokio::time::Instant::now() < end {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                assert!(tables().contains("inet mmm_guard"), "it waited for the next look");
                let client = connect().unwrap();
                let _server = listener.accept().unwrap();

                let _other = crate::guard::take_the_tables();
                let end = tokio::time::Instant::now() + Duration::from_secs(5);
                while is_there(&wires).await && tokio::time::Instant::now() < end {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let end = io::Read::read(&mut &client, &mut [0; 8]).unwrap_err();
                assert_eq!(end.kind(), io::ErrorKind::ConnectionReset, "{end}");
            };
            let (ended, ()) = tokio::join!(runtime.run(), meanwhile);
            let why = ended.unwrap_err().to_string();
            assert!(why.contains("the exact guard was lost") && why.contains("were removed"), "{why}");
            assert!(!is_there(&wires).await);
        });
    }

    #[test]
    fn the_loop_wakes_to_feed_the_watchdog_while_writing_and_releases_it_at_its_end() {
        let Some(hosts) = TwoHosts::new() else { return };
        let device = tempfile::NamedTempFile::new().unwrap();
        hosts.on_here(async || {
            let (mut runtime, wires) = runtime(|input| match input {
                Input::Shutdown { .. } => vec![Output::Exit],
                _ => vec![],
            });
            runtime.core.is_writer = true;
            runtime.watchdog = Watchdog::new(Some(device.path().to_owned()));
            let written = || std::fs::read_to_string(device.path()).unwrap();
            let watch = async {
                let end = tokio::time::Instant::now() + Duration::from_secs(20);
                while written().len() < 3 && tokio::time::Instant::now() < end {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                wires.signals.send(Signal::Keep).unwrap();
            };
            let (ended, ()) = tokio::join!(runtime.run(), watch);
            assert_eq!(ended.unwrap(), Ending::Kept);
            let written = written();
            assert!(written.starts_with("...") && written.ends_with('V'), "{written:?}");
            assert_eq!(wires.given.borrow().len(), 2, "nothing else woke it");
        });
    }

    // lessons.md 12, 25
    #[test]
    fn removing_resets_the_clients_and_waits_for_no_server() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let (runtime, wires) = runtime(|input| match input {
                Input::KernelChanged => {
                    vec![Output::Do(Step::ReadOnly), Output::Do(Step::Remove { ip: role(), turn_away: false })]
                }
                Input::Done { .. } => vec![Output::Exit],
                _ => vec![],
            });
            wires.addresses.add(role(), 60).await.unwrap();
            let listener = std::net::TcpListener::bind("0.0.0.0:3306").unwrap();
            let mut client = hosts.on_there(async || std::net::TcpStream::connect((role(), 3306)).unwrap());
            let _server = listener.accept().unwrap();
            assert_eq!(runtime.run().await.unwrap(), Ending::Stop);
            assert!(!is_there(&wires).await);
            client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let end = io::Read::read(&mut client, &mut [0; 8]).unwrap_err();
            assert_eq!(end.kind(), io::ErrorKind::ConnectionReset, "{end}");
            assert_eq!(*wires.queued.borrow(), [Step::ReadOnly], "queued, and nobody waited for it");
        });
    }

    #[test]
    fn a_second_request_to_end_removes_the_addresses_without_the_core() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let (runtime, wires) = runtime(|_| vec![]);
            wires.addresses.add(role(), 60).await.unwrap();
            wires.signals.send(Signal::Leave).unwrap();
            wires.signals.send(Signal::Leave).unwrap();
            let end = runtime.run().await.unwrap_err().to_string();
            assert!(end.contains("role addresses were removed"), "{end}");
            assert!(!is_there(&wires).await);
            assert!(wires.given.borrow().contains(&Input::Shutdown { keep: false }));
        });
    }

    #[test]
    fn a_deadline_that_has_come_goes_before_everything_that_waits() {
        let Some(hosts) = TwoHosts::new() else { return };
        hosts.on_here(async || {
            let (mut runtime, wires) = runtime(|input| match input {
                Input::Server(_) => vec![Output::Exit],
                _ => vec![],
            });
            runtime.core.deadline = Some(clock::now());
            wires.database.send(server()).unwrap();
            runtime.run().await.unwrap();
            let given = wires.given.borrow();
            assert_eq!(given[1], Input::Tick);
            assert_eq!(given.last(), Some(&server()));
        });
    }
}

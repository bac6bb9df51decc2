//! The watcher: what the local server is, at every change and at least once a second.
//!
//! Three tasks. The *tripwire* keeps a login inside `SELECT SLEEP`, so that the end of the server is an event the moment
//! its sockets close. The *sampler* asks for the server's state on a kept login. The *judge* draws the conclusion.
//! Where a saturated server has a single place left, the sampler has it, and lends it for fencing.
//!
//! Dead is said only when the host itself refuses a new connection; silence becomes Hung after `hang_timeout`; a server
//! that answers but will not let the agent look is Unknown, with the reason.

use super::context::Logins;
use super::semisync;
use super::session::{Knock, QUERY, Server, Session, Trouble};
use super::status::Status;
use mmm_agent_core::io::Input;
use mmm_common::gtid::Gtids;
use mmm_common::report::{Life, ReplicationReport, SemiSync, ServerReport, Writing};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

/// Between two samples of a server that answers.
const PERIOD: Duration = Duration::from_millis(250);
/// Between two attempts at a server that is not there.
const RETRY: Duration = Duration::from_millis(200);
/// A report goes out at least this often.
const AT_LEAST: Duration = Duration::from_secs(1);
/// How long one sleep of the tripwire lasts.
const SLEEP_S: u64 = 3600;
/// How long a new login may stay pending. Longer than a question: a hung server gets one login to answer when it wakes,
/// not a heap of broken ones that would make it block the host.
const PENDING: Duration = Duration::from_secs(10);
/// How long a look that somebody waits for may wait for the replication status.
const QUICK: Duration = Duration::from_millis(100);
/// How long the status may stay unanswered before a new login asks again.
const STATUS_RETRY: Duration = Duration::from_secs(1);
/// For how long the login for the variables may be lent.
const LENT: Duration = Duration::from_secs(4);
/// Between two questions for semi-synchronous replication where there is none: plugins can be installed any time.
const NO_SEMISYNC: Duration = Duration::from_secs(10);

/// What the tripwire and the sampler tell the judge.
enum Seen {
    /// The server has said something; it lives.
    Answer,
    Sample(Sample),
    /// It answers, but refuses the agent.
    Denied(String),
    /// What answers on a new login is not the process that answered before.
    Restarted {
        uptime: Duration,
    },
    /// A new connection was refused.
    NotThere,
    /// The tripwire's connection ended.
    Broke {
        farewell: Option<String>,
    },
    /// Everything before this has been looked at: push, and say so.
    Flush(oneshot::Sender<()>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Sample {
    writing: Writing,
    executed: Option<Gtids>,
    replication: Option<ReplicationReport>,
    semisync: Option<SemiSync>,
    /// A part that the server refused to show.
    denied: Option<String>,
}

/// A way to have the server looked at now.
#[derive(Clone)]
pub(super) struct Watch {
    asks: UnboundedSender<Ask>,
    inside: watch::Receiver<bool>,
}

enum Ask {
    Look(oneshot::Sender<()>),
    Lend(oneshot::Sender<Session>),
}

impl Watch {
    /// Returns once a fresh sample has been handed to the core, or could not be had in time.
    pub(super) async fn look_now(&self) {
        let (done, seen) = oneshot::channel();
        if self.asks.send(Ask::Look(done)).is_ok() {
            // Not in time: the watcher will say what is the matter by itself.
            let _late = timeout(QUERY + QUERY / 2, seen).await;
        }
    }

    /// Waits until the watcher is logged in; false when it has ended.
    pub(super) async fn inside(&mut self) -> bool {
        self.inside.wait_for(|inside| *inside).await.is_ok()
    }

    /// The watcher's own login, for who must get in when the server lets in nobody else.
    pub(super) async fn lend(&self) -> Option<Session> {
        let (give, get) = oneshot::channel();
        self.asks.send(Ask::Lend(give)).ok()?;
        timeout(QUERY, get).await.ok()?.ok()
    }
}

pub(super) fn start(server: Server, logins: Logins, hang_timeout: Duration, inputs: UnboundedSender<Input>) -> Watch {
    let (asks, asked) = unbounded_channel();
    let (seen, sights) = unbounded_channel();
    let (inside, is_inside) = watch::channel(false);
    let watched = is_inside.clone();
    tokio::spawn(tripwire(server.clone(), seen.clone(), is_inside));
    tokio::spawn(sample(Sampler::new(server.clone(), logins, inside), seen, asked));
    tokio::spawn(judge(server, hang_timeout, sights, inputs));
    Watch { asks, inside: watched }
}

/// `inside`: the sampler is logged in. Where there is one place left, it is the sampler's.
async fn tripwire(server: Server, seen: UnboundedSender<Seen>, mut inside: watch::Receiver<bool>) {
    while !seen.is_closed() {
        if inside.wait_for(|inside| *inside).await.is_err() {
            return;
        }
        if let Ok(mut session) = server.connect(PENDING).await {
            let asleep = session.rows(Duration::from_secs(SLEEP_S + 60), &format!("SELECT SLEEP({SLEEP_S})")).await;
            if let Err(e) = asleep {
                let farewell = e.code().map(|_| e.to_string());
                if seen.send(Seen::Broke { farewell }).is_err() {
                    return;
                }
            }
        }
        sleep(RETRY).await;
    }
}

async fn sample(mut sampler: Sampler, seen: UnboundedSender<Seen>, mut asked: UnboundedReceiver<Ask>) {
    let mut poke: Option<oneshot::Sender<()>> = None;
    loop {
        // Somebody waits for a fresh look: a replication status that is held up must not hold them up.
        let pause = sampler.round(&seen, if poke.is_some() { QUICK } else { QUERY }).await;
        if let Some(done) = poke.take() {
            let _ended = seen.send(Seen::Flush(done));
        }
        match timeout(pause, asked.recv()).await {
            Ok(Some(Ask::Look(done))) => poke = Some(done),
            Ok(Some(Ask::Lend(to))) => sampler.lend(to),
            Ok(None) => return,
            Err(_) if seen.is_closed() => return,
            Err(_) => {}
        }
    }
}

struct Sampler {
    server: Server,
    /// Those of the worker, for when the server lets nobody in.
    logins: Logins,
    inside: watch::Sender<bool>,
    /// When the login for the variables was given away.
    lent: Option<Instant>,
    /// For the variables: what tells life.
    vitals: Option<Session>,
    /// For the replication status, which a STOP elsewhere can hold up while the server is well.
    status: Option<Session>,
    last_status: Option<ReplicationReport>,
    /// Not before then is another connection tried for it.
    status_again: Instant,
    semisync: Semi,
    /// When the server was started, by what it said at the last login.
    started: Option<Started>,
}

/// What is known of semi-synchronous replication.
#[derive(Default)]
struct Semi {
    words: Option<semisync::Words>,
    /// Not before then is a server without it asked for it again.
    again: Option<Instant>,
    last: Option<(Instant, SemiSync)>,
}

impl Sampler {
    fn new(server: Server, logins: Logins, inside: watch::Sender<bool>) -> Sampler {
        Sampler {
            server,
            logins,
            inside,
            lent: None,
            vitals: None,
            status: None,
            last_status: None,
            status_again: Instant::now(),
            semisync: Semi::default(),
            started: None,
        }
    }

    fn lend(&mut self, to: oneshot::Sender<Session>) {
        if let Some(session) = self.vitals.take() {
            match to.send(session) {
                Ok(()) => self.lent = Some(Instant::now()),
                Err(session) => self.vitals = Some(session),
            }
        }
    }

    /// One look; gives back how long to wait before the next.
    async fn round(&mut self, seen: &UnboundedSender<Seen>, patience: Duration) -> Duration {
        match self.look(seen, patience).await {
            Ok(sample) => {
                let _ended = seen.send(Seen::Sample(sample));
                PERIOD
            }
            // It is in use elsewhere, and comes back.
            Err(e) if e.is_full() && self.lent.is_some_and(|at| at.elapsed() < LENT) => {
                let _ended = seen.send(Seen::Answer);
                PERIOD / 5
            }
            Err(e @ (Trouble::Refused { .. } | Trouble::Strange { .. })) => {
                let _ended = seen.send(Seen::Denied(e.to_string()));
                PERIOD
            }
            Err(Trouble::NotThere { .. }) => {
                let _ended = seen.send(Seen::NotThere);
                RETRY
            }
            // A dying server resets what is in its backlog before it refuses: look again at once, a hung one
            // has made this round long already.
            Err(Trouble::Lost { .. } | Trouble::Late { .. }) => Duration::from_millis(10),
        }
    }

    async fn look(&mut self, seen: &UnboundedSender<Seen>, patience: Duration) -> Result<Sample, Trouble> {
        let kept = match self.vitals.take() {
            Some(mut session) => match session.vitals().await {
                Ok(vitals) => Some((session, vitals)),
                // A new login decides.
                Err(Trouble::Lost { .. } | Trouble::Late { .. } | Trouble::NotThere { .. }) => None,
                Err(e) => return Err(e),
            },
            None => None,
        };
        let (session, vitals) = match kept {
            Some(kept) => kept,
            None => {
                self.inside.send_replace(false);
                let mut session = match self.server.connect(PENDING).await {
                    Err(e) if e.is_full() => self.logins.any().ok_or(e)?,
                    answer => answer?,
                };
                // Before anything of the new one is told: whoever held the old one for alive has to hear of its end.
                let asked = Instant::now();
                if let Some(uptime) = session.uptime().await? {
                    let started = Started::of(uptime, asked, Instant::now());
                    if self.started.replace(started).is_some_and(|before| started.is_after(before)) {
                        let _ended = seen.send(Seen::Restarted { uptime });
                    }
                }
                let _ended = seen.send(Seen::Answer);
                let vitals = session.vitals().await?;
                // Not knowing another way in is no reason not to use this one.
                let _unknown = self.server.find_side_door(&mut session).await;
                (session, vitals)
            }
        };
        self.lent = None;
        self.vitals = Some(session);
        self.inside.send_replace(true);
        let _ended = seen.send(Seen::Answer);
        let mut sample = Sample {
            writing: vitals.writing,
            executed: vitals.executed,
            replication: None,
            semisync: None,
            denied: None,
        };
        match self.replication(sample.executed.as_ref(), patience).await {
            Ok(report) => {
                self.last_status = report;
                sample.replication = self.last_status.clone().map(|mut report| {
                    if let Some(why) = vitals.no_gtids.as_ref().filter(|_| report.error.is_empty()) {
                        report.error.clone_from(why);
                    }
                    report
                });
            }
            Err(e) if e.is_answer() => sample.denied = Some(e.to_string()),
            Err(e) => {
                sample.replication = self.last_status.clone().map(|mut old| {
                    old.error = format!("the replication status is not to be had: {e}");
                    old
                });
            }
        }
        let fresh = |(at, _): &(Instant, SemiSync)| at.elapsed() < QUERY;
        sample.semisync = self.semisync.last.clone().filter(fresh).map(|(_, mut semisync)| {
            semisync.acknowledges &= sample.replication.as_ref().is_some_and(|r| r.io_running);
            semisync
        });
        Ok(sample)
    }

    async fn replication(
        &mut self,
        executed: Option<&Gtids>,
        patience: Duration,
    ) -> Result<Option<ReplicationReport>, Trouble> {
        let mut session = match self.status.take() {
            Some(session) if session.usable() => session,
            Some(_) | None if Instant::now() < self.status_again => return Err(Trouble::Late { limit: QUERY }),
            Some(_) | None => match self.server.connect(QUERY).await {
                Ok(session) => {
                    self.status_again = Instant::now() + STATUS_RETRY;
                    session
                }
                // The one login there is has to do.
                Err(e) if e.is_full() => {
                    let Some(mut session) = self.vitals.take() else { return Err(e) };
                    let answer = self.ask(&mut session, patience).await;
                    self.vitals = Some(session).filter(Session::usable);
                    return Ok(answer?.map(|s| s.report(executed)));
                }
                Err(e) => {
                    self.status_again = Instant::now() + STATUS_RETRY;
                    return Err(e);
                }
            },
        };
        let answer = self.ask(&mut session, patience).await;
        self.status = Some(session);
        Ok(answer?.map(|s| s.report(executed)))
    }

    async fn ask(&mut self, session: &mut Session, patience: Duration) -> Result<Option<Status>, Trouble> {
        self.semisync.look(session, patience).await?;
        session.status_within(patience).await
    }
}

/// When a server was started, as far as whole seconds of uptime and the time of the answer tell.
#[derive(Clone, Copy, Debug)]
struct Started {
    earliest: Instant,
    latest: Instant,
}

impl Started {
    fn of(uptime: Duration, asked: Instant, answered: Instant) -> Started {
        let before = |at: Instant, time: Duration| at.checked_sub(time).unwrap_or(at);
        Started { earliest: before(asked, uptime + Duration::from_secs(1)), latest: before(answered, uptime) }
    }

    /// Of another process. The server's clock may have been set back meanwhile: then one is taken for two, which costs a
    /// failover and nothing else.
    fn is_after(self, before: Started) -> bool {
        self.earliest > before.latest
    }
}

impl Semi {
    /// An answer that is no good only means that nothing is known; the connection's trouble is everybody's.
    async fn look(&mut self, session: &mut Session, patience: Duration) -> Result<(), Trouble> {
        if self.words.is_none() && self.again.is_none_or(|at| Instant::now() >= at) {
            self.again = Some(Instant::now() + NO_SEMISYNC);
            self.words = semisync::Words::of(session).await?;
        }
        let Some(words) = &self.words else { return Ok(()) };
        match semisync::read(session, words, patience).await {
            Ok(now) => {
                self.last = Some((Instant::now(), now));
                Ok(())
            }
            Err(e) if e.is_answer() => {
                *self = Semi { again: self.again, ..Semi::default() };
                Ok(())
            }
            Err(e) => Err(e),
        }
    }
}

async fn judge(
    server: Server,
    hang_timeout: Duration,
    mut sights: UnboundedReceiver<Seen>,
    inputs: UnboundedSender<Input>,
) {
    let mut judge = Judge::new(server.place.clone(), hang_timeout, Instant::now());
    let mut sent: Option<(Instant, ServerReport)> = None;
    let mut knocks: Option<Knocks> = None;
    loop {
        let mut flush = None;
        let now = Instant::now();
        let pause = judge.next_look(now);
        let pause = knocks.map_or(pause, |k| pause.min(k.next.saturating_duration_since(now)));
        match timeout(pause, sights.recv()).await {
            Ok(None) => return,
            Ok(Some(Seen::Answer)) => judge.answered(Instant::now()),
            Ok(Some(Seen::Sample(sample))) => judge.sampled(Instant::now(), sample),
            Ok(Some(Seen::Denied(why))) => judge.denied(Instant::now(), why),
            Ok(Some(Seen::Restarted { uptime })) => judge.restarted(uptime),
            Ok(Some(Seen::NotThere)) => judge.knocked(server.knock(QUERY / 10).await),
            Ok(Some(Seen::Broke { farewell })) => {
                judge.broke(farewell);
                judge.knocked(server.knock(QUERY / 10).await);
                knocks = Some(Knocks::begin(Instant::now()));
            }
            Ok(Some(Seen::Flush(done))) => flush = Some(done),
            Err(_) => judge.silent(Instant::now()),
        }
        if judge.is_dead() {
            knocks = None;
        }
        if knocks.is_some_and(|k| Instant::now() >= k.next) {
            judge.knocked(server.knock(QUERY / 10).await);
            knocks = knocks.and_then(|k| k.after(Instant::now()));
        }
        let now = Instant::now();
        let due = match &sent {
            Some((at, last)) => flush.is_some() || *last != judge.report || now.duration_since(*at) >= AT_LEAST,
            None => true,
        };
        if due {
            if inputs.send(Input::Server(judge.report.clone())).is_err() {
                return;
            }
            sent = Some((now, judge.report.clone()));
        }
        if let Some(done) = flush {
            let _gone = done.send(());
        }
    }
}

/// A server that is killed loses its connections one after the other, and the place where it listens among them: right
/// after the first a new one may still be let in, and by the sampler's next look the server may have been started again.
/// So it is asked several times, at ever longer intervals: each time is a connection without a login, and a server
/// stops serving a host that makes a hundred of these in a row (max_connect_errors).
#[derive(Clone, Copy, Debug)]
struct Knocks {
    next: Instant,
    pause: Duration,
}

impl Knocks {
    const FIRST: Duration = Duration::from_millis(1);
    const LAST: Duration = Duration::from_millis(128);

    fn begin(now: Instant) -> Knocks {
        Knocks { next: now + Self::FIRST, pause: Self::FIRST }
    }

    /// None: the sampler's looks are enough from here.
    fn after(self, now: Instant) -> Option<Knocks> {
        let pause = self.pause * 2;
        (pause <= Self::LAST).then_some(Knocks { next: now + pause, pause })
    }
}

/// Draws the conclusion. Pure: what was seen, and when.
struct Judge {
    place: String,
    hang_timeout: Duration,
    last_answer: Instant,
    /// What the server said when it closed the tripwire, since it was last alive.
    farewell: Option<String>,
    been_alive: bool,
    report: ServerReport,
}

impl Judge {
    fn new(place: String, hang_timeout: Duration, now: Instant) -> Judge {
        let report = ServerReport::unknown("not looked at yet");
        Judge { place, hang_timeout, last_answer: now, farewell: None, been_alive: false, report }
    }

    /// How long nothing needs to be done when nothing is seen.
    fn next_look(&self, now: Instant) -> Duration {
        let to_hang = (self.last_answer + self.hang_timeout).saturating_duration_since(now);
        if to_hang.is_zero() { PERIOD } else { to_hang.min(PERIOD) }
    }

    fn answered(&mut self, now: Instant) {
        self.last_answer = now;
        if matches!(self.report.life, Life::Hung { .. }) {
            // It answers; what it is like, the sample will say.
            self.report = ServerReport { life: Life::Alive, ..ServerReport::unknown("") };
        }
    }

    fn sampled(&mut self, now: Instant, sample: Sample) {
        self.last_answer = now;
        self.been_alive = true;
        self.farewell = None;
        let life = match sample.denied {
            None => Life::Alive,
            Some(why) => {
                Life::Unknown { why: format!("the agent's user may not look at replication at {}: {why}", self.place) }
            }
        };
        let Sample { writing, executed, replication, semisync, denied: _ } = sample;
        self.report = ServerReport { life, writing, executed, replication, semisync };
    }

    fn is_dead(&self) -> bool {
        matches!(self.report.life, Life::Dead { .. })
    }

    fn denied(&mut self, now: Instant, why: String) {
        self.last_answer = now;
        self.report = ServerReport::unknown(&format!("{} runs, but does not let the agent look: {why}", self.place));
    }

    fn broke(&mut self, farewell: Option<String>) {
        self.farewell = farewell;
    }

    fn knocked(&mut self, knock: Knock) {
        match knock {
            Knock::NotThere(why) => {
                let before = match (&self.farewell, self.been_alive) {
                    // 1053 is said only by a server that was told to shut down.
                    (Some(said), _) if said.contains("error 1053") => "clean shutdown".to_owned(),
                    (Some(said), _) => format!("its connections ended with {said}"),
                    (None, true) => "its connections broke".to_owned(),
                    (None, false) => "not seen alive since the agent started".to_owned(),
                };
                let why = format!("{}: {before}, and a new connection is refused ({why})", self.place);
                self.ended(why, false);
            }
            Knock::Elsewhere(why) => self.report = ServerReport::unknown(&why),
            // Something listens, or nobody knows: the sampler goes on looking.
            Knock::Open | Knock::Unclear => {}
        }
    }

    /// Its end was over before anybody had looked.
    fn restarted(&mut self, uptime: Duration) {
        let seconds = uptime.as_secs();
        self.ended(
            format!("{}: its connections broke, and what answers was started {seconds} s ago", self.place),
            true,
        );
    }

    fn ended(&mut self, why: String, restarted: bool) {
        if !self.is_dead() {
            self.report = ServerReport { life: Life::Dead { why, restarted }, ..ServerReport::unknown("") };
        }
    }

    fn silent(&mut self, now: Instant) {
        let silence = now.duration_since(self.last_answer);
        if silence >= self.hang_timeout && !matches!(self.report.life, Life::Dead { .. }) {
            let for_ms = u64::try_from(silence.as_millis()).unwrap_or(u64::MAX);
            self.report = ServerReport { life: Life::Hung { for_ms }, ..ServerReport::unknown("") };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HANG: Duration = Duration::from_secs(3);

    fn alive(now: Instant) -> Judge {
        let mut judge = Judge::new("db1".to_owned(), HANG, now);
        let writing = Writing::Allowed;
        let sample = Sample { writing, executed: None, replication: None, semisync: None, denied: None };
        judge.sampled(now, sample);
        judge
    }

    #[test]
    fn a_broken_connection_alone_is_not_death() {
        let mut judge = alive(Instant::now());
        judge.broke(None);
        judge.knocked(Knock::Open);
        assert_eq!(judge.report.life, Life::Alive);
        judge.knocked(Knock::Unclear);
        assert_eq!(judge.report.life, Life::Alive);
        judge.knocked(Knock::NotThere("refused".to_owned()));
        assert!(matches!(judge.report.life, Life::Dead { .. }));
        assert_eq!(judge.report.writing, Writing::Unknown);
    }

    #[test]
    fn an_end_that_was_over_before_anybody_looked_is_an_end() {
        let mut judge = alive(Instant::now());
        judge.restarted(Duration::from_secs(2));
        let Life::Dead { why, restarted: true } = &judge.report.life else { panic!("{:?}", judge.report) };
        assert!(why.contains("started 2 s ago"), "{why}");
    }

    #[test]
    fn a_start_is_told_from_the_rounding_of_the_uptime() {
        let (second, slow) = (Duration::from_secs(1), Duration::from_millis(900));
        // Started just before `at`.
        let at = Instant::now() + 100 * second;
        let before = Started::of(9 * second, at + 9 * second + slow, at + 9 * second + slow);
        assert!(!Started::of(20 * second, at + 20 * second, at + 20 * second + slow).is_after(before));
        assert!(!Started::of(20 * second, at + 20 * second + slow, at + 21 * second).is_after(before));
        assert!(!Started::of(30 * second, at + 20 * second, at + 20 * second).is_after(before), "its clock was set on");
        let next = at + 12 * second;
        assert!(Started::of(second, next + second, next + second + slow).is_after(before));
    }

    #[test]
    fn knocks_end_and_are_few() {
        let start = Instant::now();
        let mut knocks = Some(Knocks::begin(start));
        let (mut count, mut last) = (0, start);
        while let Some(k) = knocks {
            (count, last) = (count + 1, k.next);
            knocks = k.after(last);
        }
        assert_eq!(count, 8);
        assert!(last - start >= PERIOD, "no gap to the sampler's looks: {:?}", last - start);
    }

    #[test]
    fn silence_is_a_hang_only_after_the_timeout_and_an_answer_ends_it() {
        let start = Instant::now();
        let mut judge = alive(start);
        judge.silent(start + HANG - Duration::from_millis(1));
        assert_eq!(judge.report.life, Life::Alive);
        judge.silent(start + HANG);
        assert_eq!(judge.report.life, Life::Hung { for_ms: 3000 });
        assert_eq!(judge.report.writing, Writing::Unknown);
        judge.answered(start + HANG + HANG);
        assert_eq!(judge.report.life, Life::Alive);
    }

    // lessons.md 15
    #[test]
    fn a_refusal_is_an_answer_and_never_life_or_death() {
        let start = Instant::now();
        let mut judge = alive(start);
        judge.denied(start + HANG, "error 1040: Too many connections".to_owned());
        judge.silent(start + HANG + HANG / 2);
        let Life::Unknown { why } = &judge.report.life else { panic!("{:?}", judge.report) };
        assert!(why.contains("Too many connections"), "{why}");
    }

    #[test]
    fn a_clean_shutdown_is_named_only_when_the_server_said_so() {
        let mut judge = alive(Instant::now());
        judge.broke(Some("error 1053: Server shutdown in progress".to_owned()));
        judge.knocked(Knock::NotThere("refused".to_owned()));
        let Life::Dead { why, .. } = &judge.report.life else { panic!("{:?}", judge.report) };
        assert!(why.contains("clean shutdown"), "{why}");
    }
}

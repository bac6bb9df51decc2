//! Who does which step when.
//!
//! Steps go one after the other. Two kinds do not wait in that line: tasks (they wait for replication) run beside it,
//! a new one ending the one before; and ReadOnly starts at once, ending whatever might make the server writable again.

use super::context::Context;
use super::{fetch, follow, quiesce, read_only, semisync, tasks};
use mmm_agent_core::io::{Input, Side, Step};
use mmm_common::epoch::Epoch;
use mmm_common::gtid::Gtids;
use mmm_common::order::{Task, Work};
use mmm_common::position::Position;
use mmm_common::report::TaskOutcome;
use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::AbortHandle;
use tokio::time::sleep;

/// How often logins that fencing needs are opened again where they were lost.
const KEEP_OPEN: Duration = Duration::from_secs(5);

pub(super) fn start(context: Context, steps: UnboundedReceiver<Step>, inputs: UnboundedSender<Input>) {
    let context = Arc::new(context);
    tokio::spawn(keep_open(Arc::clone(&context), inputs.clone()));
    let (ended, endings) = unbounded_channel();
    let worker =
        Worker { context, inputs, ended, waiting: VecDeque::new(), lane: None, fence: None, task: None, runs: 0 };
    tokio::spawn(worker.run(steps, endings));
}

async fn keep_open(context: Arc<Context>, inputs: UnboundedSender<Input>) {
    let mut watch = context.watch.clone();
    // A hung server's logins are the watcher's alone: it has the patience not to make it block this host.
    while !inputs.is_closed() && watch.inside().await {
        context.keep_open().await;
        sleep(KEEP_OPEN).await;
    }
}

/// Something under way. `run` tells its ending from that of one that was ended before.
struct Running<T> {
    what: T,
    run: u64,
    handle: AbortHandle,
}

struct TaskRun {
    id: Epoch,
    quiesce: bool,
}

struct Worker {
    context: Arc<Context>,
    inputs: UnboundedSender<Input>,
    ended: UnboundedSender<u64>,
    waiting: VecDeque<Step>,
    lane: Option<Running<Step>>,
    fence: Option<Running<()>>,
    task: Option<Running<TaskRun>>,
    runs: u64,
}

impl Worker {
    async fn run(mut self, mut steps: UnboundedReceiver<Step>, mut endings: UnboundedReceiver<u64>) {
        loop {
            tokio::select! {
                step = steps.recv() => match step {
                    Some(step) => self.take(step),
                    None => return self.stop(),
                },
                run = endings.recv() => match run {
                    Some(run) => self.finished(run),
                    None => return self.stop(),
                },
            }
            self.next();
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::ReadOnly => {
                self.overtake_writable("ReadOnly");
                self.end_quiesce("ReadOnly");
                // Before everything, but after a ReadOnly that came earlier.
                let earlier = self.waiting.iter().take_while(|s| **s == Step::ReadOnly).count();
                self.waiting.insert(earlier, Step::ReadOnly);
            }
            Step::Task(task) => self.start_task(task),
            Step::Writable { .. } | Step::Follow { .. } | Step::Detach | Step::SemiSync { .. } => {
                self.waiting.push_back(step);
            }
            Step::Job(_)
            | Step::KillServer
            | Step::Address { .. }
            | Step::Allow { .. }
            | Step::Probe { .. }
            | Step::Announce { .. }
            | Step::Remove { .. } => {
                let why = "jobs and address steps are not for the database's worker".to_owned();
                self.tell(Input::Done { step, result: Err(why) });
            }
        }
    }

    /// Starts what may start now.
    fn next(&mut self) {
        while let Some(step) = self.waiting.front() {
            let free = self.fence.is_none() && (*step == Step::ReadOnly || self.lane.is_none());
            if !free {
                return;
            }
            if let Some(step) = self.waiting.pop_front() {
                self.start_step(step);
            }
        }
    }

    fn start_step(&mut self, step: Step) {
        if matches!(step, Step::Writable { .. }) {
            self.end_quiesce("Writable");
        }
        let (context, inputs, this) = (Arc::clone(&self.context), self.inputs.clone(), step.clone());
        let (run, handle) = self.spawn(async move {
            let result = match &this {
                Step::ReadOnly => read_only::on(&context, read_only::LIMIT).await,
                Step::Writable { until } => read_only::off(&context, *until).await,
                Step::Follow { host } => follow::follow(&context, host).await,
                Step::Detach => follow::detach(&context).await,
                Step::SemiSync { side, on } => semisync::switch(&context, *side, *on).await,
                Step::Task(_)
                | Step::Job(_)
                | Step::KillServer
                | Step::Address { .. }
                | Step::Allow { .. }
                | Step::Probe { .. }
                | Step::Announce { .. }
                | Step::Remove { .. } => Ok(()),
            };
            // Opening was read back on its own login: the address need not wait for the watcher. Everything else is
            // looked at first, so that the core plans on what is true.
            let opened = matches!(this, Step::Writable { .. }) && result.is_ok();
            if opened {
                let _ended = inputs.send(Input::Done { step: this, result });
                context.watch.look_now().await;
            } else {
                context.watch.look_now().await;
                let _ended = inputs.send(Input::Done { step: this, result });
            }
        });
        if step == Step::ReadOnly {
            self.fence = Some(Running { what: (), run, handle });
        } else {
            self.lane = Some(Running { what: step, run, handle });
        }
    }

    fn start_task(&mut self, task: Task) {
        self.end_task(&format!("task {} came instead", task.id));
        if matches!(task.work, Work::Drain { .. } | Work::Fetch { .. }) {
            // What was asked for before would start the I/O thread after it.
            self.overtake("a drain or a fetch", |s| {
                matches!(s, Step::Follow { .. } | Step::SemiSync { side: Side::Replica, .. })
            });
        }
        let what = TaskRun { id: task.id, quiesce: matches!(task.work, Work::Quiesce { .. }) };
        let (context, inputs, id) = (Arc::clone(&self.context), self.inputs.clone(), task.id);
        let (run, handle) = self.spawn(async move {
            let result = work(&context, task.work).await;
            context.watch.look_now().await;
            let outcome = match result {
                Ok(position) => TaskOutcome::Done { position },
                Err(why) => TaskOutcome::Failed { why },
            };
            let _ended = inputs.send(Input::TaskDone { id, outcome });
        });
        self.task = Some(Running { what, run, handle });
    }

    fn spawn(&mut self, work: impl Future<Output = ()> + Send + 'static) -> (u64, AbortHandle) {
        self.runs += 1;
        let (run, ended) = (self.runs, self.ended.clone());
        let handle = tokio::spawn(async move {
            work.await;
            let _stopped = ended.send(run);
        });
        (run, handle.abort_handle())
    }

    fn finished(&mut self, run: u64) {
        self.lane.take_if(|r| r.run == run);
        self.fence.take_if(|r| r.run == run);
        self.task.take_if(|r| r.run == run);
    }

    /// A Writable that waits or is under way must not take effect after what came later.
    fn overtake_writable(&mut self, by: &str) {
        self.overtake(by, |s| matches!(s, Step::Writable { .. }));
        if let Some(running) = self.lane.take_if(|r| matches!(r.what, Step::Writable { .. })) {
            running.handle.abort();
            self.not_done(running.what, by);
        }
    }

    /// What waits is not done.
    fn overtake(&mut self, by: &str, which: impl Fn(&Step) -> bool) {
        let waiting = std::mem::take(&mut self.waiting);
        let (overtaken, rest): (Vec<Step>, Vec<Step>) = waiting.into_iter().partition(which);
        self.waiting = rest.into();
        for step in overtaken {
            self.not_done(step, by);
        }
    }

    fn not_done(&self, step: Step, by: &str) {
        self.tell(Input::Done { step, result: Err(format!("not done: {by} came after it")) });
    }

    fn end_quiesce(&mut self, by: &str) {
        if self.task.as_ref().is_some_and(|t| t.what.quiesce) {
            self.end_task(&format!("{by} came while it was under way"));
        }
    }

    fn end_task(&mut self, why: &str) {
        if let Some(task) = self.task.take() {
            task.handle.abort();
            self.tell(Input::TaskDone { id: task.what.id, outcome: TaskOutcome::Failed { why: why.to_owned() } });
        }
    }

    fn stop(&mut self) {
        for handle in [
            self.lane.take().map(|r| r.handle),
            self.fence.take().map(|r| r.handle),
            self.task.take().map(|r| r.handle),
        ] {
            handle.inspect(AbortHandle::abort);
        }
    }

    fn tell(&self, input: Input) {
        let _ended = self.inputs.send(input);
    }
}

async fn work(context: &Context, work: Work) -> Result<Option<Position>, String> {
    match work {
        Work::Quiesce { grace_ms, timeout_ms } => {
            quiesce::run(context, Duration::from_millis(grace_ms), Duration::from_millis(timeout_ms)).await
        }
        Work::CatchUp { position, timeout_ms } => {
            let limit = Duration::from_millis(timeout_ms);
            match position {
                Position::Gtids(gtids) => tasks::catch_up(context, &gtids, limit).await.map(by_gtid),
                Position::Log(log) => tasks::catch_up_in_log(context, &log, limit).await.map(Some),
            }
        }
        Work::Drain { timeout_ms } => tasks::drain(context, Duration::from_millis(timeout_ms)).await.map(by_gtid),
        Work::Fetch { from, position, timeout_ms } => {
            fetch::fetch(context, &from, &position, Duration::from_millis(timeout_ms)).await.map(by_gtid)
        }
    }
}

fn by_gtid(gtids: Option<Gtids>) -> Option<Position> {
    gtids.map(Position::Gtids)
}

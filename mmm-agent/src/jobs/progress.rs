//! How a job goes, in words, for the core and from there for `mmm_control show`.

use mmm_agent_core::io::Input;
use mmm_common::epoch::Epoch;
use mmm_common::report::JobState;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// Numbers that run are told so often.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub(super) struct Progress {
    id: Epoch,
    inputs: UnboundedSender<Input>,
    last: Arc<Mutex<Option<Instant>>>,
}

impl Progress {
    pub(super) fn new(id: Epoch, inputs: UnboundedSender<Input>) -> Progress {
        Progress { id, inputs, last: Arc::default() }
    }

    pub(super) fn step(&self, step: &str) {
        tracing::debug!("job {}: {step}", self.id);
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.state(JobState::Running { step: step.to_owned() });
    }

    pub(super) fn now_and_then(&self, step: impl FnOnce() -> String) {
        let due = self.last.lock().unwrap_or_else(PoisonError::into_inner).is_none_or(|at| at.elapsed() >= PAUSE);
        if due {
            self.step(&step());
        }
    }

    pub(super) fn state(&self, state: JobState) {
        // The agent ends when nobody takes it.
        let _ended = self.inputs.send(Input::Job { id: self.id, state });
    }
}

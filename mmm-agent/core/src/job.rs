//! Long work on this host's data: saving extra transactions, undoing them, copying another host. It runs beside
//! everything else for minutes or hours, and the path of a failover never waits for it.
//!
//! A job is begun once: after a restart of the agent it counts as failed, since how far it came is not known.

use crate::io::{Output, Step};
use crate::{Core, error, info, warn};
use mmm_common::epoch::Epoch;
use mmm_common::order::{Job, JobWork};
use mmm_common::report::{JobReport, JobState};

impl Core {
    /// The order that no longer names it ends our reporting of one that has ended. One that runs goes on, and replication
    /// stays its business: the monitor may have lost its state. True if something must be on disk before it begins.
    pub(crate) fn begin_job(&mut self, job: Option<Job>, out: &mut Vec<Output>) -> bool {
        let Some(job) = job else {
            self.job.take_if(|(_, state)| !matches!(state, JobState::Running { .. }));
            return false;
        };
        if job.id <= self.last_job {
            if self.job.as_ref().is_none_or(|(mine, _)| mine.id != job.id) {
                let why = "the agent was restarted while it was under way".to_owned();
                self.job = Some((job, JobState::Failed { why }));
                self.report_due = true;
            }
            return false;
        }
        info(out, format!("Job of epoch {}: {}", job.id, describe_job(&job.work)));
        self.last_job = job.id;
        self.job = Some((job, JobState::Running { step: "beginning".to_owned() }));
        self.job_to_start = true;
        true
    }

    /// After the saving of its id.
    pub(crate) fn start_job(&mut self, out: &mut Vec<Output>) {
        if std::mem::take(&mut self.job_to_start)
            && let Some((job, _)) = &self.job
        {
            out.push(Output::Do(Step::Job(job.clone())));
        }
    }

    pub(crate) fn job_went(&mut self, id: Epoch, state: JobState, out: &mut Vec<Output>) {
        let Some((job, mine)) = self.job.as_mut().filter(|(job, _)| job.id == id) else { return };
        let what = describe_job(&job.work);
        match &state {
            JobState::Running { .. } => {}
            JobState::Done { extras: Some(e) } => {
                info(out, format!("Done: {what}: {} transactions are in {}", e.transactions, e.saved));
            }
            JobState::Done { extras: None } => info(out, format!("Done: {what}")),
            JobState::Failed { why } => match job.work {
                JobWork::Save { .. } | JobWork::Undo { .. } => warn(out, format!("Failed: {what}: {why}")),
                JobWork::Reclone { .. } => error(out, format!("Failed: {what}: {why}")),
            },
        }
        self.report_due |= *mine != state;
        // Other data: what was last seen of its position is of the old ones.
        self.position_old |= !matches!(state, JobState::Running { .. }) && !matches!(job.work, JobWork::Save { .. });
        *mine = state;
    }

    pub(crate) fn job_report(&self) -> Option<JobReport> {
        self.job.as_ref().map(|(job, state)| JobReport { id: job.id, state: state.clone() })
    }

    /// The server's data are being changed as a whole: replication is the job's business.
    pub(crate) fn is_rebuilding(&self) -> bool {
        self.job.as_ref().is_some_and(|(job, state)| {
            matches!(state, JobState::Running { .. })
                && matches!(job.work, JobWork::Undo { .. } | JobWork::Reclone { .. })
        })
    }
}

pub(crate) fn describe_job(work: &JobWork) -> String {
    match work {
        JobWork::Save { .. } => "save the transactions that the active master lacks".to_owned(),
        JobWork::Undo { .. } => "undo the transactions that the active master lacks".to_owned(),
        JobWork::Reclone { from } => format!("throw the data away and copy those of {from}"),
    }
}

//! A real agent is ordered a job: how it goes is in its reports, beside everything else, and a restart ends it.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its helpers too")]

mod common;

use common::testnet::TwoHosts;
use common::{Agent, Files, Monitor, server};
use mmm_common::epoch::Epoch;
use mmm_common::gtid::Gtids;
use mmm_common::order::{Job, JobWork, Order, ReplicationOrder};
use mmm_common::report::JobState;
use mmm_common::state::HostState;
use mmm_common::wire::ToAgent;
use std::collections::BTreeMap;

/// Orders the job with each report until it has ended.
fn carry_out(monitor: &mut Monitor, id: u64, work: &JobWork) -> JobState {
    for _ in 0..100 {
        let report = monitor.report();
        match report.job.filter(|job| job.id == Epoch(id)).map(|job| job.state) {
            Some(JobState::Running { .. }) | None => {}
            Some(ended @ (JobState::Done { .. } | JobState::Failed { .. })) => return ended,
        }
        monitor.send(&ToAgent::Order(Order {
            answers: report.anchor,
            lease_ttl_ms: u64::MAX,
            state: HostState::AwaitingRecovery,
            addresses: BTreeMap::new(),
            replication: ReplicationOrder::Keep,
            wait_for_replica: true,
            task: None,
            job: Some(Job { id: Epoch(id), work: work.clone() }),
        }));
    }
    panic!("the job has not ended within 100 reports");
}

fn why(state: JobState) -> String {
    match state {
        JobState::Failed { why } => why,
        JobState::Done { .. } | JobState::Running { .. } => panic!("{state:?}"),
    }
}

#[test]
fn a_job_is_begun_once_and_ends_in_the_reports() {
    let Some(hosts) = TwoHosts::new() else { return };
    server::start(&hosts);
    let files = Files::new();
    let mut agent = Agent::start(&hosts, &files);
    let mut monitor = Monitor::connect(&hosts);
    let gtids = |text: &str| Gtids::MariaDb(text.parse().unwrap());

    let nothing = JobWork::Save { having: gtids("0-1-7"), lacking: gtids("0-1-7") };
    let JobState::Done { extras: Some(extras) } = carry_out(&mut monitor, 3, &nothing) else { panic!() };
    assert_eq!((extras.transactions, extras.list.len()), (0, 0));

    // The server of this story has no binary logs to show.
    let some = JobWork::Save { having: gtids("0-1-7"), lacking: gtids("0-1-5") };
    let failed = why(carry_out(&mut monitor, 4, &some));
    assert!(!failed.is_empty());

    let copy = JobWork::Reclone { from: "db2".into() };
    let failed = why(carry_out(&mut monitor, 5, &copy));
    assert!(failed.contains("mmm_helperd cannot be asked") && failed.contains("helper.sock"), "{failed}");
    agent.logs("Job of epoch 5", 1);

    drop(monitor);
    let _killed = agent.child.kill();
    agent.end();
    let _agent = Agent::start(&hosts, &files);
    let mut monitor = Monitor::connect(&hosts);
    assert!(why(carry_out(&mut monitor, 5, &copy)).contains("the agent was restarted"));
}

//! Stories of one agent: what comes in, what it does, in which order.

use crate::Core;
use crate::io::{Input, Output, Saved, SavedAddress, Side, Step};
use mmm_common::config::{Agent as Config, Cluster, Host, OnHang, Role};
use mmm_common::epoch::{Anchor, Boot, Epoch};
use mmm_common::ids::Millis;
use mmm_common::order::{AddressOrder, Hold, Job, JobWork, Order, ReplicationOrder, Task, Work};
use mmm_common::report::{JobState, Life, ReplicationReport, Report, SemiSync, ServerReport, TaskOutcome, Writing};
use mmm_common::state::{HostMode, HostState, RoleMode};
use mmm_common::vouch::{VouchAnswer, VouchRequest};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

const WRITER: &str = "10.0.0.50";
const READER: &str = "10.0.0.51";

/// An agent on db1 with a kernel that does as it is told; time stands still unless moved.
struct Agent {
    core: Core,
    now: u64,
    kernel: BTreeMap<IpAddr, u32>,
    /// Everything that came out, in order, in short words.
    log: Vec<String>,
    reports: Vec<Report>,
    asked: Option<VouchRequest>,
    probes: Vec<IpAddr>,
    vouches: Vec<VouchAnswer>,
    saved: Option<Saved>,
    /// What address steps answer.
    kernel_fails: bool,
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn config() -> Config {
    let host = |n: u8, peer: &str| Host::of(ip(&format!("10.0.0.{n}")), HostMode::Master, Some(peer.into()));
    let role = |mode, address: &str| Role {
        mode,
        hosts: vec!["db1".into(), "db2".into()],
        ips: vec![ip(address)],
        prefer: None,
    };
    let hosts = BTreeMap::from([("db1".into(), host(11, "db2")), ("db2".into(), host(12, "db1"))]);
    let roles = BTreeMap::from([
        ("writer".into(), role(RoleMode::Exclusive, WRITER)),
        ("reader".into(), role(RoleMode::Balanced, READER)),
    ]);
    Config::of(Cluster::of(hosts, roles), "db1".into())
}

fn server(writing: Writing) -> ServerReport {
    ServerReport { life: Life::Alive, writing, executed: None, replication: None, semisync: None }
}

/// Of a closed server that has this source.
fn replicating(source: &str, io_running: bool, sql_running: bool) -> ServerReport {
    let replication = ReplicationReport {
        source: source.into(),
        port: 3306,
        io_running,
        sql_running,
        received: None,
        behind_ms: None,
        error: String::new(),
    };
    ServerReport { replication: Some(replication), ..server(Writing::ReadOnly) }
}

impl Agent {
    fn new(saved: Option<Saved>, boot: u64) -> Agent {
        Agent::with(&config(), saved, boot, None, Writing::ReadOnly)
    }

    /// With the exact guard, of which nothing is left from a life before, and leases of so many milliseconds.
    fn guarded(saved: Option<Saved>, boot: u64, lease_ttl_ms: u64) -> Agent {
        let mut config = config();
        config.cluster.lease_ttl = Duration::from_millis(lease_ttl_ms);
        Agent::with(&config, saved, boot, Some(BTreeMap::new()), Writing::ReadOnly)
    }

    /// `writing`: what the first look of its life at the server shows; Unknown: there was none yet.
    fn with(
        config: &Config,
        saved: Option<Saved>,
        boot: u64,
        guard: Option<BTreeMap<IpAddr, Millis>>,
        writing: Writing,
    ) -> Agent {
        let core = Core::new(config, saved, Boot(boot), "machine".into(), guard, Millis(10_000));
        let mut a = Agent {
            core,
            now: 10_000,
            kernel: BTreeMap::new(),
            log: vec![],
            reports: vec![],
            asked: None,
            probes: vec![],
            vouches: vec![],
            saved: None,
            kernel_fails: false,
        };
        a.give(Input::MonitorUp);
        if writing != Writing::Unknown {
            a.give(Input::Server(server(writing)));
        }
        a.log.clear();
        a
    }

    fn give(&mut self, input: Input) {
        let mut inputs = vec![input];
        while !inputs.is_empty() {
            let mut out = vec![];
            self.core.handle(Millis(self.now), inputs.remove(0), &mut out);
            for output in out {
                match output {
                    Output::Persist(saved) => {
                        self.saved = Some(saved);
                        self.log.push("save".into());
                    }
                    Output::LookUp { asked } => {
                        inputs.push(Input::Kernel { asked, present: self.kernel.keys().copied().collect() });
                    }
                    Output::Send(report) => {
                        self.log.push("report".into());
                        self.reports.push(*report);
                    }
                    Output::Ask { request, .. } => self.asked = Some(*request),
                    Output::Vouch { answer, .. } => self.vouches.push(*answer),
                    Output::Audit(_) => {}
                    Output::Exit => self.log.push("exit".into()),
                    Output::Do(step) => {
                        let result = if self.kernel_fails { Err("no such device".to_owned()) } else { Ok(()) };
                        match &step {
                            Step::Address { ip, lifetime_s, .. } => {
                                self.log.push(format!("add {ip} {lifetime_s}s"));
                                if result.is_ok() {
                                    self.kernel.insert(*ip, *lifetime_s);
                                }
                                inputs.push(Input::Done { step, result });
                            }
                            Step::Allow { ip, until } => {
                                self.log.push(format!("allow {ip} until {}", until.0));
                                inputs.push(Input::Done { step, result });
                            }
                            Step::Remove { ip, turn_away } => {
                                let how = if *turn_away { "remove" } else { "silently remove" };
                                self.log.push(format!("{how} {ip}"));
                                if result.is_ok() {
                                    self.kernel.remove(ip);
                                }
                                inputs.push(Input::Done { step, result });
                            }
                            Step::Probe { ip } => self.probes.push(*ip),
                            Step::Announce { ip } => self.log.push(format!("announce {ip}")),
                            Step::ReadOnly => self.log.push("read-only".into()),
                            Step::KillServer => self.log.push("kill".into()),
                            Step::Writable { .. } => self.log.push("writable".into()),
                            Step::Follow { host } => self.log.push(format!("follow {host}")),
                            Step::Detach => self.log.push("detach".into()),
                            Step::SemiSync { side, on } => self.log.push(format!("semisync {side:?} {on}")),
                            Step::Task(task) => self.log.push(format!("task {}", task.id)),
                            Step::Job(job) => self.log.push(format!("job {}", job.id)),
                        }
                    }
                }
            }
        }
    }

    /// A server step was carried out; the watcher saw it first.
    fn server_did(&mut self, step: Step, now: Writing) {
        self.give(Input::Server(server(now)));
        self.give(Input::Done { step, result: Ok(()) });
        self.give(Input::Server(server(now)));
    }

    fn after(&mut self, ms: u64) {
        self.now += ms;
        self.give(Input::Tick);
    }

    fn last(&self) -> &Report {
        self.reports.last().unwrap()
    }

    /// What happened since the last call, without the reports.
    fn did(&mut self) -> String {
        let log = std::mem::take(&mut self.log);
        log.into_iter().filter(|l| l != "report").collect::<Vec<_>>().join(", ")
    }

    fn order(&self, addresses: &[(&str, AddressOrder)]) -> Order {
        Order {
            answers: self.last().anchor,
            lease_ttl_ms: 3000,
            state: HostState::Online,
            addresses: addresses.iter().map(|(a, o)| (ip(a), o.clone())).collect(),
            replication: ReplicationOrder::Keep,
            wait_for_replica: true,
            task: None,
            job: None,
        }
    }

    fn hold(&mut self, address: &str, epoch: u64, write: bool) {
        let order = self.order(&[(address, hold(epoch, write, true))]);
        self.give(Input::Order(order));
    }

    /// The writer is here and open, by epoch 5.
    fn writing() -> Agent {
        let mut a = Agent::new(None, 1);
        a.hold(WRITER, 5, true);
        a.server_did(Step::Writable { until: Millis(0) }, Writing::Allowed);
        assert_eq!(a.did(), "save, writable, add 10.0.0.50 3s, announce 10.0.0.50, save");
        a
    }
}

fn hold(epoch: u64, write: bool, proof: bool) -> AddressOrder {
    let granters = BTreeSet::from(["db2".into()]);
    AddressOrder::Hold(Hold { epoch: Epoch(epoch), role: "writer".into(), granters, proof, write })
}

fn let_go(epoch: u64) -> AddressOrder {
    AddressOrder::LetGo { epoch: Epoch(epoch) }
}

#[test]
fn the_epoch_is_saved_then_the_server_opens_then_the_address_comes() {
    Agent::writing();
}

#[test]
fn an_address_of_a_reader_needs_no_open_server() {
    let mut a = Agent::new(None, 1);
    a.hold(READER, 5, false);
    assert_eq!(a.did(), "save, add 10.0.0.51 3s, announce 10.0.0.51");
}

#[test]
fn renewals_save_nothing_and_refresh_the_kernels_lifetime_in_whole_seconds_of_the_rest() {
    let mut a = Agent::new(None, 1);
    a.hold(READER, 5, false);
    a.did();
    a.after(500);
    assert_eq!(a.did(), "", "2.5 s are left; two whole seconds end earlier than what is set");
    a.hold(READER, 5, false);
    assert_eq!(a.did(), "", "the kernel has it for 2.5 s, which is enough for now");
    a.after(999);
    assert_eq!(a.did(), "");
    a.after(1);
    assert_eq!(a.did(), "add 10.0.0.51 2s", "1.5 s were left");
}

#[test]
fn the_kernels_last_lifetime_ends_with_the_lease() {
    let mut a = Agent::new(None, 1);
    a.now += 300;
    a.hold(READER, 5, false);
    assert_eq!(a.did(), "save, add 10.0.0.51 2s, announce 10.0.0.51", "2.7 s of the lease are left");
    while let Some((at, _)) = a.core.next_deadline().filter(|(at, _)| at.0 <= 12_800) {
        a.now = at.0;
        a.give(Input::Tick);
    }
    assert_eq!(a.did(), "add 10.0.0.51 2s, silently remove 10.0.0.51");
}

// lessons.md 1
#[test]
fn without_renewal_the_address_is_gone_before_the_lease_ends_and_then_the_server_is_closed() {
    let mut a = Agent::writing();
    a.after(2_799);
    assert_eq!(a.did(), "");
    a.after(1);
    assert_eq!(a.did(), "silently remove 10.0.0.50, read-only");
    assert!(a.kernel.is_empty());
}

// R13
// lessons.md 4
#[test]
fn a_release_is_not_told_before_the_server_reads_back_as_closed() {
    let mut a = Agent::writing();
    let order = a.order(&[(WRITER, let_go(6))]);
    a.give(Input::Order(order));
    assert_eq!(a.did(), "remove 10.0.0.50, read-only, save", "letting go does not wait for the disk");
    let told = a.last().addresses[&ip(WRITER)];
    assert_eq!((told.seen, told.has()), (Epoch(6), true));
    a.server_did(Step::ReadOnly, Writing::ReadOnly);
    assert!(!a.last().addresses[&ip(WRITER)].has());
}

// lessons.md 12
#[test]
fn a_server_that_has_ended_or_hangs_is_fenced_by_its_address_and_told_at_once() {
    for life in [Life::Dead { why: "refused".into(), restarted: false }, Life::Hung { for_ms: 3000 }] {
        let mut a = Agent::writing();
        a.give(Input::Server(ServerReport { life, writing: Writing::Unknown, ..server(Writing::Unknown) }));
        assert_eq!(a.did(), "remove 10.0.0.50");
        let report = a.last();
        assert_eq!((report.addresses[&ip(WRITER)].has(), report.server.writing), (false, Writing::Unknown));
        // Renewals of the same order do not bring it back while the server is gone.
        a.hold(WRITER, 5, true);
        assert_eq!(a.did(), "");
    }
}

/// Found by the lab on a server that was started again within a quarter of a second: MariaDB had taken back what
/// nobody had acknowledged, a replica had it, and the same GTIDs were written a second time.
#[test]
fn a_server_that_was_started_again_is_not_opened_under_the_order_of_before() {
    let mut a = Agent::writing();
    let dead = Life::Dead { why: "refused".into(), restarted: false };
    a.give(Input::Server(ServerReport { life: dead, ..server(Writing::Unknown) }));
    a.did();
    a.give(Input::Server(server(Writing::ReadOnly)));
    a.hold(WRITER, 5, true);
    // Other granters, not another decision.
    a.hold(WRITER, 6, true);
    assert_eq!(a.did(), "save", "neither opened nor taken");
    assert!(matches!(a.last().server.life, Life::Dead { restarted: true, .. }), "{:?}", a.last().server);
    let order = a.order(&[(WRITER, let_go(7))]);
    a.give(Input::Order(order));
    assert_eq!(a.last().server.life, Life::Alive);
    a.hold(WRITER, 8, true);
    assert_eq!(a.did(), "save, save, writable");
}

#[test]
fn a_server_that_was_started_again_while_no_agent_was_there_is_not_opened_either() {
    let saved = Agent::writing().saved;
    let mut a = Agent::new(saved, 2);
    a.hold(WRITER, 5, true);
    assert_eq!(a.did(), "");
    assert!(matches!(a.last().server.life, Life::Dead { restarted: true, .. }), "{:?}", a.last().server);
}

#[test]
fn a_machine_that_was_rebooted_under_the_order_to_write_does_not_open_its_server_either() {
    let saved = Agent::writing().saved.unwrap();
    let mut a = Agent::new(Some(Saved { machine_boot: "the one before".into(), ..saved }), 2);
    a.hold(WRITER, 5, true);
    a.after(500);
    assert_eq!(a.did(), "");
    assert!(matches!(a.last().server.life, Life::Dead { restarted: true, .. }), "{:?}", a.last().server);
    let order = a.order(&[(WRITER, let_go(7))]);
    a.give(Input::Order(order));
    assert!(!a.saved.as_ref().unwrap().open);
    a.hold(WRITER, 8, true);
    assert_eq!(a.did(), "save, save, writable");
}

// The next life finds a closed server, and that was this one's hand.
#[test]
fn a_server_that_its_own_agent_has_closed_at_its_end_has_not_ended() {
    let mut a = Agent::writing();
    a.give(Input::MonitorDown { why: "gone".into() });
    a.give(Input::Shutdown { keep: false });
    a.after(500);
    a.server_did(Step::ReadOnly, Writing::ReadOnly);
    assert!(a.did().ends_with("exit") && !a.saved.as_ref().unwrap().open);
    let mut next = Agent::new(a.saved.clone(), 2);
    next.hold(WRITER, 5, true);
    assert_eq!(next.did(), "writable");
}

#[test]
fn the_readers_of_a_server_that_was_started_again_stay() {
    let mut a = Agent::writing();
    a.hold(READER, 6, false);
    a.did();
    let dead = Life::Dead { why: "refused".into(), restarted: false };
    a.give(Input::Server(ServerReport { life: dead, ..server(Writing::Unknown) }));
    a.give(Input::Server(server(Writing::ReadOnly)));
    a.did();
    a.hold(READER, 6, false);
    assert_eq!(a.did(), "");
    assert!(a.kernel.contains_key(&ip(READER)), "{:?}", a.kernel);
}

#[test]
fn a_server_that_wakes_without_an_order_is_closed_first() {
    let mut a = Agent::writing();
    a.give(Input::Server(ServerReport { life: Life::Hung { for_ms: 3000 }, ..server(Writing::Unknown) }));
    let order = a.order(&[(WRITER, let_go(6))]);
    a.give(Input::Order(order));
    a.did();
    a.give(Input::Server(server(Writing::Allowed)));
    assert_eq!(a.did(), "read-only");
}

#[test]
fn what_no_order_ever_spoke_about_is_reported_and_not_touched() {
    let mut a = Agent::new(None, 1);
    a.kernel.insert(ip(WRITER), 0);
    a.give(Input::KernelChanged);
    a.give(Input::Server(server(Writing::Allowed)));
    a.after(60_000);
    assert_eq!(a.did(), "");
    assert_eq!(a.last().addresses[&ip(WRITER)].seen, Epoch(0));
    assert!(a.last().addresses[&ip(WRITER)].has());
}

#[test]
fn a_failed_step_is_told_and_tried_again() {
    let mut a = Agent::new(None, 1);
    a.kernel_fails = true;
    a.hold(READER, 5, false);
    assert_eq!(a.did(), "save, add 10.0.0.51 3s");
    assert_eq!(a.last().troubles, ["adding reader(10.0.0.51): no such device"]);
    a.after(299);
    assert_eq!(a.did(), "");
    a.kernel_fails = false;
    a.after(1);
    assert_eq!(a.did(), "add 10.0.0.51 2s, announce 10.0.0.51");
    assert_eq!(a.last().troubles, Vec::<String>::new());
}

// lessons.md 4
#[test]
fn a_failed_removal_is_never_told_as_done() {
    let mut a = Agent::writing();
    a.kernel_fails = true;
    let order = a.order(&[(WRITER, let_go(6))]);
    a.give(Input::Order(order));
    a.server_did(Step::ReadOnly, Writing::ReadOnly);
    assert!(a.last().addresses[&ip(WRITER)].has());
    assert_eq!(a.last().troubles, ["removing writer(10.0.0.50): no such device"]);
}

// lessons.md 7
#[test]
fn orders_of_another_life_and_overtaken_ones_are_not_obeyed() {
    let mut a = Agent::new(None, 7);
    let old = a.order(&[(READER, hold(5, false, true))]);
    a.after(500);
    let newest = a.order(&[(READER, let_go(4))]);
    a.give(Input::Order(newest));
    a.did();
    a.give(Input::Order(old.clone()));
    assert_eq!(a.did(), "", "answers an older report than the order before");
    let other_life = Order { answers: Anchor { boot: Boot(6), ..a.last().anchor }, ..old };
    a.give(Input::Order(other_life));
    assert_eq!(a.did(), "");
}

// lessons.md 10
#[test]
fn a_position_is_told_with_read_only_only_when_both_are_from_one_look() {
    let mut a = Agent::writing();
    let order = a.order(&[(WRITER, let_go(6))]);
    a.give(Input::Order(order));
    a.give(Input::Done { step: Step::ReadOnly, result: Ok(()) });
    assert_eq!((a.last().addresses[&ip(WRITER)].has(), a.last().server.writing), (false, Writing::Unknown));
    a.give(Input::Server(server(Writing::ReadOnly)));
    assert_eq!(a.last().server.writing, Writing::ReadOnly);
}

// lessons.md 10
#[test]
fn the_position_of_a_drain_is_that_of_a_closed_server() {
    let mut a = Agent::writing();
    let task = Task { id: Epoch(7), work: Work::Drain { timeout_ms: 1000 } };
    let order = Order { task: Some(task), ..a.order(&[(WRITER, let_go(6))]) };
    a.give(Input::Order(order));
    assert_eq!(a.did(), "remove 10.0.0.50, read-only, save");
    a.give(Input::Done { step: Step::ReadOnly, result: Ok(()) });
    assert_eq!(a.did(), "task 7");
}

#[test]
fn a_task_is_saved_begun_once_and_told_until_the_order_drops_it() {
    let mut a = Agent::new(None, 1);
    let task = Task { id: Epoch(9), work: Work::Drain { timeout_ms: 1000 } };
    let order = Order { task: Some(task.clone()), ..a.order(&[]) };
    a.give(Input::Order(order.clone()));
    a.give(Input::Order(order.clone()));
    assert_eq!(a.did(), "save, task 9");
    a.give(Input::TaskDone { id: Epoch(9), outcome: TaskOutcome::Done { position: None } });
    assert_eq!(a.last().task.as_ref().unwrap().outcome, TaskOutcome::Done { position: None });
    let dropped = a.order(&[]);
    a.give(Input::Order(dropped));
    a.after(500);
    assert_eq!(a.last().task, None);
    // A process started after it began cannot know how it ended.
    let mut next = Agent::new(a.saved.clone(), 2);
    let order = Order { task: Some(task), ..next.order(&[]) };
    next.give(Input::Order(order));
    assert!(matches!(next.last().task.as_ref().unwrap().outcome, TaskOutcome::Failed { .. }));
    assert_eq!(next.did(), "");
}

#[test]
fn quiescing_has_charge_of_read_only_only_while_its_order_runs() {
    let mut a = Agent::writing();
    let task = Task { id: Epoch(6), work: Work::Quiesce { grace_ms: 1000, timeout_ms: 2000 } };
    let order = Order { task: Some(task), ..a.order(&[(WRITER, hold(6, false, true))]) };
    a.give(Input::Order(order));
    assert_eq!(a.did(), "save, task 6");
    a.after(2_800);
    assert_eq!(a.did(), "silently remove 10.0.0.50, read-only");
}

#[test]
fn replication_is_pointed_where_ordered_and_an_operators_stop_is_respected() {
    let mut a = Agent::new(None, 1);
    let follow = |a: &Agent| Order { replication: ReplicationOrder::Follow { host: "db2".into() }, ..a.order(&[]) };
    a.give(Input::Server(replicating("10.0.0.13", true, true)));
    let order = follow(&a);
    a.give(Input::Order(order));
    assert_eq!(a.did(), "follow db2");
    a.give(Input::Server(replicating("10.0.0.12", true, true)));
    a.give(Input::Done { step: Step::Follow { host: "db2".into() }, result: Ok(()) });
    a.give(Input::Server(replicating("10.0.0.12", false, true)));
    a.after(1_000);
    assert_eq!(a.did(), "", "somebody stopped it; it is not ours to start");
}

#[test]
fn what_a_follow_that_failed_has_stopped_is_started_again_and_nothing_else() {
    // Both threads: the change was late. One: that one has an error, or an operator at work.
    for (io, sql, did) in [(false, false, "follow db2"), (true, false, ""), (false, true, "")] {
        let mut a = Agent::new(None, 1);
        a.give(Input::Server(replicating("10.0.0.13", true, true)));
        let order = Order { replication: ReplicationOrder::Follow { host: "db2".into() }, ..a.order(&[]) };
        a.give(Input::Order(order));
        assert_eq!(a.did(), "follow db2");
        let late = Err("source not changed: no answer within 5 s".to_owned());
        a.give(Input::Done { step: Step::Follow { host: "db2".into() }, result: late });
        a.give(Input::Server(replicating("10.0.0.12", io, sql)));
        a.after(1_000);
        assert_eq!(a.did(), did, "I/O {io}, SQL {sql}");
    }
}

/// The drain had the server for itself, and the source was not forgotten: it would be fetched from after a restart.
#[test]
fn a_detach_that_a_drain_was_in_the_way_of_is_done_after_it() {
    let mut a = Agent::new(None, 1);
    a.give(Input::Server(replicating("10.0.0.12", true, true)));
    let drain = Task { id: Epoch(9), work: Work::Drain { timeout_ms: 30_000 } };
    let order = Order { task: Some(drain), replication: ReplicationOrder::Detached, ..a.order(&[]) };
    a.give(Input::Order(order));
    assert_eq!(a.did(), "save, task 9, detach");
    a.give(Input::Done { step: Step::Detach, result: Err("another change is under way".into()) });
    a.give(Input::Server(replicating("10.0.0.12", false, true)));
    a.after(5_000);
    assert_eq!(a.did(), "");
    a.give(Input::TaskDone { id: Epoch(9), outcome: TaskOutcome::Done { position: None } });
    assert_eq!(a.did(), "detach");
    a.give(Input::Done { step: Step::Detach, result: Ok(()) });
    a.give(Input::Server(replicating("10.0.0.12", false, true)));
    a.after(5_000);
    assert_eq!(a.did(), "", "no more than once");
}

// Chaos, seed 6004: a new master that was killed fetched from the old one at its start, and could not apply its rows.
#[test]
fn whoever_is_to_fetch_from_nobody_forgets_the_source_whose_threads_a_drain_has_stopped() {
    let mut a = Agent::writing();
    let stopped = |waits: bool| {
        let semisync = Some(SemiSync { source: waits, replicas: 1, ..SemiSync::default() });
        ServerReport { semisync, writing: Writing::Allowed, ..replicating("10.0.0.2", false, false) }
    };
    a.give(Input::Server(stopped(false)));
    a.did();
    let order = Order { replication: ReplicationOrder::Detached, ..a.order(&[(WRITER, hold(5, true, true))]) };
    a.give(Input::Order(order));
    assert!(!a.did().contains("detach"), "commits wait for a replica first");
    a.give(Input::Done { step: Step::SemiSync { side: Side::Source, on: true }, result: Ok(()) });
    a.give(Input::Server(stopped(true)));
    assert_eq!(a.did(), "detach");
    a.give(Input::Done { step: Step::Detach, result: Err("the I/O thread is still ending".into()) });
    a.after(500);
    assert!(a.did().contains("detach"), "it is tried again");
    a.give(Input::Done { step: Step::Detach, result: Ok(()) });
    a.did();
    for _ in 0..5 {
        a.now += 1000;
        a.give(Input::Server(stopped(true)));
    }
    assert!(!a.did().contains("detach"), "what could not be forgotten is left as it is");

    let mut other = Agent::new(None, 1);
    let order = Order { replication: ReplicationOrder::Detached, ..other.order(&[(WRITER, let_go(5))]) };
    other.give(Input::Order(order));
    other.did();
    other.give(Input::Server(ServerReport { writing: Writing::ReadOnly, ..stopped(false) }));
    assert!(other.did().contains("detach"), "who does not write has nothing to wait for");
}

/// Found by the chaos campaign: the drain stopped the I/O thread, and nobody started it again.
#[test]
fn a_follow_that_ends_after_a_drain_began_is_done_again_when_ordered() {
    let mut a = Agent::new(None, 1);
    let follow = |a: &Agent| Order { replication: ReplicationOrder::Follow { host: "db2".into() }, ..a.order(&[]) };
    let order = follow(&a);
    a.give(Input::Order(order));
    assert_eq!(a.did(), "follow db2");
    let drain = Task { id: Epoch(9), work: Work::Drain { timeout_ms: 1000 } };
    let order = Order { task: Some(drain), ..a.order(&[]) };
    a.give(Input::Order(order));
    assert_eq!(a.did(), "save, task 9");
    a.give(Input::Server(replicating("10.0.0.12", true, true)));
    a.give(Input::Done { step: Step::Follow { host: "db2".into() }, result: Ok(()) });
    a.give(Input::Server(replicating("10.0.0.12", false, true)));
    a.give(Input::TaskDone { id: Epoch(9), outcome: TaskOutcome::Done { position: None } });
    a.after(5_000);
    assert_eq!(a.did(), "");
    let order = follow(&a);
    a.give(Input::Order(order));
    assert_eq!(a.did(), "follow db2");
}

/// Found by the chaos campaign: hundreds of times a second while the watcher's look was held up.
#[test]
fn what_was_done_to_replication_is_not_done_again_before_it_could_be_seen() {
    let mut a = Agent::new(None, 1);
    let replication = ReplicationReport {
        source: "10.0.0.12".into(),
        port: 3306,
        io_running: true,
        sql_running: true,
        received: None,
        behind_ms: None,
        error: String::new(),
    };
    a.give(Input::Server(ServerReport { replication: Some(replication), ..server(Writing::ReadOnly) }));
    let order = Order { replication: ReplicationOrder::Detached, ..a.order(&[]) };
    a.give(Input::Order(order));
    assert_eq!(a.did(), "detach");
    a.give(Input::Done { step: Step::Detach, result: Ok(()) });
    a.after(1_000);
    assert_eq!(a.did(), "save");
    a.after(2_000);
    assert_eq!(a.did(), "detach", "the server still says that it fetches");
}

/// Found by the chaos campaign: the answer was the rightful new holder's.
#[test]
fn an_answer_on_the_wire_that_comes_after_a_let_go_is_no_conflict() {
    let mut a = Agent::writing();
    assert_eq!(a.probes, [ip(WRITER)]);
    let order = a.order(&[(WRITER, let_go(6))]);
    a.give(Input::Order(order));
    a.give(Input::Probed { ip: ip(WRITER), answered_by: Some("02:00:00:00:00:02".into()) });
    a.after(600);
    assert!(a.last().conflicts.is_empty(), "{:?}", a.last());
}

/// An agent that has just vouched for db2's writer for 4.5 s, asked by an agent without the exact guard.
fn vouching() -> Agent {
    let mut a = Agent::new(None, 1);
    let order = a.order(&[(WRITER, let_go(5))]);
    a.give(Input::Order(order));
    // Past the quarantine of its start.
    a.after(10_000);
    let request = VouchRequest {
        anchor: Anchor { boot: Boot(7), seq: 1 },
        lease_ttl_ms: 3000,
        guarded: false,
        addresses: BTreeMap::from([(ip(WRITER), Epoch(5))]),
    };
    a.give(Input::Asked { ask: crate::io::AskId(1), from: "db2".into(), request });
    assert_eq!(a.vouches[0].vouched, BTreeMap::from([(ip(WRITER), Epoch(5))]));
    a.probes.clear();
    a.did();
    a
}

#[test]
fn who_may_be_the_next_writer_looks_for_the_last_one_before_its_promise_ends_and_takes_without_another_look() {
    let mut a = vouching();
    a.after(4_200);
    assert_eq!(a.probes, Vec::<IpAddr>::new(), "nobody is looked for while the holder may still ask");
    a.after(150);
    assert_eq!(a.probes, [ip(WRITER)]);
    a.give(Input::Probed { ip: ip(WRITER), answered_by: None });
    a.after(200);
    let order = a.order(&[(WRITER, hold(6, true, false))]);
    a.give(Input::Order(order));
    assert_eq!((a.probes.len(), a.did().contains("writable")), (1, true), "{:?}", a.last());
}

#[test]
fn who_answers_to_a_look_ahead_is_no_conflict_and_is_looked_for_again_before_the_take() {
    let mut a = vouching();
    a.after(4_350);
    a.give(Input::Probed { ip: ip(WRITER), answered_by: Some("02:00:00:00:00:02".into()) });
    a.after(200);
    assert_eq!((a.probes.len(), a.last().conflicts.len()), (1, 0), "it may be the rightful one");
    let order = a.order(&[(WRITER, hold(6, true, false))]);
    a.give(Input::Order(order));
    assert_eq!((a.probes.len(), a.did().contains("writable")), (2, false));
    a.give(Input::Probed { ip: ip(WRITER), answered_by: None });
    assert!(a.did().contains("writable"));
}

#[test]
fn ending_asks_the_monitor_to_move_the_roles_and_exits_when_they_are_gone() {
    let mut a = Agent::writing();
    a.give(Input::Shutdown { keep: false });
    assert_eq!(a.did(), "");
    assert!(a.last().leaving && a.last().addresses[&ip(WRITER)].present);
    let order = a.order(&[(WRITER, let_go(6))]);
    a.give(Input::Order(order));
    assert_eq!(a.did(), "remove 10.0.0.50, read-only, save");
    a.server_did(Step::ReadOnly, Writing::ReadOnly);
    assert_eq!(a.did(), "save, exit");
    assert_eq!((a.last().addresses[&ip(WRITER)].seen, a.last().addresses[&ip(WRITER)].has()), (Epoch(6), false));
}

#[test]
fn ending_without_a_monitor_gives_everything_back_tells_it_and_only_then_exits() {
    let mut a = Agent::writing();
    a.give(Input::MonitorDown { why: "closed".into() });
    a.give(Input::Shutdown { keep: false });
    assert_eq!(a.did(), "remove 10.0.0.50, read-only");
    a.server_did(Step::ReadOnly, Writing::ReadOnly);
    assert_eq!(a.did(), "save, exit");
}

#[test]
fn ending_beside_a_monitor_that_does_not_move_the_roles_lets_go_after_five_seconds() {
    let mut a = Agent::writing();
    a.give(Input::Shutdown { keep: false });
    for _ in 0..9 {
        a.after(500);
        a.hold(WRITER, 5, true);
    }
    assert!(!a.did().contains("remove"));
    a.after(500);
    assert_eq!(a.did(), "remove 10.0.0.50, read-only");
    a.server_did(Step::ReadOnly, Writing::ReadOnly);
    assert_eq!(a.did(), "save, exit");
    assert!(a.last().leaving && !a.last().addresses[&ip(WRITER)].has());
}

#[test]
fn ending_for_an_upgrade_keeps_the_address_and_the_next_life_goes_on_with_it() {
    let mut a = Agent::writing();
    a.give(Input::Shutdown { keep: true });
    assert_eq!(a.did(), "save, exit");
    let mut next =
        Agent { kernel: a.kernel.clone(), ..Agent::with(&config(), a.saved.clone(), 2, None, Writing::Unknown) };
    next.give(Input::KernelChanged);
    next.give(Input::Server(server(Writing::Allowed)));
    assert_eq!(next.did(), "");
    next.hold(WRITER, 5, true);
    assert_eq!(next.did(), "add 10.0.0.50 3s", "the lifetime is refreshed, nothing else changes");
}

// R13: the end of an older step says nothing about a newer one that is under way.
#[test]
fn a_release_is_not_told_while_the_server_is_being_opened() {
    let mut a = Agent::writing();
    let order = a.order(&[(WRITER, let_go(6))]);
    a.give(Input::Order(order));
    assert_eq!(a.did(), "remove 10.0.0.50, read-only, save");
    // The watcher sees it closed before the step's end is told, and a new order comes in between.
    a.give(Input::Server(server(Writing::ReadOnly)));
    a.hold(WRITER, 7, true);
    assert_eq!(a.did(), "save, writable");
    a.give(Input::Done { step: Step::ReadOnly, result: Ok(()) });
    // The worker is opening the server now.
    let order = a.order(&[(WRITER, let_go(8))]);
    a.give(Input::Order(order));
    let told = a.last().addresses[&ip(WRITER)];
    assert_eq!((told.seen, told.has()), (Epoch(8), true));
}

// R9: who has no memory cannot know what it must not vouch for.
#[test]
fn who_has_never_heard_of_an_address_vouches_for_nobody() {
    let mut a = Agent::new(None, 1);
    let request = VouchRequest {
        anchor: Anchor { boot: Boot(7), seq: 1 },
        lease_ttl_ms: 3000,
        guarded: false,
        addresses: BTreeMap::from([(ip(WRITER), Epoch(5))]),
    };
    a.give(Input::Asked { ask: crate::io::AskId(1), from: "db2".into(), request });
    assert_eq!(a.vouches[0].vouched, BTreeMap::new());
}

// A lost state file must not leave a server open that nobody minds.
#[test]
fn an_address_of_which_only_the_kernels_mark_is_left_is_given_up_and_the_server_closed() {
    let forgotten = SavedAddress { forgotten: true, ..Default::default() };
    let mut a =
        Agent::new(Some(Saved { addresses: BTreeMap::from([(ip(WRITER), forgotten)]), ..Default::default() }), 1);
    a.kernel.insert(ip(WRITER), 3);
    a.give(Input::Server(server(Writing::Allowed)));
    a.give(Input::KernelChanged);
    assert_eq!(a.did(), "read-only, remove 10.0.0.50");
}

/// MySQL's clone needs super_read_only off; read_only stays on, so nobody can write meanwhile.
#[test]
fn while_a_copy_is_under_way_read_only_and_replication_are_the_jobs_business() {
    let mut a = Agent::new(None, 1);
    let order = |a: &Agent, job| Order {
        replication: ReplicationOrder::Follow { host: "db2".into() },
        job,
        ..a.order(&[(WRITER, let_go(6))])
    };
    let job = Some(Job { id: Epoch(7), work: JobWork::Reclone { from: "db2".into() } });
    a.give(Input::Order(order(&a, None)));
    a.server_did(Step::Follow { host: "db2".into() }, Writing::ReadOnly);
    a.did();
    a.give(Input::Order(order(&a, job.clone())));
    assert_eq!(a.did(), "save, job 7");
    a.give(Input::Server(server(Writing::Allowed)));
    a.after(2_500);
    assert_eq!(a.did(), "");
    assert!(!a.last().addresses[&ip(WRITER)].open, "it is not the writer for that");
    a.give(Input::Job { id: Epoch(7), state: JobState::Done { extras: None } });
    assert_eq!(a.did(), "read-only, follow db2");
    // Named again it is not begun again.
    a.give(Input::Order(order(&a, job)));
    assert_eq!(a.did(), "");
}

// data-safety.md, "Semi-synchronous replication"
#[test]
fn commits_wait_from_when_a_replica_is_there_until_the_monitor_says_that_none_is() {
    let mut a = Agent::writing();
    let semisync = |source, replicas| {
        let semisync = SemiSync { source, replicas, replica: true, after_sync: true, ..SemiSync::default() };
        Input::Server(ServerReport { semisync: Some(semisync), ..server(Writing::Allowed) })
    };
    a.give(semisync(false, 0));
    assert_eq!(a.did(), "", "the first commit would wait out the timeout");
    a.give(semisync(false, 1));
    assert_eq!(a.did(), "semisync Source true");
    a.give(Input::Done { step: Step::SemiSync { side: Side::Source, on: true }, result: Ok(()) });
    a.give(semisync(true, 0));
    assert_eq!(a.did(), "", "an isolated writer acknowledges nothing alone");
    let order = Order { wait_for_replica: false, ..a.order(&[(WRITER, hold(5, true, true))]) };
    a.give(Input::Order(order));
    assert_eq!(a.did(), "semisync Source false");
    a.give(Input::Done { step: Step::SemiSync { side: Side::Source, on: false }, result: Ok(()) });
    a.give(semisync(false, 1));
    assert_eq!(a.did(), "", "that one is not in line, says the monitor");
    a.hold(WRITER, 5, true);
    assert_eq!(a.did(), "semisync Source true");
}

#[test]
fn semi_sync_is_left_alone_where_it_is_not_to_be_touched() {
    let mut config = config();
    config.cluster.semisync = false;
    let mut a = Agent::writing();
    a.core = Core::new(&config, None, Boot(2), "machine".into(), None, Millis(a.now));
    a.give(Input::MonitorUp);
    a.did();
    let semisync = SemiSync { replicas: 1, ..SemiSync::default() };
    a.give(Input::Server(ServerReport { semisync: Some(semisync), ..server(Writing::ReadOnly) }));
    assert!(!a.did().contains("semisync"));
}

#[test]
fn with_the_guard_each_renewal_lets_the_address_answer_for_as_long_as_its_lease() {
    let mut a = Agent::guarded(None, 1, 3000);
    a.hold(READER, 5, false);
    assert_eq!(a.did(), "save, add 10.0.0.51 3s, announce 10.0.0.51");
    a.now += 100;
    a.give(Input::KernelChanged);
    a.hold(READER, 5, false);
    assert_eq!(a.did(), "", "it is armed for 2.9 s: a tenth of a second can wait");
    a.now += 10;
    a.asked = None;
    a.after(500);
    let anchor = a.asked.as_ref().unwrap().anchor;
    let answer = VouchAnswer {
        anchor,
        lease_ttl_ms: 2700,
        vouched: BTreeMap::from([(ip(READER), Epoch(5))]),
        refused: BTreeMap::new(),
    };
    a.give(Input::Vouched { by: "db2".into(), answer });
    assert_eq!(a.did(), "allow 10.0.0.51 until 13310", "the kernel has it for long enough");
}

#[test]
fn the_little_that_is_added_to_a_lease_is_armed_when_nobody_renews_it_any_more() {
    let mut a = Agent::guarded(None, 1, 300);
    a.hold(READER, 5, false);
    a.did();
    a.now += 10;
    a.give(Input::KernelChanged);
    a.hold(READER, 5, false);
    assert_eq!(a.did(), "");
    while let Some((at, _)) = a.core.next_deadline().filter(|(at, _)| at.0 <= 10_150) {
        a.now = at.0;
        a.give(Input::Tick);
    }
    assert_eq!((a.now, a.did()), (10_150, "allow 10.0.0.51 until 10310".into()));
}

#[test]
fn with_the_guard_a_lease_may_be_shorter_than_a_second() {
    let mut a = Agent::guarded(None, 1, 300);
    a.hold(READER, 5, false);
    assert_eq!(a.did(), "save, add 10.0.0.51 1s, announce 10.0.0.51");
    for _ in 0..14 {
        a.now += 50;
        a.give(Input::KernelChanged);
        a.hold(READER, 5, false);
    }
    let until: Vec<u64> = (1..=14).map(|n| 10_300 + 50 * n).collect();
    let allowed: Vec<String> = until.iter().map(|at| format!("allow 10.0.0.51 until {at}")).collect();
    assert_eq!(a.did(), allowed.join(", "), "the kernel has it for a second, which outlasts these leases");
    a.now += 50;
    a.give(Input::KernelChanged);
    a.hold(READER, 5, false);
    assert_eq!(a.did(), "add 10.0.0.51 1s");
    a.after(269);
    assert_eq!(a.did(), "");
    a.after(1);
    assert_eq!(a.did(), "silently remove 10.0.0.51", "a tenth of the lease before its end");
}

// Orders of a life with the guard are waited out for less time than the kernel needs without it.
#[test]
fn a_life_without_the_guard_gives_up_what_one_with_it_has_left() {
    let mut a = Agent::guarded(None, 1, 3000);
    a.hold(READER, 5, false);
    assert!(a.saved.as_ref().unwrap().guarded);
    let mut next = Agent { kernel: a.kernel.clone(), ..Agent::new(a.saved.clone(), 2) };
    next.give(Input::KernelChanged);
    assert_eq!(next.did(), "remove 10.0.0.51");
    assert!(next.saved.is_some_and(|s| !s.guarded));
    assert!(!next.reports.last().unwrap().guarded);
}

// What is not on disk before it is told, a next life would take for guarded orders.
#[test]
fn whether_the_guard_is_up_is_on_disk_before_it_is_told() {
    let before = Agent::guarded(None, 1, 3000);
    let saved = before.saved.clone().unwrap();
    for (saved, guard) in [(None, Some(BTreeMap::new())), (Some(saved), None)] {
        let guarded = guard.is_some();
        let mut core = Core::new(&config(), saved, Boot(2), "machine".into(), guard, Millis(10_000));
        let mut told = Vec::new();
        for input in [Input::MonitorUp, Input::Kernel { asked: 1, present: BTreeSet::new() }] {
            let mut out = vec![];
            core.handle(Millis(10_000), input, &mut out);
            told.extend(out.into_iter().filter_map(|output| match output {
                Output::Persist(saved) => Some(("saved", saved.guarded)),
                Output::Send(report) => Some(("told", report.guarded)),
                Output::LookUp { .. }
                | Output::Ask { .. }
                | Output::Vouch { .. }
                | Output::Do(_)
                | Output::Audit(_)
                | Output::Exit => None,
            }));
        }
        assert_eq!(told, [("saved", guarded), ("told", guarded)]);
    }
}

// safety.md, R9: whoever waits for the end of a guarded lease does not wait for the kernel's late second.
#[test]
fn what_a_guarded_life_has_left_is_good_for_as_long_as_the_guard_is_still_armed() {
    let mut a = Agent::guarded(None, 1, 3000);
    a.hold(WRITER, 5, true);
    a.server_did(Step::Writable { until: Millis(0) }, Writing::Allowed);
    a.did();
    let armed = BTreeMap::from([(ip(WRITER), Millis(11_000))]);
    let next = || {
        let kernel = a.kernel.clone();
        let guard = Some(armed.clone());
        let mut next = Agent { kernel, ..Agent::with(&config(), a.saved.clone(), 2, guard, Writing::Unknown) };
        next.give(Input::KernelChanged);
        next.give(Input::Server(server(Writing::Allowed)));
        next
    };
    let mut alone = next();
    alone.after(799);
    assert_eq!(alone.did(), "");
    alone.after(1);
    assert_eq!(alone.did(), "silently remove 10.0.0.50, read-only", "200 ms before its end");
    let mut renewed = next();
    renewed.hold(WRITER, 5, true);
    assert_eq!(renewed.did(), "add 10.0.0.50 3s");
    let nothing = Some(BTreeMap::new());
    let kernel = a.kernel.clone();
    let mut late = Agent { kernel, ..Agent::with(&config(), a.saved.clone(), 2, nothing, Writing::Unknown) };
    late.give(Input::KernelChanged);
    late.give(Input::Server(server(Writing::Allowed)));
    assert_eq!(late.did(), "silently remove 10.0.0.50, read-only", "nothing is inherited that is not armed any more");
}

#[test]
fn an_arming_that_failed_is_tried_again_well_within_the_lease() {
    let mut a = Agent::guarded(None, 1, 300);
    a.hold(READER, 5, false);
    a.did();
    a.kernel_fails = true;
    a.now += 50;
    a.give(Input::KernelChanged);
    a.hold(READER, 5, false);
    assert_eq!(a.did(), "allow 10.0.0.51 until 10350");
    a.after(29);
    assert_eq!(a.did(), "");
    a.kernel_fails = false;
    a.after(1);
    assert_eq!(a.did(), "allow 10.0.0.51 until 10350", "although the lease is the same");
}

#[test]
fn an_address_whose_lifetime_cannot_be_refreshed_answers_all_the_same() {
    let mut a = Agent::guarded(None, 1, 3000);
    a.hold(READER, 5, false);
    a.did();
    a.kernel_fails = true;
    a.now += 2000;
    a.give(Input::KernelChanged);
    a.hold(READER, 5, false);
    assert_eq!(a.did(), "add 10.0.0.51 3s, allow 10.0.0.51 until 15000");
}

#[test]
fn a_lease_that_has_become_shorter_is_armed_shorter() {
    let mut a = Agent::guarded(None, 1, 3000);
    a.hold(READER, 5, false);
    a.did();
    let mut order = a.order(&[(READER, hold(6, false, true))]);
    order.lease_ttl_ms = 1000;
    a.give(Input::Order(order));
    assert_eq!(a.did(), "save, add 10.0.0.51 1s", "armed until 11000, and the kernel removes it sooner too");
}

// A removal may take a tenth of a second.
#[test]
fn a_renewal_does_not_wait_for_another_addresss_removal() {
    let mut a = Agent::guarded(None, 1, 300);
    let order = a.order(&[(READER, hold(5, false, true)), (WRITER, hold(5, false, true))]);
    a.give(Input::Order(order));
    a.did();
    a.now += 50;
    a.give(Input::KernelChanged);
    // The writer's has been let go of before, and is still here.
    let order = a.order(&[(READER, hold(5, false, true))]);
    a.give(Input::Order(order));
    assert_eq!(a.did(), "allow 10.0.0.51 until 10350");
}

#[test]
fn a_promise_to_whom_the_guard_ends_in_time_is_shorter() {
    for (guarded, lease_ttl_ms, promised) in [(false, 3000, 4500), (true, 3000, 3200), (true, 9000, 10_500)] {
        let mut a = Agent::new(None, 1);
        let order = a.order(&[(WRITER, let_go(5))]);
        a.give(Input::Order(order));
        // The quarantine of the start is over.
        a.after(60_000);
        let anchor = Anchor { boot: Boot(7), seq: 1 };
        let addresses = BTreeMap::from([(ip(WRITER), Epoch(5))]);
        let request = VouchRequest { anchor, lease_ttl_ms, guarded, addresses };
        a.give(Input::Asked { ask: crate::io::AskId(1), from: "db2".into(), request });
        a.give(Input::KernelChanged);
        assert_eq!(a.last().addresses[&ip(WRITER)].promised_ms, promised, "{guarded} {lease_ttl_ms}");
    }
}

#[test]
fn a_hung_server_that_may_be_writable_is_killed_after_its_address_has_left_if_so_configured() {
    for (on_hang, then) in [(OnHang::Kill, "remove 10.0.0.50, kill"), (OnHang::Fence, "remove 10.0.0.50")] {
        let mut config = config();
        config.cluster.on_hang = on_hang;
        let mut a = Agent::with(&config, None, 1, None, Writing::ReadOnly);
        a.hold(WRITER, 5, true);
        a.server_did(Step::Writable { until: Millis(0) }, Writing::Allowed);
        a.did();
        let hung = ServerReport { life: Life::Hung { for_ms: 3000 }, ..server(Writing::Allowed) };
        a.give(Input::Server(hung.clone()));
        assert_eq!(a.did(), then);
        a.give(Input::Server(hung.clone()));
        assert_eq!(a.did(), "", "once: the answer is not there yet");
        if on_hang == OnHang::Kill {
            a.give(Input::Done { step: Step::KillServer, result: Err("no helper".into()) });
            a.after(500);
            assert_eq!(a.did(), "kill", "it is tried again");
        }
    }
    let mut config = config();
    config.cluster.on_hang = OnHang::Kill;
    let mut reader = Agent::with(&config, None, 1, None, Writing::ReadOnly);
    reader.hold(READER, 5, false);
    reader.did();
    reader.give(Input::Server(ServerReport { life: Life::Hung { for_ms: 3000 }, ..server(Writing::ReadOnly) }));
    assert_eq!(reader.did(), "remove 10.0.0.51", "it can commit nothing");
}

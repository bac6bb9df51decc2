//! The kernel's watchdog in the hands of the real `mmm_agentd` (safety.md, guards, 5): held and fed while the host may
//! be writing, disarmed by every end but a crash. A FIFO stands for the device, the test for the kernel and the monitor.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its helpers too")]

mod common;

use common::testnet::TwoHosts;
use common::{Agent, Files, Monitor, PATIENCE, hold, server, until};
use mmm_common::order::Hold;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

/// The kernel's side of the device.
struct Device(File);

impl Device {
    fn new(files: &Files) -> Device {
        let path = files.path("watchdog");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let state = files.path("state/agent.state");
        files.write(
            "mmm_agent.toml",
            &format!(
                "include = [\"mmm_common.toml\"]\nthis = \"db1\"\n[agent]\nstate_path = {state:?}\nwatchdog_device = {path:?}\n"
            ),
        );
        Device(OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path).unwrap())
    }

    /// What was written since the last look.
    fn food(&mut self) -> String {
        let mut all = Vec::new();
        if let Err(e) = self.0.read_to_end(&mut all) {
            assert_eq!(e.kind(), ErrorKind::WouldBlock, "{e}");
        }
        String::from_utf8(all).unwrap()
    }
}

fn renew_while(monitor: &mut Monitor, order: &Hold, mut on: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while on() {
        assert!(Instant::now() < end, "not within {} s", PATIENCE.as_secs());
        let report = monitor.report();
        monitor.order(report.anchor, order.clone());
    }
}

#[test]
fn it_is_held_while_writing_and_disarmed_by_every_end_but_a_crash() {
    let Some(hosts) = TwoHosts::new() else { return };
    let files = Files::new();
    let mut device = Device::new(&files);
    server::start(&hosts);
    let writing = |epoch| Hold { write: true, ..hold(epoch) };

    let mut agent = Agent::start(&hosts, &files);
    let mut monitor = Monitor::connect(&hosts);
    assert_eq!(device.food(), "", "nothing to guard yet");
    let mut food = String::new();
    renew_while(&mut monitor, &writing(5), || {
        food += &device.food();
        food.len() < 3
    });
    assert!(food.chars().all(|c| c == '.'), "{food}");
    agent.logs("watchdog is held", 1);

    // An upgrade: the next process holds it again, as soon as it goes on with the role.
    agent.signal(Signal::SIGUSR2);
    assert!(agent.end().success(), "{}", agent.log());
    let end = device.food();
    assert!(end.ends_with('V'), "{end:?}");
    let mut agent = Agent::start(&hosts, &files);
    let mut monitor = Monitor::connect(&hosts);
    renew_while(&mut monitor, &writing(5), || device.food().is_empty());

    agent.child.kill().unwrap();
    agent.end();
    assert!(!device.food().contains('V'), "the kernel would reset the machine");

    // A planned end, with the role given back.
    let mut agent = Agent::start(&hosts, &files);
    let mut monitor = Monitor::connect(&hosts);
    renew_while(&mut monitor, &writing(6), || device.food().is_empty());
    agent.signal(Signal::SIGTERM);
    let mut food = String::new();
    let gone = until(|| {
        food += &device.food();
        food.ends_with('V')
    });
    assert!(gone, "{food:?}: {}", agent.log());
    assert!(agent.end().success(), "{}", agent.log());
}

//! The monitor's process in the simulated world: its core, its disk, its checks, and its ends.
//!
//! What the core has put out is done in order; a stopped process does nothing, and finds all that came meanwhile when
//! it goes on.

use super::{Event, Kills, World};
use crate::invariants::Seen;
use mmm_agent_core::io::Input as AgentInput;
use mmm_common::epoch::Epoch;
use mmm_common::ids::HostName;
use mmm_common::state::{CheckKind, CheckResult};
use mmm_mon_core::io::{Input as MonInput, Output as MonOutput};
use mmm_mon_core::{Core as MonCore, Snapshot};
use std::time::Duration;

impl World {
    pub fn stop_monitor(&mut self) {
        self.monitor = None;
        self.monitor_stopped = false;
        self.monitor_pile.clear();
        for host in self.hosts.values_mut() {
            host.linked = false;
        }
        let names: Vec<HostName> = self.hosts.keys().cloned().collect();
        for name in names {
            self.agent_input(&name, AgentInput::MonitorDown { why: "closed".into() });
        }
    }

    pub fn start_monitor(&mut self) {
        let saved = self.saved.clone().map(|(s, at)| (s, Duration::from_millis(self.now - at)));
        let now = self.monitor_clock.shows(self.now);
        let unix_s = self.wall_clock.unwrap_or((self.now - (1 << 40)) / 1000 + 1_000_000);
        self.monitor = Some(MonCore::new(self.config.clone(), saved, unix_s, now));
        self.monitor_tick = None;
        self.monitor_stopped = false;
        self.queue.retain(|_, e| !matches!(e, Event::Link(_) | Event::Network));
        let names: Vec<HostName> = self.hosts.keys().cloned().collect();
        for name in names {
            self.after(super::network::DELAY * 3, Event::Link(name));
        }
        self.after(1, Event::Network);
        self.plan_monitor_tick(self.now + 1);
    }

    pub fn has_monitor(&self) -> bool {
        self.monitor.is_some()
    }

    /// SIGHUP, with the configuration as it was.
    pub fn reload(&mut self) {
        self.monitor_input(MonInput::Reload(Box::new(self.config.clone())));
    }

    /// SIGSTOP, or a machine that stands still while its clock goes on.
    pub fn pause_monitor(&mut self) {
        self.monitor_stopped = self.monitor.is_some();
    }

    pub fn resume_monitor(&mut self) {
        if !std::mem::take(&mut self.monitor_stopped) {
            return;
        }
        // The shell handles a deadline that has come before any input that waits.
        self.monitor_input(MonInput::Tick);
        for input in std::mem::take(&mut self.monitor_pile) {
            self.monitor_input(input);
        }
    }

    pub fn monitor_is_paused(&self) -> bool {
        self.monitor_stopped
    }

    /// The monitor's disk is lost.
    pub fn forget_status(&mut self) {
        self.saved = None;
        self.seen.push(Seen::MonitorDiskReplaced);
    }

    /// The monitor's disk is put back to an older state.
    pub fn restore_status(&mut self, snapshot: Snapshot) {
        let now = self.now;
        self.saved = Some((snapshot, now));
        self.seen.push(Seen::MonitorDiskReplaced);
    }

    pub fn saved(&self) -> Option<&Snapshot> {
        self.saved.as_ref().map(|(s, _)| s)
    }

    /// kill_host_bin says that it has killed the host. True if it was called for this one.
    pub fn confirm_kill(&mut self, name: &str) -> bool {
        let Some((host, asked)) = self.kill.take().filter(|(host, _)| host.as_str() == name) else { return false };
        self.monitor_input(MonInput::Killed { host, asked, result: Ok(()) });
        true
    }

    /// Kills that are under way will fail, and so will all others.
    pub fn end_kills(&mut self) {
        if self.kills == Kills::Told {
            return;
        }
        self.kills = Kills::Fail;
        for event in self.queue.values_mut() {
            if let Event::Kill(_, _, works) = event {
                *works = false;
            }
        }
    }

    fn plan_monitor_tick(&mut self, at: u64) {
        let at = at.max(self.now + 1);
        if self.monitor_tick != Some(at) {
            self.monitor_tick = Some(at);
            self.after(at - self.now, Event::MonitorTick);
        }
    }

    pub(super) fn check_network(&mut self) {
        self.after(1000, Event::Network);
        if !self.monitor_stopped {
            self.monitor_input(MonInput::Network { reachable: self.network });
        }
    }

    pub(super) fn check(&mut self, name: &HostName) {
        self.after(1000, Event::Check(name.clone()));
        if self.monitor.is_none() || self.monitor_stopped {
            return;
        }
        let Some(host) = self.hosts.get(name) else { return };
        let reached = host.alive && self.is_reached(name);
        let serves = reached && host.server.answers();
        let threads = host.server.io && host.server.sql && self.source_answers(name);
        let verdict = |ok: bool, why: &str| {
            if ok { CheckResult::Ok(String::new()) } else { CheckResult::Error(why.to_owned()) }
        };
        let unknown = || CheckResult::Unknown("no answer".into());
        for (check, result) in [
            (CheckKind::Ping, verdict(reached, "no echo reply")),
            (CheckKind::Mysql, verdict(serves, "no answer")),
            (CheckKind::RepThreads, if serves { verdict(threads, "a thread is not running") } else { unknown() }),
            (CheckKind::RepBacklog, if serves { verdict(true, "") } else { unknown() }),
        ] {
            self.monitor_input(MonInput::Check { host: name.clone(), check, result });
        }
    }

    pub(super) fn monitor_input(&mut self, input: MonInput) {
        if self.monitor.is_some() && self.monitor_stopped {
            self.monitor_pile.push(input);
            return;
        }
        let now = self.monitor_clock.shows(self.now);
        let Some(core) = &mut self.monitor else { return };
        let mut out = Vec::new();
        core.handle(now, input, &mut out);
        let deadline = core.next_deadline();
        for output in out {
            match output {
                MonOutput::Persist(snapshot) => {
                    self.saves += 1;
                    self.saved = Some((*snapshot, self.now));
                    self.seen.push(Seen::Saved);
                }
                MonOutput::Send { host, order } => {
                    let ms = self.delivery(&host, true);
                    self.send(ms, Event::Order(host, order));
                }
                MonOutput::Kill { host, asked, .. } => {
                    self.tell(format!("kill_host {host}"));
                    if self.kills == Kills::Told {
                        self.kill = Some((host, asked));
                    } else {
                        let (ms, works) = (self.any(3_000), self.any(2) == 0);
                        self.after(ms, Event::Kill(host, asked, works));
                    }
                }
                MonOutput::Reply { id, answer } => {
                    self.answers.insert(id.0, answer);
                }
                MonOutput::Audit(line) => {
                    let epoch = line.epoch.map(|e| format!(" [{e}]")).unwrap_or_default();
                    let host = line.host.map(|h| format!("{h}: ")).unwrap_or_default();
                    self.tell(format!("monitor{epoch}: {host}{}", line.text));
                }
            }
        }
        if let Some((at, _)) = deadline {
            self.plan_monitor_tick(self.monitor_clock.when(at));
        }
    }

    /// The program has cut the host's power, or could not; its result comes later.
    pub(super) fn kill_host(&mut self, name: HostName, asked: Epoch, works: bool) {
        let result = if works && self.kills == Kills::Chance {
            self.tell(format!("==== kill_host cuts the power of {name}"));
            self.crash_host(name.as_str());
            Ok(())
        } else {
            self.tell(format!("==== kill_host cannot reach {name}"));
            Err("no answer from its power supply".to_owned())
        };
        let ms = 1 + self.any(if works { 2_000 } else { 10_000 });
        self.after(ms, Event::Killed(name, asked, result));
    }
}

//! The deciding part of `mmm_agentd`. See ../../../ARCHITECTURE.md.

pub mod io;

use io::{Input, Output, Saved};
use mmm_common::config::Agent as Config;
use mmm_common::epoch::Boot;
use mmm_common::ids::Millis;

#[derive(Debug)]
pub struct Core {}

impl Core {
    /// `boot` names this life of the process: never used before by this agent. `machine_boot` is the kernel's boot id.
    pub fn new(_config: &Config, _saved: Option<Saved>, _boot: Boot, _machine_boot: String, _now: Millis) -> Self {
        Core {}
    }

    pub fn handle(&mut self, _now: Millis, _input: Input, _out: &mut Vec<Output>) {}

    /// When to send a `Tick`, and what for.
    pub fn next_deadline(&self) -> Option<(Millis, &'static str)> {
        None
    }
}

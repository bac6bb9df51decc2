//! The deciding part of `mmm_mond`. See ../../../ARCHITECTURE.md.

pub mod io;

use io::{Input, Output};
use mmm_common::config::Monitor as Config;
use mmm_common::ids::Millis;

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Snapshot {}

#[derive(Debug)]
pub struct Core {}

impl Core {
    /// `saved`: the last snapshot and how long ago it was saved, by wall clock. `unix_s`: wall time at start, used
    /// only to number the first epoch when there is no snapshot (R11).
    pub fn new(_config: Config, _saved: Option<(Snapshot, std::time::Duration)>, _unix_s: u64, _now: Millis) -> Self {
        Core {}
    }

    pub fn handle(&mut self, _now: Millis, _input: Input, _out: &mut Vec<Output>) {}

    /// When to send a `Tick`, and what for.
    pub fn next_deadline(&self) -> Option<(Millis, &'static str)> {
        None
    }
}

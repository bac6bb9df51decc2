//! The words that the monitor, the agents and `mmm_control` share.
//!
//! Nothing here does network I/O or knows the time. Read in this order: [`ids`], [`epoch`], [`state`],
//! [`order`] (monitor to agent), [`report`] (agent to monitor), then [`wire`] and [`frame`] for how they travel,
//! [`control`] for what an operator may ask, and [`config`] for the files.

pub mod config;
pub mod control;
pub mod epoch;
pub mod examine;
pub mod frame;
pub mod gtid;
pub mod ids;
pub mod order;
pub mod position;
pub mod refusals;
pub mod report;
pub mod safeguard;
pub mod slots_file;
pub mod state;
pub mod vouch;
pub mod wire;

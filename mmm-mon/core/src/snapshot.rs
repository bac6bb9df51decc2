//! What survives a restart of the monitor: decisions, states, the mode. Saved before it is acted on.

use crate::losses::Return;
use crate::slot::SlotState;
use crate::states::HostStatus;
use crate::writers::Writers;
use mmm_common::epoch::Epoch;
use mmm_common::ids::{HostName, Millis};
use mmm_common::state::MonitorMode;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The last epoch used.
    pub epoch: Epoch,
    pub mode: MonitorMode,
    /// Why the mode is passive.
    pub cause: Option<String>,
    pub hosts: BTreeMap<HostName, HostStatus>,
    pub slots: BTreeMap<IpAddr, SlotState>,
    /// Who was seen open for writes last: the data others are compared with.
    pub active: Option<HostName>,
    /// Roles that an operator prepared in passive mode, or asked for.
    pub intent: BTreeMap<IpAddr, HostName>,
    /// The longest lease, in milliseconds, that may have been given: waited out by the next life (R10), which may have a
    /// shorter lease_ttl in its configuration.
    #[serde(default)]
    pub lease_ttl_ms: u64,
    /// When a preference moved the writer, within flap_duration.
    #[serde(default)]
    pub preferred_moves: Vec<Millis>,
    /// Who may have written since `active` was seen open.
    #[serde(default)]
    pub writers: Writers,
    /// What is known of, and done about, hosts with transactions that others lack.
    #[serde(default)]
    pub returns: BTreeMap<HostName, Return>,
    /// On the saving monitor's clock; every other time in here is before it.
    pub saved_at: Millis,
}

impl Snapshot {
    /// Moves all times onto a new clock, on which the saving happened `ago` before `now`.
    pub(crate) fn on_clock(mut self, now: Millis, ago: Duration) -> Self {
        let saved_at = self.saved_at;
        let shift = |t: &mut Millis| *t = now - ago - saved_at.since(*t);
        for host in self.hosts.values_mut() {
            shift(&mut host.since);
            host.falls.iter_mut().for_each(shift);
            host.flapping_since.iter_mut().for_each(shift);
            host.lost_writer.iter_mut().for_each(shift);
            host.down.iter_mut().for_each(|down| shift(&mut down.at));
        }
        self.preferred_moves.iter_mut().for_each(shift);
        self.writers.shift(shift);
        self.returns.values_mut().for_each(|r| r.shift(shift));
        self.saved_at = now - ago;
        self
    }

    /// Whether anything but the time of saving differs.
    pub(crate) fn differs(&self, other: &Snapshot) -> bool {
        let mut other = other.clone();
        other.saved_at = self.saved_at;
        // How far a job is changes all the time, and is told anew.
        for (name, ret) in &mut other.returns {
            if let Some(mine) = self.returns.get(name) {
                ret.progress.clone_from(&mine.progress);
            }
        }
        *self != other
    }
}

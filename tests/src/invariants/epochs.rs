//! Epochs never go back, on any agent's disk nor on the monitor's (safety.md, R4, R9, R10). Only a monitor's disk that was
//! lost, or put back by hand, may begin anew.

use super::Seen;
use crate::world::World;
use mmm_common::epoch::Epoch;
use mmm_common::ids::HostName;
use std::collections::BTreeMap;
use std::net::IpAddr;

#[derive(Default)]
pub(super) struct Epochs {
    agents: BTreeMap<HostName, BTreeMap<IpAddr, Epoch>>,
    tasks: BTreeMap<HostName, Epoch>,
    slots: BTreeMap<IpAddr, Epoch>,
    monitor: Epoch,
}

impl Epochs {
    pub(super) fn look(&mut self, world: &World) -> Result<(), String> {
        if !world.seen.iter().any(|seen| matches!(seen, Seen::Saved | Seen::MonitorDiskReplaced)) {
            return Ok(());
        }
        for (name, host) in &world.hosts {
            let Some(saved) = &host.saved else { continue };
            forward(|| format!("the last task on the disk of {name}"), newest(&mut self.tasks, name), saved.task)?;
            if !self.agents.contains_key(name) {
                self.agents.insert(name.clone(), BTreeMap::new());
            }
            let Some(addresses) = self.agents.get_mut(name) else { continue };
            for (ip, address) in &saved.addresses {
                let before = addresses.entry(*ip).or_default();
                forward(|| format!("the epoch of {ip} on the disk of {name}"), before, address.seen)?;
            }
        }
        if world.seen.iter().any(|seen| matches!(seen, Seen::MonitorDiskReplaced)) {
            (self.slots, self.monitor) = (BTreeMap::new(), Epoch(0));
        }
        if let Some((saved, _)) = &world.saved {
            forward(|| "the last epoch on the monitor's disk".to_owned(), &mut self.monitor, saved.epoch)?;
            for (ip, slot) in &saved.slots {
                let before = self.slots.entry(*ip).or_default();
                forward(|| format!("the epoch of {ip} on the monitor's disk"), before, slot.epoch)?;
            }
        }
        Ok(())
    }
}

fn newest<'m>(epochs: &'m mut BTreeMap<HostName, Epoch>, name: &HostName) -> &'m mut Epoch {
    if !epochs.contains_key(name) {
        epochs.insert(name.clone(), Epoch(0));
    }
    epochs.get_mut(name).expect("it was put there")
}

/// `what` is put into words only when it is wrong: this is looked at after every event.
fn forward(what: impl FnOnce() -> String, before: &mut Epoch, now: Epoch) -> Result<(), String> {
    if now < *before {
        return Err(format!("EPOCH GOES BACK: {} was {before} and is {now}", what()));
    }
    *before = now;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{breaks, cluster, writer};
    use super::*;

    #[test]
    fn a_disk_that_forgets_an_epoch_is_found() {
        let mut w = cluster();
        w.seen.push(Seen::Saved);
        let mut epochs = Epochs::default();
        assert_eq!(epochs.look(&w), Ok(()));
        let saved = w.host("db1").saved.clone();
        let address = |w: &mut World| {
            let saved = w.host("db1").saved.as_mut().expect("something is saved");
            saved.addresses.get_mut(&writer()).expect("the writer").seen.0 -= 1;
        };
        address(&mut w);
        breaks(epochs.look(&w), "EPOCH GOES BACK: the epoch of 10.0.0.50 on the disk of db1");
        w.host("db1").saved = saved;
        assert_eq!(epochs.look(&w), Ok(()));
        w.saved.as_mut().expect("something is saved").0.epoch.0 -= 1;
        breaks(epochs.look(&w), "EPOCH GOES BACK: the last epoch on the monitor's disk");
    }

    #[test]
    fn a_lost_disk_of_the_monitor_may_begin_anew() {
        let mut w = cluster();
        w.seen.push(Seen::Saved);
        let mut epochs = Epochs::default();
        assert_eq!(epochs.look(&w), Ok(()));
        w.saved.as_mut().expect("something is saved").0.epoch.0 -= 1;
        w.seen.push(Seen::MonitorDiskReplaced);
        assert_eq!(epochs.look(&w), Ok(()));
    }
}

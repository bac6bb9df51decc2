//! Nothing is present that the monitor's disk knows nothing of (safety.md, R3 and R7): `live` names everybody who may be
//! acting on an order, before the order is sent, and for as long as the address may be there.
//!
//! An address whose answers the exact guard holds back is not there for anybody: it may wait for the kernel to remove it.
//! A machine that stands still is not looked at: another host's "has it" clears its orders (R8 b), and it loses the
//! address when it wakes, before it answers anybody.

use crate::world::World;

pub(super) fn look(world: &World) -> Result<(), String> {
    // A disk that was lost knows nothing until the next monitor has started.
    let Some((saved, _)) = &world.saved else { return Ok(()) };
    for (name, host) in world.hosts.iter().filter(|(_, h)| h.answers()) {
        for ip in host.kernel.keys().filter(|ip| host.answers_for(**ip, world.now)) {
            if !saved.slots.get(ip).is_some_and(|slot| slot.live.iter().any(|o| o.to == *name)) {
                return Err(format!("NOT ORDERED: {ip} is on {name} without a trace on the monitor's disk"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{breaks, cluster, writer};
    use super::*;

    #[test]
    fn an_address_that_nobody_has_noted_is_found() {
        let mut w = cluster();
        assert_eq!(look(&w), Ok(()));
        let (saved, _) = w.saved.as_mut().expect("something is saved");
        saved.slots.get_mut(&writer()).expect("the writer").live.clear();
        breaks(look(&w), "NOT ORDERED");
    }
}

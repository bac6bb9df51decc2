//! `live` stays small: what is acknowledged is cleared (safety.md, R8), so the monitor's disk does not grow with the
//! number of decisions. Between two acknowledgements of a silent host only a few decisions are made.

use crate::world::World;

/// More orders than any story needs.
const MOST: usize = 30;

pub(super) fn look(world: &World) -> Result<(), String> {
    for (ip, slot) in world.saved.iter().flat_map(|(saved, _)| &saved.slots) {
        if slot.live.len() >= MOST {
            return Err(format!("LIVE GROWS: {ip} has {} orders: {:?}", slot.live.len(), slot.live));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{breaks, cluster, writer};
    use super::*;

    #[test]
    fn orders_that_are_never_cleared_are_found() {
        let mut w = cluster();
        assert_eq!(look(&w), Ok(()));
        let (saved, _) = w.saved.as_mut().expect("something is saved");
        let live = &mut saved.slots.get_mut(&writer()).expect("the writer").live;
        while live.len() < MOST {
            live.push(live[0].clone());
        }
        breaks(look(&w), "LIVE GROWS");
    }
}

//! What must be true of the decisions after every input, whatever came in. A broken one ends the process: the agents then
//! live on their leases, which is safer than a monitor that goes on with a state it does not understand.

use crate::slot::SlotState;
use mmm_common::epoch::Epoch;

/// Why this address's decisions make no sense; None: they do. `newest`: the last epoch used for anything.
pub(crate) fn broken(slot: &SlotState, newest: Epoch) -> Option<String> {
    if slot.epoch > newest {
        return Some(format!("epoch {} was never given out; the newest is {newest}", slot.epoch));
    }
    if let Some(order) = slot.live.iter().find(|o| o.epoch > slot.epoch) {
        return Some(format!(
            "{} may act on epoch {}, decided after the newest decision {}",
            order.to, order.epoch, slot.epoch
        ));
    }
    match &slot.holder {
        None if slot.write => Some("nobody holds it, and it may be written through".to_owned()),
        // R3: what is sent is in `live`, so that nobody is granted past it.
        Some(holder) if !slot.live.iter().any(|o| o.to == *holder && o.epoch == slot.epoch) => {
            Some(format!("{holder} holds it by epoch {}, which is not among the orders to wait for", slot.epoch))
        }
        Some(_) | None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slot::{Given, Granters};

    fn check(change: impl FnOnce(&mut SlotState), expected: Option<&str>) {
        let given = Given { epoch: Epoch(5), to: "db1".into(), granters: Granters::Unknown };
        let mut slot = SlotState {
            role: "writer".into(),
            epoch: Epoch(5),
            holder: Some("db1".into()),
            write: true,
            live: vec![given],
            given: Epoch(5),
        };
        change(&mut slot);
        let found = broken(&slot, Epoch(7));
        assert_eq!(found.is_some(), expected.is_some(), "{found:?}");
        assert!(found.unwrap_or_default().contains(expected.unwrap_or_default()));
    }

    #[test]
    fn each_is_noticed() {
        check(|_| {}, None);
        check(|s| s.epoch = Epoch(8), Some("never given out"));
        check(|s| s.live[0].epoch = Epoch(6), Some("decided after"));
        check(|s| s.live.clear(), Some("not among the orders"));
        check(|s| s.holder = Some("db2".into()), Some("not among the orders"));
        check(|s| s.holder = None, Some("nobody holds it"));
    }
}

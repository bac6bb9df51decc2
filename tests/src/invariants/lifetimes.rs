//! No address outlives the longest lease that its agent ever had by more than the kernel's own lateness (safety.md,
//! guards, 1): that is what the margin stands on when the agent is dead or stopped.

use super::ledger::Ledger;
use crate::world::World;
use crate::world::kernel::KERNEL_LATE;

/// Every conversion between clocks rounds up.
const ROUNDING: u64 = 5;

pub(super) fn look(world: &World, ledger: &Ledger) -> Result<(), String> {
    for (name, host) in world.hosts.iter().filter(|(_, h)| h.answers()) {
        let Some(book) = ledger.books.get(name) else { continue };
        for (ip, gone) in &host.kernel {
            let Some(page) = book.pages.get(ip) else { continue };
            let lease = host.clock.when(page.longest) + ROUNDING;
            if let Some(until) = host.allowed.as_ref().and_then(|tables| tables.get(ip)).filter(|until| **until > lease)
            {
                return Err(format!(
                    "ANSWERS LONGER: {ip} may answer on {name} for {} ms more than its lease",
                    until - lease
                ));
            }
            // The guard ends the answers, so a lifetime is a whole second at least.
            let latest = lease + KERNEL_LATE + if host.allowed.is_some() { 1_000 } else { 0 };
            if *gone > latest {
                return Err(format!("OUTLIVES: {ip} stays on {name} for {} ms more than its lease", gone - latest));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Invariants;
    use super::super::tests::{breaks, cluster, writer};
    use super::*;

    #[test]
    fn a_lifetime_beyond_the_lease_is_found() {
        let mut w = cluster();
        let invariants: &Invariants = w.invariants();
        assert_eq!(look(&w, &invariants.ledger), Ok(()));
        *w.host("db1").kernel.get_mut(&writer()).expect("it is there") += 4_000;
        breaks(look(&w, &w.invariants().ledger), "OUTLIVES: 10.0.0.50 stays on db1");
    }
}

//! Never two hosts that answer for one address. It is what everything else is for.
//!
//! A machine without power or that stands still answers nobody.

use crate::world::World;
use mmm_common::ids::HostName;
use std::collections::BTreeMap;
use std::net::IpAddr;

pub(super) fn look(world: &World) -> Result<(), String> {
    let mut seen: BTreeMap<IpAddr, &HostName> = BTreeMap::new();
    for (name, host) in world.hosts.iter().filter(|(_, h)| h.answers()) {
        for ip in host.kernel.keys().filter(|ip| host.answers_for(**ip, world.now)) {
            if let Some(other) = seen.insert(*ip, name) {
                return Err(format!("TWO HOLDERS: {ip} is on {other} and on {name}"));
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
    fn a_second_kernel_with_the_address_is_found() {
        let mut w = cluster();
        assert_eq!(look(&w), Ok(()));
        let until = w.now + 1_000;
        w.host("db2").kernel.insert(writer(), until);
        breaks(look(&w), "TWO HOLDERS");
        w.freeze_host("db2", true);
        assert_eq!(look(&w), Ok(()), "who stands still does not answer");
    }
}

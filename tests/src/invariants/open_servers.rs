//! Never two servers that can be written to, when both have answered their running agents for a while (safety.md, R13).
//!
//! A server that hung, or whose agent was gone, may be open for the moment until its agent has closed it. In a story
//! without failures (`strict`) not even that.

use crate::world::World;

/// How soon a running agent has closed a server that answers and that it has no right to keep open: the agent's wait
/// after a step that failed while the server did not answer (0.5 s), looks at the server and a step.
const CLOSED_WITHIN: u64 = 1000;

/// Notes since when each agent has had its server in hand.
pub(super) fn note(world: &mut World) {
    for (name, host) in &mut world.hosts {
        let refuses = world.refuse_steps.iter().any(|(refuser, _)| refuser == name);
        if host.answers() && host.server.answers() && !refuses && host.runs() {
            host.minded_since.get_or_insert(world.now);
        } else {
            host.minded_since = None;
        }
    }
}

pub(super) fn look(world: &World) -> Result<(), String> {
    let minded = |since: Option<u64>| since.is_some_and(|since| world.now - since >= CLOSED_WITHIN);
    let open: Vec<&str> = world
        .hosts
        .iter()
        .filter(|(_, host)| !host.server.read_only && (world.strict || minded(host.minded_since)))
        .map(|(name, _)| name.as_str())
        .collect();
    if open.len() > 1 { Err(format!("BOTH OPEN: {open:?} are writable")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{breaks, cluster};
    use super::*;

    #[test]
    fn a_second_open_server_is_found_once_its_agent_had_the_time_to_close_it() {
        let mut w = cluster();
        assert_eq!(look(&w), Ok(()));
        w.host("db2").server.read_only = false;
        breaks(look(&w), "BOTH OPEN");
        w.host("db2").minded_since = Some(w.now);
        assert_eq!(look(&w), Ok(()));
        w.strict = true;
        breaks(look(&w), "BOTH OPEN");
    }
}

//! Whether each host's data are a part of the active master's (data-safety.md, "When the old master comes back").

use crate::io::Output;
use crate::states::Compared;
use crate::{Core, error, info};
use mmm_common::ids::{HostName, Millis};
use mmm_common::state::HostState;
use std::time::Duration;

/// A host's data are called extra only if the active master still lacks them after this long: both sides' positions
/// are samples, and the younger one may have travelled faster.
const COMPARE_FOR: Duration = Duration::from_secs(3);

impl Core {
    pub(crate) fn compared(&self, name: &HostName) -> Compared {
        match (&self.active, self.hosts.get(name)) {
            (Some(active), Some(_)) if active != name && self.is_unsettled(name) => Compared::Open,
            (Some(active), Some(host)) if active != name => host.compared,
            (Some(_) | None, _) => Compared::Needless,
        }
    }

    /// Compares every host's data with the active master's, until they are known to be a part of them.
    pub(crate) fn compare(&mut self, now: Millis, out: &mut Vec<Output>) {
        let Some(active) = self.active.clone() else { return };
        let Some(at_active) = self.hosts.get(&active).filter(|h| h.facts.link.is_some()) else { return };
        let heard_active = at_active.facts.heard;
        let Some(there) = at_active.facts.executed().cloned() else { return };
        for (name, host) in self.hosts.iter_mut().filter(|(name, h)| **name != active && h.compared != Compared::Subset)
        {
            if host.facts.link.is_none() || host.status.state == HostState::HardOffline {
                continue;
            }
            // While it may still be written to (or a statement may still be inside it), more can come.
            let Some(here) = host.facts.executed_for_good().cloned() else { continue };
            let (sample, at) = host.sample.get_or_insert_with(|| (here.clone(), now));
            let verdict = match there.missing(sample) {
                Some(0) => Compared::Subset,
                Some(n) if heard_active >= *at + COMPARE_FOR => Compared::Extra(n),
                Some(_) | None => Compared::Open,
            };
            if matches!(verdict, Compared::Extra(_)) {
                host.extra = Some((sample.clone(), there.clone()));
                // The next sample may look different: somebody may have undone them.
                host.sample = Some((here, now));
            }
            if verdict == host.compared || verdict == Compared::Open {
                continue;
            }
            host.compared = verdict;
            match verdict {
                Compared::Subset => {
                    info(out, Some(name), format!("{name} has nothing that the active master {active} lacks"))
                }
                Compared::Extra(n) => error(
                    out,
                    Some(name),
                    format!(
                        "{name} has {n} transactions that the active master {active} lacks: it stays out until they are saved and it is re-cloned, or they are undone"
                    ),
                ),
                Compared::Open | Compared::Needless => {}
            }
        }
    }
}

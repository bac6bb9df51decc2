//! Whether each host's data are a part of the active master's (data-safety.md, "When the old master comes back").

use crate::io::Output;
use crate::states::Compared;
use crate::{Core, Host, error, info};
use mmm_common::ids::{HostName, Millis};
use mmm_common::state::{HostMode, HostState};
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

    /// A MariaDB that was started with init_rpl_role=SLAVE and goes on fetching from after what it has thrown away looks
    /// well and lacks it for ever (tried, 10.11 and 11.8). Of masters only: they log all that they apply.
    pub(crate) fn find_holes(&mut self, out: &mut Vec<Output>) {
        let Some(active) = self.active.clone() else { return };
        let Some(there) = self.hosts.get(&active).and_then(|h| h.facts.executed().cloned()) else { return };
        let masters = &self.config.cluster.hosts;
        for (name, host) in self.hosts.iter_mut().filter(|(name, _)| **name != active) {
            if masters.get(name).is_none_or(|h| h.mode != HostMode::Master) || host.facts.fresh_report().is_none() {
                continue;
            }
            // What it has and others lack comes first: that has to be saved. And then a higher number proves nothing.
            let here = host.facts.executed().filter(|here| there.missing(here) == Some(0));
            let n = here.map_or(0, |here| here.gone_past(&there));
            match host.compared {
                Compared::Lacks(_) if n == 0 => host.compared = Compared::Open,
                Compared::Lacks(before) if before == n => {}
                Compared::Subset | Compared::Open | Compared::Lacks(_) if n > 0 => {
                    let known = matches!(host.compared, Compared::Lacks(_));
                    host.compared = Compared::Lacks(n);
                    if known {
                        continue;
                    }
                    let text = format!(
                        "{name} lacks {n} transactions of the active master {active} and has gone past them: they will never come, and it stays out until it is copied anew (reclone {name} --from {active})"
                    );
                    error(out, Some(name), text);
                }
                Compared::Subset | Compared::Open | Compared::Lacks(_) | Compared::Extra(_) | Compared::Needless => {}
            }
        }
    }

    /// Compares every host's data with the active master's, until they are known to be a part of them.
    pub(crate) fn compare(&mut self, now: Millis, out: &mut Vec<Output>) {
        let Some(active) = self.active.clone() else { return };
        let Some(at_active) = self.hosts.get(&active).filter(|h| h.facts.fresh_report().is_some()) else { return };
        let heard_active = at_active.facts.heard;
        let Some(there) = at_active.facts.executed().cloned() else { return };
        let known = |h: &Host| matches!(h.compared, Compared::Subset | Compared::Lacks(_));
        for (name, host) in self.hosts.iter_mut().filter(|(name, h)| **name != active && !known(h)) {
            // Who was given the writer after the active master is what others will be compared with.
            let writers = &self.handover.writers;
            let given = writers.given() == Some(name) || writers.earlier().contains(name);
            if host.facts.fresh_report().is_none() || host.status.state == HostState::HardOffline || given {
                continue;
            }
            if let Some(ahead) = self.returns.get(name).and_then(|ret| ret.ahead.as_ref())
                && host.facts.executed().and_then(|here| here.missing(&ahead.having)) == Some(0)
            {
                let n = ahead.lacking.missing(&ahead.having).unwrap_or_default();
                host.extra = Some((ahead.having.clone(), ahead.lacking.clone()));
                if host.compared != Compared::Extra(n) {
                    host.compared = Compared::Extra(n);
                    host.in_line = false;
                    tell_extra(name, &active, n, out);
                }
                continue;
            }
            // While it may still be written to (or a statement may still be inside it), more can come.
            let Some(here) = host.facts.has_for_good() else { continue };
            let (sample, at) = host.sample.get_or_insert_with(|| (here.clone(), now));
            let verdict = match there.missing(sample) {
                Some(0) => Compared::Subset,
                Some(n) if heard_active >= *at + COMPARE_FOR => Compared::Extra(n),
                Some(_) | None => Compared::Open,
            };
            if matches!(verdict, Compared::Extra(_)) {
                host.in_line = false;
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
                    // What it had before it was undone or copied anew is not missed.
                    host.facts.received_once = None;
                    info(out, Some(name), format!("{name} has nothing that the active master {active} lacks"))
                }
                Compared::Extra(n) => tell_extra(name, &active, n, out),
                Compared::Open | Compared::Needless | Compared::Lacks(_) => {}
            }
        }
    }
}

fn tell_extra(name: &HostName, active: &HostName, n: u64, out: &mut Vec<Output>) {
    let text = format!(
        "{name} has {n} transactions that the active master {active} lacks: it stays out until they are saved and it is re-cloned, or they are undone"
    );
    error(out, Some(name), text);
}

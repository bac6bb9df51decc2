//! Who may have written since the writer was last seen open, and what was last heard of them: their data count in a
//! failover, however soon they lost the role and whatever has become of them since. Survives a restart.

use crate::handover::HostView;
use mmm_common::gtid::Gtids;
use mmm_common::ids::{HostName, Millis};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Who had the writer for no longer than this, unseen, and died with it, is not waited for: what it may have written has
/// reached nobody, and would keep the cluster closed for as long as it is away.
const UNSEEN: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writers {
    given: Option<Given>,
    /// Who was given it before that and was not seen open either: the successor may die with what it had fetched from them.
    #[serde(default)]
    earlier: BTreeSet<HostName>,
    /// Who has let go in order since, and what it had then for good, as far as it has said that.
    words: BTreeMap<HostName, Option<Gtids>>,
}

/// Given the writer, and not seen open yet: it may have been.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Given {
    host: HostName,
    /// None: not by this monitor, as far as it knows.
    at: Option<Millis>,
    /// When it last showed that it was alive, once the writer was taken from it.
    until: Option<Millis>,
    /// It lacked something itself.
    short: bool,
}

impl Writers {
    pub(crate) fn given(&self) -> Option<&HostName> {
        self.given.as_ref().map(|given| &given.host)
    }

    pub(crate) fn earlier(&self) -> &BTreeSet<HostName> {
        &self.earlier
    }

    pub(crate) fn was_short(&self, host: &HostName) -> bool {
        self.given.as_ref().is_some_and(|given| given.host == *host && given.short)
    }

    pub(crate) fn give(&mut self, host: &HostName, at: Millis, short: bool) {
        self.words.remove(host);
        self.earlier.extend(self.given.take().map(|before| before.host));
        self.earlier.remove(host);
        self.given = Some(Given { host: host.clone(), at: Some(at), until: None, short });
    }

    /// It holds the writer, and this monitor has not seen it open.
    pub(crate) fn find(&mut self, host: &HostName) {
        if self.given() != Some(host) {
            self.given = Some(Given { host: host.clone(), at: None, until: None, short: false });
        }
    }

    /// The writer is taken from this host, which was last seen alive then.
    pub(crate) fn take(&mut self, host: &HostName, alive: Millis) {
        if let Some(given) = self.given.as_mut().filter(|given| given.host == *host) {
            given.until = Some(alive);
        }
    }

    /// What a host that does not hold the writer says.
    pub(crate) fn hear(&mut self, host: &HostName, view: &HostView<'_>) {
        if view.let_go && self.words.get(host).is_none_or(Option::is_none) {
            self.words.insert(host.clone(), view.for_good.clone());
        }
    }

    /// Somebody is seen open: everybody is compared with that one from now on.
    pub(crate) fn opened(&mut self) {
        *self = Writers::default();
    }

    /// Of somebody who had the writer and cannot be asked: whether somebody with `mine` has everything of it. None: it
    /// died with the role, and what it had not sent is on nobody else.
    pub(crate) fn last_word(&self, host: &HostName, to: &HostName, mine: &Gtids) -> Option<Result<(), String>> {
        match self.words.get(host) {
            Some(Some(theirs)) => Some(match mine.missing(theirs) {
                Some(0) => Ok(()),
                Some(n) => Err(format!("{host} wrote {n} transactions that {to} lacks, and cannot be asked")),
                None => Err(format!("{host} has GTIDs of another kind, and cannot be asked")),
            }),
            Some(None) => Some(Err(format!(
                "{host} has let go of the writer, has not said since what it has, and cannot be asked"
            ))),
            None => {
                let given = self.given.as_ref().filter(|given| given.host == *host)?;
                let had = given.at.zip(given.until).map(|(at, until)| until.since(at));
                if had.is_some_and(|had| had < UNSEEN) {
                    return None;
                }
                let long = had.map_or_else(String::new, |had| format!(" for {} s", had.as_secs()));
                Some(Err(format!(
                    "{host} had the writer{long} without being seen, has not said what it wrote, and cannot be asked"
                )))
            }
        }
    }

    pub(crate) fn shift(&mut self, mut shift: impl FnMut(&mut Millis)) {
        if let Some(given) = &mut self.given {
            given.at.iter_mut().chain(&mut given.until).for_each(&mut shift);
        }
    }
}

//! The operator of a campaign: attentive, with nothing at hand but `mmm_control`, and a service manager that starts again
//! what has died. It sets waiting hosts online, and brings hosts back in line whose rows are not the active master's: by
//! turns with `set_online --accept-lost` and with `reclone`, as the manual says.
//!
//! It never changes anything on a server by SQL, and never starts a server that is stopped for a copy. Before it lets
//! rows be discarded it writes down which they are, for the verdict.

use super::plan::Who;
use super::{Anew, Field, ROUND_TRIP, lock};
use crate::lab::network::DB;
use crate::lab::{server, state_in};
use anyhow::{Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// A host must be shown as not being in line for so long before anything is done about it.
const TROUBLE_FOR: Duration = Duration::from_secs(6);
/// A replica that has stopped has this long to get over it: a move of the writer may be under way.
const NO_FETCH_FOR: Duration = Duration::from_secs(12);
/// Between two commands for the same host; what was ordered shows itself sooner.
const AGAIN: Duration = Duration::from_secs(4);
const SET_ONLINE_AGAIN: Duration = Duration::from_secs(2);
/// A copy ends the server and starts it again within seconds here. After this long, far longer than any fault, nobody
/// else is going to start it.
const STOPPED_FOR: Duration = Duration::from_secs(60);
/// A server that has ended by itself: a copy may have begun which nobody has told of yet.
const ENDED_FOR: Duration = Duration::from_secs(4);
/// How long a command that was accepted counts as a copy under way before `show` tells of it.
const ORDERED_FOR: Duration = Duration::from_secs(10);
/// Without a writer for so long, far longer than any fault, the operator forces one, and the verdict says so.
const STUCK: Duration = Duration::from_secs(75);

/// What an attentive operator does, until told to stop.
pub(super) fn operate(field: &Field<'_>, seed: u64) {
    let mut operator = Operator { field, turn: seed, hosts: BTreeMap::new(), gone: BTreeMap::new(), no_writer: None };
    while !field.stop.load(Ordering::Relaxed) {
        thread::sleep(ROUND_TRIP);
        operator.start_what_died();
        let Ok(show) = field.lab.control(&["show"]) else { continue };
        if show.ok() {
            operator.read(&show.text);
        }
        operator.see_to_writer(&show.text);
    }
}

struct Operator<'a> {
    field: &'a Field<'a>,
    /// Odd and even: which of the two commands comes next.
    turn: u64,
    hosts: BTreeMap<&'static str, Care>,
    /// Programs that do not run, and since when that is seen.
    gone: BTreeMap<(&'static str, &'static str), Instant>,
    no_writer: Option<Instant>,
}

/// What is kept in mind of one host.
#[derive(Clone, Debug, Default)]
struct Care {
    /// The trouble that `show` tells of, and since when.
    trouble: Option<(Trouble, Instant)>,
    /// The last command for it.
    asked: Option<Instant>,
    /// A command that replaces its data was accepted.
    ordered: Option<Instant>,
    /// `show` says that its data are being replaced.
    is_copied: bool,
    /// As its own server says it, and since when.
    replication: Option<(Trouble, Instant)>,
    /// It was taken offline so that it can be copied anew.
    for_copy: Option<Trouble>,
}

/// What keeps a host out of line until the operator speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// It has transactions that the active master lacks.
    Extra,
    /// It lacks some that it has gone past.
    Lacks,
    /// A copy has failed, or waits for something that may never come.
    Copy,
    /// What it would have to fetch next is no longer to be had.
    NoFetch,
    /// What it has received does not fit its rows.
    NoApply,
}

impl Trouble {
    fn words(self) -> &'static str {
        match self {
            Trouble::Extra => "has rows of its own",
            Trouble::Lacks => "lacks rows for good",
            Trouble::Copy => "was not copied",
            Trouble::NoFetch => "cannot fetch any more",
            Trouble::NoApply => "cannot apply any more",
        }
    }
}

impl Operator<'_> {
    // ---- hosts ---------------------------------------------------------------------------------------------------

    fn read(&mut self, shown: &str) {
        let states: BTreeMap<&'static str, String> =
            DB.into_iter().filter_map(|h| Some((h, state_in(shown, h)?))).collect();
        if states.len() == DB.len() {
            *lock(&self.field.online) = states.clone();
        }
        for (host, state) in states {
            let under_way = under_way_in(shown, host);
            let replication = self.replication_trouble(host);
            let care = self.hosts.entry(host).or_default();
            care.is_copied = under_way == Some(UnderWay::Copy);
            let seen = trouble_in(shown, host).or(replication).or(care.for_copy);
            care.trouble = seen.map(|trouble| match care.trouble {
                Some((before, since)) if before == trouble => (trouble, since),
                Some(_) | None => (trouble, Instant::now()),
            });
            if under_way.is_some() {
                continue;
            }
            match care.trouble {
                Some((trouble, since)) if since.elapsed() > TROUBLE_FOR => self.bring_in_line(host, &state, trouble),
                Some(_) => {}
                None => self.set_online(host, &state),
            }
        }
    }

    fn set_online(&mut self, host: &'static str, state: &str) {
        let waits = match state {
            "AWAITING_RECOVERY" => true,
            "ADMIN_OFFLINE" => !lock(&self.field.busy).contains(&(host, "offline")),
            _ => false,
        };
        if waits && !self.was_ordered(host) && self.may_ask(host, SET_ONLINE_AGAIN) {
            let (_, answer) = self.tell(&["set_online", host]);
            self.field.timeline.note(format!("operator: set_online {host} ({state}): {answer}"));
        }
    }

    /// Whether nothing was said about the host for so long. Then something is said now.
    fn may_ask(&mut self, host: &'static str, again: Duration) -> bool {
        let care = self.hosts.entry(host).or_default();
        let may = care.asked.is_none_or(|at| at.elapsed() > again);
        if may {
            care.asked = Some(Instant::now());
        }
        may
    }

    /// Whether it was accepted, as far as that is known, and what was said.
    fn tell(&self, words: &[&str]) -> (Told, String) {
        match self.field.lab.control(words) {
            Ok(answer) => {
                let told = match answer.code {
                    0 => Told::Accepted,
                    1 | 2 => Told::Refused,
                    _ => Told::Unknown,
                };
                (told, answer.text.trim().to_owned())
            }
            Err(e) => (Told::Unknown, format!("{e:#}")),
        }
    }

    fn bring_in_line(&mut self, host: &'static str, state: &str, trouble: Trouble) {
        if !self.may_ask(host, AGAIN) {
            return;
        }
        let field = self.field;
        let words = trouble.words();
        let (writer, extra) = match self.rows_of_its_own(host) {
            Ok(found) => found,
            Err(e) => {
                return field.timeline.note(format!("operator: {host} {words}; nothing is done about it now: {e:#}"));
            }
        };
        if matches!(state, "ONLINE" | "REPLICATION_DELAY" | "REPLICATION_FAIL") {
            // With rows of its own it is about to be taken offline by the monitor.
            if trouble != Trouble::Extra {
                if trouble == Trouble::NoApply {
                    field.wrong(format!("{host} cannot apply what it has received: {}", self.last_sql_error(host)));
                }
                let (_, answer) = self.tell(&["set_offline", host]);
                self.hosts.entry(host).or_default().for_copy = Some(trouble);
                field.timeline.say(format!("operator: {host} {words}; set_offline {host} ({state}): {answer}"));
            }
            return;
        }
        let accept = trouble == Trouble::Extra && self.turn.is_multiple_of(2);
        self.turn = self.turn.wrapping_add(u64::from(trouble == Trouble::Extra));
        let command: &[&str] =
            if accept { &["set_online", "--accept-lost", host] } else { &["reclone", host, "--from", writer] };
        let count = extra.len();
        let shown = command.join(" ");
        // Before it can have any effect: nobody sees these rows afterwards.
        lock(&field.anew).push(Anew { at: Instant::now(), host, how: shown.clone(), extra });
        let (told, answer) = self.tell(command);
        let line = format!("operator: {host} {words} ({count} that {writer} lacks); {shown}: {answer}");
        match told {
            Told::Refused => {
                field.timeline.note(line);
                lock(&field.anew).pop_if(|last| last.host == host && last.how == shown);
            }
            Told::Accepted | Told::Unknown => {
                field.timeline.say(line);
                let care = self.hosts.entry(host).or_default();
                (care.ordered, care.for_copy) = (Some(Instant::now()), None);
            }
        }
    }

    /// The writer, and the clients' rows that the host has and the writer lacks.
    fn rows_of_its_own(&self, host: &'static str) -> Result<(&'static str, BTreeSet<u64>)> {
        let lab = self.field.lab;
        let writer = lab.writer()?;
        if writer == host {
            bail!("it is the writer");
        }
        let ids = |host: &str| -> Result<BTreeSet<u64>> {
            let rows = server::query(&lab.socket(host), "SELECT id FROM app.t", Duration::from_secs(20))?.rows;
            Ok(rows.into_iter().filter_map(|r| r.into_iter().next()??.parse().ok()).collect())
        };
        let there = ids(host)?;
        Ok((writer, there.difference(&ids(writer)?).copied().collect()))
    }

    /// Of a host that replicates, as its own server says it. It may be told to follow somebody else meanwhile.
    fn replication_trouble(&mut self, host: &'static str) -> Option<Trouble> {
        let lab = self.field.lab;
        let follows = lab.writer().is_ok_and(|writer| writer != host);
        let status = lab.replication(host).unwrap_or_default();
        let of = |column: &str| status.get(column).map_or("", String::as_str);
        let found = if !follows {
            None
        } else if of("Slave_SQL_Running") == "No" && !["", "0"].contains(&of("Last_SQL_Errno")) {
            Some(Trouble::NoApply)
        } else if of("Slave_IO_Running") == "No" && of("Last_IO_Errno") == "1236" {
            Some(Trouble::NoFetch)
        } else {
            None
        };
        let care = self.hosts.entry(host).or_default();
        care.replication = found.map(|trouble| match care.replication {
            Some((before, since)) if before == trouble => (trouble, since),
            Some(_) | None => {
                let why = [of("Last_IO_Error"), of("Last_SQL_Error")].join(" ");
                self.field.timeline.note(format!("operator: {host} {}: {}", trouble.words(), why.trim()));
                (trouble, Instant::now())
            }
        });
        care.replication.filter(|(_, since)| since.elapsed() > NO_FETCH_FOR).map(|(trouble, _)| trouble)
    }

    fn last_sql_error(&self, host: &str) -> String {
        self.field.lab.replication(host).ok().and_then(|mut status| status.remove("Last_SQL_Error")).unwrap_or_default()
    }

    // ---- programs ------------------------------------------------------------------------------------------------

    fn start_what_died(&mut self) {
        let field = self.field;
        for (host, name, pid) in field.lab.running() {
            if pid.is_some() {
                self.gone.remove(&(host, name));
                continue;
            }
            let Ok(_claim) = field.claim(host, name) else {
                self.gone.remove(&(host, name));
                continue;
            };
            // It may have been started between the look and the claim.
            if field.lab.process(host, name).is_ok() {
                continue;
            }
            let gone = self.gone.entry((host, name)).or_insert_with(Instant::now).elapsed();
            if name == "mysqld" {
                let for_copy = field.lab.is_stopped_by_helper(host) || self.is_copied(host);
                if gone < if for_copy { STOPPED_FOR } else { ENDED_FOR } {
                    continue;
                }
                if for_copy {
                    self.gone.remove(&(host, name));
                    field.timeline.say(format!("operator: {name} on {host} was left stopped by a copy; starting it"));
                    if let Err(e) = field.lab.start_mysqld(host) {
                        field.timeline.say(format!("operator: {name} on {host} cannot be started: {e:#}"));
                    }
                    continue;
                }
            }
            self.gone.remove(&(host, name));
            let log = field.lab.dir().join(host).join(format!("{name}.log"));
            field.wrong(format!("{name} on {host} ended by itself; its log ends:\n{}", server::tail(&log, 6)));
            let _ = field.start(host, name);
        }
    }

    /// Whether its server may be ended by a copy: as `show` said last, or ordered just now.
    fn is_copied(&self, host: &str) -> bool {
        self.was_ordered(host) || self.hosts.get(host).is_some_and(|care| care.is_copied)
    }

    fn was_ordered(&self, host: &str) -> bool {
        let care = self.hosts.get(host);
        care.and_then(|care| care.ordered).is_some_and(|at| at.elapsed() < ORDERED_FOR)
    }

    // ---- the writer ----------------------------------------------------------------------------------------------

    fn see_to_writer(&mut self, shown: &str) {
        if self.field.lab.writer().is_ok() {
            self.no_writer = None;
        } else if self.no_writer.get_or_insert_with(Instant::now).elapsed() > STUCK {
            self.no_writer = None;
            self.force(shown);
        }
    }

    /// Nobody has had the writer role for longer than any fault lasts.
    fn force(&self, shown: &str) {
        let field = self.field;
        field.wrong(format!("no writer for {STUCK:?}, longer than any fault; show:\n{}", shown.trim()));
        for host in [field.host(Who::Writer), field.host(Who::Standby)] {
            let (told, answer) = self.tell(&["move_role", "--force", "writer", host]);
            field.timeline.say(format!("operator: move_role --force writer {host}: {answer}"));
            if told == Told::Accepted {
                return;
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Accepted,
    Refused,
    /// No answer: it may have been heard.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UnderWay {
    /// Its data are replaced; its server ends and starts.
    Copy,
    /// Saving, undoing.
    Other,
}

/// From `# Host db1 is to …`. One that waits for something is not under way.
fn under_way_in(shown: &str, host: &str) -> Option<UnderWay> {
    let begins = format!("Host {host} is to ");
    let rest = shown.lines().find_map(|l| l.trim_start_matches("# ").strip_prefix(begins.as_str()))?;
    if rest.contains(": waiting until ") {
        return None;
    }
    Some(if rest.starts_with("throw its data away") { UnderWay::Copy } else { UnderWay::Other })
}

/// What `show` warns of.
fn trouble_in(shown: &str, host: &str) -> Option<Trouble> {
    let has = |what: &str| shown.lines().any(|l| l.trim_start_matches("# ").starts_with(what));
    let copy_failed = has(&format!("Warning: host {host}: failed: throw its data away"));
    if copy_failed || has(&format!("Host {host} is to throw its data away")) && under_way_in(shown, host).is_none() {
        Some(Trouble::Copy)
    } else if has(&format!("Warning: host {host} lacks ")) {
        Some(Trouble::Lacks)
    } else if has(&format!("Warning: host {host} has ")) {
        Some(Trouble::Extra)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_needs_is_read_from_show() {
        let shown = "# Warning: host db1 has 12 transactions that the active master db2 lacks (lost, as …)\n\
                     # Host db1 is to save the transactions that others lack: not begun yet\n\
                     # Warning: host db3 lacks 2 transactions of the active master db2 and has gone past them. Use …\n";
        assert_eq!(trouble_in(shown, "db1"), Some(Trouble::Extra));
        assert_eq!(under_way_in(shown, "db1"), Some(UnderWay::Other));
        assert_eq!((trouble_in(shown, "db2"), under_way_in(shown, "db2")), (None, None));
        assert_eq!((trouble_in(shown, "db3"), under_way_in(shown, "db3")), (Some(Trouble::Lacks), None));
    }

    #[test]
    fn a_copy_that_runs_is_left_alone_and_one_that_failed_or_waits_is_not() {
        let runs = "# Host db1 is to throw its data away and copy those of db2: stopping the server\n";
        assert_eq!((trouble_in(runs, "db1"), under_way_in(runs, "db1")), (None, Some(UnderWay::Copy)));
        let failed = "# Warning: host db1: failed: throw its data away and copy those of db2: no connection\n";
        assert_eq!((trouble_in(failed, "db1"), under_way_in(failed, "db1")), (Some(Trouble::Copy), None));
        let waits =
            "# Host db1 is to throw its data away and copy those of db2: waiting until what it has is known, or …\n";
        assert_eq!((trouble_in(waits, "db1"), under_way_in(waits, "db1")), (Some(Trouble::Copy), None));
        let saving = "# Warning: host db1: failed: save the transactions that others lack: no tool\n";
        assert_eq!(trouble_in(saving, "db1"), None, "the saving is tried again by itself");
    }
}

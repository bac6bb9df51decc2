//! Scenarios: short scripts for the simulated cluster (tests/scenarios/*.txt). Bugs that were found stay as such files.
//!
//! They begin with three hosts, all ONLINE, db1 writing, at time 0. `#` begins a comment. `at` is in seconds:
//!
//! ```text
//! at 2 isolate db1               # cut, isolate, cut db1 - db2, cut db1 -> monitor, end cuts
//! at 2 stop agent db1            # stop, start, pause, resume; agent, server, machine HOST, or monitor
//! at 2 move writer db2           # and force writer db2, set_online db1, set_offline db1, lose disk
//! at 9 expect writer db2         # or nobody; no writes for less than 0.3 s; state db1 ONLINE; told TEXT; shows TEXT;
//! within 5 expect writer db2     # with `not` before any of them; `expect` alone is for the time reached
//! reset                          # outages and what was told count from here
//! ```
//!
//! A file may also be `seed KIND NUMBER`, a story by chance. It never passes over a line that it does not understand.

use crate::chaos::{Kind, tell};
use crate::world::{MONITOR, WRITER, World};
use mmm_common::control::Command;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub struct Played {
    pub end: Result<(), String>,
    pub story: Vec<String>,
}

/// Plays a script to its end, or to the first line that does not hold.
pub fn play(text: &str) -> Played {
    let lines: Vec<(usize, &str)> = text
        .lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line.split('#').next().unwrap_or_default().trim()))
        .filter(|(_, line)| !line.is_empty())
        .collect();
    if let [(_, line)] = lines[..]
        && let ["seed", kind, seed] = line.split_whitespace().collect::<Vec<_>>()[..]
    {
        let (Some(kind), Ok(seed)) = (Kind::by_name(kind), seed.parse()) else {
            return Played { end: Err(format!("not understood: {line}")), story: Vec::new() };
        };
        let told = tell(seed, kind);
        return Played { end: told.broken.map_or(Ok(()), Err), story: told.story };
    }
    let mut stage = Stage::new();
    for (number, line) in lines {
        let done = catch_unwind(AssertUnwindSafe(|| stage.play(line))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().and_then(|t| t.lines().next().map(str::to_owned));
            Err(text.unwrap_or_else(|| "PANIC without a word".to_owned()))
        });
        if let Err(what) = done {
            return Played { end: Err(format!("line {number}, {line}: {what}")), story: stage.world.story };
        }
    }
    // The rules are looked at once more after the last line.
    let end = catch_unwind(AssertUnwindSafe(|| stage.world.run(1_000)));
    Played { end: end.map_err(|_| "a rule is broken after the last line".to_owned()), story: stage.world.story }
}

struct Stage {
    world: World,
    begin: u64,
    /// What was told before this line of the story does not count.
    told_from: usize,
}

impl Stage {
    fn new() -> Stage {
        let mut world = World::new();
        world.run(2_500);
        for host in ["db1", "db2", "db3"] {
            world.command(Command::SetOnline { host: host.into(), accept_lost: false });
            world.run(1_500);
        }
        world.run(3_000);
        world.outage = 0;
        let (begin, told_from) = (world.now, world.story.len());
        Stage { world, begin, told_from }
    }

    fn play(&mut self, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["reset"] => {
                (self.world.outage, self.told_from) = (0, self.world.story.len());
                Ok(())
            }
            ["expect", ..] => self.holds(&words[1..]),
            ["at", when, ..] => {
                let until = self.begin + milliseconds(when)?;
                let Some(ms) = until.checked_sub(self.world.now) else {
                    return Err("this time is over already".to_owned());
                };
                self.world.run(ms);
                if words.get(2) == Some(&"expect") { self.holds(&words[3..]) } else { self.act(&words[2..]) }
            }
            ["within", limit, "expect", ..] => {
                let end = self.world.now + milliseconds(limit)?;
                while self.holds(&words[3..]).is_err() && self.world.now < end {
                    self.world.run(10);
                }
                self.holds(&words[3..])
            }
            _ => Err("not understood".to_owned()),
        }
    }

    fn act(&mut self, words: &[&str]) -> Result<(), String> {
        let known = |name: &str| self.world.hosts.contains_key(&name.into());
        if let Some(host) = words.last().filter(|w| w.starts_with("db") && !known(w)) {
            return Err(format!("there is no host {host}"));
        }
        let w = &mut self.world;
        w.tell(format!("==== {}", words.join(" ")));
        let now = w.now;
        match words {
            ["cut", host] => {
                w.cut.insert((*host).into());
            }
            ["isolate", host] => w.isolate(host),
            ["cut", one, "-", other] => w.cut_between(place(one)?, place(other)?),
            ["cut", from, "->", to] => w.cut_way(place(from)?, place(to)?),
            ["end", "cuts"] => w.end_cuts(),
            ["stop", "agent", host] => w.stop_agent(host),
            ["end", "agent", host] => w.end_agent(host),
            ["start", "agent", host] => w.start_agent(&(*host).into()),
            ["pause", "agent", host] => w.pause_agent(host),
            ["resume", "agent", host] => w.resume_agent(host),
            ["stop", "server", host] => w.kill_server(host),
            ["start", "server", host] => w.start_server(host),
            ["pause", "server", host] => w.host(host).server.hung_since = Some(now),
            ["resume", "server", host] => w.host(host).server.hung_since = None,
            ["stop", "machine", host] => w.crash_host(host),
            ["start", "machine", host] => w.boot_host(host),
            ["pause", "machine", host] => w.freeze_host(host, true),
            ["resume", "machine", host] => w.wake_host(host),
            ["stop", "monitor"] => w.stop_monitor(),
            ["start", "monitor"] => w.start_monitor(),
            ["pause", "monitor"] => w.pause_monitor(),
            ["resume", "monitor"] => w.resume_monitor(),
            ["lose", "disk"] => w.forget_status(),
            ["move", role, host] => drop(w.command(move_role(role, host, false))),
            ["force", role, host] => drop(w.command(move_role(role, host, true))),
            ["set_online", host] => drop(w.command(Command::SetOnline { host: (*host).into(), accept_lost: false })),
            ["set_offline", host] => drop(w.command(Command::SetOffline { host: (*host).into() })),
            ["confirm_dead", host] => drop(w.command(Command::ConfirmDead { host: (*host).into() })),
            _ => return Err("not understood".to_owned()),
        }
        Ok(())
    }

    fn holds(&mut self, words: &[&str]) -> Result<(), String> {
        if let ["not", words @ ..] = words {
            return match self.holds(words) {
                Ok(()) => Err("it is so".to_owned()),
                Err(what) if what == "not understood" => Err(what),
                Err(_) => Ok(()),
            };
        }
        let w = &mut self.world;
        let (holds, found) = match words {
            ["writer", host] => {
                let found = w.holders(WRITER).join(" and ");
                (found == *host || (found.is_empty() && *host == "nobody"), format!("it is on '{found}'"))
            }
            ["writes"] => (w.writer_is_open(), "clients cannot write".to_owned()),
            ["no", "writes", "for", "less", "than", limit, "s"] => {
                let outage = w.outage.max(w.now - w.last_write);
                (outage < milliseconds(limit)?, format!("it was {outage} ms"))
            }
            ["state", host, state] => {
                let show = w.show();
                let line = show.lines().find(|l| l.trim_start().starts_with(&format!("{host}("))).unwrap_or_default();
                (line.contains(&format!("/{state}.")), line.trim().to_owned())
            }
            ["told", text @ ..] => {
                let text = text.join(" ");
                (w.story[self.told_from..].iter().any(|line| line.contains(&text)), "nobody told it".to_owned())
            }
            ["shows", text @ ..] => {
                let (show, text) = (w.show(), text.join(" "));
                (show.contains(&text), format!("show says\n{show}"))
            }
            ["nothing", "lost", "on", host] => {
                let lost = w.lost_on(host);
                (lost == 0, format!("{lost} writes"))
            }
            _ => return Err("not understood".to_owned()),
        };
        if holds { Ok(()) } else { Err(found) }
    }
}

fn place(name: &str) -> Result<&str, String> {
    let known = name == MONITOR || name.starts_with("db");
    if known { Ok(name) } else { Err(format!("{name} is neither a host nor {MONITOR}")) }
}

fn move_role(role: &str, host: &str, force: bool) -> Command {
    Command::MoveRole { role: role.into(), host: host.into(), force }
}

fn milliseconds(seconds: &str) -> Result<u64, String> {
    let seconds: f64 = seconds.parse().map_err(|e| format!("{seconds}: {e}"))?;
    if !(0.0..1e6).contains(&seconds) {
        return Err(format!("{seconds}: not a time in seconds"));
    }
    Ok((seconds * 1000.0).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends_with(text: &str, what: &str) {
        let end = play(text).end.expect_err(text);
        assert!(end.ends_with(what), "{end}");
    }

    #[test]
    fn what_does_not_hold_and_what_is_not_understood_is_an_error_with_its_line() {
        assert_eq!(play("# nothing happens\nat 1 expect writer db1\nexpect not writer db2").end, Ok(()));
        ends_with("at 1 expect writer db2", "line 1, at 1 expect writer db2: it is on 'db1'");
        ends_with("\nat 1 expect not writer db1", "line 2, at 1 expect not writer db1: it is so");
        ends_with("at 1 expect not rain", "not understood");
        ends_with("at 2 stop agent db9", "there is no host db9");
        ends_with("at 2 expect writes\nat 1 expect writes", "this time is over already");
        ends_with("seed Nice 1", "not understood: seed Nice 1");
    }
}

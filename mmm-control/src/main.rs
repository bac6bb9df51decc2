//! `mmm_control`: one question to the monitor, its answer in MMM's words, and an exit code that scripts can use.
//!
//! Answers go to stdout, also `ERROR:` ones, because scripts parse them there as with MMM; what is wrong with the
//! command line or the configuration, and details for people, go to stderr. With `--json` stdout gets exactly one
//! JSON document, whatever happens. It decides nothing: whether something is allowed is the monitor's answer.

mod args;
mod client;

use args::{Asked, Instead};
use client::NoAnswer;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use mmm_common::config::parse;
use mmm_common::control::Answer;
use serde_json::{Value, json};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;

const OK: u8 = 0;
const ERROR: u8 = 1;
const WRONG_USAGE: u8 = 2;
const NO_MONITOR: u8 = 3;

fn main() -> ExitCode {
    let (json, read) = args::read(std::env::args_os().skip(1).collect());
    let outcome = match read {
        Ok(asked) => answer(asked),
        Err(instead) => Outcome::instead(instead),
    };
    match outcome.print(json) {
        // Whoever read our output has had enough of it: no reason to complain.
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            let _ = writeln!(io::stderr(), "mmm_control: writing the answer: {e}");
            ExitCode::from(outcome.code.max(ERROR))
        }
        Ok(()) | Err(_) => ExitCode::from(outcome.code),
    }
}

fn answer(asked: Asked) -> Outcome {
    let command = match asked.command {
        Ok(command) => command,
        Err(text) => return Outcome::answer(&Answer::Refused { text }),
    };
    let at = match monitor_address(&asked.config) {
        Ok(at) => at,
        Err(mistakes) => return Outcome::config(mistakes),
    };
    match client::ask(at, &command, asked.timeout) {
        Ok(answer) => Outcome::answer(&answer),
        Err(no_answer) => Outcome::no_answer(no_answer),
    }
}

fn monitor_address(config: &Path) -> Result<SocketAddr, String> {
    let monitor = parse::control(config)
        .map_err(|mistakes| mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))?;
    Ok(SocketAddr::new(monitor.ip, monitor.port))
}

/// What to print where, and the exit code.
struct Outcome {
    code: u8,
    stdout: String,
    stderr: String,
    /// The document that replaces both with `--json`.
    json: Value,
}

impl Outcome {
    /// The monitor's answer, or one in its manner. Its JSON is the answer as the monitor sends it, and `ok`.
    fn answer(answer: &Answer) -> Self {
        let ok = !answer.is_error();
        let mut document = serde_json::to_value(answer).unwrap_or_else(|e| json!({ "text": e.to_string() }));
        document["ok"] = ok.into();
        let code = if ok { OK } else { ERROR };
        Outcome { code, stdout: answer.text(&local_time), stderr: String::new(), json: document }
    }

    fn no_answer(why: NoAnswer) -> Self {
        let (answer, text, detail) = match why {
            NoAnswer::NoMonitor(detail) => ("no_monitor", "Can't connect to monitor daemon!".to_owned(), detail),
            NoAnswer::Broken(text) => ("no_answer", text, String::new()),
        };
        let stdout = format!("ERROR: {text}\n");
        let stderr = if detail.is_empty() { String::new() } else { format!("mmm_control: {detail}\n") };
        let mut document = json!({ "answer": answer, "ok": false, "text": text });
        if !detail.is_empty() {
            document["detail"] = detail.into();
        }
        Outcome { code: NO_MONITOR, stdout, stderr, json: document }
    }

    fn config(mistakes: String) -> Self {
        let document = json!({ "answer": "config", "ok": false, "text": mistakes });
        Outcome { code: WRONG_USAGE, stdout: String::new(), stderr: format!("{mistakes}\n"), json: document }
    }

    fn instead(instead: Instead) -> Self {
        let (code, answer, text) = match instead {
            Instead::Help(text) => (OK, "help", text),
            Instead::Version(text) => (OK, "version", text),
            Instead::WrongUsage(text) => (WRONG_USAGE, "usage", text),
        };
        let document = json!({ "answer": answer, "ok": code == OK, "text": text.trim_end() });
        let (stdout, stderr) = if code == OK { (text, String::new()) } else { (String::new(), text) };
        Outcome { code, stdout, stderr, json: document }
    }

    fn print(&self, json: bool) -> io::Result<()> {
        if json {
            writeln!(io::stdout(), "{}", self.json)?;
        } else {
            // People read the reason even when stdout goes to a script; nobody reading it is no failure.
            let _ = io::stderr().write_all(self.stderr.as_bytes());
            io::stdout().write_all(self.stdout.as_bytes())?;
        }
        io::stdout().flush()
    }
}

/// `YYYY/MM/DD hh:mm:ss` of this machine, for something so many milliseconds ago.
fn local_time(ms_ago: u64) -> String {
    let ago = SignedDuration::from_millis(i64::try_from(ms_ago).unwrap_or(i64::MAX));
    match Timestamp::now().checked_sub(ago) {
        Ok(then) => then.to_zoned(TimeZone::system()).strftime("%Y/%m/%d %H:%M:%S").to_string(),
        Err(_) => "unknown".to_owned(),
    }
}

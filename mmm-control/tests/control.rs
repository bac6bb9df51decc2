//! `mmm_control` as scripts see it: the request it sends, what it prints, and its exit code, against a scripted
//! monitor on a loopback port.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise, its helpers as well")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How the monitor behaves once it has read the request.
enum Behaviour {
    Answers(Vec<u8>),
    /// Answers only when the test says so.
    AnswersWhenTold(Vec<u8>, mpsc::Receiver<()>),
    /// Reads, and then neither answers nor closes.
    Hangs,
    /// A byte now and then, never a line.
    Trickles,
    /// Bytes without end, never a line.
    Floods,
}

/// A monitor that hangs gives up by then, so that a client that waits too long fails its test and does not hang it.
const LONGEST: Duration = Duration::from_secs(20);

struct Monitor {
    dir: tempfile::TempDir,
    serving: Option<JoinHandle<String>>,
}

impl Monitor {
    /// Serves one connection. The client's end closes first, so every behaviour ends with the client.
    fn that(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let dir = config_for("127.0.0.1", listener.local_addr().unwrap().port());
        let serving = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut request = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut request).unwrap();
            behave(stream, behaviour);
            request
        });
        Monitor { dir, serving: Some(serving) }
    }

    fn answering(answer: &str) -> Self {
        Monitor::that(Behaviour::Answers(format!("{answer}\n").into_bytes()))
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("mmm_mon.toml")
    }

    fn command(&self, words: &str) -> Command {
        let mut command = mmm_control();
        command.arg("--config").arg(self.config()).args(words.split_whitespace());
        command
    }

    fn run(&self, words: &str) -> Output {
        self.command(words).output().unwrap()
    }

    fn request(mut self) -> String {
        self.serving.take().unwrap().join().unwrap().trim_end().to_owned()
    }
}

fn behave(mut stream: TcpStream, behaviour: Behaviour) {
    match behaviour {
        Behaviour::Answers(bytes) => stream.write_all(&bytes).unwrap(),
        Behaviour::AnswersWhenTold(bytes, told) => {
            told.recv().unwrap();
            stream.write_all(&bytes).unwrap();
        }
        Behaviour::Hangs => {
            stream.set_read_timeout(Some(LONGEST)).unwrap();
            let _ = stream.read(&mut [0]);
        }
        Behaviour::Trickles => {
            stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            let end = Instant::now() + LONGEST;
            // Until the client closes: its end is seen as a read of nothing, or as a failed write.
            while Instant::now() < end && stream.write_all(b" ").is_ok() && !matches!(stream.read(&mut [0]), Ok(0)) {}
        }
        Behaviour::Floods => {
            let piece = vec![b'x'; 1024 * 1024];
            while stream.write_all(&piece).is_ok() {}
        }
    }
}

fn config_for(ip: &str, port: u16) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("[monitor]\nip = \"{ip}\"\nport = {port}\n");
    std::fs::write(dir.path().join("mmm_mon.toml"), text).unwrap();
    dir
}

fn mmm_control() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mmm_control"))
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {:?}", text(&output.stdout)))
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

/// Given the monitor's answer, the words lead to this request, this text and this exit code; with `--json` to the
/// answer and `ok`.
fn check(words: &str, request: &str, answer: &str, stdout: &str, exit: i32) {
    let monitor = Monitor::answering(answer);
    let output = monitor.run(words);
    assert_eq!((text(&output.stdout), code(&output)), (stdout, exit), "{words}: {}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "", "{words}");
    let sent: serde_json::Value = serde_json::from_str(&monitor.request()).unwrap();
    let wanted: serde_json::Value = serde_json::from_str(request).unwrap();
    assert_eq!(sent, serde_json::json!({ "protocol": mmm_common::wire::PROTOCOL, "command": wanted }), "{words}");

    let monitor = Monitor::answering(answer);
    let output = monitor.run(&format!("{words} --json"));
    let mut document: serde_json::Value = serde_json::from_str(answer).unwrap();
    document["ok"] = (exit == 0).into();
    assert_eq!((json(&output), code(&output)), (document, exit), "{words} --json");
    monitor.request();
}

fn done(said: &str) -> String {
    serde_json::json!({ "answer": "done", "text": said }).to_string()
}

fn refused(said: &str) -> String {
    serde_json::json!({ "answer": "refused", "text": said }).to_string()
}

// lessons.md 26
#[test]
fn every_verb_asks_for_what_it_says() {
    check("ping", r#"{"verb":"ping"}"#, &done("Pinged successfully!"), "OK: Pinged successfully!\n", 0);
    check("mode", r#"{"verb":"mode"}"#, r#"{"answer":"mode","mode":"WAIT"}"#, "WAIT\n", 0);
    for (words, mode) in [("set_active", "active"), ("set_manual", "manual"), ("set_passive", "passive")] {
        let said = format!("Switched into {mode} mode.");
        check(words, &format!(r#"{{"verb":"{words}"}}"#), &done(&said), &format!("OK: {said}\n"), 0);
    }
    let said = "State of 'db2' changed to ONLINE. Now you can wait some time and check its new roles!";
    for (words, accept_lost) in [("set_online db2", false), ("set_online --accept-lost db2", true)] {
        let request = format!(r#"{{"verb":"set_online","host":"db2","accept_lost":{accept_lost}}}"#);
        check(words, &request, &done(said), &format!("OK: {said}\n"), 0);
    }
    check("reclone db1 --from db2", r#"{"verb":"reclone","host":"db1","from":"db2"}"#, &done("x"), "OK: x\n", 0);
    let lost =
        r#"{"answer":"lost","host":"db1","transactions":3,"state":"3 transactions are on db1","acknowledged":"lost",
        "saved":"/f.sql","gtids":"0-1-3","list":["0-1-1  app.t: 1 inserted"],"cure":"do this"}"#
            .replace('\n', "");
    let text = "db1: 3 transactions are on db1\n  lost\n  saved as SQL on db1: /f.sql\n  gtids: 0-1-3\n    \
                0-1-1  app.t: 1 inserted\n    and 2 more\n  do this\n";
    check("lost db1", r#"{"verb":"lost","host":"db1"}"#, &lost, text, 0);
    check(
        "set_offline db9",
        r#"{"verb":"set_offline","host":"db9"}"#,
        &refused("Unknown host name 'db9'!"),
        "ERROR: Unknown host name 'db9'!\n",
        1,
    );
    let said = "Role 'writer' has been moved from 'db1' to 'db2'. Now you can wait some time and check new roles info!";
    check(
        "move_role writer db2",
        r#"{"verb":"move_role","role":"writer","host":"db2","force":false}"#,
        &done(said),
        &format!("OK: {said}\n"),
        0,
    );
    let said = "Can't move role to host with state HARD_OFFLINE.";
    check(
        "move_role --force writer db2",
        r#"{"verb":"move_role","role":"writer","host":"db2","force":true}"#,
        &refused(said),
        &format!("ERROR: {said}\n"),
        1,
    );
    check(
        "set_ip 192.168.0.50 db1",
        r#"{"verb":"set_ip","ip":"192.168.0.50","host":"db1"}"#,
        &done("Set role 'writer(192.168.0.50)' to host 'db1'."),
        "OK: Set role 'writer(192.168.0.50)' to host 'db1'.\n",
        0,
    );
    check(
        "confirm_dead db1",
        r#"{"verb":"confirm_dead","host":"db1"}"#,
        &done("Host 'db1' counts as dead. Keep it switched off: after a reboot it takes nothing up by itself."),
        "OK: Host 'db1' counts as dead. Keep it switched off: after a reboot it takes nothing up by itself.\n",
        0,
    );
}

#[test]
fn show_prints_mmms_lines() {
    let answer = serde_json::json!({
        "answer": "show",
        "mode": "PASSIVE",
        "cause": "set by the operator",
        "warnings": ["Warning: agent on host db1 is not reachable"],
        "hosts": [
            { "name": "db1", "ip": "192.168.0.31", "mode": "master", "state": "ONLINE", "roles": [
                { "role": "reader", "ip": "192.168.0.51" }, { "role": "writer", "ip": "192.168.0.50" } ] },
            { "name": "db2", "ip": "192.168.0.32", "mode": "master", "state": "AWAITING_RECOVERY", "roles": [] },
        ],
        "notes": ["Role writer has preferred host db1"],
    });
    let wanted = "\
# --- Monitor is in PASSIVE MODE ---
# Cause: set by the operator
# Warning: agent on host db1 is not reachable
  db1(192.168.0.31) master/ONLINE. Roles: reader(192.168.0.51), writer(192.168.0.50)
  db2(192.168.0.32) master/AWAITING_RECOVERY. Roles: \n# Role writer has preferred host db1
";
    check("show", r#"{"verb":"show"}"#, &answer.to_string(), wanted, 0);
}

#[test]
fn checks_are_told_in_local_time() {
    // Given a result that last changed on 2010/02/11 at 12:43:16 UTC, and a machine 9 hours ahead of UTC.
    let changed_ms = 1_265_892_196_000;
    let now_ms = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
    let answer = serde_json::json!({ "answer": "checks", "checks": [ { "host": "db1", "check": "rep_backlog",
        "changed_ms_ago": now_ms - changed_ms, "result": { "result": "ok", "detail": "Backlog is null" } } ] });

    let monitor = Monitor::answering(&answer.to_string());
    let output = monitor.command("checks db1 rep_backlog").env("TZ", "JST-9").output().unwrap();

    // Then the line is MMM's; the seconds and the last digit of the minutes may have moved on meanwhile.
    let line = text(&output.stdout);
    let (before, after) = ("db1  rep_backlog  [last change: 2010/02/11 21:4", "]  OK: Backlog is null\n");
    assert!(line.starts_with(before) && line.ends_with(after), "{line}");
    assert_eq!(line.len(), before.len() + "3:16".len() + after.len(), "{line}");
    let sent: serde_json::Value = serde_json::from_str(&monitor.request()).unwrap();
    assert_eq!(sent["command"], serde_json::json!({ "verb": "checks", "host": "db1", "check": "rep_backlog" }));
}

#[test]
fn checks_of_all_and_an_unknown_check() {
    let none = r#"{"answer":"checks","checks":[]}"#;
    for words in ["checks", "checks all", "checks all all"] {
        check(words, r#"{"verb":"checks","host":null,"check":null}"#, none, "", 0);
    }
    // Values that cannot be meant are ERROR answers, without asking anybody.
    for (words, said) in [
        ("checks db1 pong", "Unknown check 'pong'! Known checks: ping, mysql, rep_threads, rep_backlog."),
        ("set_ip 192.168.0.500 db1", "'192.168.0.500' is not an IP address!"),
    ] {
        let output = mmm_control().args(words.split_whitespace()).output().unwrap();
        assert_eq!((text(&output.stdout), code(&output)), (&*format!("ERROR: {said}\n"), 1));
        let output = mmm_control().args(words.split_whitespace()).arg("--json").output().unwrap();
        assert_eq!(json(&output), serde_json::json!({ "answer": "refused", "ok": false, "text": said }));
    }
}

#[test]
fn a_text_cannot_fake_lines_or_steer_the_terminal() {
    let answer = serde_json::json!({ "answer": "checks", "checks": [ { "host": "db1", "check": "mysql",
        "changed_ms_ago": 0, "result": { "result": "error", "detail": "near 'x\ndb2  mysql  OK\u{1b}[2J'" } } ] });
    let monitor = Monitor::answering(&answer.to_string());
    let output = monitor.run("checks");
    let out = text(&output.stdout);
    assert_eq!(out.lines().count(), 1, "{out}");
    assert!(!out.contains('\u{1b}') && out.contains("near 'x db2  mysql  OK [2J'"), "{out:?}");
}

// lessons.md 26
#[test]
fn without_a_monitor_every_verb_says_so() {
    // Given a loopback address that nobody listens on, and that no other test can be given.
    let dir = config_for("127.0.0.77", 1);
    let verbs = [
        "ping",
        "show",
        "checks",
        "mode",
        "set_active",
        "set_manual",
        "set_passive",
        "set_online db1",
        "set_offline db1",
        "move_role writer db1",
        "set_ip 192.168.0.50 db1",
        "confirm_dead db1",
        "lost db1",
        "reclone db1 --from db2",
        "doctor",
    ];
    for words in verbs {
        let run = |more: &[&str]| {
            let config = dir.path().join("mmm_mon.toml");
            mmm_control().arg("-c").arg(config).args(words.split_whitespace()).args(more).output().unwrap()
        };
        let output = run(&[]);
        assert_eq!((text(&output.stdout), code(&output)), ("ERROR: Can't connect to monitor daemon!\n", 3), "{words}");
        assert!(text(&output.stderr).contains("127.0.0.77:1"), "{}", text(&output.stderr));
        let output = run(&["--json"]);
        let document = json(&output);
        assert_eq!(
            (&document["answer"], &document["ok"], &document["text"], code(&output)),
            (&"no_monitor".into(), &false.into(), &"Can't connect to monitor daemon!".into(), 3)
        );
        assert!(document["detail"].as_str().unwrap().contains("Is mmm_mond running?"));
    }
}

/// Exit 3, one `ERROR:` line on stdout with this in it, no panic, the same as JSON, and all that soon.
fn check_no_answer(behaviour: fn() -> Behaviour, words: &str, said: &str) {
    let began = Instant::now();
    let output = Monitor::that(behaviour()).run(words);
    let out = text(&output.stdout);
    assert_eq!(code(&output), 3, "{out}{}", text(&output.stderr));
    assert!(out.starts_with("ERROR: ") && out.lines().count() == 1 && out.contains(said), "{out}");
    assert_eq!(text(&output.stderr), "");
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());

    let output = Monitor::that(behaviour()).run(&format!("{words} --json"));
    let document = json(&output);
    assert_eq!((&document["answer"], &document["ok"], code(&output)), (&"no_answer".into(), &false.into(), 3));
    assert!(document["text"].as_str().unwrap().contains(said), "{document}");
}

#[test]
fn a_monitor_that_hangs_or_trickles_is_not_waited_for_longer_than_said() {
    check_no_answer(|| Behaviour::Hangs, "show --timeout 1", "has not answered within 1 s");
    check_no_answer(|| Behaviour::Trickles, "show --timeout 1", "has not answered within 1 s");
    check_no_answer(|| Behaviour::Hangs, "set_online db1 --timeout 1", "The command may have been carried out");
    check_no_answer(
        || Behaviour::Hangs,
        "move_role writer db2 --timeout 1",
        "Moving role 'writer' to 'db2' is still under way after 1 s",
    );
}

#[test]
fn garbage_is_an_error_not_an_answer() {
    check_no_answer(|| Behaviour::Answers(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()), "show", "is not understood");
    check_no_answer(
        || Behaviour::Answers(b"{\"answer\":\"later\"}\n".to_vec()),
        "show",
        "Is it a monitor of this version",
    );
    check_no_answer(|| Behaviour::Answers(b"\xff\xfe\n".to_vec()), "show", "not UTF-8");
    check_no_answer(|| Behaviour::Answers(b"{\"answer\":\"done\"".to_vec()), "show", "without an answer");
    check_no_answer(|| Behaviour::Answers(Vec::new()), "set_active", "The command may have been carried out");
    check_no_answer(|| Behaviour::Floods, "show", "longer than 16 MiB");
}

#[test]
fn a_reader_that_has_had_enough_is_no_panic() {
    let (tell, told) = mpsc::channel();
    let answer = format!("{}\n", done("Pinged successfully!"));
    let monitor = Monitor::that(Behaviour::AnswersWhenTold(answer.into_bytes(), told));
    let mut child = monitor.command("ping").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Given that nobody reads stdout any more before the answer comes.
    drop(child.stdout.take());
    tell.send(()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((text(&output.stderr), code(&output)), ("", 0));
}

#[test]
fn wrong_usage_exits_2_and_shows_how_it_is_meant() {
    for words in
        ["", "shwo", "set_online", "set_online db1 db2", "move_role writer", "show --colour", "ping --timeout 0"]
    {
        let output = mmm_control().args(words.split_whitespace()).output().unwrap();
        let err = text(&output.stderr);
        assert_eq!((text(&output.stdout), code(&output)), ("", 2), "{words}: {err}");
        assert!(err.starts_with("error: ") && err.contains("Valid commands are:"), "{words}: {err}");
        let output = mmm_control().args(words.split_whitespace()).arg("--json").output().unwrap();
        let document = json(&output);
        assert_eq!((&document["answer"], &document["ok"], code(&output)), (&"usage".into(), &false.into(), 2));
    }
}

#[test]
fn a_configuration_that_cannot_be_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("mmm_mon.toml");
    let output = mmm_control().args(["show", "-c"]).arg(&config).output().unwrap();
    assert_eq!((text(&output.stdout), code(&output)), ("", 2));
    assert!(text(&output.stderr).contains(config.to_str().unwrap()), "{}", text(&output.stderr));
    let output = mmm_control().args(["show", "--json", "-c"]).arg(&config).output().unwrap();
    assert_eq!((&json(&output)["answer"], code(&output)), (&"config".into(), 2));
    // A cluster's file is looked for beside the default one.
    let output = mmm_control().args(["@no_such_cluster", "show"]).output().unwrap();
    let err = text(&output.stderr);
    assert!(code(&output) == 2 && err.contains("/etc/mysql-mmm/mmm_mon_no_such_cluster.toml"), "{err}");
}

#[test]
fn help_in_every_spelling_is_the_same_text() {
    let wanted = include_str!("help.txt");
    for words in ["help", "-h", "--help", "move_role --help"] {
        let output = mmm_control().args(words.split_whitespace()).output().unwrap();
        assert_eq!((text(&output.stdout), text(&output.stderr), code(&output)), (wanted, "", 0), "{words}");
    }
    let output = mmm_control().args(["help", "--json"]).output().unwrap();
    assert_eq!(json(&output), serde_json::json!({ "answer": "help", "ok": true, "text": wanted.trim_end() }));
    let output = mmm_control().arg("--version").output().unwrap();
    assert_eq!(text(&output.stdout), format!("mmm_control {}\n", env!("CARGO_PKG_VERSION")));
}

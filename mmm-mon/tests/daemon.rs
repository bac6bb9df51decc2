//! The finished program as an operator and systemd see it: started, asked, reloaded, ended.

#![allow(clippy::unwrap_used, reason = "tests may stop at the first surprise")]

use mmm_common::wire::PROTOCOL;
use serde_json::Value;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);

/// A folder with a configuration of two masters on loopback addresses where nothing runs.
struct Site {
    dir: tempfile::TempDir,
    port: u16,
    agent_port: u16,
}

impl Site {
    fn new() -> Self {
        let site = Site { dir: tempfile::tempdir().unwrap(), port: free_port(), agent_port: free_port() };
        site.write("");
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `extra` goes below `[monitor]`.
    fn write(&self, extra: &str) {
        let (agent_port, no_mysql) = (self.agent_port, free_port());
        let host = |name: &str, ip: &str, peer: &str| {
            format!("[host.{name}]\nip = \"{ip}\"\nmode = \"master\"\npeer = \"{peer}\"\n")
        };
        let text = format!(
            "active_master_role = \"writer\"\n\
             [monitor]\nip = \"127.0.0.1\"\nport = {}\nstatus_path = \"{}\"\nping_ips = [\"127.0.0.1\"]\n{extra}\n\
             [host.default]\ncluster_interface = \"lo\"\nagent_port = {agent_port}\nmysql_port = {no_mysql}\n\
             agent_user = \"a\"\nagent_password = \"SecretA\"\nreplication_user = \"r\"\n\
             replication_password = \"SecretR\"\nmonitor_user = \"m\"\nmonitor_password = \"SecretM\"\n\
             {}{}\
             [role.writer]\nmode = \"exclusive\"\nhosts = [\"db1\", \"db2\"]\nips = [\"127.0.0.50\"]\n",
            self.port,
            self.path("state/status").display(),
            host("db1", "127.0.0.31", "db2"),
            host("db2", "127.0.0.32", "db1"),
        );
        let path = self.path("mmm_mon.toml");
        fs::write(&path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o640)).unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mmm_mond"));
        command.arg("--config").arg(self.path("mmm_mon.toml")).env_remove("RUST_LOG").env_remove("NOTIFY_SOCKET");
        command
    }

    fn start(&self) -> Daemon {
        self.start_as(self.command())
    }

    fn start_as(&self, mut command: Command) -> Daemon {
        let log = self.path("log");
        let file = fs::File::create(&log).unwrap();
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).spawn().unwrap();
        let daemon = Daemon { process, log, port: self.port };
        wait_until("it answers", || daemon.ask(r#"{"verb":"ping"}"#).is_some());
        daemon
    }
}

struct Daemon {
    process: Child,
    log: PathBuf,
    port: u16,
}

impl Daemon {
    /// One request; None when nobody listens.
    fn ask(&self, command: &str) -> Option<Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        writeln!(stream, r#"{{"protocol":{PROTOCOL},"command":{command}}}"#).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        Some(serde_json::from_str(&answer).unwrap())
    }

    fn signal(&self, name: &str) {
        let done = Command::new("kill").args([&format!("-{name}"), &self.process.id().to_string()]).status().unwrap();
        assert!(done.success());
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    fn wait_for_log(&self, text: &str) {
        wait_until(text, || self.log().contains(text));
    }

    fn end(mut self) -> ExitStatus {
        self.signal("TERM");
        let mut ended = None;
        wait_until("it ends", || {
            ended = self.process.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < PATIENCE, "waited in vain until: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

#[test]
fn it_starts_answers_remembers_and_ends() {
    let site = Site::new();
    let daemon = site.start();
    assert_eq!(daemon.ask(r#"{"verb":"mode"}"#).unwrap()["mode"], "ACTIVE");
    assert_eq!(daemon.ask(r#"{"verb":"set_manual"}"#).unwrap()["answer"], "done");
    wait_until("both pings are known", || {
        let checks = daemon.ask(r#"{"verb":"checks","host":null,"check":"ping"}"#).unwrap();
        checks["checks"].as_array().unwrap().iter().filter(|c| c["result"]["result"] == "ok").count() == 2
    });
    wait_until("both servers are known to be down", || {
        let checks = daemon.ask(r#"{"verb":"checks","host":null,"check":"mysql"}"#).unwrap().to_string();
        checks.matches("refuses connections: no server runs there").count() == 2
    });
    assert!(daemon.end().success());

    let daemon = site.start();
    assert_eq!(daemon.ask(r#"{"verb":"mode"}"#).unwrap()["mode"], "MANUAL", "remembered");
    let log = daemon.log();
    assert!(log.contains("the saved status is"), "{log}");
    assert!(!log.contains('\u{1b}') && !log.contains("Secret"), "{log}");
    assert!(daemon.end().success());
}

#[test]
fn a_second_copy_with_the_same_status_file_is_refused() {
    let site = Site::new();
    let daemon = site.start();
    let second = site.command().output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr(&second).contains("another mmm_mond runs with the status file"), "{}", stderr(&second));
    assert!(daemon.ask(r#"{"verb":"ping"}"#).is_some());
}

/// The next hello of a monitor that an agent on db1 hears: whose it is, and the connection.
fn hello_on(agent: &TcpListener) -> (u64, TcpStream) {
    let mut accepted = None;
    wait_until("a monitor connects", || {
        accepted = agent.accept().ok();
        accepted.is_some()
    });
    let (stream, _) = accepted.unwrap();
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    let hello: Value = serde_json::from_str(&line).unwrap();
    (hello["monitor"].as_u64().unwrap(), stream)
}

#[test]
fn each_monitor_has_an_identity_of_its_own_and_keeps_it() {
    let site = Site::new();
    let agent = TcpListener::bind(("127.0.0.31", site.agent_port)).unwrap();
    agent.set_nonblocking(true).unwrap();
    let daemon = site.start();
    let (identity, mut stream) = hello_on(&agent);
    writeln!(stream, r#"{{"message":"refused","why":"another monitor commands this host","passes":true}}"#).unwrap();
    daemon.wait_for_log("refuses this monitor: another monitor commands this host");
    let show = daemon.ask(r#"{"verb":"show"}"#).unwrap().to_string();
    assert!(show.contains("agent on host db1 is not reachable"), "{show}");
    let began = Instant::now();
    let (again, _stream) = hello_on(&agent);
    assert_eq!(again, identity);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());

    // A second one, with a status file of its own.
    let mut other = Site::new();
    other.agent_port = site.agent_port;
    other.write("");
    assert!(daemon.end().success());
    let second = other.start();
    drop(agent);
    let agent = TcpListener::bind(("127.0.0.31", site.agent_port)).unwrap();
    agent.set_nonblocking(true).unwrap();
    assert_ne!(hello_on(&agent).0, identity);
    assert!(second.end().success());

    drop(agent);
    let agent = TcpListener::bind(("127.0.0.31", site.agent_port)).unwrap();
    agent.set_nonblocking(true).unwrap();
    let daemon = site.start();
    assert_eq!(hello_on(&agent).0, identity, "over a restart");
    assert!(daemon.end().success());

    fs::write(site.path("state/status.id"), "?").unwrap();
    let out = site.command().output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(stderr(&out).contains("status.id does not hold the identity of a monitor"), "{}", stderr(&out));
}

// lessons.md 27
#[test]
fn every_mistake_is_printed_at_once() {
    let site = Site::new();
    let good = site.command().arg("--check-config").output().unwrap();
    assert_eq!(good.status.code(), Some(0), "{}", stderr(&good));
    site.write("prot = 9988\nflap_count = \"x\"");
    for (args, code) in [(&["--check-config"][..], 2), (&[], 2)] {
        let bad = site.command().args(args).output().unwrap();
        assert_eq!(bad.status.code(), Some(code));
        let text = stderr(&bad);
        assert!(text.contains("prot") && text.contains("flap_count") && text.contains("mmm_mon.toml:"), "{text}");
        assert!(!text.contains("Secret"), "{text}");
    }
}

#[test]
fn a_bad_new_configuration_is_refused_and_a_good_one_is_taken() {
    let site = Site::new();
    let mut daemon = site.start();
    site.write("prot = 1\nflap_count = \"x\"");
    daemon.signal("HUP");
    daemon.wait_for_log("the new configuration is refused; the old one goes on");
    let log = daemon.log();
    assert!(log.contains("prot") && log.contains("flap_count"), "{log}");
    assert_eq!(daemon.ask(r#"{"verb":"ping"}"#).unwrap()["answer"], "done");

    // Another port, and it is taken: refused as a whole.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = Site { dir: site.dir, port: taken.local_addr().unwrap().port(), agent_port: free_port() };
    other.write("");
    daemon.signal("HUP");
    daemon.wait_for_log("listening for mmm_control at");
    assert_eq!(daemon.ask(r#"{"verb":"ping"}"#).unwrap()["answer"], "done");

    drop(taken);
    daemon.signal("HUP");
    daemon.wait_for_log("the configuration has been read again");
    assert!(daemon.ask(r#"{"verb":"ping"}"#).is_none(), "the old port is closed");
    daemon.port = other.port;
    assert_eq!(daemon.ask(r#"{"verb":"ping"}"#).unwrap()["answer"], "done");
    assert!(daemon.end().success());
}

#[test]
fn a_status_that_cannot_be_saved_ends_it() {
    let site = Site::new();
    // Writing beyond the limit set below is then an error, and no signal that ends the process by itself.
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""]).arg(site.command().get_program());
    shell.args(site.command().get_args());
    let mut daemon = site.start_as(shell);
    let limited = Command::new("prlimit").args(["--fsize=0", "--pid", &daemon.process.id().to_string()]).status();
    assert!(limited.unwrap().success());
    let mut stream = TcpStream::connect(("127.0.0.1", daemon.port)).unwrap();
    writeln!(stream, r#"{{"protocol":{PROTOCOL},"command":{{"verb":"set_manual"}}}}"#).unwrap();
    let mut ended = None;
    wait_until("it ends", || {
        ended = daemon.process.try_wait().unwrap();
        ended.is_some()
    });
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(!answer.contains("done"), "what was not saved was not promised: {answer}");
    assert_eq!(ended.unwrap().code(), Some(1));
}

#[test]
fn systemd_is_told_and_the_watchdog_is_fed() {
    let site = Site::new();
    let manager = UnixDatagram::bind(site.path("notify")).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = site.command();
    command.env("NOTIFY_SOCKET", site.path("notify")).env("WATCHDOG_USEC", "400000");
    let daemon = site.start_as(command);
    let heard = || {
        let mut message = [0; 200];
        let n = manager.recv(&mut message).unwrap();
        String::from_utf8_lossy(&message[..n]).into_owned()
    };
    assert_eq!(heard().trim(), "READY=1");
    let began = Instant::now();
    for _ in 0..5 {
        assert_eq!(heard().trim(), "WATCHDOG=1");
    }
    assert!(began.elapsed() < Duration::from_millis(1300), "{:?}", began.elapsed());
    daemon.signal("HUP");
    let mut rest = String::new();
    while !rest.contains("READY=1") {
        rest += &heard();
    }
    assert!(rest.contains("RELOADING=1") && rest.contains("MONOTONIC_USEC="), "{rest}");
    assert!(daemon.end().success());
    let mut last = heard();
    while last.trim() == "WATCHDOG=1" {
        last = heard();
    }
    assert_eq!(last.trim(), "STOPPING=1");
}

#[test]
fn without_the_right_to_ping_it_does_not_start() {
    let site = Site::new();
    for (path, mode) in [(site.dir.path().to_owned(), 0o777), (site.path("mmm_mon.toml"), 0o600)] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    std::os::unix::fs::chown(site.path("mmm_mon.toml"), Some(65534), Some(65534)).unwrap();
    // The program may lie in a folder that others may not enter.
    let program = site.path("mmm_mond");
    fs::copy(env!("CARGO_BIN_EXE_mmm_mond"), &program).unwrap();
    let mut command = Command::new(program);
    command.arg("-c").arg(site.path("mmm_mon.toml")).uid(65534).gid(65534);
    let out = command.output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", stderr(&out));
    assert!(stderr(&out).contains("CAP_NET_RAW"), "{}", stderr(&out));
}

#[test]
fn an_idle_monitor_rests() {
    let site = Site::new();
    let daemon = site.start();
    let ticks = || -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.process.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let children = || fs::read_to_string(format!("/proc/{0}/task/{0}/children", daemon.process.id())).unwrap();
    // The first seconds, with the hosts' way down, are not the steady state.
    std::thread::sleep(Duration::from_secs(5));
    let before = ticks();
    for _ in 0..30 {
        assert_eq!(children(), "", "no process is started");
        std::thread::sleep(Duration::from_millis(100));
    }
    let used = ticks() - before;
    // 100 ticks a second: at most 10 % of one core in an unoptimised build.
    assert!(used < 30, "{used} ticks in 3 s");
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.process.id())).unwrap();
    let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap().trim().trim_end_matches(" kB");
    assert!(rss.parse::<u64>().unwrap() < 40_000, "{rss} kB");
}

//! A real `mmm_helperd` on its socket: who is obeyed, what is understood, and that nothing stays stuck.

#![expect(clippy::unwrap_used, reason = "a test may stop at the first surprise, in its helpers too")]

use mmm_helper::{Answer, Verb};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(10);
/// Set for the part of a test that runs as another user.
const SOCKET: &str = "MMM_HELPER_TEST_SOCKET";

struct Helper {
    dir: TempDir,
    child: Child,
}

impl Helper {
    fn start(start_command: &str, stop_command: &str) -> Helper {
        Helper::start_with(start_command, stop_command, Stdio::piped())
    }

    fn start_with(start_command: &str, stop_command: &str, log: Stdio) -> Helper {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("state")).unwrap();
        fs::create_dir(path("data")).unwrap();
        fs::write(path("data/ibdata1"), "rows").unwrap();
        let config = format!(
            "insecure_plaintext = true\nthis = \"db1\"\n\
             [agent]\nstate_path = {:?}\ndatadir = {:?}\nmysql_start_command = {start_command:?}\n\
             mysql_stop_command = {stop_command:?}\n\
             [host.default]\ncluster_interface = \"lo\"\nagent_user = \"a\"\nagent_password = \"a\"\nreplication_user = \"r\"\n\
             replication_password = \"r\"\n\
             [host.db1]\nip = \"127.0.0.1\"\nmode = \"master\"\npeer = \"db2\"\n\
             [host.db2]\nip = \"127.0.0.2\"\nmode = \"master\"\npeer = \"db1\"\n\
             [role.writer]\nmode = \"exclusive\"\nhosts = [\"db1\", \"db2\"]\nips = [\"10.0.0.50\"]\n",
            path("state/agent.state"),
            path("data"),
        );
        fs::write(path("mmm_agent.toml"), config).unwrap();
        fs::set_permissions(path("mmm_agent.toml"), PermissionsExt::from_mode(0o600)).unwrap();
        let child = run(&path("mmm_agent.toml"), log);
        let mut helper = Helper { dir, child };
        until(|| {
            if helper.child.try_wait().unwrap().is_some() {
                let mut said = String::new();
                if let Some(mut stderr) = helper.child.stderr.take() {
                    stderr.read_to_string(&mut said).unwrap();
                }
                panic!("it has ended: {said}");
            }
            UnixStream::connect(helper.socket()).is_ok()
        });
        helper
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("state/helper.sock")
    }

    /// Sends a line; the connection.
    fn say(&self, line: &str) -> BufReader<UnixStream> {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(format!("{line}\n").as_bytes()).unwrap();
        BufReader::new(stream)
    }

    fn ask(&self, verb: &Verb) -> Answer {
        answer(&mut self.say(&serde_json::to_string(verb).unwrap()))
    }

    fn refusal(&self, verb: &Verb) -> String {
        let answer = self.ask(verb);
        let Answer::Failed { why } = answer else { panic!("{answer:?}") };
        why
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(config: &Path, log: Stdio) -> Child {
    Command::new(env!("CARGO_BIN_EXE_mmm_helperd"))
        .arg("--config")
        .arg(config)
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// A process of that name that has the file open.
struct Holder(Child);

impl Holder {
    fn of(name: &str, file: &Path) -> Holder {
        let file = fs::File::open(file).unwrap();
        Holder(Command::new("sleep").arg0(name).arg("1000").stdin(file).spawn().unwrap())
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn answer(from: &mut BufReader<UnixStream>) -> Answer {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
}

fn until(mut good: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !good() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn only_the_fixed_verbs_are_understood_and_nothing_is_run_from_a_request() {
    let helper = Helper::start("touch started", "true");
    for line in [
        r#"{"verb":"run","command":"touch evil"}"#,
        r#"{"verb":"start","command":"touch evil"}"#,
        r#"{"verb":"receive","expected_bytes":1,"path":"/etc"}"#,
        r#"{"verb":"receive","expected_bytes":"; touch evil"}"#,
        "touch evil",
        "",
    ] {
        let Answer::Failed { why } = answer(&mut helper.say(line)) else { panic!("{line}") };
        assert!(why.contains("not understood"), "{line}: {why}");
    }
    let Answer::Status(status) = helper.ask(&Verb::Status) else { panic!() };
    assert_eq!(status.users, [] as [u32; 0]);
    assert!(status.datadir.unwrap().ends_with("data"));
}

#[test]
fn start_and_stop_are_the_commands_of_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let (started, stopped) = (dir.path().join("started"), dir.path().join("stopped"));
    let helper =
        Helper::start(&format!("touch {}", started.display()), &format!("touch {}; exit 3", stopped.display()));
    assert_eq!(helper.ask(&Verb::Start), Answer::Done);
    assert!(started.exists());
    assert_eq!(helper.ask(&Verb::Stop), Answer::Done, "nothing runs, whatever the command says");
    let held = Holder::of("/usr/sbin/mysqld", &helper.path("data/ibdata1"));
    let why = helper.refusal(&Verb::Stop);
    assert!(stopped.exists() && why.contains("mysql_stop_command ended with exit status: 3"), "{why}");
    // A server that has the data open runs, whatever the command says.
    fs::remove_file(&started).unwrap();
    assert_eq!(helper.ask(&Verb::Start), Answer::Done, "it runs already");
    assert!(!started.exists());
    drop(held);
    assert!(helper.refusal(&Verb::Swap).contains("nothing whole has been received"));
    assert!(helper.refusal(&Verb::Restore).contains("nothing is kept"));
    assert_eq!(helper.ask(&Verb::Discard), Answer::Done);
    assert_eq!(fs::read_to_string(helper.path("data/ibdata1")).unwrap(), "rows");
}

#[test]
fn who_reads_a_file_in_the_datadir_is_not_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let started = dir.path().join("started");
    let helper = Helper::start(&format!("touch {}", started.display()), "true");
    let users = || {
        let Answer::Status(status) = helper.ask(&Verb::Status) else { panic!() };
        status.users
    };
    let mut reader = Holder::of("log-shipper", &helper.path("data/ibdata1"));
    assert_eq!(users(), [] as [u32; 0]);
    assert_eq!(helper.ask(&Verb::Stop), Answer::Done, "the server is not waited for for ten minutes");
    assert_eq!(helper.ask(&Verb::Start), Answer::Done);
    assert!(started.exists(), "it did not run already");
    assert_eq!(helper.ask(&Verb::Kill), Answer::Done);
    assert!(reader.lives());

    let mut server = Holder::of("mariadbd", &helper.path("data/ibdata1"));
    assert_eq!(users(), [server.pid()]);
    assert_eq!(helper.ask(&Verb::Kill), Answer::Done);
    until(|| !server.lives());
    assert!(reader.lives());

    // But under its feet nothing is renamed.
    fs::create_dir(helper.path("data.mmm-ready")).unwrap();
    let why = helper.refusal(&Verb::Swap);
    assert!(why.contains(&format!("{} (log-shipper)", reader.pid())), "{why}");
    drop(reader);
    assert_eq!(helper.ask(&Verb::Swap), Answer::Done);
}

#[test]
fn a_log_that_cannot_be_written_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let started = dir.path().join("started");
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut helper = Helper::start_with(&format!("touch {}", started.display()), "true", full.into());
    assert_eq!(helper.ask(&Verb::Start), Answer::Done);
    assert!(started.exists() && helper.child.try_wait().unwrap().is_none());
}

#[test]
fn one_work_at_a_time_and_looking_is_always_possible() {
    let dir = tempfile::tempdir().unwrap();
    let (began, go) = (dir.path().join("began"), dir.path().join("go"));
    let command = format!("touch {}; while [ ! -e {} ]; do sleep 0.05; done", began.display(), go.display());
    let helper = Helper::start(&command, "true");
    let mut first = helper.say(r#"{"verb":"start"}"#);
    until(|| began.exists());
    let why = helper.refusal(&Verb::Discard);
    assert!(why.contains("busy: it was asked to start the server"), "{why}");
    assert!(matches!(helper.ask(&Verb::Status), Answer::Status(_)));
    fs::write(&go, "").unwrap();
    assert_eq!(answer(&mut first), Answer::Done);
    assert_eq!(helper.ask(&Verb::Discard), Answer::Done);
}

#[test]
fn another_user_is_refused_even_when_the_socket_lets_him_in() {
    if let Some(socket) = std::env::var_os(SOCKET) {
        let mut stream = UnixStream::connect(PathBuf::from(socket)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = stream.write_all(b"{\"verb\":\"start\"}\n");
        let mut line = String::new();
        // Closed without a word, or reset because the request was not even read.
        assert_eq!(BufReader::new(stream).read_line(&mut line).unwrap_or(0), 0, "{line}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let started = dir.path().join("started");
    let helper = Helper::start(&format!("touch {}", started.display()), "true");
    let mode = fs::metadata(helper.socket()).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    fs::set_permissions(helper.socket(), PermissionsExt::from_mode(0o666)).unwrap();
    let program = helper.path("as_nobody");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let asked = Command::new(&program)
        .args(["--exact", "another_user_is_refused_even_when_the_socket_lets_him_in"])
        .env(SOCKET, helper.socket())
        .uid(65534)
        .output()
        .unwrap();
    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stdout));
    assert!(!started.exists());
    assert_eq!(helper.ask(&Verb::Start), Answer::Done);
    assert!(started.exists(), "and root is obeyed");
}

#[test]
fn a_second_helper_for_the_same_agent_does_not_start() {
    let helper = Helper::start("true", "true");
    let second = run(&helper.path("mmm_agent.toml"), Stdio::piped()).wait_with_output().unwrap();
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("another mmm_helperd listens on"), "{said}");
    assert_eq!(helper.ask(&Verb::Start), Answer::Done, "the first one goes on");
}

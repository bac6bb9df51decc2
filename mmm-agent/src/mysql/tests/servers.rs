//! Real servers on loopback for the stories: unpacked by tests/get-server.sh into MMM_TEST_SERVERS (default
//! /var/tmp/mmm-servers). A kind that is not there is skipped, and the skip says how to get it.
//!
//! Only processes started here are ever signalled, by pid; data lives in a temporary directory of its own.

use crate::mysql::session::{Fields, quote};
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, OptsBuilder, Row};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

/// A second address of the machine, as the writer role's.
pub(super) const WRITER: &str = "127.0.0.50";
/// Needs quoting in SQL.
pub(super) const REPLICATION_PASSWORD: &str = "sl'a\\ve\"1";
pub(super) const AGENT_PASSWORD: &str = "RepAgent";
const EVERYTHING: &str = "boss";

const MARIADB_GRANTS: &str = "READ_ONLY ADMIN, CONNECTION ADMIN, PROCESS, SLAVE MONITOR, REPLICATION SLAVE ADMIN, \
                              REPLICATION MASTER ADMIN, BINLOG MONITOR, BINLOG ADMIN, BINLOG REPLAY, RELOAD, \
                              LOCK TABLES";
const MYSQL_GRANTS: &str = "SYSTEM_VARIABLES_ADMIN, CONNECTION_ADMIN, PROCESS, REPLICATION CLIENT, \
                            REPLICATION_SLAVE_ADMIN, XA_RECOVER_ADMIN, CLONE_ADMIN, RELOAD";

pub(super) struct Instance {
    kind: String,
    root: PathBuf,
    dir: TempDir,
    pub(super) port: u16,
    server_id: u32,
    /// As on the command line; they count more than those that every test server has.
    pub(super) options: Vec<String>,
    child: Option<Child>,
}

/// None, and the reason in words, when the kind is not unpacked here.
pub(super) async fn start(kind: &str, server_id: u32) -> Option<Instance> {
    start_with(kind, server_id, &[]).await
}

/// What a server needs to have semi-synchronous replication at all.
pub(super) fn semisync_args(kind: &str) -> &'static [&'static str] {
    if kind.starts_with("mysql") {
        &["--plugin-load-add=semisync_source.so", "--plugin-load-add=semisync_replica.so"]
    } else {
        &[]
    }
}

/// With more options for the server.
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
pub(super) async fn start_with(kind: &str, server_id: u32, args: &[&str]) -> Option<Instance> {
    let store = std::env::var_os("MMM_TEST_SERVERS").map_or(PathBuf::from("/var/tmp/mmm-servers"), PathBuf::from);
    let root = store.join(kind);
    if !root.join("bin").exists() {
        let root = root.display();
        eprintln!("SKIPPED: no {kind} server in {root}; get it with: tests/get-server.sh {kind} {root}");
        return None;
    }
    let dir = tempfile::Builder::new().prefix("mmm-agent-mysql-").tempdir_in("/var/tmp").unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let options = args.iter().map(|a| (*a).to_owned()).collect();
    let mut instance = Instance { kind: kind.to_owned(), root, dir, port, server_id, options, child: None };
    let template = instance.template(&store);
    let copied = Command::new("cp").arg("-a").arg(&template).arg(instance.path("data")).status().unwrap();
    assert!(copied.success(), "copying {}", template.display());
    fs::create_dir(instance.path("tmp")).unwrap();
    instance.run().await;
    Some(instance)
}

impl Instance {
    pub(super) fn is_mariadb(&self) -> bool {
        self.kind.starts_with("mariadb")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn binary(&self) -> PathBuf {
        self.root.join("bin").join(if self.is_mariadb() { "mariadbd" } else { "mysqld" })
    }

    fn share(&self) -> PathBuf {
        let usr = self.root.join("root/usr");
        ["share/mariadb", "share/mysql"].map(|s| usr.join(s)).into_iter().find(|p| p.exists()).unwrap()
    }

    fn places(&self) -> Vec<String> {
        let usr = self.root.join("root/usr");
        let share = self.share();
        let mut args = vec![
            "--no-defaults".to_owned(),
            "--user=root".to_owned(),
            format!("--basedir={}", usr.display()),
            format!("--plugin-dir={}", usr.join("lib/mysql/plugin").display()),
            format!("--lc-messages-dir={}", share.display()),
            format!("--character-sets-dir={}", share.join("charsets").display()),
            "--innodb-buffer-pool-size=16M".to_owned(),
        ];
        if self.is_mariadb() {
            args.push("--innodb-log-file-size=10M".to_owned());
        } else {
            args.extend(
                ["--secure-file-priv=NULL", "--mysqlx=OFF", "--innodb-redo-log-capacity=32M"].map(str::to_owned),
            );
        }
        args
    }

    fn schema(&self) -> String {
        let grants = if self.is_mariadb() { MARIADB_GRANTS } else { MYSQL_GRANTS };
        let mut sql = String::new();
        for (user, password, grant) in [
            ("mmm_agent", AGENT_PASSWORD, format!("{grants} ON *.*")),
            ("blind_agent", AGENT_PASSWORD, "PROCESS ON *.*".to_owned()),
            (
                "replication",
                REPLICATION_PASSWORD,
                format!("{} ON *.*", self.words("REPLICATION SLAVE", "REPLICATION SLAVE, BACKUP_ADMIN")),
            ),
            ("app", "app", "ALL PRIVILEGES ON app.*".to_owned()),
            (EVERYTHING, EVERYTHING, "ALL PRIVILEGES ON *.*".to_owned()),
        ] {
            sql += &format!(
                "CREATE USER '{user}'@'%' IDENTIFIED BY {};\nGRANT {grant} TO '{user}'@'%'{};\n",
                quote(password),
                if user == EVERYTHING { " WITH GRANT OPTION" } else { "" }
            );
        }
        if self.is_mariadb() {
            sql += "GRANT SELECT ON mysql.* TO 'mmm_agent'@'%';\n";
        }
        sql += "CREATE DATABASE app;\n";
        sql += "CREATE TABLE app.t (n BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY, id BIGINT NOT NULL);\n";
        sql
    }

    /// A data directory with users and table, made once per kind and schema.
    fn template(&self, store: &Path) -> PathBuf {
        let schema = self.schema();
        let sum =
            schema.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let template = store.join(format!("template-agent-{}-{sum:016x}", self.kind));
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        if template.exists() {
            return template;
        }
        let half = self.path("half");
        fs::create_dir(&half).unwrap();
        let (mut sql, mode) = if self.is_mariadb() {
            let share = self.share();
            let mut sql = "create database mysql;\nuse mysql;\n".to_owned();
            for name in ["system_tables", "performance_tables", "system_tables_data"] {
                let file = ["mariadb", "mysql"].map(|p| share.join(format!("{p}_{name}.sql")));
                let file = file.into_iter().find(|f| f.exists()).unwrap();
                sql += &fs::read_to_string(file).unwrap();
            }
            (sql + "delete from mysql.global_priv where User='';\nflush privileges;\n", "--bootstrap")
        } else {
            ("SET sql_log_bin=0;\n".to_owned(), "--initialize-insecure")
        };
        sql += &schema;
        let input = self.path("init.sql");
        fs::write(&input, sql).unwrap();
        let mut command = Command::new(self.binary());
        command.args(self.places()).arg(mode).arg(format!("--datadir={}", half.display()));
        // A MariaDB that starts clears the temporary tables of others out of a shared folder.
        command.arg(format!("--tmpdir={}", self.dir.path().display()));
        if self.is_mariadb() {
            command.arg("--skip-grant-tables").stdin(fs::File::open(&input).unwrap());
        } else {
            command.arg("--skip-log-bin").arg(format!("--init-file={}", input.display())).stdin(Stdio::null());
        }
        let made = command.output().unwrap();
        let said = String::from_utf8_lossy(&made.stderr).into_owned();
        assert!(made.status.success() && !said.contains("ERROR]") && !said.contains("ERROR:"), "{said}");
        let _ = fs::remove_file(half.join("auto.cnf"));
        // Another test may have been quicker.
        let beside = store.join(format!("half-agent-{}-{}", std::process::id(), self.port));
        let copied = Command::new("cp").arg("-a").arg(&half).arg(&beside).status().unwrap();
        assert!(copied.success());
        if fs::rename(&beside, &template).is_err() {
            let _ = fs::remove_dir_all(&beside);
        }
        template
    }

    /// Starts the process and waits until it answers.
    pub(super) async fn run(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = Command::new(self.binary());
        command.args(self.places());
        for (name, value) in [("datadir", "data"), ("socket", "sock"), ("pid-file", "pid"), ("tmpdir", "tmp")] {
            command.arg(format!("--{name}={}", self.path(value).display()));
        }
        command
            .args([format!("--port={}", self.port), format!("--server-id={}", self.server_id)])
            .arg(format!("--bind-address=127.0.0.1,{WRITER}"))
            .args(["--skip-name-resolve", "--performance-schema=OFF", "--log-bin=bin", "--relay-log=relay"])
            .args(["--skip-slave-start", "--sync-binlog=0", "--innodb-flush-log-at-trx-commit=2"]);
        if self.is_mariadb() {
            command.args(["--log-slave-updates", "--gtid-strict-mode=1"]);
        } else {
            command.args(["--gtid-mode=ON", "--enforce-gtid-consistency=ON"]);
        }
        command.args(&self.options);
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        self.child = Some(child);
        let until = Instant::now() + Duration::from_secs(60);
        while self.try_login(EVERYTHING, EVERYTHING, "127.0.0.1").await.is_err() {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            let log = || fs::read_to_string(self.path("log")).unwrap_or_default();
            assert!(ended.is_none() && Instant::now() < until, "{} does not start:\n{}", self.kind, log());
            sleep(Duration::from_millis(50)).await;
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().unwrap().id();
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
    }

    pub(super) fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    pub(super) fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Sends the signal only; the process is reaped later.
    pub(super) fn kill9(&self) {
        self.signal(Signal::SIGKILL);
    }

    pub(super) fn reap(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.wait().unwrap();
        }
    }

    async fn try_login(&self, user: &str, password: &str, ip: &str) -> Result<Conn, mysql_async::Error> {
        let opts = OptsBuilder::default()
            .ip_or_hostname(ip)
            .tcp_port(self.port)
            .user(Some(user))
            .pass(Some(password))
            .prefer_socket(false)
            .max_allowed_packet(Some(16 << 20))
            .wait_timeout(Some(28800));
        match timeout(Duration::from_secs(5), Conn::new(opts)).await {
            Ok(answer) => answer,
            Err(_) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()),
        }
    }

    pub(super) async fn login(&self, user: &str, ip: &str) -> Result<Conn, mysql_async::Error> {
        self.try_login(user, user, ip).await
    }

    /// A user who may do everything.
    pub(super) async fn boss(&self) -> Conn {
        self.login(EVERYTHING, "127.0.0.1").await.unwrap()
    }

    pub(super) async fn app(&self) -> Conn {
        self.login("app", "127.0.0.1").await.unwrap()
    }

    /// One statement by someone who may do everything; of the first row, the first column.
    pub(super) async fn sql(&self, sql: &str) -> String {
        let mut boss = self.boss().await;
        let row: Option<Row> = timeout(Duration::from_secs(20), boss.query_first(sql)).await.unwrap().unwrap();
        let value = row.map(|r| r.get::<Option<String>, _>(0).unwrap().unwrap_or_default()).unwrap_or_default();
        boss.disconnect().await.unwrap();
        value
    }

    pub(super) async fn status(&self) -> Fields {
        let mut boss = self.boss().await;
        let sql = if self.is_mariadb() { "SHOW SLAVE STATUS" } else { "SHOW REPLICA STATUS" };
        let row: Option<Row> = boss.query_first(sql).await.unwrap();
        Fields::from(row.unwrap())
    }

    pub(super) fn words(&self, mariadb: &'static str, mysql: &'static str) -> &'static str {
        if self.is_mariadb() { mariadb } else { mysql }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

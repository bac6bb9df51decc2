//! Two hosts with real servers on loopback, each with a configuration of its own, and with a real mmm_helperd where a
//! story wants one. Servers come from MMM_TEST_SERVERS (default /var/tmp/mmm-servers), unpacked by tests/get-server.sh.
//!
//! Only processes started here are ever signalled, by pid; data live in a temporary directory of their own.

use super::super::sql::quote;
use super::{Donor, Helper};
use crate::lines::Refusals;
use crate::monitor_link::{MonitorLink, Myself};
use mmm_common::config::{Agent as Config, parse};
use mmm_common::epoch::Boot;
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, OptsBuilder, Row};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

pub(super) const REPLICATION: &str = "replication";
/// Needs quoting in SQL and in option files.
const REPLICATION_PASSWORD: &str = "sl'a\\ve\"1";
const AGENT_PASSWORD: &str = "RepAgent";
const BOSS: &str = "boss";
const PATIENCE: Duration = Duration::from_secs(60);

/// What the documentation says that the agent needs, for everything.
const MARIADB_GRANTS: &str = "READ_ONLY ADMIN, CONNECTION ADMIN, PROCESS, SLAVE MONITOR, REPLICATION SLAVE ADMIN, \
                              BINLOG MONITOR, BINLOG ADMIN, BINLOG REPLAY, REPLICATION MASTER ADMIN, RELOAD, LOCK TABLES";
const MYSQL_GRANTS: &str = "SYSTEM_VARIABLES_ADMIN, CONNECTION_ADMIN, PROCESS, REPLICATION CLIENT, \
                            REPLICATION_SLAVE_ADMIN, XA_RECOVER_ADMIN, CLONE_ADMIN, RELOAD";

pub(super) struct Pair {
    pub(super) db1: Host,
    pub(super) db2: Host,
}

pub(super) struct Host {
    kind: String,
    root: PathBuf,
    dir: TempDir,
    datadir: PathBuf,
    ip: &'static str,
    port: u16,
    agent_port: u16,
    server_id: u32,
    pub(super) config: Arc<Config>,
    helper: Option<Child>,
}

impl Pair {
    /// None, and the reason in words, when the kind is not unpacked here.
    #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
    pub(super) async fn start(kind: &str) -> Option<Pair> {
        let store = std::env::var_os("MMM_TEST_SERVERS").map_or(PathBuf::from("/var/tmp/mmm-servers"), PathBuf::from);
        let root = store.join(kind);
        let needed = if kind.starts_with("mariadb") { "mbstream" } else { "mysqlbinlog" };
        if !root.join("bin").join(needed).exists() {
            let root = root.display();
            eprintln!(
                "SKIPPED: no {kind} server with {needed} in {root}; get it with: tests/get-server.sh {kind} {root}"
            );
            return None;
        }
        let free = |ip: &str| TcpListener::bind((ip, 0)).unwrap().local_addr().unwrap().port();
        let hosts = [("db1", "127.0.0.1"), ("db2", "127.0.0.2")].map(|(name, ip)| (name, ip, free(ip), free(ip)));
        let common = common(&hosts);
        let mut made = vec![];
        for (n, (name, ip, port, agent_port)) in hosts.into_iter().enumerate() {
            let dir = tempfile::Builder::new().prefix("mmm-jobs-").tempdir_in("/var/tmp").unwrap();
            let datadir = dir.path().join("data");
            let config = configure(dir.path(), name, &common, &datadir);
            made.push(Host {
                kind: kind.to_owned(),
                root: root.clone(),
                datadir,
                dir,
                ip,
                port,
                agent_port,
                server_id: n as u32 + 1,
                config,
                helper: None,
            });
        }
        for host in &mut made {
            let template = host.template(&store);
            let copied = Command::new("cp").arg("-a").arg(&template).arg(&host.datadir).status().unwrap();
            assert!(copied.success(), "copying {}", template.display());
            fs::create_dir(host.path("tmp")).unwrap();
            host.write_scripts();
            host.run_script("start.sh");
        }
        for host in &made {
            host.until_sql("SELECT 1").await;
        }
        let db2 = made.pop()?;
        made.pop().map(|db1| Pair { db1, db2 })
    }
}

fn common(hosts: &[(&str, &str, u16, u16); 2]) -> String {
    let mut text = format!(
        "insecure_plaintext = true\n[host.default]\ncluster_interface = \"lo\"\nagent_user = \"mmm_agent\"\n\
         agent_password = \"{AGENT_PASSWORD}\"\nreplication_user = \"{REPLICATION}\"\nreplication_password = {}\n",
        toml_text(REPLICATION_PASSWORD)
    );
    for ((name, ip, port, agent_port), peer) in hosts.iter().zip(["db2", "db1"]) {
        text += &format!(
            "[host.{name}]\nip = \"{ip}\"\nmode = \"master\"\npeer = \"{peer}\"\nmysql_port = {port}\nagent_port = \
             {agent_port}\n"
        );
    }
    text + "[role.writer]\nmode = \"exclusive\"\nhosts = [\"db1\", \"db2\"]\nips = [\"10.0.0.50\"]\n"
}

fn toml_text(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn configure(dir: &Path, name: &str, common: &str, datadir: &Path) -> Arc<Config> {
    let write = |file: &str, text: &str| {
        fs::write(dir.join(file), text).unwrap();
        fs::set_permissions(dir.join(file), fs::Permissions::from_mode(0o600)).unwrap();
    };
    fs::create_dir_all(dir.join("state")).unwrap();
    write("mmm_common.toml", common);
    write(
        "mmm_agent.toml",
        &format!(
            "include = [\"mmm_common.toml\"]\nthis = \"{name}\"\n[agent]\nstate_path = {:?}\nmysql_start_command = {:?}\n\
             mysql_stop_command = {:?}\nmysql_pid_file = {:?}\ndatadir = {datadir:?}\n",
            dir.join("state/agent.state"),
            dir.join("start.sh"),
            dir.join("stop.sh"),
            dir.join("pid"),
        ),
    );
    Arc::new(parse::agent(&dir.join("mmm_agent.toml")).unwrap_or_else(|mistakes| panic!("{mistakes:?}")))
}

impl Host {
    fn is_mariadb(&self) -> bool {
        self.kind.starts_with("mariadb")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn agent(&self) -> SocketAddr {
        SocketAddr::new(self.ip.parse().unwrap(), self.agent_port)
    }

    fn program(&self, name: &str) -> PathBuf {
        self.root.join("bin").join(name)
    }

    fn share(&self) -> PathBuf {
        let usr = self.root.join("root/usr");
        ["share/mariadb", "share/mysql"].map(|s| usr.join(s)).into_iter().find(|p| p.exists()).unwrap()
    }

    fn places(&self) -> Vec<String> {
        let usr = self.root.join("root/usr");
        let share = self.share();
        // The launchers of the unpacked programs, where a real basedir has the programs.
        let base = self.path("base");
        if !base.exists() {
            fs::create_dir(&base).unwrap();
            for part in ["bin", "root"] {
                symlink(self.root.join(part), base.join(part)).unwrap();
            }
        }
        let mut args = vec![
            "--no-defaults".to_owned(),
            "--user=root".to_owned(),
            format!("--basedir={}", base.display()),
            format!("--plugin-dir={}", usr.join("lib/mysql/plugin").display()),
            format!("--lc-messages-dir={}", share.display()),
            format!("--character-sets-dir={}", share.join("charsets").display()),
            "--innodb-buffer-pool-size=16M".to_owned(),
        ];
        if self.is_mariadb() {
            args.push("--innodb-log-file-size=10M".to_owned());
        } else {
            let mysql = ["--secure-file-priv=NULL", "--mysqlx=OFF", "--innodb-redo-log-capacity=32M"];
            args.extend(mysql.map(str::to_owned));
        }
        args
    }

    fn schema(&self) -> String {
        let (agent, also) = if self.is_mariadb() { (MARIADB_GRANTS, "") } else { (MYSQL_GRANTS, ", BACKUP_ADMIN") };
        let mut sql = String::new();
        for (user, password, grant) in [
            ("mmm_agent", AGENT_PASSWORD, format!("{agent} ON *.*")),
            (REPLICATION, REPLICATION_PASSWORD, format!("REPLICATION SLAVE{also} ON *.*")),
            (BOSS, BOSS, "ALL PRIVILEGES ON *.*".to_owned()),
        ] {
            let option = if user == BOSS { " WITH GRANT OPTION" } else { "" };
            let password = quote(password);
            sql += &format!(
                "CREATE USER '{user}'@'%' IDENTIFIED BY {password};\nGRANT {grant} TO '{user}'@'%'{option};\n"
            );
        }
        sql += "CREATE DATABASE app;\nCREATE TABLE app.t (n BIGINT NOT NULL PRIMARY KEY, id BIGINT NOT NULL);\n";
        sql + "CREATE TABLE app.loose (n INT) ENGINE=MyISAM;\n"
    }

    /// A data directory with users and tables, made once per kind and schema.
    fn template(&self, store: &Path) -> PathBuf {
        let schema = self.schema();
        let sum =
            schema.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let template = store.join(format!("template-jobs-{}-{sum:016x}", self.kind));
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        if template.exists() {
            return template;
        }
        let half = self.path("half");
        fs::create_dir(&half).unwrap();
        let (mut sql, mode, program) = if self.is_mariadb() {
            let share = self.share();
            let mut sql = "create database mysql;\nuse mysql;\n".to_owned();
            for name in ["system_tables", "performance_tables", "system_tables_data"] {
                let file = ["mariadb", "mysql"].map(|p| share.join(format!("{p}_{name}.sql")));
                let file = file.into_iter().find(|f| f.exists()).unwrap();
                sql += &fs::read_to_string(file).unwrap();
            }
            (sql + "delete from mysql.global_priv where User='';\nflush privileges;\n", "--bootstrap", "mariadbd")
        } else {
            ("SET sql_log_bin=0;\n".to_owned(), "--initialize-insecure", "mysqld")
        };
        sql += &schema;
        let input = self.path("init.sql");
        fs::write(&input, sql).unwrap();
        let mut command = Command::new(self.program(program));
        command.args(self.places()).arg(mode).arg(format!("--datadir={}", half.display()));
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
        let beside = store.join(format!("half-jobs-{}-{}", std::process::id(), self.port));
        let copied = Command::new("cp").arg("-a").arg(&half).arg(&beside).status().unwrap();
        assert!(copied.success());
        if fs::rename(&beside, &template).is_err() {
            let _ = fs::remove_dir_all(&beside);
        }
        template
    }

    fn write_scripts(&self) {
        let mut args = self.places();
        args.extend([
            format!("--datadir={}", self.datadir.display()),
            format!("--socket={}", self.path("sock").display()),
            format!("--pid-file={}", self.path("pid").display()),
            format!("--tmpdir={}", self.path("tmp").display()),
            format!("--port={}", self.port),
            format!("--server-id={}", self.server_id),
            format!("--bind-address={}", self.ip),
        ]);
        let settings = ["--skip-name-resolve", "--performance-schema=OFF", "--log-bin=bin", "--relay-log=relay"];
        args.extend(settings.map(str::to_owned));
        let settings = ["--skip-slave-start", "--sync-binlog=0", "--innodb-flush-log-at-trx-commit=2"];
        args.extend(settings.map(str::to_owned));
        let (program, more): (_, &[&str]) = if self.is_mariadb() {
            ("mariadbd", &["--log-slave-updates", "--gtid-strict-mode=1", "--binlog-format=ROW"])
        } else {
            ("mysqld", &["--gtid-mode=ON", "--enforce-gtid-consistency=ON"])
        };
        args.extend(more.iter().map(|s| (*s).to_owned()));
        let dir = self.dir.path().display();
        let start = format!(
            "#!/bin/sh\nif [ -e {dir}/broken ]; then rm {dir}/broken; exit 1; fi\nsetsid {} {} </dev/null >>{dir}/log 2>&1 \
             &\n",
            self.program(program).display(),
            args.join(" "),
        );
        let stop = format!("#!/bin/sh\n[ -e {dir}/pid ] && kill $(cat {dir}/pid)\nexit 0\n");
        for (name, text) in [("start.sh", start), ("stop.sh", stop)] {
            fs::write(self.path(name), text).unwrap();
            fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
    }

    fn run_script(&self, name: &str) {
        assert!(Command::new(self.path(name)).status().unwrap().success(), "{name}");
    }

    pub(super) async fn start_server(&self) {
        self.run_script("start.sh");
        self.until_sql("SELECT 1").await;
    }

    pub(super) fn break_next_start(&self) {
        fs::write(self.path("broken"), "").unwrap();
    }

    /// What the command that stops the server does from now on, besides.
    pub(super) fn stop_with(&self, line: &str) {
        let script = fs::read_to_string(self.path("stop.sh")).unwrap();
        fs::write(self.path("stop.sh"), script.replacen('\n', &format!("\n{line}\n"), 1)).unwrap();
    }

    /// Opened by whoever is not the server.
    pub(super) fn read_in_datadir(&self) -> fs::File {
        fs::File::open(self.datadir.join("ibdata1")).unwrap()
    }

    fn path_variable(&self) -> String {
        format!("{}:{}", self.root.join("bin").display(), std::env::var("PATH").unwrap())
    }

    pub(super) fn start_helper(&mut self) {
        // target/debug/deps/mmm_agentd-… -> target/debug/mmm_helperd
        let program = std::env::current_exe().unwrap().parent().unwrap().with_file_name("mmm_helperd");
        assert!(program.exists(), "no {}: run cargo build -p mmm-helper", program.display());
        let log = fs::File::options().create(true).append(true).open(self.path("helper.log")).unwrap();
        let child = Command::new(program)
            .arg("--config")
            .arg(self.path("mmm_agent.toml"))
            .env("PATH", self.path_variable())
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.helper = Some(child);
        let until = std::time::Instant::now() + PATIENCE;
        while std::os::unix::net::UnixStream::connect(self.path("state/helper.sock")).is_err() {
            let log = || fs::read_to_string(self.path("helper.log")).unwrap();
            assert!(std::time::Instant::now() < until, "{}", log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// As much of the host's agent as gives its data away.
    pub(super) async fn start_agent(&self) -> MonitorLink {
        let myself = Myself {
            host: self.config.this.clone(),
            boot: Boot(1),
            hosts: self.config.cluster.hosts.iter().map(|(name, host)| (name.clone(), host.ip)).collect(),
            monitor_gone_after: Duration::from_secs(5),
            examiner: crate::examine::Examiner::nothing(),
            donor: Donor::new(Helper::of(&self.config)),
        };
        let link = MonitorLink::start(self.agent(), myself, Refusals::default(), mpsc::channel(1).0).0;
        let until = Instant::now() + PATIENCE;
        while tokio::net::TcpStream::connect(self.agent()).await.is_err() {
            assert!(Instant::now() < until);
            sleep(Duration::from_millis(10)).await;
        }
        link
    }

    async fn boss(&self) -> Result<Conn, mysql_async::Error> {
        let opts = OptsBuilder::default()
            .ip_or_hostname(self.ip)
            .tcp_port(self.port)
            .user(Some(BOSS))
            .pass(Some(BOSS))
            .prefer_socket(false)
            .max_allowed_packet(Some(16 << 20))
            .wait_timeout(Some(28800));
        match timeout(Duration::from_secs(5), Conn::new(opts)).await {
            Ok(answer) => answer,
            Err(_) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()),
        }
    }

    /// By someone who may do everything; of the last statement's first row, the first column.
    pub(super) async fn sql_all(&self, statements: &[&str]) -> String {
        let mut boss = self.boss().await.unwrap();
        let mut value = String::new();
        for sql in statements {
            let row: Result<Option<Row>, _> = timeout(PATIENCE, boss.query_first(*sql)).await.unwrap();
            let row = row.unwrap_or_else(|e| panic!("{sql}: {e}"));
            value = row.map(|r| r.get::<Option<String>, _>(0).unwrap().unwrap_or_default()).unwrap_or_default();
        }
        boss.disconnect().await.unwrap();
        value
    }

    pub(super) async fn sql(&self, sql: &str) -> String {
        self.sql_all(&[sql]).await
    }

    /// As soon as the server takes logins.
    pub(super) async fn until_sql(&self, sql: &str) -> String {
        let until = Instant::now() + PATIENCE;
        while self.boss().await.is_err() {
            let log = || fs::read_to_string(self.path("log")).unwrap_or_default();
            assert!(Instant::now() < until, "{} does not start:\n{}", self.kind, log());
            sleep(Duration::from_millis(50)).await;
        }
        self.sql(sql).await
    }

    /// Replicates until everything that the source has now is here.
    pub(super) async fn follow(&self, source: &Host) {
        let (ip, port, password) = (source.ip, source.port, quote(REPLICATION_PASSWORD));
        let (change, start, wait, position) = if self.is_mariadb() {
            (
                format!(
                    "CHANGE MASTER TO MASTER_HOST='{ip}', MASTER_PORT={port}, MASTER_USER='{REPLICATION}', \
                     MASTER_PASSWORD={password}, MASTER_USE_GTID=slave_pos{}",
                    if self.kind.contains("11.8") { ", MASTER_SSL_VERIFY_SERVER_CERT=0" } else { "" }
                ),
                "START SLAVE",
                "MASTER_GTID_WAIT",
                source.sql("SELECT @@gtid_binlog_pos").await,
            )
        } else {
            (
                format!(
                    "CHANGE REPLICATION SOURCE TO SOURCE_HOST='{ip}', SOURCE_PORT={port}, SOURCE_USER='{REPLICATION}', \
                     SOURCE_PASSWORD={password}, SOURCE_AUTO_POSITION=1, GET_SOURCE_PUBLIC_KEY=1"
                ),
                "START REPLICA",
                "WAIT_FOR_EXECUTED_GTID_SET",
                source.sql("SELECT @@gtid_executed").await,
            )
        };
        self.sql_all(&[&change, start]).await;
        let waited = self.sql(&format!("SELECT CONCAT({wait}('{position}', 30))")).await;
        assert_eq!(waited, "0", "{position} did not come");
    }

    pub(super) async fn forget_source(&self) {
        if self.is_mariadb() {
            self.sql_all(&["STOP SLAVE", "RESET SLAVE ALL"]).await;
        } else {
            self.sql_all(&["STOP REPLICA", "RESET REPLICA ALL"]).await;
        }
    }

    pub(super) async fn until_purged(&self, newest: &str) {
        let until = Instant::now() + PATIENCE;
        while self.sql("SHOW BINARY LOGS").await != newest {
            assert!(Instant::now() < until);
            self.sql(&format!("PURGE BINARY LOGS TO '{newest}'")).await;
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Runs a file of SQL by the server's own client.
    pub(super) fn replay(&self, file: &str) {
        let client = if self.is_mariadb() { "mariadb" } else { "mysql" };
        let done = Command::new(self.program(client))
            .args(["--no-defaults", "--binary-mode", "--user", BOSS, &format!("--password={BOSS}")])
            .arg(format!("--socket={}", self.path("sock").display()))
            .stdin(fs::File::open(file).unwrap())
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    pub(super) fn backup_stream(&self) -> Vec<u8> {
        let done = Command::new(self.program("mariadb-backup"))
            .args(["--no-defaults", "--backup", "--stream=mbstream", "--user", BOSS, &format!("--password={BOSS}")])
            .arg(format!("--socket={}", self.path("sock").display()))
            .arg(format!("--datadir={}", self.datadir.display()))
            .arg(format!("--target-dir={}", self.path("target").display()))
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        done.stdout
    }

    pub(super) fn pid(&self) -> i32 {
        fs::read_to_string(self.path("pid")).unwrap().trim().parse().unwrap()
    }

    pub(super) fn kill_server(&self) {
        let pid = self.pid();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        self.wait_gone(pid);
    }

    fn wait_gone(&self, pid: i32) {
        let until = std::time::Instant::now() + PATIENCE;
        // Nobody's child any more: whoever reaps it may take a moment.
        let gone = || fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |s| s.contains(") Z "));
        while !gone() {
            assert!(std::time::Instant::now() < until);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The datadir and what lies beside it under its name.
    pub(super) fn neighbours(&self) -> Vec<String> {
        let entries = fs::read_dir(self.datadir.parent().unwrap()).unwrap();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("data")).collect()
    }

    /// To a file system of its own with so many free MiB. None where that cannot be made.
    pub(super) async fn move_to_small_disk(&mut self, free_mib: usize) -> Option<Mount> {
        self.run_script("stop.sh");
        self.wait_gone(self.pid_or_zero());
        let used = Command::new("du").arg("-sm").arg(&self.datadir).output().unwrap().stdout;
        let used: u64 = String::from_utf8(used).unwrap().split_whitespace().next().unwrap().parse().unwrap();
        let disk = self.path("disk");
        fs::create_dir(&disk).unwrap();
        let size = format!("size={}m", used + 100);
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(&disk).status().unwrap();
        mounted.success().then_some(())?;
        let mount = Mount(disk.clone());
        let moved = Command::new("mv").arg(&self.datadir).arg(&disk).status().unwrap();
        assert!(moved.success());
        self.datadir = disk.join("data");
        let common = fs::read_to_string(self.path("mmm_common.toml")).unwrap();
        self.config = configure(self.dir.path(), self.config.this.as_str(), &common, &self.datadir);
        self.write_scripts();
        self.run_script("start.sh");
        self.until_sql("SET GLOBAL read_only=1").await;
        let free = Command::new("df").args(["-m", "--output=avail"]).arg(&disk).output().unwrap().stdout;
        let free: usize = String::from_utf8(free).unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
        fs::write(disk.join("filler"), vec![1; (free - free_mib) << 20]).unwrap();
        Some(mount)
    }

    fn pid_or_zero(&self) -> i32 {
        fs::read_to_string(self.path("pid")).ok().and_then(|pid| pid.trim().parse().ok()).unwrap_or(i32::MAX)
    }
}

pub(super) struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut helper) = self.helper.take() {
            let _ = helper.kill();
            let _ = helper.wait();
        }
        if let Ok(pid) = fs::read_to_string(self.path("pid"))
            && let Ok(pid) = pid.trim().parse()
        {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if std::thread::panicking() {
            for log in ["helper.log", "log"] {
                let text = fs::read_to_string(self.path(log)).unwrap_or_default();
                let end: Vec<&str> = text.lines().rev().take(15).collect();
                let _ = std::io::Write::write_all(
                    &mut std::io::stderr(),
                    format!("{} of {}, backwards:\n{}\n", log, self.config.this, end.join("\n")).as_bytes(),
                );
            }
        }
    }
}

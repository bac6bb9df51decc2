//! A real server for one test, on loopback, from a folder that get-server.sh has unpacked. It ends with the test.

use mysql_async::prelude::Queryable as _;
use mysql_async::{Conn, OptsBuilder};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    MariaDb,
    MySql,
}

pub(super) struct Server {
    pub(super) dialect: Dialect,
    pub(super) port: u16,
    process: Child,
    _dir: tempfile::TempDir,
}

/// The folder of a server of this kind; None, with the reason printed, when it is not there.
fn folder(kind: &str) -> Option<PathBuf> {
    let store = std::env::var_os("MMM_TEST_SERVERS").map_or_else(|| "/var/tmp/mmm-servers".into(), PathBuf::from);
    let folder = store.join(kind);
    if folder.join("bin").is_dir() {
        return Some(folder);
    }
    let _ = std::io::Write::write_fmt(
        &mut std::io::stderr(),
        format_args!(
            "SKIPPED: no {kind} in {}: unpack it with get-server.sh, or set MMM_TEST_SERVERS\n",
            store.display()
        ),
    );
    None
}

impl Server {
    /// With an account admin/admin, and mmm_monitor/RepMonitor as the manual has it.
    pub(super) async fn start(kind: &str, id: u32) -> Option<Server> {
        let folder = folder(kind)?;
        let dialect = if kind.starts_with("mariadb") { Dialect::MariaDb } else { Dialect::MySql };
        let dir = tempfile::tempdir().unwrap();
        let mut options = places(dialect, &folder, dir.path());
        initialise(dialect, &folder, dir.path(), &options);
        let port = free_port();
        options.extend([
            format!("--port={port}"),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--socket={}", dir.path().join("sock").display()),
            format!("--pid-file={}", dir.path().join("pid").display()),
            format!("--server-id={id}"),
            "--log-bin=binlog".to_owned(),
            "--relay-log=relay".to_owned(),
            "--skip-name-resolve".to_owned(),
        ]);
        let log = File::create(dir.path().join("log")).unwrap();
        let process = program(dialect, &folder)
            .args(&options)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let server = Server { dialect, port, process, _dir: dir };
        server.wait_until_it_serves().await;
        Some(server)
    }

    async fn wait_until_it_serves(&self) {
        let began = Instant::now();
        while Conn::new(self.admin_opts()).await.is_err() {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "{}",
                fs::read_to_string(self._dir.path().join("log")).unwrap()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn admin_opts(&self) -> OptsBuilder {
        OptsBuilder::default()
            .ip_or_hostname("127.0.0.1")
            .tcp_port(self.port)
            .user(Some("admin"))
            .pass(Some("admin"))
            .prefer_socket(false)
    }

    pub(super) async fn admin(&self) -> Conn {
        Conn::new(self.admin_opts()).await.unwrap()
    }

    pub(super) async fn sql(&self, statements: &[&str]) {
        let mut conn = self.admin().await;
        for statement in statements {
            conn.query_drop(*statement).await.unwrap_or_else(|e| panic!("{statement}: {e}"));
        }
        conn.disconnect().await.unwrap();
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.process.id()).unwrap()), signal).unwrap();
    }

    /// Every thread of it stands still when this returns.
    pub(super) async fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        let began = Instant::now();
        let tasks = format!("/proc/{}/task", self.process.id());
        let stands = |task: fs::DirEntry| fs::read_to_string(task.path().join("stat")).unwrap().contains(") T ");
        while !fs::read_dir(&tasks).unwrap().all(|task| stands(task.unwrap())) {
            assert!(began.elapsed() < Duration::from_secs(5));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ended as by a cut of power.
    pub(super) fn crash(&mut self) {
        self.signal(Signal::SIGKILL);
        self.process.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn program(dialect: Dialect, folder: &Path) -> Command {
    let name = match dialect {
        Dialect::MariaDb => "mariadbd",
        Dialect::MySql => "mysqld",
    };
    let mut command = Command::new(folder.join("bin").join(name));
    command.arg("--no-defaults");
    command
}

/// Where the server's own files are, and small sizes.
fn places(dialect: Dialect, folder: &Path, dir: &Path) -> Vec<String> {
    let usr = folder.join("root/usr");
    let share = share(&usr);
    let mut options = vec![
        "--user=root".to_owned(),
        format!("--basedir={}", usr.display()),
        format!("--plugin-dir={}", usr.join("lib/mysql/plugin").display()),
        format!("--lc-messages-dir={}", share.display()),
        format!("--character-sets-dir={}", share.join("charsets").display()),
        format!("--datadir={}", dir.join("data").display()),
        "--innodb-buffer-pool-size=16M".to_owned(),
        "--performance-schema=OFF".to_owned(),
    ];
    if dialect == Dialect::MySql {
        options
            .extend(["--secure-file-priv=NULL", "--mysqlx=OFF", "--innodb-redo-log-capacity=32M"].map(str::to_owned));
    }
    options
}

fn share(usr: &Path) -> PathBuf {
    ["share/mariadb", "share/mysql"].iter().map(|s| usr.join(s)).find(|p| p.is_dir()).unwrap()
}

fn initialise(dialect: Dialect, folder: &Path, dir: &Path, options: &[String]) {
    fs::create_dir(dir.join("data")).unwrap();
    let accounts = format!(
        "CREATE USER admin@'%' IDENTIFIED BY 'admin';\nGRANT ALL PRIVILEGES ON *.* TO admin@'%';\n\
         CREATE USER mmm_monitor@'%' IDENTIFIED BY 'RepMonitor';\nGRANT {} ON *.* TO mmm_monitor@'%';\n\
         CREATE USER nobody@'%' IDENTIFIED BY 'RepMonitor';\n\
         CREATE USER replication@'%' IDENTIFIED BY 'slave';\nGRANT REPLICATION SLAVE ON *.* TO replication@'%';\n",
        match dialect {
            Dialect::MariaDb => "BINLOG MONITOR, SLAVE MONITOR",
            Dialect::MySql => "REPLICATION CLIENT",
        }
    );
    let (sql, mut command) = (dir.join("init.sql"), program(dialect, folder));
    match dialect {
        Dialect::MariaDb => {
            let share = share(&folder.join("root/usr"));
            let mut text = "create database mysql;\nuse mysql;\n".to_owned();
            for part in ["system_tables", "performance_tables", "system_tables_data"] {
                let names = ["mariadb", "mysql"].map(|n| share.join(format!("{n}_{part}.sql")));
                text += &fs::read_to_string(names.iter().find(|n| n.exists()).unwrap()).unwrap();
            }
            let _ = write!(text, "delete from mysql.global_priv where User='';\nflush privileges;\n{accounts}");
            fs::write(&sql, text).unwrap();
            command.args(["--bootstrap", "--skip-grant-tables"]).stdin(File::open(&sql).unwrap());
        }
        Dialect::MySql => {
            fs::write(&sql, format!("SET sql_log_bin=0;\n{accounts}")).unwrap();
            command.args(["--initialize-insecure", "--skip-log-bin"]).arg(format!("--init-file={}", sql.display()));
        }
    }
    let out = command.args(options).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

//! Real servers: where their programs are, a template of a fresh data directory made once per version and copied for
//! every host, their configuration, and SQL over their unix sockets.
//!
//! The template is filled with the binary log off, so every host begins with the same data and an empty GTID history.

use super::configs::{START, STOP};
use super::network::{DB, ip_of};
use super::process::{self, Running, Start};
use anyhow::{Context as _, Result, anyhow, bail};
use mysql_async::prelude::Queryable as _;
use mysql_async::{Conn, OptsBuilder, Value};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// Where unpacked servers and templates are kept between labs.
const STORE: &str = "/var/tmp/mmm-servers";
const LOCK: &str = "/var/tmp/mmm-servers.lock";
/// In a host's folder: who starts or stops its server has it.
const SERVICE_LOCK: &str = "mysqld.lock";
/// In a host's folder: the server was stopped by the command that mmm_helperd runs.
const STOPPED: &str = "mysqld.stopped";
const GET_SERVER: &str = include_str!("../../get-server.sh");

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dialect {
    MariaDb,
    MySql,
}

/// A server's programs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Server {
    pub dialect: Dialect,
    /// As the server itself says it, e.g. `10.11.18-MariaDB`.
    pub version: String,
    /// Whether its hosts replicate by GTID, or by file and position.
    pub gtids: bool,
    mysqld: PathBuf,
    /// The `/usr` that belongs to the program.
    usr: PathBuf,
    share: PathBuf,
    plugins: PathBuf,
}

/// Who turns the two sides of semi-synchronous replication on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sides {
    /// The servers' own files: both sides on both masters, for good.
    InFile,
    /// Somebody by SQL: the servers start with the plugins and the source side off. MariaDB's replica side is on,
    /// because it takes an unacknowledged tail back after a crash only when it starts so.
    BySql,
}

/// How the servers of one lab are set up.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Semi-synchronous replication between the two masters.
    pub semisync: bool,
    pub sides: Sides,
    /// Every commit is synced to disk (sync_binlog, innodb_flush_log_at_trx_commit).
    pub durable: bool,
}

impl Server {
    /// `mariadb` (Debian's package when it is installed, else MariaDB 10.11 unpacked into a folder), a KIND of
    /// get-server.sh, or the path of a folder that get-server.sh has made.
    pub fn find(wanted: &str) -> Result<Server> {
        if wanted.starts_with('/') {
            return Server::unpacked(Path::new(wanted));
        }
        if wanted == "mariadb" {
            let installed = Path::new("/usr/sbin/mariadbd");
            return if installed.exists() {
                Server::of(installed, Path::new("/usr"))
            } else {
                Server::get("mariadb-10.11")
            };
        }
        Server::get(wanted)
    }

    fn get(kind: &str) -> Result<Server> {
        let dest = Path::new(STORE).join(kind);
        if !dest.exists() {
            let _lock = lock_store()?;
            fs::create_dir_all(STORE)?;
            eprintln!("lab: fetching {kind} into {} (once)", dest.display());
            let mut script = Command::new("bash");
            script.args(["-c", GET_SERVER, "get-server.sh", kind]).arg(&dest);
            process::must(None, script, Duration::from_secs(600)).with_context(|| {
                format!("get a {kind} server; it comes from the Debian mirror of this machine's apt configuration")
            })?;
        }
        Server::unpacked(&dest)
    }

    fn unpacked(dest: &Path) -> Result<Server> {
        let bin = ["mariadbd", "mysqld"].map(|n| dest.join("bin").join(n)).into_iter().find(|p| p.exists());
        let bin = bin.with_context(|| format!("{} has neither bin/mariadbd nor bin/mysqld", dest.display()))?;
        Server::of(&bin, &dest.join("root/usr"))
    }

    fn of(mysqld: &Path, usr: &Path) -> Result<Server> {
        let mut command = Command::new(mysqld);
        command.args(["--no-defaults", "--version"]);
        let said = process::must(None, command, Duration::from_secs(10))?;
        let version = said.split_whitespace().skip_while(|w| *w != "Ver").nth(1);
        let version = version.with_context(|| format!("{} --version said: {said}", mysqld.display()))?.to_owned();
        let dialect = if said.contains("MariaDB") { Dialect::MariaDb } else { Dialect::MySql };
        let some = |candidates: &[&str]| -> Result<PathBuf> {
            let found = candidates.iter().map(|c| usr.join(c)).find(|p| p.exists());
            found.with_context(|| format!("none of {} in {}", candidates.join(", "), usr.display()))
        };
        Ok(Server {
            dialect,
            version,
            gtids: true,
            mysqld: mysqld.to_owned(),
            usr: usr.to_owned(),
            share: some(&["share/mariadb", "share/mysql"])?,
            // Debian's mariadb-server-core comes without plugins, and the lab needs none of MariaDB's.
            plugins: usr.join("lib/mysql/plugin"),
        })
    }

    /// The same server for hosts that replicate by file and position. MariaDB numbers its transactions in any case.
    pub fn without_gtids(self) -> Result<Server> {
        match self.dialect {
            Dialect::MySql => Ok(Server { gtids: false, ..self }),
            Dialect::MariaDb => bail!("{} cannot be without GTIDs; take a MySQL", self.version),
        }
    }

    /// Where the server's own tools are (binary log, backup), for PATH. Debian's server alone comes without them: then
    /// those of the same version in a folder, when that is there.
    pub fn tools(&self) -> String {
        let own = self.mysqld.parent().map(|p| p.display().to_string()).unwrap_or_default();
        format!("{own}:{STORE}/mariadb-10.11/bin")
    }

    /// Options that say where the server's own files are.
    fn places(&self) -> Vec<(&'static str, String)> {
        let path = |p: &Path| p.display().to_string();
        let mut places = vec![
            ("user", "root".to_owned()),
            ("basedir", path(&self.usr)),
            ("plugin-dir", path(&self.plugins)),
            ("lc-messages-dir", path(&self.share)),
            ("character-sets-dir", path(&self.share.join("charsets"))),
        ];
        if self.dialect == Dialect::MySql {
            places.push(("secure-file-priv", "NULL".to_owned()));
            places.push(("mysqlx", "OFF".to_owned()));
        }
        places
    }

    /// A fresh data directory with the lab's users and tables, made if there is none yet.
    pub fn template(&self) -> Result<PathBuf> {
        let mut hash = DefaultHasher::new();
        self.schema().hash(&mut hash);
        let kind = match self.dialect {
            Dialect::MariaDb => "mariadb",
            Dialect::MySql => "mysql",
        };
        let version = self.version.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '-', "_");
        let template = Path::new(STORE).join(format!("template-lab-{kind}-{version}-{:08x}", hash.finish() as u32));
        if template.exists() {
            return Ok(template);
        }
        let _lock = lock_store()?;
        if template.exists() {
            return Ok(template);
        }
        let half = beside(&template, &format!("half-{}", std::process::id()));
        let _ = fs::remove_dir_all(&half);
        fs::create_dir_all(&half)?;
        let made = match self.dialect {
            Dialect::MariaDb => self.bootstrap_mariadb(&half),
            Dialect::MySql => self.initialise_mysql(&half),
        };
        if let Err(e) = made {
            let _ = fs::remove_dir_all(&half);
            return Err(e.context(format!("make a template data directory of {kind} {}", self.version)));
        }
        fs::rename(&half, &template)?;
        Ok(template)
    }

    fn bootstrap_mariadb(&self, datadir: &Path) -> Result<()> {
        // MariaDB 11 has renamed the files.
        let one = |names: [&str; 2]| names.map(|n| self.share.join(n)).into_iter().find(|p| p.exists());
        let mut sql = String::from("create database mysql;\nuse mysql;\n");
        for names in [
            ["mariadb_system_tables.sql", "mysql_system_tables.sql"],
            ["mariadb_performance_tables.sql", "mysql_performance_tables.sql"],
            ["mariadb_system_tables_data.sql", "mysql_system_tables_data.sql"],
        ] {
            let file = one(names).with_context(|| format!("{} lacks {}", self.share.display(), names.join(" and ")))?;
            sql.push_str(&fs::read_to_string(file)?);
        }
        // An anonymous user would be matched before 'mmm_agent'@'%' on the socket.
        sql.push_str("delete from mysql.global_priv where User='';\nflush privileges;\n");
        for statement in self.schema() {
            let _ = writeln!(sql, "{statement};");
        }
        let input = beside(datadir, "sql");
        fs::write(&input, sql)?;
        let said = self.one_shot(datadir, &["--bootstrap", "--skip-grant-tables"], Some(&input));
        let _ = fs::remove_file(&input);
        // The bootstrap ends with success whatever its statements did.
        let said = said?;
        if let Some(line) = said.lines().find(|l| l.contains("ERROR")) {
            bail!("the bootstrap said: {line}");
        }
        Ok(())
    }

    fn initialise_mysql(&self, datadir: &Path) -> Result<()> {
        let mut sql = String::from("SET sql_log_bin=0;\n");
        for statement in self.schema() {
            let _ = writeln!(sql, "{statement};");
        }
        let input = beside(datadir, "sql");
        fs::write(&input, sql)?;
        let init_file = format!("--init-file={}", input.display());
        let said = self.one_shot(datadir, &["--initialize-insecure", &init_file, "--skip-log-bin"], None);
        let _ = fs::remove_file(&input);
        let said = said?;
        if let Some(line) = said.lines().find(|l| l.contains("[ERROR]")) {
            bail!("the initialisation said: {line}");
        }
        // Every copy makes its own server_uuid.
        let _ = fs::remove_file(datadir.join("auto.cnf"));
        Ok(())
    }

    /// The server as a program that does one thing and ends.
    fn one_shot(&self, datadir: &Path, args: &[&str], input: Option<&Path>) -> Result<String> {
        // `run` gives no input: a shell redirects it.
        let mut line = vec![self.mysqld.display().to_string(), "--no-defaults".to_owned()];
        line.extend(args.iter().map(|a| (*a).to_owned()));
        line.push(format!("--datadir={}", datadir.display()));
        line.extend(self.places().into_iter().map(|(k, v)| format!("--{k}={v}")));
        line.extend(self.sizes().into_iter().map(|(k, v)| format!("--{k}={v}")));
        let mut shell = Command::new("sh");
        shell.arg("-c").arg("in=$1; shift; exec \"$@\" <\"$in\"").arg("sh");
        shell.arg(input.unwrap_or(Path::new("/dev/null"))).args(&line);
        process::must(None, shell, Duration::from_secs(120))
    }

    fn sizes(&self) -> Vec<(&'static str, String)> {
        let mut sizes = vec![("innodb-buffer-pool-size", "32M".to_owned()), ("max-allowed-packet", "16M".to_owned())];
        match self.dialect {
            Dialect::MariaDb => sizes.push(("innodb-log-file-size", "16M".to_owned())),
            Dialect::MySql => sizes.push(("innodb-redo-log-capacity", "32M".to_owned())),
        }
        sizes
    }

    /// Users and tables, one statement each. The passwords are those of the documentation's examples.
    fn schema(&self) -> Vec<String> {
        // A copy of a MySQL server is fetched with the replication login.
        let (monitor, replication) = match self.dialect {
            Dialect::MariaDb => ("BINLOG MONITOR, SLAVE MONITOR, PROCESS", "REPLICATION SLAVE"),
            Dialect::MySql => ("REPLICATION CLIENT, PROCESS", "REPLICATION SLAVE, BACKUP_ADMIN"),
        };
        let mut sql = Vec::new();
        for (user, password, grant) in [
            ("'lab'@'localhost'", "lab", "ALL PRIVILEGES ON *.*".to_owned()),
            ("'mmm_monitor'@'%'", "RepMonitor", format!("{monitor} ON *.*")),
            ("'mmm_agent'@'%'", "RepAgent", "ALL PRIVILEGES ON *.*".to_owned()),
            ("'replication'@'%'", "slave", format!("{replication} ON *.*")),
            (
                "'app'@'%'",
                "app",
                "SELECT, INSERT, UPDATE, DELETE, CREATE, DROP, ALTER, INDEX, LOCK TABLES, CREATE TEMPORARY TABLES \
                 ON app.*"
                    .to_owned(),
            ),
        ] {
            sql.push(format!("CREATE USER {user} IDENTIFIED BY '{password}'"));
            sql.push(format!("GRANT {grant} TO {user}"));
        }
        sql.push("CREATE DATABASE app".to_owned());
        // `id` is the client's own number of the write; it is not unique here, so that a write done twice is seen.
        sql.push(
            "CREATE TABLE app.t (n bigint unsigned NOT NULL AUTO_INCREMENT PRIMARY KEY, \
             id bigint unsigned NOT NULL, server int unsigned NOT NULL, KEY (id)) ENGINE=InnoDB"
                .to_owned(),
        );
        sql
    }

    fn config(&self, host: &str, dir: &Path, settings: Settings) -> String {
        let number = DB.iter().position(|h| *h == host).unwrap_or(0) + 1;
        let master = number <= 2;
        let on = |b: bool| if b { "1" } else { "0" }.to_owned();
        let file = |name: &str| dir.join(name).display().to_string();
        let mut options = self.places();
        options.extend(self.sizes());
        options.extend([
            ("datadir", file("data")),
            ("socket", file("mysqld.sock")),
            ("pid-file", file("mysqld.pid")),
            ("log-error", file("mysqld.log")),
            ("tmpdir", file("tmp")),
            ("port", "3306".to_owned()),
            ("bind-address", "0.0.0.0".to_owned()),
            ("skip-name-resolve", "1".to_owned()),
            ("performance-schema", "OFF".to_owned()),
            ("server-id", number.to_string()),
            ("report-host", host.to_owned()),
            ("log-bin", "mysql-bin".to_owned()),
            ("relay-log", "relay-bin".to_owned()),
            ("binlog-format", "ROW".to_owned()),
            ("read-only", "1".to_owned()),
            ("sync-binlog", on(settings.durable)),
            ("innodb-flush-log-at-trx-commit", if settings.durable { "1" } else { "2" }.to_owned()),
            ("auto-increment-increment", "2".to_owned()),
            ("auto-increment-offset", if number == 2 { "2" } else { "1" }.to_owned()),
        ]);
        let semisync = settings.semisync && master;
        let in_file = semisync && settings.sides == Sides::InFile;
        match self.dialect {
            Dialect::MariaDb => {
                options.extend([
                    ("log-slave-updates", "1".to_owned()),
                    // Without a note for every connection that a test breaks.
                    ("log-warnings", "1".to_owned()),
                    ("gtid-strict-mode", "1".to_owned()),
                    ("slave-net-timeout", "2".to_owned()),
                    ("rpl-semi-sync-master-enabled", on(in_file)),
                    ("rpl-semi-sync-slave-enabled", on(semisync)),
                    ("rpl-semi-sync-master-wait-point", "AFTER_SYNC".to_owned()),
                    ("rpl-semi-sync-master-timeout", "10000".to_owned()),
                    ("rpl-semi-sync-master-wait-no-slave", "OFF".to_owned()),
                ]);
                if semisync {
                    // After a crash the server takes back what no replica has acknowledged.
                    options.push(("init-rpl-role", "SLAVE".to_owned()));
                }
            }
            Dialect::MySql => {
                let gtids = if self.gtids { "ON" } else { "OFF" };
                options.extend([
                    ("super-read-only", "1".to_owned()),
                    ("gtid-mode", gtids.to_owned()),
                    ("enforce-gtid-consistency", gtids.to_owned()),
                    ("replica-net-timeout", "2".to_owned()),
                    ("loose-rpl-semi-sync-source-enabled", on(in_file)),
                    ("loose-rpl-semi-sync-replica-enabled", on(in_file)),
                    ("loose-rpl-semi-sync-source-wait-point", "AFTER_SYNC".to_owned()),
                    ("loose-rpl-semi-sync-source-timeout", "10000".to_owned()),
                    ("loose-rpl-semi-sync-source-wait-no-replica", "OFF".to_owned()),
                    ("plugin-load-add", "mysql_clone.so".to_owned()),
                ]);
                if settings.semisync {
                    // Without them there is none, whatever the product would like.
                    options.push(("plugin-load-add", "semisync_source.so".to_owned()));
                    options.push(("plugin-load-add", "semisync_replica.so".to_owned()));
                }
            }
        }
        // binlog-format is deprecated, and a note in the log, on MySQL 9; ROW is its default.
        options.retain(|(name, _)| self.dialect == Dialect::MariaDb || *name != "binlog-format");
        let lines: String = options.iter().map(|(k, v)| format!("{k}={v}\n")).collect();
        format!("# Written by the lab.\n[mysqld]\n{lines}")
    }

    /// Data directory and configuration of one host.
    pub fn prepare(&self, host: &str, dir: &Path, settings: Settings) -> Result<()> {
        let template = self.template()?;
        fs::create_dir_all(dir.join("tmp"))?;
        let mut copy = Command::new("cp");
        copy.args(["-a", "--reflink=auto", "--sparse=always"]).arg(template).arg(dir.join("data"));
        process::must(None, copy, Duration::from_secs(60))?;
        fs::write(dir.join("my.cnf"), self.config(host, dir, settings))?;
        self.write_scripts(dir)
    }

    /// For mmm_helperd: what a service manager would do. A server that was started by them is found by the lab's `run`
    /// file like any other; one that was stopped by them stays so until somebody starts it on purpose. Who starts or
    /// stops holds [`lock_service`]'s lock meanwhile, so no two of them do it at once.
    fn write_scripts(&self, dir: &Path) -> Result<()> {
        let (mysqld, dir_shown) = (self.mysqld.display(), dir.display());
        // Fields 3 (state) and 22 (start time) of /proc/PID/stat, counted from behind the name.
        let common = format!(
            "#!/bin/sh -e\n\
             cd {dir_shown}\n\
             exec 9>>{SERVICE_LOCK}\n\
             flock -w 60 9\n\
             pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/' mysqld.run)\n\
             began=$(sed 's/.*\"began\":\\([0-9]*\\).*/\\1/' mysqld.run)\n\
             runs() {{\n\
             set -- $(sed 's/.*) //' /proc/$pid/stat 2>/dev/null || :)\n\
             [ \"$1\" != Z ] && [ \"${{20}}\" = \"$began\" ]\n\
             }}\n"
        );
        // A process that has closed its data is about to be gone. The server must not inherit the lock.
        let start = format!(
            "{common}\
             rm -f {STOPPED}\n\
             n=0\n\
             while runs && [ $n -lt 200 ]; do\n\
             if ls -l /proc/$pid/fd 2>/dev/null | grep -q ' {dir_shown}/data/'; then exit 0; fi\n\
             n=$((n + 1))\n\
             sleep 0.05\n\
             done\n\
             setsid {mysqld} --defaults-file={dir_shown}/my.cnf </dev/null >>mysqld.log 2>&1 9>&- &\n\
             pid=$!\n\
             began=$(sed 's/.*) //' /proc/$pid/stat | cut -d' ' -f20)\n\
             echo \"{{\\\"pid\\\":$pid,\\\"began\\\":$began}}\" >mysqld.run\n"
        );
        let stop = format!(
            "{common}\
             : >{STOPPED}\n\
             if runs; then kill $pid; fi\n"
        );
        for (name, text) in [(START, start), (STOP, stop)] {
            let file = dir.join(name);
            fs::write(&file, text)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o700))?;
        }
        Ok(())
    }

    /// Starts the server; it may take a moment until it answers ([`wait_ready`]).
    pub fn start(&self, netns: &Path, dir: &Path) -> Result<Running> {
        // Names the one before, which is dead, and which MySQL takes for alive until somebody has reaped it.
        let _ = fs::remove_file(dir.join("mysqld.sock.lock"));
        process::start(Start {
            netns,
            program: &self.mysqld,
            args: vec![format!("--defaults-file={}", dir.join("my.cnf").display())],
            env: Vec::new(),
            log: dir.join("mysqld.log"),
            run_file: dir.join("mysqld.run"),
        })
    }

    /// Starts the server with its data directory on a disk that has only `megabytes` more than what is there. The disk is
    /// in memory, only this process sees it, and it is gone with it. Files are there in full, as the server made them
    /// once: a redo log with holes would be the first to meet the end of the disk.
    pub fn start_on_small_disk(&self, netns: &Path, dir: &Path, megabytes: u32) -> Result<Running> {
        const SCRIPT: &str = "set -e; data=$1; more=$2; shift 2; small=$(dirname \"$data\")/tmp/small; mkdir -p \"$small\"; \
            size=$(($(du -sm --apparent-size \"$data\" | cut -f1) + more)); mount -t tmpfs -o size=\"${size}m\" small \"$small\"; \
            cp -a --sparse=never \"$data/.\" \"$small/\"; mount --bind \"$small\" \"$data\"; exec \"$@\"";
        let mut args: Vec<String> =
            ["--mount", "--propagation", "private", "sh", "-c", SCRIPT, "small-disk"].map(str::to_owned).to_vec();
        args.extend([dir.join("data").display().to_string(), megabytes.to_string()]);
        args.extend([self.mysqld.display().to_string(), format!("--defaults-file={}", dir.join("my.cnf").display())]);
        process::start(Start {
            netns,
            program: Path::new("/usr/bin/unshare"),
            args,
            env: Vec::new(),
            log: dir.join("mysqld.log"),
            run_file: dir.join("mysqld.run"),
        })
    }

    /// Points a fresh server at its first master.
    pub fn follow(&self, socket: &Path, master: &str) -> Result<()> {
        let ip = ip_of(master)?;
        let statements = match self.dialect {
            Dialect::MariaDb => [
                format!(
                    "CHANGE MASTER TO MASTER_HOST='{ip}', MASTER_PORT=3306, MASTER_USER='replication', \
                     MASTER_PASSWORD='slave', MASTER_USE_GTID=slave_pos, MASTER_CONNECT_RETRY=1"
                ),
                "START SLAVE".to_owned(),
            ],
            Dialect::MySql => [
                format!(
                    // Without GTIDs from the beginning of the master's first log: it is as fresh.
                    "CHANGE REPLICATION SOURCE TO SOURCE_HOST='{ip}', SOURCE_PORT=3306, SOURCE_USER='replication', \
                     SOURCE_PASSWORD='slave', SOURCE_AUTO_POSITION={}, SOURCE_CONNECT_RETRY=1, \
                     SOURCE_RETRY_COUNT=86400, GET_SOURCE_PUBLIC_KEY=1",
                    u8::from(self.gtids)
                ),
                "START REPLICA".to_owned(),
            ],
        };
        for statement in statements {
            query(socket, &statement, Duration::from_secs(10))?;
        }
        Ok(())
    }

    /// What the server says of its replication, by column. Empty: it replicates from nobody.
    pub fn replication(&self, socket: &Path) -> Result<BTreeMap<String, String>> {
        let sql = match self.dialect {
            Dialect::MariaDb => "SHOW SLAVE STATUS",
            Dialect::MySql => "SHOW REPLICA STATUS",
        };
        let table = query(socket, sql, Duration::from_secs(5))?;
        let Some(row) = table.rows.into_iter().next() else { return Ok(BTreeMap::new()) };
        // One vocabulary for both: MySQL's older words, which MariaDB has kept.
        let old = |name: String| name.replace("Source", "Master").replace("Replica", "Slave");
        Ok(table.columns.into_iter().map(old).zip(row.into_iter().map(Option::unwrap_or_default)).collect())
    }
}

/// Waits until the server answers on its socket; gives up at once when the process has ended.
pub fn wait_ready(running: Running, socket: &Path, limit: Duration) -> Result<()> {
    let end = Instant::now() + limit;
    loop {
        let why = match query(socket, "SELECT 1", Duration::from_secs(1)) {
            Ok(_) => return Ok(()),
            Err(why) => why,
        };
        if !running.is_alive() {
            bail!("the server ended while it started (it should answer on {})", socket.display());
        }
        if Instant::now() > end {
            return Err(why.context(format!("the server does not answer on {} after {limit:?}", socket.display())));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The result of one statement, every value as text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Option<String>>>,
}

impl Table {
    /// First value of the first row; NULL and no row are an error.
    pub fn value(&self) -> Result<&str> {
        let first = self.rows.first().and_then(|r| r.first()).and_then(Option::as_deref);
        first.with_context(|| format!("no value in the answer with columns {}", self.columns.join(", ")))
    }
}

/// One statement over the server's unix socket, as a user who may do everything. The whole call has a deadline.
pub fn query(socket: &Path, sql: &str, limit: Duration) -> Result<Table> {
    session(socket, &[sql], limit)
}

/// Several statements in one session; the answer of the last one.
pub fn session(socket: &Path, statements: &[&str], limit: Duration) -> Result<Table> {
    let (last, before) = statements.split_last().context("a session without statements")?;
    let opts = OptsBuilder::default()
        .socket(Some(socket.display().to_string()))
        .user(Some("lab"))
        .pass(Some("lab"))
        .max_allowed_packet(Some(16 << 20))
        .wait_timeout(Some(600));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(async {
        let all = async {
            let mut conn = Conn::new(opts).await?;
            for sql in before {
                conn.query_drop(*sql).await?;
            }
            let mut result = conn.query_iter(*last).await?;
            let columns = result.columns().map(|c| c.iter().map(|c| c.name_str().into_owned()).collect());
            let rows: Vec<mysql_async::Row> = result.collect().await?;
            drop(result);
            conn.disconnect().await?;
            let rows = rows.into_iter().map(|row| row.unwrap().into_iter().map(as_text).collect()).collect();
            Ok::<Table, mysql_async::Error>(Table { columns: columns.unwrap_or_default(), rows })
        };
        match tokio::time::timeout(limit, all).await {
            Ok(Ok(table)) => Ok(table),
            Ok(Err(e)) => Err(anyhow!(e)),
            Err(_) => Err(anyhow!("no answer within {limit:?}")),
        }
    });
    runtime.shutdown_background();
    answer.with_context(|| format!("run `{}` on {}", statements.join("; "), socket.display()))
}

/// The text protocol gives bytes or NULL.
fn as_text(value: Value) -> Option<String> {
    match value {
        Value::NULL => None,
        Value::Bytes(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
        number @ (Value::Int(_)
        | Value::UInt(_)
        | Value::Float(_)
        | Value::Double(_)
        | Value::Date(..)
        | Value::Time(..)) => Some(number.as_sql(true)),
    }
}

/// `PATH.what`; the version in the path has dots of its own.
fn beside(path: &Path, what: &str) -> PathBuf {
    PathBuf::from(format!("{}.{what}", path.display()))
}

/// Several test programs may want the same server at once.
fn lock_store() -> Result<File> {
    lock_file(Path::new(LOCK), Duration::from_secs(600))
}

/// For whoever starts the server of a host; the lock ends with the value.
pub fn lock_service(dir: &Path) -> Result<File> {
    lock_file(&dir.join(SERVICE_LOCK), Duration::from_secs(60))
}

/// Whether the server of a host was stopped by the command that mmm_helperd runs, and nobody has started it since.
pub fn was_stopped(dir: &Path) -> bool {
    dir.join(STOPPED).exists()
}

/// It is started on purpose.
pub fn forget_stopped(dir: &Path) -> Result<()> {
    match fs::remove_file(dir.join(STOPPED)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {STOPPED} in {}", dir.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn lock_file(path: &Path, limit: Duration) -> Result<File> {
    let shown = path.display();
    let file = File::options().create(true).append(true).open(path).with_context(|| format!("open {shown}"))?;
    let end = Instant::now() + limit;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < end => thread::sleep(Duration::from_millis(20)),
            Err(TryLockError::WouldBlock) => bail!("{shown} was held by somebody else for {limit:?}"),
            Err(TryLockError::Error(e)) => return Err(e).with_context(|| format!("lock {shown}")),
        }
    }
}

/// The last lines of a log, to stand below an error.
pub fn tail(file: &Path, lines: usize) -> String {
    let text = fs::read(file).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
}

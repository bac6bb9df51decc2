//! Logins for jobs. Unlike those of the steps they may wait for long, and are never kept: a job that was interrupted
//! leaves none behind. After a missed deadline the login is thrown away, since its next answer would be an older
//! question's.

use mmm_common::config::{Agent as Config, Host};
use mmm_common::gtid::Gtids;
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Opts, OptsBuilder, Row, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::time::timeout;

const LOGIN: Duration = Duration::from_secs(5);
/// For an ordinary question.
pub(super) const ASK: Duration = Duration::from_secs(30);

/// What the agent's user needs for jobs beyond what it needs for the rest.
pub(super) const MARIADB_GRANTS: &str =
    "GRANT BINLOG MONITOR, BINLOG ADMIN, BINLOG REPLAY, REPLICATION MASTER ADMIN, RELOAD, LOCK TABLES ON *.* TO";
pub(super) const MYSQL_GRANTS: &str = "GRANT CLONE_ADMIN, RELOAD ON *.* TO";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    MariaDb,
    MySql,
}

#[derive(Debug)]
pub(super) struct Trouble {
    /// The server's, when it answered.
    pub(super) code: Option<u16>,
    text: String,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(f, "error {code}: {}", self.text),
            None => f.write_str(&self.text),
        }
    }
}

impl From<Trouble> for String {
    fn from(trouble: Trouble) -> String {
        trouble.to_string()
    }
}

impl From<mysql_async::Error> for Trouble {
    fn from(e: mysql_async::Error) -> Trouble {
        match e {
            mysql_async::Error::Server(s) => Trouble { code: Some(s.code), text: s.message },
            mysql_async::Error::Io(_)
            | mysql_async::Error::Driver(_)
            | mysql_async::Error::Other(_)
            | mysql_async::Error::Url(_) => Trouble { code: None, text: e.to_string() },
        }
    }
}

/// One row, by column name in lower case; NULL is the empty text.
pub(super) type Fields = BTreeMap<String, String>;

pub(super) struct Session {
    conn: Option<Conn>,
    pub(super) dialect: Dialect,
    /// As whom, for errors about privileges.
    user: String,
}

impl Session {
    /// To the agent's own server, as the agent's user.
    pub(super) async fn own(config: &Config) -> Result<Session, Trouble> {
        let host = own_host(config)?;
        let mut opts = base(host, &host.agent_user, &host.agent_password.0);
        if let Some(path) = &config.mysql_socket {
            opts = opts.socket(Some(path.display().to_string()));
        }
        Session::open(opts.into(), &host.agent_user).await
    }

    /// To any host, as its replication user.
    pub(super) async fn replication(host: &Host) -> Result<Session, Trouble> {
        let opts = base(host, &host.replication_user, &host.replication_password.0);
        Session::open(opts.into(), &host.replication_user).await
    }

    async fn open(opts: Opts, user: &str) -> Result<Session, Trouble> {
        let login = async {
            let mut conn = Conn::new(opts).await?;
            let version: Option<String> = conn.query_first("SELECT VERSION()").await?;
            Ok::<_, mysql_async::Error>((conn, version.unwrap_or_default()))
        };
        let (conn, version) = timeout(LOGIN, login).await.map_err(|_| late(LOGIN))??;
        let mariadb = version.to_ascii_lowercase().contains("mariadb");
        let dialect = if mariadb { Dialect::MariaDb } else { Dialect::MySql };
        Ok(Session { conn: Some(conn), dialect, user: user.to_owned() })
    }

    pub(super) async fn rows(&mut self, limit: Duration, sql: &str) -> Result<Vec<Fields>, Trouble> {
        // Put back only after an answer.
        let mut conn = self
            .conn
            .take()
            .ok_or_else(|| Trouble { code: None, text: "the connection to the server was lost before".to_owned() })?;
        match timeout(limit, conn.query::<Row, _>(sql)).await {
            Err(_) => Err(late(limit)),
            Ok(Ok(rows)) => {
                self.conn = Some(conn);
                Ok(rows.into_iter().map(fields).collect())
            }
            Ok(Err(e)) => {
                let mut trouble = Trouble::from(e);
                if trouble.code.is_some() {
                    self.conn = Some(conn);
                }
                if matches!(trouble.code, Some(1227 | 1044 | 1142 | 1143 | 3872)) {
                    let grants = match self.dialect {
                        Dialect::MariaDb => MARIADB_GRANTS,
                        Dialect::MySql => MYSQL_GRANTS,
                    };
                    trouble.text = format!("{}; the agent needs: {grants} {}", trouble.text, self.user);
                }
                Err(trouble)
            }
        }
    }

    pub(super) async fn run(&mut self, sql: &str) -> Result<(), Trouble> {
        self.rows(ASK, sql).await.map(drop)
    }

    /// The first column of the first row.
    pub(super) async fn one(&mut self, sql: &str) -> Result<String, Trouble> {
        let row = self.rows(ASK, sql).await?.into_iter().next();
        Ok(row.and_then(|row| row.into_values().next()).unwrap_or_default())
    }

    /// Everything that the server has executed.
    pub(super) async fn executed(&mut self) -> Result<Gtids, String> {
        match self.dialect {
            Dialect::MariaDb => {
                let text =
                    self.one("SELECT CONCAT_WS(',', @@GLOBAL.gtid_binlog_state, @@GLOBAL.gtid_slave_pos)").await?;
                Ok(Gtids::MariaDb(text.parse()?))
            }
            Dialect::MySql => Ok(Gtids::MySql(self.one("SELECT @@GLOBAL.gtid_executed").await?.parse()?)),
        }
    }

    pub(super) async fn is_read_only(&mut self) -> Result<bool, Trouble> {
        let value = self.one("SELECT @@GLOBAL.read_only").await?;
        Ok(!matches!(value.to_ascii_uppercase().as_str(), "" | "0" | "OFF"))
    }
}

pub(super) fn own_host(config: &Config) -> Result<&Host, Trouble> {
    let missing = || Trouble { code: None, text: format!("[host.{}] is not in the configuration", config.this) };
    config.cluster.hosts.get(&config.this).ok_or_else(missing)
}

fn base(host: &Host, user: &str, password: &str) -> OptsBuilder {
    let tcp = SocketAddr::new(host.ip, host.mysql_port);
    OptsBuilder::default()
        .ip_or_hostname(tcp.ip().to_string())
        .resolved_ips(Some(vec![tcp.ip()]))
        .tcp_port(tcp.port())
        .user(Some(user))
        .pass(Some(password.to_owned()))
        // Else a "TCP" login of 127.0.0.1 would move to the socket by itself.
        .prefer_socket(false)
        .max_allowed_packet(Some(64 << 20))
        .wait_timeout(Some(28800))
        // Quoting must not depend on the server's sql_mode.
        .setup(vec!["SET SESSION sql_mode='', autocommit=1, lock_wait_timeout=60, wait_timeout=28800"])
}

fn late(limit: Duration) -> Trouble {
    Trouble { code: None, text: format!("no answer within {} s", limit.as_secs()) }
}

fn fields(row: Row) -> Fields {
    let names: Vec<String> = row.columns_ref().iter().map(|c| c.name_str().to_ascii_lowercase()).collect();
    let values = row.unwrap_raw().into_iter().map(|v| match v {
        None | Some(Value::NULL) => String::new(),
        Some(Value::Bytes(b)) => String::from_utf8_lossy(&b).into_owned(),
        Some(Value::Int(n)) => n.to_string(),
        Some(Value::UInt(n)) => n.to_string(),
        Some(Value::Float(n)) => n.to_string(),
        Some(Value::Double(n)) => n.to_string(),
        Some(v @ (Value::Date(..) | Value::Time(..))) => v.as_sql(true),
    });
    names.into_iter().zip(values).collect()
}

/// A text as an SQL literal (under `sql_mode=''`).
pub(super) fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

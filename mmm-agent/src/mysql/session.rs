//! One login to a server, and one question at a time, each under a deadline.
//!
//! A session that was late, lost, or dropped in the middle of a question is never used again: the client library goes
//! out of step after a cancelled query and would hand the next question somebody else's answer. Passwords never get
//! into an error: of a statement that holds one, a syntax error is told without the server's words.

use super::dialect::Dialect;
use mmm_common::config;
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, IoError, Opts, OptsBuilder, Row, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// How long one login may take, unless the caller knows better.
pub(super) const LOGIN: Duration = Duration::from_secs(1);
/// How long one ordinary question may take.
pub(super) const QUERY: Duration = Duration::from_secs(1);

/// Why a server did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Nothing listens there: connection refused, or no such socket.
    NotThere { why: String },
    /// The server answered, with an error.
    Refused { code: u16, message: String },
    /// The connection broke.
    Lost { why: String },
    /// No answer within the limit.
    Late { limit: Duration },
    /// The answer was not what this program understands.
    Strange { why: String },
}

impl Trouble {
    /// Whether the server runs and has said so.
    pub(super) fn is_answer(&self) -> bool {
        match self {
            Trouble::Refused { .. } | Trouble::Strange { .. } => true,
            Trouble::NotThere { .. } | Trouble::Lost { .. } | Trouble::Late { .. } => false,
        }
    }

    /// The server has no place left for this login.
    pub(super) fn is_full(&self) -> bool {
        matches!(self.code(), Some(1040 | 1203))
    }

    pub(super) fn code(&self) -> Option<u16> {
        match self {
            Trouble::Refused { code, .. } => Some(*code),
            Trouble::NotThere { .. } | Trouble::Lost { .. } | Trouble::Late { .. } | Trouble::Strange { .. } => None,
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::NotThere { why } => write!(f, "nothing listens there: {why}"),
            Trouble::Refused { code, message } => write!(f, "error {code}: {message}"),
            Trouble::Lost { why } => write!(f, "connection lost: {why}"),
            Trouble::Late { limit } => write!(f, "no answer within {} ms", limit.as_millis()),
            Trouble::Strange { why } => f.write_str(why),
        }
    }
}

impl From<mysql_async::Error> for Trouble {
    fn from(e: mysql_async::Error) -> Self {
        match e {
            mysql_async::Error::Server(s) => Trouble::Refused { code: s.code, message: s.message },
            mysql_async::Error::Io(IoError::Io(e))
                if matches!(e.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) =>
            {
                Trouble::NotThere { why: e.to_string() }
            }
            mysql_async::Error::Io(e) => Trouble::Lost { why: e.to_string() },
            mysql_async::Error::Driver(e) => Trouble::Lost { why: e.to_string() },
            mysql_async::Error::Other(e) => Trouble::Lost { why: e.to_string() },
            mysql_async::Error::Url(e) => Trouble::Lost { why: e.to_string() },
        }
    }
}

/// One row, by column name in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fields(BTreeMap<String, Option<String>>);

impl Fields {
    /// The first of the names that the row has; none of them is an error. `None` is the server's NULL.
    pub(super) fn get(&self, names: &[&str]) -> Result<Option<&str>, Trouble> {
        names.iter().find_map(|name| self.0.get(&name.to_ascii_lowercase())).map(Option::as_deref).ok_or_else(|| {
            Trouble::Strange { why: format!("the server's answer has no column {}", names.join(" or ")) }
        })
    }

    /// As `get`; NULL is the empty text.
    pub(super) fn text(&self, names: &[&str]) -> Result<&str, Trouble> {
        Ok(self.get(names)?.unwrap_or_default())
    }

    /// Of a row with one column.
    pub(super) fn first(&self) -> &str {
        self.0.values().next().and_then(Option::as_deref).unwrap_or_default()
    }

    pub(super) fn number(&self, names: &[&str]) -> Result<u64, Trouble> {
        let text = self.text(names)?;
        text.parse()
            .map_err(|_| Trouble::Strange { why: format!("column {} holds '{text}', no number", names.join("/")) })
    }

    #[cfg(test)]
    pub(super) fn of(pairs: &[(&str, Option<&str>)]) -> Fields {
        Fields(pairs.iter().map(|(k, v)| (k.to_ascii_lowercase(), v.map(str::to_owned))).collect())
    }
}

impl From<Row> for Fields {
    fn from(row: Row) -> Fields {
        let names: Vec<String> = row.columns_ref().iter().map(|c| c.name_str().to_ascii_lowercase()).collect();
        let values = row.unwrap_raw().into_iter().map(|v| match v {
            None | Some(Value::NULL) => None,
            Some(Value::Bytes(b)) => Some(String::from_utf8_lossy(&b).into_owned()),
            Some(Value::Int(n)) => Some(n.to_string()),
            Some(Value::UInt(n)) => Some(n.to_string()),
            Some(Value::Float(n)) => Some(n.to_string()),
            Some(Value::Double(n)) => Some(n.to_string()),
            Some(v @ (Value::Date(..) | Value::Time(..))) => Some(v.as_sql(true)),
        });
        Fields(names.into_iter().zip(values).collect())
    }
}

/// A server and how to get in. Not `Debug`: it holds the password.
#[derive(Clone)]
pub(super) struct Server {
    opts: Opts,
    /// For messages: `db1 (192.168.0.31:3306)`.
    pub(super) place: String,
    user: String,
    socket: Option<PathBuf>,
    tcp: SocketAddr,
    /// Where a saturated server still lets administrators in, once it has said so.
    side_door: Arc<Mutex<Option<SocketAddr>>>,
}

impl Server {
    /// The agent's own server, by its socket when one is configured.
    pub(super) fn local(config: &config::Agent) -> Option<Server> {
        let host = config.cluster.hosts.get(&config.this)?;
        let tcp = SocketAddr::new(host.ip, host.mysql_port);
        let place = match &config.mysql_socket {
            Some(path) => format!("{} ({})", config.this, path.display()),
            None => format!("{} ({tcp})", config.this),
        };
        Some(Server::new(tcp, config.mysql_socket.clone(), place, &host.agent_user, &host.agent_password))
    }

    /// Another host of the cluster, with the replication login (the only one known to work from here).
    pub(super) fn source(name: &str, host: &config::Host) -> Server {
        let tcp = SocketAddr::new(host.ip, host.mysql_port);
        Server::new(tcp, None, format!("{name} ({tcp})"), &host.replication_user, &host.replication_password)
    }

    fn new(tcp: SocketAddr, socket: Option<PathBuf>, place: String, user: &str, password: &config::Secret) -> Server {
        let mut opts = OptsBuilder::default()
            .ip_or_hostname(tcp.ip().to_string())
            .resolved_ips(Some(vec![tcp.ip()]))
            .tcp_port(tcp.port())
            .user(Some(user))
            .pass(Some(password.0.clone()))
            // Else a "TCP" login of 127.0.0.1 would move to the socket by itself.
            .prefer_socket(false)
            // Given, so that logging in does not ask for them.
            .max_allowed_packet(Some(16 << 20))
            .wait_timeout(Some(28800))
            // Quoting must not depend on the server's sql_mode; nothing here may wait long for a lock.
            .setup(vec!["SET SESSION sql_mode='', autocommit=1, lock_wait_timeout=1, wait_timeout=28800"]);
        if let Some(path) = &socket {
            opts = opts.socket(Some(path.display().to_string()));
        }
        Server { opts: opts.into(), place, user: user.to_owned(), socket, tcp, side_door: Arc::default() }
    }

    /// By the side door when the server has no other place left.
    pub(super) async fn connect(&self, limit: Duration) -> Result<Session, Trouble> {
        let (code, message) = match self.connect_by(self.opts.clone(), limit).await {
            Err(Trouble::Refused { code: code @ (1040 | 1203), message }) => (code, message),
            answer => return answer,
        };
        let door = *self.side_door.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(door) = door else { return Err(Trouble::Refused { code, message }) };
        let opts = OptsBuilder::from_opts(self.opts.clone())
            .socket(None::<String>)
            .ip_or_hostname(door.ip().to_string())
            .resolved_ips(Some(vec![door.ip()]))
            .tcp_port(door.port());
        let refused = |e| Trouble::Refused { code, message: format!("{message} (nor by {door}: {e})") };
        self.connect_by(opts.into(), limit).await.map_err(refused)
    }

    /// Asks for MariaDB's extra_port, or MySQL's administrative address.
    pub(super) async fn find_side_door(&self, session: &mut Session) -> Result<(), Trouble> {
        let sql = "SHOW GLOBAL VARIABLES WHERE Variable_name IN ('extra_port', 'admin_address', 'admin_port')";
        let rows = session.rows(QUERY, sql).await?;
        let value = |name: &str| {
            let row = rows.iter().find(|r| r.text(&["Variable_name"]).is_ok_and(|n| n.eq_ignore_ascii_case(name)));
            row.and_then(|r| r.text(&["Value"]).ok()).filter(|v| !v.is_empty())
        };
        let port = |name: &str| value(name).and_then(|p| p.parse::<u16>().ok()).filter(|p| *p != 0);
        let door = match session.dialect {
            Dialect::MariaDb => port("extra_port").map(|p| SocketAddr::new(self.tcp.ip(), p)),
            Dialect::MySql => value("admin_address")
                .and_then(|ip| ip.parse().ok())
                .zip(port("admin_port"))
                .map(|(ip, p)| SocketAddr::new(ip, p)),
        };
        *self.side_door.lock().unwrap_or_else(PoisonError::into_inner) = door;
        Ok(())
    }

    async fn connect_by(&self, opts: Opts, limit: Duration) -> Result<Session, Trouble> {
        let login = async {
            let mut conn = Conn::new(opts).await?;
            let version: Option<String> = conn.query_first("SELECT VERSION()").await?;
            Ok::<_, mysql_async::Error>((conn, version.unwrap_or_default()))
        };
        match timeout(limit, login).await {
            Err(_) => Err(Trouble::Late { limit }),
            Ok(Ok((conn, version))) => {
                Ok(Session { id: conn.id(), dialect: Dialect::of_version(&version), conn, usable: true })
            }
            Ok(Err(e)) => {
                let mut trouble = Trouble::from(e);
                // Say as whom, which the server does not always do.
                if let Trouble::Refused { code: 1044 | 1045 | 1130 | 1698, message } = &mut trouble {
                    *message = format!("login as '{}' at {} is denied ({message})", self.user, self.place);
                }
                Err(trouble)
            }
        }
    }

    /// Whether anything listens, without logging in. Over the socket and over TCP: a wrong path in the configuration
    /// is not a dead server.
    pub(super) async fn knock(&self, limit: Duration) -> Knock {
        let tcp = knock(limit, TcpStream::connect(self.tcp)).await;
        let Some(path) = &self.socket else { return tcp };
        match (knock(limit, UnixStream::connect(path)).await, tcp) {
            (Knock::NotThere(why), Knock::NotThere(_)) => Knock::NotThere(why),
            (Knock::NotThere(why), Knock::Open) => Knock::Elsewhere(format!(
                "{} does not answer ({why}), yet something listens on {}: check mysql_socket",
                path.display(),
                self.tcp
            )),
            (Knock::NotThere(_), other) => other,
            (socket, _) => socket,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Knock {
    Open,
    /// Refused, or no such socket: no process is behind it.
    NotThere(String),
    /// The configured socket is dead, but the port answers.
    Elsewhere(String),
    /// Neither accepted nor refused in time.
    Unclear,
}

async fn knock<T>(limit: Duration, connect: impl Future<Output = std::io::Result<T>>) -> Knock {
    match timeout(limit, connect).await {
        Ok(Ok(_)) => Knock::Open,
        Ok(Err(e)) if matches!(e.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound) => {
            Knock::NotThere(e.to_string())
        }
        Ok(Err(_)) | Err(_) => Knock::Unclear,
    }
}

/// A login. Every question has a deadline; after a missed one the session refuses to be used.
pub(super) struct Session {
    conn: Conn,
    pub(super) id: u32,
    pub(super) dialect: Dialect,
    usable: bool,
}

impl Session {
    /// False after a missed deadline, a lost connection, or when a question was dropped before its answer.
    pub(super) fn usable(&self) -> bool {
        self.usable
    }

    pub(super) async fn rows(&mut self, limit: Duration, sql: &str) -> Result<Vec<Fields>, Trouble> {
        if !self.usable {
            return Err(Trouble::Lost { why: "an earlier question on this connection was not answered".to_owned() });
        }
        // Stays false when this future is dropped half way.
        self.usable = false;
        let answer = match timeout(limit, self.conn.query::<Row, _>(sql)).await {
            Err(_) => Err(Trouble::Late { limit }),
            Ok(Ok(rows)) => Ok(rows.into_iter().map(Fields::from).collect()),
            Ok(Err(e)) => Err(Trouble::from(e)),
        };
        self.usable = match &answer {
            Ok(_) => true,
            Err(e) => e.is_answer(),
        };
        answer
    }

    /// Tries the spellings in order; the next one only when the server does not know the one before (1064, or 1193
    /// for a variable).
    pub(super) async fn rows_of(&mut self, limit: Duration, spellings: &[&str]) -> Result<Vec<Fields>, Trouble> {
        let mut last = Trouble::Strange { why: "no statement given".to_owned() };
        for sql in spellings {
            match self.rows(limit, sql).await {
                Err(e) if matches!(e.code(), Some(1064 | 1193)) => last = e,
                answer => return answer,
            }
        }
        Err(last)
    }

    pub(super) async fn run(&mut self, limit: Duration, sql: &str) -> Result<(), Trouble> {
        self.rows(limit, sql).await.map(drop)
    }

    pub(super) async fn run_of(&mut self, limit: Duration, spellings: &[&str]) -> Result<(), Trouble> {
        self.rows_of(limit, spellings).await.map(drop)
    }

    /// For statements that hold a password: what the server says about syntax quotes the statement, so it is left out.
    pub(super) async fn run_secret(&mut self, limit: Duration, spellings: &[&str]) -> Result<(), Trouble> {
        self.run_of(limit, spellings).await.map_err(|mut e| {
            if let Trouble::Refused { code: 1064, message } = &mut e {
                *message = "the server does not know this form of the statement".to_owned();
            }
            e
        })
    }

    /// How long ago the server was started, in whole seconds, by its own clock; None: it does not say.
    pub(super) async fn uptime(&mut self) -> Result<Option<Duration>, Trouble> {
        let rows = self.rows(QUERY, "SHOW GLOBAL STATUS LIKE 'Uptime'").await?;
        let seconds = rows.first().and_then(|row| row.number(&["Value"]).ok());
        Ok(seconds.map(Duration::from_secs))
    }

    pub(super) async fn ping(&mut self, limit: Duration) -> Result<(), Trouble> {
        self.run(limit, "DO 0").await
    }
}

/// A text as an SQL literal (under `sql_mode=''`).
pub(super) fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

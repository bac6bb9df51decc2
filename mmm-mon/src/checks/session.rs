//! A login at one host's MySQL server that is kept from check to check, and what its errors mean.
//!
//! It has no deadlines of its own: the caller puts one over everything, and after it was cancelled the connection must
//! be thrown away (mysql_async would otherwise give the old query's answer to the next one). Passwords never leave it.

use mmm_common::config::Host;
use mysql_async::prelude::Queryable as _;
use mysql_async::{Conn, DriverError, Error, IoError, Opts, OptsBuilder, Row, ServerError, Value};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::timeout;

/// How long a connection that is thrown away may take to say goodbye, in the background.
const GOODBYE: Duration = Duration::from_millis(500);
/// So many sessions may hang on a server that is stuck; more would fill it up.
const MOST_ABANDONED: usize = 3;
/// Larger than any answer that is asked for; what is not a MySQL server cannot make us hold more.
const MAX_PACKET: usize = 1024 * 1024;

pub(crate) struct Session {
    opts: Opts,
    login: Login,
    conn: Option<Conn>,
    /// Sessions whose last statement was not answered in time: they may hang in the server long after we have gone.
    abandoned: Vec<u32>,
    /// What is being done, for the text when it takes too long.
    doing: &'static str,
}

/// Where, and as whom.
#[derive(Clone, Debug)]
pub(crate) struct Login {
    pub(crate) server: SocketAddr,
    pub(crate) user: String,
}

/// Why something could not be done, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Nobody serves there: refused, closed, shutting down, not a MySQL server.
    NotServing(String),
    /// A running server has answered with an error, so it lives.
    Answered { code: u16, text: String },
}

impl Trouble {
    pub(crate) fn text(self) -> String {
        match self {
            Trouble::NotServing(text) | Trouble::Answered { text, .. } => text,
        }
    }
}

impl Session {
    pub(crate) fn new(host: &Host) -> Self {
        let opts = OptsBuilder::default()
            .ip_or_hostname(host.ip.to_string())
            .resolved_ips(Some(vec![host.ip]))
            .tcp_port(host.mysql_port)
            .user(Some(&host.monitor_user))
            .pass(Some(&host.monitor_password.0).filter(|p| !p.is_empty()))
            // A check of 127.0.0.1 must go by TCP as well.
            .prefer_socket(false)
            // Given, so that they need not be asked for at each login.
            .max_allowed_packet(Some(MAX_PACKET))
            .wait_timeout(Some(28800))
            .stmt_cache_size(0);
        let login = Login { server: SocketAddr::new(host.ip, host.mysql_port), user: host.monitor_user.clone() };
        Session { opts: opts.into(), login, conn: None, abandoned: Vec::new(), doing: "connecting" }
    }

    pub(crate) fn login(&self) -> &Login {
        &self.login
    }

    pub(crate) fn doing(&self) -> &'static str {
        self.doing
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.conn.is_some()
    }

    /// Logs in anew. Only when that has worked the kept connection is replaced.
    pub(crate) async fn connect(&mut self) -> Result<(), Trouble> {
        self.doing = "to a new connection";
        let conn = Conn::new(self.opts.clone()).await.map_err(|e| self.login.trouble(&e));
        if matches!(conn, Err(Trouble::NotServing(_))) {
            // They have ended with their server, and a new one would give their numbers to others.
            self.abandoned.clear();
        }
        let conn = conn?;
        self.throw_away();
        self.conn = Some(conn);
        Ok(())
    }

    /// Runs one statement on the kept connection, or on a new one. A kept connection that turns out to be broken says
    /// nothing about the server (its idle sessions may have been ended): then a new one is made.
    pub(crate) async fn query(&mut self, statement: &str) -> Result<Vec<Row>, Trouble> {
        self.end_abandoned().await?;
        if let Some(conn) = self.conn.as_mut() {
            self.doing = "to a query";
            match conn.query(statement).await {
                Ok(rows) => return Ok(rows),
                Err(Error::Server(e)) if !ends_session(e.code) => return Err(self.login.answered(&e)),
                Err(_) => self.throw_away(),
            }
        }
        self.connect().await?;
        self.end_abandoned().await?;
        let Some(conn) = self.conn.as_mut() else {
            return Err(Trouble::NotServing("no connection".to_owned()));
        };
        self.doing = "to a query";
        let result = conn.query(statement).await.map_err(|e| self.login.trouble(&e));
        if matches!(result, Err(Trouble::NotServing(_))) {
            self.throw_away();
        }
        result
    }

    /// Ends on the kept connection what hangs on earlier ones. One that is found to be gone is forgotten.
    async fn end_abandoned(&mut self) -> Result<(), Trouble> {
        let Some(conn) = self.conn.as_mut() else { return Ok(()) };
        let mut looked_at = 0;
        while let Some(id) = self.abandoned.get(looked_at).copied() {
            self.doing = "to a query";
            match conn.query_drop(format!("KILL {id}")).await {
                // It ends as soon as the server gets round to it.
                Ok(()) => looked_at += 1,
                Err(Error::Server(e)) if !ends_session(e.code) => drop(self.abandoned.remove(looked_at)),
                Err(e) => {
                    let trouble = self.login.trouble(&e);
                    self.throw_away();
                    return Err(trouble);
                }
            }
        }
        if self.abandoned.len() < MOST_ABANDONED {
            return Ok(());
        }
        Err(Trouble::NotServing(format!(
            "{} sessions of this check hang at {} and do not end after KILL, so the server is stuck: look at its error \
             log, its disk and SHOW PROCESSLIST",
            self.abandoned.len(),
            self.login.server
        )))
    }

    /// After a statement that was not answered in time.
    pub(crate) fn abandon(&mut self) {
        self.abandoned.extend(self.conn.as_ref().map(Conn::id));
        self.throw_away();
    }

    /// Closes the kept connection without waiting for the other side.
    pub(crate) fn throw_away(&mut self) {
        if let Some(conn) = self.conn.take() {
            // Dropping it would do the same in the background, but without a limit in time.
            if let Ok(runtime) = Handle::try_current() {
                runtime.spawn(timeout(GOODBYE, conn.disconnect()));
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.throw_away();
    }
}

impl Login {
    fn trouble(&self, e: &Error) -> Trouble {
        let server = self.server;
        match e {
            Error::Server(e) => self.answered(e),
            Error::Io(IoError::Io(e)) => Trouble::NotServing(self.io_trouble(e)),
            Error::Io(IoError::Tls(e)) => Trouble::NotServing(format!("TLS with {server} failed: {e}")),
            Error::Driver(DriverError::ConnectionClosed) => {
                Trouble::NotServing(format!("{server} closed the connection"))
            }
            Error::Driver(
                e @ (DriverError::UnknownAuthPlugin { .. }
                | DriverError::MysqlOldPasswordDisabled
                | DriverError::CleartextPluginDisabled),
            ) => Trouble::Answered {
                code: 0,
                text: format!(
                    "the server at {server} answers, but wants a way to log in that mmm_mond does not have: {e} Give \
                     '{}' another authentication plugin",
                    self.user
                ),
            },
            // Not with the driver's own words: they may hold whatever the other side has sent.
            Error::Driver(_) | Error::Other(_) | Error::Url(_) => {
                Trouble::NotServing(format!("what answers at {server} does not speak MySQL's protocol"))
            }
        }
    }

    fn io_trouble(&self, e: &io::Error) -> String {
        let server = self.server;
        let is = |kinds: &[io::ErrorKind]| kinds.contains(&e.kind());
        if is(&[io::ErrorKind::ConnectionRefused]) {
            format!("{server} refuses connections: no server runs there")
        } else if is(&[
            io::ErrorKind::UnexpectedEof,
            io::ErrorKind::ConnectionReset,
            io::ErrorKind::ConnectionAborted,
            io::ErrorKind::BrokenPipe,
        ]) {
            format!("{server} closed the connection")
        } else if is(&[io::ErrorKind::Other, io::ErrorKind::InvalidData, io::ErrorKind::InvalidInput]) {
            format!("what answers at {server} does not speak MySQL's protocol")
        } else {
            format!("connection to {server} failed: {e}")
        }
    }

    /// MySQL's and MariaDB's error numbers, with the cure for those that an operator can cure.
    fn answered(&self, e: &ServerError) -> Trouble {
        let Login { server, user } = self;
        let said = format!("({}: {})", e.code, e.message);
        let text = match e.code {
            1053 | 1077 | 1079 => {
                return Trouble::NotServing(format!("the server at {server} is shutting down {said}"));
            }
            code if ends_session(code) => {
                return Trouble::NotServing(format!("the server at {server} ended the connection {said}"));
            }
            1040 | 1203 | 1226 => format!(
                "too many connections: the server at {server} answers, but lets '{user}' not in {said}. Raise \
                 max_connections or end connections"
            ),
            1045 | 1698 | 1862 | 3118 | 4151 => format!(
                "access denied: the server at {server} answers, but lets '{user}' not in {said}. Check monitor_user \
                 and monitor_password, and the account on the server"
            ),
            1129 | 1130 => format!(
                "the server at {server} answers, but not to this machine {said}. 1130: create '{user}' for this \
                 machine's address; 1129: run FLUSH HOSTS there"
            ),
            1044 | 1142 | 1143 | 1227 | 1370 => format!(
                "'{user}' lacks a privilege at {server} {said}. GRANT REPLICATION CLIENT ON *.* TO '{user}' (on \
                 MariaDB 10.5 and later also SLAVE MONITOR)"
            ),
            _ => format!("the server at {server} answers with an error {said}"),
        };
        Trouble::Answered { code: e.code, text }
    }
}

/// Errors after which the server closes this connection, whatever else it does: killed, or idle for too long.
fn ends_session(code: u16) -> bool {
    matches!(code, 1053 | 1077 | 1079 | 1152 | 1184 | 1927 | 4031)
}

/// A value as text; None for NULL.
pub(crate) fn text(value: &Value) -> Option<String> {
    match value {
        Value::NULL => None,
        Value::Bytes(b) => Some(String::from_utf8_lossy(b).into_owned()),
        Value::Int(_) | Value::UInt(_) | Value::Float(_) | Value::Double(_) | Value::Date(..) | Value::Time(..) => {
            Some(value.as_sql(true))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meaning(code: u16) -> Trouble {
        let login = Login { server: "10.0.0.1:3306".parse().unwrap(), user: "mmm_monitor".into() };
        login.trouble(&Error::Server(ServerError { code, message: "said".into(), state: "HY000".into() }))
    }

    #[test]
    fn an_error_from_a_living_server_is_told_from_one_that_ends() {
        for (code, word) in [
            (1040, "too many connections"),
            (1203, "too many connections"),
            (1045, "monitor_password"),
            (1130, "this machine"),
            (1129, "FLUSH HOSTS"),
            (1227, "REPLICATION CLIENT"),
            (1064, "answers with an error (1064: said)"),
        ] {
            let Trouble::Answered { code: got, text } = meaning(code) else { panic!("{code}") };
            assert_eq!(got, code);
            assert!(text.contains(word) && text.contains("10.0.0.1:3306"), "{text}");
        }
        for code in [1053, 1927] {
            assert!(matches!(meaning(code), Trouble::NotServing(_)), "{code}");
        }
    }
}

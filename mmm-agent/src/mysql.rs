//! The database side of the agent: a watcher that says what the local server is and does, and the steps that the
//! agent's core wants done on it. MariaDB and MySQL.
//!
//! Addresses never wait for anything here: every question to the server has a deadline, and what was not answered
//! comes back as an input, as text. Nothing is reported that was not read back.
//!
//! What the agent's user needs. The tests log in with exactly these; of what is optional, with the SELECT on MariaDB.
//!
//! MariaDB 10.5 and later:
//! ```sql
//! GRANT READ_ONLY ADMIN, CONNECTION ADMIN, PROCESS, SLAVE MONITOR, REPLICATION SLAVE ADMIN,
//!       REPLICATION MASTER ADMIN ON *.* TO mmm_agent@…;   -- the last one: semi-sync's source side
//! -- saving, undoing and copying anew; RELOAD also forgets a source, BINLOG MONITOR also reads the log's end
//! GRANT BINLOG MONITOR, BINLOG ADMIN, BINLOG REPLAY, RELOAD, LOCK TABLES ON *.* TO mmm_agent@…;
//! -- optional: sessions that may write under read_only are found by it, and killed in a planned move
//! GRANT SELECT ON mysql.* TO mmm_agent@…;
//! ```
//! MySQL 8.0 and later:
//! ```sql
//! GRANT SYSTEM_VARIABLES_ADMIN, CONNECTION_ADMIN, PROCESS, REPLICATION CLIENT, REPLICATION_SLAVE_ADMIN,
//!       XA_RECOVER_ADMIN ON *.* TO mmm_agent@…;
//! -- copying anew (clone); RELOAD also forgets a source
//! GRANT CLONE_ADMIN, RELOAD ON *.* TO mmm_agent@…;
//! -- optional: sessions of users who have SYSTEM_USER (root) can be killed too
//! GRANT SYSTEM_USER ON *.* TO mmm_agent@…;
//! ```
//! CONNECTION ADMIN (CONNECTION_ADMIN) also lets the agent in as the one session above max_connections. One more way in,
//! where it is configured: MariaDB's extra_port, MySQL's admin_address (`GRANT SERVICE_CONNECTION_ADMIN`); the agent finds
//! it by itself while it is logged in. With neither, an agent that starts while somebody else sits in that one place
//! reports a server that it knows nothing of.
//!
//! The replication user needs REPLICATION SLAVE, and should be allowed in from every host of the cluster.

mod clients;
mod context;
mod dialect;
pub(crate) mod examine;
mod fetch;
mod follow;
mod mariadb;
mod mysql8;
mod quiesce;
mod read_only;
mod relay;
mod semisync;
mod session;
mod status;
mod tasks;
#[cfg(test)]
mod tests;
mod watch;
mod worker;

use mmm_agent_core::io::{Input, Step};
use mmm_common::config;
use mmm_common::report::ServerReport;
use std::sync::Arc;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// The local server, watched and worked on by tasks of the current runtime. They end when this is dropped, or when
/// nobody takes inputs any more.
pub(crate) struct Database {
    steps: UnboundedSender<Step>,
}

impl Database {
    /// Starts watching at once. `Input::Server` comes at every change and at least once a second.
    pub(crate) fn start(config: Arc<config::Agent>, inputs: UnboundedSender<Input>) -> Database {
        let (steps, queue) = unbounded_channel();
        match session::Server::local(&config) {
            Some(server) => {
                let (logins, hang_timeout) = (context::Logins::default(), config.cluster.hang_timeout);
                let watch = watch::start(server.clone(), logins.clone(), hang_timeout, inputs.clone());
                worker::start(context::Context::new(server, config, watch, logins), queue, inputs);
            }
            None => {
                // The configuration's check refuses this; were it let through, the steps answer by not being done.
                let why = format!("[host.{}] is not in the configuration", config.this);
                let _ended = inputs.send(Input::Server(ServerReport::unknown(&why)));
            }
        }
        Database { steps }
    }

    /// Steps on the server: ReadOnly, Writable, Follow, Detach, SemiSync and Task. Each is answered by `Input::Done` or
    /// `Input::TaskDone`, after an `Input::Server` that shows its effect.
    pub(crate) fn queue(&self, step: Step) {
        if self.steps.send(step).is_err() {
            tracing::error!("a step for the database was dropped: its worker has ended");
        }
    }
}

//! What `mmm_control doctor` asks of the local server, as the agent's user, and of the other servers, as the replication
//! user. The rules are in [`rules`], one for each subject; here is what they need to know.
//!
//! It only looks, with logins of its own. Privileges are tried by statements that cannot succeed: a setting is given a
//! value that it cannot have, which a server refuses differently to those who may and to those who may not set it. So
//! nothing changes and nothing gets into a binary log, and no fencing that goes on at the same time is undone.

mod options;
mod privileges;
mod rules;

use super::dialect::{Dialect, is_on};
use super::session::{Fields, QUERY, Server, Session, Trouble};
use futures_util::future::join_all;
use mmm_common::config::{Agent as Config, Host};
use mmm_common::examine::{Finding, ServerFacts, Severity, SourceFacts, Subject};
use mmm_common::ids::HostName;
use mmm_common::report::Writing;
use mmm_common::state::HostMode;
use options::Options;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

/// A server that is busy may take longer for a login than the agent's work can wait.
const LOGIN: Duration = Duration::from_secs(2);

/// Everything the rules look at.
pub(super) struct Look<'a> {
    dialect: Dialect,
    master: bool,
    config: &'a Config,
    variables: Variables,
    /// The default replication connection, as the server shows it.
    status: Option<Fields>,
    writable: bool,
    /// What the server will read when it starts; the error is why that is not known.
    options: Result<Options, String>,
    /// MySQL: settings in mysqld-auto.cnf, which count more than those in files.
    persisted: BTreeMap<String, String>,
    /// Where the present value of read_only came from, in the server's words.
    origin: Option<String>,
    /// MySQL: plugins that are active.
    plugins: BTreeSet<String>,
    /// Events that the agent's user can see and that would run here.
    events: u64,
    connections: u64,
    /// MariaDB: which programs for a backup are not installed.
    missing_tools: Vec<&'static str>,
}

/// SHOW GLOBAL VARIABLES. One that a server does not have is not there.
#[derive(Clone, Debug, Default)]
pub(super) struct Variables(BTreeMap<String, String>);

impl Variables {
    /// The first of these names that the server has, with its value.
    fn first<'n>(&self, names: &[&'n str]) -> Option<(&'n str, &str)> {
        names.iter().find_map(|name| self.0.get(*name).map(|value| (*name, value.as_str())))
    }

    fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.0.get(name)?.parse().ok()
    }

    fn is_on(&self, names: &[&str]) -> bool {
        self.first(names).is_some_and(|(_, value)| is_on(value))
    }
}

/// The agent's own server: findings, and what the monitor compares. No facts: it did not let the agent look.
pub(crate) async fn server(config: &Config) -> (Vec<Finding>, Option<ServerFacts>) {
    let (Some(server), Some(host)) = (Server::local(config), config.cluster.hosts.get(&config.this)) else {
        return (Vec::new(), None);
    };
    let tried = format!("logging in to {} as '{}'", server.place, host.agent_user);
    let mut session = match server.connect(LOGIN).await {
        Ok(session) => session,
        Err(e) => {
            let cure = login_cure(&e, &host.agent_user, "agent_password");
            return (vec![Finding::bad(Severity::Error, Subject::Server, tried, e.to_string(), cure)], None);
        }
    };
    let mut findings = Vec::new();
    match privileges::of_agent(&mut session).await {
        Ok(privileges) => findings.extend(privileges),
        Err(e) => findings.push(unanswered(&tried, &e)),
    }
    let looked = async {
        let look = ask(&mut session, config, host).await?;
        let facts = facts(&mut session, &look).await?;
        Ok::<_, Trouble>((rules::judge(&look), facts))
    };
    match looked.await {
        Ok((judged, facts)) => {
            findings.push(Finding::ok(Subject::Server, tried, facts.version.clone()));
            findings.extend(judged);
            (findings, Some(facts))
        }
        Err(e) => {
            findings.push(unanswered(&tried, &e));
            (findings, None)
        }
    }
}

fn unanswered(tried: &str, e: &Trouble) -> Finding {
    let found = format!("a question was not answered: {e}");
    let cure = "see the server's error log; when a privilege is missing, it is named under agent_user";
    Finding::bad(Severity::Error, Subject::Server, tried, found, cure)
}

/// What replication of this host would need to follow any of the others.
pub(crate) async fn replication_logins(config: &Config) -> Vec<Finding> {
    let others = config.cluster.hosts.iter().filter(|(name, _)| **name != config.this);
    join_all(others.map(|(name, other)| replication_login(config, name, other))).await
}

async fn replication_login(config: &Config, name: &HostName, other: &Host) -> Finding {
    let server = Server::source(name.as_str(), other);
    let user = &other.replication_user;
    let tried = format!("logging in from {} to {} as '{user}'", config.this, server.place);
    let bad = |found: String, cure: String| {
        Finding::bad(Severity::Error, Subject::ReplicationUser, tried.clone(), found, cure)
    };
    let mut session = match server.connect(LOGIN).await {
        Ok(session) => session,
        Err(e) => {
            let cure = match e.code() {
                Some(_) => login_cure(&e, user, "replication_password"),
                None => format!("start the server of {name}; let TCP port {} in there", other.mysql_port),
            };
            return bad(e.to_string(), cure);
        }
    };
    // A clone is read with it.
    let needed: &[&str] = match session.dialect {
        Dialect::MariaDb => &["REPLICATION SLAVE"],
        Dialect::MySql => &["REPLICATION SLAVE", "BACKUP_ADMIN"],
    };
    match privileges::lacks(&mut session, needed).await {
        Ok((_, missing)) if missing.is_empty() => {
            Finding::ok(Subject::ReplicationUser, tried.clone(), format!("let in, and has {}", needed.join(", ")))
        }
        Ok((account, missing)) if missing == ["BACKUP_ADMIN"] => Finding::bad(
            Severity::Warning,
            Subject::ReplicationUser,
            tried.clone(),
            "without BACKUP_ADMIN: reclone cannot work",
            privileges::grant("BACKUP_ADMIN", &account),
        ),
        Ok((account, missing)) => {
            bad(format!("without {}", missing.join(", ")), privileges::grant(&missing.join(", "), &account))
        }
        Err(e) => bad(e.to_string(), "ask again".to_owned()),
    }
}

fn login_cure(e: &Trouble, user: &str, password: &str) -> String {
    match e {
        Trouble::Refused { code: 1040 | 1203 | 1226, .. } => {
            "SET GLOBAL max_connections to more, or end connections".to_owned()
        }
        Trouble::Refused { code: 1130, .. } => {
            format!(
                "on the active master: CREATE USER '{user}'@'%' IDENTIFIED BY '<{password}>', or for this host's address"
            )
        }
        Trouble::Refused { .. } => {
            format!("compare {password} in the configuration with the account '{user}' on the server")
        }
        Trouble::NotThere { .. } => "start the server; compare mysql_socket and mysql_port".to_owned(),
        Trouble::Lost { .. } | Trouble::Late { .. } | Trouble::Strange { .. } => {
            "see the server's error log, and the load of its host".to_owned()
        }
    }
}

const VARIABLES: &[&str] = &[
    "auto_increment_increment",
    "auto_increment_offset",
    "basedir",
    "binlog_expire_logs_auto_purge",
    "binlog_expire_logs_seconds",
    "binlog_format",
    "binlog_row_image",
    "datadir",
    "enforce_gtid_consistency",
    "event_scheduler",
    "expire_logs_days",
    "gtid_domain_id",
    "gtid_mode",
    "gtid_strict_mode",
    "innodb_flush_log_at_trx_commit",
    "log_bin",
    "log_replica_updates",
    "log_slave_updates",
    "max_connections",
    "pid_file",
    "relay_log_recovery",
    "replica_exec_mode",
    "replica_net_timeout",
    "replica_skip_errors",
    "rpl_semi_sync_master_enabled",
    "rpl_semi_sync_master_timeout",
    "rpl_semi_sync_master_wait_point",
    "rpl_semi_sync_replica_enabled",
    "rpl_semi_sync_slave_enabled",
    "rpl_semi_sync_source_enabled",
    "rpl_semi_sync_source_timeout",
    "rpl_semi_sync_source_wait_point",
    "server_id",
    "server_uuid",
    "slave_exec_mode",
    "slave_net_timeout",
    "slave_skip_errors",
    "socket",
    "sync_binlog",
    "version",
];

async fn ask<'a>(session: &mut Session, config: &'a Config, host: &Host) -> Result<Look<'a>, Trouble> {
    let names: Vec<String> = VARIABLES.iter().map(|name| format!("'{name}'")).collect();
    let sql = format!("SHOW GLOBAL VARIABLES WHERE Variable_name IN ({})", names.join(","));
    let variables = Variables(pairs(&session.rows(QUERY, &sql).await?, "Variable_name", "Value")?);
    let mysql = session.dialect == Dialect::MySql;
    let connected = session.rows(QUERY, "SHOW GLOBAL STATUS LIKE 'Threads_connected'").await?;
    let status = session.rows_of(QUERY, session.dialect.words().status).await?;
    let status = status.into_iter().find(|row| {
        let named = row.text(&["Channel_Name", "Connection_name"]).unwrap_or_default();
        named.is_empty() && !row.text(&["Source_Host", "Master_Host"]).unwrap_or_default().is_empty()
    });
    let events = "SELECT COUNT(*) AS n FROM information_schema.EVENTS WHERE STATUS='ENABLED'";
    let events = session.rows(QUERY, events).await?.first().and_then(|row| row.number(&["n"]).ok()).unwrap_or(0);
    let (origin, persisted, plugins) = if mysql {
        let origin = "SELECT VARIABLE_SOURCE AS origin FROM performance_schema.variables_info \
                      WHERE VARIABLE_NAME='read_only'";
        // Not everybody may see these two, and not every version has them.
        let origin = session.rows(QUERY, origin).await.unwrap_or_default();
        let persisted = "SELECT VARIABLE_NAME, VARIABLE_VALUE FROM performance_schema.persisted_variables";
        let persisted = session.rows(QUERY, persisted).await.unwrap_or_default();
        let plugins = "SELECT PLUGIN_NAME, PLUGIN_STATUS FROM information_schema.PLUGINS WHERE PLUGIN_STATUS='ACTIVE'";
        let plugins = pairs(&session.rows(QUERY, plugins).await?, "PLUGIN_NAME", "PLUGIN_STATUS")?;
        (origin, pairs(&persisted, "VARIABLE_NAME", "VARIABLE_VALUE")?, plugins.into_keys().collect())
    } else {
        let origin = "SELECT GLOBAL_VALUE_ORIGIN AS origin FROM information_schema.SYSTEM_VARIABLES \
                      WHERE VARIABLE_NAME='READ_ONLY'";
        (session.rows(QUERY, origin).await?, BTreeMap::new(), BTreeSet::new())
    };
    let origin = origin.first().and_then(|row| row.text(&["origin"]).ok()).map(str::to_owned);
    let place = options::Place {
        pid_file: variables.text("pid_file").into(),
        datadir: variables.text("datadir").into(),
        socket: variables.text("socket").into(),
        version: variables.text("version").to_owned(),
        mariadb: !mysql,
    };
    let files = tokio::task::spawn_blocking(move || {
        let tools = ["mariadb-backup", "mbstream"];
        let missing = tools.into_iter().filter(|tool| !mysql && !is_installed(tool)).collect();
        (Options::of_server(&place), missing)
    });
    let (options, missing_tools) = files.await.unwrap_or_else(|e| (Err(e.to_string()), Vec::new()));
    Ok(Look {
        dialect: session.dialect,
        master: host.mode == HostMode::Master,
        config,
        status,
        writable: session.vitals().await?.writing == Writing::Allowed,
        options,
        persisted,
        origin,
        plugins,
        events,
        connections: connected.first().and_then(|row| row.number(&["Value"]).ok()).unwrap_or(0),
        missing_tools,
        variables,
    })
}

fn pairs(rows: &[Fields], name: &str, value: &str) -> Result<BTreeMap<String, String>, Trouble> {
    rows.iter().map(|row| Ok((row.text(&[name])?.to_ascii_lowercase(), row.text(&[value])?.to_owned()))).collect()
}

/// In a folder of PATH, or where packages put programs.
fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/local/bin", "/usr/bin", "/usr/sbin"].map(std::path::PathBuf::from);
    std::env::split_paths(&path).chain(usual).any(|folder| Path::new(&folder).join(program).is_file())
}

async fn facts(session: &mut Session, look: &Look<'_>) -> Result<ServerFacts, Trouble> {
    let vitals = session.vitals().await?;
    let variables = &look.variables;
    let source = match &look.status {
        None => None,
        Some(row) => Some(SourceFacts {
            host: row.text(&["Source_Host", "Master_Host"])?.to_owned(),
            port: u16::try_from(row.number(&["Source_Port", "Master_Port"])?).unwrap_or_default(),
        }),
    };
    Ok(ServerFacts {
        mariadb: look.dialect == Dialect::MariaDb,
        version: variables.text("version").to_owned(),
        server_id: variables.number("server_id").unwrap_or(0),
        server_uuid: variables.first(&["server_uuid"]).map(|(_, uuid)| uuid.to_owned()),
        gtid_domain_id: variables.number("gtid_domain_id"),
        auto_increment_increment: variables.number("auto_increment_increment").unwrap_or(1),
        auto_increment_offset: variables.number("auto_increment_offset").unwrap_or(1),
        writable: vitals.writing == Writing::Allowed,
        source,
        executed: vitals.executed,
    })
}

//! What an account may do: tried where a statement can be refused for another reason than the privilege and so changes
//! nothing, else as the server says it (SHOW GRANTS).

use super::super::dialect::Dialect;
use super::super::session::{Fields, QUERY, Session, Trouble};
use mmm_common::examine::{Finding, Severity, Subject};
use std::collections::BTreeSet;

/// A setting that cannot have this value: who may set it is told so (1231, 1232), who may not is told that (1227).
const IMPOSSIBLE: [(Dialect, &str, &str); 5] = [
    (Dialect::MariaDb, "READ_ONLY ADMIN", "SET GLOBAL read_only='mmm doctor'"),
    (Dialect::MariaDb, "CONNECTION ADMIN", "SET GLOBAL max_connections='mmm doctor'"),
    (Dialect::MariaDb, "REPLICATION SLAVE ADMIN", "SET GLOBAL rpl_semi_sync_slave_enabled='mmm doctor'"),
    (Dialect::MariaDb, "REPLICATION MASTER ADMIN", "SET GLOBAL rpl_semi_sync_master_enabled='mmm doctor'"),
    (Dialect::MySql, "SYSTEM_VARIABLES_ADMIN", "SET GLOBAL read_only='mmm doctor'"),
];
/// Questions that only those with the privilege may ask.
const QUESTIONS: [(Dialect, &str, &str); 5] = [
    (Dialect::MariaDb, "SLAVE MONITOR", "SHOW SLAVE STATUS"),
    (Dialect::MariaDb, "PROCESS", "SELECT COUNT(*) FROM information_schema.INNODB_TRX"),
    (Dialect::MySql, "REPLICATION CLIENT", "SHOW BINARY LOGS"),
    (Dialect::MySql, "PROCESS", "SELECT COUNT(*) FROM information_schema.INNODB_TRX"),
    (Dialect::MySql, "XA_RECOVER_ADMIN", "XA RECOVER"),
];
/// Those that nothing harmless needs.
const TOLD: [(Dialect, &str); 2] = [(Dialect::MySql, "CONNECTION_ADMIN"), (Dialect::MySql, "REPLICATION_SLAVE_ADMIN")];

/// For saving, undoing and copying a host's data: what those begin with is nothing to try.
const JOBS: [(Dialect, &str); 7] = [
    (Dialect::MariaDb, "BINLOG MONITOR"),
    (Dialect::MariaDb, "BINLOG ADMIN"),
    (Dialect::MariaDb, "BINLOG REPLAY"),
    (Dialect::MariaDb, "RELOAD"),
    (Dialect::MariaDb, "LOCK TABLES"),
    (Dialect::MySql, "CLONE_ADMIN"),
    (Dialect::MySql, "RELOAD"),
];

const WRONG_VALUE: [u16; 2] = [1231, 1232];
const DENIED: [u16; 4] = [1142, 1227, 1044, 1401];

/// One finding for all that the agent needs, and one each for what it can do without.
pub(super) async fn of_agent(session: &mut Session) -> Result<Vec<Finding>, Trouble> {
    let dialect = session.dialect;
    let mut missing = BTreeSet::new();
    for (of, privilege, sql) in IMPOSSIBLE {
        if of != dialect {
            continue;
        }
        match session.run(QUERY, sql).await {
            Err(e) if e.code().is_some_and(|code| WRONG_VALUE.contains(&code)) => {}
            Err(e) if e.code().is_some_and(|code| DENIED.contains(&code)) => drop(missing.insert(privilege)),
            Err(e) => return Err(e),
            // It has taken 'mmm doctor' for a value. No server is known to; that it did must not go unnoticed.
            Ok(()) => return Err(Trouble::Strange { why: format!("the server has accepted: {sql}") }),
        }
    }
    for (of, privilege, sql) in QUESTIONS {
        if of != dialect {
            continue;
        }
        match session.run(QUERY, sql).await {
            Err(e) if e.code().is_some_and(|code| DENIED.contains(&code)) => drop(missing.insert(privilege)),
            // Or an answer that has nothing to do with privileges: without a binary log there are none to show.
            Ok(()) => {}
            Err(e) if e.is_answer() => {}
            Err(e) => return Err(e),
        }
    }
    let of_dialect = |all: &[(Dialect, &'static str)]| -> Vec<&'static str> {
        all.iter().filter(|(of, _)| *of == dialect).map(|(_, privilege)| *privilege).collect()
    };
    let (account, untold) = lacks(session, &of_dialect(&TOLD)).await?;
    missing.extend(untold);

    let missing: Vec<&str> = missing.into_iter().collect();
    let tried = format!("what {account} may do: each privilege by a statement that needs it and changes nothing");
    let needed = if missing.is_empty() {
        Finding::ok(Subject::AgentUser, tried, "everything the agent needs")
    } else {
        let found = format!("without {}", missing.join(", "));
        Finding::bad(Severity::Error, Subject::AgentUser, tried, found, grant(&missing.join(", "), &account))
    };
    let tried = format!("whether {account} may save, undo and copy a host's data");
    let (_, missing) = lacks(session, &of_dialect(&JOBS)).await?;
    let jobs = if missing.is_empty() {
        Finding::ok(Subject::AgentUser, tried, "it may")
    } else {
        let found = format!("without {}: --accept-lost and reclone cannot work", missing.join(", "));
        Finding::bad(Severity::Warning, Subject::AgentUser, tried, found, grant(&missing.join(", "), &account))
    };
    Ok(vec![needed, jobs, sees_users(session, &account).await?])
}

/// Who may write although the server is read-only has to be known, and ended, in a planned move.
async fn sees_users(session: &mut Session, account: &str) -> Result<Finding, Trouble> {
    let tried = "whether sessions that may write on a read-only server can be ended in a planned move";
    let (allowed, cure) = match session.dialect {
        Dialect::MariaDb => {
            let seen = session.run(QUERY, "SELECT COUNT(*) FROM mysql.global_priv").await;
            (seen.is_ok(), format!("on the active master: GRANT SELECT ON mysql.* TO {account}"))
        }
        Dialect::MySql => {
            let (_, missing) = lacks(session, &["SYSTEM_USER"]).await?;
            (missing.is_empty(), grant("SYSTEM_USER", account))
        }
    };
    Ok(if allowed {
        Finding::ok(Subject::AgentUser, tried, "they can")
    } else {
        Finding::bad(Severity::Notice, Subject::AgentUser, tried, "not all of them", cure)
    })
}

/// The account that this session is, quoted, and which of these global privileges it lacks, roles included.
pub(super) async fn lacks<'p>(session: &mut Session, needed: &[&'p str]) -> Result<(String, Vec<&'p str>), Trouble> {
    let rows = session.rows(QUERY, "SELECT CURRENT_USER() AS account").await?;
    let account = rows.first().map_or(Ok(""), |row| row.text(&["account"]))?;
    let account = account.rsplit_once('@').map_or(account.to_owned(), |(user, host)| format!("'{user}'@'{host}'"));
    let grants = session.rows(QUERY, "SHOW GRANTS").await?;
    let has = global(grants.iter().map(Fields::first));
    let all = has.contains("ALL PRIVILEGES");
    Ok((account, needed.iter().copied().filter(|one| !all && !has.contains(*one)).collect()))
}

/// Writes into the binary log, so it belongs where writing does.
pub(super) fn grant(privileges: &str, account: &str) -> String {
    format!("on the active master: GRANT {privileges} ON *.* TO {account}")
}

/// The privileges on everything, out of `GRANT A, B ON *.* TO …`. What follows (MariaDB: the hash of the password) is
/// not looked at.
fn global<'g>(grants: impl Iterator<Item = &'g str>) -> BTreeSet<String> {
    grants
        .filter_map(|grant| grant.strip_prefix("GRANT ")?.split_once(" ON *.* TO "))
        .flat_map(|(privileges, _)| privileges.split(','))
        .map(|one| one.trim().replace("REPLICATION REPLICA", "REPLICATION SLAVE").to_uppercase())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_privileges_on_everything_count() {
        let grants = [
            "GRANT PROCESS, CONNECTION ADMIN ON *.* TO `a`@`%` IDENTIFIED BY PASSWORD '*B1'",
            "GRANT CONNECTION_ADMIN,XA_RECOVER_ADMIN ON *.* TO `a`@`%`",
            "GRANT SELECT ON `mysql`.* TO `a`@`%`",
            "GRANT `role` TO `a`@`%`",
        ];
        let has: Vec<String> = global(grants.into_iter()).into_iter().collect();
        assert_eq!(has, ["CONNECTION ADMIN", "CONNECTION_ADMIN", "PROCESS", "XA_RECOVER_ADMIN"]);
    }
}

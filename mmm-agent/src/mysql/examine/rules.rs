//! The rules about one server's settings: what is looked at, what is right, and what to do when it is not. Pure.
//!
//! A cure is written so that it can be copied: statements first, then what belongs into the server's own file so that it
//! is still so after a restart ([`FILE`]). What differs between hosts is judged by the monitor, not here.

use super::super::dialect::{Dialect, is_on};
use super::super::session::Fields;
use super::Look;
use mmm_common::examine::{Finding, Severity, Subject};
use std::time::Duration;

/// Before the lines for the server's configuration.
pub(super) const FILE: &str = "my.cnf [mysqld]: ";
const RESTART: &str = "; restart the server";
const DAY_S: u64 = 86_400;

pub(super) fn judge(look: &Look) -> Vec<Finding> {
    let mut findings = vec![
        log_bin(look),
        log_slave_updates(look),
        server_id(look),
        gtid(look),
        read_only(look),
        binlog_format(look),
        binlog_retention(look),
        durability(look),
        slave_net_timeout(look),
        skip_errors(look),
        event_scheduler(look),
        max_connections(look),
        clone(look),
    ];
    match look.dialect {
        Dialect::MariaDb => {
            findings.push(gtid_strict_mode(look));
            if look.master {
                findings.push(init_rpl_role(look));
            }
        }
        Dialect::MySql => findings.push(relay_log_recovery(look)),
    }
    if look.master || look.config.cluster.semisync_slaves {
        findings.extend(semisync(look));
    }
    if let Some(status) = &look.status {
        findings.extend([threads(look, status), filters(status)]);
        findings.extend(retries(look, status));
    }
    findings
}

/// A line in the file, and a restart.
fn in_file(line: &str) -> String {
    format!("{FILE}{line}{RESTART}")
}

/// At once, and in the file.
fn both(settings: &[(&str, &str)]) -> String {
    let now: String = settings.iter().map(|(name, value)| format!("SET GLOBAL {name}={value}; ")).collect();
    let lines: Vec<String> =
        settings.iter().map(|(name, value)| format!("{name}={}", value.trim_matches('\''))).collect();
    format!("{now}{FILE}{}", lines.join(", "))
}

/// A read-only server cannot note down in its own tables that it has a plugin.
fn plugins(look: &Look, plugins: &[(&str, &str)]) -> String {
    let lines: Vec<String> = plugins.iter().map(|(_, library)| format!("plugin_load_add={library}")).collect();
    if !look.writable {
        return in_file(&lines.join(", "));
    }
    let now: String =
        plugins.iter().map(|(name, library)| format!("INSTALL PLUGIN {name} SONAME '{library}'; ")).collect();
    format!("{now}{FILE}{}", lines.join(", "))
}

fn log_bin(look: &Look) -> Finding {
    if look.variables.is_on(&["log_bin"]) {
        return Finding::ok(Subject::LogBin, "log_bin", "ON");
    }
    let found = "OFF: nobody can replicate from this host";
    Finding::bad(Severity::Error, Subject::LogBin, "log_bin", found, in_file("log_bin=mysql-bin"))
}

fn log_slave_updates(look: &Look) -> Finding {
    let names = ["log_replica_updates", "log_slave_updates"];
    let name = look.variables.first(&names).map_or(names[1], |(name, _)| name);
    if look.variables.is_on(&names) {
        return Finding::ok(Subject::LogSlaveUpdates, name, "ON");
    }
    let found = "OFF: what this host replicates is missing for those who follow it after a failover";
    Finding::bad(Severity::Error, Subject::LogSlaveUpdates, name, found, in_file(&format!("{name}=ON")))
}

fn server_id(look: &Look) -> Finding {
    match look.variables.number("server_id") {
        Some(id @ 1..) => Finding::ok(Subject::ServerId, "server_id", id.to_string()),
        Some(0) | None => {
            let found = "0: it can neither replicate nor be replicated from";
            let cure = both(&[("server_id", "<a number that no other server has>")]);
            Finding::bad(Severity::Error, Subject::ServerId, "server_id", found, cure)
        }
    }
}

fn gtid(look: &Look) -> Finding {
    let bad = |severity, tried: &str, found: String, cure: &str| {
        Finding::bad(severity, Subject::Gtid, tried, format!("{found}: only planned moves, and only in step"), cure)
    };
    let column = |names: &[&str]| look.status.as_ref().and_then(|row| row.text(names).ok()).unwrap_or_default();
    match look.dialect {
        Dialect::MariaDb => match (look.status.is_some(), column(&["Using_Gtid"])) {
            (false, _) => Finding::ok(Subject::Gtid, "Using_Gtid", "no replication is set up here"),
            (true, "Slave_Pos") => Finding::ok(Subject::Gtid, "Using_Gtid", "Slave_Pos"),
            (true, "Current_Pos") => Finding::bad(
                Severity::Warning,
                Subject::Gtid,
                "Using_Gtid",
                "Current_Pos: this host's own extra transactions decide where it goes on",
                "STOP SLAVE; CHANGE MASTER TO MASTER_USE_GTID=slave_pos; START SLAVE",
            ),
            (true, other) => bad(
                Severity::Error,
                "Using_Gtid",
                format!("'{other}', file and position"),
                // Throws the relay log away, and the source sends it again.
                "STOP SLAVE; CHANGE MASTER TO MASTER_USE_GTID=slave_pos; START SLAVE",
            ),
        },
        Dialect::MySql => {
            let (mode, strict) = (look.variables.text("gtid_mode"), look.variables.text("enforce_gtid_consistency"));
            let tried = "gtid_mode, enforce_gtid_consistency, Auto_Position";
            if mode != "ON" || strict != "ON" {
                let cure = in_file("gtid_mode=ON, enforce_gtid_consistency=ON");
                bad(Severity::Error, tried, format!("gtid_mode is {mode}, enforce_gtid_consistency {strict}"), &cure)
            } else if look.status.is_some() && column(&["Auto_Position"]) != "1" {
                let cure = "STOP REPLICA; CHANGE REPLICATION SOURCE TO SOURCE_AUTO_POSITION=1; START REPLICA";
                bad(Severity::Error, tried, "Auto_Position is 0, file and position".to_owned(), cure)
            } else {
                Finding::ok(Subject::Gtid, tried, "ON")
            }
        }
    }
}

fn gtid_strict_mode(look: &Look) -> Finding {
    let name = "gtid_strict_mode";
    if look.variables.is_on(&[name]) {
        return Finding::ok(Subject::GtidStrictMode, name, "ON");
    }
    let found = "OFF: histories can part without an error";
    Finding::bad(Severity::Error, Subject::GtidStrictMode, name, found, both(&[(name, "1")]))
}

/// A server that comes up writable takes writes before its agent has seen it.
fn read_only(look: &Look) -> Finding {
    let tried = "whether the server comes up read-only (its files and its command line)";
    let subject = Subject::ReadOnly;
    // MySQL's super_read_only brings read_only with it, and keeps out administrators too.
    let line = match look.dialect {
        Dialect::MariaDb => "read_only=1",
        Dialect::MySql => "super_read_only=1",
    };
    let missing = |found: String| Finding::bad(Severity::Error, subject, tried, found, in_file(line));
    let names = ["super_read_only", "read_only"];
    let persisted = names.iter().find_map(|name| Some((*name, look.persisted.get(*name)?)));
    match (persisted, &look.options) {
        (Some((name, value)), _) if is_on(value) => {
            Finding::ok(subject, tried, format!("{name}={value} in mysqld-auto.cnf"))
        }
        (Some((name, value)), _) => {
            let found = format!("mysqld-auto.cnf has {name}={value}, which counts more than my.cnf");
            Finding::bad(Severity::Error, subject, tried, found, format!("RESET PERSIST {name}; {}", in_file(line)))
        }
        (None, Ok(options)) => {
            match names.iter().find_map(|name| options.get(name).filter(|(value, _)| is_on(value))) {
                Some((value, place)) => Finding::ok(subject, tried, format!("read_only={value} in {place}")),
                None => match options.get("read_only") {
                    Some((value, place)) => missing(format!("read_only={value} in {place}: it comes up writable")),
                    None => missing("read_only is not set there: it comes up writable".to_owned()),
                },
            }
        }
        (None, Err(why)) => match look.origin.as_deref() {
            Some("CONFIG" | "COMMAND-LINE" | "GLOBAL" | "SERVER" | "EXPLICIT" | "EXTRA" | "COMMAND_LINE")
                if !look.writable =>
            {
                Finding::ok(subject, tried, "it came up so, and has not been changed since")
            }
            Some("COMPILE-TIME" | "COMPILED") => missing("it came up writable, without a word about it".to_owned()),
            Some(_) | None => {
                let cure = format!("make sure of it: {FILE}{line}; or let mmm_agentd read the server's files");
                Finding::bad(Severity::Notice, subject, tried, format!("not known: {why}"), cure)
            }
        },
    }
}

fn binlog_format(look: &Look) -> Finding {
    let subject = Subject::BinlogFormat;
    // Newer servers know nothing but ROW, and have no such setting.
    let format = look.variables.first(&["binlog_format"]).map_or("ROW", |(_, format)| format);
    let image = look.variables.first(&["binlog_row_image"]).map_or("FULL", |(_, image)| image);
    if !format.eq_ignore_ascii_case("ROW") {
        let found = format!("{format}: a statement can have another effect on another host");
        return Finding::bad(Severity::Warning, subject, "binlog_format", found, both(&[("binlog_format", "ROW")]));
    }
    if !image.eq_ignore_ascii_case("FULL") {
        let found = format!("{image}: lost transactions cannot be undone by their rows");
        return Finding::bad(
            Severity::Notice,
            subject,
            "binlog_row_image",
            found,
            both(&[("binlog_row_image", "FULL")]),
        );
    }
    Finding::ok(subject, "binlog_format, binlog_row_image", format!("{format}, {image}"))
}

fn binlog_retention(look: &Look) -> Finding {
    let (subject, name) = (Subject::BinlogRetention, "binlog_expire_logs_seconds");
    let variables = &look.variables;
    let kept_on_purpose = variables.first(&["binlog_expire_logs_auto_purge"]).is_some_and(|(_, on)| !is_on(on));
    let days = variables.text("expire_logs_days").parse::<f64>().unwrap_or(0.0);
    let seconds = variables.number(name).filter(|s| *s > 0).or((days > 0.0).then_some((days * DAY_S as f64) as u64));
    let known = variables.first(&[name]).is_some();
    let cure = |days: u64| {
        if known {
            both(&[(name, &(days * DAY_S).to_string())])
        } else {
            both(&[("expire_logs_days", &days.to_string())])
        }
    };
    match seconds.filter(|_| !kept_on_purpose) {
        None => {
            let found = "binary logs are never removed: they fill the disk";
            Finding::bad(Severity::Notice, subject, name, found, cure(7))
        }
        Some(s) if s < DAY_S => {
            let found = format!("{s} s: a host that is away for longer must be copied anew");
            Finding::bad(Severity::Warning, subject, name, found, cure(7))
        }
        Some(s) => Finding::ok(subject, name, format!("{s} s")),
    }
}

fn durability(look: &Look) -> Finding {
    let names = ["sync_binlog", "innodb_flush_log_at_trx_commit"];
    let tried = "sync_binlog, innodb_flush_log_at_trx_commit";
    let wrong: Vec<(&str, &str)> =
        names.iter().filter(|name| look.variables.number(name) != Some(1)).map(|name| (*name, "1")).collect();
    if wrong.is_empty() {
        return Finding::ok(Subject::Durability, tried, "1, 1");
    }
    let is: Vec<String> = wrong.iter().map(|(name, _)| format!("{name}={}", look.variables.text(name))).collect();
    let found = format!("{}: a crash of the machine loses acknowledged writes of this host", is.join(", "));
    Finding::bad(Severity::Warning, Subject::Durability, tried, found, both(&wrong))
}

fn slave_net_timeout(look: &Look) -> Finding {
    const LONGEST_S: u64 = 10;
    let names = ["replica_net_timeout", "slave_net_timeout"];
    let (name, value) = look.variables.first(&names).unwrap_or((names[1], ""));
    match value.parse::<u64>() {
        Ok(s) if s <= LONGEST_S => Finding::ok(Subject::SlaveNetTimeout, name, format!("{s} s")),
        Ok(_) | Err(_) => {
            let found = format!("{value} s: for so long, replication from a host that is gone looks whole");
            Finding::bad(Severity::Warning, Subject::SlaveNetTimeout, name, found, both(&[(name, "4")]))
        }
    }
}

fn skip_errors(look: &Look) -> Finding {
    let skipped = ["replica_skip_errors", "slave_skip_errors"];
    let modes = ["replica_exec_mode", "slave_exec_mode"];
    let (skip, value) = look.variables.first(&skipped).unwrap_or((skipped[1], "OFF"));
    let (mode, is) = look.variables.first(&modes).unwrap_or((modes[1], "STRICT"));
    let tried = format!("{skip}, {mode}");
    let subject = Subject::SkipErrors;
    if !value.eq_ignore_ascii_case("OFF") && !value.is_empty() {
        let found = format!("{skip}={value}: rows that differ from the master's go unnoticed");
        Finding::bad(Severity::Warning, subject, tried, found, in_file(&format!("{skip}=OFF")))
    } else if !is.eq_ignore_ascii_case("STRICT") {
        let found = format!("{mode}={is}: rows that differ from the master's go unnoticed");
        Finding::bad(Severity::Warning, subject, tried, found, both(&[(mode, "STRICT")]))
    } else {
        Finding::ok(subject, tried, format!("{value}, {is}"))
    }
}

/// Events of the active master come to its replicas as SLAVESIDE_DISABLED; one that is enabled here writes here.
fn event_scheduler(look: &Look) -> Finding {
    let (subject, tried) = (Subject::EventScheduler, "event_scheduler, and enabled events that the agent can see");
    let on = look.variables.text("event_scheduler");
    if on.eq_ignore_ascii_case("ON") && look.events > 0 && !look.writable {
        let found = format!("it runs {} events here, and only the active master should run any", look.events);
        let cure = both(&[("event_scheduler", "OFF")]);
        return Finding::bad(Severity::Warning, subject, tried, found, cure);
    }
    Finding::ok(subject, tried, format!("{on}, {} events", look.events))
}

fn max_connections(look: &Look) -> Finding {
    let (subject, tried) = (Subject::MaxConnections, "Threads_connected and max_connections");
    let (now, most) = (look.connections, look.variables.number("max_connections").unwrap_or(0));
    if now * 10 < most * 8 {
        return Finding::ok(subject, tried, format!("{now} of {most}"));
    }
    let found = format!("{now} of {most}: nearly full, and clients of another host may come over");
    Finding::bad(Severity::Warning, subject, tried, found, both(&[("max_connections", &(most * 2).to_string())]))
}

fn clone(look: &Look) -> Finding {
    match look.dialect {
        Dialect::MySql => {
            let tried = "the clone plugin";
            if look.plugins.contains("clone") {
                return Finding::ok(Subject::Clone, tried, "ACTIVE");
            }
            let cure = plugins(look, &[("clone", "mysql_clone.so")]);
            Finding::bad(Severity::Warning, Subject::Clone, tried, "not installed: reclone cannot work", cure)
        }
        Dialect::MariaDb => {
            let tried = "mariadb-backup and mbstream in PATH";
            if look.missing_tools.is_empty() {
                return Finding::ok(Subject::Clone, tried, "installed");
            }
            let found = format!("without {}: reclone cannot work", look.missing_tools.join(" and "));
            Finding::bad(Severity::Warning, Subject::Clone, tried, found, "apt-get install mariadb-backup")
        }
    }
}

fn init_rpl_role(look: &Look) -> Finding {
    let (subject, tried) = (Subject::InitRplRole, "init_rpl_role in the server's files and on its command line");
    let cure = in_file("init_rpl_role=SLAVE");
    match &look.options {
        Ok(options) => match options.get("init_rpl_role") {
            Some((role, place)) if role.eq_ignore_ascii_case("SLAVE") || role == "1" => {
                Finding::ok(subject, tried, format!("SLAVE in {place}"))
            }
            Some(_) | None => {
                let found =
                    "not SLAVE: after a crash this host keeps what nobody has acknowledged, and must be copied anew";
                Finding::bad(Severity::Warning, subject, tried, found, cure)
            }
        },
        Err(why) => Finding::bad(Severity::Notice, subject, tried, format!("not known: {why}"), cure),
    }
}

fn relay_log_recovery(look: &Look) -> Finding {
    let name = "relay_log_recovery";
    if look.variables.is_on(&[name]) {
        return Finding::ok(Subject::RelayLogRecovery, name, "ON");
    }
    let found = "OFF: a relay log that a crash has damaged stops replication";
    Finding::bad(Severity::Warning, Subject::RelayLogRecovery, name, found, in_file("relay_log_recovery=ON"))
}

/// The replica side, the wait point and the timeout. The source side is the agent's business: on at the active master.
fn semisync(look: &Look) -> Vec<Finding> {
    let subject = Subject::Semisync;
    let severity = if look.config.cluster.require_semisync { Severity::Error } else { Severity::Warning };
    let variables = &look.variables;
    let sources = ["rpl_semi_sync_source_enabled", "rpl_semi_sync_master_enabled"];
    let replicas = ["rpl_semi_sync_replica_enabled", "rpl_semi_sync_slave_enabled"];
    let (Some(_), Some((replica, acknowledges))) = (variables.first(&sources), variables.first(&replicas)) else {
        let both = [("rpl_semi_sync_source", "semisync_source.so"), ("rpl_semi_sync_replica", "semisync_replica.so")];
        let cure = plugins(look, &both);
        let found = "the plugins are not installed: a failover may lose acknowledged writes";
        return vec![Finding::bad(severity, subject, "the semi-sync plugins", found, cure)];
    };
    let mut findings = vec![if is_on(acknowledges) {
        Finding::ok(subject, replica, "ON")
    } else {
        let found = "OFF: this host acknowledges nothing, so a failover may lose acknowledged writes";
        let again = match (look.dialect, look.status.is_some()) {
            (_, false) => "",
            (Dialect::MariaDb, true) => "STOP SLAVE IO_THREAD; START SLAVE IO_THREAD; ",
            (Dialect::MySql, true) => "STOP REPLICA IO_THREAD; START REPLICA IO_THREAD; ",
        };
        let cure = format!("SET GLOBAL {replica}=1; {again}{FILE}{replica}=1");
        Finding::bad(severity, subject, replica, found, cure)
    }];
    if !look.master {
        return findings;
    }
    let points = ["rpl_semi_sync_source_wait_point", "rpl_semi_sync_master_wait_point"];
    let (point, value) = variables.first(&points).unwrap_or((points[1], ""));
    findings.push(if value.eq_ignore_ascii_case("AFTER_SYNC") {
        Finding::ok(subject, point, value)
    } else {
        let found = format!("{value}: others see a commit before a replica has it, and lose it in a failover");
        Finding::bad(severity, subject, point, found, both(&[(point, "'AFTER_SYNC'")]))
    });
    let timeouts = ["rpl_semi_sync_source_timeout", "rpl_semi_sync_master_timeout"];
    let (timeout, value) = variables.first(&timeouts).unwrap_or((timeouts[1], ""));
    let needed = look.config.cluster.fenced_within();
    let enough = value.parse().is_ok_and(|ms: u64| Duration::from_millis(ms) > needed);
    findings.push(if enough {
        Finding::ok(subject, timeout, format!("{value} ms"))
    } else {
        let found = format!(
            "{value} ms, not longer than {} ms (lease_ttl + 1.5 s + 2 s): an isolated master acknowledges alone before it \
             is fenced",
            needed.as_millis()
        );
        let wanted = needed.max(Duration::from_secs(9)).as_secs() * 1000 + 1000;
        Finding::bad(severity, subject, timeout, found, both(&[(timeout, &wanted.to_string())]))
    });
    findings
}

/// That replication leads to the right host is for the monitor to say.
fn threads(look: &Look, status: &Fields) -> Finding {
    let (subject, tried) = (Subject::Replication, "the replication threads");
    let text = |names: &[&str]| status.text(names).unwrap_or_default().to_owned();
    let io = text(&["Replica_IO_Running", "Slave_IO_Running"]);
    let sql = text(&["Replica_SQL_Running", "Slave_SQL_Running"]);
    if io == "Yes" && sql == "Yes" {
        return Finding::ok(subject, tried, "both run");
    }
    if look.writable && look.dialect == Dialect::MariaDb && io == "No" && sql == "Yes" {
        return Finding::ok(subject, tried, "the active master fetches from nobody, as it is told to");
    }
    let errors: Vec<String> =
        ["Last_IO_Error", "Last_SQL_Error"].iter().map(|name| text(&[name])).filter(|e| !e.is_empty()).collect();
    let why = if errors.is_empty() { "no error is given".to_owned() } else { errors.join("; ") };
    // MariaDB throws its relay log away when the I/O thread starts while the SQL thread is stopped.
    let start = match (look.dialect, sql == "Yes") {
        (Dialect::MariaDb, true) => "START SLAVE IO_THREAD",
        (Dialect::MariaDb, false) => "START SLAVE SQL_THREAD; START SLAVE IO_THREAD",
        (Dialect::MySql, _) => "START REPLICA",
    };
    let cure = if io == "Connecting" && sql == "Yes" {
        "it tries again by itself; look at what is said of replication_user, and at the server that it follows"
            .to_owned()
    } else if errors.is_empty() {
        start.to_owned()
    } else {
        format!("remove the cause named there, then: {start}")
    };
    // The agent of a new active master has stopped it on purpose, until the old one has been compared.
    let severity = if look.writable { Severity::Warning } else { Severity::Error };
    Finding::bad(severity, subject, tried, format!("I/O thread: {io}, SQL thread: {sql} ({why})"), cure)
}

fn filters(status: &Fields) -> Finding {
    let names = [
        "Replicate_Do_DB",
        "Replicate_Ignore_DB",
        "Replicate_Do_Table",
        "Replicate_Ignore_Table",
        "Replicate_Wild_Do_Table",
        "Replicate_Wild_Ignore_Table",
    ];
    let set: Vec<String> = names
        .iter()
        .filter_map(|name| Some((name, status.text(&[name]).ok().filter(|value| !value.is_empty())?)))
        .map(|(name, value)| format!("{}={value}", name.to_lowercase()))
        .collect();
    if set.is_empty() {
        return Finding::ok(Subject::Filters, "replication filters", "none");
    }
    let found = format!("{}: what is filtered out is lost when this host becomes the writer", set.join(", "));
    let cure = "take the replicate_* lines out of my.cnf and restart the server, after copying it anew";
    Finding::bad(Severity::Warning, Subject::Filters, "replication filters", found, cure)
}

/// MySQL gives up after so many attempts, ten by default, and then the thread stays stopped.
fn retries(look: &Look, status: &Fields) -> Option<Finding> {
    const ENOUGH: u64 = 1000;
    if look.dialect == Dialect::MariaDb {
        return None;
    }
    let count = status.number(&["Source_Retry_Count", "Master_Retry_Count"]).ok()?;
    let tried = "Source_Retry_Count";
    Some(if count == 0 || count >= ENOUGH {
        Finding::ok(Subject::Replication, tried, count.to_string())
    } else {
        let found = format!("{count}: after so many attempts at a source that is away, replication stops for good");
        let cure = "STOP REPLICA IO_THREAD; CHANGE REPLICATION SOURCE TO SOURCE_RETRY_COUNT=86400; \
                    START REPLICA IO_THREAD";
        Finding::bad(Severity::Warning, Subject::Replication, tried, found, cure)
    })
}

//! Throwing this host's data away and copying another host's. MySQL's servers copy each other (the clone plugin);
//! MariaDB's data come as a backup stream from the other host's agent.
//!
//! Only on a host that holds no role address and is read-only. MariaDB: the old data stay until the new server has come
//! up and was looked at, and return when it has not. MySQL drops its data before the copy begins, so a failure says
//! exactly what is left.

use super::Work;
use super::extras::pairs;
use super::helper::{FILES, Helper, SERVER, next_answer};
use super::sql::{self, Dialect, Fields, Session, Trouble};
use super::undo::set_state;
use mmm_common::config::Host;
use mmm_common::gtid::Gtids;
use mmm_common::ids::HostName;
use mmm_common::wire::{FromDonor, MAX_LINE, PROTOCOL, ToDonor, to_line};
use mmm_helper::{Answer, Verb};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, sleep, timeout};

/// For the data themselves.
const COPY: Duration = Duration::from_secs(24 * 3600);
/// A stream that stands still for so long has broken.
const STANDSTILL: Duration = Duration::from_secs(360);
const CONNECT: Duration = Duration::from_secs(5);
/// From the request to the beginning of the stream.
const BEGIN: Duration = Duration::from_secs(70);
/// For a started server to take logins. Crash recovery is part of it.
const COME_UP: Duration = Duration::from_secs(600);
/// How long a server that could not be stopped may take no logins until it is started again: it may have ended late.
const START_AGAIN: Duration = Duration::from_secs(30);
/// A donor that nobody could log in to for so long has gone.
const DONOR_GONE: Duration = Duration::from_secs(20);
/// For a copy that was killed to end.
const KILLED: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(200);

pub(super) async fn reclone(work: &Work, from: &HostName) -> Result<(), String> {
    let Some(donor) = work.config.cluster.hosts.get(from) else {
        return Err(format!("[host.{from}] is not in the configuration"));
    };
    if *from == work.config.this {
        return Err("a host cannot be copied from itself".to_owned());
    }
    let helper = Helper::of(&work.config);
    let status = helper.status().await?;
    let mut theirs = Session::replication(donor)
        .await
        .map_err(|e| format!("{from} cannot be asked, as its user '{}': {e}", donor.replication_user))?;
    let mut own = Session::own(&work.config).await;
    if own.is_err() && status.users.is_empty() {
        // What is not running is not writable; whether it can run is not needed to copy MariaDB's data.
        work.no_addresses().await?;
        if theirs.dialect == Dialect::MySql {
            work.progress.step("starting the server, which has to run for a copy");
            helper.tell(Verb::Start, SERVER).await?;
            own = come_up(work, COME_UP).await;
        }
    }
    if let Ok(session) = &mut own {
        work.must_be_idle(session).await?;
        if session.dialect != theirs.dialect {
            return Err(format!("{from} is another kind of server"));
        }
    }
    match (theirs.dialect, own) {
        (Dialect::MariaDb, Ok(mut session)) => {
            data_are_in_datadir(&mut session, status.datadir.as_deref()).await?;
            drop(session);
            mariadb(work, from, donor, &helper, &mut theirs, status.cannot_receive).await
        }
        (Dialect::MariaDb, Err(_)) if status.users.is_empty() => {
            mariadb(work, from, donor, &helper, &mut theirs, status.cannot_receive).await
        }
        (Dialect::MySql, Ok(session)) => mysql(work, from, donor, &helper, &mut theirs, session).await,
        (Dialect::MariaDb | Dialect::MySql, Err(e)) => {
            Err(format!("it cannot be found out whether this host's server is read-only: {e}"))
        }
    }
}

/// A backup goes into one folder, so the server must have its data in one.
async fn data_are_in_datadir(session: &mut Session, configured: Option<&str>) -> Result<(), String> {
    let rows = session
        .rows(
            sql::ASK,
            "SELECT @@datadir AS datadir, @@innodb_data_home_dir AS innodb_data_home_dir, @@innodb_log_group_home_dir AS \
             innodb_log_group_home_dir, @@innodb_undo_directory AS innodb_undo_directory",
        )
        .await?;
    let row: Fields = rows.into_iter().next().unwrap_or_default();
    let same = |a: &str, b: &str| {
        let real = |p: &str| std::fs::canonicalize(p).unwrap_or_else(|_| p.trim_end_matches('/').into());
        real(a) == real(b)
    };
    let datadir = row.get("datadir").cloned().unwrap_or_default();
    match configured {
        Some(configured) if same(configured, &datadir) => {}
        Some(configured) => {
            return Err(format!("datadir is '{configured}' in mmm_agent.toml, and the server's is '{datadir}'"));
        }
        None => {
            return Err(format!("datadir is not configured; set datadir = \"{datadir}\" in [agent] of mmm_agent.toml"));
        }
    }
    match row
        .iter()
        .find(|(name, at)| *name != "datadir" && !["", ".", "./"].contains(&at.as_str()) && !same(at, &datadir))
    {
        Some((name, at)) => {
            Err(format!("{name} is '{at}': a copy can only be put in place when all is in the datadir"))
        }
        None => Ok(()),
    }
}

async fn mariadb(
    work: &Work,
    from: &HostName,
    donor: &Host,
    helper: &Helper,
    theirs: &mut Session,
    cannot_receive: Option<String>,
) -> Result<(), String> {
    if let Some(why) = cannot_receive {
        return Err(why);
    }
    let untouched = |why: String| format!("{why}; nothing was changed");
    let before = theirs.one("SELECT @@GLOBAL.gtid_binlog_state").await?;
    let position = receive(work, from, donor, helper).await.map_err(untouched)?;
    let after = theirs.one("SELECT @@GLOBAL.gtid_binlog_state").await.unwrap_or_else(|_| before.clone());
    let state = state_at(&position, &before, &after).map_err(untouched)?;

    work.progress.step("stopping the server");
    // Time has passed.
    work.no_addresses().await.map_err(untouched)?;
    if let Err(why) = helper.tell(Verb::Stop, SERVER).await {
        let now = up_again(work, helper).await;
        return Err(format!("the server could not be stopped: {why}; its data are untouched, and {now}"));
    }
    let placed = async {
        helper.tell(Verb::Swap, FILES).await?;
        work.progress.step("starting the server with the copy");
        helper.tell(Verb::Start, SERVER).await?;
        let mut session = come_up(work, COME_UP).await.map_err(|e| format!("it takes no login: {e}"))?;
        work.progress.step("setting the position of the copy");
        settle_mariadb(&mut session, &state).await
    };
    match placed.await {
        Ok(()) => {
            // The copy is good: that some of the old data is left is no failure.
            if let Err(why) = helper.tell(Verb::Discard, FILES).await {
                tracing::warn!("the old data were not deleted: {why}");
            }
            Ok(())
        }
        Err(why) => Err(put_back(helper, why).await),
    }
}

/// After a stop that failed: the server may have ended, be about to, or go on. Started until it takes a login; what has
/// come of it, in words.
async fn up_again(work: &Work, helper: &Helper) -> String {
    work.progress.step("starting the server again");
    let until = Instant::now() + COME_UP;
    loop {
        let started = helper.tell(Verb::Start, SERVER).await;
        match (come_up(work, START_AGAIN).await, started) {
            (Ok(_), _) => return "the server runs".to_owned(),
            (Err(_), Err(why)) => return format!("the server does not run and could not be started: {why}; start it"),
            (Err(e), Ok(())) if is_denied(&e) || Instant::now() >= until => {
                return format!("the server was started and takes no login: {e}");
            }
            (Err(_), Ok(())) => {}
        }
    }
}

async fn put_back(helper: &Helper, why: String) -> String {
    let back = async {
        if helper.tell(Verb::Stop, SERVER).await.is_err() {
            helper.tell(Verb::Kill, SERVER).await?;
        }
        let restored = match helper.tell(Verb::Restore, FILES).await {
            Ok(()) => true,
            // After a swap that did not take place nothing is kept aside, and the datadir is the old one.
            Err(e) if e.contains("nothing is kept") => false,
            Err(e) => return Err(e),
        };
        helper.tell(Verb::Start, SERVER).await?;
        // Only now, and no failure: the server comes first.
        if restored && let Err(e) = helper.tell(Verb::Discard, FILES).await {
            tracing::warn!("the copy that could not be used was not deleted: {e}");
        }
        Ok(())
    };
    match back.await {
        Ok(()) => {
            format!("the copy could not be used: {why}; the old data are back in place and the server is started")
        }
        Err(e) => format!(
            "the copy could not be used: {why}; and the old data could not be put back: {e}; they are beside the datadir \
             under the name of the datadir with .mmm-old-… after it"
        ),
    }
}

/// From the other agent to this host's helper, which unpacks it. The position of the copy.
async fn receive(work: &Work, from: &HostName, donor: &Host, helper: &Helper) -> Result<String, String> {
    let at = |why: String| format!("the agent of {from} at {}: {why}", SocketAddr::new(donor.ip, donor.agent_port));
    work.progress.step(&format!("asking {from} for its data"));
    let (mut stream, expected) = match timeout(BEGIN, begin(work, from, donor)).await {
        Ok(begun) => begun.map_err(at)?,
        Err(_) => return Err(at(format!("nothing came within {} s", BEGIN.as_secs()))),
    };
    let mut asked = helper.ask(&Verb::Receive { expected_bytes: expected }).await?;
    match asked.answer(Some(&work.progress)).await? {
        Answer::Go { .. } => {}
        other @ (Answer::Step { .. }
        | Answer::Status(_)
        | Answer::Received { .. }
        | Answer::Done
        | Answer::Failed { .. }) => return Err(format!("mmm_helperd answered {other:?}")),
    }
    let (mut piece, mut bytes, mut open) = (vec![0; 256 * 1024], 0u64, true);
    let until = Instant::now() + COPY;
    // Both at once: the helper may give up while data still come. Dropping this ends the helper's work.
    let (answers, to) = (&mut asked.from, &mut asked.to);
    let answer = async { next_answer(answers, Some(&work.progress)).await };
    tokio::pin!(answer);
    let received = loop {
        let read = async {
            match timeout(STANDSTILL, stream.read(&mut piece)).await {
                Ok(Ok(n)) => n,
                // The helper sees that the end is missing, and says how much had come.
                Ok(Err(_)) | Err(_) => 0,
            }
        };
        tokio::select! {
            biased;
            answer = &mut answer => break answer?,
            () = tokio::time::sleep_until(until) => return Err("the copy took longer than a day".to_owned()),
            n = read, if open => {
                let given = if n == 0 { to.shutdown().await } else { to.write_all(&piece[..n]).await };
                // It has given up: its answer says why.
                open = n > 0 && given.is_ok();
                bytes += n as u64;
                work.progress.now_and_then(|| {
                    format!("copying from {from}: {} of about {} MiB", bytes >> 20, expected >> 20)
                });
            }
        }
    };
    match received {
        Answer::Received { gtid_position } => Ok(gtid_position),
        other
        @ (Answer::Step { .. } | Answer::Status(_) | Answer::Go { .. } | Answer::Done | Answer::Failed { .. }) => {
            Err(format!("mmm_helperd answered {other:?}"))
        }
    }
}

async fn begin(work: &Work, from: &HostName, donor: &Host) -> Result<(BufReader<TcpStream>, u64), String> {
    let own = sql::own_host(&work.config)?;
    let at = SocketAddr::new(donor.ip, donor.agent_port);
    let text = |e: std::io::Error| e.to_string();
    let socket = if at.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.map_err(text)?;
    // The other side knows this host by its own address, never by a role's.
    socket.bind(SocketAddr::new(own.ip, 0)).map_err(|e| format!("from {}: {e}", own.ip))?;
    let stream = match timeout(CONNECT, socket.connect(at)).await {
        Ok(stream) => stream.map_err(text)?,
        Err(_) => return Err("no connection".to_owned()),
    };
    let alive = socket2::TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(10));
    socket2::SockRef::from(&stream).set_tcp_keepalive(&alive).map_err(text)?;
    let mut stream = BufReader::with_capacity(256 * 1024, stream);
    let hello = ToDonor::Donate { protocol: PROTOCOL, host: from.clone(), from: work.config.this.clone() };
    let hello = to_line(&hello).map_err(|e| e.to_string())?;
    stream.get_mut().write_all(hello.as_bytes()).await.map_err(text)?;
    let mut line = String::new();
    (&mut stream).take(MAX_LINE as u64).read_line(&mut line).await.map_err(text)?;
    match serde_json::from_str(&line) {
        Ok(FromDonor::Donating { bytes }) => Ok((stream, bytes)),
        Ok(FromDonor::Refused { why }) => Err(why),
        Err(_) if line.is_empty() => Err("it closed the connection without a word".to_owned()),
        Err(e) => Err(format!("the answer is not understood ({e}); are both agents of one version?")),
    }
}

/// The donor's whole state at the position of the copy. A backup notes only the newest transaction of each domain; of
/// the other servers of a domain it is known what the donor had before and after. As numbers only grow within a domain,
/// what had not passed the position afterwards was there then; else what was there before is.
fn state_at(position: &str, before: &str, after: &str) -> Result<BTreeMap<(u64, u64), u64>, String> {
    let read = |text: &str| Ok::<_, String>(pairs(&Gtids::MariaDb(text.parse()?)));
    let (position, before, after) = (read(position)?, read(before)?, read(after)?);
    let mut state = BTreeMap::new();
    for ((domain, server), at_the_end) in &after {
        let Some(newest) = position.iter().filter(|((d, _), _)| d == domain).map(|(_, seq)| *seq).max() else {
            continue;
        };
        let known = if *at_the_end <= newest { Some(at_the_end) } else { before.get(&(*domain, *server)) };
        if let Some(seq) = known.filter(|seq| **seq <= newest) {
            state.insert((*domain, *server), *seq);
        }
    }
    state.extend(position);
    Ok(state)
}

/// Replication forgets whom the donor followed, and the GTID state becomes that of the copy.
async fn settle_mariadb(session: &mut Session, state: &BTreeMap<(u64, u64), u64>) -> Result<(), String> {
    session.run("SET GLOBAL read_only=1").await?;
    session.run("STOP ALL SLAVES").await?;
    session.run("RESET SLAVE ALL").await?;
    session.run("RESET MASTER").await?;
    set_state(session, state).await?;
    let executed = pairs(&session.executed().await?);
    if executed != *state {
        return Err(format!("the GTID state was set to {state:?} and reads back as {executed:?}"));
    }
    if !session.is_read_only().await? {
        return Err("read_only was set, and reads back as off".to_owned());
    }
    Ok(())
}

/// Tries to log in until it works.
async fn come_up(work: &Work, limit: Duration) -> Result<Session, Trouble> {
    let until = Instant::now() + limit;
    loop {
        match Session::own(&work.config).await {
            Ok(session) => return Ok(session),
            Err(e) if is_denied(&e) || Instant::now() >= until => return Err(e),
            Err(_) => sleep(LOOK).await,
        }
    }
}

/// The server is up, and that does not change by itself.
fn is_denied(e: &Trouble) -> bool {
    matches!(e.code, Some(1044 | 1045 | 1698))
}

async fn mysql(
    work: &Work,
    from: &HostName,
    donor: &Host,
    helper: &Helper,
    theirs: &mut Session,
    mut own: Session,
) -> Result<(), String> {
    let untouched = |why: String| format!("{why}; nothing was changed");
    let expected = theirs.executed().await?;
    prepare_mysql(&mut own, donor).await.map_err(untouched)?;
    let tables = user_tables(&mut own).await?;
    // Super_read_only makes the server fail after it has begun to drop its data; read_only stays on.
    own.run("SET GLOBAL super_read_only=0").await?;
    own.run("SET GLOBAL read_only=1").await?;
    work.progress.step(&format!("copying from {from}"));
    let clone = format!(
        "CLONE INSTANCE FROM {}@{}:{} IDENTIFIED BY {}",
        sql::quote(&donor.replication_user),
        sql::quote(&donor.ip.to_string()),
        donor.mysql_port,
        sql::quote(&donor.replication_password.0),
    );
    let id = own.one("SELECT CONNECTION_ID()").await?;
    let cloned = {
        let cloning = own.rows(COPY, &clone);
        let watching = async {
            // Telling how it goes ends where there is nothing to tell; that must not end the watch on the donor.
            let telling = async {
                watch_clone(work, from).await;
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = telling => {}
                () = end_without_donor(work, donor, &id) => {}
            }
        };
        tokio::pin!(cloning);
        tokio::pin!(watching);
        tokio::select! {
            cloned = &mut cloning => cloned,
            () = &mut watching => match timeout(KILLED, cloning).await {
                Ok(cloned) => cloned,
                Err(_) => return Err(format!(
                    "{from} is gone, and the copy cannot be ended; restart this host's server, whose data may be gone, and \
                     order the copy again"
                )),
            },
        }
    };
    match cloned {
        Err(e) if e.code.is_none() && Session::replication(donor).await.is_err() => {
            return Err(clone_failed(work, from, donor, tables, &e).await);
        }
        // 3707: it cannot restart itself. A lost connection: it can, or it has died; what comes up tells.
        Ok(_) | Err(Trouble { code: Some(3707) | None, .. }) => {}
        Err(e) => return Err(clone_failed(work, from, donor, tables, &e).await),
    }
    work.progress.step("starting the server with the copy");
    ended(work, helper).await?;
    helper.tell(Verb::Start, SERVER).await.map_err(|why| {
        format!("the copy has come, and the server is down and could not be started: {why}; start it")
    })?;
    let mut session = come_up(work, COME_UP).await.map_err(|e| {
        format!(
            "the copy is in place, but the server takes no login of this agent: {e}; its users are those of {from} now"
        )
    })?;
    settle_mysql(&mut session, &expected, from).await.map_err(|why| {
        format!("the copy is in place and the server runs, but its replication could not be settled: {why}")
    })
}

/// What makes a clone fail is found out before anything is dropped.
async fn prepare_mysql(own: &mut Session, donor: &Host) -> Result<(), String> {
    has_clone_plugin(own, "this host").await?;
    let grants: String = own.rows(sql::ASK, "SHOW GRANTS").await?.into_iter().flat_map(BTreeMap::into_values).collect();
    if let Some(missing) = ["CLONE_ADMIN", "RELOAD"].into_iter().find(|needed| !grants.contains(needed)) {
        return Err(format!("the agent lacks the privilege {missing}: {} its user", sql::MYSQL_GRANTS));
    }
    let donors = format!("{}:{}", donor.ip, donor.mysql_port);
    own.run(&format!("SET GLOBAL clone_valid_donor_list={}", sql::quote(&donors))).await?;
    // As the user that will be used; the server asks for it only after it has begun.
    let mut theirs = Session::replication(donor).await?;
    has_clone_plugin(&mut theirs, "the other host").await?;
    let grants: String =
        theirs.rows(sql::ASK, "SHOW GRANTS").await?.into_iter().flat_map(BTreeMap::into_values).collect();
    if !grants.contains("BACKUP_ADMIN") {
        return Err(format!(
            "the user '{}' of the other host lacks a privilege: GRANT BACKUP_ADMIN ON *.* TO it",
            donor.replication_user
        ));
    }
    Ok(())
}

async fn has_clone_plugin(session: &mut Session, on: &str) -> Result<(), String> {
    let rows = session.rows(sql::ASK, "SHOW PLUGINS").await?;
    let active = rows
        .iter()
        .any(|row| row.get("name").is_some_and(|n| n == "clone") && row.get("status").is_some_and(|s| s == "ACTIVE"));
    if active {
        return Ok(());
    }
    Err(format!(
        "{on} has no clone plugin: put plugin-load-add=mysql_clone.so into the configuration file of all servers, and INSTALL \
         PLUGIN clone SONAME 'mysql_clone.so' on each"
    ))
}

async fn user_tables(session: &mut Session) -> Result<u64, String> {
    let count = session
        .one(
            "SELECT COUNT(*) FROM information_schema.INNODB_TABLES WHERE NAME NOT LIKE 'mysql/%' AND NAME NOT LIKE 'sys/%' \
             AND NAME LIKE '%/%'",
        )
        .await?;
    count.parse().map_err(|_| format!("the number of tables is not a number: {count:?}"))
}

/// Without performance_schema, or the right to read it, there is nothing to tell.
async fn watch_clone(work: &Work, from: &HostName) {
    let sql = "SELECT SUM(data) AS data, SUM(estimate) AS estimate FROM performance_schema.clone_progress";
    let Ok(mut session) = Session::own(&work.config).await else { return };
    loop {
        sleep(Duration::from_secs(1)).await;
        let Ok(rows) = session.rows(sql::ASK, sql).await else { return };
        let number = |name: &str| rows.first()?.get(name)?.parse::<f64>().ok();
        if let (Some(data), Some(estimate)) = (number("data"), number("estimate")) {
            let mib = |n: f64| (n / f64::from(1 << 20)).round();
            work.progress.step(&format!("copying from {from}: {} of about {} MiB", mib(data), mib(estimate)));
        }
    }
}

/// The server waits long for a donor that has died (9.7: more than two minutes, whatever its settings say). Ends the copy, whose connection this is, once it is gone.
async fn end_without_donor(work: &Work, donor: &Host, id: &str) {
    let mut seen = Instant::now();
    while seen.elapsed() < DONOR_GONE {
        sleep(Duration::from_secs(1)).await;
        if Session::replication(donor).await.is_ok() {
            seen = Instant::now();
        }
    }
    match Session::own(&work.config).await {
        Ok(mut session) => {
            if let Err(e) = session.run(&format!("KILL {id}")).await {
                tracing::warn!("the copy could not be ended: {e}");
            }
        }
        Err(e) => tracing::warn!("the copy could not be ended: {e}"),
    }
}

async fn clone_failed(work: &Work, from: &HostName, donor: &Host, tables: u64, e: &Trouble) -> String {
    let hint = match e.code {
        Some(3862 | 3870) => format!(
            " (on {from}: INSTALL PLUGIN clone SONAME 'mysql_clone.so', and GRANT BACKUP_ADMIN ON *.* TO {})",
            donor.replication_user
        ),
        Some(_) | None => String::new(),
    };
    let state = match come_up(work, Duration::from_secs(30)).await {
        Ok(mut session) => {
            let left = user_tables(&mut session).await;
            // As it was before.
            let _ = session.run("SET GLOBAL super_read_only=1").await;
            match left {
                Ok(left) if left == tables => "its data are untouched".to_owned(),
                Ok(left) => format!(
                    "the server runs, but of its {tables} tables {left} are left: it had begun to drop them; order the \
                     copy again when the cause is gone"
                ),
                Err(why) => format!("what is left of its data is not known ({why})"),
            }
        }
        Err(why) => {
            format!("the server takes no login any more ({why}), and its data may be gone; order the copy again")
        }
    };
    format!("copying from {from}: {e}{hint}; {state}")
}

/// Until the server of before has ended, or a new one is there.
async fn ended(work: &Work, helper: &Helper) -> Result<(), String> {
    let until = Instant::now() + SERVER;
    while Instant::now() < until {
        let users = helper.status().await?.users;
        let host = sql::own_host(&work.config)?;
        let refused = TcpStream::connect(SocketAddr::new(host.ip, host.mysql_port)).await.is_err();
        if users.is_empty() && refused {
            return Ok(());
        }
        // It can restart itself under systemd: then it is up again.
        if let Ok(mut session) = Session::own(&work.config).await
            && session
                .one("SELECT COUNT(*) FROM information_schema.PROCESSLIST WHERE INFO LIKE 'CLONE %'")
                .await
                .is_ok_and(|n| n == "0")
            && session.one("SHOW GLOBAL STATUS LIKE 'Uptime'").await.is_ok()
        {
            return Ok(());
        }
        sleep(LOOK).await;
    }
    Err("the server neither ended nor came back after the copy".to_owned())
}

async fn settle_mysql(session: &mut Session, expected: &Gtids, from: &HostName) -> Result<(), String> {
    session.run("SET GLOBAL super_read_only=1").await?;
    session.run("STOP REPLICA").await.or_else(|e| if e.code.is_some() { Ok(()) } else { Err(e) })?;
    session.run("RESET REPLICA ALL").await?;
    let executed = session.executed().await?;
    match executed.missing(expected) {
        Some(0) => {}
        Some(_) | None => {
            return Err(format!(
                "the server is up, but has not what {from} had when the copy began: '{executed}' instead of '{expected}'"
            ));
        }
    }
    if session.is_read_only().await? { Ok(()) } else { Err("read_only was set, and reads back as off".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_a_copy_is_completed_from_what_the_donor_had() {
        let state = |position, before, after| {
            let state = state_at(position, before, after).unwrap();
            state.iter().map(|((d, s), n)| format!("{d}-{s}-{n}")).collect::<Vec<_>>().join(",")
        };
        // Server 1 wrote until 100, and then server 2, before, during and after the copy.
        assert_eq!(state("0-2-150", "0-1-100,0-2-140", "0-1-100,0-2-190"), "0-1-100,0-2-150");
        // Server 3 wrote after the copy: what it had before counts.
        assert_eq!(state("0-2-150", "0-2-140,0-3-7", "0-2-150,0-3-160"), "0-2-150,0-3-7");
        assert_eq!(state("0-2-150", "0-2-140", "0-2-150,0-3-160"), "0-2-150");
        // A domain without a position in the copy is left out.
        assert_eq!(state("0-2-5", "0-2-5,7-1-3", "0-2-5,7-1-3"), "0-2-5");
    }
}

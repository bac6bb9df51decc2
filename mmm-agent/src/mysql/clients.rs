//! Who is logged in, who holds a transaction open, and who came in by which local address.
//!
//! Replication, the monitor, the agent itself and the server's own threads are never in a list of those to kill.

use super::dialect::Dialect;
use super::semisync;
use super::session::{Fields, QUERY, Session, Trouble};
use mmm_common::config;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Client {
    pub(super) id: u32,
    pub(super) user: String,
    /// `address:port` or `name:port`; no port for the local socket.
    pub(super) host: String,
    command: String,
    state: String,
    statement: String,
    seconds: u64,
}

impl Client {
    fn of(row: &Fields) -> Result<Client, Trouble> {
        Ok(Client {
            id: u32::try_from(row.number(&["Id"])?).unwrap_or_default(),
            user: row.text(&["User"])?.to_owned(),
            host: row.text(&["Host"])?.to_owned(),
            command: row.text(&["Command"])?.to_owned(),
            state: row.text(&["State"])?.to_owned(),
            statement: row.text(&["Info"])?.trim_start().to_ascii_uppercase(),
            seconds: row.text(&["Time"])?.parse().unwrap_or_default(),
        })
    }

    /// In the middle of a statement, and not merely queueing behind a global lock.
    pub(super) fn busy(&self) -> bool {
        let queueing = ["Waiting for global read lock", "Waiting for backup lock", "Waiting for commit lock"];
        self.command != "Sleep" && !queueing.iter().any(|q| self.state.starts_with(q))
    }

    /// Told to end, and not gone yet.
    pub(super) fn killed(&self) -> bool {
        self.command == "Killed"
    }

    /// A commit that a replica has not acknowledged yet.
    pub(super) fn waits_for_ack(&self) -> bool {
        self.state.starts_with(semisync::WAITING)
    }

    /// For a `SET GLOBAL read_only`: only commits that have begun are still before it, and none can begin.
    pub(super) fn waits_for_commits(&self) -> bool {
        self.state.starts_with("Waiting for commit lock")
    }

    /// For a `SET GLOBAL read_only`: writing statements are still before it, and none can begin.
    pub(super) fn waits_for_writes(&self) -> bool {
        self.state.starts_with("Waiting for global read lock")
    }

    /// Has been in a writing statement for a second or longer.
    pub(super) fn is_long(&self) -> bool {
        self.busy() && !self.only_reads() && self.seconds >= 1
    }

    /// A replica that fetches from this server.
    pub(super) fn fetches(&self) -> bool {
        self.command.starts_with("Binlog Dump")
    }

    /// One of MariaDB's parallel workers that is not done with what the SQL thread has handed to it.
    pub(super) fn applies(&self) -> bool {
        self.command == "Slave_worker" && !self.state.starts_with("Waiting for work from SQL thread")
    }

    /// A STOP of replication that the server has begun.
    pub(super) fn stops_replication(&self) -> bool {
        self.state.starts_with("Killing slave") || self.state.starts_with("Killing replica")
    }

    /// A command that may make another one of replication wait.
    pub(super) fn changes_replication(&self) -> bool {
        let verbs = ["START", "STOP", "RESET", "CHANGE"];
        let objects = ["SLAVE", "REPLICA", "ALL SLAVES", "ALL REPLICAS", "MASTER", "REPLICATION"];
        let object = verbs.iter().find_map(|verb| self.statement.strip_prefix(verb)).map(str::trim_start);
        self.busy() && object.is_some_and(|object| objects.iter().any(|o| object.starts_with(o)))
    }

    /// An I/O thread without a connection.
    pub(super) fn is_connecting(&self) -> bool {
        let states = ["Connecting to ", "Reconnecting after a failed ", "Waiting to reconnect after a failed "];
        states.iter().any(|s| self.state.starts_with(s))
    }

    /// An I/O thread that writes what it has fetched.
    pub(super) fn queues_event(&self) -> bool {
        self.state.starts_with("Queueing master event") || self.state.starts_with("Queueing source event")
    }

    /// MariaDB's I/O thread, when it was told to stop: it is out of the loop that fetches, or waits in it to be woken, and
    /// then drops what it has read (10.11 has no word for the first).
    pub(super) fn fetches_nothing_more(&self) -> bool {
        let states = ["Ending IO thread", "Waiting for master to send event"];
        self.command == "Slave_IO" && states.iter().any(|s| self.state.starts_with(s))
    }

    /// A statement that only reads, as far as its first word tells.
    pub(super) fn only_reads(&self) -> bool {
        let reads = self.statement.starts_with("SELECT") || self.statement.starts_with("SHOW");
        reads && !self.statement.contains("FOR UPDATE")
    }

    /// The port of the client's end, when it came over the network.
    fn port(&self) -> Option<u16> {
        self.host.rsplit_once(':').and_then(|(_, port)| port.parse().ok())
    }

    /// Whether this is the client at `there`. A server that resolves names shows a name: then the port alone decides.
    fn is_at(&self, there: &SocketAddr) -> bool {
        let Some((host, _)) = self.host.rsplit_once(':') else { return false };
        self.port() == Some(there.port())
            && host.parse::<IpAddr>().map_or(true, |ip| ip.to_canonical() == there.ip().to_canonical())
    }
}

pub(super) async fn all(session: &mut Session) -> Result<Vec<Client>, Trouble> {
    session.rows(QUERY, "SHOW PROCESSLIST").await?.iter().map(Client::of).collect()
}

/// Those who may be killed.
pub(super) async fn ordinary(session: &mut Session, config: &config::Agent) -> Result<Vec<Client>, Trouble> {
    let spared = Spared::of(config);
    let own = session.id;
    Ok(all(session).await?.into_iter().filter(|c| c.id != own && !spared.spares(c)).collect())
}

struct Spared {
    users: BTreeSet<String>,
}

impl Spared {
    fn of(config: &config::Agent) -> Spared {
        let mut users: BTreeSet<String> = config
            .cluster
            .hosts
            .values()
            .flat_map(|h| [&h.agent_user, &h.monitor_user, &h.replication_user])
            .filter(|u| !u.is_empty())
            .cloned()
            .collect();
        for own in ["system user", "event_scheduler", "unauthenticated user", "mysql.session", "mysql.infoschema"] {
            users.insert(own.to_owned());
        }
        Spared { users }
    }

    fn spares(&self, client: &Client) -> bool {
        let own_thread = ["Binlog Dump", "Daemon", "Slave_", "Group Replication"];
        self.users.contains(&client.user) || own_thread.iter().any(|c| client.command.starts_with(c))
    }
}

/// An error that only means "it is gone already" is success.
pub(super) async fn kill(session: &mut Session, id: u32) -> Result<(), Trouble> {
    match session.run(QUERY, &format!("KILL {id}")).await {
        Err(Trouble::Refused { code: 1094, .. }) => Ok(()),
        answer => answer,
    }
}

/// Longer than InnoDB goes on showing the same list of transactions.
pub(super) const LIST_AGE: Duration = Duration::from_millis(105);

/// Open InnoDB transactions: session, and how many rows it has changed.
///
/// InnoDB refreshes this list only when nobody has read it for 100 ms: reading it more often shows the same moment for
/// ever.
pub(super) async fn transactions(session: &mut Session) -> Result<BTreeMap<u32, u64>, Trouble> {
    let sql = "SELECT trx_mysql_thread_id AS id, trx_rows_modified AS changed FROM information_schema.innodb_trx";
    let rows = session.rows(QUERY, sql).await?;
    rows.iter().map(|r| Ok((u32::try_from(r.number(&["id"])?).unwrap_or_default(), r.number(&["changed"])?))).collect()
}

/// Users (without host part) who may write under read_only, as far as the agent may know: MySQL's super_read_only
/// stops everybody, MariaDB's read_only does not stop READ ONLY ADMIN, nor SUPER before 10.11.
pub(super) async fn privileged(session: &mut Session) -> Result<BTreeSet<String>, Trouble> {
    let sql = "SELECT DISTINCT GRANTEE AS grantee, PRIVILEGE_TYPE='SUPER' AS super, VERSION() AS version \
               FROM information_schema.USER_PRIVILEGES \
               WHERE PRIVILEGE_TYPE IN ('READ_ONLY ADMIN', 'READ ONLY ADMIN', 'SUPER')";
    privileged_of(&session.rows(QUERY, sql).await?)
}

fn privileged_of(rows: &[Fields]) -> Result<BTreeSet<String>, Trouble> {
    let name = |grantee: &str| grantee.split('@').next().unwrap_or_default().trim_matches('\'').to_owned();
    let mut users = BTreeSet::new();
    for row in rows {
        if row.text(&["super"])? == "0" || super_writes(row.text(&["version"])?) {
            users.insert(name(row.text(&["grantee"])?));
        }
    }
    Ok(users)
}

/// Whether SUPER writes through read_only. Closing its sessions where it does not would only hurt them.
fn super_writes(version: &str) -> bool {
    let mut numbers = version.split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
    let old = numbers.next().zip(numbers.next()).is_none_or(|version| version < (10, 11));
    Dialect::of_version(version) == Dialect::MariaDb && old
}

/// Of these clients, those whose connection ends at one of the addresses here.
pub(super) fn on_addresses<'a>(clients: &'a [Client], ends: &BTreeSet<SocketAddr>) -> Vec<&'a Client> {
    clients.iter().filter(|c| ends.iter().any(|end| c.is_at(end))).collect()
}

/// The far ends of established connections to `port` at one of `ips` on this machine, from the kernel's tables.
pub(super) fn far_ends(ips: &[IpAddr], port: u16) -> std::io::Result<BTreeSet<SocketAddr>> {
    let mut ends = BTreeSet::new();
    for table in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        match std::fs::read_to_string(table) {
            Ok(text) => ends.extend(far_ends_in(&text, ips, port)),
            // A machine without IPv6 has no tcp6.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && table.ends_with('6') => {}
            Err(e) => return Err(e),
        }
    }
    Ok(ends)
}

fn far_ends_in(table: &str, ips: &[IpAddr], port: u16) -> BTreeSet<SocketAddr> {
    const ESTABLISHED: &str = "01";
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let (local, far, state) = (words.next()?, words.next()?, words.next()?);
            let local = end(local)?;
            (state == ESTABLISHED && local.port() == port && ips.contains(&local.ip())).then(|| end(far))?
        })
        .collect()
}

/// `0100007F:0CEA`: the address as the kernel's 32-bit words in this machine's byte order, then the port.
fn end(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let words: Vec<u8> = (0..ip.len() / 8)
        .filter_map(|i| u32::from_str_radix(ip.get(i * 8..i * 8 + 8)?, 16).ok())
        .flat_map(u32::to_ne_bytes)
        .collect();
    let ip = match <[u8; 4]>::try_from(words.as_slice()) {
        Ok(four) => IpAddr::V4(Ipv4Addr::from(four)),
        Err(_) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(words.as_slice()).ok()?)),
    };
    Some(SocketAddr::new(ip.to_canonical(), u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(user: &str, host: &str, command: &str, statement: &str) -> Client {
        Client {
            id: 7,
            user: user.to_owned(),
            host: host.to_owned(),
            command: command.to_owned(),
            state: String::new(),
            statement: statement.to_owned(),
            seconds: 0,
        }
    }

    #[test]
    fn the_kernels_table_is_read_with_mapped_addresses_and_nothing_else_on_it() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
            0: 3200A8C0:0CEA 0100A8C0:C350 01 00000000\n\
            1: 3200A8C0:0CEA 0200A8C0:C351 06 00000000\n\
            2: 3300A8C0:0CEA 0100A8C0:C352 01 00000000\n\
            3: 3200A8C0:0CEB 0100A8C0:C353 01 00000000\n\
            4: 0000000000000000FFFF00003200A8C0:0CEA 0000000000000000FFFF00000100A8C0:C354 01 00000000\n";
        let ends = far_ends_in(table, &["192.168.0.50".parse().unwrap()], 3306);
        let expected: BTreeSet<SocketAddr> =
            ["192.168.0.1:50000".parse().unwrap(), "192.168.0.1:50004".parse().unwrap()].into();
        assert_eq!(ends, expected);
    }

    #[test]
    fn a_client_is_found_by_address_and_port_or_by_port_behind_a_name() {
        let end = "192.168.0.1:50000".parse().unwrap();
        assert!(client("app", "192.168.0.1:50000", "Sleep", "").is_at(&end));
        assert!(client("app", "web1.example:50000", "Sleep", "").is_at(&end));
        assert!(!client("app", "192.168.0.11:50000", "Sleep", "").is_at(&end));
        assert!(!client("app", "localhost", "Sleep", "").is_at(&end));
    }

    #[test]
    fn replication_and_our_own_are_spared() {
        let spared = Spared { users: ["mmm_agent", "system user"].map(str::to_owned).into() };
        assert!(spared.spares(&client("mmm_agent", "localhost", "Query", "")));
        assert!(spared.spares(&client("repl", "10.0.0.2:3", "Binlog Dump GTID", "")));
        assert!(spared.spares(&client("system user", "", "Slave_SQL", "")));
        assert!(!spared.spares(&client("app", "10.0.0.2:3", "Query", "UPDATE T")));
    }

    #[test]
    fn who_has_super_may_write_under_read_only_on_older_mariadb_alone() {
        let users = |version: &str| {
            let row = |grantee, is_super| {
                Fields::of(&[("grantee", Some(grantee)), ("super", Some(is_super)), ("version", Some(version))])
            };
            let rows = [row("'admin'@'%'", "1"), row("'backup'@'10.%'", "0"), row("'backup'@'10.%'", "1")];
            Vec::from_iter(privileged_of(&rows).unwrap())
        };
        assert_eq!(users("10.6.22-MariaDB-log"), ["admin", "backup"]);
        assert_eq!(users("10.10.7-MariaDB"), ["admin", "backup"]);
        for newer in ["10.11.14-MariaDB-0+deb12u2", "11.8.3-MariaDB", "9.7.0"] {
            assert_eq!(users(newer), ["backup"], "{newer}");
        }
    }

    #[test]
    fn a_worker_applies_unless_it_waits_for_work() {
        let worker =
            |command, state: &str| Client { state: state.to_owned(), ..client("system user", "", command, "") };
        assert!(worker("Slave_worker", "Waiting for table metadata lock").applies());
        assert!(worker("Slave_worker", "").applies());
        assert!(!worker("Slave_worker", "Waiting for work from SQL thread").applies());
        assert!(!worker("Slave_SQL", "Slave has read all relay log; waiting for more updates").applies());
    }

    #[test]
    fn an_io_thread_that_may_still_take_something_is_not_at_rest() {
        let thread =
            |command, state: &str| Client { state: state.to_owned(), ..client("system user", "", command, "") };
        let (io, sql) = ("Slave_IO", "Slave_SQL");
        assert!(thread(io, "Waiting for master to send event").fetches_nothing_more());
        assert!(thread(io, "Ending IO thread").fetches_nothing_more());
        assert!(!thread(io, "Queueing master event to the relay log").fetches_nothing_more());
        assert!(!thread(io, "Connecting to master").fetches_nothing_more());
        assert!(
            !thread(sql, "Waiting for master to send event").fetches_nothing_more(),
            "only the thread that fetches"
        );
        assert!(thread(io, "Queueing master event to the relay log").queues_event());
        assert!(thread("Connect", "Queueing source event to the relay log").queues_event());
        assert!(thread(io, "Waiting to reconnect after a failed master event read").is_connecting());
        assert!(thread("Connect", "Connecting to source").is_connecting());
        assert!(!thread(io, "Waiting for master to send event").is_connecting());
    }

    #[test]
    fn what_may_hold_a_stop_up_is_told_from_other_statements() {
        let runs = |statement: &str| Client { statement: statement.to_owned(), ..client("boss", "", "Query", "") };
        for sql in [
            "STOP SLAVE SQL_THREAD",
            "START  REPLICA",
            "STOP ALL SLAVES",
            "CHANGE MASTER TO MASTER_PORT=1",
            "RESET SLAVE",
        ] {
            assert!(runs(sql).changes_replication(), "{sql}");
        }
        for sql in ["START TRANSACTION", "SHOW SLAVE STATUS", "RESET QUERY CACHE", ""] {
            assert!(!runs(sql).changes_replication(), "{sql}");
        }
        let idle = Client { command: "Sleep".to_owned(), ..runs("STOP SLAVE") };
        assert!(!idle.changes_replication(), "its last one is over");
        assert!(Client { state: "Killing slave".to_owned(), ..runs("STOP SLAVE IO_THREAD") }.stops_replication());
        assert!(!runs("STOP SLAVE IO_THREAD").stops_replication(), "the server has not begun it");
    }

    #[test]
    fn a_locking_read_counts_as_a_write() {
        assert!(client("app", "h:1", "Query", "SELECT 1").only_reads());
        assert!(!client("app", "h:1", "Query", "SELECT 1 FOR UPDATE").only_reads());
        assert!(!client("app", "h:1", "Query", "CALL P()").only_reads());
    }
}

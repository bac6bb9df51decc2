//! Finding and saving what this host has executed and the active master has not. Changes nothing on the server.
//!
//! What was saved is complete or it is an error: a list that leaves transactions out would be taken for all there is.

use super::binlog::{Found, Scanner, Wanted};
use super::sql::{self, Dialect, Session};
use super::tool::{Cancelled, Go, Tool, lines};
use super::{Work, state_folder};
use mmm_common::gtid::Gtids;
use mmm_common::report::Extras;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// For reading binary logs, however many.
const READ: Duration = Duration::from_secs(4 * 3600);

/// What was found and where it is, and what it takes to read it again.
pub(super) struct Saved {
    pub(super) extras: Extras,
    pub(super) found: Found,
    pub(super) tool: Tool,
    /// The server's binary logs from the first that holds extra transactions on.
    pub(super) files: Vec<String>,
}

/// None: nothing is extra.
pub(super) async fn save(work: &Work, session: &mut Session, wanted: &Wanted) -> Result<Option<Saved>, String> {
    let Wanted { having, lacking } = wanted;
    let Some(count) = lacking.missing(having) else {
        return Err("the active master's GTIDs are of the other kind of server: they cannot be compared".to_owned());
    };
    if count == 0 {
        return Ok(None);
    }
    work.progress.step("looking for the extra transactions in the binary logs");
    let logs = Logs::find(session, wanted, work).await?;
    let host = sql::own_host(&work.config)?;
    let basedir = session.one("SELECT @@GLOBAL.basedir").await?;
    let folder = state_folder(&work.config);
    let tool = Tool::find(session.dialect, host, &basedir, &folder, work.id)?;
    // From the first file to the last, with the names of the files between them.
    let mut arguments = vec!["-v".to_owned(), "--to-last-log".to_owned()];
    if session.dialect == Dialect::MySql {
        let extra = session
            .one(&format!(
                "SELECT GTID_SUBTRACT({}, {})",
                sql::quote(&having.to_string()),
                sql::quote(&lacking.to_string())
            ))
            .await?;
        arguments.push(format!("--include-gtids={}", extra.replace(['\n', ' '], "")));
    }
    let file = File::create(&folder, work.config.this.as_str())?;
    let command = tool.command(&arguments, &logs.files[..logs.files.len().min(1)]);
    let (wanted_too, progress, cancelled) = (wanted.clone(), work.progress.clone(), work.cancelled.clone());
    let scanned = tokio::task::spawn_blocking(move || {
        scan(command, file, &wanted_too, &cancelled, |file| progress.step(&format!("reading binary log {file}")))
    });
    let (found, path) = scanned.await.map_err(|e| format!("reading the binary logs: {e}"))??;
    if let Some(why) = incomplete(session.dialect, &found, count, &logs) {
        let saved = if found.transactions == 0 {
            let _ = fs::remove_file(&path);
            "nothing was saved".to_owned()
        } else {
            format!("{} of them are saved in {}", found.transactions, path.display())
        };
        return Err(format!("{why}; {saved}"));
    }
    let gtids = match lacking {
        Gtids::MariaDb(_) => Gtids::MariaDb(found.gtids.join(",").parse()?),
        Gtids::MySql(_) => Gtids::MySql(found.gtids.join(",").parse()?),
    };
    let extras =
        Extras { gtids, transactions: found.transactions, list: found.list.clone(), saved: path.display().to_string() };
    Ok(Some(Saved { extras, found, tool, files: logs.files }))
}

fn scan(
    command: std::process::Command,
    mut file: File,
    wanted: &Wanted,
    cancelled: &Cancelled,
    reading: impl Fn(&str),
) -> Result<(Found, PathBuf), String> {
    let full = |e: std::io::Error| format!("writing the extra transactions: {e}");
    let mut scanner = Scanner::new(wanted, BufWriter::new(&mut file.file));
    let mut at = String::new();
    lines(command, Instant::now() + READ, cancelled, |line| {
        scanner.feed(line).map_err(full)?;
        if scanner.file() != at {
            scanner.file().clone_into(&mut at);
            reading(&at);
        }
        Ok(Go::On)
    })?;
    let found = scanner.finish().map_err(full)?;
    let path = file.keep().map_err(full)?;
    Ok((found, path))
}

/// Why not everything extra was found.
fn incomplete(dialect: Dialect, found: &Found, count: u64, logs: &Logs) -> Option<String> {
    match dialect {
        Dialect::MariaDb if logs.purged > 0 => Some(format!(
            "about {} extra transactions are in binary logs that this host has purged (the oldest it still has is {})",
            logs.purged,
            logs.files.first().map_or("none", String::as_str)
        )),
        Dialect::MySql if found.transactions < count => Some(format!(
            "{} of {count} extra transactions are in no binary log of this host (any more); the oldest is {}",
            count - found.transactions,
            logs.files.first().map_or("none", String::as_str)
        )),
        // Its numbers have gaps, so they only tell that there is something.
        Dialect::MariaDb if found.transactions == 0 => {
            Some("the extra transactions are in no binary log of this host (is log_slave_updates on?)".to_owned())
        }
        Dialect::MariaDb | Dialect::MySql => None,
    }
}

/// The binary logs that have to be read.
struct Logs {
    files: Vec<String>,
    /// Extra transactions before the oldest of them.
    purged: u64,
}

impl Logs {
    /// From the newest back to one at whose beginning nothing was extra.
    async fn find(session: &mut Session, wanted: &Wanted, work: &Work) -> Result<Logs, String> {
        let rows = session.rows(sql::ASK, "SHOW BINARY LOGS").await?;
        let all: Vec<String> = rows.iter().filter_map(|row| row.get("log_name").cloned()).collect();
        // On MySQL the replication user may look into them, on MariaDB it may not.
        let mut other = match session.dialect {
            Dialect::MySql => Some(Session::replication(sql::own_host(&work.config)?).await?),
            Dialect::MariaDb => None,
        };
        let looks = other.as_mut().unwrap_or(session);
        let mut logs = Logs { files: Vec::new(), purged: 0 };
        for file in all.into_iter().rev() {
            let before = state_before(looks, &file).await?;
            logs.purged = extra_in(&before, wanted);
            logs.files.insert(0, file);
            if logs.purged == 0 {
                break;
            }
        }
        Ok(logs)
    }
}

/// What had been executed when the file was begun, as its first events tell.
async fn state_before(session: &mut Session, file: &str) -> Result<Gtids, String> {
    let rows = session.rows(sql::ASK, &format!("SHOW BINLOG EVENTS IN {} LIMIT 4", sql::quote(file))).await?;
    let info = |kind: &str| {
        rows.iter().find(|row| row.get("event_type").is_some_and(|k| k == kind)).and_then(|row| row.get("info"))
    };
    match session.dialect {
        Dialect::MariaDb => {
            let list = info("Gtid_list").ok_or_else(|| format!("binary log {file} has no list of GTIDs"))?;
            Ok(Gtids::MariaDb(list.trim_matches(['[', ']']).parse()?))
        }
        Dialect::MySql => {
            let list = info("Previous_gtids").ok_or_else(|| format!("binary log {file} has no list of GTIDs"))?;
            Ok(Gtids::MySql(list.parse()?))
        }
    }
}

/// How many of the extra transactions had been executed then, at most.
fn extra_in(before: &Gtids, wanted: &Wanted) -> u64 {
    let both = match (&wanted.having, before) {
        // Numbers that grow: what is below both.
        (Gtids::MariaDb(_), Gtids::MariaDb(_)) => {
            let having = pairs(&wanted.having);
            let list: Vec<String> = pairs(before)
                .into_iter()
                .filter_map(|((d, s), n)| having.get(&(d, s)).map(|limit| format!("{d}-{s}-{}", n.min(*limit))))
                .collect();
            list.join(",").parse().map(Gtids::MariaDb).unwrap_or_else(|_| before.clone())
        }
        (Gtids::MySql(_) | Gtids::MariaDb(_), _) => before.clone(),
    };
    // On MySQL also what came later by replication counts here: then more files are read than needed. What is in none of
    // them is found by counting.
    wanted.lacking.missing(&both).unwrap_or_default()
}

/// Sequence numbers by domain and server, as MariaDB writes them.
pub(super) fn pairs(gtids: &Gtids) -> BTreeMap<(u64, u64), u64> {
    let text = gtids.to_string();
    text.split(',')
        .filter_map(|one| {
            let mut numbers = one.split('-').map(str::parse::<u64>);
            match (numbers.next(), numbers.next(), numbers.next()) {
                (Some(Ok(domain)), Some(Ok(server)), Some(Ok(seq))) => Some(((domain, server), seq)),
                (..) => None,
            }
        })
        .collect()
}

/// Removes what an agent that was killed has left half written.
pub(super) fn clear(state_folder: &Path) {
    let Ok(entries) = fs::read_dir(state_folder.join("lost")) else { return };
    for part in entries.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "part"))
    {
        if let Err(e) = fs::remove_file(&part) {
            tracing::warn!("{} was left: {e}", part.display());
        }
    }
}

/// A file of SQL that is there under its name only when it is whole. Only this user can read it.
struct File {
    file: fs::File,
    part: PathBuf,
    path: PathBuf,
    kept: bool,
}

impl File {
    fn create(state_folder: &Path, host: &str) -> Result<File, String> {
        let folder = state_folder.join("lost");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|e| format!("making {}: {e}", folder.display()))?;
        let now = jiff::Zoned::now();
        let stamp = now.with_time_zone(jiff::tz::TimeZone::UTC).strftime("%Y%m%d-%H%M%S").to_string();
        let name = |n: u32| if n == 0 { format!("{host}-{stamp}") } else { format!("{host}-{stamp}-{n}") };
        let free = (0..100).map(name).find(|name| !folder.join(format!("{name}.sql")).exists());
        let name = free.ok_or_else(|| format!("too many files of this second in {}", folder.display()))?;
        let part = folder.join(format!("{name}.part"));
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)
            .map_err(|e| format!("making {}: {e}", part.display()))?;
        writeln!(
            file,
            "-- Transactions that host '{host}' had executed and the active master had not, as of {}.\n\
             -- Rows are in BINLOG statements; what they do stands below each as a comment.",
            now.strftime("%Y-%m-%d %H:%M:%S %Z")
        )
        .map_err(|e| format!("writing {}: {e}", part.display()))?;
        Ok(File { file, part, path: folder.join(format!("{name}.sql")), kept: false })
    }

    fn keep(mut self) -> std::io::Result<PathBuf> {
        self.file.sync_all()?;
        fs::rename(&self.part, &self.path)?;
        if let Some(folder) = self.path.parent() {
            fs::File::open(folder)?.sync_all()?;
        }
        self.kept = true;
        Ok(self.path.clone())
    }
}

impl Drop for File {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.part);
        }
    }
}

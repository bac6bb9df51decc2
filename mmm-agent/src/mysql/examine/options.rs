//! What the local server will read when it starts again: its configuration files and its command line, as far as this
//! process may read them. A running server does not tell it: `SET GLOBAL` hides where a value came from.
//!
//! It never says that something is not set when there was a file that it could not read.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Includes within includes; more is a circle.
const DEPTH: u32 = 8;
/// Where a server looks that was not told where (the same on Debian and Red Hat).
const USUAL: [&str; 2] = ["/etc/my.cnf", "/etc/mysql/my.cnf"];

/// What the running server says of itself, by which its process is found.
pub(super) struct Place {
    pub(super) pid_file: PathBuf,
    pub(super) datadir: PathBuf,
    pub(super) socket: PathBuf,
    pub(super) version: String,
    pub(super) mariadb: bool,
}

/// The last value of each option, and where it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Options(BTreeMap<String, (String, String)>);

impl Options {
    /// Reads files; blocks.
    ///
    /// # Errors
    /// Why it is not known, in words.
    pub(super) fn of_server(place: &Place) -> Result<Options, String> {
        let line = command_line(place).ok_or("the server's process was not found in /proc")?;
        Options::of_command_line(&line, place)
    }

    fn of_command_line(line: &[String], place: &Place) -> Result<Options, String> {
        let given =
            |name: &str| line.iter().find_map(|arg| arg.strip_prefix(name)?.strip_prefix('=')).map(PathBuf::from);
        let mut options = Options::default();
        let groups = Groups { mariadb: place.mariadb, version: &place.version };
        if line.iter().any(|arg| arg == "--no-defaults") {
        } else if let Some(file) = given("--defaults-file") {
            options.read(&file, &groups, 0)?;
        } else {
            let usual = USUAL.map(PathBuf::from).into_iter().filter(|file| file.exists());
            for file in usual.chain(given("--defaults-extra-file")) {
                options.read(&file, &groups, 0)?;
            }
        }
        for arg in line.iter().skip(1).filter_map(|arg| arg.strip_prefix("--")) {
            options.set(arg, "the command line");
        }
        Ok(options)
    }

    /// The value that the server starts with, and where that stands.
    pub(super) fn get(&self, name: &str) -> Option<(&str, &str)> {
        self.0.get(name).map(|(value, place)| (value.as_str(), place.as_str()))
    }

    fn read(&mut self, file: &Path, groups: &Groups, depth: u32) -> Result<(), String> {
        if depth > DEPTH {
            return Err(format!("{} is included by itself", file.display()));
        }
        let text = fs::read_to_string(file).map_err(|e| format!("{} cannot be read: {e}", file.display()))?;
        let mut ours = false;
        for line in text.lines().map(str::trim) {
            if let Some(dir) = line.strip_prefix("!includedir") {
                let dir = Path::new(dir.trim());
                let entries = fs::read_dir(dir).map_err(|e| format!("{} cannot be read: {e}", dir.display()))?;
                let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
                files.retain(|f| f.extension().is_some_and(|e| e == "cnf"));
                files.sort();
                for file in files {
                    self.read(&file, groups, depth + 1)?;
                }
            } else if let Some(other) = line.strip_prefix("!include") {
                self.read(Path::new(other.trim()), groups, depth + 1)?;
            } else if let Some(group) = line.strip_prefix('[').and_then(|l| l.split_once(']')) {
                ours = groups.has(group.0.trim());
            } else if ours && !line.is_empty() && !line.starts_with(['#', ';']) {
                self.set(line, &file.display().to_string());
            }
        }
        Ok(())
    }

    /// `name=value`, `name`, or `skip-name`, with dashes or underscores.
    fn set(&mut self, text: &str, place: &str) {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text.split('#').next().unwrap_or(text), None),
        };
        let name = name.trim().to_ascii_lowercase().replace('-', "_");
        let name = name.strip_prefix("loose_").unwrap_or(&name);
        let off = ["skip_", "disable_"].iter().find_map(|prefix| name.strip_prefix(prefix));
        let (name, usual) = match off {
            Some(name) => (name, "OFF"),
            None => (name.strip_prefix("enable_").unwrap_or(name), "ON"),
        };
        let value = value.map_or(usual, |v| unquoted(v.split(" #").next().unwrap_or(v).trim()));
        self.0.insert(name.to_owned(), (value.to_owned(), place.to_owned()));
    }
}

fn unquoted(value: &str) -> &str {
    let inner = |quote| value.strip_prefix(quote)?.strip_suffix(quote);
    inner('"').or_else(|| inner('\'')).unwrap_or(value)
}

/// Which sections of a file are for this server.
struct Groups<'a> {
    mariadb: bool,
    version: &'a str,
}

impl Groups<'_> {
    fn has(&self, group: &str) -> bool {
        let mine: &[&str] = if self.mariadb {
            &["mysqld", "server", "mariadb", "mariadbd", "client-server"]
        } else {
            &["mysqld", "server"]
        };
        let (name, version) = match group.rsplit_once('-') {
            Some((name, version)) if version.starts_with(|c: char| c.is_ascii_digit()) => (name, version),
            Some(_) | None => (group, ""),
        };
        let right = version.is_empty() || self.version.starts_with(&format!("{version}."));
        mine.contains(&name) && right
    }
}

/// The arguments of the server's process: of the one that its pid file names, or else of the only one that its paths
/// point to.
fn command_line(place: &Place) -> Option<Vec<String>> {
    let pid_file = place.datadir.join(&place.pid_file);
    if let Some(pid) = fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse::<u32>().ok())
        && let Some(line) = arguments(pid)
    {
        return Some(line);
    }
    let pids = fs::read_dir("/proc").ok()?.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let servers: Vec<Vec<String>> = pids.filter_map(arguments).filter(|line| is_server(&line[0])).collect();
    let trim = |path: &Path| path.display().to_string().trim_end_matches('/').to_owned();
    let paths = [&place.socket, &place.datadir, &pid_of(place)].map(|path| trim(path));
    let told: Vec<&Vec<String>> = servers
        .iter()
        .filter(|line| {
            line.iter().any(|arg| paths.iter().any(|p| !p.is_empty() && arg.trim_end_matches('/').ends_with(p)))
        })
        .collect();
    match (told.as_slice(), servers.as_slice()) {
        ([one], _) => Some((*one).clone()),
        ([], [one]) => Some(one.clone()),
        (_, _) => None,
    }
}

fn pid_of(place: &Place) -> PathBuf {
    place.datadir.join(&place.pid_file)
}

fn is_server(program: &str) -> bool {
    let name = Path::new(program).file_name().and_then(|n| n.to_str()).unwrap_or_default();
    matches!(name, "mysqld" | "mariadbd")
}

fn arguments(pid: u32) -> Option<Vec<String>> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words = line.split(|b| *b == 0).filter(|w| !w.is_empty());
    let words: Vec<String> = words.map(|w| String::from_utf8_lossy(w).into_owned()).collect();
    (!words.is_empty()).then_some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(version: &str) -> Place {
        let mariadb = version.contains("MariaDB");
        let none = PathBuf::new();
        Place { pid_file: none.clone(), datadir: none.clone(), socket: none, version: version.to_owned(), mariadb }
    }

    /// Given these files (name, text); the first is the server's own.
    fn read(files: &[(&str, &str)], more: &[&str], version: &str) -> Result<Options, String> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text.replace("DIR", &dir.path().display().to_string())).unwrap();
        }
        let file = format!("--defaults-file={}", dir.path().join(files[0].0).display());
        let line: Vec<String> =
            ["mysqld".to_owned(), file].into_iter().chain(more.iter().map(|m| (*m).to_owned())).collect();
        Options::of_command_line(&line, &place(version))
    }

    #[test]
    fn the_last_word_counts_and_only_the_servers_sections() {
        let files = [
            (
                "my.cnf",
                "[mysqld]\nread-only = 0\nsync_binlog=1 # safe\n!includedir DIR/conf.d/\n[mysql]\nread_only=7\n",
            ),
            ("conf.d/10.cnf", "[mariadb-10.11]\nread_only\n[mariadb-11.8]\nread_only=0\n"),
            ("conf.d/20.cnf", "[mysqld]\nloose-skip-log-slave-updates\ninit_rpl_role = \"SLAVE\"\n"),
            ("conf.d/30.bak", "[mysqld]\nread_only=0\n"),
        ];
        let options = read(&files, &[], "10.11.6-MariaDB").unwrap();
        assert_eq!(options.get("read_only").unwrap().0, "ON");
        assert!(options.get("read_only").unwrap().1.ends_with("conf.d/10.cnf"));
        assert_eq!(options.get("sync_binlog").unwrap().0, "1");
        assert_eq!(options.get("log_slave_updates").unwrap().0, "OFF");
        assert_eq!(options.get("init_rpl_role").unwrap().0, "SLAVE");
        assert_eq!(read(&files, &[], "9.7.4").unwrap().get("read_only").unwrap().0, "0", "those are MariaDB's");
        let line = read(&files, &["--read-only=0"], "10.11.6-MariaDB").unwrap();
        assert_eq!(line.get("read_only"), Some(("0", "the command line")));
    }

    #[test]
    fn what_cannot_be_read_is_not_known() {
        let e = read(&[("my.cnf", "!include DIR/gone.cnf\n")], &[], "9.7.4").unwrap_err();
        assert!(e.contains("gone.cnf cannot be read"), "{e}");
        let e = read(&[("my.cnf", "!include DIR/my.cnf\n")], &[], "9.7.4").unwrap_err();
        assert!(e.contains("is included by itself"), "{e}");
    }
}

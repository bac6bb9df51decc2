//! Reading a configuration file and everything it includes.
//!
//! A file that cannot be read, or is no TOML, is one mistake; the others are looked at all the same. Never reads more
//! than a configuration can be, never follows a circle of includes.

use super::options;
use super::parse::Mistake;
use super::tree::{self, Table};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const LARGEST: u64 = 1 << 20;
const DEEPEST: usize = 16;

pub(super) struct Loaded {
    /// In the order in which they count: what stands in a later one wins.
    pub(super) files: Vec<File>,
    pub(super) mistakes: Vec<Mistake>,
    /// A file is missing from `files`, so what is not found may stand there.
    pub(super) incomplete: bool,
}

pub(super) struct File {
    pub(super) path: PathBuf,
    /// The permission bits.
    pub(super) mode: u32,
    pub(super) table: Table,
}

pub(super) fn load(main: &Path) -> Loaded {
    let mut loader =
        Loader { loaded: Loaded { files: Vec::new(), mistakes: Vec::new(), incomplete: false }, seen: Vec::new() };
    loader.file(main, None, &mut Vec::new());
    loader.loaded
}

struct Loader {
    loaded: Loaded,
    /// Real paths of all files looked at: a file included twice counts where it came first.
    seen: Vec<PathBuf>,
}

impl Loader {
    /// `from` is the file and line that includes this one, `chain` the real paths of the files that lead here.
    fn file(&mut self, path: &Path, from: Option<(&Path, usize)>, chain: &mut Vec<PathBuf>) {
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if chain.contains(&real) {
            let circle: Vec<String> = chain.iter().chain([&real]).map(|p| p.display().to_string()).collect();
            return self.mistake(path, from, format!("files include each other in a circle: {}", circle.join(" -> ")));
        }
        if self.seen.contains(&real) {
            return;
        }
        if chain.len() >= DEEPEST {
            return self.mistake(path, from, format!("files include each other more than {DEEPEST} deep"));
        }
        self.seen.push(real.clone());
        let (text, mode) = match read(path) {
            Ok(read) => read,
            Err(why) => {
                let cure = match (why.kind(), from) {
                    (io::ErrorKind::NotFound, Some(_)) => ": create it or correct include",
                    (io::ErrorKind::NotFound, None) => ": create it, or name another file with -c FILE",
                    (io::ErrorKind::PermissionDenied, _) => ": run as root or as a member of the file's group",
                    _ => "",
                };
                return self.mistake(path, from, format!("cannot read {}: {why}{cure}", path.display()));
            }
        };
        let text = match String::from_utf8(text) {
            Ok(text) => text,
            Err(e) => {
                let before = &e.as_bytes()[..e.utf8_error().valid_up_to()];
                let line = before.iter().filter(|b| **b == b'\n').count() + 1;
                return self.unreadable(path, line, "this is not UTF-8 text: save the file as UTF-8".to_owned());
            }
        };
        let table = match tree::parse(&text) {
            Ok(table) => table,
            Err((line, why)) => {
                let old = text.lines().any(|l| l.trim_start().starts_with('<'));
                let cure = if old {
                    " (this looks like a file of MMM 2.x: it has to be rewritten as TOML, with [host.db1] for <host db1>)"
                } else {
                    ""
                };
                return self.unreadable(path, line, format!("syntax error: {why}{cure}"));
            }
        };
        chain.push(real);
        self.includes(path, &table, chain);
        chain.pop();
        self.loaded.files.push(File { path: path.to_owned(), mode, table });
    }

    fn includes(&mut self, path: &Path, table: &Table, chain: &mut Vec<PathBuf>) {
        let Some(include) = table.iter().find(|entry| entry.key == options::INCLUDE.name) else { return };
        match (options::INCLUDE.read)(&include.node) {
            Ok(included) => {
                for (line, name) in included {
                    // A relative name is looked for beside the file that includes it.
                    let target = path.parent().unwrap_or(Path::new("")).join(name);
                    self.file(&target, Some((path, line)), chain);
                }
            }
            // What is wrong with the value is said with all the other options.
            Err(_) => self.loaded.incomplete = true,
        }
    }

    fn mistake(&mut self, path: &Path, from: Option<(&Path, usize)>, text: String) {
        let (file, line) = from.map_or((path, None), |(file, line)| (file, Some(line)));
        self.loaded.mistakes.push(Mistake { file: file.to_owned(), line, text });
        self.loaded.incomplete = true;
    }

    fn unreadable(&mut self, path: &Path, line: usize, text: String) {
        self.loaded.mistakes.push(Mistake { file: path.to_owned(), line: Some(line), text });
        self.loaded.incomplete = true;
    }
}

/// The file's content and permission bits.
fn read(path: &Path) -> io::Result<(Vec<u8>, u32)> {
    // Looked at before opening: opening a named pipe would wait for a writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let file = fs::File::open(path)?;
    let mode = file.metadata()?.permissions().mode() & 0o7777;
    let mut text = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut text)?;
    if text.len() as u64 > LARGEST {
        return Err(io::Error::other("it is larger than 1 MiB, so it is no configuration"));
    }
    Ok((text, mode))
}

/// The password in a file of its own, or what is wrong with that file and how to cure it.
pub(super) fn password(path: &Path) -> Result<String, String> {
    let shown = path.display();
    let (text, mode) = read(path).map_err(|why| format!("cannot read {shown}: {why}"))?;
    if mode & 0o007 != 0 {
        return Err(format!("{shown} holds a password and is open to everybody (mode {mode:04o}): chmod o= {shown}"));
    }
    let text = String::from_utf8(text).map_err(|_| format!("{shown} is not UTF-8 text"))?;
    let password = text.strip_suffix('\n').unwrap_or(&text);
    let password = password.strip_suffix('\r').unwrap_or(password);
    if password.is_empty() {
        return Err(format!("{shown} is empty: write the password into its only line"));
    }
    if password.contains('\n') {
        return Err(format!("{shown} has more than one line: it may hold the password only"));
    }
    Ok(password.to_owned())
}

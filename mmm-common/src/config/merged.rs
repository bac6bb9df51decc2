//! All files as one: per section and key the value that counts, and where it stands.
//!
//! A later file wins key by key; `[host.db1]` wins over `[host.default]` whatever the file. On the way every key and
//! every value is looked at, the overridden ones as well: a mistake is a mistake.

use super::check::At;
use super::files::File;
use super::options::{self, Kind, Opt, PASSWORDS, Password, belongs, replaced};
use super::parse::Mistake;
use super::suggest;
use super::tree::{Entry, Node, Table};
use crate::state::CheckKind;
use std::collections::BTreeMap;
use std::path::PathBuf;

#[derive(Default)]
pub(super) struct Merged {
    /// By name as in a header, without brackets: `host.db1`; empty for the top.
    sections: BTreeMap<String, Section>,
    pub(super) mistakes: Vec<Mistake>,
}

#[derive(Default)]
struct Section {
    /// Where its first header stands.
    place: Option<Place>,
    keys: BTreeMap<&'static str, Found>,
}

#[derive(Clone)]
pub(super) struct Place {
    pub(super) file: PathBuf,
    pub(super) line: usize,
}

pub(super) struct Found {
    pub(super) place: Place,
    pub(super) node: Node,
}

impl Merged {
    pub(super) fn of(files: &[File]) -> Self {
        let mut merged = Merged::default();
        for file in files {
            merged.file(file);
        }
        merged
    }

    /// The value that counts, from the first of these sections that has the key.
    pub(super) fn get<T>(&self, sections: &[String], option: &Opt<T>) -> Option<&Found> {
        sections.iter().find_map(|s| self.sections.get(s)?.keys.get(option.name))
    }

    /// A password or the file that holds it, from the first of these sections that has either.
    pub(super) fn password(&self, sections: &[String], password: &Password) -> Option<(&'static str, &Found)> {
        sections.iter().find_map(|s| {
            let keys = &self.sections.get(s)?.keys;
            [password.password.name, password.file.name].into_iter().find_map(|key| Some((key, keys.get(key)?)))
        })
    }

    /// The names of all sections of a kind, without `default`.
    pub(super) fn names(&self, kind: Kind) -> Vec<String> {
        let prefix = format!("{}.", kind.word());
        let names = self.sections.keys().filter_map(|s| s.strip_prefix(&prefix));
        names.filter(|name| *name != "default").map(str::to_owned).collect()
    }

    /// Where to send the reader: the first of these options that stands in a file (for a host or check also as a
    /// default), or else the section of the first.
    pub(super) fn place(&self, about: &[At]) -> Option<Place> {
        let sections = |at: &At| [at.section.clone(), default_of(&at.section)];
        let stands = about.iter().find_map(|at| {
            sections(at).iter().find_map(|s| self.sections.get(s)?.keys.get(at.key)).map(|found| found.place.clone())
        });
        let first = about.first()?;
        stands.or_else(|| sections(first).iter().find_map(|s| self.sections.get(s)?.place.clone()))
    }

    fn file(&mut self, file: &File) {
        let mut secret = None;
        for entry in &file.table {
            let kind = Kind::ALL.into_iter().find(|kind| *kind != Kind::Top && kind.word() == entry.key);
            match (kind, entry.node.table()) {
                (None, _) => self.option(file, Kind::Top, "", entry),
                (Some(kind), None) => {
                    let name = if kind.named() { ".NAME" } else { "" };
                    let text = format!("'{}' is a section: write [{0}{name}] on a line of its own", entry.key);
                    self.mistake(file, entry.line, text);
                }
                (Some(kind), Some(table)) if kind.named() => self.named(file, kind, table, &mut secret),
                (Some(kind), Some(table)) => {
                    self.section(file, kind, entry, kind.word().to_owned(), table, &mut secret)
                }
            }
        }
        self.open_to_others(file, secret);
    }

    /// `[host.db1]`, `[host.db2]`, …: what stands under `host`.
    fn named(&mut self, file: &File, kind: Kind, table: &Table, secret: &mut Option<usize>) {
        let word = kind.word();
        for entry in table {
            let name = &entry.key;
            let Some(inner) = entry.node.table() else {
                let place = if kind == Kind::Role {
                    format!("[{word}.NAME]")
                } else {
                    format!("[{word}.default] or [{word}.NAME]")
                };
                let text = format!("'{name}' stands in [{word}] itself: it belongs in a section with a name, {place}");
                self.mistake(file, entry.line, text);
                continue;
            };
            let good = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_') && !name.is_empty();
            if !good {
                let text = format!("{name:?} cannot be the name of a {word}: use letters, digits, - and _");
                self.mistake(file, entry.line, text);
            } else if kind == Kind::Check && name != "default" && !CheckKind::ALL.iter().any(|c| c.as_str() == name) {
                let known = CheckKind::ALL.iter().map(|c| c.as_str()).chain(["default"]).collect::<Vec<_>>();
                self.mistake(file, entry.line, format!("there is no check '{name}': {}", suggest::hint(name, known)));
                continue;
            } else if kind == Kind::Role && name == "default" {
                let text = "a role cannot be called 'default': roles have no defaults, give each its own values";
                self.mistake(file, entry.line, text.to_owned());
            }
            self.section(file, kind, entry, format!("{word}.{name}"), inner, secret);
        }
    }

    fn section(
        &mut self,
        file: &File,
        kind: Kind,
        header: &Entry,
        section: String,
        table: &Table,
        secret: &mut Option<usize>,
    ) {
        let place = Place { file: file.path.clone(), line: header.line };
        self.sections.entry(section.clone()).or_default().place.get_or_insert(place);
        for entry in table {
            self.option(file, kind, &section, entry);
            if PASSWORDS.iter().any(|p| p.password.name == entry.key) {
                *secret = Some(secret.map_or(entry.line, |first| first.min(entry.line)));
            }
        }
        for password in PASSWORDS {
            let find = |name| table.iter().find(|entry| entry.key == name);
            if let (Some(_), Some(entry)) = (find(password.password.name), find(password.file.name)) {
                let text = format!(
                    "[{section}] has both {} and {}: leave one of them out",
                    password.password.name, password.file.name
                );
                self.mistake(file, entry.line, text);
            }
        }
    }

    fn option(&mut self, file: &File, kind: Kind, section: &str, entry: &Entry) {
        let name = entry.key.as_str();
        let Some(option) = kind.options().iter().find(|option| option.name() == name) else {
            return self.mistake(file, entry.line, unknown(kind, section, name));
        };
        for (line, text) in option.wrong(&entry.node) {
            self.mistake(file, line, format!("{name} {text}"));
        }
        if option.name() == options::MAX_BACKLOG.name && section != "check.default" && section != "check.rep_backlog" {
            let text = format!("{name} belongs in [check.rep_backlog]: [{section}] does not look at the backlog");
            self.mistake(file, entry.line, text);
        }
        let keys = &mut self.sections.entry(section.to_owned()).or_default().keys;
        // A password and its file are two ways to say one thing, so either replaces the other of an earlier file.
        for Password { password, file: in_file } in PASSWORDS {
            if name == password.name {
                keys.remove(in_file.name);
            } else if name == in_file.name {
                keys.remove(password.name);
            }
        }
        let place = Place { file: file.path.clone(), line: entry.line };
        keys.insert(option.name(), Found { place, node: entry.node.clone() });
    }

    /// As MMM did: what holds passwords is not for everybody's eyes, and nobody else writes what the daemons obey.
    fn open_to_others(&mut self, file: &File, secret: Option<usize>) {
        let shown = file.path.display();
        let mode = file.mode;
        if let (Some(line), true) = (secret, mode & 0o007 != 0) {
            let text = format!(
                "this file holds passwords and is open to everybody (mode {mode:04o}): chmod o= {shown}, or move them to \
                 files of their own (agent_password_file and the like)"
            );
            self.mistake(file, line, text);
        } else if mode & 0o002 != 0 {
            let text = format!("everybody can write to this file (mode {mode:04o}): chmod o-w {shown}");
            self.mistakes.push(Mistake { file: file.path.clone(), line: None, text });
        }
    }

    fn mistake(&mut self, file: &File, line: usize, text: String) {
        self.mistakes.push(Mistake { file: file.path.clone(), line: Some(line), text });
    }
}

fn unknown(kind: Kind, section: &str, name: &str) -> String {
    let here = if section.is_empty() { "at the top of a file".to_owned() } else { format!("in [{section}]") };
    if kind == Kind::Top && name == "tls" {
        return "TLS is not in this version yet: leave [tls] out, and see insecure_plaintext for daemons that listen \
                beyond loopback"
            .to_owned();
    }
    if let Some(instead) = replaced(kind, name) {
        return format!("'{name}' of MMM means nothing here any more: {instead}");
    }
    if let Some(place) = belongs(name) {
        return format!("'{name}' is no option {here}: it belongs {place}");
    }
    let mut known: Vec<&str> = kind.options().iter().map(|option| option.name()).collect();
    if kind == Kind::Top {
        known.extend(Kind::ALL.into_iter().map(Kind::word).filter(|word| !word.is_empty()));
    }
    format!("unknown option '{name}' {here}: {}", suggest::hint(name, known))
}

/// The section that gives this one its defaults; itself when there is none.
fn default_of(section: &str) -> String {
    match section.split_once('.') {
        Some((kind @ ("host" | "check"), _)) => format!("{kind}.default"),
        Some(_) | None => section.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example files name every option, each with its default.
    #[test]
    fn every_option_is_in_the_example_files() {
        let texts = [
            include_str!("../../../etc/mmm_common.toml"),
            include_str!("../../../etc/mmm_mon.toml"),
            include_str!("../../../etc/mmm_agent.toml"),
        ];
        let lines: Vec<(&str, &str)> = texts
            .iter()
            .flat_map(|text| text.lines())
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.trim_start_matches(['#', ' ']).trim(), value.trim()))
            .collect();
        for option in Kind::ALL.into_iter().flat_map(Kind::options) {
            let values: Vec<&str> = lines.iter().filter(|(name, _)| *name == option.name()).map(|(_, v)| *v).collect();
            assert!(!values.is_empty(), "no example of {}", option.name());
            if let Some(default) = option.documented() {
                let shown = values.iter().any(|v| v.split("  #").next().map(str::trim) == Some(default.as_str()));
                assert!(shown, "{} = {default} is the default, the examples show {values:?}", option.name());
            }
        }
    }
}

//! Reading the files.

use super::{Agent, Monitor};
use std::fmt;
use std::path::{Path, PathBuf};

/// One mistake in the configuration, with its place and its cure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    pub file: PathBuf,
    /// From 1; None when it belongs to no line.
    pub line: Option<usize>,
    pub text: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file.display(), self.text),
            None => write!(f, "{}: {}", self.file.display(), self.text),
        }
    }
}

/// Reads and checks the monitor's configuration. On failure: every mistake.
pub fn monitor(path: &Path) -> Result<Monitor, Vec<Mistake>> {
    Err(vec![Mistake { file: path.to_owned(), line: None, text: String::new() }])
}

/// Reads and checks an agent's configuration. On failure: every mistake.
pub fn agent(path: &Path) -> Result<Agent, Vec<Mistake>> {
    Err(vec![Mistake { file: path.to_owned(), line: None, text: String::new() }])
}

//! What the monitor remembers between two runs: the core's snapshot, in a file that survives a cut of power.
//!
//! Only one monitor may own the file: two with the same memory would hand out the same epochs. The lock lies beside
//! it, because the status file itself is replaced when it grows.

use crate::clock;
use anyhow::{Context, anyhow};
use mmm_common::slots_file::SlotsFile;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Status {
    slots: SlotsFile,
    /// Held as long as the process lives.
    _lock: Flock<File>,
}

#[derive(Serialize, Deserialize)]
struct Saved<T> {
    saved_unix_ms: u64,
    snapshot: T,
}

impl Status {
    /// Opens or creates the file (and its folder), and gives back what was saved last with its age by wall clock.
    ///
    /// # Errors
    /// When another process owns it, or it cannot be read: going on without it would forget epochs.
    pub(crate) fn open<T: for<'a> Deserialize<'a>>(path: &Path) -> anyhow::Result<(Self, Option<(T, Duration)>)> {
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            DirBuilder::new()
                .recursive(true)
                .mode(0o750)
                .create(folder)
                .with_context(|| format!("creating the folder {} for the status file", folder.display()))?;
        }
        let lock = lock(path)?;
        let (slots, saved) = SlotsFile::open::<Saved<T>>(path).context("the saved status cannot be used")?;
        let saved = saved.map(|s| {
            let age = Duration::from_millis(clock::unix_ms().saturating_sub(s.saved_unix_ms));
            (s.snapshot, age)
        });
        Ok((Status { slots, _lock: lock }, saved))
    }

    /// On disk when this returns. Blocks for as long as the disk takes.
    pub(crate) fn save<T: Serialize>(&mut self, snapshot: &T) -> anyhow::Result<()> {
        self.slots
            .save(&Saved { saved_unix_ms: clock::unix_ms(), snapshot })
            .context("the status cannot be saved, so nothing more can be decided safely")?;
        // tests/bench counts these.
        tracing::debug!("the state is on disk");
        Ok(())
    }
}

fn lock(path: &Path) -> anyhow::Result<Flock<File>> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let name = Path::new(&name);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(name)
        .with_context(|| format!("opening {}", name.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| {
        if e == Errno::EWOULDBLOCK {
            anyhow!(
                "another mmm_mond runs with the status file {} ({} is locked): stop it first, or give this one its own \
                 status_path",
                path.display(),
                name.display()
            )
        } else {
            anyhow!("locking {}: {e}", name.display())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_comes_back_with_its_age_and_only_one_owns_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/folder/status");
        let (mut first, saved) = Status::open::<String>(&path).unwrap();
        assert_eq!(saved, None);
        first.save(&"epoch 7").unwrap();
        first.save(&"e".repeat(20_000)).unwrap();

        let second = Status::open::<String>(&path).unwrap_err().to_string();
        assert!(second.contains("another mmm_mond") && second.contains("status_path"), "{second}");

        drop(first);
        let (_, saved) = Status::open::<String>(&path).unwrap();
        let (text, age) = saved.unwrap();
        assert_eq!(text.len(), 20_000);
        assert!(age < Duration::from_secs(60), "{age:?}");
    }

    #[test]
    fn a_status_that_cannot_be_saved_is_an_error_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gone/status");
        let (mut status, _) = Status::open::<String>(&path).unwrap();
        std::fs::remove_dir_all(dir.path().join("gone")).unwrap();
        let e = format!("{:#}", status.save(&"x").unwrap_err());
        assert!(e.contains("cannot be saved") && e.contains("gone/status"), "{e}");
    }
}

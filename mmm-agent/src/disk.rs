//! The state file: what must survive the process (safety.md, R4 and R9), and the lock that keeps a second copy of
//! the agent away from it. It never pretends that something was saved.

use anyhow::{Context, bail};
use mmm_agent_core::io::Saved;
use mmm_common::slots_file::SlotsFile;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub(crate) struct Disk {
    file: SlotsFile,
    /// Held for the life of the process. A file of its own, because the state file is replaced when it grows.
    _lock: Flock<File>,
}

impl Disk {
    /// Opens the state, after making its folder and taking the lock.
    ///
    /// # Errors
    /// Another process holds the lock; the state is damaged; I/O. Each with the path.
    pub(crate) fn open(path: &Path) -> anyhow::Result<(Self, Option<Saved>)> {
        if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(folder)
                .with_context(|| format!("making the folder {} for the agent's state", folder.display()))?;
        }
        let lock = lock(path)?;
        let (file, saved) = SlotsFile::open(path)?;
        Ok((Disk { file, _lock: lock }, saved))
    }

    pub(crate) fn save(&mut self, saved: &Saved) -> io::Result<()> {
        self.file.save(saved)?;
        // tests/bench counts these.
        tracing::debug!("the state is on disk");
        Ok(())
    }
}

fn lock(state: &Path) -> anyhow::Result<Flock<File>> {
    let mut name = state.to_owned().into_os_string();
    name.push(".lock");
    let path = PathBuf::from(name);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut held) => {
            // Only for the message below; the lock itself is the kernel's.
            held.set_len(0).and_then(|()| writeln!(held, "{}", std::process::id()))?;
            Ok(held)
        }
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            bail!(
                "another mmm_agentd (pid {}) already runs with the state {}; stop that one first, or give this one a \
                 state_path of its own",
                pid.trim(),
                state.display()
            )
        }
        Err((_, e)) => Err(e).with_context(|| format!("locking {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_copy_is_refused_and_the_first_ones_state_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/here/agent.state");
        let (mut disk, first) = Disk::open(&path).unwrap();
        assert_eq!(first, None);
        let saved = Saved { machine_boot: "this boot".to_owned(), ..Saved::default() };
        disk.save(&saved).unwrap();

        let refusal = Disk::open(&path).err().unwrap().to_string();
        assert!(refusal.contains(&format!("pid {}", std::process::id())), "{refusal}");
        assert!(refusal.contains("agent.state"), "{refusal}");

        drop(disk);
        assert_eq!(Disk::open(&path).unwrap().1, Some(saved));
    }
}

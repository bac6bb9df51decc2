//! The datadir and its neighbours while another host's data take its place:
//!
//! - `DATADIR.mmm-new`: being received. `DATADIR.mmm-ready`: whole and prepared.
//! - `DATADIR.mmm-old-TIME`: what was there before, until the new server has been found good. A copy that was broken off in
//!   between leaves one; the next copy that is found good deletes all of them. What is put back is the newest, and only when
//!   a copy has taken its place: so never what an earlier copy had put aside.
//! - `DATADIR.mmm-failed-TIME`: a copy that was in place and could not be used.
//!
//! All of them lie in one folder and so on one file system; data go from one name to another by renames, never by
//! copying. Nothing here touches a folder that a process uses. At every moment either the datadir or what it held
//! before is there whole.

use crate::server::may_be_server;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown};
use std::path::{Path, PathBuf};

pub(crate) struct Places {
    /// As it is, behind any link.
    pub(crate) datadir: PathBuf,
    pub(crate) new: PathBuf,
    ready: PathBuf,
    parent: PathBuf,
    name: String,
}

impl Places {
    pub(crate) fn of(configured: &Path) -> Result<Places, String> {
        let datadir = fs::canonicalize(configured).unwrap_or_else(|_| configured.to_owned());
        let (Some(parent), Some(name)) = (datadir.parent(), datadir.file_name().and_then(|n| n.to_str())) else {
            return Err(format!("datadir {} has no folder above it", configured.display()));
        };
        let beside = |what: &str| parent.join(format!("{name}.mmm-{what}"));
        Ok(Places {
            new: beside("new"),
            ready: beside("ready"),
            parent: parent.to_owned(),
            name: name.to_owned(),
            datadir: datadir.clone(),
        })
    }

    /// The database servers that use the datadir.
    pub(crate) fn servers(&self) -> Vec<u32> {
        users_of(&self.datadir).into_iter().filter(|pid| may_be_server(*pid)).collect()
    }

    /// Whether data can be put beside the datadir and renamed into its place.
    pub(crate) fn can_receive(&self) -> Result<(), String> {
        let datadir = self.datadir.display();
        let device = |path: &Path| fs::metadata(path).map(|m| m.dev());
        match (device(&self.datadir), device(&self.parent)) {
            (Ok(a), Ok(b)) if a == b => Ok(()),
            (Ok(_), Ok(_)) => Err(format!(
                "datadir {datadir} is a mount point of its own, so no copy can be put beside it and take its place; make \
                 it a folder below the mount point"
            )),
            (Err(e), _) | (_, Err(e)) => Err(format!("datadir {datadir} cannot be read: {e}")),
        }
    }

    /// An empty folder to receive into.
    pub(crate) fn begin(&self) -> Result<(), String> {
        self.remove_unused()?;
        fs::create_dir(&self.new)
            .and_then(|()| fs::set_permissions(&self.new, PermissionsExt::from_mode(0o700)))
            .map_err(|e| format!("making {}: {e}", self.new.display()))
    }

    /// What was received is whole: it gets the datadir's owner and mode, and a name that says so.
    pub(crate) fn finish(&self) -> Result<(), String> {
        let like = fs::metadata(&self.datadir).map_err(|e| format!("reading {}: {e}", self.datadir.display()))?;
        own(&self.new, like.uid(), like.gid())
            .and_then(|()| fs::set_permissions(&self.new, PermissionsExt::from_mode(like.mode() & 0o7777)))
            .and_then(|()| sync(&self.new))
            .and_then(|()| fs::rename(&self.new, &self.ready))
            .and_then(|()| sync(&self.parent))
            .map_err(|e| format!("finishing {}: {e}", self.new.display()))
    }

    pub(crate) fn swap(&self) -> Result<(), String> {
        if !self.ready.exists() {
            return Err(format!("nothing whole has been received: there is no {}", self.ready.display()));
        }
        must_be_unused(&self.datadir)?;
        must_be_unused(&self.ready)?;
        let old = self.parent.join(format!("{}.mmm-old-{}", self.name, now()));
        rename(&self.datadir, &old)?;
        if let Err(why) = rename(&self.ready, &self.datadir) {
            rename(&old, &self.datadir)?;
            return Err(why);
        }
        tracing::warn!("{} is another host's data now; what it held is in {}", self.datadir.display(), old.display());
        sync(&self.parent).map_err(|e| format!("writing {} out: {e}", self.parent.display()))
    }

    pub(crate) fn restore(&self) -> Result<(), String> {
        // A copy that is still beside the datadir has not taken its place, and so has put nothing aside.
        let in_place = !(self.ready.exists() && self.datadir.exists());
        let Some(old) = self.kept()?.pop().filter(|_| in_place) else {
            return Err(format!("nothing is kept of {}", self.datadir.display()));
        };
        must_be_unused(&self.datadir)?;
        must_be_unused(&old)?;
        let failed = self.parent.join(format!("{}.mmm-failed-{}", self.name, now()));
        if self.datadir.exists() {
            rename(&self.datadir, &failed)?;
        }
        rename(&old, &self.datadir)?;
        tracing::warn!("{} is what it was before", self.datadir.display());
        Ok(())
    }

    pub(crate) fn discard(&self) -> Result<(), String> {
        for old in self.kept()? {
            remove(&old)?;
        }
        self.remove_unused()
    }

    /// Copies that are not in place.
    fn remove_unused(&self) -> Result<(), String> {
        for failed in self.beside("failed")? {
            remove(&failed)?;
        }
        remove(&self.new)?;
        remove(&self.ready)
    }

    /// At the start: a helper that ended between the two renames of a swap has left no datadir.
    pub(crate) fn recover(&self) -> Result<(), String> {
        match self.kept()?.pop() {
            Some(old) if !self.datadir.exists() => {
                tracing::warn!("there is no {}: its data are put back from {}", self.datadir.display(), old.display());
                rename(&old, &self.datadir)
            }
            Some(_) | None => Ok(()),
        }
    }

    fn kept(&self) -> Result<Vec<PathBuf>, String> {
        self.beside("old")
    }

    /// Oldest first.
    fn beside(&self, what: &str) -> Result<Vec<PathBuf>, String> {
        let prefix = format!("{}.mmm-{what}-", self.name);
        let entries = fs::read_dir(&self.parent).map_err(|e| format!("reading {}: {e}", self.parent.display()))?;
        let mut found: Vec<PathBuf> = entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path())
            .collect();
        found.sort();
        Ok(found)
    }
}

/// Names sort by it.
fn now() -> String {
    jiff::Zoned::now().with_time_zone(jiff::tz::TimeZone::UTC).strftime("%Y%m%d-%H%M%S").to_string()
}

fn rename(from: &Path, to: &Path) -> Result<(), String> {
    fs::rename(from, to).map_err(|e| format!("renaming {} to {}: {e}", from.display(), to.display()))
}

/// Not being there is success.
fn remove(folder: &Path) -> Result<(), String> {
    if !folder.exists() {
        return Ok(());
    }
    must_be_unused(folder)?;
    fs::remove_dir_all(folder).map_err(|e| format!("deleting {}: {e}", folder.display()))
}

fn own(path: &Path, uid: u32, gid: u32) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            own(&entry?.path(), uid, gid)?;
        }
        return chown(path, Some(uid), Some(gid));
    }
    lchown(path, Some(uid), Some(gid))
}

/// The file system that the folder is on.
fn sync(folder: &Path) -> io::Result<()> {
    let folder = fs::File::open(folder)?;
    Ok(nix::unistd::syncfs(&folder)?)
}

/// Whoever uses the folder, not only a server: under its feet nothing is renamed or deleted.
fn must_be_unused(folder: &Path) -> Result<(), String> {
    let named = |pid: u32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let program = line.split('\0').next().unwrap_or_default();
        format!("{pid} ({})", program.rsplit('/').next().unwrap_or(program))
    };
    let users: Vec<String> = users_of(folder).into_iter().map(named).collect();
    if users.is_empty() {
        return Ok(());
    }
    Err(format!(
        "{} is in use and so left alone; these processes have files open in it: {}; end them first",
        folder.display(),
        users.join(", ")
    ))
}

/// Processes that hold files below the folder open. Of processes of others only root sees that.
fn users_of(folder: &Path) -> Vec<u32> {
    let Ok(processes) = fs::read_dir("/proc") else { return vec![] };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| holds(*pid, folder))
        .collect()
}

fn holds(pid: u32, folder: &Path) -> bool {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    files.flatten().any(|file| fs::read_link(file.path()).is_ok_and(|target| target.starts_with(folder)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(dir: &tempfile::TempDir) -> Places {
        let datadir = dir.path().join("data");
        fs::create_dir(&datadir).unwrap();
        fs::write(datadir.join("ibdata1"), "old").unwrap();
        Places::of(&datadir).unwrap()
    }

    fn received(places: &Places) {
        places.begin().unwrap();
        fs::create_dir(places.new.join("app")).unwrap();
        fs::write(places.new.join("ibdata1"), "new").unwrap();
        places.finish().unwrap();
    }

    fn content(places: &Places) -> String {
        fs::read_to_string(places.datadir.join("ibdata1")).unwrap()
    }

    fn names(dir: &tempfile::TempDir) -> usize {
        fs::read_dir(dir.path()).unwrap().count()
    }

    #[test]
    fn the_copy_takes_the_place_and_the_old_data_can_return_or_be_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(&dir);
        places.can_receive().unwrap();
        assert!(places.swap().unwrap_err().contains("nothing whole has been received"));
        received(&places);
        assert_eq!(content(&places), "old", "receiving touches nothing");
        places.swap().unwrap();
        assert_eq!(content(&places), "new");
        places.restore().unwrap();
        assert_eq!((content(&places).as_str(), names(&dir)), ("old", 2), "deleting the copy comes later");
        places.discard().unwrap();
        assert_eq!((content(&places).as_str(), names(&dir)), ("old", 1), "and the copy is gone");
        received(&places);
        places.swap().unwrap();
        places.discard().unwrap();
        assert_eq!((content(&places).as_str(), names(&dir)), ("new", 1));
        assert!(places.restore().unwrap_err().contains("nothing is kept"));
    }

    #[test]
    fn data_in_use_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(&dir);
        received(&places);
        let held = fs::File::open(places.datadir.join("ibdata1")).unwrap();
        let why = places.swap().unwrap_err();
        assert!(why.contains(&format!("{} (", std::process::id())) && why.contains("left alone"), "{why}");
        assert_eq!(content(&places), "old");
        drop(held);
        places.swap().unwrap();
        let _held = fs::File::open(places.datadir.join("ibdata1")).unwrap();
        assert!(places.restore().unwrap_err().contains("left alone"));
        assert_eq!(content(&places), "new");
    }

    #[test]
    fn what_an_earlier_copy_has_left_is_never_put_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(&dir);
        let earlier = dir.path().join("data.mmm-old-20260101-000000");
        fs::create_dir(&earlier).unwrap();
        places.can_receive().unwrap();
        received(&places);
        // Somebody is in the way of the swap.
        let held = fs::File::open(places.datadir.join("ibdata1")).unwrap();
        places.swap().unwrap_err();
        drop(held);
        assert!(places.restore().unwrap_err().contains("nothing is kept"));
        assert_eq!(content(&places), "old");
        places.swap().unwrap();
        places.restore().unwrap();
        assert_eq!(content(&places), "old", "the newest is put back");
        assert!(earlier.exists());
        places.discard().unwrap();
        assert!(!earlier.exists());
    }

    #[test]
    fn a_swap_that_broke_off_between_its_renames_is_put_right_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let places = places(&dir);
        fs::rename(&places.datadir, dir.path().join("data.mmm-old-20260101-000000")).unwrap();
        places.recover().unwrap();
        assert_eq!(content(&places), "old");
        places.recover().unwrap();
        assert_eq!(names(&dir), 1);
    }
}

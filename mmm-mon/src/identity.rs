//! Which monitor this is: a random number, made once and kept beside the status file.
//!
//! By it the agents tell a monitor that comes back from another one that was started by mistake: with a status file of
//! its own that one would have a memory of its own, and could give an address to a second host. It must never change
//! while the file is there, and a monitor that cannot keep it must not start.

use anyhow::{Context, anyhow};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Reads the identity from `<status_path>.id`, or makes a new one that is on disk when this returns. The status file
/// must be open already: its lock keeps out a second process that would make one at the same time.
///
/// # Errors
/// When the file cannot be read, holds something else, or cannot be written.
pub(crate) fn read_or_make(status_path: &Path) -> anyhow::Result<u64> {
    let path = beside(status_path, ".id");
    match fs::read_to_string(&path) {
        Ok(text) => read(&text).ok_or_else(|| {
            anyhow!(
                "{} does not hold the identity of a monitor (16 hexadecimal digits): it was damaged from outside; remove \
                 it to get a new one, which the agents obey as soon as what they have heard under the old one is over",
                path.display()
            )
        }),
        Err(e) if e.kind() == ErrorKind::NotFound => make(status_path, &path)
            .with_context(|| format!("making an identity for this monitor and keeping it in {}", path.display())),
        Err(e) => Err(e).with_context(|| format!("reading the identity of this monitor from {}", path.display())),
    }
}

fn read(text: &str) -> Option<u64> {
    let digits = text.strip_suffix('\n')?;
    let good = digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    good.then(|| u64::from_str_radix(digits, 16).ok())?
}

/// A whole file or none, also after a cut of power.
fn make(status_path: &Path, path: &Path) -> io::Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let identity = u64::from_le_bytes(bytes);
    let new = beside(status_path, ".id.new");
    match fs::remove_file(&new) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(format!("{identity:016x}\n").as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    let folder = path.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()?;
    Ok(identity)
}

fn beside(status_path: &Path, ending: &str) -> PathBuf {
    let mut name = status_path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn it_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let status = dir.path().join("status");
        // Left by a process that was killed while it made one.
        fs::write(dir.path().join("status.id.new"), "12").unwrap();
        let first = read_or_make(&status).unwrap();
        assert_eq!(read_or_make(&status).unwrap(), first);
        let file = dir.path().join("status.id");
        assert_eq!(fs::read_to_string(&file).unwrap(), format!("{first:016x}\n"));
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!dir.path().join("status.id.new").exists());

        fs::remove_file(&file).unwrap();
        assert_ne!(read_or_make(&status).unwrap(), first, "a lost disk makes another monitor");
    }

    #[test]
    fn what_is_no_identity_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let status = dir.path().join("status");
        let file = dir.path().join("status.id");
        for text in
            ["", "\n", "12\n", "0123456789abcdef", "0123456789abcdefa\n", "+123456789abcdef\n", "no identity!!!!!\n"]
        {
            fs::write(&file, text).unwrap();
            let e = read_or_make(&status).unwrap_err().to_string();
            assert!(e.contains("status.id does not hold the identity of a monitor"), "{e}");
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
    }

    #[test]
    fn without_a_place_to_keep_it_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let e = format!("{:#}", read_or_make(&dir.path().join("gone/status")).unwrap_err());
        assert!(e.contains("keeping it in") && e.contains("gone/status.id: No such file"), "{e}");
        fs::create_dir(dir.path().join("status.id")).unwrap();
        let e = format!("{:#}", read_or_make(&dir.path().join("status")).unwrap_err());
        assert!(e.contains("reading the identity of this monitor from") && e.contains("Is a directory"), "{e}");
    }
}

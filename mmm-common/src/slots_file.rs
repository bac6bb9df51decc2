//! A small state file that survives a cut of power at any moment: two slots, written in turn (safety.md, R9).
//!
//! Each save goes over the older slot and is synced before the call returns, so the newer one is always whole. A slot
//! is a line of text (`generation checksum length json`), padded, so that the file can be read with `cat`.
//! It never gives back a state it cannot prove whole.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A slot grows in steps of this, so that most saves do not change the file's size (and a data sync is enough).
const STEP: u64 = 4096;
const LIMIT: u64 = 64 * 1024 * 1024;

#[derive(Debug)]
pub struct SlotsFile {
    path: PathBuf,
    file: File,
    slot_size: u64,
    generation: u64,
}

impl SlotsFile {
    /// Opens or creates the file (mode 0600, in an existing folder) and reads the newest whole state.
    ///
    /// # Errors
    /// I/O errors with the path in words; `InvalidData` when the file holds something but no whole slot, because
    /// going on as if it were empty would forget epochs.
    pub fn open<T: DeserializeOwned>(path: &Path) -> io::Result<(Self, Option<T>)> {
        let at = |what: &str, e: io::Error| io::Error::new(e.kind(), format!("{what} {}: {e}", path.display()));
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(|e| at("opening", e))?;
        let size = file.metadata().map_err(|e| at("reading", e))?.len();
        if size > LIMIT {
            return Err(at("reading", io::Error::new(io::ErrorKind::InvalidData, "larger than 64 MiB")));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|e| at("reading", e))?;
        let half = bytes.len() / 2;
        let newest = [&bytes[..half], &bytes[half..]]
            .into_iter()
            .filter_map(read_slot::<T>)
            .max_by_key(|(generation, _)| *generation);
        let me = |generation| SlotsFile { path: path.to_owned(), file, slot_size: half as u64, generation };
        match newest {
            Some((generation, state)) => Ok((me(generation), Some(state))),
            None if bytes.iter().all(|b| *b == 0 || b.is_ascii_whitespace()) => Ok((me(0), None)),
            None => Err(at(
                "reading",
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    "no whole state in it. It was damaged from outside; move it away to start as after the loss of a disk",
                ),
            )),
        }
    }

    /// Writes the state over the older slot; on disk when this returns.
    ///
    /// # Errors
    /// I/O errors with the path; the newer slot on disk is untouched then.
    pub fn save<T: Serialize>(&mut self, state: &T) -> io::Result<()> {
        let json = serde_json::to_string(state).map_err(io::Error::other)?;
        let generation = self.generation + 1;
        let text = format!("{generation} {:08x} {} {json}\n", checksum(generation, json.as_bytes()), json.len());
        self.write(generation, text.into_bytes())
            .map_err(|e| io::Error::new(e.kind(), format!("saving {}: {e}", self.path.display())))?;
        self.generation = generation;
        Ok(())
    }

    fn write(&mut self, generation: u64, mut text: Vec<u8>) -> io::Result<()> {
        let needed = (text.len() as u64).div_ceil(STEP) * STEP;
        if needed > self.slot_size {
            return self.grow(generation, needed, text);
        }
        let size = usize::try_from(self.slot_size).map_err(io::Error::other)?;
        text.resize(size, b' ');
        self.file.write_all_at(&text, (generation % 2) * self.slot_size)?;
        self.file.sync_data()
    }

    /// A state that no longer fits: a new file with larger slots replaces this one by rename.
    fn grow(&mut self, generation: u64, slot_size: u64, mut text: Vec<u8>) -> io::Result<()> {
        let mut name = self.path.clone().into_os_string();
        name.push(".new");
        let new = PathBuf::from(name);
        match std::fs::remove_file(&new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            Ok(()) | Err(_) => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&new)?;
        let size = usize::try_from(slot_size).map_err(io::Error::other)?;
        text.resize(size, b' ');
        let blank = vec![b' '; size];
        file.write_all_at(&text, (generation % 2) * slot_size)?;
        file.write_all_at(&blank, ((generation + 1) % 2) * slot_size)?;
        file.sync_all()?;
        std::fs::rename(&new, &self.path)?;
        let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()?;
        self.file = file;
        self.slot_size = slot_size;
        Ok(())
    }
}

fn read_slot<T: DeserializeOwned>(slot: &[u8]) -> Option<(u64, T)> {
    let text = std::str::from_utf8(slot.split(|b| *b == b'\n').next()?).ok()?;
    let mut parts = text.splitn(4, ' ');
    let generation: u64 = parts.next()?.parse().ok()?;
    let sum = u32::from_str_radix(parts.next()?, 16).ok()?;
    let length: usize = parts.next()?.parse().ok()?;
    let json = parts.next()?;
    if json.len() != length || checksum(generation, json.as_bytes()) != sum {
        return None;
    }
    Some((generation, serde_json::from_str(json).ok()?))
}

/// CRC-32 (IEEE), over the generation and the text.
fn checksum(generation: u64, bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for b in generation.to_le_bytes().iter().chain(bytes) {
        crc ^= u32::from(*b);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> (SlotsFile, Option<String>) {
        SlotsFile::open(path).unwrap()
    }

    #[test]
    fn the_newest_state_comes_back_also_after_growing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let (mut f, first) = open(&path);
        assert_eq!(first, None);
        for text in ["a".to_owned(), "b".to_owned(), "c".repeat(9000), "d".to_owned()] {
            f.save(&text).unwrap();
            assert_eq!(open(&path).1, Some(text));
        }
    }

    #[test]
    fn a_torn_write_at_any_byte_leaves_the_state_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let (mut f, _) = open(&path);
        f.save(&"one").unwrap();
        f.save(&"two").unwrap();
        let before = std::fs::read(&path).unwrap();
        f.save(&"three").unwrap();
        let after = std::fs::read(&path).unwrap();
        for cut in 0..after.len() {
            // Bytes up to the cut are new, the rest is old: what a disk may leave.
            let torn: Vec<u8> = after[..cut].iter().chain(&before[cut..]).copied().collect();
            std::fs::write(&path, torn).unwrap();
            let found = open(&path).1.unwrap();
            assert!(found == "two" || found == "three", "{found} at {cut}");
        }
    }

    #[test]
    fn damage_is_an_error_not_an_empty_state() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        std::fs::write(&path, "rubbish\n").unwrap();
        let e = SlotsFile::open::<String>(&path).unwrap_err().to_string();
        assert!(e.contains("no whole state") && e.contains("state"), "{e}");
    }
}

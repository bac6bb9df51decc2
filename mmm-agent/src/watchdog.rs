//! The kernel's watchdog: held while this host may be writing, and fed by the agent's own loop and nothing else, so that
//! a machine on which that loop stands still is reset (safety.md, guards, 5). It is no part of the proof that nobody
//! else holds a role, and no failure of it may ever touch a role.
//!
//! What the device does (Documentation/watchdog/watchdog-api in the kernel): opening it arms it, every write puts the
//! reset off by the driver's timeout, and closing it disarms it only when the letter V was written just before. So a
//! crash or a kill of the agent while it holds the device ends in a reset, unless its successor opens it in time (it
//! does when it still has the writer role). A panic counts as a crash; any other end writes the V. A driver with
//! `nowayout` could never be disarmed, and would reset the machine after every planned move, so it is refused where the
//! kernel shows that. The timeout is set at the driver: that takes an ioctl, which is not used here.
//!
//! Writes do not wait for a reader or a queue; a real driver answers them in microseconds.

use mmm_common::ids::Millis;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The shortest timeouts of drivers are a few seconds.
const FEED: Duration = Duration::from_secs(1);
/// When to try again with a device that failed.
const AGAIN: Duration = Duration::from_secs(10);

pub(crate) struct Watchdog {
    device: Option<PathBuf>,
    /// What the kernel tells about its watchdogs.
    drivers: PathBuf,
    state: State,
    /// Why it failed the last time, so that the same is not logged every ten seconds.
    trouble: Option<String>,
}

enum State {
    Released,
    Held { file: File, fed: Millis },
    Failed { at: Millis },
}

impl Watchdog {
    /// Without a device it does nothing.
    pub(crate) fn new(device: Option<PathBuf>) -> Self {
        Watchdog { device, drivers: "/sys/class/watchdog".into(), state: State::Released, trouble: None }
    }

    /// To be called every time around the loop, and at [`Watchdog::deadline`] at the latest.
    pub(crate) fn serve(&mut self, writing: bool, now: Millis) {
        let Some(device) = &self.device else { return };
        if !writing {
            self.release();
            return;
        }
        let result = match &mut self.state {
            State::Held { file, fed } if now.since(*fed) >= FEED => feed(file).inspect(|()| *fed = now),
            State::Failed { at } if now.since(*at) < AGAIN => return,
            State::Held { .. } => return,
            State::Released | State::Failed { .. } => open(device, &self.drivers).map(|file| {
                tracing::info!("{} is held: the machine is reset if this agent stands still", device.display());
                self.state = State::Held { file, fed: now };
            }),
        };
        match result {
            Ok(()) => self.trouble = None,
            Err(e) => {
                let text = format!(
                    "the watchdog {} does not work: {e}; the role is not affected. Is the driver's module loaded, may this \
                     process write the device, and does nothing else hold it (systemd's RuntimeWatchdogSec, the package \
                     watchdog)? Trying again every {} s; watchdog_device = \"\" turns it off",
                    device.display(),
                    AGAIN.as_secs()
                );
                if self.trouble.as_ref() != Some(&text) {
                    tracing::error!("{text}");
                }
                self.trouble = Some(text);
                self.release();
                self.state = State::Failed { at: now };
            }
        }
    }

    /// When [`Watchdog::serve`] has something to do next.
    pub(crate) fn deadline(&self) -> Option<Millis> {
        match &self.state {
            State::Released => None,
            State::Held { fed, .. } => Some(*fed + FEED),
            State::Failed { at } => Some(*at + AGAIN),
        }
    }

    fn release(&mut self) {
        if let State::Held { mut file, .. } = std::mem::replace(&mut self.state, State::Released) {
            match file.write_all(b"V") {
                Ok(()) => tracing::info!("the watchdog is released"),
                Err(e) => tracing::error!("the watchdog could not be disarmed, so the machine may be reset: {e}"),
            }
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.release();
        }
    }
}

/// Any byte but V.
fn feed(file: &mut File) -> io::Result<()> {
    file.write_all(b".")
}

/// Armed by that, and fed.
fn open(device: &Path, drivers: &Path) -> io::Result<File> {
    // The old name is the first one's second.
    let name = device.file_name().filter(|name| *name != "watchdog").unwrap_or("watchdog0".as_ref());
    if fs::read_to_string(drivers.join(name).join("nowayout")).is_ok_and(|text| text.trim() == "1") {
        let why = "its driver has nowayout set, so the machine would be reset after every move of the role: load the \
                   driver with nowayout=0";
        return Err(io::Error::other(why));
    }
    let nonblocking = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let mut file = OpenOptions::new().write(true).custom_flags(nonblocking).open(device)?;
    feed(&mut file)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// A FIFO in the place of the device, and the kernel's side of it.
    struct Kernel {
        dir: tempfile::TempDir,
        reading: File,
    }

    impl Kernel {
        fn new() -> Kernel {
            let dir = tempfile::tempdir().unwrap();
            Kernel { reading: fifo(&dir.path().join("watchdog")), dir }
        }

        fn watchdog(&self) -> Watchdog {
            watchdog_at(self.dir.path())
        }

        /// What was written since the last look, and whether somebody has the device open.
        fn sees(&mut self) -> (String, bool) {
            let mut all = Vec::new();
            let is_open = match self.reading.read_to_end(&mut all) {
                Ok(_) => false,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => true,
                Err(e) => panic!("{e}"),
            };
            (String::from_utf8(all).unwrap(), is_open)
        }
    }

    fn watchdog_at(dir: &Path) -> Watchdog {
        let mut dog = Watchdog::new(Some(dir.join("watchdog")));
        dog.drivers = dir.to_owned();
        dog
    }

    fn fifo(path: &Path) -> File {
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let nonblocking = nix::fcntl::OFlag::O_NONBLOCK.bits();
        OpenOptions::new().read(true).custom_flags(nonblocking).open(path).unwrap()
    }

    fn seen(text: &str, is_open: bool) -> (String, bool) {
        (text.to_owned(), is_open)
    }

    #[test]
    fn it_is_held_and_fed_only_while_writing() {
        let mut kernel = Kernel::new();
        let mut dog = kernel.watchdog();
        dog.serve(false, Millis(0));
        assert_eq!((kernel.sees(), dog.deadline()), (seen("", false), None));

        dog.serve(true, Millis(100));
        assert_eq!((kernel.sees(), dog.deadline()), (seen(".", true), Some(Millis(1_100))));
        for now in (200..=4_000).step_by(100) {
            dog.serve(true, Millis(now));
        }
        assert_eq!((kernel.sees(), dog.deadline()), (seen("...", true), Some(Millis(4_100))), "once a second");

        dog.serve(false, Millis(4_050));
        assert_eq!((kernel.sees(), dog.deadline()), (seen("V", false), None));
        dog.serve(false, Millis(9_000));
        dog.serve(true, Millis(9_001));
        assert_eq!(kernel.sees(), seen(".", true), "and again");
    }

    #[test]
    fn a_loop_that_stands_still_feeds_nothing() {
        let mut kernel = Kernel::new();
        let mut dog = kernel.watchdog();
        dog.serve(true, Millis(0));
        assert_eq!(kernel.sees(), seen(".", true));
        // Nothing can be waited for: it is about what must not come.
        std::thread::sleep(FEED + Duration::from_millis(200));
        assert_eq!(kernel.sees(), seen("", true));
        dog.serve(true, Millis(60_000));
        assert_eq!(kernel.sees(), seen(".", true), "it does not make up for what was missed");
    }

    #[test]
    fn an_end_disarms_it_and_a_crash_does_not() {
        let mut kernel = Kernel::new();
        let mut dog = kernel.watchdog();
        dog.serve(true, Millis(0));
        drop(dog);
        assert_eq!(kernel.sees(), seen(".V", false));

        let mut dog = kernel.watchdog();
        let crash = std::thread::spawn(move || {
            dog.serve(true, Millis(0));
            panic!("on purpose");
        });
        assert!(crash.join().is_err());
        assert_eq!(kernel.sees(), seen(".", false), "closed without V: the kernel resets the machine");
    }

    #[test]
    fn a_device_that_cannot_be_had_is_tried_again_every_ten_seconds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("watchdog");
        let mut dog = watchdog_at(dir.path());
        dog.serve(true, Millis(0));
        assert_eq!(dog.deadline(), Some(Millis(10_000)));
        let why = dog.trouble.clone().unwrap_or_default();
        assert!(why.contains("No such file") && why.contains(path.to_str().unwrap()), "{why}");

        let mut kernel = Kernel { reading: fifo(&path), dir };
        dog.serve(true, Millis(9_999));
        assert_eq!(kernel.sees(), seen("", false));
        dog.serve(true, Millis(10_000));
        assert_eq!((kernel.sees(), dog.trouble.clone()), (seen(".", true), None));
    }

    /// A full pipe stands for a driver that fails.
    #[test]
    fn a_device_that_takes_no_food_holds_nobody_up_and_is_opened_anew() {
        let mut kernel = Kernel::new();
        let mut dog = kernel.watchdog();
        dog.serve(true, Millis(0));
        let mut filler = OpenOptions::new()
            .write(true)
            .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
            .open(kernel.dir.path().join("watchdog"))
            .unwrap();
        while filler.write(&[b'x'; 4096]).is_ok() {}
        while filler.write(b"x").is_ok() {}
        let start = std::time::Instant::now();
        dog.serve(true, Millis(1_000));
        assert!(start.elapsed() < Duration::from_secs(1));
        assert!(dog.trouble.is_some());
        drop(filler);
        let (text, is_open) = kernel.sees();
        assert!(text.ends_with('x') && !is_open, "closed: it was not possible to disarm it");
        dog.serve(true, Millis(11_000));
        assert_eq!((kernel.sees(), dog.trouble.clone()), (seen(".", true), None));
    }

    #[test]
    fn a_driver_that_is_never_disarmed_is_not_opened() {
        let mut kernel = Kernel::new();
        let mut dog = kernel.watchdog();
        let driver = kernel.dir.path().join("watchdog0");
        fs::create_dir(&driver).unwrap();
        fs::write(driver.join("nowayout"), "1\n").unwrap();
        dog.serve(true, Millis(0));
        assert_eq!(kernel.sees(), seen("", false));
        assert!(dog.trouble.clone().is_some_and(|why| why.contains("nowayout=0")), "{:?}", dog.trouble);

        fs::write(driver.join("nowayout"), "0\n").unwrap();
        dog.serve(true, Millis(10_000));
        assert_eq!(kernel.sees(), seen(".", true));
    }

    #[test]
    fn without_a_device_nothing_is_done() {
        let mut dog = Watchdog::new(None);
        dog.serve(true, Millis(0));
        assert_eq!((dog.deadline(), dog.trouble.clone()), (None, None));
    }
}

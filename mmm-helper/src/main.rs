//! `mmm_helperd`: does for `mmm_agentd` what only root can do to the database server of a host: start, stop and kill it,
//! send its data to another host, and put another host's data in the place of its own.
//!
//! It has fixed verbs (see the library part) and reads the agent's configuration itself, anew for each request. It obeys
//! root and the user who owns the agent's state folder, and nobody else: the kernel says who is at the other end of the
//! socket. It never listens on the network. One work at a time, each with a deadline. Sending and receiving data end
//! when their asker has gone; starting, stopping and renaming go on to their end.

mod child;
mod copy;
mod datadir;
mod server;

use anyhow::{Context, bail};
use child::Asker;
use clap::Parser;
use mmm_common::config::{Agent as Config, parse};
use mmm_helper::{Answer, MAX_LINE, Status, Verb, socket_path};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Uid, geteuid};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The helper of MMM: runs on each database host as root and does what mmm_agentd may not.
#[derive(Parser)]
#[command(name = "mmm_helperd", version)]
struct Arguments {
    /// The agent's configuration.
    #[arg(short, long, value_name = "FILE", default_value = "/etc/mysql-mmm/mmm_agent.toml")]
    config: PathBuf,
    /// Read the configuration, print every mistake in it, and exit with 0 (good) or 2.
    #[arg(long)]
    check_config: bool,
}

/// For the line of a request to come.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// For an answer to be taken.
const ANSWER_TIME: Duration = Duration::from_secs(120);
/// The exit code for a configuration with mistakes.
const BAD_CONFIG: u8 = 2;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.check_config {
        return check_config(&arguments.config);
    }
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()))
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        // Otherwise a log that cannot be written (a full disk) ends the process with a panic.
        .log_internal_errors(false)
        .init();
    match run(&arguments.config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn check_config(path: &Path) -> ExitCode {
    let mut stderr = io::stderr();
    // Nobody to tell when stderr is closed; the exit code says it too.
    match parse::agent(path) {
        Ok(config) => {
            let _ =
                writeln!(stderr, "OK: {} is good; listening on {}.", path.display(), socket_path(&config).display());
            ExitCode::SUCCESS
        }
        Err(mistakes) => {
            for mistake in mistakes {
                let _ = writeln!(stderr, "{mistake}");
            }
            ExitCode::from(BAD_CONFIG)
        }
    }
}

fn load(path: &Path) -> anyhow::Result<Config> {
    parse::agent(path).map_err(|mistakes| {
        let all: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
        anyhow::anyhow!("the configuration has mistakes: {}", all.join("; "))
    })
}

fn run(path: &Path) -> anyhow::Result<()> {
    let config = load(path)?;
    if let Some(datadir) = &config.server.datadir {
        datadir::Places::of(datadir).and_then(|p| p.recover()).map_err(anyhow::Error::msg)?;
    }
    let (listener, allowed) = listen(&config)?;
    tracing::info!("listening on {}", socket_path(&config).display());
    if let Err(e) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::debug!("systemd could not be told: {e}");
    }
    let helper = Arc::new(Helper { config: path.to_owned(), busy: Mutex::new(None) });
    for stream in listener.incoming() {
        match stream {
            Ok(stream) => {
                let helper = Arc::clone(&helper);
                // Who may ask at all is few, and each line and answer has a deadline: the threads end.
                std::thread::spawn(move || helper.serve(stream, allowed));
            }
            Err(e) => {
                tracing::warn!("cannot accept a connection: {e}");
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }
    Ok(())
}

/// The socket, and the user who may ask besides root.
fn listen(config: &Config) -> anyhow::Result<(UnixListener, Uid)> {
    let path = socket_path(config);
    let state = config.state_path.parent().context("state_path has no folder")?;
    let owner = std::fs::metadata(state)
        .with_context(|| format!("the agent's state folder {} is needed to know who may ask", state.display()))?;
    if UnixStream::connect(&path).is_ok() {
        bail!("another mmm_helperd listens on {} already", path.display());
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(e).with_context(|| format!("removing the old {}", path.display()));
        }
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(&path).with_context(|| format!("listening on {}", path.display()))?;
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))
        .and_then(|()| chown(&path, Some(owner.uid()), None))
        .with_context(|| format!("giving {} to the owner of {}", path.display(), state.display()))?;
    Ok((listener, Uid::from_raw(owner.uid())))
}

struct Helper {
    config: PathBuf,
    /// What is under way.
    busy: Mutex<Option<&'static str>>,
}

/// Clears `busy` however the work ends.
struct Turn<'a>(&'a Helper);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.busy.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Helper {
    fn serve(&self, mut stream: UnixStream, allowed: Uid) {
        let asker = match getsockopt(&stream, sockopt::PeerCredentials) {
            Ok(credentials) => Uid::from_raw(credentials.uid()),
            Err(e) => return tracing::warn!("it cannot be found out who asks: {e}"),
        };
        if !(asker.is_root() || asker == allowed || asker == geteuid()) {
            return tracing::warn!(
                "user {asker} asked for something and was refused: only root and user {allowed} may"
            );
        }
        let timeouts =
            stream.set_read_timeout(Some(REQUEST_TIME)).and_then(|()| stream.set_write_timeout(Some(ANSWER_TIME)));
        let verb = timeouts.and_then(|()| request(&mut stream));
        let answer = match verb {
            Ok(verb) => self.obey(&verb, &stream),
            Err(e) => {
                tracing::warn!("a request of user {asker} was not understood: {e}");
                Err(format!("the request was not understood: {e}"))
            }
        };
        let answer = answer.unwrap_or_else(|why| Answer::Failed { why });
        if let Err(e) = child::tell(&stream, &answer) {
            tracing::warn!("the answer could not be given: {e}");
        }
        // What is still under way towards us would otherwise make the kernel throw the answer away.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut rest = [0; 8192];
        let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
        while matches!(stream.read(&mut rest), Ok(n) if n > 0) {}
    }

    fn obey(&self, verb: &Verb, stream: &UnixStream) -> Result<Answer, String> {
        let config = load(&self.config).map_err(|e| format!("{e:#}"))?;
        let _turn = match verb {
            Verb::Status | Verb::Kill => None,
            Verb::Start
            | Verb::Stop
            | Verb::Donate
            | Verb::Receive { .. }
            | Verb::Swap
            | Verb::Restore
            | Verb::Discard => Some(self.take_turn(verb)?),
        };
        let asker = Asker(stream);
        match verb {
            Verb::Status => return Ok(Answer::Status(status(&config))),
            Verb::Start
            | Verb::Stop
            | Verb::Kill
            | Verb::Donate
            | Verb::Receive { .. }
            | Verb::Swap
            | Verb::Restore
            | Verb::Discard => tracing::info!("asked to {}", verb.describe()),
        }
        let done = match verb {
            Verb::Status => Ok(Answer::Status(status(&config))),
            Verb::Start => server::start(&config).map(|()| Answer::Done),
            Verb::Stop => server::stop(&config).map(|()| Answer::Done),
            Verb::Kill => server::kill(&config).map(|()| Answer::Done),
            Verb::Donate => copy::donate(&config, &asker).map(|()| Answer::Done),
            Verb::Receive { expected_bytes } => copy::receive(&config, *expected_bytes, &asker),
            Verb::Swap => places(&config).and_then(|p| p.swap()).map(|()| Answer::Done),
            Verb::Restore => places(&config).and_then(|p| p.restore()).map(|()| Answer::Done),
            Verb::Discard => places(&config).and_then(|p| p.discard()).map(|()| Answer::Done),
        };
        match &done {
            Ok(_) => tracing::info!("done: {}", verb.describe()),
            Err(why) => tracing::warn!("failed: {}: {why}", verb.describe()),
        }
        done
    }

    fn take_turn(&self, verb: &Verb) -> Result<Turn<'_>, String> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        match *busy {
            Some(other) => {
                Err(format!("mmm_helperd is busy: it was asked to {other} and has not ended; try again later"))
            }
            None => {
                *busy = Some(verb.describe());
                Ok(Turn(self))
            }
        }
    }
}

fn places(config: &Config) -> Result<datadir::Places, String> {
    let datadir =
        config.server.datadir.as_ref().ok_or("datadir is not configured; set it in [agent] of mmm_agent.toml")?;
    datadir::Places::of(datadir)
}

fn status(config: &Config) -> Status {
    let places = places(config);
    Status {
        users: places.as_ref().map(|p| p.servers()).unwrap_or_default(),
        datadir: config.server.datadir.as_ref().map(|d| d.display().to_string()),
        cannot_receive: places.and_then(|p| p.can_receive()).and_then(|()| copy::has_tools()).err(),
    }
}

/// The line of a request, byte by byte: what follows it belongs to somebody else.
fn request(stream: &mut UnixStream) -> io::Result<Verb> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        if byte[0] == b'\n' {
            let said: serde_json::Value = serde_json::from_slice(&line).map_err(io::Error::other)?;
            let verb: Verb = serde_json::from_value(said.clone()).map_err(io::Error::other)?;
            // Of a verb without numbers serde would take anything besides.
            if serde_json::to_value(&verb).map_err(io::Error::other)? != said {
                return Err(io::Error::other("there is more in it than the verb has"));
            }
            return Ok(verb);
        }
        line.push(byte[0]);
        if line.len() > MAX_LINE {
            return Err(io::Error::other("the line is too long"));
        }
    }
}

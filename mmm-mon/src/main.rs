//! `mmm_mond`: watches the database hosts and decides who holds which role.
//!
//! This crate is the shell around `mmm_mon_core`: sockets, files, timers, signals. Read [`runtime`] first. It must never
//! decide anything about roles itself.

mod agents;
mod checks;
mod clock;
mod clusters;
mod control;
mod doctor;
mod feed;
mod identity;
mod kill;
mod lines;
mod runtime;
mod status;
mod systemd;

use anyhow::Context;
use clap::Parser;
use mmm_common::config::parse;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use systemd::Systemd;
use tracing::error;
use tracing_subscriber::EnvFilter;

const FOLDER: &str = "/etc/mysql-mmm";
const BAD_CONFIG: u8 = 2;

/// Watches the database hosts and decides who holds which role.
#[derive(Debug, Parser)]
#[command(name = "mmm_mond", version)]
struct Args {
    /// Read this configuration instead of /etc/mysql-mmm/mmm_mon.toml
    #[arg(short, long, value_name = "FILE", conflicts_with = "cluster")]
    config: Option<PathBuf>,

    /// Watch several clusters: each mmm_mon_NAME.toml of this folder is one
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "cluster"])]
    clusters: Option<PathBuf>,

    /// Read everything, print every mistake, and exit with 0 (good) or 2
    #[arg(long)]
    check_config: bool,

    /// One of several clusters: @C1 reads /etc/mysql-mmm/mmm_mon_C1.toml
    #[arg(value_name = "@CLUSTER", value_parser = cluster)]
    cluster: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.check_config {
        return args.check_config();
    }
    log_to_stderr();
    let path = args.path();
    let config = match &args.clusters {
        // Each one's mistakes are its own.
        Some(_) => None,
        None => match parse::monitor(&path) {
            Ok(config) => Some(config),
            Err(mistakes) => {
                runtime::log_mistakes(&mistakes);
                error!("mmm_mond does not start with this configuration");
                return ExitCode::from(BAD_CONFIG);
            }
        },
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime");
    let ended = runtime.and_then(|runtime| {
        let ended = runtime.block_on(async {
            let told = runtime::signals()?;
            match config {
                Some(config) => runtime::run(&path, config, told, Systemd::Told).await,
                None => clusters::run(&path, told).await,
            }
        });
        // A thread that still reads a configuration, or a disk that hangs, does not keep the process.
        runtime.shutdown_background();
        ended
    });
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error!("mmm_mond ends: {e:#}");
            ExitCode::FAILURE
        }
    }
}

impl Args {
    /// The configuration, or with several clusters their folder.
    fn path(&self) -> PathBuf {
        match (&self.clusters, &self.config, &self.cluster) {
            (Some(folder), ..) => folder.clone(),
            (None, Some(path), _) => path.clone(),
            (None, None, Some(cluster)) => PathBuf::from(format!("{FOLDER}/mmm_mon_{cluster}.toml")),
            (None, None, None) => PathBuf::from(format!("{FOLDER}/mmm_mon.toml")),
        }
    }

    fn check_config(&self) -> ExitCode {
        let files = match &self.clusters {
            None => vec![self.path()],
            Some(folder) => match clusters::in_folder(folder) {
                Ok(found) => found.into_values().collect(),
                Err(e) => {
                    let _ = writeln!(io::stderr(), "{e:#}");
                    return ExitCode::from(BAD_CONFIG);
                }
            },
        };
        let good = files.iter().filter(|path| is_good(path)).count();
        if good == files.len() { ExitCode::SUCCESS } else { ExitCode::from(BAD_CONFIG) }
    }
}

/// `@C1` gives `C1`. The name becomes part of a file's name, so it may not lead elsewhere.
fn cluster(arg: &str) -> Result<String, String> {
    let name = arg.strip_prefix('@').ok_or("a cluster is written @NAME, for example @C1")?;
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-') {
        return Err("the name of a cluster has letters, digits, '_' and '-' only".to_owned());
    }
    Ok(name.to_owned())
}

/// Says so, or every mistake.
fn is_good(path: &Path) -> bool {
    // A reader that has gone needs no more of it.
    match parse::monitor(path) {
        Ok(_) => {
            let _ = writeln!(io::stdout(), "{}: good", path.display());
            true
        }
        Err(mistakes) => {
            for mistake in mistakes {
                let _ = writeln!(io::stderr(), "{mistake}");
            }
            false
        }
    }
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_env_filter(filter)
        .with_target(false)
        // Otherwise a log that cannot be written (a full disk) ends the process with a panic.
        .log_internal_errors(false)
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(args: &[&str]) -> Result<PathBuf, clap::Error> {
        Args::try_parse_from([&["mmm_mond"], args].concat()).map(|a| a.path())
    }

    #[test]
    fn the_configuration_is_found_as_in_mmm() {
        assert_eq!(path(&[]).unwrap(), PathBuf::from("/etc/mysql-mmm/mmm_mon.toml"));
        assert_eq!(path(&["@C1"]).unwrap(), PathBuf::from("/etc/mysql-mmm/mmm_mon_C1.toml"));
        assert_eq!(path(&["-c", "x.toml"]).unwrap(), PathBuf::from("x.toml"));
        assert_eq!(path(&["--clusters", "/etc/all"]).unwrap(), PathBuf::from("/etc/all"));
        assert!(path(&["--clusters", "/etc/all", "@C1"]).is_err());
        for wrong in [&["C1"][..], &["@"], &["@../x"], &["@C1", "-c", "x.toml"]] {
            assert!(path(wrong).is_err(), "{wrong:?}");
        }
    }
}

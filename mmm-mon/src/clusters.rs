//! Several clusters in one daemon (`--clusters DIR`): every `mmm_mon_NAME.toml` of a folder is a cluster with a loop, a
//! status file, a port for `mmm_control` and a failure of its own.
//!
//! What ends one loop, even a broken invariant in its core, is logged with the cluster's name; that cluster is begun
//! again after a pause, and the others do not notice. SIGHUP looks for new and vanished files too.

use crate::runtime::{self, Told};
use crate::systemd::Systemd;
use anyhow::{Context, bail};
use mmm_common::config::Monitor as Config;
use mmm_common::config::parse;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tracing::{Instrument as _, error, info, info_span};

const BEFORE: &str = "mmm_mon_";
const AFTER: &str = ".toml";

/// Before a cluster whose loop has failed is begun again; doubled each time, up to the second.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A loop that has run for so long has not failed at its start.
const STEADY: Duration = Duration::from_secs(300);
/// How long all loops together may take to end.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

struct Running {
    told: UnboundedSender<Told>,
    task: JoinHandle<()>,
}

/// The configurations of a folder by the names of their clusters.
///
/// # Errors
/// The folder cannot be read, or has none.
pub(crate) fn in_folder(folder: &Path) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("reading the folder {}", folder.display()))?;
    let mut found = BTreeMap::new();
    for entry in entries {
        let path = entry.with_context(|| format!("reading the folder {}", folder.display()))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).and_then(cluster_of);
        if let Some(name) = name {
            found.insert(name.to_owned(), path);
        }
    }
    if found.is_empty() {
        bail!("{} has no file {BEFORE}NAME{AFTER}: each such file is a cluster", folder.display());
    }
    Ok(found)
}

fn cluster_of(file: &str) -> Option<&str> {
    file.strip_prefix(BEFORE)?.strip_suffix(AFTER).filter(|name| !name.is_empty())
}

/// Watches all of them until told to end.
///
/// # Errors
/// There is none at the start.
pub(crate) async fn run(folder: &Path, mut told: UnboundedReceiver<Told>) -> anyhow::Result<()> {
    let mut running = BTreeMap::new();
    arrange(&mut running, in_folder(folder)?).await;
    let mut watchdog = Systemd::Told.watchdog();
    Systemd::Told.ready();
    loop {
        tokio::select! {
            word = told.recv() => match word {
                Some(Told::Reread) => {
                    Systemd::Told.reloading();
                    match in_folder(folder) {
                        Ok(found) => arrange(&mut running, found).await,
                        Err(e) => error!("SIGHUP: the clusters stay as they are: {e:#}"),
                    }
                    running.values().for_each(|cluster| tell(cluster, Told::Reread));
                    Systemd::Told.ready();
                }
                Some(Told::End) | None => break,
            },
            _ = watchdog.due() => watchdog.alive(),
        }
    }
    Systemd::Told.stopping();
    end(std::mem::take(&mut running)).await;
    Ok(())
}

/// Begins what is new, and ends what has no file any more.
async fn arrange(running: &mut BTreeMap<String, Running>, found: BTreeMap<String, PathBuf>) {
    let names: Vec<String> = running.keys().filter(|name| !found.contains_key(*name)).cloned().collect();
    let mut gone = BTreeMap::new();
    for name in names {
        info!(cluster = name, "its configuration is gone: it is not watched any more");
        gone.extend(running.remove_entry(&name));
    }
    end(gone).await;
    for (name, path) in found {
        running.entry(name).or_insert_with_key(|name| {
            let (told, words) = unbounded_channel();
            let task = tokio::spawn(watch(path, words).instrument(info_span!("cluster", name)));
            Running { told, task }
        });
    }
}

async fn end(clusters: BTreeMap<String, Running>) {
    clusters.values().for_each(|cluster| tell(cluster, Told::End));
    let all = async {
        for cluster in clusters.into_values() {
            // A panic was logged by its own task.
            let _ = cluster.task.await;
        }
    };
    if timeout(ENDS_WITHIN, all).await.is_err() {
        error!("not all clusters had ended within {} s; what they had decided is saved", ENDS_WITHIN.as_secs());
    }
}

fn tell(cluster: &Running, word: Told) {
    // One that has ended needs no word.
    let _ = cluster.told.send(word);
}

/// One cluster, begun again and again until it is told to end.
async fn watch(path: PathBuf, mut told: UnboundedReceiver<Told>) {
    let mut pause = PAUSE;
    loop {
        let reading = path.clone();
        let read = tokio::task::spawn_blocking(move || parse::monitor(&reading)).await;
        let config = match read {
            Ok(Ok(config)) => config,
            Ok(Err(mistakes)) => {
                runtime::log_mistakes(&mistakes);
                error!("it is not watched with this configuration; SIGHUP reads {} again", path.display());
                match told.recv().await {
                    Some(Told::Reread) => continue,
                    Some(Told::End) | None => return,
                }
            }
            Err(e) => return error!("reading {}: {e}", path.display()),
        };
        let began = Instant::now();
        if live(&path, config, &mut told).await == Told::End {
            return;
        }
        if began.elapsed() >= STEADY {
            pause = PAUSE;
        }
        error!("this cluster is watched again in {} s", pause.as_secs());
        if let Ok(Some(Told::End) | None) = timeout(pause, told.recv()).await {
            return;
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// One life of a cluster's loop; `End`: it has ended because it was told to.
async fn live(path: &Path, config: Config, told: &mut UnboundedReceiver<Told>) -> Told {
    let (words, heard) = unbounded_channel();
    let own = path.to_owned();
    // A task of its own, so that a panic in it (a broken invariant) ends nothing else.
    let life = async move { runtime::run(&own, config, heard, Systemd::NotTold).await };
    let mut task = tokio::spawn(life.in_current_span());
    let mut ending = false;
    let ended = loop {
        tokio::select! {
            ended = &mut task => break ended,
            word = told.recv(), if !ending => {
                let word = word.unwrap_or(Told::End);
                ending = word == Told::End;
                // One that has just ended needs no word.
                let _ = words.send(word);
            }
        }
    };
    match ended {
        Ok(Ok(())) => return Told::End,
        Ok(Err(e)) => error!("this cluster's monitor has ended: {e:#}"),
        Err(e) => error!("this cluster's monitor has ended: {e}"),
    }
    if ending { Told::End } else { Told::Reread }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_of_the_right_name_is_a_cluster() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["mmm_mon_C1.toml", "mmm_mon_b.toml", "mmm_mon.toml", "mmm_mon_.toml", "mmm_mon_C2.toml~"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let found = in_folder(folder.path()).unwrap();
        assert_eq!(found.keys().collect::<Vec<_>>(), ["C1", "b"]);
        assert_eq!(found["C1"], folder.path().join("mmm_mon_C1.toml"));
        let empty = tempfile::tempdir().unwrap();
        assert!(in_folder(empty.path()).unwrap_err().to_string().contains("no file mmm_mon_NAME.toml"));
    }
}

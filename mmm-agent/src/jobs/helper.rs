//! The agent's end of the line to mmm_helperd, which does what only root can.

use super::progress::Progress;
use mmm_common::config::Agent as Config;
use mmm_helper::{Answer, MAX_LINE, Status, Verb, socket_path};
use std::path::PathBuf;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

const CONNECT: Duration = Duration::from_secs(5);
/// A little longer than the helper itself gives the server.
pub(super) const SERVER: Duration = Duration::from_secs(660);
/// Renames, and deleting what may be many files.
pub(super) const FILES: Duration = Duration::from_secs(1800);
const LOOK: Duration = Duration::from_secs(10);

#[derive(Clone, Debug)]
pub(crate) struct Helper {
    socket: PathBuf,
}

/// One request under way. When this is dropped the helper ends sending and receiving data; anything else goes on there to
/// its end.
pub(super) struct Asked {
    pub(super) from: BufReader<OwnedReadHalf>,
    pub(super) to: OwnedWriteHalf,
}

impl Helper {
    pub(crate) fn of(config: &Config) -> Helper {
        Helper { socket: socket_path(config) }
    }

    #[cfg(test)]
    pub(super) fn nowhere() -> Helper {
        Helper { socket: PathBuf::from("/nonexistent/helper.sock") }
    }

    pub(super) async fn ask(&self, verb: &Verb) -> Result<Asked, String> {
        let at = |why: String| {
            format!(
                "mmm_helperd cannot be asked to {} at {}: {why}; is it running?",
                verb.describe(),
                self.socket.display()
            )
        };
        let stream = match timeout(CONNECT, UnixStream::connect(&self.socket)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(e)) => return Err(at(e.to_string())),
            Err(_) => return Err(at("no answer".to_owned())),
        };
        let (from, mut to) = stream.into_split();
        let mut line = serde_json::to_string(verb).map_err(|e| at(e.to_string()))?;
        line.push('\n');
        to.write_all(line.as_bytes()).await.map_err(|e| at(e.to_string()))?;
        Ok(Asked { from: BufReader::new(from), to })
    }

    /// For verbs that are answered in one word.
    pub(super) async fn tell(&self, verb: Verb, limit: Duration) -> Result<(), String> {
        let answer = async { self.ask(&verb).await?.answer(None).await };
        match timeout(limit, answer).await {
            Ok(Ok(Answer::Done)) => Ok(()),
            Ok(Ok(other)) => Err(format!("mmm_helperd was asked to {} and answered {other:?}", verb.describe())),
            Ok(Err(why)) => Err(why),
            Err(_) => Err(format!("mmm_helperd did not {} within {} s", verb.describe(), limit.as_secs())),
        }
    }

    pub(super) async fn status(&self) -> Result<Status, String> {
        match timeout(LOOK, async { self.ask(&Verb::Status).await?.answer(None).await }).await {
            Ok(Ok(Answer::Status(status))) => Ok(status),
            Ok(Ok(other)) => Err(format!("mmm_helperd answered {other:?} to a look")),
            Ok(Err(why)) => Err(why),
            Err(_) => Err(format!("mmm_helperd does not answer within {} s", LOOK.as_secs())),
        }
    }
}

impl Asked {
    /// The next answer that is no step. `Failed` is an error.
    pub(super) async fn answer(&mut self, progress: Option<&Progress>) -> Result<Answer, String> {
        next_answer(&mut self.from, progress).await
    }
}

pub(super) async fn next_answer(
    from: &mut BufReader<OwnedReadHalf>,
    progress: Option<&Progress>,
) -> Result<Answer, String> {
    loop {
        let mut line = String::new();
        let read = (&mut *from).take(MAX_LINE as u64).read_line(&mut line).await;
        if read.map_err(|e| format!("mmm_helperd broke off: {e}"))? == 0 {
            return Err("mmm_helperd broke off without an answer".to_owned());
        }
        match serde_json::from_str(&line).map_err(|e| format!("mmm_helperd's answer is not understood: {e}"))? {
            Answer::Step { step } => {
                if let Some(progress) = progress {
                    progress.step(&step);
                }
            }
            Answer::Failed { why } => return Err(why),
            answer @ (Answer::Go { .. } | Answer::Status(_) | Answer::Received { .. } | Answer::Done) => {
                return Ok(answer);
            }
        }
    }
}

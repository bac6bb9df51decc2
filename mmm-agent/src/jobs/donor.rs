//! Giving this host's data to another host of the cluster that copies them (MariaDB): from this host's mmm_helperd to
//! the other agent, on a connection of its own.
//!
//! Who asks was checked by the address that it comes from, as with vouching. Nothing changes here by it. One copy at a
//! time is the helper's rule.

use super::helper::Helper;
use crate::lines::{self, Ended};
use mmm_common::ids::HostName;
use mmm_common::wire::{FromDonor, to_line};
use mmm_helper::{Answer, Verb};
use nix::sys::socket::{setsockopt, sockopt};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::time::timeout;

/// For the helper to begin.
const BEGIN: Duration = Duration::from_secs(60);
/// For one piece to be taken by the other side, or to come from the helper.
const STANDSTILL: Duration = Duration::from_secs(360);

#[derive(Clone, Debug)]
pub(crate) struct Donor {
    helper: Helper,
}

impl Donor {
    pub(crate) fn new(helper: Helper) -> Donor {
        Donor { helper }
    }

    /// For tests: one that has no helper to ask.
    #[cfg(test)]
    pub(crate) fn nothing() -> Donor {
        Donor { helper: Helper::nowhere() }
    }

    /// The whole of one connection after the checked hello.
    pub(crate) async fn serve(&self, to: &HostName, writing: &mut OwnedWriteHalf) -> Ended {
        tracing::info!("'{to}' copies this host's data");
        // The other side may be busy writing for longer than a message may wait.
        let patience = u32::try_from(STANDSTILL.as_millis()).unwrap_or(u32::MAX);
        if let Err(e) = setsockopt(AsRef::<TcpStream>::as_ref(writing), sockopt::TcpUserTimeout, &patience) {
            return Ended::Lost(format!("the connection's patience cannot be set: {e}"));
        }
        let mut asked = match timeout(BEGIN, self.begin()).await {
            Ok(Ok((asked, bytes))) => match to_line(&FromDonor::Donating { bytes }) {
                Ok(line) => match lines::write(writing, &line).await {
                    Ok(()) => asked,
                    Err(ended) => return ended,
                },
                Err(e) => return e.into(),
            },
            Ok(Err(why)) => return Ended::Refused(format!("this host's data cannot be sent: {why}")),
            Err(_) => return Ended::Refused("this host's data cannot be sent: mmm_helperd does not begin".to_owned()),
        };
        let mut piece = vec![0; 256 * 1024];
        let mut sent = 0u64;
        loop {
            let n = match timeout(STANDSTILL, asked.from.read(&mut piece)).await {
                // The end of the stream is in the stream.
                Ok(Ok(0)) => {
                    let _ = timeout(Duration::from_secs(5), writing.shutdown()).await;
                    tracing::info!("'{to}' was sent {} MiB", sent >> 20);
                    return Ended::Closed;
                }
                Ok(Ok(n)) => n,
                Ok(Err(e)) => return Ended::Lost(format!("mmm_helperd broke off: {e}")),
                Err(_) => return Ended::Lost("mmm_helperd sends nothing any more".to_owned()),
            };
            match timeout(STANDSTILL, writing.write_all(&piece[..n])).await {
                Ok(Ok(())) => sent += n as u64,
                Ok(Err(e)) => return Ended::Lost(format!("the copy of '{to}' broke off: {e}")),
                Err(_) => return Ended::Lost(format!("'{to}' takes nothing any more")),
            }
        }
    }

    async fn begin(&self) -> Result<(super::helper::Asked, u64), String> {
        let mut asked = self.helper.ask(&Verb::Donate).await?;
        match asked.answer(None).await? {
            Answer::Go { bytes } => Ok((asked, bytes)),
            other @ (Answer::Step { .. }
            | Answer::Status(_)
            | Answer::Received { .. }
            | Answer::Done
            | Answer::Failed { .. }) => Err(format!("mmm_helperd answered {other:?}")),
        }
    }
}

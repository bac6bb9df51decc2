//! Lines from a socket, one at a time, with a limit. It holds no more than one line and a small piece.

use mmm_common::frame::LineDecoder;
use tokio::io::{AsyncRead, AsyncReadExt as _};

#[derive(Debug)]
pub(crate) struct Lines<R> {
    from: R,
    decoder: LineDecoder,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(crate) fn new(from: R, limit: usize) -> Self {
        Lines { from, decoder: LineDecoder::new(limit) }
    }

    /// The next line, without its newline. Nothing is lost when the caller stops waiting.
    ///
    /// # Errors
    /// In words, why there will be no more lines.
    pub(crate) async fn next(&mut self) -> Result<String, String> {
        loop {
            if let Some(line) = self.decoder.next_line().map_err(|e| e.to_string())? {
                return Ok(line);
            }
            let mut piece = [0; 2048];
            match self.from.read(&mut piece).await {
                Ok(0) => return Err("the other side closed the connection".to_owned()),
                Ok(n) => self.decoder.push(&piece[..n]),
                Err(e) => return Err(format!("the connection broke: {e}")),
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn get_mut(&mut self) -> &mut R {
        &mut self.from
    }

    pub(crate) fn into_inner(self) -> R {
        self.from
    }
}

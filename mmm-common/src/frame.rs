//! Cuts a stream of bytes into lines, with a limit. Pure: bytes in, lines out, so it can be fuzzed.

use thiserror::Error;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    #[error("line longer than {limit} bytes; the connection is closed")]
    TooLong { limit: usize },
    #[error("line is not UTF-8; the connection is closed")]
    NotUtf8,
}

/// Collects bytes until a newline. After an error it stays in error: the stream cannot be trusted any more.
#[derive(Debug)]
pub struct LineDecoder {
    buffer: Vec<u8>,
    /// Bytes already looked through for a newline.
    scanned: usize,
    limit: usize,
}

impl LineDecoder {
    pub fn new(limit: usize) -> Self {
        LineDecoder { buffer: Vec::new(), scanned: 0, limit }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole line without its newline, if there is one. Call until it gives None before pushing more.
    pub fn next_line(&mut self) -> Result<Option<String>, FrameError> {
        let Some(at) = self.buffer[self.scanned..].iter().position(|b| *b == b'\n') else {
            self.scanned = self.buffer.len();
            return if self.buffer.len() > self.limit {
                Err(FrameError::TooLong { limit: self.limit })
            } else {
                Ok(None)
            };
        };
        let end = self.scanned + at;
        if end > self.limit {
            return Err(FrameError::TooLong { limit: self.limit });
        }
        let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
        self.scanned = 0;
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        String::from_utf8(line).map(Some).map_err(|_| FrameError::NotUtf8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_over_the_limit_are_refused_complete_or_not() {
        let mut whole = LineDecoder::new(4);
        whole.push(b"12345\n");
        assert_eq!(whole.next_line(), Err(FrameError::TooLong { limit: 4 }));
        let mut part = LineDecoder::new(4);
        part.push(b"12345");
        assert_eq!(part.next_line(), Err(FrameError::TooLong { limit: 4 }));
        assert_eq!(part.next_line(), Err(FrameError::TooLong { limit: 4 }), "and it stays refused");
    }

    #[test]
    fn bytes_that_are_no_text_are_refused() {
        let mut d = LineDecoder::new(10);
        d.push(&[0xff, 0xfe, b'\n']);
        assert_eq!(d.next_line(), Err(FrameError::NotUtf8));
    }

    proptest! {
        #[test]
        fn however_the_bytes_arrive_the_lines_are_the_same(lines in prop::collection::vec("[a-z{}\" ]{0,20}", 0..8),
                                                           cut in 1usize..7) {
            let stream: String = lines.iter().map(|l| format!("{l}\n")).collect();
            let mut d = LineDecoder::new(20);
            let mut got = vec![];
            for piece in stream.as_bytes().chunks(cut) {
                d.push(piece);
                while let Some(line) = d.next_line().unwrap() { got.push(line); }
            }
            prop_assert_eq!(got, lines);
        }
    }
}

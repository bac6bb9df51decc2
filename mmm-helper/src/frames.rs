//! A stream of bytes that tells its own end: a copy of a database that breaks off must not look like a whole one.
//!
//! Each frame is a length of four bytes (big endian) and that many bytes. Length 0: this was all. Length 0xFFFFFFFF: it
//! failed, and a length and a text say why.

use std::io::{self, Read, Write};

/// The longest frame.
pub const MAX_FRAME: usize = 256 * 1024;
const FAILED: u32 = u32::MAX;
const LONGEST_TEXT: u32 = 16 * 1024;

/// What comes next in a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// So many bytes were put into the buffer.
    Data(usize),
    End,
    Failed(String),
}

pub fn write_data(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    for part in bytes.chunks(MAX_FRAME) {
        let length = u32::try_from(part.len()).map_err(io::Error::other)?;
        to.write_all(&length.to_be_bytes())?;
        to.write_all(part)?;
    }
    Ok(())
}

pub fn write_end(to: &mut impl Write) -> io::Result<()> {
    to.write_all(&0u32.to_be_bytes())
}

pub fn write_failed(to: &mut impl Write, why: &str) -> io::Result<()> {
    let text = &why.as_bytes()[..why.len().min(LONGEST_TEXT as usize)];
    to.write_all(&FAILED.to_be_bytes())?;
    to.write_all(&(text.len() as u32).to_be_bytes())?;
    to.write_all(text)
}

/// # Errors
/// `UnexpectedEof` when the stream ends without saying so; `InvalidData` for a length that no writer sends.
pub fn read(from: &mut impl Read, buffer: &mut Vec<u8>) -> io::Result<Next> {
    match read_length(from)? {
        0 => Ok(Next::End),
        FAILED => {
            let length = read_length(from)?;
            if length > LONGEST_TEXT {
                return Err(strange(length));
            }
            buffer.resize(length as usize, 0);
            from.read_exact(buffer)?;
            Ok(Next::Failed(String::from_utf8_lossy(buffer).into_owned()))
        }
        length if length as usize > MAX_FRAME => Err(strange(length)),
        length => {
            buffer.resize(length as usize, 0);
            from.read_exact(buffer)?;
            Ok(Next::Data(length as usize))
        }
    }
}

fn read_length(from: &mut impl Read) -> io::Result<u32> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    Ok(u32::from_be_bytes(length))
}

fn strange(length: u32) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes: this is no stream of a helper"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_stream_is_read_back_and_a_broken_one_is_an_error() {
        let data: Vec<u8> = (0..MAX_FRAME + 10).map(|n| n as u8).collect();
        let mut bytes = Vec::new();
        write_data(&mut bytes, &data).unwrap();
        write_end(&mut bytes).unwrap();
        let whole = |mut from: &[u8]| -> io::Result<Vec<u8>> {
            let (mut all, mut buffer) = (Vec::new(), Vec::new());
            loop {
                match read(&mut from, &mut buffer)? {
                    Next::Data(_) => all.extend_from_slice(&buffer),
                    Next::End => return Ok(all),
                    Next::Failed(why) => return Err(io::Error::other(why)),
                }
            }
        };
        assert_eq!(whole(&bytes).unwrap(), data);
        for cut in [0, 3, 10, bytes.len() - 4, bytes.len() - 1] {
            assert_eq!(whole(&bytes[..cut]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof, "cut at {cut}");
        }
        let mut failed = Vec::new();
        write_data(&mut failed, b"some").unwrap();
        write_failed(&mut failed, "disk full").unwrap();
        assert_eq!(whole(&failed).unwrap_err().to_string(), "disk full");
        assert_eq!(whole(b"GET / HTTP/1.1\r\n").unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}

//! As much of a MariaDB server as an agent needs to find it alive: logins (with any password), the questions of its
//! watcher, and `read_only`, which starts as 1. Every statement it does not know succeeds. It keeps no data.

use super::testnet::TwoHosts;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Connections it takes; a watcher needs three.
const CONNECTIONS: usize = 1000;
const SLEEPING: &str = "SELECT SLEEP(";

/// On the first host, at the usual port, until the test program ends.
pub(crate) fn start(hosts: &TwoHosts) {
    let listener = hosts.on_here(async || TcpListener::bind("0.0.0.0:3306").unwrap());
    let read_only = Arc::new(AtomicBool::new(true));
    std::thread::spawn(move || {
        for stream in listener.incoming().take(CONNECTIONS) {
            let (Ok(stream), read_only) = (stream, Arc::clone(&read_only)) else { return };
            // A client that goes away is the usual end.
            std::thread::spawn(move || Session { stream, sequence: 0 }.serve(&read_only));
        }
    });
}

struct Session {
    stream: TcpStream,
    sequence: u8,
}

impl Session {
    fn serve(mut self, read_only: &AtomicBool) -> io::Result<()> {
        self.send(&greeting())?;
        self.receive()?;
        self.ok()?;
        loop {
            let command = self.receive()?;
            let (kind, text) = command.split_first().ok_or(io::ErrorKind::InvalidData)?;
            let sql = String::from_utf8_lossy(text);
            match (kind, sql.as_ref()) {
                (1, _) => return Ok(()),
                // The tripwire: hears only of the end.
                (3, sql) if sql.starts_with(SLEEPING) => {}
                (3, "SELECT VERSION()") => self.rows(&["VERSION()"], &[&["10.11.6-MariaDB"]])?,
                (3, sql) if sql.contains("@@GLOBAL.read_only AS read_only") => {
                    let names = ["read_only", "log_bin", "server_id", "binlog_state", "slave_pos"];
                    let read_only = if read_only.load(Ordering::SeqCst) { "1" } else { "0" };
                    self.rows(&names, &[&[read_only, "1", "1", "0-1-7", ""]])?;
                }
                (3, "SHOW SLAVE STATUS") => self.rows(&["Master_Host"], &[])?,
                (3, sql) => {
                    if let Some(value) = sql.strip_prefix("SET GLOBAL read_only=") {
                        read_only.store(value == "1", Ordering::SeqCst);
                    }
                    self.ok()?;
                }
                (_, _) => self.ok()?,
            }
        }
    }

    fn receive(&mut self) -> io::Result<Vec<u8>> {
        let mut header = [0; 4];
        self.stream.read_exact(&mut header)?;
        let [a, b, c, sequence] = header;
        let mut payload = vec![0; u32::from_le_bytes([a, b, c, 0]) as usize];
        self.stream.read_exact(&mut payload)?;
        self.sequence = sequence.wrapping_add(1);
        Ok(payload)
    }

    fn send(&mut self, payload: &[u8]) -> io::Result<()> {
        let [a, b, c, _] = u32::try_from(payload.len()).map_err(io::Error::other)?.to_le_bytes();
        self.stream.write_all(&[&[a, b, c, self.sequence], payload].concat())?;
        self.sequence = self.sequence.wrapping_add(1);
        Ok(())
    }

    fn ok(&mut self) -> io::Result<()> {
        self.send(&[0, 0, 0, 2, 0, 0, 0])
    }

    /// All columns are text.
    fn rows(&mut self, names: &[&str], rows: &[&[&str]]) -> io::Result<()> {
        const END: [u8; 5] = [0xfe, 0, 0, 2, 0];
        self.send(&[names.len() as u8])?;
        for name in names {
            let words: Vec<u8> = ["def", "", "", "", name, ""].iter().flat_map(|word| counted(word)).collect();
            // Character set 33 (utf8), 255 bytes at most, VAR_STRING.
            self.send(&[&words[..], &[0x0c, 33, 0, 255, 0, 0, 0, 0xfd, 0, 0, 0, 0, 0]].concat())?;
        }
        self.send(&END)?;
        for row in rows {
            self.send(&row.iter().flat_map(|value| counted(value)).collect::<Vec<u8>>())?;
        }
        self.send(&END)
    }
}

/// A text of less than 251 bytes, after its length.
fn counted(text: &str) -> Vec<u8> {
    [&[text.len() as u8], text.as_bytes()].concat()
}

/// Protocol 10; capabilities PROTOCOL_41, TRANSACTIONS, SECURE_CONNECTION and PLUGIN_AUTH, and no TLS.
fn greeting() -> Vec<u8> {
    const LOW: u16 = 0x0001 | 0x0200 | 0x2000 | 0x8000;
    const HIGH: u16 = 0x0008;
    let mut bytes = vec![10];
    bytes.extend(b"5.5.5-10.11.6-MariaDB\0\x01\0\0\0saltsalt\0");
    bytes.extend(LOW.to_le_bytes());
    bytes.extend([33, 2, 0]);
    bytes.extend(HIGH.to_le_bytes());
    bytes.extend(b"\x15\0\0\0\0\0\0\0\0\0\0saltsaltsalt\0mysql_native_password\0");
    bytes
}

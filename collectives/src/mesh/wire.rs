//! Messages between ranks of different hosts: a header that says what the bytes are for, and a
//! stream that never blocks.

use std::io::{self, Read, Write};
use std::net::TcpStream;

/// First word of every message.
const MAGIC: u32 = u32::from_le_bytes(*b"lora");
/// Bytes moved to or from one peer before the others have their turn.
const TURN: usize = 256 * 1024;
/// Bytes of a header.
pub(super) const HEADER: usize = 44;

/// What a message belongs to. Both sides must be at the same place, or the message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label {
    /// Number of the start of the run.
    pub generation: u64,
    /// Number of the collective since the start.
    pub seq: u64,
    /// Which collective.
    pub kind: u64,
    /// Its length, where all ranks must agree on one; 0 otherwise.
    pub length: u64,
}

impl Label {
    pub(super) fn to_bytes(self, payload: u64) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        let words = [self.generation, self.seq, self.kind, self.length, payload];
        for (place, word) in bytes[4..].chunks_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The label and the number of bytes that follow; `None` for what is no header.
    pub(super) fn from_bytes(bytes: &[u8; HEADER]) -> Option<(Self, u64)> {
        let mut words = bytes[4..].chunks_exact(8).map(|word| {
            let mut eight = [0; 8];
            eight.copy_from_slice(word);
            u64::from_le_bytes(eight)
        });
        let mut next = || words.next().unwrap_or_default();
        let label = Self { generation: next(), seq: next(), kind: next(), length: next() };
        (bytes[..4] == MAGIC.to_le_bytes()).then(|| (label, next()))
    }
}

/// Why a message did not come.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The connection ended or failed.
    Lost(io::Error),
    /// The peer is elsewhere.
    Other(Label),
    /// The bytes are no message of this program.
    Foreign,
}

/// One message on its way out and one on its way in.
#[derive(Debug)]
pub(crate) struct Transfer {
    head_out: [u8; HEADER],
    sent: usize,
    head_in: [u8; HEADER],
    received: usize,
    /// Bytes of the message that comes in, once its header is there.
    expected: Option<usize>,
}

impl Transfer {
    pub fn new(label: Label, outgoing: &[u8]) -> Self {
        let head_out = label.to_bytes(outgoing.len() as u64);
        Self { head_out, sent: 0, head_in: [0; HEADER], received: 0, expected: None }
    }

    /// True when both messages are through.
    pub fn is_done(&self, outgoing: &[u8]) -> bool {
        self.is_sent(outgoing) && self.is_received()
    }

    pub fn is_sent(&self, outgoing: &[u8]) -> bool {
        self.sent == HEADER + outgoing.len()
    }

    pub fn is_received(&self) -> bool {
        self.expected.is_some_and(|bytes| self.received == HEADER + bytes)
    }

    /// Moves what the connection takes and gives without waiting; true when anything moved.
    pub fn step(
        &mut self,
        stream: &mut TcpStream,
        label: Label,
        outgoing: &[u8],
        incoming: &mut Vec<u8>,
    ) -> Result<bool, Broken> {
        let sent = self.send(stream, outgoing).map_err(Broken::Lost)?;
        Ok(self.receive(stream, label, incoming)? || sent)
    }

    fn send(&mut self, stream: &mut TcpStream, outgoing: &[u8]) -> io::Result<bool> {
        let start = self.sent;
        while !self.is_sent(outgoing) && self.sent - start < TURN {
            let part = match self.sent.checked_sub(HEADER) {
                None => &self.head_out[self.sent..],
                Some(done) => &outgoing[done..outgoing.len().min(done + TURN)],
            };
            match stream.write(part) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.sent > start)
    }

    fn receive(
        &mut self,
        stream: &mut TcpStream,
        label: Label,
        incoming: &mut Vec<u8>,
    ) -> Result<bool, Broken> {
        let start = self.received;
        while !self.is_received() && self.received - start < TURN {
            let into = match self.expected {
                None => &mut self.head_in[self.received..],
                Some(bytes) => {
                    let done = self.received - HEADER;
                    &mut incoming[done..bytes.min(done + TURN)]
                }
            };
            match stream.read(into) {
                Ok(0) => return Err(Broken::Lost(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => self.received += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Broken::Lost(error)),
            }
            if self.expected.is_none() && self.received == HEADER {
                let (theirs, bytes) = Label::from_bytes(&self.head_in).ok_or(Broken::Foreign)?;
                if theirs != label {
                    return Err(Broken::Other(theirs));
                }
                let bytes = usize::try_from(bytes).map_err(|_| Broken::Foreign)?;
                incoming.resize(bytes, 0);
                self.expected = Some(bytes);
            }
        }
        Ok(self.received > start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_survives_the_wire_and_noise_does_not() {
        let label = Label { generation: 3, seq: u64::MAX, kind: 0x105, length: 1 << 40 };
        let mut bytes = label.to_bytes(77);
        assert_eq!(Label::from_bytes(&bytes), Some((label, 77)));
        bytes[1] ^= 1;
        assert_eq!(Label::from_bytes(&bytes), None);
    }
}

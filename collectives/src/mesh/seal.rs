//! Messages that only holders of the job's token can make, each good for one conversation.
//!
//! A reader hands out a fresh number (a nonce); the writer's message carries a tag over purpose,
//! nonce and content (HMAC-SHA256, RFC 2104). Who does not know the token cannot make a tag, and an
//! overheard message fits no other nonce. Contents are not hidden: they are addresses and numbers.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::error::Result;

/// Longest sealed content.
const LONGEST: usize = 1 << 20;
/// How long one read or write may block before the group is looked at.
const TICK: Duration = Duration::from_millis(50);

/// A fresh number.
pub(crate) type Nonce = [u8; 16];

/// What all processes of a job know and nobody else.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// From the text that the job's processes share.
    pub fn new(text: &str) -> Token {
        Token(text.to_owned())
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// True when there is nothing to know: every process can make a tag.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn tag(&self, purpose: &str, nonce: &Nonce, content: &[u8]) -> Hmac<Sha256> {
        // Keys of any length are taken.
        let mut mac =
            Hmac::<Sha256>::new_from_slice(self.0.as_bytes()).unwrap_or_else(|_| unreachable!());
        for part in [purpose.as_bytes(), nonce, content] {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// A fresh number from the kernel.
pub(crate) fn nonce() -> io::Result<Nonce> {
    let mut nonce = Nonce::default();
    std::fs::File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    Ok(nonce)
}

/// How long a conversation may go on, and who may end it.
pub(crate) struct Patience<'p> {
    pub until: Instant,
    /// Fails when the group has been called to stop.
    pub watch: &'p (dyn Fn() -> Result<()> + Sync),
}

/// Why a conversation ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// The connection failed, or time ran out ([`io::ErrorKind::TimedOut`]).
    Io(io::Error),
    /// The group has been called to stop.
    Stopped(crate::CollectiveError),
    /// Time ran out, and this is what was missing.
    Unreached(String),
    /// The tag does not fit: another token, or no process of this program.
    Unsealed,
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Patience<'_> {
    /// Once a tick.
    fn check(&self) -> std::result::Result<(), Ended> {
        (self.watch)().map_err(Ended::Stopped)?;
        match Instant::now() < self.until {
            true => Ok(()),
            false => Err(Ended::Io(io::ErrorKind::TimedOut.into())),
        }
    }

    pub fn read(&self, stream: &mut TcpStream, into: &mut [u8]) -> std::result::Result<(), Ended> {
        stream.set_read_timeout(Some(TICK))?;
        let mut done = 0;
        while done < into.len() {
            match stream.read(&mut into[done..]) {
                Ok(0) => return Err(Ended::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => done += count,
                Err(error) if is_tick(&error) => self.check()?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    pub fn write(&self, stream: &mut TcpStream, bytes: &[u8]) -> std::result::Result<(), Ended> {
        stream.set_write_timeout(Some(TICK))?;
        let mut done = 0;
        while done < bytes.len() {
            match stream.write(&bytes[done..]) {
                Ok(count) => done += count,
                Err(error) if is_tick(&error) => self.check()?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Hands out a fresh number and reads the message sealed with it.
    pub fn read_sealed(
        &self,
        stream: &mut TcpStream,
        token: &Token,
        purpose: &str,
    ) -> std::result::Result<Vec<u8>, Ended> {
        let nonce = nonce()?;
        self.write(stream, &nonce)?;
        let mut length = [0; 4];
        self.read(stream, &mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > LONGEST {
            return Err(Ended::Unsealed);
        }
        let (mut content, mut tag) = (vec![0; length], [0; 32]);
        self.read(stream, &mut content)?;
        self.read(stream, &mut tag)?;
        match token.tag(purpose, &nonce, &content).verify_slice(&tag) {
            Ok(()) => Ok(content),
            Err(_) => Err(Ended::Unsealed),
        }
    }

    /// Takes the peer's number and sends a message sealed with it.
    pub fn write_sealed(
        &self,
        stream: &mut TcpStream,
        token: &Token,
        purpose: &str,
        content: &[u8],
    ) -> std::result::Result<(), Ended> {
        let mut nonce = Nonce::default();
        self.read(stream, &mut nonce)?;
        let mut message = (content.len() as u32).to_le_bytes().to_vec();
        message.extend_from_slice(content);
        message.extend_from_slice(&token.tag(purpose, &nonce, content).finalize().into_bytes());
        self.write(stream, &message)
    }
}

fn is_tick(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn talk(writer: &'static str, reader: &str) -> std::result::Result<Vec<u8>, Ended> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            let patience =
                Patience { until: Instant::now() + Duration::from_secs(5), watch: &|| Ok(()) };
            patience
                .write_sealed(&mut stream, &Token::new(writer), "a greeting", b"hello")
                .unwrap();
        });
        let mut stream = listener.accept().unwrap().0;
        let patience =
            Patience { until: Instant::now() + Duration::from_secs(5), watch: &|| Ok(()) };
        let result = patience.read_sealed(&mut stream, &Token::new(reader), "a greeting");
        thread.join().unwrap();
        result
    }

    #[test]
    fn a_sealed_message_opens_with_the_same_token_alone() {
        assert_eq!(talk("secret", "secret").unwrap(), b"hello");
        assert!(matches!(talk("secret", "other"), Err(Ended::Unsealed)));
    }

    #[test]
    fn purpose_and_content_are_told_apart() {
        let token = Token::new("t");
        let tag = |purpose: &str, content: &[u8]| {
            token.tag(purpose, &[7; 16], content).finalize().into_bytes().to_vec()
        };
        assert_ne!(tag("ab", b"c"), tag("a", b"bc"));
    }

    #[test]
    fn waiting_ends_with_the_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _silent = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut stream = listener.accept().unwrap().0;
        let until = Instant::now() + Duration::from_millis(120);
        let patience = Patience { until, watch: &|| Ok(()) };
        let ended = patience.read_sealed(&mut stream, &Token::new("t"), "x").unwrap_err();
        assert!(matches!(ended, Ended::Io(error) if error.kind() == io::ErrorKind::TimedOut));
    }
}

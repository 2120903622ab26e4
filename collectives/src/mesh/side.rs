//! The quiet line beside each connection: a second one to the same rank, on which nothing is said but
//! why that rank gives up.
//!
//! What it is for:
//! - a rank that fails tells its counterparts who is at fault before it goes; without that they would
//!   take the first that closes its connection for the culprit, and every rank of a host does so;
//! - a host that has lost its power or its cable sends nothing at all. On a busy line only the kernel's
//!   retransmissions would tell, after a quarter of an hour; `TCP_USER_TIMEOUT` there would also end the
//!   connection to a healthy rank that does not read for a while, because it saves a file. On a line
//!   without data the kernel's keep-alive questions tell the two apart: the kernel of a host answers them
//!   whatever its ranks do. They say so after [`SILENCE`], later than the launcher's own heartbeats (3 s),
//!   which know more about it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::segment::{AbortRecord, Author};

/// Silence of a host's kernel that ends the connection, at most; it is noticed 3 s sooner where the
/// first question was just due.
const SILENCE: Duration = Duration::from_secs(10);
/// The first question is asked after so long, the next ones each second.
const FIRST_QUESTION: Duration = Duration::from_secs(3);
/// First word of a farewell.
const MAGIC: u32 = u32::from_le_bytes(*b"bye!");
/// Longest reason, in bytes.
const LONGEST: usize = 4096;
/// "The launcher" or "nobody" where a rank could stand.
const NO_RANK: u32 = u32::MAX;

/// What a quiet line says when it speaks.
#[derive(Debug)]
pub(super) enum Word {
    /// Why the rank gave up.
    Farewell(AbortRecord),
    /// The rank is gone without a word.
    Closed,
    /// Its host does not answer any more.
    Silent,
}

/// This rank's end of a quiet line.
#[derive(Debug)]
pub(super) struct Side {
    stream: TcpStream,
    heard: Vec<u8>,
}

impl Side {
    /// Over a connected stream.
    pub fn new(stream: TcpStream) -> io::Result<Side> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let questions = (SILENCE - FIRST_QUESTION).as_secs() as libc::c_int;
        set(&stream, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
        set(&stream, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, FIRST_QUESTION.as_secs() as i32)?;
        set(&stream, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 1)?;
        set(&stream, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, questions)?;
        Ok(Side { stream, heard: Vec::new() })
    }

    /// Says why this rank gives up. A line that takes nothing has nobody at its other end.
    pub fn say(&self, record: &AbortRecord) {
        let by = match record.by {
            Author::Launcher => NO_RANK,
            Author::Rank(rank) => rank as u32,
        };
        let culprit = record.culprit.map_or(NO_RANK, |rank| rank as u32);
        let reason = &record.reason.as_bytes()[..record.reason.len().min(LONGEST)];
        let mut message = Vec::new();
        for word in [MAGIC, by, culprit, reason.len() as u32] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        message.extend_from_slice(reason);
        // It fits into the kernel's buffer: nothing was ever said before.
        drop((&self.stream).write_all(&message));
    }

    pub fn close(&self) {
        // It may have ended already.
        drop(self.stream.shutdown(Shutdown::Both));
    }

    /// What has been said so far, without waiting.
    pub fn listen(&mut self) -> Option<Word> {
        let mut part = [0; 1024];
        loop {
            match self.stream.read(&mut part) {
                Ok(0) => return Some(Word::Closed),
                Ok(count) => self.heard.extend_from_slice(&part[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if is_silence(&error) => return Some(Word::Silent),
                Err(_) => return Some(Word::Closed),
            }
            if let Some(record) = parse(&self.heard) {
                return Some(Word::Farewell(record));
            }
        }
    }

    /// As [`listen`](Side::listen); a rank that has just closed its connection may still have
    /// something to say.
    pub fn last_word(&mut self, limit: Duration) -> Option<Word> {
        let start = Instant::now();
        loop {
            let word = self.listen();
            if word.is_some() || start.elapsed() >= limit {
                return word;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The kernel has given up asking, or a router says that there is no such host any more.
fn is_silence(error: &io::Error) -> bool {
    use io::ErrorKind::{HostUnreachable, NetworkUnreachable, TimedOut};
    matches!(error.kind(), TimedOut | HostUnreachable | NetworkUnreachable)
}

fn parse(heard: &[u8]) -> Option<AbortRecord> {
    let word = |at: usize| {
        let bytes = heard.get(4 * at..4 * at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(bytes))
    };
    let (by, culprit) = (word(1)?, word(2)?);
    let length = (word(3)? as usize).min(LONGEST);
    let reason = heard.get(16..16 + length).filter(|_| word(0) == Some(MAGIC))?;
    Some(AbortRecord {
        by: if by == NO_RANK { Author::Launcher } else { Author::Rank(by as usize) },
        culprit: (culprit != NO_RANK).then_some(culprit as usize),
        reason: String::from_utf8_lossy(reason).into_owned(),
    })
}

fn set(stream: &TcpStream, level: i32, option: i32, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open; pointer and size are those of one integer.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_farewell_is_heard_after_the_end_of_who_said_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let one = Side::new(TcpStream::connect(listener.local_addr().unwrap()).unwrap()).unwrap();
        let mut other = Side::new(listener.accept().unwrap().0).unwrap();
        assert!(other.listen().is_none());
        for by in [Author::Launcher, Author::Rank(2)] {
            let reason = "rank 3 is gone".to_owned();
            let record = AbortRecord { by, culprit: Some(3), reason };
            let parsed = {
                one.say(&record);
                other.last_word(Duration::from_secs(5))
            };
            assert!(matches!(parsed, Some(Word::Farewell(heard)) if heard == record));
            other.heard.clear();
        }
        drop(one);
        assert!(matches!(other.last_word(Duration::from_secs(5)), Some(Word::Closed)));
    }
}

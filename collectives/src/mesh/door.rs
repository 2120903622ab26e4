//! A listener that strangers may knock at: who comes is heard on a thread of its own, so that nobody
//! waits for one that says nothing, or nonsense.

use std::io;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::seal::{Ended, Patience, Token};
use crate::error::CollectiveError;

/// Between two looks at the listener.
const PAUSE: Duration = Duration::from_millis(20);
/// What one stranger may take of our time.
const STRANGER: Duration = Duration::from_secs(2);
/// Strangers heard at a time; those beyond wait in the kernel's queue.
const AT_A_TIME: usize = 512;

/// One that has said who it is.
pub(super) struct Visitor<T> {
    pub said: T,
    pub address: IpAddr,
    pub stream: TcpStream,
}

/// What stands at an address and who may come in.
pub(super) struct Door<'d> {
    pub listener: &'d TcpListener,
    pub token: &'d Token,
    /// What the visitors' first message is for.
    pub purpose: &'static str,
    pub patience: &'d Patience<'d>,
}

impl Door<'_> {
    /// Hands all who know the token to `visit`, until that says that the last one has come.
    pub fn receive<T: for<'de> Deserialize<'de> + Send>(
        &self,
        mut visit: impl FnMut(Visitor<T>) -> bool,
    ) -> Result<(), Ended> {
        let (over, busy) = (AtomicBool::new(false), AtomicUsize::new(0));
        let (sender, arrivals) = channel();
        let (over, busy, door) = (&over, &busy, self);
        std::thread::scope(|scope| {
            let result = self.serve((&arrivals, busy), &mut visit, |stream, address| {
                busy.fetch_add(1, Ordering::Relaxed);
                let sender = sender.clone();
                scope.spawn(move || {
                    if let Some(visitor) = door.hear(stream, address, over) {
                        // The receiver may have what it waits for.
                        drop(sender.send(visitor));
                    }
                    busy.fetch_sub(1, Ordering::Relaxed);
                });
            });
            // Those that still say nothing are let go, so that the end of the scope is near.
            over.store(true, Ordering::Relaxed);
            result
        })
    }

    fn serve<T>(
        &self,
        (arrivals, busy): (&Receiver<Visitor<T>>, &AtomicUsize),
        visit: &mut impl FnMut(Visitor<T>) -> bool,
        mut welcome: impl FnMut(TcpStream, IpAddr),
    ) -> Result<(), Ended> {
        loop {
            while busy.load(Ordering::Relaxed) < AT_A_TIME
                && let Some((stream, address)) = accept(self.listener)?
            {
                welcome(stream, address);
            }
            while let Ok(visitor) = arrivals.recv_timeout(PAUSE) {
                if visit(visitor) {
                    return Ok(());
                }
            }
            (self.patience.watch)().map_err(Ended::Stopped)?;
            if Instant::now() >= self.patience.until {
                return Err(Ended::Io(io::ErrorKind::TimedOut.into()));
            }
        }
    }

    /// Reads who has come; a stranger is let go.
    fn hear<T: for<'de> Deserialize<'de>>(
        &self,
        mut stream: TcpStream,
        address: IpAddr,
        over: &AtomicBool,
    ) -> Option<Visitor<T>> {
        let watch = || match over.load(Ordering::Relaxed) {
            false => (self.patience.watch)(),
            true => Err(CollectiveError::Meeting {
                address: address.to_string(),
                why: "all have come".to_owned(),
            }),
        };
        let until = self.patience.until.min(Instant::now() + STRANGER);
        let short = Patience { until, watch: &watch };
        let said = short.read_sealed(&mut stream, self.token, self.purpose).ok()?;
        let said = serde_json::from_slice(&said).ok()?;
        Some(Visitor { said, address, stream })
    }
}

/// A connection that has come, without waiting for one.
fn accept(listener: &TcpListener) -> io::Result<Option<(TcpStream, IpAddr)>> {
    listener.set_nonblocking(true)?;
    match listener.accept() {
        Ok((stream, address)) => {
            stream.set_nonblocking(false)?;
            Ok(Some((stream, address.ip())))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        // The peer went before it was seen.
        Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
        Err(error) => Err(error),
    }
}

//! Faults on demand: makes a rank of `check-ranks` fail in a chosen way at a chosen round, to see
//! how a run ends. For tests of this launcher and of the schedulers above it.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};
use collectives::Comm;

/// `RANK:ROUND:KIND` or `RANK:ROUND:KIND@START`; `*` means every rank, START the number of the start
/// to which it is limited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    rank: Option<usize>,
    round: u64,
    kind: Kind,
    start: Option<u64>,
}

/// How a rank fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Ends with this code, without a word to the others.
    Exit(i32),
    /// As `Exit` with code 78, after leaving a message.
    Configuration,
    /// Killed by SIGKILL.
    Kill,
    /// Ends by `abort()`.
    Crash,
    /// Panics.
    Panic,
    /// Computes for ever, deaf to polite requests.
    Hang,
    /// Stopped by SIGSTOP.
    Stop,
    /// Calls for everyone to stop, and fails.
    Abort,
    /// Sums another number of values than its peers.
    Mismatch,
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Fault, String> {
        let wrong = || {
            "RANK:ROUND:KIND is needed, with KIND one of exit=CODE, configuration, kill, crash, \
             panic, hang, stop, abort, mismatch"
                .to_owned()
        };
        let mut parts = text.splitn(3, ':');
        let (Some(rank), Some(round), Some(kind)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong());
        };
        let (kind, start) = match kind.split_once('@') {
            Some((kind, start)) => (kind, Some(start.parse().map_err(|_| wrong())?)),
            None => (kind, None),
        };
        let kind = match kind.split_once('=') {
            Some(("exit", code)) => Kind::Exit(code.parse().map_err(|_| wrong())?),
            Some(_) => return Err(wrong()),
            None => match kind {
                "configuration" => Kind::Configuration,
                "kill" => Kind::Kill,
                "crash" => Kind::Crash,
                "panic" => Kind::Panic,
                "hang" => Kind::Hang,
                "stop" => Kind::Stop,
                "abort" => Kind::Abort,
                "mismatch" => Kind::Mismatch,
                _ => return Err(wrong()),
            },
        };
        let rank = match rank {
            "*" => None,
            rank => Some(rank.parse().map_err(|_| wrong())?),
        };
        Ok(Fault { rank, round: round.parse().map_err(|_| wrong())?, kind, start })
    }
}

impl Fault {
    /// Fails if it is this rank's and this round's turn in this start.
    pub fn strike(&self, comm: &Comm, start: u64, round: u64) -> Result<()> {
        let is_mine = self.rank.is_none_or(|rank| rank == comm.rank());
        if round != self.round || !is_mine || self.start.is_some_and(|only| only != start) {
            return Ok(());
        }
        match self.kind {
            Kind::Exit(code) => std::process::exit(code),
            Kind::Configuration => return Err(WrongConfiguration.into()),
            Kind::Kill => {
                // SAFETY: ends this process.
                unsafe { libc::raise(libc::SIGKILL) };
            }
            Kind::Stop => {
                // SAFETY: stops this process, until somebody lets it go on.
                unsafe { libc::raise(libc::SIGSTOP) };
            }
            Kind::Crash => std::process::abort(),
            Kind::Panic => panic!("asked to panic in round {round}"),
            Kind::Hang => loop {
                std::thread::sleep(Duration::from_secs(60));
            },
            Kind::Abort => {
                comm.abort("asked to abort");
                bail!("asked to abort in round {round}");
            }
            Kind::Mismatch => comm.all_reduce(&mut [0.0; 3])?,
        }
        Ok(())
    }
}

/// A failure that is the same on all ranks and that trying again cannot mend.
#[derive(Debug)]
pub struct WrongConfiguration;

impl std::fmt::Display for WrongConfiguration {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "asked to find the configuration wrong")
    }
}

impl std::error::Error for WrongConfiguration {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_parsed_or_refused() {
        let fault = Fault { rank: Some(2), round: 7, kind: Kind::Exit(3), start: None };
        assert_eq!("2:7:exit=3".parse(), Ok(fault));
        let fault = Fault { rank: None, round: 0, kind: Kind::Hang, start: Some(2) };
        assert_eq!("*:0:hang@2".parse(), Ok(fault));
        for text in ["", "1", "1:2", "1:2:sing", "x:2:kill", "1:y:kill", "1:2:exit=z", "1:2:kill@"]
        {
            assert!(text.parse::<Fault>().unwrap_err().contains("RANK:ROUND:KIND"), "{text}");
        }
    }
}

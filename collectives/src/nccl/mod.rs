//! Sums over ranks that stay on the cards: NVIDIA's NCCL, found at run time.
//!
//! The ranks meet through [`Comm`], which also carries NCCL's id; from then on NCCL moves the data and
//! this folder watches it. No call waits for ever: NCCL is used without waiting calls, answers are
//! polled, and while the host waits for a sum ([`Nccl::arm`] to [`Nccl::disarm`]) a watchdog looks at
//! deadline, peers and NCCL's own errors, and ends what runs on the card when one of them fails.
//!
//! Read in this order: [`Nccl`], `lifeline.rs` (who may touch the communicator when), `library.rs`
//! (NCCL's functions), [`check`] (a trial for `lorarun doctor`).

mod check;
#[cfg(test)]
mod fake;
mod library;
mod lifeline;
#[cfg(test)]
mod tests;

pub use check::{Site, check};

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use self::library::{Api, Code, Library, name_version};
use self::lifeline::Lifeline;
use crate::comm::Comm;
use crate::error::{CollectiveError, Result};

/// How long the end of a communicator may take before it is left to the end of the process.
const END_LIMIT: Duration = Duration::from_secs(3);

/// This rank's end of an NCCL communicator of all ranks.
///
/// Graphs that hold its sums must be dropped before it; otherwise its end waits for [`END_LIMIT`] and
/// leaves the rest to the end of the process.
pub struct Nccl {
    lifeline: Arc<Lifeline>,
    watchdog: Option<JoinHandle<()>>,
    version: String,
    limit: Duration,
}

impl Nccl {
    /// Makes a communicator of all ranks of `comm`, on the card that is number `card` for CUDA. All
    /// ranks must call it, each on a thread on which the context of that card is current. Takes at
    /// most the deadline of `comm`.
    ///
    /// With [`CollectiveError::NcclMissing`] all ranks fail alike, and `comm` is as good as before;
    /// after another error the group is finished.
    pub fn connect(comm: &Comm, library: &Path, card: i32) -> Result<Nccl> {
        let loaded = Library::load(library).map(|library| Arc::new(library) as Arc<dyn Api>);
        Nccl::over(comm, loaded, (library, card))
    }

    fn over(
        comm: &Comm,
        api: std::result::Result<Arc<dyn Api>, String>,
        (path, card): (&Path, i32),
    ) -> Result<Nccl> {
        let api = agree(comm, path, api)?;
        let id = if comm.rank() == 0 { Some(api.unique_id()) } else { None };
        // An empty message says that rank 0 has none.
        let sent = id.and_then(|id| id.ok()).map_or_else(Vec::new, |id| id.to_vec());
        let id = comm.broadcast(0, sent)?.try_into().map_err(|_| CollectiveError::NcclMissing {
            rank: 0,
            path: path.display().to_string(),
            why: "it gives no id; does `NCCL_SOCKET_IFNAME` name an interface?".to_owned(),
        })?;
        let version = api.version().map_or_else(|_| String::new(), name_version);
        let limit = comm.deadline();
        let lifeline = Arc::new(Lifeline::new(api, comm.rank(), comm.witness()));
        let watchdog = std::thread::Builder::new()
            .name(format!("nccl-watchdog-{}", comm.rank()))
            .spawn({
                let lifeline = lifeline.clone();
                move || lifeline.watch()
            })
            .map_err(|error| CollectiveError::Thread {
                rank: comm.rank(),
                why: error.to_string(),
            })?;
        // From here on dropping `nccl` cleans up.
        let nccl = Nccl { lifeline, watchdog: Some(watchdog), version, limit };
        nccl.start(comm, &id, card)?;
        Ok(nccl)
    }

    fn start(&self, comm: &Comm, id: &library::Id, card: i32) -> Result<()> {
        let (api, op) = (&self.lifeline.api, "ncclCommInitRankConfig");
        self.lifeline.run(op, self.limit, |handle| {
            let (made, code) = api.init(comm.world_size(), id, comm.rank());
            *handle = made;
            match (made, code) {
                // Nothing to ask again.
                (None, Code::SUCCESS | Code::IN_PROGRESS) => Code(3),
                (_, code) => code,
            }
        })?;
        let mut got = Ok(card);
        self.lifeline.run("ncclCommCuDevice", self.limit, |handle| {
            got = handle.map_or(Ok(card), |handle| api.card(handle));
            got.err().unwrap_or(Code::SUCCESS)
        })?;
        match got {
            Ok(got) if got != card => {
                let why =
                    format!("the current context is not that of card {card}, got: card {got}");
                Err(self.lifeline.give_up(op, why))
            }
            _ => Ok(()),
        }
    }

    /// NCCL's version: `2.28.9`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Replaces `len` floats at `address` on the card by their sums over all ranks, when the work of
    /// `stream` (a `CUstream`) has come so far. Returns once NCCL has given the sum to the stream,
    /// which for the first one includes connecting the cards. Can be captured if one was run before.
    /// All ranks must ask for the same sums in the same order.
    pub fn all_reduce(&self, address: u64, len: usize, stream: u64) -> Result<()> {
        let api = &self.lifeline.api;
        self.lifeline.run("ncclAllReduce", self.limit, |handle| match handle {
            Some(handle) => api.all_reduce(*handle, address, len, stream),
            None => Code(4),
        })
    }

    /// The host begins to wait for sums: from now until [`disarm`](Nccl::disarm) the watchdog ends
    /// them when `deadline` has passed, a rank is lost, a rank or the launcher calls for a stop, or
    /// NCCL reports an error. The stream then goes on with numbers that mean nothing.
    pub fn arm(&self, deadline: Duration) {
        self.lifeline.arm(deadline);
    }

    /// The failure that ended the sums, if there was one.
    pub fn check(&self) -> Result<()> {
        self.lifeline.check()
    }

    /// The host has what it waited for; an error if it was ended instead.
    pub fn disarm(&self) -> Result<()> {
        self.lifeline.disarm()
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        if self.lifeline.end(END_LIMIT)
            && let Some(watchdog) = self.watchdog.take()
        {
            // It has said that it leaves; a panic in it has nobody to tell.
            drop(watchdog.join());
        }
    }
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "Nccl {} (rank {})", self.version, self.lifeline.rank)
    }
}

/// The loaded library, if all ranks have one: a rank must not wait for one that cannot come.
fn agree(
    comm: &Comm,
    path: &Path,
    api: std::result::Result<Arc<dyn Api>, String>,
) -> Result<Arc<dyn Api>> {
    let own = match &api {
        Ok(_) => String::new(),
        Err(why) => format!("{}\n{why}", path.display()),
    };
    let answers = comm.all_gather(own.as_bytes())?;
    let unable = answers.iter().enumerate().find(|(_, answer)| !answer.is_empty());
    match (api, unable) {
        (Ok(api), None) => Ok(api),
        (api, unable) => {
            let (rank, text) = match unable {
                Some((rank, answer)) => (rank, String::from_utf8_lossy(answer).into_owned()),
                None => (comm.rank(), own),
            };
            let (path, why) = text.split_once('\n').unwrap_or(("", &text));
            let why = api.err().filter(|_| rank == comm.rank()).unwrap_or_else(|| why.to_owned());
            Err(CollectiveError::NcclMissing { rank, path: path.to_owned(), why })
        }
    }
}

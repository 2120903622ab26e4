//! What can go wrong in a collective, with the ranks it concerns.

use std::time::Duration;

use crate::segment::{Author, SegmentError};

/// Result of a collective.
pub type Result<T> = std::result::Result<T, CollectiveError>;

/// Why a collective did not complete. After any of these the group is finished: every later call
/// on this rank returns the same error, and the peers are told through the abort flag.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CollectiveError {
    /// A peer's process ended, or the peer left the group, before it took part.
    #[error("rank {rank} is gone before `{op}` number {seq}: {how}")]
    PeerLost {
        /// The rank that is gone.
        rank: usize,
        /// What was being waited for.
        op: String,
        /// Number of the collective since the start, from 1.
        seq: u64,
        /// How it was noticed.
        how: &'static str,
    },
    /// A rank or the launcher called for everyone to stop.
    #[error("stopped by {by}: {reason}")]
    Aborted {
        /// Who called.
        by: Author,
        /// The rank at fault as far as the caller knew.
        culprit: Option<usize>,
        /// Its words.
        reason: String,
    },
    /// The deadline passed. The missing ranks have not reached this collective.
    #[error(
        "deadline of {waited:.1?} passed in `{op}` number {seq}: {}",
        name_missing(missing_ranks)
    )]
    Deadline {
        /// What was being waited for.
        op: String,
        /// Number of the collective since the start, from 1.
        seq: u64,
        /// How long this rank waited.
        waited: Duration,
        /// The ranks that did not arrive.
        missing_ranks: Vec<usize>,
    },
    /// Two ranks are not in the same collective.
    #[error(
        "ranks disagree about collective number {seq}: \
         rank {rank} calls `{ours}`, rank {peer} calls `{theirs}`"
    )]
    Mismatch {
        /// Number of the collective since the start, from 1.
        seq: u64,
        /// This rank.
        rank: usize,
        /// What this rank calls.
        ours: String,
        /// The other rank.
        peer: usize,
        /// What the other rank calls.
        theirs: String,
    },
    /// The root of a broadcast does not exist.
    #[error("`broadcast` from a rank outside the group of {world_size}: {root}")]
    NoSuchRoot {
        /// The root that was asked for.
        root: usize,
        /// Number of ranks.
        world_size: usize,
    },
    /// The flight recorder has no place to write.
    #[error("cannot keep the flight recorder in `{folder}`: {why}")]
    Recorder {
        /// The folder that was given.
        folder: String,
        /// The operating system's words.
        why: String,
    },
    /// The ranks of several hosts did not find each other.
    #[error(
        "cannot meet the ranks of the other hosts at {address}: {why}\n\
         hint: every host must reach that address and port, and every process must have been \
         started for the same job"
    )]
    Meeting {
        /// Where rank 0 is to be found.
        address: String,
        /// What happened.
        why: String,
    },
    /// The environment describes a group that this build cannot form.
    #[error("{what}\nhint: {hint}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What works.
        hint: &'static str,
    },
    /// The shared segment cannot be used.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// NCCL cannot be used on a rank; all ranks get this error and may go on without it.
    #[error(
        "NCCL cannot be used on rank {rank}, {path}: {why}\n\
         hint: `pip install nvidia-nccl-cu12`, or name a folder with `libnccl.so.2` in \
         `LORARUN_CUDA_LIBS`"
    )]
    NcclMissing {
        /// The first rank that cannot.
        rank: usize,
        /// Its library.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// NCCL failed.
    #[error(
        "NCCL failed on rank {rank} in `{op}`: {why}\n\
         hint: `NCCL_DEBUG=INFO` makes NCCL say more, `LORARUN_REDUCE=staged` does without it"
    )]
    Nccl {
        /// This rank.
        rank: usize,
        /// What was asked of it.
        op: String,
        /// Its words.
        why: String,
    },
    /// The communication thread could not start or ended early.
    #[error("communication thread of rank {rank} is not running: {why}")]
    Thread {
        /// This rank.
        rank: usize,
        /// What is known.
        why: String,
    },
}

/// `waiting for rank 3` or `waiting for ranks 1, 3`.
fn name_missing(ranks: &[usize]) -> String {
    let list: Vec<String> = ranks.iter().map(usize::to_string).collect();
    match ranks {
        [] => "all ranks have called it, but it does not end".to_owned(),
        [rank] => format!("waiting for rank {rank}"),
        _ => format!("waiting for ranks {}", list.join(", ")),
    }
}

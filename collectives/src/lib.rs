//! Ranks talk: who am I (`env`), collectives between the ranks of one run, a stop flag for signals.
//!
//! Constraints:
//! - no knowledge of models, tensors' meaning or files: this crate moves `f32` and bytes;
//! - no call can wait for ever: every collective has a deadline, polls an abort flag and notices a
//!   peer that is gone;
//! - sums are taken in rank order (rank 0 + rank 1 + ...), or in pairs where asked for, whatever the
//!   timing, so that every rank of every run holds the same bits;
//! - nothing is left behind: the shared segment has no name in any file system.
//!
//! Read in this order: [`env`], [`Comm`] (`comm.rs`), `group.rs` (ranks in lockstep),
//! `shm.rs` (the algorithms), `segment.rs` (the memory they work on), `mesh` (between hosts); [`nccl`]
//! for sums between cards; [`Standing`] and [`Snapshots`] for those who watch ranks and start them again.

#![deny(missing_docs)]

mod comm;
pub mod env;
mod error;
pub mod exit_code;
mod futex;
mod group;
mod hosts;
mod liveness;
mod mesh;
#[cfg_attr(not(feature = "mpi"), path = "mpi_absent.rs")]
mod mpi;
pub mod nccl;
pub mod recorder;
mod segment;
mod shm;
pub mod signals;
mod snapshot;
mod standing;
mod sums;
mod witness;

pub use comm::{Comm, Pending};
pub use env::{Env, EnvError, ReduceWay};
pub use error::{CollectiveError, Result};
pub use mesh::Token;
pub use segment::{AbortRecord, Author, MAX_RANKS, Segment, SegmentError, report_failure};
pub use snapshot::{Moment, Snapshots};
pub use standing::{Phase, Standing};

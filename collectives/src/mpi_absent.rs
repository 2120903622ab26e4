//! What stands in for MPI in a build without it: nothing that can be joined.

use std::time::Duration;

use crate::error::{CollectiveError, Result};
use crate::sums::Order;

/// There is none.
pub(crate) enum World {}

impl World {
    /// Says that this build has no MPI.
    pub fn join(_rank: usize, size: usize) -> Result<World> {
        Err(CollectiveError::Unsupported {
            what: format!("MPI has started {size} ranks, and this program was built without MPI"),
            hint: "start `lorarun` itself, once on each machine, or build with `--features mpi`",
        })
    }

    /// Cannot be called.
    pub fn all_reduce(&mut self, _: &mut [f32], _: Order, _: Duration) -> Result<()> {
        match *self {}
    }

    /// Cannot be called.
    pub fn barrier(&mut self, _: Duration) -> Result<()> {
        match *self {}
    }

    /// Cannot be called.
    pub fn broadcast(&mut self, _: usize, _: Vec<u8>, _: Duration) -> Result<Vec<u8>> {
        match *self {}
    }

    /// Cannot be called.
    pub fn all_gather(&mut self, _: &[u8], _: Duration) -> Result<Vec<Vec<u8>>> {
        match *self {}
    }
}

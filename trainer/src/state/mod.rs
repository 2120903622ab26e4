//! Saved states: everything a run needs to go on as if it had never stopped.
//!
//! A state is a folder `NAME-...-state`: the trained weights, one file for each part that carries
//! something from step to step (optimizer, loss average...), and `state.json`, which is written last
//! and holds the facts about the run and the size and sha256 of every other file. Random numbers are
//! functions of the seed and of positions, so that seed and step are all the "random state" there
//! is. Nothing in a state depends on the number of ranks.
//!
//! - `folder`: the files, written atomically, read only if every checksum holds
//! - `facts`: what `state.json` says; `identity`: the run it belongs to
//! - `find`: which state `resume` means · `fit`: whether it belongs to this run, what differs
//! - `start`: where the run begins · `parts`: tensors and numbers of each part as a file
//! - `resume`: from the option to weights and parts, on all ranks
//! - `keeper`: what states say, and writing them while training
//! - `accelerate`: states of sd-scripts

pub mod accelerate;
mod facts;
mod find;
mod fit;
mod folder;
mod identity;
mod keeper;
mod parts;
mod resume;
mod start;
#[cfg(test)]
mod tests;

pub use facts::{Facts, RunFacts};
pub use folder::Files;
pub use identity::run_facts;
pub use keeper::{Carried, Keeper, OPTIMIZER, WEIGHTS, weights};
#[cfg(test)]
pub use parts::to_bytes;
pub use parts::{f64_tensor, f64_values, pack_in_place, unpack};
pub use resume::{Loaded, Resume, Sources, begin, begin_again};
pub use start::Start;
#[cfg(test)]
pub use tests::facts as test_facts;

//! Cards: the operation table for NVIDIA GPUs, found at run time.
//!
//! [`driver`] says what a card is asked for, [`Card`] is one in use. The operations are in the files
//! of their kind; their kernels are in `engine/kernels`.

mod arena;
mod attention;
mod card;
mod clip;
mod compose;
mod conv;
pub mod driver;
mod elements;
pub mod flat;
mod layout;
mod lifetimes;
mod loss;
mod matmul;
mod memory;
mod norm;
pub mod nvidia;
mod optimizer;
mod pointwise;
pub mod recorder;
mod segments;
mod staging;
mod table;
pub(crate) mod transfer;
mod working;

pub use arena::Arena;
pub use card::Card;
pub(crate) use card::CardBuffer;
pub use driver::Address;
pub use lifetimes::{Event, Layout, Trace};
pub use memory::CardMemory;
pub(crate) use working::Working;

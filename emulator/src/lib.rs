//! A card that is not there: the kernels of the engine, compiled for the host.
//!
//! Kernels come from the very files that a card gets, and what would be undefined on a card is an
//! error here wherever it can be seen: memory begins as NaN, addresses must lie in what was
//! allocated, arguments must have the widths that the signature says. Work is done at once.

mod calls;
mod convolve;
mod driver;
mod graph;
mod kernels;
mod matmul;
mod memory;

pub use driver::{Launches, launches, open, open_without_convolution};

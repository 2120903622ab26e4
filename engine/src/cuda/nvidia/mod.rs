//! NVIDIA's cards: libraries found at run time, kernels compiled for the card at hand.
//!
//! Nothing of CUDA is needed to build, and nothing of it is linked: without a driver everything here
//! answers with what is missing. `unsafe` is confined to this folder; each library's functions are
//! looked up before the first call (`symbols.rs`), so that an old library is an error, no crash.

mod context;
mod convolution;
mod driver;
mod folders;
mod kernels;
mod launch;
mod libraries;
mod matmul;
mod staging;
mod symbols;
mod tuning;

pub use context::{cards, memory};
pub use driver::{open, usable};
pub use folders::{LIBRARIES_VARIABLE, PYTHON_VARIABLE};
pub use kernels::{
    CACHE_VARIABLE, Capability, all_cached, cache_folder, compile, image, image_in, modules,
};
pub use libraries::{Found, Library, Missing, driver_version, find};
pub use tuning::AUTOTUNE_VARIABLE;

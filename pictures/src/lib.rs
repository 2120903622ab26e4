//! Pictures in files and in memory: reading them upright, whoever made them, and resizing them with
//! the arithmetic of the libraries that the reference uses.
//!
//! Knows nothing of training. Nothing in a file is believed: every fault is a sentence about the
//! picture, and none takes memory that its pixels do not need.

pub mod image_file;
mod interpolation;
mod pixels;
mod png_file;
mod resize;

pub use interpolation::Interpolation;
pub use pixels::Pixels;
pub use png_file::{PngError, encode_png};
pub use resize::resize;
